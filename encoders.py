"""Pretrained text encoders, and how each published model joins what they say about a prompt.

    python encoders.py                   # the table of recipes, with the shapes that a network gets
    python train.py --arch mmdit --data FOLDER --text-encoder sd3:stable-diffusion-3-medium/

CLIP (Radford et al. 2021, arXiv:2103.00020), OpenCLIP (Cherti et al. 2022, arXiv:2212.07143) and T5 (Raffel
et al. 2019, arXiv:1910.10683), frozen, by the optional package transformers. A recipe is what one model takes
of them: see RECIPES. Contract: encoder(prompts) -> context (B, L, D); where the recipe is masked, mask (B,
L), True at valid positions, and context 0 elsewhere; where it has one, pooled (B, P). None for a prompt is
the model's null condition.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from glob import glob
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from unet import timestep_embedding

# What a network gets of an encoder's tokens. CLIP's last layer is trained only for the pooled output; the one
# before describes each token better.
LAST = "last layer, after the final norm"
BEFORE = "last but one, raw"
# And of its output at the end mark, after the final norm:
PLAIN = "as it is"
PROJECTED = "projected"
EITHER = "projected where the folder has the projection"

# What is known of each kind when only its weights are there. clip and t5 stand for any of their kind.
CLIP = dict(vocab_size=49408, max_position_embeddings=77, bos_token_id=49406, eos_token_id=49407)
CONFIGS: dict[str, dict] = {
    "CLIP-L": CLIP | dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                          num_attention_heads=12, projection_dim=768, hidden_act="quick_gelu"),
    # 23 of its 24 layers: SD 2 normalises the last but one, and nothing reads the last
    "OpenCLIP-H": CLIP | dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23,
                              num_attention_heads=16, projection_dim=1024, hidden_act="gelu"),
    "OpenCLIP-G": CLIP | dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                              num_attention_heads=20, projection_dim=1280, hidden_act="gelu"),
    "T5-XXL": dict(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                   feed_forward_proj="gated-gelu", decoder_start_token_id=0, tie_word_embeddings=False),
    "T5-base": dict(vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12,
                    feed_forward_proj="relu", decoder_start_token_id=0),
}


class Part(NamedTuple):
    """One encoder of a recipe."""
    kind: str                            # a key of CONFIGS, or clip or t5 for any of that kind
    folder: str                          # in a pipeline's folder, its own,
    tokenizer: str                       # and its tokenizer's
    tokens: int                          # that it reads of a prompt, begin and end marks included
    layer: str | None                    # which output is its context; None: it gives none
    pooled: str | None = None            # which output is its pooled vector; None: it gives none
    optional: bool = False               # whether zeros may take its place (--no-t5)

    @property
    def family(self) -> str:
        return "t5" if self.kind.lower().startswith("t5") else "clip"


def alone(contexts: list[Tensor]) -> Tensor:
    """The context of the only encoder that gives one."""
    return contexts[0]


def side_by_side(contexts: list[Tensor]) -> Tensor:
    """Each (B, L, D_i) -> (B, L, sum of D_i)."""
    return torch.cat(contexts, dim=-1)


def clip_then_t5(contexts: list[Tensor]) -> Tensor:
    """CLIPs (B, L, D_i) and T5's (B, M, D) -> (B, L + M, D): the CLIPs side by side, with zeros up to T5's
    width, then T5's tokens (Esser et al. 2024, arXiv:2403.03206, figure 2)."""
    clip = side_by_side(contexts[:-1])
    t5 = contexts[-1]
    return torch.cat([F.pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5], dim=1)


class Recipe(NamedTuple):
    """What a published model takes of its encoders. Pooled vectors are concatenated in the order of parts."""
    parts: tuple[Part, ...]
    join: Callable[[list[Tensor]], Tensor]
    masked: bool = False       # whether padding is hidden from encoder and network, or read by both,
    zeroed: bool = False       # or hidden from the encoder, while the network reads zeros in its place
    null_zeros: bool = False   # the null condition: zeros, or the outputs for the empty prompt


def flux(tokens: int) -> Recipe:
    return Recipe((Part("CLIP-L", "text_encoder", "tokenizer", 77, None, PLAIN),
                   Part("T5-XXL", "text_encoder_2", "tokenizer_2", tokens, LAST)), alone)


RECIPES: dict[str, Recipe] = {
    "clip": Recipe((Part("clip", "text_encoder", "tokenizer", 77, BEFORE, EITHER),), alone, masked=True),
    "t5": Recipe((Part("t5", "text_encoder_3", "tokenizer_3", 77, LAST),), alone, masked=True),
    "sd1": Recipe((Part("CLIP-L", "text_encoder", "tokenizer", 77, LAST),), alone),
    "sd2": Recipe((Part("OpenCLIP-H", "text_encoder", "tokenizer", 77, LAST),), alone),
    "sdxl": Recipe((Part("CLIP-L", "text_encoder", "tokenizer", 77, BEFORE),
                    Part("OpenCLIP-G", "text_encoder_2", "tokenizer_2", 77, BEFORE, PROJECTED)),
                   side_by_side, null_zeros=True),
    "sd3": Recipe((Part("CLIP-L", "text_encoder", "tokenizer", 77, BEFORE, PROJECTED),
                   Part("OpenCLIP-G", "text_encoder_2", "tokenizer_2", 77, BEFORE, PROJECTED),
                   Part("T5-XXL", "text_encoder_3", "tokenizer_3", 256, LAST, optional=True)), clip_then_t5),
    "flux-dev": flux(512),
    "flux-schnell": flux(256),
    "stable-audio": Recipe((Part("T5-base", "text_encoder", "tokenizer", 128, LAST),), alone, zeroed=True,
                           null_zeros=True),
}
WITHOUT_T5 = tuple(name for name, row in RECIPES.items() if any(part.optional for part in row.parts))
SIZE_FEATURES = 256            # sinusoids of each of XL's six numbers


def with_sizes(pooled: Tensor, sizes: Tensor) -> Tensor:
    """XL's vector for `add_embedding` of the U-Net: pooled (B, P), then the sinusoids of six numbers, (B, 6)
    or (6,): height and width of the original picture, top and left of the crop, height and width of the
    target, in pixels -> (B, P + 6 * 256) (Podell et al. 2023, arXiv:2307.01952, section 2.2)."""
    sizes = sizes.to(pooled.device).expand(len(pooled), 6).float()
    sinusoids = timestep_embedding(sizes.flatten(), SIZE_FEATURES, scale=1.0)            # (B * 6, 256)
    return torch.cat([pooled, sinusoids.view(len(pooled), -1).to(pooled.dtype)], dim=-1)


def count_parameters(part: Part) -> int:
    """How many weights the encoder of a part has, from CONFIGS alone."""
    c = CONFIGS[part.kind]
    if part.family == "t5":              # RMS norms, no biases, and one table of relative positions
        inner = c["num_heads"] * c["d_kv"]
        matrices = 3 if c["feed_forward_proj"].startswith("gated") else 2
        layer = 4 * c["d_model"] * inner + matrices * c["d_model"] * c["d_ff"] + 2 * c["d_model"]
        return (c["vocab_size"] + 1) * c["d_model"] + c["num_layers"] * layer + 32 * c["num_heads"]
    width, hidden = c["hidden_size"], c["intermediate_size"]
    layer = 4 * (width + 1) * width + (width + 1) * hidden + (hidden + 1) * width + 4 * width
    tables = (c["vocab_size"] + c["max_position_embeddings"]) * width
    projection = width * c["projection_dim"] if part.pooled in (PROJECTED, EITHER) else 0
    return tables + c["num_hidden_layers"] * layer + 2 * width + projection


# ---- encoding

@dataclass
class Encoder:
    """One part of a recipe, loaded. Without a model, its tokens are zeros of this width."""
    part: Part
    model: nn.Module | None = None
    tokenizer: object = None
    tokens: int = 0
    pad: int = 0                         # the token that fills up a prompt
    width: int = 0
    stage: AbstractContextManager = nullcontext()      # within which the model works

    def rest(self, prompt: str) -> str:
        """The part of a prompt that is not read; empty if it fits."""
        if self.model is None:
            return ""
        ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        room = self.tokens - self.tokenizer.num_special_tokens_to_add()
        return self.tokenizer.decode(ids[room:]) if len(ids) > room else ""

    def tokenize(self, prompts: list[str], masked: bool) -> tuple[Tensor, Tensor]:
        """-> ids (B, L) and their mask. L is the longest of the prompts where padding is masked, and else
        always `tokens`."""
        rows = self.tokenizer(prompts, truncation=True, max_length=self.tokens)["input_ids"]
        lengths = torch.tensor([len(row) for row in rows])
        longest = int(lengths.max()) if masked else self.tokens
        ids = torch.tensor([[*row, *[self.pad] * (longest - len(row))] for row in rows])
        return ids, torch.arange(longest) < lengths[:, None]

    def __call__(self, prompts: list[str], masked: bool, zeroed: bool = False) -> dict[str, Tensor]:
        """-> those of context, mask and pooled that the part gives. masked, zeroed: as in a recipe."""
        if self.model is None:
            return {"context": torch.zeros(len(prompts), self.tokens, self.width)}
        with self.stage:
            ids, mask = (part.to(self.model.device) for part in self.tokenize(prompts, masked))
            out = self.model(input_ids=ids, attention_mask=mask.long() if masked or zeroed else None,
                             output_hidden_states=self.part.layer == BEFORE)
        found = {}
        if self.part.layer is not None:
            found["context"] = out.hidden_states[-2] if self.part.layer == BEFORE else out.last_hidden_state
        if masked or zeroed:
            found["context"] = found["context"] * mask[..., None]
        if masked:
            found["mask"] = mask
        if self.part.pooled is not None:
            is_projected = self.part.pooled != PLAIN and "text_embeds" in out
            found["pooled"] = out.text_embeds if is_projected else out.pooler_output
        return found


class FrozenTextEncoder:
    """The encoders of a recipe as one, made by `from_folder` or `from_states`.

    null_zeros: the null condition is zeros; else the outputs for the empty prompt. empty_is_null: the empty
    prompt is the null condition too, as in runs of our own."""

    def __init__(self, name: str, encoders: list[Encoder], null_zeros: bool | None = None,
                 empty_is_null: bool = False, folders: tuple[str, ...] = ()):
        self.name = name
        self.recipe = RECIPES[name]
        self.encoders = encoders
        self.null_zeros = self.recipe.null_zeros if null_zeros is None else null_zeros
        self.empty_is_null = empty_is_null
        self.folders = folders           # that were read

    @property
    def models(self) -> list[nn.Module]:
        return [encoder.model for encoder in self.encoders if encoder.model is not None]

    @property
    def device(self) -> torch.device:
        return self.models[0].device

    def to(self, device: torch.device | str) -> FrozenTextEncoder:
        for model in self.models:
            model.to(device)
        return self

    def truncated(self, prompt: str) -> dict[str, str]:
        """The part of a prompt beyond the limit, which is not read, by the encoder that loses it. Empty if
        the prompt fits."""
        several = len({encoder.part.family for encoder in self.encoders}) > 1
        found: dict[str, str] = {}
        for encoder in self.encoders:    # XL's and SD 3's CLIPs have one vocabulary and one limit
            rest = encoder.rest(prompt)
            if rest:
                found.setdefault(encoder.part.family.upper() if several else "the encoder", rest)
        return found

    @torch.no_grad()
    def __call__(self, prompts: list[str | None]) -> dict[str, Tensor]:
        """-> context (B, L, D), and mask (B, L) and pooled (B, P) where the recipe has them, on the encoders'
        device and in their precision."""
        texts = [prompt or "" for prompt in prompts]
        outputs = [encoder(texts, self.recipe.masked, self.recipe.zeroed) for encoder in self.encoders]
        contexts = [out["context"].to(self.device) for out in outputs if "context" in out]
        # The zeros of an encoder that is not there take the precision of those that are.
        cond = {"context": self.recipe.join([context.to(contexts[0].dtype) for context in contexts])}
        if self.recipe.masked:
            cond["mask"] = outputs[0]["mask"]
        pooled = [out["pooled"] for out in outputs if "pooled" in out]
        if pooled:
            cond["pooled"] = torch.cat(pooled, dim=-1)

        absent = [prompt is None or (self.empty_is_null and not prompt) for prompt in prompts]
        if self.null_zeros and any(absent):
            for name in cond.keys() - {"mask"}:
                cond[name][torch.tensor(absent, device=self.device)] = 0
        return cond


# ---- loading

def from_folder(name: str, path: str | dict[str, str], device: torch.device | str = "cpu", *,
                dtype: torch.dtype | None = torch.float32, tokenizers: list[str] | None = None,
                **options) -> FrozenTextEncoder:
    """RECIPES[name] from a pipeline's folder; from an encoder's folder with its tokenizer, where the recipe
    has one encoder; or from such a folder for each part: {"text_encoder": ..., "text_encoder_2": ...}.

    dtype: of the weights and outputs; None: as in the files. In half precision, T5 may overflow, and a CPU is
    slower. tokenizers: folders to look in instead. options: those of `build`. No code that lies in a folder
    is run. Raises ValueError with a line for the user."""
    chosen = parts_of(name, options.get("no_t5", False))
    several = len(RECIPES[name].parts) > 1
    separate = isinstance(path, dict)
    folders = {}
    for part in chosen:                  # a wrong path is reported before a missing package
        folder = path.get(part.folder) if separate else subfolder(path, part.folder, not several)
        if not os.path.isfile(f"{folder}/config.json"):
            what = f"{part.folder} (its {part.kind})" if several else "text encoder"
            remedy = ", or leave T5 out by --no-t5" if part.optional else ""
            raise ValueError(f"{name}:{folder if separate else path}: no {what} there; give a folder with "
                             f"its config.json{remedy}")
        folders[part.folder] = folder
    places = {key: tokenizers or [folder if separate else path] for key, folder in folders.items()}
    index = f"{path}/model_index.json"
    if RECIPES[name].null_zeros and os.path.isfile(index):
        try:
            with open(index, encoding="utf-8") as file:
                zeros = dict(json.load(file)).get("force_zeros_for_empty_prompt", True)
        except (ValueError, TypeError):
            raise ValueError(f"{index}: damaged; download it again") from None
        options.setdefault("null_zeros", zeros)
    first = next(iter(path.values())) if separate else path

    def load(part: Part) -> nn.Module:
        return load_encoder(part, folders[part.folder], dtype)

    return build(name, f"{name}:{first}", load, places, device, folders=tuple(folders.values()), **options)


def from_states(name: str, states: dict[str, dict[str, Tensor]], tokenizers: list[str],
                device: torch.device | str = "cpu", *, dtype: torch.dtype | None = None,
                **options) -> FrozenTextEncoder:
    """RECIPES[name] from weights alone, by the names of the package transformers: {"text_encoder": {...},
    ...}. They are used as they are, without a copy, unless dtype is another than theirs. tokenizers: folders,
    as a file of weights has none: of a pipeline, or one for CLIP and one for T5. options: those of `build`.
    Raises ValueError with a line for the user."""
    chosen = parts_of(name, options.get("no_t5", False))
    for part in chosen:
        if part.folder not in states:
            remedy = ", or leave T5 out by --no-t5" if part.optional else ""
            raise ValueError(f"{name}: these weights have no {part.folder} (its {part.kind}); give a file or "
                             f"a folder that has it{remedy}")
    if not tokenizers:
        raise no_tokenizer(name, chosen)

    def load(part: Part) -> nn.Module:
        return encoder_of(part, states[part.folder], dtype)

    return build(name, name, load, {part.folder: tokenizers for part in chosen}, device, **options)


def no_tokenizer(name: str, chosen: list[Part]) -> ValueError:
    """The error for weights of these parts without a tokenizer."""
    families = dict.fromkeys(part.family.upper() for part in chosen)
    folders = "FOLDER"
    if len(families) > 1:
        folders = " ".join(f"{family}-FOLDER" for family in families)
    return ValueError(f"{name}: a file of weights has no tokenizer; give its folder by --tokenizer {folders}")


def belongs(part: Part, state: dict[str, Tensor]) -> bool:
    """Whether these are the weights of a part's encoder: a T5 or a CLIP, by the names of transformers or of
    OpenCLIP, of the part's width. Three CLIPs differ in nothing else that a name would show."""
    tables = ("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight",
              "token_embedding.weight")
    width = "hidden_size"
    if part.family == "t5":
        tables = ("shared.weight", "encoder.embed_tokens.weight")
        width = "d_model"
    found = [state[name].shape[-1] for name in tables if name in state]
    return found[:1] == [CONFIGS[part.kind][width]]


def kinds_in(state: dict[str, Tensor]) -> list[str]:
    """The keys of CONFIGS whose weights these may be."""
    parts = {part.kind: part for recipe in RECIPES.values() for part in recipe.parts if part.kind in CONFIGS}
    return [kind for kind, part in parts.items() if belongs(part, state)]


def parts_of(name: str, no_t5: bool) -> list[Part]:
    """The parts of a recipe that are to be loaded."""
    if no_t5 and name not in WITHOUT_T5:
        raise ValueError(f"--no-t5: {name} was not trained to do without; only {', '.join(WITHOUT_T5)} was")
    return [part for part in RECIPES[name].parts if not (no_t5 and part.optional)]


def build(name: str, what: str, load: Callable[[Part], nn.Module], tokenizers: dict[str, list[str]],
          device: torch.device | str, *, no_t5: bool = False, t5_tokens: int | None = None, width: int = 4096,
          null_zeros: bool | None = None, empty_is_null: bool = False,
          folders: tuple[str, ...] = ()) -> FrozenTextEncoder:
    """load: makes the model of a part. tokenizers: the folders to look in for each. no_t5: zeros of this
    width take T5's place. t5_tokens: in place of the recipe's. what: begins messages."""
    try:
        import transformers
    except ImportError:
        raise ValueError(f"{what}: needs the package transformers (pip install transformers)") from None
    transformers.utils.logging.set_verbosity_error()     # what it reports is checked below
    transformers.utils.logging.disable_progress_bar()
    recipe = RECIPES[name]
    encoders = []
    for part in recipe.parts:
        tokens = t5_tokens if t5_tokens and part.family == "t5" else part.tokens
        if no_t5 and part.optional:
            encoders.append(Encoder(part, tokens=tokens, width=width))
            continue
        its = f"its {part.folder} " if len(recipe.parts) > 1 else ""
        try:
            tokenizer, place = find_tokenizer(part, tokenizers[part.folder])
            model = load(part).to(device).eval().requires_grad_(False)
            check_tokenizer(part.family, tokenizer, model)
        except Exception as error:       # transformers raises a dozen types; all mean the same to the user
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            kind = f"an {part.kind}" if part.kind.startswith("O") else f"a {part.kind}"
            raise ValueError(f"{what}: {its}cannot be loaded as {kind} encoder with its tokenizer "
                             f"({why})") from None
        if part.family == "clip" or recipe.masked or recipe.zeroed:
            tokens = min(tokens, tokenizer.model_max_length)
        # With one vocabulary, CLIP pads with the end mark and OpenCLIP with token 0. A pipeline's tokenizers
        # are set up so; any other one may have been another model's.
        pad = tokenizer.pad_token_id
        if not place.endswith(f"/{part.tokenizer}") and part.kind in CONFIGS and part.family == "clip":
            pad = 0 if part.kind.startswith("Open") else tokenizer.eos_token_id
        encoders.append(Encoder(part, model, tokenizer, tokens, pad, width))
        folders += (place,)
    return FrozenTextEncoder(name, encoders, null_zeros, empty_is_null, tuple(dict.fromkeys(folders)))


def subfolder(path: str, name: str, or_itself: bool = True) -> str:
    """The subfolder of that name if the folder is a pipeline's; else the folder itself."""
    return f"{path}/{name}" if os.path.isdir(f"{path}/{name}") or not or_itself else path


# What config.json calls an encoder of each kind. A whole CLIP contains its text encoder; mT5 is a T5.
MODEL_TYPES = {"clip": ("clip_text_model", "clip"), "t5": ("t5", "mt5")}
# Of transformers, what visits a device alone where there is no room for all.
BLOCKS = ("CLIPEncoderLayer", "T5Block")
# Files of which one group must be there: without them, transformers makes up an empty vocabulary.
TOKENIZER_FILES = {"clip": (("tokenizer.json",), ("vocab.json", "merges.txt")),
                   "t5": (("tokenizer.json",), ("spiece.model",))}
# Begin and end marks of a prompt, which tell the two kinds of tokenizers apart.
SPECIAL_TOKENS = {"clip": 2, "t5": 1}


def find_tokenizer(part: Part, folders: list[str]) -> tuple[object, str]:
    """The tokenizer of a part and its folder: the first of these folders that has one of its kind, as a
    subfolder or itself; else one of another kind. Raises ValueError where there is none."""
    import transformers

    found, missing = [], []
    for folder in folders:
        place = subfolder(folder, part.tokenizer)
        groups = TOKENIZER_FILES[part.family]
        if not any(all(os.path.isfile(f"{place}/{name}") for name in names) for names in groups):
            needed = " or ".join(" with ".join(names) for names in groups)
            missing.append(f"no tokenizer in {place}, which needs {needed}")
            continue
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, local_files_only=True,
                                                               trust_remote_code=False)
        found.append((tokenizer, place))
        if tokenizer.num_special_tokens_to_add() == SPECIAL_TOKENS[part.family]:
            return found[-1]
    if not found:
        raise ValueError(missing[0])
    return found[0]


def check_tokenizer(family: str, tokenizer, model: nn.Module) -> None:
    """Raise ValueError where the tokenizer is another model's: its tokens would mean something else."""
    marks = tokenizer.num_special_tokens_to_add()
    known = model.get_input_embeddings().num_embeddings
    if marks != SPECIAL_TOKENS[family] or len(tokenizer) > known:
        raise ValueError(f"its tokenizer, of {len(tokenizer):,} tokens and {marks} marks, belongs to another "
                         f"model than this one of {known:,} tokens and {SPECIAL_TOKENS[family]} marks")


def model_class_of(part: Part, architectures: list[str] | None = None):
    import transformers

    if part.family == "t5":              # without the decoder, which text-to-image does not use
        return transformers.T5EncoderModel
    if part.pooled == PROJECTED or (part.pooled == EITHER and architectures != ["CLIPTextModel"]):
        return transformers.CLIPTextModelWithProjection
    return transformers.CLIPTextModel


def load_encoder(part: Part, folder: str, dtype: torch.dtype | None) -> nn.Module:
    """The model of the package transformers that the weights in a folder belong to. Raises ValueError for a
    folder of another kind of model, or without some of the weights."""
    import transformers

    with open(f"{folder}/config.json", encoding="utf-8") as file:
        config = json.load(file)
    if config.get("model_type") not in MODEL_TYPES[part.family]:
        raise ValueError(f"config.json names a model of type {config.get('model_type')!r}, not "
                         f"{' or '.join(MODEL_TYPES[part.family])}")
    # transformers would fetch an implementation of attention that is named like OWNER/NAME, and run it.
    attention = str([config.get("attn_implementation"), config.get("_attn_implementation")])
    if "/" in attention or "auto_map" in config:
        raise ValueError("config.json asks for code from elsewhere, which is not run (auto_map or "
                         "attn_implementation)")
    version = [int(number) for number in transformers.__version__.split(".")[:2]]
    options = {"dtype" if version >= [4, 56] else "torch_dtype": dtype or "auto"}
    depth = CONFIGS.get(part.kind, {}).get("num_hidden_layers")
    if depth and config.get("num_hidden_layers", 0) > depth:       # a whole OpenCLIP-H
        options["num_hidden_layers"] = depth
    full = [f"{folder}/{stem}{end}" for stem in ("model.safetensors", "pytorch_model.bin")
            for end in ("", ".index.json")]
    if glob(f"{folder}/*.fp16*") and not any(map(os.path.isfile, full)):
        options["variant"] = "fp16"      # as many download it, without the files in full precision
    model, found = model_class_of(part, config.get("architectures")).from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, output_loading_info=True, **options)
    missing = sorted(found["missing_keys"])
    if missing:                          # transformers warns only, and leaves them random
        raise ValueError(f"{len(missing)} of its weights are missing, like {missing[0]}")
    return model


def encoder_of(part: Part, state: dict[str, Tensor], dtype: torch.dtype | None) -> nn.Module:
    """The model of a part with the weights of a state, which it holds without a copy. Raises ValueError where
    they are not all there, or another kind's."""
    model_class = model_class_of(part)
    with torch.device("meta"):           # shapes without memory
        model = model_class(model_class.config_class(**CONFIGS[part.kind]))
    own = model.state_dict()
    # Versions of transformers differ in whether CLIP's names begin so.
    given = {name.removeprefix("text_model."): weight for name, weight in state.items()}
    if part.kind == "CLIP-L" and part.pooled == PROJECTED:
        # The authors of SD 3 take CLIP-L's vector as it is, also where a file has the projection.
        weight = given["final_layer_norm.weight"]
        given["text_projection.weight"] = torch.eye(len(weight), dtype=weight.dtype)
    if part.family == "t5":
        given.setdefault("encoder.embed_tokens.weight", given.get("shared.weight"))
    weights = {name: given.get(name.removeprefix("text_model.")) for name in own}
    missing = [name for name, weight in weights.items() if weight is None]
    if missing:
        raise ValueError(f"{len(missing)} of its weights are missing, like {missing[0]}")
    for name, weight in weights.items():
        if weight.shape != own[name].shape:
            raise ValueError(f"{name} is of shape {tuple(weight.shape)}, not {tuple(own[name].shape)}")
    model.load_state_dict(weights, assign=True)
    for module in model.modules():       # a table that is not among the weights
        if isinstance(getattr(module, "position_ids", None), Tensor):
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
    if part.family == "t5":
        model.set_input_embeddings(model.shared)
    chosen = dtype or model.get_input_embeddings().weight.dtype
    if chosen.itemsize == 1:             # float8 is for storage only; T5 overflows in float16
        chosen = torch.bfloat16
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()               # the largest sums of T5
    for name, weight in model.named_parameters():
        is_kept = chosen == torch.float16 and set(name.split(".")) & set(kept)
        weight.data = weight.data.to(torch.float32 if is_kept else chosen)
    return model


def demo() -> None:
    """Print what a network gets of each recipe."""
    print("recipe        context (L, D)   pooled   encoders")
    for name, recipe in RECIPES.items():
        kinds = ", ".join(part.kind for part in recipe.parts)
        configs = [CONFIGS.get(part.kind) for part in recipe.parts]
        if None in configs:
            print(f"{name:13s} as its folder has it       {kinds}")
            continue
        widths = [config.get("hidden_size") or config["d_model"] for config in configs]
        contexts = [torch.empty(1, part.tokens, width, device="meta")        # shapes without memory
                    for part, width in zip(recipe.parts, widths) if part.layer]
        pooled = sum(width for part, width in zip(recipe.parts, widths) if part.pooled)
        shape = tuple(recipe.join(contexts).shape[1:])
        print(f"{name:13s} {str(shape):14s} {pooled or '-':>8}   {kinds}")
    vector = with_sizes(torch.zeros(1, 1280), torch.tensor([1024, 1024, 0, 0, 1024, 1024]))
    print(f"sdxl's pooled vector with the six numbers of size and crop: {vector.shape[1]}")


if __name__ == "__main__":
    demo()
