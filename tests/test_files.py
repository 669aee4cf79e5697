"""Files are whole, on disk and locked as they say; a journal makes each result once and keeps it over kills."""

import os
from threading import Event, Thread

import pytest

from dense_rlhf import files
from dense_rlhf.files import Journal, cached_folder, read_ledger
from dense_rlhf.types import InputError


def test_a_journal_makes_once_and_remakes_what_was_cut(tmp_path):
    path, made = tmp_path / "journal.jsonl", []

    def make():
        made.append(1)
        return {"value": (0.1 + 0.2, len(made))}

    first = [Journal(path).get_or_make(key, make) for key in ("a", "b", "a")]
    assert first == [{"key": key, "value": [0.1 + 0.2, n]} for key, n in (("a", 1), ("b", 2), ("a", 1))]
    path.write_bytes(path.read_bytes()[:-5])
    journal = Journal(path)
    assert [journal.get_or_make(key, make)["value"][1] for key in "bab"] == [3, 1, 3]
    assert read_ledger(path) == [journal.get_or_make(key, pytest.fail) for key in "ab"]


def test_a_journal_refuses_nan_and_keeps_nothing_of_what_failed(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    with pytest.raises(ValueError):
        journal.get_or_make("a", lambda: {"value": float("nan")})
    with pytest.raises(ZeroDivisionError):
        journal.get_or_make("a", lambda: 1 / 0)
    assert journal.get_or_make("a", lambda: {"value": 1}) == {"key": "a", "value": 1}
    (tmp_path / "other.jsonl").write_text("[]\n")
    with pytest.raises(InputError, match="no JSON object"):
        Journal(tmp_path / "other.jsonl")
    (tmp_path / "other.jsonl").write_text('{"key": ["a"]}\n')
    with pytest.raises(InputError, match="other.jsonl is no journal"):
        Journal(tmp_path / "other.jsonl")


def test_a_file_is_whole_and_on_disk_before_it_stands_in_its_place(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        act = getattr(files.os, name)
        monkeypatch.setattr(files.os, name, lambda *given, name=name, act=act: (done.append(name), act(*given)))
    files.write_text(tmp_path / "a" / "b.txt", "é")
    assert done == ["fsync", "replace", "fsync"] and (tmp_path / "a" / "b.txt").read_text(encoding="utf-8") == "é"


def test_a_file_is_as_private_as_its_user_wishes(tmp_path):
    for mask, mode in ((0o077, 0o600), (0o022, 0o644), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            files.write_text(tmp_path / "x", "")
        finally:
            os.umask(before)
        assert (tmp_path / "x").stat().st_mode & 0o777 == mode


def test_a_lock_is_seen_without_writing(tmp_path):
    path = tmp_path / "lock"
    assert not files.is_locked(path) and not path.exists()
    with files.lock(path):
        assert files.is_locked(path) and files.lock(path, wait=False) is None
    assert not files.is_locked(path) and not files.is_locked(tmp_path)


def test_an_error_of_the_system_names_the_file(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(InputError, match=f"{place} cannot be written: Is a directory; move away what stands in its"):
        files.write_text(place, "")
    with pytest.raises(InputError, match=f"{place} cannot be opened: Is a directory"):
        files.lock(place)
    assert list(tmp_path.iterdir()) == [place]


def test_a_folder_is_built_once_and_who_waits_for_it_does_something_else_meanwhile(tmp_path):
    begun, helped, builds = Event(), Event(), []

    def build(folder):
        builds.append(folder)
        begun.set()
        assert helped.wait(10)

    first = Thread(target=cached_folder, args=("kind", "key", build, tmp_path))
    first.start()
    assert begun.wait(10)
    folder = cached_folder("kind", "key", build, tmp_path, meanwhile=helped.set)
    first.join()
    assert len(builds) == 1 and (folder / "key.json").exists()
    assert cached_folder("kind", "key", build, tmp_path, meanwhile=None) == folder, "nothing is waited for"


def test_a_build_that_fails_leaves_its_place_to_the_next(tmp_path):
    with pytest.raises(ZeroDivisionError):
        cached_folder("kind", "key", lambda folder: 1 / 0, tmp_path)
    folder = cached_folder("kind", "key", lambda draft: (draft / "a").touch(), tmp_path)
    assert {path.name for path in folder.parent.glob("[!.]*")} == {folder.name} and not list(tmp_path.rglob(".draft*"))
