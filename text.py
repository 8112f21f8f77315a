"""Text encoders: prompts to vectors, one for each token and one for the whole prompt.

    python text.py                       # shows the tokens of a prompt and the sizes of the encoder
    python train.py --arch mmdit --data shapes --cond text --text-encoder bytes

TextEncoder is built in and trained together with the network that it conditions. It reads bytes, so it needs
no vocabulary and takes any script; a word is one token, made of its bytes (patches of bytes that end at
spaces: Slagle 2024, arXiv:2404.14408). FrozenTextEncoder wraps a pretrained CLIP or T5.
Contract: encoder(prompts) -> context (B, L, D), 0 where padded; mask (B, L), True at valid positions; and,
except from T5, pooled (B, P).
"""

from __future__ import annotations

import json
import os
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

    def truncated(self, prompt: str) -> str:
        """The part of a prompt beyond the limit, which is not read; empty if it fits."""
        return b"".join(split_words(prompt)[self.config.limit:]).decode("utf-8", "ignore").strip()

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


# ---- pretrained and frozen

class FrozenTextEncoder:
    """A pretrained encoder from the package transformers, called like a TextEncoder.

    kind "clip": the penultimate hidden layer and the pooled output (Stable Diffusion 2, XL and 3); "t5": the
    last hidden layer and no pooled output (Stable Diffusion 3). path: a folder with the model and its
    tokenizer, or a pipeline's with text_encoder/ and tokenizer/ (for t5 text_encoder_3/ and tokenizer_3/).
    limit: tokens of a prompt, begin and end marks included. The files may be in any precision; the encoder
    runs in float32. No code that lies in the folder is run. Raises ValueError with a line for the user."""

    def __init__(self, kind: str, path: str, device: torch.device | str = "cpu", limit: int = 77):
        suffix = "_3" if kind == "t5" else ""
        model_folder = subfolder(path, f"text_encoder{suffix}")
        tokenizer_folder = subfolder(path, f"tokenizer{suffix}")
        # A wrong path is reported before a missing package, because installing that would not help.
        if not os.path.isfile(f"{model_folder}/config.json"):
            raise ValueError(f"{kind}:{path}: no text encoder there; give a folder with its config.json")
        try:
            import transformers
        except ImportError:
            raise ValueError(f"{kind}:{path}: needs the package transformers "
                             "(pip install transformers)") from None
        try:
            self.tokenizer = load_tokenizer(kind, tokenizer_folder)
            # float32: in half precision T5 overflows, and a CPU is slower
            self.model = load_encoder(kind, model_folder).float().to(device).eval()
            check_tokenizer(kind, self.tokenizer, self.model)
        except Exception as error:         # transformers raises a dozen types; all mean the same to the user
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"{kind}:{path}: cannot be loaded as a {kind} encoder with its tokenizer "
                             f"({what})") from None
        self.kind = kind
        self.limit = min(limit, self.tokenizer.model_max_length)

    def truncated(self, prompt: str) -> str:
        """The part of a prompt beyond the limit, which is not read; empty if it fits."""
        ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        room = self.limit - self.tokenizer.num_special_tokens_to_add()
        return self.tokenizer.decode(ids[room:]) if len(ids) > room else ""

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> dict[str, Tensor]:
        """-> context (B, L, D), 0 where padded; mask (B, L), True at valid positions; from CLIP also pooled
        (B, P)."""
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=self.limit,
                                return_tensors="pt")
        ids = tokens["input_ids"].to(self.model.device)
        attention_mask = tokens["attention_mask"].to(self.model.device)
        out = self.model(input_ids=ids, attention_mask=attention_mask, output_hidden_states=True)
        mask = attention_mask.bool()
        if self.kind == "t5":
            return {"context": out.last_hidden_state * mask[..., None], "mask": mask}
        # CLIP's last layer is trained only for the pooled output; the one before describes each token better.
        context = out.hidden_states[-2] * mask[..., None]
        pooled = out.text_embeds if "text_embeds" in out else out.pooler_output
        return {"context": context, "mask": mask, "pooled": pooled}


def subfolder(path: str, name: str) -> str:
    """The subfolder of that name if the folder is a pipeline's; else the folder itself."""
    return f"{path}/{name}" if os.path.isdir(f"{path}/{name}") else path


# What config.json calls an encoder of each kind. A whole CLIP contains its text encoder; mT5 is a T5.
MODEL_TYPES = {"clip": ("clip_text_model", "clip"), "t5": ("t5", "mt5")}
# Files of which one group must be there: without them, transformers makes up an empty vocabulary.
TOKENIZER_FILES = {"clip": (("tokenizer.json",), ("vocab.json", "merges.txt")),
                   "t5": (("tokenizer.json",), ("spiece.model",))}
# Begin and end marks of a prompt, which tell the two kinds of tokenizers apart.
SPECIAL_TOKENS = {"clip": 2, "t5": 1}


def load_tokenizer(kind: str, folder: str):
    """The tokenizer in a folder. Raises ValueError if its files are not all there."""
    import transformers

    groups = TOKENIZER_FILES[kind]
    if not any(all(os.path.isfile(f"{folder}/{name}") for name in names) for names in groups):
        needed = " or ".join(" with ".join(names) for names in groups)
        raise ValueError(f"no tokenizer in {folder}, which needs {needed}")
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def check_tokenizer(kind: str, tokenizer, model: nn.Module) -> None:
    """Raise ValueError where the tokenizer is another model's: its tokens would mean something else."""
    marks = tokenizer.num_special_tokens_to_add()
    known = model.get_input_embeddings().num_embeddings
    if marks != SPECIAL_TOKENS[kind] or len(tokenizer) > known:
        raise ValueError(f"its tokenizer, of {len(tokenizer):,} tokens and {marks} marks, belongs to another "
                         f"model than this one of {known:,} tokens and {SPECIAL_TOKENS[kind]} marks")


def load_encoder(kind: str, folder: str) -> nn.Module:
    """The model of the package transformers that the weights in a folder belong to. Raises ValueError for a
    folder of another kind of model, or without some of the weights."""
    import transformers

    with open(f"{folder}/config.json", encoding="utf-8") as file:
        config = json.load(file)
    if config.get("model_type") not in MODEL_TYPES[kind]:
        raise ValueError(f"config.json names a model of type {config.get('model_type')!r}, not "
                         f"{' or '.join(MODEL_TYPES[kind])}")
    # transformers would fetch an implementation of attention that is named like OWNER/NAME, and run it.
    attention = str([config.get("attn_implementation"), config.get("_attn_implementation")])
    if "/" in attention or "auto_map" in config:
        raise ValueError("config.json asks for code from elsewhere, which is not run (auto_map or "
                         "attn_implementation)")
    if kind == "t5":                       # without the decoder, which text-to-image does not use
        model_class = transformers.T5EncoderModel
    elif config.get("architectures") == ["CLIPTextModel"]:      # no projection (Stable Diffusion 1, 2)
        model_class = transformers.CLIPTextModel
    else:                                  # with a projection of the pooled output (XL, 3)
        model_class = transformers.CLIPTextModelWithProjection
    model, found = model_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False,
                                               output_loading_info=True)
    missing = sorted(found["missing_keys"])
    if missing:                            # transformers warns only, and leaves them random
        raise ValueError(f"{len(missing)} of its weights are missing, like {missing[0]}")
    return model


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
