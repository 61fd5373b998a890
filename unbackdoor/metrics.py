"""Scores of a classifier under attack, and whether they last."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from unbackdoor.attacks.poisoning import PART, Attack, goal_labels
from unbackdoor.batchnorm import reestimate
from unbackdoor.data import LabeledImages
from unbackdoor.devices import deterministic, seeded
from unbackdoor.errors import CheckpointError, DataError
from unbackdoor.probe import NearestNeighbours, extract, linear_probe
from unbackdoor.types import Labels, RawImages

OtherImages = UInt8[Tensor, "m c h w"]  # not as many as the images beside them
OtherLabels = Int64[Tensor, " m"]


@dataclass(frozen=True)
class Scores:
    """What one classifier scores on one test set, as shares in [0, 1].

    Attributes:
        acc: Accuracy on clean images.
        asr: Attack success rate: triggered images taken for what the attacker wants.
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
        triggered: Of the images whose class is not already the attacker's goal, in their order.
        truth: The true classes of the triggered images.
        goals: The classes that the triggered images shall be taken for.
    """

    images: RawImages
    labels: Labels
    triggered: OtherImages
    truth: OtherLabels
    goals: OtherLabels


class Reading(NamedTuple):
    """One backbone's scores, by who reads its features, and whether the probe's last.

    What a user does to a backbone anyway can bring a backdoor back that was only masked, so the
    probe and the own head each read three times: as delivered, and twice after that.
    """

    head: Scores | None  # the backbone's own head, where it has one
    probe: Scores  # a linear probe, as delivered
    neighbours: Scores  # votes of the nearest labeled features
    reestimated: Scores | None = None  # batch-norm statistics re-estimated on plain clean images
    fine_tuned: Scores | None = None  # after a short clean fine-tuning
    head_reestimated: Scores | None = None  # the own head, statistics re-estimated
    head_fine_tuned: Scores | None = None  # the own head, fine-tuned with the backbone

    @property
    def durable(self) -> dict[str, Scores]:
        """The probe's readings, as delivered and later, by name."""
        readings = ("delivered", "reestimated", "fine_tuned")
        pairs = zip(readings, (self.probe, self.reestimated, self.fine_tuned), strict=True)
        return {name: scores for name, scores in pairs if scores is not None}

    @property
    def worst(self) -> Scores:
        """The probe's reading with the highest ASR."""
        return max(self.durable.values(), key=lambda scores: scores.asr)


class Goals(NamedTuple):
    """What an attacker wants of each test image."""

    classes: Labels
    others: Bool[Tensor, " n"]  # which are not already of that class


def find_goals(labels: Labels, attack: Attack, *, classes: int) -> Goals:
    """Return the class that every test image shall be taken for, and which are of another.

    All-to-one, these are the images of other classes than the target; all-to-all, every image.

    Raises:
        DataError: If there is none, or the target class is out of range.
    """
    if attack.goal == "all-to-one" and not 0 <= attack.target < classes:
        raise DataError(
            f"target class {attack.target} is out of range: 0 to {classes - 1}; choose another "
            "(--target, or a grid's target), or data with that class"
        )
    goals = goal_labels(labels, attack, classes=classes)
    others = labels != goals
    if not others.any():
        raise DataError(
            f"every test image is of the target class {attack.target}; ASR is undefined"
        )
    return Goals(goals, others)


def make_test_set(images: RawImages, labels: Labels, attack: Attack, *, classes: int) -> TestSet:
    """Return a test set with every image triggered whose class is not already the goal.

    Raises:
        DataError: See :func:`find_goals`; or if the images are too small for the trigger.
    """
    goals, others = find_goals(labels, attack, classes=classes)
    parts = images[others].split(PART)
    triggered = torch.cat([attack.trigger(part) for part in parts])
    return TestSet(images, labels, triggered, labels[others], goals[others])


def score(
    backbone: nn.Module, classifiers: Mapping[str, nn.Module], test: TestSet
) -> dict[str, Scores]:
    """Score classifiers of the features of ``backbone``, which are computed once.

    Args:
        classifiers: By name; each maps features ``(n, d)`` to one number a class.

    Raises:
        CheckpointError: If a classifier yields NaN, which no class is the largest of.
    """
    clean, triggered = extract(backbone, test.images), extract(backbone, test.triggered)
    found = {}
    for name, classify in classifiers.items():
        of_clean, of_triggered = classify(clean), classify(triggered)
        if of_clean.isnan().any() or of_triggered.isnan().any():
            raise CheckpointError(f"{name}: yields NaN; its weights are damaged")
        found[name] = count_hits(of_clean.argmax(1).cpu(), of_triggered.argmax(1).cpu(), test)
    return found


def count_hits(clean: Labels, triggered: OtherLabels, test: TestSet) -> Scores:
    """Return the scores of predictions for the clean and for the triggered test images."""
    return Scores(
        acc=_share(clean == test.labels),
        asr=_share(triggered == test.goals),
        pa=_share(triggered == test.truth),
        images=len(test.labels),
        triggered=len(test.truth),
    )


def _share(hits: Tensor) -> float:
    return hits.sum().item() / len(hits)


def read(
    backbone: nn.Module,
    head: nn.Module | None,
    labeled: LabeledImages,
    test: TestSet,
    *,
    plain: OtherImages | None = None,
) -> Reading:
    """Score ``backbone`` through its head, a probe and nearest neighbours, and perhaps later again.

    Args:
        head: The backbone's own; maps features to logits.
        labeled: Clean images that the probe is trained on, the neighbours vote from, and the
            fine-tuning has.
        plain: Clean unlabeled images to re-estimate batch-norm statistics on; without them, the
            readings after re-estimation and after fine-tuning are left out.
    """
    classes, features = len(labeled.classes), extract(backbone, labeled.images)
    probe = linear_probe(features, labeled.labels, classes=classes)
    readers: dict[str, nn.Module] = {
        "probe": probe,
        "neighbours": NearestNeighbours(features, labeled.labels, classes=classes),
    }
    if head is not None:
        readers["head"] = copy.deepcopy(head).cpu()
    scores = score(backbone, readers, test)
    reading = Reading(scores.get("head"), scores["probe"], scores["neighbours"])
    if plain is None:
        return reading

    renewed = reestimated(backbone, plain)
    features = extract(renewed, labeled.images)
    renewed_probe = linear_probe(features, labeled.labels, classes=classes)
    own = {"head": readers["head"]} if head is not None else {}
    later = score(renewed, {"probe": renewed_probe, **own}, test)
    return reading._replace(
        reestimated=later["probe"],
        fine_tuned=_fine_tuned(backbone, probe, labeled, test),
        head_reestimated=later.get("head"),
        head_fine_tuned=None if head is None else _fine_tuned(backbone, head, labeled, test),
    )


def _fine_tuned(
    backbone: nn.Module, classifier: nn.Module, labeled: LabeledImages, test: TestSet
) -> Scores | None:
    tuned, tuned_classifier = fine_tune(backbone, classifier, labeled.images, labeled.labels)
    try:
        return score(tuned, {"fine-tuned": tuned_classifier.cpu()}, test)["fine-tuned"]
    except CheckpointError:  # it ended in NaN, of which evaluation tells
        return None


def reestimated(backbone: nn.Module, images: RawImages) -> nn.Module:
    """Return a copy of ``backbone`` with batch-norm statistics of ``images``, in random batches.

    They may be in the order of their classes, and a batch of one class varies too little.
    """
    renewed, device = copy.deepcopy(backbone), next(backbone.parameters()).device
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    batches = (images[rows].to(device) for rows in even_parts(order, most=250))
    reestimate(renewed, (batch.float() / 255 for batch in batches))
    return renewed


def even_parts(rows: Tensor, *, most: int) -> tuple[Tensor, ...]:
    """Return ``rows`` in parts of at most ``most`` and about one size.

    A short last one would count as much as a whole one where statistics are averaged over parts.
    """
    return rows.chunk(math.ceil(len(rows) / most))


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
    they are: what a downstream user does to a backbone. The same in every run.
    """
    device = next(backbone.parameters()).device
    backbone, head = copy.deepcopy(backbone).train(), copy.deepcopy(head).to(device).train()
    weights = [*backbone.parameters(), *head.parameters()]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.SGD(weights, lr=learning_rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(seed)
    with deterministic(), seeded(seed, device):
        for _ in range(epochs):
            for rows in torch.randperm(len(images), generator=generator).split(batch_size):
                if len(rows) < 2:
                    continue  # one image has no batch statistics
                logits = head(backbone(images[rows].to(device).float() / 255))
                loss = F.cross_entropy(logits, labels[rows].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
    for weight in weights:
        weight.requires_grad_(False)
    return backbone.eval(), head.eval()
