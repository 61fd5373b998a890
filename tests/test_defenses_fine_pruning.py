import copy
from dataclasses import replace

import pytest
import torch
from test_defenses import ONE, QUICK, features, make_backbone, make_data, with_its_own_labels

from unbackdoor.defenses.common import accuracy, copy_of, split_off
from unbackdoor.defenses.fine_pruning import (
    dormant_first,
    fine_prune,
    mean_activations,
    prune_while_kept,
)
from unbackdoor.defenses.settings import FinePruningSettings
from unbackdoor.defenses.stages import find_stage, find_writers, map_of, prune

SETTINGS = FinePruningSettings(kept=0.8, held_out=0.5, tuning=ONE)


@pytest.fixture
def backbone():
    return make_backbone("cifar/wrn16_1")


@pytest.fixture
def data(backbone):
    """Images that the backbone is right about, so that its accuracy can fall."""
    return with_its_own_labels(backbone, make_data(16, count=60))


def test_channels_are_ranked_by_their_mean_activation(backbone, data):
    stage = find_stage(backbone, data.images)
    means = mean_activations(backbone, stage, data.images)
    naive = torch.stack(
        [map_of(backbone, stage, image[None]).mean((0, 2, 3)) for image in data.images]
    ).mean(0)
    torch.testing.assert_close(means, naive)
    order = dormant_first(means)
    assert means[order].diff().min() >= 0


def test_a_channel_far_below_0_is_not_dormant():
    backbone, images = make_backbone("timm/test_vit"), make_data(160, count=4).images
    stage = find_stage(backbone, images)  # a normalization: outputs of both signs
    output = map_of(backbone, stage, images).movedim(stage.axis, -1).flatten(0, -2)
    means = mean_activations(backbone, stage, images)
    torch.testing.assert_close(means, output.abs().mean(0))
    assert not means.allclose(output.mean(0).abs(), rtol=0.1)


def test_the_last_state_that_met_the_rule_is_kept_and_the_next_would_break_it(backbone, data):
    split = split_off(data.images, data.labels, held_out=0.5, seed=0)
    assert accuracy(backbone, split.held_images, split.held_labels) == 1
    stage = find_stage(backbone, data.images)
    writers = find_writers(backbone, stage, data.images)
    order = dormant_first(mean_activations(backbone, stage, split.images))
    victim = copy_of(backbone, "cpu")
    pruned, chosen = prune_while_kept(victim, writers, order, split, SETTINGS)

    count = chosen["pruned"]
    assert 0 < count < 63
    reached = accuracy(pruned, split.held_images, split.held_labels)
    assert reached == chosen["held_out_accuracy_pruned"] >= 0.8
    for channels, kept in ((order[:count], True), (order[: count + 1], False)):
        again = copy.deepcopy(backbone)
        prune(again, writers, channels)
        assert (accuracy(again, split.held_images, split.held_labels) >= 0.8) is kept
    assert chosen["held_out_accuracy_refused"] < 0.8


def test_the_backbones_features_change_and_its_silent_channels_stay_silent(backbone, data):
    result = fine_prune(backbone, data, SETTINGS)
    silent = result.log["silent"]
    assert len(silent) == result.log["pruned"] > 0
    before, after = features(backbone, data), features(result.backbone, data)
    assert before[:, silent].any()  # else there was nothing to prune
    assert not after[:, silent].any()
    others = [channel for channel in range(64) if channel not in silent]
    assert after[:, others].any()


@pytest.mark.parametrize(
    ("arch", "size", "writers"),
    [("cifar/resnet18", 16, 3), ("timm/test_vit", 160, 1)],  # without a ReLU, tuning would revive
)
def test_silent_channels_stay_silent_through_the_tuning(arch, size, writers):
    backbone = make_backbone(arch)
    data = with_its_own_labels(backbone, make_data(size, count=20))
    result = fine_prune(backbone, data, replace(SETTINGS, kept=0.0, per_check=30))
    silent = result.log["silent"]
    assert len(result.log["writers"]) == writers
    assert len(silent) >= 30
    assert features(backbone, data)[:, silent].any()
    assert not features(result.backbone, data)[:, silent].any()


def test_with_all_accuracy_to_be_kept_and_none_to_spare_little_is_pruned(backbone, data):
    strict = fine_prune(backbone, data, replace(SETTINGS, kept=1.0)).log["pruned"]
    loose = fine_prune(backbone, data, replace(SETTINGS, kept=0.5)).log["pruned"]
    assert strict < loose


@pytest.mark.parametrize("per_check", [1, 51])
def test_no_more_channels_are_pruned_than_may_be(per_check, backbone, data):
    """The authors' code for faces prunes four fifths of them, whatever that costs."""
    settings = replace(SETTINGS, kept=0.0, per_check=per_check, most=0.8)
    assert fine_prune(backbone, data, settings).log["pruned"] == 51


@pytest.mark.parametrize("per_check", [1, 60, 64])
def test_one_channel_always_stays(per_check, backbone, data):
    settings = replace(SETTINGS, kept=0.0, per_check=per_check)
    assert fine_prune(backbone, data, settings).log["pruned"] == 63


def test_a_stage_can_be_named():
    backbone, data = make_backbone("cifar/wrn16_1"), make_data(16)
    log = fine_prune(backbone, data, replace(QUICK["fine-pruning"], stage="block3.layer.1.bn2")).log
    assert log["stage"] == "block3.layer.1.bn2"
    assert log["writers"] == ["block3.layer.1.bn2"]
