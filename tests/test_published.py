"""Files of the published layouts, as a user would have downloaded them: here with random weights, small."""

import argparse
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import few_samples, write_safetensors
from PIL import Image

import checkpoints
import dit
import draw
import encoders
import names
import networks
import plan
import published
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
    autoencoder = checkpoints.load_vae(downloads / "vae")
    label, no_label = ({"y": torch.tensor([y])} for y in (207, 1000))
    return draw.draw(lambda xt, t, y: call(network, xt, t, y), autoencoder, path, (4, 32, 32), range(0, 1),
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
                model = networks.build_model("dit", row.config)
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
    found = checkpoints.load_vae(tmp_path / "vae")
    torch.testing.assert_close(found.latent_std, torch.full((4,), 1 / 0.13025))
    with pytest.raises(ValueError, match="scaled by 0.18215 .* this one has 4 at 1/8, scaled by 0.13025"):
        sample.main([*flags(downloads, autoencoder=str(tmp_path / "vae")), "--n", "1"])
    for damaged in ("{", "[3]"):
        config.write_text(damaged)
        with pytest.raises(ValueError, match="config.json: damaged"):
            checkpoints.load_vae(tmp_path / "vae")
    # a file of such a folder has its config.json; one that is alone is refused, as XL's has the same shapes
    assert checkpoints.load_vae(downloads / "vae" / name).latent_std[0].item() == pytest.approx(1 / 0.18215)
    (tmp_path / name).write_bytes((downloads / "vae" / name).read_bytes())
    with pytest.raises(ValueError, match="a VAE alone, without the scale .*0.13025 in Stable Diffusion XL"):
        checkpoints.load_vae(tmp_path / name)
    with pytest.raises(ValueError, match="groups = 32"):                 # of --published, without config.json
        checkpoints.load_vae(tmp_path / name, "dit-xl-2-256")


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
    (dict(autoencoder="nothing"), "nothing: no such file or folder"),
])
def test_wrong_downloads(downloads, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        sample.main([*flags(downloads, **change), "--n", "1"])
    assert not list(tmp_path.iterdir())


def test_run_and_published_exclude_each_other(downloads):
    for wrong in (["runs/x", *flags(downloads)], [], flags(downloads)[:2], ["runs/x", "--vae", "vae"]):
        with pytest.raises(ValueError, match="give a run, or --published NAME|a run or a published model, n"):
            sample.main(wrong)
    with pytest.raises(ValueError, match="DiT-XS-8.pt: no VAE there .*; give it by --vae PATH"):
        sample.main(flags(downloads)[:4])
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
    checkpoint = checkpoints.load_checkpoint(f"runs/{family}")
    original = torch.load("DiT-XS-8.pt", weights_only=True)
    for name in ("blocks.3.mlp.fc1.weight", "x_embedder.proj.weight", "final_layer.linear.weight"):
        sign = -1 if (family, name) == ("sit", "final_layer.linear.weight") else 1
        torch.testing.assert_close(checkpoint["model"][name], sign * original[name], atol=1e-6, rtol=0)
    assert "y_embedder.embedding_table.weight" not in checkpoint["model"]       # the pictures have no classes
    sample.main([f"runs/{family}", "--n", "1", "--steps", "2", "--out", "tuned.png"])
    # its own checkpoint goes on from where it is: nothing is read as a published layout twice
    train.main([*FINE_TUNE, f"{family}-again", "--objective", objective, "--published", f"{family}-xs-8-256",
                "--vae", "vae", "--init-from", f"runs/{family}", "--lr", "1e-9"])
    again = checkpoints.load_checkpoint(f"runs/{family}-again")["model"]
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
    first, second = (checkpoints.load_checkpoint(f"runs/{name}") for name in ("first", "second"))
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


# ---- the authors' files of networks and VAEs

def test_sit_of_512_has_single_channels(downloads, tmp_path):
    """Its authors built the network of 256 with channels that nobody reads, and that of 512 without them."""
    config = published.MODELS["dit-xs-8-512"].config | published.SIT_TIME
    original = shake(dit.DiT(dit.DiTConfig(**config | {"learn_sigma": False})))
    table = dit.sincos_positions(8, 8, config["width"])[None]
    torch.save({"ema": original.state_dict() | {"pos_embed": table}}, tmp_path / "SiT-512.pt")
    with pytest.MonkeyPatch.context() as patch:
        row = published.MODELS["sit-s-8-512"]
        patch.setitem(published.MODELS, "sit-xs-8-512", row._replace(config=row.config | SMALLER))
        ours = published.load_network("sit-xs-8-512", tmp_path / "SiT-512.pt")
    x, t, y = torch.randn(2, 4, 64, 64), torch.tensor([0.2, 0.9]), torch.tensor([1, 1000])
    out = ours(x, t, y)
    torch.testing.assert_close(out[:, :4], -original(x, t, y))             # the velocity of its own time
    assert out.shape[1] == 8 and (out[:, 4:] == 0).all()


WIDE = [i / 4 - 1 for i in range(4)]


def vae_state(tiny=None):
    autoencoder = shake(vae.VAE(tiny or TINY_VAE))
    return {name: weight for name, weight in autoencoder.state_dict().items()
            if not name.startswith("latent_")}


@pytest.fixture
def eight_groups(monkeypatch):
    """Files without a config.json have 32 groups, more than a tiny VAE has channels."""
    build = published.vae_from_weights
    monkeypatch.setattr(published, "vae_from_weights", lambda state, scale, shift, groups: build(
        state, scale, shift, 8))


@pytest.mark.parametrize("others, channels, latents", [
    (("model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.x"), 4, published.SD),
    (("model.diffusion_model.input_blocks.0.0.weight",), 4, published.SD),
    (("model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.1.model.x"), 4, published.XL),
    (("model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.label_emb.0.0.weight"), 4,
     published.XL),
    (("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",), 16, published.SD3),
    (("model.diffusion_model.double_blocks.0.img_mod.lin.weight",), 16, published.FLUX),
])
def test_a_whole_file_shows_the_scale_of_its_vae(tmp_path, eight_groups, others, channels, latents):
    """By the names of its other parts, whatever --published says: check_vae then refuses."""
    config = vae.VAEConfig(widths=(8, 8, 8, 8), groups=8, latent_channels=channels, quant_conv=channels == 4)
    state = vae_state(config)
    whole = {f"first_stage_model.{name}": weight for name, weight in state.items()}
    torch.save({"state_dict": whole | {name: torch.ones(1) for name in others}}, tmp_path / "whole.ckpt")
    for name in (None, "dit-xl-2-256"):
        found = checkpoints.load_vae(tmp_path / "whole.ckpt", name)
        torch.testing.assert_close(found.latent_std, torch.full((channels,), 1 / latents.scale))
        torch.testing.assert_close(found.latent_mean, torch.full((channels,), latents.shift))
        for key, weight in state.items():
            assert torch.equal(found.state_dict()[key], weight)
    for name, row in published.MODELS.items():
        if row.latents == latents:
            published.check_vae(name, found, "--vae x")
        else:
            with pytest.raises(ValueError, match=f"--vae x: {name} was trained in .* scaled by "
                                                 f"{row.latents.scale}.*this one has {channels} at 1/8"):
                published.check_vae(name, found, "--vae x")


@pytest.mark.parametrize("name, channels, latents", [
    ("ae.safetensors", 16, published.FLUX), ("sdxl_vae.safetensors", 4, published.XL),
    ("vae-ft-mse-840000-ema-pruned.ckpt", 4, published.SD)])
def test_a_vae_alone_is_known_by_its_published_name(tmp_path, eight_groups, name, channels, latents, capsys):
    config = vae.VAEConfig(widths=(8, 8, 8, 8), groups=8, latent_channels=channels, quant_conv=channels == 4)
    state = vae_state(config)
    for file in (tmp_path / name, tmp_path / f"my-{name}"):
        if file.suffix == ".ckpt":
            torch.save(state, file)
        else:
            write_safetensors(file, state)
    # the same shapes may be another model's, so its name counts before --published, and check_vae refuses
    for model in (None, "dit-xl-2-256", "sd3-medium"):
        assert published.load_vae(tmp_path / name, model).latent_std[0].item() == pytest.approx(
            1 / latents.scale)
    with pytest.raises(ValueError, match="a VAE alone, without the scale of its latents"):
        published.load_vae(tmp_path / f"my-{name}")
    assert capsys.readouterr().err == ""
    found = published.load_vae(tmp_path / f"my-{name}", "flux-dev")
    assert capsys.readouterr().err == (
        f"{tmp_path}/my-{name}: a VAE alone does not show its scale; taken as 0.3611, that of FLUX; if it is "
        "another model's, colours are wrong: give a folder with its config.json\n")
    assert found.latent_mean[0].item() == pytest.approx(0.1159)


def test_means_and_deviations_of_latents(tmp_path):
    """x0 = (z - mean) / std * scaling_factor, each channel by its own."""
    torch.save(vae_state(), tmp_path / "diffusion_pytorch_model.bin")
    config = {"norm_num_groups": 8, "scaling_factor": 0.5, "latents_mean": WIDE,
              "latents_std": [1, 2, 4, 0.5]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = checkpoints.load_vae(tmp_path)
    z = torch.randn(2, 4, 3, 3)
    mean, std = (torch.tensor(config[f"latents_{name}"]).view(4, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(found.normalize(z), (z - mean) / std * 0.5)
    for wrong, message in (({"latents_mean": WIDE * 2}, "config.json has another number of means"),
                           ({"latents_std": ["x"] * 4}, "config.json: damaged"),
                           ({"latents_std": 3}, "config.json: damaged"),
                           ({"latents_std": [0, 1, 1, 1]}, "config.json: damaged"),
                           ({"scaling_factor": "x", "latents_mean": None}, "config.json: damaged")):
        (tmp_path / "config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(ValueError, match=message):
            checkpoints.load_vae(tmp_path)


def test_a_folder_of_a_whole_pipeline(tmp_path):
    """Network and VAE from its parts, in the file's precision or another; what is missing is one line."""
    row = published.MODELS["dit-xs-8-256"]
    for folder in ("transformer", "vae"):
        (tmp_path / folder).mkdir()
    state = shake(dit.DiT(dit.DiTConfig(**row.config))).half().state_dict()
    torch.save(state, tmp_path / "transformer/diffusion_pytorch_model.fp16.bin")
    for dtype in (None, torch.bfloat16):
        network = published.load_network("dit-xs-8-256", tmp_path, dtype)
        for name, weight in network.state_dict().items():
            assert weight.dtype == (dtype or torch.float16)
            assert torch.equal(weight, state[name].to(weight.dtype))
        assert not network.training and not any(p.requires_grad for p in network.parameters())
    with pytest.raises(ValueError, match="vae: no files of weights in this folder"):
        published.load_vae(tmp_path, "dit-xs-8-256")
    torch.save(vae_state(), tmp_path / "vae/diffusion_pytorch_model.bin")
    (tmp_path / "vae/config.json").write_text('{"norm_num_groups": 8, "scaling_factor": 0.18215}')
    assert checkpoints.load_vae(tmp_path).config == TINY_VAE
    (tmp_path / "transformer/diffusion_pytorch_model.fp16.bin").unlink()
    with pytest.raises(ValueError, match="transformer: no files of weights in this folder"):
        published.load_network("dit-xs-8-256", tmp_path)


def test_text_encoders_of_a_whole_file(tmp_path):
    clip, t5 = encoders.RECIPES["flux-dev"].parts
    prefix = "cond_stage_model.transformer.text_model."
    state = {f"{prefix}final_layer_norm.weight": torch.ones(4)}
    file = str(tmp_path / "x.ckpt")
    torch.save(state, file)
    found = published.find_text_encoders([clip], [file])
    assert set(published.read_text_encoders([clip], found, "x")["text_encoder"]) == {
        "text_model.final_layer_norm.weight"}
    with pytest.raises(ValueError, match="x.ckpt: the text encoder T5-XXL is not in this file; give a"):
        published.find_text_encoders([clip, t5], [file])
    torch.save({name: weight * torch.nan for name, weight in state.items()}, file)
    found = published.find_text_encoders([clip], [file])
    with pytest.raises(ValueError, match="^x: .*_norm.weight has values that are not finite .*; download it"):
        published.read_text_encoders([clip], found, "x")


# ---- the rows

TINY = {
    "sd1.5": dict(widths=(8, 16), attention=(True, False), groups=4, heads=2, context_width=12),
    "sd3.5-medium": dict(width=32, depth=3, heads=2, dual_attention=2, context_width=12, pooled_width=8,
                         sincos=(8, 12)),
    "flux-dev": dict(width=32, depth=2, single_depth=2, heads=2, rope=(4, 6, 6), context_width=12,
                     pooled_width=8)}


@pytest.mark.parametrize("name", TINY)
def test_a_network_that_is_trained_on(tmp_path, monkeypatch, name):
    """What --init-from reads fits the network of the row, by the authors' names and by ours; weights of
    another model are refused in one line that names it."""
    row = published.MODELS[name]
    monkeypatch.setitem(published.MODELS, name, row._replace(config=row.config | TINY[name]))
    config = published.MODELS[name].config
    state = shake(networks.build_model(row.arch, config)).state_dict()
    torch.save({f"model.diffusion_model.{key}": weight for key, weight in state.items()}
               if row.arch == "unet" else state, tmp_path / "w.ckpt")
    if row.arch == "mmdit":                                # ours are the original's, but for these
        original = {re.sub(r"\.(q|k)_norm$", r".ln_\1.weight", key): w for key, w in state.items()}
        if "position_table" in original:
            line = original.pop("position_table")
            original["pos_embed"] = torch.cat([line.repeat(12, 1), line.repeat_interleave(12, 0)], 1)[None]
        torch.save(original, tmp_path / "w.ckpt")
    args = SimpleNamespace(init_from=str(tmp_path / "w.ckpt"), published=name, arch=row.arch)
    found = plan.read_initial(args)["ema"]
    network = networks.build_model(row.arch, config)
    weights.load_weights(network, plan.fit_weights(network, found, "w"), "w")
    for key, weight in network.state_dict().items():
        if name != "flux-dev" or not key.startswith("final_layer.linear"):     # rearranged; see test_names.py
            assert torch.equal(weight, state[key])
    other = {"sd1.5": "sd2.1", "sd3.5-medium": "flux-dev", "flux-dev": "sd3-medium"}[name]
    with pytest.raises(ValueError, match=f"w.ckpt: holds the network of {name}, not of {other}; give "
                                         f"--published {name}"):
        published.read_network(other, tmp_path / "w.ckpt")


def test_every_row_is_complete():
    for name, row in published.MODELS.items():
        path = networks.build_path(row.objective)
        assert row.arch in ("dit", "mmdit", "unet", "stable-audio") and row.steps > 0 and row.guidance >= 1
        channels = row.config.get("channels", 4)
        assert channels == row.latents.channels and row.side % max(64, row.latents.factor) == 0
        assert (row.rate is None) == (row.arch != "stable-audio")
        assert row.size == ((row.side, row.side) if row.rate is None else (1, row.side))
        assert (row.text is None) == (row.arch == "dit")
        if row.text:
            kinds = {part.kind.lower() for part in encoders.RECIPES[row.text].parts}
            assert kinds <= set(names.TEXT_PREFIXES)
        assert path.prediction == {"dit": "eps", "sit": "velocity", "sd1.5": "eps", "sd2.1-base": "eps",
                                   "sd2.1": "v", "sdxl": "eps",
                                   "stable-audio-open-1.0": "v"}.get(name.split("-")[0] if row.arch == "dit"
                                                                    else name, "velocity")
    (low, at_low), (high, at_high) = published.MODELS["flux-dev"].shift_points
    assert (low, high) == ((256 // 16) ** 2, (1024 // 16) ** 2) and (at_low, at_high) == (0.5, 1.15)


@pytest.mark.parametrize("name, message", [
    ("sd1.5", "DiT-XS-8.pt: holds the network of dit-xs-8-256 or sit-xs-8-256, not of sd1.5"),
    ("flux-dev", "DiT-XS-8.pt: holds the network of dit-xs-8-256 or sit-xs-8-256, not of flux-dev")])
def test_files_of_class_models_are_no_models_of_text(downloads, name, message):
    with pytest.raises(ValueError, match=message):
        sample.main([*flags(downloads, name), "--n", "1"])
