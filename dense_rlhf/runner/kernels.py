"""Runs that start preloaded: a server imports the heavy libraries once and forks a process for each run.

    owner (the runner of a study) -> server -> keeper, one a run -> guard -> worker -> kernel

Each dies with the one above it. Only libraries of others are preloaded: what a run imports of this package, and of any
other path in PYTHONPATH, stands on disk when the run starts. The server is this file, run by its path; it has one
thread and has not opened a GPU, else it refuses and runs start unforked. A library that reads a variable of the
environment when it is imported has read the owner's; threads, GPUs and all others are each run's own. Linux only.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

PARENT = "DENSE_RLHF_PARENT"  # process id; a run's guard ends with it
SERVER = "DENSE_RLHF_SERVER"  # path of the socket of the server that forks runs; empty: start none
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
SINGLE = dict.fromkeys(THREADS, "1") | {"JE_ARROW_MALLOC_CONF": "background_thread:false"}  # no import starts a thread
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
ANSWER = 16  # bytes of a number that the server tells
ORPHANED = 70  # exit code of a process whose parent is gone

PRELOADED = """
    ipykernel.kernelapp IPython papermill nbclient psutil jinja2 pydantic.dataclasses pydantic.type_adapter
    pandas scipy.stats scipy.optimize sklearn.linear_model matplotlib.pyplot seaborn
    torch torch.utils.checkpoint torch.distributed.tensor torch.distributed.checkpoint.state_dict
    transformers transformers.modeling_utils transformers.generation.utils transformers.models.llama.modeling_llama
    transformers.models.auto.modeling_auto transformers.models.auto.tokenization_auto
    botorch.fit botorch.models
""".split()


def die_with_parent(parent: int, by: int = signal.SIGKILL) -> None:
    """Get a signal when `parent`, the process that started this one, ends; exit at once if it has ended already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, by)
    if os.getppid() != parent:
        os._exit(ORPHANED)


def call_this_process(name: str) -> None:
    """Set the name by which `top` shows it; a fork has the command line of the server."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode())


def settle(environment: Mapping[str, str]) -> None:
    """Take a new environment in a process that was forked."""
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # TMPDIR may be another now


class Child:
    """A fork of this process, with what `subprocess.Popen` has."""

    stdin = stdout = stderr = None

    def __init__(self, pid: int):
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        return self.wait(os.WNOHANG)

    def wait(self, options: int = 0) -> int | None:
        if self.returncode is None and (ended := os.waitpid(self.pid, options))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


# ---------------------------------------------------------------------------------------------------- the kernel


class SpareKernel(Child):
    """A fork of this process that becomes a kernel when it is told its arguments, and ends with this process.

    To be made while this process has one thread.
    """

    def __init__(self):
        reader, writer = os.pipe()
        parent, pid = os.getpid(), os.fork()
        super().__init__(pid)
        if pid:
            os.close(reader)
            self.writer = os.fdopen(writer, "w", encoding="utf-8")
            return
        die_with_parent(parent)
        os.setsid()  # an interrupt of the kernel reaches what its cells started, and nothing else
        os.dup2(reader, 3)
        os.closerange(4, os.sysconf("SC_OPEN_MAX"))  # as of a process that was not forked
        with open(3, encoding="utf-8") as file:
            if not (order := file.read()):
                os._exit(0)  # none was needed
        become_kernel(**json.loads(order))

    def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        parent = str(os.getpid())  # ipykernel reads the variable when it is imported
        arguments = [*arguments, f"--IPKernelApp.parent_handle={parent}"]
        with self.writer as file:
            json.dump({"arguments": arguments, "environment": dict(environment) | {"JPY_PARENT_PID": parent}}, file)


def become_kernel(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Be an IPython kernel until it is shut down, then exit."""
    call_this_process("dense-kernel")
    settle(environment)
    if "torch" in sys.modules:
        refresh(int(environment.get(THREADS[0]) or len(os.sched_getaffinity(0))))
    from ipykernel import kernelapp

    kernelapp.launch_new_instance(argv=arguments)
    sys.exit()


def refresh(threads: int) -> None:
    """The state of preloaded libraries that a fork must not share, or that is each run's own."""
    import numpy
    import threadpoolctl
    import torch

    numpy.random.seed()
    torch.default_generator.seed()  # as in every new process; that of `random` is seeded by the fork
    threadpoolctl.threadpool_limits(threads)
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------- the owner's side


class Server:
    """A server that has imported `modules`; it ends with this process, or by `end()`. `path` is its socket's."""

    def __init__(
        self, environment: Mapping[str, str], folder: tempfile.TemporaryDirectory, modules: Sequence[str] = PRELOADED
    ):
        self.folder, self.path = folder, f"{folder.name}/server"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.path)
            listener.listen(64)  # runs may ask while it still imports
            self.process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(listener.fileno()), str(os.getpid()), *modules],
                env=dict(environment) | SINGLE,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
                pass_fds=[listener.fileno()],
            )

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()


class Forked:
    """A command `python -m MODULE ...` in a fork of the server, with what `subprocess.Popen` has.

    It ends with its runner. `files`: its output, and what it holds open. Raises OSError where the server refuses, is
    gone, or gives no sign until the wait is `over`.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        folder: str,
        files: Sequence[int],
        over: Callable[[], object],
    ):
        self.returncode = None
        self.server = socket.socket(socket.AF_UNIX)
        try:
            self.server.connect(environment[SERVER])
            socket.send_fds(self.server, [b"\n"], files)
            order = {"arguments": arguments, "environment": environment, "folder": folder}
            self.server.sendall(json.dumps(order).encode() + b"\n")
            self.pid = self._process(over)
        except OSError:
            self.server.close()
            raise

    def _process(self, over: Callable[[], object]) -> int:
        """Its process id, when the server has imported and forked."""
        while not select.select([self.server], [], [], 0.1)[0]:
            if over():
                raise OSError("it gave no sign in time")
        answer = self._answer()
        if not answer.strip().isdigit():
            raise OSError((answer + self.server.recv(100)).decode() or "it ended")
        return int(answer)

    def _answer(self) -> bytes:
        return self.server.recv(ANSWER, socket.MSG_WAITALL)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises `subprocess.TimeoutExpired` after so many seconds."""
        if self.returncode is None:
            if not select.select([self.server], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a forked run", timeout)
            if answer := self._answer():
                self.returncode = int(answer)
            else:  # the server was killed; the guard ends what is below it
                self.returncode = -signal.SIGKILL
                with suppress(ProcessLookupError):
                    select.select([guard := os.pidfd_open(self.pid)], [], [], 5)
                    os.close(guard)
            self.server.close()
        return self.returncode

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def terminate(self) -> None:
        if self.poll() is None:
            self.server.shutdown(socket.SHUT_WR)


# ---------------------------------------------------------------------------------------------------- the server's side


def serve(listener: socket.socket, owner: int, modules: Sequence[str]) -> None:
    """Fork a keeper for each connection. Returns only in a process that has ended its run."""
    die_with_parent(owner)
    call_this_process("dense-server")
    gc.disable()  # what is imported stays: to look it through again and again is a fifth of the time
    preload(modules)
    refusal, own = unfit(), set(os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [path for path in sys.path if path not in own]
    gc.collect()
    gc.freeze()  # pages stay shared with the forks
    gc.enable()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are not waited for
    server = os.getpid()
    while True:
        connection, _ = listener.accept()
        if not os.fork():
            listener.close()
            die_with_parent(server)
            return keep(connection, refusal)
        connection.close()


def preload(modules: Sequence[str]) -> None:
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # as a kernel sets it
    sys.modules.setdefault("rfc3987_syntax", None)  # jsonschema can do without it, and is a second faster
    for name in modules:
        with suppress(ImportError):
            importlib.import_module(name)


def unfit() -> str:
    """Why this process must not be forked; empty if it may."""
    if (threads := len(os.listdir("/proc/self/task"))) > 1:
        return f"{threads} threads run after the imports"
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if "nvidia" in os.readlink(f"/proc/self/fd/{name}"):
                return "an import opened the GPU"
    return ""


def keep(connection: socket.socket, refusal: str) -> None:
    """Fork a run, tell its runner its process id, end it when the runner hangs up, tell its exit code.

    Returns only in the fork, when it has ended.
    """
    call_this_process("dense-keeper")
    _, files, *_ = socket.recv_fds(connection, 1, 16)
    order = json.loads(connection.makefile("r", encoding="utf-8").readline())
    if refusal:
        connection.sendall(refusal.encode())
        os._exit(0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if not (pid := os.fork()):
        connection.close()
        return run(files, **order)
    for file in files:
        os.close(file)
    connection.sendall(f"{pid:{ANSWER}d}".encode())
    events = select.poll()
    events.register(connection, select.POLLIN)
    events.register(ended := os.pidfd_open(pid), select.POLLIN)
    if ended not in dict(events.poll()):
        os.kill(pid, signal.SIGTERM)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with suppress(OSError):  # the runner is gone
        connection.sendall(f"{code:{ANSWER}d}".encode())
    os._exit(0)


def run(files: list[int], arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """`python -m` with these arguments, in this process. The first file is its output, the others are kept open."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for number, file in enumerate((null, files[0], files[0])):
        os.dup2(file, number)
    os.close(null)
    os.close(files[0])
    settle(environment | {PARENT: str(os.getppid())})
    os.chdir(folder)
    own = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:0], sys.argv = [folder, *own], arguments
    importlib.invalidate_caches()
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def leave(code: object) -> None:
    """End a fork as `sys.exit(code)` does, but for taking apart all that was imported, half a second of work."""
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    try:
        serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), sys.argv[3:])
    except SystemExit as end:  # of a fork
        leave(end.code)
