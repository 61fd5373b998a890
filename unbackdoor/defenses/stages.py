"""The last stage of any network, found by running it, and the pruning of its channels.

Nothing here knows an architecture: a stage is the last layer that yields a map, and what writes to
its channels is found by taking rows away and looking.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unbackdoor.backbones import Backbone
from unbackdoor.defenses.common import modules_with_rows, to_unit, zero_rows
from unbackdoor.errors import ArchitectureError
from unbackdoor.types import RawImages

TRIED = 4  # images on which a network's layers are looked at


class Stage(NamedTuple):
    """A layer whose output is a map: one vector of channels at each of several positions."""

    name: str  # in ``backbone.body``
    axis: int  # of the channels in its output, whose axis 0 is the image's
    channels: int
    positions: int  # pixels of the map, or tokens


def find_stage(backbone: Backbone, images: RawImages, *, name: str = "") -> Stage:
    """Return the last layer that finishes with a map, or the layer ``name``.

    A map is an output ``(n, c, h, w)``, ``(n, h, w, c)`` or ``(n, tokens, c)`` of more than one
    position: in a ResNet the last stage, in a ViT the last normalization. Parts of what pools a map
    are left out: of a module that yields vectors and holds less than half of the weights. In four
    axes, the channels are where there are as many as features, otherwise axis 1, unless two equal
    axes come before the last.

    Raises:
        ArchitectureError: If there is no such layer, or it yields no map.
    """
    modules = dict(backbone.body.named_modules())
    if name and name not in modules:
        raise ArchitectureError(
            f"the network has no stage {name!r}; it has {', '.join(list(modules)[-5:])}"
        )
    found: list[Stage] = []
    pools: list[str] = []
    features = _features(backbone, images)
    for ended, output in run_watched(backbone, images[:TRIED]):
        if ended in backbone.head_names:
            break  # what comes after it is not of features any more, once the head is there
        stage = _stage_of(ended, output, features=features)
        if stage is not None and name in ("", ended):
            found.append(stage)
        if isinstance(output, Tensor) and output.ndim == 2 and _is_small(modules[ended], backbone):
            pools.append(f"{ended}.")
    if not name:
        found = [stage for stage in found if not stage.name.startswith(tuple(pools))]
    if not found:
        what = f"stage {name!r} yields no" if name else "no layer of this network yields a"
        raise ArchitectureError(
            f"{what} map of more than one position; name one that does: --set stage=NAME"
        )
    return found[-1]


@contextmanager
def watching(backbone: Backbone, stage: Stage) -> Iterator[list[Tensor]]:
    """Give a list whose only entry is the output of ``stage`` in the last pass of ``backbone``.

    It is emptied at the end, for the output holds all that its gradient would need.
    """
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Tensor) -> None:
        seen[:] = [output.clone()]  # the network may go on to change it in place

    hook = backbone.body.get_submodule(stage.name).register_forward_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()
        seen.clear()


@torch.no_grad()
def map_of(backbone: Backbone, stage: Stage, images: RawImages) -> Tensor:
    """Return the output of ``stage`` for ``images``."""
    with watching(backbone, stage) as seen:
        backbone(to_unit(images, backbone.mean))
        return seen[0]


def find_writers(backbone: Backbone, stage: Stage, images: RawImages) -> tuple[str, ...]:
    """Return the layers whose rows have to be 0 for channels of ``stage`` to be 0, and no others.

    With residual connections several layers write to a channel: in the last stage of a ResNet the
    last batch norm of each block and that of the shortcut. All layers of as many rows as ``stage``
    has channels are candidates; one after the other gets its rows back, and is none if the
    channels stay 0 all the same. Every other channel is tried, so that the rest carries signal.

    Raises:
        ArchitectureError: If no rows make the channels 0.
    """
    trial = copy.deepcopy(backbone).eval()
    tried = torch.arange(0, stage.channels, 2)
    batch = images[:TRIED]
    layers = modules_with_rows(trial.body)
    ended = [name for name, _ in run_watched(trial, batch)]
    order = [name for name in ended[: _last(ended, stage.name) + 1] if name in layers]
    names = [
        name
        for name in dict.fromkeys(order)
        if len(layers[name].get_parameter("weight")) == stage.channels
    ]
    kept = {name: copy.deepcopy(layers[name].state_dict()) for name in names}

    def is_silent() -> bool:
        return not map_of(trial, stage, batch).index_select(stage.axis, tried.to(where)).any()

    where = trial.mean.device
    for name in names:
        zero_rows(layers[name], tried)
    if not is_silent():
        raise ArchitectureError(
            f"the channels of {stage.name!r} cannot be pruned: what writes to them has no rows of "
            "its own for each; name another layer: --set stage=NAME"
        )
    writers = []
    for name in names:
        layers[name].load_state_dict(kept[name])
        if not is_silent():
            zero_rows(layers[name], tried)
            writers.append(name)
    return tuple(writers)


def prune(backbone: Backbone, writers: tuple[str, ...], channels: Tensor) -> None:
    """Silence ``channels`` in place: every writer emits 0 there from now on."""
    for name in writers:
        zero_rows(backbone.body.get_submodule(name), channels)


@torch.no_grad()
def run_watched(backbone: Backbone, images: RawImages) -> list[tuple[str, object]]:
    """Return name and output of every layer of the body, in the order in which they finish."""
    ended: list[tuple[str, object]] = []
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: ended.append((name, output)))
        for name, module in backbone.body.named_modules()
        if name
    ]
    try:
        backbone(to_unit(images, backbone.mean))
    finally:
        for hook in hooks:
            hook.remove()
    return ended


def _stage_of(name: str, output: object, *, features: int) -> Stage | None:
    """Return what the output of the layer ``name`` is as a stage; None if it is no map."""
    if not isinstance(output, Tensor) or output.ndim not in (3, 4):
        return None
    axis = output.ndim - 1
    if output.ndim == 4:
        _, second, third, last = output.shape
        is_last = last == features or (second == third != last)
        axis = 3 if second != features and is_last else 1
    channels = output.shape[axis]
    positions = output[0].numel() // channels
    return Stage(name, axis, channels, positions) if positions > 1 else None


def _is_small(module: nn.Module, backbone: Backbone) -> bool:
    part, whole = (sum(map(Tensor.numel, of.parameters())) for of in (module, backbone.body))
    return part < whole / 2


@torch.no_grad()
def _features(backbone: Backbone, images: RawImages) -> int:
    return int(backbone(to_unit(images[:2], backbone.mean)).shape[1])


def _last(names: list[str], name: str) -> int:
    return len(names) - 1 - names[::-1].index(name)
