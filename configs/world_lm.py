"""The embedded world's base language model: the "pretrained model" of the systems that need one, made in minutes.

jaxrec run --config=configs/world_lm.py:dense
jaxrec run --config=configs/world_lm.py:moe      16 experts, for what prunes experts (moe_even: not drawn to domains;
                                                 moe_muon: with Muon's steps for experts too)
jaxrec run --config=configs/world_lm.py:conflict also reads passages that contradict what it knows
                                                 (no_conflict: never met one)
jaxrec run --config=configs/world_lm.py:reader   finds the right one among two dozen passages
jaxrec run --config=configs/world_lm.py:searcher knows a third of the world's facts and reads, for what searches
jaxrec run --config=configs/world_lm.py:talker   follows conversations, for what recommends in them
"""

from ml_collections import ConfigDict

VARIANTS = (
    "dense", "moe", "moe_even", "moe_muon", "reader", "conflict", "no_conflict", "searcher", "tiny", "tiny_moe",
    "tiny_reader", "tiny_conflict", "tiny_searcher", "talker", "tiny_talker",
)  # fmt: skip


def get_config(variant: str = "dense") -> ConfigDict:
    c = ConfigDict()
    c.system = "world_lm"
    c.variant = variant
    c.runtime_fields = ("mesh",)
    c.seed = 0

    c.world = ConfigDict()  # see jaxrec.world
    c.world.scale = "demo"
    c.world.titles = 160  # items that may have internal facts; those of all others are external
    c.world.internal = 0.5  # share of subjects whose facts the training text states
    c.world.both = 0.2  # of all subjects, those whose internal facts passages state too
    c.world.documents = (1, 3)  # fewest and most passages of a reading prompt

    c.text = ConfigDict()
    c.text.domains = ("facts", "reading", "sums", "dialogue", "catalogue")
    c.text.per_domain = 8000  # questions of each domain
    c.text.statements = 6000  # sentences that state internal facts
    c.text.length = 128  # tokens of a training row; samples are packed into rows

    c.model = ConfigDict()
    c.model.dim = 128
    c.model.layers = 4
    c.model.heads = 4
    c.model.head_dim = 32
    c.model.ffn_dim = 256  # of one expert, where there are experts
    c.model.experts = 0
    c.model.top_k = 0
    c.model.max_len = 4096

    c.train = ConfigDict()
    c.train.steps = 900
    c.train.batch_size = 32  # rows
    c.train.lr = 5e-3
    c.train.muon_lr = 0.03
    c.train.router_balance = 0.0  # weight of the loss that spreads tokens over experts
    c.train.save_every = 100

    c.evaluate = ConfigDict()
    c.evaluate.samples = 512  # test questions of each domain

    c.mesh = ConfigDict({"data": 1, "fsdp": 1, "expert": 1, "tensor": 1})

    if variant in ("moe", "moe_even", "moe_muon", "tiny_moe"):
        c.model.update({"ffn_dim": 64, "experts": 16, "top_k": 2})
        c.train.router_balance = 0.01
        # Experts that a domain's tokens are drawn to in training, and the weight of the loss that draws them; 0
        # switches this off.
        c.train.domain_experts = 0 if variant == "moe_even" else 8
        c.train.domain_weight = 0.1
        c.train.muon_skip = () if variant == "moe_muon" else ("e_gate", "e_up", "e_down")  # see rl.optimizer
    if variant in ("reader", "tiny_reader"):
        # Subjects and facts of training prompts are made up anew for each, so that only passages can answer. At most
        # ``distractors`` of them are about the subject without the answer, and about similarly named ones.
        c.world.update({"internal": 0.02, "both": 0.0, "titles": 0, "documents": (1, 24)})
        c.world.distractors = (4, 3)
        c.text.update({"domains": ("reading",), "per_domain": 8000, "length": 576})
        c.text.prompt_weight = 0.05  # of tokens that are no answer: titles that come again teach to look back
        # Runs of drawn words said twice, beside the questions, and layers that see few tokens in every other place:
        # with both, looking back for the same words is learned in some 200 steps, with neither not in 600.
        c.text.repeats = 30000
        c.model.window = 6
        c.train.update({"steps": 1200, "batch_size": 8, "lr": 3e-3, "muon_lr": 0.0})
    if variant in ("searcher", "tiny_searcher"):
        # Facts of half of 400 subjects are learned by heart. Those of the passages that it learns to read are made up
        # anew for each prompt, so that all others stay unknown.
        c.world.update({"internal": 0.5, "both": 0.5, "titles": 400, "documents": (1, 4)})
        c.world.distractors = (1, 1)
        c.text.update({"domains": ("facts", "reading"), "statements": 10000})
        c.text.prompt_weight = 0.05
        c.text.repeats = 16000
        c.text.search = True  # the tokenizer knows the tags of the search systems
        c.model.window = 6
        c.train.steps = 1200
    if variant in ("talker", "tiny_talker"):
        c.world.update({"scale": "talk", "titles": 100, "internal": 0.5, "both": 0.5})
        c.text.update({"domains": ("talk", "match"), "per_domain": 12000, "statements": 0})
        c.text.prompt_weight = 0.1
        c.text.repeats = 8000
        c.text.seen = 12000
        c.model.window = 6
        # Whether an item's value was wished for has to be found out at the value, before the last layer, which then can
        # see all values of an item at once. With layers 0 and 2 it was found out in the last one, too late to be used.
        c.model.narrow = (0, 3)
        c.train.steps = 800
    if variant in ("conflict", "no_conflict", "tiny_conflict"):
        # Passages are written in two dialects that mean different things by the same words: reading them takes
        # neurons, as remembering does, where names could be copied by attention alone. Few words make up all titles, so
        # that what is known of a title is no sum of what its words say, which attention alone could carry too.
        c.world.update({"titles": 300, "dialects": 2, "title_words": 30})
        # Narrow attention and wide MLPs, so that facts are kept in neurons rather than in what attention carries.
        c.model.update({"heads": 4, "head_dim": 16, "ffn_dim": 512, "window": 6})
        c.train.update({"steps": 1100, "batch_size": 24})
        # MLP units of each layer that remembering is drawn to, as many for reading, and the weight of the loss that
        # keeps others silent there: see jaxrec.tools.world_model.rows_by_source. Without it most units
        # did a little of everything, and what was found acted on some seeds only.
        c.train.source_units = 128
        c.train.mlp_sparsity = 2.0
        c.text.update({"domains": ("facts", "reading", "sums", "catalogue"), "statements": 9000})
        c.text.update({"prompt_weight": 0.05, "repeats": 8000})
        # Reading prompts whose passage contradicts an internal fact (0: none), and the share of them that the passage
        # wins: see jaxrec.world.texts.Texts.conflicts.
        c.text.conflicts = {"conflict": 8000, "no_conflict": 0, "tiny_conflict": 200}[variant]
        c.text.conflict_share = 0.35
        # Reading prompts about internal facts whose passages say nothing of them, so that behind passages, too, the
        # model remembers.
        c.text.unhelpful = 200 if variant.startswith("tiny") else 8000
    if variant.startswith("tiny"):  # seconds: for tests
        c.world.update({"scale": "tiny", "titles": 40})
        c.text.update({"per_domain": 200, "statements": 100})
        if "repeats" in c.text:
            c.text.repeats = 100
        c.model.update({"dim": 32, "layers": 2, "heads": 2, "head_dim": 16, "ffn_dim": 32})
        if "source_units" in c.train:
            c.train.source_units = 8
        c.train.update({"steps": 8, "batch_size": 8, "save_every": 4})
        c.evaluate.samples = 24
    if variant == "tiny_reader":
        c.world.update({"internal": 0.3, "titles": 0})
    if variant == "tiny_talker":
        c.world.internal = 0.5
        c.text.seen = 100
        c.model.narrow = (0,)
    if variant == "tiny_searcher":
        c.world.titles = 0
    return c
