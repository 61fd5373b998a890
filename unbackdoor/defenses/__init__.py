"""The defenses to compare with, by name; no torch until one of them runs.

Every defense is a function of one signature::

    def defense(
        backbone: Backbone,
        data: DefenseData,
        settings: Settings,
        *,
        device: torch.device | str = "cpu",
        on_step: Callable[[int, int], None] | None = None,
        keep: Keeper | None = None,  # where a loop of it can go on after a kill, see ``keeping``
    ) -> Defended

It returns a repaired copy, never changes the backbone it is given, and is told nothing but images,
perhaps labels, and its own settings.
"""

from typing import NamedTuple

from unbackdoor.defenses import settings


class Entry(NamedTuple):
    """One defense of the table."""

    place: str  # module:function, relative to this package
    settings: type  # a frozen dataclass whose defaults are the published values
    labels: bool  # whether it needs labels, given or predicted


DEFENSES: dict[str, Entry] = {
    "fine-tuning": Entry("fine_tuning:fine_tune", settings.FineTuningSettings, True),
    "fine-pruning": Entry("fine_pruning:fine_prune", settings.FinePruningSettings, True),
    "nad": Entry("nad:distill_attention", settings.NadSettings, True),
    "anp": Entry("anp:prune_sensitive", settings.AnpSettings, True),
    "ibau": Entry("ibau:unlearn", settings.IbauSettings, True),
    "adversarial": Entry("adversarial:fine_tune_adversarially", settings.AdversarialSettings, True),
    "contrastive": Entry(
        "contrastive:fine_tune_contrastively", settings.ContrastiveSettings, False
    ),
    "bcu": Entry("bcu:cleanse", settings.BcuSettings, False),
    "clp": Entry("clp:prune_by_lipschitz", settings.ClpSettings, False),
}
