"""The main job: that it runs from end to end, and (slow) that what it makes is good."""

import csv
import json

import pytest

from scoresde import config, demo

FILES = ("samples.png", "forward.png", "classes.png", "inpainting.png", "training.png", "solvers.csv", "summary.json")


def overrides(**fields):
    return [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]


def test_the_demo_writes_what_it_says(tmp_path, capsys):
    """A tiny network for a few steps: every file, a row per solver, and the figures that were printed."""
    settings = config.load(
        "digits_vp",
        overrides(
            training__max_seconds=0,
            training__steps=4,
            training__eval_every=2,
            training__log_every=1,
            training__tensorboard=False,
            network__unet__channels=4,
            data__digits__held_out=0.03,
        ),
    )
    summary = demo.main(tmp_path, settings)
    for name in FILES:
        assert (tmp_path / name).stat().st_size > 100, name
    rows = list(csv.DictReader((tmp_path / "solvers.csv").read_text().splitlines()))
    assert [r["solver"] for r in rows] == [name for name, *_ in demo.ROWS] + ["training digits (floor)"]
    # stated calls are counted calls: 100 steps and the posterior mean; 50 steps of two; 18 of two; 36 of one
    assert [float(r["nfe"]) for r in rows[:5]] == [101, 101, 37, 37, 18] and float(rows[5]["nfe"]) > 6
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    printed = capsys.readouterr().out
    assert f"{summary['bits_per_dim']:.4f}" in printed and f"{summary['gaussian_bits_per_dim']:.4f}" in printed


@pytest.mark.parametrize(
    ("name", "says"), [("toy_ring", "images with integer grey levels"), ("vp/ddpm/cifar10", "continuous time")]
)
def test_what_the_demo_cannot_show_is_refused_before_it_trains(name, says, tmp_path, monkeypatch):
    digits = config.load("digits_vp")
    settings = config.load(name)
    if says == "continuous time":
        settings.data = digits.data
    monkeypatch.setattr(demo, "train", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(ValueError, match=says):
        demo.main(tmp_path, settings)


@pytest.mark.slow
def test_the_demos_model_beats_the_gaussian(tmp_path):
    """600 steps, less than half of the demo's: at least 0.6 bits/dim better than the fitted Gaussian (0.8 is the demo's
    own bar), and samples of every solver near held-out digits (those of a four-step network were 27 away)."""
    settings = config.load("digits_vp", overrides(training__max_seconds=0, training__steps=600))
    summary = demo.main(tmp_path, settings)
    assert summary["gaussian_bits_per_dim"] - summary["bits_per_dim"] > 0.6
    assert summary["standard_error"] < 0.03
    for row in summary["solvers"]:
        assert row["energy_distance"] < 1.0, row
