"""Write notebooks from their .py sources, executed, with their outputs: ``make notebooks``, or those that are named."""

import os
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Execute and store."""
    os.environ.pop("MPLBACKEND", None)  # pictures go into the notebook, whatever is set for scripts
    for source in [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("[0-9]*.py")):
        notebook = jupytext.read(source)
        NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False).execute(cwd=str(HERE))
        for cell in notebook.cells:  # progress bars and library chatter, which name this machine's folders
            if cell.cell_type == "code":
                cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        nbformat.write(notebook, source.with_suffix(".ipynb"))
        print(source.with_suffix(".ipynb"))


if __name__ == "__main__":
    main()
