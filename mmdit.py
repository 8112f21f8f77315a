"""MMDiT: text and image tokens attend to each other, as in Stable Diffusion 3 and FLUX.

    python mmdit.py                      # prints the presets and their parameter counts
    python train.py --arch mmdit --objective rf --data shapes --cond text

Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis"
(arXiv:2403.03206), section 4 and figure 2; with `single_depth`, FLUX's single-stream blocks after those.
Contract: model(xt, t, context, mask, pooled) -> raw, with xt (B, C, H, W), t (B,) in [0, 1], 0 = data, and
the output of a text encoder: context (B, L, context_width), mask (B, L), True at valid positions, and pooled
(B, pooled_width). Shapes: L text tokens, then N = h * w image tokens, D the width. Pictures of different
sizes with texts of different lengths: see `Joint`. A third kind of tokens, of a sound: see `Sound`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from attention import Packing, Rope, attention, pack, rms_norm
from dit import (MLP, QKV, FinalLayer, LengthEmbedder, Modulation, Norm, PatchEmbed, SelfAttention,
                 TimestepEmbedder, TokenConv, feed_forward, grid_coordinates, initialize_transformer, mix,
                 modulate, per_token, position_angles, sincos_positions, unpatchify)


@dataclass
class MMDiTConfig:
    channels: int = 4
    out_channels: int | None = None          # None: the same as `channels`
    patch: tuple[int, int] = (2, 2)          # height, width
    width: int = 256
    depth: int = 6                           # joint blocks: separate weights for text and for image
    single_depth: int = 0                    # single-stream blocks after those: shared weights (FLUX)
    heads: int = 4
    mlp_ratio: float = 4.0
    context_width: int = 256                 # width of the text encoder's output
    pooled_width: int | None = 256           # width of its pooled output, which modulates; None: not used
    norm: str = "rms"
    mlp: str = "swiglu"
    qk_norm: bool = True
    conv: bool = False                       # a depthwise 3x3 convolution in the MLPs of the image tokens
    dual_attention: int = 0                  # SD 3.5: so many first blocks also attend within the image
    rope: tuple[int, int, int] | None = (16, 24, 24)   # channels of a head per axis of rope_3d: 0, y, x
    rope_theta: float = 100.0
    sincos: tuple[int, int] | None = None    # SD 3: added positions; the `crop` of sincos_positions
    position_table: bool = False             # keep them as a buffer: the files of SD 3 hold their own
    guidance: bool = False                   # FLUX.1-dev: distilled, so the guidance scale is an input
    longest: float = 0.0                     # of sounds, in seconds: as in DiTConfig
    sound_channels: int | None = None        # a third stream, of a sound's latent; None: there is none
    sound_patch: tuple[int, int] = (1, 2)    # its patches: one row high, so many latent frames long
    time_scale: float = 1000.0
    time_offset: float = 0.0
    experts: int = 0                         # in the image stream of joint blocks; these six as in DiTConfig
    top_k: int = 2
    shared_experts: int = 1
    expert_ratio: float | None = None
    moe_blocks: str = "deep"
    router: str = "token"


PUBLISHED_BLOCK = dict(norm="layer", mlp="gelu")
PRESETS = {
    "tiny": dict(width=64, depth=2, heads=2, rope=(8, 12, 12)),
    "small": dict(),
    "size-2-text": dict(width=128, depth=4, heads=2),                      # for benchmarks/compare.py
    "sd3-medium": dict(PUBLISHED_BLOCK, channels=16, width=1536, depth=24, heads=24, context_width=4096,
                       pooled_width=2048, qk_norm=False, rope=None, sincos=(64, 192)),
    "sd3.5-medium": dict(PUBLISHED_BLOCK, channels=16, width=1536, depth=24, heads=24, context_width=4096,
                         pooled_width=2048, dual_attention=13, rope=None, sincos=(64, 384)),
    "flux-dev": dict(PUBLISHED_BLOCK, channels=16, width=3072, depth=19, single_depth=38, heads=24,
                     context_width=4096, pooled_width=768, rope=(16, 56, 56), rope_theta=10000.0,
                     guidance=True),
}


def rope_3d(length: int, h: int, w: int, axes: tuple[int, int, int], theta: float,
            device: torch.device | str = "cpu", frames: int = 0) -> Rope:
    """cos and sin, each (length + h * w + frames, sum(axes) / 2), for `length` text tokens at (0, 0, 0), h x
    w patches at (0, y, x) and the tokens of a sound at (1, 0, 0), (2, 0, 0), ... axes: the channels that
    rotate with each coordinate (FLUX)."""
    y, x = grid_coordinates(h, w)
    patches = torch.stack([torch.zeros_like(y), y, x], dim=1)                            # (N, 3)
    # All text tokens are at the origin: the text encoder's output already encodes their order.
    positions = torch.cat([torch.zeros(length, 3, dtype=torch.float64), patches])        # (L + N, 3)
    if frames:
        # Attention depends on differences of positions. Time has the axis on which text and picture stay at
        # 0, and begins at 1, so no frame lies where a word or a patch does, nor as far from a patch as
        # another patch.
        time = torch.zeros(frames, 3, dtype=torch.float64)
        time[:, 0] = torch.arange(1, frames + 1)
        positions = torch.cat([positions, time])                                         # (L + N + M, 3)
    angles = torch.cat([position_angles(coordinate, channels // 2, theta)
                        for coordinate, channels in zip(positions.T, axes)], dim=1)
    return angles.cos().float().to(device), angles.sin().float().to(device)


class VectorEmbedder(nn.Module):
    """The pooled text vector (B, pooled_width) -> (B, D)."""

    def __init__(self, c_in: int, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(c_in, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


@dataclass(eq=False)
class Joint:
    """B pictures and their texts, packed: (1, N, D) tokens of all pictures, (1, L, D) of all texts, and the
    joint sequence (1, L + N, D), in which each text stands before its picture."""
    image: Packing
    text: Packing
    both: Packing
    order: Tensor        # (L + N,): the joint sequence from all texts, then all pictures
    text_rows: Tensor    # (L,) and (N,): where their tokens are in the joint sequence
    image_rows: Tensor


def join(image: Packing, text: Packing) -> Joint:
    device = image.owner.device
    both = pack([a + b for a, b in zip(text.lengths, image.lengths)], device)
    # A stable sort by picture keeps the order within each text and each picture, and texts come first.
    order = torch.cat([text.owner, image.owner]).argsort(stable=True)
    rows = torch.empty_like(order)
    rows[order] = torch.arange(len(order), device=device)
    return Joint(image, text, both, order, rows[:len(text.owner)], rows[len(text.owner):])


class Sound(NamedTuple):
    """The third stream: a sound that is drawn together with the picture, or is given with it. Each has a time
    of its own, so that either may be clean while the other is noise (Bao et al. 2023, arXiv:2303.06555). Each
    is conditioned on its own time, and the text on both."""
    x: Tensor                # (B, M, D): its tokens
    condition: Tensor        # (B, D)
    text_condition: Tensor   # (B, D): that of the text


class StreamModulation(NamedTuple):
    """How the condition acts on one stream, each (B, 1, D), or (1, n, D) where it is packed. The context
    stream of the last block has only the first two: its tokens enter the attention but are not updated any
    more."""
    shift: Tensor                    # for the input of the joint attention
    scale: Tensor
    gate: Tensor | None = None       # for its output
    mlp: Modulation | None = None
    attn2: Modulation | None = None  # for the second attention, within the image (SD 3.5)


class Stream(nn.Module):
    """The weights of a joint block that belong to one kind of token: text, image or sound.

    last: the text of the last joint block. No layer reads its tokens afterwards, so they give queries, keys
    and values but are not updated, and the weights that would update them do not exist. dual: a second
    attention, in which the image attends to itself alone (SD 3.5). index: the block's, for the image, whose
    MLP may have a convolution or experts."""

    def __init__(self, c: MMDiTConfig, last: bool = False, dual: bool = False, index: int | None = None):
        super().__init__()
        self.last = last
        self.norm1 = Norm(c.norm, c.width)
        self.attn = SelfAttention(c.width, c.heads, c.qk_norm, proj=not last)
        self.attn2 = SelfAttention(c.width, c.heads, c.qk_norm) if dual else None
        if not last:
            self.norm2 = Norm(c.norm, c.width)
            if index is None:
                self.mlp = MLP(c.mlp, c.width, c.mlp_ratio)
            else:
                self.mlp = feed_forward(c, index, c.depth, c.conv)
        self.chunks = 6                      # shift, scale and gate of the attention and of the MLP
        if last:
            self.chunks = 2                  # shift and scale of the attention's input
        elif dual:
            self.chunks = 9
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.width, self.chunks * c.width))

    def modulation(self, condition: Tensor, packing: Packing | None = None) -> StreamModulation:
        """condition (B, D)."""
        chunks = per_token(self.adaLN_modulation(condition), packing).chunk(self.chunks, dim=-1)
        if self.last:
            return StreamModulation(*chunks)
        attn2 = None
        if self.attn2 is not None:
            attn2 = Modulation(*chunks[6:])
        return StreamModulation(*chunks[:3], mlp=Modulation(*chunks[3:6]), attn2=attn2)

    def qkv(self, x: Tensor, m: StreamModulation) -> QKV:
        """x (B, n, D) -> its part of the joint attention's input. It is normalised here, as text and image
        have QK-norms of their own, and rotated after they are joined."""
        q, k, v = self.attn.split(modulate(self.norm1(x), m.shift, m.scale))
        if self.attn.q_norm is not None:
            q = rms_norm(q, self.attn.q_norm)
            k = rms_norm(k, self.attn.k_norm)
        return QKV(q, k, v)

    def update(self, x: Tensor, m: StreamModulation, attended: Tensor,
               grid: tuple[int, int] | None = None, packing: Packing | None = None) -> Tensor:
        """x (B, n, D) and its rows of the joint attention's output, (B, n, D) -> the tokens of the next
        block."""
        out = x + m.gate * self.attn.proj(attended)
        if self.attn2 is not None:           # beside the joint attention: both read x
            image = modulate(self.norm1(x), m.attn2.shift, m.attn2.scale)
            out = out + m.attn2.gate * self.attn2(image, None, packing=packing)
        return out + m.mlp.gate * self.mlp(modulate(self.norm2(out), m.mlp.shift, m.mlp.scale), grid)


class JointBlock(nn.Module):
    """Text and image, and a sound where there is one, each with its own weights, in one attention (Esser et
    al. 2024, figure 2b). index: of the block, counted from 0."""

    def __init__(self, c: MMDiTConfig, last: bool, dual: bool, index: int = 0):
        super().__init__()
        self.last = last
        self.context_block = Stream(c, last=last)
        self.x_block = Stream(c, dual=dual, index=index)
        self.sound_block = Stream(c) if c.sound_channels else None

    def forward(self, x: Tensor, context: Tensor, condition: Tensor, rope: Rope | None, mask: Tensor | None,
                grid: tuple[int, int] | None, joint: Joint | None = None,
                sound: Sound | None = None) -> tuple[Tensor, ...]:
        """x (B, N, D), context (B, L, D), the condition (B, D) and mask (B, L + N), bool, True where a token
        may be attended to -> x and context; with a sound, mask is (B, L + N + M), and a third output is that
        of its stream. joint: of B pictures in x (1, N, D) and context (1, L, D)."""
        packed = joint is not None
        text_condition = condition if sound is None else sound.text_condition
        text_modulation = self.context_block.modulation(text_condition, joint.text if packed else None)
        streams = [self.context_block.qkv(context, text_modulation)]
        image_modulation = self.x_block.modulation(condition, joint.image if packed else None)
        streams.append(self.x_block.qkv(x, image_modulation))
        if sound is not None:
            sound_modulation = self.sound_block.modulation(sound.condition)
            streams.append(self.sound_block.qkv(sound.x, sound_modulation))

        q, k, v = (torch.cat(part, dim=2) for part in zip(*streams))         # (B, heads, L + N + M, head_dim)
        if packed:                           # each text before its picture
            q, k, v = (part.index_select(2, joint.order) for part in (q, k, v))
        attended = attention(q, k, v, rope=rope, mask=mask, packing=joint.both if packed else None)
        attended = attended.transpose(1, 2).flatten(2)                       # (B, L + N, D)
        if packed:
            text_attended = attended.index_select(1, joint.text_rows)
            image_attended = attended.index_select(1, joint.image_rows)
        else:
            lengths = [stream.q.shape[2] for stream in streams]
            text_attended, image_attended, *rest = attended.split(lengths, dim=1)

        x = self.x_block.update(x, image_modulation, image_attended, grid, joint.image if packed else None)
        if not self.last:
            context = self.context_block.update(context, text_modulation, text_attended)
        if sound is None:
            return x, context
        return x, context, self.sound_block.update(sound.x, sound_modulation, *rest)


class SingleBlock(nn.Module):
    """Text and image as one sequence with shared weights. Attention and MLP run side by side on the same
    input, so one linear layer serves both on the way in and one on the way out (FLUX; Dehghani et al. 2023,
    arXiv:2302.05442, section 2.1)."""

    def __init__(self, c: MMDiTConfig):
        super().__init__()
        hidden = int(c.mlp_ratio * c.width)
        self.width = c.width
        self.heads = c.heads
        self.norm = Norm(c.norm, c.width)
        self.linear1 = nn.Linear(c.width, 3 * c.width + hidden)              # q, k, v, hidden
        self.linear2 = nn.Linear(c.width + hidden, c.width)                  # attended, hidden
        self.q_norm = None
        self.k_norm = None
        if c.qk_norm:
            self.q_norm = nn.Parameter(torch.ones(c.width // c.heads))
            self.k_norm = nn.Parameter(torch.ones(c.width // c.heads))
        self.conv = TokenConv(hidden) if c.conv else None
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.width, 3 * c.width))

    def forward(self, x: Tensor, condition: Tensor, rope: Rope | None, mask: Tensor | None,
                grid: tuple[int, int] | None, packing: Packing | None = None) -> Tensor:
        """x (B, L + N, D), the condition (B, D) and mask (B, L + N) -> (B, L + N, D). packing: of B joint
        sequences in x."""
        m = Modulation(*per_token(self.adaLN_modulation(condition), packing).chunk(3, dim=-1))
        projected = self.linear1(modulate(self.norm(x), m.shift, m.scale))
        qkv, hidden = projected.tensor_split([3 * self.width], dim=-1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = attention(q, k, v, q_norm=self.q_norm, k_norm=self.k_norm, rope=rope, mask=mask,
                             packing=packing)
        attended = attended.transpose(1, 2).flatten(2)                       # (B, L + N, D)
        hidden = F.gelu(hidden, approximate="tanh")
        if self.conv is not None:            # only image tokens, which come last, lie on a grid
            text, image = hidden.tensor_split([-grid[0] * grid[1]], dim=1)
            hidden = torch.cat([text, self.conv(image, grid)], dim=1)
        return x + m.gate * self.linear2(torch.cat([attended, hidden], dim=-1))


class MMDiT(nn.Module):
    """Stable Diffusion 3's transformer and, with single_depth, FLUX's. Raises ValueError where heads or rope
    do not fit the width."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        c = self.config = config
        fits = c.width % c.heads == 0
        if fits and c.rope:
            fits = sum(c.rope) == c.width // c.heads and all(channels % 2 == 0 for channels in c.rope)
        if not fits:
            raise ValueError(f"width {c.width} with {c.heads} heads and rope {c.rope}: rope must be three "
                             "even numbers that add up to width / heads")
        if c.sound_channels and (c.single_depth or not c.rope):
            raise ValueError(f"sound_channels {c.sound_channels} with single_depth {c.single_depth} and rope "
                             f"{c.rope}: a sound has a stream in joint blocks only, and rotary positions")
        self.out_channels = c.out_channels or c.channels
        self.x_embedder = PatchEmbed(c.channels, c.width, c.patch)
        if c.position_table:                 # along one axis, (largest, D / 2)
            device = self.x_embedder.proj.weight.device
            line = sincos_positions(1, c.sincos[1], c.width, device, crop=c.sincos)
            self.register_buffer("position_table", line[:, :c.width // 2].contiguous())
        self.t_embedder = TimestepEmbedder(c.width, c.time_scale, c.time_offset)
        self.context_embedder = nn.Linear(c.context_width, c.width)
        self.y_embedder = VectorEmbedder(c.pooled_width, c.width) if c.pooled_width else None
        self.guidance_embedder = None
        if c.guidance:                       # embedded exactly as the time is, as in FLUX
            self.guidance_embedder = TimestepEmbedder(c.width, c.time_scale, c.time_offset)
        self.length_embedder = LengthEmbedder(c.width, c.longest) if c.longest else None
        # Single blocks, if any, use the text tokens of the last joint block, which must then update them.
        last = c.depth - 1 if c.single_depth == 0 else None
        self.joint_blocks = nn.ModuleList(
            JointBlock(c, last=i == last, dual=i < c.dual_attention, index=i) for i in range(c.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(c) for _ in range(c.single_depth))
        self.final_layer = FinalLayer(c.norm, c.width, c.patch, self.out_channels)
        if c.sound_channels:
            self.sound_embedder = PatchEmbed(c.sound_channels, c.width, c.sound_patch)
            self.sound_t_embedder = TimestepEmbedder(c.width, c.time_scale, c.time_offset)
            self.sound_final_layer = FinalLayer(c.norm, c.width, c.sound_patch, c.sound_channels)
        self._positions: dict[tuple, tuple[Tensor | None, Rope | None]] = {}
        initialize_transformer(self)
        if c.sound_channels:                 # as the picture's: see there
            nn.init.xavier_uniform_(self.sound_embedder.proj.weight.flatten(1))
            nn.init.zeros_(self.sound_embedder.proj.bias)
            nn.init.zeros_(self.sound_final_layer.linear.weight)

    def without(self, layers: tuple[int, ...]) -> MMDiT:
        """This network, weights shared, without these of its joint blocks, counted from 0: what skip-layer
        guidance compares it with. Raises ValueError for a block that it does not have."""
        for layer in layers:
            if not 0 <= layer < len(self.joint_blocks):
                raise ValueError(f"layer {layer}: this network has joint blocks 0 to "
                                 f"{len(self.joint_blocks) - 1}")
        other = copy.copy(self)
        other._modules = dict(self._modules)             # a copy would share the dictionary of its parts
        other.joint_blocks = nn.ModuleList(block for i, block in enumerate(self.joint_blocks)
                                           if i not in layers)
        return other

    def positions(self, length: int, h: int, w: int, device: torch.device,
                  frames: int = 0) -> tuple[Tensor | None, Rope | None]:
        """The added and the rotary positions of `length` text tokens, h x w patches and the frames of a
        sound, computed once for each length and grid."""
        c = self.config
        key = (length, h, w, device, frames)
        if key not in self._positions:
            sincos = None
            if c.position_table:
                sincos = self.centre_of_table(h, w).to(device)
            elif c.sincos:
                sincos = sincos_positions(h, w, c.width, device, c.sincos)
            rope = rope_3d(length, h, w, c.rope, c.rope_theta, device, frames) if c.rope else None
            self._positions[key] = sincos, rope
        return self._positions[key]

    def centre_of_table(self, h: int, w: int) -> Tensor:
        """(h * w, D): the positions of the patches in the middle of the table. Raises ValueError for more
        patches than it has."""
        largest = len(self.position_table)
        if max(h, w) > largest:
            raise ValueError(f"{h}x{w} patches: the network's table of positions has {largest}x{largest}; "
                             "draw a smaller picture")
        top, left = (largest - h) // 2, (largest - w) // 2
        rows = self.position_table[top:top + h, None].expand(h, w, -1)
        columns = self.position_table[left:left + w].expand(h, w, -1)
        return torch.cat([columns, rows], dim=-1).flatten(0, 1)

    def forward(self, xt: Tensor, t: Tensor, context: Tensor, mask: Tensor | None = None,
                pooled: Tensor | None = None, guidance: Tensor | None = None,
                seconds: Tensor | None = None, sound: Tensor | None = None,
                sound_t: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """xt (B, C, H, W), t (B,) in [0, 1], context (B, L, context_width), mask (B, L), True at valid
        positions (None: all are), pooled (B, pooled_width), guidance (B,), seconds (B,), the length of a
        sound -> raw (B, out_channels, H, W).
        xt may also be a list of B latents (C, H, W) of different sizes; raw is then a list as well, and
        context may be a list of (L, context_width) without padding.
        With a third stream, xt and t are those of the pictures, sound (B, sound_channels, 1, T) and sound_t
        (B,) those of the sounds; the result is a pair, raw of either.
        Raises ValueError where the patch does not divide a latent, and for a sound without a stream or a
        stream without a sound."""
        def condition_of(time: Tensor) -> Tensor:
            condition = time                                                 # (B, D)
            if self.guidance_embedder is not None:
                condition = condition + self.guidance_embedder(guidance)
            if self.y_embedder is not None:
                condition = condition + self.y_embedder(pooled)
            if self.length_embedder is not None:
                condition = condition + self.length_embedder(seconds)
            return condition

        time = self.t_embedder(t)
        condition = condition_of(time)
        if sound is not None or self.config.sound_channels:
            self.check_pair(xt, sound)
            sound_time = self.sound_t_embedder(sound_t)
            stream = Sound(sound, condition_of(sound_time), condition_of(time + sound_time))
            return self.forward_pair(xt, stream, condition, context, mask)
        if not isinstance(xt, Tensor):
            return self.forward_mixed(xt, condition, context, mask)
        length = context.shape[1]
        h, w = self.x_embedder.grid(xt)
        sincos, rope = self.positions(length, h, w, xt.device)

        x = self.x_embedder(xt)                                              # (B, N, D), N = h * w
        if sincos is not None:
            x = x + sincos.to(self.x_embedder.proj.weight.dtype)
        text = self.context_embedder(context)                                # (B, L, D)
        if mask is not None:                                                 # every image token is valid
            mask = torch.cat([mask, mask.new_ones(len(x), h * w)], dim=1)    # (B, L + N)

        for block in self.joint_blocks:
            x, text = block(x, text, condition, rope, mask, (h, w))
        if self.single_blocks:
            x = torch.cat([text, x], dim=1)                                  # (B, L + N, D)
            for block in self.single_blocks:
                x = block(x, condition, rope, mask, (h, w))
            x = x[:, length:]                                                # (B, N, D)
        x = self.final_layer(x, condition)                                   # (B, N, p * q * C)
        return unpatchify(x, (h, w), self.config.patch)                      # (B, C, H, W)

    def check_pair(self, xt: Tensor | list[Tensor], sound: Tensor | None) -> None:
        if not self.config.sound_channels:
            raise ValueError("a sound for a network without a stream for sounds; leave it out")
        if sound is None:
            raise ValueError("a network of pairs, which takes a sound with every picture; draw with pairs.py")
        if not isinstance(xt, Tensor):
            raise ValueError("pictures of different sizes with sounds; give latents of one size")

    def forward_pair(self, xt: Tensor, sound: Sound, condition: Tensor, context: Tensor,
                     mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """`forward` for pictures with sounds. sound: its latents (B, sound_channels, 1, T) in the place of
        tokens; condition: the picture's, (B, D)."""
        h, w = self.x_embedder.grid(xt)
        rows, columns = self.sound_embedder.grid(sound.x)
        frames = rows * columns
        sincos, rope = self.positions(context.shape[1], h, w, xt.device, frames)

        x = self.x_embedder(xt)                                              # (B, N, D)
        if sincos is not None:
            x = x + sincos.to(self.x_embedder.proj.weight.dtype)
        text = self.context_embedder(context)                                # (B, L, D)
        sound = sound._replace(x=self.sound_embedder(sound.x))               # (B, M, D)
        if mask is not None:                                                 # (B, L + N + M)
            mask = torch.cat([mask, mask.new_ones(len(x), h * w + frames)], dim=1)

        for block in self.joint_blocks:
            x, text, tokens = block(x, text, condition, rope, mask, (h, w), sound=sound)
            sound = sound._replace(x=tokens)
        x = self.final_layer(x, condition)                                   # (B, N, p * q * C)
        tokens = self.sound_final_layer(sound.x, sound.condition)
        return (unpatchify(x, (h, w), self.config.patch),
                unpatchify(tokens, (rows, columns), self.config.sound_patch))

    def forward_mixed(self, xt: list[Tensor], condition: Tensor, context: Tensor | list[Tensor],
                      mask: Tensor | None) -> list[Tensor]:
        """`forward` for latents of different sizes, with nothing padded. condition: (B, D)."""
        mixed = mix(self, xt, lambda h, w, device: self.positions(0, h, w, device))
        if isinstance(context, Tensor):
            valid = [slice(None)] * len(context) if mask is None else mask
            context = [rows[chosen] for rows, chosen in zip(context, valid)]
        joint = join(mixed.packing, pack([len(rows) for rows in context], condition.device))
        rope = None
        if mixed.rope is not None:           # text tokens are at the origin, where nothing is rotated
            cos, sin = mixed.rope
            still = cos.new_ones(len(joint.text.owner), cos.shape[1])
            rope = (torch.cat([still, cos])[joint.order], torch.cat([still * 0, sin])[joint.order])

        x = mixed.x                                                          # (1, N, D)
        if mixed.sincos is not None:
            x = x + mixed.sincos.to(self.x_embedder.proj.weight.dtype)
        text = self.context_embedder(torch.cat(context))[None]               # (1, L, D)
        for block in self.joint_blocks:
            x, text = block(x, text, condition, rope, None, None, joint)
        if self.single_blocks:
            x = torch.cat([text, x], dim=1).index_select(1, joint.order)     # (1, L + N, D)
            for block in self.single_blocks:
                x = block(x, condition, rope, None, None, joint.both)
            x = x.index_select(1, joint.image_rows)                          # (1, N, D)
        return mixed.unpack(self.final_layer(x, condition, mixed.packing), self.config.patch)


def demo() -> None:
    """Print the parameters of every preset."""
    print("preset       joint blocks   single blocks   parameters")
    for name, preset in PRESETS.items():
        with torch.device("meta"):           # shapes without memory
            model = MMDiT(MMDiTConfig(**preset))
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{name:12s} {len(model.joint_blocks):12d} {len(model.single_blocks):15d} {millions:10.1f} M")


if __name__ == "__main__":
    demo()
