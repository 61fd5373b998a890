import pytest
import torch

from unbackdoor.data import draw_rows
from unbackdoor.errors import DataError
from unbackdoor.roles import defender_rows, divide_rows


@pytest.mark.parametrize("count", [20, 400, 50_000])
def test_every_row_has_one_role(count):
    roles = divide_rows(count, seed=3)
    assert torch.cat([*roles]).sort().values.equal(torch.arange(count))
    assert [len(rows) for rows in roles[:3]] == [
        round(share * count) for share in (0.05, 0.01, 0.05)
    ]


def test_the_unlabeled_rows_are_those_that_a_repair_from_the_command_line_takes():
    rows = divide_rows(400, seed=3).unlabeled
    assert rows.tolist() == draw_rows(400, 20, seed=3).tolist()


@pytest.mark.parametrize(
    ("labeled", "share"), [(True, 0.01), (True, 0.89), (False, 0.03), (False, 0.05), (False, 0.94)]
)
def test_a_defense_has_no_row_of_the_probe_or_of_validation(labeled, share):
    roles = divide_rows(400, seed=1)
    taken = set(defender_rows(400, labeled=labeled, share=share, seed=1).tolist())
    assert len(taken) == round(share * 400)
    assert not taken & {*roles.probe.tolist(), *roles.validation.tolist()}
    unlabeled = set(roles.unlabeled.tolist())
    if labeled:
        assert not taken & unlabeled
    else:
        assert taken <= unlabeled or taken > unlabeled


@pytest.mark.parametrize(("labeled", "share"), [(True, 0.90), (False, 0.95), (True, 0.002)])
def test_a_share_beyond_what_is_there_is_refused(labeled, share):
    with pytest.raises(DataError, match=f"share {share:g} of 400 images is .* takes 2 to 3"):
        defender_rows(400, labeled=labeled, share=share, seed=0)


def test_a_few_unlabeled_rows_are_drawn_by_the_seed():
    first, again, other = (
        defender_rows(4_000, labeled=False, share=0.01, seed=seed).tolist() for seed in (0, 0, 1)
    )
    assert first == again != other
    assert first != sorted(first)
