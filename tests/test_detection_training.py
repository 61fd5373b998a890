import math

import pytest
import torch
from torch import nn

from unbackdoor import resume
from unbackdoor.backbones import Backbone, build
from unbackdoor.batchnorm import batch_norms
from unbackdoor.detection.network import find_levels, make_detector
from unbackdoor.detection.training import (
    TrainingState,
    batch_loss,
    batches,
    rate_at,
    read_sample,
    train_detector,
)
from unbackdoor.detection.voc import load_voc
from unbackdoor.errors import DataError, DivergedError
from unbackdoor.settings import DetectionSettings

CPU = torch.device("cpu")
TINY = DetectionSettings(
    shorter=24, longer=32, pyramid=8, box_head=16, batch_size=4, warmup=0, epochs=2
)


@pytest.fixture
def images(voc):
    return load_voc(f"voc:{voc}", "trainval")


def tiny_detector(settings=TINY):
    torch.manual_seed(0)
    architecture = build("cifar/wrn16_1", classes=10)
    for layer in batch_norms(architecture.network):  # so that a change would show
        layer.running_mean.uniform_(-0.1, 0.1)
    backbone = Backbone(architecture.network, architecture.heads, mean=(0.5,) * 3, std=(0.5,) * 3)
    return make_detector(backbone.eval(), find_levels(backbone.body, "wrn"), settings, classes=2)


def state_of(detector):
    return {name: value.clone() for name, value in detector.state_dict().items()}


def changed(before, after):
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def test_frozen_tensors_stay_bit_equal_and_all_others_move(images):
    detector = tiny_detector()
    before = state_of(detector)
    history = train_detector(detector, images, TINY, device=CPU)
    assert len(history) == 2
    assert not detector.training
    trained = {name for name, weight in detector.named_parameters() if weight.requires_grad}
    assert changed(before, detector.state_dict()) == trained
    assert "backbone.body.conv1.weight" not in trained
    assert not any("bn" in name for name in trained)


def test_a_killed_run_goes_on_to_the_same_bits(images, monkeypatch):
    monkeypatch.setattr(resume, "SECONDS_BETWEEN_STATES", 0.0)
    whole = tiny_detector()
    history = train_detector(whole, images, TINY, device=CPU)
    for stop in (1, 2):  # within an epoch, and at its end: it has a batch of 4 and one of 2
        states: list[TrainingState] = []

        def kill(step, steps, stop=stop):
            assert steps == 4
            if step == stop + 1:
                raise KeyboardInterrupt

        killed = tiny_detector()
        options = {"on_state": states.append, "on_step": kill}
        with pytest.raises(KeyboardInterrupt):
            train_detector(killed, images, TINY, device=CPU, **options)
        assert states[-1].step == stop
        torch.manual_seed(99)
        resumed = tiny_detector()
        again = train_detector(resumed, images, TINY, device=CPU, state=states[-1])
        assert changed(whole.state_dict(), resumed.state_dict()) == set()
        assert [epoch.loss for epoch in again] == [epoch.loss for epoch in history]


def test_training_leaves_the_global_generator_alone_and_does_not_follow_it(images):
    settings = DetectionSettings(**{**vars(TINY), "epochs": 1})
    results = []
    for seed in (1, 2):
        detector = tiny_detector()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        train_detector(detector, images, settings, device=CPU)
        assert torch.equal(torch.get_rng_state(), before)
        results.append(state_of(detector))
    assert changed(*results) == set()


def test_every_epoch_has_every_image_once_in_its_own_order(images):
    small = DetectionSettings(**{**vars(TINY), "epochs": 3})
    left = [sample.boxes[0, 0].item() for batch in batches(images, small) for sample in batch]
    epochs = [left[:6], left[6:12], left[12:]]
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1
    assert len(set(epochs[0])) == 6
    assert len({tuple(epoch) for epoch in epochs}) == 3
    later = [
        sample.boxes[0, 0].item() for batch in batches(images, small, first=3) for sample in batch
    ]
    assert later == left[10:]  # batches of 4, 2, 4


class Recorder(nn.Module):
    """Stands for a detector: keeps what it is given."""

    def forward(self, images, targets):
        self.images, self.targets = images, targets
        return {"a": images[0].sum(), "b": images[0].sum()}


def test_a_mirrored_image_has_mirrored_boxes(images):
    sample = read_sample(images, 0, TINY)
    recorder = Recorder()
    for flip in (0.0, 1.0):
        settings = DetectionSettings(**{**vars(TINY), "flip": flip})
        loss = batch_loss(recorder, [sample], settings, step=0, device=CPU)
        image, (left, top, right, bottom) = recorder.images[0], recorder.targets[0]["boxes"][0]
        inside = image[:, math.ceil(top) : int(bottom), math.ceil(left) : int(right)]
        assert inside[0].min() > 0.6 > 0.4 > inside[1].max()  # the red square
        assert loss == 2 * image.sum()
    assert recorder.targets[0]["labels"].tolist() == [2, 1]  # 0 is the background


def test_difficult_objects_are_not_learned(voc):
    path = voc / "Annotations/000.xml"
    path.write_text(path.read_text().replace("<bndbox>", "<difficult>1</difficult><bndbox>", 1))
    sample = read_sample(load_voc(f"voc:{voc}", "trainval"), 0, TINY)
    assert sample.labels.tolist() == [1]


def test_the_rate_rises_and_falls_twice():
    settings = DetectionSettings(learning_rate=1.0, warmup=9)
    rates = [rate_at(settings, step, 120) for step in range(120)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10:90] == [1.0] * 80
    assert rates[90:] == pytest.approx([0.1] * 20 + [0.01] * 10)


def test_a_loss_that_is_no_number_ends_the_run(images):
    settings = DetectionSettings(**{**vars(TINY), "learning_rate": 1e30})
    with pytest.raises(DivergedError, match=r"in step \d; pass a smaller --learning-rate"):
        train_detector(tiny_detector(settings), images, settings, device=CPU)


def test_a_broken_image_ends_the_run_by_name(voc, images):
    path = voc / "JPEGImages/003.png"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"003\.png: this image is broken"):
        list(batches(images, TINY))
