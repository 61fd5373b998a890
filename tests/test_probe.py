import math

import pytest
import torch
from torch import nn

from unbackdoor.errors import CheckpointError, DataError
from unbackdoor.probe import PART, NearestNeighbours, extract, linear_probe


@pytest.fixture
def clusters(generator):
    centres = 4 * torch.randn(3, 6, generator=generator)
    labels = torch.arange(90) % 3
    return centres[labels] + torch.randn(90, 6, generator=generator), labels


def test_extract_equals_one_pass_and_is_float32(generator):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).eval()
    images = torch.randint(0, 256, (7, 3, 2, 2), dtype=torch.uint8, generator=generator)
    features = extract(network, images, batch_size=3)
    torch.testing.assert_close(features, network(images.float() / 255))
    assert not features.requires_grad


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_no_numbers_are_refused(value, clusters):
    features, labels = clusters
    features[5, 2] = value
    with pytest.raises(CheckpointError, match="yields NaN or infinite features"):
        linear_probe(features, labels, classes=3)


def test_the_probe_separates_clusters_and_is_deterministic(clusters):
    features, labels = clusters
    once, again = (linear_probe(features, labels, classes=3) for _ in range(2))
    assert (once(features).argmax(1) == labels).float().mean() > 0.95
    assert torch.equal(once.weight, again.weight)


def test_the_probe_is_at_the_minimum_of_its_loss(clusters):
    features, labels = clusters
    probe = linear_probe(features, labels, classes=3)
    scale = features.std(0, correction=0)
    scaled = ((features - features.mean(0)) / scale).double()
    weight = (probe.weight * scale).double().requires_grad_(True)
    bias = (probe.bias + probe.weight @ features.mean(0)).double()
    # scikit-learn: C times the summed cross-entropy plus half the squared weights, C = 1.
    loss = nn.functional.cross_entropy(scaled @ weight.T + bias, labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss + weight.pow(2).sum() / 2, weight)
    assert gradient.abs().max() < 1e-4


def test_the_probe_does_not_depend_on_the_features_units(clusters):
    features, labels = clusters
    scaled = features * 100 + 7
    expected = linear_probe(features, labels, classes=3)(features)
    actual = linear_probe(scaled, labels, classes=3)(scaled)
    torch.testing.assert_close(actual, expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("present", [[0, 2], [1, 3, 4]])
def test_a_class_without_examples_is_never_predicted(present, clusters):
    features, labels = clusters
    names = torch.tensor([*present, present[0]])[labels]
    probe = linear_probe(features, names, classes=5)
    predicted = probe(features).argmax(1)
    assert set(predicted.tolist()) == set(present)
    assert (predicted == names).float().mean() > 0.95


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 1, 1], "a probe needs two classes or more, got labels of 1"),
        ([0, 1, 3], r"labels must lie in 0\.\.2, got 0\.\.3"),
    ],
)
def test_bad_labels_are_refused(labels, message):
    with pytest.raises(DataError, match=message):
        linear_probe(torch.rand(3, 2), torch.tensor(labels), classes=3)


def test_neighbours_vote_with_weights_as_counted_by_hand():
    keys = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])  # lengths do not matter
    knn = NearestNeighbours(keys, torch.tensor([2, 0, 1]), classes=4, neighbours=2, temperature=0.5)
    votes = knn(torch.tensor([[5.0, 0.0]]))[0]
    # cosines 1, 0, .7071: the two nearest are rows 0 and 2
    expected = [0, math.exp(0.70711 / 0.5), math.exp(1 / 0.5), 0]
    torch.testing.assert_close(votes, torch.tensor(expected), atol=1e-3, rtol=0)


def test_all_neighbours_of_more_features_than_are_looked_at_at_once_vote(clusters):
    features, labels = clusters
    voters = NearestNeighbours(features, labels, classes=3, neighbours=90)
    many = torch.randn(PART + 3, features.shape[1], generator=torch.Generator().manual_seed(1))
    cosines = nn.functional.normalize(many, dim=1) @ nn.functional.normalize(features, dim=1).T
    naive = (cosines / 0.07).exp() @ nn.functional.one_hot(labels, 3).float()
    torch.testing.assert_close(voters(many), naive, rtol=1e-4, atol=1e-4)


def test_more_neighbours_than_labels_are_all_of_them():
    knn = NearestNeighbours(torch.eye(2), torch.tensor([0, 1]), classes=2)
    assert knn(torch.tensor([[1.0, 0.1]])).argmax(1).tolist() == [0]
