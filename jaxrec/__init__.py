"""Language models and recommenders that work together, trained by interaction, in JAX.

Importing this package is cheap: no heavy third-party package is imported and no device is touched. It does make sure
that the sibling packages it builds on are its own, because their names (`models`, `rl`, `analysis`, `configs`) are
common enough to be shadowed by an unrelated folder.
"""

import sys as _sys
from importlib.machinery import ModuleSpec as _ModuleSpec
from importlib.util import find_spec as _find_spec
from pathlib import Path as _Path

__version__ = "0.1.0"
__all__ = ["__version__"]

_SIBLINGS = ("models", "rl", "analysis", "configs")


def _spec(name: str) -> _ModuleSpec | None:
    """Where `import name` comes from or would come from, without importing it."""
    loaded = _sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__spec__", None) is None:
        # find_spec refuses a module without a spec (a stub put into sys.modules by hand); its file tells as much.
        return _ModuleSpec(name, None, origin=getattr(loaded, "__file__", None))
    return _find_spec(name)


def _check_siblings(home: _Path) -> None:
    """Raises ImportError if a sibling package is missing from `home` or shadowed by another folder or module."""
    for name in _SIBLINGS:
        spec = _spec(name)
        if spec is None:
            raise ImportError(
                f"jaxrec needs its package '{name}' in {home}, and it is not there: the installation is incomplete. "
                "Install jaxrec again, or run from a complete checkout."
            )
        if spec.submodule_search_locations:
            found = _Path(next(iter(spec.submodule_search_locations))).resolve()
        else:
            found = _Path(spec.origin or f"<no file>/{name}").resolve()
        if found != home / name:
            raise ImportError(
                f"the name '{name}' is taken: Python finds {found} before jaxrec's own {home / name}. "
                f"Rename or move {found}, take its parent folder off PYTHONPATH, or start Python elsewhere "
                "(the `jaxrec` command and `python -P` leave the working directory out)."
            )


_check_siblings(_Path(__file__).resolve().parent.parent)
