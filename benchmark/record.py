"""What every file under results/ says about its origin."""

import json
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from commandline import THREADS
from errors import optional, place
from files import checked, parse_json, read_bytes, write_json
from machine import device_name
from parallel import shard

ROOT = Path(__file__).resolve().parent.parent


def portable(argument: str) -> str:
    """An argument as results show it: a path is relative to the project, or only a name outside of it."""
    path = Path(argument)
    if not path.is_absolute():
        return path.name if ".." in path.parts else argument
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def origin(device: str = "cpu") -> dict[str, str | int]:
    """Device, date, versions and command of this run."""
    script = portable(str(Path(sys.argv[0]).resolve()))
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        **({"limited": "; ".join(THREADS)} if THREADS else {}),
        **({"ranks": shard().world} if shard().world > 1 else {}),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": optional("transformers").__version__,
        "command": " ".join(["python", script, *map(portable, sys.argv[1:])]),
    }


ORIGIN = {"device": str, "date": str, "torch": str, "transformers": str, "command": str}  # what is shown of it
STAGE = ORIGIN | {"rows": [{"what": str}]}


class Log:
    """Rows by stage with their origin, as one JSON file, if there is a path: it is written anew after each row.

    Stages that the file already holds stay until they are measured again.
    """

    def __init__(self, path: Path | None):
        self.path, self.stages, self.began = path, {}, 0.0
        if path is not None and path.exists():
            where = f"--out {place(path)} holds no results of a benchmark (name another)"
            stages = checked(parse_json(read_bytes(path), where), {"stages": dict}, where)["stages"]
            self.stages = checked(stages, dict.fromkeys(stages, STAGE), where)

    def begin(self, stage: str, **about: Any) -> dict[str, Any]:
        """The record of the stage, without a row."""
        self.began = time.perf_counter()
        self.stages[stage] = about | {"rows": []}
        return self.stages[stage]

    def add(self, stage: str, row: dict[str, Any]) -> None:
        five_digits = json.loads(json.dumps(row), parse_float=lambda text: float(f"{float(text):.5g}"))
        self.stages[stage]["rows"].append(five_digits)
        self.stages[stage]["seconds"] = round(time.perf_counter() - self.began, 1)
        if self.path is not None:
            write_json(self.path, {"stages": self.stages}, indent=1)
