"""R1-Searcher++ (arXiv 2505.17005): recall what is known, search for what is not, memorise what was found.

jaxrec run --config=configs/r1_searcher_pp.py           on the embedded world, with its own base model (made once)
jaxrec run --config=configs/r1_searcher_pp.py:world     three seeds, with both ablations
jaxrec run --config=configs/r1_searcher_pp.py:small --config.model.path=FOLDER --config.data.train=hotpot_train.json \
    --config.data.test=hotpot_dev.json --config.data.corpus=passages.jsonl \
    --config.teacher.url=http://HOST/v1 --config.teacher.model=NAME
"""

from ml_collections import ConfigDict

VARIANTS = ("demo", "world", "tiny", "small", "paper")


def _base() -> ConfigDict:
    c = ConfigDict()
    c.system = "r1_searcher_pp"
    c.seeds = (0,)
    c.runtime_fields = (
        "model.path", "data.train", "data.test", "data.corpus", "teacher.url", "teacher.key_variable", "mesh",
        "evaluate.judge", "evaluate.judge_url", "evaluate.judge_key_variable", "evaluate.judge_max_tokens",
    )  # fmt: skip

    c.model = ConfigDict()
    c.model.path = ""  # Hugging Face folder; "" is the embedded world's own model
    c.model.base = "world_lm:searcher"  # the config that makes that one, once per seed
    c.model.dtype = "float32"
    c.model.remat = "none"

    c.data = ConfigDict()
    c.data.source = "world"  # world, or files
    c.data.train = ""  # questions, in any form that jaxrec.data.qa reads
    c.data.test = ""
    c.data.corpus = ""  # passages
    c.data.corpus_format = "jsonl"  # jsonl, dpr, kilt or squad, see jaxrec.tools.search
    c.data.cold_questions = 240  # for the cold start; reinforcement learning asks others
    c.data.train_questions = 320  # 0: all others of a file
    c.data.test_questions = 360
    c.data.hops = (1, 2, 3)  # of the world's questions

    c.teacher = ConfigDict()  # author of the cold start's rollouts, and rewriter
    c.teacher.recall = 0.5  # world: how often a step of its rollouts recalls; it does not know what the model knows
    c.teacher.error = 0.05  # world: how often a fact that it states is wrong
    c.teacher.url = ""  # files: an OpenAI-compatible address ...
    c.teacher.model = ""  # ... and the model there
    c.teacher.key_variable = "OPENAI_API_KEY"  # environment variable with the key, "" for none
    c.teacher.temperature = 0.7
    c.teacher.top_p = 1.0
    c.teacher.max_tokens = 512

    c.env = ConfigDict()
    c.env.style = "r1_searcher_pp"  # tags; or r1_searcher, its predecessor's
    c.env.k = 1  # passages per search in training (predecessor: 3)
    c.env.test_k = 1  # in evaluation (predecessor: 5)
    c.env.max_searches = 4  # paper: 8
    c.env.short = True  # the prompt is the question alone, for a model that learned the protocol from examples

    c.rollout = ConfigDict()
    c.rollout.max_prompt = 32  # tokens
    c.rollout.max_total = 224  # tokens, prompt and response
    c.rollout.max_new = 48  # tokens per segment
    c.rollout.top_p = 1.0  # paper: 0.95; below 1 biases the importance ratio

    c.cold_start = ConfigDict()
    c.cold_start.author = "teacher"  # or self: the model's own samples, as the paper has it
    c.cold_start.samples = 8  # rollouts per question
    c.cold_start.per_question = 4  # kept of each, at most
    c.cold_start.steps = 240
    c.cold_start.batch_size = 32
    c.cold_start.lr = 2e-3

    c.rl = ConfigDict()  # see rl.GRPOConfig
    c.rl.steps = 60
    c.rl.group_size = 8  # paper: 16
    c.rl.prompts_per_step = 16  # paper: 64
    c.rl.minibatches = 1  # updates of a rollout batch; 1 is strictly on-policy, as in the paper
    c.rl.micro_batches = 1
    c.rl.advantage = "reinforce_pp_baseline"  # or reinforce_pp, grpo
    c.rl.aggregation = "sequence"
    c.rl.clip = 0.2
    c.rl.kl = 0.0  # of the reward, in nats per token (paper: 1e-4)
    c.rl.lr = 4e-4
    c.rl.warmup = 4
    c.rl.b2 = 0.99
    c.rl.save_every = 20
    c.rl.logprob_chunk = 256

    c.reward = ConfigDict()
    c.reward.eta = 2.0  # bound of the group bonus; 0 leaves the bonus out
    c.reward.ddof = 0

    c.memory = ConfigDict()
    c.memory.weight = 0.1  # mu
    c.memory.per_question = 4  # rewrites of a question and step, at most
    c.memory.share = 0.25  # rewrites of a step, at most this share of its rollouts

    c.evaluate = ConfigDict()
    c.evaluate.batch_size = 120
    c.evaluate.judge = ""  # a model that judges answers beside the rules (papers: gpt-4o-mini), "" for none ...
    c.evaluate.judge_url = ""  # ... at this OpenAI-compatible address; "" is the teacher's, with its key
    c.evaluate.judge_key_variable = "OPENAI_API_KEY"  # environment variable with the key for judge_url, "" for none
    c.evaluate.judge_max_tokens = 64  # of its reply, which is one word; a judge that thinks first needs more
    c.evaluate.probes = 120  # closed-book questions of each kind, of the world
    c.evaluate.ablations = ()  # of no_group, no_memory: trained from the same cold start for as many steps
    # Decided before the first result, on paired 95 % intervals over the questions of all seeds: reinforcement learning
    # answers more questions than the cold start; with the group bonus it searches less often than without (no_group);
    # with the memorisation loss it answers more questions about facts it looked up in training from memory than
    # without (no_memory).

    c.mesh = ConfigDict({"data": 1, "fsdp": 1, "expert": 1, "tensor": 1})
    return c


def get_config(variant: str = "demo") -> ConfigDict:
    c = _base()
    c.variant = variant or "demo"
    if variant == "world":
        c.seeds = (0, 1, 2)
        c.evaluate.ablations = ("no_group", "no_memory")
    if variant == "tiny":  # seconds: for tests
        c.model.base = "world_lm:tiny_searcher"
        c.data.update({"cold_questions": 12, "train_questions": 12, "test_questions": 6})
        c.rollout.max_total = 192
        c.cold_start.update({"samples": 2, "per_question": 2, "steps": 2, "batch_size": 4})
        c.rl.update({"steps": 2, "group_size": 2, "prompts_per_step": 2, "save_every": 1})
        c.evaluate.update({"batch_size": 6, "probes": 4, "ablations": ("no_group", "no_memory")})
    if variant in ("small", "paper"):
        c.data.update({"source": "files", "cold_questions": 512, "train_questions": 2048, "test_questions": 500})
        c.model.update({"dtype": "bfloat16", "remat": "block"})
        c.env.update({"k": 3, "test_k": 5, "max_searches": 4, "short": False})
        c.rollout.update({"max_prompt": 1024, "max_total": 4096, "max_new": 512})
        c.cold_start.update({"author": "self", "per_question": 2, "steps": 76, "batch_size": 64, "lr": 2e-5})
        c.rl.update({"steps": 100, "lr": 2e-6, "kl": 1e-4, "b2": 0.95, "micro_batches": 16})
        c.evaluate.batch_size = 64
    if variant == "paper":
        c.data.update({"cold_questions": 2000, "train_questions": 0})
        c.env.max_searches = 8
        c.rollout.max_total = 8192
        c.rl.update({"steps": 127, "group_size": 16, "prompts_per_step": 64, "micro_batches": 16})
        c.mesh.update({"data": 1, "fsdp": 64})
    return c
