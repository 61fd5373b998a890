"""Adversarial fine-tuning: train on adversarial examples with the labels of their originals."""

import torch

from unbackdoor.backbones import Backbone
from unbackdoor.batchnorm import batch_statistics
from unbackdoor.defenses.common import (
    Defended,
    DefenseData,
    copy_of,
    counter,
    cross_entropy,
    finished,
    labels_of,
    steps_of,
    tune,
)
from unbackdoor.defenses.keeping import Keeper
from unbackdoor.defenses.settings import AdversarialSettings
from unbackdoor.pgd import linf_pgd
from unbackdoor.types import Images, Labels, OnStep, Scalar


def fine_tune_adversarially(
    backbone: Backbone,
    data: DefenseData,
    settings: AdversarialSettings,
    *,
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
    keep: Keeper | None = None,
) -> Defended:
    """Return a copy of ``backbone`` after training on adversarial and then on clean images.

    A backdoored network's untargeted adversarial examples resemble triggered images in its
    features, so that learning their true labels unlearns the trigger. They are searched for in
    every step against the network as it then is; the epochs on clean images restore accuracy.

    Raises:
        ArchitectureError: If the backbone has no head.
        DataError: If ``data`` has no labels, or labels that the head does not know.
        DivergedError: If the loss is no longer finite.

    Source:
        Mu et al. 2023, https://arxiv.org/abs/2202.06312: adversarial fine-tuning (AFT), its
        defense of somebody who has clean images and not the training set.
    """
    labels = labels_of(backbone, data)
    repaired = copy_of(backbone, device)
    loss = cross_entropy(repaired)
    epoch = 0

    def before_epoch(number: int) -> None:
        nonlocal epoch
        epoch = number

    def loss_of(images: Images, truth: Labels) -> Scalar:
        clean = settings.clean if epoch < settings.adversarial_epochs else 1.0
        if clean == 1:
            return loss(images, truth)
        with batch_statistics(repaired, batch=False):  # the search must not move them
            found = linf_pgd(
                lambda candidates: loss(candidates, truth),
                images,
                epsilon=settings.epsilon,
                step_size=settings.step_size,
                steps=settings.steps,
                generator=None,
            )
        if clean == 0:
            return loss(found, truth)
        return clean * loss(images, truth) + (1 - clean) * loss(found, truth)

    tune(
        repaired,
        data.images,
        labels,
        settings.tuning,
        seed=settings.seed,
        loss_of=loss_of,
        after_step=counter(steps_of(len(labels), settings.tuning), on_step),
        before_epoch=before_epoch,
        keep=keep,
    )
    return Defended(finished(repaired), {"images": len(labels)})
