"""From a configuration to what it describes: networks, autoencoders and paths, and how a network's blocks are
run, compiled or recomputed.

    python networks.py                    # the networks of all presets, and their parameters

A configuration is a plain dict, as a checkpoint stores it. ValueErrors are one line for the user.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, fields

import torch
import torch.utils.checkpoint
from torch import Tensor

import attention
from audio_vae import AudioVAE, AudioVAEConfig
from files import fingerprint_tensors
from settings import ALL_ARCHITECTURES, ALL_OBJECTIVES, BLOCKS
from text import TextConfig, TextEncoder
from vae import VAE, VAEConfig
from weights import load_weights


def build_model(arch: str, config: dict, text: dict | None = None) -> torch.nn.Module:
    """text: the checkpoint's text encoder. The built-in one becomes a part of the model, `model.text`,
    because it is trained, averaged and saved with it."""
    if arch == "vae":
        config = config_of_vae(config)
        return (AudioVAE if isinstance(config, AudioVAEConfig) else VAE)(config)
    row = ALL_ARCHITECTURES[arch]
    model = row.model(make_config(arch, row.config, config))
    if text is not None and text["encoder"] == "bytes":
        model.text = TextEncoder(make_config("text encoder", TextConfig, text["config"]))
    return model


def config_of_vae(values: dict) -> VAEConfig | AudioVAEConfig:
    """Of the autoencoder of pictures or, where it has a rate, of sounds."""
    return make_config("vae", AudioVAEConfig if "rate" in values else VAEConfig, values)


def make_config(name: str, kind: type, values: dict):
    """The dataclass `kind` with these values. Raises ValueError for a value that it has no field for."""
    surplus = sorted(set(values) - {field.name for field in fields(kind)})
    if surplus:
        raise ValueError(f"{name} has no setting {surplus[0]!r}; this checkpoint is from another version")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{name}: {error}; this checkpoint is from another version") from None


def build_path(objective: dict):
    """The path of an objective as the checkpoint stores it: its name in ALL_OBJECTIVES and its options."""
    options = dict(objective)
    name = options.pop("name", None)
    if name not in ALL_OBJECTIVES:
        raise ValueError(f"objective {name}: not in this version, which has {', '.join(ALL_OBJECTIVES)}")
    try:
        return ALL_OBJECTIVES[name].path(**options)
    except TypeError as error:                         # an option that its path does not have
        raise ValueError(f"objective {name}: {error}; this checkpoint is from another version") from None


def pack_vae(vae: VAE | AudioVAE) -> dict:
    return {"config": asdict(vae.config), "state": vae.state_dict()}


def unpack_vae(packed: dict, what: str = "VAE") -> VAE | AudioVAE:
    vae = load_weights(build_model("vae", packed["config"]), packed["state"], what)
    return vae.eval().requires_grad_(False)


def encoder_fingerprint(vae: VAE) -> str:
    """Latents depend on the encoder alone: a change of the decoder leaves a cache of them valid."""
    return fingerprint_tensors({name: weight for name, weight in vae.state_dict().items()
                                if name.startswith(("encoder.", "quant_conv.", "patch_encoder."))})


def latent_space(vae: VAE) -> tuple[str, str]:
    """Identifies what a network sees of a VAE: its encoder and the statistics that normalise latents."""
    return encoder_fingerprint(vae), fingerprint_tensors({"mean": vae.latent_mean, "std": vae.latent_std})


# ---- how a network is run

def compile_blocks(model: torch.nn.Module, kernels: bool = False, **options) -> None:
    """torch.compile each block in place, so that the names of the weights stay as they are. Blocks of one
    class share the compiled code. It is compiled for the first size and, when a second one appears, once more
    for all sizes. kernels: whether attention may take its own kernels, on the GPUs where they were faster."""
    torch._dynamo.config.cache_size_limit = 64         # a U-Net's blocks have many widths
    # The lengths of packed pictures differ in every step: what goes by them is not compiled.
    attention.attention_apart = torch.compiler.disable(attention.attention_apart)
    attention.COMPILED = kernels and attention.measured_on(next(model.parameters()).device)
    for block in model.modules():
        if isinstance(block, BLOCKS):
            block.compile(**options)


def checkpoint_blocks(model: torch.nn.Module) -> None:
    """Gradient checkpointing: keep the input of each block only, and run the block again in the backward pass
    (Chen et al. 2016, arXiv:1604.06174)."""
    def recomputed(forward: Callable) -> Callable:
        def again(*inputs, **more):                    # not functools.partial, which torch.compile skips
            # No block draws random numbers, so the state of the generator need not be restored.
            return torch.utils.checkpoint.checkpoint(forward, *inputs, use_reentrant=False,
                                                     preserve_rng_state=False, **more)
        return again

    for block in model.modules():
        if isinstance(block, BLOCKS):
            block.forward = recomputed(block.forward)


def graphed(model: torch.nn.Module) -> Callable[..., Tensor]:
    """The model compiled for sampling and, on CUDA, replayed as a graph. The first call runs without either,
    because it fills the network's tables of positions, whose memory a graph would overwrite."""
    compiled = None

    def call(*inputs: Tensor, **cond: Tensor) -> Tensor:
        nonlocal compiled
        if compiled is None:
            print("--compile: the next step compiles the network, which can take minutes", file=sys.stderr)
            compiled = torch.compile(model, mode="reduce-overhead")
            return model(*inputs, **cond)
        return compiled(*inputs, **cond).clone()       # a graph overwrites its output in the next call
    return call


if __name__ == "__main__":
    for arch, row in ALL_ARCHITECTURES.items():
        for preset, config in row.presets.items():
            with torch.device("meta"):                 # no memory, whatever the size
                model = build_model(arch, config)
            millions = sum(p.numel() for p in model.parameters()) / 1e6
            blocks = sum(isinstance(block, row.blocks) for block in model.modules())
            print(f"{arch} {preset}: {millions:,.1f} M parameters, {blocks} blocks")
