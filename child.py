"""Runs a function in a process of its own, with limits on its time and memory.

    Child("rendering:render", seconds=4, mib=768).ask({"source": ...})

Chat templates and tokenizers come from somebody else. They may hang, fill the memory or crash the process that runs
them.

The child calls the named function of one of our modules. Requests and answers are JSON values, one a line, on pipes.
The child starts with the first request and lives as long as its owner; if it dies, the next request starts another one.
It also ends when its owner is killed: an idle child reads the end of its input, a busy one runs out of time.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import weakref
from importlib import import_module
from signal import SIGXCPU
from threading import Event, Lock, Timer
from typing import Any

from errors import UserError

PATIENCE = 5  # seconds of the clock for one of CPU time, on a busy machine


class Overrun(UserError):
    """The child broke a limit or died. The message continues a sentence: "the chat template runs for more than ..."."""


class Child:
    """seconds: CPU time of an answer. mib: memory beyond what the function's module takes when it is imported.

    Several threads may ask.
    """

    def __init__(self, function: str, seconds: int, mib: int):
        self.function, self.seconds, self.mib = function, seconds, mib
        self._lock, self.process = Lock(), None

    def ask(self, request: Any) -> Any:
        """The function's answer. Overrun if there is none."""
        with self._lock:
            if self.process is None:
                self.process = self._started()
            process = self.process
            late = Event()
            timer = Timer(PATIENCE * self.seconds, lambda: (late.set(), process.kill()))
            timer.daemon = True
            timer.start()
            try:
                with contextlib.suppress(BrokenPipeError):  # it is dead, which its answer shows
                    process.stdin.write(json.dumps(request).encode() + b"\n")
                    process.stdin.flush()
                line = process.stdout.readline()
                if line.endswith(b"\n"):
                    return json.loads(line.decode("utf-8", "surrogatepass"))
            except BaseException:  # Ctrl-C: an answer that nobody has read must not become that of the next request
                self._end()
                raise
            finally:
                timer.cancel()
            code = self._end()
        if late.is_set() or code == -SIGXCPU:
            raise Overrun(f"runs for more than {self.seconds} seconds")
        raise Overrun(f"ends its process ({f'signal {-code}' if code < 0 else f'exit code {code}'})")

    def _started(self) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, __file__, self.function, str(self.seconds), str(self.mib)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the owner
        )
        self._finalizer = weakref.finalize(self, _reap, process)
        return process

    def _end(self) -> int:
        process, self.process = self.process, None
        self._finalizer.detach()
        return _reap(process)


def _reap(process: subprocess.Popen) -> int:
    """End the process; its exit code, negative for a signal, is its own if it has ended already or is about to."""
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            pipe.close()
    try:
        return process.wait(0.5)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _serve(function: str, seconds: int, mib: int) -> None:
    """What the child does."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    module, _, name = function.partition(":")
    answer = getattr(import_module(module), name)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # not every system can say what it takes, or limit it
        with open("/proc/self/statm") as sizes:
            most = int(sizes.read().split()[0]) * resource.getpagesize() + (mib << 20)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for request in requests:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        used = int(usage.ru_utime + usage.ru_stime) + 1
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        limit = used + seconds if hard == resource.RLIM_INFINITY else min(used + seconds, hard)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))
        line = json.dumps(answer(json.loads(request)), ensure_ascii=False)
        answers.write(line.encode("utf-8", "surrogatepass") + b"\n")
        answers.flush()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        _serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    os._exit(0)  # nothing to tidy up, and an owner that waits
