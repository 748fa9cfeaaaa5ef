"""A digest inside the file that it is of: whatever byte changes later, the file is refused.

The file says ``"digest": "<64 hexadecimal digits>"`` near its beginning: the SHA-256 of all its bytes, those 64 digits
counted as zeros.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

KEY = "digest"
BLANK = "0" * 64
"""What stands in place of the digits until they are known."""

_PLACE = re.compile(rb'"digest": ?"([0-9a-f]{64})"')
_CHUNK = 2**22


def place(head: bytes) -> tuple[int, str] | None:
    """Where the digits stand in the beginning of a file, and what they are; None if there are none."""
    found = _PLACE.search(head)
    return None if found is None else (found.start(1), found[1].decode())


def blanked(head: bytes, start: int) -> bytes:
    """The beginning of a file with zeros in place of the digits."""
    return head[:start] + BLANK.encode() + head[start + len(BLANK) :]


def sealed(text: str) -> str:
    """A text that holds `BLANK` as its digest, with the true one."""
    return text.replace(BLANK, hashlib.sha256(text.encode()).hexdigest(), 1)


def intact(path: Path, head: int | None = None) -> bool | None:
    """Whether a file is what was written, or None if it says no digest.

    Args:
        path: the file.
        head: number of bytes in which the digits are looked for; all if None.
    """
    with path.open("rb") as file:
        beginning = file.read() if head is None else file.read(head)
        found = place(beginning)
        if found is None:
            return None
        digest = hashlib.sha256(blanked(beginning, found[0]))
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == found[1]
