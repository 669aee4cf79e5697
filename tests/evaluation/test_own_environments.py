"""Environments of their own; tests/adapters/trainers.py makes a whole one."""

import pytest

from dense_rlhf.evaluation.environment import place, python
from dense_rlhf.types import InputError


def test_what_pip_cannot_install_is_one_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("DENSE_RLHF_CACHE", str(tmp_path / "cache"))
    lock = tmp_path / "lock.txt"
    lock.write_text("a-package-that-is-nowhere==1.0\n")
    with pytest.raises(InputError, match="pip could not install lock.txt: .*nowhere.*, or leave it out"):
        python("kind", lock, "or leave it out", ("--no-index",))
    assert not place("kind", lock).exists()
