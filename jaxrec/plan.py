"""What one chip of a TPU pod would hold and do: the real programs, compiled ahead of time on a machine without a TPU.

Four programs of a run of reinforcement learning, as the trainer and the sampler call them: ``score`` (log-probs of the
rollout), ``update`` (one update of GRPO with its optimiser), ``prefill`` and ``decode`` (one token for every row).
Nothing is allocated: arguments are shapes with shardings. Everything that can be wrong with a request is found before
anything is compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxrec.config import UsageError, nearest
from jaxrec.plan_chips import Topology, check_axes, mesh_sizes, parse_topology, seconds

AXES = ("data", "fsdp", "expert", "tensor")  # of models.sharding, which would import JAX
PROGRAMS = ("score", "update", "prefill", "decode")
# libtpu asks a metadata server what machine it is on, and allows one process per machine; neither matters to its
# compiler, which goes by the topology's name.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # programs for absent devices cannot be read back from it
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Workload:
    """A request: model (``models.Config``), update (``rl.policy.GRPOConfig``), lengths in tokens, and what to compile.

    weights: dtype of the trained weights and of Adam's moments. sampled: the most tokens of a row that train.
    """

    name: str
    model: Any
    grpo: Any
    weights: str
    max_prompt: int
    max_total: int
    max_new: int
    sampled: int
    truncate: bool
    programs: tuple[str, ...]

    @property
    def rows(self) -> int:
        return self.grpo.prompts_per_step * self.grpo.group_size

    @property
    def trains(self) -> bool:
        return bool({"score", "update"} & set(self.programs))


@dataclasses.dataclass
class Program:
    """What was found about one program. ``refused``: the compiler's own message when it does not fit, and nothing else
    is known then. Figures are per device and step; held: bytes of the training state that lie beside the program."""

    name: str
    refused: str = ""
    compile_seconds: float = 0.0
    arguments: float = 0.0
    outputs: float = 0.0
    aliased: float = 0.0
    temporary: float = 0.0
    code: float = 0.0
    held: float = 0.0
    flops: float = 0.0
    memory_bytes: float = 0.0
    total_flops: float = 0.0  # of all devices, counted from the shapes of the traced program
    open_loops: int = 0
    kernels: float = 0.0
    collectives: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    compute_seconds: float = 0.0
    hbm_seconds: float = 0.0
    ici_seconds: float = 0.0

    @property
    def peak(self) -> float:
        return self.arguments + self.outputs - self.aliased + self.temporary + self.code

    def fits(self, usable: float) -> bool:
        return not self.refused and self.peak + self.held <= usable


# --- the request -----------------------------------------------------------------------------------------------------


def _model(config: Any, spec: str) -> Any:
    from models.hf_config import config_from_hf

    m = config.model
    if m.path:
        file = Path(m.path) / "config.json"
        if not file.is_file():
            raise UsageError(f"--config.model.path={m.path}: no config.json there; only that file is read")
        fields, source = json.loads(file.read_text(encoding="utf-8")), str(file)
    elif "fields" in m:
        fields, source = m.fields.to_dict(), "config.model.fields"
    else:
        raise UsageError(
            f"--config={spec} trains a model from scratch, whose vocabulary is made from data; name a folder with a "
            "config.json to plan for: --config.model.path=FOLDER"
        )
    try:
        form = m.get("moe_form", "auto")
        return config_from_hf(fields, source).replace(dtype=m.dtype, remat=m.remat, moe_form=form)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _grpo(config: Any) -> Any:
    """The update's settings: those of the system's own last stage, or the fields of ``config.rl`` as they are."""
    from rl.policy import GRPOConfig

    if config.system == "deeprec":
        from jaxrec.systems import deeprec

        return deeprec.policy_config(config, config.seeds[0], "rec")
    known = {field.name for field in dataclasses.fields(GRPOConfig)}
    unknown = [name for name in config.rl if name not in known]
    if unknown:
        raise UsageError(f"config.rl.{unknown[0]} is no setting of the update{nearest(unknown[0], known)}")
    longest = config.rollout.max_total
    return GRPOConfig(**config.rl, max_total=longest, length_buckets=(longest,))


def workload(config: Any, spec: str, programs: Sequence[str] = ()) -> Workload:
    """The request that a config makes. Raises UsageError for a config that describes no language model's training."""
    if any(group not in config for group in ("mesh", "model", "rl", "rollout")):
        raise UsageError(
            f"--config={spec} lacks one of the groups mesh, model, rl and rollout; plan needs a config such as plan "
            "or deeprec"
        )
    model = _model(config, spec)
    try:
        grpo = _grpo(config)
    except ValueError as error:
        raise UsageError(f"config.rl: {error}") from error
    chosen = tuple(programs or config.get("programs", ("update", "decode")))
    for name in chosen:
        if name not in PROGRAMS:
            raise UsageError(f"--programs: no {name!r}{nearest(name, PROGRAMS)}; known: {', '.join(PROGRAMS)}")
    r = config.rollout
    turns = r.turns if "turns" in r else config.env.max_calls + 1
    return Workload(
        spec, model, grpo, config.model.get("weights", "float32"), r.max_prompt, r.max_total, r.max_new,
        min(r.max_new * turns, r.max_total - 1), r.top_p < 1, tuple(name for name in PROGRAMS if name in chosen),
    )  # fmt: skip


def check(work: Workload, sizes: dict[str, int]) -> None:
    """Raise UsageError where model or batch do not divide over the mesh."""
    c, t = work.model, sizes["tensor"]
    if c.heads % t:
        raise UsageError(
            f"config.mesh.tensor={t} does not divide the model's {c.heads} heads: take a divisor of {c.heads}"
        )
    if sizes["expert"] > 1 and (not c.experts or c.experts % sizes["expert"]):
        have = f"{c.experts} experts" if c.experts else "no experts"
        raise UsageError(
            f"config.mesh.expert={sizes['expert']} needs a model whose experts it divides; this has {have}"
        )
    if not 0 < work.max_prompt < work.max_total:
        raise UsageError(
            f"config.rollout.max_prompt={work.max_prompt} must be positive and below max_total={work.max_total}"
        )
    if work.trains:
        from models.sharding import RULES

        axes, g = RULES["batch"], work.grpo
        shards, rows = math.prod(sizes[axis] for axis in axes), work.rows // g.minibatches
        if rows // g.micro_batches % shards:
            raise UsageError(
                f"an update has {rows} rows (config.rl.prompts_per_step x group_size / minibatches), in "
                f"config.rl.micro_batches={g.micro_batches} slices of {rows // g.micro_batches}; a slice must divide "
                f"over config.mesh {' x '.join(axes)} = {shards} devices: change one of them"
            )


def whole_parameters(model: Any, mesh: Any) -> list[dict[str, Any]]:
    """Parameters of which a dimension could not be split as the table of rules has it, with their bytes per float32."""
    import jax

    from models.params import Param, declare
    from models.sharding import RULES, axes_of, spec_for

    found = []
    leaves = jax.tree_util.tree_flatten_with_path(declare(model), is_leaf=lambda leaf: isinstance(leaf, Param))[0]
    for path, p in leaves:
        spec = spec_for(mesh, p.shape, p.axes)
        used = [axes_of(part) for part in spec]
        for size, axis, taken in zip(p.shape, p.axes, used, strict=True):
            wanted = tuple(a for a in RULES[axis] if mesh.shape.get(a, 1) > 1)
            if wanted and not set(wanted) <= set(taken):
                name = "/".join(str(getattr(key, "key", key)) for key in path)
                ways = math.prod(mesh.shape[a] for names in used for a in names)
                found.append(
                    {"name": name, "shape": list(p.shape), "axis": axis, "size": size, "mesh": list(wanted),
                     "bytes": 4 * math.prod(p.shape) / ways}
                )  # fmt: skip
    return found


# --- the programs ----------------------------------------------------------------------------------------------------


def make_mesh(topology: Topology, sizes: dict[str, int], split: bool = False) -> Any:
    """A mesh over the described chips, neighbours on the torus where the sizes allow it.

    Raises UsageError when the TPU compiler is not installed or does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError("plan compiles with libtpu, which is not installed: pip install 'jaxrec[tpu]'")
    import jax
    import numpy as np
    from jax.experimental import mesh_utils, topologies

    options = dict(topology.chip.options)
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
    except Exception as error:
        raise UsageError(f"--topology={topology.name}: libtpu refuses it: {str(error).splitlines()[0]}") from error
    if len(described.devices) != topology.devices:
        raise UsageError(f"--topology={topology.name}: libtpu has {len(described.devices)} devices there")
    shape = tuple(sizes.values())
    devices = mesh_utils.create_device_mesh(shape, described.devices, allow_split_physical_axes=split)
    return jax.sharding.Mesh(np.asarray(devices), tuple(sizes), axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))


def _batched(mesh: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """A struct placed as ``models.sharding.shard_batch`` places an array."""
    import jax

    from models.sharding import sharding_for

    axes = ("batch",) + ("time",) * (len(shape) - 1)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding_for(mesh, shape, axes))


def update_arguments(work: Workload, mesh: Any, rows: int) -> tuple[Any, Any]:
    """(state, batch) of ``rl.policy.update_step`` for ``rows`` rows."""
    from models.params import abstract
    from models.sample import bucket
    from rl.optimizer import abstract_state
    from rl.policy import Batch, bucket_length

    g, length = work.grpo, bucket_length(work.max_total, work.grpo.length_buckets)
    state = abstract_state(abstract(work.model, work.weights, mesh), g.optimizer)
    floats = _batched(mesh, (rows, length), "float32")
    ints = _batched(mesh, (rows,), "int32")
    most = bucket(work.sampled, 64)
    return state, Batch(
        ids=_batched(mesh, (rows, length), "int32"), lengths=ints, row=ints, mask=floats, advantages=floats,
        sampler_logprobs=floats, old_logprobs=floats if g.updates_per_step > 1 else None,
        ref_logprobs=floats if g.kl_coef else None,
        select=_batched(mesh, (rows, most), "int32") if most < length else None,
    )  # fmt: skip


def traced_programs(work: Workload, mesh: Any, compile_: Callable[[Any], Any]) -> dict[str, Callable[[], Any]]:
    """{name: function that traces the program}, to be called under ``models.use_mesh(mesh)``.

    compile_: turns what was traced into an executable; the sampler's weights and cache lie where the program that
    makes them leaves them, so that one is compiled as well.
    """
    import jax
    import jax.numpy as jnp

    from models import layout, sample
    from models.params import abstract
    from models.sharding import sharding_for
    from rl import policy

    c, g = work.model, work.grpo
    static = dataclasses.replace(g, reward_weights=(), seed=0, save_every=0)

    def update():
        state, batch = update_arguments(work, mesh, work.rows // g.minibatches)
        return policy.jitted_update_step().trace(state, batch, static, c)

    def score():
        state, batch = update_arguments(work, mesh, work.rows)
        return policy.jitted_score().trace(state.params, batch.ids, batch.lengths, batch.select, None, g, c)

    @functools.cache
    def weights():
        traced = layout.lay_out.trace(abstract(c, work.weights, mesh), c, False, False)
        return placed(traced.out_info, compile_(traced).output_shardings)

    def placed(structs, shardings):
        return jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), structs, shardings)

    def prefill():
        width = sample.bucket(work.max_prompt)
        P = g.prompts_per_step
        tokens, lengths = jax.ShapeDtypeStruct((P, width), jnp.int32), jax.ShapeDtypeStruct((P,), jnp.int32)
        size = max(sample.bucket(work.max_total), width)
        return sample._prefill.trace(
            weights(), tokens, lengths, sample.hooks(c), config=c, size=size, repeat=g.group_size, routing=False,
            int8=False,
        )  # fmt: skip

    def session():
        structs = prefill().out_info

        def place(leaf):  # the cache as prefill constrains it; lens and logits follow their rows
            axes = {4: ("batch", "kv_heads", "time", "head_dim"), 2: ("batch", "vocab"), 1: ("batch",)}[len(leaf.shape)]
            return sharding_for(mesh, leaf.shape, axes)

        return placed(structs, jax.tree.map(place, structs))

    def decode():
        def scalar(dtype):
            return jax.ShapeDtypeStruct((), dtype)

        start = session()
        key = jax.eval_shape(lambda: jax.random.key(0))
        eos = jax.ShapeDtypeStruct((c.vocab_size,), jnp.bool_)
        table = jax.ShapeDtypeStruct((1, c.vocab_size), jnp.int16)
        limits = jax.ShapeDtypeStruct((work.rows,), jnp.int32)
        return sample._decode.trace(
            weights(), start, key, limits, scalar("float32"), scalar("float32"), scalar("int32"), eos, table,
            sample.hooks(c), config=c, view=sample.view_of(start.size, start.size), steps=sample.bucket(work.max_new),
            truncate=work.truncate, first_accept=1,
        )  # fmt: skip

    return {"score": score, "update": update, "prefill": prefill, "decode": decode}


def traced_flops(jaxpr: Any) -> float:
    """Matrix FLOPs of a traced program over all devices, with scans as often as they run (others loops once). Kernels
    are left out: what they do depends on masks and on routing."""
    total = 0.0
    for eqn in jaxpr.eqns:
        name, out = eqn.primitive.name, eqn.outvars[0].aval if eqn.outvars else None
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += 2.0 * math.prod(out.shape) * math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
        elif name.startswith("ragged_dot"):
            numbers = eqn.params.get("ragged_dot_dimension_numbers")
            dims = numbers.dot_dimension_numbers[0][0] if numbers is not None else (1,)
            groups = math.prod(eqn.invars[2].aval.shape[-1:]) if len(out.shape) == 3 else 1
            total += 2.0 * math.prod(out.shape) * math.prod(eqn.invars[0].aval.shape[d] for d in dims) / groups
        elif name != "pallas_call":
            inner = [v for p in eqn.params.values() for v in (p if isinstance(p, tuple | list) else (p,))]
            flops = [traced_flops(getattr(v, "jaxpr", v)) for v in inner if hasattr(getattr(v, "jaxpr", v), "eqns")]
            times = eqn.params.get("length", 1) if name == "scan" else 1
            if name == "shard_map":  # the body is one device's
                split = eqn.params.get("newly_manual_axes") or eqn.params.get("manual_axes", ())
                times = math.prod(dict(eqn.params["mesh"].shape)[a] for a in split)
            total += times * (max(flops, default=0.0) if name == "cond" else sum(flops))
    return total


_REFUSALS = ("exceeds available HBM", "Ran out of memory", "RESOURCE_EXHAUSTED")


def compile_program(name: str, trace: Callable[[], Any], mesh: Any, topology: Topology) -> Program:
    """Trace, lower, compile and measure one program."""
    import jax

    from jaxrec.plan_hlo import count
    from models.sharding import use_mesh

    program, begin = Program(name), time.perf_counter()
    try:
        with use_mesh(mesh):
            traced = trace()
            program.total_flops = traced_flops(traced.jaxpr.jaxpr)
            compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if not any(words in str(error) for words in _REFUSALS):
            raise
        program.refused = str(error).strip().splitlines()[0]
        program.compile_seconds = time.perf_counter() - begin
        return program
    program.compile_seconds = time.perf_counter() - begin
    stats = compiled.memory_analysis()
    program.arguments, program.outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes
    program.aliased, program.temporary = stats.alias_size_in_bytes, stats.temp_size_in_bytes
    program.code = stats.generated_code_size_in_bytes
    counts = count(compiled.as_text(), dict(mesh.shape))
    program.flops, program.memory_bytes, program.open_loops = counts.flops, counts.memory_bytes, counts.open_loops
    program.kernels = counts.kernels
    flat = mesh.devices.reshape(-1)
    chip = topology.chip
    for one in counts.collectives:
        places = [(*flat[i].coords, *((flat[i].core_on_chip,) if chip.devices > 1 else ())) for i in one.members]
        took = one.calls * seconds(one.kind, one.payload / one.calls, places, topology)
        fields = {"kind": one.kind, "axes": list(one.axes), "group": one.group, "calls": one.calls}
        program.collectives.append(fields | {"payload": one.payload, "sent": one.sent, "seconds": took})
    # Where kernels hide FLOPs from the compiled text, an equal share of the step's is the least that a device does.
    least = max(program.flops, program.total_flops / topology.devices if program.kernels else 0.0)
    program.compute_seconds = least / (chip.flops / chip.devices)
    program.hbm_seconds = program.memory_bytes / (chip.hbm_bandwidth / chip.devices)
    program.ici_seconds = sum(one["seconds"] for one in program.collectives)
    return program


def state_bytes(work: Workload, mesh: Any) -> tuple[float, float]:
    """Bytes per device of the weights, and of weights, Adam's moments and (with a KL penalty) reference weights."""
    import jax

    from models.params import abstract
    from rl.optimizer import abstract_state

    def total(tree: Any) -> float:
        leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim]
        return float(sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))

    params = abstract(work.model, work.weights, mesh)
    weights = total(params)
    return weights, total(abstract_state(params, work.grpo.optimizer)) + (weights if work.grpo.kl_coef else 0.0)


def plan(config: Any, spec: str, topology_name: str, programs: Sequence[str] = (), split: bool = False) -> dict:
    """Everything ``jaxrec plan`` prints, as JSON types. Raises UsageError before anything is compiled."""
    from jaxrec.plan_report import advice

    topology = parse_topology(topology_name)
    work = workload(config, spec, programs)
    sizes = mesh_sizes({name: config.mesh[name] for name in AXES}, topology)
    check_axes(sizes, topology, split)
    check(work, sizes)
    mesh = make_mesh(topology, sizes, split)
    usable = topology.chip.usable
    weights, state = state_bytes(work, mesh) if work.trains else (0.0, 0.0)
    # What lies in memory beside a program: all of the state while sampling, the rest of it while scoring.
    reference = weights if work.grpo.kl_coef else 0.0
    beside = {"score": state - weights, "update": reference, "prefill": state, "decode": state}

    traces = traced_programs(work, mesh, lambda traced: traced.lower().compile())
    done: list[Program] = []
    for name in work.programs:
        print(f"compiling {name} ...", file=sys.stderr, flush=True)
        program = compile_program(name, traces[name], mesh, topology)
        program.held = beside[name]
        done.append(program)
    out = {
        "config": spec, "topology": topology.name, "chips": topology.chips, "devices": topology.devices, "mesh": sizes,
        "chip": dataclasses.asdict(topology.chip) | {"usable": usable},
        "model": {"parameters": work.model.num_params(), "dtype": work.model.dtype, "weights": work.weights,
                  "family": work.model.family, "layers": work.model.layers},
        "batch": {"rows": work.rows, "tokens": work.max_total, "minibatches": work.grpo.minibatches,
                  "micro_batches": work.grpo.micro_batches, "new_tokens": work.max_new},
        "state_bytes": state,
        "whole_parameters": whole_parameters(work.model, mesh),
        "programs": [
            dataclasses.asdict(p) | {"peak": p.peak, "fits": p.fits(usable),
                                     "seconds": max(p.compute_seconds, p.hbm_seconds, p.ici_seconds)}
            for p in done
        ],
    }  # fmt: skip
    out["fits"] = all(p["fits"] for p in out["programs"])
    out["advice"] = [] if out["fits"] else advice(out, work, sizes)
    return out


def prepare() -> None:
    """Set what libtpu and JAX read from the environment; before JAX is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # whatever devices there are stay free
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
