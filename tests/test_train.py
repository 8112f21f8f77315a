"""train.py and sample.py as a user meets them, with tiny networks."""

import copy
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import dit
import sample
import train
import unet
from conftest import ROOT

KILLS = int(os.environ.get("KILLS", 2))   # KILLS=20 for the long version
QUICK = ["--batch-size", "8", "--steps", "3", "--preset", "tiny", "--precision", "fp32",
         "--preview-every", "1000"]
DONE = ["--arch", "dit", "--steps", "60", *QUICK[:2], *QUICK[4:], "--name", "done", "--log-every", "5",
        "--val-every", "20", "--warmup", "5"]


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with a trained (for seconds) VAE and one finished run on it."""
    folder = tmp_path_factory.mktemp("home")
    old, train.SAMPLE_ROWS = os.getcwd(), 1         # the tests need no 240 samples per run, nor good ones
    for defaults in sample.DRAW_DEFAULTS.values():
        defaults["steps"] = 3
    os.chdir(folder)
    train.main(["--arch", "vae", "--vae-preset", "tiny", "--steps", "40", "--batch-size", "16",
                "--precision", "fp32", "--preview-every", "40"])
    train.main(DONE)
    yield folder
    os.chdir(old)


@pytest.fixture
def cwd(home, monkeypatch):
    monkeypatch.chdir(home)
    return home


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def weights(run, key="model"):
    return sample.load_checkpoint(run)[key]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


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
    checkpoint = sample.load_checkpoint("runs/done")                  # weights_only, on the CPU
    assert not any(k.startswith(("_orig_mod", "module")) for k in checkpoint["model"])
    assert not same(checkpoint["model"], checkpoint["ema"])
    before = (cwd / "runs/done/checkpoint.pt").read_bytes()
    train.main(DONE)
    assert (cwd / "runs/done/checkpoint.pt").read_bytes() == before   # a finished run is not trained further
    assert "python sample.py runs/done --label red-circle" in capsys.readouterr().out


def test_latent_statistics_are_measured_once_over_the_training_set(cwd):
    vae = sample.load_vae("runs/shapes-vae")
    latents = torch.from_numpy(np.load("runs/shapes-vae/latents.npy").astype(np.float64))
    assert len(latents) == 20_000
    torch.testing.assert_close(vae.latent_mean.double(), latents[:, :, 0].mean((0, 1, 3, 4)),
                               rtol=1e-4, atol=1e-5)
    z = latents[:, 0, 0] + latents[:, 0, 1] * torch.randn(latents[:, 0, 0].shape, dtype=torch.float64)
    x0 = vae.normalize(z.float())
    assert x0.mean((0, 2, 3)).abs().max() < 0.01 and (x0.std((0, 2, 3)) - 1).abs().max() < 0.01
    inside = sample.unpack_vae(sample.load_checkpoint("runs/done")["vae"])  # the run carries the same VAE
    assert same(inside.state_dict(), vae.state_dict())


@pytest.mark.parametrize("arch", ["dit", "unet"])
@pytest.mark.parametrize("objective, prediction", [("rf", None), ("rf", "v"), ("rf", "x0"), ("rf", "eps"),
                                                   ("ddpm", None), ("ddpm", "v"), ("ddpm", "x0")])
def test_every_combination_trains_and_samples(cwd, arch, objective, prediction):
    name = f"{arch}-{objective}-{prediction}"
    train.main(["--arch", arch, "--objective", objective, *QUICK, "--name", name,
                *(["--prediction", prediction] if prediction else [])])
    checkpoint = sample.load_checkpoint(f"runs/{name}")
    assert (checkpoint["objective"].get("prediction") == prediction
            and checkpoint["config"]["num_classes"] == 24)
    for sampler in sample.SAMPLERS:
        sample.main([f"runs/{name}", "--n", "2", "--steps", "3", "--sampler", sampler,
                     "--out", f"{name}.npz"])
        images = np.load(f"{name}.npz")["arr_0"]
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
def test_own_pictures_of_any_size(tmp_path, monkeypatch, arch, options, classes):
    """A folder with or without classes, 16 x 24: VAE, latents, network and samples from one command."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "pictures", classes)
    train.main(["--arch", arch, "--data", "pictures", "--image-size", "16", "24", *QUICK, *options,
                "--vae-preset", "tiny", "--vae-steps", "2"])
    run = f"runs/pictures-16x24-{arch}-rf"
    sample.main([run, "--n", "3", "--steps", "2", "--out", "x.npz"])
    assert np.load("x.npz")["arr_0"].shape == (3, 16, 24, 3)
    assert sample.load_checkpoint(run)["data"]["classes"] == (["a", "b", "c"] if classes else [])
    if not classes:
        with pytest.raises(ValueError, match="without conditions"):
            sample.main([run, "--label", "0"])
    else:
        train.main(["--arch", arch, "--data", "pictures", "--image-size", "16", "24", *QUICK, *options,
                    "--cond", "none", "--name", "plain"])
        assert sample.load_checkpoint("runs/plain")["config"]["num_classes"] == 0
    make_folder(tmp_path / "pictures", classes)        # the same pictures, touched: another fingerprint
    with pytest.raises(ValueError, match="changed since"):
        train.main(["--arch", arch, "--data", "pictures", "--image-size", "16", "24", *QUICK, *options,
                    "--vae-preset", "tiny", "--vae-steps", "2"])


def test_grey_data(tmp_path, monkeypatch):
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


# ---- what the loop does

class Recorder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, xt, t, y=None):
        self.seen.append((xt, t, y))
        return torch.zeros_like(xt)


def denoising(cwd, *flags):
    args = train.resolve(train.parse_args(["--arch", "dit", *QUICK, *flags]))
    vae = sample.load_vae("runs/shapes-vae")
    datasets = [train.load_data("shapes", split, (32, 32), cwd, cwd) for split in ("train", "val")]
    cache = train.encode(vae, datasets[0], args, Path("runs/shapes-vae"))
    return train.Denoising(args, cache, *datasets, vae, train.objective_of(args), 24, None,
                           torch.device("cpu"))


def test_label_dropout_is_per_example_and_once(cwd):
    task, model = denoising(cwd, "--label-dropout", "0.3"), Recorder()
    indices = np.arange(2400)
    task.loss(model, indices)
    y = model.seen[0][2]
    dropped = (y == 24).float().mean().item()
    assert abs(dropped - 0.3) < 5 * (0.3 * 0.7 / 2400) ** 0.5     # neither all-or-nothing nor 0.51
    assert (y[y < 24] == torch.arange(2400)[y < 24] % 24).all()
    task = denoising(cwd, "--label-dropout", "0")
    task.loss(model, indices)
    assert (model.seen[1][2] < 24).all()


def test_training_sees_normalised_latents(cwd):
    task, model = denoising(cwd), Recorder()
    task.path.sample_t = lambda n: torch.full((n,), 1e-5)
    task.loss(model, np.arange(4000))
    xt = model.seen[0][0]
    assert xt.mean((0, 2, 3)).abs().max() < 0.1 and (xt.std((0, 2, 3)) - 1).abs().max() < 0.1


def test_validation_is_fixed_and_leaves_the_generator_alone(cwd):
    task = denoising(cwd)
    network = sample.build_model("dit", sample.load_checkpoint("runs/done")["config"])
    state = torch.get_rng_state()
    with torch.no_grad():
        first, second = task.validate(network), task.validate(network)
        task.preview(network, 2)
    assert first == second and torch.equal(torch.get_rng_state(), state)
    assert sorted(task.t.tolist()) == [(i + 0.5) / len(task.t) for i in range(len(task.t))]


def test_ema_and_learning_rate(cwd):
    """Three runs cut at 1, 2, 3 steps give the raw weights from which the averaged ones must follow."""
    raws = []
    for steps in (1, 2, 3):
        flags = ["--arch", "dit", *QUICK[:2], "--steps", str(steps), *QUICK[4:], "--cooldown", "0",
                 "--warmup", "0", "--name", f"ema{steps}", "--ema", "0.15"]
        train.main(flags)
        raws.append(weights(f"runs/ema{steps}"))
    torch.manual_seed(0)
    want = {k: v.clone() for k, v in sample.build_model(
        "dit", sample.load_checkpoint("runs/ema1")["config"]).state_dict().items()}
    for raw, decay in zip(raws, (1 / 10, 0.15, 0.15)):      # (step + 1) / (step + 10), capped by --ema
        want = {k: decay * v + (1 - decay) * raw[k] for k, v in want.items()}
    for k, v in weights("runs/ema3", "ema").items():
        torch.testing.assert_close(v, want[k], rtol=1e-5, atol=1e-7)
    args = train.resolve(train.parse_args(["--arch", "dit", "--steps", "100", "--lr", "1",
                                           "--warmup", "10", "--cooldown", "0.5"]))
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
            sample.load_checkpoint("runs/killed")
    subprocess.run(command("killed"), check=True, capture_output=True)
    whole, killed = (sample.load_checkpoint(f"runs/{name}") for name in ("whole", "killed"))
    for key in ("model", "ema"):
        assert same(whole[key], killed[key])
    assert torch.equal(whole["training"]["rng"], killed["training"]["rng"])
    lines = [[{k: v for k, v in json.loads(line).items()}
              for line in open(f"runs/{name}/metrics.jsonl")] for name in ("whole", "killed")]
    assert [r["step"] for r in lines[0]] == [r["step"] for r in lines[1]]  # nothing twice, nothing missing
    assert [r.get("val_loss") for r in lines[0]] == [r.get("val_loss") for r in lines[1]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_finish_the_step_and_save(cwd, monkeypatch, capsys, number):
    name, calls, original = f"signal{int(number)}", [], train.Denoising.loss

    def loss(self, model, indices):
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), number)
        return original(self, model, indices)

    monkeypatch.setattr(train.Denoising, "loss", loss)
    handler = signal.getsignal(number)
    train.main([*RESUME, "--name", name])
    assert signal.getsignal(number) is handler and "the same command continues" in capsys.readouterr().out
    assert sample.load_checkpoint(f"runs/{name}")["step"] == 7           # between two planned checkpoints
    monkeypatch.setattr(train.Denoising, "loss", original)
    with open(f"runs/{name}/metrics.jsonl", "a") as out:
        out.write('{"step": 9, "lo')                                            # a line that a kill cut short
    train.main([*RESUME, "--name", name])
    assert all(json.loads(line) for line in open(f"runs/{name}/metrics.jsonl"))
    if not (cwd / "runs/whole").exists():
        train.main([*RESUME, "--name", "whole"])
    assert (same(weights("runs/whole"), weights(f"runs/{name}"))
            and same(weights("runs/whole", "ema"), weights(f"runs/{name}", "ema")))


def test_non_finite_loss_never_reaches_a_checkpoint(cwd, monkeypatch):
    original, calls = train.Denoising.loss, []

    def loss(self, model, indices):
        value, t = original(self, model, indices)
        calls.append(1)
        return (value * float("nan") if len(calls) == 13 else value), t

    monkeypatch.setattr(train.Denoising, "loss", loss)
    with pytest.raises(FloatingPointError, match=r"nan .* at step 13, times 0\.\d+ to 0\.\d+, fp32"):
        train.main([*RESUME, "--name", "nan"])
    checkpoint = sample.load_checkpoint("runs/nan")
    assert checkpoint["step"] == 10 and all(torch.isfinite(v).all() for v in checkpoint["model"].values())


def test_second_process_and_other_settings_are_refused(cwd):
    with train.locked(Path("runs/done/lock")), pytest.raises(ValueError, match="another process"):
        train.main(DONE)
    before = (cwd / "runs/done/checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=f"--lr {train.DEFAULTS['dit']['lr']}, not 0.5"):
        train.main([*DONE, "--lr", "0.5"])
    with pytest.raises(ValueError, match="latent-channels 4, not 8"):
        train.main(["--arch", "dit", *QUICK, "--name", "other", "--latent-channels", "8"])
    assert (cwd / "runs/done/checkpoint.pt").read_bytes() == before


def test_a_vae_trained_under_another_name_may_be_moved_there(cwd, tmp_path):
    folder = shutil.copytree("runs/shapes-vae", tmp_path / "shapes-vae")
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps(settings | {"name": "elsewhere"}))
    train.main(["--arch", "dit", *QUICK, "--name", "on-it", "--runs-dir", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"shapes-vae", "on-it"}


def test_a_full_disk_keeps_the_old_file(tmp_path):
    target = tmp_path / "checkpoint.pt"
    target.write_bytes(b"old")

    def write(file):
        file.write(b"half of the new")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"cannot write .*checkpoint.pt .*MiB left.*No space left"):
        train.write_atomically(target, write)
    assert target.read_bytes() == b"old" and files(tmp_path) == {"checkpoint.pt"}
    with pytest.raises(OSError, match="cannot write"):
        train.write_atomically(target, lambda f: (_ for _ in ()).throw(
            RuntimeError("PytorchStreamWriter failed writing file")))


# ---- the hot path

def test_blocks_compile_once_for_all_sizes():
    """Three blocks and three sizes: one graph for the first size, one more for every other."""
    from torch._dynamo.testing import CompileCounterWithBackend
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = dit.DiT(dit.DiTConfig(width=32, depth=3, heads=2)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    plain = copy.deepcopy(model)
    train.compile_blocks(model, backend=counter)
    assert same(model.state_dict(), plain.state_dict())                   # and the names stay as they are
    for side in (8, 12, 16, 10):
        x, t = torch.randn(2, 4, side, side), torch.rand(2)
        torch.testing.assert_close(model(x, t), plain(x, t))
    assert counter.frame_count == 2
    train.checkpoint_blocks(model)                                        # compiled all the same
    torch._dynamo.reset()
    torch.testing.assert_close(model(x, t), plain(x, t))
    assert counter.frame_count == 3
    torch._dynamo.reset()


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@needs_compiler
def test_compiled_words_of_any_number():
    """The whole way to machine code: a U-Net's listening block, at two sizes of picture and two of text."""
    torch._dynamo.reset()
    block = unet.SpatialTransformer(16, 2, unet.UNetConfig(groups=8, context_width=8, positions=True))
    plain = copy.deepcopy(block)
    train.compile_blocks(block)
    for side, length in ((8, 5), (12, 7)):
        x, context = torch.randn(2, 16, side, side), torch.randn(2, length, 8)
        mask = torch.arange(length) < torch.tensor([[length], [2]])
        got, want = ([out, *torch.autograd.grad(out.square().sum(), list(network.parameters()))]
                     for network in (block, plain) for out in [network(x, context, mask)])
        for a, b in zip(got, want):
            assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6
    torch._dynamo.reset()


@needs_compiler
def test_compiled_sampling_draws_the_same(cwd):
    for out, more in (("plain", []), ("compiled", ["--compile"])):
        sample.main(["runs/done", "--n", "2", "--steps", "4", "--out", f"{out}.npz", *more])
    plain, compiled = (np.load(f"{out}.npz")["arr_0"].astype(int) for out in ("plain", "compiled"))
    assert np.abs(plain - compiled).max() <= 1


def test_compiling_without_a_compiler(cwd, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    before = files(cwd)
    for call in (lambda: sample.main(["runs/done", "--compile", "--out", "no.png"]),
                 lambda: train.main([*DONE, "--name", "new", "--compile"])):
        with pytest.raises(ValueError, match="--compile: found no C"):
            call()
    assert files(cwd) == before


@pytest.mark.parametrize("arch", ["dit", "mmdit", "unet", "vae"])
def test_checkpointed_blocks_keep_less_and_change_nothing(arch):
    config, inputs = {
        "dit": (dict(width=32, depth=3, heads=2), {}),
        "mmdit": (dict(width=32, depth=2, single_depth=2, heads=2, rope=(4, 6, 6), context_width=8,
                       pooled_width=None), {"context": torch.randn(2, 5, 8)}),
        "unet": (dict(widths=(16, 32), groups=8, heads=2), {}),
        "vae": (dict(widths=(8, 16), groups=4), None)}[arch]
    model = sample.build_model(arch, config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t, results = torch.randn(2, 3 if arch == "vae" else 4, 8, 8), torch.rand(2), []
    for checkpointed in (False, True):
        if checkpointed:
            train.checkpoint_blocks(model)
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x: kept.update({x.data_ptr(): x.numel()}) or x, lambda x: x):
            out = model.decode(model.encode(x).mean) if inputs is None else model(x, t, **inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()),
                                                  allow_unused=True)])
        results[-1].append(sum(kept.values()))
    (*want, before), (*got, after) = results
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert after < 0.7 * before


def test_grad_checkpoint_trains_the_same(cwd):
    flags = ["--arch", "unet", *QUICK]
    train.main([*flags, "--name", "kept"])
    train.main([*flags, "--name", "again", "--grad-checkpoint"])
    assert same(weights("runs/kept"), weights("runs/again"))


# ---- words

@pytest.fixture(scope="session")
def listeners(home):
    """Two runs on captioned pictures, one of each family."""
    folder = home / "scenes"
    folder.mkdir()
    for i in range(200):
        scene = data.describe_scene(i)
        Image.fromarray(data.draw_scene(scene, i)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(scene.caption)
    shared = ["--data", "scenes", "--cond", "text", *QUICK[:2], *QUICK[4:], "--steps", "40", "--warmup", "5"]
    train.main(["--arch", "mmdit", *shared, "--vae-preset", "tiny", "--vae-steps", "60", "--name", "mmdit"])
    train.main(["--arch", "unet", "--objective", "ddpm", *shared, "--name", "words"])
    return ["runs/mmdit", "runs/words"]


def speak(run, *flags, out="words.npz"):
    sample.main([run, "--steps", "3", "--n", "2", "--out", out, *flags])
    return np.load(out)["arr_0"].astype(int)


def test_prompt_dropout_is_per_example_and_once(cwd, listeners, monkeypatch):
    args = train.resolve(train.parse_args(["--arch", "mmdit", "--data", "scenes", *QUICK, "--label-dropout",
                                           "0.3"]))
    vae, home = sample.load_vae("runs/scenes-vae"), Path("runs/scenes-vae")
    parts = [train.load_data("scenes", split, (32, 32), cwd, home, words="captions")
             for split in ("train", "val")]
    rest = vae, train.objective_of(args), 0
    cache, cpu = train.encode(vae, parts[0], args, home), torch.device("cpu")
    task = train.Denoising(args, cache, *parts, *rest, None, cpu)

    def model(xt, t):
        return torch.zeros_like(xt)

    model.text, heard = None, []
    monkeypatch.setattr(train, "listen", lambda model, encode, prompts: heard.extend(prompts) or {})
    indices = np.arange(len(parts[0])).repeat(20)
    task.loss(model, indices)
    assert abs(heard.count("") / len(heard) - 0.3) < 5 * (0.3 * 0.7 / len(heard)) ** 0.5
    assert all(prompt in ("", parts[0].captions[i]) for prompt, i in zip(heard, indices, strict=True))
    # a frozen encoder has been asked for the captions as they are
    varied = data.replace(parts[0], vary=data.vary_caption)
    assert train.Denoising(args, cache, varied, parts[1], *rest, None, cpu).vary is data.vary_caption
    assert train.Denoising(args, cache, varied, parts[1], *rest, lambda prompts: {}, cpu).vary is None


@pytest.mark.parametrize("which", [0, 1])
def test_prompts(cwd, listeners, which, capsys):
    run = listeners[which]
    checkpoint = sample.load_checkpoint(run)
    assert checkpoint["text"]["encoder"] == "bytes" and len(checkpoint["data"]["prompts"]) == 10
    assert checkpoint["label_dropout"] == 0.1 and any(name.startswith("text.") for name in checkpoint["ema"])
    losses = [line["loss"] for line in map(json.loads, open(f"{run}/metrics.jsonl")) if "loss" in line]
    assert losses[-1] < 0.97 * losses[0]                                                       # it learns
    red, blue = (speak(run, "--prompt", words, "--cfg", "3") for words in ("a red circle", "blue"))
    assert np.abs(red - blue).max() > 2                                                        # and listens
    # several in turn; neither the batch nor the length of a neighbour's prompt changes a picture
    both = speak(run, "--prompt", "a red circle", "blue and of many more words", "--cfg", "3")
    assert np.abs(both[0] - red[0]).max() <= 1 and np.abs(both[1] - red[1]).max() > 2
    thrice = speak(run, "--prompt", "blue", "blue", "a red circle", "--n", "5", "--cfg", "3")    # and again
    assert np.abs(thrice[:2] - blue).max() <= 1
    again = speak(run, "--prompt", "blue", "blue", "a red circle", "blue", "blue", "--n", "5", "--cfg", "3")
    assert (thrice == again).all()
    # an empty prompt is the unconditional branch, whatever the scale
    empty = [speak(run, "--prompt", "", "--cfg", scale) for scale in ("1", "4")]
    assert np.abs(empty[0] - empty[1]).max() <= 1
    assert np.abs(speak(run, "--cfg", "0") - empty[0]).max() <= 1
    # a negative prompt takes its place: guidance from a prompt to itself is no guidance
    same_twice = speak(run, "--prompt", "a red circle", "--negative-prompt", "a red circle", "--cfg", "5")
    assert np.abs(same_twice - speak(run, "--prompt", "a red circle", "--cfg", "1")).max() <= 1
    assert np.abs(red - speak(run, "--prompt", "a red circle", "--cfg", "3", "--negative-prompt",
                              "blue")).max() > 0
    assert np.abs(red - speak(run, "--prompt", "a red circle", "--cfg", "3", "--rescale", "1")).max() > 0
    capsys.readouterr()
    speak(run, "--prompt", "緑の円 🟢 " + "very " * 80 + "long")
    assert "cut off: 'very very" in capsys.readouterr().err
    sample.main([run, "--steps", "3", "--n", "3", "--out", "named", "--prompt", "a/b: c"])
    assert {path.name for path in Path("named").iterdir()} >= {"000000-a-b-c.png"}


@pytest.mark.parametrize("which", [0, 1])
def test_pictures_to_begin_with(cwd, listeners, which, monkeypatch):
    """Strength 0 is the VAE's reconstruction; more of it, more change; a mask keeps what is outside."""
    run = listeners[which]
    vae, picture = sample.unpack_vae(sample.load_checkpoint(run)["vae"]), data.draw_shape(3)
    Image.fromarray(picture).save("begin.png")
    x = data.to_tensor(picture[None])
    through = data.to_uint8(vae.decode(vae.encode(x).mean))[0].astype(int)
    begin = ["--prompt", "a red circle", "--init-image", "begin.png"]
    for sampler in sample.SAMPLERS:
        flags = [*begin, "--strength", "0", "--sampler", sampler]
        assert np.abs(speak(run, *flags) - through).max() <= 1
    change = [np.abs(speak(run, *begin, "--steps", "20", "--strength", s) - through).mean()
              for s in ("0.02", "0.3", "0.6", "1")]
    assert change == sorted(change) and 0 < change[0] < 0.5 * change[-1]
    default = speak(run, *begin, "--steps", "20")
    assert np.abs(default - speak(run, *begin, "--steps", "20", "--strength", "0.6")).max() == 0
    mask = np.zeros((32, 32), np.uint8)
    mask[5:14, 9:31] = 255
    Image.fromarray(mask).save("mask.png")
    out = speak(run, *begin, "--mask", "mask.png")
    assert (out[:, mask == 0] == picture[mask == 0]).all()
    assert (out[:, mask > 0] != picture[mask > 0]).mean() > 0.5
    sample.main([run, *begin, "--strength", "0", "--n", "1", "--out", "still.gif"])
    assert Image.open("still.gif").n_frames == 1
    assert np.abs(speak(run, *begin, "--strength", "0", "--precision", "bf16") - through).max() <= 1
    # at strength 1 nothing of the picture is left
    assert (speak(run, *begin, "--strength", "1") == speak(run, "--prompt", "a red circle")).all()
    seen = []
    monkeypatch.setitem(sample.SAMPLERS, "euler",
                        lambda denoise, path, x, times, **_: seen.append(times) or x)
    for steps, strength in ((20, 0.55), (25, 0.56), (50, 0.68), (100, 0.81)):      # 0.55 is 0.55 and an ulp
        speak(run, *begin, "--sampler", "euler", "--steps", str(steps), "--strength", str(strength))
        assert seen[-1][0] == strength and (seen[-1][:-1] - seen[-1][1:]).min() > 5e-4


def test_captions_too_long_are_counted(capsys):
    encoder = dit.TextEncoder(dit.TextConfig(width=32, depth=1, heads=2, limit=3))
    train.warn_of_cut(encoder, ["one two three", "one two three four five"])
    assert "1 of 2 captions are longer than is read; of the first of them, cut off: 'four five'" in (
        capsys.readouterr().err)
    train.warn_of_cut(encoder, ["one two three"])
    assert capsys.readouterr().err == ""


def test_words_resume_bit_for_bit(cwd, listeners, monkeypatch):
    """Dropped and varied prompts too: interrupted and continued is the same as in one go."""
    plain = data.load_folder
    monkeypatch.setattr(data, "load_folder",
                        lambda *a, **k: data.replace(plain(*a, **k), vary=data.vary_caption))
    flags = ["--arch", "mmdit", "--data", "scenes", *QUICK, "--save-every", "1"]
    train.main([*flags, "--name", "at-once"])
    task, stopped = train.Denoising.loss, []

    def stop_once(self, model, indices):
        if len(stopped) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        stopped.append(1)
        return task(self, model, indices)

    monkeypatch.setattr(train.Denoising, "loss", stop_once)
    train.main([*flags, "--name", "parts"])
    assert sample.load_checkpoint("runs/parts")["step"] == 2
    train.main([*flags, "--name", "parts"])
    assert same(weights("runs/at-once"), weights("runs/parts")) and len(stopped) == 3


def test_precomputed_vectors_train_and_draw(cwd, listeners):
    for i in range(24):
        folder = Path("vectors")
        folder.mkdir(exist_ok=True)
        Image.fromarray(data.draw_shape(i)).save(folder / f"{i}.png")
        np.savez(folder / f"{i}.npz", context=np.full((2 + i % 3, 5), i / 24), pooled=np.full(3, i / 24))
    for arch in ("mmdit", "unet"):
        train.main(["--arch", arch, "--data", "vectors", "--cond", "text", "--text-encoder", "none", *QUICK,
                    "--vae", "runs/shapes-vae", "--name", f"vectors-{arch}"])
        config = sample.load_checkpoint(f"runs/vectors-{arch}")["config"]
        assert config["context_width"] == 5 and config.get("pooled_width", 3) == 3
        a = speak(f"runs/vectors-{arch}", "--embedding", "vectors/1.npz")
        assert a.shape == (2, 32, 32, 3)
        with pytest.raises(ValueError, match="give some by --embedding"):
            sample.main([f"runs/vectors-{arch}"])
        np.savez("lacking.npz", context=np.ones((2, 5)))
        with pytest.raises(ValueError, match=r"text vectors \(pooled\) of width None: .* takes 3"):
            sample.main([f"runs/vectors-{arch}", "--embedding", "lacking.npz"])
        with pytest.raises(ValueError, match="--prompt hello: .* use --embedding"):
            sample.main([f"runs/vectors-{arch}", "--prompt", "hello"])
    train.main(["--arch", "unet", "--data", "vectors", "--cond", "text", "--text-encoder", "none", *QUICK,
                "--vae", "runs/shapes-vae", "--init-from", "runs/vectors-unet", "--name", "vectors-further"])


def test_pictures_without_words_are_refused_before_a_vae_is_trained(cwd):
    Path("mute").mkdir()
    Image.fromarray(data.draw_shape(0)).save("mute/0.png")
    before = files(cwd)
    for more, message in (([], "pictures without words"), (["--text-encoder", "none"], "no mute/0.npz")):
        with pytest.raises(ValueError, match=message):
            train.main(["--arch", "mmdit", "--data", "mute", *QUICK, *more])
    assert files(cwd) == before


def test_frozen_encoder_trains_and_draws(cwd, listeners, published, capsys):
    flags = ["--data", "scenes", "--cond", "text", *QUICK]
    for kind, arch, pooled in (("clip", "mmdit", 12), ("t5", "mmdit", None), ("clip", "unet", 12)):
        name = f"{kind}-{arch}"
        train.main(["--arch", arch, *flags, "--text-encoder", f"{kind}:{published / kind}", "--name", name])
        checkpoint = sample.load_checkpoint(f"runs/{name}")
        assert checkpoint["text"] == {"encoder": kind, "path": str(published / kind)}
        config = checkpoint["config"]
        assert config["context_width"] == 16 and config.get("pooled_width", pooled) == pooled
        assert not any(weight.startswith("text.") for weight in checkpoint["ema"])  # it stays where it was
        red, blue = (speak(f"runs/{name}", "--prompt", words) for words in ("a red circle", "blue"))
        assert red.shape == (2, 32, 32, 3)
    moved = published / "elsewhere"
    moved.symlink_to(published / "clip")
    again = speak("runs/clip-unet", "--prompt", "blue", "--text-encoder", f"clip:{moved}")
    assert (again == blue).all()
    # it may move, but must say the same when a run goes on
    train.main(["--arch", "unet", *flags, "--text-encoder", f"clip:{moved}", "--name", "clip-unet"])
    checkpoint = torch.load("runs/clip-unet/checkpoint.pt", weights_only=True)
    checkpoint["training"] |= {"finished": False, "encoder": "another"}
    shutil.copytree("runs/clip-unet", "runs/clip-other")
    torch.save(checkpoint, "runs/clip-other/checkpoint.pt")
    with pytest.raises(ValueError, match="not the files that runs/clip-other began with"):
        train.main(["--arch", "unet", *flags, "--text-encoder", f"clip:{moved}", "--name", "clip-other"])
    with pytest.raises(ValueError, match="this run listens to clip"):
        sample.main(["runs/clip-unet", "--prompt", "blue", "--text-encoder", f"t5:{published / 't5'}"])


# ---- sample.py

def draw(*flags, out):
    sample.main(["runs/done", "--steps", "3", *flags, "--out", out])
    return np.load(out)["arr_0"]


def test_pictures_do_not_depend_on_the_batch(cwd):
    samplers = [["--sampler", name] for name in sample.SAMPLERS]
    for flags in (["--eta", "0.5"], ["--times", "karras"], *samplers):
        one = draw("--n", "7", "--batch-size", "1", *flags, out="one.npz").astype(int)
        three = draw("--n", "7", "--batch-size", "3", *flags, out="three.npz").astype(int)
        assert np.abs(one - three).max() <= 1 and np.abs(one[0] - one[1]).max() > 3
    a, b = (draw("--n", "2", "--label", "3", "--seed", seed, out="a.npz").astype(int) for seed in ("4", "5"))
    assert np.abs(a[1] - b[0]).max() <= 1 and np.abs(a[0] - b[0]).max() > 3     # picture i is seed + i


def test_output_kinds(cwd):
    arrays = draw("--n", "24", "--seed", "0", out="e.npz")
    assert (zipfile.ZipFile("e.npz").namelist() == ["arr_0.npy"]
            and arrays.dtype == np.uint8 and arrays.shape == (24, 32, 32, 3))
    sample.main(["runs/done", "--steps", "3", "--n", "24", "--out", "grid.png"])
    picture = np.asarray(Image.open("grid.png"))
    assert (picture.shape == (36, 24 * 34 + 2, 3)
            and np.abs(picture[2:34, 36:68].astype(int) - arrays[1]).max() <= 1)
    sample.main(["runs/done", "--steps", "3", "--n", "3", "--out", "singles"])
    assert np.abs(np.asarray(Image.open("singles/000001-red-square.png")).astype(int) - arrays[1]).max() <= 1
    sample.main(["runs/done", "--steps", "3", "--n", "2", "--out", "way.gif"])
    assert Image.open("way.gif").n_frames == 3
    assert np.abs(draw("--n", "2", "--raw", out="r.npz").astype(int) - arrays[:2]).max() > 0
    by_name, by_number = (draw("--n", "1", "--label", "green-cross", out="n.npz"),
                          draw("--n", "1", "--label", "7", out="n.npz"))
    assert (by_name == by_number).all()


@pytest.mark.parametrize("flags, message", [
    (["runs/done", "--label", "purple"], "--label purple: not a class"),
    (["runs/done", "--label", "24"], "0 to 23"),
    (["runs/done", "--label", "-1"], "--label -1"),
    (["runs/done", "--steps", "0"], "--steps 0"),
    (["runs/done", "--n", "0"], "--n 0"),
    (["runs/done", "--n", "999999999999"], "--n 999999999999: out of range"),
    (["runs/done", "--cfg", "nan"], "--cfg nan: out of range"),
    ([""], "no checkpoint"),
    (["runs/done", "--eta", "0.5", "--sampler", "heun"], "eta belongs to ddim"),
    (["runs/done", "--eta", "2"], "between 0 and 1"),
    (["runs/done", "--noise", "1", "--sampler", "ddpm"], "noise belongs to reverse_sde"),
    (["runs/done", "--noise", "-1"], "--noise -1"),
    (["runs/done", "--strength", "0.5"], "--strength 0.5: needs --init-image"),
    (["runs/done", "--strength", "1.5", "--init-image", "x.png"], "--strength 1.5: must be between 0 and 1"),
    (["runs/done", "--mask", "x.png"], "--mask x.png: needs --init-image"),
    (["runs/done", "--init-image", "none.png"], "--init-image none.png: cannot be read"),
    (["runs/done", "--init-image", "runs/done/samples.png", "--mask", "black.png"], "no white pixel"),
    (["runs/done", "--prompt", "a dog"], "--prompt a dog: this run was trained to classes; use --label"),
    (["runs/done", "--embedding", "x.npz"], "--embedding x.npz"),
    (["runs/done", "--text-encoder", "clip:x"], "--text-encoder clip:x"),
    (["runs/done", "--rescale", "0.5", "--cfg", "1"], "--rescale 0.5 with guidance 1"),
    (["runs/done", "--eta", "1", "--variance", "small"], "belongs to"),
    (["runs/done", "--variance", "learned"], "not trained to say anything of the variance"),
    (["runs/done", "--times", "leading"], "a spacing of the ddpm path"),
    (["runs/done", "--interval", "0.8", "0.2"], "--interval 0.8 0.2"),
    (["runs/done", "--cfg", "0", "--label", "1"], "unconditional"),
    (["runs/done", "--out", "x.jpg"], "must end in"),
    (["runs/done", "--out", "no/such/x.png"], "does not exist"),
    (["runs/done", "--out", "folder.png"], "there is a folder of that name"),
    (["runs/done", "--device", "tpu"], "--device tpu"),
    (["runs/shapes-vae"], "this run is a VAE"),
    (["runs/nothing"], "no checkpoint"),
])
def test_sample_refuses(cwd, flags, message):
    (cwd / "folder.png").mkdir(exist_ok=True)
    Image.new("RGB", (32, 32)).save("black.png")
    before = files(cwd)
    with pytest.raises(ValueError, match=message):
        sample.main(flags)
    assert files(cwd) == before


@pytest.mark.parametrize("kind", ["png", "gif", "npz"])
def test_a_failed_write_keeps_the_old_picture(cwd, monkeypatch, kind):
    old = Path(f"old.{kind}")
    old.write_bytes(b"precious")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    monkeypatch.setattr(sample, "npz_writer", full)
    with pytest.raises(OSError, match=f"cannot write old.{kind}: No space left"):
        sample.main(["runs/done", "--steps", "2", "--n", "2", "--out", str(old)])
    assert old.read_bytes() == b"precious" and not Path(f"old.{kind}.part").exists()


def test_guidance_needs_dropout(cwd):
    train.main(["--arch", "dit", *QUICK, "--label-dropout", "0", "--name", "nodrop"])
    for scale in ("2", "0"):
        with pytest.raises(ValueError, match="label dropout 0"):
            sample.main(["runs/nodrop", "--cfg", scale])
    sample.main(["runs/nodrop", "--n", "1", "--steps", "1", "--out", "nodrop.png"])


def test_damaged_and_foreign_checkpoints(cwd, tmp_path):
    good = (cwd / "runs/done/checkpoint.pt").read_bytes()
    flag = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (flag,))

    torch.save({"arch": "dit", "config": {}, "model": {}, "ema": {}}, tmp_path / "foreign.pt")
    for name, content in {"short.pt": good[:5000], "empty.pt": b"", "text.pt": b"hello",
                          "evil.pt": pickle.dumps(Evil())}.items():
        (tmp_path / name).write_bytes(content)
    for name in ("short.pt", "empty.pt", "text.pt", "evil.pt", "foreign.pt"):
        with pytest.raises(ValueError, match=f"{name}: not a checkpoint"):
            sample.main([str(tmp_path / name)])
    assert not flag.exists()
    checkpoint = sample.load_checkpoint("runs/done")
    name = next(iter(checkpoint["ema"]))
    checkpoint["ema"]["surplus.weight"] = checkpoint["ema"].pop(name)
    torch.save(checkpoint, tmp_path / "keys.pt")
    with pytest.raises(ValueError, match=f"missing {name}.*surplus surplus.weight"):
        sample.main([str(tmp_path / "keys.pt")])


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
    (["--arch", "dit", "--cond", "text"], "--cond text: --arch dit listens to classes"),
    (["--arch", "mmdit", "--cond", "class"], "--cond class: --arch mmdit listens to words"),
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


@pytest.mark.parametrize("script, flags", [("train.py", ["--arch", "dit", "--image-size", "30"]),
                                           ("sample.py", ["runs/nothing"])])
def test_one_line_and_exit_status_2(cwd, script, flags):
    result = subprocess.run([sys.executable, str(ROOT / script), *flags], capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith(f"{script}: error: ")


def test_damaged_settings_and_checkpoint_of_a_run(cwd):
    train.main(["--arch", "dit", *QUICK, "--name", "hurt"])
    Path("runs/hurt/settings.json").write_text("{")
    with pytest.raises(ValueError, match="settings.json: damaged"):
        train.main(["--arch", "dit", *QUICK, "--name", "hurt"])
    Path("runs/hurt/settings.json").unlink()
    Path("runs/hurt/checkpoint.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="not a checkpoint"):
        train.main(["--arch", "dit", *QUICK, "--name", "hurt"])
    assert Path("runs/hurt/checkpoint.pt").read_bytes() == b"x"
