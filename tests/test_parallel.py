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
from conftest import ON_VAE, QUICK, ROOT, datasets, same

import plan
import run
import settings
import train
from ranks import ALONE, Ranks, environments, join

# A program as the other tests run it, with few pictures and few samples.
PROGRAM = """
import importlib, sys
sys.path[:0] = sys.argv[1:3]
import cli, conftest, pytest
conftest.SHAPES = 480
conftest.few_samples(pytest.MonkeyPatch())
name, *words = sys.argv[3:]
sys.exit(cli.program(name, lambda: importlib.import_module(name[:-3]).main(words)))
"""
COMMAND = [sys.executable, "-c", PROGRAM, str(ROOT), str(ROOT / "tests")]
TRAIN = [*COMMAND, "train.py"]


class Launch:
    """A program in as many processes as there are lists of flags, started as torchrun starts them."""

    def __init__(self, folder, *flags, program="train.py", command=None):
        self.logs = [folder / f"rank-{rank}.txt" for rank in range(len(flags))]
        self.processes = []
        for log, words, own in zip(self.logs, flags, environments(len(flags))):
            with open(log, "w") as out:
                words = [*(command or [*COMMAND, program]), *words]
                self.processes.append(subprocess.Popen(words, cwd=folder, stdout=out, stderr=out,
                                                       env=os.environ | own))

    def wait_for(self, step):
        """Until rank 0 has logged this step."""
        for _ in range(3000):
            file = self.logs[0].parent / "runs/shapes-dit-rf/metrics.jsonl"
            if self.processes[0].poll() is not None or (file.exists() and f'"step": {step},' in
                                                        file.read_text()):
                break
            time.sleep(0.02)

    def end(self):
        """The exit statuses, and all that was printed, rank by rank."""
        statuses = [process.wait(timeout=300) for process in self.processes]
        return statuses, [re.sub(r"\[W.*\n", "", log.read_text()) for log in self.logs]


def launch(folder, count, *flags, **options):
    return Launch(folder, *[list(flags)] * count, **options)


def errors(printed):
    return [line for text in printed for line in re.split("[\r\n]", text) if "error:" in line]


TRAINING = ["--arch", "dit", *ON_VAE, "--vae-steps", "4", "--steps", "6", "--batch-size", "16",
            "--accumulate", "2", "--flip", "--ema", "0.1", "--log-every", "1", "--lr", "1e-3"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert subprocess.run([*TRAIN, *TRAINING], cwd=folder, capture_output=True).returncode == 0
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
    return [json.loads(line) for line in open(folder / "runs/shapes-dit-rf/metrics.jsonl")]


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.long)])
def test_several_processes_train_the_network_of_one(alone, tmp_path, count):
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


def test_a_vae_draws_the_noise_of_the_whole_batch():
    torch.manual_seed(0)
    model = run.build_model("vae", {"widths": (8, 16), "groups": 4})
    x = torch.rand(6, 3, 8, 8) * 2 - 1
    torch.manual_seed(1)
    wanted, _ = model.loss(x, 1e-3)
    for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
        torch.manual_seed(1)
        found, _ = model.loss(x[part], 1e-3, rows=(6, part))
        torch.testing.assert_close(found, wanted[part])


# ---- sharded and tensor parallel

CHECK = """
import copy, os, sys
sys.path.insert(0, sys.argv[1])
import torch, torch.distributed as dist
import moe, parallel, rectified_flow, run, settings

dist.init_process_group("gloo")
rank, size, cpu = dist.get_rank(), dist.get_world_size(), torch.device("cpu")
CONFIGS = {
    "dit": dict(width=32, depth=3, heads=4, num_classes=3, mlp="swiglu"),
    "unet": dict(widths=(16, 32), heads=4, num_classes=3, groups=8, attention=(False, True)),
    "mmdit": dict(width=32, depth=2, single_depth=1, heads=4, rope=(4, 2, 2), context_width=8, pooled_width=8,
                  dual_attention=1),
    "mmdit, text": dict(width=32, depth=1, heads=4, rope=(4, 2, 2), context_width=8, pooled_width=8),
    "vae": dict(widths=(8, 16), groups=4),
    "dit, mean": dict(width=32, depth=2, heads=4, num_classes=3, second_time=True),
    "dit, experts": dict(width=32, depth=2, heads=4, num_classes=3, experts=4, moe_blocks="all")}


def loss(model, arch, part):
    torch.manual_seed(1)                       # the numbers of the whole batch
    x, t, y = torch.randn(8, 4, 8, 8), torch.rand(8), torch.randint(3, (8,))
    context, mask, pooled = torch.randn(8, 5, 8), torch.rand(8, 5) < 0.7, torch.randn(8, 8)
    mask[:, 0] = True
    if arch == "vae":
        return model.loss(torch.rand(8, 3, 8, 8)[part], 1e-3, rows=(8, part))[0].mean()
    cond = {"y": y[part]}
    if getattr(model.config, "second_time", False):
        s = torch.where(torch.arange(8) < 2, t / 2, t)             # only the first parts need a derivative
        path = rectified_flow.MeanFlow(guidance=1.5)
        return path.loss(model, x[part], t=t[part], s=s[part], eps=x.flip(0)[part], derive=True,
                         uncond={"y": torch.full_like(y[part], 3)}, **cond).mean()
    if arch == "mmdit":
        cond = {"context": context[part], "mask": mask[part], "pooled": pooled[part]}
    if hasattr(model, "text"):
        cond = model.text([f"words {i}" for i in range(8)][part])
    return (model(x[part], t[part], **cond) - x[part]).square().mean()


COMPILED = {"dit": 2, "unet": 1, "mmdit": 2, "vae": 0, "dit, mean": 1, "dit, experts": 1}
SEEN = set()                                   # in which types the blocks have their weights


def block_weight(block):
    return next(weight for weight in block.parameters() if weight.ndim > 1)


def held(module):                              # how many numbers of the weights this rank has
    return sum(parallel.local(weight).numel() for weight in module.parameters())


def see(block, inputs):
    SEEN.add(block_weight(block).dtype)


for network, config in CONFIGS.items():
    experts, words, arch = "experts" in network, "text" in network, network.split(",")[0]
    row = settings.ARCHITECTURES[arch]
    torch.manual_seed(0)
    text = {"encoder": "bytes", "config": dict(width=8, depth=1, heads=2)} if words else None
    whole = run.build_model(arch, config, text)
    for weight in whole.parameters():          # networks begin with closed gates
        torch.nn.init.normal_(weight, std=0.1)
    expected = loss(whole, arch, slice(None))
    expected.backward()
    layouts = [(0, "plain"), (1, "plain")]
    if arch in ("dit", "mmdit"):
        layouts += [(2, "plain"), (4, "plain")]
    if arch != "vae":                          # which is trained in float32 alone
        layouts.append((1, "bf16"))
    # Compiled once each: replicated, sharded, and tensor parallel.
    if network in COMPILED:
        layouts.append((COMPILED[network], "compiled"))
    for tensor, how in layouts:
        model = copy.deepcopy(whole)
        model.zero_grad()
        if how == "compiled":
            torch._dynamo.reset()              # of networks that were cut otherwise
            run.compile_blocks(model, backend="aot_eager")
        groups = size // max(1, tensor)
        number = rank // max(1, tensor)
        part = slice(8 // groups * number, 8 // groups * (number + 1))
        sharding = None
        if tensor == 0:
            step = parallel.replicate(model)
        else:
            sharding = parallel.Sharding(size, tensor, cpu, settings.BLOCKS, row.blocks, bf16=how == "bf16")
            if experts and 4 % groups == 0:
                moe.distribute_experts(model, sharding.mesh["data"])
            step = sharding.shard(model, trained=True)
        blocks = [block for block in model.modules() if isinstance(block, row.blocks)]
        shares = [held(block) for block in blocks]
        SEEN.clear()
        if how != "compiled":                  # which traces the blocks with their hooks
            for block in blocks:
                block.register_forward_pre_hook(see)
        first = next(model.parameters())
        for last in (False, True):             # the gradient of half the loss, twice
            with parallel.synchronised(step, last):
                with torch.autocast("cpu", torch.bfloat16, enabled=how == "bf16"):
                    found = parallel.run(step, model, loss, arch, part)
                if sharding and groups > 1:    # the last block waits for the backward pass, no other does
                    kept = [now > before for now, before in zip(map(held, blocks), shares)]
                    assert kept == [False] * (len(blocks) - 1) + [True], (network, how, tensor, kept)
                (found / 2).backward()
            if tensor == 0:                    # averaged over the ranks with the last piece alone
                everywhere = [torch.zeros_like(first) for _ in range(size)]
                dist.all_gather(everywhere, first.grad)
                assert all(torch.equal(everywhere[0], each) for each in everywhere) == last, network
        if how == "bf16":
            types = {weight.grad.dtype for weight in model.parameters()}
            assert SEEN == {torch.bfloat16} and types == {torch.float32}, (network, SEEN, types)
            assert abs(found - loss(whole, arch, part)) < 0.03 * found, network
            continue
        assert SEEN == (set() if how == "compiled" else {torch.float32}), network
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in whole.parameters()])
        if sharding:
            measured = sharding.finish_gradients(model, 1e9)
            assert abs(measured / norm - 1) < 1e-5, (network, how, tensor, measured, norm)
            if not (experts and groups == 1):              # tensor parallelism does not cut experts
                assert held(model) < 0.75 * sum(weight.numel() for weight in whole.parameters())
            assert list(sharding.state_of(model)) == (list(whole.state_dict()) if rank == 0 else [])
        total = found.detach().clone()
        dist.all_reduce(total)
        assert abs(total / size / expected - 1) < 1e-5, (network, how, tensor)
        for (name, weight), wanted in zip(model.named_parameters(), whole.parameters()):
            gradient = sharding.whole(name, weight.grad) if sharding else weight.grad
            error = (gradient - wanted.grad).abs().max() / max(1e-3, wanted.grad.abs().max())
            assert error < (1e-5 if sharding else 1e-6), (network, how, tensor, name, error)
            if sharding:
                assert torch.equal(sharding.whole(name, weight), wanted), (network, how, tensor, name)
                assert torch.equal(parallel.local(weight), sharding.share(name, wanted)), (network, how, name)
print("all equal")
dist.destroy_process_group()
"""


@pytest.mark.long
def test_every_layout_has_the_weights_and_gradients_of_one_process(tmp_path):
    script = tmp_path / "check.py"
    script.write_text(CHECK)
    statuses, printed = Launch(tmp_path, *[[str(ROOT)]] * 4, command=[sys.executable, str(script)]).end()
    assert statuses == [0] * 4, printed[0][-2000:]
    assert all("all equal" in text for text in printed)


# Before modulations and embedders were cut as well.
FORMER = PROGRAM.replace("name, *words", """
import cuts
linears_of = cuts.linears_of
cuts.linears_of = lambda module, in_block: {
    name: cut for name, cut in linears_of(module, in_block).items() if "." not in name and not cut.gathered}
name, *words""", 1)


# Numbers of processes, the step that they train to, and their flags. Tensor parallel with fewer cuts, then
# with all, then sharded, then whole, then tensor parallel again.
LAYOUTS = [(4, 2, ["--tensor-parallel", "2"]), (2, 4, ["--tensor-parallel", "2"]), (2, 5, ["--shard"]),
           (1, 7, []), (2, 9, ["--tensor-parallel", "2"])]
EXPERT_LAYOUTS = [(2, 3, ["--shard", "--expert-parallel"]), (1, 5, []),
                  (2, 7, ["--shard", "--expert-parallel"])]


@pytest.mark.long
@pytest.mark.parametrize("more, layouts", [([], LAYOUTS), (
    ["--experts", "4", "--moe-blocks", "all"], EXPERT_LAYOUTS)], ids=["dense", "experts"])
def test_a_run_goes_on_in_any_layout(tmp_path, more, layouts):
    """As one process from the beginning."""
    flags = ["--arch", "dit", *ON_VAE, "--vae-steps", "3", "--batch-size", "16", "--cooldown", "0", "--lr",
             "1e-3", *more]
    former = [sys.executable, "-c", FORMER, str(ROOT), str(ROOT / "tests"), "train.py"]
    for count, steps, layout in layouts:
        words = {"command": former} if steps == 2 else {}
        statuses, printed = launch(tmp_path, count, *flags, "--steps", str(steps), *layout, **words).end()
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
    statuses, printed = launch(tmp_path, 1, *flags, "--steps", "12").end()
    assert statuses == [2] and len(errors(printed)) == 1 and "checkpoint.pt: damaged" in errors(printed)[0]


# ---- interruptions

@pytest.mark.long
def test_a_signal_to_one_process_stops_all_at_one_step_and_any_number_goes_on(tmp_path):
    flags = [*TRAINING, "--save-every", "1000", "--val-every", "1000"]
    several = launch(tmp_path, 2, *flags, "--steps", "400", "--cooldown", "0")
    several.wait_for(2)
    several.processes[1].send_signal(signal.SIGTERM)
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
    for _ in range(4):
        assert launch(tmp_path, 2, command=[sys.executable, "-c", BUSY]).end() == ([3, 3], ["", ""])


@pytest.mark.long
def test_where_a_process_is_killed_the_others_end_and_the_run_goes_on(tmp_path):
    flags = [*TRAINING, "--steps", "300", "--save-every", "2"]
    several = launch(tmp_path, 2, *flags)
    several.wait_for(4)
    several.processes[1].kill()
    statuses, printed = several.end()
    assert statuses[0] == 2 and len(errors(printed)) == 1
    assert "another process has ended; the same command goes on from what is saved" in printed[0]
    saved = torch.load(tmp_path / "runs/shapes-dit-rf/checkpoint.pt", weights_only=True)["step"]
    assert saved >= 2
    again = launch(tmp_path, 2, *flags)
    again.wait_for(saved + 2)
    again.processes[0].send_signal(signal.SIGTERM)
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
def test_bad_input_is_one_line_and_ends_all_processes(tmp_path, flags, message):
    statuses, printed = Launch(tmp_path, *flags).end()
    assert statuses == [2] * len(flags)
    assert len(errors(printed)) == 1 and message in errors(printed)[0]
    assert re.search("^(rank 1: )?train.py: error: ", errors(printed)[0])
    assert "Traceback" not in "".join(printed)
    assert not [*tmp_path.rglob("checkpoint.pt"), *tmp_path.rglob("settings.json")]


def test_an_incomplete_environment_is_one_line(tmp_path):
    found = subprocess.run([*TRAIN, "--arch", "vae"], cwd=tmp_path, capture_output=True, text=True,
                           env=os.environ | {"WORLD_SIZE": "2"})
    assert found.returncode == 2
    assert found.stderr.splitlines()[-1] == ("train.py: error: WORLD_SIZE is 2, but RANK is not set; start "
                                             "with torchrun")


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
    script.write_text(PROGRAM)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
             str(script), str(ROOT), str(ROOT / "tests"), "train.py", *TRAINING]
    assert subprocess.run(words, cwd=tmp_path, capture_output=True).returncode == 0
    found, wanted = [torch.load(folder / "runs/shapes-dit-rf/checkpoint.pt", weights_only=True)["ema"]
                     for folder in (tmp_path, alone)]
    assert_close(found, wanted)


# ---- sample.py

DRAWING = ["runs/shapes-dit-rf", "--n", "11", "--batch-size", "2", "--steps", "2"]


@pytest.mark.long
@pytest.mark.parametrize("out", ["pictures.npz", "pictures", "pictures.png"])
def test_several_processes_draw_the_pictures_of_one(alone, tmp_path, out):
    subprocess.run([*COMMAND, "sample.py", *DRAWING, "--out", str(tmp_path / out)], cwd=alone, check=True)
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
def test_a_drawing_goes_on_in_another_number_of_processes(alone, tmp_path, out, whole, stamp):
    os.symlink(alone / "runs", tmp_path / "runs")
    words = [*DRAWING[:2], "120", *DRAWING[3:], "--out", out]
    several = launch(tmp_path, 2, *words, program="sample.py")
    stamp = tmp_path / stamp
    for _ in range(3000):
        if several.processes[0].poll() is not None or stamp.exists():
            break
        time.sleep(0.02)
    several.processes[1].kill()
    statuses, printed = several.end()
    assert statuses[0] == 2 and len(errors(printed)) == 1
    assert 0 < json.loads(stamp.read_text())["done"] < 120
    assert launch(tmp_path, 1, *words, program="sample.py").end()[0] == [0]
    subprocess.run([*COMMAND, "sample.py", *words[:-1], whole], cwd=tmp_path, check=True)
    found, wanted = [[file.read_bytes() for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
                     for path in (tmp_path / out, tmp_path / whole)]
    assert found == wanted and len(found) == (120 if out == "pictures" else 1)


@pytest.mark.long
@pytest.mark.parametrize("flags, message", [
    (["--seed", "1"], "seed: 0 on rank 0, 1 on rank 1; start all with the same command"),
    (["--n", "9"], "n: 11 on rank 0, 9 on rank 1; start"), (["--raw"], "weights: "),
    (["--out", "other.npz"], "--out: pictures.npz on rank 0, other.npz on rank 1")])
def test_processes_that_would_draw_otherwise_are_refused(alone, tmp_path, flags, message):
    os.symlink(alone / "runs", tmp_path / "runs")
    words = [*DRAWING, "--out", "pictures.npz"]
    statuses, printed = Launch(tmp_path, words, [*words, *flags], program="sample.py").end()
    assert statuses == [2, 2] and len(errors(printed)) == 1 and message in errors(printed)[0], printed
    assert not list(tmp_path.glob("*.npz*"))


def test_a_gif_is_drawn_by_one_process(alone, tmp_path):
    os.symlink(alone / "runs", tmp_path / "runs")
    statuses, printed = launch(tmp_path, 2, *DRAWING, "--out", "steps.gif", program="sample.py").end()
    assert statuses == [2, 2] and len(errors(printed)) == 1
    assert "--out steps.gif: a .gif is drawn by one process" in printed[0]
