"""Stable Audio's DiT: a transformer over latent frames that reads text by cross-attention.

    python stable_audio.py               # parameters of the published network; vectors of some lengths
    python sample.py --published stable-audio-open-1.0 --weights stable-audio-open-1.0/ --prompt "rain"

Evans et al. 2024, "Stable Audio Open" (arXiv:2407.14358). The time of the path and the seconds of the clip
are one token in front of the sequence; nothing is modulated. Contract: model(xt, t, context, pooled) -> raw,
with xt (B, C, 1, T), t (B,) in [0, 1], 0 = data, context (B, L, E) and pooled (B, P). `embed_seconds` makes
the end of the context and all of pooled. Shapes: N = T + 1 tokens, D the width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from attention import Rope, attention
from dit import MLP, SelfAttention, position_angles


@dataclass
class StableAudioConfig:
    channels: int = 64
    width: int = 1536
    depth: int = 24
    heads: int = 24
    context_heads: int = 12           # heads of the context's keys and values, each for heads / context_heads
    context_width: int = 768
    pooled_width: int = 1536          # two numbers, each as wide as the context
    features: int = 256               # sines and cosines of a time or a number
    longest: float = 512.0            # seconds that the embedding of a number can tell apart


PRESETS = {"open-1.0": dict(channels=64, width=1536, depth=24, heads=24)}


# ---- layers

def sinusoids(x: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """x (B,) -> cosines and sines, each (B, F), of x at F learned frequencies, turns per unit. In float32, as
    bf16 cannot tell neighbouring values apart."""
    angles = 2 * math.pi * x.float()[:, None] * frequencies.float()
    return angles.cos(), angles.sin()


class TimeEmbedder(nn.Module):
    """t (B,) -> (B, D). The frequencies are random, and stay as they were drawn."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(features // 2), requires_grad=False)
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        cos, sin = sinusoids(t, self.frequencies)
        return self.mlp(torch.cat([cos, sin], dim=-1).to(self.mlp[0].weight.dtype))


class NumberEmbedder(nn.Module):
    """Numbers (B,) from 0 to `largest`, beyond which all are the same -> (B, D)."""

    def __init__(self, features: int, width: int, largest: float):
        super().__init__()
        self.largest = largest
        self.frequencies = nn.Parameter(torch.randn(features // 2))
        self.proj = nn.Linear(features + 1, width)

    def forward(self, numbers: Tensor) -> Tensor:
        share = numbers.float().clamp(0, self.largest) / self.largest
        cos, sin = sinusoids(share, self.frequencies)
        return self.proj(torch.cat([share[:, None], sin, cos], dim=-1).to(self.proj.weight.dtype))


def two_layers(width_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, width, bias=False), nn.SiLU(),
                         nn.Linear(width, width, bias=False))


class CrossAttention(nn.Module):
    """Attention of x (B, N, D) to a context (B, L, E). The context has fewer heads than x: several heads of
    queries share one of keys and values (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, width: int, context_width: int, heads: int, context_heads: int):
        super().__init__()
        self.heads = heads
        self.context_heads = context_heads
        inner = width // heads * context_heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(context_width, 2 * inner, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)            # (B, heads, N, head_dim)
        kv = self.kv(context).unflatten(-1, (2, self.context_heads, -1))         # (B, L, 2, heads, head_dim)
        kv = kv.repeat_interleave(self.heads // self.context_heads, dim=3)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        x = attention(q, k, v, mask=mask)
        return self.proj(x.transpose(1, 2).flatten(2))                           # (B, N, D)


class StableAudioBlock(nn.Module):
    """Self-attention, cross-attention and an MLP, each behind a LayerNorm."""

    def __init__(self, c: StableAudioConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.width)
        self.attn = SelfAttention(c.width, c.heads, qk_norm=False, bias=False)
        self.norm2 = nn.LayerNorm(c.width)
        self.cross = CrossAttention(c.width, c.context_width, c.heads, c.context_heads)
        self.norm3 = nn.LayerNorm(c.width)
        self.mlp = MLP("swiglu", c.width, 6.0)             # a hidden width of 4 D, gates not counted

    def forward(self, x: Tensor, context: Tensor, rope: Rope, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), rope)
        x = x + self.cross(self.norm2(x), context, mask)
        return x + self.mlp(self.norm3(x))


# ---- the network

class StableAudio(nn.Module):
    """Stable Audio's DiT, with the embedding of a clip's seconds, which the published pipeline keeps apart.
    Raises ValueError for heads that do not divide the width, or each other, as they must."""

    def __init__(self, config: StableAudioConfig):
        super().__init__()
        c = self.config = config
        if c.width % c.heads or c.width // c.heads % 4:
            raise ValueError(f"width {c.width} with {c.heads} heads: width / heads must be a multiple of 4")
        if c.heads % c.context_heads:
            raise ValueError(f"context_heads {c.context_heads}: must divide the {c.heads} heads")
        self.preprocess_conv = nn.Conv1d(c.channels, c.channels, 1, bias=False)
        self.proj_in = nn.Linear(c.channels, c.width, bias=False)
        self.t_embedder = TimeEmbedder(c.features, c.width)
        self.y_embedder = two_layers(c.pooled_width, c.width)
        self.context_embedder = two_layers(c.context_width, c.context_width)
        self.blocks = nn.ModuleList(StableAudioBlock(c) for _ in range(c.depth))
        self.proj_out = nn.Linear(c.width, c.channels, bias=False)
        self.postprocess_conv = nn.Conv1d(c.channels, c.channels, 1, bias=False)
        self.seconds_start = NumberEmbedder(c.features, c.context_width, c.longest)
        self.seconds_total = NumberEmbedder(c.features, c.context_width, c.longest)
        self._positions: dict[tuple, Rope] = {}
        self.initialize()

    def initialize(self) -> None:
        # every branch starts closed, so that a deep network trains stably from the first step
        for block in self.blocks:
            for layer in (block.attn.proj, block.cross.proj, block.mlp.fc2):
                nn.init.zeros_(layer.weight)
            nn.init.zeros_(block.mlp.fc2.bias)
        for conv in (self.preprocess_conv, self.postprocess_conv):
            nn.init.zeros_(conv.weight)

    def positions(self, tokens: int, device: torch.device) -> Rope:
        """cos and sin, each (tokens, head_dim / 2): half of the channel pairs rotate with the position; the
        others keep what they are, wherever they are."""
        key = (tokens, device)
        if key not in self._positions:
            pairs = self.config.width // self.config.heads // 2
            angles = position_angles(torch.arange(tokens, dtype=torch.float64), pairs // 2, 10000.0)
            angles = F.pad(angles, (0, pairs - pairs // 2))
            self._positions[key] = angles.cos().float().to(device), angles.sin().float().to(device)
        return self._positions[key]

    def embed_seconds(self, start: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """start: the second of a recording with which a clip begins; total: how many the recording has; each
        (B,) -> two tokens (B, 2, E), the last ones of `context`, and `pooled` (B, P)."""
        tokens = torch.stack([self.seconds_start(start), self.seconds_total(total)], dim=1)
        return tokens, tokens.flatten(1)

    def forward(self, xt: Tensor, t: Tensor, context: Tensor, pooled: Tensor,
                mask: Tensor | None = None) -> Tensor:
        """xt (B, C, 1, T), t (B,) in [0, 1], context (B, L, E), pooled (B, P), mask (B, L), bool: True where
        the context may be attended to -> raw (B, C, 1, T). Raises ValueError for latents of more rows than
        one."""
        if xt.shape[2] != 1:
            raise ValueError(f"latent {xt.shape[2]}x{xt.shape[3]}: must have one row, whose columns are "
                             "frames")
        x = xt.squeeze(2)                                                    # (B, C, T)
        x = (x + self.preprocess_conv(x)).transpose(1, 2)                    # (B, T, C)
        first = self.t_embedder(t) + self.y_embedder(pooled)                 # (B, D)
        x = torch.cat([first[:, None], self.proj_in(x)], dim=1)              # (B, N, D)
        context = self.context_embedder(context)
        rope = self.positions(x.shape[1], x.device)
        for block in self.blocks:
            x = block(x, context, rope, mask)
        x = self.proj_out(x[:, 1:]).transpose(1, 2)                          # (B, C, T)
        return (x + self.postprocess_conv(x)).unsqueeze(2)


def demo() -> None:
    """Print the parameters of the presets, and how far the vectors of clips of other lengths are apart."""
    for name, preset in PRESETS.items():
        with torch.device("meta"):         # shapes without memory
            model = StableAudio(StableAudioConfig(**preset))
        print(f"{name:10s} {sum(p.numel() for p in model.parameters()) / 1e6:8.1f} M parameters")
    torch.manual_seed(0)
    model = StableAudio(StableAudioConfig(channels=8, width=32, depth=1, heads=2, context_heads=1,
                                          context_width=16, pooled_width=32))
    seconds = torch.tensor([1.0, 2.0, 10.0, 47.0])
    with torch.no_grad():
        tokens, pooled = model.embed_seconds(torch.zeros(4), seconds)
        raw = model(torch.randn(4, 8, 1, 20), torch.rand(4), tokens, pooled)
    distance = (pooled - pooled[:1]).norm(dim=1).tolist()
    print(f"raw {tuple(raw.shape)}; from a clip of 1 s, those of 2, 10 and 47 s are "
          + ", ".join(f"{d:.2f}" for d in distance[1:]) + " away")


if __name__ == "__main__":
    demo()
