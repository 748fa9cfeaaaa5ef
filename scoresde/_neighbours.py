"""On import: raise if Python would take another `solvers` or `sde_lib` for ours, such as a file beside a script."""

from importlib.util import find_spec
from pathlib import Path


def _found(name: str) -> str:
    """Where Python would import `name` from; nothing is imported, for a file of the user's would run."""
    try:
        spec = find_spec(name)
    except ValueError:  # already imported, and not from a file
        return f"a module {name!r} in sys.modules"
    if spec is None:
        return "nothing"
    # a folder without __init__.py has no origin
    return spec.origin or next(iter(spec.submodule_search_locations or ()), "an unknown place")


def check(here: Path) -> None:
    """Raise ImportError unless `sde_lib` and `solvers` are the packages in `here`."""
    for name in ("sde_lib", "solvers"):
        found = _found(name)
        if found == "nothing":
            raise ImportError(f"scoresde needs its package {name!r}, which is not in {here}: install scoresde again.")
        if Path(found).resolve() != here / name / "__init__.py":
            raise ImportError(
                f"Python finds {found} where scoresde needs its own package {name!r} in {here}: rename that file or "
                "folder, or run your script from another one."
            )


check(Path(__file__).resolve().parent.parent)
