"""The autoencoder of sounds: waveforms <-> latents, with the structure of Stable Audio's Oobleck.

    python audio_vae.py               # trains a tiny one in seconds and prints how well it reconstructs

The twin of vae.py: a waveform (B, c, T) in [-1, 1] becomes a diagonal Gaussian over (B, C, 1, T/f), a picture
of height one, so that the networks for pictures take it. Weight-normed convolutions and residual units with
Snake activations, strided down and transposed up: Evans et al. 2024 (arXiv:2402.04825, arXiv:2407.14358).
Modules are named as in diffusers' AutoencoderOobleck, so that weights published elsewhere load by name; only
the two latent buffers are this project's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass
class AudioVAEConfig:
    """The structure of an AudioVAE, stored in every checkpoint that contains one."""

    rate: int = 8000                               # samples per second
    channels: int = 1                              # of the waveform: 2 for stereo
    latent_channels: int = 16
    widths: tuple[int, ...] = (8, 16, 32, 64, 128)     # before the first stride, and after each
    strides: tuple[int, ...] = (2, 4, 4, 4)        # their product is the ratio of samples to latent frames


PRESETS = {
    "tiny": dict(widths=(4, 8, 8, 16, 16)),                            # 32 k: for tests
    "small": dict(),                                                   # 0.47 M: two cores train it in minutes
    "medium": dict(widths=(8, 16, 64, 128, 256)),                      # 1.7 M: for speech
    "stable-audio-open": dict(                                         # 156.1 M: Stable Audio Open
        rate=44100, channels=2, latent_channels=64, widths=(128, 128, 256, 512, 1024, 2048),
        strides=(2, 4, 4, 8, 8)),
}


class Posterior:
    """Diagonal Gaussian q(z|x) from the encoder's moments (B, 2 C, n): mean and standard deviation, each
    (B, C, 1, n) in float32 at least. The deviation is softplus(second half) + 1e-4, as published."""

    def __init__(self, moments: Tensor):
        if moments.dtype != torch.float64:
            moments = moments.float()              # autocast returns bfloat16, too coarse for a logarithm
        self.mean, scale = moments[:, :, None].chunk(2, dim=1)
        self.std = F.softplus(scale) + 1e-4

    def sample(self, generator: torch.Generator | None = None,
               rows: tuple[int, slice] | None = None) -> Tensor:
        """One draw (B, C, 1, n), differentiable in mean and std. rows: as in `AudioVAE.loss`."""
        count, part = rows or (len(self.mean), slice(None))
        noise = torch.randn((count, *self.mean.shape[1:]), generator=generator, device=self.mean.device,
                            dtype=self.mean.dtype)
        return self.mean + self.std * noise[part]

    def kl(self) -> Tensor:
        """(B,) KL(q(z|x) || N(0, I)) in nats, summed over the latent."""
        return 0.5 * (self.mean**2 + self.std**2 - 1.0 - 2.0 * self.std.log()).flatten(1).sum(1)


# ---- layers

class Conv(nn.Module):
    """A convolution along time with weight normalisation (Salimans & Kingma 2016, arXiv:1602.07868): the
    filters weight_g * weight_v / |weight_v|, one gain and one norm for each index of the first dimension.
    That index counts output channels, and input channels where the convolution is transposed."""

    def __init__(self, c_in: int, c_out: int, kernel: int, *, stride: int = 1, dilation: int = 1,
                 padding: int | None = None, bias: bool = True):
        super().__init__()
        self.stride = stride
        self.dilation = dilation
        self.padding = (kernel - 1) * dilation // 2 if padding is None else padding    # None: length is kept
        first, second = self.order(c_in, c_out)
        self.weight_g = nn.Parameter(torch.empty(first, 1, 1))
        self.weight_v = nn.Parameter(torch.empty(first, second, kernel))
        self.register_parameter("bias", nn.Parameter(torch.empty(c_out)) if bias else None)
        bound = 1 / math.sqrt(second * kernel)
        nn.init.uniform_(self.weight_v, -bound, bound)
        nn.init.constant_(self.weight_g, self.gain(c_in, c_out))
        if bias:
            nn.init.zeros_(self.bias)

    @staticmethod
    def order(c_in: int, c_out: int) -> tuple[int, int]:
        return c_out, c_in

    def gain(self, c_in: int, c_out: int) -> float:
        """With which the variance stays the same, whatever weight_v is: there is no other normalisation."""
        return 1.0

    def weight(self) -> Tensor:
        norm = torch.linalg.vector_norm(self.weight_v, dim=(1, 2), keepdim=True)
        return self.weight_v * (self.weight_g / norm)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight(), self.bias, self.stride, self.padding, self.dilation)


class TransposedConv(Conv):
    """(B, c_in, n) -> (B, c_out, n * stride)."""

    @staticmethod
    def order(c_in: int, c_out: int) -> tuple[int, int]:
        return c_in, c_out

    def gain(self, c_in: int, c_out: int) -> float:
        return math.sqrt(self.stride * c_out / c_in)

    def forward(self, x: Tensor) -> Tensor:
        # One more sample at the end where the stride is odd. The published strides are even.
        return F.conv_transpose1d(x, self.weight(), self.bias, self.stride, self.padding, self.stride % 2)


class Snake(nn.Module):
    """x + sin(a x)^2 / b, with a and b per channel, both stored as logarithms (Ziyin et al. 2020,
    arXiv:2006.08195, where b = a): periodic as sounds are, on a line that keeps large values apart."""

    def __init__(self, width: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1, width, 1))
        self.beta = nn.Parameter(torch.zeros(1, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        wave = torch.sin(self.alpha.exp() * x)
        height = 1 / (self.beta.exp() + 1e-9)
        return x + wave * wave * height                    # a step is 6 % faster than with .square() / b


class ResidualUnit(nn.Module):
    """x + conv1x1(snake(conv7(snake(x)))). The convolution of seven taps is dilated."""

    def __init__(self, width: int, dilation: int):
        super().__init__()
        self.snake1 = Snake(width)
        self.conv1 = Conv(width, width, 7, dilation=dilation)
        self.snake2 = Snake(width)
        self.conv2 = Conv(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.snake1(x))                                         # (B, width, T)
        return x + self.conv2(self.snake2(h))


class EncoderBlock(nn.Module):
    """Residual units that see further and further, then a convolution that divides the length by `stride`."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.res_unit1 = ResidualUnit(c_in, 1)
        self.res_unit2 = ResidualUnit(c_in, 3)
        self.res_unit3 = ResidualUnit(c_in, 9)
        self.snake1 = Snake(c_in)
        self.conv1 = Conv(c_in, c_out, 2 * stride, stride=stride, padding=math.ceil(stride / 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.res_unit3(self.res_unit2(self.res_unit1(x)))                  # (B, c_in, T)
        return self.conv1(self.snake1(x))                                      # (B, c_out, T / stride)


class DecoderBlock(nn.Module):
    """A transposed convolution that multiplies the length by `stride`, then residual units."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.snake1 = Snake(c_in)
        self.conv_t1 = TransposedConv(c_in, c_out, 2 * stride, stride=stride, padding=math.ceil(stride / 2))
        self.res_unit1 = ResidualUnit(c_out, 1)
        self.res_unit2 = ResidualUnit(c_out, 3)
        self.res_unit3 = ResidualUnit(c_out, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_t1(self.snake1(x))                                       # (B, c_out, n * stride)
        return self.res_unit3(self.res_unit2(self.res_unit1(x)))


class Encoder(nn.Module):
    """Waveforms (B, c, T) -> moments (B, 2 C, n) of the posterior, where n = T / f."""

    def __init__(self, c: AudioVAEConfig):
        super().__init__()
        self.conv1 = Conv(c.channels, c.widths[0], 7)
        self.block = nn.ModuleList(EncoderBlock(c.widths[i], c.widths[i + 1], stride)
                                   for i, stride in enumerate(c.strides))
        self.snake1 = Snake(c.widths[-1])
        self.conv2 = Conv(c.widths[-1], 2 * c.latent_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)                                                      # (B, widths[0], T)
        for block in self.block:
            x = block(x)                                                       # finally (B, widths[-1], n)
        return self.conv2(self.snake1(x))


class Decoder(nn.Module):
    """Raw latents (B, C, n) -> waveforms (B, c, n * f)."""

    def __init__(self, c: AudioVAEConfig):
        super().__init__()
        widths = c.widths[::-1]
        self.conv1 = Conv(c.latent_channels, widths[0], 7)
        self.block = nn.ModuleList(DecoderBlock(widths[i], widths[i + 1], stride)
                                   for i, stride in enumerate(c.strides[::-1]))
        self.snake1 = Snake(widths[-1])
        self.conv2 = Conv(widths[-1], c.channels, 7, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv1(z)                                                      # (B, widths[-1], n)
        for block in self.block:
            x = block(x)                                                       # finally (B, widths[0], n * f)
        return self.conv2(self.snake1(x))


# ---- the spectral loss

SIZES = (2048, 1024, 512, 256, 128, 64, 32)   # of the published windows, at 44,100 samples per second
FLOOR = 1e-3                                  # magnitudes below it, -60 dB, count as silence
QUIET = 0.03                                  # of sounds quieter than this, errors are relative to it
# Weight of the absolute error of the samples. It is larger than the published 0.1, which a discriminator
# complements: magnitudes do not know the phase, and with a small weight its error stays large for long. With
# a large one, what is too complex for the latent is left out: of speech, most above 1 kHz.
WAVEFORM = 100.0


def window_sizes(rate: int) -> tuple[int, ...]:
    """The published windows in samples at this rate: powers of two, at least 8, about as long in seconds."""
    scale = 2.0 ** round(math.log2(rate / 44100))
    return tuple(int(size * scale) for size in SIZES if size * scale >= 8)


def magnitudes(x: Tensor, size: int) -> Tensor:
    """Waveforms (..., T) -> (..., size / 2 + 1, frames): the magnitudes of the short-time Fourier transform,
    with a Hann window of `size` samples, a quarter of it from frame to frame, and zeros around the waveform.

    White noise of deviation s has a root mean square of s at every frequency, for any window, so that one
    FLOOR serves all: sqrt(magnitude^2 + FLOOR^2), which has a logarithm and a gradient in silence as well."""
    window = torch.hann_window(size, device=x.device, dtype=x.dtype)
    spectrum = torch.stft(x.reshape(-1, x.shape[-1]), size, size // 4, window=window, center=True,
                          pad_mode="constant", return_complex=True)
    parts = torch.view_as_real(spectrum) / window.square().sum().sqrt()        # (N, size / 2 + 1, frames, 2)
    squares = parts.square().sum(-1)
    return (squares + FLOOR**2).sqrt().view(*x.shape[:-1], *squares.shape[1:])


def spectral_distance(a: Tensor, b: Tensor, rate: int) -> Tensor:
    """(B,) how far the spectrograms of waveforms a (B, c, T) are from those of b: the mean over windows of
    three terms, the Euclidean distance relative to b's norm (spectral convergence), the mean absolute
    difference of the logarithms, and that of the magnitudes (Yamamoto et al. 2020, arXiv:1910.11480; Evans et
    al. 2024). In stereo, the sum and the difference of both channels are compared as well, so that what lies
    between them counts (Steinmetz et al. 2021, arXiv:2010.10291)."""
    if a.shape[1] == 2:
        a, b = (torch.cat([x, x.sum(1, keepdim=True), x.diff(dim=1)], dim=1) for x in (a, b))
    total = a.new_zeros(len(a))
    sizes = window_sizes(rate)
    for size in sizes:
        ours = magnitudes(a, size).flatten(1)
        wanted = magnitudes(b, size).flatten(1)
        # The norm of silence is no measure of an error: a sound that contains little else would decide alone.
        norm = torch.linalg.vector_norm(wanted, dim=1) + QUIET * wanted.shape[1] ** 0.5
        total = total + torch.linalg.vector_norm(ours - wanted, dim=1) / norm
        total = total + (ours.log() - wanted.log()).abs().mean(1) + (ours - wanted).abs().mean(1)
    return total / len(sizes)


def snr(a: Tensor, b: Tensor) -> Tensor:
    """(B,) signal-to-noise ratio of a against b, waveforms (B, c, T), in dB."""
    signal = b.square().flatten(1).sum(1)
    noise = (a - b).square().flatten(1).sum(1)
    return 10 * torch.log10((signal + 1e-10) / (noise + 1e-10))


class AudioVAE(nn.Module):
    """Oobleck. `encode` and `decode` work on the raw latent; `normalize` and `denormalize` are the only place
    in the project where its scale appears. `factor` is f, the ratio of samples to latent frames. Raises
    ValueError if the widths do not fit the strides."""

    def __init__(self, config: AudioVAEConfig):
        super().__init__()
        self.config = c = config
        if len(c.widths) != len(c.strides) + 1:
            raise ValueError(f"AudioVAE widths {tuple(c.widths)}: must be {len(c.strides) + 1}, one more "
                             f"than the strides {tuple(c.strides)}")
        if min(c.strides) < 2:
            raise ValueError(f"AudioVAE strides {tuple(c.strides)}: each must be at least 2")
        self.factor = math.prod(c.strides)
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        self.register_buffer("latent_mean", torch.zeros(c.latent_channels))
        self.register_buffer("latent_std", torch.ones(c.latent_channels))
        self.initialize()

    def initialize(self) -> None:
        """Initialise what matters for the model as a whole: it trains fast although no layer normalises.

        Every residual unit starts as the identity, `Conv` keeps the variance, and the first and last layers
        lead from a waveform's deviation, about a quarter, to one and back. The posterior's deviation starts
        small, and the same everywhere."""
        for module in self.modules():
            if isinstance(module, ResidualUnit):
                nn.init.zeros_(module.conv2.weight_g)
        nn.init.constant_(self.encoder.conv1.weight_g, 4.0)
        nn.init.constant_(self.decoder.conv2.weight_g, 0.25)
        latents = self.config.latent_channels
        nn.init.zeros_(self.encoder.conv2.weight_g[latents:])
        nn.init.constant_(self.encoder.conv2.bias[latents:], -3.0)     # softplus makes it 0.05

    @property
    def factors(self) -> tuple[int, int]:
        """How much smaller the latent is than 1 x T samples, in height and width."""
        return 1, self.factor

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, 1, n) of sounds of this size, which is (1, T)."""
        return self.config.latent_channels, 1, size[1] // self.factor

    def encode(self, x: Tensor) -> Posterior:
        """x (B, c, T) in [-1, 1] -> posterior over (B, C, 1, T / factor). Raises ValueError unless `factor`
        divides T."""
        if x.shape[-1] % self.factor or not x.shape[-1]:
            raise ValueError(f"sound of {x.shape[-1]} samples: must be a multiple of {self.factor}, by which "
                             "this VAE downsamples; add silence at its end")
        return Posterior(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        """Raw latent (B, C, 1, n) -> waveform (B, c, n * factor), nominally in [-1, 1].

        Autocast is off here: samples need more than the 8 bits of bfloat16."""
        with torch.autocast(z.device.type, enabled=False):
            return self.decoder(z.squeeze(2))

    def normalize(self, z: Tensor) -> Tensor:
        """Raw latent -> x0, mean 0 and standard deviation 1 per channel over the training set."""
        return (z - self.latent_mean.view(-1, 1, 1)) / self.latent_std.view(-1, 1, 1)

    def denormalize(self, x0: Tensor) -> Tensor:
        """x0 -> raw latent: the inverse of `normalize`."""
        return x0 * self.latent_std.view(-1, 1, 1) + self.latent_mean.view(-1, 1, 1)

    @torch.no_grad()
    def set_latent_statistics(self, mean: Tensor, var: Tensor) -> None:
        """Store the per-channel mean and variance, each (C,), of the raw latent over the training set."""
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(var.clamp_min(1e-12).sqrt())   # a dead channel must not divide by zero

    def loss(self, x: Tensor, kl_weight: float, generator: torch.Generator | None = None, *,
             waveform: float = WAVEFORM, noise: float = 0.0,
             rows: tuple[int, slice] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,) spectral distance, plus `waveform` times the mean absolute error, plus kl_weight times the KL
        per sample of the waveform; and a dict to log: "snr" in dB, "kl" in nats, "latent_std" (C,).

        noise: the decoder is given latents with noise of up to this share of their deviation, another share
        for each sound, as a sampled latent has errors too (Yang et al. 2025, arXiv:2507.15856). The deviation
        is taken within each channel of a sound.
        rows: (count, part) where x is a part of a batch of `count` sounds that several processes share. The
        random numbers of that whole batch are drawn, so that they do not depend on how it is shared.

        The published weight of 1e-4 multiplies twice the KL of a latent frame: 2e-4 * factor here."""
        posterior = self.encode(x)
        z = posterior.sample(generator, rows)
        if noise:
            count, part = rows or (len(z), slice(None))
            share = noise * torch.rand(count, 1, 1, 1, generator=generator, device=z.device)[part]
            unit = torch.randn(count, *z.shape[1:], generator=generator, device=z.device, dtype=z.dtype)[part]
            deviation = z.var(dim=(2, 3), correction=0, keepdim=True).clamp_min(1e-12).sqrt()
            z = z + share * deviation * unit
        recon = self.decode(z)
        error = spectral_distance(recon, x, self.config.rate)
        error = error + waveform * (recon - x).abs().flatten(1).mean(1)
        kl = posterior.kl()
        logs = {"snr": snr(recon, x).mean(), "kl": kl.mean(),
                "latent_std": posterior.mean.std(dim=(0, 2, 3))}
        logs = {name: value.detach() for name, value in logs.items()}
        return error + kl_weight * kl / x[0].numel(), logs


def demo() -> None:
    """Fit a tiny AudioVAE to random notes and print how well it reconstructs unseen ones."""
    torch.manual_seed(0)

    def notes(n: int) -> Tensor:
        t = torch.arange(1024) / 8000
        hertz = 110 * 2 ** (3 * torch.rand(n, 1))
        wave = sum(torch.sin(2 * torch.pi * k * hertz * t) / k for k in (1, 2, 3))
        return (0.3 * wave * torch.exp(-t / (0.02 + 0.2 * torch.rand(n, 1))))[:, None]

    model = AudioVAE(AudioVAEConfig(widths=(8, 16, 16), strides=(4, 8), latent_channels=8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95))
    test = notes(32)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, 1,024 samples -> 8x1x32 latent")
    for step in range(121):
        if step % 40 == 0:
            with torch.no_grad():
                posterior = model.encode(test)
                recon = model.decode(posterior.mean)
                distance = spectral_distance(recon, test, model.config.rate).mean()
            print(f"step {step:3d}  SNR {snr(recon, test).mean():5.2f} dB  spectral distance {distance:.3f}  "
                  f"KL {posterior.kl().mean():5.1f} nats")
        loss, _ = model.loss(notes(8), kl_weight=1e-2)
        optimizer.zero_grad()
        loss.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


if __name__ == "__main__":
    demo()
