"""Scores of a classifier under attack, and whether they last."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from unbackdoor.batchnorm import reestimate
from unbackdoor.errors import DataError
from unbackdoor.probe import extract, linear_probe
from unbackdoor.types import Labels, RawImages

OtherImages = UInt8[Tensor, "m c h w"]  # not as many as the images beside them


@dataclass(frozen=True)
class Scores:
    """What one classifier scores on one test set, as shares in [0, 1].

    Attributes:
        acc: Accuracy on clean images.
        asr: Attack success rate: triggered images of other classes taken for the target.
        pa: Poisoned accuracy: the same images taken for their true class.
        images: Clean test images behind ``acc``.
        triggered: Test images of other classes behind ``asr`` and ``pa``.
    """

    acc: float
    asr: float
    pa: float
    images: int
    triggered: int


@dataclass(frozen=True, eq=False)
class TestSet:
    """Test images as they are and triggered; what the attacker wants is part of it.

    Attributes:
        images: Shape ``(n, c, h, w)``.
        labels: Shape ``(n,)``.
        triggered: Of the images of other classes than the target, in their order.
        target: The class that triggered images shall be taken for.
    """

    images: RawImages
    labels: Labels
    triggered: OtherImages
    target: int


class Durability(NamedTuple):
    """Scores through a probe: as delivered, and after what a user does to a backbone anyway."""

    delivered: Scores
    reestimated: Scores  # batch-norm statistics re-estimated on plain clean images
    fine_tuned: Scores  # after a short clean fine-tuning

    @property
    def worst(self) -> Scores:
        """Return the reading with the highest ASR."""
        return max(self, key=lambda scores: scores.asr)


def make_test_set(
    images: RawImages,
    labels: Labels,
    *,
    trigger: Callable[[RawImages], RawImages],
    target: int,
) -> TestSet:
    """Return a test set with every image of another class than ``target`` triggered, too.

    Raises:
        DataError: If no image is of another class.
    """
    others = labels != target
    if not others.any():
        raise DataError(f"every test image is of the target class {target}; ASR is undefined")
    return TestSet(images, labels, trigger(images[others]), target)


def score(backbone: nn.Module, head: nn.Module, test: TestSet) -> Scores:
    """Score ``head`` on the features of ``backbone``."""

    def predict(images: RawImages) -> Labels:
        logits: Tensor = head(extract(backbone, images))
        return logits.argmax(1)

    others = test.labels[test.labels != test.target]
    triggered = predict(test.triggered)
    return Scores(
        acc=(predict(test.images) == test.labels).float().mean().item(),
        asr=(triggered == test.target).float().mean().item(),
        pa=(triggered == others).float().mean().item(),
        images=len(test.labels),
        triggered=len(others),
    )


def probe_score(
    backbone: nn.Module, images: RawImages, labels: Labels, test: TestSet, *, classes: int
) -> Scores:
    """Score a linear probe that is trained on the features of ``images``."""
    probe = linear_probe(extract(backbone, images), labels, classes=classes)
    return score(backbone, probe, test)


def durability(
    backbone: nn.Module,
    images: RawImages,
    labels: Labels,
    test: TestSet,
    *,
    classes: int,
    plain: OtherImages,
) -> Durability:
    """Score ``backbone`` as delivered, after re-estimation, and after a short fine-tuning.

    Args:
        images: The probe's labeled images; the fine-tuning has the same.
        plain: Clean unlabeled images to re-estimate batch-norm statistics on.
    """
    probe = linear_probe(extract(backbone, images), labels, classes=classes)
    renewed = copy.deepcopy(backbone)
    reestimate(renewed, (batch.float() / 255 for batch in plain.split(250) if len(batch) > 1))
    tuned, head = fine_tune(backbone, probe, images, labels)
    return Durability(
        delivered=score(backbone, probe, test),
        reestimated=probe_score(renewed, images, labels, test, classes=classes),
        fine_tuned=score(tuned, head, test),
    )


def fine_tune(
    backbone: nn.Module,
    head: nn.Module,
    images: RawImages,
    labels: Labels,
    *,
    epochs: int = 10,
    batch_size: int = 64,
    learning_rate: float = 0.01,
    seed: int = 0,
) -> tuple[nn.Module, nn.Module]:
    """Return copies of backbone and head after plain supervised fine-tuning, in eval mode.

    SGD with momentum 0.9, weight decay 5e-4 and a cosine, batch norm in training mode, images as
    they are: what a downstream user does to a backbone.
    """
    backbone, head = copy.deepcopy(backbone).train(), copy.deepcopy(head).train()
    weights = [*backbone.parameters(), *head.parameters()]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.SGD(weights, lr=learning_rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(batch_size):
            if len(rows) < 2:
                continue  # one image has no batch statistics
            logits = head(backbone(images[rows].float() / 255))
            loss = F.cross_entropy(logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    for weight in weights:
        weight.requires_grad_(False)
    return backbone.eval(), head.eval()
