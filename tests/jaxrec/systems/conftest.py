"""Base models of the embedded world, made once for all tests of the systems."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def base_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps them out of the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXREC_CACHE", str(tmp_path_factory.mktemp("base_models")))
        yield
