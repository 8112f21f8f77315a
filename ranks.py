"""The processes of one launch: what each has to do, what all agree on, and how they end together.

    python ranks.py                       # three ranks share a batch, take turns and agree

A rank is one process with one device. The batch that is stated is that of all ranks together: every rank
draws the random numbers of the whole batch and keeps its own part of them, so that all generators stay alike,
any number of ranks trains the same network, and one generator's state in the checkpoint serves all. Rank 0
prints and writes. What the ranks hold of the weights is the concern of parallel.py.

One process, without torchrun, needs none of this: its Ranks do nothing and cost nothing.
"""

from __future__ import annotations

import atexit
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist
from torch import Tensor

import cli

PATIENCE = 600       # seconds that a rank may take for what the others wait for; RANK_PATIENCE gives another
GRACE = 30           # seconds, at most, after the end of a launch until a process that hangs is ended


class Ranks:
    """The processes of one launch; this one is number `rank`, from 0, of `size`."""

    def __init__(self, rank: int = 0, size: int = 1, local: int | None = None,
                 store: dist.Store | None = None, watch: Watch | None = None):
        self.rank = rank
        self.size = size
        self.local = local               # the number of this one among several on the same machine
        self.store = store               # small values that all ranks see, also while one of them is away
        self.watch = watch               # which knows what the others do where they do not come
        self.patience: timedelta | None = None         # of what the ranks exchange in a step
        self.meetings: dist.ProcessGroup | None = None # for values on the CPU, if weights are elsewhere
        self.tensor = 1                  # ranks that share the work on the same pictures: see parallel.py
        self.turns = 0

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    # ---- parts of a batch

    @property
    def shares(self) -> int:
        """How many parts a batch is divided into."""
        return self.size // self.tensor

    @property
    def share(self) -> int:
        """Which of them is this rank's."""
        return self.rank // self.tensor

    def part(self, count: int) -> slice:
        """The positions of this rank in a batch of `count`, which `shares` must divide."""
        size = count // self.shares
        return slice(self.share * size, (self.share + 1) * size)

    def stacked(self, values: Tensor) -> Tensor:
        """The values of all ranks, (size, ...), on the CPU."""
        if self.size == 1:
            return values.cpu()[None]
        mine = values.detach().cpu().contiguous()
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self.meetings)
        return torch.stack(found)

    def gathered(self, mine: object) -> list:
        """What each rank has, in their order, on rank 0; on the others, nothing."""
        if self.size == 1:
            return [mine]
        found = [None] * self.size if self.first else None
        dist.gather_object(mine, found, group=self.meetings)
        return found or []

    # ---- what all ranks must do alike

    def meet(self) -> None:
        """Wait until all ranks are here."""
        self.highest(0)

    def highest(self, here: int) -> int:
        """The highest of all ranks' numbers. Every rank has to ask at the same point of the program."""
        return here if self.size == 1 else int(self.stacked(torch.tensor(here)).max())

    def agree(self, found: dict[str, object], remedy: str) -> None:
        """Raises ValueError on every rank if one of these values, by what to call them, is not the same on
        all."""
        if self.size == 1:
            return
        everywhere = [None] * self.size
        dist.all_gather_object(everywhere, found, group=self.meetings)
        for rank, theirs in enumerate(everywhere):
            for name, value in everywhere[0].items():
                if theirs[name] != value:
                    raise ValueError(f"{name}: {value} on rank 0, {theirs[name]} on rank {rank}; {remedy}")

    def agreed(self, received: list[int]) -> list[int]:
        """A list that is empty until one of the ranks has received a signal."""
        return received if self.size == 1 else Agreed(self, received)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Rank 0 runs the block first, for as long as it takes, and the others run it when it is done: they
        then find what it has made on the disk. Where it fails, they end as well."""
        if self.size == 1:
            yield
            return
        self.turns += 1
        key = f"turn {self.turns}"
        if not self.first:
            self.wait_for(key)
        try:
            yield
        except BaseException:
            if self.first:
                self.store.set(key, "failed")
            raise
        if self.first:
            self.store.set(key, "done")

    def wait_for(self, key: str) -> None:
        """Wait until rank 0 has set this key, however long that takes."""
        while not self.store.check([key]):             # not store.wait, in which signals would have to wait
            time.sleep(0.1)
        if self.store.get(key) == b"failed":
            raise OtherRankFailed


ALONE = Ranks()


class OtherRankFailed(RuntimeError):
    """Ends a rank because of another one, which has said why."""


class Agreed(list):
    """The signals that any rank has received, of which all learn at the same time: whenever they ask whether
    the list is empty, which they have to do at the same points of the program."""

    def __init__(self, ranks: Ranks, received: list[int]):
        super().__init__()
        self.ranks = ranks
        self.received = received

    def __bool__(self) -> bool:
        if len(self) == 0:
            number = self.ranks.highest(self.received[0] if self.received else 0)
            if number:
                self.append(number)
        return len(self) > 0


# ---- a rank that does not come

class Watch(threading.Thread):
    """Writes into the store, now and then, what this rank does, so that the others can name it where it keeps
    them waiting. Ends a process that hangs where the launch has ended."""

    def __init__(self, store: dist.Store, rank: int, size: int, patience: float):
        super().__init__(daemon=True)
        self.store = store
        self.rank = rank
        self.size = size
        self.patience = patience
        self.pause = min(5.0, patience / 10)           # seconds between two entries
        self.entries = 0
        self.over = threading.Event()                  # this rank needs it no more
        self.enter()

    def enter(self) -> None:
        """Write whether this rank waits for others, and what it does, with a number that grows."""
        self.entries += 1
        waits, place = doing(sys._current_frames()[threading.main_thread().ident])
        self.store.set(f"doing {self.rank}", f"{self.entries}|{int(waits)}|{place}")

    def run(self) -> None:
        ended = None
        while not self.over.wait(self.pause):
            try:
                self.enter()
                launch_has_ended = self.store.check(["late"])
            except RuntimeError:                       # whoever holds the store is gone
                launch_has_ended = True
            if launch_has_ended and ended is None:
                ended = time.monotonic()
            # The main thread learns of it as soon as it needs another rank, unless it hangs.
            if ended is not None and time.monotonic() - ended > min(GRACE, 5 * self.patience):
                os._exit(2)

    def end(self) -> None:
        """Write no more. A process must not end while this thread is in the store: Python stops its threads
        where they are, and C++ would abort the process."""
        self.over.set()
        self.join(5.0)                                 # rank 0 may have stopped, with the store

    def who_is_late(self) -> str:
        """Which rank the others have waited for in vain, and what it does."""
        entries = asked(self.compare, 10 * self.pause)
        if entries is None:
            return (f"rank 0 has not come within {self.patience:g} seconds to what all wait for: it does not "
                    "answer")
        earlier, found = entries
        lines = {}
        for rank, (number, waits, place) in enumerate(found):
            if number == earlier[rank][0]:             # it writes no more
                lines[rank] = f"rank {rank}, which does not answer"
            elif waits == "0":
                lines[rank] = f"rank {rank}, which is at {place}"
        lines.pop(self.rank, None)
        if lines:
            who = "; ".join(list(lines.values())[:8])
            return f"within {self.patience:g} seconds, these have not come to what all wait for: {who}"
        who = "; ".join(f"rank {rank} is at {place}" for rank, (_, _, place) in enumerate(found[:8]))
        return f"the ranks have not come together within {self.patience:g} seconds: {who}"

    def compare(self) -> list[list[list[str]]]:
        """What all ranks do, and what they do a little later."""
        self.store.set("late", "")
        entries = []
        for _ in range(2):
            time.sleep(2.5 * self.pause)
            entries.append([self.store.get(f"doing {rank}").decode().split("|")
                            for rank in range(self.size)])
        return entries


def asked(call: Callable, seconds: float):
    """What the store answers to this call; None where it does not do so within this time."""
    answers = []

    def ask() -> None:
        try:
            answers.append(call())
        except RuntimeError:                           # whoever holds the store, torchrun or rank 0, is gone
            pass

    thread = threading.Thread(target=ask, daemon=True) # rank 0 may have stopped, with the store
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def doing(frame) -> tuple[bool, str]:
    """Whether a thread waits for other ranks, and which line of this project it has come to."""
    here = Path(__file__)
    waits = False
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        # Gradients are exchanged in the backward pass, everything else by torch.distributed.
        exchanges = "distributed" in path.parts and "checkpoint" not in path.parts
        waits |= exchanges or frame.f_code.co_name == "_engine_run_backward" or path == here
        if path.parent == here.parent and path != here:
            return waits, f"{path.name}, line {frame.f_lineno}, {frame.f_code.co_name}"
        frame = frame.f_back
    return waits, "an unknown line"


def is_late(error: Exception) -> bool:
    """Whether a rank has waited for another for too long."""
    return "timed out" in str(error).lower() or "timeout" in str(error).lower()


def is_lost(error: Exception) -> bool:
    """Whether the connection to another rank has ended."""
    signs = ("Connection closed", "Connection reset", "Broken pipe", "pair closure", "failed to recv")
    return isinstance(error, dist.DistNetworkError) or any(sign in str(error) for sign in signs)


def explained(ranks: Ranks, error: Exception) -> ValueError | None:
    """The line for the user, where another rank is the reason for this error."""
    late = is_late(error)
    if not (late or is_lost(error)):
        return None
    what = "another process has ended"
    if not late:                                       # or has it waited, and says so in a moment?
        time.sleep(0.2)
        late = asked(lambda: ranks.store.check(["late"]), 5.0)
    if late:
        what = ranks.watch.who_is_late()
    return ValueError(f"{what}; the same command goes on from what is saved")


# ---- the beginning and the end of a launch

def leave(status: int) -> None:
    """End this process, and do not let the interpreter do it. gloo's threads outlive destroy_process_group
    wherever DTensor's caches hold the group, and one that only then lets go of a tensor aborts the process
    (pytorch/pytorch#179291): a training that is done would seem to have failed."""
    for number in (signal.SIGINT, signal.SIGTERM):         # too late to stop anything
        signal.signal(number, signal.SIG_IGN)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def launched() -> Iterator[Ranks]:
    """The ranks that torchrun has started, told of each other; without torchrun, one process. In the block,
    only rank 0 prints, and an error that several ranks have is reported once. Raises ValueError with a line
    for the user, also where another rank has ended."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield ALONE
        return
    errors = sys.stderr
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = sys.stderr = open(os.devnull, "w")
    ranks = join()
    cli.report = partial(report_once, ranks, errors)
    cli.leave = leave
    try:
        yield ranks
        dist.destroy_process_group()
    except OtherRankFailed:
        raise SystemExit(2) from None
    except RuntimeError as error:
        reason = explained(ranks, error)
        if reason is not None:
            raise reason from None
        sys.stderr = errors              # a fault of ours, or a lack of memory
        raise
    finally:
        ranks.watch.end()


def join() -> Ranks:
    """This process among those of torchrun. Raises ValueError where its environment is incomplete."""
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {missing[0]} is not set; start with "
                         "torchrun")
    if not (dist.is_available() and dist.is_gloo_available()):
        raise ValueError("torchrun: this build of torch has no backend for several processes (gloo); install "
                         "another, or start a single process with python")
    if torch.cuda.is_available() and not dist.is_nccl_available():         # as on Windows
        raise ValueError("torchrun: this build of torch has no backend for several GPUs (NCCL); install "
                         "another, or start a single process with python")
    local = int(os.environ["LOCAL_RANK"])
    backend = "gloo"                     # for what is on the CPU: agreements, and training there
    patience = patience_asked()
    waits = timedelta(seconds=patience)
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(local % torch.cuda.device_count())
        # NCCL ends a process that has waited too long. What waits on the CPU can say why, so it is first.
        waits = 2 * waits
    watch = None
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=waits))
        watch = Watch(store, rank, size, patience)
        watch.start()
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=waits)
        ranks = Ranks(rank, size, local, store, watch)
        if backend != "gloo":
            ranks.meetings = dist.new_group(backend="gloo", timeout=timedelta(seconds=patience))
    except BaseException as error:
        if watch is not None:
            watch.end()
        if not (isinstance(error, RuntimeError) and (is_late(error) or is_lost(error))):
            raise
        raise ValueError(f"not all of the {os.environ['WORLD_SIZE']} processes have met at "
                         f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within "
                         f"{waits.total_seconds():g} seconds ({str(error).splitlines()[0][:150]}); start "
                         "them all with the same command") from None
    ranks.patience = waits
    return ranks


def environments(count: int) -> list[dict[str, str]]:
    """What torchrun sets for each of so many processes on this machine, to start them without it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def patience_asked() -> float:
    """PATIENCE, or what the environment has instead."""
    text = os.environ.get("RANK_PATIENCE", str(PATIENCE))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds <= 1e6:
        raise ValueError(f"RANK_PATIENCE is {text}; give seconds, at least 1")
    return seconds


def report_once(ranks: Ranks, errors: IO[str], message: str) -> None:
    """Print the message unless another rank has an error to report, too: then rank 0 does, or the first of
    those that have one."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)      # torchrun's, to a process that ends by itself
    # An error of all ranks is reported by rank 0, which needs a moment. It may also have none.
    patience = time.monotonic() + 2
    reported = False
    while reported is False and not ranks.first and time.monotonic() < patience:
        reported = asked(lambda: ranks.store.check(["reported"]), 2.0)
        time.sleep(0.05)
    only = asked(lambda: ranks.store.add("reports", 1) == 1, 2.0)
    asked(lambda: ranks.store.set("reported", ""), 2.0)
    if only is None:                     # the store has gone, or has stopped with rank 0: see who_is_late
        only = ranks.first or (ranks.rank == 1 and "rank 0 has not come" in message)
    if only:
        # on a line of its own, not behind the progress bar of rank 0
        where = "" if ranks.first else f"\nrank {ranks.rank}: "
        print(f"{where}{message}", file=errors, flush=True)


def demo() -> None:
    """Share a batch, take turns, and find out that something is not the same on all ranks."""
    if "WORLD_SIZE" not in os.environ:
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3",
                        __file__], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
        return
    with launched() as ranks:
        parts = ranks.gathered(list(range(12))[ranks.part(12)])
        print(f"{ranks.size} processes share a batch of 12: {parts}")
        began = time.monotonic()
        with ranks.in_turn():
            time.sleep(0.5 if ranks.first else 0)
        waited = ranks.stacked(torch.tensor(time.monotonic() - began))
        print(f"rank 0 worked for half a second, and the others waited: {(waited > 0.4).tolist()}")
        try:
            ranks.agree({"--seed": ranks.rank // 2}, "start all processes with the same command")
        except ValueError as error:
            print(f"refused: {error}")


if __name__ == "__main__":
    sys.exit(cli.program("ranks.py", demo))
