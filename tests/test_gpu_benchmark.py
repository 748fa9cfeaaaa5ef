"""`benchmarks/gpu.py` is right before it meets a GPU: its rehearsal runs, and its gates can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# what a GPU machine may lack
BLOCKED = """
import sys
MISSING = ("torchsde", "torchdiffeq", "ml_collections", "safetensors", "accelerate", "matplotlib")
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
"""


def run(tmp_path: Path, *arguments: str, before: str = BLOCKED) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    (tmp_path / "sitecustomize.py").write_text(before)
    out = tmp_path / "rows.jsonl"
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device=cpu", f"--out={out}", *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    return done, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


@pytest.mark.slow
def test_the_rehearsal_passes_its_gates(tmp_path):
    sections = ("environment", "noise", "solvers", "graphs", "training", "overhead", "sampling")
    done, rows = run(tmp_path, f"--sections={','.join(sections)}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["section"] for row in rows if row["kind"] == "done"] == list(sections)
    gates = [row for row in rows if row["kind"] == "gate"]
    assert len(gates) > 70 and all(row["ok"] and row["error"] <= row["bound"] for row in gates)
    assert {row["unit"] for row in rows if row["kind"] == "figure"} >= {"TFLOP/s", "GB/s", "images/s", "us per step"}
    assert all(row["value"] > 0 for row in rows if row["kind"] == "figure")
    skipped = {row["name"] for row in rows if row["kind"] == "skipped"}
    assert skipped == {"capture", "fused Adam, GradScaler", "torchdiffeq", "torchsde"}
    assert f"{len(gates)} of {len(gates)} gates passed" in done.stdout


@pytest.mark.slow
def test_a_failed_gate_and_a_dead_process_are_reported(tmp_path):
    """The other sections still run, and the exit status says it."""
    spoilt = BLOCKED + (
        "import atexit, os, torch\n"
        "kept = torch.randn\n"
        "def randn(*a, **k):\n"
        "    import gpu_rows, inspect\n"
        "    if any(f.function == 'training' for f in inspect.stack()): os._exit(7)\n"
        "    return kept(*a, **k)\n"
        "if '--child' in sys.argv: torch.randn = randn\n"
    )
    done, rows = run(tmp_path, "--sections=training,noise", before=spoilt)
    assert done.returncode == 1
    failed = [row for row in rows if row["kind"] == "gate" and not row["ok"]]
    assert [row["section"] for row in failed] == ["training"] and "status 7" in failed[0]["error"]
    assert [row["section"] for row in rows if row["kind"] == "done"] == ["noise"]
    assert "FAILED: training" in done.stdout


@pytest.mark.slow
def test_nan_passes_no_gate(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import torch
    from gpu_rows import Run

    rows = tmp_path / "rows.jsonl"
    Run(torch.device("cpu"), True, rows, 0.0, "s").gate("g", float("nan"), 1.0)
    assert json.loads(rows.read_text()) == {
        "section": "s", "name": "g", "kind": "gate", "ok": False, "error": "nan", "bound": 1.0,
    }  # fmt: skip
