"""plan.py: what a training needs, and what is refused before anything is written."""

import argparse
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import DONE, ON_VAE, QUICK, altered, contents, picture, same

import checkpoints
import machine
import networks
import plan
import run
import train
from plan import prepare
from settings import parse


# ---- settings that cannot work

@pytest.mark.parametrize("flags, message", [
    (["--arch", "dit", "--data", "no/such/folder"], "--data no/such/folder: neither a built-in source"),
    (["--arch", "dit", "--image-size", "30"], r"multiple of 8 and width of 8 \(VAE 4x4, dit 2x2\)"),
    (["--arch", "unet", "--image-size", "32", "36"], "height must be a multiple of 8 and width of 8"),
    (["--arch", "dit", "--image-size", "32", "40", "--patch", "2", "4"], "multiple of 8 and width of 16"),
    (["--arch", "vae", "--image-size", "30"], r"height must be a multiple of 4 and width of 4 \(VAE 4x4\)"),
    (["--arch", "mmdit", "--text-encoder", "clip:nowhere"], "clip:nowhere: no text encoder there"),
    (["--arch", "mmdit", "--text-encoder", "none"], "--data shapes: it has no .npz files of vectors"),
    (["--arch", "dit", "--objective", "ddpm", "--zero-terminal-snr"], "eps prediction with zero terminal"),
    (["--arch", "dit", "--objective", "ddpm", "--prediction", "velocity"], "velocity"),
    (["--arch", "dit", "--vae", "runs/none"], "^--vae runs/none: no checkpoint there"),
    (["--arch", "dit", "--init-from", "runs/none"], "^--init-from runs/none: no checkpoint there"),
    (["--arch", "dit", "--device", "cuda:7"], "--device cuda:7: not available here; use one of .*cpu"),
    (["--arch", "mmdit", "--preview-prompts", "none.txt"], "--preview-prompts none.txt: "),
])
def test_settings_that_cannot_work(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as refused:
        prepare(parse(flags))
    assert "\n" not in str(refused.value) and not contents(tmp_path)


def test_pictures_without_words_are_refused_before_a_vae_is_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "mute/0.png", size=(32, 32))
    for more, message in (([], "pictures without words"), (["--text-encoder", "none"], "no mute/0.npz")):
        with pytest.raises(ValueError, match=message):
            train.main(["--arch", "mmdit", "--data", "mute", *QUICK, *more])
    assert contents(tmp_path) == {"mute", "mute/0.png"}


# ---- the machine and its folders

@pytest.mark.parametrize("flags, message", [
    (["--image-size", "40000"], "20,000 pictures of 40000 x 40000"), (["--image-size", "8000000"], "memory"),
    (["--batch-size", "1000000000"], "a batch of 1,000,000,000"), (["--vae-widths", "65536"], "weights"),
    (["--vae-widths", "256", "65536"], "training the VAE|weights"),
    (["--batch-size", "8000000", "--preset", "tiny"], "a batch of 8,000,000 .*, 20,000 pic"),
    (["--image-size", "65536", "--data", "mnist"], "memory"),
])
def test_absurd_sizes_are_refused_with_an_estimate(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"needs at least .* GiB of .*({message})") as caught:
        planned = prepare(parse(["--arch", "dit", *flags]))
        prepare(planned.vae_args)
    assert "\n" not in str(caught.value) and not contents(tmp_path)


@pytest.mark.parametrize("flags", [
    ["--arch", "dit"], ["--arch", "unet", "--objective", "ddpm", "--data", "fashion-mnist"],
    ["--arch", "mmdit"], ["--arch", "unet", "--cond", "text"],
    ["--arch", "vae", "--image-size", "128", "192"],
    ["--arch", "mmdit", "--data", "emoji", "--image-size", "64"],
    ["--arch", "dit", "--image-size", "256", "--batch-size", "8"],
])
def test_sane_sizes_pass_on_a_small_machine(tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "memory", lambda device: 4 * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: argparse.Namespace(free=8 * 2**30))
    planned = prepare(parse(flags))
    if planned.vae_args:
        prepare(planned.vae_args)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: argparse.Namespace(free=2**20))
    with pytest.raises(ValueError, match="needs at least .* [MG]iB of the disk of .*another --runs-dir"):
        prepare(parse(flags))


def test_folders_that_cannot_be_written_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    for flags, message in ((["--runs-dir", "file"], "--runs-dir: .*file is not a folder"),
                           (["--runs-dir", "file/runs"], "--runs-dir: .*file is not a folder"),
                           (["--cache-dir", "file"], "--cache-dir: .*file is not a folder"),
                           (["--runs-dir", "r" * 300], "rrr[.]{3}: a name of 300 letters is too long")):
        with pytest.raises(ValueError, match=message):
            prepare(parse(["--arch", "dit", *flags]))
    for flags, message in ((["--runs-dir", "/".join(["r" * 200] * 25)], "--runs-dir: .*path of 5024 letters"),
                           (["--runs-dir", "/proc/new"], "--runs-dir: no file can be created in /proc ")):
        with pytest.raises(ValueError, match=message):
            prepare(parse(["--arch", "dit", *flags]))
    monkeypatch.setattr(os, "access", lambda place, mode: "locked" not in str(place))
    Path("locked").mkdir()
    for flags in (["--runs-dir", "locked"], ["--runs-dir", "locked/new/runs"], ["--cache-dir", "locked"]):
        with pytest.raises(ValueError, match="locked is read-only here"):
            prepare(parse(["--arch", "dit", *flags]))
    assert contents(tmp_path) == {"file", "locked"}


def test_folders_of_runs_that_cannot_be_used(cwd, tmp_path, monkeypatch):
    shutil.copytree("runs/done", tmp_path / "done")
    (tmp_path / "done/best.pt").mkdir()
    with pytest.raises(ValueError, match="--keep-best: .*best.pt is a folder; remove it"):
        prepare(parse([*DONE, "--runs-dir", str(tmp_path), "--keep-best"]))
    monkeypatch.setattr(os, "access", lambda place, mode: not str(place).endswith("shapes-vae"))
    with pytest.raises(ValueError, match="--cache-dir: .*shapes-vae is read-only here; give another"):
        prepare(parse(["--arch", "dit", *ON_VAE, "--name", "new"]))


# ---- memory

def test_what_the_backward_pass_keeps():
    """Counted by hand: a linear layer keeps its input, and each input once; attention no weights of N x N."""
    with torch.device("meta"):
        first, second = torch.nn.Linear(10, 30), torch.nn.Linear(30, 7)
        both = torch.nn.Sequential(first, torch.nn.ReLU(), second)
        table = torch.ones(1, 30)                                        # shared by all examples
    assert plan.kept_bytes(first, lambda n: first(torch.empty(n, 10))) == 0 + 4 * 10
    assert plan.kept_bytes(both, lambda n: both(torch.empty(n, 10))) == 4 * (10 + 30)
    assert plan.kept_bytes(both, lambda n: second(first(torch.empty(n, 10)) * table)) == 4 * (10 + 30)
    with torch.device("meta"):
        weight = torch.nn.Linear(8, 8)

    def attend(n):
        x = weight(torch.empty(n, 4, 5000, 8))
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    assert plan.kept_bytes(weight, attend) == 3 * 4 * (4 * 5000 * 8)     # input, the one x, output


@pytest.mark.parametrize("arch, low, high", [("dit", 200_000, 380_000), ("unet", 700_000, 1_100_000),
                                             ("vae", 1_200_000, 1_700_000), ("mmdit", 250_000, 500_000)])
def test_memory_of_a_batch(tmp_path, monkeypatch, arch, low, high):
    """The bounds are the memory that training took at peak, per picture, within a factor of two."""
    monkeypatch.chdir(tmp_path)
    preset = ["--vae-preset" if arch == "vae" else "--preset", "tiny", "--precision", "fp32"]

    def memory(size, *more):
        return prepare(parse(["--arch", arch, *preset, "--vae-preset", "tiny", "--batch-size", str(size),
                              *more])).memory

    each = (memory(1100) - memory(100)) / 1000
    assert low < each < high
    assert memory(1100, "--precision", "bf16") - memory(100, "--precision", "bf16") == 500 * each
    assert memory(1100, "--accumulate", "11") == memory(100)
    assert (memory(1100, "--grad-checkpoint") - memory(100, "--grad-checkpoint")) / 1000 < 0.5 * each


# ---- the VAE, and runs that moved

def test_a_vae_trained_under_another_name_may_be_moved_there(cwd, tmp_path):
    folder = shutil.copytree("runs/shapes-vae", tmp_path / "shapes-vae")
    found = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps(found | {"name": "elsewhere"}))
    train.main(["--arch", "dit", *ON_VAE, "--name", "on-it", "--runs-dir", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"shapes-vae", "on-it"}


def test_a_vae_of_other_settings_is_never_taken_without_a_word(cwd):
    before = contents(cwd)
    for flags, message in (([], "--vae-preset tiny, where this command would train one with small"),
                           (["--vae-preset", "tiny"], r"of 40 steps, where .* of 2000 \(--vae-steps\)")):
        with pytest.raises(ValueError, match=f"runs/shapes-vae holds a VAE (with )?{message}; give --vae ru"):
            prepare(parse(["--arch", "dit", *QUICK, *flags, "--name", "new"]))
    # by its name it is taken as it is, and its latents are shared
    for spelling in ("runs/shapes-vae/", "runs/shapes-vae/checkpoint.pt"):
        planned = prepare(parse(["--arch", "dit", *QUICK, "--vae", spelling, "--name", "new"]))
        assert same(planned.vae.state_dict(), checkpoints.load_vae("runs/shapes-vae").state_dict())
        assert planned.cache_dir == Path("runs/shapes-vae") and contents(cwd) == before
    # and it may be trained for longer
    planned = prepare(parse(["--arch", "dit", *ON_VAE, "--vae-steps", "41", "--name", "new"]))
    assert planned.vae_args.steps == 41 and not prepare(planned.vae_args).finished


@pytest.mark.parametrize("change, message", [
    (lambda found: None, "runs/shapes-vae has a checkpoint.pt but no settings.json; restore it"),
    (lambda found: found | {"steps": 50}, "a VAE of 50 steps, .* is not finished, and goes on by: python t"),
])
def test_a_vae_that_cannot_be_taken_on(cwd, tmp_path, change, message):
    folder = shutil.copytree("runs/shapes-vae", tmp_path / "runs/shapes-vae")
    found = change(json.loads((folder / "settings.json").read_text()))
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    checkpoint["training"]["finished"] = False
    torch.save(checkpoint, folder / "checkpoint.pt")
    (folder / "settings.json").unlink()
    if found:
        (folder / "settings.json").write_text(json.dumps(found))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message) as refused:
        prepare(parse(["--arch", "dit", *ON_VAE, "--name", "new", "--runs-dir", str(tmp_path / "runs")]))
    assert "--vae " not in str(refused.value) and contents(tmp_path) == before


@pytest.mark.parametrize("change, message", [
    (lambda c: c.update(objective={"name": "ddpm"}), "its objective's name is ddpm, where .* says rf; "),
    (lambda c: c["objective"].update(shift=3.0), "its objective's shift is 3.0, where .* says None"),
])
def test_a_checkpoint_of_another_run(cwd, tmp_path, change, message):
    folder = shutil.copytree("runs/done", tmp_path / "done")
    altered(folder, change)
    with pytest.raises(ValueError, match=message):
        prepare(parse([*DONE, "--runs-dir", str(tmp_path)]))
    shutil.copy("runs/shapes-vae/checkpoint.pt", folder)
    with pytest.raises(ValueError, match="its arch is vae, where .* says dit"):
        prepare(parse([*DONE, "--runs-dir", str(tmp_path)]))


def test_a_finished_run_and_another_rate(cwd):
    with pytest.raises(ValueError, match="--lr 0.5: runs/done is finished; it was trained with --lr 0.004;"):
        prepare(parse([*DONE, "--lr", "0.5"]))


def test_pictures_that_changed():
    """What works comes first; the printed command repeats the flags of the VAE."""
    args = parse(["--arch", "vae", "--data", "a b", "--vae-preset", "tiny", "--steps", "5", "--flip",
                  "--name", "q-vae", "--kl-weight", "0.5"])
    folder = run.Run(Path("runs/q-vae"))
    message = plan.data_changed(args, folder, True)
    assert message.startswith("--data a b: its pictures are not those that runs/q-vae began with; --vae "
                              "runs/q-vae --name NEW keeps the VAE as it is; or restore them")
    assert ("python train.py --arch vae --data 'a b' --name q-vae-2 --flip --vae-preset tiny --kl-weight 0.5 "
            "--steps 5, then give the network --vae runs/q-vae-2 --name NEW") in message
    assert "keeps the VAE" not in plan.data_changed(args, folder, False)
    message = plan.data_changed(parse(["--arch", "dit", "--data", "q"]), run.Run(Path("runs/n")), True)
    assert message.startswith("--data q: its pictures are not those that runs/n began with; --vae runs/n")


def test_a_run_that_moved_goes_on_with_the_vae_in_its_checkpoint(cwd, tmp_path):
    flags = [*DONE, "--runs-dir", str(tmp_path)]
    shutil.copytree("runs/done", tmp_path / "done")
    assert prepare(parse(flags)).finished
    train.main(flags)
    assert not (tmp_path / "shapes-vae").exists()
    checkpoint = torch.load(tmp_path / "done/checkpoint.pt", weights_only=True)
    checkpoint["training"]["finished"] = False
    torch.save(checkpoint, tmp_path / "done/checkpoint.pt")
    planned = prepare(parse(flags))
    assert not planned.finished and planned.vae_args is None and planned.cache_dir == tmp_path / "done"
    assert same(planned.vae.state_dict(), checkpoints.load_vae("runs/shapes-vae").state_dict())


# ---- --init-from

@pytest.mark.parametrize("flags, message", [
    (["--objective", "ddpm"], "with --objective rf, not ddpm"),
    (["--prediction", "v"], "to predict velocity, not v; give --prediction velocity"),
    (["--prediction", "x0"], "to predict velocity, not x0"), (["--prediction", "eps"], "not eps"),
    (["--block", "published"], "with norm rms, not layer; give --block modern"),
    (["--patch", "4"], r"with patch \(2, 2\), not \(4, 4\); give --patch 2"),
    (["--conv"], "with conv False, not True; leave out --conv"),
    (["--preset", "small"], "with width 64, not 256; give --preset tiny"),
])
def test_init_from_a_run_whose_weights_mean_something_else(cwd, flags, message):
    before = contents(cwd)
    with pytest.raises(ValueError, match=f"(--init-from )?runs/done: .*({message})"):
        prepare(parse(["--arch", "dit", *ON_VAE, "--init-from", "runs/done", "--name", "new", *flags]))
    assert contents(cwd) == before
    prepare(parse(["--arch", "dit", *ON_VAE, "--init-from", "runs/done/", "--name", "new", "--density",
                   "uniform", "--shift", "3"]))                                  # trains on other times only


@pytest.mark.parametrize("arch, table", [("dit", "y_embedder.embedding_table.weight"),
                                         ("unet", "class_embedding.weight")])
def test_rows_of_classes_go_by_their_names(capsys, arch, table):
    config = {"dit": dict(width=32, depth=1, heads=2), "unet": dict(widths=(16, 32), groups=8)}[arch]
    old, new = (networks.build_model(arch, config | {"num_classes": n}) for n in (2, 3))
    state, own = old.state_dict(), new.state_dict()
    found = plan.fit_weights(new, state, "w", ["cat", "dog"], ["ant", "cat", "dog"])
    assert torch.equal(found[table], torch.stack([own[table][0], *state[table]]))     # the null class last
    assert capsys.readouterr().out == "w: 2 of 3 classes keep their embedding; new: ant\n"
    found = plan.fit_weights(old, state, "w", ["cat", "dog"], ["dog", "cat"])
    assert torch.equal(found[table], state[table][[1, 0, 2]])
    for names in ((None, ["a", "b"]), (["a", "b"], ["a", "b"])):                     # not known, or the same
        assert same(plan.fit_weights(old, state, "w", *names), state)
    assert torch.equal(plan.fit_weights(new, state, "w")[table], own[table])


def test_init_from_a_run_on_another_vae(cwd, tmp_path):
    flags = ["--arch", "dit", *QUICK, "--init-from", "runs/done", "--name", "new"]

    def statistics(checkpoint):
        checkpoint["vae"]["state"]["latent_std"] *= 2

    def encoder(checkpoint):
        checkpoint["vae"]["state"]["encoder.conv_in.bias"] += 1

    for change in (statistics, encoder):
        altered(tmp_path, change)
        with pytest.raises(ValueError, match="on the latents of another VAE, .*give --vae runs/done"):
            prepare(parse([*flags, "--vae", str(tmp_path)]))
    with pytest.raises(ValueError, match="on the latents of another VAE"):       # one that is still to train
        prepare(parse([*flags, "--runs-dir", str(tmp_path / "runs")]))
    altered(tmp_path, lambda checkpoint: checkpoint["vae"]["state"]["decoder.conv_in.bias"].add_(1))
    prepare(parse([*flags, "--vae", str(tmp_path)]))                             # the decoder does not matter
