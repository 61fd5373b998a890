import dataclasses
from dataclasses import replace

import pytest

from unbackdoor.errors import SettingsError
from unbackdoor.settings import (
    DetectionSettings,
    PurifySettings,
    SearchSettings,
    ViewSettings,
    purify_preset,
)


def test_the_presets_are_the_papers_appendix_a2():
    cifar10, simclr, imagenet = map(purify_preset, ("cifar10", "cifar10-simclr", "imagenet100"))
    assert (cifar10.pull, cifar10.distill, cifar10.align) == (0.3, 0.5, 0.2)
    assert (cifar10.learning_rate, cifar10.momentum, cifar10.weight_decay) == (0.02, 0.9, 5e-4)
    assert (cifar10.epochs, cifar10.batch_size, cifar10.temperature) == (15, 128, 0.5)
    assert (cifar10.search.epsilon, cifar10.search.steps) == (8 / 255, 20)
    assert cifar10.search.step_size == 0.1
    for preset in (cifar10, simclr, imagenet):
        assert (preset.loss, preset.anchor, preset.search.kind) == ("contrastive", "view", "image")
        assert (preset.schedule, preset.batch_norm, preset.clip) == ("constant", "batch", 0)
        assert replace(preset.views, blur=0) == ViewSettings()
    assert simclr.search.steps == 100
    assert (imagenet.pull, imagenet.distill, imagenet.align) == (0.3, 0.7, 0)
    assert (imagenet.search.epsilon, imagenet.search.steps) == (16 / 255, 20)
    assert imagenet.learning_rate == 0.05


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PurifySettings().epochs = 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SearchSettings(epsilon=8), r"\[0, 1\] scale, got 8; for 8 grey levels pass 8/255"),
        (
            lambda: SearchSettings(norm="l2", epsilon=-1),
            "search.epsilon must be at least 0, got -1",
        ),
        (lambda: SearchSettings(steps=-1), "search.steps must be at least 0, got -1"),
        (lambda: PurifySettings(pull=0.9), r"pull \+ distill \+ align must be 1, got .* = 1.1"),
        (lambda: PurifySettings(pull=-0.2, distill=1), "pull must be at least 0, got -0.2"),
        (lambda: PurifySettings(temperature=0), "temperature must be above 0, got 0"),
        (lambda: PurifySettings(temperature=float("nan")), "temperature must be above 0, got nan"),
        (lambda: DetectionSettings(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: DetectionSettings(flip=2), "flip must be at least 0 and at most 1, got 2"),
        (lambda: DetectionSettings(shorter=8), "shorter must be at least 16 and at most 4096"),
        (lambda: PurifySettings(epochs=0), "epochs must be at least 1, got 0"),
        (lambda: PurifySettings(seed=-1), "seed is 0 to 4294967295, .* got -1"),
        (lambda: PurifySettings(batch_size=1), "batch_size must be at least 2, got 1"),
        (lambda: ViewSettings(min_area=0), "views.min_area must be above 0 and at most 1, got 0"),
        (lambda: ViewSettings(grey=1.5), "views.grey must be at least 0 and at most 1, got 1.5"),
    ],
)
def test_values_out_of_range_are_refused_by_name(make, message):
    with pytest.raises(SettingsError, match=message):
        make()


def test_l2_may_exceed_one():
    assert SearchSettings(norm="l2", epsilon=1024 / 255).epsilon > 4
