"""The comparison, measured: cells of {network} x {objective}, each a plain train.py and sample.py command.

    python benchmarks/compare.py --budget minutes            # two cells of each study (from the root)
    OMP_NUM_THREADS=1 python benchmarks/compare.py --budget cpu       # two of them, side by side
    python benchmarks/compare.py --budget cpu --list         # the cells, done or not, and their commands
    python benchmarks/compare.py --budget cpu --only steps --seeds 0
    python benchmarks/compare.py --readme                    # writes all tables and figures

Each finished cell is one line of benchmarks/results/compare-BUDGET.jsonl. The same command goes on after an
interruption: a training from its last checkpoint, a cell from its last evaluation. Nothing is measured twice.
Any number of processes may share a folder of runs; each takes the next cell that no other one holds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import settings
from benchmarks import fashion_mnist, figures, measures
from benchmarks.studies import (BUDGETS, CHECKPOINTS, CLASSIC, GUIDANCE, PARENT, PICTURES, STUDIES,
                                VAE_FLAGS, Cell, Evaluation)
from checkpoints import is_finished
from cli import Parser, integer, one_of, program
from files import fingerprint_tensors, locked, read_stamp, write_atomically, write_stamp
from machine import has_bf16
from networks import build_path
from run import Run

RESULTS = Path(__file__).with_name("results")
WITHOUT_BF16 = " without bf16"               # in a device's name: a CPU that does not multiply it
OF_A_CELL = ("study", "cell", "seed", "budget", "commands", "evaluations")     # not of its training


# ---- the results

class Results:
    """The lines of a JSONL file, one per finished cell. Those with scores by another classifier than the one
    in use are ignored, so that such a cell is measured again."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[dict]:
        records, judges = [], (None, fashion_mnist.classifier_in_use())
        for line in self.path.read_bytes().splitlines() if self.path.is_file() else []:
            try:
                record = json.loads(line)
                record["study"], record["cell"], record["seed"]
            except (ValueError, TypeError, KeyError):
                continue                 # cut off by a kill; the cell is measured again
            if record.get("judge") in judges:
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
    if not has_bf16(torch.device("cpu")):                  # where trainings take about twice as long
        model += WITHOUT_BF16
    return f"{model}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def on_cpu(record: dict) -> bool:
    """Whether a record is from a CPU, to whose name `device_name` adds the threads."""
    return "thread" in record["device"]


def stamp() -> dict:
    """Where, when and with what a cell was measured."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {"device": device_name(), "date": time.strftime("%Y-%m-%d"), "versions": versions,
            "commit": git_commit()}


# ---- commands

class Stopped(Exception):
    """A program that was interrupted or failed."""


def diverged_at(error: Stopped) -> int | None:
    """The step at which a training had a loss or weights that are not finite; None for another reason."""
    found = re.search(r"(?:at|after) step (\d+),? .*last good weights", str(error))
    return int(found[1]) if found else None


def as_typed(command: list[str]) -> str:
    return shlex.join(["python", *command])


def trainings(commands: list[str]) -> list[str]:
    """Those of a cell's commands that train. How many checkpoints they keep makes no other training."""
    return [re.sub(r" --keep \d+", "", command) for command in commands
            if command.startswith("python train.py ")]


class Spent(NamedTuple):
    processor: float                     # seconds, user and system, of the child process
    wall: float

    def on_all(self, steps: int, started: int) -> dict:
        """What a training of so many steps takes, from what this process took for those from `started` on:
        one that was killed before leaves no account."""
        share = steps / (steps - started)
        return {"processor_seconds": self.processor * share, "wall_seconds": self.wall * share,
                "measured_steps": steps - started}


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
        raise Stopped(f"{as_typed(command)}: exit status {status}; {lines[-1][-600:]}")
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
        self.vaes: dict[str, str] = {}   # their fingerprints
        self.held_out: dict[str, measures.Examples] = {}

    # -- commands, as a user would type them

    def vae_run(self, data: str) -> Path:
        return self.runs / f"{data}-vae"

    def prompts_file(self, data: str) -> Path:
        return self.runs / f"{data}.txt"

    def vae_command(self, data: str) -> list[str]:
        return ["train.py", "--arch", "vae", *PICTURES[data].flags, *self.data_flags, *VAE_FLAGS,
                *self.budget.vae, "--runs-dir", str(self.runs), "--name", self.vae_run(data).name]

    @cached_property
    def data_flags(self) -> list[str]:
        return [] if str(self.data_dir) == "data" else ["--data-dir", str(self.data_dir)]

    def run_folder(self, cell: Cell, seed: int) -> Path:
        return self.runs / f"{cell.run}-{seed}"

    def train_command(self, cell: Cell, seed: int) -> list[str]:
        every = str(self.step(cell, 1))
        steps = str(self.steps(cell))
        flags = [str(self.runs / f"{cell.parent}-{seed}") if flag == PARENT else flag for flag in cell.train]
        return ["train.py", *flags, *PICTURES[cell.data].flags, *self.data_flags,
                "--vae", str(self.vae_run(cell.data)), *self.budget.train, "--steps", steps,
                "--seed", str(seed), "--val-every", every, "--save-every", every,
                # more than CHECKPOINTS, as a training that is interrupted saves at other steps, too
                "--keep", str(2 * CHECKPOINTS),
                "--preview-every", steps, "--runs-dir", str(self.runs),
                "--name", self.run_folder(cell, seed).name]

    def train_commands(self, cell: Cell, seed: int) -> list[list[str]]:
        """A cell's training, after those that it begins from."""
        before = self.train_commands(parent_of(cell), seed) if cell.parent else []
        return [*before, self.train_command(cell, seed)]

    def steps(self, cell: Cell) -> int:
        return round(self.budget.steps * cell.part)

    def step(self, cell: Cell, checkpoint: int) -> int:
        """The step of the checkpoint-th of CHECKPOINTS; the last one is the end."""
        return max(1, self.steps(cell) // CHECKPOINTS) * checkpoint

    def source(self, cell: Cell, seed: int, evaluation: Evaluation) -> Path:
        """The checkpoint that is drawn from."""
        name = "checkpoint.pt"
        if evaluation.checkpoint < CHECKPOINTS:
            name = f"checkpoint-{self.step(cell, evaluation.checkpoint):06d}.pt"
        return self.run_folder(cell, seed) / name

    def sample_command(self, cell: Cell, seed: int, evaluation: Evaluation,
                       n: int | None = None) -> list[str]:
        """n: how many samples, to a file of their own; without it, as many as the budget says."""
        run = self.run_folder(cell, seed)
        source = self.source(cell, seed, evaluation)
        if source.name == "checkpoint.pt":
            source = run
        out = evaluation.file if n is None else f"{evaluation.file}-first-{n}"
        prompts = ["--prompts", str(self.prompts_file(cell.data))] if PICTURES[cell.data].prompts else []
        # Picture i is drawn with seed + i; the runs of two seeds share no noise.
        return ["sample.py", str(source), *prompts, *evaluation.flags, *self.budget.sample,
                "--n", str(n or self.budget.n), "--batch-size", "250",
                "--seed", str(seed * self.budget.n), "--out", str(run / f"{out}.npz")]

    def commands(self, cell: Cell, seed: int) -> list[list[str]]:
        return [self.vae_command(cell.data), *self.train_commands(cell, seed),
                *(self.sample_command(cell, seed, evaluation) for evaluation in cell.evaluations)]

    def minutes(self, cell: Cell, trained: set[str]) -> float | None:
        """About how long a cell takes in one process, from its FLOPs. trained: runs that need no training."""
        if self.budget.speed is None:
            return None
        args = settings.parse(self.train_command(cell, 0)[1:])
        flops = flops_per_example(cell)
        calls = sum(network_calls(cell, evaluation) for evaluation in cell.evaluations)
        total = self.budget.n * calls * flops / 3          # the forward pass is a third
        if cell.run not in trained:
            total += self.steps(cell) * args.batch_size * flops
        return total / self.budget.speed / 60

    # -- one cell

    def measure(self, cell: Cell, seed: int) -> bool:
        """Train, sample, score and append the result. False where another process holds the run."""
        self.prepare(cell.data)
        run = self.run_folder(cell, seed)
        try:
            with locked(run.with_name(f"{run.name}.lock")):
                if not self.results.has(cell.study, cell.name, seed):    # another process may just have
                    self.results.append(self.record(cell, seed, run))
        except BlockingIOError:
            return False
        return True

    def prepare(self, data: str) -> None:
        """The judge and the VAE, which all cells on this data share; another process waits meanwhile."""
        if data in self.held_out:
            return
        pictures = PICTURES[data]
        folder = self.vae_run(data)
        self.runs.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f"{folder.name}.compare.lock"), wait=True):
            # may train a classifier, once
            self.judges[data] = measures.JUDGES[pictures.source](self.data_dir, pictures.side)
            if pictures.prompts:
                text = "".join(f"{prompt}\n" for prompt in self.judges[data].prompts(self.budget.n))
                write_atomically(self.prompts_file(data), lambda file: file.write(text.encode()))
            if not finished(folder):
                command = self.vae_command(data)
                print(as_typed(command), flush=True)
                call(command, folder.with_name(f"{folder.name}.log"))
            self.vaes[data] = fingerprint_tensors(measures.load_vae(folder).state_dict())
            self.measure_floor(data, folder)
        self.held_out[data] = measures.examples(pictures.source, pictures.side, self.data_dir, folder,
                                                captioned=pictures.cond == "text")

    def measure_floor(self, data: str, folder: Path) -> None:
        """What reconstructions by the VAE score. A VAE from another machine has other weights and a record of
        its own; the seeds of these records count the VAEs."""
        before = [record for record in self.results.read()
                  if (record["study"], record["cell"]) == ("floor", data)]
        if any(record.get("vae") == self.vaes[data] for record in before):
            return
        rows = self.judges[data].floor(folder, self.budget.n)
        self.results.append({"study": "floor", "cell": data, "seed": len(before), "budget": self.name,
                             "commands": [as_typed(self.vae_command(data))], "evaluations": rows,
                             **self.seen_by(data), **stamp()})

    def seen_by(self, data: str) -> dict:
        """The entries of a record that name the VAE that decodes its pictures and, if there is one, the
        classifier that scores them."""
        fingerprint = self.judges[data].fingerprint
        return {"vae": self.vaes[data]} | ({"judge": fingerprint} if fingerprint else {})

    def record(self, cell: Cell, seed: int, run: Path) -> dict:
        """All that is known of a cell. What is measured on the way is kept in compare.json in the run's
        folder, for a later process and for other cells of the same run."""
        run.mkdir(exist_ok=True)
        known = read_stamp(run / "compare.json")
        seen_by = self.seen_by(cell.data)
        if known.get("judge") != seen_by.get("judge"):     # scores by another classifier
            known |= {"scores": {}, "judge": seen_by.get("judge")}
        scores = known.setdefault("scores", {})
        found = {"study": cell.study, "cell": cell.name, "seed": seed, "budget": self.name,
                 "commands": [as_typed(command) for command in self.commands(cell, seed)]}
        measured = self.measured_before(cell, found["commands"])
        if measured is not None:
            return found | measured
        found |= seen_by
        missing = [self.source(cell, seed, each) for each in cell.evaluations if each.label not in scores]
        if cell.batches or cell.curvature:
            missing.append(run / "checkpoint.pt")
        trained = "training" in known and all(file.is_file() for file in missing)
        if "diverged" not in known and not trained:
            self.train(cell, seed, run, known)
        if "diverged" in known:          # a result like any other, and not tried again
            return found | {"diverged": known["diverged"], **known["stamp"]}
        for evaluation in cell.evaluations:
            if evaluation.label not in scores:
                scores[evaluation.label] = self.evaluate(cell, seed, run, evaluation)
                write_stamp(run / "compare.json", known)
        if cell.batches:
            found["speed"] = measures.speed(measures.load_trained(run / "checkpoint.pt"), cell.batches)
        if cell.curvature:
            found["curvature"] = measures.curvature(measures.load_trained(run / "checkpoint.pt"),
                                                    self.held_out[cell.data], self.budget.straight)
        # The last one stays for other cells of this run.
        for file in run.glob("checkpoint-*.pt" if self.keep_runs else "checkpoint*.pt"):
            file.unlink()
        found |= {"evaluations": [scores[evaluation.label] for evaluation in cell.evaluations],
                  **known["training"]}
        # Scores have the stamp of the training, but a time belongs to the machine that took it.
        return found | (stamp() if cell.batches else {})

    def measured_before(self, cell: Cell, commands: list[str]) -> dict | None:
        """What the line of another study has of the same training and samples, whose run may be gone."""
        for record in self.results.read():
            if trainings(record.get("commands", [])) != trainings(commands):
                continue
            if cell.batches or cell.curvature or "speed" in record:    # which are taken for each cell
                continue
            figures = {name: value for name, value in record.items() if name not in OF_A_CELL}
            if "diverged" in record:
                return figures
            scores = {row["label"]: row for row in record["evaluations"]}
            if all(each.label in scores for each in cell.evaluations):
                return figures | {"evaluations": [scores[each.label] for each in cell.evaluations]}
        return None

    def train(self, cell: Cell, seed: int, run: Path, known: dict) -> None:
        """Train, or go on, and measure what does not depend on a sampler. A training that diverges leaves
        the step of it instead."""
        if cell.parent:
            self.train_parent(cell, seed)
        command = self.train_command(cell, seed)
        print(as_typed(command), flush=True)
        started = last_step(run)
        if started == 0 or "stamp" not in known:
            known["stamp"] = stamp()                                     # of the code that begins it
        write_stamp(run / "compare.json", known)
        try:
            spent = call(command, run / "compare.log")
        except Stopped as error:
            step = diverged_at(error)
            if step is None:
                raise
            known["diverged"] = step
            write_stamp(run / "compare.json", known)
            print(f"  diverged at step {step:,}", flush=True)
            return
        if started < self.steps(cell):
            known["spent"] = spent.on_all(self.steps(cell), started)
            write_stamp(run / "compare.json", known)
        known["training"] = self.figures(cell, run) | known.get("spent", {}) | known["stamp"]
        write_stamp(run / "compare.json", known)

    def train_parent(self, cell: Cell, seed: int) -> None:
        """See that the run which a cell begins from is trained; another process at it is waited for."""
        parent = parent_of(cell)
        run = self.run_folder(parent, seed)
        with locked(run.with_name(f"{run.name}.lock"), wait=True):
            run.mkdir(exist_ok=True)
            known = read_stamp(run / "compare.json")
            if "training" not in known or not (run / "checkpoint.pt").is_file():
                self.train(parent, seed, run, known)
        if "diverged" in known:
            raise Stopped(f"{run}: diverged, so {cell.name} cannot begin from it")

    def figures(self, cell: Cell, run: Path) -> dict:
        """What a finished training has besides samples: losses, errors in common units, costs."""
        records = Run(run).read_metrics()
        held_out = self.held_out[cell.data]
        curve = []
        for part in range(1, CHECKPOINTS + 1):
            file = run / f"checkpoint-{self.step(cell, part):06d}.pt"
            if file.is_file():
                trained = measures.load_trained(file)
                curve.append({"step": trained.step} | measures.errors(trained, held_out))
        trained = measures.load_trained(run / "checkpoint.pt")
        validations = [record for record in records if "val_loss" in record]
        straight = measures.straightness(trained, held_out, self.budget.straight)
        return {
            "val_loss": validations[-1]["val_loss"], "val_by_time": validations[-1]["val_by_time"],
            "val_curve": [[record["step"], record["val_loss"]] for record in validations],
            "errors": curve, "straightness": straight, "grad_norm": measures.gradient_norms(records),
            "steps": trained.step, "batch_size": Run(run).read_settings()["batch_size"],
            "flops_per_example": measures.training_flops(trained.arch, asdict(trained.model.config),
                                                         trained.shape),
            "parameters": sum(p.numel() for p in trained.model.parameters())}

    def draw_pictures(self, out: Path) -> None:
        """Samples of every finished cell of the grid from the same noise, a row each: without guidance, then
        with it."""
        rows = []
        for cell in STUDIES["grid"].cells:
            if not (self.run_folder(cell, 0) / "checkpoint.pt").is_file():
                continue
            parts = []
            for evaluation in cell.evaluations[:2]:
                command = self.sample_command(cell, 0, evaluation, n=10)
                call(command, self.run_folder(cell, 0) / "compare.log")
                parts.append(np.load(command[-1])["arr_0"])
                Path(command[-1]).unlink()
            rows.append((cell.name, parts))
        if not rows:
            raise ValueError(f"--pictures: {self.runs} has no run of the grid; measure it first, with --only "
                             "grid")
        self.save_rows(out, ["no guidance", f"guidance {GUIDANCE:g}"], rows)
        # The README has the two classic objectives only, larger.
        few = [(name, parts[:1]) for name, parts in rows if name.partition(" ")[2] in CLASSIC]
        if few:
            self.save_rows(out.with_name("samples.png"), ["no guidance"], few, zoom=4)

    @staticmethod
    def save_rows(out: Path, heads: list[str], rows: list[tuple[str, list[np.ndarray]]],
                  zoom: int = 2) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        picture = figures.rows_of_pictures(heads, rows, zoom)
        write_atomically(out, lambda file: picture.save(file, "PNG", optimize=True))
        print(f"{out}: {len(rows)} cells")

    def evaluate(self, cell: Cell, seed: int, run: Path, evaluation: Evaluation) -> dict:
        command = self.sample_command(cell, seed, evaluation)
        print(as_typed(command), flush=True)
        out = Path(command[-1])
        spent = call(command, run / "compare.log")
        images = np.load(out)["arr_0"]
        scores = self.judges[cell.data].score(images)
        out.unlink()
        print("  " + "  ".join(f"{name} {value:.3f}" for name, value in scores.items()), flush=True)
        return {"label": evaluation.label, "sampler": evaluation.sampler, "steps": evaluation.steps,
                "guidance": evaluation.scale, "shift": evaluation.shift, "checkpoint": evaluation.checkpoint,
                "n": len(images), "nfe": network_calls(cell, evaluation), **scores,
                "processor_seconds": spent.processor, "wall_seconds": spent.wall}


def parent_of(cell: Cell) -> Cell:
    return next(each for study in STUDIES.values() for each in study.cells if each.run == cell.parent)


def network_calls(cell: Cell, evaluation: Evaluation) -> int:
    """How often an evaluation calls the network for one picture."""
    path = build_path(settings.objective_config(settings.parse(list(cell.train))))
    return measures.evaluations(evaluation.sampler, evaluation.steps, evaluation.scale, path)


@cache
def flops_per_example(cell: Cell) -> int:
    """Of a forward and backward pass, by the cell's preset and the size of its latents."""
    args = settings.parse([*cell.train, *PICTURES[cell.data].flags])
    side = PICTURES[cell.data].side // 4                   # what the default VAE makes of it
    config = settings.ARCHITECTURES[args.arch].presets[args.preset] | settings.expert_config(args)
    if args.cond == "text":
        width = settings.text_config(args)["config"]["width"]
        config = config | {"context_width": width, "pooled_width": width}
    elif args.cond == "class":
        config = config | {"num_classes": 10}
    return measures.training_flops(args.arch, config, (4, side, side))


def checkpoint_of(run: Path) -> dict:
    """Of a run; {} where there is none."""
    file = run / "checkpoint.pt"
    return torch.load(file, "cpu", weights_only=True, mmap=True) if file.is_file() else {}


def last_step(run: Path) -> int:
    """The step of a run's checkpoint, 0 where there is none."""
    return checkpoint_of(run).get("step", 0)


def finished(run: Path) -> bool:
    """Whether a run is trained to its end."""
    return is_finished(checkpoint_of(run))


# ---- the program

def listing(comparison: Comparison, cells: list[tuple[Cell, int]]) -> None:
    """Print every cell: done or not, about how long it takes, and its commands."""
    done = {(r["study"], r["cell"], r["seed"]) for r in comparison.results.read()}
    trained = {(cell.run, seed) for cell, seed in cells if (cell.study, cell.name, seed) in done}
    total = 0.0
    for cell, seed in cells:
        state = "done"
        if (cell.study, cell.name, seed) not in done:
            state = "not done"
            minutes = comparison.minutes(cell, {run for run, other in trained if other == seed})
            if minutes is not None:
                state += f", about {minutes:.0f} minutes"
                total += minutes
            trained.add((cell.run, seed))
        print(f"{cell.study}: {cell.name}, seed {seed}: {state}")
        for command in comparison.commands(cell, seed):
            print(f"    {as_typed(command)}")
    if total:
        print(f"about {total / 60:.1f} hours of one process are left, in addition to the VAEs; two processes "
              "side by side take half of it")


def chosen_cells(args: argparse.Namespace) -> list[tuple[Cell, int]]:
    """All cells of the first seed, then all of the next: an early end leaves whole rows."""
    budget = BUDGETS[args.budget]
    if args.seeds:
        return [(cell, seed) for seed in args.seeds for name in args.only
                for cell in budget.cells(STUDIES[name])]
    return [(cell, seed) for i, seed in enumerate(budget.seeds) for name in args.only
            for cell in budget.cells(STUDIES[name]) if i < STUDIES[name].seeds]


def main(argv: list[str] | None = None) -> int:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--budget", type=one_of(BUDGETS),
                   help="; ".join(f"{name}: {budget.what}" for name, budget in BUDGETS.items()))
    p.add_argument("--only", type=one_of(STUDIES), nargs="+", default=list(STUDIES), metavar="STUDY",
                   help="; ".join(f"{name}: {study.question}" for name, study in STUDIES.items()))
    p.add_argument("--seeds", type=integer(0), nargs="+",
                   help="(default: those of the budget, of which some studies take only the first two)")
    p.add_argument("--list", action="store_true", help="print the cells and their commands, and stop")
    p.add_argument("--pictures", action="store_true",
                   help="draw ten samples of each trained cell of the grid, into benchmarks/pictures, and "
                        "stop")
    p.add_argument("--readme", action="store_true",
                   help="write the tables and figures of README.md and benchmarks/RESULTS.md from the "
                        "results (default: of --budget cpu), and stop")
    p.add_argument("--runs-dir", help="(default: runs/compare-BUDGET)")
    p.add_argument("--results", help="(default: benchmarks/results/compare-BUDGET.jsonl)")
    p.add_argument("--data-dir", default="data", help="folder of the IDX files (default: data)")
    p.add_argument("--drop-runs", action="store_true",
                   help="remove a run's weights once its cell is done; another study on it trains it again")
    args = p.parse_args(argv)
    if args.readme:
        # here, because it reads what this program writes
        from benchmarks import ladder, tables
        results = Path(args.results or RESULTS / f"compare-{args.budget or 'cpu'}.jsonl")
        found = Results(results).read()
        if not found:            # the documents would lose all their figures
            raise ValueError(f"{results}: has no results that the classifier in use has scored; measure some "
                             "first (--budget), or give --results")
        tables.write(ROOT, found, Results(ladder.RESULTS).read())
        return 0
    if args.budget is None:
        p.error("--budget is required: " + ", ".join(BUDGETS))
    cells = chosen_cells(args)
    comparison = Comparison(args.budget, Path(args.runs_dir or f"runs/compare-{args.budget}"),
                            Path(args.results or RESULTS / f"compare-{args.budget}.jsonl"),
                            Path(args.data_dir), not args.drop_runs)
    if args.list:
        listing(comparison, cells)
        return 0
    if args.pictures:
        comparison.draw_pictures(RESULTS.with_name("pictures") / "grid-samples.png")
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
