import csv
from dataclasses import replace

import pytest

from unbackdoor.bench.cells import ATTACK_NAMES, as_record
from unbackdoor.bench.grid import CLEAN_ROW, entries, read_grid
from unbackdoor.bench.tables import (
    JPEG_CIFAR10,
    all_tables,
    as_csv,
    as_markdown,
    durability_table,
    lines,
    paper_tables,
    scores_table,
)
from unbackdoor.report import Flagged, Table

GRID = """
table = "1"
tier = "{tier}"
data = "cifar10:images"
arch = "cifar/resnet18"
attacks = ["badnets"]
seeds = [0, 1]
clean = false

[[rows]]
name = "No Defense"
defense = "none"

[[rows]]
name = "FT"
defense = "fine-tuning"

[[rows]]
name = "CBD, ours"
defense = "cbd"
"""


@pytest.fixture
def grid(tmp_path):
    """Return a grid of a tier."""

    def make(tier="paper", text=GRID):
        path = tmp_path / "grid.toml"
        path.write_text(text.format(tier=tier))
        return read_grid(path)

    return make


def scores(acc, asr, pa):
    return {"acc": acc, "asr": asr, "pa": pa, "images": 10_000, "triggered": 9_000}


def record(entry, probe, *, head=None, renewed=None, tuned=None, flags=(), seconds=10.0, data="a"):
    """Return a made-up record with these scores after the defense."""
    return {
        "cell": as_record(entry.cell),
        "victim": {"key": entry.cell.victim.key, "sha256": "v"},
        "scores": {
            "after": {
                "probe": scores(*probe),
                "head": head and scores(*head),
                "reestimated": scores(*(renewed or probe)),
                "fine_tuned": scores(*(tuned or probe)),
            }
        },
        "flags": list(flags),
        "seconds": {"defense": seconds, "all": seconds},
        "data": {"probe": 500, "train_sha256": data, "test_sha256": data},
        **{"device": "cpu", "precision": "fp32", "revision": "first"},
    }


def made_up(found):
    """Return records of both seeds without a defense, and of seed 0 with fine-tuning."""
    zero, one = (entry for entry in found if entry.row == "No Defense")
    tuned = next(entry for entry in found if entry.row == "FT")
    return {
        zero.cell.key: record(zero, (0.80, 0.60, 0.30), head=(0.92, 0.99, 0.01)),
        one.cell.key: record(one, (0.84, 0.80, 0.10), head=(0.94, 1.00, 0.00)),
        tuned.cell.key: record(
            tuned,
            (0.90, 0.05, 0.85),
            head=(0.91, 0.06, 0.84),
            renewed=(0.89, 0.75, 0.20),
            tuned=(0.91, 0.10, 0.80),
            flags=["the attack did not take"],
            seconds=30.0,
        ),
    }


def tables_of(grid):
    found = entries(grid)
    return all_tables(grid, found, made_up(found))


def test_mean_and_spread_are_in_percent_and_over_seeds(grid):
    found = entries(grid("cpu"))
    table = scores_table(grid("cpu"), lines(grid("cpu"), found, made_up(found)), "probe")
    assert table.columns == (
        *("attack, defense", "ACC", "±", "ASR", "±", "PA", "±", "seeds", "seconds"),
    )
    spread = 2 / 2**0.5 * 2  # the sample's standard deviation of 80 and 84
    assert table.rows[0] == pytest.approx(
        ("BadNets: No Defense", 82, spread, 70, 10 * 2**0.5, 20, 10 * 2**0.5, 2, 10)
    )
    assert table.rows[1] == (
        *("BadNets: FT", Flagged(90.0, "the attack did not take"), None),
        *(5.0, None, 85.0, None, 1, 30.0),
    )
    assert table.rows[2] == ("BadNets: CBD, ours", *[None] * 6, 0, None)


def test_deviations_have_columns_only_where_there_are_several_seeds(grid):
    made = grid("cpu")
    found, records = entries(made), made_up(entries(made))
    zero = {entry.cell.key for entry in found if entry.cell.seed == 0}
    one = {key: made_of for key, made_of in records.items() if key in zero}
    for table in all_tables(made, found, records):
        assert "±" in table.columns
    for table in all_tables(made, found, one):
        assert "±" not in table.columns
    table = all_tables(made, found, one)[0]
    assert table.columns == ("attack, defense", "ACC", "ASR", "PA", "seeds", "seconds")
    assert table.rows[0] == pytest.approx(("BadNets: No Defense", 80, 60, 30, 1, 10))


@pytest.mark.parametrize("tier", ["paper", "h200"])
def test_the_papers_number_and_the_difference_stand_beside_ours(grid, tier):
    table = tables_of(grid(tier))[0]
    assert "the paper's reading" in table.title
    assert table.columns[1:5] == ("ACC", "±", "paper", "ours − paper")
    printed = paper_tables()["table1"]["data"]["BadNets"]["No Defense"]
    row = table.rows[0]  # read by the victim's own head: 92 and 94
    assert row[1] == pytest.approx(93)
    assert row[3] == printed["ACC"] == 93.25
    assert row[4] == pytest.approx(-0.25)
    assert table.rows[1][1].value == 91  # a baseline keeps its head
    assert table.rows[2][3:5] == (None, None)  # the paper has no such row


def test_beside_the_paper_stands_a_probe_where_it_used_one(grid):
    made = grid("paper")
    found = entries(made)
    cbd = next(entry for entry in found if entry.row == "CBD, ours")
    headless = next(entry for entry in found if entry.row == "FT")
    records = {
        cbd.cell.key: record(cbd, (0.90, 0.05, 0.85), head=(0.50, 0.06, 0.84)),
        headless.cell.key: record(headless, (0.80, 0.05, 0.85)),
    }
    table = all_tables(made, found, records)[0]
    assert [row[1] for row in table.rows] == [None, 80, 90]


@pytest.mark.parametrize(
    ("old", "new"), [("cifar10:images", "fashion-mnist"), ("cifar/resnet18", "cifar/wrn16_1")]
)
def test_no_number_of_the_paper_stands_beside_other_images_and_networks(grid, old, new):
    found = tables_of(grid("paper", GRID.replace(old, new)))
    assert not any("paper" in column for table in found for column in table.columns)
    assert "Not comparable with the paper" in found[0].note


@pytest.mark.parametrize("tier", ["cpu", "smoke"])
def test_no_number_of_the_paper_stands_beside_a_reduced_schedule(grid, tier):
    found = tables_of(grid(tier))
    assert not [t for t in found if "paper" in t.columns or "paper's reading" in t.title]
    assert all("Not comparable with the paper" in table.note for table in found)
    assert "paper" not in "".join(t.title for t in found)


def detected(made, seed, ap, pap, *, images="a"):
    """Return the record of a cell with a detector: VOC 2007's AP, and a COCO's that is another."""
    return {
        **made,
        "detection": {
            "scores": {
                "clean": {"voc07": ap, "coco": 0.1},
                "triggered": {"voc07": pap, "coco": 0.2},
            },
            "data": {"images": 72, "sha256": images},
            "flags": ["only 72 test images", *(["a doubt"] if seed else [])],
            "seconds": {"training": 100.0 + seed, "scoring": 5.0},
            "device": f"GPU {images}",
            **{name: made[name] for name in ("precision", "revision")},
        },
    }


@pytest.fixture
def table6(grid):
    """Return a grid of a tier, and its tables, where three rows have records of two seeds."""

    def make(tier, images=("a", "a"), *, images_of="imagenet100", detection="voc:VOC2007"):
        text = GRID.replace('"1"', '"6"').replace('"badnets"', '"blend"')
        text = text.replace("cifar10:images", images_of)
        text = text.replace("clean = false", f'[detection]\ndata = "{detection}"\nepochs = 3')
        made = grid(tier, text.replace('"CBD, ours"', '"CBD"'))
        found, records = entries(made), {}
        for entry in found:
            if entry.row in (CLEAN_ROW, "No Defense"):
                seed, plain = entry.cell.seed, record(entry, (0.8, 0.1, 0.8))
                pap = (0.3 if entry.row == CLEAN_ROW else 0.2) + 0.1 * seed
                records[entry.cell.key] = detected(plain, seed, 0.64, pap, images=images[seed])
        return all_tables(made, found, records)

    return make


@pytest.mark.parametrize("tier", ["paper", "h200"])
def test_table_6_is_ap_and_pap_beside_the_papers(table6, tier):
    table, *others = table6(tier)
    assert table.title.endswith("average precision")
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert table.rows[0][0] == f"Blend: {CLEAN_ROW}"
    assert table.columns[1:9] == (
        *("AP", "±", "paper", "ours − paper", "PAP", "±", "paper", "ours − paper"),
    )
    assert table.rows[0][1].value == pytest.approx(64)
    assert table.rows[0][1].flag == "only 72 test images; a doubt (seed 1)"
    spread = 5 * 2**0.5  # the sample's standard deviation of 30 and 40
    assert table.rows[0][2:9] == pytest.approx((0, 65.86, -1.86, 35, spread, 37.06, -2.06))
    assert (row["seeds"], row["seconds"]) == (2, 100.5)
    assert table.rows[1][5:9] == pytest.approx((25, spread, 30.64, -5.64))
    cbd = {row[0]: row for row in table.rows}["Blend: CBD"]
    assert cbd[1:] == (*(None, None, 64.65, None, None, None, 43.82, None), None, None, 0, None)
    assert (row["COCO's AP"], row["COCO's PAP"]) == pytest.approx((10, 20))
    for words in ("as VOC 2007 defines it", "72 test images", "nor which average precision"):
        assert words in table.note
    assert "epochs 3" in table.lead
    assert "different images" not in table.note
    assert "ACC on" not in table.note
    assert [other.title.rpartition(": ")[2] for other in others] == [
        *("linear probe before and after", "the backbone's own head before and after"),
        "does it last?",
    ]


@pytest.mark.parametrize("tier", ["cpu", "smoke"])
def test_no_ap_of_the_paper_stands_beside_a_reduced_schedule(table6, tier):
    table = table6(tier)[0]
    assert table.columns[1:5] == ("AP", "±", "PAP", "±")
    assert table.rows[1][2:5] == pytest.approx((0, 25, 5 * 2**0.5))
    assert "Not comparable with the paper" in table.note
    assert "nor which average precision" not in table.note


@pytest.mark.parametrize("other", [{"images_of": "cifar10:images"}, {"detection": "voc:bccd"}])
def test_no_ap_of_the_paper_stands_beside_other_images(table6, other):
    assert "paper" not in table6("paper", **other)[0].columns


def test_the_note_tells_of_detectors_that_are_scored_on_different_images(table6):
    note = table6("cpu", images=("a", "b"))[0].note
    assert "scored on different images" in note
    assert "The records are of 2 devices: GPU a, GPU b." in note


def test_the_twin_tells_removed_from_masked(grid):
    found = entries(grid())
    records = made_up(found)
    table = durability_table(grid(), lines(grid(), found, records))
    assert not any("own head" in column for column in table.columns)
    for record in records.values():
        record["scores"]["after"]["head_reestimated"] = scores(0.8, 0.7, 0.2)
    later = durability_table(grid(), lines(grid(), found, records))
    assert later.columns[-5:-1] == (
        "own head: ASR delivered",
        "±",
        "own head: ASR re-estimated",
        "±",
    )
    assert {row[-3] for row in later.rows} >= {70.0}
    for record in records.values():
        record["scores"]["after"]["head_fine_tuned"] = scores(0.8, 0.6, 0.3)
    latest = durability_table(grid(), lines(grid(), found, records))
    assert latest.columns[-3:-1] == ("own head: ASR fine-tuned", "±")
    assert {row[-3] for row in latest.rows} >= {60.0}
    row = dict(zip(table.columns, table.rows[1], strict=True))
    assert row["ASR delivered"] == pytest.approx(5)
    assert row["ASR re-estimated"] == pytest.approx(75)
    assert row["ASR fine-tuned"] == pytest.approx(10)
    assert row["worst ASR"] == pytest.approx(75)
    assert row["comes back"] == pytest.approx(70)
    assert row["PA re-estimated"] == pytest.approx(20)
    assert table.rows[2][1:-1] == (None,) * 22
    assert tables_of(grid())[-1].title.endswith("does it last?")


def test_the_worst_reading_is_that_of_each_seed(grid):
    found = entries(grid())
    records = made_up(found)
    zero, one = (entry for entry in found if entry.row == "No Defense")
    records[zero.cell.key] = record(zero, (0.8, 0.1, 0.8), renewed=(0.8, 0.9, 0.1))
    records[one.cell.key] = record(one, (0.8, 0.1, 0.8), tuned=(0.8, 0.7, 0.1))
    table = durability_table(grid(), lines(grid(), found, records))
    row = dict(zip(table.columns, table.rows[0], strict=True))
    asr = (row[f"ASR {when}"] for when in ("delivered", "re-estimated", "fine-tuned"))
    assert (*asr, row["worst ASR"], row["comes back"]) == pytest.approx((10, 50, 40, 80, 70))
    spread = table.rows[0][table.columns.index("comes back") + 1]
    assert spread == pytest.approx(10 * 2**0.5)  # of 80 and 60


def test_a_clean_victim_is_a_row_of_each_attack(grid):
    made = grid(text=GRID.replace("clean = false", ""))
    table = all_tables(made, entries(made), {})[0]
    assert table.rows[0][0] == f"BadNets: {CLEAN_ROW}"


def test_a_flag_names_its_seeds_where_not_all_have_it(grid):
    made = grid("cpu")
    found = entries(made)
    records = made_up(found)
    one = next(e for e in found if e.row == "No Defense" and e.cell.seed == 1)
    records[one.cell.key] = record(one, (0.8, 0.1, 0.8), flags=["doubtful"])
    assert scores_table(made, lines(made, found, records), "probe").rows[0][1].flag == (
        "doubtful (seed 1)"
    )


def test_the_note_tells_of_cifar10_from_jpeg_files(grid):
    made = grid("paper")
    found = entries(made)
    for data, told in (("b", False), (JPEG_CIFAR10, True)):
        records = {entry.cell.key: record(entry, (0.8, 0.1, 0.8), data=data) for entry in found}
        note = scores_table(made, lines(made, found, records), "probe").note
        assert ("JPEG files of quality 75" in note) == told


def test_the_scores_of_all_readings_can_be_had_as_csv(grid):
    made = grid("cpu")
    found = entries(made)
    rows = list(csv.DictReader(as_csv(made, found, made_up(found)).splitlines()))
    assert len(rows) == 3 * 4  # each record's readings after the defense
    (one,) = (r for r in rows if (r["row"], r["reading"]) == ("FT", "reestimated"))
    assert {name: one[name] for name in ("grid", "attack", "labels", "share", "seed", "when")} == {
        **{"grid": "grid", "attack": "badnets", "labels": "given", "share": "0.01"},
        **{"seed": "0", "when": "after"},
    }
    assert (one["acc"], one["asr"], one["pa"]) == ("0.89", "0.75", "0.2")
    assert (one["images"], one["flags"]) == ("10000", "the attack did not take")


def test_the_note_tells_of_few_seeds_and_of_different_images(grid):
    made = grid("cpu")
    found = entries(made)
    records = made_up(found)
    assert "fewer than 3 seeds" in scores_table(made, lines(made, found, records), "probe").note
    tuned = next(entry for entry in found if entry.row == "FT")
    records[tuned.cell.key] = record(tuned, (0.8, 0.1, 0.8), data="b")
    note = scores_table(made, lines(made, found, records), "probe").note
    assert "The records are of different images." in note
    assert "different victims" not in note
    records[tuned.cell.key]["victim"]["sha256"] = "another"
    note = scores_table(made, lines(made, found, records), "probe").note
    assert "Rows of one attack and seed are of different victims: one was trained anew" in note
    assert "The records are of 2" not in note
    assert "scorings" not in note
    records[tuned.cell.key] |= {"scoring": 2}
    note = scores_table(made, lines(made, found, records), "probe").note
    assert "The records are of several scorings" in note
    records[tuned.cell.key] |= {"device": "another", "revision": "later"}
    note = scores_table(made, lines(made, found, records), "probe").note
    assert "The records are of 2 devices: cpu, another." in note
    assert "The records are of 2 revisions of the code." in note
    assert "share one victim" not in note
    assert "never poisoned" not in note
    beside = replace(made, clean=True)
    assert "never poisoned" in scores_table(beside, lines(beside, found, records), "probe").note
    shared = replace(made, victim_seed=0)
    note = scores_table(shared, lines(shared, found, records), "probe").note
    assert "Seeds share one victim: ± is of split and defense alone." in note


def test_simclr_has_no_table_of_own_heads(grid):
    made = grid("cpu", GRID.replace("seeds =", 'training = "simclr"\nseeds ='))
    titles = [table.title.rpartition(": ")[2] for table in all_tables(made, entries(made), {})]
    assert titles == ["linear probe before and after", "does it last?"]


def test_the_papers_tables_are_all_there_and_their_attacks_are_known():
    assert set(paper_tables()) >= {f"table{number}" for number in range(1, 11)}
    for number in range(1, 11):
        assert set(paper_tables()[f"table{number}"]["data"]) <= set(ATTACK_NAMES.values())


def test_what_a_record_says_steers_neither_terminal_nor_table():
    table = Table("T", ("a", "b"), (("x|\x1b[2J", Flagged(1.0, "why\n| y |")),), 1)
    text = as_markdown(table)
    assert "| x\\|?[2J | 1.0 [1] |" in text
    assert "[1] why?\\| y \\|" in text


def test_a_table_is_written_as_markdown_with_its_flags():
    table = Table("T", ("a", "b"), (("x", Flagged(1.25, "why")), ("y", None), ("z", -0.04)), 1)
    table = replace(table, lead="L", note="N")
    assert as_markdown(table).splitlines() == [
        *("**T**", "", "L", "", "| a | b |", "| --- | --: |"),
        *("| x | 1.2 [1] |", "| y | – |", "| z | 0.0 |"),
        *("", "[1] why", "N"),
    ]
