"""The command line of the programs: flags and their types, one-line refusals, exit statuses, signals, and
output that never stops the work.

    python cli.py                         # what a flag accepts, and how it refuses the rest

Exit statuses: 0 done; 2 bad input, after one line on stderr that names it and the remedy; 128 + N after
signal N (130 for Ctrl-C, 143 for SIGTERM); 1, with a traceback, only for a fault of this project.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO


# ---- what a flag accepts: functions for argparse's `type=`

def number(low: float, high: float = math.inf, kind: type = float, above: bool = False,
           below: bool = False) -> Callable[[str], float]:
    """A number in [low, high], or in (low, high] with `above`, or in [low, high) with `below`; NaN is outside
    every range."""
    noun = "a whole number" if kind is int else "a number"
    limits = f"between {low:,} and {high:,}"
    if above:
        limits = f"above {low:,} and at most {high:,}"
    elif below:
        limits = f"at least {low:,} and below {high:,}"
    elif high == math.inf:
        limits = f"at least {low:,}"
    limits = limits.replace(".0 ", " ").removesuffix(".0")       # "between 0 and 1", not "0.0 and 1.0"

    def check(string: str) -> float:
        try:
            value = kind(string)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{string}: must be {noun} {limits}") from None
        if not low <= value <= high or (above and value == low) or (below and value == high):
            raise argparse.ArgumentTypeError(f"{string}: must be {limits}")
        return value
    return check


def integer(low: int, high: int = 10**9) -> Callable[[str], int]:
    return number(low, high, int)


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    names = list(names)

    def check(string: str) -> str:
        if nonempty(string) not in names:
            raise argparse.ArgumentTypeError(f"{string}: must be one of {', '.join(names)}")
        return string
    return check


def nonempty(string: str) -> str:
    if not string:
        raise argparse.ArgumentTypeError("is empty; give a value, or leave it out")
    return string


def folder_name(string: str) -> str:
    if not string.isprintable():
        raise argparse.ArgumentTypeError(f"{string!r}: has characters that cannot be printed; give letters, "
                                         "digits and dashes")
    if string in ("", ".", "..") or set(string) & {"/", "\\", os.sep}:
        raise argparse.ArgumentTypeError(f"{string!r}: must be the name of one folder, without / or \\; "
                                         "--runs-dir says where it lies")
    if len(os.fsencode(string)) > 200:
        raise argparse.ArgumentTypeError(f"{string[:40]}...: a name of {len(string)} letters is too long for "
                                         "a folder")
    return string


# ---- flags

@dataclass(frozen=True)
class Flag:
    name: str                                     # as on the command line
    help: str
    type: Callable[[str], object] | None = None   # None: a switch
    default: object = None                        # None: no value, or one that `resolve` fills in
    nargs: str | int | None = None
    metavar: str | tuple[str, ...] | None = None
    most: int | None = None                       # with nargs "+": how many values at most
    # It has an effect only where each flag named here has one of the values beside its name.
    needs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    instead: str = ""                             # the flag to use where `needs` is not met
    unset: str | None = None                      # where it is not given, `needs` assumes this value
    option: str | None = None                     # argument of the path's constructor that this flag sets
    settled: bool = False                         # decided by --published where that is given
    resumable: bool = False                       # may change on resume, as it does not affect training
    changeable: bool = False                      # may change on resume, with effect from that step on

    @property
    def key(self) -> str:
        """Its name in the parsed settings."""
        return self.name.lstrip("-").replace("-", "_")


class Parser(argparse.ArgumentParser):
    """argparse, with every error raised as a ValueError of one line."""

    def error(self, message: str) -> None:
        if message.startswith("unrecognized arguments: --"):
            word = re.split("[ =]", message.split(": ")[1])[0]
            known = [name for name in self._option_string_actions if name.startswith("--")]
            near = [name for name in known if name.startswith(word)]
            near = near or difflib.get_close_matches(word, known, 1)
            message += f"; did you mean {near[0]}?" if near else ""
        # argparse's "argument --steps: 0: must be ..." becomes "--steps 0: must be ..."
        raise ValueError(re.sub(r"^argument ([^ :]+): ", r"\1 ", message))


def make_parser(description: str, groups: dict[str, list[Flag]]) -> Parser:
    # Abbreviations are off: a later flag could change what they mean, and a slip would pass for another flag.
    parser = Parser(description=description, allow_abbrev=False)
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            if flag.type is None:
                group.add_argument(flag.name, action="store_true", help=flag.help)
            else:
                group.add_argument(flag.name, type=flag.type, default=flag.default, nargs=flag.nargs,
                                   metavar=flag.metavar, help=flag.help)
    return parser


def shown(flag: Flag, args: argparse.Namespace) -> str:
    """A flag and its value as they were given, for messages."""
    if flag.type is None:
        return flag.name
    value = getattr(args, flag.key)
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return f"{flag.name} {value}"


def given(flag: Flag, args: argparse.Namespace) -> bool:
    value = getattr(args, flag.key)
    return value is not None and value is not False      # not `in (None, False)`: 0 equals False


# ---- the programs: exit statuses, and output that never stops the work

class Output:
    """stdout or stderr. What cannot be written (a closed pipe, a full disk, a terminal that has gone) is
    dropped, and characters that the encoding lacks are escaped: neither may end hours of training."""

    def __init__(self, stream: TextIO | None, descriptor: int):
        try:
            os.fstat(descriptor)
        except OSError:                        # closed by the shell (2>&-): otherwise the next file opened
            os.open(os.devnull, os.O_RDWR)     # would get this number, and other people's messages in it
        self.stream = stream or open(os.devnull, "w")
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def _try(self, action: Callable, *values) -> None:
        try:
            action(*values)
        except (OSError, ValueError):          # ValueError: the file is closed
            null = open(os.devnull, "w")
            try:
                os.dup2(null.fileno(), self.stream.fileno())     # Python writes the rest when it exits
            except (OSError, ValueError):
                pass                           # closed, or not a file of the system
            self.stream = null

    def write(self, string: str) -> int:
        self._try(self.stream.write, string)
        return len(string)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def quiet_imports(module: str) -> None:
    """For the top of a program, before its imports, which take seconds: until `program` takes over, Ctrl-C
    ends it without a traceback. module: its __name__; where it is imported, nothing changes."""
    if module == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)       # not where the shell ignores it: a background job
    if module == "__main__" and "WORLD_SIZE" in os.environ:
        # Where a process ends, torch warns the others of it with a page of addresses; one line is enough.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def monotonic_bars() -> None:
    """Let progress bars measure with a clock that is never set back: one that is shows negative durations
    and stops the bar."""
    import tqdm
    tqdm.std.time = time.monotonic
    tqdm._monitor.time = time.monotonic                    # its thread compares with the times of bars


def print_error(message: str) -> None:
    print(message, file=sys.stderr)


report: Callable[[str], None] = print_error     # ranks.py replaces it where several processes have one error
leave: Callable[[int], None] = lambda status: None         # and this, which then does not return


def program(name: str, main: Callable[[], int | None]) -> int:
    """Run main and return the exit status: 0 done, 2 bad input (one line on stderr), 128 + N after signal N.
    Any other exception is a fault of ours: a traceback, and Python's status 1."""
    try:
        status = status_of(name, main)
    except SystemExit as end:
        if isinstance(end.code, int):
            leave(end.code)
        raise
    leave(status)
    return status


def status_of(name: str, main: Callable[[], int | None]) -> int:
    """`program`, but for the end of the process."""
    sys.stdout = Output(sys.stdout, 1)
    sys.stderr = Output(sys.stderr, 2)
    monotonic_bars()
    received: list[int] = []

    def stop(number: int, frame) -> None:
        received.append(number)
        sys.exit(128 + number)                             # removes unfinished files

    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", None)):     # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:      # nohup ignores SIGHUP
            signal.signal(number, stop)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:                # see quiet_imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return main() or 0
    except (ValueError, OSError, FloatingPointError) as error:
        message = " ".join(str(error).split("\n"))
    except (MemoryError, RuntimeError) as error:
        import torch                                       # here, so that this file is imported in no time
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
        if not known:
            raise
        message = "out of memory; lower --batch-size or --image-size, or close other programs"
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command begins or continues it", file=sys.stderr)
        return 128 + signal.SIGINT
    except SystemExit:                                     # of `stop`, or of argparse's --help
        if received:
            print(f"{name}: stopped by {signal.Signals(received[0]).name}; the same command begins or "
                  "continues it", file=sys.stderr)
        raise
    report(f"{name}: error: {message}")
    return 2


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP in a list instead of stopping, so that the loop can finish its
    step."""
    received: list[int] = []
    # Windows has no SIGHUP. nohup ignores it so that a training outlives its terminal, and a shell ignores
    # SIGINT for what it starts in the background.
    numbers = [signal.SIGTERM, *(number for number in (signal.SIGINT, getattr(signal, "SIGHUP", None))
                                 if number is not None and signal.getsignal(number) is not signal.SIG_IGN)]
    handlers = {}
    for number in numbers:
        handlers[number] = signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def demo() -> None:
    """Parse three command lines."""
    flags = {"demonstration": [Flag("--steps", "how many", integer(1), 10), Flag("--fast", "a switch")]}
    for line in ("--steps 3 --fast", "--steps 0", "--step-size 1"):
        try:
            print(f"{line}: {vars(make_parser('', flags).parse_args(line.split()))}")
        except ValueError as error:
            print(f"{line}: refused, {error}")


if __name__ == "__main__":
    sys.exit(program("cli.py", demo))
