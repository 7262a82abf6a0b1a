"""The embedded world: generate it and say what is in it, beside real data if a folder is given.

jaxrec run --config=configs/world.py
jaxrec run --config=configs/world.py --config.scale=talk        the world that GRSU's conversations are about
jaxrec run --config=configs/world.py --config.compare=FOLDER    e.g. a folder with ml-100k.inter or u.data
"""

from ml_collections import ConfigDict

VARIANTS = ("demo", "tiny", "full", "off")


def get_config(variant: str = "demo") -> ConfigDict:
    c = ConfigDict()
    c.system = "world"
    c.variant = variant
    c.runtime_fields = ("compare",)
    c.seed = 0
    c.scale = "demo" if variant == "off" else variant  # tiny, demo, full, huge
    # The knobs of jaxrec.world.WorldConfig; 0 leaves users, items and makers as the scale says.
    c.world = ConfigDict()
    c.world.users = 0
    c.world.items = 0
    c.world.makers = 0
    c.world.num_rules = 4  # how many of jaxrec.world.RULES users follow
    c.world.intent_share = 0.0 if variant == "off" else 0.6  # probability that an event follows the user's rule
    c.world.drift = 0.03  # probability per event that a user changes rule
    c.world.noise = 0.1  # probability that an event is drawn by popularity alone
    c.world.circle_share = 0.5  # among taste events, those from a circle of items that no word describes
    # Conversations about the world's items, as configs/grsu.py has them: how many of each split, 0 for none.
    c.conversations = ConfigDict()
    c.conversations.train = 24 if variant == "tiny" else 2400
    c.conversations.valid = 4 if variant == "tiny" else 100
    c.conversations.test = 4 if variant == "tiny" else 160
    c.conversations.wishes = 4  # attributes of the hidden item that a seeker names
    c.conversations.avoid = 0.5  # probability that it also says what the item shall not be
    c.floors = True  # also rank with popularity and a Markov chain
    c.max_history = 50  # items of history the floors see
    c.compare = ""  # folder of real data (RecBole, MovieLens, Amazon Reviews 2023) for the same figures
    return c
