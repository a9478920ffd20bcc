"""What the command lines share: whatever a user can put right is one line on standard error and exit code 2."""

import argparse
import gc
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from tqdm import tqdm

import threads
from errors import UserError, cut, reason, shown, visible
from kept import keeping

LONGEST_LINE = 600  # characters of an error: whatever it quotes


class Parser(argparse.ArgumentParser):
    """Wrong arguments are a UserError, which shows of each no more than 80 characters."""

    given: Sequence[str] = ()

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        self.given = sys.argv[1:] if args is None else args
        for arg in self.given:
            if arg.startswith("--") and arg.endswith("=--"):  # argparse takes that value away
                self.error(f"argument {arg[:-3]}: expected a value, not '--'")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        values = {part for arg in self.given for part in (arg, arg.partition("=")[2])}
        for value in sorted(values, key=len, reverse=True):
            if value and shown(value) != repr(value):
                message = message.replace(repr(value), shown(value)).replace(value, cut(value))
        raise UserError(f"{cut(message, LONGEST_LINE - 100)} (see --help)")


def number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def positive(text: str) -> int:
    if not (text.isdecimal() and len(text) < 19 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{shown(text)} is no positive integer below 10**18")
    return int(text)


def thread_count(text: str) -> int:
    count, most = positive(text), len(threads.affinity())
    if count > most:
        raise argparse.ArgumentTypeError(f"{text} is more than the {most} processors that this process may use")
    return count


class StreamError(Exception):
    """Standard output takes no more text. No handler of UserError may go on after it."""


class Stream:
    """A standard stream. A failed write to standard output is a StreamError; standard error has nobody left to tell."""

    def __init__(self, stream: TextIO, output: bool):
        self._stream, self._output = stream, output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except OSError as error:
            with suppress(OSError, ValueError):  # what is left in the buffer must not fail once more when Python ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if self._output:
                raise StreamError(f"standard output: {error.strerror or reason(error)}") from error


@contextmanager
def streams() -> Iterator[None]:
    """Standard streams that can be used: /dev/null stands in for a closed one and takes its number, the lowest free
    one, so that no file that is opened later does; a character that the terminal's encoding lacks is replaced.
    """
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    output, error = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    if isinstance(output, io.TextIOWrapper) and output.errors == "strict":
        output.reconfigure(errors="replace")
    with redirect_stdout(Stream(output, True)), redirect_stderr(Stream(error, False)):
        yield


def guarded(program: str, call: Callable[[], int], interrupted: str = "interrupted") -> int:
    """The exit code: what `call` returns, 2 after an error that a user can put right, 130 after Ctrl-C, 141 after the
    reader of standard output has gone. What else is raised is a fault of ours: it goes on, with its traceback.
    """
    with streams():
        try:
            try:
                return call()
            finally:
                sys.stdout.flush()
        except (UserError, StreamError) as error:
            if isinstance(error.__cause__, BrokenPipeError) and isinstance(error, StreamError):
                return 141
            complain(program, error)
            return 2
        except KeyboardInterrupt:
            print(f"{program}: {interrupted}", file=sys.stderr)
            return 130


def excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """What becomes of Ctrl-C before `guarded` has begun: importing PyTorch takes seconds."""
    if kind is not KeyboardInterrupt:
        return sys.__excepthook__(kind, error, trace)
    print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
    sys.exit(130)


PROGRAM, THREADS = Path(sys.argv[0]).resolve(), ()  # why threads are what they are, if a limit or others decide it
if PROGRAM.suffix == ".py" and PROGRAM.parent == Path(__file__).resolve().parent:  # else it is not ours to say
    sys.excepthook = excepthook
    # Python would look for cycles after every 700 new objects; PyTorch's imports make millions that stay. That took a
    # fifth of the time until the first token.
    gc.set_threshold(100_000, 20, 20)
    THREADS = threads.start()
    # What it thinks of the code that we give it is for us, not for who reads the report.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\._inductor\.")


def complain(program: str, error: Exception | str) -> None:
    text = visible(str(error))
    if len(text) > LONGEST_LINE:  # the beginning names the place, the end says what to do
        text = f"{text[:400]} ... {text[-150:]}"
    tqdm.write(f"{program}: error: {text}", file=sys.stderr)


@contextmanager
def compiling(compiles: bool, way: str = "--no-compile does without") -> Iterator[None]:
    """UserError if torch.compile finds no compiler that works. What is compiled is kept for the next process."""
    try:
        with keeping() if compiles else nullcontext():
            yield
    except RuntimeError as error:
        causes = [error, error.__cause__, error.__context__, getattr(error, "inner_exception", None)]
        if not any(type(cause).__name__ in NO_COMPILER for cause in causes):
            raise
        raise UserError(f"torch.compile failed, {way}: {reason(error)}") from error


NO_COMPILER = "InvalidCxxCompiler CppCompileError TritonMissing GPUTooOldForTriton".split()  # torch._inductor.exc
