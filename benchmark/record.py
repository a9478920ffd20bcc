"""What every file under results/ says about its origin."""

import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from errors import UserError, optional, place, shown
from files import NATURAL, POSITIVE, Kind, checked

ROOT = Path(__file__).resolve().parent.parent


def portable(argument: str) -> str:
    """An argument as results show it: an absolute path is relative to the project, or only a name outside of it."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def origin(device: str = "cpu") -> dict[str, str | int]:
    """Device, date, versions and command of this run."""
    transformers = optional("transformers")
    script = Path(sys.argv[0]).resolve()
    script = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": " ".join(["python", script, *map(portable, sys.argv[1:])]),
    }


ORIGIN = {"device": str, "date": str, "torch": str, "transformers": str, "command": str}  # what is shown of it
JOB = {"shape": str, "dtype": str, "prompt_tokens": NATURAL, "new_tokens": NATURAL}


def check_stages(value: dict[str, Any], where: str) -> dict[str, Any]:
    """What bench.py has written. UserError, which begins with `where`, if it is something else."""
    for name, stage in checked(value, {"stages": dict}, where)["stages"].items():
        which = f"{where}: stage {shown(name)}"
        if not isinstance(stage, dict):
            raise UserError(f"{which} is {shown(stage)}")
        for number, row in enumerate(checked(stage, ORIGIN | {"rows": [dict]}, which)["rows"], 1):
            kinds: dict[str, Kind] = {"what": str}
            if name == "decode" and "ms_per_step" in row:
                kinds |= JOB | {"ms_per_step": float}
            if name in ("throughput", "long") and "batch" in row and "largest" not in str(row.get("what")):
                kinds |= JOB | {"batch": POSITIVE} | ({"failed": str} if "failed" in row else {"tokens_per_s": float})
            checked(row, kinds, f"{which} row {number}")
    return value


def check_picture(path: Path, name: str) -> None:
    """UserError unless a picture can be drawn into such a file; `name` is the flag that asks for it."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"{name} {place(path)}: pictures are .png, .svg or .pdf files")
    optional("matplotlib")


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    vector = next((flag for flag in ("avx512f", "avx2", "avx") if flag in flags), "no AVX")
    threads = torch.get_num_threads()
    return f"{model}, {threads} core{'s'[: threads > 1]}, {vector}"
