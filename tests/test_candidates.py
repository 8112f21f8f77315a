"""benchmarks/candidates.py: what each candidate changes, against formulas, and that a run goes on with it."""

import sys

import numpy as np
import pytest
import torch
from benchmarks import candidates
from conftest import ON_VAE

import data
import dit
import tasks
from rectified_flow import RectifiedFlow


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Candidates change classes and functions in place; every test begins and ends with the plain ones."""
    for owner, name in ((data, "_order"), (tasks.Denoising, "build"), (tasks.Denoising, "__init__"),
                        (torch.optim, "AdamW"), (RectifiedFlow, "loss"), (dit.DiT, "__init__"),
                        (dit.SelfAttention, "forward")):
        monkeypatch.setattr(owner, name, getattr(owner, name))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.7))

    def forward(self, xt, t):
        return self.scale * xt + t[:, None, None, None]


@pytest.mark.parametrize("name, term", [
    ("direction", lambda raw, target: 1 - (raw * target).sum(1) / (raw.norm(dim=1) * target.norm(dim=1))),
    ("contrastive", lambda raw, target: -0.05 * (raw - target[[3, 0, 1, 2]]) ** 2)])
def test_terms_are_added_in_training_only(name, term):
    path, model = RectifiedFlow(), Net()
    x0, eps, t = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), torch.rand(4)
    plain = path.loss(model, x0, t=t, eps=eps)
    candidates.CANDIDATES[name]()
    xt = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * eps
    expected = plain + term(model(xt, t), eps - x0).flatten(1).mean(1)
    torch.testing.assert_close(path.loss(model, x0, t=t, eps=eps), expected)
    torch.testing.assert_close(path.loss(model.eval(), x0, t=t, eps=eps), plain)


def test_values_of_the_first_block_are_mixed_in():
    torch.manual_seed(0)
    config = dit.DiTConfig(width=32, depth=3, heads=2)
    plain = dit.DiT(config)
    for p in plain.parameters():                           # also the gates, which start closed
        torch.nn.init.normal_(p, std=0.1)
    x, t = torch.randn(2, 4, 4, 4), torch.rand(2)
    expected = plain(x, t)
    candidates.value_residual()
    mixed = dit.DiT(config)
    assert mixed.load_state_dict(plain.state_dict(), strict=False).missing_keys == [
        "blocks.1.attn.share", "blocks.2.attn.share"]
    shares = [block.attn.share for block in mixed.blocks[1:]]
    with torch.no_grad():
        for share in shares:
            share.zero_()
    torch.testing.assert_close(mixed(x, t), expected)
    with torch.no_grad():                                  # only the first block's values reach the second
        shares[0].fill_(1)
        mixed.blocks[1].attn.qkv.weight[64:].normal_()
        once = mixed(x, t)
        mixed.blocks[1].attn.qkv.weight[64:].normal_()
        torch.testing.assert_close(mixed(x, t), once)
        shares[0].fill_(0.5)
    assert (mixed(x, t) - once).abs().max() > 1e-3


def test_batches_are_balanced_and_every_picture_comes_once_an_epoch(monkeypatch):
    monkeypatch.setattr(tasks.Denoising, "__init__", lambda *more: None)
    candidates.balanced()
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), 12))
    unlike = data._order(59, 0, 0)
    tasks.Denoising(None, data.Dataset(np.zeros((60, 1)), labels, list("abcde"), ""), None, None, None)
    order = data._order(60, 3, 0)
    assert sorted(order) == list(range(60)) and (data._order(60, 4, 0) != order).any()
    for batch in order.reshape(-1, 10):
        assert (np.bincount(labels[batch]) == 2).all()
    assert (data._order(59, 0, 0) == unlike).all()         # of other data


def test_muon_makes_updates_of_matrices_orthogonal():
    torch.manual_seed(0)
    hidden, other = (torch.nn.Parameter(torch.randn(16, 8)) for _ in range(2))
    hidden.hidden = True
    bias = torch.nn.Parameter(torch.zeros(8))
    groups = [{"params": [hidden, other], "weight_decay": 0.0}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = candidates.MuonAndAdamW(groups, lr=0.1, betas=(0.9, 0.95))
    before = [p.detach().clone() for p in (hidden, other)]
    for p in (hidden, other, bias):
        p.grad = torch.randn(p.shape)
    optimizer.step()
    update = torch.linalg.svdvals(hidden.detach() - before[0])
    assert update.max() / update.min() < 2                 # about equal, after five iterations
    # 0.2 sqrt(16) times the rate, of an update with singular values about 1
    assert 0.6 < update.mean() / (0.1 * 0.2 * 4) < 1.2
    torch.testing.assert_close((other.detach() - before[1]).abs(), torch.full((16, 8), 0.1))    # Adam's first


@pytest.mark.parametrize("name", candidates.CANDIDATES)
def test_a_run_goes_on_and_is_drawn_from(cwd, monkeypatch, name, capsys):
    flags = ["--arch", "dit", *ON_VAE, "--name", f"candidate-{name}"]

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["candidates.py", name, *argv])
        with pytest.MonkeyPatch.context() as patch:        # as a process of its own
            for owner, part in ((tasks.Denoising, "build"), (tasks.Denoising, "__init__"),
                                (torch.optim, "AdamW"), (RectifiedFlow, "loss"), (dit.DiT, "__init__"),
                                (dit.SelfAttention, "forward")):
                patch.setattr(owner, part, getattr(owner, part))
            return candidates.main()

    assert run("train.py", *flags, "--steps", "2") == 0
    assert run("train.py", *flags, "--steps", "4") == 0
    checkpoint = torch.load(cwd / f"runs/candidate-{name}/checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 4
    assert run("sample.py", f"runs/candidate-{name}", "--n", "2", "--out", "two.npz") == 0


@pytest.mark.parametrize("argv", [[], ["muon"], ["more", "train.py"], ["muon", "compare.py"]])
def test_unknown_names_are_refused(argv, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["candidates.py", *argv])
    with pytest.raises(ValueError, match="must be one of muon, direction"):
        candidates.main()
