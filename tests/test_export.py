"""Exported weights: files that are read back, and folders with which diffusers (optional) draws the same."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import checkpoints
import dit
import export
import files
import mmdit
import names
import networks
import published
import unet
from samplers import ddim, euler, guided
from text import TextConfig
from vae import VAE, VAEConfig
from weights import load_weights

SIZE = (16, 16)                                            # of pictures; latents are 8 x 8
CLASSES = ["red", "green", "blue"]
SMALL_VAE = dict(widths=(8, 16), groups=4, latent_channels=4)
DIT = dict(width=32, depth=2, heads=2, num_classes=3, **dit.PUBLISHED_BLOCK)
UNET = dict(widths=(16, 32), layers=1, groups=8, attention=(False, True), num_classes=3)
TEXT_UNET = dict(UNET, num_classes=0, attention=(True, False), heads=(2, 4), context_width=24,
                 pooled_width=12, linear_projection=True)
SD3 = dict(width=32, depth=3, heads=2, context_width=24, pooled_width=12, qk_norm=False, rope=None,
           sincos=(4, 6), **mmdit.PUBLISHED_BLOCK)
FLUX = dict(width=32, depth=2, single_depth=2, heads=2, context_width=24, pooled_width=12, rope=(4, 6, 6),
            rope_theta=10000.0, guidance=True, **mmdit.PUBLISHED_BLOCK)
BYTES = {"encoder": "bytes", "config": asdict(TextConfig(width=24, depth=1, heads=2))}
OWN = {"encoder": "none"}
DDPM = {"name": "ddpm"}
RF = {"name": "rf"}
NETWORKS = {                                               # arch, config, objective, text
    "dit": ("dit", DIT, DDPM, None),
    "modern dit": ("dit", dict(width=32, depth=1, heads=2, conv=True, num_classes=3), RF, None),
    "unet": ("unet", UNET, DDPM, None),
    "text unet": ("unet", TEXT_UNET, DDPM, OWN),
    "sd3": ("mmdit", SD3, RF, OWN),
    "flux": ("mmdit", FLUX, RF, OWN),
    "bytes": ("mmdit", dict(width=32, depth=1, heads=2, rope=(4, 6, 6), context_width=24, pooled_width=24),
              RF, BYTES)}


def randomize(model, seed=0):
    """Random weights everywhere: layers that start at zero would hide differences behind them."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        around = 1.0 if p.ndim == 1 and "norm" in name and not name.endswith("bias") else 0.0
        with torch.no_grad():
            p.copy_(around + 0.2 * torch.randn(p.shape, generator=generator) / max(1, p[0].numel()) ** 0.25)
    return model.eval()


def make_vae(seed=0, **config):
    model = randomize(VAE(VAEConfig(**SMALL_VAE | config)), seed)
    channels = model.config.latent_channels
    model.set_latent_statistics(torch.linspace(-1, 2, channels), torch.linspace(0.05, 9, channels))
    return model.requires_grad_(False)


def write_run(folder, arch, config, objective, text=None, vae=None, size=SIZE, **more):
    """A run folder with random weights, of which the averaged ones differ from the raw ones."""
    folder.mkdir()
    model, ema = (randomize(networks.build_model(arch, config, text), seed) for seed in (1, 2))
    for state in (model, ema) if arch == "vae" else ():
        state.set_latent_statistics(torch.linspace(-1, 2, 4), torch.linspace(0.05, 9, 4))
    autoencoder = None if arch == "vae" else networks.pack_vae(vae or make_vae())
    data = {"source": "test", "size": list(size), "classes": [] if text or arch == "vae" else CLASSES}
    count = config.get("num_classes", 0)
    data["classes"] = [*data["classes"], *(f"class {i}" for i in range(3, count))][:count]
    torch.save({"arch": arch, "config": asdict(model.config), "objective": objective, "step": 7, "data": data,
                "text": text, "label_dropout": 0.1, "vae": autoencoder, "model": model.state_dict(),
                "ema": ema.state_dict(), "training": {"finished": True}} | more, folder / "checkpoint.pt")
    return str(folder)


def network_run(tmp_path, name, **more):
    arch, config, objective, text = NETWORKS[name]
    return write_run(tmp_path / "run", arch, config, objective, text, **more)


def rebuilt(checkpoint, weights="ema"):
    model = networks.build_model(checkpoint["arch"], checkpoint["config"], checkpoint["text"])
    return load_weights(model, checkpoint[weights], "test").eval().requires_grad_(False)


def conditions(config, n=2):
    """Conditions for this network, by name."""
    if getattr(config, "context_width", None) is None:
        return {"y": torch.tensor([1, config.num_classes])} if config.num_classes else {}
    cond = {"context": torch.randn(n, 5, config.context_width), "pooled": torch.randn(n, config.pooled_width)}
    if getattr(config, "guidance", False):
        cond["guidance"] = torch.tensor([3.5, 1.0])
    return cond


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def found(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


@pytest.fixture
def packaged(monkeypatch):
    """As where safetensors is installed, which these tests do not reach."""
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: True)


# ---- names and weights of diffusers, without it

@pytest.mark.parametrize("name", ["dit", "unet", "text unet", "sd3", "flux"])
def test_the_way_back_and_the_way_forward_are_inverse(name):
    """Names by the two tables alone, then whole states, bit for bit."""
    arch, config, _, _ = NETWORKS[name]
    model = randomize(networks.build_model(arch, config | {"channels": 6}))
    config, state = model.config, model.state_dict()
    if name == "dit":
        there, again, table = export.dit_to_diffusers(state, config), names.dit_weights, names.DIT_NAMES
    elif name in ("sd3", "flux"):
        there, again, table = export.mmdit_to_diffusers(state, config), names.mmdit_weights, names.MMDIT_NAMES
    else:
        there, again, table = export.unet_to_diffusers(state, config), names.unet_weights, names.UNET_NAMES
    parts = {key.replace(".qkv.", f".{part}.").replace(".linear1.", f".{part}.")
             for key in state for part in ("q", "k", "v")}
    for key in parts:
        assert names.rename(names.rename(key, table, back=True), table) == key
    result = again(there, config)
    if name == "dit":                                      # the table has more classes there
        table = result["y_embedder.embedding_table.weight"]
        null = state["y_embedder.embedding_table.weight"][3]
        assert len(table) == 1001 and all(torch.equal(row, null) for row in table[3:])
        result["y_embedder.embedding_table.weight"] = torch.cat([table[:3], table[1000:]])
    for key, weight in state.items():
        assert torch.equal(result[key], weight), key
    surplus = set(result) - set(state)
    assert all(".attn2." in key or ".norm2." in key for key in surplus)
    assert bool(surplus) == (name == "unet")               # cross-attention that does nothing
    for key in surplus:
        assert result[key].unique().tolist() == [1.0 if key.endswith("norm2.weight") else 0.0]


@pytest.mark.parametrize("by", [0.0, 1.0, -0.25])
@pytest.mark.parametrize("width", [16, 256])
def test_a_delayed_time_is_the_same_function(by, width):
    weight = torch.randn(8, width, dtype=torch.float64)
    time = torch.tensor([0.0, 1.0, 499.0, 999.0], dtype=torch.float64)
    frequencies = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2))

    def embedding(time):
        angles = time[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], 1)

    want = embedding(time + by) @ weight.T
    torch.testing.assert_close(embedding(time) @ export.delay_time(weight, by).T, want, rtol=0, atol=1e-10)
    assert (torch.equal(export.delay_time(weight, by), weight)) == (by == 0)
    assert by == 0 or distance(embedding(time) @ weight.T, want) > 0.01


@pytest.mark.parametrize("quant_conv", [True, False])
@pytest.mark.parametrize("attention", [True, False])
def test_the_scale_of_latents_moves_into_the_weights(quant_conv, attention):
    model = make_vae(quant_conv=quant_conv, attention=attention)
    folded = published.vae_from_weights(export.vae_to_diffusers(model), scale=1.0, groups=4)
    assert folded.config.quant_conv
    x, z = torch.randn(2, 3, *SIZE), torch.randn(2, 4, 8, 8)
    ours, theirs = model.encode(x), folded.encode(x)
    assert distance(theirs.mean, model.normalize(ours.mean)) < 1e-5
    assert distance(theirs.std, ours.std / model.latent_std.view(-1, 1, 1)) < 1e-5
    assert distance(folded.decode(z), model.decode(model.denormalize(z))) < 1e-5
    assert distance(folded.decode(z), model.decode(z)) > 0.1            # the statistics matter


# ---- files

@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_rebuilds_the_network_and_its_vae(tmp_path, name, raw):
    source = network_run(tmp_path, name)
    out = tmp_path / "weights.pt"
    export.main([source, str(out)] + ["--raw"] * raw)
    checkpoint = checkpoints.load_checkpoint(source)
    got = published.read_export(out)
    for key in ("arch", "config", "objective", "step", "text", "label_dropout"):
        assert got[key] == checkpoint[key], key
    assert got["data"]["size"] == [16, 16] and got["data"]["classes"] == checkpoint["data"]["classes"]
    assert got["vae"]["config"] == checkpoint["vae"]["config"]

    ours, again = rebuilt(checkpoint, "model" if raw else "ema"), rebuilt(got)
    torch.manual_seed(0)
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 1.0]), conditions(ours.config)
    assert torch.equal(ours(x, t, **cond), again(x, t, **cond))
    if name == "bytes":
        assert torch.equal(ours.text(["a cat"])["context"], again.text(["a cat"])["context"])
    vae, again = networks.unpack_vae(checkpoint["vae"]), networks.unpack_vae(got["vae"])
    assert torch.equal(vae.decode(vae.denormalize(x)), again.decode(again.denormalize(x)))


def test_what_a_file_holds(tmp_path):
    """fp32, contiguous, without the memory of neighbours; readable without this project's code."""
    source = network_run(tmp_path, "dit")
    checkpoint = torch.load(f"{source}/checkpoint.pt", weights_only=True)
    whole = torch.randn(100, 32, 32)                       # a view of a larger tensor, and one transposed
    checkpoint["ema"]["t_embedder.mlp.2.weight"] = whole[3].T
    torch.save(checkpoint, f"{source}/checkpoint.pt")
    export.main([source, str(tmp_path / "weights.pt")])
    content = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert set(content) == {"state_dict", "metadata"}
    assert all(isinstance(value, str) for value in content["metadata"].values())
    assert json.loads(content["metadata"]["objective"]) == DDPM
    for name, weight in content["state_dict"].items():
        assert weight.dtype == torch.float32 and weight.is_contiguous(), name
        assert weight.untyped_storage().nbytes() == 4 * weight.numel(), name
    names = set(checkpoint["ema"]) | {f"vae.{name}" for name in checkpoint["vae"]["state"]}
    assert set(content["state_dict"]) == names
    assert torch.equal(content["state_dict"]["t_embedder.mlp.2.weight"], whole[3].T)


@pytest.mark.optional
@pytest.mark.parametrize("name", ["dit", "bytes"])
def test_safetensors_holds_the_same(tmp_path, name):
    safetensors = pytest.importorskip("safetensors")
    source = network_run(tmp_path, name)
    for ending in (".pt", ".safetensors"):
        export.main([source, str(tmp_path / f"weights{ending}")])
    with safetensors.safe_open(tmp_path / "weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["arch"]) == NETWORKS[name][0] and file.metadata()["format"] == "pt"
    a, b = (published.read_export(tmp_path / f"weights{ending}") for ending in (".pt", ".safetensors"))
    assert a["ema"].keys() == b["ema"].keys() and a["vae"]["state"].keys() == b["vae"]["state"].keys()
    assert all(torch.equal(weight, b["ema"][key]) for key, weight in a["ema"].items())
    assert all(torch.equal(weight, b["vae"]["state"][key]) for key, weight in a["vae"]["state"].items())
    assert {key: a[key] for key in ("config", "data", "text")} | {"data": 0} == \
        {key: b[key] for key in ("config", "data", "text")} | {"data": 0}


@pytest.mark.parametrize("of", ["vae", "network"])
def test_an_exported_vae_keeps_its_scale(tmp_path, of):
    """Where a published file would be read, whose scale is assumed to be Stable Diffusion's."""
    if of == "vae":
        source = write_run(tmp_path / "run", "vae", SMALL_VAE | {"shortcut": True}, {"name": "vae"})
        want = checkpoints.load_vae(source)
    else:
        source = network_run(tmp_path, "unet")
        want = make_vae()
    export.main([source, str(tmp_path / "vae.pt")])
    for load in (published.load_vae, checkpoints.load_vae):
        got = load(tmp_path / "vae.pt")
        assert got.config == want.config and not got.training
        for name, weight in want.state_dict().items():
            assert torch.equal(got.state_dict()[name], weight), name


def test_an_export_replaces_an_export(tmp_path):
    first = network_run(tmp_path, "unet")
    export.main([first, str(tmp_path / "a.pt")])
    (tmp_path / "b.pt").symlink_to(tmp_path / "a.pt")
    old = (tmp_path / "a.pt").read_bytes()
    export.main([first, str(tmp_path / "b.pt"), "--raw"])               # the link is replaced, not followed
    assert (tmp_path / "a.pt").read_bytes() == old and not (tmp_path / "b.pt").is_symlink()
    export.main([first, str(tmp_path / "a.pt"), "--raw"])
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes() != old


# ---- refusals

@pytest.mark.parametrize("out, message", [
    ("weights.bin", r"weights.bin: must end in .safetensors or .pt, or in / to name a folder"),
    ("weights.pt/x.pt", "the folder .*weights.pt does not exist"),
    ("nowhere/weights.pt", "the folder .*nowhere does not exist"),
    ("full/", "full/: this folder is not empty; name a new one"),
    ("full", "full: this folder is not empty"),
    ("text", "text: there is a file or a link of that name"),
    ("text/", "text/: there is a file or a link of that name"),
    ("link/", "link/: there is a file or a link of that name"),
    ("folder.pt", "folder.pt: there is a folder of that name"),
    ("run/checkpoint.pt", "checkpoint.pt: there is a file of that name that is no export"),
    ("text.pt", "text.pt: there is a file of that name that is no export"),
    ("", "is empty"), (".", "name a new folder"), ("/", "name a new folder"),
    ("x" * 300, "300 bytes"),
    ("new/", "shortcut True: diffusers' AutoencoderKL has none.*OUT.pt"),
])
def test_places_that_are_refused(tmp_path, monkeypatch, packaged, out, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", "vae", SMALL_VAE | {"shortcut": True}, {"name": "vae"})
    for name in ("full", "folder.pt", "empty"):
        (tmp_path / name).mkdir()
    for name in ("full/kept", "text", "text.pt"):
        (tmp_path / name).write_text("kept")
    (tmp_path / "link").symlink_to("empty")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    names = found(tmp_path)
    with pytest.raises(ValueError, match=message) as refusal:
        export.main(["run", out])
    assert "\n" not in str(refusal.value)
    assert found(tmp_path) == names
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_read_only_place_is_refused(tmp_path, monkeypatch, packaged):
    source = network_run(tmp_path, "unet")

    def refuse(path):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(files, "fresh_file", refuse)
    for out in ("weights.pt", "out/"):
        with pytest.raises(ValueError, match=r"cannot be written \(Read-only file system\)"):
            export.main([source, f"{tmp_path}/{out}"])
    assert found(tmp_path) == ["run", "run/checkpoint.pt"]


@pytest.mark.parametrize("change, message", [
    ({"training": {"finished": False}}, r"run: this VAE is not finished \(step 7\); run its command again"),
    ({"training": None}, "this VAE is not finished"),
    ({"arch": "gan"}, "arch gan does not exist"),
    ({"config": {"depth_of_field": 1}}, "vae has no setting 'depth_of_field'"),
    ({"ema": {}}, "weights do not fit the network: missing"),
])
def test_runs_that_are_refused(tmp_path, packaged, change, message):
    source = write_run(tmp_path / "run", "vae", SMALL_VAE, {"name": "vae"})
    checkpoint = torch.load(f"{source}/checkpoint.pt", weights_only=True)
    torch.save(checkpoint | change, f"{source}/checkpoint.pt")
    for out in ("weights.pt", "weights/"):
        with pytest.raises(ValueError, match=message):
            export.main([source, f"{tmp_path}/{out}"])
    assert found(tmp_path) == ["run", "run/checkpoint.pt"]


@pytest.mark.parametrize("name, change, objective, message", [
    ("dit", {"norm": "rms"}, DDPM, "norm rms: diffusers' DiTTransformer2DModel has only layer"),
    ("dit", {"mlp": "swiglu"}, DDPM, "mlp swiglu"),
    ("dit", {"qk_norm": True}, DDPM, "qk_norm True"),
    ("dit", {"rope": True}, DDPM, "rope True"),
    ("dit", {"conv": True}, DDPM, "conv True"),
    ("dit", {"mlp_ratio": 2.0}, DDPM, "mlp_ratio 2.0"),
    ("dit", {"time_scale": -1.0, "time_offset": 1.0}, RF, "time_scale -1.0"),
    ("dit", {"patch": (2, 1)}, DDPM, "patch 2x1: diffusers has only squares"),
    ("dit", {"num_classes": 1001}, DDPM, "num_classes 1001: .* class 1000 as the null class"),
    ("dit", {}, DDPM, "time embedding: .* over 127, this network over 128; give --with-correction"),
    ("dit", {}, {"name": "rf", "prediction": "v"}, "prediction v on the straight path"),
    ("unet", {}, {"name": "rf", "prediction": "x0"}, "prediction x0 on the straight path"),
    ("unet", {"positions": True}, DDPM, "positions True: diffusers' UNet2DConditionModel has only False"),
    ("unet", {"pooled_width": 4}, DDPM, "pooled_width 4 with num_classes 3"),
    ("sd3", {"norm": "rms"}, RF, "norm rms: diffusers' SD3Transformer2DModel"),
    ("sd3", {"sincos": None}, RF, "sincos None"),
    ("sd3", {"rope": (4, 6, 6)}, RF, r"rope \(4, 6, 6\)"),
    ("sd3", {"pooled_width": None}, RF, "pooled_width None"),
    ("sd3", {"guidance": True}, RF, "guidance True"),
    ("flux", {"rope_theta": 100.0}, RF, "rope_theta 100.0: diffusers' FluxTransformer2DModel has only 10000"),
    ("flux", {"qk_norm": False}, RF, "qk_norm False"),
    ("flux", {"sincos": (4, 6)}, RF, r"sincos \(4, 6\)"),
    ("flux", {"rope": None}, RF, "rope None"),
    ("flux", {"dual_attention": 1}, RF, "dual_attention 1"),
    ("bytes", {}, RF, "text encoder bytes"),
])
def test_what_diffusers_lacks_is_refused_by_name(tmp_path, packaged, name, change, objective, message):
    arch, config, _, text = NETWORKS[name]
    source = write_run(tmp_path / "run", arch, config | change, objective, text)
    with pytest.raises(ValueError, match=f"run: .*{message}.*; a file can hold it: OUT.safetensors or OUT"):
        export.main([source, f"{tmp_path}/out/"])
    assert found(tmp_path) == ["run", "run/checkpoint.pt"]
    export.main([source, f"{tmp_path}/out.pt"])            # which a file can


def test_latents_that_are_no_square_suit_a_unet_only(tmp_path, packaged):
    source = network_run(tmp_path, "dit", size=(16, 32))
    with pytest.raises(ValueError, match="latent 8x16: diffusers has only squares there"):
        export.main([source, f"{tmp_path}/out/"])
    assert export.unet_config(unet.UNetConfig(), (8, 16))["sample_size"] == [8, 16]


def test_a_correction_of_nothing_is_refused(tmp_path, packaged):
    source = network_run(tmp_path, "unet")
    for out in ("weights.pt", "out/"):
        with pytest.raises(ValueError, match="--with-correction: only a folder of a DiT needs it"):
            export.main([source, f"{tmp_path}/{out}", "--with-correction"])


@pytest.mark.parametrize("flags, message", [
    (["run"], "the following arguments are required: out"), (["", "out.pt"], "run is empty"),
    (["nowhere", "out.pt"], "nowhere: no checkpoint there"), (["run", "out.pt", "--ema"], "--ema")])
def test_command_lines_that_are_refused(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        export.main(flags)
    assert found(tmp_path) == []


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    source = network_run(tmp_path, "unet")
    for out in ("weights.safetensors", "out/"):
        with pytest.raises(ValueError, match=r"needs the package safetensors \(pip install safetensors\)"):
            export.main([source, f"{tmp_path}/{out}"])
    export.main([source, f"{tmp_path}/weights.pt"])
    assert found(tmp_path) == ["run", "run/checkpoint.pt", "weights.pt"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch, packaged, failure):
    """The disk is full, or the user gives up, when half of the files are written."""
    source = network_run(tmp_path, "unet")
    (tmp_path / "out").mkdir()
    written = []

    def write(path, state, metadata):
        written.append(path)
        path.write_bytes(b"weights")
        if len(written) == 2:
            raise failure

    monkeypatch.setattr(export, "write_safetensors", write)
    with pytest.raises(type(failure)) as raised:
        export.main([source, f"{tmp_path}/out"])
    if isinstance(failure, OSError):
        assert str(raised.value) == f"cannot write {tmp_path}/out: No space left on device"
    assert len(written) == 2 and found(tmp_path) == ["out", "run", "run/checkpoint.pt"]
    written[:] = [None] * 3
    export.main([source, f"{tmp_path}/out"])               # takes the place of the empty folder
    assert {"out/unet/config.json", "out/vae/config.json", "out/README.md"} <= set(found(tmp_path))
    assert not [name for name in found(tmp_path) if name.startswith(".")]


# ---- in diffusers

@pytest.fixture
def diffusers():
    pytest.importorskip("safetensors")
    return pytest.importorskip("diffusers", reason="pip install diffusers, for the folders of export.py")


def load(kind, folder, part):
    """A model of diffusers from the exported folder: every weight of it, and none besides."""
    model, info = kind.from_pretrained(folder, subfolder=part, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval().requires_grad_(False)


def correct(transformer):
    """As OUT/README.md shows it."""
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0


def network_of(diffusers, name, folder):
    """The network in the folder, called as ours: (xt, t as diffusers counts it, conditions) -> raw."""
    if name == "dit":
        network = load(diffusers.DiTTransformer2DModel, folder, "transformer")
        correct(network)

        def call(x, step, y=None):
            y = torch.zeros(len(x), dtype=torch.long) if y is None else torch.where(y == 3, 1000, y)
            return network(x, step, class_labels=y).sample
    elif name == "sd3":
        network = load(diffusers.SD3Transformer2DModel, folder, "transformer")
        fresh = diffusers.SD3Transformer2DModel.from_config(network.config)    # it computes them by itself
        torch.testing.assert_close(fresh.pos_embed.pos_embed, network.pos_embed.pos_embed, atol=2e-6, rtol=0)

        def call(x, step, context, pooled):
            return network(x, context, pooled, step).sample
    elif name == "flux":
        network = load(diffusers.FluxTransformer2DModel, folder, "transformer")

        def call(x, step, context, pooled, guidance=None):
            b, c, h, w = (*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2)
            rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            ids = torch.stack([torch.zeros(h * w), rows.flatten(), columns.flatten()], 1)
            tokens = x.view(b, c, h, 2, w, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w, 4 * c)
            out = network(tokens, context, pooled, step / 1000, ids, torch.zeros(context.shape[1], 3),
                          guidance).sample
            return out.view(b, h, w, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
    else:
        network = load(diffusers.UNet2DConditionModel, folder, "unet")

        def call(x, step, y=None, context=None, pooled=None):
            return network(x, step, context, class_labels=pooled if y is None else y).sample
    return call


# name, changes of its configuration, objective: every architecture on both paths, and every way to count time
DRAWN = {
    "dit": ("dit", {}, {"name": "ddpm", "prediction": "v"}),
    "dit as published": ("dit", {"time_offset": -1.0, "learn_sigma": True},
                         {"name": "ddpm", "schedule": "linear", "learned_variance": True}),
    "dit without classes": ("dit", {"num_classes": 0}, DDPM),
    "dit on the straight path": ("dit", {}, RF),
    "unet": ("unet", {}, DDPM),
    "unet as published": ("unet", {"time_offset": -1.0}, {"name": "ddpm", "prediction": "x0"}),
    "unet without classes": ("unet", {"num_classes": 0},
                             {"name": "ddpm", "prediction": "v", "schedule": "cosine"}),
    "unet at zero terminal SNR": ("unet", {}, {"name": "ddpm", "prediction": "v", "zero_terminal_snr": True}),
    "unet on the straight path": ("unet", {}, {"name": "rf", "shift": 3.0}),
    "text unet": ("text unet", {}, DDPM),
    "sd3": ("sd3", {}, RF),
    "sd3.5": ("sd3", {"qk_norm": True, "dual_attention": 2}, {"name": "rf", "shift": 3.0}),
    "sd3 on the diffusion path": ("sd3", {}, DDPM),
    "flux": ("flux", {}, RF),
    # as many channels as a patch has pixels would hide a wrong order of the two
    "flux of other channels": ("flux", {"channels": 6, "time_offset": 0.5}, RF),
    "sd3 of other channels": ("sd3", {"channels": 6}, RF),
    "flux without guidance": ("flux", {"guidance": False, "time_offset": 0.5}, DDPM),
}


@pytest.mark.optional
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("case", DRAWN)
def test_diffusers_draws_the_same(tmp_path, diffusers, case):
    """From the same noise: one evaluation, the latents at the end of the path, the picture."""
    name, change, objective = DRAWN[case]
    arch, config, _, text = NETWORKS[name]
    channels = change.get("channels", 4)
    source = write_run(tmp_path / "run", arch, config | change, objective, text,
                       make_vae(latent_channels=channels))
    out = tmp_path / "out"
    export.main([source, f"{out}/"] + ["--with-correction"] * (arch == "dit"))
    checkpoint = checkpoints.load_checkpoint(source)
    ours, path = rebuilt(checkpoint), networks.build_path(objective)
    theirs = network_of(diffusers, name, out)
    cond = conditions(ours.config)

    diffusion = objective["name"] == "ddpm"
    x = torch.randn(2, channels, 8, 8)
    for n in (1, 250, 1000):
        t = torch.full((2,), n / 1000)
        step = torch.full((2,), n - 1) if diffusion else 1000 * t
        want = ours(x, t, **cond)
        assert distance(theirs(x, step, **cond), want) < 1e-5 and want.std() > 1e-3

    # ---- the loop of every pipeline
    steps = 10
    if diffusion:
        scheduler = diffusers.DDIMScheduler.from_pretrained(out, subfolder="scheduler")
        scheduler.set_timesteps(steps)
    else:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(out, subfolder="scheduler")
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    latents = x
    for timestep in scheduler.timesteps:
        raw = theirs(latents, timestep.expand(2), **cond)[:, :channels]
        latents = scheduler.step(raw, timestep, latents).prev_sample
    sampler = ddim if diffusion else euler
    want = sampler(guided(ours, path, cond), path, x, path.times(steps))
    assert distance(latents, want) < 1e-4 and want.isfinite().all()

    vae = networks.unpack_vae(checkpoint["vae"])
    theirs = load(diffusers.AutoencoderKL, out, "vae")
    assert (theirs.config.scaling_factor, theirs.config.shift_factor) == (1, 0)
    images = torch.rand(2, 3, *SIZE) * 2 - 1
    got, posterior = theirs.encode(images).latent_dist, vae.encode(images)
    assert distance(got.mean, vae.normalize(posterior.mean)) < 1e-5
    assert distance(got.std, posterior.std / vae.latent_std.view(-1, 1, 1)) < 1e-5
    latents = latents / latents.std()                      # within the range of a trained network's
    assert distance(theirs.decode(latents).sample, vae.decode(vae.denormalize(latents))) < 1e-5


@pytest.mark.optional
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("zero", [False, True])
def test_schedules_are_the_same_curve(diffusers, schedule, zero):
    objective = {"name": "ddpm", "prediction": "v", "schedule": schedule, "zero_terminal_snr": zero}
    scheduler = diffusers.DDIMScheduler.from_config(export.scheduler_config(objective))
    table = networks.build_path(objective).table
    # theirs is a product of a thousand numbers in float32
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), table[0, 1:], rtol=1e-4, atol=1e-6)
    assert scheduler.final_alpha_cumprod == 1 and not scheduler.config.clip_sample
    scheduler.set_timesteps(20)
    assert ((scheduler.timesteps + 1) / 1000).tolist() == \
        pytest.approx(networks.build_path(objective).times(20)[:-1].tolist())


@pytest.mark.optional
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_whole_pipeline_draws_the_same_pictures(tmp_path, diffusers, scale):
    """DiTPipeline finds every part, the names of the classes and, for guidance, the null class."""
    source = network_run(tmp_path, "dit")
    out = tmp_path / "out"
    export.main([source, f"{out}/", "--with-correction"])
    pipe = diffusers.DiTPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    labels = pipe.get_label_ids(["blue", "red"])
    assert labels == [2, 0]

    def draw():
        return torch.from_numpy(pipe(class_labels=labels, guidance_scale=scale, num_inference_steps=10,
                                     generator=torch.Generator().manual_seed(5), output_type="np").images)

    as_is = draw()
    correct(pipe.transformer)
    got = draw()
    checkpoint = checkpoints.load_checkpoint(source)
    vae, path = networks.unpack_vae(checkpoint["vae"]), networks.build_path(checkpoint["objective"])
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    cond, uncond = {"y": torch.tensor(labels)}, {"y": torch.tensor([3, 3])}
    denoise = guided(rebuilt(checkpoint), path, cond, uncond, scale)
    latents = ddim(denoise, path, x, path.times(10))
    want = (vae.decode(vae.denormalize(latents)) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert distance(got, want) < 1e-4 and want.std() > 0.01
    assert distance(as_is, want) > 1e-3                    # why the correction has to be asked for
    assert "downscale_freq_shift = 0" in (out / "README.md").read_text()


@pytest.mark.optional
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("config", [
    dict(), dict(quant_conv=False), dict(attention=False), dict(widths=(8,), layers=2),
    dict(image_channels=1)])
def test_a_vae_alone(tmp_path, diffusers, config):
    source = write_run(tmp_path / "run", "vae", SMALL_VAE | config, {"name": "vae"})
    export.main([source, f"{tmp_path}/out"])
    model = checkpoints.load_vae(source)
    theirs = load(diffusers.AutoencoderKL, tmp_path, "out")
    side = 16 // model.factor
    images, z = torch.rand(2, model.config.image_channels, 16, 16) * 2 - 1, torch.randn(2, 4, side, side)
    assert distance(theirs.encode(images).latent_dist.mean, model.normalize(model.encode(images).mean)) < 1e-5
    assert distance(theirs.decode(z).sample, model.decode(model.denormalize(z))) < 1e-5
    if config.get("attention", True):
        back = published.load_vae(tmp_path / "out")        # and this project reads its own folder
        assert distance(back.encode(images).mean, model.normalize(model.encode(images).mean)) < 1e-5
    assert found(tmp_path / "out") == ["README.md", "config.json", "diffusion_pytorch_model.safetensors"]


@pytest.mark.optional
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name, arch, config", [
    ("UNet2DConditionModel", "unet", unet.PRESETS["sd1"]),
    ("UNet2DConditionModel", "unet", unet.PRESETS["sd2"]),
    ("UNet2DConditionModel", "unet", unet.PRESETS["small"] | {"num_classes": 8}),
    ("DiTTransformer2DModel", "dit", dit.PRESETS["XL/2"] | dit.PUBLISHED_BLOCK | {"num_classes": 1000}),
    ("SD3Transformer2DModel", "sd3", mmdit.PRESETS["sd3.5-medium"]),
    ("FluxTransformer2DModel", "flux", mmdit.PRESETS["flux-dev"])])
def test_presets_have_every_weight_of_diffusers(diffusers, name, arch, config):
    layout = export.LAYOUTS[arch]
    assert layout.kind == name
    with torch.device("meta"):
        model = networks.build_model("mmdit" if arch in ("sd3", "flux") else arch, config)
        state = layout.weights(model.state_dict(), model.config, 0.0)
        theirs = getattr(diffusers, name)(**layout.config(model.config, (32, 32))).state_dict()
    assert {key: tuple(weight.shape) for key, weight in state.items()} == \
        {key: tuple(weight.shape) for key, weight in theirs.items()}
