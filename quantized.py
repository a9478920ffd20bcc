"""Matrices that a Hugging Face folder holds quantized, and what they stand for.

config.json's `quantization_config` says in which form they are (`scheme`). A matrix is then several tensors of the
files, such as X.qweight, X.qzeros and X.scales; `joined` puts one `Quantized` named X.weight in their place. A module
without them is not quantized, whatever lists of modules config.json has. Activations and the cache stay floats.

The forms, as the packages that write them define them:
- gptq (auto-gptq, gptqmodel): qweight [in / 8, out], each int32 with 8 codes of one row's neighbouring columns, the
  first in the lowest bits; scales [groups, out]; qzeros [groups, out / 8], minus one unless the format is gptq_v2;
  g_idx [in], the group of each column.
- awq (autoawq, gemm): qweight [in, out / 8], each int32 with the codes of 8 rows in the order AWQ_ORDER.
- compressed-tensors: weight_packed [out, in / 8], codes plus 8; weight_zero_point packed along its rows; or `weight`
  itself in int8 or fp8, with weight_scale for each row, group, block or all.
- fp8: `weight` in fp8 with weight_scale_inv (it multiplies too) for each block or all.
- mxfp4 (OCP Microscaling Formats, of gpt-oss): blocks [out, groups, 16], each uint8 with two neighbouring codes of 4
  bits (E2M1), the first in the lower bits; scales [out, groups], exponents of 2 plus 127, of 32 columns each. The files
  hold those of all experts of a layer in one tensor, which checkpoint.py takes apart.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from codes import Codes
from errors import UserError, cut, place, shown
from files import POSITIVE, is_a

READABLE = "gptq of 4 or 8 bits, awq (gemm) of 4, compressed-tensors (int4, int8, fp8), fp8, mxfp4"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the row of each of an int32's codes, from the lowest bits on
# The tensors of a matrix by form, after its module's name. The first one marks it; those with a ? may be missing.
PARTS = {
    "gptq": ("qweight", "scales", "qzeros", "g_idx?"),
    "awq": ("qweight", "scales", "qzeros"),
    "packed": ("weight_packed", "weight_scale", "weight_zero_point?", "weight_shape?", "weight_g_idx?"),
    "plain": ("weight_scale", "weight", "weight_zero_point?"),
    "mxfp4": ("blocks", "scales"),
}
# The part that has the codes.
CODES = {"gptq": "qweight", "awq": "qweight", "packed": "weight_packed", "plain": "weight", "mxfp4": "blocks"}
E2M1 = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.int8)  # fp4, times two
# Of each byte, what its two codes stand for, as one number of 16 bits.
PAIRS = torch.stack((E2M1.repeat(16), E2M1.repeat_interleave(16)), 1).view(torch.int16).flatten()
# Tensors about quantized activations and a quantized cache, by their ends.
IGNORED = tuple(f".{kind}_{end}" for kind in ("input", "output") for end in ("scale", "zero_point", "global_scale"))
IGNORED += (".activation_scale", ".act_scale", ".q_scale", ".k_scale", ".v_scale", ".kv_scale")
# Settings that change the form, and what has to be in them, if anything.
SETTINGS = {
    "is_marlin_format": (False,),
    "rotation": (),
    "adapter": (),
    "transform_config": ({},),
    "sparsity_config": ({}, "dense"),
    "fmt": ("e4m3",),
}
INT32, FLOATS = (torch.int32,), (torch.float16, torch.bfloat16, torch.float32)
KINDS = {"scales": FLOATS, "weight_scale": FLOATS, "weight_shape": (torch.int64, torch.int32)}
CHUNK = 1 << 22  # elements that are dequantized at a time


class Stored(Protocol):
    """A tensor in a file, not read yet."""

    file: Path
    name: str
    shape: list[int]

    def read(self) -> Tensor: ...


class Scheme(NamedTuple):
    """What config.json says of the quantized matrices, which all have the same form."""

    method: str
    form: str  # a key of PARTS
    bits: int  # of a code
    block: tuple[int, int]  # rows and columns that share a scale; 0: all
    floats: bool = False  # codes are fp8 (e4m3) or fp4 instead of integers
    asymmetric: bool = False  # whether each matrix has to come with zero points that PARTS says may be missing
    minus_one: bool = False  # whether zero points are stored minus one, an int32 minus 1 of each code as a whole

    def __str__(self) -> str:
        (rows, columns), kind = self.block, f"{'fp' if self.floats else 'int'}{self.bits}"
        if rows > 1:
            return f"{self.method} {kind}, blocks of {rows} x {columns}"
        return f"{self.method} {kind}, " + (f"groups of {columns}" if columns else f"by {'row' if rows else 'matrix'}")

    def grid(self, shape: list[int]) -> list[int]:
        """How many strips of rows and groups of columns a matrix of this shape has."""
        return [math.ceil(size / (share or max(size, 1))) for size, share in zip(shape, self.block, strict=True)]


class Quantized(NamedTuple):
    """A matrix [out, in] of which the files hold codes and scales; used like a tensor that is not read yet."""

    file: Path  # that of its first part
    name: str
    shape: list[int]
    scheme: Scheme
    parts: dict[str, Stored]

    def grouped(self) -> tuple[Tensor, Tensor] | None:
        """The scales and zero points [out, groups] of `codes`, which are not read.

        None where there are no `Codes`: codes are floats, columns in another order than their groups, a last group that
        is shorter.
        """
        if self.scheme.floats:
            return None
        columns = self.shape[1]
        scale, zero, groups = self._scales()
        if not groups.equal(torch.arange(columns) // max(1, columns // scale.shape[1])):
            return None
        zero = (torch.zeros_like(scale) if zero is None else zero) + (8 if self.scheme.bits == 4 else 0)
        strips = self._strips()
        return scale[strips], zero[strips]

    def codes(self) -> Codes | None:
        """What the files hold; None where `grouped` is."""
        if (grouped := self.grouped()) is None:
            return None
        codes = self._codes()
        codes = (codes + 8).view(torch.uint8) if self.scheme.bits == 4 else codes
        return Codes(codes.contiguous(), *grouped)

    def read(self) -> Tensor:
        """Its values, in float32."""
        codes, (scale, zero, groups) = self._codes(), self._scales()
        values = torch.empty(self.shape)
        rows, columns = self.shape
        strips, step = self._strips(), max(1, CHUNK // max(columns, 1))
        size = columns // max(1, scale.shape[1])
        regular = groups.equal(torch.arange(columns) // max(1, size))
        spread = lambda of: of.repeat_interleave(size, 1) if regular else of[:, groups]  # noqa: E731
        for own in (slice(start, start + step) for start in range(0, rows, step)):
            part = values[own].copy_(codes[own])
            if zero is not None:
                part -= spread(zero[strips[own]])
            part *= spread(scale[strips[own]])
        return values

    def _codes(self) -> Tensor:
        """[out, in] in int8 or fp8; fp4 as int8, times two. Integers are centred: symmetric matrices have zero points
        of 0.
        """
        bits, form = self.scheme.bits, self.scheme.form
        codes = self._tensor(CODES[form])
        if form == "plain":
            return codes
        if form == "mxfp4":
            return PAIRS[codes.flatten(1).int()].view(torch.int8)
        codes = _awq_unpack(codes).T if form == "awq" else _unpack(codes.T if form == "gptq" else codes, bits)
        return (codes - (1 << bits - 1)).view(torch.int8)

    def _scales(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Scales and zero points [strips, groups] of centred codes, float32; each column's group [in].

        A strip is the rows that share scales.
        """
        bits, form = self.scheme.bits, self.scheme.form
        parts = {part: self._tensor(part) for part in self.parts if part != CODES[form]}
        zero = parts.get("weight_zero_point", parts.get("qzeros"))
        if form == "gptq":
            zero = _unpack(zero + sum(1 << at for at in range(0, 32, bits)) * self.scheme.minus_one, bits).T
        elif form == "awq":
            zero = _awq_unpack(zero).T
        elif form == "packed" and zero is not None:
            zero = _unpack(zero.T, bits).T
        strips, groups = self.scheme.grid(self.shape)
        if form == "mxfp4":
            return parts["scales"].view(torch.float8_e8m0fnu).float() / 2, None, self._groups(parts)
        if zero is not None:
            zero = zero[:strips].float().reshape(strips, groups) - (0 if form == "plain" else 1 << bits - 1)
        scale = (parts["scales"].T if "scales" in parts else parts["weight_scale"]).float().reshape(strips, groups)
        return scale, zero, self._groups(parts)

    def _strips(self) -> Tensor:
        """The strip of each row [out]."""
        rows = self.shape[0]
        return torch.arange(rows) // (self.scheme.block[0] or max(rows, 1))

    def _groups(self, parts: dict[str, Tensor]) -> Tensor:
        """The group of each column [in]."""
        columns, count = self.shape[1], self.scheme.grid(self.shape)[1]
        if "weight_shape" in parts and (said := parts["weight_shape"].tolist()) != self.shape:
            self._refuse("weight_shape", f"says {shown(said)} instead of {self.shape}")
        for part in parts.keys() & {"g_idx", "weight_g_idx"}:
            if columns and (parts[part].min() < 0 or parts[part].max() >= count):
                self._refuse(part, f"names the groups {parts[part].min()} to {parts[part].max()} of {count}")
            return parts[part].long()
        return torch.arange(columns) // (self.scheme.block[1] or max(columns, 1))

    def _tensor(self, part: str) -> Tensor:
        """One of its tensors. UserError unless it is of the type that it has to be."""
        tensor, kinds = self.parts[part].read(), KINDS.get(part, INT32)
        if self.scheme.form == "mxfp4":
            kinds = (torch.uint8,)
        if self.scheme.form == "plain" and part != "weight_scale":
            kinds = (torch.float8_e4m3fn,) if self.scheme.floats else (torch.int8,)
        if tensor.dtype not in kinds:
            self._refuse(part, f"is {tensor.dtype} instead of {' or '.join(map(str, kinds))} ({self.scheme})")
        return tensor

    def _refuse(self, part: str, text: str) -> NoReturn:
        raise UserError(f"{place(self.parts[part].file)}: {cut(self.parts[part].name)} {text}")


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Codes in int32 [rows, words], lowest bits first -> uint8 [rows, words * 32 / bits]."""
    codes = packed.contiguous().view(torch.uint8)
    return codes if bits == 8 else torch.stack((codes & 15, codes >> 4), -1).flatten(1)


def _awq_unpack(packed: Tensor) -> Tensor:
    """Codes of 4 bits in int32 [rows, words], in awq's order -> uint8 [rows, words * 8]."""
    return _unpack(packed, 4).unflatten(1, (-1, 8))[..., torch.tensor(AWQ_ORDER).argsort()].flatten(1)


def scheme(settings: Any) -> Scheme:
    """What `quantization_config` of a config.json says. UserError for a form that cannot be read."""
    if not isinstance(settings, dict):
        raise UserError(f"config.json: quantization_config must be an object, not {shown(settings)}")
    method = settings.get("quant_method")
    if not is_a(method, str) or method not in METHODS:
        _unreadable(method)
    for name, usual in SETTINGS.items():
        value = settings.get(name)
        if value is not None and value not in usual and not (is_a(value, dict) and value.get("format") in usual):
            _unreadable(method, name, value)
    if (value := settings.get("kv_cache_scheme")) is not None:
        raise UserError(
            f"config.json: kv_cache_scheme {shown(value)} is not supported; set it to null there and the cache is kept "
            "in floats, or by --cache-format int8 in our own form"
        )
    return METHODS[method](method, settings)


def _gptq_or_awq(method: str, settings: dict[str, Any]) -> Scheme:
    awq = method == "awq"
    bits, group = settings.get("bits", 4 if awq else None), settings.get("group_size", 128)
    if not is_a(bits, int) or bits not in ((4,) if awq else (4, 8)):
        _unreadable(method, "bits", bits)
    if group != -1 and not is_a(group, POSITIVE):
        _unreadable(method, "group_size", group)
    names = ("version", "format") if awq else ("checkpoint_format", "format")
    name = names[0] if settings.get(names[0]) else names[1]
    packing = settings.get(name) or ("gemm" if awq else "gptq")
    if str(packing).lower() not in (("gemm",) if awq else ("gptq", "gptq_v2")):
        _unreadable(method, name, packing)
    return Scheme(method, method, bits, (1, max(group, 0)), minus_one=not awq and str(packing).lower() == "gptq")


def _fp8(method: str, settings: dict[str, Any]) -> Scheme:
    block = settings.get("weight_block_size")  # without blocks, as AutoFP8 writes it, a scale is of a whole matrix
    if block is not None and not _is_block(block):
        _unreadable(method, "weight_block_size", block)
    return Scheme(method, "plain", 8, tuple(block or (0, 0)), floats=True)


# What each format of compressed-tensors holds: the type and bits of the codes.
FORMATS = {
    "pack-quantized": [("int", 4), ("int", 8)],
    "int-quantized": [("int", 8)],
    "float-quantized": [("float", 8)],
    "naive-quantized": [("int", 8), ("float", 8)],
}


def _compressed_tensors(method: str, settings: dict[str, Any]) -> Scheme:
    groups, schemes = settings.get("config_groups"), set()
    if not groups or not is_a(groups, dict) or not all(is_a(group, {"weights": dict}) for group in groups.values()):
        _unreadable(method, "config_groups", groups)
    for group in groups.values():
        packing, weights = group.get("format") or settings.get("format"), group["weights"]
        if not is_a(packing, str) or packing not in FORMATS:
            _unreadable(method, "format", packing)
        kind, bits, size = weights.get("type", "int"), weights.get("num_bits", 8), weights.get("group_size")
        if not is_a(bits, int) or (kind, bits) not in FORMATS[packing]:
            _unreadable(method, packing, f"{kind} of {bits} bits")
        strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
        blocks = {"tensor": [0, 0], "channel": [1, 0], "group": [1, size], "block": weights.get("block_structure")}
        block = blocks.get(strategy) if is_a(strategy, str) else None
        if strategy not in ("tensor", "channel") and not _is_block(block):
            _unreadable(method, "strategy", strategy)
        form = "packed" if packing == "pack-quantized" else "plain"
        schemes.add(Scheme(method, form, bits, tuple(block), kind == "float", not weights.get("symmetric", True)))
    if len(schemes) > 1:
        _unreadable(method, "config_groups", [str(scheme) for scheme in schemes])
    return schemes.pop()


def _mxfp4(method: str, settings: dict[str, Any]) -> Scheme:
    return Scheme(method, "mxfp4", 4, (1, 32), floats=True)


METHODS = {"gptq": _gptq_or_awq, "awq": _gptq_or_awq, "compressed-tensors": _compressed_tensors, "fp8": _fp8}
METHODS["mxfp4"] = _mxfp4


def _is_block(block: Any) -> bool:
    return is_a(block, [POSITIVE]) and len(block) == 2


def _unreadable(method: Any, setting: str = "", value: Any = None) -> NoReturn:
    also = f" with {setting} {shown(value)}" if setting else ""
    raise UserError(
        f"weights quantized by {shown(method)}{also} cannot be read; what can: {READABLE}; "
        "use an unquantized version of the model, or one in a GGUF file"
    )


def joined(tensors: Iterable[Stored], scheme: Scheme) -> list[Stored | Quantized]:
    """The tensors of a checkpoint, with a `Quantized` in place of those that make up a quantized matrix.

    UserError for a matrix whose parts are missing or do not fit each other, and where none is quantized.
    """
    rest = {tensor.name: tensor for tensor in tensors if not tensor.name.endswith(IGNORED)}
    marks = [f".{end}" for end in _ends(PARTS[scheme.form][0])]
    modules = [name.removesuffix(mark) for mark in marks for name in rest if name.endswith(mark)]
    if not modules:
        ends = " or ".join(mark[1:] for mark in marks)
        raise UserError(
            f"config.json says that weights are quantized ({scheme}), but no tensor ends in {ends}; if they are not "
            "quantized, take quantization_config out"
        )
    return [*(_matrix(module, scheme, rest) for module in modules), *rest.values()]


def _matrix(module: str, scheme: Scheme, rest: dict[str, Stored]) -> Quantized:
    """The matrix of a module, whose parts are taken out of the tensors."""
    parts, missing = {}, []
    for part in PARTS[scheme.form]:
        name = part.rstrip("?")
        found = [f"{module}.{end}" for end in _ends(name) if f"{module}.{end}" in rest]
        if found:
            parts[name] = rest.pop(found[0])
        elif name == part or (name == "weight_zero_point" and scheme.asymmetric):
            missing.append(f"{module}.{name}")
    first = parts[PARTS[scheme.form][0]]
    where = f"{place(first.file)}: the matrix of {cut(first.name)} ({scheme})"
    if missing:
        raise UserError(f"{where} is not whole; missing: {', '.join(map(cut, missing))}")
    codes = parts[CODES[scheme.form]]
    form = ["rows", "groups", 16] if scheme.form == "mxfp4" else ["rows", "columns"]
    if len(codes.shape) != len(form) or codes.shape[2:] != form[2:]:
        raise UserError(f"{where}: {cut(codes.name)} must be [{', '.join(map(str, form))}], not {shown(codes.shape)}")
    shape = list(codes.shape)
    if scheme.form in ("gptq", "awq"):
        shape.reverse()
    if scheme.form == "mxfp4":
        shape = [shape[0], 32 * shape[1]]
    elif scheme.form != "plain":
        shape[scheme.form != "awq"] *= 32 // scheme.bits
    for part, tensor in parts.items():
        if tensor is not codes and tensor.shape not in (fitting := _shapes(part, shape, scheme)):
            raise UserError(f"{where}: {cut(tensor.name)} has the shape {shown(tensor.shape)} instead of {fitting[0]}")
    return Quantized(first.file, f"{module}.weight", shape, scheme, parts)


def _ends(part: str) -> list[str]:
    return [part, "weight_scale_inv"] if part == "weight_scale" else [part]


def _shapes(part: str, shape: list[int], scheme: Scheme) -> list[list[int]]:
    """The shapes that a part of a matrix of this shape may have."""
    strips, groups = grid = scheme.grid(shape)
    if part in ("weight_scale", "weight_zero_point") and (scheme.form == "plain" or part == "weight_scale"):
        return [grid, *([[strips]] if groups == 1 else []), *([[]] if grid == [1, 1] else [])]
    return {
        "scales": [grid if scheme.form == "mxfp4" else [groups, strips]],
        "qzeros": [[groups, math.ceil(strips * scheme.bits / 32)]],
        "weight_zero_point": [[math.ceil(strips * scheme.bits / 32), groups]],
        "weight_shape": [[2]],
    }.get(part, [[shape[1]]])


def is_filler(name: str, found: dict[str, Any]) -> bool:
    """Whether a tensor is a bias of zeros, which older writers of gptq give to every quantized module."""
    matrix = found.get(f"{name.removesuffix('.bias')}.weight")
    gptq = isinstance(matrix, Quantized) and matrix.scheme.form == "gptq" and name.endswith(".bias")
    return gptq and not found[name].read().any()
