"""What the steps of a training change: weights, their averages, optimizer and random generator; saved, and
restored in the same or in another layout of processes.

    python state.py                       # a training that is interrupted, and one that is not
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import ema
import moe
import moments
import parallel
from checkpoints import is_config
from cuts import cuts_of
from networks import build_model, make_config
from parallel import Sharding
from run import Run, other_copy
from settings import ARCHITECTURES
from weights import check_finite, check_weights, load_weights


@dataclass
class State:
    """The parts of a run that training steps change."""
    model: torch.nn.Module
    averages: dict[float, torch.nn.Module]             # by --ema's length: the model with averaged weights
    device: torch.device
    optimizer: torch.optim.Optimizer | None = None     # made last, of the weights as they are then
    # Where several processes train, models are called by way of a step: see parallel.py.
    steps: dict[torch.nn.Module, torch.nn.Module] = field(default_factory=dict)
    sharding: Sharding | None = None
    moments: tuple[int, dict] | None = None            # a step, and what save_moments returned of it

    @property
    def ema(self) -> torch.nn.Module:
        """The average that is validated, drawn from and exported."""
        return next(iter(self.averages.values()))

    def shard(self, sharding: Sharding, initial: Mapping | None = None, experts: bool = False) -> None:
        """Keep only this process's share of all weights. initial: the state of a model on the meta device;
        None where it is whole, or will be restored. experts: whether each process keeps whole experts, to
        which the tokens travel, in place of a share of all of them."""
        self.sharding = sharding
        for network in (self.model, *self.averages.values()):
            if experts:
                moe.distribute_experts(network, sharding.mesh["data"])
            self.steps[network] = sharding.shard(network, trained=network is self.model)
        if initial is not None:
            sharding.load(self.model, initial)
            for network in self.averages.values():     # cut alike, so that each copies its own share
                network.load_state_dict(self.model.state_dict())

    def run(self, network: torch.nn.Module, call: Callable, *inputs):
        """call(network, *inputs)."""
        return parallel.run(self.steps.get(network), network, call, *inputs)

    def clip_gradients(self, most: float) -> Tensor:
        """Scale the gradients so that their norm is at most this. Returns that norm before."""
        if self.sharding is not None:
            return self.sharding.finish_gradients(self.model, most)
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), most)

    @torch.no_grad()
    def average(self, step: int) -> None:
        """Add the weights of this step, from 1, to the averages."""
        weights = list(map(parallel.local, self.model.parameters()))
        for length, network in self.averages.items():
            # average = share * average + (1 - share) * weights, for all weights in one call
            torch._foreach_lerp_(list(map(parallel.local, network.parameters())), weights,
                                 1 - ema.remains(length, step))

    def whole(self, network: torch.nn.Module) -> dict[str, Tensor]:
        """The state dict, with whole weights also where each process has a share of them."""
        return network.state_dict() if self.sharding is None else self.sharding.state_of(network)

    def whole_average(self, build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
        """The average, with all of its weights in this process. build: makes such a network."""
        if self.sharding is None:
            return self.ema
        with torch.random.fork_rng():                  # its initial weights are replaced
            network = build()
        network.load_state_dict(self.sharding.state_of(self.ema, everywhere=True))
        return network.to(self.device).eval().requires_grad_(False)

    def weights(self) -> dict:
        states = {length: self.whole(network) for length, network in self.averages.items()}
        parts = {"model": self.whole(self.model), "ema": next(iter(states.values()))}
        if len(states) > 1:                            # "ema" is one of them; a file holds a tensor only once
            parts["averages"] = [{"width": length, "state": state} for length, state in states.items()]
        return parts

    def training(self, run: Run, step: int) -> dict:
        """What a resumed run needs besides the weights. The position in the data is not among it, because
        data.batch_indices is a function of the step."""
        cuda_rng = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        if self.sharding is None:
            optimizer = self.optimizer.state_dict()
        else:                                          # never whole in one process: a folder beside the file
            if self.moments is None or self.moments[0] != step:
                self.moments = (step, moments.save_moments(run.folder, step, self.model, self.optimizer,
                                                           self.sharding))
            optimizer = self.moments[1]
        return {"optimizer": optimizer, "rng": torch.get_rng_state(), "cuda_rng": cuda_rng}

    def restore(self, saved: dict, what: str) -> None:
        theirs = make_config(saved["arch"], type(self.model.config), saved["config"])
        for name, value in asdict(self.model.config).items():     # shapes alone do not show every difference
            if getattr(theirs, name) != value:
                raise ValueError(f"{what}: its network has {name} {getattr(theirs, name)}, where these "
                                 f"settings make it {value}; give the settings that it began with")
        self.load(self.model, saved["model"], what)
        kept = {average["width"]: average["state"] for average in saved.get("averages", ())}
        for length, network in self.averages.items():
            state = saved["ema"] if network is self.ema else kept.get(length)
            if state is None:
                raise ValueError(f"{what}: damaged, or of another version: it lacks the average of width "
                                 f"{length:g}; use another --name")
            self.load(network, state, what)
        training = saved["training"]
        if is_config(training["optimizer"]) and "folder" in training["optimizer"]:
            try:
                moments.check_moments(Path(what).parent, training["optimizer"])
            except ValueError as error:
                raise ValueError(f"{what}: damaged: {error}; use another copy{other_copy(Path(what))}"
                                 ) from None
            self.moments = (saved["step"], training["optimizer"])
        try:
            self.restore_optimizer(training["optimizer"], Path(what).parent,
                                   ARCHITECTURES[saved["arch"]].blocks)
            torch.set_rng_state(training["rng"])
            if self.device.type == "cuda" and training.get("cuda_rng") is not None:
                torch.cuda.set_rng_state(training["cuda_rng"], self.device)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{what}: damaged, or of another version: its optimizer or generator does not "
                             f"fit ({type(error).__name__}); use another --name") from None
        for values in self.optimizer.state.values():
            check_finite({f"the optimizer's {name}": parallel.local(value) for name, value in values.items()
                          if isinstance(value, Tensor)}, what)

    def load(self, network: torch.nn.Module, state: dict[str, Tensor], what: str) -> None:
        if self.sharding is None:
            load_weights(network, state, what)
        else:
            check_weights(network, state, what)
            self.sharding.load(network, state)

    def restore_optimizer(self, saved: dict, folder: Path, blocks: tuple[type, ...]) -> None:
        """saved: what `training` stored, in this or in another layout of processes. folder: of the run.
        blocks: those of the network that can be tensor parallel."""
        if "folder" in saved:
            cuts = (self.sharding and self.sharding.cuts) or cuts_of(self.model, blocks)
            moments.load_moments(folder, saved, self.model, self.optimizer, self.sharding, cuts)
        elif self.sharding is not None:
            moments.share_moments(saved, self.model, self.optimizer, self.sharding)
        else:
            self.optimizer.load_state_dict(saved)

    def is_finite(self) -> bool:
        finite = all(bool(torch.isfinite(parallel.local(weight)).all()) for weight in self.model.parameters())
        return finite if self.sharding is None else self.sharding.everywhere(finite)


def demo() -> None:
    """Four steps at once, and two that are saved and continued by two more."""
    def begin() -> State:
        torch.manual_seed(0)
        model = build_model("dit", {"width": 64, "depth": 2, "heads": 2})
        state = State(model, {0.5: copy.deepcopy(model)}, torch.device("cpu"))
        state.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return state

    def go_on(state: State, steps: range) -> None:
        for step in steps:
            x = torch.randn(8, 4, 8, 8)                # from the generator, which is saved too
            (state.model(x, torch.rand(8)) - x).square().mean().backward()
            norm = state.clip_gradients(1.0)
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            state.average(step + 1)
            print(f"step {step + 1}: gradient norm {norm:.4f}")

    whole = begin()
    go_on(whole, range(4))
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder))
        first = begin()
        go_on(first, range(2))
        run.save({"arch": "dit", "config": asdict(first.model.config), "step": 2, **first.weights(),
                  "training": first.training(run, 2)})
        print("saved, and restored in another State")
        second = begin()
        second.restore(torch.load(run.checkpoint, weights_only=True), str(run.checkpoint))
        go_on(second, range(2, 4))
    for name, network in (("weights", "model"), ("averages", "ema")):
        pairs = zip(getattr(whole, network).parameters(), getattr(second, network).parameters())
        print(f"{name} equal, bit for bit: {all(torch.equal(a, b) for a, b in pairs)}")


if __name__ == "__main__":
    demo()
