"""The command `scoresde`, one room per command. Everything heavy is imported by the command that needs it."""

from scoresde.cli.entry import main, parser

__all__ = ["main", "parser"]
