"""The wheel: what is in it, that it works outside the checkout, and that importing it is light."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["scoresde", "sde_lib", "solvers", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built by setuptools in a copy of the sources, with neither network nor isolation."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree / name)
    # tests, notebooks and the like must not travel: they are here to be left out
    for name in ("tests", "notebooks", "benchmarks", "docs"):
        (tree / name).mkdir()
        (tree / name / "__init__.py").write_text("")
    code = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    built = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-2000:]
    return tree / "dist" / built.stdout.splitlines()[-1]


def test_wheel_holds_exactly_what_it_should(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"scoresde", "sde_lib", "solvers"} and len(tops) == 4
    for package in ("scoresde", "sde_lib", "solvers"):
        assert f"{package}/py.typed" in names
        sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / package).rglob("*.py")}
        assert sources <= set(names)
    assert "scoresde/scoresde.mplstyle" in names
    shipped = {f"scoresde/configs/{p.name}" for p in (ROOT / "configs").glob("*.py")}
    assert shipped <= set(names) and len(shipped) > 5
    assert not any(name.endswith((".pyc", ".ipynb", ".png")) for name in names)


def test_wheel_works_outside_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    code = (
        "import scoresde, sys; from scoresde import config;"
        "assert scoresde.__file__.startswith(sys.argv[1]), scoresde.__file__;"
        "c = config.load('digits_vp'); assert str(config.find('digits_vp')).startswith(sys.argv[1]);"
        "print(c.sde.name);"
        # what the extras bring is not there: the base install saves and loads a model
        "sys.modules.update(dict.fromkeys(['accelerate', 'tensorboard', 'sklearn', 'matplotlib', 'huggingface_hub']));"
        "network = {'name': 'mlp', 'mlp': {'shape': [2]}};"
        "m = scoresde.ScoreModel.from_config({'network': network, 'sde': {'name': 'vp'}});"
        "scoresde.load_pretrained(scoresde.save_model(m, 'm.safetensors'))"
    )
    site = str((tmp_path / "site").resolve())
    environment = {**os.environ, "PYTHONPATH": site}
    done = subprocess.run(
        [sys.executable, "-c", code, site], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout == "vp\n", done.stderr


def test_import_is_light():
    heavy = (
        "matplotlib sklearn accelerate tensorboard safetensors scipy torchsde torchdiffeq ml_collections absl PIL "
        "pandas IPython"
    )
    code = f"import sys, scoresde; print([m for m in {heavy.split()!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
