"""Score a run on the built-in tones: how many samples have the pitch and timbre, or the events, asked for?

    python benchmarks/tones.py runs/tones-dit-rf                         (from the repository's root)
    python benchmarks/tones.py runs/tones-dit-rf --listen                # also tones.wav, pictures/tones.png
    python benchmarks/tones.py runs/tones-text-mmdit-rf                  # captions, of no training sound

`tones.read_tone` and `read_events` read them back from the samples. Of a run of classes, it is also measured
whether the samples end when they should. Of one with captions, the prompts are those of the validation part.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import listen
from benchmarks.samples import drawn, network_run
from cli import Parser, integer, number, program
from conditioning import Asked, of_checkpoint
from settings import ALL_OBJECTIVES
from tones import PITCHES, RATE, TIMBRES, TONE_CLASSES, Tone, describe_events, follows, read_tone

# Relative to a sound's loudest 10 ms; what is quieter counts as silence. Drawn tones fade to it at most 30 ms
# before their end, and 46 ms after the autoencoder.
QUIET = 0.03
NEAR = 0.05             # seconds


def draw(args: argparse.Namespace, *more: str) -> np.ndarray:
    """The sounds that sample.py draws with these flags, (N, T) int16."""
    return drawn([args.run, "--n", str(args.n), "--sampler", args.sampler, "--steps", str(args.steps),
                  "--cfg", str(args.cfg), *more])


def lengths_asked(checkpoint: dict, count: int) -> np.ndarray:
    """(count,) seconds that sample.py asks for with the classes in turn."""
    condition = of_checkpoint(checkpoint, torch.device("cpu"))
    return condition.with_lengths(Asked(torch.arange(count) % len(TONE_CLASSES), {}, [])).seconds


def ends(sounds: np.ndarray, rate: int = RATE) -> np.ndarray:
    """(N,) seconds from which on sounds (N, T) int16 are QUIET; 0 for silence."""
    width = rate // 100
    count = sounds.shape[1] // width
    parts = sounds[:, :count * width].reshape(-1, count, width) / 32768
    loudness = np.square(parts).mean(2) ** 0.5
    loud = loudness > QUIET * loudness.max(1, keepdims=True)
    return np.where(loud, np.arange(1, count + 1), 0).max(1) * width / rate


def level_after(sound: np.ndarray, seconds: float, rate: int = RATE) -> float:
    """The root mean square of what follows these seconds, in dB relative to that of what precedes."""
    power, end = np.square(sound / 32768), round(seconds * rate)
    least = 1e-10           # below what 16 bits hold; without it, there would be no level of digital silence
    return float(10 * np.log10((power[end:].mean() + least) / (power[:end].mean() + least)))


def score_lengths(sounds: np.ndarray, checkpoint: dict, rate: int) -> None:
    """Of the samples as they are drawn, in the whole window: sample.py cuts them where it writes .wav."""
    lengths = lengths_asked(checkpoint, len(sounds))
    near = np.abs(ends(sounds, rate) - lengths) <= NEAR
    levels = [level_after(sound, seconds, rate) for sound, seconds in zip(sounds, lengths)]
    print(f"  {near.sum()} of {len(near)} ({near.mean():.1%}) end within {1000 * NEAR:.0f} ms of the length "
          f"asked for; the level after it is {np.median(levels):.0f} dB in the median, and "
          f"{np.quantile(levels, 0.9):.0f} dB or more in a tenth of them")


def score_classes(args: argparse.Namespace, checkpoint: dict, rate: int) -> None:
    sounds = draw(args)
    seen = [read_tone(sound, rate) for sound in sounds]
    asked = [Tone(*TONE_CLASSES[i % len(TONE_CLASSES)].split("-")) for i in range(args.n)]
    right = sum(a == b for a, b in zip(seen, asked))
    print(f"{args.run}: {right} of {args.n} ({right / args.n:.1%}) have the pitch and timbre asked for; "
          f"{args.sampler} x {args.steps}, guidance {args.cfg:g}")
    for field, names in (("pitch", PITCHES), ("timbre", TIMBRES)):
        for name in names:
            hits = [getattr(s, field, None) == name for s, a in zip(seen, asked) if getattr(a, field) == name]
            print(f"  {name:9s} {sum(hits)} of {len(hits)}")
    score_lengths(sounds, checkpoint, rate)
    if args.listen:                                        # one of each class; behind each, the silence goes
        one = sounds[:len(TONE_CLASSES)]
        heard = [np.trim_zeros(sound, "b") for sound in one[::3]]
        print(*listen.publish("tones", heard, one, TONE_CLASSES[:len(one)], rate))


def score_captions(args: argparse.Namespace, rate: int) -> None:
    prompts = [describe_events(10**9 + i).caption for i in range(args.n)]
    sounds = draw(args, "--prompt", *prompts)
    for many in (False, True):
        hits = [follows(prompt, sound, rate) for prompt, sound in zip(prompts, sounds)
                if ("then" in prompt) == many]
        what = "two events" if many else "one event"
        print(f"{args.run}: {sum(hits)} of {len(hits)} prompts with {what} are followed; {args.sampler} x "
              f"{args.steps}, guidance {args.cfg:g}")


def main() -> None:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", help="a run folder")
    p.add_argument("--n", type=integer(1), default=240, help="number of samples (default: 240)")
    p.add_argument("--sampler", help="see sample.py (default: that of the objective)")
    p.add_argument("--steps", type=integer(1), help="see sample.py (default: those of the objective)")
    p.add_argument("--cfg", type=number(-1e6, 1e6), help="guidance scale (default: that of the objective)")
    p.add_argument("--listen", action="store_true", help="of classes: write benchmarks/tones.wav and "
                                                         "benchmarks/pictures/tones.png")
    args = p.parse_args()
    checkpoint = network_run(args.run, "tones")
    rate = checkpoint["vae"]["config"]["rate"]
    row = ALL_OBJECTIVES[checkpoint["objective"]["name"]]
    args.sampler, args.steps = args.sampler or row.sampler, args.steps or row.steps
    if args.cfg is None:
        args.cfg = row.scale
    if checkpoint["text"] is None:
        score_classes(args, checkpoint, rate)
    elif args.listen:
        raise ValueError(f"--listen: {args.run} draws from captions; give a run of classes")
    else:
        score_captions(args, rate)


if __name__ == "__main__":
    sys.exit(program("tones.py", main))
