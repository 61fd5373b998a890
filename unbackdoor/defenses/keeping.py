"""What the loops of a defense have reached, on disk, so that a killed defense goes on there."""

import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from unbackdoor.errors import StateError
from unbackdoor.resume import read_state, write_state

SECONDS = 10.0  # between two states
Part = nn.Module | torch.optim.Optimizer | torch.Generator | Mapping[str, Tensor]


class Keeper:
    """Keeps the loops of one run of one defense, which are told apart by their order.

    What is neither damaged nor of another run is gone on from; anything else is written over.

    Attributes:
        path: Of the state.
        of: What has to be equal for a state to be continued.
        earlier: Seconds that earlier runs took to what is gone on from.
    """

    def __init__(self, path: Path, of: Mapping[str, str], *, seconds: float | None = None):
        """Keep a state in ``path``, at most every ten seconds and at the end of each loop."""
        self.path, self.of = path, dict(of)
        self._seconds = SECONDS if seconds is None else seconds
        self._begun = self._written = time.monotonic()
        self._loops = 0  # begun in this run
        self._reached: list[int] = []  # rounds of each loop
        self._tensors: dict[str, Tensor] = {}
        self.earlier = 0.0
        try:
            stored = read_state(self.path, self.of, groups=("loops", "time"))
        except StateError:  # there is none, or it is of another run
            return
        self._reached, self._tensors = stored.history, stored.groups["loops"]
        if "seconds" in stored.groups["time"]:  # not in states of older versions
            self.earlier = float(stored.groups["time"]["seconds"])

    def rounds(self, count: int, parts: Mapping[str, Part]) -> Iterator[int]:
        """Yield the rounds of the next loop that are left, from 0, and keep the parts after each.

        Args:
            count: Of the loop's rounds.
            parts: All that a round changes; they are set to what was kept before the first one.
        """
        reached, loop = self._reached, self._loops
        self._loops += 1
        if loop < len(reached):
            for name, part in parts.items():
                _set(part, _within(self._tensors, f"{loop}.{name}."))
        else:
            reached.append(0)
        for number in range(reached[loop], count):
            yield number
            reached[loop] = number + 1
            if number + 1 == count or time.monotonic() - self._written >= self._seconds:
                self._write(loop, parts)

    def _write(self, loop: int, parts: Mapping[str, Part]) -> None:
        for name, part in parts.items():
            for key, tensor in _tensors_of(part).items():
                kept = tensor.detach().to("cpu", copy=True).contiguous()
                self._tensors[f"{loop}.{name}.{key}"] = kept
        self._written = time.monotonic()
        seconds = torch.tensor(self.earlier + self._written - self._begun, dtype=torch.float64)
        groups = {"loops": self._tensors, "time": {"seconds": seconds}}
        write_state(self.path, self._reached, groups, self.of)


def resumed(keep: Keeper | None, count: int, parts: Mapping[str, Part]) -> Iterable[int]:
    """Return the rounds of a loop that are left: all of them where nothing is kept."""
    return range(count) if keep is None else keep.rounds(count, parts)


def _within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _tensors_of(part: Part) -> Mapping[str, Tensor]:
    match part:
        case nn.Module():
            return part.state_dict()
        case torch.Generator():
            return {"state": part.get_state()}
        case torch.optim.Optimizer():
            return {
                f"{number}.{name}": value
                for number, weight in enumerate(_weights(part))
                for name, value in part.state.get(weight, {}).items()
                if isinstance(value, Tensor)
            }
        case _:
            return part


@torch.no_grad()
def _set(part: Part, kept: Mapping[str, Tensor]) -> None:
    match part:
        case torch.Generator():
            part.set_state(kept["state"])
        case torch.optim.Optimizer():
            weights = _weights(part)
            for key, tensor in kept.items():
                number, _, name = key.partition(".")
                weight = weights[int(number)]
                if tensor.shape == weight.shape:  # and so of its layout; a count of steps is not
                    tensor = torch.empty_like(weight).copy_(tensor)
                part.state[weight][name] = tensor
        case _:
            for key, tensor in _tensors_of(part).items():
                tensor.copy_(kept[key])


def _weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]
