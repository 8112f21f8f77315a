"""train.py as a user meets it, with tiny networks: whole runs, the loop, interruptions, bad input."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (DONE, ON_VAE, QUICK, QUICK_VAE, ROOT, SHAPES, VAE, Recorder, contents, datasets,
                      denoising, draw_two, few_samples, same, weights, write_idx)
from PIL import Image

import checkpoints
import data
import draw
import networks
import plan
import run
import sample
import samplers
import settings
import tasks
import toys
import train
import vae as vae_file
from ema import gamma_of
from ranks import ALONE
from state import State

TINY_VAE = ["--vae-preset", "tiny", "--vae-steps", "2"]       # of tests that train one themselves
KILLS = int(os.environ.get("KILLS", 2))   # KILLS=20 for the long version


# ---- a whole run

def test_a_finished_run_leaves_what_it_promises(cwd, capsys):
    assert {"checkpoint.pt", "settings.json", "metrics.jsonl", "loss.png",
            "samples.png"} <= contents(cwd / "runs/done")
    lines = [json.loads(line) for line in open("runs/done/metrics.jsonl")]
    losses, vals = [r for r in lines if "loss" in r], [r for r in lines if "val_loss" in r]
    assert [r["step"] for r in losses] == list(range(5, 61, 5)) and [r["step"] for r in vals] == [20, 40, 60]
    assert set(vals[0]["val_by_time"]) == {"0.0-0.25", "0.25-0.5", "0.5-0.75", "0.75-1.0"}
    np.testing.assert_allclose(np.mean(list(vals[0]["val_by_time"].values())), vals[0]["val_loss"], rtol=1e-5)
    assert vals[-1]["val_loss"] < 0.97 * vals[0]["val_loss"]                    # it learns
    assert losses[-1]["lr"] < losses[4]["lr"] / 10                              # and the rate came down
    vae_lines = [json.loads(line) for line in open("runs/shapes-vae/metrics.jsonl")]
    assert {"psnr", "kl", "latent_std"} <= set(vae_lines[-1]) and len(vae_lines[-1]["latent_std"]) == 4
    assert json.load(open("runs/done/settings.json"))["arch"] == "dit"
    checkpoint = checkpoints.load_checkpoint("runs/done")                     # weights_only, on the CPU
    assert not any(k.startswith(("_orig_mod", "module")) for k in checkpoint["model"])
    assert not same(checkpoint["model"], checkpoint["ema"])
    before = (cwd / "runs/done/checkpoint.pt").read_bytes()
    train.main(DONE)
    assert (cwd / "runs/done/checkpoint.pt").read_bytes() == before   # a finished run is not trained further
    assert "python sample.py runs/done --label red-circle" in capsys.readouterr().out


def test_latent_statistics_are_measured_once_over_the_training_set(cwd):
    vae = checkpoints.load_vae("runs/shapes-vae")
    latents = torch.from_numpy(np.load("runs/shapes-vae/latents.npy").astype(np.float64))
    assert len(latents) == SHAPES
    torch.testing.assert_close(vae.latent_mean.double(), latents[:, :, 0].mean((0, 1, 3, 4)),
                               rtol=1e-4, atol=1e-5)
    z = latents[:, 0, 0] + latents[:, 0, 1] * torch.randn(latents[:, 0, 0].shape, dtype=torch.float64)
    x0 = vae.normalize(z.float())
    assert x0.mean((0, 2, 3)).abs().max() < 0.01 and (x0.std((0, 2, 3)) - 1).abs().max() < 0.01
    inside = networks.unpack_vae(checkpoints.load_checkpoint("runs/done")["vae"])    # the run carries it too
    assert same(inside.state_dict(), vae.state_dict())


@pytest.mark.parametrize("arch", ["dit", "unet"])
@pytest.mark.parametrize("objective, prediction", [("rf", None), ("rf", "v"), ("rf", "x0"), ("rf", "eps"),
                                                   ("ddpm", None), ("ddpm", "v"), ("ddpm", "x0")])
def test_every_combination_trains_and_samples(cwd, arch, objective, prediction):
    name = f"{arch}-{objective}-{prediction}"
    train.main(["--arch", arch, "--objective", objective, *ON_VAE, "--name", name,
                *(["--prediction", prediction] if prediction else [])])
    checkpoint = checkpoints.load_checkpoint(f"runs/{name}")
    assert (checkpoint["objective"].get("prediction") == prediction
            and checkpoint["config"]["num_classes"] == 24)
    drawn = draw_two(f"runs/{name}", "--cfg", "2", out=f"{name}.npz")
    # and with every sampler, from one reading of the checkpoint
    model = networks.build_model(arch, checkpoint["config"])
    model.load_state_dict(checkpoint["ema"])
    vae, path = networks.unpack_vae(checkpoint["vae"]), networks.build_path(checkpoint["objective"])
    cond, uncond = {"y": torch.tensor([0, 1])}, {"y": torch.tensor([24, 24])}
    for sampler in samplers.SAMPLERS:
        images = draw.draw(model.eval(), vae, path, (4, 8, 8), range(2), cond, uncond, sampler=sampler,
                             steps=3, scale=2.0)
        assert images.shape == (2, 32, 32, 3) and len(np.unique(images)) > 1
        if sampler == settings.OBJECTIVES[objective].sampler:
            assert np.abs(images - drawn).max() <= 1


def make_folder(folder, classes):
    rng = np.random.default_rng(0)
    for i in range(24):
        sub = folder / (("a", "b", "c")[i % 3] if classes else "")
        sub.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(sub / f"{i}.png")


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("arch, options", [("dit", ["--patch", "1", "2", "--block", "published"]),
                                           ("unet", ["--flip"])])
def test_own_pictures_of_any_size(tmp_path, monkeypatch, quick, arch, options, classes):
    """A folder with or without classes, 16 x 24: VAE, latents, network and samples from one command."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "pictures", classes)
    flags = ["--arch", arch, "--data", "pictures", "--image-size", "16", "24", *QUICK, *TINY_VAE, *options]
    train.main(flags)
    folder = f"runs/pictures-16x24-{arch}-rf"
    sample.main([folder, "--n", "3", "--steps", "2", "--out", "x.npz"])
    assert np.load("x.npz")["arr_0"].shape == (3, 16, 24, 3)
    assert checkpoints.load_checkpoint(folder)["data"]["classes"] == (["a", "b", "c"] if classes else [])
    if not classes:
        with pytest.raises(ValueError, match="without conditions"):
            sample.main([folder, "--label", "0"])
    else:
        train.main([*flags, "--cond", "none", "--name", "plain"])
        assert checkpoints.load_checkpoint("runs/plain")["config"]["num_classes"] == 0
    # other pictures in the folder: a finished run stays finished, and a new one is refused
    Image.new("RGB", (30, 20)).save(next((tmp_path / "pictures").rglob("0.png")))
    train.main(flags)
    with pytest.raises(ValueError, match="are not those that"):
        train.main([*flags, "--name", "on-others"])


@pytest.mark.parametrize("classes", [True, False])
def test_a_vae_trained_with_captions_serves_its_networks(tmp_path, monkeypatch, quick, classes):
    """--cond text is a setting of the VAE's own run; networks on its data take it as it is."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "pictures", classes)
    for path in list((tmp_path / "pictures").rglob("*.png")):
        path.with_suffix(".txt").write_text(f"picture {path.stem}")
    shared = ["--data", "pictures", "--image-size", "16", "24"]
    train.main(["--arch", "vae", *shared, "--cond", "text", *QUICK_VAE, "--vae-preset", "tiny", "--steps",
                "2"])
    before = Path("runs/pictures-16x24-vae/checkpoint.pt").read_bytes()
    for arch in ("mmdit", "dit"):
        train.main(["--arch", arch, *shared, *QUICK, *TINY_VAE])
        assert checkpoints.load_checkpoint(f"runs/pictures-16x24-{arch}-rf")["training"]["finished"]
    assert Path("runs/pictures-16x24-vae/checkpoint.pt").read_bytes() == before


def test_grey_data(tmp_path, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for part in ("train", "t10k"):
        write_idx(tmp_path / "data" / "mnist" / f"{part}-images-idx3-ubyte.gz",
                  rng.integers(0, 256, (30, 28, 28)))
        write_idx(tmp_path / "data" / "mnist" / f"{part}-labels-idx1-ubyte.gz", np.arange(30) % 10)
    train.main(["--arch", "unet", "--objective", "ddpm", "--data", "mnist", *QUICK, *TINY_VAE])
    sample.main(["runs/mnist-unet-ddpm", "--n", "2", "--steps", "2", "--label", "7", "--out", "out"])
    assert sorted(p.name for p in Path("out").iterdir()) == ["000000-7.png", "000001-7.png"]
    assert Image.open("out/000000-7.png").mode == "L"


def test_the_vae_of_a_captioned_folder_is_that_of_its_pictures(cwd, text_runs, capsys):
    """It was trained before a network with text. Its own command, without captions, finds it finished."""
    train.main(["--arch", "vae", "--data", "scenes", *QUICK_VAE, "--vae-preset", "tiny", "--steps", "40"])
    assert "runs/scenes-vae is finished: 40 steps" in capsys.readouterr().out


# ---- what the loop does

def test_training_uses_normalised_latents(cwd):
    task, model = denoising(), Recorder()
    task.path.sample_t = lambda n, **options: torch.full((n,), 1e-5)
    task.loss(model, np.arange(4000))
    xt = model.seen[0][0]
    assert xt.mean((0, 2, 3)).abs().max() < 0.1 and (xt.std((0, 2, 3)) - 1).abs().max() < 0.1


def test_a_limit_trains_on_these_pictures_alone(cwd, monkeypatch, capsys):
    """The others are never drawn, their latents stay in the cache that all networks share, and a run keeps
    its limit."""
    drawn = []
    loss = train.Denoising.loss
    monkeypatch.setattr(train.Denoising, "loss",
                        lambda task, model, indices: (drawn.append(indices), loss(task, model, indices))[1])
    flags = ["--arch", "dit", *ON_VAE, "--steps", "4", "--name", "limited"]
    before = Path("runs/shapes-vae/latents.npy").stat().st_mtime_ns
    train.main([*flags, "--limit", "50"])
    drawn = np.concatenate(drawn)
    assert set(drawn) == set(data.some_pictures(SHAPES, 50)) and len(drawn) == 128
    assert "on 50 pictures" in capsys.readouterr().out
    assert Path("runs/shapes-vae/latents.npy").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="limit"):
        train.main(flags)
    with pytest.raises(ValueError, match="--limit 4801: there are 4,800 pictures to train on"):
        train.main([*flags, "--limit", "4801", "--name", "more"])
    with pytest.raises(ValueError, match="--limit 5: belongs to --arch dit or mmdit or unet, not vae"):
        train.main(["--arch", "vae", "--limit", "5"])


def test_random_draws_of_the_loss_keep_their_order(cwd):
    """Latent, dropout, time, noise: another order would change what a seed means and how old runs resume."""
    task, model = denoising("--label-dropout", "0.5"), Recorder()
    indices = np.arange(6)
    torch.manual_seed(7)
    task.loss(model, indices)
    torch.manual_seed(7)
    torch.randint(1, (6,))                                               # mirrored or not
    mean, std = torch.from_numpy(task.cache.latents[indices, 0]).float().unbind(1)
    x0 = task.vae.normalize(mean + std * torch.randn(mean.shape))
    dropped = torch.rand(6) < 0.5
    t = task.path.sample_t(6)
    eps = torch.randn_like(x0)
    xt, seen_t, y = model.seen[0]
    assert torch.equal(seen_t, t) and y.tolist() == torch.where(dropped, 24, torch.arange(6)).tolist()
    torch.testing.assert_close(xt, (1 - t.view(-1, 1, 1, 1)) * x0 + t.view(-1, 1, 1, 1) * eps)


def test_validation_is_fixed_and_leaves_the_generator_alone(cwd):
    task = denoising()
    network = networks.build_model("dit", checkpoints.load_checkpoint("runs/done")["config"])
    state = torch.get_rng_state()
    with torch.no_grad():
        first, second = task.validate(network, []), task.validate(network, [])
        task.preview(network, [], 2)
    assert first == second and torch.equal(torch.get_rng_state(), state)
    assert sorted(task.t.tolist()) == [(i + 0.5) / len(task.t) for i in range(len(task.t))]


@pytest.mark.parametrize("flags, most", [
    (["--batch-size", "64"], 256), (["--batch-size", "32"], 128), (["--batch-size", "1"], 4),
    (["--batch-size", "64", "--accumulate", "8"], 32), (["--batch-size", "64", "--grad-checkpoint"], 64),
])
def test_memory_outside_training_steps_follows_the_batch(cwd, monkeypatch, flags, most):
    """Four pieces of a training step, of which one has all gradients. Any pieces give the same numbers."""
    sizes, through_vae = [], []
    encode = vae_file.VAE.encode
    monkeypatch.setattr(vae_file.VAE, "encode", lambda self, x: through_vae.append(len(x)) or encode(self, x))
    task = denoising(*flags)
    assert max(through_vae) == min(32, most) and sum(through_vae) == 256
    network = networks.build_model("dit", checkpoints.load_checkpoint("runs/done")["config"])
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    network.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    with torch.no_grad():
        found = task.validate(network, [])
        assert max(sizes) == most and sum(sizes) == 256
        with monkeypatch.context() as patch:
            patch.setattr(tasks, "at_once", lambda args, ranks, most, size=None: most)
            whole = task.validate(network, [])
    assert abs(found["val_loss"] / whole["val_loss"] - 1) < 1e-5
    assert found["val_by_time"].keys() == whole["val_by_time"].keys()
    if most == 256:
        assert found == whole
    sizes.clear()
    task.conditioning.classes = task.conditioning.classes[:1]
    with torch.no_grad():
        task.preview(network, [], 3)
    assert max(sizes) <= max(2, most)                # guidance takes each picture twice


def autoencoding(*flags):
    """The task of the VAE of `home`, and that VAE."""
    args = settings.parse(["--arch", "vae", *QUICK_VAE, "--vae-preset", "tiny", *flags, "--name", "none"])
    pictures = datasets(settings.parse(["--arch", "dit", *ON_VAE]))
    task = train.Autoencoding(args, *pictures, plan.prepare(args), Path())
    return task, checkpoints.load_vae("runs/shapes-vae")


def test_memory_of_the_vae_follows_the_batch(cwd, monkeypatch, tmp_path):
    """Validation, previews and latents; the default, 8, in pieces of 32. All pieces give the same numbers."""
    sizes, records = [], []
    encode = vae_file.VAE.encode
    monkeypatch.setattr(vae_file.VAE, "encode", lambda self, x: sizes.append(len(x)) or encode(self, x))
    for flags, most in ((["--batch-size", "64"], 256), ([], 32), (["--batch-size", "1"], 4)):
        task, model = autoencoding(*flags)
        sizes.clear()
        with torch.no_grad():
            records.append(task.validate(model, []))
            task.preview(model, [])
            cut = replace(task.data, images=task.data.images[:300])
            cache = tasks.encode_latents(task.args, ALONE, model, cut, tmp_path / str(most))
        assert max(sizes) == most and sum(sizes) == 2 * 256 + 32 + 300
        records[-1]["latents"] = cache.latents.astype(float).sum()
    for record in records[1:]:
        for name, value in record.items():
            np.testing.assert_allclose(value, records[0][name], rtol=1e-4, err_msg=name)
    assert tasks.at_once(task.args, ALONE, 256, (512, 1024)) == 1        # the VAE needs memory by the pixel


def test_a_jump_of_the_clock_is_not_in_the_minutes(cwd, monkeypatch, capsys):
    monkeypatch.setattr(time, "time", lambda: -1e6 * time.monotonic())
    assert train.main(DONE) == 0
    out = capsys.readouterr().out
    assert "runs/done is finished: 60 steps" in out and re.search(r"after 0\.\d minutes", out)


@pytest.mark.parametrize("length, shares", [
    ("0.998", [(1 / 10, 2 / 11, 3 / 12)]),                  # a constant decay, lower in the first steps
    ("0", [(0, 0, 0)]),
    ("0.1", [[(1 - 1 / step) ** (gamma + 1) for step in (1, 2, 3)]
            for gamma in (gamma_of(0.1), gamma_of(0.2))])])
def test_averages_of_the_weights(cwd, length, shares):
    """Three runs of 1, 2, 3 steps give the raw weights from which the averaged ones must follow."""
    raws = []
    for steps in (1, 2, 3):
        name = f"ema{length}-{steps}"
        train.main(["--arch", "dit", *ON_VAE, "--steps", str(steps), "--cooldown", "0", "--warmup", "0",
                    "--ema", length, "--name", name])
        raws.append(weights(f"runs/{name}"))
    saved = checkpoints.load_checkpoint(f"runs/{name}")
    found = [average["state"] for average in saved.get("averages", [{"state": saved["ema"]}])]
    assert len(found) == len(shares) and same(found[0], saved["ema"])
    torch.manual_seed(0)
    initial = {k: v.clone() for k, v in networks.build_model("dit", saved["config"]).state_dict().items()}
    for state, remaining in zip(found, shares):
        want = initial
        for raw, share in zip(raws, remaining):
            want = {k: share * v + (1 - share) * raw[k] for k, v in want.items()}
        for k, v in state.items():
            torch.testing.assert_close(v, want[k], rtol=1e-4, atol=1e-7)


def test_learning_rate():
    args = settings.parse(["--arch", "dit", "--steps", "100", "--lr", "1", "--warmup", "10",
                           "--cooldown", "0.5"])
    rates = [train.learning_rate(step, args) for step in range(100)]
    assert (rates[0] == 0.1 and rates[9] == rates[50] == 1.0
            and abs(rates[75] - 0.5) < 1e-9 and abs(rates[99] - 0.02) < 1e-9)


def test_accumulation_is_the_same_step(cwd, monkeypatch):
    """With noise tied to the example, four pieces of 2 are one batch of 8."""
    def loss(self, model, indices):
        mean = torch.from_numpy(self.cache.latents[indices, 0, 0].astype(np.float32))
        eps = torch.stack([torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(int(i)))
                           for i in indices])
        t = torch.from_numpy((indices % 10 + 0.5) / 10).float()
        y = torch.from_numpy(indices % 24)
        return self.path.loss(model, self.vae.normalize(mean), t=t, eps=eps, y=y), t

    monkeypatch.setattr(train.Denoising, "loss", loss)
    for pieces in (1, 4):
        train.main(["--arch", "dit", *ON_VAE, "--accumulate", str(pieces), "--name", f"pieces{pieces}"])
    a, b = (weights(f"runs/pieces{pieces}") for pieces in (1, 4))
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=2e-5)


def test_grad_checkpoint_trains_the_same(cwd):
    flags = ["--arch", "unet", *ON_VAE]
    train.main([*flags, "--name", "kept"])
    train.main([*flags, "--name", "again", "--grad-checkpoint"])
    assert same(weights("runs/kept"), weights("runs/again"))


# ---- interruption

RESUME = ["--arch", "dit", *QUICK, "--steps", "30", "--save-every", "5", "--log-every", "3", "--val-every",
          "10"]


@pytest.fixture(scope="session")
def whole(home):
    """The run that is not interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        few_samples(patch)
        patch.chdir(home)
        train.main([*RESUME, *VAE, "--name", "whole"])
    return checkpoints.load_checkpoint(home / "runs/whole")


@pytest.mark.long
def test_kill_9_at_random_moments(cwd):
    """Killed wherever it may be, the rerun ends in the same bits, and the checkpoint is loadable at every
    moment. On a few pictures, so that the processes are short."""
    make_folder(Path("few"), classes=False)
    flags = [*RESUME, "--data", "few", "--vae", "runs/shapes-vae", "--name"]
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    started = time.time()
    subprocess.run([*command, "not-killed"], check=True, capture_output=True)
    length, rng = time.time() - started, random.Random(os.environ.get("KILL_SEED", 0))
    for _ in range(KILLS):
        process = subprocess.Popen([*command, "killed"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.3, 1.0) * length)
        process.kill()
        process.wait()
        if Path("runs/killed/checkpoint.pt").is_file():
            checkpoints.load_checkpoint("runs/killed")
    train.main([*flags, "killed"])
    want, found = (checkpoints.load_checkpoint(f"runs/{name}") for name in ("not-killed", "killed"))
    for key in ("model", "ema"):
        assert same(want[key], found[key])
    assert torch.equal(want["training"]["rng"], found["training"]["rng"])
    lines = [list(map(json.loads, open(f"runs/{name}/metrics.jsonl"))) for name in ("not-killed", "killed")]
    assert [r["step"] for r in lines[0]] == [r["step"] for r in lines[1]]  # nothing twice, nothing missing
    assert [r.get("val_loss") for r in lines[0]] == [r.get("val_loss") for r in lines[1]]


def signal_at(monkeypatch, call, number=signal.SIGINT):
    """Send this process a signal during the given call of the loss, and return the list of calls."""
    calls, original = [], train.Denoising.loss

    def loss(self, model, indices):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(self, model, indices)

    monkeypatch.setattr(train.Denoising, "loss", loss)
    return calls


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_finish_the_step_and_save(cwd, whole, monkeypatch, capsys, number):
    """The exit status says that the run is not finished: `train.py ... && next` stops."""
    name = f"signal{int(number)}"
    flags = [*RESUME, *VAE, "--name", name]
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        signal_at(patch, 7, number)
        assert train.main(flags) == 128 + number
    assert signal.getsignal(number) is handler and "the same command continues" in capsys.readouterr().out
    assert checkpoints.load_checkpoint(f"runs/{name}")["step"] == 7     # between two planned ones
    with open(f"runs/{name}/metrics.jsonl", "a") as out:
        out.write('{"step": 9, "lo')                                     # a line truncated by a kill
    assert train.main(flags) == 0
    assert all(json.loads(line) for line in open(f"runs/{name}/metrics.jsonl"))
    for key in ("model", "ema"):
        assert same(whole[key], weights(f"runs/{name}", key))


@pytest.mark.parametrize("task, part, steps", [
    ("Denoising", "validate", 4), ("Denoising", "preview", 4), ("Denoising", "preview", 2),
    ("Autoencoding", "validate", 4), ("Autoencoding", "preview", 4)])
def test_a_signal_ends_a_validation_or_a_preview(cwd, monkeypatch, capsys, task, part, steps):
    """Nothing of it is recorded; the next step, if there is one, is the last."""
    name = f"cut-{task}-{part}-{steps}"
    arch = "dit" if task == "Denoising" else "vae"
    flags = ["--arch", arch, *(ON_VAE if arch == "dit" else [*QUICK_VAE, "--vae-preset", "tiny"]), "--steps",
             str(steps), "--val-every", "2", "--preview-every", "2", "--batch-size", "2", "--name", name]
    plain, pieces, calls = getattr(getattr(train, task), part), [], []
    watched, plain_draw = tasks.watched, draw.draw

    def begin(self, model, stop, *more):
        os.kill(os.getpid(), signal.SIGINT)
        calls.append(len(pieces))
        return plain(self, model, stop, *more)

    with monkeypatch.context() as patch:
        patch.setattr(getattr(train, task), part, begin)
        patch.setattr(tasks, "watched", lambda parts, *more:
                      (pieces.append(1) or part for part in watched(parts, *more)))
        patch.setattr(draw, "draw", lambda *a, **k: pieces.append(1) or plain_draw(*a, **k))
        assert train.main(flags) == 130
    assert len(pieces) - calls[0] <= 2                      # of the network's previews, a step of each
    ending = f"stopped at step 3 of {steps}, saved; the same command continues"
    if steps == 2:
        ending = "all 2 steps are done and saved; the same command draws the samples"
    assert ending in capsys.readouterr().out
    records = [json.loads(line) for line in open(f"runs/{name}/metrics.jsonl")]
    assert [r["step"] for r in records if "val_loss" in r] == ([2] if part == "preview" else [])
    assert {path.name for path in Path(f"runs/{name}").glob("*.png")} <= {"loss.png"}
    assert train.main(flags) == 0 and Path(f"runs/{name}/samples.png").is_file()
    assert checkpoints.load_checkpoint(f"runs/{name}")["training"]["finished"]


@pytest.mark.parametrize("error", [RuntimeError("out of\nmemory"), OSError("no space"), ValueError("a font")])
def test_a_preview_that_fails_is_a_warning(cwd, monkeypatch, capsys, error):
    """The step is saved before, and the training goes on to its end."""
    seen = []

    def fail(self, model, stop, rows=3):
        seen.append(checkpoints.load_checkpoint("runs/unseen")["step"])
        raise error

    shutil.rmtree("runs/unseen", ignore_errors=True)
    monkeypatch.setattr(train.Denoising, "preview", fail)
    monkeypatch.setattr(run, "loss_curve", lambda records: 1 / 0 if not records else Image.new("P", (1, 1)))
    assert train.main(["--arch", "dit", *ON_VAE, "--steps", "2", "--name", "unseen"]) == 0
    assert seen == [2, 2, 2] and checkpoints.load_checkpoint("runs/unseen")["training"]["finished"]
    printed = capsys.readouterr()
    for name in ("preview-000002-ema.png", "preview-000002-raw.png", "samples.png"):
        assert f"warning: {name} could not be made ({' '.join(str(error).split())})\n" in printed.err
    assert "runs/unseen/loss.png after" in printed.out and "samples.png" not in printed.out


def test_a_signal_during_the_vae_ends_the_command(tmp_path, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "p", classes=False)
    original = train.Autoencoding.loss

    def loss(self, model, indices):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, model, indices)

    monkeypatch.setattr(train.Autoencoding, "loss", loss)
    assert train.main(["--arch", "dit", "--data", "p", *QUICK, *TINY_VAE]) == 143
    assert [path.name for path in Path("runs").iterdir()] == ["p-vae"]


def test_text_runs_resume_bit_for_bit(cwd, text_runs, monkeypatch):
    """Dropped and reworded prompts too: interrupted and continued is the same as in one go."""
    plain = data.load_folder
    monkeypatch.setattr(data, "load_folder",
                        lambda *a, **k: replace(plain(*a, **k), vary=toys.omit_details))
    flags = ["--arch", "mmdit", "--data", "scenes", *ON_VAE, "--save-every", "1"]
    train.main([*flags, "--name", "at-once"])
    calls = signal_at(monkeypatch, 2)
    train.main([*flags, "--name", "parts"])
    assert checkpoints.load_checkpoint("runs/parts")["step"] == 2
    train.main([*flags, "--name", "parts"])
    assert same(weights("runs/at-once"), weights("runs/parts")) and len(calls) == 3


def test_a_run_of_an_earlier_version_resumes(cwd, monkeypatch):
    """As it was written before settings.py existed: the settings then also held vae_name, and there was one
    average, of a constant decay."""
    flags = ["--arch", "unet", "--objective", "ddpm", *ON_VAE, "--save-every", "1", "--ema", "0.998"]
    train.main([*flags, "--name", "in-one-go"])
    with monkeypatch.context() as patch:
        signal_at(patch, 2)
        train.main([*flags, "--name", "earlier"])
    file = Path("runs/earlier/settings.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vae_name": "shapes-vae"}, indent=1))
    checkpoint = checkpoints.load_checkpoint("runs/earlier")
    assert checkpoint["step"] == 2 and set(checkpoint) == {
        "arch", "config", "objective", "step", "data", "text", "label_dropout", "vae", "model", "ema",
        "training"}
    assert checkpoint["objective"] == {"name": "ddpm", "zero_terminal_snr": False}
    assert set(checkpoint["data"]) == {"source", "size", "classes", "prompts"}
    assert set(checkpoint["training"]) == {"optimizer", "data", "encoder", "steps", "rise", "finished",
                                          "rng", "cuda_rng"}
    train.main([*flags, "--name", "earlier"])
    assert same(weights("runs/in-one-go"), weights("runs/earlier"))
    assert same(weights("runs/in-one-go", "ema"), weights("runs/earlier", "ema"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_never_saved(cwd, monkeypatch, value):
    """The last update may overflow after a loss that was finite; the checkpoint before it stays."""
    average = State.average

    def overflow(self, decay):
        average(self, decay)
        list(self.model.parameters())[0].data.view(-1)[0] = value

    name = f"overflow{value}"
    monkeypatch.setattr(State, "average", overflow)
    with pytest.raises(FloatingPointError, match=f"not finite after step 1, fp32: .*{name}.* last good "
                       "weights; repeat the command with a lower --lr: it continues from step 0$"):
        train.main(["--arch", "dit", *ON_VAE, "--save-every", "1", "--name", name])
    assert run.Run(Path("runs") / name).load()["step"] == 0


def test_non_finite_loss_never_reaches_a_checkpoint(cwd, monkeypatch):
    original, calls = train.Denoising.loss, []

    def loss(self, model, indices):
        value, t = original(self, model, indices)
        calls.append(1)
        return (value * float("nan") if len(calls) == 13 else value), t

    monkeypatch.setattr(train.Denoising, "loss", loss)
    with pytest.raises(FloatingPointError, match=r"nan .* at step 13, times 0\.\d+ to 0\.\d+, fp32.*"
                       "lower --lr: it continues from step 10$"):
        train.main([*RESUME, *VAE, "--name", "nan"])
    checkpoint = checkpoints.load_checkpoint("runs/nan")
    assert checkpoint["step"] == 10 and all(torch.isfinite(v).all() for v in checkpoint["model"].values())


# ---- runs that are lengthened, changed and kept

LONG = ["--arch", "dit", *ON_VAE, "--batch-size", "8", "--cooldown", "0.5", "--warmup", "2", "--log-every",
        "1"]


def rates(name):
    return [record["lr"] for record in map(json.loads, open(f"runs/{name}/metrics.jsonl")) if "lr" in record]


def test_a_run_is_lengthened_before_its_rate_falls(cwd, monkeypatch, capsys):
    """To the bit a run of that length."""
    train.main([*LONG, "--steps", "12", "--name", "long"])
    with monkeypatch.context() as patch:
        signal_at(patch, 3)                                                         # it falls from step 4 on
        assert train.main([*LONG, "--steps", "8", "--name", "longer"]) == 130
    capsys.readouterr()
    assert train.main([*LONG, "--steps", "12", "--name", "longer"]) == 0
    out = capsys.readouterr().out
    assert "runs/longer: --steps 12 from step 3 on, before 8" in out and "exactly a run of that length" in out
    assert "not exactly" not in out and rates("longer") == rates("long")
    for key in ("model", "ema"):
        assert same(weights("runs/longer", key), weights("runs/long", key))
    assert json.loads(Path("runs/longer/settings.json").read_text())["steps"] == 12
    train.main([*LONG, "--steps", "12", "--name", "longer"])                        # and is finished as such
    assert "runs/longer is finished: 12 steps" in capsys.readouterr().out


def test_a_finished_run_is_lengthened(cwd, monkeypatch, capsys):
    """The rate rises anew, once, also where that is interrupted."""
    flags = [*LONG, "--lr", "0.004", "--warmup", "4", "--name", "long-again"]
    train.main([*flags, "--steps", "4"])
    before = Path("runs/long-again/checkpoint.pt").read_bytes()
    for more, message in (
            (["--steps", "4", "--lr", "0.5"], "--lr 0.5: runs/long-again is finished.* 0.004; raise"),
            (["--steps", "3"], "holds a run with --steps 4, not 3; .*, or raise --steps")):
        with pytest.raises(ValueError, match=message):
            train.main([*flags, *more])
    assert Path("runs/long-again/checkpoint.pt").read_bytes() == before
    capsys.readouterr()
    with monkeypatch.context() as patch:
        signal_at(patch, 1)
        assert train.main([*flags, "--steps", "8"]) == 130
    out = capsys.readouterr().out
    assert "--steps 8 from step 4 on, before 4" in out and "rises again to at most 0.5 of --lr" in out
    train.main([*flags, "--steps", "8"])
    assert "before 4" not in capsys.readouterr().out
    found = [round(rate / 0.004, 6) for rate in rates("long-again")]
    assert found == [0.25, 0.5, 0.75, 0.5, 0.25, 0.5, 0.5, 0.25]
    assert checkpoints.load_checkpoint("runs/long-again")["step"] == 8


@pytest.mark.parametrize("steps, saved, expected, rise", [
    (2400, dict(steps=2400), None, 0),
    (3600, dict(step=1000), "had not begun to fall; this is exactly a run", 0),
    (3600, dict(step=1000, rise=500), "had not begun to fall; this is not exactly a run", 500),
    (3600, dict(step=1000, lr=0.5), "had not begun to fall; this is not exactly a run", 0),
    (2600, {}, "again to at most 0.14 of --lr, as it falls .* 0.5 of all steps; for the full rate give "
               "--steps 4998; this is not exactly", 2400),
    (4997, {}, "again to at most 0.99 of --lr.* give --steps 4998;", 2400),
    (4998, {}, "had begun to fall; it rises again within 100 steps; this is not exactly", 2400),
])
def test_what_more_steps_mean_for_the_rate(steps, saved, expected, rise):
    args = settings.parse(["--arch", "dit", "--steps", str(steps), "--cooldown", "0.5", "--warmup", "100"])
    begun = vars(args) | {"steps": 2400} | {key: value for key, value in saved.items() if key == "lr"}
    checkpoint = {"step": saved.get("step", 2400), "training": {"steps": 2400, "rise": saved.get("rise", 0)}}
    words, found = train.changes(args, SimpleNamespace(read_settings=lambda: begun), checkpoint)
    assert found == rise and (re.search(expected, words[-1]) if expected else words == [])


def test_rate_and_batch_change_where_they_are_asked_for(cwd, monkeypatch, capsys):
    flags = [*LONG, "--steps", "6", "--cooldown", "0", "--lr", "0.004", "--name", "changed"]
    with monkeypatch.context() as patch:
        signal_at(patch, 3)
        train.main(flags)
    sizes = []
    original = train.Denoising.loss
    monkeypatch.setattr(train.Denoising, "loss", lambda self, model, indices:
                        sizes.append(len(indices)) or original(self, model, indices))
    capsys.readouterr()
    train.main([*flags, "--lr", "0.001", "--batch-size", "4"])
    out = capsys.readouterr().out
    for change in ("--lr 0.001 from step 3 on, before 0.004", "--batch-size 4 from step 3 on, before 8"):
        assert change in out
    assert rates("changed") == [0.002, 0.004, 0.004, 0.001, 0.001, 0.001] and sizes == [4, 4, 4]
    found = run.Run(Path("runs/changed")).read_settings()
    assert found["lr"] == 0.001 and found["batch_size"] == 4


def test_keep_and_keep_best(cwd, monkeypatch):
    """The latest of them, and the best by the validation loss, although it is not the last."""
    losses = iter([0.5, 0.2, 0.4, 0.3])
    monkeypatch.setattr(train.Denoising, "validate", lambda self, model, stop: {"val_loss": next(losses)})
    train.main([*LONG, "--steps", "8", "--val-every", "2", "--save-every", "3", "--keep", "2", "--keep-best",
                "--name", "long-kept"])
    found = {path.name: checkpoints.load_checkpoint(path)["step"]
             for path in Path("runs/long-kept").glob("*.pt")}
    assert found == {"checkpoint.pt": 8, "checkpoint-000006.pt": 6, "checkpoint-000008.pt": 8, "best.pt": 4}
    assert draw_two("runs/long-kept/best.pt").shape == (2, 32, 32, 3)             # each is a checkpoint


@pytest.mark.parametrize("seconds, steps, expected", [
    (0.5, 100, "0.5 s a step.*: about 50 seconds are left"), (0.5, 1000, ": about 8 minutes are left"),
    (1.234, 10_000, "1.2 s a step.*: about 3.4 hours are left, and then the samples$"),
])
def test_what_is_left_is_said(seconds, steps, expected):
    assert re.search(expected, train.forecast(seconds, steps, torch.device("cpu"), "and then the samples"))


def test_what_follows_is_said(tmp_path, monkeypatch, quick, capsys):
    """After the VAE the network; of less than five seconds nothing."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "p", classes=False)
    clock, plain = [0.0], train.update
    monkeypatch.setattr(train.time, "monotonic", lambda: clock[0])

    def update(*inputs):
        clock[0] += seconds
        return plain(*inputs)

    monkeypatch.setattr(train, "update", update)
    flags = ["--arch", "dit", "--data", "p", *QUICK, "--vae-preset", "tiny", "--batch-size", "2",
             "--vae-steps", "27", "--image-size", "8"]
    for name, seconds in (("slow", 2.6), ("quick", 2.4)):
        train.main([*flags, "--runs-dir", name])
        printed = capsys.readouterr()
        text = printed.out + printed.err
        ends = ", and then the scale of its latents; the network follows" in text
        assert ends == (": about 5 seconds are left" in text) == (name == "slow")
        assert "MiB of memory for weights, optimizer and a batch; step 0 of 27" in printed.out


# ---- pictures that have changed

def test_the_way_forward_with_other_pictures(tmp_path, monkeypatch, quick):
    """Once the pictures have changed, the commands that the message names work; a copy is no change."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "my pictures", True)
    rest = ["--image-size", "16", "24", *QUICK]
    network = ["--arch", "dit", "--data", "my pictures", *rest]
    train.main([*network, *TINY_VAE])
    shutil.copytree("my pictures", "copy/my pictures", copy_function=shutil.copyfile)
    train.main(["--arch", "dit", "--data", "copy/./my pictures", *rest, "--vae", "runs/my pictures-16x24-vae",
                "--name", "copied"])
    Image.new("RGB", (30, 20)).save("my pictures/a/new.png")
    with pytest.raises(ValueError, match="are not those that") as refused:
        train.main([*network, *TINY_VAE, "--name", "other"])
    message = str(refused.value)
    command = re.search(r"train.py (--arch vae .*?), then", message).group(1)
    train.main([*shlex.split(command), "--vae-preset", "tiny", "--steps", "2", "--batch-size", "8"])
    for i, vae in enumerate(re.findall(r"--vae ('.*?'|\S+)", message)):
        train.main([*network, *shlex.split(f"--vae {vae}"), "--name", f"other-{i}"])
        assert checkpoints.load_checkpoint(f"runs/other-{i}")["training"]["finished"]
    assert i == 1
