"""Files of weights: headers, bytes, types, shapes and names of safetensors and .bin, indexes, objects in pickles."""

import io
import json
import os
import pickle
import random
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .bases import copied, family, replaced, shards
from .odd import VALUES, Input, changed_bytes, changed_json, dumped, shortened

NAMES = ("safetensors", "shards", "bin", "bin before 1.6", "bin shards")
DTYPES = "F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL F8_E4M3 F8_E5M2 U16 C64 F4 F6 X 5".split()
CANARY = "ran"  # a file that code in a checkpoint would make


def plain(name: str, folder: Path) -> Input:
    model = copied(shards(folder) if "shards" in name else family(folder, "llama-gqa"), folder)
    if name.startswith("bin"):
        for file in sorted(model.glob("*.safetensors")):
            save(load_file(file), model / renamed(file.name), older="1.6" in name)
            file.unlink()
        index = model / "model.safetensors.index.json"
        if index.exists():
            weight_map = json.loads(index.read_text())["weight_map"]
            wanted = {"weight_map": {tensor: renamed(file) for tensor, file in weight_map.items()}}
            (model / "pytorch_model.bin.index.json").write_text(json.dumps(wanted))
            index.unlink()
    ids = ",".join(str(1 + 7 * n % 100) for n in range(12))
    return Input("generate.py", f"--checkpoint model --prompt-ids {ids} --max-new-tokens 4 --json".split(), 101)


def renamed(name: str) -> str:
    return name.replace("model", "pytorch_model").replace(".safetensors", ".bin")


def save(value: Any, path: Path, older: bool = False) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=not older)


def mutate(rng: random.Random, name: str, given: Input, folder: Path, done: Path) -> Input:
    model = folder / "model"
    files = sorted(file for file in model.iterdir() if file.suffix in (".safetensors", ".bin"))
    file = rng.choice(files)
    if "shards" in name and rng.random() < 0.4:
        about = index(rng, next(model.glob("*.index.json")), files)
    elif file.suffix == ".safetensors":
        about = header(rng, file) if rng.random() < 0.65 else noise(rng, file, 60)
    elif rng.random() < 0.5:
        about = objects(rng, file, "1.6" in name)
    else:
        about = noise(rng, file, 400) if "1.6" in name or rng.random() < 0.4 else within_zip(rng, file)
    return replace(given, about=f"{name}: {about}")


def noise(rng: random.Random, file: Path, first: int) -> str:
    data, about = changed_bytes(rng, file.read_bytes(), first)
    replaced(file, data)
    return about


def within_zip(rng: random.Random, file: Path) -> str:
    """A .bin is a zip with a pickle in it: one member changed, the checksums right."""
    with zipfile.ZipFile(file) as archive:
        members = {each.filename: archive.read(each) for each in archive.infolist()}
    name = rng.choice([each for each in members if each.endswith("data.pkl")] * 3 + list(members))
    members[name], about = changed_bytes(rng, members[name])
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for each, data in members.items():
            archive.writestr(each, data)
    replaced(file, packed.getvalue())
    return f"{name}: {about}"


def header(rng: random.Random, file: Path) -> str:
    """One thing in the header of a safetensors file, the length in front of it mostly right."""
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    said, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    tensor = rng.choice([each for each in said if each != "__metadata__"])
    about, way = said[tensor], rng.randrange(9)
    if way == 0:
        about["dtype"] = rng.choice(DTYPES)
    elif way == 1:
        shape = about["shape"]
        shapes = [shape[::-1], [*shape, 1], shape[:-1], [-n for n in shape], [2**63, 2**63], [0], [], [2**32] * 3]
        about["shape"] = rng.choice([*shapes, [float(n) for n in shape], [1, *shape]])
    elif way == 2:
        start, end = about["data_offsets"]
        offsets = [[end, start], [start, start], [start + 1, end + 1], [0, 2**63], [-1, end], [start], [start, end, 1]]
        about["data_offsets"] = rng.choice([*offsets, [start, end - 1], [0, end - start]])
    elif way == 3:
        about[rng.choice(["dtype", "shape", "data_offsets", "odd"])] = rng.choice(VALUES)
    elif way == 4:
        names = [
            "",
            "x",
            tensor + "x",
            "\x00",
            "../x",
            "lm_head.weight",
            tensor.replace("layers.0", "layers.9"),
            "a" * 9999,
        ]
        said[rng.choice(names)] = said.pop(tensor)
    elif way == 5:
        said["__metadata__"] = rng.choice([{"a": 1}, {"format": "tf"}, {"format": "pt", "x": "y" * 10**6}, *VALUES])
    elif way == 6:
        del said[tensor]
    if way == 7:
        text, _ = changed_json(rng, said)
    elif way == 8:
        text = dumped(said).encode()
        text = text[:-1] + f", {json.dumps(tensor)}: {json.dumps(about)}".encode() + b"}"
    else:
        text = dumped(said).encode("utf-8", "surrogatepass")
    length = rng.choice(
        [len(text)] * 15 + [0, 1, len(text) - 1, len(text) + 1, len(data) * 2, 10**8 + 1, 2**63, 2**64 - 1]
    )
    replaced(file, struct.pack("<Q", length) + text + rest)
    return f"header, way {way} at {tensor}, length {length} of {len(text)}: {shortened(dumped(about))}"


def index(rng: random.Random, file: Path, shards: list[Path]) -> str:
    said = json.loads(file.read_text())
    weight_map = said["weight_map"]
    tensor, other = rng.choice(list(weight_map)), rng.choice(shards).name
    places = [
        "../x.safetensors",
        "/etc/passwd",
        "/dev/zero",
        "",
        ".",
        "missing.safetensors",
        "config.json",
        "a/b",
        "\x00",
    ]
    way = rng.randrange(6)
    if way == 0:
        weight_map[tensor] = other  # perhaps where it is not
    elif way == 1:
        weight_map[tensor] = rng.choice([*places, *VALUES])
    elif way == 2:
        weight_map[rng.choice(["", "x", "lm_head.weight", "model.norm.bias"])] = other
    elif way == 3:
        del weight_map[tensor]
    elif way == 4:  # in two shards, of which one counts
        path = file.parent / other
        if path.suffix == ".safetensors":
            tensors = load_file(path) | {
                tensor: torch.full_like(load_file(file.parent / weight_map[tensor])[tensor], 0.5)
            }
            path.unlink()
            save_file(tensors, path)
        else:
            tensors = torch.load(path) | {tensor: torch.load(file.parent / weight_map[tensor])[tensor] + 1}
            save(tensors, path)
    else:
        data, about = changed_json(rng, said)
        file.write_bytes(data)
        return f"index: {about}"
    file.write_bytes(dumped(said).encode("utf-8", "surrogatepass"))
    return f"index, way {way}: {tensor} -> {shortened(dumped(weight_map.get(tensor)))}"


class Runs:
    """An object that runs code where it is unpickled without care."""

    def __init__(self, call, *arguments: Any):
        self.call = call, arguments

    def __reduce__(self):
        return self.call


def odd_values(rng: random.Random, t: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """What may stand where a tensor should."""
    return {
        "a parameter": lambda: nn.Parameter(t),
        "with gradient": lambda: t.clone().requires_grad_(),
        "turned twice": lambda: t.T.contiguous().T if t.ndim == 2 else t[None][0],
        "expanded": lambda: t.flatten()[:1].expand(t.numel()).reshape(t.shape),
        "sparse": lambda: t.to_sparse(),
        "quantized": lambda: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        "meta": lambda: t.to("meta"),
        "complex": lambda: t.to(torch.complex64),
        "integers": lambda: (100 * t).to(rng.choice([torch.int8, torch.int64, torch.uint8, torch.bool])),
        "float8": lambda: t.to(torch.float8_e4m3fn),
        "half": lambda: t.to(rng.choice([torch.float16, torch.bfloat16, torch.float64])),
        "nothing in it": lambda: t[:0],
        "another shape": lambda: rng.choice([t[None], t[..., None], t.flatten(), t[:-1], t.T]),
        "NaN": lambda: t.clone().fill_(rng.choice([float("nan"), float("inf"), -float("inf"), 1e38, 3e38])),
        "huge": lambda: t * rng.choice([1e10, 1e20, 1e30]),
        "nested": lambda: tensor_nested(t),
        "numpy": lambda: t.numpy(),
        "a list": lambda: t.tolist(),
        "None": lambda: None,
        "a number": lambda: 5,
        "a text": lambda: "x",
        "code": lambda: Runs(os.system, f"touch {CANARY}"),
        "code by name": lambda: Runs(eval, f"open({CANARY!r}, 'w')"),
        "a file": lambda: Runs(open, CANARY, "w"),
    }


def objects(rng: random.Random, file: Path, older: bool) -> str:
    """torch.save of something else than a dict of plain tensors, or of the dict with an odd tensor in it."""
    tensors = torch.load(file)
    name = rng.choice(list(tensors))
    t = tensors[name]
    values = odd_values(rng, t)
    keys = {"5": 5, "None": None, "tuple": (name,), "bytes": name.encode(), "dot": f".{name}", "surrogate": "\ud800"}
    wholes = {
        "ordered": lambda: OrderedDict(tensors),
        "state_dict": lambda: {"state_dict": tensors},
        "model": lambda: {"model": tensors, "optimizer": {"lr": 1}},
        "a tensor": lambda: t,
        "a list": lambda: list(tensors.values()),
        "nothing": dict,
        "None": lambda: None,
        "a module": lambda: nn.Linear(2, 2),
        "code": lambda: Runs(os.system, f"touch {CANARY}"),
        "itself": lambda: tensors | {"self": tensors},
        "an integer more": lambda: tensors | {"step": 5},
    }
    what, way = rng.choice(
        [("tensor", each) for each in values] + [("key", each) for each in keys] + [("all", e) for e in wholes]
    )
    if what == "tensor":
        with warnings.catch_warnings(action="ignore"):  # of prototypes and deprecations, which are odd too
            made: Any = tensors | {name: values[way]()}
    elif what == "key":
        made = tensors | {keys[way]: tensors[name]}
        if rng.random() < 0.5:
            del made[name]
    else:
        made = wholes[way]()
    try:
        packed = io.BytesIO()
        torch.save(made, packed, _use_new_zipfile_serialization=not older)
        replaced(file, packed.getvalue())
    except (RuntimeError, TypeError, AttributeError, pickle.PicklingError, UnicodeEncodeError, NotImplementedError):
        replaced(file, pickle.dumps({name: 1}))  # what torch does not save: a pickle of another kind
        way += ", as a plain pickle"
    return f"{what}: {way} at {name}"


def tensor_nested(t: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor([t.flatten()[:2], t.flatten()[:3]])


def doubt(folder: Path, answer: dict | None, same: bool) -> str | None:
    return "code in the checkpoint ran" if (folder / CANARY).exists() else None
