"""Words: bytes to vectors, and the networks that listen to them."""

import pytest
import torch

import dit
import unet

SMALL = dict(width=32, depth=2, heads=2)
PROMPTS = ["", "a red circle", "ein grüner Kreis, 緑の円, 🟢"]


def encoder():
    torch.manual_seed(0)
    model = dit.TextEncoder(dit.TextConfig(**SMALL)).eval()
    torch.nn.init.normal_(model.embedding.weight)
    return model


def test_bytes():
    ids, mask = dit.tokenize(PROMPTS, limit=100)
    for row, keep, prompt in zip(ids, mask, PROMPTS):
        assert row[keep].tolist() == [dit.START, *prompt.encode()] and (row[~keep] == dit.PAD).all()


def test_cut_keeps_whole_characters():
    assert dit.cut("abc", 3) == ("abc", "") and dit.cut("abcd", 3) == ("abc", "d")
    assert dit.cut("a緑b", 3) == ("a", "緑b")                         # a third byte alone is no character
    assert dit.tokenize(["a緑b"], 3)[0].tolist() == [[dit.START, ord("a")]]


@torch.no_grad()
def test_padding_changes_no_prompt():
    """Alone or beside a longer one, from the first layer to the last."""
    model = encoder()
    together = model(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        alone, length = model([prompt]), len(prompt.encode()) + 1
        torch.testing.assert_close(together["context"][i, :length], alone["context"][0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(together["pooled"][i], alone["pooled"][0], atol=1e-6, rtol=1e-5)
        assert not together["context"][i, length:].any() and not together["mask"][i, length:].any()


@torch.no_grad()
def test_order_and_letters_matter():
    model = encoder()
    a, b, c = model(["red left of blue", "blue left of red", "red left of bluf"])["pooled"]
    assert min((a - b).norm(), (a - c).norm()) > 1e-3 * a.norm()


def network(kind):
    torch.manual_seed(1)
    if kind == "unet":
        model = unet.UNet(unet.UNetConfig(widths=(32, 32), context_width=32, groups=8))
    else:
        depth = {"mmdit": dict(depth=2), "single": dict(depth=1, single_depth=2)}[kind]
        model = dit.MMDiT(dit.MMDiTConfig(width=32, heads=2, context_width=32, pooled_width=32,
                                          rope=(4, 6, 6), **depth))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model.eval(), ("context", "mask") if kind == "unet" else ("context", "mask", "pooled")


@pytest.mark.parametrize("kind", ["unet", "mmdit", "single"])
@torch.no_grad()
def test_networks_do_not_see_padding(kind):
    model, names = network(kind)
    words, x, t = encoder(), torch.randn(1, 4, 8, 8), torch.tensor([0.3])
    short = words(["a red circle"])
    both = words(["something quite a bit longer", "a red circle"])
    padded = {name: value[1:] for name, value in both.items()}
    outs = [model(x, t, **{name: c[name] for name in names})
            for c in (short, padded, words(["a red square"]))]
    torch.testing.assert_close(outs[1], outs[0], atol=1e-6, rtol=1e-5)
    assert (outs[2] - outs[0]).abs().max() > 1e-5


def test_words_learn_with_the_picture():
    """The encoder is trained through the network's loss."""
    words, (model, names) = encoder().train(), network("mmdit")
    cond = words(["a red circle", "blue"])
    out = model(torch.randn(2, 4, 8, 8), torch.rand(2), **{name: cond[name] for name in names})
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in words.parameters())


@pytest.mark.parametrize("kind", ["dit", "mmdit"])
@torch.no_grad()
def test_convolution_between_tokens(kind):
    """Zero at first; then each token hears its eight neighbours on the grid, through the MLP alone."""
    mlp = dit.MLP("swiglu", 16, 4.0, conv=True)
    x = torch.randn(1, 5 * 7, 16)
    plain = dit.MLP("swiglu", 16, 4.0)
    plain.load_state_dict({name: w for name, w in mlp.state_dict().items() if not name.startswith("conv")})
    torch.testing.assert_close(mlp(x, (5, 7)), plain(x))
    torch.nn.init.normal_(mlp.conv.weight)
    moved = x.clone()
    moved[0, 2 * 7 + 3] += 1                                                   # row 2, column 3
    heard = (mlp(moved, (5, 7)) - mlp(x, (5, 7))).abs().amax(-1).view(5, 7) > 1e-6
    expected = torch.zeros(5, 7, dtype=torch.bool)
    expected[1:4, 2:5] = True
    assert torch.equal(heard, expected)
    shared = dict(width=32, depth=2, heads=2, conv=True)
    model = (dit.DiT(dit.DiTConfig(**shared)) if kind == "dit" else
             dit.MMDiT(dit.MMDiTConfig(**shared, context_width=8, pooled_width=None, rope=(4, 6, 6))))
    cond = {} if kind == "dit" else {"context": torch.randn(2, 3, 8)}
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    assert torch.isfinite(model(torch.randn(2, 4, 6, 8), torch.rand(2), **cond)).all()
    assert sum(".conv." in name for name, _ in model.named_parameters()) == 2 * 2
