"""`jaxrec plan`: mistakes found before compiling, what is counted in a compiled program, and (mark tpu) small plans."""

from __future__ import annotations

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import models
from jaxrec import cli, plan, plan_hlo, plan_report
from jaxrec.config import UsageError, resolve_config
from jaxrec.plan_chips import check_axes, mesh_sizes, parse_topology, seconds
from models.config import FAMILIES

MESH = {"data": 1, "fsdp": 4, "expert": 1, "tensor": 2}
SMALL = [
    "--config.model.fields.num_hidden_layers=5", "--config.model.fields.hidden_size=256",
    "--config.model.fields.intermediate_size=512", "--config.model.fields.vocab_size=1024",
    "--config.model.fields.eos_token_id=1",
    "--config.rl.prompts_per_step=2", "--config.rl.micro_batches=2", "--config.rl.logprob_chunk=64",
    "--config.rollout.max_prompt=64", "--config.rollout.max_total=256", "--config.rollout.max_new=128",
]  # fmt: skip


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command sets for its own process must not reach other tests."""
    for name, value in plan.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(plan, "prepare", lambda: None)


# --- before anything is compiled -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology=v5e:2x2"], "needs --config"),
        (["--config=plan"], "needs --topology"),
        (["--config=plan", "--topology=v5:16x16"], "no chip 'v5' (did you mean v5p?)"),
        (["--config=plan", "--topology=v5e:4x4x4"], "torus of 2 dimensions"),
        (["--config=plan", "--topology=v5e:32x16"], "16x16 at most"),
        (["--config=plan", "--topology=v5e:1x4"], "must be even"),
        (["--config=plan", "--topology=v5e:16x16", "--config.mesh.fsdp=128"], "set one to -1"),
        (["--config=plan", "--topology=v5e:16x16", "--config.mesh.tensor=3"], "must divide 256"),
        (["--config=plan", "--topology=v5e:16x16", "--config.mesh.tensor=8"], "possible sizes: 1, 16, 256"),
        (["--config=plan", "--topology=v5e:8x8", "--config.mesh.tensor=64"], "does not divide the model's 32 heads"),
        (["--config=plan", "--topology=v5e:16x16", "--config.mesh.expert=16"], "has no experts"),
        (["--config=plan", "--topology=v5e:16x16", "--config.rl.micro_batches=8"], "slices of 128"),
        (["--config=plan", "--topology=v5e:16x16", "--config.rl.group_size=1"], "config.rl: group_size is 1"),
        (["--config=plan", "--topology=v5e:16x16", "--config.rollout.max_prompt=4096"], "below max_total=4096"),
        (["--config=plan", "--topology=v5e:16x16", "--config.model.path=nowhere"], "no config.json there"),
        (["--config=plan", "--topology=v5e:16x16", "--config.model.fields.model_type=gpt"], "'gpt' is not implemented"),
        (["--config=plan", "--topology=v5e:16x16", "--programs=train"], "no 'train'"),
        (["--config=plan", "--topology=v5e:16x16", "--json=none/x.json"], "no such folder"),
        (["--config=world", "--topology=v5e:16x16"], "plan needs a config such as plan"),
        (["--config=deeprec:paper", "--topology=v5e:16x16"], "--config.model.path=FOLDER"),
    ],
)  # fmt: skip
def test_mistakes_name_the_field_and_the_remedy(words, message, capsys):
    assert cli.main(["plan", *words]) == cli.USAGE
    assert message in capsys.readouterr().err


def test_without_the_compiler_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=importlib.util.find_spec: (
        None if name == "libtpu" else found(name)))  # fmt: skip
    assert cli.main(["plan", "--config=plan", "--topology=v5e:16x16"]) == cli.USAGE
    assert "pip install 'jaxrec[tpu]'" in capsys.readouterr().err


def test_meshes_on_a_torus():
    torus = parse_topology("v5p:4x4x8")
    assert (torus.chips, torus.devices, torus.physical) == (128, 128, (4, 4, 8))
    assert mesh_sizes({"data": 1, "fsdp": -1, "expert": 1, "tensor": 4}, torus)["fsdp"] == 32
    check_axes({"fsdp": 32, "tensor": 4}, torus, split=False)
    with pytest.raises(UsageError, match="is no product of the torus' axes 4x4x8"):
        check_axes({"fsdp": 64, "tensor": 2}, torus, split=False)
    check_axes({"fsdp": 64, "tensor": 2}, torus, split=True)
    halves = parse_topology("tpu7x:2x2x1")
    assert halves.devices == 8  # two per chip
    check_axes({"fsdp": 4, "tensor": 2}, halves, split=False)


def test_time_of_a_collective_follows_the_links():
    pod = parse_topology("v5e:16x16")
    ring = [(x, 0, 0) for x in range(16)]
    line = ring[:8]
    link = 50e9  # bytes/s each way
    assert seconds("all-gather", 1e9, ring, pod) == pytest.approx(1e9 * 15 / 16 / (2 * link))
    assert seconds("all-gather", 1e9, line, pod) == pytest.approx(1e9 * 7 / 8 / link)
    assert seconds("all-reduce", 1e9, ring, pod) == pytest.approx(2 * seconds("reduce-scatter", 1e9, ring, pod))
    plane = [(x, y, 0) for x in range(16) for y in range(16)]
    assert seconds("all-gather", 1e9, plane, pod) == pytest.approx(1e9 * 255 / 256 / (4 * link))
    assert seconds("all-to-all", 1e9, ring, pod) == pytest.approx(1e9 * 4 / (2 * link))


PUBLISHED = {"qwen3_8b_grpo": 8.19e9, "qwen3_30b_a3b_grpo": 30.53e9, "deepseek_v3_decode": 671.0e9}


@pytest.mark.parametrize("variant", list(PUBLISHED))
def test_published_models_have_their_published_size(variant):
    spec = f"plan:{variant}"
    config = resolve_config(spec)
    if config.model.fields.model_type not in FAMILIES:
        with pytest.raises(UsageError, match="not implemented"):
            plan.workload(config, spec)
        return
    assert plan.workload(config, spec).model.num_params() == pytest.approx(PUBLISHED[variant], rel=2e-3)


def test_a_config_of_a_run_is_planned_with_its_own_settings(tmp_path):
    fields = resolve_config("plan").model.fields.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(fields))
    spec = "deeprec:paper"
    work = plan.workload(resolve_config(spec, [f"--config.model.path={tmp_path}"]), spec)
    assert (work.model.dim, work.model.dtype, work.model.remat) == (4096, "bfloat16", "block")
    assert (work.grpo.micro_batches, work.grpo.minibatches, work.rows) == (64, 2, 1024)
    assert (work.weights, work.max_total, work.truncate) == ("float32", 16384, True)
    assert work.programs == ("update", "decode")


def test_parameters_that_stay_whole_are_named():
    model = models.Config(
        vocab_size=1023, dim=64, layers=1, heads=4, kv_heads=1, head_dim=16, ffn_dim=64, tie_embeddings=True
    )
    found = {p["name"]: p for p in plan.whole_parameters(model, models.make_mesh(fsdp=4, tensor=2))}
    assert found.keys() == {"embed", "layers/wk", "layers/wv"}
    assert found["embed"]["axis"] == "vocab"
    assert found["embed"]["bytes"] == 4 * 1023 * 64 / 4  # split over fsdp alone


# --- what is counted in a program ------------------------------------------------------------------------------------


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile().as_text()


def test_loops_count_as_often_as_they_run():
    """A scan over 5 layers, each gathering its weight over fsdp and summing over tensor: bytes and FLOPs by hand."""
    mesh = models.make_mesh(**MESH)
    L, B, D, F = 5, 8, 32, 64

    def layer(x, weights):
        up, down = weights

        def body(x, up, down):  # x [B/4, D], up [D/4, F/2], down [F/2, D/4]
            up = jax.lax.all_gather(up, "fsdp", axis=0, tiled=True)
            down = jax.lax.all_gather(down, "fsdp", axis=1, tiled=True)
            return jax.lax.psum(x @ up @ down, "tensor")

        specs = PartitionSpec("fsdp", None), PartitionSpec("fsdp", "tensor"), PartitionSpec("tensor", "fsdp")
        return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=specs[0])(x, up, down), None

    def run(x, weights):
        return jax.lax.scan(layer, x, weights)[0]

    def struct(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    args = (
        struct((B, D), "fsdp"),
        (struct((L, D, F), None, "fsdp", "tensor"), struct((L, F, D), None, "tensor", "fsdp")),
    )
    counts = plan_hlo.count(compiled(run, *args), MESH)
    assert counts.open_loops == 0
    assert counts.flops == L * 2 * 2 * (B // 4) * D * (F // 2)
    found = {(c.kind, c.axes): c for c in counts.collectives}
    gathered, summed = found.pop(("all-gather", ("fsdp",))), found.pop(("all-reduce", ("tensor",)))
    assert not found
    weight = 4 * D * F // 2
    assert (gathered.calls, gathered.group, gathered.payload) == (2 * L, 4, 2 * L * weight)
    assert gathered.sent == gathered.payload * 3 / 4
    assert (summed.calls, summed.group, summed.payload) == (L, 2, L * 4 * (B // 4) * D)
    assert summed.sent == summed.payload
    # Every weight is read from memory at least once, and no more than a few times over.
    assert 2 * L * weight / 4 < counts.memory_bytes < 20 * 2 * L * weight
    traced = jax.jit(run).trace(*args)
    assert plan.traced_flops(traced.jaxpr.jaxpr) == counts.flops * 8


def test_flops_of_a_sharded_training_step_are_shared(key):
    config = models.Config(
        vocab_size=64, dim=32, layers=6, heads=4, kv_heads=2, head_dim=8, ffn_dim=48, tie_embeddings=False,
        remat="block",
    )  # fmt: skip
    mesh = models.make_mesh(**MESH)

    def loss(params, tokens):
        return models.forward(params, config, tokens).logits.mean()

    with models.use_mesh(mesh):
        tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
        traced = jax.jit(jax.grad(loss)).trace(models.abstract(config, mesh=mesh), tokens)
        counts = plan_hlo.count(traced.lower().compile().as_text(), MESH)
    whole = plan.traced_flops(traced.jaxpr.jaxpr)
    matrices = config.num_params() - 64 * 32 - 32 * 13  # without the embedding and the norms
    attention = 6 * 2 * 16 * 4 * 8  # scores and values, per token
    assert whole > 3 * 2 * (matrices + attention) * 8 * 16  # forward and twice backward, and what is recomputed
    assert whole < 4 * 2 * (matrices + attention) * 8 * 16
    assert counts.flops * 8 == pytest.approx(whole, rel=0.25)


def test_a_loop_that_data_end_counts_once_and_is_reported():
    def run(x):
        return jax.lax.while_loop(lambda c: c[1] > 0, lambda c: (c[0] @ c[0], c[1] - c[0][0, 0]), (x, x[0, 1]))

    counts = plan_hlo.count(compiled(run, jax.ShapeDtypeStruct((16, 16), jnp.float32)), {"data": 1})
    assert (counts.flops, counts.open_loops) == (2 * 16**3, 1)


@pytest.mark.parametrize(("step", "trips"), [(1, 16), (2, 8), (3, 6)])
def test_loops_may_count_in_steps(step, trips):
    """As the TPU compiler writes a product whose operand arrives piece by piece, two pieces at a time."""
    text = """HloModule m

%body (p: (u32[], f32[4,4])) -> (u32[], f32[4,4]) {
  %p = (u32[], f32[4,4]{1,0}) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  %x = f32[4,4]{1,0} get-tuple-element(%p), index=1
  %step = u32[] constant(STEP)
  %next = u32[] add(%i, %step)
  %y = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (u32[], f32[4,4]{1,0}) tuple(%next, %y)
}

%condition (q: (u32[], f32[4,4])) -> pred[] {
  %q = (u32[], f32[4,4]{1,0}) parameter(0)
  %j = u32[] get-tuple-element(%q), index=0
  %limit = u32[] constant(16)
  ROOT %c = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (a: f32[4,4]) -> f32[4,4] {
  %a = f32[4,4]{1,0} parameter(0)
  %zero = u32[] constant(0)
  %start = u32[] copy(%zero)
  %carried = (u32[], f32[4,4]{1,0}) tuple(%start, %a)
  %w = (u32[], f32[4,4]{1,0}) while(%carried), condition=%condition, body=%body
  ROOT %r = f32[4,4]{1,0} get-tuple-element(%w), index=1
}
"""
    counts = plan_hlo.count(text.replace("STEP", str(step)), {"data": 1})
    assert (counts.flops, counts.open_loops) == (trips * 2 * 4**3, 0)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2] {'c'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, x", [[0, 1], [2, 3]]),
        ("replica_groups={}, x", [[0, 1, 2, 3]]),
        ("source_target_pairs={{0,1},{1,0},{2,2}}", [[0, 1], [1, 0], [2, 2]]),
    ],
)
def test_every_way_to_write_groups(text, groups):
    np.testing.assert_array_equal(plan_hlo.replica_groups(text, 4), groups)


def test_axes_are_those_in_which_members_differ():
    mesh = {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}
    assert plan_hlo.axes_of(np.array([[0, 1], [2, 3]]), mesh) == ("tensor",)
    assert plan_hlo.axes_of(np.array([[0, 2], [1, 3]]), mesh) == ("fsdp",)
    assert plan_hlo.axes_of(np.arange(8)[None], mesh) == ("data", "fsdp", "tensor")


def test_a_batched_product_written_as_a_convolution_counts_once():
    """As the TPU compiler writes [8, 16, 32] x [8, 32, 64]: the batch is a spatial dimension full of holes."""
    text = """HloModule m

ENTRY %main (a: bf16[8,16,32], b: bf16[8,32,64]) -> bf16[8,16,64] {
  %a = bf16[8,16,32]{2,1,0} parameter(0)
  %b = bf16[8,32,64]{2,1,0} parameter(1)
  ROOT %c = bf16[8,16,64]{2,1,0} convolution(%a, %b), WINDOW, dim_labels=0bf_0io->0bf
}
""".replace("WINDOW", "window={size=8 stride=7 pad=0_0 lhs_dilate=8}")
    assert plan_hlo.count(text, {"data": 1}).flops == 2 * 8 * 16 * 32 * 64


# --- the report ------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_advised_and_fails(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path):
    """The compiler refuses the update; the decode step fits alone, but not beside the training state."""
    spec, topology = "plan", parse_topology("v5e:2x2")
    work = plan.workload(resolve_config(spec), spec)
    sizes = {"data": 1, "fsdp": 4, "expert": 1, "tensor": 1}
    refused = plan.Program(
        "update", refused="RESOURCE_EXHAUSTED: the total memory required (24.49G) exceeds available HBM (15.75G)"
    )
    decode = plan.Program("decode", arguments=2e9, temporary=1e9, held=24.6e9, flops=1e9, hbm_seconds=1e-3)
    usable = topology.chip.usable

    def stub(*args):
        rows = [vars(p) | {"peak": p.peak, "fits": p.fits(usable), "seconds": p.hbm_seconds} for p in (refused, decode)]
        out = {
            "config": spec, "topology": topology.name, "chips": 4, "devices": 4, "mesh": sizes,
            "chip": {"usable": usable}, "state_bytes": 24.6e9, "whole_parameters": [], "programs": rows, "fits": False,
            "model": {"parameters": 8e9, "dtype": "bfloat16", "weights": "float32", "family": "qwen3", "layers": 36},
            "batch": {"rows": 1024, "tokens": 4096, "minibatches": 1, "micro_batches": 4, "new_tokens": 3072},
        }  # fmt: skip
        return out | {"advice": plan_report.advice(out, work, sizes)}

    monkeypatch.setattr(plan, "plan", stub)
    path = tmp_path / "plan.json"
    assert cli.main(["plan", "--config=plan", "--topology=v5e:2x2", f"--json={path}"]) == cli.FAILURE
    printed = capsys.readouterr().out
    for words in ("exceeds available HBM", "config.rl.micro_batches", "config.mesh.fsdp", "logprob_chunk"):
        assert words in printed
    assert "stay while it samples" in printed
    assert json.loads(path.read_text())["fits"] is False


def test_sizes_are_written_with_units():
    assert [plan_report.size(n) for n in (0, 12, 1.5e3, 2.5e9, 1.2e15)] == [
        "0 B",
        "12 B",
        "1.5 kB",
        "2.5 GB",
        "1,200 TB",
    ]
    assert [plan_report.duration(t) for t in (0, 2e-6, 0.0123, 3)] == ["0 s", "2 us", "12.3 ms", "3 s"]


# --- with the TPU compiler -------------------------------------------------------------------------------------------


@pytest.mark.tpu
def test_a_small_plan(capsys, tmp_path):
    path = tmp_path / "plan.json"
    words = ["--config=plan", "--topology=v5e:2x2", "--config.mesh.tensor=2", f"--json={path}", *SMALL]
    assert cli.main(["plan", *words]) == cli.OK
    out = json.loads(path.read_text())
    assert out["mesh"] == {"data": 1, "fsdp": 2, "expert": 1, "tensor": 2}
    update, decode = out["programs"]
    assert update["flops"] * 4 == pytest.approx(update["total_flops"], rel=0.1)
    assert (update["open_loops"], decode["open_loops"]) == (0, 1)
    # Weights and moments are updated in place, and the rest is little.
    assert update["aliased"] == pytest.approx(out["state_bytes"], rel=0.02)
    assert {"all-gather", "all-reduce"} <= {one["kind"] for one in update["collectives"]}
    gathered = sum(one["payload"] for one in update["collectives"] if one["kind"] == "all-gather")
    layer = 2 * (256 * (32 + 2 * 8) * 128 + 32 * 128 * 256 + 3 * 256 * 512) / 2  # bfloat16, half of it per tensor
    assert 2 * 5 * layer * 2 < gathered < 2 * 5 * layer * 4  # slices x layers: forward, recomputed, backward
    assert "fits" in capsys.readouterr().out


@pytest.mark.tpu
def test_a_loop_over_tokens_keeps_no_second_cache(capsys, tmp_path):
    path = tmp_path / "plan.json"
    long = ["--config.rl.prompts_per_step=8", "--config.rollout.max_total=4096", "--programs=decode"]
    words = ["--config=plan", "--topology=v5e:2x2", "--config.mesh.tensor=2", f"--json={path}", *SMALL, *long]
    assert cli.main(["plan", *words]) == cli.OK
    (decode,) = json.loads(path.read_text())["programs"]
    cache = 5 * 2 * (64 / 2) * (8 / 2) * 4096 * 128 * 2  # layers, keys and values, rows, heads, slots, width, bfloat16
    assert decode["aliased"] == pytest.approx(cache, rel=0.02)
    assert decode["temporary"] < 0.5 * cache


@pytest.mark.tpu
def test_programs_for_a_tpu_take_the_tpus_forms():
    from models.linear import apart
    from models.platform import platform

    mesh = plan.make_mesh(parse_topology("v5e:2x2"), MESH | {"fsdp": 2})
    x = jnp.ones(4)
    assert "optimization_barrier" in str(jax.make_jaxpr(lambda x: apart(x))(x))
    with models.use_mesh(mesh):
        assert platform() == "tpu"
        assert "optimization_barrier" not in str(jax.make_jaxpr(lambda x: apart(x))(x))


@pytest.mark.tpu
def test_a_refusal_of_the_compiler_becomes_advice(capsys):
    words = ["--config=plan", "--topology=v5e:2x2", *SMALL, "--programs=update", "--config.rollout.max_total=16384"]
    assert cli.main(["plan", *words, "--config.rl.prompts_per_step=8", "--config.rl.micro_batches=1"]) == cli.FAILURE
    printed = capsys.readouterr().out
    assert "exceeds available HBM" in printed
    assert "attention scores" in printed
    assert "config.rl.micro_batches" in printed
