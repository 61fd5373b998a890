"""Fine-tuning (FT): train the whole classifier on the defender's labeled images."""

import torch

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
from unbackdoor.defenses.settings import FineTuningSettings
from unbackdoor.types import OnStep


def fine_tune(
    backbone: Backbone,
    data: DefenseData,
    settings: FineTuningSettings,
    *,
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
    keep: Keeper | None = None,
) -> Defended:
    """Return a copy of ``backbone`` and its head after cross-entropy training on ``data``.

    Raises:
        ArchitectureError: If the backbone has no head.
        DataError: If ``data`` has no labels, or labels that the head does not know.
        DivergedError: If the loss is no longer finite.

    Source:
        The baseline of the CBD paper, section 4 and appendix A.2.
    """
    labels = labels_of(backbone, data)
    repaired = copy_of(backbone, device)
    count = counter(steps_of(len(labels), settings.tuning), on_step)
    tune(
        repaired,
        data.images,
        labels,
        settings.tuning,
        seed=settings.seed,
        after_step=count,
        keep=keep,
    )
    return Defended(finished(repaired), {"images": len(labels)})
