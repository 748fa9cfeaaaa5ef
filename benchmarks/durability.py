"""What survives: processes killed at random moments, files of which a bit flips, two writers in one place.

    python benchmarks/durability.py [--quick] [--seed=0]

Prints one line per count. Children are forked, so that a kill costs a moment and not the import of torch; under two
minutes of CPU time. It uses only what every version of the library has, so that versions can be compared:
PYTHONPATH=<another checkout> python benchmarks/durability.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  (imported before the forks)
import torch

import scoresde
from scoresde import bits_per_dim, config, load_model, save_model
from scoresde.cli import main as command
from scoresde.training import train

try:  # where they were before scoresde.storage
    from scoresde.training import latest, read_checkpoint  # type: ignore[attr-defined]
except ImportError:
    from scoresde.storage import latest, read_checkpoint

STEPS = 200
TINY = {
    "data.name": "ring", "data.ring.n": 600, "network.name": "mlp", "network.mlp.width": 8, "network.mlp.depth": 1,
    "training.batch_size": 16, "training.steps": STEPS, "training.warmup": 4, "training.log_every": 1,
    "training.eval_every": 0, "training.sample_every": 0, "training.checkpoint_every": 5,
    "training.tensorboard": False, "training.cpu": True,
}  # fmt: skip
OVERRIDES = [f"--config.{name}={value}" for name, value in TINY.items()]


def child(run: Callable[[], Any]) -> int:
    """Fork; the child runs and exits with the code of its end (3 after an exception, 4 after an orderly refusal)."""
    pid = os.fork()
    if pid:
        return pid
    code = 3
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            result = run()
        code = result if isinstance(result, int) else 0
    except SystemExit as error:
        code = int(error.code or 0)
    except OSError as error:
        code = 4 if type(error).__name__ == "LockedError" else 3
    except BaseException:
        code = 3
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """Exit code of a child, -n if it died of signal n."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def training(workdir: Path) -> Callable[[], Any]:
    return lambda: train(config.override(config.defaults(), OVERRIDES), workdir, progress=False)


def weights(workdir: Path) -> dict[str, dict[str, torch.Tensor]] | None:
    newest = latest(workdir / "checkpoints")
    return None if newest is None else read_checkpoint(newest).tensors


def same(a: Any, b: Any) -> bool:
    return a is not None and b is not None and all(
        torch.equal(value, b[file][name]) for file, tensors in a.items() for name, value in tensors.items()
    )


def logged(workdir: Path) -> Counter[int]:
    """How often every step stands in metrics.jsonl."""
    path, steps = workdir / "metrics.jsonl", Counter[int]()
    for line in path.read_text().split("\n")[:-1] if path.exists() else []:
        with contextlib.suppress(ValueError):  # lines of two writers in each other
            steps[json.loads(line)["step"]] += 1
    return steps


def killed_training(
    place: Path, whole: Path, seconds: float, runs: int, kills: int, chance: random.Random
) -> dict[str, Any]:
    """Runs of so many seconds that are killed a few times each and then left to finish."""
    counts: Counter[str] = Counter()
    for i in range(runs):
        workdir = place / f"killed{i}"
        for _ in range(kills):
            pid = child(training(workdir))
            time.sleep(chance.uniform(0.0, seconds / 2))
            os.kill(pid, signal.SIGKILL)
            counts["kills in time"] += ended(pid) == -signal.SIGKILL
        counts["could not go on"] += ended(child(training(workdir))) != 0
        counts["other weights at the end"] += not same(weights(workdir), weights(whole))
        steps = logged(workdir)
        counts["metrics lost"] += sum(step not in steps for step in range(1, STEPS + 1))
        counts["metrics doubled"] += sum(n > 1 for n in steps.values())
        left = [p.name for p in (workdir / "checkpoints").iterdir() if not p.name.startswith("step_")]
        counts["debris"] += len(left)
    return dict(counts)


def rows_of(path: Path) -> list[int]:
    """Indices in the complete lines of a file of scores."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [int(line.split(",")[0]) for line in lines[2:] if line.count(",") == lines[1].count(",")]


def killed_scoring(place: Path, model: Any, n: int, kills: int, chance: random.Random) -> dict[str, Any]:
    """A file of n rows, of which most are there, is opened and gone on with, and the process killed: every other time
    at a random moment, else as soon as the file gets shorter, which is when rows can be lost."""
    data = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    path, options = place / "scores.csv", {"steps": 4, "divergence": "hutchinson", "batch_size": 4, "progress": False}

    def score() -> None:
        bits_per_dim(model, data, path=path, **options)

    first = child(score)  # its first rows, for the heading
    while len(rows_of(path)) < 4:
        time.sleep(0.01)
    os.kill(first, signal.SIGKILL)
    ended(first)
    head, columns, row = path.read_text().split("\n")[:3]
    filled = n - 2000  # as if it had been scored for hours
    lines = [head, columns, *(f"{i},{row.split(',', 1)[1]}" for i in range(filled))]
    path.write_text("".join(f"{line}\n" for line in lines))
    counts: Counter[str] = Counter()
    before = set(rows_of(path))
    for i in range(kills):
        size = path.stat().st_size
        pid, until = child(score), time.perf_counter() + chance.uniform(0.0, 0.5)
        while time.perf_counter() < until and (i % 2 or path.stat().st_size >= size):
            pass
        os.kill(pid, signal.SIGKILL)
        counts["kills in time"] += ended(pid) == -signal.SIGKILL
        now = set(rows_of(path))
        counts["rows lost"] += len(before - now)
        before = now
    counts["could not go on"] += ended(child(score)) != 0
    rows = Counter(rows_of(path))
    counts["rows missing at the end"] = sum(i not in rows for i in range(n))
    counts["rows doubled"] = sum(count > 1 for count in rows.values())
    return dict(counts)


def flips(place: Path, whole: Path, each: int, chance: random.Random) -> dict[str, dict[str, int]]:
    """One bit of a file, then it is used as it always is."""
    source = latest(whole / "checkpoints")
    assert source is not None
    single = place / "single.safetensors"
    save_model(load_model(source), single)
    folder = place / "flipped"
    shutil.copytree(source, folder)
    uses: dict[Path, Callable[[], Any]] = {
        single: lambda: load_model(single),
        folder / "average.ema.safetensors": lambda: load_model(folder),
        folder / "part.model.safetensors": lambda: load_model(folder, ema=False),
        folder / "optimizer.train.safetensors": lambda: read_checkpoint(folder),
        folder / "state.json": lambda: read_checkpoint(folder),
    }
    found = {}
    for file, use in uses.items():
        good = file.read_bytes()
        counts: Counter[str] = Counter(flips=each)
        for _ in range(each):
            i = chance.randrange(len(good))
            file.write_bytes(good[:i] + bytes([good[i] ^ (1 << chance.randrange(8))]) + good[i + 1 :])
            try:
                use()
                counts["accepted"] += 1
            except ValueError as error:
                counts["refused in a line" if "\n" not in str(error) else "refused"] += 1
            except Exception:
                counts["other exceptions"] += 1
        file.write_bytes(good)
        use()
        found[file.name if file is not single else "a model alone"] = dict(counts)
    return found


def two_writers(place: Path, whole: Path, pairs: int) -> dict[str, Any]:
    """Two runs started in one workdir at the same time."""
    counts: Counter[str] = Counter()
    for i in range(pairs):
        workdir = place / f"shared{i}"
        codes = sorted(ended(pid) for pid in [child(training(workdir)), child(training(workdir))])
        counts["one finished, one refused"] += codes == [0, 4]
        counts["runs that crashed"] += codes.count(3)
        counts["results that differ"] += not same(weights(workdir), weights(whole))
        counts["metrics doubled"] += sum(n > 1 for n in logged(workdir).values())
    return dict(counts)


def two_scorers(place: Path, model: Any, pairs: int) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    data = torch.randn(200, 2, generator=torch.Generator().manual_seed(1))
    for i in range(pairs):
        path = place / f"scores{i}.csv"

        def score(path: Path = path) -> None:
            bits_per_dim(model, data, path=path, steps=4, batch_size=4, progress=False)

        codes = sorted(ended(pid) for pid in [child(score), child(score)])
        counts["one finished, one refused"] += codes == [0, 4]
        counts["rows doubled"] += sum(n > 1 for n in Counter(rows_of(path)).values())
    return dict(counts)


def signals(place: Path, chance: random.Random) -> dict[str, Any]:
    """`scoresde train` is asked to end: its exit code, and the steps that were done and not saved."""
    found = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        workdir = place / name
        words = [w for w in OVERRIDES if "checkpoint_every" not in w and "steps" not in w]
        words += ["--config.training.checkpoint_every=0", "--config.training.steps=100000"]
        words = ["train", "--config=toy_ring", f"--workdir={workdir}", *words]
        pid = child(lambda words=words: command(words))
        while not logged(workdir):
            time.sleep(0.02)
        time.sleep(chance.uniform(0.1, 0.4))
        os.kill(pid, getattr(signal, name))
        code, newest = ended(pid), latest(workdir / "checkpoints")
        saved = 0 if newest is None else int(newest.name[5:])
        found[name] = {"exit code": code, "steps lost": max(logged(workdir)) - saved}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a fifth of the counts")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chance, part = random.Random(arguments.seed), 5 if arguments.quick else 1
    print(f"scoresde at {Path(scoresde.__file__).parent}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        whole = place / "whole"
        started = time.perf_counter()
        assert ended(child(training(whole))) == 0
        seconds = time.perf_counter() - started
        model = load_model(whole)

        def show(what: str, counts: dict[str, Any]) -> None:
            print(json.dumps({"what": what, **counts}), flush=True)

        show("training, killed", killed_training(place, whole, seconds, 10 // part, 5, chance))
        show("scoring, killed", killed_scoring(place, model, 20_000, 30 // part, chance))
        for file, counts in flips(place, whole, 100 // part, chance).items():
            show(f"flips of {file}", counts)
        show("two runs in a workdir", two_writers(place, whole, 5 // part))
        show("two scorings into a file", two_scorers(place, model, 5 // part))
        for sign, counts in signals(place, chance).items():
            show(sign, counts)


if __name__ == "__main__":
    main()
