from dataclasses import replace

import pytest
import torch
from test_defenses import QUICK, make_backbone, make_data

from unbackdoor.backbones import Backbone, network_state
from unbackdoor.defenses.fine_tuning import fine_tune
from unbackdoor.defenses.nad import attention, attention_distance, distill_attention
from unbackdoor.defenses.settings import FineTuningSettings
from unbackdoor.errors import ArchitectureError


def naive_attention(image):
    """Li et al. 2021: the sum over channels of squares, then unit length."""
    channels, height, width = image.shape
    rows = [
        sum(float(image[c, i, j]) ** 2 for c in range(channels))
        for i in range(height)
        for j in range(width)
    ]
    length = sum(value**2 for value in rows) ** 0.5
    return [value / length for value in rows]


def test_attention_and_its_distance_are_the_papers_in_loops(generator):
    a, b = (torch.randn(2, 5, 3, 4, generator=generator) for _ in range(2))
    mine, others = ([naive_attention(image) for image in images] for images in (a, b))
    torch.testing.assert_close(attention(a, axis=1), torch.tensor(mine))
    squares = [
        (x - y) ** 2
        for one, other in zip(mine, others, strict=True)
        for x, y in zip(one, other, strict=True)
    ]
    expected = torch.tensor(sum(squares) / len(squares))
    torch.testing.assert_close(attention_distance(a, b, axis=1), expected)


def test_tokens_with_their_channels_last_have_a_map_too(generator):
    tokens = torch.randn(2, 7, 5, generator=generator)
    assert attention(tokens, axis=2).shape == (2, 7)


def test_at_32_pixels_the_map_is_larger_than_one_pixel_and_the_loss_above_0():
    backbone, data = make_backbone("cifar/resnet18"), make_data(32, count=4)
    log = distill_attention(backbone, data, QUICK["nad"]).log
    assert (log["stage"], log["positions"]) == ("layer4", 16)
    assert log["attention_distance_first"] > 0
    assert log["attention_distance_last"] > 0


def test_with_the_weight_at_0_it_is_plain_fine_tuning():
    backbone, data = make_backbone("cifar/wrn16_1"), make_data(16)
    settings = replace(QUICK["nad"], beta=0.0)
    student = distill_attention(backbone, data, settings).backbone
    tuned = fine_tune(backbone, data, FineTuningSettings(tuning=settings.tuning)).backbone
    torch.testing.assert_close(network_state(student), network_state(tuned))
    weighty = distill_attention(backbone, data, replace(QUICK["nad"], beta=1e5)).backbone
    assert not network_state(weighty)["bn1.weight"].allclose(network_state(tuned)["bn1.weight"])


def test_a_network_whose_maps_are_all_one_pixel_is_refused():
    network = torch.nn.Sequential()
    network.add_module("conv", torch.nn.Conv2d(3, 4, 16))
    network.add_module("flat", torch.nn.Flatten())
    network.add_module("fc", torch.nn.Linear(4, 3))
    backbone = Backbone(network, ("fc",), mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    with pytest.raises(ArchitectureError, match="no layer of this network yields a map"):
        distill_attention(backbone, make_data(16), QUICK["nad"])
