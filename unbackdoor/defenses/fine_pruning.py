"""Fine-Pruning (FP): silence the channels that clean images leave dormant, then fine-tune."""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unbackdoor.backbones import Backbone
from unbackdoor.defenses.common import (
    AT_ONCE,
    Defended,
    DefenseData,
    Split,
    accuracy,
    copy_of,
    counter,
    finished,
    labels_of,
    split_off,
    steps_of,
    tune,
)
from unbackdoor.defenses.keeping import Keeper
from unbackdoor.defenses.settings import FinePruningSettings
from unbackdoor.defenses.stages import Stage, find_stage, find_writers, map_of, prune
from unbackdoor.types import OnStep, RawImages


def fine_prune(
    backbone: Backbone,
    data: DefenseData,
    settings: FinePruningSettings,
    *,
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
    keep: Keeper | None = None,
) -> Defended:
    """Return a copy of ``backbone`` with dormant channels silenced and then fine-tuned.

    The channels stay silent while the rest is tuned, and are silent in the weights themselves, so
    that the result is an ordinary checkpoint.

    Raises:
        ArchitectureError: If the backbone has no head, or no stage whose channels can be pruned.
        DataError: If ``data`` has no labels, or labels that the head does not know.
        DivergedError: If the loss is no longer finite.

    Source:
        Liu et al. 2018, https://arxiv.org/abs/1805.12185; tolerance and epochs: the CBD
        paper, section 4.

    Differs from the paper: the accuracy that stops the pruning is that of a held-out part of the
    defender's own images.
    """
    labels = labels_of(backbone, data)
    repaired = copy_of(backbone, device)
    stage = find_stage(repaired, data.images, name=settings.stage)
    writers = find_writers(repaired, stage, data.images)
    split = split_off(data.images, labels, held_out=settings.held_out, seed=settings.seed)
    order = dormant_first(mean_activations(repaired, stage, split.images))
    repaired, chosen = prune_while_kept(repaired, writers, order, split, settings)

    silent = order[: chosen["pruned"]]
    count = counter(steps_of(len(labels), settings.tuning), on_step)

    def after_step(done: int) -> None:
        prune(repaired, writers, silent)  # weights that are 0 do not stay so by themselves
        count(done)

    tune(
        repaired,
        data.images,
        labels,
        settings.tuning,
        seed=settings.seed,
        after_step=after_step,
        keep=keep,
    )
    log = {
        "stage": stage.name,
        "channels": stage.channels,
        "writers": list(writers),
        "silent": sorted(silent.tolist()),
        **chosen,
    }
    return Defended(finished(repaired), log)


def mean_activations(
    backbone: Backbone, stage: Stage, images: RawImages
) -> Float[Tensor, " channels"]:
    """Return the mean magnitude of every channel of ``stage`` on ``images``, on the CPU.

    After a ReLU that is the mean activation; a stage without one has signed outputs, and a channel
    far below 0 is not dormant.
    """
    total = torch.zeros(stage.channels)
    for batch in images.split(AT_ONCE):
        output = map_of(backbone, stage, batch).movedim(stage.axis, -1).flatten(1, -2)
        total += output.abs().mean(1).sum(0).cpu()
    return total / len(images)


def dormant_first(activations: Float[Tensor, " channels"]) -> Tensor:
    """Return the channels from the least active to the most active one."""
    return activations.argsort(stable=True)


def prune_while_kept(
    backbone: Backbone,
    writers: tuple[str, ...],
    order: Tensor,
    split: Split,
    settings: FinePruningSettings,
) -> tuple[Backbone, dict[str, Any]]:
    """Silence channels in ``order`` while the held-out accuracy is kept.

    Returns:
        The last state whose accuracy was at least ``kept`` of what it was at first, and how it was
        chosen. One channel always stays, and of all no more than the share ``most`` goes.
    """
    before = accuracy(backbone, split.held_images, split.held_labels)
    least = settings.kept * before
    trial, refused = copy.deepcopy(backbone), None
    pruned, reached = 0, before
    last = min(len(order) - 1, int(settings.most * len(order)))
    for start in range(0, last, settings.per_check):
        end = min(start + settings.per_check, last)
        prune(trial, writers, order[start:end])
        score = accuracy(trial, split.held_images, split.held_labels)
        if score < least:
            refused = score
            break
        pruned, reached = end, score
    best = copy.deepcopy(backbone)
    prune(best, writers, order[:pruned])
    chosen = {
        "pruned": pruned,
        "held_out": len(split.held_labels),
        "held_out_accuracy_before": before,
        "held_out_accuracy_pruned": reached,
        "held_out_accuracy_refused": refused,
    }
    return best, chosen
