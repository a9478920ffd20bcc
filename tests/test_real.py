"""On a real model: what a cache of 8 bits costs. The files of scripts/get_model.py have to be there."""

import get_model
import pytest
import torch
from test_engine import teacher_forced

import checkpoint
import tokenizer
from engine import Engine
from policies.tokens import TOKEN_POLICIES

CONTEXT, READ = 1024, 32


@pytest.fixture(scope="module")
def smollm2():
    """The model, and tokens of an article."""
    folder = checkpoint.resolve(str(get_model.get("smollm2")))
    ids = tokenizer.load(folder).encode((get_model.FOLDER.parents[1] / "scripts" / "article.txt").read_text("utf-8"))
    assert len(ids) >= CONTEXT + READ
    return checkpoint.load(folder, dtype="float32")[0], ids


@pytest.mark.real
@pytest.mark.parametrize("policy", TOKEN_POLICIES)
def test_8_bits_change_little(smollm2, policy):
    """KL to the dense cache of the same unequal plan, in the mean over what follows an article, in nats."""
    model, ids = smollm2
    plan = None if policy == "full" else [200 + 10 * (layer % 5) for layer in range(model.config.n_layers)]
    dense, small = (
        teacher_forced(
            Engine(model, policy, plan=plan, cache_format=form), ids[:CONTEXT], ids[CONTEXT : CONTEXT + READ]
        )
        .double()
        .log_softmax(-1)
        for form in ("dense", "int8")
    )
    kl = (dense.exp() * (dense - small)).sum(-1).mean().item()
    print(f"\n{policy}: {kl:.6f} nats")
    assert 0 < kl < 0.002


def test_bytes_of_8_bits():
    """Of a head of 64 numbers, scales counted: at most 53% of bf16's and 27% of float32's."""
    from formats import slot_bytes

    assert slot_bytes("int8", torch.bfloat16, 64) <= 0.53 * slot_bytes("dense", torch.bfloat16, 64)
    assert slot_bytes("int8", torch.float32, 64) <= 0.27 * slot_bytes("dense", torch.float32, 64)
