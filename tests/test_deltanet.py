"""Layers of linear attention: their rule against its definition, their state in rows, prompt caches, conversations, and
plans that leave them out. That whole models compute what transformers does is in test_families.py.
"""

import json
import re
from dataclasses import replace

import families
import pytest
import torch
from conftest import DELTA, appended, begun, linear_model, random_ids
from families import BY_NAME, make_checkpoint
from naive import NaiveDelta

import checkpoint
import deltanet
import generate
from config import ModelConfig
from conversation import Conversation
from engine import Engine, Request
from errors import UserError
from evaluation.cells import Batch, Cell
from kvcache import Recurrent
from model import Transformer
from needs import Needs
from promptcache import PromptCache

STATE = 8 * (3 * DELTA.channels + 4 * 6 * 10)  # bytes of a row in one layer, in float64


@pytest.fixture(autouse=True)
def inference_mode():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Layers 1 and 3 have slots."""
    return linear_model(n_layers=5, linear=(0, 2, 4))


def test_prompts_in_parts_and_steps_equal_the_definition(model, monkeypatch):
    """Chunks and parts that do not divide the prompt or each other, with a state before them, and single tokens."""
    monkeypatch.setattr(deltanet, "CHUNK", 3)
    monkeypatch.setattr(deltanet, "PART", 8)
    net, x = model.layers[0].attention, random_x(1, 26)
    naive, state, got, start = NaiveDelta(net), None, [], 0
    want = torch.cat([naive.feed(token) for token in x.split(1, dim=1)], dim=1)
    for count in (9, 1, 2, 13, 1):
        out, state = net.run(x[:, start : start + count], state)
        got, start = [*got, out], start + count
    torch.testing.assert_close(torch.cat(got, dim=1), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(state.memory[0], torch.stack(naive.memory), rtol=0, atol=1e-12)
    torch.testing.assert_close(state.window[0], torch.stack(naive.before[-3:]), rtol=0, atol=1e-12)
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in state)  # it keeps nothing else in memory
    assert want[:, -1].allclose(net.run(x)[0][:, -1]) and not want[:, -1].allclose(net.run(x[:, 5:])[0][:, -1])


def test_padding_leaves_no_trace(model, monkeypatch):
    """Whatever stands behind a row's own tokens, even what is not finite."""
    monkeypatch.setattr(deltanet, "PART", 8)
    net, x, lengths = model.layers[0].attention, random_x(4, 20), [20, 1, 9, 16]
    padded = torch.stack([row.index_fill(0, torch.arange(n, 20), torch.inf) for row, n in zip(x, lengths, strict=True)])
    _, state = net.run(padded, lengths=torch.tensor(lengths))
    for row, n in enumerate(lengths):
        for part, own in zip(state, net.run(x[row : row + 1, :n])[1], strict=True):
            torch.testing.assert_close(part[row : row + 1], own, rtol=0, atol=1e-12)


def random_x(rows: int, length: int) -> torch.Tensor:
    return torch.randn(rows, length, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("form", ["dense", "int8"])
def test_rows_that_come_and_go(model, form):
    """Rows of a padded batch that others have had before get what they get alone; the state is never rounded."""
    engine = Engine(model, "h2o", plan=[0, 9, 0, 12, 0], cache_format=form)
    requests = [Request(random_ids(n, n), new) for n, new in ((3, 9), (30, 4), (11, 12), (1, 7), (21, 5), (8, 8))]
    done = engine.generate(iter(requests), batch_size=2, max_length=40)
    together = {id(own.request): own.tokens for own in done}
    alone = [list(engine.stream(own.ids, max_new_tokens=own.max_new_tokens)) for own in requests]
    assert [together[id(own)] for own in requests] == alone
    cache = begun(engine, requests[:2]).decoder.cache
    assert [type(layer) is Recurrent for layer in cache.layers] == [True, False, True, False, True]
    assert {layer.memory.dtype for layer in cache.layers[::2]} == {torch.float64}


def test_later_turns_equal_one_prompt(model):
    """Each turn goes on from the state behind the one before, and what it says is what one long prompt would say."""
    talk, said = Conversation(Engine(model)), []
    for turn, count in enumerate((7, 1, 12)):
        ids = random_ids(count, turn)
        answer = list(talk.stream(ids, max_new_tokens=5))
        assert answer == list(Engine(model).stream([*said, *ids], max_new_tokens=5))
        said += [*ids, *answer]


@pytest.mark.parametrize("policy", ["streaming", "snapkv"])
def test_later_turns_beside_evicting_layers(model, policy):
    """Tokens that come together equal those that come one by one, where the policy places them by position."""
    engine, ids = Engine(model, policy, plan=[0, 40, 0, 40, 0]), torch.tensor([random_ids(9, 1), random_ids(9, 2)])
    requests = [Request(random_ids(n, n), 20) for n in (17, 8)]
    together = model.logits(appended(begun(engine, requests).decoder, ids))
    decoder, each = begun(engine, requests).decoder, []
    for tokens in ids.T:
        decoder.tokens.copy_(tokens)
        each.append(decoder.logits())
    torch.testing.assert_close(together, torch.stack(each, dim=1))


@pytest.mark.parametrize("keep", ["prompt", "answer"])
def test_prompt_caches_hold_the_state(model, keep, tmp_path):
    """A row goes on from a file as from the tokens themselves, and the cache stays what it was."""
    engine, ids, follows = Engine(model, "h2o", plan=[0, 40, 0, 40, 0]), random_ids(12), random_ids(5, 9)
    stream = engine.stream(ids, max_new_tokens=6, keep=keep)
    answer = list(stream)
    stream.completion.cache.save(tmp_path / "cache")
    cache = PromptCache.load(tmp_path / "cache", engine)
    assert cache.nbytes == stream.completion.cache.nbytes > 3 * STATE
    if keep == "answer":  # its last token has not been fed
        ids, follows = [*ids, *answer[:-1]], [answer[-1], *follows]
    for _ in range(2):
        assert list(engine.stream(follows, max_new_tokens=6, past=cache)) == list(
            engine.stream([*ids, *follows], max_new_tokens=6)
        )
        if keep == "prompt":
            assert list(engine.stream([], max_new_tokens=6, past=cache)) == answer
    assert "has 0 slots in layer 2, this plan 3" in cache.misfit([0, 40, 3, 40, 0], [])


def test_damaged_states_are_refused(model, tmp_path):
    engine = Engine(model, "window", budget=9)
    stream = engine.stream(random_ids(12), max_new_tokens=1, keep="prompt")
    list(stream)
    cache = stream.completion.cache
    layers = [*cache.layers[:2], Recurrent(cache.layers[2].window, cache.layers[2].memory[:, 1:]), *cache.layers[3:]]
    replace(cache, layers=layers).save(tmp_path / "cache")
    with pytest.raises(UserError, match=r"its 2.memory is torch.float64 \[1, 3, 6, 10\], not torch.float64 \[1, 4, 6"):
        PromptCache.load(tmp_path / "cache", engine)


@pytest.mark.parametrize("layers", ["uniform", "squeeze", "perturbation", "pyramid", "mix"])
def test_plans_are_of_the_layers_that_have_slots(model, layers):
    """The budget is theirs alone; importance is of all layers; the state is counted beside the slots."""
    stream = Engine(model, "h2o", layers, budget=8).stream(random_ids(30), max_new_tokens=10)
    list(stream)
    figures = stream.completion.figures
    assert figures.plan[::2] == [0, 0, 0] and sum(figures.plan) == 16 and figures.budget_slots == 8
    assert layers != "uniform" or figures.plan == [0, 8, 0, 8, 0]
    assert len(figures.importance) == 5
    if layers == "squeeze":
        assert figures.groups[::2] == [None] * 3 and None not in figures.groups[1::2]
    assert figures.kv_bytes == 16 * 2 * 2 * 12 * 8 and figures.kv_bytes_full == 2 * 40 * 2 * 2 * 12 * 8
    assert figures.state_bytes == 16 * 2 * 16 + 3 * STATE
    assert Needs.of(Engine(model, "h2o", layers, budget=8).sizing, 40).row == figures.kv_bytes + figures.state_bytes
    given = Engine(model, "h2o", plan=figures.plan)
    assert list(given.stream(random_ids(30), max_new_tokens=10)) == stream.completion.tokens


def test_what_a_row_takes(model):
    squeezed, full = Engine(model, "window", budget=8), Engine(model)
    rows = [Needs.of(engine.sizing, 40).row for engine in (squeezed, full)]
    slot = 2 * 2 * 12 * 8
    assert rows == [16 * slot + 3 * STATE, 80 * slot + 3 * STATE]
    with pytest.raises(UserError, match=r"a plan's slots are integers from 1 to .*, not 0"):
        Engine(model, "window", plan=[0, 0, 0, 5, 0])


def test_idle_decoders_share_one_memory(model):
    """More rows under a smaller plan: its slots would fit into the memory that is there, its states would not."""
    engine = Engine(model, "window")
    for rows, slots in ((1, 30), (4, 5), (1, 30)):
        engine.plan = [slots] * 5
        requests = [Request(random_ids(40, row), 4) for row in range(rows)]
        for own in engine.generate(requests):
            alone = Engine(model, "window", plan=engine.plan)
            assert own.tokens == list(alone.stream(own.request.ids, max_new_tokens=4))
        idle = [decoder.cache.arenas["memory"] for decoder in engine.store.idle.values()]
        assert len({arena.untyped_storage().data_ptr() for arena in idle}) == 1


def test_evaluation_forces_what_the_engine_decodes(model):
    """Cells of an evaluation share one prefill, from whose state each goes on."""
    rows, following = [random_ids(20, 1), random_ids(13, 2)], torch.tensor([random_ids(6, 3), random_ids(6, 4)])
    cells = [Cell("h2o", "perturbation", 9), Cell("streaming", "squeeze", 9), Cell("full", "uniform", None)]
    batch = Batch(model, cells, rows, 6)
    for cell in cells:
        got = torch.stack(list(batch.forced(cell, following)), dim=1)
        decoder, want = (
            begun(Engine(model, cell.policy, plan=batch.plan), [Request(own, 6) for own in rows]).decoder,
            [],
        )
        for tokens in following.T:
            decoder.tokens.copy_(tokens)
            want.append(decoder.logits())
        torch.testing.assert_close(got, torch.stack(want, dim=1))


def test_a_plan_goes_through_a_file(tmp_path, capsys):
    """Its zeros are read again; the table for a reader shows no bar for them."""
    folder, plan = make_checkpoint(BY_NAME["qwen3_next"], tmp_path / "model"), str(tmp_path / "plan.json")
    asked = ["--checkpoint", str(folder), "--prompt-ids", "1,2,3,4,5,6,7,8,9", "--max-new-tokens", "20"]
    asked += ["--policy", "h2o", "--no-compile"]
    assert generate.main([*asked, "--layers", "squeeze", "--budget", "10", "--save-plan", plan]) == 0
    assert re.search(r"\n    1   0\.\d+      -      0  \n", capsys.readouterr().out)
    assert json.loads((tmp_path / "plan.json").read_text())["plan"][1] == 0
    assert generate.main([*asked, "--plan", plan, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["plan"][1] == 0 and sum(told["plan"]) == 20 and told["state_bytes"] > 0
    assert "1 of them of linear attention" in (text := checkpoint.report(folder)) and "MiB of state" in text


def test_layers_that_guess_ahead_are_not_read(tmp_path):
    """Published files hold them beside the model."""
    folder = make_checkpoint(BY_NAME["qwen3_5_text"], tmp_path)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    want = checkpoint.load(folder)[0](families.token_ids(1, 9))
    save_file(tensors | {"mtp.layers.0.mlp.gate.weight": torch.ones(3)}, folder / "model.safetensors", {"format": "pt"})
    assert checkpoint.load(folder)[0](families.token_ids(1, 9)).equal(want)


def test_files_in_their_names_again(tmp_path):
    """`to_hf` puts each head's rows back to where they stand in the files."""
    from safetensors.torch import load_file

    for name in ("qwen3_next", "qwen3_5_text"):
        folder = make_checkpoint(BY_NAME[name], tmp_path / name)
        model, config = checkpoint.load(folder)
        written = checkpoint.to_hf(model.state_dict(), config)
        for key, tensor in load_file(folder / "model.safetensors").items():
            assert key not in written or written[key].equal(tensor.view_as(written[key])), key
        assert any("in_proj" in key for key in written) and any("q_proj" in key for key in written)


REFUSED = [
    ({"layer_types": ["linear_attention"] * 3}, "none of the 3 layers has full_attention"),
    ({"layer_types": ["sliding_attention"] * 3}, "layer_types must be a list, each one of full_attention, linear_"),
    ({"layer_types": ["full_attention"]}, "layer_types must be a list of 3, not of 1"),
    ({"linear_num_key_heads": 4}, "linear_num_value_heads 6 does not divide by 4 key heads"),
    ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim must be an integer from 1 to 4096, not 0"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_unsupported_values(change, words):
    with pytest.raises(UserError, match=words):
        ModelConfig.from_hf(BY_NAME["qwen3_next"].config | change)


def test_ranks_are_refused(model):
    with pytest.raises(UserError, match="llama has layers of linear attention, which 2 ranks cannot share; use one"):
        model.config.of_rank(2)
