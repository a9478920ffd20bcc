"""The checkpoints that work, from which odd ones are made. Each is made when it is first asked for."""

import os
import shutil
from pathlib import Path

import families
from safetensors.torch import load_file, save_file
from test_tokenizer import convert_pieces, save_vocab_merges, tiktoken_lines, train_bytes, train_pieces, write

VOCAB = 2048  # more than each of the tokenizers has
CHATML = """{% for message in messages %}{{ '<s>' + message.role + '\n' + message['content'] | trim + '</s>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"""
FORMS = ("json", "merges", "pieces", "pieces json", "tiktoken")
TEXT = "The quick brown fox's tail isn't 12345 long; na\u00efve caf\u00e9, \u4f60\u597d. " * 40


class Bases:
    """Folders below `root`, which processes may share: a folder is complete when it has its name."""

    def __init__(self, root: Path):
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def family(self, name: str) -> Path:
        """A checkpoint of a case of tests/families.py, without a tokenizer."""
        return self._made(name, lambda folder: families.make_checkpoint(families.BY_NAME[name], folder))

    def shards(self) -> Path:
        case = families.BY_NAME["llama-gqa"]
        return self._made("shards", lambda folder: families.make_checkpoint(case, folder, shards=3))

    def text(self, form: str = "json") -> Path:
        """A very small checkpoint with a tokenizer of a form, and a chat template."""

        def make(folder: Path) -> None:
            sizes = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_attention_heads=2)
            case = families.case("llama-text", **sizes, num_key_value_heads=1, max_position_embeddings=512)
            families.make_checkpoint(case, folder)
            settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHATML}
            if form == "merges":
                save_vocab_merges(folder, train_bytes())
            elif form == "tiktoken":
                (folder / "tokenizer.model").write_text(tiktoken_lines())
                settings |= {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
            elif form == "json":
                train_bytes().save(str(folder / "tokenizer.json"))
            else:
                (folder / "tokenizer.model").write_bytes(train_pieces())
                if form == "pieces json":
                    convert_pieces(folder).save(str(folder / "tokenizer.json"))
                    (folder / "tokenizer.model").unlink()
            write(folder, "tokenizer_config.json", settings)

        return self._made(f"text {form}", make)

    def _made(self, name: str, make) -> Path:
        folder = self.root / name.replace(" ", "_")
        if not folder.exists():
            part = self.root / f".{folder.name}.{os.getpid()}"
            make(part)
            try:
                part.rename(folder)
            except OSError:  # another process was faster
                shutil.rmtree(part)
        return folder


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


__all__ = ["CHATML", "FORMS", "TEXT", "VOCAB", "Bases", "copied", "load_file", "replaced", "save_file"]
