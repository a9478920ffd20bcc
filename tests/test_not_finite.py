"""Logits that are not finite: the request ends with one line, wherever they come up, and its neighbours go on."""

import json
import math
from contextlib import ExitStack

import pytest
import torch
from conftest import begun, quick, random_ids, random_model
from simulated import moved, simulated
from test_graphs import FORMS
from test_simulated import steps_do_not_wait

import checkpoint
import generate
from conversation import Conversation
from engine import Engine, Request
from errors import UserError
from evaluation.cells import Batch, Cell
from formats import FORMATS
from model import Transformer
from policies.tokens import TOKEN_POLICIES
from prefill import plan_for
from sampling import GREEDY, Sampling, not_finite

BAD = 96  # the token that breaks whatever sees it
SAMPLED = Sampling(temperature=0.9, top_k=20, top_p=0.9, seed=3)
PLAN = [7, 12, 30, 9]
LINE = r"^the logits are not finite in \w+: [^\n]*$"


@pytest.fixture
def bad_token(monkeypatch):
    """From now on BAD, or another token, is embedded as NaN."""
    embedded, bad = Transformer.embedded, [BAD]

    def broken(self, ids, positions):
        return embedded(self, ids, positions).masked_fill((ids == bad[0])[..., None], math.nan)

    monkeypatch.setattr(Transformer, "embedded", broken)
    return lambda token: bad.__setitem__(0, token)


def overflowing(**form) -> Transformer:
    model = random_model(torch.float16, **form)
    model.layers[1].feed_forward.w2.weight.fill_(6e4)
    return model


def huge(**form) -> Transformer:
    model = random_model(torch.float32, **form)
    for parameter in model.parameters():
        parameter.mul_(1e30)
    return model


def root_of_less_than_nothing(**form) -> Transformer:
    return random_model(torch.float32, norm_eps=-1e9, **form)


def broken_head(**form) -> Transformer:
    """Every signal is finite; the logits alone are not."""
    model = random_model(torch.float32, **form)
    model.norm.weight.fill_(math.inf)
    return model


MODELS = [overflowing, huge, root_of_less_than_nothing, broken_head]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("policy", quick("full", "streaming", "h2o", "snapkv", of=TOKEN_POLICIES))
@pytest.mark.parametrize("broken", MODELS)
def test_a_model_that_overflows(broken, policy, sampling):
    model = broken(n_layers=2)
    for layers in ("uniform", "squeeze") if policy != "full" else ("uniform",):
        engine = Engine(model, policy, layers, None if policy == "full" else 12)
        stream = engine.stream(random_ids(20), sampling, 8, eos_ids=[0])
        assert list(stream) == stream.completion.tokens == [] and stream.completion.finish_reason == "error"
        with pytest.raises(UserError, match=LINE):
            raise UserError(stream.completion.error)
        assert str(model.dtype).split(".")[1] in stream.completion.error and "--dtype" in not_finite(model.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("form", [*FORMS, dict(position_offset=2)], ids=lambda form: next(iter(form)))
@pytest.mark.parametrize("broken", MODELS[1:])
def test_every_form_that_overflows(broken, form):
    if broken is broken_head or "norm" not in form:
        stream = Engine(broken(n_layers=2, **form)).stream(random_ids(20), max_new_tokens=8)
        assert list(stream) == [] and stream.completion.finish_reason == "error"


REQUESTS = [
    Request([*random_ids(20, 1, BAD), BAD], 6, SAMPLED),
    Request(random_ids(9, 2, BAD), 5),
    Request([BAD, *random_ids(30, 3, BAD)], 7),
    Request([BAD], 3),
    Request(random_ids(41, 4, BAD), 6, SAMPLED),
    Request(random_ids(1, 5, BAD), 9),
]


def check(engine: Engine, alone: Engine, **how) -> None:
    """Those with BAD fail, the others have what they get by themselves."""
    done = {id(completion.request): completion for completion in engine.generate(REQUESTS, **how)}
    assert any(completion.finish_reason == "length" for completion in done.values())
    for request in REQUESTS:
        completion = done[id(request)]
        if BAD in request.ids:
            assert (completion.tokens, completion.finish_reason) == ([], "error")
            assert completion.error == not_finite(engine.model.dtype)
        else:
            want = (stream := alone.stream(request.ids, request.sampling, request.max_new_tokens)).completion
            assert list(stream) == want.tokens
            # The model may say BAD itself, and fails then.
            assert want.finish_reason == "length" or want.finish_reason == "error" and want.tokens[-1] == BAD
            assert (completion.tokens, completion.finish_reason) == (want.tokens, want.finish_reason)
            assert completion.error == want.error
            json.dumps(vars(completion.figures), allow_nan=False)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("policy", quick("full", "streaming", "h2o", "snapkv", of=TOKEN_POLICIES))
def test_neighbours_go_on(model, policy, form, bad_token):
    alone = Engine(model, policy, plan=None if policy == "full" else PLAN, cache_format=form)
    check(alone, alone, batch_size=6)
    check(alone, alone, batch_size=2)
    check(alone, alone, batch_size=3, apart=True)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("policy", quick("streaming", "h2o", of=[p for p in TOKEN_POLICIES if p != "full"]))
def test_no_plan_is_made_from_them(model, policy, size, bad_token):
    """The plan is that of the first ones that are whole; where there is none among the first, of the next ones."""
    engine = Engine(model, policy, "squeeze", 10)
    good = [request for request in REQUESTS[:size] if BAD not in request.ids] or [REQUESTS[1]]
    want = begun(Engine(model, policy, "squeeze", 10), good, 47).figures
    for completion in engine.generate(REQUESTS, batch_size=size):
        assert completion.figures is None or completion.figures.plan == want.plan
    check(engine, Engine(model, policy, plan=want.plan), batch_size=size)
    plan, importance = plan_for(engine.model, engine.sizing, REQUESTS, 47, 1)
    assert plan.slots == begun(engine, REQUESTS[1:2], 47).figures.plan
    assert importance == plan_for(engine.model, engine.sizing, REQUESTS[1:2], 47)[1]
    plan, importance = plan_for(engine.model, engine.sizing, [REQUESTS[0]], 47)
    assert plan.slots == [10] * 4 and importance is None


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("policy", quick("full", "streaming", "h2o", of=TOKEN_POLICIES))
def test_later_tokens(model, policy, sampling, bad_token):
    """What has been said stays; a conversation cannot go on, another one can, and so can the rest of a batch."""
    bad_token(-5)
    ids, engine = random_ids(12), Engine(model, policy, plan=None if policy == "full" else PLAN)
    whole = list(engine.stream(ids, sampling, 12))
    place = next(n for n, token in enumerate(whole) if n > 1 and token not in ids + whole[:n])
    bad, until = whole[place], whole[: place + 1]
    neighbour = Request(random_ids(8, 7), 12, sampling)
    beside = list(engine.stream(neighbour.ids, sampling, 12))
    if bad in beside or bad in neighbour.ids:
        neighbour, beside = None, []
    bad_token(bad)
    for _ in range(2):
        stream = engine.stream(ids, sampling, 12)
        assert list(stream) == stream.completion.tokens == until and stream.completion.finish_reason == "error"
    requests = [Request(ids, 12, sampling), *[neighbour] * bool(neighbour)]
    answers = {id(c.request): c.tokens for c in engine.generate(requests, batch_size=2)}
    assert [answers[id(request)] for request in requests] == [until, beside][: len(requests)]
    talk = Conversation(engine, sampling)
    assert list(talk.stream(ids, 12)) == until
    for _ in range(2):
        with pytest.raises(UserError, match="begin a new one"):
            talk.stream([1, 2, 3])
    again = Conversation(engine, sampling)
    assert list(again.stream(ids, len(until))) == until  # not fed yet
    assert list(again.stream([1], 5)) == []


@pytest.mark.parametrize("layers", ["uniform", "squeeze"])
def test_conversations_that_begin_with_one(model, layers, bad_token):
    talk = Conversation(Engine(model, "window", layers, 16))
    stream = talk.stream([1, BAD], 4)
    assert list(stream) == [] and stream.completion.error
    with pytest.raises(UserError, match=LINE):
        talk.stream([1])


@pytest.mark.parametrize("policy", quick("streaming", "h2o", of=TOKEN_POLICIES))
def test_no_step_waits_for_it(policy, bad_token):
    options = [dict(plan=None if policy == "full" else PLAN[:2])]
    options += [dict(layers="squeeze", budget=10)] * (policy != "full")
    for how in options:
        want, got = [], []
        for place, said in ((lambda model: model, want), (moved, got)):
            with ExitStack() as stack:
                if place is moved:
                    stack.enter_context(steps_do_not_wait(stack.enter_context(simulated())))
                engine = Engine(place(random_model(n_layers=2)), policy, **how)
                for completion in engine.generate(REQUESTS[:4], batch_size=2):
                    said.append((REQUESTS.index(completion.request), completion.tokens, completion.error))
        assert sorted(got) == sorted(want) and sum(error is not None for *_, error in got) == 3


def test_padding_spoils_nothing(model, bad_token):
    """Whatever the shorter rows of a batch are filled up with."""
    for bad in (*range(8), 96):
        bad_token(bad)
        requests = [Request([(bad + 1) % 97], 1), Request([(bad + 2) % 97, (bad + 3) % 97, (bad + 4) % 97], 1)]
        assert all(completion.tokens for completion in Engine(model).generate(requests))


def test_no_figure_comes_of_them(model, bad_token):
    with pytest.raises(UserError, match=LINE):
        Batch(model, [Cell("window", budget=5)], [[1, 2], [1, BAD]], 4)
    cell = Cell("window", budget=5)
    batch = Batch(model, [cell], [[1, 2, 3, 4], [5, 6, 7, 8]], 6)
    said = batch.greedy(cell)[1]
    following = torch.tensor([[1, 2, 3], [1, BAD, 3]])
    with pytest.raises(UserError, match=LINE):
        list(batch.forced(cell, following))
    bad_token(said[2])
    with pytest.raises(UserError, match=LINE):
        batch.greedy(cell)
    assert batch.greedy(cell, {*said[:3]})[1] == []
    for new in (1, 2):  # tokens after a question that breaks
        batch = Batch(model, [cell], [[1, 2, 3, 4], [5, 6, 7, 8]], 2 + new)
        with pytest.raises(UserError, match=LINE):
            batch.greedy(cell, questions=[[1, 2], [3, said[2]]])


@pytest.fixture
def broken_checkpoint(monkeypatch):
    """The embedded checkpoint, in which what a function does to it is broken."""
    load = checkpoint.load

    def breaking(change):
        def loaded(*args):
            model, config = load(*args)
            change(model)
            return model, config

        monkeypatch.setattr(checkpoint, "load", loaded)

    return breaking


@pytest.mark.parametrize("how", [(), ("--squeeze",), ("--policy", "h2o", "--temperature", "1"), ("--json",)], ids=str)
def test_the_command_line(capsys, tmp_path, broken_checkpoint, how):
    broken_checkpoint(lambda model: model.layers[2].attention.wo.weight.fill_(math.inf))
    plan = tmp_path / "plan"
    assert generate.main(["--prompt", "import os", "--save-plan", str(plan), *how]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("generate.py: error: the logits are not finite in float32: ")
    assert err.count("\n") == 1 and not plan.exists()


def test_the_command_line_keeps_what_it_said(capsys, bad_token):
    ids = [260, *range(300, 330)]
    args = ["--prompt-ids", ",".join(map(str, ids)), "--max-new-tokens", "40", "--ignore-eos"]
    assert generate.main([*args, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    said = result["tokens"]
    bad_token(next(token for n, token in enumerate(said) if n > 3 and token not in ids + said[:n]))
    assert generate.main(args) == 2
    out, err = capsys.readouterr()
    assert len(out) > 2 and result["text"].startswith(out[:-1]) and err.count("\n") == 1


def test_an_interactive_answer(capsys, monkeypatch, broken_checkpoint):
    broken_checkpoint(lambda model: model.layers[2].attention.wo.weight.fill_(math.inf))
    monkeypatch.setattr(generate, "lines", lambda args: iter(["import os", "def main"]))
    assert generate.main(["--interactive", "--squeeze"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("not finite") == err.count("\n") == 2 and "begin a new one" in err


@pytest.mark.parametrize("how", [(), ("--squeeze", "--budget", "12")], ids=["full", "squeeze"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_job(capsys, tmp_path, bad_token, how, rows):
    """Its result says so, also when --resume goes on; the others have what they have without it."""
    lines = [{"id": n, "prompt_ids": ids} for n, ids in enumerate([[5, BAD, 7], [5, 6, 7], [BAD] * 9, [8, 9] * 9])]

    def job(lines, name, *more) -> tuple[int, dict]:
        (tmp_path / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
        paths = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / name), "--batch-size", str(rows)]
        code = generate.main([*paths, "--max-new-tokens", "5", "--ignore-eos", "--json", *how, *more])
        said = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
        done = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        return code, said, {line["id"]: line for line in done}

    code, said, done = job(lines, "out")
    assert (code, said["done"], said["failed"]) == (2, 4, 2) and set(done) == {0, 1, 2, 3}
    for n in (0, 2):
        assert done[n]["finish_reason"] == "error" and done[n]["tokens"] == [] and done[n]["text"] == ""
        assert done[n]["error"].startswith("the logits are not finite in float32: ")
    decided = json.loads((tmp_path / "out.job.json").read_text(), parse_constant=pytest.fail)
    assert all(map(math.isfinite, decided["importance"]))
    code, said, good = job([lines[1], lines[3]], "good", "--max-length", "23")
    assert code == 0 and said["failed"] == 0 and "error" not in good[1]
    if not how or rows == 1:  # else the plan is of other prompts
        assert good == {n: done[n] for n in (1, 3)}
    code, said, none = job([lines[0], lines[2]], "none")
    assert code == 2 and said["failed"] == 2 and said["importance"] is None
    (tmp_path / "none").write_text((tmp_path / "none").read_text().splitlines(keepends=True)[0])
    code, said, again = job([lines[0], lines[2]], "none", "--resume")
    assert code == 2 and said["failed"] == 1 and again == none
