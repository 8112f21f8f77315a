"""The plan of a training: everything that it needs, checked before anything is written.

    python plan.py --arch dit --objective rf           # what this train.py command line would do

`prepare` turns settings into a Plan: the run's folder, the device, the conditioning, the listing of the
pictures, the VAE or the settings to train one with, and initial weights. Whatever can be known to fail later
(a name that no disk takes, a size that the network does not divide, too little memory) is refused here, with
a ValueError of one line.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import attention
import conditioning
import ema
import machine
import moe
import published
import settings
from ahead import default_workers
from cache import PIECE
from checkpoints import load_checkpoint, load_vae
from cli import program
from conditioning import Conditioning
from cuts import check_tensor_parallel
from data import SOURCES, find_folder
from files import fresh_file, nearest_folder
from folder import RANDOM_CROPS, Folder
from media import medium_of
from networks import (build_model, build_path, checkpoint_blocks, config_of_vae, encoder_fingerprint,
                      latent_space, make_config, unpack_vae)
from ragged import fitted
from ranks import ALONE, Ranks
from run import Run
from settings import ARCHITECTURES
from shards import VAE_FILE, Shards
from vae import VAE
from weights import check_weights


@dataclass
class Plan:
    run: Run
    device: torch.device
    bf16: bool                                   # whether the network runs under bf16 autocast
    conditioning: Conditioning
    words: str | None                            # the text of each picture: "captions", "embeddings" or None
    cache_dir: Path                              # where decoded pictures and latents are
    finished: bool = False                       # no step is left, so the parts below are not set
    folder: Folder | Shards | None = None        # the listing of --data, if that is a folder, or shards
    vae: VAE | None = None                       # None until it has been trained
    vae_args: argparse.Namespace | None = None   # the settings to train it with
    initial: dict[str, Tensor] | None = None     # weights to start from
    initial_classes: list[str] | None = None     # the classes that they were trained on, if names are known
    reflow: dict | None = None                   # the checkpoint of the run that draws the pairs of --reflow
    pairs_stamp: dict | None = None              # what the pairs were drawn from, where this run goes on
    memory: int = 0                              # bytes that training needs at least
    ranks: Ranks = ALONE                         # the processes that share the training
    size: tuple[int, int] = (0, 0)               # of pictures; with --aspect, of a square one at the budget
    multiple: tuple[int, int] | None = None      # --aspect: of the sides, so the pixels of a token
    tokens: int = 0                              # --aspect: of a step
    pixels_at_once: int = 0                      # --aspect: what passes a VAE at a time, without gradients

    @property
    def number_format(self) -> str:
        return "bf16 autocast" if self.bf16 else "fp32"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def prepare(args: argparse.Namespace, folder: Folder | Shards | None = None, ranks: Ranks = ALONE) -> Plan:
    """The plan of a run, made without writing anything. folder: the listing of --data, if it was made before.
    ranks: the processes that share the training. Raises ValueError with a line for the user if something
    cannot work."""
    run = Run(Path(args.runs_dir) / args.name, writes=ranks.first)
    check_ranks(args, ranks)
    check_names({"--runs-dir": Path(args.runs_dir), "--cache-dir": Path(args.cache_dir or "."),
                 "--name": run.folder, "--data": Path(args.runs_dir) / settings.vae_name(args)})
    if args.keep_best and (run.folder / "best.pt").is_dir():
        raise ValueError(f"--keep-best: {run.folder / 'best.pt'} is a folder; remove it")
    run.check_settings(args)
    begun = run.load()
    if begun:
        check_begun(args, run, begun)
    device = machine.pick_device(args.device, ranks.local)
    attention.check_choice()
    if args.compile:
        machine.check_compiler(device)
    bf16 = machine.precision_on(device, args.precision) == "bf16"
    words = None
    if args.cond == "text":
        words = "embeddings" if args.text_encoder == "none" else "captions"
    cond = "none" if args.arch == "vae" else args.cond
    condition = conditioning.of_settings(cond, settings.text_config(args), args.label_dropout, device)
    if args.rate and args.arch != "vae":
        condition.longest = args.image_size[1] / args.rate
    if args.preview_prompts:
        condition.preview_prompts = conditioning.read_prompts("--preview-prompts", args.preview_prompts)
    plan = Plan(run, device, bf16, condition, words, run.folder, folder=folder, ranks=ranks)
    if begun and begun["training"]["finished"] and begun["step"] >= args.steps:
        earlier = run.read_settings() or {}
        for name in args.asked:
            if earlier.get(name) != getattr(args, name):
                flag = settings.ROWS[name]
                raise ValueError(f"{settings.shown(flag, args)}: {run.folder} is finished; it was trained "
                                 f"with {flag.name} {earlier.get(name)}; raise --steps to train on with "
                                 "another")
        plan.finished = True                               # said without the data or a VAE
        if args.arch == "vae" and args.aspect:             # of a VAE, the data are compared all the same
            config = config_of_vae(settings.vae_config(args, image_channels=3))
            plan_sizes(args, plan, [2 ** (len(config.widths) - 1)] * 2)
        return plan
    folders = {"--runs-dir": run.folder}
    if args.cache_dir:
        folders["--cache-dir"] = Path(args.cache_dir)
    check_folders(folders)
    plan.folder = check_shards(args, folder or find_folder(args.data, words, args.rate))

    vae_args = args
    initial = None
    if args.arch != "vae":
        build_path(settings.objective_config(args))        # refuses options that contradict each other
        if args.reflow:
            read_reflow(args, plan, begun)
        vae_args = choose_vae(args, plan, begun)
        if args.init_from and not begun:
            initial = read_initial(args)
            plan.initial = initial["ema"]
            plan.initial_classes = initial.get("data", {}).get("classes")
        condition.load_encoder(args.data, plan.folder)
    if args.cache_dir:
        plan.cache_dir = Path(args.cache_dir)
    check_folders({"--cache-dir": plan.cache_dir})
    vae_config = config_of_vae(settings.vae_config(vae_args, image_channels=3))
    if plan.vae:
        vae_config = plan.vae.config
    if medium_of(vae_config).rate != args.rate:
        what = f"--vae {args.vae}" if args.vae else f"the VAE in {plan.run.checkpoint}"
        theirs, ours = [f"sounds of {rate} Hz" if rate else "pictures"
                        for rate in (medium_of(vae_config).rate, args.rate)]
        raise ValueError(f"{what}: is for {theirs}, and --data {args.data} has {ours}; give another --vae, "
                         "or leave it out")
    if initial and "arch" in initial:                      # a run; a published file is what --published says
        check_initial(args, initial, plan)
    check_shapes(args, vae_config, condition, plan)
    condition.size = plan.size
    return plan


def check_ranks(args: argparse.Namespace, ranks: Ranks) -> None:
    """Refuse what these processes cannot share."""
    if args.shard and ranks.size == 1:
        flag = f"--tensor-parallel {args.tensor_parallel}" if args.tensor_parallel > 1 else "--shard"
        raise ValueError(f"{flag}: cuts the weights over several processes; start them with torchrun, or "
                         "leave it out")
    if ranks.size % args.tensor_parallel:
        raise ValueError(f"--tensor-parallel {args.tensor_parallel}: does not divide the {ranks.size} "
                         "processes; give a divisor, or 1")
    ranks.tensor = args.tensor_parallel
    if args.aspect and args.shard and args.arch == "vae":
        raise ValueError("--shard with --aspect: a VAE is called once for each size, not equally often in "
                         "all processes; leave --shard out")
    if args.expert_parallel and args.experts and args.experts % ranks.shares:
        raise ValueError(f"--expert-parallel: {ranks.shares} processes or groups of them cannot share "
                         f"--experts {args.experts}; give a multiple of {ranks.shares}")
    pieces = args.accumulate * ranks.shares
    packs = args.aspect and args.arch != "vae"             # its steps are of tokens: see plan_sizes
    if ranks.size > 1 and args.batch_size % pieces and not packs:
        each = f", each with {args.accumulate} pieces (--accumulate)," if args.accumulate > 1 else ""
        raise ValueError(f"--batch-size {args.batch_size}: {ranks.shares} processes or groups of them{each} "
                         f"cannot share it; give a multiple of {pieces}")


def check_begun(args: argparse.Namespace, run: Run, begun: dict) -> None:
    """Refuse a checkpoint that is not of this command's run, although settings.json is."""
    ours = settings.objective_config(args) if args.arch != "vae" else {}
    pairs = {"arch": (begun["arch"], args.arch)}
    objective = begun["objective"] or {}
    for name in {**ours, **objective}:                     # a switch that is off may be missing
        pairs[f"objective's {name}"] = (objective.get(name) or None, ours.get(name) or None)
    for name, (theirs, now) in pairs.items():
        if theirs != now:
            raise ValueError(f"{run.checkpoint}: its {name} is {theirs}, where {run.settings} says {now}; "
                             "restore the file that belongs to this run, or use another --name")


def choose_vae(args: argparse.Namespace, plan: Plan, begun: dict | None) -> argparse.Namespace:
    """Set the plan's VAE, or the settings to train it with, and the place of the caches. Returns the settings
    of that training."""
    vae_run = Run(Path(args.runs_dir) / settings.vae_name(args))
    named = args.vae is not None and settings.place(args.vae) == settings.place(str(vae_run.folder))
    if named or (args.vae is None and (vae_run.folder.is_dir() or not begun)):
        plan.cache_dir = vae_run.folder                    # shared by all networks on this VAE
    if isinstance(plan.folder, Shards) and plan.folder.manifest:
        plan.cache_dir = plan.run.folder                   # of the index of the shards, all that there is
        if not begun:
            plan.vae = vae_of_latents(args, plan.folder)
        else:
            plan.vae = unpack_vae(begun["vae"], str(plan.run.checkpoint))
        check_latents(args, plan)
    elif begun:
        # Its checkpoint holds the VAE, so a run goes on without the file or the folder that it came from.
        plan.vae = unpack_vae(begun["vae"], str(plan.run.checkpoint))
    elif args.vae:
        try:
            plan.vae = load_vae(args.vae, args.published)
        except ValueError as error:
            raise ValueError(f"--vae {error}") from None
        if args.published:
            published.check_vae(args.published, plan.vae, f"--vae {args.vae}")
    else:
        earlier = vae_run.read_settings()
        if earlier is not None:
            earlier = settings.complete(earlier, str(vae_run.settings))

        def is_finished() -> bool:
            saved = vae_run.load()
            return bool(saved and saved["training"]["finished"])

        plan.vae_args = settings.vae_settings(args, earlier, is_finished)
        return plan.vae_args
    return args


def check_shards(args: argparse.Namespace, listing: Folder | Shards | None) -> Folder | Shards | None:
    """Refuse flags that do not go with what --data names, and complete the listing of shards."""
    if not isinstance(listing, Shards):
        for name in ("shuffle_shards", "workers"):
            if settings.given(settings.ROWS[name], args) and args.arch in settings.ARCHITECTURES:
                raise ValueError(f"{settings.shown(settings.ROWS[name], args)}: is for tar shards, not "
                                 f"--data {args.data}; leave it out")
        return listing
    if args.aspect:
        raise ValueError(f"--aspect: is for pictures of a folder; those of the shards --data {args.data} are "
                         "cropped to --image-size; leave it out")
    manifest = listing.manifest
    if manifest is None:
        return listing._replace(workers=default_workers() if args.workers is None else args.workers)
    what = f"--data {args.data}: holds latents"
    if args.arch == "vae":
        raise ValueError(f"{what}, which train no VAE; give the pictures that they were encoded from")
    if list(args.image_size) != manifest["size"]:
        raise ValueError("{} of pictures of {}x{}; give --image-size {} {}".format(
            what, *manifest["size"], *manifest["size"]))
    if args.flip and manifest["flips"] != 2:
        raise ValueError(f"{what} without mirrored ones; leave --flip out, or encode with --flip")
    if args.crop != "centre":
        raise ValueError(f"--crop {args.crop}: {args.data} holds latents, cropped in the centre; leave it "
                         "out")
    return listing._replace(workers=default_workers() if args.workers is None else args.workers,
                            flip=args.flip)


def vae_of_latents(args: argparse.Namespace, shards: Shards) -> VAE:
    """--vae, or the copy that encode.py has put beside the shards."""
    for name in (*settings.VAE_DEFAULTS, "vae_steps"):
        if settings.given(settings.ROWS[name], args):
            raise ValueError(f"{settings.shown(settings.ROWS[name], args)}: --data {args.data} holds "
                             "latents of a VAE that is trained already; leave it out")
    place = args.vae or Path(shards.files[0]).parent / VAE_FILE
    try:
        return load_vae(place)
    except ValueError as error:
        if args.vae:
            raise ValueError(f"--vae {error}") from None
        raise ValueError(f"--data {args.data}: {error}; give the VAE by --vae PATH") from None


def check_latents(args: argparse.Namespace, plan: Plan) -> None:
    """Refuse a VAE that has not made the latents of --data."""
    manifest, vae = plan.folder.manifest, plan.vae
    if encoder_fingerprint(vae) != manifest["vae"]:
        what = f"--vae {args.vae}" if args.vae else f"{plan.run.checkpoint}"
        raise ValueError(f"{what}: is not the VAE that made the latents of --data {args.data} (encoded with "
                         f"{manifest['vae_path']}); give that one, or encode again with encode.py")


def read_reflow(args: argparse.Namespace, plan: Plan, begun: dict | None) -> None:
    """Set the plan's run to draw pairs with. Where this run goes on, its pairs are there, as a rule, and that
    run is not needed."""
    if begun:
        plan.pairs_stamp = begun["training"].get("pairs")
    try:
        theirs = load_checkpoint(args.reflow)
    except ValueError as error:
        if plan.pairs_stamp:
            return
        raise ValueError(f"--reflow {error}") from None
    what = f"--reflow {args.reflow}"
    name = theirs["objective"]["name"] if theirs["objective"] else theirs["arch"]
    if name != "rf":
        raise ValueError(f"{what}: is a run of {name}; give one of --objective rf")
    if theirs["text"] is not None:
        raise ValueError(f"{what}: is conditioned on text; give one with --cond class or none")
    if "aspect" in theirs["data"]:
        raise ValueError(f"{what}: draws pictures of different sizes; give one without --aspect")
    if list(theirs["data"]["size"]) != args.image_size:
        raise ValueError("{}: draws pictures of {}x{}; give --image-size {} {}".format(
            what, *theirs["data"]["size"], *theirs["data"]["size"]))
    reflow_scale(args, theirs, conditioning.of_checkpoint(theirs, plan.device))
    # By default --vae is the same run, which need not be read again.
    own = settings.place(args.vae) == settings.place(args.reflow)
    if not own and latent_space(load_vae(args.vae)) != latent_space(unpack_vae(theirs["vae"])):
        raise ValueError(f"{what}: its samples are latents of another VAE than --vae {args.vae}; leave --vae "
                         "out")
    plan.reflow = theirs


def reflow_scale(args: argparse.Namespace, theirs: dict, condition: Conditioning) -> float:
    """The guidance of the pairs of --reflow. theirs, condition: the checkpoint of the run that draws them and
    its conditioning."""
    scale = args.reflow_cfg
    if scale is None:
        scale = settings.OBJECTIVES[theirs["objective"]["name"]].scale if condition.guidable else 1.0
    if scale != 1 and not condition.guidable:
        raise ValueError(f"--reflow-cfg {scale:g}: {args.reflow} has no unconditional branch to guide with; "
                         "give 1")
    return scale


def read_initial(args: argparse.Namespace) -> dict:
    """What --init-from names: the checkpoint of a run of this project, or {"ema": the weights of a published
    file, under our names}."""
    path = Path(args.init_from)
    try:
        checkpoint = load_checkpoint(path)
    except ValueError as error:
        if not args.published or not path.exists():
            raise ValueError(f"--init-from {error}") from None
        return {"ema": published.read_network(args.published, args.init_from)}
    if checkpoint["arch"] != args.arch:
        raise ValueError(f"--init-from {args.init_from}: is a {checkpoint['arch']}, not a {args.arch}")
    if args.published and checkpoint["objective"] != settings.objective_config(args):
        raise ValueError(f"--init-from {args.init_from}: was trained with {checkpoint['objective']}, not as "
                         f"--published {args.published}")
    return checkpoint


def check_initial(args: argparse.Namespace, initial: dict, plan: Plan) -> None:
    """Refuse the weights of a run in which they meant something else. Shapes alone would not show it."""
    def refuse(theirs: str, ours: str, remedy: str) -> None:
        raise ValueError(f"--init-from {args.init_from}: its weights were trained {theirs}, not {ours}; "
                         f"{remedy}")

    # ---- what the network returns; densities and weights of the loss may differ, as they change no meaning
    theirs, ours = initial["objective"], settings.objective_config(args)
    row = settings.OBJECTIVES[args.objective]
    grows = row.grows_from is not None and theirs["name"] == row.grows_from
    if grows:                                              # with a second time, which has no effect at first
        theirs = theirs | {"name": args.objective}
    for name, default in (("name", None), ("schedule", "scaled_linear")):
        pair = [objective.get(name, default) for objective in (theirs, ours)]
        if pair[0] != pair[1]:
            flag = "--objective" if name == "name" else f"--{name}"
            refuse(f"with {flag} {pair[0]}", pair[1], f"give {flag} {pair[0]}")
    before, now = build_path(initial["objective"]).prediction, build_path(ours).prediction
    if before != now:
        refuse(f"to predict {before}", now, f"give --prediction {before}")

    # ---- what its numbers mean: the configuration, the text encoder and the latents
    config = settings.network_config(args, initial["config"].get("channels", 4), plan.conditioning)
    kind = ARCHITECTURES[args.arch].config
    before, now = [make_config(args.arch, kind, values) for values in (initial["config"], config)]
    dense = args.experts and not before.experts            # every expert begins as the MLP
    if dense and now.expert_ratio != now.mlp_ratio:
        refuse("without experts", "with", f"give --expert-ratio {now.mlp_ratio:g}, for experts of that width")
    for field in fields(kind):
        pair = [getattr(values, field.name) for values in (before, now)]
        if field.name in ("num_classes", "channels") or (field.name == "second_time" and grows):
            continue                                       # checked by their shapes; begins without effect
        if dense and field.name in settings.EXPERT_FIELDS:
            continue
        if pair[0] != pair[1]:
            refuse(f"with {field.name} {pair[0]}", pair[1], flag_of(args.arch, field.name, before))
    text = plan.conditioning.text
    if text and initial["text"] and text["encoder"] != "none":       # vectors differ with the pictures
        encoders = [part["encoder"] for part in (initial["text"], text)]
        prints = [initial.get("training", {}).get("encoder"), plan.conditioning.fingerprint]
        if encoders[0] != encoders[1] or initial["text"].get("config") != text.get("config"):
            refuse(f"with the text encoder {encoders[0]}", f"{encoders[1]} as it is here",
                   "give that encoder")
        if None not in prints and prints[0] != prints[1]:
            refuse("with other files of the text encoder", "these", "give the files of that run")
    vae = plan.vae
    if plan.vae_args is not None:
        trained = Run(Path(plan.vae_args.runs_dir) / plan.vae_args.name)
        if trained.checkpoint.is_file():
            vae = load_vae(trained.folder)
    if vae is None or latent_space(vae) != latent_space(unpack_vae(initial["vae"])):
        refuse("on the latents of another VAE", "of this one", f"give --vae {shlex.quote(args.init_from)}")


def flag_of(arch: str, name: str, config) -> str:
    """The remedy where a field of this configuration differs: the flag that makes it so."""
    values = asdict(config)
    if name == "patch":
        return f"give --patch {' '.join(map(str, dict.fromkeys(config.patch)))}"
    if name == "conv":
        return f"{'give' if config.conv else 'leave out'} --conv"
    if name in settings.EXPERT_FIELDS:
        flag = f"--{name.replace('_', '-')}"
        return f"leave out {flag}" if values[name] in (0, None) else f"give {flag} {values[name]}"
    if name in settings.dit.PUBLISHED_BLOCK and arch == "dit":
        published_block = all(values[key] == value for key, value in settings.dit.PUBLISHED_BLOCK.items())
        return f"give --block {'published' if published_block else 'modern'}"
    for preset, fixed in ARCHITECTURES[arch].presets.items():
        fixed = {key: value for key, value in fixed.items()
                 if key not in ("patch", "conv", *settings.dit.PUBLISHED_BLOCK)}
        if all(values[key] == value for key, value in fixed.items()):
            return f"give --preset {preset}"
    return "give the flags of that run"


def fit_weights(model: torch.nn.Module, state: dict[str, Tensor], what: str, theirs: list[str] | None = None,
                ours: list[str] | None = None, initial: Mapping | None = None) -> dict[str, Tensor]:
    """The state to load into this model. It must fit exactly, except for a table of embeddings of classes.
    theirs, ours: the names of the classes of the state and of the model. Where both are known, each class
    takes the row of its name, and a new one keeps the model's own initial values; the last row, of the null
    class, is always taken. Otherwise the table is taken as it is, or left out where its size differs.
    initial: the model's own state, where it has no memory for one."""
    own = model.state_dict() if initial is None else initial
    state = moe.upcycled(model, state, own)                # a copy; dense layers where this has experts
    for name in own:                                       # a second time, where the state has one only
        if name.startswith("gap_embed") and name not in state:
            state[name] = own[name]
    for name in ("y_embedder.embedding_table.weight", "class_embedding.weight"):
        if name not in own:
            state.pop(name, None)
        elif name in state and theirs and ours and theirs != ours:
            rows = own[name].clone()
            if state[name].shape[1:] != rows.shape[1:]:    # refused below
                continue
            rows[-1] = state[name][-1]
            for i, label in enumerate(ours):
                if label in theirs:
                    rows[i] = state[name][theirs.index(label)]
            state[name] = rows
            new = [label for label in ours if label not in theirs]
            kept = f"{len(ours) - len(new):,} of {len(ours):,} classes keep their embedding"
            first = ", ".join(new[:8]) + (", ..." if len(new) > 8 else "")
            print(f"{what}: {kept}{'; new: ' if new else ''}{first}")
        elif name not in state or state[name].shape != own[name].shape:
            state[name] = own[name]
    check_weights(model, state, what)
    return state


def check_shapes(args: argparse.Namespace, vae_config, condition: Conditioning, plan: Plan) -> None:
    """Build the networks on the meta device, which takes no memory, and check that the downsampling and the
    patches divide both sides of the pictures, so that errors appear before minutes are spent on the VAE."""
    with torch.device("meta"):
        autoencoder = network = build_model("vae", asdict(vae_config))
        factors = {"VAE": autoencoder.factors}
        if args.arch != "vae":
            config = settings.network_config(args, vae_config.latent_channels, condition)
            network = build_model(args.arch, config, condition.text)
            if plan.initial is not None:
                fit_weights(network, plan.initial, args.init_from)
            factors[args.arch] = network.factors if args.arch == "unet" else network.config.patch
    need = [math.prod(pair[axis] for pair in factors.values()) for axis in (0, 1)]
    plan.size = tuple(args.image_size)
    if args.aspect:
        plan_sizes(args, plan, need)
    elif any(side % multiple for side, multiple in zip(args.image_size, need)):
        if args.rate:
            raise ValueError(f"--seconds {args.seconds:g}: {args.image_size[1]:,} samples at {args.rate} Hz "
                             f"are not a multiple of {need[1]}; give --seconds "
                             f"{-(-args.image_size[1] // need[1]) * need[1] / args.rate:g}, or a shorter "
                             "--patch")
        why = ", ".join(f"{name} {h}x{w}" for name, (h, w) in factors.items())
        raise ValueError("--image-size {} {}: height must be a multiple of {} and width of {} ({})".format(
            *args.image_size, *need, why))
    if args.arch != "vae":
        check_tensor_parallel(network, ARCHITECTURES[args.arch].blocks, plan.ranks.tensor)
    check_size(args, plan, autoencoder, network)


def plan_sizes(args: argparse.Namespace, plan: Plan, need: list[int]) -> None:
    """Set what --aspect needs. need: the multiples of the sides, which make up a token."""
    if args.arch == "vae":                                 # those of a network with the usual patch
        need = [2 * side for side in need]
    pixels = math.prod(args.image_size)
    try:
        plan.size = fitted(args.image_size, pixels, tuple(need))
    except ValueError as error:
        raise ValueError("--image-size {} {} with --aspect: {}; give a larger one".format(
            *args.image_size, error)) from None
    plan.multiple = tuple(need)
    full = pixels // math.prod(need)                       # no picture has more tokens
    plan.tokens = args.tokens or args.batch_size * full
    # A step may have almost a picture less than its budget, and every piece of it needs one.
    pieces = args.accumulate * plan.ranks.shares
    least = full if pieces == 1 else 2 * pieces * full
    if plan.tokens < least:
        what = f"--tokens {args.tokens}" if args.tokens else f"--batch-size {args.batch_size}"
        among = f" in {pieces} pieces" if pieces > 1 else ""
        raise ValueError(f"{what}: {plan.tokens:,} tokens a step{among} are too few for pictures of up to "
                         f"{full:,}; give --tokens {least} or more")
    times = 1 if args.grad_checkpoint else 4               # see tasks.at_once
    plan.pixels_at_once = min(PIECE, max(1, times * plan.tokens // pieces) * math.prod(need))


def data_changed(args: argparse.Namespace, run: Run, finished: bool) -> str:
    """What to do where --data is no longer what the run began with. Pictures concern the VAE, which comes
    first; where only captions have changed, the VAE accepts them."""
    what = "pictures or captions" if args.cond == "text" and args.arch != "vae" else "pictures"
    message = f"--data {args.data}: its {what} are not those that {run.folder} began with"
    folder = shlex.quote(str(run.folder))
    if args.arch != "vae":
        return (f"{message}; --vae {folder} --name NEW trains another network on them with the same VAE; or "
                "restore them")
    again = settings.command(vars(args) | {"name": f"{args.name}-2"})
    message += "; "
    if finished:
        message += f"--vae {folder} --name NEW keeps the VAE as it is; or "
    return message + (f"restore them, or train a VAE on them by: {again}, then give the network --vae "
                      f"{shlex.quote(f'{run.folder}-2')} --name NEW")


# ---- the machine and its folders

def check_names(folders: dict[str, Path]) -> None:
    """Refuse names that file systems do not take, by their flag: 255 bytes a name, and 4,096 a path, are the
    limits of most."""
    for flag, folder in folders.items():
        longest = max(folder.parts, key=lambda part: len(os.fsencode(part)), default="")
        if len(os.fsencode(longest)) > 255:
            raise ValueError(f"{flag}: {longest[:40]}...: a name of {len(longest)} letters is too long for a "
                             "folder; give a shorter one")
        if len(os.fsencode(folder.absolute())) > 4000:     # the rest is for the files in it
            raise ValueError(f"{flag}: {str(folder)[:40]}...: a path of {len(str(folder))} letters is too "
                             "long; give a shorter one")


def check_folders(folders: dict[str, Path]) -> None:
    """Refuse folders that cannot be made or written, by their flag."""
    for flag, folder in folders.items():
        place = folder.absolute()
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir():
            raise ValueError(f"{flag}: {place} is not a folder; give another {flag}")
        if not os.access(place, os.W_OK | os.X_OK):
            raise ValueError(f"{flag}: {place} is read-only here; give another {flag}")
        try:
            fresh_file(place / "file").unlink()            # /proc says that it can be written
        except OSError as error:
            raise ValueError(f"{flag}: no file can be created in {place} ({error.strerror}); give another "
                             f"{flag}") from None


class _Attention(torch.autograd.Function):
    """Stands for the kernels of attention, which keep their inputs and output but no weights of N x N."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


class _WithoutKernels(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


def kept_bytes(model: torch.nn.Module, forward: Callable[[int], object], device: str = "meta") -> int:
    """What the backward pass keeps of each example, found without data or memory: forward(B) runs a model of
    the meta device, or of another under FakeTensorMode, on a batch of B. Tables that all examples share are
    not counted, nor weights."""
    weights = {part.untyped_storage()._cdata for part in (*model.parameters(), *model.buffers())}
    totals = []
    for count in (1, 2):
        kept: dict[int, torch.UntypedStorage] = {}         # each once, however many layers keep it

        def keep(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage
            return x

        with (torch.device(device), _WithoutKernels(),
              torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)):
            result = forward(count)                        # holds on to what was kept
        totals.append(sum(storage.nbytes() for storage in kept.values()))
        del result
    return totals[1] - totals[0]


def bytes_per_picture(args: argparse.Namespace, model: torch.nn.Module, size: tuple[int, int],
                      latent: tuple[int, ...], condition: Conditioning) -> int:
    """What training keeps of each picture, in fp32. model: on the meta device; latent: (C, h, w)."""
    def forward(count: int) -> object:
        if args.arch == "vae":                 # not `loss`: autocast does not know the meta device
            if args.rate:
                return (model.encoder(torch.empty(count, model.config.channels, size[1])),
                        model.decoder(torch.empty(count, latent[0], latent[2])))
            return (model.encoder(torch.empty(count, model.config.image_channels, *size)),
                    model.decoder(torch.empty(count, *latent)))
        cond = {}
        if args.cond == "text":                # a few words; pooled only where the network takes it
            cond["context"] = torch.empty(count, 8, condition.widths.context)
            if model.config.pooled_width is not None:
                cond["pooled"] = torch.empty(count, model.config.pooled_width)
            if getattr(model.config, "guidance", False):
                cond["guidance"] = torch.empty(count)
        elif model.config.num_classes:
            cond["y"] = torch.zeros(count, dtype=torch.long)
        if model.config.longest:
            cond["seconds"] = torch.empty(count)
        return model(torch.empty(count, *latent), torch.empty(count), **cond)

    if args.grad_checkpoint:
        checkpoint_blocks(model)
    try:
        return kept_bytes(model, forward)
    except (RuntimeError, ValueError, TypeError):          # sizes that overflow: the input alone
        return 4 * math.prod(latent)


def check_size(args: argparse.Namespace, plan: Plan, autoencoder: VAE, network: torch.nn.Module) -> None:
    """Refuse what the machine cannot hold. The estimates are lower bounds: what is refused could not work."""
    height, width = plan.size
    pixels = height * width
    latent = autoencoder.latent_shape(plan.size)
    shards = isinstance(plan.folder, Shards)
    count = SOURCES[args.data].fewest if args.data in SOURCES else 20_000
    if plan.folder:
        # Shards are not read yet: each has a picture at least.
        count = len(plan.folder.files if shards else plan.folder.pictures) * (RANDOM_CROPS
                                                                              if args.crop == "random" else 1)
    parameters = sum(p.numel() for p in network.parameters())
    pictures = {f"{count:,} pictures of {height} x {width}": count * pixels}
    if args.rate:
        pictures = {f"{count:,} sounds of {args.seconds:g} s": 2 * count * width}
    have = machine.memory(plan.device)

    # ---- memory of the device: 4 bytes a weight for value, gradient, AdamW's two moments, and each average
    for trained, model in ((plan.vae_args, autoencoder), (args, network)):
        if trained is None:                                # no VAE is trained first
            continue
        piece = trained.batch_size // trained.accumulate // plan.ranks.shares
        if args.aspect and trained.arch != "vae":          # as many tokens as so many full pictures
            share = plan.tokens // trained.accumulate // plan.ranks.shares
            piece = max(1, share // (pixels // math.prod(plan.multiple)))
        batch = piece * bytes_per_picture(trained, model, plan.size, latent, plan.conditioning)
        if plan.bf16:
            batch //= 2                                    # autocast keeps most in bf16
        if trained.compile:
            batch //= 2                                    # a compiled block keeps less, computes it again
        weights = 4 * (4 + len(ema.widths_kept(trained.ema))) * sum(p.numel() for p in model.parameters())
        if trained.shard:
            weights //= plan.ranks.size
        need = {"the weights and their optimizer": weights,
                f"a batch of {piece:,}": batch}
        if plan.device.type == "cpu" and not plan.folder:  # a folder's pictures are memory-mapped
            need |= pictures
        plan.memory = sum(need.values())
        what = "this training" if trained is args else "training the VAE first"
        machine.check_room(what, need, have, f"memory ({plan.device.type})",
                            "give a smaller --image-size, --batch-size or network")
    if not plan.folder:
        machine.check_room("this training", pictures, machine.memory(torch.device("cpu")), "memory",
                            "give a smaller --image-size")

    # ---- the disk: a checkpoint is replaced by a second one, and caches are kept
    need = {"two checkpoints": 2 * 4 * (3 + len(ema.widths_kept(args.ema))) * parameters}
    decoded, each = ("images.npy", 3 * pixels) if args.rate is None else ("sounds.npy", 2 * width)
    if plan.folder and not shards and not (plan.cache_dir / decoded).is_file():
        need[f"{count:,} decoded {medium_of(autoencoder.config).name}"] = each * count
    encoded = shards and plan.folder.manifest
    # mean and deviation in fp16, mirrored or not
    if not encoded and not (plan.cache_dir / "latents.npy").is_file():
        flips = 2 if args.flip else 1
        need["latents"] = 4 * count * flips * math.prod(latent)
    rows = plan.conditioning.rows_stored
    if rows and plan.folder and not list(plan.cache_dir.glob("text-*.bin")):         # in fp16
        captions = len(set(plan.folder.words))
        need[f"{captions:,} encoded captions"] = 2 * captions * rows * plan.conditioning.widths.context
    place = nearest_folder(plan.cache_dir)
    machine.check_room("this training", need, shutil.disk_usage(place).free, f"the disk of {place}",
                        "give another --runs-dir or --cache-dir, or a smaller --image-size")


def demo() -> None:
    """Print what a command line of train.py would do."""
    args = settings.parse(sys.argv[1:] or ["--arch", "dit", "--objective", "rf"])
    plan = prepare(args)
    print(f"{plan.run.folder}: {args.arch} on {plan.device.type}, {plan.number_format}")
    if plan.finished:
        print("it is finished")
    elif plan.vae_args is not None:
        vae = Run(Path(plan.vae_args.runs_dir) / plan.vae_args.name)
        print(f"first, the VAE of {vae.folder}: {plan.vae_args.steps:,} steps, unless they are done")


if __name__ == "__main__":
    sys.exit(program("plan.py", demo))
