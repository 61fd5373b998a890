from itertools import pairwise

import pytest
import torch
from test_defenses import make_backbone, make_data

from unbackdoor.backbones import Backbone
from unbackdoor.defenses.common import (
    augment,
    copy_of,
    labels_of,
    rate_at,
    split_off,
    tune,
    zero_rows,
)
from unbackdoor.defenses.settings import Tuning
from unbackdoor.errors import ArchitectureError


def test_the_held_out_part_is_disjoint_and_the_rest_is_the_rest():
    images = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1)
    split = split_off(images, torch.arange(50), held_out=0.2, seed=0)
    assert len(split.held_labels) == 10
    assert sorted([*split.labels.tolist(), *split.held_labels.tolist()]) == list(range(50))
    assert split.images.flatten().tolist() == split.labels.tolist()


def test_tuning_lowers_the_loss_and_leaves_no_gradients_behind():
    data = make_data(16, count=12)
    tuned = copy_of(make_backbone("cifar/wrn16_1"), "cpu")
    losses = []

    def loss_of(images, labels):
        loss = torch.nn.functional.cross_entropy(tuned.logits(images), labels)
        losses.append(loss.item())
        return loss

    tune(
        tuned,
        data.images,
        data.labels,
        Tuning(epochs=15, batch_size=6, augment="none"),
        seed=0,
        loss_of=loss_of,
    )
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert len(losses) == 30
    assert not tuned.training


def test_a_step_of_a_tuning_has_its_rate_momentum_decay_and_augmentation():
    data, given = make_data(16), {}
    plain = {image.numpy().tobytes() for image in data.images.float() / 255}
    for how in ("none", "shift"):
        tuned, images = copy_of(make_backbone("cifar/wrn16_1"), "cpu"), []
        bias = tuned.heads[0].bias
        seen = [bias.detach().clone()]
        tuning = Tuning(2, 4, 0.1, momentum=0.5, weight_decay=0.2, augment=how)

        def loss_of(batch, _, images=images, bias=bias):  # its gradient is 1
            images.extend(batch)
            return bias.sum()

        def after(_, seen=seen, bias=bias):
            seen.append(bias.detach().clone())

        tune(tuned, data.images, data.labels, tuning, seed=0, loss_of=loss_of, after_step=after)
        velocity, steps = 0, len(seen) - 1
        for step, (old, new) in enumerate(pairwise(seen)):
            velocity = 0.5 * velocity + 1 + 0.2 * old
            rate = rate_at(tuning, 2 * step // steps, step / steps)
            torch.testing.assert_close(new, old - rate * velocity)
        given[how] = {image.contiguous().numpy().tobytes() for image in images}
    assert given["none"] == plain
    assert not given["shift"] <= plain


def test_the_backbone_that_is_given_stays_as_it_is_in_training_mode_too():
    backbone, data = make_backbone("cifar/wrn16_1").train(), make_data(16)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    labels_of(backbone, data)
    torch.testing.assert_close(dict(backbone.state_dict()), before, rtol=0, atol=0)
    assert backbone.training


def test_a_head_that_yields_a_map_is_refused():
    network = torch.nn.Sequential()
    network.add_module("conv", torch.nn.Conv2d(3, 4, 16))
    network.add_module("fc", torch.nn.Conv2d(4, 3, 1))
    maps = Backbone(network, ("fc",), mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    with pytest.raises(ArchitectureError, match=r"the head yields \(1, 3, 1, 1\)"):
        labels_of(maps, make_data(16))


def test_zeroed_rows_emit_nothing_not_even_their_shift():
    layer = torch.nn.Conv2d(2, 4, 3)
    zero_rows(layer, torch.tensor([1, 3]))
    output = layer(torch.rand(2, 2, 5, 5))
    assert not output[:, [1, 3]].any()
    assert output[:, [0, 2]].all()


def test_the_rate_follows_its_schedule():
    cosine, constant, tenth = (
        Tuning(epochs=4, learning_rate=0.1, schedule=name)
        for name in ("cosine", "constant", "tenth")
    )
    assert [rate_at(cosine, 0, progress) for progress in (0, 0.5)] == [0.1, 0.05]
    assert rate_at(cosine, 3, 1.0) < 1e-12
    hundred = Tuning(learning_rate=0.1, schedule="cosine-100")  # PyTorch's, stepped each epoch
    weight = torch.nn.Parameter(torch.zeros(1))
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([weight], lr=0.1), 100)
    for epoch in range(100):
        assert rate_at(hundred, epoch, 1.0) == pytest.approx(theirs.get_last_lr()[0])
        theirs.optimizer.step()
        theirs.step()
    assert rate_at(hundred, 150, 1.0) < 1e-12
    assert rate_at(constant, 3, 0.99) == 0.1
    rates = [rate_at(tenth, epoch, epoch / 4) for epoch in range(4)]
    assert rates == [0.1, 0.1, 0.1 * 0.1, 0.1 * 0.1]


@pytest.mark.parametrize(("side", "most"), [(16, 2), (32, 4), (64, 4)])
def test_images_are_moved_by_four_pixels_or_an_eighth_of_a_small_side(side, most, generator):
    column = torch.zeros(200, 3, side, side, dtype=torch.uint8)
    column[..., side // 2] = 255
    moved = augment(column, "shift", generator=generator)
    places = moved[:, 0].float().sum(1).argmax(1)  # of the white column, mirrored or not
    from_centre = torch.where(places < side // 2, side // 2 - 1 - places, places - side // 2)
    assert from_centre.max() == most
