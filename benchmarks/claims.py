"""What people say of the two families, and what the results of benchmarks/compare.py say of it.

    python benchmarks/compare.py --readme                    # writes the claims' table (from the root)

A claim is a list of comparisons, each between two sets of values, one value per seed. A comparison is decided
by the seeds' spread: `decide`. The verdict is a function of these decisions: `verdict`. The opening table
shows the first of the comparisons whose answer is the most frequent one, and, where the verdict depends on
something, on what.
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
                                LITTLE, LITTLE_SIZES, NETWORKS, NOISY, OBJECTIVES, OWN, PROMPT_KINDS,
                                PROMPTED, PROMPTED_AT, SCHEDULES, SHIFT_STEPS, SIZES, size_name,
                                weighting_name)

# 97.5 % quantiles of Student's t by degrees of freedom; beyond the table, the last one, a little too high.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
USABLE = 1.5         # a learning rate works if its distance is within this factor of the best rate's
WITHIN = 1.1         # a distance within this factor of the best counts as equal quality
EARLY = 2            # of CHECKPOINTS equal parts of a training

RULE = ("A comparison is decided where the two means differ by more than the pooled spread of the seeds "
        "explains (Student's t, 95 %, each comparison by itself), and only with two seeds or more on each "
        "side; of two seeds each, the means must differ by 4.3 times the standard error, so ranges that do "
        "not overlap can still be not significant. Where all seeds give the same number, there is no spread "
        "to compare with, and nothing is decided. A claim is true if more than half of its comparisons are "
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
    """True or False where the seeds decide it, None where the difference is within their spread, or where
    there is no spread to compare it with."""
    ours = np.array(comparison.ours, dtype=float)
    theirs = comparison.margin * np.array(comparison.theirs, dtype=float)
    difference = ours.mean() - theirs.mean()
    freedom = len(ours) + len(theirs) - 2
    squares = ((ours - ours.mean())**2).sum() + ((theirs - theirs.mean())**2).sum()
    error = math.sqrt(squares / freedom * (1 / len(ours) + 1 / len(theirs)))
    if error == 0 or abs(difference) <= STUDENT[min(freedom, len(STUDENT)) - 1] * error:
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


def depends_on(comparisons: list[Comparison]) -> str:
    """Which comparisons were decided which way: "yes: two shapes · four shapes; no: one shape"."""
    parts = []
    for answer in (ANSWERS[True], ANSWERS[False]):
        found = [comparison.what for comparison in comparisons if answer_to(comparison) == answer]
        if found:
            parts.append(f"{answer}: {' · '.join(found)}")
    return "; ".join(parts)


def counted(comparisons: list[Comparison]) -> str:
    """How the comparisons were decided: "2 yes, 1 no"."""
    answers = [answer_to(comparison) for comparison in comparisons]
    return ", ".join(f"{answers.count(answer)} {answer}" for answer in (*ANSWERS.values(), UNDECIDED)
                     if answer in answers)


# ---- the results, by study, cell and seed

def known(get: Callable[[dict], float | None], records: list[dict]) -> list[float]:
    """What `get` finds in those records that have it."""
    return [value for value in map(get, records) if value is not None]


class Measured:
    def __init__(self, records: list[dict]):
        self.records = records

    def of(self, study: str, cell: str) -> list[dict]:
        """One record per seed."""
        found = [record for record in self.records if (record["study"], record["cell"]) == (study, cell)]
        return sorted(found, key=lambda record: record["seed"])

    def of_any_sampler(self, cell: str) -> list[dict]:
        """One record per seed for which a cell of "noise" is measured, with its evaluations and, where there
        are any, those of "steps"."""
        others = {record["seed"]: record["evaluations"] for record in self.of("steps", cell)
                  if "diverged" not in record}
        return [record | {"evaluations": record["evaluations"] + others.get(record["seed"], [])}
                for record in self.of("noise", cell) if "diverged" not in record]

    def values(self, study: str, cell: str, get: Callable[[dict], float | None]) -> list[float]:
        """What `get` finds in each seed's record; a training that diverged has nothing."""
        return known(get, [record for record in self.of(study, cell) if "diverged" not in record])


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


def calls_to(points: list[tuple[int, float]], quality: float) -> int:
    """The fewest evaluations with a distance of at most `quality`."""
    return next(nfe for nfe, frechet in points if frechet <= quality)


def needed(points: list[tuple[int, float]]) -> float:
    """How many evaluations take a curve to within WITHIN of its best distance: between two of its points, on
    the straight line of the logarithms, so that it varies from seed to seed as a whole number would not."""
    quality = WITHIN * points[-1][1]
    end = [nfe for nfe, _ in points].index(calls_to(points, quality))
    if end == 0:
        return float(points[0][0])
    (a, above), (b, below) = points[end - 1:end + 1]
    share = math.log(above / quality) / math.log(above / below)
    return a * (b / a) ** share


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


def few_evaluations(m: Measured) -> list[Comparison]:
    """Each with whatever solver is best, of those that add no noise and of all. A difference of less than
    WITHIN in the evaluations is none."""
    ours, found = "dit rf logit-normal", []
    for theirs in ("dit ddpm eps", "unet ddpm eps"):
        for noise, more in ((False, ""), (True, ", noise allowed")):
            mine, others = (m.of_any_sampler(cell) if noise else m.of("steps", cell)
                            for cell in (ours, theirs))
            found += [
                Comparison(f"10 % fewer evaluations to within 10 % of its own best than {theirs}{more}",
                           [needed(curve(record, noise=noise)) for record in mine],
                           [needed(curve(record, noise=noise)) for record in others], margin=1 / WITHIN),
                Comparison(f"distance at up to 10 evaluations, {theirs} at up to 50{more}",
                           known(best_within(10, noise=noise), mine),
                           known(best_within(50, noise=noise), others), margin=WITHIN)]
    return found


def euler_is_enough(m: Measured) -> list[Comparison]:
    """What a user would choose: the best of each with at most so many evaluations."""
    def euler(nfe: int) -> Callable[[dict], float | None]:
        return lambda record: min((row["frechet"] for row in record["evaluations"] if row["nfe"] <= nfe
                                   and row["sampler"] == "euler" and row["guidance"] == 1), default=None)

    return [Comparison(f"Euler against the best solver, at most {nfe} evaluations",
                       m.values("steps", "dit rf logit-normal", euler(nfe)),
                       m.values("steps", "dit rf logit-normal", best_within(nfe)), margin=WITHIN)
            for nfe in (4, 10, 20)]


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


def usable_octaves(m: Measured, network: str, objective: str) -> list[float]:
    """Over how many octaves of the learning rate, of those measured, the distance is within USABLE of the
    best rate's: on straight lines between the logarithms. One number per seed that has all rates."""
    cells = [f"{network} {objective} x {factor:g}" for factor in FACTORS]
    found = []
    for values in by_seed(m, "learning rates", cells, lambda record: record["evaluations"][0]["frechet"]):
        # a training that diverged is infinitely far, and no part of the line to it is usable
        known = [math.inf if value is None else value for value in values]
        if min(known) < math.inf:
            found.append(width_below(list(FACTORS), known, USABLE * min(known)))
    return found


def width_below(x: list[float], y: list[float], level: float) -> float:
    """The length of log2 x over which the line through (log x, log y) is at most log `level`."""
    total = 0.0
    for (a, above), (b, below) in zip(zip(x, y), zip(x[1:], y[1:])):
        low, high = sorted((above, below))
        share = float(high <= level)
        if low <= level < high < math.inf:
            share = math.log(level / low) / math.log(high / low)
        total += share * math.log2(b / a)
    return total


def easier_training(m: Measured) -> list[Comparison]:
    """Per network, the spread over schedules, and how far the learning rate can vary. A schedule of rf is a
    density of the training times; one of ddpm is its path, which sampling takes as well."""
    found = []
    flow = [name for name in SCHEDULES if name.startswith("rf")]
    # With eps, samples from the cosine schedule begin by a division by almost 0, however well it was learned.
    milder = [name for name in SCHEDULES if name.startswith("ddpm") and name != "ddpm cosine"]
    for network in NETWORKS:
        rates = (usable_octaves(m, network, objective) for objective in ("rf logit-normal", "ddpm eps"))
        octaves = math.log2(FACTORS[-1] / FACTORS[0])
        found += [Comparison(f"{network}, relative deviation of the distance over schedules, without cosine",
                             schedule_spread(m, network, flow), schedule_spread(m, network, milder)),
                  Comparison(f"{network}, usable octaves of the learning rate, of {octaves:g}", *rates,
                             higher=True)]
    return [each for each in found if each.ours or each.theirs]


def calmer_gradients(m: Measured) -> list[Comparison]:
    """With uniform times on either path, as in straight_path."""
    def spread(record: dict) -> float | None:
        return record["grad_norm"].get("spread")

    return [Comparison(f"{network} against {objective.removeprefix('ddpm ')}",
                       m.values("grid", f"{network} rf uniform", spread),
                       m.values("grid", f"{network} {objective}", spread))
            for network in NETWORKS for objective in OBJECTIVES if objective.startswith("ddpm")]


def straighter(m: Measured) -> list[Comparison]:
    """In common coordinates: benchmarks/measures.py. With uniform times on either path."""
    return [Comparison(f"{network} against {objective.removeprefix('ddpm ')}",
                       m.values("grid", f"{network} rf uniform", curvature),
                       m.values("grid", f"{network} {objective}", curvature))
            for network in NETWORKS for objective in OBJECTIVES if objective.startswith("ddpm")]


def curvature(record: dict) -> float:
    return record["straightness"]


def any_sampler(m: Measured, cell: str) -> list[float]:
    """The smallest distance with at most 50 evaluations by any sampler, without noise or with it."""
    return known(best_within(50, noise=True), m.of_any_sampler(cell))


def whatever_the_sampler(m: Measured) -> list[Comparison]:
    pairs = [(f"{network} rf logit-normal", f"{network} ddpm eps") for network in NETWORKS]
    return [Comparison(f"{ours} against {theirs}", any_sampler(m, ours), any_sampler(m, theirs))
            for ours, theirs in (*pairs, ("dit rf logit-normal", "unet ddpm eps"))]


def x0_prediction(m: Measured) -> list[Comparison]:
    """With the loss that the other prediction has, so that only the prediction differs."""
    return [Comparison(f"{path}, x0 against {own}", *(
        m.values("weighting", weighting_name(path, prediction, own), score(FIRST_ORDER[path][0].label))
        for prediction in ("x0", own))) for path, (_, own, _) in OWN.items()]


def early(m: Measured) -> list[Comparison]:
    """After a quarter of the training: the U-Net against the transformer."""
    def error(kind: str) -> Callable[[dict], float | None]:
        def get(record: dict) -> float | None:
            step = record["steps"] // CHECKPOINTS * EARLY      # which an interrupted training may lack
            return next((row[kind] for row in record["errors"] if row["step"] == step), None)
        return get

    return [Comparison(f"error of {what}, {objective}", m.values("grid", f"unet {objective}", error(kind)),
                       m.values("grid", f"dit {objective}", error(kind)))
            for kind, what in (("velocity", "the velocity"), ("x0", "x0")) for objective in OBJECTIVES]


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


def corners_at(part: int) -> Callable[[dict], float | None]:
    """For `Measured.values`: the share of samples whose corners agree after that part of CHECKPOINTS."""
    return score(CORNERS_AT._replace(checkpoint=part).label, "agreement")


CORNER_PARTS = {"after an eighth": 1, "after a quarter": 2, "at the end": CHECKPOINTS}


def far_corners(m: Measured) -> list[Comparison]:
    """Attention within the U-Net."""
    without, *others, _ = CORNER_NETWORKS
    return [Comparison(f"{name}, {when}", m.values("corners", name, corners_at(part)),
                       m.values("corners", without, corners_at(part)), higher=True)
            for when, part in CORNER_PARTS.items() for name in others]


def far_corners_of_a_transformer(m: Measured) -> list[Comparison]:
    """Against each U-Net."""
    *unets, transformer = CORNER_NETWORKS
    return [Comparison(f"against {name}, {when}", m.values("corners", transformer, corners_at(part)),
                       m.values("corners", name, corners_at(part)), higher=True)
            for when, part in CORNER_PARTS.items() for name in unets]


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


def paces(m: Measured, noise: bool = False) -> dict[str, list[Pace]]:
    """Per network of FASTER, one per seed: what a picture takes at a distance that both networks reach, 10 %
    above the best of the worse one. noise: also by samplers that add noise."""
    curves, speeds = [], []
    for cell in FASTER:
        records = m.of_any_sampler(cell) if noise else m.of("steps", cell)
        curves.append({record["seed"]: curve(record, noise=noise) for record in records
                       if "diverged" not in record})
        speeds.append({record["seed"]: record["speed"] for record in m.of("speed", cell)})
    found = {cell: [] for cell in FASTER}
    for seed in sorted(set.intersection(*map(set, curves + speeds))):
        quality = WITHIN * max(points[seed][-1][1] for points in curves)
        for cell, points, rows in zip(FASTER, curves, speeds):
            calls = calls_to(points[seed], quality)
            found[cell].append(Pace(calls, {row["batch"]: 1000 * calls * row["seconds"] / row["batch"]
                                            for row in rows[seed]}))
    return found


def faster(m: Measured) -> list[Comparison]:
    comparisons = []
    for noise, more in ((False, ""), (True, ", noise allowed")):
        found = paces(m, noise)
        ours, theirs = (found[cell] for cell in FASTER)
        comparisons += [Comparison(f"{what}{more}", [pace.milliseconds[batch] for pace in ours],
                                   [pace.milliseconds[batch] for pace in theirs])
                        for what, batch in (("one picture alone", 1), ("in batches of 256", 256))]
    return comparisons


def parent(m: Measured, nfe: int) -> list[float]:
    """What few-step trainings begin from, with or without the guidance that they learn."""
    return m.values("few steps", "dit rf logit-normal", best_within(nfe, (1.0, GUIDANCE)))


REFLOWS = ("reflow", "reflow twice")


def few_steps_after_reflow(m: Measured) -> list[Comparison]:
    return [Comparison(f"{name}, 4 evaluations, against its parent's 8",
                       m.values("few steps", name, best_within(4)), parent(m, 8)) for name in REFLOWS]


def straightened(m: Measured) -> list[Comparison]:
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
    found = [Comparison(f"{objective}, dit against unet", distance(m, "dit", objective),
                        distance(m, "unet", objective))
             for objective in OBJECTIVES]
    return found + [Comparison(f"{objective}, dit against unet, any sampler",
                               any_sampler(m, f"dit {objective}"), any_sampler(m, f"unet {objective}"))
                    for objective in ("ddpm eps", "rf logit-normal")]


class Claim(NamedTuple):
    """What people say, the comparisons that it makes, and where they are shown."""
    number: str
    text: str
    comparisons: Callable[[Measured], list[Comparison]]
    digits: int                          # of its figures; a Fréchet distance has one
    section: str                         # of RESULTS.md, which has its table and its figure


CLAIMS = [
    Claim("1", "rectified flow trains more easily than diffusion: its schedule matters less, and a wider "
               "range of learning rates works", easier_training, 2, "learning rates"),
    Claim("1a", "rectified flow's gradients are calmer than diffusion's: spread of the gradient norm",
          calmer_gradients, 2, "grid in full"),
    Claim("2", "straight path + velocity beats eps, v and x0 on the diffusion path, at equal training and "
               "with uniform times: Fréchet distance, 50 first-order steps without noise", straight_path, 1,
          "grid"),
    Claim("2a", "logit-normal times beat uniform ones: Fréchet distance", logit_normal, 1, "grid"),
    Claim("2b", "the transformer beats the U-Net at equal FLOPs: Fréchet distance, 50 first-order steps "
                "without noise, or at most 50 by any sampler", transformer, 1, "grid"),
    Claim("2c", "rectified flow beats diffusion whatever the sampler: Fréchet distance, at most 50 "
                "evaluations by the best of all samplers, also those that add noise",
          whatever_the_sampler, 1, "noise"),
    Claim("2d", "rectified flow's sampling paths are straighter than diffusion's: mean squared distance of "
                "the velocity from the chord", straighter, 3, "grid in full"),
    Claim("2e", "a network that predicts x0 is better than one that predicts the velocity, or v, if the loss "
                "is that of the velocity, or v (Li and He 2025, JiT): Fréchet distance", x0_prediction, 1,
          "weighting"),
    Claim("3", "rectified flow (dit, logit-normal) needs fewer evaluations of the network than diffusion, "
               "each with its best solver", few_evaluations, 1, "steps"),
    Claim("3a", "high order is not needed on straight paths: Euler's distance is within 10 % of the best "
                "solver's, with at most 4, 10 and 20 evaluations", euler_is_enough, 1, "steps"),
    Claim("4a", "a U-Net's inductive bias helps early: its errors after a quarter of the training, against "
                "the transformer's", early, 3, "errors"),
    Claim("4b", "a U-Net's inductive bias helps on little data: Fréchet distance with a tenth of the "
                "pictures, against the transformer of equal FLOPs", little_data, 1, "sizes"),
    Claim("4c", "the transformer scales better: exponents of power laws in the training FLOPs, lower is "
                "steeper, against the U-Net", scaling, 3, "sizes"),
    Claim("5", "attention makes distant parts agree: share of samples whose two far corners show the same "
               "shape, against a U-Net without any", far_corners, 3, "corners"),
    Claim("5a", "a transformer makes distant parts agree better than a U-Net: the same share",
          far_corners_of_a_transformer, 3, "corners"),
    Claim("6", "the MM-DiT (joint attention) follows prompts better than the U-Net (cross-attention): share "
               "of pictures that show all of their prompt, after a short training", follows_prompts, 3,
          "prompts"),
    Claim("7", "larger pictures need shifted times: Fréchet distance at 64 pixels, shift 2 against none",
          shifted_times, 1, "shift"),
    Claim("8", "the transformer with rectified flow draws faster than the U-Net with diffusion, at equal "
               "quality: milliseconds per picture on one CPU core", faster, 1, "speed"),
    Claim("9", "reflow makes four evaluations as good as its parent's eight: Fréchet distance after 50 % "
               "more training", few_steps_after_reflow, 1, "few steps"),
    Claim("9a", "one step is enough: Fréchet distance of MeanFlow, after 50 % more training, within 1.5 "
                "times its parent's", one_step, 1, "few steps"),
    Claim("9b", "reflow straightens the paths: mean squared distance of the velocity from the chord",
          straightened, 3, "few steps"),
]
