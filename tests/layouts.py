"""Every layout of every network has the weights and gradients of one process: what each of two or four
processes checks in test_parallel.py."""

import copy
import os

import torch
import torch.distributed as dist

import moe
import networks
import parallel
import rectified_flow
import settings

NETWORKS = {
    "dit": dict(width=32, depth=3, heads=4, num_classes=3, mlp="swiglu"),
    "unet": dict(widths=(16, 32), heads=4, num_classes=3, groups=8, attention=(False, True)),
    "mmdit": dict(width=32, depth=2, single_depth=1, heads=4, rope=(4, 2, 2), context_width=8, pooled_width=8,
                  dual_attention=1),
    "mmdit, text": dict(width=32, depth=1, heads=4, rope=(4, 2, 2), context_width=8, pooled_width=8),
    "vae": dict(widths=(8, 16), groups=4),
    "dit, mean": dict(width=32, depth=2, heads=4, num_classes=3, second_time=True),
    "dit, experts": dict(width=32, depth=2, heads=4, num_classes=3, experts=4, moe_blocks="all")}
# For each number of processes, the layouts of each network: how many ranks share a matrix (0: whole copies,
# by DDP; 1: sharded alone), and how it computes. Most are compiled, which is slow, in two processes.
SHARDED = [(0, "plain"), (1, "plain"), (1, "bf16")]
CUT = [*SHARDED, (2, "plain"), (4, "plain")]
LAYOUTS = {
    4: {"dit": [*CUT, (2, "compiled")], "unet": SHARDED, "mmdit": CUT, "mmdit, text": CUT, "dit, mean": CUT,
        "dit, experts": CUT, "vae": [(0, "plain"), (1, "plain")]},
    2: {"unet": [(1, "compiled")], "mmdit": [(2, "compiled")], "vae": [(0, "compiled")],
        "dit, mean": [(1, "compiled")], "dit, experts": [(1, "compiled")]}}


def loss(model, arch, part):
    torch.manual_seed(1)                       # the numbers of the whole batch
    x, t, y = torch.randn(8, 4, 8, 8), torch.rand(8), torch.randint(3, (8,))
    context, mask, pooled = torch.randn(8, 5, 8), torch.rand(8, 5) < 0.7, torch.randn(8, 8)
    mask[:, 0] = True
    if arch == "vae":
        return model.loss(torch.rand(8, 3, 8, 8)[part], 1e-3, rows=(8, part))[0].mean()
    cond = {"y": y[part]}
    if getattr(model.config, "second_time", False):
        s = torch.where(torch.arange(8) < 2, t / 2, t)             # only the first parts need a derivative
        path = rectified_flow.MeanFlow(guidance=1.5)
        return path.loss(model, x[part], t=t[part], s=s[part], eps=x.flip(0)[part], derive=True,
                         uncond={"y": torch.full_like(y[part], 3)}, **cond).mean()
    if arch == "mmdit":
        cond = {"context": context[part], "mask": mask[part], "pooled": pooled[part]}
    if hasattr(model, "text"):
        cond = model.text([f"words {i}" for i in range(8)][part])
    return (model(x[part], t[part], **cond) - x[part]).square().mean()


def held(module):
    """How many numbers of the weights this rank has."""
    return sum(parallel.local(weight).numel() for weight in module.parameters())


def watch(blocks):
    """The types in which these blocks will have had their weights."""
    seen = set()

    def see(block, inputs):
        seen.add(next(weight for weight in block.parameters() if weight.ndim > 1).dtype)

    for block in blocks:
        block.register_forward_pre_hook(see)
    return seen


class Check:
    """One network, and what it computes in one process."""

    def __init__(self, network):
        self.network, self.arch = network, network.split(",")[0]
        self.experts = "experts" in network
        torch.manual_seed(0)
        text = {"encoder": "bytes", "config": dict(width=8, depth=1, heads=2)} if "text" in network else None
        self.whole = networks.build_model(self.arch, NETWORKS[network], text)
        for weight in self.whole.parameters():             # networks begin with closed gates
            torch.nn.init.normal_(weight, std=0.1)
        self.loss = loss(self.whole, self.arch, slice(None))
        self.loss.backward()

    def layout(self, tensor, how):
        """Two backward passes, the gradient of half the loss each."""
        size, rank, kinds = dist.get_world_size(), dist.get_rank(), settings.ARCHITECTURES[self.arch].blocks
        place = (self.network, how, tensor)
        model = copy.deepcopy(self.whole)
        model.zero_grad()
        if how == "compiled":
            torch._dynamo.reset()                          # forget what was compiled for other cuts
            networks.compile_blocks(model, backend="aot_eager")
        groups = size // max(1, tensor)
        number = rank // max(1, tensor)
        part = slice(8 // groups * number, 8 // groups * (number + 1))
        sharding = None
        if tensor == 0:
            step = parallel.replicate(model)
        else:
            sharding = parallel.Sharding(size, tensor, torch.device("cpu"), settings.BLOCKS, kinds,
                                         bf16=how == "bf16")
            if self.experts:
                moe.distribute_experts(model, sharding.mesh["data"])
            step = sharding.shard(model, trained=True)
        blocks = [block for block in model.modules() if isinstance(block, kinds)]
        shares = [held(block) for block in blocks]
        seen = watch(blocks if how != "compiled" else [])  # which would trace the hooks with the blocks
        first = next(model.parameters())
        for last in (False, True):
            with parallel.synchronised(step, last):
                with torch.autocast("cpu", torch.bfloat16, enabled=how == "bf16"):
                    found = parallel.run(step, model, loss, self.arch, part)
                # The backward pass begins with the last block, so that alone stays gathered.
                if sharding and groups > 1:
                    kept = [now > before for now, before in zip(map(held, blocks), shares)]
                    assert kept == [False] * (len(blocks) - 1) + [True], (place, kept)
                (found / 2).backward()
            if tensor == 0:                    # gradients are averaged in the last backward pass alone
                everywhere = [torch.zeros_like(first) for _ in range(size)]
                dist.all_gather(everywhere, first.grad)
                assert all(torch.equal(everywhere[0], each) for each in everywhere) == last, place
        if how == "bf16":
            types = {weight.grad.dtype for weight in model.parameters()}
            assert seen == {torch.bfloat16} and types == {torch.float32}, (place, seen, types)
            assert abs(found - loss(self.whole, self.arch, part)) < 0.03 * found, place
            return
        assert seen == (set() if how == "compiled" else {torch.float32}), place
        total = found.detach().clone()
        dist.all_reduce(total)
        assert abs(total / size / self.loss - 1) < 1e-5, place
        if sharding:
            self.norm_and_state(place, model, sharding, cut=not (self.experts and groups == 1))
        for (name, weight), wanted in zip(model.named_parameters(), self.whole.parameters()):
            gradient = sharding.whole(name, weight.grad) if sharding else weight.grad
            error = (gradient - wanted.grad).abs().max() / max(1e-3, wanted.grad.abs().max())
            assert error < 1e-5, (place, name, error)          # sums in another order, or on another CPU
            if sharding:
                assert torch.equal(sharding.whole(name, weight), wanted), (place, name)
                assert torch.equal(parallel.local(weight), sharding.share(name, wanted)), (place, name)

    def norm_and_state(self, place, model, sharding, cut):
        """cut: whether this rank should have but a part; tensor parallelism does not cut experts."""
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in self.whole.parameters()])
        measured = sharding.finish_gradients(model, 1e9)
        assert abs(measured / norm - 1) < 1e-5, (place, measured, norm)
        assert not cut or held(model) < 0.75 * held(self.whole), place
        names = list(self.whole.state_dict()) if dist.get_rank() == 0 else []
        assert list(sharding.state_of(model)) == names, place


def main(words):
    dist.init_process_group("gloo")
    for network, layouts in LAYOUTS[dist.get_world_size()].items():
        check = Check(network)
        for layout in layouts:
            check.layout(*layout)
    dist.barrier()                             # none ends while another is still at work
    dist.destroy_process_group()
    os._exit(0)                                # why not by returning: ranks.leave
