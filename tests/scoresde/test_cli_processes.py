"""Commands under torchrun: the work is divided, every row done once, the first process writes and speaks."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from together import in_processes

from scoresde.cli import main
from scoresde.storage.processes import process
from scoresde.training.metrics import read_metrics

TINY = ["data.digits.held_out=0.05", "network.name=mlp", "network.mlp.width=8", "network.mlp.depth=1"]
TINY += ["training.batch_size=16", "training.steps=2", "training.tensorboard=False", "training.cpu=True"]
TINY += ["training.sample_every=0", "likelihood.steps=8", "likelihood.batch_size=2", "sampling.steps=3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    assert main(["train", "--config=digits_vp", f"--workdir={workdir}", *(f"--config.{word}" for word in TINY)]) == 0
    return workdir


def command(words: list[str], spoilt: str = "") -> tuple[int, str, str]:
    """Exit code and what was printed; `spoilt`: a file that the second process does not find."""
    out, err = io.StringIO(), io.StringIO()
    if process()[0] == 1 and spoilt:
        words = [word.replace(spoilt, "/nowhere") for word in words]
    with redirect_stdout(out), redirect_stderr(err):
        code = main(words)
    return code, out.getvalue(), err.getvalue()


def test_samples_are_those_of_one_process(trained, tmp_path):
    """Bitwise the same file, where the batches are the same; conditions are divided, too."""
    words = ["sample", f"--workdir={trained}", "--device=cpu", "--n=7", "--config.sampling.batch_size=2"]
    words += ["--solver=euler_maruyama"]
    one, two = in_processes(2, command, [*words, f"--out={tmp_path / 'two.npy'}"])
    assert one[0] == two[0] == 0 and one[1].startswith("7 samples by euler_maruyama, 4 network calls") and two[1] == ""
    assert main([*words, f"--out={tmp_path / 'one.npy'}"]) == 0
    assert (tmp_path / "one.npy").read_bytes() == (tmp_path / "two.npy").read_bytes()
    assert np.load(tmp_path / "one.npy").shape == (7, 1, 8, 8)


@pytest.mark.parametrize("workdir", ["", "second"], ids=["both", "one"])
def test_a_mistake_ends_all_processes_with_one_line(trained, workdir):
    """Whether all make it or the second one only (on its machine there is no such folder)."""
    words = ["sample", f"--workdir={trained}", "--device=cpu", *(["--n=0"] if not workdir else [])]
    one, two = in_processes(2, command, words, str(trained) if workdir else "")
    assert one[0] == two[0] == 2 and one[1] == two[1] == ""
    assert one[2].startswith("scoresde sample: error:") and one[2].count("\n") == 1
    assert ("/nowhere" in one[2]) == bool(workdir) and two[2] == ""


@pytest.mark.slow
def test_likelihoods_are_those_of_one_process(trained, tmp_path):
    """Every row is written once, and the summaries are the same, to the rounding of batches of another size."""
    words = ["likelihood", f"--workdir={trained}", "--device=cpu", "--n=7", "--elbo"]
    one, two = in_processes(2, command, [*words, f"--out={tmp_path / 'two'}"])
    assert one[0] == two[0] == 0 and one[1].count("7 held-out samples") == 2 and two[1] == ""
    assert main([*words, f"--out={tmp_path / 'one'}"]) == 0
    files = [(tmp_path / n / "likelihood.csv").read_text().splitlines() for n in ("two", "one")]
    assert [line.split(",")[0] for line in files[0]][2:] == list("0123456") and files[0][:2] == files[1][:2]
    both, alone = (json.loads((tmp_path / n / "likelihood.json").read_text()) for n in ("two", "one"))
    assert both["mean"] == pytest.approx(alone["mean"], rel=1e-5)
    assert both["elbo"] == alone["elbo"]  # its batches are the same
    assert not list((tmp_path / "two").glob("*rank*"))


@pytest.mark.slow
def test_a_comparison_is_that_of_one_process(tmp_path):
    """The table but for its times, on a toy; the first process writes."""
    words = ["compare", "--config=toy_ring", "--solvers=heun,ddim(eta=1)", "--nfe=4,8", "--n=9", "--batch-size=2"]
    words += ["--repetitions=2"]
    one, two = in_processes(2, command, [*words, f"--out={tmp_path / 'two'}"])
    assert one[0] == two[0] == 0 and "heun" in one[1] and two[1] == ""
    assert main([*words, f"--out={tmp_path / 'one'}"]) == 0
    tables = []
    for name in ("one", "two"):
        with (tmp_path / name / "compare.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        tables.append([{k: v for k, v in row.items() if "seconds" not in k and k != "machine"} for row in rows])
    assert tables[0] == tables[1] and len(tables[0]) == 4


@pytest.mark.slow
def test_torchrun(trained, tmp_path):
    """As it is written in `scoresde --help`: options after `--` are the command's own. Training is one run of both
    processes, on whatever device there is: its losses are those of one process."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "--"]
    words = ["scoresde", "sample", f"--workdir={trained}", "--device=cpu", "--n=6", f"--out={tmp_path / 'a.npz'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([*torchrun, *words], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.count("6 samples") == 1
    with np.load(tmp_path / "a.npz") as file:
        assert file["data"].shape == (6, 1, 8, 8)
    words = ["train", "--config=toy_ring", "--config.training.steps=3", "--config.training.log_every=1"]
    together = ["scoresde", *words, f"--workdir={tmp_path / 'two'}"]
    done = subprocess.run([*torchrun, *together], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.count("3 steps") == 1
    assert main([*words, f"--workdir={tmp_path / 'one'}"]) == 0
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    losses = [record["loss"] for record in one]
    assert [record["loss"] for record in two] == pytest.approx(losses, rel=1e-5) and len(losses) == 3
