"""Files of weights: .safetensors against the official package, torch files with other objects, several files
with an index, folders; damaged and hostile files; and that nothing is in memory twice."""

import argparse
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, closed_to_us, write_safetensors

import weights

TENSORS = {
    "F64": torch.tensor([1.5, -2.0], dtype=torch.float64), "F32": torch.randn(2, 3),
    "F16": torch.randn(3).half(),
    "BF16": torch.randn(1, 5).bfloat16(), "F8_E4M3": torch.randn(7).to(torch.float8_e4m3fn),
    "F8_E5M2": torch.randn(3).to(torch.float8_e5m2), "I64": torch.tensor([2**40]),
    "I32": torch.tensor([-3], dtype=torch.int32), "I16": torch.tensor([-3], dtype=torch.int16),
    "I8": torch.tensor([-3], dtype=torch.int8), "U8": torch.tensor([250], dtype=torch.uint8),
    "BOOL": torch.tensor([True, False]), "scalar": torch.tensor(3.0), "empty": torch.empty(0, 4)}


def write(file, entries, content=b"", size=None, pad=8):
    """A .safetensors file by hand. entries: its header, or the bytes of one."""
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    if pad:
        header += b" " * (-len(header) % pad)
    file.write_bytes((len(header) if size is None else size).to_bytes(8, "little") + header + content)


def same(a, b):
    return (a.keys() == b.keys()
            and all(a[k].dtype == b[k].dtype and a[k].shape == b[k].shape
                    and a[k].flatten().view(torch.uint8).equal(b[k].flatten().view(torch.uint8)) for k in a))


@pytest.mark.optional
def test_every_dtype_as_the_official_package(tmp_path):
    official = pytest.importorskip("safetensors.torch")
    official.save_file(TENSORS, tmp_path / "a.safetensors", {"format": "pt"})
    assert same(weights.map_weights(tmp_path / "a.safetensors"), TENSORS)
    assert same(official.load_file(tmp_path / "a.safetensors"), TENSORS)


def test_a_file_by_hand(tmp_path):
    """Without any package; offsets in any order, and one that is no multiple of its dtype's size."""
    file = tmp_path / "a.safetensors"
    numbers = np.arange(4, dtype=np.float32)
    entries = {"__metadata__": {"format": "pt"},
               "b": {"dtype": "F32", "shape": [3], "data_offsets": [4, 16]},
               "a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}
    for pad in (8, 0):
        write(file, entries, numbers.tobytes(), pad=pad)
        state = weights.map_weights(file)
        assert list(state) == ["b", "a"] and state["a"].item() == 0 and state["b"].tolist() == [1, 2, 3]
    write(file, {"a": {"dtype": "F32", "shape": [0, 2], "data_offsets": [0, 0]}})
    assert weights.map_weights(file)["a"].shape == (0, 2)
    write(file, {})
    assert weights.map_weights(file) == {}


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize("entries, size, why", [
    ({"a": ENTRY | {"data_offsets": [0, 12]}}, None, "a: bytes 0 to 12 of 8, for a size of 8"),
    ({"a": ENTRY | {"data_offsets": [8, 16]}}, None, "a: bytes 8 to 16 of 8, for a size of 8"),
    ({"a": ENTRY | {"data_offsets": [-8, 0]}}, None, "a: sizes that are not whole numbers"),
    ({"a": ENTRY | {"data_offsets": [8, 0]}}, None, "a: bytes 8 to 0 of 8"),
    ({"a": ENTRY | {"data_offsets": [0]}}, None, "not enough values"),
    ({"a": ENTRY | {"data_offsets": [0, 8.0]}}, None, "a: sizes that are not whole numbers"),
    ({"a": ENTRY | {"shape": [2**62, 4]}}, None, f"a: bytes 0 to 8 of 8, for a size of {2**66}"),
    ({"a": ENTRY | {"shape": [2**64]}}, None, "a: sizes that are not whole numbers"),
    ({"a": ENTRY | {"shape": [-2]}}, None, "a: sizes that are not whole numbers"),
    ({"a": ENTRY | {"shape": [True, 2]}}, None, "a: sizes that are not whole numbers"),
    ({"a": ENTRY | {"shape": "2"}}, None, "a: sizes that are not whole numbers"),
    ({"a": ENTRY | {"dtype": "F128"}}, None, "KeyError"),
    ({"a": ENTRY, "b": ENTRY}, None, "b: bytes 0 to 8 of 8"),              # two tensors in the same bytes
    ({"a": {}}, None, "KeyError"),
    ({"a": 3}, None, "TypeError"),
    (b"[1, 2]", None, "a header that is not a table"),
    (b"\xff\xfe", None, "JSONDecodeError"),
    (b"[" * 100_000, None, "RecursionError"),
    ({"a": ENTRY}, 2**63, f"a header of {2**63:,} bytes in a file of"),
    ({"a": ENTRY}, 0, "a header of 0 bytes"),
    ({"a": ENTRY}, 1000, "a header of 1,000 bytes"),
])
def test_hostile_headers(tmp_path, entries, size, why):
    """One line, and no memory for what a header only claims to have."""
    file = tmp_path / "a.safetensors"
    write(file, entries, b"\0" * 8, size)
    with pytest.raises(ValueError, match=rf"a.safetensors: not a file of weights, or damaged \({why}"
                       ) as raised:
        weights.map_weights(file)
    assert "\n" not in str(raised.value)
    for content in (b"", b"1234", b"x" * 100):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="not a file of weights"):
            weights.map_weights(file)


def test_tensors_are_pages_of_the_file(tmp_path):
    """Each with a storage of its own, so that it can be saved; writing to one leaves the file as it is."""
    file = tmp_path / "a.safetensors"
    content = np.arange(6, dtype=np.float32).tobytes()
    write(file, {"a": ENTRY, "b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}}, content)
    state = weights.map_weights(file)
    before = file.read_bytes()
    assert [w.untyped_storage().nbytes() for w in state.values()] == [8, 16]
    state["a"].zero_()
    assert file.read_bytes() == before and weights.map_weights(file)["a"].tolist() == [0, 1]
    torch.save(state, tmp_path / "saved.pt")
    assert (tmp_path / "saved.pt").stat().st_size < 4000
    assert same(weights.map_weights(tmp_path / "saved.pt"), state)
    model = torch.nn.Linear(2, 2, device="meta")
    own = {"weight": torch.ones(2, 2, dtype=torch.float16), "bias": torch.ones(2)}
    weights.assign_weights(model, own, "x")
    assert model.weight.data_ptr() == own["weight"].data_ptr() and model.weight.dtype == torch.float16
    with pytest.raises(ValueError, match="x: weights do not fit the network: missing bias; surplus odd"):
        weights.assign_weights(model, {"weight": own["weight"], "odd": own["bias"]}, "x")


MEMORY = """
import sys
import published, torch, weights

def private():          # KiB that belong to this process alone, and not to the file
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(1024, 1024) for _ in range(32))

with torch.device("meta"):
    model = Layers()
before = private()
weights.assign_weights(model, weights.read_weights(sys.argv[1]), "x")
total = sum(float(p.sum()) for p in model.parameters())
print((private() - before) // 1024, total)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads the memory from /proc")
@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_nothing_is_in_memory_twice(tmp_path, ending):
    """128 MiB of weights cost a process almost no memory of its own: they are pages of the file."""
    state = {f"layers.{i}.{part}": torch.full(shape, 0.5) for i in range(32)
             for part, shape in (("weight", (1024, 1024)), ("bias", (1024,)))}
    file = tmp_path / f"a{ending}"
    if ending == ".pt":
        torch.save(state, file)
    else:
        write_safetensors(file, state)
    result = subprocess.run([sys.executable, "-c", MEMORY, str(file)], capture_output=True, text=True,
                            cwd=ROOT)
    assert result.returncode == 0, result.stderr
    mib, total = result.stdout.split()
    assert float(total) == 32 * 0.5 * (1024 * 1024 + 1024)
    assert int(mib) < 64


# ---- files of torch

class Callback:
    """Stands for a class of a training framework."""


def test_other_objects_in_a_torch_file(tmp_path, monkeypatch):
    """Settings, callbacks and numbers of other packages are ignored; their classes need not be there."""
    file = tmp_path / "a.ckpt"
    callback = Callback()
    callback.best = np.float64(3.0)
    torch.save({"state_dict": {"w": torch.ones(3)}, "args": argparse.Namespace(lr=1.0), "callback": callback,
                "callbacks": {Callback: {"best": np.zeros(2)}}, "path": pathlib.Path("x")}, file)
    monkeypatch.delattr(sys.modules[__name__], "Callback")
    assert same(weights.map_weights(file), {"w": torch.ones(3)})
    torch.save({"w": torch.ones(3)}, file, _use_new_zipfile_serialization=False)     # as before torch 1.6
    assert same(weights.map_weights(file), {"w": torch.ones(3)})


class Hostile:
    def __reduce__(self):
        return exec, ("open('written', 'w')",)


def test_no_code_in_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for zipped in (True, False):
        torch.save({"w": torch.ones(3), "x": Hostile()}, "a.pt", _use_new_zipfile_serialization=zipped)
        try:
            assert same(weights.map_weights("a.pt"), {"w": torch.ones(3)})
        except ValueError as error:
            assert "not a file of weights" in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_the_averaged_weights_come_first(tmp_path):
    for content in ({"ema": {"w": torch.ones(1)}, "model": {"w": torch.zeros(1)}},
                    {"state_dict": {"w": torch.ones(1)}, "model": {"w": torch.zeros(1)}},
                    {"model": {"w": torch.ones(1)}}, {"w": torch.ones(1), "step": 3}):
        torch.save(content, tmp_path / "a.pt")
        assert same(weights.map_weights(tmp_path / "a.pt"), {"w": torch.ones(1)})
    torch.save({"arch": "dit", "ema": {}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="is a run of train.py"):
        weights.map_weights(tmp_path / "a.pt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_damaged_values(tmp_path, dtype):
    torch.save({"w": torch.tensor([1.0, torch.nan]).to(dtype)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt: damaged: w has values that are not finite"):
        weights.read_weights(tmp_path / "a.pt")
    torch.save({"w": torch.ones(2).to(dtype), "i": torch.ones(2, dtype=torch.int64)}, tmp_path / "a.pt")
    assert len(weights.read_weights(tmp_path / "a.pt")) == 2


# ---- what may not be read

@pytest.mark.parametrize("closed, named", [
    ("file.bin", "file.bin"), ("pipeline", "pipeline"), ("pipeline/vae", "pipeline/vae"),
    ("pipeline/vae/config.json", "pipeline/vae/config.json"), ("folder", "folder")])
def test_what_may_not_be_read_is_named(tmp_path, monkeypatch, closed, named):
    """A file, a folder, and what a pipeline's folder holds; other things in it do not matter."""
    (tmp_path / "file.bin").write_bytes(b"x")
    for name in ("pipeline/vae/config.json", "pipeline/notes.md", "folder/inner/model.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "pipeline/vae/link.bin").symlink_to("nowhere")
    checked = tmp_path / closed.split("/")[0]
    for path in (checked, tmp_path / "nowhere", tmp_path / "folder/inner/model.bin/x"):
        weights.check_readable(path)                       # nothing is closed, or there, yet
    with monkeypatch.context() as patch:
        closed_to_us(patch, tmp_path / "pipeline/notes.md")
        weights.check_readable(checked)
    closed_to_us(monkeypatch, tmp_path / closed)
    with pytest.raises(ValueError) as refusal:
        weights.check_readable(checked)
    assert str(refusal.value) == f"{tmp_path / named}: cannot be read (permission denied); make it readable"


# ---- several files, and folders

def parts(folder, index, names=("a", "b")):
    """Two files with a tensor each, and their index."""
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        write(folder / f"part-{i}.safetensors", {name: ENTRY}, np.full(2, i, np.float32).tobytes())
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 16}, "weight_map": {
        "a": "part-0.safetensors", "b": "part-1.safetensors"}}))


@pytest.mark.parametrize("index", ["diffusion_pytorch_model.safetensors.index.json",
                                   "model.safetensors.index.fp16.json",
                                   "diffusion_pytorch_model.safetensors.fp16.index.json",
                                   "diffusion_pytorch_model.fp16.safetensors.index.json"])
def test_an_index_of_several(tmp_path, index):
    parts(tmp_path / "x", index)
    for path in (tmp_path / "x", tmp_path / "x" / index):
        assert {k: w.tolist() for k, w in weights.map_weights(path).items()} == {"a": [0, 0], "b": [1, 1]}
    parts(tmp_path / "x", index, ("a", "c"))
    with pytest.raises(ValueError, match=f"{index}: none of its parts has b"):
        weights.map_weights(tmp_path / "x")
    (tmp_path / "x/part-1.safetensors").unlink()
    with pytest.raises(ValueError, match=f"{index}: its part part-1.safetensors is missing; download it"):
        weights.map_weights(tmp_path / "x")


@pytest.mark.parametrize("content", [
    "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}',
    '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": "/etc/x.safetensors"}}',
    '{"weight_map": {"a": "..\\\\x.safetensors"}}',
    '{"weight_map": {"a": ".."}}', '{"weight_map": {"a": ""}}'])
def test_a_damaged_or_hostile_index(tmp_path, content):
    folder = tmp_path / "in"
    folder.mkdir()
    write(tmp_path / "x.safetensors", {"a": ENTRY}, b"\0" * 8)
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="index.json: (not an index of weights|its part .* is missing)"):
        weights.map_weights(folder)


def test_which_file_of_a_folder(tmp_path):
    """Of several variants the one in full precision, and .safetensors before .bin; never the one that was
    not averaged."""
    order = ["diffusion_pytorch_model.non_ema.safetensors", "model.fp16.bin", "diffusion_pytorch_model.bin",
             "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"]
    with pytest.raises(ValueError, match="no files of weights in this folder"):
        weights.map_weights(tmp_path)
    for i, name in enumerate(order):
        state = {"w": torch.full((2,), float(i))}
        if name.endswith(".bin"):
            torch.save(state, tmp_path / name)
        else:
            write(tmp_path / name, {"w": ENTRY}, state["w"].numpy().tobytes())
        assert weights.map_weights(tmp_path)["w"].tolist() == [i, i]
    for name in order[1:]:
        (tmp_path / name).unlink()
    (tmp_path / "other.ckpt").touch()
    with pytest.raises(ValueError, match="2 files of weights in this folder, and none of a usual name"):
        weights.map_weights(tmp_path)
