"""Projected gradient ascent on pixels, for any loss."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from unbackdoor.ranks import ALONE, Draw, Ranks, add_up, draw
from unbackdoor.types import Images, Scalar


def linf_pgd(
    loss_fn: Callable[[Images], Scalar],
    images: Images,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    generator: torch.Generator | None,
    ranks: Ranks = ALONE,
) -> Images:
    """Search the L∞ ball around ``images`` for inputs that raise ``loss_fn``.

    Args:
        loss_fn: The scalar to raise, as a function of the batch. Called ``steps`` times.
        images: Values in [0, 1], shape ``(n, c, h, w)``. Not modified.
        epsilon: Radius of the ball on the [0, 1] scale, so 8/255 rather than 8.
        step_size: Length of one sign step, on the same scale.
        steps: Number of steps; 0 returns the start.
        generator: Draws the start uniformly in the ball; None starts at ``images``.
        ranks: Each has an equal part of a batch; starts are those of the whole batch, and what
            ``loss_fn`` returns is this rank's share of the loss.

    Returns:
        Detached images within ``epsilon`` of ``images`` and within [0, 1].

    Raises:
        ValueError: If ``epsilon`` lies outside [0, 1].

    Source:
        Madry et al. 2018, section 2.1, https://arxiv.org/abs/1706.06083.
    """
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon is on the [0, 1] scale, got {epsilon}; for 8 levels pass 8/255")
    low, high = (images - epsilon).clamp(min=0), (images + epsilon).clamp(max=1)
    adversarial = images.detach()
    if generator is not None:
        adversarial = low + (high - low) * _draw(torch.rand, images, generator, ranks).to(
            images.dtype
        )
    for _ in range(steps):
        adversarial.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss_fn(adversarial), adversarial)
        with torch.no_grad():
            adversarial = (adversarial + step_size * gradient.sign()).clamp(low, high)
    return adversarial.detach()


def l2_pgd(
    loss_fn: Callable[[Images], Scalar],
    images: Images,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    generator: torch.Generator | None,
    ranks: Ranks = ALONE,
) -> Images:
    """Search the L2 ball around every image for inputs that raise ``loss_fn``.

    Args:
        epsilon: Radius of the ball around one image, on the [0, 1] scale: 1024/255 is 1024 levels.
        step_size: Length of one step, taken along the image's own normalized gradient.
        generator: Draws the start, a random direction and a uniform share of the radius; None
            starts at ``images``.

    The rest is as in :func:`linf_pgd`; epsilon has no upper bound here.
    """
    if epsilon < 0:
        raise ValueError(f"epsilon must not be negative, got {epsilon}")
    delta = torch.zeros_like(images)
    if generator is not None:
        direction = _draw(torch.randn, images, generator, ranks)
        share = _draw(torch.rand, images[:, :1, :1, :1], generator, ranks)
        delta = epsilon * share * direction / _lengths(direction)
    adversarial = (images + delta.to(images.dtype)).clamp(0, 1)
    for _ in range(steps):
        adversarial.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss_fn(adversarial), adversarial)
        with torch.no_grad():
            moved = adversarial + step_size * gradient / _lengths(gradient) - images
            adversarial = (images + moved * (epsilon / _lengths(moved)).clamp(max=1)).clamp(0, 1)
    return adversarial.detach()


def shared_pgd(
    loss_fn: Callable[[Images], Scalar],
    images: Images,
    *,
    norm: Literal["linf", "l2"],
    epsilon: float,
    step_size: float,
    steps: int,
    generator: torch.Generator | None,
    ranks: Ranks = ALONE,
) -> Images:
    """Search for one perturbation that, added to all ``images``, raises ``loss_fn``.

    A backdoor is one change that moves all images; a perturbation of each image alone need not
    come near it.

    Args:
        norm: Of the ball that the perturbation stays in: a step follows the gradient's sign, or
            the gradient divided by its length.
        generator: Draws the start, uniformly in the L∞ ball, or at half the radius in a random
            direction; None starts at zero.

    The rest is as in :func:`linf_pgd`. The images are clipped to [0, 1] after the perturbation is
    added, so that each may lose a part of it.

    Source:
        Moosavi-Dezfooli et al. 2017, https://arxiv.org/abs/1610.08401, without its per-image inner
        search.
    """
    if epsilon < 0:
        raise ValueError(f"epsilon must not be negative, got {epsilon}")
    delta = torch.zeros_like(images[:1])
    if generator is not None and norm == "linf":
        delta = epsilon * (2 * _draw(torch.rand, delta, generator, ALONE).to(delta.dtype) - 1)
    elif generator is not None:
        direction = _draw(torch.randn, delta, generator, ALONE)  # one for all ranks
        delta = (0.5 * epsilon * direction / _lengths(direction)).to(images.dtype)
    for _ in range(steps):
        delta.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss_fn((images + delta).clamp(0, 1)), delta)
        add_up([gradient], ranks)
        with torch.no_grad():
            if norm == "linf":
                delta = (delta + step_size * gradient.sign()).clamp(-epsilon, epsilon)
            else:
                delta = delta + step_size * gradient / _lengths(gradient)
                delta = delta * (epsilon / _lengths(delta)).clamp(max=1)
    return (images + delta).clamp(0, 1).detach()


def _draw(kind: Draw, like: Images, generator: torch.Generator, ranks: Ranks) -> Images:
    return draw(kind, like.shape, generator=generator, device=like.device, ranks=ranks)


def _lengths(images: Images) -> Float[Tensor, "n 1 1 1"]:
    """Return every image's L2 length, never 0."""
    lengths: Tensor = images.flatten(1).norm(dim=1).clamp(min=1e-12)
    return lengths[:, None, None, None]
