import pytest
import torch

from unbackdoor.attacks.triggers import TRIGGERS, BadNets
from unbackdoor.errors import DataError

EXAMPLES = [BadNets(), BadNets(size=6, cell=2), BadNets(position="center")]


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
    assert torch.equal(triggered, one_by_one)
    assert torch.equal(images, before)
    assert not torch.equal(triggered, images)


def test_the_pixels_of_badnets():
    grey = torch.full((1, 1, 6, 6), 7, dtype=torch.uint8)
    corner = BadNets()(grey)[0, 0]
    assert corner[:3, :3].tolist() == [[255, 0, 255], [0, 255, 0], [255, 0, 255]]
    corner[:3, :3] = 7
    assert (corner == 7).all()
    centre = BadNets(size=4, cell=2, position="center")(grey)[0, 0]
    assert centre[1:5, 1:5].tolist() == [[255, 255, 0, 0]] * 2 + [[0, 0, 255, 255]] * 2
    assert (centre[0] == 7).all()


def test_an_image_smaller_than_the_patch_is_refused():
    with pytest.raises(DataError, match=r"patch is 3 pixels wide, the images are 2 × 9"):
        BadNets()(torch.zeros(1, 3, 2, 9, dtype=torch.uint8))
