"""Work on modules in threads: results in order, a few at a time, the same for any number of threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Generator[Result, None, None]:
    """work(item) for each item, in order; at most 2 * workers results wait, so that memory stays bounded.

    Each worker uses one thread for its arithmetic, whatever `workers` is: thousands of small matrices are
    slower with more (measured: ten times, under load), and sums come out the same bit for bit.
    What `work` raises is raised here, and nothing further is begun.
    """
    with one_thread():
        if workers <= 1:
            for item in items:
                with torch.no_grad():
                    yield work(item)
            return
        left = iter(items)
        with ThreadPoolExecutor(workers, "lora_merge", initializer=torch.set_num_threads, initargs=(1,)) as pool:

            def begin(item: Item) -> Future[Result]:
                return pool.submit(_quietly, work, item)

            waiting = deque(begin(item) for item in islice(left, 2 * workers))
            try:
                while waiting:
                    result = waiting.popleft().result()
                    waiting.extend(begin(item) for item in islice(left, 1))
                    yield result
            finally:
                pool.shutdown(cancel_futures=True)


def _quietly(work: Callable[[Item], Result], item: Item) -> Result:
    # The mode is each thread's own.
    with torch.no_grad():
        return work(item)


@contextmanager
def one_thread() -> Iterator[None]:
    """Arithmetic of this thread on one core, for work on many small tensors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
