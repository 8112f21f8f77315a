"""moe.py: products in groups against a loop, routers against their definitions, equal experts against a dense
layer, the balance loss against its formula, loads, experts on several ranks, and runs with experts."""

import copy
import importlib.util
import json
import os
import shutil

import pytest
import torch
import torch.multiprocessing
from conftest import ON_VAE, denoising, same, weights
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import checkpoints
import dit
import export
import mmdit
import moe
import plan
import sample
import settings
import train
from benchmarks import measures


def perturbed(module):
    """Biases and all, so that nothing is zero by its initial value."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return module


def layer_of(router="token", top_k=2, width=32, hidden=24, experts=8, shared=1, gated=True):
    return perturbed(moe.MoE(width, hidden, experts, top_k, shared, router, gated)).train()


def gradients(module, x, function):
    """Values, and gradients of a fixed functional by x and every weight."""
    x = x.detach().requires_grad_()
    out = function(x)
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    return out.detach(), torch.autograd.grad((out * weight).sum(), [x, *module.parameters()])


def differ(a, b):
    """The largest difference, relative to the largest value where that exceeds 1."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1))


def brute_force(probs, kind, k):
    """The pairs that a router should choose in one picture: (N, E) probabilities as lists."""
    n, e = len(probs), len(probs[0])
    if kind == "token":
        return {(i, j) for i in range(n) for j in sorted(range(e), key=lambda j: -probs[i][j])[:k]}
    if kind == "expert":
        capacity = -(-k * n // e)
        return {(i, j) for j in range(e) for i in sorted(range(n), key=lambda i: -probs[i][j])[:capacity]}
    pairs = sorted(((i, j) for i in range(n) for j in range(e)), key=lambda pair: -probs[pair[0]][pair[1]])
    return set(pairs[:k * n])


# ---- one layer

@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("router", moe.ROUTERS)
def test_products_in_groups_equal_the_loop_over_experts(router, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(moe, "has_grouped_mm", lambda device, dtype: False)
    elif not moe.has_grouped_mm("cpu", torch.float32):
        pytest.skip("this torch has no kernel for the CPU")
    for top_k, gated, hidden in ((1, True, 24), (2, False, 24), (3, True, 24), (8, True, 24), (2, True, 5)):
        layer = layer_of(router, top_k, hidden=hidden, gated=gated)
        x = torch.randn(3, 10, 32)
        found, expected = (gradients(layer, x, f) for f in (layer.forward, layer.specification))
        assert differ(found[0], expected[0]) < 1e-6
        assert max(differ(a, b) for a, b in zip(found[1], expected[1])) < 1e-6
        assert same(dict(enumerate(found[1])), dict(enumerate(gradients(layer, x, layer.forward)[1])))


@pytest.mark.parametrize("router", moe.ROUTERS)
def test_routers_choose_what_they_should_within_each_picture(router):
    layer = layer_of(router)
    x = torch.randn(4, 10, 32)
    pair, gates = layer.router(x)
    probs = (x @ layer.router.weight.T).softmax(-1)
    for i in range(4):
        chosen = brute_force(probs[i].tolist(), router, 2)
        assert {(p // 8, p % 8) for p in pair[i].tolist()} == chosen and pair.shape[1] == len(chosen)
        for n in range(10):
            mine = [e for e in range(8) if (n, e) in chosen]
            total = sum(probs[i, n, e] for e in mine)
            for e in range(8):
                expected = probs[i, n, e] / total if e in mine else 0.0
                assert gates[i, n, e].item() == pytest.approx(float(expected), abs=1e-6)
        # alone, a picture is what it is among others
        assert torch.equal(layer.router(x[i:i + 1]).pair[0], pair[i])
        assert differ(layer(x[i:i + 1])[0], layer(x)[i]) < 1e-6


@pytest.mark.parametrize("router", moe.ROUTERS)
def test_equal_experts_are_a_dense_layer(router):
    for kind, top_k in (("swiglu", 1), ("gelu", 2), ("swiglu", 3)):
        dense = perturbed(dit.MLP(kind, 32, 4.0))
        layer = layer_of(router, top_k, hidden=dense.fc2.in_features, shared=0, gated=kind == "swiglu")
        with torch.no_grad():
            for part in ("fc1", "fc2"):
                source = getattr(dense, part)
                getattr(layer.experts, part).copy_(source.weight.expand(8, -1, -1))
                getattr(layer.experts, f"{part}_bias").copy_(source.bias.repeat(8))
        x = torch.randn(5, 12, 32)
        taken = (layer.router(x).gates > 0).any(-1)                # (B, N)
        assert differ(layer(x), dense(x) * taken[..., None]) < 1e-6
        assert taken.all() if router == "token" else not taken.all() or top_k > 1


@pytest.mark.parametrize("router", moe.ROUTERS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_gradients_reach_the_router(router, top_k):
    """For one expert a token: the gradient of Switch's gate, the probability, divided by its value."""
    layer = layer_of(router, top_k, shared=0)
    x = torch.randn(3, 12, 32)
    found = gradients(layer, x, layer.forward)[1][1]
    assert found.abs().max() > 1e-3 and torch.isfinite(found).all()
    if router == "token" and top_k == 1:
        def switch(x):
            probs = (x @ layer.router.weight.T).softmax(-1)
            gates = torch.zeros_like(probs).scatter(2, probs.argmax(-1, True), 1.0) * probs
            gates = gates / probs.max(-1, keepdim=True).values.detach()
            return sum(gates[..., i, None] * layer.experts.one(i, x) for i in range(8))
        assert differ(found, gradients(layer, x, switch)[1][1]) < 1e-6


def test_a_layer_has_a_derivative_in_forward_mode():
    layer = layer_of()
    x, direction = torch.randn(2, 2, 10, 32)
    with torch.no_grad():
        found, expected = (torch.func.jvp(f, (x,), (direction,))[1] for f in (layer, layer.specification))
    assert differ(found, expected) < 1e-6


def test_autocast_computes_experts_in_bf16_and_the_router_in_float32():
    layer = layer_of()
    x = torch.randn(2, 10, 32)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.router(x).gates, layer.router(x.clone()).gates)
        assert layer.router(x).gates.dtype == torch.float32
        rough = layer(x)
    assert 0 < differ(rough, exact) < 0.03


def test_compiled_once_for_all_steps():
    counter = CompileCounterWithBackend("aot_eager")
    layer = layer_of()
    moe.set_balance(layer, 0.01)
    compiled = copy.deepcopy(layer)
    compiled.compile(backend=counter)
    for _ in range(4):
        x = torch.randn(3, 10, 32)
        plain, other = (gradients(module, x, module) for module in (layer, compiled))
        assert differ(other[0], plain[0]) < 1e-6
        assert max(differ(a, b) for a, b in zip(other[1], plain[1])) < 1e-6
    assert counter.frame_count == 1


# ---- the balance loss

def balance_by_formula(layer, x, weight):
    """weight times E sum_i f_i P_i, the mean over pictures."""
    probs = (x @ layer.router.weight.T).softmax(-1)
    chosen = layer.router(x).gates.detach() > 0
    share = chosen.sum(1) / chosen.sum((1, 2))[:, None]
    return weight * (8 * share * probs.mean(1)).sum(-1).mean()


@pytest.mark.parametrize("router", ["token", "race"])
def test_the_balance_loss_has_the_gradient_of_its_formula_and_no_value(router):
    layer = layer_of(router)
    x = torch.randn(6, 12, 32)
    out, plain = gradients(layer, x, layer)
    inputs = x.clone().requires_grad_()
    extra = torch.autograd.grad(balance_by_formula(layer, inputs, 3.0), [inputs, layer.router.weight])
    moe.set_balance(layer, 3.0)
    again, found = gradients(layer, x, layer)
    assert torch.equal(again, out) and extra[1].abs().max() > 1e-3
    assert differ(found[0], plain[0] + extra[0]) < 1e-6 and differ(found[1], plain[1] + extra[1]) < 1e-6
    # not twice where the layer is computed again in the backward pass; not in evaluation
    recomputed = gradients(layer, x, lambda x: checkpoint(layer, x, use_reentrant=False))
    assert same(dict(enumerate(recomputed[1])), dict(enumerate(found)))
    assert same(dict(enumerate(gradients(layer.eval(), x, layer)[1])), dict(enumerate(plain)))


def test_pieces_of_a_batch_add_up_to_the_balance_of_the_whole():
    layer = layer_of(shared=0)
    x = torch.randn(6, 12, 32)

    def gradient(parts):
        moe.set_balance(layer, 3.0 / len(parts))
        layer.zero_grad()
        for part in parts:
            (layer(part).square().mean() / len(parts)).backward()
        return layer.router.weight.grad.clone()

    assert differ(gradient(x.split(2)), gradient([x])) < 1e-6


def test_a_run_weighs_its_balance_by_the_pieces_of_a_batch(cwd):
    for flags, weight in (([], 0.01), (["--accumulate", "4", "--balance", "0.2"], 0.05),
                          (["--router", "expert"], 0.0)):
        model = denoising("--experts", "4", *flags).build()
        assert [m.balance for m in model.modules() if isinstance(m, moe.Router)] == [pytest.approx(weight)]


def test_an_even_load_has_a_balance_of_one():
    layer = layer_of(experts=8)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(8, 32))
    x = 5 * torch.eye(8, 32).repeat(1, 3, 1)              # (1, 24, 32): each expert's favourite, three times
    layer.router.top_k = 1
    assert float(balance_by_formula(layer, x, 1.0)) == pytest.approx(1.0, abs=1e-6)
    x[:, :, 0] += 20                                      # all want expert 0
    assert float(balance_by_formula(layer, x, 1.0)) == pytest.approx(8.0, abs=1e-3)


# ---- loads

@pytest.mark.parametrize("router", moe.ROUTERS)
def test_loads_by_quarter_of_the_time(router):
    layer = layer_of(router)
    x, t = torch.randn(6, 12, 32), torch.tensor([0.0, 0.2, 0.3, 0.9, 1.0, 0.24])
    with moe.counted(layer) as loads:
        layer(x[:4], t[:4])                               # t takes the place of a network's
        layer(x[4:], t[4:])
    layer(x, t)                                           # not counted any more
    found = loads.record()
    probs = (x @ layer.router.weight.T).softmax(-1)
    for quarter, pictures in (("0.0-0.25", (0, 1, 5)), ("0.25-0.5", (2,)), ("0.75-1.0", (3, 4))):
        chosen = [brute_force(probs[i].tolist(), router, 2) for i in pictures]
        counts = [sum(e == j for pairs in chosen for _, e in pairs) for j in range(8)]
        expected = [8 * count / sum(counts) for count in counts]
        assert found["expert_load"][""][quarter] == pytest.approx(expected, abs=1e-3)
        missing = sum(12 - len({n for n, _ in pairs}) for pairs in chosen) / 12 / len(pictures)
        assert found["without_expert"][""][quarter] == pytest.approx(missing, abs=1e-4)
    assert set(found["expert_load"][""]) == {"0.0-0.25", "0.25-0.5", "0.75-1.0"}
    with moe.counted(torch.nn.Linear(2, 2)) as loads:
        pass
    assert loads.record() == {}


# ---- networks

SMALL = dict(width=64, depth=4, heads=2, num_classes=3)


def test_blocks_with_experts_and_equal_active_flops():
    for where, blocks in (("all", [0, 1, 2, 3]), ("deep", [2, 3]), ("every-other", [1, 3])):
        model = dit.DiT(dit.DiTConfig(**SMALL, experts=4, moe_blocks=where))
        assert [i for i, block in enumerate(model.blocks) if isinstance(block.mlp, moe.MoE)] == blocks
    assert not any("experts" in name for name in dit.DiT(dit.DiTConfig(**SMALL)).state_dict())
    # 3 experts of 120 channels for an MLP of 352 make 360; 4 of 88 make 352. The router is the rest.
    config = dit.PRESETS["size-2"] | {"num_classes": 10}
    dense = measures.training_flops("dit", config, (4, 8, 8))
    for shared, most in ((1, 1.02), (2, 1.01)):
        experts = config | {"experts": 8, "shared_experts": shared, "moe_blocks": "all"}
        assert 1 < measures.training_flops("dit", experts, (4, 8, 8)) / dense < most


def test_mmdit_has_experts_for_image_tokens_only(monkeypatch):
    config = mmdit.MMDiTConfig(**mmdit.PRESETS["tiny"], context_width=16, pooled_width=None, experts=4)
    model = perturbed(mmdit.MMDiT(config))
    streams = [(block.x_block.mlp, block.context_block) for block in model.joint_blocks]
    assert [isinstance(mlp, moe.MoE) for mlp, _ in streams] == [False, True]
    assert not any(isinstance(module, moe.MoE) for _, text in streams for module in text.modules())
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([0.1, 0.7]), torch.randn(2, 5, 16)
    found = model(*inputs)
    monkeypatch.setattr(moe.MoE, "forward", lambda self, x, grid: self.specification(x))
    assert differ(found, model(*inputs)) < 1e-6


def test_the_memory_of_a_batch_is_known_beforehand():
    """On the meta device, the backward pass keeps what it keeps on the CPU, integers aside."""
    layer = layer_of(width=64, hidden=48)
    found = {}
    for device in ("cpu", "meta"):
        placed = copy.deepcopy(layer).to(device)
        found[device] = plan.kept_bytes(placed, lambda count: placed(
            torch.zeros(count, 16, 64, device=device, requires_grad=True)))
    assert found["meta"] == pytest.approx(found["cpu"], rel=0.02) and found["meta"] > 4 * 16 * 64 * 5


def test_a_dense_network_upcycled_computes_the_same():
    dense = perturbed(dit.DiT(dit.DiTConfig(**SMALL)))
    for options in (dict(shared_experts=0, top_k=1), dict(shared_experts=2)):
        config = dit.DiTConfig(**SMALL, experts=4, expert_ratio=4.0, moe_blocks="all", **options)
        model = dit.DiT(config)
        model.load_state_dict(moe.upcycled(model, dense.state_dict(), model.state_dict()))
        inputs = torch.randn(2, 4, 8, 8), torch.tensor([0.1, 0.7]), torch.tensor([0, 3])
        assert differ(model(*inputs), dense(*inputs)) < 1e-6


# ---- several ranks

def one_rank(rank, world, folder):
    """A part of the pictures on each rank, and of the experts; rank 0 writes how far all is from one
    process."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for case in ("even", "all to one expert"):
        torch.manual_seed(0)
        one = layer_of(top_k=1 if case != "even" else 2)
        moe.set_balance(one, 0.5)
        x, weight = torch.randn(8, 12, 32).abs(), torch.randn(8, 12, 32)
        if case != "even":                                # the other ranks have nothing to compute
            with torch.no_grad():
                one.router.weight[0] = 10
        several = copy.deepcopy(one)
        moe.distribute_experts(several, mesh)
        mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
        inputs = [x.clone().requires_grad_(), x[mine].clone().requires_grad_()]
        (one(inputs[0]) * weight).mean().backward()
        (several(inputs[1]) * weight[mine]).mean().backward()
        found[case] = [differ(several(x[mine]), one(x)[mine]),
                       differ(inputs[1].grad / world, inputs[0].grad[mine])]
        for (name, theirs), ours in zip(several.named_parameters(), one.parameters()):
            gradient = theirs.grad
            if name.startswith("experts."):
                assert theirs.to_local().shape[0] * world == ours.shape[0]
                gradient = gradient.full_tensor()
            else:
                dist.all_reduce(gradient)
                gradient /= world
            found[case].append(differ(gradient, ours.grad))
    try:
        moe.distribute_experts(layer_of(experts=world + 1), mesh)
    except ValueError as error:
        found["refusal"] = str(error)
    if rank == 0:
        with open(f"{folder}/found.json", "w") as file:
            json.dump(found, file)
    dist.barrier()                             # none ends while another is still at work
    dist.destroy_process_group()
    os._exit(0)                                # why not by returning: ranks.leave


@pytest.mark.long
@pytest.mark.parametrize("world", [2, 4])
def test_experts_on_several_ranks_equal_one_process(world, tmp_path):
    torch.multiprocessing.spawn(one_rank, (world, str(tmp_path)), nprocs=world)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["refusal"].startswith(f"experts {world + 1}: not a multiple of the {world} ranks")
    for case in ("even", "all to one expert"):
        assert len(found[case]) == 11 and max(found[case]) < 1e-5, case


# ---- runs

EXPERTS = ["--arch", "dit", *ON_VAE, "--steps", "8", "--save-every", "4", "--keep", "2", "--val-every", "4",
           "--experts", "4", "--top-k", "1", "--balance", "0.1"]


def test_a_run_with_experts(cwd, capsys):
    train.main([*EXPERTS, "--name", "moe"])
    assert "loads of the experts" in capsys.readouterr().out
    config = checkpoints.load_checkpoint("runs/moe")["config"]
    assert config["experts"] == 4 and config["top_k"] == 1
    records = [json.loads(line) for line in open("runs/moe/metrics.jsonl")]
    loads = [record["expert_load"] for record in records if "val_loss" in record]
    assert len(loads) == 2 and list(loads[0]) == ["blocks.1"]
    assert all(sum(row) == pytest.approx(4, abs=0.01) for row in loads[1]["blocks.1"].values())
    with Image.open("runs/moe/experts.png") as picture:
        assert picture.height > 100

    # it goes on bit for bit
    shutil.copytree("runs/moe", "runs/moe-again")
    shutil.copy("runs/moe/checkpoint-000004.pt", "runs/moe-again/checkpoint.pt")
    train.main([*EXPERTS, "--name", "moe-again"])
    assert same(weights("runs/moe-again"), weights("runs/moe"))
    # the recomputed forward pass counts once, and the balance has its effect
    train.main([*EXPERTS, "--grad-checkpoint", "--name", "moe-checkpoint"])
    assert same(weights("runs/moe-checkpoint"), weights("runs/moe"))
    train.main([*EXPERTS, "--balance", "0", "--name", "moe-free"])
    assert not same(weights("runs/moe-free"), weights("runs/moe"))
    free = json.loads(open("runs/moe-free/metrics.jsonl").readline())
    assert free["loss"] == pytest.approx(records[0]["loss"], rel=1e-3)

    # samples, exports
    sample.main(["runs/moe", "--n", "2", "--steps", "2", "--out", "moe.png"])
    export.main(["runs/moe", "moe.pt"])
    sample.main(["moe.pt", "--n", "2", "--steps", "2", "--out", "moe-2.png"])
    with Image.open("moe.png") as one, Image.open("moe-2.png") as other:
        assert one.tobytes() == other.tobytes()
    if importlib.util.find_spec("safetensors"):            # which a folder of diffusers needs
        with pytest.raises(ValueError, match="experts 4: diffusers' DiTTransformer2DModel has only 0"):
            export.main(["runs/moe", "moe-folder/"])
    with pytest.raises(ValueError, match="holds a run with --top-k 1, not 2"):
        train.main([*EXPERTS, "--top-k", "2", "--name", "moe"])


def test_a_run_that_begins_with_dense_weights(cwd):
    flags = ["--arch", "dit", *ON_VAE, "--steps", "1", "--experts", "4", "--init-from", "runs/done"]
    with pytest.raises(ValueError, match="without experts, not with; give --expert-ratio 4"):
        train.main([*flags, "--name", "up"])
    train.main([*flags, "--expert-ratio", "4", "--name", "up"])
    begun, dense = weights("runs/up", "ema"), weights("runs/done", "ema")
    assert begun["blocks.1.mlp.experts.fc1"].shape == (4, *dense["blocks.1.mlp.fc1.weight"].shape)


@pytest.mark.parametrize("flags, message", [
    ("--arch unet --experts 4", "--experts 4: belongs to --arch dit or mmdit, not unet"),
    ("--arch dit --experts 4 --top-k 5", "--top-k 5: there are only --experts 4; give at most that"),
    ("--arch dit --experts 1", "--experts 1: must be"),
    ("--arch dit --top-k 1", "--top-k 1: belongs to --experts N; give that too"),
    ("--arch dit --balance 0.1", "--balance 0.1: belongs to --experts N"),
    ("--arch dit --experts 4 --router expert --balance 0.1", "--balance 0.1: --router expert is balanced"),
    ("--arch dit --experts 4 --conv", "--conv: not with --experts 4"),
    ("--arch dit --experts 4 --router best", "--router best: must be one of token, expert, race"),
    ("--arch dit --experts 4 --moe-blocks some", "--moe-blocks some: must be one of all, deep, every-other"),
    ("--arch vae --experts 4", "--experts 4: belongs to --arch dit or mmdit, not vae"),
])
def test_bad_input(flags, message):
    with pytest.raises(ValueError) as error:
        settings.parse(flags.split())
    assert message in str(error.value)


def test_layers_refuse_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="top_k 9: must be between 1 and the number of experts, 8"):
        moe.MoE(32, 24, 8, 9)
    with pytest.raises(ValueError, match="router 'best': must be token, expert, race"):
        moe.MoE(32, 24, 8, 2, router="best")
    with pytest.raises(ValueError, match="experts 4 with conv"):
        dit.DiT(dit.DiTConfig(**SMALL, experts=4, conv=True))
