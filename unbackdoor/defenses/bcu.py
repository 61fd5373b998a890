"""Backdoor cleansing with unlabeled data (BCU): forget some weights, distil them back."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from unbackdoor.backbones import Backbone
from unbackdoor.defenses.common import (
    Defended,
    DefenseData,
    copy_of,
    counter,
    finished,
    steps_of,
    tune,
)
from unbackdoor.defenses.keeping import Keeper
from unbackdoor.defenses.settings import BcuSettings
from unbackdoor.defenses.stages import run_watched
from unbackdoor.errors import ArchitectureError, DataError
from unbackdoor.types import Features, Images, Labels, OnStep, RawImages, Scalar


def cleanse(
    backbone: Backbone,
    data: DefenseData,
    settings: BcuSettings,
    *,
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
    keep: Keeper | None = None,
) -> Defended:
    """Return a copy of ``backbone`` with a share of its weights drawn anew and distilled back.

    The victim teaches: what clean images make it say is kept, what only a trigger would is not
    asked for. The last epoch is returned; none is chosen.

    Raises:
        ArchitectureError: If ``match`` is ``logits`` and the backbone has no head with weights.
        DataError: If there are fewer than two images.
        DivergedError: If the loss is no longer finite.

    Source:
        Pang et al. 2023, https://arxiv.org/abs/2211.12044.

    Differs from the paper: by default, features are distilled instead of soft labels, so that a
    backbone needs no head; a head is then kept as it is. The layers' groups are counted in a pass
    instead of named: in a ResNet-18 they are the stem and the four stages, up to a layer.
    A head's bias is kept, which the authors' code draws anew by the head's share.
    """
    if len(data.images) < 2:
        raise DataError(f"a defense needs two images or more, got {len(data.images)}")
    teacher, student = copy_of(backbone, device), copy_of(backbone, device)
    head = _with_weights(student.heads.modules()) if settings.match == "logits" else []
    if settings.match == "logits" and not head:
        raise ArchitectureError(
            "match=logits needs the classifier's head, which the checkpoint lacks; "
            "features need none: --set match=features"
        )
    groups = layer_groups(student, data.images)
    generator = torch.Generator().manual_seed(settings.seed)
    for share, layers in zip(settings.shares, [*groups, head], strict=True):
        for layer in layers:
            for weight in weights_of(layer):
                redraw(weight, share, generator=generator, spread=settings.spread)

    tuning, temperature = settings.tuning, 1.0
    by_logits = settings.match == "logits"

    def before_epoch(epoch: int) -> None:
        nonlocal temperature
        temperature = 1 + 3 * (epoch + 1) / tuning.epochs

    def loss_of(images: Images, _: Labels) -> Scalar:
        with torch.no_grad():
            wanted = teacher.logits(images) if by_logits else teacher(images)
        if by_logits:
            return soft_label_distance(student.logits(images), wanted, temperature=temperature)
        return feature_distance(student(images), wanted)

    tune(
        student,
        data.images,
        torch.zeros(len(data.images), dtype=torch.int64),  # labels are not used
        tuning,
        seed=settings.seed,
        loss_of=loss_of,
        after_step=counter(steps_of(len(data.images), tuning), on_step),
        before_epoch=before_epoch,
        keep=keep,
    )
    log = {"match": settings.match, "layers": [len(group) for group in [*groups, head]]}
    return Defended(finished(student), log)


def layer_groups(backbone: Backbone, images: RawImages) -> list[list[nn.Module]]:
    """Return the body's layers with weight matrices: the first, and four groups of equal depth.

    Depth is the order in which layers finish in a pass; a layer that runs twice counts once.
    """
    ended = dict.fromkeys(name for name, _ in run_watched(backbone, images[:2]))
    layers = _with_weights(backbone.body.get_submodule(name) for name in ended)
    rest = layers[1:]
    ends = [round(len(rest) * quarter / 4) for quarter in range(5)]
    return [layers[:1], *(rest[ends[i] : ends[i + 1]] for i in range(4))]


def _with_weights(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return [module for module in modules if weights_of(module)]


def weights_of(layer: nn.Module) -> list[Tensor]:
    """Return the matrices of a convolution, a linear layer or PyTorch's attention; else none."""
    if isinstance(layer, nn.Conv2d | nn.Linear):
        return [layer.weight]
    if isinstance(layer, nn.MultiheadAttention):  # which never calls its own linear layers
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        found = [getattr(layer, name) for name in names]
        return [weight for weight in found if weight is not None] + [layer.out_proj.weight]
    return []


@torch.no_grad()
def redraw(
    weight: Tensor,
    share: float,
    *,
    generator: torch.Generator,
    spread: Literal["pytorch", "kaiming"],
) -> None:
    """Draw a random share of ``weight`` anew, in place.

    Args:
        generator: On the CPU.
        spread: ``pytorch``: uniform, as its layers are by default; ``kaiming``: matrices likewise,
            convolutions normal, with a variance of 2 / fan out, as the authors' network begins.
    """
    bound = 1 / math.sqrt(weight[0].numel())
    fresh = bound * (2 * torch.rand(weight.shape, generator=generator) - 1)
    if spread == "kaiming" and weight.ndim == 4:
        fan_out = len(weight) * weight[0, 0].numel()
        fresh = math.sqrt(2 / fan_out) * torch.randn(weight.shape, generator=generator)
    chosen = torch.randperm(weight.numel(), generator=generator)[: round(share * weight.numel())]
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[chosen] = True
    mask = mask.view(weight.shape).to(weight.device)
    weight.copy_(torch.where(mask, fresh.to(weight.device), weight))


def feature_distance(student: Features, teacher: Features) -> Scalar:
    """Return the mean squared distance of features, in units of the teacher's variance."""
    variance = teacher.var(0).mean().clamp(min=1e-12)
    return F.mse_loss(student, teacher) / variance


def soft_label_distance(student: Tensor, teacher: Tensor, *, temperature: float) -> Scalar:
    """Return the divergence of softened predictions.

    Source:
        Pang et al. 2023; like their code, without the factor of the temperature squared that
        Hinton et al. 2015 have, https://arxiv.org/abs/1503.02531.
    """
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")
