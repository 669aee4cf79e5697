"""pyproject.toml, locks and environment.yml agree; without a checkout a wheel is enough to run a study."""

import ast
import compileall
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

import pytest
import yaml
from checkout import write_notebook
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dense_rlhf import __version__
from dense_rlhf.runs import environment_key, lay_out, shipped, workspace
from dense_rlhf.types import InputError

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = [Requirement(text) for texts in PROJECT["optional-dependencies"].values() for text in texts]
DEV = [Requirement(text) for text in PROJECT["optional-dependencies"]["dev"]]
REQUIRED = [Requirement(text) for text in PROJECT["dependencies"]]


def pins(name):
    """The versions of a lock by package, those of the locks that it includes too."""
    text = (ROOT / "locks" / name).read_text().replace("\\\n", "")
    lines = [line.split() for line in text.splitlines() if not line.startswith("#")]
    versions = {}
    for first, *rest in lines:
        if first == "-r":
            versions |= pins(*rest)
        else:
            package, exact = first.split("==")
            versions[canonicalize_name(package)] = exact
            assert rest and all(re.fullmatch("--hash=sha256:[0-9a-f]{64}", option) for option in rest), first
    return versions


@pytest.mark.parametrize("name", ["cpu.txt", "cuda.txt", "alpaca_eval.txt"])
def test_every_line_of_a_lock_is_one_version_with_hashes(name):
    assert len(pins(name)) > 50
    assert (ROOT / "locks" / name).read_text().startswith("# ")


@pytest.mark.parametrize("requirement", [*REQUIRED, *DEV], ids=str)
def test_the_lock_is_within_the_declared_range(requirement):
    if requirement.name != "pip":
        assert requirement.specifier.contains(pins("cuda.txt")[canonicalize_name(requirement.name)])
    assert all(part.operator in (">=", "<") for part in requirement.specifier), "exact versions are the locks' business"


def test_the_locks_differ_in_the_build_of_torch_and_what_it_needs():
    cpu, cuda = pins("cpu.txt"), pins("cuda.txt")
    assert cpu.keys() < cuda.keys() and cpu["torch"] == cuda["torch"] + "+cpu"
    assert {name for name in cpu if cpu[name] != cuda[name]} == {"torch"}


def test_every_import_is_declared():
    """Of the package at any depth; what needs an extra is declared there; an adapter runs where its trainer is."""
    trainers = {"openrlhf", "skyrl", "slime", "verl"}
    names = set()
    for path in (ROOT / "dense_rlhf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            names |= {node.module} if isinstance(node, ast.ImportFrom) and node.module else set()
    modules = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"dense_rlhf"}
    sold_as, declared = packages_distributions(), {canonicalize_name(r.name) for r in (*REQUIRED, *EXTRAS)}
    missing = {m for m in modules if not {canonicalize_name(name) for name in sold_as.get(m, [m])} & declared}
    assert not missing - trainers


def test_environment_yml_installs_the_lock():
    python, pip, inner = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    low, high = PROJECT["requires-python"].split(",")
    assert low == f">={python.split('=')[1]}" and high == "<3.14" and pip == "pip"
    assert inner["pip"] == ["-r locks/cpu.txt"]  # where lines have hashes pip takes no folder


def test_what_is_installed_is_what_is_locked():
    for name, wanted in pins("cpu.txt").items():
        try:
            assert version(name) == wanted, name
        except PackageNotFoundError:
            pytest.fail(f"{name} is locked and not installed; run make env")


def test_no_machine_path_or_registry_host_in_the_tree():
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"(?<![\w./])/(?:work|root|home)/\w|file\.pythonhosted|pypi\.org/simple")
    for name in listed.stdout.split():
        path = ROOT / name
        is_text = path.suffix in (".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".ipynb")
        if is_text and path.name != Path(__file__).name:
            assert not pattern.search(path.read_text()), name


# ---------------------------------------------------------------------------------------------------- a workspace


def test_a_workspace_is_the_nearest_study_folder_else_the_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert workspace() == shipped("notebooks").parent == ROOT
    lay_out(tmp_path / "study")
    monkeypatch.chdir(tmp_path / "study" / "notebooks" / "ablations")
    assert workspace() == tmp_path / "study"
    key = environment_key()
    (tmp_path / "study" / "locks").mkdir()
    (tmp_path / "study" / "locks" / "own.txt").write_text("torch==0.0")
    assert environment_key() != key
    with pytest.raises(InputError, match="study exists and is not empty; name a new folder"):
        lay_out(tmp_path / "study")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel of all files that git does not ignore, unpacked where no checkout is near."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), "."]
    command += ["--no-build-isolation", "--check-build-dependencies"]  # with the setuptools that is installed
    source = folder / "source"
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-zco", "--exclude-standard"], capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    built = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    compileall.compile_dir(folder / "site", quiet=1)  # so that no run writes there
    return folder / "site"


def run_installed(site, folder, *arguments):
    command, environment = [sys.executable, "-m", "dense_rlhf", *arguments], os.environ | {"PYTHONPATH": str(site)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_without_a_checkout_a_study_runs_in_a_folder_of_its_own(installed, tmp_path):
    """Nothing is written into the package; the notebook here is a made-up one."""
    before = {path: path.stat().st_mtime_ns for path in installed.rglob("*")}
    assert run_installed(installed, tmp_path, "--version").stdout == f"dense-rlhf {__version__}\n"
    nowhere = run_installed(installed, tmp_path, "list")
    assert nowhere.returncode == 2 and "run `dense-rlhf new FOLDER`, then work in it" in nowhere.stderr
    assert run_installed(installed, tmp_path, "new", "x").returncode == 0
    again = run_installed(installed, tmp_path, "new", "x")
    assert again.returncode == 2 and again.stderr.count("\n") == 1
    study = tmp_path / "x"
    for name in ("notebooks", "params"):
        source, copy = installed.parent / "source" / name, study / name
        assert {path.relative_to(source) for path in source.rglob("*")} == {
            path.relative_to(copy) for path in copy.rglob("*")
        }
    write_notebook(study / "notebooks" / "01_reward_model.ipynb", "from dense_rlhf import runs", "print(runs.__file__)")
    done = run_installed(
        installed, study, "run", "params/reviews.yaml", "--only", "01_reward_model", "--set", "study=s"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(installed) in (study / "runs" / "s" / "01_reward_model" / "notebook.ipynb").read_text()
    assert (study / "reports" / "s" / "index.html").exists()
    assert before == {path: path.stat().st_mtime_ns for path in installed.rglob("*")}
