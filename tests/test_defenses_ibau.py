from dataclasses import replace

import torch
from test_defenses import QUICK, make_backbone, make_data

from unbackdoor.defenses.common import cross_entropy
from unbackdoor.defenses.ibau import find_trigger, hypergradient
from unbackdoor.defenses.settings import IbauSettings

SETTINGS = IbauSettings(fixed_point_steps=4, inner_rate=0.2, penalty=0.3)


def quadratic(weights):
    """A loss whose derivatives are known: w' A d - d' B d / 2 + |w|^2 / 2."""
    mixed = torch.tensor([[1.0, 2.0], [0.5, -1.0]])
    curved = torch.tensor([[1.0, 0.3], [0.3, 2.0]])

    def objective(delta):
        return weights @ mixed @ delta - delta @ curved @ delta / 2 + weights @ weights / 2

    return objective, mixed, curved


def test_the_hypergradient_is_the_sum_that_its_source_writes():
    weights = torch.tensor([0.7, -0.4], requires_grad=True)
    delta = torch.tensor([0.2, 0.1])
    objective, mixed, curved = quadratic(weights)
    rate, penalty = SETTINGS.inner_rate, SETTINGS.penalty
    by_delta = mixed.T @ weights.detach() - curved @ delta
    jacobian = torch.eye(2) - rate * curved - 2 * rate * penalty * torch.eye(2)
    v = sum(torch.linalg.matrix_power(jacobian.T, k) @ by_delta for k in range(4))
    expected = mixed @ delta + weights.detach() + rate * mixed @ v
    (found,), loss = hypergradient(objective, delta, [weights], SETTINGS)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(loss, objective(delta).detach())


def test_without_fixed_point_steps_it_is_the_plain_gradient():
    weights = torch.tensor([0.7, -0.4], requires_grad=True)
    delta = torch.tensor([0.2, 0.1])
    objective, mixed, _ = quadratic(weights)
    (found,), _ = hypergradient(objective, delta, [weights], replace(SETTINGS, fixed_point_steps=0))
    torch.testing.assert_close(found, mixed @ delta + weights.detach())


def test_the_trigger_stays_in_its_ball_and_raises_the_loss():
    backbone, data = make_backbone("cifar/wrn16_1"), make_data(16)
    loss_of = cross_entropy(backbone)
    settings = replace(QUICK["ibau"], epsilon=1.5, inner_steps=6, batch_size=8)
    trigger = find_trigger(loss_of, data.images, data.labels, backbone.mean, settings, lambda: None)
    assert trigger.shape == (1, 3, 16, 16)
    assert trigger.norm() <= 1.5 + 1e-5
    plain = data.images.float() / 255
    with torch.no_grad():
        before = loss_of(plain, data.labels)
        assert loss_of((plain + trigger).clamp(0, 1), data.labels) > before
