import importlib.resources
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_defenses import features, make_backbone, make_data
from torch import nn

from unbackdoor.backbones import Source, open_backbone
from unbackdoor.defenses.clp import find_pairs, lipschitz_bounds, outliers, prune_by_lipschitz
from unbackdoor.defenses.common import DefenseData
from unbackdoor.defenses.settings import ClpSettings
from unbackdoor.demo import CLASSES, split_images
from unbackdoor.evaluation import find_attack
from unbackdoor.metrics import make_test_set, read


def test_a_channels_bound_is_numpys_largest_singular_value_times_its_scale():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        convolution, norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
        nn.init.normal_(norm.weight)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    bounds = lipschitz_bounds(convolution, norm)
    for channel in range(5):
        kernel = convolution.weight[channel].detach().numpy().reshape(3, 9)
        singular = np.linalg.svd(kernel, compute_uv=False)[0]
        deviation = np.sqrt(norm.running_var[channel].item() + norm.eps)
        expected = singular * abs(norm.weight[channel].item()) / deviation
        np.testing.assert_allclose(bounds[channel].item(), expected, rtol=1e-5)


def test_outliers_stand_above_the_mean_by_so_many_deviations():
    bounds = torch.tensor([1.0] * 20 + [10.0])
    assert outliers(bounds, deviations=3).tolist() == [20]
    assert outliers(bounds, deviations=5).tolist() == []
    assert outliers(-bounds, deviations=3).tolist() == []  # small ones never do


def test_a_convolution_is_paired_with_the_batch_norm_that_its_output_enters():
    size = torch.Size((16, 16))
    wide = find_pairs(make_backbone("cifar/wrn16_1"), size)
    assert wide[0] == ("conv1", "block1.layer.0.bn1")
    assert wide[1:] == [
        (f"block{block}.layer.{i}.conv1", f"block{block}.layer.{i}.bn2")
        for block in (1, 2, 3)
        for i in (0, 1)
    ]
    plain = find_pairs(make_backbone("cifar/resnet18"), size)
    assert ("layer4.0.downsample.0", "layer4.0.downsample.1") in plain
    assert len(plain) == 20


def test_a_planted_outlier_is_found_and_emits_nothing_afterwards():
    backbone, data = make_backbone("cifar/wrn16_1"), make_data(16)
    with torch.no_grad():
        backbone.body.get_submodule("block3.layer.1.conv1").weight[7] *= 50
    result = prune_by_lipschitz(backbone, DefenseData(data.images), ClpSettings())
    assert 7 in result.log["pruned"]["block3.layer.1.bn2"]
    norm = result.backbone.body.get_submodule("block3.layer.1.bn2")
    assert norm.weight[7] == norm.bias[7] == 0
    assert not features(result.backbone, data).allclose(features(backbone, data))


def test_without_outliers_nothing_changes():
    backbone, data = make_backbone("cifar/wrn16_1"), make_data(16)
    result = prune_by_lipschitz(backbone, data, ClpSettings(deviations=100))
    assert result.log["pruned"] == {}
    torch.testing.assert_close(result.backbone.state_dict(), backbone.state_dict(), rtol=0, atol=0)


@pytest.mark.slow
def test_the_shipped_victim_loses_its_backdoor_durably_and_a_control_keeps_it():
    assets = importlib.resources.files("unbackdoor") / "assets"
    record = json.loads((assets / "demo_victim.json").read_text())
    splits = split_images(0)
    size = splits.test.images.shape[-1]
    attack = find_attack(str(assets / "demo_victim.json"), size=size).attack
    test = make_test_set(splits.test.images, splits.test.labels, attack, classes=CLASSES)
    source = Source(
        Path(str(assets / "demo_victim.safetensors")),
        record["arch"],
        tuple(record["mean"]),
        tuple(record["std"]),
        size=size,
    )
    victim = open_backbone(source).backbone
    data = DefenseData(splits.unlabeled)

    def scored(deviations):
        repaired = prune_by_lipschitz(victim, data, ClpSettings(deviations=deviations)).backbone
        return read(repaired, repaired.heads[0], splits.probe, test, plain=splits.unlabeled)

    control, defended = scored(100), scored(3)
    assert control.head.asr > 0.99  # the victim is backdoored, and pruning nothing leaves it so
    assert defended.head.asr < 0.2
    assert defended.worst.asr < 0.2 < control.worst.asr
    assert defended.head.acc > control.head.acc - 0.03
