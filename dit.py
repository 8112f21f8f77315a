"""The transformer denoiser: DiT with adaLN-Zero, in its published form and in the modern one.

    python dit.py                        # prints the presets and their parameter counts
    python train.py --arch dit --objective rf

Peebles & Xie 2022, "Scalable Diffusion Models with Transformers" (arXiv:2212.09748); the modern block
(RMSNorm, SwiGLU, QK-norm, rotary positions) as in Yao et al. 2025 (arXiv:2501.01423). Contract:
model(xt, t, y=...) -> raw, with xt (B, C, H, W), t (B,) in [0, 1], 0 = data, and y (B,) integer labels,
`num_classes` standing for "no class".
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from attention import Rope, attention


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
    "XL": dict(width=1152, depth=28, heads=16),
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


def sincos_positions(h: int, w: int, dim: int, device: torch.device | str = "cpu") -> Tensor:
    """(h * w, dim) fixed 2-D positions as published: the first half of the channels encodes x,
    the second half y."""
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(h, dtype=torch.float64), torch.arange(w, dtype=torch.float64),
                          indexing="ij")
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
    def __init__(self, c: DiTConfig):
        super().__init__()
        self.heads = c.heads
        self.qkv = nn.Linear(c.width, 3 * c.width)
        self.proj = nn.Linear(c.width, c.width)
        self.q_norm, self.k_norm = (nn.Parameter(torch.ones(c.width // c.heads)) if c.qk_norm else None
                                    for _ in "qk")

    def forward(self, x: Tensor, rope: Rope | None) -> Tensor:
        # q, k, v: each (B, heads, N, head_dim)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = attention(q, k, v, q_norm=self.q_norm, k_norm=self.k_norm, rope=rope)
        return self.proj(x.transpose(1, 2).flatten(2))     # (B, N, D)


class MLP(nn.Module):
    def __init__(self, kind: str, width: int, ratio: float):
        super().__init__()
        if kind not in ("swiglu", "gelu"):
            raise ValueError(f"mlp {kind!r}: must be 'swiglu' or 'gelu'")
        self.gated = kind == "swiglu"
        hidden = int(ratio * width) if not self.gated else -(-int(ratio * width * 2 / 3) // 16) * 16
        self.fc1 = nn.Linear(width, 2 * hidden if self.gated else hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            gate, x = self.fc1(x).chunk(2, dim=-1)
            return self.fc2(F.silu(gate) * x)
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, each modulated before and gated after by the condition (adaLN-Zero)."""

    def __init__(self, c: DiTConfig):
        super().__init__()
        self.norm1, self.norm2 = Norm(c.norm, c.width), Norm(c.norm, c.width)
        self.attn = SelfAttention(c)
        self.mlp = MLP(c.mlp, c.width, c.mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.width, 6 * c.width))

    def forward(self, x: Tensor, c: Tensor, rope: Rope | None) -> Tensor:
        m = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        attn, mlp = Modulation(*m[:3]), Modulation(*m[3:])
        x = x + attn.gate * self.attn(modulate(self.norm1(x), attn), rope)
        return x + mlp.gate * self.mlp(modulate(self.norm2(x), mlp))


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

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


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
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # a convolution, but it acts as a linear layer
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
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
        c, (p, q) = self.config, self.config.patch
        if xt.shape[-2] % p or xt.shape[-1] % q:
            raise ValueError(f"latent {xt.shape[-2]}x{xt.shape[-1]}: not a multiple of the patch {p}x{q}")
        h, w = xt.shape[-2] // p, xt.shape[-1] // q
        positions, rope = self.positions(h, w, xt.device)

        x = self.x_embedder(xt)                                              # (B, N, D), N = h * w
        x = x + positions.to(self.x_embedder.proj.weight.dtype)              # stays float32 under autocast
        condition = self.t_embedder(t)                                       # (B, D)
        if self.y_embedder is not None:
            condition = condition + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, condition, rope)
        x = self.final_layer(x, condition)                                   # (B, N, p * q * C)
        x = x.unflatten(1, (h, w)).unflatten(-1, (p, q, self.out_channels))  # (B, h, w, p, q, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)       # (B, C, H, W)


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


if __name__ == "__main__":
    print("preset   parameters, published block   parameters, modern block   (1000 classes, 4 channels)")
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            counts = [sum(p.numel() for p in DiT(DiTConfig(num_classes=1000, **preset, **block)).parameters())
                      for block in (dict(PUBLISHED, learn_sigma=True), {})]
        print(f"{name:6s} {counts[0] / 1e6:20.1f} M {counts[1] / 1e6:27.1f} M")
