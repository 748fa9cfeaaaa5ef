"""TF32 as asked while something runs, and afterwards as it was: over threads, and with either set of torch's switches.

The switches exist without a GPU; only `device` says that there is one.
"""

import threading
import time

import pytest
import torch

from scoresde.likelihood.precision import allow_tf32

GPU = torch.device("cuda")
CUDNN, MATMUL = torch.backends.cudnn, torch.backends.cuda.matmul


def state():
    places = (MATMUL, torch.backends.mkldnn.matmul, CUDNN.conv, CUDNN.rnn)
    return [p.fp32_precision for p in places]


@pytest.fixture(autouse=True)
def _as_it_was():
    before = state()
    yield
    torch.set_float32_matmul_precision("highest")
    CUDNN.allow_tf32 = True
    for place, value in zip((MATMUL, torch.backends.mkldnn.matmul, CUDNN.conv, CUDNN.rnn), before, strict=True):
        place.fp32_precision = value


def seen():
    return CUDNN.conv.fp32_precision == "tf32", MATMUL.fp32_precision == "tf32"


@pytest.mark.parametrize("switches", ["default", "old", "new"])
def test_as_asked_and_as_it_was(switches):
    if switches == "old":
        torch.set_float32_matmul_precision("high")
    if switches == "new":  # what the old ones cannot say
        MATMUL.fp32_precision = CUDNN.conv.fp32_precision = "tf32"
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
    before = state()
    for allowed in (False, True):
        with allow_tf32(allowed, GPU):
            assert seen() == (allowed, allowed)
            with allow_tf32(not allowed, GPU):  # one inside another keeps the outer's
                assert seen() == (allowed, allowed)
            if switches != "new":
                assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
        assert state() == before
        with allow_tf32(allowed, torch.device("cpu")):
            assert state() == before
    with pytest.raises(KeyError), allow_tf32(not seen()[1], GPU):
        raise KeyError
    assert state() == before


def test_threads_that_overlap():
    """The first to start is the first to end: it must not put back what it found while the other runs, and the other
    must not put back what the first had set."""
    torch.set_float32_matmul_precision("high")
    before, started, first_done = state(), threading.Event(), threading.Event()
    found = []

    def second():
        with allow_tf32(False, GPU):
            started.set()
            first_done.wait(10)
            found.append(seen())

    with allow_tf32(False, GPU):
        thread = threading.Thread(target=second)
        thread.start()
        started.wait(10)
    first_done.set()
    thread.join(10)
    assert found == [(False, False)] and state() == before


def test_threads_that_disagree_take_turns():
    before, wrong = state(), []

    def run(allowed):
        for _ in range(20):
            with allow_tf32(allowed, GPU):
                time.sleep(1e-4)
                if seen() != (allowed, allowed):
                    wrong.append(allowed)

    threads = [threading.Thread(target=run, args=(k % 2 == 0,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert not wrong and state() == before
