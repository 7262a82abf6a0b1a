"""TPU chips, their torus, and the time that a collective takes on it. Nothing here needs JAX."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence

from jaxrec.config import UsageError, nearest


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip. hbm: bytes. usable: bytes per device that the compiler lets a program have. flops: peak, bfloat16.
    hbm_bandwidth: bytes/s. ici: bytes/s over all links, both directions together. torus: dimensions; links per chip are
    twice that. devices: of JAX per chip. wraps: an axis of the torus closes to a ring when its size is a multiple of
    this. largest: chips in a pod."""

    hbm: float
    usable: float
    flops: float
    hbm_bandwidth: float
    ici: float
    torus: int
    wraps: int
    largest: int
    devices: int = 1
    options: tuple[tuple[str, str], ...] = ()  # that the compiler needs for one device per chip

    @property
    def link(self) -> float:
        """Bytes/s over one link in one direction."""
        return self.ici / (4 * self.torus)


_GB, _GIB, _TERA = 1e9, 2.0**30, 1e12

# Google's public documentation, docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}: peak bf16 FLOP/s, HBM capacity
# and bandwidth, bidirectional interconnect bandwidth per chip. ``usable`` is not documented: it is what libtpu 0.0.42.1
# says when it refuses a program ("exceeds available HBM (15.75G)"). Estimates: v4's interconnect (six links of 50 GB/s
# each way), and which axes close to rings (v4, v5p, tpu7x: whole cubes of 4; v5e, v6e: the full 16 of a pod).
CHIPS = {
    "v4": Chip(32 * _GIB, 30.75 * _GIB, 275 * _TERA, 1200 * _GB, 600 * _GB, 3, 4, 4096,
               options=(("chip_config_name", "megacore"),)),
    "v5e": Chip(16 * _GIB, 15.75 * _GIB, 197 * _TERA, 819 * _GB, 400 * _GB, 2, 16, 256),
    "v5p": Chip(95 * _GIB, 95.74 * _GIB, 459 * _TERA, 2765 * _GB, 1200 * _GB, 3, 4, 8960),
    "v6e": Chip(32 * _GIB, 31.25 * _GIB, 918 * _TERA, 1640 * _GB, 800 * _GB, 2, 16, 256),
    "tpu7x": Chip(192 * _GIB, 94.75 * _GIB, 2307 * _TERA, 7380 * _GB, 1200 * _GB, 3, 4, 9216, devices=2),
}  # fmt: skip
_ON_CHIP = 6  # tpu7x: its two halves are joined by this many times a link's bandwidth (same source)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of a pod, such as ``v5e:16x16``."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def physical(self) -> tuple[int, ...]:
        """Sizes of the torus, with the devices of one chip as an axis of its own where there are several."""
        return self.shape + ((self.chip.devices,) if self.chip.devices > 1 else ())


def parse_topology(text: str) -> Topology:
    """Raises UsageError for a chip, or a shape, that does not exist."""
    kind, _, sizes = text.partition(":")
    example = "v5e:16x16, v6e:8x16, v4:4x4x4, v5p:8x8x8, tpu7x:4x4x4"
    if kind not in CHIPS:
        raise UsageError(
            f"--topology={text}: no chip {kind!r}{nearest(kind, CHIPS)}; known: {', '.join(CHIPS)}. Examples: {example}"
        )
    chip = CHIPS[kind]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) or sizes.count("x") != chip.torus - 1:
        raise UsageError(
            f"--topology={text}: {kind} has a torus of {chip.torus} dimensions, so its slices are written "
            f"{kind}:{'x'.join(['4'] * chip.torus)}. Examples: {example}"
        )
    shape = tuple(map(int, sizes.split("x")))
    if math.prod(shape) > chip.largest or (chip.torus == 2 and max(shape) > 16):
        limit = "16x16" if chip.torus == 2 else f"{chip.largest:,} chips"
        raise UsageError(f"--topology={text}: a pod of {kind} has {limit} at most")
    if any(size % 2 for size in shape[:2]):
        raise UsageError(f"--topology={text}: a host has 2x2 chips, so the first two sizes must be even")
    return Topology(text, kind, shape)


def mesh_sizes(wanted: Mapping[str, int], topology: Topology) -> dict[str, int]:
    """Sizes of the mesh's axes, a -1 filled in. Raises UsageError when they do not multiply to the devices."""
    sizes, total = dict(wanted), topology.devices
    open_axes = [name for name, size in sizes.items() if size == -1]
    wrong = [name for name, size in sizes.items() if size < 1 and size != -1]
    if wrong or len(open_axes) > 1:
        raise UsageError(f"config.mesh: sizes are at least 1, and one may be -1 (the rest); got {sizes}")
    known = math.prod(size for size in sizes.values() if size != -1)
    if open_axes:
        sizes[open_axes[0]] = max(1, total // known)
    if math.prod(sizes.values()) != total:
        product = " x ".join(f"{name}={size}" for name, size in wanted.items())
        each = f" of {topology.chip.devices} devices" if topology.chip.devices > 1 else ""
        remedy = (
            f"the others must divide {total}" if open_axes else "set one to -1, it takes the rest: config.mesh.fsdp=-1"
        )
        have = f"the {topology.chips} chips{each} of {topology.name} ({total})"
        raise UsageError(f"config.mesh {product} does not use {have}: {remedy}")
    return sizes


def check_axes(sizes: Mapping[str, int], topology: Topology, split: bool) -> None:
    """Raise UsageError where an axis of the mesh is not a product of axes of the torus: its neighbours would not be
    neighbours on the wires. split: such axes are wanted."""
    if split:
        return

    def assign(logical: Sequence[int], left: tuple[int, ...]) -> bool:
        if not logical:
            return True
        for count in range(len(left) + 1):
            for chosen in itertools.combinations(range(len(left)), count):
                rest = tuple(size for i, size in enumerate(left) if i not in chosen)
                if math.prod(left[i] for i in chosen) == logical[0] and assign(logical[1:], rest):
                    return True
        return False

    logical = sorted((size for size in sizes.values() if size > 1), reverse=True)
    physical = tuple(size for size in topology.physical if size > 1)
    if assign(logical, physical):
        return
    possible = sorted({math.prod(c) for n in range(1, len(physical) + 1) for c in itertools.combinations(physical, n)})
    bad = [f"config.mesh.{name}={size}" for name, size in sizes.items() if size > 1 and size not in possible]
    raise UsageError(
        f"{' and '.join(bad) or f'config.mesh {dict(sizes)}'} is no product of the torus' axes "
        f"{'x'.join(map(str, topology.physical))}, each used once (possible sizes: 1, "
        f"{', '.join(map(str, possible))}); take such sizes, or accept an axis of the torus cut in pieces: --split_axes"
    )


def seconds(kind: str, payload: float, places: Sequence[Sequence[int]], topology: Topology) -> float:
    """Time of one collective, an estimate: bandwidth of the links of the torus' dimensions that its members span.

    payload: bytes per device as in ``jaxrec.plan_hlo.Collective``. places: coordinates of the members, the device on
    the chip last where a chip has several.
    """
    n, chip = len(places), topology.chip
    link = chip.link / chip.devices  # devices of a chip share its links
    columns = list(zip(*places, strict=True))
    spans = {i: len(set(column)) for i, column in enumerate(columns[: chip.torus]) if len(set(column)) > 1}
    if not spans:  # on one chip
        return payload * (n - 1) / n * (2 if kind == "all-reduce" else 1) / (chip.link * _ON_CHIP)
    # Along a ring data go both ways round; along an open line the middle link carries all of it one way.
    ways = {
        i: 2 if size == topology.shape[i] and size > 2 and size % chip.wraps == 0 else 1 for i, size in spans.items()
    }
    if kind == "collective-permute":
        return payload / link
    if kind in ("all-to-all", "ragged-all-to-all"):  # every part travels a quarter of a ring on average
        return max(payload * size / 4 / (ways[i] * link) for i, size in spans.items())
    sent = payload * (n - 1) / n * (2 if kind == "all-reduce" else 1)
    return sent / (sum(ways.values()) * link)
