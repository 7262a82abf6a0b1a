"""EASY-EP (arXiv 2504.06792): keep the experts that a domain needs, found in a few demonstrations.

jaxrec run --config=configs/easy_ep.py             on the embedded world, with its own base model (made once)
jaxrec run --config=configs/easy_ep.py:files --config.model.path=FOLDER --config.data.files="('math=math.jsonl',)"
"""

from ml_collections import ConfigDict

VARIANTS = ("world", "demo", "tiny", "files")


def get_config(variant: str = "demo") -> ConfigDict:
    c = ConfigDict()
    c.system = "easy_ep"
    c.variant = variant
    c.runtime_fields = ("model.path", "mesh")
    c.seeds = (0, 1, 2) if variant == "world" else (0,)

    c.model = ConfigDict()
    c.model.path = ""  # Hugging Face folder of a model with experts; "" is the embedded world's own
    c.model.base = "world_lm:moe"  # the config that makes that one, once per seed, in JAXREC_CACHE or ~/.cache/jaxrec
    c.model.dtype = ""  # "", float32 or bfloat16; "" is that of the file

    c.data = ConfigDict()
    c.data.source = "world"  # world, or files
    # NAME=FILE.jsonl per domain, each line {"prompt": ..., "response": ...}; the first calibrate.samples that the seed
    # chooses calibrate, the others are for evaluation.
    c.data.files = ()

    c.calibrate = ConfigDict()
    c.calibrate.samples = 25  # per domain
    c.calibrate.answers = "own"  # own (what the model answers), gold, or none: the prompt alone
    c.calibrate.order = "random"  # random, or longest: the longest samples, as the released code takes them
    c.calibrate.max_new = 16  # tokens of an own answer
    c.calibrate.max_tokens = 4096  # longer samples are left out, counted
    c.calibrate.batch_size = 8

    c.select = ConfigDict()
    c.select.keep = (8, 4)  # experts per layer, of all methods
    c.select.methods = ("easy_ep", "gate", "frequency", "random")
    c.select.mix = True  # also one mask for all domains
    c.select.mask_mode = "mask_first"  # see models.moe.route

    c.prune = ConfigDict()
    c.prune.domains = ("mix",)  # whose EASY-EP masks become smaller checkpoints
    c.prune.keep = 8

    c.evaluate = ConfigDict()
    c.evaluate.samples = 512  # per domain
    c.evaluate.batch_size = 64
    c.evaluate.merge = True  # also M-SMoE merging, as far as its detail is known
    c.evaluate.random_draws = 3
    # Decided before the first result: half of the experts keep this share of in-domain accuracy, and at the smallest
    # size EASY-EP's accuracy is above every other selection's, paired over questions.
    c.evaluate.kept_share = 0.98

    c.mesh = ConfigDict({"data": 1, "fsdp": 1, "expert": 1, "tensor": 1})

    if variant == "tiny":  # seconds: for tests
        c.model.base = "world_lm:tiny_moe"
        c.calibrate.samples = 4
        c.evaluate.update({"samples": 16, "random_draws": 1})
    if variant == "files":
        c.data.source = "files"
        c.select.keep = (128, 64)
        c.prune.keep = 128
        c.calibrate.update({"max_new": 8192, "max_tokens": 32768, "batch_size": 1})
        c.evaluate.update({"samples": 0, "merge": False})
    return c
