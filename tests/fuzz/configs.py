"""config.json: fields x values x families. What is accepted has to be what transformers makes of it."""

import json
import random
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from families import BY_NAME
from transformers import AutoConfig, AutoModelForCausalLM

from .bases import copied, family
from .odd import Input, changed_json

NAMES = tuple(BY_NAME)
IDS = [1 + 7 * n % 100 for n in range(12)]
NEW = 4
OTHERS = """rope_scaling rope_theta torch_dtype quantization_config layer_types sliding_window activation hidden_act
activation_function hidden_activation bias enable_bias ffn_dim ffn_hidden_size num_kv_heads layer_norm_eps rms_norm_eps
layer_norm_epsilon rotary_emb_base rotary_pct partial_rotary_factor alibi clip_qkv do_layer_norm_before
word_embed_proj_dim use_bidirectional_attention""".split()


def plain(name: str, folder: Path) -> Input:
    copied(family(folder, name), folder)
    ids = ",".join(map(str, IDS))
    return Input("generate.py", f"--checkpoint model --prompt-ids {ids} --max-new-tokens {NEW} --json".split(), 101)


def mutate(rng: random.Random, name: str, given: Input, folder: Path, done: Path) -> Input:
    file = folder / "model" / "config.json"
    data, about = changed_json(rng, json.loads(file.read_text()), fields(name))
    file.write_bytes(data)
    return replace(given, about=f"{name}: {about}")


@cache
def fields(name: str) -> list[str]:
    """What transformers' class of the family has, and what other names there are for it."""
    known = AutoConfig.for_model(BY_NAME[name].config["model_type"]).to_dict()
    return sorted({*known, *OTHERS} - UNREAD)


UNUSED = set(  # in inference, of whatever type
    """bos_token_id pad_token_id attention_dropout hidden_dropout attention_probs_dropout_prob embd_pdrop resid_pdrop
    layerdrop dropout classifier_dropout initializer_range init_std use_cache output_router_logits
    router_aux_loss_coef router_jitter_noise""".split()
)
UNREAD = set(  # of every class and of no effect on a model
    """architectures transformers_version id2label label2id problem_type chunk_size_feed_forward output_attentions
    output_hidden_states return_dict is_encoder_decoder use_cache initializer_range _name_or_path""".split()
)


def doubt(folder: Path, answer: dict | None, same: bool) -> str | None:
    """What is wrong with an answer: transformers refuses the folder, or gives other tokens."""
    if answer is None or answer.get("dtype") != "float32" or answer.get("finish_reason") == "error":
        return None
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder / "model", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
        ids = list(IDS)
        with torch.inference_mode():
            for _ in range(NEW):
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    except Exception as error:  # transformers' own, of any kind
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        field = re.search(r"field '(\w+)'", text)
        strict = "expected float, got int" in text or "Padding_idx" in text or field is not None and field[1] in UNUSED
        return None if same or strict else f"transformers refuses it: {text}"
    theirs = ids[len(IDS) :][: len(answer["tokens"])]
    return None if theirs == answer["tokens"] else f"transformers gives {theirs}, not {answer['tokens']}"
