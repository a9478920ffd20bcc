"""Matrices in 8 or 4 bits, in place of `Linear` and of the embedding's table.

Numbers are rounded to the nearest code, as gpt-fast and torchao do. In 8 bits each row of a matrix has a scale; in 4
bits each 32 of its columns have a scale, in bfloat16, and a zero point in sixteenths of it. Codes that a file holds
keep their own groups and scales, where a form can hold them (`holds`). Shapes as in model.py.

The form is what multiplies a single row fastest: `Packed`, 4 bits on a CPU as PyTorch's own product wants them, and
`Words`, whole numbers of 32 bits that a generated loop takes apart.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bound import int4_block, int4_pack, int4_product, int8_product
from codes import GROUP, PIECE, Codes, rows_at_a_time
from kernels import Linear, by_group
from model import Transformer

WEIGHT_FORMATS = ("auto", "int8", "int4")
STRIDE = 32  # columns of which PyTorch's product of bytes wants a multiple: it reads past the end of others
FEW = 8  # rows up to which the products of codes are faster than those of the numbers that they stand for


class Quantized(nn.Module):
    """Codes of a matrix in the place of a `Linear`; of a stack of E experts' matrices each by itself.

    Its tensors begin with E, which is 1 but for experts. A form says how one matrix is multiplied (`product`), and what
    its rows are (`numbers`).
    """

    def __init__(self, **tensors: Tensor):
        super().__init__()
        self.names = list(tensors)
        self.register_parameter("bias", None)
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor.contiguous(), requires_grad=False))

    def one(self, at: int | Tensor) -> list[Tensor]:
        """The tensors of an expert, or of experts [...]."""
        return [getattr(self, name)[at] for name in self.names]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., E * out]."""
        rows = x.reshape(-1, x.shape[-1])
        out = torch.cat([self.expert(number, rows) for number in range(len(self.scale))], dim=1)
        return (out if self.bias is None else out + self.bias).to(x.dtype).view(*x.shape[:-1], -1)

    def expert(self, number: int, x: Tensor) -> Tensor:
        """x [R, in] times one of the matrices -> [R, out]."""
        return self.product(x, *self.one(number))

    @property
    def waits(self) -> bool:
        """As of `Linear`, and not to be traced."""
        return True

    def grouped(self, x: Tensor, ends: list[int]) -> Tensor:
        """As of `Linear`."""
        return by_group(x, ends, self.expert)

    def each(self, x: Tensor) -> Tensor:
        """x [R, E, in], times each of the matrices its own -> [R, E, out]."""
        return torch.stack([self.expert(e, x[:, e]) for e in range(x.shape[1])], dim=1)

    def chosen(self, experts: Tensor, x: Tensor) -> Tensor:
        """x [R, top or 1, in] times the matrices [R, top] that each row chose -> [R, top, out]."""
        x = x.expand(-1, experts.shape[1], -1).flatten(0, 1)
        picked = zip(x.split(1), *(part.split(1) for part in self.one(experts.flatten())), strict=True)
        out = torch.cat([self.product(row, *(part[0] for part in parts)) for row, *parts in picked])
        return out.unflatten(0, experts.shape)


class Words(Quantized):
    """Whole numbers of 32 bits: words [E, out, G, W], and scale, zero [E, out, G] of each group of columns.

    Column (g * P + p) * W + w is code p of word w of group g, so that one shift of neighbouring words finds
    neighbouring columns. Codes have a sign: those of 4 bits are 8 less than in `Codes`. In 8 bits there is no zero.
    """

    def __init__(self, codes: Codes, experts: int = 1):
        self.bits, groups = codes.bits, codes.scale.shape[1]
        columns = codes.q.unflatten(1, (groups, 32 // self.bits, -1)).mT.contiguous()
        tensors = {"scale": codes.scale}
        if self.bits == 4:
            low, high = columns.view(torch.int8).sub(8).unflatten(-1, (-1, 2)).unbind(-1)
            columns = (low & 15 | high << 4).contiguous()
            tensors = {"scale": codes.scale.bfloat16(), "zero": (16 * codes.zero).to(torch.uint8)}
        tensors = {"words": columns.view(torch.int32).squeeze(-1)} | tensors
        super().__init__(**{name: tensor.unflatten(0, (experts, -1)) for name, tensor in tensors.items()})

    def product(self, x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """As of `expert`, with its tensors."""
        if len(x) == 1 and torch.compiler.is_compiling():
            return self.loop(x[0], words, scale, zero)[None]
        x = x.unflatten(-1, (*words.shape[1:2], 32 // self.bits, -1)).mT.flatten(1)  # in the order of the codes
        plain = zero is None and scale.shape[1] == 1 and x.shape[1] % STRIDE == 0
        if plain and len(x) <= FEW and x.dtype == torch.bfloat16 and not x.is_cuda:
            return int8_product(x, words.view(torch.int8).flatten(1), scale[:, 0].to(x.dtype))
        parts = (part.split(rows_at_a_time(x, x.shape[1])) for part in (words, scale, zero) if part is not None)
        return torch.cat([x @ self.ordered(*part).to(x.dtype).T for part in zip(*parts, strict=True)], dim=1)

    def loop(self, x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """x [in] times a matrix in one pass over its words."""
        wide = torch.promote_types(x.dtype, torch.float32)
        bits, x = self.bits, x.to(wide).unflatten(0, (words.shape[1], 32 // self.bits, -1))
        total = sum((words << 32 - bits * (p + 1) >> 32 - bits).to(wide) * x[:, p] for p in range(32 // bits))
        if zero is None and scale.shape[1] == 1:
            return total.sum((1, 2)) * scale[:, 0].to(wide)
        out = (total * scale.to(wide)[..., None]).sum((1, 2))
        return out if zero is None else out + (offset(scale, zero).to(wide) * x.sum((1, 2))).sum(1)

    def ordered(self, words: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """Words [R, G, W] of some rows, and their scales, as numbers [R, in], columns in the order of the codes."""
        codes = words.view(torch.int8)
        if self.bits == 4:
            codes = torch.stack((codes << 4 >> 4, codes >> 4), dim=-1).flatten(-2)
        numbers = codes * scale.float()[..., None]
        return (numbers if zero is None else numbers + offset(scale, zero)[..., None]).flatten(1)

    def rows(self, ids: Tensor) -> Tensor:
        """ids [...] -> rows of the one matrix [..., in] in float32."""
        parts = [part[0] for part in self.one(slice(None))]
        found = self.ordered(*(part[ids.flatten()] for part in parts))
        return found.unflatten(1, (*parts[0].shape[1:], -1)).mT.reshape(*ids.shape, -1)


class Packed(Quantized):
    """4 bits for PyTorch's product on a CPU: packed [E, out, in / 2] in its order; scale [E, groups, out / 2] and zero
    [E, groups, out / 4] in words of 32 bits, of which part p of word w belongs to row p * W + w.

    That product wants each group's scale beside its offset; they are made of scale and zero when it is called, which
    takes a byte a group less. It computes in bfloat16 and adds in float32.
    """

    def __init__(self, codes: Codes, experts: int = 1):
        self.bits, self.block = codes.bits, int4_block()  # found out here: Dynamo cannot trace that
        packed = torch.cat([int4_pack(part) for part in codes.q.split(64 * max(1, PIECE // codes.q[:64].numel()))])
        scale, zero = codes.scale.bfloat16(), (16 * codes.zero).to(torch.uint8)
        scale, zero = (part.unflatten(0, (experts, -1)).mT.contiguous() for part in (scale, zero))
        scale, zero = (part.unflatten(2, (n, -1)).mT.contiguous() for part, n in ((scale, 2), (zero, 4)))
        scale, zero = (part.view(torch.int32).squeeze(-1) for part in (scale, zero))
        super().__init__(packed=packed.unflatten(0, (experts, -1)), scale=scale, zero=zero)

    @staticmethod
    def takes(codes: Codes, experts: int) -> bool:
        rows, columns = codes.q.shape
        fits = rows // experts % 64 == 0 and columns // codes.scale.shape[1] in (32, 64, 128, 256)
        exact = bool((codes.zero * 16 == (codes.zero * 16).round()).all())
        return fits and exact and codes.q.device.type == "cpu" and int4_block() is not None

    def product(self, x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """As of `expert`, with its tensors."""
        if len(x) <= 2 * FEW and x.dtype != torch.float64:
            return int4_product(x.bfloat16(), packed, x.shape[1] // len(scale), pairs(scale, zero))
        rows = 64 * max(1, PIECE // x.shape[1] // 64)
        row = torch.arange(len(packed), device=x.device)
        parts = zip(packed.split(rows), *(part.split(rows, 1) for part in columns(scale, zero, row)), strict=True)
        return torch.cat([x @ self.numbers(*part).to(x.dtype) for part in parts], dim=1)

    def numbers(self, packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Some rows [R] of a matrix as columns [in, R] of numbers in float32."""
        codes = packed.view(-1, 2 * packed.shape[1], self.block // 2)
        codes = torch.cat((codes & 15, codes >> 4), dim=-1).transpose(0, 1).flatten(1)
        groups = codes.unflatten(0, (len(scale), -1)).float() - 8
        return (groups * scale[:, None] + offset(scale, zero)[:, None]).flatten(0, 1)

    def rows(self, ids: Tensor) -> Tensor:
        """ids [...] -> rows of the one matrix [..., in] in float32."""
        [packed, scale, zero] = (part[0] for part in self.one(slice(None)))
        block, flat = self.block, ids.flatten()
        halves = packed.view(-1, 2 * packed.shape[1], block // 2)
        codes = halves[flat // block, :, flat % (block // 2)]
        codes = torch.where((flat % block < block // 2)[:, None], codes & 15, codes >> 4)
        scale, zero = (part.T for part in columns(scale, zero, flat))
        groups = codes.unflatten(1, (scale.shape[1], -1)).float() - 8
        numbers = groups * scale[..., None] + offset(scale, zero)[..., None]
        return numbers.view(*ids.shape, -1)


def columns(scale: Tensor, zero: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of some rows [R], what the words of `Packed` hold: scale in float32, zero in sixteenths, [groups, R]."""
    half, quarter = scale.shape[1], zero.shape[1]
    words = scale[:, rows % half]
    words = torch.where(rows < half, words << 16, words & -65536)
    return words.view(torch.float32), zero[:, rows % quarter] >> 8 * (rows // quarter) & 255


def pairs(scale: Tensor, zero: Tensor) -> Tensor:
    """The scales and offsets of all rows in bfloat16, [groups, out, 2]; made in words, so that loops stay vectors."""
    found, quarter = [], zero.shape[1]
    for part in range(4):
        words = scale[:, part % 2 * quarter : (part % 2 + 1) * quarter]
        words = words & -65536 if part > 1 else words << 16  # the bits of the scale in float32
        bits = offset(words.view(torch.float32), zero >> 8 * part & 255).view(torch.int32)
        nearest = bits + 0x7FFF + (bits >> 16 & 1) & -65536
        found.append(words >> 16 & 0xFFFF | nearest)
    return torch.cat(found, dim=1).view(torch.bfloat16).unflatten(1, (-1, 2))


def offset(scale: Tensor, zero: Tensor) -> Tensor:
    """What is added to (code - 8) * scale: zero is in sixteenths."""
    return (8 - zero.float() / 16) * scale.float()


class Table(nn.Module):
    """An embedding whose rows are those of a matrix of codes."""

    def __init__(self, matrix: Words | Packed):
        super().__init__()
        self.matrix = matrix

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> x [..., C] in float32."""
        return self.matrix.rows(ids)


def module_of(codes: Codes, experts: int = 1) -> Words | Packed:
    """The form that suits the device and the shape."""
    return (Packed if codes.bits == 4 and Packed.takes(codes, experts) else Words)(codes, experts)


def bits_of(model: Transformer, name: str, weights: str) -> int | None:
    """How many bits a number of the parameter `name` gets; None if it stays as it is.

    Those are no matrices (`is_matrix`), and rows that cannot be cut into words or groups: in 4 bits these get 8. A
    table of embeddings gets 8, unless the head shares it.
    """
    if weights == "auto" or not is_matrix(model, name):
        return None
    columns = model.get_parameter(name).shape[1]
    alone = name == "embed.weight" and not model.config.tie_embeddings
    if weights == "int4" and not columns % GROUP and not alone:
        return 4
    return None if columns % 4 else 8


def is_matrix(model: Transformer, name: str) -> bool:
    """Whether codes can take the parameter's place: not of norms, biases, learned positions, and the few rows that
    choose experts or make the rates of linear attention.
    """
    module, _, kind = name.rpartition(".")
    matrix = model.get_submodule(module)
    whole = isinstance(matrix, Linear) or (isinstance(matrix, nn.Embedding) and module == "embed")
    return whole and kind == "weight" and not module.endswith(("router", ".wba"))


def holds(bits: int, columns: int, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> bool:
    """Whether a form can hold codes with these scales and zero points [..., groups] of a matrix of so many columns.

    Groups must be whole words, and zero points exact: none in 8 bits, sixteenths up to 255 in 4. Scales of 4 bits are
    rounded to bfloat16, which takes 3 bits from those of float16 (at most 0.2% of a number). No number may overflow
    `dtype` or be none: who dequantizes finds that out, and says so.
    """
    sixteenths = 16 * zero
    exact = (sixteenths == sixteenths.round().clamp(0, 255 if bits == 4 else 0)).all()
    most = (scale.abs().amax() * 2**bits).to(torch.bfloat16).to(dtype)
    return bool(exact and most.isfinite()) and columns // scale.shape[-1] % (32 // bits) == 0


def held_bytes(shape: Sequence[int], bits: int, groups: int) -> int:
    """Bytes of a matrix [out, in], or of several of so many rows together, in whichever form."""
    rows, columns = shape
    return rows * columns * bits // 8 + rows * groups * (4 if bits == 8 else 3)


def own_groups(columns: int, bits: int) -> int:
    """How many groups of columns `Codes.of` makes."""
    return 1 if bits == 8 else columns // GROUP


def quantize(model: Transformer, weights: str) -> None:
    """Put codes in the place of all matrices of a model in memory, one after the other; "auto" leaves it as it is."""
    for name in [name for name, _ in model.named_parameters()]:
        if bits := bits_of(model, name, weights):
            replace_matrix(model, name, Codes.of(model.get_parameter(name), bits))


def replace_matrix(model: Transformer, name: str, codes: Codes) -> None:
    """Put codes in the place of the parameter `name`; where the head shares the embedding's table, of both."""
    module = name.removesuffix(".weight")
    old = model.get_submodule(module)
    new = module_of(codes, getattr(old, "experts", 1))
    new.bias = getattr(old, "bias", None)
    if module != "embed" or model.config.tie_embeddings:
        model.set_submodule("head" if module == "embed" else module, new)
    if module == "embed":
        model.embed = Table(new)
