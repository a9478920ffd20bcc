"""A Hugging Face folder, a hub id or a GGUF file in, a loaded `Transformer` out.

    model, config = load("Qwen/Qwen3-0.6B", device="cuda", dtype="bf16")

As a command it says what is in there, whether everything matches and what fits into memory, and loads no weights:

    python checkpoint.py Qwen/Qwen3-0.6B --tokens 8192 --memory 24 --budget 0.2

Which tensors of the files make up which of our parameters is said by one table per family (`WEIGHTS`; for GGUF files by
those of gguf_file.py). Files are
memory-mapped and read tensor by tensor into the parameter each belongs to, so that besides the model there is never
more than one tensor in memory. Nothing is guessed: every tensor is used, ignored by name, or an error.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

import gguf_file
from commandline import Parser, guarded
from config import ModelConfig
from errors import UserError
from files import read_json
from model import Transformer

# Our module -> the checkpoint's modules that are fused into it, in this order, weight and bias alike. {l} is the
# layer, {e} every expert in turn.
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
MIXTRAL = LLAMA | {
    "layers.{l}.feed_forward.router": ["model.layers.{l}.block_sparse_moe.gate"],
    "layers.{l}.feed_forward.w13": [
        "model.layers.{l}.block_sparse_moe.experts.{e}.w1",
        "model.layers.{l}.block_sparse_moe.experts.{e}.w3",
    ],
    "layers.{l}.feed_forward.w2": ["model.layers.{l}.block_sparse_moe.experts.{e}.w2"],
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
    "mixtral": lambda config: MIXTRAL,
    "qwen2": lambda config: LLAMA,
    "qwen3": lambda config: LLAMA,
    "smollm3": lambda config: LLAMA,
    "granite": lambda config: LLAMA,
    "phi3": lambda config: PHI3,
    "gemma2": lambda config: POST_NORMS,
    "gemma3_text": lambda config: POST_NORMS,
    "olmo2": lambda config: POST_NORMS,
    "gpt_neox": lambda config: NEOX,
    "falcon": lambda config: FALCON_TWO_NORMS if config.parallel and not config.shared_norm else FALCON,
    "opt": lambda config: OPT,
}
# Ends of tensors that hold, for each key-value head in turn, its query heads, its key and its value. Ours hold all
# query heads, then all keys, then all values.
INTERLEAVED = (".query_key_value.weight", ".query_key_value.bias")
PREFIXES = {"opt": ("decoder.", "model.decoder.")}  # some files were written without the outermost name
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

    def read(self) -> Tensor:
        """The file is mapped anew for each tensor, so that the pages read before are let go."""
        with _reading(self.file):
            if self.file.suffix == ".safetensors":
                with safe_open(self.file, "pt") as tensors:
                    return tensors.get_tensor(self.name)
            return _unpickle(self.file)[self.name]


def load(
    path: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype = "auto"
) -> tuple[Transformer, ModelConfig]:
    """The model in a folder, in a GGUF file or on the hub, ready to run, and its config; dtype "auto" is the one that
    config.json names, or that of a GGUF file's matrices, float32 where they are quantized.

    UserError, in one line that names the culprit, for whatever is missing, broken, unsupported or does not fit.
    """
    device = find_device(device)
    folder = resolve(path)
    model, found = _matched(folder, dtype)
    config = model.config
    names = _names(folder, config)
    size = sum(file.stat().st_size for file in {tensor.file for tensor in found.values()})
    slow = size >= SLOW_BYTES and sys.stderr.isatty()
    for name, empty in tqdm(list(model.named_parameters()), f"loading {folder.name}", leave=False, disable=not slow):
        parameter = torch.empty(empty.shape, dtype=config.dtype, device=device)
        parts = _parts(name, len(parameter), config, names)
        for source, part in zip(parts, parameter.split(list(parts.values())), strict=True):
            _copy(found[source], part, config)
        module, _, kind = name.rpartition(".")
        setattr(model.get_submodule(module), kind, nn.Parameter(parameter, requires_grad=False))
    return model.eval(), config


def skeleton(path: str | Path, dtype: str | torch.dtype = "auto") -> Transformer:
    """The model without its weights, on the meta device: what `load` would give, and the same UserErrors."""
    model, _ = _matched(resolve(path), dtype)
    return model.to(model.config.dtype)


def report(path: str | Path, dtype: str = "auto", tokens: int = 4096, memory: float = 24, budget: float = 0.2) -> str:
    """What is in a checkpoint, and how many sequences of `tokens` tokens fit into `memory` GiB beside its weights:
    with the full cache, and squeezed to the share `budget` of it. UserError if something does not match.
    """
    model, found = _matched(resolve(path), dtype)
    config = model.config
    count = sum(parameter.numel() for parameter in model.parameters())
    weights = count * config.dtype.itemsize
    token = 2 * config.n_kv_heads * config.head_dim * config.dtype.itemsize  # K and V in one layer
    caps = [min(tokens, config.window(layer) or tokens) for layer in range(config.n_layers)]
    full, squeezed = sum(caps) * token, min(sum(caps), int(budget * tokens) * config.n_layers) * token
    left = max(0, int(memory * 2**30) - weights)
    windows = f", {len(config.windowed)} of them with a window of {config.sliding_window}" if config.windowed else ""
    kind = str(config.dtype).removeprefix("torch.")
    lines = {
        "family": f"{config.model_type}, {config.n_layers} layers{windows}",
        "tensors": f"{len(found)} in {len({tensor.file for tensor in found.values()})} file(s), all match",
        "weights": f"{count:,} parameters, {weights / 2**30:.2f} GiB in {kind}",
        "cache": f"{token * config.n_layers:,} bytes per token; {tokens} tokens {full / 2**30:.3f} GiB full, "
        f"{squeezed / 2**30:.3f} GiB squeezed to {budget:.0%}",
        "fits": f"in {memory:g} GiB: {left // full:,} sequences of {tokens} tokens full, "
        f"{left // max(squeezed, 1):,} squeezed (activations not counted)",
    }
    return "\n".join(f"{name:8} {text}" for name, text in lines.items())


def to_hf(state_dict: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The same tensors under the checkpoint's names, fused ones split, to be written as model.safetensors."""
    tensors = {}
    for name, tensor in state_dict.items():
        parts = _parts(name, len(tensor), config, WEIGHTS[config.model_type](config))
        for source, part in zip(parts, tensor.split(list(parts.values())), strict=True):
            if source.endswith(INTERLEAVED):
                part = torch.cat(_by_kv_head(part, config), dim=1).flatten(0, 2)
            tensors[source] = part
    return tensors


def resolve(path_or_id: str | Path) -> Path:
    """A checkpoint's folder or GGUF file: `path_or_id` itself, or where the hub's files of that name were put."""
    folder = Path(os.path.expanduser(path_or_id))  # leaves alone what it cannot expand
    if not folder.exists() and HUB_ID.fullmatch(str(path_or_id)):
        folder = _download(str(path_or_id))
    if not folder.exists():
        raise UserError(f"checkpoint folder {path_or_id} does not exist")
    if gguf_file.is_gguf(folder):
        return folder
    if not folder.is_dir():
        raise UserError(
            f"checkpoint {path_or_id} is a file; give a .gguf file or the folder that holds config.json and the weights"
        )
    if not any(folder.iterdir()):
        raise UserError(f"checkpoint folder {path_or_id} is empty")
    if not (folder / "config.json").is_file():
        ggufs = sorted(file.name for file in folder.glob("*.gguf"))
        instead = f"; give one of its GGUF files, such as {folder / ggufs[0]}" if ggufs else ""
        raise UserError(f"checkpoint folder {path_or_id} holds no config.json{instead}")
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
            fetch(*(_listed(indexes[0]) if indexes else ["pytorch_model.bin"]))
        return folder
    except Exception as error:  # the client's own, its http library's, the operating system's
        raise UserError(f"{repo} is no folder here, and the hub did not give it: {_line(error)}") from error


class _Uninitialised(TorchFunctionMode):
    """What is made inside is not drawn at random. On meta that draws nothing, but PyTorch takes two seconds for it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def _matched(folder: Path, dtype: str | torch.dtype) -> tuple[Transformer, dict[str, Stored]]:
    """The model without its weights, and the tensors found for it: UserError unless they are what it consists of."""
    dtype = _dtype(dtype)
    config = _config(folder)
    config = replace(config, dtype=dtype or config.dtype)
    with torch.device("meta"), _Uninitialised():
        model = Transformer(config)
    short, whole = PREFIXES.get(config.model_type, ("", ""))
    if gguf_file.is_gguf(folder):
        stored = gguf_file.tensors(folder)
    else:
        stored = [tensor for file in _weight_files(folder) for tensor in _stored(file)]
    found = {re.sub(f"^{short}", whole, tensor.name): tensor for tensor in stored}
    _check(folder, model, found)
    return model, found


def _config(folder: Path) -> ModelConfig:
    raw = _json(folder / "config.json")
    try:
        return ModelConfig.from_hf(raw)
    except (AttributeError, TypeError) as error:  # a list where a number should be, and the like
        raise UserError(f"{folder / 'config.json'} is broken: {_line(error)}") from error


def _weight_files(folder: Path) -> list[Path]:
    for name in SINGLE:
        if (folder / name).exists():
            return [folder / name]
        if (index := folder / f"{name}.index.json").exists():
            files = [folder / shard for shard in _listed(index)]
            if missing := [file.name for file in files if not file.exists()]:
                raise UserError(f"{index} lists {_some(missing)}, missing in that folder")
            return files
    raise UserError(f"checkpoint folder {folder} holds no weights: no {' or '.join(SINGLE)}, whole or in shards")


def _listed(index: Path) -> list[str]:
    """The names of the files that an index of shards refers to."""
    weight_map = _json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{index} is broken: no weight_map from tensors to files")
    return sorted(set(weight_map.values()))


def _json(file: Path) -> dict:
    return gguf_file.read_json(file) if gguf_file.is_gguf(file.parent) else read_json(file)


def _names(folder: Path, config: ModelConfig) -> dict[str, list[str]]:
    """Our module -> the checkpoint's modules that are fused into it."""
    return gguf_file.names(folder) if gguf_file.is_gguf(folder) else WEIGHTS[config.model_type](config)


def _parts(name: str, rows: int, config: ModelConfig, names: dict[str, list[str]]) -> dict[str, int]:
    """The checkpoint's tensors that make up our parameter `name`, and how many of its `rows` each one fills."""
    module, kind = name.rsplit(".", 1)
    layer = module.split(".")[1] if module.startswith("layers.") else ""
    key = module.replace(f"layers.{layer}", "layers.{l}")
    templates = names[key]
    experts = range(config.experts if "{e}" in templates[0] else 1)
    sources = [source.format(l=layer, e=expert) for expert in experts for source in templates]
    shares = [1] * len(sources)
    if key.endswith("wqkv") and len(sources) == 3:
        shares = [config.n_heads, config.n_kv_heads, config.n_kv_heads]
    return {f"{source}.{kind}": rows * share // sum(shares) for source, share in zip(sources, shares, strict=True)}


def _check(folder: Path, model: Transformer, found: dict[str, Stored]) -> None:
    """UserError unless the tensors found are exactly those that the model consists of."""
    config, wanted = model.config, {}
    names = _names(folder, config)
    for name, parameter in model.named_parameters():
        for source, rows in _parts(name, len(parameter), config, names).items():
            wanted[source] = [rows, *parameter.shape[1:]]
    (embed,), (head,) = (_parts(f"{name}.weight", 1, config, names) for name in ("embed", "head"))
    ignored = (*IGNORED, head) if config.tie_embeddings else IGNORED
    wrong = [name for name in wanted if name in found and found[name].shape != wanted[name]]
    problems = {
        "missing": [name for name in wanted if name not in found],
        "not known": [name for name in found if name not in wanted and not name.endswith(ignored)],
        "of another shape": [f"{name} {found[name].shape} instead of {wanted[name]}" for name in wrong],
    }
    if texts := [f"{len(names)} {problem}: {_some(names)}" for problem, names in problems.items() if names]:
        raise UserError(f"the weights in {folder} do not fit its config.json; tensors {'; '.join(texts)}")
    if config.tie_embeddings and head in found and not torch.equal(found[head].read(), found[embed].read()):
        raise UserError(f"{folder}: config.json says tie_word_embeddings, but {head} differs from {embed}")


def _by_kv_head(wqkv: Tensor, config: ModelConfig) -> list[Tensor]:
    """Views of our queries, keys and values: [K, G or 1, D, ...] each."""
    sizes = [heads * config.head_dim for heads in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
    return [part.unflatten(0, (config.n_kv_heads, -1, config.head_dim)) for part in wqkv.split(sizes)]


def _copy(stored: Stored, part: Tensor, config: ModelConfig) -> None:
    """Read a tensor into `part`, casting it."""
    tensor = stored.read()
    if not tensor.is_floating_point():
        raise UserError(f"{stored.file}: {stored.name} is {tensor.dtype}; quantized checkpoints are not supported")
    if stored.name.endswith(INTERLEAVED):
        views = _by_kv_head(part, config)
        heads = tensor.unflatten(0, (config.n_kv_heads, -1, config.head_dim))
        for view, piece in zip(views, heads.split([view.shape[1] for view in views], dim=1), strict=True):
            view.copy_(piece)
    else:
        part.copy_(tensor)
    if not all(extreme.isfinite() for extreme in part.aminmax()):
        if all(extreme.isfinite() for extreme in tensor.aminmax()):
            raise UserError(f"{stored.file}: {stored.name} overflows {part.dtype}; use bfloat16 or float32")
        raise UserError(f"{stored.file}: {stored.name} holds NaN or infinite values")


def _stored(file: Path) -> list[Stored]:
    with _reading(file):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                return [Stored(file, name, tensors.get_slice(name).get_shape()) for name in tensors.offset_keys()]
        return [Stored(file, name, list(tensor.shape)) for name, tensor in _unpickle(file).items()]


def _unpickle(file: Path) -> dict[str, Tensor]:
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """One line that names `file`, whatever goes wrong while it is read."""
    try:
        yield
    except (OSError, RuntimeError, EOFError, ValueError, AttributeError, SafetensorError, UnpicklingError) as error:
        raise UserError(f"{file} cannot be read: {_line(error)}") from error


def find_device(name: str | torch.device) -> torch.device:
    known = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        known += [kind, *(f"{kind}:{i}" for i in range(torch.accelerator.device_count()))]
    if str(name) not in known:
        raise UserError(f"device {str(name)!r} is not available; there is {', '.join(known)}")
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams, events and captures are made on the current one
    return device


def _dtype(name: str | torch.dtype) -> torch.dtype | None:
    """None for "auto"."""
    if name != "auto" and name not in DTYPES and name not in DTYPES.values():
        raise UserError(f"dtype {str(name)!r} is not supported; use auto, {', '.join(DTYPES)}")
    return None if name == "auto" else DTYPES.get(name, name)


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _line(error: Exception) -> str:
    """The first line of what an error says, or its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="What is in a checkpoint, and what fits into memory with it.")
    parser.add_argument("path", help="a Hugging Face folder, a .gguf file or a hub id")
    parser.add_argument("--dtype", default="auto", help="of weights and cache (default: the config's)")
    parser.add_argument("--tokens", type=int, default=4096, help="length of a sequence (default 4096)")
    parser.add_argument("--memory", type=float, default=24, help="in GiB (default 24)")
    parser.add_argument("--budget", type=float, default=0.2, help="share that a squeezed cache keeps (default 0.2)")

    def call() -> int:
        arguments = parser.parse_args(argv)
        if arguments.tokens < 1 or not 0 < arguments.budget <= 1 or not 0 < arguments.memory < float("inf"):
            raise UserError("tokens must be at least 1, memory positive, and budget in (0, 1]")
        print(report(**vars(arguments)))
        return 0

    return guarded("checkpoint.py", call)


if __name__ == "__main__":
    sys.exit(main())
