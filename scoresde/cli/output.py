"""What commands leave in a folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path


def drawn(pictures: Mapping[str, Callable[[Path], object]], out: Path) -> list[str]:
    """Names of the pictures that could be drawn into a folder; the others cost a line each, not the figures."""
    written = []
    for name, draw in pictures.items():
        try:
            draw(out / name)
            written.append(name)
        except Exception as error:
            print(f"no {name}: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
    return written
