import pytest
import torch
import torchvision
from torch import nn

from unbackdoor.networks import SMALL_NETWORKS, WideResNet, initialize

WEIGHTS = {  # with 10 classes
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
    "preact_resnet18": 11_171_146,
    "wrn16_1": 175_066,
    "wrn16_2": 691_674,
    "wrn28_10": 36_479_194,
    "wrn40_2": 2_243_546,
}


@pytest.mark.parametrize("name", SMALL_NETWORKS)
def test_a_small_network_has_the_published_number_of_weights(name):
    with torch.device("meta"):
        weights = SMALL_NETWORKS[name](10).parameters()
        assert sum(weight.numel() for weight in weights) == WEIGHTS[name]


@pytest.mark.parametrize("name", SMALL_NETWORKS)
def test_a_small_network_maps_images_of_32_pixels_to_logits(name):
    with torch.device("meta"):
        network = SMALL_NETWORKS[name](7)
        assert network(torch.empty(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("preact_resnet18", ["layer2.0.shortcut.0.weight", "layer4.1.conv2.weight", "linear.bias"]),
        ("wrn16_1", ["block2.layer.0.convShortcut.weight", "block3.layer.1.bn2.weight", "fc.bias"]),
    ],
)
def test_keys_are_those_of_public_checkpoints(name, keys):
    with torch.device("meta"):
        state = SMALL_NETWORKS[name](10).state_dict()
    assert set(keys) <= set(state)


def test_a_small_resnet_fits_torchvisions_keys_and_keeps_the_resolution_of_its_stem():
    with torch.device("meta"):
        network = SMALL_NETWORKS["resnet18"](10)
        original = torchvision.models.resnet18(num_classes=10)
        stem = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
        assert stem(torch.empty(1, 3, 32, 32)).shape == (1, 64, 32, 32)
    assert set(network.state_dict()) == set(original.state_dict())


def test_a_preact_block_normalizes_before_its_shortcut_branches_off():
    network = SMALL_NETWORKS["preact_resnet18"](10).eval()
    block = network.layer2[0]
    x = torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        activated = torch.relu(block.bn1(x))
        inner = block.conv2(torch.relu(block.bn2(block.conv1(activated))))
        expected = block.shortcut(activated) + inner
        assert block(x).equal(expected)


def test_a_wide_block_of_equal_width_passes_its_input_on_untouched():
    network = SMALL_NETWORKS["wrn16_1"](10).eval()
    block = network.block2.layer[1]
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert block(x).equal(x)


def test_initialize_is_decided_by_its_generator():
    networks = [WideResNet(10, 1, classes=3) for _ in range(3)]
    for network, seed in zip(networks, (0, 0, 1), strict=True):
        initialize(network, generator=torch.Generator().manual_seed(seed))
    first, same, other = (network.conv1.weight for network in networks)
    assert first.equal(same)
    assert not first.equal(other)
    assert networks[0].fc.bias.eq(0).all()


def test_initialize_draws_convolutions_with_hes_deviation():
    network = WideResNet(10, 4, classes=3)
    initialize(network, generator=torch.Generator().manual_seed(0))
    weight = network.block3.layer[0].conv2.weight  # 256 outputs of 3 × 3
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)
