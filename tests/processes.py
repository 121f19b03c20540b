"""Processes for tests, forked from a server that has imported torch, so that each starts in milliseconds.

A process started anew needs five seconds of CPU time for its imports. The server has imported them, has one thread and
has run nothing, so what it forks is like a new process. A forked process ends as any Python program does: the
interpreter is finalised, where threads of a process group that still run make it abort.
"""

import atexit
import gc
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

PRELOADED = (
    "numba", "numpy", "pytest", "sklearn.datasets", "torch.distributed.nn.functional", "torchvision", "torchvision.io",
    "simclr.evaluation.finetune", "simclr.losses", "simclr.models", "simclr.tasks.distill_images",
    "simclr.tasks.pretrain_images",
)  # fmt: skip
"""Modules that the server imports; they start no threads. Others are imported by the forked processes."""


class Failure(NamedTuple):
    """The first process that did not end well."""

    rank: int
    status: int
    """Exit code, or minus the number of the signal that ended it."""
    report: str
    """Its traceback, empty where it had no time for one."""


class Request(NamedTuple):
    """What the server is asked for: a call in each of several processes."""

    size: int
    call: bytes
    """Pickled (function, arguments); unpickled in the forked process, whose modules it may need."""
    path: list[str]
    environment: dict[str, str]
    folder: str


_server: Connection | None = None


def run_in_processes(size: int, function: Callable[..., object], *arguments: object) -> None:
    """Call `function(rank, *arguments)` in `size` processes and wait for their ends.

    Raises:
        AssertionError: One of them raised an exception, was killed or aborted; the others were then killed.
    """
    global _server
    if _server is None:
        _server = _start_server()
    call = pickle.dumps((function, arguments))
    _server.send(Request(size, call, sys.path, dict(os.environ), os.getcwd()))
    ended = _server.recv()
    if ended is not None:
        failure = Failure(*ended)
        raise AssertionError(f"process {failure.rank} of {size} ended with {failure.status}\n{failure.report}")


def _start_server() -> Connection:
    ours, theirs = Pipe()
    with theirs:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "JE_ARROW_MALLOC_CONF": "background_thread:false",  # scikit-learn imports pandas, which imports pyarrow
        }
        server = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], env=environment
        )
    atexit.register(_stop_server, server, ours)
    return ours


def _stop_server(server: subprocess.Popen, connection: Connection) -> None:
    connection.close()
    server.wait()


def _serve(connection: Connection) -> Callable[[], None] | None:
    """Fork what is asked for until the other side has ended; in a forked process, return what it is to run."""
    while True:
        try:
            request: Request = connection.recv()
        except EOFError:
            return None
        threads = len(os.listdir("/proc/self/task")) if Path("/proc/self/task").is_dir() else 1
        assert threads == 1, f"{threads} threads, of which a forked process would have one: a module has started some"
        children: dict[int, tuple[int, int]] = {}  # process -> rank, end of the pipe that its report comes through
        for rank in range(request.size):
            reading, writing = os.pipe()
            process = os.fork()
            if process == 0:
                connection.close()
                os.close(reading)
                return _Work(request, rank, writing)
            os.close(writing)
            children[process] = rank, reading
        failure = _wait(children)
        connection.send(None if failure is None else tuple(failure))  # the class is __main__'s here, and not there


def _wait(children: dict[int, tuple[int, int]]) -> Failure | None:
    """Wait for all processes; after the first failure the others are killed."""
    failure = None
    while children:
        process, status = os.wait()
        rank, reading = children.pop(process)
        with open(reading, "rb") as file:
            report = file.read().decode(errors="replace")
        code = os.waitstatus_to_exitcode(status)
        if failure is None and code:
            failure = Failure(rank, code, report)
            for other in children:
                os.kill(other, signal.SIGKILL)
    return failure


class _Work(NamedTuple):
    """What a forked process runs when it has left the server's loop."""

    request: Request
    rank: int
    writing: int

    def __call__(self) -> None:
        sys.path[:] = self.request.path
        os.environ.clear()
        os.environ.update(self.request.environment)
        os.chdir(self.request.folder)
        try:
            function, arguments = pickle.loads(self.request.call)
            function(self.rank, *arguments)
        except Exception:
            os.write(self.writing, traceback.format_exc()[-32_000:].encode()[:60_000])  # a pipe holds 64 KiB unread
            raise


def _main() -> None:
    import importlib

    for name in PRELOADED:
        importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()
    work = _serve(Connection(int(sys.argv[1])))
    if work is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        work()


if __name__ == "__main__":
    _main()
