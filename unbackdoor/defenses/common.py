"""What several defenses share: their data and result, the supervised loop, a held-out split."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from unbackdoor.backbones import Backbone
from unbackdoor.defenses import DEFENSES
from unbackdoor.defenses.keeping import Keeper, Part, resumed
from unbackdoor.defenses.settings import Tuning
from unbackdoor.devices import deterministic, global_generator, laid_out, seeded
from unbackdoor.errors import ArchitectureError, DataError, DivergedError
from unbackdoor.types import Images, Labels, OnStep, RawImages, Scalar
from unbackdoor.views import shift_and_flip

Loss = Callable[[Images, Labels], Scalar]
AT_ONCE = 250  # images a pass where there is no gradient
MARGIN = 4  # pixels of padding before a random crop


@dataclass(frozen=True, eq=False)
class DefenseData:
    """All that a defense is given beside the backbone.

    Attributes:
        images: The defender's own, clean, shape ``(n, c, h, w)``, on the CPU.
        labels: Of these images, shape ``(n,)``: given by somebody, or what the victim itself
            predicts; ``None`` if there are none. On the CPU.
    """

    images: RawImages
    labels: Labels | None = None


class Defended(NamedTuple):
    """A repaired copy of a backbone, in eval mode, and what was chosen on the way."""

    backbone: Backbone
    log: dict[str, Any]  # as JSON can hold it


class Split(NamedTuple):
    """The defender's data, divided: one part to learn from, one to choose by."""

    images: RawImages
    labels: Labels
    held_images: RawImages
    held_labels: Labels


def copy_of(backbone: Backbone, device: torch.device | str) -> Backbone:
    """Return a copy to work on, on ``device``, in eval mode, laid out for fast convolutions."""
    copied = laid_out(copy.deepcopy(backbone).to(device))
    return copied.eval().requires_grad_(False)


def finished(backbone: Backbone) -> Backbone:
    """Return ``backbone`` as a defense hands it back: in eval mode, without gradients."""
    backbone.zero_grad(set_to_none=True)
    return backbone.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


def labels_of(backbone: Backbone, data: DefenseData) -> Labels:
    """Return the labels of ``data``, after it has been checked that they can be used.

    Raises:
        ArchitectureError: If the backbone has no head, or its head yields no logits.
        DataError: If there are no labels, or some are no classes of the head.
    """
    if not backbone.heads:
        without = ", ".join(name for name, entry in DEFENSES.items() if not entry.labels)
        raise ArchitectureError(
            "this defense needs the classifier's head, which the checkpoint lacks; of ours, "
            f"{without} do without"
        )
    if data.labels is None:
        raise DataError(
            "this defense needs labels; pass --labels given, or --labels pseudo for the victim's "
            "own predictions"
        )
    if len(data.labels) != len(data.images) or len(data.images) < 2:
        raise DataError(
            f"a defense needs two images or more and a label of each, got {len(data.images)} "
            f"images and {len(data.labels)} labels"
        )
    logits = logits_of(copy.deepcopy(backbone).eval(), data.images[:1])
    if logits.ndim != 2:
        shape = tuple(logits.shape)
        raise ArchitectureError(f"a defense needs logits (n, classes), the head yields {shape}")
    classes = logits.shape[1]
    low, high = int(data.labels.min()), int(data.labels.max())
    if low < 0 or high >= classes:
        raise DataError(f"labels are of classes {low} to {high}, but the head has {classes}")
    return data.labels


@torch.no_grad()
def logits_of(backbone: Backbone, images: RawImages) -> Tensor:
    """Return the logits of ``images``, shape ``(n, classes)``, on the CPU."""
    batches = images.split(AT_ONCE)
    return torch.cat([backbone.logits(to_unit(batch, backbone.mean)).cpu() for batch in batches])


def predict(backbone: Backbone, images: RawImages) -> Labels:
    """Return what ``backbone`` itself takes ``images`` for: its pseudo-labels, on the CPU."""
    return logits_of(backbone, images).argmax(1)


def accuracy(backbone: Backbone, images: RawImages, labels: Labels) -> float:
    """Return the share of ``images`` that are predicted as ``labels`` say."""
    return (predict(backbone, images) == labels).sum().item() / len(labels)


def split_off(images: RawImages, labels: Labels, *, held_out: float, seed: int) -> Split:
    """Divide the defender's own data; at least one image is on either side.

    Args:
        held_out: Share of the images to choose by.
        seed: Of the draw.
    """
    count = min(max(1, round(held_out * len(images))), len(images) - 1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held, kept = order[:count], order[count:]
    return Split(images[kept], labels[kept], images[held], labels[held])


def to_unit(raw: RawImages, like: Tensor) -> Images:
    """Return images in [0, 1], on the device of ``like``; weights decide the layout."""
    return raw.to(like.device, non_blocking=True).float() / 255


def counter(steps: int, on_step: OnStep | None, *, before: int = 0) -> Callable[[int], None]:
    """Return what to call after every step, with how many steps of a phase are done.

    Args:
        steps: Of all phases of a defense.
        before: Steps of the phases before.
    """

    def count(done: int) -> None:
        if on_step is not None:
            on_step(min(before + done, steps), steps)

    return count


def steps_of(images: int, tuning: Tuning) -> int:
    """Return how many steps ``tune`` takes."""
    full, rest = divmod(images, tuning.batch_size)
    return tuning.epochs * (full + (rest > 1))


def cross_entropy(backbone: Backbone) -> Loss:
    """Return the loss of the backbone's own logits."""
    return lambda images, labels: F.cross_entropy(backbone.logits(images), labels)


def tune(
    backbone: Backbone,
    images: RawImages,
    labels: Labels,
    tuning: Tuning,
    *,
    seed: int,
    loss_of: Loss | None = None,
    after_step: Callable[[int], None] | None = None,
    before_epoch: Callable[[int], None] | None = None,
    keep: Keeper | None = None,
    also: Mapping[str, Part] | None = None,
) -> None:
    """Train all of ``backbone`` in place, batch norm in training mode, and leave it in eval mode.

    Args:
        images: Shape ``(n, c, h, w)``; every epoch shuffles and augments them anew.
        labels: Handed to ``loss_of`` beside the images.
        seed: Of order, augmentation and dropout.
        loss_of: Maps a batch in [0, 1] and its labels to the loss; cross-entropy by default.
        after_step: Called after every step with how many are done, those of a run before as well.
        before_epoch: Called with the number of the epoch, from 0.
        keep: Goes on after the last epoch that it has.
        also: What ``loss_of`` changes, to be kept as well.

    Raises:
        DivergedError: If the loss is no longer finite.
    """
    loss_of = loss_of or cross_entropy(backbone)
    device = backbone.mean.device
    images, labels = images.to(device), labels.to(device)
    steps = steps_of(len(images), tuning)
    optimizer = torch.optim.SGD(
        backbone.requires_grad_(True).parameters(),
        lr=tuning.learning_rate,
        momentum=tuning.momentum,
        weight_decay=tuning.weight_decay,
    )
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, Part] = {
        "network": backbone,
        "optimizer": optimizer,
        "order": generator,
        "dropout": global_generator(device),
        **(also or {}),
    }
    with deterministic(), seeded(seed, device):
        for epoch in resumed(keep, tuning.epochs, parts):
            step = epoch * steps // tuning.epochs
            if before_epoch is not None:
                before_epoch(epoch)
            backbone.train()
            for drawn in shuffled(len(images), tuning.batch_size, generator=generator):
                rows = drawn.to(device)
                optimizer.param_groups[0]["lr"] = rate_at(tuning, epoch, step / steps)
                batch = augment(images[rows], tuning.augment, generator=generator)
                loss = loss_of(to_unit(batch, backbone.mean), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                if after_step is not None:
                    after_step(step)
            check_finite(loss, f"epoch {epoch + 1}")
    backbone.eval().requires_grad_(False)


def shuffled(count: int, batch_size: int, *, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield row numbers in random order, in batches; a batch of one has no statistics."""
    for rows in torch.randperm(count, generator=generator).split(batch_size):
        if len(rows) > 1:
            yield rows


def augment(
    batch: RawImages, how: Literal["shift", "none"], *, generator: torch.Generator
) -> RawImages:
    """Return a batch, moved by up to ``MARGIN`` pixels and mirrored at random, or as it is."""
    if how == "none":
        return batch
    margin = max(1, min(MARGIN, batch.shape[-1] // 8))
    return shift_and_flip(batch, margin=margin, generator=generator)


def rate_at(tuning: Tuning, epoch: int, progress: float) -> float:
    """Return the learning rate in an epoch, counted from 0, at ``progress`` through all steps."""
    if tuning.schedule == "constant":
        return tuning.learning_rate
    if tuning.schedule == "tenth":
        return tuning.learning_rate * (1.0 if epoch < 2 else 0.1)
    if tuning.schedule == "cosine-100":
        progress = min(epoch / 100, 1.0)
    return tuning.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def check_finite(loss: Tensor, when: str) -> None:
    """Raise a DivergedError unless ``loss`` is finite."""
    if not loss.isfinite().all():
        raise DivergedError(
            f"{when}: the loss is no longer finite; start again with a lower learning rate"
        )


def modules_with_rows(network: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of ``network`` that have one row of weights for each output channel."""
    return {
        name: module
        for name, module in network.named_modules()
        if name and isinstance(getattr(module, "weight", None), nn.Parameter)
    }


@torch.no_grad()
def zero_rows(module: nn.Module, channels: Tensor) -> None:
    """Make ``module`` emit 0 at ``channels``: their weights and their shift are 0 after this."""
    for name in ("weight", "bias"):
        values = getattr(module, name, None)
        if values is not None:
            values[channels.to(values.device)] = 0
