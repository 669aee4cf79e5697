"""The command `dense-rlhf`, also `python -m dense_rlhf`; `--help` lists what it does."""

from __future__ import annotations

import signal
import sys

if (__name__ == "__main__" or sys.argv[0].endswith("dense-rlhf")) and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main`: Ctrl-C while modules load needs no traceback

import argparse
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from dense_rlhf import __version__
from dense_rlhf.types import NORMALISERS, InputError, one_line


def _study(arguments: argparse.Namespace):
    """The study, with the overrides of the command line."""
    from dense_rlhf.config.study import load_study

    study, workers = load_study(Path(arguments.study), arguments.set or ()), getattr(arguments, "workers", None)
    for name, number in (("--workers", workers), ("--max-failures", getattr(arguments, "max_failures", None))):
        if number is not None and number < 1:
            raise InputError(f"{name} is {number}, wanted at least 1")
    return study if workers is None else replace(study, workers=workers)


def _run(arguments: argparse.Namespace) -> int:
    from dense_rlhf.runner.console import failures, planned, selected, summary
    from dense_rlhf.runner.grid import check_data, has_own_models
    from dense_rlhf.runner.plan import expand, reasons, runs_folder
    from dense_rlhf.runs import GOOD

    study = _study(arguments)
    if arguments.results:
        from dense_rlhf.report.record import restore_runs

        restore_runs(Path(arguments.results), study.study)
    jobs, folder = expand(study), runs_folder(study)
    names = selected(jobs, folder, arguments.only)
    why = reasons(jobs, folder, study.workers, arguments.force)
    if arguments.dry_run:
        print("\n".join(planned([job for job in jobs if job.name in names], why, study.workers)))
        return 0
    if not arguments.force:
        _spare(arguments, folder, {name: why[name] for name in names})
    if any(why[name] for name in names):
        check_data(study)
        if has_own_models(study):
            from dense_rlhf.runner.preflight import refuse

            refuse(study)
    records = _records(arguments, study, names)
    statuses = [record["status"] for record in records]
    print("\n".join([*failures(records, study.study, _again(arguments)), summary(statuses)]), flush=True)
    written = _show_reports(study, jobs, records)
    return 0 if written and set(statuses) <= set(GOOD) else 1


def _show_reports(study, jobs: list, records: list[dict]) -> bool:
    """Render the reports, print what all took and where they are; whether that could be done."""
    from dense_rlhf.runner.console import spent
    from dense_rlhf.runner.plan import runs_folder

    began = time.monotonic()
    try:
        index = _reports(study, jobs, records)
    except Exception as error:  # from pandas, a parser or jinja; the runs are kept
        reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        print(f"the reports could not be written: {one_line(reason)}", file=sys.stderr)
        return False
    print("\n".join([*spent(records, runs_folder(study), time.monotonic() - began), f"open {index}"]))
    return True


def _spare(arguments: argparse.Namespace, folder: Path, why: dict[str, str]) -> None:
    """Raise `InputError` where settings under a name that is given would replace finished runs of other parameters."""
    from dense_rlhf.runner.jobs import state

    if not any(pair.startswith("study=") for pair in arguments.set or ()):
        return
    for name, reason in why.items():
        if "parameters changed" in reason and state(folder / name, reason)[0] == "stale":
            place = f"runs/{folder.name}/{name}"
            raise InputError(f"{place} is finished, with other parameters ({reason}); give another study=, or --force")


def _records(arguments: argparse.Namespace, study, names: list[str]) -> list[dict]:
    """Run the chosen jobs and return their records. SIGTERM and SIGHUP end them as Ctrl-C does."""
    from dense_rlhf.runner.console import Screen
    from dense_rlhf.runner.executors import executor
    from dense_rlhf.runner.grid import run_grid
    from dense_rlhf.runner.plan import runs_folder

    cpus, minutes = study.run.threads or max(1, os.cpu_count() // study.workers), study.timeout_minutes + 10
    logs, screen = str(runs_folder(study) / ".slurm"), Screen()
    machines = executor(arguments.executor, study.workers, cpus, arguments.gpus, minutes, logs)
    screen.say(f"{study.study}: {len(names)} runs, {study.workers} at a time")
    ends = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) != signal.SIG_IGN]  # as of nohup
    for one in ends:
        signal.signal(one, signal.default_int_handler)
    try:
        return run_grid(study, screen, machines, names, arguments.force, arguments.max_failures)
    finally:
        screen.clear()
        for one in ends:
            signal.signal(one, signal.SIG_DFL)


def _reports(study, jobs: list, records: list[dict]) -> Path:
    """The study's index; pages are rendered again if a run is newer than they are, or other code drew them."""
    from dense_rlhf.report import pages_key
    from dense_rlhf.runner.plan import runs_folder
    from dense_rlhf.runs import RunFolder, workspace

    index = workspace() / "reports" / study.study / "index.html"
    written = index.stat().st_mtime if index.exists() else 0
    newest = max((path.stat().st_mtime for path in runs_folder(study).glob("[!.]*/run.json")), default=0)
    drawn = None
    with suppress(InputError):  # a damaged summary: drawn again
        drawn = RunFolder(index.parent).load_json("summary.json").get("pages")
    if {record["status"] for record in records} <= {"cached"} and newest <= written and drawn == pages_key():
        return index
    from dense_rlhf.report.write import write_reports

    stored = [RunFolder(runs_folder(study) / job.name).record() for job in jobs]
    known = {record["job"]: record for record in (*filter(None, stored), *records)}
    return write_reports(study, [known[job.name] for job in jobs if job.name in known])


def _again(arguments: argparse.Namespace) -> str:
    """The command that runs the study with the same settings."""
    settings = [part for pair in arguments.set or () for part in ("--set", pair)]
    return shlex.join(["dense-rlhf", "run", arguments.study, *settings])


def _status(arguments: argparse.Namespace) -> int:
    from dense_rlhf.runner.console import states
    from dense_rlhf.runner.plan import expand, reasons, runs_folder

    study = _study(arguments)
    jobs, folder = expand(study), runs_folder(study)
    lines, good = states(jobs, folder, reasons(jobs, folder, study.workers))
    print("\n".join(lines))
    return 0 if good else 1


def _check(arguments: argparse.Namespace) -> int:
    from dense_rlhf.runner.plan import expand

    study = _study(arguments)
    jobs = expand(study)
    from dense_rlhf.runner.preflight import check

    failed = check(study, lambda line: print(line, flush=True))
    print(f"\n{len(jobs)} runs, {failed or 'no'} checks failed; no weights were read")
    return 2 if failed else 0


def _train(arguments: argparse.Namespace) -> int:
    from dense_rlhf.runner.train import train

    run = train(_study(arguments), arguments.arm, arguments.seed, arguments.tensorboard)
    if os.environ.get("RANK", "0") == "0":
        print(f"in {run.path}")
    return 0


def _search(arguments: argparse.Namespace) -> int:
    from dense_rlhf.runner.train import search

    def counted(trials: range) -> Iterator[int]:
        for trial in trials:
            print(f"{trial - trials.start} trials run here, of {len(trials)} open at the start", flush=True)
            yield trial

    run, learned = search(_study(arguments), arguments.arm, counted)
    if learned:
        print(f"incumbent: {', '.join(f'{s} {w:.3f}' for s, w in zip(learned.sources, learned.weights))}")
    print(f"in {run.path}; to audit the search and train with its weights:\n  {_again(arguments)}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    if (arguments.study is None) == (arguments.results is None):
        raise InputError("wanted a study, such as params/reviews.yaml, or --from results/")
    if arguments.results is not None:
        from dense_rlhf.report.release import render

        results = Path(arguments.results)
        print(f"read {render(results, Path(arguments.to) if arguments.to else results.resolve().parent)}")
        return 0
    from dense_rlhf.report.write import write_reports
    from dense_rlhf.runner.plan import expand, runs_folder
    from dense_rlhf.runs import RunFolder

    study = _study(arguments)
    folders = (RunFolder(runs_folder(study) / job.name) for job in expand(study))
    records = [record for folder in folders if (record := folder.record())]
    if not records:
        raise InputError(f"no run under {runs_folder(study)}; run the study first")
    print(f"open {write_reports(study, records)}")
    return 0


def _record(arguments: argparse.Namespace) -> int:
    from dense_rlhf.report.record import Outline, write_record
    from dense_rlhf.runner.plan import expand, runs_folder
    from dense_rlhf.runs import RunFolder

    study = _study(arguments)
    runs = [RunFolder(runs_folder(study) / job.name) for job in expand(study)]
    if not (done := [run for run in runs if run.record().get("status") == "ok"]):
        raise InputError(f"no finished run under {runs_folder(study)}; run the study first")
    outline = Outline.of(study, _again(arguments), arguments.remark)
    folder = write_record(outline, done, Path(arguments.to), arguments.anyway)
    print(f"{len(done)} of {len(runs)} runs are recorded in {folder}")
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from dense_rlhf.report.diff import HEAD, differences

    if not (rows := differences(Path(arguments.first), Path(arguments.second))):
        print("parameters and results are the same")
        return 0
    for row in [HEAD, *rows]:
        print(" | ".join(one_line(str(cell)) for cell in row))
    return 1


def _archive(arguments: argparse.Namespace) -> int:
    from dense_rlhf.report.release import write_archive

    print(f"wrote {write_archive(Path(arguments.results), Path(arguments.target))}")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from dense_rlhf.attribution import SOURCES
    from dense_rlhf.config.study import studies
    from dense_rlhf.data import DATASETS
    from dense_rlhf.runs import workspace

    for path, about in studies(workspace()).items():
        print(one_line(f"{path:36s} {about}"))
    print(f"\ndatasets          {', '.join(DATASETS)}\nsources of credit {', '.join(SOURCES)} (docs/explain.md)")
    return 0


def _params(arguments: argparse.Namespace) -> int:
    from dense_rlhf.config.study import parameters

    known = parameters(arguments.name).items()
    print("\n".join(f"{name} = {value}  ({wanted})\n    {meaning}" for name, (wanted, value, meaning) in known))
    return 0


def _new(arguments: argparse.Namespace) -> int:
    from dense_rlhf.runs import lay_out

    lay_out(Path(arguments.folder))
    print(f"cd {shlex.quote(arguments.folder)}, then: dense-rlhf run params/reviews.yaml")
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    from dense_rlhf.adapters.serve_rewards import serve

    return serve(arguments)


def _execute(arguments: argparse.Namespace) -> int:
    from dense_rlhf.runner.execution import work

    return work(arguments.notebook, Path(arguments.folder).resolve())


def _add_options(command: argparse.ArgumentParser, name: str) -> None:
    several = {"nargs": "?"} if name == "report" else {}
    command.add_argument("study", help="a YAML file, such as params/reviews.yaml", **several)
    command.add_argument("--set", action="append", metavar="KEY=VALUE", help="override one parameter; repeatable")
    if name in ("run", "report"):
        use = "go on from the study's record there" if name == "run" else "render records, and RESULTS.md, instead"
        command.add_argument("--from", dest="results", metavar="RESULTS", help=use)
    if name == "report":
        command.add_argument("--to", metavar="FOLDER", help="where pages and RESULTS.md go; by default next to RESULTS")
    if name == "record":
        command.add_argument("--to", metavar="RESULTS", default="results", help="folder of records; results by default")
        command.add_argument("--remark", default="", metavar="TEXT", help="what a reader of the numbers must know")
        command.add_argument("--anyway", action="store_true", help="also runs of code that was not committed")
    if name in ("train", "search"):
        command.add_argument("--arm", required=True, help="the reward shape, one of the study's")
    if name == "train":
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events")
    if name == "run":
        from dense_rlhf.runner.executors import EXECUTORS

        command.add_argument("--dry-run", action="store_true", help="list what would run, and why; start nothing")
        command.add_argument("--workers", type=int, metavar="N", help="number of runs at a time; overrides the study")
        command.add_argument("--executor", choices=EXECUTORS, default="local", help="where they run")
        command.add_argument("--gpus", type=float, metavar="G", help="GPUs per run on ray or slurm; ray takes parts")
        command.add_argument("--only", metavar="failed|NAME", help="only these runs; * in a name matches any letters")
        command.add_argument("--force", action="store_true", help="also run finished ones again, from the start")
        command.add_argument("--max-failures", type=int, metavar="N", help="start no more runs after N failures")


def _add_serving(command: argparse.ArgumentParser) -> None:
    command.add_argument("--shape", metavar="SOURCE[=WEIGHT],...", help="sources of credit; terminal by default")
    command.add_argument("--normalise", choices=NORMALISERS, help="how credit becomes shares; softmax by default")
    command.add_argument("--trainer-tokenizer", metavar="MODEL", help="whose token ids arrive, if not the model's own")
    command.add_argument("--host", default="127.0.0.1", help="address to listen at; 127.0.0.1 by default")
    command.add_argument("--port", type=int, default=8700, help="8700 by default; 0 takes a free one")
    command.add_argument("--key-file", metavar="FILE", help="holds the key that clients give; or DENSE_RLHF_REWARD_KEY")
    command.add_argument("--set", action="append", metavar="KEY=VALUE", help="as docs/server.md lists; repeatable")


def _of_studies() -> tuple:
    """Commands that take a study: name, what it does, in words."""
    return (
        ("run", _run, "run a study's grid of notebooks and render its reports"),
        ("status", _status, "show the state of each run of a study; exit code 0 if all are ok"),
        ("check", _check, "check that all a study needs is there, except weights; estimate its memory and time"),
        ("train", _train, "train one policy of a study; also under accelerate launch"),
        ("search", _search, "learn an arm's weights; processes started in parallel share the trials"),
        ("report", _report, "render the reports of a study's finished runs again, or those of records"),
        ("record", _record, "record a study's finished runs in few bytes, to be published"),
    )


def _others() -> tuple:
    """The other commands: name, what it does, arguments, in words."""
    return (
        ("list", _list, (), "list studies, datasets and sources"),
        ("params", _params, (), "list parameters with their meaning, bounds and default"),
        ("diff", _diff, ("first", "second"), "say in what two runs or studies differ; exit code 0 if in nothing"),
        ("archive", _archive, ("results", "target"), "put records into one zip with hashes"),
        ("new", _new, ("folder",), "lay out notebooks and studies in a folder of your own, to work there"),
        ("serve-rewards", _serve, ("model",), "answer token ids with token rewards of a reward model, over HTTP"),
        ("execute", _execute, ("notebook", "folder"), "run one notebook in its prepared folder, as the runner does"),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dense-rlhf", description="Which tokens earned the reward?")
    parser.add_argument("--version", action="version", version=f"dense-rlhf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, act, text in _of_studies():
        command = commands.add_parser(name, help=text)
        command.set_defaults(act=act)
        _add_options(command, name)
    for name, act, places, text in _others():
        command = commands.add_parser(name, help=text)
        command.set_defaults(act=act)
        for place in places:
            command.add_argument(place)
        if name == "serve-rewards":
            _add_serving(command)
        if name == "params":
            command.add_argument("name", nargs="?", default="", help="a group or one of its parameters, as ppo.lr")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 all ok, 1 a run failed, 2 bad input, 130 interrupted, 141 not read."""
    before = signal.getsignal(signal.SIGINT)
    try:
        if before == signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        from dense_rlhf.runner.streams import streams

        with streams():
            arguments = _parser().parse_args(argv)
            return arguments.act(arguments)
    except InputError as error:
        line = one_line(str(error))
        print(f"error: {line if len(line) < 1200 else line[:1200] + ' ...'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except OSError as error:
        print(f"error: {error.filename or type(error).__name__}: {error.strerror or error}", file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    sys.exit(main())
