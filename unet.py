"""The convolutional denoiser: the U-Net of latent diffusion, with cross-attention to a context.

    python unet.py                       # prints the presets and their parameter counts
    python train.py --arch unet --objective ddpm

Ronneberger et al. 2015 (arXiv:1505.04597); Ho et al. 2020 (arXiv:2006.11239), appendix B; Rombach et al. 2022
(arXiv:2112.10752), section 3.3; the pooled text vector: Podell et al. 2023 (arXiv:2307.01952). Contract:
model(xt, t, y=..., context=..., mask=..., pooled=...) -> raw, with xt (B, C, H, W), t (B,) in [0, 1],
0 = data, y (B,) integer labels, `num_classes` standing for "no class", context (B, L, D), mask (B, L),
True = word, and pooled (B, P). Module names follow diffusers' UNet2DConditionModel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass
class UNetConfig:
    channels: int = 4
    out_channels: int | None = None             # default: as many as come in
    widths: tuple[int, ...] = (64, 128)         # one per level; every level but the last halves the latent
    layers: int = 2                             # ResNet blocks a level going down, one more going up
    attention: tuple[bool, ...] = (False, True)  # a transformer after each ResNet block, level by level
    heads: int | tuple[int, ...] = 2            # per level, or one number for all
    groups: int = 16
    context_width: int | None = None            # None: no cross-attention
    pooled_width: int | None = None             # of one vector for the whole text, added to the time (SD XL)
    positions: bool = False                     # tell attention where each pixel is (published: not)
    linear_projection: bool = False             # Stable Diffusion 2 goes in and out of attention by Linear
    num_classes: int = 0                        # 0: no labels
    time_offset: float = 0.0                    # the embedding sees 1000 t + this; published: -1


PRESETS = {
    "tiny": dict(widths=(32, 64), layers=1, attention=(False, True), groups=8),
    "small": dict(),
    "sd1": dict(widths=(320, 640, 1280, 1280), attention=(True, True, True, False), heads=8, groups=32,
                context_width=768, time_offset=-1.0),
    "sd2": dict(widths=(320, 640, 1280, 1280), attention=(True, True, True, False), heads=(5, 10, 20, 20),
                groups=32, context_width=1024, linear_projection=True, time_offset=-1.0),
}


def timestep_embedding(t: Tensor, dim: int, scale: float = 1000.0, offset: float = 0.0) -> Tensor:
    """t (B,) in [0, 1] -> (B, dim): cosines, then sines, of scale * t + offset at dim / 2 frequencies;
    float32 whatever comes in."""
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(dim // 2, dtype=torch.float32, device=t.device)
                            / (dim // 2))
    angles = (scale * t + offset).float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_embedding(h: int, w: int, dim: int, device: torch.device | None = None) -> Tensor:
    """(h * w, dim) of a grid: one half tells the row, the other the column."""
    rows, columns = (timestep_embedding(torch.arange(n, device=device), dim // 2, scale=1.0) for n in (h, w))
    return torch.cat([rows[:, None].expand(h, w, -1), columns.expand(h, w, -1)], dim=-1).flatten(0, 1)


class TimeEmbedding(nn.Module):
    def __init__(self, c_in: int, c_out: int, offset: float):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(c_in, c_out), nn.Linear(c_out, c_out)
        self.offset = offset

    def forward(self, t: Tensor) -> Tensor:
        embedding = timestep_embedding(t, self.linear_1.in_features, offset=self.offset)
        return self.linear_2(F.silu(self.linear_1(embedding.to(self.linear_1.weight.dtype))))


class VectorEmbedding(nn.Module):
    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(c_in, c_out), nn.Linear(c_out, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, c_emb: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(c_emb, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Attention of x (B, N, C) to itself, or to a context (B, L, D) of which mask (B, L) says what is
    real."""

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(context_width, width, bias=False) for _ in "kv")
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2)           # (B, heads, N or L, head_dim)
                   for p in (self.to_q(x), self.to_k(context), self.to_v(context)))
        mask = None if mask is None else mask[:, None, None, :]
        if x.is_cuda or q.shape[-2] * k.shape[-2] > 128 * 128:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:      # short rows, by formula: the CPU's fused attention has a backward pass 4 times as slow
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
            x = (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1) @ v
        return self.to_out[0](x.transpose(1, 2).flatten(2))                    # (B, N, C)


class GEGLU(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention where there is a context, feed-forward;
    each on a normalised copy of x."""

    def __init__(self, width: int, heads: int, context_width: int | None):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(width), Attention(width, width, heads)
        if context_width is not None:
            self.norm2, self.attn2 = nn.LayerNorm(width), Attention(width, context_width, heads)
        self.norm3, self.ff = nn.LayerNorm(width), FeedForward(width)

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        if context is not None:
            x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Pixels become tokens, pass a transformer block, and are added back."""

    def __init__(self, width: int, heads: int, c: UNetConfig):
        super().__init__()
        self.norm = nn.GroupNorm(c.groups, width, eps=1e-6)
        self.positions = c.positions
        # published as convolutions of 1 x 1, but they act as linear layers on the tokens
        self.proj_in, self.proj_out = (
            nn.Linear(width, width) if c.linear_projection else nn.Conv2d(width, width, 1) for _ in range(2))
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, heads, c.context_width)])

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)                            # (B, HW, C)
        h = F.linear(h, self.proj_in.weight.flatten(1), self.proj_in.bias)
        if self.positions:
            h = h + position_embedding(*x.shape[2:], h.shape[-1], x.device).to(h.dtype)
        for block in self.transformer_blocks:
            h = block(h, context, mask)
        h = F.linear(h, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + h.transpose(1, 2).reshape(x.shape)                          # (B, C, H, W)


class Resample(nn.Module):
    """Halve by a strided convolution, or double by repeating pixels and convolving."""

    def __init__(self, width: int, up: bool):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(width, width, 3, stride=1 if up else 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else x)


class DownLevel(nn.Module):
    def __init__(self, c: UNetConfig, c_in: int, level: int, heads: int, c_emb: int):
        super().__init__()
        width = c.widths[level]
        self.resnets = nn.ModuleList(
            ResnetBlock(c_in if i == 0 else width, width, c_emb, c.groups) for i in range(c.layers))
        self.attentions = nn.ModuleList(
            SpatialTransformer(width, heads, c) for _ in range(c.layers * c.attention[level]))
        self.downsamplers = nn.ModuleList([Resample(width, up=False)] if level < len(c.widths) - 1 else [])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None, mask: Tensor | None,
                skips: list[Tensor]) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, emb)
            x = self.attentions[i](x, context, mask) if self.attentions else x
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
            skips.append(x)
        return x


class UpLevel(nn.Module):
    """Mirror of a DownLevel; each ResNet block first takes back the skip that its mirror image left."""

    def __init__(self, c: UNetConfig, c_in: int, skips: list[int], level: int, heads: int, c_emb: int):
        super().__init__()
        width = c.widths[level]
        self.resnets = nn.ModuleList(
            ResnetBlock((c_in if i == 0 else width) + skips.pop(), width, c_emb, c.groups)
            for i in range(c.layers + 1))
        self.attentions = nn.ModuleList(
            SpatialTransformer(width, heads, c) for _ in range((c.layers + 1) * c.attention[level]))
        self.upsamplers = nn.ModuleList([Resample(width, up=True)] if level > 0 else [])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None, mask: Tensor | None,
                skips: list[Tensor]) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), emb)
            x = self.attentions[i](x, context, mask) if self.attentions else x
        for upsampler in self.upsamplers:
            x = upsampler(x)
        return x


class Middle(nn.Module):
    def __init__(self, c: UNetConfig, heads: int, c_emb: int):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(c.widths[-1], c.widths[-1], c_emb, c.groups) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialTransformer(c.widths[-1], heads, c)])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, emb), context, mask), emb)


class UNet(nn.Module):
    """Raises ValueError where the levels do not divide the latent,
    or the widths do not fit groups and heads."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        c = self.config = config
        heads = [c.heads] * len(c.widths) if isinstance(c.heads, int) else list(c.heads)
        if not len(c.widths) == len(c.attention) == len(heads):
            raise ValueError(f"widths {c.widths}, attention {c.attention} and heads {c.heads} "
                             "must have one entry per level")
        for width, number in zip(c.widths, heads):
            if width % c.groups or width % number or width % 2:
                raise ValueError(f"U-Net width {width} must be a multiple of groups = {c.groups} "
                                 f"and of heads = {number}")
        self.factor = 2 ** (len(c.widths) - 1)
        c_emb = 4 * c.widths[0]
        self.conv_in = nn.Conv2d(c.channels, c.widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(c.widths[0], c_emb, c.time_offset)
        # last row: no class
        self.class_embedding = nn.Embedding(c.num_classes + 1, c_emb) if c.num_classes else None
        self.add_embedding = VectorEmbedding(c.pooled_width, c_emb) if c.pooled_width else None
        levels = range(len(c.widths))
        self.down_blocks = nn.ModuleList(
            DownLevel(c, c.widths[max(i - 1, 0)], i, heads[i], c_emb) for i in levels)
        self.mid_block = Middle(c, heads[-1], c_emb)
        skips = [c.widths[0]]                            # widths of what the way down leaves, conv_in first
        for i in levels:
            skips += [c.widths[i]] * (c.layers + (i < levels[-1]))
        self.up_blocks = nn.ModuleList(
            UpLevel(c, c.widths[min(i + 1, levels[-1])], skips, i, heads[i], c_emb) for i in reversed(levels))
        self.conv_norm_out = nn.GroupNorm(c.groups, c.widths[0])
        self.conv_out = nn.Conv2d(c.widths[0], c.out_channels or c.channels, 3, padding=1)
        self.initialize()

    def initialize(self) -> None:
        """Every residual branch starts at zero, and so does the output (Ho et al.'s code;
        Dhariwal & Nichol 2021)."""
        last = [self.conv_out]
        for module in self.modules():
            if isinstance(module, ResnetBlock):
                last.append(module.conv2)
            elif isinstance(module, SpatialTransformer):
                last.append(module.proj_out)
        for layer in last:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, xt: Tensor, t: Tensor, y: Tensor | None = None, context: Tensor | None = None,
                mask: Tensor | None = None, pooled: Tensor | None = None) -> Tensor:
        """xt (B, C, H, W), t (B,) in [0, 1], y (B,), context (B, L, D), mask (B, L), pooled (B, P)
        -> raw (B, out_channels, H, W)."""
        if xt.shape[-2] % self.factor or xt.shape[-1] % self.factor:
            raise ValueError(f"latent {xt.shape[-2]}x{xt.shape[-1]}: both sides must be multiples of "
                             f"{self.factor}, by which this U-Net downsamples")
        if (context is None) != (self.config.context_width is None):
            raise ValueError("context must be given exactly where the U-Net has a context_width")
        emb = self.time_embedding(t)                     # (B, 4 * widths[0])
        if self.class_embedding is not None:
            emb = emb + self.class_embedding(y)
        if self.add_embedding is not None:
            emb = emb + self.add_embedding(pooled)
        x = self.conv_in(xt)
        skips = [x]
        for level in self.down_blocks:
            x = level(x, emb, context, mask, skips)
        x = self.mid_block(x, emb, context, mask)
        for level in self.up_blocks:
            x = level(x, emb, context, mask, skips)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


if __name__ == "__main__":
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            model = UNet(UNetConfig(**preset))
        print(f"{name:6s} {sum(p.numel() for p in model.parameters()) / 1e6:7.1f} M parameters, "
              f"widths {model.config.widths}")
