"""A journal makes each result once and keeps it over kills."""

import pytest

from dense_rlhf.files import Journal, read_ledger
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
