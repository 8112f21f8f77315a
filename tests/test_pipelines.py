"""Published text-to-image models through sample.py, at tiny size with random weights: against the pipelines
of diffusers, an independent implementation, with the same prompts, noise and steps."""

import copy
import itertools
import shutil
import weakref
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from conftest import closed_to_us, few_samples
from test_encoders import LONG
from test_names import compvis_unet, flux_names, original_sd3

import checkpoints
import conditioning
import encoders
import mmdit
import names
import networks
import offload
import plan
import published
import sample
import settings
import tasks
import train
import unet
import vae
from benchmarks import memory

pytest.importorskip("diffusers", reason="pip install diffusers, for the comparison with its pipelines")
from test_diffusers import compvis

pytestmark = [pytest.mark.optional,
              pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]   # theirs

TEXT_MODELS = [name for name, row in published.MODELS.items() if row.text and row.rate is None]
SIDE = 64
STEPS = 5
PROMPTS = ["a red circle", "a blue square"]


# ---- the models, built on the spot

class Model(NamedTuple):
    pipe: object                         # of diffusers
    folder: Path                         # where it was saved


def shake(model, seed):
    """Random weights everywhere, as zero-initialised layers would hide differences behind them, and so large
    that a network draws something else for each prompt."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        with torch.no_grad():
            around = 1.0 if p.ndim == 1 and "norm" in name and name.endswith("weight") else 0.0
            p.copy_(around + 0.3 * torch.randn(p.shape, generator=generator) / max(1, p[0].numel()) ** 0.3)
    return model.eval()


UNET = dict(widths=(16, 32), layers=1, groups=8)
UNETS = {
    "sd1": UNET | dict(attention=(True, False), heads=2, context_width=16),
    "sd2": UNET | dict(attention=(True, False), heads=(1, 2), context_width=16),
    "sdxl": UNET | dict(attention=(False, True), heads=(1, 2), depth=(1, 2), context_width=40,
                        pooled_width=24 + 6 * 256),
}
MMDIT = dict(width=32, depth=2, heads=2, context_width=40)
SD3 = MMDIT | dict(pooled_width=40, sincos=(4, 12))
MMDITS = {
    "sd3-medium": SD3,
    "sd3.5-medium": SD3 | dict(dual_attention=1),
    "sd3.5-large": SD3,
    "flux-dev": MMDIT | dict(single_depth=2, pooled_width=16, rope=(4, 6, 6)),
    "flux-schnell": MMDIT | dict(single_depth=2, pooled_width=16, rope=(4, 6, 6)),
}


def tiny_config(name):
    row = published.MODELS[name]
    changes = UNETS[row.text] if row.arch == "unet" else MMDITS[name]
    return row.config | changes


def their_unet(c):
    from diffusers import UNet2DConditionModel

    xl = dict(addition_embed_type="text_time", addition_time_embed_dim=256,
              projection_class_embeddings_input_dim=c["pooled_width"],
              transformer_layers_per_block=list(c["depth"])) if c.get("pooled_width") else {}
    return UNet2DConditionModel(
        sample_size=SIDE // 8, block_out_channels=c["widths"], cross_attention_dim=c["context_width"],
        norm_num_groups=8, layers_per_block=1, attention_head_dim=c["heads"],
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in c["attention"]],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(c["attention"])],
        use_linear_projection=c.get("linear_projection", False), **xl)


def their_transformer(c):
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    shared = dict(num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=40,
                  pooled_projection_dim=c["pooled_width"])
    if c.get("single_depth"):
        return FluxTransformer2DModel(in_channels=64, num_single_layers=2, axes_dims_rope=c["rope"],
                                      guidance_embeds=c["guidance"], **shared)
    return SD3Transformer2DModel(
        sample_size=SIDE // 8, in_channels=16, out_channels=16, caption_projection_dim=32,
        pos_embed_max_size=12, dual_attention_layers=tuple(range(c.get("dual_attention", 0))),
        qk_norm="rms_norm" if c.get("qk_norm", True) else None, **shared)


def their_vae(latents):
    from diffusers import AutoencoderKL

    sd = latents.channels == 4
    return AutoencoderKL(block_out_channels=(32,) * 4, norm_num_groups=32, layers_per_block=1,
                         down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                         latent_channels=latents.channels, scaling_factor=latents.scale,
                         shift_factor=latents.shift or None, use_quant_conv=sd, use_post_quant_conv=sd)


def their_scheduler(name):
    """With the configuration that was published with the model."""
    from diffusers import (DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler,
                           PNDMScheduler)

    sd = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
    plms = PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **sd)
    flow = FlowMatchEulerDiscreteScheduler
    return {"sd1.5": plms, "sd2.1-base": plms,
            "sd2.1": DDIMScheduler(prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False,
                                   **sd),
            "sdxl": EulerDiscreteScheduler(timestep_spacing="leading", **sd),
            "flux-dev": flow(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
                             base_image_seq_len=256, max_image_seq_len=4096),
            "flux-schnell": flow(shift=1.0)}.get(name, flow(shift=3.0))


@pytest.fixture(scope="module")
def model(pipelines, tmp_path_factory):
    """A function: the tiny pipeline of this name. published.MODELS has rows of its size meanwhile."""
    root, built = tmp_path_factory.mktemp("models"), {}

    def build(name):
        if name not in built:
            row = published.MODELS[name]
            parts = {key: part for key, part in pipelines[row.text][0].components.items()
                     if key.startswith(("text_encoder", "tokenizer"))}
            network = their_unet(row.config) if row.arch == "unet" else their_transformer(row.config)
            parts["unet" if row.arch == "unet" else "transformer"] = shake(network, 1)
            if row.arch == "unet" and row.text != "sdxl":
                parts |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
            pipe = type(pipelines[row.text][0])(vae=shake(their_vae(row.latents), 2),
                                                scheduler=their_scheduler(name), **parts)
            pipe.set_progress_bar_config(disable=True)
            pipe.save_pretrained(root / name)
            built[name] = Model(pipe, root / name)
        return built[name]

    with pytest.MonkeyPatch.context() as patch:
        for name in TEXT_MODELS:
            row = published.MODELS[name]._replace(config=tiny_config(name), side=SIDE)
            patch.setitem(published.MODELS, name, row)
        yield build


# ---- drawn by sample.py, and by diffusers

@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """A function: latents and uint8 pictures of a sample.py command."""
    decode, seen = vae.VAE.decode, []
    monkeypatch.setattr(vae.VAE, "decode", lambda self, z: seen.append(z) or decode(self, z))

    def command(name, weights, *flags):
        seen.clear()
        out = tmp_path / "drawn.npz"
        sample.main(["--published", name, "--weights", str(weights), "--steps", str(STEPS), "--seed", "7",
                     *flags, "--out", str(out)])
        pictures = np.load(out)["arr_0"]
        out.unlink()
        return torch.cat(seen), pictures.astype(int)
    return command


def theirs(name, pipe, prompts, **how):
    """The same by the pipeline of diffusers."""
    how = dict(num_inference_steps=STEPS, height=SIDE, width=SIDE, output_type="np") | how
    if name.startswith("flux"):
        how["max_sequence_length"] = 512 if name == "flux-dev" else 256
    else:
        how.setdefault("negative_prompt", [""] * len(prompts))
        if name == "sdxl" and not any(how["negative_prompt"]):
            del how["negative_prompt"]
    decode, seen = pipe.vae.decode, []
    pipe.vae.decode = lambda z, **more: seen.append(z) or decode(z, **more)
    try:
        generators = [torch.Generator().manual_seed(7 + i) for i in range(len(prompts))]
        pictures = pipe(prompts, generator=generators, **how).images
    finally:
        pipe.vae.decode = decode
    return torch.cat(seen), (255 * pictures).round().astype(int)


def assert_same(ours, wanted):
    (latents, pictures), (their_latents, their_pictures) = ours, wanted
    scale = their_latents.abs().max().clamp(min=1)
    assert latents.shape == their_latents.shape and their_latents.std() > 0.1
    assert (latents - their_latents).abs().max() <= 1e-4 * scale
    assert pictures.shape == their_pictures.shape and their_pictures.std() > 5
    assert np.abs(pictures - their_pictures).max() <= 1


def default_scale(name):
    row = published.MODELS[name]
    return row.distilled_guidance or row.guidance


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_each_model_draws_what_its_pipeline_draws(model, drawn, name):
    """By its own sampler, guidance and spacing of the steps, and each prompt something else."""
    pipe, folder = model(name)
    ours = drawn(name, folder, "--prompt", *PROMPTS)
    scale = {} if name == "flux-schnell" else {"guidance_scale": default_scale(name)}
    assert_same(ours, theirs(name, pipe, PROMPTS, **scale))
    other = drawn(name, folder, "--prompt", PROMPTS[1], PROMPTS[1])
    assert (other[0][0] - ours[0][0]).abs().max() > 1e-2 and torch.equal(other[0][1], ours[0][1])


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_other_guidance_another_size_and_a_negative_prompt(model, drawn, name):
    pipe, folder = model(name)
    for size in ((SIDE, SIDE + 32), (SIDE + 16, SIDE)):
        flags = ["--prompt", PROMPTS[0], "--size", *map(str, size)]
        how = {"height": size[0], "width": size[1]}
        if published.MODELS[name].guidance != 1:
            flags += ["--negative-prompt", "a circle", "--cfg", "3"]
            how |= {"negative_prompt": ["a circle"], "guidance_scale": 3.0}
        elif name == "flux-dev":
            flags += ["--cfg", "1.5"]
            how["guidance_scale"] = 1.5
        ours = drawn(name, folder, *flags)
        assert_same(ours, theirs(name, pipe, PROMPTS[:1], **how))
        assert ours[1].shape == (1, *size, 3)


@pytest.mark.parametrize("name", [name for name in TEXT_MODELS if published.MODELS[name].guidance != 1])
def test_without_guidance(model, drawn, name):
    pipe, folder = model(name)
    ours = drawn(name, folder, "--prompt", *PROMPTS, "--cfg", "1")
    assert_same(ours, theirs(name, pipe, PROMPTS, guidance_scale=1.0))


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_a_long_prompt_is_cut_with_a_warning(model, drawn, name, capsys):
    pipe, folder = model(name)
    ours = drawn(name, folder, "--prompt", LONG)
    warned = "CLIP" if name.startswith(("sd3", "flux")) else "the encoder"
    assert f"longer than {warned}'s limit and is truncated; it loses 'quare'" in capsys.readouterr().err
    scale = {} if name == "flux-schnell" else {"guidance_scale": default_scale(name)}
    assert_same(ours, theirs(name, pipe, [LONG], **scale))


@pytest.mark.parametrize("name", ["sd3-medium", "sd3.5-medium", "sd3.5-large"])
def test_stable_diffusion_3_without_t5(model, drawn, name, tmp_path):
    pipe, folder = model(name)
    parts = pipe.components | {"text_encoder_3": None, "tokenizer_3": None}
    without = type(pipe)(**parts)
    without.set_progress_bar_config(disable=True)
    without.save_pretrained(tmp_path / "without")
    scale = default_scale(name)
    ours = drawn(name, folder, "--prompt", *PROMPTS, "--no-t5")
    assert_same(ours, theirs(name, without, PROMPTS, guidance_scale=scale))
    again = drawn(name, tmp_path / "without", "--prompt", *PROMPTS, "--no-t5")
    assert torch.equal(again[0], ours[0])
    with pytest.raises(ValueError, match="text_encoder_3.*--no-t5"):
        drawn(name, tmp_path / "without", "--prompt", *PROMPTS)
    assert (ours[0] - drawn(name, folder, "--prompt", *PROMPTS)[0]).abs().max() > 1e-2


# ---- the authors' own files

def original_network(name, folder):
    """The network in a folder of diffusers by its authors' names, each the way back of ours."""
    state, network = published.read_network(name, folder), published.build_network(name)
    c = network.config
    if published.MODELS[name].arch == "unet":
        found = {key: state[names.unet_original_name(key, c.layers)] for key in compvis_unet(c).state_dict()}
    elif c.single_depth:
        found = {key: state[names.rename(key, names.MMDIT_ORIGINAL)] for key in flux_names(c)}
        found["img_in.weight"] = found["img_in.weight"].flatten(1)                       # (c, p, q)
        for key in ("final_layer.linear.weight", "final_layer.linear.bias"):             # from (p, q, c)
            found[key] = found[key].unflatten(0, (4, c.channels)).transpose(0, 1).flatten(0, 1)
        assert all(found[key].shape == shape for key, shape in flux_names(c).items())
    else:
        found = original_sd3(state, c)
    return {names.NETWORK + key: weight for key, weight in found.items()}


def openclip(state, extra_layer):
    """The names of OpenCLIP for those of transformers; with a layer more, which is not to be used."""
    out, width = {}, state["final_layer_norm.weight"].shape[0]
    for key, weight in state.items():
        for ours, original in (("encoder.layers.", "transformer.resblocks."), ("layer_norm1", "ln_1"),
                               ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
                               ("self_attn.out_proj", "attn.out_proj"), ("final_layer_norm", "ln_final"),
                               ("embeddings.position_embedding.weight", "positional_embedding"),
                               ("embeddings.token_embedding", "token_embedding")):
            key = key.replace(ours, original)
        if key == "text_projection.weight":
            key, weight = "text_projection", weight.T.contiguous()
        if "self_attn.q_proj" in key:
            whole = torch.cat([weight, *(state[name] for name in same_layer(key))])
            out[key.replace("self_attn.q_proj.", "attn.in_proj_")] = whole
        elif "self_attn" not in key:
            out[key] = weight
    if extra_layer:
        last = max(int(key.split(".")[2]) for key in out if key.startswith("transformer."))
        out |= {key.replace(f".{last}.", f".{last + 1}."): torch.randn(weight.shape)
                for key, weight in out.items() if f"resblocks.{last}." in key}
        out["text_projection"] = torch.randn(width, width)
    return out


def same_layer(key):
    """The weights of k and v for the query's, by the names of transformers."""
    key = key.replace("transformer.resblocks.", "encoder.layers.")
    return [key.replace("q_proj", f"{part}_proj") for part in "kv"]


def text_state(folder):
    from safetensors.torch import load_file

    return {key.removeprefix("text_model."): weight
            for key, weight in load_file(folder / "model.safetensors").items()}


def original_text(name, folder):
    """The text encoders of a folder as the authors' whole files have them."""
    def behind(prefix, state):
        return {prefix + key: weight for key, weight in state.items()}

    def clip(part, inner="text_model."):
        state = text_state(folder / part)
        return {key if key.startswith("text_projection") else inner + key: w for key, w in state.items()}

    recipe, first = published.MODELS[name].text, text_state(folder / "text_encoder")
    if recipe == "sd1":
        return behind("cond_stage_model.transformer.", clip("text_encoder"))
    if recipe == "sd2":
        return behind("cond_stage_model.model.", openclip(first, extra_layer=True))
    if recipe == "sdxl":
        second = openclip(text_state(folder / "text_encoder_2"), extra_layer=False)
        return (behind("conditioner.embedders.0.transformer.", clip("text_encoder"))
                | behind("conditioner.embedders.1.model.", second))
    found = behind("text_encoders.clip_l.transformer.", clip("text_encoder"))
    if recipe == "sd3":
        del found["text_encoders.clip_l.transformer.text_projection.weight"]
        found |= behind("text_encoders.clip_g.transformer.", clip("text_encoder_2"))
    t5 = text_state(folder / ("text_encoder_3" if recipe == "sd3" else "text_encoder_2"))
    return found | behind("text_encoders.t5xxl.transformer.", t5)


def original_vae(folder):
    from safetensors.torch import load_file

    state = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
    return compvis(state, 4)


def tiny_encoders(monkeypatch):
    """What stands for the sizes of the published encoders: those of conftest.py."""
    clip = dict(vocab_size=54, max_position_embeddings=24, bos_token_id=0, eos_token_id=1)
    large = clip | dict(hidden_size=16, intermediate_size=32, projection_dim=16, num_hidden_layers=3,
                        num_attention_heads=2, hidden_act="quick_gelu")
    giant = clip | dict(hidden_size=24, intermediate_size=48, projection_dim=24, num_attention_heads=2,
                        hidden_act="gelu", num_hidden_layers=3)
    t5 = dict(vocab_size=8, d_model=40, d_kv=8, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0,
              feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    for kind, config in {"CLIP-L": large, "OpenCLIP-H": large | {"hidden_act": "gelu"}, "OpenCLIP-G": giant,
                         "T5-XXL": t5}.items():
        monkeypatch.setitem(encoders.CONFIGS, kind, config)
    return giant


WHOLE = ["sd1.5", "sd2.1", "sdxl", "sd3-medium", "sd3.5-medium", "flux-dev", "flux-schnell"]


@pytest.mark.parametrize("name", WHOLE)
def test_a_single_file_draws_what_its_folder_draws(model, drawn, name, tmp_path, monkeypatch):
    """The authors' file with network, VAE and text encoders: bit for bit."""
    from safetensors.torch import load_file, save_file

    folder = model(name).folder
    giant = tiny_encoders(monkeypatch)
    if name == "sdxl":
        giant["num_hidden_layers"] = 2
    if name.startswith("sd3"):             # its authors do not project CLIP-L
        folder = shutil.copytree(folder, tmp_path / "folder")
        file = folder / "text_encoder/model.safetensors"
        save_file(load_file(file) | {"text_projection.weight": torch.eye(16)}, file, {"format": "pt"})
    parts = {"network": original_network(name, folder), "text": original_text(name, folder),
             "vae": {f"first_stage_model.{key}": w for key, w in original_vae(folder).items()}}
    file = tmp_path / "whole.safetensors"
    save_file({key: w.contiguous() for part in parts.values() for key, w in part.items()}, file)
    flags = ["--prompt", *PROMPTS, "--tokenizer", str(folder)]
    ours = drawn(name, file, *flags)
    wanted = drawn(name, folder, "--prompt", *PROMPTS)
    assert torch.equal(ours[0], wanted[0]) and np.array_equal(ours[1], wanted[1])
    with pytest.raises(ValueError, match="a file of weights has no tokenizer; give its folder by --tokeniz"):
        drawn(name, file, "--prompt", "a")

    # the same in three files, of which only the model's name shows the scale of the VAE
    for part, state in parts.items():
        save_file({key.removeprefix("first_stage_model."): w.contiguous() for key, w in state.items()},
                  tmp_path / f"{part}.safetensors")
    apart = drawn(name, tmp_path / "network.safetensors", *flags, "--vae", str(tmp_path / "vae.safetensors"),
                  "--text-encoder", str(tmp_path / "text.safetensors"))
    assert torch.equal(apart[0], wanted[0])
    # and with the text encoders of a folder, as FLUX is often kept
    apart = drawn(name, tmp_path / "network.safetensors", "--prompt", *PROMPTS, "--vae", str(folder),
                  "--text-encoder", str(folder))
    assert torch.equal(apart[0], wanted[0])
    with pytest.raises(ValueError, match="no VAE there .*; give it by --vae PATH"):
        drawn(name, tmp_path / "network.safetensors", *flags)
    with pytest.raises(ValueError, match="the text encoder .* is not in this file; give a folder or a file"):
        drawn(name, tmp_path / "network.safetensors", *flags, "--vae", str(folder))


# ---- text encoders in files of their own

FILES = {"sdxl": {"clip_l": "conditioner.embedders.0.transformer.",
                  "clip_g": "conditioner.embedders.1.model."},
         "sd3-medium": {name: f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl")},
         "flux-dev": {name: f"text_encoders.{name}.transformer." for name in ("clip_l", "t5xxl")}}


@pytest.fixture
def files(model, tmp_path, monkeypatch):
    """A function: the files with one text encoder each of a model, by their usual names, its folder, in which
    all of these are the same, and a file of the rest."""
    from safetensors.torch import load_file, save_file

    def build(name):
        giant = tiny_encoders(monkeypatch)
        if name == "sdxl":
            giant["num_hidden_layers"] = 2
        folder = shutil.copytree(model(name).folder, tmp_path / "folder")
        if name.startswith("sd3"):         # its authors do not project CLIP-L
            inner = folder / "text_encoder/model.safetensors"
            save_file(load_file(inner) | {"text_projection.weight": torch.eye(16)}, inner, {"format": "pt"})
        whole, found = original_text(name, folder), {}
        for part, prefix in FILES[name].items():
            state = {key.removeprefix(prefix): weight.clone().contiguous() for key, weight in whole.items()
                     if key.startswith(prefix)}
            found[part] = str(tmp_path / f"{part}.safetensors")
            save_file(state, found[part])
        rest = original_network(name, folder)
        rest |= {f"first_stage_model.{key}": weight for key, weight in original_vae(folder).items()}
        save_file({key: weight.contiguous() for key, weight in rest.items()}, tmp_path / "rest.safetensors")
        return found, folder, tmp_path / "rest.safetensors"
    return build


@pytest.mark.parametrize("name", FILES)
def test_text_encoders_in_files_of_their_own(drawn, name, files):
    """In any order, by the names of transformers or of OpenCLIP; the rest from --weights; bit for bit what
    the folder draws."""
    parts, folder, rest = files(name)
    flags = ["--prompt", *PROMPTS]
    wanted = drawn(name, folder, *flags)
    tokenizer = ["--tokenizer", str(folder)]
    ours = drawn(name, rest, *flags, *tokenizer, "--text-encoder", *[*parts.values()][::-1])
    assert torch.equal(ours[0], wanted[0]) and np.array_equal(ours[1], wanted[1])
    # one of them beside a pipeline's folder, which also has the tokenizers; a folder of one encoder as a file
    for given in (parts["clip_l"], str(folder / "text_encoder_2")):
        assert torch.equal(drawn(name, folder, *flags, "--text-encoder", given)[0], wanted[0])
    # CLIP-L as Hugging Face has it, with the other half of the model, and without the first word of the names
    from safetensors.torch import load_file, save_file
    clip = load_file(parts["clip_l"])
    for inner in ("text_model.", ""):
        renamed = {key.replace("text_model.", inner): weight for key, weight in clip.items()}
        save_file(renamed | {"vision_model.x": torch.ones(1)}, parts["clip_l"])
        ours = drawn(name, folder, *flags, "--text-encoder", parts["clip_l"])
        assert torch.equal(ours[0], wanted[0])
    # another encoder is another picture
    save_file({key: weight * 1.5 for key, weight in clip.items()}, parts["clip_l"])
    assert not torch.equal(drawn(name, folder, *flags, "--text-encoder", parts["clip_l"])[0], wanted[0])


def test_stable_diffusion_3_without_t5_from_files(drawn, files):
    parts, folder, rest = files("sd3-medium")
    ours = drawn("sd3-medium", rest, "--prompt", *PROMPTS, "--no-t5", "--tokenizer", str(folder),
                 "--text-encoder", parts["clip_g"], parts["clip_l"])
    assert torch.equal(ours[0], drawn("sd3-medium", folder, "--prompt", *PROMPTS, "--no-t5")[0])


def test_text_encoder_files_that_do_not_fit(drawn, files, tmp_path):
    """A missing, a superfluous, a wrong one: one line."""
    from safetensors.torch import load_file, save_file

    parts, folder, rest = files("sd3-medium")
    clip_l, clip_g, t5 = parts.values()

    def refuse(message, *given, more=("--tokenizer", str(folder)), weights=rest):
        flags = [*A, *more, "--text-encoder", *map(str, given)]
        refused(drawn, tmp_path, "sd3-medium", weights, flags, message)

    refuse("--text-encoder .*t5xxl.safetensors: the text encoder OpenCLIP-G is not in these files; give a "
           "folder or a file that has it by --text-encoder, which takes several$", clip_l, t5)
    refuse("T5-XXL is not in these files; .* takes several, or leave T5 out by --no-t5$", clip_l, clip_g)
    refuse("^--text-encoder [^ ]*t5xxl.safetensors: holds T5-XXL; this model takes CLIP-L, OpenCLIP-G; leave",
           clip_l, clip_g, t5, more=("--tokenizer", str(folder), "--no-t5"))
    refuse("^--text-encoder [^ ]*rest.safetensors: holds no text encoder; this model takes CLIP-L, .*; leave",
           clip_l, clip_g, t5, rest)
    refuse("^--text-encoder [^ ]*nowhere: no such file; download it first", clip_l, tmp_path / "nowhere")
    shutil.copy(clip_l, tmp_path / "again.safetensors")
    refuse("^--text-encoder [^ ]*again.safetensors: holds CLIP-L, as .*/clip_l.safetensors does; give one of",
           clip_l, clip_g, t5, tmp_path / "again.safetensors")
    refuse("a file of weights has no tokenizer; give its folder by --tokenizer CLIP-FOLDER T5-FOLDER", clip_l,
           clip_g, t5, more=())
    with monkeypatched_width(40):
        refuse("^--text-encoder [^ ]*clip_g.safetensors: holds no text encoder; this model takes CLI", clip_g)
    state = load_file(t5)
    del state["encoder.final_layer_norm.weight"]
    save_file(state, t5)
    refuse("its text_encoder_3 cannot be loaded .* missing, like encoder.final_layer_norm.weight", clip_l,
           clip_g, t5)
    state["encoder.final_layer_norm.weight"] = torch.full((40,), torch.nan)
    save_file(state, t5)
    refuse("damaged: encoder.final_layer_norm.weight has values that are not finite .*; download it again$",
           clip_l, clip_g, t5)


@contextmanager
def monkeypatched_width(width):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(encoders.CONFIGS, "OpenCLIP-G", encoders.CONFIGS["OpenCLIP-G"] | {"hidden_size": width})
        yield


# ---- memory and precision

class Poisoned(offload.Resident):
    """Outside, its weights are NaN: what computes with them shows it. Inside, they are copies, as on a device
    of its own."""

    def __init__(self, module, device):
        super().__init__(module, device)
        self.__exit__()

    def __enter__(self):
        for tensor, weight in zip(self.tensors, self.home):
            tensor.data = weight.clone()

    def __exit__(self, *error):
        for tensor, weight in zip(self.tensors, self.home):
            tensor.data = torch.full_like(weight, torch.nan) if weight.is_floating_point() else weight


ONE_OF_EACH = ["sdxl", "sd3.5-medium", "flux-dev"]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_offload_draws_the_same(model, drawn, name, monkeypatch):
    """Network, VAE and text encoders are there only while they work: whole, or block by block."""
    folder = model(name).folder
    wanted = drawn(name, folder, "--prompt", *PROMPTS)
    for module in (offload, sample, conditioning):
        monkeypatch.setattr(module, "Resident", Poisoned)
    for how in ("parts", "blocks"):
        ours = drawn(name, folder, "--prompt", *PROMPTS, "--offload", how)
        assert torch.equal(ours[0], wanted[0]) and np.array_equal(ours[1], wanted[1])
    monkeypatch.setattr(Poisoned, "__enter__", lambda self: None)
    assert not drawn(name, folder, "--prompt", *PROMPTS, "--offload", "blocks")[0].isfinite().any()
    with pytest.raises(ValueError, match="--compile with --offload blocks"):
        drawn(name, folder, "--prompt", "a", "--offload", "blocks", "--compile")


@pytest.mark.parametrize("name", ["sd1.5", "flux-dev"])
def test_tiles(model, drawn, name, tmp_path):
    folder = model(name).folder
    size = ("--size", "64", "96", "--prompt", PROMPTS[0])
    wanted = drawn(name, folder, *size)
    assert np.array_equal(wanted[1], drawn(name, folder, *size, "--tile", "96")[1])
    tiled = drawn(name, folder, *size, "--tile", "64")
    # the norms of each tile are its own, so that a random decoder differs, but not at the seams alone
    assert tiled[1].shape == wanted[1].shape and (tiled[1] != wanted[1]).any()
    Image.fromarray(wanted[1][0].astype(np.uint8)).save(tmp_path / "begin.png")
    begin = ("--init-image", str(tmp_path / "begin.png"), "--strength", "0")
    once = drawn(name, folder, *size, *begin)
    assert np.array_equal(once[1], drawn(name, folder, *size, *begin, "--tile", "96")[1])
    assert (once[1] != drawn(name, folder, *size, *begin, "--tile", "64")[1]).any()


@torch.no_grad()
def test_seams_of_tiles():
    """Weights sum to one; what acts on each place alone is the same in tiles; and of a convolution, whose
    zeros at the border of a tile are seen over as many pixels as it is wide, the blended seam is small."""
    x = torch.rand(2, 3, 40, 56, dtype=torch.float64)
    for side in (8, 12, 31, 40, 64):
        constant = offload.in_tiles(lambda part: torch.ones_like(part), x, side, 1, 1)
        torch.testing.assert_close(constant, torch.ones_like(x), atol=1e-12, rtol=0)
        larger = offload.in_tiles(lambda part: F.interpolate(part, scale_factor=8), x, side, 1, 8)
        torch.testing.assert_close(larger, F.interpolate(x, scale_factor=8), atol=1e-12, rtol=0)
        smaller = offload.in_tiles(lambda part: F.avg_pool2d(part, 4), x, max(1, side // 4), 4, 1)
        torch.testing.assert_close(smaller, F.avg_pool2d(x, 4), atol=1e-12, rtol=0)
    y, x = torch.meshgrid(torch.linspace(0, 3, 96), torch.linspace(0, 3, 128), indexing="ij")
    smooth = 2 + (y.sin() + x.cos())[None, None]

    def blurred(part):
        return F.conv2d(part, torch.full((1, 1, 5, 5), 1 / 25), padding=2)
    error = (offload.in_tiles(blurred, smooth, 64, 1, 1) - blurred(smooth)).abs()
    assert 0 < error.max() < 0.25 and error.mean() < 0.01
    # tiles of 0, 1 and 2 pass into each other without a step, over the 16 positions that they share
    counter = itertools.count()
    steps = offload.in_tiles(lambda part: torch.full_like(part, next(counter)), smooth[..., :64, :1].expand(
        1, 1, 64, 160), 64, 1, 1)[0, 0].diff(dim=1)
    assert 0 <= steps.min() and steps.max() < 0.1 and steps.sum(1).allclose(torch.tensor(2.0))


def dtypes_inside(monkeypatch):
    """(a list that fills with the dtypes of networks and of VAEs, of inputs and weights, as they compute)"""
    seen = []
    for kind in (unet.UNet, mmdit.MMDiT, vae.Decoder):
        def forward(self, x, *inputs, plain=kind.forward, kind=kind, **more):
            seen.append((kind.__name__, x.dtype, {p.dtype for p in self.parameters()}))
            return plain(self, x, *inputs, **more)
        monkeypatch.setattr(kind, "forward", forward)
    return seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sdxl", "sd3-medium", "flux-dev"])
def test_files_in_half_precision(model, drawn, name, dtype, tmp_path, monkeypatch):
    """A network keeps the precision of its file, or has that of --precision; the VAE never has half."""
    pipe, folder = model(name)
    wanted = drawn(name, folder, "--prompt", *PROMPTS)
    copy.deepcopy(pipe).to(dtype).save_pretrained(tmp_path / "half")
    seen = dtypes_inside(monkeypatch)

    def kinds(*flags, weights=tmp_path / "half"):
        seen.clear()
        ours = drawn(name, weights, "--prompt", *PROMPTS, *flags)
        assert {x for kind, x, _ in seen if kind == "Decoder"} == {torch.float32}
        found = {(x, *inside) for kind, x, inside in seen if kind != "Decoder"}
        return ours, found

    ours, found = kinds()
    assert found == {(dtype, dtype)}
    spread = wanted[0].std()
    assert 0 < (ours[0] - wanted[0]).abs().mean() < (0.02 if dtype == torch.float16 else 0.1) * spread
    ours, found = kinds("--precision", "fp32")
    assert found == {(torch.float32, torch.float32)}
    ours, found = kinds("--precision", "bf16", weights=folder)
    assert found == {(torch.bfloat16, torch.bfloat16)}
    assert 0 < (ours[0] - wanted[0]).abs().mean() < 0.1 * spread


# ---- what else sample.py draws with a network

TWO = ["sd2.1", "sd3.5-medium"]


@pytest.mark.parametrize("name", [*TWO, "flux-dev"])
def test_from_a_picture_and_within_a_mask(model, drawn, name, tmp_path):
    folder, size = model(name).folder, ("--size", "64", "96", "--prompt", PROMPTS[0])
    gradient = np.linspace(30, 220, 96)[None, :, None] * np.linspace(0.5, 1, 64)[:, None, None]
    picture = np.repeat(gradient, 3, 2).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "begin.png")
    mask = np.zeros((64, 96), np.uint8)
    mask[16:48, 24:64] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    begin = (*size, "--init-image", str(tmp_path / "begin.png"))
    # of its own latent, less or more is left
    kept = drawn(name, folder, *begin, "--strength", "0")[0]
    distances = [(drawn(name, folder, *begin, "--strength", strength)[0] - kept).abs().mean()
                 for strength in ("0.2", "0.6", "1")]
    assert 0 < distances[0] < distances[1] and distances[0] < distances[2]
    assert torch.equal(drawn(name, folder, *begin, "--strength", "1")[0], drawn(name, folder, *size)[0])
    _, inside = drawn(name, folder, *begin, "--mask", str(tmp_path / "mask.png"))
    assert np.array_equal(inside[0][mask == 0], picture[mask == 0])
    assert np.abs(inside[0][mask > 0] - picture[mask > 0].astype(int)).mean() > 5


@pytest.mark.parametrize("name", [*TWO, "flux-dev"])
def test_other_outputs(model, drawn, name, tmp_path, monkeypatch, capsys):
    """Pictures i have prompt i, in turn, and the seed 7 + i; a folder or .npz goes on where it was."""
    folder, flags = model(name).folder, ["--steps", "3", "--seed", "7", "--batch-size", "2"]
    command = ["--published", name, "--weights", str(folder), *flags, "--prompt", *PROMPTS]
    _, wanted = drawn(name, folder, *flags, "--prompt", *PROMPTS, "--n", "5")
    alone = drawn(name, folder, *flags, "--prompt", PROMPTS[1], "--seed", "10")[1]
    assert len(wanted) == 5 and np.abs(wanted[3] - alone[0]).max() <= 1
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    sample.main([*command[:-3], "--prompts", str(tmp_path / "prompts.txt"), "--n", "5", "--out",
                 str(tmp_path / "drawn")])
    files = sorted((tmp_path / "drawn").iterdir())
    assert [file.name for file in files] == [f"{7 + i:06d}-{PROMPTS[i % 2].replace(' ', '-')}.png"
                                             for i in range(5)]
    assert np.array_equal(np.stack([np.asarray(Image.open(file)) for file in files]), wanted)
    for kind in ("gif", "png"):
        sample.main([*command, "--out", str(tmp_path / f"drawn.{kind}")])
    animation, still = (Image.open(tmp_path / f"drawn.{kind}") for kind in ("gif", "png"))
    assert animation.n_frames == 3 and still.width > 2 * SIDE       # with captions
    sample.main([*command[:-1], "--seed", "7", "--out", str(tmp_path / "one.png")])
    one = np.asarray(Image.open(tmp_path / "one.png"))      # without a border
    assert one.shape == wanted[0].shape and np.abs(one - wanted[0]).max() <= 1

    # interrupted after two of five pictures
    whole = sample.draw_batches
    def broken(*inputs, **how):
        yield next(whole(*inputs, **how))
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(sample, "draw_batches", broken)
        with pytest.raises(SystemExit):
            sample.main([*command, "--n", "5", "--out", str(tmp_path / "part.npz")])
    assert "after 2 of 5 pictures" in capsys.readouterr().err
    # with the same settings alone, of which the guidance that is an input and the tiles are two
    others = [["--tile", "64"]] + ([["--cfg", "9"]] if name.startswith("flux") else [])
    for other in others:
        with pytest.raises(ValueError, match="part.npz"):
            sample.main([*command, "--n", "5", *other, "--out", str(tmp_path / "part.npz")])
    sample.main([*command, "--n", "5", "--out", str(tmp_path / "part.npz")])
    assert np.array_equal(np.load(tmp_path / "part.npz")["arr_0"], wanted)


@pytest.mark.parametrize("flags", [
    ["--sampler", "heun", "--times", "karras"], ["--sampler", "dpmpp_2m", "--lower-order-final"],
    ["--sampler", "unipc_2", "--rescale", "0.7"], ["--eta", "0.5"], ["--interval", "0.2", "0.8"]])
@pytest.mark.parametrize("name", TWO)
def test_other_samplers(model, drawn, name, flags):
    folder = model(name).folder
    latents, pictures = drawn(name, folder, "--prompt", PROMPTS[0], *flags)
    assert latents.isfinite().all()
    assert (latents - drawn(name, folder, "--prompt", PROMPTS[0])[0]).abs().max() > 1e-3


def test_skip_layers_of_stable_diffusion_35(model, drawn):
    """Against diffusers: the guided output is moved away from what the network draws without a layer, in the
    first fifth of the steps."""
    pipe, folder = model("sd3.5-medium")
    flags = ["--prompt", PROMPTS[0], "--steps", "12", "--skip-layers", "0"]
    ours = drawn("sd3.5-medium", folder, *flags)
    assert_same(ours, theirs("sd3.5-medium", pipe, PROMPTS[:1], guidance_scale=4.5, num_inference_steps=12,
                             skip_guidance_layers=[0]))
    assert (ours[0] - drawn("sd3.5-medium", folder, *flags[:4])[0]).abs().max() > 1e-2


def test_compiled(model, drawn):
    folder = model("sd3.5-medium").folder
    wanted = drawn("sd3.5-medium", folder, "--prompt", PROMPTS[0])
    ours = drawn("sd3.5-medium", folder, "--prompt", PROMPTS[0], "--compile")
    assert (ours[0] - wanted[0]).abs().max() < 1e-4


# ---- what cannot work is refused in one line, before anything is drawn

def without(*parts):
    def change(folder):
        for part in parts:
            shutil.rmtree(folder / part)
    return change


def as_it_is(folder):
    pass


MISSING = [
    ("sd1.5", without("vae"), "--weights .*: no VAE there .*; give it by --vae PATH"),
    ("sd1.5", without("unet"), "no files of weights in this folder, and none of a usual name"),
    ("sd1.5", without("text_encoder"), "no text encoder there; give a folder with its config.json"),
    ("sd1.5", without("tokenizer"), "no tokenizer in .*, which needs tokenizer.json or vocab.json with"),
    ("sdxl", without("text_encoder_2"), "no text_encoder_2 .its OpenCLIP-G. there; give a folder"),
    ("sdxl", without("tokenizer_2"), "no tokenizer in .*, which needs tokenizer.json or vocab.json with"),
    ("sd3-medium", without("transformer"), "no files of weights in this folder"),
    ("sd3-medium", without("text_encoder_3"), "no text_encoder_3 .its T5-XXL. there; .* leave T5 out by --n"),
    ("flux-dev", without("tokenizer_2"), "no tokenizer in .*, which needs tokenizer.json or spiece.model"),
    ("flux-dev", without("text_encoder_2"), "no text_encoder_2 .its T5-XXL. there; give a folder"),
]


@pytest.mark.parametrize("name, change, message", MISSING)
def test_folders_with_a_missing_part(model, drawn, tmp_path, name, change, message):
    folder = shutil.copytree(model(name).folder, tmp_path / "folder")
    change(folder)
    refused(drawn, tmp_path, name, folder, ["--prompt", "a"], message)


def refused(drawn, tmp_path, name, folder, flags, message):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message) as refusal:
        drawn(name, folder, *flags)
    assert "\n" not in str(refusal.value) and sorted(tmp_path.rglob("*")) == before


A = ["--prompt", "a"]
REFUSED = [
    ("sd1.5", "sd2.1", A, "holds the network of sd2.1-base or sd2.1, not of sd1.5; give --published sd2.1"),
    ("sd3-medium", "sd3.5-medium", A, "holds the network of sd3.5-medium, not of sd3-medium"),
    ("flux-schnell", "flux-dev", A, "holds the network of flux-dev, not of flux-schnell"),
    ("sdxl", "flux-dev", A, "holds the network of flux-dev, not of sdxl; give --published flux-dev"),
    ("sd1.5", "sdxl", A, "holds the network of sdxl, not of sd1.5; give --published sdxl"),
    ("sd2.1-base", "sd2.1", A, "predicts v .*, where sd2.1-base predicts eps; give --published sd2.1"),
    ("sd2.1", "sd2.1-base", A, "predicts eps .*, where sd2.1 predicts v; give --published sd2.1-base"),
    ("sd1.5", None, [*A, "--size", "72", "64"], "--size 72 64: height must be a multiple of 16 and width"),
    ("flux-dev", None, [*A, "--size", "64", "88"], "--size 64 88: height must be a multiple of 16 and width"),
    ("sd3-medium", None, [*A, "--size", "64", "208"], "--size 64 208: .* positions for sides of at most 192"),
    ("sd3-medium", None, [], "sd3-medium is conditioned on text; give some by --prompt"),
    ("sd3-medium", None, [*A, "--label", "3"], "--label 3: sd3-medium is conditioned on text; use --prompt"),
    ("sd3-medium", None, [*A, "--embedding", "a.npz"],
     "--embedding a.npz: sd3-medium is conditioned on text"),
    ("flux-dev", None, [*A, "--negative-prompt", "b"],
     "--negative-prompt: acts on guidance between two outputs"),
    ("flux-dev", None, [*A, "--rescale", "0.7"],
     "--rescale: acts on guidance .* its scale .--cfg. is an inp"),
    ("flux-dev", None, [*A, "--cfg", "-3"], "--cfg -3: .* is at least 0"),
    ("flux-schnell", None, [*A, "--cfg", "3"],
     "--cfg 3: flux-schnell .* no unconditional branch; use --cfg 1"),
    ("flux-dev", None, [*A, "--no-t5"],
     "--no-t5: .* was not trained to do without T5, as Stable Diffusion 3 was; le"),
    ("sdxl", None, [*A, "--no-t5"],
     "--no-t5: .* was not trained to do without T5, as Stable Diffusion 3 was; le"),
    ("sdxl", None, [*A, "--text-encoder", "nowhere"], "nowhere: no such file; download it first"),
    ("sdxl", None, [*A, "--tokenizer", "nowhere"], "--tokenizer nowhere: no such folder; download it f"),
    ("sdxl", None, [*A, "--vae", "nowhere"], "--vae nowhere: no such file or folder; download it first"),
    ("sd2.1", None, [*A, "--shift", "2"], "--shift 2: of the times of rf"),
    ("sd2.1", None, [*A, "--times", "sd3"], "--times sd3: a spacing of the rf path; .* on the path of ddpm"),
    ("sd2.1", None, [*A, "--steps", "1000"], "steps 1000: .* at most 999"),
    ("sd2.1", None, [*A, "--skip-layers", "0"], "--skip-layers 0: only mmdit has blocks to skip"),
    ("sd3.5-medium", None, [*A, "--skip-layers", "2"], "--skip-layers 2: this network has joint blocks 0 to"),
    ("sd3.5-medium", None, [*A, "--skip-layers", "0", "--cfg", "0"], "--skip-layers 0 with --cfg 0: steers"),
    ("sd3.5-medium", None, [*A, "--skip-layers", "0", "--steps", "4"],
     "none of 4 steps begins between the sh"),
]


@pytest.mark.parametrize("name, other, flags, message", REFUSED)
def test_what_does_not_fit_is_refused(model, drawn, tmp_path, name, other, flags, message):
    refused(drawn, tmp_path, name, model(other or name).folder, flags, message)


def test_too_little_memory_is_said_before(model, drawn, tmp_path, monkeypatch):
    """What is too large is named: the decoder's tensors, a text encoder, the network."""
    folder = model("flux-dev").folder
    network = sum(p.numel() * 4 for p in published.build_network("flux-dev").parameters())
    clip, t5 = ((folder / f"text_encoder{number}/model.safetensors").stat().st_size for number in ("", "_2"))
    assert 4 * (clip + t5) < network

    def with_memory(size, message, *flags):
        monkeypatch.setattr(sample, "memory", lambda device: size)
        refused(drawn, tmp_path, "flux-dev", folder, [*A, *flags], f"needs at least .*{message}")

    with_memory(64 * 64 * 4 * 64 - 1, "decoding 1 pictures .*; give a smaller one")
    monkeypatch.setattr(sample, "check_decoding", lambda *inputs: None)
    with_memory(clip + t5 - 1, "text_encoder .*, text_encoder_2 .*; give --offload parts, or blocks")
    with_memory(max(clip, t5) - 1, "memory .cpu. .text_encoder_2 [^,]*, where .*; give --offload blocks",
                "--offload", "parts")
    for flags in ([], ["--offload", "parts"]):
        with_memory(network - 1, "the network .*; give --offload blocks, or --precision bf16", *flags)
    for size, flags in ((network, []), (0, ["--offload", "blocks"])):
        monkeypatch.setattr(sample, "memory", lambda device: size)
        drawn("flux-dev", folder, *A, *flags)


def test_too_little_memory_for_text_encoders_in_files(files, drawn, tmp_path, monkeypatch):
    """As for those of a folder, in the precision in which they compute."""
    parts, folder, rest = files("sd3-medium")
    sizes = {}
    for name, file in parts.items():
        with open(file, "rb") as content:                  # without the header
            sizes[name] = Path(file).stat().st_size - 8 - int.from_bytes(content.read(8), "little")
    given = ["--tokenizer", str(folder), "--text-encoder", *parts.values()]
    monkeypatch.setattr(sample, "check_decoding", lambda *inputs: None)

    def with_memory(size, message, *flags):
        monkeypatch.setattr(sample, "memory", lambda device: size)
        refused(drawn, tmp_path, "sd3-medium", rest, [*A, *given, *flags], message)

    with_memory(sum(sizes.values()) - 1, "--published sd3-medium needs at least .*text_encoder .*, "
                "text_encoder_2 .*, text_encoder_3 .*; give --offload parts, or blocks")
    with_memory(max(sizes.values()) - 1, "memory .cpu. .text_encoder_[23] [^,]*, where .*; give --offload b",
                "--offload", "parts")
    monkeypatch.setattr(sample, "memory", lambda device: sum(sizes.values()))
    with pytest.raises(ValueError, match="the network .*; give --offload blocks"):     # which is the next
        drawn("sd3-medium", rest, *A, *given)
    monkeypatch.setattr(sample, "memory", lambda device: 0)
    drawn("sd3-medium", rest, *A, *given, "--offload", "blocks")
    # in half precision half of that, unless fp32 is asked for; 8 bits are computed in 16
    from safetensors.torch import load_file, save_file
    state = {key: weight.to(torch.float8_e4m3fn) for key, weight in load_file(parts["t5xxl"]).items()}
    save_file(state, parts["t5xxl"])
    half = sizes | {"t5xxl": sizes["t5xxl"] // 2}
    for precision, total in (([], half), (["--precision", "fp32"], sizes)):
        with_memory(sum(total.values()) - 1, "text_encoder_3 .*; give --offload parts, or blocks", *precision)
        monkeypatch.setattr(sample, "memory", lambda device: sum(total.values()))
        with pytest.raises(ValueError, match="the network .*; give --offload blocks"):
            drawn("sd3-medium", rest, *A, *given, *precision)


@pytest.mark.parametrize("closed, flag", [
    ("", "--weights"), ("transformer", "--weights"), ("transformer/diffusion_pytorch_model.safetensors",
                                                      "--weights"),
    ("vae/config.json", "--weights"), ("text_encoder_2", "--weights"),
    ("text_encoder_3/config.json", "--weights"), ("tokenizer/tokenizer_config.json", "--weights"),
    ("vae", "--vae"), ("tokenizer_3", "--tokenizer"), ("text_encoder", "--text-encoder")])
def test_what_may_not_be_read(model, drawn, tmp_path, monkeypatch, closed, flag):
    """Named with its flag, before anything is drawn, whether it is the whole or a part."""
    folder = model("sd3-medium").folder
    place = shutil.copytree(folder, tmp_path / "closed")
    flags = {"--weights": [], "--vae": ["--vae", str(place)], "--tokenizer": ["--tokenizer", str(place)],
             "--text-encoder": ["--text-encoder", str(place)]}[flag]
    closed_to_us(monkeypatch, place / closed)
    named = f"closed/{closed}".removesuffix("/")
    line = f"^{flag} [^ ]*{named}: cannot be read .permission denied.; make it readable$"
    with pytest.raises(ValueError, match=line):
        drawn("sd3-medium", place if flag == "--weights" else folder, *A, *flags)
    assert not list(tmp_path.glob("*.npz"))


@pytest.mark.parametrize("closed", ["", "transformer", "vae/config.json", "text_encoder"])
def test_what_may_not_be_read_in_training(model, pictures, tmp_path, monkeypatch, closed):
    place = shutil.copytree(model("sd3-medium").folder, tmp_path / "closed")
    closed_to_us(monkeypatch, place / closed)
    named = f"closed/{closed}".removesuffix("/")
    with pytest.raises(ValueError, match=f"{named}: cannot be read .permission denied.; make it readable$"):
        plan.prepare(settings.parse(tune("sd3-medium", place, pictures, tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()


def test_a_published_file_without_its_flags(model):
    """Given where a run belongs, it is recognised, and the flags are named."""
    for name, first in (("sdxl", "sdxl"), ("flux-schnell", "flux-schnell"), ("sd2.1", "sd2.1-base")):
        folder = model(name).folder
        file = folder / ("unet" if published.MODELS[name].arch == "unet" else "transformer")
        for path in (folder, file / "diffusion_pytorch_model.safetensors"):
            with pytest.raises(ValueError, match=f"{path}: is no run, but holds the network of .*; give "
                                                 f"--published {first} --weights {path}$"):
                sample.main([str(path), *A])
    with pytest.raises(ValueError, match="vae: no checkpoint there"):
        sample.main([str(folder / "vae"), *A])


@pytest.mark.long
def test_a_guide_beside_a_published_model(model, drawn, pictures, tmp_path, monkeypatch):
    """A run that began with it; what is no run, or of another model, is named."""
    few_samples(monkeypatch, steps=2)
    for name in ("sd1.5", "sd2.1-base"):
        train.main(tune(name, model(name).folder, pictures, tmp_path / "runs"))
    folder, runs = model("sd1.5").folder, tmp_path / "runs"
    plain = drawn("sd1.5", folder, *A)[0]
    guided = drawn("sd1.5", folder, *A, "--guide", str(runs / "sd1.5"), "--cfg", "3")[0]
    assert guided.isfinite().all() and not torch.equal(guided, plain)
    for guide, message in [
            (folder, "no checkpoint there .*; a guide is a run of train.py$"),
            (folder / "unet/diffusion_pytorch_model.safetensors", "; a guide is a run of train.py$"),
            (runs / "sd2.1-base", "its text encoder is sd2, where sd1.5 has sd1; give a run that was trained "
                                  "like it, as one that began with it .train.py --published")]:
        with pytest.raises(ValueError, match=f"--guide {guide}: .*{message}"):
            drawn("sd1.5", folder, *A, "--guide", str(guide))


def test_damaged_weights_of_others_are_not_to_be_trained_again(model, drawn, tmp_path):
    from safetensors.torch import load_file, save_file

    for part in ("unet", "vae"):
        folder = shutil.copytree(model("sd1.5").folder, tmp_path / part)
        file = folder / part / "diffusion_pytorch_model.safetensors"
        state = load_file(file)
        next(iter(state.values())).fill_(torch.nan)
        save_file(state, file)
        with pytest.raises(ValueError, match=f"/{part}: damaged: .* not finite .*; download it again"):
            drawn("sd1.5", folder, *A)


def test_a_class_model_takes_no_prompt(model, drawn, tmp_path, monkeypatch):
    row = published.MODELS["dit-s-8-256"]
    row = row._replace(config=row.config | dict(width=96, depth=1, heads=3))
    monkeypatch.setitem(published.MODELS, "dit-s-8-256", row)
    network = shake(networks.build_model("dit", row.config), 3)
    table = torch.zeros(1, 16, 96)
    torch.save(network.state_dict() | {"pos_embed": table}, tmp_path / "dit.pt")
    flags = ["--vae", str(model("sd1.5").folder)]
    for more in (["--prompt", "a"], ["--negative-prompt", "a"], ["--no-t5"], ["--text-encoder", "a"]):
        refused(drawn, tmp_path, "dit-s-8-256", tmp_path / "dit.pt", [*flags, *more],
                f"{more[0]}.*: this run is conditioned on class labels; ")


# ---- fine-tuning

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of pictures with captions."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    folder.mkdir()
    for i in range(20):
        noise = np.random.default_rng(i).integers(0, 255, (8, 8, 3), np.uint8)
        Image.fromarray(noise).resize((SIDE, SIDE)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(PROMPTS[i % 2])
    return folder


def tune(name, folder, pictures, runs, *more):
    row = published.MODELS[name]
    return ["--published", name, "--init-from", str(folder), "--arch", row.arch, "--objective",
            row.objective["name"], "--data", str(pictures), "--image-size", str(SIDE), "--batch-size", "4",
            "--steps", "1", "--precision", "fp32", "--runs-dir", str(runs), "--name", name, *more]


@torch.no_grad()
def their_loss(name, pipe, x0, eps, t, prompts):
    """The loss of diffusers' network, with its pipeline's conditions for these prompts."""
    from diffusers import DDPMScheduler

    row, n = published.MODELS[name], len(prompts)
    if row.arch == "unet":
        prediction = "v_prediction" if row.objective["prediction"] == "v" else "epsilon"
        scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                                  prediction_type=prediction)
        steps = (1000 * t).round().long() - 1
        xt = scheduler.add_noise(x0, eps, steps)
        target = scheduler.get_velocity(x0, eps, steps) if prediction == "v_prediction" else eps
        more = {}
        if name == "sdxl":
            context, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
            sizes = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * n)
            more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
        else:
            context, _ = pipe.encode_prompt(prompts, "cpu", 1, False)
        found = pipe.unet(xt, steps, context, **more).sample
        return (found - target).square().flatten(1).mean(1)
    xt = torch.lerp(x0, eps, t[:, None, None, None])
    if name.startswith("sd3"):
        context, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        found = pipe.transformer(xt, context, pooled, 1000 * t).sample
    else:
        distilled = name == "flux-dev"
        context, pooled, text_ids = pipe.encode_prompt(prompts, None,
                                                       max_sequence_length=512 if distilled else 256)
        h, w = xt.shape[2:]
        ids = pipe._prepare_latent_image_ids(n, h // 2, w // 2, "cpu", torch.float32)
        found = pipe.transformer(pipe._pack_latents(xt, n, 16, h, w), context, pooled, t, ids, text_ids,
                                 torch.full((n,), 3.5) if distilled else None).sample
        found = pipe._unpack_latents(found, 8 * h, 8 * w, 8)
    return (found - (eps - x0)).square().flatten(1).mean(1)


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_fine_tuning(model, drawn, pictures, tmp_path, monkeypatch, name):
    """The loss of the first step is that of diffusers' network; the run goes on from its weights, and can be
    drawn from."""
    few_samples(monkeypatch, steps=2)
    pipe, folder = model(name)
    seen = []
    plain = tasks.Denoising.loss

    def watched(self, network, indices):
        path_loss = self.path.loss

        def kept(network, x0, *, eps, t, **cond):
            loss = path_loss(network, x0, eps=eps, t=t, **cond)
            seen.append((x0, eps, t, [self.conditioning.captions[i] for i in indices], loss.detach()))
            return loss
        monkeypatch.setattr(self.path, "loss", kept)
        return plain(self, network, indices)

    with monkeypatch.context() as patch:
        patch.setattr(tasks.Denoising, "loss", watched)
        train.main(tune(name, folder, pictures, tmp_path / "runs", "--label-dropout", "0"))
    *inputs, loss = seen[0]
    torch.testing.assert_close(loss, their_loss(name, pipe, *inputs), rtol=1e-4, atol=1e-5)
    assert loss.shape == (4,) and loss.isfinite().all()

    checkpoint = checkpoints.load_checkpoint(tmp_path / "runs" / name)
    begun = published.read_network(name, folder)
    change = max((checkpoint["model"][key] - weight).abs().max() for key, weight in begun.items())
    assert 0 < change < 1e-3                                # one step at the rate of fine-tuning, 1e-4
    config = networks.make_config(name, settings.ARCHITECTURES[checkpoint["arch"]].config,
                                  checkpoint["config"])
    assert config == published.build_network(name).config
    out = tmp_path / "tuned.npz"
    sample.main([str(tmp_path / "runs" / name), "--prompt", *PROMPTS, "--n", "2", "--steps", "3", "--out",
                 str(out)])
    images = np.load(out)["arr_0"]
    assert images.shape == (2, SIDE, SIDE, 3) and (images[0] != images[1]).any()
    if name == "flux-dev":                                  # of which --cfg is an input
        sample.main([str(tmp_path / "runs" / name), "--prompt", *PROMPTS, "--n", "2", "--steps", "3", "--cfg",
                     "1.5", "--out", str(out)])
        assert (np.load(out)["arr_0"] != images).any()
    # and further from there, where --text-encoder says what --init-from no longer does
    own = ["--init-from", str(tmp_path / "runs" / name), "--name", "again", "--vae", str(folder)]
    with pytest.raises(ValueError, match="--init-from .*: .* takes its own text encoders; give --text-enc"):
        settings.parse(tune(name, folder, pictures, tmp_path / "runs", *own))
    train.main(tune(name, folder, pictures, tmp_path / "runs", *own, "--text-encoder",
                    f"{published.MODELS[name].text}:{folder}"))


def test_fine_tuning_refuses_what_does_not_fit(model, pictures, tmp_path):
    folder, other = model("sd3.5-medium").folder, model("sd1.5").folder
    (tmp_path / "file.safetensors").write_bytes(b"")
    for flags, message in [
            (["--init-from", "nowhere"], "--vae nowhere: no checkpoint there"),
            (["--cond", "text", "--text-encoder", "bytes"], "--text-encoder bytes: --published sd3.5-medium"),
            (["--text-encoder", f"sd1:{other}"], "takes its own text encoders; give --text-encoder sd3:FOLD"),
            (["--init-from", str(tmp_path / "file.safetensors"), "--vae", str(folder)],
             "give --text-encoder sd3:FOLDER"),
            (["--init-from", str(other), "--vae", str(folder), "--text-encoder", f"sd3:{folder}"],
             "holds the network of sd1.5"),
            (["--vae", str(other)], "was trained in latents of 16 channels"),
            (["--image-size", "72"], "--image-size 72 72: height must be a multiple of 16"),
            (["--objective", "ddpm"], "--published sd3.5-medium: is --arch mmdit --objective rf")]:
        with pytest.raises(ValueError, match=message):
            plan.prepare(settings.parse(tune("sd3.5-medium", folder, pictures, tmp_path / "runs", *flags)))
    with pytest.raises(ValueError, match="--cond class: --published sd1.5 is conditioned on text"):
        settings.parse(tune("sd1.5", other, pictures, tmp_path / "runs", "--cond", "class"))
    with pytest.raises(ValueError, match="--no-t5: belongs to --text-encoder sd3:FOLDER"):
        settings.parse(tune("sd1.5", other, pictures, tmp_path / "runs", "--no-t5"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags", [[], ["--offload", "parts"], ["--offload", "blocks"]])
def test_text_encoders_are_gone_before_the_network_comes(model, drawn, monkeypatch, flags):
    plain, stage = encoders.build, sample.set_stage
    held = []

    def building(*inputs, **options):
        encoder = plain(*inputs, **options)
        held.extend(weakref.ref(text_model) for text_model in encoder.models)
        return encoder

    def staging(*inputs):
        assert len(held) == 3 and not any(reference() for reference in held)
        return stage(*inputs)

    monkeypatch.setattr(encoders, "build", building)
    monkeypatch.setattr(sample, "set_stage", staging)
    drawn("sd3-medium", model("sd3-medium").folder, "--prompt", "a", *flags)


def test_memory_is_counted_from_shapes():
    """What is alive at a time; neither weights and their views, nor what has been freed."""
    layer = torch.nn.Linear(500, 1000, bias=False, device="meta")

    def call():
        x = torch.empty(250, 1000)                         # 1 MB
        x = x * 2                                          # the first one is freed after this
        x = (x + 1) @ layer.weight.mT.T                    # 1 + 1 MB, and 0.5 MB at the end
        return F.scaled_dot_product_attention(x, x, x)
    assert memory.peak(layer, call) == 2_500_000
