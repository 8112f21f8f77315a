"""Reading ahead: what the coming steps need, read and decoded by other processes while this one computes.

    python ahead.py                       # squares, computed by two processes

The requests are known beforehand, because the order of the data is a function of the step. Results come in
their order, whatever process is first; without processes they are the same, only later.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset


class _Calls(Dataset):
    """function(request) for any request; an error that is meant for the user is returned as it is."""

    def __init__(self, function: Callable):
        self.function = function

    def __getitem__(self, request):
        try:
            return self.function(request)
        except (ValueError, OSError) as error:
            return error


def _same(value):
    return value


def _as_worker(number: int) -> None:
    """Ctrl-C and the like reach the workers too, which the training still needs for its last step: it ends
    them, or they end by themselves when it is gone."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def in_processes(function: Callable, requests: Iterable, workers: int, ahead: int = 2) -> Iterator:
    """function(request) of each, in their order, computed by `workers` processes, each of which is at most
    `ahead` requests ahead; with 0 workers, here and on demand. Requests are taken as they are needed, so there
    may be any number. Raises what the function raises, and OSError where a process was killed."""
    if workers == 0:
        return map(function, requests)
    context = "fork" if sys.platform == "linux" else None       # elsewhere it is not safe
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")             # about more workers than cores
        # With a generator of its own, none of this process is touched: a seed means the same as without.
        loader = DataLoader(_Calls(function), batch_size=None, sampler=requests, num_workers=workers,
                            prefetch_factor=ahead, collate_fn=_same, worker_init_fn=_as_worker,
                            generator=torch.Generator(), multiprocessing_context=context)
        results = _results(iter(loader))
    # Processes that ignore signals must be let go before Python waits for its children: what is registered
    # last is called first.
    _running.add(results)
    atexit.unregister(_end_all)
    atexit.register(_end_all)
    return results


_running: weakref.WeakSet[Iterator] = weakref.WeakSet()


def _end_all() -> None:
    for results in list(_running):
        results.close()


def _results(iterator: Iterator) -> Iterator:
    while True:
        try:
            value = next(iterator)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise OSError(f"a process that reads ahead was killed ({str(error).splitlines()[0]}); make memory "
                          "free, or give fewer --workers") from None
        if isinstance(value, (ValueError, OSError)):
            raise value
        yield value


class Ahead:
    """read(indices), of which coming requests are read ahead. A request that is none of those announced, or out
    of their order, is read at once, so that the results are always the same."""

    def __init__(self, read: Callable[[np.ndarray], object], workers: int):
        self.read = read
        self.workers = workers
        self.pending: deque[np.ndarray] = deque()
        self.results: Iterator | None = None

    def expect(self, requests: Iterable[np.ndarray]) -> None:
        """Announce what will be asked for from now on. With no requests, the processes end."""
        self.close()
        if self.workers:
            self.results = in_processes(self.read, self._noted(iter(requests)), self.workers)

    def close(self) -> None:
        if self.results is not None:
            self.results.close()                    # lets go of the processes, which then end
        self.results = None
        self.pending.clear()

    def _noted(self, requests: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for indices in requests:
            self.pending.append(indices)
            yield indices

    def __call__(self, indices: np.ndarray) -> object:
        if self.pending and np.array_equal(self.pending[0], indices):
            self.pending.popleft()
            result = next(self.results)
            if not self.pending:                    # that was the last of them
                self.close()
            return result
        return self.read(indices)


def default_workers() -> int:
    """As many processes as this one may use cores, shared among the ranks of this machine; at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))))


def demo() -> None:
    """Squares from two processes, in order; one request that was not announced."""
    ahead = Ahead(lambda numbers: (os.getpid(), numbers**2), workers=2)
    ahead.expect(np.arange(start, start + 3) for start in range(0, 12, 3))
    for numbers in (np.arange(3), np.array([7]), np.arange(3, 6), np.arange(6, 9), np.arange(9, 12)):
        process, squares = ahead(numbers)
        print(f"{numbers} -> {squares}, {'here' if process == os.getpid() else 'ahead'}")
    ahead.close()


if __name__ == "__main__":
    demo()
