"""config.json against transformers' classes: what is left out, what is given, and every value that cannot be.

The oracle reads a `transformers` config as that family's modeling code does, and asks its rotary embedding for the
frequencies (`meaning`); ours are those of `ModelConfig` (`our_meaning`).
"""

import itertools
import json
import logging
import math
import sys
from collections import Counter
from typing import Any

import families
import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from config import ACTIVATIONS, FAMILIES, FIELDS, MIXERS, ONLY, Delta, ModelConfig
from errors import UserError
from model import rotary_frequencies
from tokenizer import eos_ids

# Own names of fields too; what only its own family reads says nothing in the others, and must not.
NAMES = sorted(
    {own for family in FAMILIES.values() for names in family.names.values() for own in names}
    | {name for family in FAMILIES.values() for name in family.defaults}
    | {*ONLY, "torch_dtype", "quantization_config", "word_embed_proj_dim", "model_type"}
)
ROPE_NAMES = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "low_freq_factor")
ROPE_NAMES += ("high_freq_factor", "short_factor", "long_factor", "attention_factor")
ROPE_NAMES += ("original_max_position_embeddings", "full_attention", "sliding_attention", "unknown")
YARN_NAMES = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "llama_4_scaling_beta")


# What a family needs that its class has otherwise: layers of attention alone.
LEAST = {"granitemoehybrid": {"layer_types": ["full_attention"] * 32, "num_local_experts": 0}}


class Nothing(Exception):
    """What transformers does not read either."""


def their_config(raw: dict[str, Any]):
    """What AutoConfig.from_pretrained makes of a config.json: the class's from_dict of it."""
    config = AutoConfig.for_model(**json.loads(json.dumps(raw)))
    if not hasattr(config, "text_config"):
        return config
    text = config.text_config
    text.tie_word_embeddings, text.dtype = config.tie_word_embeddings, config.dtype or text.dtype
    return text


def modeling(config):
    return sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__module__]


def their_rotary(config) -> dict[str, Any]:
    """Kind of layer -> inverse frequencies and scale of its rotary embedding, for a short and a long request."""
    module = modeling(config)
    head_dim = getattr(config, "head_dim", 2)
    head_dim = 2 if head_dim is None and config.model_type == "mixtral" else head_dim
    if head_dim not in range(2, 1 << 16):  # frequencies that fill the memory
        raise Nothing
    if config.model_type == "gpt_neox" and hasattr(config, "head_dim"):  # its frequencies read it, its attention not
        raise Nothing
    names = [name for name in vars(module) if name.endswith("RotaryEmbedding") and "Vision" not in name]
    rotary = getattr(module, names[0])(config)
    kinds = sorted(set(config.layer_types)) if config.model_type in ("gemma3_text", "olmo3") else [None]
    for kind in kinds:
        given = config.rope_parameters if kind is None else config.rope_parameters[kind]
        if not 0 < given.get("partial_rotary_factor", 1) <= 1:  # as above
            raise Nothing
    found = {}
    for kind in kinds:
        for length in (8, 200):
            where = {} if kind is None else {"layer_type": kind}
            rotary(torch.zeros(1, 1, 2), torch.arange(length)[None], **where)
            prefix = "" if kind is None else f"{kind}_"
            scale = getattr(rotary, f"{prefix}attention_scaling")
            found[kind, length] = (getattr(rotary, f"{prefix}inv_freq").double(), float(scale))
    return found


def their_windows(c) -> list[int | None]:
    if c.model_type in ("mistral", "ministral3", "mixtral", "phi3", "qwen3_moe"):
        return [c.sliding_window] * c.num_hidden_layers
    if c.model_type not in ("qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text", "olmo3", "gpt_oss"):
        return [None] * c.num_hidden_layers
    if "sliding_attention" in c.layer_types and c.sliding_window is None:
        raise Nothing
    return [c.sliding_window if each == "sliding_attention" else None for each in c.layer_types]


def their_unturned(c) -> list[int]:
    layers = range(c.num_hidden_layers)
    if c.model_type == "granitemoehybrid":
        return list(layers) if c.position_embedding_type != "rope" else []
    return [layer for layer in layers if c.model_type == "smollm3" and not c.no_rope_layers[layer]]


def their_query_scaling(c) -> tuple[float, int] | None:
    if c.model_type != "ministral3":
        return None
    growth, length = (
        c.rope_parameters.get(f"{n}") for n in ("llama_4_scaling_beta", "original_max_position_embeddings")
    )
    if growth is None or length is None:  # its modeling code fails
        raise Nothing
    return (growth, length) if growth else None


def meaning(config) -> dict[str, Any]:
    """What transformers' modeling code reads from a config, in our terms."""
    c, kind = config, config.model_type
    heads = c.num_attention_heads
    derived = c.hidden_size // heads
    head_dim = derived if kind in ("gpt_neox", "falcon", "opt") else getattr(c, "head_dim", derived)
    head_dim = head_dim or derived if kind == "mixtral" else head_dim
    kv_heads = heads if kind in ("gpt_neox", "opt") else c.num_kv_heads if kind == "falcon" else c.num_key_value_heads
    if kind == "falcon" and c.multi_query and not c.new_decoder_architecture:
        kv_heads = 1
    activation = {"falcon": "activation", "opt": "activation_function"}.get(kind, "hidden_act")
    activation = "hidden_activation" if kind in ("gemma2", "gemma3_text") else activation
    eps = {"gpt_neox": "layer_norm_eps", "falcon": "layer_norm_epsilon"}.get(kind, "rms_norm_eps")
    bias = {"falcon": "bias", "opt": "enable_bias"}.get(kind, "attention_bias")
    without = kind in ("mistral", "ministral3", "mixtral", "phi3", "qwen2")
    ffn_bias = getattr(c, {"falcon": "bias", "opt": "enable_bias"}.get(kind, "mlp_bias"), False)
    if kind in MIXTURES and getattr(c, "num_local_experts", 0) is None:
        raise Nothing
    gemma, granite = kind in ("gemma2", "gemma3_text"), kind.startswith("granite")
    per_head = getattr(c, "query_pre_attn_scalar", 0)
    found = dict(
        model_type=kind,
        vocab_size=c.vocab_size,
        dim=c.hidden_size,
        n_layers=c.num_hidden_layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=c.max_position_embeddings,
        activation="quick_gelu" if kind == "gpt_oss" else getattr(c, activation),
        tie_embeddings=c.tie_word_embeddings,
        norm_eps=1e-5 if kind == "opt" else getattr(c, eps),
        qkv_bias=kind == "qwen2" or not without and bool(getattr(c, bias)),
        output_bias=not without and bool(getattr(c, "attention_out_bias" if kind == "seed_oss" else bias)),
        ffn_bias=bool(ffn_bias) if kind in FFN_BIAS else kind in BIASED,
        windows=their_windows(c),
        embed_scale=c.hidden_size**0.5 if kind.startswith("gemma") else c.embedding_multiplier if granite else None,
        attention_scale=c.attention_multiplier if granite else (per_head if gemma else head_dim) ** -0.5,
        residual_scale=c.residual_multiplier if granite else 1.0,
        logit_divisor=c.logits_scaling if granite else 1.0,
        logit_softcap=c.final_logit_softcapping if gemma else None,
        attention_softcap=c.attn_logit_softcapping if gemma else None,
        unturned=their_unturned(c),
        query_scaling=their_query_scaling(c),
        feed=[feed_forward(c, layer) for layer in range(c.num_hidden_layers)],
        experts_per_token=c.num_experts_per_tok if kind in MIXTURES else 0,
        router_norm=c.norm_topk_prob if kind in ("qwen3_moe", "olmoe", "qwen3_next") else True,
        shared_dim=c.shared_expert_intermediate_size if kind in ("qwen3_next", "qwen3_5_moe_text") else None,
        attention_gate=kind in LINEAR,
        mixers=c.layer_types if kind in LINEAR else ["full_attention"] * c.num_hidden_layers,
        delta=delta(c) if kind in LINEAR and "linear_attention" in c.layer_types else None,
        dtype=c.dtype or torch.float32,
    )
    found |= dict.fromkeys(("attention_sinks", "router_bias"), kind == "gpt_oss")
    found["activation_limit"] = c.swiglu_limit if kind == "gpt_oss" else None
    if kind != "opt":
        found["rotary"] = their_rotary(c)
    return found | their_layout(c)


def their_layout(c) -> dict[str, bool]:
    if c.model_type == "gpt_neox":
        return {"parallel": c.use_parallel_residual}
    if c.model_type != "falcon":
        return {}
    parallel = bool(c.new_decoder_architecture or c.parallel_attn)
    norms = c.num_ln_in_parallel_attn or (2 if c.new_decoder_architecture else 1)
    return {"parallel": parallel, "shared_norm": parallel and norms == 1}


BIASED = ("gpt_neox", "gpt_oss")  # the feed-forward part always
FFN_BIAS = ("llama", "seed_oss", "smollm3", "granite", "falcon", "opt")  # where the config says so
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "olmoe", "qwen3_next", "qwen3_5_moe_text")
LINEAR = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")  # with layers of linear attention


def feed_forward(c, layer: int) -> tuple[int, int]:
    """How many experts a layer has, and the columns of each, or of the one feed-forward part."""
    if c.model_type == "qwen3_5_moe_text":
        return c.num_experts, c.moe_intermediate_size
    if c.model_type not in ("qwen3_moe", "qwen3_next"):
        columns = {"falcon": "ffn_hidden_size", "opt": "ffn_dim", "granitemoehybrid": "shared_intermediate_size"}
        columns = columns.get(c.model_type, "intermediate_size")
        return c.num_local_experts if c.model_type in MIXTURES else 0, getattr(c, columns)
    if layer in c.mlp_only_layers or (layer + 1) % c.decoder_sparse_step:
        return 0, c.intermediate_size
    return c.num_experts, c.moe_intermediate_size


def delta(c) -> Delta:
    """The sizes of its layers of linear attention."""
    if {*c.layer_types} - {*MIXERS} or c.linear_num_value_heads % c.linear_num_key_heads:
        raise Nothing
    heads = c.linear_num_key_heads, c.linear_num_value_heads
    return Delta(*heads, c.linear_key_head_dim, c.linear_value_head_dim, c.linear_conv_kernel_dim)


def our_meaning(config: ModelConfig) -> dict[str, Any]:
    found = vars(config).copy()
    found["windows"] = [config.window(layer) for layer in range(config.n_layers)]
    found["attention_scale"] = config.attention_scale or config.head_dim**-0.5
    found["unturned"] = list(config.unturned)
    found["mixers"] = [MIXERS[layer in config.linear] for layer in range(config.n_layers)]
    found["feed"] = [config.feed(layer) for layer in range(config.n_layers)]
    return found


def differences(ours: ModelConfig, theirs) -> list[str]:
    """What the two configs do not mean alike."""
    wanted, got = meaning(theirs), our_meaning(ours)
    rotary = wanted.pop("rotary", {})
    wrong = [f"{name}: {got[name]!r} instead of {value!r}" for name, value in wanted.items() if got[name] != value]
    for (kind, length), (expected, scale) in rotary.items():
        rope = ours.local_rope if kind == "sliding_attention" else ours.rope
        own = rotary_frequencies(ours, rope, length, torch.float32).double()
        if own.shape != expected.shape or not torch.allclose(own, expected, rtol=1e-5, atol=0):
            wrong.append(f"rotary {kind} {length}: {own[:3].tolist()} instead of {expected[:3].tolist()}")
        if not math.isclose(rope.get("attention_factor", 1.0), scale, rel_tol=1e-6):
            wrong.append(f"scale of rotary: {rope} instead of {scale}")
    return wrong


def compared(raw: dict[str, Any]) -> tuple[str, list[str]]:
    """What became of a config.json, and what is wrong with that.

    "line"; "same" as transformers reads it; or "alone", a config of a value that transformers refuses.
    """
    try:
        ours = ModelConfig.from_hf(raw)
    except UserError as error:
        line = str(error)
        return "line", [] if len(line) < 300 and line.isprintable() else [f"no line: {line!r}"]
    wrong = senseless(ours)
    try:  # what transformers' own classes raise is of any kind, and then there is nothing to compare with
        theirs = their_config(raw)
        meaning(theirs)
    except Exception:
        return "alone", wrong
    return "same", wrong + differences(ours, theirs)


def senseless(config: ModelConfig) -> list[str]:
    wrong = []
    for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "max_positions"):
        if type(value := getattr(config, name)) is not int or not 0 < value < 2**31:
            wrong.append(f"{name} is {value!r}")
    for name in (
        "tie_embeddings",
        "parallel",
        "shared_norm",
        "qkv_bias",
        "output_bias",
        "ffn_bias",
        "ffn_gate",
        "router_norm",
    ):
        if type(value := getattr(config, name)) is not bool:
            wrong.append(f"{name} is {value!r}")
    ropes = [rope for rope in (config.rope, config.local_rope) if rope]
    numbers = [config.norm_eps, config.residual_scale, config.logit_divisor]
    numbers += [float(rope.get("original_max_position_embeddings", 1)) for rope in ropes]
    numbers += [rope[name] for rope in ropes for name in rope if FIELDS[name].read is float]
    numbers += [value for rope in ropes for each in rope.values() if isinstance(each, list) for value in each]
    optional = (config.embed_scale, config.attention_scale, config.logit_softcap, config.attention_softcap)
    optional += (config.activation_limit,)
    numbers += [value for value in optional if value is not None]
    if not all(type(value) is float and 0 < value < 1e31 for value in numbers):
        wrong.append(f"numbers {numbers}")
    if config.activation not in ACTIVATIONS or not isinstance(config.dtype, torch.dtype):
        wrong.append(f"{config.activation} {config.dtype}")
    if config.experts_per_token > config.experts or config.n_heads % config.n_kv_heads:
        wrong.append("experts or heads")
    if config.windowed and (type(config.sliding_window) is not int or config.sliding_window < 1):
        wrong.append(f"window {config.sliding_window!r}")
    if any(not 0 <= layer < config.n_layers for layer in (*config.windowed, *config.unturned)):
        wrong.append("layers beyond the last")
    if (
        config.position_offset is None
        and not rotary_frequencies(config, config.rope, 100, torch.float32).isfinite().all()
    ):
        wrong.append(f"frequencies of {config.rope}")
    return wrong


def full(name: str) -> dict[str, Any]:
    """config.json of a family as its class writes it by default, all fields in it."""
    config = AutoConfig.for_model(name, **LEAST.get(name, {}))
    return json.loads(json.dumps(config.to_dict(), default=str))


@pytest.fixture(autouse=True)
def silence():
    """transformers logs each config that it refuses, whole."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


each_family = pytest.mark.parametrize("family", FAMILIES)


@each_family
def test_nothing_given(family: str, tmp_path):
    """An empty config.json, and one that names every default, are transformers' class."""
    empty = {"model_type": family} | LEAST.get(family, {})
    assert compared(empty) == ("same", [])
    (tmp_path / "config.json").write_text(json.dumps(empty))
    assert not differences(ModelConfig.from_hf(empty), AutoConfig.from_pretrained(tmp_path))
    assert ModelConfig.from_hf(empty) == ModelConfig.from_hf(full(family))


@each_family
def test_each_field_left_out(family: str):
    """One field less, of the class's own config.json and of every small one: as transformers reads it."""
    small = [case.config for case in families.CASES if case.config["model_type"] == family]
    for raw in (full(family), *small):
        for name in raw.keys() - {"model_type"}:
            kind, wrong = compared({key: value for key, value in raw.items() if key != name})
            assert not wrong, f"without {name}: {wrong}"
            # The sizes of small ones need each other.
            assert kind == "same" or raw in small or name in LEAST.get(family, {}), f"without {name}"


ODD: list[Any] = [None, True, False, 0, 1, 2, 3, -1, 7, 48, 10**19, 10**399, 2**31, 10**12, 0.0, -0.5, 0.5, 1.5, 1e-40]
ODD += [1e40, 4.0, float("inf"), float("nan"), "", "2", "false", "gelu", "relu", "bfloat16", "default", "x\n\x1b[2J"]
ODD += ["y" * 5000, [], [1], [None], ["full_attention", "sliding_attention"], [0, 1], [True, False], [1.0, 1.1, 1.3]]
ODD += [[[]], {}, {"a": 1}, {"rope_type": "linear", "factor": 2.0}, {"full_attention": {"rope_theta": 5.0}}]
ODD += [{"type": "linear", "factor": 3}, {"full_attention": None}, {"rope_type": ["linear"]}, {"rope_type": None}]
ODD_SHORT = (None, True, 0, 2, -1, 10**19, 0.5, float("nan"), "2", "bfloat16", [1], {})
ROPES = [families.LINEAR, families.DYNAMIC, families.LLAMA3, families.LONGROPE, families.YARN]


def grid(family: str, values) -> list[tuple[str, Any, dict[str, Any]]]:
    """(field, value, config.json) for all fields, and all fields of rotary parameters of each type."""
    case = next(case for case in families.CASES if case.config["model_type"] == family)
    found = [(name, value, case.config | {name: value}) for name in NAMES for value in values]
    for rope in [{}, *ROPES]:
        for name in ROPE_NAMES + (YARN_NAMES if rope is families.YARN else ()):
            for number, value in enumerate(values):
                places = ("rope_parameters", "rope_scaling")
                for place in (places[number % 2],) if values is ODD_SHORT else places:
                    changed = {"rope_theta": 50.0} | rope | {name: value}
                    if family in ("gemma3_text", "olmo3") and place == "rope_parameters":
                        changed = {"full_attention": changed, "sliding_attention": changed}
                    found.append((f"{place}.{name}", value, case.config | {place: changed}))
    return found


@pytest.mark.parametrize(
    ("family", "values"),
    [pytest.param(family, ODD_SHORT, id=f"{family}-few") for family in ("falcon", "gemma3_text")]
    + [pytest.param(family, ODD, id=family, marks=pytest.mark.slow) for family in FAMILIES],
)
def test_odd_values(family: str, values, record_property):
    """Whatever stands in a field: one line, or what transformers reads, and nothing senseless."""
    outcomes, faults = Counter(), []
    for name, value, raw in grid(family, values):
        outcome, wrong = compared(raw)
        outcomes[outcome] += 1
        faults += [f"{name} {value!r:.60}: {wrong}"] if wrong else []
    record_property("outcomes", dict(outcomes))
    print(family, dict(outcomes))
    assert not faults, "\n".join(faults[:30]) + f"\n{len(faults)} in all"
    assert min(outcomes["line"], outcomes["same"]) > 50


def test_yarn_over_a_grid():
    """Frequencies and scale of every branch: lengths, bounds, mscale pairs, a given scale, part of a head."""
    names = ("factor", "original_max_position_embeddings", "beta_fast", "truncate", "mscale", "attention_factor")
    values = [(None, 0.5, 1.0, 4, 40.0), (None, 7, 32768), (None, 8, 32), (None, False), (None, 0.7), (None, 1.3)]
    seen = set()
    for number, chosen in enumerate(list(itertools.product(*values))[::7]):
        given = {name: value for name, value in zip(names, chosen, strict=True) if value is not None}
        given |= {"rope_type": "yarn", "rope_theta": (10.0, 1e4, 1e6)[number % 3], "factor": chosen[0]}
        given |= {"mscale_all_dim": (0, 1.0, 0.4)[number % 5]} if number % 5 < 3 else {}
        given |= {"beta_slow": 2.0} if number % 2 else {}
        for family, partial in (("qwen3", 1.0), ("gpt_neox", 0.25)):
            raw = {"model_type": family, "max_position_embeddings": 2048, "hidden_size": 256, "num_key_value_heads": 4}
            raw |= {"num_attention_heads": 4, "rope_scaling": given | {"partial_rotary_factor": partial}}
            raw |= {"head_dim": 64} if family == "qwen3" else {}
            ours, theirs = ModelConfig.from_hf(raw), their_config(raw)
            assert not differences(ours, theirs), given
            seen.add(tuple(rotary_frequencies(ours, ours.rope, 1, torch.float32)[2:].tolist()))
    assert len(seen) > 40


def test_every_field_has_a_kind():
    assert {name for family in FAMILIES.values() for name in family.defaults} <= FIELDS.keys()


UNSUPPORTED = {  # a family of transformers -> what its line names, a field that the nearest supported one reads
    "deepseek_v3": ("kv_lora_rank", "num_experts_per_tok"),
    "jamba": ("mamba_d_state", "num_experts_per_tok"),
    "qwen2_moe": ("qkv_bias", "num_experts_per_tok"),
    "llama4": ("attention_chunk_size", "no_rope_layers"),  # its text_config's
    "bamba": ("mamba_n_heads", "num_key_value_heads"),
    "olmo": ("its fields are known", "rms_norm_eps"),
    "mamba2": ("state_size", None),
    "t5": ("d_model", None),
}


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_unsupported_family(family: str):
    """What is missing, and which family is nearest, if any is."""
    missing, shared = UNSUPPORTED[family]
    with pytest.raises(UserError) as caught:
        ModelConfig.from_hf(full(family))
    line = str(caught.value)
    assert line.startswith(f"model_type {family!r} is not supported: ") and missing in line and len(line) < 300
    nearest = line.rpartition("the nearest supported one is ")[2] if shared else None
    assert line.endswith("none is like it") if nearest is None else shared in FAMILIES[nearest].defaults


@pytest.mark.parametrize("raw", [{}, {"model_type": 3}, {"model_type": "x", "y": 1}, {"model_type": "x", "z" * 999: 1}])
def test_nothing_known_of_a_family(raw):
    with pytest.raises(UserError, match="is not supported; supported: llama, .*, opt$"):
        ModelConfig.from_hf(raw)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_end_of_sequence_ids(file: str, tmp_path):
    """An id, a list of ids or none; all else is one line that names the file."""
    for value, wanted in ((2, {2}), ([0, 7], {0, 7}), ([], set()), (None, set()), (2**31 - 1, {2**31 - 1})):
        (tmp_path / file).write_text(json.dumps({"eos_token_id": value}))
        assert eos_ids(tmp_path) == wanted
    (tmp_path / file).write_text('{"text_config": {"eos_token_id": 5}}')
    assert eos_ids(tmp_path) == {5}
    for value in (True, False, -1, 2**31, 10**19, 10**399, 1.0, "2", "x" * 999, {}, [True], [2, -1], [None], [[2]]):
        (tmp_path / file).write_text(json.dumps({"eos_token_id": value}))
        with pytest.raises(UserError, match=f"{file}: eos_token_id must be an integer from 0") as caught:
            eos_ids(tmp_path)
        assert len(str(caught.value)) < 300
