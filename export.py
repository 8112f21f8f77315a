"""A run's weights for other programs: a file of weights alone, or a folder in the layout of diffusers.

    python export.py                                # exports a tiny VAE and reads it back
    python export.py RUN OUT.safetensors            # the averaged weights (pip install safetensors)
    python export.py RUN OUT.pt                     # the same, by torch.save
    python export.py RUN OUT/                       # for diffusers, where it has this network

A file holds any run by this project's names, a network's VAE under the prefix "vae.", and as JSON the
settings to rebuild both (published.read_export). A folder holds what diffusers computes exactly as this
project does; everything else is refused in one line that names the setting without a counterpart. Weights
are changed only where diffusers counts its steps or scales its latents differently, by maps that are exact.
"""

from __future__ import annotations

import cli

cli.quiet_imports(__name__)             # before those that take seconds

import importlib.util
import inspect
import json
import math
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import dit
import published
from checkpoints import is_finished, load_checkpoint
from cli import Flag, make_parser, nonempty, program
from ddpm import DDPM
from dit import DiTConfig
from files import check_writable, write_atomically
from media import medium_of
from mmdit import MMDiTConfig
from names import DIT_NAMES, MMDIT_NAMES, UNET_NAMES, mmdit_layers_without_gate, rename, separate
from networks import build_model, build_path, unpack_vae
from unet import UNetConfig
from vae import PRESETS, VAE, VAEConfig
from weights import check_weights

FLAGS = {
    "what and where to": [
        Flag("run", "run folder, or a checkpoint file", nonempty),
        Flag("out", "OUT.safetensors or OUT.pt: one file; OUT/: a new folder for diffusers", nonempty),
        Flag("--raw", "the run's raw weights, not their average"),
        Flag("--with-correction", "dit: write a folder although diffusers draws with it correctly only after "
                                  "the correction that OUT/README.md shows"),
    ],
}
FILES = (".safetensors", ".pt")
VERSION = "0.42.1"                    # of diffusers, with which the tests compare
WEIGHTS = "diffusion_pytorch_model.safetensors"

# What diffusers must be corrected by before it draws with a DiT.
CORRECTION = """DiTTransformer2DModel spaces the 128 frequencies of its time embedding over 127, the original
DiT and this network over 128. Correct that after loading:

    for block in transformer.transformer_blocks:      # pipe.transformer of a DiTPipeline
        block.norm1.emb.time_proj.downscale_freq_shift = 0
"""


# ---- weights as diffusers names and arranges them; names.py has the way forward

DIT_CLASSES = 1000       # diffusers' DiTPipeline takes class 1000 as the null class, whatever the network


def delay_time(weight: Tensor, by: float) -> Tensor:
    """The first layer of a time embedding, (D, F), for a program that gives it the sinusoids of time - by.

    cos((u + by) f) and sin((u + by) f) are a rotation of cos(u f) and sin(u f), so the rotation becomes a
    part of the weights, and the network is the same one, exactly."""
    cosines, sines = weight.double().chunk(2, dim=1)                       # the embedding begins with cosines
    half = cosines.shape[1]
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float64) / half)
    cos, sin = (by * frequencies).cos(), (by * frequencies).sin()
    return torch.cat([cosines * cos + sines * sin, sines * cos - cosines * sin], dim=1).to(weight.dtype)


def dit_to_diffusers(state: dict[str, Tensor], config: DiTConfig, delay: float = 0.0) -> dict[str, Tensor]:
    """The state of diffusers' DiTTransformer2DModel from that of a published DiT block, with DIT_CLASSES
    classes. Rows of the table beyond our classes repeat the null class; without classes, all rows are zero.
    delay: by how much our time embedding's input exceeds diffusers' timestep; see `delay_time`."""
    state = dict(state)
    for name in list(state):
        if ".attn.qkv." in name:
            separate(state, name, "qkv", ("q", "k", "v"), config.width)
    time = "t_embedder.mlp.0.weight"
    state[time] = delay_time(state[time], delay)
    labels = "y_embedder.embedding_table.weight"
    table = state.get(labels, state[time].new_zeros(1, config.width))
    null = table[-1:].expand(DIT_CLASSES + 2 - len(table), -1)
    state[labels] = torch.cat([table[:-1], null])                          # (DIT_CLASSES + 1, D)

    renamed = {rename(name, DIT_NAMES, back=True): weight for name, weight in state.items()}
    first = "transformer_blocks.0."
    for name in [name for name in renamed if name.startswith(f"{first}norm1.emb.")]:
        for i in range(1, config.depth):   # diffusers keeps a copy of the embedders in every block
            renamed[name.replace(first, f"transformer_blocks.{i}.")] = renamed[name]
    return renamed


def mmdit_to_diffusers(state: dict[str, Tensor], config: MMDiTConfig,
                       delay: float = 0.0) -> dict[str, Tensor]:
    """The inverse of `mmdit_weights`: the state of SD3Transformer2DModel or, with single blocks, of
    FluxTransformer2DModel. delay: by how much our time embedding's input exceeds diffusers' timestep; see
    `delay_time`."""
    state = dict(state)
    for name in list(state):
        if ".linear1." in name:
            hidden = len(state[name]) - 3 * config.width
            separate(state, name, "linear1", ("q", "k", "v", "mlp"), [config.width] * 3 + [hidden])
        elif ".qkv." in name:
            separate(state, name, "qkv", ("q", "k", "v"), config.width)
    state["t_embedder.mlp.0.weight"] = delay_time(state["t_embedder.mlp.0.weight"], delay)
    if config.guidance:                    # the scale itself is embedded, which has no steps to count
        name = "guidance_embedder.mlp.0.weight"
        state[name] = delay_time(state[name], config.time_offset)
    for layer in mmdit_layers_without_gate(config):
        for kind in ("weight", "bias"):
            shift, scale = state[f"{layer}.{kind}"].chunk(2)
            state[f"{layer}.{kind}"] = torch.cat([scale, shift])

    if config.single_depth == 0:           # Stable Diffusion 3 keeps its table of positions in the file
        base, largest = config.sincos
        device = state["x_embedder.proj.weight"].device
        table = dit.sincos_positions(largest, largest, config.width, device, crop=(base, largest))
        axis = state.pop("position_table", None)
        if axis is not None:
            columns = axis.expand(largest, largest, -1)                        # (row, column, D / 2)
            table = torch.cat([columns, columns.transpose(0, 1)], dim=-1).flatten(0, 1)
        renamed = {rename(name, MMDIT_NAMES, back=True): weight for name, weight in state.items()}
        return renamed | {"pos_embed.pos_embed": table[None]}
    # FLUX embeds vectors (c, p, q), and writes (c, p, q) where we write (p, q, c): see `mmdit_weights`.
    p, q = config.patch
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = state[name].unflatten(0, (p * q, -1))                           # (p * q, c, ...)
        state[name] = rows.transpose(0, 1).flatten(0, 1)                       # (c * p * q, ...)
    renamed = {rename(name, MMDIT_NAMES, back=True): weight for name, weight in state.items()}
    renamed["x_embedder.weight"] = renamed.pop("pos_embed.proj.weight").flatten(1)
    renamed["x_embedder.bias"] = renamed.pop("pos_embed.proj.bias")
    return renamed


def unet_to_diffusers(state: dict[str, Tensor], config: UNetConfig, delay: float = 0.0) -> dict[str, Tensor]:
    """The state of diffusers' UNet2DConditionModel from that of a U-Net. delay: by how much our time
    embedding's input exceeds diffusers' timestep; see `delay_time`."""
    renamed = {rename(name, UNET_NAMES, back=True): weight for name, weight in state.items()}
    time = "time_embedding.linear_1.weight"
    renamed[time] = delay_time(renamed[time], delay)
    if config.context_width is None:
        # diffusers has no transformer without cross-attention. One whose weights are zero adds exactly zero;
        # of this shape, it attends to the picture itself when it is given no context.
        for name in [name for name in renamed if name.endswith(".attn1.to_out.0.weight")]:
            block = name.removesuffix("attn1.to_out.0.weight")
            square = torch.zeros_like(renamed[name])
            row = square.new_zeros(len(square))
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                renamed[f"{block}attn2.{part}.weight"] = square
            renamed[f"{block}attn2.to_out.0.bias"] = row
            renamed[f"{block}norm2.weight"] = torch.ones_like(row)
            renamed[f"{block}norm2.bias"] = row
    return renamed


def vae_to_diffusers(autoencoder: VAE) -> dict[str, Tensor]:
    """The state of diffusers' AutoencoderKL from a VAE without a shortcut, with the normalisation of its
    latents in quant_conv and post_quant_conv (the identity where the VAE has none). diffusers' latents are
    then our normalised ones at scaling_factor 1:

        mean' = (mean - m) / s,   logvar' = logvar - 2 log s,   decode'(z') = decode(s z' + m)

    Both implementations clamp the log-variance to [-30, 20], we before this map and diffusers after it. They
    differ where it is beyond either range: below, where the noise is under e^-15 of the latent's scale (or of
    1), less than a rounding error; above, where the noise is e^10 times as large, as in no trained VAE."""
    channels = autoencoder.config.latent_channels
    mean, std = autoencoder.latent_mean.double(), autoencoder.latent_std.double()
    state = {name: weight for name, weight in autoencoder.state_dict().items()
             if not name.startswith("latent_")}
    like = state["decoder.conv_in.weight"]                                 # for its dtype and device
    for layer, size in (("quant_conv", 2 * channels), ("post_quant_conv", channels)):
        if f"{layer}.weight" not in state:
            state[f"{layer}.weight"] = torch.eye(size).to(like)[:, :, None, None]
            state[f"{layer}.bias"] = like.new_zeros(size)

    weight, bias = state["quant_conv.weight"].double(), state["quant_conv.bias"].double()
    scale = torch.cat([1 / std, torch.ones_like(std)])                     # of means and log-variances
    state["quant_conv.weight"] = weight * scale[:, None, None, None]
    state["quant_conv.bias"] = bias * scale - torch.cat([mean / std, 2 * std.log()])
    weight, bias = state["post_quant_conv.weight"].double(), state["post_quant_conv.bias"].double()
    state["post_quant_conv.weight"] = weight * std[:, None, None]          # (C out, C in, 1, 1): its input
    state["post_quant_conv.bias"] = bias + weight[:, :, 0, 0] @ mean
    return {name: part.to(like.dtype) for name, part in state.items()}


# ---- configurations of diffusers; each refuses what that class cannot represent

class Part(NamedTuple):
    """One folder of a diffusers folder ("" for that itself)."""
    folder: str
    config: dict
    state: dict[str, Tensor] | None = None
    config_file: str = "config.json"


class Layout(NamedTuple):
    kind: str                         # diffusers' class
    folder: str                       # its place in a pipeline's folder
    fixed: dict                       # settings that are variable here and fixed there
    config: Callable[..., dict]       # of our configuration and the latent's (height, width)
    weights: Callable[..., dict]      # see dit_to_diffusers


def side(what: str, sides: tuple[int, int]) -> int:
    if sides[0] != sides[1]:
        raise ValueError(f"{what} {sides[0]}x{sides[1]}: diffusers has only squares there")
    return sides[0]


def dit_config(c: DiTConfig, latent: tuple[int, int]) -> dict:
    if c.num_classes > DIT_CLASSES:
        raise ValueError(f"num_classes {c.num_classes}: diffusers' DiTPipeline takes class {DIT_CLASSES} as "
                         "the null class")
    channels = c.out_channels or c.channels
    return {"num_attention_heads": c.heads, "attention_head_dim": c.width // c.heads, "num_layers": c.depth,
            "in_channels": c.channels, "out_channels": 2 * channels if c.learn_sigma else channels,
            "patch_size": side("patch", c.patch), "sample_size": side("latent", latent),
            "num_embeds_ada_norm": DIT_CLASSES, "norm_type": "ada_norm_zero", "norm_eps": 1e-6,
            "norm_elementwise_affine": False, "attention_bias": True, "activation_fn": "gelu-approximate"}


def mmdit_config(c: MMDiTConfig) -> dict:
    """What Stable Diffusion 3 and FLUX have in common."""
    if c.pooled_width is None:
        raise ValueError("pooled_width None: diffusers' MM-DiTs need a pooled text vector")
    return {"num_attention_heads": c.heads, "attention_head_dim": c.width // c.heads, "num_layers": c.depth,
            "joint_attention_dim": c.context_width, "pooled_projection_dim": c.pooled_width}


def sd3_config(c: MMDiTConfig, latent: tuple[int, int]) -> dict:
    if c.sincos is None:
        raise ValueError("sincos None: diffusers' SD3Transformer2DModel adds positions to its patches")
    patch = side("patch", c.patch)
    base, largest = c.sincos
    return mmdit_config(c) | {
        "in_channels": c.channels, "out_channels": c.out_channels or c.channels, "patch_size": patch,
        "sample_size": base * patch,       # scales the positions; pictures may have any size
        "pos_embed_max_size": largest, "caption_projection_dim": c.width,
        "dual_attention_layers": list(range(c.dual_attention)), "qk_norm": "rms_norm" if c.qk_norm else None}


def flux_config(c: MMDiTConfig, latent: tuple[int, int]) -> dict:
    if c.rope is None:
        raise ValueError("rope None: diffusers' FluxTransformer2DModel has rotary positions")
    values = c.patch[0] * c.patch[1]       # it is given patches as vectors, each as one token
    return mmdit_config(c) | {
        "in_channels": c.channels * values, "out_channels": (c.out_channels or c.channels) * values,
        "patch_size": 1, "num_single_layers": c.single_depth, "guidance_embeds": c.guidance,
        "axes_dims_rope": list(c.rope)}


def unet_config(c: UNetConfig, latent: tuple[int, int]) -> dict:
    if c.pooled_width and c.num_classes:
        raise ValueError(f"pooled_width {c.pooled_width} with num_classes {c.num_classes}: diffusers' "
                         "UNet2DConditionModel embeds one of the two")
    down = ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in c.attention]
    up = ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(c.attention)]
    config = {
        "in_channels": c.channels, "out_channels": c.out_channels or c.channels, "sample_size": list(latent),
        "block_out_channels": list(c.widths), "layers_per_block": c.layers, "norm_num_groups": c.groups,
        "down_block_types": down, "up_block_types": up, "use_linear_projection": c.linear_projection,
        # in diffusers, this is the number of heads
        "attention_head_dim": c.heads if isinstance(c.heads, int) else list(c.heads),
        "transformer_layers_per_block": c.depth if isinstance(c.depth, int) else list(c.depth),
        "cross_attention_dim": c.context_width or list(c.widths)}      # see unet_to_diffusers
    if c.num_classes:
        config["num_class_embeds"] = c.num_classes + 1                 # the last one is the null class
    if c.pooled_width:
        config |= {"class_embed_type": "projection", "projection_class_embeddings_input_dim": c.pooled_width}
    return config


def vae_config(c: VAEConfig, size: tuple[int, int]) -> dict:
    if c.shortcut:
        raise ValueError("shortcut True: diffusers' AutoencoderKL has none; the VAE of --vae-preset sd and "
                         "published ones are without")
    levels = len(c.widths)
    down = ["AttnDownEncoderBlock2D" if level in c.attention_levels else "DownEncoderBlock2D"
            for level in range(levels)]
    up = ["AttnUpDecoderBlock2D" if level in c.attention_levels else "UpDecoderBlock2D"
          for level in reversed(range(levels))]
    return {"_class_name": "AutoencoderKL", "in_channels": c.image_channels, "out_channels": c.image_channels,
            "latent_channels": c.latent_channels, "block_out_channels": list(c.widths),
            "layers_per_block": c.layers, "norm_num_groups": c.groups, "sample_size": max(size),
            "down_block_types": down, "up_block_types": up, "mid_block_add_attention": c.attention,
            "scaling_factor": 1.0, "shift_factor": 0.0}                # see vae_to_diffusers


PUBLISHED = {"experts": 0, "norm": "layer", "mlp": "gelu", "mlp_ratio": 4.0, "conv": False,
             "time_scale": 1000.0}
SECOND_TIME = {"second_time": False}
LAYOUTS = {
    "dit": Layout("DiTTransformer2DModel", "transformer",
                  PUBLISHED | SECOND_TIME | {"qk_norm": False, "rope": False},
                  dit_config, dit_to_diffusers),
    "sd3": Layout("SD3Transformer2DModel", "transformer", PUBLISHED | {"rope": None, "guidance": False},
                  sd3_config, mmdit_to_diffusers),
    "flux": Layout("FluxTransformer2DModel", "transformer",
                   PUBLISHED | {"qk_norm": True, "sincos": None, "dual_attention": 0, "rope_theta": 10000.0},
                   flux_config, mmdit_to_diffusers),
    "unet": Layout("UNet2DConditionModel", "unet",
                   SECOND_TIME | {"positions": False, "middle_attention": True}, unet_config,
                   unet_to_diffusers),
}

BETAS = {"linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
         "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
         "cosine": {"beta_schedule": "squaredcos_cap_v2"}}
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def scheduler_config(objective: dict) -> dict:
    """The scheduler that follows this path as samplers.ddim and samplers.euler do."""
    path = build_path(objective)
    if objective["name"] == "rf":
        if path.prediction != "velocity":
            raise ValueError(f"prediction {path.prediction} on the straight path: diffusers' "
                             "FlowMatchEulerDiscreteScheduler has only velocity")
        if path.shift_tokens is not None:
            raise ValueError(f"--shift-tokens {path.shift_tokens}: diffusers' scheduler has another rule for "
                             "shifts that follow the size; export the weights alone")
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000,
                "shift": path.shift, "use_dynamic_shifting": False}
    # A checkpoint names only the options that were given.
    schedule = objective.get("schedule", inspect.signature(DDPM).parameters["schedule"].default)
    return {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, **BETAS[schedule],
            "prediction_type": PREDICTIONS[path.prediction],
            "rescale_betas_zero_snr": objective.get("zero_terminal_snr", False),
            "timestep_spacing": "trailing",          # as DDPM.times
            "steps_offset": 0, "set_alpha_to_one": True,               # the last step ends at data, n = 0
            "clip_sample": False, "thresholding": False}               # latents have no range


# ---- a folder for diffusers

def vae_part(autoencoder: VAE, size: tuple[int, int], folder: str = "vae") -> Part:
    config = vae_config(autoencoder.config, size)
    return Part(folder, config, vae_to_diffusers(autoencoder))


def network_parts(checkpoint: dict, config, state: dict[str, Tensor], autoencoder: VAE) -> list[Part]:
    """Network, VAE and scheduler, and the index of a pipeline where diffusers has one that needs no more."""
    text = checkpoint["text"]
    if text is not None and text["encoder"] == "bytes":
        raise ValueError("text encoder bytes: it is trained with the network, and diffusers has none like it")
    name = checkpoint["arch"]
    if name == "mmdit":
        name = "flux" if config.single_depth else "sd3"
    layout = LAYOUTS[name]
    for setting, value in layout.fixed.items():
        if getattr(config, setting) != value:
            raise ValueError(f"{setting} {getattr(config, setting)}: diffusers' {layout.kind} has only "
                             f"{value}")
    size = tuple(checkpoint["data"]["size"])
    latent = (size[0] // autoencoder.factor, size[1] // autoencoder.factor)
    network = {"_class_name": layout.kind} | layout.config(config, latent)
    vae = vae_part(autoencoder, size)
    scheduler = scheduler_config(checkpoint["objective"])
    # diffusers counts the noisy steps of the diffusion path from 0, where ours are n = 1..1000. On the
    # straight path its timestep is 1000 t.
    first = 1.0 if checkpoint["objective"]["name"] == "ddpm" else 0.0
    weights = layout.weights(state, config, first + config.time_offset)
    parts = [Part(layout.folder, network, weights), vae,
             Part("scheduler", scheduler, config_file="scheduler_config.json")]
    if name == "dit" and first:            # DiTPipeline calls what the straight path's scheduler lacks
        index = {"_class_name": "DiTPipeline",
                 "id2label": dict(enumerate(checkpoint["data"]["classes"])) or None}
        index |= {part.folder: ["diffusers", part.config["_class_name"]] for part in parts}
        parts.append(Part("", index, config_file="model_index.json"))
    return parts


def readme(checkpoint: dict) -> str:
    """What a user of the folder cannot see in its configurations."""
    height, width = checkpoint["data"]["size"]
    lines = [f"Exported for diffusers {VERSION}: {checkpoint['arch']}, pictures of {height} x {width}.",
             "The latents of its VAE are normalised: there is no scale to apply."]
    classes = checkpoint["data"]["classes"]
    if classes:
        null = DIT_CLASSES if checkpoint["arch"] == "dit" else len(classes)
        lines.append(f"Classes, from 0: {', '.join(classes)}. The null class is {null}.")
    if checkpoint["text"] is not None:
        vectors = {"clip": "the penultimate hidden layer of its CLIP",
                   "t5": "the last hidden layer of its T5",
                   "none": "precomputed vectors"}[checkpoint["text"]["encoder"]]
        lines.append(f"Text: the network takes {vectors}, without the vectors of padding.")
    if checkpoint["arch"] == "dit":
        lines.append(CORRECTION)
    return "\n\n".join(lines) + "\n"


def write_folder(out: Path, parts: list[Part], text: str) -> None:
    """Write all files under a name of their own, which then becomes `out`: a folder that is found is
    complete. Raises OSError with one line."""
    fresh = out.with_name(f".{out.name[:40]}.{secrets.token_hex(8)}.part")
    try:
        fresh.mkdir()
        write_atomically(fresh / "README.md", lambda file: file.write(text.encode()))
        for part in parts:
            folder = fresh / part.folder
            folder.mkdir(exist_ok=True)
            config = json.dumps(part.config | {"_diffusers_version": VERSION}, indent=2)
            write_atomically(folder / part.config_file, lambda file: file.write(config.encode()))
            if part.state is not None:
                write_safetensors(folder / WEIGHTS, part.state, {"format": "pt"})
        if out.is_dir():
            out.rmdir()                    # raises unless it is empty, whatever happened since it was checked
        fresh.rename(out)
    except OSError as error:
        message = str(error).replace(str(fresh), str(out))         # nobody knows its present name
        if not message.startswith("cannot write"):                 # the line of write_atomically
            message = f"cannot write {out}: {error.strerror}"
        raise OSError(message) from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


# ---- a file

def alone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor contiguous, in memory of its own: a file would otherwise hold that of its neighbours."""
    return {name: weight.detach().clone(memory_format=torch.contiguous_format)
            for name, weight in state.items()}


def write_safetensors(out: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save

    content = save(alone(state), metadata)
    write_atomically(out, lambda file: file.write(content))


def metadata_of(checkpoint: dict, config, autoencoder: VAE | None) -> dict[str, str]:
    """What it takes to rebuild the run's model, as JSON by name; see published.read_metadata."""
    data = checkpoint["data"]
    found = {name: checkpoint[name] for name in ("arch", "objective", "step", "text", "label_dropout")}
    kept = ("size", "classes", "longest", "seconds")       # the last two: of sounds
    found |= {"config": asdict(config), "data": {name: data[name] for name in kept if name in data},
              "vae": asdict(autoencoder.config) if autoencoder else None}
    return {"format": "pt"} | {name: json.dumps(value) for name, value in found.items()}


# ---- the program

def check_out(out: str) -> str:
    """The ending of a file to write, or "" for a folder. Refuses a place that cannot be written, and whatever
    is there unless it is an earlier export."""
    path = Path(out)
    is_folder = out.endswith(("/", os.sep))
    kind = "" if is_folder else path.suffix
    if kind not in ("", *FILES):
        raise ValueError(f"{out}: must end in {' or '.join(FILES)}, or in / to name a folder")
    if path.name in ("", ".."):
        raise ValueError(f"{out}: name a new folder")
    check_writable(path)
    check_writable(path.parent)            # a folder takes the place of an empty one
    if not path.parent.is_dir():
        raise ValueError(f"{out}: the folder {path.parent} does not exist")
    if kind:
        if path.exists() and not path.is_file():
            raise ValueError(f"{out}: there is a folder of that name; choose another")
        if path.exists() and published.read_metadata(path) is None:
            raise ValueError(f"{out}: there is a file of that name that is no export; choose another")
    elif path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"{out}: there is a file or a link of that name; choose another")
    elif path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{out}: this folder is not empty; name a new one")
    if kind != ".pt" and importlib.util.find_spec("safetensors") is None:
        raise ValueError(f"{out}: needs the package safetensors (pip install safetensors)")
    return kind


def export(run: str, out: str, raw: bool = False, with_correction: bool = False) -> None:
    """Write the averaged (or raw) weights of a run to `out`. Raises ValueError or OSError with one line."""
    kind = check_out(out)
    checkpoint = load_checkpoint(run)
    arch = checkpoint["arch"]
    if arch == "vae" and not is_finished(checkpoint):
        # The scale of its latents is measured at the end.
        raise ValueError(f"{run}: this VAE is not finished (step {checkpoint['step']:,}); run its command "
                         "again")
    if checkpoint["config"].get("sound_channels"):
        raise ValueError(f"{run}: draws pairs of a picture and a sound, with two VAEs, which an export does "
                         "not hold; use the run as it is, with pairs.py")
    if with_correction and (kind or arch != "dit"):
        raise ValueError(f"--with-correction: only a folder of a DiT needs it, not {out} of a {arch}; leave "
                         "it out")
    state = checkpoint["model" if raw else "ema"]
    with torch.device("meta"):             # only names, shapes and settings are needed
        model = build_model(arch, checkpoint["config"], checkpoint["text"])
    check_weights(model, state, str(run))
    autoencoder = None
    if arch != "vae":
        build_path(checkpoint["objective"])
        autoencoder = unpack_vae(checkpoint["vae"], str(run))

    if kind:
        if autoencoder is not None:
            state = state | {f"vae.{name}": weight for name, weight in autoencoder.state_dict().items()}
        metadata = metadata_of(checkpoint, model.config, autoencoder)
        if kind == ".pt":
            content = {"state_dict": alone(state), "metadata": metadata}
            write_atomically(Path(out), lambda file: torch.save(content, file))
        else:
            write_safetensors(Path(out), state, metadata)
        return

    try:
        if medium_of(model.config if arch == "vae" else autoencoder.config).rate is not None:
            raise ValueError("it draws sounds, and diffusers has no network like it")
        if arch == "vae":
            whole = unpack_vae({"config": checkpoint["config"], "state": state}, str(run))
            parts = [vae_part(whole, tuple(checkpoint["data"]["size"]), folder="")]
        else:
            parts = network_parts(checkpoint, model.config, state, autoencoder)
        if arch == "dit" and not with_correction:
            raise ValueError("time embedding: diffusers' DiTTransformer2DModel spaces its frequencies over "
                             "127, this network over 128; give --with-correction, and correct that after "
                             "loading as OUT/README.md shows")
    except ValueError as error:
        raise ValueError(f"{run}: {error}; a file can hold it: OUT.safetensors or OUT.pt") from None
    write_folder(Path(out), parts, readme(checkpoint))


def demo() -> None:
    """Export a tiny VAE with random weights to a file, read it back, and fold the scale of its latents."""
    torch.manual_seed(0)
    model = VAE(VAEConfig(**PRESETS["tiny"] | {"shortcut": False})).eval()
    model.set_latent_statistics(torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([4.0, 1.0, 0.1, 9.0]))
    state = model.state_dict()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        run = f"{folder}/run.pt"
        torch.save({"arch": "vae", "config": asdict(model.config), "objective": {"name": "vae"}, "step": 1,
                    "data": {"size": [32, 32], "classes": []}, "label_dropout": 0.0, "vae": None,
                    "model": state, "ema": state, "training": {"finished": True}}, run)
        export(run, f"{folder}/vae.pt")
        again = published.load_vae(f"{folder}/vae.pt")
        latents = model.normalize(model.encode(images).mean)
        error = (again.normalize(again.encode(images).mean) - latents).abs().max()
        size = os.path.getsize(f"{folder}/vae.pt")
        print(f"vae.pt: {size:,} bytes; read back, its latents differ by {error:g}")
        folded = published.vae_from_weights(vae_to_diffusers(model), scale=1.0, groups=2)
        error = (folded.encode(images).mean - latents).abs().max()
        print(f"for diffusers: with the scale of its latents in its weights, they differ by {error:.0e}")
        try:
            export(run, run)
        except ValueError as refusal:
            print(f"refused: {str(refusal).replace(folder, '...')}")


def main(argv: list[str] | None = None) -> None:
    if not (sys.argv[1:] if argv is None else argv):
        demo()
        return
    args = make_parser("Write a run's weights for other programs.", FLAGS).parse_args(argv)
    export(args.run, args.out, args.raw, args.with_correction)
    print(args.out)


if __name__ == "__main__":
    sys.exit(program("export.py", main))
