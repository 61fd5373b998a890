import sys

import pytest
import torch

from unbackdoor.detection.precision import Found, average_precision, voc_class
from unbackdoor.detection.voc import Objects, load_voc
from unbackdoor.errors import DataError

NOTHING = Found(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0))


def objects(*boxes, labels=None, difficult=None):
    count = len(boxes)
    return Objects(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels or [0] * count, dtype=torch.int64),
        torch.tensor(difficult or [False] * count),
    )


def found(*pairs, label=0):
    boxes, scores = [box for box, _ in pairs], [score for _, score in pairs]
    return Found(
        torch.tensor(boxes).float(), torch.full((len(pairs),), label), torch.tensor(scores)
    )


def truth_as_found(truth):
    return [Found(x.boxes, x.labels, torch.ones(len(x.labels))) for x in truth]


A, B, FAR = (0, 0, 10, 10), (20, 20, 30, 30), (50, 50, 60, 60)


def test_a_detector_that_is_given_the_truth_scores_1(voc):
    images = load_voc(f"voc:{voc}", "test")
    score = average_precision(truth_as_found(images.objects), images.objects, classes=2)
    assert score[:4] == (1.0, 1.0, 1.0, 1.0)
    assert score.classes == (1.0, 1.0)
    nothing = average_precision([NOTHING] * 4, images.objects, classes=2)
    assert nothing[:4] == (0.0, 0.0, 0.0, 0.0)


def test_vocs_precision_of_a_case_computed_by_hand():
    """Right, wrong, right: precision 1 up to recall .5, then 2/3."""
    truth = [objects(A, B)]
    seen = [found((A, 0.9), (FAR, 0.8), (B, 0.7))]
    assert voc_class(seen, truth, 0) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert voc_class([found((A, 0.9), (FAR, 0.8))], truth, 0) == pytest.approx(6 / 11)


def test_an_object_is_found_once():
    truth = [objects(A)]
    twice = found((A, 0.9), (A, 0.8))
    assert voc_class([twice], truth, 0) == 1.0  # the second is wrong, but comes late
    shifted = ((1, 0, 11, 10), 0.9)
    assert voc_class([found((FAR, 0.95), shifted)], truth, 0) == pytest.approx(0.5)


def test_an_overlap_of_half_is_enough_and_less_is_not():
    truth = [objects((0, 0, 10, 10))]
    assert voc_class([found(((0, 0, 10, 5), 0.9))], truth, 0) == 1.0
    assert voc_class([found(((0, 0, 10, 4.9), 0.9))], truth, 0) == 0.0


def test_a_difficult_object_counts_neither_way():
    truth = [objects(A, B, difficult=[False, True])]
    assert voc_class([found((B, 0.9), (A, 0.8))], truth, 0) == 1.0
    assert voc_class([found((A, 0.8))], truth, 0) == 1.0
    both = average_precision([found((B, 0.9), (A, 0.8))], truth, classes=1)
    assert both.coco == 1.0
    easy = [objects(A, B)]
    assert average_precision([found((A, 0.8))], easy, classes=1).coco50 < 0.6


def test_a_class_without_objects_is_left_out_of_the_mean():
    truth = [objects(A, labels=[1])]
    score = average_precision([found((A, 0.9), label=1)], truth, classes=3, measure="voc07")
    assert score.classes == (None, 1.0, None)
    assert score.voc07 == 1.0
    assert score.coco is None
    with pytest.raises(DataError, match="there is no object to find"):
        average_precision([NOTHING], [objects(A, difficult=[True])], classes=1)


def overlap(a, b):
    across = min(a[2], b[2]) - max(a[0], b[0])
    down = min(a[3], b[3]) - max(a[1], b[1])
    both = max(across, 0) * max(down, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def naive_voc(seen, truth):
    """The 11-point average precision of one class as section 4.2 of VOC's paper has it."""
    everything = sorted(
        ((s, i, box) for i, x in enumerate(seen) for box, _, s in zip(*map(list, x), strict=True)),
        key=lambda entry: -float(entry[0]),
    )
    total = sum(len(x.boxes) for x in truth)
    used, points, hits = set(), [], 0
    for rank, (_, image, box) in enumerate(everything, start=1):
        rivals = [overlap(box.tolist(), other.tolist()) for other in truth[image].boxes]
        best = max(range(len(rivals)), key=rivals.__getitem__) if rivals else None
        if best is not None and rivals[best] >= 0.5 and (image, best) not in used:
            used.add((image, best))
            hits += 1
        points.append((hits / total, hits / rank))
    levels = [
        max((p for r, p in points if r >= tenth / 10 - 1e-9), default=0.0) for tenth in range(11)
    ]
    return sum(levels) / 11


@pytest.mark.parametrize("seed", range(5))
def test_vocs_precision_is_the_papers_formula(seed):
    draws = torch.Generator().manual_seed(seed)
    truth, seen = [], []
    for _ in range(6):
        count = int(torch.randint(0, 5, (), generator=draws))
        corner = torch.rand(count, 2, generator=draws) * 60
        boxes = torch.cat([corner, corner + 10 + 20 * torch.rand(count, 2, generator=draws)], 1)
        truth.append(Objects(boxes, torch.zeros(count, dtype=torch.int64), torch.zeros(count) > 0))
        guesses = boxes.repeat(2, 1) + 3 * torch.randn(2 * count, 4, generator=draws)
        guesses[:, 2:] = torch.maximum(guesses[:, 2:], guesses[:, :2] + 1)
        labels = torch.zeros(2 * count, dtype=torch.int64)
        seen.append(Found(guesses, labels, torch.rand(2 * count, generator=draws)))
    expected = naive_voc(seen, truth)
    assert 0.1 < expected < 0.95
    assert voc_class(seen, truth, 0) == pytest.approx(expected, abs=1e-6)


def test_cocos_precision_without_its_packages_says_how_to_get_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    truth = [objects(A)]
    with pytest.raises(DataError, match=r"pip install '.\[detection\]' .*; --measure voc07"):
        average_precision(truth_as_found(truth), truth, classes=1)
    assert average_precision(truth_as_found(truth), truth, classes=1, measure="voc07").voc07 == 1
