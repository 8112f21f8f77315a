"""Weights published elsewhere: the table of models, how to read their files into our networks, and how to
give ours the names and layouts of diffusers.

    python published.py                  # prints the table of models and their parameter counts
    python sample.py --published dit-xl-2-256 --weights DiT-XL-2-256x256.pt --vae sd-vae-ft-ema/ --n 1

DiT: Peebles & Xie 2022 (arXiv:2212.09748); SiT: Ma et al. 2024 (arXiv:2401.08740); Stable Diffusion 3: Esser
et al. 2024 (arXiv:2403.03206); the VAE: Rombach et al. 2022 (arXiv:2112.10752), appendix G. Files come from
the authors' repositories or from diffusers, which names and arranges some weights differently; export.py uses
the way back. Nothing is downloaded here. A state is a dict of tensors by name; every error is one line for
the user (ValueError).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import dit
from dit import DiT, DiTConfig
from mmdit import MMDiTConfig
from unet import UNetConfig
from vae import VAE, VAEConfig

SCALE = 0.18215      # brings the latents of Stable Diffusion 1 and 2 to a standard deviation of about 1


# ---- the models

class Published(NamedTuple):
    """A class-conditional model of ImageNet in the latents of Stable Diffusion's VAE."""
    config: dict       # of the DiT
    objective: dict    # the path it was trained on, with its settings
    side: int          # of its pictures, in pixels


class Family(NamedTuple):
    time: dict         # from our time (0 = data, 1 = noise) to that of its embedding
    objective: dict


FAMILIES = {
    # numbers its steps 0..999, where ours are 1..1000
    "dit": Family(time={"time_scale": 1000.0, "time_offset": -1.0},
                  objective={"name": "ddpm", "schedule": "linear", "learned_variance": True}),
    # its time runs from noise to data
    "sit": Family(time={"time_scale": -1.0, "time_offset": 1.0},
                  objective={"name": "rf", "density": "uniform"}),
}


def published_row(family: str, size: str, patch: int, side: int) -> Published:
    config = dit.PRESETS[f"{size}/{patch}"] | dit.PUBLISHED_BLOCK | FAMILIES[family].time
    config |= {"learn_sigma": True, "num_classes": 1000}           # SiT has the extra channels too, unused
    if size == "XL":
        config |= {"heads": 16}                                    # our preset has 18, which are faster
    return Published(config, FAMILIES[family].objective, side)


# By name: FAMILY-SIZE-PATCH-SIDE. Few of these have been released, but the authors' code can train all.
MODELS: dict[str, Published] = {
    f"{family}-{size.lower()}-{patch}-{side}": published_row(family, size, patch, side)
    for family, size, patch, side in itertools.product(FAMILIES, ("S", "B", "L", "XL"), (2, 4, 8), (256, 512))
}


# ---- files and checks

def check_weights(model: torch.nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Raise ValueError, one line that begins with `what`, with the first names or shapes that do not fit."""
    own = model.state_dict()
    wrong = [f"missing {name}" for name in own if name not in state]
    wrong += [f"surplus {name}" for name in state if name not in own]
    wrong += [f"{name} of shape {tuple(state[name].shape)}, not {tuple(weight.shape)}"
              for name, weight in own.items() if name in state and state[name].shape != weight.shape]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{what}: weights do not fit the network: {'; '.join(wrong[:3])}{more}")


def load_weights(model: torch.nn.Module, state: dict[str, Tensor], what: str) -> torch.nn.Module:
    """Copy a state into a model, strictly, and return the model. Raises ValueError as check_weights does."""
    check_weights(model, state, what)
    model.load_state_dict(state)
    return model


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """A published state from a .safetensors or a torch file, on the CPU; where a file has several sets of
    weights, the EMA weights. Raises ValueError, also for a checkpoint of train.py."""
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"{file}: no such file; download it first")
    if file.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ValueError(f"{file}: needs the package safetensors (pip install safetensors)") from None
    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            # weights_only, as a pickle from elsewhere could run any code. The checkpoints of DiT and SiT also
            # hold their training settings, an argparse.Namespace: plain attributes, so safe to allow.
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(file, map_location="cpu", weights_only=True)
        is_own = "arch" in state and "ema" in state
        for part in ("ema", "state_dict", "model"):        # where authors keep weights, the best ones first
            if isinstance(state.get(part), dict):
                state = state[part]
        state = {name: weight for name, weight in state.items()
                 if isinstance(name, str) and isinstance(weight, Tensor)}
    except Exception as error:         # both packages raise a dozen types; all mean the same to the user
        raise ValueError(f"{file}: not a file of weights alone, or damaged ({type(error).__name__}); "
                         "if it holds other objects too, convert it to .safetensors") from None
    if is_own:
        raise ValueError(f"{file}: is a run of train.py, not a published file; give it without --published")
    check_finite(state, str(file))
    return state


def check_finite(state: dict[str, Tensor], what: str) -> None:
    """Raise ValueError, one line that begins with `what`, for weights with NaN or infinity: they draw nothing
    and no training recovers them."""
    for name, weight in state.items():
        if not torch.isfinite(weight).all():
            raise ValueError(f"{what}: damaged: {name} has values that are not finite (NaN or infinity); use "
                             "an earlier copy of the file, or train again under another --name")


# ---- files of export.py

def read_metadata(file: str | Path) -> dict | None:
    """What export.py has written beside the weights: arch, config, objective, step, data, text, label_dropout
    and vae (the VAE's configuration). None for any other file. Only the head of the file is read."""
    file = Path(file)
    try:
        if file.suffix == ".safetensors":
            with open(file, "rb") as content:      # its header is JSON, whose length stands before it
                size = int.from_bytes(content.read(8), "little")
                strings = json.loads(content.read(min(size, 2**27)))["__metadata__"]
        else:
            strings = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["metadata"]
        metadata = {name: json.loads(value) for name, value in strings.items() if name != "format"}
        metadata["data"]["size"]                   # of another program, which also writes metadata?
        return metadata
    except Exception:                              # a dozen types, for files of every other kind
        return None


def read_export(file: str | Path) -> dict:
    """A file of export.py in the form of a checkpoint that cannot be continued. It holds one set of weights,
    which stands in both places. Raises ValueError for any other file."""
    metadata = read_metadata(file)
    if metadata is None:
        raise ValueError(f"{file}: not a file of export.py, or damaged")
    state = read_weights(file)
    prefix = "vae."
    autoencoder = None
    if metadata["vae"] is not None:
        autoencoder = {"config": tuples(metadata["vae"]),
                       "state": {name.removeprefix(prefix): weight for name, weight in state.items()
                                 if name.startswith(prefix)}}
        state = {name: weight for name, weight in state.items() if not name.startswith(prefix)}
    data = {"source": str(file), "prompts": []} | metadata["data"]
    return metadata | {"config": tuples(metadata["config"]), "data": data, "vae": autoencoder, "model": state,
                       "ema": state, "training": {"finished": True}}


def tuples(config: dict) -> dict:
    """A configuration as it was before JSON, which has lists only."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}


# ---- names and layouts

def rename(name: str, table: tuple[tuple[str, str], ...]) -> str:
    """Apply every (pattern, replacement) of a table, one after the other."""
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def join(state: dict[str, Tensor], q_name: str, parts: tuple[str, ...], whole: str) -> None:
    """Replace separate layers, of which q_name is the first, by our joint one. Its output is q, k and v in
    this order, so its rows are those of the parts, stacked. If a part is missing, no joint layer is made, and
    check_weights reports that."""
    weights = [state.pop(q_name.replace(".q.", f".{part}."), None) for part in parts]
    if all(weight is not None for weight in weights):
        state[q_name.replace(".q.", f".{whole}.")] = torch.cat(weights)


def separate(state: dict[str, Tensor], name: str, whole: str, parts: tuple[str, ...],
             sizes: int | list[int]) -> None:
    """The inverse of `join`: replace a joint layer by the layers that it consists of, in the order of its
    rows. sizes: rows of each part, or of all."""
    for part, rows in zip(parts, state.pop(name).split(sizes), strict=True):
        state[name.replace(f".{whole}.", f".{part}.")] = rows


def delay_time(weight: Tensor, by: float) -> Tensor:
    """The first layer of a time embedding, (D, F), for a program that gives it the sinusoids of time - by.

    cos((u + by) f) and sin((u + by) f) are a rotation of cos(u f) and sin(u f), so the rotation becomes a
    part of the weights, and the network is the same one, exactly."""
    cosines, sines = weight.double().chunk(2, dim=1)                       # the embedding begins with cosines
    half = cosines.shape[1]
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float64) / half)
    cos, sin = (by * frequencies).cos(), (by * frequencies).sin()
    return torch.cat([cosines * cos + sines * sin, sines * cos - cosines * sin], dim=1).to(weight.dtype)


# diffusers' DiTTransformer2DModel. Our names are those of the original DiT and SiT.
DIT_NAMES = (
    (r"^pos_embed\.proj\.", "x_embedder.proj."),
    (r"^transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
    (r"^transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
    (r"^transformer_blocks\.0\.norm1\.emb\.class_embedder\.", "y_embedder."),
    (r"^transformer_blocks\.(\d+)\.norm1\.linear\.", r"blocks.\1.adaLN_modulation.1."),
    (r"^transformer_blocks\.(\d+)\.attn1\.to_out\.0\.", r"blocks.\1.attn.proj."),
    (r"^transformer_blocks\.(\d+)\.attn1\.to_(q|k|v)\.", r"blocks.\1.attn.\2."),      # joined below
    (r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.", r"blocks.\1.mlp.fc1."),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.2\.", r"blocks.\1.mlp.fc2."),
    (r"^proj_out_1\.", "final_layer.adaLN_modulation.1."),
    (r"^proj_out_2\.", "final_layer.linear."),
)
DIT_NAMES_BACK = (
    (r"^x_embedder\.proj\.", "pos_embed.proj."),
    (r"^t_embedder\.mlp\.0\.", "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1."),
    (r"^t_embedder\.mlp\.2\.", "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2."),
    (r"^y_embedder\.", "transformer_blocks.0.norm1.emb.class_embedder."),
    (r"^blocks\.(\d+)\.adaLN_modulation\.1\.", r"transformer_blocks.\1.norm1.linear."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"transformer_blocks.\1.attn1.to_out.0."),
    (r"^blocks\.(\d+)\.attn\.(q|k|v)\.", r"transformer_blocks.\1.attn1.to_\2."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", r"transformer_blocks.\1.ff.net.0.proj."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"transformer_blocks.\1.ff.net.2."),
    (r"^final_layer\.adaLN_modulation\.1\.", "proj_out_1."),
    (r"^final_layer\.linear\.", "proj_out_2."),
)
DIT_CLASSES = 1000       # diffusers' DiTPipeline takes class 1000 as the null class, whatever the network


def dit_weights(state: dict[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """The state of a DiT of this config from a published one, by the original names or diffusers'."""
    renamed: dict[str, Tensor] = {}
    for name, weight in state.items():
        if name == "pos_embed":
            continue                   # the fixed table that `sincos_positions` computes
        if re.match(r"transformer_blocks\.[1-9]\d*\.norm1\.emb\.", name):
            continue                   # diffusers keeps a copy of the embedders in every block
        renamed[rename(name, DIT_NAMES)] = weight
    for name in list(renamed):
        if ".attn.q." in name:
            join(renamed, name, ("q", "k", "v"), "qkv")
    if config.time_scale < 0:
        # SiT predicts the velocity of its own time, from noise to data. Negating the last layer makes it the
        # velocity of ours, dx/dt with t = 1 at noise.
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            if name in renamed:
                renamed[name] = -renamed[name]
    return renamed


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

    renamed = {rename(name, DIT_NAMES_BACK): weight for name, weight in state.items()}
    first = "transformer_blocks.0."
    for name in [name for name in renamed if name.startswith(f"{first}norm1.emb.")]:
        for i in range(1, config.depth):   # diffusers keeps a copy of the embedders in every block
            renamed[name.replace(first, f"transformer_blocks.{i}.")] = renamed[name]
    return renamed


# diffusers' SD3Transformer2DModel and FluxTransformer2DModel. Each row applies to the result of those above.
MMDIT_NAMES = (
    (r"^(pos_embed\.proj|x_embedder)\.", "x_embedder.proj."),
    (r"^time_text_embed\.timestep_embedder\.", "t_embedder.mlp."),
    (r"^time_text_embed\.guidance_embedder\.", "guidance_embedder.mlp."),
    (r"^time_text_embed\.text_embedder\.", "y_embedder.mlp."),
    (r"\.mlp\.linear_1\.", ".mlp.0."),
    (r"\.mlp\.linear_2\.", ".mlp.2."),
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
    (r"^proj_out\.", "final_layer.linear."),
    (r"^single_transformer_(blocks\.\d+)\.norm\.linear\.", r"single_\1.adaLN_modulation.1."),
    (r"^single_transformer_(blocks\.\d+)\.attn\.to_(q|k|v)\.", r"single_\1.\2."),         # joined below
    (r"^single_transformer_(blocks\.\d+)\.proj_mlp\.", r"single_\1.mlp."),                # joined below
    (r"^single_transformer_(blocks\.\d+)\.proj_out\.", r"single_\1.linear2."),
    (r"^single_transformer_(blocks\.\d+)\.attn\.norm_(q|k)\.weight$", r"single_\1.\2_norm"),
    (r"^transformer_", "joint_"),
    (r"\.norm1\.linear\.", ".x_block.adaLN_modulation.1."),
    (r"\.norm1_context\.linear\.", ".context_block.adaLN_modulation.1."),
    (r"\.attn(2?)\.to_(q|k|v)\.", r".x_block.attn\1.\2."),                                # joined below
    (r"\.attn\.add_(q|k|v)_proj\.", r".context_block.attn.\1."),                          # joined below
    (r"\.attn(2?)\.to_out\.0\.", r".x_block.attn\1.proj."),
    (r"\.attn\.to_add_out\.", ".context_block.attn.proj."),
    (r"\.attn(2?)\.norm_(q|k)\.weight$", r".x_block.attn\1.\2_norm"),
    (r"\.attn\.norm_added_(q|k)\.weight$", r".context_block.attn.\1_norm"),
    (r"\.ff\.net\.0\.proj\.", ".x_block.mlp.fc1."),
    (r"\.ff\.net\.2\.", ".x_block.mlp.fc2."),
    (r"\.ff_context\.net\.0\.proj\.", ".context_block.mlp.fc1."),
    (r"\.ff_context\.net\.2\.", ".context_block.mlp.fc2."),
)
MMDIT_NAMES_BACK = (     # FLUX's x_embedder is a linear layer: see mmdit_to_diffusers
    (r"^x_embedder\.proj\.", "pos_embed.proj."),
    (r"^t_embedder\.mlp\.", "time_text_embed.timestep_embedder."),
    (r"^guidance_embedder\.mlp\.", "time_text_embed.guidance_embedder."),
    (r"^y_embedder\.mlp\.", "time_text_embed.text_embedder."),
    (r"_embedder\.0\.", "_embedder.linear_1."),
    (r"_embedder\.2\.", "_embedder.linear_2."),
    (r"^final_layer\.adaLN_modulation\.1\.", "norm_out.linear."),
    (r"^final_layer\.linear\.", "proj_out."),
    (r"^single_(blocks\.\d+)\.adaLN_modulation\.1\.", r"single_transformer_\1.norm.linear."),
    (r"^single_(blocks\.\d+)\.(q|k|v)\.", r"single_transformer_\1.attn.to_\2."),
    (r"^single_(blocks\.\d+)\.mlp\.", r"single_transformer_\1.proj_mlp."),
    (r"^single_(blocks\.\d+)\.linear2\.", r"single_transformer_\1.proj_out."),
    (r"^single_(blocks\.\d+)\.(q|k)_norm$", r"single_transformer_\1.attn.norm_\2.weight"),
    (r"^joint_", "transformer_"),
    (r"\.x_block\.adaLN_modulation\.1\.", ".norm1.linear."),
    (r"\.context_block\.adaLN_modulation\.1\.", ".norm1_context.linear."),
    (r"\.x_block\.attn(2?)\.(q|k|v)\.", r".attn\1.to_\2."),
    (r"\.context_block\.attn\.(q|k|v)\.", r".attn.add_\1_proj."),
    (r"\.x_block\.attn(2?)\.proj\.", r".attn\1.to_out.0."),
    (r"\.context_block\.attn\.proj\.", ".attn.to_add_out."),
    (r"\.x_block\.attn(2?)\.(q|k)_norm$", r".attn\1.norm_\2.weight"),
    (r"\.context_block\.attn\.(q|k)_norm$", r".attn.norm_added_\1.weight"),
    (r"\.x_block\.mlp\.fc1\.", ".ff.net.0.proj."),
    (r"\.x_block\.mlp\.fc2\.", ".ff.net.2."),
    (r"\.context_block\.mlp\.fc1\.", ".ff_context.net.0.proj."),
    (r"\.context_block\.mlp\.fc2\.", ".ff_context.net.2."),
)


def mmdit_layers_without_gate(config: MMDiTConfig) -> list[str]:
    """Our modulations without a gate. There, diffusers has (scale, shift) and we have (shift, scale): in the
    final layer and, unless single blocks follow, in the context stream of the last joint block."""
    layers = ["final_layer.adaLN_modulation.1"]
    if config.single_depth == 0:
        layers.append(f"joint_blocks.{config.depth - 1}.context_block.adaLN_modulation.1")
    return layers


def mmdit_weights(state: dict[str, Tensor], config: MMDiTConfig) -> dict[str, Tensor]:
    """The state of an MMDiT of this config from that of diffusers' SD3Transformer2DModel or
    FluxTransformer2DModel. Three layouts differ from ours beside the names: separate q, k, v; modulations
    without a gate; and, in FLUX, the order of the values in a patch."""
    renamed = {rename(name, MMDIT_NAMES): weight for name, weight in state.items()
               if name != "pos_embed.pos_embed"}           # the fixed table that `sincos_positions` computes
    for name in list(renamed):
        if not re.search(r"\.q\.(weight|bias)$", name):
            continue
        if name.startswith("single_"):                     # its joint layer includes the MLP's first layer
            join(renamed, name, ("q", "k", "v", "mlp"), "linear1")
        else:
            join(renamed, name, ("q", "k", "v"), "qkv")

    for layer in mmdit_layers_without_gate(config):
        for kind in ("weight", "bias"):
            scale, shift = renamed[f"{layer}.{kind}"].chunk(2)
            renamed[f"{layer}.{kind}"] = torch.cat([shift, scale])

    # FLUX receives the latent already cut into patches, as vectors in the order (c, p, q). The columns of its
    # linear embedding are therefore in the order of our convolution's weights and only need their shape. The
    # rows of its final layer are reordered, as ours writes (p, q, c). Stable Diffusion 3 is as ours in both.
    p, q = config.patch
    embedding = renamed["x_embedder.proj.weight"]
    if embedding.ndim == 2:
        renamed["x_embedder.proj.weight"] = embedding.unflatten(1, (config.channels, p, q))
    if config.single_depth:
        channels = config.out_channels or config.channels
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            rows = renamed[name].unflatten(0, (channels, p * q))               # (c, p * q, ...)
            renamed[name] = rows.transpose(0, 1).flatten(0, 1)                 # (p * q * c, ...)
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
        renamed = {rename(name, MMDIT_NAMES_BACK): weight for name, weight in state.items()}
        return renamed | {"pos_embed.pos_embed": table[None]}
    # FLUX embeds vectors (c, p, q), and writes (c, p, q) where we write (p, q, c): see `mmdit_weights`.
    p, q = config.patch
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = state[name].unflatten(0, (p * q, -1))                           # (p * q, c, ...)
        state[name] = rows.transpose(0, 1).flatten(0, 1)                       # (c * p * q, ...)
    renamed = {rename(name, MMDIT_NAMES_BACK): weight for name, weight in state.items()}
    renamed["x_embedder.weight"] = renamed.pop("pos_embed.proj.weight").flatten(1)
    renamed["x_embedder.bias"] = renamed.pop("pos_embed.proj.bias")
    return renamed


# UNet2DConditionModel. Our names are those of diffusers, except for the embedding of the pooled text vector,
# which diffusers calls a class embedding of the type "projection".
UNET_NAMES = ((r"^class_embedding\.(linear_[12])\.", r"add_embedding.\1."),)
UNET_NAMES_BACK = ((r"^add_embedding\.(linear_[12])\.", r"class_embedding.\1."),)


def unet_to_diffusers(state: dict[str, Tensor], config: UNetConfig, delay: float = 0.0) -> dict[str, Tensor]:
    """The state of diffusers' UNet2DConditionModel from that of a U-Net. delay: by how much our time
    embedding's input exceeds diffusers' timestep; see `delay_time`."""
    renamed = {rename(name, UNET_NAMES_BACK): weight for name, weight in state.items()}
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


# AutoencoderKL. Our names are those of diffusers since 0.15; FLUX's are those of the original, CompVis.
VAE_NAMES = (
    (r"\.query\.", ".to_q."),                                                # diffusers before 0.15
    (r"\.key\.", ".to_k."),
    (r"\.value\.", ".to_v."),
    (r"\.proj_attn\.", ".to_out.0."),
    (r"\.(down|up)\.(\d+)\.block\.(\d+)\.", r".\1_blocks.\2.resnets.\3."),   # CompVis, from here on
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.(q|k|v)\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
)


def vae_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a VAE, without the statistics of its latents, in float32 at least, from a published one
    with the names of diffusers (old or new), CompVis or FLUX, also from a whole Stable Diffusion file."""
    for prefix in ("first_stage_model.", "vae."):          # from a whole file, take only this part
        if any(name.startswith(prefix) for name in state):
            state = {name[len(prefix):]: weight for name, weight in state.items() if name.startswith(prefix)}
    is_compvis = any(".up.0.block." in name for name in state)
    renamed: dict[str, Tensor] = {}
    for name, weight in state.items():
        if name.startswith("loss."):                       # the discriminator that trained it
            continue
        name = rename(name, VAE_NAMES)
        if ".attentions." in name and weight.ndim == 4:    # 1x1 convolutions, which are linear layers here
            weight = weight[:, :, 0, 0]
        # half-precision files are common, but decoding in half precision is visible
        renamed[name] = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if is_compvis:                                         # numbers the decoder's levels from fine to coarse
        last = count_levels(renamed) - 1
        renamed = {re.sub(r"(?<=up_blocks\.)\d+", lambda level: str(last - int(level[0])), name): weight
                   for name, weight in renamed.items()}
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


def count_levels(state: dict[str, Tensor]) -> int:
    """The number of resolutions of a VAE's encoder."""
    levels = 0
    while f"encoder.down_blocks.{levels}.resnets.0.conv1.weight" in state:
        levels += 1
    return levels


def vae_from_weights(state: dict[str, Tensor], scale: float, shift: float = 0.0, groups: int = 32) -> VAE:
    """A VAE, in evaluation mode, from a published state as vae_weights takes it. Its widths are read from the
    shapes of the weights.

    scale and shift: what the model was published with, x0 = (z - shift) * scale (SD 1 and 2: 0.18215 and 0;
    XL: 0.13025 and 0; SD 3: 1.5305 and 0.0609; FLUX: 0.3611 and 0.1159). groups: the number of groups in its
    norms, which the shapes do not show. Raises ValueError for weights that are not an AutoencoderKL's."""
    state = vae_weights(state)
    levels = count_levels(state)
    if levels == 0 or "encoder.conv_in.weight" not in state or "decoder.conv_in.weight" not in state:
        raise ValueError("not the weights of an AutoencoderKL: no encoder and decoder of known names in it")
    layers = 0
    while f"encoder.down_blocks.0.resnets.{layers}.conv1.weight" in state:
        layers += 1
    config = VAEConfig(
        image_channels=state["encoder.conv_in.weight"].shape[1],
        latent_channels=state["decoder.conv_in.weight"].shape[1],
        widths=tuple(state[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"].shape[0]
                     for level in range(levels)),
        layers=layers, groups=groups,
        attention="encoder.mid_block.attentions.0.to_q.weight" in state,
        quant_conv="quant_conv.weight" in state)
    state["latent_mean"] = torch.full((config.latent_channels,), shift)
    state["latent_std"] = torch.full((config.latent_channels,), 1 / scale)
    with torch.device("meta"):         # costs no memory: the state's tensors become its parameters
        model = VAE(config)
    check_weights(model, state, f"AutoencoderKL of widths {config.widths}")
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


# ---- what the programs ask for

def read_network(name: str, file: str | Path) -> dict[str, Tensor]:
    """The state of the DiT MODELS[name] from its file. Raises ValueError for a file of another picture size,
    which has the same weights and shapes but for the table of positions."""
    state = read_weights(file)
    config = DiTConfig(**MODELS[name].config)
    tokens = (MODELS[name].side // 8 // config.patch[0]) ** 2
    table = state.get("pos_embed")     # (1, tokens, width), in the original's files alone
    if table is not None and table.shape[1:2] != (tokens,):
        raise ValueError(f"{file}: its table of positions, {tuple(table.shape)}, is not for the {tokens} "
                         f"patches of {name}; give the name that belongs to the file")
    return dit_weights(state, config)


def load_vae(path: str | Path) -> VAE:
    """A published VAE: a diffusers folder (config.json beside the weights) or a file of weights alone. Such a
    file does not hold the scale of its latents: for 4 channels, that of Stable Diffusion 1 and 2 is assumed
    (give XL's VAE as a folder). Raises ValueError if it is neither."""
    path = Path(path)
    if read_metadata(path) is not None:                    # of export.py: it holds its scale
        return load_exported_vae(path)
    config = {}
    file = path
    if (path / "config.json").is_file():
        config = read_config(path / "config.json")
        file = path / "diffusion_pytorch_model.safetensors"
        if not file.is_file() and file.with_suffix(".bin").is_file():
            file = file.with_suffix(".bin")
    state = read_weights(file)
    scale = config.get("scaling_factor")
    if not scale:
        channels = 4                   # a file without a decoder is refused by vae_from_weights, below
        for name, weight in state.items():
            if name.endswith("decoder.conv_in.weight"):
                channels = weight.shape[1]
        if channels != 4:
            raise ValueError(f"{path}: the scale of latents of {channels} channels is not in this file; "
                             "give the diffusers folder, whose config.json has it")
        scale = SCALE
    shift = config.get("shift_factor") or 0.0              # null in the config.json of some models
    groups = config.get("norm_num_groups") or 32
    try:
        return vae_from_weights(state, scale, shift, groups)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def load_exported_vae(file: Path) -> VAE:
    """The VAE in a file of export.py, in evaluation mode. Raises ValueError for one of another version."""
    exported = read_export(file)
    packed = exported["vae"] or {"config": exported["config"], "state": exported["ema"]}
    try:
        autoencoder = VAE(VAEConfig(**packed["config"]))
    except TypeError as error:
        raise ValueError(f"{file}: {error}; this file is from another version") from None
    return load_weights(autoencoder, packed["state"], str(file)).eval().requires_grad_(False)


def read_config(file: Path) -> dict:
    try:
        config = json.loads(file.read_text())
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: damaged; download it again")
    return config


def check_vae(name: str, autoencoder: VAE, what: str) -> None:
    """Raise ValueError where the latents of a VAE, read from `what`, are not those that MODELS[name] was
    trained in, as it would then draw noise or wrong colours."""
    channels = autoencoder.config.latent_channels
    scale = 1 / autoencoder.latent_std                     # (C,)
    same_shape = channels == 4 and autoencoder.factor == 8
    same_scale = not autoencoder.latent_mean.any() and ((scale - SCALE).abs() < 1e-4).all()
    if not (same_shape and same_scale):
        raise ValueError(f"--vae {what}: {name} was trained in latents of 4 channels at 1/8, scaled by "
                         f"{SCALE} (Stable Diffusion 1 and 2); this one has {channels} at "
                         f"1/{autoencoder.factor}, scaled by {scale.mean():.5f}")


def demo() -> None:
    """Print the published models and their parameters."""
    print("name            path   picture   latent   patches   parameters")
    for name, row in MODELS.items():
        with torch.device("meta"):     # shapes without memory
            model = DiT(DiTConfig(**row.config))
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        latent = row.side // 8
        patches = (latent // model.config.patch[0]) ** 2
        path = row.objective["name"]
        print(f"{name:15s} {path:4s} {row.side:9d} {latent:8d} {patches:9d} {millions:10.1f} M")


if __name__ == "__main__":
    demo()
