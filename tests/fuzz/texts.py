"""Tokenizer files of every form and chat templates: structures, flags, models, steps, programs that never end."""

import json
import random
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

from .bases import CHATML, FORMS, VOCAB, copied, text
from .odd import VALUES, Input, Raw, change_file, changed_bytes, changed_json, dumped, shortened

CHAT, TALK = "chat", "talk"  # a chat template in use, once and in a conversation
NAMES = (*FORMS, "json", "pieces json", CHAT, CHAT, TALK)  # some are tried more often
PROMPT = "Hello <s> caf\u00e9, \u4f60\u597d!  12345\n\tx </s><|begin_of_text|>"
SETTINGS = """bos_token eos_token unk_token pad_token add_bos_token add_eos_token add_prefix_space tokenizer_class
additional_special_tokens extra_special_tokens added_tokens_decoder chat_template legacy model_max_length
clean_up_tokenization_spaces split_special_tokens""".split()
HUGE = 10**10

# A step of `tokenizers`, each with room for something odd (?).
STEPS = {
    "normalizer": [
        *[{"type": each} for each in "NFC NFD NFKC NFKD Lowercase StripAccents Nmt ByteLevel Odd".split()],
        {
            "type": "BertNormalizer",
            "clean_text": "?",
            "handle_chinese_chars": True,
            "strip_accents": "?",
            "lowercase": True,
        },
        {"type": "Strip", "strip_left": "?", "strip_right": True},
        {"type": "Prepend", "prepend": "?"},
        {"type": "Replace", "pattern": {"String": "?"}, "content": "a"},
        {"type": "Replace", "pattern": {"String": "a"}, "content": "?"},
        {"type": "Replace", "pattern": {"Regex": "(a|a)*$"}, "content": "?"},
        {"type": "Replace", "pattern": {"Regex": ""}, "content": "xx"},
        {"type": "Replace", "pattern": {"Regex": "(?=.)"}, "content": "xxxxxxxx"},
        {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaa"}] * 12,
        },
        {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 1000}] * 5,
        },
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "Precompiled", "precompiled_charsmap": "/////wAA"},
        {"type": "Precompiled", "precompiled_charsmap": "ALQCAACEAAAAAACAAQAAgMz8AgC4BQAAhyIAgMzkAgC4PQAAeyIAgMzsAgC4"},
        {"type": "Precompiled", "precompiled_charsmap": "?"},
    ],
    "pre_tokenizer": [
        *[{"type": each} for each in "Whitespace WhitespaceSplit BertPreTokenizer UnicodeScripts Odd".split()],
        {"type": "ByteLevel", "add_prefix_space": "?", "trim_offsets": True, "use_regex": "?"},
        {"type": "Metaspace", "replacement": "?", "prepend_scheme": "always", "split": "?"},
        {"type": "Metaspace", "replacement": "_", "prepend_scheme": "?", "split": True},
        {"type": "CharDelimiterSplit", "delimiter": "?"},
        {"type": "Digits", "individual_digits": "?"},
        {"type": "Punctuation", "behavior": "?"},
        {"type": "FixedLength", "length": "?"},
        {"type": "Split", "pattern": {"Regex": "(((a+)+)+)+$"}, "behavior": "Isolated", "invert": "?"},
        {"type": "Split", "pattern": {"Regex": "?"}, "behavior": "Removed", "invert": False},
        {"type": "Split", "pattern": {"Regex": "(" * 5000 + "a" + ")" * 5000}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"String": ""}, "behavior": "MergedWithNext", "invert": True},
        {"type": "Sequence", "pretokenizers": "?"},
        {"type": "Sequence", "pretokenizers": []},
    ],
    "post_processor": [
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": "?", "use_regex": True},
        {"type": "BertProcessing", "sep": ["?", 1], "cls": ["<s>", "?"]},
        {
            "type": "RobertaProcessing",
            "sep": ["</s>", 2],
            "cls": ["<s>", 99999],
            "trim_offsets": True,
            "add_prefix_space": True,
        },
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": ["?"], "tokens": ["<s>"]}},
        },
        {"type": "TemplateProcessing", "single": "?", "pair": [], "special_tokens": {}},
        {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": "?"},
        {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 3,
            "pair": [],
            "special_tokens": {},
        },
        {"type": "Sequence", "processors": "?"},
    ],
    "decoder": [
        *[{"type": each} for each in "ByteLevel ByteFallback Fuse Odd".split()],
        {"type": "WordPiece", "prefix": "?", "cleanup": True},
        {"type": "Metaspace", "replacement": "?", "prepend_scheme": "always", "split": True},
        {"type": "BPEDecoder", "suffix": "?"},
        {"type": "CTC", "pad_token": "?", "word_delimiter_token": "|", "cleanup": "?"},
        {"type": "Strip", "content": "?", "start": 1, "stop": 0},
        {"type": "Strip", "content": " ", "start": "?", "stop": HUGE},
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": "?"},
        {"type": "Sequence", "decoders": "?"},
        {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}] * 8},
    ],
    "model": [
        {"type": "BPE", "dropout": "?", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
        {"type": "BPE", "vocab": {"a": 0, "b": "?"}, "merges": []},
        {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["?"]},
        {"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "?", "byte_fallback": "?"},
        {"type": "BPE", "vocab": {}, "merges": []},
        {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []},
        {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []},
        {
            "type": "WordPiece",
            "vocab": {"a": 0},
            "unk_token": "?",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": "?",
        },
        {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"},
        {"type": "Unigram", "unk_id": "?", "vocab": [["a", -1.0], ["b", -2.0]], "byte_fallback": False},
        {"type": "Unigram", "unk_id": 0, "vocab": [["a", "?"], ["", -2.0]], "byte_fallback": True},
        {"type": "Unigram", "unk_id": 0, "vocab": [], "byte_fallback": True},
        {"type": "Unigram", "unk_id": 7, "vocab": [["a", -1.0]]},
        {"type": "Odd"},
    ],
}
BODIES = [  # of a chat template, {!} stands for some of the messages
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{{ range(99999) | list | tojson(indent=9999) }}",
    f"{{{{ 'x' * {HUGE} }}}}",
    f"{{% if false %}}{{{{ 'x' * {HUGE} }}}}{{% endif %}}{{!}}",
    f"{{% if false %}}{{{{ 9 ** {HUGE} }}}}{{% endif %}}{{!}}",
    "{% if false %}{{ 9 ** 9 ** 9 }}{% endif %}{!}",
    f"{{% set x = 10 ** {HUGE} %}}{{!}}",
    "{{ 7 ** 7 ** 7 ** 7 }}",
    "{{ (10 ** 100000) ** 100 }}",
    "{% set x = 2 ** 1000000 %}{{ x }}",
    f"{{{{ [0] * {HUGE} }}}}",
    f"{{{{ (1,) * {HUGE} }}}}",
    "{{ 'x' | center(10**10) }}",
    "{{ 'x\\n' | indent(10**10) }}",
    "{{ '%10000000000d' | format(1) }}",
    "{{ '%*d' % (10**10, 1) }}",
    "{{ '{:>10000000000}'.format(1) }}",
    "{{ 'x'.ljust(10**10) }}{{ 'x'.zfill(10**10) }}",
    "{{ 'x' | replace('', 'y' * 10**6) | replace('y', 'z' * 10**6) }}",
    "{{ ('x' * 10**6).replace('x', 'y' * 10**6) }}",
    "{{ ('x' * 10**6) | wordwrap(1) }}",
    "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(n=3) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{{ lipsum(10**6) }}",
    "{{ dict(a=messages) | tojson }}",
    "{{ messages | pprint }}",
    "{{ messages | batch(10**9) | list }}{{ messages | slice(10**9) | list }}",
    "{{ messages | sum(start='x') }}",
    "{{ messages | groupby('x') }}{{ messages | map('odd') | list }}",
    "{{ cycler() }}{{ joiner().x }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception('no\\n\\x1b[2J thanks') }}",
    "{{ raise_exception() }}{{ raise_exception(5) }}",
    "{{ raise_exception('x' * 100000) }}",
    "{{ raise_exception(messages) }}",
    "{{ strftime_now('%d %b %Y') }}{!}",
    "{{ strftime_now('%') }}{{ strftime_now(5) }}",
    "{{ strftime_now('\\ud800') }}",
    "{{ '\\ud800' }}{!}",
    "{{ undefined.x.y }}",
    "{{ undefined }}{!}",
    "{{ 1 / 0 }}",
    "{{ messages[10**10] }}",
    "{{ messages[-1]['content'][::0] }}",
    "{{ messages | tojson(indent=-1) }}{{ messages | tojson(indent='x') }}",
    "{{ none | int }}{{ 'x' | int(base=99) }}{{ 'x' | float }}",
    "{% include 'x' %}",
    "{% import '/etc/passwd' as x %}",
    "{% extends 'x' %}",
    "{% generation %}{!}{% endgeneration %}",
    "{% generation %}{!}",
    "{% break %}",
    "{% for m in messages %}{% continue %}{% endfor %}",
    "{% odd %}",
    "{{ ",
    "{% if %}{% endif %}",
    "{# never ends",
    "{% raw %}{{ x }}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{{ " + "[" * 300 + "1" + "]" * 300 + " }}",
    "{{ " + "-" * 5000 + "1 }}",
    "{{ " + "not " * 5000 + "1 }}",
    "{{ 1" + " + 1" * 5000 + " }}",
    "{{ x" + ".x" * 5000 + " }}",
    "{{ x" + " | upper" * 2000 + " }}",
    "{% if 1 %}" * 150 + "{% endif %}" * 150,
    "{% for i in [1] %}" * 60 + "{% endfor %}" * 60,
    "{% if 0 %}" + "{% elif 0 %}" * 5000 + "{% endif %}",
    "x" * 10**6,
    "",
    "no messages at all",
    "\x00\x1b[2J{!}",
    "\ufdd0{!}\ufdd1",
    "{!}{!}{!}",
    "{% set messages = 5 %}{!}",
    "{% set x = messages.append(1) %}{!}",
    "{{ messages[0].update(content=5) }}",
    "{{ messages[0]['content'] }}",
    "{{ bos_token * 10**9 }}",
    "{{ caller() }}{{ self }}{{ self.x() }}",
    "{% call f() %}{% endcall %}",
    "{% block x %}{{ super() }}{% endblock %}",
    "{% block x %}{{ self.x() }}{% endblock %}",
    "{% autoescape true %}{!}{% endautoescape %}",
    "{% filter upper %}{!}{% endfilter %}",
    "{{ 'a' ~ ['b'] * 3 ~ {'c': 1} ~ (1 < 2 < 3) ~ 'x' in 'xyz' }}{!}",
]


def plain(name: str, folder: Path) -> Input:
    copied(text(folder, name if name in FORMS else "json"), folder)
    argv = ["--checkpoint", "model", "--max-new-tokens", "4"]
    if name == TALK:
        return Input("generate.py", [*argv, "--interactive"], VOCAB, b"Hello\nand <s> more\n\nbye\n")
    return Input("generate.py", [*argv, "--json", "--prompt", PROMPT, *["--chat"] * (name == CHAT)], VOCAB)


def mutate(rng: random.Random, name: str, given: Input, folder: Path, done: Path) -> Input:
    model = folder / "model"
    settings = model / "tokenizer_config.json"
    draw = rng.random()
    if name in (CHAT, TALK) and draw < 0.85:
        about = template(rng, model, settings)
    elif draw < 0.25:
        about = change_file(rng, settings, SETTINGS)
    elif draw < 0.35:
        about = another_file(rng, model)
    elif (model / "tokenizer.json").exists():
        about = whole(rng, model / "tokenizer.json")
    else:
        files = ("vocab.json", "merges.txt") if name == "merges" else ("tokenizer.model",)
        path = model / rng.choice(files)
        if path.suffix == ".json" and rng.random() < 0.7:
            about = change_file(rng, path)
        elif name == "pieces" and rng.random() < 0.6:
            about = pieces(rng, path)
        else:
            data, about = changed_bytes(rng, path.read_bytes(), 2000)
            path.write_bytes(data)
    if rng.random() < 0.2:
        given = replace(given, argv=[*given.argv, "--stop", rng.choice(["</s>", "<s>", "a", "\ud800", "e\n", ""])])
    return replace(given, about=f"{name}: {about}")


def whole(rng: random.Random, path: Path) -> str:
    said = json.loads(path.read_text(encoding="utf-8"))
    draw = rng.random()
    if draw < 0.6:
        part = rng.choice(list(STEPS))
        step = filled(rng, rng.choice(STEPS[part]))
        if part in ("normalizer", "pre_tokenizer") and said[part] and rng.random() < 0.5:
            steps = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}[part]
            step = {"type": "Sequence", steps: [step, said[part]][:: rng.choice([1, -1])]}
        said[part], about = step, f"{part} {shortened(dumped(step), 200)}"
    elif draw < 0.75:
        token = {"id": 1, "content": "ab", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        token |= {"special": rng.random() < 0.5, rng.choice(list(token)): rng.choice(ODD_IN_A_STEP)}
        said["added_tokens"] = rng.choice([[token], [*said["added_tokens"], token], [token, token]])
        about = f"added token {shortened(dumped(token), 200)}"
    else:
        data, about = changed_json(rng, said)
        path.write_bytes(data)
        return f"{path.name}: {about}"
    path.write_bytes(dumped(said).encode("utf-8", "surrogatepass"))
    return f"{path.name}: {about}"


ODD_IN_A_STEP = [
    *VALUES,
    *["", "a", "\u2581", " ", "<s>", "</s>", "\x00", "(", "[", "\\", "e\u0301", "a b", "aa", "a*"] * 2,
]


def filled(rng: random.Random, step):
    """The step with something odd, or something that may be right, for each "?"."""
    if isinstance(step, dict):
        return {key: filled(rng, value) for key, value in step.items()}
    if isinstance(step, list):
        return [filled(rng, value) for value in step]
    return rng.choice(ODD_IN_A_STEP) if step == "?" else step


def another_file(rng: random.Random, model: Path) -> str:
    """Files that mostly are not there."""
    contents = {
        "special_tokens_map.json": {
            "bos_token": "<s>",
            "eos_token": {"content": "</s>", "special": True},
            "unk_token": "x",
        },
        "added_tokens.json": {"<x>": 2000, "ab": 2001},
        "generation_config.json": {"eos_token_id": [2, 3], "temperature": 0.5},
        "chat_template.json": {"chat_template": CHATML},
    }
    name = rng.choice(list(contents))
    (model / name).write_text(json.dumps(contents[name]))
    return change_file(rng, model / name)


def template(rng: random.Random, model: Path, settings: Path) -> str:
    said = json.loads(settings.read_text())
    draw = rng.random()
    if draw < 0.6:
        source = rng.choice(BODIES).replace("{!}", CHATML)
        about = shortened(source, 90)
    elif draw < 0.9:
        data, about = changed_bytes(rng, CHATML.encode())
        source = data.decode("utf-8", rng.choice(["replace", "surrogateescape"]))
    else:
        source = rng.choice(
            [*VALUES, [{"name": "default", "template": CHATML}], [{"name": "x", "template": CHATML}], [5]]
        )
        about = shortened(dumped(source))
    if isinstance(source, str) and not isinstance(source, Raw) and rng.random() < 0.5:
        del said["chat_template"]
        (model / "chat_template.jinja").write_bytes(source.encode("utf-8", "surrogatepass"))
    else:
        said["chat_template"] = source
    settings.write_bytes(dumped(said).encode("utf-8", "surrogatepass"))
    return f"template {about}"


def pieces(rng: random.Random, path: Path) -> str:
    """A field of the model in sentencepiece's own form (a protobuf), changed in a piece or in the settings."""
    message = fields(path.read_bytes())
    number = rng.choice([1, 2, 3, 3])  # a piece, the trainer's settings, the normaliser's
    at = rng.choice([n for n, each in enumerate(message) if each[0] == number])
    inner = fields(message[at][2])
    if number == 3 and rng.random() < 0.6:  # the table of characters, which is a compiled trie
        charsmap = rng.choice(
            [b"", b"\0", rng.randbytes(4), rng.randbytes(100), b"\xff" * 8, b"\4\0\0\0" + rng.randbytes(9)]
        )
        inner, about = [*inner, (2, 2, charsmap)], f"charsmap {charsmap[:20].hex()}"
    else:
        n = rng.randrange(len(inner))
        key, wire, value = inner[n]
        if wire == 0:
            value = rng.choice([0, 1, 2, 3, 4, 5, 6, 10**6, 2**31 - 1, 2**63, 2**64 - 1])
        elif wire == 5:
            value = struct.pack("<f", rng.choice([float("nan"), float("inf"), -float("inf"), 1e38, 0.0]))
        else:
            value = rng.choice(
                [b"", b"x", "\u2581".encode() * 1000, b"\0", b"<0x4>", b"<0x41>", b"\xff", rng.randbytes(9)]
            )
        inner[n], about = (key, wire, value), f"field {number}.{key} = {shortened(repr(value))}"
    message[at] = (number, 2, written(inner))
    path.write_bytes(written(message))
    return f"sentencepiece {about}"


Field = tuple[int, int, Any]  # number, wire type (0: an integer, 1, 5: 8 or 4 bytes, 2: bytes), value


def fields(data: bytes) -> list[Field]:
    """A protobuf message."""
    at, found = 0, []

    def integer() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value

    while at < len(data):
        key = integer()
        value: Any = integer() if key & 7 in (0, 2) else None
        if key & 7:
            size = {1: 8, 5: 4}.get(key & 7, value)
            value, at = data[at : at + size], at + size
        found.append((key >> 3, key & 7, value))
    return found


def written(message: list[Field]) -> bytes:
    def integer(value: int) -> bytes:
        parts = []
        while value > 127:
            parts.append(value & 127 | 128)
            value >>= 7
        return bytes([*parts, value])

    out = b""
    for number, wire, value in message:
        out += integer(number << 3 | wire)
        out += integer(value) if wire == 0 else (integer(len(value)) if wire == 2 else b"") + value
    return out
