"""What every file under results/ says about its origin."""

import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def origin(device: str = "cpu") -> dict[str, str | int]:
    """Device, date, versions and command of this run."""
    import transformers

    script = Path(sys.argv[0]).resolve()
    script = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": " ".join(["python", script, *sys.argv[1:]]),
    }


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    vector = next((flag for flag in ("avx512f", "avx2", "avx") if flag in flags), "no AVX")
    threads = torch.get_num_threads()
    return f"{model}, {threads} core{'s'[: threads > 1]}, {vector}"
