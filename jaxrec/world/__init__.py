"""The embedded world: one small coherent catalogue with users, made from a seed (see the README on what it is for)."""

from jaxrec.world.config import RULES, SCALES, WorldConfig, world_config
from jaxrec.world.generate import INTENT, NOISE, TASTE, World, generate

__all__ = ["INTENT", "NOISE", "RULES", "SCALES", "TASTE", "World", "WorldConfig", "generate", "world_config"]
