"""Attention with what usually surrounds it in a transformer, QK-norm and rotary positions, as one function.

    python attention.py                  # compares with the formula in float64; on a GPU, also measures times

Three implementations of one formula: `attention_formula`, the specification; `attention`, which the networks
call; and `fused_attention`, forward and backward written by hand in Triton. Vaswani et al. 2017
(arXiv:1706.03762), eq. 1; QK-norm: Dehghani et al. 2023 (arXiv:2302.05442); rotary positions: Su et al. 2021
(arXiv:2104.09864); the fused kernels: Dao 2023 (arXiv:2307.08691). Shapes: B batch, N query rows, M key rows;
tensors are (B, heads, rows, head_dim).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

try:
    import triton
    import triton.language as tl
except ImportError:            # Triton comes with PyTorch's builds for GPUs only
    triton = tl = None

Rope = tuple[Tensor, Tensor]   # cos and sin, each (N, head_dim / 2)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Whether to take the kernels below: True wherever they can run, False nowhere, None where they were measured
# to be faster (`faster_compiled`). In the environment: ATTENTION=triton, ATTENTION=torch, or nothing.
KERNEL = {"triton": True, "torch": False}.get(os.environ.get("ATTENTION")) if triton else False
COMPILED = False               # whether compiled code may take them unasked: networks.compile_blocks decides
# Whether the kernels can run here or were asked for. Otherwise they do not become operators, which would
# import PyTorch's compiler: seconds in which every program on a CPU would wait.
RUNNABLE = KERNEL or (triton is not None and (INTERPRETED or torch.cuda.is_available()))


def check_choice() -> None:
    """Raises ValueError if ATTENTION in the environment is something else, or cannot be had."""
    choice = os.environ.get("ATTENTION", "")
    if choice not in ("", "triton", "torch"):
        raise ValueError(f"ATTENTION is {choice}; give triton or torch, or leave it out")
    if choice == "triton" and triton is None:
        raise ValueError("ATTENTION is triton, which is not installed; leave it out")


# ---- the formula

def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / rms(x) * weight over the last dimension, computed in float32 (in float64 if x is float64)."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate each pair (x[2i], x[2i+1]) of the last dimension by its angle; x (..., N, head_dim)."""
    cos, sin = rope
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)                                 # each (..., N, head_dim / 2)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


def attention_formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, the specification of everything below.

    q (B, heads, N, head_dim), k and v (B, heads, M, head_dim) -> (B, heads, N, head_dim). mask: bool,
    broadcastable to (B, heads, N, M), True where a query may attend to a key."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)                   # (B, heads, N, M)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


# ---- what the networks call

@dataclass(eq=False)
class Packing:
    """S sequences of different lengths, one after another in a single batch entry, so that nothing is padded
    ("Patch n' Pack": Dehghani et al. 2023, arXiv:2307.06304). Sequence i has the rows from offsets[i] up to
    offsets[i + 1]. Not a tuple, whose every number torch.compile would compile for."""
    lengths: list[int]                # of the sequences, on the host, so that nothing waits for a device
    offsets: Tensor                   # (S + 1,) int32
    owner: Tensor                     # (N,) int64: the sequence of each row

    @property
    def longest(self) -> int:
        return max(self.lengths)


def pack(lengths: Sequence[int], device: torch.device | str = "cpu") -> Packing:
    """The packing of sequences of these lengths, at least one and none of them 0."""
    counts = torch.tensor(lengths)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    return Packing(list(lengths), offsets.to(device, non_blocking=True), owner.to(device, non_blocking=True))


def attention(q: Tensor, k: Tensor, v: Tensor, *, q_norm: Tensor | None = None, k_norm: Tensor | None = None,
              rope: Rope | None = None, mask: Tensor | None = None,
              packing: Packing | None = None) -> Tensor:
    """Multi-head attention; q (B, heads, N, head_dim), k and v (B, heads, M, head_dim)
    -> (B, heads, N, head_dim).

    q_norm, k_norm: RMS-norm weights (head_dim,), applied before the rotation; give both or neither.
    rope: cos and sin, each (N, head_dim / 2), for the rows of q and k alike.
    mask: (B, M), bool, True where a key may be attended to; every batch entry needs at least one such key.
    packing: of sequences in a single batch entry (B = 1, N = M), each of which attends only to itself.
    Raises ValueError if these arguments contradict one another."""
    if packing is not None and (mask is not None or q.shape[0] != 1
                                or not q.shape[2] == k.shape[2] == len(packing.owner)):
        raise ValueError("packed sequences lie in one batch entry, fill q and k alike, and exclude a mask")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm must be given together")

    # Fused kernels, SDPA's and those below, have no derivative in forward mode, as rectified_flow.MeanFlow
    # takes it; the formula has. Outside of such a derivative the question costs a look at a counter. Compiled
    # code is not traced under one.
    tangents = not torch.compiler.is_compiling() and forward_ad.unpack_dual(q).tangent is not None

    # the kernels have no float64, and tiles of larger heads would not fit into a GPU's registers
    fits = q.dtype != torch.float64 and q.shape[-1] <= 128
    wanted = KERNEL
    if KERNEL is None:
        wanted = faster_compiled(q, k, q_norm, rope) and mask is None and packing is None
    if wanted and (q.is_cuda or INTERPRETED) and fits and not tangents:
        where = {}
        if packing is not None:
            where = dict(offsets=packing.offsets, max_length=packing.longest)
        return fused_attention(q, k, v, q_norm=q_norm, k_norm=k_norm, rope=rope, mask=mask, **where)

    if q_norm is not None:
        q = rms_norm(q, q_norm)
        k = rms_norm(k, k_norm)
    if rope is not None:
        q = rotate(q, rope)
        k = rotate(k, rope)
    if packing is not None:
        return attention_apart(q, k, v, packing, tangents)
    if mask is not None:
        mask = mask[:, None, None, :]                                          # (B, 1, 1, M)
    return softmax_attention(q, k, v, mask, tangents)


def faster_compiled(q: Tensor, k: Tensor, q_norm: Tensor | None, rope: Rope | None) -> bool:
    """Where the kernels were measured to be faster than compiled norm and rotation followed by SDPA
    (benchmarks/NOTES.md): in compiled trainings in bf16, with both inside, for heads of 64 channels and 256
    to 512 rows. Their first use compiles for half a minute, which a compiled training can afford."""
    return (COMPILED and torch.compiler.is_compiling() and q_norm is not None and rope is not None
            and q.dtype == torch.bfloat16 and q.shape[-1] == 64 and 256 <= k.shape[2] <= SHORT)


def measured_on(device: torch.device) -> bool:
    """Whether `faster_compiled` holds for the device: an NVIDIA GPU of compute capability 9. It was measured
    on an H200; an H100 has the same multiprocessors."""
    return (RUNNABLE and device.type == "cuda" and torch.version.hip is None
            and torch.cuda.get_device_capability(device)[0] == 9)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tangents: bool) -> Tensor:
    """attention_formula by whichever of PyTorch's ways is fastest. tangents: whether a derivative is taken in
    forward mode."""
    if tangents or (q.device.type == "cpu" and q.shape[-2] * k.shape[-2] <= 128 * 128):
        # few rows: the backward pass of the CPU's SDPA takes 7 times as long at N = 16 in bf16
        return attention_formula(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attention_apart(q: Tensor, k: Tensor, v: Tensor, packing: Packing, tangents: bool) -> Tensor:
    """Packed sequences without a kernel for them, each by itself: a mask of N x N would cost the square of
    their sum. Neighbours of one length are computed as a batch, so sequences are best packed in order of
    their length."""
    parts, start = [], 0
    for length, run in itertools.groupby(packing.lengths):
        count = len(list(run))
        rows = slice(start, start + count * length)
        batch = [x[0, :, rows].unflatten(1, (count, length)).transpose(0, 1) for x in (q, k, v)]
        out = softmax_attention(*batch, None, tangents)                        # (count, heads, length, dim)
        parts.append(out.transpose(1, 2).flatten(0, 1))                        # (count * length, heads, dim)
        start = rows.stop
    return torch.cat(parts).transpose(0, 1)[None]


# ---- the kernels
#
# Forward. A program, one of the many instances of a kernel that run in parallel, owns a block of queries of
# one head and goes through the keys block by block. For each query it keeps the maximum of the scores, the
# sum of their exponentials and the output so far (the online softmax): the N x M scores never reach memory.
# Exponentials are in base 2, for which the GPU has an instruction: e^x = 2^(x log2(e)), and the factor
# log2(e) costs nothing as part of the scale of the scores.
#
# Backward. The backward pass needs only the log-sum-exp of each row, lse = log2(sum_j 2^score_j), because
# p = 2^(score - lse) recomputes the softmax. It computes the scores twice: once for each block of queries,
# for dq, and once for each block of keys, for dk and dv. Each program then finishes with the backward pass of
# rotation and norm. For the gradients of the norm's weights it writes one sum for every ROWS_PER_SUM rows,
# which PyTorch adds up: without atomic additions the gradients are the same in every run.
#
# QK-norm and rotation. q is normed and rotated as it is loaded. So is k if there are few keys; if there are
# many, every program would repeat that for the same keys, so `norm_and_rope_kernel` does it once beforehand.
# The backward kernels always take q and k normed and rotated.
#
# Names. Capitals are pointers to tensors and compile-time constants.
#   stride_qb, _qh, _qn     how many elements apart q's batch entries, heads and rows lie in memory; its
#                           channels lie next to one another
#   valid_rows, valid_keys  which rows of a block exist, as the last block of a sequence is seldom full
#   N, M, DIM               rows of q and of k in memory, and head_dim
#   PADDED                  DIM rounded up to a power of two, as the width of a tile has to be
#   Q_NORM, K_NORM          weights of the norms of q and k
#   DO, DQ, dp, ...         gradient of the loss with respect to o, q, p, ...
#   max_length              bound on the rows of one sequence in q (in k, if the kernel's blocks are keys)
#   MASKED, PACKED          whether MASK and OFFSETS, the arguments of `attention`, are given

SHORT = 512         # up to this number of keys, the forward kernel norms and rotates them itself
ROWS_PER_SUM = 32   # rows over which one program sums the gradients of the norm's weights
LOG2_E = 1.4426950408889634


def jit(function: Callable) -> Callable:
    """triton.jit if Triton is installed, so that the file can be imported without it."""
    return triton.jit(function) if triton else function


class Blocks(NamedTuple):
    queries: int     # BLOCK_M
    keys: int        # BLOCK_N
    warps: int       # groups of 32 threads per program
    stages: int      # depth of the pipeline that loads blocks ahead of their use


# At most 96 KiB of shared memory, in float32 with 128 channels; NVIDIA GPUs since 2020 have 99 or more.
SMALLEST = Blocks(32, 32, warps=4, stages=2)


def autotune(*candidates: Blocks) -> Callable:
    """Let Triton choose the fastest candidate, per LENGTH_CLASS, head_dim and use of norm and rotation, among
    those for which a GPU has enough shared memory; SMALLEST is added for where no other one fits."""
    if not triton:
        return lambda kernel: kernel
    candidates = (*candidates, SMALLEST)
    if INTERPRETED:                                   # times in the interpreter mean nothing
        candidates = candidates[:1]
    configs = [triton.Config({"BLOCK_M": blocks.queries, "BLOCK_N": blocks.keys}, num_warps=blocks.warps,
                             num_stages=blocks.stages) for blocks in candidates]
    return triton.autotune(configs, key=["LENGTH_CLASS", "DIM", "NORM", "ROPE"])


@jit
def locate_program(max_length, heads, BLOCK: tl.constexpr):
    """The block of rows, the sequence and the head on which this program works.

    All programs lie on the grid's first axis, because the other two are limited to 65,535. Neighbouring
    programs work on the same head and so find its keys in the cache."""
    program = tl.program_id(0)
    blocks = tl.cdiv(max_length, BLOCK)
    return program % blocks, program // blocks // heads, program // blocks % heads


@jit
def head_pointer(X, batch, head, stride_b, stride_h, DIM: tl.constexpr):
    """Pointer to the first row of one head. If DIM is a multiple of 8, so is the offset, as all tensors come
    from `aligned` or `empty_row_major`; with this hint the compiler emits wide loads."""
    offset = batch * stride_b + head * stride_h
    if DIM % 8 == 0:
        offset = tl.multiple_of(offset, 8)
    return X + offset


@jit
def load_tile(X, rows, channels, valid_rows, stride_n, DIM: tl.constexpr):
    """Rows of one head, (rows, PADDED), with zeros outside the valid rows and beyond DIM channels."""
    pointers = X + rows[:, None] * stride_n + channels[None, :]
    valid = valid_rows[:, None] & (channels < DIM)[None, :]
    return tl.load(pointers, valid, 0.0)


@jit
def store_tile(X, tile, rows, channels, valid_rows, stride_n, DIM: tl.constexpr):
    """Write the valid part of a tile (rows, PADDED) to one head, in X's type."""
    valid = valid_rows[:, None] & (channels < DIM)[None, :]
    tl.store(X + rows[:, None] * stride_n + channels[None, :], tile.to(X.dtype.element_ty), valid)


@jit
def apply_rope(x, COS, SIN, rows, valid_rows, sign, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Rotate the pairs of x (rows, PADDED) by sign times their angles. The backward pass of a rotation is the
    opposite rotation, sign = -1."""
    pairs = tl.arange(0, PADDED // 2)
    offsets = rows[:, None] * (DIM // 2) + pairs[None, :]
    valid = valid_rows[:, None] & (pairs < DIM // 2)[None, :]
    cos = tl.load(COS + offsets, valid, 0.0)
    sin = sign * tl.load(SIN + offsets, valid, 0.0)
    a, b = tl.split(tl.reshape(x, (x.shape[0], PADDED // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (x.shape[0], PADDED))


@jit
def norm_and_rope(x, WEIGHT, COS, SIN, rows, channels, valid_rows, DIM: tl.constexpr, PADDED: tl.constexpr,
                  NORM: tl.constexpr, ROPE: tl.constexpr):
    """RMS norm and rotation of a tile x (rows, PADDED): computed in float32, returned in x's type."""
    y = x.to(tl.float32)
    if NORM:
        # channels beyond DIM are zero and add nothing to the sum of squares
        y = y * tl.rsqrt(tl.sum(y * y, 1) / DIM + 1e-6)[:, None]
        y = y * tl.load(WEIGHT + channels, channels < DIM, 0.0)[None, :]
    if ROPE:
        y = apply_rope(y, COS, SIN, rows, valid_rows, 1.0, DIM, PADDED)
    return y.to(x.dtype)


@jit
def norm_and_rope_backward(dy, X, WEIGHT, COS, SIN, DWEIGHT, rows, channels, valid_rows, stride_n,
                           DIM: tl.constexpr, PADDED: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
                           ROWS_PER_SUM: tl.constexpr):
    """Gradient of the input X of `norm_and_rope`, given dy (rows, PADDED), the gradient of its output.
    Writes this tile's sums for the gradient of the weight to DWEIGHT."""
    if ROPE:
        dy = apply_rope(dy, COS, SIN, rows, valid_rows, -1.0, DIM, PADDED)
    if NORM:
        # y = weight * x_hat with x_hat = r * x and r = 1 / rms(x)
        x = load_tile(X, rows, channels, valid_rows, stride_n, DIM).to(tl.float32)
        r = tl.rsqrt(tl.sum(x * x, 1) / DIM + 1e-6)[:, None]
        x_hat = x * r
        # dweight = sum over rows of dy * x_hat
        sums = tl.sum(tl.reshape(dy * x_hat, (dy.shape[0] // ROWS_PER_SUM, ROWS_PER_SUM, PADDED)), 1)
        number = tl.arange(0, dy.shape[0] // ROWS_PER_SUM)
        tl.store(DWEIGHT + number[:, None] * DIM + channels[None, :], sums, (channels < DIM)[None, :])
        # dx_hat = dy * weight; dx = r * (dx_hat - x_hat * mean(dx_hat * x_hat))
        dx_hat = dy * tl.load(WEIGHT + channels, channels < DIM, 0.0)[None, :]
        dy = r * (dx_hat - x_hat * (tl.sum(dx_hat * x_hat, 1) / DIM)[:, None])
    return dy


@jit
def norm_and_rope_kernel(X, Y, WEIGHT, COS, SIN, stride_xb, stride_xh, stride_xn, stride_yb, stride_yh,
                         stride_yn, heads, N, DIM: tl.constexpr, PADDED: tl.constexpr, NORM: tl.constexpr,
                         ROPE: tl.constexpr, BLOCK: tl.constexpr):
    """Y = X normed and rotated."""
    block, sequence, head = locate_program(N, heads, BLOCK)
    batch = tl.cast(sequence, tl.int64)               # offsets into large tensors exceed 32 bits
    rows = block * BLOCK + tl.arange(0, BLOCK)
    channels = tl.arange(0, PADDED)
    valid_rows = rows < N
    X_head = head_pointer(X, batch, head, stride_xb, stride_xh, DIM)

    x = load_tile(X_head, rows, channels, valid_rows, stride_xn, DIM)
    y = norm_and_rope(x, WEIGHT, COS, SIN, rows, channels, valid_rows, DIM, PADDED, NORM, ROPE)
    Y_head = head_pointer(Y, batch, head, stride_yb, stride_yh, DIM)
    store_tile(Y_head, y, rows, channels, valid_rows, stride_yn, DIM)


@autotune(Blocks(64, 64, warps=4, stages=3), Blocks(128, 64, warps=4, stages=3),
          Blocks(128, 64, warps=8, stages=3), Blocks(128, 128, warps=8, stages=2),
          Blocks(128, 128, warps=8, stages=3))
@jit
def forward_kernel(Q, K, V, O, LSE, Q_NORM, K_NORM, COS, SIN, MASK, OFFSETS,
                   stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
                   stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
                   heads, N, M, max_length, LENGTH_CLASS: tl.constexpr, DIM: tl.constexpr,
                   PADDED: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, MASKED: tl.constexpr,
                   PACKED: tl.constexpr, PRECISION: tl.constexpr, SCALE: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """O = attention and LSE = log-sum-exp of the scores, for one block of queries of one head.
    SCALE = log2(e) / sqrt(head_dim)."""
    block, sequence, head = locate_program(max_length, heads, BLOCK_M)
    # The first row of this program's sequence and the one after its last, in q and in k. Each kernel computes
    # them in place: a helper that returned them misled torch.compile's analysis of what a kernel writes to.
    batch = tl.cast(sequence, tl.int64)               # offsets into large tensors exceed 32 bits
    first, end = 0, N
    key_first, key_end = 0, M
    if PACKED:
        batch = tl.cast(0, tl.int64)
        first = tl.load(OFFSETS + sequence).to(tl.int32)
        end = tl.load(OFFSETS + sequence + 1).to(tl.int32)
        key_first, key_end = first, end
    rows = first + block * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, PADDED)
    valid_rows = rows < end
    K_head = head_pointer(K, batch, head, stride_kb, stride_kh, DIM)
    V_head = head_pointer(V, batch, head, stride_vb, stride_vh, DIM)
    Q_head = head_pointer(Q, batch, head, stride_qb, stride_qh, DIM)
    q = load_tile(Q_head, rows, channels, valid_rows, stride_qn, DIM)          # (BLOCK_M, PADDED)
    q = norm_and_rope(q, Q_NORM, COS, SIN, rows, channels, valid_rows, DIM, PADDED, NORM, ROPE)

    # The online softmax. After every block of keys, for each query and over all keys so far:
    #   row_max = max_j score_j
    #   row_sum = sum_j 2^(score_j - row_max)
    #   out     = sum_j 2^(score_j - row_max) v_j
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, PADDED), tl.float32)
    if PACKED:
        # the grid has blocks for the longest sequence; those beyond a shorter one's end read no keys
        key_end = tl.where(first + block * BLOCK_M < end, key_end, key_first)
    for start in range(key_first, key_end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        valid_keys = keys < key_end
        k = load_tile(K_head, keys, channels, valid_keys, stride_kn, DIM)      # (BLOCK_N, PADDED)
        if LENGTH_CLASS == 0:                         # few keys: not yet normed and rotated
            k = norm_and_rope(k, K_NORM, COS, SIN, keys, channels, valid_keys, DIM, PADDED, NORM, ROPE)
        v = load_tile(V_head, keys, channels, valid_keys, stride_vn, DIM)
        if MASKED:
            valid_keys = valid_keys & (tl.load(MASK + batch * M + keys, valid_keys, 0) != 0)

        # 1. Scores; invalid keys get -inf, whose exponential is 0.
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * SCALE     # (BLOCK_M, BLOCK_N)
        scores = tl.where(valid_keys[None, :], scores, float("-inf"))
        # 2. The maximum so far. Where a query has had no valid key yet it is -inf, and -inf - -inf would be
        #    NaN: subtract 0 there.
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        subtracted = tl.where(new_max == float("-inf"), 0.0, new_max)
        # 3. Exponentials, at most 1. The sums so far were taken relative to the old maximum; multiplied by
        #    2^(old - new), they are relative to the new one.
        p = tl.exp2(scores - subtracted[:, None])
        rescale = tl.exp2(row_max - subtracted)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        out = out * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        row_max = new_max

    # 4. Dividing by the sum makes the exponentials a softmax. A query without any valid key outputs 0.
    row_sum = tl.where(row_sum == 0, 1.0, row_sum)
    row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    O_head = head_pointer(O, batch, head, stride_ob, stride_oh, DIM)
    store_tile(O_head, out / row_sum[:, None], rows, channels, valid_rows, stride_on, DIM)
    # log2(sum_j 2^score_j) = row_max + log2(sum_j 2^(score_j - row_max))
    tl.store(LSE + (batch * heads + head) * N + rows, row_max + tl.log2(row_sum), valid_rows)


@autotune(Blocks(64, 64, warps=4, stages=3), Blocks(128, 64, warps=8, stages=3),
          Blocks(64, 32, warps=4, stages=3), Blocks(128, 32, warps=4, stages=3))
@jit
def backward_q_kernel(Q, K, V, O, DO, LSE, DELTA, Q_IN, DQ, Q_NORM, COS, SIN, DQ_NORM, MASK, OFFSETS,
                      stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
                      stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
                      stride_dob, stride_doh, stride_don, stride_inb, stride_inh, stride_inn,
                      stride_dqb, stride_dqh, stride_dqn, heads, N, M, max_length, sums,
                      LENGTH_CLASS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
                      NORM: tl.constexpr, ROPE: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
                      PRECISION: tl.constexpr, SCALE: tl.constexpr, ROWS_PER_SUM: tl.constexpr,
                      BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """DQ, the gradient of q, for one block of queries of one head, and DELTA for `backward_kv_kernel`.

    Q, K: normed and rotated; Q_IN: q before that. DQ_NORM: (sequences * heads, sums, DIM)."""
    block, sequence, head = locate_program(max_length, heads, BLOCK_M)
    # bounds of the sequence in q and in k, computed in place: see `forward_kernel`
    batch = tl.cast(sequence, tl.int64)
    first, end = 0, N
    key_first, key_end = 0, M
    if PACKED:
        batch = tl.cast(0, tl.int64)
        first = tl.load(OFFSETS + sequence).to(tl.int32)
        end = tl.load(OFFSETS + sequence + 1).to(tl.int32)
        key_first, key_end = first, end
    rows = first + block * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, PADDED)
    valid_rows = rows < end
    K_head = head_pointer(K, batch, head, stride_kb, stride_kh, DIM)
    V_head = head_pointer(V, batch, head, stride_vb, stride_vh, DIM)
    Q_head = head_pointer(Q, batch, head, stride_qb, stride_qh, DIM)
    q = load_tile(Q_head, rows, channels, valid_rows, stride_qn, DIM)          # (BLOCK_M, PADDED)
    DO_head = head_pointer(DO, batch, head, stride_dob, stride_doh, DIM)
    do = load_tile(DO_head, rows, channels, valid_rows, stride_don, DIM)
    O_head = head_pointer(O, batch, head, stride_ob, stride_oh, DIM)
    o = load_tile(O_head, rows, channels, valid_rows, stride_on, DIM)
    row_offsets = (batch * heads + head) * N + rows
    # The backward pass of a softmax, ds_ij = p_ij (dp_ij - delta_i), needs delta_i = sum_j p_ij dp_ij. As
    # dp_ij = do_i . v_j and o_i = sum_j p_ij v_j, delta_i equals do_i . o_i, which takes no scores.
    delta = tl.sum(o.to(tl.float32) * do, 1)
    lse = tl.load(LSE + row_offsets, valid_rows, 0.0)
    tl.store(DELTA + row_offsets, delta, valid_rows)

    dq = tl.zeros((BLOCK_M, PADDED), tl.float32)
    if PACKED:
        # blocks beyond the end of a shorter sequence read no keys
        key_end = tl.where(first + block * BLOCK_M < end, key_end, key_first)
    for start in range(key_first, key_end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        valid_keys = keys < key_end
        k = load_tile(K_head, keys, channels, valid_keys, stride_kn, DIM)      # (BLOCK_N, PADDED)
        v = load_tile(V_head, keys, channels, valid_keys, stride_vn, DIM)
        if MASKED:
            valid_keys = valid_keys & (tl.load(MASK + batch * M + keys, valid_keys, 0) != 0)
        # S = scale * Q K^T, P = 2^(S - lse): the softmax again
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * SCALE     # (BLOCK_M, BLOCK_N)
        p = tl.where(valid_keys[None, :], tl.exp2(scores - lse[:, None]), 0.0)
        # dP = dO V^T, dS = P * (dP - delta), dQ = dS K / sqrt(head_dim): dS belongs to the scores in base e,
        # Q K^T / sqrt(head_dim), and the factor 1 / sqrt(head_dim) follows after the loop
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    dq *= SCALE * 0.6931471805599453                  # ln(2): SCALE is log2(e) / sqrt(head_dim)

    DQ_NORM += ((sequence * heads + head) * sums + block * (BLOCK_M // ROWS_PER_SUM)).to(tl.int64) * DIM
    Q_IN_head = head_pointer(Q_IN, batch, head, stride_inb, stride_inh, DIM)
    dq = norm_and_rope_backward(dq, Q_IN_head, Q_NORM, COS, SIN, DQ_NORM, rows, channels, valid_rows,
                                stride_inn, DIM, PADDED, NORM, ROPE, ROWS_PER_SUM)
    DQ_head = head_pointer(DQ, batch, head, stride_dqb, stride_dqh, DIM)
    store_tile(DQ_head, dq, rows, channels, valid_rows, stride_dqn, DIM)


@autotune(Blocks(64, 64, warps=4, stages=3), Blocks(64, 128, warps=8, stages=3),
          Blocks(32, 64, warps=4, stages=3), Blocks(32, 128, warps=4, stages=3))
@jit
def backward_kv_kernel(Q, K, V, DO, LSE, DELTA, K_IN, DK, DV, K_NORM, COS, SIN, DK_NORM, MASK, OFFSETS,
                       stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
                       stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_don,
                       stride_inb, stride_inh, stride_inn, stride_dkb, stride_dkh, stride_dkn,
                       stride_dvb, stride_dvh, stride_dvn, heads, N, M, max_length, sums,
                       LENGTH_CLASS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
                       NORM: tl.constexpr, ROPE: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
                       PRECISION: tl.constexpr, SCALE: tl.constexpr, ROWS_PER_SUM: tl.constexpr,
                       BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """DK and DV, the gradients of k and v, for one block of keys of one head.

    Q, K: normed and rotated; K_IN: k before that. DK_NORM: (sequences * heads, sums, DIM). The program goes
    through the queries block by block. Its scores are transposed, (keys, queries), as dk and dv are products
    with the transposed matrices."""
    block, sequence, head = locate_program(max_length, heads, BLOCK_N)
    # bounds of the sequence in q and in k, computed in place: see `forward_kernel`
    batch = tl.cast(sequence, tl.int64)
    first, end = 0, N
    key_first, key_end = 0, M
    if PACKED:
        batch = tl.cast(0, tl.int64)
        first = tl.load(OFFSETS + sequence).to(tl.int32)
        end = tl.load(OFFSETS + sequence + 1).to(tl.int32)
        key_first, key_end = first, end
    keys = key_first + block * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = tl.arange(0, PADDED)
    valid_keys = keys < key_end
    Q_head = head_pointer(Q, batch, head, stride_qb, stride_qh, DIM)
    DO_head = head_pointer(DO, batch, head, stride_dob, stride_doh, DIM)
    K_head = head_pointer(K, batch, head, stride_kb, stride_kh, DIM)
    k = load_tile(K_head, keys, channels, valid_keys, stride_kn, DIM)          # (BLOCK_N, PADDED)
    V_head = head_pointer(V, batch, head, stride_vb, stride_vh, DIM)
    v = load_tile(V_head, keys, channels, valid_keys, stride_vn, DIM)
    # Two masks, as the gradients of masked keys, which are zero, must be written too.
    attended_keys = valid_keys
    if MASKED:
        attended_keys = attended_keys & (tl.load(MASK + batch * M + keys, valid_keys, 0) != 0)

    dk = tl.zeros((BLOCK_N, PADDED), tl.float32)
    dv = tl.zeros((BLOCK_N, PADDED), tl.float32)
    if PACKED:
        # blocks beyond the end of a shorter sequence read no queries
        end = tl.where(key_first + block * BLOCK_N < key_end, end, first)
    for start in range(first, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        valid_rows = rows < end
        q = load_tile(Q_head, rows, channels, valid_rows, stride_qn, DIM)      # (BLOCK_M, PADDED)
        do = load_tile(DO_head, rows, channels, valid_rows, stride_don, DIM)
        # at invalid rows lse = inf makes p zero
        row_offsets = (batch * heads + head) * N + rows
        lse = tl.load(LSE + row_offsets, valid_rows, float("inf"))
        delta = tl.load(DELTA + row_offsets, valid_rows, 0.0)
        # S^T = scale * K Q^T, P^T = 2^(S^T - lse), dV = P^T dO
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * SCALE     # (BLOCK_N, BLOCK_M)
        p = tl.where(attended_keys[:, None], tl.exp2(scores - lse[None, :]), 0.0)
        dv += tl.dot(p.to(do.dtype), do, input_precision=PRECISION)
        # dP^T = V dO^T, dS^T = P^T * (dP^T - delta), dK = dS^T Q / sqrt(head_dim)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)
    dk *= SCALE * 0.6931471805599453                  # ln(2): SCALE is log2(e) / sqrt(head_dim)

    DK_NORM += ((sequence * heads + head) * sums + block * (BLOCK_N // ROWS_PER_SUM)).to(tl.int64) * DIM
    K_IN_head = head_pointer(K_IN, batch, head, stride_inb, stride_inh, DIM)
    dk = norm_and_rope_backward(dk, K_IN_head, K_NORM, COS, SIN, DK_NORM, keys, channels, valid_keys,
                                stride_inn, DIM, PADDED, NORM, ROPE, ROWS_PER_SUM)
    DK_head = head_pointer(DK, batch, head, stride_dkb, stride_dkh, DIM)
    store_tile(DK_head, dk, keys, channels, valid_keys, stride_dkn, DIM)
    DV_head = head_pointer(DV, batch, head, stride_dvb, stride_dvh, DIM)
    store_tile(DV_head, dv, keys, channels, valid_keys, stride_dvn, DIM)


# ---- launching the kernels

def leading_strides(*tensors: Tensor) -> list[int]:
    """Strides of batch, head and row of every tensor, one tensor after another."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def empty_row_major(x: Tensor) -> Tensor:
    """An uninitialised tensor shaped like x, (B, heads, N, head_dim), which lies in memory as
    (B, N, heads, head_dim), so that a network can flatten the heads of each row without a copy."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def ceil_div(rows: int, size: int) -> int:
    """Number of blocks of the given size that cover the rows."""
    return (rows + size - 1) // size


def aligned(x: Tensor) -> Tensor:
    """x with channels next to one another and, if head_dim is a multiple of 8, with rows and heads that begin
    at multiples of 8 elements, as `head_pointer` promises. It is copied only if its layout is another."""
    on_multiples = x.shape[-1] % 8 or not any(stride % 8 for stride in x.stride()[:3])
    return x if on_multiples and x.stride(-1) == 1 else x.contiguous()


# Makes a kernel visible to torch.compile. Its cache searches the source of the operators below for the text
# wrap_triton(NAME OF A KERNEL) to find the kernels that they launch, so do not wrap kernels in advance.
wrap_triton = torch.library.wrap_triton if RUNNABLE and not INTERPRETED else lambda kernel: kernel


class LaunchSettings(NamedTuple):
    sequences: int      # batch entries, or packed sequences
    max_queries: int    # upper bound on the rows of q in one sequence: the grid has blocks for that many
    max_keys: int       # likewise for k
    options: dict       # compile-time constants shared by the kernels, by name


def launch_settings(q: Tensor, k: Tensor, norm: Tensor | None, cos: Tensor | None, mask: Tensor | None,
                    offsets: Tensor | None, max_length: int) -> LaunchSettings:
    """What all kernels that compute one attention have in common; arguments as in `attention_operator`."""
    sequences = q.shape[0]
    max_queries = q.shape[2]
    max_keys = k.shape[2]
    if offsets is not None:
        sequences = len(offsets) - 1
        max_queries = max_length
        max_keys = max_length

    # The kernels are tuned for each class; in class 0 the forward kernel norms and rotates the keys itself.
    length_class = 2
    if max_keys <= SHORT:
        length_class = 0
    elif max_keys <= 4 * SHORT:
        length_class = 1

    # Tensor cores round float32 factors to tf32; tf32x3 recovers their accuracy from three such products.
    exact = torch.get_float32_matmul_precision() == "highest"
    dim = q.shape[-1]
    options = {"LENGTH_CLASS": length_class, "DIM": dim, "PADDED": max(16, triton.next_power_of_2(dim)),
               "NORM": norm is not None, "ROPE": cos is not None, "MASKED": mask is not None,
               "PACKED": offsets is not None, "PRECISION": "tf32x3" if exact else "tf32",
               # an argument at run time would be float32 for Triton, but float64 for torch.compile
               "SCALE": dim ** -0.5 * LOG2_E}
    return LaunchSettings(sequences, max_queries, max_keys, options)


def normed_and_rotated(x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
                       options: dict) -> Tensor:
    """x (B, heads, N, head_dim) after norm and rotation; x itself if neither is asked for."""
    if weight is None and cos is None:
        return x
    y = empty_row_major(x)
    batch, heads, rows = x.shape[:3]
    wrap_triton(norm_and_rope_kernel)[(ceil_div(rows, 64) * batch * heads,)](
        x, y, weight, cos, sin, *leading_strides(x, y), heads, rows, BLOCK=64,
        **{name: options[name] for name in ("DIM", "PADDED", "NORM", "ROPE")})
    return y


# ---- the kernels as operators, for autograd and torch.compile
#
# PyTorch derives the operators' schemas from their type hints, so they return plain tuples.

def define_operator(name: str) -> Callable:
    """torch.library.triton_op where the kernels can run; elsewhere the function stays as it is."""
    if not RUNNABLE:
        return lambda function: function
    return torch.library.triton_op(name, mutates_args=())


@define_operator("latents::attention")
def attention_operator(q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor | None, k_norm: Tensor | None,
                       cos: Tensor | None, sin: Tensor | None, mask: Tensor | None,
                       offsets: Tensor | None, max_length: int) -> tuple[Tensor, Tensor]:
    """Output (B, heads, N, head_dim) and log-sum-exp (B, heads, N), the latter in float32."""
    settings = launch_settings(q, k, q_norm, cos, mask, offsets, max_length)
    heads, queries, dim = q.shape[1:]
    keys = k.shape[2]
    if settings.options["LENGTH_CLASS"] != 0:
        k = normed_and_rotated(k, k_norm, cos, sin, settings.options)
    o = empty_row_major(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)

    # a function, as the autotuner chooses the size of a block, BLOCK_M
    grid = lambda meta: (ceil_div(settings.max_queries, meta["BLOCK_M"]) * settings.sequences * heads,)
    wrap_triton(forward_kernel)[grid](
        q, k, v, o, lse, q_norm, k_norm, cos, sin, mask, offsets, *leading_strides(q, k, v, o), heads,
        queries, keys, settings.max_queries, **settings.options)
    return o, lse


@define_operator("latents::attention_backward")
def attention_backward_operator(
        do: Tensor, q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor | None, k_norm: Tensor | None,
        cos: Tensor | None, sin: Tensor | None, mask: Tensor | None, offsets: Tensor | None,
        max_length: int, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, q_norm and k_norm (zeros for the last two without a norm), given do, the
    gradient of the output o."""
    settings = launch_settings(q, k, q_norm, cos, mask, offsets, max_length)
    heads, queries, dim = q.shape[1:]
    keys = k.shape[2]
    ready_q = normed_and_rotated(q, q_norm, cos, sin, settings.options)
    ready_k = normed_and_rotated(k, k_norm, cos, sin, settings.options)
    dq = empty_row_major(q)
    dk = empty_row_major(k)
    dv = empty_row_major(v)
    delta = torch.empty_like(lse)

    # Sums per sequence and head. Blocks have at most 128 rows, whichever configuration the autotuner chooses;
    # sums that lie beyond the last block are not written, so all of them start at zero.
    q_sums = k_sums = 0
    if settings.options["NORM"]:
        q_sums = ceil_div(settings.max_queries, 128) * (128 // ROWS_PER_SUM)
        k_sums = ceil_div(settings.max_keys, 128) * (128 // ROWS_PER_SUM)
    dq_norm = q.new_zeros((settings.sequences * heads, q_sums, dim), dtype=torch.float32)
    dk_norm = q.new_zeros((settings.sequences * heads, k_sums, dim), dtype=torch.float32)

    grid = lambda meta: (ceil_div(settings.max_queries, meta["BLOCK_M"]) * settings.sequences * heads,)
    wrap_triton(backward_q_kernel)[grid](
        ready_q, ready_k, v, o, do, lse, delta, q, dq, q_norm, cos, sin, dq_norm, mask, offsets,
        *leading_strides(ready_q, ready_k, v, o, do, q, dq), heads, queries, keys, settings.max_queries,
        q_sums, ROWS_PER_SUM=ROWS_PER_SUM, **settings.options)
    # launched second, as it reads the delta that backward_q_kernel writes
    kv_grid = lambda meta: (ceil_div(settings.max_keys, meta["BLOCK_N"]) * settings.sequences * heads,)
    wrap_triton(backward_kv_kernel)[kv_grid](
        ready_q, ready_k, v, do, lse, delta, k, dk, dv, k_norm, cos, sin, dk_norm, mask, offsets,
        *leading_strides(ready_q, ready_k, v, do, k, dk, dv), heads, queries, keys, settings.max_keys,
        k_sums, ROWS_PER_SUM=ROWS_PER_SUM, **settings.options)
    return dq, dk, dv, dq_norm.sum((0, 1)), dk_norm.sum((0, 1))


def save_for_backward(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, max_length = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.max_length = max_length


def attention_gradients(ctx, do: Tensor, _dlse: Tensor | None) -> tuple:
    """One gradient for each input of `attention_operator`, given do, that of its output. The log-sum-exp has
    no gradient, as `fused_attention` does not return it."""
    *inputs, o, lse = ctx.saved_tensors
    dq, dk, dv, dq_norm, dk_norm = attention_backward_operator(aligned(do), *inputs, ctx.max_length, o, lse)
    q_norm, k_norm = inputs[3:5]
    if q_norm is None:
        dq_norm = dk_norm = None
    else:
        dq_norm = dq_norm.to(q_norm.dtype)
        dk_norm = dk_norm.to(k_norm.dtype)
    return dq, dk, dv, dq_norm, dk_norm, None, None, None, None, None


if RUNNABLE:
    attention_operator.register_autograd(attention_gradients, setup_context=save_for_backward)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, *, q_norm: Tensor | None = None,
                    k_norm: Tensor | None = None, rope: Rope | None = None, mask: Tensor | None = None,
                    offsets: Tensor | None = None, max_length: int | None = None) -> Tensor:
    """`attention` by the kernels above: same arguments, for float32, bfloat16 and float16 and head_dim up to
    128. Gradients reach q, k, v and the norm's weights; the rotary tables are constants."""
    cos = sin = None
    if rope:
        cos = rope[0].float().contiguous()
        sin = rope[1].float().contiguous()
    if mask is not None:
        mask = mask.expand(len(q), -1).contiguous()
    out, _ = attention_operator(aligned(q), aligned(k), aligned(v), q_norm, k_norm, cos, sin, mask, offsets,
                                max_length or q.shape[2])
    return out


# ---- demonstration

def measure_times(implementations: dict[str, Callable]) -> None:
    """Print the milliseconds that a forward pass takes on a GPU: the mean of 20 calls after 10 of warm-up."""
    for n in (256, 1024, 4096):
        q, k, v = torch.randn(3, 4, 16, n, 64, device="cuda", dtype=torch.bfloat16)
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        for name, function in implementations.items():
            for i in range(30):
                if i == 10:
                    start.record()
                function(q, k, v)
            end.record()
            torch.cuda.synchronize()
            print(f"N {n:4d}  {name:9s} {start.elapsed_time(end) / 20:.3f} ms")


def demo() -> None:
    """Compare every implementation with the formula in float64; on a GPU, also measure their times."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    implementations = {"attention": attention}
    if RUNNABLE and (device == "cuda" or INTERPRETED):
        implementations["kernel"] = fused_attention

    for n, m, dim in ((16, 16, 64), (7, 77, 32), (1, 1, 128), (300, 200, 64)):
        q, k, v = (torch.randn(2, 3, length, dim, device=device) for length in (n, m, m))
        # the second batch entry attends to the first half of the keys only
        mask = torch.arange(m, device=device) < torch.tensor([[m], [max(1, m // 2)]], device=device)
        want = attention_formula(q.double(), k.double(), v.double(), mask[:, None, None, :])
        errors = []
        for name, function in implementations.items():
            error = (function(q, k, v, mask=mask) - want).norm() / want.norm()
            errors.append(f"{name} {error.item():.1e}")
        print(f"N {n:3d}  M {m:3d}  head_dim {dim:3d}  relative error to the float64 formula: "
              + ", ".join(errors))
    if device == "cuda":
        measure_times(implementations)


if __name__ == "__main__":
    demo()
