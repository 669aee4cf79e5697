"""Where runs happen: here, on a Ray cluster, or through SLURM. Which runs are finished, only their folders know.

An executor has `workers`, the most runs at once; `submit(call, *args)`, a future of what the call returns; `stop()`,
which ends all that run; and is closed by `with`. Elsewhere, checkout, runs/ and caches must be on a file system that
all machines share, with its locks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from threading import Event

from dense_rlhf.runs import python_path
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
    """Threads of this process; each call is also given its slot's `gpus` and an event `stop`."""

    def __init__(self, workers: int):
        super().__init__(workers)
        self.slots = SimpleQueue()
        for share in shares(visible_gpus(), workers):
            self.slots.put(share)

    def submit(self, call: Callable, *args) -> Future:
        return self.pool.submit(self._in_slot, call, args)

    def _in_slot(self, call: Callable, args: tuple):
        share = self.slots.get()
        try:
            return call(*args, gpus=share, stop=self.stopped)
        finally:
            self.slots.put(share)


def visible_gpus() -> list[str]:
    """The GPUs that CUDA would see, found without loading it."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.split()


def shares(gpus: list[str], workers: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES for each of the workers: GPUs of their own, or one with others; None without any."""
    if not gpus:
        return [None] * workers
    return [",".join(gpus[slot::workers] or [gpus[slot % len(gpus)]]) for slot in range(workers)]


class Ray:
    """Tasks of a Ray cluster: the one at RAY_ADDRESS, else one that starts here and ends with this process.

    A task is tried again where its process or machine was lost, never because a notebook failed.
    """

    RETRIES = 3

    def __init__(self, workers: int, cpus: int, gpus: float):
        self.ray = _extra("ray")
        self.workers, self.futures = workers, []
        if not self.ray.is_initialized():
            package = {"env_vars": {"PYTHONPATH": python_path()}}  # workers run the code that this process runs
            self.ray.init(log_to_driver=False, logging_level="ERROR", runtime_env=package)
        self.options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": self.RETRIES, "retry_exceptions": False}

    def submit(self, call: Callable, *args) -> Future:
        reference = self.ray.remote(call).options(**self.options).remote(*args)
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


class Slurm(Threads):
    """SLURM jobs through submitit; where there is no SLURM, submitit's own processes on this machine.

    Partition, account and the like: SBATCH_PARTITION, SBATCH_ACCOUNT, ... in the environment.
    """

    def __init__(self, workers: int, cpus: int, gpus: float, minutes: float, logs: str):
        if gpus != int(gpus):
            raise InputError(f"--gpus is {gpus}; SLURM gives whole ones, wanted 0, 1, 2, ...")
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
    """The executor of that name: `cpus` and `gpus` for each run, which has `minutes`; `logs` are a scheduler's own.

    Raises `InputError` where its extra is missing.
    """
    if kind == "local":
        if gpus is not None:
            raise InputError("--gpus is for ray and slurm; here the GPUs are divided among the workers")
        return Local(workers)
    return Ray(workers, cpus, gpus or 0) if kind == "ray" else Slurm(workers, cpus, gpus or 0, minutes, logs)


EXECUTORS = ("local", "ray", "slurm")
