"""parallel.py: several processes train as one does, agree on what they do, and end together."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import FEW, ON_VAE, QUICK, ROOT, datasets, same

import networks
import plan
import settings
import train
from ranks import ALONE, Ranks, environments, join

LOSSES = "runs/shapes-dit-rf/metrics.jsonl"


TRAINING = ["--arch", "dit", *ON_VAE, "--vae-steps", "4", "--steps", "6", "--batch-size", "16",
            "--accumulate", "2", "--flip", "--ema", "0.1", "--log-every", "1", "--lr", "1e-3"]


@pytest.fixture(scope="module")
def alone(launch, tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert launch(folder, 1, *TRAINING).end()[0] == [0]
    return folder


def assert_close(found, wanted, name="", most=1e-6):
    """Two checkpoints, part by part, to this share of what they hold."""
    if isinstance(wanted, torch.Tensor) and wanted.is_floating_point():
        scale = max(1.0, wanted.abs().max().item())
        assert (found - wanted).abs().max().item() <= most * scale, name
    elif isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted), name
    elif isinstance(wanted, (dict, list, tuple)):
        assert len(found) == len(wanted), name
        for key in wanted if isinstance(wanted, dict) else range(len(wanted)):
            assert_close(found[key], wanted[key], f"{name}.{key}", most)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=most), name
    else:
        assert found == wanted, name


def losses(folder):
    return [json.loads(line) for line in open(folder / LOSSES)]


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.long)])
def test_several_processes_train_the_network_of_one(launch, alone, tmp_path, count):
    statuses, printed = launch(tmp_path, count, *TRAINING).end()
    assert statuses == [0] * count
    assert "samples.png" in printed[0] and printed[1:] == [""] * (count - 1)       # only rank 0 prints
    assert f"{count} processes: the first makes the caches that are missing while the others" in printed[0]
    for name in ("shapes-vae", "shapes-dit-rf"):
        found, wanted = [torch.load(folder / f"runs/{name}/checkpoint.pt", weights_only=True)
                         for folder in (tmp_path, alone)]
        assert torch.equal(found["training"]["rng"], wanted["training"]["rng"])
        for part in (found, wanted):
            part["training"].pop("rng")
            part["training"]["optimizer"]["state"] = {      # a gradient near zero has no accurate square
                number: {"exp_avg": state["exp_avg"], "step": state["step"]}
                for number, state in part["training"]["optimizer"]["state"].items()}
        assert_close(found, wanted, name)
    for found, wanted in zip(losses(tmp_path), losses(alone), strict=True):
        assert found["step"] == wanted["step"]
        for key in wanted:
            assert found[key] == pytest.approx(wanted[key], rel=1e-6), key


# ---- the parts of the batch, without any process

TASKS = {"dit": ["--arch", "dit", "--flip"], "dit, ddpm": ["--arch", "dit", "--objective", "ddpm"],
         "dit, meanflow": ["--arch", "dit", "--objective", "meanflow"],
         "unet": ["--arch", "unet", "--objective", "ddpm", "--cond", "none"],
         "unet, text": ["--arch", "unet", "--cond", "text"], "mmdit": ["--arch", "mmdit"]}


def task_of(flags, ranks=ALONE):
    args = settings.parse([*flags, *QUICK, "--vae", "runs/shapes-vae"])
    planned = plan.prepare(args, ranks=ALONE)
    planned.ranks = ranks
    data, val = datasets(args, planned.words)
    planned.conditioning.attach(data, val, planned.cache_dir, resumed=True)
    return train.Denoising(args, data, val, planned, planned.cache_dir)


@pytest.mark.parametrize("name", TASKS)
def test_the_ranks_parts_are_the_batch_of_one_process(cwd, tmp_path, name, monkeypatch):
    """With the same random numbers, whichever kind of network, path and condition."""
    flags = [*TASKS[name], "--cache-dir", str(tmp_path), "--label-dropout", "0.5"]
    whole = task_of(flags)
    torch.manual_seed(1)
    model = whole.build()
    for parameter in model.parameters():                   # networks begin with closed gates
        torch.nn.init.normal_(parameter, std=0.1)
    indices = np.arange(7, 19)

    def parts(task):
        torch.manual_seed(2)
        loss, t = task.loss(model, indices)
        return loss.detach(), t, torch.get_rng_state()

    loss, t, state = parts(whole)
    cut = []
    for rank in range(3):
        whole.ranks = Ranks(rank, 3)
        cut.append(parts(whole))
    torch.testing.assert_close(torch.cat([part[0] for part in cut]), loss, rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.cat([part[1] for part in cut]), t)
    assert all(torch.equal(part[2], state) for part in cut)


@pytest.mark.parametrize("name", TASKS)
def test_every_parameter_gets_a_gradient(cwd, tmp_path, name):
    """DistributedDataParallel waits for each of them."""
    task = task_of([*TASKS[name], "--cache-dir", str(tmp_path)])
    model = task.build()
    loss, _ = task.loss(model, np.arange(8))
    loss.mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_vae_draws_the_noise_of_the_whole_batch(noise):
    torch.manual_seed(0)
    model = networks.build_model("vae", {"widths": (8, 16), "groups": 4})
    x = torch.rand(6, 3, 8, 8) * 2 - 1
    torch.manual_seed(1)
    wanted, _ = model.loss(x, 1e-3, noise=noise)
    for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
        torch.manual_seed(1)
        found, _ = model.loss(x[part], 1e-3, noise=noise, rows=(6, part))
        torch.testing.assert_close(found, wanted[part])


# ---- sharded and tensor parallel

@pytest.mark.long
@pytest.mark.parametrize("count", [2, 4])
def test_every_layout_has_the_weights_and_gradients_of_one_process(launch, tmp_path, count):
    statuses, printed = launch(tmp_path, count, program="layouts.py").end()
    assert statuses == [0] * count, printed[0][-2000:]


# Before modulations and embedders were cut as well.
FORMER = """
import cuts
linears_of = cuts.linears_of
cuts.linears_of = lambda module, in_block: {
    name: cut for name, cut in linears_of(module, in_block).items() if "." not in name and not cut.gathered}
"""


# Numbers of processes, the step that they train to, and their flags. Tensor parallel with fewer cuts, then
# with all, then sharded, then whole, then tensor parallel again.
LAYOUTS = [(4, 2, ["--tensor-parallel", "2"]), (2, 4, ["--tensor-parallel", "2"]), (2, 5, ["--shard"]),
           (1, 7, []), (2, 9, ["--tensor-parallel", "2"])]
EXPERT_LAYOUTS = [(2, 3, ["--shard", "--expert-parallel"]), (1, 5, []),
                  (2, 7, ["--shard", "--expert-parallel"])]


@pytest.mark.long
@pytest.mark.parametrize("more, layouts", [([], LAYOUTS), (
    ["--experts", "4", "--moe-blocks", "all"], EXPERT_LAYOUTS)], ids=["dense", "experts"])
def test_a_run_goes_on_in_any_layout(launch, tmp_path, more, layouts):
    """As one process from the beginning."""
    flags = ["--arch", "dit", *ON_VAE, "--vae-steps", "3", "--batch-size", "16", "--cooldown", "0", "--lr",
             "1e-3", *more]
    for count, steps, layout in layouts:
        statuses, printed = launch(tmp_path, count, *flags, "--steps", str(steps), *layout,
                                   setup=FORMER if steps == 2 else "").end()
        assert statuses == [0] * count, printed
        folders = sorted(path.name for path in (tmp_path / "runs/shapes-dit-rf").glob("optimizer-*"))
        assert folders == ([f"optimizer-{steps:06d}"] if layout else [])
    whole = tmp_path / "whole"
    whole.mkdir()
    assert launch(whole, 1, *flags, "--steps", str(steps)).end()[0] == [0]
    found, wanted = [torch.load(folder / "runs/shapes-dit-rf/checkpoint.pt", weights_only=True)
                     for folder in (tmp_path, whole)]
    assert torch.equal(found["training"]["rng"], wanted["training"]["rng"])
    for part in ("model", "ema"):
        assert_close(found[part], wanted[part], part, 1e-5)

    # ---- a folder of the optimizer that is missing is said in a line
    shutil.rmtree(tmp_path / f"runs/shapes-dit-rf/optimizer-{steps:06d}")
    again = launch(tmp_path, 1, *flags, "--steps", "12")
    assert again.end()[0] == [2]
    assert len(again.errors()) == 1 and "checkpoint.pt: damaged" in again.errors()[0]


# ---- interruptions

@pytest.mark.long
def test_a_signal_to_one_process_stops_all_at_one_step_and_any_number_goes_on(launch, tmp_path):
    flags = [*TRAINING, "--save-every", "1000", "--val-every", "1000"]
    several = launch(tmp_path, 2, *flags, "--steps", "400", "--cooldown", "0")
    several.wait_for(LOSSES, 2)
    several.kill(1, signal.SIGTERM)
    statuses, printed = several.end()
    assert statuses == [143, 143]
    stopped = torch.load(tmp_path / "runs/shapes-dit-rf/checkpoint.pt", weights_only=True)["step"]
    assert f"stopped at step {stopped:,} of 400, saved" in printed[0] and printed[1] == ""

    # ---- the same number of processes continues bit for bit, another number nearly so
    def end_of(name, count):
        """The weights after three more steps; in a new folder, of a run of that length."""
        folder = tmp_path / name
        if not folder.exists():
            shutil.copytree(tmp_path / "runs", folder / "runs")
            for file in (folder / "runs/shapes-dit-rf").glob("*"):    # --steps may only grow
                if file.name == "settings.json":
                    file.write_text(file.read_text().replace('"steps": 400', f'"steps": {stopped + 3}'))
        words = [*flags, "--steps", str(stopped + 3), "--cooldown", "0"]
        assert launch(folder, count, *words).end()[0] == [0] * count
        return torch.load(folder / "runs/shapes-dit-rf/checkpoint.pt", weights_only=True)

    (tmp_path / "fresh").mkdir()
    shutil.copytree(tmp_path / "runs/shapes-vae", tmp_path / "fresh/runs/shapes-vae")
    wanted, two, one = end_of("fresh", 2), end_of("two", 2), end_of("one", 1)
    assert same(two["model"], wanted["model"]) and same(two["ema"], wanted["ema"])
    assert_close(one["model"], wanted["model"])


BUSY = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import cli, ranks

def main():
    start = ranks.Watch.start
    ranks.Watch.start = lambda watch: (setattr(watch, "pause", 1e-4), start(watch))
    with ranks.launched():
        return 3

sys.exit(cli.program("busy", main))
"""


def test_a_process_does_not_end_while_its_watch_is_in_the_store(tmp_path):
    """Half of the processes aborted here, where the thread that writes all the time was not waited for."""
    for _ in range(2):
        processes = [subprocess.Popen([sys.executable, "-c", BUSY], env=os.environ | own)
                     for own in environments(2)]
        assert [process.wait(300) for process in processes] == [3, 3]


AT_THE_END = f"""
import atexit, sys; sys.path.insert(0, {str(ROOT)!r})
import cli, ranks

class Late:
    def __del__(self):
        print("by the interpreter", flush=True)

def main():
    with ranks.launched():
        if "fail" in sys.argv:
            raise ValueError("so it is")
        print("done", end="")

late = Late()
atexit.register(print, ", handlers run")
sys.exit(cli.program("end", main))
"""


def test_a_rank_is_not_ended_by_the_interpreter():
    """gloo's threads can abort it there. What was printed is written, and what was registered for the end is
    called."""
    for words, status, output in (([], 0, "done, handlers run\n"), (["fail"], 2, ", handlers run\n")):
        processes = [subprocess.Popen([sys.executable, "-c", AT_THE_END, *words],
                                      env=os.environ | own | {"PYTHONUNBUFFERED": ""},
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                     for own in environments(2)]
        found = [process.communicate(timeout=300) for process in processes]
        assert [process.returncode for process in processes] == [status, status], found
        assert found[0][0] == output and found[1][0] == "", found


@pytest.mark.long
def test_where_a_process_is_killed_the_others_end_and_the_run_goes_on(launch, tmp_path):
    flags = [*TRAINING, "--steps", "300", "--save-every", "2"]
    several = launch(tmp_path, 2, *flags)
    several.wait_for(LOSSES, 4)
    several.kill(1)
    statuses, printed = several.end()
    assert statuses[0] == 2 and len(several.errors()) == 1
    assert "another process has ended; the same command goes on from what is saved" in printed[0]
    saved = torch.load(tmp_path / "runs/shapes-dit-rf/checkpoint.pt", weights_only=True)["step"]
    assert saved >= 2
    again = launch(tmp_path, 2, *flags)
    again.wait_for(LOSSES, saved + 2)
    again.kill(0, signal.SIGTERM)
    statuses, printed = again.end()
    assert statuses == [143, 143] and f"step {saved:,} of 300" in printed[0]


# ---- what cannot work, in one line

@pytest.mark.long
@pytest.mark.parametrize("flags, message", [
    ([["--arch", "dit", "--steps", "0"]] * 2, "--steps 0: must be between 1 and"),
    ([["--arch", "dit", "--batch-size", "9"]] * 2,
     "--batch-size 9: 2 processes or groups of them cannot share it; give a multiple of 2"),
    ([["--arch", "dit", "--preset", "tiny", "--batch-size", "6", "--tensor-parallel", "3"]] * 3,
     "--tensor-parallel 3: does not divide the"),
    ([["--arch", "dit", "--tensor-parallel", "3"]] * 2, "--tensor-parallel 3: does not divide the 2"),
    ([["--arch", "dit", "--experts", "5", "--shard", "--expert-parallel"]] * 2,
     "--expert-parallel: 2 processes or groups of them cannot share --experts 5"),
    ([["--arch", "dit", "--objective", "meanflow", "--experts", "4", "--shard", "--expert-parallel"]] * 2,
     "--expert-parallel: not with --objective meanflow, whose forward-mode derivative"),
    ([["--arch", "dit", "--objective", "meanflow", "--compile", "--tensor-parallel", "2"]] * 2,
     "--compile: not with --tensor-parallel 2 and --objective meanflow"),
    ([["--arch", "unet", "--tensor-parallel", "2"]] * 2, "cuts the blocks of dit and mmdit, not of unet"),
    ([["--arch", "vae", *QUICK[:4], "--lr", "1e-3"], ["--arch", "vae", *QUICK[:4], "--lr", "2e-3"]],
     "--lr: 0.001 on rank 0, 0.002 on rank 1; start all processes with the same command"),
    ([["--arch", "vae"], ["--arch", "vae", "--data", "missing"]], "rank 1: train.py: error: --data missing"),
], ids=["all", "batch", "heads", "mesh", "experts", "meanflow", "compile", "unet", "differ", "one"])
def test_bad_input_is_one_line_and_ends_all_processes(server, tmp_path, flags, message):
    launched = server.launch(tmp_path, flags)
    statuses, printed = launched.end()
    assert statuses == [2] * len(flags)
    [line] = launched.errors()
    assert message in line and re.search("^(rank 1: )?train.py: error: ", line)
    assert "Traceback" not in "".join(printed)
    assert not [*tmp_path.rglob("checkpoint.pt"), *tmp_path.rglob("settings.json")]


def test_an_incomplete_environment_is_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="^WORLD_SIZE is 2, but RANK is not set; start with torchrun$"):
        join()


@pytest.mark.parametrize("missing, message", [
    ("is_gloo_available", "no backend for several processes (gloo)"),
    ("is_nccl_available", "no backend for several GPUs (NCCL)")])
def test_a_build_without_a_backend_is_one_line(monkeypatch, missing, message):
    for key, value in environments(2)[0].items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, missing, lambda: False)
    with pytest.raises(ValueError, match=re.escape(f"torchrun: this build of torch has {message}")):
        join()


@pytest.mark.long
def test_torchrun_starts_it(alone, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(f"""
import sys
{FEW}
import cli, train
sys.exit(cli.program("train.py", train.main))
""")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
             str(script), *TRAINING]
    assert subprocess.run(words, cwd=tmp_path, capture_output=True).returncode == 0
    found, wanted = [torch.load(folder / "runs/shapes-dit-rf/checkpoint.pt", weights_only=True)["ema"]
                     for folder in (tmp_path, alone)]
    assert_close(found, wanted)


# ---- sample.py

DRAWING = ["runs/shapes-dit-rf", "--n", "11", "--batch-size", "2", "--steps", "2"]


@pytest.mark.long
@pytest.mark.parametrize("out", ["pictures.npz", "pictures", "pictures.png"])
def test_several_processes_draw_the_pictures_of_one(launch, alone, tmp_path, out):
    assert launch(alone, 1, *DRAWING, "--out", str(tmp_path / out), program="sample.py").end()[0] == [0]
    several = tmp_path / "several"
    several.mkdir()
    os.symlink(alone / "runs", several / "runs")
    statuses, printed = launch(several, 3, *DRAWING, "--out", out, program="sample.py").end()
    assert statuses == [0, 0, 0] and printed[1:] == ["", ""]
    files = [tmp_path / out] if (tmp_path / out).is_file() else sorted((tmp_path / out).iterdir())
    assert len(files) == (11 if out == "pictures" else 1)
    for file in files:
        assert file.read_bytes() == (several / file.relative_to(tmp_path)).read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("out, whole, stamp", [
    ("pictures.npz", "whole.npz", "pictures.npz.unfinished.json"),
    ("pictures", "whole", "pictures/unfinished.json")])
def test_a_drawing_goes_on_in_another_number_of_processes(launch, alone, tmp_path, out, whole, stamp):
    os.symlink(alone / "runs", tmp_path / "runs")
    words = [*DRAWING[:2], "120", *DRAWING[3:], "--out", out]
    several = launch(tmp_path, 2, *words, program="sample.py")
    stamp = tmp_path / stamp
    while several.running() and not stamp.exists():
        time.sleep(0.02)
    several.kill(1)
    assert several.end()[0][0] == 2 and len(several.errors()) == 1
    assert 0 < json.loads(stamp.read_text())["done"] < 120
    assert launch(tmp_path, 1, *words, program="sample.py").end()[0] == [0]
    assert launch(tmp_path, 1, *words[:-1], whole, program="sample.py").end()[0] == [0]
    found, wanted = [[file.read_bytes() for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
                     for path in (tmp_path / out, tmp_path / whole)]
    assert found == wanted and len(found) == (120 if out == "pictures" else 1)


@pytest.mark.long
@pytest.mark.parametrize("flags, message", [
    (["--seed", "1"], "seed: 0 on rank 0, 1 on rank 1; start all with the same command"),
    (["--n", "9"], "n: 11 on rank 0, 9 on rank 1; start"), (["--raw"], "weights: "),
    (["--out", "other.npz"], "--out: pictures.npz on rank 0, other.npz on rank 1")])
def test_processes_that_would_draw_otherwise_are_refused(server, alone, tmp_path, flags, message):
    os.symlink(alone / "runs", tmp_path / "runs")
    words = [*DRAWING, "--out", "pictures.npz"]
    launched = server.launch(tmp_path, [words, [*words, *flags]], "sample.py")
    statuses, printed = launched.end()
    assert statuses == [2, 2] and len(launched.errors()) == 1 and message in launched.errors()[0], printed
    assert not list(tmp_path.glob("*.npz*"))


def test_a_gif_is_drawn_by_one_process(launch, alone, tmp_path):
    os.symlink(alone / "runs", tmp_path / "runs")
    launched = launch(tmp_path, 2, *DRAWING, "--out", "steps.gif", program="sample.py")
    statuses, printed = launched.end()
    assert statuses == [2, 2] and len(launched.errors()) == 1
    assert "--out steps.gif: a .gif is drawn by one process" in printed[0]
