"""Which kind of device a program is traced for, where a form that suits one kind is chosen while tracing."""

import jax


def platform() -> str:
    """ "cpu", "gpu" or "tpu": that of the devices of :func:`models.use_mesh`, without a mesh the default backend's.

    A program compiled ahead of time for a TPU on a machine without one takes the TPU's forms, and since the mesh is
    part of what ``jit`` looks a program up by, none is mistaken for another.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform
