"""mmdit.py: blocks against their equations, sizes, masks, and the convolution between tokens."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import dit
import mmdit

SMALL = dict(width=32, depth=2, heads=2, context_width=24, pooled_width=12, rope=(4, 6, 6))


def randomize(model):
    """Zero-initialised layers hide mistakes: give every parameter a value."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.2 if p.ndim > 1 else 0.5)
    return model.double().eval()


@pytest.mark.parametrize("name, millions", [("sd3-medium", 2028), ("sd3.5-medium", 2243),
                                            ("flux-dev", 11901)])
def test_presets_have_their_published_size(name, millions):
    with torch.device("meta"):
        model = mmdit.MMDiT(mmdit.MMDiTConfig(**mmdit.PRESETS[name]))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def heads(x):
    return x.unflatten(-1, (2, 16)).transpose(1, 2)


def qkv_written_out(stream, attn, x, shift, scale):
    h = F.layer_norm(x, (32,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    q, k, v = map(heads, attn.qkv(h).chunk(3, -1))
    if attn.q_norm is not None:
        q = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attn.q_norm
        k = k / (k.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attn.k_norm
    return q, k, v


def attended(q, k, v):
    return (F.softmax(q @ k.mT / 4, -1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_joint_block_written_out(last, dual, qk_norm):
    """The last block's text has only a shift and a scale; the dual attention is within the image."""
    config = mmdit.MMDiTConfig(**SMALL | dict(mmdit.PUBLISHED_BLOCK, qk_norm=qk_norm))
    block = randomize(mmdit.JointBlock(config, last=last, dual=dual))
    x, text = torch.randn(2, 6, 32, dtype=torch.float64), torch.randn(2, 5, 32, dtype=torch.float64)
    c = torch.randn(2, 32, dtype=torch.float64)
    m_text = block.context_block.adaLN_modulation(c).chunk(2 if last else 6, 1)
    m_image = block.x_block.adaLN_modulation(c).chunk(9 if dual else 6, 1)
    parts = zip(qkv_written_out(block.context_block, block.context_block.attn, text, *m_text[:2]),
                qkv_written_out(block.x_block, block.x_block.attn, x, *m_image[:2]))
    joint = attended(*(torch.cat(pair, 2) for pair in parts))

    def updated(stream, x, m, joint):
        out = x + m[2][:, None] * stream.attn.proj(joint)
        if len(m) == 9:
            again = attended(*qkv_written_out(stream, stream.attn2, x, m[6], m[7]))
            out = out + m[8][:, None] * stream.attn2.proj(again)
        h = F.layer_norm(out, (32,), eps=1e-6) * (1 + m[4][:, None]) + m[3][:, None]
        return out + m[5][:, None] * stream.mlp.fc2(F.gelu(stream.mlp.fc1(h), approximate="tanh"))

    got_x, got_text = block(x, text, c, None, None, (2, 3))
    torch.testing.assert_close(got_x, updated(block.x_block, x, m_image, joint[:, 5:]))
    want_text = text if last else updated(block.context_block, text, m_text, joint[:, :5])
    torch.testing.assert_close(got_text, want_text)
    if last:
        assert not hasattr(block.context_block, "mlp") and block.context_block.attn.proj is None


def test_single_block_written_out():
    config = mmdit.MMDiTConfig(**SMALL | dict(mmdit.PUBLISHED_BLOCK, qk_norm=False))
    block = randomize(mmdit.SingleBlock(config))
    x, c = torch.randn(2, 11, 32, dtype=torch.float64), torch.randn(2, 32, dtype=torch.float64)
    shift, scale, gate = block.adaLN_modulation(c)[:, None].chunk(3, -1)
    h = block.linear1(F.layer_norm(x, (32,), eps=1e-6) * (1 + scale) + shift)
    q, k, v = map(heads, h[..., :96].chunk(3, -1))
    both = torch.cat([attended(q, k, v), F.gelu(h[..., 96:], approximate="tanh")], -1)
    torch.testing.assert_close(block(x, c, None, None, (2, 3)), x + gate * block.linear2(both))


def test_rotary_positions():
    """Text at the origin, which rotates nothing; patches by row and column, in the channels of each axis."""
    cos, sin = mmdit.rope_3d(3, 2, 4, (4, 6, 6), 100.0)
    assert cos.shape == sin.shape == (3 + 8, 8)
    assert (cos[:3] == 1).all() and (sin[:3] == 0).all()
    y, x = 1, 2
    angles = [0.0] * 2 + [y * 100 ** (-i / 3) for i in range(3)] + [x * 100 ** (-i / 3) for i in range(3)]
    torch.testing.assert_close(cos[3 + 4 * y + x], torch.tensor(angles).cos())
    torch.testing.assert_close(sin[3 + 4 * y + x], torch.tensor(angles).sin())


@pytest.mark.parametrize("options", [dict(), dict(single_depth=1), dict(rope=None, sincos=(8, 12))])
def test_zero_at_the_start_and_rectangular(options):
    model = mmdit.MMDiT(mmdit.MMDiTConfig(**SMALL | options))
    x, t, context, pooled = (torch.randn(2, 4, 8, 12), torch.rand(2), torch.randn(2, 5, 24),
                             torch.randn(2, 12))
    assert (model(x, t, context, pooled=pooled) == 0).all()
    model = randomize(model)
    x, context, pooled = x.double(), context.double(), pooled.double()
    out = model(x, t, context, pooled=pooled)
    assert out.shape == x.shape
    # context, pooled output and time all matter
    assert (model(x, t, context + 1, pooled=pooled) - out).abs().max() > 1e-6
    assert (model(x, t, context, pooled=pooled + 1) - out).abs().max() > 1e-6
    assert (model(x, t * 0.9, context, pooled=pooled) - out).abs().max() > 1e-6
    with pytest.raises(ValueError, match="7x12"):
        model(x[:, :, :7], t, context, pooled=pooled)


@pytest.mark.parametrize("options", [dict(rope=(4, 6, 8)), dict(rope=(5, 5, 6)), dict(heads=5),
                                     dict(norm="batch")])
def test_mmdit_refuses(options):
    with pytest.raises(ValueError):
        mmdit.MMDiT(mmdit.MMDiTConfig(**SMALL | options))


@pytest.mark.parametrize("single_depth", [0, 2])
def test_padding_changes_nothing(single_depth):
    model = randomize(mmdit.MMDiT(mmdit.MMDiTConfig(**SMALL | dict(pooled_width=None,
                                                                   single_depth=single_depth))))
    x, t = torch.randn(1, 4, 8, 8, dtype=torch.float64), torch.tensor([0.5])
    context = torch.randn(1, 9, 24, dtype=torch.float64)
    outs = [model(x, t, context[:, :length], torch.arange(length)[None] < 3) for length in (3, 5, 9)]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], atol=1e-6, rtol=1e-6)
    assert (model(x, t, context[:, :5]) - outs[0]).abs().max() > 1e-4                    # text does matter


@pytest.mark.parametrize("kind", ["dit", "mmdit", "single"])
@torch.no_grad()
def test_convolution_between_tokens(kind):
    """Zero at first; then each token also depends on its eight neighbours in the grid, in the MLP alone."""
    mlp = dit.MLP("swiglu", 16, 4.0, conv=True)
    x = torch.randn(1, 5 * 7, 16)
    plain = dit.MLP("swiglu", 16, 4.0)
    plain.load_state_dict({name: w for name, w in mlp.state_dict().items() if not name.startswith("conv")})
    torch.testing.assert_close(mlp(x, (5, 7)), plain(x))
    nn.init.normal_(mlp.conv.weight)
    moved = x.clone()
    moved[0, 2 * 7 + 3] += 1                                                   # row 2, column 3
    changed = (mlp(moved, (5, 7)) - mlp(x, (5, 7))).abs().amax(-1).view(5, 7) > 1e-6
    expected = torch.zeros(5, 7, dtype=torch.bool)
    expected[1:4, 2:5] = True
    assert torch.equal(changed, expected)

    cond = {"context": torch.randn(2, 3, 24)}
    if kind == "dit":
        model = dit.DiT(dit.DiTConfig(width=32, depth=2, heads=2, conv=True))
        cond = {}
    elif kind == "mmdit":
        model = mmdit.MMDiT(mmdit.MMDiTConfig(**SMALL | dict(pooled_width=None, conv=True)))
    else:
        model = mmdit.MMDiT(mmdit.MMDiTConfig(**SMALL | dict(pooled_width=None, conv=True, depth=0,
                                                             single_depth=2)))
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    x, t = torch.randn(2, 4, 6, 8), torch.rand(2)
    with_it = model(x, t, **cond)
    for module in model.modules():
        if isinstance(module, dit.TokenConv):
            nn.init.zeros_(module.weight)
    assert (with_it - model(x, t, **cond)).abs().max() > 1e-3
    assert sum(".conv." in name for name, _ in model.named_parameters()) == 2 * 2
