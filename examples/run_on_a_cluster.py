"""Run a grid on a cluster: one study on this machine, on Ray, or through SLURM.

    python examples/run_on_a_cluster.py local --dry-run    # what would run
    python examples/run_on_a_cluster.py ray                # the cluster at RAY_ADDRESS, or one that starts here
    python examples/run_on_a_cluster.py slurm              # without SLURM: submitit's own processes on this machine

The command line does the same: `dense-rlhf run params/ablations/kl.yaml --set size=smoke --executor ray`. What
machines must share, and what happens when a node is lost, is in `docs/cluster_ray.md` and `docs/cluster_slurm.md`.
"""

import argparse
from pathlib import Path

from dense_rlhf.config.study import load_study
from dense_rlhf.report.write import write_reports
from dense_rlhf.runner.executors import EXECUTORS, executor
from dense_rlhf.runner.grid import run_grid
from dense_rlhf.runner.plan import describe, expand, reasons, runs_folder
from dense_rlhf.runs import workspace

STUDY = workspace() / "params" / "ablations" / "kl.yaml"


def main(where: str, dry_run: bool = False, study: Path = STUDY, settings: tuple[str, ...] = ("size=smoke",)) -> list:
    """The records of all runs; none after a dry run."""
    grid = load_study(study, settings)
    jobs, folder = expand(grid), runs_folder(grid)
    why = reasons(jobs, folder, grid.workers)
    print("\n".join(f"{'run' if why[job.name] else 'finished':8s}  {describe(job)}  {why[job.name]}" for job in jobs))
    if dry_run:
        return []
    logs, minutes = str(folder / ".slurm"), grid.timeout_minutes
    machines = executor(where, grid.workers, cpus=grid.run.threads or 1, gpus=None, minutes=minutes, logs=logs)
    records = run_grid(grid, executor=machines)  # runs that are finished are not repeated
    print(f"open {write_reports(grid, records)}")
    return records


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("where", choices=EXECUTORS)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    main(arguments.where, arguments.dry_run)
