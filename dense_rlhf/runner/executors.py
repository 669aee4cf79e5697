"""Where runs happen: on this machine, on a Ray cluster, or through SLURM.

An executor has `workers`, the most runs at once; `submit(call, *args)`, a future of what the call returns; and
`stop()`, which ends all that run. It is used in a `with` statement. On several machines the workspace, with runs/, and
the caches must be on a file system that all of them share, and that has locks. An executor records nothing: which runs
are finished is read from their folders.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event

from dense_rlhf.runner.execution import preloaded
from dense_rlhf.runner.kernels import SERVER
from dense_rlhf.runs import gpus, python_path, workspace
from dense_rlhf.types import InputError


class Threads:
    """Threads of this process, which end with it."""

    def __init__(self, workers: int):
        self.workers, self.stopped, self.pool = workers, Event(), ThreadPoolExecutor(workers)

    def stop(self) -> None:
        self.stopped.set()

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.stop()
        self.pool.shutdown(cancel_futures=True)


class Local(Threads):
    """Threads of this process; each call is also given the `gpus` of its slot and an event `stop`.

    Its runs are forks of one server, which starts with the first and ends with the executor. Those of other executors
    are not: each may be on another machine.
    """

    def __init__(self, workers: int):
        super().__init__(workers)
        self.slots, self.server = SimpleQueue(), None
        for share in shares(list(gpus()), workers):
            self.slots.put(share)

    def submit(self, call: Callable, *args) -> Future:
        if self.server is None and SERVER not in os.environ:
            with suppress(InputError):  # each run says so itself
                self.server = preloaded()
                os.environ[SERVER] = self.server.path
        return self.pool.submit(self._in_slot, call, args)

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        if self.server:
            os.environ.pop(SERVER, None)
            self.server.end()

    def _in_slot(self, call: Callable, args: tuple):
        share = self.slots.get()
        try:
            return call(*args, gpus=share, stop=self.stopped)
        finally:
            self.slots.put(share)


def shares(names: list[str], workers: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES for each worker: GPUs of its own, or one that it shares; None without a GPU."""
    if not names:
        return [None] * workers
    return [",".join(names[slot::workers] or [names[slot % len(names)]]) for slot in range(workers)]


class Ray:
    """Tasks of the Ray cluster at RAY_ADDRESS, else of one that starts here and ends with this process.

    A task is tried again when its process or machine was lost, never because a notebook failed.
    """

    RETRIES = 3

    def __init__(self, workers: int, cpus: int, gpus: float):
        self.ray = _extra("ray")
        self.workers, self.futures = workers, []
        if not self.ray.is_initialized():
            package = {"env_vars": {"PYTHONPATH": python_path()}}  # workers run the same code as this process
            try:
                self.ray.init(log_to_driver=False, logging_level="ERROR", runtime_env=package)
            except Exception as error:  # an address without a cluster, a TMPDIR too long for its sockets
                raise InputError(f"--executor ray cannot start: {type(error).__name__}: {error}") from error
        self.options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": self.RETRIES, "retry_exceptions": False}

    def submit(self, call: Callable, *args) -> Future:
        reference = self.ray.remote(_in_folder).options(**self.options).remote(workspace(), call, *args)
        self.futures.append(reference)
        return reference.future()

    def stop(self) -> None:
        for reference in self.futures:
            self.ray.cancel(reference, force=True)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.stop()
        self.ray.shutdown()


def _in_folder(folder: Path, call: Callable, *args):
    """Call in the workspace: a Ray worker starts in a folder of Ray's."""
    os.chdir(folder)
    return call(*args)


class Slurm(Threads):
    """SLURM jobs through submitit; without SLURM, submitit's own processes on this machine.

    Partition, account and the like are set in the environment: SBATCH_PARTITION, SBATCH_ACCOUNT, ...
    """

    def __init__(self, workers: int, cpus: int, gpus: float, minutes: float, logs: str):
        if gpus != int(gpus):
            raise InputError(f"--gpus is {gpus}; SLURM gives whole GPUs: 0, 1, 2, ...")
        super().__init__(workers)
        self.jobs = []
        self.executor = _extra("submitit", "slurm").AutoExecutor(folder=logs)
        more = {"gpus_per_node": int(gpus)} if gpus else {}
        self.executor.update_parameters(name="dense-rlhf", cpus_per_task=cpus, timeout_min=int(minutes), **more)

    def submit(self, call: Callable, *args) -> Future:
        job = self.executor.submit(partial(call, *args))
        self.jobs.append(job)
        return self.pool.submit(self._result, job)

    def _result(self, job):
        while not job.done():
            if self.stopped.wait(1):
                job.cancel()
                raise InputError("cancelled")
        return job.result()


def _extra(module: str, extra: str | None = None):
    """An optional package. Raises `InputError` where it is not installed."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = extra or module
        raise InputError(f"--executor {name} needs the extra: pip install 'dense-rlhf[{name}]'") from error


def executor(kind: str, workers: int, cpus: int, gpus: float | None, minutes: float, logs: str):
    """The executor of that name. `cpus`, `gpus` and `minutes` are those of each run; `logs` is a scheduler's folder.

    Raises `InputError` where its extra is not installed.
    """
    if kind == "local":
        if gpus is not None:
            raise InputError("--gpus is for ray and slurm; here the GPUs are divided among the workers")
        return Local(workers)
    return Ray(workers, cpus, gpus or 0) if kind == "ray" else Slurm(workers, cpus, gpus or 0, minutes, logs)


EXECUTORS = ("local", "ray", "slurm")
