"""Train the networks that the benchmark attacks and repairs: with labels, and with SimCLR."""

import math
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from timm.optim.lars import Lars
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from unbackdoor.attacks.poisoning import Attack, poison_batch
from unbackdoor.cbd import momentum_of, restore_momentum
from unbackdoor.devices import Precision, deterministic, fast_layout, in_precision, seeded
from unbackdoor.errors import DataError, DivergedError
from unbackdoor.losses import nt_xent
from unbackdoor.networks import initialize
from unbackdoor.settings import VictimSettings
from unbackdoor.types import Images, Labels, OnStep, RawImages, Scalar
from unbackdoor.views import random_views, shift_and_flip


class Epoch(NamedTuple):
    """Mean loss of one epoch, and how long it took."""

    loss: float
    seconds: float


class TrainingState(NamedTuple):
    """What the epochs to come depend on, beside data and settings."""

    history: tuple[Epoch, ...]
    network: dict[str, Tensor]
    momentum: dict[str, Tensor]  # the optimizer's buffers, named like the weights
    generator: Tensor  # its state


def train_supervised(
    network: nn.Module,
    images: RawImages,
    labels: Labels,
    settings: VictimSettings,
    *,
    attack: Attack | None = None,
    classes: int | None = None,
    start: Mapping[str, Tensor] | None = None,
    precision: Precision = "fp32",
    state: TrainingState | None = None,
    on_step: OnStep | None = None,
    on_epoch: Callable[[TrainingState], None] | None = None,
) -> nn.Module:
    """Train ``network`` from new weights with cross-entropy, in place, and return it in eval mode.

    Args:
        network: Maps images in [0, 1] to logits; normalization is inside.
        images: Training images, on the device to use; poisoned already, unless ``attack`` redraws
            in every batch.
        labels: On the same device.
        attack: Poisons every batch anew, before it is augmented.
        classes: Number of classes; needed with ``attack``.
        start: Tensors of the network to begin with, by name; only the others are drawn anew.
        precision: ``bf16`` runs the network in bfloat16.
        state: Continue after its last epoch.
        on_step: Called after every step with the number of steps done and of all steps.
        on_epoch: Called after every epoch with the state to continue from.

    Raises:
        DataError: If the images do not fill one batch.
        DivergedError: If the loss is no longer finite.
    """
    per_epoch = count_steps(len(images), settings)
    layout = _layout(network, settings, images.device)

    def loss_of(rows: Tensor, step: int, generator: torch.Generator) -> Scalar:
        batch, truth = images[rows], labels[rows]
        if attack is not None:
            batch, truth = poison_batch(
                batch, truth, attack, classes=classes or 0, step=step, generator=generator
            )
        plain = augmented(batch, settings, generator=generator)
        return F.cross_entropy(run(plain.contiguous(memory_format=layout)), truth)

    initialize(network.cpu(), generator=torch.Generator().manual_seed(settings.seed))
    _begin_with(network, start)
    run = in_precision(network, precision)
    trained = _train(
        network,
        loss_of,
        settings,
        images=len(images),
        steps_per_epoch=per_epoch,
        device=images.device,
        state=state,
        on_step=on_step,
        on_epoch=on_epoch,
    )
    return trained.eval()


def train_simclr(
    backbone: nn.Module,
    images: RawImages,
    settings: VictimSettings,
    *,
    start: Mapping[str, Tensor] | None = None,
    precision: Precision = "fp32",
    state: TrainingState | None = None,
    on_step: OnStep | None = None,
    on_epoch: Callable[[TrainingState], None] | None = None,
) -> nn.Module:
    """Train ``backbone`` from new weights without labels, in place, and return it in eval mode.

    A projection head (linear, ReLU, linear) is trained with it and dropped.

    Args:
        backbone: Maps images in [0, 1] to features; normalization is inside.
        images: Training images, poisoned already, on the device to use.

    The rest is as in :func:`train_supervised`.

    Source:
        SimCLR, Algorithm 1, https://arxiv.org/abs/2002.05709.
    """
    per_epoch = count_steps(len(images), settings)
    with torch.no_grad():
        width = backbone.cpu().eval()(images[:2].cpu().float() / 255).shape[1]
    draws = torch.Generator().manual_seed(settings.seed)
    initialize(backbone, generator=draws)
    _begin_with(backbone, start)
    first, last = nn.Linear(width, width), nn.Linear(width, settings.projection)
    for layer in (first, last):
        nn.init.kaiming_normal_(layer.weight, generator=draws)
        nn.init.zeros_(layer.bias)
    head = nn.Sequential(first, nn.ReLU(), last)
    network = nn.ModuleDict({"backbone": backbone, "projection": head.to(images.device)})
    run = in_precision(backbone, precision)
    layout = _layout(backbone, settings, images.device)

    def loss_of(rows: Tensor, step: int, generator: torch.Generator) -> Scalar:
        plain = images[rows].float() / 255
        views = torch.cat(
            [random_views(plain, settings.views, generator=generator) for _ in range(2)]
        )
        projected = head(run(views.contiguous(memory_format=layout)))
        return nt_xent(*projected.chunk(2), temperature=settings.temperature)

    _train(
        network,
        loss_of,
        settings,
        images=len(images),
        steps_per_epoch=per_epoch,
        device=images.device,
        state=state,
        on_step=on_step,
        on_epoch=on_epoch,
    )
    return backbone.eval()


def augmented(batch: RawImages, settings: VictimSettings, *, generator: torch.Generator) -> Images:
    """Return a batch in [0, 1], augmented as the settings say for supervised training."""
    if settings.augment == "shift":
        batch = shift_and_flip(batch, margin=settings.margin, generator=generator)
    plain = batch.float() / 255
    if settings.augment == "views":
        plain = random_views(plain, settings.views, generator=generator)
    return plain


def rate_at(settings: VictimSettings, progress: float) -> float:
    """Return the learning rate after ``progress`` epochs."""
    if progress < settings.warmup:
        return settings.learning_rate * progress / settings.warmup
    share = (progress - settings.warmup) / max(settings.epochs - settings.warmup, 1)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(share, 1)))


def _begin_with(network: nn.Module, start: Mapping[str, Tensor] | None) -> None:
    if unknown := set(start or ()) - set(network.state_dict()):
        raise ValueError(f"the network has no {min(unknown)}")
    network.load_state_dict(start or {}, strict=False)


def _train(
    network: nn.Module,
    loss_of: Callable[[Tensor, int, torch.Generator], Scalar],
    settings: VictimSettings,
    *,
    images: int,
    steps_per_epoch: int,
    device: torch.device,
    state: TrainingState | None,
    on_step: OnStep | None,
    on_epoch: Callable[[TrainingState], None] | None,
) -> nn.Module:
    """Minimize ``loss_of(rows, step, generator)`` over shuffled batches of rows."""
    generator = torch.Generator(device).manual_seed(settings.seed)
    network.to(device).train()
    network.to(memory_format=_layout(network, settings, device))
    optimizer = _optimizer(network, settings)
    history: tuple[Epoch, ...] = ()
    if state is not None:
        history = state.history
        _restore(state, network, optimizer, generator)
    steps, batch_size = settings.epochs * steps_per_epoch, settings.batch_size
    step = len(history) * steps_per_epoch
    with deterministic():
        for _ in range(len(history), settings.epochs):
            started = time.monotonic()
            total = torch.zeros((), device=device)
            order = torch.randperm(images, generator=generator, device=device)
            for rows in order[: steps_per_epoch * batch_size].split(batch_size):
                for group in optimizer.param_groups:
                    group["lr"] = rate_at(settings, step / steps_per_epoch)
                with seeded((settings.seed * 1_000_003 + step) % 2**63, device):
                    loss = loss_of(rows, step, generator)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach()
                step += 1
                if on_step is not None:
                    on_step(step, steps)
            mean = total.item() / steps_per_epoch
            if not math.isfinite(mean):
                raise DivergedError(
                    f"the training loss is {mean} in epoch {len(history) + 1}; "
                    "pass a smaller --learning-rate"
                )
            history = (*history, Epoch(mean, time.monotonic() - started))
            if on_epoch is not None:
                on_epoch(_state(network, optimizer, generator, history))
    return network


def _optimizer(network: nn.Module, settings: VictimSettings) -> torch.optim.Optimizer:
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9, weight_decay=decay)
    matrices = [weight for weight in network.parameters() if weight.ndim > 1]
    vectors = [weight for weight in network.parameters() if weight.ndim <= 1]
    # biases and batch norm are neither decayed nor scaled (SimCLR, section 2.2)
    groups = [
        {"params": matrices, "weight_decay": decay, "always_adapt": True},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return Lars(groups, lr=rate, momentum=0.9)


def count_steps(images: int, settings: VictimSettings) -> int:
    """Return the steps of an epoch over so many images.

    Raises:
        DataError: If they do not fill one batch.
    """
    steps = images // settings.batch_size
    if steps == 0:
        raise DataError(
            f"{images} training images do not fill one batch of {settings.batch_size}; "
            "pass more images or a smaller --batch-size"
        )
    return steps


def _layout(
    network: nn.Module, settings: VictimSettings, device: torch.device
) -> torch.memory_format:
    return fast_layout(network, device) if settings.channels_last else torch.contiguous_format


def _state(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    history: tuple[Epoch, ...],
) -> TrainingState:
    return TrainingState(
        history,
        {name: value.detach().clone() for name, value in network.state_dict().items()},
        momentum_of(optimizer, network),
        generator.get_state(),
    )


def _restore(
    state: TrainingState,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> None:
    network.load_state_dict(state.network)
    restore_momentum(optimizer, network, state.momentum)
    generator.set_state(state.generator)
