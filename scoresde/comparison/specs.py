"""Which solvers are compared: read from text, or given as objects; and which runs each of them makes."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

from sde_lib import Chain, build, lookup
from sde_lib._checks import section_key
from solvers import COORDINATES, CORRECTORS, GRIDS, SOLVERS, Grid, Solver
from solvers.grids import GridLike
from solvers.words import describe, describe_grid

_NESTED: Mapping[str, Mapping[str, Any]] = {
    "predictor": SOLVERS,
    "corrector": CORRECTORS,
    "coordinate": COORDINATES,
}
"""Option -> table, for options that are objects themselves: ``corrector=langevin(snr=0.1)``."""


class Entry(NamedTuple):
    """One line of a comparison.

    Attributes:
        label: what it is called in tables and legends.
        solver: the solver.
        grid: its grid, or None for the comparison's own.
        as_given: whether the tolerances of an adaptive solver were chosen for it, so that it runs at these alone.
    """

    label: str
    solver: Solver
    grid: GridLike
    as_given: bool


class Budget(NamedTuple):
    """One run of an entry.

    Attributes:
        name: ``nfe=20``, ``rtol=0.001`` or ``as given``.
        solver: the solver at that budget.
        nfe: calls per sample, or None where the solver or the grid decides.
    """

    name: str
    solver: Solver
    nfe: int | None


# --- text -------------------------------------------------------------------------------------------------------------
def split_specs(text: str) -> list[str]:
    """``"heun, ddim(eta=0.5)@karras(rho=5)"`` at its outer commas.

    Raises:
        ValueError: for brackets or quotes that do not close, and empty parts.
    """
    parts, depth, quote, current = [], 0, "", ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(current)
            current = ""
            continue
        current += letter
    parts.append(current)
    if depth != 0 or quote:
        raise ValueError(f"Brackets or quotes do not close in the solvers {text!r}.")
    parts = [part.strip() for part in parts]
    if not all(parts):
        raise ValueError(f"Solvers are separated by single commas, got {text!r}.")
    return parts


def parse_spec(text: str) -> Entry:
    """An entry from ``name``, ``name(option=value, …)`` or either with ``@grid`` or ``@grid(option=value)``.

    A solver or grid of one's own, which has to be imported, is ``module:Class`` or ``module:Class(option=value)``.
    Values are Python literals (never evaluated as code); a bare word stands for itself, ``inf`` is the number, and
    ``corrector=langevin(snr=0.1)`` builds the option from its own table. "recommended" is what `recommend` says for
    each budget, with the recommended grid (on a chain: its levels) whatever the grid of the other solvers.

    Raises:
        ValueError: for text of another form, unknown names and options (with the nearest known one), and options that
            the constructor refuses.
    """
    head, at, tail = text.partition("@")
    solver, options = _object(head.strip(), SOLVERS, "solver")
    grid = _object(tail.strip(), GRIDS, "grid")[0] if at else None
    return Entry("".join(text.split()), solver, grid, bool({"rtol", "atol"} & set(options)))


def parse_grid(text: str) -> Grid:
    """A grid from ``name`` or ``name(option=value, …)``."""
    return _object(text.strip(), GRIDS, "grid")[0]


def _object(text: str, table: Mapping[str, Any], what: str) -> tuple[Any, dict[str, Any]]:
    """What a call names in a table, and its options; "module:Class(option=value)" is a class of one's own."""
    named, bracket, _ = text.partition("(")
    module = named.rpartition(":")[0]
    call = text.removeprefix(f"{module}:") if module else text
    try:
        node: ast.AST = ast.parse(call, mode="eval").body
    except SyntaxError:
        node = ast.Pass()
    if not isinstance(node, ast.Name | ast.Call):
        if not bracket:
            lookup(table, text, what)  # an error that lists the names
        raise ValueError(f"Cannot read the {what} {text!r}: write name or name(option=value, …).")
    return _from_node(node, table, what, f"{module}:" if module else "")


def _from_node(
    node: ast.Name | ast.Call, table: Mapping[str, Any], what: str, module: str = ""
) -> tuple[Any, dict[str, Any]]:
    if isinstance(node, ast.Name):
        return build(table, {"name": module + node.id}, what), {}
    if not isinstance(node.func, ast.Name):
        raise ValueError(f"Cannot read the {what} {ast.unparse(node)!r}: write name or name(option=value, …).")
    name, options = module + node.func.id, {}
    lookup(table, name, what)
    if node.args:
        first = ast.unparse(node.args[0])
        raise ValueError(f"Options of {what} {name!r} need their names, as in {name}(option=value); got {first!r}.")
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError(f"Options of {what} {name!r} are written out: name(option=value, …).")
        options[keyword.arg] = _value(keyword.arg, keyword.value)
    try:
        return build(table, {"name": name, section_key(name): options}, what), options
    except TypeError as error:  # a value of the wrong type, found by the constructor
        raise ValueError(f"{what} {name!r}: {error}") from error


def _value(option: str, node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return float(node.id) if node.id in ("inf", "nan") else node.id
    if isinstance(node, ast.Call) and option in _NESTED:
        return _from_node(node, _NESTED[option], option)[0]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"`{option}` must be a literal value, got {ast.unparse(node)!r}.") from None


# --- what is given ----------------------------------------------------------------------------------------------------
def entries_of(solvers: Any) -> list[Entry]:
    """Entries from text, or from a sequence or mapping of texts, solvers and (label, solver, grid).

    Raises:
        TypeError: for anything else.
        ValueError: for text that cannot be read, no solver at all, or one label used twice.
    """
    if isinstance(solvers, str):
        found = [parse_spec(part) for part in split_specs(solvers)]
    elif isinstance(solvers, Solver):
        found = [_entry(solvers)]
    elif isinstance(solvers, Mapping):
        found = [_entry(value, str(label)) for label, value in solvers.items()]
    elif isinstance(solvers, Sequence):
        found = [_entry(item) for item in solvers]
    else:
        raise TypeError(f"`solvers` must be text, solvers in a sequence, or a mapping, got {type(solvers).__name__}.")
    if not found:
        raise ValueError("`solvers` is empty.")
    labels = [entry.label for entry in found]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ValueError(f"Two of the solvers are called {twice!r}: give labels, as in (label, solver, grid).")
    return found


def _entry(item: Any, label: str | None = None) -> Entry:
    grid: GridLike = None
    if isinstance(item, tuple) and label is None and len(item) in (2, 3) and isinstance(item[0], str):
        label, item, *rest = item
        grid = rest[0] if rest else None
    elif isinstance(item, tuple) and label is not None and len(item) == 2:
        item, grid = item
    if isinstance(item, str):
        parsed = parse_spec(item)
        if grid is not None and parsed.grid is not None:
            raise ValueError(f"{item!r} already names a grid; got {grid!r} too.")
        entry = parsed._replace(grid=parsed.grid if grid is None else grid)
    elif isinstance(item, Solver):
        text = describe(item) if grid is None else f"{describe(item)}@{describe_grid(grid)}"
        entry = Entry(text, item, grid, _tolerance(item) != _default_tolerance(item))
    else:
        raise TypeError(
            f"A solver must be text, a Solver instance such as DDIM(), or (label, solver, grid), got {item!r}."
        )
    if isinstance(entry.grid, str):
        lookup(GRIDS, entry.grid, "grid")
    return entry if label is None else entry._replace(label=label)


# --- budgets ----------------------------------------------------------------------------------------------------------
def budgets_of(entry: Entry, grid: GridLike, nfe: Sequence[int], rtol: Sequence[float]) -> list[Budget]:
    """The runs of an entry: at every `nfe` for one that takes steps, at every `rtol` for one that chooses them."""
    solver = entry.solver
    if not solver.needs_steps:
        if entry.as_given or _default_tolerance(solver) is None or not rtol:
            own = _tolerance(solver)
            return [Budget("as given" if own is None else f"rtol={own:g}", solver, None)]
        both = ("rtol", "atol") if hasattr(solver, "atol") else ("rtol",)
        changed: list[Any] = [replace(solver, **dict.fromkeys(both, r)) for r in rtol]
        return [Budget(f"rtol={r:g}", s, None) for r, s in zip(rtol, changed, strict=True)]
    if grid is not None and not isinstance(grid, str | Grid | Chain):
        return [Budget("as given", solver, None)]
    return [Budget(f"nfe={calls}", solver, calls) for calls in nfe]


def _tolerance(solver: Solver) -> float | None:
    value = getattr(solver, "rtol", None)
    return value if isinstance(value, float | int) and math.isfinite(value) else None


def _default_tolerance(solver: Solver) -> Any:
    return next((f.default for f in fields(solver) if f.name == "rtol"), None)
