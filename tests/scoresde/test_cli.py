"""The command line, in process and as a process: whole little runs, and mistakes that are one line."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from scoresde import config as configs
from scoresde.cli import main

TINY = [
    "--config.data.digits.held_out=0.05",
    "--config.network.unet.channels=8",
    "--config.training.batch_size=16",
    "--config.training.steps=3",
    "--config.training.sample_every=0",
    "--config.training.tensorboard=False",
    "--config.training.max_seconds=1000",
    "--config.training.cpu=True",
    "--config.sampling.n=4",
    "--config.sampling.steps=2",
    "--config.likelihood.steps=8",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    assert main(["train", "--config", "digits_vp", "--workdir", str(workdir), *TINY]) == 0
    return workdir


def test_train_writes_a_run_and_continues_it(trained, capsys):
    assert configs.restore(trained / "config.json").training.steps == 3
    assert (trained / "metrics.jsonl").exists() and (trained / "checkpoints" / "step_00000003").is_dir()
    again = ["train", "--config", str(trained / "config.json"), "--workdir", str(trained)]
    assert main(again) == 0 and "3 steps" in capsys.readouterr().out
    assert main([*again, "--no-resume"]) == 2 and "holds a run" in capsys.readouterr().err


def test_sample_to_a_picture_and_to_arrays(trained, tmp_path, capsys):
    base = ["sample", "--workdir", str(trained), "--device=cpu"]
    assert main([*base, "--out", str(tmp_path / "a.png"), "--solver=ddim", "--nfe", "3"]) == 0
    assert "4 samples by ddim, 3 network calls each" in capsys.readouterr().out
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "L" and min(image.size) > 16
    for name, extra in (("a.npy", []), ("b.npy", []), ("c.npy", ["--seed=1"]), ("d.npy", ["--raw-weights"])):
        assert main([*base, "--out", str(tmp_path / name), *extra]) == 0
    assert [line.split("step_")[1][9:12] for line in capsys.readouterr().out.splitlines()] == 3 * ["ave"] + ["par"]
    a, b, c = (np.load(tmp_path / f"{n}.npy") for n in "abc")
    assert a.shape == (4, 1, 8, 8) and a.min() >= 0 and a.max() <= 16
    assert (a == b).all() and (a != c).any()
    assert main([*base, "--out", str(tmp_path / "a.npz"), "--class=all", "--guidance=2", "--n=12"]) == 0
    with np.load(tmp_path / "a.npz") as file:
        assert file["data"].shape == (12, 1, 8, 8) and file["labels"].tolist() == [*range(10), 0, 1]
    checkpoint = str(trained / "checkpoints" / "step_00000003")
    assert main(["sample", "--checkpoint", checkpoint, "--out", str(tmp_path / "e.npy"), "--device=cpu"]) == 0
    assert (np.load(tmp_path / "e.npy") == a).all()
    assert main([*base, "--class=3", "--config.sampling.n=2"]) == 0 and (trained / "samples.png").exists()


def test_likelihood_of_held_out_data(trained, tmp_path, capsys):
    """A row per sample, a summary, pictures; it goes on where it stopped, and refuses what is of something else."""
    out = tmp_path / "scores"
    base = ["likelihood", "--workdir", str(trained), "--device=cpu", "--n=3", f"--out={out}"]
    base += ["--config.likelihood.steps=8"]
    assert main([*base, "--elbo"]) == 0
    shown = capsys.readouterr().out
    assert "3 held-out samples" in shown and "variational bound" in shown
    figures = json.loads((out / "likelihood.json").read_text())
    assert figures["count"] == 3 and 1.0 < figures["mean"] < 10.0 and figures["standard_error"] > 0.0
    assert figures["elbo"]["mean"] > 1.0
    rows = (out / "likelihood.csv").read_text().splitlines()
    assert len(rows) == 5 and rows[1].startswith("index,bits_per_dim,trace_se,discretization")
    for picture in ("likelihood.png", "budget.png"):
        assert (out / picture).stat().st_size > 5000
    assert main(base) == 0  # nothing left to do
    assert json.loads((out / "likelihood.json").read_text())["mean"] == figures["mean"]
    assert main([*base, "--given-class"]) == 2 and "--restart" in capsys.readouterr().err


@pytest.mark.slow
def test_likelihood_again_and_by_more_steps(trained, tmp_path, capsys):
    """`--restart` scores anew under other conditions; `--convergence` repeats the first batch up to 128 steps."""
    out = tmp_path / "scores"
    base = ["likelihood", "--workdir", str(trained), "--device=cpu", "--n=6", f"--out={out}"]
    assert main([*base, "--convergence"]) == 0
    assert "standard error" in capsys.readouterr().out
    figures = json.loads((out / "likelihood.json").read_text())
    assert figures["convergence"]["steps"][-1] == 128 and (out / "convergence.png").stat().st_size > 5000
    assert main([*base, "--given", "--restart"]) == 0
    assert json.loads((out / "likelihood.json").read_text())["mean"] != figures["mean"]


def test_likelihood_of_a_chain_is_its_bound(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", "--config=digits_ddpm", "--workdir", str(run), *TINY[:-1]]) == 0
    assert main(["likelihood", "--workdir", str(run), "--device=cpu", "--n=2"]) == 0
    assert "of a chain of" in capsys.readouterr().out
    figures = json.loads((run / "likelihood" / "likelihood.json").read_text())
    assert set(figures) == {"elbo"} and figures["elbo"]["mean"] > 0


MISTAKES = [
    ([], "COMMAND"),
    (["trian"], "invalid choice"),
    (["train", "--config=digits_vp"], "--workdir"),
    (["train", "--config=digitsvp", "--workdir={tmp}"], "Did you mean 'digits_vp'"),
    (["train", "--config=digits_vp", "--workdir={tmp}", "--config.training.step=3"], "Did you mean 'steps'"),
    (["train", "--config=digits_vp", "--workdir={tmp}", "--config.training.steps=many"], "invalid literal"),
    (["train", "--config=digits_vp", "--workdir={tmp}", "--oops"], "Unknown argument '--oops'"),
    (["train", "--config=digits_vp", "--workdir={tmp}", "--config.sde.name=vpp"], "Did you mean 'vp'"),
    (["train", "--config=digits_vp", "--workdir={file}/run"], "Not a directory"),
    (["sample", "--workdir={tmp}"], "No checkpoint"),
    (["sample", "--workdir={tmp}/nowhere"], "No such file"),
    (["sample", "--workdir={run}", "--solver=huen"], "Did you mean 'heun'"),
    (["sample", "--workdir={run}", "--steps=3", "--nfe=3"], "not both"),
    (["sample", "--workdir={run}", "--steps=0"], "steps"),
    (["sample", "--workdir={run}", "--n=0"], ">= 1"),
    (["sample", "--workdir={run}", "--class=12"], "0 to 9"),
    (["sample", "--workdir={run}", "--class=x"], "a number or `all`"),
    (["sample", "--workdir={run}", "--guidance=2"], "needs a condition"),
    (["sample", "--workdir={run}", "--out=x.jpg"], ".png"),
    (["sample", "--workdir={run}", "--device=gpuu"], "device"),
    (["sample", "--checkpoint={file}"], "truncated or damaged"),
    (["sample", "--workdir={run}", "--steps=x"], "invalid int"),
    (["likelihood", "--workdir={run}", "--n=100000"], "held-out"),
    (["likelihood", "--workdir={run}", "--given=text"], "They come with class_label"),
    (["likelihood", "--workdir={run}", "--given", "--class=3"], "not both"),
    (["sample", "--workdir={run}", "--condition.class_labe=3"], "Did you mean 'class_label'"),
    (["sample", "--workdir={run}", "--condition.class_label"], "NAME=VALUE"),
    (["sample", "--workdir={run}", "--condition.class_label=3", "--class=3"], "not both"),
    (["sample", "--workdir={run}", "--condition.class_label={file}.npy"], "No such file"),
    (["train", "--config=digits_vp", "--workdir={tmp}", "--condition.class_label=3"], "sample, likelihood and compare"),
    (["sample", "--workdir={run}", "--import=no_such_module"], "--import no_such_module: it cannot be imported"),
    (["configs", "--x"], "Unknown argument"),
    (["train", "--config=digits_vp", "--workdir={tmp}/a", "--config.sampling.end=x"], "end"),
    (["train", "--config=digits_vp", "--workdir={tmp}/a", "--config.training.eval_samples=0"], "eval_samples"),
    (["train", "--config=digits_vp", "--workdir={tmp}/a", "--config.training.learning_rate=nan"], "learning_rate"),
    (["train", "--config={bomb}", "--workdir={tmp}/a"], "nested more"),
    (["train", "--config={file}.json", "--workdir={tmp}/a"], "No configuration file"),
    (["sample", "--workdir={run}", "--device=cuda:77"], "device"),
    (["sample", "--checkpoint={diffusers}"], "scoresde convert"),
    (["likelihood", "--checkpoint={diffusers}"], "scoresde convert"),
    (["convert", "{diffusers}", "{tmp}/x.safetensors"], "no safetensors file"),
    (["likelihood", "--workdir={run}", "--config.likelihood.steps=nan"], "invalid literal"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_one_line_on_stderr_and_exit_code_2(trained, tmp_path, capsys, arguments, message):
    file = tmp_path / "file"
    file.write_bytes(b"not a checkpoint")
    bomb, diffusers = tmp_path / "bomb.json", tmp_path / "theirs"
    bomb.write_text('{"seed":' * 400 + "1" + "}" * 400)
    diffusers.mkdir()
    (diffusers / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    words = [a.format(tmp=tmp_path, run=trained, file=file, bomb=bomb, diffusers=diffusers) for a in arguments]
    try:
        code = main(words)
    except SystemExit as error:  # argparse's way
        code = error.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and message in err
    assert err.endswith("\n") and err.count("\n") == 1 and err.startswith("scoresde")


def test_commands_of_one_process_refuse_torchrun_and_defects_are_one_line(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["demo"]) == 2 and "without torchrun" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr("scoresde.training.draw_samples", lambda *a, **k: {}["what should\nnot happen"])
    assert main(["sample", f"--workdir={trained}", f"--out={tmp_path / 'a.npy'}"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "KeyError" in error and "--traceback" in error


def test_pictures_that_cannot_be_drawn_cost_a_line(trained, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise ValueError("nothing\nto draw")

    monkeypatch.setattr("scoresde.likelihood.pictures.histogram", fails)
    assert main(["likelihood", f"--workdir={trained}", "--device=cpu", "--n=2", f"--out={tmp_path}"]) == 0
    out, error = capsys.readouterr()
    assert "no likelihood.png: nothing to draw\n" in error and "likelihood.csv, budget.png" in out


def test_configs_lists_the_shipped_ones(capsys):
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == configs.known() and all(len(line.split()) > 3 for line in lines)


def test_override_after_a_space(trained, tmp_path, capsys):
    out = str(tmp_path / "x.npy")
    arguments = ["sample", "--workdir", str(trained), "--out", out, "--device=cpu", "--config.sampling.n", "3"]
    assert main(arguments) == 0 and np.load(out).shape[0] == 3


def test_as_a_process_anywhere(tmp_path):
    def scoresde(*arguments):
        command = [sys.executable, "-m", "scoresde", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    done = scoresde("--help")
    assert done.returncode == 0 and all(c in done.stdout for c in ("train", "sample", "likelihood", "demo"))
    done = scoresde("train", "--config=digits_vq", "--workdir=x")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_traceback_on_demand(tmp_path):
    with pytest.raises(FileNotFoundError):
        main(["--traceback", "sample", "--workdir", str(tmp_path / "none")])


def test_compare_on_a_toy_and_on_a_run(tmp_path, capsys, monkeypatch):
    """Files, the table and its resumption; a trained model takes its held-out data as the reference; a class,
    guidance (two evaluations a call) and features of one's own."""
    out = tmp_path / "exact"
    call = ["compare", "--config=toy_ring", "--solvers=ddim,recommended", "--nfe=4,8", "--n=32", "--repetitions=1"]
    assert main([*call, f"--out={out}"]) == 0
    text = capsys.readouterr().out
    assert "recommended" in text and "adaptive ODE" in text and "energy_distance" in text
    for name in ("compare.csv", "compare.json", "compare.jsonl", "compare.png", "samples.png"):
        assert (out / name).stat().st_size > 100
    assert len((out / "compare.csv").read_text().splitlines()) == 5
    assert main([*call, f"--out={out}"]) == 0 and len((out / "compare.jsonl").read_text().splitlines()) == 5
    run = tmp_path / "run"
    assert main(["train", "--config=digits_vp", f"--workdir={run}", *TINY]) == 0
    call = ["compare", f"--workdir={run}", "--solvers=ddim@blended", "--nfe=3", "--n=8", "--repetitions=1"]
    assert main([*call, "--grid=karras"]) == 0
    assert "sliced_wasserstein" in capsys.readouterr().out and (run / "compare" / "samples.png").is_file()
    (tmp_path / "my_features.py").write_text("def corner(x):\n    return x[:, 0, :2, :2].double()\n")
    monkeypatch.chdir(tmp_path)
    call += ["--metrics=frechet_distance", "--features=my_features:corner", "--batch-size=5", "--out=mine"]
    assert main([*call, "--class=3", "--guidance=2", "--nfe=6"]) == 0
    with open("mine/compare.csv") as file:
        (row,) = csv.DictReader(file)
    assert float(row["nfe"]) == 6 and int(row["steps"]) == 2 and float(row["frechet_distance"]) > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--solvers=ddim"], "toy with a known density"),
        (["--solvers=ddim", "--config=digits_vp"], "ring"),
        (["--solvers=dim", "--config=toy_ring"], "Did you mean 'ddim'"),
        (["--solvers=ddim", "--config=toy_ring", "--nfe=4,x"], "--nfe takes numbers"),
        (["--solvers=ddim", "--config=toy_ring", "--grid=karass"], "karras"),
        (["--solvers=ddim", "--config=toy_ring", "--guidance=2"], "trained models"),
        (["--solvers=ddim", "--config=toy_ring", "--device=gpuu"], "device"),
        (["--solvers=ddim", "--config=toy_ring", "--metrics=fid"], "frechet_distance"),
        (["--solvers=ddim", "--config=toy_ring", "--features=no_such_module:f"], "cannot be imported"),
        (["--solvers=ddim", "--config=toy_ring", "--features=math:f"], "cannot be imported"),
    ],
)
def test_mistakes_in_compare(arguments, says, tmp_path, capsys):
    """One line each."""
    assert main(["compare", *arguments, f"--out={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
