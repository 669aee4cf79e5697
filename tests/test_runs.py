"""What a run's record says of the code that it ran."""

import errno
import shutil
import subprocess
from types import SimpleNamespace

import pytest

from dense_rlhf import runs
from dense_rlhf.types import InputError


@pytest.mark.parametrize("content", [b"", b"a\n1\n1,2,3\n", bytes(range(256))])
def test_a_table_that_is_none_is_named(content, tmp_path):
    (tmp_path / "history.csv").write_bytes(content)
    with pytest.raises(InputError, match="history.csv is no table") as error:
        runs.RunFolder(tmp_path).load_table("history")
    assert "\n" not in str(error.value)


def test_parameters_are_those_of_the_file_as_it_is_now(tmp_path):
    run = runs.RunFolder(tmp_path)
    assert run.parameters() == {}
    for seed in (0, 1):
        (tmp_path / "params.yaml").write_text(f"seed: {seed}")
        run.parameters()["seed"] = 9
        assert run.parameters() == {"seed": seed}


def test_a_workspace_that_finds_no_room_leaves_nothing_in_the_way(tmp_path, monkeypatch):
    folder = tmp_path / "mine"

    def full(source, target, **options):
        shutil.copytree(source, target, **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="mine cannot be written: .*No space left"):
        patch.setattr(runs, "shutil", SimpleNamespace(**vars(shutil) | {"copytree": full}))
        runs.lay_out(folder)
    runs.lay_out(folder)
    assert (folder / "params" / "reviews.yaml").is_file()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    for name in ("dense_rlhf", "notebooks", "params", "results"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept").write_text("1")
    monkeypatch.setattr(runs, "PACKAGE", tmp_path / "dense_rlhf")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    return tmp_path


def test_a_commit_is_whole_until_a_file_that_runs_depend_on_changes(checkout):
    clean = runs.commit()
    assert len(clean) == 40
    for name in ("results/more", "params/own.yaml", "RESULTS.md"):
        (checkout / name).write_text("2")
    assert runs.commit() == clean
    (checkout / "notebooks" / "new.ipynb").write_text("{}")
    assert runs.commit() == f"{clean}+changes"
    (checkout / "notebooks" / "new.ipynb").unlink()
    (checkout / "dense_rlhf" / "kept").write_text("2")
    assert runs.commit() == f"{clean}+changes"
