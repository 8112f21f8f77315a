"""text.py: bytes to vectors, and the networks that are conditioned on them."""

import pytest
import torch

import mmdit
import text
import unet

SMALL = dict(width=32, depth=2, heads=2)
PROMPTS = ["", "a red circle", "ein grüner Kreis, 緑の円, 🟢"]


def encoder():
    torch.manual_seed(0)
    model = text.TextEncoder(text.TextConfig(**SMALL)).eval()
    torch.nn.init.normal_(model.embedding.weight)
    return model


def test_words_are_bytes():
    """Only capitals are lost: any script, any run of spaces and words of any length come back."""
    long = "antidisestablishmentarianism  緑の円、赤い四角、青い三角形"
    ids, mask = text.tokenize([*PROMPTS, long], limit=100)
    for row, keep, prompt in zip(ids, mask, [*PROMPTS, long]):
        letters = row[keep]
        assert letters[0].tolist() == [text.START] + [text.PAD] * (text.WORD - 1)
        assert bytes(letters[1:][letters[1:] != text.PAD].tolist()) == (
            f" {prompt}".lower().encode() if prompt else b"")
        assert (row[~keep] == text.PAD).all()
    assert mask.sum(1).tolist()[:2] == [1, 4]                     # START alone; START a red circle
    red, circle = text.tokenize(["RED circle", "circle red"], 9)[0][:, 1:]
    assert torch.equal(red, circle.flip(0))                       # the same word in either place
    assert text.split_words(" \n") == [] == text.split_words("")


def test_truncated_text_is_reported():
    model = text.TextEncoder(text.TextConfig(**SMALL, limit=3))
    assert model.truncated("one two three") == {}
    assert model.truncated("one two three four five") == {"the encoder": "four five"}
    assert model.truncated("緑" * 40) == {"the encoder": "緑" * 24}
    assert text.tokenize(["a " * 50], 3)[1].shape == (1, 4)
    with torch.no_grad():
        torch.testing.assert_close(model(["one two three four"]), model(["one two three"]), rtol=0, atol=0)


@torch.no_grad()
def test_padding_changes_no_prompt():
    """Alone or beside a longer one, from the first layer to the last."""
    model = encoder()
    together = model(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        alone, length = model([prompt]), len(text.split_words(prompt)) + 1
        torch.testing.assert_close(together["context"][i, :length], alone["context"][0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(together["pooled"][i], alone["pooled"][0], atol=1e-6, rtol=1e-5)
        assert not together["context"][i, length:].any() and not together["mask"][i, length:].any()


@torch.no_grad()
def test_order_and_letters_matter():
    model = encoder()
    a, b, c, d = model(["red left of blue", "blue left of red", "red left of bluf",
                        "red left of lbue"])["pooled"]
    assert min((a - other).norm() for other in (b, c, d)) > 1e-3 * a.norm()
    torch.testing.assert_close(model(["RED Left of blue"])["pooled"][0], a)


def network(kind):
    torch.manual_seed(1)
    if kind == "unet":
        model = unet.UNet(unet.UNetConfig(widths=(32, 32), context_width=32, pooled_width=32, groups=8,
                                          attention=(True, True), positions=True))
    else:
        depth = {"mmdit": dict(depth=2), "single": dict(depth=1, single_depth=2)}[kind]
        model = mmdit.MMDiT(mmdit.MMDiTConfig(width=32, heads=2, context_width=32, pooled_width=32,
                                              rope=(4, 6, 6), **depth))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model.double().eval(), ("context", "mask", "pooled")


@pytest.mark.parametrize("kind", ["unet", "mmdit", "single"])
@torch.no_grad()
def test_networks_do_not_see_padding(kind):
    model, names = network(kind)
    words, x, t = encoder().double(), torch.randn(1, 4, 8, 8, dtype=torch.float64), torch.tensor([0.3])
    short = words(["a red circle"])
    both = words(["something quite a bit longer", "a red circle"])
    padded = {name: value[1:] for name, value in both.items()}
    outs = [model(x, t, **{name: c[name] for name in names})
            for c in (short, padded, words(["a red square"]))]
    torch.testing.assert_close(outs[1], outs[0], atol=1e-6, rtol=0)
    assert (outs[2] - outs[0]).abs().max() > 1e-5


def test_the_encoder_is_trained_through_the_network():
    words, (model, names) = encoder().train(), network("mmdit")
    model.float()
    cond = words(["a red circle", "blue"])
    out = model(torch.randn(2, 4, 8, 8), torch.rand(2), **{name: cond[name] for name in names})
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in words.parameters())
