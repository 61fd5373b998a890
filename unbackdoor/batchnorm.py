"""Batch normalization's running statistics: a backdoor can hide behind them.

Statistics that moved to augmented and perturbed views mask a trigger until somebody re-estimates
them, so whoever tunes or scores a network has to say which statistics were in use.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from unbackdoor.ranks import ALONE, Ranks, WholeBatchNorm
from unbackdoor.types import Images


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """Return the batch-norm layers of ``module`` that keep running statistics."""
    return [
        layer
        for layer in module.modules()
        if isinstance(layer, _BatchNorm) and layer.track_running_stats
    ]


def without_running_statistics(module: nn.Module) -> list[str]:
    """Return the names of batch-norm layers that always normalize by the batch."""
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and not layer.track_running_stats
    ]


@contextmanager
def batch_statistics(
    module: nn.Module, *, batch: bool, moving: bool = True, ranks: Ranks = ALONE
) -> Iterator[None]:
    """Normalize by the statistics of each batch, or by the running ones, while inside.

    Only batch-norm layers change; dropout and the like stay as they are.

    Args:
        batch: Whether each batch's own statistics are used.
        moving: Whether they move the running ones.
        ranks: A batch is that of all of them together.
    """
    layers = batch_norms(module)
    before = [(layer.training, layer.momentum) for layer in layers]
    for layer in layers:
        layer.train(batch)
        if not moving:
            layer.momentum = 0.0
    try:
        with WholeBatchNorm(ranks) if batch and ranks.count > 1 else nullcontext():
            yield
    finally:
        for layer, (mode, momentum) in zip(layers, before, strict=True):
            layer.train(mode)
            layer.momentum = momentum


@torch.no_grad()
def track(module: nn.Module, images: Images, *, ranks: Ranks = ALONE) -> None:
    """Let the running statistics of ``module`` take one step towards those of ``images``."""
    if batch_norms(module):
        with batch_statistics(module, batch=True, ranks=ranks):
            module(images)


@torch.no_grad()
def reestimate(module: nn.Module, batches: Iterable[Images], *, ranks: Ranks = ALONE) -> None:
    """Replace the running statistics of ``module`` by the mean of those of all ``batches``.

    Nothing else changes; a network without batch norm stays as it is and reads no batch.

    Args:
        batches: Plain images in [0, 1], in batches of two images or more, of all ranks together.
    """
    layers = batch_norms(module)
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a cumulative mean
    try:
        with batch_statistics(module, batch=True, ranks=ranks):
            for images in batches:
                module(images)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
