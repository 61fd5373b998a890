"""Train the networks that the benchmark attacks and repairs."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from unbackdoor.networks import initialize
from unbackdoor.settings import SupervisedSettings
from unbackdoor.types import Labels, RawImages
from unbackdoor.views import shift_and_flip


def train_supervised(
    network: nn.Module,
    images: RawImages,
    labels: Labels,
    settings: SupervisedSettings,
    *,
    on_epoch: Callable[[int, float], None] | None = None,
) -> nn.Module:
    """Train ``network`` from new weights with cross-entropy, in place, and return it in eval mode.

    Args:
        network: Maps images in [0, 1] to logits; normalization is inside.
        images: Training images, poisoned already, on the device to use.
        labels: On the same device.
        on_epoch: Called after every epoch with its number, from 1, and its mean loss.
    """
    generator = torch.Generator(images.device).manual_seed(settings.seed)
    initialize(network, generator=torch.Generator().manual_seed(settings.seed))
    network.to(images.device).train()
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=settings.learning_rate,
        momentum=0.9,
        weight_decay=settings.weight_decay,
    )
    steps = settings.epochs * (len(images) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for epoch in range(1, settings.epochs + 1):
        total = torch.zeros((), device=images.device)
        order = torch.randperm(len(images), generator=generator, device=images.device)
        batches = order[: len(order) // settings.batch_size * settings.batch_size]
        for rows in batches.split(settings.batch_size):
            batch = images[rows]
            if settings.margin > 0:
                batch = shift_and_flip(batch, margin=settings.margin, generator=generator)
            loss = F.cross_entropy(network(batch.float() / 255), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        if on_epoch is not None:
            on_epoch(epoch, total.item() / max(len(batches) // settings.batch_size, 1))
    return network.eval()
