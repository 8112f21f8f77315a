"""The comparison, measured: cells of {network} x {objective}, each a plain train.py and sample.py command.

    python benchmarks/compare.py --budget minutes            # five minutes, every line (from the root)
    OMP_NUM_THREADS=1 python benchmarks/compare.py --budget cpu       # two of them, side by side: six hours
    python benchmarks/compare.py --budget cpu --list         # the cells, done or not, and their commands
    python benchmarks/compare.py --budget cpu --only steps --seeds 0

Each finished cell is one line of benchmarks/results/compare-BUDGET.jsonl. The same command goes on after an
interruption: a training from its last checkpoint, a cell from its last evaluation. Nothing is measured twice.
Any number of processes may share a folder of runs; each takes the next cell that no other one holds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import measures
from cli import program
from files import locked, read_stamp, write_stamp
from run import build_path, load_checkpoint

RESULTS = Path(__file__).with_name("results")


# ---- the table of what is compared

class Evaluation(NamedTuple):
    sampler: str
    steps: int
    scale: float = 1.0                   # of the guidance

    @property
    def label(self) -> str:
        return f"{self.sampler} {self.steps}, guidance {self.scale:g}"

    @property
    def file(self) -> str:               # what a kill leaves half-drawn is continued
        return f"{self.sampler}-{self.steps}-cfg-{self.scale:g}"

    @property
    def flags(self) -> list[str]:
        return ["--sampler", self.sampler, "--steps", str(self.steps), "--cfg", f"{self.scale:g}"]


class Cell(NamedTuple):
    study: str
    name: str
    run: str                             # cells of equal training flags name the same run, trained once
    train: tuple[str, ...]               # flags of train.py, beyond those of the budget
    evaluations: tuple[Evaluation, ...]


class Study(NamedTuple):
    question: str
    cells: tuple[Cell, ...]
    data: str = "fashion-mnist"


class Budget(NamedTuple):
    what: str
    vae: tuple[str, ...]                 # flags of train.py for the VAE, which all cells share
    train: tuple[str, ...]               # and for every network
    steps: int
    n: int                               # samples per evaluation
    seeds: tuple[int, ...]
    straight: int                        # trajectories whose straightness is measured


BUDGETS = {
    "minutes": Budget("five minutes: every line is run, no figure means anything",
                      ("--steps", "60"), (), 24, 60, (0,), 10),
    "cpu": Budget("two cores: grid and steps take about six hours, with two processes of one thread each",
                  ("--steps", "4500"), ("--ema", "0.03"), 1600, 2000, (0, 1, 2), 100),
    "gpu": Budget("one GPU: ready, but not run so far",
                  ("--steps", "20000"), ("--ema", "0.03", "--batch-size", "256"), 20_000, 10_000,
                  (0, 1, 2, 3, 4), 500),
}
VAE_FLAGS = ("--kl-weight", "1e-5")
CHECKPOINTS = 8                          # at which a training is measured

# The two networks of equal FLOPs, and the five objectives. Each keeps the learning rate of its defaults.
NETWORKS = {"unet": ("--arch", "unet", "--preset", "matched"),
            "dit": ("--arch", "dit", "--preset", "small")}
OBJECTIVES = {
    "ddpm eps": ("--objective", "ddpm", "--prediction", "eps"),
    "ddpm v": ("--objective", "ddpm", "--prediction", "v"),
    "ddpm x0": ("--objective", "ddpm", "--prediction", "x0"),
    "rf uniform": ("--objective", "rf", "--density", "uniform"),
    "rf logit-normal": ("--objective", "rf", "--density", "logit_normal"),
}
# As sample.py by default, without guidance and with a little.
DEFAULT_SAMPLERS = {
    "ddpm": (Evaluation("ddim", 50), Evaluation("ddim", 50, 1.5)),
    "rf": (Evaluation("heun", 10), Evaluation("heun", 10, 1.5)),
}
HEADLINES = (("unet", "ddpm eps"), ("dit", "ddpm eps"), ("dit", "rf logit-normal"))


def grid_cell(study: str, network: str, objective: str, evaluations: tuple[Evaluation, ...]) -> Cell:
    run = f"{network}-{objective}".replace(" ", "-")
    return Cell(study, f"{network} {objective}", run, NETWORKS[network] + OBJECTIVES[objective], evaluations)


def grid_cells() -> Iterator[Cell]:
    for network, objective in itertools.product(NETWORKS, OBJECTIVES):
        yield grid_cell("grid", network, objective, DEFAULT_SAMPLERS[objective.split()[0]])


def step_cells() -> Iterator[Cell]:
    """Runs of the grid, at about 1 to 50 evaluations of the network by each solver."""
    for network, objective in HEADLINES:
        first = "ddim" if objective.startswith("ddpm") else "euler"
        # All solvers make the same first step, so one of them stands for all at one evaluation.
        rows = [Evaluation(first, steps) for steps in (1, 2, 4, 8, 10, 20, 50)]
        rows += [Evaluation("heun", steps) for steps in (2, 4, 5, 10, 25)]          # 2 steps - 1 evaluations
        for solver in ("dpmpp_2m", "unipc_3"):
            rows += [Evaluation(solver, steps) for steps in (2, 4, 8, 10, 20)]
        if first == "ddim":
            rows += [Evaluation("ddpm", steps) for steps in (10, 20, 50)]           # ancestral
        yield grid_cell("steps", network, objective, tuple(rows))


STUDIES = {
    "grid": Study("network x objective: equal data, equal training FLOPs", tuple(grid_cells())),
    "steps": Study("claim 3: how many evaluations, and with which solver", tuple(step_cells())),
}


# ---- the results

class Results:
    """The lines of a JSONL file, one per finished cell."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[dict]:
        records = []
        for line in self.path.read_text().splitlines() if self.path.is_file() else []:
            try:
                record = json.loads(line)
                record["study"], record["cell"], record["seed"]
            except (ValueError, TypeError, KeyError):
                continue                 # cut off by a kill; the cell is measured again
            records.append(record)
        return records

    def has(self, study: str, cell: str, seed: int) -> bool:
        return any((r["study"], r["cell"], r["seed"]) == (study, cell, seed) for r in self.read())

    def append(self, record: dict) -> None:
        """Add a line, unless the cell has one. A process that is killed meanwhile leaves at most a partial
        line, which `read` skips and which the next line does not continue."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with locked(self.path.with_suffix(".lock"), wait=True):
            if self.has(record["study"], record["cell"], record["seed"]):
                return
            before = self.path.read_bytes() if self.path.is_file() else b""
            if before and not before.endswith(b"\n"):
                line = b"\n" + line
            with open(self.path, "ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())


# ---- the machine and the version

def git_commit() -> str:
    """The commit of the code, with "+" where a Python file differs from it."""
    def git(*flags: str) -> str:
        return subprocess.run(["git", *flags], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--", "*.py")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except OSError:
        return ""                        # no git here


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else []:
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{model}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def stamp() -> dict:
    """Where, when and with what a cell was measured."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {"device": device_name(), "date": time.strftime("%Y-%m-%d"), "versions": versions,
            "commit": git_commit()}


# ---- commands

class Stopped(Exception):
    """A program that was interrupted or failed."""


class Spent(NamedTuple):
    processor: float                     # seconds, user and system, of the child process
    wall: float


def call(command: list[str], log: Path) -> Spent:
    """Run `python command`; its output goes to a file. Raises Stopped unless it ends well. Where this process
    is interrupted, it is ended too."""
    program, *flags = command
    before = os.times()
    began = time.monotonic()
    with open(log, "ab") as out:
        # In a session of its own, so that a Ctrl-C reaches it once: from here.
        process = subprocess.Popen([sys.executable, str(ROOT / program), *flags], stdout=out, stderr=out,
                                   start_new_session=True)
        try:
            status = process.wait()
        except BaseException:
            process.terminate()          # train.py and sample.py then keep what is done
            process.wait()
            raise
    if status:
        lines = log.read_text(errors="replace").splitlines() or [""]
        raise Stopped(f"{shlex.join(['python', *command])}: exit status {status}; {lines[-1][-300:]}")
    after = os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return Spent(processor, time.monotonic() - began)


class Comparison:
    """The cells of one budget, in one folder of runs."""

    def __init__(self, budget: str, runs: Path, results: Path, data_dir: Path, keep_runs: bool):
        self.name = budget
        self.budget = BUDGETS[budget]
        self.runs = runs
        self.results = Results(results)
        self.data_dir = data_dir
        self.keep_runs = keep_runs
        self.judges: dict[str, object] = {}
        self.held_out: dict[str, measures.Examples] = {}

    # -- commands, as a user would type them

    def vae_run(self, data: str) -> Path:
        return self.runs / f"{data}-vae"

    def vae_command(self, data: str) -> list[str]:
        return ["train.py", "--arch", "vae", "--data", data, *self.data_flags, *VAE_FLAGS, *self.budget.vae,
                "--runs-dir", str(self.runs), "--name", self.vae_run(data).name]

    @cached_property
    def data_flags(self) -> list[str]:
        return [] if str(self.data_dir) == "data" else ["--data-dir", str(self.data_dir)]

    def run_folder(self, cell: Cell, seed: int) -> Path:
        return self.runs / f"{cell.run}-{seed}"

    def train_command(self, data: str, cell: Cell, seed: int) -> list[str]:
        every = str(max(1, self.budget.steps // CHECKPOINTS))
        return ["train.py", *cell.train, "--data", data, *self.data_flags, "--vae", str(self.vae_run(data)),
                *self.budget.train, "--steps", str(self.budget.steps), "--seed", str(seed),
                "--val-every", every, "--save-every", every, "--keep", str(CHECKPOINTS),
                "--preview-every", str(self.budget.steps), "--runs-dir", str(self.runs),
                "--name", self.run_folder(cell, seed).name]

    def sample_command(self, cell: Cell, seed: int, evaluation: Evaluation) -> list[str]:
        run = self.run_folder(cell, seed)
        # Picture i is drawn with seed + i; the runs of two seeds share no noise.
        return ["sample.py", str(run), *evaluation.flags, "--n", str(self.budget.n), "--batch-size", "250",
                "--seed", str(seed * self.budget.n), "--out", str(run / f"{evaluation.file}.npz")]

    def commands(self, cell: Cell, seed: int) -> list[list[str]]:
        data = STUDIES[cell.study].data
        return [self.vae_command(data), self.train_command(data, cell, seed),
                *(self.sample_command(cell, seed, evaluation) for evaluation in cell.evaluations)]

    # -- one cell

    def measure(self, cell: Cell, seed: int) -> bool:
        """Train, sample, score and append the result. False where another process holds the run."""
        data = STUDIES[cell.study].data
        self.prepare(data)
        run = self.run_folder(cell, seed)
        try:
            with locked(run.with_name(f"{run.name}.lock")):
                if not self.results.has(cell.study, cell.name, seed):    # another process may just have
                    self.results.append(self.record(data, cell, seed, run))
        except BlockingIOError:
            return False
        return True

    def prepare(self, data: str) -> None:
        """The judge and the VAE, which all cells on this data share; another process waits meanwhile."""
        if data in self.held_out:
            return
        folder = self.vae_run(data)
        self.runs.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f"{folder.name}.compare.lock"), wait=True):
            self.judges[data] = measures.JUDGES[data](self.data_dir)     # may train a classifier, once
            if not (folder / "checkpoint.pt").is_file() or not self.results.has("floor", data, 0):
                command = self.vae_command(data)
                print(shlex.join(["python", *command]), flush=True)
                call(command, folder.with_name(f"{folder.name}.log"))
                rows = self.judges[data].floor(folder, self.budget.n)
                self.results.append({"study": "floor", "cell": data, "seed": 0, "budget": self.name,
                                     "commands": [shlex.join(["python", *command])], "evaluations": rows,
                                     **stamp()})
        self.held_out[data] = measures.examples(data, self.data_dir, folder)

    def record(self, data: str, cell: Cell, seed: int, run: Path) -> dict:
        """All that is known of a cell. What is measured on the way is kept in compare.json in the run's
        folder, for a later process and for other cells of the same run."""
        run.mkdir(exist_ok=True)
        known = read_stamp(run / "compare.json")
        scores = known.setdefault("scores", {})
        missing = any(evaluation.label not in scores for evaluation in cell.evaluations)
        if "training" not in known or (missing and not (run / "checkpoint.pt").is_file()):
            self.train(data, cell, seed, run, known)
        for evaluation in cell.evaluations:
            if evaluation.label not in scores:
                scores[evaluation.label] = self.evaluate(data, cell, seed, run, evaluation)
                write_stamp(run / "compare.json", known)
        if not self.keep_runs:
            for file in run.glob("checkpoint*.pt"):
                file.unlink()
        return {"study": cell.study, "cell": cell.name, "seed": seed, "budget": self.name,
                "commands": [shlex.join(["python", *command]) for command in self.commands(cell, seed)],
                "evaluations": [scores[evaluation.label] for evaluation in cell.evaluations],
                **known["training"]}

    def train(self, data: str, cell: Cell, seed: int, run: Path, known: dict) -> None:
        """Train, or go on, and measure what does not depend on a sampler."""
        command = self.train_command(data, cell, seed)
        print(shlex.join(["python", *command]), flush=True)
        known.setdefault("stamp", stamp())                               # of the code that begins it
        write_stamp(run / "compare.json", known)
        started = last_step(run)
        spent = call(command, run / "compare.log")
        if started < self.budget.steps:
            # For the whole training, from the steps of this process: one that was killed leaves no account.
            share = self.budget.steps / (self.budget.steps - started)
            known["spent"] = {"processor_seconds": spent.processor * share,
                              "wall_seconds": spent.wall * share,
                              "measured_steps": self.budget.steps - started}
            write_stamp(run / "compare.json", known)

        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        curve = []
        for file in sorted(run.glob("checkpoint-*.pt")):
            trained = measures.load_trained(file)
            curve.append({"step": trained.step} | measures.errors(trained, self.held_out[data]))
        trained = measures.load_trained(run / "checkpoint.pt")
        shape = tuple(self.held_out[data].x0.shape[1:])
        validations = [record for record in records if "val_loss" in record]
        straight = measures.straightness(trained, shape, self.judges[data].classes, self.budget.straight)
        known["training"] = {
            "val_loss": validations[-1]["val_loss"], "val_by_time": validations[-1]["val_by_time"],
            "val_curve": [[record["step"], record["val_loss"]] for record in validations],
            "errors": curve, "straightness": straight, "grad_norm": measures.gradient_norms(records),
            "steps": trained.step, "flops_per_example": trained.flops, "parameters": trained.parameters,
            **known.get("spent", {}), **known["stamp"]}
        write_stamp(run / "compare.json", known)
        for file in run.glob("checkpoint-*.pt"):                         # checkpoint.pt stays
            file.unlink()

    def evaluate(self, data: str, cell: Cell, seed: int, run: Path, evaluation: Evaluation) -> dict:
        command = self.sample_command(cell, seed, evaluation)
        print(shlex.join(["python", *command]), flush=True)
        out = Path(command[-1])
        spent = call(command, run / "compare.log")
        images = np.load(out)["arr_0"]
        path = build_path(load_checkpoint(run)["objective"])
        nfe = measures.evaluations(evaluation.sampler, evaluation.steps, evaluation.scale, path)
        score = {"label": evaluation.label, "sampler": evaluation.sampler, "steps": evaluation.steps,
                 "guidance": evaluation.scale, "n": len(images), "nfe": nfe,
                 **self.judges[data].score(images), "processor_seconds": spent.processor,
                 "wall_seconds": spent.wall}
        out.unlink()
        print("  " + "  ".join(f"{name} {score[name]:.3f}" for name in ("agreement", "frechet")), flush=True)
        return score


def last_step(run: Path) -> int:
    """The step of a run's checkpoint, 0 where there is none."""
    if not (run / "checkpoint.pt").is_file():
        return 0
    return torch.load(run / "checkpoint.pt", "cpu", weights_only=True, mmap=True)["step"]


# ---- the program

def listing(comparison: Comparison, cells: list[tuple[Cell, int]]) -> None:
    """Print every cell: done or not, and its commands."""
    done = {(r["study"], r["cell"], r["seed"]) for r in comparison.results.read()}
    for cell, seed in cells:
        state = "done" if (cell.study, cell.name, seed) in done else "not done"
        print(f"{cell.study}: {cell.name}, seed {seed}: {state}")
        for command in comparison.commands(cell, seed):
            print(f"    {shlex.join(['python', *command])}")


def chosen_cells(args: argparse.Namespace) -> list[tuple[Cell, int]]:
    """All cells of the first seed, then all of the next: an early end leaves whole rows."""
    for name in args.only:
        if name not in STUDIES:
            raise ValueError(f"--only {name}: must be one of {', '.join(STUDIES)}")
    seeds = args.seeds or BUDGETS[args.budget].seeds
    return [(cell, seed) for seed in seeds for name in args.only for cell in STUDIES[name].cells]


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--budget", choices=BUDGETS, required=True,
                   help="; ".join(f"{name}: {budget.what}" for name, budget in BUDGETS.items()))
    p.add_argument("--only", nargs="+", default=list(STUDIES), metavar="STUDY",
                   help="; ".join(f"{name}: {study.question}" for name, study in STUDIES.items()))
    p.add_argument("--seeds", type=int, nargs="+", help="(default: those of the budget)")
    p.add_argument("--list", action="store_true", help="print the cells and their commands, and stop")
    p.add_argument("--runs-dir", help="(default: runs/compare-BUDGET)")
    p.add_argument("--results", help="(default: benchmarks/results/compare-BUDGET.jsonl)")
    p.add_argument("--data-dir", default="data", help="folder of the IDX files (default: data)")
    p.add_argument("--drop-runs", action="store_true",
                   help="remove a run's weights once its cell is done; another study on it trains it again")
    args = p.parse_args(argv)
    cells = chosen_cells(args)
    comparison = Comparison(args.budget, Path(args.runs_dir or f"runs/compare-{args.budget}"),
                            Path(args.results or RESULTS / f"compare-{args.budget}.jsonl"),
                            Path(args.data_dir), not args.drop_runs)
    if args.list:
        listing(comparison, cells)
        return 0
    comparison.results.path.parent.mkdir(parents=True, exist_ok=True)
    busy = 0
    for number, (cell, seed) in enumerate(cells, 1):
        if comparison.results.has(cell.study, cell.name, seed):
            continue
        print(f"---- {number} of {len(cells)}, {cell.study}: {cell.name}, seed {seed}", flush=True)
        try:
            if not comparison.measure(cell, seed):
                print("another process is at it", flush=True)
                busy += 1
        except Stopped as error:
            print(error, file=sys.stderr)
            return 1
    if busy:
        print(f"{busy} cells were held by another process; repeat the command for what is left")
    return 0


if __name__ == "__main__":
    sys.exit(program("compare.py", main))
