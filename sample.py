"""Draw pictures or sounds with a run or a published model: a grid, single files, an .npz for evaluation, or
a GIF of the steps.

    python sample.py runs/shapes-dit-rf --label red-circle --n 64 --steps 10 --cfg 2 --seed 0 --out grid.png
    python sample.py runs/shapes-dit-rf --n 50000 --batch-size 500 --out samples.npz
    python sample.py runs/tones-dit-rf --label low-square --n 8 --out low-square.wav
    python sample.py --published dit-xl-2-256 --weights DiT-XL-2-256x256.pt --vae sd-vae-ft-ema/ --n 1
    python sample.py --published sdxl --weights sd_xl_base_1.0.safetensors --tokenizer sdxl/ --prompt "a fox"

`main` loads a checkpoint, asks its conditioning for the conditions of all pictures, has draw.py draw them
batch by batch, and output.py write them. A sound is a picture one row high until its latent is decoded.
"""

from __future__ import annotations

import cli

cli.quiet_imports(__name__)             # before those that take seconds

import argparse
import math
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import attention
import conditioning
import published
from beginning import check_beginning, read_beginning, read_image, read_init_sound
from checkpoints import average_of_width, load_checkpoint, load_published
from cli import program
from conditioning import Asked
from draw import draw_batches, in_own_dtype, picture_bar
from files import digest, fingerprint_tensors
from guidance import build_guide, guidance_of, guidance_options, read_guide
from machine import check_compiler, check_room, memory, pick_device, precision_on
from media import Medium, medium_of
from networks import build_model, build_path, graphed, unpack_vae
from offload import Resident, Stage, visit_blocks
from output import check_size, write
from pictures import PICTURES, check_grid, enlargement, write_picture
from ranks import Ranks, launched
from sample_settings import (FLAGS, check_flags, check_medium, choose_sampler, chosen_size, fill_defaults,
                             multiple_of, parse_args, sampling_of, sampling_path)
from settings import ALL_ARCHITECTURES
from sound import write_wav
from times import TIMES
from vae import VAE
from weights import assign_weights, in_dtype, load_weights

SILENCE = 3.0              # seconds without output, after which a message names what is being done


# ---- from a checkpoint to a network on the device

@contextmanager
def announced(args: argparse.Namespace, what: str) -> Iterator[None]:
    """Print what is being done if it takes long, as reading gigabytes of a published model does."""
    timer = threading.Timer(SILENCE, lambda: print(f"{what} ...", file=sys.stderr))
    timer.daemon = True                                    # it must not keep a process that ends by an error
    if args.published:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def check_decoding(args: argparse.Namespace, size: tuple[int, int], vae: VAE, device: torch.device) -> None:
    """Refuse a batch that the VAE cannot decode in the memory of the device."""
    # Input and output, in fp32, of a convolution of the decoder's last level: the very least. An estimate
    # that is too low lets a large batch fail later; one that is too high would refuse what works.
    at_once = min(args.batch_size, args.n)
    pixels = at_once * math.prod(size)
    if args.tile:                                          # then one tile of one picture at a time
        pixels = min(pixels, args.tile**2)
    need = {f"decoding {at_once:,} {medium_of(vae.config).name}": pixels * vae.config.widths[0] * 2 * 4}
    remedy = "give a smaller one"
    if medium_of(vae.config).rate is None:                 # pictures can be decoded in tiles
        remedy = "give a smaller one, or --tile 512"
    check_room(f"--batch-size {args.batch_size}", need, memory(device), f"memory ({device.type})", remedy)


def read_network(args: argparse.Namespace) -> dict:
    """The checkpoint to draw with."""
    if args.published:                                     # in the form of a run's checkpoint
        return load_published(args.published, args.weights, args.vae)
    try:
        return load_checkpoint(args.run)
    except ValueError as error:
        models = published.models_in(args.run)             # perhaps a published model, without its flags
        if not models:
            raise
        raise ValueError(f"{args.run}: is no run, but holds the network of {' or '.join(models[:4])}; give "
                         f"--published {models[0]} --weights {args.run}") from error


def chosen_weights(args: argparse.Namespace, checkpoint: dict) -> dict:
    """The raw weights, their average, or one of another width."""
    if args.ema:                                           # made of several that the run has kept
        return average_of_width(args.run, checkpoint, args.ema)
    return checkpoint["model" if args.raw else "ema"]


def network_of(args: argparse.Namespace, checkpoint: dict, device: torch.device) -> torch.nn.Module:
    """The network with the weights asked for; a published one in the file's dtype, or that of --precision,
    and on the CPU, where its weights may still be mapped: see `set_stage`."""
    state = chosen_weights(args, checkpoint)
    what = args.run or args.weights
    if not args.published:
        model = build_model(checkpoint["arch"], checkpoint["config"], checkpoint["text"])
        return load_weights(model, state, what).to(device).eval()
    # A published one may be as large as the memory: never twice there, and refused where it does not fit.
    dtype = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, None: None}[args.precision]
    state = in_dtype(state, dtype)
    if args.offload != "blocks":
        need = {"the network": sum(weight.numel() * weight.itemsize for weight in state.values())}
        check_room(f"--published {args.published}", need, memory(device), f"memory ({device.type})",
                   "give --offload blocks, or --precision bf16")
    with torch.device("meta"):                             # the state's tensors become its weights
        model = build_model(checkpoint["arch"], checkpoint["config"])
    return assign_weights(model, state, what).eval().requires_grad_(False)


def check_encoders(args: argparse.Namespace, condition: conditioning.Conditioning,
                   device: torch.device) -> None:
    """Refuse text encoders of a published model that the device cannot hold."""
    if not isinstance(condition, conditioning.PublishedWords):
        return
    need = condition.encoder_bytes(args)                   # which also refuses what is not in the files
    if args.offload == "blocks":                           # one block at a time, which fits anywhere
        return
    remedy = "give --offload parts, or blocks"
    if args.offload == "parts" and need:                   # one at a time, so the largest decides
        largest = max(need, key=need.get)
        need = {largest: need[largest]}
        remedy = "give --offload blocks"
    check_room(f"--published {args.published}", need, memory(device), f"memory ({device.type})", remedy)


def set_stage(args: argparse.Namespace, checkpoint: dict, model: torch.nn.Module, vae: VAE,
              device: torch.device) -> Stage:
    """Network and VAE on the device, or with --offload only while they work."""
    tile = None
    if args.tile:                                          # a whole number of positions of the latent
        tile = args.tile // vae.factor * vae.factor
    if device.type == "cuda":                              # faster, at the precision asked for
        torch.backends.cuda.matmul.allow_tf32 = args.precision != "fp32"
        torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    if args.offload is None:
        for part in (model, vae):
            part.to(device)
            # The layout that convolutions prefer there; networks without any are not changed by it.
            if device.type == "cuda":
                part.to(memory_format=torch.channels_last)
        return Stage(device, tile=tile)
    if args.offload == "blocks":                           # the VAE is small: only its pictures are large
        visit_blocks(model, ALL_ARCHITECTURES[checkpoint["arch"]].blocks, device)
        return Stage(device, vae=Resident(vae, device), tile=tile)
    model.to("cpu")                                        # a run's network is on the device until here
    return Stage(device, Resident(model, device), Resident(vae, device), tile)


def callable_network(args: argparse.Namespace, model: torch.nn.Module, distilled: float | None) -> Callable:
    """The network as `draw` calls it, with latents in float32. distilled: the guidance scale among its
    inputs."""
    network = graphed(model) if args.compile else model
    network = in_own_dtype(network, next(model.parameters()).dtype)
    if distilled is None:
        return network

    # In place of the scale among the conditions, which is the one that training uses.
    def call(xt: Tensor, t: Tensor, **cond) -> Tensor:
        return network(xt, t, **cond | {"guidance": torch.full_like(t, distilled)})
    return call


# ---- what else there is to do

def settings_of(args: argparse.Namespace, model: torch.nn.Module, vae: VAE, asked: Asked,
                distilled: float | None) -> dict:
    """What decides the pictures besides the sampling: only with the same settings may they be continued."""
    # The batch size changes the last bits of a matrix product, and so may the compiler.
    flags = ("n", "seed", "batch_size", "precision", "compile", "negative_prompt", "shift")
    found = {flag: getattr(args, flag) for flag in flags}
    parts = [*asked.every.values(), *asked.each.values()]
    # What the files hold, not their names: a run that has been trained further is another network.
    found |= {"weights": fingerprint_tensors(model.state_dict()),
              "VAE": fingerprint_tensors(vae.state_dict()),
              "conditions": digest(asked.names, asked.turn.numpy(), *(part.cpu().numpy() for part in parts))}
    if asked.encode is not None:                           # too many prompts to encode all of them here
        first = asked.batch(0, 1)
        found["encoder"] = digest(*(part.cpu().numpy() for cond in first for part in cond.values()))
    return found | {"distilled": distilled, "tile": args.tile}


# ---- the run of a VAE, which draws nothing by itself

def files_to_reconstruct(args: argparse.Namespace, medium: Medium, size: tuple[int, int],
                         vae: VAE) -> list[str]:
    """Those of --init-image or --init-sound. Refuses all flags that only drawing has, and more than --out can
    hold."""
    begins = "--init-image"
    kinds = [*PICTURES]
    endings = ".png, .jpg or .webp"
    if medium.rate is not None:
        begins = "--init-sound"
        kinds.insert(0, ".wav")
        endings = f".wav, {endings}"
    # A flag without effect would be taken for one that works.
    taken = ("run", "raw", "init_image", "init_sound", "size", "out", "device")
    for flag in (flag for group in FLAGS.values() for flag in group):
        if flag.key not in taken and cli.given(flag, args) and getattr(args, flag.key) != flag.default:
            raise ValueError(f"{flag.name}: this run is a VAE, which reconstructs but does not draw; leave "
                             "it out")
    files = args.init_image or args.init_sound
    if not files:
        raise ValueError(f"{args.run}: this run is a VAE, which reconstructs but does not draw; give it "
                         f"{medium.name} by {begins} FILE, or give a run that draws")
    kind = Path(args.out).suffix.lower()
    if kind not in kinds:
        raise ValueError(f"--out {args.out}: a VAE's reconstruction is a {endings}")
    try:
        if kind in PICTURES:                               # a row of two for each file
            check_grid(kind, 2 * len(files), medium.cell(medium.shape(vae, size), True), 2, 1, 1)
    except ValueError:
        raise ValueError(f"--out {args.out}: {len(files):,} {medium.name} and their reconstructions are more "
                         f"than {kind} or the memory holds; give fewer by {begins}") from None
    return files


def reconstruct(args: argparse.Namespace, checkpoint: dict, device: torch.device) -> None:
    """Write each picture or sound that is given, and its reconstruction beside it."""
    vae = unpack_vae({"config": checkpoint["config"], "state": checkpoint["model" if args.raw else "ema"]})
    medium = medium_of(vae.config)
    check_medium(args, medium)
    size = tuple(checkpoint["data"]["size"])
    if medium.rate is None:
        size, _ = chosen_size(args, checkpoint, vae.factors, medium)
    files = files_to_reconstruct(args, medium, size, vae)
    if medium.rate is None:
        inputs = [read_image(file, size, vae.config.image_channels) for file in files]
    else:
        inputs = [read_init_sound(file, size[1], medium) for file in files]
    vae.to(device)
    pairs = []
    with torch.no_grad():
        for x in tqdm(inputs, desc="reconstruct", unit=medium.unit, delay=2, leave=False):
            pairs += [x, vae.decode(vae.encode(x.to(device)).mean).cpu()]
    arrays = medium.to_array(torch.cat(pairs))

    out = Path(args.out)
    if out.suffix.lower() == ".wav":                       # one after another, each with its reconstruction
        write_wav(out, np.concatenate(arrays), medium.rate)
    else:
        if medium.rate is None:
            zoom = enlargement(size[1])
            arrays = arrays.repeat(zoom, 1).repeat(zoom, 2)
        write_picture(out, medium.show(arrays, 2))
    print(args.out)


# ---- the program

def main(argv: list[str] | None = None) -> None:
    with launched() as ranks:              # one process, or those that torchrun has started
        run_command(argv, ranks)


def run_command(argv: list[str] | None, ranks: Ranks) -> None:
    """This process's part of the command."""
    args = parse_args(argv)
    check_flags(args, ranks)                               # what needs no file to be refused
    device = pick_device(args.device, ranks.local)
    args.precision = precision_on(device, args.precision)
    attention.check_choice()
    if args.compile:
        check_compiler(device)

    # ---- the checkpoint, and what the flags mean for it; nothing is built until they are checked
    with announced(args, f"reading {args.run or args.weights}"):
        checkpoint = read_network(args)
    if checkpoint["arch"] == "vae":                        # so few pictures that one process does them
        if ranks.first:
            reconstruct(args, checkpoint, device)
        return
    vae = unpack_vae(checkpoint["vae"])                  # the one that the network was trained on
    medium = medium_of(vae.config)
    check_medium(args, medium)
    check_beginning(args, medium)
    condition = conditioning.of_checkpoint(checkpoint, device)
    conditioning.check_flags(condition, args)
    fill_defaults(args, checkpoint, medium)                # those of the objective or the published model
    scale, distilled = guidance_of(args, condition, sampling_of(checkpoint))
    sampler, options = choose_sampler(args, checkpoint)
    size, tokens = chosen_size(args, checkpoint, multiple_of(checkpoint, vae), medium)
    condition.size = size                                  # SDXL is conditioned on it
    path = build_path(sampling_path(args, checkpoint, tokens))
    times = TIMES[args.times](path, args.steps)            # refuses more steps than the path has
    weaker = read_guide(args, checkpoint, vae)             # autoguidance: the checkpoint of --guide
    guidance = guidance_options(args, checkpoint, vae, times)
    check_size(args, medium.shape(vae, size), medium, args.steps)
    check_decoding(args, size, vae, device)
    check_encoders(args, condition, device)

    # ---- the network, the VAE and their inputs
    model = network_of(args, checkpoint, device)
    shape = vae.latent_shape(size)
    image, mask = read_beginning(args, size, vae, medium)
    with torch.no_grad(), announced(args, "loading text encoders"):
        asked = condition.ask(args, model)                 # encoders are gone before the rest needs room
    asked = condition.with_lengths(asked, args.seconds)    # of sounds
    with announced(args, f"loading the network to {device}"):
        stage = set_stage(args, checkpoint, model, vae, device)
    # Again, as only now the columns of the grid are known, and whether its pictures have captions.
    check_size(args, medium.shape(vae, size), medium, args.steps, asked.columns, bool(asked.captions))
    network = callable_network(args, model, distilled)
    guide = build_guide(args, weaker, condition, asked, device)
    skipped = None
    if args.skip_layers:                                   # guidance away from the network without them
        skipped = callable_network(args, model.without(tuple(args.skip_layers)), distilled)
    how = dict(sampler=sampler, steps=args.steps, scale=scale, rescale=args.rescale,
               interval=tuple(args.interval), times=args.times, strength=args.strength, **guidance, **options)

    written: list[int] = []                                # how many pictures, after each batch

    # A generator, so that each batch can be written before the next is drawn.
    def batches(first: int = 0, on_step: Callable | None = None) -> Iterator[np.ndarray]:
        first = ranks.highest(first)                       # only rank 0 knows how many are written already
        written.append(first)
        seeds = range(args.seed, args.seed + args.n)
        autocast = args.precision == "bf16" and not args.published       # which has its weights in bf16
        shown = scale if distilled is None else distilled
        with (picture_bar(args.n, first, desc=f"{sampler} x {args.steps}, guidance {shown:g}",
                          unit=medium.unit) as bar,
              torch.autocast(device.type, torch.bfloat16, enabled=autocast)):
            # Of each picture, the noise is drawn from its own seed, in whichever batch and process it is.
            for images in draw_batches(network, vae, path, shape, asked, seeds, args.batch_size, first,
                                       progress=lambda done: bar.update(done - bar.n),
                                       image=image, mask=mask, on_step=on_step, guide=guide,
                                       ranks=ranks, skipped=skipped, stage=stage, **how):
                yield images
                written.append(written[-1] + len(images))

    @cache                                                 # it reads all weights
    def settings() -> dict:
        decides = {"objective": checkpoint["objective"], "size": list(size), "device": device.type,
                   "guide": fingerprint_tensors(weaker["ema"]) if weaker else None,
                   "pictures": digest(*(part.numpy() for part in (image, mask) if part is not None))}
        return settings_of(args, model, vae, asked, distilled) | how | decides

    # ---- draw, and write on rank 0
    if ranks.size > 1:                                     # each draws a part, all of which must fit together
        ranks.agree(settings() | {"--out": args.out}, "start all with the same command, on the same files")
    if not ranks.first:
        list(batches())                                    # draws this rank's share, which rank 0 writes
        return
    write(args, batches, asked, medium, medium.shape(vae, size), settings, written)
    print(args.out)


if __name__ == "__main__":
    sys.exit(program("sample.py", main))
