"""Compiled code, kept between processes in a folder of the user's: the second start compiles nothing.

PyTorch's own caches do the work. This gives them a folder that lasts, and sees to it that what lies there is whole.
"""

import fcntl
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import TextIO
from unittest.mock import patch
from zlib import crc32

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
SETTINGS = {
    # Headers that are compiled beforehand pay from the third graph on, but they lie in /tmp, need `openssl`, and are
    # looked through by the C++ compiler at every start, for nothing if all code is there.
    "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
    "TORCH_DYNAMO_RUN_GC_AFTER_COMPILE": "0",  # a walk over all that was imported, after each graph
}
PROCESSOR = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU ")  # its lines in /proc/cpuinfo


@contextmanager
def keeping() -> Iterator[None]:
    """What is compiled within is kept, unless there is no folder for it or the user's environment names another."""
    with patch.dict(os.environ, SETTINGS | dict(os.environ)):
        folder = None if VARIABLE in os.environ else code_folder()
        if folder is None:
            yield
            return
        os.environ[VARIABLE] = str(folder / "code")
        with open(folder / "lock", "w") as lock:
            if _locked(lock, alone=True):
                _clean(folder)
            _locked(lock, alone=False)
            try:
                yield
            finally:
                if not isinstance(sys.exception(), Exception):  # else what was made may be at fault; not so at Ctrl-C
                    _seal(folder, lock)


def code_folder() -> Path | None:
    """The folder of the user's for this PyTorch on this processor; None if nothing can be kept.

    PyTorch's keys tell its releases, our code, its settings and the number of threads apart, but not the processor:
    code is generated for the width of its registers and compiled for all its instructions. So each has its own folder.
    """
    import torch  # was loaded long ago where anything is compiled

    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    about = sorted({line for line in lines if line.startswith(PROCESSOR)}) or [platform.machine(), platform.processor()]
    about += [torch.__version__, torch.backends.cpu.get_cpu_capability(), sys.version]
    try:
        given = Path(os.environ.get("XDG_CACHE_HOME", ""))
        home = given if given.is_absolute() else Path.home() / ".cache"
        folder = home / "squeeze-fast" / f"compiled-{sha256(repr(about).encode()).hexdigest()[:16]}"
        (folder / "code").mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            _locked(lock, alone=False)
        return None if os.statvfs(folder).f_flag & os.ST_NOEXEC else folder
    except (OSError, RuntimeError):  # not to be written or locked, or there is no home
        return None


def _locked(lock: TextIO, alone: bool) -> bool:
    """Lock the folder for this process alone, if no other one uses it; or together with others."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
    except BlockingIOError:
        return False
    return True


def _sums(folder: Path) -> dict[str, int]:
    """The checksum of each file of code."""
    files = (path for path in (folder / "code").rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): crc32(path.read_bytes()) for path in files}


def _clean(folder: Path) -> None:
    """Remove what is not as it was sealed: the linker was killed, say, and left half of a library."""
    try:
        sealed = json.loads((folder / "sums.json").read_text())
    except (OSError, ValueError):
        sealed = {}
    with suppress(OSError):
        found = _sums(folder)
        if any(found.get(name) != value for name, value in sealed.items()):
            sealed = {}  # they name each other, so all of them go
        for name in found.keys() - sealed.keys():
            (folder / name).unlink()


def _seal(folder: Path, lock: TextIO) -> None:
    """Write down what is there, unless others may be writing more: the last of them does it."""
    with suppress(OSError):
        if _locked(lock, alone=True):
            (folder / "sums.json").write_text(json.dumps(_sums(folder)))
