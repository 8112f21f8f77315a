"""encoders.py: frozen encoders alone, and joined as the pipelines of diffusers, an independent
implementation, join them."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import change_json, in_precision, tiny_clip

import encoders

ONE = ["a red circle", "blue", ""]
LONG = "a red circle left of a blue square"                     # 29 letters, where 22 fit
PROMPTS = [*ONE, LONG]
NEGATIVE = ["square", LONG, "", "a"]


# ---- one encoder

@pytest.mark.optional
@torch.no_grad()
def test_frozen_clip(published):
    import transformers

    encoder = encoders.from_folder("clip", str(published / "clip"))
    model = transformers.CLIPTextModelWithProjection.from_pretrained(published / "clip").eval()
    together = encoder(["a red circle", "blue", ""])
    for i, prompt in enumerate(["a red circle", "blue", ""]):
        ids = encoder.encoders[0].tokenizer(prompt, return_tensors="pt")["input_ids"]
        want = model(ids, output_hidden_states=True)
        n = ids.shape[1]
        assert together["mask"][i].tolist() == [j < n for j in range(together["mask"].shape[1])]
        torch.testing.assert_close(together["context"][i, :n], want.hidden_states[-2][0], atol=1e-5,
                                   rtol=1e-4)
        torch.testing.assert_close(together["pooled"][i], want.text_embeds[0], atol=1e-5, rtol=1e-4)
    assert together["pooled"].shape == (3, 12)
    assert encoders.from_folder("clip", str(published / "sd1"))(["blue"])["pooled"].shape == (1, 16)
    assert encoder.truncated("a red circle") == {}
    assert encoder.truncated(LONG) == {"the encoder": "quare"}     # 22 letters and two marks are 24 tokens


@pytest.mark.optional
@torch.no_grad()
def test_frozen_t5(published):
    import transformers

    encoder = encoders.from_folder("t5", str(published / "t5"))
    model = transformers.T5EncoderModel.from_pretrained(published / "t5").eval()
    together = encoder(["a red circle", "blue"])
    assert set(together) == {"context", "mask"} and together["mask"].sum(1).tolist() == [4, 2]
    want = model(encoder.encoders[0].tokenizer("blue", return_tensors="pt")["input_ids"]).last_hidden_state
    torch.testing.assert_close(together["context"][1, :2], want[0], atol=1e-5, rtol=1e-4)
    assert not together["context"][1, 2:].any()


def test_a_folder_without_an_encoder_is_refused(tmp_path, monkeypatch):
    """Also where the package is missing: installing it would not help."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    for kind in ("clip", "t5"):
        with pytest.raises(ValueError, match="no text encoder there"):
            encoders.from_folder(kind, str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="needs the package transformers .pip install transformers."):
        encoders.from_folder("clip", str(tmp_path))


@pytest.mark.optional
def test_a_damaged_encoder_is_refused(published, tmp_path):
    with pytest.raises(ValueError, match="no text encoder there"):
        encoders.from_folder("clip", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be loaded as a t5 encoder"):
        encoders.from_folder("t5", str(tmp_path))


def without_weight(folder, name):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state[name]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def with_code(folder, file, kind):
    """The folder brings a Python file of its own, which leaves a trace when it is run."""
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Own:\n    pass\n")
    change_json(folder / file, auto_map={kind: "own.Own"})


PROJECTION, SHARED = "text_projection.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"
ODD_FOLDERS = [
    ("t5", "clip", None, "config.json names a model of type 'clip_text_model', not t5 or mt5"),
    ("clip", "t5", None, "config.json names a model of type 't5', not clip_text_model or clip"),
    ("clip", "clip", lambda f: change_json(f / "config.json", model_type="bert"), "of type 'bert', not clip"),
    ("clip", "clip", lambda f: without_weight(f, PROJECTION), "1 of its weights are missing, like text_proj"),
    ("t5", "t5", lambda f: without_weight(f, SHARED), "1 of its weights are missing, like encoder.block.0"),
    ("clip", "clip", lambda f: (f / "model.safetensors").write_bytes(b""), "cannot be loaded as a clip"),
    ("clip", "clip", lambda f: (f / "model.safetensors").unlink(), "cannot be loaded as a clip encoder"),
    ("clip", "clip", lambda f: [path.unlink() for path in (f / "tokenizer.json", f / "merges.txt")
                                if path.exists()], "no tokenizer in .* tokenizer.json or vocab.json with"),
    ("t5", "t5", lambda f: (f / "tokenizer.json").unlink(), "no tokenizer in .* tokenizer.json or spiece"),
    ("clip", "clip", lambda f: with_code(f, "config.json", "AutoModel"), "code from elsewhere"),
    ("clip", "clip", lambda f: change_json(f / "config.json", attn_implementation="someone/attention"),
     "code from elsewhere"),
    ("t5", "t5", lambda f: with_code(f, "config.json", "AutoConfig"), "code from elsewhere"),
]


@pytest.mark.optional
@pytest.mark.parametrize("kind, source, change, message", ODD_FOLDERS)
def test_a_folder_that_is_not_this_encoder_is_refused(published, tmp_path, kind, source, change, message):
    folder = tmp_path / "encoder"
    shutil.copytree(published / source, folder)
    if change:
        change(folder)
    with pytest.raises(ValueError, match=message) as refused:
        encoders.from_folder(kind, str(folder))
    assert str(refused.value).startswith(f"{kind}:{folder}: cannot be loaded as a {kind} encoder")
    assert "\n" not in str(refused.value) and not (folder / "ran").exists()


@pytest.mark.optional
def test_another_models_tokenizer_is_refused(published, tmp_path):
    for kind, other in (("clip", "t5"), ("t5", "clip")):
        folder = tmp_path / kind
        shutil.copytree(published / kind, folder)
        for file in published.joinpath(kind).iterdir():
            if file.name not in ("config.json", "model.safetensors"):
                (folder / file.name).unlink()
        for file in published.joinpath(other).iterdir():
            if file.name not in ("config.json", "model.safetensors"):
                shutil.copy(file, folder)
        with pytest.raises(ValueError, match="its tokenizer, of .* belongs to another model"):
            encoders.from_folder(kind, str(folder))


@pytest.mark.optional
def test_no_code_of_a_tokenizers_folder_is_run(published, tmp_path, monkeypatch):
    """Whether the tokenizer loads without that code or is refused, nobody is asked and nothing is run."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    folder = tmp_path / "encoder"
    shutil.copytree(published / "clip", folder)
    with_code(folder, "tokenizer_config.json", "AutoTokenizer")
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]})
    try:
        encoders.from_folder("clip", str(folder))
    except ValueError as error:
        assert "\n" not in str(error)
    assert not (folder / "ran").exists()


@pytest.mark.optional
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_encoders_in_half_precision(published, tmp_path, kind, dtype):
    """float32 comes out, close to what the encoder in float32 returns."""
    want = encoders.from_folder(kind, str(published / kind))(["a red circle", ""])
    half = encoders.from_folder(kind, str(in_precision(published / kind, tmp_path / "half", dtype)))
    found = half(["a red circle", ""])
    assert half.models[0].get_input_embeddings().weight.dtype == torch.float32
    for name in want.keys() - {"mask"}:
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], want[name], atol=0.05, rtol=0.05)
        assert (found[name] != want[name]).any()                   # the weights were rounded


# ---- recipes, against the pipelines

def theirs(name, pipe, prompts, negative=None, **more):
    """(context, pooled) of the prompts, and of the negative ones or the null condition."""
    if name.startswith("flux"):                              # guidance is an input of the network
        tokens = 512 if name == "flux-dev" else 256
        asked = [pipe.encode_prompt(part, None, "cpu", max_sequence_length=tokens)[:2]
                 for part in (prompts, negative or [""] * len(prompts))]
        return asked[0], asked[1]
    if name == "sd3":
        out = pipe.encode_prompt(prompts, None, None, "cpu", negative_prompt=negative, **more)
        return (out[0], out[2]), (out[1], out[3])
    if name == "sdxl":
        out = pipe.encode_prompt(prompts, None, "cpu", negative_prompt=negative)
        return (out[0], out[2]), (out[1], out[3])
    out = pipe.encode_prompt(prompts, "cpu", 1, True, negative_prompt=negative)
    return (out[0], None), (out[1], None)


def assert_same(ours, context, pooled):
    assert "mask" not in ours and ("pooled" in ours) == (pooled is not None)
    torch.testing.assert_close(ours["context"], context, atol=1e-5, rtol=0)
    if pooled is not None:
        torch.testing.assert_close(ours["pooled"], pooled, atol=1e-5, rtol=0)


SHAPES = {"sd1": (24, 16), "sd2": (24, 16), "sdxl": (24, 40), "sd3": (24 + 256, 40), "flux-dev": (512, 40),
          "flux-schnell": (256, 40)}


@pytest.mark.optional
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_a_recipe_is_what_the_pipeline_encodes(pipelines, name):
    """Prompts of different lengths in one batch, an empty one, one that is truncated, and negative ones."""
    pipe, folder = pipelines[name]
    ours = encoders.from_folder(name, folder)
    positive, negative = theirs(name, pipe, PROMPTS, NEGATIVE)
    assert positive[0].shape[1:] == SHAPES[name]
    assert_same(ours(PROMPTS), *positive)
    assert_same(ours(NEGATIVE), *negative)
    absent = theirs(name, pipe, PROMPTS)[1]
    assert_same(ours([None] * 4), *absent)
    assert_same(ours(PROMPTS[:2]), *(part if part is None else part[:2] for part in positive))
    assert (positive[0][0] - positive[0][1]).abs().max() > 0.1             # the prompts matter


@pytest.mark.optional
@torch.no_grad()
def test_the_null_condition_of_xl(pipelines, tmp_path):
    """Zeros for an absent prompt, the encoding of an empty one, unless model_index.json says otherwise."""
    pipe, folder = pipelines["sdxl"]
    ours = encoders.from_folder("sdxl", folder)
    null, empty = ours([None, "", "blue"]), ours([""])
    assert not null["context"][0].any() and not null["pooled"][0].any()
    torch.testing.assert_close(null["context"][1], empty["context"][0], atol=1e-6, rtol=0)
    assert null["context"][1:].any() and null["pooled"][1:].any()
    own = encoders.from_folder("sdxl", folder, empty_is_null=True)(["", "blue"])            # in our own runs
    assert not own["context"][0].any() and not own["pooled"][0].any() and own["context"][1].any()
    shutil.copytree(folder, tmp_path / "xl")
    (tmp_path / "xl/model_index.json").write_text(json.dumps({"force_zeros_for_empty_prompt": False}))
    other = encoders.from_folder("sdxl", str(tmp_path / "xl"))([None])
    torch.testing.assert_close(other, empty, atol=0, rtol=0)


@pytest.mark.optional
@torch.no_grad()
def test_without_t5(pipelines):
    """Zeros of the same shape, as the pipeline has them where T5 is not loaded."""
    pipe, folder = pipelines["sd3"]
    held, pipe.text_encoder_3 = pipe.text_encoder_3, None
    try:
        for tokens in (256, 40):
            positive, negative = theirs("sd3", pipe, PROMPTS, max_sequence_length=tokens)
            ours = encoders.from_folder("sd3", folder, no_t5=True, t5_tokens=tokens, width=40)
            assert_same(ours(PROMPTS), *positive)
            assert_same(ours([None] * 4), *negative)
            assert positive[0].shape == (4, 24 + tokens, 40) and not positive[0][:, 24:].any()
    finally:
        pipe.text_encoder_3 = held
    for name in ("flux-dev", "sdxl"):
        with pytest.raises(ValueError, match=f"--no-t5: {name} was not trained to do without; only sd3 was"):
            encoders.from_folder(name, folder, no_t5=True)


@pytest.mark.optional
@torch.no_grad()
def test_more_tokens_of_t5(pipelines):
    pipe, folder = pipelines["sd3"]
    ours = encoders.from_folder("sd3", folder, t5_tokens=300)
    long = " ".join(["a red circle"] * 90)                                    # 270 words
    assert_same(ours([long, "blue"]), *theirs("sd3", pipe, [long, "blue"], max_sequence_length=300)[0])
    assert set(ours.truncated(long)) == {"CLIP"} and ours.truncated(long)["CLIP"].startswith("ed circle a")
    short = encoders.from_folder("sd3", folder).truncated(long)
    assert short["T5"] == " ".join(long.split()[255:]) and ours.truncated("blue") == {}


@pytest.mark.optional
@torch.no_grad()
def test_encoders_from_folders_of_their_own(pipelines, tmp_path, published):
    """The network's parts may lie in different places, with a tokenizer in each or one for all."""
    folder = pipelines["sd3"][1]
    want = encoders.from_folder("sd3", folder)(PROMPTS)
    places = {}
    for i, name in enumerate(["text_encoder", "text_encoder_2", "text_encoder_3"]):
        places[name] = str(tmp_path / "abc"[i])
        shutil.copytree(f"{folder}/{name}", places[name])
        shutil.copytree(f"{folder}/tokenizer{name[12:]}", places[name], dirs_exist_ok=True)
    got = encoders.from_folder("sd3", places)(PROMPTS)
    clip_tokens = 24
    # OpenCLIP's padding is token 0 where the tokenizer is not the pipeline's own, here "x" there
    torch.testing.assert_close(got["context"][:, clip_tokens:], want["context"][:, clip_tokens:])
    torch.testing.assert_close(got["context"][:, :, :16], want["context"][:, :, :16])
    torch.testing.assert_close(got["pooled"], want["pooled"])
    del places["text_encoder_2"]
    with pytest.raises(ValueError, match=r"no text_encoder_2 \(its OpenCLIP-G\) there; give a folder with"):
        encoders.from_folder("sd3", places)


def test_paddings_of_one_vocabulary(published):
    """One CLIP tokenizer serves CLIP-L, which pads with the end mark, and OpenCLIP, with token 0."""
    parts = {"CLIP-L": 1, "OpenCLIP-H": 0, "OpenCLIP-G": 0}
    for name in ("sd1", "sd2", "sdxl"):
        folders = {part.folder: [str(published / "clip")] for part in encoders.RECIPES[name].parts}
        ours = encoders.build(name, name, lambda part: tiny_clip(0, 16, part.pooled is not None), folders,
                              "cpu")
        for encoder in ours.encoders:
            ids, mask = encoder.tokenize(["blue"], masked=False)
            assert ids.shape == (1, 24) and mask.sum() == 6
            assert (ids[~mask] == parts[encoder.part.kind]).all() and ids[0, 5] == 1


# ---- sizes

@pytest.mark.optional
@torch.no_grad()
def test_sizes_and_crop(published):
    """diffusers' U-Net of XL: the same vector before add_embedding, from the same six numbers."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UNet2DConditionModel(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        norm_num_groups=4, addition_embed_type="text_time", addition_time_embed_dim=encoders.SIZE_FEATURES,
        projection_class_embeddings_input_dim=12 + 6 * encoders.SIZE_FEATURES, cross_attention_dim=8)
    pooled, seen = torch.randn(2, 12), []
    theirs.add_embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    sizes = torch.tensor([[1024, 768, 0, 16, 1000, 750], [512, 512, 8, 0, 1024, 1024]])
    theirs(torch.randn(2, 4, 8, 8), 1, torch.randn(2, 3, 8),
           added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes})
    torch.testing.assert_close(encoders.with_sizes(pooled, sizes), seen[0], atol=2e-4, rtol=0)
    both = encoders.with_sizes(pooled, sizes[0])
    torch.testing.assert_close(both[0], encoders.with_sizes(pooled, sizes)[0])
    assert both.shape == (2, 12 + 1536) and torch.equal(both[0, 12:], both[1, 12:])
    angles = 1024 * 10000 ** (-torch.arange(128) / 128)                        # by the formula, height first
    torch.testing.assert_close(both[0, 12:140], angles.cos(), atol=1e-3, rtol=0)


# ---- from weights alone

def states_of(pipe):
    return {name: component.state_dict() for name, component in pipe.components.items()
            if name.startswith("text_encoder")}


@pytest.fixture
def tiny(monkeypatch):
    """A function that makes the configurations of a pipeline's encoders the known ones."""
    def take(name, pipe):
        for part in encoders.RECIPES[name].parts:
            config = getattr(pipe, part.folder).config.to_dict()
            monkeypatch.setitem(encoders.CONFIGS, part.kind, config)
    return take


@pytest.mark.optional
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_from_states(pipelines, tiny, name):
    """As from the folder, without a copy of the weights, whether CLIP's names begin with text_model or
    not."""
    pipe, folder = pipelines[name]
    tiny(name, pipe)
    states = states_of(pipe)
    want = encoders.from_folder(name, folder)(PROMPTS)
    for prefix in ("", "text_model."):
        renamed = {}
        for key, state in states.items():
            renamed[key] = {}
            for weight, value in state.items():
                bare = weight.removeprefix("text_model.")
                is_clip = bare.startswith(("embeddings", "encoder.layers", "final_layer_norm"))
                renamed[key][prefix + bare if is_clip else bare] = value
            if prefix:                       # T5's embedding is often stored once
                renamed[key].pop("encoder.embed_tokens.weight", None)
        ours = encoders.from_states(name, renamed, [folder])
        got = ours(PROMPTS)
        if name == "sd3":                    # whose authors do not project the vector of CLIP-L
            plain = encoders.from_folder("flux-dev", {"text_encoder": f"{folder}/text_encoder",
                                                      "text_encoder_2": f"{folder}/text_encoder_3"},
                                         tokenizers=[f"{folder}/tokenizer", f"{folder}/tokenizer_3"])
            torch.testing.assert_close(got["pooled"][:, :16], plain(PROMPTS)["pooled"])
            got["pooled"] = got["pooled"][:, 16:]
            want["pooled"] = want["pooled"][:, -24:]
        torch.testing.assert_close(got, want, atol=0, rtol=0)
        for key, model in zip(states, ours.models):
            shared = {weight.data_ptr() for weight in states[key].values()}
            held = {weight.data_ptr() for part, weight in model.named_parameters()
                    if "projection" not in part}
            assert held <= shared


@pytest.mark.optional
def test_states_in_half_precision(pipelines, tiny):
    """The precision of the file is kept; T5's largest sums, in float16, are not; float8 is only stored."""
    pipe, folder = pipelines["sd3"]
    tiny("sd3", pipe)
    want = encoders.from_states("sd3", states_of(pipe), [folder])(PROMPTS)
    for stored, dtype, computed in ((torch.bfloat16, None, torch.bfloat16),
                                    (torch.float16, None, torch.float16),
                                    (torch.float8_e4m3fn, None, torch.bfloat16),
                                    (torch.bfloat16, torch.float32, torch.float32)):
        states = {key: {name: weight.to(stored) for name, weight in state.items()}
                  for key, state in states_of(pipe).items()}
        ours = encoders.from_states("sd3", states, [folder], dtype=dtype)
        out = ours(PROMPTS)
        assert out["context"].dtype == out["pooled"].dtype == computed
        dtypes = {name: weight.dtype for name, weight in ours.models[2].named_parameters()}
        sums = {kind for name, kind in dtypes.items() if ".wo." in name}
        assert sums == ({torch.float32} if computed == torch.float16 else {computed})
        assert {kind for name, kind in dtypes.items() if ".wo." not in name} == {computed}
        if stored != torch.float8_e4m3fn:
            torch.testing.assert_close(out["context"].float(), want["context"], atol=0.2, rtol=0.1)


FULL = {"CLIP-L": 123_060_480, "OpenCLIP-H": 340_387_840, "OpenCLIP-G": 694_659_840, "T5-XXL": 4_762_310_656,
        "T5-base": 109_628_544}


@pytest.mark.optional
def test_full_size_encoders_have_the_published_numbers_of_weights():
    """As in the folders of SD 1.5, 2.1, XL and 3; on the meta device."""
    pytest.importorskip("transformers")
    parts = {part.kind: part for row in encoders.RECIPES.values() for part in row.parts}
    assert set(FULL) == set(encoders.CONFIGS) == set(parts) - {"clip", "t5"}
    for kind, count in FULL.items():
        part = parts[kind]._replace(pooled=encoders.PROJECTED if kind == "OpenCLIP-G" else encoders.PLAIN)
        with torch.device("meta"):
            model_class = encoders.model_class_of(part)
            model = model_class(model_class.config_class(**encoders.CONFIGS[kind]))
        assert sum(weight.numel() for weight in model.parameters()) == count
        built = encoders.encoder_of(part, model.state_dict(), None)
        assert {name: weight.shape for name, weight in built.named_parameters()} == {
            name: weight.shape for name, weight in model.named_parameters()}


@pytest.mark.optional
def test_a_whole_openclip_h_is_cut(pipelines, tiny, tmp_path, monkeypatch):
    """Of 24 layers, SD 2 normalises the last but one: the last is neither loaded nor missed."""
    pipe, folder = pipelines["sd2"]
    tiny("sd2", pipe)
    whole = tiny_clip(2, 16, False, depth=4, hidden_act="gelu")
    cut = tiny_clip(2, 16, False, hidden_act="gelu")
    cut.load_state_dict(whole.state_dict(), strict=False)
    shutil.copytree(folder, tmp_path / "whole")
    whole.save_pretrained(tmp_path / "whole/text_encoder")
    shutil.copytree(folder, tmp_path / "cut")
    cut.save_pretrained(tmp_path / "cut/text_encoder")
    want = encoders.from_folder("sd2", str(tmp_path / "cut"))(PROMPTS)
    torch.testing.assert_close(encoders.from_folder("sd2", str(tmp_path / "whole"))(PROMPTS), want)
    got = encoders.from_states("sd2", {"text_encoder": whole.state_dict()}, [folder])(PROMPTS)
    torch.testing.assert_close(got, want)


@pytest.mark.optional
def test_states_that_do_not_fit_are_refused(pipelines, tiny, tmp_path, published):
    pipe, folder = pipelines["sd3"]
    tiny("sd3", pipe)
    states = states_of(pipe)

    def refused(message, states=states, tokenizers=(folder,), name="sd3"):
        with pytest.raises(ValueError, match=message) as error:
            encoders.from_states(name, states, list(tokenizers))
        assert "\n" not in str(error.value)

    refused("sd3: a file of weights has no tokenizer; .* by --tokenizer CLIP-FOLDER T5-FOLDER", tokenizers=())
    two = {name: state for name, state in states.items() if name != "text_encoder_3"}
    refused(r"sd3: these weights have no text_encoder_3 \(its T5-XXL\); .* or leave T5 out by --no-t5", two)
    refused(r"these weights have no text_encoder_2 \(its OpenCLIP-G\); give a file or a folder that has it$",
            {"text_encoder": states["text_encoder"], "text_encoder_3": {}})
    swapped = states | {"text_encoder": states["text_encoder_2"]}
    refused(r"its text_encoder cannot be loaded as a CLIP-L .* is of shape \(54, 24\), not \(54, 16\)",
            swapped)
    refused("its text_encoder_2 cannot be .* of its weights are missing, like",
            states | {"text_encoder_2": states["text_encoder_3"]})
    lacking = dict(states["text_encoder_3"])
    del lacking["encoder.final_layer_norm.weight"]
    refused("1 of its weights are missing, like encoder.final_layer_norm.weight",
            states | {"text_encoder_3": lacking})
    refused("its text_encoder cannot be .* no tokenizer in .*, which needs tokenizer.json or vocab.json",
            tokenizers=[str(tmp_path)])
    refused("its text_encoder_3 cannot be .* belongs to another model than this one",
            tokenizers=[str(published / "clip")])
    # one for CLIP and one for T5, in any order
    both = [str(published / "t5"), str(published / "clip")]
    assert encoders.from_states("sd3", states, both).truncated("a red") == {}


@pytest.mark.optional
def test_folders_that_do_not_fit_are_refused(pipelines, tmp_path, published):
    folder = pipelines["sd3"][1]
    with pytest.raises(ValueError, match=r"flux-dev:.*: its text_encoder_2 cannot be loaded as a T5-XXL .*"
                                         "'clip_text_model', not t5 or mt5"):
        encoders.from_folder("flux-dev", folder, tokenizers=[str(published / "clip"), str(published / "t5")])
    with pytest.raises(ValueError, match=r"sd3:.*: no text_encoder_3 \(its T5-XXL\) there; give a folder"):
        encoders.from_folder("sd3", pipelines["sdxl"][1])
    shutil.copytree(folder, tmp_path / "sd3")
    shutil.rmtree(tmp_path / "sd3/tokenizer_2")
    with pytest.raises(ValueError, match="its text_encoder_2 cannot .*no tokenizer in .*/sd3, which needs"):
        encoders.from_folder("sd3", str(tmp_path / "sd3"))
    shutil.rmtree(tmp_path / "sd3/text_encoder")
    shutil.copytree(pipelines["sd1"][1] + "/text_encoder", tmp_path / "sd3/text_encoder")
    with pytest.raises(ValueError, match="its text_encoder cannot .* missing, like text_projection.weight"):
        encoders.from_folder("sd3", str(tmp_path / "sd3"))


@pytest.mark.optional
def test_files_of_a_half_precision_variant(pipelines, tmp_path):
    """model.fp16.safetensors alone, as many download it, and the precision of the files on request."""
    folder = pipelines["sdxl"][1]
    want = encoders.from_folder("sdxl", folder)(PROMPTS)
    shutil.copytree(folder, tmp_path / "xl")
    for part in ("text_encoder", "text_encoder_2"):
        shutil.rmtree(tmp_path / "xl" / part)
        half = in_precision(Path(folder) / part, tmp_path / "xl" / part, torch.float16)
        (half / "model.safetensors").rename(half / "model.fp16.safetensors")
    kept = encoders.from_folder("sdxl", str(tmp_path / "xl"), dtype=None)(PROMPTS)
    assert kept["context"].dtype == kept["pooled"].dtype == torch.float16
    single = encoders.from_folder("sdxl", str(tmp_path / "xl"))(PROMPTS)
    assert single["context"].dtype == torch.float32
    for found in (kept, single):
        torch.testing.assert_close(found["context"].float(), want["context"], atol=0.05, rtol=0.05)


@pytest.mark.optional
def test_encoders_move(pipelines):
    ours = encoders.from_folder("sd3", pipelines["sd3"][1])
    assert ours.to("meta") is ours and ours.device.type == "meta"
    assert all(weight.is_meta for model in ours.models for weight in model.parameters())


@pytest.mark.optional
@pytest.mark.parametrize("name", encoders.RECIPES)
def test_count_of_parameters(name):
    """Against the models of the package transformers, which take no memory on the meta device."""
    pytest.importorskip("transformers")
    for part in encoders.RECIPES[name].parts:
        if part.kind in encoders.CONFIGS:
            model_class = encoders.model_class_of(part)
            with torch.device("meta"):
                model = model_class(model_class.config_class(**encoders.CONFIGS[part.kind]))
            assert encoders.count_parameters(part) == sum(p.numel() for p in model.parameters())
