"""Make the virtual environment with everything in it, from a bare python3. Standard library only.

    python3 scripts/setup.py .venv                    what `make setup` runs
    python3 scripts/setup.py --lock constraints.txt   what `make constraints` runs

uv is used when it is there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str]) -> None:
    if sys.version_info < (3, 11):
        stop(f"kitrocket needs Python 3.11 or newer; this is {sys.version.split()[0]}.")
    if arguments[:1] == ["--lock"]:
        lock(Path(arguments[1]))
    else:
        set_up(Path(arguments[0]))


def set_up(venv: Path) -> None:
    python = venv / "bin" / "python"
    if works(python):
        print(f"Bringing {venv} up to date...", flush=True)
    else:
        print(f"Making {venv} (once, about a minute)...", flush=True)
        python = make_venv(venv)
    install(python, "--constraint", str(ROOT / "constraints.txt"), *requirements(), "--editable", f"{ROOT}[all]")
    (venv / ".ready").touch()


def works(python: Path) -> bool:
    """Whether an environment is there and whole: one may be left half made, or by a Python that is gone."""
    if not python.exists():
        return False
    same = f"import pip, sys; raise SystemExit(sys.version_info[:2] != {tuple(sys.version_info[:2])})"
    return shutil.which("uv") is None and subprocess.run([str(python), "-c", same], capture_output=True).returncode == 0


def requirements() -> list[str]:
    import tomllib  # absent before Python 3.11, which `main` reports in words

    with open(ROOT / "pyproject.toml", "rb") as file:
        return list(tomllib.load(file)["dependency-groups"]["dev"])


def make_venv(venv: Path) -> Path:
    """Make a fresh environment and return its python, or stop with the line to type where Debian left venv out."""
    if shutil.which("uv"):
        run(["uv", "venv", "--quiet", "--clear", "--python", sys.executable, str(venv)])
        return venv / "bin" / "python"
    if subprocess.run([sys.executable, "-c", "import venv, ensurepip"], capture_output=True).returncode:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        sudo = "" if os.geteuid() == 0 else "sudo "
        stop(f"This Python lacks venv. Type:\n\n    {sudo}apt-get install python{version}-venv\n")
    run([sys.executable, "-m", "venv", "--clear", str(venv)])
    return venv / "bin" / "python"


def install(python: Path, *arguments: str) -> None:
    if shutil.which("uv"):
        run(["uv", "pip", "install", "--quiet", "--python", str(python), *arguments])
    else:
        run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments])


def lock(target: Path) -> None:
    """Write the newest versions of all that is needed, without a download address."""
    with tempfile.TemporaryDirectory() as folder:
        python = make_venv(Path(folder) / "venv")
        install(python, *requirements(), f"{ROOT}[all]")
        listed = subprocess.run(
            [str(python), "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check"],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
    ours = ("kitrocket==", "pip==", "setuptools==")
    lines = sorted((line for line in listed.splitlines() if not line.startswith(ours)), key=str.lower)
    target.write_text("# Written by `make constraints`.\n" + "\n".join(lines) + "\n", encoding="utf-8")


def run(command: list[str]) -> None:
    """Run a step whose own words explain a failure."""
    if subprocess.run(command).returncode:
        stop(f"This step failed: {' '.join(command[:4])} ...")


def stop(message: str) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
