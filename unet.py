"""The convolutional denoiser: the U-Net of latent diffusion, with optional cross-attention to a context.

    python unet.py                       # prints the presets and their parameter counts
    python train.py --arch unet --objective ddpm

Ronneberger et al. 2015 (arXiv:1505.04597); Ho et al. 2020 (arXiv:2006.11239), appendix B; Rombach et al. 2022
(arXiv:2112.10752), section 3.3; the pooled text vector: Podell et al. 2023 (arXiv:2307.01952). Contract:
model(xt, t, y=..., context=..., mask=..., pooled=...) -> raw, with xt (B, C, H, W); t (B,) in [0, 1],
0 = data; y (B,) integer labels, `num_classes` for the null class; context (B, L, D) with mask (B, L), True at
valid positions; and pooled (B, P). Module names follow diffusers' UNet2DConditionModel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from attention import attention


@dataclass
class UNetConfig:
    """What a U-Net is built from, as a checkpoint stores it."""
    channels: int = 4
    out_channels: int | None = None             # None: the same as channels
    widths: tuple[int, ...] = (64, 128)         # one per level; every level but the last halves the latent
    layers: int = 2                             # ResNet blocks per level going down; one more going up
    attention: tuple[bool, ...] = (False, True)  # per level: a transformer after each ResNet block?
    middle_attention: bool = True               # a transformer between the two blocks at the bottom?
    heads: int | tuple[int, ...] = 2            # per level, or one number for all
    depth: int | tuple[int, ...] = 1            # blocks of each transformer, likewise (SD XL: 2 and 10)
    groups: int = 16                            # groups in every GroupNorm
    context_width: int | None = None            # None: no cross-attention
    pooled_width: int | None = None             # width of the pooled text vector (SD XL); None: not used
    positions: bool = False                     # add position embeddings before attention (published: no)
    linear_projection: bool = False             # Linear around the transformers (SD 2), not 1x1 Conv2d
    num_classes: int = 0                        # 0: no class labels
    time_offset: float = 0.0                    # added to 1000 t before the time embedding (published: -1)
    second_time: bool = False                   # also embed s <= t: predict the mean velocity from t to s
    strides: tuple[int, int] = (2, 2)           # by which a level shrinks height and width; sounds use (1, 2)
    longest: float = 0.0                        # sound, in seconds, whose length is an input; 0: none


GAP_SCALE = 10.0     # fastest sinusoid of t - s, in radians per unit: its derivative by t enters the loss
BLUR = 0.1           # of t, as a share of t - s: see UNet.embed_times
PRESETS = {
    "tiny": dict(widths=(32, 64), layers=1, attention=(False, True), groups=8),
    "small": dict(),
    # of the same training FLOPs as dit.py's "small" in a latent of 8 x 8, for benchmarks/compare.py
    "matched": dict(widths=(64, 80, 128), attention=(False, True, True)),
    # likewise of dit.py's "size-1", "size-2" and "size-3"
    "size-1": dict(widths=(12, 28, 32), attention=(False, True, True), groups=4),
    "size-2": dict(widths=(24, 32, 60), attention=(False, True, True), groups=4),
    "size-3": dict(widths=(40, 56, 96), attention=(False, True, True), groups=8),
    # as "size-2", with attention nowhere, only at the bottom, and at every level
    "size-2-nowhere": dict(widths=(24, 44, 68), attention=(False, False, False), groups=4,
                           middle_attention=False),
    "size-2-bottom": dict(widths=(24, 40, 72), attention=(False, False, False), groups=4),
    "size-2-everywhere": dict(widths=(20, 28, 56), attention=(True, True, True), groups=4),
    # of the same training FLOPs as mmdit.py's "size-2-text", with prompts of 54 bytes
    "size-2-text": dict(widths=(32, 64, 88), attention=(True, True, True), groups=8),
    "sd1": dict(widths=(320, 640, 1280, 1280), attention=(True, True, True, False), heads=8, groups=32,
                context_width=768, time_offset=-1.0),
    "sd2": dict(widths=(320, 640, 1280, 1280), attention=(True, True, True, False), heads=(5, 10, 20, 20),
                groups=32, context_width=1024, linear_projection=True, time_offset=-1.0),
}


# ---- time, class and position

def timestep_embedding(t: Tensor, dim: int, scale: float = 1000.0, offset: float = 0.0,
                       blur: Tensor | None = None) -> Tensor:
    """t (B,) in [0, 1] -> (B, dim): cosines, then sines, of scale * t + offset at dim / 2 frequencies.
    blur (B,): the mean over times that are spread about t by this standard deviation.

    Returned in float32, because bf16 cannot tell neighbouring steps of 1000 t apart."""
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(dim // 2, dtype=torch.float32, device=t.device)
                            / (dim // 2))
    angles = (scale * t + offset).float()[:, None] * frequencies               # (B, dim / 2)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    if blur is None:
        return embedding
    damping = torch.exp(-((scale * blur).float()[:, None] * frequencies) ** 2 / 2)
    return embedding * torch.cat([damping, damping], dim=-1)


def position_embedding(h: int, w: int, dim: int, device: torch.device | None = None) -> Tensor:
    """(h * w, dim), one vector per pixel of a grid: the first half encodes its row, the second its column."""
    rows = timestep_embedding(torch.arange(h, device=device), dim // 2, scale=1.0)       # (h, dim / 2)
    columns = timestep_embedding(torch.arange(w, device=device), dim // 2, scale=1.0)    # (w, dim / 2)
    return torch.cat([rows[:, None].expand(h, w, -1), columns.expand(h, w, -1)], dim=-1).flatten(0, 1)


class TimeEmbedding(nn.Module):
    """t (B,) in [0, 1] -> (B, c_out)."""

    def __init__(self, c_in: int, c_out: int, offset: float, scale: float = 1000.0):
        super().__init__()
        self.linear_1 = nn.Linear(c_in, c_out)
        self.linear_2 = nn.Linear(c_out, c_out)
        self.offset = offset
        self.scale = scale

    def forward(self, t: Tensor, blur: Tensor | None = None) -> Tensor:
        embedding = timestep_embedding(t, self.linear_1.in_features, self.scale, self.offset, blur)
        return self.linear_2(F.silu(self.linear_1(embedding.to(self.linear_1.weight.dtype))))


class VectorEmbedding(nn.Module):
    """The pooled text vector (B, P) -> (B, c_out), to be added to the time embedding."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.linear_1 = nn.Linear(c_in, c_out)
        self.linear_2 = nn.Linear(c_out, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


# ---- layers

class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut around them. emb (B, c_emb), the embedding of time and of whatever
    else applies to the whole image, shifts the channels between the two."""

    def __init__(self, c_in: int, c_out: int, c_emb: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(c_emb, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))                                  # (B, c_out, H, W)
        h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Multi-head attention of x (B, N, C) to a context (B, L, D), which is x itself in self-attention.
    mask (B, L): True at the context's valid positions."""

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])     # a list, for the published name to_out.0

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)               # (B, heads, N or L, head_dim)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        q = self.split_heads(self.to_q(x))
        k = self.split_heads(self.to_k(context))
        v = self.split_heads(self.to_v(context))
        x = attention(q, k, v, mask=mask)                                      # (B, heads, N, head_dim)
        return self.to_out[0](x.transpose(1, 2).flatten(2))                    # (B, N, C)


class GEGLU(nn.Module):
    """A linear layer whose outputs are multiplied by gates (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)                                # each (B, N, hidden)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """The MLP of a transformer block: gated, four times as wide inside."""

    def __init__(self, width: int):
        super().__init__()
        # the identity stands in for the published network's dropout, so that the names of the weights agree
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention if there is a context, and feed-forward, each applied to a normalised
    copy of x and added to x (B, N, C)."""

    def __init__(self, width: int, heads: int, context_width: int | None):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        if context_width is not None:
            self.norm2 = nn.LayerNorm(width)
            self.attn2 = Attention(width, context_width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        if context is not None:
            x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Turn the pixels of x (B, C, H, W) into tokens, apply `depth` transformer blocks, and add the result to
    x."""

    def __init__(self, width: int, heads: int, c: UNetConfig, depth: int = 1):
        super().__init__()
        self.norm = nn.GroupNorm(c.groups, width, eps=1e-6)
        self.positions = c.positions
        if c.linear_projection:
            self.proj_in = nn.Linear(width, width)
            self.proj_out = nn.Linear(width, width)
        else:
            # the published weights are those of 1x1 convolutions, applied here as linear layers to tokens
            self.proj_in = nn.Conv2d(width, width, 1)
            self.proj_out = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, heads, c.context_width) for _ in range(depth))

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)                            # (B, H * W, C)
        h = F.linear(h, self.proj_in.weight.flatten(1), self.proj_in.bias)
        if self.positions:                           # attention itself ignores the order of the tokens
            h = h + position_embedding(*x.shape[2:], h.shape[-1], x.device).to(h.dtype)
        for block in self.transformer_blocks:
            h = block(h, context, mask)
        h = F.linear(h, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + h.transpose(1, 2).reshape(x.shape)                          # (B, C, H, W)


class Resample(nn.Module):
    """Divide the sides by the strides, by a convolution, or multiply them, by repeating pixels before a
    convolution."""

    def __init__(self, width: int, strides: tuple[int, int], up: bool):
        super().__init__()
        self.up = up
        self.strides = tuple(map(float, strides))
        self.conv = nn.Conv2d(width, width, 3, stride=1 if up else tuple(strides), padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            x = F.interpolate(x, scale_factor=self.strides, mode="nearest")
        return self.conv(x)


# ---- the levels of the down path and of the up path
#
# `skips` is a stack of feature maps: the down path pushes them, the up path pops them in reverse order.

def per_level(value: int | tuple[int, ...], c: UNetConfig) -> list[int]:
    """One value for all levels, or one each, as a list of one each."""
    return [value] * len(c.widths) if isinstance(value, int) else list(value)


class DownLevel(nn.Module):
    """ResNet blocks, each followed by a transformer if the level has attention; then, except at the last
    level, a downsampler. The outputs of every block and of the downsampler are pushed onto skips."""

    def __init__(self, c: UNetConfig, level: int, heads: int, c_emb: int):
        super().__init__()
        width = c.widths[level]
        c_in = c.widths[max(level - 1, 0)]           # the level above; conv_in has the width of level 0
        self.resnets = nn.ModuleList()
        for _ in range(c.layers):
            self.resnets.append(ResnetBlock(c_in, width, c_emb, c.groups))
            c_in = width
        self.attentions = nn.ModuleList()
        if c.attention[level]:
            depth = per_level(c.depth, c)[level]
            self.attentions.extend(SpatialTransformer(width, heads, c, depth) for _ in range(c.layers))
        self.downsamplers = nn.ModuleList()
        if level < len(c.widths) - 1:
            self.downsamplers.append(Resample(width, c.strides, up=False))

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None, mask: Tensor | None,
                skips: list[Tensor]) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, emb)                                                 # (B, width, H, W)
            if self.attentions:
                x = self.attentions[i](x, context, mask)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)                                                 # (B, width, H / 2, W / 2)
            skips.append(x)
        return x


class UpLevel(nn.Module):
    """The mirror image of a DownLevel, with one more ResNet block. Each block pops a skip and takes it as
    additional input channels. Except at level 0, an upsampler follows."""

    def __init__(self, c: UNetConfig, level: int, heads: int, c_emb: int):
        super().__init__()
        width = c.widths[level]
        c_in = c.widths[min(level + 1, len(c.widths) - 1)]   # the level below; the middle for the last level
        # Skips are popped latest first: the outputs of the mirrored level's blocks, then that level's input,
        # which the level above pushed (for level 0, it is the output of conv_in, of the same width).
        skip_widths = [width] * c.layers + [c.widths[max(level - 1, 0)]]
        self.resnets = nn.ModuleList()
        for skip_width in skip_widths:
            self.resnets.append(ResnetBlock(c_in + skip_width, width, c_emb, c.groups))
            c_in = width
        self.attentions = nn.ModuleList()
        if c.attention[level]:
            depth = per_level(c.depth, c)[level]
            self.attentions.extend(SpatialTransformer(width, heads, c, depth) for _ in skip_widths)
        self.upsamplers = nn.ModuleList()
        if level > 0:
            self.upsamplers.append(Resample(width, c.strides, up=True))

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None, mask: Tensor | None,
                skips: list[Tensor]) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), emb)                # (B, width, H, W)
            if self.attentions:
                x = self.attentions[i](x, context, mask)
        for upsampler in self.upsamplers:
            x = upsampler(x)                                                   # (B, width, 2 H, 2 W)
        return x


class Middle(nn.Module):
    """ResNet block, transformer (where there is attention), ResNet block, at the lowest resolution."""

    def __init__(self, c: UNetConfig, heads: int, c_emb: int):
        super().__init__()
        width = c.widths[-1]
        self.resnets = nn.ModuleList(ResnetBlock(width, width, c_emb, c.groups) for _ in range(2))
        self.attentions = nn.ModuleList()
        if c.middle_attention:
            self.attentions.append(SpatialTransformer(width, heads, c, per_level(c.depth, c)[-1]))

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        x = self.resnets[0](x, emb)
        for transformer in self.attentions:
            x = transformer(x, context, mask)
        return self.resnets[1](x, emb)


class UNet(nn.Module):
    """The denoiser: down path, middle, and an up path that reuses the feature maps of the down path (skips).

    Raises ValueError if the configuration does not have one entry per level, or if groups or heads do not
    divide the widths."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        c = self.config = config
        heads = per_level(c.heads, c)
        if not len(c.widths) == len(c.attention) == len(heads) == len(per_level(c.depth, c)):
            raise ValueError(f"widths {c.widths}, attention {c.attention}, heads {c.heads} and depth "
                             f"{c.depth} must have one entry per level")
        for width, number in zip(c.widths, heads):
            if width % c.groups or width % number or width % 2:
                raise ValueError(f"U-Net width {width} must be even and a multiple of groups = {c.groups} "
                                 f"and of heads = {number}")
        # the downsampling of all levels together, in height and width
        self.factors = tuple(stride ** (len(c.widths) - 1) for stride in c.strides)

        c_emb = 4 * c.widths[0]
        self.conv_in = nn.Conv2d(c.channels, c.widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(c.widths[0], c_emb, c.time_offset)
        self.gap_embedding = None
        if c.second_time:
            self.gap_embedding = TimeEmbedding(c.widths[0], c_emb, 0.0, GAP_SCALE)
        # the last row is the null class
        self.class_embedding = nn.Embedding(c.num_classes + 1, c_emb) if c.num_classes else None
        self.add_embedding = VectorEmbedding(c.pooled_width, c_emb) if c.pooled_width else None
        # lengths as times: 1 for the longest (Evans et al. 2024, arXiv:2402.04825, section 3.2)
        self.length_embedding = None
        if c.longest:
            self.length_embedding = TimeEmbedding(c.widths[0], c_emb, 0.0, 1000.0 / c.longest)

        # level 0 has the full resolution: first in the down path, last in the up path
        levels = range(len(c.widths))
        self.down_blocks = nn.ModuleList(DownLevel(c, level, heads[level], c_emb) for level in levels)
        self.mid_block = Middle(c, heads[-1], c_emb)
        self.up_blocks = nn.ModuleList(UpLevel(c, level, heads[level], c_emb) for level in reversed(levels))

        self.conv_norm_out = nn.GroupNorm(c.groups, c.widths[0])
        self.conv_out = nn.Conv2d(c.widths[0], c.out_channels or c.channels, 3, padding=1)
        self.initialize()

    def initialize(self) -> None:
        """Start every residual branch, the output and the second time at zero; leave the rest as PyTorch
        initialises it.

        Every block then begins as its shortcut, so that depth neither amplifies nor attenuates activations
        and gradients (Ho et al.'s code; Dhariwal & Nichol 2021, arXiv:2105.05233)."""
        last = [self.conv_out]
        if self.gap_embedding is not None:           # a network of one time is then a starting point
            last.append(self.gap_embedding.linear_2)
        for module in self.modules():
            if isinstance(module, ResnetBlock):
                last.append(module.conv2)
            elif isinstance(module, SpatialTransformer):
                last.append(module.proj_out)
        for layer in last:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def embed_times(self, t: Tensor, s: Tensor | None) -> Tensor:
        """t (B,), and s (B,) or None -> (B, 4 * widths[0])."""
        if self.gap_embedding is None:
            return self.time_embedding(t)
        gap = torch.zeros_like(t) if s is None else t - s
        # The derivative by t is part of the loss, and the fastest sinusoid of t turns by 1000 radians: left
        # as it is, that derivative is mostly noise. What holds for a whole interval does not depend on t that
        # finely, so t is blurred by a tenth of the interval, and not at all at s = t.
        return self.time_embedding(t, BLUR * gap) + self.gap_embedding(gap)

    def forward(self, xt: Tensor, t: Tensor, y: Tensor | None = None, context: Tensor | None = None,
                mask: Tensor | None = None, pooled: Tensor | None = None, s: Tensor | None = None,
                seconds: Tensor | None = None) -> Tensor:
        """xt (B, C, H, W), t (B,) in [0, 1], y (B,), context (B, L, D), mask (B, L), pooled (B, P), s (B,) in
        [0, t] or None, which is t, seconds (B,), the length of a sound -> raw (B, out_channels, H, W).

        Raises ValueError if H or W is not a multiple of the factor by which the levels downsample, or if a
        context is given to a U-Net without cross-attention, or missing from one with it."""
        if any(side % factor for side, factor in zip(xt.shape[-2:], self.factors)):
            down, across = self.factors
            factors = f"{down}" if down == across else f"{down} and {across}"
            raise ValueError(f"latent {xt.shape[-2]}x{xt.shape[-1]}: both sides must be multiples of "
                             f"{factors}, by which this U-Net downsamples")
        if (context is None) != (self.config.context_width is None):
            raise ValueError("context must be given exactly where the U-Net has a context_width")

        # time, label and pooled text apply to the whole image and reach the ResNet blocks as one vector
        emb = self.embed_times(t, s)                                           # (B, 4 * widths[0])
        if self.class_embedding is not None:
            emb = emb + self.class_embedding(y)
        if self.add_embedding is not None:
            emb = emb + self.add_embedding(pooled)
        if self.length_embedding is not None:
            emb = emb + self.length_embedding(seconds)

        x = self.conv_in(xt)                                                   # (B, widths[0], H, W)
        skips = [x]
        for level in self.down_blocks:
            x = level(x, emb, context, mask, skips)
        x = self.mid_block(x, emb, context, mask)                              # (B, widths[-1], H / f, W / f)
        for level in self.up_blocks:
            x = level(x, emb, context, mask, skips)
        return self.conv_out(F.silu(self.conv_norm_out(x)))                    # (B, out_channels, H, W)


if __name__ == "__main__":
    for name, preset in PRESETS.items():
        with torch.device("meta"):                   # counts parameters without allocating them
            model = UNet(UNetConfig(**preset))
        print(f"{name:18s} {sum(p.numel() for p in model.parameters()) / 1e6:7.1f} M parameters, "
              f"widths {model.config.widths}")
