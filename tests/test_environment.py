"""One environment, said three times: pyproject.toml, the lock and environment.yml must agree."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from dense_rlhf.runs import workspace

ROOT = workspace()


def pins(lines):
    matches = (re.fullmatch(r"([A-Za-z0-9._-]+)==([^ ;]+)", line.strip()) for line in lines)
    return {re.sub(r"[-_.]+", "-", m[1]).lower(): m[2] for m in matches if m}


def test_pyproject_is_in_the_lock():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "locks" / "cpu.txt").read_text().splitlines()
    locked = pins(lines)
    assert len(locked) == sum(1 for line in lines if line and not line.startswith("#")), "every line is a pin"
    wanted = pins(project["dependencies"] + project["optional-dependencies"]["dev"])
    assert {name: locked.get(name) for name in wanted} == wanted


def test_environment_yml_installs_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, inner = environment["dependencies"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f"=={python.split('=')[1]}.*" and pip == "pip"
    assert inner["pip"] == ["-r locks/cpu.txt", "-e ."]


def test_what_is_installed_is_what_is_locked():
    from importlib.metadata import PackageNotFoundError, version

    locked = pins((ROOT / "locks" / "cpu.txt").read_text().splitlines())
    for name, wanted in locked.items():
        try:
            assert version(name).split("+")[0] == wanted, name
        except PackageNotFoundError:
            pytest.fail(f"{name} is locked and not installed; run make env")


def test_no_machine_path_or_registry_host_in_the_tree():
    import subprocess

    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"(?<![\w./])/(?:work|root|home)/\w|file\.pythonhosted|pypi\.org/simple")
    for name in listed.stdout.split():
        path = ROOT / name
        is_text = path.suffix in (".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".ipynb")
        if is_text and path.name != Path(__file__).name:
            assert not pattern.search(path.read_text()), name
