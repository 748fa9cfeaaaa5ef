"""Notebooks: stored with outputs, in step with their source, and true when executed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.py"))


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_stored_notebook_is_its_source_with_outputs(source):
    import jupytext
    import nbformat

    stored = nbformat.read(source.with_suffix(".ipynb"), 4)
    written = jupytext.read(source)
    assert [c.source for c in stored.cells] == [c.source for c in written.cells]
    printed = [c for c in stored.cells if c.cell_type == "code" and c.outputs]
    assert printed, "stored without outputs: run `make notebooks`"
    assert any("image/png" in o.get("data", {}) for c in printed for o in c.outputs), "stored without pictures"
    assert not any(o.output_type == "error" for c in printed for o in c.outputs)


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_notebook_holds_what_it_claims(source, tmp_path):
    """Run as a script: every cell, every assertion, in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(source)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "PATH": "", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
