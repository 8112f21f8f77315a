"""Models published elsewhere: the table of them, and their files as our networks and VAEs.

    python published.py                  # prints the table of models and their parameter counts
    python sample.py --published dit-xl-2-256 --weights DiT-XL-2-256x256.pt --vae sd-vae-ft-ema/ --n 1

DiT: Peebles & Xie 2022 (arXiv:2212.09748); SiT: Ma et al. 2024 (arXiv:2401.08740); Stable Diffusion 1 and 2:
Rombach et al. 2022 (arXiv:2112.10752); XL: Podell et al. 2023 (arXiv:2307.01952); 3 and 3.5: Esser et al.
2024 (arXiv:2403.03206); FLUX: github.com/black-forest-labs/flux; Stable Audio Open: Evans et al. 2024
(arXiv:2407.14358). Files come from the authors or in the layout of diffusers; names.py has their names,
weights.py reads them. Nothing is downloaded here. A state is a dict of tensors by name; every error is one
line for the user (ValueError).
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import dit
import mmdit
import names
import stable_audio
import unet
from audio_vae import PRESETS as AUDIO_VAE_PRESETS
from audio_vae import AudioVAE, AudioVAEConfig
from encoders import RECIPES, Part, belongs, count_parameters, kinds_in
from vae import PRESETS as VAE_PRESETS
from vae import VAE, VAEConfig
from weights import (assign_weights, check_finite, check_readable, check_weights, in_dtype, load_weights,
                     map_weights, read_header, read_weights)

AGAIN = "download it again"            # what to do with a damaged file of someone else


# ---- the models

class Latents(NamedTuple):
    """The latents that a model was trained in: x0 = (z - shift) * scale."""
    owner: str         # whose VAE it is
    channels: int
    scale: float
    shift: float = 0.0
    factor: int = 8    # pixels on a side, or samples, of one position


SD = Latents("Stable Diffusion 1 and 2", 4, 0.18215)
XL = Latents("Stable Diffusion XL", 4, 0.13025)
SD3 = Latents("Stable Diffusion 3", 16, 1.5305, 0.0609)
FLUX = Latents("FLUX", 16, 0.3611, 0.1159)
STABLE_AUDIO_RATE = 44_100                # samples a second
STABLE_AUDIO = Latents("Stable Audio Open", 64, 1.0, factor=2048)


class Published(NamedTuple):
    """A model as it was published, with the settings that its authors or its model card recommend."""
    arch: str                          # "dit", "mmdit", "unet" or "stable-audio"
    config: dict                       # of that network
    objective: dict                    # the path it was trained on, with its settings
    side: int                          # of its pictures, in pixels; the samples of its sounds
    latents: Latents
    steps: int
    guidance: float                    # scale of classifier-free guidance; 1: none
    sampler: str
    times: str = "even"
    text: str | None = None            # one of encoders.RECIPES; None: the 1000 classes of ImageNet
    # FLUX.1-dev: the logarithm of the shift is linear in the number of image tokens, through these two
    # points, (tokens, logarithm); and the guidance scale that is an input of the network
    shift_points: tuple[tuple[int, float], tuple[int, float]] | None = None
    distilled_guidance: float | None = None
    rate: int | None = None            # samples a second; None: it draws pictures

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a picture; a sound is one row of samples."""
        return (self.side, self.side) if self.rate is None else (1, self.side)


DIT_TIME = {"time_scale": 1000.0, "time_offset": -1.0}     # numbers its steps 0..999, where ours are 1..1000
SIT_TIME = {"time_scale": -1.0, "time_offset": 1.0}        # its time runs from noise to data


def class_model(family: str, size: str, patch: int, side: int) -> Published:
    config = dit.PRESETS[f"{size}/{patch}"] | dit.PUBLISHED_BLOCK
    config |= DIT_TIME if family == "dit" else SIT_TIME
    # SiT has the extra channels too, without a meaning: see names.single_to_double_channels
    config |= {"learn_sigma": True, "num_classes": 1000}
    if size == "XL":
        config |= {"heads": 16}                            # our preset has 18, which are faster
    if family == "dit":
        objective = {"name": "ddpm", "schedule": "linear", "learned_variance": True}
        return Published("dit", config, objective, side, SD, 250, 4.0, "ddpm", "linspace")
    # Its authors use an adaptive solver (dopri5); Heun with 125 steps takes the 250 evaluations of their SDE.
    return Published("dit", config, {"name": "rf", "density": "uniform"}, side, SD, 125, 4.0, "heun")


# By name: FAMILY-SIZE-PATCH-SIDE. Few of these have been released, but the authors' code can train all.
MODELS: dict[str, Published] = {
    f"{family}-{size.lower()}-{patch}-{side}": class_model(family, size, patch, side)
    for family, size, patch, side in itertools.product(("dit", "sit"), ("S", "B", "L", "XL"), (2, 4, 8),
                                                       (256, 512))
}

SDXL_CONFIG = unet.PRESETS["sd2"] | dict(
    widths=(320, 640, 1280), attention=(False, True, True), heads=(5, 10, 20), depth=(1, 2, 10),
    context_width=2048, pooled_width=2816)                 # pooled: 1280 of OpenCLIP-G, and 6 numbers of 256
SD3_CONFIG = mmdit.PRESETS["sd3-medium"] | dict(position_table=True)
SD35_CONFIG = mmdit.PRESETS["sd3.5-medium"] | dict(position_table=True)
SD35_LARGE_CONFIG = SD3_CONFIG | dict(width=2432, depth=38, heads=38, qk_norm=True)
FLUX_CONFIG = mmdit.PRESETS["flux-dev"]

DISTILLED = 3.5            # the guidance that FLUX.1-dev is drawn with, and trained further
EPS = {"name": "ddpm", "schedule": "scaled_linear", "prediction": "eps"}
V = {"name": "ddpm", "schedule": "scaled_linear", "prediction": "v"}
SHIFTED = {"name": "rf", "shift": 3.0}                     # at 1024 x 1024: Esser et al., section 5.3.2

# Steps, guidance, sampler and spacing of the times (times.TIMES) are those of the model cards, else of
# diffusers' pipelines.
MODELS |= {
    "sd1.5": Published("unet", unet.PRESETS["sd1"], EPS, 512, SD, 50, 7.5, "plms", "sd", "sd1"),
    "sd2.1-base": Published("unet", unet.PRESETS["sd2"], EPS, 512, SD, 50, 7.5, "plms", "sd", "sd2"),
    "sd2.1": Published("unet", unet.PRESETS["sd2"], V, 768, SD, 50, 7.5, "ddim", "sd", "sd2"),
    "sdxl": Published("unet", SDXL_CONFIG, EPS, 1024, XL, 50, 5.0, "euler", "sdxl", "sdxl"),
    "sd3-medium": Published("mmdit", SD3_CONFIG, SHIFTED, 1024, SD3, 28, 7.0, "euler", "sd3", "sd3"),
    "sd3.5-medium": Published("mmdit", SD35_CONFIG, SHIFTED, 1024, SD3, 40, 4.5, "euler", "sd3", "sd3"),
    "sd3.5-large": Published("mmdit", SD35_LARGE_CONFIG, SHIFTED, 1024, SD3, 28, 3.5, "euler", "sd3", "sd3"),
    "flux-dev": Published("mmdit", FLUX_CONFIG, {"name": "rf"}, 1024, FLUX, 50, 1.0, "euler", "even",
                          "flux-dev", shift_points=((256, 0.5), (4096, 1.15)), distilled_guidance=DISTILLED),
    "flux-schnell": Published("mmdit", FLUX_CONFIG | dict(guidance=False), {"name": "rf"}, 1024, FLUX, 4, 1.0,
                              "euler", "even", "flux-schnell"),
    # 1024 frames, 47.55 s; diffusers' scheduler, which the model card names, and its authors' steps and scale
    "stable-audio-open-1.0": Published("stable-audio", stable_audio.PRESETS["open-1.0"],
                                       {"name": "circle", "prediction": "v"}, 1024 * 2048, STABLE_AUDIO, 100,
                                       7.0, "dpmpp_2m_sde", "stable-audio", "stable-audio",
                                       rate=STABLE_AUDIO_RATE),
}


def build_network(name: str) -> torch.nn.Module:
    """The network of MODELS[name] on the meta device: names and shapes without memory."""
    row = MODELS[name]
    network, config = {"dit": (dit.DiT, dit.DiTConfig), "mmdit": (mmdit.MMDiT, mmdit.MMDiTConfig),
                       "unet": (unet.UNet, unet.UNetConfig),
                       "stable-audio": (stable_audio.StableAudio, stable_audio.StableAudioConfig)}[row.arch]
    with torch.device("meta"):
        return network(config(**row.config))


# ---- files of export.py

def read_metadata(file: str | Path) -> dict | None:
    """What export.py has written beside the weights: arch, config, objective, step, data, text, label_dropout
    and vae (the VAE's configuration). None for any other file. Only the head of the file is read."""
    file = Path(file)
    try:
        if file.suffix == ".safetensors":
            strings = read_header(file)[0]["__metadata__"]
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


# ---- networks

def inside(path: str | Path, *parts: str) -> Path:
    """The first of these folders in a folder of a whole pipeline; any other path as it is."""
    for part in parts:
        if (Path(path) / part).is_dir():
            return Path(path) / part
    return Path(path)


def our_weights(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of the network of MODELS[name] from a published one (of names.network_part). Raises
    ValueError where it does not fit, also for a file of another picture size, which has the same weights
    and shapes but for the table of positions (dit, sit)."""
    row = MODELS[name]
    network = build_network(name)
    table = state.get("pos_embed")     # (1, tokens, width), in the original's files alone
    if row.arch == "dit" and table is not None:
        tokens = (row.side // 8 // network.config.patch[0]) ** 2
        if table.shape[1:2] != (tokens,):
            raise ValueError(f"its table of positions, {tuple(table.shape)}, is not for the {tokens} patches "
                             f"of {name}; give the name that belongs to the file")
    state = names.WEIGHTS[row.arch](state, network.config)
    if row.arch == "stable-audio" and not any(key.startswith("seconds_") for key in state):
        raise ValueError("has no embedding of seconds; give the whole folder of the model, with transformer/ "
                         "and projection_model/, or its authors' model.safetensors")
    check_weights(network, state, name)
    return state


def recognise(shapes: dict[str, Sequence[int]]) -> tuple[str, ...]:
    """The models whose network has these names and shapes, original or of diffusers, also in a whole file.
    Several where the weights cannot tell: dit and sit; sd2.1-base and sd2.1, which predict eps and v. Empty
    for anything else."""
    state = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}
    state = names.network_part(state)
    arch = names.kind_of(state)
    embedding = state.get("x_embedder.proj.weight", state.get("pos_embed.proj.weight"))

    def fits(name: str) -> bool:
        width, patch = (MODELS[name].config.get(key) for key in ("width", "patch"))
        if embedding is not None and (len(embedding), *embedding.shape[2:]) != (width, *(patch or (2, 2))):
            return False                   # spares building a network: there are many sizes of DiT
        try:
            return our_weights(name, state) is not None
        except ValueError:
            return False

    return tuple(name for name, row in MODELS.items() if row.arch == arch and fits(name))


def models_in(path: str | Path) -> tuple[str, ...]:
    """The models whose network a file or folder holds, as `recognise` says; empty where it cannot be read."""
    try:
        state = map_weights(inside(path, "transformer", "unet"))
    except (ValueError, OSError):
        return ()
    return recognise({key: weight.shape for key, weight in state.items()})


def read_network(name: str, path: str | Path) -> dict[str, Tensor]:
    """The state of the network of MODELS[name] from its file or folder: mapped where the file has it as we
    do, in the file's dtypes. Raises ValueError, which names the model that the file holds if it is another
    one of MODELS."""
    check_readable(path)
    file = inside(path, "transformer", "unet")
    state = names.network_part(map_weights(file))
    if (Path(path) / "projection_model").is_dir():         # Stable Audio's embedding of seconds
        state |= map_weights(Path(path) / "projection_model")
    try:
        found = our_weights(name, state)
    except ValueError as error:
        others = recognise({key: weight.shape for key, weight in state.items()})
        if others:
            raise ValueError(f"{file}: holds the network of {' or '.join(others)}, not of {name}; give "
                             f"--published {others[0]}") from None
        raise ValueError(f"{file}: {error}") from None
    check_finite(found, str(file), AGAIN)
    return found


def load_network(name: str, path: str | Path, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """The network of MODELS[name] with the weights of a file or folder, for inference: in the file's dtype
    unless another is given, and never twice in memory. Raises ValueError as `read_network` does."""
    state = in_dtype(read_network(name, path), dtype)
    return assign_weights(build_network(name), state, str(path)).eval().requires_grad_(False)


def find_text_encoders(parts: Sequence[Part], paths: Sequence[str],
                       otherwise: str | None = None) -> dict[str, dict[str, Tensor]]:
    """The weights of these parts of a recipe, mapped, by Part.folder, as names.text_weights takes them.

    paths: whole files, files or folders of one encoder each, or a pipeline's folder, in any order. otherwise:
    where to look for parts that none of these has. Raises ValueError for a path without any of them, for two
    paths that have the same one, and for a part that is nowhere."""
    found: dict[str, dict[str, Tensor]] = {}
    whose: dict[str, str] = {}
    for path in paths:
        theirs, others = text_encoders_in(parts, path)
        if not theirs and (otherwise is not None or len(paths) > 1):
            wanted = ", ".join(part.kind for part in parts)
            raise ValueError(f"{path}: holds {' or '.join(others) or 'no text encoder'}; this model takes "
                             f"{wanted}; leave it out")
        for part in parts:
            if part.folder in theirs and part.folder in found:
                raise ValueError(f"{path}: holds {part.kind}, as {whose[part.folder]} does; give one of them")
        found |= theirs
        whose |= dict.fromkeys(theirs, path)
    missing = [part for part in parts if part.folder not in found]
    if missing and otherwise is not None:
        found |= text_encoders_in(missing, otherwise)[0]
    for part in missing:
        if part.folder not in found:
            where = "this file" if len(paths) == 1 else "these files"
            remedy = ", or leave T5 out by --no-t5" if part.optional else ""
            raise ValueError(f"{' '.join(paths)}: the text encoder {part.kind} is not in {where}; give a "
                             f"folder or a file that has it by --text-encoder, which takes several{remedy}")
    return found


def text_encoders_in(parts: Sequence[Part], path: str) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Those of these parts that a file or folder has; and the kinds of encoders.CONFIGS that it may hold."""
    check_readable(path)
    found: dict[str, dict[str, Tensor]] = {}
    kinds: list[str] = []
    inner = [f"{path}/{part.folder}" for part in parts if (Path(path) / part.folder).is_dir()]
    for place in inner or [path]:
        state = map_weights(place)
        kinds += kinds_in(state)
        for part in parts:
            own = names.text_part(state, part.kind.lower())
            if not own and belongs(part, state):
                own = names.text_alone(state, part.kind.lower())
            if own:
                found[part.folder] = own
    return found, kinds


def read_text_encoders(parts: Sequence[Part], found: dict[str, dict[str, Tensor]],
                       what: str) -> dict[str, dict[str, Tensor]]:
    """What `find_text_encoders` has found by the names of transformers, after a look at every value. Raises
    ValueError, which begins with `what`, for NaN and infinity."""
    states = {}
    for part in parts:
        states[part.folder] = names.text_weights(found[part.folder], part.kind.lower())
        check_finite(states[part.folder], what, AGAIN)
    return states


# ---- VAEs

def vae_from_weights(state: dict[str, Tensor], scale: float | Sequence[float],
                     shift: float | Sequence[float] = 0.0, groups: int = 32) -> VAE:
    """A VAE, in evaluation mode, from a published state as names.vae_weights takes it. Its widths are read
    from the shapes of the weights.

    scale and shift: what the model was published with, x0 = (z - shift) * scale; one number, or one for each
    channel. groups: the number of groups in its norms, which the shapes do not show. Raises ValueError for
    weights that are not an AutoencoderKL's."""
    state = names.vae_weights(state)
    levels = names.count_levels(state)
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
        attention_levels=tuple(level for level in range(levels)
                               if f"encoder.down_blocks.{level}.attentions.0.to_q.weight" in state),
        quant_conv="quant_conv.weight" in state)
    numbers = [torch.tensor(value, dtype=torch.float32) for value in (scale, shift)]
    if any(value.ndim and len(value) != config.latent_channels for value in numbers):
        raise ValueError(f"its latents have {config.latent_channels} channels, for which config.json has "
                         "another number of means or deviations")
    state["latent_mean"] = numbers[1].expand(config.latent_channels).clone()
    state["latent_std"] = (1 / numbers[0]).expand(config.latent_channels).clone()
    with torch.device("meta"):         # costs no memory: the state's tensors become its parameters
        model = VAE(config)
    assign_weights(model, state, f"AutoencoderKL of widths {config.widths}")
    return model.eval().requires_grad_(False)


def is_audio_vae(state: dict[str, Tensor]) -> bool:
    """Whether these are the weights of an AudioVAE, by a name that names.audio_vae_weights knows."""
    return any(name.removeprefix(names.SOUND_AUTOENCODER) in ("encoder.conv1.weight_v",
                                                              "encoder.layers.0.weight_v") for name in state)


def audio_vae_from_weights(state: dict[str, Tensor], rate: int) -> AudioVAE:
    """An AudioVAE, in evaluation mode, from a published state as names.audio_vae_weights takes it. Widths and
    strides are read from the shapes of the weights: the filters of a stride are twice as long. The latents
    are used as they are. Raises ValueError for weights that do not fit together."""
    state = names.audio_vae_weights(state)
    widths, strides = [state["encoder.conv1.weight_v"].shape[0]], []
    while f"encoder.block.{len(strides)}.conv1.weight_v" in state:
        filters = state[f"encoder.block.{len(strides)}.conv1.weight_v"]
        widths.append(filters.shape[0])
        strides.append(filters.shape[2] // 2)
    if not strides or "decoder.conv1.weight_v" not in state:
        raise ValueError("not the weights of an AutoencoderOobleck: its blocks or its decoder are missing")
    channels = state["decoder.conv1.weight_v"].shape[1]
    config = AudioVAEConfig(rate=rate, channels=state["encoder.conv1.weight_v"].shape[1],
                            latent_channels=channels, widths=tuple(widths), strides=tuple(strides))
    state |= {"latent_mean": torch.zeros(channels), "latent_std": torch.ones(channels)}
    with torch.device("meta"):
        model = AudioVAE(config)
    assign_weights(model, state, f"AutoencoderOobleck of widths {config.widths}")
    return model.eval().requires_grad_(False)


# A file without config.json does not hold its scale. A whole file shows by the names of its other parts whose
# it is, in this order; a VAE alone, only by the name under which it was published.
WHOLE_FILES = (("conditioner.", XL), ("model.diffusion_model.label_emb.", XL), ("cond_stage_model.", SD),
               ("model.diffusion_model.input_blocks.", SD), ("model.diffusion_model.joint_blocks.", SD3),
               ("text_encoders.clip_g.", SD3), ("model.diffusion_model.double_blocks.", FLUX))
VAE_FILES = {"ae": FLUX, "sdxl_vae": XL, "vae_ft_mse_840000_ema_pruned": SD,
             "vae_ft_ema_560000_ema_pruned": SD, "sd_vae_ft_mse": SD, "sd_vae_ft_ema": SD}


def latents_of(file: Path, state: dict[str, Tensor], name: str | None) -> Latents:
    """The latents of a VAE in a file without a config.json. name: of the model that it is for. Raises
    ValueError where nothing shows them."""
    for prefix, latents in WHOLE_FILES:
        if any(key.startswith(prefix) for key in state):
            return latents
    stem = re.sub("[-. ]", "_", file.stem.lower())
    if stem in VAE_FILES:
        return VAE_FILES[stem]
    if name is not None:
        latents = MODELS[name].latents
        print(f"{file}: a VAE alone does not show its scale; taken as {latents.scale:g}, that of "
              f"{latents.owner}; if it is another model's, colours are wrong: give a folder with its "
              "config.json", file=sys.stderr)
        return latents
    known = ", ".join(f"{latents.scale:g} in {latents.owner}" for latents in (SD, XL, SD3, FLUX))
    raise ValueError(f"{file}: a VAE alone, without the scale of its latents, which differs between models "
                     f"({known}); give a folder with its config.json (scaling_factor), or name its model by "
                     "--published")


def has_vae(path: Path) -> bool:
    """Whether this is a folder of diffusers with a VAE, or a file of another program by its ending."""
    folder = inside(path, "vae")
    return (folder / "config.json").is_file() or path.suffix in (".ckpt", ".sft")


def load_vae(path: str | Path, name: str | None = None) -> VAE | AudioVAE:
    """A published VAE, of sounds where the weights are an AutoencoderOobleck's: a diffusers folder (with
    config.json beside the weights), also a whole pipeline's; a whole file of Stable Diffusion, FLUX or Stable
    Audio; or a file of the VAE alone, whose scale is then that of MODELS[name]. Raises ValueError if it is
    none of these, or without the scale of its latents."""
    path = Path(path)
    check_readable(path)
    if read_metadata(path) is not None:                    # of export.py: it holds its scale
        return load_exported_vae(path)
    place = inside(path, "vae")
    state = map_weights(place)
    description = place / "config.json"
    if place.stem == "diffusion_pytorch_model":            # one file of such a folder
        description = place.with_name("config.json")
    scale, shift, groups = None, 0.0, 32
    try:
        if is_audio_vae(state):
            return audio_vae_from_weights(state, described_rate(description, name))
        if description.is_file():
            scale, shift, groups = described_latents(description)
        if scale is None:
            # what is no VAE at all is refused below
            is_vae = any(key.endswith("decoder.conv_in.weight") for key in state)
            latents = latents_of(place, state, name) if is_vae else SD
            scale, shift = latents.scale, latents.shift
        autoencoder = vae_from_weights(state, scale, shift, groups)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(str(place)) else f"{place}: {message}") from None
    check_finite(autoencoder.state_dict(), str(place), AGAIN)
    return autoencoder


def described_rate(file: Path, name: str | None) -> int:
    """Samples a second in the config.json of an AudioVAE, or where there is none, of MODELS[name]."""
    if file.is_file():
        rate = read_config(file).get("sampling_rate")
        if type(rate) is int and rate > 0:
            return rate
        raise ValueError(f"{file}: damaged (sampling_rate {rate!r}); download it again")
    return (MODELS[name].rate if name else None) or STABLE_AUDIO_RATE


def described_latents(file: Path) -> tuple[float | list[float] | None, float | list[float], int]:
    """Scale, shift and number of groups in a VAE's config.json; no scale where it has none. A model with
    latents_mean and latents_std (of each channel) is used as x0 = (z - mean) / std * scaling_factor."""
    config = read_config(file)
    try:
        scale = config.get("scaling_factor")
        shift = float(config.get("shift_factor") or 0.0)   # null in the config.json of some models
        groups = int(config.get("norm_num_groups") or 32)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if not scale:
            return None, shift, groups
        if mean is None or std is None:
            return float(scale), shift, groups
        return [float(scale) / float(value) for value in std], [float(value) for value in mean], groups
    except (TypeError, ValueError, ZeroDivisionError):
        raise ValueError(f"{file}: damaged; {AGAIN}") from None


def load_exported_vae(file: Path) -> VAE:
    """The VAE in a file of export.py, in evaluation mode. Raises ValueError for one of another version."""
    exported = read_export(file)
    packed = exported["vae"] or {"config": exported["config"], "state": exported["ema"]}
    try:
        if "rate" in packed["config"]:                     # of sounds
            autoencoder = AudioVAE(AudioVAEConfig(**packed["config"]))
        else:
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
        raise ValueError(f"{file}: damaged; {AGAIN}")
    return config


def check_prediction(name: str, path: str | Path) -> None:
    """Raise ValueError where a pipeline's folder says that its network predicts something else than that of
    MODELS[name], which its weights do not show."""
    file = Path(path) / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return
    names_of = {"epsilon": "eps", "v_prediction": "v"}
    theirs = names_of.get(read_config(file).get("prediction_type"))
    row = MODELS[name]
    ours = row.objective.get("prediction")
    if theirs is None or ours is None or theirs == ours:
        return
    others = [other for other, candidate in MODELS.items() if candidate.config == row.config
              and candidate.arch == row.arch and candidate.objective.get("prediction") == theirs]
    remedy = f"; give --published {others[0]}" if others else ""
    raise ValueError(f"{path}: predicts {theirs} (scheduler_config.json), where {name} predicts "
                     f"{ours}{remedy}")


def check_vae(name: str, autoencoder: VAE | AudioVAE, what: str) -> None:
    """Raise ValueError where the latents of a VAE, read from `what`, are not those that MODELS[name] was
    trained in, as it would then draw noise or wrong colours."""
    latents = MODELS[name].latents
    channels = autoencoder.config.latent_channels
    scale, mean = 1 / autoencoder.latent_std, autoencoder.latent_mean          # (C,)
    same_shape = channels == latents.channels and autoencoder.factor == latents.factor
    same_scale = ((scale - latents.scale).abs() < 1e-4).all() and ((mean - latents.shift).abs() < 1e-4).all()
    if not (same_shape and same_scale):
        shifts = ["", ""]
        if latents.shift or mean.any():
            shifts = [f" after a shift of {value:.4f}" for value in (latents.shift, mean.mean())]
        raise ValueError(f"{what}: {name} was trained in latents of {latents.channels} channels at "
                         f"1/{latents.factor}, scaled by {latents.scale}{shifts[0]} ({latents.owner}); this "
                         f"one has {channels} at 1/{autoencoder.factor}, scaled by {scale.mean():.5f}"
                         f"{shifts[1]}")


def build_vae(name: str) -> VAE | AudioVAE:
    """The VAE of MODELS[name] on the meta device."""
    row = MODELS[name]
    with torch.device("meta"):         # shapes without memory
        if row.rate is not None:
            return AudioVAE(AudioVAEConfig(**AUDIO_VAE_PRESETS["stable-audio-open"]))
        return VAE(VAEConfig(**VAE_PRESETS["sd"] | {"latent_channels": row.latents.channels,
                                                    "quant_conv": row.latents.channels == 4}))


def weights_in_bytes(name: str) -> dict[str, int]:
    """What the parts of a text model take as they are used: network and text encoders in bf16, and the VAE in
    fp32."""
    row = MODELS[name]
    autoencoder = build_vae(name)
    found = {"network": 2 * sum(p.numel() for p in build_network(name).parameters())}
    for part in RECIPES[row.text].parts:
        kind = "T5" if part.family == "t5" else "CLIP"
        found[kind] = found.get(kind, 0) + 2 * count_parameters(part)
    return found | {"VAE": 4 * sum(p.numel() for p in autoencoder.parameters())}


def demo() -> None:
    """Print the published models and their parameters; and of text models, how much memory their weights
    take."""
    print("name                  network      path     picture   latent   patches   parameters")
    sizes: dict[str, float] = {}       # a network of several rows is built once
    for name, row in MODELS.items():
        network = str({key: value for key, value in row.config.items() if not key.startswith("time_")})
        if network not in sizes:
            sizes[network] = sum(p.numel() for p in build_network(name).parameters()) / 1e6
        millions = sizes[network]
        latent = row.side // row.latents.factor
        patch = row.config.get("patch", (2, 2))[0]
        patches = f"{(latent // patch) ** 2:9d}" if row.arch in ("dit", "mmdit") else 9 * " "
        print(f"{name:21s} {row.arch:12s} {row.objective['name']:6s} {row.side:9d} {latent:8d} {patches} "
              f"{millions:10.1f} M")
    print("\nGiB of weights (bf16; the VAE in fp32)   network    CLIP      T5     VAE     all")
    for name in (name for name, row in MODELS.items() if row.text):
        parts = weights_in_bytes(name)
        gib = [parts.get(key, 0) / 2**30 for key in ("network", "CLIP", "T5", "VAE")]
        shown = (f"{size:7.2f}" if size else "      -" for size in (*gib, sum(gib)))
        print(f"{name:39s} {' '.join(shown)}")


if __name__ == "__main__":
    demo()
