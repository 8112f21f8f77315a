"""What people say of the two families, and what the results of benchmarks/compare.py say of it.

    python benchmarks/compare.py --readme                    # writes the claims' table (from the root)

A claim is a list of comparisons, each between two sets of values, one value per seed. A comparison is decided
by the seeds' spread: `decide`. The verdict is a function of these decisions: `verdict`. The opening table
shows the first of the comparisons whose answer is the most frequent one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.studies import (CHECKPOINTS, CORNER_NETWORKS, CORNERS_AT, FACTORS, FIRST_ORDER, GUIDANCE,
                                LITTLE, LITTLE_SIZES, NETWORKS, NOISY, OBJECTIVES, PROMPT_KINDS, PROMPTED,
                                PROMPTED_AT, SCHEDULES, SHIFT_STEPS, SIZES, size_name)

# 97.5 % quantiles of Student's t by degrees of freedom; beyond the table, the last one, a little too high.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
USABLE = 1.5         # a learning rate works if its distance is within this factor of the best of any
WITHIN = 1.1         # a distance within this factor of the best counts as equal quality
EARLY = 2            # of CHECKPOINTS equal parts of a training

RULE = ("A comparison is decided where the two means differ by more than the pooled spread of the seeds "
        "explains (Student's t, 95 %, each comparison by itself), and only with two seeds or more on each "
        "side; of two seeds each, the means must differ by 4.3 times the standard error, so ranges that do "
        "not overlap can still be not significant. A claim is true if more than half of its comparisons are "
        "as claimed and none is decided against it, and false if it is the other way round; it depends where "
        "some are decided for it and some against it; else it is not shown.")


# ---- the rule

class Comparison(NamedTuple):
    """Whether `ours` is better than `theirs`, each with one value per seed."""
    what: str
    ours: list[float]
    theirs: list[float]
    higher: bool = False                 # is better; else lower
    margin: float = 1.0                  # "no worse than": theirs, a lower one, may be better by this factor


def decide(comparison: Comparison) -> bool | None:
    """True or False where the seeds decide it, None where the difference is within their spread."""
    ours = np.array(comparison.ours, dtype=float)
    theirs = comparison.margin * np.array(comparison.theirs, dtype=float)
    difference = ours.mean() - theirs.mean()
    freedom = len(ours) + len(theirs) - 2
    squares = ((ours - ours.mean())**2).sum() + ((theirs - theirs.mean())**2).sum()
    error = math.sqrt(squares / freedom * (1 / len(ours) + 1 / len(theirs)))
    if abs(difference) <= STUDENT[min(freedom, len(STUDENT)) - 1] * error:
        return None
    return bool((difference > 0) == comparison.higher)


def measured(comparison: Comparison, seeds: int = 2) -> bool:
    """Whether each side has values of so many seeds; a decision needs two."""
    return min(len(comparison.ours), len(comparison.theirs)) >= seeds


def answer_to(comparison: Comparison) -> str:
    """One of ANSWERS, or UNDECIDED."""
    return ANSWERS[decide(comparison)] if measured(comparison) else UNDECIDED


# The usual telling's contrary first; "not decided yet" where a comparison lacks its second seed.
VERDICTS = ("false", "not shown", "depends", "true", "not decided yet", "not measured yet")
ANSWERS = {True: "yes", False: "no", None: "not significant"}
UNDECIDED = "undecided"


def verdict(comparisons: list[Comparison]) -> str:
    """One of VERDICTS."""
    if not any(measured(comparison, 1) for comparison in comparisons):
        return "not measured yet"
    if not all(map(measured, comparisons)):
        return "not decided yet"
    answers = [decide(comparison) for comparison in comparisons]
    if True in answers and False in answers:
        return "depends"
    if 2 * answers.count(True) > len(answers):
        return "true"
    return "false" if 2 * answers.count(False) > len(answers) else "not shown"


def typical(comparisons: list[Comparison]) -> Comparison:
    """The first comparison whose answer is the most frequent one; of equally frequent ones, the earlier."""
    known = [comparison for comparison in comparisons if measured(comparison, 1)]
    answers = list(map(answer_to, known))
    return known[answers.index(max(answers, key=answers.count))]


def counted(comparisons: list[Comparison]) -> str:
    """How the comparisons were decided: "2 yes, 1 no"."""
    answers = [answer_to(comparison) for comparison in comparisons]
    return ", ".join(f"{answers.count(answer)} {answer}" for answer in (*ANSWERS.values(), UNDECIDED)
                     if answer in answers)


# ---- the results, by study, cell and seed

class Measured:
    def __init__(self, records: list[dict]):
        self.records = records

    def of(self, study: str, cell: str) -> list[dict]:
        """One record per seed."""
        found = [record for record in self.records if (record["study"], record["cell"]) == (study, cell)]
        return sorted(found, key=lambda record: record["seed"])

    def values(self, study: str, cell: str, get: Callable[[dict], float | None]) -> list[float]:
        """What `get` finds in each seed's record; a training that diverged has nothing."""
        found = [get(record) for record in self.of(study, cell) if "diverged" not in record]
        return [value for value in found if value is not None]


def score(label: str, name: str = "frechet") -> Callable[[dict], float | None]:
    """For `Measured.values`: a figure of the evaluation with this label."""
    def get(record: dict) -> float | None:
        return next((row[name] for row in record["evaluations"] if row["label"] == label), None)
    return get


def first_order(objective: str) -> str:
    """The label of 50 first-order steps without guidance: the same solver on either path."""
    return FIRST_ORDER[objective.split()[0]][0].label


def distance(measured: Measured, network: str, objective: str) -> list[float]:
    return measured.values("grid", f"{network} {objective}", score(first_order(objective)))


def curve(record: dict, scales: tuple[float, ...] = (1.0,), noise: bool = False) -> list[tuple[int, float]]:
    """(evaluations, the smallest distance of any solver with at most so many), with guidance of these scales
    only. noise: also of samplers that add noise, which not every cell of "steps" has."""
    rows = sorted((row["nfe"], row["frechet"]) for row in record["evaluations"]
                  if row["guidance"] in scales and (noise or row["sampler"] not in NOISY))
    best, found = math.inf, []
    for nfe, frechet in rows:
        best = min(best, frechet)
        found.append((nfe, best))
    return found


def needed(record: dict) -> int:
    """The fewest evaluations whose distance is within WITHIN of the best that the run reaches."""
    points = curve(record)
    return next(nfe for nfe, frechet in points if frechet <= WITHIN * points[-1][1])


def best_within(nfe: int, scales: tuple[float, ...] = (1.0,),
                noise: bool = False) -> Callable[[dict], float | None]:
    """For `Measured.values`: the smallest distance with at most so many evaluations."""
    def get(record: dict) -> float | None:
        found = [frechet for count, frechet in curve(record, scales, noise) if count <= nfe]
        return found[-1] if found else None
    return get


# ---- the claims

def straight_path(m: Measured) -> list[Comparison]:
    """With uniform times on either path, so that the density of the times is not compared as well."""
    return [Comparison(f"{network} against {objective.removeprefix('ddpm ')}",
                       distance(m, network, "rf uniform"), distance(m, network, objective))
            for network in NETWORKS for objective in OBJECTIVES if objective.startswith("ddpm")]


def calls_to_equal_quality(curves: list[list[tuple[int, float]]]) -> list[int]:
    """Of each curve, the fewest evaluations with a distance that all of them reach: WITHIN of the best of the
    worst one."""
    common = WITHIN * max(points[-1][1] for points in curves)
    return [next(nfe for nfe, frechet in points if frechet <= common) for points in curves]


def few_evaluations(m: Measured) -> list[Comparison]:
    ours = "dit rf logit-normal"
    found = []
    for theirs in ("dit ddpm eps", "unet ddpm eps"):
        calls = [calls_to_equal_quality(curves) for curves in by_seed(m, "steps", [ours, theirs], curve)
                 if None not in curves]
        found += [
            Comparison(f"evaluations to a distance that both reach, {ours} against {theirs}",
                       [each for each, _ in calls], [each for _, each in calls]),
            Comparison(f"distance of {ours} after at most 10 evaluations, against {theirs} after at most 50",
                       m.values("steps", ours, best_within(10)), m.values("steps", theirs, best_within(50)),
                       margin=WITHIN),
            Comparison("the same, where the sampler may add noise",
                       m.values("noise", ours, best_within(10, noise=True)),
                       m.values("noise", theirs, best_within(50, noise=True)), margin=WITHIN)]
    return found


def euler_is_enough(m: Measured) -> list[Comparison]:
    return [Comparison(f"Euler against {solver}, {nfe} evaluations",
                       m.values("steps", "dit rf logit-normal", score(f"euler {nfe}, guidance 1")),
                       m.values("steps", "dit rf logit-normal", score(f"{solver} {nfe}, guidance 1")),
                       margin=WITHIN)
            for solver in ("dpmpp_2m", "unipc_3") for nfe in (4, 10, 20)]


def by_seed(m: Measured, study: str, cells: list[str], get: Callable[[dict], float | None]) -> list[list]:
    """Per seed that has all of these cells, what `get` finds in each; None for a training that diverged."""
    found: dict[int, list] = {}
    for cell in cells:
        for record in m.of(study, cell):
            found.setdefault(record["seed"], []).append(None if "diverged" in record else get(record))
    return [values for _, values in sorted(found.items()) if len(values) == len(cells)]


def variation(values: list[float | None]) -> float | None:
    """Standard deviation over the mean."""
    known = [value for value in values if value is not None]
    return float(np.std(known, ddof=1) / np.mean(known)) if len(known) == len(values) else None


def schedule_spread(m: Measured, network: str, schedules: list[str]) -> list[float]:
    """Relative deviation of the distance over these schedules, one per seed."""
    cells = [f"{network} {schedule}" for schedule in schedules]
    values = [variation(each) for each in by_seed(m, "schedules", cells, score(first_order(schedules[0])))]
    return [value for value in values if value is not None]


def usable_rates(m: Measured, network: str, objectives: tuple[str, str]) -> list[list[int]]:
    """Per objective, how many of the learning rates reach a distance within USABLE of the best that any of
    both objectives' rates reaches; one number per seed that has all of them."""
    cells = [f"{network} {objective} x {factor:g}" for objective in objectives for factor in FACTORS]
    found = [[], []]
    for values in by_seed(m, "learning rates", cells, lambda record: record["evaluations"][0]["frechet"]):
        enough = USABLE * min((value for value in values if value is not None), default=0.0)
        for counts, part in zip(found, (values[:len(FACTORS)], values[len(FACTORS):])):
            counts.append(sum(value is not None and value <= enough for value in part))
    return found


def easier_training(m: Measured) -> list[Comparison]:
    """Per network, the spread over schedules, and how many learning rates work. A schedule of rf is a density
    of the training times; one of ddpm is its path, which sampling takes as well."""
    found = []
    flow, diffusion = ([name for name in SCHEDULES if name.startswith(path)] for path in ("rf", "ddpm"))
    # With eps, samples from the cosine schedule begin by a division by almost 0, however well it was learned.
    milder = [name for name in diffusion if name != "ddpm cosine"]
    for network in NETWORKS:
        what = f"{network}, relative deviation of the distance over its schedules"
        ours = schedule_spread(m, network, flow)
        rates = usable_rates(m, network, ("rf logit-normal", "ddpm eps"))
        found += [Comparison(what, ours, schedule_spread(m, network, diffusion)),
                  Comparison(f"{what}, diffusion without the cosine one", ours,
                             schedule_spread(m, network, milder)),
                  Comparison(f"{network}, usable learning rates of {len(FACTORS)}", *rates, higher=True)]
    return [each for each in found if each.ours or each.theirs]


def calmer_gradients(m: Measured) -> list[Comparison]:
    """With uniform times on either path, as in straight_path."""
    def spread(record: dict) -> float | None:
        return record["grad_norm"].get("spread")

    return [Comparison(f"{network} against {objective.removeprefix('ddpm ')}",
                       m.values("grid", f"{network} rf uniform", spread),
                       m.values("grid", f"{network} {objective}", spread))
            for network in NETWORKS for objective in OBJECTIVES if objective.startswith("ddpm")]


def early(m: Measured) -> list[Comparison]:
    """After a quarter of the training: the U-Net against the transformer."""
    def error(record: dict) -> float | None:
        step = record["steps"] // CHECKPOINTS * EARLY      # which a training that was interrupted may lack
        return next((row["velocity"] for row in record["errors"] if row["step"] == step), None)

    return [Comparison(f"{objective}, unet against dit", m.values("grid", f"unet {objective}", error),
                       m.values("grid", f"dit {objective}", error)) for objective in OBJECTIVES]


class Size(NamedTuple):
    flops: float                         # of the whole training
    frechet: float
    velocity: float                      # error, in common units


def sizes(m: Measured, network: str, limit: int | None) -> list[list[Size]]:
    """Per seed that has all sizes of a network, these: four, and two with `limit` pictures."""
    def of(record: dict) -> Size:
        flops = record["flops_per_example"] * record["steps"] * record["batch_size"]
        return Size(flops, record["evaluations"][0]["frechet"], record["errors"][-1]["velocity"])

    measured = LITTLE_SIZES if limit else range(len(SIZES[network]))
    cells = [size_name(network, size, limit) for size in measured]
    return [found for found in by_seed(m, "sizes", cells, of) if None not in found]


def power_law(x: list[float], y: list[float]) -> tuple[float, float]:
    """(a, b) of y = a * x^b, by least squares of the logarithms."""
    b, log_a = np.polyfit(np.log(x), np.log(y), 1)
    return float(np.exp(log_a)), float(b)


def exponents(m: Measured, network: str, figure: str) -> list[float]:
    """One per seed."""
    return [power_law([size.flops for size in found], [getattr(size, figure) for size in found])[1]
            for found in sizes(m, network, None)]


def crossover(m: Measured, figure: str) -> float | None:
    """The training FLOPs at which the two networks' mean power laws cross; None where there is no data, or
    where it lies more than a factor of ten outside what is measured."""
    laws, costs = [], []
    for network in NETWORKS:
        points = [size for found in sizes(m, network, None) for size in found]
        if not points:
            return None
        costs += [point.flops for point in points]
        laws.append(power_law([point.flops for point in points],
                              [getattr(point, figure) for point in points]))
    (a, b), (c, d) = laws
    if b == d:
        return None
    log = math.log(c / a) / (b - d)
    return math.exp(log) if math.log(min(costs) / 10) < log < math.log(10 * max(costs)) else None


def scaling(m: Measured) -> list[Comparison]:
    return [Comparison(f"exponent of the {what}", exponents(m, "dit", figure),
                       exponents(m, "unet", figure))
            for what, figure in (("velocity error", "velocity"), ("distance", "frechet"))]


def little_data(m: Measured) -> list[Comparison]:
    """On a tenth of the pictures."""
    return [Comparison(f"size {size + 1}", *(
        m.values("sizes", size_name(network, size, LITTLE), score(first_order("rf")))
        for network in ("unet", "dit"))) for size in LITTLE_SIZES]


def far_corners(m: Measured) -> list[Comparison]:
    """Share of samples whose corners agree, early in the training and at its end."""
    without, *others = CORNER_NETWORKS
    found = []
    for when, part in (("after a quarter", EARLY), ("at the end", CHECKPOINTS)):
        get = score(CORNERS_AT._replace(checkpoint=part).label, "agreement")
        found += [Comparison(f"{name}, {when}", m.values("corners", name, get),
                             m.values("corners", without, get), higher=True) for name in others]
    return found


def shifted_times(m: Measured) -> list[Comparison]:
    """At 64 pixels, by 2: sqrt(m / n) for four times as many pixels (Esser et al. 2024, eq. 23)."""
    def cell(trained: int, label: str) -> list[float]:
        return m.values("shift", f"64 px, trained with {trained}", score(label))

    plain = "euler {}, guidance 1"
    found = [Comparison(f"in training and sampling, {steps} steps", cell(2, plain.format(steps)),
                        cell(1, plain.format(steps))) for steps in SHIFT_STEPS]
    few = plain.format(SHIFT_STEPS[0])
    return [*found, Comparison("in sampling only, 10 steps", cell(1, f"{few}, shift 2"), cell(1, few)),
            Comparison("in training only, 10 steps", cell(2, f"{few}, shift 1"), cell(1, few))]


def follows_prompts(m: Measured) -> list[Comparison]:
    joint, cross = (f"{network}, {name}" for network, name in PROMPTED.items())
    return [Comparison(what, m.values("prompts", joint, score(PROMPTED_AT.label, figure)),
                       m.values("prompts", cross, score(PROMPTED_AT.label, figure)), higher=True)
            for figure, what in PROMPT_KINDS.items()]


FASTER = ("dit rf logit-normal", "unet ddpm eps")            # what claim 8 compares


class Pace(NamedTuple):
    evaluations: int                     # that a picture needs
    milliseconds: dict[int, float]       # per picture, by the size of the batch


def paces(m: Measured) -> dict[str, list[Pace]]:
    """Per network of FASTER, one per seed: what a picture takes at a distance that both networks reach, 10 %
    above the best of the worse one."""
    found = {cell: [] for cell in FASTER}
    seeds = by_seed(m, "steps", list(FASTER), curve), by_seed(m, "speed", list(FASTER), lambda r: r["speed"])
    for curves, speeds in zip(*seeds):
        if None in curves or None in speeds:
            continue
        for cell, calls, rows in zip(FASTER, calls_to_equal_quality(curves), speeds):
            found[cell].append(Pace(calls, {row["batch"]: 1000 * calls * row["seconds"] / row["batch"]
                                            for row in rows}))
    return found


def faster(m: Measured) -> list[Comparison]:
    found = paces(m)
    ours, theirs = (found[cell] for cell in FASTER)
    return [Comparison(what, [pace.milliseconds[batch] for pace in ours],
                       [pace.milliseconds[batch] for pace in theirs])
            for what, batch in (("one picture alone", 1), ("in batches of 256", 256))]


def parent(m: Measured, nfe: int) -> list[float]:
    """What few-step trainings begin from, with or without the guidance that they learn."""
    return m.values("few steps", "dit rf logit-normal", best_within(nfe, (1.0, GUIDANCE)))


REFLOWS = ("reflow", "reflow twice")


def few_steps_after_reflow(m: Measured) -> list[Comparison]:
    return [Comparison(f"{name}, 4 evaluations, against its parent's {nfe}",
                       m.values("few steps", name, best_within(4)), parent(m, nfe))
            for nfe in (8, 4) for name in REFLOWS]


def straightened(m: Measured) -> list[Comparison]:
    def curvature(record: dict) -> float:
        return record["straightness"]

    return [Comparison(f"{name}, against its parent", m.values("few steps", name, curvature),
                       m.values("few steps", "dit rf logit-normal", curvature)) for name in REFLOWS]


def one_step(m: Measured) -> list[Comparison]:
    return [Comparison("MeanFlow, one evaluation, against its parent's 8",
                       m.values("few steps", "meanflow", best_within(1)), parent(m, 8), margin=1.5)]


def logit_normal(m: Measured) -> list[Comparison]:
    return [Comparison(f"{network}, logit-normal against uniform", distance(m, network, "rf logit-normal"),
                       distance(m, network, "rf uniform"))
            for network in NETWORKS]


def transformer(m: Measured) -> list[Comparison]:
    return [Comparison(f"{objective}, dit against unet", distance(m, "dit", objective),
                       distance(m, "unet", objective))
            for objective in OBJECTIVES]


class Claim(NamedTuple):
    """What people say, the comparisons that it makes, and the figure that shows them."""
    number: str
    text: str
    comparisons: Callable[[Measured], list[Comparison]]
    digits: int                          # of its figures; a Fréchet distance has one
    figure: str


CLAIMS = [
    Claim("1", "rectified flow trains more easily than diffusion: its schedule matters less, and more "
               "learning rates work", easier_training, 2, "learning rates"),
    Claim("1a", "rectified flow's gradients are calmer than diffusion's: spread of the gradient norm",
          calmer_gradients, 2, "grid"),
    Claim("2", "straight path + velocity beats eps, v and x0 on the diffusion path, at equal training and "
               "with uniform times: Fréchet distance, 50 first-order steps", straight_path, 1, "grid"),
    Claim("2a", "logit-normal times beat uniform ones: Fréchet distance", logit_normal, 1, "grid"),
    Claim("2b", "the transformer beats the U-Net at equal FLOPs: Fréchet distance", transformer, 1, "grid"),
    Claim("3", "rectified flow needs fewer evaluations of the network", few_evaluations, 1, "steps"),
    Claim("3a", "high order is not needed on straight paths: Euler's distance is within 10 % of a multistep "
                "solver's, at 4, 10 and 20 evaluations", euler_is_enough, 1, "steps"),
    Claim("4a", "a U-Net's inductive bias helps early: error of the velocity after a quarter of the "
                "training, against the transformer", early, 3, "grid"),
    Claim("4b", "a U-Net's inductive bias helps on little data: Fréchet distance with a tenth of the "
                "pictures, against the transformer of equal FLOPs", little_data, 1, "sizes"),
    Claim("4c", "the transformer scales better: exponents of power laws in the training FLOPs, lower is "
                "steeper, against the U-Net", scaling, 3, "sizes"),
    Claim("5", "distant parts agree better with attention: share of samples whose two far corners show the "
               "same shape, against a U-Net without any", far_corners, 3, "corners"),
    Claim("6", "the MM-DiT (joint attention) follows prompts better than the U-Net (cross-attention): share "
               "of pictures that show all of their prompt, after a short training", follows_prompts, 3,
          "prompts"),
    Claim("7", "larger pictures need shifted times: Fréchet distance at 64 pixels, shift 2 against none",
          shifted_times, 1, "shift"),
    Claim("8", "the transformer with rectified flow draws faster than the U-Net with diffusion, at equal "
               "quality: milliseconds per picture on one CPU core", faster, 1, "speed"),
    Claim("9", "reflow makes four evaluations enough: Fréchet distance after half a training more",
          few_steps_after_reflow, 1, "few steps"),
    Claim("9a", "one step is enough: Fréchet distance of MeanFlow, after half a training more, within 1.5 "
                "times its parent's", one_step, 1, "few steps"),
    Claim("9b", "reflow straightens the paths: mean squared distance of the velocity from the chord",
          straightened, 3, "few steps"),
]
