"""What a step must do at least, and what the machine could do at most."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from config import ModelConfig, parameters
from formats import slot_bytes
from machine import copy_rate, matmul_rate
from model import Transformer


def step_seconds(model: Transformer, batch: int, slots: float, slot: float | None = None) -> float:
    """What a decode step takes at least, with `slots` filled slots of all layers together in each row.

    slot: bytes of one; None: of one that holds numbers of the model's dtype.
    """
    config, device = model.config, model.device.type
    attention = 4 * batch * slots * config.n_heads * config.head_dim
    operations = 2 * batch * matrix_elements(config) + attention
    least = step_bytes(model, batch, slots, slot) / copy_rate(device)
    return max(least, operations / matmul_rate(device, config.dtype))


def step_bytes(model: Transformer, batch: int, slots: float, slot: float | None = None) -> float:
    """Bytes that a decode step reads: the weights once, as they are stored, and K and V of `slots` slots of each row.

    Not counted is what stays small: the new keys and values, the policy's scores, the activations.
    """
    config = model.config
    positions = [model.positions] if config.position_offset is not None else []
    idle = [*positions, *([] if tied(model) else [model.embed])]  # tables of which a token needs one row
    weights = stored_bytes(model) - idle_bytes(model, batch) - sum(map(stored_bytes, idle))
    rows = stored_bytes(model.embed) / config.vocab_size
    rows += sum(stored_bytes(table) / len(table.weight) for table in positions)
    slot = config.n_kv_heads * slot_bytes("dense", config.dtype, config.head_dim) if slot is None else slot
    return weights + batch * (rows + slots * slot)


def stored_bytes(module: nn.Module) -> int:
    """Of all its weights, a shared one once."""

    def size(tensor: Tensor) -> int:
        if not hasattr(tensor, "__tensor_flatten__"):
            return tensor.nbytes
        return sum(size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])  # torchao's: packed, scales

    return sum(map(size, _tensors(module).values()))


def _tensors(module: nn.Module) -> dict[int, Tensor]:
    return {id(tensor): tensor for tensor in module.state_dict(keep_vars=True).values()}


def tied(model: Transformer) -> bool:
    """Whether what is read as the head is the table of the embedding."""
    return bool(_tensors(model.embed).keys() & _tensors(model.head).keys())


def matrix_elements(config: ModelConfig) -> int:
    """Elements of the matrices that each token is multiplied with; the head's once, tied or not."""
    plain = dict(qkv_bias=False, output_bias=False, ffn_bias=False, qk_norm=None, pre_norms=0, post_norms=0)
    plain |= dict(router_bias=False, attention_sinks=False)
    matrices = replace(config, tie_embeddings=True, position_offset=None, **plain)
    norm = config.dim * (2 if config.norm == "layer" else 1)
    idle = idle_experts(config, 1) * (config.n_layers - len(config.dense)) * 3 * config.dim * config.ffn_dim
    return parameters(matrices) - norm - idle


def idle_experts(config: ModelConfig, batch: int) -> int:
    """Of each layer, the experts that `batch` tokens do not need, if each one chooses others."""
    return max(0, config.experts - batch * config.experts_per_token) if config.experts else 0


def idle_bytes(model: Transformer, batch: int) -> float:
    config, idle = model.config, idle_experts(model.config, batch)
    mixtures = [block.feed_forward for layer, block in enumerate(model.layers) if layer not in config.dense]
    return sum(stored_bytes(part.w13) + stored_bytes(part.w2) for part in mixtures) * idle / max(1, config.experts)


def valid_slots(plan: Sequence[int], prompt: int, new: int) -> float:
    """Filled slots of all layers together, the mean over the decode steps: the first token comes from the prompt."""
    steps = range(prompt + 1, prompt + max(new, 2))
    return sum(min(seen, slots) for seen in steps for slots in plan) / len(steps)


def prefill_operations(model: Transformer, batch: int, prompt: int) -> float:
    """Operations of a prompt: 2 per matrix element and token, causal attention, the head for the last token only."""
    config = model.config
    head = config.vocab_size * config.dim
    pairs = prompt * (prompt + 1) / 2 * config.n_layers * config.n_heads * config.head_dim
    return 2 * batch * (prompt * (matrix_elements(config) - head) + head) + 4 * batch * pairs
