"""What a step must do at least, and what the machine could do at most."""

from collections.abc import Sequence

from torch import Tensor

from machine import copy_rate, matmul_rate
from model import Transformer


def step_seconds(model: Transformer, batch: int, slots: float) -> float:
    """What a decode step takes at least, with `slots` filled slots of all layers together in each row."""
    config, device = model.config, model.device.type
    attention = 4 * batch * slots * config.n_heads * config.head_dim
    operations = 2 * batch * matrix_elements(model) + attention
    return max(step_bytes(model, batch, slots) / copy_rate(device), operations / matmul_rate(device, config.dtype))


def step_bytes(model: Transformer, batch: int, slots: float) -> float:
    """Bytes that a decode step reads: the weights once, and K and V of `slots` slots (of all layers) of each row.

    Not counted is what stays small: the new keys and values, the policy's scores, the activations.
    """
    config, tables = model.config, looked_up(model)
    elements = sum(p.numel() for p in model.parameters()) - sum(table.numel() for table in tables)
    elements -= idle_experts(model, batch)
    elements += batch * config.dim * max(1, len(tables))
    return config.dtype.itemsize * (elements + batch * slots * 2 * config.n_kv_heads * config.head_dim)


def matrix_elements(model: Transformer) -> int:
    """Elements of the matrices that each token is multiplied with; the head's once, tied or not."""
    tables = {id(table) for table in looked_up(model)}
    return sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in tables) - idle_experts(model, 1)


def looked_up(model: Transformer) -> list[Tensor]:
    """Tables of which a step reads one row per token."""
    tables = [] if model.config.tie_embeddings else [model.embed.weight]
    return tables + ([model.positions.weight] if model.config.position_offset is not None else [])


def idle_experts(model: Transformer, batch: int) -> int:
    """Elements of the experts that `batch` tokens do not need, if each one chooses others."""
    config = model.config
    idle = max(0, config.experts - batch * config.experts_per_token) if config.experts else 0
    return config.n_layers * idle * 3 * config.dim * config.ffn_dim


def valid_slots(plan: Sequence[int], prompt: int, new: int) -> float:
    """Filled slots of all layers together, the mean over the decode steps: the first token comes from the prompt."""
    steps = range(prompt + 1, prompt + max(new, 2))
    return sum(min(seen, slots) for seen in steps for slots in plan) / len(steps)


def prefill_operations(model: Transformer, batch: int, prompt: int) -> float:
    """Operations of a prompt: 2 per matrix element and token, causal attention, the head for the last token only."""
    config = model.config
    head = config.vocab_size * config.dim
    pairs = prompt * (prompt + 1) / 2 * config.n_layers * config.n_heads * config.head_dim
    return 2 * batch * (prompt * (matrix_elements(model) - head) + head) + 4 * batch * pairs
