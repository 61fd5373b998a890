"""Contrastive fine-tuning: the third term of the contrastive backdoor defense, alone. No labels."""

from functools import partial
from typing import cast

import torch

from unbackdoor.backbones import Backbone
from unbackdoor.cbd import purify
from unbackdoor.defenses.common import Defended, DefenseData, finished
from unbackdoor.defenses.keeping import Keeper
from unbackdoor.defenses.settings import ContrastiveSettings
from unbackdoor.resume import find_state, save_state
from unbackdoor.settings import PurifySettings, ViewSettings
from unbackdoor.types import OnStep


def fine_tune_contrastively(
    backbone: Backbone,
    data: DefenseData,
    settings: ContrastiveSettings,
    *,
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
    keep: Keeper | None = None,
) -> Defended:
    """Return a copy of ``backbone`` after training two views of each image to agree.

    With ``reference`` statistics the first of them is the plain image.

    A head is carried through unchanged.

    Raises:
        DataError: If the images do not fill one batch.
        DivergedError: If the loss is no longer finite or the features collapse.

    Source:
        "Do We Really Need Labels for Backdoor Defense?", section 4: its method with weights 0, 0
        and 1, https://openreview.net/forum?id=0Hfv9xPBSPQ.
    """
    state = None if keep is None else find_state(keep.path, keep.of)
    if keep is not None and state is not None:
        keep.earlier = sum(epoch.seconds for epoch in state.history)
    purified = purify(
        backbone,
        data.images,
        PurifySettings(
            pull=0.0,
            distill=0.0,
            align=1.0,
            loss="contrastive",
            temperature=settings.temperature,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            clip=0.0,
            schedule="constant",
            batch_norm=settings.batch_norm,
            views=ViewSettings(),
            seed=settings.seed,
        ),
        device=device,
        on_step=on_step,
        state=state,
        on_epoch=None if keep is None else partial(save_state, keep.path, of=keep.of),
    )
    losses = [epoch.align for epoch in purified.history]
    return Defended(finished(cast("Backbone", purified.backbone)), {"losses": losses})
