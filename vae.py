"""The autoencoder: images <-> latents, with the structure of Stable Diffusion's AutoencoderKL.

    python vae.py                     # trains a tiny one for a few seconds and prints what it can reconstruct
    python train.py --arch vae --data shapes

Diffusion runs on the latents of this network: an image (B, 3, H, W) in [-1, 1] becomes a diagonal Gaussian
over (B, C, H/f, W/f), of which one draw, brought to mean 0 and standard deviation 1 per channel, is the `x0`
of the other files. Rombach et al. 2022 (arXiv:2112.10752), section 3.1 and appendix G; Kingma & Welling 2014
for the posterior. Module names follow diffusers' AutoencoderKL: the weights of a published Stable Diffusion
VAE load by name, and only the two latent buffers are ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass
class VAEConfig:
    image_channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (16, 32, 64)  # one per level; every level but the last halves the image
    layers: int = 1                          # ResNet blocks a level in the encoder; the decoder has one more
    groups: int = 4                          # of every GroupNorm: few, so that brightness survives it
    attention: bool = True                   # single-head self-attention in the middle
    quant_conv: bool = True                  # 1x1 convolutions around the latent (SD 1, 2, XL; not 3, FLUX)
    shortcut: bool = False                   # a linear map of each patch beside encoder and decoder


PRESETS = {
    "tiny": dict(widths=(8, 16, 16), groups=2, shortcut=True),
    "small": dict(shortcut=True),                                      # 0.7 M: two cores train it in minutes
    "sd": dict(widths=(128, 256, 512, 512), layers=2, groups=32),      # 83.7 M: Stable Diffusion 1, 2, XL
}


class Posterior:
    """Diagonal Gaussian q(z|x) from the encoder's 2C channels: mean (B, C, h, w) and clamped log-variance."""

    def __init__(self, moments: Tensor):
        wide = moments if moments.dtype == torch.float64 else moments.float()
        self.mean, logvar = wide.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device,
                            dtype=self.mean.dtype)
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """(B,) KL(q(z|x) || N(0, I)) in nats, summed over the latent."""
        return 0.5 * (self.mean**2 + self.std**2 - 1.0 - self.logvar).flatten(1).sum(1)


class ResnetBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    def __init__(self, c: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)                      # (B, HW, C)
        q, k, v = (to(h)[:, None] for to in (self.to_q, self.to_k, self.to_v))  # (B, 1, HW, C): one head
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.to_out[0](h).transpose(1, 2).reshape(x.shape)          # (B, C, H, W)


class Middle(nn.Module):
    def __init__(self, c: int, groups: int, attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c, c, groups), ResnetBlock(c, c, groups)])
        self.attentions = nn.ModuleList([Attention(c, groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Downsample(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))   # the published padding: right and bottom only


class Upsample(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """ResNet blocks at one resolution and the resampling that leaves it, if any."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, resample: str | None):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c_in if i == 0 else c_out, c_out, groups)
                                      for i in range(layers)])
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(c_out)])
        elif resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(c_out)])

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():            # resnets, then the resampler: the order of assignment above
            for layer in module:
                x = layer(x)
        return x


class Encoder(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        last = len(c.widths) - 1
        widths = (c.widths[0], *c.widths)
        self.conv_in = nn.Conv2d(c.image_channels, c.widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(widths[i], widths[i + 1], c.layers, c.groups, "down" if i < last else None)
            for i in range(last + 1))
        self.mid_block = Middle(c.widths[-1], c.groups, c.attention)
        self.conv_norm_out = nn.GroupNorm(c.groups, c.widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(c.widths[-1], 2 * c.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        last = len(c.widths) - 1
        widths = (c.widths[-1], *reversed(c.widths))
        self.conv_in = nn.Conv2d(c.latent_channels, c.widths[-1], 3, padding=1)
        self.mid_block = Middle(c.widths[-1], c.groups, c.attention)
        self.up_blocks = nn.ModuleList(
            Level(widths[i], widths[i + 1], c.layers + 1, c.groups, "up" if i < last else None)
            for i in range(last + 1))
        self.conv_norm_out = nn.GroupNorm(c.groups, c.widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(c.widths[0], c.image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def cosines(n: int, channels: int, side: int) -> Tensor:
    """(n, channels, side, side): the first of the orthonormal cosine waves (DCT-II) over the values of a
    patch, by spatial frequency; zeros where a patch has fewer values than n."""
    def basis(size: int) -> Tensor:
        k, i = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64) + 0.5
        return F.normalize(torch.cos(torch.pi * k * i / size), dim=1)

    waves = torch.einsum("ci,yj,xk->yxcijk", basis(channels), basis(side), basis(side)).flatten(0, 2)
    order = sorted(range(len(waves)), key=lambda i: (sum(divmod(i // channels, side)), i % channels, i))
    return torch.cat([waves[order[:n]], waves.new_zeros(max(0, n - len(waves)), *waves.shape[1:])]).float()


class VAE(nn.Module):
    """AutoencoderKL. `encode` and `decode` speak the raw latent; `normalize` and `denormalize` are the only
    place in the project that knows its scale. Raises ValueError for an image whose sides `config.factor` does
    not divide."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        c = self.config = config
        if any(width % c.groups for width in c.widths):
            raise ValueError(f"VAE widths {tuple(c.widths)} must all be multiples of groups = {c.groups}")
        self.factor = 2 ** (len(c.widths) - 1)
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        if c.quant_conv:
            self.quant_conv = nn.Conv2d(2 * c.latent_channels, 2 * c.latent_channels, 1)
            self.post_quant_conv = nn.Conv2d(c.latent_channels, c.latent_channels, 1)
        if c.shortcut:
            # Begins as a code of the lowest frequencies of each patch, nearly without noise; the convolutions
            # begin at zero and learn what is missing. A tenth of the steps for the same quality.
            side = self.factor
            self.patch_encoder = nn.Conv2d(c.image_channels, c.latent_channels, side, stride=side)
            self.patch_decoder = nn.ConvTranspose2d(c.latent_channels, c.image_channels, side, stride=side)
            for layer in (self.patch_encoder, self.patch_decoder):
                layer.weight.data.copy_(cosines(c.latent_channels, c.image_channels, side))
                nn.init.zeros_(layer.bias)
            moments = self.quant_conv if c.quant_conv else self.encoder.conv_out
            for layer in (moments, self.decoder.conv_out):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
            moments.bias.data[c.latent_channels:] = -6.0          # log-variance
        self.register_buffer("latent_mean", torch.zeros(c.latent_channels))
        self.register_buffer("latent_std", torch.ones(c.latent_channels))

    def encode(self, x: Tensor) -> Posterior:
        """x (B, image_channels, H, W) in [-1, 1] -> posterior over (B, C, H/factor, W/factor)."""
        if x.shape[-2] % self.factor or x.shape[-1] % self.factor:
            raise ValueError(f"image size {x.shape[-2]}x{x.shape[-1]}: both sides must be multiples of "
                             f"{self.factor}, by which this VAE downsamples")
        moments = self.encoder(x)
        moments = self.quant_conv(moments) if self.config.quant_conv else moments
        if self.config.shortcut:
            mean, logvar = moments.chunk(2, dim=1)
            moments = torch.cat([mean + self.patch_encoder(x), logvar], dim=1)
        return Posterior(moments)

    def decode(self, z: Tensor) -> Tensor:
        """Raw latent (B, C, h, w) -> image (B, image_channels, h * factor, w * factor), nominally in [-1, 1].

        Never under autocast: pixels need more than the 8 bits of bfloat16."""
        with torch.autocast(z.device.type, enabled=False):
            image = self.decoder(self.post_quant_conv(z) if self.config.quant_conv else z)
            return image + self.patch_decoder(z) if self.config.shortcut else image

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

    def loss(self, x: Tensor, kl_weight: float,
             generator: torch.Generator | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,) |error| + 2 error^2 per image value, plus kl_weight times KL per image value, and what to log:
        PSNR, KL, latent std per channel.

        The absolute error alone is long content with a background that lacks what is small. Dividing both
        by the number of values keeps `kl_weight` on the scale of the published 1e-6, where both are sums."""
        posterior = self.encode(x)
        recon = self.decode(posterior.sample(generator))
        error = (recon - x).flatten(1)
        reconstruction = (error.abs() + 2 * error.square()).mean(1)
        kl = posterior.kl()
        logs = {"psnr": psnr(recon, x).mean(), "kl": kl.mean(),
                "latent_std": posterior.mean.std(dim=(0, 2, 3))}
        return reconstruction + kl_weight * kl / x[0].numel(), {k: v.detach() for k, v in logs.items()}


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """(B,) peak signal-to-noise ratio in dB between images in [-1, 1], after clamping to that range."""
    mse = ((a.clamp(-1, 1) - b.clamp(-1, 1)) ** 2).flatten(1).mean(1)
    return 10.0 * torch.log10(4.0 / mse.clamp_min(1e-10))


# Published names that differ from ours, which are diffusers': pattern and replacement, applied in this order.
PUBLISHED_NAMES = (
    (r"\.query\.", ".to_q."), (r"\.key\.", ".to_k."), (r"\.value\.", ".to_v."),  # diffusers before 0.15
    (r"\.proj_attn\.", ".to_out.0."),
    (r"\.(down|up)\.(\d+)\.block\.(\d+)\.", r".\1_blocks.\2.resnets.\3."),   # CompVis and FLUX
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."), (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.(q|k|v)\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
)


def published(state: dict[str, Tensor], scale: float, shift: float = 0.0, groups: int = 32) -> VAE:
    """A VAE from a published state dict: diffusers' names, old or new, or those of CompVis and FLUX. The
    widths are read from the weights.

    scale and shift: what the model was published with, x0 = (z - shift) * scale (SD 1 and 2: 0.18215 and 0;
    XL: 0.13025 and 0; SD 3: 1.5305 and 0.0609; FLUX: 0.3611 and 0.1159). Raises ValueError with the first
    keys that do not fit."""
    for prefix in ("first_stage_model.", "vae."):          # inside a whole Stable Diffusion file
        if any(name.startswith(prefix) for name in state):
            state = {name[len(prefix):]: w for name, w in state.items() if name.startswith(prefix)}
    compvis = any(".up.0.block." in name for name in state)
    renamed: dict[str, Tensor] = {}
    for name, weight in state.items():
        if name.startswith("loss."):                       # of the discriminator that trained it
            continue
        for pattern, replacement in PUBLISHED_NAMES:
            name = re.sub(pattern, replacement, name)
        is_1x1 = ".attentions." in name and weight.ndim == 4
        renamed[name] = (weight[:, :, 0, 0] if is_1x1 else weight).to(torch.promote_types(weight.dtype,
                                                                                         torch.float32))
    levels = 0
    while f"encoder.down_blocks.{levels}.resnets.0.conv1.weight" in renamed:
        levels += 1
    if not levels or not {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= renamed.keys():
        raise ValueError("not the weights of an AutoencoderKL: no encoder and decoder of known names in it")
    if compvis:                            # which counts the levels of the decoder from fine to coarse
        renamed = {re.sub(r"(?<=up_blocks\.)\d+", lambda m: str(levels - 1 - int(m[0])), name): weight
                   for name, weight in renamed.items()}
    shape = {name: weight.shape for name, weight in renamed.items()}
    config = VAEConfig(
        image_channels=shape["encoder.conv_in.weight"][1],
        latent_channels=shape["decoder.conv_in.weight"][1],
        widths=tuple(shape[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)),
        layers=sum(f"encoder.down_blocks.0.resnets.{i}.conv1.weight" in shape for i in range(9)),
        groups=groups, attention="encoder.mid_block.attentions.0.to_q.weight" in shape,
        quant_conv="quant_conv.weight" in shape)
    with torch.device("meta"):
        model = VAE(config)
    channels = config.latent_channels
    renamed |= {"latent_mean": torch.full((channels,), shift),
                "latent_std": torch.full((channels,), 1 / scale)}
    own = model.state_dict()
    wrong = [f"missing {name}" for name in own if name not in renamed]
    wrong += [f"surplus {name}" for name in renamed if name not in own]
    wrong += [f"{name} of shape {tuple(w.shape)}, not {tuple(own[name].shape)}" for name, w in renamed.items()
              if name in own and w.shape != own[name].shape]
    if wrong:
        raise ValueError(f"not an AutoencoderKL of widths {config.widths}: {'; '.join(wrong[:3])}")
    model.load_state_dict(renamed, assign=True)
    return model.eval().requires_grad_(False)


def demo() -> None:
    """Fit a tiny VAE to random soft discs and print how well unseen ones come back."""
    torch.manual_seed(0)

    def discs(n: int) -> Tensor:
        y, x = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")
        centre, radius = torch.rand(n, 2, 1, 1) - 0.5, 0.2 + 0.3 * torch.rand(n, 1, 1)
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
