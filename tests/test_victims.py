from dataclasses import replace

import pytest
import torch
from torch import nn

from unbackdoor.attacks.poisoning import Attack
from unbackdoor.attacks.triggers import BadNets
from unbackdoor.errors import DataError, DivergedError
from unbackdoor.losses import nt_xent
from unbackdoor.networks import initialize
from unbackdoor.settings import VictimSettings, ViewSettings
from unbackdoor.victims import augmented, rate_at, train_simclr, train_supervised

QUICK = VictimSettings(epochs=3, batch_size=20, learning_rate=0.1, margin=1)
SIMCLR = VictimSettings(epochs=4, batch_size=40, learning_rate=0.1, augment="views", projection=8)


@pytest.fixture
def task(generator):
    """Dark and bright images, told apart by a network of one convolution."""
    labels = torch.arange(200) % 2
    images = torch.randint(0, 100, (200, 3, 6, 6), dtype=torch.uint8, generator=generator)
    images[labels == 1] += 100
    return images, labels


def backbone():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def classifier():
    return nn.Sequential(*backbone(), nn.Linear(4, 2))


def test_training_learns_reports_its_epochs_and_ends_in_eval_mode(task):
    states, steps = [], []
    trained = train_supervised(
        classifier(),
        *task,
        QUICK,
        on_epoch=states.append,
        on_step=lambda step, of: steps.append((step, of)),
    )
    predicted = trained(task[0].float() / 255).argmax(1)
    assert (predicted == task[1]).float().mean() > 0.95
    assert [len(state.history) for state in states] == [1, 2, 3]
    assert states[-1].history[2].loss < states[-1].history[0].loss
    assert steps == [(step, 30) for step in range(1, 31)]
    assert not trained.training


@pytest.mark.parametrize("train", [train_supervised, train_simclr])
def test_training_begins_with_the_tensors_that_it_is_given(train, task):
    still = replace(SIMCLR, epochs=1, learning_rate=1e-12)
    given = {"0.weight": torch.full((4, 3, 3, 3), 0.01)}
    data = task if train is train_supervised else task[:1]
    network = classifier() if train is train_supervised else backbone()
    trained = train(network, *data, still, start=given)
    torch.testing.assert_close(trained[0].weight.detach(), given["0.weight"])
    with pytest.raises(ValueError, match=r"the network has no 9\.weight"):
        train(network, *data, still, start={"9.weight": torch.zeros(1)})


@pytest.mark.parametrize("augment", ["shift", "views", "none"])
def test_a_seed_gives_one_network_whatever_its_first_weights(augment, task):
    settings = replace(QUICK, epochs=1, augment=augment)
    once, again = (train_supervised(classifier(), *task, settings) for _ in range(2))
    torch.testing.assert_close(once.state_dict(), again.state_dict(), rtol=0, atol=0)
    other = train_supervised(classifier(), *task, replace(settings, seed=1))
    assert not once[0].weight.equal(other[0].weight)


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_a_resumed_training_ends_in_the_same_bits(optimizer, task):
    settings = replace(QUICK, optimizer=optimizer, warmup=1)
    states = []
    whole = train_supervised(classifier(), *task, settings, on_epoch=states.append)
    resumed = train_supervised(classifier(), *task, settings, state=states[0])
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    states.clear()
    whole = train_simclr(backbone(), task[0], SIMCLR, on_epoch=states.append)
    resumed = train_simclr(backbone(), task[0], SIMCLR, state=states[1])
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_dropout_is_drawn_by_the_seed_and_goes_on_where_it_was(task):
    def network():
        return nn.Sequential(nn.Dropout(0.5), classifier())

    states = []
    whole = train_supervised(network(), *task, QUICK, on_epoch=states.append)
    torch.rand(7)  # whatever else draws
    resumed = train_supervised(network(), *task, QUICK, state=states[0])
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    off = train_supervised(nn.Sequential(nn.Dropout(0.0), classifier()), *task, QUICK)
    assert not off[1][0].weight.equal(whole[1][0].weight)


def test_an_attack_that_is_redrawn_reaches_the_network_in_every_batch(task):
    images, labels = task
    attack = Attack(BadNets(size=2), target=1, share=0.3, redrawn=True)
    settings = replace(QUICK, epochs=20, augment="none")
    dark = images[labels == 0]

    def hits(network):
        return (network(attack.trigger(dark).float() / 255).argmax(1) == 1).float().mean()

    def network():
        return nn.Sequential(
            nn.Conv2d(3, 8, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(200, 2)
        )

    poisoned = train_supervised(network(), *task, settings, attack=attack, classes=2)
    assert hits(poisoned) > 0.9
    assert hits(train_supervised(network(), *task, settings)) < 0.1


@pytest.mark.parametrize("train", [train_supervised, train_simclr])
def test_a_network_that_crashes_in_channels_last_is_trained_contiguous(train, generator):
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=generator)
    stem = (nn.Conv2d(3, 48, 1, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    if train is train_supervised:
        network, data = nn.Sequential(*stem, nn.Linear(48, 2)), (images, torch.arange(40) % 2)
    else:
        network, data = nn.Sequential(*stem), (images,)
    seen = []
    network[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].is_contiguous()))
    trained = train(network, *data, replace(SIMCLR, epochs=2))
    assert all(seen)
    assert all(weight.isfinite().all() for weight in trained.parameters())


@pytest.mark.parametrize(("rate", "learns"), [(0.3, True), (1e-9, False)])
def test_simclr_brings_two_views_of_an_image_together(rate, learns, task):
    mild = ViewSettings(min_area=0.8, jitter=0.0, grey=0.0)
    settings = replace(SIMCLR, epochs=10, views=mild, learning_rate=rate)
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten())
    states = []
    trained = train_simclr(network, task[0], settings, on_epoch=states.append)
    fallen = states[0].history[0].loss - states[-1].history[-1].loss
    assert (fallen > 0.05) == learns
    assert not trained.training
    assert not any(name.startswith("projection") for name in trained.state_dict())


def test_simclrs_loss_is_nt_xent_of_the_projected_views(task):
    """Without views every pair is equal, so the first step's loss can be computed by hand."""
    images = task[0][:40]
    still = ViewSettings(min_area=1, flip=0, jitter=0, grey=0)
    settings = replace(SIMCLR, epochs=1, views=still, learning_rate=1e-12)
    states = []
    trained = train_simclr(backbone(), images, settings, on_epoch=states.append)
    head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 8))
    weights = states[0].network
    head.load_state_dict(
        {name[11:]: value for name, value in weights.items() if name.startswith("projection.")}
    )
    trained.load_state_dict(
        {name[9:]: value for name, value in weights.items() if name.startswith("backbone.")}
    )
    with torch.no_grad():
        projected = head(trained.train()(images.float() / 255))
    expected = nt_xent(projected, projected, temperature=settings.temperature).item()
    assert states[0].history[0].loss == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_scales_the_step_of_a_matrix_to_its_weights_and_leaves_vectors_alone(decay, task):
    """One step at rate 1, against SimCLR's description of LARS, on the gradient of SGD's step."""
    one = replace(QUICK, epochs=1, batch_size=200, learning_rate=1.0, augment="none")
    before, after = {}, {}
    for optimizer in ("sgd", "lars"):
        settings = replace(one, optimizer=optimizer, weight_decay=decay * (optimizer == "lars"))
        network = classifier()
        initialize(network, generator=torch.Generator().manual_seed(settings.seed))
        before = {name: weight.detach().clone() for name, weight in network.named_parameters()}
        trained = train_supervised(network, *task, settings)
        after[optimizer] = dict(trained.named_parameters())
    for name, weight in before.items():
        gradient = weight - after["sgd"][name]
        expected = weight - gradient
        if weight.ndim > 1:
            norms = weight.norm(), gradient.norm()
            trust = 0.001 * norms[0] / (norms[1] + decay * norms[0])
            expected = weight - trust * (gradient + decay * weight)
        torch.testing.assert_close(after["lars"][name], expected, rtol=1e-3, atol=1e-6)


def test_a_weight_that_no_gradient_reaches_is_no_obstacle(task):
    states = []
    train_supervised(WithSpare(classifier()), *task, QUICK, on_epoch=states.append)
    resumed = train_supervised(WithSpare(classifier()), *task, QUICK, state=states[0])
    assert resumed.spare.equal(torch.ones(3))


class WithSpare(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network
        self.spare = nn.Parameter(torch.ones(3))

    def forward(self, images):
        return self.network(images)


def test_the_rate_rises_over_the_warmup_and_then_falls_along_a_cosine():
    settings = VictimSettings(epochs=10, warmup=2, learning_rate=0.4)
    rates = [rate_at(settings, progress) for progress in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0, 0.2, 0.4, 0.2, 0])


def test_augmentation_is_what_the_settings_say(generator):
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8, generator=generator)
    plain = images.float() / 255
    none = augmented(images, replace(QUICK, augment="none"), generator=generator)
    assert torch.equal(none, plain)
    for augment in ("shift", "views"):
        other = augmented(images, replace(QUICK, augment=augment), generator=generator)
        assert other.shape == plain.shape
        assert not torch.equal(other, plain)


def test_images_that_fill_no_batch_and_a_loss_that_diverges_are_refused(task):
    with pytest.raises(DataError, match="200 training images do not fill one batch of 256"):
        train_supervised(classifier(), *task, replace(QUICK, batch_size=256))
    with pytest.raises(DivergedError, match="the training loss is nan in epoch 1"):
        train_supervised(classifier(), *task, replace(QUICK, learning_rate=1e30))


def test_a_step_has_the_rate_the_decay_and_the_augmentation_of_the_settings(task):
    def states_of(**changed):
        states, usual = [], {"epochs": 2, "batch_size": 200, "augment": "none"}
        settings = replace(QUICK, **{**usual, **changed})
        train_supervised(classifier(), *task, settings, on_epoch=states.append)
        return settings, *states  # an epoch is one step

    start = classifier()
    initialize(start, generator=torch.Generator().manual_seed(0))
    settings, one, two = states_of(weight_decay=0.1)
    _, free, _ = states_of(weight_decay=0.0)
    for name, weight in start.named_parameters():
        expected = one.network[name] - rate_at(settings, 1) * two.momentum[name]
        torch.testing.assert_close(two.network[name], expected)
        decay = one.momentum[name] - free.momentum[name]
        torch.testing.assert_close(decay, 0.1 * weight.detach(), atol=1e-5, rtol=1e-3)
    _, shifted, _ = states_of(weight_decay=0.1, augment="shift")
    assert not shifted.momentum["0.weight"].equal(one.momentum["0.weight"])


def test_a_victim_is_trained_in_the_precision_asked_for(task):
    one = replace(QUICK, epochs=1, augment="none")
    exact, rounded = (
        train_supervised(classifier(), *task, one, precision=precision)[0].weight
        for precision in ("fp32", "bf16")
    )
    assert rounded.dtype == torch.float32
    assert not rounded.equal(exact)
    torch.testing.assert_close(rounded, exact, atol=0.05, rtol=0.1)
