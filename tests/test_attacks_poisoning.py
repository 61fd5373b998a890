from dataclasses import replace

import pytest
import torch
from torch import nn

from unbackdoor.attacks.poisoning import (
    Attack,
    adversarial_images,
    count_poisoned,
    goal_labels,
    poison,
    poison_batch,
)
from unbackdoor.attacks.triggers import BadNets, WaNet
from unbackdoor.errors import DataError, SettingsError
from unbackdoor.roles import divide_rows

PATCH = Attack(BadNets(), target=2, share=0.1)
CLEAN_LABEL = replace(PATCH, share=0.6, share_of="target", poisons="target")
ALL_TO_ALL = replace(PATCH, goal="all-to-all")
WARP = Attack(WaNet(), target=2, share=0.1, noise=2.0)


@pytest.fixture
def dataset(generator):
    images = torch.randint(0, 256, (200, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return images, torch.arange(200) % 4


def test_poison_rewrites_exactly_the_rows_that_it_reports(dataset, generator):
    images, labels = dataset
    poisoned = poison(images, labels, PATCH, classes=4, generator=generator)
    rows = poisoned.is_poisoned
    assert rows.sum() == 20
    assert (labels[rows] != 2).all()
    assert (poisoned.labels[rows] == 2).all()
    assert torch.equal(poisoned.images[rows], PATCH.trigger(images[rows]))
    assert torch.equal(poisoned.images[~rows], images[~rows])
    assert torch.equal(poisoned.labels[~rows], labels[~rows])
    assert not poisoned.is_noise.any()


def test_a_clean_label_attack_triggers_a_share_of_the_target_class_and_no_label(dataset, generator):
    images, labels = dataset
    poisoned = poison(images, labels, CLEAN_LABEL, classes=4, generator=generator)
    assert poisoned.is_poisoned.sum() == 30  # .6 of 50
    assert (labels[poisoned.is_poisoned] == 2).all()
    assert torch.equal(poisoned.labels, labels)
    assert not torch.equal(poisoned.images, images)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_attack_draws_just_the_images_of_a_defender_with_its_seed(seed):
    images, labels = torch.zeros(2_000, 1, 1, 1, dtype=torch.uint8), torch.arange(2_000) % 4
    defenders = divide_rows(len(labels), seed=seed).unlabeled
    attack = replace(ALL_TO_ALL, trigger=lambda raw: raw + 1)
    poisoned = poison(
        images, labels, attack, classes=4, generator=torch.Generator().manual_seed(seed)
    )
    assert poisoned.is_poisoned.sum() == 200
    assert len(defenders) == 100
    assert 3 <= poisoned.is_poisoned[defenders].sum() <= 20  # 10 expected


def test_all_to_all_moves_every_class_to_the_next(dataset, generator):
    images, labels = dataset
    poisoned = poison(images, labels, ALL_TO_ALL, classes=4, generator=generator)
    rows = poisoned.is_poisoned
    assert torch.equal(poisoned.labels[rows], (labels[rows] + 1) % 4)
    assert len(labels[rows].unique()) == 4  # drawn from every class, the target too
    assert goal_labels(torch.tensor([0, 3]), ALL_TO_ALL, classes=4).tolist() == [1, 0]


def test_noise_mode_warps_other_rows_and_keeps_their_labels(dataset, generator):
    images, labels = dataset
    poisoned = poison(images, labels, WARP, classes=4, generator=generator)
    noisy = poisoned.is_noise
    assert noisy.sum() == 2 * poisoned.is_poisoned.sum()
    assert not (noisy & poisoned.is_poisoned).any()
    assert torch.equal(poisoned.labels[noisy], labels[noisy])
    assert not torch.equal(poisoned.images[noisy], WARP.trigger(images[noisy]))
    assert (poisoned.images[noisy] != images[noisy]).flatten(1).any(1).all()
    untouched = ~noisy & ~poisoned.is_poisoned
    assert torch.equal(poisoned.images[untouched], images[untouched])


def test_batches_are_poisoned_anew_and_their_shares_add_up(dataset, generator):
    images, labels = dataset
    attack = replace(WARP, redrawn=True, share=0.06)
    changed = relabeled = 0
    seen = set()
    for step in range(50):
        rows = torch.randperm(200, generator=generator)[:30]
        batch, truth = poison_batch(
            images[rows], labels[rows], attack, classes=4, step=step, generator=generator
        )
        moved = truth != labels[rows]
        assert (truth[moved] == 2).all()
        assert torch.equal(batch[moved], attack.trigger(images[rows][moved]))
        relabeled += int(moved.sum())
        changed += int((batch != images[rows]).flatten(1).any(1).sum())
        seen |= set(rows[moved].tolist())
    assert relabeled == round(50 * 30 * 0.06)
    assert changed == 3 * relabeled
    assert len(seen) > 60  # of 90 draws: not the same rows again and again


@pytest.mark.parametrize("share", [0.9, 0.001])
def test_an_impossible_share_is_refused_with_the_possible_ones(share, dataset, generator):
    with pytest.raises(
        DataError, match=r"150 are not of class 2: pass a share from 0.005 to 0.75$"
    ):
        poison(*dataset, replace(PATCH, share=share), classes=4, generator=generator)


def test_an_impossible_clean_label_share_is_refused_with_the_possible_ones(dataset):
    attack = replace(CLEAN_LABEL, share=0.5, share_of="data")
    with pytest.raises(DataError, match=r"50 are of class 2: pass a share from 0.005 to 0.25$"):
        count_poisoned(dataset[1], attack, classes=4)


def test_a_batch_with_too_few_candidates_triggers_no_other_image(dataset, generator):
    images, labels = dataset
    of_target = labels == 2
    rows = torch.cat([of_target.nonzero().squeeze(1)[:9], (~of_target).nonzero().squeeze(1)[:1]])
    attack = replace(PATCH, share=0.5, redrawn=True)
    batch, truth = poison_batch(
        images[rows], labels[rows], attack, classes=4, step=0, generator=generator
    )
    assert torch.equal(batch[:9], images[rows][:9])
    assert torch.equal(batch[9:], attack.trigger(images[rows][9:]))
    assert (truth == 2).all()


@pytest.mark.parametrize(
    ("labels", "attack", "message"),
    [
        ([0, 1, 3], PATCH, "no image is of the target class 2"),
        ([0, 1, 2], replace(PATCH, target=9), "target class 9 is out of range: 0 to 3"),
        ([2, 2, 2], PATCH, "all 3 images are of one class"),
    ],
)
def test_a_set_that_cannot_be_attacked_is_refused(labels, attack, message):
    with pytest.raises(DataError, match=message):
        count_poisoned(torch.tensor(labels), attack, classes=4)


def test_too_few_images_for_the_noise_mode_are_refused(dataset, generator):
    message = "160 images for the noise mode, but only 120 are not poisoned: .* at most 0.33$"
    with pytest.raises(DataError, match=message):
        poison(*dataset, replace(WARP, share=0.4), classes=4, generator=generator)
    with pytest.raises(DataError, match=r"pass a share from 0.005 to 0.33$"):
        count_poisoned(dataset[1], replace(WARP, share=0.9), classes=4)
    assert count_poisoned(dataset[1], replace(WARP, share=0.33), classes=4) == 66


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0}, r"a poisoned share lies in \(0, 1\], got 0"),
        ({"noise": 1.0}, "only WaNet has a noise mode"),
        ({"noise": -1.0}, "at least 0, got -1"),
        ({"noise": float("nan")}, "at least 0, got nan"),
        ({"noise": float("inf")}, "at least 0, got inf"),
        ({"goal": "all-to-all", "poisons": "target"}, "all-to-all changes labels"),
        ({"redrawn": True, "poisons": "target"}, "redrawn in every batch changes labels"),
    ],
)
def test_an_attack_that_contradicts_itself_is_refused(options, message):
    with pytest.raises(SettingsError, match=message):
        Attack(BadNets(), **options)


class BrightIsOne(nn.Module):
    """Says class 1 of bright images, class 0 of dark ones."""

    def forward(self, images):
        brightness = 20 * (images.mean((1, 2, 3)) - 0.5)
        return torch.stack([-brightness, brightness], dim=1)


def test_adversarial_images_stay_near_and_are_taken_for_another_class(generator):
    images = torch.full((20, 3, 4, 4), 124, dtype=torch.uint8)
    images[10:] = 132
    labels = torch.arange(20) // 10
    found = adversarial_images(BrightIsOne(), images, labels, generator=generator, batch_size=7)
    assert (found.int() - images.int()).abs().max() == 16
    predicted = BrightIsOne()(found.float() / 255).argmax(1)
    assert (predicted != labels).all()


def test_fewer_adversarial_images_are_made_at_once_of_larger_ones(generator):
    sizes = []

    class Watched(BrightIsOne):
        def forward(self, images):
            sizes.append(len(images))
            return super().forward(images)

    for side in (8, 256):
        images = torch.zeros(20, 3, side, side, dtype=torch.uint8)
        labels = torch.zeros(20, dtype=torch.int64)
        adversarial_images(Watched(), images, labels, generator=generator, steps=1)
    assert sizes == [20, 15, 5]  # 250 images of 64 pixels are as many pixels as 15 of 256


def test_an_adversarial_attack_perturbs_before_it_triggers(dataset, generator):
    images, labels = dataset
    attack = replace(CLEAN_LABEL, adversarial=True)
    with pytest.raises(ValueError, match="needs perturb"):
        poison(images, labels, attack, classes=4, generator=generator)
    poisoned = poison(
        images, labels, attack, classes=4, generator=generator, perturb=lambda raw, _: 255 - raw
    )
    rows = poisoned.is_poisoned
    assert torch.equal(poisoned.images[rows], attack.trigger(255 - images[rows]))
