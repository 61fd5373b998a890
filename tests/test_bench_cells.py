from dataclasses import replace

from unbackdoor.bench.cells import Cell, Detection, Victim, as_record, describe, key_of
from unbackdoor.settings import DetectionSettings, VictimSettings

VICTIM = Victim(
    attack="badnets",
    training="supervised",
    arch="cifar/wrn16_1",
    data="cifar10",
    size=0,
    target=6,
    seed=0,
    settings=None,
)
CELL = Cell(VICTIM, "badnets", "clp", (("deviations", 3.0),), "none", 0.05, 0)
DETECTION = Detection("bccd", "trainval", "test", (), DetectionSettings())


def test_a_key_stays_what_it_is_for_records_are_found_by_it():
    assert VICTIM.key == "938bd0044dbdf7d3eb5f"
    assert CELL.key == "15220807a147dcd9e10d"
    record = as_record(CELL)
    assert not {"detection", "code"} & record.keys()  # which cells did not have then
    assert "start" not in record["victim"]


def test_a_key_does_not_depend_on_the_order_of_a_table():
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})


def test_each_part_of_a_cell_and_of_its_victim_is_part_of_the_key():
    others = [
        replace(CELL, attack="blend"),
        replace(CELL, defense="none"),
        replace(CELL, settings=(("deviations", 2.0),)),
        replace(CELL, labels="pseudo"),
        replace(CELL, share=0.01),
        replace(CELL, seed=1),
        replace(CELL, victim=replace(VICTIM, attack="blend")),
        replace(CELL, victim=replace(VICTIM, training="simclr")),
        replace(CELL, victim=replace(VICTIM, arch="cifar/resnet18")),
        replace(CELL, victim=replace(VICTIM, data="fashion-mnist")),
        replace(CELL, victim=replace(VICTIM, size=64)),
        replace(CELL, victim=replace(VICTIM, target=1)),
        replace(CELL, victim=replace(VICTIM, seed=1)),
        replace(CELL, victim=replace(VICTIM, settings=VictimSettings())),
        replace(CELL, victim=replace(VICTIM, settings=VictimSettings(epochs=1))),
        replace(CELL, victim=replace(VICTIM, start="1a2b")),
        replace(CELL, code="1a2b"),
        replace(CELL, detection=DETECTION),
        replace(CELL, detection=replace(DETECTION, data="VOC2007")),
        replace(CELL, detection=replace(DETECTION, train="train")),
        replace(CELL, detection=replace(DETECTION, test="val")),
        replace(CELL, detection=replace(DETECTION, stages=("layer1", "layer2"))),
        replace(CELL, detection=replace(DETECTION, settings=DetectionSettings(epochs=1))),
    ]
    assert len({cell.key for cell in [CELL, *others]}) == len(others) + 1


def test_a_cell_is_told_in_one_line():
    assert describe(CELL) == "badnets supervised cifar/wrn16_1, clp, seed 0"
    clean = replace(CELL, victim=replace(VICTIM, attack="clean"), labels="pseudo")
    assert describe(clean) == (
        "clean under badnets supervised cifar/wrn16_1, clp, pseudo labels, seed 0"
    )
    assert describe(replace(CELL, detection=DETECTION)) == (
        "badnets supervised cifar/wrn16_1, clp, a detector on bccd, seed 0"
    )
