from dataclasses import replace
from pathlib import Path

import pytest
import torch

from unbackdoor.bench.cells import as_record
from unbackdoor.bench.features import as_base64, compressed, from_base64
from unbackdoor.bench.grid import CLEAN_ROW, entries, read_grid
from unbackdoor.bench.report import Part as ReportPart
from unbackdoor.bench.report import (
    comparison,
    curves,
    figures,
    origins,
    report_of,
    sections_of,
)
from unbackdoor.bench.tables import lines

SMOKE = Path(__file__).resolve().parents[1] / "grids" / "smoke.toml"


def record(cell):
    """Return a made-up record of a cell, with losses of two epochs where it has some."""
    scores = {"acc": 0.8, "asr": 0.1, "pa": 0.7, "images": 200, "triggered": 180}
    readers = ("head", "probe", "neighbours", "reestimated", "fine_tuned")
    losses = {"pull": 2.0, "distill": 1.0, "align": 0.5, "total": 1.2, "seconds": 1.0}
    return {
        "cell": as_record(cell),
        "victim": {"key": cell.victim.key, "sha256": "v"},
        "scores": {"after": dict.fromkeys(readers, scores)},
        "history": [losses, losses] if cell.defense == "cbd" else [],
        "flags": ["made up"],
        "seconds": {"defense": 1.0, "all": 2.0},
        "data": {"probe": 40, "train_sha256": "a", "test_sha256": "a"},
        "device": "cpu, 2 threads",
        "precision": "fp32",
        "versions": {"python": "3.11", "torch": "2.11"},
        "revision": "abc123",
    }


@pytest.fixture
def part():
    grid = read_grid(SMOKE)
    found = entries(grid)
    return ReportPart(grid, found, {entry.cell.key: record(entry.cell) for entry in found})


@pytest.fixture
def kept(generator):
    """Return what is kept of a cell for the figures."""

    def groups():
        return {
            name: torch.randn(8, 20, generator=generator)
            for name in ("shirt", "target: bag", "triggered", "adversarial")
        }

    raw = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return {
        "title": "badnets, supervised, seed 0",
        "panels": {"before": compressed(groups()), "after": compressed(groups())},
        "strong": ["target: bag", "triggered", "adversarial"],
        "attack": {"clean": as_base64(raw), "triggered": as_base64(255 - raw)},
    }


def test_the_report_is_one_page_with_everything_in_it(part, kept):
    key = next(entry.cell.key for entry in part.found if entry.row == "CBD")
    page = report_of([part], {key: kept}, {})
    assert page.count("<table") == 3
    assert page.count("<img") == 2 * 2 + 1 + 2 + 1  # scatters, losses, features, trigger
    alone = {name: value for name, value in kept.items() if name != "attack"}
    without = report_of([part], {key: alone}, {})  # images are not kept in git
    assert without.count("<img") == page.count("<img") - 1
    title = "badnets, supervised, seed 0, cifar/wrn16_1, row CBD"
    figures = (f"Features: {title}", f"Trigger: {title}")
    for words in ("4 of 4 cells", "does it last?", "made up", "abc123", *figures):
        assert words in page
    for features, lacks in (({key: kept}, False), ({key: alone}, True), ({}, True)):
        page = report_of([part], features, {})
        assert ("Pictures that are lacking" in page) == lacks
        assert ("unbackdoor bench draw makes them:\nsmoke: BadNets, row CBD" in page) == lacks
    assert "<script" not in page
    assert "http" not in page.partition("<main>")[2].replace("http://www.w3.org", "")


def test_the_losses_of_every_row_of_the_method_are_drawn(part):
    first = replace(next(row for row in part.grid.rows if row.name == "CBD"), name="eps=2")
    grid = replace(part.grid, rows=(first, *part.grid.rows))
    found = entries(grid)
    rows = lines(grid, found, {entry.cell.key: record(entry.cell) for entry in found})
    drawn = curves(grid, rows)
    assert [picture.title.rpartition(": ")[2] for picture in drawn] == [
        *("losses of eps=2", "losses of CBD"),
    ]
    clean = [line._replace(row=CLEAN_ROW, attack=name) for line in rows for name in ("sig", "cla")]
    (shared,) = curves(grid, [line for line in clean if line.records[0]["history"]])
    assert shared.caption.endswith("in this order: SIG.")
    caption = "The first seed that has a record; in this order: BadNets."
    assert all(picture.caption == caption for picture in drawn)
    assert curves(grid, [line for line in rows if line.row not in ("eps=2", "CBD")]) == []


def test_the_report_counts_what_computed_the_records(part):
    other = next(iter(part.records.values()))
    other["revision"] = "def456"
    some = part._replace(records=dict(list(part.records.items())[1:]))
    assert origins([part, some]).text.splitlines() == [
        "3 × cpu, 2 threads, fp32; revision abc123; python 3.11, torch 2.11",
        "1 × cpu, 2 threads, fp32; revision def456; python 3.11, torch 2.11",
    ]
    other["detection"] = {**other, "device": "a GPU"}
    assert origins([part]).text.splitlines()[-1] == (
        "1 × detector, a GPU, fp32; revision def456; python 3.11, torch 2.11"
    )


def test_the_report_draws_what_detectors_find_row_by_row(part):
    panels = [{"svg": "<svg></svg>", "alt": "found, triggered: 0 boxes"}]
    kept = {"title": "7.png", "panels": panels, "caption": "Detections."}
    entry = next(entry for entry in part.found if entry.row == "CBD")
    page = report_of([part], {}, {entry.cell.key: [kept]})
    assert "<h2>Detections: BadNets: CBD, seed 0, 7.png</h2>" in page
    assert "found, triggered: 0 boxes" in page
    assert "Detections:" not in report_of([part], {}, {})


def test_a_grid_without_records_has_no_section(part):
    assert sections_of(part._replace(records={})) == []
    assert "0 of 4 cells" in report_of([part._replace(records={})], {}, {})


def test_the_comparison_has_a_point_for_each_attack_and_row(part):
    other = {"acc": 0.6, "asr": 0.9, "pa": 0.3}
    for made in part.records.values():
        made["scores"]["after"]["head"] = other
    head = comparison(part.grid, lines(*part), "head")
    assert "CLP: 60.0 90.0" in head.panels[0].alt
    assert "CLP: 60.0 30.0" in head.panels[1].alt
    picture = comparison(part.grid, lines(*part), "probe")
    assert [panel.alt.partition(",")[0] for panel in picture.panels] == [
        *("ASR over ACC", "PA over ACC"),
    ]
    assert "CLP: 80.0 10.0" in picture.panels[0].alt
    assert "CLP: 80.0 70.0" in picture.panels[1].alt


def test_features_keep_their_cosines_where_few_components_hold_all(generator):
    low = torch.randn(30, 5, generator=generator) @ torch.randn(5, 40, generator=generator)
    kept = torch.tensor(compressed({"a": low[:10], "b": low[10:]})["b"])
    unit = torch.nn.functional.normalize
    expected, found = (unit(x) @ unit(x).T for x in (low[10:], kept))
    assert (expected - found).abs().max() < 0.01
    assert kept.shape == (20, 12)


def test_images_survive_json(generator):
    raw = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8, generator=generator)
    assert from_base64(as_base64(raw)).equal(raw)


def test_figures_are_the_same_for_the_same_record(kept):
    one, other = (figures(kept, "title") for _ in range(2))
    assert [panel.svg for panel in one[0].panels] == [panel.svg for panel in other[0].panels]
