"""run.py: the folder of a run, its checkpoint, and what is built from it."""

import argparse
import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import DONE, QUICK, files, same

import cache
import dit
import run
import sample
import settings
import train
import unet


# ---- the folder

def test_second_process_and_other_settings_are_refused(cwd):
    with cache.locked(Path("runs/done/lock")), pytest.raises(ValueError, match="another process"):
        train.main(DONE)
    before = (cwd / "runs/done/checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=f"--lr {settings.ARCHITECTURES['dit'].defaults['lr']}, not 0.5"):
        train.main([*DONE, "--lr", "0.5"])
    with pytest.raises(ValueError, match="latent-channels 4, not 8"):
        train.main(["--arch", "dit", *QUICK, "--name", "other", "--latent-channels", "8"])
    assert (cwd / "runs/done/checkpoint.pt").read_bytes() == before


def test_a_vae_trained_under_another_name_may_be_moved_there(cwd, tmp_path):
    folder = shutil.copytree("runs/shapes-vae", tmp_path / "shapes-vae")
    found = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps(found | {"name": "elsewhere"}))
    train.main(["--arch", "dit", *QUICK, "--name", "on-it", "--runs-dir", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"shapes-vae", "on-it"}


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


# settings.json of `train.py --arch dit` as it was written before settings.py existed
EARLIER = {
    "arch": "dit", "objective": "rf", "prediction": None, "name": "shapes-dit-rf", "runs_dir": "runs",
    "data": "shapes", "data_dir": "data", "image_size": [32, 32], "flip": False, "cond": "class",
    "text_encoder": None, "cache_dir": None, "preset": "small", "patch": None, "block": None, "conv": False,
    "vae": None, "init_from": None, "published": None, "vae_preset": None, "vae_widths": None,
    "latent_channels": None, "kl_weight": None, "vae_steps": None, "schedule": None, "min_snr": None,
    "zero_terminal_snr": False, "density": None, "density_mean": None, "density_std": None,
    "mode_scale": None, "shift": None, "label_dropout": 0.1, "steps": 2400, "batch_size": 64, "accumulate": 1,
    "lr": 0.004, "warmup": 100, "cooldown": 0.5, "weight_decay": 0.01, "clip": 1.0, "ema": 0.998, "seed": 0,
    "device": "auto", "precision": "auto", "compile": False, "grad_checkpoint": False, "log_every": 20,
    "val_every": 500, "preview_every": 1000, "save_every": 500, "vae_name": "shapes-vae"}


def test_settings_of_an_earlier_version(tmp_path):
    run.Run(tmp_path).settings.write_text(json.dumps(EARLIER, indent=1))
    folder = run.Run(tmp_path)
    folder.check_settings(settings.parse(["--arch", "dit"]))
    # paths, intervals and the machine may change
    folder.check_settings(settings.parse(["--arch", "dit", "--device", "cpu", "--log-every", "1", "--compile",
                                          "--runs-dir", "elsewhere", "--cache-dir", "x"]))
    for flags, message in ((["--lr", "0.1"], "--lr 0.004, not 0.1"), (["--seed", "1"], "--seed 0, not 1"),
                           (["--image-size", "64"], r"--image-size \[32, 32\], not \[64, 64\]"),
                           (["--conv"], "--conv False, not True"), (["--vae", "x"], "--vae None, not x")):
        with pytest.raises(ValueError, match=f"{tmp_path} holds a run with {message}; repeat its settings"):
            folder.check_settings(settings.parse(["--arch", "dit", *flags]))


def test_a_frozen_encoder_may_move(tmp_path):
    folder = run.Run(tmp_path)
    folder.check_settings(argparse.Namespace(text_encoder="clip:a"))              # nothing is there yet
    folder.write_settings(argparse.Namespace(text_encoder="clip:a"))
    folder.check_settings(argparse.Namespace(text_encoder="clip:b"))
    for other in ("t5:a", None):
        with pytest.raises(ValueError, match=f"--text-encoder clip:a, not {other}"):
            folder.check_settings(argparse.Namespace(text_encoder=other))


def test_settings_are_written_once(tmp_path):
    folder = run.Run(tmp_path)
    assert folder.read_settings() is None
    folder.write_settings(argparse.Namespace(lr=0.1))
    folder.write_settings(argparse.Namespace(lr=0.2))
    assert folder.read_settings() == {"lr": 0.1}
    for damaged in ("{", "[1]", "3"):
        folder.settings.write_text(damaged)
        with pytest.raises(ValueError, match="settings.json: damaged"):
            folder.read_settings()


def test_rewind_metrics(tmp_path):
    """Records after the checkpoint's step go, as the resumed run writes them again; so does a broken line."""
    folder = run.Run(tmp_path)
    folder.rewind_metrics(0)
    assert folder.metrics.read_text() == "" and folder.records == []
    records = [{"step": 3, "loss": 1.0}, {"step": 5, "loss": 0.5}, {"step": 5, "val_loss": 0.7},
               {"step": 6, "loss": 0.4}]
    for record in records:
        folder.record(record)
    assert folder.records == records
    with open(folder.metrics, "a") as out:
        out.write('{"step": 4, "lo')
    again = run.Run(tmp_path)
    again.rewind_metrics(5)
    assert again.records == records[:3]
    assert [json.loads(line) for line in folder.metrics.read_text().splitlines()] == records[:3]
    again.record({"step": 6, "loss": 0.4})
    assert [json.loads(line)["step"] for line in open(folder.metrics)] == [3, 5, 5, 6]


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    folder = run.Run(tmp_path)
    folder.save({"step": 1})

    def full(checkpoint, file):
        file.write(b"half of the new")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"cannot write .*checkpoint.pt .*MiB left.*No space left"):
        folder.save({"step": 2})
    assert torch.load(folder.checkpoint, weights_only=True) == {"step": 1}
    assert files(tmp_path) == {"checkpoint.pt"}

    def failed(checkpoint, file):
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", failed)
    with pytest.raises(OSError, match="cannot write"):
        folder.save({"step": 2})
    assert torch.load(folder.checkpoint, weights_only=True) == {"step": 1}


def test_loss_curve():
    assert run.loss_curve([]) is None
    records = [{"step": 5, "loss": 1.0}, {"step": 5, "val_loss": 0.5}, {"step": 10, "loss": 0.1},
               {"step": 10, "val_loss": 0.0}]                            # 0 has no logarithm
    picture = run.loss_curve(records)
    colours = {colour for _, colour in picture.getcolors(1 << 16)}
    assert picture.size == (900, 420) and {(31, 119, 180), (214, 39, 40)} <= colours


def test_lines_for_the_terminal():
    assert run.describe({"step": 2000, "val_loss": 0.12345}) == "step 2,000: validation loss 0.1235"
    vae = {"step": 5, "val_loss": 0.5, "psnr": 20.04, "kl": 12.6, "latent_std": [0.5, 1.25]}
    assert run.describe(vae) == ("step 5: validation loss 0.5000, PSNR 20.0 dB, KL 13 nats, "
                                 "latent std 0.50 1.25")
    times = {"step": 5, "val_loss": 0.5, "val_by_time": {"0.0-0.25": 1.0, "0.25-0.5": 0.25}}
    assert run.describe(times) == ("step 5: validation loss 0.5000, by time 0.0-0.25 1.000  "
                                   "0.25-0.5 0.250")


# ---- checkpoints

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
    checkpoint = run.load_checkpoint("runs/done")
    name = next(iter(checkpoint["ema"]))
    checkpoint["ema"]["surplus.weight"] = checkpoint["ema"].pop(name)
    torch.save(checkpoint, tmp_path / "keys.pt")
    with pytest.raises(ValueError, match=f"missing {name}.*surplus surplus.weight"):
        sample.main([str(tmp_path / "keys.pt")])


def test_a_checkpoint_without_text_is_read(cwd, tmp_path):
    """Checkpoints written before there was text do not have the key."""
    checkpoint = torch.load("runs/done/checkpoint.pt", weights_only=True)
    assert checkpoint.pop("text") is None
    torch.save(checkpoint, tmp_path / "old.pt")
    assert run.load_checkpoint(tmp_path / "old.pt")["text"] is None


def test_a_setting_of_another_version():
    with pytest.raises(ValueError, match="dit has no setting 'wings'; this checkpoint is from another"):
        run.build_model("dit", {"wings": 2})
    with pytest.raises(ValueError, match="text encoder has no setting 'ears'"):
        run.build_model("dit", {}, {"encoder": "bytes", "config": {"ears": 2}})


def test_load_vae(cwd, tmp_path):
    """The averaged weights of a VAE run, or the VAE inside another run; never one that is not finished."""
    vae = run.load_vae("runs/shapes-vae")
    checkpoint = run.load_checkpoint("runs/shapes-vae")
    assert same(vae.state_dict(), checkpoint["ema"]) and not vae.training
    assert not any(p.requires_grad for p in vae.parameters())
    assert same(run.load_vae("runs/done").state_dict(), vae.state_dict())
    assert same(run.load_vae("runs/done/checkpoint.pt").state_dict(), vae.state_dict())
    checkpoint["training"]["finished"] = False
    torch.save(checkpoint, tmp_path / "unfinished.pt")
    with pytest.raises(ValueError, match=r"unfinished.pt: this VAE is not finished \(step 40\)"):
        run.load_vae(tmp_path / "unfinished.pt")
    with pytest.raises(ValueError, match="no checkpoint there"):
        run.load_vae(tmp_path / "nowhere")


# ---- compilation and gradient checkpointing

def test_blocks_compile_once_for_all_sizes():
    """Three blocks and three sizes: one graph for the first size, one more for every other."""
    from torch._dynamo.testing import CompileCounterWithBackend
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = dit.DiT(dit.DiTConfig(width=32, depth=3, heads=2)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    plain = copy.deepcopy(model)
    run.compile_blocks(model, backend=counter)
    assert same(model.state_dict(), plain.state_dict())                   # and the names stay as they are
    for side in (8, 12, 16, 10):
        x, t = torch.randn(2, 4, side, side), torch.rand(2)
        torch.testing.assert_close(model(x, t), plain(x, t))
    assert counter.frame_count == 2
    run.checkpoint_blocks(model)                                          # compiled all the same
    torch._dynamo.reset()
    torch.testing.assert_close(model(x, t), plain(x, t))
    assert counter.frame_count == 3
    torch._dynamo.reset()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_text_of_any_length():
    """Down to machine code: a U-Net's block that attends to text, at two sizes of picture and two of text."""
    torch._dynamo.reset()
    block = unet.SpatialTransformer(16, 2, unet.UNetConfig(groups=8, context_width=8, positions=True))
    plain = copy.deepcopy(block)
    run.compile_blocks(block)
    for side, length in ((8, 5), (12, 7)):
        x, context = torch.randn(2, 16, side, side), torch.randn(2, length, 8)
        mask = torch.arange(length) < torch.tensor([[length], [2]])
        got, want = ([out, *torch.autograd.grad(out.square().sum(), list(network.parameters()))]
                     for network in (block, plain) for out in [network(x, context, mask)])
        for a, b in zip(got, want):
            assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6
    torch._dynamo.reset()


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
    model = run.build_model(arch, config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t, results = torch.randn(2, 3 if arch == "vae" else 4, 8, 8), torch.rand(2), []
    for checkpointed in (False, True):
        if checkpointed:
            run.checkpoint_blocks(model)
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
