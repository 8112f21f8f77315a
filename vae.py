"""The autoencoder: images <-> latents, with the structure of Stable Diffusion's AutoencoderKL.

    python vae.py                     # trains a tiny one in seconds and prints how well it reconstructs
    python train.py --arch vae --data shapes

Diffusion runs on the latents of this network: an image (B, 3, H, W) in [-1, 1] becomes a diagonal Gaussian
over (B, C, H/f, W/f). One draw from it, normalised to mean 0 and standard deviation 1 per channel, is the
`x0` of the other files. Rombach et al. 2022 (arXiv:2112.10752), section 3.1 and appendix G; Kingma & Welling
2014 (arXiv:1312.6114) for the posterior. Modules are named as in diffusers' AutoencoderKL, so that weights
published elsewhere load by name; only the two latent buffers and the shortcut are this project's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass
class VAEConfig:
    """The structure of a VAE, stored in every checkpoint that contains one."""

    image_channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (16, 32, 64)   # one per level; every level but the last halves the image
    layers: int = 1                          # ResNet blocks per encoder level; a decoder level has one more
    groups: int = 4                          # in every GroupNorm: few, as each loses the mean of its channels
    attention: bool = True                   # single-head self-attention in the middle
    attention_levels: tuple[int, ...] = ()   # levels with attention after each block (CompVis f16, f32)
    quant_conv: bool = True                  # 1x1 convolutions around the latent (SD 1, 2, XL; not 3, FLUX)
    shortcut: bool = False                   # a linear map of each patch, added to encoder and decoder


PRESETS = {
    "tiny": dict(widths=(8, 16, 16), groups=2, shortcut=True),
    "small": dict(shortcut=True),                                      # 0.7 M: two cores train it in minutes
    "sd": dict(widths=(128, 256, 512, 512), layers=2, groups=32),      # 83.7 M: Stable Diffusion 1, 2, XL
}


class Posterior:
    """Diagonal Gaussian q(z|x) from the encoder's 2 C channels: mean, log-variance (clamped) and standard
    deviation, each (B, C, h, w) in float32 at least."""

    def __init__(self, moments: Tensor):
        if moments.dtype != torch.float64:
            moments = moments.float()              # autocast returns bfloat16, too coarse for exp
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None,
               rows: tuple[int, slice] | None = None) -> Tensor:
        """One draw (B, C, h, w), differentiable in mean and std. rows: as in `VAE.loss`."""
        count, part = rows or (len(self.mean), slice(None))
        noise = torch.randn((count, *self.mean.shape[1:]), generator=generator, device=self.mean.device,
                            dtype=self.mean.dtype)
        return self.mean + self.std * noise[part]

    def kl(self) -> Tensor:
        """(B,) KL(q(z|x) || N(0, I)) in nats, summed over the latent."""
        return 0.5 * (self.mean**2 + self.std**2 - 1.0 - self.logvar).flatten(1).sum(1)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution of x where the width changes."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Identity()
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))                                  # (B, c_out, H, W)
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """Self-attention with one head over all pixels, added to its input."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])     # a list, for the published name to_out.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)                      # (B, HW, C)
        q = self.to_q(h)[:, None]                                              # (B, 1, HW, C): one head
        k = self.to_k(h)[:, None]
        v = self.to_v(h)[:, None]
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]                      # (B, HW, C)
        return x + self.to_out[0](h).transpose(1, 2).reshape(x.shape)          # (B, C, H, W)


class Middle(nn.Module):
    """The blocks at the lowest resolution, with attention if the configuration has it."""

    def __init__(self, width: int, groups: int, attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(width, width, groups), ResnetBlock(width, width, groups)])
        self.attentions = nn.ModuleList()
        if attention:
            self.attentions.append(Attention(width, groups))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2), by a convolution of stride 2."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))   # the published padding: right and bottom only


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W): each pixel becomes four, which a convolution smooths."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """ResNet blocks at one resolution, each followed by attention if the level has it, then `resample` to the
    next: "down", "up" or None."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, resample: str | None,
                 attention: bool = False):
        super().__init__()
        widths = [c_in] + [c_out] * layers
        self.resnets = nn.ModuleList(ResnetBlock(widths[i], widths[i + 1], groups) for i in range(layers))
        self.attentions = nn.ModuleList()
        if attention:
            self.attentions.extend(Attention(c_out, groups) for _ in range(layers))
        self.downsamplers = nn.ModuleList([Downsample(c_out)] if resample == "down" else [])
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if resample == "up" else [])

    def forward(self, x: Tensor) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x)
            if self.attentions:
                x = self.attentions[i](x)
        for resampler in (*self.downsamplers, *self.upsamplers):
            x = resampler(x)
        return x


class Encoder(nn.Module):
    """Images (B, image_channels, H, W) -> moments (B, 2 C, H/f, W/f) of the posterior."""

    def __init__(self, c: VAEConfig):
        super().__init__()
        last = len(c.widths) - 1
        widths = (c.widths[0], *c.widths)              # level i goes from widths[i] to widths[i + 1]
        self.conv_in = nn.Conv2d(c.image_channels, c.widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(widths[i], widths[i + 1], c.layers, c.groups, "down" if i < last else None,
                  i in c.attention_levels)
            for i in range(last + 1))
        self.mid_block = Middle(c.widths[-1], c.groups, c.attention)
        self.conv_norm_out = nn.GroupNorm(c.groups, c.widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(c.widths[-1], 2 * c.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)                                                    # (B, widths[0], H, W)
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)                                                  # (B, widths[-1], H/f, W/f)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Raw latents (B, C, H/f, W/f) -> images (B, image_channels, H, W): the encoder in reverse, with one more
    block per level."""

    def __init__(self, c: VAEConfig):
        super().__init__()
        last = len(c.widths) - 1
        widths = (c.widths[-1], *reversed(c.widths))
        self.conv_in = nn.Conv2d(c.latent_channels, c.widths[-1], 3, padding=1)
        self.mid_block = Middle(c.widths[-1], c.groups, c.attention)
        self.up_blocks = nn.ModuleList(
            Level(widths[i], widths[i + 1], c.layers + 1, c.groups, "up" if i < last else None,
                  last - i in c.attention_levels)
            for i in range(last + 1))
        self.conv_norm_out = nn.GroupNorm(c.groups, c.widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(c.widths[0], c.image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))                                    # (B, widths[-1], H/f, W/f)
        for level in self.up_blocks:
            x = level(x)                                                       # finally (B, widths[0], H, W)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def cosines(n: int, channels: int, side: int) -> Tensor:
    """(n, channels, side, side) float32: the first n orthonormal cosine waves (DCT-II) over the values of a
    patch, from low to high spatial frequency. Zeros follow if a patch has fewer than n values."""
    def basis(size: int) -> Tensor:
        frequency = torch.arange(size, dtype=torch.float64)[:, None]
        position = torch.arange(size, dtype=torch.float64) + 0.5
        return F.normalize(torch.cos(torch.pi * frequency * position / size), dim=1)

    # waves with frequency y down the patch, x across it and c over its channels, in the order of `rank`
    waves = torch.einsum("ci,yj,xk->yxcijk", basis(channels), basis(side), basis(side)).flatten(0, 2)
    rank = [(y + x, c) for y in range(side) for x in range(side) for c in range(channels)]
    order = sorted(range(len(waves)), key=lambda i: rank[i])
    missing = max(0, n - len(waves))
    return torch.cat([waves[order[:n]], waves.new_zeros(missing, *waves.shape[1:])]).float()


class VAE(nn.Module):
    """AutoencoderKL. `encode` and `decode` work on the raw latent; `normalize` and `denormalize` are the only
    place in the project where its scale appears. `factor` is f, the ratio of image to latent sides. Raises
    ValueError if `groups` does not divide every width."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = c = config
        if any(width % c.groups for width in c.widths):
            raise ValueError(f"VAE widths {tuple(c.widths)} must all be multiples of groups = {c.groups}")
        self.factor = 2 ** (len(c.widths) - 1)
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        if c.quant_conv:
            self.quant_conv = nn.Conv2d(2 * c.latent_channels, 2 * c.latent_channels, 1)
            self.post_quant_conv = nn.Conv2d(c.latent_channels, c.latent_channels, 1)
        if c.shortcut:
            side = self.factor
            self.patch_encoder = nn.Conv2d(c.image_channels, c.latent_channels, side, stride=side)
            self.patch_decoder = nn.ConvTranspose2d(c.latent_channels, c.image_channels, side, stride=side)
        self.register_buffer("latent_mean", torch.zeros(c.latent_channels))
        self.register_buffer("latent_std", torch.ones(c.latent_channels))
        self.initialize()

    def initialize(self) -> None:
        """Initialise the shortcut; every other layer keeps PyTorch's default.

        With a shortcut the model starts as a code of the lowest frequencies of each patch, nearly without
        noise: the last layers of encoder and decoder start at zero and learn what that code lacks. It reaches
        the same quality in a tenth of the steps."""
        c = self.config
        if not c.shortcut:
            return
        # orthonormal waves, so that the same weights in the decoder invert the encoder as far as possible
        waves = cosines(c.latent_channels, c.image_channels, self.factor)
        for layer in (self.patch_encoder, self.patch_decoder):
            layer.weight.data.copy_(waves)
            nn.init.zeros_(layer.bias)
        moments = self.encoder.conv_out                # the layer that returns mean and log-variance
        if c.quant_conv:
            moments = self.quant_conv
        for layer in (moments, self.decoder.conv_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        moments.bias.data[c.latent_channels:] = -6.0   # the log-variance: a standard deviation of 0.05

    @property
    def factors(self) -> tuple[int, int]:
        """How much smaller the latent is in height and width."""
        return self.factor, self.factor

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of a picture of this height and width."""
        return self.config.latent_channels, size[0] // self.factor, size[1] // self.factor

    def encode(self, x: Tensor) -> Posterior:
        """x (B, image_channels, H, W) in [-1, 1] -> posterior over (B, C, H/factor, W/factor).
        Raises ValueError unless `factor` divides H and W."""
        if x.shape[-2] % self.factor or x.shape[-1] % self.factor:
            raise ValueError(f"image size {x.shape[-2]}x{x.shape[-1]}: both sides must be multiples of "
                             f"{self.factor}, by which this VAE downsamples")
        moments = self.encoder(x)                                              # (B, 2 C, h, w)
        if self.config.quant_conv:
            moments = self.quant_conv(moments)
        if self.config.shortcut:
            mean, logvar = moments.chunk(2, dim=1)
            moments = torch.cat([mean + self.patch_encoder(x), logvar], dim=1)
        return Posterior(moments)

    def decode(self, z: Tensor) -> Tensor:
        """Raw latent (B, C, h, w) -> image (B, image_channels, h * factor, w * factor), nominally in [-1, 1].

        Autocast is off here: pixels need more than the 8 bits of bfloat16."""
        with torch.autocast(z.device.type, enabled=False):
            h = z
            if self.config.quant_conv:
                h = self.post_quant_conv(z)
            image = self.decoder(h)
            if self.config.shortcut:
                image = image + self.patch_decoder(z)
            return image

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
             noise: float = 0.0, equivariance: float = 0.0,
             rows: tuple[int, slice] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,) |error| + 2 error^2 per image value, plus kl_weight times KL per image value; and a dict to
        log: "psnr" in dB, "kl" in nats, "latent_std" (C,).

        noise: the decoder is given latents with noise of up to this share of their deviation, another share
        for each picture, as a sampled latent has errors too (Yang et al. 2025, arXiv:2507.15856). The
        deviation is taken within each channel of a picture.
        equivariance: weight of the same error where latent and image are both scaled to half their size,
        which removes detail from the latent that scaling would destroy (Kouzelis et al. 2025,
        arXiv:2502.09509; Skorokhodov et al. 2025, arXiv:2502.14831).
        rows: (count, part) where x is a part of a batch of `count` pictures that several processes share. The
        random numbers of that whole batch are drawn, so that they do not depend on how it is shared.

        With the absolute error alone, training stays at a plain background without the small objects for
        long. Both terms are divided by the number of image values, so that `kl_weight` can be compared
        with the published 1e-6, which multiplies a sum and is added to a sum."""
        def error(latent: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
            decoded = self.decode(latent)
            difference = (decoded - image).flatten(1)
            return (difference.abs() + 2 * difference.square()).mean(1), decoded

        posterior = self.encode(x)
        z = posterior.sample(generator, rows)
        if noise:
            count, part = rows or (len(z), slice(None))
            share = noise * torch.rand(count, 1, 1, 1, generator=generator, device=z.device)[part]
            unit = torch.randn(count, *z.shape[1:], generator=generator, device=z.device, dtype=z.dtype)[part]
            deviation = z.var(dim=(2, 3), correction=0, keepdim=True).clamp_min(1e-12).sqrt()
            z = z + share * deviation * unit
        image_error, decoded = error(z, x)
        if equivariance:
            half = [F.interpolate(part, scale_factor=0.5, mode="area") for part in (z, x)]
            image_error = image_error + equivariance * error(*half)[0]
        kl = posterior.kl()
        logs = {"psnr": psnr(decoded, x).mean(), "kl": kl.mean(),
                "latent_std": posterior.mean.std(dim=(0, 2, 3))}
        logs = {name: value.detach() for name, value in logs.items()}
        return image_error + kl_weight * kl / x[0].numel(), logs


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """(B,) peak signal-to-noise ratio in dB between images in [-1, 1], after clamping to that range."""
    mse = ((a.clamp(-1, 1) - b.clamp(-1, 1)) ** 2).flatten(1).mean(1)
    return 10.0 * torch.log10(4.0 / mse.clamp_min(1e-10))


def demo() -> None:
    """Fit a tiny VAE to random soft discs and print how well it reconstructs unseen ones."""
    torch.manual_seed(0)

    def discs(n: int) -> Tensor:
        y, x = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")
        centre = torch.rand(n, 2, 1, 1) - 0.5
        radius = 0.2 + 0.3 * torch.rand(n, 1, 1)
        distance = torch.hypot(x - centre[:, 0], y - centre[:, 1])
        return torch.tanh(8 * (radius - distance))[:, None]

    model = VAE(VAEConfig(image_channels=1, latent_channels=2, widths=(8, 16, 16), groups=4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    test = discs(128)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, 16x16 image -> 2x4x4 latent")
    for step in range(201):
        if step % 50 == 0:
            with torch.no_grad():
                posterior = model.encode(test)
                quality = psnr(model.decode(posterior.mean), test).mean()
            std = " ".join(f"{s:.2f}" for s in posterior.mean.std(dim=(0, 2, 3)))
            print(f"step {step:3d}  PSNR {quality:5.2f} dB  KL {posterior.kl().mean():6.1f} nats  "
                  f"latent std {std}")
        loss, _ = model.loss(discs(32), kl_weight=1e-6)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()


if __name__ == "__main__":
    demo()
