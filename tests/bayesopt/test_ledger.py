"""The ledger of a search: whole lines, one trial at a time and never twice, the same proposals after any kill."""

import errno
import json
import math
import os
import random
import signal
import threading
import time
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import kill_trials
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dense_rlhf.bayesopt import ledger
from dense_rlhf.bayesopt.ledger import Halfway, Ledger, is_live, trial_seed, trials
from dense_rlhf.bayesopt.search import Search
from dense_rlhf.bayesopt.space import Space
from dense_rlhf.files import append_line, lock, read_ledger
from dense_rlhf.types import InputError

FINITE = st.floats(allow_nan=False, allow_infinity=False)
EVENTS = st.dictionaries(st.text(), st.none() | st.integers() | FINITE | st.text())


@dataclass(frozen=True)
class Told:
    variance: float


@dataclass
class Toy:
    """A search whose every suggestion hangs on all that it has seen, in its order."""

    strategy = "toy"
    anchors, replicates, initial, seed = True, 1, 2, 0
    space = SimpleNamespace(d=2)
    start = [(0.25, 0.75), (0.75, 0.25)]
    points: list = field(default_factory=list)
    values: list = field(default_factory=list)
    errors: list = field(default_factory=list)

    def observe(self, point, value, error):
        for seen, new in ((self.points, point), (self.values, value), (self.errors, error)):
            seen.append(new)

    def suggest(self, pending):
        n = len(self.points) + len(pending)
        share = random.Random(repr((self.points, self.values, self.errors, pending))).random()
        return self.start[n] if n < len(self.start) else (share, 1 - share)

    def noise(self):
        return Told(len(self.values) + 0.5)


def toy(path, number=6, **about):
    return Ledger(path, Toy, number, 5, {"search": "k", "sources": ["shap", "terminal"]} | about)


def observed(row):
    value = random.Random(row["seed"]).random() + row["point"][0]
    return {"event": "observed", "value": value, "standard_error": 0.1}, None


def failing(*failed, reason="it fell over"):
    return lambda row: ({"event": "failed", "reason": reason}, None) if row["trial"] in failed else observed(row)


def proposals(path):
    return [(row["trial"], row["point"], row["seed"]) for row in trials(path)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    path = tmp_path_factory.mktemp("unbroken") / "trials.jsonl"
    toy(path).run(failing(3))
    return path


def in_children(*works):
    """Run each of `works` in a forked process; their exit codes, or minus the signal that ended them."""
    children = []
    for work in works:
        child = os.fork()
        if child == 0:
            try:
                work()
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------------- the file


@given(st.lists(EVENTS, min_size=1, max_size=4), EVENTS, st.data())
def test_a_last_line_cut_at_any_byte_is_dropped_and_replaced(tmp_path_factory, events, more, data):
    path = tmp_path_factory.mktemp("ledger") / "folder" / "trials.jsonl"
    for event in events:
        append_line(path, event)
    assert read_ledger(path) == events
    whole = path.read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    path.write_bytes(whole[: data.draw(st.integers(start, len(whole) - 1))])
    assert read_ledger(path) == events[:-1]
    append_line(path, more)
    assert read_ledger(path) == [*events[:-1], more]


def test_lines_of_two_processes_stay_whole_and_in_their_order(tmp_path):
    path, count = tmp_path / "trials.jsonl", 150

    def write(name):
        (tmp_path / name).touch()
        while not all((tmp_path / other).exists() for other in "ab"):
            os.sched_yield()  # none may end before the other begins
        for i in range(count):
            append_line(path, {"name": name, "i": i, "filling": "x" * (i * 37 % 5000)})
            os.sched_yield()

    assert in_children(lambda: write("a"), lambda: write("b")) == [0, 0]
    events = read_ledger(path)
    for name in "ab":
        assert [event["i"] for event in events if event["name"] == name] == list(range(count))
    assert len(events) == 2 * count
    assert [event["name"] for event in events] not in (["a"] * count + ["b"] * count, ["b"] * count + ["a"] * count)


def test_a_line_waits_until_another_process_has_written_its_own(tmp_path):
    """Half a line of a process that lives is not a crash's."""
    path = tmp_path / "trials.jsonl"
    with lock(path) as file:
        file.write(b'{"a": ')
        file.flush()
        other = threading.Thread(target=append_line, args=(path, {"b": 2}))
        other.start()
        time.sleep(0.2)
        assert other.is_alive() and path.read_bytes() == b'{"a": '
        file.write(b"1}\n")
    other.join(120)
    assert read_ledger(path) == [{"a": 1}, {"b": 2}]


def test_a_ledger_refuses_nan_and_a_missing_one_is_empty(tmp_path):
    assert read_ledger(tmp_path / "none.jsonl") == [] == trials(tmp_path / "none.jsonl")
    with pytest.raises(ValueError):
        append_line(tmp_path / "trials.jsonl", {"value": float("nan")})
    assert read_ledger(tmp_path / "trials.jsonl") == []


@pytest.mark.parametrize("line", ["{", "[]", "1", "\xff", '{"a": 1} x', "", "[" * 100_000], ids=range(7))
def test_a_line_that_is_no_object_is_named(tmp_path, line):
    path = tmp_path / "trials.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(InputError, match="trials.jsonl, line 2 is no JSON object"):
        read_ledger(path)


def test_a_lock_is_of_one_and_leaves_with_its_process(tmp_path):
    path, ready = tmp_path / "folder" / "1.lock", tmp_path / "ready"

    def hold():
        held = lock(path)
        ready.touch()
        time.sleep(60)
        held.close()

    child = os.fork()
    if child == 0:
        hold()
    until(ready.exists)
    assert lock(path, wait=False) is None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with lock(path, wait=False):
        assert lock(path, wait=False) is None
    lock(path, wait=False).close()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("dense_rlhf.files.fcntl.flock", refuse)
    with pytest.raises(InputError, match="a.lock cannot be locked .Operation not supported.; use a file system"):
        lock(tmp_path / "a.lock")


# ---------------------------------------------------------------------------------------------------- one process


def test_every_trial_is_proposed_run_and_ended(unbroken):
    events = read_ledger(unbroken)
    kinds = [(event["trial"], event["event"]) for event in events]
    ends = ["failed" if trial == 3 else "observed" for trial in range(6)]
    assert kinds == [(t, kind) for t in range(6) for kind in ("proposed", "running", ends[t])]
    rows = trials(unbroken)
    assert [row["status"] for row in rows] == ends and [row["seed"] for row in rows] == list(range(1005, 7005, 1000))
    for row in rows:
        assert row["weights"] == list(row["point"]) and row["search"] == "k" and row["sources"] == ["shap", "terminal"]
        assert row["code"].keys() == {"source", "torch", "botorch"} and row["pid"] == os.getpid()
        assert row["noise"] == {"variance": len(row["rng"]["observed"]) + 0.5}
    assert "value" not in rows[3] and rows[3]["reason"] == "it fell over"
    assert rows[5]["rng"] == {
        "strategy": "toy",
        "initial": 2,
        "anchors": True,
        "replicates": 1,
        "seed": 0,
        "observed": [0, 1, 2, 4],
        "pending": [3],
    }


def test_every_proposal_follows_from_the_lines_above_it(unbroken):
    """What was observed, in order; a failed trial is passed as pending, so that the search moves elsewhere."""
    rows = trials(unbroken)
    for row in rows:
        search = Toy()
        for i in row["rng"]["observed"]:
            search.observe(rows[i]["point"], rows[i]["value"], rows[i]["standard_error"])
        assert row["point"] == search.suggest([rows[i]["point"] for i in row["rng"]["pending"]])
    assert len({row["point"] for row in rows}) == 6


def test_a_finished_search_runs_nothing_and_a_longer_one_goes_on(unbroken, tmp_path):
    path = tmp_path / "trials.jsonl"
    path.write_bytes(unbroken.read_bytes())
    assert toy(path).run(None).values == toy(unbroken).replay().values
    assert path.read_bytes() == unbroken.read_bytes()
    longer = toy(path, 8).run(observed)
    assert len(longer.values) == 7 and proposals(path)[:6] == proposals(unbroken)


class Killed(BaseException):
    pass


def dying(at, share):
    """`append_line` that at its call number `at` writes a share of the line and ends everything."""
    calls = iter(range(100))

    def append(path, event):
        if next(calls) == at:
            line = json.dumps(event) + "\n"
            with open(path, "a") as file:
                file.write(line[: round(share * len(line))])
            raise Killed
        append_line(path, event)

    return append


@settings(max_examples=15)
@given(st.lists(st.builds(dying, st.integers(0, 17), st.floats(0, 1)), min_size=1, max_size=4))
def test_kills_at_any_events_change_no_proposal(unbroken, tmp_path_factory, kills):
    """Each start dies at an event of its own, with a part of the line written; the last runs to the end."""
    path = tmp_path_factory.mktemp("killed") / "trials.jsonl"
    for append in kills:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ledger, "append_line", append)
            try:
                toy(path).run(failing(3))
            except Killed:
                pass
    search = toy(path).run(failing(3))
    assert proposals(path) == proposals(unbroken) and search.values == toy(unbroken).replay().values
    ends = [event["trial"] for event in read_ledger(path) if event["event"] in ledger.ENDS]
    assert ends == list(range(6))


def test_sigkill_at_events_changes_no_proposal_of_the_gaussian_process():
    """A handful; `python tests/training/kill_trials.py` for all."""
    points = [(2, "half"), (9, "whole"), (15, "half"), (15, "whole")]
    assert kill_trials.kill_trials(6, points) == (4, [])


def test_what_a_trial_raises_leaves_it_to_the_next_start(unbroken, tmp_path):
    def interrupted(row):
        if row["trial"] == 2:
            raise KeyboardInterrupt
        return observed(row)

    path, seen = tmp_path / "trials.jsonl", []
    with pytest.raises(KeyboardInterrupt):
        toy(path).run(interrupted)
    assert [row["status"] for row in trials(path)] == ["observed", "observed", "running"]
    toy(path).run(lambda row: (seen.append(row["trial"]), failing(3)(row))[1])
    assert seen == [2, 3, 4, 5] and proposals(path) == proposals(unbroken)


@pytest.mark.parametrize(
    "numbers",
    [
        {"value": math.nan, "standard_error": 0.1},
        {"value": math.inf, "standard_error": 0.1},
        {"value": 1.0, "standard_error": math.nan},
        {},
    ],
)
def test_a_value_that_is_not_finite_fails_its_trial(tmp_path, numbers):
    path, third = tmp_path / "trials.jsonl", ({"event": "observed"} | numbers, None)
    search = toy(path, 4).run(lambda row: third if row["trial"] == 2 else observed(row))
    row = trials(path)[2]
    assert row["status"] == "failed" and "value" not in row and row["reason"].startswith("its value is ")
    assert len(trials(path)) == 4 and len(search.values) == 3


def test_an_unknown_standard_error_is_observed(tmp_path):
    search = toy(tmp_path / "trials.jsonl", 2).run(
        lambda row: ({"event": "observed", "value": 1.0, "standard_error": None}, None)
    )
    assert search.errors == [None, None]


def test_three_failures_in_a_row_end_the_search_and_tell(tmp_path):
    path = tmp_path / "trials.jsonl"
    with pytest.raises(InputError, match="3 trials failed in a row, the last: no luck. .*trials.jsonl"):
        toy(path).run(failing(2, 3, 4, 5, reason="no luck"))
    assert [row["status"] for row in trials(path)] == ["observed"] * 2 + ["failed"] * 3
    before = path.read_bytes()
    with pytest.raises(InputError, match="3 trials failed"):
        toy(path).run(None)
    assert path.read_bytes() == before
    apart = tmp_path / "apart.jsonl"
    toy(apart, 7).run(failing(1, 2, 4, 5))
    assert [row["status"] for row in trials(apart)].count("failed") == 4


def test_ended_is_told_of_the_recorded_row_and_of_what_the_trial_left(tmp_path):
    ends = []

    def ended(row, outcome):
        assert row == trials(tmp_path / "trials.jsonl")[-1] and lock(book.folder / ledger.ALONE, wait=False) is None
        ends.append((row["trial"], row["status"], outcome))

    book = toy(tmp_path / "trials.jsonl", 2)
    book.run(lambda row: (observed(row)[0], row["seed"]), ended)
    assert ends == [(0, "observed", 1005), (1, "observed", 2005)]


def test_progress_counts_what_is_left(unbroken, tmp_path):
    path, seen = tmp_path / "trials.jsonl", []
    path.write_text("".join(unbroken.read_text().splitlines(keepends=True)[:7]))
    toy(path).run(failing(3), progress=lambda items: (seen.append(items), items)[1])
    assert seen == [range(2, 6)]


def test_a_ledger_of_something_else_is_refused_and_left_alone(unbroken, tmp_path):
    before = unbroken.read_bytes()
    for about in ({"search": "other"}, {"sources": ["lime", "terminal"]}):
        with pytest.raises(InputError, match=r"is of another search, of sources .'shap', 'terminal'.; move it away"):
            toy(unbroken, **about).run(observed)
    assert unbroken.read_bytes() == before
    lines = [json.dumps(event) + "\n" for event in read_ledger(unbroken)]  # without hashes, as by hand
    for text in (
        '{"trial": 0}\n',
        '{"key": "x"}\n',
        lines[1],
        lines[0] * 2,
        lines[0] + lines[3] + lines[3],
        lines[0] + lines[1].replace("running", "resting"),
        lines[3],
        lines[0].replace("point", "paint"),
        lines[0] + '{"trial": [0], "event": "running"}\n',
    ):
        (tmp_path / "x.jsonl").write_text(text)
        with pytest.raises(InputError, match="x.jsonl is not the ledger of a search; move it away"):
            trials(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    "number, change",
    [
        *((2, {"value": value}) for value in ("0.5", None, 10**400, float("nan"), True, [1.0])),
        (2, {"standard_error": "0.1"}),
        (0, {"point": [0.5, None]}),
        (0, {"point": ["a", 0.5]}),
        (0, {"seed": "1000"}),
        (1, {"point": 5}),
    ],
)
def test_an_event_without_its_numbers_is_refused_by_trial(unbroken, tmp_path, number, change):
    """Events are edited as by hand, so that they have no hash; with one, any edit is seen."""
    events = read_ledger(unbroken)
    events[number] |= change
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    with pytest.raises(InputError, match="x.jsonl(: trial 0 was|, line 3)"):
        trials(tmp_path / "x.jsonl")
    lines = unbroken.read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace('"value": ', '"value": 1')
    (tmp_path / "x.jsonl").write_text("".join(lines))
    with pytest.raises(InputError, match="x.jsonl, line 3 is not as it was written: its hash differs"):
        trials(tmp_path / "x.jsonl")


def test_a_point_off_the_space_is_refused_by_file_and_trial(unbroken, tmp_path):
    events = read_ledger(unbroken)
    events[0]["point"] = [0.9, 0.9]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    with pytest.raises(InputError, match="x.jsonl, trial 0: "):
        replace(toy(tmp_path / "x.jsonl"), empty=lambda: Search(Space(2))).replay()


def test_no_trial_has_the_seed_of_a_policy_trained_afterwards():
    seeds = [trial_seed(3, trial) for trial in range(25)]
    assert len(set(seeds)) == 25 and not set(seeds) & set(range(1003))


# ---------------------------------------------------------------------------------------------------- several


def test_processes_on_one_ledger_run_each_trial_once(tmp_path):
    path, number = tmp_path / "trials.jsonl", 16

    def work(name):
        def slow(row):
            (tmp_path / f"{row['trial']}-{name}").touch(exist_ok=False)
            until(lambda: {file.name[-1] for file in tmp_path.glob("[0-9]*-?")} == set("abc"))  # none is late
            time.sleep(0.02 + 0.03 * random.random())
            return observed(row)

        search = toy(path, number).run(slow)
        (tmp_path / f"end-{name}").write_text(repr((search.points, search.values)))

    assert in_children(*(lambda name=name: work(name) for name in "abc")) == [0, 0, 0]
    ran = [tuple(file.name.split("-")) for file in tmp_path.glob("[0-9]*-*")]
    assert sorted(int(trial) for trial, _ in ran) == list(range(number)) and {name for _, name in ran} == set("abc")
    assert len({file.read_text() for file in tmp_path.glob("end-*")}) == 1
    rows = trials(path)
    assert [row["seed"] for row in rows] == [trial_seed(5, trial) for trial in range(number)]
    assert len({row["point"] for row in rows}) == number and max(len(row["rng"]["pending"]) for row in rows) == 2
    for row in rows:  # whatever ran beside it
        search = Toy()
        for i in row["rng"]["observed"]:
            search.observe(rows[i]["point"], rows[i]["value"], rows[i]["standard_error"])
        assert row["point"] == search.suggest([rows[i]["point"] for i in row["rng"]["pending"]])


def test_a_trial_whose_process_dies_is_taken_up_by_the_one_that_waits(tmp_path):
    path, seen = tmp_path / "trials.jsonl", []
    victim = os.fork()
    if victim == 0:
        toy(path, 3).run(lambda row: time.sleep(60) if row["trial"] == 1 else observed(row))
    until(lambda: [row["status"] for row in trials(path)] == ["observed", "running"])
    proposed = trials(path)[1]
    other = threading.Thread(target=lambda: toy(path, 3).run(lambda row: (seen.append(row), observed(row))[1]))
    other.start()
    until(lambda: [row["status"] for row in trials(path)] == ["observed", "running", "observed"])
    time.sleep(0.2)
    assert other.is_alive() and len(seen) == 1, "nothing is left to propose: it waits"
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    other.join(120)
    assert [row["trial"] for row in seen] == [2, 1] and seen[1]["pid"] == victim
    assert all(seen[1][name] == proposed[name] for name in ("point", "seed", "rng"))
    assert trials(path)[1]["pid"] == os.getpid() and trials(path)[1]["status"] == "observed"


def test_a_running_trial_is_pending_and_the_search_ends_with_it(tmp_path):
    path, held = tmp_path / "trials.jsonl", threading.Event()
    first = threading.Thread(
        target=lambda: toy(path).run(lambda row: (held.wait(120) if row["trial"] == 2 else None, observed(row))[1])
    )
    first.start()
    until(lambda: len(trials(path)) == 3)
    assert is_live(path)
    second = threading.Thread(target=lambda: toy(path).run(observed))
    second.start()
    until(lambda: [row["status"] for row in trials(path)].count("observed") == 5)
    assert second.is_alive() and [row["rng"]["pending"] for row in trials(path)] == [[], [], [], [2], [2], [2]]
    held.set()
    first.join(120)
    second.join(120)
    assert [row["status"] for row in trials(path)] == ["observed"] * 6
    assert not is_live(path) and not is_live(tmp_path / "other.jsonl") and not (tmp_path / "other.d").exists()


# ---------------------------------------------------------------------------------------------------- early stopping

NUMBERS = st.floats(-10, 10).map(lambda x: round(x, 3))


def complete(pairs):
    return Halfway([x for x, _ in pairs], [y for _, y in pairs])


UNTIED = (lambda pair: pair[0], lambda pair: pair[1])


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=5, max_size=12, unique_by=UNTIED), NUMBERS)
def test_halfway_predicts_what_least_squares_does(pairs, rung):
    """Ranks by sorting twice; s^2 (1 + x0' (X'X)^-1 x0) from the design matrix."""
    halfway, (x, y) = complete(pairs), np.array(pairs).T
    ranks = [np.argsort(np.argsort(z)) for z in (x, y)]
    correlation = np.corrcoef(*ranks)[0, 1]
    assert halfway.correlation == pytest.approx(correlation, abs=1e-9)
    assert halfway.stops(rung) == (halfway.correlation >= 0.7 and rung < np.median(x))
    X, x0 = np.stack([np.ones_like(x), x], 1), np.array([1.0, rung])
    beta = np.linalg.lstsq(X, y, rcond=None)[0]
    residuals = y - X @ beta
    error = np.sqrt(residuals @ residuals / (len(x) - 2) * (1 + x0 @ np.linalg.inv(X.T @ X) @ x0))
    value, predicted_sd = halfway.predict(rung)
    assert value == pytest.approx(x0 @ beta, abs=1e-6) and (predicted_sd or 0.0) == pytest.approx(error, abs=1e-6)


RISING = [(0.0, 1.0), (1.0, 1.5), (2.0, 2.2), (3.0, 2.9), (4.0, 4.3)]


@pytest.mark.parametrize(
    "pairs, rung, stops",
    [
        (RISING, 1.9, True),
        (RISING, 2.0, False),
        (RISING, -5.0, True),
        (RISING[:4], 0.0, False),
        ([(x, -y) for x, y in RISING], 0.0, False),
        ([(x, 1.0) for x, _ in RISING], 0.0, False),
        ([(1.0, y) for _, y in RISING], 0.0, False),
        ([], 0.0, False),
        ([(0, 0.0), (1, 2.0), (2, 1.0), (3, 4.0), (4, 3.0)], 0.0, True),  # 0.8
        ([(0, 2.0), (1, 0.0), (2, 1.0), (3, 4.0), (4, 3.0)], 0.0, False),  # 0.6
    ],
)
def test_a_trial_stops_below_the_median_where_halfway_predicts_the_end(pairs, rung, stops):
    assert complete(pairs).stops(rung) is stops


def test_a_perfect_line_has_no_standard_error_to_observe():
    assert complete([(float(x), 2.0 * x) for x in range(5)]).predict(7.0) == (14.0, None)


def test_only_trials_that_ran_to_their_end_predict():
    rows = [
        {"status": status, "rung": float(i), "value": 2.0 * i, "point": (1.0,)}
        for i, status in enumerate(["observed", "stopped", "observed", "running", "failed"])
    ]
    assert Halfway.of(rows) == Halfway([0.0, 2.0], [0.0, 4.0])
