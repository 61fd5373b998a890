import pytest
import timm
import torch
from torch import nn

from unbackdoor.backbones import Backbone, build
from unbackdoor.batchnorm import batch_norms
from unbackdoor.detection.network import find_levels, fit, make_detector, run_before, stage_maps
from unbackdoor.errors import ArchitectureError
from unbackdoor.settings import DetectionSettings

TINY = DetectionSettings(shorter=48, longer=64, pyramid=8, box_head=16, batch_size=2, warmup=0)


def tiny_backbone(arch="cifar/wrn16_1"):
    architecture = build(arch, classes=10)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    return Backbone(architecture.network, architecture.heads, mean=mean, std=std).eval()


@pytest.mark.parametrize(
    ("arch", "channels", "strides"),
    [
        ("cifar/wrn16_1", [16, 32, 64], [1, 2, 4]),
        ("cifar/preact_resnet18", [64, 128, 256, 512], [1, 2, 4, 8]),
        ("torchvision/resnet18", [64, 128, 256, 512], [4, 8, 16, 32]),
        ("resnet18", [64, 128, 256, 512], [4, 8, 16, 32]),
        ("convnext_atto", [40, 80, 160, 320], [4, 8, 16, 32]),
    ],
)
def test_the_stages_of_a_network_are_found(arch, channels, strides):
    levels = find_levels(tiny_backbone(arch).body, arch)
    assert [level.channels for level in levels] == channels
    assert [level.stride for level in levels] == strides


def test_the_stages_are_what_timm_calls_its_features():
    network = timm.create_model("resnet18", pretrained=False).eval()
    expected = timm.create_model(
        "resnet18", pretrained=False, features_only=True, out_indices=(1, 2, 3, 4)
    ).eval()
    expected.load_state_dict(network.state_dict(), strict=False)
    images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = stage_maps(network, [f"layer{i}" for i in range(1, 5)], images)
        assert all(map(torch.equal, maps, expected(images)))
    assert not any(module._forward_hooks for module in network.modules())


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = nn.Conv2d(3, 4, 1)
        self.fine, self.same = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 1)
        self.late, self.tokens = nn.Conv2d(4, 4, 3, 4, 1), nn.Flatten()
        self.pair = nn.MultiheadAttention(4, 1)

    def forward(self, x):
        x = self.late(self.same(self.fine(x)))
        row = self.tokens(x)[:1, :4]
        self.pair(row, row, row)
        return x.mean((2, 3))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "its stages are not known; name the modules .* by --stages"),
        (("fine", "absent"), "has no module 'absent', which --stages names"),
        (("fine", "same"), r"have strides \[2, 2\]; in a feature pyramid each is twice"),
        (("fine", "late"), r"have strides \[2, 8\]"),
        (("tokens",), "tokens yields .*, which is no map"),
        (("unused",), "unused does not run, and so yields no map"),
        (("pair",), "pair yields a tuple, not one map"),
    ],
)
def test_what_is_no_pyramid_is_refused_with_the_reason(stages, message):
    with pytest.raises(ArchitectureError, match=message):
        find_levels(Odd().eval(), "odd", stages)


def test_a_vision_transformer_and_a_network_for_one_size_are_refused():
    with pytest.raises(ArchitectureError, match="A vision transformer has one map only"):
        find_levels(tiny_backbone("vit_tiny_patch16_224").body, "vit_tiny_patch16_224")
    fixed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 30 * 30, 5)).eval()
    with pytest.raises(ArchitectureError, match=r"fails on an image of 128 × 128 .* of any size"):
        find_levels(fixed, "mine", ("0",))


def test_stem_and_first_stage_are_found_by_running_and_not_by_order():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.first, self.stem = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.last(self.second(self.first(self.stem(x))))

    network = Backwards()
    assert run_before(network, "first") == [network.stem, network.first]
    assert network.training


def names_with_gradient(module):
    return {name for name, weight in module.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("stages", [(), ("block2", "relu")])
def test_stem_first_stage_and_batch_norm_take_no_gradient_and_all_else_does(stages):
    backbone = tiny_backbone()
    levels = find_levels(backbone.body, "wrn", stages)
    detector = make_detector(backbone, levels, TINY, classes=2)
    body = names_with_gradient(detector.backbone.body)
    assert body == {
        f"{block}.layer.{i}.{conv}.weight"
        for block in ("block2", "block3")
        for i in range(2)
        for conv in ("conv1", "conv2")
    } | {f"{block}.layer.0.convShortcut.weight" for block in ("block2", "block3")}
    outside = {name for name, _ in detector.named_parameters() if "backbone.body" not in name}
    assert outside <= names_with_gradient(detector)
    detector.train()
    assert not any(layer.training for layer in batch_norms(detector.backbone.body))
    assert detector.backbone.fpn.training


def test_new_weights_follow_the_seed_and_leave_the_global_generator_alone():
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        backbone = tiny_backbone()
        before = torch.get_rng_state()
        settings = DetectionSettings(pyramid=8, box_head=16, seed=seed)
        levels = find_levels(backbone.body, "wrn")
        states.append(make_detector(backbone, levels, settings, classes=2).state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    name = "roi_heads.box_head.fc6.weight"
    assert not torch.equal(states[0][name], states[2][name])


def test_the_detector_normalizes_as_the_backbone_does_and_scales_no_further():
    backbone = tiny_backbone()
    detector = make_detector(backbone, find_levels(backbone.body, "wrn"), TINY, classes=2).eval()
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1, 3, 96, 128), dtype=torch.uint8, generator=draws)
    fitted = fit(images, TINY).float() / 255
    assert fitted.shape == (1, 3, 48, 64)
    seen, _ = detector.transform([fitted[0]])
    expected = (fitted - backbone.mean) / backbone.std
    assert torch.allclose(seen.tensors[:, :, :48, :64], expected, atol=1e-6)
    assert seen.image_sizes == [(48, 64)]


@pytest.mark.parametrize(
    ("size", "fitted"),
    [((96, 128), (48, 64)), ((128, 96), (64, 48)), ((50, 200), (16, 64)), ((20, 20), (48, 48))],
)
def test_an_image_keeps_its_shape(size, fitted):
    images = torch.full((1, 3, *size), 7, dtype=torch.uint8)
    result = fit(images, TINY)
    assert result.shape[2:] == fitted
    assert (result == 7).all()


def test_bfloat16_is_used_inside_and_float32_comes_out():
    backbone = tiny_backbone()
    levels = find_levels(backbone.body, "wrn")
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    outputs = []
    for precision in ("fp32", "bf16"):
        detector = make_detector(backbone, levels, TINY, classes=2, precision=precision)
        with torch.no_grad():
            outputs.append(detector.backbone.eval()(images))
    assert list(outputs[0]) == ["block1", "block2", "relu", "pool"]
    for exact, low in zip(outputs[0].values(), outputs[1].values(), strict=True):
        assert low.dtype == torch.float32
        assert 0 < (exact - low).abs().max() < 0.1 * exact.abs().max()
