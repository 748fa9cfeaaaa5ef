"""What `import scoresde` offers: every entry of the tables by its name, lazily what is heavy, and clear errors."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import scoresde
from scoresde.likelihood.dequantization import DEQUANTIZATIONS

ROOT = Path(__file__).resolve().parent.parent
TABLES = ("SDES PARAMETERIZATIONS SOLVERS GRIDS CORRECTORS COORDINATES NETWORKS DATASETS PROBES "
          "OBJECTIVES TIMES WEIGHTINGS METRICS").split()


def run(code, cwd=ROOT, **environment):
    """Python in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    arguments = [sys.executable, "-c", code]
    return subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("table", TABLES)
def test_every_class_of_a_table_is_here(table):
    for entry in getattr(scoresde, table).values():
        name = getattr(entry, "__name__", type(entry).__name__)  # coordinates are objects
        assert name in scoresde.__all__ and name in dir(scoresde)
        assert getattr(scoresde, name) in (entry, type(entry))


def test_what_comes_late_is_seen_by_editors_and_by_dir():
    """Static analysis reads the imports under TYPE_CHECKING: the same names from the same modules."""
    tree = ast.parse((ROOT / "scoresde" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    static = {alias.name: node.module for node in block.body for alias in node.names}
    assert static == scoresde._LAZY and {"load_model", "load_pretrained", "train", "compare"} <= set(static)
    for name in scoresde.__all__:
        assert name in dir(scoresde) and getattr(scoresde, name) is not None
    assert set(DEQUANTIZATIONS) == set(scoresde.DEQUANTIZATIONS)
    with pytest.raises(AttributeError, match="Did you mean 'Heun'"):
        scoresde.Huen  # noqa: B018


@pytest.mark.parametrize("name", ["solvers", "sde_lib"])
@pytest.mark.parametrize("how", ["beside", "loaded"])
def test_a_module_of_the_same_name_is_named(name, how, tmp_path):
    """Without running it."""
    code = "import scoresde"
    if how == "beside":
        (tmp_path / f"{name}.py").write_text("print('it ran')")
    else:
        code = f"import sys, types; sys.modules[{name!r}] = types.ModuleType({name!r}); import scoresde"
    done = run(code, tmp_path)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: Python finds ") and "rename that file" in last and not done.stdout
    assert how == "loaded" or str(tmp_path / f"{name}.py") in last


@pytest.mark.parametrize(
    ("library", "use", "extra"),
    [
        ("matplotlib", "from scoresde.figures import require_matplotlib; require_matplotlib()", "plot"),
        ("sklearn", "scoresde.Digits().load()", "train"),
        ("accelerate", "from scoresde import config; scoresde.train(config.load('toy_ring'), 'run')", "train"),
        ("huggingface_hub", "scoresde.from_pretrained('someone/model')", "hub"),
    ],
)
def test_a_missing_library_says_what_to_install(library, use, extra, tmp_path, monkeypatch):
    """None in sys.modules is what makes an import fail; the library's own parts may be loaded already."""
    for name in [n for n in sys.modules if n.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImportError, match=rf"pip install 'scoresde\[{extra}\]'"):
        exec(f"import scoresde; {use}", {})
