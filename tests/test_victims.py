import pytest
import torch
from torch import nn

from unbackdoor.settings import SupervisedSettings
from unbackdoor.victims import train_supervised


@pytest.fixture
def task(generator):
    """Dark and bright images, told apart by a network of one convolution."""
    labels = torch.arange(200) % 2
    images = torch.randint(0, 100, (200, 3, 6, 6), dtype=torch.uint8, generator=generator)
    images[labels == 1] += 100
    return images, labels


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )


QUICK = SupervisedSettings(epochs=3, batch_size=20, learning_rate=0.1, margin=1)


def test_training_learns_reports_its_epochs_and_ends_in_eval_mode(task):
    losses = {}
    trained = train_supervised(network(), *task, QUICK, on_epoch=losses.__setitem__)
    predicted = trained(task[0].float() / 255).argmax(1)
    assert (predicted == task[1]).float().mean() > 0.95
    assert list(losses) == [1, 2, 3]
    assert losses[3] < losses[1]
    assert not trained.training


@pytest.mark.parametrize("margin", [0, 1])
def test_a_seed_gives_one_network_whatever_its_first_weights(margin, task):
    settings = SupervisedSettings(epochs=1, batch_size=20, margin=margin)
    once, again = (train_supervised(network(), *task, settings) for _ in range(2))
    torch.testing.assert_close(once.state_dict(), again.state_dict(), rtol=0, atol=0)
    other = SupervisedSettings(epochs=1, batch_size=20, margin=margin, seed=1)
    assert not once[0].weight.equal(train_supervised(network(), *task, other)[0].weight)
