"""benchmarks/compare.py: equal FLOPs, common units against closed forms, and cells that are measured once."""

import json
import shutil
import threading
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benchmarks import compare, fashion_mnist, measures, studies
from conftest import few_samples, write_idx
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import dit
import sample
import sample_settings
import settings
import train
import unet
from data import load_drawn
from ddpm import DDPM
from files import locked
from networks import build_model
from rectified_flow import RectifiedFlow
from text import TextConfig
from toys import Scene, describe_corners, draw_corners, draw_scene

LATENT = (4, 8, 8)


# ---- equal costs

@pytest.mark.parametrize("size", range(4))
def test_sizes_are_pairwise_of_equal_flops(size):
    costs, parameters = {}, {}
    for arch, presets in studies.SIZES.items():
        config = settings.ARCHITECTURES[arch].presets[presets[size]] | {"num_classes": 10}
        costs[arch] = measures.training_flops(arch, config, LATENT)
        parameters[arch] = sum(p.numel() for p in build_model(arch, config).parameters())
    assert abs(costs["unet"] / costs["dit"] - 1) < 0.02
    assert costs["dit"] == pytest.approx((34e6, 82e6, 223e6, 476e6)[size], rel=0.01)
    assert abs(parameters["unet"] / parameters["dit"] - 1) < 0.1


def test_the_grid_compares_two_networks_of_one_size():
    assert studies.NETWORKS == {"unet": ("--arch", "unet", "--preset", "size-2"),
                                "dit": ("--arch", "dit", "--preset", "size-2")}


def test_networks_for_the_corners_differ_in_attention_and_not_in_flops():
    costs, attentions = [], []
    for flags in studies.CORNER_NETWORKS.values():
        args = settings.parse([*flags, "--data", "corners", "--cond", "none"])
        config = settings.ARCHITECTURES[args.arch].presets[args.preset]
        costs.append(measures.training_flops(args.arch, config, LATENT))
        if args.arch == "unet":
            model = build_model(args.arch, config)
            attentions.append({part.norm.num_channels for part in model.modules()
                               if isinstance(part, unet.SpatialTransformer)})
    assert max(costs) / min(costs) < 1.02
    assert attentions == [set(), {72}, {20, 28, 56}]


def test_corners_are_scored_by_what_they_show(tmp_path):
    judge = measures.JUDGES["corners"](tmp_path)
    alike = [draw_corners(i) for i in range(6)]
    first, second = describe_corners(3).things, describe_corners(8).things
    recoloured = replace(first[1], colour="cyan")
    differing = [draw_scene(Scene((first[0], thing)), 0) for thing in (second[1], recoloured)]
    lacking = [draw_scene(Scene(first[:1]), 0), np.zeros((32, 32, 3), np.uint8)]
    assert judge.score(np.stack(alike + differing + lacking)) == {
        "agreement": 0.6, "whole": 0.8, "colour": 0.6, "kind": 0.7}


def test_prompted_networks_have_equal_flops_and_one_text_encoder():
    costs = []
    for cell in compare.STUDIES["prompts"].cells:
        args = settings.parse([*cell.train, *studies.PICTURES["scenes"].flags])
        assert settings.text_config(args) == {"encoder": "bytes", "config": asdict(TextConfig(
            width=128, depth=2, heads=2))}
        costs.append(compare.flops_per_example(cell))
    assert abs(costs[0] / costs[1] - 1) < 0.02
    captions = load_drawn("scenes", "train", (32, 32)).captions
    lengths = np.array([1 + len(caption.encode()) for caption in captions])
    batches = np.random.default_rng(0).choice(lengths, (500, 32)).max(1)
    assert measures.PROMPT == pytest.approx(batches.mean(), abs=0.7)


def test_scenes_are_scored_by_what_they_were_asked_to_show(tmp_path):
    judge = measures.JUDGES["shapes"](tmp_path)
    right = [draw_scene(judge.scene(i), 0) for i in range(8)]
    assert judge.score(np.stack(right)) == {"agreement": 1.0} | dict.fromkeys(studies.PROMPT_KINDS, 1.0)
    right[1] = right[0]                                  # one of the two of its kind shows another scene
    assert judge.score(np.stack(right)) == {
        "agreement": 7 / 8, "1 seen": 1.0, "1 unseen": 0.5, "2 seen": 1.0, "2 unseen": 1.0}
    assert judge.prompts(3)[2] == judge.scene(2).caption and len(judge.scene(2).things) == 2


def test_flops_are_those_of_a_dit_by_hand():
    """One block, counted as in benchmarks/speed.py: 24 N D^2 + 4 N^2 D + 12 D^2 forward, with the backward
    pass three times that, of which attention is a part."""
    width, tokens = 64, 16
    config = dict(width=width, heads=2, num_classes=10, **dit.PUBLISHED_BLOCK)
    one, two = (measures.training_flops("dit", config | {"depth": depth}, LATENT) for depth in (1, 2))
    assert two - one == 3 * (24 * tokens * width**2 + 4 * tokens**2 * width + 12 * width**2)


@pytest.mark.parametrize("arch, config", [("dit", dict(width=64, depth=2, heads=2, num_classes=10)),
                                          ("unet", unet.PRESETS["tiny"] | {"num_classes": 10})])
def test_flops_are_those_of_a_real_step(arch, config):
    model = build_model(arch, config)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *LATENT), torch.zeros(1), y=torch.zeros(1, dtype=torch.long)).sum().backward()
    assert measures.training_flops(arch, config, LATENT) == counter.get_total_flops()


# ---- common units

class Exact(torch.nn.Module):
    """The best prediction for data that is Gaussian with this standard deviation, on any path."""

    def __init__(self, path, std):
        super().__init__()
        self.path, self.std = path, std

    def forward(self, xt, t, y=None):
        alpha, sigma = (each[:, None, None, None] for each in self.path.alpha_sigma(t))
        x0 = xt * alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return self.path.target(x0, (xt - alpha * x0) / sigma, t)


PATHS = [DDPM(prediction=name) for name in ("eps", "v", "x0")]
PATHS += [RectifiedFlow(prediction=name) for name in ("velocity", "eps", "v", "x0")]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{type(path).__name__}-{path.prediction}")
def test_errors_do_not_depend_on_path_and_prediction(path):
    """For Gaussian data the smallest possible error in x0 is known at every u: the posterior's variance."""
    std = 0.7
    held_out = measures.Examples(std * torch.randn(600, *LATENT), torch.zeros(600, dtype=torch.long))
    found = measures.errors(measures.Trained(Exact(path, std), path, 0, "", LATENT), held_out)
    u = torch.linspace(measures.FIRST, measures.LAST, 10_001, dtype=torch.float64)
    variance = std**2 * u**2 / ((1 - u)**2 * std**2 + u**2)
    assert found["x0"] == pytest.approx(variance.mean().item(), rel=0.03)
    assert found["velocity"] == pytest.approx((variance / u**2).mean().item(), rel=0.03)
    expected = (variance / u**2)[:-1].reshape(4, -1).mean(1)
    np.testing.assert_allclose(found["velocity_by_time"], expected, rtol=0.06)


def test_errors_are_larger_for_a_worse_network():
    path = RectifiedFlow()
    held_out = measures.Examples(torch.randn(200, *LATENT), torch.zeros(200, dtype=torch.long))
    best, worse = (measures.errors(measures.Trained(Exact(path, std), path, 0, "", LATENT), held_out)
                   for std in (1.0, 1.4))
    assert worse["x0"] > best["x0"] and worse["velocity"] > best["velocity"]


class Constant(torch.nn.Module):
    """A velocity field that transports along parallel lines."""

    def forward(self, xt, t, y):
        return torch.full_like(xt, 0.3)


def test_straightness_is_zero_on_lines_and_positive_on_curves():
    straight = RectifiedFlow()
    held_out = measures.Examples(torch.zeros(10, *LATENT), torch.arange(10))
    assert measures.straightness(measures.Trained(Constant(), straight, 0, "", LATENT), held_out, 4) < 1e-10
    curved = [measures.straightness(measures.Trained(Exact(path, 0.5), path, 0, "", LATENT), held_out, 50,
                                    200)
              for path in PATHS if path.prediction in ("v", "velocity")]
    # Gaussian data flow along x = x1 s(u), s^2 = (1 - u)^2 std^2 + u^2: the chord is x1 (1 - std)
    u = np.linspace(1e-6, 1, 100_001)
    s = np.sqrt((1 - u)**2 * 0.25 + u**2)
    expected = ((np.gradient(s, u) - 0.5)**2).mean()
    # a path of diffusion ends a little before all is noise, so its trajectory is a little shorter
    for found, tolerance in zip(curved, (0.15, 0.03, 0.03)):
        assert found == pytest.approx(expected, rel=tolerance)


def test_curvature_is_that_of_the_flow_and_not_of_the_path():
    """The exact flow of Gaussian data has one curvature, by whatever path it is sampled."""
    held_out = measures.Examples(0.5 * torch.randn(50, *LATENT), torch.zeros(50, dtype=torch.long))
    first, *others = [
        measures.curvature(measures.Trained(Exact(path, 0.5), path, 0, "", LATENT), held_out, 50)
        for path in PATHS]
    assert first > 0.01 and others == pytest.approx([first] * len(others), rel=1e-3)
    lines = measures.Trained(Constant(), RectifiedFlow(), 0, "", LATENT)
    assert measures.curvature(lines, held_out, 4) < 1e-10


@pytest.mark.parametrize("sampler, steps, scale, count", [
    ("euler", 7, 1, 7), ("ddim", 50, 1.5, 100), ("heun", 10, 1, 19), ("heun", 10, 2, 38), ("heun", 1, 1, 1),
    ("dpmpp_2m", 8, 1, 8), ("unipc_3", 8, 0, 8), ("ddpm", 10, 1, 10)])
def test_evaluations_are_counted(sampler, steps, scale, count):
    assert measures.evaluations(sampler, steps, scale, DDPM()) == count


def test_solvers_at_one_number_of_evaluations_are_comparable():
    """What STUDIES calls 8 evaluations is at most 8 and at least 7, with every solver."""
    chosen = {each for cell in compare.STUDIES["steps"].cells for each in cell.evaluations}
    for evaluation in chosen:
        count = measures.evaluations(evaluation.sampler, evaluation.steps, evaluation.scale, DDPM())
        assert min(abs(count - aim) for aim in studies.COUNTS) <= 1
    assert {each.steps for each in chosen if each.sampler == "euler"} == set(studies.COUNTS)


def test_larger_pictures_are_judged_at_the_size_of_the_classifier(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 1), dtype=np.uint8)
    small = measures.area_scaled(images, 32)
    corner = images[1, 10:12, 20:22, 0].astype(float).mean()
    assert small.shape == (3, 32, 32, 1) and small[1, 5, 10, 0] == np.round(corner)
    assert (measures.area_scaled(small, 32) == small).all()
    with pytest.raises(ValueError, match="side 48: must be a multiple of 32"):
        measures.FashionMNIST(tmp_path, 48)
    with pytest.raises(ValueError, match="side 32: does not divide pictures of 48 x 64"):
        measures.area_scaled(images[:, :48], 32)


def test_gradient_norms_of_the_second_half():
    records = [{"step": step, "grad_norm": norm} for step, norm in
               ((10, 99.0), (20, 99.0), (50, 1.0), (60, 2.0), (70, 3.0), (80, 4.0), (90, 5.0))]
    records += [{"step": 90, "val_loss": 1.0}]
    assert measures.gradient_norms(records) == {"median": 3.0, "spread": pytest.approx(2 / 3), "max": 5.0}


# ---- the table

def test_cells_are_plain_commands_that_the_programs_accept(tmp_path):
    for name in compare.BUDGETS:
        comparison = compare.Comparison(name, tmp_path, tmp_path / "r.jsonl", "data", True)
        for study in compare.STUDIES.values():
            for cell in study.cells:
                vae, *trainings = comparison.commands(cell, 2)
                samples = [command for command in trainings if command[0] == "sample.py"]
                network = trainings[-1 - len(samples)]
                assert settings.parse(vae[1:]).arch == "vae"
                args = settings.parse(network[1:])
                assert args.seed == 2 and args.vae.endswith(settings.parse(vae[1:]).name)
                assert len(samples) == len(cell.evaluations)
                assert samples or cell.batches or cell.curvature
                comparison.run_folder(cell, 2).mkdir(exist_ok=True)
                for command in samples:
                    sample_settings.check_flags(sample_settings.parse_args(command[1:]))


def test_a_budget_takes_the_ends_of_what_is_too_much():
    assert studies.ends((1, 2, 3, 4, 5), 2) == [1, 5] and studies.ends((1, 2, 3, 4, 5), 3) == [1, 3, 5]
    assert studies.ends((1, 2), 3) == [1, 2] == studies.ends((1, 2), None) and studies.ends((7, 8), 1) == [7]
    small = compare.BUDGETS["cpu"]._replace(most_cells=2, most_evaluations=2)
    few = small.cells(compare.STUDIES["grid"])
    assert [cell.name for cell in few] == ["unet ddpm eps", "dit rf logit-normal"]
    assert [[each.label for each in cell.evaluations] for cell in few] == [
        ["ddim 50, guidance 1", "ddim 50, guidance 1.5"], ["heun 10, guidance 1", "euler 50, guidance 1"]]
    assert compare.BUDGETS["cpu"].cells(compare.STUDIES["steps"]) == list(compare.STUDIES["steps"].cells)


def test_the_shift_study_shifts_training_and_sampling_apart(tmp_path):
    comparison = compare.Comparison("cpu", tmp_path, tmp_path / "r.jsonl", "data", True)
    found = set()
    for cell in compare.STUDIES["shift"].cells:
        for command in comparison.commands(cell, 0)[2:]:
            trained = settings.parse(comparison.train_command(cell, 0)[1:]).shift or 1.0
            sampled = sample_settings.parse_args(command[1:]).shift or trained
            found.add((studies.PICTURES[cell.data].side, trained, sampled,
                       sample_settings.parse_args(command[1:]).steps))
    both = {(shift, shift) for shift in studies.SHIFTS}
    apart = {pair for shift in studies.SHIFTS for pair in ((shift, 1.0), (1.0, shift))}
    assert found == {(side, *pair, steps) for side in (32, 64) for pair in both | apart for steps in (10, 25)}
    vae, network, *_ = comparison.commands(compare.STUDIES["shift"].cells[-1], 0)
    assert settings.parse(vae[1:]).image_size == settings.parse(network[1:]).image_size == [64, 64]


def test_the_grid_is_complete_and_names_are_unique():
    grid = compare.STUDIES["grid"].cells
    assert len(grid) == 10 and len({cell.train for cell in grid}) == 10
    cells = [cell for study in compare.STUDIES.values() for cell in study.cells]
    assert len({(cell.study, cell.name) for cell in cells}) == len(cells)
    by_run = {}
    for cell in cells:                    # one name of a run, one training
        assert by_run.setdefault(cell.run, cell.train) == cell.train
        labels = [evaluation.label for evaluation in cell.evaluations]
        assert len(set(labels)) == len(labels)


# ---- cells, at tiny size

TINY = studies.Budget("tiny", vae=("--steps", "3"), train=("--batch-size", "8"), steps=8, n=20, seeds=(0,),
                      straight=4)
CELLS = {
    "grid": studies.Study("", (
        compare.Cell("grid", "dit", "dit", ("--arch", "dit", "--preset", "tiny"),
                     (compare.Evaluation("heun", 2), compare.Evaluation("heun", 2, 1.5))),
        compare.Cell("grid", "unet", "unet", ("--arch", "unet", "--preset", "tiny", "--objective", "ddpm"),
                     (compare.Evaluation("ddim", 2),)))),
    "steps": studies.Study("", (
        compare.Cell("steps", "dit", "dit", ("--arch", "dit", "--preset", "tiny"),
                     (compare.Evaluation("euler", 3), compare.Evaluation("heun", 2))),)),
    "curvature": studies.Study("", (
        compare.Cell("curvature", "dit", "dit", ("--arch", "dit", "--preset", "tiny"), (), curvature=True),)),
}
TINY_REFLOW = ("--arch", "dit", "--preset", "tiny", "--reflow", compare.PARENT, "--reflow-pairs", "16",
               "--reflow-steps", "2")
CHILDREN = {
    "few": studies.Study("", (
        compare.Cell("few", "meanflow", "meanflow", ("--arch", "dit", "--preset", "tiny", "--objective",
                     "meanflow", "--init-from", compare.PARENT), (compare.Evaluation("jump", 1),),
                     parent="dit", part=0.5),
        compare.Cell("few", "twice", "twice", TINY_REFLOW, (compare.Evaluation("euler", 2),),
                     parent="reflow", part=0.5),
        compare.Cell("few", "reflow", "reflow", TINY_REFLOW, (compare.Evaluation("euler", 2),), parent="dit"),
        CELLS["grid"].cells[0]._replace(batches=(1, 3)))),
}


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Tiny pictures, networks and an untrained classifier; programs run in this process. Returns the list of
    commands that were run."""
    few_samples(monkeypatch)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 80)):
        write_idx(tmp_path / f"data/fashion-mnist/{part}-images-idx3-ubyte",
                  rng.integers(0, 256, (count, 28, 28)))
        write_idx(tmp_path / f"data/fashion-mnist/{part}-labels-idx1-ubyte", np.arange(count) % 10)
    monkeypatch.setitem(compare.BUDGETS, "minutes", TINY)
    monkeypatch.setattr(compare, "STUDIES", CELLS)
    monkeypatch.setattr(compare, "CHECKPOINTS", 2)
    monkeypatch.setattr(compare, "VAE_FLAGS", ("--vae-preset", "tiny", "--batch-size", "4"))
    monkeypatch.setattr(fashion_mnist, "FILE", tmp_path / "classifier.pt")
    torch.save(fashion_mnist.Classifier().state_dict(), tmp_path / "classifier.pt")
    commands = []

    def call(command, log):
        commands.append(command)
        log.write_text("")
        status = {"train.py": train.main, "sample.py": sample.main}[command[0]](command[1:])
        if status:
            raise compare.Stopped(f"exit status {status}")
        return compare.Spent(12.0, 34.0)

    monkeypatch.setattr(compare, "call", call)
    return commands


def test_estimates_follow_from_the_flops(tmp_path):
    """A training's FLOPs and those of its samples, by hand; a run that two cells share is trained once."""
    comparison = compare.Comparison("cpu", tmp_path, tmp_path / "r.jsonl", "data", True)
    cell = next(cell for cell in compare.STUDIES["grid"].cells if cell.name == "dit rf logit-normal")
    flops = measures.training_flops("dit", dit.PRESETS["size-2"] | {"num_classes": 10}, LATENT)
    training = 2400 * 64 * flops / 6e10 / 60
    drawing = 2000 * (19 + 38 + 50) * flops / 3 / 6e10 / 60
    assert comparison.minutes(cell, set()) == pytest.approx(training + drawing, rel=0.01)
    assert comparison.minutes(cell, {cell.run}) == pytest.approx(drawing, rel=0.01)
    wide = next(cell for cell in compare.STUDIES["shift"].cells if cell.name == "64 px, trained with 2")
    narrow = next(cell for cell in compare.STUDIES["shift"].cells if cell.name == "32 px, trained with 2")
    assert 3.9 < comparison.minutes(wide, set()) / comparison.minutes(narrow, set()) < 5
    unknown = compare.Comparison("gpu", tmp_path, tmp_path / "r.jsonl", "data", True)
    assert unknown.minutes(cell, set()) is None


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """Programs that only leave the files that the real ones leave: for the order of things, not for figures.
    Returns the list of commands that were run, and a place for a function that is called before each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(compare.BUDGETS, "minutes", TINY)
    # without what needs networks
    monkeypatch.setattr(compare, "STUDIES", {name: CELLS[name] for name in ("grid", "steps")})
    monkeypatch.setattr(fashion_mnist, "classifier_in_use", lambda: "one classifier")
    monkeypatch.setitem(measures.JUDGES, "fashion-mnist", lambda *more: SimpleNamespace(
        fingerprint=fashion_mnist.classifier_in_use(),
        score=lambda images: {"frechet": 1.0, "agreement": 0.5},
        floor=lambda *more: [{"label": "a", "n": 20, "frechet": 0.1}]))
    monkeypatch.setattr(measures, "examples", lambda *more, **named: None)
    monkeypatch.setattr(measures, "load_vae", lambda folder: torch.nn.Identity())
    monkeypatch.setattr(compare.Comparison, "figures", lambda *more: {"steps": 8})
    programs = SimpleNamespace(commands=[], before=lambda command: None)

    def call(command, log):
        programs.before(command)
        programs.commands.append(command)
        flags = dict(zip(command, command[1:]))
        if command[0] == "train.py":
            leave_checkpoint(flags, int(flags["--steps"]))
        else:
            np.savez(flags["--out"], arr_0=np.zeros((20, 32, 32, 1), np.uint8))
        return compare.Spent(12.0, 34.0)

    monkeypatch.setattr(compare, "call", call)
    return programs


def leave_checkpoint(flags, step):
    run = compare.Path(flags["--runs-dir"]) / flags["--name"]
    run.mkdir(parents=True, exist_ok=True)
    torch.save({"step": step, "training": {"finished": step == int(flags["--steps"])}}, run / "checkpoint.pt")


FLAGS = ["--budget", "minutes", "--results", "results/r.jsonl", "--runs-dir", "runs"]


def lines(path="results/r.jsonl"):
    return [json.loads(line) for line in open(path)]


NUMBERS = {"val_loss", "straightness", "flops_per_example", "parameters", "steps", "processor_seconds",
           "wall_seconds", "measured_steps"}


@pytest.mark.long
def test_every_cell_is_measured_once(tiny, capsys):
    assert compare.main(FLAGS) == 0
    found = {(r["study"], r["cell"]): r for r in lines()}
    assert set(found) == {("floor", "fashion-mnist"), ("grid", "dit"), ("grid", "unet"), ("steps", "dit"),
                          ("curvature", "dit")}
    assert len(lines()) == 5
    assert [study for (study, _), record in found.items() if record.get("curvature", 0) > 0] == ["curvature"]
    # the run of three studies is trained once, and an evaluation that both ask for is drawn once
    assert [command[0] for command in tiny].count("train.py") == 3
    assert [command[0] for command in tiny].count("sample.py") == 4
    for (study, _), record in found.items():
        assert {"device", "date", "versions", "commit", "commands", "budget", "seed"} <= set(record)
        if study == "floor":
            assert [row["n"] for row in record["evaluations"]] == [40, 20, 80, 20]
            continue
        assert all(isinstance(record[name], (int, float)) for name in NUMBERS)
        assert [each["step"] for each in record["errors"]] == [4, 8]
        assert record["val_curve"][-1] == [8, record["val_loss"]] and record["grad_norm"]["median"] > 0
        assert record["processor_seconds"] == 12 and record["measured_steps"] == 8
        assert all(0 <= row["agreement"] <= 1 and row["frechet"] >= 0 and row["n"] == 20
                   for row in record["evaluations"])
    assert [row["nfe"] for row in found["grid", "dit"]["evaluations"]] == [3, 6]
    assert found["steps", "dit"]["evaluations"][1] == found["grid", "dit"]["evaluations"][0]
    assert found["grid", "dit"]["commands"] == [" ".join(["python", *command]) for command in tiny[:4]]
    assert not [*compare.Path("runs").rglob("*.npz"), *compare.Path("runs").glob("*/checkpoint-*.pt")]

    before = open("results/r.jsonl").read()
    tiny.clear()
    assert compare.main(FLAGS) == 0 and not tiny and open("results/r.jsonl").read() == before
    capsys.readouterr()
    assert compare.main([*FLAGS, "--list", "--seeds", "0", "1"]) == 0
    printed = capsys.readouterr().out
    assert "grid: dit, seed 0: done" in printed and "steps: dit, seed 1: not done\n" in printed
    assert "    python sample.py runs/dit-1 --sampler euler --steps 3" in printed


@pytest.mark.long
def test_samples_of_the_grid_side_by_side(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "results")
    with pytest.raises(ValueError, match="--pictures: runs has no run of the grid"):
        compare.main([*FLAGS, "--pictures"])
    assert compare.main([*FLAGS, "--only", "grid"]) == 0
    before = open("results/r.jsonl").read()
    tiny.clear()
    assert compare.main([*FLAGS, "--pictures"]) == 0 and open("results/r.jsonl").read() == before
    picture = np.asarray(Image.open(tmp_path / "pictures/grid-samples.png"))
    assert [command[0] for command in tiny] == ["sample.py"] * 3
    # Two rows below the heads; the first sample of the second row is that of sample.py, behind the name,
    # twice the size. The two groups are 30 pixels apart.
    row, top = 68, 50
    assert picture.shape[0] == top + 2 * row and (picture.shape[1] - 20 * row - 30) < 200
    sample.main([*tiny[2][1:-1], "again.npz"])
    first = np.load("again.npz")["arr_0"][0, :, :, 0]
    left = picture.shape[1] - 20 * row - 30
    np.testing.assert_array_equal(picture[top + row:top + row + 64:2, left:left + 64:2, 0], first)
    assert (picture[top:, left + 10 * row:left + 10 * row + 26] == 255).all()
    # And those without guidance of the objectives that the families are known by, four times the size.
    assert not (tmp_path / "pictures/samples.png").exists()
    monkeypatch.setattr(compare, "CLASSIC", ("",))                         # here, cells name no objective
    assert compare.main([*FLAGS, "--pictures"]) == 0
    large = np.asarray(Image.open(tmp_path / "pictures/samples.png"))
    assert large.shape[0] == top + 2 * 132
    begin = large.shape[1] - 10 * 132
    np.testing.assert_array_equal(large[top:top + 128:4, begin:begin + 128:4],
                                  picture[top:top + 64:2, left:left + 64:2])


@pytest.mark.long
def test_what_begins_from_another_run_has_it_trained_first(tiny, monkeypatch):
    timed, speed = [], compare.measures.speed
    monkeypatch.setattr(compare, "STUDIES", CHILDREN)
    monkeypatch.setattr(compare.measures, "speed", lambda *inputs: timed.append(1) or speed(*inputs))
    monkeypatch.setattr(compare, "device_name", lambda: "times" if timed else "trains")
    assert compare.main([*FLAGS, "--only", "few"]) == 0
    trained = [command[command.index("--name") + 1] for command in tiny if command[0] == "train.py"]
    assert trained == ["fashion-mnist-vae", "dit-0", "meanflow-0", "reflow-0", "twice-0"]
    found = {r["cell"]: r for r in lines() if r["study"] != "floor"}
    assert [found[name]["steps"] for name in ("meanflow", "twice", "reflow", "dit")] == [4, 4, 8, 8]
    assert len(found["twice"]["commands"]) == 5          # the VAE, three trainings and the samples
    assert found["twice"]["commands"][3].count("--reflow runs/reflow-0 ") == 1
    assert found["meanflow"]["evaluations"][0]["nfe"] == 1
    assert [row["batch"] for row in found["dit"]["speed"]] == [1, 3]
    assert all(row["seconds"] > 0 for row in found["dit"]["speed"]) and "speed" not in found["reflow"]
    # scores belong to the machine of the training, times to that which took them
    assert [found[name]["device"] for name in ("meanflow", "dit")] == ["trains", "times"]


@pytest.mark.long
def test_pictures_of_prompts_are_drawn_and_scored(tiny, monkeypatch):
    cell = compare.Cell("said", "mmdit", "mmdit", ("--arch", "mmdit", "--preset", "tiny"),
                        (compare.Evaluation("heun", 2, 3.0),), "scenes")
    monkeypatch.setattr(compare, "STUDIES", {"said": studies.Study("", (cell,))})
    assert compare.main([*FLAGS, "--only", "said"]) == 0
    floor, record = lines()
    assert "--prompts runs/scenes.txt" in record["commands"][-1]
    assert len(compare.Path("runs/scenes.txt").read_text().splitlines()) == 20
    for row in (floor["evaluations"][0], record["evaluations"][0]):
        assert {"agreement", "n", *studies.PROMPT_KINDS} <= set(row) and 0 <= row["agreement"] <= 1
    assert [each["step"] for each in record["errors"]] == [4, 8] and record["straightness"] > 0


def test_records_name_their_vae_and_each_vae_has_its_floor(stub, monkeypatch):
    """A later seed can be measured on another machine, whose VAE has other weights."""
    assert compare.main([*FLAGS, "--only", "grid"]) == 0
    floor, *cells = lines()
    assert (floor["study"], floor["seed"]) == ("floor", 0)
    assert cells and {record["vae"] for record in cells} == {floor["vae"]}
    other = torch.nn.Linear(1, 1)
    monkeypatch.setattr(measures, "load_vae", lambda folder: other)
    elsewhere = [*FLAGS[:-1], "elsewhere", "--only", "grid", "--seeds", "1"]
    assert compare.main(elsewhere) == 0
    second, *more = lines()[len(cells) + 1:]
    assert (second["study"], second["seed"]) == ("floor", 1) and second["vae"] != floor["vae"]
    assert len(more) == len(cells) and {record["vae"] for record in more} == {second["vae"]}
    # What is known from before, by the first VAE, stays known as that; neither floor is measured again.
    assert compare.main([*elsewhere, "--seeds", "0"]) == 0
    compare.Path("results/r.jsonl").write_text("".join(
        json.dumps(record) + "\n" for record in lines() if record != cells[0]))
    monkeypatch.setattr(compare.Comparison, "measured_before", lambda *more: {
        name: cells[0][name] for name in cells[0] if name not in compare.OF_A_CELL} | {"evaluations": []})
    assert compare.main([*elsewhere, "--seeds", "0"]) == 0
    assert lines()[-1]["cell"] == cells[0]["cell"] and lines()[-1]["vae"] == floor["vae"]
    assert len(lines()) == 2 + len(cells) + len(more)


def test_nothing_begins_from_a_run_that_diverged(stub, monkeypatch, capsys):
    def diverging(command):
        if command[0] == "train.py" and "dit-0" in command:
            raise failure("loss nan with gradient norm inf", "at step 5, times 0.010 to 0.990")

    monkeypatch.setattr(compare, "STUDIES", CHILDREN)
    stub.before = diverging
    assert compare.main([*FLAGS, "--only", "few"]) == 1
    assert "dit-0: diverged, so meanflow cannot begin from it" in capsys.readouterr().err


def test_a_killed_cell_goes_on(stub):
    """Each process finishes one command and is killed at the next."""
    def one_only(command):
        if len(stub.commands) > before:
            raise compare.Stopped("killed")

    stub.before = one_only
    for processes in range(1, 20):
        before = len(stub.commands)
        if compare.main([*FLAGS, "--only", "grid"]) == 0:
            break
    # one VAE, two networks and three evaluations, all done once
    kinds = [command[0] for command in stub.commands]
    assert kinds.count("train.py") == 3 and kinds.count("sample.py") == 3 and processes == 6
    whole = lines()
    assert [(r["study"], r["cell"]) for r in whole] == [("floor", "fashion-mnist"), ("grid", "dit"),
                                                      ("grid", "unet")]
    assert all(r["processor_seconds"] == 12 for r in whole[1:])


def test_a_vae_that_was_interrupted_is_trained_to_its_end(stub):
    """Also where its scores are known already, as they are in the results that are shipped."""
    assert compare.main([*FLAGS, "--only", "grid"]) == 0
    vae = dict(zip(stub.commands[0], stub.commands[0][1:]))
    shutil.rmtree("runs")
    leave_checkpoint(vae, int(vae["--steps"]) // 2)
    known = open("results/r.jsonl").read().splitlines(keepends=True)
    open("results/r.jsonl", "w").writelines(known[:2])                             # without the second cell
    stub.commands.clear()
    assert compare.main([*FLAGS, "--only", "grid"]) == 0
    trained = [command[command.index("--name") + 1] for command in stub.commands if command[0] == "train.py"]
    assert trained == ["fashion-mnist-vae", "unet-0"] and [r["cell"] for r in lines()].count("unet") == 1


def test_what_a_killed_process_spent_is_estimated_from_the_rest(stub):
    def killed_midway(command):
        if command[0] == "train.py" and "dit" in command:
            leave_checkpoint(dict(zip(command, command[1:])), 4)
            raise compare.Stopped("killed")

    stub.before = killed_midway
    assert compare.main([*FLAGS, "--only", "grid"]) == 1
    stub.before = lambda command: None
    assert compare.main([*FLAGS, "--only", "grid"]) == 0
    record = next(r for r in lines() if r["cell"] == "dit")
    assert record["measured_steps"] == 4 and record["processor_seconds"] == 12 * 8 / 4


def test_two_processes_side_by_side(stub, capsys):
    """A cell that another process holds is left to it, and one that it has just finished is not repeated."""
    with locked(compare.Path("runs/dit-0.lock")):
        assert compare.main(FLAGS) == 0
    assert "2 cells were held by another process" in capsys.readouterr().out
    assert {r["cell"] for r in lines()} == {"fashion-mnist", "unet"}
    assert compare.main(FLAGS) == 0 and len(lines()) == 4


def test_a_device_says_whether_it_is_a_cpu_and_multiplies_bf16(monkeypatch):
    """Minutes with and without bf16 cannot be compared."""
    names = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for has_bf16 in (True, False):
        monkeypatch.setattr(compare, "has_bf16", lambda device: has_bf16)
        names[has_bf16] = compare.device_name()
        assert compare.on_cpu({"device": names[has_bf16]})
    processor, _, threads = names[True].rpartition(", ")
    assert names[False] == f"{processor} without bf16, {threads}"


def test_lines_of_several_processes_do_not_mix_and_none_is_double(tmp_path):
    results = compare.Results(tmp_path / "r.jsonl")

    def write(worker):
        for seed in range(20):
            results.append({"study": "grid", "cell": "a", "seed": seed, "long": "x" * 10_000})

    workers = [threading.Thread(target=write, args=(worker,)) for worker in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(r["seed"] for r in results.read()) == list(range(20))
    assert len(open(results.path).readlines()) == 20


def test_a_partial_line_costs_only_its_own_cell(tmp_path):
    results = compare.Results(tmp_path / "r.jsonl")
    results.append({"study": "grid", "cell": "a", "seed": 0})
    whole = results.path.read_bytes()
    results.path.write_bytes(whole + whole[:15])
    assert results.has("grid", "a", 0) and len(results.read()) == 1
    results.append({"study": "grid", "cell": "b", "seed": 0})
    assert [r["cell"] for r in results.read()] == ["a", "b"]
    with pytest.raises(ValueError):
        results.append({"study": "grid", "cell": "c", "seed": 0, "val_loss": float("nan")})


def test_weights_that_were_dropped_are_trained_again(stub):
    assert compare.main([*FLAGS, "--only", "grid", "--drop-runs"]) == 0
    assert not [*compare.Path("runs").glob("dit-0/checkpoint*.pt")]
    assert compare.main(FLAGS) == 0
    assert len(lines()) == 4
    assert [command[command.index("--name") + 1] for command in stub.commands
            if command[0] == "train.py"] == ["fashion-mnist-vae", "dit-0", "unet-0", "dit-0"]


def test_what_another_study_has_measured_is_taken_from_its_line(stub, monkeypatch):
    grid = CELLS["grid"].cells[0]
    one = grid._replace(study="more", name="one", evaluations=grid.evaluations[1:])
    studied = {"grid": CELLS["grid"], "more": studies.Study("", (
        one, one._replace(name="other samples", evaluations=(compare.Evaluation("euler", 2),)),
        one._replace(name="other training", run="b", train=(*one.train, "--warmup", "2"))))}
    monkeypatch.setattr(compare, "STUDIES", studied)
    assert compare.main([*FLAGS, "--only", "grid", "--drop-runs"]) == 0
    stub.commands.clear()
    text = compare.Path("results/r.jsonl").read_text()     # of a time when fewer checkpoints were kept
    assert text.count("--keep 16") == 2
    compare.Path("results/r.jsonl").write_text(text.replace("--keep 16", "--keep 8"))
    monkeypatch.setattr(compare, "device_name", lambda: "another")
    assert compare.main([*FLAGS, "--only", "more"]) == 0
    found = {(r["study"], r["cell"]): r for r in lines()}
    parent, taken = found["grid", "dit"], found["more", "one"]
    assert taken["evaluations"] == parent["evaluations"][1:] and taken["device"] == parent["device"]
    assert len(taken["commands"]) == 3 and taken["steps"] == 8
    # the others are trained, as their samples are missing, or their training is another
    assert [command[command.index("--name") + 1] for command in stub.commands
            if command[0] == "train.py"] == ["dit-0", "b-0"]
    assert all(found["more", f"other {what}"]["device"] == "another" for what in ("samples", "training"))


def test_scores_by_another_classifier_are_measured_again(stub, monkeypatch):
    """From the runs that are there; the lines by the other one stay, and are ignored."""
    assert compare.main([*FLAGS, "--only", "grid"]) == 0
    before, trained = lines(), [command for command in stub.commands if command[0] == "train.py"]
    assert {record["judge"] for record in before} == {"one classifier"}
    monkeypatch.setattr(fashion_mnist, "classifier_in_use", lambda: "another")
    assert compare.Results(compare.Path("results/r.jsonl")).read() == []
    stub.commands.clear()
    assert compare.main([*FLAGS, "--only", "grid"]) == 0
    drawn = [command for command in stub.commands if command[0] == "sample.py"]
    assert len(drawn) == 3 and not [c for c in stub.commands if c in trained and "vae" not in c]
    assert lines()[:3] == before and {record["judge"] for record in lines()[3:]} == {"another"}
    assert [r["cell"] for r in lines()] == 2 * ["fashion-mnist", "dit", "unet"]
    assert compare.Results(compare.Path("results/r.jsonl")).read() == lines()[3:]


def test_the_results_are_by_the_classifier_that_is_shipped():
    """Most of them: what is not is to be measured again. Corners and scenes are read without one."""
    used = fashion_mnist.classifier_in_use()
    records = [r for r in lines(compare.RESULTS / "compare-cpu.jsonl") if r["study"] != "speed"]
    data = {(cell.study, cell.name): cell.data for study in compare.STUDIES.values() for cell in study.cells}
    ours = [r for r in records if data.get((r["study"], r["cell"]), r["cell"]).startswith("fashion-mnist")]
    assert all("judge" in r for r in ours) and not any("judge" in r for r in records if r not in ours)
    assert sum(r["judge"] == used for r in ours) > len(ours) / 2


@pytest.mark.parametrize("flags, words", [(["--only", "speed"], "--only speed: must be one of grid, steps")])
def test_bad_flags_are_refused_in_one_line(stub, flags, words):
    with pytest.raises(ValueError, match=words):
        compare.main([*FLAGS, *flags])
    assert not compare.Path("results").exists() and not stub.commands


def failure(what, where):
    """What compare.call raises where train.py ends by this failure."""
    run = SimpleNamespace(load=lambda: None, checkpoint="runs/a/checkpoint.pt")
    error = train.diverged(what, where, SimpleNamespace(run=run, bf16=True, number_format="bf16"))
    return compare.Stopped(f"python train.py: exit status 2; train.py: {error}")


def test_a_training_that_diverges_is_a_result(stub):
    """Its step is kept, nothing is drawn from it, and no process tries it again; the next cell goes on."""
    def diverging(command):
        if command[0] == "train.py" and "dit" in command:
            stub.commands.append(command)
            raise failure("loss nan with gradient norm inf", "at step 5, times 0.010 to 0.990")

    stub.before = diverging
    assert compare.main(FLAGS) == 0
    found = {(r["study"], r["cell"]): r for r in lines()}
    for study in ("grid", "steps"):                    # of one run
        assert found[study, "dit"]["diverged"] == 5 and "evaluations" not in found[study, "dit"]
        assert {"device", "date", "commit", "commands", "seed"} <= set(found[study, "dit"])
    assert found["grid", "unet"]["steps"] == 8
    assert sum("dit" in command for command in stub.commands) == 1
    stub.commands.clear()
    assert compare.main(FLAGS) == 0 and not stub.commands


def test_only_divergence_is_a_result():
    assert compare.diverged_at(failure("loss nan with gradient norm 2", "at step 1234, times 0 to 1")) == 1234
    assert compare.diverged_at(failure("weights that are not finite", "after step 7")) == 7
    assert compare.diverged_at(compare.Stopped("exit status 2; train.py: --lr 0: must be at step 7")) is None


def test_programs_are_run_and_their_failure_is_one_line(tmp_path):
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text("import sys\nprint(sum(range(3_000_000)), *sys.argv[1:])\n")
    bad.write_text("import sys\nprint('much')\nsys.exit('bad.py: --steps 0: must be at least 1')\n")
    spent = compare.call([str(good), "--lr"], tmp_path / "log")
    assert spent.processor > 0 and spent.wall > 0
    assert (tmp_path / "log").read_text() == "4499998500000 --lr\n"
    with pytest.raises(compare.Stopped) as refusal:
        compare.call([str(bad), "--steps", "0"], tmp_path / "log")
    assert str(refusal.value).endswith("--steps 0: exit status 1; bad.py: --steps 0: must be at least 1")
    assert "\n" not in str(refusal.value)
