from dataclasses import replace

import pytest
import torch
from test_defenses import QUICK, make_backbone, make_data
from torch import nn

from unbackdoor.backbones import Backbone, network_state
from unbackdoor.defenses.common import cross_entropy
from unbackdoor.defenses.ibau import (
    find_trigger,
    hypergradient,
    perturbed_count,
    perturbed_loss,
    unlearn,
)
from unbackdoor.defenses.settings import IbauSettings

SETTINGS = IbauSettings(fixed_point_steps=4, inner_rate=0.2, penalty=0.3)
MIXED = torch.tensor([[1.0, 2.0], [0.5, -1.0]])
CURVED = torch.tensor([[1.0, 0.3], [0.3, 2.0]])
OUTER = torch.tensor([[0.2, 0.0], [1.5, 0.4]])


def objectives(weights):
    """Two losses whose derivatives are known: w' A d - d' B d / 2, and w' C d + |w|^2 / 2."""

    def inner(delta):
        return weights @ MIXED @ delta - delta @ CURVED @ delta / 2

    def outer(delta):
        return weights @ OUTER @ delta + weights @ weights / 2

    return outer, inner


def test_the_hypergradient_is_the_sum_that_its_source_writes():
    weights = torch.tensor([0.7, -0.4], requires_grad=True)
    delta = torch.tensor([0.2, 0.1])
    outer, inner = objectives(weights)
    rate, penalty = SETTINGS.inner_rate, SETTINGS.penalty
    by_delta = OUTER.T @ weights.detach()
    jacobian = torch.eye(2) - rate * CURVED - 2 * rate * penalty * torch.eye(2)
    v = sum(torch.linalg.matrix_power(jacobian.T, k) @ by_delta for k in range(4))
    expected = OUTER @ delta + weights.detach() + rate * MIXED @ v
    (found,), loss = hypergradient(outer, inner, delta, [weights], SETTINGS)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(loss, outer(delta).detach())


def test_without_fixed_point_steps_it_is_the_plain_gradient():
    weights = torch.tensor([0.7, -0.4], requires_grad=True)
    delta = torch.tensor([0.2, 0.1])
    plain = replace(SETTINGS, fixed_point_steps=0)
    (found,), _ = hypergradient(*objectives(weights), delta, [weights], plain)
    torch.testing.assert_close(found, OUTER @ delta + weights.detach())


@pytest.mark.parametrize(
    ("images", "share", "count"), [(100, 0.01, 1), (300, 0.01, 3), (8, 0.01, 1), (100, 0, 0)]
)
def test_a_share_of_a_batch_is_perturbed_but_one_image_at_least(images, share, count):
    assert perturbed_count(images, replace(SETTINGS, perturbed=share)) == count


def test_a_perturbation_moves_the_images_that_it_shall_and_no_others():
    backbone, data = make_backbone("cifar/wrn16_1"), make_data(16)
    loss_of, delta = cross_entropy(backbone), torch.full((1, 3, 16, 16), 0.3)
    images = data.images.float() / 255
    moved = torch.cat([images[:2] + 0.3, images[2:]])
    found = perturbed_loss(loss_of, data.images, data.labels, backbone.mean, perturbed=2)(delta)
    torch.testing.assert_close(found, loss_of(moved, data.labels))
    none = perturbed_loss(loss_of, data.images, data.labels, backbone.mean, perturbed=0)(delta)
    torch.testing.assert_close(none, loss_of(images, data.labels))


def test_unlearning_goes_through_the_trigger_and_moves_no_statistics():
    backbone, data = make_backbone("cifar/wrn16_1"), make_data(16)
    settings = replace(QUICK["ibau"], perturbed=1.0)
    through, plain = (
        unlearn(backbone, data, replace(settings, fixed_point_steps=steps)).backbone
        for steps in (2, 0)
    )
    buffers = dict(backbone.named_buffers())
    for name, buffer in through.named_buffers():
        assert buffer.equal(buffers[name]), name
    after = network_state(plain)
    assert any(not value.equal(after[key]) for key, value in network_state(through).items())


class Keeps(nn.Module):
    """Like a LeViT: in eval mode it keeps what it computed from its weights."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
        self.shift, self.kept = nn.Parameter(torch.zeros(4)), {}

    def train(self, mode=True):
        self.kept.clear()
        return super().train(mode)

    def forward(self, images):
        shift = self.kept.setdefault("shift", 2 * self.shift)
        return self.fc((self.conv(images).mean((2, 3)) + shift).relu())


def test_weights_behind_what_a_network_keeps_are_unlearned_too():
    with torch.random.fork_rng():
        torch.manual_seed(0)  # not all features of these weights are 0 behind the ReLU
        network = Keeps()
    backbone = Backbone(network, ("fc",), mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    repaired = unlearn(backbone, make_data(16), QUICK["ibau"]).backbone
    assert repaired.body.shift.any()


def test_the_trigger_is_one_gradient_step_a_batch_and_changes_predictions():
    backbone, data = make_backbone("cifar/wrn16_1"), make_data(16)
    settings = replace(QUICK["ibau"], search_rate=3.0, penalty=0.1)
    loss_of, images = cross_entropy(backbone), data.images.float() / 255
    own = backbone.logits(images).argmax(1)
    delta = torch.zeros(1, 3, 16, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss_of(images + delta, own), delta)
    first = find_trigger(backbone, [data.images], settings, lambda done: None)
    torch.testing.assert_close(first, 3 * gradient)
    twice = find_trigger(backbone, [data.images] * 2, settings, lambda done: None)
    moved = first.clone().requires_grad_(True)
    raised = loss_of(images + moved, own) - 0.1 * moved.square().sum()
    (gradient,) = torch.autograd.grad(raised, moved)
    torch.testing.assert_close(twice, first + 3 * gradient)
    with torch.no_grad():
        assert loss_of(images + twice, own) > loss_of(images, own)
