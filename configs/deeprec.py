"""DeepRec (arXiv 2505.16810): a language model that asks a recommender, then ranks.

jaxrec demo                                                          the embedded world, minutes on two CPU cores
jaxrec run --config=configs/deeprec.py:world                         three seeds, tuned baselines, all controls
jaxrec run --config=configs/deeprec.py:world_off                     the same world without intents
jaxrec run --config=configs/deeprec.py:ml100k --config.data.path=... MovieLens-100K
jaxrec run --config=configs/deeprec.py:paper --config.data.path=... --config.model.path=...
"""

from ml_collections import ConfigDict

VARIANTS = ("demo", "tiny", "world", "world_off", "ml100k", "small", "paper")


def _base() -> ConfigDict:
    c = ConfigDict()
    c.system = "deeprec"
    c.variant = ""
    c.seeds = (0,)  # one run per seed; results are pooled
    # What may differ when a run is continued: paths, devices, and the controls, which come after everything else.
    c.runtime_fields = ("data.path", "model.path", "text.encoder", "mesh", "evaluate.controls")
    c.mesh = ConfigDict({"data": 1, "fsdp": 1, "expert": 1, "tensor": 1})  # devices per axis; one may be -1 (the rest)

    c.data = ConfigDict()
    c.data.source = "world"  # "world" generates the embedded world, "files" reads data.path
    c.data.path = ""  # folder with RecBole atomic files, MovieLens' own files or Amazon Reviews 2023
    c.data.kind = "auto"  # layout of the folder, see jaxrec.data.load_interactions
    c.data.scale = "demo"  # world: tiny, demo, full
    # The knobs of jaxrec.world.WorldConfig; num_rules: how many of jaxrec.world.RULES users follow.
    c.data.world = ConfigDict(
        {
            "intent_share": 0.75,
            "circle_share": 0.5,
            "noise": 0.1,
            "users": 2000,
            "items": 480,
            "makers": 40,
            "num_rules": 2,
        }
    )
    c.data.min_rating = 0.0  # keep ratings of at least this; 0 keeps all
    c.data.k_user = 0  # k-core of users and items; 0 or 1 is off
    c.data.k_item = 0
    c.data.decades = False  # add "1990s" to the categories of titles that end in a year
    c.data.max_history = 12  # items of history the recommender sees
    c.data.test_users = 0  # test users to play; 0 is all of them
    c.data.valid_users = 500  # validation users for choosing

    c.text = ConfigDict()
    c.text.encoder = ""  # folder of a BERT-family encoder (bge, MiniLM, e5); "" uses offline text features
    c.text.dim = 128  # width of the offline features

    c.trm = ConfigDict()  # the preference-aware recommender: sizes, then training
    c.trm.dim = 64
    c.trm.layers = 2
    c.trm.heads = 2
    c.trm.ffn_dim = 128
    c.trm.dropout = 0.3
    c.trm.experts = 4
    c.trm.max_history = 0  # items of history it reads; 0 is data.max_history
    c.trm.lr = 2e-3
    c.trm.batch_size = 512
    c.trm.epochs = 22  # the first eight learn next to nothing, so patience must be longer than that
    c.trm.patience = 12
    c.trm.history_only = 0.3  # share of training texts with words of the history alone (ours)
    c.trm.no_text = 0.25  # share of training pairs without a text, so that history-only use is in distribution (ours)
    c.trm.max_phrases = 4
    c.trm.holdout = 1  # last training events per user kept from the recommender, to be the prompts of RL (ours)

    c.baselines = ConfigDict()
    c.baselines.names = ("sasrec",)  # of sasrec, gru4rec, trm_no_text; popularity and Markov are always there
    c.baselines.dim = 64
    c.baselines.dropout = (0.3,)  # searched over on validation users
    c.baselines.form = "prefix"  # one target per sample, or "all": a target at every position of a window
    c.baselines.stride = 0  # "all": items between windows of data.max_history; 0 for windows that do not overlap
    c.baselines.lr = 2e-3
    c.baselines.batch_size = 512
    c.baselines.epochs = 20
    c.baselines.patience = 12

    c.model = ConfigDict()
    c.model.path = ""  # Hugging Face folder of a pretrained model; "" trains one of the sizes below from scratch
    c.model.dim = 128
    c.model.layers = 2
    c.model.heads = 4
    c.model.head_dim = 32
    c.model.ffn_dim = 256
    c.model.dtype = "float32"
    c.model.remat = "none"  # "block" recomputes blocks in the backward pass, for large models; "products" part of it
    c.model.lora_rank = 0  # above 0: train changes of this rank, merged when a stage is done; all else stays frozen
    c.model.lora_on = ("wq", "wk", "wv", "wo")  # beside these matrices, by their names in models/params.py
    c.model.lora_alpha = 16.0  # a change counts lora_alpha / lora_rank

    c.env = ConfigDict()
    c.env.results = 5  # items per call (paper: 20); two calls fill the list of a model that can only copy
    c.env.answers = 10  # length of the final list
    c.env.max_calls = 2  # paper: 8
    c.env.history = 4  # items of history in the prompt (paper: 20)
    c.env.exclude_history = True  # items already chosen are no candidates, for every method alike (released: False)
    c.env.exclude_seen = True  # later calls return new items only (released: False)
    c.env.instructions = False  # full task description; a model trained from scratch does not need it
    c.env.history_categories = True
    c.env.result_categories = False

    c.rollout = ConfigDict()
    c.rollout.max_prompt = 48  # tokens
    c.rollout.max_total = 104  # tokens, prompt and response
    c.rollout.max_new = 32  # tokens per segment
    c.rollout.top_p = 1.0  # paper: 0.95; below 1 biases the importance ratio
    c.rollout.int8_weights = False  # sample from weights in eight bits, for memory; with rl.tis_cap
    c.rollout.int8_cache = False  # keys and values in eight bits

    c.cold_start = ConfigDict()  # supervised start; steps = 0 leaves it out, as the paper does
    c.cold_start.traces = 8000
    c.cold_start.calls = (0.3, 0.7)  # probability of 1, 2, ... calls
    c.cold_start.hindsight = 0.4  # share of queries with words of the item that followed
    c.cold_start.words = (0.2, 0.4, 0.4)  # probability of 1, 2, ... words in a query
    c.cold_start.recent = 2  # history items that queries describe, as the texts the recommender is trained with
    c.cold_start.open = 0.0  # share of queries that say "anything" and leave the choice to the recommender
    c.cold_start.merges = ("halves",)  # how a trace makes its list: newest, halves, interleave, fused
    c.cold_start.steps = 150
    c.cold_start.batch_size = 64
    c.cold_start.lr = 1e-2
    c.cold_start.b2 = 0.95  # decay of the second moment; 0.99 learns to copy titles later
    c.cold_start.muon_lr = 0.03  # Muon's step on the blocks' matrices; 0 is AdamW everywhere (for pretrained models)

    c.rl = ConfigDict()  # shared by both stages; see rl.GRPOConfig
    c.rl.group_size = 8
    c.rl.prompts_per_step = 16
    c.rl.minibatches = 1
    c.rl.micro_batches = 1
    c.rl.advantage = "reinforce_pp_baseline"
    c.rl.adv_scale = "divide_std"
    c.rl.clip_low = 0.2
    c.rl.clip_high = 0.28
    c.rl.kl_coef = 0.0
    c.rl.tis_cap = 0.0  # cap of the correction for what trainer and sampler compute differently; 0 is off
    c.rl.replay_routing = False  # models with experts: train with the experts that the sampler chose
    c.rl.dynamic_sampling = True  # groups whose rewards are all equal take no part in an update (released: False)
    c.rl.lr = 1.5e-4  # 3e-4 learns less, 8e-4 ends below its supervised start
    # Updates of linear rise. Adam's first steps are all of full size, whatever the gradient says: without it a stage
    # begins by losing a good part of what the model could do.
    c.rl.warmup = 6
    c.rl.b2 = 0.99  # decay of the second moment (released: 0.95)
    c.rl.difficulty = 100  # keep prompts whose target the recommender ranks within this; 0 keeps all
    c.rl.save_every = 10
    c.rl.logprob_chunk = 256

    c.reward = ConfigDict(
        {"point": 0.0, "rank": 1.0, "gate_process": False, "match": "exact"}
    )  # weights, then rules; paper: point 1
    c.cold_rl = ConfigDict({"steps": 12, "lr_scale": 1.0})
    c.rec_rl = ConfigDict({"steps": 48, "lr_scale": 1.0})

    c.evaluate = ConfigDict()
    c.evaluate.batch_size = 500
    c.evaluate.sampled_users = 512  # test users for stage 1's own reward, which is measured in sampled play; 0 is all
    c.evaluate.controls = ()  # see jaxrec.evaluate.deeprec.CONTROLS
    c.evaluate.trajectories = 12  # written out for reading, per stage
    # Fixed before any run: what has to hold, on which metric, for the run to count as a success.
    c.evaluate.criterion = "stage 2 above SFT on recall@10: lower end of the paired 95 % interval over 0"
    return c


def get_config(variant: str = "demo") -> ConfigDict:
    c = _base()
    c.variant = variant or "demo"
    if variant in ("", "demo"):
        c.rec_rl.steps = 80  # with 48 the gain is .006 to .04, as rounding on one processor or another has it
    elif variant == "tiny":  # seconds: for tests
        c.data.scale = "tiny"
        c.env.results = 10  # one call fills a list
        c.rollout.max_total = 128
        c.data.world.update({"users": 160, "items": 64, "makers": 8})
        c.trm.update({"dim": 16, "ffn_dim": 32, "epochs": 2})
        c.baselines.update({"dim": 16, "epochs": 2})
        c.model.update({"dim": 32, "layers": 1, "heads": 2, "head_dim": 16, "ffn_dim": 64})
        c.text.dim = 32
        c.cold_start.update({"traces": 300, "steps": 12, "batch_size": 16})
        c.rl.update({"prompts_per_step": 4, "group_size": 4, "save_every": 1})
        c.cold_rl.steps = 2
        c.rec_rl.steps = 3
        c.evaluate.update({"batch_size": 32, "controls": ()})
        c.data.valid_users = 32
        c.data.test_users = 64
    elif variant in ("world", "world_off"):
        c.seeds = (0, 1, 2)
        c.baselines.names = ("sasrec", "gru4rec", "trm_no_text")
        c.trm.epochs = 30
        c.baselines.update({"dropout": (0.2, 0.5), "epochs": 30})
        c.cold_rl.steps = 20
        c.rec_rl.steps = 120
        c.evaluate.sampled_users = 0
        c.evaluate.controls = (
            "lr_0", "blank_text", "random_words", "untrained", "one_query", "no_stage1", "with_point", "no_rank",
        )  # fmt: skip
        if variant == "world_off":
            c.data.world.intent_share = 0.0
            c.baselines.names = ("sasrec",)
            c.evaluate.controls = ()
    elif variant in ("ml100k", "small"):
        c.data.update({"source": "files", "decades": True, "max_history": 50})
        c.env.exclude_history = False  # as the published figures on these files have it
        # Windows of 50 that overlap by 13, full softmax at every position (RecBole trains on prefixes).
        c.baselines.update(
            {"form": "all", "stride": 37, "dropout": (0.2,), "lr": 3e-3, "batch_size": 128, "epochs": 20,
             "patience": 6}
        )  # fmt: skip
        c.evaluate.sampled_users = 0
        c.trm.update({"dropout": 0.2, "holdout": 4, "epochs": 16, "max_history": 20})
        c.rollout.update({"max_prompt": 64, "max_total": 128})
        # On validation users no words that a history suggests beat the recommender alone, so the policy must know that
        # it may leave the choice to it.
        c.cold_start.open = 0.5
    if variant == "ml100k":
        c.seeds = (0, 1, 2)
        c.evaluate.controls = ("lr_0", "blank_text", "random_words", "untrained")
    if variant == "paper":
        c.data.update({"source": "files", "k_user": 5, "k_item": 5, "max_history": 20})
        c.trm.update(
            {"dim": 128, "ffn_dim": 512, "dropout": 0.5, "experts": 8, "lr": 1e-3, "batch_size": 2048, "epochs": 300,
             "patience": 10, "max_phrases": 6, "holdout": 0}
        )  # fmt: skip
        c.baselines.update({"dropout": (0.2, 0.5), "lr": 1e-3, "batch_size": 2048, "epochs": 300, "patience": 10})
        c.model.update({"dtype": "bfloat16", "remat": "block"})
        c.env.update(
            {"results": 20, "max_calls": 8, "history": 20, "exclude_history": False, "exclude_seen": False,
             "instructions": True, "result_categories": True}
        )  # fmt: skip
        c.rollout.update({"max_prompt": 4096, "max_total": 16384, "max_new": 2048, "top_p": 0.95})
        c.cold_start.update({"steps": 0, "lr": 1e-5, "muon_lr": 0.0})
        c.rl.update(
            {
                "prompts_per_step": 128,
                "minibatches": 2,
                "micro_batches": 64,
                "lr": 1e-6,
                "warmup": 0,
                "b2": 0.95,
                "dynamic_sampling": False,
            }
        )
        c.reward.point = 1.0
        c.cold_rl.steps = 20
        c.rec_rl.steps = 80
    return c
