"""What the report draws of a cell: features before and after, and triggered images."""

import base64
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor.attacks.poisoning import Attack, goal_labels
from unbackdoor.backbones import Backbone
from unbackdoor.bench.cells import CBD, Cell
from unbackdoor.bench.grid import settings_of
from unbackdoor.cbd import search
from unbackdoor.data import even_rows
from unbackdoor.devices import laid_out
from unbackdoor.evaluation import Split
from unbackdoor.probe import extract
from unbackdoor.settings import PurifySettings
from unbackdoor.types import Features, Labels, RawImages

POINTS = 60  # images of a group
GROUPS = 4  # clean classes beside the target
KEPT = 12  # components; the picture is a plane
SHOWN = 6  # triggered images


def cell_features(
    before: Backbone, after: Backbone, split: Split, attack: Attack, cell: Cell
) -> dict[str, Any]:
    """Return features of groups of test images, in both backbones, as JSON can hold them.

    The groups are those of the paper's Figure 1: some clean classes, the target class, triggered
    images of other classes, and images that the search finds in each backbone. Both are run where
    ``after`` is.
    """
    images, labels, classes = split.test
    goals = goal_labels(labels, attack, classes=len(classes))
    others = _some((labels != goals).nonzero().squeeze(1), POINTS)
    chosen = [c for c in range(len(classes)) if c != attack.target][:GROUPS]
    groups = {classes[c]: images[_of_class(labels, c)] for c in chosen}
    groups[f"target: {classes[attack.target]}"] = images[_of_class(labels, attack.target)]
    groups["triggered"] = attack.trigger(images[others])
    device = next(after.parameters()).device
    panels = {"before": laid_out(before.to(device)), "after": after}
    found = {
        name: {
            **{group: extract(network, raw) for group, raw in groups.items()},
            "adversarial": searched(network, images[others], cell),
        }
        for name, network in panels.items()
    }
    return {
        "title": f"{cell.victim.name}, {cell.victim.training}, seed {cell.seed}",
        "panels": {name: compressed(panel) for name, panel in found.items()},
        "strong": [f"target: {classes[attack.target]}", "triggered", "adversarial"],
    }


def cell_images(split: Split, attack: Attack) -> dict[str, Any]:
    """Return some test images of other classes than the target, clean and triggered, as JSON."""
    images, labels, classes = split.test
    others = labels != goal_labels(labels, attack, classes=len(classes))
    clean = images[_some(others.nonzero().squeeze(1), SHOWN)]
    return {"clean": as_base64(clean), "triggered": as_base64(attack.trigger(clean))}


def searched(network: nn.Module, raw: RawImages, cell: Cell) -> Features:
    """Return features of the images that the search finds around ``raw``."""
    settings = settings_of(cell) if cell.defense == CBD else PurifySettings(seed=cell.seed)
    device = next(network.parameters()).device
    plain = raw.to(device).float() / 255
    generator = torch.Generator(device).manual_seed(cell.seed)
    found = search(network, plain, plain, settings, generator=generator)
    with torch.no_grad():
        features: Features = network(found).cpu()
    return features


def _of_class(labels: Labels, number: int) -> Tensor:
    return _some((labels == number).nonzero().squeeze(1), POINTS)


def _some(rows: Tensor, most: int) -> Tensor:
    """Return up to ``most`` rows, of all classes where a folder is in their order."""
    return rows[even_rows(len(rows), most)]


def compressed(groups: dict[str, Features]) -> dict[str, list[list[float]]]:
    """Return unit features by their first components, rounded: those that keep dot products."""
    unit = nn.functional.normalize(torch.cat(list(groups.values())).float().cpu())
    _, _, axes = torch.linalg.svd(unit, full_matrices=False)
    places = unit @ axes[:KEPT].T
    parts = places.split([len(group) for group in groups.values()])
    return {
        name: [[round(value, 3) for value in row] for row in part.tolist()]
        for name, part in zip(groups, parts, strict=True)
    }


def as_base64(raw: RawImages) -> dict[str, Any]:
    """Return uint8 images as JSON can hold them."""
    pixels = base64.b64encode(raw.contiguous().numpy().tobytes()).decode()
    return {"shape": list(raw.shape), "pixels": pixels}


def from_base64(value: dict[str, Any]) -> RawImages:
    """Return what :func:`as_base64` wrote."""
    pixels = torch.frombuffer(bytearray(base64.b64decode(value["pixels"])), dtype=torch.uint8)
    return pixels.reshape(value["shape"])
