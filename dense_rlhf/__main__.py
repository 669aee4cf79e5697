"""python -m dense_rlhf run|search|train|check|report|list"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from dense_rlhf.types import InputError


def _run(arguments: argparse.Namespace) -> int:
    from dense_rlhf.grid import describe, expand, run_grid
    from dense_rlhf.study import load_study

    study = load_study(Path(arguments.study), arguments.set or ())
    jobs = expand(study)
    if arguments.dry_run:
        print("\n".join(describe(job) for job in jobs))
        print(f"{len(jobs)} runs, {study.workers} at a time; nothing was started")
        return 0
    print(f"{study.study}: {len(jobs)} runs, {study.workers} at a time", flush=True)
    records = run_grid(study, lambda line: print(line, flush=True))
    failed = [record for record in records if record["status"] not in ("ok", "cached")]
    from dense_rlhf.report import write_reports

    index = write_reports(study, records)
    for record in failed:
        print(f"{record['status']}: {record['job']}: {record['error']}\n"
              f"  again: papermill notebooks/{record['notebook']}.ipynb out.ipynb "
              f"-f runs/{study.study}/{record['job']}/params.yaml")  # fmt: skip
    print(f"open {index}")
    return 1 if failed else 0


def _check(arguments: argparse.Namespace) -> int:
    from dense_rlhf.grid import expand
    from dense_rlhf.study import load_study

    study = load_study(Path(arguments.study), arguments.set or ())
    jobs = expand(study)
    from dense_rlhf.check import check

    failed = check(study, lambda line: print(line, flush=True))
    print(f"\n{len(jobs)} runs, {failed or 'no'} checks failed; no weights were read")
    return 2 if failed else 0


def _train(arguments: argparse.Namespace) -> int:
    from dense_rlhf.study import load_study
    from dense_rlhf.train import train

    study = load_study(Path(arguments.study), arguments.set or ())
    run = train(study, arguments.arm, arguments.seed, arguments.tensorboard)
    if os.environ.get("RANK", "0") == "0":
        print(f"in {run.path}")
    return 0


def _search(arguments: argparse.Namespace) -> int:
    from dense_rlhf.study import load_study
    from dense_rlhf.train import search

    def said(trials: range) -> Iterator[int]:
        for done in trials:
            print(f"{done - trials.start} trials run here, of {len(trials)} that were left", flush=True)
            yield done

    study = load_study(Path(arguments.study), arguments.set or ())
    run, learned = search(study, arguments.arm, said)
    if learned:
        print(f"incumbent: {', '.join(f'{s} {w:.3f}' for s, w in zip(learned.sources, learned.weights))}")
    again = shlex.join(["run", arguments.study, *(part for pair in arguments.set or () for part in ("--set", pair))])
    print(f"in {run.path}; audited, and trained with, by\n  python -m dense_rlhf {again}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from dense_rlhf.grid import expand, runs_folder
    from dense_rlhf.report import write_reports
    from dense_rlhf.runs import RunFolder
    from dense_rlhf.study import load_study

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


def _execute(arguments: argparse.Namespace) -> int:
    from dense_rlhf.grid import execute_notebook

    try:
        execute_notebook(arguments.notebook, Path(arguments.folder).resolve())
    except Exception as error:  # a papermill, nbclient or kernel error: the log keeps the trace, this line the reason
        import traceback

        traceback.print_exc()
        reason = f"{error.ename}: {error.evalue}" if hasattr(error, "ename") else f"{type(error).__name__}: {error}"
        print(" ".join(reason.split())[:500], flush=True)
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 all ok, 1 a run failed, 2 bad input, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m dense_rlhf", description="Which tokens earned the reward?")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, act, text in (("run", _run, "run a study's grid of notebooks and render its reports"),
                            ("check", _check, "resolve all that a study needs except weights; its memory and time"),
                            ("train", _train, "train one policy of a study; also under accelerate launch"),
                            ("search", _search, "learn an arm's weights; any number of these share the trials"),
                            ("report", _report, "render the reports of a study's finished runs again")):  # fmt: skip
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
            command.add_argument("--dry-run", action="store_true", help="list the runs and start nothing")
    commands.add_parser("list", help="what can be named: studies, datasets, sources").set_defaults(act=_list)
    execute = commands.add_parser("execute", help="run one notebook in its prepared folder (the runner calls this)")
    execute.add_argument("notebook")
    execute.add_argument("folder")
    execute.set_defaults(act=_execute)
    arguments = parser.parse_args(argv)
    try:
        return arguments.act(arguments)
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
