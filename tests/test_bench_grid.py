import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from unbackdoor.attacks.named import ATTACKS
from unbackdoor.bench.cells import ATTACK_NAMES, Detection, describe
from unbackdoor.bench.grid import (
    CLEAN_ROW,
    data_name,
    describe_schedule,
    entries,
    find_own,
    read_grid,
    settings_of,
    unique_cells,
)
from unbackdoor.bench.tables import PAPER_ROWS, Line, label, paper_figures, paper_tables
from unbackdoor.defense_jobs import find_defense
from unbackdoor.errors import DataError, SettingsError
from unbackdoor.settings import DetectionSettings, PurifySettings, SearchSettings, purify_preset

GRIDS = Path(__file__).resolve().parents[1] / "grids"
SHARED_PAPER = Path(__file__).resolve().parents[2] / "shared" / "paper"
TEXT = """
table = "1"
tier = "cpu"
data = "cifar10:../images"
arch = "cifar/wrn16_1"
preset = "cpu"
attacks = ["badnets", "cla"]
seeds = [0, 1]

[victim]
epochs = 3

[cbd]
preset = "cifar10"
epochs = 4
search = { steps = 8 }

[[rows]]
name = "No Defense"
defense = "none"

[[rows]]
name = "ANP"
defense = "anp"
settings = { iterations = 50, epsilon = "1/4" }

[[rows]]
name = "CBD"
defense = "cbd"

[[rows]]
name = "eps=2"
defense = "cbd"
settings = { search = { epsilon = "2/255" } }
"""


@pytest.fixture
def write(tmp_path):
    """Write a grid file, with one text replaced; returns its path."""

    def run(old="", new="", text=TEXT):
        assert old in text
        path = tmp_path / "grid.toml"
        path.write_text(text.replace(old, new, 1))
        return path

    return run


def test_a_grid_is_rows_by_attacks_by_seeds_and_a_clean_victim_for_each_attack(write):
    found = entries(read_grid(write()))
    assert len(found) == 2 * (2 + 2 * 4)
    clean = [entry for entry in found if entry.row == CLEAN_ROW]
    assert [(entry.attack, entry.cell.attack) for entry in clean][:2] == [
        ("badnets", "badnets"),
        ("cla", "cla"),
    ]
    assert {entry.cell.victim.attack for entry in clean} == {"clean"}
    assert len({entry.cell.victim.key for entry in clean}) == 2  # one a seed


def test_cells_hold_the_preset_then_the_grid_then_the_row(write):
    cells = {entry.row: entry.cell for entry in entries(read_grid(write())) if entry.cell.seed == 1}
    settings = settings_of(cells["eps=2"])
    assert settings == replace(
        purify_preset("cifar10"),
        epochs=4,
        seed=1,
        search=SearchSettings(kind="image", steps=8, epsilon=2 / 255),
    )
    assert settings_of(cells["CBD"]).search.epsilon == 8 / 255
    anp = settings_of(cells["ANP"])
    assert (anp.iterations, anp.epsilon, anp.alpha, anp.seed) == (50, 0.25, 0.2, 1)


def test_the_key_of_a_search_of_single_images_does_not_hold_how_changes_are_learned(write):
    cells = {entry.row: entry.cell for entry in entries(read_grid(write()))}
    assert not any(name.startswith("changes.") for name, _ in cells["CBD"].settings)
    path = write('search = { epsilon = "2/255" }', 'preset = "default"')
    cells = {entry.row: entry.cell for entry in entries(read_grid(path))}
    assert ("changes.steps", 40) in cells["eps=2"].settings


def test_a_cell_gives_back_the_settings_that_its_key_leaves_out(write):
    kinds = ("pytorch", "kaiming")
    rows = [f'[[rows]]\nname = "{n}"\ndefense = "bcu"\nsettings.spread = "{n}"\n' for n in kinds]
    found = entries(read_grid(write(text=TEXT + "".join(rows))))
    cells = {entry.row: entry.cell for entry in found}
    given = find_defense("bcu").settings  # as what runs a cell hands over
    assert [settings_of(cells[name], given).spread for name in kinds] == [*kinds]
    assert [len(cells[name].settings) for name in kinds] == [
        len(cells["kaiming"].settings) - 1,
        len(cells["kaiming"].settings),
    ]


def test_a_setting_that_came_later_is_in_the_key_only_where_it_does_something(write):
    rows = [
        f'[[rows]]\nname = "{most}"\ndefense = "fine-pruning"\nsettings.most = {most}\n'
        for most in (1.0, 0.8)
    ]
    cells = {e.row: e.cell for e in entries(read_grid(write(text=TEXT + "".join(rows))))}
    assert "most" not in dict(cells["1.0"].settings)
    assert dict(cells["0.8"].settings)["most"] == 0.8
    given = find_defense("fine-pruning").settings
    assert [settings_of(cells[name], given).most for name in ("1.0", "0.8")] == [1.0, 0.8]


def test_a_row_with_a_preset_has_nothing_of_the_grids(write):
    path = write('search = { epsilon = "2/255" }', 'preset = "default", learning_rate = 0.5')
    cells = {entry.row: entry.cell for entry in entries(read_grid(path)) if entry.cell.seed == 1}
    assert settings_of(cells["eps=2"]) == PurifySettings(learning_rate=0.5, seed=1)
    assert settings_of(cells["CBD"]).epochs == 4


def test_labels_and_their_share_are_the_papers_unless_a_row_says_otherwise(write):
    cells = {entry.row: entry.cell for entry in entries(read_grid(write()))}
    assert (cells["ANP"].labels, cells["ANP"].share) == ("given", 0.01)
    assert (cells["CBD"].labels, cells["CBD"].share) == ("none", 0.05)
    path = write('defense = "anp"', 'defense = "anp"\nlabels = "pseudo"')
    cells = {entry.row: entry.cell for entry in entries(read_grid(path))}
    assert (cells["ANP"].labels, cells["ANP"].share) == ("pseudo", 0.05)


def test_victims_have_the_preset_of_their_attack_and_what_the_grid_says(write):
    cells = [entry.cell for entry in entries(read_grid(write())) if entry.row == "CBD"]
    victims = {(cell.victim.attack, cell.seed): cell.victim.settings for cell in cells}
    assert {settings.epochs for settings in victims.values()} == {3}
    assert victims["cla", 0].augment == "none"
    assert victims["badnets", 1].augment == "shift"
    assert victims["badnets", 1].seed == 1


def test_two_tables_share_the_cells_that_are_the_same(write):
    first = unique_cells(entries(read_grid(write())))
    second = unique_cells(entries(read_grid(write('table = "1"', 'table = "7"'))))
    assert [cell.key for cell in first] == [cell.key for cell in second]


def test_the_cells_of_a_grid_are_those_of_the_records_that_are_there():
    grids = [read_grid(path) for path in GRIDS.glob("*-cpu.toml")]
    known = {entry.cell.key for grid in grids for entry in entries(grid)}
    there = {path.stem for path in (GRIDS.parent / "results/bench").glob("*.json")}
    assert there
    assert there <= known  # what makes a key has not changed


DETECTION = """
[detection]
data = "voc:../bccd"
stages = ["block2", "relu"]
pictures = ["CBD"]
epochs = 6
learning_rate = "1/100"

[cbd]"""


def test_a_grid_may_say_what_detectors_are_trained_on(write, tmp_path):
    grid = read_grid(write("[cbd]", DETECTION))
    assert grid.detection.data == f"voc:{tmp_path}/../bccd"
    assert grid.detection.pictures == ("CBD",)
    cells = {entry.cell.seed: entry.cell for entry in entries(grid)}
    assert cells[1].detection == Detection(
        data="bccd",  # no place on this machine
        train="trainval",
        test="test",
        stages=("block2", "relu"),
        settings=DetectionSettings(epochs=6, learning_rate=0.01, seed=1),
    )
    assert "detectors: bccd, sets trainval and test, stages block2 relu, epochs 6" in (
        describe_schedule(grid)
    )
    plain = unique_cells(entries(read_grid(write())))
    assert not {cell.key for cell in cells.values()} & {cell.key for cell in plain}


def test_all_victims_of_a_grid_may_be_trained_on_from_a_file(write, tmp_path):
    (tmp_path / "begun.safetensors").write_bytes(b"weights")
    plain = {entry.cell.victim.key for entry in entries(read_grid(write()))}
    grid = read_grid(write("seeds =", 'start = "begun.safetensors"\nseeds ='))
    victims = {entry.cell.victim for entry in entries(grid)}
    assert {victim.start for victim in victims} == {hashlib.sha256(b"weights").hexdigest()}
    assert not {victim.key for victim in victims} & plain
    words = describe_schedule(grid)
    assert "victims: preset cpu of 3 epochs, trained on from begun.safetensors" in words
    with pytest.raises(SettingsError, match=r"start: .*none\.pt: no such file"):
        read_grid(write("seeds =", 'start = "none.pt"\nseeds ='))


@pytest.mark.parametrize(
    ("line", "folder"),
    [
        ('victims = "~/v"', "victims"),
        ('start = "~/begun"', "start"),
    ],
)
def test_a_grid_may_name_a_place_at_home(line, folder, write, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "begun").write_bytes(b"weights")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    grid = read_grid(write("seeds =", f"{line}\nseeds ="))
    assert getattr(grid, folder) == str(tmp_path / "home" / line.split("/")[1].strip('"'))
    with pytest.raises(DataError, match="~no-one/v: no such user; write the whole path"):
        read_grid(write("seeds =", f'{folder} = "~no-one/v"\nseeds ='))


def test_seeds_may_share_one_victim(write):
    grid = read_grid(write("seeds = [0, 1]", "seeds = [0, 1]\nvictim_seed = 1"))
    found = entries(grid)
    assert {entry.cell.seed for entry in found} == {0, 1}
    assert {entry.cell.victim.seed for entry in found} == {1}
    assert {entry.cell.victim.settings.seed for entry in found} == {1}
    own = {entry.cell.key for entry in entries(read_grid(write())) if entry.cell.seed == 1}
    assert {entry.cell.key for entry in found if entry.cell.seed == 1} == own
    assert ", all of seed 1" in describe_schedule(grid)
    with pytest.raises(SettingsError, match="victim_seed is 0 or more, got -1"):
        read_grid(write("seeds =", "victim_seed = -1\nseeds ="))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('data = "voc:../bccd"\n', "", "lacks data"),
        ("voc:../bccd", "../bccd", "[detection]: data is voc:DIR, a folder by its name, got"),
        ("voc:../bccd", "coco:../bccd", "data is voc:DIR, a folder by its name, got 'coco:"),
        ("voc:../bccd", "voc:..", "data is voc:DIR, a folder by its name, got 'voc:"),
        ("epochs = 6", "epoch = 6", "[detection]: key 'epoch' is unknown; did you mean 'epochs'"),
        ("epochs = 6", "epochs = 0", "[detection]: epochs must be"),
        ("epochs = 6", "epochs = 0.5", "epochs is a whole number, got 0.5"),
        ("epochs = 6", "seed = 6", "key 'seed' is unknown"),
        ("epochs = 6", "tests = 'val'", "key 'tests' is unknown; did you mean 'test'"),
        ('["block2", "relu"]', '"block2"', "stages is a list, got 'block2'"),
        ('["CBD"]', '["CDB"]', "pictures 'CDB' is unknown; did you mean 'CBD'"),
    ],
)
def test_what_detectors_cannot_be_trained_on_is_refused(write, old, new, message):
    assert old in DETECTION
    with pytest.raises(SettingsError, match=message.replace("[", r"\[")):
        read_grid(write("[cbd]", DETECTION.replace(old, new)))


def test_detection_is_a_table(write):
    with pytest.raises(SettingsError, match="detection is a table, got 'voc:bccd'"):
        read_grid(write("seeds =", 'detection = "voc:bccd"\nseeds ='))


OWN = """
from dataclasses import dataclass
from unbackdoor.errors import SettingsError

@dataclass(frozen=True)
class Settings:
    factor: float = 0.5
    seed: int = 0

    def __post_init__(self):
        if self.factor < 0:
            raise SettingsError("factor is at least 0")

def shrink(backbone, data, settings: Settings, *, device="cpu", on_step=None):
    pass

def plain(backbone, data, settings, *, device="cpu", on_step=None):
    pass
"""


@pytest.fixture
def own(tmp_path):
    """A file with two defenses, in a folder beside the grid's."""
    path = tmp_path / "mine" / "own.py"
    path.parent.mkdir()
    path.write_text(OWN)
    return path


def test_a_row_may_be_a_defense_in_a_file_beside_the_grid(write, own):
    path = write('defense = "anp"', 'defense = "mine/own.py:shrink"')
    path = write("iterations = 50, epsilon", "factor", text=path.read_text())
    grid = read_grid(path)
    cells = {entry.cell.seed: entry.cell for entry in entries(grid) if entry.row == "ANP"}
    cell = cells[1]
    assert cell.defense == "own.py:shrink"  # no place on this machine
    assert cell.code == hashlib.sha256(OWN.encode()).hexdigest()
    assert cell.settings == (("factor", 0.25), ("seed", 1))
    assert (cell.labels, cell.share) == ("none", 0.05)  # it is told what the row says, like others
    assert find_own(cell, (str(own) + ":plain", str(own) + ":shrink")) == f"{own}:shrink"

    own.write_text(OWN + "# another\n")
    changed_cells = [entry.cell for entry in entries(grid) if entry.row == "ANP"]
    assert not {c.key for c in changed_cells} & {c.key for c in cells.values()}
    with pytest.raises(SettingsError, match=r"own\.py:shrink is not what it was when the grid"):
        find_own(cell, (f"{own}:shrink",))
    own.write_text(OWN.replace("factor: float = 0.5", "factor: float = 0.5\n    more: int = 3"))
    again = [entry.cell for entry in entries(grid) if entry.row == "ANP"]
    assert ("more", 3) in again[0].settings  # the changed file was read again


def test_a_file_moved_elsewhere_is_the_same_cell(write, own, tmp_path):
    row = 'defense = "mine/own.py:plain"\nlabels = "pseudo"'
    text = write('settings = { iterations = 50, epsilon = "1/4" }', "").read_text()
    first = entries(read_grid(write('defense = "anp"', row, text=text)))
    own.rename(tmp_path / "own.py")
    moved = entries(read_grid(write('defense = "anp"', row.replace("mine/", ""), text=text)))
    assert [entry.cell.key for entry in first] == [entry.cell.key for entry in moved]
    cells = {entry.row: entry.cell for entry in moved}
    assert (cells["ANP"].labels, cells["ANP"].share) == ("pseudo", 0.05)
    assert cells["ANP"].settings == ()


@pytest.mark.parametrize(
    ("defense", "settings", "message"),
    [
        (
            "mine/none.py:shrink",
            "",
            "row 'ANP': .*none.py: no such file; defense is a name or path",
        ),
        ("mine/own.py:shrin", "", "row 'ANP': .*own.py has no function 'shrin'; it has .*shrink"),
        ("mine/own.py", "", "defense 'mine/own.py' is unknown; .*path/to/file.py:function"),
        ("mine/own.py:shrink", "facto = 2", "setting 'facto' is unknown; did you mean 'factor'"),
        (
            "mine/own.py:shrink",
            "factor = true",
            "factor is a number or a ratio, got True",
        ),
        ("mine/own.py:shrink", "factor = -1", "row 'ANP': factor is at least 0"),
        ("mine/own.py:plain", "factor = 1", "setting 'factor' is unknown"),
    ],
)
def test_a_file_without_the_defense_or_the_setting_is_refused(
    write, own, defense, settings, message
):
    text = write('iterations = 50, epsilon = "1/4"', settings).read_text()
    with pytest.raises(SettingsError, match=message):
        read_grid(write('defense = "anp"', f'defense = "{defense}"', text=text))


VARIANT = """
[variants.weak]
attack = "badnets"
share = 1
trigger = { position = "center", size = 4 }
"""


def test_a_grid_may_have_an_attack_with_other_options(write):
    attacks = 'attacks = ["badnets", "weak"]'
    path = write('attacks = ["badnets", "cla"]', attacks, text=TEXT + VARIANT)
    grid = read_grid(path)
    found = {(e.attack, e.row): e.cell for e in entries(grid) if e.cell.seed == 0}
    usual, weak = found["badnets", "CBD"], found["weak", "CBD"]
    planted = (("share", 1.0), ("trigger.position", "center"), ("trigger.size", 4))
    assert weak.planted == weak.victim.planted == planted
    assert weak == replace(usual, planted=planted, victim=replace(usual.victim, planted=planted))
    assert len({weak.key, usual.key, weak.victim.key, usual.victim.key}) == 4
    clean, under = found["badnets", CLEAN_ROW], found["weak", CLEAN_ROW]
    assert under == replace(clean, planted=planted)  # one victim, scored under both
    differing = "(share 1.0, trigger.position center, trigger.size 4)"
    assert f"; weak: badnets {differing};" in describe_schedule(grid)
    assert describe(weak).startswith(f"badnets {differing} supervised")
    assert describe(under).startswith(f"clean under badnets {differing} supervised")
    assert label(Line("weak", "CBD", ())) == "weak: CBD"
    assert paper_figures(grid, Line("badnets", "CBD", ()))
    assert not paper_figures(grid, Line("weak", "CBD", ()))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('attack = "badnets"\nshare', 'attack = "badnet"\nshare', "did you mean 'badnets'"),
        ("[variants.weak]", "[variants.BadNets]", "'BadNets': is the name of an attack as it is"),
        ("[variants.weak]", "[variants]", r"variants are tables \[variants.NAME\]"),
        ("[variants.weak]", "[variants.wake]", "attack 'weak' is unknown; did you mean 'wake'"),
        ("share = 1\n", "shore = 1\n", "variant 'weak': .*'shore' is unknown.* 'share'"),
        ("share = 1\n", "share = 2\n", r"variant 'weak': .*in \(0, 1\], got 2"),
        ("size = 4", "sice = 4", "'trigger.sice' is unknown; did you mean 'trigger.size'"),
        ("share = 1\n", "target = 1\n", "target is a key of the grid"),
        (f"share{VARIANT.partition('share')[2]}", "", "differs in nothing"),
        (f"share{VARIANT.partition('share')[2]}", "trigger = {}", "differs in nothing"),
    ],
)
def test_a_variant_that_is_none_is_refused(write, old, new, message):
    attacks = TEXT.replace('"badnets", "cla"', '"badnets", "weak"')
    with pytest.raises(SettingsError, match=message):
        read_grid(write(old, new, text=attacks + VARIANT))


def test_a_path_is_relative_to_the_grid_file(write, tmp_path):
    assert read_grid(write()).data == f"cifar10:{tmp_path}/../images"
    assert read_grid(write("cifar10:../images", "fashion-mnist")).data == "fashion-mnist"
    assert read_grid(write("cifar10:../images", "photos")).data == f"{tmp_path}/photos"
    given = read_grid(write('tier = "cpu"', 'tier = "cpu"\nvictims = "given"')).victims
    assert Path(given) == tmp_path / "given"
    assert data_name("cifar10:a/b") == "cifar10"
    assert data_name("a/photos") == "photos"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("attacks =", "atacks =", "key 'atacks' is unknown; did you mean 'attacks'?"),
        ("epochs = 3", "epochs = 3\nseed = 7", "[victim]: seed is no setting here; the grid's"),
        ("epochs = 4", "epochs = 4\nseed = 7", "row 'CBD': seed is no setting here"),
        ("iterations = 50", "iterations = 50, seed = 7", "row 'ANP': seed is no setting here"),
        ("seeds = [0, 1]", "seeds = [0, 1]\nsede = 1", "key 'sede' is unknown; did you mean 'see"),
        ('"badnets"', '"badnet"', "attack 'badnet' is unknown; did you mean 'badnets'"),
        ('defense = "anp"', 'defense = "amp"', "defense 'amp' is unknown; did you mean 'anp'"),
        ("iterations = 50", "iteration = 50", "setting 'iteration' is unknown; did you mean 'iter"),
        ("iterations = 50", "iterations = 0.5", "iterations is a whole number, got 0.5"),
        (
            '"anp"\nsettings = {',
            '"bcu"\nsettings = { shares = [0, "x"],',
            "shares[1] is a number or a ratio, got 'x'",
        ),
        ('"1/4"', '"1/x"', "epsilon is a number or a ratio, got '1/x'"),
        ('"2/255"', "2", "for 8 grey levels pass 8/255"),
        (
            "steps = 8",
            "stesp = 8",
            "setting 'search.stesp' is unknown; did you mean 'sear",
        ),
        ('arch = "', 'arch = "mine.py:net" # "', "a network in a file cannot be in a grid"),
        ('tier = "cpu"', 'tier = "gpu"', "tier 'gpu' is unknown; did you mean 'cpu'"),
        ('preset = "cpu"', 'preset = "cpus"', "grid: preset 'cpus' is .*; did you mean 'cpu'"),
        ("seeds =", 'name = "mine"\nseeds =', "key 'name' is unknown; a grid is named as its"),
        ('preset = "cifar10"', 'preset = "cifar"', "preset 'cifar' is unknown; did you mean"),
        ("epochs = 3", "epoch = 3", "setting 'epoch' is unknown; did you mean 'epochs'"),
        ('name = "ANP"', 'name = "CBD"', "two rows have one name"),
        ('defense = "anp"', 'defense = "anp"\nlabels = "none"', "ANP needs labels"),
        ("[0, 1]", "[]", "seeds are different whole numbers"),
        ("[0, 1]", "[0, 0]", "seeds are different whole numbers"),
        ("[0, 1]", "[true]", "seeds[0] is a whole number, got True"),
        ('table = "1"', "table = 1", "table is a text, got 1"),
        ('defense = "anp"', 'defense = "anp"\nlabels = "some"', "labels .some. is unknown"),
        ('defense = "anp"', 'defense = "anp"\nshare = 0', "share is above 0 and at most 1, got 0"),
        ('defense = "anp"', 'defense = "anp"\nshare = 5', "ANP: share is above 0 .*, got 5"),
        (
            'defense = "anp"',
            'defense = "anp"\nshare = "5%"',
            "share is a number .*, got '5%'",
        ),
    ],
)
def test_what_a_grid_cannot_hold_is_refused_with_the_nearest_name(write, old, new, message):
    with pytest.raises(SettingsError, match=message.replace("[", r"\[")):
        read_grid(write(old, new))


def test_a_grid_without_rows_is_refused(write):
    with pytest.raises(SettingsError, match="has no rows"):
        read_grid(write(text=TEXT.partition("[[rows]]")[0]))


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(SettingsError, match=r"none\.toml"):
        read_grid(tmp_path / "none.toml")


def test_the_reduced_schedule_is_told_in_words(write):
    words = describe_schedule(read_grid(write()))
    assert "1 % of the training images with true labels: 'ANP'" in words
    assert "5 % of the training images without labels: 'CBD'" in words
    assert "preset cpu of 3 epochs;" in words
    assert "cbd: preset cifar10, epochs 4, search.steps 8" in words
    assert "ANP: iterations 50, epsilon 1/4" in words


def test_the_schedule_tells_how_long_each_victim_is_trained(write):
    text = TEXT.replace("epochs = 3", "limit = 5000").replace('"badnets"', '"badnets", "wanet"')
    words = describe_schedule(read_grid(write(text=text)))
    assert "preset cpu of 12 epochs of 5,000 images (wanet: 60)" in words
    demo = write('preset = "cpu"', 'preset = "demo"', text=TEXT.replace("epochs = 3", ""))
    assert "victims: preset demo;" in describe_schedule(read_grid(demo))


def test_the_names_of_attacks_are_those_that_can_be_made():
    assert tuple(ATTACKS) == tuple(ATTACK_NAMES)


@pytest.mark.parametrize("path", sorted(GRIDS.glob("*.toml")), ids=lambda path: path.stem)
def test_each_grid_of_this_repository_can_be_read(path):
    grid = read_grid(path)
    assert entries(grid)
    of_the_paper = grid.table.isdecimal() and grid.tier != "smoke"
    assert grid.clean or not of_the_paper
    assert path.stem in (f"table{grid.table}-{grid.tier}", f"{grid.table}-{grid.tier}", "smoke")
    assert grid.seeds == (0, 1, 2) or not grid.compares


@pytest.mark.parametrize("tier", ["paper", "h200"])
@pytest.mark.parametrize("table", range(1, 11))
def test_the_grids_beside_the_paper_have_all_its_attacks_and_rows(table, tier):
    grid = read_grid(GRIDS / f"table{table}-{tier}.toml")
    printed = paper_tables()[f"table{table}"]["data"]
    assert grid.compares
    assert {ATTACK_NAMES[attack] for attack in grid.attacks} == set(printed)
    ours = {PAPER_ROWS.get(entry.row, entry.row) for entry in entries(grid)}
    assert {row for rows in printed.values() for row in rows} <= ours


def test_the_papers_figures_are_those_of_the_paper():
    path = SHARED_PAPER / "tables.json"
    if not path.is_file():
        pytest.skip("needs the folder shared/paper beside the repository")
    printed = json.loads(path.read_text())
    printed["table6"]["data"] = {"Blend": printed["table6"]["data"]}  # there without its attack
    assert paper_tables() == printed
