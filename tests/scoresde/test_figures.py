"""What pictures share: lines that can be told apart, times in order, ticks, panels, and every picture function."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import matplotlib as mpl
import matplotlib.style
import pytest
import torch
from matplotlib.figure import Figure

from scoresde import DataSpec, demo
from scoresde.comparison.pictures import increasing
from scoresde.figures import COLOURS, LINES, STYLE, image_rows, panels, plain_ticks, point_panels, samples_picture
from scoresde.likelihood.bits import BitsPerDim
from scoresde.likelihood.pictures import Convergence, budget, histogram

SPEC = DataSpec((1, 8, 8), 17)
IMAGES = torch.arange(5 * 64).reshape(5, 1, 8, 8) % 17


def test_twenty_lines_can_be_told_apart_in_grey():
    """Marker and dashes are another pair for each; where markers repeat, colours differ too."""
    assert len(LINES) == 20 and len({(line["marker"], str(line["linestyle"])) for line in LINES}) == 20
    for marker in {line["marker"] for line in LINES}:
        colours = [line["color"] for line in LINES if line["marker"] == marker]
        assert len(set(colours)) == len(colours)


def test_lines_and_style_file_have_the_same_colours():
    """One file for library and notebooks, found by the package's name."""
    with mpl.style.context("scoresde.scoresde"):
        cycle = [f"#{entry['color'].lstrip('#')}" for entry in mpl.rcParams["axes.prop_cycle"]]
    assert tuple(cycle) == COLOURS and STYLE.is_file()


def test_times_are_put_in_order_by_isotonic_regression():
    """Pools of neighbours get their geometric mean; what is in order stays. Against all monotone fits on a grid."""
    assert increasing([1.0, 2.0, 8.0]) == pytest.approx([1.0, 2.0, 8.0])
    assert increasing([4.0, 1.0, 8.0]) == pytest.approx([2.0, 2.0, 8.0])
    assert increasing([1.0, 8.0, 4.0, 2.0]) == pytest.approx([1.0, 4.0, 4.0, 4.0])
    given = torch.tensor([3.0, 1.0, 2.0, 0.5])
    levels = torch.linspace(0.25, 4.0, 41).log()
    fits = torch.cartesian_prod(*[levels] * 4)
    fits = fits[(fits.diff(dim=1) >= 0).all(1)]
    least = float((fits - given.log()).square().sum(1).min())
    found = torch.tensor(increasing(given.tolist())).log()
    assert float((found - given.log()).square().sum()) <= least and bool((found.diff() >= 0).all())


@pytest.mark.parametrize(("low", "high", "shown"), [(3, 70, "20"), (0.02, 0.3, "0.05"), (1e-7, 1.0, "$")])
def test_ticks_are_plain_numbers_where_they_span_few_decades(low, high, shown):
    axis = Figure().subplots()
    axis.set(xscale="log", xlim=(low, high))
    plain_ticks(axis.xaxis)
    axis.figure.draw_without_rendering()
    ticks = [label.get_text() for label in axis.get_xticklabels()]
    assert any(shown in tick for tick in ticks) and ("$" in "".join(ticks)) == (shown == "$")


def bits() -> BitsPerDim:
    """Made-up figures: pictures look at the fields only."""
    n = 12
    given = {
        name: torch.linspace(1e-4, 1e-2, n) if "Tensor" in str(field.annotation) else "made up"
        for name, field in inspect.signature(BitsPerDim).parameters.items()
    }
    numbers = {"mean": 3.0, "standard_error": 0.01, "settled": 1.0}
    return BitsPerDim(**given | {name: v for name, v in numbers.items() if name in given})


PICTURES = {
    "histogram": (lambda **o: histogram(bits(), **o), 2),
    "budget": (lambda **o: budget(bits(), **o), 1),
    "convergence": (Convergence([4, 8, 16], [0.1, 0.02, 0.0], [0.2, 0.05, 0.01], [2, 4], [0.5, 0.3], 64).plot, 2),
    "exact trace": (Convergence([4, 8, 16], [0.1, 0.02, 0.0], [0.2, 0.05, 0.01], [2, 4], [0.0, 0.0], 64).plot, 2),
    "image rows": (lambda **o: image_rows({"one": IMAGES, "two": IMAGES[:2]}, 0.0, 16.0, "what", **o), 1),
    "points": (lambda **o: point_panels({"a": torch.randn(50, 2), "b": torch.randn(50, 2)}, **o), 2),
    "samples, images": (lambda **o: samples_picture(IMAGES, SPEC, **o), 1),
    "samples, points": (lambda **o: samples_picture(torch.randn(50, 2), DataSpec((2,)), **o), 1),
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_returns_its_figure_and_takes_axes(name, tmp_path):
    """A new figure in the house's style, written to a file; or the caller's Axes. Labelled, without a title."""
    draw, count = PICTURES[name]
    figure = draw(path=tmp_path / "new" / "a.png")
    assert isinstance(figure, Figure) and (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    own = Figure()
    axes = own.subplots(1, count)
    assert draw(ax=axes) is own and len(own.axes) == count
    for drawn in (figure, own):
        assert not drawn.get_suptitle() and not any(axis.get_title() for axis in drawn.axes)
    if name not in ("samples, images", "points"):  # images have no axes; panels of points have the outer ones only
        assert all(axis.get_xlabel() or axis.get_ylabel() for axis in own.axes)
    with pytest.raises(ValueError, match=f"got {count + 1}"):
        draw(ax=Figure().subplots(1, count + 1))


def test_a_diverging_entry_does_not_shrink_the_others():
    near = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    figure = point_panels({"a": near, "far off": 100 * near, "b": near})
    assert all(axis.get_xlim()[1] < 6 for axis in figure.axes)


def test_labels_of_image_rows():
    """One label per row at its middle; the shorter row ends in white."""
    figure = image_rows([("one", IMAGES), ("", IMAGES[:2])], 0.0, 16.0, "solver")
    (axis,) = figure.axes
    assert [t.get_text() for t in axis.get_yticklabels()] == ["one", ""] and axis.get_ylabel() == "solver"
    sheet = axis.images[0].get_array()
    assert sheet.shape == (17, 44) and bool((sheet[9:, 18:] == 255).all()) and int(sheet[0, 0]) == 0


def test_the_demos_training_curve(tmp_path):
    """Against steps, in plain numbers."""
    records = [{"step": i, "loss": 0.3 / i, **({"held_out_loss": 0.2} if i % 2 else {})} for i in range(1, 9)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, records)))
    (axis,) = demo._curve(tmp_path / "m.jsonl").axes
    assert axis.get_xlabel() == "optimizer step" and len(axis.lines) == 2


def test_panels_leave_the_callers_style_alone(tmp_path):
    before = dict(mpl.rcParams)
    with panels() as (figure, axes):
        axes[0].plot([0, 1])
    assert dict(mpl.rcParams) == before and isinstance(figure, Figure)
    assert not list(Path(tmp_path).iterdir())
