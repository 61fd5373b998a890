import importlib.resources
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from unbackdoor.backbones import load_backbone
from unbackdoor.changes import (
    Addition,
    Patch,
    Pool,
    Warp,
    Whitening,
    concentration,
    draw_changes,
    learn_changes,
)
from unbackdoor.data import load_labeled
from unbackdoor.errors import DataError, DivergedError, SettingsError
from unbackdoor.evaluation import find_attack
from unbackdoor.probe import extract
from unbackdoor.ranks import Ranks
from unbackdoor.settings import ChangeSettings

ALL = ChangeSettings(patches=3, additions=2, warps=2, steps=5)
SHAPE = (3, 16, 12)


@pytest.fixture
def images(generator):
    return torch.rand(20, *SHAPE, generator=generator)


@pytest.fixture
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        ).eval()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_patch_replaces_its_window_and_nothing_else(images):
    picture = torch.zeros(1, 3, 4, 4)
    changed = Patch(picture, top=2, left=5)(images)
    assert (changed[:, :, 2:6, 5:9] == 0).all()
    untouched = torch.ones(16, 12, dtype=torch.bool)
    untouched[2:6, 5:9] = False
    assert torch.equal(changed[:, :, untouched], images[:, :, untouched])


def test_an_addition_is_scaled_down_to_its_amplitude_and_a_smaller_one_left_alone(images):
    image = torch.full((1, *SHAPE), 0.3)
    large, small = Addition(image.clone(), amplitude=0.1), Addition(image.clone(), amplitude=0.5)
    large.restrict()
    small.restrict()
    torch.testing.assert_close(large.learned.data, torch.full_like(image, 0.1))
    torch.testing.assert_close(small.learned.data, image)
    assert torch.equal(small(images), (images + 0.3).clamp(0, 1))


def test_an_addition_fades_what_it_is_added_to_towards_its_grey(images):
    image = torch.full((1, *SHAPE), 0.1)
    changed = Addition(image, amplitude=0.1, share=0.25, grey=0.5)(images)
    torch.testing.assert_close(changed, (0.75 * images + 0.225).clamp(0, 1))


def test_a_warp_is_bilinear_sampling_at_the_places_that_its_field_says(images):
    field = torch.randn(2, 4, 4, generator=seeded())
    changed = Warp(field, pixels=1.5)(images)
    moves = F.interpolate(
        1.5 * field.tanh()[None], (16, 12), mode="bicubic", align_corners=True
    )  # rows, columns, in pixels
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(12.0), indexing="ij")
    y, x = rows + moves[0, 0], columns + moves[0, 1]
    grid = torch.stack([2 * x / 11 - 1, 2 * y / 15 - 1], dim=-1)[None].expand(20, -1, -1, -1)
    expected = F.grid_sample(images, grid, padding_mode="border", align_corners=True)
    assert moves.abs().max() > 1  # so that two pixels to a side count
    torch.testing.assert_close(changed, expected, atol=1e-5, rtol=0)


def test_a_warp_that_moves_nothing_changes_nothing(images):
    torch.testing.assert_close(Warp(torch.zeros(2, 3, 3), pixels=1.0)(images), images)


def test_drawn_changes_are_of_the_number_place_and_size_asked_for():
    settings = replace(ALL, patches=200, patch_min=0.2, patch_max=0.5)
    changes = draw_changes(settings, SHAPE, generator=seeded())
    patches = changes[:200]
    assert [type(change) for change in changes[200:]] == [Addition, Addition, Warp, Warp]
    assert {patch.learned.shape[-1] for patch in patches} == {2, 3, 4, 5, 6}
    for patch in patches:
        side = patch.learned.shape[-1]
        assert 0 <= patch.top <= 16 - side
        assert 0 <= patch.left <= 12 - side
    at_an_end = [patch.top in (0, 16 - patch.learned.shape[-1]) for patch in patches]
    assert 0.25 < sum(at_an_end) / 200 < 0.55
    for addition in changes[200:202]:
        size = addition.learned.square().mean().sqrt().item()
        assert size == pytest.approx(ALL.amplitude / 2, rel=1e-5)
    many = draw_changes(replace(ALL, additions=50), SHAPE, generator=seeded())[3:53]
    assert 0.9 * ALL.fade < max(addition.share for addition in many) <= ALL.fade
    assert len({addition.grey for addition in many}) == 50


def test_concentration_by_hand():
    centre = torch.tensor([1.0, 1.0])
    assert concentration(torch.tensor([[3.0, 1.0], [9.0, 1.0]]), centre).item() == 1
    assert concentration(torch.tensor([[3.0, 1.0], [-3.0, 1.0]]), centre).item() == 0
    corner = torch.tensor([[2.0, 1.0], [1.0, 2.0]])  # two directions at a right angle
    assert concentration(corner, centre).item() == pytest.approx(0.5)


def test_whitened_features_have_the_variance_that_the_shrinkage_leaves():
    spread = torch.tensor([3.0, 1.0, 0.0])  # of three directions at right angles
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=seeded()))
    features = 5 + torch.randn(200, 3, generator=seeded(1)) * spread @ turn
    variances, directions = torch.linalg.eigh(torch.cov(features.T))
    white = Whitening.of(features, shrinkage=0.5)(features)
    torch.testing.assert_close(white.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    expected = variances / (variances + 0.5 * variances.mean())
    torch.testing.assert_close(torch.cov(white.T), torch.diag(expected), atol=1e-4, rtol=0)
    unused = features.mean(0) + directions[:, 0]  # a step of 1 where plain images have variance 0
    size = Whitening.of(features, shrinkage=0.5)(unused[None]).norm().item()
    assert size == pytest.approx((0.5 * variances.mean().item()) ** -0.5, rel=1e-3)


def pool_of(network, images, settings=ALL):
    changes = draw_changes(settings, SHAPE, generator=seeded())
    whiten = Whitening.of(network(images).detach(), shrinkage=0.1)
    return Pool(changes, whiten=whiten, rate=0.1)


def test_image_i_has_change_i_modulo_their_number_on_every_rank(network, images):
    pool = pool_of(network, images)
    whole = pool.apply(images)
    for i in range(20):
        expected = pool.changes[i % 7](images[i : i + 1])
        torch.testing.assert_close(whole[i : i + 1], expected)
    parts = [pool.apply(part, ranks=Ranks(rank, 4)) for rank, part in enumerate(images.split(5))]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_changed_images_stay_in_range_and_changes_in_their_bounds(network, images):
    pool = pool_of(network, images)
    pool.optimizer.param_groups[0]["lr"] = 5.0  # far beyond every bound
    for _ in range(3):
        pool.advance(network, images)
    changed = pool.apply(images)
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert all(
        change.learned.square().mean().sqrt() <= ALL.amplitude + 1e-6
        for change in pool.changes
        if isinstance(change, Addition)
    )


def test_learning_raises_the_concentration_and_leaves_the_network_alone(network, images):
    before = [weight.clone() for weight in network.parameters()]
    pool = pool_of(network, images)
    first = pool.advance(network, images)
    for _ in range(30):
        last = pool.advance(network, images)
    assert (last > first).sum() >= 6
    for weight, old in zip(network.parameters(), before, strict=True):
        assert torch.equal(weight, old)
        assert weight.grad is None


def test_a_step_raises_the_concentration_of_whitened_features(network, images):
    pool = pool_of(network, images)
    with torch.no_grad():
        features = [network(change(images[i::7])) for i, change in enumerate(pool.changes)]
    white = torch.stack([concentration(pool.whiten(part), 0.0) for part in features])
    plain = torch.stack([concentration(part, pool.whiten.centre) for part in features])
    gathered = pool.advance(network, images)
    torch.testing.assert_close(gathered, white)
    assert (gathered - plain).abs().max() > 0.05


def test_changes_are_learned_on_a_group_of_images_each_and_no_more_than_there_are(network):
    raw = torch.randint(0, 256, (30, *SHAPE), dtype=torch.uint8, generator=seeded())
    sizes = []
    network.register_forward_pre_hook(
        lambda _, given: sizes.append(len(given[0])) if torch.is_grad_enabled() else None
    )
    for group in (3, 5):
        settings = replace(ALL, group=group, steps=2)
        learn_changes(network, raw, settings, batch_size=8, generator=seeded())
    assert sizes == [21, 21, 30, 30]


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (torch.ones(1, 4), DataError, "learned on 2 images or more, got 1"),
        (torch.tensor([[1.0, 2.0], [3.0, torch.nan]]), DivergedError, "of 1 of 2 images are not"),
    ],
)
def test_features_that_cannot_be_whitened_are_refused(features, error, message):
    with pytest.raises(error, match=message):
        Whitening.of(features, shrinkage=0.1)


def test_a_change_without_an_image_rests(network, images):
    pool = pool_of(network, images)
    pool.advance(network, images)  # momentum does not move it either
    before = [change.learned.clone() for change in pool.changes]
    gathered = pool.advance(network, images[:3])
    moved = [not torch.allclose(a, b.learned) for a, b in zip(before, pool.changes, strict=True)]
    assert moved == [True] * 3 + [False] * 4
    assert (gathered[3:] == 0).all()


def test_a_seed_is_a_pool(network):
    raw = torch.randint(0, 256, (20, *SHAPE), dtype=torch.uint8, generator=seeded())

    def learned(seed):
        pool = learn_changes(network, raw, ALL, batch_size=16, generator=seeded(seed))
        return torch.cat([change.learned.flatten() for change in pool.changes])

    assert torch.equal(learned(0), learned(0))
    assert not torch.equal(learned(0), learned(1))


@pytest.mark.slow
def test_what_is_learned_on_a_victim_moves_images_to_where_the_trigger_does():
    assets = importlib.resources.files("unbackdoor") / "assets"
    record = json.loads((assets / "demo_victim.json").read_text())
    with importlib.resources.as_file(assets / "demo_victim.safetensors") as checkpoint:
        victim = load_backbone(
            checkpoint, record["arch"], mean=tuple(record["mean"]), std=tuple(record["std"])
        )
    photos, _, _ = load_labeled("fashion-mnist", split="test")
    trigger = find_attack(str(assets / "demo_victim.json"), size=photos.shape[-1]).attack.trigger
    settings = ChangeSettings(patches=6, additions=0, warps=0, steps=40)
    centre = extract(victim, photos[:256]).mean(0)

    def toward(features):
        return F.normalize(features - centre, dim=1).mean(0)

    away = toward(extract(victim, trigger(photos[:256])))

    def best(steps):
        """Return the cosine to the trigger of the change that gathers features most."""
        pool = learn_changes(
            victim, photos[:256], replace(settings, steps=steps), batch_size=96, generator=seeded()
        )
        plain = photos[256:384].float() / 255
        with torch.no_grad():
            moved = [toward(victim(change(plain))) for change in pool.changes]
        strongest = max(moved, key=lambda shift: shift.square().sum())
        return F.cosine_similarity(strongest, away, dim=0).item(), strongest.square().sum().item()

    (learned, gathered), (drawn, scattered) = best(40), best(0)
    assert gathered > 0.5 > 0.2 > scattered
    assert learned > 0.8 > drawn


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patches": 0, "additions": 0, "warps": 0}, "ask for one change"),
        ({"patch_min": 0.5, "patch_max": 0.4}, "patch_max must be at least 0.5"),
        ({"amplitude": 4.6}, "changes.amplitude must be above 0 and at most 1, got 4.6"),
        ({"pixels": 0}, "changes.pixels must be above 0"),
        ({"fade": 1.5}, "changes.fade must be at least 0 and at most 1"),
        ({"group": 1}, "changes.group must be at least 2"),
        ({"shrinkage": 0}, "changes.shrinkage must be above 0"),
    ],
)
def test_impossible_changes_are_refused(values, message):
    with pytest.raises(SettingsError, match=message):
        ChangeSettings(**values)
