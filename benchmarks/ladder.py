"""Minutes to quality on two cores: what each change of the recipe gains on Fashion-MNIST, from nothing.

    python benchmarks/ladder.py --list                       # the rungs and their commands (from the root)
    python benchmarks/ladder.py --base dit --seeds 0 1       # measures every rung against the defaults
    OMP_NUM_THREADS=1 python benchmarks/ladder.py --rungs default no-cooldown       # two of them side by side
    python benchmarks/ladder.py --table                      # the rows measured so far

A rung is one flag, or two that only make sense together, added to a plain train.py or sample.py command.
Where a change became a default, the rung takes it away. Each finished rung is one line of
benchmarks/results/ladder.jsonl, with the minutes that its VAE and its network took; the same command goes on
after an interruption, and nothing is measured twice. Rungs that differ only in sampling share a training.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.compare import (WITHOUT_BF16, Results, Stopped, as_typed, call, device_name, last_step,
                                on_cpu, stamp)
from benchmarks.measures import JUDGES
from cli import Parser, integer, one_of, program
from files import locked, read_stamp, write_stamp

RESULTS = Path(__file__).with_name("results") / "ladder.jsonl"
DATA = "fashion-mnist"


class Base(NamedTuple):
    """What all rungs of a family have in common: flags of train.py and of sample.py."""
    train: tuple[str, ...]
    steps: int
    sample: tuple[str, ...]
    agreement: float         # the target, which one and the same rung must reach ...
    frechet: float           # ... with a distance of at most this
    what: str | None = None  # in words, if it is not the recipe
    whole: bool = True       # False: a part of a training, which is not held against the targets
    default: bool = True     # whether it is trained with train.py's defaults, but for the steps
    vae: tuple[str, ...] = ()     # flags of train.py for the VAE


class Rung(NamedTuple):
    what: str
    train: tuple[str, ...] = ()              # flags of train.py, in addition to those of the base
    vae: tuple[str, ...] = ()                # the same, but they change the VAE: it is trained anew
    sample: tuple[str, ...] | None = None    # flags of sample.py, instead of those of the base
    candidate: str | None = None             # no flag, but a row of benchmarks/candidates.py
    share: float = 1.0                       # of the base's steps, where a step takes more or less time
    arch: str | None = None                  # the only family that it goes with
    undoes: bool = False                     # a default, which became one by what this rung shows


def guided(scale: str) -> tuple[str, ...]:
    """Flags of sample.py: guidance at this scale, except while most of a latent is noise."""
    return ("--cfg", scale, "--interval", "0", "0.8")


def noisy(scale: str) -> tuple[str, ...]:
    """Flags as of `guided`, with DPM-Solver++ 2M for the reverse SDE, which adds noise in every step."""
    return (*guided(scale), "--sampler", "dpmpp_2m_sde", "--steps", "20")


GUIDED = guided("2")
BASES = {
    "dit": Base(("--arch", "dit", "--objective", "rf"), 4000, GUIDED, agreement=0.965, frechet=5.0),
    "unet": Base(("--arch", "unet", "--objective", "ddpm"), 2500, GUIDED, agreement=0.965, frechet=8.0),
}
# About a third of the training, to choose among many changes: the target stays that of the whole one.
BASES["dit-short"] = BASES["dit"]._replace(steps=1500, whole=False)
# A smaller network makes 1.6 to 1.8 times as many steps in a minute: a try at the target for the time.
BASES["dit-small"] = BASES["dit"]._replace(
    train=BASES["dit"].train + ("--preset", "size-3"), steps=4500, what="a smaller network and more steps",
    default=False)
# Where the average of the weights was chosen: earlier than the rows of `dit`, on another VAE, and with
# OMP_NUM_THREADS=1, without which this is the base `dit`.
BASES["dit-one-core"] = BASES["dit"]._replace(what="the recipe, each training on one core")
# What gained alone, together. The rates are twice the defaults. Compiled, the U-Net is no faster on a CPU.
TOGETHER = dict(vae=("--kl-weight", "1e-4", "--cooldown", "1"), default=False)
BASES["dit-together"] = BASES["dit-small"]._replace(
    train=BASES["dit-small"].train + ("--compile", "--cooldown", "1", "--lr", "8e-3"), sample=noisy("1.8"),
    what="a smaller network and more steps, compiled; both learning rates fall from the first step on, the "
         "network's from twice the peak; ten times the KL weight; guidance 1.8 by a sampler that adds noise",
    **TOGETHER)
BASES["unet-together"] = BASES["unet"]._replace(
    train=BASES["unet"].train + ("--cooldown", "1", "--lr", "4e-3"), sample=guided("3"),
    what="both learning rates fall from the first step on, the network's from twice the peak; ten times the "
         "KL weight; guidance 3", **TOGETHER)
VAE_STEPS = 4500
FLOOR = 1.2              # the target for the VAE
MINUTES = 15             # on two cores, from nothing: the target for the time
RUN = "RUN"              # among flags of sample.py: the run's folder
CHECKPOINTS = 8          # that every run keeps, evenly over its steps

RUNGS = {
    "default": Rung("the recipe: train.py's defaults but for the numbers of steps"),
    # sampling: no training of their own
    "no-interval": Rung("guidance 2 at all times", sample=("--cfg", "2")),
    "weaker": Rung("guidance 1.5 at all times", sample=("--cfg", "1.5")),
    "unguided": Rung("no guidance", sample=("--cfg", "1")),
    "interval-0.1": Rung("no guidance in the last tenth of the time either",
                         sample=("--cfg", "2", "--interval", "0.1", "0.8")),
    **{f"guidance-{scale}": Rung(f"guidance {scale}", sample=guided(scale))
       for scale in ("2.05", "2.1", "2.2", "2.5", "3")},
    **{f"noisy-{scale}": Rung(f"guidance {scale}, and 20 steps of a sampler that adds noise",
                              sample=noisy(scale)) for scale in ("1.8", "1.95", "2", "2.5")},
    "stronger-and-later": Rung("guidance 2.2, but none in the last tenth of the time",
                               sample=("--cfg", "2.2", "--interval", "0.1", "0.8")),
    "autoguidance": Rung("guidance by the network of a quarter of the training, conditions and all",
                         sample=("--cfg", "2", "--guide", f"{RUN}/checkpoint-QUARTER.pt")),
    # training
    "constant-average": Rung("the weights are averaged with a constant decay, the former default",
                             train=("--ema", "0.998"), undoes=True),
    "average-0.06": Rung("drawn from the average of twice the width",
                         sample=(*GUIDED, "--ema", "0.06")),
    "average-0.01": Rung("the weights are averaged over a third of the width", train=("--ema", "0.01")),
    "average-0.02": Rung("the weights are averaged over two thirds of the width", train=("--ema", "0.01"),
                         sample=(*GUIDED, "--ema", "0.02")),
    "no-cooldown": Rung("the learning rate stays at its peak", train=("--cooldown", "0"), undoes=True),
    "full-cooldown": Rung("the learning rate falls from the first step on", train=("--cooldown", "1")),
    **{f"full-cooldown-{scale}": Rung("the learning rate falls from the first step on, and guidance "
                                      f"{scale}", train=("--cooldown", "1"), sample=guided(scale))
       for scale in ("2.1", "2.2", "2.5", "3")},
    **{f"full-cooldown-noisy-{scale}": Rung(
        f"the learning rate falls from the first step on, guidance {scale}, and 20 steps of a sampler that "
        "adds noise", train=("--cooldown", "1"), sample=noisy(scale)) for scale in ("1.8", "2")},
    "half-rate": Rung("half the peak learning rate", train=("--lr", "2e-3"), arch="dit"),
    "double-rate": Rung("twice the peak learning rate", train=("--lr", "8e-3"), arch="dit"),
    "half-batch": Rung("half the batch, and so more steps in the same time", train=("--batch-size", "32"),
                       share=1.9, arch="dit"),
    "smaller": Rung("a smaller network, and so more steps in the same time", train=("--preset", "size-3"),
                    share=2.0, arch="dit"),
    "x0-velocity": Rung("the network predicts x0, and the loss is that of the velocity",
                        train=("--prediction", "x0", "--loss", "velocity")),
    # the VAE
    "latent-noise": Rung("the decoder is trained with noise on the latent", vae=("--latent-noise", "0.5")),
    "vae-full-cooldown": Rung("the learning rate of the VAE falls from the first step on",
                              vae=("--cooldown", "1")),
    "equivariance": Rung("the VAE also reconstructs at half the size", vae=("--equivariance", "0.5")),
    "three-channels": Rung("latents of three channels instead of four", vae=("--latent-channels", "3")),
    "stronger-kl": Rung("ten times the KL weight", vae=("--kl-weight", "1e-4")),
    "patch-1": Rung("four times as many tokens, and so fewer steps in the same time",
                    train=("--patch", "1"), share=0.275, arch="dit"),
    # one less of what a base has together
    "without-rate": Rung("without twice the peak", train=("--lr", "4e-3"), arch="dit-together"),
    "without-cooldown": Rung("without the network's fall from the first step on", train=("--cooldown", "0.5"),
                             arch="dit-together"),
    "without-kl": Rung("without ten times the KL weight", vae=("--kl-weight", "1e-5"), arch="dit-together"),
    "without-noise": Rung("without noise in sampling, by 10 steps of Heun's method with guidance 2.1",
                          sample=guided("2.1"), arch="dit-together"),
    # no flags
    "muon": Rung("Muon for the matrices, whose steps take longer", candidate="muon", share=0.6, arch="dit"),
    "direction": Rung("the loss also has the velocity's direction", candidate="direction", arch="dit"),
    "contrastive": Rung("contrastive flow matching", candidate="contrastive", arch="dit"),
    "value-residual": Rung("the first block's values are mixed into all others", candidate="value-residual",
                           arch="dit"),
    "balanced": Rung("all classes in every batch", candidate="balanced"),
}


def rungs_of(base: str) -> list[str]:
    """The names of those that go with this base, and that it does not have already."""
    own = BASES[base]

    def is_new(rung: Rung) -> bool:
        repeats = [flags and set(flags) <= set(its)
                   for flags, its in ((rung.train, own.train), (rung.vae, own.vae))]
        return rung.sample != own.sample and not any(repeats)

    def replaces_only_what_it_names(rung: Rung) -> bool:
        """Flags of sampling are written for GUIDED: beside others, they may only change the scale."""
        return (own.sample == GUIDED or rung.sample is None or base == rung.arch
                or rung.sample[2:] == own.sample[2:])

    return [name for name, rung in RUNGS.items()
            if (rung.arch is None or base.startswith(rung.arch)) and is_new(rung)
            and replaces_only_what_it_names(rung)]


def studies_of(base: str) -> tuple[str, str]:
    """What its records are filed under: on most machines, and on CPUs without bf16. Those have a table and a
    default of their own, because there the trainings are in fp32 and take longer."""
    return base, base + WITHOUT_BF16


class Ladder:
    """The rungs of one base, in one folder of runs."""

    def __init__(self, base: str, runs: Path, results: Path, data_dir: Path, n: int,
                 extra: tuple[str, ...] = (), vae_steps: int = VAE_STEPS, steps: int | None = None):
        self.name = base
        self.study = studies_of(base)[WITHOUT_BF16 in device_name()]
        self.base = BASES[base]
        self.runs = runs
        self.results = Results(results)
        self.data_dir = data_dir
        self.n = n
        self.extra = extra                   # flags of train.py for every rung: a test makes it tiny
        self.vae_steps = vae_steps
        self.length = steps                  # None: those of the base
        self.judge = None

    # -- commands, as a user would type them

    def folder(self, rung: Rung) -> Path:
        """The folder of runs. Rungs with the same VAE share it, and so the VAE."""
        return self.runs / ("-".join(self.vae_flags(rung)).replace("--", "") or "default")

    def vae_flags(self, rung: Rung) -> tuple[str, ...]:
        return self.base.vae + rung.vae

    def run(self, rung: Rung, seed: int) -> Path:
        parts = [self.name, *rung.train, *([rung.candidate] if rung.candidate else []), str(seed)]
        return self.folder(rung) / "-".join(parts).replace("--", "")

    @staticmethod
    def program(rung: Rung, name: str) -> list[str]:
        return ["benchmarks/candidates.py", rung.candidate, name] if rung.candidate else [name]

    def vae(self, rung: Rung) -> Path:
        """The run of the VAE, which is trained alone, so that its minutes are known."""
        return self.folder(rung) / f"{DATA}-vae"

    def shared_flags(self, rung: Rung) -> list[str]:
        """Flags of train.py for the VAE and for the network."""
        flags = ["--data", DATA, "--runs-dir", str(self.folder(rung))]
        if str(self.data_dir) != "data":
            flags += ["--data-dir", str(self.data_dir)]
        return flags

    def vae_command(self, rung: Rung) -> list[str]:
        return ["train.py", "--arch", "vae", *self.shared_flags(rung), *self.vae_flags(rung),
                "--steps", str(self.vae_steps), "--name", self.vae(rung).name]

    def train_command(self, rung: Rung, seed: int) -> list[str]:
        steps = self.steps(rung)
        return [*self.program(rung, "train.py"), *self.base.train, *self.shared_flags(rung),
                "--vae", str(self.vae(rung)), "--steps", str(steps), *rung.train, *self.extra,
                "--save-every", str(self.part(steps)), "--keep", str(CHECKPOINTS),
                "--seed", str(seed), "--name", self.run(rung, seed).name]

    @staticmethod
    def part(steps: int) -> int:
        return max(1, steps // CHECKPOINTS)

    def sample_command(self, rung: Rung, seed: int) -> list[str]:
        flags = self.base.sample if rung.sample is None else rung.sample
        # Rungs share runs, so each has its own file: an interrupted one must not be in another's way.
        name = "-".join(flags).replace("--", "").replace("/", "-")
        quarter = f"{self.part(self.steps(rung)) * CHECKPOINTS // 4:06d}"
        flags = [flag.replace(RUN, str(self.run(rung, seed))).replace("QUARTER", quarter) for flag in flags]
        # Picture i is drawn with seed + i; the runs of two seeds share no noise.
        return [*self.program(rung, "sample.py"), str(self.run(rung, seed)), *flags,
                "--n", str(self.n), "--batch-size", "250", "--precision", "auto",
                "--seed", str(seed * self.n), "--out", str(self.run(rung, seed) / f"ladder-{name}.npz")]

    def commands(self, rung: Rung, seed: int) -> list[list[str]]:
        return [self.vae_command(rung), self.train_command(rung, seed), self.sample_command(rung, seed)]

    # -- one rung

    def measure(self, name: str, seed: int) -> bool:
        """Train what is not trained, sample, score and append. False where another process is at it."""
        rung = RUNGS[name]
        run = self.run(rung, seed)
        run.mkdir(parents=True, exist_ok=True)
        if self.judge is None:
            self.judge = JUDGES[DATA](self.data_dir)
        try:
            with locked(run.with_name(f"{run.name}.lock")):
                if self.results.has(self.study, name, seed):       # another process may just have
                    return True
                vae = self.vae(rung)
                vae.mkdir(exist_ok=True)
                with locked(vae.with_name("vae.lock"), wait=True):
                    vae_spent = self.timed(self.vae_command(rung), vae, self.vae_steps)
                    floor = self.floor(vae)
                spent = self.timed(self.train_command(rung, seed), run, self.steps(rung))
                self.score(name, rung, seed, {"vae": vae_spent, "network": spent, "floor": floor})
        except BlockingIOError:
            return False
        return True

    def steps(self, rung: Rung) -> int:
        return round((self.length or self.base.steps) * rung.share)

    def timed(self, command: list[str], run: Path, steps: int) -> dict:
        """Train, or go on; and what the whole training took. It is kept beside the run, because the rungs
        that share the run need it too."""
        file = run / "ladder.json"
        known = read_stamp(file)
        if "spent" not in known:
            known.setdefault("stamp", stamp())                     # of the code that begins it
            write_stamp(file, known)
            print(as_typed(command), flush=True)
            started = last_step(run)
            spent = call(command, run / "ladder.log")
            if started >= steps:
                raise Stopped(f"{run} was trained by another program, so its minutes are not known; remove "
                              "it, or give another --runs-dir")
            known["spent"] = spent.on_all(steps, started)
            write_stamp(file, known)
        return known["spent"] | known["stamp"]

    def floor(self, vae: Path) -> dict:
        """What no network on this VAE can exceed: the scores of its 10,000 reconstructions."""
        known = read_stamp(vae / "ladder.json")
        if known.get("judge") != self.judge.fingerprint:           # or by another classifier
            rows = self.judge.floor(vae, self.n)
            known |= {"floor": next(row for row in rows if "psnr" in row), "judge": self.judge.fingerprint}
            write_stamp(vae / "ladder.json", known)
        return known["floor"]

    def score(self, name: str, rung: Rung, seed: int, spent: dict) -> None:
        command = self.sample_command(rung, seed)
        print(as_typed(command), flush=True)
        call(command, self.run(rung, seed) / "ladder.log")
        out = Path(command[-1])
        figures = self.judge.score(np.load(out)["arr_0"])
        out.unlink()
        self.results.append({"study": self.study, "cell": name, "seed": seed, "n": self.n, **figures, **spent,
                             "judge": self.judge.fingerprint,
                             "commands": [as_typed(each) for each in self.commands(rung, seed)], **stamp()})
        print("  " + "  ".join(f"{key} {value:.3f}" for key, value in figures.items()), flush=True)


# ---- the rows measured so far

PARTS = ("vae", "network")


def minutes(record: dict, kind: str, parts: tuple[str, ...] = PARTS) -> float:
    """Minutes of the trainings, "processor" or "wall". A rung that ran beside others is judged by the former,
    which a busy machine changes less; only the latter, on two free cores, is the target's."""
    return sum(record[part][f"{kind}_seconds"] for part in parts) / 60


def had(record: dict, threads: str, parts: tuple[str, ...] = PARTS) -> bool:
    """Whether these parts were trained with these threads: "1 thread" or "2 threads"."""
    return all(record[part]["device"].endswith(threads) for part in parts)


def wall_minutes(records: list[dict]) -> list[float]:
    """Of those that had two cores."""
    return [minutes(record, "wall") for record in records if had(record, "2 threads")]


def took(records: list[dict]) -> str:
    """The table's minutes: "10", "21.2 on two cores", both, or, where only the network had one core, "9, and
    the VAE's". Of a GPU only the name, because trainings ran side by side there."""
    # Processor time is of one core only: two threads wait for each other, and that counts too.
    one_core = [minutes(record, "processor") for record in records if had(record, "1 thread")]
    two_cores = wall_minutes(records)
    network = ("network",)
    networks = [minutes(record, "processor", network) for record in records
                if had(record, "1 thread", network)]
    texts = []
    if one_core:
        texts.append(f"{np.mean(one_core):.0f}")
    if two_cores:
        texts.append(f"{np.mean(two_cores):.1f} on two cores")
    if networks and not texts:
        texts.append(f"{np.mean(networks):.0f}, and the VAE's")
    gpus = {record["network"]["device"] for record in records if not on_cpu(record["network"])}
    return ", ".join(texts + [f"on {name}" for name in sorted(gpus)])


def spread(values: list[float], digits: int) -> str:
    """The mean and, of several seeds, the range: "4.2 (4.1 to 4.4)"."""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return f"{mean} (one seed)"
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def gains(found: list[dict], defaults: list[dict]) -> str:
    """The mean differences from the default's agreement and distance, over the seeds that both have:
    "+0.010, -0.35"."""
    by_seed = {record["seed"]: record for record in defaults}
    pairs = [(record, by_seed[record["seed"]]) for record in found if record["seed"] in by_seed]
    if not pairs or found is defaults:
        return ""
    return ", ".join(f"{np.mean([mine[name] - its[name] for mine, its in pairs]):+.{digits}f}"
                     for name, digits in (("agreement", 3), ("frechet", 2)))


def base_of(study: str) -> Base:
    return BASES[study.removesuffix(WITHOUT_BF16)]


def table(records: list[dict], study: str) -> str:
    """Markdown: a row per rung that is measured, the default first; "" for none. study: one of `studies_of`.
    The commits are those of the trainings."""
    heads = ["change", "minutes of one core", "agreement", "Fréchet", "gain", "a default?", "floor",
             "quality met", "trained at"]
    rows = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    base = base_of(study)
    by_rung = {name: [record for record in records if (record["study"], record["cell"]) == (study, name)]
               for name in RUNGS}
    for name, found in by_rung.items():
        if not found:
            continue
        rung = RUNGS[name]
        commits = sorted({record["network"]["commit"] for record in found})
        good = [record["agreement"] >= base.agreement and record["frechet"] <= base.frechet
                for record in found]
        what = described(rung)
        is_default = "no, its opposite" if rung.undoes else "no"
        if name == "default":
            what = base.what or what
            is_default = "yes" if base.default else "no"
        rows.append(f"| {what} | {took(found)} "
                    f"| {spread([record['agreement'] for record in found], 3)} "
                    f"| {spread([record['frechet'] for record in found], 2)} "
                    f"| {gains(found, by_rung['default'])} | {is_default} "
                    f"| {np.mean([record['floor']['frechet'] for record in found]):.2f} "
                    f"| {sum(good)} of {len(good)} | {', '.join(commits)} |")
    return "\n".join(rows) if len(rows) > 2 else ""


def against_targets(records: list[dict], study: str) -> str:
    """A sentence on what the default reaches and misses, by its means; "" where it is not measured, or is no
    whole training."""
    found = [record for record in records if (record["study"], record["cell"]) == (study, "default")]
    base = base_of(study)
    if not found or not base.whole:
        return ""
    goals = [("agreement", [record["agreement"] for record in found], base.agreement, 3),
             ("distance", [record["frechet"] for record in found], base.frechet, 2),
             ("floor", [record["floor"]["frechet"] for record in found], FLOOR, 2),
             ("minutes on two cores", wall_minutes(found), MINUTES, 1)]
    parts = []
    for name, values, target, digits in goals:
        if not values:
            parts.append(f"{name} not measured (target {target:g})")
            continue
        reached = np.mean(values)
        short = target - reached if name == "agreement" else reached - target
        digits += 0 < short < 0.5 * 10**-digits                    # a narrow miss is not rounded away
        parts.append(f"{name} {reached:.{digits}f}, " + (
            f"missed by {short:.{digits}f}" if short > 0 else "met") + f" (target {target:g})")
    return f"The first row against the targets: {'; '.join(parts)}."


def described(rung: Rung) -> str:
    """What it is, and by which flags."""
    flags = []
    if rung.candidate:
        flags.append(f"`benchmarks/candidates.py {rung.candidate}`")
    if rung.vae or rung.train:
        flags.append(f"`{shlex.join([*rung.vae, *rung.train])}`")
    if rung.sample is not None:
        flags.append(f"drawn with `{shlex.join(rung.sample)}`")
    return f"{rung.what} ({', '.join(flags)})" if flags else rung.what


# ---- the program

def main(argv: list[str] | None = None) -> int:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", type=one_of(BASES), default="dit", help="the family (default: dit)")
    p.add_argument("--rungs", type=one_of(RUNGS), nargs="+", metavar="RUNG",
                   help="; ".join(f"{name}: {rung.what}" for name, rung in RUNGS.items())
                        + " (default: all that go with the family)")
    p.add_argument("--seeds", type=integer(0), nargs="+", default=[0], help="(default: 0)")
    p.add_argument("--n", type=integer(2, 10_000), default=2000, help="samples per rung (default: 2000)")
    p.add_argument("--list", action="store_true", help="print the rungs and their commands, and stop")
    p.add_argument("--table", action="store_true", help="print what is measured so far, and stop")
    p.add_argument("--runs-dir", default="runs/ladder", help="(default: runs/ladder)")
    p.add_argument("--results", default=str(RESULTS), help="(default: benchmarks/results/ladder.jsonl)")
    p.add_argument("--data-dir", default="data", help="folder of the IDX files (default: data)")
    args = p.parse_args(argv)
    ladder = Ladder(args.base, Path(args.runs_dir), Path(args.results), Path(args.data_dir), args.n)
    if args.table:
        print(table(ladder.results.read(), ladder.study) or f"nothing is measured yet of {ladder.study}")
        return 0
    ladder.results.path.parent.mkdir(parents=True, exist_ok=True)
    status = 0
    for seed in args.seeds:                  # all rungs of the first seed, then those of the next
        for name in args.rungs or rungs_of(args.base):
            done = ladder.results.has(ladder.study, name, seed)
            print(f"---- {name}, seed {seed}: {'done' if done else 'not done'}", flush=True)
            if args.list:
                for command in ladder.commands(RUNGS[name], seed):
                    print(f"    {as_typed(command)}")
                continue
            try:
                if not done and not ladder.measure(name, seed):
                    print("another process is at it; repeat the command when that is done", flush=True)
            except Stopped as error:         # the next rung may well work
                print(error, file=sys.stderr)
                status = 1
    return status


if __name__ == "__main__":
    sys.exit(program("ladder.py", main))
