"""What the command lines share: wrong arguments are a ValueError, which each of them prints in one line."""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see --help)")


def number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)
