"""benchmarks/speed.py: how figures are taken, with a clock that only the measured functions advance. And what
the programs that score samples refuse."""

import json
import math

import pytest
import torch
from benchmarks import (compare, fashion_mnist, gallery, ladder, report_picture, samples, scenes, shapes,
                        sharpness, speech, speed, tones)
from cli import program
from conftest import contents


NO_LIMITS = speed.Limits(stop=math.inf, repeat=math.inf)


class Clock:
    """Seconds, which pass only by `wait`; in the share `stolen` of them, another process has the core."""

    def __init__(self):
        self.time, self.cpu_time, self.stolen = 1000.0, 7.0, 0.0

    def __call__(self):
        return self.time

    def wait(self, seconds):
        self.time += seconds
        self.cpu_time += seconds * (1 - self.stolen)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(speed, "now", clock)
    monkeypatch.setattr(speed, "cpu_now", lambda: clock.cpu_time)
    monkeypatch.setattr(speed, "CUDA", False)
    return clock


class Work:
    """A candidate that takes the given seconds, call after call, and then the last of them for ever."""

    def __init__(self, clock, *seconds, name="", log=None, preparation=0.0):
        self.clock, self.seconds, self.name, self.preparation = clock, list(seconds), name, preparation
        self.log = [] if log is None else log
        self.calls = self.prepared = 0

    def prepare(self):
        self.prepared += 1
        self.clock.wait(self.preparation)
        return self.call

    def call(self):
        self.log.append(self.name)
        self.clock.wait(self.seconds[min(self.calls, len(self.seconds) - 1)])
        self.calls += 1


def seconds_of(measured):
    return {name: timing.seconds for name, timing in measured.timings.items()}


# ---- medians and spreads

@pytest.mark.parametrize("times, median, spread, noisy", [
    ([2, 2, 2, 2, 2, 2, 2], 2, 0, False),
    ([2, 2, 2, 2, 2, 2, 90], 2, 0, False),              # one disturbed round
    ([1, 2, 2, 2, 2, 2, 2], 2, 0, False),
    ([100, 101, 102, 103, 104, 105, 106], 103, 3 / 103, False),
    ([100, 100, 100, 100, 109, 110, 111], 100, 0.095, False),
    ([100, 100, 100, 100, 111, 112, 113], 100, 0.115, True),
    ([1, 1, 1, 2, 2, 2, 2], 2, 0.5, True),              # two speeds
    ([1, 1, 1, 1, 2], 1, 0, False),
    ([1, 1, 1, 2, 2], 1, 1, True),
])
def test_spread_is_the_range_of_the_middle_half_over_the_median(times, median, spread, noisy):
    for order in (times, times[::-1]):
        timing = speed.summary([speed.Round(each) for each in order])
        assert (timing.seconds, timing.fastest, timing.rounds) == (median, min(times), len(times))
        assert timing.spread == pytest.approx(spread, abs=1e-9)
        assert (timing.spread > speed.NOISY) == noisy


@pytest.mark.parametrize("waited, share", [
    ([0, 0, 0, 0, 0], 0),
    ([1, 1, 1, 1, 1], 0.5),
    ([0, 1, 0, 0, 0], 0.1),
    ([0.015, -0.015, 0.015, -0.015, 0], 0),             # a coarse clock
    ([-0.015, 0, 0, 0, 0], 0),
])
def test_waiting_is_a_share_of_the_whole_time(waited, share):
    timing = speed.summary([speed.Round(2.0, each) for each in waited])
    assert timing.waited == pytest.approx(share, abs=1e-9) and timing.spread == 0


@pytest.mark.parametrize("stolen, attempts", [(0.0, 1), (0.05, 1), (0.2, 3), (0.9, 3)])
def test_steady_load_is_noticed_although_it_causes_no_spread(clock, stolen, attempts):
    clock.stolen = stolen
    measured = speed.measure({"a forward": Work(clock, 1.0).prepare}, NO_LIMITS, least=2.0)
    timing = measured.timings["a forward"]
    assert timing.spread == pytest.approx(0, abs=1e-9) and timing.waited == pytest.approx(stolen, abs=1e-9)
    assert measured.attempts == attempts
    assert ("?" in speed.in_ms(measured)) == (stolen > speed.NOISY)


# ---- warm-up

@pytest.mark.parametrize("seconds, calls, fastest", [
    ([1.0], 4, 1.0),
    ([9.0, 5.0, 1.0], 6, 1.0),                          # compilation
    ([1.0, 1.0, 1.0, 1.0, 0.5], 4, 1.0),                # three steady calls end it
    ([1.0, 1.0, 0.5], 6, 0.5),
    ([1.0, 50.0, 3.0, 70.0], 4, 1.0),                   # a load never prolongs it
    ([0.94**i for i in range(21)], 24, 0.94**20),       # a slow but steady acceleration
    ([1 / 64], 7, 1 / 64),                              # short calls go on for WARM_UP seconds
])
def test_warm_up_ends_once_calls_no_longer_become_faster(clock, seconds, calls, fastest):
    work = Work(clock, *seconds)
    assert speed.warm_up(work.call, stop=math.inf) == pytest.approx(fastest)
    assert work.calls == calls


def test_warm_up_is_not_in_the_measurement(clock):
    works = {"math": Work(clock, 37.8, 12.0, 0.5), "flash": Work(clock, *[0.9**i for i in range(30)])}
    measured = speed.measure({name: work.prepare for name, work in works.items()}, NO_LIMITS, least=0.1)
    assert seconds_of(measured)["math"] == pytest.approx(0.5)
    assert measured.noise == pytest.approx(0, abs=1e-9)


# ---- turns

def test_candidates_take_turns(clock):
    log = []
    candidates = {name: Work(clock, took, name=name, log=log).prepare
                  for name, took in (("a", 1.0), ("b", 0.5), ("c", 2.0))}
    measured = speed.measure(candidates, NO_LIMITS, least=1.0)
    assert log[:12] == ["a"] * 4 + ["b"] * 4 + ["c"] * 4                 # warm-up
    assert log[12:] == ["a", "b", "b", "c"] * speed.ROUNDS               # as many calls as fill a second
    assert seconds_of(measured) == pytest.approx({"a": 1.0, "b": 0.5, "c": 2.0})
    assert [timing.rounds for timing in measured.timings.values()] == [speed.ROUNDS] * 3
    assert measured.attempts == 1 and measured.noise == 0


def test_preparation_is_done_anew_in_each_round_and_not_timed(clock):
    work = Work(clock, 0.25, preparation=60.0)
    measured = speed.measure({"a": work.prepare}, NO_LIMITS, least=1.0)
    assert seconds_of(measured) == {"a": 0.25} and measured.noise == 0
    assert work.prepared == 1 + speed.ROUNDS and work.calls == 4 + 4 * speed.ROUNDS


# ---- repetition

QUIET, LOUD, LOUDER = [1.0] * 7, [1.0, 1.0, 1.0, 1.5, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 2.0, 4.0, 4.0, 4.0]


@pytest.mark.parametrize("attempts, made, spread", [
    ([QUIET, LOUD, LOUD], 1, 0),                        # nothing to repeat
    ([LOUD, QUIET, LOUD], 2, 0),                        # repeated until it is quiet
    ([LOUD, LOUDER, QUIET], 3, 0),
    ([LOUDER, LOUD, LOUDER], 3, 2 / 3),                 # up to a limit, and the calmest counts
    ([LOUD, LOUDER, LOUDER], 3, 2 / 3),
])
def test_noisy_measurements_are_repeated(clock, attempts, made, spread):
    noisy = Work(clock, *[1.0] * 4, *sum(attempts, []))
    steady = Work(clock, 1.0)
    measured = speed.measure({"noisy": noisy.prepare, "steady": steady.prepare}, NO_LIMITS, least=1.0)
    assert measured.attempts == made and measured.noise == pytest.approx(spread, abs=1e-9)
    # both results are from the same attempt, so both were measured again
    assert noisy.calls == steady.calls == 4 + 7 * made


def test_no_repetition_that_would_end_too_late(clock):
    for time_left, made in ((13, 1), (24.9, 1), (25, 2), (35.4, 2), (35.5, 3), (1000, 3)):
        work = Work(clock, *[1.0] * 4, *LOUD * 3)      # 4 seconds of warm-up, 10.5 of each attempt
        limits = speed.Limits(stop=math.inf, repeat=clock() + time_left)
        measured = speed.measure({"a": work.prepare}, limits, least=1.0)
        assert measured.attempts == made and measured.noise > speed.NOISY


@pytest.mark.parametrize("time_left, rounds", [
    (3.5, 0),           # within the warm-up
    (10, 0),            # 4 calls of warm-up and 3 rounds of 2 calls: too few for a spread
    (17, 0),
    (17.5, 5),          # the last call begins at 17
    (19, 5),            # an incomplete round does not count
    (20, 6),
    (99, 7),
])
def test_no_call_begins_after_the_time_is_up(clock, time_left, rounds):
    end = clock() + time_left
    works = {name: Work(clock, 1.0) for name in "ab"}
    measured = speed.measure({name: work.prepare for name, work in works.items()},
                             speed.Limits(end, math.inf), least=1.0)
    assert clock() <= end + 2                          # at most the first call of each candidate is late
    assert {timing.rounds for timing in measured.timings.values()} == ({rounds} if rounds else set())


def test_time_is_shared_equally_and_unused_time_passes_on(clock):
    end = clock() + 60
    assert speed.share(end, 3) == clock() + 20
    clock.wait(6)
    assert speed.share(end, 2) == clock() + 27
    assert speed.share(end, 1) == end


# ---- attention

class Slow(torch.autograd.Function):
    """Takes `forward` seconds in the forward pass and `backward` seconds in the backward pass."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward_work = backward
        ctx.save_for_backward(x)
        forward.call()
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        ctx.saved_tensors
        ctx.backward_work.call()
        return 2 * gradient, None, None


@pytest.mark.parametrize("forward_noise", [[], [0.308, 0.1, 37.8, 0.05] * 200])
def test_backward_pass_is_timed_by_itself(clock, forward_noise):
    """However noisy the forward pass is, the time of the backward pass does not depend on it."""
    forward, backward = Work(clock, *forward_noise, 0.5), Work(clock, 0.25)
    x = torch.ones(3, requires_grad=True)
    measured = speed.measure_passes({"ours": lambda x: Slow.apply(x, forward, backward)}, [x], NO_LIMITS)
    assert list(measured.timings) == ["ours forward", "ours backward", "ours both"]
    timing = measured.timings["ours backward"]
    assert timing.seconds == pytest.approx(0.25) and timing.spread == pytest.approx(0, abs=1e-9)
    assert measured.timings["ours both"].seconds >= 0.25 + 0.05 - 1e-9
    assert (measured.noise > speed.NOISY) == bool(forward_noise)

    row = speed.pass_figures(measured, flops=1e12)
    assert row["ours backward"] == timing.seconds
    assert row["ours backward TFLOP/s"] == pytest.approx(2.5 / 0.25)
    assert row["ours backward spread"] == pytest.approx(0, abs=1e-9)
    printed = speed.in_ms(measured)
    assert ("?" in printed) == bool(forward_noise) and " 250.000 " in printed and "-" not in printed


def test_passes_that_fail_are_left_out(capsys):
    def broken(x):
        raise RuntimeError("no kernel for these inputs")
    x = torch.ones(3, requires_grad=True)
    measured = speed.measure_passes({"broken": broken, "without a graph": lambda x: x.detach()}, [x],
                                    speed.Limits(math.inf, -math.inf))
    assert list(measured.timings) == ["without a graph forward"]
    printed = capsys.readouterr().out
    assert "broken forward: left out, RuntimeError: 'no kernel for these inputs'" in printed
    assert "without a graph backward: left out" in printed and "broken backward" not in printed


def test_compiled_backward_pass_can_be_repeated():
    """With retain_graph in one pass, without it in another, in turns."""
    x = torch.ones(4, 4, requires_grad=True)
    call = torch.compile(lambda x: (x.sin() @ x).exp(), backend="aot_eager")
    measured = speed.measure_passes({"compiled": call}, [x], speed.Limits(math.inf, -math.inf))
    assert list(measured.timings) == ["compiled forward", "compiled backward", "compiled both"]
    assert all(timing.fastest > 0 for timing in measured.timings.values())


# ---- the matrix rate and what is divided by it

@pytest.mark.parametrize("seconds", [[0.1, 0.4, 0.2], [0.4, 0.1, 0.2], [0.4, 0.3, 0.1]])
def test_matrix_rate_is_the_best_over_shapes_layouts_and_rounds(monkeypatch, clock, seconds):
    shapes = [(10, 10, 10), (10, 20, 10), (5, 10, 20)]
    works = {}

    def product(rows, inner, columns, transposed):
        took = seconds[shapes.index((rows, inner, columns))] * (1 if transposed else 2)
        # a load makes all calls but one slower
        works[rows, inner, columns, transposed] = Work(clock, *[3 * took] * 6, took, 3 * took)
        return works[rows, inner, columns, transposed].call

    monkeypatch.setattr(speed, "MATRIX_SHAPES", shapes)
    monkeypatch.setattr(speed, "matrix_product", product)
    best = max(2 * math.prod(shape) / took for shape, took in zip(shapes, seconds))
    assert speed.matrix_rate() == pytest.approx(best)
    assert len(works) == 6
    assert all(work.calls == 4 + speed.ROUNDS for work in works.values())        # noise is not repeated here


def test_matrix_product_has_the_shape_that_is_counted():
    for transposed in (False, True):
        assert speed.matrix_product(2, 3, 4, transposed)().shape == (2, 4)


CASE = speed.CPU_CASES[0]


@pytest.mark.parametrize("spread, waited, share_of_rate, memory, noisy", [
    (0.02, 0.01, 0.5, 630.0, False),
    (0.25, 0.01, 0.5, 630.0, True),
    (0.02, 0.60, 0.5, 630.0, True),
    (0.02, 0.01, 1.05, None, True),           # more than the matrix product: one of the two was disturbed
])
def test_rows_of_networks(capsys, spread, waited, share_of_rate, memory, noisy):
    rate = 3 * 1e9 * 64 / 2.0 / share_of_rate
    use = speed.Use("ours", None, batch=64)
    timing = speed.Timing(2.0, 1.9, spread, waited, 7)
    row = speed.network_row("train", CASE, use, timing, 3, 1e9, rate, memory)
    assert row["utilisation"] == pytest.approx(share_of_rate)
    assert row["images/s"] == 32 and row["seconds"] == 2.0 and row["MiB"] == memory
    assert (row["spread"], row["waited"], row["attempts"], row["noisy"]) == (spread, waited, 3, noisy)
    assert row["matrix FLOP/s"] == rate
    printed = capsys.readouterr().out
    assert ("%?" in printed) == noisy and f"spread {spread:4.0%}" in printed
    assert ("2000.0 ms?" in printed) == (max(spread, waited) > speed.NOISY)


def test_networks_are_measured_in_turns_and_compiled_only_if_time_is_left(monkeypatch, clock, capsys):
    monkeypatch.setattr(speed, "CASES", [CASE])
    monkeypatch.setattr(speed, "variants", lambda case: dict.fromkeys(
        ["ours", "ours compiled", "diffusers", "diffusers compiled"]))
    monkeypatch.setattr(speed, "peak_memory", lambda index, name, until: 630.0)
    monkeypatch.setattr(speed, "matrix_rate", lambda: 5e12)
    log = []

    def build(only, case, use):
        log.append(f"build {use.name}")
        clock.wait(30 if use.compiled else 1)
        return Work(clock, 0.5, name=use.name, log=log).call

    monkeypatch.setattr(speed, "build", build)
    rows = list(speed.networks("train", rate=1e12, deadline=clock() + 60))
    names = ["ours", "diffusers", "ours compiled"]
    assert [row["variant"] for row in rows] == names
    assert log == [f"build {name}" for name in names] + sum(([name] * 4 for name in names), []) + 7 * names
    printed = capsys.readouterr().out
    assert "diffusers compiled, batch 64: left out, because compiling it may take longer" in printed
    assert all(row["matrix FLOP/s"] == 5e12 for row in rows)            # the better of the two measurements
    assert not any(row["noisy"] for row in rows) and rows[0]["MiB"] == 630.0


# ---- the program

@pytest.mark.parametrize("flags, words", [
    (["--minutes", "0"], "--minutes 0: must be"),
    (["--minutes", "-1"], "--minutes"),
    (["--minutes", "nan"], "--minutes nan: must be"),
    (["--minutes", "soon"], "--minutes soon: must be a number"),
    (["--only", "vae"], "--only vae: must be one of attention, train, sample"),
    (["--out", "missing/speed.json"], "missing/speed.json: must be a file in a folder that exists"),
    (["--out", "."], "--out .: must be a file in a folder that exists"),
    (["--rounds", "3"], "--rounds"),
])
def test_bad_flags_are_refused_in_one_line(monkeypatch, tmp_path, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as refusal:
        speed.main(flags)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_every_row_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(speed, "matrix_rate", lambda: 1e12)
    monkeypatch.setattr(speed, "attention_alone", lambda deadline, flex_everywhere: iter([{"N": 16}]))
    monkeypatch.setattr(speed, "networks", lambda only, rate, deadline: iter(2 * [{"what": only}]))
    monkeypatch.setattr(speed.os, "getloadavg", lambda: (3.2, 1, 1), raising=False)
    speed.main(["--out", str(tmp_path / "speed.json"), "--only", "attention", "train"])
    written = json.loads((tmp_path / "speed.json").read_text())
    assert written["rows"] == [{"N": 16}, {"what": "train"}, {"what": "train"}]
    assert written["matrix FLOP/s"] == 1e12 and written["load average"] == 3.2
    assert "load average 3.2" in capsys.readouterr().out


# ---- bad input

@pytest.mark.parametrize("benchmark, flags, refusal", [
    (tones, ["runs/done"], "runs/done: was trained on shapes; give a run of --data tones"),
    (tones, ["runs/shapes-vae"], "runs/shapes-vae: an autoencoder alone; give the run of a network"),
    (tones, ["runs/none"], "runs/none: no checkpoint there"),
    (tones, ["runs/done", "--n", "0"], "--n 0: must be"),
    (tones, ["runs/done", "--cfg", "much"], "--cfg much: must be a number"),
    (shapes, ["runs/shapes-vae"], "runs/shapes-vae: an autoencoder alone; give the run of a network"),
    (shapes, ["runs/done", "--n", "1.5"], "--n 1.5: must be"),
    (shapes, ["runs/done", "--n", "3", "--sampler", "best"], "--sampler best: must be one of"),
    (shapes, ["runs/done", "--strength", "2"], "--strength 2: must be"),
    (scenes, ["runs/done"], "runs/done: draws classes; benchmarks/shapes.py scores it"),
    (scenes, ["runs/done", "--first", "-1"], "--first -1: must be"),
    (fashion_mnist, ["runs/done"], "runs/done: was trained on shapes at 32 x 32; give a run of --data"),
    (fashion_mnist, ["runs/done", "--n", "39"], "--n 39: must be"),
    (sharpness, ["runs/none"], "runs/none: no checkpoint there"),
    (sharpness, ["runs/shapes-vae", "--noise", "-1"], "--noise -1: must be"),
    (sharpness, ["runs/shapes-vae", "--out", "a.txt"], "--out a.txt: must end in .png"),
    (sharpness, ["runs/shapes-vae", "--out", "no/a.png"], "--out no/a.png: the folder no does not"),
    (gallery, ["runs/done", "a.png"], "runs/done: draws no captions; give a run of --cond text"),
    (gallery, ["runs/none", "a.png"], "runs/none: no checkpoint there"),
    (report_picture, ["none.json", "a.png"], "none.json: not a report, or damaged; make one by"),
    (report_picture, ["runs/done/settings.json", "a.png"], "runs/done/settings.json: not a report, or"),
    (report_picture, ["runs/done/checkpoint.pt", "a.png"], "runs/done/checkpoint.pt: not a report, or"),
    (gallery, ["runs/done", "a.png", "--prompts", "runs/done/checkpoint.pt"], "--prompts runs/done/"),
    (compare, ["--readme", "--results", "none.jsonl"], "none.jsonl: has no results that"),
    (compare, ["--readme", "--results", "runs/done/checkpoint.pt"], "runs/done/checkpoint.pt: has no "),
    (compare, ["--list"], "--budget is required: "),
    (compare, ["--budget", "large", "--list"], "--budget large: must be one of "),
    (compare, ["--budget", "cpu", "--only", "stairs"], "--only stairs: must be one of "),
    (compare, ["--budget", "cpu", "--seeds", "-1"], "--seeds -1: must be"),
    (compare, ["--budgets", "cpu"], "unrecognized arguments: --budgets cpu; did you mean --budget?"),
    (ladder, ["--rungs", "faster"], "--rungs faster: must be one of "),
    (ladder, ["--n", "many"], "--n many: must be a whole number"),
    (speech, ["runs/done", "--precision", "fp8"], "--precision fp8: must be one of auto, fp32, tf32, bf16"),
])
def test_bad_input_is_refused_in_one_line(cwd, monkeypatch, capsys, benchmark, flags, refusal):
    name = benchmark.__name__.rpartition(".")[2]
    monkeypatch.setattr("sys.argv", [name, *flags])
    before = contents(cwd)
    assert program(name, benchmark.main) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"{name}: error: {refusal}") and printed.count("\n") == 1
    assert contents(cwd) == before


def test_a_run_of_captions_is_not_one_of_classes(monkeypatch):
    monkeypatch.setattr(samples, "load_checkpoint", lambda run: {
        "arch": "dit", "data": {"source": "shapes"}, "text": {"encoder": "bytes"}})
    monkeypatch.setattr("sys.argv", ["shapes.py", "runs/text"])
    with pytest.raises(ValueError, match="runs/text: draws from captions; benchmarks/scenes.py scores it"):
        shapes.main()
