import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from unbackdoor.bench.cells import as_record
from unbackdoor.bench.jobs import featured, pictured, place_of, plan_grids, together
from unbackdoor.bench.store import SCHEMA, open_store, write_failure, write_record
from unbackdoor.cli import main
from unbackdoor.errors import SettingsError

PACKAGE = Path(__file__).resolve().parents[1] / "unbackdoor"
SMOKE = str(Path(__file__).resolve().parents[1] / "grids" / "smoke.toml")


@pytest.fixture
def results(tmp_path):
    """A folder with made-up records of all cells of the smoke grid."""
    store = open_store(tmp_path / "results")
    planted = json.loads((PACKAGE / "assets" / "demo_victim.json").read_text())["attack"]
    scores = {"acc": 0.8, "asr": 0.1, "pa": 0.7, "images": 200, "triggered": 180}
    readers = ("head", "probe", "neighbours", "reestimated", "fine_tuned")
    losses = {"pull": 2.0, "distill": 1.0, "align": 0.5, "total": 1.2, "seconds": 1.0}
    for cell in plan_grids([Path(SMOKE)])[0].cells:
        record = {
            "schema": SCHEMA,
            "key": cell.key,
            "cell": as_record(cell),
            "victim": {"key": cell.victim.key, "sha256": "v", "attack": planted, "seconds": None},
            "scores": {"after": dict.fromkeys(readers, scores)},
            "history": [losses] if cell.defense == "cbd" else [],
            "flags": [],
            "seconds": {"defense": 1.0, "all": 2.0},
            "data": {"probe": 40, "train_sha256": "a", "test_sha256": "a"},
            "device": "cpu, 2 threads",
            "precision": "fp32",
            "versions": {"python": "3.11", "torch": "2.11"},
            "revision": "abc123",
        }
        write_record(store, cell.key, record)
    return str(store.folder)


def test_what_is_done_is_not_run_again(results, capsys):
    assert main(["bench", "run", SMOKE, "--results", results]) == 0
    assert "smoke: 0 cells to run, 4 not" in capsys.readouterr().out


def test_status_table_and_report_are_made_of_records(results, capsys, tmp_path):
    assert main(["bench", "status", SMOKE, "--results", results]) == 0
    assert "smoke: 4 done, 0 running, 0 failed, 0 left" in capsys.readouterr().out
    assert main(["bench", "table", SMOKE, "--results", results]) == 0
    assert "| BadNets: CBD | 80.0 | 10.0 |" in capsys.readouterr().out
    out = tmp_path / "tables.md"
    assert main(["bench", "table", SMOKE, "--results", results, "--out", str(out)]) == 0
    assert "| BadNets: CBD | 80.0 |" in out.read_text()
    words = ["bench", "table", SMOKE, SMOKE, "--results", results, "--format", "csv"]
    assert main([*words, "--rows", "CBD"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.startswith("grid,attack,row,defense,labels,share,seed,when,reading,acc,asr,pa,")
    assert len(lines) == 2 * 5
    assert all(line.startswith("smoke,badnets,CBD,") for line in lines)
    assert main(["bench", "table", SMOKE, "--results", str(tmp_path / "none")]) == 2
    assert "there is no such folder of records; pass --results" in capsys.readouterr().err
    page = tmp_path / "bench.html"
    assert main(["bench", "report", SMOKE, "--results", results, "--out", str(page)]) == 0
    assert "4 of 4 cells are done" in page.read_text()
    for words in (["status"], ["table"], ["report", "--out", str(tmp_path / "other.html")]):
        assert main(["bench", *words, SMOKE, "--results", results, "--data", "cifar10:other"]) == 0
    said = capsys.readouterr().out
    assert "smoke: 0 done" in said
    assert "| BadNets: CBD | – |" in said
    assert "0 of 4 cells are done" in (tmp_path / "other.html").read_text()


@pytest.mark.parametrize("command", ["table", "report"])
def test_what_cannot_be_written_is_refused_before_anything_is_read(command, capsys, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / f"{plan_grids([Path(SMOKE)])[0].cells[0].key}.json").write_text("damaged")
    page, grid = tmp_path / "bench.html", tmp_path / "smoke.toml"
    page.touch()
    grid.write_bytes(Path(SMOKE).read_bytes())
    words = ["bench", command, str(grid), "--results", str(tmp_path / "r"), "--out"]
    assert main([*words, str(page)]) == 2
    assert "exists already; pass --force" in capsys.readouterr().err
    assert main([*words, str(grid), "--force"]) == 2
    assert "would change the input" in capsys.readouterr().err
    assert grid.read_bytes() == Path(SMOKE).read_bytes()


@pytest.mark.slow
def test_what_the_report_lacks_of_done_cells_is_drawn_later(results, capsys, tmp_path):
    pages = [str(tmp_path / name) for name in ("lacks.html", "has.html")]
    assert main(["bench", "report", SMOKE, "--results", results, "--out", pages[0]]) == 0
    for drawn in (1, 0):
        assert main(["bench", "draw", SMOKE, "--results", results, "--device", "cpu"]) == 0
        assert f"smoke: drew {drawn} of 1 cells" in capsys.readouterr().out
    assert main(["bench", "report", SMOKE, "--results", results, "--out", pages[1]]) == 0
    titles = [Path(page).read_text().count("Features: badnets") for page in pages]
    assert titles == [0, 1]


def test_victims_in_the_grids_folder_need_no_training(tmp_path, capsys):
    grid = Path(SMOKE).with_name("defenses-cpu.toml")
    assert main(["bench", "status", str(grid), "--results", str(tmp_path)]) == 0
    assert " left with 0 victims to train" in capsys.readouterr().out


def test_looking_makes_no_folder(tmp_path, capsys):
    assert main(["bench", "status", SMOKE, "--results", str(tmp_path / "none")]) == 0
    assert "4 left with 0 victims to train" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_a_network_that_is_none_is_refused_before_anything_is_run(tmp_path, capsys):
    grid, results = tmp_path / "grid.toml", tmp_path / "results"
    grid.write_text(Path(SMOKE).read_text().replace("cifar/wrn16_1", "cifar/wrn16"))
    assert main(["bench", "run", str(grid), "--results", str(results)]) == 2
    assert "cifar/wrn16" in capsys.readouterr().err
    assert not [path for path in results.rglob("*") if path.is_file()]


def test_a_failed_cell_ends_in_an_exit_code_and_a_name(tmp_path, capsys):
    grid = tmp_path / "grid.toml"
    text = Path(SMOKE).read_text().partition("[[rows]]")[0]
    text = text.replace("batch_size = 64", "batch_size = 4096")
    grid.write_text(f'{text}[[rows]]\nname = "CBD"\ndefense = "cbd"\n')
    results = str(tmp_path / "results")
    command = ["bench", "run", str(grid), "--results", results, "--device", "cpu"]
    assert main(command) == 2
    said = capsys.readouterr()
    assert "1 cells failed; unbackdoor bench status names them, --retry" in said.err
    (failure,) = (tmp_path / "results/failed").iterdir()
    assert f"(where: {failure})" in said.out.replace("\n", "")
    assert main(["bench", "status", str(grid), "--results", results]) == 0
    assert "failed: badnets supervised cifar/wrn16_1, cbd, seed 0: DataError" in (
        capsys.readouterr().out
    )
    assert main(command) == 2  # it is not run again, and not forgotten
    said = capsys.readouterr()
    assert "grid: 0 cells to run, 1 not" in said.out
    assert "grid: 1 cells failed before; --retry runs them again" in said.out
    assert "1 cells failed" in said.err


def test_a_cell_of_grids_in_two_places_fails_once(tmp_path, capsys):
    text = Path(SMOKE).read_text().partition("[[rows]]")[0]
    text = text.replace("batch_size = 64", "batch_size = 4096")
    text = f'{text}[[rows]]\nname = "CBD"\ndefense = "cbd"\n'
    grids = [tmp_path / "here.toml", tmp_path / "there.toml"]
    for grid, victims in zip(grids, ("here", "there"), strict=True):
        grid.write_text(f'victims = "{victims}"\n{text}')
    command = ["bench", "run", *map(str, grids), "--results", str(tmp_path / "r")]
    for before in (False, True):
        assert main([*command, "--device", "cpu"]) == 2
        said = capsys.readouterr()
        assert ("1 cells failed before" in said.out) == before
        assert "error: 1 cells failed;" in said.err


def test_a_run_without_images_records_nothing(tmp_path, capsys):
    command = ["bench", "run", SMOKE, "--results", str(tmp_path), "--data", "cifar10:nowhere"]
    assert main(command) == 2
    assert "smoke: cifar10:nowhere: no such folder; pass --data" in capsys.readouterr().err
    assert not any((tmp_path / "failed").iterdir())


def test_an_imagenet100_of_other_classes_is_refused_before_anything_runs(tmp_path, capsys):
    (tmp_path / "imagenet100/train/n99999999").mkdir(parents=True)
    grid, images = SMOKE.replace("smoke", "table4-h200"), tmp_path / "imagenet100"
    command = ["bench", "run", grid, "--results", str(tmp_path / "r"), "--data", str(images)]
    assert main(command) == 2
    assert "has 1 classes, and lacks 100 of ImageNet-100's" in capsys.readouterr().err
    assert not list((tmp_path / "r").rglob("*.json"))


def test_retry_forgets_what_failed_and_nothing_else_does(tmp_path):
    store = open_store(tmp_path)
    key = plan_grids([Path(SMOKE)], data="cifar10:nowhere")[0].cells[0].key
    write_failure(store, key, "what", "OSError: disk", "")
    command = ["bench", "run", SMOKE, "--results", str(tmp_path), "--data", "cifar10:nowhere"]
    for words, error in (([], "OSError: disk"), (["--retry"], None)):
        assert main([*command, *words]) == 2  # there are no images
        assert store.error_of(key) == error


def test_grids_that_share_cells_are_counted_together_too(tmp_path, capsys):
    grids = [str(Path(SMOKE).with_name(f"table{number}-cpu.toml")) for number in (1, 7)]
    words = ["bench", "status", *grids, "--results", str(tmp_path), "--seeds", "0"]
    assert main([*words, "--attacks", "badnets", "--rows", "CBD", "No Defense", "eps=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    lines = [line for line in lines if not line.startswith("  time left")]
    assert [line.partition(" done")[0] for line in lines] == [
        "table1-cpu: 0",
        "table7-cpu: 0",
        "table1-cpu, table7-cpu, which share cells: 0",
    ]
    left = [int(line.partition(" failed, ")[2].split()[0]) for line in lines]
    assert left[2] < left[0] + left[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], "argument"),
        (["run", "none.toml"], "none.toml"),
        (["run", SMOKE, "--limit", "0"], "at least 1"),
        (["run", SMOKE, "--backend", "slurm"], "slurm"),
        (["run", SMOKE, "--rows", "CLP", "CDB"], "row 'CDB' is unknown; did you mean 'CBD'?"),
        (["run", SMOKE, "--attacks", "sgi"], "attack 'sgi' is unknown; there are badnets"),
        (["run", SMOKE, "--seeds", "0", "7"], "seed 7 is in no grid; there are [0]"),
    ],
)
def test_a_command_that_cannot_run_says_why(words, message, capsys, tmp_path):
    assert main(["bench", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.out + captured.err


def test_other_images_make_other_cells():
    here, there = (plan_grids([Path(SMOKE)], data=data)[0] for data in (None, "cifar10:somewhere"))
    assert here.cells[0].key != there.cells[0].key
    with pytest.raises(SettingsError, match="pass one grid file"):
        plan_grids([])


def test_rows_and_seeds_are_picked_by_name():
    grids = [Path(SMOKE).with_name(name) for name in ("table1-cpu.toml", "table7-cpu.toml")]
    rows, seeds = ["No Defense", "eps=2", "Clean victim, CBD, changes of all images"], [0, 2]
    picked = plan_grids(grids, rows=rows, seeds=seeds)
    assert [{entry.row for entry in plan.found} for plan in picked] == [
        {rows[0], rows[2]},
        {rows[1]},
    ]
    everything = plan_grids(grids)
    for some, plan in zip(picked, everything, strict=True):
        wanted = [e for e in plan.found if e.row in rows and e.cell.seed in seeds]
        assert some.found == wanted
        assert {entry.cell.seed for entry in wanted} == {0, 2}
    assert plan_grids(grids, rows=rows)[0].found != picked[0].found
    by_attack = plan_grids(grids, rows=rows, attacks=["sig", "cla"])[0].found
    assert by_attack == [
        e for e in everything[0].found if e.row in rows and e.cell.victim.attack in ("sig", "cla")
    ]
    assert {entry.row for entry in by_attack} == {"No Defense"}
    clean = plan_grids(grids, rows=rows, attacks=["clean"])[0].found
    assert {entry.row for entry in clean} == {rows[2]}
    assert {entry.attack for entry in clean} == set(everything[0].grid.attacks)


def test_an_attack_with_other_options_is_picked_by_its_name(tmp_path):
    path = tmp_path / "table1-cpu.toml"
    text = Path(SMOKE).with_name(path.name).read_text().replace('["badnets"', '["weak", "badnets"')
    path.write_text(text + '[variants.weak]\nattack = "badnets"\nshare = 0.01\n')
    (picked,) = plan_grids([path], attacks=["weak"])
    assert {entry.attack for entry in picked.found} == {"weak"}
    assert {entry.cell.victim.attack for entry in picked.found} == {"badnets"}
    (usual,) = plan_grids([path], attacks=["badnets"])
    assert {entry.cell.planted for entry in usual.found} == {()}


def test_features_are_kept_of_the_first_seed_of_the_rows_that_the_grid_names():
    plan = plan_grids([Path(SMOKE).with_name("table1-cpu.toml")], rows=["CBD", "FT"])[0]
    kept = [entry for entry in plan.found if entry.cell.key in featured(plan)]
    assert {(entry.row, entry.cell.seed) for entry in kept} == {("CBD", 0)}
    assert {entry.attack for entry in kept} == set(plan.grid.attacks)


def test_grids_are_run_together_unless_they_look_elsewhere():
    names = ("table3-cpu", "smoke", "table6-cpu", "table9-cpu")
    plans = plan_grids([Path(SMOKE).with_name(f"{name}.toml") for name in names])
    elsewhere = replace(plans[3].grid, victims="elsewhere")
    groups = together([*plans, plans[3]._replace(grid=elsewhere)])
    assert groups == [
        [plans[0], plans[2], plans[3]],
        [plans[1]],
        [plans[3]._replace(grid=elsewhere)],
    ]
    place = place_of(groups[0])
    assert place.data == plans[0].grid.data
    assert place.detection == plans[2].grid.detection.data
    assert place.pictures == pictured(plans[2])
    drawn = {key for plan in groups[0] for key in featured(plan)}
    assert drawn == set(place.features) > set(place_of([plans[0]]).features)


def test_detections_are_kept_of_the_first_seed_of_the_rows_that_the_grid_names():
    plan = plan_grids([Path(SMOKE).with_name("table6-cpu.toml")])[0]
    kept = [entry for entry in plan.found if entry.cell.key in pictured(plan)]
    assert {entry.row for entry in kept} == set(plan.grid.detection.pictures)
    assert len(kept) == 4
    assert {entry.cell.seed for entry in kept} == {0}
    assert pictured(plan_grids([Path(SMOKE)])[0]) == ()


def test_help_needs_no_torch():
    code = (
        "import sys; from unbackdoor.cli import main; main(['bench', 'run', '--help']);"
        "print('torch' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
    )
    assert "GRIDS" in run.stdout.upper()
    assert run.stdout.strip().endswith("False")
