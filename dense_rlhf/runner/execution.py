"""One run in a process of its own: started, watched, ended with all its children, and checked before it counts as ok.

    runner -> guard (`python -m dense_rlhf execute`) -> worker, forked from it -> kernel, too -> what a cell starts

Each dies with the one above it, whatever killed that one; the guard ends all below it, detached processes too. Where
`kernels` has a server, the guard is a fork of it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

from dense_rlhf.config.parse import read_yaml
from dense_rlhf.files import read_json, write_json, write_text
from dense_rlhf.runner.kernels import (
    PARENT,
    SERVER,
    THREADS,
    Forked,
    Server,
    SpareKernel,
    call_this_process,
    die_with_parent,
)
from dense_rlhf.runs import RunFolder, python_path, workspace
from dense_rlhf.types import InputError
from dense_rlhf.view.escape import scrubbed

HEARTBEAT = ".heartbeat"  # touched by the worker while it lives; holds the number of the running cell
USED = ".cpu"  # seconds of the CPU that all processes of a run took, written by its guard
BEAT = 2.0  # seconds
SILENT = 5 * BEAT  # then a run does not answer: its worker is gone, or its kernel stopped
PATIENCE = 5.0  # seconds in which a guard ends what is below it
KERNEL_DIED = 70  # exit code of a worker whose kernel died; that of one ended by signal N is 128 + N
PR_SET_CHILD_SUBREAPER = 36
PLACE = 80  # bytes of a folder's path; those of the sockets in it add 20, and the system takes 107
NEVER = 10**6  # seconds: the run's own limit decides


@dataclass(frozen=True)
class Limits:
    """What a run may use."""

    threads: int  # of the CPU
    seconds: float
    gpus: str | None = None  # its CUDA_VISIBLE_DEVICES; None: this process's own


# ---------------------------------------------------------------------------------------------------- the runner's side


def launch(
    notebook: str, folder: Path, limits: Limits, stop: Event | None = None, keep: tuple[int, ...] = ()
) -> tuple[str, str]:
    """Execute a prepared run in a subprocess: its status, and what went wrong.

    `stop` ends it as `cancelled`; `keep` are files that it holds open, such as locks.
    """
    log, deadline = folder / "log.txt", time.monotonic() + limits.seconds

    def over() -> tuple[str, str] | None:
        """How it ends, where it must not go on."""
        if stop is not None and stop.is_set():
            return "cancelled", "interrupted"
        if time.monotonic() > deadline:
            return "timeout", f"not finished after {limits.seconds / 60:.0f} minutes"

    (folder / USED).unlink(missing_ok=True)  # an earlier runner was killed
    with open(log, "a", encoding="utf-8") as file:
        begin = file.tell()
        child = _start(["dense_rlhf", "execute", notebook, str(folder)], limits, (file.fileno(), *keep), over)
    try:
        while child.poll() is None:
            if end := over():
                return end
            _wait(child, 0.2)
    finally:  # also on an interrupt: no kernel is left behind
        _end(child)
    return _outcome(child.returncode, _last_line(log, begin))


def _start(
    arguments: list[str], limits: Limits, files: tuple[int, ...], over: Callable[[], object]
) -> Forked | subprocess.Popen:
    """`python -m` with these arguments: a fork of the server, where there is one; else a new process.

    `files`: its output, and what it holds open. Where the server fails, a line on standard error says so.
    """
    environment, folder = _environment(limits), str(workspace())
    if environment.get(SERVER):
        try:
            return Forked(arguments, environment, folder, files, over)
        except OSError as error:
            os.environ[SERVER] = ""  # no other run tries, and this is said once
            print(f"runs are not preloaded any more: the server fails ({error})", file=sys.stderr, flush=True)
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=files[0],
        stderr=files[0],
        env=environment,
        start_new_session=True,
        pass_fds=files[1:],
    )


def preloaded() -> Server:
    """A server for the runs of this process, which would have this environment."""
    return Server(_environment(Limits(1, 0)), kernel_folder())


def _environment(limits: Limits) -> dict[str, str]:
    """Threads and GPUs are fixed before torch computes; the worker runs this very package."""
    threads = dict.fromkeys(THREADS, str(limits.threads))
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    quiet |= {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}  # whatever the locale
    gpus = {} if limits.gpus is None else {"CUDA_VISIBLE_DEVICES": limits.gpus}
    return os.environ | threads | quiet | gpus | {"PYTHONPATH": python_path(), PARENT: str(os.getpid())}


def _wait(child: Forked | subprocess.Popen, seconds: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        child.wait(seconds)


def _end(child: Forked | subprocess.Popen) -> None:
    """Have the guard end all below it; if it does not, kill what can be found. A kernel has a group of its own."""
    import psutil

    child.terminate()
    _wait(child, PATIENCE)
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
    if code < 0 or code > 128:
        name = signal.Signals(-code if code < 0 else code - 128).name
        return "killed", f"the run's process was ended by {name}, perhaps out of memory"
    return "failed", last_line


def _last_line(log: Path, begin: int) -> str:
    with open(log, encoding="utf-8", errors="replace") as file:
        file.seek(begin)
        lines = [line for line in file.read().splitlines() if line.strip()]
    reason = lines[-1] if lines else "it ended and logged nothing"
    return reason + f"; the disk of {log.parent} is full" * (shutil.disk_usage(log.parent).free < 2**16)


def heartbeat(folder: Path) -> dict:
    """The `cell` that a run is at, and its `age`: seconds since the worker last showed that it lives. Else empty."""
    try:
        cell = read_json(folder / HEARTBEAT)["cell"]
        return {"cell": int(cell), "age": max(0.0, time.time() - (folder / HEARTBEAT).stat().st_mtime)}
    except (OSError, ValueError, LookupError, TypeError, OverflowError):  # also while it is being replaced
        return {}


def cpu_seconds(folder: Path) -> float | None:
    """What the processes of the run that just ended in `folder` took of the CPU; None where its guard was killed."""
    try:
        return float((folder / USED).read_text())
    except (OSError, ValueError):
        return None
    finally:
        with suppress(OSError):
            (folder / USED).unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------- the worker's side


def work(notebook: str, folder: Path) -> int:
    """What the subprocess does; returns its exit code. The log gets the traceback, and in its last line the reason."""
    if parent := os.environ.get(PARENT):
        guarded(int(parent), folder)
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


def guarded(parent: int, folder: Path) -> None:
    """Return in a child, the worker; the process itself stays to end all below it when the worker or `parent` ends.

    At last it writes `USED`.
    """
    import psutil

    signals, guard = {signal.SIGCHLD, signal.SIGTERM}, psutil.Process()
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # what loses its parent becomes a child of the guard
    die_with_parent(parent, signal.SIGTERM)
    if not (worker := os.fork()):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        call_this_process("dense-worker")
        return die_with_parent(guard.pid)
    call_this_process("dense-guard")
    code = 128 + signal.SIGTERM
    while signal.sigwait(signals) == signal.SIGCHLD:
        if (ended := _reap()).keys() & {worker}:
            code = ended[worker]
            break
    until = time.monotonic() + PATIENCE
    while (below := guard.children(recursive=True)) and time.monotonic() < until:
        for process in below:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(0.01)
        _reap()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    with suppress(OSError):  # a run does not fail for it
        (folder / USED).write_text(f"{used.ru_utime + used.ru_stime:.3f}")
    os._exit(code)


def _reap() -> dict[int, int]:
    """The exit codes of the children that have ended, by process."""
    codes = {}
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            code = os.waitstatus_to_exitcode(ended[1])
            codes[ended[0]] = code if code >= 0 else 128 - code
    return codes


def _reason(error: Exception) -> str:
    """The cell and the last line of its traceback."""
    if isinstance(error, InputError):
        return str(error)
    if not hasattr(error, "ename"):
        return f"{type(error).__name__}: {error}"
    first = next((line for line in error.source.splitlines() if line.strip()), "")
    return f"In [{error.exec_count}] {first[:60]!r}: {error.ename}: {error.evalue}"


def execute_notebook(notebook: str, folder: Path) -> None:
    """Run a notebook with the parameters in `folder`, in this process.

    Raises what papermill raises, and `InputError` where a cell called `exit()`, which papermill takes for a success.
    """
    kernel = SpareKernel()  # before papermill has threads
    import papermill
    from traitlets.config import Config

    logging.getLogger("papermill").setLevel(logging.ERROR)  # else a warning for each parameter that no cell assigns
    run = RunFolder(folder)
    parameters = read_yaml(run.file("params.yaml")) | {"run_dir": str(folder)}  # else a notebook is played by hand
    source, target = workspace() / "notebooks" / f"{notebook}.ipynb", run.file("notebook.ipynb")
    with kernel_folder() as place, _scrubbing(target):
        os.environ |= {"IPYTHONDIR": place, "JUPYTER_RUNTIME_DIR": place}  # the user's may be read-only, or alter runs
        os.environ.pop("PYTHONSTARTUP", None)
        manager = {"transport": "ipc", "ip": f"{place}/k", "connection_file": f"{place}/kernel.json"}
        executed = papermill.execute_notebook(
            str(source),
            str(target),
            parameters=parameters,
            kernel_name="python3",
            progress_bar=False,
            cwd=str(workspace()),
            config=Config({"KernelManager": manager}),
            kernel_manager_class=_manager(kernel),
            on_cell_start=_beating(folder),
            start_timeout=NEVER,
            iopub_timeout=NEVER,
        )
    if cell := unfinished(executed):
        raise InputError(f"{cell} was not executed to its end; a cell must not call exit()")


@contextmanager
def _scrubbing(path: Path) -> Iterator[None]:
    """Leave a notebook that tells no more than its page does."""
    import nbformat

    try:
        yield
    finally:
        clean = None
        with suppress(OSError, ValueError):  # there is none, or it was cut short and has no page
            clean = scrubbed(nbformat.read(path, as_version=4), workspace())
        if clean:
            write_text(path, nbformat.writes(nbformat.from_dict(clean)) + "\n")


def kernel_folder() -> tempfile.TemporaryDirectory:
    """A folder for a kernel's sockets and settings. Raises `InputError`, which names TMPDIR, where there is none."""
    place = ""
    try:
        place = tempfile.gettempdir()
        place = place if len(os.fsencode(place)) <= PLACE else "/tmp"
        return tempfile.TemporaryDirectory(prefix="drl-", dir=place, ignore_cleanup_errors=True)
    except OSError as error:
        wanted = f"set TMPDIR to a folder of at most {PLACE} bytes where you may write"
        raise InputError(f"no place for a kernel's sockets {place}: {error.strerror}; {wanted}") from error


def _manager(kernel: SpareKernel) -> type:
    """A manager whose kernel is this fork of this process, whatever Jupyter has by that name."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from jupyter_client.provisioning import LocalProvisioner

    class Spare(LocalProvisioner):
        async def launch_kernel(self, cmd: list[str], env: dict[str, str], **_) -> dict:
            kernel.start(cmd, env)
            self.process, self.pid, self.pgid = kernel, kernel.pid, kernel.pid
            return self.connection_info

    class Kernels(AsyncKernelManager):
        kernel_spec = KernelSpec(argv=["-f", "{connection_file}"], display_name="Python 3", language="python")

        def __init__(self, **options):
            super().__init__(**options)
            self.provisioner = Spare(kernel_spec=self.kernel_spec, parent=self)

    return Kernels


def _beating(folder: Path):
    """A hook that notes which cell starts, and a thread that shows every few seconds that no process is stopped."""
    import psutil

    def beat() -> None:
        while True:
            time.sleep(BEAT)
            with suppress(OSError, psutil.Error):  # before the first cell, and after the last
                if all(process.status() != psutil.STATUS_STOPPED for process in psutil.Process().children()):
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
