"""benchmarks/report.py and its rooms: losses beside reference seeds, neighbours, the sweep, and what is kept
of an interrupted report; benchmarks/fashion_mnist.py's distance and flags."""

import argparse
import functools
import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks import fashion_mnist, report
from conftest import SHAPES
from PIL import Image

import checkpoints
import networks
import sample
import sample_settings
from data import load_data
from pictures import to_tensor
from toys import SHAPE_CLASSES, read_shape

losses, neighbours = report.losses, report.neighbours
drawing = sys.modules[report.draw_report.__module__]


# ---- losses

def write_metrics(folder, records):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(f"{record}\n" if isinstance(record, str) else
                                                  json.dumps(record) + "\n" for record in records))


def test_curve_of_a_run(tmp_path):
    """Means over windows that end at the named step; damaged lines are passed over."""
    records = [{"step": step, "loss": step / 10} for step in (20, 40, 60, 80, 100)]
    records.insert(2, '{"step": 50, "lo')
    records += ["null", {"step": 3}, {"step": 100, "val_loss": 0.5, "val_by_time": {"0.0-0.5": 0.4}},
                {"step": 50, "val_loss": 0.75, "val_by_time": {"0.0-0.5": 0.7}}]
    write_metrics(tmp_path, records)
    found = losses.curve(tmp_path, window=40)
    assert found == {"window": 40, "train": [[40, 3.0], [80, 7.0], [120, 10.0]],
                     "validation": [[50, 0.75], [100, 0.5]], "by time": {"0.0-0.5": [[50, 0.7], [100, 0.4]]}}
    assert losses.curve(tmp_path)["window"] == 20          # at least a record each, about forty in all
    write_metrics(tmp_path, [{"step": 20 * i, "loss": 1.0} for i in range(1, 401)] + records[-1:])
    assert losses.curve(tmp_path)["window"] == 200
    write_metrics(tmp_path, records[:2])
    with pytest.raises(ValueError, match="holds no validation loss"):
        losses.curve(tmp_path)


@pytest.mark.parametrize("value, seeds, words, quantile", [
    (1.5, [1.0, 2.0, 3.0], "within the seeds' range", 1 / 3),
    (3.0, [1.0, 2.0, 3.0], "within the seeds' range", 2.5 / 3),
    (3.3, [1.0, 2.0, 3.0], "above all of them by 10.0 %", 1.0),
    (0.75, [1.0, 2.0, 3.0], "below all of them by 25.0 %", 0.0),
    (1.02, [1.0], "above the only one by 2.0 %", 1.0),
    (1.0, [1.0], "equal to the only one", 0.5),
])
def test_verdict_in_words(value, seeds, words, quantile):
    for order in (seeds, seeds[::-1]):
        assert losses.verdict(value, order) == words
        assert losses.quantile(value, order) == pytest.approx(quantile)


def test_losses_are_compared_where_all_have_one():
    ours = [[500, 3.0], [1000, 2.0], [1500, 1.0]]
    seeds = [[[500, 2.5], [1000, 1.5], [2000, 1.0]], [[500, 3.5], [1000, 1.6]]]
    found = losses.compare_curve(ours, seeds)
    assert (found["step"], found["loss"], found["seeds"]) == (1000, 2.0, [1.5, 1.6])
    assert found["verdict"] == "above all of them by 25.0 %" and found["range"] == [1.5, 1.6]
    assert found["quantiles"] == [[500, 0.5], [1000, 1.0]]
    assert losses.compare_curve(ours, [[[700, 1.0]]]) is None


def seed_of(home, tmp_path, seed, **changes):
    """A copy of the run in `home` that says it has another seed or other settings."""
    folder = tmp_path / f"seed-{seed}-{len(changes)}"
    shutil.copytree(home / "runs/done", folder)
    settings = json.loads((folder / "settings.json").read_text()) | {"seed": seed} | changes
    (folder / "settings.json").write_text(json.dumps(settings))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    write_metrics(folder, [{name: value * (1 + seed / 100) if name in ("loss", "val_loss") else value
                            for name, value in line.items()} for line in lines])
    return str(folder)


def test_reference_of_several_seeds(cwd, tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "RESULTS", tmp_path)
    runs = [seed_of(cwd, tmp_path, seed) for seed in (1, 2, 3)]
    report.main(["--make-reference", *runs])
    file = tmp_path / "reference-shapes-dit-rf.json"
    reference = losses.read_reference(file)
    assert [part["seed"] for part in reference["runs"]] == [1, 2, 3]
    assert reference["runs"][1]["validation"] == losses.curve(Path(runs[1]))["validation"]

    # the run itself, of seed 0, lies 1 % below the lowest of them
    found = losses.identity(Path("runs/done"), checkpoints.load_checkpoint("runs/done"))
    row = losses.compare(Path("runs/done"), found, losses.choose_reference(found, None))
    assert row["verdicts"]["validation"]["verdict"] == "below all of them by 1.0 %"
    assert row["verdicts"]["train"]["quantile"] == 0.0
    assert row["verdicts"]["t 0.0-0.25"]["verdict"] == "within the seeds' range"        # not scaled above
    assert any("3 seeds. A further seed lies outside the range of 3 by chance in 50 %" in line
               for line in row["words"])
    assert not any("settings are others" in line or "another VAE" in line for line in row["words"])
    # its file may be made again, but not from a training that diverged
    report.main(["--make-reference", *runs, "--out", str(file)])
    assert losses.read_reference(file)["runs"] == reference["runs"]
    with open(Path(runs[0]) / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 4, "val_loss": Infinity}\n')
    with pytest.raises(ValueError, match=f"{runs[0]}: has losses that are not finite"):
        report.main(["--make-reference", *runs, "--out", str(file)])
    # of two that fit, the one with fewer differences; and those are named
    report.main(["--make-reference", seed_of(cwd, tmp_path, 4, lr=0.5), "--out",
                 str(tmp_path / "reference-a.json")])
    assert losses.find_reference(found, tmp_path)[0] == file
    file.unlink()
    row = losses.compare(Path("runs/done"), found, losses.find_reference(found, tmp_path))
    assert any("--lr 0.004, there 0.5" in line for line in row["words"])
    found["latents"] = "another"
    row = losses.compare(Path("runs/done"), found, losses.find_reference(found, tmp_path))
    assert any("another VAE" in line for line in row["words"])
    # losses of another objective mean something else
    found["objective"] = {"name": "ddpm"}
    assert losses.find_reference(found, tmp_path) is None
    with pytest.raises(ValueError, match="its objective is .* so their losses cannot be compared"):
        losses.choose_reference(found, str(tmp_path / "reference-a.json"))
    row = losses.compare(Path("runs/done"), found, None)
    assert "No reference has this data" in row["words"][0] and row["verdicts"] == {}


def test_shipped_references_are_whole():
    files = sorted(losses.RESULTS.glob("reference-*.json"))
    assert files
    for file in files:
        reference = losses.read_reference(file)
        for part in reference["runs"]:
            values = [value for _, value in part["train"] + part["validation"]]
            assert np.isfinite(values).all() and len(part["by time"]) == 4


# ---- neighbours

def plain_search(queries, rows, without=None):
    """The same by the definition, query by query."""
    distances, indices = [], []
    for i, query in enumerate(queries):
        squares = np.square(rows.astype(np.float64) - query).mean(1)
        if without is not None:
            squares[without[i]] = np.inf
        indices.append(int(squares.argmin()))
        distances.append(np.sqrt(squares.min()))
    return np.array(distances), np.array(indices)


@pytest.mark.parametrize("piece", [2**24, 300, 40, 1])
def test_search_is_exact_in_pieces_of_any_size(monkeypatch, piece):
    monkeypatch.setattr(neighbours, "PIECE", piece)
    random = np.random.default_rng(0)
    rows = random.integers(0, 256, (70, 12)).astype(np.float32)
    queries = np.concatenate([random.integers(0, 256, (20, 12)).astype(np.float32), rows[:3]])
    for without in (None, np.arange(23) % 70):
        found = neighbours.nearest(queries, neighbours.of_array(rows), without)
        distance, index = plain_search(queries, rows, without)
        np.testing.assert_allclose(found.distance, distance, atol=1e-5)
        assert (found.index == index).all()


def test_share_that_is_close():
    """By the definition, on few vectors; a copy with little noise is the worst of all."""
    random = np.random.default_rng(1)
    rows, queries = random.normal(size=(200, 6)), random.normal(size=(50, 6))
    queries[7] = rows[31] + 1e-3
    found = neighbours.compare({"a": queries}, neighbours.of_array(rows))["a"]
    distance, index = plain_search(queries, rows)
    own, _ = plain_search(rows[index], rows, without=index)
    assert found["close"] == pytest.approx((distance < own).mean()) and 0 < found["close"] < 1
    assert found["error"] == pytest.approx(np.sqrt(found["close"] * (1 - found["close"]) / 50))
    assert found["median ratio"] == pytest.approx(np.median(distance / own))
    assert found["median distance"] == pytest.approx(np.median(distance))
    first = found["worst"][0]
    assert (first["query"], first["picture"], first["mirrored"]) == (7, 31, False)
    assert first["distance"] == pytest.approx(1e-3) and first["ratio"] == pytest.approx(1e-3 / own[7])
    assert found["ratio quantiles"][50] == pytest.approx(np.median(distance / own), abs=1e-4)


def test_training_pictures_that_are_there_twice():
    rows = np.array([[0.0], [0.0], [5.0], [9.0]])
    found = neighbours.compare({"a": np.array([[0.0], [0.4], [5.5]])}, neighbours.of_array(rows))["a"]
    ratios = {row["query"]: row["ratio"] for row in found["worst"]}
    assert ratios == {0: 1.0, 1: 10.0, 2: 0.5 / 4} and found["close"] == pytest.approx(1 / 3)


def test_mirrored_pictures_count_where_training_mirrors():
    random = np.random.default_rng(2)
    images = random.integers(0, 256, (30, 4, 4, 1)).astype(np.uint8)
    vectors = report.pixel_vectors(images, flip=True)
    both = np.concatenate([images, images[:, :, ::-1]]).reshape(60, 16)
    for start, stop in ((0, 60), (0, 5), (28, 33), (30, 60), (59, 60)):
        assert (vectors.read(start, stop) == both[start:stop]).all()
    found = neighbours.compare({"a": both[40:41].astype(np.float32)}, vectors)["a"]["worst"][0]
    assert (found["picture"], found["mirrored"], found["distance"]) == (10, True, 0.0)
    # its own mirror image is no other picture: the nearest of 40, which shows 10, is one of another picture
    other, index = plain_search(both[[40]], both, without=np.array([[10, 40]]))
    assert neighbours.nearest(both[[40]], vectors, np.array([10])).distance == pytest.approx(other)
    assert len(report.pixel_vectors(images, flip=False).read(0, 30)) == 30
    assert report.pixel_vectors(images, flip=False).count == 30


@pytest.fixture
def small_data(cwd, monkeypatch):
    monkeypatch.setattr(report, "load_data", functools.partial(load_data, count=SHAPES))
    return cwd


def job_of(name, work):
    checkpoint = checkpoints.load_checkpoint(name)
    args = argparse.Namespace(data_dir="data")
    return report.Job(args, name, checkpoint, networks.unpack_vae(checkpoint["vae"]), report.Score(), work)


def test_latents_from_the_cache_or_encoded(small_data, tmp_path):
    """The cache of the VAE's run is taken where it holds these latents, and else they are encoded."""
    job = job_of("runs/done", tmp_path)
    data, _, _, cache_dir = report.load_pictures(job)
    assert cache_dir == Path("runs/shapes-vae") and len(data) == SHAPES
    opened = torch.from_numpy(np.load(cache_dir / "latents.npy")[:, 0, 0].astype(np.float32))
    cached = report.latent_vectors(job, data, False, cache_dir)
    assert (cached.count, cached.pictures) == (SHAPES, SHAPES)
    for start, stop in ((0, 3), (5, 9), (SHAPES - 1, SHAPES)):
        expected = job.vae.normalize(opened[start:stop]).flatten(1).numpy()
        assert (cached.read(start, stop) == expected).all()

    # other pictures, and their mirror images after them
    few = replace(data, images=data.images[:120], fingerprint="few")
    encoded = report.latent_vectors(job, few, True, cache_dir)
    assert (encoded.count, encoded.pictures) == (240, 120)
    np.testing.assert_allclose(encoded.read(5, 9), cached.read(5, 9), atol=0.02)       # float16 in the cache
    with torch.no_grad():
        x = to_tensor(few.images[100:]).flip(-1)
        mirrored = job.vae.normalize(job.vae.encode(x).mean).flatten(1).numpy()
    np.testing.assert_allclose(encoded.read(110, 240)[-20:], mirrored, atol=1e-4)


def test_copies_are_found_and_fresh_pictures_are_not():
    rows = {"held-out pictures": {"close": 0.28, "error": 0.014},
            "held-out through the VAE": {"close": 0.30, "error": 0.014}}
    for close, words in ((0.1, "no sign"), (0.33, "no sign"), (0.40, "more than normal by 10.0 points")):
        rows["samples"] = {"close": close, "error": 0.014, "count": 1000}
        for line in report.describe_neighbours({"pixels": rows, "latents": rows}):
            assert words in line and "30.0% (+- 1.4%)" in line


# ---- the distance, without its bias

def test_distance_extrapolated_to_infinitely_many_samples():
    """Against the closed form for two Gaussians; of few samples, the plain distance is far above it."""
    random = np.random.default_rng(0)
    stds = np.linspace(0.5, 2.0, 32)
    shift = 0.2
    exact = 32 * shift**2 + ((stds - 1.1 * stds) ** 2).sum()
    b = random.normal(size=(40_000, 32)) * stds
    plain, limit = [], []
    for _ in range(10):
        a = 1.1 * stds * random.normal(size=(400, 32)) + shift
        plain.append(fashion_mnist.frechet(a, b))
        limit.append(fashion_mnist.frechet_limit(a, b))
    assert np.mean(plain) > exact + 0.5 and abs(np.mean(limit) - exact) < 0.3
    # Classes in turn: halves keep the balance of the classes, else they would be further away.
    means = 3 * random.normal(size=(10, 32))
    def in_turn(n):
        return means[np.arange(n) % 10] + random.normal(size=(n, 32))
    reference = in_turn(40_000)
    rows = [(fashion_mnist.frechet_limit(a, reference, 10), fashion_mnist.frechet_limit(a, reference))
            for a in (in_turn(400) for _ in range(10))]
    grouped, mixed = np.mean(rows, 0)
    assert abs(grouped) < 0.3 and mixed < -1.5


@pytest.mark.parametrize("scale, flags", [
    (1.0, ["--times", "karras"]), (0.0, ["--times", "karras"]),
    (2.0, ["--interval", "0", "0.8", "--guide", "runs/early", "--times", "karras"]),
])
def test_flags_that_act_on_guidance_are_left_out_where_there_is_none(monkeypatch, scale, flags):
    called = []

    def main(argv):
        called.append(argv)
        np.savez(argv[-1], arr_0=np.zeros((1, 2, 2, 1), np.uint8))

    monkeypatch.setattr(sample, "main", main)
    args = argparse.Namespace(n=7, precision="fp32", interval=["0", "0.8"], guide="runs/early", sampler=None,
                              steps=None, times="karras")
    fashion_mnist.draw_samples("runs/x", scale, args)
    assert called[0][:7] == ["runs/x", "--n", "7", "--batch-size", "250", "--cfg", str(scale)]
    assert called[0][9:-2] == flags
    words = fashion_mnist.describe(scale, args)
    assert ("by runs/early for t in 0..0.8" in words) == (scale == 2) and "karras times" in words


# ---- the whole report

QUICK_REPORT = ["runs/done", "--n", "100", "--scales", "1", "2", "--seeds", "2", "--minutes", "1000"]


def test_report_on_shapes(small_data, tmp_path):
    out = tmp_path / "report.png"
    report.main([*QUICK_REPORT, "--out", str(out)])
    found = json.loads(out.with_suffix(".json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.png"]
    assert Image.open(out).width == drawing.WIDTH

    # every cell of the sweep, and one of them by hand
    assert [(row["weights"], row["scale"]) for row in found["sweep"]][:4] == [
        ("averaged", 1), ("averaged", 2), ("raw", 1), ("raw", 2)]
    sample.main(["runs/done", "--n", "100", "--raw", "--cfg", "2", "--steps", "3", "--out", "by-hand.npz"])
    asked = [tuple(SHAPE_CLASSES[i % 24].split("-")) for i in range(100)]
    right = [read_shape(image) == pair for image, pair in zip(np.load("by-hand.npz")["arr_0"], asked)]
    assert found["sweep"][3]["right"] == pytest.approx(np.mean(right))
    best = max(row["right"] for row in found["sweep"])
    chosen = [row for row in found["sweep"] if {"weights": row["weights"], "scale": row["scale"]}
              == found["chosen"]]
    assert chosen[0]["right"] == best
    # the first set of seeds is the chosen cell of the sweep, the second is another
    assert [row["first seed"] for row in found["seeds"]] == [0, 100]
    assert found["seeds"][0]["right"] == best
    control = found["neighbours"]["latents"]["held-out through the VAE"]
    assert control["count"] == 480 and found["neighbours"]["training pictures"] == SHAPES
    for command in found["commands"]:
        words = command.split()
        assert words[:2] == ["python", "sample.py"]
        sample_settings.check_flags(sample_settings.parse_args(words[2:]))
    assert "heun --steps 3" in found["protocol"] and f"all {SHAPES:,} training pictures" in found["protocol"]
    assert found["loss"]["curve"]["validation"][-1][0] == 60 and found["words"]["loss"]


@pytest.mark.long
def test_an_interrupted_report_is_continued(small_data, tmp_path, monkeypatch):
    """What was drawn is not drawn again, and the result is the same; other flags begin anew."""
    command = [*QUICK_REPORT, "--only", "sweep", "seeds"]
    report.main([*command, "--out", str(tmp_path / "whole.png")])
    calls, main = [], sample.main
    end_after = 5

    def interrupted(argv):
        if argv[-1].endswith(".npz"):
            if len(calls) == end_after:
                raise KeyboardInterrupt
            calls.append(argv)
        return main(argv)

    monkeypatch.setattr(report.sample, "main", interrupted)
    out = tmp_path / "cut.png"
    with pytest.raises(KeyboardInterrupt):
        report.main([*command, "--out", str(out)])
    assert not out.exists() and len(list(tmp_path.glob(".cut-*"))) == 1
    end_after = None
    report.main([*command, "--out", str(out)])
    drawn = [tuple(argv) for argv in calls]
    assert len(set(drawn)) == len(drawn)                   # nothing twice
    whole, again = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "cut"))
    assert whole == again and not list(tmp_path.glob(".cut-*"))

    end_after = len(calls) + 1
    with pytest.raises(KeyboardInterrupt):
        report.main([*command, "--out", str(out)])
    end_after = None
    report.main([*command[:-3], "--only", "sweep", "--scales", "1", "--out", str(out)])
    rows = json.loads(out.with_suffix(".json").read_text())["sweep"]
    assert [row["weights"] for row in rows] == ["averaged", "raw", "0.04", "0.05", "0.06"]
    assert not list(tmp_path.glob(".cut-*"))               # nor what was not continued


def test_report_on_runs_without_a_score(cwd, text_runs, tmp_path):
    """Loss and neighbours alone; of a run that cannot be scored, no sweep and no spread."""
    out = tmp_path / "text.png"
    report.main([text_runs[1], "--n", "100", "--minutes", "1000", "--out", str(out)])
    found = json.loads(out.with_suffix(".json").read_text())
    assert "sweep" not in found and "seeds" not in found and found["measures"] == []
    assert found["neighbours"]["training pictures"] == 190
    assert list(found["neighbours"]["pixels"]) == [
        "samples without guidance", "samples at guidance 1.5", "held-out pictures",
        "held-out through the VAE"]
    assert "No reference has this data" in found["words"]["loss"][0]


def test_spread_over_runs(small_data, tmp_path):
    other = tmp_path / "other"
    shutil.copytree("runs/done", other)
    report.main([*QUICK_REPORT, "--only", "seeds", "--seeds", "1", "--out", str(tmp_path / "r.png")])
    alone = json.loads((tmp_path / "r.json").read_text())
    report.main(["runs/done", str(other), *QUICK_REPORT[1:], "--only", "seeds", "--seeds", "1", "--out",
                 str(tmp_path / "r.png")])
    both = json.loads((tmp_path / "r.json").read_text())
    assert [row["run"] for row in both["seeds"]] == ["runs/done", str(other)]
    assert both["seeds"][1]["right"] == both["seeds"][0]["right"] == alone["seeds"][0]["right"]
    assert "over 2 runs" in both["words"]["seeds"][0]


@pytest.mark.parametrize("each, minutes, expected", [(0.01, 10, 500), (0.1, 10, 500), (0.5, 10, 110),
                                                     (5.0, 10, 100)])
def test_fewer_samples_where_time_is_short(tmp_path, monkeypatch, each, minutes, expected):
    """Eight cells, of which one is without guidance and costs half: 7.5 guided sets in 80 % of the time."""
    clock = [0.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: clock[0])

    def draw(self, cell, n, run=""):
        clock[0] += 1.0 + each * n
    monkeypatch.setattr(report.Job, "draw", draw)
    job = report.Job(argparse.Namespace(n=500, minutes=minutes), "x", {}, None, report.Score(), tmp_path)
    cells = [report.Cell("averaged", 1.0), *[report.Cell("raw", 2.0)] * 5]
    found = report.choose_n(job, cells, [report.Cell("averaged", 2.0)] * 2)
    assert found["n"] == expected and found["seconds"] == pytest.approx(each)
    job.score.least = 300                                  # what the figures need comes before the time
    assert report.choose_n(job, cells, [report.Cell("averaged", 2.0)] * 2)["n"] == max(expected, 300)


@pytest.mark.parametrize("flags, message", [
    (["runs/nothing"], "runs/nothing: no checkpoint"),
    (["runs/shapes-vae"], "runs/shapes-vae: is a VAE"),
    (["runs/done", "--out", "x.pdf"], "--out x.pdf: must end in .png"),
    (["runs/done", "--out", "no/x.png"], "the folder no does not exist"),
    (["runs/done", "--n", "5"], "--n 5: must be"),
    (["runs/done", "--minutes", "0"], "--minutes 0: must be above 0"),
    (["runs/done", "--only", "ema"], "--only ema: must be one of loss, sweep, seeds, neighbours"),
    (["runs/done", "--sampler", "magic"], "--sampler magic: must be one of"),
    (["runs/done", "runs/mmdit"], "runs/mmdit: was trained on other data than runs/done"),
    (["runs/done", "--reference", "none.json"], "none.json: not a reference, or damaged"),
    (["--make-reference", "runs/done", "runs/done"], "runs/done: has the --seed 0 of another run"),
    (["--make-reference", "runs/shapes-vae"], "runs/shapes-vae: is a VAE"),
    (["--make-reference", "runs/done", "runs/mmdit"], "its data is not that of runs/done"),
    # a JSON file that is not its own is never replaced
    (["--make-reference", "runs/done", "--out", "runs/done/settings.json"], "exists and is not a reference"),
    (["--make-reference", "runs/done", "--out", "runs/done/checkpoint.pt"], "must end in .json"),
    (["runs/done", "--out", "runs/done/settings.png"], "settings.json exists and is not a report"),
])
def test_report_refuses(cwd, text_runs, tmp_path, flags, message):
    def files():
        return {path: path.read_bytes() for path in (cwd / "runs").rglob("*") if path.is_file()}

    before = files()
    with pytest.raises(ValueError, match=message) as refusal:
        report.main(flags if "--out" in flags or flags[0] == "--make-reference" else
                    [*flags, "--out", str(tmp_path / "x.png")])
    assert "\n" not in str(refusal.value) and files() == before
    assert not list(tmp_path.iterdir())


# ---- the picture

def test_words_without_letters_of_other_fonts():
    assert drawing.plain("Fréchet, 1 — 2") == "Frechet, 1  2"


def test_picture_is_drawn_again_from_the_json(tmp_path, monkeypatch):
    words = {"versions": {"date": "2026-11-26"}, "run": "runs/x", "step": 3, "words": {},
             "protocol": "p " * 300}
    (tmp_path / "r.json").write_text(json.dumps(words))
    monkeypatch.setattr("sys.argv", ["x", str(tmp_path / "r.json"), str(tmp_path / "r.png")])
    drawing.main()
    found, again = Image.open(tmp_path / "r.png"), io.BytesIO()
    drawing.draw_report(words).save(again, "PNG")
    assert found.width == drawing.WIDTH and (tmp_path / "r.png").read_bytes() == again.getvalue()
