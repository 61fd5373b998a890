"""Train a detector; its visible loop. Every draw depends on the seed and the step alone."""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unbackdoor.cbd import momentum_of, restore_momentum
from unbackdoor.data import CACHE_BYTES, THREADS
from unbackdoor.detection.network import FittedImages, fit
from unbackdoor.detection.voc import Boxes, VocImages
from unbackdoor.devices import deterministic, seeded
from unbackdoor.errors import DivergedError
from unbackdoor.resume import is_due
from unbackdoor.settings import DetectionSettings
from unbackdoor.types import OnStep

DROPS = (3 / 4, 11 / 12)  # shares of the steps after which the rate falls to a tenth


class Epoch(NamedTuple):
    """Mean loss of one epoch, and how long it took."""

    loss: float
    seconds: float


class TrainingState(NamedTuple):
    """What the steps to come depend on, beside data and settings."""

    step: int  # done
    history: tuple[Epoch, ...]
    unfinished: Epoch  # sums over the steps of the epoch that has begun
    network: dict[str, Tensor]
    momentum: dict[str, Tensor]  # the optimizer's buffers, named like the weights


class Sample(NamedTuple):
    """One image as the network takes it, and what is in it."""

    image: FittedImages
    boxes: Boxes
    labels: Tensor  # from 1: 0 is the background


def train_detector(
    detector: nn.Module,
    data: VocImages,
    settings: DetectionSettings,
    *,
    device: torch.device,
    state: TrainingState | None = None,
    on_step: OnStep | None = None,
    on_epoch: Callable[[int, Epoch], None] | None = None,
    on_state: Callable[[TrainingState], None] | None = None,
) -> tuple[Epoch, ...]:
    """Train ``detector`` in place and leave it in eval mode; difficult objects are left out.

    Args:
        detector: Of ``make_detector``; goes to ``device``.
        state: Continue after its last step.
        on_step: Called after every step with the number of steps done and of all steps.
        on_epoch: Called after every epoch with its number from 1.
        on_state: Called now and then with the state to continue from, never after the last step.

    Returns:
        The history of all epochs.

    Raises:
        DataError: If an image is broken.
        DivergedError: If the loss is no longer finite.
    """
    detector.to(device).train()
    weights = [weight for weight in detector.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=0.0, momentum=0.9)
    per_epoch = math.ceil(len(data) / settings.batch_size)
    steps = settings.epochs * per_epoch
    step, unfinished = 0, Epoch(0.0, 0.0)
    history: tuple[Epoch, ...] = ()
    if state is not None:
        step, history, unfinished = state[:3]
        detector.load_state_dict(state.network)
        restore_momentum(optimizer, detector, state.momentum)
    kept_at = time.monotonic()
    with deterministic():
        for batch in batches(data, settings, first=step):
            started = time.monotonic()
            for group in optimizer.param_groups:
                group["lr"] = rate_at(settings, step, steps)
                group["weight_decay"] = settings.weight_decay
            loss = batch_loss(detector, batch, settings, step=step, device=device)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            value = loss.item()
            if not math.isfinite(value):
                raise DivergedError(
                    f"the loss is {value} in step {step + 1}; pass a smaller --learning-rate"
                )
            step += 1
            seconds = unfinished.seconds + time.monotonic() - started
            unfinished = Epoch(unfinished.loss + value, seconds)
            if on_step is not None:
                on_step(step, steps)
            if step % per_epoch == 0:
                history = (*history, Epoch(unfinished.loss / per_epoch, unfinished.seconds))
                unfinished = Epoch(0.0, 0.0)
                if on_epoch is not None:
                    on_epoch(len(history), history[-1])
            if on_state is not None and is_due(kept_at) and step < steps:
                tensors = {name: value.clone() for name, value in detector.state_dict().items()}
                momentum = momentum_of(optimizer, detector)
                on_state(TrainingState(step, history, unfinished, tensors, momentum))
                kept_at = time.monotonic()
    detector.eval()
    return history


def batch_loss(
    detector: nn.Module,
    batch: list[Sample],
    settings: DetectionSettings,
    *,
    step: int,
    device: torch.device,
) -> Tensor:
    """Return the sum of Faster R-CNN's four losses on one batch, mirrored and sampled by ``step``.

    torchvision samples boxes by the global generators, so they are seeded while it does.
    """
    draws = torch.Generator().manual_seed(_mixed(settings.seed, step))
    mirrored = torch.rand(len(batch), generator=draws) < settings.flip
    images, targets = [], []
    for sample, mirror in zip(batch, mirrored.tolist(), strict=True):
        image, boxes = sample.image, sample.boxes
        if mirror:
            left, top, right, bottom = boxes.unbind(1)
            width = image.shape[3]
            image = image.flip(3)
            boxes = torch.stack([width - right, top, width - left, bottom], dim=1)
        images.append(image[0].to(device).float() / 255)
        targets.append({"boxes": boxes.to(device), "labels": sample.labels.to(device)})
    with seeded(_mixed(settings.seed, step), device):
        losses = detector(images, targets)
    total: Tensor = torch.stack(list(losses.values())).sum()
    return total


def batches(
    data: VocImages, settings: DetectionSettings, *, first: int = 0
) -> Iterator[list[Sample]]:
    """Yield the batches from step ``first`` to the last; the next one is decoded meanwhile.

    Scaled images are kept where all of them fit in ``CACHE_BYTES``.
    """
    rows = [
        part.tolist()
        for epoch in range(settings.epochs)
        for part in torch.randperm(
            len(data), generator=torch.Generator().manual_seed(_mixed(settings.seed, epoch))
        ).split(settings.batch_size)
    ]
    keeps = len(data) * 3 * settings.shorter * settings.longer <= CACHE_BYTES
    kept: dict[int, Sample] = {}

    def get(row: int) -> Sample:
        sample = kept.get(row) or read_sample(data, row, settings)
        if keeps:
            kept[row] = sample
        return sample

    with ThreadPoolExecutor(THREADS) as pool:
        following = [pool.submit(get, row) for row in rows[first]] if first < len(rows) else []
        for step in range(first, len(rows)):
            waiting = following
            more = rows[step + 1] if step + 1 < len(rows) else []
            following = [pool.submit(get, row) for row in more]
            try:
                batch = [future.result() for future in waiting]
            except BaseException:
                for future in following:
                    future.cancel()
                raise
            yield batch


def read_sample(data: VocImages, row: int, settings: DetectionSettings) -> Sample:
    """Return one image scaled for the network, with the boxes of what is not difficult in it."""
    image = fit(data.read(row), settings)
    boxes, labels, difficult = data.objects[row]
    height, width = data.sizes[row]
    scale = torch.tensor([image.shape[3] / width, image.shape[2] / height]).repeat(2)
    return Sample(image, (boxes * scale)[~difficult], labels[~difficult] + 1)


def rate_at(settings: DetectionSettings, step: int, steps: int) -> float:
    """Return the learning rate of a step, counted from 0, of ``steps``."""
    rate = settings.learning_rate * 0.1 ** sum(step >= share * steps for share in DROPS)
    return rate * min(1.0, (step + 1) / (settings.warmup + 1))


def _mixed(seed: int, number: int) -> int:
    """Return a seed of its own for every number below 2 ** 31."""
    return (seed << 31) + number
