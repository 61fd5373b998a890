from dataclasses import replace

import pytest
import torch
from test_defenses import QUICK, make_backbone, make_data

from unbackdoor.backbones import network_state
from unbackdoor.cbd import purify
from unbackdoor.defenses.contrastive import fine_tune_contrastively
from unbackdoor.settings import PurifySettings, ViewSettings


@pytest.mark.parametrize(("temperature", "batch_norm"), [(0.5, "reference"), (0.2, "batch")])
def test_it_is_purify_with_its_third_term_alone(temperature, batch_norm):
    backbone, data = make_backbone("cifar/wrn16_1"), make_data(16)
    options = replace(QUICK["contrastive"], temperature=temperature, batch_norm=batch_norm)
    result = fine_tune_contrastively(backbone, data, options)
    settings = PurifySettings(
        pull=0.0,
        distill=0.0,
        align=1.0,
        loss="contrastive",
        clip=0.0,
        schedule="constant",
        views=ViewSettings(),
        epochs=1,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        temperature=temperature,
        batch_norm=batch_norm,
    )
    expected = purify(backbone, data.images, settings).backbone
    torch.testing.assert_close(
        network_state(result.backbone), network_state(expected), rtol=0, atol=0
    )
    assert network_state(result.backbone)["fc.weight"].equal(network_state(backbone)["fc.weight"])
    assert len(result.log["losses"]) == 1
