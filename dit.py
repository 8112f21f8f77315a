"""The transformer denoisers: DiT for classes, in its published form and in the modern one; MMDiT for text.

    python dit.py                        # prints the presets and their parameter counts
    python train.py --arch dit --objective rf

Peebles & Xie 2022, "Scalable Diffusion Models with Transformers" (arXiv:2212.09748); the modern block
(RMSNorm, SwiGLU, QK-norm, rotary positions) as in Yao et al. 2025 (arXiv:2501.01423); MMDiT: Esser et al.
2024 (arXiv:2403.03206). Contract: model(xt, t, **cond) -> raw, with xt (B, C, H, W), t (B,) in [0, 1], 0 =
data; DiT takes y (B,) integer labels, `num_classes` standing for "no class"; MMDiT what a text encoder says,
context (B, L, D), mask (B, L), True = word, and pooled (B, D).
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from attention import Rope, attention, rms_norm


@dataclass
class DiTConfig:
    channels: int = 4
    out_channels: int | None = None   # default: as many as come in
    patch: tuple[int, int] = (2, 2)   # height, width
    width: int = 256
    depth: int = 6
    heads: int = 4
    mlp_ratio: float = 4.0
    num_classes: int = 0              # 0: no labels
    norm: str = "rms"                 # "rms", or "layer" as published; both without learned scale
    mlp: str = "swiglu"               # "swiglu" at 2/3 width, for equal parameters, or "gelu" as published
    qk_norm: bool = True
    conv: bool = False                # a depthwise 3x3 convolution inside every MLP
    rope: bool = True                 # rotary positions in addition to the sin-cos ones
    rope_theta: float = 100.0         # grids are tens of tokens wide, not thousands (Heo et al. 2024)
    learn_sigma: bool = False         # published DiT also predicts a variance: twice the channels
    time_scale: float = 1000.0        # the embedding sees time_scale * t + time_offset: published DiT counts
    time_offset: float = 0.0          # 0..999 (1000, -1); SiT's time runs from noise to data (-1, 1)


PUBLISHED = dict(norm="layer", mlp="gelu", qk_norm=False, rope=False)   # the block of Peebles & Xie
PRESETS = {
    "tiny": dict(width=64, depth=2, heads=2),
    "small": dict(width=256, depth=6, heads=4),
    "S": dict(width=384, depth=12, heads=6),
    "B": dict(width=768, depth=12, heads=12),
    "L": dict(width=1024, depth=24, heads=16),
    "XL": dict(width=1152, depth=28, heads=18),      # published: 16 of 72, which is slower
}
PRESETS |= {f"{size}/{p}": dict(PRESETS[size], patch=(p, p))
            for size in ("S", "B", "L", "XL") for p in (8, 4, 2)}


class Modulation(NamedTuple):
    shift: Tensor   # each (B, 1, D)
    scale: Tensor
    gate: Tensor


def modulate(x: Tensor, m: Modulation) -> Tensor:
    return x * (1 + m.scale) + m.shift


def timestep_embedding(t: Tensor, dim: int, scale: float = 1000.0, offset: float = 0.0) -> Tensor:
    """t (B,) in [0, 1] -> (B, dim): cosines, then sines, of scale * t + offset at dim / 2 frequencies;
    float32 whatever comes in."""
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(dim // 2, dtype=torch.float32, device=t.device)
                            / (dim // 2))
    angles = (scale * t + offset).float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_positions(h: int, w: int, dim: int, device: torch.device | str = "cpu",
                     crop: tuple[int, int] | None = None) -> Tensor:
    """(h * w, dim) fixed 2-D positions as published: the first half of the channels encodes x,
    the second half y.

    crop (base, largest): Stable Diffusion 3 takes the centre of a grid of largest x largest positions, which
    run from 0 to base."""
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(h, dtype=torch.float64), torch.arange(w, dtype=torch.float64),
                          indexing="ij")
    if crop:
        base, largest = crop
        y, x = (((largest - side) // 2 + p) * (base / largest) for p, side in ((y, h), (x, w)))
    ax, ay = (p.flatten()[:, None] * frequencies for p in (x, y))
    return torch.cat([ax.sin(), ax.cos(), ay.sin(), ay.cos()], dim=-1).float().to(device)


def rope_tables(h: int, w: int, head_dim: int, theta: float, device: torch.device | str = "cpu") -> Rope:
    """cos and sin (h * w, head_dim / 2): the first half of the pairs turns with y, the second half with x."""
    frequencies = theta ** -(torch.arange(head_dim // 4, dtype=torch.float64) / (head_dim // 4))
    y, x = torch.meshgrid(torch.arange(h, dtype=torch.float64), torch.arange(w, dtype=torch.float64),
                          indexing="ij")
    angles = torch.cat([p.flatten()[:, None] * frequencies for p in (y, x)], dim=-1)
    return angles.cos().float().to(device), angles.sin().float().to(device)


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, without learned parameters:
    the modulation scales and shifts."""

    def __init__(self, kind: str, width: int):
        super().__init__()
        if kind not in ("rms", "layer"):
            raise ValueError(f"norm {kind!r}: must be 'rms' or 'layer'")
        self.function = F.rms_norm if kind == "rms" else F.layer_norm
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, (self.width,), eps=1e-6)


class SelfAttention(nn.Module):
    def __init__(self, c: DiTConfig | MMDiTConfig, proj: bool = True):
        super().__init__()
        self.heads = c.heads
        self.qkv = nn.Linear(c.width, 3 * c.width)
        self.proj = nn.Linear(c.width, c.width) if proj else None
        self.q_norm, self.k_norm = (nn.Parameter(torch.ones(c.width // c.heads)) if c.qk_norm else None
                                    for _ in "qk")

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v: each (B, heads, N, head_dim)."""
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor, rope: Rope | None, mask: Tensor | None = None) -> Tensor:
        x = attention(*self.split(x), q_norm=self.q_norm, k_norm=self.k_norm, rope=rope, mask=mask)
        return self.proj(x.transpose(1, 2).flatten(2))     # (B, N, D)


class TokenConv(nn.Conv2d):
    """A depthwise 3x3 convolution over the grid of tokens (B, h * w, D), added to them; it starts at zero."""

    def __init__(self, width: int):
        super().__init__(width, width, 3, padding=1, groups=width)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return x + super().forward(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)


class MLP(nn.Module):
    """conv: a TokenConv between the two layers."""

    def __init__(self, kind: str, width: int, ratio: float, conv: bool = False):
        super().__init__()
        if kind not in ("swiglu", "gelu"):
            raise ValueError(f"mlp {kind!r}: must be 'swiglu' or 'gelu'")
        self.gated = kind == "swiglu"
        hidden = int(ratio * width) if not self.gated else -(-int(ratio * width * 2 / 3) // 16) * 16
        self.fc1 = nn.Linear(width, 2 * hidden if self.gated else hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.conv = TokenConv(hidden) if conv else None

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        if self.gated:
            gate, x = self.fc1(x).chunk(2, dim=-1)
            x = F.silu(gate) * x
        else:
            x = F.gelu(self.fc1(x), approximate="tanh")
        if self.conv is not None:
            x = self.conv(x, grid)
        return self.fc2(x)


class Block(nn.Module):
    """Attention and MLP, each modulated before and gated after by the condition (adaLN-Zero)."""

    def __init__(self, c: DiTConfig):
        super().__init__()
        self.norm1, self.norm2 = Norm(c.norm, c.width), Norm(c.norm, c.width)
        self.attn = SelfAttention(c)
        self.mlp = MLP(c.mlp, c.width, c.mlp_ratio, c.conv)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.width, 6 * c.width))

    def forward(self, x: Tensor, c: Tensor, rope: Rope | None, grid: tuple[int, int] | None = None) -> Tensor:
        m = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        attn, mlp = Modulation(*m[:3]), Modulation(*m[3:])
        x = x + attn.gate * self.attn(modulate(self.norm1(x), attn), rope)
        return x + mlp.gate * self.mlp(modulate(self.norm2(x), mlp), grid)


class FinalLayer(nn.Module):
    def __init__(self, c: DiTConfig, out_channels: int):
        super().__init__()
        self.norm_final = Norm(c.norm, c.width)
        self.linear = nn.Linear(c.width, c.patch[0] * c.patch[1] * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.width, 2 * c.width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class TimestepEmbedder(nn.Module):
    def __init__(self, c: DiTConfig):
        super().__init__()
        self.scale, self.offset = c.time_scale, c.time_offset
        self.mlp = nn.Sequential(nn.Linear(256, c.width), nn.SiLU(), nn.Linear(c.width, c.width))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(t, 256, self.scale, self.offset).to(self.mlp[0].weight.dtype))


class PatchEmbed(nn.Module):
    def __init__(self, c: DiTConfig):
        super().__init__()
        self.proj = nn.Conv2d(c.channels, c.width, c.patch, stride=c.patch)

    def grid(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of patches in a latent. Raises ValueError where the patch does not divide it."""
        (h, w), (p, q) = x.shape[-2:], self.proj.stride
        if h % p or w % q:
            raise ValueError(f"latent {h}x{w}: not a multiple of the patch {p}x{q}")
        return h // p, w // q

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def unpatchify(x: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """(B, h * w, p * q * C) tokens -> (B, C, h * p, w * q)."""
    x = x.unflatten(1, grid).unflatten(-1, (*patch, -1))                     # (B, h, w, p, q, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def initialize_linear(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    # a convolution, but it acts as a linear layer
    nn.init.xavier_uniform_(model.x_embedder.proj.weight.flatten(1))
    nn.init.zeros_(model.x_embedder.proj.bias)


class LabelEmbedder(nn.Module):
    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)   # the last row is "no class"

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class DiT(nn.Module):
    """Raises ValueError where the patch does not divide the latent, or the heads the width."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        c = self.config = config
        if c.width % c.heads or c.width // c.heads % 4 or c.width % 4:
            raise ValueError(f"width {c.width} with {c.heads} heads: width / heads must be a multiple of 4")
        self.out_channels = (c.out_channels or c.channels) * (2 if c.learn_sigma else 1)
        self.x_embedder = PatchEmbed(c)
        self.t_embedder = TimestepEmbedder(c)
        self.y_embedder = LabelEmbedder(c.num_classes, c.width) if c.num_classes else None
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.final_layer = FinalLayer(c, self.out_channels)
        self._positions: dict[tuple, tuple[Tensor, Rope | None]] = {}
        self.initialize()

    def initialize(self) -> None:
        initialize_linear(self)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        # adaLN-Zero: every gate starts closed, so every block starts as the identity and the output at zero
        for module in (*(block.adaLN_modulation[1] for block in self.blocks),
                       self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def positions(self, h: int, w: int, device: torch.device) -> tuple[Tensor, Rope | None]:
        """Both tables for a grid of h x w tokens, computed once."""
        c, key = self.config, (h, w, device)
        if key not in self._positions:
            rope = rope_tables(h, w, c.width // c.heads, c.rope_theta, device) if c.rope else None
            self._positions[key] = sincos_positions(h, w, c.width, device), rope
        return self._positions[key]

    def forward(self, xt: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """xt (B, C, H, W), t (B,) in [0, 1], y (B,) in 0..num_classes -> raw (B, out_channels, H, W)."""
        h, w = self.x_embedder.grid(xt)
        positions, rope = self.positions(h, w, xt.device)

        x = self.x_embedder(xt)                                              # (B, N, D), N = h * w
        x = x + positions.to(self.x_embedder.proj.weight.dtype)              # stays float32 under autocast
        condition = self.t_embedder(t)                                       # (B, D)
        if self.y_embedder is not None:
            condition = condition + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, condition, rope, (h, w))
        x = self.final_layer(x, condition)                                   # (B, N, p * q * C)
        return unpatchify(x, (h, w), self.config.patch)                      # (B, C, H, W)


# ---- text and image together


@dataclass
class MMDiTConfig:
    channels: int = 4
    out_channels: int | None = None          # default: as many as come in
    patch: tuple[int, int] = (2, 2)
    width: int = 256
    depth: int = 6                           # joint blocks: weights of their own for text and for image
    single_depth: int = 0                    # then FLUX's: one stream, attention and MLP side by side
    heads: int = 4
    mlp_ratio: float = 4.0
    context_width: int = 256                 # of the text's vectors
    pooled_width: int | None = 256           # of one vector for the whole text, which modulates; None: none
    norm: str = "rms"
    mlp: str = "swiglu"
    qk_norm: bool = True
    conv: bool = False                       # a depthwise 3x3 convolution in the MLPs, for the image's tokens
    dual_attention: int = 0                  # SD 3.5: joint blocks where the image also attends to itself
    rope: tuple[int, int, int] | None = (16, 24, 24)   # channels of a head that turn with (text, y, x)
    rope_theta: float = 100.0
    sincos: tuple[int, int] | None = None    # SD 3: added positions, see sincos_positions
    guidance: bool = False                   # FLUX.1-dev was distilled and is told its guidance
    time_scale: float = 1000.0
    time_offset: float = 0.0


MMDIT_PUBLISHED = dict(norm="layer", mlp="gelu")
MMDIT_PRESETS = {
    "tiny": dict(width=64, depth=2, heads=2, rope=(8, 12, 12)),
    "small": dict(),
    "sd3-medium": dict(MMDIT_PUBLISHED, channels=16, width=1536, depth=24, heads=24, context_width=4096,
                       pooled_width=2048, qk_norm=False, rope=None, sincos=(64, 192)),
    "sd3.5-medium": dict(MMDIT_PUBLISHED, channels=16, width=1536, depth=24, heads=24, context_width=4096,
                         pooled_width=2048, dual_attention=13, rope=None, sincos=(64, 384)),
    "flux-dev": dict(MMDIT_PUBLISHED, channels=16, width=3072, depth=19, single_depth=38, heads=24,
                     context_width=4096, pooled_width=768, rope=(16, 56, 56), rope_theta=10000.0,
                     guidance=True),
}


def rope_3d(length: int, h: int, w: int, axes: tuple[int, int, int], theta: float,
            device: torch.device | str = "cpu") -> Rope:
    """cos and sin (length + h * w, sum(axes) / 2) for `length` words at (0, 0, 0) and h x w patches at
    (0, y, x): the pairs of each axis turn with its coordinate (FLUX)."""
    y, x = torch.meshgrid(torch.arange(h, dtype=torch.float64), torch.arange(w, dtype=torch.float64),
                          indexing="ij")
    patches = torch.stack([torch.zeros(h * w, dtype=torch.float64), y.flatten(), x.flatten()], 1)
    positions = torch.cat([torch.zeros(length, 3, dtype=torch.float64), patches])          # (L + N, 3)
    angles = torch.cat([p[:, None] * theta ** -(torch.arange(0, d, 2, dtype=torch.float64) / d)
                        for p, d in zip(positions.T, axes)], 1)
    return angles.cos().float().to(device), angles.sin().float().to(device)


class VectorEmbedder(nn.Module):
    def __init__(self, c_in: int, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(c_in, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class Stream(nn.Module):
    """What one kind of token owns in a joint block. The text of a last block only speaks, as no one listens
    to it any more."""

    def __init__(self, c: MMDiTConfig, last: bool = False, dual: bool = False, conv: bool = False):
        super().__init__()
        self.norm1, self.attn = Norm(c.norm, c.width), SelfAttention(c, proj=not last)
        self.attn2 = SelfAttention(c) if dual else None
        if not last:
            self.norm2, self.mlp = Norm(c.norm, c.width), MLP(c.mlp, c.width, c.mlp_ratio, conv)
        self.chunks = 2 if last else 9 if dual else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.width, self.chunks * c.width))

    def begin(self, x: Tensor, c: Tensor) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor]]:
        """The modulation and q, k, v, normalised."""
        m = self.adaLN_modulation(c)[:, None].chunk(self.chunks, dim=-1)
        q, k, v = self.attn.split(modulate(self.norm1(x), Modulation(m[0], m[1], m[1])))
        if self.attn.q_norm is not None:
            q, k = rms_norm(q, self.attn.q_norm), rms_norm(k, self.attn.k_norm)
        return m, (q, k, v)

    def end(self, x: Tensor, m: list[Tensor], attended: Tensor,
            grid: tuple[int, int] | None = None) -> Tensor:
        attn, mlp = Modulation(*m[:3]), Modulation(*m[3:6])
        out = x + attn.gate * self.attn.proj(attended)
        if self.attn2 is not None:
            again = Modulation(*m[6:])
            out = out + again.gate * self.attn2(modulate(self.norm1(x), again), None)
        return out + mlp.gate * self.mlp(modulate(self.norm2(out), mlp), grid)


class JointBlock(nn.Module):
    """Text and image, each with weights of its own, in one attention (Esser et al. 2024, figure 2b)."""

    def __init__(self, c: MMDiTConfig, last: bool, dual: bool):
        super().__init__()
        self.context_block, self.x_block = Stream(c, last=last), Stream(c, dual=dual, conv=c.conv)
        self.last = last

    def forward(self, x: Tensor, context: Tensor, c: Tensor, rope: Rope | None, mask: Tensor | None,
                grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        words, length = self.context_block.begin(context, c), context.shape[1]
        patches = self.x_block.begin(x, c)
        # q, k, v: each (B, heads, L + N, head_dim)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(words[1], patches[1]))
        attended = attention(q, k, v, rope=rope, mask=mask).transpose(1, 2).flatten(2)
        x = self.x_block.end(x, patches[0], attended[:, length:], grid)
        return x, context if self.last else self.context_block.end(context, words[0], attended[:, :length])


class SingleBlock(nn.Module):
    """Text and image as one sequence; attention and MLP read the same input and are added together (FLUX;
    Dehghani et al. 2023)."""

    def __init__(self, c: MMDiTConfig):
        super().__init__()
        self.width, self.heads, hidden = c.width, c.heads, int(c.mlp_ratio * c.width)
        self.norm = Norm(c.norm, c.width)
        self.linear1 = nn.Linear(c.width, 3 * c.width + hidden)
        self.linear2 = nn.Linear(c.width + hidden, c.width)
        self.q_norm, self.k_norm = (nn.Parameter(torch.ones(c.width // c.heads)) if c.qk_norm else None
                                    for _ in "qk")
        self.conv = TokenConv(hidden) if c.conv else None
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.width, 3 * c.width))

    def forward(self, x: Tensor, c: Tensor, rope: Rope | None, mask: Tensor | None,
                grid: tuple[int, int]) -> Tensor:
        m = Modulation(*self.adaLN_modulation(c)[:, None].chunk(3, dim=-1))
        qkv, hidden = self.linear1(modulate(self.norm(x), m)).tensor_split([3 * self.width], dim=-1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = attention(q, k, v, q_norm=self.q_norm, k_norm=self.k_norm, rope=rope, mask=mask)
        hidden = F.gelu(hidden, approximate="tanh")
        if self.conv is not None:
            words, patches = hidden.tensor_split([-grid[0] * grid[1]], dim=1)
            hidden = torch.cat([words, self.conv(patches, grid)], dim=1)
        return x + m.gate * self.linear2(torch.cat([attended.transpose(1, 2).flatten(2), hidden], dim=-1))


class MMDiT(nn.Module):
    """Stable Diffusion 3's transformer (Esser et al. 2024, arXiv:2403.03206) and, with single_depth, FLUX's.
    Raises ValueError where the patch does not divide the latent, or heads and rope do not fit."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        c = self.config = config
        if c.width % c.heads or c.rope and (sum(c.rope) != c.width // c.heads or any(d % 2 for d in c.rope)):
            raise ValueError(f"width {c.width} with {c.heads} heads and rope {c.rope}: rope must be three "
                             "even numbers that add up to width / heads")
        self.out_channels = c.out_channels or c.channels
        self.x_embedder, self.t_embedder = PatchEmbed(c), TimestepEmbedder(c)
        self.context_embedder = nn.Linear(c.context_width, c.width)
        self.y_embedder = VectorEmbedder(c.pooled_width, c.width) if c.pooled_width else None
        self.guidance_embedder = TimestepEmbedder(c) if c.guidance else None
        self.joint_blocks = nn.ModuleList(
            JointBlock(c, last=i == c.depth - 1 and c.single_depth == 0, dual=i < c.dual_attention)
            for i in range(c.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(c) for _ in range(c.single_depth))
        self.final_layer = FinalLayer(c, self.out_channels)
        self._positions: dict[tuple, tuple[Tensor | None, Rope | None]] = {}
        self.initialize()

    def initialize(self) -> None:
        initialize_linear(self)
        for name, module in self.named_modules():          # adaLN-Zero, as in DiT
            if name.endswith("adaLN_modulation.1"):
                nn.init.zeros_(module.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def positions(self, length: int, h: int, w: int,
                  device: torch.device) -> tuple[Tensor | None, Rope | None]:
        c, key = self.config, (length, h, w, device)
        if key not in self._positions:
            self._positions[key] = (
                sincos_positions(h, w, c.width, device, c.sincos) if c.sincos else None,
                rope_3d(length, h, w, c.rope, c.rope_theta, device) if c.rope else None)
        return self._positions[key]

    def forward(self, xt: Tensor, t: Tensor, context: Tensor, mask: Tensor | None = None,
                pooled: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        """xt (B, C, H, W), t (B,) in [0, 1], context (B, L, context_width), mask (B, L) True = word, pooled
        (B, pooled_width), guidance (B,) -> raw (B, out_channels, H, W)."""
        length = context.shape[1]
        h, w = self.x_embedder.grid(xt)
        sincos, rope = self.positions(length, h, w, xt.device)

        x = self.x_embedder(xt)                                              # (B, N, D), N = h * w
        if sincos is not None:
            x = x + sincos.to(self.x_embedder.proj.weight.dtype)
        words = self.context_embedder(context)                               # (B, L, D)
        condition = self.t_embedder(t)                                       # (B, D)
        if self.guidance_embedder is not None:
            condition = condition + self.guidance_embedder(guidance)
        if self.y_embedder is not None:
            condition = condition + self.y_embedder(pooled)
        if mask is not None:                                                 # every patch may be attended to
            mask = torch.cat([mask, mask.new_ones(len(x), h * w)], dim=1)    # (B, L + N)
        for block in self.joint_blocks:
            x, words = block(x, words, condition, rope, mask, (h, w))
        if self.single_blocks:
            x = torch.cat([words, x], dim=1)                                 # (B, L + N, D)
            for block in self.single_blocks:
                x = block(x, condition, rope, mask, (h, w))
            x = x[:, length:]
        x = self.final_layer(x, condition)                                   # (B, N, p * q * C)
        return unpatchify(x, (h, w), self.config.patch)                      # (B, C, H, W)


# ---- words

START, PAD, WORD = 256, 257, 16          # beside the 256 bytes; bytes of a word, the space before it included


@dataclass
class TextConfig:
    width: int = 256
    depth: int = 3
    heads: int = 4
    mlp_ratio: float = 4.0
    norm: str = "rms"
    mlp: str = "swiglu"
    qk_norm: bool = True
    limit: int = 64            # words of a prompt that are read


TEXT_PRESETS = {"tiny": dict(width=64, depth=1, heads=2), "small": dict()}   # with the network's of that name


def split_words(prompt: str) -> list[bytes]:
    """UTF-8 of a prompt in lower case, cut before every space, and longer pieces after WORD bytes. Joined
    they are the prompt, but for a space in front: so a word is the same wherever it stands."""
    text = f" {prompt}".lower().encode("utf-8", "replace") if prompt.strip() else b""
    return [piece[i:i + WORD] for piece in re.findall(rb" [^ ]*", text) for i in range(0, len(piece), WORD)]


def tokenize(prompts: list[str], limit: int) -> tuple[Tensor, Tensor]:
    """START and the words of each prompt as bytes (B, L, WORD), padded to the longest prompt and word, and
    the mask (B, L), False where padded. An empty prompt is START alone: what the unconditional branch is
    given."""
    rows = [[bytes(1), *split_words(prompt)[:limit]] for prompt in prompts]
    words = [word for row in rows for word in row]
    text = bytearray(b"".join(word.ljust(WORD, b"\0") for word in words))
    letters = torch.frombuffer(text, dtype=torch.uint8).view(-1, WORD).long()
    letters[torch.arange(WORD) >= torch.tensor([len(word) for word in words])[:, None]] = PAD
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.full((*mask.shape, WORD), PAD)
    ids[mask] = letters
    ids[:, 0, 0] = START
    return ids, mask


class TextBlock(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.norm1, self.attn = Norm(c.norm, c.width), SelfAttention(c)
        self.norm2, self.mlp = Norm(c.norm, c.width), MLP(c.mlp, c.width, c.mlp_ratio)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), rope, mask)
        return x + self.mlp(self.norm2(x))


class TextEncoder(nn.Module):
    """Bytes in, a vector for each word out: a bidirectional transformer of the blocks above, trained with the
    network that listens to it. No vocabulary: any UTF-8 text has bytes. A word enters as the sum of its
    bytes' vectors, which differ by place, so that the sequence is about five times as short as one of bytes
    (patches of bytes that end at spaces: Slagle 2024, arXiv:2404.14408)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        c = self.config = config
        self.embedding = nn.Embedding(WORD * 258, c.width)         # a table for each place in a word
        self.blocks = nn.ModuleList(TextBlock(c) for _ in range(c.depth))
        self.norm = Norm(c.norm, c.width)
        self._rope: dict[tuple, Rope] = {}
        nn.init.normal_(self.embedding.weight, std=0.25)            # a word of a few bytes: about 1

    def cut(self, prompt: str) -> str:
        """What of a prompt is beyond the limit and will not be read."""
        return b"".join(split_words(prompt)[self.config.limit:]).decode("utf-8", "ignore").strip()

    def forward(self, prompts: list[str]) -> dict[str, Tensor]:
        """-> context (B, L, D), 0 where padded; its mask (B, L); and pooled (B, D), which START gathered."""
        c, device = self.config, self.embedding.weight.device
        pinned = device.type == "cuda"      # so that neither side waits for the other
        ids, mask = ((part.pin_memory() if pinned else part).to(device, non_blocking=pinned)
                     for part in tokenize(prompts, c.limit))
        key = (ids.shape[1], device)
        if key not in self._rope:
            self._rope[key] = rope_3d(0, 1, ids.shape[1], (0, 0, c.width // c.heads), 100.0, device)
        rope = self._rope[key]
        letters = self.embedding(ids + 258 * torch.arange(WORD, device=device))             # (B, L, WORD, D)
        x = (letters * (ids != PAD)[..., None]).sum(2)                                      # (B, L, D)
        for block in self.blocks:
            x = block(x, rope, mask)
        x = self.norm(x) * mask[..., None]
        return {"context": x, "mask": mask, "pooled": x[:, 0]}


class PublishedTextEncoder:
    """A frozen encoder of transformers, called like a TextEncoder: kind "clip" (the last layer but one, and
    the pooled output: Stable Diffusion 2, XL and 3) or "t5" (the last layer, nothing pooled: Stable
    Diffusion 3).

    path: a folder with the model and its tokenizer, or a pipeline's with text_encoder/ and tokenizer/ (for t5
    text_encoder_3/ and tokenizer_3/). Raises ValueError with a line for the user."""

    def __init__(self, kind: str, path: str, device: torch.device | str = "cpu", limit: int = 77):
        try:
            import transformers
        except ImportError:
            raise ValueError(f"{kind}:{path}: needs the package transformers "
                             "(pip install transformers)") from None
        end = "_3" if kind == "t5" else ""
        model, words = (f"{path}/{part}{end}" if os.path.isdir(f"{path}/{part}{end}") else path
                        for part in ("text_encoder", "tokenizer"))
        if not os.path.isfile(f"{model}/config.json"):
            raise ValueError(f"{kind}:{path}: no text encoder there; give a folder with its config.json")
        try:
            kinds = transformers.AutoConfig.from_pretrained(model, local_files_only=True).architectures
            cls = transformers.T5EncoderModel if kind == "t5" else (
                transformers.CLIPTextModel if kinds == ["CLIPTextModel"] else
                transformers.CLIPTextModelWithProjection)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(words, local_files_only=True)
            self.model = cls.from_pretrained(model, local_files_only=True).to(device).eval()
        except Exception as error:     # of a dozen kinds
            raise ValueError(f"{kind}:{path}: cannot be loaded as a {kind} encoder with its tokenizer "
                             f"({type(error).__name__}: {str(error).splitlines()[0]})") from None
        self.kind, self.limit = kind, min(limit, self.tokenizer.model_max_length)

    def cut(self, prompt: str) -> str:
        """What of a prompt is beyond the limit and will not be read."""
        ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        room = self.limit - self.tokenizer.num_special_tokens_to_add()
        return self.tokenizer.decode(ids[room:]) if len(ids) > room else ""

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> dict[str, Tensor]:
        """-> context (B, L, D), its mask (B, L), and of CLIP pooled (B, P)."""
        words = self.tokenizer(prompts, padding=True, truncation=True, max_length=self.limit,
                               return_tensors="pt")
        words = {name: words[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        out, mask = self.model(**words, output_hidden_states=True), words["attention_mask"].bool()
        if self.kind == "t5":
            return {"context": out.last_hidden_state * mask[..., None], "mask": mask}
        pooled = out.text_embeds if "text_embeds" in out else out.pooler_output
        return {"context": out.hidden_states[-2] * mask[..., None], "mask": mask, "pooled": pooled}


# ---- published names

# diffusers' DiTTransformer2DModel: pattern and our name. Each of its blocks holds a copy of the embedders,
# which the original shares.
DIFFUSERS_NAMES = (
    (r"^pos_embed\.proj\.", "x_embedder.proj."),
    (r"^transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
    (r"^transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
    (r"^transformer_blocks\.0\.norm1\.emb\.class_embedder\.", "y_embedder."),
    (r"^transformer_blocks\.(\d+)\.norm1\.linear\.", r"blocks.\1.adaLN_modulation.1."),
    (r"^transformer_blocks\.(\d+)\.attn1\.to_out\.0\.", r"blocks.\1.attn.proj."),
    (r"^transformer_blocks\.(\d+)\.attn1\.to_(q|k|v)\.", r"blocks.\1.attn.\2."),      # joined below
    (r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.", r"blocks.\1.mlp.fc1."),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.2\.", r"blocks.\1.mlp.fc2."),
    (r"^proj_out_1\.", "final_layer.adaLN_modulation.1."), (r"^proj_out_2\.", "final_layer.linear."),
)


def published(state: dict[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """The state dict of a DiT of this config from a published one: the original DiT's and SiT's names, which
    are ours, or diffusers'. SiT (time_scale < 0) predicts the velocity of its own time, from noise to data;
    the last layer is negated, so that here as everywhere it is that of t."""
    renamed: dict[str, Tensor] = {}
    for name, weight in state.items():
        if name == "pos_embed" or re.match(r"transformer_blocks\.[1-9]\d*\.norm1\.emb\.", name):
            continue                      # the fixed table that `sincos_positions` computes; further copies
        for pattern, replacement in DIFFUSERS_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = weight
    for name in [name for name in renamed if ".attn.q." in name]:
        q, k, v = (renamed.pop(name.replace(".q.", f".{part}."), None) for part in "qkv")
        if k is not None and v is not None:
            renamed[name.replace(".q.", ".qkv.")] = torch.cat([q, k, v])
    if config.time_scale < 0:
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            renamed |= {name: -renamed[name]} if name in renamed else {}
    return renamed


# diffusers' SD3Transformer2DModel and FluxTransformer2DModel: pattern and our name, applied in this order.
MMDIT_DIFFUSERS_NAMES = (
    (r"^(pos_embed\.proj|x_embedder)\.", "x_embedder.proj."),
    (r"^time_text_embed\.timestep_embedder\.", "t_embedder.mlp."),
    (r"^time_text_embed\.guidance_embedder\.", "guidance_embedder.mlp."),
    (r"^time_text_embed\.text_embedder\.", "y_embedder.mlp."),
    (r"\.mlp\.linear_1\.", ".mlp.0."), (r"\.mlp\.linear_2\.", ".mlp.2."),
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."), (r"^proj_out\.", "final_layer.linear."),
    (r"^single_transformer_(blocks\.\d+)\.norm\.linear\.", r"single_\1.adaLN_modulation.1."),
    (r"^single_transformer_(blocks\.\d+)\.attn\.to_(q|k|v)\.", r"single_\1.\2."),         # joined below
    (r"^single_transformer_(blocks\.\d+)\.proj_mlp\.", r"single_\1.mlp."),
    (r"^single_transformer_(blocks\.\d+)\.proj_out\.", r"single_\1.linear2."),
    (r"^single_transformer_(blocks\.\d+)\.attn\.norm_(q|k)\.weight$", r"single_\1.\2_norm"),
    (r"^transformer_", "joint_"),
    (r"\.norm1\.linear\.", ".x_block.adaLN_modulation.1."),
    (r"\.norm1_context\.linear\.", ".context_block.adaLN_modulation.1."),
    (r"\.attn(2?)\.to_(q|k|v)\.", r".x_block.attn\1.\2."),
    (r"\.attn\.add_(q|k|v)_proj\.", r".context_block.attn.\1."),
    (r"\.attn(2?)\.to_out\.0\.", r".x_block.attn\1.proj."),
    (r"\.attn\.to_add_out\.", ".context_block.attn.proj."),
    (r"\.attn(2?)\.norm_(q|k)\.weight$", r".x_block.attn\1.\2_norm"),
    (r"\.attn\.norm_added_(q|k)\.weight$", r".context_block.attn.\1_norm"),
    (r"\.ff\.net\.0\.proj\.", ".x_block.mlp.fc1."), (r"\.ff\.net\.2\.", ".x_block.mlp.fc2."),
    (r"\.ff_context\.net\.0\.proj\.", ".context_block.mlp.fc1."),
    (r"\.ff_context\.net\.2\.", ".context_block.mlp.fc2."),
)


def published_mmdit(state: dict[str, Tensor], config: MMDiTConfig) -> dict[str, Tensor]:
    """The state dict of an MMDiT of this config from diffusers' SD3Transformer2DModel or
    FluxTransformer2DModel."""
    renamed: dict[str, Tensor] = {}
    for name, weight in state.items():
        if name != "pos_embed.pos_embed":              # the fixed table that `sincos_positions` computes
            for pattern, replacement in MMDIT_DIFFUSERS_NAMES:
                name = re.sub(pattern, replacement, name)
            renamed[name] = weight
    for name in [name for name in renamed if re.search(r"\.q\.(weight|bias)$", name)]:
        parts = ("q", "k", "v", "mlp") if name.startswith("single_") else ("q", "k", "v")
        whole = ".linear1." if name.startswith("single_") else ".qkv."
        renamed[name.replace(".q.", whole)] = torch.cat([renamed.pop(name.replace(".q.", f".{part}."))
                                                         for part in parts])
    (p, q), c_in, c_out = config.patch, config.channels, config.out_channels or config.channels
    last = f"joint_blocks.{config.depth - 1}.context_block.adaLN_modulation.1"
    for kind in ("weight", "bias"):                    # where nothing is gated, theirs is (scale, shift)
        for name in ("final_layer.adaLN_modulation.1", *([] if config.single_depth else [last])):
            renamed[f"{name}.{kind}"] = torch.cat(renamed[f"{name}.{kind}"].chunk(2)[::-1])
        if config.single_depth:                        # FLUX's patches are (c, p, q) where ours are (p, q, c)
            rows = renamed[f"final_layer.linear.{kind}"].unflatten(0, (c_out, p * q))
            renamed[f"final_layer.linear.{kind}"] = rows.transpose(0, 1).flatten(0, 1)
    if (weight := renamed["x_embedder.proj.weight"]).ndim == 2:
        renamed["x_embedder.proj.weight"] = weight.unflatten(1, (c_in, p, q))
    return renamed


if __name__ == "__main__":
    print("preset   parameters, published block   parameters, modern block   (1000 classes, 4 channels)")
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            counts = [sum(p.numel() for p in DiT(DiTConfig(num_classes=1000, **preset, **block)).parameters())
                      for block in (dict(PUBLISHED, learn_sigma=True), {})]
        print(f"{name:6s} {counts[0] / 1e6:20.1f} M {counts[1] / 1e6:27.1f} M")
    print("MMDiT        parameters")
    for name, preset in MMDIT_PRESETS.items():
        with torch.device("meta"):
            model = MMDiT(MMDiTConfig(**preset))
        print(f"{name:12s} {sum(p.numel() for p in model.parameters()) / 1e6:8.1f} M")
