import copy
import warnings

import pytest
import torch
from torch import nn

from unbackdoor.batchnorm import (
    batch_norms,
    batch_statistics,
    fold,
    reestimate,
    reference_statistics,
)
from unbackdoor.devices import frozen_twin
from unbackdoor.errors import DataError
from unbackdoor.networks import SMALL_NETWORKS


@pytest.fixture
def network():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    return layers.eval()


@pytest.fixture
def images(generator):
    return torch.rand(40, 3, 5, 5, generator=generator)


def test_reestimated_statistics_are_those_of_all_batches(network, images):
    features = network[0](images)
    reestimate(network, images.split(10))
    norm = network[1]
    torch.testing.assert_close(norm.running_mean, features.mean((0, 2, 3)))
    of_batches = torch.stack([part.var((0, 2, 3)) for part in features.split(10)]).mean(0)
    torch.testing.assert_close(norm.running_var, of_batches)
    assert norm.momentum == 0.1
    assert not norm.training


def test_reference_images_move_the_running_statistics_by_one_step(network, images):
    norm, start = network[1], network[1].running_mean.clone()
    first = network[0](images[:10])
    with reference_statistics(network, 4):
        network(images)
    torch.testing.assert_close(norm.running_mean, 0.9 * start + 0.1 * first.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * first.var((0, 2, 3)))
    assert not any(module.training for module in network.modules())


def test_all_images_are_normalized_by_the_running_statistics(network, images):
    with reference_statistics(network, 4):
        features = network(images)
    torch.testing.assert_close(features, network(images))


def test_gradients_are_those_of_the_reference_images_own_statistics(network, images):
    norm = network[1]
    norm.weight.data.uniform_()
    norm.momentum = 1.0  # so that the values are the images' own, too
    with reference_statistics(network, 4):
        network(images)[10:].square().sum().backward()
    gradients = [weight.grad.clone() for weight in network.parameters()]
    network.zero_grad()
    convolved = network[0](images)
    first = convolved[:10]
    mean, variance = first.mean((0, 2, 3), keepdim=True), first.var((0, 2, 3), keepdim=True)
    scale, shift = norm.weight.view(-1, 1, 1), norm.bias.view(-1, 1, 1)
    normal = (convolved - mean) / (variance + norm.eps).sqrt() * scale + shift
    normal[10:].square().sum().backward()
    for gradient, weight in zip(gradients, network.parameters(), strict=True):
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("affine", [False, True])
def test_gradients_by_images_pass_through_the_statistics_that_stand_for_the_first(affine, images):
    network = nn.Sequential(nn.Identity(), nn.BatchNorm2d(3, affine=affine)).eval().double()
    norm, images = network[1], images.double().requires_grad_(True)
    with reference_statistics(network, 4):  # of which the running ones are a tenth
        found = torch.autograd.grad(network(images).pow(3).sum(), images)[0]
    first = images[:10]
    mean, variance = first.mean((0, 2, 3)), first.var((0, 2, 3))
    mean = norm.running_mean + mean - mean.detach()
    variance = norm.running_var + variance - variance.detach()
    normal = (images - mean.view(-1, 1, 1)) / (variance + norm.eps).sqrt().view(-1, 1, 1)
    torch.testing.assert_close(found, torch.autograd.grad(normal.pow(3).sum(), images)[0])


def test_rows_may_be_tokens_image_after_image(images):
    tokens = nn.Sequential(nn.Flatten(2), nn.Flatten(0, 1), nn.BatchNorm1d(25))
    with reference_statistics(tokens, 4):
        tokens(images)
    first = images[:10].flatten(2).flatten(0, 1)
    torch.testing.assert_close(tokens[2].running_mean, 0.1 * first.mean(0))


def test_a_layer_without_running_statistics_normalizes_as_ever(images):
    network = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    with reference_statistics(network, 4):
        features = network(images)
    torch.testing.assert_close(features, network(images))


def test_bfloat16_images_are_normalized_in_float32(network, images):
    with torch.autocast("cpu", torch.bfloat16), reference_statistics(network, 4):
        features = network(images)
    assert features.dtype == torch.bfloat16
    torch.testing.assert_close(features.float(), network(images), atol=0.1, rtol=0.02)


def test_a_layer_wholly_in_bfloat16_is_normalized_in_float32(images):
    norm = nn.BatchNorm2d(3)
    half, images = copy.deepcopy(norm).bfloat16(), images.bfloat16()
    for layer in (norm, half):
        with reference_statistics(layer, 4):
            layer(images.to(layer.weight.dtype)).square().sum().backward()
    assert half.weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(half.weight.grad.float(), norm.weight.grad, rtol=0.02, atol=0.1)
    torch.testing.assert_close(half.running_var.float(), norm.running_var, rtol=0.02, atol=0.01)


def test_batch_statistics_normalize_and_need_not_move(network, images):
    norm, start = network[1], network[1].running_mean.clone()
    with batch_statistics(network, batch=True, moving=False):
        out = norm(network[0](images))
        assert not network[2].training
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    assert torch.equal(norm.running_mean, start)
    assert norm.momentum == 0.1


def test_a_network_without_batch_norm_is_left_alone():
    def no_batches():
        raise AssertionError("read a batch that nobody needs")
        yield

    network = nn.Linear(2, 2)
    reestimate(network, no_batches())
    assert batch_norms(network) == []


def test_statistics_of_no_images_are_refused(network):
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(DataError, match="no plain images"):
        reestimate(network, iter(()))
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def changed_layers(network, kind=nn.Module):
    return sum("forward" in vars(layer) for layer in network.modules() if isinstance(layer, kind))


def folded_convolutions(network):
    return changed_layers(network, nn.Conv2d)


def gradient_of(network, images):
    tried = images.clone().requires_grad_(True)
    return torch.autograd.grad(network(tried).square().sum(), tried)[0]


@pytest.mark.parametrize(("arch", "gone"), [("resnet18", 20), ("wrn16_1", 6)])
def test_a_folded_twin_follows_weights_and_statistics(arch, gone, generator):
    images = torch.rand(4, 3, 16, 16, generator=generator).double()
    network = SMALL_NETWORKS[arch](10).eval().double()
    twin = frozen_twin(network)
    assert fold(twin, images) == gone
    assert folded_convolutions(twin) == gone
    assert changed_layers(twin, nn.BatchNorm2d) == len(batch_norms(twin))
    assert changed_layers(network) == 0
    torch.testing.assert_close(twin(images), network(images))
    before = network(images)
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.mul_(1.2).add_(0.01)
    with batch_statistics(network, batch=True):
        network(images)  # moves the running ones
    assert not network(images).allclose(before, rtol=0.1)
    torch.testing.assert_close(twin(images), network(images))
    torch.testing.assert_close(gradient_of(twin, images), gradient_of(network, images))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_a_convolution_may_have_a_bias_and_a_norm_no_weights(bias, affine, images):
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4, affine=affine))
    reestimate(network, images.split(10))
    expected = network.eval()(images)
    assert fold(network, images) == 1
    torch.testing.assert_close(network(images), expected)


class ReadTwice(nn.Module):
    """Uses what its convolution returns twice, the second time unseen by autograd if ``hidden``."""

    def __init__(self, *, hidden):
        super().__init__()
        self.conv, self.norm, self.hidden = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), hidden
        self.last = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, images):
        convolved = self.conv(images)
        again = convolved.detach() if self.hidden else convolved
        return self.last(self.norm(convolved) - again)


@pytest.mark.parametrize(("hidden", "gone"), [(False, 1), (True, 0)])
def test_a_convolution_that_something_else_reads_stays(hidden, gone, images):
    network = ReadTwice(hidden=hidden).eval()
    reestimate(network, images.split(10))
    expected = network(images)
    assert fold(network, images) == gone
    assert folded_convolutions(network) == folded_convolutions(network.last) == gone
    torch.testing.assert_close(network(images), expected)


@pytest.mark.parametrize(
    "middle",
    [nn.ReLU(), nn.ReLU(inplace=True), nn.BatchNorm2d(4, track_running_stats=False)],
    ids=["not right behind", "nor in place", "no running statistics"],
)
def test_only_a_batch_norm_right_behind_is_folded(middle, images):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), middle, nn.BatchNorm2d(4)).eval()
    assert fold(network, images) == folded_convolutions(network) == 0


def test_gradients_of_bfloat16_images_are_summed_in_float32(images, generator):
    images = images.bfloat16()
    gradient = torch.randn(images.shape, generator=generator).bfloat16()
    found = []
    for kind in (torch.bfloat16, torch.float32):
        norm = nn.BatchNorm2d(3)
        with reference_statistics(norm, 4):
            norm(images.to(kind)).backward(gradient.to(kind))
        found.append(norm.weight.grad)
    torch.testing.assert_close(*found)


def test_second_derivatives_are_refused_where_they_would_be_wrong(network, images):
    with reference_statistics(network, 4):
        loss = network(images).pow(3).sum()
    (gradient,) = torch.autograd.grad(loss, network[0].weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_convolution_with_a_forward_of_its_own_stays(images):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    network[0].forward = lambda images: nn.Conv2d.forward(network[0], images).tanh()
    expected = network(images)
    assert fold(network, images) == 0
    torch.testing.assert_close(network(images), expected)


def test_what_is_folded_already_stays(images):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    reestimate(network, images.split(10))
    expected = network.eval()(images)
    assert [fold(network, images), fold(network, images)] == [1, 0]
    torch.testing.assert_close(network(images), expected)


class Louder(nn.BatchNorm2d):
    def forward(self, input):
        return 2 * super().forward(input)


def test_a_kind_of_batch_norm_with_more_in_it_stays(images):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Louder(4)).eval()
    expected = network(images)
    assert fold(network, images) == 1
    assert changed_layers(network[2]) == 0
    torch.testing.assert_close(network(images), expected)


def test_a_layer_that_runs_twice_stays(images):
    norm = nn.BatchNorm2d(3)
    network = nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.Conv2d(3, 3, 1), norm).eval()
    assert fold(network, images) == folded_convolutions(network) == 0


def test_a_layer_whose_output_a_hook_sees_stays(images):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    network[0].register_forward_hook(lambda layer, inputs, output: None)
    assert fold(network, images) == folded_convolutions(network) == 0


def test_features_that_are_no_numbers_are_not_taken_for_equal(images):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    network[1].running_mean.fill_(torch.nan)
    assert fold(network, images) == changed_layers(network) == 0


class Unusual(nn.Module):
    """Knows its convolution by two names, asks for its weights, and passes keywords."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.alias = self.conv

    def forward(self, images):
        images = images.mul_(2).to(self.conv.weight.dtype)  # in place
        return self.norm(input=self.alias(input=images))


def test_an_unusual_network_is_folded_all_the_same(images):
    network = Unusual().eval()
    twin = frozen_twin(network)
    assert fold(twin, images) == 1
    with torch.no_grad():
        network.norm.running_mean.add_(1.0)
    torch.testing.assert_close(twin(images.clone()), network(images.clone()))


def test_tf32_does_not_count_while_folding_is_tried(images):
    convolutions, seen = torch.backends.cudnn.conv, []
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    network.register_forward_hook(lambda *_: seen.append(convolutions.fp32_precision))
    before = convolutions.fp32_precision
    try:
        convolutions.fp32_precision = "tf32"
        assert fold(network, images) == 1
        assert seen.count("ieee") == 2
        assert convolutions.fp32_precision == "tf32"
    finally:
        convolutions.fp32_precision = before


def test_weights_that_a_hook_computes_are_followed(images):
    with warnings.catch_warnings(category=FutureWarning, action="ignore"):
        conv = nn.utils.weight_norm(nn.Conv2d(3, 4, 3))  # the old one; checkpoints have it
    network = nn.Sequential(conv, nn.BatchNorm2d(4)).eval()
    del conv.weight  # of a graph, which no copy takes; the hook computes it anew
    twin = frozen_twin(network)
    assert fold(twin, images) == 1
    with torch.no_grad():
        conv.weight_g.mul_(2.0)
    torch.testing.assert_close(twin(images), network(images))


def test_a_convolution_may_have_another_type_than_the_norm(images):
    network = nn.Sequential(nn.Conv2d(3, 4, 3).bfloat16(), nn.BatchNorm2d(4)).eval()
    images = images.bfloat16()
    expected = network(images)
    fold(network, images)  # or not, as rounding has it
    torch.testing.assert_close(network(images), expected, rtol=0.02, atol=0.02)
