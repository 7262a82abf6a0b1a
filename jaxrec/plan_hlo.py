"""Read a compiled program's text (HLO): matrix FLOPs, bytes through memory, and collectives, all per device.

XLA's own ``cost_analysis`` counts the body of a loop once. Here every computation is counted as often as it runs: the
trip counts of scans are in the text. A loop whose count depends on data (the sampler's) counts once, and is reported.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32,
    "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,<= ]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"%([\w.\-]+)")
_ASSIGNED = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# Instructions that move no data of their own, or whose data is counted where it is started.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "optimization-barrier", "iota", "domain", "async-start", "async-update",
}  # fmt: skip
_LOOKUPS = ("dynamic-slice", "gather", "slice")


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    text: str  # operands as written: the value of a constant, the number of a parameter
    attributes: str
    root: bool


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of collective over one group of mesh axes, all its runs in a step together.

    axes: mesh axes that the participants differ in. group: devices that take part. calls: runs per step.
    payload: bytes per device: what an all-gather ends with, what all others begin with (of an all-reduce the smaller of
    both). sent: bytes that a device sends in a ring, the least that any algorithm does: (n - 1) / n of the payload,
    twice that for an all-reduce.
    members: the first group's places in the mesh.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    calls: float
    payload: float
    sent: float
    members: tuple[int, ...] = dataclasses.field(compare=False, repr=False, default=())


@dataclasses.dataclass(frozen=True)
class Counts:
    """What one device does per step. flops: of matrix products and convolutions; memory_bytes: read and written in main
    memory, an estimate from the operands of what was fused; open_loops: loops of unknown length, counted once; kernels:
    runs of kernels written for the TPU (fused attention, products of experts), whose FLOPs the text does not tell."""

    flops: float
    memory_bytes: float
    collectives: tuple[Collective, ...]
    open_loops: int
    kernels: float


def _matching(text: str, start: int) -> int:
    """Place behind the bracket that closes the one at ``start``."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    return len(text)


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """{computation: {name: instruction}} in the order of the text, and the name of the entry computation."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header.group(2), {})
            entry = header.group(2) if header.group(1) else entry
        elif line == "}":
            current = None
        elif current is not None and (assigned := _ASSIGNED.match(line)):
            at = assigned.end()
            end = _matching(line, at) if line[at] == "(" else line.index(" ", at)
            opens = line.index("(", end)
            closes = _matching(line, opens)
            inside = line[opens + 1 : closes - 1]
            name = assigned.group(2)
            current[name] = Instruction(
                name, line[at:end], line[end:opens].strip(), tuple(_NAME.findall(inside)), inside, line[closes:],
                bool(assigned.group(1)),
            )  # fmt: skip
    return computations, entry


def _parts(kind: str) -> list[str]:
    """The elements of a tuple type; a plain type is its own only element."""
    if not kind.startswith("("):
        return [kind]
    parts, depth, begin = [], 0, 1
    for i, letter in enumerate(kind):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or i == len(kind) - 1:
            parts.append(re.sub(r"/\*.*?\*/", "", kind[begin:i]).strip())
            begin = i + 1
    return parts


def shape_of(kind: str) -> tuple[int, ...]:
    """Sizes of an array type, e.g. ``bf16[2,64]{1,0}``."""
    sizes = _ARRAY.match(kind).group(2)
    return tuple(int(size.strip("<= ")) for size in sizes.split(",") if size)


def bytes_of(kind: str, main_only: bool = False) -> float:
    """Bytes of a type, tuples summed. main_only: leaves out what lies in a chip's fast memories (layouts with S(n))."""
    total = 0.0
    for name, sizes, layout in _ARRAY.findall(kind):
        if main_only and "S(" in layout:
            continue
        bits = _BITS.get(name, 8 if name.startswith("f8") else 4 if name.startswith("f4") else 0)
        total += bits / 8 * math.prod(int(size.strip("<= ")) for size in sizes.split(",") if size)
    return total


def _attribute(instruction: Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=(%?[\w.\-]+|\{{[^}}]*\}})", instruction.attributes)
    return found.group(1).lstrip("%") if found else ""


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"-?\d+", text)]


# --- FLOPs -----------------------------------------------------------------------------------------------------------


def _dot_flops(instruction: Instruction, known: Mapping[str, Instruction]) -> float:
    left = shape_of(known[instruction.operands[0]].type)
    contracted = _numbers(_attribute(instruction, "lhs_contracting_dims"))
    return 2.0 * math.prod(shape_of(instruction.type)) * math.prod(left[d] for d in contracted)


def _convolution_flops(instruction: Instruction, known: Mapping[str, Instruction]) -> float:
    """TPUs run matrix products as convolutions; batched ones stretch a spatial dimension with holes, so only the places
    where window and input meet count."""
    left, right = (shape_of(known[name].type) for name in instruction.operands[:2])
    out = shape_of(_parts(instruction.type)[0])
    lhs, rhs, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(field.split("=", 1) for field in window.group(1).split()) if window else {}
    spatial = sorted(letter for letter in rhs if letter.isdigit())
    flops = 2.0 * out[result.index("b")] * out[result.index("f")] * right[rhs.index("i")]

    def value(name: str, i: int, default: str) -> str:
        return fields[name].split("x")[i] if name in fields else default

    for i, letter in enumerate(spatial):
        outs, taps, ins = out[result.index(letter)], right[rhs.index(letter)], left[lhs.index(letter)]
        stride, dilate = int(value("stride", i, "1")), int(value("rhs_dilate", i, "1"))
        holes, pad = int(value("lhs_dilate", i, "1")), int(value("pad", i, "0_0").split("_")[0])
        if taps == 1 and pad == 0 and holes == 1:
            flops *= outs
            continue
        at = np.arange(outs)[:, None] * stride + np.arange(taps)[None, :] * dilate - pad
        flops *= int(((at >= 0) & (at <= (ins - 1) * holes) & (at % holes == 0)).sum())
    return flops


# --- collectives -----------------------------------------------------------------------------------------------------


def replica_groups(attributes: str, devices: int) -> np.ndarray:
    """Participants [groups, members] of a collective, in any of the forms that XLA writes; pairs for a permute."""
    if found := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return np.array(_numbers(found.group(1))).reshape(-1, 2)
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, dims, order = found.groups()
        ids = np.arange(devices).reshape(_numbers(dims))
        return (ids if order is None else ids.transpose(_numbers(order))).reshape(_numbers(shape))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        return _mesh_groups(found.group(1), found.group(2), devices)
    if found := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        groups = [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", found.group(1))]
        return np.array(groups)
    return np.arange(devices).reshape(1, -1)


def _mesh_groups(mesh: str, chosen: str, devices: int) -> np.ndarray:
    """``mesh['a'=2,'b'=4] {'b'}``: the groups run over axis b. ``'b':(1)2`` is the major half of b, split off before
    it: sizes to the left of it, then its own."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)
    shape: list[int] = []
    inside: list[bool] = []
    for name, size in sizes.items():
        pieces = sorted((int(before or 1), int(own or size)) for other, before, own in wanted if other == name)
        left = 1
        for before, own in pieces:
            shape += [before // left, own]
            inside += [False, True]
            left = before * own
        shape.append(size // left)
        inside.append(False)
    ids = np.arange(devices).reshape(shape)
    order = [i for i, use in enumerate(inside) if not use] + [i for i, use in enumerate(inside) if use]
    members = math.prod(n for n, use in zip(shape, inside, strict=True) if use)
    return ids.transpose(order).reshape(-1, members)


def axes_of(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes in which the members of a group differ."""
    places = np.stack(np.unravel_index(groups, tuple(mesh.values())), axis=-1)  # [groups, members, axes]
    differs = (places != places[:, :1]).any(axis=(0, 1))
    return tuple(name for name, use in zip(mesh, differs, strict=True) if use)


_DIRECTED = {"all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "ragged-all-to-all": 1, "all-reduce": 2}


def _collective(
    instruction: Instruction, known: Mapping[str, Instruction], scattered: bool, mesh: Mapping[str, int]
) -> Collective | None:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    groups = replica_groups(instruction.attributes, math.prod(mesh.values()))
    if kind == "collective-permute":
        groups = groups[groups[:, 0] != groups[:, 1]]
        if not len(groups):
            return None
    n = groups.shape[1]
    if n == 1:
        return None
    if scattered and kind == "all-reduce":
        kind = "reduce-scatter"  # the TPU compiler writes it as an all-reduce that keeps a part
    operands = sum(bytes_of(known[name].type) for name in instruction.operands if name in known)
    results = bytes_of(instruction.type)
    if instruction.opcode.endswith("-start") and kind != "all-reduce":  # it returns (operands, results)
        results -= operands
    if kind == "all-gather":
        operands = results
    elif kind == "all-reduce":  # it may take float32 and give bfloat16: at least the smaller one travels
        operands = min(operands, results)
    sent = operands * _DIRECTED[kind] * (n - 1) / n if kind in _DIRECTED else operands
    return Collective(kind, axes_of(groups, mesh), n, 1, operands, sent, tuple(groups[0].tolist()))


# --- memory ----------------------------------------------------------------------------------------------------------


def _called(instruction: Instruction) -> str:
    return _attribute(instruction, "calls")


def _moves(instruction: Instruction) -> bool:
    """Part of a collective, whose data is counted with it, or a mere buffer."""
    kind = instruction.opcode.removesuffix("-start").removesuffix("-done")
    return kind in KINDS or re.search(r"AsyncCollective|AllocateBuffer", instruction.attributes) is not None


def _plain_bytes(instruction: Instruction, known: Mapping[str, Instruction]) -> float:
    def size(name: str) -> float:
        return bytes_of(known[name].type, main_only=True) if name in known else 0.0

    opcode, out = instruction.opcode, bytes_of(instruction.type, main_only=True)
    if opcode in _FREE or _moves(instruction) or opcode.endswith("-done"):
        return 0.0
    if opcode in ("copy-start", "slice-start"):  # (target, source, context): the source is no output
        target, source = _parts(instruction.type)[:2]
        moved = min(bytes_of(target), bytes_of(source))
        return sum(moved for kind in (target, source) if "S(" not in kind)
    if opcode in _LOOKUPS:
        return 2 * out if size(instruction.operands[0]) else out
    if opcode == "dynamic-update-slice":
        return 2 * size(instruction.operands[1]) if out else size(instruction.operands[1])
    return out + sum(map(size, instruction.operands))


def _fusion_bytes(
    instruction: Instruction, known: Mapping[str, Instruction], inner: Mapping[str, Instruction]
) -> float:
    """Bytes of a fusion: a parameter of which only slices are read counts these, an update in place only the update."""
    users: dict[str, list[Instruction]] = {}
    for inside in inner.values():
        for name in inside.operands:
            users.setdefault(name, []).append(inside)

    def through(name: str) -> Iterator[Instruction]:
        for user in users.get(name, ()):
            if user.opcode in ("bitcast", "copy", "get-tuple-element") and not user.root:
                yield from through(user.name)
            else:
                yield user

    total = 0.0
    for inside in inner.values():
        if inside.opcode != "parameter" or int(inside.text or 0) >= len(instruction.operands):
            continue
        operand = known.get(instruction.operands[int(inside.text or 0)])
        whole = bytes_of(operand.type, main_only=True) if operand is not None else 0.0
        # What a collective that runs beside this fusion has gathered so far is only handed through.
        uses = [use for use in through(inside.name) if not (_moves(use) or (use.root and use.opcode == "tuple"))]
        if not uses:
            continue
        if whole and all(use.opcode in (*_LOOKUPS, "dynamic-update-slice") for use in uses):
            read = sum(bytes_of(use.type) for use in uses if use.opcode in _LOOKUPS)
            total += min(whole, read)
        else:
            total += whole
    (root,) = (inside for inside in inner.values() if inside.root)
    outs = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    kinds = _parts(instruction.type) if root.opcode == "tuple" else [instruction.type]
    for out, kind in zip(outs, kinds, strict=False):
        while out.opcode in ("bitcast", "copy") and out.operands and out.operands[0] in inner:
            out = inner[out.operands[0]]
        if out.opcode == "dynamic-update-slice":
            total += bytes_of(inner[out.operands[1]].type) if bytes_of(kind, main_only=True) else 0.0
        elif out.opcode not in ("parameter", "get-tuple-element") and not _moves(out):  # those pass a buffer on
            total += bytes_of(kind, main_only=True)
    return total


# --- the whole program -----------------------------------------------------------------------------------------------


def _constant(name: str, computation: Mapping[str, Instruction]) -> int | None:
    found = computation.get(name)
    while found is not None and found.opcode in ("copy", "bitcast", "convert") and found.operands:
        found = computation.get(found.operands[0])
    if found is None or found.opcode != "constant" or not re.fullmatch(r"-?\d+", found.text):
        return None
    return int(found.text)


def trip_count(
    loop: Instruction, outside: Mapping[str, Instruction], computations: Mapping[str, Mapping[str, Instruction]]
) -> int | None:
    """How often a loop runs: as XLA notes it, or from a condition ``counter < constant``; None where data decide."""
    if found := re.search(r'known_trip_count["\s:{]*n["\s:]*(\d+)', loop.attributes):
        return int(found.group(1))
    condition = computations[_attribute(loop, "condition")]
    (root,) = (i for i in condition.values() if i.root)
    if root.opcode == "fusion":  # a comparison by itself, wrapped
        inner = computations[_called(root)]
        (compare,) = (i for i in inner.values() if i.root)
        names = [
            root.operands[int(inner[name].text or 0)] if inner[name].opcode == "parameter" else name
            for name in compare.operands
        ]
        scope = {**inner, **condition}
    else:
        compare, names, scope = root, list(root.operands), condition
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return None
    limit, counter = _constant(names[1], scope), condition.get(names[0])
    if limit is None or counter is None or counter.opcode != "get-tuple-element":
        return None
    index = int(_numbers(counter.attributes.partition("index=")[2])[0])
    first = _constant(_element(outside, outside.get(loop.operands[0]), index), outside)
    body = computations[_attribute(loop, "body")]
    (end,) = (i for i in body.values() if i.root)
    added = body.get(_element(body, end, index))
    step = next((n for n in (_constant(name, body) for name in added.operands) if n is not None), 1) if added else 1
    return math.ceil((limit - (first or 0)) / step)  # products that are gathered piece by piece take two at a time


def _element(computation: Mapping[str, Instruction], made: Instruction | None, index: int) -> str:
    """Name of what stands at ``index`` of a tuple, '' where it is not made here; copies are looked through."""
    if made is None or made.opcode != "tuple":
        return ""
    name = made.operands[index]
    while (found := computation.get(name)) is not None and found.opcode in ("copy", "bitcast") and found.operands:
        name = found.operands[0]
    return name


def _flops(name: str, computations: Mapping[str, Mapping[str, Instruction]]) -> float:
    """Of one computation and the fusions in it, loops and branches aside."""
    known, total = computations[name], 0.0
    for instruction in known.values():
        if instruction.opcode == "dot":
            total += _dot_flops(instruction, known)
        elif instruction.opcode == "convolution":
            total += _convolution_flops(instruction, known)
        elif instruction.opcode == "fusion":
            total += _flops(_called(instruction), computations)
    return total


def _collectives(
    name: str, computations: Mapping[str, Mapping[str, Instruction]], mesh: Mapping[str, int], seen: set[str]
) -> Iterator[tuple[Collective, float]]:
    """Each collective of a computation and its fusions, with the bytes that it reads and writes in main memory."""
    known = computations[name]
    for instruction in known.values():
        if instruction.opcode == "fusion":
            yield from _collectives(_called(instruction), computations, mesh, seen)
            continue
        found = _collective(instruction, known, name.startswith("all-reduce-scatter"), mesh)
        # On TPU a collective that runs beside several fusions appears in each of them, under one chain's number.
        chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
        if found is not None and not (chain and chain.group(1) in seen):
            seen.update(chain.groups() if chain else ())
            touched = [instruction.type]
            if not instruction.opcode.endswith("-start"):  # else operands are among the outputs
                touched += [known[operand].type for operand in instruction.operands if operand in known]
            yield found, sum(bytes_of(kind, main_only=True) for kind in touched)


def count(text: str, mesh: Mapping[str, int]) -> Counts:
    """All that one device does in a step of the program ``text``, compiled over ``mesh`` (axis -> size)."""
    computations, entry = parse(text)
    runs: dict[str, float] = {}
    open_loops = 0

    def visit(name: str, times: float) -> None:
        nonlocal open_loops
        runs[name] = runs.get(name, 0.0) + times
        known = computations[name]
        for instruction in known.values():
            if instruction.opcode == "while":
                trips = trip_count(instruction, known, computations)
                open_loops += trips is None
                visit(_attribute(instruction, "body"), times * (1 if trips is None else trips))
            elif instruction.opcode in ("call", "async-start"):
                visit(_attribute(instruction, "to_apply") or _called(instruction), times)
            elif instruction.opcode == "conditional":
                named = _attribute(instruction, "branch_computations") or " ".join(
                    "%" + _attribute(instruction, f"{side}_computation") for side in ("true", "false")
                )
                for branch in _NAME.findall(named):
                    visit(branch, times)

    visit(entry, 1.0)
    flops = memory = kernels = 0.0
    totals: dict[tuple, Collective] = {}
    for name, times in runs.items():
        flops += times * _flops(name, computations)
        known = computations[name]
        for instruction in known.values():
            if instruction.opcode == "fusion":
                memory += times * _fusion_bytes(instruction, known, computations[_called(instruction)])
            else:
                memory += times * _plain_bytes(instruction, known)
                kernels += times * ('"tpu_custom_call"' in instruction.attributes)
        for one, touched in _collectives(name, computations, mesh, set()):
            memory += times * touched
            key = (one.kind, one.axes, one.group)
            before = totals.get(key, dataclasses.replace(one, calls=0, payload=0.0, sent=0.0))
            totals[key] = dataclasses.replace(
                before, calls=before.calls + times, payload=before.payload + times * one.payload,
                sent=before.sent + times * one.sent,
            )  # fmt: skip
    order: Sequence[Collective] = sorted(totals.values(), key=lambda c: -c.sent)
    return Counts(flops, memory, tuple(order), open_loops, kernels)
