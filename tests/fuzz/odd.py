"""What is odd: JSON values, texts of flags, bytes; and putting them into something that works."""

import importlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

DEEP = 100_000  # lists in each other, far beyond what a recursive parser stands


@dataclass(frozen=True)
class Input:
    """A command, to be run in a folder of its own that holds its files.

    vocab: one more than the largest token. outputs: files and folders that belong to the answer. about: what is odd.
    """

    program: str
    argv: list[str]
    vocab: int
    stdin: bytes = b""
    outputs: tuple[str, ...] = ()
    about: str = "nothing"


def program(name: str) -> ModuleType:
    """The module of a command line."""
    return importlib.import_module(name.removesuffix(".py"))


class Raw(str):
    """JSON as it is to stand in a file: Python has no value for 1e999 or for a key that is there twice."""


VALUES = [
    *map(Raw, "NaN Infinity -Infinity 1e999 -1e999 1e-400 1e308 -1e308 1e-45 -0.0 0.5 1.5 -1.5".split()),
    *map(Raw, "-1 0 1 2 3 7 255 2147483648 9223372036854775807 9223372036854775808 10000000000000000000".split()),
    *map(Raw, "true false null [] {} [[]] [1] [0,0] [-1] [null] [1,2] [1e999]".split()),
    *map(Raw, ['"5"', '""', '" "', '"nan"', '"none"', '"default"', '"full"', '["x"]', '{"a":1}', '{"":null}']),
    *map(Raw, [r'"\ud800"', r'"\u0000\u001b[2J\r\n"', r'"\u202e\u0000"', '"../../x"', '"/etc/passwd"']),
    Raw("1" + "0" * 5000),
    Raw('"' + "x" * 4_000 + '"'),  # a longer prompt is real work
    Raw("[" * 65 + "]" * 65),
    Raw("[" * DEEP + "]" * DEEP),
    Raw('{"a":' * DEEP + "1" + "}" * DEEP),
    Raw("[" + ",".join("7" * 4000) + "]"),
]
TEXTS = [  # of a flag
    *"nan inf -inf 1e999 -1 -0 0 1 2 3 7 0.5 1.0 1.5 1e-45 1e-400 1e3 0x10 +5 1_000 9223372036854775808".split(),
    *"true none null auto full uniform squeeze squeeze:p=nan streaming:sinks=-1 h2o: :x h2o:x=1".split(),
    *"[] {} - -- , 1,2 1,,2 0.5,nan ../x . / /dev/null /dev/full /dev/zero /dev/stdout /dev/stdin".split(),
    *"snapkv:recent=0 /proc/self/mem h2o-mean".split(),
    *"missing missing/x a/b x/y/z float16 int8 meta cuda:99 cpu:0 bf16 float64 fidelity".split(),
    *["99999999999999999999", "9" * 5000, "-" + "9" * 400, "x" * 100_000, "1" + ",1" * 50_000],
    *["", " ", " 5 ", "\u0665", "5\n6", "a\x1b[2Jb", "\u202ex", "\udcff\udcfe", "\U0001f600", "caf\u00e9", "{x!r}%s%n"],
    *["model", "text.txt", "input.jsonl", "model/config.json", "model/model.safetensors"],
]


def shortened(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def dumped(value: Any) -> str:
    """JSON in which each `Raw` stands as it is."""
    raws: list[str] = []

    def marked(value: Any) -> Any:
        if isinstance(value, Raw):
            raws.append(value)
            return f"\x01{len(raws) - 1}\x01"
        if isinstance(value, dict):
            return {key: marked(each) for key, each in value.items()}
        return [marked(each) for each in value] if isinstance(value, list) else value

    text = json.dumps(marked(value))
    for number, raw in enumerate(raws):
        text = text.replace(json.dumps(f"\x01{number}\x01"), raw)
    return text


def tweaked(rng: random.Random, value: Any) -> Any:
    """Something close to the value: another number, the same as a text, in a list, a text with an odd character."""
    others: list[Any] = [json.dumps(value), [value], {"value": value}]
    if isinstance(value, bool):
        others += [not value, int(value)]
    elif isinstance(value, (int, float)):
        others += [-value, value + 1, value - 1, 2 * value, value / 2, float(value), str(value), value + 0.5]
    elif isinstance(value, str):
        others += [value.upper(), value + "x", value[:-1], value[::-1], value * 2, f"\n{value}", f"{value}\x00"]
    elif isinstance(value, list):
        others += [value[:-1], value * 2, value[::-1], [*value, None]]
    elif isinstance(value, dict):
        others += [list(value), {key.upper(): each for key, each in value.items()}, {**value, "odd": 1}]
    return rng.choice(others)


def spot(rng: random.Random, value: Any) -> tuple[Any, Any, str]:
    """A container somewhere in the value, one of its keys and how they are reached. Not all the way down, mostly."""
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    if isinstance(value[key], (dict, list)) and value[key] and rng.random() < 0.7:
        container, inner, path = spot(rng, value[key])
        return container, inner, f"{key}.{path}"
    return value, key, str(key)


def change(rng: random.Random, value: Any, fields: Sequence[str] = ()) -> tuple[Any, str]:
    """A copy of an object with something odd in it, which may be one of `fields` that it lacks; and what that is."""
    value = json.loads(json.dumps(value))
    if fields and rng.random() < 0.6:
        container, key = value, rng.choice(fields)
        path = key
    else:
        container, key, path = spot(rng, value)
    way = rng.choices(["odd", "tweaked", "left out", "twice", "moved"], [60, 25, 6, 4, 5])[0]
    if way == "tweaked" and (isinstance(container, list) or key in container):
        container[key] = tweaked(rng, container[key])
    elif way == "left out" and isinstance(container, dict) and key in container:
        del container[key]
        return value, f"{path} left out"
    elif way == "twice" and isinstance(container, dict) and key in container:
        container[key] = Raw(f"{dumped(container[key])}, {json.dumps(key)}: {rng.choice(VALUES)}")
    elif way == "moved":
        other, from_key, _ = spot(rng, value)
        container[key] = json.loads(json.dumps(other[from_key]))
    else:
        container[key] = rng.choice(VALUES)
    return value, f"{path} = {shortened(dumped(container[key]))}"


def changed_json(rng: random.Random, value: Any, fields: Sequence[str] = (), most: int = 2) -> tuple[bytes, str]:
    """The bytes of a JSON file that is odd in what it says or in how it is written."""
    if rng.random() < 0.08:
        text = json.dumps(value)
        ways = {
            "cut off": text[: rng.randrange(len(text))],
            "a value alone": rng.choice(VALUES),
            "in a list": f"[{text}]",
            "twice": text + text,
            "a byte order mark": "\ufeff" + text,
            "no quotes": text.replace('"', "'"),
            "a comma too many": text[:-1] + ",}",
        }
        way = rng.choice([*ways, "bytes"])
        if way == "bytes":
            return changed_bytes(rng, text.encode())
        return ways[way].encode("utf-8", "surrogatepass"), f"{way}: {shortened(ways[way])}"
    abouts = []
    for _ in range(rng.choice([1] * 6 + [most])):
        if isinstance(value, dict) and value or isinstance(value, list) and value:
            value, about = change(rng, _plain(value), fields)
            abouts.append(about)
            if any(isinstance(each, Raw) for each in _leaves(value)):
                break  # what is no Python value cannot be changed again
    return dumped(value).encode("utf-8", "surrogatepass"), "; ".join(abouts)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _leaves(each)
    else:
        yield value


def changed_bytes(rng: random.Random, data: bytes, first: int = 0) -> tuple[bytes, str]:
    """Bytes of a file with a fault, about half of the time within the `first` bytes."""
    end = min(first, len(data)) if first and rng.random() < 0.5 else len(data)
    at, size = rng.randrange(max(end, 1)), rng.choice([1, 1, 2, 4, 8, 64, 1000])
    noise = rng.randbytes(size)
    ways = {
        "cut off": data[:at],
        "overwritten": data[:at] + noise + data[at + size :],
        "inserted": data[:at] + noise + data[at:],
        "taken out": data[:at] + data[at + size :],
        "zeros": data[:at] + bytes(size) + data[at + size :],
        "ones": data[:at] + b"\xff" * size + data[at + size :],
        "a bit": data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] if data else b"",
        "twice": data[: at + size] + data[at:],
        "empty": b"",
        "noise": rng.randbytes(300),
    }
    way = rng.choices(list(ways), [10, 10, 6, 6, 6, 6, 10, 4, 1, 1])[0]
    return ways[way], f"{way} at {at} of {len(data)}, {size} bytes"


def change_file(rng: random.Random, path: Path, fields: Sequence[str] = ()) -> str:
    """Something odd in a JSON file; what it is."""
    data, about = changed_json(rng, json.loads(path.read_text(encoding="utf-8")), fields)
    path.write_bytes(data)
    return f"{path.name}: {about}"
