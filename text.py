"""The built-in text encoder: prompts to vectors, one for each token and one for the whole prompt.

    python text.py                       # shows the tokens of a prompt and the sizes of the encoder
    python train.py --arch mmdit --data shapes --cond text --text-encoder bytes

TextEncoder is trained together with the network that it conditions. It reads bytes, so it needs no vocabulary
and takes any script; a word is one token, made of its bytes (patches of bytes that end at spaces: Slagle
2024, arXiv:2404.14408). Pretrained ones are in encoders.py.
Contract: encoder(prompts) -> context (B, L, D), 0 where padded; mask (B, L), True at valid positions; and
pooled (B, D).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from attention import Packing, Rope, pack
from dit import MLP, Norm, SelfAttention, position_angles

# A token is one word with the space before it, up to 16 bytes, which is enough for nearly all words of
# European languages; longer words take several tokens. Sequences are about a fifth as long as with one token
# per byte, at a fraction of the cost of attention.
WORD = 16
# Two codes beside the 256 values of a byte:
START = 256              # the first token of every prompt
PAD = 257                # fills up short words and short prompts
CODES = 258


@dataclass
class TextConfig:
    width: int = 256
    depth: int = 3
    heads: int = 4
    mlp_ratio: float = 4.0
    norm: str = "rms"
    mlp: str = "swiglu"
    qk_norm: bool = True
    limit: int = 64            # tokens of a prompt, START not included, after which it is truncated


# by the name of the network's preset
PRESETS = {"tiny": dict(width=64, depth=1, heads=2), "small": dict(),
           "size-2-text": dict(width=128, depth=2, heads=2)}


# ---- bytes, trained with the network

def split_words(prompt: str) -> list[bytes]:
    """The UTF-8 bytes of a prompt in lower case, split before every space, and pieces longer than WORD bytes
    after every WORD of them. Joined, they are the prompt with one space in front, which makes a word the same
    token at the start of a prompt as within it."""
    text = f" {prompt}".lower().encode("utf-8", "replace") if prompt.strip() else b""
    return [piece[i:i + WORD] for piece in re.findall(rb" [^ ]*", text) for i in range(0, len(piece), WORD)]


def tokenize(prompts: list[str], limit: int) -> tuple[Tensor, Tensor]:
    """START and up to `limit` words of each prompt as codes (B, L, WORD), padded to the longest prompt and to
    WORD bytes, and the mask (B, L), True at valid positions. The empty prompt, the null condition, is START
    alone."""
    start = bytes(1)                       # a placeholder, as START is not a byte
    rows = [[start, *split_words(prompt)[:limit]] for prompt in prompts]
    words = [word for row in rows for word in row]

    # This runs in every training step: one buffer for all words, and no loop over bytes in Python.
    buffer = bytearray(b"".join(word.ljust(WORD, b"\0") for word in words))
    codes = torch.frombuffer(buffer, dtype=torch.uint8).view(-1, WORD).long()            # (words, WORD)
    sizes = torch.tensor([len(word) for word in words])
    codes[torch.arange(WORD) >= sizes[:, None]] = PAD

    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]                           # (B, L)
    ids = torch.full((*mask.shape, WORD), PAD)
    ids[mask] = codes                      # both in order of prompts, then of words
    ids[:, 0, 0] = START
    return ids, mask


class TextBlock(nn.Module):
    """A pre-norm transformer block without modulation, as a prompt is not conditioned on anything."""

    def __init__(self, c: TextConfig):
        super().__init__()
        self.norm1 = Norm(c.norm, c.width)
        self.attn = SelfAttention(c.width, c.heads, c.qk_norm)
        self.norm2 = Norm(c.norm, c.width)
        self.mlp = MLP(c.mlp, c.width, c.mlp_ratio)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, packing: Packing | None = None) -> Tensor:
        """x (B, L, D), mask (B, L) -> (B, L, D). packing: of the prompts in x (1, L, D)."""
        x = x + self.attn(self.norm1(x), rope, mask, packing)
        return x + self.mlp(self.norm2(x))


class TextEncoder(nn.Module):
    """A bidirectional transformer over the words of a prompt, trained with the network that it conditions.

    The input for a word is the sum of its bytes' embeddings. Each position within a word has its own table of
    embeddings: with one table for all, anagrams would be the same word."""

    def __init__(self, config: TextConfig):
        super().__init__()
        c = self.config = config
        self.embedding = nn.Embedding(WORD * CODES, c.width)       # WORD tables of CODES rows
        self.blocks = nn.ModuleList(TextBlock(c) for _ in range(c.depth))
        self.norm = Norm(c.norm, c.width)
        self._rope: dict[tuple, Rope] = {}
        self.initialize()

    def initialize(self) -> None:
        # The sum over the bytes of a word, at most 16, then has a standard deviation of at most 1. The linear
        # layers keep PyTorch's initial weights.
        nn.init.normal_(self.embedding.weight, std=0.25)

    def truncated(self, prompt: str) -> dict[str, str]:
        """The part of a prompt beyond the limit, which is not read, by who loses it. Empty if it fits."""
        rest = b"".join(split_words(prompt)[self.config.limit:]).decode("utf-8", "ignore").strip()
        return {"the encoder": rest} if rest else {}

    def positions(self, length: int, device: torch.device) -> Rope:
        """Rotary positions 0, 1, ..., computed once for each length."""
        key = (length, device)
        if key not in self._rope:
            head_dim = self.config.width // self.config.heads
            place = torch.arange(length, dtype=torch.float64)
            # theta is small, as for the patches of an image, because prompts have only tens of words
            angles = position_angles(place, head_dim // 2, theta=100.0)
            self._rope[key] = angles.cos().float().to(device), angles.sin().float().to(device)
        return self._rope[key]

    def packed(self, prompts: list[str]) -> dict[str, list[Tensor] | Tensor]:
        """`forward` with nothing padded: context is a list of (L, D), and there is no mask."""
        device = self.embedding.weight.device
        ids, mask = tokenize(prompts, self.config.limit)
        packing = pack(mask.sum(1).tolist(), device)
        place = mask.nonzero()[:, 1].to(device)                    # of each token in its prompt
        cos, sin = self.positions(mask.shape[1], device)
        x = self.embed(ids[mask][None].to(device))                 # (1, L, D), of all prompts
        for block in self.blocks:
            x = block(x, (cos[place], sin[place]), None, packing)
        x = self.norm(x)[0]
        return {"context": list(x.split(packing.lengths)), "pooled": x[packing.offsets[:-1].long()]}

    def embed(self, ids: Tensor) -> Tensor:
        """(B, L, WORD) codes -> (B, L, D)."""
        tables = CODES * torch.arange(WORD, device=ids.device)     # where the table of each position begins
        letters = self.embedding(ids + tables)                     # (B, L, WORD, D)
        return (letters * (ids != PAD)[..., None]).sum(2)          # (B, L, D)

    def forward(self, prompts: list[str]) -> dict[str, Tensor]:
        """-> context (B, L, D), 0 where padded; mask (B, L), True at valid positions; and pooled (B, D), the
        output at START, which learns to summarise the prompt."""
        device = self.embedding.weight.device
        ids, mask = tokenize(prompts, self.config.limit)
        if device.type == "cuda":          # a copy from pinned memory is asynchronous
            ids = ids.pin_memory().to(device, non_blocking=True)
            mask = mask.pin_memory().to(device, non_blocking=True)
        else:
            ids = ids.to(device)
            mask = mask.to(device)
        rope = self.positions(ids.shape[1], device)

        x = self.embed(ids)                                        # (B, L, D)
        for block in self.blocks:
            x = block(x, rope, mask)
        x = self.norm(x) * mask[..., None]
        return {"context": x, "mask": mask, "pooled": x[:, 0]}


def demo() -> None:
    """Print the tokens of three prompts, and the parameters and the output of an untrained encoder."""
    prompts = ["a red circle left of a blue square", "Antidisestablishmentarianism für alle", ""]
    for prompt in prompts:
        tokens = ["START"] + [repr(word.decode("utf-8", "replace")) for word in split_words(prompt)]
        print(f"{prompt!r}: {len(tokens)} = {' '.join(tokens)}")
    torch.manual_seed(0)
    for name, preset in PRESETS.items():
        encoder = TextEncoder(TextConfig(**preset))
        with torch.no_grad():
            out = encoder(prompts)
        shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in out.items())
        print(f"{name:5s} {sum(p.numel() for p in encoder.parameters()) / 1e6:4.1f} M parameters: {shapes}")


if __name__ == "__main__":
    demo()
