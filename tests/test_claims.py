"""benchmarks/claims.py and tables.py: verdicts from numbers and their spread, and a README that agrees with
the results."""

import functools
import math
import re

import numpy as np
import pytest
from benchmarks import claims, compare, figures, ladder, measures, studies, tables
from benchmarks.claims import Comparison, Measured, decide, verdict
from benchmarks.studies import STUDIES
from conftest import ROOT

import charts
from ddpm import DDPM

# ---- the rule


@pytest.mark.parametrize("ours, theirs, options, answer", [
    ([1.0, 1.1, 0.9], [2.0, 2.1, 1.9], {}, True),
    ([2.0, 2.1, 1.9], [1.0, 1.1, 0.9], {}, False),
    ([1.0, 2.0, 3.0], [2.0, 3.0, 4.0], {}, None),                # one apart, with a deviation of one
    ([1.0, 1.1, 0.9], [2.0, 2.1, 1.9], {"higher": True}, False),
    ([5.0, 5.1, 4.9], [4.6, 4.7, 4.5], {"factor": 1.1}, None),   # 5.0 against at most 5.06
    ([5.0, 5.1, 4.9], [5.0, 5.1, 4.9], {"factor": 1.1}, True),   # equal is no worse than
    ([5.0, 5.1, 4.9], [5.0, 5.1, 4.9], {}, None),
    ([5.0, 5.0], [4.0, 4.0], {}, None),                          # no spread to compare with
    ([5.0, 5.0], [4.0, 4.01], {}, False),
    ([-0.2, -0.21], [-0.1, -0.11], {"plain": True}, True),       # of which there is no logarithm
    ([0.0, 0.1], [0.9, 1.0], {"plain": True, "higher": True}, False),
    # shares: near 1, a half of a percent is a doubling of the odds
    ([0.995, 0.9952], [0.99, 0.9902], {"share": 2000, "higher": True}, True),
    ([1.0, 1.0], [0.0, 0.001], {"share": 2000, "higher": True}, True),
])
def test_a_comparison_is_decided_by_the_spread_of_the_seeds(ours, theirs, options, answer):
    assert decide(Comparison("", ours, theirs, **options)) is answer


def test_one_spread_is_taken_for_all_that_a_claim_compares():
    """Two seeds that happen to agree do not decide alone, and a side that is compared twice counts once."""
    close, other = Comparison("a", [5.0, 5.001], [5.2, 5.201]), Comparison("b", [4.0, 6.0], [5.0, 9.0])
    assert decide(close) is True and claims.answers_to([close]) == ["yes"]
    assert claims.answers_to([close, other]) == ["not significant"] * 2
    assert claims.answers_to([close, other._replace(quantity="else")]) == ["yes", "not significant"]
    spread = claims.spread_of([close, other, other._replace(what="again")])
    sides = [np.log(side) for each in (close, other) for side in (each.ours, each.theirs)]
    variance = sum(side.var(ddof=1) for side in sides) / 4
    assert spread.freedom == 4 and spread.variance == pytest.approx(variance)


def test_shares_are_compared_by_their_odds():
    """Of one claim: what is far from 0 and 1 varies more, which must not hide a difference near 1."""
    near = Comparison("a", [0.98, 0.981], [0.95, 0.951], higher=True)
    middle = Comparison("b", [0.45, 0.5], [0.5, 0.45], higher=True)
    for scale, answer in (({"share": 2000}, "yes"), ({"plain": True}, "not significant")):
        pair = [each._replace(**scale) for each in (near, middle)]
        assert claims.answers_to(pair) == [answer, "not significant"]
    odds = Comparison("", [], [], share=2000).side([0.0, 0.2, 0.5, 1.0])
    assert odds == pytest.approx([-math.log(3999), -math.log(4), 0, math.log(3999)])


def test_one_number_everywhere_is_equal():
    same = Comparison("a", [4.0, 4.0], [4.0, 4.0])
    assert claims.answers_to([same]) == ["equal"] and verdict([same]) == "not shown"
    assert claims.answers_to([same._replace(theirs=[4.0])]) == ["undecided"]
    assert claims.answers_to([same._replace(factor=1.1)]) == ["not significant"]
    assert claims.counted([same, YES]) == "1 yes, 1 equal"


def test_equal_seeds_are_rarely_decided_and_distant_ones_nearly_always():
    """The rule's error: of comparisons between equal cells, one in twenty is decided, by definition."""
    rng = np.random.default_rng(0)
    equal = [decide(Comparison("", *rng.normal(5, 0.2, (2, 3)))) for _ in range(4000)]
    assert np.mean([answer is not None for answer in equal]) == pytest.approx(0.05, abs=0.01)
    apart = [decide(Comparison("", *(rng.normal(5, 0.2, (2, 3)) + [[0.0], [1.5]]))) for _ in range(500)]
    assert np.mean([answer is True for answer in apart]) > 0.95 and False not in apart


YES = Comparison("a", [1.0, 1.1], [9.0, 9.1])
NO = Comparison("b", [9.0, 9.1], [1.0, 1.1])
OPEN = Comparison("c", [1.0, 9.0], [2.0, 8.0], quantity="another, with a spread of its own")


@pytest.mark.parametrize("comparisons, words", [
    ([YES, YES], "true"), ([NO, NO], "false"), ([YES, NO], "depends"), ([OPEN], "not shown"),
    ([YES, YES, OPEN], "true"), ([NO, NO, OPEN], "false"),       # alike in both directions
    ([YES, OPEN], "not shown"), ([NO, OPEN], "not shown"), ([YES, YES, YES, NO], "depends"),
    ([], "not measured yet"),
    ([YES._replace(ours=[1.0])], "not decided yet"),             # one seed decides nothing
    ([YES, NO._replace(theirs=[])], "not decided yet"),          # nor does a part
    ([YES, NO, OPEN._replace(ours=[1.0])], "depends"),           # which a further answer cannot change
    ([NO._replace(theirs=[]), OPEN._replace(ours=[])], "not measured yet"),
])
def test_verdicts_are_functions_of_the_comparisons(comparisons, words):
    assert verdict(comparisons) == words


def test_decisions_are_counted():
    assert claims.counted([YES, OPEN, YES, NO]) == "2 yes, 1 no, 1 not significant"
    assert claims.counted([NO]) == "1 no"
    assert claims.counted([YES._replace(ours=[1.0]), OPEN]) == "1 not significant, 1 undecided"


def test_what_a_verdict_depends_on_is_named():
    more = YES._replace(what="d, at the end")
    assert claims.depends_on([YES, OPEN, more, NO]) == "yes: a · d, at the end; no: b"
    assert claims.depends_on([OPEN]) == "" and claims.depends_on([NO]) == "no: b"
    # a group whose answers agree stands for its comparisons
    cold, warm = [[each._replace(what=name, group=group) for name in "de"]
                  for each, group in ((YES, "cold"), (NO, "warm"))]
    assert claims.depends_on([*cold, *warm]) == "yes: cold; no: warm"
    assert claims.depends_on([*cold, *warm, NO._replace(group="cold")]) == "yes: d · e; no: warm · b"


def test_the_comparison_that_is_shown_is_answered_as_most_are():
    alone = YES._replace(ours=[1.0])
    assert claims.typical([NO, YES, OPEN, YES]) == ("yes", YES)
    assert claims.typical([NO, YES]) == ("no", NO)
    assert claims.typical([NO, OPEN]) == ("not significant", OPEN)                 # of equally frequent ones
    assert claims.typical([YES._replace(theirs=[]), alone, OPEN, OPEN]) == ("not significant", OPEN)


# ---- readings of records

@functools.cache
def evaluations(evaluation):
    return measures.evaluations(evaluation.sampler, evaluation.steps, evaluation.scale, DDPM())


def record(study, cell, seed, rows, **more):
    found = []
    for evaluation, frechet in rows:
        found.append({"label": evaluation.label, "sampler": evaluation.sampler,
                      "steps": evaluation.steps, "guidance": evaluation.scale, "n": 2000,
                      "nfe": evaluations(evaluation), "frechet": frechet, "agreement": 0.9})
    curve = [{"step": step, "x0": 0.1, "velocity": velocity, "velocity_by_time": [velocity] * 4}
             for step, velocity in ((200, 2.0), (400, 1.0), (1600, 0.5))]
    return {"study": study, "cell": cell, "seed": seed, "budget": "cpu", "evaluations": found,
            "errors": curve, "straightness": 0.2, "curvature": 0.3,
            "grad_norm": {"median": 1.0, "spread": 0.3, "max": 4.0},
            "steps": 1600, "batch_size": 64, "flops_per_example": 476e6, "parameters": 7.4e6,
            "processor_seconds": 600.0, "wall_seconds": 620.0, "device": "a machine, 1 thread",
            "date": "2026-11-26", "commit": "0123456789",
            "val_loss": 0.5, "commands": ["python train.py --arch vae"], "versions": {}} | more


def made_up(distance, seeds=(0, 1, 2)):
    """A record for every cell of every study. distance(cell, evaluation, nfe) without the seed's part."""
    records = []
    for study in STUDIES.values():
        for cell in study.cells:
            for seed in seeds:
                rows = [(each, distance(cell.name, each, evaluations(each)) + 0.01 * seed)
                        for each in cell.evaluations]
                more = {}
                if cell.study == "speed":
                    more = {"speed": [{"batch": batch, "seconds": 0.01 * batch} for batch in (1, 256)]}
                if cell.study == "sizes":
                    more = {"flops_per_example": 1e8 * 2.0 ** int(cell.name.partition("size ")[2][0])}
                records.append(record(cell.study, cell.name, seed, rows, **more))
                if cell.study == "prompts":
                    records[-1]["evaluations"][0] |= dict.fromkeys(studies.PROMPT_KINDS, 0.5)
    return records


def plain(cell, evaluation, nfe):
    """rf reaches 4 at once; ddpm falls slowly toward 5."""
    return 4.0 if " rf " in cell else 5.0 + 20 / nfe


def by_number(records):
    m = Measured(records)
    return {claim.number: verdict(claim.comparisons(m)) for claim in claims.CLAIMS}


def test_claims_follow_from_the_records():
    found = by_number(made_up(plain))
    assert found["2"] == found["3b"] == found["3a"] == "true" and found["2a"] == "not shown"
    assert found["3"] == "not shown"                                 # 1 against 30, without any spread
    upside_down = by_number(made_up(lambda cell, *more: 30.0 if " rf " in cell else plain(cell, *more)))
    assert upside_down["2"] == "false"
    assert set(by_number(made_up(plain, seeds=(0,))).values()) == {"not decided yet"}
    assert set(by_number([]).values()) == {"not measured yet"}


def test_minutes_of_cpus_with_and_without_bf16_are_not_mixed():
    """A run on a CPU without bf16 keeps its scores and, beside others, loses its minutes."""
    rows = [(compare.Evaluation("ddim", 50), 4.0)]
    slow = {"device": "a machine without bf16, 1 thread", "processor_seconds": 1200.0}
    records = [record("grid", "dit ddpm eps", 0, rows), record("grid", "dit ddpm eps", 1, rows, **slow),
               record("speed", "dit ddpm eps", 1, rows, **slow)]
    for given, count, minutes in ((records, 2, [10.0]), (records[1:], 2, [20.0])):
        m = Measured(tables.one_clock(given))
        assert m.pooled("dit ddpm eps", tables.training_minutes) == minutes
        assert len(m.records) == count
    assert len(claims.distance(Measured(tables.one_clock(records)), "dit", "ddpm eps")) == 2
    # nor does it take those of the same command's training on another machine and VAE
    again = record("steps", "dit ddpm eps", 1, [(compare.Evaluation("ddim", 10), 9.0)], vae="another")
    m = Measured(tables.one_clock([*records, again]))
    assert m.pooled("dit ddpm eps", tables.training_minutes) == [10.0]
    assert [each["study"] for each in m.runs("dit ddpm eps")[1]] == ["grid"]


def test_evaluations_needed_are_the_fewest_within_a_tenth_of_the_best():
    Evaluation = compare.Evaluation
    rows = [(Evaluation("euler", 1), 50.0), (Evaluation("euler", 10), 4.5), (Evaluation("heun", 5), 4.3),
            (Evaluation("euler", 50), 4.0), (Evaluation("heun", 2, 2.0), 0.1)]     # guided: does not count
    run = record("steps", "a", 0, rows)
    assert claims.needed(run) == 9
    assert claims.curve(run) == [(1, 50.0), (9, 4.3), (10, 4.3), (50, 4.0)]
    assert claims.best_within(10)(run) == 4.3 and claims.best_within(0)(run) is None


def test_seeds_that_another_study_has_count():
    """A run of the grid that is also in "schedules" has a distance there; each seed counts once, and where
    another machine repeated the run, as the grid has it."""
    Evaluation = compare.Evaluation
    records = [record("schedules", "dit ddpm eps", 0, [(Evaluation("ddim", 50), 4.5)]),
               record("grid", "dit ddpm eps", 0, [(Evaluation("ddim", 50), 4.0)]),
               record("schedules", "dit ddpm eps", 1, [(Evaluation("ddim", 50), 5.0)]),
               record("noise", "dit ddpm eps", 2, [(Evaluation("ddim", 10), 6.0)]),      # not at 50 steps
               record("sizes", "dit ddpm eps", 3, [(Evaluation("ddim", 50), 7.0)])]      # another training
    assert claims.distance(Measured(records), "dit", "ddpm eps") == [4.0, 5.0]


def test_what_is_tuned_is_the_schedule_and_the_learning_rate():
    """Distances by schedule 4, 4.4, .. and by learning rate: known deviations, and known usable octaves."""
    level = {"rf mode": 1.1, "ddpm linear": 2.0, "ddpm cosine": 6.0, "x 4": 2.25}

    def distance(cell, *more):
        return 4.0 * math.prod(factor for name, factor in level.items() if name in cell)

    records = made_up(distance)
    lost = next(r for r in records if r["cell"] == "unet ddpm eps x 0.25" and r["seed"] == 1)
    del lost["evaluations"]
    lost["diverged"] = 100
    schedules = {each.what: each for each in claims.schedules_matter_less(Measured(records))}
    assert list(schedules) == [f"{network}, against ddpm with {prediction}" for network in ("unet", "dit")
                               for prediction in ("eps", "v")]
    for prediction, distances in (("eps", [4, 8]), ("v", [4, 8, 24])):
        each = schedules[f"dit, against ddpm with {prediction}"]
        assert each.ours[0] == pytest.approx(np.std([4, 4, 4.4, 4], ddof=1) / 4.1)
        assert each.theirs[0] == pytest.approx(np.std(distances, ddof=1) / np.mean(distances))
        assert decide(each) is True
    unet, transformer = claims.straight_against_cosine(Measured(records))
    assert transformer.ours == pytest.approx([4, 4.01, 4.02])
    assert transformer.theirs == unet.theirs == pytest.approx([24, 24.01, 24.02])
    # the last octave rises from 4 to 9, and its first half is below 4 * 1.5 = 6
    unet, transformer = claims.more_rates_work(Measured(records))
    assert transformer.ours == pytest.approx([3.5] * 3, abs=0.01)
    assert unet.theirs == pytest.approx([3.5, 2.5, 3.5], abs=0.01)
    assert decide(unet) is None
    # a worse objective has as wide a range as a better one, if its distance grows alike
    for r in records:
        if r["study"] == "learning rates" and "dit ddpm" in r["cell"]:
            r["evaluations"][0]["frechet"] *= 3
    assert claims.usable_octaves(Measured(records), "dit", "ddpm eps") == pytest.approx([3.5] * 3, abs=0.01)
    text = tables.rate_table(Measured(records))
    assert "1 of 3 diverged" in text and "| 3.50 (3.50 to 3.50) |" in text
    assert "The largest rate is usable in 0 of 12 runs. " in text                  # 9 is above 6
    flat = tables.rate_table(Measured(made_up(plain)))
    assert "usable in 12 of 12 runs, so the usable range goes on beyond it, " in flat
    dit_only = Measured([r for r in records if not r["cell"].startswith("unet")])
    assert verdict(claims.more_rates_work(dit_only)) == "not decided yet"          # one network is missing


@pytest.mark.parametrize("y, level, width", [
    ([1.0, 1.0, 1.0], 1.5, 2.0), ([2.0, 2.0, 2.0], 1.5, 0.0), ([4.0, 1.0, 4.0], 2.0, 1.0),
    ([math.inf, 1.0, 1.0], 1.5, 1.0), ([1.0, math.inf, 1.0], 1.5, 0.0), ([1.5, 1.5, 6.0], 1.5, 1.0)])
def test_the_width_below_a_level(y, level, width):
    assert claims.width_below([1.0, 2.0, 4.0], y, level) == pytest.approx(width)


def test_shifts_are_compared_at_both_sizes():
    """At 64 pixels, a shift gains a quarter in both and an eighth in sampling, but loses in training alone;
    at 32, it gains a tenth wherever it is trained with."""
    def distance(cell, evaluation, nfe):
        if cell == "64 px, trained with 2":
            return 3.0 if evaluation.shift is None else 5.0
        if cell == "32 px, trained with 2":
            return 3.6
        return 3.5 if cell == "64 px, trained with 1" and evaluation.shift == 2 else 4.0

    m = Measured(made_up(distance))
    for where, at_64, ratios in (("training and sampling", (True, 3.0, 4.0), (True, 0.75, 0.9)),
                                 ("training only", (False, 5.0, 4.0), (False, 1.25, 0.9)),
                                 ("sampling only", (True, 3.5, 4.0), (True, 0.875, 1.0))):
        found = {c.what: (decide(c), round(c.ours[0], 3), round(c.theirs[0], 3))
                 for c in claims.shifted_times(where)(m)}
        assert found == {"10 steps": at_64, "25 steps": at_64,
                         "10 steps: ratio to shift 1, against 32 pixels": ratios,
                         "25 steps: ratio to shift 1, against 32 pixels": ratios}
    rows = tables.shift_rows(m, 64, 10)
    assert {where: round(np.mean(by_shift[2.0]), 2) for where, by_shift in rows.items()} == {
        "training and sampling": 3.01, "sampling only": 3.51, "training only": 5.01}
    floor = {"study": "floor", "cell": "fashion-mnist-64", "seed": 0, "evaluations": [
        {"label": "reconstructions of the test images", "n": n, "frechet": n / 1000}
        for n in (2000, 10_000)]}
    assert tables.floors(Measured([floor])) == (
        "; 2,000 reconstructions have a distance of 2.00 with the VAE of 64 pixels")
    assert tables.floors(m) == ""


def test_what_is_early_is_read_at_its_step():
    """A training that was interrupted may lack that checkpoint: it then has no value, not another's."""
    records = made_up(plain)
    for r in records:
        if r["cell"] == "dit ddpm v" and r["seed"] == 1:            # in every study
            r["errors"] = [row | {"step": 401} if row["step"] == 400 else row for row in r["errors"]]
    found = {c.what: c for c in claims.early(Measured(records))}
    assert found["ddpm v, unet against dit"].theirs == [1.0, 1.0]
    assert found["ddpm v, unet against dit"].ours == [1.0, 1.0, 1.0]


def test_few_steps_are_compared_with_the_parent():
    distances = {"reflow": 3.0, "reflow twice": 5.0, "meanflow": 5.5, "longer meanflow": 9.0}

    def distance(cell, evaluation, nfe):
        if cell != "dit rf logit-normal":
            return distances.get(cell, 4.0)
        if evaluation.scale == studies.GUIDANCE and nfe <= 8:
            return 4.0                                   # the guided parent is the better one at 8
        return 1.0 if nfe > 8 else 7.0

    records = made_up(distance)
    for r in records:
        if r["cell"] == "reflow":
            r["straightness"] = 0.1 + 0.01 * r["seed"]
    m = Measured(records)
    found = {c.what: decide(c) for c in claims.few_steps_after_reflow(m) + claims.straightened(m)}
    eight = "4 evaluations, against its parent's 8 evaluations (4 guided steps)"
    assert found == {f"reflow, {eight}": True, f"reflow twice, {eight}": False,
                     f"longer reflow, {eight}": True, "reflow, against its parent": True,
                     "reflow twice, against its parent": None,
                     "longer reflow, against its parent": None}
    assert claims.parent(m, 8) == [4.0, 4.01, 4.02]
    assert [decide(c) for c in claims.one_step(m)] == [True, False]
    text = tables.few_step_table(m)
    assert "| the parent, guidance 1.5 |  | 4.0 (4.0 to 4.0) |" in text       # guided: two at least
    one = "5.5 (5.5 to 5.5)"
    assert f"| MeanFlow | {one} | {one} | {one} |  |  | 0.200" in text        # not measured beyond four
    assert tables.few_step_chart(m).series[-1].x == [1, 2, 4]
    assert ("trained for twice as many steps as that was reaches 9.0 with one evaluation and 9.0 with two; "
            "that transformer, 4.0 with eight") in tables.summary(m)
    targets = ("MeanFlow with 1 has 1.37 times the distance (target: at most 1.5, met), longer MeanFlow with "
               "1 has 2.25 times the distance (target: at most 1.5, missed), reflow with 4 has 0.75 times "
               "the distance (target: at most 1, met), reflow twice with 4 has 1.25 times the distance "
               "(target: at most 1, missed), longer reflow with 4 has 1.0000 times the distance (target: "
               "at most 1, met). ")
    assert targets in text
    close = [r | {"evaluations": [row | {"frechet": 6.0} for row in r["evaluations"]]}
             if r["cell"] == "meanflow" else r for r in records]
    assert "MeanFlow with 1 has 1.4963 times the distance (target: at most 1.5, met)" in (
        tables.few_step_targets(Measured(close)))


def test_samplers_with_noise_have_a_row_each():
    """The distance of the reverse SDE at 20 steps is in its own cell of the table."""
    def distance(cell, evaluation, nfe):
        return 3.0 if evaluation.sampler == "reverse_sde" and nfe == 20 and "rf" in cell else 9.0

    rows = tables.noise_table(Measured(made_up(distance))).splitlines()
    assert rows[0] == "| evaluations | 10 | 20 | 50 |"
    nine, three = "9.0 (9.0 to 9.0)", "3.0 (3.0 to 3.0)"
    assert f"| dit rf logit-normal, reverse_sde | {nine} | {three} | {nine} |" in rows
    assert f"| dit rf logit-normal, euler | {nine} | {nine} | {nine} |" in rows
    assert sum(nine in row for row in rows) == 16 and sum(three in row for row in rows) == 2
    assert tables.noise_table(Measured([])) == ""
    series = {each.name: each for each in tables.noise_chart(Measured(made_up(distance))).series}
    assert series["dit rf logit-normal"].x == ["without noise", "ddpm", "reverse_sde", "dpmpp_2m_sde"]
    assert [np.mean(seeds) > 8 for seeds in series["dit rf logit-normal"].y] == [True, True, False, True]
    assert len({each.colour for each in series.values()}) == 4


def test_guidance_has_a_line_per_number_of_steps():
    chart = tables.guidance_chart(Measured(made_up(lambda cell, evaluation, nfe: evaluation.scale + nfe)))
    line = next(each for each in chart.series if each.name == "unet ddpm eps, ddim 20")
    assert line.x == [1.0, 1.5, 2.0, 3.0]                          # guidance doubles the evaluations
    assert [seeds[0] for seeds in line.y] == [21.0, 41.5, 42.0, 43.0]
    assert len(chart.series) == 6 and len({(each.colour, each.mark) for each in chart.series}) == 6


def test_seeds_that_only_other_studies_have_are_named():
    rows = [(compare.Evaluation("ddim", 50), 4.0)]
    records = [record("grid", "dit ddpm eps", 0, rows), record("grid", "dit ddpm v", 0, rows),
               record("noise", "dit ddpm eps", 0, rows, commit="not shown"),
               record("speed", "dit ddpm eps", 2, [], commit="has no scores"),
               record("noise", "dit ddpm eps", 2, rows, commit="abc"), record("steps", "other", 7, rows)]
    m = Measured(records)
    assert tables.seeds_of(m, "grid") == "1 to 2 seeds per cell (0, 2), where no range is given one"
    assert tables.seeds_of(m, "grid", ranges=False).endswith("(0, 2); one seed: dit ddpm v")
    assert tables.made_with(m, "grid").endswith("; commit 0123456789, abc")


def test_each_vae_is_counted_and_has_its_floor():
    """Of records that do not name theirs, one per device; VAEs of other data are others anyway."""
    rows = [(compare.Evaluation("ddim", 50), 4.0)]
    records = [record("grid", "dit ddpm eps", 0, rows), record("grid", "dit ddpm eps", 1, rows, vae="b"),
               record("shift", "64", 0, rows, commands=["python train.py --image-size 64"], vae="c")]
    assert tables.made_with(Measured(records[:1]), "grid").startswith("a machine, 1 thread; 2026")
    assert tables.made_with(Measured(records), "grid").startswith(
        "a machine, 1 thread; 2 VAEs, of one command on 2 machines; 2026")
    assert tables.made_with(Measured([*records, record("shift", "32", 0, rows)]), "shift").startswith(
        "a machine, 1 thread; 2026")

    def row(label, n, frechet, **more):
        return {"label": label, "n": n, "frechet": frechet} | more

    floors = [{"study": "floor", "cell": "fashion-mnist", "seed": seed, "evaluations": [
        row("training images", 10_000, 0.6, agreement=0.93), row("training images", 2000, 1.3),
        row("reconstructions", 10_000, 1.25, agreement=0.92 + 0.01 * seed),
        row("reconstructions", 2000, 1.7 - 0.25 * seed)]} for seed in (0, 1)]
    assert ("reference: 10,000 training images at 0.60; 2,000 training images at 1.30; 10,000 "
            "reconstructions at 1.25; 2,000 reconstructions at 1.45 to 1.70. The real test images have "
            "agreement 0.930, their reconstructions 0.920 to 0.930: more") in tables.floor(Measured(floors))
    cells = [record("grid", "dit ddpm eps", 0, rows, processor_seconds=60.0 * minutes) for minutes in (4, 12)]
    assert tables.scale(Measured(floors + cells)) == [
        "**The scale**: 2,000 real pictures have a distance of 1.3, 2,000 reconstructions by the VAE 1.4 to "
        "1.7. The networks are small: 7.4 M parameters, trained for 1,600 steps of 64 pictures (4 to 12 "
        "minutes of one core). Longer training may change a verdict."]
    assert tables.scale(Measured(cells)) == []
    on_a_gpu = [cell | {"device": "a GPU"} for cell in cells]
    assert "of 64 pictures. Longer training" in tables.scale(Measured(floors + on_a_gpu))[0]


def test_prompts_are_compared_by_their_kind():
    records = made_up(plain)
    for r in records:
        if r["study"] == "prompts":
            joint = r["cell"].startswith("mmdit")
            for row in r["evaluations"]:
                row |= {"1 seen": 0.9, "1 unseen": 0.8 + 0.1 * joint + 0.001 * r["seed"],
                        "2 seen": 0.7 - 0.1 * joint + 0.001 * r["seed"], "2 unseen": 0.5 + 0.2 * r["seed"]}
    m = Measured(records)
    assert [decide(c) for c in claims.follows_prompts(m)] == [None, True, False, None]
    assert "| mmdit, joint attention | 0.900 (0.900 to 0.900) | 0.901" in tables.prompt_table(m)
    assert tables.prompt_chart(m).series[1].y[1] == [0.8, 0.801, 0.802]


def test_errors_of_all_cells_are_in_two_charts():
    records = [r for r in made_up(plain) if r["study"] != "grid" or r["cell"] != "unet ddpm v"]
    for r in records:
        r["errors"].insert(1, r["errors"][0] | {"step": 333})        # of an interruption: not in the chart
    m = Measured(records)
    chart = tables.velocity_chart(m)
    assert len(chart.series) == 7 and chart.log_y                   # without x0, whose error is far larger
    one = next(series for series in chart.series if series.name == "dit rf uniform")
    assert one.x == [200, 400, 1600] and one.y == [[2.0] * 3, [1.0] * 3, [0.5] * 3]
    assert len({(series.colour, series.mark) for series in chart.series}) == 7
    chart = tables.x0_chart(m)
    assert len(chart.series) == 9 and all(series.y == [[0.1] * 3] * 3 for series in chart.series)


def test_paths_are_compared_by_their_curvature():
    records = made_up(plain)
    for r in records:
        r["straightness"] = 0.3 + 0.1 * ("ddpm" in r["cell"]) + 0.001 * r["seed"]
        if r["study"] == "curvature":
            r["curvature"] = 0.1 + 0.1 * ("rf" in r["cell"]) + 0.001 * r["seed"]
    found = claims.straighter(Measured(records))
    assert [decide(c) for c in found] == [False] * 6 + [True] * 6
    assert claims.depends_on(found) == "yes: from noise; no: from the same mixtures"
    assert by_number(records)["2d"] == "depends"
    text = tables.curvature_table(Measured(records))
    assert "| dit rf uniform | 0.201 (0.200 to 0.202) | 0.301 (0.300 to 0.302) |" in text
    unet, _, noise, _ = tables.curvature_chart(Measured(records)).series
    assert dict(zip(unet.x, unet.y))["ddpm x0"] == pytest.approx([0.1, 0.101, 0.102])
    assert dict(zip(noise.x, noise.y))["ddpm x0"] == pytest.approx([0.4, 0.401, 0.402])


def test_samplers_with_noise_are_compared_where_a_claim_is_about_all():
    """The best of "noise", with the same samplers for every cell; guided samples do not count."""
    def distance(cell, evaluation, nfe):
        if evaluation.sampler in studies.NOISY:
            return {"unet ddpm eps": 2.0, "dit ddpm eps": 3.0}.get(cell, 9.0)
        return 4.0 if "rf" in cell else 8.0

    m = Measured(made_up(distance))
    assert [round(values[0], 2) for values in (claims.any_sampler(m, "unet ddpm eps"),
                                              claims.any_sampler(m, "dit rf logit-normal"))] == [2.0, 4.0]
    found = {c.what: decide(c) for c in claims.whatever_the_sampler(m)}
    assert found == {"unet": False, "dit": False}
    assert [decide(c) for c in claims.families(m)] == [True, False, True, True]
    found = {c.what: decide(c) for c in claims.transformer(m)}
    assert found["ddpm eps, dit against unet, samplers with noise too"] is False
    assert found["ddpm eps, dit against unet"] is None
    without = Measured([r for r in m.records if r["study"] != "noise"])
    assert claims.any_sampler(without, "unet ddpm eps") == []                # it is not measured


def test_ten_evaluations_are_compared_with_fifty():
    def distance(cell, evaluation, nfe):
        if cell == "dit rf logit-normal":
            return 5.0 if nfe >= 10 else 20.0
        best = {"dit ddpm eps": 6.0, "unet ddpm eps": 3.0}.get(cell, 9.0)
        return best if nfe >= 50 else 30.0

    found = {c.what: decide(c) for c in claims.ten_against_fifty(Measured(made_up(distance)))}
    assert found == {"against dit ddpm eps": True, "against unet ddpm eps": False,
                     "against dit ddpm v": True, "against unet ddpm v": True,
                     "against dit ddpm eps, samplers with noise too": True,
                     "against unet ddpm eps, samplers with noise too": False}
    found = [decide(c) for c in claims.few_evaluations(Measured(made_up(distance)))]
    assert found == [None] * 4                               # 10 against 50, but no seed differs


def test_each_family_is_compared_with_the_guidance_that_suits_it():
    def distance(cell, evaluation, nfe):
        best = 2.0 if "rf" in cell else 3.0
        return 5.0 + abs(evaluation.scale - best) + 10 / nfe

    m = Measured(made_up(distance))
    assert [claims.best_guidance(m, cell)[0] for cell in ("dit rf logit-normal", "unet ddpm eps")] == [2, 3]
    assert claims.best_guidance(m, "unet ddpm eps")[1] == pytest.approx([5.1, 5.11, 5.12])     # 50 steps
    best = claims.families(m)[-1]
    assert best.theirs == claims.best_guidance(m, "unet ddpm eps")[1] and len(best.ours) == 3
    text = tables.summary(m)
    assert "each with the scale of guidance that suits it best (2 and 3), 5.3 and 5.1." in text
    assert claims.best_guidance(Measured([]), "unet ddpm eps") == (1.0, [])


def test_predictions_are_compared_with_one_loss():
    level = {"ddpm, predicts x0, loss of v": 3.0, "rf, predicts x0, loss of velocity": 7.0}
    m = Measured(made_up(lambda cell, *more: level.get(cell, 5.0)))
    found = {c.what: decide(c) for c in claims.x0_prediction(m)}
    assert found == {"ddpm, x0 against v": True, "rf, x0 against velocity": False}
    answers = {c.what: decide(c) for c in claims.own_prediction_and_loss(m)}
    assert len(answers) == 8 and {what: answer for what, answer in answers.items() if answer is not None} == {
        "ddpm, v with the loss of v, against x0 with that of v": False,
        "rf, velocity with the loss of velocity, against x0 with that of velocity": True}
    assert "| rf, predicts x0, loss of velocity | 7.0 (7.0 to 7.0) | 0.900" in tables.weighting_table(m)
    for series, (path, x0) in zip(tables.weighting_chart(m).series, {"ddpm": 3.0, "rf": 7.0}.items()):
        assert series.name == path and series.x == ["v, v", "eps, v", "x0, v", "v, eps", "v, x0"]
        assert [seeds[0] for seeds in series.y] == [5.0, 5.0, x0, 5.0, 5.0]


def test_speed_is_compared_at_a_distance_that_both_reach():
    """The transformer reaches 5.5, 10 % above the U-Net's best, with 4 evaluations, the U-Net with 20."""
    def distance(cell, evaluation, nfe):
        if cell == "dit rf logit-normal":
            return 3.0 if nfe >= 30 else 5.4 if nfe >= 4 else 9.0
        return 5.0 if nfe >= 20 else 9.0

    records = made_up(distance)
    for r in records:
        if r["study"] == "speed":
            alone = 0.004 if "dit" in r["cell"] else 0.002
            r["speed"] = [{"batch": batch, "seconds": alone * (1 + r["seed"]) * batch ** 0.5}
                          for batch in (1, 256)]
    m = Measured(records)
    found = claims.paces(m)
    assert [pace.evaluations for pace in found["dit rf logit-normal"]] == [4] * 3
    assert [pace.evaluations for pace in found["unet ddpm eps"]] == [20] * 3
    assert found["unet ddpm eps"][1].milliseconds == pytest.approx({1: 80.0, 256: 5.0})
    many, alone = claims.faster(m)
    assert alone.ours == pytest.approx([16, 32, 48]) and alone.theirs == pytest.approx([40, 80, 120])
    assert many.ours == pytest.approx([1, 2, 3])
    assert "| unet ddpm eps | 20 (20 to 20) | 80.0 (40.0 to 120.0) |" in tables.speed_table(m)
    assert "| unet ddpm eps, one evaluation | 1 | 4.00 (2.00 to 6.00) |" in tables.speed_table(m)
    # one network without its first seed: the others still go with their own
    some = [r for r in records if (r["study"], r["cell"], r["seed"]) != ("speed", "dit rf logit-normal", 0)]
    assert claims.faster(Measured(some))[1].ours == pytest.approx([32, 48])


def test_corners_are_compared_early_and_at_the_end():
    """Within the U-Net, and the transformer with each U-Net."""
    records = made_up(plain)
    for r in records:
        if r["study"] == "corners":
            for row in r["evaluations"]:
                ahead = {"dit": "trained" not in row["label"],
                         "unet, attention everywhere": "2 of 8 trained" in row["label"]}
                row["agreement"] = 0.5 + 0.01 * r["seed"] + 0.4 * ahead.get(r["cell"], False)
    m = Measured(records)
    found = {c.what: decide(c) for c in claims.far_corners(m)}
    assert len(found) == 6 and False not in found.values()
    assert [what for what, answer in found.items() if answer] == [
        "unet, attention everywhere, after a quarter"]
    found = {c.what: decide(c) for c in claims.far_corners_of_a_transformer(m)}
    assert len(found) == 9 and {what: answer for what, answer in found.items() if answer is not None} == {
        "against unet, attention nowhere, at the end": True,
        "against unet, attention at the bottom, at the end": True,
        "against unet, attention everywhere, at the end": True,
        "against unet, attention everywhere, after a quarter": False}


def test_sizes_follow_power_laws_that_cross_where_they_should():
    """distance = a C^b with known exponents per seed, and a crossover at a known cost."""
    records = []
    costs = [1e8, 2e8, 4e8, 1.6e9]
    for limit, measured in ((None, range(4)), (studies.LITTLE, studies.LITTLE_SIZES)):
        for network, a, b in (("unet", 30.0, -0.1), ("dit", 300.0, -0.2)):
            for size, cost in [(size, costs[size]) for size in measured]:
                for seed in (0, 1, 2):
                    distance = a * (cost * 1600 * 64 / 1e13) ** (b - 0.001 * seed)
                    if limit:                            # the U-Net loses more by it, but remains ahead
                        distance *= (1.3 if network == "unet" else 1.1) + 0.001 * seed
                    records.append(record("sizes", studies.size_name(network, size, limit), seed,
                                          [(studies.Evaluation("euler", 50), distance)],
                                          flops_per_example=cost))
    m = Measured(records)
    np.testing.assert_allclose(claims.exponents(m, "dit", "frechet"), [-0.2, -0.201, -0.202])
    np.testing.assert_allclose(claims.exponents(m, "unet", "frechet"), [-0.1, -0.101, -0.102])
    assert claims.crossover(m, "velocity") is None                   # both are flat
    assert claims.crossover(m, "frechet") is None                    # at ten to the tenth: far outside
    assert [decide(c) for c in claims.scaling(m) if "distance" in c.what] == [True, True]
    bent = [r | {"evaluations": [row | {"frechet": 1000.0 if "size 1" in r["cell"] else row["frechet"]}
                                 for row in r["evaluations"]]} if "unet" in r["cell"] else r for r in records]
    assert [decide(c) for c in claims.scaling(Measured(bent)) if "distance" in c.what] == [False, True]
    distances, ratios = claims.little_data(m)[:2]
    assert ratios.ours == pytest.approx([1.3, 1.301, 1.302]) and ratios.theirs[2] == pytest.approx(1.102)
    assert claims.answers_to([distances, ratios]) == ["yes", "no"]
    assert "no crossover near these sizes" in tables.size_table(m)
    incomplete = [r for r in records if r["seed"] != 1 or "size 2" not in r["cell"]]
    assert len(claims.exponents(Measured(incomplete), "dit", "frechet")) == 2


def test_a_crossover_is_found_where_it_is():
    for equal, words in ((10, "10 TFLOP."), (81, "81 TFLOP, 3.0 times the largest training here, so ")):
        records = []
        for network, a, b in (("unet", 30.0, -0.1), ("dit", 30.0 * equal**0.1, -0.2)):
            for size, units in enumerate((1, 3, 9, 27)):
                for seed in (0, 1):
                    records.append(record("sizes", studies.size_name(network, size, None), seed,
                                          [(studies.Evaluation("euler", 50), a * units ** b)],
                                          flops_per_example=units * 1e12 / (1600 * 64)))
        assert claims.crossover(Measured(records), "frechet") == pytest.approx(equal * 1e12)
        assert f"the lines cross at {words}" in tables.size_table(Measured(records))


def test_what_contradicts_the_usual_telling_comes_first():
    table = tables.claims_table(Measured(made_up(lambda cell, *more: 8.0 if " rf uniform" in cell else
                                                  plain(cell, *more))))
    verdicts = [line.split("|")[4].strip() for line in table.splitlines()[2:]]
    ranks = [claims.VERDICTS.index(text.partition(" (")[0].strip("*")) for text in verdicts]
    assert ranks == sorted(ranks) and ranks[0] == 0 and len(ranks) == len(claims.CLAIMS)
    values = "8.0 (8.0 to 8.0) against 5.4 (5.4 to 5.4)"
    assert f"no: unet, rf uniform against ddpm eps, {values} | **false** (6 no) |" in table


def test_a_diverged_training_has_no_figures():
    records = made_up(plain)
    for broken in [r for r in records if (r["cell"], r["seed"]) == ("dit ddpm eps", 1)]:   # in all studies
        del broken["evaluations"], broken["errors"]
        broken["diverged"] = 70
    assert len(claims.distance(Measured(records), "dit", "ddpm eps")) == 2
    assert all(text for text in tables.sections(records, []).values())


# ---- the documents

def test_the_readme_agrees_with_the_results():
    """Written again from the results, it does not change, and its figures were drawn from them."""
    records = compare.Results(compare.RESULTS / "compare-cpu.jsonl").read()
    texts = {file: (ROOT / file).read_text() for file in tables.DOCUMENTS}
    remedy = "run python benchmarks/compare.py --readme"
    sections = tables.sections(records, compare.Results(ladder.RESULTS).read())
    assert tables.fill(texts, sections) == texts, remedy
    for name, chart in tables.charts(records).items():
        assert figures.drawn_from(ROOT / "benchmarks/pictures" / name) == figures.chart_digest(chart), remedy
    files = {file.name for file in (ROOT / "benchmarks/pictures").glob("compare-*.png")}
    assert files == set(tables.charts(records)) == charts_named_in("".join(texts.values())), remedy


def charts_named_in(text):
    return set(re.findall(r"pictures/(compare-[\w-]+\.png)", text))


def test_a_study_that_is_half_measured_names_no_missing_chart():
    """Sizes are drawn when all four are there, and the claims link to no other chart than what is drawn."""
    records = [r for r in made_up(plain) if r["study"] != "sizes" or "size 2 of 4" in r["cell"]]
    text = "\n".join(tables.sections(records, []).values())
    assert "| unet, size 2 of 4 |" in text
    assert charts_named_in(text) == set(tables.charts(records)) and "compare-sizes.png" not in text


def test_documents_are_filled_from_results(tmp_path):
    (tmp_path / "benchmarks/pictures").mkdir(parents=True)
    nothing = tables.fill({file: (ROOT / file).read_text() for file in tables.DOCUMENTS},
                          tables.sections([], []))
    for file, text in nothing.items():
        (tmp_path / file).write_text(text)
    pictures = tmp_path / "benchmarks/pictures"

    def texts():
        return [(tmp_path / file).read_text() for file in tables.DOCUMENTS]

    tables.write(tmp_path, [], [])
    empty = texts()
    assert empty == list(nothing.values())
    lacking = "Not measured yet: `python benchmarks/compare.py --budget cpu"
    assert "".join(empty).count(lacking) == len(tables.SECTIONS)
    assert not list(pictures.glob("*.png"))
    records = made_up(plain)
    tables.write(tmp_path, records, [])
    readme, results = texts()
    assert "Not measured yet: `python benchmarks/compare" not in readme + results
    assert "| dit rf logit-normal | 4.0 (4.0 to 4.0) | 0.900 (0.900 to 0.900) |" in readme
    assert "| dit rf logit-normal | 0.500 (0.500 to 0.500) | 0.100 (0.100 to 0.100) | 0.30" in results
    assert "| + transformer | dit, rf logit-normal, euler 50 | 4.0 (4.0 to 4.0) |" in readme
    drawn = tables.charts(records)
    assert {file.name for file in pictures.glob("*.png")} == set(drawn)
    for name, chart in drawn.items():
        assert figures.drawn_from(pictures / name) == figures.chart_digest(chart)
        assert f"](benchmarks/pictures/{name})" in readme or f"](pictures/{name})" in results
    assert "](benchmarks/RESULTS.md#sizes)" in readme and "](benchmarks/pictures/compare-grid.png)" in readme
    assert "](pictures/compare-sizes.png)" in results and "](benchmarks/" not in results
    before = (pictures / "compare-grid.png").stat().st_mtime_ns
    tables.write(tmp_path, records, [])                                 # again: nothing to do
    assert texts() == [readme, results] and (pictures / "compare-grid.png").stat().st_mtime_ns == before
    records[0]["evaluations"][2 if "rf" in records[0]["cell"] else 0]["frechet"] = 77.0
    assert tables.charts(records)["compare-grid.png"] != drawn["compare-grid.png"]
    with pytest.raises(ValueError, match="these results would empty [0-9]+ of the sections"):
        tables.write(tmp_path, [r for r in records if r["study"] == "grid"], [])
    assert texts() == [readme, results]
    assert list(tables.fill(dict(zip(tables.DOCUMENTS, texts())), tables.sections([], [])).values()) == empty


def test_names_below_a_chart_do_not_touch():
    checked = set()
    for name, chart in tables.charts(made_up(plain)).items():
        places = list(dict.fromkeys(x for series in chart.series for x in series.x))
        if isinstance(places[0], str):
            font, frame = charts.font_of(chart, chart.text), charts.frame_of(chart)
            widths = [max(map(font.getlength, place.split("\n"))) for place in places]
            apart = (frame.right - frame.left) / len(places)
            assert all((a + b) / 2 < apart for a, b in zip(widths, widths[1:])), name
            checked.add(name)
    assert {"compare-grid.png", "compare-schedules.png"} <= checked


def test_what_is_not_measured_is_left_out_of_the_findings():
    """And never shifted into another's place."""
    records = made_up(plain)
    text = tables.summary(Measured(records))
    assert text.count("\n") == 6 and "nan" not in text
    found = tables.staircase_values(Measured(records), "frechet")
    eps, v, cosine, straight, times, transformer = [f"{np.mean(values):.1f}" for _, _, values in found[:6]]
    assert (f"beginning with {eps}: v prediction makes it {v}, then the cosine noise schedule {cosine}, then "
            f"the straight path {straight}, then logit-normal times {times}, and then the transformer "
            f"{transformer}.") in text
    for study, cell, lost in (("noise", "unet rf logit-normal", ["**The sampler**"]),
                              ("guidance", "unet ddpm eps", ["**The families**"]),
                              (None, "unet ddpm v", ["**One change at a time**", "**The noise schedule**"]),
                              (None, "dit ddpm cosine, v", ["**The noise schedule**"]),
                              ("few steps", "longer meanflow", ["**One step**"]),
                              ("steps", "dit ddpm v", ["**Few steps**"])):
        some = [r for r in records if r["cell"] != cell or study not in (None, r["study"])]
        left = tables.summary(Measured(some))
        assert all(each in text and each not in left for each in lost)
        assert "nan" not in left and left.count("\n") == 6 - len(lost)
    assert tables.summary(Measured([])) == ""


def test_markers_that_lack_or_repeat_are_named():
    message = "A.md or B.md: needs exactly one line <!-- compare: grid -->"
    marked = "<!-- compare: grid -->\n<!-- end -->\n"
    for texts in ("# Title\n", ""), (marked, marked), (marked * 2, ""):
        with pytest.raises(ValueError, match=message):
            tables.fill(dict(zip(("A.md", "B.md"), texts)), {"compare: grid": "a table"})
    filled = tables.fill({"A.md": "# Title\n", "B.md": marked}, {"compare: grid": "a table"})
    assert filled == {"A.md": "# Title\n", "B.md": "<!-- compare: grid -->\n\na table\n\n<!-- end -->\n"}


def test_the_quantiles_are_those_of_student():
    """97.5 % of Student's density, integrated here."""
    for freedom, quantile in enumerate(claims.STUDENT, 1):
        x = np.linspace(0, quantile, 200_001)
        constant = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
        density = constant * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        assert np.trapezoid(density, x) == pytest.approx(0.475, abs=5e-5)
