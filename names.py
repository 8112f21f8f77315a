"""How published states name and arrange the weights of our networks: diffusers, and the authors' own files.

    python names.py                      # prints some names of each file, and ours

Our names are those of the original DiT and SiT, of the original Stable Diffusion 3 where it has no FLUX, and
diffusers' of the U-Net and the VAE. Where another program arranges a weight differently (q, k and v joined;
scale before shift; the order of the values in a patch), the rearranged weight makes the same network,
exactly. A table has rows (published, ours), applied to a name one after the other, wherever they match or,
with ^, at its beginning: # is any number, @ is q, k or v. export.py takes the way back.
From a whole file of Stable Diffusion, `part` takes what belongs to one network; text encoders get the names
of the package transformers.
"""

from __future__ import annotations

import functools
import itertools
import re

import torch
from torch import Tensor

from dit import DiTConfig
from mmdit import MMDiTConfig
from stable_audio import StableAudioConfig
from unet import UNetConfig


# ---- parts of a file, names, layouts

NETWORK = "model.diffusion_model."
SOUND_NETWORK = "model.model."                             # Stable Audio's; what embeds its seconds is apart
CONDITIONERS = "conditioner.conditioners."
Table = tuple[tuple[str, str], ...]
AUTOENCODERS = ("first_stage_model.", "vae.")
SOUND_AUTOENCODER = "pretransform.model."


def part(state: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """What stands behind the first of these prefixes that the state has; empty if it has none of them."""
    for prefix in prefixes:
        found = {name[len(prefix):]: weight for name, weight in state.items() if name.startswith(prefix)}
        if found:
            return found
    return {}


def network_part(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The network of a whole file, by its averaged weights where the file has them; any other state as it
    is. CompVis names the average of a.b.c as model_ema.abc."""
    found = part(state, NETWORK)
    if not found:
        found = part(state, SOUND_NETWORK)
        return found | part(state, CONDITIONERS) if found else state
    return {name: state.get(f"model_ema.diffusion_model{name.replace('.', '')}", weight)
            for name, weight in found.items()}


@functools.cache
def compiled(old: str, new: str, anchored: bool) -> tuple[re.Pattern, str]:
    """A row of a table as a regular expression and its replacement."""
    pattern = re.escape(old).replace("\\#", r"(\d+)").replace("@", "(q|k|v)")
    counter = itertools.count(1)
    return (re.compile(f"^{pattern}" if anchored else pattern),
            re.sub("[#@]", lambda _: rf"\g<{next(counter)}>", new))


def rename(name: str, table: Table, back: bool = False) -> str:
    """Our name for a published one, or (back) the way back: the rows in reverse, each from right to left."""
    for theirs, ours in reversed(table) if back else table:
        anchored = theirs.startswith("^")
        pair = [theirs.removeprefix("^"), ours]
        pattern, replacement = compiled(*(reversed(pair) if back else pair), anchored)
        name = pattern.sub(replacement, name)
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


# diffusers' DiTTransformer2DModel. Our names are those of the original DiT and SiT.
DIT_NAMES = (
    ("^pos_embed.proj.", "x_embedder.proj."),
    ("^transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.", "t_embedder.mlp.0."),
    ("^transformer_blocks.0.norm1.emb.timestep_embedder.linear_2.", "t_embedder.mlp.2."),
    ("^transformer_blocks.0.norm1.emb.class_embedder.", "y_embedder."),
    ("^transformer_blocks.#.norm1.linear.", "blocks.#.adaLN_modulation.1."),
    ("^transformer_blocks.#.attn1.to_out.0.", "blocks.#.attn.proj."),
    ("^transformer_blocks.#.attn1.to_@.", "blocks.#.attn.@."),                 # joined below
    ("^transformer_blocks.#.ff.net.0.proj.", "blocks.#.mlp.fc1."),
    ("^transformer_blocks.#.ff.net.2.", "blocks.#.mlp.fc2."),
    ("^proj_out_1.", "final_layer.adaLN_modulation.1."),
    ("^proj_out_2.", "final_layer.linear."),
)
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
        single_to_double_channels(renamed, config)
        # SiT predicts the velocity of its own time, from noise to data. Negating the last layer makes it the
        # velocity of ours, dx/dt with t = 1 at noise.
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            if name in renamed:
                renamed[name] = -renamed[name]
    return renamed


def single_to_double_channels(state: dict[str, Tensor], config: DiTConfig) -> None:
    """SiT's authors trained their first networks with twice the channels, of which the second half has no
    meaning, and build later ones (of 512 x 512) without it. Such a file gets zeros in their place, which
    draw the same pictures."""
    patch = config.patch[0] * config.patch[1]
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        weight = state.get(name)
        if config.learn_sigma and weight is not None and len(weight) == patch * config.channels:
            rows = weight.unflatten(0, (patch, config.channels))               # (p * q, c, ...)
            state[name] = torch.cat([rows, torch.zeros_like(rows)], dim=1).flatten(0, 1)


# diffusers' SD3Transformer2DModel and FluxTransformer2DModel.
MMDIT_NAMES = (
    ("^pos_embed.proj.", "x_embedder.proj."),              # of FLUX, x_embedder: see the functions below
    ("^time_text_embed.timestep_embedder.", "t_embedder.mlp."),
    ("^time_text_embed.guidance_embedder.", "guidance_embedder.mlp."),
    ("^time_text_embed.text_embedder.", "y_embedder.mlp."),
    (".mlp.linear_1.", ".mlp.0."),
    (".mlp.linear_2.", ".mlp.2."),
    ("^norm_out.linear.", "final_layer.adaLN_modulation.1."),
    ("^proj_out.", "final_layer.linear."),
    ("^single_transformer_blocks.#.norm.linear.", "single_blocks.#.adaLN_modulation.1."),
    ("^single_transformer_blocks.#.attn.to_@.", "single_blocks.#.@."),         # joined below
    ("^single_transformer_blocks.#.proj_mlp.", "single_blocks.#.mlp."),        # joined below
    ("^single_transformer_blocks.#.proj_out.", "single_blocks.#.linear2."),
    ("^single_transformer_blocks.#.attn.norm_@.weight", "single_blocks.#.@_norm"),
    ("^transformer_", "joint_"),
    (".norm1.linear.", ".x_block.adaLN_modulation.1."),
    (".norm1_context.linear.", ".context_block.adaLN_modulation.1."),
    (".attn.to_@.", ".x_block.attn.@."),                                       # joined below
    (".attn2.to_@.", ".x_block.attn2.@."),                                     # joined below
    (".attn.add_@_proj.", ".context_block.attn.@."),                           # joined below
    (".attn.to_out.0.", ".x_block.attn.proj."),
    (".attn2.to_out.0.", ".x_block.attn2.proj."),
    (".attn.to_add_out.", ".context_block.attn.proj."),
    (".attn.norm_@.weight", ".x_block.attn.@_norm"),
    (".attn2.norm_@.weight", ".x_block.attn2.@_norm"),
    (".attn.norm_added_@.weight", ".context_block.attn.@_norm"),
    (".ff.net.0.proj.", ".x_block.mlp.fc1."),
    (".ff.net.2.", ".x_block.mlp.fc2."),
    (".ff_context.net.0.proj.", ".context_block.mlp.fc1."),
    (".ff_context.net.2.", ".context_block.mlp.fc2."),
)
# The originals: Stable Diffusion 3, whose names are ours but for the QK-norms, and FLUX.
MMDIT_ORIGINAL = (
    (".ln_@.weight", ".@_norm"),
    ("^img_in.", "x_embedder.proj."),
    ("^txt_in.", "context_embedder."),
    ("^time_in.", "t_embedder.mlp."),
    ("^guidance_in.", "guidance_embedder.mlp."),
    ("^vector_in.", "y_embedder.mlp."),
    (".in_layer.", ".0."),
    (".out_layer.", ".2."),
    ("^double_blocks.#.img_", "joint_blocks.#.x_block."),
    ("^double_blocks.#.txt_", "joint_blocks.#.context_block."),
    (".mod.lin.", ".adaLN_modulation.1."),
    (".modulation.lin.", ".adaLN_modulation.1."),
    ("_block.mlp.0.", "_block.mlp.fc1."),
    ("_block.mlp.2.", "_block.mlp.fc2."),
    (".norm.query_norm.scale", ".q_norm"),
    (".norm.key_norm.scale", ".k_norm"),
)


def mmdit_layers_without_gate(config: MMDiTConfig) -> list[str]:
    """Our modulations without a gate. There, diffusers has (scale, shift) and we have (shift, scale): in the
    final layer and, unless single blocks follow, in the context stream of the last joint block."""
    layers = ["final_layer.adaLN_modulation.1"]
    if config.single_depth == 0:
        layers.append(f"joint_blocks.{config.depth - 1}.context_block.adaLN_modulation.1")
    return layers


def axis_table(table: Tensor, largest: int) -> Tensor:
    """The positions along one axis, (largest, D / 2), of Stable Diffusion 3's table (1, largest^2, D), in
    which the first half of the channels depends on the column and the second half, in the same way, on the
    row. Raises ValueError for another table."""
    if table.shape[:2] != (1, largest**2) or table.shape[2] % 2:
        return table                       # which check_weights then refuses
    grid = table.view(largest, largest, 2, -1)
    columns = grid[0, :, 0]
    if not table.is_meta:
        exact = columns.float()            # up to the rounding of programs that compute them in other orders
        same = ((grid[:, :, 0] - exact).abs().max() < 0.02
                and (grid[:, :, 1] - exact[:, None]).abs().max() < 0.02)
        if not same:
            raise ValueError("its table of positions (pos_embed) is not one of rows and columns alone")
    return columns.clone()


def mmdit_weights(state: dict[str, Tensor], config: MMDiTConfig) -> dict[str, Tensor]:
    """The state of an MMDiT of this config from that of the original Stable Diffusion 3 or FLUX, or of
    diffusers' SD3Transformer2DModel or FluxTransformer2DModel. Beside the names, diffusers' differ from ours
    in separate q, k, v and in modulations without a gate, and both FLUX in the order of the values in a
    patch."""
    is_diffusers = any(re.match(r"(single_)?transformer_blocks\.", name) for name in state)
    renamed: dict[str, Tensor] = {}
    for name, weight in state.items():
        if is_diffusers:                   # a linear layer in FLUX, a convolution in Stable Diffusion 3
            name = re.sub(r"^x_embedder\.", "pos_embed.proj.", name)
        if name not in ("pos_embed", "pos_embed.pos_embed"):
            renamed[rename(name, MMDIT_NAMES if is_diffusers else MMDIT_ORIGINAL)] = weight
        elif config.position_table:        # else it is what `sincos_positions` computes
            renamed["position_table"] = axis_table(weight, config.sincos[1])
    for name in list(renamed):
        if not re.search(r"\.q\.(weight|bias)$", name):
            continue
        if name.startswith("single_"):                     # its joint layer includes the MLP's first layer
            join(renamed, name, ("q", "k", "v", "mlp"), "linear1")
        else:
            join(renamed, name, ("q", "k", "v"), "qkv")

    for layer in mmdit_layers_without_gate(config):
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if is_diffusers and name in renamed:
                scale, shift = renamed[name].chunk(2)
                renamed[name] = torch.cat([shift, scale])

    # FLUX receives the latent already cut into patches, as vectors in the order (c, p, q). The columns of its
    # linear embedding are therefore in the order of our convolution's weights and only need their shape. The
    # rows of its final layer are reordered, as ours writes (p, q, c). Stable Diffusion 3 is as ours in both.
    # Weights of another shape stay as they are: check_weights names them.
    p, q = config.patch
    embedding = renamed.get("x_embedder.proj.weight")
    if embedding is not None and embedding.shape[1:] == (config.channels * p * q,):
        renamed["x_embedder.proj.weight"] = embedding.unflatten(1, (config.channels, p, q))
    channels = config.out_channels or config.channels
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        if config.single_depth and name in renamed and len(renamed[name]) == channels * p * q:
            rows = renamed[name].unflatten(0, (channels, p * q))               # (c, p * q, ...)
            renamed[name] = rows.transpose(0, 1).flatten(0, 1)                 # (p * q * c, ...)
    return renamed


# ---- Stable Audio

# diffusers' StableAudioDiTModel and StableAudioProjectionModel, which embeds the seconds.
STABLE_AUDIO_NAMES = (
    ("^time_proj.weight", "t_embedder.frequencies"),
    ("^timestep_proj.", "t_embedder.mlp."),
    ("^global_proj.", "y_embedder."),
    ("^cross_attention_proj.", "context_embedder."),
    ("^transformer_blocks.", "blocks."),
    (".attn1.to_out.0.", ".attn.proj."),
    (".attn1.to_@.", ".attn.@."),                                              # joined below
    (".attn2.to_out.0.", ".cross.proj."),
    (".attn2.to_@.", ".cross.@."),                                             # k and v joined below
    (".ff.net.0.proj.", ".mlp.fc1."),
    (".ff.net.2.", ".mlp.fc2."),
    ("^start_number_conditioner.", "seconds_start."),
    ("^end_number_conditioner.", "seconds_total."),
    (".time_positional_embedding.0.weights", ".frequencies"),
    (".time_positional_embedding.1.", ".proj."),
)
# The original, stable-audio-tools.
STABLE_AUDIO_ORIGINAL = (
    ("^timestep_features.weight", "t_embedder.frequencies"),
    ("^to_timestep_embed.", "t_embedder.mlp."),
    ("^to_global_embed.", "y_embedder."),
    ("^to_cond_embed.", "context_embedder."),
    ("^transformer.project_", "proj_"),
    ("^transformer.layers.", "blocks."),
    (".pre_norm.", ".norm1."),
    (".cross_attend_norm.", ".norm2."),
    (".ff_norm.", ".norm3."),
    (".gamma", ".weight"),
    (".beta", ".bias"),
    (".self_attn.to_out.", ".attn.proj."),
    (".self_attn.to_", ".attn."),
    (".cross_attn.to_out.", ".cross.proj."),
    (".cross_attn.to_", ".cross."),
    (".ff.ff.0.proj.", ".mlp.fc1."),
    (".ff.ff.2.", ".mlp.fc2."),
    (".embedder.embedding.0.weights", ".frequencies"),
    (".embedder.embedding.1.", ".proj."),
)


def stable_audio_weights(state: dict[str, Tensor], config: StableAudioConfig) -> dict[str, Tensor]:
    """The state of a StableAudio of this config from that of the original or of diffusers. Both rotate the
    first half of a head's channels, of which the first half makes pairs with the second; ours are neighbours.
    Both have the values of the MLP before their gates."""
    is_diffusers = any(name.startswith("transformer_blocks.") for name in state)
    renamed = {rename(name, STABLE_AUDIO_NAMES if is_diffusers else STABLE_AUDIO_ORIGINAL): weight
               for name, weight in state.items() if name != "transformer.rotary_pos_emb.inv_freq"}
    for name in list(renamed):
        if ".attn.q." in name:
            join(renamed, name, ("q", "k", "v"), "qkv")
        elif ".cross.q." in name and is_diffusers:
            join(renamed, name, ("k", "v"), "kv")
    frequencies = renamed.get("t_embedder.frequencies")
    if frequencies is not None and frequencies.ndim == 2:  # a matrix with one column
        renamed["t_embedder.frequencies"] = frequencies[:, 0]

    # Weights of another shape stay as they are: check_weights names them.
    for name, weight in renamed.items():
        if name.endswith(".attn.qkv.weight") and weight.shape[0] == 3 * config.width:
            heads = weight.unflatten(0, (3, config.heads, -1))                 # (3, heads, head_dim, D)
            half = heads.shape[2] // 2
            pairs = heads[:2, :, :half].unflatten(2, (2, -1)).transpose(2, 3).flatten(2, 3)
            rotated = torch.cat([pairs, heads[:2, :, half:]], dim=2)           # of q and k
            renamed[name] = torch.cat([rotated, heads[2:]]).flatten(0, 2)
        elif ".mlp.fc1." in name:
            renamed[name] = torch.cat(weight.chunk(2)[::-1])
    return renamed


# ---- U-Net

# UNet2DConditionModel. Our names are those of diffusers, except for the embedding of the pooled text vector,
# which diffusers calls a class embedding of the type "projection".
UNET_NAMES = (
    ("^class_embedding.linear_1.", "add_embedding.linear_1."),
    ("^class_embedding.linear_2.", "add_embedding.linear_2."),
)
# The original, of CompVis and Stability. Its numbered blocks are in `unet_original_name`.
UNET_ORIGINAL = (
    ("^time_embed.0.", "time_embedding.linear_1."),
    ("^time_embed.2.", "time_embedding.linear_2."),
    ("^label_emb.0.0.", "add_embedding.linear_1."),
    ("^label_emb.0.2.", "add_embedding.linear_2."),
    ("^input_blocks.0.0.", "conv_in."),
    ("^middle_block.0.", "mid_block.resnets.0."),
    ("^middle_block.1.", "mid_block.attentions.0."),
    ("^middle_block.2.", "mid_block.resnets.1."),
    ("^out.0.", "conv_norm_out."),
    ("^out.2.", "conv_out."),
    (".in_layers.0.", ".norm1."),
    (".in_layers.2.", ".conv1."),
    (".emb_layers.1.", ".time_emb_proj."),
    (".out_layers.0.", ".norm2."),
    (".out_layers.3.", ".conv2."),
    (".skip_connection.", ".conv_shortcut."),
)


def unet_original_name(name: str, layers: int) -> str:
    """Our name for one of the original, which numbers the blocks of all levels in one sequence: going down,
    `layers` blocks and a downsampler a level, after the first convolution; going up, layers + 1 blocks, the
    last with an upsampler. In a block, 0 is the ResNet block, 1 the transformer, and what follows samples."""
    name = rename(name, UNET_ORIGINAL)
    found = re.match(r"(input|output)_blocks\.(\d+)\.(\d)\.(op\.|conv\.)?", name)
    if not found:
        return name
    down = found[1] == "input"
    level, layer = divmod(int(found[2]) - down, layers + 1)
    if found[4]:
        place = "downsamplers.0.conv" if down else "upsamplers.0.conv"
    else:
        place = f"resnets.{layer}" if found[3] == "0" else f"attentions.{layer}"
    return f"{'down' if down else 'up'}_blocks.{level}.{place}.{name[found.end():]}"


def unet_weights(state: dict[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """The state of a UNet of this config from the original's or diffusers'."""
    if any(name.startswith("input_blocks.") for name in state):
        return {unet_original_name(name, config.layers): weight for name, weight in state.items()}
    return {rename(name, UNET_NAMES): weight for name, weight in state.items()}


# ---- VAE

# AutoencoderKL. Our names are those of diffusers since 0.15; FLUX's are those of the original, CompVis.
VAE_NAMES = (
    (".query.", ".to_q."),                                 # diffusers before 0.15
    (".key.", ".to_k."),
    (".value.", ".to_v."),
    (".proj_attn.", ".to_out.0."),
    (".down.#.block.#.", ".down_blocks.#.resnets.#."),     # CompVis, from here on
    (".up.#.block.#.", ".up_blocks.#.resnets.#."),
    (".down.#.attn.#.", ".down_blocks.#.attentions.#."),
    (".up.#.attn.#.", ".up_blocks.#.attentions.#."),
    (".down.#.downsample.", ".down_blocks.#.downsamplers.0."),
    (".up.#.upsample.", ".up_blocks.#.upsamplers.0."),
    (".nin_shortcut.", ".conv_shortcut."),
    (".mid.block_1.", ".mid_block.resnets.0."),
    (".mid.block_2.", ".mid_block.resnets.1."),
    (".mid.attn_1.", ".mid_block.attentions.0."),
    (".attentions.#.norm.", ".attentions.#.group_norm."),
    (".attentions.#.@.", ".attentions.#.to_@."),
    (".attentions.#.proj_out.", ".attentions.#.to_out.0."),
    ("^encoder.norm_out.", "encoder.conv_norm_out."),
    ("^decoder.norm_out.", "decoder.conv_norm_out."),
)


def vae_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a VAE, without the statistics of its latents, in float32 at least, from a published one
    with the names of diffusers (old or new), CompVis or FLUX, also from a whole Stable Diffusion file."""
    state = part(state, *AUTOENCODERS) or state
    is_compvis = any(".up.0.block." in name for name in state)
    renamed: dict[str, Tensor] = {}
    for name, weight in state.items():
        if name.startswith("loss."):                       # the discriminator that trained it
            continue
        name = rename(name, VAE_NAMES)
        if ".attentions." in name and weight.ndim == 4:    # 1x1 convolutions, which are linear layers here
            weight = weight[:, :, 0, 0]
        # half-precision files are common, but decoding in half precision is visible
        dtype = None
        if weight.is_floating_point():         # 8 bits promote to nothing
            dtype = torch.float32 if weight.dtype.itemsize == 1 else torch.promote_types(weight.dtype,
                                                                                         torch.float32)
        renamed[name] = weight.to(dtype or weight.dtype, copy=True)            # out of the mapped file
    if is_compvis:                                         # numbers the decoder's levels from fine to coarse
        last = count_levels(renamed) - 1
        renamed = {re.sub(r"(?<=up_blocks\.)\d+", lambda level: str(last - int(level[0])), name): weight
                   for name, weight in renamed.items()}
    return renamed


def audio_vae_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of an AudioVAE, without the statistics of its latents, in float32 at least, from that of
    diffusers' AutoencoderOobleck, whose names are ours, or of stable-audio-tools, also from a whole file of
    Stable Audio. The latter numbers the layers of each part, and those of each block."""
    state = part(state, SOUND_AUTOENCODER) or part(state, "vae.") or state
    numbers = [int(name.split(".")[2]) for name in state if re.match(r"encoder\.layers\.\d+\.", name)]
    last = max(numbers, default=0)

    def place(side: str, number: int, inner: list[str]) -> str:
        if number in (0, last - 1, last):
            return ".".join([{0: "conv1", last - 1: "snake1", last: "conv2"}[number], *inner])
        order = ["res_unit1", "res_unit2", "res_unit3", "snake1", "conv1"]
        if side == "decoder":
            order = ["snake1", "conv_t1", "res_unit1", "res_unit2", "res_unit3"]
        names = [f"block.{number - 1}", order[int(inner[1])]]              # inner: layers, number, ...
        if names[1].startswith("res_unit"):
            names.append(["snake1", "conv1", "snake2", "conv2"][int(inner[3])])
        return ".".join([*names, inner[-1]])

    renamed: dict[str, Tensor] = {}
    for name, weight in state.items():
        if numbers and re.match(r"(en|de)coder\.layers\.", name):
            side, _, number, *inner = name.split(".")
            name = f"{side}.{place(side, int(number), inner)}"
            if name.endswith((".alpha", ".beta")) and weight.ndim == 1:
                weight = weight[None, :, None]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        renamed[name] = weight.to(dtype, copy=True)        # out of the mapped file
    return renamed


def count_levels(state: dict[str, Tensor]) -> int:
    """The number of resolutions of a VAE's encoder."""
    levels = 0
    while f"encoder.down_blocks.{levels}.resnets.0.conv1.weight" in state:
        levels += 1
    return levels


# ---- text encoders in whole files

# Where each stands: in Stable Diffusion 1 and 2, XL, and 3 and 3.5; the newest last.
TEXT_PREFIXES = {
    "clip-l": ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.",
               "text_encoders.clip_l.transformer."),
    "openclip-h": ("cond_stage_model.model.",),
    "openclip-g": ("conditioner.embedders.1.model.", "text_encoders.clip_g.transformer."),
    "t5-xxl": ("text_encoders.t5xxl.transformer.",),
    "t5-base": (),                         # Stable Audio's file is without it
}
OPENCLIP_NAMES = (
    ("^positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("^token_embedding.", "text_model.embeddings.token_embedding."),
    ("^transformer.resblocks.", "text_model.encoder.layers."),
    ("^ln_final.", "text_model.final_layer_norm."),
    ("^text_projection", "text_projection.weight"),
    (".ln_#.", ".layer_norm#."),
    (".attn.in_proj_", ".self_attn.qkv."),                 # separated below
    (".attn.out_proj.", ".self_attn.out_proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)


def text_part(state: dict[str, Tensor], encoder: str) -> dict[str, Tensor]:
    """What belongs to one of the text encoders of TEXT_PREFIXES in a whole file, by its names there; empty if
    the file does not hold it."""
    for prefix in TEXT_PREFIXES[encoder]:
        found = {name: weight for name, weight in state.items() if name.startswith(prefix)}
        if found:
            return found
    return {}


def text_alone(state: dict[str, Tensor], encoder: str) -> dict[str, Tensor]:
    """The names of a whole file for a text encoder that has a file to itself, by those of transformers or of
    OpenCLIP; without the image half of a whole CLIP."""
    prefix = TEXT_PREFIXES[encoder][-1]
    inner = ""
    if "embeddings.token_embedding.weight" in state:       # CLIP as transformers 5 writes it
        inner = "text_model."
    found = {}
    for name, weight in state.items():
        if name.startswith(("vision_model.", "visual_projection.", "visual.")):
            continue
        is_inner = name.startswith(("embeddings.", "encoder.", "final_layer_norm."))
        found[prefix + inner * is_inner + name] = weight
    return found


def text_weights(state: dict[str, Tensor], encoder: str) -> dict[str, Tensor]:
    """One of the text encoders of TEXT_PREFIXES from a whole file, by the names of transformers'
    CLIPTextModelWithProjection (clip-l and openclip-g), CLIPTextModel (openclip-h) or T5EncoderModel; empty
    if the file does not hold it. As in the folders of diffusers: openclip-h has no projection and lacks its
    last layer, which Stable Diffusion 2 does not use; clip-l has the identity as its projection in a file of
    Stable Diffusion 3, which does not project it, and none in others."""
    found = part(state, *TEXT_PREFIXES[encoder])
    if any(name.startswith("transformer.resblocks.") for name in found):
        found = openclip_weights(found, without_last=encoder == "openclip-h")
    if encoder == "t5-xxl":
        found = scaled_weights(found)
    if encoder == "clip-l" and part(state, TEXT_PREFIXES["clip-l"][-1]):
        width = found["text_model.final_layer_norm.weight"]
        found["text_projection.weight"] = torch.eye(len(width), dtype=width.dtype, device=width.device)
    return {name: weight for name, weight in found.items()
            if not name.endswith((".position_ids", "logit_scale"))}            # buffers, and CLIP's own loss


def openclip_weights(state: dict[str, Tensor], without_last: bool) -> dict[str, Tensor]:
    """The names and layouts of transformers from those of OpenCLIP: q, k and v are joined there, and the
    projection is a matrix by which vectors are multiplied from the left."""
    last = max(int(name.split(".")[2]) for name in state if name.startswith("transformer.resblocks."))
    renamed: dict[str, Tensor] = {}
    for name, weight in state.items():
        is_last = name.startswith(f"transformer.resblocks.{last}.")
        if name.startswith("visual.") or name == "attn_mask":
            continue
        if without_last and (is_last or name == "text_projection"):
            continue
        if name == "text_projection":
            weight = weight.T.contiguous()
        name = rename(name, OPENCLIP_NAMES)
        renamed[name] = weight
        if ".self_attn.qkv." in name:
            separate(renamed, name, "qkv", ("q_proj", "k_proj", "v_proj"), len(weight) // 3)
    return renamed


def scaled_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state of 8-bit weights that have scales beside them, in bfloat16; any other state as it is."""
    result: dict[str, Tensor] = {}
    for name, weight in state.items():
        scale = state.get(f"{name.removesuffix('weight')}scale_weight")
        if scale is not None and name.endswith(".weight"):
            weight = (weight.float() * scale).bfloat16()
        if not name.endswith(("scale_weight", "scale_input", "scaled_fp8")):
            result[name] = weight
    return result


# ---- all networks

# arch -> the function that gives a published state our names; and how its files are known: one name that
# the original or diffusers have, and no other network.
WEIGHTS = {"dit": dit_weights, "mmdit": mmdit_weights, "unet": unet_weights,
           "stable-audio": stable_audio_weights}
MARKS = {                                  # the first of these, as it has names of the second too
    "stable-audio": ("preprocess_conv.weight",),
    "dit": ("blocks.0.attn.qkv.weight", "transformer_blocks.0.attn1.to_q.weight"),
    "mmdit": ("joint_blocks.0.x_block.attn.qkv.weight", "double_blocks.0.img_attn.qkv.weight",
              "transformer_blocks.0.attn.add_q_proj.weight"),
    "unet": ("input_blocks.0.0.weight", "down_blocks.0.resnets.0.time_emb_proj.weight"),
}


def kind_of(state: dict[str, Tensor]) -> str | None:
    """The architecture of the network in a state of `network_part`; None if it is none of ours."""
    for arch, marks in MARKS.items():
        if any(mark in state for mark in marks):
            return arch
    return None


def demo() -> None:
    """Print what a few weights are called elsewhere."""
    rows = (
        ("DiT in diffusers", "transformer_blocks.3.attn1.to_out.0.bias",
         lambda name: rename(name, DIT_NAMES)),
        ("Stable Diffusion 1", "output_blocks.5.2.conv.bias", lambda name: unet_original_name(name, 2)),
        ("Stable Diffusion 3", "joint_blocks.7.x_block.attn2.ln_q.weight",
         lambda name: rename(name, MMDIT_ORIGINAL)),
        ("FLUX", "double_blocks.7.txt_mlp.0.weight", lambda name: rename(name, MMDIT_ORIGINAL)),
        ("FLUX in diffusers", "transformer_blocks.7.ff_context.net.0.proj.weight",
         lambda name: rename(name, MMDIT_NAMES)),
        ("FLUX's VAE", "decoder.mid.attn_1.proj_out.bias", lambda name: rename(name, VAE_NAMES)),
        ("Stable Audio", "transformer.layers.7.cross_attn.to_kv.weight",
         lambda name: rename(name, STABLE_AUDIO_ORIGINAL)),
        ("OpenCLIP", "transformer.resblocks.0.mlp.c_fc.bias", lambda name: rename(name, OPENCLIP_NAMES)),
    )
    for where, name, ours in rows:
        print(f"{where:20s} {name:52s} {ours(name)}")


if __name__ == "__main__":
    demo()
