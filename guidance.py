"""What steers a sampling besides its conditions, as sample.py's flags ask for it: classifier-free guidance
(--cfg; Ho & Salimans 2022), by a weaker network (--guide; Karras et al. 2024, arXiv:2406.02507), away from
what the network draws without some of its blocks (--skip-layers), or the scale that a distilled network takes
as an input. samplers.guided combines the outputs; here it is decided which, and refused what cannot be.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from checkpoints import load_checkpoint
from conditioning import Asked, Conditioning, guidance_scale
from draw import Guide, Skip
from networks import build_model, build_path, graphed, latent_space, unpack_vae
from times import interval_of_steps
from vae import VAE
from weights import load_weights


def guidance_of(args: argparse.Namespace, condition: Conditioning,
                defaults: dict) -> tuple[float, float | None]:
    """The scale of classifier-free guidance; and the scale that is an input of a distilled network, which has
    no other guidance, or None. defaults: those of sampling with this network."""
    if defaults.get("distilled") is None:
        return guidance_scale(condition, args, defaults["scale"]), None
    # One evaluation a step, and no second output: what acts on the difference of two has nothing to act on.
    given = {"--interval": tuple(args.interval) != (0, 1), "--rescale": args.rescale, "--guide": args.guide,
             "--cfg-channels": args.cfg_channels, "--negative-prompt": args.negative_prompt is not None}
    for flag, is_given in given.items():
        if is_given:
            raise ValueError(f"{flag}: acts on guidance between two outputs, where this network was "
                             "distilled: its scale (--cfg) is an input; leave it out")
    if args.cfg is not None and args.cfg < 0:
        raise ValueError(f"--cfg {args.cfg:g}: the guidance that is an input of this network is at least 0")
    # The sampler sees scale 1, a network that is not guided; the input has its effect inside.
    return 1.0, defaults["distilled"] if args.cfg is None else args.cfg


def guidance_options(args: argparse.Namespace, checkpoint: dict, vae: VAE, times: Tensor) -> dict:
    """What guidance is to do besides its scale, as arguments of `draw`. times: of the sampling. Refuses what
    this network cannot, and what would have no effect."""
    found = {}
    network = args.published or "this run"
    # ---- guidance of a part of the channels
    if args.cfg_channels:
        if args.cfg_channels > vae.config.latent_channels:
            raise ValueError(f"--cfg-channels {args.cfg_channels}: the latent of {network} has "
                             f"{vae.config.latent_channels}")
        found["channels"] = args.cfg_channels
    # ---- skip-layer guidance; its two other flags mean nothing without it
    given = {"scale": args.skip_scale, "steps": args.skip_steps}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if not args.skip_layers:
            raise ValueError(f"--skip-{name}: says how --skip-layers acts; give that too")
    if not args.skip_layers:
        return found
    layers = "--skip-layers " + " ".join(map(str, args.skip_layers))
    depth = checkpoint["config"].get("depth", 0)
    if checkpoint["arch"] != "mmdit":
        raise ValueError(f"{layers}: only mmdit has blocks to skip; {network} is a "
                         f"{checkpoint['arch']}")
    if max(args.skip_layers) >= depth:                     # single blocks are not counted
        raise ValueError(f"{layers}: this network has joint blocks 0 to {depth - 1}")
    start, stop = given.get("steps", (0.01, 0.2))
    if not start < stop:
        raise ValueError(f"--skip-steps {start:g} {stop:g}: two shares between 0 and 1, the lower one first")
    if args.cfg == 0:
        raise ValueError(f"{layers} with --cfg 0: steers the conditional output, which scale 0 does not use")
    # With few steps, none may begin between the shares, and nothing would be skipped.
    if interval_of_steps(times, start, stop) == (0.0, 0.0):
        raise ValueError(f"{layers}: none of {len(times) - 1} steps begins between the shares {start:g} and "
                         f"{stop:g}; give more --steps, or others by --skip-steps")
    found["skip"] = Skip(tuple(args.skip_layers), given.get("scale", 2.8), start, stop)
    return found


def read_guide(args: argparse.Namespace, checkpoint: dict, vae: VAE) -> dict | None:
    """The checkpoint of --guide. Refuses one whose output is not that of the run's network under the same
    conditions, so that their difference would mean nothing."""
    if args.guide is None:
        return None
    try:
        guide = load_checkpoint(args.guide)
    except ValueError as error:
        what = "; a guide is a run of train.py" if args.published else ""
        raise ValueError(f"--guide {error}{what}") from None

    whose = args.published or "the run"
    remedy = "give an earlier checkpoint of the run, or a smaller network trained like it"
    if args.published:                                     # which has no earlier checkpoints
        remedy = "give a run that was trained like it, as one that began with it (train.py --published)"

    def refuse(what: str, theirs: object, ours: object) -> None:
        raise ValueError(f"--guide {args.guide}: {what} {theirs}, where {whose} has {ours}; {remedy}")

    # ---- the path and what is predicted along it, as x0 and eps of both are subtracted at one xt and t
    if guide["arch"] == "vae":
        refuse("is a VAE", "alone", f"a {checkpoint['arch']}")
    # Names may differ where the functions are the same, so the paths are compared by what they compute.
    paths = [build_path(part["objective"]) for part in (guide, checkpoint)]
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)    # every time at which the path of ddpm is defined
    schedules = [torch.stack(path.alpha_sigma(t)) for path in paths]
    names = [part["objective"]["name"] for part in (guide, checkpoint)]
    if names[0] != names[1]:
        refuse("was trained with --objective", *names)
    if not torch.equal(*schedules):
        refuse("was trained on", "a path with another noise schedule", "its own")
    for name in ("prediction", "learned_variance"):
        theirs, ours = (getattr(path, name, False) for path in paths)        # rf has no variance to learn
        if theirs != ours:
            refuse(f"its {name.replace('_', ' ')} is", theirs, ours)
    sizes = ["{}x{}".format(*part["data"]["size"]) for part in (guide, checkpoint)]
    if sizes[0] != sizes[1]:
        refuse("draws pictures of", *sizes)
    # ---- conditions: the same kind, in the same words or numbers
    kinds = [(part["text"] or {}).get("encoder", "none at all") for part in (guide, checkpoint)]
    if kinds[0] != kinds[1]:
        refuse("its text encoder is", *kinds)
    if guide["data"]["classes"] != checkpoint["data"]["classes"]:
        theirs, ours = (", ".join(part["data"]["classes"][:4]) or "none" for part in (guide, checkpoint))
        refuse("its classes are", theirs, ours)
    if kinds[1] not in ("bytes", "none at all"):           # encoder outputs, which both networks are given
        widths = [[part["config"].get(name) for name in ("context_width", "pooled_width")]
                  for part in (guide, checkpoint)]
        # the fingerprint of the encoder's files; unknown for exported and published networks
        encoders = [(part.get("training") or {}).get("encoder") for part in (guide, checkpoint)]
        if widths[0] != widths[1] or (None not in encoders and encoders[0] != encoders[1]):
            refuse("takes text vectors of", "another encoder", "those of its own")
    # ---- the latents: a sum of two latents means something in one space only
    if latent_space(unpack_vae(guide["vae"])) != latent_space(vae):
        refuse("was trained on the latents of", "another VAE", "its own")
    return guide


def build_guide(args: argparse.Namespace, checkpoint: dict | None, condition: Conditioning,
                asked: Asked, device: torch.device) -> Guide | None:
    """The network of --guide, with averaged weights, and its conditions. checkpoint: of `read_guide`."""
    if checkpoint is None:
        return None
    # It need not have the run's architecture. What is weaker about it is its training or size, so it is drawn
    # with averaged weights too, which --raw and --ema do not change.
    model = build_model(checkpoint["arch"], checkpoint["config"], checkpoint["text"])
    load_weights(model, checkpoint["ema"], args.guide).to(device).eval()
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
    return Guide(graphed(model) if args.compile else model, condition.ask_again(asked, model))
