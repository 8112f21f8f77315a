"""Changes of the recipe that are no flags, each a few lines laid over train.py and sample.py, so that
benchmarks/ladder.py can measure them before the programs grow.

    python benchmarks/candidates.py muon train.py --arch dit --objective rf --data fashion-mnist
    python benchmarks/candidates.py muon sample.py runs/fashion-mnist-dit-rf --n 64

After the candidate and the program come the program's own flags. A run is continued, and drawn from, with the
candidate that it was begun with.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import dit
import sample
import tasks
import train
from cli import program
from rectified_flow import RectifiedFlow

ADAMW = torch.optim.AdamW


class MuonAndAdamW:
    """Muon for the matrices of the blocks, whose updates it makes orthogonal, and AdamW for all else. Jordan
    et al. 2024 (kellerjordan.github.io/posts/muon), scaled so that it takes AdamW's learning rate (Liu et
    al. 2025, arXiv:2502.16982)."""

    def __init__(self, groups: list[dict], lr: float, **options):
        self.muon = torch.optim.Muon([p for p in groups[0]["params"] if is_hidden(p)], lr=lr,
                                     weight_decay=groups[0]["weight_decay"], adjust_lr_fn="match_rms_adamw")
        rest = dict(groups[0], params=[p for p in groups[0]["params"] if not is_hidden(p)])
        self.adamw = ADAMW([rest, *groups[1:]], lr=lr, **options)
        self.param_groups = self.muon.param_groups + self.adamw.param_groups

    @property
    def state(self) -> dict:
        return {**self.muon.state, **self.adamw.state}

    def step(self) -> None:
        self.muon.step()
        self.adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.muon.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
        self.param_groups = self.muon.param_groups + self.adamw.param_groups


def is_hidden(p: torch.nn.Parameter) -> bool:
    return getattr(p, "hidden", False)


def muon() -> None:
    build = tasks.Denoising.build

    def marked(self: tasks.Denoising) -> torch.nn.Module:
        model = build(self)
        for p in model.blocks.parameters():
            p.hidden = p.ndim == 2
        return model

    def optimizer(groups: list[dict], **options) -> MuonAndAdamW | torch.optim.Optimizer:
        if any(map(is_hidden, groups[0]["params"])):
            return MuonAndAdamW(groups, **options)
        return ADAMW(groups, **options)                    # a VAE

    tasks.Denoising.build = marked
    torch.optim.AdamW = optimizer


def with_term(term: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Add term(raw, target), (B,), to the training loss of the straight path."""
    plain = RectifiedFlow.loss

    def loss(self: RectifiedFlow, model, x0: Tensor, *, t: Tensor | None = None, eps: Tensor | None = None,
             **cond) -> Tensor:
        if t is None:
            t = self.sample_t(len(x0), x0.device)
        if eps is None:
            eps = torch.randn_like(x0)
        raws = []

        def watched(xt: Tensor, t: Tensor, **cond) -> Tensor:
            raws.append(model(xt, t, **cond))
            return raws[0]

        error = plain(self, watched, x0, t=t, eps=eps, **cond)
        return error + term(raws[0].float(), self.target(x0, eps, t)) if model.training else error

    RectifiedFlow.loss = loss


def direction() -> None:
    """The direction of the velocity too: one minus the cosine at each place (Yao et al. 2024,
    arXiv:2410.10356)."""
    with_term(lambda raw, target: (1 - F.cosine_similarity(raw, target, dim=1)).flatten(1).mean(1))


def contrastive() -> None:
    """Away from the target of another example of the batch (Stoica et al. 2025, arXiv:2506.05350)."""
    with_term(lambda raw, target: -0.05 * (raw - target.roll(1, 0)).square().flatten(1).mean(1))


def value_residual() -> None:
    """The values of the first block are mixed into those of all others, each with a learned share (Zhou et
    al. 2024, arXiv:2410.17897)."""
    build, forward = dit.DiT.__init__, dit.SelfAttention.forward

    def init(self: dit.DiT, config: dit.DiTConfig) -> None:
        build(self, config)
        first: list[Tensor] = []                           # its values, in the forward pass under way
        for i, block in enumerate(self.blocks):
            block.attn.first = first
            block.attn.share = torch.nn.Parameter(torch.tensor(0.5)) if i else None

    def mixed(self: dit.SelfAttention, x: Tensor, rope, mask: Tensor | None = None, packing=None) -> Tensor:
        if not hasattr(self, "first"):
            return forward(self, x, rope, mask, packing)
        q, k, v = self.split(x)
        if self.share is None:
            self.first[:] = [v]
        else:
            v = v + self.share * (self.first[0] - v)
        x = dit.attention(q, k, v, q_norm=self.q_norm, k_norm=self.k_norm, rope=rope, mask=mask,
                          packing=packing)
        return self.proj(x.transpose(1, 2).flatten(2))

    dit.DiT.__init__ = init
    dit.SelfAttention.forward = mixed


def balanced() -> None:
    """Every batch has all classes as evenly as can be: pictures in random order, the classes in turn."""
    order, init = data._order, tasks.Denoising.__init__
    labels: list[np.ndarray] = []

    def in_turn(n: int, epoch: int, seed: int) -> np.ndarray:
        shuffled = order(n, epoch, seed)
        if not labels or len(labels[0]) != n:
            return shuffled                                # a VAE, which knows no labels
        y = labels[0][shuffled]
        turn = np.empty(n, dtype=int)                      # of each picture, its number within its class
        for label in np.unique(y):
            turn[y == label] = np.arange(np.sum(y == label))
        return shuffled[np.argsort(turn, kind="stable")]

    def remember(self: tasks.Denoising, args, train_data: data.Dataset, *more) -> None:
        labels[:] = [np.asarray(train_data.labels)]
        init(self, args, train_data, *more)

    data._order = in_turn
    tasks.Denoising.__init__ = remember


CANDIDATES = {"muon": muon, "direction": direction, "contrastive": contrastive,
              "value-residual": value_residual, "balanced": balanced}
PROGRAMS = {"train.py": train.main, "sample.py": sample.main}


def main() -> int:
    names = sys.argv[1:3]
    if len(names) < 2 or names[0] not in CANDIDATES or names[1] not in PROGRAMS:
        raise ValueError(f"{' '.join(names) or 'no arguments'}: must be one of {', '.join(CANDIDATES)}, then "
                         f"{' or '.join(PROGRAMS)}, then its flags")
    CANDIDATES[names[0]]()
    return PROGRAMS[names[1]](sys.argv[3:]) or 0


if __name__ == "__main__":
    sys.exit(program("candidates.py", main))
