from dataclasses import replace

import pytest
import torch
from torch import nn

from unbackdoor.diagnostics import (
    highest_concentration,
    measure,
    neighbour_overlap,
    random_noise,
)
from unbackdoor.settings import ChangeSettings, PurifySettings, SearchSettings

AROUND = PurifySettings(batch_size=16, search=SearchSettings(kind="image", epsilon=0.1, steps=5))
CHANGES = PurifySettings(
    batch_size=16, changes=ChangeSettings(patches=1, additions=1, warps=1, steps=10)
)


@pytest.fixture
def networks():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        make = lambda: nn.Sequential(  # noqa: E731 - two of the same kind
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        return make().eval(), make().eval()


@pytest.fixture
def images(generator):
    return torch.randint(0, 256, (33, 3, 8, 8), dtype=torch.uint8, generator=generator)


def test_a_backbone_against_itself_is_unchanged(networks, images):
    evidence = measure(networks[0], networks[0], images, CHANGES)
    assert evidence.cosine == pytest.approx(1)
    assert evidence.neighbours == pytest.approx(1)
    assert evidence.images == 33


@pytest.mark.parametrize("settings", [AROUND, CHANGES], ids=["image", "changes"])
def test_another_backbone_is_seen_to_differ_and_the_search_beats_its_control(
    settings, networks, images
):
    evidence = measure(*networks, images, settings)
    assert evidence.cosine < 0.99
    assert evidence.neighbours < 0.9
    assert evidence.adversarial > 1.5 * evidence.noise


def test_the_measures_are_deterministic(networks, images):
    assert measure(*networks, images, CHANGES) == measure(*networks, images, CHANGES)


def test_the_concentration_of_several_changes_is_that_of_the_highest(generator):
    clean, which = torch.randn(400, 20, generator=generator), torch.arange(400) % 2
    moved = torch.randn(400, 20, generator=generator)
    assert highest_concentration(clean, moved, which) < 0.05
    moved[which == 1] = 3.0
    assert highest_concentration(clean, moved, which) == pytest.approx(1, abs=1e-4)


def test_few_scattered_images_are_not_called_concentrated(generator):
    found = []
    for _ in range(200):
        moved = torch.randn(8, 20, generator=generator)
        found.append(highest_concentration(torch.zeros(8, 20), moved, torch.zeros(8)))
    assert abs(sum(found) / len(found)) < 0.01  # 1 / 8 if chance counted
    assert highest_concentration(moved[:7], moved[:7], torch.zeros(7)) is None
    assert highest_concentration(moved, moved, torch.arange(8) // 4) is None


def test_neighbour_overlap_is_counted_by_hand():
    line = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    swapped = line[[0, 2, 1, 3]]  # now 0 is near 2, and 1 near 3
    assert neighbour_overlap(line, line, neighbours=1) == 1
    assert neighbour_overlap(line, swapped, neighbours=1) == 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_noise_has_the_radius_of_the_search(norm, generator):
    grey = torch.full((4, 3, 8, 8), 0.5)
    settings = replace(AROUND, search=SearchSettings(norm=norm, epsilon=0.25))
    shift = (random_noise(grey, settings, generator=generator) - grey).flatten(1)
    reach = shift.abs() if norm == "linf" else shift.norm(dim=1)
    torch.testing.assert_close(reach, torch.full_like(reach, 0.25))
