"""Environments of their own, with a stand-in for pip; tests/adapters/trainers.py makes a whole one."""

from types import SimpleNamespace

import pytest

from dense_rlhf.evaluation import environment
from dense_rlhf.types import InputError


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """How pip ends, and the commands that were run."""
    ending = SimpleNamespace(returncode=0, stderr="", commands=[])

    def run(command, **_):
        ending.commands.append(command)
        return ending

    monkeypatch.setenv("DENSE_RLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(environment.subprocess, "run", run)
    return ending


@pytest.fixture
def lock(tmp_path):
    path = tmp_path / "lock.txt"
    path.write_text("a==1\n")
    return path


def test_it_is_made_once_for_each_lock(pip, lock):
    made = environment.python("kind", lock, "", ("--no-deps",))
    assert made == environment.place("kind", lock) and made.parents[2].exists()
    assert pip.commands[1][-4:] == ["install", "--no-deps", "--requirement", str(lock)]
    assert environment.python("kind", lock, "") == made and len(pip.commands) == 2
    lock.write_text("a==2\n")
    assert environment.python("kind", lock, "") != made


def test_what_pip_cannot_install_is_one_error_and_leaves_nothing(pip, lock):
    pip.returncode, pip.stderr = 1, "a warning\nno such package\n"
    with pytest.raises(InputError, match="could not install lock.txt: no such package. Check .*index, or leave it out"):
        environment.python("kind", lock, "or leave it out")
    assert not environment.place("kind", lock).parents[2].exists()
