"""run.py: the folder of a run, its checkpoint, and what is built from it."""

import copy
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import DONE, ON_VAE, altered, contents, same

import checkpoints
import dit
import networks
import run
import sample
import settings
import train
import unet
from files import locked
from state import State


# ---- the folder

def test_second_process_and_other_settings_are_refused(cwd):
    with locked(Path("runs/new/lock")), pytest.raises(ValueError, match="another process"):
        train.main([*DONE, "--name", "new"])
    assert contents(cwd / "runs/new") == {"lock"}
    shutil.rmtree("runs/new")
    before = (cwd / "runs/done/checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match="runs/done holds a run with --seed 0, not 5; repeat its settings"):
        train.main([*DONE, "--seed", "5"])
    assert (cwd / "runs/done/checkpoint.pt").read_bytes() == before


def test_damaged_settings_and_checkpoint_of_a_run(cwd):
    train.main(["--arch", "dit", *ON_VAE, "--name", "hurt"])
    kept = Path("runs/hurt/settings.json").read_text()
    Path("runs/hurt/settings.json").write_text("{")
    with pytest.raises(ValueError, match="settings.json: damaged"):
        train.main(["--arch", "dit", *ON_VAE, "--name", "hurt"])
    Path("runs/hurt/settings.json").unlink()
    before = contents(cwd)
    for flags in (["--arch", "dit", *ON_VAE], ["--arch", "unet", "--objective", "ddpm", *ON_VAE]):
        with pytest.raises(ValueError, match="runs/hurt has a checkpoint.pt but no settings.json"):
            train.main([*flags, "--name", "hurt"])
    assert contents(cwd) == before
    Path("runs/hurt/settings.json").write_text(kept)
    Path("runs/hurt/checkpoint.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="not a checkpoint"):
        train.main(["--arch", "dit", *ON_VAE, "--name", "hurt"])
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
    folder = run.Run(tmp_path)
    folder.settings.write_text(json.dumps(EARLIER, indent=1))
    # paths, intervals and the machine may change; and, where they are asked for, rate, batch and length
    begun = ["--arch", "dit", "--ema", "0.998"]            # which was the default
    for flags in ([], ["--device", "cpu", "--log-every", "1", "--compile", "--runs-dir", "elsewhere",
                       "--cache-dir", "x"], ["--lr", "0.1"], ["--batch-size", "8"], ["--steps", "2401"]):
        folder.check_settings(settings.parse([*begun, *flags]))
    for flags, message in ((["--seed", "1"], "--seed 0, not 1; repeat its settings to continue it"),
                           (["--image-size", "64"], r"--image-size \[32, 32\], not \[64, 64\]; repeat"),
                           (["--conv"], "--conv False, not True"),
                           (["--vae", "x"], "--vae the default, not x"),
                           (["--steps", "2399"], "--steps 2400, not 2399; .*, or raise --steps, to")):
        with pytest.raises(ValueError, match=f"{tmp_path} holds a run with {message}"):
            folder.check_settings(settings.parse([*begun, *flags]))
    # cosine's prediction was eps by default
    cosine = EARLIER | {"objective": "ddpm", "schedule": "cosine", "name": "shapes-dit-ddpm"}
    folder.settings.write_text(json.dumps(cosine))
    begun_with_cosine = [*begun, "--objective", "ddpm", "--schedule", "cosine"]
    folder.check_settings(settings.parse([*begun_with_cosine, "--prediction", "eps"]))
    with pytest.raises(ValueError, match="--prediction eps, not v; repeat its settings to continue it"):
        folder.check_settings(settings.parse(begun_with_cosine))
    folder.settings.write_text(json.dumps(EARLIER | {"lr": 0.1}))
    with pytest.raises(ValueError, match="--lr 0.1, not 0.004; repeat its settings"):      # by a default only
        folder.check_settings(settings.parse(begun))
    folder.settings.write_text(json.dumps(EARLIER))
    with pytest.raises(ValueError, match="--ema 0.998, not 0.03; repeat its settings"):
        folder.check_settings(settings.parse(["--arch", "dit"]))
    folder.settings.write_text(json.dumps(EARLIER | {"steps": 20}))
    with pytest.raises(ValueError, match="--steps 20, not the default 2400; give --steps 20 to continue it"):
        folder.check_settings(settings.parse(begun))


def test_a_frozen_encoder_may_move(tmp_path):
    folder = run.Run(tmp_path)
    begun, moved, other = [settings.parse(["--arch", "mmdit", "--text-encoder", place])
                           for place in ("clip:a", "clip:b", "t5:a")]
    folder.check_settings(begun)                                                  # nothing is there yet
    folder.write_settings(begun)
    folder.check_settings(moved)
    with pytest.raises(ValueError, match="--text-encoder clip:a, not t5:a"):
        folder.check_settings(other)


def test_the_file_of_settings(tmp_path):
    folder = run.Run(tmp_path)
    assert folder.read_settings() is None
    for flags in ([], ["--lr", "0.5", "--image-size", "16", "24"]):
        args = settings.parse(["--arch", "dit", *flags])
        folder.write_settings(args)
        assert folder.read_settings() == {name: getattr(args, name) for name in settings.ROWS}
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


def test_records_that_cannot_be_written_do_not_end_training(tmp_path, capsys):
    folder = run.Run(tmp_path)
    folder.metrics.mkdir()
    folder.record({"step": 1, "loss": 0.5})
    folder.record({"step": 2, "loss": 0.5})
    assert [record["step"] for record in folder.records] == [1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"warning: {folder.metrics}: cannot be written (Is a directory); the training goes on "
                     "without"]


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
    assert contents(tmp_path) == {"checkpoint.pt"}


@pytest.mark.parametrize("links", [True, False])
def test_checkpoints_are_kept(tmp_path, monkeypatch, links):
    """Under names of their own, by whatever means the file system has; other files of similar names stay."""
    def link(source, target):
        raise OSError(95, "Operation not supported")

    if not links:
        monkeypatch.setattr(os, "link", link)
    folder = run.Run(tmp_path)
    for name in ("checkpoint-mine.pt", "checkpoint-.pt", "best.pt"):
        (tmp_path / name).write_bytes(b"other")
    for step in (5, 10, 1_000_000, 1_000_005):
        folder.save({"step": step})
        folder.keep_latest(step, 2)
        folder.keep_latest(step, 2)                                      # again, as after a kill
        if step == 10:
            folder.keep("best.pt")
    found = {name: torch.load(tmp_path / name, weights_only=True)["step"] for name in contents(tmp_path)
             if name not in ("checkpoint-mine.pt", "checkpoint-.pt")}
    assert found == {"checkpoint.pt": 1_000_005, "checkpoint-1000000.pt": 1_000_000,
                     "checkpoint-1000005.pt": 1_000_005, "best.pt": 10}
    assert (tmp_path / "checkpoint-mine.pt").read_bytes() == b"other"


def test_the_best_step(tmp_path):
    folder = run.Run(tmp_path)
    assert folder.best_step() is None
    folder.records = [{"step": 1, "loss": 0.1}]
    assert folder.best_step() is None
    best = []
    for step, loss in enumerate([0.5, 0.3, 0.3, 0.4, float("nan"), -float("inf"), 0.2], 1):
        folder.records.append({"step": step, "val_loss": loss})
        if folder.best_step() == step:
            torch.save({"step": step}, tmp_path / "best.pt")
            best.append(step)
    assert best == [1, 2, 7] and folder.best_step() == 7


def test_the_best_step_where_best_is_asked_for_late(tmp_path):
    """Checkpoints of earlier validations are gone, however low their losses were."""
    folder = run.Run(tmp_path)
    folder.records = [{"step": step, "val_loss": loss} for step, loss in ((1, 0.1), (2, 0.5))]
    assert folder.best_step() == 2
    torch.save({"step": 2}, tmp_path / "best.pt")
    for step, loss, expected in ((3, 0.6, 2), (4, 0.4, 4)):
        folder.records.append({"step": step, "val_loss": loss})
        assert folder.best_step() == expected
    (tmp_path / "best.pt").write_bytes(b"other")
    assert folder.best_step() == 4


def test_loss_curve():
    assert run.loss_curve([]) is None
    records = [{"step": 5, "loss": 1.0}, {"step": 5, "val_loss": 0.5}, {"step": 10, "loss": 0.1},
               {"step": 10, "val_loss": 0.0}]                            # 0 has no logarithm
    picture = run.loss_curve(records)
    colours = {colour for _, colour in picture.getcolors(1 << 16)}
    assert picture.size == (900, 420) and {(0, 114, 178), (213, 94, 0)} <= colours


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
    checkpoint = checkpoints.load_checkpoint("runs/done")
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
    assert checkpoints.load_checkpoint(tmp_path / "old.pt")["text"] is None


def test_a_setting_of_another_version():
    with pytest.raises(ValueError, match="dit has no setting 'wings'; this checkpoint is from another"):
        networks.build_model("dit", {"wings": 2})
    with pytest.raises(ValueError, match="text encoder has no setting 'ears'"):
        networks.build_model("dit", {}, {"encoder": "bytes", "config": {"ears": 2}})


def test_load_vae(cwd, tmp_path):
    """The averaged weights of a VAE run, or the VAE inside another run; never one that is not finished."""
    vae = checkpoints.load_vae("runs/shapes-vae")
    checkpoint = checkpoints.load_checkpoint("runs/shapes-vae")
    assert same(vae.state_dict(), checkpoint["ema"]) and not vae.training
    assert not any(p.requires_grad for p in vae.parameters())
    assert same(checkpoints.load_vae("runs/done").state_dict(), vae.state_dict())
    assert same(checkpoints.load_vae("runs/done/checkpoint.pt").state_dict(), vae.state_dict())
    checkpoint["training"]["finished"] = False
    torch.save(checkpoint, tmp_path / "unfinished.pt")
    with pytest.raises(ValueError, match=r"unfinished.pt: this VAE is not finished \(step 40\)"):
        checkpoints.load_vae(tmp_path / "unfinished.pt")
    with pytest.raises(ValueError, match="no checkpoint there"):
        checkpoints.load_vae(tmp_path / "nowhere")


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
    networks.compile_blocks(model, backend=counter)
    assert same(model.state_dict(), plain.state_dict())                   # and the names stay as they are
    for side in (8, 12, 16, 10):
        x, t = torch.randn(2, 4, side, side), torch.rand(2)
        torch.testing.assert_close(model(x, t), plain(x, t))
    assert counter.frame_count == 2
    networks.checkpoint_blocks(model)                                          # compiled all the same
    torch._dynamo.reset()
    torch.testing.assert_close(model(x, t), plain(x, t))
    assert counter.frame_count == 3
    torch._dynamo.reset()


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_text_of_any_length(monkeypatch):
    """Down to machine code: a U-Net's block that attends to text, at two sizes of picture and two of text.
    Sizes count as unknown from the beginning, which saves the compilation for the first one."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "assume_static_by_default", False)
    block = unet.SpatialTransformer(16, 2, unet.UNetConfig(groups=8, context_width=8, positions=True))
    plain = copy.deepcopy(block)
    networks.compile_blocks(block)
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
    before = contents(cwd)
    for call in (lambda: sample.main(["runs/done", "--compile", "--out", "no.png"]),
                 lambda: train.main([*DONE, "--name", "new", "--compile"])):
        with pytest.raises(ValueError, match="--compile: found no C"):
            call()
    assert contents(cwd) == before


@pytest.mark.parametrize("arch", ["dit", "mmdit", "unet", "vae"])
def test_checkpointed_blocks_keep_less_and_change_nothing(arch):
    config, inputs = {
        "dit": (dict(width=32, depth=3, heads=2), {}),
        "mmdit": (dict(width=32, depth=2, single_depth=2, heads=2, rope=(4, 6, 6), context_width=8,
                       pooled_width=None), {"context": torch.randn(2, 5, 8)}),
        "unet": (dict(widths=(16, 32), groups=8, heads=2), {}),
        "vae": (dict(widths=(8, 16), groups=4), None)}[arch]
    model = networks.build_model(arch, config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t, results = torch.randn(2, 3 if arch == "vae" else 4, 8, 8), torch.rand(2), []
    for checkpointed in (False, True):
        if checkpointed:
            networks.checkpoint_blocks(model)
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


# ---- damaged, foreign and other versions

def test_damaged_lines_of_metrics_never_stop_a_run(tmp_path):
    folder = run.Run(tmp_path)
    good = [{"step": 1, "loss": 0.5}, {"step": 2, "val_loss": 0.25}]
    broken = ["[1, 2]", "3", "null", '"step"', "{}", '{"step": "two"}', '{"step": null}', "[" * 10**5, "",
              "\u732b", '{"loss": 1}']
    broken += [f'{{"step": 2, "loss": {value}}}' for value in ("null", '"x"', "[1]", "true", "1" * 400)]
    broken += ['{"step": 2, "val_loss": null}', '{"step": -1, "loss": 1}', '{"step": 1.5, "loss": 1}']
    broken += [f'{{"step": 2, "val_loss": 1, "val_by_time": {by}}}' for by in ("3", '{"a": "x"}', "[1]")]
    odd = ['{"step": 2, "loss": NaN}', '{"step": 2, "val_loss": Infinity}']
    lines = [json.dumps(good[0]), *broken, *odd, json.dumps(good[1])]
    folder.metrics.write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    folder.rewind_metrics(2)
    assert [record for record in folder.records if record in good] == good
    assert all(isinstance(record, dict) for record in folder.records) and len(folder.records) == 4
    folder.plot_loss()
    assert run.loss_curve(folder.records).tobytes() == run.loss_curve(good).tobytes()


@pytest.mark.parametrize("position", [0.2, 0.5, 0.8])
def test_a_flipped_bit_of_a_checkpoint_is_noticed(cwd, tmp_path, position):
    content = bytearray(Path("runs/done/checkpoint.pt").read_bytes())
    content[int(position * len(content))] ^= 4
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path}/checkpoint.pt: .*damaged"):
        checkpoints.load_checkpoint(tmp_path)


@pytest.mark.parametrize("part", ["model", "ema", "vae"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_never_used(cwd, tmp_path, part, value):
    def change(checkpoint):
        state = checkpoint["vae"]["state"] if part == "vae" else checkpoint[part]
        list(state.values())[-1].view(-1)[-1] = value

    folder = altered(tmp_path, change)
    with pytest.raises(ValueError, match="checkpoint.pt: damaged: .* not finite"):
        folder.load()
    with pytest.raises(ValueError, match="not finite"):
        sample.main([str(tmp_path), "--out", str(tmp_path / "x.png")])
    assert contents(tmp_path) == {"checkpoint.pt"}


@pytest.mark.parametrize("change, message", [
    (lambda c: c.pop("vae"), "lacks vae"), (lambda c: c.pop("step"), "lacks step"),
    (lambda c: c["data"].pop("classes"), "lacks data.classes"), (lambda c: c.pop("data"), "lacks data"),
    (lambda c: c.pop("training"), "lacks training.optimizer"),
    (lambda c: c["training"].pop("rng"), "lacks training.rng"),
    (lambda c: c.update(arch="cnn"), "arch cnn does not exist in this version"),
    (lambda c: c["training"].update(steps="x"), "its training.steps is 'x'"),
])
def test_parts_that_a_checkpoint_lacks_are_named(cwd, tmp_path, change, message):
    with pytest.raises(ValueError, match=f"checkpoint.pt: .*{message}"):
        altered(tmp_path, change).load()


BIAS = "x_embedder.proj.bias"


@pytest.mark.parametrize("change, message", [
    (lambda c: c["config"].update(width="abc"), "no dit can be built from its configuration .TypeError"),
    (lambda c: c["config"].update(heads=0), "no dit can be built from its configuration .ZeroDivisionError"),
    (lambda c: c["config"].update(depth=100_000), "its depth is 100000"),
    (lambda c: c["config"].update(width=32), "weights do not fit"),
    (lambda c: c.update(config=[1]), r"its config is \[1\]"), (lambda c: c.update(arch=[1]), "its arch is"),
    (lambda c: c.update(objective=None), "its objective is None"),
    (lambda c: c.update(objective={"name": "zz"}), "objective zz: not in this version"),
    (lambda c: c.update(objective={"name": "rf", "std": "x"}), "objective rf: "),
    (lambda c: c["data"].update(size="ab"), "its data.size is 'ab'"),
    (lambda c: c["data"].update(size=[]), "its data.size is"), (lambda c: c.update(data=5), "not a check"),
    (lambda c: c["data"].update(size=[-32, 32]), r"its data.size is \[-32, 32\]"),
    (lambda c: c["data"].update(classes=5), "its data.classes is 5"),
    (lambda c: c["data"].update(prompts=5), "its data.prompts is 5"),
    (lambda c: c["data"]["classes"].append("new"), "it names 25 classes, where its network has 24"),
    (lambda c: c.update(label_dropout="x"), "its label_dropout is 'x'"),
    (lambda c: c.update(vae=None), "its vae is None"), (lambda c: c.update(vae={}), "its vae is {}"),
    (lambda c: c.update(vae=[1]), "its vae is"),
    (lambda c: c["vae"]["config"].update(layers=10**6), "its layers is 1000000"),
    (lambda c: c["vae"]["config"].update(widths=3), "no vae can be built"),
    (lambda c: c.update(model=[1]), r"its model is \[1\]"), (lambda c: c.update(ema={1: 2}), "its ema is"),
    (lambda c: c.update(text={}), "its text is {}"), (lambda c: c.update(text={"encoder": "t5"}), "its text"),
    (lambda c: c.update(text={"encoder": "sd3", "path": "x", "no_t5": "yes"}), "its text is {'encoder': 's"),
    (lambda c: c.update(text={"encoder": []}), "its text"), (lambda c: c.update(step="x"), "its step is 'x'"),
    (lambda c: c.update(step=-5), "its step is -5"), (lambda c: c.update(step=True), "its step is True"),
    (lambda c: c.update(training=[1]), "its training is"),
    (lambda c: c["ema"].update({BIAS: torch.ones(64) * 1j}), f"{BIAS} is no tensor of plain numbers"),
    (lambda c: c["ema"].update({BIAS: torch.ones(1).expand(10**11)}), f"{BIAS} of shape .100000000000"),
    (lambda c: c["ema"].update({BIAS: torch.ones(1).expand(64)}), f"{BIAS} is no tensor"),
    (lambda c: c["ema"].update({BIAS: torch.ones(64, device="meta")}), f"{BIAS} is no tensor"),
    (lambda c: c["ema"].update({BIAS: torch.ones(64, dtype=torch.int32)}), f"{BIAS} is no tensor"),
])
def test_a_checkpoint_that_was_changed(cwd, tmp_path, change, message):
    with pytest.raises(ValueError, match=f"{tmp_path}/checkpoint.pt: .*{message}") as refused:
        altered(tmp_path, change).load()
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


def test_files_that_are_no_checkpoints(tmp_path, monkeypatch):
    folder = run.Run(tmp_path / "a")
    assert folder.load() is None
    folder.checkpoint.mkdir(parents=True)
    with pytest.raises(ValueError, match="checkpoint.pt: no checkpoint there"):
        folder.load()
    folder.checkpoint.rmdir()
    folder.checkpoint.symlink_to("nowhere")
    with pytest.raises(ValueError, match="checkpoint.pt: a link to a file that does not exist; restore"):
        folder.load()
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(ValueError, match=f"{name}: no checkpoint there .*a pipe or a device, not a file"):
            checkpoints.load_checkpoint(name)
    with pytest.raises(ValueError, match="nnn: cannot be read .File name too long"):
        checkpoints.load_checkpoint("n" * 300)
    folder.settings.mkdir()
    folder.checkpoint.unlink()
    assert folder.read_settings() is None
    folder.settings.rmdir()
    folder.settings.write_text("{}")

    def denied(self, *more, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(ValueError, match="settings.json: cannot be read .Permission denied.; make it"):
        folder.read_settings()


def test_what_run_py_shows(cwd, capsys):
    run.main(["runs/done"])
    assert capsys.readouterr().out.startswith("runs/done: dit with 0.2 M parameters, step 60\n  config: {")
    for flags, message in (([""], "run is empty"), (["a", "b"], "unrecognized arguments: b")):
        with pytest.raises(ValueError, match=message):
            run.main(flags)


@pytest.mark.parametrize("objective, message", [
    ({"name": "score"}, "objective score: not in this version"), ({}, "objective None"),
    ({"name": "rf", "wings": 2}, "objective rf: .*wings.*another version"),
])
def test_an_objective_of_another_version(objective, message):
    with pytest.raises(ValueError, match=message):
        networks.build_path(objective)


def test_a_network_that_only_its_configuration_shows_to_be_another():
    model = networks.build_model("dit", {"width": 32, "depth": 1, "heads": 2})
    averages = {0.1: copy.deepcopy(model), 0.2: copy.deepcopy(model)}
    state = State(model, averages, torch.device("cpu"), torch.optim.AdamW(model.parameters()))
    saved = {"arch": "dit", "config": {"width": 32, "depth": 1, "heads": 2}, **copy.deepcopy(state.weights()),
             "training": state.training(None, 0)}
    state.restore(saved, "c.pt")                                   # a field that it lacks has its default
    for other in ({"heads": 4}, {"qk_norm": False}, {"rope_theta": 1e4}):
        with pytest.raises(ValueError, match=f"c.pt: its network has {next(iter(other))}"):
            state.restore(saved | {"config": saved["config"] | other}, "c.pt")
    with pytest.raises(ValueError, match="c.pt: damaged, .*lacks the average of width 0.2;"):
        state.restore(saved | {"averages": saved["averages"][:1]}, "c.pt")
    for part in ({"optimizer": {}}, {"optimizer": {"state": {}, "param_groups": []}},
                 {"rng": torch.zeros(3)}):
        with pytest.raises(ValueError, match="c.pt: damaged, or of another version: its optimizer"):
            state.restore(saved | {"training": saved["training"] | part}, "c.pt")
    model(torch.randn(1, 4, 4, 4), torch.rand(1)).square().sum().backward()
    state.optimizer.step()
    training = copy.deepcopy(state.training(None, 0))
    training["optimizer"]["state"][0]["exp_avg"].view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="c.pt: damaged: the optimizer's exp_avg has values that are"):
        state.restore(saved | {"training": training}, "c.pt")
    assert state.is_finite()
    model.x_embedder.proj.bias.data[0] = float("inf")
    assert not state.is_finite()
