"""Processes of a gloo group that run functions of a test module.

The fixtures `two` and `three` are of them; what a function returns comes back as a list over the
ranks.
"""

import datetime
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

LIMIT = datetime.timedelta(seconds=60)


def serve(rank: int, ranks: int, file: str, tasks: Any, results: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    distributed.init_process_group(
        "gloo", f"file://{file}", timeout=LIMIT, rank=rank, world_size=ranks
    )
    while True:
        function, args, kwargs = tasks.get()
        try:
            results.put((rank, function(*args, **kwargs), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))


class Processes:
    """As many ranks; started when they are first needed, and anew after an error."""

    def __init__(self, ranks: int, folder: Path):
        self.ranks, self.folder, self.starts = ranks, folder, 0
        self.processes: list[Any] = []

    def __call__(
        self, function: Callable[..., Any], *args: Any, limit: float = 120, **kwargs: Any
    ) -> list[Any]:
        if not self.processes:
            self.start()
        for tasks in self.tasks:
            tasks.put((function, args, kwargs))
        found = {}
        for _ in range(self.ranks):
            rank, value, error = self.results.get(timeout=limit)
            if error is not None:
                self.stop()
                raise AssertionError(f"on rank {rank}:\n{error}")
            found[rank] = value
        return [found[rank] for rank in range(self.ranks)]

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.results = context.Queue()
        self.tasks = [context.Queue() for _ in range(self.ranks)]
        self.starts += 1
        file = str(self.folder / f"init{self.ranks}_{self.starts}")
        self.processes = [
            context.Process(target=serve, args=(r, self.ranks, file, self.tasks[r], self.results))
            for r in range(self.ranks)
        ]
        for process in self.processes:
            process.start()

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []
