"""sample.py's flags, what they mean for a checkpoint, and refusals of what cannot work.

    python sample_settings.py             # what is chosen where a flag is not given, and what is refused

`check_flags` refuses what no checkpoint could do, before a file is opened. All else depends on the
checkpoint: its path decides which solvers, times and shifts there are, its network and its VAE which sizes.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch

import conditioning
from beginning import seconds_begun
from cli import Flag, integer, make_parser, nonempty, number, one_of
from ema import WIDEST
from files import check_writable
from media import Medium, Pictures, medium_of
from networks import build_model
from output import check_folders
from pictures import PICTURES
from ranks import ALONE, Ranks
from samplers import SAMPLERS
from settings import ALL_OBJECTIVES, SIZE, published_model
from times import ONLY, TIMES, flux_shift
from vae import VAE

PRECISIONS = ("auto", "fp32", "tf32", "bf16")
# Flags that are options of samplers, and those samplers. Without --sampler, the flag means the first of them.
CHURNED = ("heun",)
MULTISTEP = ("dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "dpmpp_3m_sde", "unipc_2", "unipc_3")
SAMPLER_OPTIONS = {"eta": ("ddim", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_sde", "dpm2_ancestral"),
                   "variance": ("ddpm",), "noise": ("reverse_sde",),
                   "churn": CHURNED, "churn_min": CHURNED, "churn_max": CHURNED, "churn_noise": CHURNED,
                   "lower_order_final": MULTISTEP, "as_published": ("dpmpp_3m", "dpmpp_3m_sde")}

FLAGS = {
    # Either a run, or a published model: see `check_flags`.
    "what to draw with": [
        Flag("run", "run folder, or a checkpoint file", nonempty, nargs="?"),
        Flag("--published", "instead of a run: a published model, like sdxl, flux-dev or dit-xl-2-256 "
                            "(python published.py lists them)", published_model, metavar="NAME"),
        Flag("--weights", "the published model's weights: .pt, .ckpt or .safetensors, or a diffusers folder",
             nonempty, metavar="PATH"),
        Flag("--vae", "the published model's VAE: a file, or a diffusers folder (default: with the weights)",
             nonempty, metavar="PATH"),
        Flag("--raw", "the run's raw weights, not their average"),
        Flag("--ema", "width of the average, relative to the training: made of those that the run has kept "
                      "(default: the --ema of the training)", number(0, WIDEST, above=True), metavar="WIDTH"),
    ],
    "what to draw": [
        Flag("--n", "how many pictures or sounds (default: 64; with a published model, one for each prompt)",
             integer(1, 10**8)),
        # What a run is conditioned on decides which of these it takes.
        *(Flag(name, **{"type": str} | fields) for name, fields in conditioning.FLAGS.items()),
        Flag("--size", "height and width of the pictures (default: those of the training; of --aspect, a "
                       "square)", integer(1, SIZE), nargs=2, metavar=("H", "W")),
        Flag("--init-image", "begin with this picture instead of noise; the run of a VAE reconstructs all "
                             "pictures given here", nonempty, nargs="+", metavar="FILE"),
        Flag("--init-sound", "begin with this sound (.wav, ...) instead of noise; the run of a VAE "
                             "reconstructs all sounds given here", nonempty, nargs="+", metavar="FILE"),
        Flag("--seconds", "length of each sound (default: lengths that occur in training; with "
                          "--init-sound, that of the file)",
             number(0.01, 3600), metavar="S"),
        Flag("--strength", "time at which sampling begins with --init-image or --init-sound: 0 keeps it, 1 "
                           "is noise alone. At 0.6 a fifth of the pictures may not yet show what was asked "
                           "for; at 0.9 little of the picture is left (default: 0.8; 1 where there is a "
                           "--mask)", number(0, 1)),
        Flag("--mask", "draw only where this picture is white (needs --init-image); of sounds, only between "
                       "two times in seconds, like 0.5-1.2 (needs --init-sound)", nonempty,
             metavar="FILE"),
        Flag("--seed", "picture i is drawn with seed + i (default: 0)", integer(-10**18, 10**18), 0),
        Flag("--out", "NAME.png, .jpg or .webp: one grid; NAME.gif: the steps from noise; NAME.npz: arr_0, "
                      "uint8 NHWC; a folder: single PNGs (default: samples.png). Sounds: NAME.wav: one after "
                      "another (default: samples.wav); .png, .jpg, .webp, .gif: their spectrograms; .npz: "
                      "int16 NT; a folder: single WAVs. After an interruption, the same command continues an "
                      ".npz or a folder", nonempty),
    ],
    "how": [
        Flag("--cfg", "guidance scale: 1 conditional, 0 unconditional, above 1 guided; of flux-dev, an input "
                      "of the network (default: 2 where the run was trained for guidance, else 1; 1 for "
                      "meanflow, which has learned its guidance; a published model's own)",
             number(-1e6, 1e6)),
        Flag("--guide", "autoguidance: instead of the unconditional branch, guide by this checkpoint of a "
                        "run, like an earlier one (checkpoint-STEP.pt of train.py --keep)", nonempty,
             metavar="CHECKPOINT"),
        Flag("--sampler", f"{', '.join(SAMPLERS)} (default: heun for rf, ddim for ddpm, jump for meanflow; a "
                          "published model's own)", one_of(SAMPLERS)),
        Flag("--steps", "intervals (default: 10 for rf, 50 for ddpm, 1 for meanflow; a published model's "
                        "own)", integer(1, 10**5)),
        Flag("--times", "spacing of the steps: even, log-snr, karras, beta; ddpm also leading, linspace, "
                        "beta-sigma, sd, sdxl; rf also sd3: see times.py (default: even; a published "
                        "model's own)", one_of(TIMES)),
        Flag("--shift", "rf: shift of the sampling times (default: that of the training, or of a published "
                        "model)", number(0, 1e9, above=True)),
        Flag("--interval", "times between which guidance acts (default: 0 1)", number(0, 1), (0.0, 1.0),
             nargs=2, metavar=("LOW", "HIGH")),
        Flag("--cfg-channels", "guide only the first N channels of the latent, as DiT's authors do with 3 "
                               "(default: all)", integer(1, 10**4), metavar="N"),
        Flag("--skip-layers", "mmdit: skip-layer guidance, away from what the network draws without these "
                              "joint blocks, counted from 0; 7 8 9 for Stable Diffusion 3.5 medium",
             integer(0, 10**4), nargs="+", metavar="BLOCK"),
        Flag("--skip-scale", "scale of skip-layer guidance (default: 2.8)", number(-1e6, 1e6)),
        Flag("--skip-steps", "shares of the steps between which it acts (default: 0.01 0.2)", number(0, 1),
             nargs=2, metavar=("FROM", "TO")),
        Flag("--rescale", "how much of the contrast that guidance adds is removed again (default: 0)",
             number(0, 1), 0.0),
        Flag("--eta", "ddim, dpmpp_sde, dpmpp_2m_sde, dpmpp_3m_sde, dpm2_ancestral: 0 deterministic to 1 "
                      "ancestral (default: 0 for ddim, 1 for the others)", number(0, 1)),
        Flag("--variance", "ddpm: variance of each step: small (default), large, or learned (default of a "
                           "published DiT)",
             one_of(("small", "large", "learned"))),
        Flag("--noise", "reverse_sde: how much noise is added (default: 1; 0 is the ODE)", number(0, 100)),
        Flag("--churn", "heun: how much fresh noise is added in all, spread over the steps (S_churn of "
                        "Karras et al. 2022; default: 0)", number(0, 1e6)),
        Flag("--churn-min", "heun: least sigma / alpha at which --churn acts (default: 0)", number(0, 1e9)),
        Flag("--churn-max", "heun: largest sigma / alpha at which --churn acts (default: no limit)",
             number(0, 1e9)),
        Flag("--churn-noise", "heun: standard deviation of the noise of --churn (default: 1)", number(0, 10)),
        Flag("--lower-order-final", "dpmpp_2m, dpmpp_3m, their sde variants, unipc_2, unipc_3: the order "
                                    "falls to 1 over the last steps, as in diffusers below 15 steps"),
        Flag("--as-published", "dpmpp_3m, dpmpp_3m_sde: half of the curvature, as in the authors' code, "
                               "which costs one order"),
    ],
    "machine": [
        Flag("--batch-size", "pictures at a time (default: 64); affects only speed", integer(1, 10**6), 64),
        Flag("--compile", "torch.compile the network; on CUDA, as graphs"),
        Flag("--device", "auto (default), cpu, cuda, cuda:1, mps", nonempty, "auto"),
        Flag("--precision", "precision of the network: fp32 (default of runs), tf32, bf16, or auto, which is "
                            "bf16 where the hardware multiplies it and fp32 elsewhere; a published network "
                            "by default runs in the precision of its file. The VAE runs in fp32, or in tf32 "
                            "on CUDA unless this is fp32", one_of(PRECISIONS)),
        Flag("--offload", "keep text encoders, network and VAE on the CPU except while they work (parts), or "
                          "even each of their blocks (blocks)", one_of(("parts", "blocks"))),
        Flag("--tile", "encode and decode large pictures in tiles with sides of so many pixels, with "
                       "blended seams",
             integer(64, 2**15), metavar="PIXELS"),
    ],
}


# ---- flags, whatever they are used on

def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("Draw pictures or sounds with a run of train.py, or with a published model.", FLAGS)
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace, ranks: Ranks = ALONE) -> None:
    """Refuse flags that contradict each other, whatever the run."""
    # Where the output goes is checked first, so that nothing is drawn that cannot be written.
    if args.out is not None:
        check_out(Path(args.out))
        if Path(args.out).suffix.lower() == ".gif" and ranks.size > 1:
            raise ValueError(f"--out {args.out}: a .gif is drawn by one process; start it with python")

    # Either a run, whose checkpoint holds everything, or a published model, whose parts may lie anywhere. A
    # forgotten quotation mark makes a run of a prompt's second word, which deserves a hint.
    if args.run is not None and args.published:
        raise ValueError(f"{args.run} with --published {args.published}: a run or a published model, not "
                         "both (a prompt of several words needs quotation marks)")
    mixed = args.run is not None and (args.weights is not None or args.vae is not None)
    incomplete = args.run is None and (args.published is None or args.weights is None)
    if mixed or incomplete:
        behind = ""
        if args.init_image and len(args.init_image) > 1:
            behind = "; --init-image takes all names behind it, so name a run before it"
        raise ValueError(f"give a run, or --published NAME with its --weights PATH{behind}")
    for flag, value in (("--raw", args.raw), (f"--ema {args.ema}", args.ema)):
        if value and args.published:
            raise ValueError(f"{flag} with --published {args.published}: a published file has one set of "
                             "weights")
    if args.raw and args.ema:
        raise ValueError(f"--raw with --ema {args.ema}: the weights themselves, or an average; give one")

    # What cannot go together whatever the network is refused here, before a file is opened.
    sampler_options(args)
    low, high = args.interval                              # each in [0, 1], by its type
    if not low < high:
        raise ValueError(f"--interval {low:g} {high:g}: two times between 0 and 1, the lower one first")
    if args.compile and args.offload:
        raise ValueError(f"--compile with --offload {args.offload}: what is compiled stays on the device; "
                         "give one of them")
    for flag, value in (("--strength", args.strength), ("--mask", args.mask)):
        if value is not None and not (args.init_image or args.init_sound):
            raise ValueError(f"{flag} {value}: needs --init-image FILE, the picture to begin with, or "
                             "--init-sound FILE")


def check_out(out: Path) -> None:
    """Refuse a file or folder that cannot be written."""
    kind = out.suffix.lower()                              # "" for a folder
    if kind not in (*PICTURES, ".npz", ".gif", ".wav", ""):
        raise ValueError(f"--out {out}: must end in {', '.join(PICTURES)}, .npz, .gif or, of sounds, .wav, "
                         "or name a folder")
    check_folders(out, bool(kind))
    check_writable(out)
    if out.exists() and out.is_dir() == bool(kind):        # a name without an ending means a folder
        found = "folder" if kind else "file"
        raise ValueError(f"--out {out}: there is a {found} of that name; choose another")


def who(args: argparse.Namespace) -> str:
    """The network, as messages name it."""
    return args.published or "this run"


def check_medium(args: argparse.Namespace, medium: Medium) -> None:
    """Refuse flags of the other medium, and set --out where it was not given."""
    remedies = {"init_sound": "give --init-image", "seconds": "give --size"}
    if medium.rate is not None:
        remedies = {"init_image": "give --init-sound", "size": "give --seconds", "tile": "leave it out"}
    for name, remedy in remedies.items():
        value = getattr(args, name)
        if value is not None:
            words = " ".join(map(str, value if isinstance(value, list) else [value]))
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} {words}: {who(args)} draws {medium.name}; {remedy}")
    if args.out is None:
        args.out = "samples.png" if medium.rate is None else "samples.wav"
        check_out(Path(args.out))
    if Path(args.out).suffix.lower() == ".wav" and medium.rate is None:
        raise ValueError(f"--out {args.out}: {who(args)} draws pictures; give {', '.join(PICTURES)}, .npz, "
                         ".gif or a folder")


# ---- solvers

def sampling_of(checkpoint: dict) -> dict:
    """The checkpoint's defaults of sampler, steps, scale and times: those of its objective, or of the
    published model."""
    row = ALL_OBJECTIVES[checkpoint["objective"]["name"]]
    # Of a published model, all of these are replaced at the end.
    defaults = {"sampler": row.sampler, "steps": row.steps, "scale": row.scale, "times": "even"}
    if checkpoint["config"].get("guidance"):               # of a run that began with FLUX.1-dev
        defaults["distilled"] = conditioning.DISTILLED
    return defaults | checkpoint.get("sampling", {})


def fill_defaults(args: argparse.Namespace, checkpoint: dict, medium: Medium) -> None:
    """Set what depends on the network: how many pictures or sounds, how long these are, and how they are
    sampled."""
    defaults = sampling_of(checkpoint)
    args.times = args.times or defaults["times"]
    args.steps = args.steps or defaults["steps"]
    if args.n is None:
        args.n = 64
        if args.published:                                 # each picture may take minutes
            args.n = len(args.prompt) if args.prompt else 1
    if not args.published:                                 # else None: as the file has it
        args.precision = args.precision or "fp32"
    if args.strength is None:
        args.strength = 1.0 if args.mask else 0.8          # within a mask, begin with noise alone
    if args.init_sound and args.seconds is None:
        args.seconds = seconds_begun(args, checkpoint["data"]["size"][1], medium)


def sampler_options(args: argparse.Namespace) -> tuple[str | None, dict]:
    """The sampler asked for, or the one whose option was given, or None; and its options."""
    sampler = args.sampler
    options = {}
    # Every option that was given, whether or not its sampler was.
    for name, owners in SAMPLER_OPTIONS.items():
        value = getattr(args, name)
        if value is None or value is False:
            continue
        if sampler is None:                                # the option implies its sampler
            sampler = owners[0]
        if sampler not in owners:                          # by --sampler, or by the option of another
            flag = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            raise ValueError(f"{flag}: belongs to --sampler {' or '.join(owners)}, not {sampler}")
        options[name] = value
    # The other three of churn only say where and how it acts.
    for name, value in options.items():
        if name.startswith("churn_") and "churn" not in options:
            raise ValueError(f"--{name.replace('_', '-')} {value:g}: says how --churn acts; give that too")
    return sampler, options


def choose_sampler(args: argparse.Namespace, checkpoint: dict) -> tuple[str, dict]:
    """The sampler asked for or implied, or the network's default; and its options. Refuses what does not go
    with its objective."""
    objective = checkpoint["objective"]
    sampler, options = sampler_options(args)
    if sampler is None:
        # Only the default comes with it: --sampler ddpm may ask for the plain one.
        sampler = sampling_of(checkpoint)["sampler"]
        if sampler == "ddpm" and objective.get("learned_variance"):        # as DiT's authors draw
            options["variance"] = "learned"
    # The straight path has no thousand steps from which a spacing could choose, the other ones no shift.
    path = "rf" if objective["name"] == "meanflow" else objective["name"]
    if ONLY.get(args.times, path) != path:
        raise ValueError(f"--times {args.times}: a spacing of the {ONLY[args.times]} path; {who(args)} is on "
                         f"the path of {path}")
    # jump reads the mean velocity between two times, which only MeanFlow's networks are given.
    if sampler == "jump" and not ALL_OBJECTIVES[objective["name"]].second_time:
        raise ValueError(f"--sampler jump: needs a run of --objective meanflow; this one is of "
                         f"{objective['name']}")
    if args.variance == "learned" and not objective.get("learned_variance"):
        what = args.run or args.weights
        raise ValueError(f"--variance learned: {what} was not trained to predict a variance")
    return sampler, options


def sampling_path(args: argparse.Namespace, checkpoint: dict, tokens: float = 1) -> dict:
    """The objective that is sampled with: the checkpoint's own, its shift replaced by --shift or, where the
    shift depends on a picture's tokens, by that for `tokens`. The shift moves only the times at which the
    network is evaluated. Raises ValueError on a path that has no shift."""
    objective = checkpoint["objective"]
    points = sampling_of(checkpoint).get("shift_points")
    # Larger pictures need more noise to hide as much, so the shift may grow with their tokens.
    if points is not None:
        objective = objective | {"shift": flux_shift(tokens, *points)}
    base = objective.get("shift_tokens")
    if base is not None:
        objective = {name: value for name, value in objective.items() if name != "shift_tokens"}
        objective["shift"] = (tokens / base) ** 0.5        # as rectified_flow.RectifiedFlow.shift_of
    if args.shift is None:
        return objective
    if objective["name"] != "rf":
        raise ValueError(f"--shift {args.shift:g}: of the times of rf; {who(args)} is on the path of "
                         f"{objective['name']}; leave it out")
    return objective | {"shift": args.shift}


# ---- sizes

def multiple_of(checkpoint: dict, vae: VAE) -> tuple[int, int]:
    """What the sides of a network's pictures must be multiples of."""
    if checkpoint["arch"] == "unet":
        with torch.device("meta"):                         # only its number of levels is needed
            unet = build_model("unet", checkpoint["config"], checkpoint["text"])
        p, q = unet.factors
    elif medium_of(vae.config).rate is None:
        p, q = checkpoint["config"].get("patch", (2, 2))
    else:
        p, q = checkpoint["config"].get("patch", (1, 1))
    return vae.factors[0] * p, vae.factors[1] * q


def of_many_shapes(checkpoint: dict, size: tuple[int, int]) -> bool:
    """Whether a published model was trained on pictures like this: those of 1024 x 1024 pixels were, in many
    aspect ratios."""
    side = checkpoint["data"]["size"][0]
    # a quarter more or fewer pixels, as the sizes of their training differ
    return "sampling" in checkpoint and side == 1024 and 0.8 < math.prod(size) / side**2 < 1.25


def chosen_size(args: argparse.Namespace, checkpoint: dict, multiple: tuple[int, int],
                medium: Medium) -> tuple[tuple[int, int], float]:
    """--size, or the size of the training, and its tokens, of a `multiple` each; of sounds, see
    chosen_length. Raises ValueError for sides that the network cannot have, and says where it was trained on
    others."""
    if medium.rate is not None:
        return chosen_length(args, checkpoint, multiple[1], medium.rate)
    data = checkpoint["data"]
    size = tuple(args.size or data["size"])
    if any(side % part for side, part in zip(size, multiple)):
        raise ValueError("--size {} {}: height must be a multiple of {} and width of {}".format(
            *size, *multiple))
    if checkpoint["config"].get("position_table"):         # of published models: one row per patch
        largest = [checkpoint["config"]["sincos"][1] * part for part in multiple]
        if any(side > most for side, most in zip(size, largest)):
            raise ValueError("--size {} {}: the network has positions for sides of at most {}".format(
                *size, min(largest)))
    # ---- other sizes than those of the training work, and the user is told that they are others
    trained = None
    if "aspect" in data:
        low, high = data["aspect"]["smallest"], data["aspect"]["largest"]
        pixels = data["aspect"]["pixels"]
        if math.prod(size) > pixels or any(not a <= side <= b for side, a, b in zip(size, low, high)):
            trained = "heights of {} to {}, widths of {} to {} and at most {:,} pixels".format(
                low[0], high[0], low[1], high[1], pixels)
    elif size != tuple(data["size"]) and not of_many_shapes(checkpoint, size):
        trained = "{}x{} only".format(*data["size"])
    if trained:
        print(f"--size {size[0]} {size[1]}: {who(args)} was trained on {trained}; other "
              "sizes work, but may look worse", file=sys.stderr)
    return size, math.prod(size) / math.prod(multiple)


def chosen_length(args: argparse.Namespace, checkpoint: dict, multiple: int,
                  rate: int) -> tuple[tuple[int, int], float]:
    """The size (1, T) of sounds that are --seconds long, and its tokens. At least that of the training, as
    silence follows what is shorter; says where a sound is longer than those were."""
    length = checkpoint["data"]["size"][1]
    if args.seconds is not None and args.seconds * rate > length:
        longest = length / rate
        print(f"--seconds {args.seconds:g}: {who(args)} was trained on sounds of at most {longest:g} "
              "seconds; longer ones work, but may sound worse", file=sys.stderr)
        length = math.ceil(args.seconds * rate / multiple) * multiple
    return (1, length), length / multiple


def demo() -> None:
    runs = {"a run of rf": {"name": "rf"}, "a run of ddpm": {"name": "ddpm", "prediction": "v"}}
    given = ("", "--sampler euler --steps 25", "--eta 0.5", "--sampler heun --eta 0.5", "--shift 3",
             "--times sd")
    for what, objective in runs.items():
        checkpoint = {"objective": objective, "config": {}, "arch": "dit"}
        for flags in given:
            args = parse_args(["runs/demo", *flags.split()])
            try:
                fill_defaults(args, checkpoint, Pictures())
                sampler, options = choose_sampler(args, checkpoint)
                shift = sampling_path(args, checkpoint).get("shift", 1)
                chosen = f"{sampler} {options or ''}".strip()
                print(f"{what} {flags}: {chosen}, {args.steps} steps, {args.times}, shift {shift:g}")
            except ValueError as error:
                print(f"{what} {flags}: refused, {error}")


if __name__ == "__main__":
    demo()
