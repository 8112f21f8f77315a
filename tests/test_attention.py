"""attention.py: the formula by hand, the path that the CPU takes, and the kernels against the formula.

Without a GPU the kernels run in Triton's interpreter (see conftest.py) and are also compiled for a GPU."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import attention as attention_file
import dit
from attention import attention, attention_formula, fused_attention, pack, rms_norm, rotate
from conftest import ROOT

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")


def needs_triton(test):
    skip = pytest.mark.skipif(attention_file.triton is None, reason="needs triton")
    return pytest.mark.optional(skip(test))


# ---- the formula and the path without a GPU

def test_attention_formula_by_hand():
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0]]).bool()
    got = attention_formula(q, k, v, mask[:, None, None])
    for b in range(2):
        for h in range(3):
            for i in range(4):
                weights = [math.exp(q[b, h, i] @ k[b, h, j] / 8**0.5) if mask[b, j] else 0.0
                           for j in range(5)]
                want = sum(w * v[b, h, j] for j, w in enumerate(weights)) / sum(weights)
                torch.testing.assert_close(got[b, h, i], want)


@pytest.mark.parametrize("n, m, dim", [(16, 16, 64), (1, 1, 32), (7, 77, 8), (200, 130, 16)])
def test_attention_equals_formula_and_sdpa(n, m, dim):
    """Both CPU paths (short and long rows), with gradients, mask, and the norm and rotation written out."""
    q, k, v = (torch.randn(2, 3, length, dim, dtype=torch.float64, requires_grad=True)
               for length in (n, m, m))
    mask = torch.rand(2, m) < 0.7
    mask[:, 0] = True
    out, grad = attention(q, k, v, mask=mask), torch.randn(2, 3, n, dim, dtype=torch.float64)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(torch.autograd.grad(out, (q, k, v), grad),
                               torch.autograd.grad(want, (q, k, v), grad))
    if n == m:
        weight = torch.rand(dim, dtype=torch.float64)
        angles = torch.randn(n, dim // 2, dtype=torch.float64)
        rope = (angles.cos(), angles.sin())
        fused = attention(q, k, v, q_norm=weight, k_norm=weight, rope=rope)
        apart = attention_formula(rotate(rms_norm(q, weight), rope), rotate(rms_norm(k, weight), rope), v)
        torch.testing.assert_close(fused, apart)


def test_rotation_is_complex_multiplication():
    x, angles = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    want = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(rotate(x, (angles.cos(), angles.sin())), torch.view_as_real(want).flatten(-2))


def test_rope_scores_depend_on_the_offset_only():
    cos, sin = (table.double() for table in dit.rope_tables(6, 7, 16, 100.0))
    q, k = torch.randn(2, 16, dtype=torch.float64)
    rotated = [rotate(z.expand(42, 16), (cos, sin)).view(6, 7, 16) for z in (q, k)]
    score = lambda a, b: rotated[0][a] @ rotated[1][b]
    torch.testing.assert_close(score((0, 0), (2, 1)), score((3, 5), (5, 6)), rtol=1e-5, atol=1e-5)
    assert abs(score((0, 0), (2, 1)) - score((0, 0), (1, 2))) > 1e-3          # rows and columns differ


def test_packed_sequences_attend_to_themselves():
    lengths = [3, 1, 5]
    q, k, v = torch.randn(3, 1, 2, sum(lengths), 8, dtype=torch.float64)
    packing = pack(lengths)
    assert packing.offsets.tolist() == [0, 3, 4, 9] and packing.owner.tolist() == [0] * 3 + [1] + [2] * 5
    got = attention(q, k, v, packing=packing).split(lengths, 2)
    for part, *qkv in zip(got, *(x.split(lengths, 2) for x in (q, k, v))):
        torch.testing.assert_close(part, attention_formula(*qkv))
    right = dict(packing=packing)
    for wrong in (dict(mask=torch.ones(1, 9).bool()), dict(q_norm=torch.ones(8)),
                  dict(packing=pack([3, 5]))):
        with pytest.raises(ValueError):
            attention(q, k, v, **right | wrong)


# ---- the kernels

def rand_rope(n, dim):
    angles = torch.randn(n, dim // 2, device=DEVICE)
    return angles.cos(), angles.sin()


def compare(n, m, dim, *, norm=False, rope=False, mask=None, offsets=None, max_length=None, batch=2,
            dtype=torch.float32, tolerance=1e-5 if CUDA else 2e-6):
    """Forward and every gradient against the formula in float64, of the same rounded inputs; q, k and v lie
    in memory as a network's projections leave them."""
    q, k, v = (torch.randn(batch, length, 3, dim, device=DEVICE).to(dtype).transpose(1, 2)
               for length in (n, m, m))
    weights = [torch.rand(dim, device=DEVICE) + 0.5 for _ in range(2 * norm)]
    tables = rand_rope(n, dim) if rope else None
    names = ("q_norm", "k_norm")[:2 * norm]
    results = []
    for wide in (torch.float64, None):
        leaves = [x.detach().to(wide or x.dtype).requires_grad_() for x in (q, k, v, *weights)]
        call, where = attention, {}
        if wide is None:
            call = fused_attention
            where = dict(offsets=offsets, max_length=max_length)
        elif offsets is not None:
            where = dict(packing=pack(offsets.diff().tolist(), DEVICE))
        angles = tables and tuple(table.to(wide or torch.float32) for table in tables)
        out = call(*leaves[:3], **dict(zip(names, leaves[3:])), rope=angles, mask=mask, **where)
        torch.manual_seed(n)
        grad = torch.randn(out.shape, device=DEVICE, dtype=torch.float64)
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))])
    for want, got in zip(*results, strict=True):
        assert (got - want).norm() <= tolerance * max(want.norm(), 0.5 * want.numel() ** 0.5)


@needs_triton
@pytest.mark.parametrize("n, m, dim, norm, rope", [
    (1, 1, 64, True, True), (17, 17, 32, True, True), (65, 65, 64, True, True), (70, 70, 96, True, True),
    (33, 33, 72, False, True), (33, 70, 72, True, False), (129, 5, 128, False, False),
    (1, 130, 32, False, False)])
def test_kernels_equal_the_formula(n, m, dim, norm, rope):
    compare(n, m, dim, norm=norm, rope=rope)


@needs_triton
@pytest.mark.parametrize("n, m, norm", [(9, 70, True), (70, 9, False)])
def test_kernels_masked(n, m, norm):
    mask = torch.rand(2, m, device=DEVICE) < 0.4
    mask[0] = torch.arange(m, device=DEVICE) == m - 1    # a whole block of keys that none may attend to
    mask[1, 0] = True
    compare(n, m, 32, norm=norm, mask=mask)


@needs_triton
def test_a_fully_masked_row_is_zero_and_affects_no_other():
    """As in SDPA."""
    q, k, v = (torch.randn(2, 1, 9, 32, device=DEVICE, requires_grad=True) for _ in "qkv")
    mask = torch.tensor([[True] * 9, [False] * 9], device=DEVICE)
    out, theirs = fused_attention(q, k, v, mask=mask), F.scaled_dot_product_attention(q, k, v)
    assert not out[1].any()
    for a, b in zip((out, *torch.autograd.grad(out.square().sum(), (q, k, v))),
                    (theirs, *torch.autograd.grad(theirs.square().sum(), (q, k, v)))):
        torch.testing.assert_close(a[0], b[0], atol=1e-5, rtol=1e-4)
        assert not a[1].any()


@needs_triton
@pytest.mark.parametrize("max_length", [70, 96])
def test_kernels_packed(max_length):
    offsets = torch.tensor([0, 1, 71, 96], dtype=torch.int32, device=DEVICE)
    compare(96, 96, 32, norm=True, rope=True, offsets=offsets, max_length=max_length, batch=1)


@needs_triton
def test_kernels_prepare_long_keys(monkeypatch):
    monkeypatch.setattr(attention_file, "SHORT", 16)
    compare(40, 70, 64, norm=True)
    compare(70, 70, 72, norm=True, rope=True)


@needs_triton
@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float16, 2e-3),
    pytest.param(torch.bfloat16, 2e-2, marks=needs_gpu)])       # the interpreter cannot multiply it
def test_kernels_in_half_precision(dtype, tolerance):
    compare(70, 70, 64, norm=True, rope=True, dtype=dtype, tolerance=tolerance)


@needs_triton
def test_kernels_repeat_bit_for_bit():
    q, k, v = (torch.randn(2, 3, 70, 32, device=DEVICE, requires_grad=True) for _ in "qkv")
    weight = torch.rand(32, device=DEVICE, requires_grad=True)
    runs = []
    for _ in range(2):
        out = fused_attention(q, k, v, q_norm=weight, k_norm=weight)
        runs.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v, weight))])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@needs_triton
def test_models_take_the_kernels_when_asked(monkeypatch):
    """A transformer with the same weights, by either path: same answer, same gradients."""
    torch.manual_seed(0)
    model = dit.DiT(dit.DiTConfig(width=64, depth=2, heads=2, num_classes=3)).to(DEVICE)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    x, t, y = torch.randn(2, 4, 8, 8, device=DEVICE), torch.rand(2, device=DEVICE), torch.tensor([0, 3])
    results = []
    for kernel in (False, True):
        monkeypatch.setattr(attention_file, "KERNEL", kernel)
        out = model(x, t, y.to(DEVICE))
        results.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
    for want, got in zip(*results):
        assert (got - want).norm() <= 1e-5 * want.norm() + 1e-7


@needs_triton
@pytest.mark.parametrize("change, taken", [
    ({}, True), ({"n": 256}, True), ({"n": 255}, False), ({"n": 513}, False), ({"dim": 32}, False),
    ({"dtype": torch.float32}, False), ({"norm": False}, False), ({"rope": False}, False),
    ({"mask": True}, False), ({"packed": True}, False), ({"compiled": False}, False),
    ({"device": False}, False), ({"kernel": False}, False)])
def test_a_compiled_training_takes_the_kernels_where_they_were_faster(monkeypatch, change, taken):
    """Unasked: on the GPUs measured, as they were measured; not elsewhere."""
    case = {"n": 512, "dim": 64, "dtype": torch.bfloat16, "norm": True, "rope": True, "mask": False,
            "packed": False, "compiled": True, "device": True, "kernel": None} | change
    monkeypatch.setattr(attention_file, "KERNEL", case["kernel"])
    monkeypatch.setattr(attention_file, "COMPILED", case["device"])
    monkeypatch.setattr(attention_file, "fused_attention", lambda q, k, v, **more: torch.full_like(v, 7.0))
    q = torch.randn(1, 1, case["n"], case["dim"], device=DEVICE, dtype=case["dtype"])
    weight = torch.ones(case["dim"], device=DEVICE)
    angles = torch.zeros(case["n"], case["dim"] // 2, device=DEVICE)
    more = {"q_norm": weight, "k_norm": weight} if case["norm"] else {}
    if case["rope"]:
        more["rope"] = (angles.cos(), angles.sin())
    if case["mask"]:
        more["mask"] = torch.ones(1, case["n"], dtype=torch.bool, device=DEVICE)
    if case["packed"]:
        more["packing"] = pack([case["n"]], DEVICE)
    torch._dynamo.reset()
    call = torch.compile(attention, backend="eager") if case["compiled"] else attention
    assert bool((call(q, q, q, **more) == 7).all()) == taken


@pytest.mark.parametrize("choice, present, message", [
    ("", True, None), ("torch", False, None), ("triton", True, None),
    ("sdpa", True, "ATTENTION is sdpa; give"),
    ("triton", False, "ATTENTION is triton, which is not installed")])
def test_the_choice_in_the_environment(monkeypatch, choice, present, message):
    monkeypatch.setenv("ATTENTION", choice)
    monkeypatch.setattr(attention_file, "triton", object() if present else None)
    if message is None:
        attention_file.check_choice()
    else:
        with pytest.raises(ValueError, match=message):
            attention_file.check_choice()


def test_the_gpus_measured(monkeypatch):
    """`networks.compile_blocks` asks; an Ampere or a CPU keeps PyTorch's attention."""
    monkeypatch.setattr(attention_file, "RUNNABLE", True)
    for capability, answer in (((9, 0), True), ((8, 0), False), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert attention_file.measured_on(torch.device("cuda")) == answer
    for name in ("cpu", "mps", "meta"):
        assert not attention_file.measured_on(torch.device(name))


SHOW_GRAPH = """
import torch
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.partitioners import min_cut_rematerialization_partition
from attention import fused_attention, triton
from triton.backends.compiler import GPUTarget

triton.runtime.driver.set_active(type("Driver", (), {
    "get_current_target": lambda self: GPUTarget("cuda", 90, 32), "get_current_device": lambda self: 0})())
graphs = []

def compiler(graph, inputs):
    graphs.append(sorted({str(node.target) for node in graph.graph.nodes if "triton" in str(node.target)}))
    return lambda *args: 1 / 0

def backend(graph, inputs):
    return aot_module_simplified(graph, inputs, fw_compiler=compiler, bw_compiler=compiler,
                                 partition_fn=min_cut_rematerialization_partition)

@torch.compile(fullgraph=True, dynamic=True, backend=backend)
def loss(x, weight, cos, sin):
    q, k, v = x.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return fused_attention(q, k, v, q_norm=weight, k_norm=weight, rope=(cos, sin)).square().mean()

for n in (48, 96, 80):
    try:
        x, weight = torch.randn(2, n, 384, requires_grad=True), torch.ones(64, requires_grad=True)
        loss(x, weight, *torch.rand(2, n, 32))
    except ZeroDivisionError:
        print(len(graphs), *graphs[-2:])
"""


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import attention

FLOATS = ("LSE", "DELTA", "WEIGHT", "Q_NORM", "K_NORM", "COS", "SIN", "DQ_NORM", "DK_NORM")
for kernel in (attention.norm_and_rope_kernel, attention.forward_kernel, attention.backward_q_kernel,
               attention.backward_kv_kernel):
    # a candidate of the autotuner: the first one, or the last, which needs the least memory
    for dim, dtype, flags, candidate in (
            (64, "bf16", (1, 1, 0, 0, 1), 0), (72, "fp32", (1, 0, 1, 0, 0), 0),
            (128, "fp16", (0, 1, 0, 1, 1), 0), (128, "fp32", (1, 1, 1, 1, 1), -1)):
        function, blocks, options = kernel, {"BLOCK": 64}, {}
        if hasattr(kernel, "configs"):
            config = kernel.configs[candidate]
            function, blocks = kernel.fn, config.kwargs
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        constants = dict(zip(("NORM", "ROPE", "MASKED", "PACKED"), map(bool, flags)), DIM=dim,
                         LENGTH_CLASS=1 - flags[4], PADDED=triton.next_power_of_2(dim), PRECISION="tf32x3",
                         SCALE=dim ** -0.5, ROWS_PER_SUM=32, **blocks)
        names = function.arg_names
        constants = {name: value for name, value in constants.items() if name in names}
        kinds = {"MASK": "*i1", "OFFSETS": "*i32", "N": "i32", "M": "i32"}
        kinds |= dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(constants, "constexpr")
        signature = {name: kinds.get(name, "*" + dtype if name.isupper() else "i32") for name in names}
        source = ASTSource(function, signature, {(names.index(name),): value
                                                 for name, value in constants.items()})
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        print(function.__name__, dim, dtype, len(made.asm["cubin"]), "wgmma" in made.asm["ptx"],
              made.metadata.shared)
"""


def run_for_real(program):
    """In a process whose Triton compiles instead of interpreting."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "0", "ATTENTION": "triton",
                               "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@needs_triton
def test_kernels_compile_for_a_gpu():
    """To machine code of an H100, on any machine, with its tensor cores in use for 16-bit inputs."""
    lines = [line.split() for line in run_for_real(COMPILE)]
    assert len(lines) == 16 and all(int(size) > 1000 for _, _, _, size, _, _ in lines)
    assert all(uses == "True" for name, _, dtype, _, uses, _ in lines
               if name != "norm_and_rope_kernel" and dtype != "fp32")
    # in the shared memory of the smallest GPUs
    assert all(int(shared) <= 99 * 1024 for _, dim, dtype, _, _, shared in lines
               if (dim, dtype) == ("128", "fp32"))


@needs_triton
def test_compile_traces_the_kernels_in_one_graph():
    """fullgraph, both ways through, with the kernels visible to the compiler; and one graph for all sizes."""
    lines = run_for_real(SHOW_GRAPH)
    assert lines == ["2 ['triton_kernel_wrapper_functional'] ['triton_kernel_wrapper_functional']"] * 3


@needs_triton
def test_where_no_kernel_can_run_the_compiler_is_not_imported():
    """It takes seconds. Attention itself works as ever."""
    program = ("import os, sys, torch\nos.environ.pop('ATTENTION')\ntorch.cuda.is_available = lambda: False\n"
               "from attention import attention\nprint(attention(*torch.ones(3, 1, 1, 4, 8)).sum().item(), "
               "'torch._inductor' in sys.modules, 'torch._dynamo' in sys.modules)")
    assert run_for_real(program) == ["32.0 False False"]


@needs_gpu
@pytest.mark.parametrize("dim", [64, 72, 128])
def test_kernels_on_a_gpu_are_as_exact_as_sdpa(dim):
    for n in (1, 255, 256, 1000, 4096):
        q, k, v = torch.randn(3, 2, 4, n, dim, device="cuda", dtype=torch.bfloat16)
        poison = [torch.full_like(q, math.nan) for _ in range(8)]          # what is not written will show
        del poison
        want = attention_formula(*(x.double() for x in (q, k, v)))
        ours, theirs = (call(q, k, v).double() for call in (fused_attention, F.scaled_dot_product_attention))
        assert (ours - want).norm() <= 1.5 * (theirs - want).norm()


@needs_gpu
def test_kernels_compile_whole_at_two_sizes():
    weight = torch.rand(64, device="cuda", requires_grad=True)

    def call(q):
        return fused_attention(q, q, q, q_norm=weight, k_norm=weight).square().mean()

    compiled = torch.compile(call, fullgraph=True)
    for n in (256, 1024):
        q = torch.randn(2, 4, n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        (a,), (b,) = (torch.autograd.grad(f(q), (q,)) for f in (call, compiled))
        assert (a - b).norm() <= 1e-2 * a.norm()
