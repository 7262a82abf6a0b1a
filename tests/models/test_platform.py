"""The platform that a program is traced for: the mesh's, or the default backend's."""

import jax
import numpy as np
from jax.sharding import AbstractMesh

import models
from models.platform import platform


def test_without_a_mesh_it_is_the_default_backends():
    assert platform() == jax.default_backend()


def test_with_a_mesh_it_is_that_of_its_devices():
    with models.use_mesh(models.make_mesh(data=8)):
        assert platform() == jax.devices()[0].platform


def test_programs_for_other_devices_are_not_mistaken(monkeypatch):
    """The mesh is part of a compiled program's key, so a form chosen while tracing cannot leak to another platform."""
    seen = []

    @jax.jit
    def form(x):
        seen.append(platform())
        return x

    x = np.ones(2, np.float32)
    mesh = models.make_mesh(data=8)
    form(x)
    with models.use_mesh(mesh):
        form(x)
        form(x)
    assert len(seen) == 2


def test_a_mesh_without_devices_falls_back():
    with jax.sharding.use_abstract_mesh(AbstractMesh((8,), ("data",))):
        assert platform() == jax.default_backend()
