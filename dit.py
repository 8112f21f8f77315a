"""DiT: a transformer that denoises the patches of a latent, conditioned on time and on a class label.

    python dit.py                        # prints the presets and their parameter counts
    python train.py --arch dit --objective rf

Peebles & Xie 2022, "Scalable Diffusion Models with Transformers" (arXiv:2212.09748), in its published form
and in a modern one (RMSNorm, SwiGLU, QK-norm, rotary positions) as in Yao et al. 2025 (arXiv:2501.01423).
Contract: model(xt, t, y) -> raw, with xt (B, C, H, W), t (B,) in [0, 1], 0 = data, and y (B,) integer labels,
of which `num_classes` is the null class. mmdit.py and text.py are built from the blocks of this file.
Shapes: N = h * w tokens (patches) in h rows and w columns, D the width, (p, q) the sides of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from attention import Packing, Rope, attention, pack


@dataclass
class DiTConfig:
    """What a DiT is built from, as a checkpoint stores it."""
    channels: int = 4
    out_channels: int | None = None   # None: the same as `channels`
    patch: tuple[int, int] = (2, 2)   # height, width
    width: int = 256
    depth: int = 6
    heads: int = 4
    mlp_ratio: float = 4.0
    num_classes: int = 0              # 0: the network takes no labels
    norm: str = "rms"                 # "rms", or "layer" as published; both without learned scale
    mlp: str = "swiglu"               # "swiglu" at 2/3 width, for equal parameters, or "gelu" as published
    qk_norm: bool = True
    conv: bool = False                # a depthwise 3x3 convolution inside every MLP
    rope: bool = True                 # rotary positions in addition to the sin-cos ones
    rope_theta: float = 100.0         # grids are tens of tokens wide, not thousands (Heo et al. 2024)
    learn_sigma: bool = False         # published DiT also predicts a variance: twice the channels
    time_scale: float = 1000.0        # the embedding sees time_scale * t + time_offset
    time_offset: float = 0.0          # DiT: 1000 and -1, for 0..999; SiT: -1 and 1, from noise to data
    second_time: bool = False         # also embed s <= t: the network predicts the mean velocity from t to s
    longest: float = 0.0              # sound, in seconds, whose length is an input; 0: no such input
    experts: int = 0                  # in the blocks of `moe_blocks`, the MLP is a mixture of so many: moe.py
    top_k: int = 2                    # experts that each token chooses
    shared_experts: int = 1           # experts that all tokens use besides
    expert_ratio: float | None = None   # the mlp_ratio of an expert; None: all that a token uses make one MLP
    moe_blocks: str = "deep"          # "all", "deep" (the second half) or "every-other"
    router: str = "token"             # what chooses: "token", "expert" or "race"


GAP_SCALE = 10.0     # fastest sinusoid of t - s, in radians per unit: its derivative by t enters the loss
BLUR = 0.1           # of t, as a share of t - s: see DiT.time_condition
PUBLISHED_BLOCK = dict(norm="layer", mlp="gelu", qk_norm=False, rope=False)   # the block of Peebles & Xie
PRESETS = {
    "tiny": dict(width=64, depth=2, heads=2),
    "small": dict(width=256, depth=6, heads=4),
    # for benchmarks/compare.py: a fourteenth, a sixth and a half of the cost of "small", as in unet.py
    "size-1": dict(width=96, depth=3, heads=2),
    "size-2": dict(width=128, depth=4, heads=2),
    "size-3": dict(width=192, depth=5, heads=3),
    "S": dict(width=384, depth=12, heads=6),
    "B": dict(width=768, depth=12, heads=12),
    "L": dict(width=1024, depth=24, heads=16),
    "XL": dict(width=1152, depth=28, heads=18),      # published: 16 heads of 72 channels, which are slower
}
PRESETS |= {f"{size}/{p}": dict(PRESETS[size], patch=(p, p))
            for size in ("S", "B", "L", "XL") for p in (8, 4, 2)}


# ---- time and positions

def timestep_embedding(t: Tensor, dim: int, scale: float = 1000.0, offset: float = 0.0,
                       blur: Tensor | None = None) -> Tensor:
    """t (B,) in [0, 1] -> (B, dim), float32 whatever the dtype of t: cosines, then sines, of
    scale * t + offset at dim / 2 frequencies from 1 down to nearly 1/10000.

    blur (B,): the mean of the embedding over times that are spread about t by this standard deviation."""
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(dim // 2, dtype=torch.float32, device=t.device)
                            / (dim // 2))
    angles = (scale * t + offset).float()[:, None] * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    if blur is None:
        return embedding
    damping = torch.exp(-((scale * blur).float()[:, None] * frequencies) ** 2 / 2)   # E[cos], E[sin]
    return embedding * torch.cat([damping, damping], dim=-1)


def grid_coordinates(h: int, w: int) -> tuple[Tensor, Tensor]:
    """Row y and column x of every token of a grid, row by row, each (h * w,) float64."""
    y, x = torch.meshgrid(torch.arange(h, dtype=torch.float64), torch.arange(w, dtype=torch.float64),
                          indexing="ij")
    return y.flatten(), x.flatten()


def position_angles(position: Tensor, count: int, theta: float) -> Tensor:
    """position (N,) float64 -> (N, count): the position times `count` frequencies in geometric progression,
    from 1 down to nearly 1/theta."""
    frequencies = theta ** -(torch.arange(count, dtype=torch.float64) / count)
    return position[:, None] * frequencies


def sincos_positions(h: int, w: int, dim: int, device: torch.device | str = "cpu",
                     crop: tuple[int, int] | None = None) -> Tensor:
    """(h * w, dim) fixed 2-D positions as published: the first half of the channels encodes x,
    the second half y.

    crop (base, largest): Stable Diffusion 3 takes the centre of a grid of largest x largest positions, which
    run from 0 to base."""
    y, x = grid_coordinates(h, w)
    if crop:
        base, largest = crop
        y = ((largest - h) // 2 + y) * (base / largest)
        x = ((largest - w) // 2 + x) * (base / largest)
    angles_x = position_angles(x, dim // 4, 10000.0)
    angles_y = position_angles(y, dim // 4, 10000.0)
    table = torch.cat([angles_x.sin(), angles_x.cos(), angles_y.sin(), angles_y.cos()], dim=-1)
    return table.float().to(device)


def rope_tables(h: int, w: int, head_dim: int, theta: float, device: torch.device | str = "cpu") -> Rope:
    """cos and sin, each (h * w, head_dim / 2): the first half of the channel pairs rotates with y, the second
    half with x."""
    y, x = grid_coordinates(h, w)
    angles = torch.cat([position_angles(y, head_dim // 4, theta), position_angles(x, head_dim // 4, theta)],
                       dim=-1)
    return angles.cos().float().to(device), angles.sin().float().to(device)


# ---- layers

class Modulation(NamedTuple):
    """How the condition acts on one branch of a block: its input is shifted and scaled, its output gated.
    Each (B, 1, D), the same for all tokens of a picture; (1, N, D) where pictures are packed."""
    shift: Tensor
    scale: Tensor
    gate: Tensor


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D), by shift and scale of a shape that broadcasts with it."""
    # 1 + scale, so that a network whose modulation starts at zero leaves x as it is
    return x * (1 + scale) + shift


def per_token(rows: Tensor, packing: Packing | None) -> Tensor:
    """A row for each picture, (B, D), as it acts on the tokens: (B, 1, D), or (1, N, D) for B pictures that
    are packed."""
    return rows[:, None] if packing is None else rows.index_select(0, packing.owner)[None]


class QKV(NamedTuple):
    """Queries, keys and values, each (B, heads, N, head_dim)."""
    q: Tensor
    k: Tensor
    v: Tensor


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension. It has no parameters of its own, as the modulation scales
    and shifts. Raises ValueError for another kind than "rms" or "layer"."""

    def __init__(self, kind: str, width: int):
        super().__init__()
        if kind not in ("rms", "layer"):
            raise ValueError(f"norm {kind!r}: must be 'rms' or 'layer'")
        self.function = F.rms_norm if kind == "rms" else F.layer_norm
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, (self.width,), eps=1e-6)


class SelfAttention(nn.Module):
    """Multi-head self-attention. proj=False leaves out the output projection, for a stream of mmdit.py that
    needs only q, k and v. bias: of the linear layers."""

    def __init__(self, width: int, heads: int, qk_norm: bool, proj: bool = True, bias: bool = True):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width, bias=bias) if proj else None
        self.q_norm = None
        self.k_norm = None
        if qk_norm:                                        # keeps logits bounded, so that bf16 trains stably
            self.q_norm = nn.Parameter(torch.ones(width // heads))
            self.k_norm = nn.Parameter(torch.ones(width // heads))

    def split(self, x: Tensor) -> QKV:
        """x (B, N, D) -> q, k and v before normalisation and rotation."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))                 # (B, N, 3, heads, head_dim)
        return QKV(*qkv.permute(2, 0, 3, 1, 4).unbind(0))

    def forward(self, x: Tensor, rope: Rope | None, mask: Tensor | None = None,
                packing: Packing | None = None) -> Tensor:
        """x (B, N, D) -> (B, N, D). mask (B, N), bool: True where a token may be attended to."""
        q, k, v = self.split(x)
        x = attention(q, k, v, q_norm=self.q_norm, k_norm=self.k_norm, rope=rope, mask=mask, packing=packing)
        return self.proj(x.transpose(1, 2).flatten(2))                       # (B, N, D)


class TokenConv(nn.Conv2d):
    """A depthwise 3x3 convolution over the grid of tokens (B, h * w, D), whose output is added to them.
    It starts at zero, so a network starts as if it had none."""

    def __init__(self, width: int):
        super().__init__(width, width, 3, padding=1, groups=width)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        image = x.transpose(1, 2).unflatten(2, grid)                         # (B, D, h, w)
        return x + super().forward(image).flatten(2).transpose(1, 2)         # (B, N, D)


def hidden_width(kind: str, width: int, ratio: float) -> int:
    """Of an MLP of this kind that has as many parameters as a plain one of width * ratio."""
    if kind != "swiglu":
        return int(ratio * width)
    # SwiGLU has three matrices where GELU has two, so 2/3 of the width gives as many parameters. Rounded up
    # to a multiple of 16, which suits the hardware.
    return math.ceil(int(ratio * width * 2 / 3) / 16) * 16


class MLP(nn.Module):
    """The feed-forward layers of a block. conv: put a TokenConv between them; forward then needs the grid
    (h, w) of the tokens. Raises ValueError for another kind than "swiglu" or "gelu"."""

    def __init__(self, kind: str, width: int, ratio: float, conv: bool = False):
        super().__init__()
        if kind not in ("swiglu", "gelu"):
            raise ValueError(f"mlp {kind!r}: must be 'swiglu' or 'gelu'")
        self.gated = kind == "swiglu"
        hidden = hidden_width(kind, width, ratio)
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


def feed_forward(c, block: int, depth: int, conv: bool) -> nn.Module:
    """The MLP of a block of a DiT or MM-DiT, or its experts. Raises ValueError for experts that cannot be."""
    if not c.experts:
        return MLP(c.mlp, c.width, c.mlp_ratio, conv)
    from moe import MoE, has_experts         # only here, so that a network without experts does without

    if conv:
        raise ValueError(f"experts {c.experts} with conv: the tokens of an expert lie on no grid; leave one "
                         "out")
    if not has_experts(c.moe_blocks, block, depth):
        return MLP(c.mlp, c.width, c.mlp_ratio)
    if c.expert_ratio is not None:
        hidden = hidden_width(c.mlp, c.width, c.expert_ratio)
    else:                                    # a multiple of 8, as kernels for products in groups need it
        used = c.top_k + c.shared_experts
        hidden = max(8, round(hidden_width(c.mlp, c.width, c.mlp_ratio) / used / 8) * 8)
    return MoE(c.width, hidden, c.experts, c.top_k, c.shared_experts, c.router, gated=c.mlp == "swiglu")


class Block(nn.Module):
    """Attention and MLP. The condition modulates the input of each and gates its output (adaLN-Zero).
    index: of the block, counted from 0."""

    def __init__(self, c: DiTConfig, index: int = 0):
        super().__init__()
        self.norm1 = Norm(c.norm, c.width)
        self.norm2 = Norm(c.norm, c.width)
        self.attn = SelfAttention(c.width, c.heads, c.qk_norm)
        self.mlp = feed_forward(c, index, c.depth, c.conv)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.width, 6 * c.width))

    def forward(self, x: Tensor, condition: Tensor, rope: Rope | None,
                grid: tuple[int, int] | None = None, packing: Packing | None = None) -> Tensor:
        """x (B, N, D) and the condition (B, D) -> (B, N, D). packing: of B pictures in x (1, N, D)."""
        chunks = per_token(self.adaLN_modulation(condition), packing).chunk(6, dim=-1)   # each (B, 1, D)
        attn = Modulation(*chunks[:3])
        mlp = Modulation(*chunks[3:])
        x = x + attn.gate * self.attn(modulate(self.norm1(x), attn.shift, attn.scale), rope,
                                      packing=packing)
        return x + mlp.gate * self.mlp(modulate(self.norm2(x), mlp.shift, mlp.scale), grid)


# ---- from inputs to tokens and back

class TimestepEmbedder(nn.Module):
    """t (B,) -> (B, D), from 256 sinusoids of scale * t + offset."""

    def __init__(self, width: int, scale: float, offset: float):
        super().__init__()
        self.scale = scale
        self.offset = offset
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor, blur: Tensor | None = None) -> Tensor:
        # sinusoids in float32, as bf16 cannot tell neighbouring values of 1000 t apart; rounded afterwards
        embedding = timestep_embedding(t, 256, self.scale, self.offset, blur)
        return self.mlp(embedding.to(self.mlp[0].weight.dtype))


class LengthEmbedder(TimestepEmbedder):
    """Lengths of sounds in seconds (B,) -> (B, D), as times are embedded, with 1 for the longest: how much of
    the sound there is before the silence (Evans et al. 2024, arXiv:2402.04825, section 3.2).

    Stable Audio Open has learned frequencies and one linear layer instead, and its vectors are tokens of the
    context (stable_audio.NumberEmbedder). Here the vector is added to that of the time, so it is made in the
    same way, and needs nothing from another file."""

    def __init__(self, width: int, longest: float):
        super().__init__(width, 1000.0 / longest, 0.0)


class LabelEmbedder(nn.Module):
    """y (B,) in 0..num_classes -> (B, D)."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)          # the last row: the null class

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class PatchEmbed(nn.Module):
    """A linear layer on every patch, written as a convolution whose stride is the patch."""

    def __init__(self, channels: int, width: int, patch: tuple[int, int]):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def grid(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of patches in a latent. Raises ValueError where the patch does not divide it."""
        height, width = x.shape[-2:]
        p, q = self.proj.stride
        if height % p or width % q:
            raise ValueError(f"latent {height}x{width}: not a multiple of the patch {p}x{q}")
        return height // p, width // q

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)                       # (B, N, D)

    def packed(self, pictures: Sequence[Tensor]) -> Tensor:
        """Latents (C, H, W) of any sizes -> (1, N, D), their tokens one after another."""
        patches = torch.cat([patchify(x, self.proj.stride) for x in pictures])           # (N, C * p * q)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)[None]


class FinalLayer(nn.Module):
    """Tokens to the values of their patches: (B, N, D) and the condition (B, D) -> (B, N, p * q * C)."""

    def __init__(self, norm: str, width: int, patch: tuple[int, int], out_channels: int):
        super().__init__()
        self.norm_final = Norm(norm, width)
        self.linear = nn.Linear(width, patch[0] * patch[1] * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor, packing: Packing | None = None) -> Tensor:
        shift, scale = per_token(self.adaLN_modulation(condition), packing).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def unpatchify(x: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """(B, h * w, p * q * C) tokens -> (B, C, h * p, w * q)."""
    x = x.unflatten(1, grid).unflatten(-1, (*patch, -1))                     # (B, h, w, p, q, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def patchify(x: Tensor, patch: tuple[int, int]) -> Tensor:
    """(C, h * p, w * q) -> (h * w, C * p * q): its patches, row by row, with values as in a convolution."""
    p, q = patch
    x = x.unflatten(2, (-1, q)).unflatten(1, (-1, p))                        # (C, h, p, w, q)
    return x.permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)


# ---- pictures of different sizes in one batch

class Mixed(NamedTuple):
    """The tokens of latents of different sizes, packed into one sequence, and what goes with each token."""
    x: Tensor                          # (1, N, D)
    grids: list[tuple[int, int]]       # rows and columns of each picture
    packing: Packing
    sincos: Tensor | None              # (N, D), or None where no positions are added
    rope: Rope | None                  # each (N, head_dim / 2)

    def unpack(self, x: Tensor, patch: tuple[int, int]) -> list[Tensor]:
        """(1, N, p * q * C) -> a picture (C, H, W) each."""
        parts = x.split(self.packing.lengths, dim=1)
        return [unpatchify(part, grid, patch)[0] for part, grid in zip(parts, self.grids)]


def mix(model: nn.Module, pictures: Sequence[Tensor], positions: Callable) -> Mixed:
    """Latents (C, H, W) as tokens of a DiT or MMDiT. positions(h, w, device): the added and the rotary
    positions of a grid, each of which may be None. Raises ValueError where the patch does not divide a
    latent, and for a network with convolutions, which need the grid of a single picture."""
    if model.config.conv:
        raise ValueError("conv: a convolution between tokens needs latents of one size; leave it out")
    embed = model.x_embedder
    grids = [embed.grid(picture) for picture in pictures]
    device = pictures[0].device
    tables = [positions(h, w, device) for h, w in grids]
    sincos, rope = None, None
    if tables[0][0] is not None:
        sincos = torch.cat([table for table, _ in tables])
    if tables[0][1] is not None:
        rope = (torch.cat([table[0] for _, table in tables]), torch.cat([table[1] for _, table in tables]))
    return Mixed(embed.packed(pictures), grids, pack([h * w for h, w in grids], device), sincos, rope)


def initialize_transformer(model: nn.Module) -> None:
    """The initial weights that DiT and MMDiT have in common."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    # The patch embedding is a convolution but acts as a linear layer, so it is initialised as one.
    nn.init.xavier_uniform_(model.x_embedder.proj.weight.flatten(1))
    nn.init.zeros_(model.x_embedder.proj.bias)
    # adaLN-Zero: every gate starts closed, so every block starts as the identity and deep networks train
    # stably from the first step. The output starts at zero, too: the mean of every target.
    for name, module in model.named_modules():
        if name.endswith("adaLN_modulation.1"):
            nn.init.zeros_(module.weight)
    nn.init.zeros_(model.final_layer.linear.weight)


# ---- the network

class DiT(nn.Module):
    """The diffusion transformer. Raises ValueError unless width / heads is a multiple of 4: in every head,
    half of the channel pairs rotate with y and half with x."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        c = self.config = config
        if c.width % c.heads or c.width // c.heads % 4:
            raise ValueError(f"width {c.width} with {c.heads} heads: width / heads must be a multiple of 4")
        self.out_channels = c.out_channels or c.channels
        if c.learn_sigma:
            self.out_channels *= 2                         # the prediction's channels, then the variance's
        self.x_embedder = PatchEmbed(c.channels, c.width, c.patch)
        self.t_embedder = TimestepEmbedder(c.width, c.time_scale, c.time_offset)
        self.gap_embedder = TimestepEmbedder(c.width, GAP_SCALE, 0.0) if c.second_time else None
        self.y_embedder = LabelEmbedder(c.num_classes, c.width) if c.num_classes else None
        self.length_embedder = LengthEmbedder(c.width, c.longest) if c.longest else None
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.depth))
        self.final_layer = FinalLayer(c.norm, c.width, c.patch, self.out_channels)
        self._positions: dict[tuple, tuple[Tensor, Rope | None]] = {}
        self.initialize()

    def initialize(self) -> None:
        initialize_transformer(self)
        # The embedders of time and label start smaller than Xavier would make them, as published.
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        # The second time starts without effect: a network of one time is then a starting point.
        if self.gap_embedder is not None:
            nn.init.zeros_(self.gap_embedder.mlp[2].weight)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)

    def positions(self, h: int, w: int, device: torch.device) -> tuple[Tensor, Rope | None]:
        """The added and the rotary positions of a grid of h x w tokens, computed once for each grid."""
        c = self.config
        key = (h, w, device)
        if key not in self._positions:
            sincos = sincos_positions(h, w, c.width, device)
            rope = rope_tables(h, w, c.width // c.heads, c.rope_theta, device) if c.rope else None
            self._positions[key] = sincos, rope
        return self._positions[key]

    def time_condition(self, t: Tensor, s: Tensor | None) -> Tensor:
        """t (B,), and s (B,) or None -> (B, D)."""
        if self.gap_embedder is None:
            return self.t_embedder(t)
        gap = torch.zeros_like(t) if s is None else t - s
        # The derivative by t is part of the loss, and the fastest sinusoid of t turns by 1000 radians: left
        # as it is, that derivative is mostly noise. What holds for a whole interval does not depend on t that
        # finely, so t is blurred by a tenth of the interval, and not at all at s = t.
        return self.t_embedder(t, BLUR * gap) + self.gap_embedder(gap)

    def forward(self, xt: Tensor, t: Tensor, y: Tensor | None = None, s: Tensor | None = None,
                seconds: Tensor | None = None) -> Tensor:
        """xt (B, C, H, W), t (B,) in [0, 1], y (B,) in 0..num_classes, s (B,) in [0, t] or None, which is t,
        seconds (B,) the length of a sound -> raw (B, out_channels, H, W). xt may also be a list of B latents
        (C, H, W) of different sizes: raw is then a list as well. Raises ValueError where the patch does not
        divide a latent."""
        mixed, packing, grid = None, None, None
        if isinstance(xt, Tensor):
            grid = self.x_embedder.grid(xt)
            sincos, rope = self.positions(*grid, xt.device)
            x = self.x_embedder(xt)                                          # (B, N, D), N = h * w
        else:
            mixed = mix(self, xt, self.positions)
            x, packing = mixed.x, mixed.packing                              # (1, N, D), of all pictures
            sincos, rope = mixed.sincos, mixed.rope
        x = x + sincos.to(self.x_embedder.proj.weight.dtype)    # float32 under autocast, and so all residuals
        condition = self.time_condition(t, s)                                # (B, D)
        if self.y_embedder is not None:
            condition = condition + self.y_embedder(y)
        if self.length_embedder is not None:
            condition = condition + self.length_embedder(seconds)
        for block in self.blocks:
            x = block(x, condition, rope, grid, packing)                     # (B, N, D)
        x = self.final_layer(x, condition, packing)                          # (B, N, p * q * C)
        if mixed is not None:
            return mixed.unpack(x, self.config.patch)
        return unpatchify(x, grid, self.config.patch)                        # (B, C, H, W)


def demo() -> None:
    """Print the parameters of every preset, with 1000 classes in latents of 4 channels."""
    def count(**config) -> float:
        with torch.device("meta"):         # shapes without memory
            model = DiT(DiTConfig(num_classes=1000, **config))
        return sum(p.numel() for p in model.parameters()) / 1e6

    print("preset   parameters, published block   parameters, modern block   (1000 classes, 4 channels)")
    for name, preset in PRESETS.items():
        published = count(**preset, **PUBLISHED_BLOCK, learn_sigma=True)
        modern = count(**preset)
        print(f"{name:6s} {published:20.1f} M {modern:27.1f} M")


if __name__ == "__main__":
    demo()
