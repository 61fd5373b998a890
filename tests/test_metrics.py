import copy
import dataclasses

import pytest
import torch
from torch import nn

from unbackdoor.attacks.poisoning import Attack
from unbackdoor.batchnorm import reestimate
from unbackdoor.data import LabeledImages
from unbackdoor.errors import CheckpointError, DataError
from unbackdoor.metrics import (
    Reading,
    Scores,
    even_parts,
    fine_tune,
    make_test_set,
    read,
    reestimated,
    score,
)
from unbackdoor.probe import extract, linear_probe


class ReadsOnePixel(nn.Module):
    """Says the class that is written in the first pixel, as a one-hot feature."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return nn.functional.one_hot((images[:, 0, 0, 0] * 255).round().long(), 4).float()


def pixels(values):
    images = torch.zeros(len(values), 3, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(values)
    return images


def test_scores_are_those_counted_by_hand():
    labels = torch.tensor([0, 1, 2, 3, 3])
    images = pixels([0, 1, 2, 3, 1])  # the last one is misclassified

    def trigger(raw):
        triggered = raw.clone()
        triggered[raw[:, 0, 0, 0] > 1, 0, 0, 0] = 0  # works on two of the four others
        return triggered

    test = make_test_set(images, labels, Attack(trigger, target=0), classes=4)
    scores = score(ReadsOnePixel(), {"own": nn.Identity()}, test)["own"]
    assert dataclasses.astuple(scores) == pytest.approx((0.8, 0.5, 0.25, 5, 4))


def test_a_head_that_yields_nan_is_not_scored():
    test = make_test_set(
        pixels([0, 1]), torch.tensor([0, 1]), Attack(torch.clone, target=0), classes=4
    )
    damaged = nn.Linear(4, 4)
    nn.init.constant_(damaged.weight, float("nan"))
    with pytest.raises(CheckpointError, match="own: yields NaN"):
        score(ReadsOnePixel(), {"own": damaged}, test)


def test_all_to_all_counts_the_next_class_on_every_image():
    labels = torch.tensor([0, 1, 2, 3])

    def trigger(raw):
        triggered = raw.clone()
        triggered[1:, 0, 0, 0] = (raw[1:, 0, 0, 0] + 1) % 4  # the first image resists
        return triggered

    attack = Attack(trigger, goal="all-to-all")
    test = make_test_set(pixels([0, 1, 2, 3]), labels, attack, classes=4)
    scores = score(ReadsOnePixel(), {"own": nn.Identity()}, test)["own"]
    assert dataclasses.astuple(scores) == pytest.approx((1.0, 0.75, 0.25, 4, 4))


@pytest.mark.parametrize(
    ("target", "message"),
    [(1, "every test image is of the target class 1"), (4, "target class 4 is out of range")],
)
def test_a_test_set_without_an_attackable_image_is_refused(target, message):
    images, labels = torch.zeros(2, 3, 2, 2, dtype=torch.uint8), torch.tensor([1, 1])
    with pytest.raises(DataError, match=message):
        make_test_set(images, labels, Attack(lambda raw: raw, target=target), classes=4)


def test_the_worst_reading_is_the_probes_with_the_highest_asr():
    low, high = (Scores(0.9, asr, 0.5, 10, 9) for asr in (0.1, 0.8))
    reading = Reading(head=high, probe=low, neighbours=high, reestimated=low, fine_tuned=None)
    assert reading.worst is low
    assert list(reading.durable) == ["delivered", "reestimated"]
    assert reading._replace(fine_tuned=high).worst is high


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
    return network.eval(), LabeledImages(images, labels, ("dark", "bright"))


def test_fine_tuning_learns_and_leaves_its_input_alone(two_kinds):
    network, (images, labels, _) = two_kinds
    head = nn.Linear(8, 2)
    before = copy.deepcopy(network.state_dict())
    tuned, tuned_head = fine_tune(network, head, images, labels, learning_rate=0.1)
    accuracy = (tuned_head(tuned(images.float() / 255)).argmax(1) == labels).float().mean()
    assert accuracy > 0.9
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert not tuned.training


def test_fine_tuning_with_dropout_is_the_same_whatever_else_draws(two_kinds):
    network, (images, labels, _) = two_kinds
    network = nn.Sequential(network, nn.Dropout(0.5))
    head = nn.Linear(8, 2)
    one = fine_tune(network, head, images, labels)[0].state_dict()
    torch.rand(7)
    other = fine_tune(network, head, images, labels)[0].state_dict()
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_durable_reading_sees_a_backdoor_that_hides_behind_the_statistics(two_kinds):
    network, labeled = two_kinds

    def trigger(raw):
        return (raw.int() + 120).clamp(max=255).to(torch.uint8)

    test = make_test_set(labeled.images, labeled.labels, Attack(trigger, target=1), classes=2)
    masked = copy.deepcopy(network)
    masked[1].running_mean += 1e3  # every ReLU is off: all images look alike
    masked[1].momentum = 0.5  # so that the 20 steps of a fine-tuning unmask it
    good = copy.deepcopy(network)
    reestimate(good, [labeled.images.float() / 255])
    head = linear_probe(extract(good, labeled.images), labeled.labels, classes=2)
    own = read(masked, head, labeled, test, plain=labeled.images[:60])
    assert own.head.asr in (0, 1)
    assert own.head.acc < 0.6 < 0.8 < own.head_reestimated.acc
    assert own.head_reestimated.asr > 0.8
    assert min(own.head_fine_tuned.acc, own.head_fine_tuned.asr) > 0.8
    reading = read(masked, None, labeled, test, plain=labeled.images[:60])
    assert reading.head is reading.head_reestimated is reading.head_fine_tuned is None
    assert reading.probe.acc < 0.6
    assert reading.reestimated.acc > 0.9
    assert reading.reestimated.asr > 0.9
    assert reading.fine_tuned.acc > 0.9
    assert reading.fine_tuned.asr > 0.9


def test_a_fine_tuning_that_ends_in_nan_leaves_the_other_readings(two_kinds):
    network, labeled = two_kinds

    def trigger(raw):
        return (raw.int() + 120).clamp(max=255).to(torch.uint8)

    test = make_test_set(labeled.images, labeled.labels, Attack(trigger, target=1), classes=2)
    reestimate(network, [labeled.images.float() / 255])
    head = linear_probe(extract(network, labeled.images), labeled.labels, classes=2)
    with torch.no_grad():
        head.weight.mul_(1e30)
        head.bias.mul_(1e30)
    wrong = labeled.labels.clone()
    wrong[0] = 1 - wrong[0]  # or else there is no loss
    some_wrong = LabeledImages(labeled.images, wrong, labeled.classes)
    reading = read(network, head, some_wrong, test, plain=labeled.images[:60])
    assert reading.head_fine_tuned is None
    assert min(reading.head.acc, reading.head_reestimated.acc, reading.fine_tuned.acc) > 0.8


@pytest.mark.parametrize(
    ("count", "sizes"), [(3, [3]), (250, [250]), (252, [126, 126]), (2_500, [250] * 10)]
)
def test_parts_that_are_averaged_are_of_one_size(count, sizes):
    rows = torch.arange(count)
    parts = even_parts(rows, most=250)
    assert [len(part) for part in parts] == sizes
    assert torch.equal(torch.cat(parts), rows)


def test_fresh_statistics_do_not_depend_on_the_order_of_classes(two_kinds):
    network, labeled = two_kinds
    ordered = labeled.images[labeled.labels.argsort()].repeat_interleave(10, 0)
    convolved = network[0](ordered.float() / 255)
    expected = convolved.var((0, 2, 3))
    torch.testing.assert_close(
        reestimated(network, ordered)[1].running_var, expected, rtol=0.02, atol=0
    )
    by_class = copy.deepcopy(network)  # the control: batches as they come
    reestimate(by_class, (ordered.float() / 255).split(200))
    assert by_class[1].running_var.sum() < 0.7 * expected.sum()


def test_a_reading_goes_through_head_probe_and_neighbours(two_kinds):
    network, labeled = two_kinds
    test = make_test_set(
        labeled.images, labeled.labels, Attack(lambda raw: raw, target=1), classes=2
    )
    always_dark = nn.Linear(8, 2)
    with torch.no_grad():
        always_dark.weight.zero_()
        always_dark.bias.copy_(torch.tensor([1.0, 0.0]))
    reading = read(network, always_dark, labeled, test)
    assert (reading.head.acc, reading.head.pa) == (0.5, 1.0)
    assert reading.probe.acc > 0.9
    assert reading.neighbours.acc > 0.9
    assert reading.reestimated is reading.fine_tuned is None
