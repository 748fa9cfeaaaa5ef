"""Options and fixtures of the whole suite: ``--golden=DIR`` and ``--device``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # small tensors: a second thread costs more than it brings, and sums stay in one order


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("scoresde")
    group.addoption(
        "--golden",
        metavar="DIR",
        default=None,
        help="directory with the recorded outputs of the reference implementations; tests of them skip without it",
    )
    group.addoption("--device", default="cpu", help="device of the tests that take one (default: cpu)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords hold the names of folders too
            item.add_marker(skip)


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Path:
    """The directory given by ``--golden``; the test is skipped without one."""
    option = request.config.getoption("--golden")
    if option is None:
        pytest.skip("golden numbers of the reference implementations: give their directory with --golden=DIR")
    path = Path(option)
    if not path.is_dir():
        pytest.skip(f"--golden {option}: no such directory")
    return path


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device given by ``--device``."""
    return torch.device(request.config.getoption("--device"))
