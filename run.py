"""Run the project from a fresh clone; set its environment up first where that is needed.

    python3 run.py demo            repair a backdoored backbone and report what changed
    python3 run.py test            the tests; what follows goes to pytest
    python3 run.py lint            format, lint and types, as CI does
    python3 run.py COMMAND ...     whatever else `unbackdoor` can do

Needs Python 3.11 or newer and nothing else. The environment is `.venv` beside this file, in the
versions and with the hashes of `requirements/`. It is updated when those or `pyproject.toml`
change; otherwise nothing is installed and no network is needed.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import venv
from pathlib import Path

if sys.version_info < (3, 11):
    sys.exit(f"unbackdoor needs Python 3.11 or newer, this is {sys.version.split()[0]}.")
if os.name != "posix":
    sys.exit("run.py is for Linux and macOS; elsewhere, pip install the project by hand.")

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"
PYTHON = str(ENVIRONMENT / "bin/python")
STAMP = ENVIRONMENT / "set-up"  # written last, so that an interrupted set-up leaves none
UV = ROOT / "requirements/uv.txt"
PINS = ROOT / "requirements/pins.txt"
LINT = (["ruff", "format", "--check", "."], ["ruff", "check", "."], ["mypy"])


def fingerprint() -> str:
    """Return a hash of what the environment is made from, and of its place: it cannot be moved."""
    parts = [UV.read_bytes(), PINS.read_bytes(), (ROOT / "pyproject.toml").read_bytes()]
    digests = [hashlib.sha256(part).hexdigest() for part in parts]
    return "\n".join([str(ENVIRONMENT), *digests])


def set_up(environ: dict[str, str], *, update: bool) -> None:
    """Make the environment from nothing, or bring a finished one up to date.

    Raises:
        SystemExit: If this Python cannot make an environment.
        subprocess.CalledProcessError: If a step fails; it has said why.
    """
    if importlib.util.find_spec("ensurepip") is None:
        name = f"python{sys.version_info.major}.{sys.version_info.minor}"
        sys.exit(f"{name} has no ensurepip; on Debian or Ubuntu: sudo apt-get install {name}-venv")
    size = "" if update else " On Linux that is 5.3 GB, most of it PyTorch."
    print(f"Setting up .venv.{size}", flush=True)
    STAMP.unlink(missing_ok=True)
    if not update:
        venv.create(ENVIRONMENT, clear=True, with_pip=True)
    uv = [PYTHON, "-m", "uv", "pip"]
    for step in (
        [PYTHON, "-m", "pip", "install", "--quiet", "--require-hashes", "-r", str(UV)],
        [*uv, "sync", "--python", PYTHON, "--require-hashes", "--compile-bytecode", str(PINS)],
        [*uv, "install", "--python", PYTHON, "--no-deps", "--no-build-isolation", "-e", str(ROOT)],
    ):
        subprocess.run(step, check=True, env=environ, cwd=ROOT)
    STAMP.write_text(fingerprint())


def main(arguments: list[str]) -> None:
    """Set up if anything changed, then become the command."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    environ = dict(os.environ)
    environ.pop("PYTHONDONTWRITEBYTECODE", None)  # with it, every process compiles torch anew
    made_from = STAMP.read_text() if STAMP.exists() and Path(PYTHON).exists() else ""
    if made_from != fingerprint():
        set_up(environ, update=made_from.startswith(f"{ENVIRONMENT}\n"))
    if arguments[0] == "lint":
        codes = [subprocess.call([PYTHON, "-m", *tool], cwd=ROOT, env=environ) for tool in LINT]
        sys.exit(int(any(codes)))  # of a tool that was killed it is negative
    if arguments[0] == "test":
        os.chdir(ROOT)
        workers = str(min(4, os.cpu_count() or 1))
        command = [PYTHON, "-m", "pytest", "-n", workers, *arguments[1:]]
    else:  # not `python -m`, which would import whatever Python files lie in the current folder
        command = [str(ENVIRONMENT / "bin/unbackdoor"), *arguments]
    os.execve(command[0], command, environ)  # signals and the exit code are the command's own


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except subprocess.CalledProcessError:
        sys.exit("The set-up failed, see above. Check network and disk, then run this again.")
    except OSError as error:
        sys.exit(f"{error}. Check whether {ROOT} can be written; if it can, delete .venv there.")
