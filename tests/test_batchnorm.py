import pytest
import torch
from torch import nn

from unbackdoor.batchnorm import batch_norms, batch_statistics, reestimate, track


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


def test_tracking_takes_one_step_and_leaves_everything_in_eval_mode(network, images):
    norm, start = network[1], network[1].running_mean.clone()
    track(network, images)
    expected = 0.9 * start + 0.1 * network[0](images).mean((0, 2, 3))
    torch.testing.assert_close(norm.running_mean, expected)
    assert not any(module.training for module in network.modules())


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
