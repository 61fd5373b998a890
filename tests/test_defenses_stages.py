import math

import pytest
import torch
from test_defenses import ARCHITECTURES, QUICK, make_backbone, make_data
from torch import nn

from unbackdoor.backbones import Backbone
from unbackdoor.defenses.nad import distill_attention
from unbackdoor.defenses.stages import find_stage, find_writers, map_of, prune
from unbackdoor.errors import ArchitectureError

FOUND = {  # stage, positions, and all layers that write to its channels
    "timm/test_resnet": ("layer4", 4),
    "cifar/resnet18": ("layer4", 4),
    "cifar/preact_resnet18": ("layer4", 4),
    "cifar/wrn16_1": ("relu", 16),
    "timm/test_convnext": ("norm_pre", 4),
    "timm/test_vit": ("norm", 101),
    "torchvision/convnext_tiny": ("features", 4),
    "torchvision/vgg11": ("avgpool", 49),
    "timm/swin_tiny_patch4_window7_224": ("norm", 49),
    "timm/pit_ti_224": ("transformers.2.blocks", 50),
}
WRITERS = {
    "cifar/resnet18": ("layer4.0.bn2", "layer4.0.downsample.1", "layer4.1.bn2"),
    "cifar/preact_resnet18": ("layer4.0.shortcut.0", "layer4.0.conv2", "layer4.1.conv2"),
    "cifar/wrn16_1": ("bn1",),
    "timm/test_vit": ("norm",),
}
SIZES = {**ARCHITECTURES, "cifar/resnet18": 16, "torchvision/convnext_tiny": 64}
SIZES |= {"torchvision/vgg11": 64, "timm/swin_tiny_patch4_window7_224": 224}
SIZES["timm/pit_ti_224"] = 224


@pytest.mark.parametrize("arch", FOUND)
def test_the_last_stage_is_found_without_being_named(arch):
    stage = find_stage(make_backbone(arch), make_data(SIZES[arch], count=2).images)
    assert (stage.name, stage.positions) == FOUND[arch]


class PoolsByAttention(nn.Module):
    """Ends in a map of 16 channels, which a module with maps of its own pools."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 16, 4, stride=4), nn.Module()
        self.pool.norm = nn.LayerNorm(16)
        self.pool.forward = lambda tokens: self.pool.norm(tokens).mean(1)

    def forward(self, images):
        return self.pool(self.conv(images).flatten(2).mT)


def test_what_pools_a_map_is_no_stage():
    backbone = Backbone(PoolsByAttention(), mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    assert find_stage(backbone, make_data(16).images)[:2] == ("conv", 1)


def test_a_trunk_that_pools_at_its_end_has_the_stage_inside():
    trunk = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = nn.Sequential()
    network.add_module("stem", nn.Conv2d(3, 8, 3))
    network.add_module("trunk", trunk)
    backbone = Backbone(network, mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    assert find_stage(backbone, make_data(16).images).name == "trunk.1"


def test_a_head_before_the_pooling_is_no_stage():
    """Its map is of classes, and only there while the head is in its place."""
    network = nn.Sequential()
    network.add_module("conv", nn.Conv2d(3, 8, 3))
    network.add_module("head", nn.Conv2d(8, 3, 1))
    network.add_module("pool", nn.Sequential(nn.ReLU(), nn.AvgPool2d(2)))
    network.add_module("flat", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    backbone = Backbone(network, ("head",), mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    data = make_data(16)
    assert find_stage(backbone, data.images).name == "conv"
    log = distill_attention(backbone, data, QUICK["nad"]).log
    assert log["positions"] == 14 * 14


@pytest.mark.parametrize(
    ("shape", "axis"), [((2, 64, 5, 5), 1), ((2, 5, 5, 64), 3), ((2, 7, 5, 9), 1)]
)
def test_channels_are_found_where_there_are_other_features(shape, axis):
    class Reshapes(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Unflatten(1, shape[1:])

        def forward(self, images):
            return self.map(images.flatten(1)[:, : math.prod(shape[1:])]).flatten(1)[:, :6]

    backbone = Backbone(Reshapes(), mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    assert find_stage(backbone, make_data(32).images).axis == axis


def test_a_map_is_seen_as_its_layer_made_it():
    """ReLU in place goes on to change what the layer named has put out."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten())
    backbone = Backbone(network, mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    images = make_data(16).images
    assert (map_of(backbone, find_stage(backbone, images, name="0"), images) < 0).any()


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "cifar/resnet18"])
def test_a_pruned_channel_of_the_stage_emits_nothing_and_the_others_do(arch):
    backbone, images = make_backbone(arch), make_data(SIZES[arch], count=4, seed=5).images
    stage = find_stage(backbone, images)
    writers = find_writers(backbone, stage, images)
    if arch in WRITERS:
        assert set(writers) == set(WRITERS[arch])
    pruned = torch.arange(1, stage.channels, 3)
    prune(backbone, writers, pruned)
    output = map_of(backbone, stage, images).movedim(stage.axis, -1).flatten(0, -2)
    assert not output[:, pruned].any()
    others = torch.ones(stage.channels, dtype=torch.bool)
    others[pruned] = False
    assert (output[:, others].abs().sum(0) > 0).float().mean() > 0.5  # a ReLU silences some others


def test_looking_for_writers_leaves_the_network_as_it_is():
    backbone, data = make_backbone("cifar/wrn16_1"), make_data(16)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    find_writers(backbone, find_stage(backbone, data.images), data.images)
    torch.testing.assert_close(dict(backbone.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layer9", "has no stage 'layer9'; it has .*bn1, relu, fc"),
        ("fc", "^stage 'fc' yields no map of more than one position; name one"),
    ],
)
def test_a_stage_that_is_none_is_refused(name, message):
    with pytest.raises(ArchitectureError, match=message):
        find_stage(make_backbone("cifar/wrn16_1"), make_data(16).images, name=name)


def test_a_stage_whose_channels_have_no_writers_is_refused():
    backbone, images = make_backbone("timm/test_vit"), make_data(160, count=2).images
    stage = find_stage(backbone, images, name="blocks.0")
    with pytest.raises(ArchitectureError, match="cannot be pruned"):
        find_writers(backbone, stage, images)
