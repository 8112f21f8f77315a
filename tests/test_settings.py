"""settings.py: the tables of flags, the defaults, refusals, and the configurations they make, by value."""

import argparse
import json
import os
import shlex

import pytest
import torch

import conditioning
import ddpm
import dit
import machine
import networks
import sample_settings
import settings
import text
import unet
import vae
from settings import parse, published_model, text_encoder


def stored(*flags):
    """The settings of a command line as settings.json holds them."""
    args = parse(flags)
    return {name: getattr(args, name) for name in settings.ROWS}


# ---- what a flag accepts

@pytest.mark.parametrize("string", ["bytes", "none", "clip:a", "t5:/a:b", "sd3:a", "flux-dev:a"])
def test_text_encoders(string):
    assert text_encoder(string) == string


@pytest.mark.parametrize("string", ["bert", "clip", "t5:", "bytes:x", "none:x", "sdxl", "flux:a"])
def test_no_text_encoders(string):
    with pytest.raises(argparse.ArgumentTypeError, match=f"^{string}: must be bytes, clip:FOLDER, t5"):
        text_encoder(string)


def test_published_models():
    assert published_model("dit-xl-2-256") == "dit-xl-2-256"
    with pytest.raises(argparse.ArgumentTypeError, match="dit-xxl-2-256: known are dit-xl-2-256, .* s, b, l"):
        published_model("dit-xxl-2-256")


# ---- the tables

TABLES = [(name, flag) for name, groups in (("train", settings.FLAGS), ("sample", sample_settings.FLAGS))
          for flags in groups.values() for flag in flags]


@pytest.mark.parametrize("program, flag", TABLES, ids=lambda part: getattr(part, "name", part))
def test_a_row_of_the_tables(program, flag):
    assert len(flag.help) > 8 and "\n" not in flag.help and not flag.help.endswith(".")
    for owner, values in flag.needs.items():
        row = settings.ROWS[owner]
        assert isinstance(values, tuple) and values
        for value in values:                               # each is one that the owner accepts
            assert row.type(value) == value
    if flag.instead:
        assert flag.needs and any(flag.instead == other.name for other in settings.ROWS.values())
    if flag.unset is not None:
        assert flag.type(flag.unset) == flag.unset
    if flag.most:
        assert flag.nargs == "+"
    if flag.type is not None and isinstance(flag.default, str):
        assert flag.type(flag.default) == flag.default


def test_names_of_flags_are_unique():
    for groups in (settings.FLAGS, sample_settings.FLAGS):
        names = [flag.name for flags in groups.values() for flag in flags]
        assert len(names) == len(set(names))
    assert len(settings.ROWS) == sum(map(len, settings.FLAGS.values()))


@pytest.mark.parametrize("name", settings.OBJECTIVES)
def test_options_are_arguments_of_their_path(name):
    """Every flag of an objective sets one option; those of the straight path, except for the shift by tokens,
    belong to both of its objectives, and no others to two."""
    own = [flag for flag in settings.ROWS.values()
           if flag.option and name in flag.needs.get("objective", settings.OBJECTIVES)]
    shared = len(settings.OBJECTIVES["rf"].flags) - 1 if name == "meanflow" else 0
    assert len(own) == len(settings.OBJECTIVES[name].flags) + shared + 2                # --prediction, --loss
    for flag in own:
        assert flag.option in settings.OBJECTIVES[name].path.__init__.__code__.co_varnames, flag.name
        assert flag.settled and flag.needs["arch"] == ("dit", "mmdit", "unet")


def test_settings_that_may_change_on_resume():
    """Paths, intervals and the machine, never anything that affects training; and what takes effect from the
    next step on."""
    assert settings.RESUMABLE == {
        "name", "runs_dir", "data_dir", "cache_dir", "device", "compile", "grad_checkpoint", "log_every",
        "val_every", "preview_every", "preview_prompts", "save_every", "keep", "keep_best", "shard",
        "tensor_parallel", "expert_parallel", "workers"}
    assert settings.CHANGEABLE == ["steps", "batch_size", "lr"]


def test_what_a_command_asks_for():
    """A run that goes on changes only what its command names; a default changes nothing."""
    assert parse(["--arch", "dit"]).asked == []
    assert parse(["--arch", "dit", "--lr", "4e-3", "--seed", "0", "--steps", "9"]).asked == ["steps", "lr"]
    assert set(stored("--arch", "dit", "--lr", "1")) == set(settings.ROWS)


def test_settings_that_a_published_model_decides():
    assert {flag.key for flag in settings.ROWS.values() if flag.settled} == {
        "preset", "prediction", "loss", "schedule", "min_snr", "zero_terminal_snr", "density",
        "density_mean", "density_std", "mode_scale", "shift", "shift_tokens", "guidance", "jumps", "patch",
        "block", "conv", "experts", "text_encoder", "no_t5"}


@pytest.mark.parametrize("name", settings.ARCHITECTURES)
def test_a_row_of_the_architectures(name):
    row = settings.ARCHITECTURES[name]
    assert set(row.conditioning) <= set(conditioning.KINDS) and row.presets
    for preset in row.presets.values():
        row.config(**preset)
    for key in row.defaults | row.defaults_with_text:
        assert settings.ROWS[key].default is None             # else the row's value would never be used
    assert all(isinstance(block, type) for block in row.blocks)
    with torch.device("meta"):
        model = row.model(row.config(**row.presets["tiny"]))
    assert any(isinstance(module, row.blocks) for module in model.modules())


def test_every_kind_of_block_is_compiled():
    assert set(settings.BLOCKS) == {
        vae.ResnetBlock, dit.Block, settings.mmdit.JointBlock, settings.mmdit.SingleBlock, unet.ResnetBlock,
        unet.SpatialTransformer, text.TextBlock, settings.audio_vae.ResidualUnit}


# ---- defaults

@pytest.mark.parametrize("flags, expected", [
    (["--arch", "dit"],
     dict(objective="rf", prediction=None, cond="class", preset="small", steps=2400, batch_size=64, lr=4e-3,
          warmup=100, ema=0.03, weight_decay=0.01, image_size=[32, 32], name="shapes-dit-rf",
          label_dropout=0.1, cooldown=0.5, clip=1.0, text_encoder=None, vae_preset=None, precision="auto")),
    (["--arch", "mmdit"],
     dict(cond="text", text_encoder="bytes", prediction=None, steps=10500, batch_size=32, lr=1e-3,
          name="shapes-text-mmdit-rf")),
    (["--arch", "unet"], dict(cond="class", steps=2000, batch_size=64, lr=2e-3)),
    (["--arch", "unet", "--cond", "text", "--objective", "ddpm"],
     dict(prediction="v", steps=10000, batch_size=32, lr=1e-3, warmup=100, name="shapes-text-unet-ddpm")),
    (["--arch", "unet", "--cond", "text", "--objective", "ddpm", "--prediction", "eps"],
     dict(prediction="eps")),
    (["--arch", "unet", "--objective", "ddpm"], dict(prediction=None, cond="class")),
    (["--arch", "unet", "--data", "emoji"], dict(cond="text", name="emoji-unet-rf")),
    (["--arch", "dit", "--data", "emoji"], dict(cond="class")),
    (["--arch", "vae"],
     dict(cond="class", preset=None, vae_preset="small", vae_widths=None, latent_channels=4, kl_weight=1e-5,
          steps=2000, batch_size=8, lr=2e-3, warmup=50, ema=0.99, weight_decay=0.0, name="shapes-vae")),
    (["--arch", "vae", "--cond", "text"], dict(steps=4000, lr=2e-3, name="shapes-text-vae")),
    (["--arch", "dit", "--data", "some/folder", "--image-size", "16", "24"],
     dict(image_size=[16, 24], name="folder-16x24-dit-rf")),
    (["--arch", "dit", "--image-size", "64"], dict(image_size=[64, 64], name="shapes-64x64-dit-rf")),
    (["--arch", "dit", "--data", "."], dict(name="data-dit-rf")),
    (["--arch", "dit", "--init-from", "x"], dict(lr=1e-4, steps=2400)),
    (["--arch", "dit", "--init-from", "x", "--lr", "0.5"], dict(lr=0.5)),
    (["--arch", "dit", "--min-snr", "0.5", "--objective", "ddpm"], dict(min_snr=0.5)),
    (["--arch", "dit", "--init-from", "x", "--vae", "v", "--published", "sit-b-4-512"],
     dict(image_size=[512, 512], preset="small")),
])
def test_defaults(flags, expected):
    found = vars(parse(flags))
    assert {name: found[name] for name in expected} == expected
    assert json.loads(json.dumps(found)) == found              # settings.json holds them as they are


@pytest.mark.parametrize("flags, message", [
    ([], "--arch is required: one of vae, dit, mmdit, unet"),
    (["--arch", "cnn"], "--arch cnn: must be one of vae, dit, mmdit, unet"),
    (["--arch", "dit", "--wings", "2"], "unrecognized arguments: --wings 2"),
    (["--arch", "dit", "--patch"], "--patch expected at least one argument"),
    (["--arch", "dit", "--vae", ""], "--vae is empty; give a value, or leave it out"),
    (["--arch", "dit", "--init-from", ""], "--init-from is empty"),
    (["--arch", "dit", "--name", ""], "--name '': must be the name of one folder"),
    (["--arch", "dit", "--name", "n" * 300], "--name n{40}...: a name of 300 letters is too long"),
    (["--arch", "dit", "--runs-dir", ""], "--runs-dir is empty"),
    (["--arch", "dit", "--data", ""], "--data is empty"),
    (["--arch", "dit", "--data-dir", ""], "--data-dir is empty"),
    (["--arch", "dit", "--cache-dir", ""], "--cache-dir is empty"),
    (["--arch", "dit", "--preset", ""], "--preset is empty"),
    (["--arch", "dit", "--device", ""], "--device is empty"),
    (["--arch", ""], "--arch is empty; give a value"), (["--published", ""], "--published is empty"),
    (["--arch", "mmdit", "--text-encoder", ""], "--text-encoder is empty"),
    (["--arch", "dit", "--patch", "1000000000"], "--patch 1000000000: must be between 1 and 65,536"),
    (["--arch", "dit", "--vae-widths", "8", "65537"], "--vae-widths 65537: must be between 1 and 65,536"),
    (["--arch", "dit", "--latent-channels", "65537"], "--latent-channels 65537: must be between 1 and"),
    (["--arch", "dit", "--batch", "3"], "--batch 3; did you mean --batch-size"),
    (["--arch", "dit", "--lr", "nan"], "--lr nan: must be between"),
    (["--arch", "dit", "--lr", "0"], "--lr 0: must be between"),
    (["--arch", "dit", "--clip", "0"], "--clip 0: must be at least 1e-12"),
    (["--arch", "dit", "--warmup", "-1"], "--warmup -1: must be between 0"),
    (["--arch", "dit", "--seed", "-1"], "--seed -1: must be between 0"),
    (["--arch", "dit", "--patch", "0"], "--patch 0: must be between 1"),
    (["--arch", "dit", "--patch", "1", "2", "3"], "--patch 1 2 3: give one side, or height and width"),
    (["--arch", "dit", "--image-size", "0"], "--image-size 0: must be between 1"),
    (["--arch", "dit", "--image-size", "8", "8", "8"], "--image-size 8 8 8: give one side, or height and"),
    (["--arch", "dit", "--vae-widths", "0"], "--vae-widths 0: must be between 1"),
    (["--arch", "dit", "--steps", "0"], "--steps 0: must be between 1"),
    (["--arch", "dit", "--label-dropout", "1.5"], "--label-dropout 1.5: must be at least 0 and below 1"),
    (["--arch", "dit", "--label-dropout", "1"], "--label-dropout 1: must be at least 0 and below 1"),
    (["--arch", "dit", "--shift", "0"], "--shift 0: must be above 0"),
    (["--arch", "dit", "--objective", "ddpm", "--min-snr", "0"], "--min-snr 0: must be above 0"),
    (["--arch", "dit", "--batch-size", "10", "--accumulate", "3"], "--accumulate 3: does not divide"),
    (["--arch", "dit", "--crop", "random"], "--crop random: is for a folder of pictures, not --data shapes"),
    (["--arch", "dit", "--density", "mode", "--density-mean", "0"],
     "--density-mean 0.0: belongs to --density logit_normal, not mode"),
    (["--arch", "dit", "--mode-scale", "1"], "--mode-scale 1.0: belongs to --density mode, not logit_normal"),
    (["--arch", "dit", "--objective", "ddpm", "--density-std", "1"], "--density-std 1.0: .* --objective rf"),
    (["--arch", "dit", "--zero-terminal-snr"], "--zero-terminal-snr.*: belongs to --objective ddpm, not rf"),
    (["--arch", "dit", "--min-snr", "5"], "--min-snr 5.0: belongs to --objective ddpm, not rf"),
    (["--arch", "dit", "--schedule", "cosine"], "--schedule cosine: belongs to --objective ddpm, not rf"),
    (["--arch", "dit", "--objective", "ddpm", "--shift", "3"], "--shift 3.0: belongs to --objective rf"),
    (["--arch", "mmdit", "--block", "modern"], "--block modern: belongs to --arch dit, not mmdit"),
    (["--arch", "unet", "--patch", "2"], "--patch 2: belongs to --arch dit or mmdit, not unet"),
    (["--arch", "unet", "--conv"], "--conv.*: belongs to --arch dit or mmdit, not unet"),
    (["--arch", "unet", "--cond", "none", "--text-encoder", "none"], "belongs to --cond text, not none"),
    (["--arch", "unet", "--text-encoder", "bytes"], "--text-encoder bytes: belongs to --cond text, not"),
    (["--arch", "mmdit", "--text-encoder", "bert"], "--text-encoder bert: must be bytes, clip:FOLDER"),
    (["--arch", "mmdit", "--no-t5"], "--no-t5: belongs to --text-encoder sd3:FOLDER, not bytes; leave it"),
    (["--arch", "mmdit", "--no-t5", "--text-encoder", "flux-dev:x"], "--no-t5: belongs .*, not flux-dev:x"),
    (["--arch", "dit", "--no-t5"], "--no-t5.*: belongs to --cond text, not class"),
    (["--arch", "mmdit", "--text-encoder", "none", "--preview-prompts", "x"],
     "--preview-prompts x: --text-encoder none has no encoder"),
    (["--arch", "dit", "--preview-prompts", "x"], "--preview-prompts x: belongs to --cond text, not class"),
    (["--arch", "dit", "--cond", "text"],
     "--cond text: --arch dit takes --cond class or none; --cond text goes with --arch mmdit or unet"),
    (["--arch", "mmdit", "--cond", "class"], "--cond class: --arch mmdit takes --cond text; .* dit or unet; "
                                             "with --cond text, class names serve as captions"),
    (["--arch", "mmdit", "--cond", "none"], "--cond none: --arch mmdit takes --cond text; --cond none goes "
                                            "with --arch dit or unet"),
    (["--arch", "vae", "--vae-steps", "5"], "--vae-steps 5: belongs to .*, not vae; use --steps"),
    (["--arch", "vae", "--prediction", "v"], "--prediction v: belongs to .*, not vae"),
    (["--arch", "vae", "--init-from", "x"], "--init-from x: belongs to .*, not vae"),
    (["--arch", "vae", "--density", "mode"], "--density mode: belongs to .*, not vae"),
    (["--arch", "dit", "--vae", "x", "--vae-steps", "5"], "--vae-steps 5: --vae x is trained already"),
    (["--arch", "dit", "--vae", "x", "--kl-weight", "0"], "--kl-weight 0.0: --vae x is trained already"),
    (["--arch", "dit", "--vae", "x", "--latent-channels", "8"], "--latent-channels 8: --vae x is trained"),
    (["--arch", "unet", "--preset", "S/2"], "--preset S/2: unet has tiny, small"),
    (["--arch", "dit", "--preset", "S/3"], "--preset S/3: dit has tiny, small"),
    (["--arch", "vae", "--preset", "S/2"], "--preset S/2: belongs to .*, not vae; use --vae-preset"),
    (["--arch", "dit", "--vae", "v", "--init-from", "x", "--published", "sit-b-4-512", "--preset", "S/2"],
     "--preset S/2: settled by --published sit-b-4-512; give one or the other"),
    (["--arch", "dit", "--vae", "v", "--init-from", "x", "--published", "sit-b-4-512", "--conv"],
     "--conv.*: settled by --published"),
])
def test_refusals(flags, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse(flags)
    assert "\n" not in str(caught.value)


# ---- the VAE that is trained first

def test_settings_of_the_vae_that_comes_first():
    args = parse(["--arch", "mmdit", "--image-size", "16", "24", "--flip", "--seed", "3", "--precision",
                  "fp32", "--vae-steps", "7", "--latent-channels", "8", "--runs-dir", "elsewhere", "--name",
                  "mine", "--log-every", "5", "--lr", "0.5", "--device", "cpu", "--label-dropout", "0.3"])
    found = vars(settings.vae_settings(args, None))
    expected = vars(parse(["--arch", "vae", "--cond", "text", "--image-size", "16", "24", "--flip", "--seed",
                           "3", "--precision", "fp32", "--steps", "7", "--latent-channels", "8",
                           "--runs-dir", "elsewhere", "--log-every", "5", "--device", "cpu"]))
    assert found == expected and found["name"] == "shapes-text-16x24-vae" and found["lr"] == 2e-3
    # captions alone do not change the pictures of a folder, so its VAE is that of a network with classes
    args = parse(["--arch", "mmdit", "--data", "folder"])
    assert settings.vae_settings(args, None).cond == "class"
    assert settings.vae_settings(args, None).name == "folder-vae"


def test_the_vae_that_is_there_already():
    """Whoever began it, its settings are kept; this command may repeat them, but not contradict them."""
    begun = stored("--arch", "vae", "--steps", "9", "--vae-widths", "8", "16", "--seed", "4", "--flip",
                   "--precision", "bf16", "--log-every", "3", "--name", "mine") | {"vae_name": "shapes-vae"}
    same = ["--arch", "dit", "--vae-steps", "9", "--vae-widths", "8", "16"]
    found = vars(settings.vae_settings(parse([*same, "--log-every", "7", "--lr", "0.5"]), begun))
    assert (found["steps"], found["vae_widths"], found["lr"]) == (9, [8, 16], 2e-3)
    assert (found["seed"], found["flip"], found["precision"]) == (4, True, "bf16")
    assert found["log_every"] == 7 and found["name"] == "shapes-vae"               # those may change
    assert settings.vae_settings(parse([*same, "--vae-steps", "12"]), begun).steps == 12       # it goes on
    for flags, message in ((["--arch", "dit", *same[4:]], r"of 9 steps, .* of 2000 \(--vae-steps\)"),
                           ([*same, "--vae-steps", "8"], r"of 9 steps, .* one of 8 \(--vae-steps\)"),
                           (same[:4], r"--vae-widths \[8, 16\], .* with None"),
                           ([*same, "--vae-widths", "8", "8"], r"--vae-widths \[8, 16\], .* with \[8, 8\]"),
                           ([*same, "--latent-channels", "8"], "--latent-channels 4, .* with 8"),
                           ([*same, "--kl-weight", "0"], "--kl-weight 1e-05, .* with 0.0"),
                           ([*same, "--vae-preset", "tiny"], "--vae-preset small, .* with tiny")):
        with pytest.raises(ValueError, match=f"runs/shapes-vae holds a VAE (with )?{message}; give --vae ru"):
            settings.vae_settings(parse(flags), begun)
    for name, value in (("--data", "other/shapes"), ("lr", 0.5), ("batch_size", 16), ("ema", 0.5)):
        with pytest.raises(ValueError, match=f"a VAE with {name} {value}, where this"):
            settings.vae_settings(parse(same), begun | {name.strip("-"): value})


def test_a_vae_that_is_not_finished_or_none_at_all():
    """What is there is said, with the command that goes on; --vae would not take it."""
    begun = stored("--arch", "vae", "--steps", "9", "--flip", "--image-size", "32")
    with pytest.raises(ValueError, match="of 9 steps, .* is not finished, and goes on by: python train.py "
                                         "--arch vae --data shapes --flip --steps 9, or remove"):
        settings.vae_settings(parse(["--arch", "dit"]), begun, is_finished=lambda: False)
    begun = stored("--arch", "dit", "--name", "shapes-vae")
    with pytest.raises(ValueError, match="runs/shapes-vae holds a dit, .* goes on by: python train.py --arch "
                                         "dit --data shapes --name shapes-vae; give another --runs-dir"):
        settings.vae_settings(parse(["--arch", "dit"]), begun)


@pytest.mark.parametrize("flags", [
    "--arch dit --data shapes", "--arch unet --data emoji --cond class --flip",
    "--arch vae --data 'a b' --image-size 16 24 --name x --vae-widths 8 16 --lr 0.5",
])
def test_the_command_of_settings(flags):
    values = stored(*shlex.split(flags))
    assert settings.command(values).startswith("python train.py --arch")
    assert stored(*shlex.split(settings.command(values))[2:]) == values


# ---- configurations

@pytest.mark.parametrize("flags, expected", [
    ([], {"name": "rf"}),
    (["--prediction", "x0"], {"name": "rf", "prediction": "x0"}),
    (["--density-mean", "0", "--density-std", "0.5", "--shift", "3"],
     {"name": "rf", "mean": 0.0, "std": 0.5, "shift": 3.0}),
    (["--density", "mode", "--mode-scale", "0"], {"name": "rf", "density": "mode", "mode_scale": 0.0}),
    (["--objective", "ddpm"], {"name": "ddpm", "zero_terminal_snr": False}),
    (["--objective", "ddpm", "--prediction", "v", "--schedule", "cosine", "--min-snr", "5",
      "--zero-terminal-snr"],
     {"name": "ddpm", "prediction": "v", "schedule": "cosine", "min_snr": 5.0, "zero_terminal_snr": True}),
    (["--objective", "ddpm", "--schedule", "cosine"],
     {"name": "ddpm", "prediction": "v", "schedule": "cosine", "zero_terminal_snr": False}),
    (["--objective", "ddpm", "--schedule", "cosine", "--prediction", "eps"],
     {"name": "ddpm", "prediction": "eps", "schedule": "cosine", "zero_terminal_snr": False}),
    (["--objective", "ddpm", "--min-snr", "1"], {"name": "ddpm", "min_snr": 1.0, "zero_terminal_snr": False}),
    (["--arch", "unet", "--cond", "text", "--objective", "ddpm"],
     {"name": "ddpm", "prediction": "v", "zero_terminal_snr": False}),
    (["--objective", "ddpm", "--published", "dit-s-2-256", "--vae", "v", "--init-from", "w"],
     {"name": "ddpm", "schedule": "linear", "learned_variance": True}),
    (["--published", "sit-s-2-256", "--vae", "v", "--init-from", "w"], {"name": "rf", "density": "uniform"}),
])
def test_configuration_of_the_objective(flags, expected):
    config = settings.objective_config(parse(["--arch", "dit", *flags]))
    assert config == expected
    networks.build_path(config)


def test_widths_that_the_groups_of_a_vae_do_not_divide():
    args = parse(["--arch", "vae", "--vae-preset", "tiny", "--vae-widths", "8", "33"])
    with pytest.raises(ValueError, match="^--vae-widths 8 33: each must be a multiple of 2$"):
        settings.vae_config(args, 3)


def test_memory_is_what_a_container_may_use(tmp_path, monkeypatch):
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    file = tmp_path / "limit"
    monkeypatch.setattr(machine, "CGROUPS", (str(tmp_path / "none"), str(file)))
    for content, expected in ((None, whole), ("max\n", whole), ("1048576\n", 2**20),
                              (f"{2**63 - 4096}\n", whole)):
        if content:
            file.write_text(content)
        assert machine.memory(torch.device("cpu")) == expected


def test_bytes_in_words():
    sizes = {300_000: "0.3 MiB", 5 * 2**20: "5.0 MiB", 2**30: "1.0 GiB", 2500 * 2**30: "2,500.0 GiB"}
    assert {size: machine.in_words(size) for size in sizes} == sizes
    with pytest.raises(ValueError, match="^x needs at least 2.0 GiB of m .*a 2.0 GiB., where 5.0 MiB are"):
        machine.check_room("x", {"a": 2**31}, 5 * 2**20, "m", "y")


def test_a_switch_that_is_off_is_the_default_of_its_path():
    """Stored as False, it means the same as in a published model's objective, which leaves it out."""
    a, b = (ddpm.DDPM(**options) for options in ({}, {"zero_terminal_snr": False}))
    assert a.table.equal(b.table)


@pytest.mark.parametrize("flags, expected", [
    ([], dict(image_channels=3, latent_channels=4)),
    (["--vae-preset", "tiny", "--latent-channels", "8", "--vae-widths", "8", "16"],
     vae.PRESETS["tiny"] | dict(image_channels=3, latent_channels=8, widths=(8, 16))),
])
def test_configuration_of_the_vae(flags, expected):
    preset = {} if flags else vae.PRESETS["small"]
    for arch in ("vae", "dit"):
        assert settings.vae_config(parse(["--arch", arch, *flags]), 3) == preset | expected


def network_config(*flags, widths=(16, 12), classes=5):
    """As run.prepare and the task make it, for an encoder of these widths."""
    args = parse(flags)
    kind = conditioning.of_settings(args.cond, settings.text_config(args), 0.1, torch.device("cpu"))
    kind.classes = ["c"] * classes if args.cond == "class" else []
    kind.widths = conditioning.TextWidths(*widths)
    config = settings.network_config(args, 8, kind)
    full = settings.ARCHITECTURES[args.arch].config(**config)             # with what is left to its defaults
    return {name: getattr(full, name) for name in full.__dataclass_fields__}


TEXT = ["--text-encoder", "clip:x"]


@pytest.mark.parametrize("flags, expected", [
    (["--arch", "dit", "--preset", "S/2"],
     dict(width=384, depth=12, heads=6, patch=(2, 2), channels=8, num_classes=5, conv=False, qk_norm=True)),
    (["--arch", "dit", "--preset", "S/2", "--cond", "none"], dict(num_classes=0)),
    (["--arch", "dit", "--preset", "S/2", "--patch", "4", "--conv"], dict(patch=(4, 4), conv=True)),
    (["--arch", "dit", "--patch", "1", "2"], dict(patch=(1, 2))),
    (["--arch", "dit", "--block", "published"], dit.PUBLISHED_BLOCK),
    (["--arch", "dit", "--block", "modern"], dict(qk_norm=True)),
    (["--arch", "dit", "--objective", "ddpm", "--published", "dit-xl-2-256", "--vae", "v", "--init-from",
      "w"],
     dict(dit.PUBLISHED_BLOCK, width=1152, depth=28, heads=16, patch=(2, 2), channels=8, num_classes=5,
          learn_sigma=True, time_scale=1000.0, time_offset=-1.0)),
    (["--arch", "mmdit", "--preset", "tiny", *TEXT],
     dict(channels=8, context_width=16, pooled_width=12, guidance=False)),
    (["--arch", "mmdit", "--preset", "flux-dev", *TEXT], dict(context_width=16, guidance=False)),
    (["--arch", "unet", "--preset", "tiny"],
     dict(channels=8, num_classes=5, context_width=None, pooled_width=None, positions=False)),
    # in a U-Net of our own, text reaches every level, and positions are added before attention
    (["--arch", "unet", "--preset", "small", "--cond", "text", *TEXT],
     dict(num_classes=0, context_width=16, pooled_width=12, positions=True, attention=(True, True))),
    # Stable Diffusion's, without a pooled vector, stays as published, and takes text only with --cond text
    (["--arch", "unet", "--preset", "sd1", "--cond", "text", *TEXT],
     dict(num_classes=0, context_width=16, pooled_width=None, positions=False,
          attention=unet.UNetConfig(**unet.PRESETS["sd1"]).attention)),
    (["--arch", "unet", "--preset", "sd1"], dict(num_classes=5, context_width=None)),
    (["--arch", "unet", "--preset", "sd2", "--cond", "none"], dict(num_classes=0, context_width=None)),
])
def test_configuration_of_the_network(flags, expected):
    found = network_config(*flags)
    assert {name: found[name] for name in expected} == expected


def test_configuration_of_text_without_a_pooled_vector():
    assert network_config("--arch", "mmdit", *TEXT, widths=(16, None))["pooled_width"] is None
    found = network_config("--arch", "unet", "--cond", "text", *TEXT, widths=(16, None))
    assert found["pooled_width"] is None and found["positions"]


@pytest.mark.parametrize("flags, expected", [
    (["--arch", "mmdit", "--text-encoder", "clip:a/b"], {"encoder": "clip", "path": "a/b"}),
    (["--arch", "mmdit", "--text-encoder", "t5:a:b"], {"encoder": "t5", "path": "a:b"}),
    (["--arch", "mmdit", "--text-encoder", "none"], {"encoder": "none"}),
    (["--arch", "mmdit", "--text-encoder", "sd3:a"], {"encoder": "sd3", "path": "a"}),
    (["--arch", "mmdit", "--text-encoder", "sd3:a", "--no-t5"],
     {"encoder": "sd3", "path": "a", "no_t5": True}),
    (["--arch", "dit"], None), (["--arch", "vae", "--cond", "text"], None),
])
def test_configuration_of_the_text_encoder(flags, expected):
    assert settings.text_config(parse(flags)) == expected


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_configuration_of_the_built_in_text_encoder(preset):
    found = settings.text_config(parse(["--arch", "mmdit", "--preset", preset]))
    assert found["encoder"] == "bytes"
    assert text.TextConfig(**found["config"]) == text.TextConfig(**text.PRESETS.get(preset, {}))


# ---- settings of other versions, spellings of a path

@pytest.mark.parametrize("missing", ["label_dropout", "flip", "conv", "precision", "accumulate", "lr"])
def test_a_flag_that_did_not_exist_takes_its_default(missing):
    begun = stored("--arch", "dit")
    older = {name: value for name, value in begun.items() if name != missing} | {"vae_name": "shapes-vae"}
    assert settings.complete(older, "f") == begun | {"vae_name": "shapes-vae"}


def test_a_default_of_today_never_replaces_a_recorded_value():
    """ddpm with text predicted eps before it predicted v."""
    older = stored("--arch", "unet", "--cond", "text", "--objective", "ddpm") | {"prediction": None}
    del older["label_dropout"]
    assert settings.complete(older, "f")["prediction"] is None


@pytest.mark.parametrize("change, message", [
    ({"wings": 2}, "f: its setting wings 2 does not exist in this version"),
    ({"moe": "top2"}, "its setting moe top2 does not exist"), ({"wings": [1]}, "its setting wings"),
    ({"arch": None}, "its setting arch is null; restore it"), ({"arch": "cnn"}, 'its setting arch is "cnn"'),
    ({"steps": "abc"}, 'f: damaged, or of another version: its setting steps is "abc"; restore it'),
    ({"steps": None}, "its setting steps is null"), ({"steps": [1]}, r"its setting steps is \[1\]"),
    ({"steps": True}, "steps is true"), ({"steps": 0}, "steps is 0"), ({"lr": float("nan")}, "lr is NaN"),
    ({"flip": 1}, "its setting flip is 1"), ({"conv": None}, "its setting conv is null"),
    ({"image_size": 32}, "image_size is 32"), ({"image_size": []}, r"image_size is \[\]"),
    ({"image_size": [32, "x"]}, "image_size is"), ({"image_size": [8, 8, 8]}, "image_size is"),
    ({"data": 3}, "data is 3"), ({"vae": {}}, "vae is {}"), ({"seed": -1}, "seed is -1"),
])
def test_settings_that_this_version_cannot_continue(change, message):
    older = stored("--arch", "dit") | change
    del older["label_dropout"]
    with pytest.raises(ValueError, match=message):
        settings.complete(older, "f")
    begun = stored("--arch", "dit")
    for name in ("arch", "data"):              # whose default is not what the run began with
        with pytest.raises(ValueError, match=f"damaged, or of another version: it lacks {name}; restore it"):
            settings.complete({key: begun[key] for key in begun if key != name}, "f")
    off = stored("--arch", "dit") | {"wings": None, "moe": False}
    assert settings.complete(off, "f") == off


def test_spellings_of_one_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").mkdir()
    for name in ("data", "vae", "init_from"):
        for spelling in ("p", "p/", "./p", "../" + tmp_path.name + "/p", str(tmp_path / "p")):
            assert settings.same_value(name, "p", spelling) and settings.same_value(name, spelling, "p")
        if name == "vae":
            assert settings.same_value(name, "p", "./p/checkpoint.pt")
        for other in ("q", "p/q", None, ""):
            assert not settings.same_value(name, "p", other)
    assert not settings.same_value("data", "shapes", "./shapes")       # a built-in source, a folder
    assert not settings.same_value("cond", "p", "./p") and settings.same_value("text_encoder", "t5:a", "t5:b")
    begun = stored("--arch", "vae", "--data", "p")
    settings.vae_settings(parse(["--arch", "dit", "--data", "p/"]), begun)
