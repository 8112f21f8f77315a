"""deferred.py: a network is the one that its constructor makes, and so are the random numbers after it."""

import pytest
import torch
from torch import nn

import moe
import networks
from deferred import deferred

TEXT = {"encoder": "bytes", "config": {}}
NETWORKS = {
    "dit": ("dit", dict(width=32, depth=2, heads=4, num_classes=3, second_time=True, conv=True), None),
    "dit, published": ("dit", dict(width=32, depth=2, heads=4, norm="layer", mlp="gelu", qk_norm=False),
                       None),
    "dit, experts": ("dit", dict(width=32, depth=2, heads=4, num_classes=3, experts=4, moe_blocks="all"),
                     None),
    "unet": ("unet", dict(widths=(16, 32), heads=4, num_classes=3, groups=8, attention=(False, True)), None),
    "mmdit, text": ("mmdit", dict(width=64, depth=2, single_depth=1, heads=4, rope=(8, 4, 4),
                                  dual_attention=1, guidance=True), TEXT)}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_the_one_that_its_constructor_makes(name):
    torch.manual_seed(3)
    whole = networks.build_model(*NETWORKS[name])
    after = torch.get_rng_state()
    torch.manual_seed(3)
    model, initial = deferred(lambda: networks.build_model(*NETWORKS[name]))
    assert torch.equal(torch.get_rng_state(), after)
    assert all(weight.is_meta for weight in model.state_dict().values())
    assert list(initial) == list(whole.state_dict()) and len(initial) == len(whole.state_dict())
    for _ in range(2):                                 # also when asked again, and in another order
        for key, weight in reversed(whole.state_dict().items()):
            assert torch.equal(initial[key], weight) and initial[key].stride() == weight.stride(), key
    assert torch.equal(torch.get_rng_state(), after)
    model.to_empty(device="cpu").load_state_dict(dict(initial))
    # What is no weight, such as tables of positions, is there as well.
    assert {key for key, _ in model.named_buffers()} <= set(initial)


def test_weights_that_were_changed_in_parts():
    def build():
        layer = nn.Linear(4, 6)
        with torch.no_grad():
            layer.weight[2:4].normal_(std=3.0)
            layer.weight.mul_(2).add_(1)
            layer.weight[:, 1].zero_()
            layer.bias.view(2, 3)[1].fill_(7)
        layer.tied = layer.weight
        return layer

    torch.manual_seed(1)
    whole = build()
    torch.manual_seed(1)
    model, initial = deferred(build)
    for key, weight in whole.state_dict().items():
        assert torch.equal(initial[key], weight), key
    assert model.tied is model.weight


def test_what_is_computed_from_other_tensors_is_refused():
    def build(change):
        layer = nn.Linear(4, 4)
        with torch.no_grad():
            change(layer)
        return layer

    def replaced(layer):
        layer.weight = nn.Parameter(layer.weight * 2)

    _, initial = deferred(lambda: build(replaced))
    initial["bias"]
    with pytest.raises(NotImplementedError, match="weight: is computed from other tensors"):
        initial["weight"]
    with pytest.raises(NotImplementedError, match="of which one follows from another"):
        deferred(lambda: build(lambda layer: layer.weight.copy_(layer.bias)))


def test_dense_weights_become_experts_without_a_network_in_memory():
    torch.manual_seed(0)
    dense = networks.build_model("dit", dict(width=32, depth=2, heads=4)).state_dict()
    config = dict(width=32, depth=2, heads=4, experts=4, shared_experts=1, expert_ratio=4.0)
    torch.manual_seed(1)
    whole = networks.build_model("dit", config)
    torch.manual_seed(1)
    model, initial = deferred(lambda: networks.build_model("dit", config))
    wanted = moe.upcycled(whole, dense, whole.state_dict())
    found = moe.upcycled(model, dense, initial)
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
