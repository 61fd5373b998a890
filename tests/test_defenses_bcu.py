from dataclasses import replace

import pytest
import torch
from test_defenses import ONE, QUICK, make_backbone, make_data
from torch import nn

from unbackdoor.backbones import Backbone, network_state
from unbackdoor.defenses.bcu import (
    cleanse,
    feature_distance,
    layer_groups,
    redraw,
    soft_label_distance,
)
from unbackdoor.defenses.common import copy_of, tune
from unbackdoor.defenses.settings import BcuSettings
from unbackdoor.errors import ArchitectureError


def test_a_share_of_the_weights_is_drawn_anew_and_the_others_stay(generator):
    layer = nn.Conv2d(4, 10, 5)
    before = layer.weight.detach().clone()
    redraw(layer.weight, 0.27, generator=generator, spread="pytorch")
    changed = layer.weight != before
    assert changed.sum() == 270
    assert layer.weight[changed].abs().max() <= 1 / (4 * 25) ** 0.5
    redraw(layer.weight, 0.0, generator=generator, spread="pytorch")
    assert (layer.weight != before).equal(changed)


def test_convolutions_are_drawn_as_the_authors_network_begins(generator):
    assert BcuSettings().spread == "kaiming"
    layer, matrix = nn.Conv2d(16, 64, 5), nn.Linear(30, 40)
    redraw(layer.weight, 1.0, generator=generator, spread="kaiming")
    assert layer.weight.detach().std() == pytest.approx((2 / (64 * 25)) ** 0.5, rel=0.02)
    redraw(matrix.weight, 1.0, generator=generator, spread="kaiming")
    assert matrix.weight.abs().max() <= 1 / 30**0.5


def test_attention_that_calls_no_layers_of_its_own_is_drawn_anew_too():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 4, stride=4)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, images):
            tokens = self.stem(images).flatten(2).mT
            return self.attention(tokens, tokens, tokens)[0].mean(1)

    backbone = Backbone(Attends(), mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    still = replace(ONE, learning_rate=1e-12, weight_decay=0.0)
    settings = BcuSettings(shares=(1,) * 6, tuning=still)
    after = cleanse(backbone, make_data(16), settings).backbone.body.attention
    before = backbone.body.attention
    for name in ("in_proj_weight", "out_proj.weight"):
        assert (after.get_parameter(name) != before.get_parameter(name)).all()


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


def test_every_group_has_its_share():
    backbone, data = make_backbone("cifar/wrn16_1"), make_data(16)
    still = replace(QUICK["bcu"].tuning, learning_rate=1e-12, weight_decay=0.0)
    settings = BcuSettings(match="logits", tuning=still, seed=1)  # 0 would draw the same weights
    after = cleanse(backbone, data, settings).backbone
    names = {module: name for name, module in backbone.named_modules()}
    groups = [*layer_groups(backbone, data.images), [*backbone.heads]]
    for share, layers in zip((0.01, 0.01, 0.03, 0.09, 0.27, 0.10), groups, strict=True):
        for layer in layers:
            changed = after.get_submodule(names[layer]).weight != layer.weight
            assert changed.sum() == pytest.approx(share * changed.numel(), abs=2)


def test_soft_labels_grow_softer_by_the_epoch():
    """In the two epochs of two, the temperature is 1 + 3 / 2 and 1 + 3."""
    backbone, data = make_backbone("cifar/wrn16_1"), make_data(16)
    two = replace(ONE, epochs=2)
    settings = BcuSettings(match="logits", tuning=two)
    temperatures = iter((2.5, 2.5, 4.0, 4.0))  # two batches an epoch
    teacher, student = copy_of(backbone, "cpu"), copy_of(backbone, "cpu")
    generator = torch.Generator().manual_seed(0)
    groups = [*layer_groups(student, data.images), [*student.heads]]
    for share, layers in zip(settings.shares, groups, strict=True):
        for layer in layers:
            redraw(layer.weight, share, generator=generator, spread="kaiming")

    def loss_of(images, _):
        with torch.no_grad():
            wanted = teacher.logits(images)
        return soft_label_distance(student.logits(images), wanted, temperature=next(temperatures))

    tune(student, data.images, torch.zeros(8, dtype=torch.int64), two, seed=0, loss_of=loss_of)
    found = cleanse(backbone, data, settings).backbone
    torch.testing.assert_close(network_state(found), network_state(student))


def test_a_head_of_several_layers_is_drawn_anew_in_all_of_them():
    backbone, data = make_backbone("cifar/wrn16_1"), make_data(16)
    backbone.heads[0] = nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 3))
    still = replace(QUICK["bcu"].tuning, learning_rate=1e-12, weight_decay=0.0)
    settings = BcuSettings(shares=(0, 0, 0, 0, 0, 0.5), match="logits", tuning=still)
    head = cleanse(backbone, data, settings).backbone.heads[0]
    for layer in (0, 2):
        changed = head[layer].weight != backbone.heads[0][layer].weight
        assert changed.float().mean() == pytest.approx(0.5, abs=0.01)
    backbone.heads[0] = nn.Flatten()
    with pytest.raises(ArchitectureError, match="match=logits needs the classifier's head"):
        cleanse(backbone, data, settings)


def test_logits_without_a_head_are_refused():
    body = make_backbone("cifar/wrn16_1").body
    headless = Backbone(body, mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    with pytest.raises(ArchitectureError, match="--set match=features"):
        cleanse(headless, make_data(16), replace(QUICK["bcu"], match="logits"))
