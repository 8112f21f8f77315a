"""Files of the published layouts, as a user would have downloaded them: here with random weights, small."""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import few_samples
from PIL import Image

import dit
import published
import run
import sample
import train
import vae
import weights
from ddpm import DDPM
from rectified_flow import RectifiedFlow

TINY_VAE = vae.VAEConfig(widths=(8, 8, 8, 8), groups=8)
SMALLER = dict(width=96, depth=4, heads=3)                # than any size that is published


def shake(model):
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return model.eval()


@pytest.fixture(scope="module", autouse=True)
def smaller_models():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("dit-s-8-256", "dit-s-8-512", "sit-s-8-256"):
            row = published.MODELS[name]
            row = row._replace(config=row.config | SMALLER)
            patch.setitem(published.MODELS, name.replace("-s-", "-xs-"), row)
        yield


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("downloads")
    torch.manual_seed(0)
    config = dit.DiTConfig(**published.MODELS["dit-xs-8-256"].config)
    state = shake(dit.DiT(config)).state_dict()
    table = dit.sincos_positions(4, 4, config.width)[None]                           # 256 / 8 / 8 = 4
    torch.save(state | {"pos_embed": table}, folder / "DiT-XS-8.pt")
    torch.save({"ema": state | {"pos_embed": table}, "model": {}, "opt": {},
                "args": argparse.Namespace(model="SiT-XS/8")}, folder / "SiT-XS-8.ckpt")
    torch.save({k: w for k, w in state.items() if not k.startswith("blocks.3.attn")}, folder / "short.pt")
    (folder / "page.pt").write_text("<html>404</html>")
    autoencoder = shake(vae.VAE(TINY_VAE))
    state = {name: w for name, w in autoencoder.state_dict().items() if not name.startswith("latent_")}
    (folder / "vae").mkdir()
    torch.save(state, folder / "vae/diffusion_pytorch_model.bin")
    (folder / "vae/config.json").write_text(json.dumps({"norm_num_groups": 8, "scaling_factor": 0.18215,
                                                        "shift_factor": None}))
    (folder / "pictures").mkdir()
    for i in range(12):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 40, 3), np.uint8)).save(
            folder / f"pictures/{i}.png")
    return folder


def flags(downloads, name="dit-xs-8-256", file="DiT-XS-8.pt", autoencoder="vae"):
    return ["--published", name, "--weights", str(downloads / file), "--vae", str(downloads / autoencoder)]


def by_hand(downloads, path, call, steps, sampler, **options):
    """The picture from the original network as its authors call it, time by their clock."""
    config = published.MODELS["dit-xs-8-256"].config | {"time_scale": 1.0, "time_offset": 0.0}
    state = torch.load(downloads / "DiT-XS-8.pt", weights_only=True)
    del state["pos_embed"]
    network = weights.load_weights(dit.DiT(dit.DiTConfig(**config)).eval(), state, "by hand")
    autoencoder = run.load_vae(downloads / "vae")
    label, no_label = ({"y": torch.tensor([y])} for y in (207, 1000))
    return sample.draw(lambda xt, t, y: call(network, xt, t, y), autoencoder, path, (4, 32, 32), range(0, 1),
                       label, no_label, sampler=sampler, steps=steps, scale=4.0, **options)[0]


@pytest.mark.parametrize("variance", [None, "learned"])
def test_published_dit_samples(downloads, tmp_path, variance):
    more = ["--variance", variance, "--sampler", "ddpm"] if variance else []
    sample.main([*flags(downloads), "--label", "207", "--cfg", "4", "--steps", "3", "--n", "1",
                 "--out", str(tmp_path / "dit.npz"), *more])
    want = by_hand(downloads, DDPM("eps", "linear", learned_variance=True),
                   lambda network, xt, t, y: network(xt, (1000 * t).round() - 1, y), 3,     # 0 .. 999
                   "ddpm" if variance else "ddim", **({"variance": variance} if variance else {}))
    got = np.load(tmp_path / "dit.npz")["arr_0"][0]
    assert got.shape == (256, 256, 3) and np.abs(got.astype(int) - want).max() <= 1 and got.std() > 1


def test_published_sit_samples(downloads, tmp_path):
    """Its clock is 1 - t, and its velocity that of its clock."""
    sample.main([*flags(downloads, "sit-xs-8-256", "SiT-XS-8.ckpt"), "--label", "207", "--cfg", "4",
                 "--steps", "3", "--n", "1", "--out", str(tmp_path / "sit.npz")])
    want = by_hand(downloads, RectifiedFlow(), lambda network, xt, t, y: -network(xt, 1 - t, y), 3, "heun")
    got = np.load(tmp_path / "sit.npz")["arr_0"][0]
    assert np.abs(got.astype(int) - want).max() <= 1 and got.std() > 1


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_every_published_preset_takes_the_original_names(family):
    for size, depth in (("s", 12), ("b", 12), ("l", 24), ("xl", 28)):
        for patch in (2, 4, 8):
            row = published.MODELS[f"{family}-{size}-{patch}-256"]
            with torch.device("meta"):
                model = run.build_model("dit", row.config)
                theirs = model.state_dict() | {"pos_embed": torch.empty(1, (32 // patch) ** 2, 1)}
                state = published.our_weights(f"{family}-{size}-{patch}-256", theirs)
            weights.check_weights(model, state, "file")
            assert len(model.blocks) == depth and model.config.patch == (patch, patch)
            assert model.out_channels == 8


def test_scale_of_a_published_vae(downloads, tmp_path):
    """config.json holds the scale; a VAE of another family is refused rather than used."""
    (tmp_path / "vae").mkdir()
    config, name = tmp_path / "vae/config.json", "diffusion_pytorch_model.bin"
    (tmp_path / "vae" / name).write_bytes((downloads / "vae" / name).read_bytes())
    config.write_text('{"norm_num_groups": 8, "scaling_factor": 0.13025}')
    torch.testing.assert_close(run.load_vae(tmp_path / "vae").latent_std, torch.full((4,), 1 / 0.13025))
    with pytest.raises(ValueError, match="scaled by 0.18215 .* this one has 4 at 1/8, scaled by 0.13025"):
        sample.main([*flags(downloads, autoencoder=str(tmp_path / "vae")), "--n", "1"])
    for damaged in ("{", "[3]"):
        config.write_text(damaged)
        with pytest.raises(ValueError, match="config.json: damaged"):
            run.load_vae(tmp_path / "vae")
    # a file of such a folder has its config.json; one that is alone is refused, as XL's has the same shapes
    assert run.load_vae(downloads / "vae" / name).latent_std[0].item() == pytest.approx(1 / 0.18215)
    (tmp_path / name).write_bytes((downloads / "vae" / name).read_bytes())
    with pytest.raises(ValueError, match="a VAE alone, without the scale .*0.13025 in Stable Diffusion XL"):
        run.load_vae(tmp_path / name)
    with pytest.raises(ValueError, match="groups = 32"):                 # of --published, without config.json
        run.load_vae(tmp_path / name, "dit-xl-2-256")


@pytest.mark.parametrize("change, message", [
    (dict(name="dit-xxl-2-256"), "--published dit-xxl-2-256: known are"),
    (dict(file="short.pt"), "short.pt: dit-xs-8-256: weights do not fit the network: missing "
                            "blocks.3.attn.qkv.weight; missing blocks.3.attn.qkv.bias; missing "
                            "blocks.3.attn.proj.weight and 1 more"),
    (dict(name="dit-b-8-256"), "DiT-XS-8.pt: holds the network of dit-xs-8-256 or sit-xs-8-256, not of "
                               "dit-b-8-256; give --published dit-xs-8-256"),
    (dict(name="dit-xs-8-512"), "DiT-XS-8.pt: holds the network of dit-xs-8-256 or sit-xs-8-256, not of"),
    (dict(file="page.pt"), "page.pt: not a file of weights"),
    (dict(file="none.pt"), "none.pt: no such file"),
    (dict(autoencoder="DiT-XS-8.pt"), "not the weights of an AutoencoderKL"),
    (dict(autoencoder="nothing"), "nothing: no checkpoint there"),
])
def test_wrong_downloads(downloads, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        sample.main([*flags(downloads, **change), "--n", "1"])
    assert not list(tmp_path.iterdir())


def test_run_and_published_exclude_each_other(downloads):
    for wrong in (["runs/x", *flags(downloads)], [], flags(downloads)[:4], ["runs/x", "--vae", "vae"]):
        with pytest.raises(ValueError, match="give a run, or --published NAME"):
            sample.main(wrong)
    with pytest.raises(ValueError, match="one set of weights"):
        sample.main([*flags(downloads), "--raw"])
    with pytest.raises(ValueError, match="not trained to predict a variance"):
        sample.main([*flags(downloads, "sit-xs-8-256"), "--variance", "learned", "--n", "1"])


FINE_TUNE = ["--arch", "dit", "--data", "pictures", "--image-size", "64", "--batch-size", "4", "--steps", "2",
             "--precision", "fp32", "--preview-every", "100", "--name"]


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_fine_tuning_begins_where_the_published_model_is(downloads, monkeypatch, family):
    monkeypatch.chdir(downloads)
    few_samples(monkeypatch, steps=2)
    objective, file = {"dit": ("ddpm", "DiT-XS-8.pt"), "sit": ("rf", "SiT-XS-8.ckpt")}[family]
    train.main([*FINE_TUNE, family, "--objective", objective, "--published", f"{family}-xs-8-256",
                "--vae", "vae", "--init-from", file, "--lr", "1e-9"])
    checkpoint = run.load_checkpoint(f"runs/{family}")
    original = torch.load("DiT-XS-8.pt", weights_only=True)
    for name in ("blocks.3.mlp.fc1.weight", "x_embedder.proj.weight", "final_layer.linear.weight"):
        sign = -1 if (family, name) == ("sit", "final_layer.linear.weight") else 1
        torch.testing.assert_close(checkpoint["model"][name], sign * original[name], atol=1e-6, rtol=0)
    assert "y_embedder.embedding_table.weight" not in checkpoint["model"]       # the pictures have no classes
    sample.main([f"runs/{family}", "--n", "1", "--steps", "2", "--out", "tuned.png"])
    # its own checkpoint goes on from where it is: nothing is read as a published layout twice
    train.main([*FINE_TUNE, f"{family}-again", "--objective", objective, "--published", f"{family}-xs-8-256",
                "--vae", "vae", "--init-from", f"runs/{family}", "--lr", "1e-9"])
    again = run.load_checkpoint(f"runs/{family}-again")["model"]
    torch.testing.assert_close(again, checkpoint["ema"], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="is a run of train.py"):
        sample.main(flags(downloads, f"{family}-xs-8-256", f"runs/{family}/checkpoint.pt"))
    # and a finished or resumed run needs neither download any more
    (downloads / file).rename(downloads / "moved")
    train.main([*FINE_TUNE, family, "--objective", objective, "--published", f"{family}-xs-8-256",
                "--vae", "vae", "--init-from", file, "--lr", "1e-9"])
    (downloads / "moved").rename(downloads / file)


def test_init_from_a_run_and_its_refusals(downloads, monkeypatch):
    monkeypatch.chdir(downloads)
    few_samples(monkeypatch, steps=2)
    own = [*FINE_TUNE[:-1], "--vae", "vae", "--preset", "tiny"]
    train.main([*own, "--name", "first"])
    train.main([*own, "--name", "second", "--init-from", "runs/first", "--lr", "1e-9"])
    first, second = (run.load_checkpoint(f"runs/{name}") for name in ("first", "second"))
    for name, weight in first["ema"].items():
        torch.testing.assert_close(second["model"][name], weight, atol=1e-6, rtol=0)
    tuned = ["--published", "dit-xs-8-256", "--init-from", "DiT-XS-8.pt", "--vae", "vae", "--objective",
             "ddpm"]
    shutil.copytree("vae", "xl")
    Path("xl/config.json").write_text('{"norm_num_groups": 8, "scaling_factor": 0.13025}')
    before = set(downloads.rglob("*"))
    for flags, message in (
            ([*own[:-2], "--init-from", "runs/first"], "runs/first: .* with width 64, not 256; give"),
            ([*own, "--init-from", "none"], "no checkpoint"),
            ([*FINE_TUNE[:-1], *tuned[:4]], "needs --init-from FILE, its weights, and --vae"),
            ([*FINE_TUNE[:-1], *tuned[:6]], "is --arch dit --objective ddpm"),
            ([*FINE_TUNE[:-1], *tuned, "--min-snr", "5"], "--min-snr 5.0: settled by --published"),
            ([*FINE_TUNE[:-1], *tuned[:2], "--init-from", "runs/first", *tuned[4:]], "was trained with"),
            ([*FINE_TUNE[:-1], *tuned[:4], "--vae", "xl", *tuned[6:]], "scaled by 0.18215 .* by 0.13025"),
            ([*own, "--init-from", ""], "--init-from is empty"),
            (["--arch", "unet", *FINE_TUNE[2:-1], "--vae", "vae", "--init-from", "runs/first"],
             "is a dit, not a unet")):
        with pytest.raises(ValueError, match=message):
            train.main([*flags, "--name", "refused"])
    assert set(downloads.rglob("*")) == before
