"""benchmarks/scale.py: what one rank holds, against closed forms, parallel.py and what autograd keeps."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks import scale

import settings
from benchmarks.scale import Layout, Network
from cli import program
from cuts import cuts_of
from dit import PUBLISHED_BLOCK
from networks import build_model, checkpoint_blocks
from parallel import Sharding

WIDTH, DEPTH, CLASSES, TOKENS = 32, 3, 3, 144
PUBLISHED = Network("dit", PUBLISHED_BLOCK | dict(width=WIDTH, depth=DEPTH, heads=4, num_classes=CLASSES,
                                                  patch=(1, 1), channels=4), (4, 12, 12))
# more than 128 tokens: a CPU then runs a kernel of attention, as is assumed
MODERN = Network("dit", dict(width=40, depth=2, heads=2, num_classes=4), (4, 24, 24))
JOINT = Network("mmdit", dict(width=48, depth=2, single_depth=1, heads=4, rope=(4, 4, 4), context_width=10,
                              pooled_width=6, guidance=True), (4, 24, 24), 7)


def test_bytes_by_layout_have_closed_forms():
    d = WIDTH
    always = (3 * d * d + 3 * d + d * d + 4 * d * d + 4 * d + 4 * d * d     # cut: qkv, proj, fc1, fc2,
              + 6 * d * d + 6 * d)                                          # adaLN
    whole = d + d                                                           # the biases of proj, fc2
    rest_always = (256 * d + d) + d * d + (2 * d * d + 2 * d)    # of the time's embedding; the last adaLN
    rest_whole = 4 * d + d + d + (CLASSES + 1) * d + (4 * d + 4)
    rest = rest_always + rest_whole
    count = 2 + 4 + 1 + 4 + 10 * DEPTH                                      # tensors

    def expected(cut, others):
        return 4 * ((DEPTH * always + rest_always) / cut + (DEPTH * whole + rest_whole) / others)

    for where, weights in [(Layout(), expected(1, 1)), (Layout(8), expected(1, 1)),
                           (Layout(4, True), expected(4, 4)), (Layout(4, True, 2), expected(4, 2)),
                           (Layout(4, True, 4), expected(4, 1))]:
        found = scale.held(PUBLISHED, where, 0.03, bf16=True)
        assert found[:4] == (weights, weights, 2 * weights + 4 * count, 2 * weights), where
        assert scale.held(PUBLISHED, where, 0.999, bf16=True).averages == weights
        assert found.lasting == 6 * weights + 4 * count

    # ---- while blocks run: two of them, the gradient of one twice, and the rest
    block = always + whole
    for where, size, others in ((Layout(4, True), block, rest),
                                (Layout(4, True, 2), always / 2 + whole, rest_always / 2 + rest_whole)):
        assert scale.held(PUBLISHED, where, 0.03, bf16=False).in_use == 4 * others + 2 * 4 * size + 8 * size
        assert scale.held(PUBLISHED, where, 0.03, bf16=True).in_use == 4 * others + 2 * 2 * size + 6 * size
    assert scale.held(PUBLISHED, Layout(8), 0.03, bf16=False).in_use == 0
    matrices = DEPTH * block + rest - (CLASSES + 1) * d               # autocast copies no embeddings
    assert scale.held(PUBLISHED, Layout(8), 0.03, bf16=True).in_use == 2 * matrices


@pytest.mark.parametrize("network", [MODERN, JOINT])
@pytest.mark.parametrize("where", [Layout(3, True), Layout(64, True), Layout(6, True, 2)])
def test_pieces_are_those_that_sharding_cuts(network, where):
    """Of every rank, also where the first dimension is not divisible, or shorter than there are ranks."""
    model = build_model(network.arch, network.config)
    expected = scale.pieces(model, network.blocks, where)
    cuts = cuts_of(model, network.blocks) if where.tensor > 1 else {}
    for name, weight in model.named_parameters():
        found = []
        for rank in range(where.ranks):
            place = divmod(rank, where.tensor)
            here = SimpleNamespace(mesh=SimpleNamespace(get_coordinate=lambda place=place: place), cuts=cuts,
                                   size=where.ranks, tensor=where.tensor)
            found.append(Sharding.share(here, name, weight).numel())
        copies = 1 if name in cuts else where.tensor
        assert max(found) == found[0] == expected[name] and sum(found) == copies * weight.numel(), name


# ---- activations

def test_what_tensor_parallel_keeps_less_has_a_closed_form():
    """Queries, keys and values, the output of attention, and the hidden channels before and after GELU; and
    those of the time's embedding, before and after SiLU."""
    found = [scale.activations(PUBLISHED, tensor, bf16=False).kept for tensor in (1, 2, 4)]
    cut = DEPTH * TOKENS * WIDTH * 4 * (3 + 1 + 4 + 4) + WIDTH * 4 * (1 + 1)
    assert found[0] - found[1] == cut / 2 and found[1] - found[2] == cut / 4


def kept_for_real(network, tensor, bf16, checkpointed):
    model = build_model(network.arch, network.config)
    scale.cut_for_one(model, network.blocks, tensor)
    if checkpointed:
        checkpoint_blocks(model)
    forward, totals = scale.forward_of(network, model, bf16), []
    for count in (1, 2):
        with scale.Kept(list(model.parameters())) as keeping:
            result = forward(count)
        totals.append(keeping.bytes)
        result.sum().backward()
    return totals[1] - totals[0], scale.log_sums(model, network.tokens + network.length)


@pytest.mark.parametrize("network", [PUBLISHED, MODERN, JOINT])
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_what_autograd_keeps(network, tensor, bf16):
    found, sums = kept_for_real(network, tensor, bf16, checkpointed=False)
    assert scale.activations(network, tensor, bf16).kept == found - sums


@pytest.mark.parametrize("network", [PUBLISHED, JOINT])
def test_a_block_that_runs_again_keeps_what_one_more_block_keeps(network):
    def both(depth):
        deeper = network._replace(config=network.config | {"depth": depth})
        with torch.device("meta"):
            model = build_model(network.arch, deeper.config)
        inputs, again = scale.recomputed(model, scale.forward_of(deeper, model), "meta")
        assert inputs == kept_for_real(deeper, 1, False, checkpointed=True)[0]
        found = scale.activations(deeper, 1, bf16=False)
        assert found.recomputed == inputs + again
        return found.kept, inputs, again

    shallow, deep = both(3), both(4)
    assert deep[2] == shallow[2] and deep[1] > shallow[1]
    # Its input is kept either way.
    assert deep[0] - shallow[0] == deep[2] + deep[1] - shallow[1]


# ---- the check

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")


@linux
@pytest.mark.long
def test_one_process_holds_what_the_table_says(monkeypatch, capsys):
    found = scale.measure(PUBLISHED, Layout(), 0.03, 2, checkpointed=False)
    expected = scale.held(PUBLISHED, Layout(), 0.03, bf16=False)
    for key in ("parameters", "gradients", "optimizer", "averages"):
        assert found[key] == getattr(expected, key)
    sums = DEPTH * 4 * TOKENS * 4
    assert found["kept"] == scale.activations(PUBLISHED, 1, bf16=False).kept + sums

    # ---- the check says so; and where a count differs, its status
    monkeypatch.setattr(scale, "CHECKED", {"tiny": PUBLISHED})
    monkeypatch.setattr(scale, "start", lambda words, count: found)
    assert scale.main(["--check", "--layouts", "1", "--batch", "2"]) == 0
    cells = capsys.readouterr().out.splitlines()[4].split(" | ")
    assert [cell.endswith("equal") for cell in cells[1:6]] == [True] * 5
    assert scale.main(["--check", "--layouts", "2/shard", "--batch", "2"]) == 1


# ---- the command line

def test_the_table_names_what_is_too_much_and_what_cannot_be(monkeypatch, capsys):
    monkeypatch.setitem(scale.NETWORKS, "XL/2", PUBLISHED)
    assert scale.main(["--networks", "XL/2", "--layouts", "1", "8/shard/8", "--precision", "fp32", "--memory",
                       "0.1", "--batch", "10000"]) == 0
    printed = capsys.readouterr().out.splitlines()
    weights = scale.held(PUBLISHED, Layout(), settings.ARCHITECTURES["dit"].defaults["ema"], bf16=False)
    each = scale.activations(PUBLISHED, 1, bf16=False).kept
    whole = printed[4].split(" | ")
    assert whole[8] == f"{(sum(weights) + 10000 * each) / 2**30:,.1f} (too much)"
    assert whole[10].startswith(f"{math.floor((0.1 * 2**30 - sum(weights)) / each):,} or ")
    assert "not possible: does not divide the 4 heads" in printed[5]


@pytest.mark.parametrize("flags, message", [
    (["--layouts", "8/tensor"], "--layouts 8/tensor: must be RANKS, RANKS/shard or RANKS/shard/TENSOR"),
    (["--layouts", "0"], "--layouts 0: must be RANKS"),
    (["--layouts", "1/shard"], "--layouts 1/shard: one process has nobody to share with"),
    (["--layouts", "8/shard/3"], "--layouts 8/shard/3: 3 does not divide 8 ranks"),
    (["--networks", "XXL"], "--networks XXL: must be one of XL/2, sd3-medium, flux-dev"),
    (["--ema", "0.3"], "--ema 0.3: must be a width of at most 0.14"),
    (["--grad-checkpoint"], "--grad-checkpoint: only with --check"),
    (["--batch", "0"], "--batch 0: must be between 1 and"),
    (["--measure", "a DiT", "--layouts", "2"], "--layouts 2: must be one, of 1 ranks"),
])
def test_refusals_are_one_line(flags, message, capsys):
    if "--measure" in flags and sys.platform != "linux":
        pytest.skip("memory is read from /proc")
    assert program("scale.py", lambda: scale.main(flags)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"scale.py: error: {message}")
