"""python -m dense_rlhf run|status|report|list|search|train|check|serve"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dense_rlhf.types import InputError


def _study(arguments: argparse.Namespace):
    """The study as the command line wants it."""
    from dense_rlhf.config.study import load_study

    study, workers = load_study(Path(arguments.study), arguments.set or ()), getattr(arguments, "workers", None)
    for name, number in (("--workers", workers), ("--max-failures", getattr(arguments, "max_failures", None))):
        if number is not None and number < 1:
            raise InputError(f"{name} is {number}, wanted at least 1")
    return study if workers is None else replace(study, workers=workers)


def _run(arguments: argparse.Namespace) -> int:
    from dense_rlhf.runner.console import selected
    from dense_rlhf.runner.plan import act, describe, expand, reasons, runs_folder

    study = _study(arguments)
    jobs, folder = expand(study), runs_folder(study)
    names = selected(jobs, folder, arguments.only)
    why = reasons(jobs, folder, study.workers, arguments.force)
    if arguments.dry_run:
        chosen = [job for job in jobs if job.name in names]
        print(
            "\n".join(
                f"{act(why[job.name]):8s}{describe(job)}"
                + (f": {why[job.name]}" if why[job.name] else "")
                for job in chosen
            )
        )
        would = sum(bool(why[job.name]) for job in chosen)
        print(f"{len(chosen)} runs, {would} to run, {study.workers} at a time; nothing was started")
        return 0
    return _run_for_good(arguments, study, jobs, names, any(why[name] for name in names))


def _run_for_good(arguments: argparse.Namespace, study, jobs: list, names: list[str], some: bool) -> int:
    from dense_rlhf.runner.console import Screen, failures, summary
    from dense_rlhf.runner.executors import executor
    from dense_rlhf.runner.grid import check_data, run_grid
    from dense_rlhf.runner.jobs import GOOD
    from dense_rlhf.runner.plan import runs_folder

    if some:
        check_data(study)
    cpus, minutes = study.run.threads or max(1, os.cpu_count() // study.workers), study.timeout_minutes + 10
    logs, screen = str(runs_folder(study) / ".slurm"), Screen()
    where = executor(arguments.executor, study.workers, cpus, arguments.gpus, minutes, logs)
    screen.say(f"{study.study}: {len(names)} runs, {study.workers} at a time")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    try:
        records = run_grid(
            study,
            screen.say,
            screen.bar if screen.terminal else None,
            where,
            names,
            arguments.force,
            arguments.max_failures,
        )
    finally:
        screen.clear()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    print("\n".join([*failures(records, study.study, _again(arguments)), summary(records)]), flush=True)
    try:
        print(f"open {_reports(study, jobs, records)}")
    except Exception as error:  # of pandas, nbconvert or jinja: the runs are what they are
        print(f"the reports could not be written: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0 if all(record["status"] in GOOD for record in records) else 1


def _reports(study, jobs: list, records: list[dict]) -> Path:
    """The study's index; pages are rendered again where a run is newer than they are."""
    from dense_rlhf.runner.plan import runs_folder
    from dense_rlhf.runs import RunFolder, repository_root

    index = repository_root() / "reports" / study.study / "index.html"
    left = [RunFolder(runs_folder(study) / job.name).load_json("run.json") for job in jobs]
    known = {record["job"]: record for record in (*filter(None, left), *records)}
    written = index.stat().st_mtime if index.exists() else 0
    if {record["status"] for record in records} <= {"cached"} and all(
        path.stat().st_mtime <= written for path in runs_folder(study).glob("*/run.json")
    ):
        return index
    from dense_rlhf.report.write import write_reports

    return write_reports(study, [known[job.name] for job in jobs if job.name in known])


def _again(arguments: argparse.Namespace) -> str:
    """The command that runs the study as this one did."""
    settings = [part for pair in arguments.set or () for part in ("--set", pair)]
    return shlex.join(["python", "-m", "dense_rlhf", "run", arguments.study, *settings])


def _status(arguments: argparse.Namespace) -> int:
    from dense_rlhf.runner.console import states
    from dense_rlhf.runner.plan import expand, reasons, runs_folder

    study = _study(arguments)
    jobs, folder = expand(study), runs_folder(study)
    lines, good = states(jobs, folder, reasons(jobs, folder, study.workers))
    print("\n".join(lines))
    return 0 if good else 1


def _check(arguments: argparse.Namespace) -> int:
    from dense_rlhf.config.study import load_study
    from dense_rlhf.runner.plan import expand

    study = load_study(Path(arguments.study), arguments.set or ())
    jobs = expand(study)
    from dense_rlhf.runner.preflight import check

    failed = check(study, lambda line: print(line, flush=True))
    print(f"\n{len(jobs)} runs, {failed or 'no'} checks failed; no weights were read")
    return 2 if failed else 0


def _train(arguments: argparse.Namespace) -> int:
    from dense_rlhf.config.study import load_study
    from dense_rlhf.runner.train import train

    study = load_study(Path(arguments.study), arguments.set or ())
    run = train(study, arguments.arm, arguments.seed, arguments.tensorboard)
    if os.environ.get("RANK", "0") == "0":
        print(f"in {run.path}")
    return 0


def _search(arguments: argparse.Namespace) -> int:
    from dense_rlhf.config.study import load_study
    from dense_rlhf.runner.train import search

    def said(trials: range) -> Iterator[int]:
        for done in trials:
            print(f"{done - trials.start} trials run here, of {len(trials)} that were left", flush=True)
            yield done

    study = load_study(Path(arguments.study), arguments.set or ())
    run, learned = search(study, arguments.arm, said)
    if learned:
        print(f"incumbent: {', '.join(f'{s} {w:.3f}' for s, w in zip(learned.sources, learned.weights))}")
    print(f"in {run.path}; audited, and trained with, by\n  {_again(arguments)}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from dense_rlhf.config.study import load_study
    from dense_rlhf.report.write import write_reports
    from dense_rlhf.runner.plan import expand, runs_folder
    from dense_rlhf.runs import RunFolder

    study = load_study(Path(arguments.study), arguments.set or ())
    folders = (RunFolder(runs_folder(study) / job.name) for job in expand(study))
    records = [record for folder in folders if (record := folder.load_json("run.json"))]
    if not records:
        raise InputError(f"no run under {runs_folder(study)}; run the study first")
    print(f"open {write_reports(study, records)}")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from dense_rlhf.attribution import SOURCES
    from dense_rlhf.data import DATASETS
    from dense_rlhf.runs import repository_root

    root = repository_root()
    print(f"studies   {', '.join(sorted(str(path.relative_to(root)) for path in root.glob('params/**/*.yaml')))}")
    print(f"datasets  {', '.join(DATASETS)}")
    print(f"sources   {', '.join(SOURCES)}")
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    from dense_rlhf.evaluation.judge.serve import how, serve

    print(f"once it says that it is running, in another terminal:\n  {how(arguments.port)}", flush=True)
    serve(arguments.port)
    return 0


def _execute(arguments: argparse.Namespace) -> int:
    from dense_rlhf.runner.execution import work

    return work(arguments.notebook, Path(arguments.folder).resolve())


def _add_run_options(command: argparse.ArgumentParser) -> None:
    from dense_rlhf.runner.executors import EXECUTORS

    command.add_argument("--dry-run", action="store_true", help="say what would run, and why, and start nothing")
    command.add_argument("--workers", type=int, metavar="N", help="runs at a time, in place of the study's")
    command.add_argument("--executor", choices=EXECUTORS, default="local", help="where they run")
    command.add_argument("--gpus", type=float, metavar="G", help="of each run on ray or slurm; ray can share one: 0.5")
    command.add_argument("--only", metavar="failed|NAME", help="these runs; * in a name stands for any letters")
    command.add_argument("--force", action="store_true", help="run also what is finished, from the start")
    command.add_argument("--max-failures", type=int, metavar="N", help="begin nothing more after N failures")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 all ok, 1 a run failed, 2 bad input, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m dense_rlhf", description="Which tokens earned the reward?")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, act, text in (
        ("run", _run, "run a study's grid of notebooks and render its reports"),
        ("status", _status, "the state of each run of a study; exit code 0 where all are ok"),
        ("check", _check, "resolve all that a study needs except weights; its memory and time"),
        ("train", _train, "train one policy of a study; also under accelerate launch"),
        ("search", _search, "learn an arm's weights; any number of these share the trials"),
        ("report", _report, "render the reports of a study's finished runs again"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("study", help="a YAML file, such as params/reviews.yaml")
        command.add_argument("--set", action="append", metavar="KEY=VALUE", help="override one parameter; repeatable")
        command.set_defaults(act=act)
        if name in ("train", "search"):
            command.add_argument("--arm", required=True, help="the reward shape, one of the study's")
        if name == "train":
            command.add_argument("--seed", type=int, default=0)
            command.add_argument("--tensorboard", action="store_true", help="write events beside the run")
        if name == "run":
            _add_run_options(command)
    commands.add_parser("list", help="what can be named: studies, datasets, sources").set_defaults(act=_list)
    server = commands.add_parser("serve", help="a small judge on this machine, behind an OpenAI-compatible endpoint")
    server.add_argument("--port", type=int, default=8000)
    server.set_defaults(act=_serve)
    execute = commands.add_parser("execute", help="run one notebook in its prepared folder (the runner calls this)")
    execute.add_argument("notebook")
    execute.add_argument("folder")
    execute.set_defaults(act=_execute)
    arguments = parser.parse_args(argv)
    try:
        return arguments.act(arguments)
    except InputError as error:
        line = " ".join(str(error).split())
        print(f"error: {line if len(line) < 1200 else line[:1200] + ' ...'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
