"""Work on modules in threads: results in order, a few at a time, the same for any number of threads."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

# (process, number of workers) -> they. Kept, since to make one is the one moment at which others could notice.
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_making, _settling = threading.Lock(), threading.Lock()
_this_thread = threading.local()


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None
) -> Generator[Result, None, None]:
    """work(item) for each item, in order; at most 2 * workers results wait, so that memory stays bounded.

    workers: at least one is taken; None is torch.get_num_threads().
    Each worker uses one thread for its arithmetic, however many there are: thousands of small matrices are
    slower with more (measured: ten times, under load), and sums come out the same bit for bit.
    What `work` raises is raised here, and nothing further is begun.
    """
    workers = max(1, torch.get_num_threads() if workers is None else workers)
    if _on_one_core(workers):
        for item in items:
            yield _quietly(work, item)
        return
    left, pool = iter(items), _pool(workers)

    def begin(item: Item) -> Future[Result]:
        return pool.submit(_quietly, work, item)

    waiting = deque(begin(item) for item in islice(left, 2 * workers))
    try:
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(begin(item) for item in islice(left, 1))
            yield result
    finally:
        for future in waiting:
            future.cancel()
        wait(waiting)


def on_one_core(work: Callable[[], Result]) -> Result:
    """What `work` gives, its arithmetic done on one core: for many small tensors."""
    return _quietly(_call, work) if _on_one_core(1) else _pool(1).submit(_quietly, _call, work).result()


def _call(work: Callable[[], Result]) -> Result:
    return work()


def _quietly(work: Callable[[Item], Result], item: Item) -> Result:
    # The mode is each thread's own.
    with torch.no_grad():
        return work(item)


def _on_one_core(workers: int) -> bool:
    """Whether this thread is as good as a worker. A worker must not wait for others, which may all wait for it."""
    return getattr(_this_thread, "is_worker", False) or (workers == 1 and torch.get_num_threads() == 1)


def _pool(workers: int) -> ThreadPoolExecutor:
    key = (os.getpid(), workers)  # a forked process has the table, but no threads
    with _making:
        if key not in _pools:
            pool = ThreadPoolExecutor(workers, "lora_merge", initializer=_settle)
            # All at once, here: else a worker more would be made in the middle of the work.
            together = threading.Barrier(workers)
            wait([pool.submit(together.wait) for _ in range(workers)])
            _pools[key] = pool
        return _pools[key]


def _settle() -> None:
    """This thread is a worker from now on, its arithmetic on one core.

    torch has no way to say that of one thread alone: set_num_threads also decides with how many every thread begins that
    starts later, of whatever pack. So another thread says again at once what was true before; this one keeps its own
    number. For some 20 microseconds, once for each worker of a process, the number is 1: nothing is done meanwhile.
    """
    _this_thread.is_worker = True
    with _settling:
        before = torch.get_num_threads()  # of a thread that has just started: what all begin with
        done_here = threading.Lock()
        done_here.acquire()

        def restore() -> None:
            done_here.acquire()
            torch.set_num_threads(before)

        other = threading.Thread(target=restore)
        other.start()
        try:
            torch.set_num_threads(1)
        finally:
            done_here.release()
            other.join()
