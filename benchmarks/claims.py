"""What people say of the two families, and what the results of benchmarks/compare.py say of it.

    python benchmarks/compare.py --readme                    # writes the claims' table (from the root)

A claim is a list of comparisons, each between two sets of values, one value per seed. A comparison is decided
by the seeds' spread: `decide`. The verdict is a function of these decisions: `verdict`. The opening table
shows a comparison that has the most frequent answer and, where the verdict is "depends", says on what.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.studies import (CHECKPOINTS, CLASSIC, CORNERS_AT, CORNER_NETWORKS, DEFAULT_SAMPLERS, FACTORS,
                                FIRST_ORDER, GUIDANCE, LITTLE, LITTLE_SIZES, NETWORKS, NOISY, OBJECTIVES, OWN,
                                PROMPTED, PROMPTED_AT, PROMPT_KINDS, SCHEDULES, SHIFT_STEPS, SIZES, STUDIES,
                                exchanges, size_name, weighting_name)

# 97.5 % quantiles of Student's t by degrees of freedom; beyond the table, the last one, a little too high.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
           2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048,
           2.045, 2.042)
USABLE = 1.5         # a learning rate works if its distance is within this factor of the best rate's
WITHIN = 1.1         # a distance within this factor of the best counts as equal quality
EARLY = 2            # of CHECKPOINTS equal parts of a training

RULE = ("A comparison is decided if its means differ by more than the spread of the seeds explains "
        "(two-sided t test, 5 %, no correction for many tests), with two seeds or more on each side. Where a "
        "claim says within 10 %, or within 1.5 times, the other side is first multiplied by that. Two seeds "
        "say little about their spread, so it is pooled over everything that a claim measures in one "
        "quantity: all distances, whatever the sampler and the guidance; all shares, whatever their time; "
        "but ratios of distances, the two measures of straightness, and each fit of an exponent apart. The "
        "scale is logarithmic; for shares, that of their odds (0 and 1 count as half a sample more and "
        "less); for exponents and relative deviations, their own. Where the seeds do not vary at all, "
        "nothing is decided; if both sides have the same number, the answer is equal. A claim is true if "
        "more than half of its comparisons are decided for it and none against it, false in the opposite "
        "case, depends if some are decided each way, and is else not shown. Comparisons of one claim can "
        "share runs.")


# ---- the rule

class Comparison(NamedTuple):
    """Whether `ours` is better than `theirs`, each with one value per seed."""
    what: str
    ours: list[float]
    theirs: list[float]
    higher: bool = False                 # is better; else lower
    factor: float = 1.0                  # of theirs, with which ours is compared: 1.1 for "within 10 % of"
    quantity: str = ""                   # those of one claim and one quantity have one spread
    group: str = ""                      # stands for its comparisons where all that are decided agree
    plain: bool = False                  # compare the values (exponents, deviations), not their logarithms
    share: int | None = None             # of so many samples: compare the logarithms of the odds, because
                                         # shares near 0 and 1 vary less
    digits: int | None = None            # of its figures; None: as many as its claim says

    def side(self, values: list[float]) -> np.ndarray:
        found = np.array(values, dtype=float)
        if self.share is not None:
            least = 1 / (2 * self.share)                   # half a sample
            found = found.clip(least, 1 - least)
            found = found / (1 - found)
        return found if self.plain else np.log(found)


class Spread(NamedTuple):
    """Of seeds: the pooled variance of what has several, and its degrees of freedom."""
    variance: float
    freedom: int


def spread_of(comparisons: list[Comparison]) -> Spread:
    """As in an analysis of variance: one spread within all sides, however often a side is compared."""
    sides = {tuple(values): each.side(values) for each in comparisons for values in (each.ours, each.theirs)
             if len(values) > 1}
    squares = sum(((side - side.mean())**2).sum() for side in sides.values())
    freedom = sum(len(side) - 1 for side in sides.values())
    return Spread(float(squares / freedom) if freedom else 0.0, freedom)


def decide(comparison: Comparison, spread: Spread | None = None) -> bool | None:
    """True or False where the seeds decide it, None where the difference is within their spread, or where
    there is no spread to compare it with. spread: None for that of the comparison alone."""
    spread = spread or spread_of([comparison])
    theirs = [comparison.factor * value for value in comparison.theirs]
    difference = comparison.side(comparison.ours).mean() - comparison.side(theirs).mean()
    error = math.sqrt(spread.variance * (1 / len(comparison.ours) + 1 / len(theirs)))
    if error == 0 or abs(difference) <= STUDENT[min(spread.freedom, len(STUDENT)) - 1] * error:
        return None
    return bool((difference > 0) == comparison.higher)


def measured(comparison: Comparison, seeds: int = 2) -> bool:
    """Whether each side has values of so many seeds; a decision needs two."""
    return min(len(comparison.ours), len(comparison.theirs)) >= seeds


# The usual telling's contrary first; "not decided yet" where a comparison lacks its second seed.
VERDICTS = ("false", "not shown", "depends", "true", "not decided yet", "not measured yet")
ANSWERS = {True: "yes", False: "no", None: "not significant"}
EQUAL = "equal"                          # one number everywhere
UNDECIDED = "undecided"


def answers_to(comparisons: list[Comparison]) -> list[str]:
    """Of a claim: for each comparison one of ANSWERS, EQUAL or UNDECIDED."""
    found = []
    for each in comparisons:
        alike = [other for other in comparisons if other.quantity == each.quantity]
        if not measured(each):
            found.append(UNDECIDED)
        elif len({*each.ours, *each.theirs}) == 1 and each.factor == 1:
            found.append(EQUAL)
        else:
            found.append(ANSWERS[decide(each, spread_of(alike))])
    return found


def verdict(comparisons: list[Comparison]) -> str:
    """One of VERDICTS. What is not measured yet cannot change that it depends."""
    if not any(measured(comparison, 1) for comparison in comparisons):
        return "not measured yet"
    answers = answers_to(comparisons)
    for_it, against = answers.count(ANSWERS[True]), answers.count(ANSWERS[False])
    if for_it and against:
        return "depends"
    if UNDECIDED in answers:
        return "not decided yet"
    if 2 * for_it > len(answers):
        return "true"
    return "false" if 2 * against > len(answers) else "not shown"


def typical(comparisons: list[Comparison]) -> tuple[str, Comparison]:
    """The most frequent answer, and the first comparison that has it; of equally frequent ones, that which is
    not significant, or else the earlier."""
    pairs = [pair for pair in zip(answers_to(comparisons), comparisons) if measured(pair[1], 1)]
    answers = [answer for answer, _ in pairs]
    most = max(map(answers.count, answers))
    frequent = [answer for answer in answers if answers.count(answer) == most]
    chosen = ANSWERS[None] if ANSWERS[None] in frequent else frequent[0]
    return pairs[answers.index(chosen)]


def depends_on(comparisons: list[Comparison]) -> str:
    """Which comparisons were decided which way: "yes: two shapes · four shapes; no: one shape". If all
    decided comparisons of a group agree, the group's name stands for them."""
    found = {chosen: [comparison for answer, comparison in zip(answers_to(comparisons), comparisons)
                      if answer == chosen] for chosen in (ANSWERS[True], ANSWERS[False])}
    mixed = set.intersection(*({each.group for each in decided} for decided in found.values()))
    parts = []
    for chosen, decided in found.items():
        names = [each.what if each.group in mixed else each.group or each.what for each in decided]
        if names:
            parts.append(f"{chosen}: {' · '.join(dict.fromkeys(names))}")
    return "; ".join(parts)


def counted(comparisons: list[Comparison]) -> str:
    """How the comparisons were decided: "2 yes, 1 no"."""
    answers = answers_to(comparisons)
    return ", ".join(f"{answers.count(answer)} {answer}" for answer in (*ANSWERS.values(), EQUAL, UNDECIDED)
                     if answer in answers)


# ---- the results, by study, cell and seed

def known(get: Callable[[dict], float | None], records: list[dict]) -> list[float]:
    """What `get` finds in those records that have it."""
    return [value for value in map(get, records) if value is not None]


# Studies whose cells of one name are one training: of the grid's networks, as they are there.
SHARED = ("grid", "steps", "guidance", "noise", "schedules", "few steps", "curvature", "speed")


def vae_of(record: dict) -> str:
    """Its fingerprint. Older records do not name it; those of one device shared one."""
    return record.get("vae", record["device"])


class Measured:
    def __init__(self, records: list[dict]):
        self.records = records

    def of(self, study: str, cell: str) -> list[dict]:
        """One record per seed."""
        found = [record for record in self.records if (record["study"], record["cell"]) == (study, cell)]
        return sorted(found, key=lambda record: record["seed"])

    def runs(self, cell: str) -> dict[int, list[dict]]:
        """By seed, the records of all studies that have this network of the grid, the grid's first. They are
        of one training: that which another machine made by the same command, on another VAE, is left out."""
        found: dict[int, list[dict]] = {}
        for study in SHARED:
            for record in self.of(study, cell):
                same = found.setdefault(record["seed"], [])
                if "diverged" not in record and (not same or vae_of(same[0]) == vae_of(record)):
                    same.append(record)
        return {seed: same for seed, same in sorted(found.items()) if same}

    def pooled(self, cell: str, get: Callable[[dict], float | None]) -> list[float]:
        """What `get` finds in any of each seed's records of `runs`."""
        firsts = [known(get, records)[:1] for records in self.runs(cell).values()]
        return [value for first in firsts for value in first]

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


def distance(m: Measured, network: str, objective: str) -> list[float]:
    """Of all seeds that any study has."""
    return m.pooled(f"{network} {objective}", score(first_order(objective)))


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


def needed(record: dict) -> int:
    """The fewest evaluations, of those measured with solvers that add no noise, to within WITHIN of the
    best."""
    points = curve(record)
    return calls_to(points, WITHIN * points[-1][1])


def best_within(nfe: int, scales: tuple[float, ...] = (1.0,),
                noise: bool = False) -> Callable[[dict], float | None]:
    """For `Measured.values`: the smallest distance with at most so many evaluations."""
    def get(record: dict) -> float | None:
        found = [frechet for count, frechet in curve(record, scales, noise) if count <= nfe]
        return found[-1] if found else None
    return get


# ---- the claims

def uniform_against_diffusion(values: Callable[[str], list[float]]) -> list[Comparison]:
    """Both networks, by each prediction of diffusion; values: of a cell, one per seed. With uniform times on
    either path, so that the density of the times is not compared as well."""
    return [Comparison(f"{network}, rf uniform against {objective}", values(f"{network} rf uniform"),
                       values(f"{network} {objective}"))
            for network in NETWORKS for objective in OBJECTIVES if objective.startswith("ddpm")]


def straight_path(m: Measured) -> list[Comparison]:
    return uniform_against_diffusion(lambda cell: distance(m, *cell.split(" ", 1)))


# What few evaluations of rectified flow are compared with.
DIFFUSION = ("dit ddpm eps", "dit ddpm v", "unet ddpm eps", "unet ddpm v")


def few_evaluations(m: Measured) -> list[Comparison]:
    """Each to its own quality: counts, of those measured."""
    return [Comparison(f"evaluations to within 10 % of its own best, against {theirs}",
                       m.values("steps", "dit rf logit-normal", needed), m.values("steps", theirs, needed))
            for theirs in DIFFUSION]


def ten_against_fifty(m: Measured) -> list[Comparison]:
    """Samplers with noise were measured with eps only."""
    def ten(study: str, theirs: str, noise: bool = False) -> Comparison:
        return Comparison(f"against {theirs}" + NOISE_TOO * noise,
                          m.values(study, "dit rf logit-normal", best_within(10, noise=noise)),
                          m.values(study, theirs, best_within(50, noise=noise)), factor=WITHIN)

    return ([ten("steps", theirs) for theirs in DIFFUSION]
            + [ten("noise", f"{network} ddpm eps", noise=True) for network in NETWORKS])


def euler_is_enough(m: Measured) -> list[Comparison]:
    """What a user would choose: the best of each with at most so many evaluations."""
    def euler(nfe: int) -> Callable[[dict], float | None]:
        return lambda record: min((row["frechet"] for row in record["evaluations"] if row["nfe"] <= nfe
                                   and row["sampler"] == "euler" and row["guidance"] == 1), default=None)

    return [Comparison(f"Euler against the best solver, at most {nfe} evaluations",
                       m.values("steps", "dit rf logit-normal", euler(nfe)),
                       m.values("steps", "dit rf logit-normal", best_within(nfe)), factor=WITHIN)
            for nfe in (4, 10)]


def by_seed(m: Measured, study: str, cells: list[str], get: Callable[[dict], object]) -> dict[int, list]:
    """For each seed that has all of these cells, what `get` finds in each; None for a training that
    diverged."""
    found: dict[int, list] = {}
    for cell in cells:
        for record in m.of(study, cell):
            found.setdefault(record["seed"], []).append(None if "diverged" in record else get(record))
    return {seed: values for seed, values in sorted(found.items()) if len(values) == len(cells)}


def variation(values: list[float | None]) -> float | None:
    """Standard deviation, of a sample, over the mean."""
    return None if None in values else float(np.std(values, ddof=1) / np.mean(values))


def schedule_spread(m: Measured, network: str, schedules: list[str]) -> list[float]:
    """Relative deviation of the distance over these schedules, one per seed."""
    cells = [f"{network} {schedule}" for schedule in schedules]
    found = by_seed(m, "schedules", cells, score(first_order(schedules[0])))
    values = [variation(each) for each in found.values()]
    return [value for value in values if value is not None]


def rate_distances(m: Measured, network: str, objective: str) -> list[list[float]]:
    """Per seed that has all rates, the distance with each of FACTORS; that of a training that diverged is
    infinite. Seeds of which all diverged are left out."""
    cells = [f"{network} {objective} x {factor:g}" for factor in FACTORS]
    rates = by_seed(m, "learning rates", cells, lambda record: record["evaluations"][0]["frechet"])
    found = [[math.inf if value is None else value for value in values] for values in rates.values()]
    return [distances for distances in found if min(distances) < math.inf]


def usable_octaves(m: Measured, network: str, objective: str) -> list[float]:
    """Over how many octaves of the learning rate, of those measured, the distance is within USABLE of the
    best rate's: on straight lines between the logarithms, none of a line to infinity. One number per seed."""
    return [width_below(list(FACTORS), distances, USABLE * min(distances))
            for distances in rate_distances(m, network, objective)]


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


# Of ddpm, by prediction. Not cosine with eps: its samples begin by a division by almost 0, however well it
# was learned.
NOISE_SCHEDULES = {"eps": ["ddpm eps", "ddpm linear"], "v": ["ddpm v", "ddpm linear, v", "ddpm cosine, v"]}


def schedules_matter_less(m: Measured) -> list[Comparison]:
    """Per network and prediction of ddpm. A schedule of rf is a density of the training times; one of ddpm is
    its path, which sampling takes as well."""
    flow = [name for name in SCHEDULES if name.startswith("rf")]
    return [Comparison(f"{network}, against ddpm with {prediction}", schedule_spread(m, network, flow),
                       schedule_spread(m, network, schedules), plain=True)
            for network in NETWORKS for prediction, schedules in NOISE_SCHEDULES.items()]


def straight_against_cosine(m: Measured) -> list[Comparison]:
    """The schedule whose loss, with v, weights the noise levels as the straight path's does."""
    return [Comparison(f"{network}, rf uniform against ddpm cosine, v", distance(m, network, "rf uniform"),
                       distance(m, network, "ddpm cosine, v")) for network in NETWORKS]


def more_rates_work(m: Measured) -> list[Comparison]:
    return [Comparison(network, *(usable_octaves(m, network, objective)
                                  for objective in reversed(CLASSIC)), higher=True)
            for network in NETWORKS]


def calmer_gradients(m: Measured) -> list[Comparison]:
    def spread(record: dict) -> float | None:
        return record["grad_norm"].get("spread")

    return uniform_against_diffusion(lambda cell: m.pooled(cell, spread))


def from_mixtures(m: Measured, cell: str) -> list[float]:
    """How much trajectories bend: measures.curvature, one per seed."""
    return m.values("curvature", cell, lambda record: record["curvature"])


def from_noise(m: Measured, cell: str) -> list[float]:
    """The same as in sampling: measures.straightness."""
    return m.pooled(cell, lambda record: record["straightness"])


BENT = {"from the same mixtures": from_mixtures, "from noise": from_noise}


def straighter(m: Measured) -> list[Comparison]:
    return [each._replace(what=f"{each.what}, {where}", quantity=where, group=where)
            for where, bent in BENT.items()
            for each in uniform_against_diffusion(lambda cell, bent=bent: bent(m, cell))]


NOISE_TOO = ", samplers with noise too"


def any_sampler(m: Measured, cell: str) -> list[float]:
    """The smallest distance of "noise": first-order steps without noise, or samplers that add some, at most
    50 evaluations."""
    return m.values("noise", cell, best_within(50, noise=True))


def whatever_the_sampler(m: Measured) -> list[Comparison]:
    return [Comparison(network, *(any_sampler(m, f"{network} {objective}")
                                  for objective in reversed(CLASSIC))) for network in NETWORKS]


FAMILIES = (("dit", "rf logit-normal"), ("unet", "ddpm eps"))


def best_guidance(m: Measured, cell: str) -> tuple[float, list[float]]:
    """Of the scales and numbers of steps in "guidance", those with the smallest mean distance: the scale, and
    the distances, one per seed. Without any results, scale 1 and no distances."""
    found = {}
    for each in next(each for each in STUDIES["guidance"].cells if each.name == cell).evaluations:
        values = m.values("guidance", cell, score(each.label))
        if values:
            found[float(np.mean(values))] = each.scale, values
    return found[min(found)] if found else (1.0, [])


def families(m: Measured) -> list[Comparison]:
    """Network and objective together."""
    def guided(network: str, objective: str) -> list[float]:
        chosen = next(each for each in DEFAULT_SAMPLERS[objective.split()[0]] if each.scale == GUIDANCE)
        return m.pooled(f"{network} {objective}", score(chosen.label))

    def best_guided(*family: str) -> list[float]:
        return best_guidance(m, " ".join(family))[1]

    def noisy(*family: str) -> list[float]:
        return any_sampler(m, " ".join(family))

    return [Comparison(what, *(get(*family) for family in FAMILIES)) for what, get in (
        ("50 first-order steps", lambda network, objective: distance(m, network, objective)),
        (f"at most 50 evaluations, first-order steps{NOISE_TOO}", noisy),
        (f"guidance {GUIDANCE:g}, the samplers by default", guided),
        ("each with the scale of guidance that suits it", best_guided))]


def weighted(m: Measured, path: str, prediction: str, loss: str) -> list[float]:
    """Distances of a cell of "weighting"."""
    return m.values("weighting", weighting_name(path, prediction, loss), score(FIRST_ORDER[path][0].label))


def x0_prediction(m: Measured) -> list[Comparison]:
    """With the loss that the other prediction has, so that only the prediction differs."""
    return [Comparison(f"{path}, x0 against {own}", weighted(m, path, "x0", own), weighted(m, path, own, own))
            for path, (_, own, _) in OWN.items()]


def own_prediction_and_loss(m: Measured) -> list[Comparison]:
    """Against each combination in which the prediction or the loss is another."""
    return [Comparison(f"{path}, {own} with the loss of {own}, against {prediction} with that of {loss}",
                       weighted(m, path, own, own), weighted(m, path, prediction, loss))
            for path, (_, own, _) in OWN.items() for prediction, loss in exchanges(own)]


def early(m: Measured) -> list[Comparison]:
    """After a quarter of the training: the U-Net against the transformer."""
    def error(record: dict) -> float | None:
        step = record["steps"] // CHECKPOINTS * EARLY      # which a training that was interrupted may lack
        return next((row["velocity"] for row in record["errors"] if row["step"] == step), None)

    return [Comparison(f"{objective}, unet against dit", m.pooled(f"unet {objective}", error),
                       m.pooled(f"dit {objective}", error)) for objective in OBJECTIVES]


class Size(NamedTuple):
    flops: float                         # of the whole training
    frechet: float
    velocity: float                      # error, in common units


def sizes(m: Measured, network: str, limit: int | None) -> list[list[Size]]:
    """Per seed that has all sizes of a network, these: four, and two with `limit` pictures."""
    def of(record: dict) -> Size:
        flops = record["flops_per_example"] * record["steps"] * record["batch_size"]
        return Size(flops, record["evaluations"][0]["frechet"], record["errors"][-1]["velocity"])

    chosen = LITTLE_SIZES if limit else range(len(SIZES[network]))
    cells = [size_name(network, size, limit) for size in chosen]
    return [found for found in by_seed(m, "sizes", cells, of).values() if None not in found]


def power_law(x: list[float], y: list[float]) -> tuple[float, float]:
    """(a, b) of y = a * x^b, by least squares of the logarithms."""
    b, log_a = np.polyfit(np.log(x), np.log(y), 1)
    return float(np.exp(log_a)), float(b)


def exponents(m: Measured, network: str, figure: str, largest: int = 4) -> list[float]:
    """One per seed: over so many of the largest sizes."""
    return [power_law([size.flops for size in found[-largest:]],
                      [getattr(size, figure) for size in found[-largest:]])[1]
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
    """Over all sizes, and, because no power law need hold over all of them, over the larger ones alone."""
    return [Comparison(f"exponent of the {what}, {which}", exponents(m, "dit", figure, largest),
                       exponents(m, "unet", figure, largest), quantity=f"{figure} {largest}", plain=True)
            for which, largest in (("four sizes", 4), ("the two largest", 2))
            for what, figure in (("velocity error", "velocity"), ("distance", "frechet"))]


def ratios(m: Measured, study: str, *places: tuple[str, Callable[[dict], float | None]]) -> list[float]:
    """One figure over another, each given by its cell and how to get it: one per seed that has both."""
    ours, theirs = (by_seed(m, study, [cell], get) for cell, get in places)
    pairs = [(ours[seed][0], theirs[seed][0]) for seed in sorted(ours.keys() & theirs.keys())]
    return [one / other for one, other in pairs if None not in (one, other)]


def little_data(m: Measured) -> list[Comparison]:
    """On a tenth of the pictures, and what that changes for either network."""
    get = score(first_order("rf"))
    found = []
    for size in LITTLE_SIZES:
        cells = [[size_name(network, size, limit) for limit in (LITTLE, None)]
                 for network in ("unet", "dit")]
        found += [Comparison(f"size {size + 1} of 4", *(m.values("sizes", few, get) for few, _ in cells)),
                  Comparison(f"size {size + 1} of 4: ratio to the distance with all pictures",
                             *(ratios(m, "sizes", (few, get), (every, get)) for few, every in cells),
                             quantity="ratio", digits=2)]
    return found


def corners_at(part: int) -> Callable[[dict], float | None]:
    """For `Measured.values`: the share of samples whose corners agree after that part of CHECKPOINTS."""
    return score(CORNERS_AT._replace(checkpoint=part).label, "agreement")


CORNER_PARTS = {"after an eighth": 1, "after a quarter": EARLY, "at the end": CHECKPOINTS}


def far_corners(m: Measured) -> list[Comparison]:
    """Attention within the U-Net."""
    without, *others, _ = CORNER_NETWORKS
    return [Comparison(f"{name}, {when}", m.values("corners", name, corners_at(part)),
                       m.values("corners", without, corners_at(part)), higher=True, share=2000)
            for when, part in CORNER_PARTS.items() for name in others]


def far_corners_of_a_transformer(m: Measured) -> list[Comparison]:
    """Against each U-Net."""
    *unets, transformer = CORNER_NETWORKS
    return [Comparison(f"against {name}, {when}", m.values("corners", transformer, corners_at(part)),
                       m.values("corners", name, corners_at(part)), higher=True, share=2000, group=when)
            for when, part in CORNER_PARTS.items() for name in unets]


# Where the times are shifted: whether in training, whether in sampling.
SHIFTED = {"training and sampling": (True, True), "sampling only": (False, True),
           "training only": (True, False)}


def shifted(side: int, steps: int, where: str, shift: float) -> tuple[str, Callable[[dict], float | None]]:
    """The cell of "shift" that has the times shifted by so much there, one of SHIFTED, and its score."""
    in_training, in_sampling = (shift if shifts else 1 for shifts in SHIFTED[where])
    label = f"euler {steps}, guidance 1" + f", shift {in_sampling:g}" * (in_sampling != in_training)
    return f"{side} px, trained with {in_training:g}", score(label)


def shifted_times(where: str) -> Callable[[Measured], list[Comparison]]:
    """By 2 at 64 pixels: sqrt(m / n) for four times as many pixels (Esser et al. 2024, eq. 23). Against none
    there; and what it changes there, against what it changes at 32 pixels. where: one of SHIFTED."""
    def comparisons(m: Measured) -> list[Comparison]:
        found = []
        for steps in SHIFT_STEPS:
            small, large = ([shifted(side, steps, where, shift) for shift in (2, 1)] for side in (32, 64))
            found += [Comparison(f"{steps} steps", *(m.values("shift", *place) for place in large)),
                      Comparison(f"{steps} steps: ratio to shift 1, against 32 pixels",
                                 ratios(m, "shift", *large), ratios(m, "shift", *small), quantity="ratio",
                                 digits=2)]
        return found

    return comparisons


def follows_prompts(m: Measured) -> list[Comparison]:
    joint, cross = (f"{network}, {name}" for network, name in PROMPTED.items())
    return [Comparison(what, m.values("prompts", joint, score(PROMPTED_AT.label, figure)),
                       m.values("prompts", cross, score(PROMPTED_AT.label, figure)), higher=True,
                       share=500)
            for figure, what in PROMPT_KINDS.items()]


FASTER = tuple(map(" ".join, FAMILIES))  # what claim 8 compares


class Pace(NamedTuple):
    evaluations: int                     # that a picture needs
    milliseconds: dict[int, float]       # per picture, by the size of the batch


def paces(m: Measured) -> dict[str, list[Pace]]:
    """Per network of FASTER, one per seed: what a picture takes at a distance that both networks reach, 10 %
    above the best of the worse one."""
    found = {cell: [] for cell in FASTER}
    drawn = by_seed(m, "steps", list(FASTER), curve)
    timed = by_seed(m, "speed", list(FASTER), lambda record: record["speed"])
    for seed in sorted(drawn.keys() & timed.keys()):
        curves, speeds = drawn[seed], timed[seed]
        if None in curves or None in speeds:
            continue
        quality = WITHIN * max(points[-1][1] for points in curves)
        for cell, points, rows in zip(FASTER, curves, speeds):
            calls = calls_to(points, quality)
            found[cell].append(Pace(calls, {row["batch"]: 1000 * calls * row["seconds"] / row["batch"]
                                            for row in rows}))
    return found


def faster(m: Measured) -> list[Comparison]:
    found = paces(m)
    ours, theirs = (found[cell] for cell in FASTER)
    return [Comparison(what, [pace.milliseconds[batch] for pace in ours],
                       [pace.milliseconds[batch] for pace in theirs])
            for what, batch in (("in batches of 256", 256), ("one picture alone", 1))]


def parent(m: Measured, nfe: int) -> list[float]:
    """What few-step trainings begin from, with or without the guidance that they learn."""
    return m.values("few steps", "dit rf logit-normal", best_within(nfe, (1.0, GUIDANCE)))


REFLOWS = ("reflow", "reflow twice", "longer reflow")
MEANFLOWS = {"MeanFlow": "meanflow", "longer MeanFlow": "longer meanflow"}
ONE_STEP = 1.5       # one step's distance, relative to the parent's: what counts as enough


def few_steps_after_reflow(m: Measured) -> list[Comparison]:
    return [Comparison(f"{name}, 4 evaluations, against its parent's 8 evaluations (4 guided steps)",
                       m.values("few steps", name, best_within(4)), parent(m, 8), factor=WITHIN)
            for name in REFLOWS]


def straightened(m: Measured) -> list[Comparison]:
    def straightness(record: dict) -> float:
        return record["straightness"]

    return [Comparison(f"{name}, against its parent", m.values("few steps", name, straightness),
                       m.values("few steps", "dit rf logit-normal", straightness)) for name in REFLOWS]


def one_step(m: Measured) -> list[Comparison]:
    return [Comparison(f"{name}, one evaluation, against its parent's 8 evaluations (4 guided steps)",
                       m.values("few steps", cell, best_within(1)), parent(m, 8), factor=ONE_STEP)
            for name, cell in MEANFLOWS.items()]


def logit_normal(m: Measured) -> list[Comparison]:
    return [Comparison(f"{network}, logit-normal against uniform", distance(m, network, "rf logit-normal"),
                       distance(m, network, "rf uniform"))
            for network in NETWORKS]


def transformer(m: Measured) -> list[Comparison]:
    found = [Comparison(f"{objective}, dit against unet", distance(m, "dit", objective),
                        distance(m, "unet", objective))
             for objective in OBJECTIVES]
    return found + [Comparison(f"{objective}, dit against unet{NOISE_TOO}",
                               any_sampler(m, f"dit {objective}"), any_sampler(m, f"unet {objective}"))
                    for objective in CLASSIC]


class Claim(NamedTuple):
    """What people say, the comparisons that it makes, and where they are shown."""
    number: str
    text: str
    comparisons: Callable[[Measured], list[Comparison]]
    digits: int                          # of its figures; a Fréchet distance has one
    section: str                         # of RESULTS.md, which has its table and its figure


CLAIMS = [
    Claim("0", "rectified flow with a transformer beats latent diffusion (with eps) with a U-Net: Fréchet "
               "distance", families, 1, "grid"),
    Claim("1", "rectified flow's schedule matters less: relative deviation of the Fréchet distance over four "
               "densities of its training times, against that over diffusion's noise schedules (three with "
               "v; two with eps, where cosine fails)", schedules_matter_less, 2, "schedules"),
    Claim("1a", "rectified flow's gradients are calmer than diffusion's: spread of the gradient norm",
          calmer_gradients, 2, "grid in full"),
    Claim("1b", "a wider range of learning rates works with rectified flow: how many octaves, of the four "
                "that were tried; more is better", more_rates_work, 2, "learning rates"),
    Claim("2", "straight path + velocity beats eps, v and x0 on the diffusion path with Stable Diffusion's "
               "noise schedule, at equal training and with uniform times: Fréchet distance, 50 first-order "
               "steps without noise", straight_path, 1, "grid"),
    Claim("2a", "logit-normal times beat uniform ones: Fréchet distance", logit_normal, 1, "grid"),
    Claim("2b", "the transformer beats the U-Net at equal FLOPs: Fréchet distance, 50 first-order steps "
                "without noise, or at most 50, also by samplers that add noise", transformer, 1, "grid"),
    Claim("2c", "rectified flow beats diffusion (with eps) whatever the sampler: Fréchet distance, at most "
                "50 evaluations by the best of first-order steps and of samplers that add noise",
          whatever_the_sampler, 1, "noise"),
    Claim("2d", "rectified flow's sampling paths are straighter than diffusion's: mean squared distance of "
                "the velocity from the chord, from the same mixtures of data and noise, and from noise",
          straighter, 3, "curvature"),
    Claim("2e", "with the loss of the velocity (or of v), predicting x0 beats predicting the velocity (or v) "
                "itself, even on latents of 16 values per token (Li and He 2025, JiT, propose it for pixel "
                "patches of hundreds of values): Fréchet distance", x0_prediction, 1, "weighting"),
    Claim("2f", "predicting the velocity, or v, with the loss of that quantity is best: Fréchet distance, "
                "against another prediction or another loss", own_prediction_and_loss, 1, "weighting"),
    Claim("2g", "straight path + velocity beats v on the diffusion path with the cosine noise schedule, too: "
                "Fréchet distance, 50 first-order steps without noise", straight_against_cosine, 1,
          "schedules"),
    Claim("3", "rectified flow (dit, logit-normal) needs fewer evaluations of the network than diffusion "
               "(with eps or v), each by its best solver without noise", few_evaluations, 1, "steps"),
    Claim("3b", "at most ten evaluations of rectified flow (dit, logit-normal) are as good as at most fifty "
                "of diffusion (with eps or v): Fréchet distance of the best solver, within 10 %",
          ten_against_fifty, 1, "steps"),
    Claim("3a", "high order is not needed on straight paths: Euler's distance is within 10 % of the best "
                "solver's, with at most 4 and 10 evaluations", euler_is_enough, 1, "steps"),
    Claim("4a", "a U-Net's inductive bias helps early: error of the velocity after a quarter of the training",
          early, 3, "errors"),
    Claim("4b", "a U-Net's inductive bias helps on little data: Fréchet distance with a tenth of the "
                "pictures, and its ratio to that with all, against the transformer of equal FLOPs",
          little_data, 1, "sizes"),
    Claim("4c", "the transformer scales better: exponents of power laws in the training FLOPs, against the "
                "U-Net; more negative is better", scaling, 3, "sizes"),
    Claim("5", "attention makes distant parts agree: share of samples whose two far corners show the same "
               "shape, against a U-Net without any, whose convolutions alone connect them (it has 2 x 2 at "
               "the bottom)",
          far_corners, 3, "corners"),
    Claim("5a", "a transformer makes distant parts agree better than a U-Net: share of samples whose two far "
                "corners show the same shape",
          far_corners_of_a_transformer, 3, "corners"),
    Claim("6", "the MM-DiT (joint attention) follows prompts better than the U-Net (cross-attention): share "
               "of pictures that show all of their prompt, after a short training", follows_prompts, 3,
          "prompts"),
    *(Claim(number, f"larger pictures need shifted times, in {where}: Fréchet distance at 64 pixels with "
                    "shift 2 against shift 1, and whether this gains more than at 32 pixels",
            shifted_times(where), 1, "shift")
      for number, where in (("7", "training and sampling"), ("7a", "training only"),
                            ("7b", "sampling only"))),
    Claim("8", "the transformer with rectified flow draws faster than the U-Net with diffusion, at equal "
               "quality, by solvers without noise: milliseconds per picture on one CPU core",
          faster, 1, "speed"),
    Claim("9", "reflow makes four evaluations as good as its parent's eight: Fréchet distance within 10 %, "
               "after further training for half as many steps, or as many",
          few_steps_after_reflow, 1, "few steps"),
    Claim("9a", "one step is enough: Fréchet distance of MeanFlow, after further training for half or twice "
                "as many steps, within 1.5 times its parent's", one_step, 1, "few steps"),
    Claim("9b", "reflow straightens the paths: mean squared distance of the velocity from the chord",
          straightened, 3, "few steps"),
]
