"""What the command lines share: whatever a user can put right is one line on standard error and exit code 2."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

import torch
from tqdm import tqdm

from errors import UserError


class Parser(argparse.ArgumentParser):
    """Wrong arguments are a UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def guarded(program: str, call: Callable[[], int], interrupted: str = "interrupted") -> int:
    """The exit code: what `call` returns, 2 after an error that a user can put right, 130 after Ctrl-C."""
    try:
        return call()
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        complain(program, error)
    except ModuleNotFoundError as error:
        complain(program, f"{error}; install it (requirements-dev.txt has most of what is optional)")
    except RuntimeError as error:
        if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise
        complain(program, f"torch.compile failed, --no-compile does without: {str(error).strip().splitlines()[0]}")
    except KeyboardInterrupt:
        print(f"{program}: {interrupted}", file=sys.stderr)
        return 130
    return 2


def complain(program: str, error: Exception | str) -> None:
    tqdm.write(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
