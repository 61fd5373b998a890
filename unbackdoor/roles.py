"""Which training images are whose: the defense's, the probe's, those to choose settings by."""

from typing import NamedTuple

import torch
from torch import Tensor

from unbackdoor.data import split_rows
from unbackdoor.errors import DataError

UNLABELED, PROBE = 0.05, 0.01  # shares of the training images: the paper's
VALIDATION = 0.05  # to choose settings by


class Roles(NamedTuple):
    """Row numbers of training images by what they are for; none has two roles."""

    unlabeled: Tensor  # for a defense
    probe: Tensor
    validation: Tensor
    rest: Tensor  # where a defense's labeled images come from


def divide_rows(count: int, *, seed: int) -> Roles:
    """Divide the rows of ``count`` training images: 5 %, 1 %, 5 %, and the rest."""
    unlabeled, probe, validation = (round(s * count) for s in (UNLABELED, PROBE, VALIDATION))
    rows = split_rows(count, unlabeled=unlabeled, probe=probe, seed=seed)
    left = len(rows.rest) - validation
    return Roles(rows.unlabeled, rows.probe, rows.rest[left:], rows.rest[:left])


def defender_rows(count: int, *, labeled: bool, share: float, seed: int) -> Tensor:
    """Return the rows of ``count`` training images that a defense has.

    Labeled ones are drawn from those without another role. Others are the unlabeled ones, in
    random order where fewer are wanted, with labeled ones' after them where more are.

    Raises:
        DataError: If the share is too large or too small.
    """
    roles = divide_rows(count, seed=seed)
    wanted, unlabeled = round(share * count), roles.unlabeled
    if wanted < len(unlabeled):
        generator = torch.Generator().manual_seed(seed)
        unlabeled = unlabeled[torch.randperm(len(unlabeled), generator=generator)]
    there = roles.rest if labeled else torch.cat([unlabeled, roles.rest])
    if not 2 <= wanted <= len(there):
        raise DataError(
            f"share {share:g} of {count} images is {wanted}; a defense takes 2 to {len(there)}, as "
            "the others are for the probe or to choose settings by"
        )
    return there[:wanted]
