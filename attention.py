"""Attention with its usual company, QK-norm and rotary positions,
as one function over (B, heads, N, head_dim).

    python attention.py                  # checks the fast path against the formula; on a GPU, times both

`attention_formula` is the specification; `attention` is what dit.py calls. Vaswani et al. 2017
(arXiv:1706.03762) eq. 1; QK-norm: Dehghani et al. 2023 (arXiv:2302.05442); rotary positions: Su et al. 2021
(arXiv:2104.09864).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Rope = tuple[Tensor, Tensor]   # cos and sin, each (N, head_dim / 2)


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
    """softmax(q k^T / sqrt(head_dim)) v, the specification of everything below.
    Same arguments as `attention`."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
    return scores.softmax(-1) @ v


def attention(q: Tensor, k: Tensor, v: Tensor, *, q_norm: Tensor | None = None, k_norm: Tensor | None = None,
              rope: Rope | None = None, mask: Tensor | None = None) -> Tensor:
    """Fused attention. q (B, heads, N, head_dim), k and v (B, heads, M, head_dim) -> (B, heads, N, head_dim).

    q_norm, k_norm: RMS-norm weights (head_dim,), applied before the rotation. rope: tables for the rows of q
    and of k alike. mask (B, M), bool: True where a key may be attended to; every row needs at least one."""
    if q_norm is not None:
        q, k = rms_norm(q, q_norm), rms_norm(k, k_norm)
    if rope is not None:
        q, k = rotate(q, rope), rotate(k, rope)
    if q.device.type == "cpu" and q.shape[-2] * k.shape[-2] <= 128 * 128:
        # short rows: CPU SDPA's backward takes 7x as long at N = 16 in bf16
        return attention_formula(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :])


def demo() -> None:
    """The fast path against the formula in float64 and, on a GPU, the time that each takes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    for n, m, dim in ((16, 16, 64), (7, 77, 32), (1, 1, 128), (300, 200, 64)):
        q, k, v = (torch.randn(2, 3, length, dim, device=device) for length in (n, m, m))
        mask = torch.arange(m, device=device) < torch.tensor([[m], [max(1, m // 2)]], device=device)
        want = attention_formula(q.double(), k.double(), v.double(), mask)
        error = (attention(q, k, v, mask=mask) - want).norm() / want.norm()
        print(f"N {n:3d}  M {m:3d}  head_dim {dim:3d}  relative error to the float64 formula: {error:.1e}")
    for n in (256, 1024, 4096) if device == "cuda" else ():
        q, k, v = torch.randn(3, 4, 16, n, 64, device=device, dtype=torch.bfloat16)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for name, function in (("attention", attention), ("formula", attention_formula)):
            for i in range(30):
                if i == 10:
                    start.record()
                function(q, k, v)
            end.record()
            torch.cuda.synchronize()
            print(f"N {n:4d}  {name:9s} {start.elapsed_time(end) / 20:.3f} ms")


if __name__ == "__main__":
    demo()
