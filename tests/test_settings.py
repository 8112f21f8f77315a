"""settings.py: what each flag accepts, the defaults, and the configurations they make, by value."""

import argparse
import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import conditioning
import ddpm
import dit
import run
import sample
import settings
import text
import unet
import vae
from settings import file_path, integer, number, one_of, parse, published_model, text_encoder

# ---- what a flag accepts

@pytest.mark.parametrize("accept, given, expected", [
    (number(0, 1), "0", 0.0), (number(0, 1), "1", 1.0), (number(0, 1), "1e-3", 0.001),
    (number(0, 1), "-0.0", 0.0), (number(-1, 2), "-1", -1.0), (number(-1, 2), "2", 2.0),
    (number(1e-12), "1e-12", 1e-12), (number(1e-12), "1e300", 1e300), (number(1e-12), "inf", math.inf),
    (number(0, 1e9), "1e9", 1e9),
    (integer(1), "1", 1), (integer(1), "1000000000", 10**9), (integer(0, 2**62), "0", 0),
    (integer(0, 2**62), str(2**62), 2**62), (integer(-5, 5), "-5", -5),
    (one_of(("a", "b")), "b", "b"),
    (file_path, "a b/c", "a b/c"),
    (text_encoder, "bytes", "bytes"), (text_encoder, "none", "none"), (text_encoder, "clip:a", "clip:a"),
    (text_encoder, "t5:/a:b", "t5:/a:b"),
    (published_model, "dit-xl-2-256", "dit-xl-2-256"),
])
def test_accepted(accept, given, expected):
    value = accept(given)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize("accept, given, message", [
    (number(0, 1), "nan", "nan: must be between 0 and 1"),
    (number(0, 1), "inf", "inf: must be between 0 and 1"),
    (number(0, 1), "-inf", "-inf: must be between 0 and 1"),
    (number(0, 1), "1.0000001", "must be between 0 and 1"),
    (number(0, 1), "-1e-9", "must be between 0 and 1"),
    (number(0, 1), "", ": must be a number between 0 and 1"),
    (number(0, 1), "1,5", "1,5: must be a number between 0 and 1"),
    (number(2), "1", "1: must be at least 2"),
    (number(2), "nan", "nan: must be at least 2"),
    (number(2), "x", "x: must be a number at least 2"),
    (integer(1), "0", "0: must be between 1 and 1,000,000,000"),
    (integer(1), "1000000001", "must be between 1 and 1,000,000,000"),
    (integer(1), "1e3", "1e3: must be a whole number between 1 and 1,000,000,000"),
    (integer(1), "1.0", "1.0: must be a whole number"),
    (integer(1), "nan", "nan: must be a whole number"),
    (integer(1), "", ": must be a whole number"),
    (integer(0, 5), "-1", "-1: must be between 0 and 5"),
    (one_of(("a", "b")), "c", "c: must be one of a, b"),
    (one_of(("a", "b")), "", ": must be one of a, b"),
    (file_path, "", "is empty; give a path, or leave it out"),
    (text_encoder, "", "must be bytes, clip:FOLDER, t5:FOLDER or none"),
    (text_encoder, "bert", "bert: must be bytes"),
    (text_encoder, "clip", "clip: must be"), (text_encoder, "t5:", "t5:: must be"),
    (text_encoder, "bytes:x", "bytes:x: must be"), (text_encoder, "none:x", "none:x: must be"),
    (published_model, "dit-xxl-2-256", "dit-xxl-2-256: known are dit-xl-2-256, .* s, b, l, xl at patch"),
])
def test_not_accepted(accept, given, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        accept(given)


# ---- the tables

TABLES = [(name, flag) for name, groups in (("train", settings.FLAGS), ("sample", sample.FLAGS))
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
    for groups in (settings.FLAGS, sample.FLAGS):
        names = [flag.name for flags in groups.values() for flag in flags]
        assert len(names) == len(set(names))
    assert len(settings.ROWS) == sum(map(len, settings.FLAGS.values()))


@pytest.mark.parametrize("name", settings.OBJECTIVES)
def test_options_are_arguments_of_their_path(name):
    """Every flag of an objective sets one option, and none belongs to another objective."""
    own = [flag for flag in settings.ROWS.values()
           if flag.option and name in flag.needs.get("objective", settings.OBJECTIVES)]
    assert len(own) == len(settings.OBJECTIVES[name].flags) + 1                          # and --prediction
    for flag in own:
        assert flag.option in settings.OBJECTIVES[name].path.__init__.__code__.co_varnames, flag.name
        assert flag.settled and flag.needs["arch"] == ("dit", "mmdit", "unet")


def test_settings_that_may_change_on_resume():
    """Paths, intervals and the machine. Nothing that affects training may stand in this list."""
    assert settings.RESUMABLE == {
        "name", "runs_dir", "data_dir", "cache_dir", "device", "compile", "grad_checkpoint", "log_every",
        "val_every", "preview_every", "save_every"}


def test_settings_that_a_published_model_decides():
    assert {flag.key for flag in settings.ROWS.values() if flag.settled} == {
        "preset", "prediction", "schedule", "min_snr", "zero_terminal_snr", "density", "density_mean",
        "density_std", "mode_scale", "shift", "patch", "block", "conv", "text_encoder"}


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
        unet.SpatialTransformer, text.TextBlock}


# ---- defaults

@pytest.mark.parametrize("flags, expected", [
    (["--arch", "dit"],
     dict(objective="rf", prediction=None, cond="class", preset="small", steps=2400, batch_size=64, lr=4e-3,
          warmup=100, ema=0.998, weight_decay=0.01, image_size=[32, 32], name="shapes-dit-rf",
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
    (["--arch", "dit", "--min-snr", "0", "--objective", "ddpm"], dict(min_snr=0.0)),
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
    (["--arch", "dit", "--vae", ""], "--vae is empty; give a path, or leave it out"),
    (["--arch", "dit", "--init-from", ""], "--init-from is empty"),
    (["--arch", "dit", "--name", ""], "--name is empty"),
    (["--arch", "dit", "--runs-dir", ""], "--runs-dir is empty"),
    (["--arch", "dit", "--data", ""], "--data is empty"),
    (["--arch", "dit", "--cache-dir", ""], "--cache-dir is empty"),
    (["--arch", "dit", "--preset", ""], "--preset : dit has tiny, small"),
    (["--arch", "dit", "--lr", "nan"], "--lr nan: must be between"),
    (["--arch", "dit", "--lr", "0"], "--lr 0: must be between"),
    (["--arch", "dit", "--clip", "0"], "--clip 0: must be at least 1e-12"),
    (["--arch", "dit", "--warmup", "-1"], "--warmup -1: must be between 0"),
    (["--arch", "dit", "--seed", "-1"], "--seed -1: must be between 0"),
    (["--arch", "dit", "--patch", "0"], "--patch 0: must be between 1"),
    (["--arch", "dit", "--patch", "1", "2", "3"], "--patch 1 2 3: give one side, or height and width"),
    (["--arch", "dit", "--image-size", "0"], "--image-size 0: must be between 1"),
    (["--arch", "dit", "--density", "mode", "--density-mean", "0"],
     "--density-mean 0.0: belongs to --density logit_normal, not mode"),
    (["--arch", "dit", "--mode-scale", "1"], "--mode-scale 1.0: belongs to --density mode, not logit_normal"),
    (["--arch", "dit", "--objective", "ddpm", "--density-std", "1"], "--density-std 1.0: .* --objective rf"),
    (["--arch", "dit", "--zero-terminal-snr"], "--zero-terminal-snr.*: belongs to --objective ddpm, not rf"),
    (["--arch", "dit", "--min-snr", "0"], "--min-snr 0.0: belongs to --objective ddpm, not rf"),
    (["--arch", "mmdit", "--block", "modern"], "--block modern: belongs to --arch dit, not mmdit"),
    (["--arch", "unet", "--cond", "none", "--text-encoder", "none"], "belongs to --cond text, not none"),
    (["--arch", "mmdit", "--cond", "none"], "--cond none: --arch mmdit takes --cond text; --cond none goes "
                                            "with --arch dit or unet"),
    (["--arch", "vae", "--vae-steps", "5"], "--vae-steps 5: belongs to .*, not vae; use --steps"),
    (["--arch", "vae", "--prediction", "v"], "--prediction v: belongs to .*, not vae"),
    (["--arch", "vae", "--init-from", "x"], "--init-from x: belongs to .*, not vae"),
    (["--arch", "vae", "--density", "mode"], "--density mode: belongs to .*, not vae"),
    (["--arch", "dit", "--vae", "x", "--vae-steps", "5"], "--vae-steps 5: --vae x is trained already"),
    (["--arch", "dit", "--vae", "x", "--kl-weight", "0"], "--kl-weight 0.0: --vae x is trained already"),
    (["--arch", "unet", "--preset", "S/2"], "--preset S/2: unet has tiny, small"),
    (["--arch", "dit", "--vae", "v", "--init-from", "x", "--published", "sit-b-4-512", "--preset", "S/2"],
     "--preset S/2: settled by --published sit-b-4-512; give one or the other"),
    (["--arch", "dit", "--vae", "v", "--init-from", "x", "--published", "sit-b-4-512", "--conv"],
     "--conv.*: settled by --published"),
])
def test_refusals(flags, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse(flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("script, flags", [
    ("train.py", ["--arch", "dit", "--image-size", "30"]),                 # refused by the plan of the run
    ("train.py", ["--arch", "dit", "--lr", "fast"]),                       # by the flag's type
    ("train.py", ["--arch", "dit", "--shift", "3", "--objective", "ddpm"]),   # by another flag
    ("train.py", ["--arch", "dit", "--wings", "2"]),                       # by argparse
    ("train.py", []),
    ("sample.py", ["runs/nothing"]),
    ("sample.py", ["runs/nothing", "--n", "1e3"]),
])
def test_one_line_and_exit_status_2(tmp_path, script, flags):
    result = subprocess.run([sys.executable, str(ROOT / script), *flags], capture_output=True, text=True,
                            cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith(f"{script}: error: ")
    assert not list(tmp_path.iterdir())


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
    """Its settings are kept; this command may repeat them, but not contradict them."""
    begun = vars(parse(["--arch", "vae", "--lr", "0.5", "--steps", "9", "--vae-widths", "8", "16", "--seed",
                        "4", "--log-every", "3", "--name", "shapes-vae"])) | {"vae_name": "shapes-vae"}
    args = parse(["--arch", "dit", "--vae-steps", "9", "--vae-widths", "8", "16", "--log-every", "7"])
    found = vars(settings.vae_settings(args, begun))
    assert (found["lr"], found["steps"], found["vae_widths"], found["seed"]) == (0.5, 9, [8, 16], 4)
    assert found["log_every"] == 7 and found["name"] == "shapes-vae"             # those may change
    for flags, message in ((["--vae-steps", "8"], "holds a VAE with steps 9, not 8"),
                           (["--vae-widths", "8", "8"], r"vae-widths \[8, 16\], not \[8, 8\]"),
                           (["--latent-channels", "8"], "latent-channels 4, not 8"),
                           (["--kl-weight", "0"], "kl-weight 1e-05, not 0.0"),
                           (["--vae-preset", "tiny"], "vae-preset small, not tiny")):
        with pytest.raises(ValueError, match=f"runs/shapes-vae .*{message}; train one by --arch vae"):
            settings.vae_settings(parse(["--arch", "dit", *flags]), begun)
    with pytest.raises(ValueError, match="holds a VAE with data other/shapes, not shapes"):
        settings.vae_settings(args, begun | {"data": "other/shapes"})


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
    run.build_path(config)


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
    (["--arch", "dit"], None), (["--arch", "vae", "--cond", "text"], None),
])
def test_configuration_of_the_text_encoder(flags, expected):
    assert settings.text_config(parse(flags)) == expected


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_configuration_of_the_built_in_text_encoder(preset):
    found = settings.text_config(parse(["--arch", "mmdit", "--preset", preset]))
    assert found["encoder"] == "bytes"
    assert text.TextConfig(**found["config"]) == text.TextConfig(**text.PRESETS.get(preset, {}))
