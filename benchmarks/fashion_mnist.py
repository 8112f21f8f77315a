"""Score a Fashion-MNIST run: does a classifier see the asked class, and how far are the samples from the
test images?

    python benchmarks/fashion_mnist.py runs/fashion-mnist-dit-rf --cfg 1 1.5 2 3  (from the repository's root)

The classifier is trained here, once (benchmarks/fashion_mnist_classifier.pt, about 2 minutes on two
cores, >= 91 % on the test set), on images and labels alone: it has seen nothing of the VAE or of any run. Per
guidance scale it prints, over 2,000 samples,

  agreement   share of samples that the classifier gives the asked class (of real test images: its accuracy)
  Frechet     distance between Gaussians fitted to its 64 last features, of the samples and of the 10,000
              test images (Heusel et al. 2017, arXiv:1706.08500, eq. 6), beside two yardsticks in the same
              space: the VAE's own reconstructions of the test images (the floor), and 10,000 training images
              (the ideal, a little generous: the classifier was trained on them).

The distance of fewer samples is biased upward; the yardsticks are therefore also given for 2,000 images.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import batch_indices, load_mnist, to_tensor, to_uint8
import sample

FILE = Path(__file__).with_name("fashion_mnist_classifier.pt")


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


@torch.no_grad()
def look(model: Classifier, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, 64) in float64 and predicted classes (N,) of uint8 images (N, 32, 32, 1)."""
    features = torch.cat([model.features(to_tensor(images[i:i + 500])) for i in range(0, len(images), 500)])
    return features.double().numpy(), model.head(features).argmax(1).numpy()


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2));
    the trace of the root is the sum of the roots of A B's eigenvalues."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.clip(np.linalg.eigvals(cov_a @ cov_b).real, 0, None))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum())


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", help="run folders; a VAE run gives only its floor")
    p.add_argument("--cfg", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0])
    p.add_argument("--interval", nargs=2, default=["0", "1"], help="times between which guidance acts")
    p.add_argument("--sampler")
    p.add_argument("--steps", type=int)
    p.add_argument("--n", type=int, default=2000)
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    p.add_argument("--data-dir", default="data")
    p.add_argument("--json", help="also write the figures to this file")
    args = p.parse_args()

    test = load_mnist("fashion-mnist", "val", (32, 32), Path(args.data_dir))
    train = load_mnist("fashion-mnist", "train", (32, 32), Path(args.data_dir))
    if FILE.is_file():
        classifier = Classifier().eval()
        classifier.load_state_dict(torch.load(FILE, weights_only=True))
    else:
        classifier = train_classifier(Path(args.data_dir))
        torch.save(classifier.state_dict(), FILE)
    reference, predicted = look(classifier, test.images)
    accuracy = float((predicted == test.labels).mean())
    ideal = look(classifier, train.images[np.random.default_rng(0).permutation(len(train))[:10_000]])[0]
    rows = [{"what": "classifier on test images", "agreement": accuracy},
            {"what": "10,000 training images (the ideal)", "frechet": frechet(ideal, reference)},
            {"what": f"{args.n:,} of them", "frechet": frechet(ideal[:args.n], reference)}]
    for run in args.runs:
        vae = sample.load_vae(run)
        with torch.no_grad():
            recon = np.concatenate([to_uint8(vae.decode(vae.encode(to_tensor(test.images[i:i + 250])).mean))
                                    for i in tqdm(range(0, 10_000, 250), desc="reconstruct")])
        psnr = -10 * np.log10(((recon[:, 2:-2, 2:-2] / 255.0 - test.images[:, 2:-2, 2:-2] / 255.0) ** 2
                               ).mean((1, 2, 3))).mean()
        features, predicted = look(classifier, recon)
        rows += [{"what": f"{run}: reconstructions of the test images (the floor)",
                  "frechet": frechet(features, reference),
                  "agreement": float((predicted == test.labels).mean()), "psnr": float(psnr)},
                 {"what": f"{run}: {args.n:,} of them", "frechet": frechet(features[:args.n], reference)}]
        if sample.load_checkpoint(run)["arch"] == "vae":
            continue
        labels = np.arange(args.n) % 10
        for scale in args.cfg:
            flags = [run, "--n", str(args.n), "--batch-size", "250", "--cfg", str(scale)]
            flags += ["--precision", args.precision, "--interval", *args.interval]
            flags += ["--sampler", args.sampler] if args.sampler else []
            flags += ["--steps", str(args.steps)] if args.steps else []
            with tempfile.TemporaryDirectory() as folder:
                sample.main([*flags, "--out", f"{folder}/samples.npz"])
                images = np.load(f"{folder}/samples.npz")["arr_0"]
            features, predicted = look(classifier, images)
            how = f"{args.sampler or 'default sampler'}, {args.steps or 'default'} steps, guidance {scale:g}"
            how += "" if args.interval == ["0", "1"] else f" for t in {'..'.join(args.interval)}"
            rows.append({"what": f"{run}: {args.n:,} samples, {how}",
                         "frechet": frechet(features, reference),
                         "agreement": float((predicted == labels).mean())})
    for row in rows:
        print(f"{row['what']:75s}" + "".join(f"  {name} {row[name]:.3f}"
                                             for name in ("agreement", "frechet", "psnr") if name in row))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
