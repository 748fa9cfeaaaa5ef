"""Functions run in several processes that form a group, as under torchrun.

They are forked from one server that has imported the library once, and can be functions of any test file.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable
from typing import Any

import torch

PRELOADED = ["pytest", "torch._dynamo", "scoresde.cli"]
PRELOADED += ["scoresde.training", "scoresde.comparison", "scoresde.likelihood"]
"""What would take every process a second to import."""


def in_processes(world: int, work: Callable[..., Any], *arguments: Any, lost: int = 0) -> list[Any]:
    """What a function returns in each process of a gloo group. One that fails there fails here; so many as are `lost`
    end without a word, and have None here."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    queue = context.Queue()
    workers = [
        context.Process(target=_worker, args=(rank, world, port, work, arguments, queue)) for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    found = {}
    try:
        for _ in range(world - lost):
            rank, result, error = queue.get(timeout=300)
            if error is not None:
                raise RuntimeError(f"process {rank}: {error}")
            found[rank] = pickle.loads(result)
    except BaseException:
        for worker in workers:
            worker.terminate()  # the others may wait for the one that failed
        raise
    finally:
        for worker in workers:
            worker.join()
    return [found.get(rank) for rank in range(world)]


def _worker(rank: int, world: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...], queue: Any) -> None:
    torch.set_num_threads(1)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in place.items()})
    d = torch.distributed
    d.init_process_group("gloo", store=d.TCPStore("127.0.0.1", port, world, rank == 0), rank=rank, world_size=world)
    try:
        # by value: tensors would otherwise be shared with a process that may be gone
        queue.put((rank, pickle.dumps(work(*arguments)), None))
    except BaseException as error:
        queue.put((rank, None, repr(error)))
        raise
    finally:
        d.destroy_process_group()
