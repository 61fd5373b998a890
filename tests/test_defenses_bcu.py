from dataclasses import replace

import pytest
import torch
from test_defenses import QUICK, make_backbone, make_data
from torch import nn

from unbackdoor.backbones import Backbone, network_state
from unbackdoor.defenses.bcu import (
    cleanse,
    feature_distance,
    layer_groups,
    redraw,
    soft_label_distance,
)
from unbackdoor.errors import ArchitectureError


def test_a_share_of_the_weights_is_drawn_anew_and_the_others_stay(generator):
    layer = nn.Conv2d(4, 10, 5)
    before = layer.weight.detach().clone()
    redraw(layer, 0.27, generator=generator)
    changed = layer.weight != before
    assert changed.sum() == 270
    assert layer.weight[changed].abs().max() <= 1 / (4 * 25) ** 0.5
    redraw(layer, 0.0, generator=generator)
    assert (layer.weight != before).equal(changed)


def test_in_a_resnet18_the_groups_are_the_stem_and_about_the_stages():
    groups = layer_groups(make_backbone("cifar/resnet18"), make_data(16).images)
    assert [len(group) for group in groups] == [1, 5, 5, 4, 5]
    assert groups[0][0].in_channels == 3
    assert all(layer.out_channels == 512 for layer in groups[4])


def test_the_features_distance_is_in_units_of_the_teachers_variance(generator):
    teacher, student = (torch.randn(6, 4, generator=generator) for _ in range(2))
    expected = (student - teacher).pow(2).mean() / teacher.var(0).mean()
    torch.testing.assert_close(feature_distance(student, teacher), expected)
    torch.testing.assert_close(feature_distance(7 * student, 7 * teacher), expected)


def test_the_soft_label_distance_is_the_divergence_in_loops(generator):
    student, teacher = (torch.randn(3, 4, generator=generator) for _ in range(2))
    p, q = (logits / 2.5 for logits in (teacher, student))
    expected = 0.0
    for row in range(3):
        a = [float(value) for value in p[row].exp() / p[row].exp().sum()]
        b = [float(value) for value in q[row].exp() / q[row].exp().sum()]
        logs = (torch.tensor(x / y).log() for x, y in zip(a, b, strict=True))
        expected += sum(x * float(log) for x, log in zip(a, logs, strict=True)) / 3
    found = soft_label_distance(student, teacher, temperature=2.5)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_features_leave_the_head_alone_and_logits_tune_it():
    backbone, data = make_backbone("cifar/wrn16_1"), make_data(16)
    head = network_state(backbone)["fc.weight"]
    by_features, by_logits = (
        network_state(cleanse(backbone, data, replace(QUICK["bcu"], match=match)).backbone)
        for match in ("features", "logits")
    )
    assert by_features["fc.weight"].equal(head)
    assert not by_logits["fc.weight"].equal(head)


def test_logits_without_a_head_are_refused():
    body = make_backbone("cifar/wrn16_1").body
    headless = Backbone(body, mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    with pytest.raises(ArchitectureError, match="--set match=features"):
        cleanse(headless, make_data(16), replace(QUICK["bcu"], match="logits"))
