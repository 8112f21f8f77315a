"""What benchmarks/compare.py compares: one row per cell, each a training and what is drawn from it.

    python benchmarks/compare.py --budget cpu --list         # the same as commands (from the root)

A study answers one question with its cells; a cell is a plain train.py command and some sample.py commands.
Cells with the same training share one run, by its name, and it is trained once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple


CHECKPOINTS = 8      # at which a training is measured, evenly over its steps
PARENT = "PARENT"    # among a cell's flags: the folder of the run that it begins from


class Pictures(NamedTuple):
    """A data set at one size. All cells on it share a VAE."""
    source: str                          # --data
    side: int = 32
    cond: str | None = None              # --cond, where it is not that of the architecture
    prompts: bool = False                # samples are drawn for the judge's prompts

    @property
    def flags(self) -> list[str]:
        """Of train.py, for the VAE and for the networks."""
        size = [] if self.side == 32 else ["--image-size", str(self.side)]
        cond = [] if self.cond is None else ["--cond", self.cond]
        return ["--data", self.source, *size, *cond]


PICTURES = {
    "fashion-mnist": Pictures("fashion-mnist"),
    "fashion-mnist-64": Pictures("fashion-mnist", side=64),
    "corners": Pictures("corners", cond="none"),
    "scenes": Pictures("shapes", cond="text", prompts=True),
}


class Evaluation(NamedTuple):
    sampler: str
    steps: int
    scale: float = 1.0                   # of the guidance
    shift: float | None = None           # of the sampling times; None: that of the training
    checkpoint: int = CHECKPOINTS        # how many of CHECKPOINTS equal parts of the training are done

    @property
    def label(self) -> str:
        shift = "" if self.shift is None else f", shift {self.shift:g}"
        part = "" if self.checkpoint == CHECKPOINTS else f", {self.checkpoint} of {CHECKPOINTS} trained"
        return f"{self.sampler} {self.steps}, guidance {self.scale:g}{shift}{part}"

    @property
    def file(self) -> str:               # what a kill leaves half-drawn is continued
        return "-".join([*(flag.removeprefix("--") for flag in self.flags), str(self.checkpoint)])

    @property
    def flags(self) -> list[str]:
        shift = [] if self.shift is None else ["--shift", f"{self.shift:g}"]
        return ["--sampler", self.sampler, "--steps", str(self.steps), "--cfg", f"{self.scale:g}", *shift]


class Cell(NamedTuple):
    study: str
    name: str
    run: str                             # cells of equal training flags name the same run, trained once
    train: tuple[str, ...]               # flags of train.py, beyond those of the budget
    evaluations: tuple[Evaluation, ...]
    data: str = "fashion-mnist"          # a row of PICTURES
    parent: str | None = None            # another cell's run, which is trained before
    part: float = 1.0                    # of the budget's steps
    batches: tuple[int, ...] = ()        # sizes of batches whose evaluation is timed
    curvature: bool = False              # whether that of the network's flow is measured


class Study(NamedTuple):
    question: str
    cells: tuple[Cell, ...]
    seeds: int = 3                       # at most so many: what costs most is measured with fewer


class Budget(NamedTuple):
    what: str
    vae: tuple[str, ...]                 # flags of train.py for the VAE, which all cells share
    train: tuple[str, ...]               # and for every network
    steps: int
    n: int                               # samples per evaluation
    seeds: tuple[int, ...]
    straight: int                        # trajectories whose straightness is measured
    sample: tuple[str, ...] = ()         # flags of sample.py for every evaluation
    speed: float | None = None           # FLOP per second that one process reaches; None: not known
    most_cells: int | None = None        # per study
    most_evaluations: int | None = None  # per cell

    def cells(self, study: Study) -> list[Cell]:
        """The cells of a study, or the ends of them; their evaluations likewise."""
        return [cell._replace(evaluations=tuple(ends(cell.evaluations, self.most_evaluations)))
                for cell in ends(study.cells, self.most_cells)]


def ends(items: tuple, most: int | None) -> list:
    """At most so many of the items, evenly from the first to the last."""
    if most is None or len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(1, most - 1))] for i in range(most)]


BUDGETS = {
    # Everything is tiny; otherwise the samples at the end of every training, and encoding 60,000 pictures,
    # would take most of the time.
    "minutes": Budget("about a quarter of an hour: two cells of each study, no figure means anything",
                      ("--steps", "20", "--vae-preset", "tiny"), ("--preset", "tiny", "--batch-size", "8"),
                      16, 40, (0,), 4, most_cells=2, most_evaluations=2),
    # One thread trains a small network with more examples as far in the same time as a large one with fewer.
    "cpu": Budget("two processes of one thread each: about twelve hours, four for grid and steps",
                  ("--steps", "4500"), ("--ema", "0.03"), 2400, 2000, (0, 1, 2), 100,
                  sample=("--precision", "auto"), speed=6e10),
    "gpu": Budget("one GPU: ready, but not run so far",
                  ("--steps", "20000"), ("--ema", "0.03", "--batch-size", "256"), 20_000, 10_000,
                  (0, 1, 2, 3, 4), 500),
}
VAE_FLAGS = ("--kl-weight", "1e-5")

# Four sizes of each network, pairwise of equal FLOPs, the five objectives, and the size that they share. Each
# keeps the learning rate of its defaults.
SIZES = {"unet": ("size-1", "size-2", "size-3", "matched"), "dit": ("size-1", "size-2", "size-3", "small")}
NETWORKS = {arch: ("--arch", arch, "--preset", presets[1]) for arch, presets in SIZES.items()}
OBJECTIVES = {
    "ddpm eps": ("--objective", "ddpm", "--prediction", "eps"),
    "ddpm v": ("--objective", "ddpm", "--prediction", "v"),
    "ddpm x0": ("--objective", "ddpm", "--prediction", "x0"),
    "rf uniform": ("--objective", "rf", "--density", "uniform"),
    "rf logit-normal": ("--objective", "rf", "--density", "logit_normal"),
}
CLASSIC = ("ddpm eps", "rf logit-normal")    # the objective that each family is known by
# The first-order solver of each path. Euler is the straight path's DDIM: with it, both paths can be compared
# by one and the same solver.
FIRST = {"ddpm": "ddim", "rf": "euler"}
# As sample.py by default, without guidance and with a little; Euler beside Heun.
DEFAULT_SAMPLERS = {
    "ddpm": (Evaluation("ddim", 50), Evaluation("ddim", 50, 1.5)),
    "rf": (Evaluation("heun", 10), Evaluation("heun", 10, 1.5), Evaluation("euler", 50)),
}
HEADLINES = (("unet", "ddpm eps"), ("dit", "ddpm eps"), ("dit", "rf logit-normal"))


def grid_cell(study: str, network: str, objective: str, evaluations: tuple[Evaluation, ...]) -> Cell:
    run = f"{network}-{objective}".replace(" ", "-")
    return Cell(study, f"{network} {objective}", run, NETWORKS[network] + OBJECTIVES[objective], evaluations)


def grid_cells() -> Iterator[Cell]:
    for network, objective in itertools.product(NETWORKS, OBJECTIVES):
        yield grid_cell("grid", network, objective, DEFAULT_SAMPLERS[objective.split()[0]])


COUNTS = (1, 2, 4, 6, 8, 10, 15, 20, 30, 50, 100)    # evaluations of the network


def step_cells() -> Iterator[Cell]:
    """Runs of the grid, at about 1 to 100 evaluations of the network: the headlines by four or five
    solvers, then all others by the first-order one and by a multistep one."""
    others = [pair for pair in itertools.product(NETWORKS, OBJECTIVES) if pair not in HEADLINES]
    for network, objective in (*HEADLINES, *others):
        first = FIRST[objective.split()[0]]
        # All solvers make the same first step, so one of them stands for all at one evaluation.
        rows = [Evaluation(first, steps) for steps in COUNTS]
        rows += [Evaluation("unipc_3", steps) for steps in COUNTS[1:-2]]
        if (network, objective) in HEADLINES:
            rows += [Evaluation("dpmpp_2m", steps) for steps in COUNTS[1:-2]]
            # of 2 steps - 1 evaluations
            rows += [Evaluation("heun", (count + 1) // 2) for count in COUNTS[2:-1]]
            if first == "ddim":
                rows += [Evaluation("ddpm", steps) for steps in (10, 20, 50, 100)]      # ancestral
        yield grid_cell("steps", network, objective, tuple(rows))


def guidance_cells() -> Iterator[Cell]:
    """A few steps and more, with several scales, by the default solver of each path."""
    for network, objective in (HEADLINES[0], HEADLINES[-1]):
        solver, counts = ("ddim", (10, 20, 50)) if objective.startswith("ddpm") else ("heun", (3, 5, 10))
        yield grid_cell("guidance", network, objective, tuple(
            Evaluation(solver, count, scale) for scale in (1.0, 1.5, 2.0, 3.0) for count in counts))


NOISY = ("ddpm", "reverse_sde", "dpmpp_2m_sde")      # samplers that add noise of their own


def noise_cells() -> Iterator[Cell]:
    """Both networks, both objectives, by the first-order solver and by samplers that add noise, which either
    path allows."""
    for network, objective in itertools.product(NETWORKS, ("ddpm eps", "rf logit-normal")):
        solvers = (FIRST[objective.split()[0]], *NOISY)
        yield grid_cell("noise", network, objective, tuple(
            Evaluation(solver, steps) for solver in solvers for steps in (10, 20, 50)))


# 50 first-order steps, the same solver on either path: what further studies compare trainings by.
FIRST_ORDER = {path: (Evaluation(solver, 50),) for path, solver in FIRST.items()}
# What can be chosen on either path, the grid's choices first. ddpm has scaled_linear without --schedule, and
# eps where no prediction is named.
SCHEDULES = {
    "ddpm eps": OBJECTIVES["ddpm eps"],
    "ddpm linear": OBJECTIVES["ddpm eps"] + ("--schedule", "linear"),
    "ddpm cosine": OBJECTIVES["ddpm eps"] + ("--schedule", "cosine"),
    "ddpm v": OBJECTIVES["ddpm v"],
    "ddpm linear, v": OBJECTIVES["ddpm v"] + ("--schedule", "linear"),
    "ddpm cosine, v": OBJECTIVES["ddpm v"] + ("--schedule", "cosine"),
    "rf uniform": OBJECTIVES["rf uniform"],
    "rf logit-normal": OBJECTIVES["rf logit-normal"],
    "rf mode": ("--objective", "rf", "--density", "mode"),
    "rf cosmap": ("--objective", "rf", "--density", "cosmap"),
}
RATES = {"unet": 2e-3, "dit": 4e-3}      # the defaults, which the grid has
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)     # of them, an octave apart


# Per path: its flags, and what its network predicts in the grid, with a loss of the same quantity.
OWN = {"ddpm": (("--objective", "ddpm"), "v", "ddpm v"),
       "rf": (("--objective", "rf", "--density", "uniform"), "velocity", "rf uniform")}


def exchanges(own: str) -> list[tuple[str, str]]:
    """Pairs (prediction, loss) in which one is the path's own and the other is not."""
    return [("eps", own), ("x0", own), (own, "eps"), (own, "x0")]


def weighting_cells() -> Iterator[Cell]:
    for path, (flags, own, objective) in OWN.items():
        for prediction, loss in ((own, own), *exchanges(own)):
            cell = grid_cell("weighting", "dit", objective, FIRST_ORDER[path])
            if (prediction, loss) != (own, own):
                cell = cell._replace(run=f"dit-{path}-{prediction}-loss-{loss}", train=NETWORKS["dit"] + flags
                                     + ("--prediction", prediction, "--loss", loss))
            yield cell._replace(name=weighting_name(path, prediction, loss))


def weighting_name(path: str, prediction: str, loss: str) -> str:
    return f"{path}, predicts {prediction}, loss of {loss}"


def schedule_cells() -> Iterator[Cell]:
    for network, objective in itertools.product(NETWORKS, SCHEDULES):
        name = f"{network} {objective}"
        yield Cell("schedules", name, name.replace(",", "").replace(" ", "-"),
                   NETWORKS[network] + SCHEDULES[objective], FIRST_ORDER[objective.split()[0]])


def rate_cells() -> Iterator[Cell]:
    for network, objective, factor in itertools.product(NETWORKS, ("ddpm eps", "rf logit-normal"), FACTORS):
        cell = grid_cell("learning rates", network, objective, FIRST_ORDER[objective.split()[0]])
        if factor != 1:
            cell = cell._replace(run=f"{cell.run}-rate-{factor:g}",
                                 train=cell.train + ("--lr", f"{factor * RATES[network]:g}"))
        yield cell._replace(name=f"{cell.name} x {factor:g}")


SHIFTS = (1.0, 1.5, 2.0, 3.0)
SHIFT_STEPS = (10, 25)                   # of Euler: few, where the times matter more, and many


def shift_cells() -> Iterator[Cell]:
    """The times shifted in training, in sampling, and in both, at two sizes of the same pictures."""
    for data, shift in itertools.product(("fashion-mnist", "fashion-mnist-64"), SHIFTS):
        cell = grid_cell("shift", "dit", "rf logit-normal", ())
        if data != "fashion-mnist":
            cell = cell._replace(run=f"{data}-{cell.run}", data=data)
        if shift == 1:
            sampled = (None, *SHIFTS[1:])
        else:
            cell = cell._replace(run=f"{cell.run}-shift-{shift:g}",
                                 train=cell.train + ("--shift", f"{shift:g}"))
            sampled = (None, 1.0)
        yield cell._replace(name=f"{PICTURES[data].side} px, trained with {shift:g}", evaluations=tuple(
            Evaluation("euler", steps, shift=each) for steps in SHIFT_STEPS for each in sampled))


LITTLE = 6000                            # a tenth of the pictures
LITTLE_SIZES = (1, 2)                    # indices of the sizes that are trained on them too


def size_cells() -> Iterator[Cell]:
    """Four sizes of each network, pairwise of equal training FLOPs; two of them on a tenth of the data."""
    chosen = [(None, size) for size in range(len(SIZES["unet"]))] + [(LITTLE, size) for size in LITTLE_SIZES]
    for (limit, size), network in itertools.product(chosen, NETWORKS):
        preset = SIZES[network][size]
        cell = grid_cell("sizes", network, "rf logit-normal", FIRST_ORDER["rf"])
        if preset not in NETWORKS[network]:
            cell = cell._replace(run=f"{cell.run}-{preset}", train=("--arch", network, "--preset", preset)
                                 + OBJECTIVES["rf logit-normal"])
        if limit:
            cell = cell._replace(run=f"{cell.run}-limit-{limit}", train=cell.train + ("--limit", str(limit)))
        yield cell._replace(name=size_name(network, size, limit))


def size_name(network: str, size: int, limit: int | None) -> str:
    return f"{network}, size {size + 1} of 4" + (f", {limit:,} pictures" if limit else "")


CORNER_NETWORKS = {
    "unet, attention nowhere": ("--arch", "unet", "--preset", "size-2-nowhere"),
    "unet, attention at the bottom": ("--arch", "unet", "--preset", "size-2-bottom"),
    "unet, attention everywhere": ("--arch", "unet", "--preset", "size-2-everywhere"),
    "dit": NETWORKS["dit"],
}


CORNERS_AT = Evaluation("euler", 25)


def corner_cells() -> Iterator[Cell]:
    """One objective for all. Samples are drawn at every checkpoint."""
    for network, flags in CORNER_NETWORKS.items():
        yield Cell("corners", network, f"corners-{flags[-1]}", flags + OBJECTIVES["rf logit-normal"], tuple(
            CORNERS_AT._replace(checkpoint=part) for part in range(1, CHECKPOINTS + 1)), "corners")


GUIDANCE = 1.5                           # of the pairs of reflow, and that MeanFlow learns


def few_step_cells() -> Iterator[Cell]:
    """One step by MeanFlow, straighter paths by reflow, from a run of the grid; its own samples beside."""
    parent = grid_cell("few steps", "dit", "rf logit-normal", (
        *(Evaluation("euler", steps) for steps in (1, 2, 4, 8, 50)),
        *(Evaluation("unipc_3", steps) for steps in (2, 4, 8)),
        *(Evaluation("euler", steps, GUIDANCE) for steps in (1, 2, 4, 25)),
        *(Evaluation("unipc_3", steps, GUIDANCE) for steps in (2, 4, 8))))
    few = (*(Evaluation("euler", steps) for steps in (1, 2, 4, 8)), Evaluation("unipc_3", 4))
    common = (*NETWORKS["dit"], "--lr", "1e-3")
    meanflow = (*common, "--objective", "meanflow", "--guidance", f"{GUIDANCE}", "--init-from", PARENT)
    one = tuple(Evaluation("jump", steps) for steps in (1, 2, 4))

    def reflow(scale: float, pairs: int = 10000) -> tuple[str, ...]:
        return (*common, *OBJECTIVES["rf uniform"], "--reflow-pairs", f"{pairs}", "--reflow", PARENT,
                "--reflow-cfg", f"{scale:g}")

    def child(name: str, of: str, train: tuple[str, ...], evaluations: tuple[Evaluation, ...],
              part: float = 0.5) -> Cell:
        return Cell("few steps", name, f"dit-{name.replace(' ', '-')}", train, evaluations, parent=of,
                    part=part)

    yield child("meanflow", parent.run, meanflow, one)
    yield child("reflow", parent.run, reflow(GUIDANCE), few)
    yield parent
    yield child("reflow twice", "dit-reflow", reflow(1), few)
    # Whether what they miss is a matter of training. Twice the pairs, not four times: drawing them takes
    # longer than training on them.
    yield child("longer meanflow", parent.run, meanflow, one, 2.0)
    yield child("longer reflow", parent.run, reflow(GUIDANCE, 20000), few, 1.0)


PROMPTED = {"mmdit": "joint attention", "unet": "cross-attention"}
PROMPT_KINDS = {"1 seen": "one shape", "1 unseen": "one, new combination", "2 seen": "two shapes",
                "2 unseen": "two, new combination"}
PROMPTED_AT = Evaluation("heun", 10, 3.0)


def prompt_cells() -> Iterator[Cell]:
    """Both ways from words to pictures, with one objective and one text encoder."""
    for network, name in PROMPTED.items():
        yield Cell("prompts", f"{network}, {name}", f"scenes-{network}",
                   ("--arch", network, "--preset", "size-2-text", *OBJECTIVES["rf logit-normal"]),
                   (PROMPTED_AT,), "scenes", part=2.0)


# All that a token uses is as wide as the MLP of the grid's network: 4 experts of 88 units for 352.
MIXTURE = ("--experts", "8", "--top-k", "2", "--shared-experts", "2")
MIXTURES = {
    "8 experts, token choice": ("--moe-blocks", "all"),
    "8 experts in the deeper half, token choice": ("--moe-blocks", "deep"),
    "8 experts, expert choice": ("--moe-blocks", "all", "--router", "expert"),
    "8 experts, race": ("--moe-blocks", "all", "--router", "race"),
}


def expert_cells() -> Iterator[Cell]:
    """A network of the grid, and the same with experts, at equal active FLOPs."""
    dense = grid_cell("experts", "dit", "rf logit-normal", DEFAULT_SAMPLERS["rf"])
    yield dense._replace(name="dense")
    for name, flags in MIXTURES.items():
        run = f"{dense.run}-{'-'.join(flags)}".replace("--", "")
        yield dense._replace(name=name, run=run, train=dense.train + MIXTURE + flags)


def curvature_cells() -> Iterator[Cell]:
    """The grid again, without samples."""
    for network, objective in itertools.product(NETWORKS, OBJECTIVES):
        yield grid_cell("curvature", network, objective, ())._replace(curvature=True)


def speed_cells() -> Iterator[Cell]:
    """How long an evaluation of the network takes; how many a picture needs is known from "steps"."""
    for network, objective in (HEADLINES[0], HEADLINES[-1]):
        yield grid_cell("speed", network, objective, ())._replace(batches=(1, 4, 16, 64, 256))


STUDIES = {
    "grid": Study("network x objective: equal data, equal training FLOPs", tuple(grid_cells())),
    "steps": Study("claim 3: how many evaluations, and with which solver", tuple(step_cells())),
    "guidance": Study("claim 3: guidance scale against evaluations", tuple(guidance_cells())),
    "noise": Study("claim 2: what a sampler's own noise changes, on either path", tuple(noise_cells())),
    "curvature": Study("claim 2: whose sampling paths are straighter, in common coordinates",
                       tuple(curvature_cells()), seeds=2),
    "weighting": Study("claim 2: the prediction apart from the weighting of the loss",
                       tuple(weighting_cells()), seeds=2),
    "schedules": Study("claim 1: what the choice of the training times or of the noise schedule changes",
                       tuple(schedule_cells())),
    "learning rates": Study("claim 1: over how many octaves of the learning rate a training works",
                            tuple(rate_cells()), seeds=2),
    "shift": Study("claim 7: whether larger pictures need shifted times", tuple(shift_cells()), seeds=2),
    "sizes": Study("claim 4: which network gains more by its size, and which needs less data",
                   tuple(size_cells()), seeds=2),
    "few steps": Study("claim 9: one step by MeanFlow, a few by reflow", tuple(few_step_cells())),
    "prompts": Study("claim 6: which parts of a prompt the picture shows", tuple(prompt_cells())),
    "experts": Study("mixture of experts against the dense network of equal active FLOPs",
                     tuple(expert_cells())),
    "speed": Study("claim 8: seconds per evaluation, on a machine that does nothing else",
                   tuple(speed_cells())),
    "corners": Study("claim 5: whether two far corners agree in colour and kind", tuple(corner_cells())),
}
