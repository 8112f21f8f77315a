"""Reading ahead: what the coming steps need, read and decoded by other processes while this one computes.

    python ahead.py                       # squares, computed by two processes

The requests are known beforehand, because the order of the data is a function of the step. Results come in
their order, whatever process is first; without processes they are the same, only later.
"""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import os
import signal
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection

import numpy as np
import torch


CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
_ends: weakref.WeakSet[Connection] = weakref.WeakSet()         # this process's ends of all pipes


def _serve(function: Callable, pipe: Connection, ends: list[Connection]) -> None:
    """A worker: answer requests until the pipe is closed, by the other process or by its death."""
    for end in ends:                    # a forked copy of them would keep those pipes open
        end.close()
    # Ctrl-C and the like reach the workers too, which the training still needs for its last step.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        while True:
            request = pipe.recv()
            try:
                answer = function(request)
            except Exception as error:
                answer = _Failed(error)
            pipe.send(answer)
    except (EOFError, OSError):
        os._exit(0)                     # without the cleaning up that is the other process's


class _Failed:
    def __init__(self, error: Exception):
        self.error = error


def in_processes(function: Callable, requests: Iterable, workers: int, ahead: int = 2) -> Iterator:
    """function(request) of each, in their order, computed by `workers` processes, each of which has at most
    `ahead` requests; with 0 workers, here and on demand. Requests, which must be small, are taken as they are
    needed, so there may be any number. Raises what the function raises, and OSError where a process was
    killed."""
    if workers == 0:
        return map(function, requests)
    pipes = []
    for _ in range(workers):
        ours, theirs = CONTEXT.Pipe()
        inherited = [ours, *_ends] if CONTEXT.get_start_method() == "fork" else []
        CONTEXT.Process(target=_serve, args=(function, theirs, inherited), daemon=True).start()
        theirs.close()
        _ends.add(ours)
        pipes.append(ours)
    # The processes ignore signals, so they must be let go before Python waits for its children: what is
    # registered last is called first.
    atexit.unregister(_end_all)
    atexit.register(_end_all)
    requests = iter(requests)
    turns = itertools.cycle(pipes)      # answers come in the order of the requests: each process in turn
    waiting: deque[Connection] = deque()
    for _ in range(workers * ahead):
        _send_next(requests, turns, waiting)
    return _answers(requests, turns, waiting, pipes)


def _send_next(requests: Iterator, turns: Iterator[Connection], waiting: deque[Connection]) -> None:
    for request in itertools.islice(requests, 1):
        pipe = next(turns)
        waiting.append(pipe)
        try:
            pipe.send(request)
        except OSError:                 # it was killed, which is found out where its answer is due
            pass


def _answers(requests: Iterator, turns: Iterator[Connection], waiting: deque[Connection],
             pipes: list[Connection]) -> Iterator:
    try:
        while waiting:
            try:
                answer = waiting.popleft().recv()
            except (EOFError, OSError):
                raise OSError("a process that reads ahead was killed; make memory free, or give fewer "
                              "--workers") from None
            if isinstance(answer, _Failed):
                raise answer.error
            _send_next(requests, turns, waiting)
            yield answer
    finally:
        for pipe in pipes:              # the processes then end
            pipe.close()


def _end_all() -> None:
    for end in list(_ends):
        end.close()


class Ahead:
    """read(indices), of which coming requests are read ahead. A request that is none of those announced, or
    out of their order, is read at once, so that the results are always the same."""

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
