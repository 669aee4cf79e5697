"""Write the locks: the versions that are installed here, and the hashes of the files that pip may take. `make lock`.

pip itself says which file each Python on each machine would take, by a dry run; what it cannot find is reported.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
PYTHONS = ("3.11.7", "3.12.7", "3.13.3")  # some packages ask for more than 3.11.0
LINUX = [f"manylinux_2_{minor}" for minor in range(5, 36)] + ["manylinux1", "manylinux2010", "manylinux2014", "linux"]
MACHINES = {
    "x86-64 Linux": [f"{system}_x86_64" for system in LINUX],
    "ARM Linux": [f"{system}_aarch64" for system in LINUX],
    "macOS on ARM": ["macosx_15_0_arm64"],
}
PIP = [sys.executable, "-m", "pip"]


def main() -> None:
    freeze = subprocess.run([*PIP, "freeze", "--all", "--exclude-editable"], capture_output=True, text=True, check=True)
    installed = [Requirement(line) for line in freeze.stdout.splitlines()]
    write("common.txt", [pin for pin in installed if pin.name not in ("pip", "torch")])
    for name in ("cpu.txt", "cuda.txt"):
        write(name, pins(HERE / name))
    write("alpaca_eval.txt", pins(HERE / "alpaca_eval.txt"), PYTHONS[:2])  # its numpy knows no later one


def pins(path: Path) -> list[Requirement]:
    """The packages of a lock itself, without those of another that it includes."""
    lines = re.sub(r" *\\\n *--hash=\S+", "", path.read_text()).splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-r "))]


def write(name: str, wanted: list[Requirement], pythons: tuple[str, ...] = PYTHONS) -> None:
    """Write a lock anew, with the comments and the included locks that it begins with."""
    targets, hashes = list(product(MACHINES, pythons)), defaultdict(set)
    with ThreadPoolExecutor() as pool:  # pip mostly waits for the index
        taken = pool.map(lambda target: files(name, wanted, *target), targets)
    for pin, sha256 in (item for one in taken for item in one.items()):
        hashes[pin].add(sha256)
    path = HERE / name
    head = re.match(r"((#|-r ).*\n)*", path.read_text())[0]
    lines = [" \\\n    --hash=sha256:".join([str(pin), *sorted(hashes[pin])]) + "\n" for pin in wanted]
    path.write_text(head + "".join(lines))


def files(name: str, wanted: list[Requirement], machine: str, python: str) -> dict[Requirement, str]:
    """The SHA-256 of the file of each package that this Python on this machine would take; none where one is missing.

    A version without a build, such as +cpu, means the file without one.
    """
    exact = {canonicalize_name(pin.name): pin for pin in wanted}
    asked = [f"{pin.name}{pin.specifier}" + ("" if "+" in str(pin) else f",!={version(pin)}+cpu") for pin in wanted]
    target = ["--target", "unused", "--python-version", python, *(f"--platform={tag}" for tag in MACHINES[machine])]
    with tempfile.TemporaryDirectory() as folder:
        report, listed = Path(folder, "report.json"), Path(folder, "asked.txt")
        listed.write_text("\n".join(asked))
        command = [*PIP, "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet", *target]
        done = subprocess.run([*command, f"--report={report}", f"-r{listed}"], capture_output=True, text=True)
        if done.returncode:
            print(f"{name}, {machine}, Python {python}: {done.stderr.strip().splitlines()[-1]}")
            return {}
        taken = json.loads(report.read_text())["install"]
    sha256 = {canonicalize_name(t["metadata"]["name"]): t["download_info"]["archive_info"]["hashes"] for t in taken}
    return {pin: sha256[name]["sha256"] for name, pin in exact.items()}


def version(pin: Requirement) -> str:
    return next(iter(pin.specifier)).version


if __name__ == "__main__":
    main()
