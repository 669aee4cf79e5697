"""One run in a process of its own: started, watched, ended with all its children, and checked before it counts as ok.

    runner -> worker (`python -m dense_rlhf execute`) -> kernel

Each dies with the one above it, whatever killed that one.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

from dense_rlhf.config.parse import read_yaml
from dense_rlhf.files import read_json, write_json
from dense_rlhf.runs import RunFolder, python_path, workspace
from dense_rlhf.types import InputError

HEARTBEAT = ".heartbeat"  # touched by the worker while it lives; holds the number of the running cell
BEAT = 2.0  # seconds
SILENT = 5 * BEAT  # then a run does not answer: its worker is gone, or its kernel stopped
PARENT = "DENSE_RLHF_PARENT"
KERNEL_DIED = 137  # exit code of a worker whose kernel died
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Limits:
    """What a run may use."""

    threads: int  # of the CPU
    seconds: float
    gpus: str | None = None  # its CUDA_VISIBLE_DEVICES; None: this process's own


def die_with_parent(parent: int) -> None:
    """End this process when `parent`, the process that started it, ends; at once if it has ended already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(KERNEL_DIED)


# ---------------------------------------------------------------------------------------------------- the runner's side


def launch(
    notebook: str, folder: Path, limits: Limits, stop: Event | None = None, keep: tuple[int, ...] = ()
) -> tuple[str, str]:
    """Execute a prepared run in a subprocess: its status, and what went wrong.

    `stop` ends it as `cancelled`; `keep` are files that it holds open, such as locks.
    """
    log, deadline = folder / "log.txt", time.monotonic() + limits.seconds
    with open(log, "a", encoding="utf-8") as file:
        begin = file.tell()
        child = subprocess.Popen(
            [sys.executable, "-m", "dense_rlhf", "execute", notebook, str(folder)],
            cwd=workspace(),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=_environment(limits),
            start_new_session=True,
            pass_fds=keep,
        )
    try:
        while child.poll() is None:
            if stop is not None and stop.is_set():
                return "cancelled", "interrupted"
            if time.monotonic() > deadline:
                return "timeout", f"not finished after {limits.seconds / 60:.0f} minutes"
            _wait(child, 0.2)
    finally:  # also on an interrupt: no kernel is left behind
        _end(child)
    return _outcome(child.returncode, _last_line(log, begin))


def _environment(limits: Limits) -> dict[str, str]:
    """Threads and GPUs are fixed before torch loads; the worker runs this very package."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(limits.threads))
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    gpus = {} if limits.gpus is None else {"CUDA_VISIBLE_DEVICES": limits.gpus}
    return os.environ | threads | quiet | gpus | {"PYTHONPATH": python_path(), PARENT: str(os.getpid())}


def _wait(child: subprocess.Popen, seconds: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        child.wait(seconds)


def _end(child: subprocess.Popen) -> None:
    """Kill the worker's process group and all its descendants; a kernel has a group of its own."""
    import psutil

    descendants: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        descendants += psutil.Process(child.pid).children(recursive=True) if child.poll() is None else []
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    for process in descendants:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    child.wait()


def _outcome(code: int, last_line: str) -> tuple[str, str]:
    if code == 0:
        return "ok", ""
    if code == KERNEL_DIED:
        return "killed", f"the kernel died, perhaps out of memory ({last_line})"
    if code < 0:
        return "killed", f"the run's process was ended by {signal.Signals(-code).name}, perhaps out of memory"
    return "failed", last_line


def _last_line(log: Path, begin: int) -> str:
    with open(log, encoding="utf-8", errors="replace") as file:
        file.seek(begin)
        lines = [line for line in file.read().splitlines() if line.strip()]
    return lines[-1] if lines else "it ended and logged nothing"


def heartbeat(folder: Path) -> dict:
    """The `cell` that a run is at, and its `age`: seconds since the worker last showed that it lives. Else empty."""
    try:
        cell = read_json(folder / HEARTBEAT)["cell"]
        return {"cell": int(cell), "age": max(0.0, time.time() - (folder / HEARTBEAT).stat().st_mtime)}
    except (OSError, ValueError, LookupError, TypeError, OverflowError):  # also while it is being replaced
        return {}


# ---------------------------------------------------------------------------------------------------- the worker's side


def work(notebook: str, folder: Path) -> int:
    """What the subprocess does; returns its exit code. The log gets the traceback, and in its last line the reason."""
    if parent := os.environ.get(PARENT):
        die_with_parent(int(parent))
    sys.modules.setdefault("rfc3987_syntax", None)  # jsonschema can do without it, and is a second faster
    try:
        execute_notebook(notebook, folder)
    except Exception as error:  # of papermill, nbclient or the kernel: no common base class
        import traceback

        from nbclient.exceptions import DeadKernelError

        traceback.print_exc()
        line = " ".join(_reason(error).split())[:500]
        print("".join(c if c.isprintable() else "?" for c in line), flush=True)  # it may quote what a model wrote
        return KERNEL_DIED if isinstance(error, DeadKernelError) else 1
    return 0


def _reason(error: Exception) -> str:
    """The cell and the last line of its traceback."""
    if not hasattr(error, "ename"):
        return f"{type(error).__name__}: {error}"
    first = next((line for line in error.source.splitlines() if line.strip()), "")
    return f"In [{error.exec_count}] {first[:60]!r}: {error.ename}: {error.evalue}"


def execute_notebook(notebook: str, folder: Path) -> None:
    """Run a notebook with the parameters in `folder`, in this process.

    Raises what papermill raises, and `InputError` where a cell called `exit()`, which papermill takes for a success.
    """
    import papermill
    from traitlets.config import Config

    logging.getLogger("papermill").setLevel(logging.ERROR)  # else a warning for each parameter that no cell assigns
    run = RunFolder(folder)
    parameters = read_yaml(run.file("params.yaml")) | {"run_dir": str(folder)}  # else a notebook is played by hand
    source, target = workspace() / "notebooks" / f"{notebook}.ipynb", run.file("notebook.ipynb")
    with tempfile.TemporaryDirectory(prefix="drl-") as sockets:  # by default two kernels would share theirs
        manager = {"transport": "ipc", "ip": f"{sockets}/k"}
        executed = papermill.execute_notebook(
            str(source),
            str(target),
            parameters=parameters,
            kernel_name="python3",
            progress_bar=False,
            cwd=str(workspace()),
            config=Config({"KernelManager": manager}),
            kernel_manager_class=_manager(),
            on_cell_start=_beating(folder),
        )
    if cell := unfinished(executed):
        raise InputError(f"{cell} was not executed to its end; a cell must not call exit()")


def _manager() -> type:
    """A kernel manager whose kernels end with this process."""
    from jupyter_client.manager import AsyncKernelManager

    class Kernels(AsyncKernelManager):
        def format_kernel_cmd(self, extra_arguments=None):
            command = super().format_kernel_cmd(extra_arguments)
            return ["dense_rlhf.runner.execution" if part == "ipykernel_launcher" else part for part in command]

    return Kernels


def _beating(folder: Path):
    """A hook that notes which cell starts, and a thread that shows every few seconds that this process lives."""

    def beat() -> None:
        while True:
            time.sleep(BEAT)
            with suppress(FileNotFoundError):  # before the first cell
                os.utime(folder / HEARTBEAT)

    def cell_started(cell, cell_index: int) -> None:
        write_json(folder / HEARTBEAT, {"cell": cell_index + 1})

    Thread(target=beat, daemon=True).start()
    return cell_started


def unfinished(notebook) -> str:
    """The first code cell that was not executed or ended with an error; empty if there is none."""
    for number, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), 1):
        errors = [output for output in cell.outputs if output.output_type == "error"]
        if cell.source.strip() and (cell.execution_count is None or errors):
            return f"code cell {number}"
    return ""


if __name__ == "__main__":  # the kernel
    from ipykernel import kernelapp

    die_with_parent(int(os.environ["JPY_PARENT_PID"]))
    kernelapp.launch_new_instance()
