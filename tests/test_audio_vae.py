"""audio_vae.py: layers and losses against formulas, identities of the code that it starts with, and
diffusers' AutoencoderOobleck, where that package is installed."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import audio_vae
from audio_vae import AudioVAE, AudioVAEConfig, Posterior, magnitudes, snr, spectral_distance, window_sizes

SMALL = dict(widths=(6, 8, 10), strides=(2, 4), latent_channels=3)


def randomize(model, scale=0.3):
    """Every parameter random, in float64, the gains around one."""
    model = model.double()
    for name, weight in model.named_parameters():
        nn.init.normal_(weight, mean=1.0 if name.endswith("weight_g") else 0.0, std=scale)
    return model


def sounds(count, length, channels=1):
    """Mixtures of two sines, in float64."""
    t = torch.arange(length, dtype=torch.float64)
    f, a = torch.rand(2, count, channels, 2, 1, dtype=torch.float64)
    return (0.4 * a * torch.sin((0.02 + f) * t)).sum(2)


# ---- posterior and layers

def test_posterior():
    moments = torch.randn(2, 6, 5, dtype=torch.float64)
    q = Posterior(moments)
    assert q.mean.shape == q.std.shape == (2, 3, 1, 5)
    assert torch.equal(q.mean[:, :, 0], moments[:, :3])
    torch.testing.assert_close(q.std[:, :, 0], (1 + moments[:, 3:].exp()).log() + 1e-4)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(q.mean, q.std), normal(0.0, 1.0))
    torch.testing.assert_close(q.kl(), kl.sum((1, 2, 3)))
    again = [q.sample(torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*again)
    wide = Posterior(torch.cat([torch.full((1, 1, 9999), 0.3), torch.full((1, 1, 9999), -1.0)], 1))
    z = wide.sample(torch.Generator().manual_seed(0))
    assert abs(z.mean() - 0.3) < 0.01 and abs(z.std() / wide.std.mean() - 1) < 0.02
    assert Posterior(moments.bfloat16()).std.dtype == torch.float32


@pytest.mark.parametrize("bias", [True, False])
def test_weight_norm(bias):
    """Filters of norm |g| in the direction of v, as PyTorch's own parametrisation has them."""
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    ours = randomize(audio_vae.Conv(3, 5, 7, dilation=3, bias=bias))
    theirs = nn.Conv1d(3, 5, 7, padding=9, dilation=3, bias=bias).double()
    ours_t = randomize(audio_vae.TransposedConv(3, 5, 8, stride=4, padding=2, bias=bias))
    theirs_t = nn.ConvTranspose1d(3, 5, 8, stride=4, padding=2, bias=bias).double()
    for layer, want in ((ours, theirs), (ours_t, theirs_t)):
        torch.testing.assert_close(layer.weight().square().sum((1, 2)).sqrt(), layer.weight_g.abs()[:, 0, 0])
        nn.utils.parametrizations.weight_norm(want)
        want.parametrizations.weight.original0.data.copy_(layer.weight_g)
        want.parametrizations.weight.original1.data.copy_(layer.weight_v)
        if bias:
            want.bias.data.copy_(layer.bias)
        torch.testing.assert_close(layer(x), want(x))
    assert ours(x).shape == (2, 5, 24) and ours_t(x).shape == (2, 5, 96)


def test_snake_written_out():
    snake = randomize(audio_vae.Snake(4))
    x = torch.randn(2, 4, 9, dtype=torch.float64)
    a, b = snake.alpha.detach().exp(), snake.beta.detach().exp()
    torch.testing.assert_close(snake(x), x + (1 - torch.cos(2 * a * x)) / (2 * b), rtol=1e-7, atol=1e-7)
    assert (audio_vae.Snake(1)(torch.zeros(1, 1, 3)) == 0).all()


def test_residual_units_see_what_their_dilation_says():
    unit = randomize(audio_vae.ResidualUnit(2, 9))
    x = torch.zeros(1, 2, 101, dtype=torch.float64)
    changed = unit(x + F.one_hot(torch.tensor(50), 101)) - unit(x)
    assert changed[0].abs().amax(0).nonzero()[:, 0].tolist() == [23, 32, 41, 50, 59, 68, 77]


@pytest.mark.parametrize("strides", [(2,), (2, 4), (3, 2), (5, 2, 3), (2, 4, 4, 4)])
def test_factor_is_the_product_of_any_strides(strides):
    config = AudioVAEConfig(widths=(4,) * (len(strides) + 1), strides=strides, latent_channels=3, channels=2)
    model = randomize(AudioVAE(config), 0.2)
    f = math.prod(strides)
    x = sounds(2, 5 * f, 2)
    assert model.factor == f
    z = model.encode(x).mean
    assert z.shape == (2, 3, 1, 5) and model.decode(z).shape == x.shape
    torch.testing.assert_close(model.encode(x[1:]).mean, z[1:])
    with pytest.raises(ValueError, match=f"sound of {5 * f - 1} samples: must be a multiple of {f}"):
        model.encode(x[..., 1:])


@pytest.mark.parametrize("change, message", [
    (dict(widths=(8, 16)), r"AudioVAE widths \(8, 16\): must be 5, one more than the strides \(2, 4, 4, 4\)"),
    (dict(strides=(2, 4, 1, 4)), r"AudioVAE strides \(2, 4, 1, 4\): each must be at least 2")])
def test_structures_that_do_not_exist_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        AudioVAE(AudioVAEConfig(**change))


def test_normalisation_goes_both_ways():
    model = AudioVAE(AudioVAEConfig(**SMALL | dict(latent_channels=4)))
    z = (torch.randn(500, 4, 1, 16) * torch.tensor([0.1, 1.0, 5.0, 0.0]).view(4, 1, 1)
         + torch.arange(4.0).view(4, 1, 1))
    model.set_latent_statistics(z.mean((0, 2, 3)), z.var((0, 2, 3)))
    x0 = model.normalize(z)
    torch.testing.assert_close(x0.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(x0[:, :3].std((0, 2, 3)), torch.ones(3), rtol=1e-3, atol=0)
    torch.testing.assert_close(model.denormalize(x0), z, rtol=1e-5, atol=1e-5)
    assert "latent_mean" in model.state_dict() and torch.isfinite(x0).all()


# ---- what a model starts as

@pytest.mark.parametrize("layer", [audio_vae.Conv(40, 80, 8, stride=4, padding=2), audio_vae.Conv(64, 64, 7),
                                   audio_vae.TransposedConv(80, 40, 8, stride=4, padding=2)])
def test_layers_keep_the_variance_at_the_start(layer):
    y = layer(torch.randn(16, layer.weight_v.shape[1 if type(layer) is audio_vae.Conv else 0], 512))
    assert 0.9 < y[..., 32:-32].std() < 1.1


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_a_model_starts_with_signals_of_one_size_and_little_noise(preset):
    model = AudioVAE(AudioVAEConfig(**audio_vae.PRESETS[preset]))
    x = 0.25 * torch.randn(4, 1, 4096)
    posterior = model.encode(x)
    torch.testing.assert_close(posterior.std, torch.full_like(posterior.std, math.log1p(math.exp(-3)) + 1e-4))
    assert 0.3 < posterior.mean.std() < 3 and 0.05 < model.decode(posterior.mean).std() < 1
    h = torch.randn(2, 5, 30)
    assert torch.equal(audio_vae.AudioVAE(AudioVAEConfig(widths=(5, 5), strides=(2,))).encoder.block[0]
                       .res_unit3(h), h)                                  # the identity
    loss, _ = model.loss(x, 1e-2)
    loss.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    gains = [p.grad for name, p in model.named_parameters() if name.endswith("weight_g") and not p.any()]
    assert len(gains) == 24 and all(grad.any() for grad in gains)         # zeros that do not stay


# ---- losses

def test_windows_are_the_published_ones_scaled():
    assert window_sizes(44100) == window_sizes(48000) == (2048, 1024, 512, 256, 128, 64, 32)
    assert window_sizes(22050)[0] == 1024 and window_sizes(16000)[0] == 1024 and window_sizes(8000)[0] == 512


@pytest.mark.parametrize("size", [8, 32, 256])
def test_magnitudes_are_those_of_a_direct_transform(size):
    x = torch.randn(2, 300, dtype=torch.float64)
    got = magnitudes(x[:, None], size)[:, 0]
    hop, half = size // 4, size // 2
    padded = np.pad(x.numpy(), ((0, 0), (half, half)))
    n = np.arange(size)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * n / size)
    waves = np.exp(-2j * np.pi * np.arange(half + 1)[:, None] * n / size) * window
    waves = waves / np.sqrt((window**2).sum())
    frames = np.stack([padded[:, i:i + size] for i in range(0, 301, hop)], -1)        # (2, size, frames)
    want = np.sqrt(np.abs(waves @ frames) ** 2 + audio_vae.FLOOR**2)
    torch.testing.assert_close(got, torch.from_numpy(want))


def test_magnitudes_of_a_sine_and_of_noise():
    """a / 2 times the window's sum over its norm, sqrt(2 size / 3); and the deviation, for any window."""
    x = 0.3 * torch.sin(2 * torch.pi * 10 / 64 * torch.arange(512, dtype=torch.float64))
    inside = magnitudes(x, 64)[:, 4:-4]
    want = 0.15 * math.sqrt(2 * 64 / 3)
    torch.testing.assert_close(inside[10], torch.full_like(inside[10], want), rtol=1e-4, atol=0)
    assert inside[20:].max() < 1.01 * audio_vae.FLOOR
    for size in (16, 128):
        noise = magnitudes(0.2 * torch.randn(2**15), size)[1:-1, 4:-4]
        assert abs(noise.square().mean().sqrt() - 0.2) < 0.005


@pytest.mark.parametrize("channels", [1, 2])
def test_spectral_distance_of_a_scaled_sound(monkeypatch, channels):
    """By a factor s: convergence |s - 1|, logarithm |log s|, magnitude |s - 1| times the mean. In stereo, the
    sum and the difference are two more channels."""
    monkeypatch.setattr(audio_vae, "FLOOR", 1e-9)
    monkeypatch.setattr(audio_vae, "QUIET", 0.0)
    x = torch.randn(3, channels, 512, dtype=torch.float64)
    heard = x
    if channels == 2:
        heard = torch.stack([x[:, 0], x[:, 1], x[:, 0] + x[:, 1], x[:, 0] - x[:, 1]], 1)
    sizes = window_sizes(8000)
    mean = sum(magnitudes(heard, size).mean((1, 2, 3)) for size in sizes) / len(sizes)
    for scale in (0.5, 1.0, -3.0):
        want = abs(abs(scale) - 1) * (1 + mean) + abs(math.log(abs(scale)))
        torch.testing.assert_close(spectral_distance(scale * x, x, 8000), want, rtol=1e-5, atol=1e-7)


def test_spectral_distance_from_silence():
    """Of quiet noise, relative to QUIET: no more than its loudness deserves."""
    silence = torch.zeros(1, 1, 8192, dtype=torch.float64)
    noise = 0.003 * torch.randn_like(silence)
    magnitude = 0.0
    for size in window_sizes(8000):
        got = magnitudes(noise, size)
        change = got - audio_vae.FLOOR
        relative = change.square().mean().sqrt() / (audio_vae.QUIET + audio_vae.FLOOR)
        magnitude = magnitude + relative + (got / audio_vae.FLOOR).log().mean() + change.mean()
    torch.testing.assert_close(spectral_distance(noise, silence, 8000), magnitude[None] / 7)


def test_signal_to_noise_ratio():
    x = sounds(3, 256, 2)
    noise = torch.randn_like(x)
    noise = noise * (x.square().mean((1, 2)) / noise.square().mean((1, 2))).sqrt().view(3, 1, 1)
    torch.testing.assert_close(snr(x + 0.1 * noise, x), torch.full((3,), 20.0, dtype=x.dtype), rtol=1e-6,
                               atol=0)


@pytest.mark.parametrize("channels, weights", [(1, {}), (2, {}), (1, {"waveform": 3.0})])
def test_loss_is_the_sum_of_its_terms(channels, weights):
    model = randomize(AudioVAE(AudioVAEConfig(**SMALL, channels=channels)))
    x = sounds(3, 640, channels)
    loss, logs = model.loss(x, 0.1, torch.Generator().manual_seed(1), **weights)
    posterior = model.encode(x)
    recon = model.decode(posterior.sample(torch.Generator().manual_seed(1)))
    spectral = spectral_distance(recon, x, 8000)
    waveform = weights.get("waveform", audio_vae.WAVEFORM)
    torch.testing.assert_close(loss, spectral + waveform * (recon - x).abs().mean((1, 2))
                               + 0.1 * posterior.kl() / (640 * channels))
    torch.testing.assert_close(logs["snr"], snr(recon, x).mean())
    torch.testing.assert_close(logs["kl"], posterior.kl().mean())
    torch.testing.assert_close(logs["latent_std"], posterior.mean.std((0, 2, 3)))
    assert not any(value.requires_grad for value in logs.values())


def test_loss_of_a_sound_is_independent_of_its_batch_and_of_how_it_is_shared():
    model = randomize(AudioVAE(AudioVAEConfig(**SMALL)))
    x = sounds(5, 160)
    parts = []
    for part in (slice(0, 2), slice(2, 5)):
        torch.manual_seed(7)
        parts.append(model.loss(x[part], 0.1, rows=(5, part))[0])
    torch.manual_seed(7)
    torch.testing.assert_close(torch.cat(parts), model.loss(x, 0.1)[0])


def test_noise_on_a_shared_batch_is_that_of_the_whole():
    model = randomize(AudioVAE(AudioVAEConfig(**SMALL)))
    x = sounds(5, 160)

    def loss(part, noise=0.3):
        return model.loss(x[part], 0.1, torch.Generator().manual_seed(1), rows=(5, part), noise=noise)[0]

    whole = loss(slice(0, 5))
    torch.testing.assert_close(torch.cat([loss(slice(0, 2)), loss(slice(2, 5))]), whole)
    assert (whole - loss(slice(0, 5), noise=0)).abs().min() > 1e-3


def test_loss_with_noise_on_the_latent(monkeypatch):
    """Each sound's latent gets noise of its own share of the deviations, uniform up to the limit."""
    model = randomize(AudioVAE(AudioVAEConfig(widths=(4, 4, 4), strides=(2, 4), latent_channels=2)))
    x = sounds(200, 320)
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
    channels = relative.square().mean((0, 2, 3))
    assert abs(channels[0] / channels[1] - 1) < 0.1                       # although their deviations differ


@pytest.mark.parametrize("preset", ["tiny", "random"])
def test_silence_has_finite_gradients(preset):
    model = AudioVAE(AudioVAEConfig(**audio_vae.PRESETS["tiny"]))
    if preset == "random":
        model = randomize(model).float()
    x = torch.zeros(2, 1, 1024)
    x[1, 0, :300] = 0.5 * torch.sin(0.2 * torch.arange(300.0))
    loss, logs = model.loss(x, 1e-4)
    loss.sum().backward()
    assert all(torch.isfinite(value).all() for value in (loss, *logs.values()))
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    exact = torch.zeros(1, 1, 1024, requires_grad=True)
    spectral_distance(exact, torch.zeros(1, 1, 1024), 8000).sum().backward()
    assert torch.equal(exact.grad, torch.zeros_like(exact))


def test_autocast_leaves_latents_and_samples_exact():
    model = randomize(AudioVAE(AudioVAEConfig(**SMALL))).float()
    x = sounds(2, 160).float()
    with torch.autocast("cpu", torch.bfloat16):
        posterior = model.encode(x)
        recon = model.decode(posterior.mean)
        loss, _ = model.loss(x, 1e-4, torch.Generator().manual_seed(0))
    assert posterior.mean.dtype == posterior.std.dtype == recon.dtype == loss.dtype == torch.float32
    assert torch.equal(recon, model.decode(posterior.mean))


# ---- diffusers' AutoencoderOobleck

def oobleck(**config):
    """It, and ours of the same structure, without our own buffers in the state dict."""
    diffusers = pytest.importorskip("diffusers", reason="pip install diffusers, for the comparison")
    theirs = diffusers.AutoencoderOobleck(**config)
    c = theirs.config
    widths = (c.encoder_hidden_size, *(c.encoder_hidden_size * m for m in c.channel_multiples))
    ours = AudioVAE(AudioVAEConfig(rate=c.sampling_rate, channels=c.audio_channels, widths=widths,
                                   latent_channels=c.decoder_input_channels,
                                   strides=tuple(c.downsampling_ratios)))
    return theirs, ours


def named_shapes(model):
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()
            if not name.startswith("latent_")}


@pytest.mark.optional
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("channels", [1, 2])
def test_equals_diffusers(channels, dtype, tolerance):
    theirs, ours = oobleck(encoder_hidden_size=12, decoder_channels=12, decoder_input_channels=6,
                           downsampling_ratios=[2, 4, 8], channel_multiples=[1, 2, 4],
                           audio_channels=channels, sampling_rate=8000)
    theirs = randomize(theirs, 0.1).to(dtype).eval()
    buffers = {name: value for name, value in ours.state_dict().items() if name.startswith("latent_")}
    ours = ours.to(dtype)
    ours.load_state_dict(theirs.state_dict() | buffers, strict=True)
    x = sounds(2, 640, channels).to(dtype)
    want, got = theirs.encode(x).latent_dist, ours.encode(x)

    def distance(a, b):
        return ((a - b).norm() / b.norm()).item()

    with torch.no_grad():
        assert distance(got.mean[:, :, 0], want.mean) < tolerance
        assert distance(got.std[:, :, 0], want.std) < tolerance
        z = torch.randn(2, 6, 10, dtype=dtype)
        assert distance(ours.decode(z[:, :, None]), theirs.decode(z).sample) < tolerance


@pytest.mark.optional
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_full_size_preset_has_the_published_names_and_shapes():
    with torch.device("meta"):
        theirs, _ = oobleck()
        ours = AudioVAE(AudioVAEConfig(**audio_vae.PRESETS["stable-audio-open"]))
    assert named_shapes(ours) == named_shapes(theirs)
    assert ours.factor == theirs.hop_length == 2048 and ours.config.rate == theirs.config.sampling_rate
    assert sum(p.numel() for p in ours.parameters()) == 156_112_514
