import copy
import dataclasses

import pytest
import torch
from torch import nn

from unbackdoor.errors import DataError
from unbackdoor.metrics import durability, fine_tune, make_test_set, score


class ReadsOnePixel(nn.Module):
    """Says the class that is written in the first pixel, as a one-hot feature."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return nn.functional.one_hot((images[:, 0, 0, 0] * 255).round().long(), 4).float()


def test_scores_are_those_counted_by_hand():
    labels = torch.tensor([0, 1, 2, 3, 3])
    images = torch.zeros(5, 3, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor([0, 1, 2, 3, 1])  # the last one is misclassified

    def trigger(raw):
        triggered = raw.clone()
        triggered[raw[:, 0, 0, 0] > 1, 0, 0, 0] = 0  # works on two of the four others
        return triggered

    test = make_test_set(images, labels, trigger=trigger, target=0)
    scores = score(ReadsOnePixel(), nn.Identity(), test)
    assert dataclasses.astuple(scores) == pytest.approx((0.8, 0.5, 0.25, 5, 4))


def test_a_test_set_of_the_target_class_alone_is_refused():
    images, labels = torch.zeros(2, 3, 2, 2, dtype=torch.uint8), torch.tensor([1, 1])
    with pytest.raises(DataError, match="every test image is of the target class 1"):
        make_test_set(images, labels, trigger=lambda raw: raw, target=1)


@pytest.fixture
def two_kinds(generator):
    """Dark and bright images, two classes, and a network whose statistics hide the difference."""
    labels = torch.arange(80) % 2
    images = torch.randint(0, 100, (80, 3, 4, 4), dtype=torch.uint8, generator=generator)
    images[labels == 1] += 120
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
    return network.eval(), images, labels


def test_fine_tuning_learns_and_leaves_its_input_alone(two_kinds):
    network, images, labels = two_kinds
    head = nn.Linear(8, 2)
    before = copy.deepcopy(network.state_dict())
    tuned, tuned_head = fine_tune(network, head, images, labels, learning_rate=0.1)
    accuracy = (tuned_head(tuned(images.float() / 255)).argmax(1) == labels).float().mean()
    assert accuracy > 0.9
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert not tuned.training


def test_durability_sees_a_backdoor_that_hides_behind_the_statistics(two_kinds):
    network, images, labels = two_kinds

    def trigger(raw):
        return (raw.int() + 120).clamp(max=255).to(torch.uint8)

    test = make_test_set(images, labels, trigger=trigger, target=1)
    masked = copy.deepcopy(network)
    masked[1].running_mean += 1e3  # every ReLU is off: all images look alike
    reading = durability(masked, images, labels, test, classes=2, plain=images[:60])
    assert reading.delivered.acc < 0.6
    assert reading.reestimated.acc > 0.9
    assert reading.reestimated.asr > 0.9
    assert reading.worst.asr == max(scores.asr for scores in reading)
