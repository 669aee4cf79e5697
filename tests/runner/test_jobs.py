"""The runner: why it runs what, what it calls ok, several runners at once, and how it ends."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from threading import Barrier, Event

import pytest
import yaml
from checkout import command, make_checkout, slowness, write_notebook
from kill_runs import processes

from dense_rlhf.__main__ import main
from dense_rlhf.config.study import load_study
from dense_rlhf.files import lock
from dense_rlhf.report.record import Outline, restore_runs, write_record
from dense_rlhf.runner import grid, jobs, plan
from dense_rlhf.runner.console import Screen
from dense_rlhf.runner.execution import Limits
from dense_rlhf.runner.executors import Local, executor, shares
from dense_rlhf.runner.jobs import finish, prepare, run_job, state
from dense_rlhf.runs import RunFolder, _installed_gpus, gpus, provenance
from dense_rlhf.types import InputError

STUDY = {
    "notebooks": ["01_reward_model", "04_ppo", "05_bayesian_optimisation", "06_comparison"],
    "arms": {"sparse": {"sources": ["terminal"]}, "bo": {"sources": ["shap", "terminal"], "weights": "learned"}},
}
REWARD, SPARSE, SEARCH, BO, COMPARISON = (
    "01_reward_model",
    "04_ppo-sparse-seed0",
    "05_bayesian_optimisation-bo",
    "04_ppo-bo-seed0",
    "06_comparison",
)
COUNTS = "import pathlib\nwith open(pathlib.Path(run_dir).parent / f'{arm}.count', 'a') as file: file.write('x')"


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A made-up study whose notebooks do nothing; its path."""
    monkeypatch.chdir(tmp_path)
    return make_checkout(tmp_path, STUDY, dict.fromkeys(STUDY["notebooks"], ("x = 1",)))


@pytest.fixture
def faked(study, monkeypatch):
    """The same without kernels: each run takes a moment, and the arms in the list that is returned fail."""
    bad: list[str] = []

    def launch(notebook, folder, limits, stop, keep):
        assert keep and not held_elsewhere(folder)
        time.sleep(0.05)
        name = folder.name
        if name in bad:
            return "failed", "In [2] 'x = 1': ValueError: no"
        RunFolder(folder).save_metrics({"shape": {"weights": [0.5, 0.5]}})
        return "ok", ""

    monkeypatch.setattr(jobs, "launch", launch)
    monkeypatch.setattr("dense_rlhf.report.write.write_reports", lambda *_: Path("index.html"))
    return bad


def held_elsewhere(folder: Path) -> bool:
    """Whether a second runner could take the job that the first runs."""
    return (other := lock(folder / jobs.RUNNING, wait=False)) is not None and (other.close() or True)


def why(study: Path, *settings: str) -> dict[str, str]:
    read = load_study(study, settings)
    return plan.reasons(plan.expand(read), plan.runs_folder(read), read.workers)


def statuses(study: Path, **options) -> dict[str, str]:
    return {record["job"]: record["status"] for record in grid.run_grid(load_study(study), **options)}


# ---------------------------------------------------------------------------------------------------- the reason


def test_a_dry_run_says_why(study, faked, tmp_path, capsys):
    reasons = why(study)
    assert [reasons[name] for name in (REWARD, SPARSE, SEARCH)] == ["new"] * 3
    assert reasons[BO] == f"upstream runs: {SEARCH}" and reasons[COMPARISON] == f"upstream runs: {BO} and 1 more"
    assert set(statuses(study).values()) == {"ok"} and set(why(study).values()) == {""}
    changed = why(study, "study=s", "ppo.lr=0.5", "ppo.gamma=0.5", "seeds=[0]")
    assert changed[SPARSE] == "parameters changed: ppo_lr 0.0001 -> 0.5, ppo_gamma 1.0 -> 0.5"
    write_notebook(tmp_path / "notebooks" / "04_ppo.ipynb", "x = 2")
    assert why(study) == {
        REWARD: "",
        SEARCH: "",
        SPARSE: "rendered again: notebook changed",
        BO: "rendered again: notebook changed",
        COMPARISON: f"rendered again: upstream runs: {BO} and 1 more",
    }
    write_notebook(tmp_path / "notebooks" / "04_ppo.ipynb", "x = 1")
    (tmp_path / "locks" / "cpu.txt").write_text("torch==0.0")
    assert why(study)[SEARCH] == "packages changed"
    (tmp_path / "locks" / "cpu.txt").unlink()
    (tmp_path / "runs" / "s" / SPARSE / "metrics.json").unlink()
    (tmp_path / "runs" / "s" / REWARD / "metrics.json").write_text("{}")
    reasons = why(study)
    assert reasons[SPARSE] == reasons[REWARD] == "metrics.json: missing or altered" and reasons[BO] == ""
    assert main(["run", str(study), "--dry-run", "--only", "0[14]*"]) == 0
    out = capsys.readouterr().out
    assert "run     01_reward_model: metrics.json: missing or altered\n" in out and "cached  04_ppo-bo-seed0" in out
    assert "3 runs, 2 to run, 1 at a time; nothing was started" in out
    assert statuses(study) == {REWARD: "ok", SPARSE: "ok", SEARCH: "cached", BO: "cached", COMPARISON: "cached"}


def test_text_and_outputs_of_a_notebook_change_no_key_and_its_tags_do(study, faked, tmp_path):
    statuses(study)
    path = tmp_path / "notebooks" / "01_reward_model.ipynb"
    notebook = json.loads(path.read_text())
    notebook["cells"].insert(0, {"cell_type": "markdown", "source": ["# New"], "metadata": {}, "id": "a"})
    notebook["cells"][1]["execution_count"], notebook["metadata"]["x"] = 3, 1
    path.write_text(json.dumps(notebook))
    assert why(study)[REWARD] == ""
    notebook["cells"][1]["metadata"] = {}
    path.write_text(json.dumps(notebook))
    assert why(study)[REWARD] == "rendered again: notebook changed"


def test_a_data_file_of_other_content_is_another_run(study, faked, tmp_path):
    path = tmp_path / "marks.csv"
    path.write_text('spans,text\n"[0]",bad\n')
    setting = f"attribution.rationale_path={path}"
    grid.run_grid(load_study(study, [setting]))
    assert set(why(study, setting).values()) == {""}
    path.write_text('spans,text\n"[1]",bad\n')
    assert why(study, setting)[REWARD] == "files changed: attribution_rationale_path"


def test_a_data_file_that_lies_elsewhere_is_the_same_also_in_a_record(study, faked, tmp_path):
    (here := tmp_path / "here").mkdir()
    (here / "marks.csv").write_text('spans,text\n"[0]",bad\n')
    read = load_study(study, ["study=s", f"attribution.rationale_path={here / 'marks.csv'}"])
    grid.run_grid(read)
    runs = [RunFolder(plan.runs_folder(read) / job.name) for job in plan.expand(read)]
    write_record(Outline.of(read, ""), runs, tmp_path / "results", anyway=True)
    there = here.rename(tmp_path / "there") / "marks.csv"
    moved = "study=s", f"attribution.rationale_path={there}"
    assert set(why(study, *moved).values()) == {""}
    shutil.rmtree(tmp_path / "runs")
    restore_runs(tmp_path / "results", "s")
    assert str(tmp_path) not in (tmp_path / "runs" / "s" / SPARSE / "inputs.json").read_text()
    assert set(why(study, *moved).values()) == {""}
    other = there.with_name("other.csv")
    shutil.copy(there, other)
    renamed = why(study, "study=s", f"attribution.rationale_path={other}")[SPARSE]
    assert renamed.startswith("parameters changed: attribution_rationale_path")
    there.write_text('spans,text\n"[1]",bad\n')
    assert "files changed: attribution_rationale_path" in why(study, *moved)[SPARSE]
    run = RunFolder(tmp_path / "runs" / "s" / SPARSE)
    run.file("run.json").unlink()  # it did not finish: it goes on from where the file is
    assert prepare(next(job for job in plan.expand(load_study(study, moved)) if job.name == SPARSE), run.path, 1)
    assert run.parameters()["attribution_rationale_path"] == str(there)


def test_an_arm_that_left_and_came_back_is_not_run_again(study, faked):
    statuses(study)
    fewer = grid.run_grid(load_study(study, ["study=s", "arms.sparse=null"]))
    assert {record["job"]: record["status"] for record in fewer}[COMPARISON] == "ok"
    assert statuses(study) == {REWARD: "cached", SPARSE: "cached", SEARCH: "cached", BO: "cached", COMPARISON: "ok"}


def test_a_hundred_finished_runs_are_checked_within_five_seconds(study, faked, tmp_path):
    text = yaml.safe_load(study.read_text()) | {
        "seeds": list(range(50)),
        "notebooks": ["04_ppo"],
        "arms": {"a": {"sources": ["terminal"]}, "b": {"sources": ["uniform"]}},
    }
    study.write_text(yaml.safe_dump(text))
    planned = plan.expand(load_study(study))
    assert len(planned) == 100
    for job in planned:
        folder = tmp_path / "runs" / "s" / job.name
        prepare(job, folder, plan.threads_of(planned, 1))
        (folder / "notebook.ipynb").write_bytes(os.urandom(300_000))
        finish(job, folder, "ok", "", time.time())
    (tmp_path / "reports" / "s").mkdir(parents=True)
    (tmp_path / "reports" / "s" / "index.html").touch()

    def seconds():
        start, run = time.monotonic(), command(tmp_path, "run", "params/s.yaml")
        assert "100 runs: 100 cached" in run.communicate()[0] and run.returncode == 0
        return time.monotonic() - start

    assert any(seconds() < 5 for _ in range(3))  # others may keep this machine busy


# ---------------------------------------------------------------------------------------------------- failures


def test_what_needs_a_failed_run_is_cancelled_with_the_reason(study, faked, capsys):
    faked += [SEARCH]
    assert main(["run", str(study)]) == 1
    out = capsys.readouterr().out
    assert f"cancelled: {BO}\n  needs {SEARCH}, which is failed\n" in out
    assert f"failed: {SEARCH}\n  In [2] 'x = 1': ValueError: no\n  log:   runs/s/{SEARCH}/log.txt\n" in out
    assert f"again: dense-rlhf run {study} --only {SEARCH}\n" in out
    assert "5 runs: 3 ok, 1 failed, 1 cancelled" in out, "the comparison takes the policies that there are"
    assert main(["status", str(study)]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"failed    {SEARCH}: In [2]") and f"cancelled {BO}: needs {SEARCH}" in out
    faked.clear()
    assert main(["run", str(study), "--only", "failed"]) == 0
    out = capsys.readouterr().out
    assert "  1/2  ok" in out and "  2/2  ok" in out and "2 runs: 2 ok" in out
    assert statuses(study)[COMPARISON] == "ok", "which now reads more"
    assert main(["status", str(study)]) == 0
    faked += [SPARSE, BO]
    assert statuses(study, force=True)[COMPARISON] == "cancelled"
    record = RunFolder(plan.runs_folder(load_study(study)) / COMPARISON).load_json("run.json")
    assert record["error"] == "needs a finished policy; none of 2 finished"


def test_a_finished_run_whose_search_fails_now_is_kept_and_not_compared(study, faked, tmp_path):
    statuses(study)
    (tmp_path / "runs" / "s" / SEARCH / "metrics.json").unlink()
    faked += [SEARCH]
    assert statuses(study) == {REWARD: "cached", SPARSE: "cached", SEARCH: "failed", BO: "cancelled", COMPARISON: "ok"}
    assert RunFolder(tmp_path / "runs" / "s" / BO).load_json("run.json")["status"] == "stale"
    faked.clear()
    assert statuses(study) == {REWARD: "cached", SPARSE: "cached", SEARCH: "ok", BO: "cached", COMPARISON: "ok"}


def test_only_force_and_the_most_failures(study, faked, capsys):
    faked += [REWARD]
    others = (SPARSE, SEARCH, BO, COMPARISON)
    assert statuses(study, max_failures=1) == {REWARD: "failed"} | dict.fromkeys(others, "cancelled")
    assert not (plan.runs_folder(load_study(study)) / SPARSE).exists()
    faked.clear()
    assert main(["run", str(study), "--only", BO]) == 1
    assert f"needs {SEARCH}, which is pending" in capsys.readouterr().out
    assert main(["run", str(study), "--only", "04_ppo-*", "--workers", "2"]) == 1
    statuses(study)
    assert statuses(study, names=[SPARSE], force=True) == {SPARSE: "ok"}
    for options, message in (
        (["--only", "nope"], "--only is 'nope', wanted failed, or the name of a run"),
        (["--workers", "0"], "--workers is 0"),
        (["--max-failures", "0"], "--max-failures is 0"),
        (["--gpus", "1", "--force"], "--gpus is for ray and slurm"),
    ):
        assert main(["run", str(study), *options]) == 2
        assert message in capsys.readouterr().err


def test_two_workers_always_have_two_runs_at_work(study, faked, monkeypatch):
    """Each run waits until as many are at work as there are workers."""
    fast = jobs.launch
    monkeypatch.setattr(jobs, "provenance", dict)
    for workers in (1, 2):
        together = Barrier(workers)
        monkeypatch.setattr(jobs, "launch", lambda *given, met=together: (met.wait(60), fast(*given))[1])
        settings = ["notebooks=[04_ppo]", "arms.bo=null", "seeds=[0, 1, 2, 3, 4, 5]"]
        read = load_study(study, [f"workers={workers}", *settings])
        assert {record["status"] for record in grid.run_grid(read, force=True)} == {"ok"}


@pytest.mark.parametrize(
    "visible, names, wanted",
    [
        (None, ["0", "1", "2"], "2 x NVIDIA A, 1 x NVIDIA B"),
        ("2", ["2"], "1 x NVIDIA B"),
        ("GPU-b, 5", ["GPU-b", "5"], "1 x NVIDIA B, 1 x unknown GPU"),
        ("", [], None),
    ],
)
def test_a_record_names_processor_and_gpus(visible, names, wanted, tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\nprintf "0, GPU-x, NVIDIA A\\n1, GPU-y, NVIDIA A\\n2, GPU-b, NVIDIA B\\n"\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    _installed_gpus.cache_clear()
    made, seen = provenance(), gpus()
    _installed_gpus.cache_clear()
    assert list(seen) == names and made["gpu"] == wanted and made["cores"] > 0
    assert made["processor"] is None or made["processor"] in Path("/proc/cpuinfo").read_text()


# ---------------------------------------------------------------------------------------------------- real kernels


def test_a_kernel_that_died_or_left_cells_out_is_not_ok(study, tmp_path, forked):
    """papermill calls the second a success."""
    job = plan.expand(load_study(study))[0]
    for source, status, message in (
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed", "kernel died"),
        ("import sys; sys.exit(0)", "failed", "code cell 3 was not executed"),
    ):
        write_notebook(tmp_path / "notebooks" / "01_reward_model.ipynb", source, "y = 1")
        record = run_job(job, tmp_path / "runs" / "s" / job.name, Limits(1, 600))
        assert record["status"] == status and message in record["error"]
        assert not (tmp_path / "runs" / "s" / job.name / ".heartbeat").exists()


def test_an_interrupt_ends_all_at_once_and_is_recorded(study, tmp_path, forked):
    write_notebook(tmp_path / "notebooks" / "01_reward_model.ipynb", "import time; time.sleep(600)")
    folder = tmp_path / "runs" / "s" / REWARD
    runner = command(tmp_path, "run", "params/s.yaml")
    until(lambda: (folder / ".heartbeat").exists() and '"cell": 3' in (folder / ".heartbeat").read_text())
    assert state(folder, "")[0] == "running" and f"process {runner.pid}" in state(folder, "")[1]
    start = time.monotonic()
    runner.send_signal(signal.SIGINT)
    assert "interrupted; finished runs are kept" in runner.communicate()[0]
    assert runner.returncode == 130 and time.monotonic() - start < 5 * slowness()
    assert processes(tmp_path) == [] and state(folder, "") == ("cancelled", "interrupted")


def test_two_runners_share_a_study_and_nothing_runs_twice(study, tmp_path, forked):
    for name in STUDY["notebooks"]:
        cells = (
            COUNTS,
            "import json; pathlib.Path(run_dir, 'metrics.json').write_text(json.dumps("
            "{'shape': {'weights': [0.5, 0.5]}}))",
        )
        write_notebook(tmp_path / "notebooks" / f"{name}.ipynb", *cells)
    study.write_text(study.read_text().replace("- 06_comparison\n", "").replace("- 01_reward_model\n", ""))
    both = [command(tmp_path, "run", "params/s.yaml") for _ in range(2)]
    printed = [runner.communicate()[0] for runner in both]
    ended = {path.parent.name: json.loads(path.read_text())["status"] for path in tmp_path.glob("runs/s/*/run.json")}
    assert ended == dict.fromkeys((SPARSE, SEARCH, BO), "ok"), printed
    counts = {path.name: path.read_text() for path in tmp_path.glob("runs/s/*.count")}
    assert counts == {"sparse.count": "x", "bo.count": "xx"}, printed


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


# ---------------------------------------------------------------------------------------------------- parts


def test_states_of_a_folder(study, faked, tmp_path):
    folder = tmp_path / "runs" / "s" / SPARSE
    assert state(folder, "new") == ("pending", "new")
    statuses(study)
    assert state(folder, "")[0] == "ok" and state(folder, "notebook changed") == ("stale", "notebook changed")
    (folder / "run.json").unlink()
    (folder / ".heartbeat").write_text('{"cell": 4}')
    assert state(folder, "") == ("killed", "in cell 4, with its runner")
    with lock(folder / jobs.RUNNING) as held:
        held.truncate(0)
        held.write(b'{"host": "h", "pid": 7, "since": 0}')
        held.flush()
        assert state(folder, "")[0] == "running" and "cell 4" in state(folder, "")[1]
        assert "process 7 on h since" in jobs.held_by(folder)
        job = next(job for job in plan.expand(load_study(study)) if job.name == SPARSE)
        assert run_job(job, folder, 1, 1)["status"] == "busy"
    assert jobs.held_by(folder) == ""


def test_gpus_are_divided_before_torch_loads(monkeypatch, faked, study):
    assert shares([], 2) == [None, None] and shares(["0", "1", "2"], 2) == ["0,2", "1"]
    assert shares(["5"], 3) == ["5", "5", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert list(gpus()) == ["4", "7"]
    seen = []
    with Local(2) as where:
        for future in [where.submit(lambda gpus, stop: seen.append(gpus) or time.sleep(0.1)) for _ in range(2)]:
            future.result()
    assert sorted(seen) == ["4", "7"]


def test_threads_and_gpus_reach_the_run(study, tmp_path, forked):
    write_notebook(
        tmp_path / "notebooks" / "01_reward_model.ipynb",
        "import json, os, pathlib\n"
        "found = {name: os.environ.get(name) for name in ('OMP_NUM_THREADS', 'CUDA_VISIBLE_DEVICES')}\n"
        "pathlib.Path(run_dir, 'metrics.json').write_text(json.dumps(found))",
    )
    job, folder = plan.expand(load_study(study))[0], tmp_path / "runs" / "s" / REWARD
    assert run_job(job, folder, Limits(3, 60), gpus="6", stop=Event())["status"] == "ok"
    assert RunFolder(folder).load_json("metrics.json") == {"OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": "6"}
    shutil.rmtree(folder)


def test_a_terminal_has_one_line_and_a_pipe_has_lines(study, faked, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert Screen().terminal
    assert main(["run", str(study)]) == 0
    out = capsys.readouterr().out
    assert "\r\x1b[K5/5 · 0 running · 5 ok" in out and out.count("\n") == 4 and "min left)" in out
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    assert main(["run", str(study), "--force"]) == 0
    out = capsys.readouterr().out
    assert "\r" not in out and "  1/5  ok " in out


def test_an_extra_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "submitit", None)
    with pytest.raises(InputError, match=r"--executor slurm needs the extra: pip install 'dense-rlhf\[slurm\]'"):
        executor("slurm", 1, 1, None, 10, "logs")
