"""A network that is built without memory, and its initial state, tensor by tensor.

    python deferred.py                   # makes the weights of a network one by one, and compares them

Where many processes share a network, none of them should hold all of it, not even at the start. So it is
built on the meta device, which has shapes only, and what its constructor does to each tensor is recorded,
together with the state of the random generator. A tensor is made by repeating that, when it is asked for: bit
for bit the one that the constructor would have made, and the generator ends in the same state as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class Call(NamedTuple):
    """What was done to a tensor in place, or made it: func(tensor, *inputs, **named)."""
    func: Callable
    inputs: tuple
    named: dict
    layout: tuple[torch.Size, tuple[int, ...], int]    # size, stride and offset of what it was done to
    generator: Tensor | None                           # the state of the generator before, where it draws


class Recorder(TorchDispatchMode):
    """Records what happens to tensors of the meta device. Random numbers are drawn and thrown away, so that
    the generator of the CPU goes on as if there had been memory for them."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}        # kept, so that no identity comes twice
        self.calls: dict[int, list[Call]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not (isinstance(result, Tensor) and result.is_meta):
            return result
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        if tensors and not func._schema.is_mutable:    # a view, or a new tensor that `Deferred` will refuse
            return result
        if tensors and (len(tensors) > 1 or tensors[0] is not args[0]):
            raise NotImplementedError(f"{func} on tensors without memory, of which one follows from another")
        layout = (result.size(), result.stride(), result.storage_offset())
        generator = None
        if torch.Tag.nondeterministic_seeded in func.tags:
            generator = torch.get_rng_state()
            func(torch.empty_strided(*layout[:2]), *args[1:], **kwargs)
        storage = result.untyped_storage()
        self.storages[storage._cdata] = storage
        inputs = args[1:] if tensors else args
        self.calls.setdefault(storage._cdata, []).append(Call(func, inputs, kwargs, layout, generator))
        return result


class Deferred(Mapping):
    """The initial state of a network, name by name. Each tensor is made anew when it is asked for."""

    def __init__(self, model: nn.Module, calls: dict[int, list[Call]]):
        self.tensors = model.state_dict()              # of the meta device
        self.calls = calls

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, name: str) -> Tensor:
        """On the CPU. Raises KeyError for a name that the network does not have, NotImplementedError for a
        tensor that was computed from others."""
        tensor = self.tensors[name]
        calls = self.calls.get(tensor.untyped_storage()._cdata)
        if calls is None:
            raise NotImplementedError(f"{name}: is computed from other tensors; it cannot be made alone")
        made = calls[0].func(*calls[0].inputs, **calls[0].named | {"device": "cpu"})
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for call in calls[needed_from(calls, made.numel()):]:
                if call.generator is not None:
                    torch.set_rng_state(call.generator)
                call.func(made.as_strided(*call.layout), *call.inputs, **call.named)
        return made.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


OVERWRITE = ("uniform_", "normal_", "fill_", "zero_")


def needed_from(calls: list[Call], count: int) -> int:
    """The last call that overwrites all of these numbers: what came before has left no trace."""
    for number in range(len(calls) - 1, 0, -1):
        name = calls[number].func.overloadpacket.__name__
        if name in OVERWRITE and calls[number].layout[0].numel() == count:
            return number
    return 1


def deferred(build: Callable[[], nn.Module]) -> tuple[nn.Module, Deferred]:
    """The network that `build` makes, on the meta device, and its initial state."""
    with torch.device("meta"), Recorder() as recorder:
        model = build()
    return model, Deferred(model, recorder.calls)


def demo() -> None:
    """Compare with a network that is built as usual."""
    def build() -> nn.Module:
        return nn.Sequential(*(nn.Linear(512, 512) for _ in range(16)))

    torch.manual_seed(0)
    whole = build()
    after = torch.rand(3)
    torch.manual_seed(0)
    model, initial = deferred(build)
    equal = torch.equal(torch.rand(3), after)
    largest = 0
    for name, weight in whole.state_dict().items():
        made = initial[name]
        equal &= torch.equal(made, weight)
        largest = max(largest, made.nbytes)
    total = sum(weight.nbytes for weight in whole.parameters())
    print(f"{total / 2**20:.1f} MiB of weights, made in pieces of at most {largest / 2**20:.1f} MiB on "
          f"{'and '.join(sorted({weight.device.type for weight in model.parameters()}))}: "
          f"{'all equal' if equal else 'not equal'}, and so are the random numbers that follow")


if __name__ == "__main__":
    demo()
