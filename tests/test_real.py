"""On a real model: what a cache of 8 bits and weights of few bits cost. The files of scripts/get_model.py have to be
there.
"""

import json
from itertools import islice

import get_model
import pytest
import torch
from test_engine import teacher_forced
from torch.nn.functional import cross_entropy

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


NEWS, PIECES, LENGTH = get_model.FOLDER.parents[2] / "shared" / "data" / "multi_news.jsonl", 64, 384


@pytest.fixture(scope="module")
def news():
    """64 pieces of news [64, 384] as ids."""
    if not NEWS.exists():
        pytest.skip("the texts are not there")
    encode = tokenizer.load(checkpoint.resolve(str(get_model.get("smollm2")))).encode
    texts = (encode(json.loads(line)["context"])[:LENGTH] for line in NEWS.read_text("utf-8").splitlines())
    return torch.tensor(list(islice((ids for ids in texts if len(ids) == LENGTH), PIECES)))


@torch.inference_mode()
def perplexity(model, pieces) -> float:
    losses = [cross_entropy(model(piece)[0, :-1].float(), piece[0, 1:]) for piece in pieces.split(1)]
    return torch.stack(losses).mean().exp().item()


@pytest.mark.real
def test_weights_of_few_bits(news):
    """Perplexity and bytes beside bfloat16. The file's own matrices have 4 bits in groups of 32, its embedding 8."""
    path = checkpoint.resolve(str(get_model.get("smollm2")))
    found = {}
    for kind, dtype in (("auto", "bfloat16"), ("int8", "bfloat16"), ("int4", "bfloat16")):
        model, _ = checkpoint.load(path, dtype=dtype, weights=kind)
        size = sum(parameter.nbytes for parameter in model.parameters())
        words = tokenizer.load(path)
        prompt = words.encode("The capital of France is")
        text = words.decode(list(Engine(model).stream(prompt, max_new_tokens=12)))
        found[kind] = perplexity(model, news), size, text
        print(f"\n{kind}: perplexity {found[kind][0]:.4f}, {size:,} bytes, {text!r}")
    base, size, _ = found["auto"]
    for kind, worse, share in (("int8", 1.01, 0.53), ("int4", 1.08, 0.30)):
        assert found[kind][0] < worse * base and found[kind][1] <= share * size
        assert "Paris" in found[kind][2]
