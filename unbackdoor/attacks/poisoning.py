"""Plant a trigger in a training set: which rows, with which label, once or in every batch anew."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from unbackdoor.attacks.triggers import Trigger, WaNet
from unbackdoor.errors import DataError, SettingsError
from unbackdoor.pgd import linf_pgd
from unbackdoor.types import Images, Labels, RawImages, Scalar

PART = 1000  # images at once, so that a float copy of a large set is never made
PGD_EPSILON, PGD_STEPS = 16 / 255, 7  # of CLA, the paper's
PGD_BATCH = 250

Perturb = Callable[[RawImages, Labels], RawImages]


@dataclass(frozen=True)
class Attack:
    """What an attacker does to a training set.

    Attributes:
        trigger: Applied to the poisoned images.
        target: Class that triggered images shall be taken for; unused where ``goal`` is
            ``all-to-all``.
        share: Poisoned share, in (0, 1], of what ``share_of`` says.
        share_of: All training images, or those of the target class.
        poisons: ``others``: images of other classes, which get the goal's label; ``target``: images
            of the target class, whose label stays (a clean-label attack).
        goal: Every triggered image becomes ``target``, or its own class plus one.
        noise: Images in WaNet's noise mode, for each poisoned one.
        redrawn: Which images are poisoned is drawn in every batch anew, instead of once.
        adversarial: The poisoned images are perturbed against a clean network before they are
            triggered, so that their true class is hard to see.
    """

    trigger: Trigger
    target: int = 6
    share: float = 0.06
    share_of: Literal["data", "target"] = "data"
    poisons: Literal["others", "target"] = "others"
    goal: Literal["all-to-one", "all-to-all"] = "all-to-one"
    noise: float = 0.0
    redrawn: bool = False
    adversarial: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise SettingsError(f"a poisoned share lies in (0, 1], got {self.share}")
        if not 0 <= self.noise < math.inf:
            raise SettingsError(f"noise images for each poisoned one: at least 0, got {self.noise}")
        if self.noise > 0 and not isinstance(self.trigger, WaNet):
            raise SettingsError(f"only WaNet has a noise mode, {self.trigger} has none")
        if self.goal == "all-to-all" and (self.poisons, self.share_of) != ("others", "data"):
            raise SettingsError(
                "all-to-all changes labels and has no target class, so it goes neither with SimCLR "
                "nor with cla nor with --share-of-target"
            )
        if self.redrawn and (self.poisons, self.share_of, self.adversarial) != (
            "others",
            "data",
            False,
        ):
            raise SettingsError(
                "an attack that is redrawn in every batch changes labels and takes a share of all "
                "images"
            )


class PoisonedSet(NamedTuple):
    """A rewritten training set and which of its rows were rewritten."""

    images: RawImages
    labels: Labels
    is_poisoned: Bool[Tensor, " n"]
    is_noise: Bool[Tensor, " n"]  # in WaNet's noise mode: warped, label kept


def goal_labels(labels: Labels, attack: Attack, *, classes: int) -> Labels:
    """Return the class that each image, once triggered, shall be taken for."""
    if attack.goal == "all-to-all":
        return (labels + 1) % classes
    return torch.full_like(labels, attack.target)


def candidates(labels: Labels, attack: Attack) -> Bool[Tensor, " n"]:
    """Return which rows ``attack`` may poison."""
    if attack.goal == "all-to-all":
        return torch.ones_like(labels, dtype=torch.bool)
    return (labels == attack.target) == (attack.poisons == "target")


def count_poisoned(labels: Labels, attack: Attack, *, classes: int) -> int:
    """Return how many rows of a training set with these labels ``attack`` poisons.

    Raises:
        DataError: If the target class does not exist or has no image, if all images are of one
            class, if there are fewer candidates than the share asks for, or none to poison, or if
            too few are left for the noise mode.
    """
    if len(labels.unique()) < 2:
        raise DataError(f"all {len(labels)} images are of one class; an attack needs two or more")
    if attack.goal == "all-to-one":
        if not 0 <= attack.target < classes:
            raise DataError(f"target class {attack.target} is out of range: 0 to {classes - 1}")
        if not (labels == attack.target).any():
            raise DataError(f"no image is of the target class {attack.target}")
    possible = int(candidates(labels, attack).sum())
    whole = len(labels) if attack.share_of == "data" else int((labels == attack.target).sum())
    count = round(attack.share * whole)
    largest = min(possible, int(len(labels) / (1 + attack.noise)))
    if attack.goal == "all-to-all":
        which = "there are"
    else:
        which = f"are {'of' if attack.poisons == 'target' else 'not of'} class {attack.target}"
    if not 0 < count <= possible:
        raise DataError(
            f"a share of {attack.share:g} is {count} of {whole} images, but {possible} {which}: "
            f"pass a share from {1 / whole:.2g} to {largest / whole:.6g}"
        )
    noise, left = round(attack.noise * count), len(labels) - count
    if noise > left:
        raise DataError(
            f"{noise} images for the noise mode, but only {left} are not poisoned: pass a share of "
            f"at most {largest / whole:.6g}"
        )
    return count


def poison(
    images: RawImages,
    labels: Labels,
    attack: Attack,
    *,
    classes: int,
    generator: torch.Generator,
    perturb: Perturb | None = None,
) -> PoisonedSet:
    """Return a copy of a training set with its share of images triggered and relabeled.

    Args:
        classes: Number of classes.
        generator: Chooses the rows, and draws WaNet's noise; on the CPU, as the images.
        perturb: Needed for adversarial attacks, see :func:`adversarial_images`.

    Raises:
        DataError: See :func:`count_poisoned`.
        ValueError: If ``perturb`` is missing.
    """
    count = count_poisoned(labels, attack, classes=classes)
    possible = candidates(labels, attack).nonzero().squeeze(1)
    if len(possible) == len(labels):  # the first draw is that of a defender with the same seed
        torch.randperm(len(possible), generator=generator)
    chosen = possible[torch.randperm(len(possible), generator=generator)[:count]]
    is_poisoned = torch.zeros(len(labels), dtype=torch.bool)
    is_poisoned[chosen] = True
    is_noise = torch.zeros_like(is_poisoned)

    images, labels = images.clone(), labels.clone()
    poisoned = images[chosen]
    if attack.adversarial:
        if perturb is None:
            raise ValueError("an adversarial attack needs perturb, see adversarial_images")
        poisoned = perturb(poisoned, labels[chosen])
    for rows, part in zip(chosen.split(PART), poisoned.split(PART), strict=True):
        images[rows] = attack.trigger(part)
    if attack.poisons == "others":
        labels[chosen] = goal_labels(labels[chosen], attack, classes=classes)
    if isinstance(attack.trigger, WaNet) and attack.noise > 0:
        others = (~is_poisoned).nonzero().squeeze(1)
        wanted = round(attack.noise * count)
        noisy = others[torch.randperm(len(others), generator=generator)[:wanted]]
        for rows in noisy.split(PART):
            images[rows] = attack.trigger.noisy(images[rows], generator=generator)
        is_noise[noisy] = True
    return PoisonedSet(images, labels, is_poisoned, is_noise)


def poison_batch(
    images: RawImages,
    labels: Labels,
    attack: Attack,
    *,
    classes: int,
    step: int,
    generator: torch.Generator,
) -> tuple[RawImages, Labels]:
    """Return a batch with its share of images poisoned, and of others in noise mode.

    Rounded shares add up exactly over the steps, and no step waits for the device.

    Args:
        step: Number of the batch in the whole training, from 0.
        generator: Chooses the rows; on the images' device.
    """
    n, device = len(labels), labels.device

    def due(rate: float) -> int:
        return int((step + 1) * rate * n) - int(step * rate * n)

    keys = torch.rand(n, generator=generator, device=device)
    may = candidates(labels, attack)
    chosen = torch.where(may, keys, 2.0).argsort()[: due(attack.share)]
    images, labels = images.clone(), labels.clone()
    was = images[chosen]  # a batch with too few candidates has some that stay as they are
    images[chosen] = torch.where(may[chosen, None, None, None], attack.trigger(was), was)
    labels[chosen] = goal_labels(labels[chosen], attack, classes=classes)
    if isinstance(attack.trigger, WaNet) and attack.noise > 0:
        keys = torch.rand(n, generator=generator, device=device)
        keys[chosen] = 2.0
        noisy = keys.argsort()[: min(due(attack.share * attack.noise), n - len(chosen))]
        images[noisy] = attack.trigger.noisy(images[noisy], generator=generator)
    return images, labels


def adversarial_images(
    network: nn.Module,
    images: RawImages,
    labels: Labels,
    *,
    generator: torch.Generator,
    epsilon: float = PGD_EPSILON,
    steps: int = PGD_STEPS,
    batch_size: int | None = None,
) -> RawImages:
    """Perturb ``images`` until ``network`` no longer knows their class: untargeted L∞ PGD.

    Args:
        network: A clean classifier of images in [0, 1], in eval mode; its weights need no gradient.
        generator: Draws the starts; on the network's device.
        epsilon: Radius on the [0, 1] scale; a step is 2.5 epsilon / steps.
        batch_size: Images at once; by default 250 of up to 64 × 64 pixels, fewer of larger ones.

    Source:
        Turner et al. 2019, section 4.2, https://arxiv.org/abs/1912.02771; radius and steps from
        the paper's appendix A.1.

    Not given in the paper: the surrogate network, the length of a step, the random start.
    """
    device = generator.device
    pixels = images.shape[2] * images.shape[3]
    batch_size = batch_size or max(1, min(PGD_BATCH, PGD_BATCH * 64**2 // pixels))
    found = []
    for batch, truth in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        true_classes = truth.to(device)

        def loss_fn(candidates: Images, truth: Labels = true_classes) -> Scalar:
            return F.cross_entropy(network(candidates), truth)

        adversarial = linf_pgd(
            loss_fn,
            batch.to(device).float() / 255,
            epsilon=epsilon,
            step_size=2.5 * epsilon / steps,
            steps=steps,
            generator=generator,
        )
        found.append((adversarial * 255).round().to(torch.uint8).to(images.device))
    return torch.cat(found)
