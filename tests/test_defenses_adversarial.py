from dataclasses import replace

import pytest
import torch
from test_defenses import ONE, QUICK, make_backbone, make_data

from unbackdoor.backbones import network_state
from unbackdoor.batchnorm import batch_norms
from unbackdoor.defenses.adversarial import fine_tune_adversarially
from unbackdoor.defenses.fine_tuning import fine_tune
from unbackdoor.defenses.settings import FineTuningSettings


def weights_of(result):
    return {name: value for name, value in result.backbone.named_parameters()}


def test_with_clean_images_alone_it_is_plain_fine_tuning():
    backbone, data = make_backbone("cifar/wrn16_1"), make_data(16)
    tuned = weights_of(fine_tune(backbone, data, FineTuningSettings(tuning=ONE)))
    clean = fine_tune_adversarially(backbone, data, replace(QUICK["adversarial"], clean=1.0))
    torch.testing.assert_close(weights_of(clean), tuned)
    mixed = weights_of(fine_tune_adversarially(backbone, data, QUICK["adversarial"]))
    assert any(not value.allclose(tuned[name]) for name, value in mixed.items())


def test_only_the_first_epochs_search():
    backbone, data = make_backbone("cifar/wrn16_1"), make_data(16)
    two = replace(ONE, epochs=2)
    settings = replace(QUICK["adversarial"], tuning=two, clean=0.0, adversarial_epochs=0)
    tuned = weights_of(fine_tune(backbone, data, FineTuningSettings(tuning=two)))
    torch.testing.assert_close(weights_of(fine_tune_adversarially(backbone, data, settings)), tuned)
    once, always = (
        weights_of(fine_tune_adversarially(backbone, data, replace(settings, adversarial_epochs=n)))
        for n in (1, 2)
    )
    assert any(not value.allclose(tuned[name]) for name, value in once.items())
    assert any(not value.allclose(always[name]) for name, value in once.items())


def test_the_search_moves_no_statistics():
    backbone, data = make_backbone("cifar/wrn16_1"), make_data(16)
    norms = batch_norms(fine_tune_adversarially(backbone, data, QUICK["adversarial"]).backbone)
    assert norms
    for norm in norms:
        assert norm.num_batches_tracked == 4  # plain and adversarial images of two batches


@pytest.mark.parametrize("other", [{"epsilon": 0.05}, {"step_size": 0.02}, {"steps": 1}])
def test_the_search_is_as_set(other):
    backbone, data = make_backbone("cifar/wrn16_1"), make_data(16)
    settings = replace(QUICK["adversarial"], epsilon=0.1, step_size=0.04, steps=3)
    found, changed = (
        weights_of(fine_tune_adversarially(backbone, data, options))
        for options in (settings, replace(settings, **other))
    )
    assert any(not value.equal(changed[name]) for name, value in found.items())


def test_the_head_is_tuned_with_the_rest():
    backbone, data = make_backbone("cifar/wrn16_1"), make_data(16)
    result = fine_tune_adversarially(backbone, data, QUICK["adversarial"])
    assert not network_state(result.backbone)["fc.weight"].equal(
        network_state(backbone)["fc.weight"]
    )
