"""unet.py, dit.py and vae.py: identities, parameter counts, values against formulas
written differently."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import dit
import unet
import vae
from dit import DiT, DiTConfig
from unet import UNet, UNetConfig
from vae import VAE, Posterior, VAEConfig, psnr


def randomize(model: nn.Module) -> nn.Module:
    """Zero-initialised layers hide mistakes: give every parameter a value."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.2 if p.ndim > 1 else 0.5)
    return model.double().eval()


def count(cls, config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in cls(config).parameters())


SMALL_DIT = dict(width=32, depth=2, heads=2, num_classes=5)
SMALL_UNET = dict(widths=(16, 32), heads=2, groups=8, layers=1, num_classes=5)


# ---- embeddings

@pytest.mark.parametrize("module", [dit, unet])
def test_timestep_embedding(module):
    got = module.timestep_embedding(torch.tensor([0.0, 0.25, 1.0]), 8)
    for row, t in zip(got, (0.0, 250.0, 1000.0)):
        angles = [t * 10000 ** (-i / 4) for i in range(4)]
        torch.testing.assert_close(
            row, torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles]),
            rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cls, config", [(DiT, DiTConfig(**SMALL_DIT)), (UNet, UNetConfig(**SMALL_UNET))])
def test_time_is_not_rounded_in_bf16(cls, config):
    """bf16 has 8 bits: t and 1000 t would collapse neighbouring times.
    The embedding must take them in float32."""
    model = randomize(cls(config)).bfloat16()
    seen = []
    embed = model.t_embedder.mlp[0] if cls is DiT else model.time_embedding.linear_1
    embed.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    for t in (0.899, 0.9):
        model(torch.randn(1, 4, 8, 8, dtype=torch.bfloat16), torch.tensor([t]), y=torch.tensor([0]))
    assert (seen[0].float() - seen[1].float()).abs().max() > 0.5      # cos(899) and cos(900) are far apart
    module = dit if cls is DiT else unet
    torch.testing.assert_close(
        seen[1].float(), module.timestep_embedding(torch.tensor([0.9]), seen[1].shape[1]), rtol=0, atol=4e-3)


def test_sincos_positions_distinguish_axes_and_any_grid():
    table = dit.sincos_positions(3, 5, 16)
    assert table.shape == (15, 16) and len(torch.unique(table, dim=0)) == 15
    x, y = 4, 2
    want = [f(p * 10000 ** (-i / 4)) for p in (x, y) for f in (math.sin, math.cos) for i in range(4)]
    torch.testing.assert_close(table[y * 5 + x], torch.tensor(want))


# ---- DiT

@pytest.mark.parametrize("name, millions", [("S/2", 33), ("B/2", 130), ("L/2", 458), ("XL/2", 675),
                                            ("XL/8", 676), ("S/8", 33), ("B/4", 130)])
def test_dit_presets_have_their_published_size(name, millions):
    """Peebles & Xie table 1 (and table 4 for the patches), with 1000 classes and learned variance."""
    total = count(DiT, DiTConfig(num_classes=1000, learn_sigma=True, **dit.PRESETS[name],
                                 **dit.PUBLISHED_BLOCK))
    assert round(total / 1e6) == millions
    modern = count(DiT, DiTConfig(num_classes=1000, learn_sigma=True, **dit.PRESETS[name]))
    assert abs(modern / total - 1) < 0.01                                     # the modern block is as large


def test_sd1_presets_have_their_published_size():
    assert count(UNet, UNetConfig(**unet.PRESETS["sd1"])) == 859_520_964      # Stable Diffusion 1.5's unet
    assert count(VAE, VAEConfig(**vae.PRESETS["sd"])) == 83_653_863           # and its VAE


def test_dit_block_written_out():
    """The published block against its equations, with every parameter random."""
    model = randomize(DiT(DiTConfig(**SMALL_DIT, **dit.PUBLISHED_BLOCK)))
    block, x, c = (model.blocks[0], torch.randn(2, 6, 32, dtype=torch.float64),
                   torch.randn(2, 32, dtype=torch.float64))
    shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c).chunk(6, 1)
    h = F.layer_norm(x, (32,), eps=1e-6) * (1 + scale1[:, None]) + shift1[:, None]
    q, k, v = block.attn.qkv(h).chunk(3, -1)
    heads = [F.softmax(q[..., i:i + 16] @ k[..., i:i + 16].mT / 4, -1) @ v[..., i:i + 16] for i in (0, 16)]
    y = x + gate1[:, None] * block.attn.proj(torch.cat(heads, -1))
    h = F.layer_norm(y, (32,), eps=1e-6) * (1 + scale2[:, None]) + shift2[:, None]
    y = y + gate2[:, None] * block.mlp.fc2(F.gelu(block.mlp.fc1(h), approximate="tanh"))
    torch.testing.assert_close(block(x, c, None), y)


def test_dit_patches_are_put_back_where_they_came_from():
    """With blocks silenced and linear maps inverse to each other,
    patchify and unpatchify must be the identity."""
    config = DiTConfig(channels=3, patch=(2, 4), width=24, depth=0, heads=1, qk_norm=False)
    model = DiT(config).double()
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    tokens = F.unfold(x, (2, 4), stride=(2, 4)).mT                     # (B, N, C * p * q), channel slowest
    order = torch.arange(24).view(3, 2, 4).permute(1, 2, 0).flatten()  # the final layer has channel fastest
    model.final_layer.forward = lambda _, c, packing: tokens[..., order]
    torch.testing.assert_close(model(x, torch.zeros(2)), x)
    weight = torch.eye(24, dtype=torch.float64).view(24, 3, 2, 4)
    model.x_embedder.proj.weight.data, model.x_embedder.proj.bias.data = (
        weight, torch.zeros(24, dtype=torch.float64))
    torch.testing.assert_close(model.x_embedder(x), tokens)


@pytest.mark.parametrize("cls, config", [(DiT, DiTConfig(**SMALL_DIT)),
                                         (DiT, DiTConfig(**SMALL_DIT, **dit.PUBLISHED_BLOCK)),
                                         (UNet, UNetConfig(**SMALL_UNET))])
def test_zero_at_the_start_and_rectangular(cls, config):
    model, x, t, y = cls(config), torch.randn(3, 4, 8, 12), torch.rand(3), torch.tensor([0, 4, 5])
    assert (model(x, t, y=y) == 0).all()                               # zero-initialised output
    model = randomize(model)
    x = x.double()
    out = model(x, t, y=y)
    assert out.shape == x.shape
    for i in range(3):                                                 # each independent of the others
        torch.testing.assert_close(model(x[i:i + 1], t[i:i + 1], y=y[i:i + 1]), out[i:i + 1])
    # labels, times, null all matter
    assert (model(x, t, y=torch.tensor([1, 4, 5]))[0] - out[0]).abs().max() > 1e-6
    assert (model(x, t * 0.9, y=y) - out).abs().amax((1, 2, 3)).min() > 1e-6
    assert (model(x.transpose(2, 3), t, y=y).transpose(2, 3) - out).abs().max() > 1e-6
    with pytest.raises(ValueError, match="7x12"):
        model(x[:, :, :7], t, y=y)


@pytest.mark.parametrize("options", [dict(norm="batch"), dict(mlp="relu"), dict(width=30, heads=4)])
def test_dit_refuses(options):
    with pytest.raises(ValueError):
        DiT(DiTConfig(**{**SMALL_DIT, **options}))


# ---- U-Net

def test_unet_cross_attention_and_mask():
    model = randomize(UNet(UNetConfig(**SMALL_UNET | dict(context_width=12, num_classes=0))))
    x, t = torch.randn(2, 4, 4, 8, dtype=torch.float64), torch.rand(2)
    context = torch.randn(2, 5, 12, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    out = model(x, t, context=context, mask=mask)
    changed = context.clone()
    changed[0, 3:] = 100.0                                             # behind the mask: must not be seen
    torch.testing.assert_close(model(x, t, context=changed, mask=mask), out, rtol=0, atol=1e-12)
    # padding changes nothing
    torch.testing.assert_close(model(x[:1], t[:1], context=context[:1, :3]), out[:1])
    assert (model(x, t, context=changed) - out)[0].abs().max() > 1e-6
    with pytest.raises(ValueError, match="context"):
        model(x, t)


def test_unet_positions():
    """Each pixel's row and column by sines and cosines; without them a transformer of pixels cannot tell how
    they lie."""
    got = unet.position_embedding(3, 5, 8)
    for i, j in ((0, 0), (2, 4), (1, 3)):
        want = [f(n * 0.01**k) for n in (i, j) for f in (math.cos, math.sin) for k in (0, 1)]
        torch.testing.assert_close(got[5 * i + j], torch.tensor(want))
    x, order = torch.randn(1, 16, 3, 5), torch.randperm(15)
    for positions in (False, True):
        module = unet.SpatialTransformer(16, 2, UNetConfig(groups=8, positions=positions))
        moved = module(x.flatten(2)[..., order].view_as(x), None, None)
        same = torch.allclose(moved.flatten(2), module(x, None, None).flatten(2)[..., order], atol=1e-5)
        assert same != positions


def test_unet_uses_every_skip():
    model = randomize(UNet(UNetConfig(**SMALL_UNET)))
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    out = model(x, torch.ones(1), y=torch.tensor([0]))
    for level in model.down_blocks:
        for resnet in level.resnets:
            handle = resnet.register_forward_hook(lambda m, i, o: o * 1.5)
            assert (model(x, torch.ones(1), y=torch.tensor([0])) - out).abs().max() > 1e-6
            handle.remove()
    with pytest.raises(ValueError, match="width 20"):
        UNet(UNetConfig(widths=(20, 32), groups=8))
    with pytest.raises(ValueError, match="one entry per level"):
        UNet(UNetConfig(widths=(32, 32, 32)))


# ---- VAE

def test_posterior():
    moments = torch.randn(4, 6, 2, 2)
    moments[0, 3:] = 1000.0
    posterior = Posterior(moments)
    assert posterior.logvar.max() == 20.0                              # clamped: no inf in std or KL
    want = torch.distributions.kl_divergence(
        torch.distributions.Normal(posterior.mean[1:], posterior.std[1:]),
        torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(posterior.kl()[1:], want)
    small = Posterior(torch.cat([torch.full((1, 1, 64, 64), 0.3),
                                 torch.full((1, 1, 64, 64), 2 * math.log(0.5))], 1))
    z = small.sample(torch.Generator().manual_seed(0))
    assert abs(z.mean() - 0.3) < 0.04 and abs(z.std() - 0.5) < 0.03
    torch.testing.assert_close(z, small.sample(torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("widths", [(8,), (8, 16), (8, 8, 16, 16)])
@pytest.mark.parametrize("quant_conv", [True, False])
def test_vae_factor_is_any_power_of_two(widths, quant_conv):
    model = VAE(VAEConfig(widths=widths, groups=4, quant_conv=quant_conv, latent_channels=3))
    f = 2 ** (len(widths) - 1)
    x = torch.randn(2, 3, 2 * f, 3 * f)
    z = model.encode(x).mean
    assert z.shape == (2, 3, 2, 3) and model.decode(z).shape == x.shape
    torch.testing.assert_close(model.encode(x[1:]).mean, z[1:], rtol=1e-4, atol=1e-5)
    if f > 1:
        with pytest.raises(ValueError, match=f"multiples of {f}"):
            model.encode(x[..., 1:])


def test_normalisation_goes_both_ways():
    model = VAE(VAEConfig(widths=(8, 8), groups=4))
    z = (torch.randn(500, 4, 4, 4) * torch.tensor([0.1, 1.0, 5.0, 0.0]).view(4, 1, 1)
         + torch.arange(4.0).view(4, 1, 1))
    model.set_latent_statistics(z.mean((0, 2, 3)), z.var((0, 2, 3)))
    x0 = model.normalize(z)
    torch.testing.assert_close(x0.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(x0[:, :3].std((0, 2, 3)), torch.ones(3), rtol=1e-3, atol=0)
    torch.testing.assert_close(model.denormalize(x0), z, rtol=1e-5, atol=1e-5)
    assert "latent_mean" in model.state_dict() and torch.isfinite(x0).all()


@pytest.mark.parametrize("channels, factor, latent", [(3, 4, 4), (1, 2, 6), (3, 8, 16)])
def test_vae_shortcut(channels, factor, latent):
    """It begins as the projection onto orthonormal waves: flat patches in the first ones, exactly."""
    widths = (8,) * (factor.bit_length())
    model = VAE(VAEConfig(image_channels=channels, latent_channels=latent, widths=widths, groups=4,
                          shortcut=True))
    waves = vae.cosines(min(latent, channels * factor**2), channels, factor).flatten(1)
    torch.testing.assert_close(waves @ waves.T, torch.eye(len(waves)), atol=5e-6, rtol=0)
    flat = torch.rand(2, channels, 2, 3).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    torch.testing.assert_close(model.decode(model.encode(flat).mean), flat, atol=1e-5, rtol=0)
    x = torch.rand(2, channels, 2 * factor, 3 * factor)
    projected = model.decode(model.encode(x).mean)
    torch.testing.assert_close(model.decode(model.encode(projected).mean), projected, atol=1e-5, rtol=0)
    assert (projected - x).square().mean() < (x - x.mean()).square().mean()
    torch.testing.assert_close(model.encode(x).std, torch.full_like(model.encode(x).std, math.exp(-3)))
    loss, _ = model.loss(x, 1e-5)
    loss.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.decoder.conv_out.weight.grad.any() and model.patch_decoder.weight.grad.any()


def test_vae_loss_is_reconstruction_plus_kl():
    model = randomize(VAE(VAEConfig(widths=(8, 8), groups=4))).float()
    x = torch.rand(2, 3, 4, 6) * 2 - 1
    loss, logs = model.loss(x, 0.1, torch.Generator().manual_seed(1))
    posterior = model.encode(x)
    recon = model.decode(posterior.sample(torch.Generator().manual_seed(1)))
    torch.testing.assert_close(loss, (recon - x).abs().mean((1, 2, 3)) + 2 * (recon - x).square().mean(
        (1, 2, 3)) + 0.1 * posterior.kl() / 72)
    torch.testing.assert_close(logs["psnr"], psnr(recon, x).mean())
    assert logs["latent_std"].shape == (4,)
    assert abs(psnr(torch.full((1, 1, 2, 2), 0.1), torch.zeros(1, 1, 2, 2)).item()
               - 10 * math.log10(4 / 0.01)) < 1e-4


def test_vae_loss_with_noise_on_the_latent(monkeypatch):
    """Each picture's latent gets noise of its own share of the deviations, uniform up to the limit."""
    model = randomize(VAE(VAEConfig(widths=(8, 8), groups=4, latent_channels=2))).float()
    x = torch.rand(200, 3, 8, 8) * 2 - 1
    given, decode = [], model.decode
    monkeypatch.setattr(model, "decode", lambda z: given.append(z) or decode(z))
    for seed, noise in ((0, 0.0), (1, 0.4), (2, 0.4)):
        torch.manual_seed(seed)                                           # all noise is the generator's
        model.loss(x, 0.1, torch.Generator().manual_seed(1), noise=noise)
    assert torch.equal(given[1], given[2])
    z = model.encode(x).sample(torch.Generator().manual_seed(1))
    assert torch.equal(given[0], z)
    relative = (given[1] - z) / z.std(dim=(2, 3), correction=0, keepdim=True)
    shares = relative.square().mean((1, 2, 3)).sqrt() / 0.4               # (200,)
    assert 0 < shares.min() < 0.05 and 0.9 < shares.max() < 1.3 and abs(shares.mean() - 0.5) < 0.06
    assert abs(relative.square().mean() - 0.4**2 / 3) < 0.01              # E[u^2] = 1/3
    channels = relative.square().mean((0, 2, 3))
    assert abs(channels[0] / channels[1] - 1) < 0.1                       # although their deviations differ


def test_vae_loss_with_equivariance():
    model = randomize(VAE(VAEConfig(widths=(8, 8), groups=4))).float()
    x = torch.rand(2, 3, 8, 12) * 2 - 1
    plain, _ = model.loss(x, 0.1, torch.Generator().manual_seed(1))
    loss, _ = model.loss(x, 0.1, torch.Generator().manual_seed(1), equivariance=0.5)
    z = model.encode(x).sample(torch.Generator().manual_seed(1))
    small = [part.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5)) for part in (z, x)]
    error = model.decode(small[0]) - small[1]
    torch.testing.assert_close(loss - plain, 0.5 * (error.abs() + 2 * error.square()).mean((1, 2, 3)))


def test_vae_attention_and_padding_written_out():
    layer = randomize(vae.Attention(8, 4))
    x = torch.randn(2, 8, 3, 2, dtype=torch.float64)
    h = F.group_norm(x, 4, layer.group_norm.weight, layer.group_norm.bias, 1e-6).permute(
        0, 2, 3, 1).reshape(2, 6, 8)
    q, k, v = layer.to_q(h), layer.to_k(h), layer.to_v(h)
    want = x + layer.to_out[0](F.softmax(q @ k.mT / 8**0.5, -1) @ v).reshape(2, 3, 2, 8).permute(0, 3, 1, 2)
    torch.testing.assert_close(layer(x), want)
    down = vae.Downsample(1)
    nn.init.ones_(down.conv.weight), nn.init.zeros_(down.conv.bias)
    torch.testing.assert_close(down(torch.ones(1, 1, 4, 4))[0, 0], torch.tensor([[9.0, 6.0], [6.0, 4.0]]))
