"""Implicit backdoor adversarial unlearning (I-BAU): a minimax over one perturbation for all."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from unbackdoor.backbones import Backbone
from unbackdoor.batchnorm import reestimate
from unbackdoor.defenses.common import (
    Defended,
    DefenseData,
    Loss,
    OnStep,
    check_finite,
    copy_of,
    counter,
    cross_entropy,
    finished,
    labels_of,
    plain_batches,
    shuffled,
    to_unit,
)
from unbackdoor.defenses.settings import IbauSettings
from unbackdoor.devices import deterministic
from unbackdoor.types import Labels, RawImages, Scalar

Objective = Callable[[Tensor], Scalar]


def unlearn(
    backbone: Backbone,
    data: DefenseData,
    settings: IbauSettings,
    *,
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
) -> Defended:
    """Return a copy of ``backbone`` that classifies rightly under the worst shared perturbation.

    Each round searches for one perturbation of all images that raises the loss, and then lowers
    the loss by the weights, through the perturbation's own dependence on them. Batch norm uses
    its running statistics, taken anew from the plain images after every round: a batch's own would
    normalize a perturbation of all its images away.

    Raises:
        ArchitectureError: If the backbone has no head.
        DataError: If ``data`` has no labels, or labels that the head does not know.
        DivergedError: If the loss is no longer finite.

    Source:
        Zeng et al. 2022, https://arxiv.org/abs/2110.03735.

    Differs from the paper: the search for the perturbation takes steps of a fixed length in an L2
    ball on the [0, 1] scale, and triggered pixels are clipped to [0, 1].
    """
    labels = labels_of(backbone, data)
    repaired = copy_of(backbone, device).requires_grad_(True)
    weights = list(repaired.parameters())
    optimizer = torch.optim.Adam(weights, lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(settings.seed)
    loss_of = cross_entropy(repaired)
    batches = list(shuffled(len(labels), settings.batch_size, generator=generator))
    count = counter(settings.rounds * (settings.inner_steps + len(batches)), on_step)
    found_losses: list[float] = []
    # attention's fast kernels have no second derivative
    with deterministic(), sdpa_kernel(SDPBackend.MATH):
        for _ in range(settings.rounds):
            trigger = find_trigger(loss_of, data.images, labels, repaired.mean, settings, count)
            total = 0.0
            for rows in shuffled(len(labels), settings.batch_size, generator=generator):
                batch = to_unit(data.images[rows], repaired.mean)
                truth = labels[rows].to(batch.device)

                def worst(delta: Tensor, batch: Tensor = batch, truth: Labels = truth) -> Scalar:
                    return loss_of((batch + delta).clamp(0, 1), truth)

                gradients, loss = hypergradient(worst, trigger, weights, settings)
                optimizer.zero_grad()
                for weight, gradient in zip(weights, gradients, strict=True):
                    weight.grad = gradient
                optimizer.step()
                total += loss.item() / len(batches)
                count()
            check_finite(torch.tensor(total), "unlearning")
            found_losses.append(total)
            reestimate(repaired, plain_batches(data.images, repaired.mean, settings.batch_size))
    return Defended(finished(repaired), {"losses": found_losses})


def find_trigger(
    loss_of: Loss,
    images: RawImages,
    labels: Labels,
    like: Tensor,
    settings: IbauSettings,
    count: Callable[[], None],
) -> Tensor:
    """Return the perturbation ``(1, c, h, w)`` of length ``epsilon`` or less that raises the loss.

    Batch after batch, one step of 2.5 epsilon / ``inner_steps`` along the gradient, and back into
    the ball.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    delta = torch.zeros(1, *images.shape[1:], device=like.device)
    step = 2.5 * settings.epsilon / settings.inner_steps
    batches = [*shuffled(len(labels), settings.batch_size, generator=generator)]
    for index in range(settings.inner_steps):
        rows = batches[index % len(batches)]
        batch, truth = to_unit(images[rows], like), labels[rows].to(like.device)
        delta.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss_of((batch + delta).clamp(0, 1), truth), delta)
        with torch.no_grad():
            delta = delta + step * gradient / gradient.norm().clamp(min=1e-12)
            delta = delta * (settings.epsilon / delta.norm().clamp(min=1e-12)).clamp(max=1)
        count()
    return delta.detach()


def hypergradient(
    objective: Objective, delta: Tensor, weights: Sequence[Tensor], settings: IbauSettings
) -> tuple[list[Tensor], Scalar]:
    """Return the gradient of ``objective`` by the weights, through ``delta`` too, and its value.

    The perturbation is the fixed point of one gradient step on it,
    ``P(delta) = delta + rate * d/d delta (objective - penalty |delta|^2)``. With
    ``v = sum over k < K of (dP/d delta)^T^k dL/d delta``, the gradient is
    ``dL/d weights + (dP/d weights)^T v``.

    Args:
        objective: Maps a perturbation to the loss L, which depends on ``weights``.

    Source:
        Grazzi et al. 2020, the fixed-point method, https://arxiv.org/abs/2006.16218,
        which Zeng et al. 2022 use.
    """
    delta = delta.detach().requires_grad_(True)
    loss = objective(delta)
    by_delta, *direct = torch.autograd.grad(
        loss, [delta, *weights], create_graph=settings.fixed_point_steps > 0, allow_unused=True
    )
    gradients = [
        torch.zeros_like(weight) if part is None else part.detach()
        for weight, part in zip(weights, direct, strict=True)
    ]
    if settings.fixed_point_steps == 0:
        return gradients, loss.detach()
    stepped = delta + settings.inner_rate * (by_delta - 2 * settings.penalty * delta)
    outer = by_delta.detach()
    v = outer
    for _ in range(settings.fixed_point_steps - 1):
        (carried,) = torch.autograd.grad(stepped, delta, v, retain_graph=True)
        v = carried + outer
    through = torch.autograd.grad(stepped, list(weights), v, allow_unused=True)
    for gradient, part in zip(gradients, through, strict=True):
        if part is not None:
            gradient += part
    return gradients, loss.detach()
