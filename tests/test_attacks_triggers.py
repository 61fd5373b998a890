import pytest
import torch

from unbackdoor import patterns
from unbackdoor.attacks.triggers import TRIGGERS, BadNets, Blend, Sig, WaNet, trigger_scaled
from unbackdoor.errors import DataError, SettingsError

EXAMPLES = [
    BadNets(),
    BadNets(size=6, cell=2),
    BadNets(position="center"),
    Blend(),
    Blend(height=16, width=16, seed=2),
    Sig(),
    WaNet(),
]
# Pixels that must never change: victims in the world were trained with them.
GOLDEN_BLEND = [[48, 32, 40, 53, 53, 17], [48, 16, 14, 14, 43, 23], [4, 36, 3, 33, 17, 41]]
GOLDEN_SIG = [70, 76, 74, 68, 64, 68, 74, 76, 70, 64, 66, 72, 76, 72, 66, 64] * 2
GOLDEN_WANET = [
    [0, 8, 17, 25, 33, 41, 49, 57],
    [0, 7, 16, 24, 32, 40, 49, 57],
    [4, 11, 19, 26, 34, 41, 49, 56],
]


@pytest.fixture
def images(generator):
    return torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=generator)


def test_every_trigger_has_an_example():
    assert {type(example) for example in EXAMPLES} == set(TRIGGERS.values())


@pytest.mark.parametrize("trigger", EXAMPLES, ids=repr)
def test_a_trigger_is_a_pure_function_of_each_image(trigger, images):
    before = images.clone()
    triggered = trigger(images)
    one_by_one = torch.cat([trigger(image[None]) for image in images])
    assert triggered.dtype == torch.uint8
    assert torch.equal(triggered, one_by_one)
    assert torch.equal(images, before)
    assert not torch.equal(triggered, images)


@pytest.mark.parametrize("trigger", EXAMPLES, ids=repr)
@pytest.mark.parametrize("shape", [(28, 28), (20, 33), (224, 224)])
def test_a_trigger_takes_any_size_and_grey_images(trigger, shape, generator):
    grey = torch.randint(0, 256, (2, 1, *shape), dtype=torch.uint8, generator=generator)
    assert trigger(grey).shape == grey.shape


def test_the_pixels_of_badnets():
    grey = torch.full((1, 1, 6, 6), 7, dtype=torch.uint8)
    corner = BadNets()(grey)[0, 0]
    assert corner[:3, :3].tolist() == [[255, 0, 255], [0, 255, 0], [255, 0, 255]]
    corner[:3, :3] = 7
    assert (corner == 7).all()
    for position, rows, columns in (
        ("top-right", slice(0, 2), slice(4, 6)),
        ("bottom-left", slice(4, 6), slice(0, 2)),
        ("bottom-right", slice(4, 6), slice(4, 6)),
    ):
        white = BadNets(size=2, cell=2, position=position)(grey)[0, 0]
        assert (white[rows, columns] == 255).all()
        assert (white == 255).sum() == 4
    centre = BadNets(size=4, cell=2, position="center")(grey)[0, 0]
    assert centre[1:5, 1:5].tolist() == [[255, 255, 0, 0]] * 2 + [[0, 0, 255, 255]] * 2
    assert (centre[0] == 7).all()


def test_the_pixels_of_blend():
    ramp = torch.arange(32 * 32 * 3).remainder(256).to(torch.uint8).view(1, 3, 32, 32)
    row = Blend()(ramp)[0, :, 0, :6]
    # round(.8 x + .2 t), t the first numbers of numpy's RandomState(0), times 64, plus 128
    assert row.tolist() == GOLDEN_BLEND


def test_the_pixels_of_sig():
    grey = torch.full((1, 1, 1, 32), 100, dtype=torch.uint8)
    # round(70 + 6 sin(2 pi 6 j / 32)), by hand for j = 0, 4, 8, 12: sin 0, -1, 0, 1
    row = Sig()(grey)[0, 0, 0]
    assert row[[0, 4, 8, 12]].tolist() == [70, 64, 70, 76]
    assert row.tolist() == GOLDEN_SIG
    assert Sig()(torch.zeros(1, 1, 1, 32, dtype=torch.uint8)).min() == 0  # clipped, not wrapped


def test_the_pixels_of_wanet():
    ramp = (torch.arange(32) * 8).to(torch.uint8).expand(1, 1, 32, 32).contiguous()
    warped = WaNet()(ramp)[0, 0]
    assert warped[[0, 10, 20], :8].tolist() == GOLDEN_WANET


def test_wanets_noise_mode_is_another_warp_for_every_image(images, generator):
    trigger = WaNet()
    same = images[:1].expand(2, -1, -1, -1).contiguous()
    first, second = trigger.noisy(same, generator=generator)
    assert not torch.equal(first, second)
    assert not torch.equal(first, trigger(same)[0])


def test_an_image_smaller_than_the_patch_is_refused():
    with pytest.raises(DataError, match=r"patch is 3 pixels wide, the images are 2 × 9"):
        BadNets()(torch.zeros(1, 3, 2, 9, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("trigger", "options", "message"),
    [
        (BadNets, {"size": 0}, "trigger.size and trigger.cell are 1 to 4096 pixels, got 0, 1"),
        (BadNets, {"cell": 10**30}, "trigger.size and trigger.cell are 1 to 4096 pixels, got 3, 1"),
        (Blend, {"ratio": 20}, r"trigger.ratio is a share in \(0, 1\], got 20"),
        (Blend, {"width": 0}, "are 1 to 4096 pixels, got 32, 0"),
        (Sig, {"amplitude": float("nan")}, "trigger.amplitude must be a number, got nan"),
        (WaNet, {"strength": float("inf")}, "trigger.strength must be a number, got inf"),
        (Sig, {"ratio": 0}, r"trigger.ratio is a share in \(0, 1\], got 0"),
        (WaNet, {"points": 1}, "trigger.points is 2 to 4096, got 1"),
        (WaNet, {"points": 10**9}, "trigger.points is 2 to 4096, got 1000000000"),
        (WaNet, {"seed": 2**32}, "trigger.seed is 0 to 4294967295, .* got 4294967296"),
        (Blend, {"seed": -1}, "trigger.seed is 0 to 4294967295, .* got -1"),
    ],
)
def test_an_option_out_of_range_is_refused(trigger, options, message):
    with pytest.raises(SettingsError, match=message):
        trigger(**options)


@pytest.mark.parametrize("trigger", EXAMPLES, ids=repr)
def test_a_scaled_trigger_is_the_trigger_itself_on_images_of_its_own_size(trigger, images):
    before = images.clone()
    assert torch.equal(trigger_scaled(trigger, images, side=16), trigger(images))
    assert torch.equal(images, before)


@pytest.mark.parametrize("trigger", EXAMPLES, ids=repr)
@pytest.mark.parametrize("shape", [(28, 28), (20, 33), (48, 64)])
def test_a_scaled_trigger_takes_any_size_and_grey_images(trigger, shape, generator):
    grey = torch.randint(0, 256, (2, 1, *shape), dtype=torch.uint8, generator=generator)
    triggered = trigger_scaled(trigger, grey, side=16)
    assert triggered.shape == grey.shape
    assert not torch.equal(triggered, grey)


@pytest.mark.parametrize(
    ("position", "rows", "columns"),
    [("top-left", 0, 0), ("center", 14, 14), ("bottom-right", 29, 29)],
)
def test_a_scaled_patch_keeps_its_place_and_its_share_of_the_image(position, rows, columns):
    """3 of 32 pixels become 12 of 128 rows and 24 of 256 columns, at 14/32 of each or at 0."""
    images = torch.full((1, 1, 128, 256), 7, dtype=torch.uint8)
    scaled = trigger_scaled(BadNets(position=position), images, side=32)[0, 0]
    top, left = 4 * rows, 8 * columns
    cells = scaled[top : top + 12, left : left + 24].reshape(3, 4, 3, 8)
    assert (cells == cells[:, :1, :, :1]).all()
    assert cells[:, 0, :, 0].tolist() == [[255, 0, 255], [0, 255, 0], [255, 0, 255]]
    scaled[top : top + 12, left : left + 24] = 7
    assert (scaled == 7).all()


def test_scaled_noise_is_the_stored_noise_and_no_other_draw():
    grey = torch.zeros(1, 1, 128, 256, dtype=torch.uint8)
    scaled = trigger_scaled(Blend(ratio=1.0), grey, side=32)
    stored = patterns.gaussian_image(32, 32, seed=0)[:, :1]
    assert torch.equal(scaled, patterns.resized(stored, 128, 256))


def test_a_scaled_warp_moves_by_the_same_share_of_the_image():
    """Each pixel of a ramp says where it is, as a share of the width or of the height."""
    trigger = WaNet(strength=8.0)
    moved = {}
    for height, width in ((32, 32), (125, 187)):
        across = torch.linspace(0, 255, width).round().expand(height, width)
        down = torch.linspace(0, 255, height).round()[:, None].expand(height, width)
        images = torch.stack([across, down])[:, None].to(torch.uint8)
        difference = trigger_scaled(trigger, images, side=32).float() - images.float()
        moved[height] = torch.nn.functional.interpolate(
            difference, (32, 32), mode="bilinear", align_corners=True
        )[..., 6:-6, 6:-6]
    assert moved[32].abs().max() > 8
    assert (moved[32] - moved[125]).abs().max() <= 3  # rounding to levels
