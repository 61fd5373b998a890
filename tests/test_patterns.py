import numpy as np
import pytest
import torch

from unbackdoor import patterns


def test_noise_is_drawn_from_the_seed_alone_and_as_defined():
    image = patterns.gaussian_image(5, 7, seed=3)
    draws = np.random.RandomState(3).standard_normal((1, 3, 5, 7))
    expected = np.round(np.clip(128 + 64 * draws, 0, 255)).astype(np.uint8)
    assert (image.numpy() == expected).all()
    assert not torch.equal(image, patterns.gaussian_image(5, 7, seed=4))


def test_a_pattern_of_the_right_size_is_not_resized():
    image = patterns.gaussian_image(8, 8, seed=0)
    assert patterns.resized(image, 8, 8) is image
    flat = torch.full((1, 3, 8, 8), 77, dtype=torch.uint8)
    assert torch.equal(patterns.resized(flat, 3, 5), flat[:, :, :3, :5])


def test_blending_rounds_and_clips():
    images = torch.tensor([[[[0, 101, 255]]]], dtype=torch.uint8)
    pattern = torch.tensor([[[[10.0, 100.0, 400.0]]]])
    # .75 x + .25 t: 2.5 (to even), 100.75, 291.25
    assert patterns.blend(images, pattern, ratio=0.25).flatten().tolist() == [2, 101, 255]


def test_a_sinusoid_by_hand():
    wave = patterns.sinusoid(8, amplitude=20, frequency=1).flatten()
    expected = [0, 14.142, 20, 14.142, 0, -14.142, -20, -14.142]
    torch.testing.assert_close(wave, torch.tensor(expected), atol=1e-3, rtol=0)


def published_warp(images, offsets, *, strength):
    """WaNet's field as its authors publish the formula, written plainly for one square size."""
    height = images.shape[2]
    field = offsets / offsets.abs().mean()
    field = torch.nn.functional.interpolate(
        field, size=height, mode="bicubic", align_corners=True
    ).permute(0, 2, 3, 1)
    axis = torch.linspace(-1, 1, steps=height)
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    identity = torch.stack((columns, rows), 2)[None]
    grid = torch.clamp(identity + strength * field / height, -1, 1)
    return torch.nn.functional.grid_sample(
        images, grid.repeat(len(images), 1, 1, 1), align_corners=True
    )


def test_the_warp_equals_the_published_formula(generator):
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=generator)
    offsets = torch.from_numpy(np.random.RandomState(0).uniform(-1, 1, (1, 2, 4, 4))).float()
    expected = published_warp(images.float(), offsets, strength=0.5)
    warped = patterns.warp(images, patterns.smooth_warp(32, 32, points=4, strength=0.5, seed=0))
    assert (warped.float() - expected).abs().max() <= 0.51  # rounding, and nothing else


def test_a_warp_of_no_strength_changes_nothing(generator):
    images = torch.randint(0, 256, (2, 3, 9, 12), dtype=torch.uint8, generator=generator)
    still = patterns.smooth_warp(9, 12, points=4, strength=0.0, seed=0)
    assert torch.equal(patterns.warp(images, still), images)


def test_a_jittered_warp_moves_every_pixel_of_every_copy_by_at_most_1_over_height(generator):
    grid = patterns.smooth_warp(16, 16, points=4, strength=0.5, seed=0)
    copies = patterns.jittered(grid, 3, generator=generator)
    moves = copies - grid
    assert copies.shape == (3, 16, 16, 2)
    assert moves.abs().max() <= 1 / 16 + 1e-6
    assert moves.abs().mean() == pytest.approx(0.5 / 16, rel=0.1)
    assert not copies[0].equal(copies[1])
