"""Compiled code that is kept between processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kept import code_folder, keeping

ROOT = Path(__file__).resolve().parent.parent
VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_another_processor_or_release_has_another_folder(home, monkeypatch):
    folders = [code_folder(), code_folder()]
    assert folders[0] == folders[1] and folders[0].is_relative_to(home)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    folders.append(code_folder())
    monkeypatch.setattr(torch, "__version__", "2.12.0")
    folders.append(code_folder())
    read = Path.read_text
    said = read(Path("/proc/cpuinfo")).replace("flags", "flags : none of") if Path("/proc/cpuinfo").exists() else ""
    monkeypatch.setattr(Path, "read_text", lambda path: said if str(path) == "/proc/cpuinfo" else read(path))
    folders.append(code_folder())
    assert len(set(folders)) == (4 if said else 3)


@pytest.mark.parametrize("place", ["a file", "a file below", "no home", "noexec", "relative"])
def test_without_a_folder_pytorch_takes_its_own(place, home, monkeypatch):
    if place == "a file":
        home.write_text("")
    elif place == "a file below":
        (code_folder() / "code").rmdir()
        (home / "squeeze-fast").rename(home / "old")
        (home / "squeeze-fast").write_text("")
    elif place == "noexec":
        monkeypatch.setattr(os, "statvfs", lambda path: type("Flags", (), {"f_flag": os.ST_NOEXEC}))
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute" if place == "relative" else "")
        monkeypatch.setenv("HOME", "/dev/null")
    with keeping():
        assert VARIABLE not in os.environ


def test_the_users_own_settings_win(home, monkeypatch):
    settings = {VARIABLE: "/dev/null", "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with keeping():
        assert settings.items() <= os.environ.items()
    assert dict(os.environ) == before and not home.exists()


def kept(write: str | None = None, error: type[BaseException] | None = None) -> set[str]:
    """The files that a process finds; then it writes one and ends, with an error if one is given."""
    with keeping():
        code = Path(os.environ[VARIABLE])
        found = {path.name for path in code.rglob("*") if path.is_file()}
        if write:
            (code / write).write_text(write)
        if error:
            raise error
    return found


def test_only_what_is_whole_is_kept(home):
    assert kept("a") == set()
    with pytest.raises(KeyboardInterrupt):
        kept("b", KeyboardInterrupt)
    with pytest.raises(RuntimeError):
        kept("c", RuntimeError)
    (code_folder() / "code" / "half").write_text("of a library")  # that of a process which was killed
    assert kept() == {"a", "b"}
    with keeping():
        assert kept("d") == {"a", "b"}
        (code_folder() / "code" / "e").write_text("")
        assert kept() == {"a", "b", "d", "e"}  # somebody else may be at work, so nothing is removed
    assert kept() == {"a", "b", "d", "e"}
    (code_folder() / "code" / "a").write_text("other")
    assert kept("f") == set()
    (code_folder() / "sums.json").write_text("[")
    assert kept() == set() and VARIABLE not in os.environ


RUN = """
import sys
import generate
code = generate.main(sys.argv[1:])
from torch._dynamo.utils import counters
print(code, *(counters["aot_autograd"][f"autograd_cache_{what}"] for what in ("miss", "hit")))
"""


@pytest.mark.slow
def test_a_second_process_compiles_nothing(home):
    def run() -> list[str]:
        args = ("--compile", "--json", "--prompt", "def", "--max-new-tokens", "3")
        run = subprocess.run([sys.executable, "-c", RUN, *args], cwd=ROOT, capture_output=True, text=True, check=True)
        assert not run.stderr
        return run.stdout.splitlines()

    def libraries() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in code_folder().rglob("*.so")}

    (first, made), before = run(), libraries()
    assert made == "0 2 0" and before  # the block and the head
    second, made = run()
    assert made == "0 0 2" and libraries() == before
    assert first.partition('"text"')[0] == second.partition('"text"')[0]
    next(iter(before)).write_bytes(b"half of a library")
    third, made = run()
    assert made == "0 2 0" and third.partition('"text"')[0] == first.partition('"text"')[0]
