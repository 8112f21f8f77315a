"""From the results of benchmarks/compare.py to README.md and RESULTS.md: tables, figures and verdicts.

    python benchmarks/compare.py --readme                    # (from the root)

Nothing in them between two markers is typed by hand, and what has no results is one line that names the
command that measures it.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import figures, ladder
from benchmarks.claims import (BENT, CLAIMS, FAMILIES, MEANFLOWS, ONE_STEP, REFLOWS, RULE, SHIFTED, USABLE,
                               VERDICTS, Claim, Comparison, Measured, answers_to, best_guidance, best_within,
                               counted, crossover, depends_on, distance, exponents, families, first_order,
                               measured, needed, paces, parent, rate_distances, score, shifted, sizes,
                               straight_against_cosine, ten_against_fifty, typical, usable_octaves, vae_of,
                               verdict, whatever_the_sampler)
from benchmarks.compare import WITHOUT_BF16, on_cpu
from benchmarks.studies import (CHECKPOINTS, COUNTS, DEFAULT_SAMPLERS, FACTORS, GUIDANCE, HEADLINES, LITTLE,
                                NETWORKS, NOISY, OBJECTIVES, PROMPT_KINDS, PROMPTED_AT, RATES, SCHEDULES,
                                SHIFT_STEPS, SHIFTS, STUDIES)
from charts import BLUE, COLOURS, GREEN, MARKS, ORANGE, VERMILLION, Chart, Series
from ddpm import DDPM
from files import write_atomically


COLOUR_OF = {"unet": BLUE, "dit": VERMILLION, "mmdit": VERMILLION}        # of a network, in every chart


COUNTED = {"false": "are false here", "not shown": "are not shown", "depends": "depend on what is compared",
           "true": "are true"}


def summary(m: Measured) -> str:
    """The README's first findings, a line each, of means; without those that are not measured."""
    def means(what: list[list[float]]) -> list[str]:
        return [f"{np.mean(values):.1f}" for values in what]

    first, noisy, _, guided = families(m)
    lines = []
    if measured(first, 1) and measured(guided, 1):
        ours, theirs, ours_guided, theirs_guided = means([first.ours, first.theirs, guided.ours,
                                                          guided.theirs])
        scales = [f"{best_guidance(m, ' '.join(family))[0]:g}" for family in FAMILIES]
        lines.append(f"**The families**: rectified flow with a transformer has a Fréchet distance of {ours}, "
                     f"latent diffusion with a U-Net {theirs}; each with the scale of guidance that suits it "
                     f"best ({scales[0]} and {scales[1]}), {ours_guided} and {theirs_guided}.")
    steps = staircase_values(m, "frechet")[:6]
    if [change for change, *_ in steps] == [change for change, *_ in STAIRCASE[:6]]:
        eps, v, cosine, straight, logit_normal, transformer = means([values for _, _, values in steps])
        lines.append(f"**One change at a time**, beginning with {eps}: v prediction makes it {v}, then the "
                     f"cosine noise schedule {cosine}, then the straight path {straight}, then logit-normal "
                     f"times {logit_normal}, and then the transformer {transformer}.")
    schedules = straight_against_cosine(m)
    before = [distance(m, network, "ddpm v") for network in NETWORKS]
    if all(measured(each, 1) for each in schedules) and all(before):
        unet, unet_cosine, unet_straight, dit, dit_cosine, dit_straight = means(
            [side for each, v in zip(schedules, before) for side in (v, each.theirs, each.ours)])
        lines.append("**The noise schedule**: with v prediction, the U-Net has "
                     f"{unet} with Stable Diffusion's schedule and {unet_cosine} with the cosine one, and on "
                     f"the straight path with uniform times {unet_straight}; the transformer has {dit}, "
                     f"{dit_cosine} and {dit_straight}.")
    few = ten_against_fifty(m)[:2]
    if all(measured(each, 1) for each in few):
        ten, eps, v = means([few[0].ours, *(each.theirs for each in few)])
        lines.append(f"**Few steps**: with at most ten evaluations, rectified flow reaches {ten}; with at "
                     f"most fifty, diffusion with the same transformer reaches {eps} with eps and {v} with v "
                     "(each by its best solver without noise and its best number of steps).")
    one_and_two = [m.values("few steps", "longer meanflow", best_within(count)) for count in (1, 2)]
    if all(one_and_two) and parent(m, 8):
        one, two, eight = means([*one_and_two, parent(m, 8)])
        lines.append("**One step**: a MeanFlow that begins with the transformer of rectified flow and is "
                     f"trained for twice as many steps as that was reaches {one} with one evaluation and "
                     f"{two} with two; that transformer, {eight} with eight (all with guidance "
                     f"{GUIDANCE:g}).")
    unet = next(each for each in whatever_the_sampler(m) if each.what == "unet")
    if measured(noisy, 1) and measured(unet, 1):
        flow, diffusion, best = means([unet.ours, unet.theirs, noisy.ours])
        lines.append("**The sampler**: with the sampler and the number of steps that suit each run best (at "
                     f"most 50 evaluations, noise allowed), the U-Net reaches {diffusion} with diffusion and "
                     f"{flow} with rectified flow, and the transformer {best} with rectified flow.")
    if lines:
        lines += scale(m)
        numbers = {name: [] for name in VERDICTS}
        for claim in CLAIMS:
            numbers[verdict(claim.comparisons(m))].append(claim.number)
        lines.append(f"**Of {len(CLAIMS)} claims**, " + ", ".join(
            f"{len(numbers[name])} {words} ({', '.join(numbers[name])})" for name, words in COUNTED.items()
            if numbers[name])
            + ": [the table](#what-people-say-measured).")
    return "\n".join(f"- {line}" for line in lines)


def scale(m: Measured) -> list[str]:
    """A line by which a reader can judge the distances and the trainings; none without a floor."""
    real, restored = (as_many_as_samples(m, "fashion-mnist", label)
                      for label in ("training images", "reconstructions"))
    if not real:
        return []
    trained = [record for record in m.records if "parameters" in record]
    timed = [record for record in trained if on_cpu(record) and "processor_seconds" in record]
    n = f"{real[0]['n']:,}"
    distances = [span([row["frechet"] for row in rows], 1, to=" to ") for rows in (real, restored)]
    parameters = span([record["parameters"] / 1e6 for record in trained], 1, to=" to ")
    steps = span([record["steps"] for record in trained], 0, to=" to ")
    batches = " or ".join(map(str, sorted({record["batch_size"] for record in trained})))
    minutes = span([record["processor_seconds"] / 60 for record in timed], 0, to=" to ")
    took = minutes and f" ({minutes} minutes of one core)"
    return [f"**The scale**: {n} real pictures have a distance of {distances[0]}, {n} reconstructions by the "
            f"VAE {distances[1]}. The networks are small: {parameters} M parameters, trained for {steps} "
            f"steps of {batches} pictures{took}. Longer training may change a verdict."]


def as_many_as_samples(m: Measured, cell: str, label: str) -> list[dict]:
    """The scores of real pictures or of reconstructions, one row per VAE: of as many as a cell has samples,
    which is the smallest number."""
    found = [[row for row in record["evaluations"] if label in row["label"]]
             for record in m.of("floor", cell)]
    return [min(rows, key=lambda row: row["n"]) for rows in found]


def claims_table(m: Measured) -> str:
    """A line per claim: what contradicts the usual telling first, what is not measured last. It shows one
    comparison that is answered as most of them are."""
    rows = []
    for claim in CLAIMS:
        comparisons = claim.comparisons(m)
        found = verdict(comparisons)
        rank = VERDICTS.index(found)
        first, where = "", ""
        if found != "not measured yet":
            answer, one = typical(comparisons)
            first = f"{answer}: {one.what}, {compared(claim, one)}"
            details = f" ({counted(comparisons)})"
            if found == "depends":
                details += f": {depends_on(comparisons)}"
            found = f"**{found}**{details}"
            where = f"[{claim.section}]({anchor_of(claim.section)})"
        rows.append((rank, f"| {claim.number} | {claim.text} | {first} | {found} | {where} |"))
    if all(rank == len(VERDICTS) - 1 for rank, _ in rows):
        return ""
    rows.sort(key=lambda pair: pair[0])              # stable: else in the order of CLAIMS
    head = ["| | what people say | one of its comparisons: mean (range over the seeds) of the claimed winner "
            "against the other | verdict | shown in |",
            "|---|---|---|---|---|"]
    return "\n".join([*head, *(row for _, row in rows)])


def compared(claim: Claim, comparison: Comparison) -> str:
    """The two sides, "2.1 (2.0 to 2.2) against 3.4 (3.3 to 3.5)"."""
    digits = claim.digits if comparison.digits is None else comparison.digits
    return " against ".join(ladder.spread(values, digits) for values in (comparison.ours, comparison.theirs))


def comparison_table(m: Measured) -> str:
    """A line per comparison of every claim."""
    rows = []
    for claim in CLAIMS:
        comparisons = claim.comparisons(m)
        for answer, each in zip(answers_to(comparisons), comparisons):
            found = compared(claim, each) if each.ours and each.theirs else ""
            rows.append(f"| {claim.number} | {each.what} | {found} | {answer if found else 'not measured'} |")
    if all(row.endswith("|  | not measured |") for row in rows):
        return ""
    head = ["| claim | comparison | mean (range over the seeds) | as claimed? |", "|---|---|---|---|"]
    return "\n".join(head + rows) + f"\n\n{RULE}"


# ---- tables and figures of the studies

def records_of(m: Measured, study: str) -> list[dict]:
    """Those behind a study's table: in the grid's, a seed that the grid lacks is from another study of the
    same network that has scores."""
    found = [record for record in m.records if record["study"] == study]
    if study == "grid":
        for cell in STUDIES["grid"].cells:
            for records in m.runs(cell.name).values():
                if all(record["study"] != "grid" for record in records):
                    found += [record for record in records if record["evaluations"]][:1]
    return found


def seeds_of(m: Measured, study: str, ranges: bool = True) -> str:
    """How many seeds the cells of a study have, in words. ranges: whether its table gives them."""
    counts = {}
    for record in records_of(m, study):
        counts.setdefault(record["cell"], set()).add(record["seed"])
    sizes = sorted({len(seeds) for seeds in counts.values()})
    words = f"{' to '.join(map(str, sizes[:1] + sizes[1:][-1:]))} seed{'s' * (sizes != [1])} per cell"
    words += f" ({', '.join(map(str, sorted(set().union(*counts.values()))))})"
    if sizes[0] == 1 < sizes[-1]:
        alone = ", ".join(cell for cell, seeds in counts.items() if len(seeds) == 1)
        words += ", where no range is given one" if ranges else f"; one seed: {alone}"
    return words


def made_with(m: Measured, study: str) -> str:
    """Device, dates, commits: what a reader needs to know where figures come from."""
    found = records_of(m, study)
    parts = [sorted({record[name] for record in found}) for name in ("device", "date", "commit")]
    devices, dates, commits = parts
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    count = most_vaes(found)
    vaes = f"; {count} VAEs, of one command on {count} machines" if count > 1 else ""
    return f"{' and '.join(devices)}{vaes}; {when}; commit {', '.join(commits)}"


def most_vaes(records: list[dict]) -> int:
    """How many VAEs a study was measured with, on the data set that has the most of them."""
    vaes: dict[str, set[str]] = {}
    for record in records:
        vae_command = record["commands"][0]
        vaes.setdefault(vae_command, set()).add(vae_of(record))
    return max(map(len, vaes.values()))


def shown(values: list[float], digits: int) -> str:
    """In a study's table, which says below how many seeds there are: of one just the figure, of none ""."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return ladder.spread(values, digits) if values else ""


def mean_of(m: Measured, study: str, cell: str, get: Callable[[dict], float | None], digits: int) -> str:
    return shown(m.values(study, cell, get), digits)


def span(values: list[float], digits: int, to: str = "–") -> str:
    """Short, for a wide table: "26.1–26.4", or "26.2" where the ends do not differ; "" for none."""
    if not values:
        return ""
    low, high = (f"{end(values):,.{digits}f}" for end in (min, max))
    return low if low == high else f"{low}{to}{high}"


class Column(NamedTuple):
    head: str
    get: Callable[[dict], float | None]
    digits: int


def training_minutes(record: dict) -> float | None:
    """Its CPU time; None on a GPU, or where a kill left no account of it."""
    if not on_cpu(record) or "processor_seconds" not in record:
        return None
    return record["processor_seconds"] / 60


def grid_columns(objective: str) -> list[Column]:
    """Those of the README: scores and time. Without guidance, the first-order solver of either path."""
    plain = first_order(objective)
    guided = DEFAULT_SAMPLERS[objective.split()[0]][1].label
    return [Column("Fréchet, no guidance", score(plain), 1),
            Column("agreement", score(plain, "agreement"), 3),
            Column("Fréchet, guidance 1.5", score(guided), 1),
            Column("agreement", score(guided, "agreement"), 3),
            Column("CPU minutes", training_minutes, 0)]


def full_columns(objective: str) -> list[Column]:
    """What the README leaves out; the same for every objective."""
    return [Column("velocity error", lambda r: r["errors"][-1]["velocity"], 3),
            Column("x0 error", lambda r: r["errors"][-1]["x0"], 3),
            Column("spread of the gradient norm", lambda r: r["grad_norm"].get("spread"), 2)]


def grid_rows(m: Measured, columns: Callable[[str], list[Column]]) -> str:
    """A row per cell of the grid; "" where none is measured."""
    rows = []
    for network, objective in itertools.product(NETWORKS, OBJECTIVES):
        if m.of("grid", f"{network} {objective}"):
            texts = [shown(m.pooled(f"{network} {objective}", column.get), column.digits)
                     for column in columns(objective)]
            rows.append(f"| {network} {objective} | {' | '.join(texts)} |")
    if not rows:
        return ""
    heads = ["", *(column.head for column in columns("rf uniform"))]
    return "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *rows])


def grid_table(m: Measured) -> str:
    rows = grid_rows(m, grid_columns)
    if not rows:
        return ""
    costs = []
    for network in NETWORKS:
        record = next((r for r in m.records if r["study"] == "grid" and r["cell"].startswith(network)
                       and "parameters" in r), None)
        if record:
            costs.append(f"{network} {record['flops_per_example'] / 1e6:.0f}, "
                         f"{record['parameters'] / 1e6:.1f} M")
    notes = ("Without guidance by 50 first-order steps (DDIM, Euler), with it by DDIM 50 or Heun 10; none of "
             "these samplers adds noise. "
             f"MFLOP per example, forward and backward, and parameters: {'; '.join(costs)}. "
             f"{seeds_of(m, 'grid')}; {made_with(m, 'grid')}.")
    return f"{rows}\n\n{notes}{floor(m)}"


def full_grid_table(m: Measured) -> str:
    rows = grid_rows(m, full_columns)
    return rows and (
        f"{rows}\n\nErrors: means of the squared errors of eps - x0 and of x0 on held-out latents, over the "
        "same noise levels u for every cell. The first is the second divided by u^2; where x0 is predicted, "
        "its largest part by far is at small u, where little noise is left. Spread: interquartile range over "
        "median. "
        f"{seeds_of(m, 'grid')}; {made_with(m, 'grid')}.")


def floor(m: Measured) -> str:
    """What real pictures score, and their reconstructions by each VAE that was used."""
    found = [record["evaluations"] for record in m.of("floor", "fashion-mnist")]
    if not found:
        return ""
    texts = [f"{rows[0]['n']:,} {rows[0]['label']} at "
             f"{span([row['frechet'] for row in rows], 2, to=' to ')}"
             for rows in zip(*found)]
    # the first row has the classifier's accuracy, which is the agreement of the test images
    real, restored = (span([row["agreement"] for row in rows], 3, to=" to ") for rows in zip(*found)
                      if rows[0].get("agreement") is not None)
    return (f"\n\nFréchet distances for reference: {'; '.join(texts)}. The real test images have agreement "
            f"{real}, their reconstructions {restored}: more than that is more typical, not better.")


def series_of(name: str, points: dict, colour: str | None = None, mark: str | None = None) -> list[Series]:
    """The series of these points, x -> the values of all seeds, without those that have none; no series where
    no point is left."""
    points = {x: values for x, values in points.items() if values}
    return [Series(name, list(points), list(points.values()), colour, mark)] if points else []


def objective_chart(title: str, y: str, values: Callable[[str, str], list[float]],
                    objectives: Iterable[str] = OBJECTIVES) -> Chart | None:
    """Both networks at each objective; values(network, objective) has one per seed."""
    series = []
    for network in NETWORKS:
        series += series_of(network, {objective: values(network, objective) for objective in objectives},
                            COLOUR_OF[network])
    return Chart(title, "objective", y, series) if series else None


def grid_chart(m: Measured) -> Chart | None:
    return objective_chart("Equal data, equal FLOPs: Fréchet distance, 50 first-order steps, no guidance",
                           "Fréchet distance", lambda network, objective: distance(m, network, objective))


def gradient_chart(m: Measured) -> Chart | None:
    return objective_chart("Spread of the gradient norm: interquartile range over median", "spread",
                           lambda network, objective: m.pooled(f"{network} {objective}",
                                                               lambda r: r["grad_norm"].get("spread")))


def error_chart(m: Measured, kind: str, title: str, objectives: list[str]) -> Chart | None:
    """A colour per objective, a mark per network. At the ends of CHECKPOINTS equal parts, which all seeds
    have; an interrupted training has others as well."""
    series = []
    for colour, objective in zip(COLOURS, objectives):
        for mark, network in zip(MARKS, NETWORKS):
            points: dict[int, list[float]] = {}
            for record in m.of("grid", f"{network} {objective}"):
                for row in record.get("errors", []):
                    if row["step"] % (record["steps"] // CHECKPOINTS) == 0:
                        points.setdefault(row["step"], []).append(row[kind])
            series += series_of(f"{network} {objective}", dict(sorted(points.items())), colour, mark)
    return Chart(title, "training step", "mean squared error", series, log_y=True) if series else None


def velocity_chart(m: Measured) -> Chart | None:
    return error_chart(m, "velocity", "Error of the velocity on held-out latents, without x0 prediction",
                       [objective for objective in OBJECTIVES if objective != "ddpm x0"])


def x0_chart(m: Measured) -> Chart | None:
    return error_chart(m, "x0", "Error of x0 on held-out latents", list(OBJECTIVES))


# One change at a time: (what changes, network, objective, label of the evaluation).
STAIRCASE = [
    ("latent diffusion", "unet", "ddpm eps", "ddim 50, guidance 1"),
    ("predicts v, with a loss of v", "unet", "ddpm v", "ddim 50, guidance 1"),
    ("cosine noise schedule", "unet", "ddpm cosine, v", "ddim 50, guidance 1"),
    ("straight path, velocity in place of v", "unet", "rf uniform", "euler 50, guidance 1"),
    ("logit-normal times", "unet", "rf logit-normal", "euler 50, guidance 1"),
    ("transformer", "dit", "rf logit-normal", "euler 50, guidance 1"),
    ("Heun in place of Euler, 19 evaluations in place of 50", "dit", "rf logit-normal",
     "heun 10, guidance 1"),
    ("guidance 1.5", "dit", "rf logit-normal", "heun 10, guidance 1.5"),
]


def staircase_values(m: Measured, name: str) -> list[tuple[str, str, list[float]]]:
    found = []
    for change, network, objective, label in STAIRCASE:
        values = m.pooled(f"{network} {objective}", score(label, name))
        if values:
            found.append((change, f"{network}, {objective}, {label.partition(',')[0]}", values))
    return found


def staircase_table(m: Measured) -> str:
    steps = staircase_values(m, "frechet")
    if not steps:
        return ""
    agreements = [values for _, _, values in staircase_values(m, "agreement")]
    rows = ["| change | cell | Fréchet | agreement |", "|---|---|---|---|"]
    for i, ((change, cell, values), agreement) in enumerate(zip(steps, agreements)):
        first = "" if i == 0 else "+ "
        rows.append(f"| {first}{change} | {cell} | {shown(values, 1)} | {shown(agreement, 3)} |")
    return "\n".join(rows)


def steps_table(m: Measured) -> str:
    """A row per cell and solver, with what was measured and nothing else."""
    rows = [f"| evaluations | {' | '.join(map(str, COUNTS))} |", "|---" * (len(COUNTS) + 1) + "|"]
    for cell in STUDIES["steps"].cells:
        records = [record for record in m.of("steps", cell.name) if "diverged" not in record]
        for solver in dict.fromkeys(each.sampler for each in cell.evaluations):
            texts = []
            for before, count in zip((0, *COUNTS), COUNTS):      # Heun's are odd: 3, 5, ...
                found = [row for record in records for row in record["evaluations"]
                         if row["sampler"] == solver and before < row["nfe"] <= count]
                text = span([row["frechet"] for row in found], 1)
                texts.append(f"{text}, {np.mean([row['agreement'] for row in found]):.2f}" if text else "")
            if any(texts):
                rows.append(f"| {cell.name}, {solver} | {' | '.join(texts)} |")
    if len(rows) == 2:
        return ""
    calls = []
    for network, objective in HEADLINES:
        values = m.values("steps", f"{network} {objective}", needed)
        if values:
            calls.append(f"{network} {objective} {ladder.spread(values, 0)}")
    notes = ("Fréchet distance without guidance, as the range over the seeds, and mean agreement. ddpm is "
             "ancestral sampling, which adds noise. Heun's steps take two evaluations and the last one takes "
             "one, so its counts are odd, and at most one less than the column. Evaluations until the best "
             "solver without noise is within 10 % of the network's best distance, of the counts that were "
             f"measured: {'; '.join(calls)}. "
             f"{seeds_of(m, 'steps', ranges=False)}; {made_with(m, 'steps')}.")
    return "\n".join(rows) + f"\n\n{notes}"


DRAWN_SOLVERS = {"first order": ("ddim", "euler"), "Heun": ("heun",), "UniPC": ("unipc_3",),
                 "ancestral": ("ddpm",)}


def steps_chart(m: Measured) -> Chart | None:
    series = []
    # A colour per cell, a mark per kind of solver.
    for colour, (network, objective) in zip((BLUE, ORANGE, VERMILLION), HEADLINES):
        cell = f"{network} {objective}"
        for mark, (name, solvers) in zip(MARKS, DRAWN_SOLVERS.items()):
            points: dict[int, list[float]] = {}
            for record in m.of("steps", cell):
                for row in record.get("evaluations", []):
                    if row["sampler"] in solvers and row["guidance"] == 1:
                        points.setdefault(row["nfe"], []).append(row["frechet"])
            series += series_of(f"{cell}, {name}", dict(sorted(points.items())), colour, mark)
    return Chart("Few steps: Fréchet distance without guidance", "evaluations of the network",
                 "Fréchet distance", series, log_x=True, log_y=True, size=(1600, 1050)) if series else None


def guidance_table(m: Measured) -> str:
    rows, scales = [], sorted({each.scale for cell in STUDIES["guidance"].cells for each in cell.evaluations})
    for cell in STUDIES["guidance"].cells:
        for steps in sorted({each.steps for each in cell.evaluations}):
            each = [e for e in cell.evaluations if e.steps == steps]
            texts = []
            for evaluation in sorted(each, key=lambda e: e.scale):
                pair = [m.values("guidance", cell.name, score(evaluation.label, name))
                        for name in ("frechet", "agreement")]
                texts.append(f"{span(pair[0], 1)}, {np.mean(pair[1]):.3f}" if pair[0] else "")
            if any(texts):
                rows.append(f"| {cell.name}, {each[0].sampler} {steps} | {' | '.join(texts)} |")
    if not rows:
        return ""
    head = ["| guidance | " + " | ".join(f"{scale:g}" for scale in scales) + " |",
            "|---" * (len(scales) + 1) + "|"]
    return "\n".join(head + rows) + ("\n\nFréchet distance, as a range over the seeds, then mean agreement. "
                                     f"{seeds_of(m, 'guidance', ranges=False)}; {made_with(m, 'guidance')}.")


def guidance_chart(m: Measured) -> Chart | None:
    """A colour per network, a mark per number of steps."""
    series = []
    for cell in STUDIES["guidance"].cells:
        for mark, steps in zip(MARKS, sorted({each.steps for each in cell.evaluations})):
            points = {each.scale: m.values("guidance", cell.name, score(each.label))
                      for each in sorted(cell.evaluations, key=lambda e: e.scale) if each.steps == steps}
            series += series_of(f"{cell.name}, {cell.evaluations[0].sampler} {steps}", points,
                                COLOUR_OF[cell.name.split()[0]], mark)
    return Chart("Guidance and steps: Fréchet distance", "guidance scale", "Fréchet distance", series,
                 log_y=True) if series else None


def noise_table(m: Measured) -> str:
    cells = [cell for cell in STUDIES["noise"].cells if m.of("noise", cell.name)]
    if not cells:
        return ""
    counts = sorted({each.steps for each in cells[0].evaluations})
    rows = ["| evaluations | " + " | ".join(map(str, counts)) + " |", "|---" * (len(counts) + 1) + "|"]
    for cell in cells:
        for solver in dict.fromkeys(each.sampler for each in cell.evaluations):
            texts = [mean_of(m, "noise", cell.name, score(each.label, "frechet"), 1)
                     for each in cell.evaluations if each.sampler == solver]
            rows.append(f"| {cell.name}, {solver} | {' | '.join(texts)} |")
    return "\n".join(rows) + ("\n\nFréchet distance without guidance. ddim and euler add no noise. "
                              f"{seeds_of(m, 'noise')}; {made_with(m, 'noise')}.")


NOISE_STEPS = 20                         # of the chart
WITHOUT_NOISE = "without noise"          # DDIM or Euler, by the path


def noise_chart(m: Measured) -> Chart | None:
    series = []
    for mark, cell in zip(MARKS, STUDIES["noise"].cells):
        points = {each.sampler if each.sampler in NOISY else WITHOUT_NOISE:
                  m.values("noise", cell.name, score(each.label))
                  for each in cell.evaluations if each.steps == NOISE_STEPS}
        network, _, objective = cell.name.partition(" ")
        colour = {"unet": (BLUE, ORANGE), "dit": (VERMILLION, GREEN)}[network][objective.startswith("rf")]
        series += series_of(cell.name, points, colour, mark)
    return Chart(f"Samplers that add noise, {NOISE_STEPS} steps: Fréchet distance, no guidance", "sampler",
                 "Fréchet distance", series) if series else None


def shift_rows(m: Measured, side: int, steps: int) -> dict[str, dict[float, list[float]]]:
    """Distances by where the times are shifted, and by how much."""
    return {where: {shift: m.values("shift", *shifted(side, steps, where, shift)) for shift in SHIFTS}
            for where in SHIFTED}


def shift_table(m: Measured) -> str:
    rows = ["| shift | " + " | ".join(f"{shift:g}" for shift in SHIFTS) + " |",
            "|---" * (len(SHIFTS) + 1) + "|"]
    for side in (32, 64):
        for steps in SHIFT_STEPS:
            for where, by_shift in shift_rows(m, side, steps).items():
                texts = [shown(values, 1) for values in by_shift.values()]
                if any(texts):
                    rows.append(f"| {side} px, {steps} Euler steps, {where} | {' | '.join(texts)} |")
    if len(rows) == 2:
        return ""
    notes = ("Fréchet distance without guidance. Pictures of 64 pixels are scaled down to 32, by the mean of "
             f"each 2 x 2 pixels, and judged by the same classifier{floors(m)}. "
             f"{seeds_of(m, 'shift')}; {made_with(m, 'shift')}.")
    return "\n".join(rows) + f"\n\n{notes}"


def floors(m: Measured) -> str:
    """Of the VAEs of both sizes, a half sentence: "; 2,000 reconstructions have ..."; "" for none."""
    parts = []
    for side, cell in ((32, "fashion-mnist"), (64, "fashion-mnist-64")):
        rows = as_many_as_samples(m, cell, "reconstructions")
        if rows:
            distances = span([row["frechet"] for row in rows], 2, to=" to ")
            parts.append(f"{distances} with the VAE of {side} pixels")
    return f"; 2,000 reconstructions have a distance of {' and '.join(parts)}" if parts else ""


def shift_chart(m: Measured) -> Chart | None:
    series = []
    for colour, side in zip(COLOURS, (32, 64)):
        for mark, (where, by_shift) in zip(MARKS, shift_rows(m, side, SHIFT_STEPS[0]).items()):
            series += series_of(f"{side} px, {where}", by_shift, colour, mark)
    return Chart("Shifted times: Fréchet distance, 10 Euler steps", "shift", "Fréchet distance",
                 series) if series else None


def size_table(m: Measured) -> str:
    rows = ["| | training TFLOP | velocity error | Fréchet |", "|---|---|---|---|"]
    for cell in STUDIES["sizes"].cells:
        records = [record for record in m.of("sizes", cell.name) if "diverged" not in record]
        if records:
            first = records[0]
            cost = first["flops_per_example"] * first["steps"] * first["batch_size"] / 1e12
            rows.append(f"| {cell.name} | {cost:.0f} "
                        f"| {mean_of(m, 'sizes', cell.name, lambda r: r['errors'][-1]['velocity'], 3)} "
                        f"| {mean_of(m, 'sizes', cell.name, score(first_order('rf')), 1)} |")
    if len(rows) == 2:
        return ""
    laws = "".join(law(m, figure, what) for figure, what in (("frechet", "distance"),
                                                             ("velocity", "velocity error")))
    if laws:
        laws += ("The power laws have no floor, and the FLOPs vary by the size alone: all train for equally "
                 "many steps. ")
    return "\n".join(rows) + f"\n\n{laws}{seeds_of(m, 'sizes')}; {made_with(m, 'sizes')}."


def law(m: Measured, figure: str, what: str) -> str:
    """A sentence on the exponents of both networks, and on where their power laws cross; "" for no data."""
    found = {network: exponents(m, network, figure) for network in NETWORKS}
    if not all(found.values()):
        return ""
    parts = [f"{network} {ladder.spread(values, 3)}" for network, values in found.items()]
    point = crossover(m, figure)
    largest = max(size.flops for network in NETWORKS for each in sizes(m, network, None) for size in each)
    where = f"the lines cross at {point / 1e12:.0f} TFLOP" if point else "no crossover near these sizes"
    if point and point > largest:
        where += f", {point / largest:.1f} times the largest training here, so this is extrapolated"
    return f"Exponents of the {what}: {', '.join(parts)}; {where}. "


def size_chart(m: Measured, figure: str, what: str) -> Chart | None:
    series = []
    for mark, limit in zip(MARKS, (None, LITTLE)):
        for network in NETWORKS:
            found = sizes(m, network, limit)
            if found:
                costs = [size.flops for size in found[0]]
                values = [[getattr(size, figure) for size in column] for column in zip(*found)]
                name = network + (f", {limit:,} pictures" if limit else "")
                series.append(Series(name, costs, values, COLOUR_OF[network], mark))
    return Chart(f"Four sizes of each network: {what}", "training FLOPs", what, series, log_x=True,
                 log_y=True) if series else None


def corner_table(m: Measured) -> str:
    evaluations = {cell.name: cell.evaluations for cell in STUDIES["corners"].cells}
    heads = [f"{part} of {CHECKPOINTS}" for part in range(1, CHECKPOINTS + 1)]
    rows = cells_and_costs(m, "corners", ["", *heads],
                           lambda cell: [mean_of(m, "corners", cell, score(each.label, "agreement"), 3)
                                         for each in evaluations[cell]])
    if not rows:
        return ""
    best = [row["agreement"] for record in m.of("floor", "corners") for row in record["evaluations"]]
    notes = ("Share of samples with one shape in each of two opposite corners, alike in colour and kind, by "
             "how much of the training is done; of pictures that the VAE has encoded and decoded: "
             f"{', '.join(f'{value:.3f}' for value in best)}. All networks have equal training FLOPs. MFLOP "
             f"per example, forward and backward. {seeds_of(m, 'corners')}; {made_with(m, 'corners')}.")
    return f"{rows}\n\n{notes}"


def corner_chart(m: Measured) -> Chart | None:
    series = []
    for cell, mark in zip(STUDIES["corners"].cells, MARKS):
        series += series_of(cell.name, {
            evaluation.checkpoint / CHECKPOINTS: m.values("corners", cell.name,
                                                          score(evaluation.label, "agreement"))
            for evaluation in cell.evaluations}, COLOUR_OF[cell.name.partition(",")[0]], mark)
    return Chart("Two far corners: share of samples in which they agree", "share of the training",
                 "share of samples", series) if series else None


def curvature_table(m: Measured) -> str:
    rows = []
    for cell in STUDIES["curvature"].cells:
        if m.of("curvature", cell.name):
            found = [shown(bent(m, cell.name), 3) for bent in BENT.values()]
            rows.append(f"| {cell.name} | {' | '.join(found)} |")
    if not rows:
        return ""
    return "\n".join([f"| | {' | '.join(BENT)} |", "|---|---|---|", *rows]) + (
        "\n\nThe mean square of the velocity's distance from the chord of a trajectory, per latent value, "
        "over 20 steps in the coordinates that all paths have in common: 0 if all are straight. From the "
        "same mixtures of data and noise, with the same noise levels u, the exact flow is the same for "
        "every path and prediction, so only the errors of the networks differ. (The straight path joins "
        "single pairs of data and noise; the flow is the average over all pairs through a point, and it "
        "bends.) From noise, each path has its own times: the diffusion path begins at u = 0.936, where "
        "some data is left, the straight path at u = 1, where the velocity says least about the end of the "
        f"trajectory. From the same mixtures: {seeds_of(m, 'curvature')}; {made_with(m, 'curvature')}. From "
        "noise: as in the grid.")


def curvature_chart(m: Measured) -> Chart | None:
    series = []
    for (where, bent), mark in zip(BENT.items(), MARKS):
        for network in NETWORKS:
            points = {objective: bent(m, f"{network} {objective}") for objective in OBJECTIVES}
            series += series_of(f"{network}, {where}", points, COLOUR_OF[network], mark)
    return Chart("How much the trajectories of sampling bend", "objective", "squared distance from the chord",
                 series) if series else None


def weighting_table(m: Measured) -> str:
    rows = []
    for cell in STUDIES["weighting"].cells:
        devices = sorted({"CPU" if on_cpu(record) else "GPU" for record in m.of("weighting", cell.name)})
        columns = [(score(cell.evaluations[0].label), 1), (score(cell.evaluations[0].label, "agreement"), 3),
                   (lambda r: r["errors"][-1]["velocity"], 3), (lambda r: r["errors"][-1]["x0"], 3)]
        if m.of("weighting", cell.name):
            texts = [mean_of(m, "weighting", cell.name, get, digits) for get, digits in columns]
            rows.append(f"| {cell.name} | {' | '.join(texts)} | {', '.join(devices)} |")
    if not rows:
        return ""
    head = ["| dit | Fréchet | agreement | velocity error | x0 error | trained on |", "|---" * 6 + "|"]
    return "\n".join(head + rows) + (
        "\n\nFréchet distance, 50 first-order steps; uniform times. At a given xt, each prediction "
        "determines the others, so the loss only weights the times. "
        f"{seeds_of(m, 'weighting')}; {made_with(m, 'weighting')}.")


def weighting_chart(m: Measured) -> Chart | None:
    """A place per prediction and loss; those of the path itself are v, or the velocity."""
    places: dict[str, dict[str, list[float]]] = {"ddpm": {}, "rf": {}}
    for cell in STUDIES["weighting"].cells:
        path, prediction, loss = (part.split()[-1].replace("velocity", "v") for part in cell.name.split(","))
        places[path][f"{prediction}, {loss}"] = m.values("weighting", cell.name,
                                                         score(cell.evaluations[0].label))
    series = [each for path, points in places.items() for each in series_of(path, points)]
    return Chart("Prediction and loss apart (dit): Fréchet distance, 50 first-order steps",
                 "prediction, loss (v: of the straight path, the velocity)", "Fréchet distance",
                 series) if series else None


def cosine_end() -> float:
    """The alpha at which the cosine schedule ends."""
    return DDPM(schedule="cosine").alpha_sigma(torch.ones(1, dtype=torch.float64))[0].item()


def schedule_table(m: Measured) -> str:
    rows = ["| | " + " | ".join(NETWORKS) + " |", "|---" * (len(NETWORKS) + 1) + "|"]
    for objective in SCHEDULES:
        texts = [mean_of(m, "schedules", f"{network} {objective}", score(first_order(objective)), 1)
                 for network in NETWORKS]
        if any(texts):
            rows.append(f"| {objective} | {' | '.join(texts)} |")
    if len(rows) == 2:
        return ""
    return "\n".join(rows) + ("\n\nFréchet distance, 50 first-order steps. The cosine schedule ends at alpha "
                              f"= {cosine_end():.0e}; division by it magnifies the error of x0 computed "
                              f"from eps. {seeds_of(m, 'schedules')}; "
                              f"{made_with(m, 'schedules')}.")


def schedule_chart(m: Measured) -> Chart | None:
    chart = objective_chart("Schedules: Fréchet distance, 50 first-order steps", "Fréchet distance",
                            lambda network, objective: m.values("schedules", f"{network} {objective}",
                                                                score(first_order(objective))), SCHEDULES)
    if chart is None:
        return None
    # Ten names: each in two lines, the second where other charts name the axis.
    series = [each._replace(x=[name.replace(" ", "\n", 1) for name in each.x]) for each in chart.series]
    return chart._replace(series=series, x="", log_y=True, size=(2000, 900))


def rate_rows(m: Measured) -> list[tuple[str, str, list[list[dict]]]]:
    """(network, objective, records by factor) of what is measured."""
    found = []
    for network in NETWORKS:
        for objective in ("ddpm eps", "rf logit-normal"):
            by_factor = [m.of("learning rates", f"{network} {objective} x {factor:g}") for factor in FACTORS]
            if any(by_factor):
                found.append((network, objective, by_factor))
    return found


def rate_table(m: Measured) -> str:
    head = ["learning rate, relative to the default", *(f"{factor:g}" for factor in FACTORS),
            "usable octaves"]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for network, objective, by_factor in rate_rows(m):
        texts = []
        for factor, records in zip(FACTORS, by_factor):
            text = mean_of(m, "learning rates", f"{network} {objective} x {factor:g}",
                           score(first_order(objective)), 1)
            lost = sum("diverged" in record for record in records)
            texts.append(text + f" {lost} of {len(records)} diverged" * (lost > 0))
        texts.append(shown(usable_octaves(m, network, objective), 2))
        rows.append(f"| {network} {objective} | {' | '.join(texts)} |")
    if len(rows) == 2:
        return ""
    defaults = ", ".join(f"{network} {rate:g}" for network, rate in RATES.items())
    return "\n".join(rows) + (
        f"\n\nFréchet distance, 50 first-order steps; defaults: {defaults}. A rate counts as usable if its "
        f"distance is at most {USABLE:g} times that of the best rate of the same network and objective; the "
        f"rates span {math.log2(FACTORS[-1] / FACTORS[0]):g} octaves. {upper_edge(m)}"
        f"{seeds_of(m, 'learning rates')}; "
        f"{made_with(m, 'learning rates')}.")


def upper_edge(m: Measured) -> str:
    """Whether the rates reach that at which trainings fail; "" where nothing is measured."""
    usable = [distances[-1] <= USABLE * min(distances) for network, objective, _ in rate_rows(m)
              for distances in rate_distances(m, network, objective)]
    if not usable:
        return ""
    beyond = ", so the usable range goes on beyond it, and the octaves only show where it begins"
    return f"The largest rate is usable in {sum(usable)} of {len(usable)} runs{beyond * all(usable)}. "


def rate_chart(m: Measured) -> Chart | None:
    series = []
    for network, objective, _ in rate_rows(m):
        found = [m.values("learning rates", f"{network} {objective} x {factor:g}",
                          score(first_order(objective))) for factor in FACTORS]
        if any(found):
            mark = MARKS[0] if objective.startswith("ddpm") else MARKS[1]
            series.append(Series(f"{network} {objective}", list(FACTORS), found, COLOUR_OF[network], mark))
    return Chart("Learning rates a factor of two apart: Fréchet distance",
                 "learning rate, relative to the default", "Fréchet distance", series,
                 log_x=True, log_y=True) if series else None


def prompt_columns(m: Measured, cell: str) -> list[list[float]]:
    return [m.values("prompts", cell, score(PROMPTED_AT.label, figure)) for figure in PROMPT_KINDS]


def cells_and_costs(m: Measured, study: str, head: list[str], texts_of: Callable[[str], list[str]]) -> str:
    """A row for each cell of the study that has been measured: texts_of(its name), and what it costs. Nothing
    where there is none."""
    head = [*head, "MFLOP", "parameters", "CPU minutes"]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for cell in STUDIES[study].cells:
        records = m.of(study, cell.name)
        if records:
            texts = [*texts_of(cell.name), f"{records[0]['flops_per_example'] / 1e6:.0f}",
                     f"{records[0]['parameters'] / 1e6:.1f} M",
                     mean_of(m, study, cell.name, training_minutes, 0)]
            rows.append(f"| {cell.name} | {' | '.join(texts)} |")
    return "" if len(rows) == 2 else "\n".join(rows)


def prompt_table(m: Measured) -> str:
    rows = cells_and_costs(m, "prompts", ["share that shows all of its prompt", *PROMPT_KINDS.values()],
                           lambda cell: [shown(values, 3) for values in prompt_columns(m, cell)])
    if not rows:
        return ""
    floors = [record["evaluations"][0]["agreement"] for record in m.of("floor", "scenes")]
    notes = ("With guidance 3: 19 evaluations, doubled by guidance. Of the VAE's reconstructions, a share of "
             f"{', '.join(f'{value:.3f}' for value in floors)} is read correctly. MFLOP per example, forward "
             "and backward, without the text encoder, which is the same. "
             f"{seeds_of(m, 'prompts')}; {made_with(m, 'prompts')}.")
    return rows + f"\n\n{notes}"


def prompt_chart(m: Measured) -> Chart | None:
    series = [Series(cell.name, list(PROMPT_KINDS.values()), prompt_columns(m, cell.name),
                     COLOUR_OF[cell.name.partition(",")[0]])
              for cell in STUDIES["prompts"].cells if m.of("prompts", cell.name)]
    return Chart("Share of pictures that show everything in their prompt", "prompt", "share of pictures",
                 series) if series else None


def speed_table(m: Measured) -> str:
    found = {cell: each for cell, each in paces(m).items() if each}
    if not found:
        return ""
    batches = list(next(iter(found.values()))[0].milliseconds)
    head = ["milliseconds per picture, in batches of", "evaluations", *map(str, batches)]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for cell, each in found.items():
        texts = [shown([pace.milliseconds[batch] for pace in each], 1) for batch in batches]
        calls = shown([pace.evaluations for pace in each], 0)
        rows.append(f"| {cell} | {calls} | {' | '.join(texts)} |")
    for cell, each in found.items():
        texts = [shown([pace.milliseconds[batch] / pace.evaluations for pace in each], 2)
                 for batch in batches]
        rows.append(f"| {cell}, one evaluation | 1 | {' | '.join(texts)} |")
    notes = ("The upper rows are at equal quality: as many evaluations, without guidance, as reach a "
             "distance 10 % above the best of the network that is worse. The lower rows are at equal steps: "
             "one evaluation. Milliseconds in a batch of one are the latency; 1000 divided by those of the "
             "upper rows is pictures per second. Of the network alone, without the VAE, in bf16 where the "
             "device multiplies it. "
             f"{seeds_of(m, 'speed')}; {made_with(m, 'speed')}.")
    return "\n".join(rows) + f"\n\n{notes}"


def speed_chart(m: Measured) -> Chart | None:
    series = []
    for cell, found in paces(m).items():
        batches = list(found[0].milliseconds) if found else []
        if batches:
            series.append(Series(cell, batches, [[pace.milliseconds[batch] for pace in found]
                                                 for batch in batches], COLOUR_OF[cell.split()[0]]))
    return Chart("Equal quality: time per picture", "pictures in a batch", "milliseconds per picture", series,
                 log_x=True, log_y=True) if series else None


FEW_STEPS = [                            # (row, cell, guidance of its samples)
    ("the parent, unguided", "dit rf logit-normal", 1.0),
    (f"the parent, guidance {GUIDANCE:g}", "dit rf logit-normal", GUIDANCE),
    *((name, name, 1.0) for name in REFLOWS),
    *((name, cell, 1.0) for name, cell in MEANFLOWS.items()),
]


def few_step_table(m: Measured) -> str:
    counts = (1, 2, 4, 8, 50)
    rows = ["| evaluations, at most | " + " | ".join(map(str, counts))
            + " | deviation from the chord | CPU minutes |", "|---" * (len(counts) + 3) + "|"]
    for name, cell, scale in FEW_STEPS:
        if m.of("few steps", cell):
            texts = [mean_of(m, "few steps", cell, measured_at(before, count, scale), 1)
                     for before, count in zip((0, *counts), counts)]
            # measured without guidance, as the network was trained
            curved = mean_of(m, "few steps", cell, lambda r: r["straightness"], 3) if scale == 1 else ""
            texts += [curved, mean_of(m, "few steps", cell, training_minutes, 1)]
            rows.append(f"| {name} | {' | '.join(texts)} |")
    if len(rows) == 2:
        return ""
    notes = ("Fréchet distance of the best solver. An evaluation with guidance counts twice; MeanFlow and "
             f"reflow have learned guidance {GUIDANCE:g}. The longer MeanFlow is trained four times as long; "
             "the longer reflow twice as long, with twice the pairs, 20,000. The deviation is measured "
             "without guidance. Minutes are those of the last training, with the drawing of reflow's pairs. "
             f"{few_step_targets(m)}{seeds_of(m, 'few steps')}; {made_with(m, 'few steps')}.")
    return "\n".join(rows) + f"\n\n{notes}"


def few_step_targets(m: Measured) -> str:
    """A sentence on the mean distances relative to the parent's; "" where they are not measured."""
    parts = []
    parents = parent(m, 8)
    for name, cell, count, target in (*((*each, 1, ONE_STEP) for each in MEANFLOWS.items()),
                                      *((name, name, 4, 1) for name in REFLOWS)):
        values = m.values("few steps", cell, best_within(count))
        if values and parents:
            ratio = np.mean(values) / np.mean(parents)
            digits = 2 if round(ratio, 2) != target else 4       # enough to see on which side of it
            parts.append(f"{name} with {count} has {ratio:.{digits}f} times the distance (target: at most "
                         f"{target:g}, {'met' if ratio <= target else 'missed'})")
    return f"Against the parent with 8 evaluations, {', '.join(parts)}. " if parts else ""


def measured_at(before: int, count: int, scale: float) -> Callable[[dict], float | None]:
    """For `Measured.values`: the smallest distance with at most `count` evaluations, if one with more than
    `before` of them was measured."""
    def get(record: dict) -> float | None:
        counts = [row["nfe"] for row in record["evaluations"] if row["guidance"] == scale]
        found = any(before < each <= count for each in counts)
        return best_within(count, (scale,))(record) if found else None
    return get


def few_step_chart(m: Measured) -> Chart | None:
    series = []
    for name, cell, scale in FEW_STEPS:
        series += series_of(name, {count: m.values("few steps", cell, measured_at(before, count, scale))
                                   for before, count in ((0, 1), (1, 2), (2, 4), (4, 8))})
    return Chart("One to eight evaluations: Fréchet distance", "evaluations of the network",
                 "Fréchet distance", series, log_x=True, log_y=True) if series else None


def expert_table(m: Measured) -> str:
    head = ["", "velocity error", "Fréchet, 50 first-order steps", "agreement", "Fréchet, guidance 1.5",
            "agreement"]
    plain = first_order("rf logit-normal")
    guided = DEFAULT_SAMPLERS["rf"][1].label
    columns = [(lambda r: r["errors"][-1]["velocity"], 3), (score(plain), 1), (score(plain, "agreement"), 3),
               (score(guided), 1), (score(guided, "agreement"), 3)]
    rows = cells_and_costs(m, "experts", head, lambda cell: [mean_of(m, "experts", cell, get, digits)
                                                             for get, digits in columns])
    if not rows:
        return ""
    return rows + (
        "\n\nA token uses two of the eight experts (on average, with expert choice and race) and two that "
        "all tokens share. MFLOP per example, forward and backward. "
        f"{seeds_of(m, 'experts')}; {made_with(m, 'experts')}.")


# ---- the documents

DOCUMENTS = ("README.md", "benchmarks/RESULTS.md")
UNMEASURED = "Not measured yet: "


class Section(NamedTuple):
    """What stands between <!-- NAME --> and <!-- end -->: a table, a chart, or both."""
    table: Callable[[Measured], str]
    command: str                                     # which measures it
    chart: Callable[[Measured], Chart | None] = lambda m: None
    caption: str = ""                                # of the chart

    def text(self, name: str, m: Measured) -> str:
        parts = [self.table(m)]
        if self.chart(m):
            parts.append(f"![{self.caption}]({picture(name)})")
        return "\n\n".join(filter(None, parts)) or f"{UNMEASURED}`{self.command}`."


def picture(section: str) -> str:
    """The file of a section's chart, from the root."""
    return f"benchmarks/pictures/{section.replace(': ', '-').replace(' ', '-')}.png"


COMPARE = "python benchmarks/compare.py --budget cpu"
SECTIONS = {
    "compare: in short": Section(summary, COMPARE),
    "compare: claims": Section(claims_table, COMPARE),
    "compare: grid": Section(grid_table, f"{COMPARE} --only grid", grid_chart,
                             "Fréchet distance of every cell"),
    "compare: staircase": Section(staircase_table, f"{COMPARE} --only grid"),
    "compare: grid in full": Section(full_grid_table, f"{COMPARE} --only grid", gradient_chart,
                                     "Spread of the gradient norm in every cell"),
    "compare: errors": Section(lambda m: "", f"{COMPARE} --only grid", velocity_chart,
                               "Error of the velocity over the training"),
    "compare: errors of x0": Section(lambda m: "", f"{COMPARE} --only grid", x0_chart,
                                     "Error of x0 over the training"),
    "compare: curvature": Section(curvature_table, f"{COMPARE} --only curvature", curvature_chart,
                                  "Curvature of every cell"),
    "compare: weighting": Section(weighting_table, f"{COMPARE} --only weighting", weighting_chart,
                                  "Distance against prediction and loss"),
    "compare: steps": Section(steps_table, f"{COMPARE} --only steps", steps_chart,
                              "Distance against evaluations"),
    "compare: noise": Section(noise_table, f"{COMPARE} --only noise", noise_chart,
                              "Distance of samplers with and without noise"),
    "compare: guidance": Section(guidance_table, f"{COMPARE} --only guidance", guidance_chart,
                                 "Distance against guidance"),
    "compare: schedules": Section(schedule_table, f"{COMPARE} --only schedules", schedule_chart,
                                  "Distance by schedule"),
    "compare: learning rates": Section(rate_table, f"{COMPARE} --only 'learning rates'", rate_chart,
                                       "Distance against the learning rate"),
    "compare: sizes": Section(size_table, f"{COMPARE} --only sizes",
                              lambda m: size_chart(m, "frechet", "Fréchet distance"),
                              "Distance against training FLOPs"),
    "compare: errors by size": Section(lambda m: "", f"{COMPARE} --only sizes",
                                       lambda m: size_chart(m, "velocity", "error of the velocity"),
                                       "Error of the velocity against training FLOPs"),
    "compare: corners": Section(corner_table, f"{COMPARE} --only corners", corner_chart,
                                "Agreement against training"),
    "compare: shift": Section(shift_table, f"{COMPARE} --only shift", shift_chart,
                              "Distance against the shift"),
    "compare: prompts": Section(prompt_table, f"{COMPARE} --only prompts", prompt_chart,
                                "Which prompts are followed"),
    "compare: speed": Section(speed_table, f"{COMPARE} --only speed", speed_chart,
                              "Time per picture against the batch"),
    "compare: few steps": Section(few_step_table, f"{COMPARE} --only 'few steps'", few_step_chart,
                                  "Distance at 1 to 8 evaluations"),
    "compare: experts": Section(expert_table, f"{COMPARE} --only experts"),
    "compare: comparisons": Section(comparison_table, COMPARE),
}


def anchor_of(section: str) -> str:
    """Where a section stands: the grid in README, others in RESULTS.md under headings of their names."""
    if section == "grid":
        return "#the-comparison"
    return f"benchmarks/RESULTS.md#{section.replace(' ', '-')}"


def fill(documents: dict[str, str], sections: dict[str, str]) -> dict[str, str]:
    """The documents, by their files from the root, with each section's text between its markers. Raises
    ValueError for a section whose markers are in none of them, or in several places."""
    filled = dict(documents)
    for name, content in sections.items():
        begin, end = f"<!-- {name} -->", "<!-- end -->"
        pattern = re.escape(begin) + r"\n.*?" + re.escape(end)
        homes = [file for file, text in documents.items() for _ in re.findall(pattern, text, re.S)]
        if len(homes) != 1:
            raise ValueError(f"{' or '.join(documents)}: needs exactly one line {begin} with a line {end} "
                             "after it")
        home = homes[0]
        if home.startswith("benchmarks/"):           # links are relative to the document
            content = content.replace("](benchmarks/", "](")
        filled[home] = re.sub(pattern, lambda _: f"{begin}\n\n{content}\n\n{end}", filled[home], flags=re.S)
    return filled


def one_clock(records: list[dict]) -> list[dict]:
    """The records, with the times of one kind of CPU only: one without bf16 takes about twice as long. Where
    there are both kinds, a record from one without loses its time, and one of "speed" is left out."""
    def lacks(record: dict) -> bool:
        return WITHOUT_BF16 in record["device"]

    if not any(on_cpu(record) and not lacks(record) for record in records):
        return records
    return [{name: value for name, value in record.items() if name != "processor_seconds"}
            if lacks(record) else record
            for record in records if not (lacks(record) and record["study"] == "speed")]


def sections(records: list[dict], rungs: list[dict]) -> dict[str, str]:
    """The text of every section. records: of the comparison; rungs: of benchmarks/ladder.py."""
    m = Measured(one_clock(records))
    found = {}
    for name, section in SECTIONS.items():
        found[name] = section.text(name, m)
    for base in ladder.BASES:
        texts = []
        for study in ladder.studies_of(base):
            table = ladder.table(rungs, study)
            if table and study != base:
                texts.append("On a CPU without bf16 instructions, where all is in fp32:")
            texts += [table, ladder.against_targets(rungs, study)]
        found[f"ladder: {base}"] = ("\n\n".join(filter(None, texts))
                                    or f"{UNMEASURED}`python benchmarks/ladder.py --base {base}`.")
    return found


def charts(records: list[dict]) -> dict[str, Chart]:
    """By the names of their files in benchmarks/pictures."""
    m = Measured(one_clock(records))
    found = {}
    for name, section in SECTIONS.items():
        chart = section.chart(m)
        if chart:
            found[Path(picture(name)).name] = chart
    return found


def write(root: Path, records: list[dict], rungs: list[dict]) -> None:
    """Bring the documents and their charts up to date with the results. Raises ValueError, and writes
    nothing, where a section would lose its figures."""
    texts = {file: (root / file).read_text() for file in DOCUMENTS}
    filled = fill(texts, sections(records, rungs))
    empty = [sum(text.count(UNMEASURED) for text in found.values()) for found in (texts, filled)]
    if empty[1] > empty[0]:
        raise ValueError(f"these results would empty {empty[1] - empty[0]} of the sections that have figures "
                         "now; give --results with all of them")
    for name, chart in charts(records).items():
        figures.save(root / "benchmarks/pictures" / name, chart)
    for file, text in filled.items():
        write_atomically(root / file, lambda out, text=text: out.write(text.encode()))
