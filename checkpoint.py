"""A Hugging Face folder, a hub id or a GGUF file in, a loaded `Transformer` out.

    model, config = load("Qwen/Qwen3-0.6B", device="cuda", dtype="bf16")

As a command it says what is in there, whether everything matches and what fits into memory, and loads no weights:

    python checkpoint.py Qwen/Qwen3-0.6B --tokens 8192 --memory 24 --budget 0.2

One table per family (`WEIGHTS`; for GGUF files those of gguf_file.py) says which tensors of the files make up which of
our parameters. Files are memory-mapped. Each tensor is read into the parameter that it belongs to, so that memory holds
the model and at most one more tensor. Quantized ones (quantized.py) stay codes where weights.py can hold them, and are
dequantized on the way where not. Nothing is guessed: every tensor is used, ignored by name, or an error.
"""

from commandline import Parser, guarded, positive  # first: Ctrl-C is one line from here on

# isort: split
import json
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

import gguf_file
import parallel
import quantized
from codes import Codes
from config import ModelConfig, parameters, text_part
from errors import UserError, cut, place, reason, shown
from files import accessing, read_json
from model import Transformer
from parallel import WHOLE, Cut, Shard
from policies.layers import Uniform
from policies.tokens import Full
from sizing import Sizing
from weights import WEIGHT_FORMATS, bits_of, held_bytes, holds, is_matrix, own_groups, replace_matrix

# Our module -> the checkpoint's modules that are fused into it, in this order, weight and bias alike. {l} is the
# layer, {e} every expert in turn. `dense` in place of `feed_forward`: of the layers without experts among others;
# `linear` in place of `attention`: of those of linear attention. A key that names no module names a parameter.
LLAMA = {
    "embed": ["model.embed_tokens"],
    "layers.{l}.attention_norm": ["model.layers.{l}.input_layernorm"],
    "layers.{l}.attention.wqkv": [
        "model.layers.{l}.self_attn.q_proj",
        "model.layers.{l}.self_attn.k_proj",
        "model.layers.{l}.self_attn.v_proj",
    ],
    "layers.{l}.attention.q_norm": ["model.layers.{l}.self_attn.q_norm"],
    "layers.{l}.attention.k_norm": ["model.layers.{l}.self_attn.k_norm"],
    "layers.{l}.attention.wo": ["model.layers.{l}.self_attn.o_proj"],
    "layers.{l}.ffn_norm": ["model.layers.{l}.post_attention_layernorm"],
    "layers.{l}.feed_forward.w13": ["model.layers.{l}.mlp.gate_proj", "model.layers.{l}.mlp.up_proj"],
    "layers.{l}.feed_forward.w2": ["model.layers.{l}.mlp.down_proj"],
    "norm": ["model.norm"],
    "head": ["lm_head"],
}
PHI3 = LLAMA | {
    "layers.{l}.attention.wqkv": ["model.layers.{l}.self_attn.qkv_proj"],
    "layers.{l}.feed_forward.w13": ["model.layers.{l}.mlp.gate_up_proj"],
}
GRANITE_HYBRID = LLAMA | {
    "layers.{l}.feed_forward.w13": ["model.layers.{l}.shared_mlp.input_linear"],
    "layers.{l}.feed_forward.w2": ["model.layers.{l}.shared_mlp.output_linear"],
}
MIXTRAL = LLAMA | {
    "layers.{l}.feed_forward.router": ["model.layers.{l}.block_sparse_moe.gate"],
    "layers.{l}.feed_forward.w13": [
        "model.layers.{l}.block_sparse_moe.experts.{e}.w1",
        "model.layers.{l}.block_sparse_moe.experts.{e}.w3",
    ],
    "layers.{l}.feed_forward.w2": ["model.layers.{l}.block_sparse_moe.experts.{e}.w2"],
}
MIXTURE = LLAMA | {
    "layers.{l}.feed_forward.router": ["model.layers.{l}.mlp.gate"],
    "layers.{l}.feed_forward.w13": [
        "model.layers.{l}.mlp.experts.{e}.gate_proj",
        "model.layers.{l}.mlp.experts.{e}.up_proj",
    ],
    "layers.{l}.feed_forward.w2": ["model.layers.{l}.mlp.experts.{e}.down_proj"],
    "layers.{l}.dense.w13": LLAMA["layers.{l}.feed_forward.w13"],  # of the layers without experts
    "layers.{l}.dense.w2": LLAMA["layers.{l}.feed_forward.w2"],
}
# All experts of a layer in one tensor, as transformers 5 holds them, and writes them if it is asked to.
STACKED = {
    "layers.{l}.feed_forward.router": ["model.layers.{l}.mlp.gate"],
    "layers.{l}.feed_forward.w13": ["model.layers.{l}.mlp.experts.{e}.gate_up_proj"],
    "layers.{l}.feed_forward.w2": ["model.layers.{l}.mlp.experts.{e}.down_proj"],
}
GPT_OSS = LLAMA | STACKED
GPT_OSS |= {
    "layers.{l}.feed_forward.router": ["model.layers.{l}.mlp.router"],
    "layers.{l}.attention.sink_logits": ["model.layers.{l}.self_attn.sinks"],  # the parameter itself
}
LINEAR = {
    "layers.{l}.linear.wqkvz": ["model.layers.{l}.linear_attn.in_proj_qkvz"],
    "layers.{l}.linear.wba": ["model.layers.{l}.linear_attn.in_proj_ba"],
    "layers.{l}.linear.conv": ["model.layers.{l}.linear_attn.conv1d.weight"],
    "layers.{l}.linear.a_log": ["model.layers.{l}.linear_attn.A_log"],
    "layers.{l}.linear.dt_bias": ["model.layers.{l}.linear_attn.dt_bias"],
    "layers.{l}.linear.norm": ["model.layers.{l}.linear_attn.norm.weight"],
    "layers.{l}.linear.wo": ["model.layers.{l}.linear_attn.out_proj"],
}
LINEAR_APART = LINEAR | {
    "layers.{l}.linear.wqkvz": ["model.layers.{l}.linear_attn.in_proj_qkv", "model.layers.{l}.linear_attn.in_proj_z"],
    "layers.{l}.linear.wba": ["model.layers.{l}.linear_attn.in_proj_b", "model.layers.{l}.linear_attn.in_proj_a"],
}
SHARED = MIXTURE | {
    "layers.{l}.feed_forward.shared.w13": [
        "model.layers.{l}.mlp.shared_expert.gate_proj",
        "model.layers.{l}.mlp.shared_expert.up_proj",
    ],
    "layers.{l}.feed_forward.shared.w2": ["model.layers.{l}.mlp.shared_expert.down_proj"],
    "layers.{l}.feed_forward.shared_router": ["model.layers.{l}.mlp.shared_expert_gate"],
}
POST_NORMS = LLAMA | {
    "layers.{l}.post_attention_norm": ["model.layers.{l}.post_attention_layernorm"],
    "layers.{l}.ffn_norm": ["model.layers.{l}.pre_feedforward_layernorm"],
    "layers.{l}.post_ffn_norm": ["model.layers.{l}.post_feedforward_layernorm"],
}
NEOX = {
    "embed": ["gpt_neox.embed_in"],
    "layers.{l}.attention_norm": ["gpt_neox.layers.{l}.input_layernorm"],
    "layers.{l}.attention.wqkv": ["gpt_neox.layers.{l}.attention.query_key_value"],
    "layers.{l}.attention.wo": ["gpt_neox.layers.{l}.attention.dense"],
    "layers.{l}.ffn_norm": ["gpt_neox.layers.{l}.post_attention_layernorm"],
    "layers.{l}.feed_forward.w13": ["gpt_neox.layers.{l}.mlp.dense_h_to_4h"],
    "layers.{l}.feed_forward.w2": ["gpt_neox.layers.{l}.mlp.dense_4h_to_h"],
    "norm": ["gpt_neox.final_layer_norm"],
    "head": ["embed_out"],
}
FALCON = {
    "embed": ["transformer.word_embeddings"],
    "layers.{l}.attention_norm": ["transformer.h.{l}.input_layernorm"],
    "layers.{l}.attention.wqkv": ["transformer.h.{l}.self_attention.query_key_value"],
    "layers.{l}.attention.wo": ["transformer.h.{l}.self_attention.dense"],
    "layers.{l}.ffn_norm": ["transformer.h.{l}.post_attention_layernorm"],
    "layers.{l}.feed_forward.w13": ["transformer.h.{l}.mlp.dense_h_to_4h"],
    "layers.{l}.feed_forward.w2": ["transformer.h.{l}.mlp.dense_4h_to_h"],
    "norm": ["transformer.ln_f"],
    "head": ["lm_head"],
}
FALCON_TWO_NORMS = FALCON | {
    "layers.{l}.attention_norm": ["transformer.h.{l}.ln_attn"],
    "layers.{l}.ffn_norm": ["transformer.h.{l}.ln_mlp"],
}
OPT = {
    "embed": ["model.decoder.embed_tokens"],
    "positions": ["model.decoder.embed_positions"],
    "layers.{l}.attention_norm": ["model.decoder.layers.{l}.self_attn_layer_norm"],
    "layers.{l}.attention.wqkv": [
        "model.decoder.layers.{l}.self_attn.q_proj",
        "model.decoder.layers.{l}.self_attn.k_proj",
        "model.decoder.layers.{l}.self_attn.v_proj",
    ],
    "layers.{l}.attention.wo": ["model.decoder.layers.{l}.self_attn.out_proj"],
    "layers.{l}.ffn_norm": ["model.decoder.layers.{l}.final_layer_norm"],
    "layers.{l}.feed_forward.w13": ["model.decoder.layers.{l}.fc1"],
    "layers.{l}.feed_forward.w2": ["model.decoder.layers.{l}.fc2"],
    "norm": ["model.decoder.final_layer_norm"],
    "head": ["lm_head"],
}
WEIGHTS: dict[str, Callable[[ModelConfig], dict[str, list[str]]]] = {
    "llama": lambda config: LLAMA,
    "mistral": lambda config: LLAMA,
    "ministral3": lambda config: LLAMA,
    "mixtral": lambda config: MIXTRAL,
    "qwen2": lambda config: LLAMA,
    "qwen3": lambda config: LLAMA,
    "qwen3_moe": lambda config: MIXTURE,
    "seed_oss": lambda config: LLAMA,
    "qwen3_next": lambda config: SHARED | LINEAR,
    "qwen3_5_text": lambda config: LLAMA | LINEAR_APART,
    "qwen3_5_moe_text": lambda config: SHARED | LINEAR_APART,
    "smollm3": lambda config: LLAMA,
    "granite": lambda config: LLAMA,
    "granitemoehybrid": lambda config: GRANITE_HYBRID,
    "phi3": lambda config: PHI3,
    "gemma": lambda config: LLAMA,
    "gemma2": lambda config: POST_NORMS,
    "gemma3_text": lambda config: POST_NORMS,
    "olmo2": lambda config: POST_NORMS,
    "olmo3": lambda config: POST_NORMS,
    "gpt_oss": lambda config: GPT_OSS,
    "olmoe": lambda config: MIXTURE,
    "gpt_neox": lambda config: NEOX,
    "falcon": lambda config: FALCON_TWO_NORMS if config.parallel and not config.shared_norm else FALCON,
    "opt": lambda config: OPT,
}
# Ends of tensors that hold, for each head or key head in turn, its rows of several parts. Ours hold all rows of the
# first part, then all of the second, and so on (`parts_of_head`).
INTERLEAVED = (".query_key_value.weight", ".query_key_value.bias", ".in_proj_qkvz.weight", ".in_proj_ba.weight")
GATED = (".self_attn.q_proj.weight", ".self_attn.q_proj.bias")  # so do these, where attention is gated
# Tensors that hold all experts of a layer. In some families the matrices are [E, in, out], and gate and up alternate.
STACK = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(_bias|_blocks|_scales|)")
EXPERT = re.compile(r"(.*\.experts)\.\d+\.(gate_up_proj|down_proj)\.(weight|bias)")  # as we call a part of one
WOVEN = ("gpt_oss",)
# Names as some files have them -> names as the tables have them. OPT's lack the outermost; the text model of several
# modalities is inside, by one name in transformers 4 and what save_pretrained writes, by another in transformers 5.
PREFIXES = {"opt": {"decoder.": "model.decoder."}}
INSIDE = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
UNUSED = ("vision_tower", "multi_modal_projector", "visual")
UNUSED = tuple(f"{outer}{part}." for outer in ("", "model.") for part in UNUSED)
AHEAD = ("mtp.",)  # beside linear attention: layers that guess several tokens ahead
# Ends of tensors that hold nothing config.json does not say.
IGNORED = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")

EMBEDDED = Path(__file__).resolve().parent / "checkpoints" / "tiny"  # the checkpoint that comes along
SINGLE = ("model.safetensors", "pytorch_model.bin")  # the first one found, or else the first `<name>.index.json`
HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}
DTYPES |= {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SLOW_BYTES = 4 << 30  # from here on loading shows its progress


class Stored(NamedTuple):
    """A tensor in a file, not read yet."""

    file: Path
    name: str
    shape: list[int]
    tensor: Tensor | None = None  # of a file that can only be read as a whole

    def read(self, own: Cut = WHOLE) -> Tensor:
        """The tensor, or a part. The file is mapped anew for each one, so that the pages read before are let go."""
        if self.tensor is not None:
            return own.of(self.tensor)
        if self.file.suffix != ".safetensors":
            return own.of(_unpickle(self.file)[self.name])
        with _reading(self.file), safe_open(self.file, "pt") as tensors:
            return tensors.get_tensor(self.name) if own == WHOLE else own.of(tensors.get_slice(self.name))


class Expert(NamedTuple):
    """One expert's part of a tensor that holds those of all experts of a layer, in the order that we have."""

    stack: Stored
    number: int
    name: str
    shape: list[int]
    turned: bool  # the stack has columns first
    woven: bool  # its rows of gate and up alternate

    @property
    def file(self) -> Path:
        return self.stack.file

    def read(self) -> Tensor:
        tensor = self.stack.read(Cut(((self.number, self.number + 1),)))[0]
        tensor = tensor.T if self.turned else tensor
        return torch.cat((tensor[::2], tensor[1::2])) if self.woven else tensor

    @staticmethod
    def all_of(tensor: Stored, config: ModelConfig) -> "list[Stored | Expert]":
        """What a tensor holds of each expert, if it is a stack of theirs; else the tensor."""
        stack, (count, *shape) = STACK.fullmatch(tensor.name), tensor.shape or [0]
        if not stack or count != config.experts:
            return [tensor]
        experts, matrix, kind = stack.groups()
        woven, end = config.model_type in WOVEN, {"": "weight"}.get(kind, kind[1:])
        turned = woven and end == "weight"
        how = (shape[::-1] if turned else shape, turned, woven and matrix == "gate_up_proj")
        return [Expert(tensor, e, f"{experts}.{e}.{matrix}.{end}", *how) for e in range(count)]


def load(
    path: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype = "auto", weights: str = "auto"
) -> tuple[Transformer, ModelConfig]:
    """The model in a folder, in a GGUF file or on the hub, ready to run, and its config; dtype "auto" is the one that
    config.json names, else that of the files' tensors, or of a GGUF file's matrices, float32 where they are quantized.
    weights: "int8" or "int4" for matrices of 8 or 4 bits (weights.py); "auto" for codes where a folder's files hold
    codes that fit.

    UserError, in one line that names the culprit, for whatever is missing, broken, unsupported or does not fit.
    """
    device = find_device(device)
    _check_weights(weights)
    folder = resolve(path)
    whole, found, _ = _matched(folder, dtype)
    own, names = parallel.shard(), _names(folder, whole.config, found)
    model = _of_rank(whole, own)
    parallel.share(whole.config.n_kv_heads)
    config = model.config
    size = sum(file.stat().st_size for file in {tensor.file for tensor in found.values()})
    slow = size >= SLOW_BYTES and sys.stderr.isatty() and own.rank == 0
    for name, empty in tqdm(list(whole.named_parameters()), f"loading {folder.name}", leave=False, disable=not slow):
        parts = _parts(name, len(empty), whole.config, names)
        sources, rows = [found[source] for source in parts], list(parts.values())
        if held := _held(whole, name, sources, weights):  # of the whole matrix, so that all ranks have its scales
            codes = _codes(sources, rows, whole.config, device, None if held.stored else held.bits)
            part = parallel.cut_of(name, whole.config, own)
            replace_matrix(model, name, codes.cut(part.rows, part.columns))
            continue
        module, _, kind = name.rpartition(".")
        parameter = _read(sources, rows, whole.config, config.dtype, device, own, name)
        setattr(model.get_submodule(module), kind, nn.Parameter(parameter, requires_grad=False))
    model.tie()
    return model.eval(), config


def _of_rank(whole: Transformer, own: parallel.Shard) -> Transformer:
    """A rank's own model, without weights."""
    if own.world == 1:
        return whole
    with torch.device("meta"), _Uninitialised():
        return Transformer(whole.config.of_rank(own.world))


def _read(
    sources: list[Stored],
    rows: list[int],
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    own: Shard = parallel.ALONE,
    name: str = "",
) -> Tensor:
    """What a rank has of the parameter `name` of the whole model, which is made of these tensors, of so many rows."""
    local, whole, cuts, first = config.of_rank(own.world), parallel.cut_of(name, config, own), [], 0
    for source, count in zip(sources, rows, strict=True):
        turned = own.world > 1 and parts_of_head(source.name, config) is not None
        cuts.append(parallel.cut_by_kv_head(config, own) if turned else whole.within(first, count))
        first += count
    sizes = [part.size(count) for part, count in zip(cuts, rows, strict=True)]
    tail = sources[0].shape[1:] if whole.columns is None else [whole.columns[1] - whole.columns[0]]
    parameter = torch.empty(sum(sizes), *tail, dtype=dtype, device=device)
    for source, part, its in zip(sources, parameter.split(sizes), cuts, strict=True):
        _copy(source, part, local, its)
    return parameter


def outline(path: str | Path, dtype: str | torch.dtype = "auto", weights: str = "auto") -> tuple[ModelConfig, int]:
    """The config of what `load` would give, the bytes of its weights, and the same UserErrors; no weights are read."""
    folder, own = resolve(path), parallel.shard()
    model, found, _ = _matched(folder, dtype)
    size, *_ = _survey(model, found, _names(folder, model.config, found), weights, own)
    return model.config.of_rank(own.world), size


def report(
    path: str | Path,
    dtype: str = "auto",
    tokens: int = 4096,
    memory: float = 24,
    budget: float = 0.2,
    weights: str = "auto",
    ranks: int = 1,
) -> str:
    """What is in a checkpoint, and how many sequences of `tokens` tokens fit into `memory` GiB beside its weights as
    `load` would hold them: with the full cache, and squeezed to the share `budget` of it. UserError if something does
    not match. No weights are read; of quantized ones, scales and zero points are.
    """
    _check_weights(weights)
    folder = resolve(path)
    model, found, unused = _matched(folder, dtype)
    config = model.config.of_rank(ranks)
    size, bits, dequantized = _survey(model, found, _names(folder, config, found), weights, Shard(0, ranks))
    sizing = Sizing(config, Full(), Uniform())
    count, token, full = parameters(config), sizing.slot_bytes(), sizing.full_bytes(tokens)
    layers = config.n_layers - len(config.linear)
    squeezed = min(full, int(budget * tokens) * layers * token)
    full, squeezed = full + sizing.recurrent_bytes, squeezed + sizing.recurrent_bytes
    left = max(0, int(memory * 2**30) - size)
    windows = f", {len(config.windowed)} of them with a window of {config.sliding_window}" if config.windowed else ""
    windows += f", {len(config.linear)} of them of linear attention" if config.linear else ""
    windows += f", {config.experts} experts of which a token takes {config.experts_per_token}" if config.experts else ""
    state = f" and {sizing.recurrent_bytes / 2**20:.1f} MiB of state a sequence" if config.linear else ""
    kinds = " and ".join([*(f"{each} bits" for each in bits), str(config.dtype).removeprefix("torch.")])
    schemes = [tensor.scheme for tensor in found.values() if isinstance(tensor, quantized.Quantized)]
    packed = f", {len(schemes)} of them quantized ({schemes[0]})" if schemes else ""
    packed += f", {dequantized} dequantized as they are read" if dequantized else ""
    parts = dict.fromkeys(name.removeprefix("model.").split(".")[0] for name in unused)
    lines = {
        "family": f"{config.model_type}, {config.n_layers} layers{windows}",
        "reach": f"{config.reach:,} positions{_extended(config)}",
        "tensors": f"{len(found)} in {len({tensor.file for tensor in found.values()})} file(s){packed}, all match",
        "weights": f"{count:,} parameters, {size / 2**30:.2f} GiB in {kinds}",
        "cache": f"{token * layers:,} bytes per token{state}; {tokens} tokens {full / 2**30:.3f} GiB full, "
        f"{squeezed / 2**30:.3f} GiB squeezed to {budget:.0%}",
        "fits": f"in {memory:g} GiB: {left // full:,} sequences of {tokens} tokens full, "
        f"{left // max(squeezed, 1):,} squeezed (activations not counted)",
    }
    if unused:
        lines["not used"] = f"{', '.join(parts)} ({len(unused)} tensors)"
    return "\n".join(f"{name:8} {text}" for name, text in lines.items())


def _extended(config: ModelConfig) -> str:
    kind, trained = config.rope["rope_type"], config.rope.get("original_max_position_embeddings", config.max_positions)
    return f" ({trained:,} extended by rope type {kind})" if trained < config.reach else ""


class Held(NamedTuple):
    """A parameter as codes. stored: those of the files, or else we make them."""

    bits: int
    groups: int
    stored: bool


def _held(model: Transformer, name: str, sources: list[Stored], weights: str) -> Held | None:
    """None if the parameter, which is made of these tensors, is floats. No codes are read.

    Stored codes stay if all tensors have some that fit, and if `weights` asks for as many bits or for none.
    """
    bits, columns = bits_of(model, name, weights), sources[0].shape[-1]
    if is_matrix(model, name) and all(isinstance(source, quantized.Quantized) for source in sources):
        own = sources[0].scheme.bits  # a folder has one scheme, so that equal columns make equal groups
        grouped = [source.grouped() for source in sources] if bits in (None, own) else [None]
        if all(parts and holds(own, columns, *parts, model.config.dtype) for parts in grouped):
            return Held(own, grouped[0][0].shape[1], True)
    return Held(bits, own_groups(columns, bits), False) if bits else None


def _survey(
    model: Transformer, found: dict[str, Stored], names: dict[str, list[str]], weights: str, own: Shard
) -> tuple[int, list[int], int]:
    """Bytes of a rank's parameters as `load` holds them, the bits of their codes, how many quantized tensors do not
    stay.
    """
    size, bits, dequantized, local = 0, set(), 0, _of_rank(model, own)
    for name, parameter in model.named_parameters():
        sources = [found[source] for source in _parts(name, len(parameter), model.config, names)]
        held = _held(model, name, sources, weights)
        bits |= {held.bits} if held else set()
        part = local.get_parameter(name)
        if held:
            groups = max(1, held.groups * part.shape[1] // parameter.shape[1])
            size += held_bytes(part.shape, held.bits, groups)
        else:
            size += part.numel() * model.config.dtype.itemsize
        if not (held and held.stored):
            dequantized += sum(isinstance(source, quantized.Quantized) for source in sources)
    return size, sorted(bits), dequantized


def to_hf(state_dict: dict[str, Tensor], config: ModelConfig, stacked: bool = False) -> dict[str, Tensor]:
    """The same tensors under the checkpoint's names, fused ones split, to be written as model.safetensors.

    stacked: all experts of a layer as one, as transformers' own modules have them.
    """
    stacked = stacked and config.experts and config.model_type not in WOVEN
    tensors, names = {}, WEIGHTS[config.model_type](config) | (STACKED if stacked else {})
    for name, tensor in state_dict.items():
        if config.tie_embeddings and name == "head.weight":
            continue
        parts = _parts(name, len(tensor), config, names)
        if stacked and (first := EXPERT.fullmatch(next(iter(parts)))):
            tensors[f"{first[1]}.{first[2]}"] = tensor.unflatten(0, (config.experts, -1))
            continue
        for source, part in zip(parts, tensor.split(list(parts.values())), strict=True):
            if form := parts_of_head(source, config):
                part = torch.cat(by_head(part, *form), dim=1).flatten(0, 1)
            tensors[source] = part
    return _stacked_again(tensors) if config.model_type in WOVEN else tensors


def _stacked_again(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the tensors of a layer's experts in one, as `WOVEN` families have them."""
    plain, stacks = {}, {}
    for name, tensor in tensors.items():
        if expert := EXPERT.fullmatch(name):
            experts, matrix, kind = expert.groups()
            tensor = torch.stack(tensor.chunk(2), 1).flatten(0, 1) if matrix == "gate_up_proj" else tensor
            name = f"{experts}.{matrix}{'_bias' if kind == 'bias' else ''}"
            stacks.setdefault(name, []).append(tensor if kind == "bias" else tensor.T)
        else:
            plain[name] = tensor
    return plain | {name: torch.stack(parts) for name, parts in stacks.items()}


def resolve(path_or_id: str | Path) -> Path:
    """A checkpoint's folder or GGUF file: `path_or_id` itself, or where the hub's files of that name were put."""
    name = place(path_or_id)
    with accessing(path_or_id):
        folder = Path(os.path.expanduser(path_or_id))  # leaves alone what it cannot expand
        if not folder.exists() and HUB_ID.fullmatch(str(path_or_id)):
            folder = _download(str(path_or_id))
        if not folder.exists():
            raise UserError(f"checkpoint folder {name} does not exist")
        if gguf_file.is_gguf(folder):
            return folder
        if not folder.is_dir():
            raise UserError(f"checkpoint {name} is a file; give a .gguf file, or the folder that holds config.json")
        if not any(folder.iterdir()):
            raise UserError(f"checkpoint folder {name} is empty")
        if not (folder / "config.json").is_file():
            ggufs = sorted(file.name for file in folder.glob("*.gguf"))
            instead = f"; give its file {cut(ggufs[0])} itself" if ggufs else ""
            raise UserError(f"checkpoint folder {name} holds no config.json{instead}")
    return folder


def _download(repo: str) -> Path:
    """Fetch what is not cached: config, tokenizer and one copy of the weights, *.bin if there are no safetensors."""
    from huggingface_hub import snapshot_download

    def fetch(*names: str) -> Path:
        return Path(snapshot_download(repo, allow_patterns=list(names), ignore_patterns=["*/*"]))

    try:
        folder = fetch("*.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "model.safetensors")
        if not (folder / "model.safetensors").exists():
            indexes = [index for name in SINGLE if (index := folder / f"{name}.index.json").exists()]
            fetch(*(sorted(set(_listed(indexes[0]).values())) if indexes else ["pytorch_model.bin"]))
        return folder
    except UserError:
        raise
    except Exception as error:  # the client's own, its http library's, the operating system's
        raise UserError(f"{cut(repo)} is no folder here, and the hub did not give it: {reason(error)}") from error


class _Uninitialised(TorchFunctionMode):
    """Skips random initialisation. On the meta device it draws nothing, and yet takes PyTorch two seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


class Matched(NamedTuple):
    """The model without its weights, the tensors found for it, and the names of those that are not the text model's."""

    model: Transformer
    found: dict[str, Stored]
    unused: list[str]


def _matched(folder: Path, dtype: str | torch.dtype) -> Matched:
    """UserError unless the tensors found are what the model consists of."""
    dtype = _dtype(dtype)
    read = gguf_file.read_json if gguf_file.is_gguf(folder) else read_json
    config = ModelConfig.from_hf(raw := read(folder / "config.json"))
    several, tensors = (text := text_part(raw)) is not raw, _weights(folder)
    if dtype is None and text.get("dtype") is None and text.get("torch_dtype") is None:
        dtype = _dtype_of(tensors)
    config = replace(config, dtype=dtype or config.dtype)
    prefixes, found = INSIDE if several else PREFIXES.get(config.model_type, {}), {}
    others = (UNUSED if several else ()) + (AHEAD if config.linear else ())
    unused = [tensor.name for tensor in tensors if tensor.name.startswith(others)]
    tensors = [tensor for tensor in tensors if not tensor.name.startswith(others)]
    if config.experts and not gguf_file.is_gguf(folder):
        tensors = [part for tensor in tensors for part in Expert.all_of(tensor, config)]
    if (settings := raw.get("quantization_config")) is not None:
        tensors = quantized.joined(tensors, quantized.scheme(settings))
    for tensor in tensors:
        short = next((short for short in prefixes if tensor.name.startswith(short)), "")
        name = prefixes.get(short, "") + tensor.name.removeprefix(short)
        if name in found:
            raise UserError(f"{place(folder)}: {cut(tensor.name)} and {cut(found[name].name)} are the same tensor")
        found[name] = tensor
    if several and raw.get("tie_word_embeddings") is None:  # left out by either kind, so that the files tell
        config = replace(config, tie_embeddings="lm_head.weight" not in found)
    layers, mixtures = config.n_layers, config.n_layers - len(config.dense)
    if layers + mixtures * max(0, config.experts - 1) > len(found):
        # Each layer and expert has tensors of its own; a model of that size is not even built.
        size = f"{layers} layers" + (f" of {config.experts} experts" if config.experts else "")
        raise UserError(
            f"the weights in {place(folder)} do not fit its config.json; {size}, but only {len(found)} tensors"
        )
    with torch.device("meta"), _Uninitialised():
        model = Transformer(config)
    _check(folder, model, found)
    return Matched(model, found, unused)


def _dtype_of(tensors: list[Stored]) -> torch.dtype | None:
    """That of the first ones that are floats, as transformers takes where config.json names none."""
    for tensor in tensors:
        if tensor.shape and (dtype := tensor.read(Cut(((0, 1),))).dtype) in DTYPES.values():
            return dtype
    return None


def _weights(folder: Path) -> list[Stored]:
    """All tensors of a folder or of a GGUF file. Where there are shards, the index says in which one a tensor is."""
    if gguf_file.is_gguf(folder):
        return gguf_file.tensors(folder)
    for name in SINGLE:
        if (folder / name).exists():
            return _stored(folder / name)
        if (index := folder / f"{name}.index.json").exists():
            return _sharded(folder, index)
    raise UserError(f"checkpoint folder {place(folder)} holds no weights: no {' or '.join(SINGLE)}, whole or in shards")


def _sharded(folder: Path, index: Path) -> list[Stored]:
    weight_map = _listed(index)
    shards = sorted(set(weight_map.values()))
    with accessing(folder):
        if missing := [shard for shard in shards if not (folder / shard).exists()]:
            raise UserError(f"{place(index)} lists {_some(missing)}, missing in that folder")
        home = folder.resolve()
        for shard in shards:
            file = (folder / shard).resolve()
            # The hub's cache keeps the files themselves in models--organization--name/blobs.
            cached = file.parent.name == "blobs" and file.parent.parent.name.startswith("models--")
            if not (file.is_relative_to(home) or cached):
                raise UserError(f"{place(index)} lists {shown(shard)}, a link out of that folder; put the file there")
    stored, unlisted = [], []
    for shard in shards:
        for tensor in _stored(folder / shard):
            if weight_map.get(tensor.name) == shard:
                stored.append(tensor)
            elif tensor.name not in weight_map and not tensor.name.endswith(IGNORED):
                unlisted.append(tensor.name)
    if unlisted:
        raise UserError(f"{place(index)} does not list {_some(unlisted)}, which its files hold")
    return stored  # what is listed and nowhere held is missed later, if the model has it


def _listed(index: Path) -> dict[str, str]:
    """Tensor -> the file that holds it, as an index says. UserError unless all are in the index's folder."""
    weight_map, suffix = read_json(index).get("weight_map"), Path(index.name.removesuffix(".index.json")).suffix
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{place(index)} is broken: no weight_map from tensors to files")
    for shard in weight_map.values():
        path = Path(shard) if isinstance(shard, str) else None
        if path is None or path.is_absolute() or ".." in path.parts or path.suffix != suffix:
            raise UserError(f"{place(index)} lists {shown(shard)}, which is no {suffix} file in that folder")
    return weight_map


def _names(folder: Path, config: ModelConfig, found: dict[str, Stored]) -> dict[str, list[str]]:
    """Our module -> the checkpoint's modules that are fused into it."""
    if gguf_file.is_gguf(folder):
        return gguf_file.names(folder)
    names = WEIGHTS[config.model_type](config)
    stacked = any(name.endswith(".experts.0.gate_up_proj.weight") for name in found) and config.model_type not in WOVEN
    return names | STACKED if stacked else names


def _parts(name: str, rows: int, config: ModelConfig, names: dict[str, list[str]]) -> dict[str, int]:
    """The checkpoint's tensors that make up our parameter `name`, and how many of its `rows` each one fills."""
    module, kind = name.rsplit(".", 1)
    layer = module.split(".")[1] if module.startswith("layers.") else ""
    key = module.replace(f"layers.{layer}", "layers.{l}")
    if layer and int(layer) in config.dense:
        key = key.replace("feed_forward", "dense")
    if layer and int(layer) in config.linear:
        key = re.sub(r"\.attention\b", ".linear", key)
    if f"{key}.{kind}" in names:
        return {source.format(l=layer): rows for source in names[f"{key}.{kind}"]}
    templates = names[key]
    experts = range(config.experts if "{e}" in templates[0] else 1)
    sources = [source.format(l=layer, e=expert) for expert in experts for source in templates]
    shares = [1] * len(sources)
    if key.endswith("wqkv") and len(sources) == 3:
        shares = [(2 if config.attention_gate else 1) * config.n_heads, config.n_kv_heads, config.n_kv_heads]
    if key.endswith("wqkvz") and len(sources) == 2:
        shares = [config.delta.channels, config.delta.value_heads * config.delta.value_dim]
    return {f"{source}.{kind}": rows * share // sum(shares) for source, share in zip(sources, shares, strict=True)}


def _check(folder: Path, model: Transformer, found: dict[str, Stored]) -> None:
    """UserError unless the tensors found are those that the model consists of. A tied one goes by either name."""
    config, wanted = model.config, {}
    names = _names(folder, config, found)
    (embed,), (head,) = (_parts(f"{name}.weight", 1, config, names) for name in ("embed", "head"))
    if config.tie_embeddings and head in found and embed not in found:
        found[embed] = found.pop(head)
    for name, parameter in model.named_parameters():
        for source, rows in _parts(name, len(parameter), config, names).items():
            wanted[source] = [rows, *parameter.shape[1:]]
    ignored = (*IGNORED, head) if config.tie_embeddings else IGNORED
    wrong = [name for name in wanted if name in found and found[name].shape != wanted[name]]
    problems = {
        "missing": [name for name in wanted if name not in found],
        "not known": [
            name for name in found if not (name in wanted or name.endswith(ignored) or quantized.is_filler(name, found))
        ],
        "of another shape": [f"{name} {found[name].shape} instead of {wanted[name]}" for name in wrong],
    }
    if texts := [f"{len(names)} {problem}: {_some(names)}" for problem, names in problems.items() if names]:
        raise UserError(f"the weights in {place(folder)} do not fit its config.json; tensors {'; '.join(texts)}")
    if config.tie_embeddings and head in found and not torch.equal(found[head].read(), found[embed].read()):
        raise UserError(
            f"{place(folder)}: config.json says tie_word_embeddings, but {head} differs from {embed}; "
            "to use both, set it to false there"
        )


def parts_of_head(name: str, config: ModelConfig) -> tuple[int, list[int]] | None:
    """Of a tensor that holds the rows of one head after the other's: how many heads, and their rows of each part."""
    if not name.endswith((*INTERLEAVED, *(GATED if config.attention_gate else ()))):
        return None
    if name.endswith(GATED):
        return config.n_heads, [config.head_dim, config.head_dim]
    if ".query_key_value." in name:
        group = config.n_heads // config.n_kv_heads
        return config.n_kv_heads, [config.head_dim * heads for heads in (group, 1, 1)]
    d = config.delta
    served = d.value_heads // d.key_heads
    values = served * d.value_dim
    return d.key_heads, [d.key_dim, d.key_dim, values, values] if ".in_proj_qkvz." in name else [served, served]


def by_head(part: Tensor, heads: int, sizes: list[int]) -> list[Tensor]:
    """Views of our rows of each part: [heads, size, ...]."""
    return [own.unflatten(0, (heads, -1)) for own in part.split([heads * size for size in sizes])]


def put(tensor: Tensor, part: Tensor, name: str, config: ModelConfig) -> None:
    """Copy the rows of a tensor of the files to their places in `part`, casting them."""
    if form := parts_of_head(name, config):
        heads, sizes = form
        pieces = tensor.unflatten(0, (heads, -1)).split(sizes, dim=1)
        for view, piece in zip(by_head(part, heads, sizes), pieces, strict=True):
            view.copy_(piece)
    else:
        part.copy_(tensor)


def _codes(
    sources: list[Stored], rows: list[int], config: ModelConfig, device: torch.device, bits: int | None = None
) -> Codes:
    """The codes of a parameter that is made of these tensors, of so many rows each: those that are stored, or made ones
    of so many bits. One tensor at a time is in memory as numbers.
    """
    whole: Codes | None = None
    for number, source in enumerate(sources):
        if bits:
            codes = Codes.of(_read([source], rows[number : number + 1], config, torch.float32, device), bits)
        else:
            codes = source.codes()
        whole = whole or Codes(*(part.new_empty(sum(rows), part.shape[1], device=device) for part in codes))
        for part, tensor in zip(whole, codes, strict=True):
            own = part.split(rows)[number]
            own.copy_(tensor) if bits else put(tensor, own, source.name, config)  # `_read` has put them in our order
    return whole


def _copy(stored: Stored, part: Tensor, config: ModelConfig, own: Cut = WHOLE) -> None:
    """Read a tensor, or the part of it that is a rank's own, into `part`, casting it."""
    tensor = stored.read(own) if isinstance(stored, Stored) else own.of(stored.read())
    where = f"{place(stored.file)}: {cut(stored.name)}"
    if tensor.dtype not in DTYPES.values():
        raise UserError(f"{where} is {tensor.dtype}; only floating-point weights of 16, 32 and 64 bits are supported")
    put(tensor, part, stored.name, config)
    if not all(extreme.isfinite() for extreme in part.aminmax()):
        if all(extreme.isfinite() for extreme in tensor.aminmax()):
            raise UserError(f"{where} overflows {part.dtype}; use bfloat16 or float32")
        raise UserError(f"{where} holds NaN or infinite values")


def _stored(file: Path) -> list[Stored]:
    """What a file holds. UserError unless it is tensors by name, each once."""
    with accessing(file):
        if not file.is_file():
            raise UserError(f"{place(file)} is no regular file")
    if file.suffix != ".safetensors":
        mapped = _mapped(file)
        tensors = _unpickle(file).items()
        return [Stored(file, name, list(tensor.shape), None if mapped else tensor) for name, tensor in tensors]
    with _reading(file):
        with safe_open(file, "pt") as tensors:
            stored = [Stored(file, name, tensors.get_slice(name).get_shape()) for name in tensors.offset_keys()]
        with open(file, "rb") as data:  # of a name that stands there twice, the library has the last
            names = json.loads(data.read(int.from_bytes(data.read(8), "little")), object_pairs_hook=list)
    if repeated := [name for name, count in Counter(name for name, _ in names).items() if count > 1]:
        raise UserError(f"{place(file)} cannot be read: it holds {shown(repeated[0])} more than once")
    return stored


def _mapped(file: Path) -> bool:
    """Whether a pickle's tensors can be mapped: torch writes zip files since 1.6."""
    with accessing(file), open(file, "rb") as data:
        return data.read(4) == b"PK\3\4"


def _unpickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a *.bin file. UserError unless it is those and nothing else; no code in it ever runs."""
    mapped = _mapped(file)
    with _reading(file), warnings.catch_warnings(action="ignore"):
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    if not isinstance(found, dict):
        raise UserError(f"{place(file)} cannot be read: it holds no tensors by name but {shown(type(found))}")
    for name, tensor in found.items():
        where = f"{place(file)} cannot be read: {shown(name)}"
        if not isinstance(name, str):
            raise UserError(f"{where} is no name of a tensor")
        if type(tensor) not in (Tensor, nn.Parameter):
            raise UserError(f"{where} is no tensor but {shown(type(tensor))}; save the model's state_dict and no more")
        plain = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized
        if not plain or tensor.device.type != "cpu":
            raise UserError(f"{where} is sparse, nested, quantized or without values; save it as a plain tensor")
    return {name: tensor.detach() for name, tensor in found.items()}


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turns whatever a library raises while it reads `file` into a UserError that names the file."""
    try:
        yield
    except Exception as error:  # safetensors' and torch's calls only; they raise what their parsers do
        refused = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
        text = f"weights-only loading refuses it: {cut(refused[1])}" if refused else reason(error)
        raise UserError(f"{place(file)} cannot be read: {text}") from error


def find_device(name: str | torch.device) -> torch.device:
    known = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        known += [kind, *(f"{kind}:{i}" for i in range(torch.accelerator.device_count()))]
    if str(name) not in known:
        raise UserError(f"device {shown(str(name))} is not available; there is {', '.join(known)}")
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams, events and captures are made on the current one
    return device


def _check_weights(weights: str) -> None:
    if weights not in WEIGHT_FORMATS:
        raise UserError(f"weights must be one of {', '.join(WEIGHT_FORMATS)}, not {shown(weights)}")


def _dtype(name: str | torch.dtype) -> torch.dtype | None:
    """None for "auto"."""
    if name != "auto" and name not in DTYPES and name not in DTYPES.values():
        raise UserError(f"dtype {shown(str(name))} is not supported; use auto, {', '.join(DTYPES)}")
    return None if name == "auto" else DTYPES.get(name, name)


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(map(cut, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="What is in a checkpoint, and what fits into memory with it.")
    parser.add_argument("path", help="a Hugging Face folder, a .gguf file or a hub id")
    parser.add_argument("--dtype", default="auto", help="of weights and cache (default: the config's)")
    parser.add_argument("--weights", choices=WEIGHT_FORMATS, default="auto", help="as for generate.py")
    parser.add_argument("--tokens", type=int, default=4096, help="length of a sequence (default 4096)")
    parser.add_argument("--memory", type=float, default=24, help="in GiB (default 24)")
    parser.add_argument("--budget", type=float, default=0.2, help="share that a squeezed cache keeps (default 0.2)")
    parser.add_argument("--ranks", type=positive, default=1, help="devices that share the model; each holds a part")

    def call() -> int:
        arguments = parser.parse_args(argv)
        if arguments.tokens < 1 or not 0 < arguments.budget <= 1 or not 0 < arguments.memory < float("inf"):
            raise UserError("tokens must be at least 1, memory positive, and budget in (0, 1]")
        print(report(**vars(arguments)))
        return 0

    return guarded("checkpoint.py", call)


if __name__ == "__main__":
    sys.exit(main())
