"""Adversarial fine-tuning: train on adversarial examples with the labels of their originals."""

import torch

from unbackdoor.backbones import Backbone
from unbackdoor.batchnorm import batch_statistics
from unbackdoor.defenses.common import (
    Defended,
    DefenseData,
    OnStep,
    copy_of,
    counter,
    cross_entropy,
    finished,
    labels_of,
    steps_of,
    tune,
)
from unbackdoor.defenses.settings import AdversarialSettings
from unbackdoor.pgd import linf_pgd
from unbackdoor.types import Images, Labels, Scalar


def fine_tune_adversarially(
    backbone: Backbone,
    data: DefenseData,
    settings: AdversarialSettings,
    *,
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
) -> Defended:
    """Return a copy of ``backbone`` after training on clean and on adversarial images.

    A backdoored network's untargeted adversarial examples resemble triggered images in its
    features, so that learning their true labels unlearns the trigger. They are searched for in
    every step against the network as it then is.

    Raises:
        ArchitectureError: If the backbone has no head.
        DataError: If ``data`` has no labels, or labels that the head does not know.
        DivergedError: If the loss is no longer finite.

    Source:
        Mu et al. 2022, https://arxiv.org/abs/2202.06312: its adversarial fine-tuning.

    Differs from the paper: clean images alone, of which the defender is sure; the paper's later
    versions also clean the poisoned training set, which a defender of a downloaded file lacks.
    """
    labels = labels_of(backbone, data)
    repaired = copy_of(backbone, device)
    generator = torch.Generator(repaired.mean.device).manual_seed(settings.seed)
    loss = cross_entropy(repaired)

    def loss_of(images: Images, truth: Labels) -> Scalar:
        with batch_statistics(repaired, batch=False):  # the search must not move them
            found = linf_pgd(
                lambda candidates: loss(candidates, truth),
                images,
                epsilon=settings.epsilon,
                step_size=settings.step_size,
                steps=settings.steps,
                generator=generator,
            )
        return settings.clean * loss(images, truth) + (1 - settings.clean) * loss(found, truth)

    tune(
        repaired,
        data.images,
        labels,
        settings.tuning,
        seed=settings.seed,
        loss_of=loss_of,
        after_step=counter(steps_of(len(labels), settings.tuning), on_step),
    )
    return Defended(finished(repaired), {"images": len(labels)})
