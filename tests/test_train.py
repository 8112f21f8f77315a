"""train.py as a user meets it, with tiny networks: whole runs, the loop, interruptions, bad input."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DONE, QUICK, ROOT, Recorder, denoising, files, pictures, same, weights
from PIL import Image

import data
import run
import sample
import settings
import toys
import train

KILLS = int(os.environ.get("KILLS", 2))   # KILLS=20 for the long version


# ---- a whole run

def test_a_finished_run_leaves_what_it_promises(cwd, capsys):
    assert {"checkpoint.pt", "settings.json", "metrics.jsonl", "loss.png",
            "samples.png"} <= files(cwd / "runs/done")
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
    checkpoint = run.load_checkpoint("runs/done")                     # weights_only, on the CPU
    assert not any(k.startswith(("_orig_mod", "module")) for k in checkpoint["model"])
    assert not same(checkpoint["model"], checkpoint["ema"])
    before = (cwd / "runs/done/checkpoint.pt").read_bytes()
    train.main(DONE)
    assert (cwd / "runs/done/checkpoint.pt").read_bytes() == before   # a finished run is not trained further
    assert "python sample.py runs/done --label red-circle" in capsys.readouterr().out


def test_latent_statistics_are_measured_once_over_the_training_set(cwd):
    vae = run.load_vae("runs/shapes-vae")
    latents = torch.from_numpy(np.load("runs/shapes-vae/latents.npy").astype(np.float64))
    assert len(latents) == 20_000
    torch.testing.assert_close(vae.latent_mean.double(), latents[:, :, 0].mean((0, 1, 3, 4)),
                               rtol=1e-4, atol=1e-5)
    z = latents[:, 0, 0] + latents[:, 0, 1] * torch.randn(latents[:, 0, 0].shape, dtype=torch.float64)
    x0 = vae.normalize(z.float())
    assert x0.mean((0, 2, 3)).abs().max() < 0.01 and (x0.std((0, 2, 3)) - 1).abs().max() < 0.01
    inside = run.unpack_vae(run.load_checkpoint("runs/done")["vae"])        # the run carries the same VAE
    assert same(inside.state_dict(), vae.state_dict())


@pytest.mark.parametrize("arch", ["dit", "unet"])
@pytest.mark.parametrize("objective, prediction", [("rf", None), ("rf", "v"), ("rf", "x0"), ("rf", "eps"),
                                                   ("ddpm", None), ("ddpm", "v"), ("ddpm", "x0")])
def test_every_combination_trains_and_samples(cwd, arch, objective, prediction):
    name = f"{arch}-{objective}-{prediction}"
    train.main(["--arch", arch, "--objective", objective, *QUICK, "--name", name,
                *(["--prediction", prediction] if prediction else [])])
    checkpoint = run.load_checkpoint(f"runs/{name}")
    assert (checkpoint["objective"].get("prediction") == prediction
            and checkpoint["config"]["num_classes"] == 24)
    for sampler in sample.SAMPLERS:
        images = pictures(f"runs/{name}", "--sampler", sampler, out=f"{name}.npz")
        assert images.shape == (2, 32, 32, 3) and len(np.unique(images)) > 1


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
    train.main(["--arch", arch, "--data", "pictures", "--image-size", "16", "24", *QUICK, *options,
                "--vae-preset", "tiny", "--vae-steps", "2"])
    folder = f"runs/pictures-16x24-{arch}-rf"
    sample.main([folder, "--n", "3", "--steps", "2", "--out", "x.npz"])
    assert np.load("x.npz")["arr_0"].shape == (3, 16, 24, 3)
    assert run.load_checkpoint(folder)["data"]["classes"] == (["a", "b", "c"] if classes else [])
    if not classes:
        with pytest.raises(ValueError, match="without conditions"):
            sample.main([folder, "--label", "0"])
    else:
        train.main(["--arch", arch, "--data", "pictures", "--image-size", "16", "24", *QUICK, *options,
                    "--cond", "none", "--name", "plain"])
        assert run.load_checkpoint("runs/plain")["config"]["num_classes"] == 0
    make_folder(tmp_path / "pictures", classes)        # the same pictures, touched: another fingerprint
    with pytest.raises(ValueError, match="changed since"):
        train.main(["--arch", arch, "--data", "pictures", "--image-size", "16", "24", *QUICK, *options,
                    "--vae-preset", "tiny", "--vae-steps", "2"])


@pytest.mark.parametrize("classes", [True, False])
def test_a_vae_trained_with_captions_serves_its_networks(tmp_path, monkeypatch, quick, classes):
    """--cond text is a setting of the VAE's own run; networks on its data take it as it is."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "pictures", classes)
    for picture in list((tmp_path / "pictures").rglob("*.png")):
        picture.with_suffix(".txt").write_text(f"picture {picture.stem}")
    shared = ["--data", "pictures", "--image-size", "16", "24", *QUICK[:4], *QUICK[6:]]
    train.main(["--arch", "vae", *shared, "--cond", "text", "--vae-preset", "tiny"])
    before = Path("runs/pictures-16x24-vae/checkpoint.pt").read_bytes()
    for arch in ("mmdit", "dit"):
        train.main(["--arch", arch, *shared, "--preset", "tiny"])
        assert run.load_checkpoint(f"runs/pictures-16x24-{arch}-rf")["training"]["finished"]
    assert Path("runs/pictures-16x24-vae/checkpoint.pt").read_bytes() == before


def test_grey_data(tmp_path, monkeypatch, quick):
    from test_data import write_idx
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for part in ("train", "t10k"):
        write_idx(tmp_path / "data" / "mnist" / f"{part}-images-idx3-ubyte.gz",
                  rng.integers(0, 256, (30, 28, 28)))
        write_idx(tmp_path / "data" / "mnist" / f"{part}-labels-idx1-ubyte.gz", np.arange(30) % 10)
    train.main(["--arch", "unet", "--objective", "ddpm", "--data", "mnist", *QUICK,
                "--vae-preset", "tiny", "--vae-steps", "2"])
    sample.main(["runs/mnist-unet-ddpm", "--n", "2", "--steps", "2", "--label", "7", "--out", "out"])
    assert sorted(p.name for p in Path("out").iterdir()) == ["000000-7.png", "000001-7.png"]
    assert Image.open("out/000000-7.png").mode == "L"


def test_the_vae_of_a_captioned_folder_is_that_of_its_pictures(cwd, text_runs, capsys):
    """It was trained before a network with text. Its own command, without captions, finds it finished."""
    train.main(["--arch", "vae", "--data", "scenes", "--vae-preset", "tiny", "--steps", "60", *QUICK[6:8]])
    assert "runs/scenes-vae is finished: 60 steps" in capsys.readouterr().out


# ---- what the loop does

def test_training_uses_normalised_latents(cwd):
    task, model = denoising(), Recorder()
    task.path.sample_t = lambda n: torch.full((n,), 1e-5)
    task.loss(model, np.arange(4000))
    xt = model.seen[0][0]
    assert xt.mean((0, 2, 3)).abs().max() < 0.1 and (xt.std((0, 2, 3)) - 1).abs().max() < 0.1


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
    network = run.build_model("dit", run.load_checkpoint("runs/done")["config"])
    state = torch.get_rng_state()
    with torch.no_grad():
        first, second = task.validate(network), task.validate(network)
        task.preview(network, 2)
    assert first == second and torch.equal(torch.get_rng_state(), state)
    assert sorted(task.t.tolist()) == [(i + 0.5) / len(task.t) for i in range(len(task.t))]


def test_ema_and_learning_rate(cwd):
    """Three runs of 1, 2, 3 steps give the raw weights from which the averaged ones must follow."""
    raws = []
    for steps in (1, 2, 3):
        flags = ["--arch", "dit", *QUICK[:2], "--steps", str(steps), *QUICK[4:], "--cooldown", "0",
                 "--warmup", "0", "--name", f"ema{steps}", "--ema", "0.15"]
        train.main(flags)
        raws.append(weights(f"runs/ema{steps}"))
    torch.manual_seed(0)
    want = {k: v.clone() for k, v in run.build_model(
        "dit", run.load_checkpoint("runs/ema1")["config"]).state_dict().items()}
    for raw, decay in zip(raws, (1 / 10, 0.15, 0.15)):      # (step + 1) / (step + 10), capped by --ema
        want = {k: decay * v + (1 - decay) * raw[k] for k, v in want.items()}
    for k, v in weights("runs/ema3", "ema").items():
        torch.testing.assert_close(v, want[k], rtol=1e-5, atol=1e-7)
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
        train.main(["--arch", "dit", *QUICK, "--accumulate", str(pieces), "--name", f"pieces{pieces}"])
    a, b = (weights(f"runs/pieces{pieces}") for pieces in (1, 4))
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=2e-5)


def test_grad_checkpoint_trains_the_same(cwd):
    flags = ["--arch", "unet", *QUICK]
    train.main([*flags, "--name", "kept"])
    train.main([*flags, "--name", "again", "--grad-checkpoint"])
    assert same(weights("runs/kept"), weights("runs/again"))


# ---- interruption

RESUME = ["--arch", "dit", "--steps", "30", *QUICK[:2], *QUICK[4:], "--save-every", "5",
          "--log-every", "3", "--val-every", "10"]


def command(name):
    return [sys.executable, str(ROOT / "train.py"), *RESUME, "--name", name]


def test_kill_9_at_random_moments(cwd):
    """Killed wherever it may be, the rerun ends in the same bits,
    and the checkpoint is loadable at every moment."""
    train.main([*RESUME, "--name", "whole"])
    started = time.time()
    subprocess.run(command("timed"), check=True, capture_output=True)
    length, rng = time.time() - started, random.Random(os.environ.get("KILL_SEED", 0))
    for _ in range(KILLS):
        process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.3, 1.0) * length)
        process.kill()
        process.wait()
        if (cwd / "runs/killed/checkpoint.pt").is_file():
            run.load_checkpoint("runs/killed")
    subprocess.run(command("killed"), check=True, capture_output=True)
    whole, killed = (run.load_checkpoint(f"runs/{name}") for name in ("whole", "killed"))
    for key in ("model", "ema"):
        assert same(whole[key], killed[key])
    assert torch.equal(whole["training"]["rng"], killed["training"]["rng"])
    lines = [[{k: v for k, v in json.loads(line).items()}
              for line in open(f"runs/{name}/metrics.jsonl")] for name in ("whole", "killed")]
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_finish_the_step_and_save(cwd, monkeypatch, capsys, number):
    name = f"signal{int(number)}"
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        signal_at(patch, 7, number)
        train.main([*RESUME, "--name", name])
    assert signal.getsignal(number) is handler and "the same command continues" in capsys.readouterr().out
    assert run.load_checkpoint(f"runs/{name}")["step"] == 7              # between two planned checkpoints
    with open(f"runs/{name}/metrics.jsonl", "a") as out:
        out.write('{"step": 9, "lo')                                            # a line truncated by a kill
    train.main([*RESUME, "--name", name])
    assert all(json.loads(line) for line in open(f"runs/{name}/metrics.jsonl"))
    if not (cwd / "runs/whole").exists():
        train.main([*RESUME, "--name", "whole"])
    assert (same(weights("runs/whole"), weights(f"runs/{name}"))
            and same(weights("runs/whole", "ema"), weights(f"runs/{name}", "ema")))


def test_text_runs_resume_bit_for_bit(cwd, text_runs, monkeypatch):
    """Dropped and reworded prompts too: interrupted and continued is the same as in one go."""
    plain = data.load_folder
    monkeypatch.setattr(data, "load_folder",
                        lambda *a, **k: replace(plain(*a, **k), vary=toys.omit_details))
    flags = ["--arch", "mmdit", "--data", "scenes", *QUICK, "--save-every", "1"]
    train.main([*flags, "--name", "at-once"])
    calls = signal_at(monkeypatch, 2)
    train.main([*flags, "--name", "parts"])
    assert run.load_checkpoint("runs/parts")["step"] == 2
    train.main([*flags, "--name", "parts"])
    assert same(weights("runs/at-once"), weights("runs/parts")) and len(calls) == 3


def test_a_run_of_an_earlier_version_resumes(cwd, monkeypatch):
    """As it was written before settings.py existed: the settings then also held vae_name."""
    flags = ["--arch", "unet", "--objective", "ddpm", *QUICK, "--save-every", "1"]
    train.main([*flags, "--name", "in-one-go"])
    with monkeypatch.context() as patch:
        signal_at(patch, 2)
        train.main([*flags, "--name", "earlier"])
    file = Path("runs/earlier/settings.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vae_name": "shapes-vae"}, indent=1))
    checkpoint = run.load_checkpoint("runs/earlier")
    assert checkpoint["step"] == 2 and set(checkpoint) == {
        "arch", "config", "objective", "step", "data", "text", "label_dropout", "vae", "model", "ema",
        "training"}
    assert checkpoint["objective"] == {"name": "ddpm", "zero_terminal_snr": False}
    assert set(checkpoint["data"]) == {"source", "size", "classes", "prompts"}
    assert set(checkpoint["training"]) == {"optimizer", "data", "encoder", "finished", "rng", "cuda_rng"}
    train.main([*flags, "--name", "earlier"])
    assert same(weights("runs/in-one-go"), weights("runs/earlier"))
    assert same(weights("runs/in-one-go", "ema"), weights("runs/earlier", "ema"))


def test_non_finite_loss_never_reaches_a_checkpoint(cwd, monkeypatch):
    original, calls = train.Denoising.loss, []

    def loss(self, model, indices):
        value, t = original(self, model, indices)
        calls.append(1)
        return (value * float("nan") if len(calls) == 13 else value), t

    monkeypatch.setattr(train.Denoising, "loss", loss)
    with pytest.raises(FloatingPointError, match=r"nan .* at step 13, times 0\.\d+ to 0\.\d+, fp32"):
        train.main([*RESUME, "--name", "nan"])
    checkpoint = run.load_checkpoint("runs/nan")
    assert checkpoint["step"] == 10 and all(torch.isfinite(v).all() for v in checkpoint["model"].values())


# ---- bad input to train.py

@pytest.mark.parametrize("flags, message", [
    (["--arch", "dit", "--data", "no/such/folder"], "neither a built-in source"),
    (["--arch", "dit", "--image-size", "30"], "multiple of 8"),
    (["--arch", "unet", "--image-size", "32", "36"], "width of 8"),
    (["--arch", "dit", "--image-size", "32", "40", "--patch", "2", "4"], "width of 16"),
    (["--arch", "vae", "--image-size", "30"], "multiple of 4"),
    (["--arch", "dit", "--image-size", "32", "32", "32"], "one side, or height and width"),
    (["--arch", "dit", "--steps", "0"], "--steps 0"),
    (["--arch", "dit", "--label-dropout", "1.5"], "--label-dropout 1.5"),
    (["--arch", "dit", "--schedule", "cosine"], "belongs to --objective ddpm"),
    (["--arch", "dit", "--objective", "ddpm", "--shift", "3"], "belongs to --objective rf"),
    (["--arch", "unet", "--patch", "2"], "belongs to --arch dit"),
    (["--arch", "unet", "--conv"], "--conv.*: belongs to --arch dit or mmdit, not unet"),
    (["--arch", "dit", "--cond", "text"],
     "--cond text: --arch dit takes --cond class or none; --cond text goes with --arch mmdit or unet"),
    (["--arch", "mmdit", "--cond", "class"], "--cond class: --arch mmdit takes --cond text"),
    (["--arch", "mmdit", "--text-encoder", "bert"], "--text-encoder bert: must be bytes, clip:FOLDER"),
    (["--arch", "mmdit", "--text-encoder", "clip"], "--text-encoder clip: must be"),
    (["--arch", "mmdit", "--text-encoder", "clip:nowhere"], "clip:nowhere: no text encoder there"),
    (["--arch", "unet", "--text-encoder", "bytes"], "belongs to --cond text"),
    (["--arch", "mmdit", "--text-encoder", "none", "--vae", "runs/shapes-vae"], "give a folder"),
    (["--arch", "dit", "--objective", "ddpm", "--zero-terminal-snr"], "zero terminal SNR"),
    (["--arch", "dit", "--objective", "ddpm", "--prediction", "velocity"], "velocity"),
    (["--arch", "dit", "--preset", "S/3"], "--preset S/3"),
    (["--arch", "vae", "--preset", "S/2"], "--vae-preset"),
    (["--arch", "dit", "--vae", "runs/shapes-vae", "--latent-channels", "8"], "trained already"),
    (["--arch", "dit", "--vae", "runs/none"], "no checkpoint"),
    (["--arch", "dit", "--batch-size", "10", "--accumulate", "3"], "--accumulate 3"),
    (["--arch", "dit", "--device", "cuda:7"], "--device cuda:7"),
])
def test_train_refuses_before_anything_is_written(cwd, flags, message):
    before = files(cwd)
    with pytest.raises(ValueError, match=message):
        train.main([*flags, "--name", "refused"])
    assert files(cwd) == before


def test_pictures_without_words_are_refused_before_a_vae_is_trained(cwd):
    Path("mute").mkdir()
    Image.fromarray(toys.draw_shape(0)).save("mute/0.png")
    before = files(cwd)
    for more, message in (([], "pictures without words"), (["--text-encoder", "none"], "no mute/0.npz")):
        with pytest.raises(ValueError, match=message):
            train.main(["--arch", "mmdit", "--data", "mute", *QUICK, *more])
    assert files(cwd) == before
