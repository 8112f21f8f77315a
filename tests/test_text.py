"""text.py: bytes to vectors, frozen encoders, and the networks that are conditioned on them."""

import shutil
import sys

import pytest
import torch
from conftest import change_json, in_precision

import mmdit
import text
import unet

SMALL = dict(width=32, depth=2, heads=2)
PROMPTS = ["", "a red circle", "ein grüner Kreis, 緑の円, 🟢"]


def encoder():
    torch.manual_seed(0)
    model = text.TextEncoder(text.TextConfig(**SMALL)).eval()
    torch.nn.init.normal_(model.embedding.weight)
    return model


def test_words_are_bytes():
    """Only capitals are lost: any script, any run of spaces and words of any length come back."""
    long = "antidisestablishmentarianism  緑の円、赤い四角、青い三角形"
    ids, mask = text.tokenize([*PROMPTS, long], limit=100)
    for row, keep, prompt in zip(ids, mask, [*PROMPTS, long]):
        letters = row[keep]
        assert letters[0].tolist() == [text.START] + [text.PAD] * (text.WORD - 1)
        assert bytes(letters[1:][letters[1:] != text.PAD].tolist()) == (
            f" {prompt}".lower().encode() if prompt else b"")
        assert (row[~keep] == text.PAD).all()
    assert mask.sum(1).tolist()[:2] == [1, 4]                     # START alone; START a red circle
    red, circle = text.tokenize(["RED circle", "circle red"], 9)[0][:, 1:]
    assert torch.equal(red, circle.flip(0))                       # the same word in either place
    assert text.split_words(" \n") == [] == text.split_words("")


def test_truncated_text_is_reported():
    model = text.TextEncoder(text.TextConfig(**SMALL, limit=3))
    assert model.truncated("one two three") == ""
    assert model.truncated("one two three four five") == "four five"
    assert model.truncated("緑" * 40) == "緑" * 24 and text.tokenize(["a " * 50], 3)[1].shape == (1, 4)
    with torch.no_grad():
        torch.testing.assert_close(model(["one two three four"]), model(["one two three"]), rtol=0, atol=0)


@torch.no_grad()
def test_padding_changes_no_prompt():
    """Alone or beside a longer one, from the first layer to the last."""
    model = encoder()
    together = model(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        alone, length = model([prompt]), len(text.split_words(prompt)) + 1
        torch.testing.assert_close(together["context"][i, :length], alone["context"][0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(together["pooled"][i], alone["pooled"][0], atol=1e-6, rtol=1e-5)
        assert not together["context"][i, length:].any() and not together["mask"][i, length:].any()


@torch.no_grad()
def test_order_and_letters_matter():
    model = encoder()
    a, b, c, d = model(["red left of blue", "blue left of red", "red left of bluf",
                        "red left of lbue"])["pooled"]
    assert min((a - other).norm() for other in (b, c, d)) > 1e-3 * a.norm()
    torch.testing.assert_close(model(["RED Left of blue"])["pooled"][0], a)


def network(kind):
    torch.manual_seed(1)
    if kind == "unet":
        model = unet.UNet(unet.UNetConfig(widths=(32, 32), context_width=32, pooled_width=32, groups=8,
                                          attention=(True, True), positions=True))
    else:
        depth = {"mmdit": dict(depth=2), "single": dict(depth=1, single_depth=2)}[kind]
        model = mmdit.MMDiT(mmdit.MMDiTConfig(width=32, heads=2, context_width=32, pooled_width=32,
                                              rope=(4, 6, 6), **depth))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model.double().eval(), ("context", "mask", "pooled")


@pytest.mark.parametrize("kind", ["unet", "mmdit", "single"])
@torch.no_grad()
def test_networks_do_not_see_padding(kind):
    model, names = network(kind)
    words, x, t = encoder().double(), torch.randn(1, 4, 8, 8, dtype=torch.float64), torch.tensor([0.3])
    short = words(["a red circle"])
    both = words(["something quite a bit longer", "a red circle"])
    padded = {name: value[1:] for name, value in both.items()}
    outs = [model(x, t, **{name: c[name] for name in names})
            for c in (short, padded, words(["a red square"]))]
    torch.testing.assert_close(outs[1], outs[0], atol=1e-6, rtol=0)
    assert (outs[2] - outs[0]).abs().max() > 1e-5


def test_the_encoder_is_trained_through_the_network():
    words, (model, names) = encoder().train(), network("mmdit")
    model.float()
    cond = words(["a red circle", "blue"])
    out = model(torch.randn(2, 4, 8, 8), torch.rand(2), **{name: cond[name] for name in names})
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in words.parameters())


# ---- frozen encoders

@pytest.mark.optional
@torch.no_grad()
def test_frozen_clip(published):
    import transformers

    encoder = text.FrozenTextEncoder("clip", str(published / "clip"))
    model = transformers.CLIPTextModelWithProjection.from_pretrained(published / "clip").eval()
    together = encoder(["a red circle", "blue", ""])
    for i, prompt in enumerate(["a red circle", "blue", ""]):
        ids = encoder.tokenizer(prompt, return_tensors="pt")["input_ids"]
        want = model(ids, output_hidden_states=True)
        n = ids.shape[1]
        assert together["mask"][i].tolist() == [j < n for j in range(together["mask"].shape[1])]
        torch.testing.assert_close(together["context"][i, :n], want.hidden_states[-2][0], atol=1e-5,
                                   rtol=1e-4)
        torch.testing.assert_close(together["pooled"][i], want.text_embeds[0], atol=1e-5, rtol=1e-4)
    assert together["pooled"].shape == (3, 12)
    assert text.FrozenTextEncoder("clip", str(published / "sd1"))(["blue"])["pooled"].shape == (1, 16)
    assert encoder.truncated("a red circle") == "" and encoder.truncated(
        "a red circle left of a blue square") == "quare"           # 22 letters and two marks are 24 tokens


@pytest.mark.optional
@torch.no_grad()
def test_frozen_t5(published):
    import transformers

    encoder = text.FrozenTextEncoder("t5", str(published / "t5"))
    model = transformers.T5EncoderModel.from_pretrained(published / "t5").eval()
    together = encoder(["a red circle", "blue"])
    assert set(together) == {"context", "mask"} and together["mask"].sum(1).tolist() == [4, 2]
    want = model(encoder.tokenizer("blue", return_tensors="pt")["input_ids"]).last_hidden_state
    torch.testing.assert_close(together["context"][1, :2], want[0], atol=1e-5, rtol=1e-4)
    assert not together["context"][1, 2:].any()


def test_a_folder_without_an_encoder_is_refused(tmp_path, monkeypatch):
    """Also where the package is missing: installing it would not help."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    for kind in ("clip", "t5"):
        with pytest.raises(ValueError, match="no text encoder there"):
            text.FrozenTextEncoder(kind, str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="needs the package transformers .pip install transformers."):
        text.FrozenTextEncoder("clip", str(tmp_path))


@pytest.mark.optional
def test_a_damaged_encoder_is_refused(published, tmp_path):
    with pytest.raises(ValueError, match="no text encoder there"):
        text.FrozenTextEncoder("clip", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be loaded as a t5 encoder"):
        text.FrozenTextEncoder("t5", str(tmp_path))


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
        text.FrozenTextEncoder(kind, str(folder))
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
            text.FrozenTextEncoder(kind, str(folder))


@pytest.mark.optional
def test_no_code_of_a_tokenizers_folder_is_run(published, tmp_path, monkeypatch):
    """Whether the tokenizer loads without that code or is refused, nobody is asked and nothing is run."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    folder = tmp_path / "encoder"
    shutil.copytree(published / "clip", folder)
    with_code(folder, "tokenizer_config.json", "AutoTokenizer")
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]})
    try:
        text.FrozenTextEncoder("clip", str(folder))
    except ValueError as error:
        assert "\n" not in str(error)
    assert not (folder / "ran").exists()


@pytest.mark.optional
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_encoders_in_half_precision(published, tmp_path, kind, dtype):
    """float32 comes out, close to what the encoder in float32 returns."""
    want = text.FrozenTextEncoder(kind, str(published / kind))(["a red circle", ""])
    half = text.FrozenTextEncoder(kind, str(in_precision(published / kind, tmp_path / "half", dtype)))
    found = half(["a red circle", ""])
    assert half.model.get_input_embeddings().weight.dtype == torch.float32
    for name in want.keys() - {"mask"}:
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], want[name], atol=0.05, rtol=0.05)
        assert (found[name] != want[name]).any()                   # the weights were rounded
