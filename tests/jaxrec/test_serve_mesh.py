"""Serving on several devices and from weights in eight bits; the referee is one device, and for eight bits the sampler
called by hand."""

import functools
import math
import signal
import threading
from types import SimpleNamespace

import jax
import numpy as np
import openai
import pytest

import models
from jaxrec import cli, serve, serve_command, serve_engine
from jaxrec.serve_engine import Engine, Job, Part
from models import sample, slots
from models.hf import Model
from models.layout import decode_weights
from models.linear import Quantized
from models.sharding import AXES, make_mesh, sharding_for
from tests.jaxrec.served import PROMPTS, alone, complete, running, world_model

SIZES = {"data": 2, "fsdp": 2, "tensor": 2}
FIRST, LATER = (PROMPTS[0], 24), [(PROMPTS[1], 9), (PROMPTS[2], 30), *((prompt, 14) for prompt in PROMPTS[3:6])]


@pytest.fixture(scope="module")
def model() -> Model:
    return world_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "m"
    models.save(model, path)
    return path


@pytest.fixture(scope="module")
def engine(folder):
    """A served folder whose parts were read by the devices that hold them."""
    mesh = make_mesh(**SIZES)
    loaded = models.load(folder, mesh=mesh)
    jax.tree.map(lambda x, where: _lies(x, where), loaded.params, models.shardings(loaded.config, mesh))
    assert not loaded.params["layers"]["wq"].sharding.is_fully_replicated
    with Engine(loaded, max_batch=6, slice_tokens=4, mesh=mesh) as engine:
        yield engine


def _lies(x: jax.Array, where: jax.sharding.Sharding) -> None:
    assert x.sharding.is_equivalent_to(where, x.ndim)


def in_turn(engine: Engine, first: tuple[str, int], later: list[tuple[str, int]]) -> list[tuple[list, list]]:
    """(tokens, logprobs) of greedy jobs (prompt, tokens): the others come when the first one has a part of its answer.

    Which programs that needs does not depend on time: the engine's own thread brings them, all at once.
    """
    jobs = [Job(tuple(engine.tokenizer.encode(prompt)), count, logprobs=0) for prompt, count in (first, *later)]
    said, left, over = [([], []) for _ in jobs], [len(jobs)], threading.Event()
    failed: list[Exception] = []

    def deliver(i: int, part: Part | Exception) -> None:
        if isinstance(part, Exception):
            failed.append(part)
            over.set()
            return
        begins = i == 0 and not said[0][0]
        said[i][0].extend(token.id for token in part.tokens)
        said[i][1].extend(token.logprob for token in part.tokens)
        if begins:
            for n, job in enumerate(jobs[1:], start=1):
                engine.submit(job, functools.partial(deliver, n))
        left[0] -= part.finish is not None
        if not left[0]:
            over.set()

    engine.submit(jobs[0], functools.partial(deliver, 0))
    assert over.wait(300)
    assert not failed
    return said


def by_hand(model: Model, asked: list[tuple[str, int]]) -> list[tuple[list, list]]:
    """(tokens, logprobs) of greedy answers from weights in eight bits, one prompt at a time on one device."""
    weights, out = decode_weights(model.params, model.config, int8=True), []
    assert isinstance(weights["layers"][0]["wqkv"], Quantized)
    for prompt, count in asked:
        ids = np.array([model.tokenizer.encode(prompt)], np.int32)
        lengths = np.full(1, ids.shape[1], np.int32)
        session = sample.prefill(weights, model.config, ids, lengths, 128)
        limits = np.full(1, count, np.int32)
        made, _ = sample.decode(
            weights, model.config, session, jax.random.key(0), limits, steps=32, temperature=0.0
        )  # fmt: skip
        out.append((np.asarray(made.tokens)[0, :count].tolist(), np.asarray(made.logprobs)[0, :count].tolist()))
    return out


def same(found: list[tuple[list, list]], expected: list[tuple[list, list]]) -> None:
    for (tokens, logprobs), (ids, values) in zip(found, expected, strict=True):
        assert tokens == ids
        np.testing.assert_allclose(logprobs, values, atol=1e-4)


def one_device(model: Model, asked: list[tuple[str, int]]) -> list[tuple[list, list]]:
    answers = [alone(model, prompt, max_new_tokens=count) for prompt, count in asked]
    return [(list(answer.tokens), list(answer.logprobs)) for answer in answers]


def test_answers_that_come_and_go_on_a_mesh_are_those_of_one_device(engine, model, monkeypatch):
    real, places = serve_engine.advance, []

    def advance(weights, config, session, *args, **options):
        places.extend((x.shape, x.sharding) for x in (*session.keys, *session.values))
        return real(weights, config, session, *args, **options)

    monkeypatch.setattr(serve_engine, "advance", advance)
    same(in_turn(engine, FIRST, LATER), one_device(model, [FIRST, *LATER]))
    assert {shape[0] for shape, _ in places} == {4, 8}  # rows are split evenly over the four devices of data and fsdp
    mesh = make_mesh(**SIZES)
    for shape, sharding in places:
        wanted = sharding_for(mesh, shape, ("batch", "kv_heads", "time", "head_dim"))
        assert sharding.is_equivalent_to(wanted, len(shape))
        assert math.prod(sharding.shard_shape(shape)) * 8 == math.prod(shape)


def test_other_requests_on_a_mesh_compile_nothing_new(engine):
    """More and fewer answers, joining early and late, from a session that was run, enlarged or admitted to."""
    programs = (sample._prefill, slots._admit, slots._advance, slots._resize)
    in_turn(engine, FIRST, LATER)
    in_turn(engine, (PROMPTS[4], 40), [])
    before = [program._cache_size() for program in programs]
    for _ in range(2):
        in_turn(engine, (" brass old", 20), [(prompt, n) for prompt, n in zip(PROMPTS[::-1], (13, 40, 8, 21, 5))])
        in_turn(engine, (" clock", 33), [(" the lamp", 11)])
        in_turn(engine, (" who? brass", 3), [])
    assert [program._cache_size() for program in programs] == before


def test_the_protocol_is_served_from_a_mesh(engine, model):
    with running(engine) as url, openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:
        reply = complete(client, PROMPTS[:2], n=2)
        assert [c.text for c in reply.choices] == [alone(model, p).text for p in PROMPTS[:2] for _ in range(2)]
        events = complete(client, PROMPTS[3], stream=True)
        assert "".join(event.choices[0].text for event in events) == alone(model, PROMPTS[3]).text
        drawn = [c.text for c in complete(client, " who", n=3, temperature=1, seed=7).choices]
        assert drawn == [c.text for c in complete(client, " who", n=3, temperature=1, seed=7).choices]
        assert len(set(drawn)) == 3


def test_eight_bits_are_those_of_the_sampler(model):
    with Engine(model, max_batch=6, slice_tokens=4, int8=True) as engine:
        found = in_turn(engine, FIRST, LATER)
    same(found, by_hand(model, [FIRST, *LATER]))
    exact = one_device(model, [FIRST, *LATER])
    assert max(abs(one[1][0] - other[1][0]) for one, other in zip(found, exact, strict=True)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "int8"),
    [({"expert": 2, "fsdp": 2, "tensor": 2}, False), ({"data": 4, "expert": 2}, True), ({"expert": 8}, True)],
)
def test_experts_are_served_from_a_mesh(model, sizes, int8):
    config = model.config.replace(
        family="qwen3_moe", experts=8, top_k=2, norm_topk=True, layers=2, tie_embeddings=False, eos_ids=()
    )  # fmt: skip
    mesh, key = make_mesh(**sizes), jax.random.key(0)
    whole = model.replace(config=config, params=models.init(config, key))
    split = model.replace(config=config, params=models.init(config, key, mesh=mesh))
    with Engine(split, max_batch=6, slice_tokens=4, mesh=mesh, int8=int8) as engine:
        found = in_turn(engine, FIRST, LATER)
    same(found, (by_hand if int8 else one_device)(whole, [FIRST, *LATER]))


def test_the_command_serves_eight_bits_from_a_mesh(folder, model, monkeypatch, capsys):
    found, default = [], signal.getsignal(signal.SIGTERM)

    def server(engine, name, *_):
        return SimpleNamespace(run=lambda sockets: found.extend(in_turn(engine, FIRST, [])))

    monkeypatch.setattr(serve, "server", server)
    words = ["serve", str(folder), "--mesh", "tensor=2,data=2,fsdp=-1", "--int8", "--port=0", "--max_batch=6"]
    try:
        assert cli.main([*words, "--slice_tokens=4"]) == 0
    finally:
        signal.signal(signal.SIGTERM, default)
    line = capsys.readouterr().out.splitlines()[0]
    assert line.endswith("6 answers at a time, mesh data=2 x fsdp=2 x tensor=2, int8; Ctrl+C ends")
    same(found, by_hand(model, [FIRST]))


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        ("tensr=2", ["no axis 'tensr'", "did you mean tensor?", "data, fsdp, expert, tensor"]),
        ("8", ["no axis '8'", "--mesh=AXIS=N"]),
        ("tensor", ["tensor=;", "number from 1"]),
        ("tensor=0", ["tensor=0", "number from 1"]),
        ("tensor=two", ["tensor=two"]),
        ("data=2,data=4", ["names data twice"]),
        ("data=-1,tensor=-1", ["only one", "-1"]),
        ("data=2,tensor=2", ["data=2", "tensor=2", "does not use 8 devices", "-1"]),
        ("data=3,fsdp=-1", ["data=3", "does not use 8 devices"]),
        ("tensor=8", ["tensor=8", "heads=4", "divisor of 4"]),
        ("tensor=-1", ["tensor=8", "heads=4"]),
        ("expert=2,data=4", ["expert=2", "no experts", "data or tensor"]),
    ],
)
def test_meshes_that_do_not_fit_are_refused_before_anything_is_read(folder, mesh, words, monkeypatch, capsys):
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("weights were read"))
    assert cli.main(["serve", str(folder), f"--mesh={mesh}", "--port=0"]) == cli.USAGE
    error = capsys.readouterr().err
    assert error.startswith("jaxrec: serve: ")
    assert len(error.strip().splitlines()) == 1
    for word in words:
        assert word in error


def test_sizes_of_a_mesh():
    assert serve_command.mesh_sizes(["tensor=4", "data=-1"]) == {"tensor": 4, "data": -1}
    assert serve_command._AXES == AXES
    for sizes in ({}, {"tensor": 1}, {"data": 1, "fsdp": 1}):  # one device, however many there are
        assert serve_command.make_mesh("never read", sizes) is None
