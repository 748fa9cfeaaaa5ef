"""The README's Python runs as printed, and the pages it points to exist."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_ten_lines_run_and_are_right(capsys):
    """N(0, I) data: samples have unit spread, and the density is the standard normal's."""
    code = re.findall(r"```python\n(.*?)```", TEXT, re.S)[0]
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    told = capsys.readouterr().out
    assert "37 network calls per sample" in told and "by heun on blended" in told
    # 3072 values: standard error of the standard deviation 0.013; the solvers' own bias at these steps is below 0.02
    assert all(abs(float(names[k].x.std()) - 1) < 0.06 for k in "ab")
    exact = torch.distributions.Normal(0.0, 1.0).log_prob(names["a"].x.double()).flatten(1).sum(1)
    assert (names["log_p"].log_prob - exact).abs().max() < 0.05
    assert names["a"].nfe[0] == 37 and names["c"].nfe[0] == 50


def test_a_network_trained_in_ones_own_loop(tmp_path, monkeypatch):
    """Samples lie at the centres of their classes.

    Those of a model that ignores classes would have means a distance of 1.03 away, and a spread of 1 along x.
    """
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    code = next(c for c in re.findall(r"```python\n(.*?)```", TEXT, re.S) if "objective.loss" in c)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    for label in range(2):
        centre = names["centres"][label]
        mine = names["x"][names["labels"] == label]
        assert (mine.mean(0) - centre).norm() < 0.2 and mine.std(0).max() < 0.4
        mine = names["y"][names["labels"] == label]
        assert (mine.mean(0) - centre).norm() < 0.4 and mine.std(0).max() < 0.4
    assert (tmp_path / "runs" / "own.safetensors").is_file()


def test_the_comparison_runs(tmp_path, monkeypatch, capsys):
    """As printed: the table names every solver, the picture is there, the recommendation is the smallest error."""
    monkeypatch.chdir(tmp_path)
    code = next(c for c in re.findall(r"```python\n(.*?)```", TEXT, re.S) if "compare" in c)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert "recommended" in capsys.readouterr().out and (tmp_path / "runs" / "compare.png").stat().st_size > 10_000
    errors = {(r["label"], r["budget"]): r["path_median"] for r in names["result"].rows if r["kind"] == "deterministic"}
    assert errors["recommended", "nfe=20"] == min(errors.values()) and names["x"].shape == (64, 2)


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", TEXT) + re.findall(r"`((?:docs|notebooks|benchmarks)/[^`]*)`", TEXT)
    missing = [t for t in targets if not t.startswith("http") and not (ROOT / t).exists()]
    assert not missing, missing


@pytest.mark.parametrize("table", ["SDES", "SOLVERS", "GRIDS", "NETWORKS"])
def test_what_there_is_says_what_there_is(table):
    """Every entry of the tables is in the README or the architecture page, by its name or its class."""
    import scoresde

    words = (TEXT + (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")).lower()
    words = words.replace("++", "pp")
    words += words.replace("-", " ") + words.replace("-", "")
    for name, cls in getattr(scoresde, table).items():
        spoken = {name, name.replace("_", " "), cls.__name__.lower()}
        assert any(s in words for s in spoken), f"{table}: {name}"
