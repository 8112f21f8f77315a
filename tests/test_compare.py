"""benchmarks/compare.py: equal FLOPs, common units against closed forms, and cells that are measured once."""

import json
import threading

import numpy as np
import pytest
import torch
from benchmarks import compare, fashion_mnist, measures
from conftest import few_samples, write_idx
from torch.utils.flop_counter import FlopCounterMode

import dit
import sample
import settings
import train
import unet
from ddpm import DDPM
from files import locked
from rectified_flow import RectifiedFlow
from run import build_model

LATENT = (4, 8, 8)


# ---- equal costs

def test_the_two_networks_have_equal_training_flops():
    costs, sizes = {}, {}
    for arch, preset in (("unet", unet.PRESETS["matched"]), ("dit", dit.PRESETS["small"])):
        config = preset | {"num_classes": 10}
        costs[arch] = measures.training_flops(arch, config, LATENT)
        sizes[arch] = sum(p.numel() for p in build_model(arch, config).parameters())
    assert compare.NETWORKS == {"unet": ("--arch", "unet", "--preset", "matched"),
                                "dit": ("--arch", "dit", "--preset", "small")}
    assert abs(costs["unet"] / costs["dit"] - 1) < 0.02
    assert abs(sizes["unet"] / sizes["dit"] - 1) < 0.06


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
    found = measures.errors(measures.Trained(Exact(path, std), path, 0, 0, 0), held_out)
    u = torch.linspace(measures.FIRST, measures.LAST, 10_001, dtype=torch.float64)
    variance = std**2 * u**2 / ((1 - u)**2 * std**2 + u**2)
    assert found["x0"] == pytest.approx(variance.mean().item(), rel=0.03)
    assert found["velocity"] == pytest.approx((variance / u**2).mean().item(), rel=0.03)
    expected = (variance / u**2)[:-1].reshape(4, -1).mean(1)
    np.testing.assert_allclose(found["velocity_by_time"], expected, rtol=0.06)


def test_errors_are_larger_for_a_worse_network():
    path = RectifiedFlow()
    held_out = measures.Examples(torch.randn(200, *LATENT), torch.zeros(200, dtype=torch.long))
    best, worse = (measures.errors(measures.Trained(Exact(path, std), path, 0, 0, 0), held_out)
                   for std in (1.0, 1.4))
    assert worse["x0"] > best["x0"] and worse["velocity"] > best["velocity"]


class Constant(torch.nn.Module):
    """A velocity field that transports along parallel lines."""

    def forward(self, xt, t, y):
        return torch.full_like(xt, 0.3)


def test_straightness_is_zero_on_lines_and_positive_on_curves():
    straight = RectifiedFlow()
    assert measures.straightness(measures.Trained(Constant(), straight, 0, 0, 0), LATENT, 10, 4) < 1e-10
    curved = [measures.straightness(measures.Trained(Exact(path, 0.5), path, 0, 0, 0), LATENT, 10, 50, 200)
              for path in PATHS if path.prediction in ("v", "velocity")]
    # Gaussian data flow along x = x1 s(u), s^2 = (1 - u)^2 std^2 + u^2: the chord is x1 (1 - std)
    u = np.linspace(1e-6, 1, 100_001)
    s = np.sqrt((1 - u)**2 * 0.25 + u**2)
    expected = ((np.gradient(s, u) - 0.5)**2).mean()
    # a path of diffusion ends a little before all is noise, so its trajectory is a little shorter
    for found, tolerance in zip(curved, (0.15, 0.03, 0.03)):
        assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("sampler, steps, scale, count", [
    ("euler", 7, 1, 7), ("ddim", 50, 1.5, 100), ("heun", 10, 1, 19), ("heun", 10, 2, 38), ("heun", 1, 1, 1),
    ("dpmpp_2m", 8, 1, 8), ("unipc_3", 8, 0, 8), ("ddpm", 10, 1, 10)])
def test_evaluations_are_counted(sampler, steps, scale, count):
    assert measures.evaluations(sampler, steps, scale, DDPM()) == count


def test_solvers_at_one_number_of_evaluations_are_comparable():
    """What STUDIES calls 8 evaluations is at most 8 and at least 7, with every solver."""
    cells = compare.STUDIES["steps"].cells
    for cell in cells:
        for evaluation in cell.evaluations:
            count = measures.evaluations(evaluation.sampler, evaluation.steps, evaluation.scale, DDPM())
            assert min(abs(count - aim) for aim in (1, 2, 4, 8, 10, 20, 50)) <= 1


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
                vae, network, *samples = comparison.commands(cell, 2)
                assert settings.parse(vae[1:]).arch == "vae"
                args = settings.parse(network[1:])
                assert args.seed == 2 and args.vae.endswith(settings.parse(vae[1:]).name)
                assert len(samples) == len(cell.evaluations) > 0
                comparison.run_folder(cell, 2).mkdir(exist_ok=True)
                for command in samples:
                    sample.check_flags(sample.parse_args(command[1:]))


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

TINY = compare.Budget("tiny", vae=("--steps", "3"), train=("--batch-size", "8"), steps=8, n=20, seeds=(0,),
                      straight=4)
CELLS = {
    "grid": compare.Study("", (
        compare.Cell("grid", "dit", "dit", ("--arch", "dit", "--preset", "tiny"),
                     (compare.Evaluation("heun", 2), compare.Evaluation("heun", 2, 1.5))),
        compare.Cell("grid", "unet", "unet", ("--arch", "unet", "--preset", "tiny", "--objective", "ddpm"),
                     (compare.Evaluation("ddim", 2),)))),
    "steps": compare.Study("", (
        compare.Cell("steps", "dit", "dit", ("--arch", "dit", "--preset", "tiny"),
                     (compare.Evaluation("euler", 3), compare.Evaluation("heun", 2))),)),
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


FLAGS = ["--budget", "minutes", "--results", "results/r.jsonl", "--runs-dir", "runs"]


def lines(path="results/r.jsonl"):
    return [json.loads(line) for line in open(path)]


NUMBERS = {"val_loss", "straightness", "flops_per_example", "parameters", "steps", "processor_seconds",
           "wall_seconds", "measured_steps"}


def test_every_cell_is_measured_once(tiny, capsys):
    assert compare.main(FLAGS) == 0
    found = {(r["study"], r["cell"]): r for r in lines()}
    assert set(found) == {("floor", "fashion-mnist"), ("grid", "dit"), ("grid", "unet"), ("steps", "dit")}
    assert len(lines()) == 4
    # the run of two studies is trained once, and an evaluation that both ask for is drawn once
    assert [command[0] for command in tiny].count("train.py") == 3
    assert [command[0] for command in tiny].count("sample.py") == 4
    for (study, _), record in found.items():
        assert {"device", "date", "versions", "commit", "commands", "budget", "seed"} <= set(record)
        if study == "floor":
            assert [row["n"] for row in record["evaluations"]] == [40, 20, 80, 20]
            continue
        assert all(isinstance(record[name], (int, float)) for name in NUMBERS)
        assert [each["step"] for each in record["errors"]] == list(range(1, 9))
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
    assert "grid: dit, seed 0: done" in printed and "steps: dit, seed 1: not done" in printed
    assert "    python sample.py runs/dit-1 --sampler euler --steps 3" in printed


def test_a_killed_cell_goes_on(tiny, monkeypatch):
    """After every single command, another process begins: each finishes one command more."""
    real, expected = compare.call, 0

    def one_only(command, log):
        if command in allowed or len(allowed) < budget:
            allowed.append(command)
            return real(command, log)
        raise compare.Stopped("killed")

    monkeypatch.setattr(compare, "call", one_only)
    for budget in range(1, 20):
        allowed = []
        expected += 1
        if compare.main([*FLAGS, "--only", "grid"]) == 0:
            break
    # one VAE, two networks and three evaluations, all drawn once, although six processes were killed
    assert [command[0] for command in tiny].count("sample.py") == 3
    whole = lines()
    assert [(r["study"], r["cell"]) for r in whole] == [("floor", "fashion-mnist"), ("grid", "dit"),
                                                      ("grid", "unet")]
    assert all(r["processor_seconds"] == 12 for r in whole[1:])


def test_what_a_killed_process_spent_is_estimated_from_the_rest(tiny, monkeypatch):
    real = compare.call

    def killed_midway(command, log):
        if command[0] == "train.py" and "dit" in command:
            shorter = list(command)
            shorter[shorter.index("--steps") + 1] = "4"
            train.main([*shorter[1:], "--cooldown", "0.5"])
            raise compare.Stopped("killed")
        return real(command, log)

    monkeypatch.setattr(compare, "call", killed_midway)
    assert compare.main([*FLAGS, "--only", "grid"]) == 1
    monkeypatch.setattr(compare, "call", real)
    assert compare.main([*FLAGS, "--only", "grid"]) == 0
    record = next(r for r in lines() if r["cell"] == "dit")
    assert record["measured_steps"] == 4 and record["processor_seconds"] == 12 * 8 / 4


def test_two_processes_side_by_side(tiny, capsys):
    """A cell that another process holds is left to it, and one that it has just finished is not repeated."""
    with locked(compare.Path("runs/dit-0.lock")):
        assert compare.main(FLAGS) == 0
    assert "2 cells were held by another process" in capsys.readouterr().out
    assert {r["cell"] for r in lines()} == {"fashion-mnist", "unet"}
    assert compare.main(FLAGS) == 0 and len(lines()) == 4


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


def test_weights_that_were_dropped_are_trained_again(tiny):
    assert compare.main([*FLAGS, "--only", "grid", "--drop-runs"]) == 0
    assert not [*compare.Path("runs").glob("dit-0/checkpoint*.pt")]
    assert compare.main(FLAGS) == 0
    assert len(lines()) == 4


@pytest.mark.parametrize("flags, words", [(["--only", "speed"], "--only speed: must be one of grid, steps")])
def test_bad_flags_are_refused_in_one_line(tiny, flags, words):
    with pytest.raises(ValueError, match=words):
        compare.main([*FLAGS, *flags])
    assert not compare.Path("results").exists() and not tiny


def test_programs_are_run_and_their_failure_is_one_line(tmp_path):
    spent = compare.call(["settings.py", "--arch", "dit"], tmp_path / "log")
    assert spent.processor > 0 and spent.wall > 0 and "--lr" in (tmp_path / "log").read_text()
    with pytest.raises(compare.Stopped) as refusal:
        compare.call(["settings.py", "--arch", "dit", "--steps", "0"], tmp_path / "log")
    assert "exit status 2; " in str(refusal.value) and "--steps 0: must be" in str(refusal.value)
    assert "\n" not in str(refusal.value)
