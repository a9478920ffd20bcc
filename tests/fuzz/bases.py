"""The checkpoints that work, from which odd ones are made. Each is made when it is first asked for.

`folder` is where a run takes place; they are beside those of all runs.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
from test_tokenizer import convert_pieces, save_vocab_merges, tiktoken_lines, train_bytes, train_pieces, write

VOCAB = 2048  # more than each of the tokenizers has
CHATML = """{% for message in messages %}{{ '<s>' + message.role + '\n' + message['content'] | trim + '</s>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"""
FORMS = ("json", "merges", "pieces", "pieces json", "tiktoken")
TEXT = "The quick brown fox's tail isn't 12345 long; na\u00efve caf\u00e9, \u4f60\u597d. " * 40


def family(folder: Path, name: str) -> Path:
    """A checkpoint of a case of tests/families.py, without a tokenizer."""
    return _made(folder, name, lambda made: families.make_checkpoint(families.BY_NAME[name], made))


def shards(folder: Path) -> Path:
    case = families.BY_NAME["llama-gqa"]
    return _made(folder, "shards", lambda made: families.make_checkpoint(case, made, shards=3))


def text(folder: Path, form: str = "json") -> Path:
    """A very small checkpoint with a tokenizer of a form, and a chat template."""

    def make(made: Path) -> None:
        sizes = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_attention_heads=2)
        case = families.case("llama-text", **sizes, num_key_value_heads=1, max_position_embeddings=512)
        families.make_checkpoint(case, made)
        settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHATML}
        if form == "merges":
            save_vocab_merges(made, train_bytes())
        elif form == "tiktoken":
            (made / "tokenizer.model").write_text(tiktoken_lines())
            settings |= {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
        elif form == "json":
            train_bytes().save(str(made / "tokenizer.json"))
        else:
            (made / "tokenizer.model").write_bytes(train_pieces())
            if form == "pieces json":
                convert_pieces(made).save(str(made / "tokenizer.json"))
                (made / "tokenizer.model").unlink()
        write(made, "tokenizer_config.json", settings)

    return _made(folder, f"text {form}", make)


def _made(folder: Path, name: str, make: Callable[[Path], Any]) -> Path:
    root = folder.parents[1] / "bases"
    made, part = root / name.replace(" ", "_"), root / f".{name}.{os.getpid()}"
    root.mkdir(exist_ok=True)
    if not made.exists():
        make(part)
        part.rename(made)
    return made


def copied(base: Path, folder: Path) -> Path:
    """The checkpoint as `folder`/model. Its weights are links: replace, do not overwrite."""
    model = folder / "model"
    model.mkdir()
    for file in base.iterdir():
        if file.suffix in (".safetensors", ".bin"):
            os.link(file, model / file.name)
        else:
            shutil.copy(file, model)
    return model


def replaced(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(data)
