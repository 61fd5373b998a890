import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from unbackdoor.backbones import (
    Backbone,
    Source,
    build,
    describe_input,
    describe_pixels,
    import_function,
    load_backbone,
    network_state,
    open_backbone,
)
from unbackdoor.errors import ArchitectureError, CheckpointError, MismatchError, SettingsError
from unbackdoor.networks import SMALL_NETWORKS

torch.set_num_threads(1)

OWN_FILE = """
from torch import nn

def network(classes=10):
    net = nn.Sequential()
    net.add_module("conv", nn.Conv2d(3, 8, 3, stride=4))
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flatten", nn.Flatten())
    net.add_module("fc", nn.Linear(8, classes))
    net.mean, net.std, net.size = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), 32
    return net

def fixed():
    return network()

def labelled(classes=10):
    net = network()
    del net.fc
    net.add_module("labels", nn.Linear(8, classes))
    return net

def wrapped():
    outer = nn.Module()
    outer.net = network()
    return outer

def silent():
    net = network()
    del net.mean
    return net

def projected():
    net = network()
    net.add_module("projection", nn.Linear(10, 4))
    return net

def tokens():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(2))
    net.mean, net.std, net.size = (0.5,) * 3, (0.5,) * 3, 32
    return net

def constant():
    net = network()
    nn.init.zeros_(net.conv.weight)
    return net

class Fused(nn.Module):
    mean, std, size = (0.5,) * 3, (0.5,) * 3, 32

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 10)

    def forward(self, images):
        return images.mean((2, 3)) @ self.fc.weight.T + self.fc.bias

def crashing():
    raise KeyError("width")

number = 3

def not_a_network():
    return "resnet18"

def lazy():
    return nn.Sequential(nn.LazyLinear(3))

class quantized(nn.Module):
    def get_extra_state(self):
        return {}
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN_FILE)
    return path


def filled(network: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every tensor at random, batch-norm statistics too, so that no two are alike."""
    generator = torch.Generator().manual_seed(seed)
    for value in network.state_dict().values():
        if value.is_floating_point():
            draw = torch.rand(value.shape, generator=generator)
            fan_in = value[0].numel() if value.ndim > 1 else 1
            value.copy_((draw - 0.5) * (12 / fan_in) ** 0.5 if fan_in > 1 else 0.5 + draw)
    return network.eval()


def saved(network: nn.Module, folder: Path, *, without: tuple[str, ...] = ()) -> Path:
    path = folder / "network.safetensors"
    state = network.state_dict()
    save_file({k: v for k, v in state.items() if not k.startswith(without)}, path)
    return path


def noise(size: int) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))


# Heads


@pytest.mark.parametrize(
    ("arch", "heads", "dimension"),
    [
        ("resnet18", ("fc",), 512),
        ("timm/resnet18.a1_in1k", ("fc",), 512),
        ("convnext_tiny", ("head.fc",), 768),
        ("vit_small_patch16_224", ("head",), 384),
        ("deit_tiny_distilled_patch16_224", ("head", "head_dist"), 192),
        ("vit_small_patch14_dinov2", ("head",), 384),
        ("resnetv2_50x1_bit", ("head.fc",), 2048),
        pytest.param("sequencer2d_s", ("head.fc",), 384, marks=pytest.mark.slow),
        ("inception_v3", ("fc",), 2048),
        ("torchvision/resnet18", ("fc",), 512),
        ("torchvision/vgg11", ("classifier.6",), 4096),
        ("torchvision/densenet121", ("classifier",), 1024),
        ("torchvision/mobilenet_v3_small", ("classifier.3",), 1024),
        ("torchvision/efficientnet_b0", ("classifier.1",), 1280),
        ("torchvision/convnext_tiny", ("classifier.2",), 768),
        ("torchvision/vit_b_16", ("heads.head",), 768),
        ("torchvision/swin_t", ("head",), 768),
        ("torchvision/squeezenet1_1", ("classifier.1",), 512),
        ("torchvision/googlenet", ("fc",), 1024),
        ("torchvision/inception_v3", ("fc",), 2048),
        ("cifar/preact_resnet18", ("linear",), 512),
        ("cifar/wrn16_1", ("fc",), 64),
    ],
)
def test_the_head_is_found_and_its_removal_leaves_one_feature_vector_per_image(
    arch, heads, dimension
):
    with torch.device("meta"):
        network, found, mean, std, size = build(arch)
        backbone = Backbone(network, found, mean=mean, std=std).eval()
        assert found == heads
        assert backbone(torch.empty(2, 3, size, size)).shape == (2, dimension)


@pytest.mark.parametrize(
    ("arch", "classes"),
    [("test_vit", 5), ("torchvision/resnet18", 5), ("cifar/wrn16_1", 5), ("test_resnet", None)],
)
def test_the_number_of_classes_is_the_callers_or_the_architectures(arch, classes):
    with torch.device("meta"):
        architecture = build(arch, classes=classes)
    head = architecture.network.get_submodule(architecture.heads[0])
    assert head.out_features == (classes or 1000)


# Loading: the checkpoint decides


@pytest.mark.parametrize(
    "arch",
    [
        *("test_resnet", "test_convnext", "test_vit", "test_efficientnet", "levit_128s"),
        *("deit_tiny_distilled_patch16_224", "torchvision/squeezenet1_1"),
        "torchvision/regnet_y_400mf",
        *(f"cifar/{name}" for name in SMALL_NETWORKS if name != "wrn28_10"),
    ],
)
def test_body_and_heads_say_and_hold_bit_for_bit_what_the_network_did(arch, tmp_path):
    network, _, mean, std, size = build(arch, classes=7)
    filled(network)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    loaded = open_backbone(Source(saved(network, tmp_path), arch))

    images = noise(size)
    channels = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    normalized = (images - next(channels)) / next(channels)
    with torch.no_grad():
        expected = network(normalized)
        assert loaded.backbone.logits(images).equal(expected)
        assert loaded.backbone(images).shape == (2, loaded.dimension)
        assert loaded.backbone(images).shape != expected.shape

    returned = network_state(loaded.backbone)
    assert returned.keys() == state.keys()
    assert all(returned[key].equal(state[key]) for key in state)


def test_classify_gives_the_logits_of_features_at_hand(tmp_path):
    network = filled(build("test_resnet", classes=7).network)
    backbone = load_backbone(saved(network, tmp_path), "test_resnet")
    with torch.no_grad():
        logits = backbone.classify(backbone(noise(64)))
        assert logits.equal(backbone.logits(noise(64)))


@pytest.mark.parametrize("arch", ["deit_tiny_distilled_patch16_224", "torchvision/squeezenet1_1"])
def test_classify_is_refused_where_it_would_differ_from_the_network(arch):
    with torch.device("meta"):
        network, heads, mean, std, _ = build(arch)
        backbone = Backbone(network, heads, mean=mean, std=std)
        with pytest.raises(ArchitectureError, match="is not one linear layer; call logits"):
            backbone.classify(torch.empty(2, 192))


def test_a_backbone_is_loaded_in_eval_mode_on_a_path_given_as_text(tmp_path):
    path = saved(filled(build("test_resnet").network), tmp_path)
    backbone = load_backbone(str(path), "test_resnet")
    assert not any(module.training for module in backbone.body.modules() if list(module.buffers()))


@pytest.mark.parametrize("arch", ["test_resnet", "test_convnext", "test_vit", "cifar/wrn16_1"])
def test_a_checkpoint_without_a_head_gives_a_backbone_without_one(arch, tmp_path):
    network, heads, _, _, size = build(arch)
    path = saved(filled(network), tmp_path, without=tuple(f"{name}." for name in heads))
    backbone = load_backbone(path, arch)
    assert len(backbone.heads) == 0
    assert backbone(noise(size)).ndim == 2
    assert network_state(backbone).keys() == {
        key for key in network.state_dict() if not key.startswith(f"{heads[0]}.")
    }
    with pytest.raises(ArchitectureError, match="has no head and so no logits; train a probe"):
        backbone.logits(noise(size))


@pytest.mark.parametrize("head", ["without a bias", "of another width"])
def test_a_head_that_does_not_fit_is_left_over(tmp_path, head):
    network = filled(build("cifar/wrn16_1").network)
    tensors = dict(network.state_dict())
    if head == "without a bias":
        del tensors["fc.bias"]
    else:
        tensors |= {"fc.weight": torch.ones(7, 128), "fc.bias": torch.ones(7)}
    save_file(tensors, tmp_path / "x.safetensors")
    loaded = open_backbone(Source(tmp_path / "x.safetensors", "cifar/wrn16_1"))
    assert loaded.match.head == loaded.backbone.head_names == ()
    assert set(loaded.match.left_over) == {key for key in tensors if key.startswith("fc.")}
    whole = load_backbone(saved(network, tmp_path), "cifar/wrn16_1")
    images = noise(32)
    with torch.no_grad():
        assert loaded.backbone(images).equal(whole(images))


def test_a_config_says_which_images_a_network_takes_and_what_it_is(tmp_path):
    save_file(filled(build("test_resnet").network).state_dict(), tmp_path / "model.safetensors")
    pixels = {"mean": [0.25] * 3, "std": [0.5] * 3, "input_size": [3, 96, 96]}
    config = {"architecture": "test_resnet2", "pretrained_cfg": pixels}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source, said = Source(tmp_path, "test_resnet.r160_in1k"), []
    loaded = open_backbone(source)
    assert describe_pixels(loaded) == {"mean": [0.25] * 3, "std": [0.5] * 3, "size": 96}
    describe_input(source, loaded, say=said.append)
    assert said[0] == (
        "warning: its config.json names the architecture 'test_resnet2', not "
        "'test_resnet.r160_in1k'"
    )
    pixels = {"input_size": [3, 10**6, 10**6]}  # more than there is memory for
    config = {"architecture": "test_resnet.x", "pretrained_cfg": pixels}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for arch in ("test_resnet", "timm/test_resnet"):
        said.clear()
        same = replace(source, arch=arch)
        loaded = open_backbone(same)
        describe_input(same, loaded, say=said.append)
        assert not said[0].startswith("warning")
        assert loaded.size == 160


def test_a_model_of_transformers_is_told_from_one_of_timm(tmp_path):
    save_file({"vit.embeddings.cls_token": torch.ones(1, 1, 8)}, tmp_path / "model.safetensors")
    config = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MismatchError, match=r"model of transformers, .* wrap the model in path"):
        load_backbone(tmp_path, "test_vit")


def test_the_wrong_architecture_is_a_mismatch(tmp_path):
    path = saved(filled(build("cifar/wrn16_1").network), tmp_path)
    with pytest.raises(MismatchError, match=r"block1\.layer\.0\.conv1\.weight"):
        load_backbone(path, "cifar/wrn16_2")


def test_a_mismatch_mentions_a_config_that_names_another_architecture(tmp_path):
    save_file(filled(build("test_resnet").network).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_resnet"}))
    with pytest.raises(MismatchError, match=r"architecture 'test_resnet', --arch 'test_vit'"):
        load_backbone(tmp_path, "test_vit")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    network = filled(build("cifar/wrn16_1").network)
    nn.init.constant_(network.conv1.weight, torch.nan)
    with pytest.raises(CheckpointError, match="yields NaN or infinite features"):
        load_backbone(saved(network, tmp_path), "cifar/wrn16_1")


def as_published(key: str) -> str:
    """Return the name that ConvNeXt's authors gave to what timm calls ``key``."""
    for ours, theirs in (
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
        (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
        ("conv_dw", "dwconv"),
        (r"mlp\.fc", "pwconv"),
        (r"^head\.norm", "norm"),
        (r"^head\.fc", "head"),
    ):
        key = re.sub(ours, theirs, key)
    return key


@pytest.mark.parametrize("prefix", ["", "module.encoder."])
def test_a_file_with_its_authors_names_is_read_as_timm_would(tmp_path, prefix):
    network = filled(build("test_convnext", classes=7).network)
    published = {prefix + as_published(k): v for k, v in network.state_dict().items()}
    assert f"{prefix}downsample_layers.1.0.weight" in published
    path = tmp_path / "published.pth"
    torch.save({"model": published}, path)
    loaded = open_backbone(Source(path, "test_convnext"))
    assert loaded.match.left_over == ()
    assert set(loaded.match.keys.values()) == set(published)
    images = noise(64)
    with torch.no_grad():
        assert loaded.backbone.logits(images).equal(network((images - 0.5) / 0.5))


def test_what_timm_would_change_beyond_names_is_a_mismatch(tmp_path):
    tensors = filled(build("test_vit").network).state_dict()
    tensors["patch_embed.proj.weight"] = tensors["patch_embed.proj.weight"].flatten(1)
    save_file(tensors, tmp_path / "flat.safetensors")
    with pytest.raises(MismatchError, match=r"patch_embed\.proj\.weight +64x3x16x16"):
        load_backbone(tmp_path / "flat.safetensors", "test_vit")


@pytest.mark.parametrize(("side", "asked"), [(32, True), (33, False)])
def test_timm_is_not_asked_to_resample_a_kernel_of_any_size(tmp_path, monkeypatch, side, asked):
    """It would take memory that grows with the fourth power of the side."""
    calls = []
    tensors = filled(build("test_vit").network).state_dict()
    tensors["patch_embed.proj.weight"] = torch.zeros(1, 1, side, side)
    save_file(tensors, tmp_path / "x.safetensors")
    monkeypatch.setattr(
        "timm.models.vision_transformer.checkpoint_filter_fn",
        lambda tensors, network: calls.extend(tensors.values()) or {},
    )
    with pytest.raises(MismatchError):
        load_backbone(tmp_path / "x.safetensors", "test_vit")
    assert any(tensor.shape[2:] == (side, side) for tensor in calls) == asked


def test_what_timm_stumbles_on_is_a_mismatch(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"state_dict": torch.ones(3)}, path)  # timm takes the tensor for the dictionary
    with pytest.raises(MismatchError):
        load_backbone(path, "starnet_s1")


def test_whole_numbers_in_place_of_weights_are_refused(tmp_path):
    state = build("cifar/wrn16_1").network.state_dict()
    state["fc.weight"] = torch.ones_like(state["fc.weight"], dtype=torch.int8)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"fc\.weight is of torch\.int8; quantized weights"):
        load_backbone(tmp_path / "x.safetensors", "cifar/wrn16_1")


def test_images_that_no_memory_holds_are_refused(tmp_path):
    path = saved(filled(build("cifar/wrn16_1").network), tmp_path)
    for size in (10**7, 10**10):
        with pytest.raises(SettingsError, match="do not fit into memory; pass a smaller --size"):
            load_backbone(path, "cifar/wrn16_1", size=size)


def test_what_timm_changes_in_place_is_a_mismatch(tmp_path, monkeypatch):
    def convert(tensors, network):
        tensors["first"] += 1
        return {**tensors, "stem.0.weight": tensors["first"]}

    tensors = filled(build("test_convnext").network).state_dict()
    tensors["first"] = tensors.pop("stem.0.weight")
    save_file(tensors, tmp_path / "x.safetensors")
    monkeypatch.setattr("timm.models.convnext.checkpoint_filter_fn", convert)
    with pytest.raises(MismatchError, match=r"stem\.0\.weight +24x3x4x4 +absent"):
        load_backbone(tmp_path / "x.safetensors", "test_convnext")


# Normalization and size


def test_normalization_is_the_architectures_unless_a_config_or_the_caller_says_otherwise(tmp_path):
    save_file(filled(build("test_resnet").network).state_dict(), tmp_path / "model.safetensors")
    assert load_backbone(tmp_path, "test_resnet").mean.flatten().tolist() == [0.5, 0.5, 0.5]

    config = {"pretrained_cfg": {"mean": [0.25, 0.25, 0.25], "std": [0.75, 0.75, 0.75]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    backbone = load_backbone(tmp_path, "test_resnet")
    assert backbone.mean.flatten().tolist() == [0.25, 0.25, 0.25]
    assert backbone.std.flatten().tolist() == [0.75, 0.75, 0.75]

    backbone = load_backbone(tmp_path, "test_resnet", mean=(0, 0, 0), std=(1, 1, 1))
    images = noise(64)
    with torch.no_grad():
        assert backbone(images).equal(backbone.body(images))


@pytest.mark.parametrize(
    ("arch", "mean"),
    [
        ("cifar/resnet18", (0.4914, 0.4822, 0.4465)),
        ("torchvision/resnet18", (0.485, 0.456, 0.406)),
        ("torchvision/inception_v3", (0.5, 0.5, 0.5)),
        ("vit_tiny_patch16_224", (0.5, 0.5, 0.5)),
        ("vit_base_patch16_clip_224.openai", (0.48145466, 0.4578275, 0.40821073)),
    ],
)
def test_each_architecture_knows_its_normalization(arch, mean):
    with torch.device("meta"):
        assert build(arch).mean == mean


def test_inception_without_its_input_transform_equals_torchvisions_with_it():
    network, _, mean, std, _ = build("torchvision/inception_v3", classes=5)
    filled(network)
    images = noise(96)
    imagenet = torchvision.models.Inception_V3_Weights.DEFAULT.transforms()
    with torch.no_grad():
        ours = Backbone(network, mean=mean, std=std).eval()(images)
        network.transform_input = True
        theirs = Backbone(network, mean=imagenet.mean, std=imagenet.std).eval()(images)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((123.675, 116.28, 103.53), (0.2, 0.2, 0.2), r"mean is on the \[0, 1\] scale, got 123.675"),
        ((0.5, 0.5, 0.5), (58.4, 57.1, 57.4), r"std is on the \[0, 1\] scale, got 58.4; divide"),
        ((0.5, 0.5, 0.5), (0.2, 0, 0.2), "std must be positive, got 0"),
        ((0.5, 0.5, 0.5), (0.2,), "mean has 3 channels but std has 1"),
        ((float("nan"),), (0.2,), "got nan"),
    ],
)
def test_normalization_off_the_unit_scale_is_refused(mean, std, message):
    with pytest.raises(SettingsError, match=message):
        Backbone(nn.Identity(), mean=mean, std=std)


def test_a_network_of_fixed_size_refuses_another(tmp_path):
    path = saved(filled(build("test_vit3").network), tmp_path)
    with pytest.raises(ArchitectureError, match=r"test_vit3 without head fails on 32-.*height"):
        load_backbone(path, "test_vit3", size=32)


@pytest.mark.parametrize("size", [0, -3])
def test_a_size_that_no_image_has_is_refused(size, tmp_path):
    with pytest.raises(SettingsError, match=f"size is in pixels, at least 1, got {size}"):
        load_backbone(tmp_path / "none.pt", "test_resnet", size=size)


# Names


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("resnet81", "arch 'resnet81' is unknown; did you mean 'resnet18'?"),
        ("resnet18.a9_in1k", "did you mean 'resnet18.a3_in1k'?"),
        ("torchvision/resnet81", "did you mean 'torchvision/resnet18'?"),
        ("torchvision/fcn_resnet50", "did you mean 'torchvision/"),
        ("cifar/wrn_16_1", "did you mean 'cifar/wrn16_1'?"),
        ("hf-hub:timm/resnet18", "is unknown"),
        ("???", "pass a timm name, torchvision/NAME, cifar/NAME or path/to/file.py:function"),
        ("nowhere/net.py", "name the function that builds it, nowhere/net.py:FUNCTION"),
        ("nowhere/net.py:network", "nowhere/net.py: no such file"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(arch, message):
    with pytest.raises(ArchitectureError) as refusal:
        build(arch)
    assert message in str(refusal.value)


def test_nothing_is_downloaded_for_an_architecture_with_published_weights(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("went to the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    build("test_resnet.r160_in1k")
    build("torchvision/squeezenet1_1")


# The user's own network


def test_a_users_own_network_gets_its_classes_from_the_checkpoint(own, tmp_path):
    arch = f"{own}:network"
    network = filled(build(arch, classes=3).network)
    loaded = open_backbone(Source(saved(network, tmp_path), arch))
    assert loaded.backbone.heads[0].out_features == 3
    assert (loaded.size, loaded.dimension) == (32, 8)
    torch.testing.assert_close(loaded.backbone.mean.flatten(), torch.tensor([0.5, 0.4, 0.3]))


def test_a_users_network_with_a_fixed_head_of_another_size_is_a_mismatch(own, tmp_path):
    path = saved(filled(build(f"{own}:network", classes=3).network), tmp_path)
    with pytest.raises(MismatchError, match=r"fc\.weight"):
        load_backbone(path, f"{own}:fixed")


def test_a_users_network_must_say_how_it_normalizes(own, tmp_path):
    path = saved(filled(build(f"{own}:network").network), tmp_path)
    with pytest.raises(ArchitectureError, match="--mean 0 0 0 --std 1 1 1 means no normalization"):
        load_backbone(path, f"{own}:silent")
    load_backbone(path, f"{own}:silent", mean=(0, 0, 0))


def test_a_head_that_cannot_be_cut_off_is_refused_with_the_way_out(own, tmp_path):
    arch = f"{own}:Fused"
    path = saved(filled(build(arch).network), tmp_path)
    with pytest.raises(ArchitectureError, match=r"Fused without fc fails.* --head none takes"):
        load_backbone(path, arch)
    assert open_backbone(Source(path, arch, head="none")).dimension == 10


def test_classes_are_counted_whatever_head_is_asked_for(tmp_path):
    path = saved(filled(build("cifar/wrn16_1", classes=3).network), tmp_path)
    loaded = open_backbone(Source(path, "cifar/wrn16_1", head="none"))
    assert (loaded.dimension, len(loaded.backbone.heads), loaded.match.head) == (3, 0, ())
    loaded = open_backbone(Source(path, "cifar/wrn16_1", head="fc"))
    assert (loaded.dimension, loaded.backbone.heads[0].out_features) == (64, 3)


def test_classes_are_counted_by_a_head_of_another_name(own, tmp_path):
    arch = f"{own}:labelled"
    path = saved(filled(build(arch, classes=3).network), tmp_path)
    loaded = open_backbone(Source(path, arch, head="labels"))
    assert (loaded.dimension, loaded.backbone.heads[0].out_features) == (8, 3)


@pytest.mark.parametrize("larger", ["resnet34", "seresnet18"])
def test_a_larger_network_is_not_purified_as_a_smaller_one(larger, tmp_path):
    path = saved(build(larger).network, tmp_path)
    with pytest.raises(MismatchError, match=r"holds \d+ weights that the network lacks, inside"):
        load_backbone(path, "resnet18")


def test_what_is_not_finite_is_named(tmp_path):
    network = filled(build("cifar/wrn16_1", classes=3).network)
    with torch.no_grad():
        network.conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"there are such values in conv1\.weight$"):
        load_backbone(saved(network, tmp_path), "cifar/wrn16_1")


def test_mnasnet_is_refused_before_anything_is_computed():
    with pytest.raises(ArchitectureError, match="says which version it is of"):
        build("torchvision/mnasnet0_5")


def test_a_network_for_grey_images_is_refused_since_all_images_are_rgb(tmp_path):
    path = tmp_path / "grey.py"
    path.write_text(
        "from torch import nn\n"
        "def network():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AvgPool2d(30), nn.Flatten())\n"
    )
    checkpoint = saved(filled(build(f"{path}:network").network), tmp_path)
    with pytest.raises(ArchitectureError, match=r"fails on 32-pixel RGB images: .*1 channel"):
        load_backbone(checkpoint, f"{path}:network", mean=(0.5,), std=(0.5,), size=32)


def test_a_last_layer_of_another_name_is_no_head_unless_it_is_named(own):
    arch = f"{own}:projected"
    assert build(arch).heads == ()
    assert build(arch, head="projection").heads == ("projection",)
    assert build(f"{own}:network").heads == ("fc",)
    assert build(f"{own}:wrapped").heads == ("net.fc",)
    assert build(f"{own}:network", head="none").heads == ()
    with pytest.raises(ArchitectureError, match="no module 'projektion'; it has projection"):
        build(arch, head="projektion")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("netwrok", "has no function 'netwrok'; it has network, fixed"),
        ("number", "has no function 'number'"),
        ("crashing", r"crashing fails: KeyError: 'width'"),
        ("not_a_network", "returns a str, not a torch.nn.Module"),
        ("lazy", r"a network whose 0\.weight has no shape yet; run it once on an image"),
        ("quantized", "a network whose _extra_state is a dict and no tensor, .*not supported"),
    ],
)
def test_a_users_function_that_builds_no_network_is_refused(own, function, message):
    with pytest.raises(ArchitectureError, match=message):
        build(f"{own}:{function}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import no_such_module_anywhere", "no_such_module_anywhere.*PYTHONPATH"),
        ("raise SystemExit(2)", "fails: SystemExit: 2"),
        ("def broken(:", "fails: SyntaxError"),
    ],
)
def test_a_users_file_that_fails_is_refused_with_the_cause(tmp_path, line, message):
    path = tmp_path / "failing.py"
    path.write_text(line)
    with pytest.raises(ArchitectureError, match=message):
        build(f"{path}:network")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("tokens", r"features are \(n, d\) or \(n, d, h, w\), the network's: \(2, 8, 900\)"),
        ("constant", "yields no usable features"),
    ],
)
def test_a_network_without_usable_features_is_refused(own, tmp_path, function, message):
    arch = f"{own}:{function}"
    path = saved(build(arch).network, tmp_path)
    with pytest.raises(ArchitectureError, match=message):
        load_backbone(path, arch)


def test_a_network_that_returns_several_values_is_refused():
    class Pair(nn.Module):
        def forward(self, images):
            return images, images

    with pytest.raises(ArchitectureError, match="returns a tuple, not one tensor of features"):
        Backbone(Pair(), mean=(0,), std=(1,))(noise(4))


def test_maps_of_features_are_pooled_over_space():
    images = noise(4)
    features = Backbone(nn.Identity(), mean=(0, 0, 0), std=(1, 1, 1))(images)
    torch.testing.assert_close(features, images.flatten(2).mean(2))


def test_logits_leave_the_backbone_as_it_was_even_after_a_failure():
    network, heads, mean, std, _ = build("test_vit3")
    backbone = Backbone(network, heads, mean=mean, std=std)
    keys = list(backbone.state_dict())
    with pytest.raises(AssertionError, match="Input height"):
        backbone.logits(noise(32))
    assert list(backbone.state_dict()) == keys


def test_two_files_of_one_name_keep_their_own_annotations(tmp_path):
    text = "from __future__ import annotations\n{alias} = int\ndef build(width: {alias} = 1): ...\n"
    functions = []
    for folder, alias in (("a", "Width"), ("b", "Height")):
        path = tmp_path / folder / "mine.py"
        path.parent.mkdir()
        path.write_text(text.format(alias=alias))
        functions.append(import_function(path, "build"))
    modules = [sys.modules[function.__module__] for function in functions]
    assert [hasattr(module, "Width") for module in modules] == [True, False]
