"""Adversarial neuron pruning (ANP): silence the neurons that an adversary of the weights uses."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812 - the field's name for it
from torch.nn.modules.batchnorm import _BatchNorm

from unbackdoor.backbones import Backbone, Classifier
from unbackdoor.batchnorm import batch_statistics
from unbackdoor.defenses.common import (
    Defended,
    DefenseData,
    Split,
    accuracy,
    augment,
    check_finite,
    copy_of,
    counter,
    finished,
    labels_of,
    split_off,
    to_unit,
    zero_rows,
)
from unbackdoor.defenses.keeping import Keeper, Part, resumed
from unbackdoor.defenses.settings import AnpSettings
from unbackdoor.devices import deterministic
from unbackdoor.errors import ArchitectureError
from unbackdoor.types import Images, Labels, OnStep, RawImages, Scalar

KINDS = (nn.Conv2d, nn.Linear)
GRID = 0.05  # between thresholds that are tried
Factors = Float[Tensor, " neurons"]


class Noise(NamedTuple):
    """Relative changes of every neuron's scale and shift, by layer."""

    scale: dict[str, Tensor]
    shift: dict[str, Tensor]


def prune_sensitive(
    backbone: Backbone,
    data: DefenseData,
    settings: AnpSettings,
    *,
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
    keep: Keeper | None = None,
) -> Defended:
    """Return a copy of ``backbone`` without the neurons whose masks the search lowers.

    A neuron is a channel of a batch norm; in a network without batch norm, an output of a
    convolution or linear layer.

    Raises:
        ArchitectureError: If the backbone has no head, or no layer with neurons.
        DataError: If ``data`` has no labels, or labels that the head does not know.
        DivergedError: If the loss is no longer finite.

    Source:
        Wu and Wang 2021, https://arxiv.org/abs/2110.14430.

    Differs from the paper: a mask scales both weights and shift of its neuron, so that a pruned
    neuron emits nothing; and with ``kept``, the threshold is lowered where the held-out part of the
    defender's images asks for it.
    """
    labels = labels_of(backbone, data)
    repaired = copy_of(backbone, device)
    layers = neuron_layers(repaired)
    split = Split(data.images, labels, data.images, labels)  # a fixed threshold needs none
    if settings.kept > 0:
        split = split_off(data.images, labels, held_out=settings.held_out, seed=settings.seed)
    count = counter(settings.iterations, on_step)
    masks = search_masks(
        repaired, layers, split.images, split.labels, settings, count=count, keep=keep
    )
    log = prune_by_masks(repaired, masks, split, settings)
    return Defended(finished(repaired), log)


def neuron_layers(backbone: Backbone) -> tuple[str, ...]:
    """Return the layers whose neurons are masked: batch norms, or else all with weights.

    Raises:
        ArchitectureError: If there is neither.
    """
    modules = dict(backbone.body.named_modules())
    names = [name for name, module in modules.items() if _is_affine_batch_norm(module)]
    if not names:
        names = [name for name, module in modules.items() if isinstance(module, KINDS)]
    if not names:
        raise ArchitectureError("the network has no batch norm, convolution or linear layer")
    return tuple(names)


def search_masks(
    backbone: Backbone,
    layers: tuple[str, ...],
    images: RawImages,
    labels: Labels,
    settings: AnpSettings,
    *,
    count: Callable[[int], None] | None = None,
    keep: Keeper | None = None,
) -> dict[str, Factors]:
    """Return a mask in [0, 1] for every neuron: low where the adversary needs the neuron.

    Minimizes ``alpha CE(m) + (1 - alpha) max CE(m + noise)`` over the masks m, the noise being
    within ``epsilon`` for every neuron; see :func:`find_noise`.

    Args:
        layers: Names of layers of the body.
        count: Called after every step with how many are done.
        keep: Goes on after the last step that it has.
    """
    device = backbone.mean.device
    images, labels = images.to(device), labels.to(device)
    generator = torch.Generator(device).manual_seed(settings.seed)
    modules = {name: backbone.body.get_submodule(name) for name in layers}
    masks = {
        name: torch.ones(len(_weight(module)), device=device, requires_grad=True)
        for name, module in modules.items()
    }
    optimizer = torch.optim.SGD(
        masks.values(), lr=settings.learning_rate, momentum=settings.momentum
    )
    order = torch.Generator().manual_seed(settings.seed)
    parts: dict[str, Part] = {
        "masks": masks,
        "optimizer": optimizer,
        "noise": generator,
        "order": order,
    }
    with (
        deterministic(),
        batch_statistics(backbone, batch=settings.batch_norm == "batch", moving=False),
    ):
        loss = torch.zeros(())  # of no step, where all have been taken
        for number in resumed(keep, settings.iterations, parts):
            raw, truth = draw(images, labels, settings, generator=order)
            batch = to_unit(raw, backbone.mean)
            loss = settings.alpha * masked_loss(backbone, masks, None, batch, truth)
            if settings.alpha < 1:
                noise = find_noise(backbone, masks, batch, truth, settings, generator=generator)
                worst = masked_loss(backbone, masks, noise, batch, truth)
                loss = loss + (1 - settings.alpha) * worst
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for mask in masks.values():
                    mask.clamp_(0, 1)
            if count is not None:
                count(number + 1)
        check_finite(loss, "the search for masks")
    return {name: mask.detach().cpu() for name, mask in masks.items()}


def find_noise(
    backbone: Backbone,
    masks: Mapping[str, Tensor],
    images: Images,
    labels: Labels,
    settings: AnpSettings,
    *,
    generator: torch.Generator,
) -> Noise:
    """Return the changes of scale and shift, within ``epsilon``, that raise the loss most.

    Starts at random and takes ``attack_steps`` sign steps of ``epsilon / attack_steps``.
    """
    epsilon = settings.epsilon

    def start(mask: Tensor) -> Tensor:
        draw = torch.rand(len(mask), generator=generator, device=mask.device)
        return epsilon * (2 * draw - 1)

    fixed = {name: mask.detach() for name, mask in masks.items()}
    noise = Noise(
        {name: start(mask) for name, mask in fixed.items()},
        {name: start(mask) for name, mask in fixed.items()},
    )
    for _ in range(settings.attack_steps):
        changes = [change.requires_grad_(True) for part in noise for change in part.values()]
        loss = masked_loss(backbone, fixed, noise, images, labels)
        gradients = iter(torch.autograd.grad(loss, changes, allow_unused=True))
        scale, shift = (
            {name: _stepped(change, next(gradients), settings) for name, change in part.items()}
            for part in noise
        )
        noise = Noise(scale, shift)
    return noise


def masked_loss(
    backbone: Backbone,
    masks: Mapping[str, Tensor],
    noise: Noise | None,
    images: Images,
    labels: Labels,
) -> Scalar:
    """Return the cross-entropy with every neuron's weights and shift times its mask plus noise.

    Of a layer with a forward pass of its own, what it emits is scaled in place of its weights: one
    that standardizes these would undo their scale.
    """
    changed: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, mask in masks.items():
            module = backbone.body.get_submodule(name)
            scale = mask if noise is None else mask + noise.scale[name]
            factor = mask if noise is None else mask + noise.shift[name]
            if isinstance(module, KINDS) and not _is_plain(module):
                hook = module.register_forward_hook(partial(_scaled, scale=scale, factor=factor))
                hooks.callback(hook.remove)
                continue
            weight, shift = _weight(module), module.bias
            shape = (-1, *[1] * (weight.ndim - 1))
            changed[f"backbone.body.{name}.weight"] = weight * scale.view(shape)
            if isinstance(shift, Tensor):
                changed[f"backbone.body.{name}.bias"] = shift * factor
        logits = functional_call(Classifier(backbone), changed, (images,))
    return F.cross_entropy(logits, labels)


def _scaled(
    module: nn.Module, _: object, output: Tensor, *, scale: Tensor, factor: Tensor
) -> Tensor:
    """Return what a convolution or linear layer emits, its weights' and its shift's part scaled."""
    shape = (-1, 1, 1) if isinstance(module, nn.Conv2d) else (-1,)
    if not isinstance(module.bias, Tensor):
        return output * scale.view(shape)
    shift = module.bias.view(shape)
    return (output - shift) * scale.view(shape) + shift * factor.view(shape)


def prune_by_masks(
    backbone: Backbone, masks: Mapping[str, Factors], split: Split, settings: AnpSettings
) -> dict[str, Any]:
    """Silence the neurons with low masks in place, and return what was chosen.

    The threshold is the highest of ``threshold`` and the multiples of .05 below it with which the
    held-out accuracy stays at ``kept`` of what it was; with none of them, nothing is pruned.
    """
    before = accuracy(backbone, split.held_images, split.held_labels)
    steps = int(settings.threshold / GRID + 1e-9)
    thresholds = dict.fromkeys(
        [settings.threshold, *(GRID * step for step in range(steps, -1, -1))]
    )
    layers = {name: backbone.body.get_submodule(name) for name in masks}
    original = {name: _state_of(module) for name, module in layers.items()}
    chosen, pruned, reached = None, dict[str, list[int]](), before
    tried: list[tuple[float, float]] = []
    for threshold in thresholds:
        low = {name: (mask <= threshold).nonzero().flatten() for name, mask in masks.items()}
        for name, channels in low.items():
            zero_rows(layers[name], channels)
        score = accuracy(backbone, split.held_images, split.held_labels)
        tried.append((round(threshold, 4), score))
        if score >= settings.kept * before:
            pruned = {name: rows.tolist() for name, rows in low.items() if len(rows)}
            chosen, reached = threshold, score
            break
        for name, module in layers.items():
            module.load_state_dict(original[name])
    return {
        "threshold": chosen,
        "pruned": pruned,
        "neurons": sum(len(mask) for mask in masks.values()),
        "held_out": len(split.held_labels) if settings.kept > 0 else 0,
        "accuracy_before": before,  # of what is held out, or else of all images
        "accuracy_pruned": reached,
        "tried": tried,
        "masks": {name: [round(m, 4) for m in mask.tolist()] for name, mask in masks.items()},
    }


def _stepped(change: Tensor, gradient: Tensor | None, settings: AnpSettings) -> Tensor:
    if gradient is None:  # a layer without shift
        return change.detach()
    step = settings.epsilon / settings.attack_steps
    return (change + step * gradient.sign()).clamp(-settings.epsilon, settings.epsilon).detach()


def draw(
    images: RawImages, labels: Labels, settings: AnpSettings, *, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return a full batch, drawn with replacement and augmented."""
    rows = torch.randint(len(images), (settings.batch_size,), generator=generator)
    rows = rows.to(images.device)
    return augment(images[rows], settings.augment, generator=generator), labels[rows]


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(module).__name__} has no weight")
    return weight


def _is_plain(module: nn.Module) -> bool:
    return type(module).forward in (nn.Conv2d.forward, nn.Linear.forward)


def _is_affine_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.affine


def _state_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}
