"""Programs in several processes, as torchrun starts them: for benchmarks/faults.py and the tests.

    with Server() as server:
        statuses, printed = server.launch(folder, [["--arch", "dit"]] * 2).end()

Imports take seconds; processes that are forked from one that has made them begin at once.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli
from ranks import environments


# ---- the process that all others are forked from

def work(order: dict, rank: int) -> int:
    """What a forked process does: its exit status."""
    try:
        os.chdir(order["folder"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)       # the server's own input is not for its children
        os.dup2(os.open(f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), 1)
        os.dup2(1, 2)
        os.environ.update(order["environments"][rank])
        atexit._clear()                                    # what the server has registered is for its own end
        program, words = order["program"], order["words"][rank]
        sys.argv = [program, *words]
        exec(order["setup"], {})
        if os.path.isabs(program):
            runpy.run_path(program, run_name="__main__")
            return 0
        module = importlib.import_module(program.removesuffix(".py"))
        return cli.program(program, lambda: module.main(words))
    except SystemExit as error:
        return error.code or 0
    except BaseException:
        traceback.print_exc()
        return 1


def serve(setup: str) -> None:
    """Answer orders, one a line, until there are no more: to launch processes, or to look after one."""
    # For the processes to come. Forking is safe, as there is one thread here and no CUDA context.
    import torch._dynamo
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.distributed.tensor.parallel

    import sample
    import train

    exec(setup, {})
    for line in sys.stdin:
        order = json.loads(line)
        if "words" in order:
            answer = []
            for rank in range(len(order["words"])):
                pid = os.fork()
                if pid == 0:
                    status = work(order, rank)
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(status)
                answer.append(pid)
        else:
            pid, status = os.waitpid(order["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)


# ---- how it is used

class Server:
    """Starts programs. setup: Python that the server runs once, before any of them."""

    def __init__(self, setup: str = ""):
        self.process = subprocess.Popen([sys.executable, __file__, setup], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True,
                                        env=os.environ | {"OMP_NUM_THREADS": "1",
                                                          "TORCH_CPP_LOG_LEVEL": "ERROR"})

    def ask(self, order: dict) -> list[int] | int | None:
        """The ids of the processes that are launched; or the exit status of one, None while it runs."""
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("the process that starts all others has ended; its traceback is on stderr")
        return json.loads(answer)

    def launch(self, folder: Path, words: list[list[str]], program: str = "train.py", setup: str = "",
               **environment: str) -> Launch:
        """Start the program, once for each list of flags. A name such as train.py is a module whose main() is
        called with them, and `setup`, Python that each process runs before, can change what that module uses;
        an absolute path is any script."""
        ranks = environments(len(words)) if len(words) > 1 else [{}]
        return Launch(self, {"folder": str(folder), "words": words, "program": program, "setup": setup,
                             "environments": [own | environment for own in ranks]})

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error) -> None:
        self.process.stdin.close()
        self.process.wait()


class Launch:
    """One launch; each process writes rank-N.txt in the folder."""

    def __init__(self, server: Server, order: dict):
        self.server = server
        self.folder = Path(order["folder"])
        self.pids = server.ask(order)
        self.statuses: list[int | None] = [None] * len(self.pids)

    def running(self) -> bool:
        for rank, pid in enumerate(self.pids):
            if self.statuses[rank] is None:
                self.statuses[rank] = self.server.ask({"poll": pid})
        return None in self.statuses

    def wait_for(self, metrics: str, step: int) -> None:
        """Until this step is in a run's metrics.jsonl, whose path is relative to the folder, or all processes
        have ended."""
        file = self.folder / metrics
        while self.running() and not (file.exists() and f'"step": {step},' in file.read_text()):
            time.sleep(0.01)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        if self.statuses[rank] is None:
            os.kill(self.pids[rank], number)

    def end(self, seconds: float = 1800) -> tuple[list[int], list[str]]:
        """The exit statuses, and what each process has printed. Those that hang are killed: status -9."""
        deadline = time.monotonic() + seconds              # which no busy machine should come near
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.01)
        for rank in range(len(self.pids)):
            self.kill(rank)
        while self.running():
            time.sleep(0.01)
        return self.statuses, self.printed()

    def printed(self) -> list[str]:
        return [(self.folder / f"rank-{rank}.txt").read_text() for rank in range(len(self.pids))]

    def errors(self) -> list[str]:
        # progress bars end in \r
        return [line for text in self.printed() for line in re.split("[\r\n]", text) if "error:" in line]


if __name__ == "__main__":
    serve(sys.argv[1])
