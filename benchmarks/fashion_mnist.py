"""Score a Fashion-MNIST run: how many samples does a classifier assign to the class asked for, and how far
are they from the test images?

    python benchmarks/fashion_mnist.py runs/fashion-mnist-dit-rf --cfg 1 1.5 2 3  (from the repository's root)

The classifier was trained here, on the training images and labels, independently of any VAE or run: 93.2 %
of the test images are right. It is shipped, in benchmarks/results, because another training of it, which even
another number of threads makes, gives distances that differ by up to 14 %. For each guidance scale, the
program prints over 2,000 samples:

  agreement   share of samples that the classifier assigns to the class asked for (on test images, its
              accuracy)
  frechet     distance between Gaussians fitted to its last 64 features, for the samples and for the 10,000
              test images (Heusel et al. 2017, arXiv:1706.08500, eq. 6). Two references in the same space:
              the VAE's reconstructions of the test images (the floor), and 10,000 training images (the
              ideal, slightly too good, as the classifier was trained on them)
  limit       that distance for infinitely many samples, extrapolated

The distance of fewer samples is biased upward; both references are therefore also given for 2,000 images.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.samples import check_out, drawn
from checkpoints import load_checkpoint, load_vae
from cli import Parser, integer, number, one_of, program
from data import batch_indices, load_mnist
from files import fingerprint_tensors
from pictures import to_tensor, to_uint8
from sample_settings import PRECISIONS
from vae import VAE

FILE = Path(__file__).with_name("results") / "fashion-mnist-classifier.pt"


class Classifier(nn.Module):
    """32x32 grey image -> 64 features -> 10 logits."""

    def __init__(self):
        super().__init__()
        def block(a: int, b: int) -> list[nn.Module]:
            return [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(),
                    nn.Conv2d(b, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*block(1, 16), *block(16, 32), *block(32, 64), nn.Flatten(),
                                      nn.Linear(1024, 64), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def train_classifier(data_dir: Path, steps: int = 2800, batch: int = 128) -> Classifier:
    torch.manual_seed(0)
    train = load_mnist("fashion-mnist", "train", (32, 32), data_dir)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for step in tqdm(range(steps), desc="train the classifier"):
        i = batch_indices(len(train), batch, step, 0)
        x, y = to_tensor(train.images[i]), torch.from_numpy(train.labels[i])
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def load_classifier(data_dir: Path) -> Classifier:
    """The classifier from FILE, trained first if someone has removed it."""
    if not FILE.is_file():
        classifier = train_classifier(data_dir)
        torch.save(classifier.state_dict(), FILE)
        return classifier
    classifier = Classifier().eval()
    classifier.load_state_dict(torch.load(FILE, weights_only=True))
    return classifier


def classifier_in_use() -> str | None:
    """A digest of the weights in FILE; None where there are none. Scores by different ones do not compare."""
    return fingerprint_tensors(torch.load(FILE, weights_only=True)) if FILE.is_file() else None


@torch.no_grad()
def classify(model: Classifier, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, 64), float64, and predicted classes (N,) of uint8 images (N, 32, 32, 1)."""
    features = torch.cat([model.features(to_tensor(images[i:i + 500])) for i in range(0, len(images), 500)])
    return features.double().numpy(), model.head(features).argmax(1).numpy()


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) for features (N, 64) with covariances A and B."""
    cov_a = np.cov(a, rowvar=False)
    cov_b = np.cov(b, rowvar=False)
    # The trace of a matrix root is the sum of the roots of the eigenvalues; rounding may make some negative.
    roots = np.sqrt(np.clip(np.linalg.eigvals(cov_a @ cov_b).real, 0, None))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum())


def frechet_limit(a: np.ndarray, b: np.ndarray, group: int = 1, splits: int = 8) -> float:
    """The Fréchet distance that infinitely many samples like `a` would have: the bias of N samples is close
    to c / N, so that of halves is twice as large (Chong & Forsyth 2020, arXiv:1911.07023, fit more points).

    group: samples whose classes are taken in turn must be halved in whole rounds of that many classes, as
    halves with classes mixed at random are further away for another reason. Of 500 training pictures, 50 of
    each class, the distance is 2.2 on average and this limit is 0.1."""
    rounds = a[:len(a) // group * group].reshape(-1, group, a.shape[1])
    random = np.random.default_rng(0)
    halves = []
    for _ in range(splits):
        order = random.permutation(len(rounds))
        half = len(rounds) // 2
        halves += [frechet(rounds[part].reshape(-1, a.shape[1]), b)
                   for part in (order[:half], order[half:2 * half])]
    return 2 * frechet(a, b) - float(np.mean(halves))


@torch.no_grad()
def reconstruct(vae: VAE, images: np.ndarray) -> np.ndarray:
    parts = [vae.decode(vae.encode(to_tensor(images[i:i + 250])).mean)
             for i in tqdm(range(0, len(images), 250), desc="reconstruct")]
    return np.concatenate([to_uint8(part) for part in parts])


def draw_samples(run: str, scale: float, args: argparse.Namespace) -> np.ndarray:
    """args.n samples at one guidance scale, by sample.py; the classes are taken in turn."""
    flags = [run, "--n", str(args.n), "--batch-size", "250", "--cfg", str(scale)]
    flags += ["--precision", args.precision]
    if scale not in (0, 1):                 # at these scales there is no guidance for them to act on
        flags += ["--interval", *args.interval]
        if args.guide:
            flags += ["--guide", args.guide]
    for name in ("sampler", "steps", "times"):
        value = getattr(args, name)
        if value:
            flags += [f"--{name}", str(value)]
    return drawn(flags)


def describe(scale: float, args: argparse.Namespace) -> str:
    """How the samples at this scale are drawn, in words."""
    words = f"{args.sampler or 'default sampler'}, {args.steps or 'default'} steps"
    if args.times:
        words += f", {args.times} times"
    words += f", guidance {scale:g}"
    if args.guide and scale not in (0, 1):
        words += f" by {args.guide}"
    if args.interval != ["0", "1"] and scale not in (0, 1):
        words += f" for t in {'..'.join(args.interval)}"
    return words


def check_run(run: str) -> str:
    """Its arch. Raises ValueError where the classifier cannot judge what it draws."""
    checkpoint = load_checkpoint(run)
    data = checkpoint["data"]
    if data["source"] != "fashion-mnist" or list(data["size"]) != [32, 32]:
        raise ValueError(f"{run}: was trained on {data['source']} at {' x '.join(map(str, data['size']))}; "
                         "give a run of --data fashion-mnist at 32 x 32")
    return checkpoint["arch"]


def main() -> None:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", help="run folders; for a VAE run only the floor is measured")
    p.add_argument("--cfg", type=number(-1e6, 1e6), nargs="+", default=[1.0, 1.5, 2.0, 3.0],
                   help="guidance scales")
    p.add_argument("--interval", nargs=2, default=["0", "1"], help="times between which guidance acts")
    p.add_argument("--sampler", help="see sample.py")
    p.add_argument("--steps", type=integer(1), help="see sample.py")
    p.add_argument("--times", help="see sample.py")
    p.add_argument("--guide", help="autoguidance by this checkpoint: see sample.py")
    p.add_argument("--n", type=integer(40, 10_000), default=2000,
                   help="samples per guidance scale (default: 2000)")
    p.add_argument("--precision", type=one_of(PRECISIONS), default="fp32", help="see sample.py")
    p.add_argument("--data-dir", default="data", help="folder of the IDX files (default: data)")
    p.add_argument("--json", help="also write the figures to this file")
    args = p.parse_args()
    archs = [check_run(run) for run in args.runs]
    check_out("--json", args.json)

    # ---- the references: test images, and training images as the ideal
    test = load_mnist("fashion-mnist", "val", (32, 32), Path(args.data_dir))
    train = load_mnist("fashion-mnist", "train", (32, 32), Path(args.data_dir))
    classifier = load_classifier(Path(args.data_dir))
    reference, predicted = classify(classifier, test.images)
    chosen = np.random.default_rng(0).permutation(len(train))[:10_000]
    ideal, _ = classify(classifier, train.images[chosen])
    rows = [{"what": "classifier on test images", "agreement": float((predicted == test.labels).mean())},
            {"what": "10,000 training images (the ideal)", "frechet": frechet(ideal, reference)},
            {"what": f"{args.n:,} of them", "frechet": frechet(ideal[:args.n], reference)}]

    for run, arch in zip(args.runs, archs):
        # ---- the floor: no sample can be better than what the VAE decodes
        recon = reconstruct(load_vae(run), test.images)
        # The border of 2 pixels is padding, not part of the picture.
        error = recon[:, 2:-2, 2:-2] / 255.0 - test.images[:, 2:-2, 2:-2] / 255.0
        psnr = -10 * np.log10((error ** 2).mean((1, 2, 3))).mean()
        features, predicted = classify(classifier, recon)
        rows.append({"what": f"{run}: reconstructions of the test images (the floor)",
                     "frechet": frechet(features, reference),
                     "agreement": float((predicted == test.labels).mean()), "psnr": float(psnr)})
        rows.append({"what": f"{run}: {args.n:,} of them", "frechet": frechet(features[:args.n], reference)})
        if arch == "vae":
            continue

        # ---- the samples
        labels = np.arange(args.n) % 10
        for scale in args.cfg:
            features, predicted = classify(classifier, draw_samples(run, scale, args))
            how = describe(scale, args)
            rows.append({"what": f"{run}: {args.n:,} samples, {how}",
                         "frechet": frechet(features, reference),
                         "limit": frechet_limit(features, reference, group=10),
                         "agreement": float((predicted == labels).mean())})

    for row in rows:
        figures = [f"  {name} {row[name]:.3f}" for name in ("agreement", "frechet", "limit", "psnr")
                   if name in row]
        print(f"{row['what']:75s}" + "".join(figures))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    sys.exit(program("fashion_mnist.py", main))
