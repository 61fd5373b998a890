"""Neural attention distillation (NAD): a fine-tuned copy of the victim teaches the victim."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from unbackdoor.backbones import Backbone
from unbackdoor.defenses.common import (
    Defended,
    DefenseData,
    copy_of,
    counter,
    finished,
    labels_of,
    steps_of,
    tune,
)
from unbackdoor.defenses.keeping import Keeper
from unbackdoor.defenses.settings import NadSettings
from unbackdoor.defenses.stages import find_stage, watching
from unbackdoor.types import Images, Labels, OnStep, Scalar


def distill_attention(
    backbone: Backbone,
    data: DefenseData,
    settings: NadSettings,
    *,
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
    keep: Keeper | None = None,
) -> Defended:
    """Return a copy of ``backbone`` whose attention maps follow those of a fine-tuned teacher.

    Raises:
        ArchitectureError: If the backbone has no head, or no stage with a map.
        DataError: If ``data`` has no labels, or labels that the head does not know.
        DivergedError: If the loss is no longer finite.

    Source:
        Li et al. 2021, https://arxiv.org/abs/2101.05930; the last stage alone and beta:
        the CBD paper, appendix A.2.
    """
    labels = labels_of(backbone, data)
    teacher, student = copy_of(backbone, device), copy_of(backbone, device)
    stage = find_stage(student, data.images, name=settings.stage)
    before, after = (
        steps_of(len(labels), tuning) for tuning in (settings.teacher, settings.tuning)
    )
    tune(
        teacher,
        data.images,
        labels,
        settings.teacher,
        seed=settings.seed,
        after_step=counter(before + after, on_step),
        keep=keep,
    )

    first, last = (torch.full((), torch.nan, device=backbone.mean.device) for _ in range(2))
    with watching(student, stage) as of_student, watching(teacher, stage) as of_teacher:

        def loss_of(images: Images, truth: Labels) -> Scalar:
            logits = student.logits(images)
            with torch.no_grad():
                teacher(images)  # frozen, in eval mode
            distance = attention_distance(of_student[0], of_teacher[0], axis=stage.axis)
            last.copy_(distance.detach())
            first.copy_(torch.where(first.isnan(), last, first))
            return F.cross_entropy(logits, truth) + settings.beta * distance

        tune(
            student,
            data.images,
            labels,
            settings.tuning,
            seed=settings.seed,
            loss_of=loss_of,
            after_step=counter(before + after, on_step, before=before),
            keep=keep,
            also={"distances": {"first": first, "last": last}},
        )
    log = {
        "stage": stage.name,
        "positions": stage.positions,
        "attention_distance_first": first.item(),
        "attention_distance_last": last.item(),
    }
    return Defended(finished(student), log)


def attention(output: Tensor, *, axis: int) -> Float[Tensor, "n positions"]:
    """Return each image's attention map, of length 1: the squares of a map, summed over channels.

    Args:
        output: Of a stage, see :class:`Stage`.
        axis: Of its channels.

    Source:
        Li et al. 2021, the sum of powers with p = 2.
    """
    return F.normalize(output.pow(2).sum(axis).flatten(1), dim=1)


def attention_distance(student: Tensor, teacher: Tensor, *, axis: int) -> Scalar:
    """Return the mean squared difference of two attention maps, over images and positions."""
    return F.mse_loss(attention(student, axis=axis), attention(teacher, axis=axis))
