"""The processes of one launch: what each has to do, what all agree on, and how they end together.

    python ranks.py                       # three ranks share a batch, take turns and agree

A rank is one process with one device. The batch that is stated is that of all ranks together: every rank
draws the random numbers of the whole batch and keeps its own part of them, so that all generators stay alike,
any number of ranks trains the same network, and one generator's state in the checkpoint serves all. Rank 0
prints and writes. What the ranks hold of the weights is the concern of parallel.py.

One process, without torchrun, needs none of this: its Ranks do nothing and cost nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import IO

import torch
import torch.distributed as dist
from torch import Tensor

import cli

PATIENCE = timedelta(minutes=10)     # how long a rank may take for what the others wait for


class Ranks:
    """The processes of one launch; this one is number `rank`, from 0, of `size`."""

    def __init__(self, rank: int = 0, size: int = 1, local: int | None = None,
                 store: dist.Store | None = None):
        self.rank = rank
        self.size = size
        self.local = local               # the number of this one among several on the same machine
        self.store = store               # small values that all ranks see, also while one of them is away
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

    def part(self, count: int) -> slice:
        """The positions of this rank in a batch of `count`, which `shares` must divide."""
        size, number = count // self.shares, self.rank // self.tensor
        return slice(number * size, (number + 1) * size)

    def stacked(self, values: Tensor) -> Tensor:
        """The values of all ranks, (size, ...), on the CPU."""
        if self.size == 1:
            return values.cpu()[None]
        mine = values.detach().cpu().contiguous()
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine)
        return torch.stack(found)

    def gathered(self, mine: object) -> list:
        """What each rank has, in their order, on rank 0; on the others, nothing."""
        if self.size == 1:
            return [mine]
        found = [None] * self.size if self.first else None
        dist.gather_object(mine, found)
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
        dist.all_gather_object(everywhere, found)
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


# ---- the beginning and the end of a launch

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
    try:
        yield ranks
        dist.destroy_process_group()
    except OtherRankFailed:
        raise SystemExit(2) from None
    except RuntimeError as error:
        if any(sign in str(error) for sign in ("Connection closed", "Connection reset", "Broken pipe")):
            raise ValueError("another process has ended; the same command continues from the last "
                             "checkpoint") from None
        sys.stderr = errors              # a fault of ours, or a lack of memory
        raise


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
    local = int(os.environ["LOCAL_RANK"])
    backend = "gloo"                     # for what is on the CPU: agreements, and training there
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(local % torch.cuda.device_count())
    store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    return Ranks(rank, size, local, store)


def report_once(ranks: Ranks, errors: IO[str], message: str) -> None:
    """Print the message unless another rank has an error to report, too: then rank 0 does, or the first of
    those that have one."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)      # torchrun's, to a process that ends by itself
    try:
        # An error of all ranks is reported by rank 0, which needs a moment. It may also have none.
        patience = time.monotonic() + 2
        while not ranks.first and time.monotonic() < patience and not ranks.store.check(["reported"]):
            time.sleep(0.05)
        only = ranks.store.add("reports", 1) == 1
        ranks.store.set("reported", "")
    except RuntimeError:                 # whoever holds the store, torchrun or rank 0, is gone
        only = ranks.first
    if only:
        where = "" if ranks.first else f"rank {ranks.rank}: "
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
