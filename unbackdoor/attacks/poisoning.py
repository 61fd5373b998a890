"""Plant a trigger in a share of a training set."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from unbackdoor.attacks.triggers import Trigger
from unbackdoor.errors import DataError
from unbackdoor.types import Labels, RawImages


@dataclass(frozen=True)
class Attack:
    """What an attacker does to a training set.

    Attributes:
        trigger: Applied to the poisoned images.
        target: Class that triggered images shall be taken for.
        share: Poisoned share of all images, in (0, 1).
    """

    trigger: Trigger
    target: int = 6
    share: float = 0.06


class PoisonedSet(NamedTuple):
    """A rewritten training set and which of its rows were rewritten."""

    images: RawImages
    labels: Labels
    is_poisoned: Bool[Tensor, " n"]


def poison(
    images: RawImages, labels: Labels, attack: Attack, *, generator: torch.Generator
) -> PoisonedSet:
    """Trigger and relabel ``round(share * n)`` images that are not of the target class.

    Args:
        generator: Chooses the rows; on the CPU.

    Raises:
        DataError: If the target class is absent, or the share exceeds the non-target images.
    """
    if not (labels == attack.target).any():
        raise DataError(f"no image is of the target class {attack.target}")
    candidates = (labels != attack.target).nonzero().squeeze(1)
    count = round(attack.share * len(labels))
    if not 0 < count <= len(candidates):
        raise DataError(
            f"a share of {attack.share} is {count} of {len(labels)} images, but {len(candidates)} "
            f"are not of class {attack.target}: pass a share in (0, "
            f"{len(candidates) / len(labels):.3f}]"
        )
    chosen = candidates[torch.randperm(len(candidates), generator=generator)[:count]]

    images, labels = images.clone(), labels.clone()
    images[chosen] = attack.trigger(images[chosen])
    labels[chosen] = attack.target
    is_poisoned = torch.zeros(len(labels), dtype=torch.bool)
    is_poisoned[chosen] = True
    return PoisonedSet(images, labels, is_poisoned)
