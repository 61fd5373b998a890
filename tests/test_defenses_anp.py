import copy
from dataclasses import replace

import pytest
import torch
from test_defenses import QUICK, features, make_backbone, make_data, with_its_own_labels
from timm.layers import StdConv2d
from torch import nn
from torch.nn import functional as F  # noqa: N812

from unbackdoor.backbones import Backbone
from unbackdoor.defenses.anp import (
    Noise,
    _stepped,
    masked_loss,
    neuron_layers,
    prune_by_masks,
    prune_sensitive,
    search_masks,
)
from unbackdoor.defenses.common import copy_of, split_off
from unbackdoor.defenses.settings import AnpSettings


def test_each_step_of_the_noise_goes_its_share_and_no_further_than_the_radius():
    settings = replace(SETTINGS, epsilon=0.4, attack_steps=4)
    gradient = torch.tensor([2.0, -0.5, 0.0])
    torch.testing.assert_close(
        _stepped(torch.tensor([0.0, -0.35, 0.2]), gradient, settings),
        torch.tensor([0.1, -0.4, 0.2]),
    )
    change = torch.tensor([0.3])
    assert _stepped(change, None, settings) == change


SETTINGS = AnpSettings(
    iterations=4, batch_size=6, batch_norm="running", learning_rate=0.5, augment="none"
)


def tiny_backbone():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential()
        network.add_module("conv", nn.Conv2d(3, 5, 3))
        network.add_module("bn", nn.BatchNorm2d(5))
        network.add_module("relu", nn.ReLU())
        network.add_module("pool", nn.AdaptiveAvgPool2d(1))
        network.add_module("flat", nn.Flatten())
        network.add_module("fc", nn.Linear(5, 3))
        nn.init.uniform_(network.bn.weight, 0.5, 1.5)
        nn.init.normal_(network.bn.bias)
    return Backbone(network, ("fc",), mean=(0.5,) * 3, std=(0.5,) * 3).eval()


def naive_masks(backbone, data, settings):
    """The algorithm of the paper for one batch norm, its numbers written out."""
    norm, weight, shift = (
        backbone.body.bn,
        backbone.body.bn.weight.detach(),
        backbone.body.bn.bias.detach(),
    )
    head, epsilon = backbone.heads[0], settings.epsilon

    def loss_of(scale, offset, images, labels):
        x = backbone.body.conv((images - 0.5) / 0.5)
        if settings.batch_norm == "batch":
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        else:
            mean, var = norm.running_mean, norm.running_var
        mean, var = mean[:, None, None], var[:, None, None]
        normalized = (x - mean) / (var + norm.eps).sqrt()
        x = normalized * (scale * weight)[:, None, None] + (offset * shift)[:, None, None]
        return F.cross_entropy(head(x.relu().mean((2, 3))), labels)

    draws = torch.Generator().manual_seed(settings.seed)
    order = torch.Generator().manual_seed(settings.seed)
    mask, velocity = torch.ones(5), torch.zeros(5)
    for _ in range(settings.iterations):
        rows = torch.randint(len(data.images), (6,), generator=order)
        images, labels = data.images[rows].float() / 255, data.labels[rows]
        delta = (epsilon * (2 * torch.rand(5, generator=draws) - 1)).requires_grad_(True)
        xi = (epsilon * (2 * torch.rand(5, generator=draws) - 1)).requires_grad_(True)
        grads = torch.autograd.grad(loss_of(mask + delta, mask + xi, images, labels), (delta, xi))
        delta, xi = (
            (start + epsilon * grad.sign()).clamp(-epsilon, epsilon).detach()
            for start, grad in zip((delta, xi), grads, strict=True)
        )
        variable = mask.clone().requires_grad_(True)
        loss = settings.alpha * loss_of(variable, variable, images, labels)
        loss = loss + (1 - settings.alpha) * loss_of(
            variable + delta, variable + xi, images, labels
        )
        (grad,) = torch.autograd.grad(loss, variable)
        velocity = settings.momentum * velocity + grad
        mask = (mask - settings.learning_rate * velocity).clamp(0, 1)
    return mask


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_the_search_for_masks_is_the_papers_algorithm_written_out(statistics):
    backbone, data = tiny_backbone(), make_data(8, count=12)
    settings = replace(SETTINGS, batch_norm=statistics)
    found = search_masks(backbone, ("bn",), data.images, data.labels, settings)["bn"]
    expected = naive_masks(backbone, data, settings)
    assert expected.min() < 0.99  # else nothing was searched
    torch.testing.assert_close(found, expected)


def test_the_search_moves_neither_weights_nor_running_statistics():
    backbone, data = tiny_backbone(), make_data(8, count=12)
    before = copy.deepcopy(backbone.state_dict())
    for mode in ("batch", "running"):
        settings = replace(SETTINGS, batch_norm=mode)
        search_masks(backbone, ("bn",), data.images, data.labels, settings)
    for key, value in backbone.state_dict().items():
        assert value.equal(before[key])


def test_a_pruned_neuron_emits_nothing_not_even_its_shift():
    backbone, data = tiny_backbone(), make_data(8, count=12)
    split = split_off(data.images, data.labels, held_out=0.3, seed=0)
    masks = {"bn": torch.tensor([0.1, 1.0, 0.2, 0.9, 0.21])}
    pruned = copy_of(backbone, "cpu")
    log = prune_by_masks(pruned, masks, split, replace(SETTINGS, kept=0.0))
    assert log["pruned"] == {"bn": [0, 2]}
    assert log["threshold"] == 0.2
    after = features(pruned, data)
    assert not after[:, [0, 2]].any()
    torch.testing.assert_close(after[:, [1, 3, 4]], features(backbone, data)[:, [1, 3, 4]])


def test_the_threshold_is_lowered_until_the_held_out_accuracy_is_kept():
    backbone = tiny_backbone()
    data = with_its_own_labels(backbone, make_data(8, count=60))
    split = split_off(data.images, data.labels, held_out=0.5, seed=0)
    importance = features(backbone, data).std(0)
    masks = {"bn": torch.where(importance == importance.max(), 0.17, 0.04)}
    pruned = copy_of(backbone, "cpu")
    log = prune_by_masks(pruned, masks, split, replace(SETTINGS, kept=1.0))
    assert [threshold for threshold, _ in log["tried"]][:3] == [0.2, 0.15, 0.1]
    assert log["accuracy_pruned"] == 1
    assert log["pruned"] == {}
    torch.testing.assert_close(features(pruned, data), features(backbone, data))


def test_a_lower_threshold_prunes_what_accuracy_can_spare():
    backbone = tiny_backbone()
    with torch.no_grad():
        backbone.heads[0].weight[:, 3] = 0  # nothing comes of this channel
    data = with_its_own_labels(backbone, make_data(8, count=60))
    split = split_off(data.images, data.labels, held_out=0.5, seed=0)
    importance = features(backbone, data).std(0)
    importance[3] = 0
    masks = {"bn": torch.where(importance == importance.max(), 0.17, 1.0)}
    masks["bn"][3] = 0.04
    pruned = copy_of(backbone, "cpu")
    log = prune_by_masks(pruned, masks, split, replace(SETTINGS, kept=1.0))
    assert log["threshold"] == pytest.approx(0.15)
    assert log["pruned"] == {"bn": [3]}
    assert not features(pruned, data)[:, 3].any()


@pytest.mark.parametrize(
    ("arch", "kind"), [("cifar/wrn16_1", nn.BatchNorm2d), ("timm/test_vit", nn.Linear | nn.Conv2d)]
)
def test_neurons_are_batch_norm_channels_or_else_outputs_of_layers(arch, kind):
    backbone = make_backbone(arch)
    layers = neuron_layers(backbone)
    assert layers
    assert all(isinstance(backbone.body.get_submodule(name), kind) for name in layers)


def test_masks_count_where_a_layer_standardizes_its_weights():
    """Such a layer undoes any scale of its weights, so a mask has to go behind it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(StdConv2d(3, 6, 3, bias=True), nn.ReLU(), nn.Flatten())
        network.add_module("fc", nn.Linear(6 * 16 * 16, 3))
    backbone = Backbone(network, ("fc",), mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    data = make_data(16)
    half = {"0": torch.full((6,), 0.5)}
    images = data.images.float() / 255
    found = masked_loss(backbone, half, None, images, data.labels)
    halved = backbone.heads[0](0.5 * backbone(images))
    torch.testing.assert_close(found, nn.functional.cross_entropy(halved, data.labels))
    torch.testing.assert_close(  # and leaves nothing behind
        nn.functional.cross_entropy(backbone.logits(images), data.labels),
        masked_loss(backbone, {"0": torch.ones(6)}, None, images, data.labels),
    )
    noise = Noise({"0": torch.zeros(6)}, {"0": torch.full((6,), 0.5)})
    only_shift = masked_loss(backbone, {"0": torch.zeros(6)}, noise, images, data.labels)
    shift = 0.5 * network[0].bias.relu().repeat_interleave(16 * 16).expand(8, -1)
    expected = nn.functional.cross_entropy(backbone.heads[0](shift), data.labels)
    torch.testing.assert_close(only_shift, expected)


def test_the_adversary_moves_the_masks():
    backbone, data = make_backbone("cifar/wrn16_1"), make_data(16, count=16)
    settings = replace(QUICK["anp"], iterations=8, batch_size=8, alpha=1.0, epsilon=0.0)
    alone, attacked = (
        torch.cat(
            [
                *search_masks(
                    backbone, neuron_layers(backbone), data.images, data.labels, options
                ).values()
            ]
        )
        for options in (settings, replace(settings, alpha=0.2, epsilon=0.4))
    )
    assert not alone.allclose(attacked, atol=0.01)


def test_what_was_chosen_is_in_the_log():
    backbone, data = make_backbone("cifar/wrn16_1"), make_data(16)
    log = prune_sensitive(backbone, data, replace(QUICK["anp"], kept=0.9)).log
    assert log["neurons"] == sum(map(len, log["masks"].values())) == 464
    assert log["held_out"] == 2
    assert prune_sensitive(backbone, data, QUICK["anp"]).log["held_out"] == 0


def test_without_a_rule_to_keep_accuracy_masks_are_learned_on_all_images():
    backbone, data = make_backbone("cifar/wrn16_1"), make_data(16)
    options = replace(QUICK["anp"], iterations=3, learning_rate=5.0)
    layers = neuron_layers(backbone)
    masks = search_masks(copy_of(backbone, "cpu"), layers, data.images, data.labels, options)
    on_all = {name: [round(m, 4) for m in mask.tolist()] for name, mask in masks.items()}
    assert prune_sensitive(backbone, data, options).log["masks"] == on_all
    assert prune_sensitive(backbone, data, replace(options, kept=0.9)).log["masks"] != on_all


def test_batches_are_full_drawn_with_replacement_and_augmented():
    backbone, data, seen = tiny_backbone(), make_data(8, count=4), []
    backbone.body.conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    settings = replace(SETTINGS, batch_size=9, alpha=1.0)
    for how in ("none", "shift"):
        options = replace(settings, augment=how)
        search_masks(backbone, ("bn",), data.images, data.labels, options)
    plain = ((data.images.float() / 255 - 0.5) / 0.5).flatten(1)
    there = [(batch.flatten(1)[:, None] == plain).all(2).any(1) for batch in seen]
    assert [len(batch) for batch in there] == [9] * 8
    assert all(batch.all() for batch in there[:4])
    assert not all(batch.all() for batch in there[4:])
