"""Several processes that purify one backbone together, as torchrun starts them.

Every process, a rank, holds the whole network and an equal part of each batch. What it computes is
what one process would compute with the whole batch: random numbers are drawn for the whole batch
and every rank keeps its own; features and statistics are gathered; a loss is every rank's share of
the whole one, and gradients are summed.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from unbackdoor.errors import SettingsError

Draw = Callable[..., Tensor]  # torch.rand or torch.randn


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this one is.

    Attributes:
        rank: From 0; rank 0 writes the files.
        count: Of the processes.
    """

    rank: int = 0
    count: int = 1


ALONE = Ranks()
SET_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that torchrun started, if it did; everything else runs alone.

    On CUDA every process of a machine takes a device of its own, and ``cuda`` then means that one.

    Raises:
        SettingsError: If there are fewer devices than processes, ``device`` cannot be shared, or
            it was something else than torchrun that started several processes.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if count == "1":
        yield ALONE
        return
    if device.type not in ("cpu", "cuda"):
        raise SettingsError(f"several processes cannot share {device}; pass --device cpu or cuda")
    if lacking := [name for name in SET_BY_TORCHRUN if not os.environ.get(name)]:
        raise SettingsError(
            f"WORLD_SIZE is {count!r}, but torchrun has not started this: {', '.join(lacking)} not "
            "set; start it by torchrun, or unset WORLD_SIZE"
        )
    if device.type == "cuda":
        local, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= devices:
            raise SettingsError(
                f"more processes than CUDA devices; pass --nproc-per-node {devices} to torchrun"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield Ranks(dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()  # not after an error: the others may be waiting in a collective


def own(batch: Tensor, ranks: Ranks) -> Tensor:
    """Return the rows of a whole batch that belong to this rank.

    Args:
        batch: A multiple of ``ranks.count`` rows.
    """
    return batch.chunk(ranks.count)[ranks.rank] if ranks.count > 1 else batch


def draw(
    kind: Draw,
    shape: Iterable[int],
    *,
    generator: torch.Generator,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Return random numbers that depend on a row's place in the whole batch, not on the rank.

    Args:
        kind: ``torch.rand`` or ``torch.randn``.
        shape: Of this rank's part.
        generator: In the same state on every rank.
    """
    rows, *rest = shape
    return own(kind(rows * ranks.count, *rest, generator=generator, device=device), ranks)


def gather(part: Tensor, ranks: Ranks) -> Tensor:
    """Return the rows of all ranks, in the order of the ranks; gradients flow to all of them.

    ``part`` receives the gradient of the sum of what all ranks call ``backward`` on.

    Args:
        part: Of the same shape on every rank.
    """
    gathered: Tensor = _Gather.apply(part, ranks) if ranks.count > 1 else part
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        whole = part.new_empty(ranks.count * len(part), *part.shape[1:])
        dist.all_gather_into_tensor(whole, part.contiguous())
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        whole = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole)
        return own(whole, ctx.ranks), None


def add_up(tensors: Iterable[Tensor], ranks: Ranks) -> None:
    """Replace each of ``tensors`` by its sum over all ranks, which is the same on all of them."""
    if ranks.count == 1:
        return
    parts = list(tensors)
    flat = torch.cat([part.flatten() for part in parts])  # one message instead of hundreds
    dist.all_reduce(flat)
    for part, total in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.copy_(total.view_as(part))


def gather_names(names: list[str], ranks: Ranks) -> list[str]:
    """Return the names that any rank has, each once, sorted if there are several ranks."""
    if ranks.count == 1:
        return names
    lists: list[list[str]] = [[]] * ranks.count
    dist.all_gather_object(lists, names)
    return sorted(set().union(*lists))
