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
from torch.nn import functional as F  # noqa: N812 - the field's name for it
from torch.overrides import TorchFunctionMode

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


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that torchrun started, if it did; everything else runs alone.

    On CUDA every process of a machine takes a device of its own, and ``cuda`` then means that one.

    Raises:
        SettingsError: If there are fewer devices than processes, or ``device`` cannot be shared.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    if device.type == "cuda":
        local, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= devices:
            raise SettingsError(
                f"more processes than CUDA devices; pass --nproc-per-node {devices} to torchrun"
            )
        torch.cuda.set_device(local)
    elif device.type != "cpu":
        raise SettingsError(f"several processes cannot share {device}; pass --device cpu or cuda")
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


class WholeBatchNorm(TorchFunctionMode):
    """While inside, batch statistics are those of all ranks' batches together, on any device."""

    def __init__(self, ranks: Ranks):
        super().__init__()
        self.ranks = ranks

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace ``F.batch_norm``, which every batch-norm layer ends in."""
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return whole_batch_norm(*args, **kwargs, ranks=self.ranks)
        return func(*args, **kwargs)


def whole_batch_norm(
    images: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    ranks: Ranks,
) -> Tensor:
    """Do what ``F.batch_norm`` does, with statistics of the whole batch; differentiable."""
    if not training:
        return F.batch_norm(
            images, running_mean, running_var, weight, bias, training, momentum, eps
        )
    axes = [axis for axis in range(images.ndim) if axis != 1]
    shape = [1, -1] + [1] * (images.ndim - 2)
    exact = images.to(torch.promote_types(images.dtype, torch.float32))
    count = ranks.count * exact.numel() // exact.shape[1]
    mean = gather(exact.sum(axes)[None], ranks).sum(0) / count
    centred = exact - mean.view(shape)
    variance = gather(centred.square().sum(axes)[None], ranks).sum(0) / count
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        if running_var is not None:
            unbiased = variance * (count / (count - 1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    normal = centred * (variance + eps).rsqrt().view(shape)
    normal = normal if weight is None else normal * weight.view(shape)
    normal = normal if bias is None else normal + bias.view(shape)
    return normal.to(images.dtype)
