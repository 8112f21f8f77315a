"""Attention with its usual company, QK-norm and rotary positions,
as one function over (B, heads, N, head_dim).

    python attention.py                  # checks the paths against the formula; on a GPU, times them

Three readings of one formula, in this order: `attention_formula`, the specification; `attention`, which
dit.py calls; and `fused_attention`, the same by hand in Triton, forward and backward. Vaswani et al. 2017
(arXiv:1706.03762) eq. 1; QK-norm: Dehghani et al. 2023 (arXiv:2302.05442); rotary positions: Su et al. 2021
(arXiv:2104.09864); the fused kernel: Dao 2023 (arXiv:2307.08691).
"""

from __future__ import annotations

import os
from functools import partial
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:            # comes with PyTorch's builds for GPUs
    triton = tl = None

Rope = tuple[Tensor, Tensor]   # cos and sin, each (N, head_dim / 2)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# ATTENTION=triton in the environment asks for the kernels below. They are not the default: checked by
# Triton's interpreter and compiled for a GPU, they have not yet been timed on one.
KERNEL = triton is not None and os.environ.get("ATTENTION") == "triton"


# ---- the formula

def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / rms(x) * weight over the last dimension, computed in float32 (float64 stays)."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate each pair (x[2i], x[2i+1]) of the last dimension by its angle; x (..., N, head_dim)."""
    cos, sin = rope
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


def attention_formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, the specification of everything below. q (B, heads, N, head_dim),
    k and v (B, heads, M, head_dim); mask, bool, broadcasts to (B, heads, N, M): True where a query may see
    a key."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


# ---- what the models call

def attention(q: Tensor, k: Tensor, v: Tensor, *, q_norm: Tensor | None = None, k_norm: Tensor | None = None,
              rope: Rope | None = None, mask: Tensor | None = None, offsets: Tensor | None = None,
              max_length: int | None = None) -> Tensor:
    """q (B, heads, N, head_dim), k and v (B, heads, M, head_dim) -> (B, heads, N, head_dim).

    q_norm, k_norm: RMS-norm weights (head_dim,), applied before the rotation; both or none. rope: tables for
    the rows of q and of k alike. mask (B, M), bool: True where a key may be attended to; every row needs at
    least one. offsets (S + 1,), int32: B = 1, and N = M rows are S sequences packed one behind another,
    sequence i from offsets[i] to offsets[i + 1]; each attends to itself. max_length comes with them: rows of
    the longest, or more; of fewer the kernel would leave the rest undone.
    Raises ValueError where these do not go together."""
    if offsets is not None and (mask is not None or q.shape[0] != 1 or q.shape[2] != k.shape[2]):
        raise ValueError("offsets pack sequences in one batch entry, q like k, and leave nothing to mask")
    if (offsets is None) != (max_length is None):
        raise ValueError("offsets and max_length come together")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm come together")
    if KERNEL and (q.is_cuda or INTERPRETED) and q.dtype != torch.float64 and q.shape[-1] <= 128:
        return fused_attention(q, k, v, q_norm=q_norm, k_norm=k_norm, rope=rope, mask=mask, offsets=offsets,
                               max_length=max_length)
    if q_norm is not None:
        q, k = rms_norm(q, q_norm), rms_norm(k, k_norm)
    if rope is not None:
        q, k = rotate(q, rope), rotate(k, rope)
    if offsets is not None:
        sequence = torch.searchsorted(offsets, torch.arange(q.shape[2], device=q.device), right=True)
        mask = sequence[:, None] == sequence
    elif mask is not None:
        mask = mask[:, None, None, :]
    if q.device.type == "cpu" and q.shape[-2] * k.shape[-2] <= 128 * 128:
        # short rows: CPU SDPA's backward takes 7x as long at N = 16 in bf16
        return attention_formula(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


# ---- the kernels
#
# One program owns a block of queries of one head and walks over the keys, with a running maximum, a running
# sum and the output so far: scores never reach memory. The softmax is in base 2, whose exponential the
# hardware has. All that the way back needs of the scores is one number a row, lse = log2 of the sum of their
# exponentials.
# q is normed and rotated as it is loaded. So is k where rows are short; where they are long, and many
# programs would do the same to the same keys, `_prepare` has done it once before.
# The way back crosses the scores twice, first with a block of queries for dq, then with a block of keys for
# dk and dv, both on prepared q and k. Each program ends with the way back through rotation and norm, and
# leaves sums over 32 rows for the norm's weights: no atomics, so the same gradient each time.
#
# Names: z counts sequences, h heads; x_z, x_h, x_n are strides of x. real: which rows of a block there are.
# LENGTH: 0 where there are up to SHORT keys, then 1, and 2 for over four times as many; each is tuned.

SHORT = 512        # keys up to which the forward kernel prepares them itself
ROWS = 32          # rows whose gradients of the norm's weights are summed before they are written


def _jit(function):
    return triton.jit(function) if triton else function


def _autotune(*configs: tuple[int, int, int, int]):
    """configs: queries a block, keys a block, warps, stages. The interpreter takes the first."""
    if not triton:
        return lambda kernel: kernel
    configs = [triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)
               for m, n, warps, stages in configs]
    return triton.autotune(configs[:1] if INTERPRETED else configs, key=["LENGTH", "DIM", "NORM", "ROPE"])


@_jit
def _place(longest, heads, BLOCK: tl.constexpr):
    """Which block of rows, sequence and head are this program's. The grid has one axis, as the others end at
    65,535; programs beside each other share their keys."""
    program, blocks = tl.program_id(0), tl.cdiv(longest, BLOCK)
    return program % blocks, program // blocks // heads, program // blocks % heads


@_jit
def _head(X, z, h, x_z, x_h, DIM: tl.constexpr):
    """Where a head begins: a multiple of 8 numbers into X, which allows wide loads, as `_aligned` sees to."""
    at = z * x_z + h * x_h
    return X + (tl.multiple_of(at, 8) if DIM % 8 == 0 else at)


@_jit
def _tile(X, rows, d, real, x_n, DIM: tl.constexpr):
    """Rows of one head, (rows, padded head_dim), zero where there is nothing."""
    return tl.load(X + rows[:, None] * x_n + d[None, :], real[:, None] & (d < DIM)[None, :], 0.0)


@_jit
def _put(X, x, rows, d, real, x_n, DIM: tl.constexpr):
    there = real[:, None] & (d < DIM)[None, :]
    tl.store(X + rows[:, None] * x_n + d[None, :], x.to(X.dtype.element_ty), there)


@_jit
def _turn(x, COS, SIN, rows, real, sign, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Rotate the pairs of x (rows, PADDED), by sign = -1 backward."""
    pair = tl.arange(0, PADDED // 2)
    at, there = rows[:, None] * (DIM // 2) + pair[None, :], real[:, None] & (pair < DIM // 2)[None, :]
    cos, sin = tl.load(COS + at, there, 0.0), sign * tl.load(SIN + at, there, 0.0)
    a, b = tl.split(tl.reshape(x, (x.shape[0], PADDED // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (x.shape[0], PADDED))


@_jit
def _prologue(x, W, COS, SIN, rows, d, real, DIM: tl.constexpr, PADDED: tl.constexpr, NORM: tl.constexpr,
              ROPE: tl.constexpr):
    """Norm and rotation of a block, in float32, back in x's type."""
    y = x.to(tl.float32)
    if NORM:
        y = y * tl.rsqrt(tl.sum(y * y, 1) / DIM + 1e-6)[:, None] * tl.load(W + d, d < DIM, 0.0)[None, :]
    if ROPE:
        y = _turn(y, COS, SIN, rows, real, 1.0, DIM, PADDED)
    return y.to(x.dtype)


@_jit
def _epilogue(dy, X, W, COS, SIN, DW, rows, d, real, x_n, DIM: tl.constexpr, PADDED: tl.constexpr,
              NORM: tl.constexpr, ROPE: tl.constexpr, ROWS: tl.constexpr):
    """The gradient before `_prologue`, given dy (rows, PADDED) behind it; sums over rows for W into DW."""
    if ROPE:
        dy = _turn(dy, COS, SIN, rows, real, -1.0, DIM, PADDED)
    if NORM:
        x = _tile(X, rows, d, real, x_n, DIM).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 1) / DIM + 1e-6)[:, None]
        x *= scale
        sums = tl.sum(tl.reshape(dy * x, (dy.shape[0] // ROWS, ROWS, PADDED)), 1)
        part = tl.arange(0, dy.shape[0] // ROWS)
        tl.store(DW + part[:, None] * DIM + d[None, :], sums, (part >= 0)[:, None] & (d < DIM)[None, :])
        dy *= tl.load(W + d, d < DIM, 0.0)[None, :]
        dy = scale * (dy - x * (tl.sum(dy * x, 1) / DIM)[:, None])
    return dy


@_jit
def _prepare(X, Y, W, COS, SIN, x_z, x_h, x_n, y_z, y_h, y_n, heads, N, DIM: tl.constexpr,
             PADDED: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, BLOCK: tl.constexpr):
    """Y = X normed and rotated."""
    block, sequence, h = _place(N, heads, BLOCK)
    z, rows, d = tl.cast(sequence, tl.int64), block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PADDED)
    real = rows < N
    x = _tile(_head(X, z, h, x_z, x_h, DIM), rows, d, real, x_n, DIM)
    y = _prologue(x, W, COS, SIN, rows, d, real, DIM, PADDED, NORM, ROPE)
    _put(_head(Y, z, h, y_z, y_h, DIM), y, rows, d, real, y_n, DIM)


@_autotune((64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2))
@_jit
def _forward(Q, K, V, O, LSE, QW, KW, COS, SIN, MASK, OFFSETS, q_z, q_h, q_n, k_z, k_h, k_n, v_z, v_h, v_n,
             o_z, o_h, o_n, heads, N, M, longest, scale, LENGTH: tl.constexpr, DIM: tl.constexpr,
             PADDED: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, MASKED: tl.constexpr,
             PACKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """scale: 1 / sqrt(head_dim) * log2(e)."""
    block, sequence, h = _place(longest, heads, BLOCK_M)
    z, first, end, key_first, key_end = tl.cast(sequence, tl.int64), 0, N, 0, M
    if PACKED:
        z, first = tl.cast(0, tl.int64), tl.load(OFFSETS + sequence).to(tl.int32)
        end = tl.load(OFFSETS + sequence + 1).to(tl.int32)
        key_first, key_end = first, end
    rows, d = first + block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, PADDED)
    real = rows < end
    K, V = _head(K, z, h, k_z, k_h, DIM), _head(V, z, h, v_z, v_h, DIM)
    q = _tile(_head(Q, z, h, q_z, q_h, DIM), rows, d, real, q_n, DIM)
    q = _prologue(q, QW, COS, SIN, rows, d, real, DIM, PADDED, NORM, ROPE)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, PADDED), tl.float32)
    if PACKED:                                         # nothing to do behind the end of a short sequence
        key_end = tl.where(first + block * BLOCK_M < end, key_end, key_first)
    for start in range(key_first, key_end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        seen = keys < key_end
        k = _tile(K, keys, d, seen, k_n, DIM)
        if LENGTH == 0:
            k = _prologue(k, KW, COS, SIN, keys, d, seen, DIM, PADDED, NORM, ROPE)
        v = _tile(V, keys, d, seen, v_n, DIM)
        if MASKED:
            seen = seen & (tl.load(MASK + z * M + keys, seen, 0) != 0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)                  # nothing seen so far
        p, fade = tl.exp2(scores - safe[:, None]), tl.exp2(top - safe)
        total = total * fade + tl.sum(p, 1)
        out = out * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        top = higher
    total = tl.where(total == 0, 1.0, total)                                   # a row that sees nothing is 0
    top = tl.where(top == float("-inf"), 0.0, top)
    _put(_head(O, z, h, o_z, o_h, DIM), out / total[:, None], rows, d, real, o_n, DIM)
    tl.store(LSE + (z * heads + h) * N + rows, top + tl.log2(total), real)


@_autotune((64, 64, 4, 3), (128, 64, 8, 3), (64, 32, 4, 3))
@_jit
def _backward_q(Q, K, V, O, DO, LSE, DELTA, X, DX, W, COS, SIN, DW, MASK, OFFSETS, q_z, q_h, q_n, k_z, k_h,
                k_n, v_z, v_h, v_n, o_z, o_h, o_n, do_z, do_h, do_n, x_z, x_h, x_n, dx_z, dx_h, dx_n, heads,
                N, M, longest, parts, scale, LENGTH: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
                NORM: tl.constexpr, ROPE: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
                PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Q, K: prepared; X: q as it came in. Leaves delta = sum(o * do) for `_backward_kv`."""
    block, sequence, h = _place(longest, heads, BLOCK_M)
    z, first, end, key_first, key_end = tl.cast(sequence, tl.int64), 0, N, 0, M
    if PACKED:
        z, first = tl.cast(0, tl.int64), tl.load(OFFSETS + sequence).to(tl.int32)
        end = tl.load(OFFSETS + sequence + 1).to(tl.int32)
        key_first, key_end = first, end
    rows, d = first + block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, PADDED)
    real = rows < end
    K, V = _head(K, z, h, k_z, k_h, DIM), _head(V, z, h, v_z, v_h, DIM)
    q = _tile(_head(Q, z, h, q_z, q_h, DIM), rows, d, real, q_n, DIM)
    do = _tile(_head(DO, z, h, do_z, do_h, DIM), rows, d, real, do_n, DIM)
    o = _tile(_head(O, z, h, o_z, o_h, DIM), rows, d, real, o_n, DIM)
    at = (z * heads + h) * N + rows
    delta, lse = tl.sum(o.to(tl.float32) * do, 1), tl.load(LSE + at, real, 0.0)
    tl.store(DELTA + at, delta, real)
    dq = tl.zeros((BLOCK_M, PADDED), tl.float32)
    if PACKED:
        key_end = tl.where(first + block * BLOCK_M < end, key_end, key_first)
    for start in range(key_first, key_end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        seen = keys < key_end
        k, v = _tile(K, keys, d, seen, k_n, DIM), _tile(V, keys, d, seen, v_n, DIM)
        if MASKED:
            seen = seen & (tl.load(MASK + z * M + keys, seen, 0) != 0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        p = tl.where(seen[None, :], tl.exp2(scores - lse[:, None]), 0.0)
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    dq *= scale * 0.6931471805599453                                           # ln(2): scale is in base 2
    DW += ((sequence * heads + h) * parts + block * (BLOCK_M // ROWS)).to(tl.int64) * DIM
    dq = _epilogue(dq, _head(X, z, h, x_z, x_h, DIM), W, COS, SIN, DW, rows, d, real, x_n, DIM, PADDED, NORM,
                   ROPE, ROWS)
    _put(_head(DX, z, h, dx_z, dx_h, DIM), dq, rows, d, real, dx_n, DIM)


@_autotune((64, 64, 4, 3), (64, 128, 8, 3), (32, 64, 4, 3))
@_jit
def _backward_kv(Q, K, V, DO, LSE, DELTA, X, DX, DV, W, COS, SIN, DW, MASK, OFFSETS, q_z, q_h, q_n, k_z,
                 k_h, k_n, v_z, v_h, v_n, do_z, do_h, do_n, x_z, x_h, x_n, dx_z, dx_h, dx_n, dv_z, dv_h,
                 dv_n, heads, N, M, longest, parts, scale, LENGTH: tl.constexpr, DIM: tl.constexpr,
                 PADDED: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, MASKED: tl.constexpr,
                 PACKED: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr):
    """Q, K: prepared; X: k as it came in. Scores are turned on their side: (keys, queries)."""
    block, sequence, h = _place(longest, heads, BLOCK_N)
    z, first, end, key_first, key_end = tl.cast(sequence, tl.int64), 0, N, 0, M
    if PACKED:
        z, first = tl.cast(0, tl.int64), tl.load(OFFSETS + sequence).to(tl.int32)
        end = tl.load(OFFSETS + sequence + 1).to(tl.int32)
        key_first, key_end = first, end
    keys, d = key_first + block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, PADDED)
    real = keys < key_end
    Q, DO = _head(Q, z, h, q_z, q_h, DIM), _head(DO, z, h, do_z, do_h, DIM)
    k = _tile(_head(K, z, h, k_z, k_h, DIM), keys, d, real, k_n, DIM)
    v = _tile(_head(V, z, h, v_z, v_h, DIM), keys, d, real, v_n, DIM)
    seen = real
    if MASKED:
        seen = seen & (tl.load(MASK + z * M + keys, real, 0) != 0)
    dk, dv = tl.zeros((BLOCK_N, PADDED), tl.float32), tl.zeros((BLOCK_N, PADDED), tl.float32)
    if PACKED:
        end = tl.where(key_first + block * BLOCK_N < key_end, end, first)
    for start in range(first, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        there = rows < end
        q, do = _tile(Q, rows, d, there, q_n, DIM), _tile(DO, rows, d, there, do_n, DIM)
        at = (z * heads + h) * N + rows
        lse, delta = tl.load(LSE + at, there, float("inf")), tl.load(DELTA + at, there, 0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        p = tl.where(seen[:, None], tl.exp2(scores - lse[None, :]), 0.0)
        dv += tl.dot(p.to(do.dtype), do, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
        dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)
    dk *= scale * 0.6931471805599453
    DW += ((sequence * heads + h) * parts + block * (BLOCK_N // ROWS)).to(tl.int64) * DIM
    dk = _epilogue(dk, _head(X, z, h, x_z, x_h, DIM), W, COS, SIN, DW, keys, d, real, x_n, DIM, PADDED, NORM,
                   ROPE, ROWS)
    _put(_head(DX, z, h, dx_z, dx_h, DIM), dk, keys, d, real, dx_n, DIM)
    _put(_head(DV, z, h, dv_z, dv_h, DIM), dv, keys, d, real, dv_n, DIM)


# ---- the kernels as one operator, for autograd and torch.compile

def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _like(x: Tensor) -> Tensor:
    """An empty (B, heads, N, head_dim) that lies in memory as (B, N, heads, head_dim), ready to flatten."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _blocks(rows: int, size: int) -> int:
    return (rows + size - 1) // size


def _aligned(x: Tensor) -> Tensor:
    """x with rows and heads that begin at multiples of 8 numbers, as far as head_dim allows."""
    whole = x.shape[-1] % 8 or not any(stride % 8 for stride in x.stride()[:3])
    return x if whole and x.stride(-1) == 1 else x.contiguous()


# torch.compile looks for this name in the operators below, to know their kernels
wrap_triton = torch.library.wrap_triton if triton and not INTERPRETED else lambda kernel: kernel


def _setting(q: Tensor, k: Tensor, norm: Tensor | None, cos: Tensor | None, mask: Tensor | None,
             offsets: Tensor | None, max_length: int) -> tuple[int, int, int, dict]:
    """Sequences, rows of the longest query and key, and what all kernels are told."""
    packed, dim = offsets is not None, q.shape[-1]
    exact = torch.get_float32_matmul_precision() == "highest"
    length = max_length if packed else k.shape[2]
    options = {"LENGTH": 0 if length <= SHORT else 1 if length <= 4 * SHORT else 2, "DIM": dim,
               "PADDED": max(16, triton.next_power_of_2(dim)), "NORM": norm is not None,
               "ROPE": cos is not None, "MASKED": mask is not None, "PACKED": packed,
               "PRECISION": "tf32x3" if exact else "tf32"}
    if packed:
        return len(offsets) - 1, max_length, max_length, options
    return q.shape[0], q.shape[2], k.shape[2], options


def _prepared(x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
              options: dict) -> Tensor:
    if weight is None and cos is None:
        return x
    y, (batch, heads, length, _) = _like(x), x.shape
    wrap_triton(_prepare)[(_blocks(length, 64) * batch * heads,)](
        x, y, weight, cos, sin, *_strides(x, y), heads, length, BLOCK=64,
        **{name: options[name] for name in ("DIM", "PADDED", "NORM", "ROPE")})
    return y


_operator = partial(torch.library.triton_op if triton else torch.library.custom_op, mutates_args=())


@_operator("latents::attention")
def _attention(q: Tensor, k: Tensor, v: Tensor, q_norm: Optional[Tensor], k_norm: Optional[Tensor],
               cos: Optional[Tensor], sin: Optional[Tensor], mask: Optional[Tensor],
               offsets: Optional[Tensor], max_length: int) -> tuple[Tensor, Tensor]:
    """Output and lse (B, heads, N)."""
    sequences, rows, _, options = _setting(q, k, q_norm, cos, mask, offsets, max_length)
    k = k if options["LENGTH"] == 0 else _prepared(k, k_norm, cos, sin, options)
    o, lse, heads = _like(q), q.new_empty(q.shape[:3], dtype=torch.float32), q.shape[1]
    wrap_triton(_forward)[lambda meta: (_blocks(rows, meta["BLOCK_M"]) * sequences * heads,)](
        q, k, v, o, lse, q_norm, k_norm, cos, sin, mask, offsets, *_strides(q, k, v, o), heads, q.shape[2],
        k.shape[2], rows, q.shape[-1] ** -0.5 * 1.4426950408889634, **options)
    return o, lse


@_operator("latents::attention_backward")
def _attention_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, q_norm: Optional[Tensor],
                        k_norm: Optional[Tensor], cos: Optional[Tensor], sin: Optional[Tensor],
                        mask: Optional[Tensor], offsets: Optional[Tensor], max_length: int, o: Tensor,
                        lse: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and the gradients of the norm's weights (empty sums where there is no norm)."""
    sequences, rows, keys, options = _setting(q, k, q_norm, cos, mask, offsets, max_length)
    (heads, n, dim), m = q.shape[1:], k.shape[2]
    ready_q, ready_k = _prepared(q, q_norm, cos, sin, options), _prepared(k, k_norm, cos, sin, options)
    dq, dk, dv, delta = _like(q), _like(k), _like(v), torch.empty_like(lse)
    # as many parts as the largest block of either kernel may touch
    parts = [_blocks(length, 128) * (128 // ROWS) if options["NORM"] else 0 for length in (rows, keys)]
    dw_q, dw_k = (q.new_zeros((sequences * heads, number, dim), dtype=torch.float32) for number in parts)
    scale = dim ** -0.5 * 1.4426950408889634
    wrap_triton(_backward_q)[lambda meta: (_blocks(rows, meta["BLOCK_M"]) * sequences * heads,)](
        ready_q, ready_k, v, o, do, lse, delta, q, dq, q_norm, cos, sin, dw_q, mask, offsets,
        *_strides(ready_q, ready_k, v, o, do, q, dq), heads, n, m, rows, parts[0], scale, ROWS=ROWS,
        **options)
    wrap_triton(_backward_kv)[lambda meta: (_blocks(keys, meta["BLOCK_N"]) * sequences * heads,)](
        ready_q, ready_k, v, do, lse, delta, k, dk, dv, k_norm, cos, sin, dw_k, mask, offsets,
        *_strides(ready_q, ready_k, v, do, k, dk, dv), heads, n, m, keys, parts[1], scale, ROWS=ROWS,
        **options)
    return dq, dk, dv, dw_q.sum((0, 1)), dw_k.sum((0, 1))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:9], *output)
    ctx.max_length = inputs[9]


def _gradients(ctx, do: Tensor, _) -> tuple:
    *inputs, o, lse = ctx.saved_tensors
    dq, dk, dv, dw_q, dw_k = _attention_backward(_aligned(do), *inputs, ctx.max_length, o, lse)
    q_norm, k_norm = inputs[3:5]
    dw = (None, None) if q_norm is None else (dw_q.to(q_norm.dtype), dw_k.to(k_norm.dtype))
    return dq, dk, dv, *dw, None, None, None, None, None


_attention.register_autograd(_gradients, setup_context=_save)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, *, q_norm: Tensor | None = None,
                    k_norm: Tensor | None = None, rope: Rope | None = None, mask: Tensor | None = None,
                    offsets: Tensor | None = None, max_length: int | None = None) -> Tensor:
    """`attention` by the kernels above, for float32, bfloat16 and float16, head dims up to 128. Gradients
    reach q, k, v and the norm's weights; the rotary tables are constants."""
    q, k, v = map(_aligned, (q, k, v))
    cos, sin = (x.float().contiguous() for x in rope) if rope else (None, None)
    mask = None if mask is None else mask.expand(len(q), -1).contiguous()
    return _attention(q, k, v, q_norm, k_norm, cos, sin, mask, offsets, max_length or q.shape[2])[0]


def demo() -> None:
    """The paths against the formula in float64 and, on a GPU, the time that each takes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    paths = {"attention": attention} | ({"kernel": fused_attention} if triton and (
        device == "cuda" or INTERPRETED) else {})
    for n, m, dim in ((16, 16, 64), (7, 77, 32), (1, 1, 128), (300, 200, 64)):
        q, k, v = (torch.randn(2, 3, length, dim, device=device) for length in (n, m, m))
        mask = torch.arange(m, device=device) < torch.tensor([[m], [max(1, m // 2)]], device=device)
        want = attention_formula(q.double(), k.double(), v.double(), mask[:, None, None, :])
        errors = (f"{name} {((path(q, k, v, mask=mask) - want).norm() / want.norm()).item():.1e}"
                  for name, path in paths.items())
        print(f"N {n:3d}  M {m:3d}  head_dim {dim:3d}  relative error to the float64 formula: "
              + ", ".join(errors))
    for n in (256, 1024, 4096) if device == "cuda" else ():
        q, k, v = torch.randn(3, 4, 16, n, 64, device=device, dtype=torch.bfloat16)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for name, function in paths.items():
            for i in range(30):
                if i == 10:
                    start.record()
                function(q, k, v)
            end.record()
            torch.cuda.synchronize()
            print(f"N {n:4d}  {name:9s} {start.elapsed_time(end) / 20:.3f} ms")


if __name__ == "__main__":
    demo()
