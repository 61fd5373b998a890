"""Implicit backdoor adversarial unlearning (I-BAU): a minimax over one perturbation for all."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from unbackdoor.backbones import Backbone
from unbackdoor.defenses.common import (
    Defended,
    DefenseData,
    Loss,
    check_finite,
    copy_of,
    counter,
    cross_entropy,
    finished,
    labels_of,
    predict,
    shuffled,
    to_unit,
)
from unbackdoor.defenses.keeping import Keeper, Part, resumed
from unbackdoor.defenses.settings import IbauSettings
from unbackdoor.devices import deterministic
from unbackdoor.types import Images, Labels, OnStep, RawImages, Scalar

Objective = Callable[[Tensor], Scalar]


def unlearn(
    backbone: Backbone,
    data: DefenseData,
    settings: IbauSettings,
    *,
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
    keep: Keeper | None = None,
) -> Defended:
    """Return a copy of ``backbone`` that classifies rightly under a shared perturbation.

    Each round searches for one perturbation of all images that changes what the backbone takes
    them for, and then lowers the loss by the weights, through the perturbation's own dependence on
    them. Batch norm uses the victim's running statistics throughout, as in the authors' code: a
    batch's own would normalize a perturbation of all its images away.

    Raises:
        ArchitectureError: If the backbone has no head.
        DataError: If ``data`` has no labels, or labels that the head does not know.
        DivergedError: If the loss is no longer finite.

    Source:
        Zeng et al. 2022, https://arxiv.org/abs/2110.03735, and what their code adds: the
        perturbation is found by plain gradient steps, in no ball, and only a share of every batch
        is perturbed.
    """
    labels = labels_of(backbone, data)
    repaired = copy_of(backbone, device).requires_grad_(True)
    weights = list(repaired.parameters())
    optimizer = torch.optim.Adam(weights, lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(settings.seed)
    loss_of = _loss_of(repaired)
    groups = list(shuffled(len(labels), settings.batch_size, generator=generator))
    batches = [data.images[rows] for rows in groups]
    steps = settings.rounds * 2 * len(groups)
    losses = torch.full((settings.rounds,), torch.nan, dtype=torch.float64)
    parts: dict[str, Part] = {
        "network": repaired,
        "optimizer": optimizer,
        "order": generator,
        "log": {"losses": losses},
    }
    # attention's fast kernels have no second derivative
    with deterministic(), sdpa_kernel(SDPBackend.MATH):
        inner = perturbed_loss(loss_of, batches[0], labels[groups[0]], repaired.mean)
        for number in resumed(keep, settings.rounds, parts):
            count = counter(steps, on_step, before=number * 2 * len(groups))
            trigger = find_trigger(repaired, batches, settings, count)
            total, order = 0.0, shuffled(len(labels), settings.batch_size, generator=generator)
            for done, rows in enumerate(order, start=len(groups) + 1):
                outer = perturbed_loss(
                    loss_of,
                    data.images[rows],
                    labels[rows],
                    repaired.mean,
                    perturbed=perturbed_count(len(rows), settings),
                )
                gradients, loss = hypergradient(outer, inner, trigger, weights, settings)
                optimizer.zero_grad()
                for weight, gradient in zip(weights, gradients, strict=True):
                    weight.grad = gradient
                optimizer.step()
                total += loss.item() / len(groups)
                count(done)
            check_finite(torch.tensor(total), "unlearning")
            losses[number] = total
    return Defended(finished(repaired), {"losses": losses.tolist()})


def _loss_of(backbone: Backbone) -> Loss:
    """Return the cross-entropy, by the weights as they are: a LeViT keeps biases of earlier ones.

    Such networks drop what they keep when they are set to eval mode.
    """
    entropy = cross_entropy(backbone)

    def loss(images: Images, labels: Labels) -> Scalar:
        backbone.eval()
        return entropy(images, labels)

    return loss


def perturbed_count(images: int, settings: IbauSettings) -> int:
    """Return how many images of a batch are perturbed: their share, but one unless it is 0."""
    return max(int(images * settings.perturbed), int(settings.perturbed > 0))


def perturbed_loss(
    loss_of: Loss, raw: RawImages, labels: Labels, like: Tensor, *, perturbed: int | None = None
) -> Objective:
    """Return the loss of a batch as a function of a perturbation of its first images.

    Args:
        perturbed: How many of the images; all by default. The batch is in random order.
    """
    images, truth = to_unit(raw, like), labels.to(like.device)
    if perturbed is None:
        return lambda delta: loss_of(images + delta, truth)
    there = (torch.arange(len(images), device=like.device) < perturbed).to(images.dtype)
    mask = there[:, None, None, None]
    return lambda delta: loss_of(images + mask * delta, truth)


def find_trigger(
    backbone: Backbone,
    batches: Sequence[RawImages],
    settings: IbauSettings,
    count: Callable[[int], None],
) -> Tensor:
    """Return a perturbation ``(1, c, h, w)`` of all images that changes what they are taken for.

    From zero, one gradient step a batch on the cross-entropy to the backbone's own predictions,
    less ``penalty`` times the perturbation's squared length.
    """
    loss_of = _loss_of(backbone)
    delta = torch.zeros(1, *batches[0].shape[1:], device=backbone.mean.device)
    for done, raw in enumerate(batches, start=1):
        objective = perturbed_loss(loss_of, raw, predict(backbone, raw), backbone.mean)
        delta.requires_grad_(True)
        raised = objective(delta) - settings.penalty * delta.square().sum()
        (gradient,) = torch.autograd.grad(raised, delta)
        delta = (delta + settings.search_rate * gradient).detach()
        count(done)
    return delta


def hypergradient(
    outer: Objective,
    inner: Objective,
    delta: Tensor,
    weights: Sequence[Tensor],
    settings: IbauSettings,
) -> tuple[list[Tensor], Scalar]:
    """Return the gradient of ``outer`` by the weights, through ``delta`` too, and its value.

    The perturbation is the fixed point of one gradient step on it,
    ``P(delta) = delta + rate * d/d delta (inner - penalty |delta|^2)``. With
    ``v = sum over k < K of (dP/d delta)^T^k d outer/d delta``, the gradient is
    ``d outer/d weights + (dP/d weights)^T v``.

    Args:
        outer: Maps a perturbation to the loss that the weights shall lower.
        inner: Maps it to the loss that the perturbation shall raise.

    Source:
        Grazzi et al. 2020, the fixed-point method, https://arxiv.org/abs/2006.16218,
        which Zeng et al. 2022 use.
    """
    delta = delta.detach().requires_grad_(True)
    loss = outer(delta)
    by_delta, *direct = torch.autograd.grad(loss, [delta, *weights], allow_unused=True)
    gradients = [
        torch.zeros_like(weight) if part is None else part
        for weight, part in zip(weights, direct, strict=True)
    ]
    if settings.fixed_point_steps == 0:
        return gradients, loss.detach()
    (ascent,) = torch.autograd.grad(inner(delta), delta, create_graph=True)
    stepped = delta + settings.inner_rate * (ascent - 2 * settings.penalty * delta)
    v = by_delta
    for _ in range(settings.fixed_point_steps - 1):
        (carried,) = torch.autograd.grad(stepped, delta, v, retain_graph=True)
        v = carried + by_delta
    through = torch.autograd.grad(stepped, list(weights), v, allow_unused=True)
    for gradient, part in zip(gradients, through, strict=True):
        if part is not None:
            gradient += part
    return gradients, loss.detach()
