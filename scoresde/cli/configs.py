"""``scoresde configs``."""

from __future__ import annotations

import argparse

HELP = "List the shipped configurations."


def arguments(p: argparse.ArgumentParser) -> None:
    """What the command takes: nothing."""


def run(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Print a line for every configuration."""
    import ast

    from scoresde import config

    if overrides:
        raise ValueError(f"Unknown argument {overrides[0]!r}.")
    names = config.known()
    for name in names:
        text = ast.get_docstring(ast.parse(config.find(name).read_text(encoding="utf-8"))) or ""
        print(f"{name:<{max(map(len, names))}}  {text.splitlines()[0] if text else ''}".rstrip())
