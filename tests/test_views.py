import colorsys
import math
from dataclasses import replace

import pytest
import torch
from torchvision.transforms.v2 import functional as oracle

from unbackdoor.settings import ViewSettings
from unbackdoor.views import blur, crop_and_flip, random_views, recolour, shift_and_flip

STILL = ViewSettings(min_area=1, flip=0, jitter=0, grey=0, blur=0)


@pytest.fixture
def images(generator):
    return torch.rand(16, 3, 12, 12, generator=generator)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_views_are_deterministic_stay_in_range_and_leave_their_input_alone(images):
    settings, before = ViewSettings(blur=0.5), images.clone()
    once, again = (random_views(images, settings, generator=seeded()) for _ in range(2))
    assert torch.equal(once, again)
    assert torch.equal(images, before)
    assert once.shape == images.shape
    assert once.min() >= 0
    assert once.max() <= 1


def test_every_image_of_a_batch_draws_its_own_view():
    same = torch.rand(1, 3, 12, 12, generator=seeded(1)).expand(8, -1, -1, -1)
    views = random_views(same, ViewSettings(), generator=seeded())
    assert len({view.sum().item() for view in views}) == 8


def test_a_full_crop_is_the_image_up_to_its_aspect(images):
    # The area is all of the image; where the drawn ratio does not fit, the part is cut to it.
    views = crop_and_flip(images, STILL, generator=seeded())
    assert views.shape == images.shape
    assert (views - images).abs().mean() < (images - images.flip(0)).abs().mean()


def test_a_crop_lies_in_the_image_and_has_the_area_and_the_ratio_asked_for():
    """A ramp says where its pixels come from."""
    side = 64
    place = (torch.arange(side) + 0.5) / side
    ramps = torch.stack([place.expand(side, side), place[:, None].expand(side, side)])
    settings = replace(STILL, min_area=0.3)
    views = crop_and_flip(ramps.expand(500, -1, -1, -1), settings, generator=seeded())
    left, right, top = views[:, 0, 0, 0], views[:, 0, 0, -1], views[:, 1, 0, 0]
    width, height = (right - left) * 64 / 63, (views[:, 1, -1, 0] - top) * 64 / 63
    assert 0.28 < (width * height).min() < 0.35
    assert (width * height).max() > 0.9
    ratio = width / height
    assert 0.73 < ratio.min() < 0.8 < 1.25 < ratio.max() < 1.37
    assert left.min() < 0.03 < 0.3 < left.max()
    assert top.min() < 0.03 < 0.3 < top.max()


def test_the_hue_turns_colours_by_the_drawn_angle_and_keeps_their_brightness(monkeypatch):
    draws = iter([0.5, 0.5, 0.5, 1.0, 0.0, 1.0])  # only the hue's is not in the middle
    monkeypatch.setattr(torch, "rand", lambda *n, **_: torch.full((n[0],), next(draws)))
    colour = torch.tensor([0.6, 0.4, 0.3]).view(1, 3, 1, 1)
    settings = ViewSettings(jitter=0.25, jitter_probability=1, grey=0)
    turned = recolour(colour, settings, generator=seeded())
    (y, *a), (z, *b) = (colorsys.rgb_to_yiq(*c.flatten().tolist()) for c in (colour, turned))
    assert z == pytest.approx(y, abs=0.01)
    assert math.hypot(*b) == pytest.approx(math.hypot(*a), rel=0.05)
    angle = math.atan2(b[1], b[0]) - math.atan2(a[1], a[0])
    assert angle == pytest.approx(0.1 * math.pi, abs=0.04)


def test_a_certain_flip_mirrors(images):
    mirrored = crop_and_flip(
        images, ViewSettings(min_area=1, flip=1, jitter=0, grey=0), generator=seeded()
    )
    straight = crop_and_flip(images, STILL, generator=seeded())
    torch.testing.assert_close(mirrored, straight.flip(3), atol=1e-5, rtol=0)


def test_grey_equals_torchvisions(images):
    views = recolour(images, ViewSettings(jitter=0, grey=1), generator=seeded())
    expected = oracle.rgb_to_grayscale(images, num_output_channels=3)
    torch.testing.assert_close(views, expected, atol=1e-3, rtol=0)  # it rounds the weights


def test_brightness_contrast_and_saturation_equal_torchvisions(images, monkeypatch):
    # With the hue's draw at its middle, the colour map is the three factors in order.
    draws = iter([0.9, 0.7, 0.3, 0.5, 0.0, 1.0])

    def drawn(*size, **_):
        return torch.full((size[0],), next(draws))

    monkeypatch.setattr(torch, "rand", drawn)
    images = images * 0.5 + 0.25  # so that nothing is clipped on the way
    settings = ViewSettings(jitter=0.25, jitter_probability=1, grey=0)
    views = recolour(images, settings, generator=seeded())
    factors = [0.8 + 0.4 * draw for draw in (0.9, 0.7, 0.3)]
    expected = oracle.adjust_brightness(images, factors[0])
    expected = oracle.adjust_contrast(expected, factors[1])
    expected = oracle.adjust_saturation(expected, factors[2])
    torch.testing.assert_close(views, expected, atol=2e-3, rtol=0)


def test_blur_keeps_a_flat_image_and_smooths_noise(images):
    settings = ViewSettings(blur=1)
    flat = torch.full_like(images, 0.3)
    torch.testing.assert_close(blur(flat, settings, generator=seeded()), flat)
    smooth = blur(images, settings, generator=seeded())
    assert smooth.var() < images.var()
    torch.testing.assert_close(blur(images, STILL, generator=seeded()), images, rtol=0, atol=0)


def test_shift_and_flip_moves_whole_pixels_and_pads_with_black():
    images = torch.arange(1, 37, dtype=torch.uint8).view(1, 1, 6, 6).expand(64, -1, -1, -1)
    shifted = shift_and_flip(images, margin=2, generator=seeded())
    padded = torch.nn.functional.pad(images[:1], (2, 2, 2, 2))[0, 0]
    windows = [padded[y : y + 6, x : x + 6] for y in range(5) for x in range(5)]
    possible = {tuple(w.flatten().tolist()) for w in [*windows, *(w.flip(1) for w in windows)]}
    seen = {tuple(image.flatten().tolist()) for image in shifted}
    assert seen <= possible
    assert len(seen) > 20
