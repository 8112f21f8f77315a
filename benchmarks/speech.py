"""Score a run on spoken words: how many samples does a classifier hear as the word asked for, how far are
they from held-out voices, and are they copies?

    python benchmarks/speech.py runs/speech-dit-rf --cfg 1 2 3            (from the repository's root)
    python benchmarks/speech.py runs/speech-dit-rf --cfg 2 --neighbours pairs.png --listen

The classifier is trained here, once, independently of any autoencoder or run, on the voices of espeak-ng in
the training part alone (about 2 minutes on one core; kept in benchmarks/speech_classifier.pt). Scores by two
of them do not compare, and another number of threads makes another one. No recording is among its sounds: its
accuracy is measured on all of them, whose voice is new to it, and on the validation part's voices of
espeak-ng, of which nothing is in training either. For each guidance scale:

  agreement   share of samples that are heard as the word asked for
  frechet     distance between Gaussians fitted to the classifier's last 64 features, for the samples and for
              the validation part (Heusel et al. 2017, arXiv:1706.08500, eq. 6). As many training sounds are
              the ideal, slightly too good, as the classifier has learned them, and the same after the
              autoencoder are the floor
  limit       that distance for infinitely many samples, extrapolated

--neighbours compares each sample with all training sounds, in latents and in spectrograms: see neighbours.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from audio_vae import AudioVAE
from benchmarks import listen, neighbours
from benchmarks.fashion_mnist import describe, draw_samples, frechet, frechet_limit
from benchmarks.report import latents_of, through
from benchmarks.samples import check_out
from checkpoints import load_checkpoint, load_vae
from cli import Parser, integer, nonempty, number, one_of, program
from data import batch_indices
from files import write_atomically
from pictures import PICTURES, write_picture
from sample_settings import PRECISIONS
from sound import log_mel, spectrograms, to_tensor
from speech import RATE, WORDS, Speech, cut_to_speech, open_speech

FOLDER = Path(__file__).parent
FILE = FOLDER / "speech_classifier.pt"
NAMES = list(WORDS)
LENGTH = 8192                   # samples that are compared; longer sounds are cut, shorter ones padded
BANDS, HOP, DEPTH = 40, 0.016, 50.0     # of spectrograms; DEPTH in dB below the loudest, where silence begins
CHUNK = 200                     # sounds at a time, which bounds the memory


# ---- what is heard: a spectrogram, and a classifier of it

def fitted(sounds: np.ndarray) -> np.ndarray:
    """int16 (N, T) -> (N, LENGTH)."""
    return np.pad(sounds[:, :LENGTH], ((0, 0), (0, max(0, LENGTH - sounds.shape[1]))))


def spectra(x: Tensor) -> Tensor:
    """Waveforms (B, T) -> (B, BANDS, frames): log-mel spectrograms in dB, from -DEPTH to 0. The loudest is 0
    in each sound, so that loudness makes no difference, and neither does what is far below the speech."""
    levels = log_mel(x, RATE, BANDS, hop=HOP)
    return (levels - levels.amax((1, 2), keepdim=True)).clamp_min(-DEPTH)


class Classifier(nn.Module):
    """Spectrogram (B, BANDS, 65) in dB -> 64 features -> a logit for each word."""

    def __init__(self, words: int):
        super().__init__()
        def conv(a: int, b: int) -> list[nn.Module]:
            return [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
        self.body = nn.Sequential(*conv(1, 16), nn.MaxPool2d(2), *conv(16, 32), *conv(32, 32),
                                  nn.MaxPool2d(2), *conv(32, 64), *conv(64, 64), nn.MaxPool2d(2),
                                  nn.Flatten(), nn.Dropout(0.2), nn.Linear(64 * (BANDS // 8) * 8, 64),
                                  nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(64, words))

    def features(self, levels: Tensor) -> Tensor:
        return self.body(levels[:, None] * (2 / DEPTH) + 1)

    def forward(self, levels: Tensor) -> Tensor:
        return self.head(self.features(levels))


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Waveforms (B, T) -> spectrograms of them in random variants: faster or slower by up to 15 %, with the
    pitch; shifted by up to 50 ms; noise 10 to 50 dB below the speech; a spectrum that rises or falls by up to
    10 dB toward its ends, as through another microphone."""
    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(x), 1, generator=generator)

    # Linear interpolation between samples: it dampens the highest frequencies, which is a variant too.
    at = torch.arange(x.shape[1]) * uniform(0.85, 1.15) - RATE * uniform(-0.05, 0.05)
    at = at.clamp(-1, x.shape[1])                           # where there is silence on either side
    padded = F.pad(x, (1, 2))
    below = at.floor()
    share = at - below
    index = below.long() + 1
    x = padded.gather(1, index) * (1 - share) + padded.gather(1, index + 1) * share
    loud = x.square().mean(1, keepdim=True).sqrt()
    x = x + loud * 10 ** (-uniform(10, 50) / 20) * torch.randn(x.shape, generator=generator)
    tilt = uniform(-10, 10)[:, :, None] * torch.linspace(-1, 1, BANDS)[:, None]
    levels = spectra(x) + tilt
    return (levels - levels.amax((1, 2), keepdim=True)).clamp_min(-DEPTH)


def train_classifier(sounds: np.ndarray, labels: np.ndarray, words: int, steps: int = 800,
                     batch: int = 64) -> Classifier:
    """From int16 (N, LENGTH) and their labels (N,)."""
    torch.manual_seed(0)            # the same classifier wherever as many threads train it
    generator = torch.Generator().manual_seed(0)
    model = Classifier(words)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for step in tqdm(range(steps), desc="train the classifier"):
        i = batch_indices(len(sounds), batch, step, 0)
        levels = augmented(to_tensor(sounds[i])[:, 0], generator)
        loss = F.cross_entropy(model(levels), torch.from_numpy(labels[i]), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def load_classifier(train: Speech) -> Classifier:
    """The classifier of these sounds from FILE, trained first if there is none, or one of others."""
    saved = torch.load(FILE, weights_only=True) if FILE.is_file() else {}
    if saved.get("data") == train.fingerprint:
        model = Classifier(len(NAMES)).eval()
        model.load_state_dict(saved["weights"])
        return model
    spoken = np.flatnonzero(~train.recorded)
    if not len(spoken):
        raise ValueError("benchmarks/speech.py: the classifier learns from the voices of espeak-ng, of which "
                         "there is none; apt install espeak-ng")
    model = train_classifier(train.sounds[spoken], train.texts[spoken], len(NAMES))
    saved = {"data": train.fingerprint, "weights": model.state_dict()}
    write_atomically(FILE, lambda file: torch.save(saved, file))
    return model


class Heard(NamedTuple):
    features: np.ndarray        # (N, 64) float64
    words: np.ndarray           # (N,) numbers of words


@torch.no_grad()
def hear(model: Classifier, sounds: np.ndarray) -> Heard:
    """int16 (N, T)."""
    levels = levels_of(sounds)
    parts = [model.features(levels[i:i + CHUNK]) for i in range(0, len(levels), CHUNK)]
    features = torch.cat(parts)
    return Heard(features.double().numpy(), model.head(features).argmax(1).numpy())


@torch.no_grad()
def levels_of(sounds: np.ndarray) -> Tensor:
    """int16 (N, T) -> (N, BANDS, frames) in dB."""
    return torch.cat([spectra(to_tensor(fitted(sounds[i:i + CHUNK]))[:, 0])
                      for i in range(0, len(sounds), CHUNK)])


# ---- the figures

def in_turn(labels: np.ndarray, n: int) -> np.ndarray:
    """(n,) numbers of sounds whose labels are 0, 1, 2, ... in turn, as those of samples are, chosen at
    random; none twice as long as a label has enough."""
    random = np.random.default_rng(0)
    chosen = np.empty(n, np.int64)
    count = labels.max() + 1
    for label in range(min(count, n)):
        places = np.arange(label, n, count)
        chosen[places] = np.resize(random.permutation(np.flatnonzero(labels == label)), len(places))
    return chosen


def score(model: Classifier, sounds: np.ndarray, asked: np.ndarray,
          reference: np.ndarray) -> dict[str, float]:
    """Of sounds whose words are asked for in turn. reference: features (M, 64)."""
    heard = hear(model, sounds)
    return {"agreement": float((heard.words == asked).mean()),
            "frechet": frechet(heard.features, reference),
            "limit": frechet_limit(heard.features, reference, group=int(asked.max()) + 1)}


def misheard(model: Classifier, sounds: np.ndarray, asked: np.ndarray, most: int = 6) -> str:
    """Which words are heard as others most often."""
    wrong = hear(model, sounds).words != asked
    shares = {name: wrong[asked == i].mean() for i, name in enumerate(NAMES) if (asked == i).any()}
    worst = sorted(shares, key=shares.get, reverse=True)[:most]
    return ", ".join(f"{name} {shares[name]:.0%}" for name in worst if shares[name] > 0) or "none"


# ---- copies

class Copies(NamedTuple):
    figures: dict[str, dict[str, dict]]     # by space and set: see neighbours.compare
    pairs: list[tuple[int, int, float]]     # sample, its nearest training sound, and the ratio: closest first


def find_copies(vae: AudioVAE, samples: np.ndarray, held_out: np.ndarray, train: np.ndarray) -> Copies:
    """Nearest neighbours among the training sounds, of samples and of held-out sounds before and after the
    autoencoder, in latents and in spectrograms; the pairs are those of spectrograms. All int16 (N, T)."""
    sets = {"samples": samples, "held-out sounds": held_out,
            "held-out through the autoencoder": through(vae, fitted(held_out))}
    spaces = {"latents": lambda sounds: latents_of(vae, fitted(sounds)),
              "spectrograms (dB)": lambda sounds: levels_of(sounds).flatten(1).numpy()}
    figures = {}
    for space, of in spaces.items():
        vectors = neighbours.of_array(of(train))
        figures[space] = neighbours.compare({name: of(sounds) for name, sounds in sets.items()}, vectors)
    worst = figures["spectrograms (dB)"]["samples"]["worst"]
    return Copies(figures, [(row["query"], row["picture"], row["ratio"]) for row in worst])


def draw_pairs(pairs: list[tuple[int, int, float]], samples: np.ndarray, train: Speech) -> Image.Image:
    """Six columns: in turn a row of samples, and below it their nearest training sounds."""
    sounds, captions = [], []
    for start in range(0, len(pairs), 6):
        row = pairs[start:start + 6]
        sounds += [samples[i] for i, _, _ in row] + [train.sounds[j] for _, j, _ in row]
        captions += [f"sample, asked for: {NAMES[i % len(NAMES)]}" for i, _, _ in row]
        captions += [f"nearest: {NAMES[train.texts[j]]}, {'recorded' if train.recorded[j] else 'spoken'}; "
                     f"ratio {ratio:.2f}" for _, j, ratio in row]
    return spectrograms(fitted(np.stack(sounds)), RATE, min(6, len(pairs)), captions)


def print_copies(copies: Copies) -> None:
    for space, rows in copies.figures.items():
        for name, row in rows.items():
            print(f"  {space:18s} {name:33s} median distance {row['median distance']:.3f}, "
                  f"{row['close']:.1%} +- {row['error']:.1%} of {row['count']} closer than the training "
                  "sounds' own neighbours")


def publish(samples: np.ndarray) -> list[Path]:
    """The first ten words (the digits) to be heard, 24 to be seen. samples: one for each word, at least."""
    spoken = [np.round(cut_to_speech(sound, RATE) * 32768).astype(np.int16) for sound in samples[:10]]
    return listen.publish("speech", spoken, fitted(samples[:24]), NAMES[:24], RATE, FOLDER)


# ---- the program

def check_run(run: str) -> dict:
    """The checkpoint of a run of spoken words, or of an autoencoder of sounds at RATE."""
    checkpoint = load_checkpoint(run)
    if checkpoint["arch"] == "vae":
        if checkpoint["config"].get("rate") != RATE:
            raise ValueError(f"{run}: is no autoencoder of sounds at {RATE} Hz; give the run of one, trained "
                             "with --arch vae --data speech")
        return checkpoint
    data = checkpoint["data"]
    if data["source"] != "speech" or data["classes"] != NAMES:
        raise ValueError(f"{run}: was trained on {data['source']}; give a run of --data speech with --cond "
                         "class")
    return checkpoint


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", help="run folders; of an autoencoder, only the floor is measured")
    p.add_argument("--cfg", type=number(-1e6, 1e6), nargs="+", default=[1.0, 2.0, 3.0],
                   help="guidance scales (default: 1 2 3)")
    p.add_argument("--n", type=integer(4 * len(NAMES)), default=10 * len(NAMES),
                   help=f"samples per guidance scale, in whole rounds of {len(NAMES)} words (default: "
                        f"{10 * len(NAMES)})")
    p.add_argument("--neighbours", metavar="FILE.png", type=nonempty,
                   help="compare the samples of the first scale with their nearest training sounds; the most "
                        "suspicious pairs are drawn here")
    p.add_argument("--listen", action="store_true",
                   help="write benchmarks/speech.wav and benchmarks/pictures/speech.png, with samples of the "
                        "first run at the first scale")
    for name in ("sampler", "steps", "times", "guide"):
        p.add_argument(f"--{name}", help="see sample.py")
    p.add_argument("--interval", nargs=2, default=["0", "1"], help="see sample.py")
    p.add_argument("--precision", type=one_of(PRECISIONS), default="fp32", help="see sample.py")
    p.add_argument("--data-dir", default="data", type=nonempty, help="folder of the data (default: data)")
    p.add_argument("--json", type=nonempty, help="also write the figures to this file")
    args = p.parse_args(argv)
    args.n -= args.n % len(NAMES)
    check_out("--neighbours", args.neighbours, PICTURES)
    check_out("--json", args.json)
    return args


def classifier_rows(model: Classifier, train: Speech, val: Speech, reference: Heard) -> list[dict]:
    """Its accuracy on voices and recordings of which it has learned nothing."""
    right = reference.words == val.texts
    recorded = np.concatenate([train.sounds[train.recorded], val.sounds[val.recorded]])
    rows = [{"what": f"classifier: {(~val.recorded).sum()} sounds of held-out voices of espeak-ng",
             "agreement": float(right[~val.recorded].mean())}]
    if len(recorded):
        texts = np.concatenate([train.texts[train.recorded], val.texts[val.recorded]])
        rows.append({"what": f"classifier: {len(recorded)} recordings, a voice that is new to it",
                     "agreement": float((hear(model, recorded).words == texts).mean())})
    return rows


def show(row: dict) -> None:
    figures = [f"  {name} {row[name]:.3f}" for name in ("agreement", "frechet", "limit") if name in row]
    print(f"{row['what']:75s}" + "".join(figures), flush=True)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    checkpoints = [check_run(run) for run in args.runs]
    train, val = (open_speech("words", split, LENGTH, Path(args.data_dir)) for split in ("train", "val"))
    model = load_classifier(train)

    # ---- the references: held-out voices, and training sounds as the ideal
    reference = hear(model, val.sounds)
    rows = classifier_rows(model, train, val, reference)
    asked = np.arange(args.n) % len(NAMES)
    ideal = train.sounds[in_turn(train.texts, args.n)]
    rows.append({"what": f"{args.n} training sounds (the ideal)",
                 **score(model, ideal, asked, reference.features)})
    for row in rows:
        show(row)

    for run, checkpoint in zip(args.runs, checkpoints):
        # ---- the ceiling and the floor: no sample can be better than what the autoencoder decodes
        vae = load_vae(run)
        heard = hear(model, through(vae, val.sounds)).words
        found = [{"what": f"{run}: the {len(val.sounds)} validation sounds through the autoencoder",
                  "agreement": float((heard == val.texts).mean())},
                 {"what": f"{run}: the ideal through the autoencoder (the floor)",
                  **score(model, through(vae, ideal), asked, reference.features)}]
        for row in found:
            show(row)
        rows += found
        if checkpoint["arch"] == "vae":
            continue

        # ---- the samples
        for scale in args.cfg:
            samples = draw_samples(run, scale, args)
            rows.append({"what": f"{run}: {args.n} samples, {describe(scale, args)}",
                         **score(model, samples, asked, reference.features)})
            show(rows[-1])
            print(f"  most often heard as other words: {misheard(model, samples, asked)}", flush=True)
            if scale != args.cfg[0]:
                continue
            if args.listen and run == args.runs[0]:
                print(*publish(samples[:len(NAMES)]))
            if args.neighbours:
                copies = find_copies(vae, samples, val.sounds, train.sounds)
                print_copies(copies)
                rows[-1]["neighbours"] = copies.figures
                picture = draw_pairs(copies.pairs, samples, train)
                write_picture(Path(args.neighbours), picture)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    sys.exit(program("speech.py", main))
