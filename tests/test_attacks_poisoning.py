import pytest
import torch

from unbackdoor.attacks.poisoning import Attack, poison
from unbackdoor.attacks.triggers import BadNets
from unbackdoor.errors import DataError


@pytest.fixture
def dataset(generator):
    images = torch.randint(0, 256, (200, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return images, torch.arange(200) % 4


def test_poison_rewrites_exactly_the_rows_that_it_reports(dataset, generator):
    images, labels = dataset
    attack = Attack(BadNets(), target=2, share=0.1)
    poisoned = poison(images, labels, attack, generator=generator)
    rows = poisoned.is_poisoned
    assert rows.sum() == 20
    assert (labels[rows] != 2).all()
    assert (poisoned.labels[rows] == 2).all()
    assert torch.equal(poisoned.images[rows], attack.trigger(images[rows]))
    assert torch.equal(poisoned.images[~rows], images[~rows])
    assert torch.equal(poisoned.labels[~rows], labels[~rows])


@pytest.mark.parametrize("share", [0.9, 0.0])
def test_an_impossible_share_is_refused_with_the_largest_one(share, dataset, generator):
    with pytest.raises(DataError, match=r"150 are not of class 2: pass a share in \(0, 0.750\]"):
        poison(*dataset, Attack(BadNets(), target=2, share=share), generator=generator)


def test_an_absent_target_class_is_refused(dataset, generator):
    with pytest.raises(DataError, match="no image is of the target class 9"):
        poison(*dataset, Attack(BadNets(), target=9), generator=generator)
