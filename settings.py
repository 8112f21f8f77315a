"""The settings of a training run: one row per flag, architecture and objective, and the configurations they
make.

    python settings.py --arch dit --objective rf       # prints the settings of this train.py command line

`parse(argv)` is the entry point. argparse's own `type=` checks each value; `resolve` then checks each flag
against the flags that it depends on and fills in the defaults that depend on other flags. All of this happens
before a file is written. Every refusal is a ValueError of one line that names the flag, its value and the
remedy. train.py writes the resolved settings to settings.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import audio_vae
import dit
import ema
import mmdit
import moe
import published
import stable_audio
import text
import unet
import vae
from cli import (Flag, folder_name, given, integer, make_parser, nonempty, number, one_of, program, shown)
from data import SOURCES
from ddpm import DDPM, Circle
from encoders import RECIPES, WITHOUT_T5
from rectified_flow import MeanFlow, RectifiedFlow
from sounds import SOUNDS, wanted_in
from times import flux_shift


def text_encoder(string: str) -> str:
    kind, _, folder = nonempty(string).partition(":")
    if kind not in ("bytes", "none", *RECIPES) or bool(folder) != (kind in RECIPES):
        folders = ", ".join(f"{name}:FOLDER" for name in RECIPES)
        raise argparse.ArgumentTypeError(f"{string}: must be bytes, {folders} or none")
    return string


def published_model(string: str) -> str:
    if nonempty(string) not in published.MODELS:
        largest = ", ".join(name for name, row in published.MODELS.items() if row.text or "-xl-2-" in name)
        raise argparse.ArgumentTypeError(f"{string}: known are {largest}, and the sizes s, b, l, xl at patch "
                                         "2, 4, 8")
    return string


def average_length(string: str) -> float:
    length = number(0, 1)(string)
    if ema.WIDEST / 2 < length < ema.CONSTANT:
        raise argparse.ArgumentTypeError(f"{string}: must be a width of at most {ema.WIDEST / 2}, or a decay "
                                         f"of at least {ema.CONSTANT}")
    return length


SIZE = 65_536      # of a side or a width: sizes beyond overflow before they can be refused with an estimate


class Architecture(NamedTuple):
    model: type
    config: type
    presets: dict[str, dict]
    blocks: tuple[type, ...]              # compiled, and recomputed by --grad-checkpoint, one by one
    conditioning: tuple[str, ...]         # what it can be conditioned on, the default first
    defaults: dict                        # optimisation flags: what two cores can do in ten minutes
    defaults_with_text: dict = {}         # what differs with text: thirty minutes on cores with bf16
    defaults_with_sound: dict = {}        # and with sounds of a second, of twice as many tokens


class Objective(NamedTuple):
    path: type
    sampler: str                          # default for sample.py and for previews
    steps: int                            # likewise
    flags: tuple[Flag, ...]               # the flags that set its path's options
    prediction_with_text: str | None = None
    scale: float = 2.0                    # default guidance of sample.py and previews, where there is any
    second_time: bool = False             # whether its network takes two times
    grows_from: str | None = None         # another objective, with whose weights its networks can begin


ARCHITECTURES = {
    "vae": Architecture(
        vae.VAE, vae.VAEConfig, vae.PRESETS, (vae.ResnetBlock,), ("class", "text", "none"),
        dict(steps=2000, batch_size=8, lr=2e-3, warmup=50, ema=0.99, weight_decay=0.0),
        dict(steps=4000)),
    "dit": Architecture(
        dit.DiT, dit.DiTConfig, dit.PRESETS, (dit.Block,), ("class", "none"),
        dict(steps=2400, batch_size=64, lr=4e-3, warmup=100, ema=0.03, weight_decay=0.01),
        defaults_with_sound=dict(steps=1000)),
    "mmdit": Architecture(
        mmdit.MMDiT, mmdit.MMDiTConfig, mmdit.PRESETS, (mmdit.JointBlock, mmdit.SingleBlock), ("text",),
        dict(steps=10500, batch_size=32, lr=1e-3, warmup=100, ema=0.998, weight_decay=0.01),
        defaults_with_sound=dict(steps=5000)),
    "unet": Architecture(
        unet.UNet, unet.UNetConfig, unet.PRESETS, (unet.ResnetBlock, unet.SpatialTransformer),
        ("class", "text", "none"),
        dict(steps=2000, batch_size=64, lr=2e-3, warmup=100, ema=0.03, weight_decay=0.01),
        dict(steps=10000, batch_size=32, lr=1e-3), dict(steps=1000)),
}
SOUND_VAE = Architecture(                 # in the place of "vae", where the data are sounds
    audio_vae.AudioVAE, audio_vae.AudioVAEConfig, audio_vae.PRESETS, (audio_vae.ResidualUnit,),
    ("class", "text", "none"),
    dict(steps=3000, batch_size=8, lr=2e-3, warmup=50, ema=0.99, weight_decay=0.0))
BLOCKS = tuple(block for row in (*ARCHITECTURES.values(), SOUND_VAE) for block in row.blocks) + (
    text.TextBlock,)
NETWORKS = tuple(name for name in ARCHITECTURES if name != "vae")
CONDITIONS = tuple(dict.fromkeys(name for row in ARCHITECTURES.values() for name in row.conditioning))
NETWORK = {"arch": NETWORKS}                # for `Flag.needs`
TRANSFORMER = {"arch": ("dit", "mmdit")}

STRAIGHT = {"objective": ("rf", "meanflow")}     # objectives on the straight path, which share its flags

OBJECTIVES = {
    "rf": Objective(RectifiedFlow, sampler="heun", steps=10, flags=(     # 19 evaluations of the network
        Flag("--density", "density of the training times: uniform, logit_normal (default), mode, cosmap",
             one_of(("uniform", "logit_normal", "mode", "cosmap")), unset="logit_normal", needs=STRAIGHT),
        Flag("--density-mean", "logit_normal density: m (default: 0)", number(-100, 100),
             needs=STRAIGHT | {"density": ("logit_normal",)}, option="mean"),
        Flag("--density-std", "logit_normal density: s (default: 1)", number(0, 1e9, above=True),
             needs=STRAIGHT | {"density": ("logit_normal",)}, option="std"),
        Flag("--mode-scale", "mode density: s (default: 1.29)", number(-1, 2),
             needs=STRAIGHT | {"density": ("mode",)}),
        Flag("--shift", "shift of the times toward noise, for larger pictures (default: 1)",
             number(0, 1e9, above=True), needs=STRAIGHT),
        Flag("--shift-tokens", "with --aspect: the shift follows each picture's tokens, sqrt(tokens / N)",
             integer(1), metavar="N"),
    )),
    "meanflow": Objective(MeanFlow, sampler="jump", steps=1, flags=(
        Flag("--guidance", "guidance scale that is learned, so that a sample takes one evaluation (default: "
                           "1.5 where conditions are dropped, else 1)", number(0, 100)),
        Flag("--jumps", "share of training times at which a jump is learned, not the velocity (default: "
                        "0.5)", number(0, 1)),
    ), scale=1.0, second_time=True, grows_from="rf"),
    "ddpm": Objective(DDPM, sampler="ddim", steps=50, flags=(
        Flag("--schedule", "noise schedule: linear, scaled_linear (default), cosine",
             one_of(("linear", "scaled_linear", "cosine"))),
        Flag("--min-snr", "gamma of the min-SNR loss weight (default: off)", number(0, 1e9, above=True)),
        Flag("--zero-terminal-snr", "rescale the schedule so that it ends in pure noise"),
    ), prediction_with_text="v"),         # text matters most near pure noise, where eps is nearly known
}

# With those of published models that are drawn with, but not trained here.
ALL_ARCHITECTURES = ARCHITECTURES | {
    "stable-audio": Architecture(
        stable_audio.StableAudio, stable_audio.StableAudioConfig, stable_audio.PRESETS,
        (stable_audio.StableAudioBlock,), ("text",), {})}
ALL_OBJECTIVES = OBJECTIVES | {"circle": Objective(Circle, sampler="dpmpp_2m_sde", steps=100, flags=())}


def objective_flags() -> list[Flag]:
    """The flags of every objective, each bound to its objective."""
    rows = []
    for name, objective in OBJECTIVES.items():
        for flag in objective.flags:
            needs = NETWORK | {"objective": (name,)} | flag.needs
            rows.append(replace(flag, help=f"{', '.join(needs['objective'])}: {flag.help}", needs=needs,
                                settled=True, option=flag.option or flag.key))
    return rows


# What --experts can be given with.
EXPERTS = [
    Flag("--top-k", "experts that a token uses, on average unless --router token (default: 2)", integer(1),
         metavar="K"),
    Flag("--shared-experts", "experts that every token uses besides (default: 1)", integer(0, SIZE),
         metavar="N"),
    Flag("--expert-ratio", "hidden width of an expert, relative to the network's (default: such that a token "
                           "costs what the MLP would; 4: as wide as the MLP)", number(0, 64, above=True),
         metavar="RATIO"),
    Flag("--moe-blocks", "blocks that have experts: all, deep (default: the second half), every-other",
         one_of(moe.BLOCKS)),
    Flag("--router", "token (default): each token chooses its experts; expert: each expert its tokens; race: "
                     "the best pairs; each within a picture", one_of(moe.ROUTERS)),
    Flag("--balance", "token, race: weight of the loss that makes the experts' loads even (default: 0.01)",
         number(0, 1e6), metavar="WEIGHT"),
]
EXPERT_FIELDS = ("experts", "top_k", "shared_experts", "expert_ratio", "moe_blocks", "router")   # of networks
EXPERT_DEFAULTS = {"top_k": 2, "shared_experts": 1, "moe_blocks": "deep", "router": "token", "balance": 0.01}

FLAGS = {
    "what to train": [
        Flag("--arch", "network: dit, mmdit or unet; vae trains only the autoencoder", one_of(ARCHITECTURES)),
        Flag("--objective", "rf (default): the straight path; ddpm: the diffusion path; meanflow: the "
                            "straight path in one step, best from the weights of an rf run (--init-from)",
             one_of(OBJECTIVES), "rf"),
        Flag("--prediction", "what the network predicts: velocity, eps, v, x0 (default: velocity for rf, eps "
                             "for ddpm, v for ddpm with text or the cosine schedule)",
             one_of(("velocity", "eps", "v", "x0")), needs=NETWORK, option="prediction", settled=True),
        Flag("--loss", "the quantity whose squared error is minimised: velocity, eps, v, x0 (default: the "
                       "one that the network predicts)", one_of(("velocity", "eps", "v", "x0")),
             needs=NETWORK, option="loss_space", settled=True),
        Flag("--name", "run folder within --runs-dir (default: DATA-ARCH-OBJECTIVE, with the size unless "
                       "32x32)", folder_name, resumable=True),
        Flag("--runs-dir", "folder that holds the runs (default: runs)", nonempty, "runs", resumable=True),
    ],
    "data": [
        Flag("--data", f"{', '.join(SOURCES)}, a folder of pictures or of sounds, or tar "
                       "shards of pictures or latents, like 'shards/{00000..01023}.tar' (default: shapes)",
             nonempty, "shapes"),
        Flag("--data-dir", "folder of IDX and CIFAR-10 files, of an emoji font, clip art, stamps or recorded "
                           "words (default: data)", nonempty, "data", resumable=True),
        Flag("--image-size", "side, or height and width (default: 32)", integer(1), nargs="+", metavar="N",
             most=2),
        Flag("--seconds", "of sounds: how long they are, with silence behind shorter ones; longer ones are "
                          "cut (default: 1.024); of a folder that also has pictures, its sounds are taken",
             number(0.01, 3600), metavar="S"),
        Flag("--rate", "of a folder of sounds: samples a second, to which they are resampled (default: "
                       "8000)", integer(1000, 192_000), metavar="HZ"),
        Flag("--crop", "where to crop a folder's pictures that have another shape: centre (default), or "
                       "random, at several places of each", one_of(("centre", "random")), "centre"),
        Flag("--aspect", "dit, mmdit: keep each picture's own aspect ratio, at most N x N pixels of "
                         "--image-size N, and pack pictures of different sizes into one batch",
             needs={"arch": ("dit", "mmdit", "vae")}),
        Flag("--flip", "mirror pictures at random"),
        Flag("--shuffle-shards", "tar shards: how many of them are shuffled together (default: 16)",
             integer(1), metavar="N"),
        Flag("--workers", "tar shards: processes that read and decode ahead (default: one for each core, "
                          "at most 16; 0: none)", integer(0, 512), metavar="N", resumable=True),
        Flag("--limit", "train the network on only so many of the pictures, chosen at random (default: all; "
                        "the VAE is always trained on all)", integer(1), needs=NETWORK),
        Flag("--cond", "condition on labels (class), captions (text) or neither (none) (default: text for "
                       "mmdit, and for unet on emoji, clipart and stamps; else class)",
             one_of(CONDITIONS)),
        Flag("--text-encoder", "bytes (default): built in, trained with the network; clip:FOLDER or "
                               "t5:FOLDER: frozen, loaded by transformers; sd1, sd2, sdxl, sd3, flux-dev or "
                               "flux-schnell:FOLDER: the encoders of that model, joined as it does; none: "
                               "precomputed vectors, NAME.npz beside each picture of a folder",
             text_encoder, metavar="KIND", needs=NETWORK | {"cond": ("text",)}, settled=True),
        Flag("--no-t5", "with --text-encoder sd3:FOLDER: zeros in place of its T5", needs=NETWORK | {
            "cond": ("text",)}, settled=True),
        Flag("--cache-dir", "folder for decoded pictures and latents (default: the VAE's run)", nonempty,
             resumable=True),
    ],
    "network": [
        Flag("--preset", "a row of PRESETS in the network's file, like S/2 or sd1 (default: small)",
             nonempty, needs=NETWORK, instead="--vae-preset", settled=True),
        Flag("--patch", "dit, mmdit: side of a patch, or height and width (default: 2; of sounds, its "
                        "length)", integer(1, SIZE), nargs="+",
             metavar="N", most=2, needs=TRANSFORMER, settled=True),
        Flag("--block", "dit: the block, modern (default), or published as in 2022",
             one_of(("modern", "published")), needs={"arch": ("dit",)}, settled=True),
        Flag("--conv", "dit, mmdit: a depthwise 3x3 convolution between the tokens in every MLP",
             needs=TRANSFORMER, settled=True),
        Flag("--experts", "dit, mmdit: how many experts take the place of the MLP in the blocks of "
                          "--moe-blocks (mmdit: for the image tokens of joint blocks)", integer(2, SIZE),
             metavar="N", needs=TRANSFORMER, settled=True),
        *EXPERTS,
        Flag("--vae", "a trained VAE: run, checkpoint, published file or diffusers folder (default: train "
                      "one on this data)", nonempty, needs=NETWORK),
        Flag("--init-from", "start from the weights of this run or published file (default lr: 1e-4)",
             nonempty, metavar="PATH", needs=NETWORK),
        Flag("--published", "the published model in the --init-from file, like dit-xl-2-256; it settles "
                            "network and objective", published_model, metavar="NAME", needs=NETWORK),
    ],
    "VAE, where one is trained": [
        Flag("--vae-preset", f"row of PRESETS in vae.py: {', '.join(vae.PRESETS)} (default: small); of "
                             f"sounds, in audio_vae.py: {', '.join(audio_vae.PRESETS)}",
             one_of(tuple(dict.fromkeys((*vae.PRESETS, *audio_vae.PRESETS))))),
        Flag("--vae-widths", "channels per level; every level but the last halves the image",
             integer(1, SIZE), nargs="+", metavar="N"),
        Flag("--latent-channels", "channels of the latent (default: 4; of sounds 16)", integer(1, SIZE),
             metavar="C"),
        Flag("--kl-weight", "weight of the KL term (default: 1e-5; of sounds 0.1)", number(0, 1e9)),
        Flag("--waveform-weight", "of sounds: weight of the error of the samples, beside that of the "
                                  "spectrograms; a large one keeps the waveform, a small one what is heard "
                                  "(default: 100)",
             number(0, 1e9)),
        Flag("--latent-noise", "noise on the decoder's input in training, relative to the deviation within "
                               "each channel of a latent (default: 0)", number(0, 10)),
        Flag("--equivariance", "weight of reconstructing the picture at half its size from the latent at "
                               "half its size (default: 0)", number(0, 100)),
        Flag("--vae-steps", "optimizer steps of the VAE, when it is trained before another network",
             integer(1), needs=NETWORK, instead="--steps"),
    ],
    "objective": [
        *objective_flags(),
        Flag("--label-dropout", "share of labels or captions replaced by the null condition (default: 0.1; 0 "
                                "with --reflow); with 0, samples cannot be guided; for a network without any "
                                "conditions, see --cond",
             number(0, 1, below=True)),
    ],
    "reflow: train on pairs of noise and the sample that a run draws from it": [
        Flag("--reflow", "the run that draws them; this run begins with its VAE and averaged weights",
             nonempty, metavar="RUN", needs=NETWORK | {"objective": ("rf",), "cond": ("class", "none")}),
        Flag("--reflow-pairs", "how many are drawn, once (default: 20000)", integer(1), metavar="N"),
        Flag("--reflow-cfg", "guidance scale that they are drawn with (default: as sample.py draws RUN)",
             number(-1e6, 1e6), metavar="SCALE"),
        Flag("--reflow-steps", "steps of RUN's default sampler that they are drawn in (default: 10)",
             integer(1, 10**5), metavar="N"),
        Flag("--fresh", "begin with new weights, not with RUN's; the network may then differ"),
    ],
    "optimisation (the defaults depend on --arch: ARCHITECTURES in settings.py)": [
        Flag("--steps", "optimizer steps; a run goes on where they are raised", integer(1), changeable=True),
        Flag("--batch-size", "examples per optimizer step", integer(1), changeable=True),
        Flag("--tokens", "with --aspect, instead of --batch-size: tokens per optimizer step (default: as "
                         "many as --batch-size pictures of N x N have)", integer(1), metavar="N",
             needs=TRANSFORMER),
        Flag("--accumulate", "pieces that a batch is split into, to save memory (default: 1)", integer(1), 1),
        Flag("--lr", "peak learning rate of AdamW", number(1e-12, 1e3), changeable=True),
        Flag("--warmup", "steps of linear warm-up", integer(0)),
        Flag("--cooldown", "share of the steps, at the end, over which the rate falls to 0 (default: 0.5)",
             number(0, 1), 0.5),
        Flag("--weight-decay", "weight decay of matrices; norms, biases and gains have none", number(0, 1e9)),
        Flag("--clip", "norm to which larger gradients are clipped (default: 1)", number(1e-12), 1.0),
        Flag("--ema", "length of the average of the weights: its width relative to the training, at most "
                      "0.14 (one twice as wide is kept too, so that sample.py --ema can choose), or a "
                      "constant decay, at least 0.5; 0: none", average_length),
        Flag("--seed", "seed of weights, order and noise (default: 0)", integer(0, 2**62), 0),
    ],
    "machine and output": [
        Flag("--device", "auto (default), cpu, cuda, cuda:1, mps", nonempty, "auto", resumable=True),
        Flag("--precision", "auto (default: bf16 where the hardware multiplies it), bf16, fp32",
             one_of(("auto", "bf16", "fp32")), "auto"),
        Flag("--shard", "with torchrun: each process holds only a share of the weights, gradients, optimizer "
                        "and averages", resumable=True),
        Flag("--tensor-parallel", "dit, mmdit, with torchrun: groups of N processes work on the same "
                                  "pictures, each process with a part of the heads and hidden channels; "
                                  "implies --shard (default: 1)",
             integer(1), 1, metavar="N", resumable=True),
        Flag("--expert-parallel", "with --experts and --shard: each process holds whole experts, and tokens "
                                  "travel to theirs", resumable=True),
        Flag("--compile", "torch.compile the network, block by block", resumable=True),
        Flag("--grad-checkpoint", "keep only the input of each block and recompute the rest in the backward "
                                  "pass", resumable=True),
        Flag("--log-every", "steps per line of metrics.jsonl (default: 20)", integer(1), 20, resumable=True),
        Flag("--val-every", "steps between validations (default: 500)", integer(1), 500, resumable=True),
        Flag("--preview-every", "steps between previews (default: 1000)", integer(1), 1000, resumable=True),
        Flag("--preview-prompts", "text file of what to draw in previews and samples.png, one prompt per "
                                  "line (default: captions of the validation data)", nonempty,
             metavar="FILE", needs=NETWORK | {"cond": ("text",)}, resumable=True),
        Flag("--save-every", "steps between checkpoints (default: 500)", integer(1), 500, resumable=True),
        Flag("--keep", "how many of these checkpoints to keep, as checkpoint-STEP.pt (default: 0, only the "
                       "latest)", integer(0), 0, resumable=True),
        Flag("--keep-best", "keep the checkpoint with the lowest validation loss so far, as best.pt",
             resumable=True),
    ],
}
ROWS = {flag.key: flag for group in FLAGS.values() for flag in group}
# Settings that may change on resume: paths and intervals, never anything that affects training.
RESUMABLE = {flag.key for flag in ROWS.values() if flag.resumable}
# Settings that may change on resume where the command names them, with effect from the next step on.
CHANGEABLE = [flag.key for flag in ROWS.values() if flag.changeable]
# What makes two VAEs different: not the seed, the precision or mirrored pictures.
SAME_VAE = ("data", "image_size", "rate", "aspect", "crop", "vae_preset", "vae_widths", "latent_channels",
            "kl_weight", "waveform_weight", "latent_noise", "equivariance", "steps", "batch_size", "lr",
            "warmup", "cooldown", "weight_decay", "clip", "ema")
# What `resolve` fills in, so that it is never None.
ALWAYS = ("arch", "image_size", "cond", "label_dropout", "steps", "batch_size", "lr", "warmup",
          "weight_decay", "ema")
VAE_DEFAULTS = {"vae_preset": "small", "vae_widths": None, "latent_channels": 4, "kl_weight": 1e-5,
                "waveform_weight": None, "latent_noise": 0.0, "equivariance": 0.0}
SOUND_VAE_DEFAULTS = VAE_DEFAULTS | {"latent_channels": 16, "kl_weight": 0.1,
                                     "waveform_weight": audio_vae.WAVEFORM}
RATE = 8000            # of sounds: samples a second
SECONDS = 1.024        # their length
# Their number of samples is a multiple of this: of the autoencoder's 128, and 4 for patches or levels.
SAMPLES = 512


def check_needs(flag: Flag, args: argparse.Namespace) -> None:
    """Refuse a flag that has no effect under the values of the flags that it depends on."""
    for owner, values in flag.needs.items():
        value = getattr(args, owner) or ROWS[owner].unset
        if value not in values:
            instead = f"; use {flag.instead}" if flag.instead else ""
            raise ValueError(f"{shown(flag, args)}: belongs to --{owner} {' or '.join(values)}, not "
                             f"{value}{instead}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The resolved settings of a command line. Raises ValueError with one line for the user."""
    args = make_parser("Train a VAE, or a DiT, MM-DiT or U-Net in its latent space.", FLAGS).parse_args(argv)
    if args.arch is None:
        raise ValueError(f"--arch is required: one of {', '.join(ARCHITECTURES)}")
    return resolve(args)


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """Check flags against each other and fill in the defaults that depend on other flags."""
    resolve_sounds(args)
    autoencoder = audio_vae if args.rate else vae
    if args.vae_preset and args.vae_preset not in autoencoder.PRESETS:
        raise ValueError(f"--vae-preset {args.vae_preset}: for {'sounds' if args.rate else 'pictures'}, "
                         f"{autoencoder.__name__}.py has {', '.join(autoencoder.PRESETS)}")
    resolve_conditioning(args)
    for flag in ROWS.values():
        if given(flag, args):
            check_needs(flag, args)
            if flag.most and len(getattr(args, flag.key)) > flag.most:
                raise ValueError(f"{shown(flag, args)}: give one side, or height and width")
    if args.crop == "random" and args.data in SOURCES:
        raise ValueError(f"--crop random: is for a folder of pictures, not --data {args.data}")
    if OBJECTIVES[args.objective].second_time and args.arch == "mmdit":
        raise ValueError(f"--objective {args.objective}: --arch mmdit has no second time; use dit or unet")
    if args.preview_prompts and args.text_encoder == "none":
        raise ValueError(f"--preview-prompts {args.preview_prompts}: --text-encoder none has no encoder for "
                         "them; leave it out")
    if args.published:
        check_published(args)
    if args.no_t5 and (args.text_encoder or "bytes").partition(":")[0] not in WITHOUT_T5:
        raise ValueError(f"--no-t5: belongs to --text-encoder {' or '.join(WITHOUT_T5)}:FOLDER, not "
                         f"{args.text_encoder or 'bytes'}; leave it out")
    resolve_reflow(args)
    resolve_experts(args)
    if args.vae:
        for name in (*VAE_DEFAULTS, "vae_steps"):
            if given(ROWS[name], args):
                raise ValueError(f"{shown(ROWS[name], args)}: --vae {args.vae} is trained already; give one "
                                 "or the other")
    check_aspect(args)
    # A run that goes on changes only what its command names; a default changes nothing.
    args.asked = [name for name in CHANGEABLE if given(ROWS[name], args)]
    fill_defaults(args)
    resolve_layout(args)
    if args.batch_size % args.accumulate and not args.tokens:
        raise ValueError(f"{shown(ROWS['accumulate'], args)}: does not divide the batch of {args.batch_size}")
    return args


def resolve_sounds(args: argparse.Namespace) -> None:
    """Find out whether the data are sounds: then `rate` is set, and image_size is 1 x their samples."""
    row = SOURCES.get(args.data)
    built_in = row is not None and row.rate is not None
    if row is not None and not built_in:
        for name in ("seconds", "rate", "waveform_weight"):
            if given(ROWS[name], args):
                raise ValueError(f"{shown(ROWS[name], args)}: belongs to sounds, and --data {args.data} has "
                                 "pictures; leave it out")
    if row is None and os.path.isdir(args.data) and wanted_in(Path(args.data)) is SOUNDS:
        args.seconds = args.seconds or SECONDS         # it has no pictures
    if not built_in and args.seconds is None:
        if args.rate is not None:
            raise ValueError(f"--rate {args.rate}: belongs to a folder of sounds; give --seconds S too, how "
                             "long they are")
        if args.waveform_weight is not None:
            raise ValueError(f"--waveform-weight {args.waveform_weight:g}: belongs to sounds; leave it out")
        return
    if args.data.endswith(".tar"):
        raise ValueError(f"--seconds {args.seconds:g}: tar shards hold pictures; give a folder of sounds")
    if built_in and args.rate not in (None, row.rate):
        raise ValueError(f"--rate {args.rate}: the sounds of --data {args.data} have {row.rate} samples a "
                         "second; leave it out")
    for name in ("image_size", "aspect", "flip", "vae_widths", "equivariance", "published", "reflow"):
        if given(ROWS[name], args):
            remedy = "give --seconds" if name == "image_size" else "leave it out"
            raise ValueError(f"{shown(ROWS[name], args)}: is for pictures, and --data {args.data} has "
                             f"sounds; {remedy}")
    if args.patch and len(args.patch) > 1 and args.patch[0] != 1:
        raise ValueError(f"--patch {args.patch[0]} {args.patch[1]}: latents of sounds are one row high; give "
                         f"--patch {args.patch[1]}")
    args.rate = row.rate if built_in else args.rate or RATE
    args.seconds = args.seconds or SECONDS
    args.image_size = [1, math.ceil(args.seconds * args.rate / SAMPLES) * SAMPLES]


def resolve_layout(args: argparse.Namespace) -> None:
    """Check what several processes share, and how."""
    if args.tensor_parallel > 1:
        if args.arch not in TRANSFORMER["arch"]:
            raise ValueError(f"--tensor-parallel {args.tensor_parallel}: cuts the blocks of dit and mmdit, "
                             f"not of {args.arch}; leave it out")
        args.shard = True
    if args.expert_parallel and not (args.shard and (args.experts or args.arch == "vae")):
        raise ValueError("--expert-parallel: goes with --experts N and --shard; give those too, or leave it "
                         "out")
    if args.expert_parallel and OBJECTIVES[args.objective].second_time and args.arch != "vae":
        raise ValueError(f"--expert-parallel: not with --objective {args.objective}, whose forward-mode "
                         "derivative PyTorch's exchange of tokens lacks; leave it out, and experts are "
                         "sharded as all weights are")
    if args.compile and args.tensor_parallel > 1 and OBJECTIVES[args.objective].second_time:
        raise ValueError(f"--compile: not with --tensor-parallel {args.tensor_parallel} and --objective "
                         f"{args.objective}, whose derivative takes another number of pictures in each step, "
                         "for which PyTorch does not compile layers that are cut; leave one of them out")


def check_aspect(args: argparse.Namespace) -> None:
    """Refuse what does not go with pictures of different sizes, and what is only for them."""
    if not args.aspect:
        if args.tokens:
            raise ValueError(f"--tokens {args.tokens}: belongs to --aspect; give --batch-size")
        if args.shift_tokens:
            raise ValueError(f"--shift-tokens {args.shift_tokens}: belongs to --aspect; where all pictures "
                             "have one size, give --shift")
        return
    if args.data in SOURCES and not SOURCES[args.data].endless:
        raise ValueError(f"--aspect: the pictures of --data {args.data} all have one size; leave it out, or "
                         "give a folder, shapes or corners")
    refused = {"crop": args.crop == "random" and "its pictures keep their shape, so there is nothing to crop",
               "conv": args.conv and "a convolution needs tokens of one grid",
               "reflow": args.reflow and "its pairs are of one size",
               "router": args.router in ("expert", "race") and "it chooses among the tokens of one picture; "
                         "use token",
               "objective": args.objective == "meanflow" and "its derivative needs a batch of one size; "
                            "use rf or ddpm"}
    for name, why in refused.items():
        if why:
            remedy = "" if name in ("objective", "router") else "; leave one of them out"
            raise ValueError(f"{shown(ROWS[name], args)} with --aspect: {why}{remedy}")
    if args.tokens and args.batch_size:
        raise ValueError(f"--batch-size {args.batch_size} with --tokens {args.tokens}: both say how much a "
                         "step takes; give one of them")
    if args.shift_tokens and args.shift:
        raise ValueError(f"--shift {args.shift:g} with --shift-tokens {args.shift_tokens}: the shift follows "
                         "the tokens, or is one for all; give one of them")


def resolve_conditioning(args: argparse.Namespace) -> None:
    row = ARCHITECTURES[args.arch]
    if args.published and published.MODELS[args.published].text and args.arch != "vae":
        if args.cond not in (None, "text"):
            raise ValueError(f"--cond {args.cond}: --published {args.published} is conditioned on text; "
                             "leave it out")
        args.cond = "text"
    if args.cond is None:
        captions_only = args.data in SOURCES and SOURCES[args.data].captions_only
        args.cond = "text" if args.arch == "unet" and captions_only else row.conditioning[0]
    if args.cond not in row.conditioning:
        others = [name for name in NETWORKS if args.cond in ARCHITECTURES[name].conditioning]
        where = f"--cond {args.cond} goes with --arch {' or '.join(others)}"
        if args.cond == "class":
            where += "; with --cond text, class names serve as captions where there are no others"
        raise ValueError(f"--cond {args.cond}: --arch {args.arch} takes --cond "
                         f"{' or '.join(row.conditioning)}; {where}")


def resolve_reflow(args: argparse.Namespace) -> None:
    if not args.reflow:
        for name in ("reflow_pairs", "reflow_cfg", "reflow_steps", "fresh"):
            if given(ROWS[name], args):
                raise ValueError(f"{shown(ROWS[name], args)}: belongs to --reflow RUN; give that too, or "
                                 "leave it out")
        return
    for name in ("flip", "published"):
        if given(ROWS[name], args):
            raise ValueError(f"{shown(ROWS[name], args)}: not with --reflow, which trains on the samples of "
                             "a run; leave it out")
    # The pairs are latents of that run's VAE, and its weights draw the first of the two flows.
    args.vae = args.vae or args.reflow
    if not args.fresh:
        args.init_from = args.init_from or args.reflow
    args.reflow_pairs = args.reflow_pairs or 20_000
    args.reflow_steps = args.reflow_steps or OBJECTIVES["rf"].steps
    if args.label_dropout is None:
        args.label_dropout = 0.0          # guidance is in the pairs already


def resolve_experts(args: argparse.Namespace) -> None:
    if not args.experts:
        for flag in EXPERTS:
            if given(flag, args):
                raise ValueError(f"{shown(flag, args)}: belongs to --experts N; give that too, or leave it "
                                 "out")
        return
    if args.conv:
        raise ValueError(f"--conv: not with --experts {args.experts}, whose tokens lie on no grid; leave one "
                         "out")
    defaults = dict(EXPERT_DEFAULTS)
    if args.router == "expert":
        if given(ROWS["balance"], args):
            raise ValueError(f"{shown(ROWS['balance'], args)}: --router expert is balanced as it is; leave "
                             "it out")
        del defaults["balance"]
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.top_k > args.experts:
        raise ValueError(f"--top-k {args.top_k}: there are only --experts {args.experts}; give at most that")


def check_published(args: argparse.Namespace) -> None:
    row = published.MODELS[args.published]
    objective = row.objective["name"]
    if row.arch not in ARCHITECTURES:
        raise ValueError(f"--published {args.published}: can be drawn with, by sample.py, but not trained; "
                         "leave it out")
    # A whole pipeline has its VAE and text encoders too. What is not there is refused where it is read.
    is_folder = args.init_from and not any(map(os.path.isfile, (args.init_from,
                                                                f"{args.init_from}/checkpoint.pt")))
    if row.text is not None and is_folder:
        args.vae = args.vae or args.init_from
    if not (args.init_from and args.vae):
        raise ValueError(f"--published {args.published}: needs --init-from FILE, its weights, and --vae PATH")
    if args.arch != row.arch or args.objective != objective:
        raise ValueError(f"--published {args.published}: is --arch {row.arch} --objective {objective}")
    taken = ()
    if row.text is not None:
        taken = ("text_encoder", "no_t5")
        if args.text_encoder is None and is_folder:
            args.text_encoder = f"{row.text}:{args.init_from}"
        if not (args.text_encoder or "").startswith(f"{row.text}:"):
            found = f"--init-from {args.init_from}"
            if args.text_encoder:
                found = f"--text-encoder {args.text_encoder}"
            raise ValueError(f"{found}: --published {args.published} takes its own text encoders; give "
                             f"--text-encoder {row.text}:FOLDER")
        if args.label_dropout is None and row.guidance == 1:
            args.label_dropout = 0.0          # it was not trained on the null condition, and needs none
    for flag in ROWS.values():
        if flag.settled and given(flag, args) and flag.key not in taken:
            raise ValueError(f"{shown(flag, args)}: settled by --published {args.published}; give one or the "
                             "other")


def fill_defaults(args: argparse.Namespace) -> None:
    row = SOUND_VAE if args.arch == "vae" and args.rate else ARCHITECTURES[args.arch]
    defaults = dict(row.defaults)
    if args.rate:
        defaults |= row.defaults_with_sound
    if args.label_dropout is None:
        args.label_dropout = 0.1
    # A VAE needs more only where there are other pictures; captions alone change nothing for it.
    if args.cond == "text" and (args.arch != "vae" or shows_other_pictures(args)):
        defaults |= row.defaults_with_text
    if args.init_from:
        defaults["lr"] = 1e-4             # a larger rate would undo what the weights have learned
    if args.arch == "vae":
        defaults |= SOUND_VAE_DEFAULTS if args.rate else VAE_DEFAULTS
    else:
        defaults["preset"] = "small"
        if args.objective == "meanflow":
            guided = args.cond != "none" and args.label_dropout > 0
            defaults["guidance"] = 1.5 if guided else 1.0
        if args.cond == "text":
            defaults["text_encoder"] = "bytes"
            defaults["prediction"] = OBJECTIVES[args.objective].prediction_with_text
        if args.schedule == "cosine":     # it ends at alpha = 5e-5, where eps says next to nothing about x0
            defaults["prediction"] = "v"
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.arch != "vae" and args.preset not in row.presets:
        raise ValueError(f"--preset {args.preset}: {args.arch} has {', '.join(row.presets)}")

    sides = args.image_size
    if sides is None:
        sides = [published.MODELS[args.published].side] if args.published else [32]
    args.image_size = [sides[0], sides[-1]]
    if args.name is None:
        args.name = f"{data_name(args)}-{args.arch}-{args.objective}"
        if args.arch == "vae":
            args.name = vae_name(args)


def shows_other_pictures(args: argparse.Namespace) -> bool:
    """Whether captions are asked for, from a source whose captioned pictures are others (shapes)."""
    return args.cond == "text" and args.data in SOURCES and SOURCES[args.data].load_captioned is not None


def data_name(args: argparse.Namespace) -> str:
    """The part of a run's name that stands for its pictures: networks with the same data_name share a VAE."""
    path = Path(args.data)
    if args.data.endswith(".tar"):        # a pattern is no name of a folder: the place of the shards is
        path = path.parent if path.parent.name else Path("shards")
    name = path.name or "data"
    if shows_other_pictures(args):
        name += "-text"
    if args.aspect:
        name += "-aspect"
    if args.rate:
        if (args.rate, args.seconds) != (RATE, SECONDS):
            name += f"-{args.seconds:g}s"
    elif args.image_size != [32, 32]:
        name += "-{}x{}".format(*args.image_size)
    return name


def vae_name(args: argparse.Namespace) -> str:
    """The name of the VAE run that precedes a network's."""
    return f"{data_name(args)}-vae"


def accepted(flag: Flag, value: object) -> bool:
    """Whether a command line could have set this value, read from a settings.json."""
    if flag.type is None:
        return isinstance(value, bool)
    if value is None:
        return flag.default is None and flag.key not in ALWAYS
    values = [value]
    if flag.nargs:
        values = value if isinstance(value, list) else []
    try:
        return 0 < len(values) <= (flag.most or len(values)) and all(
            type(part) in (str, int, float) and flag.type(str(part)) == part for part in values)
    except (ValueError, argparse.ArgumentTypeError):
        return False


def complete(found: dict, file: str) -> dict:
    """The settings of a settings.json as this version would have written them: a flag that did not exist then
    has its default. Raises ValueError where it has a setting that does not exist now, or a value that its
    flag does not accept."""
    for name, value in found.items():
        known = name in ROWS or name == "vae_name"         # derived from others; stored until 2026-11
        if not known and value is not None and value is not False:
            raise ValueError(f"{file}: its setting {name} {value} does not exist in this version; continue "
                             "it with the version that it began with, or use another --name")
        if name in ROWS and name not in RESUMABLE and not accepted(ROWS[name], value):
            raise ValueError(f"{file}: damaged, or of another version: its setting {name} is "
                             f"{json.dumps(value)[:80]}; restore it, or use another --name")
    if found.get("schedule") == "cosine" and found.get("prediction") is None:
        found = found | {"prediction": "eps"}              # its default until 2026-11
    if set(ROWS) <= set(found):
        return found
    args = make_parser("", FLAGS).parse_args([])
    vars(args).update({name: value for name, value in found.items() if name in ROWS})
    try:
        args.data = found["data"]          # its default is not what the run began with
        resolve(args)
        return {name: getattr(args, name) for name in ROWS} | found
    except (ValueError, KeyError, TypeError, AttributeError):
        missing = next(name for name in ("arch", "data", *ROWS) if name not in found)
        raise ValueError(f"{file}: damaged, or of another version: it lacks {missing}; restore it, or use "
                         "another --name") from None


def place(path: str) -> str:
    """One spelling of what is given as --vae: p, p/, ./p, /full/p and p/checkpoint.pt are the same run."""
    path = os.path.realpath(path)
    return os.path.dirname(path) if os.path.basename(path) == "checkpoint.pt" else path


def same_value(name: str, begun: object, now: object) -> bool:
    """Whether two values of a setting mean the same."""
    if begun == now or not (isinstance(begun, str) and isinstance(now, str)):
        return begun == now
    if name == "text_encoder":            # a frozen encoder may have moved; its files are compared later
        return begun.partition(":")[0] == now.partition(":")[0]
    if name == "data" and not {begun, now} & set(SOURCES) and not Path(begun).exists():
        return True                       # a folder that has moved; its pictures are compared later
    is_path = name in ("vae", "init_from", "reflow") or (name == "data" and not {begun, now} & set(SOURCES))
    return is_path and place(begun) == place(now)


def command(values: dict) -> str:
    """The command of train.py that trains with these settings."""
    words = ["--arch", values["arch"], "--data", values["data"], "--cond", values["cond"]]
    plain = parse(words)                  # what they are without further flags
    if parse(words[:4]).cond == values["cond"]:
        words = words[:4]
    for name, flag in ROWS.items():
        value = values[name]
        if name in ("arch", "data", "cond") or value in (getattr(plain, name), None, False):
            continue
        words.append(flag.name)
        if flag.type is not None:
            words += map(str, value) if isinstance(value, list) else [str(value)]
    return shlex.join(["python", "train.py", *words])


def vae_settings(args: argparse.Namespace, begun: dict | None,
                 is_finished: Callable[[], bool] = lambda: True) -> argparse.Namespace:
    """The settings of the VAE run that precedes a network's. begun: the settings of that run if it exists
    already. They are kept, whoever began it, provided that this command would train the same VAE, or train it
    for longer. is_finished: whether that run is, asked only for a refusal, as its checkpoint must be read."""
    folder = Path(args.runs_dir) / vae_name(args)
    result = make_parser("", FLAGS).parse_args(["--arch", "vae"])
    for name in ("data", "image_size", "aspect", "crop", "flip", "shuffle_shards", "precision", "seed",
                 *VAE_DEFAULTS):
        setattr(result, name, getattr(args, name))
    if args.rate:                         # which settle the size
        result.image_size, result.seconds = None, args.seconds
        result.rate = None if args.data in SOURCES else args.rate
    result.steps = args.vae_steps
    result.cond = "text" if shows_other_pictures(args) else "class"
    resolve(result)
    if begun is not None:
        if begun["arch"] != "vae":
            raise ValueError(f"{folder} holds a {begun['arch']}, where the VAE of this command belongs; it "
                             f"goes on by: {command(begun)}; give another --runs-dir, or --vae PATH")
        for name in SAME_VAE:
            before, now = begun[name], getattr(result, name)
            if name == "steps" and args.vae_steps and now > before:
                continue                  # it goes on
            if not same_value(name, before, now):
                theirs, ours = f"with {name} {before}", f"with {now}"
                if name == "steps":
                    theirs, ours = f"of {before} steps", f"of {now} (--vae-steps)"
                elif name in ("data", "image_size", "crop", *VAE_DEFAULTS):     # flags of this command too
                    theirs = f"with --{name.replace('_', '-')} {before}"
                remedy = f"that VAE is not finished, and goes on by: {command(begun)}"
                if is_finished():
                    remedy = f"give --vae {shlex.quote(str(folder))} to take it as it is"
                raise ValueError(f"{folder} holds a VAE {theirs}, where this command would train one {ours}; "
                                 f"{remedy}, or remove that folder to have it trained")
        steps = max(begun["steps"], result.steps if args.vae_steps else 0)
        vars(result).update(begun | {"steps": steps})
    for name in RESUMABLE:
        setattr(result, name, getattr(args, name))
    if args.aspect:
        result.shard, result.tensor_parallel = False, 1        # as plan.check_ranks says; it is small
    result.name = folder.name
    return result


# ---- from settings to configurations

def objective_config(args: argparse.Namespace) -> dict:
    """The objective's name and the options of its path, as the checkpoint stores them."""
    if args.published:
        row = published.MODELS[args.published]
        if row.shift_points is None:
            return row.objective
        height, width = args.image_size                    # a token is 16 x 16 pixels
        return row.objective | {"shift": flux_shift(height * width / 256, *row.shift_points)}
    config = {"name": args.objective}
    for flag in ROWS.values():
        value = getattr(args, flag.key)
        belongs = flag.option and args.objective in flag.needs.get("objective", (args.objective,))
        if belongs and value is not None:
            config[flag.option] = value
    return config


def vae_config(args: argparse.Namespace, image_channels: int) -> dict:
    """image_channels: of pictures; sounds are mono."""
    chosen = dict(SOUND_VAE_DEFAULTS if args.rate else VAE_DEFAULTS)
    for name in VAE_DEFAULTS:
        if getattr(args, name) is not None:
            chosen[name] = getattr(args, name)
    if args.rate:
        return audio_vae.PRESETS[chosen["vae_preset"]] | {
            "rate": args.rate, "channels": 1, "latent_channels": chosen["latent_channels"]}
    config = vae.PRESETS[chosen["vae_preset"]] | {"image_channels": image_channels,
                                                  "latent_channels": chosen["latent_channels"]}
    if chosen["vae_widths"]:
        config["widths"] = tuple(chosen["vae_widths"])
        groups = vae.VAEConfig(**config).groups
        if any(width % groups for width in config["widths"]):
            widths = " ".join(map(str, config["widths"]))
            raise ValueError(f"--vae-widths {widths}: each must be a multiple of {groups}")
    return config


def network_config(args: argparse.Namespace, latent_channels: int, condition) -> dict:
    """condition: an object of conditioning.py, which adds its part of the network's configuration."""
    preset = ARCHITECTURES[args.arch].presets.get(args.preset)
    if args.published:
        preset = published.MODELS[args.published].config
    config = preset | {"channels": latent_channels} | condition.network_options(args.arch, preset)
    if args.published and args.arch == "mmdit":
        config["guidance"] = preset.get("guidance", False)     # else of no network that is trained here
    if args.rate:
        config["longest"] = args.image_size[1] / args.rate
        if args.arch == "unet":
            config["strides"] = (1, 2)
        else:
            config["patch"] = (1, config.get("patch", (2, 2))[1])
    if args.patch:
        config["patch"] = (1 if args.rate else args.patch[0], args.patch[-1])
    if args.block == "published":
        config |= dit.PUBLISHED_BLOCK
    if args.conv:
        config["conv"] = True
    if OBJECTIVES[args.objective].second_time:
        config["second_time"] = True
    return config | expert_config(args)


def expert_config(args: argparse.Namespace) -> dict:
    return {name: getattr(args, name) for name in EXPERT_FIELDS} if args.experts else {}


def text_config(args: argparse.Namespace) -> dict | None:
    """The text encoder as the checkpoint stores it: its kind, with the built-in encoder's configuration or
    the frozen encoder's folder."""
    if args.arch == "vae" or args.cond != "text":
        return None
    kind, _, folder = args.text_encoder.partition(":")
    if kind == "bytes":
        return {"encoder": kind, "config": asdict(text.TextConfig(**text.PRESETS.get(args.preset, {})))}
    config = {"encoder": kind, "path": folder} if folder else {"encoder": kind}
    return config | {"no_t5": True} if args.no_t5 else config


def demo() -> None:
    """Print the settings of a command line of train.py."""
    args = parse(sys.argv[1:] or ["--arch", "dit", "--objective", "rf"])
    for title, flags in FLAGS.items():
        print(title)
        for flag in flags:
            print(f"  {flag.name:20s} {getattr(args, flag.key)}")
    if args.arch != "vae":
        print(f"objective: {objective_config(args)}")


if __name__ == "__main__":
    sys.exit(program("settings.py", demo))
