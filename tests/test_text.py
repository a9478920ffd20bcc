"""What generate.py does with text at its borders: special tokens, rendered prompts, odd streams, answers cut short."""

import io
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_generate import TEMPLATE, converse, linked, refused, run_json

import checkpoint
import generate
import tokenizer as tokenizers
from arguments import Asked
from conversation import Conversation
from engine import Engine
from errors import UserError
from tokenizer import TextStream

SAID = "import os"
WILD = ("--temperature", "1.3", "--seed", "5")  # greedy answers repeat themselves


def named(tmp_path: Path, template: str | None = None, **settings) -> Path:
    """The embedded checkpoint with these settings of its tokenizer."""
    folder = linked(tmp_path, template)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings))
    return folder


def piece(token: int) -> str:
    """The name of a token in the embedded vocabulary, which hardly any text holds."""
    vocab = json.loads((generate.EMBEDDED / "tokenizer.json").read_text())["model"]["vocab"]
    return next(name for name, i in vocab.items() if i == token)


def first_new(tokens: list[int], least: int) -> int:
    """The first place from `least` on whose token has not been there before, and is a word of its own."""
    known = tokenizers.load(generate.EMBEDDED)
    words = [n for n, token in enumerate(tokens) if n >= least and token not in tokens[:n]]
    return next(n for n in words if known.token_bytes(tokens[n])[:1] == b" ")


# ---- special tokens ----


def test_stop_at_a_special_token(capsys, tmp_path):
    """Alone and after text, in one call and in a job: the text before the stop is all of the text."""
    plain = run_json(capsys, "--prompt", SAID, "--max-new-tokens", 40, *WILD)
    at = first_new(plain["tokens"], 5)
    name = piece(plain["tokens"][at])
    folder = named(tmp_path, extra_special_tokens=[name])
    before = tokenizers.load(folder).decode(plain["tokens"][:at])
    for stop, text in ((name, before), (before[-3:] + name, before[:-3])):
        args = ("--checkpoint", folder, "--max-new-tokens", 40, "--stop", "absent" + name, "--stop", stop)
        result = run_json(capsys, *args, *WILD, "--prompt", SAID)
        assert result["finish_reason"] == "stop" and result["tokens"] == plain["tokens"][: at + 1]
        assert result["text"] == text
        (tmp_path / "in").write_text(json.dumps({"prompt": SAID, "seed": 5}))
        (tmp_path / "out").unlink(missing_ok=True)
        files = (
            "--input",
            str(tmp_path / "in"),
            "--output",
            str(tmp_path / "out"),
            "--ignore-eos",
            *map(str, args),
            *WILD,
        )
        assert generate.main([*files]) == 0
        capsys.readouterr()
        line = json.loads((tmp_path / "out").read_text())
        assert (line["finish_reason"], line["text"], line["tokens"]) == ("stop", text, result["tokens"])


def test_a_special_stop_is_closed_by_the_next_turn(capsys, tmp_path, monkeypatch):
    """In a conversation such a token is not fed, like an end of sequence: the template writes it."""
    plain = run_json(capsys, "--prompt", SAID, "--max-new-tokens", 40, *WILD)
    at = first_new(plain["tokens"], 5)
    folder = named(tmp_path, extra_special_tokens=[piece(plain["tokens"][at])])
    fed = watched(monkeypatch)
    code, out, _ = converse(
        capsys, monkeypatch, f"{SAID}\nb\n", "--checkpoint", folder, "--stop", piece(plain["tokens"][at]), "--no-chat",
        "--max-new-tokens", 40, *WILD,
    )  # fmt: skip
    tokenizer = tokenizers.load(folder)
    assert code == 0 and out.startswith(tokenizer.decode(plain["tokens"][:at]) + "\n")
    assert fed[1] == tokenizer.encode("\nb", special=False)


@pytest.mark.parametrize("configs", [{"eos_token_id": 1}, {}], ids=["another", "none"])
def test_eos_token_of_the_tokenizer_ends_an_answer(capsys, tmp_path, monkeypatch, configs):
    folder = linked(tmp_path, TEMPLATE)
    args = ("--checkpoint", str(folder), "--max-new-tokens", "40", "--json", "--prompt", SAID, *WILD)

    def run(*more: str) -> dict:
        assert generate.main([*args, *more]) == 0
        return json.loads(capsys.readouterr().out)

    whole = {more: run(*more, "--ignore-eos")["tokens"] for more in ((), ("--chat",))}
    for name in ("generation_config.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "generation_config.json").write_text(json.dumps(configs))
    (folder / "config.json").unlink()
    config = json.loads((generate.EMBEDDED / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": configs.get("eos_token_id")}))
    for more, tokens in whole.items():
        at = first_new(tokens, 5)
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": piece(tokens[at])}))
        ends = bool(more) or not configs
        result = run(*more)
        assert result["tokens"] == (tokens[: at + 1] if ends else tokens)
        assert result["finish_reason"] == ("eos" if ends else "length")


def bos(folder: Path) -> Path:
    """Its tokenizer.json puts <|endoftext|> before a text."""
    data = json.loads((folder / "tokenizer.json").read_text())
    end = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    parts = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    data["post_processor"] = {"type": "TemplateProcessing", "single": parts, "pair": [*parts, parts[1]]}
    data["post_processor"]["special_tokens"] = {"<|endoftext|>": end}
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return folder


def test_rendered_prompts(capsys, tmp_path):
    """Names of special tokens are the tokens, and none is added. A job says it by line or for all lines."""
    folder = bos(linked(tmp_path, TEMPLATE))
    tokenizer = tokenizers.load(folder)
    text = f"<|endoftext|>{SAID}<|endoftext|>"
    parsed, plain = tokenizer.encode(text, False, True), tokenizer.encode(text)
    assert parsed[0] == parsed[-1] == plain[0] == 0 and len(plain) > len(parsed) + 4
    wanted = {}
    for ids in (parsed, plain):
        given = ("--checkpoint", folder, "--max-new-tokens", 3, "--prompt-ids", ",".join(map(str, ids)))
        wanted[len(ids)] = run_json(capsys, *given)["tokens"]
    for args, ids in (((), plain), (("--rendered",), parsed)):
        result = run_json(capsys, "--checkpoint", folder, "--max-new-tokens", 3, "--prompt", text, *args)
        assert (result["prompt_tokens"], result["tokens"]) == (len(ids), wanted[len(ids)])
        lines = [{"prompt": text}, {"prompt": text, "rendered": True}, {"prompt": text, "rendered": False}]
        (tmp_path / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (tmp_path / "out").unlink(missing_ok=True)
        files = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--max-new-tokens", "3"]
        assert generate.main([*files, "--checkpoint", str(folder), "--ignore-eos", *args]) == 0
        capsys.readouterr()
        results = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
        counts = {line["id"]: line["prompt_tokens"] for line in results}
        assert counts == {1: len(ids), 2: len(parsed), 3: len(plain)}
        other = [] if args else ["--rendered"]
        assert generate.main([*files, "--checkpoint", str(folder), "--ignore-eos", "--resume", *other]) == 2
        assert "--rendered was" in capsys.readouterr().err  # it decides on the results


def test_rendered_does_not_go_with(capsys, tmp_path):
    folder = linked(tmp_path, TEMPLATE)
    for args in (("--chat", "--prompt", "a"), ("--interactive",), ("--prompt-ids", "1")):
        assert "--rendered is for a prompt" in refused(capsys, "--checkpoint", folder, "--rendered", *args)
    bad = [{"prompt": "a", "rendered": 1}, {"prompt_ids": [1], "rendered": True}, {"prompt": "a", "rendered": True}]
    (tmp_path / "in").write_text("".join(json.dumps(line) + "\n" for line in bad))
    files = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--checkpoint", str(folder), "--chat"]
    assert generate.main(files) == 2
    err = capsys.readouterr().err
    assert "line 1: rendered must be true or false" in err and "line 2: rendered is for a prompt" in err
    assert "line 3: what is rendered already does not go with --chat" in err


# ---- odd streams ----


def test_a_line_that_is_not_utf8(capsys, monkeypatch):
    """One line for it; the lines around it, in the same buffer, are answered."""
    whole = converse(capsys, monkeypatch, f"{SAID}\nb\n")
    raw = io.TextIOWrapper(io.BytesIO(f"{SAID}\n".encode() + b"a\xff\xc3\n" + b"b\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", raw)
    code = generate.main(["--interactive", "--max-new-tokens", "12", "--ignore-eos"])
    out, err = capsys.readouterr()
    assert code == 2 and out == whole[1]
    assert "generate.py: error: standard input is not UTF-8: byte 0xff at 1\n" in err and err.count("\n") == 3


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_stdout_that_cannot_show_a_character(monkeypatch, capsys, encoding):
    load = tokenizers.load
    monkeypatch.setattr(
        tokenizers, "load", lambda folder: replace(load(folder), token_bytes=lambda _: "é\u4f60".encode())
    )
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(sys, "stdin", io.StringIO("a\nb\n"))
        assert generate.main(["--interactive", "--max-new-tokens", "3", "--ignore-eos"]) == 0
    shown = {"ascii": "??", "latin-1": "é?"}[encoding] * 3
    assert stdout.buffer.getvalue().decode(encoding) == f"{shown}\n" * 2
    assert capsys.readouterr().err.count("[turn ") == 2


# ---- answers cut short ----


def watched(monkeypatch) -> list[list[int]]:
    """Ids of each turn as the engine gets them."""
    fed, stream = [], generate.Conversation.stream

    def watching(self, ids, *args, **kwargs):
        made = stream(self, ids, *args, **kwargs)
        fed.append(list(made.completion.request.ids))
        return made

    monkeypatch.setattr(generate.Conversation, "stream", watching)
    return fed


def turns_of(error: BaseException | None, where: str, template: str | None, folder: Path, monkeypatch) -> list:
    """The ids fed and the messages of three turns. In the second one, `error` comes at its third token."""
    asked = Asked(
        generate.parse(["--checkpoint", str(folder), "--interactive", "--ignore-eos", *["--no-chat"] * (not template)])
    )
    conversation = Conversation(Engine(checkpoint.load(folder)[0], "streaming", budget=64))
    with monkeypatch.context() as patch:
        fed = watched(patch)
        for number, said in enumerate((SAID, "def f():", "b")):
            asked.args.max_new_tokens = 3 if number != 1 or error is None else 9
            pushed = []

            def fail(here: str) -> None:
                if here == where and len(pushed[-1]) == 3 and number == 1 and error is not None:  # noqa: B023
                    raise error

            def ends(self, tokens: list[int], own=TextStream.ends) -> bool:
                pushed.append(tokens)  # noqa: B023
                result = own(self, tokens)
                fail("push")  # noqa: B023
                return result

            with patch.context() as inner:
                inner.setattr(TextStream, "ends", ends)
                inner.setattr(generate, "print", lambda *_, **__: fail("print"), raising=False)  # noqa: B023
                try:
                    generate.answer(asked, conversation, said)
                except type(error) as caught:
                    assert caught is error
                else:
                    assert error is None or number != 1
    return [fed, asked.turns.messages, conversation.seen]


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "chat"])
@pytest.mark.parametrize("where", ["push", "print"])
@pytest.mark.parametrize(
    "error", [UserError("no more"), OSError(28, "No space left on device"), MemoryError()], ids=type
)
def test_an_error_in_an_answer_leaves_cache_and_transcript_alike(tmp_path, monkeypatch, capsys, error, where, template):
    """The next turn is fed what it would be had the answer ended there."""
    folder = linked(tmp_path, template)
    assert turns_of(error, where, template, folder, monkeypatch) == turns_of(None, where, template, folder, monkeypatch)


def test_a_plan_that_cannot_be_saved_leaves_the_turn(tmp_path, monkeypatch, capsys):
    whole, fed = converse(capsys, monkeypatch, f"{SAID}\nb\n"), watched(monkeypatch)
    assert whole[0] == 0
    before = list(converse(capsys, monkeypatch, f"{SAID}\nb\n")) and fed[:2]

    def full(*_) -> None:
        raise UserError("No space left on device")

    monkeypatch.setattr(Asked, "save_plan", full)
    code, out, err = converse(capsys, monkeypatch, f"{SAID}\nb\n")
    assert code == 2 and out == whole[1] and "No space left" in err and fed[2:] == before


def test_ctrl_c_twice_ends_the_conversation(tmp_path, monkeypatch, capsys):
    ends = TextStream.ends

    def pressing(self, tokens):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        return ends(self, tokens)

    monkeypatch.setattr(TextStream, "ends", pressing)
    assert converse(capsys, monkeypatch, f"{SAID}\nb\n")[0] == 130
