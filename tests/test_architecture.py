"""The rules of CONTRIBUTING.md; each check is also shown something that it must find."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from importlib.util import resolve_name
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "unbackdoor"
ATTACKS = {"attacks", "victims"}
MAY_IMPORT_ATTACKS = ATTACKS | {
    *("metrics", "evaluation", "attack_jobs", "bench", "demo", "cli", "__main__"),
    *("transfer", "detection.scores"),  # what trains a detector may not
}
TESTS_OF_NO_MODULE = {"architecture", "speed"}


def write_package(folder: Path, **sources: str) -> Path:
    """Write a package ``unbackdoor``; ``attacks__triggers`` stands for ``attacks/triggers.py``."""
    package = folder / "unbackdoor"
    for name, source in {"__init__": "", **sources}.items():
        stem = name if name.startswith("__") else name.replace("__", "/", 1)
        path = package / f"{stem}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return package


def modules_of(package: Path) -> dict[str, Path]:
    """Return name -> file, such as ``attacks.triggers``; ``attacks`` is ``attacks/__init__.py``."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def top(module: str) -> str:
    return module.partition(".")[0]


def names_in(path: Path, package: str, known: Iterable[str]) -> set[str]:
    """Return the dotted names that a file imports anywhere, or holds as a string."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                names.add(full if full.removeprefix("unbackdoor.") in known else base)
        elif isinstance(node, ast.Constant) and str(node.value).startswith("unbackdoor."):
            names.add(str(node.value))  # import_module("unbackdoor.attacks") is an import too
    return names


def import_graph(package: Path) -> dict[str, set[str]]:
    """Return module -> the package's modules that it imports, at any depth of its code."""
    modules = modules_of(package)
    graph = {}
    for module, path in modules.items():
        home = ".".join(["unbackdoor", *path.parent.relative_to(package).parts])
        imported = set()
        for name in names_in(path, home, modules):
            parts = name.split(".")
            if parts == ["unbackdoor"]:
                imported.add("__init__")
            elif parts[0] == "unbackdoor":  # importing a.b runs a as well
                imported.update(".".join(parts[1:end]) for end in range(2, len(parts) + 1))
        graph[module] = imported & modules.keys() - {module}
    return graph


def chain_to_attacks(graph: dict[str, set[str]], module: str) -> list[str] | None:
    seen = {module}
    chains = [[module]]
    for chain in chains:  # grows while it is walked: breadth first
        if top(chain[-1]) in ATTACKS:
            return chain
        following = graph[chain[-1]] - seen
        seen |= following
        chains.extend([*chain, name] for name in sorted(following))
    return None


def defenders_that_know_attacks(package: Path) -> list[str]:
    graph = import_graph(package)
    defenders = [module for module in graph if not {module, top(module)} & MAY_IMPORT_ATTACKS]
    chains = [chain_to_attacks(graph, module) for module in defenders]
    return [" -> ".join(chain) for chain in chains if chain]


def test_what_defends_never_imports_what_attacks():
    assert defenders_that_know_attacks(PACKAGE) == []


@pytest.mark.parametrize(
    "source",
    [
        "from unbackdoor.attacks.triggers import Patch",
        "from unbackdoor.attacks import triggers",
        "from .attacks import triggers",
        "import unbackdoor.attacks.triggers as t",
        "def late():\n    from unbackdoor import victims",
        "import importlib\nimportlib.import_module('unbackdoor.attacks.triggers')",
    ],
)
def test_an_attack_imported_by_a_defender_is_found_however_it_is_written(tmp_path, source):
    package = write_package(tmp_path, attacks__triggers="", victims="", purify=source)
    assert [chain.split(" ")[0] for chain in defenders_that_know_attacks(package)] == ["purify"]


def test_an_attack_imported_through_other_modules_is_found(tmp_path):
    package = write_package(
        tmp_path,
        attacks__triggers="",
        metrics="from unbackdoor.attacks.triggers import Patch",
        probe="from unbackdoor.metrics import accuracy",
        defenses__nad="from unbackdoor.probe import features",
    )
    assert defenders_that_know_attacks(package) == [
        "defenses.nad -> probe -> metrics -> attacks.triggers",
        "probe -> metrics -> attacks.triggers",
    ]


def test_what_scores_a_detector_may_know_attacks_and_what_trains_it_may_not(tmp_path):
    package = write_package(
        tmp_path,
        attacks__triggers="",
        detection__scores="from unbackdoor.attacks.triggers import Patch",
        detection__training="from unbackdoor.detection.scores import average",
    )
    assert defenders_that_know_attacks(package) == [
        "detection.training -> detection.scores -> attacks.triggers"
    ]


def declared_order() -> list[str]:
    """Return the first column of the layout table of CONTRIBUTING.md."""
    return re.findall(r"^\| `(\w+)/?` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)


def imports_against_the_order(package: Path, order: list[str]) -> list[str]:
    graph = import_graph(package)
    strangers = sorted({top(module) for module in graph} - set(order))
    if strangers:
        return [f"{name} is missing in the layout table of CONTRIBUTING.md" for name in strangers]
    return [
        f"{module} imports {imported}, which stands below it"
        for module, all_imported in graph.items()
        for imported in sorted(all_imported)
        if order.index(top(imported)) > order.index(top(module))
    ]


def test_modules_import_only_from_those_above_them():
    assert imports_against_the_order(PACKAGE, declared_order()) == []


def test_an_import_from_below_and_an_unlisted_module_are_found(tmp_path):
    package = write_package(tmp_path, losses="from unbackdoor import purify", purify="")
    assert imports_against_the_order(package, ["losses", "purify", "__init__"]) == [
        "losses imports purify, which stands below it"
    ]
    assert imports_against_the_order(package, ["losses", "__init__"]) == [
        "purify is missing in the layout table of CONTRIBUTING.md"
    ]


def loads_torch(module: str, folder: Path) -> bool:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return run.stdout.strip() == "True"


@pytest.mark.parametrize("name", ["errors", "settings", "cli"])
def test_help_and_settings_need_no_torch(name):
    assert not loads_torch(f"unbackdoor.{name}", ROOT)


def test_a_module_that_loads_torch_is_found(tmp_path):
    (tmp_path / "torch.py").touch()
    write_package(tmp_path, settings="import torch")
    assert loads_torch("unbackdoor.settings", tmp_path)


RUNS_CODE = {
    *("eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler"),
    *("torch.jit.load", "torch.hub.load"),
}


def calls_that_could_run_code(package: Path) -> list[str]:
    found = []
    for module, path in modules_of(package).items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "pickle":
                names = {f"pickle.{alias.name}" for alias in node.names} & RUNS_CODE
                found.extend(f"{module}:{node.lineno} {name}" for name in sorted(names))
            elif isinstance(node, ast.Call) and is_unsafe(node):
                found.append(f"{module}:{node.lineno} {ast.unparse(node)}")
    return found


def is_unsafe(call: ast.Call) -> bool:
    function = ast.unparse(call.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    return (
        function in RUNS_CODE
        or (function == "torch.load" and given.get("weights_only") != "True")
        or given.get("weights_only") == "False"
        or given.get("allow_pickle") == "True"
    )


def test_nothing_in_the_package_can_run_code_from_a_file():
    assert calls_that_could_run_code(PACKAGE) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=safe)",
        "load(path, weights_only=False)",
        "pickle.load(file)",
        "from pickle import loads",
        "numpy.load(path, allow_pickle=True)",
        "eval(text)",
        "exec(text)",
    ],
)
def test_a_call_that_could_run_code_from_a_file_is_found(tmp_path, source):
    package = write_package(tmp_path, checkpoint=source)
    assert len(calls_that_could_run_code(package)) == 1


def test_a_safe_load_and_eval_mode_are_left_alone(tmp_path):
    package = write_package(tmp_path, checkpoint="torch.load(x, weights_only=True)\nnet.eval()")
    assert calls_that_could_run_code(package) == []


MACHINE_BOUND = re.compile(
    r"(?<![\w.$}])/(?:root|home|Users|work|opt)/\w"
    r"|pypi\.org|pythonhosted\.org|npmjs\.org|anaconda\.org|download\.pytorch\.org"
)


def lines_bound_to_a_machine(files: Iterable[Path]) -> list[str]:
    found = []
    for path in files:
        data = path.read_bytes()
        if b"\0" not in data:
            lines = data.decode(errors="replace").splitlines()
            found.extend(
                f"{path.name}:{number} {match[0]}"
                for number, line in enumerate(lines, start=1)
                if (match := MACHINE_BOUND.search(line))
            )
    return found


def test_no_file_names_a_place_on_one_machine_or_a_package_registry():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert lines_bound_to_a_machine(path for path in files if path.is_file()) == []


def test_a_place_on_one_machine_and_a_package_registry_are_found(tmp_path):
    bad = tmp_path / "bad.txt"
    slash, registry = "/", "pypi"  # apart, or this file would be found as well
    bad.write_text(f"fine/home/x\nopen('{slash}home/ann/x')\nhttps://{registry}.org/simple\n")
    assert [line[:9] for line in lines_bound_to_a_machine([bad])] == ["bad.txt:2", "bad.txt:3"]


def anchors_of(page: Path) -> set[str]:
    """Return what a link to a heading of a Markdown page may name, as code hosts make it."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


def broken_links(pages: Iterable[Path]) -> list[str]:
    """Return the links to files and headings of the same tree that lead nowhere."""
    found = []
    for page in pages:
        text = re.sub(
            r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
        )
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            place, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:", place):
                continue
            to = page.parent / place if place else page
            if not to.exists() or (anchor and anchor not in anchors_of(to)):
                found.append(f"{page.name}: {target}")
    return found


def test_each_link_of_the_documentation_leads_somewhere():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    assert len(pages) > 20
    assert broken_links(pages) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# One heading: `--two`, [three](page.md)\n")
    page.write_text(
        "[a](other.md) [b](other.md#one-heading---two-three) [c](none.md) [d](#none)\n"
        "[e](https://example.org/x) [f](other.md#none)\n```\n[g](none.md)\n```\n"
    )
    wrong = ["page.md: none.md", "page.md: #none", "page.md: other.md#none"]
    assert broken_links([page, other]) == wrong


def orphans_among(tests: Path, package: Path) -> list[str]:
    modules = modules_of(package)
    known = {name.replace(".", "_") for name in modules} | {name.split(".")[-1] for name in modules}
    stems = [path.stem.removeprefix("test_") for path in sorted(tests.glob("test_*.py"))]
    return [stem for stem in stems if stem not in known | TESTS_OF_NO_MODULE]


def test_each_test_file_mirrors_a_module():
    assert orphans_among(ROOT / "tests", PACKAGE) == []


def test_a_test_file_of_no_module_is_found(tmp_path):
    package = write_package(tmp_path, losses="", attacks__triggers="")
    for name in ("losses", "triggers", "attacks_triggers", "architecture", "misc"):
        (tmp_path / f"test_{name}.py").touch()
    assert orphans_among(tmp_path, package) == ["misc"]


def requirements_without_a_pin(pyproject: dict, pins: str) -> list[str]:
    wanted = [
        *pyproject["project"]["dependencies"],
        *(
            line
            for extra in pyproject["project"]["optional-dependencies"].values()
            for line in extra
        ),
        *(line for group in pyproject["dependency-groups"].values() for line in group),
    ]
    pinned = dict(re.findall(r"^([\w.-]+)==([^ ]+)", pins, re.MULTILINE))
    return [
        line
        for line in wanted
        for requirement in [Requirement(line)]
        if requirement.name not in pinned or pinned[requirement.name] not in requirement.specifier
    ]


def test_the_pins_cover_what_the_project_asks_for():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = "".join(path.read_text() for path in (ROOT / "requirements").glob("*.txt"))
    assert requirements_without_a_pin(pyproject, pins) == []
    changed = {**pyproject, "dependency-groups": {"test": ["pytest>=999", "no-such-package"]}}
    assert requirements_without_a_pin(changed, pins) == ["pytest>=999", "no-such-package"]


def test_the_wheel_holds_every_file_of_the_package(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    files = [path for path in PACKAGE.rglob("*") if path.is_file()]
    files = [path for path in files if "__pycache__" not in path.parts]
    assert {str(path.relative_to(ROOT)) for path in files} <= packed


def test_the_tables_in_the_documentation_are_what_the_records_say():
    command = [sys.executable, str(ROOT / "scripts/tables.py"), "--check"]
    subprocess.run(command, check=True)
