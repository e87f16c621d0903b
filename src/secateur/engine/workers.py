"""Jobs in processes of their own, one after the other, forked from a process that imports everything and runs nothing.

A job that crashes or is killed takes nobody along, its memory is its own, and it does not pay for what an earlier one
had to import.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from secateur.errors import InternalError, SecateurError

_LAST_LINES: Final = 3
_POLL_SECONDS: Final = 0.01
_ANSWER_SECONDS: Final = 0.5
_OF_A_FOLDER: Final = "transformers_modules"  # code that came with one checkpoint


class Workers:
    """Runs functions of a module on JSON-able arguments, each call in a fresh process.

    Args:
        module: imported once; its functions are called by name.
        folder: holds the answer and the log of the job that runs.
    """

    def __init__(self, module: str, folder: Path) -> None:
        self._module, self._folder = module, folder
        self._server: subprocess.Popen[bytes] | None = None
        self._imported: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the server; it ends the job that may still run."""
        if self._server is not None:
            assert self._server.stdin is not None
            with contextlib.suppress(OSError):
                self._server.stdin.close()
            self._server.wait()
            assert self._server.stdout is not None
            self._server.stdout.close()

    def run(self, function: str, job: dict[str, Any]) -> Any:
        """What the function returns.

        Raises:
            SecateurError: what it raised; other exceptions and deaths as an :class:`InternalError`.
        OSError: its answer could not be written.
        """
        answer, log = self._folder / "answer.json", self._folder / "log.txt"
        answer.unlink(missing_ok=True)
        order = {"function": function, "job": job, "answer": str(answer), "log": str(log), "import": self._imported}
        status = self._ask(order)
        if status != 0 or not answer.is_file():
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
            words = " | ".join(line.strip() for line in said[-_LAST_LINES:])
            if status is not None and status > 1:
                raise OSError(status, os.strerror(status), str(answer))
            raise InternalError("worker-died", "the worker process", _fate(status) + (f": {words}" if words else ""))
        content = json.loads(answer.read_text(encoding="utf-8"))
        if "error" in content:
            raise SecateurError.revived(content["error"], content["exit_code"])
        self._imported = sorted({*self._imported, *content["imported"]})
        return content["result"]

    def _ask(self, order: dict[str, Any]) -> int | None:
        """Exit status of the job, negative for a signal; None where the server died, too."""
        if self._server is None or self._server.poll() is not None:
            command = [sys.executable, "-P", "-m", "secateur.engine.workers", self._module]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
            # in a session of its own, because an interrupt is for us, who then end it; and without a look at the GPU
            # that would keep its children from using it
            places = os.pathsep.join(filter(None, sys.path))  # what is found here is found there
            alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
            environment = {**alone, "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "PYTHONPATH": places}
            self._server = subprocess.Popen(command, start_new_session=True, env=environment, **pipes)
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        try:
            self._server.stdin.write(json.dumps(order).encode() + b"\n")
            # never a wait without an end: an interrupt that comes just before it would not be seen until the job ends
            while not select.select([self._server.stdout], [], [], _ANSWER_SECONDS)[0]:
                pass
            line = self._server.stdout.readline()
        except BrokenPipeError:
            line = b""
        return int(line) if line else None


def _fate(status: int | None) -> str:
    if status is None:
        return "it could not be started"
    if status >= 0:
        return f"it ended with status {status}"
    try:
        return f"it was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"it was killed by signal {-status}"


def serve(module: str) -> None:
    """Fork a process for every order that comes on standard input; what ends the input ends all."""
    faulthandler.enable()  # into the log
    channel = os.dup(1)
    os.dup2(2, 1)  # whatever else is printed is no answer
    import_module(module)
    with open(0, "rb", buffering=0, closefd=False) as orders:
        while line := orders.readline():
            order = json.loads(line)
            for name in order["import"]:
                if name not in sys.modules:
                    with contextlib.suppress(Exception):  # a help, no more
                        import_module(name)
            pid = os.fork()
            if pid == 0:
                os.close(channel)
                _work(import_module(module), order)
            os.write(channel, b"%d\n" % _wait(pid))


def _wait(pid: int) -> int:
    """Exit status of the child; it is killed when the input ends, because then nobody waits for it."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if select.select([0], [], [], _POLL_SECONDS)[0]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os._exit(1)


def _work(module: Any, order: dict[str, Any]) -> None:
    """The job, in the child; never returns."""
    status, known = 1, set(sys.modules)
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        answer: dict[str, Any]
        try:
            answer = {"result": getattr(module, order["function"])(order["job"])}
            answer["imported"] = [name for name in set(sys.modules) - known if not name.startswith(_OF_A_FOLDER)]
        except SecateurError as error:
            answer = {"error": error.as_dict(), "exit_code": error.exit_code}
        except Exception as error:
            traceback.print_exc()
            found = f"{type(error).__name__}: {' '.join(str(error).split())}"
            failure = InternalError("internal", order["function"], found)
            answer = {"error": failure.as_dict(), "exit_code": failure.exit_code}
        Path(order["answer"]).write_text(json.dumps(answer), encoding="utf-8")
        sys.stdout.flush()
        sys.stderr.flush()
        status = 0
    except OSError as error:  # nothing can be written any more, so the number is all that can be told
        status = error.errno or 1
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1])
