"""Prompts kept apart from a batch, and in files: going on from them gives the tokens of going on without."""

import json

import pytest
import torch
from conftest import quick, random_ids, random_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_engine import BOUNDED, PLAN

import generate
import promptcache
from arguments import Asked, parse
from conversation import Conversation
from engine import Engine, Request
from errors import UserError
from formats import FORMATS
from needs import Needs
from policies import layers, options, tokens
from promptcache import PromptCache
from sampling import GREEDY, Sampling

POLICIES = ["full", *BOUNDED]
PLANS = {"unequal": PLAN, "equal": [13] * 4, "squeeze": None}
SAMPLED = Sampling(temperature=0.9, top_k=20, top_p=0.9, seed=3)
PROMPT, QUESTION = random_ids(41), random_ids(9, seed=4)


def made(policy: str, plan: list[int] | None = PLAN, form: str = "dense", **changes) -> Engine:
    bounded = policy != "full"
    how = {"plan": plan} if bounded and plan else {"layers": "squeeze", "budget": 14} if bounded else {}
    return Engine(random_model(max_positions=120, **changes), policy, cache_format=form, **how)


def kept(engine: Engine, ids: list[int] = PROMPT, new: int = 20, keep: str = "prompt") -> tuple[PromptCache, list[int]]:
    """The cache of a prompt or of its answer, which stands beside it."""
    stream = engine.stream(ids, max_new_tokens=new, keep=keep)
    answer = list(stream)
    return stream.completion.cache, answer


@pytest.fixture
def saved(tmp_path):
    """A file, the engine that wrote it, and the answer that followed."""
    engine, path = made("h2o"), tmp_path / "a.safetensors"
    cache, answer = kept(engine)
    cache.save(path)
    return path, engine, answer


FORMS = [(form, plan) for form in FORMATS for plan in PLANS]


@pytest.mark.parametrize("how", quick(FORMS[0], FORMS[-1], of=FORMS), ids="-".join)
@pytest.mark.parametrize("policy", POLICIES)
def test_going_on_from_a_file(policy, how, tmp_path):
    """With nothing behind the prompt, greedy and sampled, and with a question: that of a conversation's second turn."""
    form, plan = how
    engine, path = made(policy, PLANS[plan], form), tmp_path / "a.safetensors"
    cache, answer = kept(engine)
    cache.save(path)
    other = made(policy, PLANS[plan], form)
    loaded = PromptCache.load(path, other)
    assert loaded.seen == len(PROMPT) and loaded.nbytes == cache.nbytes
    if policy != "full":
        engine.plan = other.plan = loaded.about.plan
    assert list(other.stream([], max_new_tokens=20, past=loaded)) == answer
    drawn = list(engine.stream(PROMPT, SAMPLED, 12))
    assert list(other.stream([], SAMPLED, 12, past=loaded)) == drawn
    behind, said = kept(engine, new=7, keep="answer")
    talk = Conversation(engine)
    assert list(talk.stream(PROMPT, 7)) == said
    second = list(talk.stream(QUESTION, 10))
    assert list(engine.stream([said[-1], *QUESTION], max_new_tokens=10, past=behind)) == second


@pytest.mark.parametrize("policy", POLICIES)
def test_a_file_answers_what_the_prompt_in_memory_answers(policy, tmp_path):
    """And a cache that has gone on can be kept again."""
    engine, path = made(policy), tmp_path / "a.safetensors"
    cache, _ = kept(engine)
    cache.save(path)
    answers = []
    for past in (cache, PromptCache.load(path, engine)):
        stream = engine.stream(QUESTION, max_new_tokens=11, past=past, keep="prompt")
        first = list(stream)
        again = stream.completion.cache
        assert again.seen == len(PROMPT) + len(QUESTION)
        assert list(engine.stream([], max_new_tokens=11, past=again)) == first
        answers.append(first)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_go_on_among_others(policy):
    """In a batch whose rows are refilled each request gets what it gets alone, whatever it goes on from."""
    engine = made(policy, PLAN)
    cache, _ = kept(engine)
    lengths = [(30, GREEDY), (9, SAMPLED), (17, GREEDY), (5, GREEDY)]
    requests = [
        Request(random_ids(n, n), 6 + n % 5, sampling, past=past) for n, sampling in lengths for past in (None, cache)
    ]
    requests.append(Request([], 9, past=cache))
    want = {id(r): list(engine.stream(r.ids, r.sampling, r.max_new_tokens, past=r.past)) for r in requests}
    for completion in engine.generate(requests, batch_size=3):
        assert completion.tokens == want[id(completion.request)]


@pytest.mark.parametrize("policy", POLICIES)
def test_layers_with_a_window(policy, tmp_path):
    """A cache made for short requests does not fit a batch of long ones, in which windowed layers are rings."""
    windowed = {"sliding_window": 24, "windowed": (0, 2)}
    engine = made(policy, [14, 8, 20, 10], **windowed)
    cache, answer = kept(engine)
    cache.save(tmp_path / "a.safetensors")
    other = made(policy, [14, 8, 20, 10], **windowed)
    loaded = PromptCache.load(tmp_path / "a.safetensors", other)
    assert list(other.stream([], max_new_tokens=20, past=loaded)) == answer
    short, _ = kept(engine, PROMPT[:6], 6)
    with pytest.raises(UserError, match="sliding window"):
        engine.stream(QUESTION, max_new_tokens=20, past=short)


def test_another_plan_is_refused_where_it_matters():
    engine = made("streaming")
    cache, _ = kept(engine)
    short, answer = kept(engine, PROMPT[:6])
    engine.plan = [14, 20, 8, 10]
    with pytest.raises(UserError, match=r"has \d+ slots in layer \d, this plan \d+; use its own plan"):
        engine.stream(QUESTION, past=cache)
    other = made("streaming", [9] * 4)  # 6 tokens fill the slots of no plan
    assert list(other.stream(QUESTION, max_new_tokens=5, past=short)) == list(
        other.stream(QUESTION, max_new_tokens=5, past=kept(other, PROMPT[:6])[0])
    )
    engine.plan = None
    assert made("h2o", None).batch(1, 100).misfit(Request(QUESTION, past=cache))


def test_what_an_engine_refuses(saved):
    path, engine, _ = saved
    cache = PromptCache.load(path, engine)
    for other in (made("tova"), made("h2o", form="int8"), Engine(random_model(seed=2, max_positions=120), "h2o")):
        other.plan = PLAN
        with pytest.raises(UserError, match="another model, policy or format"):
            other.stream(QUESTION, past=cache)
        with pytest.raises(UserError, match="was made (with|by)"):
            PromptCache.load(path, other)
    with pytest.raises(UserError, match="41 earlier"):
        full = made("full")
        full.stream(QUESTION, max_new_tokens=100, past=kept(full)[0])
    with pytest.raises(UserError, match="empty"):
        engine.stream([])
    assert "run ahead" in ahead(engine).misfit(Request(PROMPT, 9, keep="answer"))
    with pytest.raises(UserError, match="keep must be"):
        Request(PROMPT, keep="all")


def ahead(engine: Engine):
    batch = engine.batch(1, 100)
    batch.lag = 2
    return batch


# ---- files


def test_a_damaged_file_is_one_line(saved, tmp_path):
    """Every tensor missing, of another shape or kind; every word of the metadata missing or of another kind."""
    path, engine, _ = saved
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()[promptcache.KEY])
    other = tmp_path / "b.safetensors"

    def refused(tensors: dict, about: dict) -> str:
        save_file(tensors, other, {promptcache.KEY: json.dumps(about)})
        with pytest.raises(UserError) as error:
            PromptCache.load(other, engine)
        assert "\n" not in str(error.value) and "b.safetensors" in str(error.value)
        return str(error.value)

    for name, tensor in tensors.items():
        if name != "logits":
            assert "is missing" in refused({key: own for key, own in tensors.items() if key != name}, about)
        assert name in refused(tensors | {name: tensor[..., :-1].contiguous()}, about)
        assert name in refused(tensors | {name: tensor.to(torch.int16)}, about)
    for name in about:
        refused(tensors, {key: own for key, own in about.items() if key != name})
        for wrong in ("x", -1, 2.5, ["y"], {}, True):
            if name != "layers" or not isinstance(wrong, str):
                refused(tensors, about | {name: wrong})
    refused(tensors, about | {"plan": about["plan"][1:]})
    refused(tensors, about | {"version": 2})
    save_file(tensors, other)
    with pytest.raises(UserError, match="no prompt cache"):
        PromptCache.load(other, engine)
    for data in (b"", b"x" * 99, path.read_bytes()[:-9], path.read_bytes()[:40]):
        other.write_bytes(data)
        with pytest.raises(UserError, match="b.safetensors"):
            PromptCache.load(other, engine)
    with pytest.raises(UserError, match="No such file"):
        PromptCache.load(tmp_path / "none", engine)


def test_other_weights_are_another_model():
    """One number of any tensor that the fingerprint looks at."""
    model = random_model()
    before = promptcache.fingerprint(model)
    assert before == promptcache.fingerprint(random_model())
    for name, parameter in model.named_parameters():
        old = parameter.data.clone()
        parameter.data.view(-1)[0] += 1
        assert promptcache.fingerprint(model) != before, name
        parameter.data = old
    assert promptcache.fingerprint(model) == before


@pytest.mark.parametrize("kinds", [tokens.TOKEN_POLICIES, layers.LAYER_POLICIES], ids=["tokens", "layers"])
def test_a_policy_is_the_one_that_its_word_makes(kinds):
    make = tokens.make if kinds is tokens.TOKEN_POLICIES else layers.make
    for name in kinds:
        assert options.word(make(name)) == name
    words = ["snapkv:recent=32", "streaming:sinks=7"] if make is tokens.make else ["squeeze:p=0.4"]
    words += [] if make is tokens.make else ["perturbation:where=last,weights=sqrt", "perturbation:weights=1.0/2.0/4.0"]
    for word in words:
        assert make(options.word(make(word))) == make(word) and options.word(make(word)) != word.partition(":")[0]


# ---- what is held


@pytest.mark.parametrize("policy", POLICIES)
def test_held_are_the_positions_of_what_is_there(policy):
    """The first layer's values belong to their tokens alone: those in the slots are those of the positions."""
    engine = made(policy, [14, 8, 20, 10])
    with torch.inference_mode(), engine.batch(2, 110, apart=engine.plan is not None) as batch:
        own = batch.add(Request(PROMPT, 40, watched=True))
        batch.add(Request(random_ids(20), 40))
        for _ in range(30):
            batch.step()
            batch.collect()
            found = batch.held(own)
        values = batch.decoder.cache.layers[0].stored.v[0]  # [K, N, D]
        every = [*PROMPT, *own.tokens]
        full = made("full")
        read = full.stream(every, max_new_tokens=1, keep="prompt")
        list(read)
        whole = read.completion.cache.layers[0].stored.v[0]
        for head in range(len(values)):
            positions = found[0][min(head, len(found[0]) - 1)]
            assert len(set(positions.tolist())) == len(positions)
            torch.testing.assert_close(values[head, : len(positions)], whole[head, positions])
        assert [part.shape[1] for part in found] == [
            min(slots, int(batch.decoder.seen[0])) for slots in batch.decoder.cache.plan
        ]


def test_only_the_watched_are_known():
    engine = made("streaming")
    with engine.batch(1, 60) as batch:
        own = batch.add(Request(PROMPT, 4))
        batch.step()
        with pytest.raises(UserError, match="watched"):
            batch.held(own)
    cache, _ = kept(made("snapkv"))
    with pytest.raises(UserError, match="cannot be watched"):
        batch = made("snapkv").batch(1, 80)
        batch.add(Request(QUESTION, 5, past=cache, watched=True))


def test_a_watched_row_that_is_kept_stays_known():
    engine = made("snapkv")
    with engine.batch(1, 100, keeps=True) as batch:
        first = batch.add(Request(PROMPT, 5, keep="answer", watched=True))
        while batch.busy:
            batch.step()
            batch.collect()
        cache = first.cache
        second = batch.add(Request(QUESTION, 9, past=cache, watched=True))
        batch.step()
        batch.collect()
        found = batch.held(second)
        seen = int(batch.decoder.seen[0])
    assert all(len(set(row.tolist())) == len(row) and row.max() == seen - 1 for part in found for row in part)


# ---- command line


def run(capsys, *args: str) -> dict:
    assert generate.main(["--json", "--max-new-tokens", "9", "--ignore-eos", *args]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "how", [(), ("--squeeze", "--budget", "0.3", "--cache-format", "int8")], ids=["full", "squeeze"]
)
def test_the_command_line(capsys, tmp_path, how):
    file = str(tmp_path / "a.safetensors")
    saved = run(capsys, "--prompt", "def main():\n    x = 1", "--save-cache", file, *how)
    went_on = run(capsys, "--load-cache", file)
    for name in ("tokens", "text", "prompt_tokens", "policy", "layers", "importance"):
        assert went_on[name] == saved[name], name
    assert went_on["cached_tokens"] == saved["prompt_tokens"]
    asked = run(capsys, "--load-cache", file, "--prompt", "\n    return x")
    lines = [{"id": "a", "prompt": "\n    return x"}, {"id": "b", "prompt": ""}]
    lines.append({"id": "c", "prompt": "z", "load_cache": str(tmp_path / "none")})
    (tmp_path / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--load-cache", file]
    assert generate.main(["--max-new-tokens", "9", "--ignore-eos", *job]) == 2
    assert "line 3: " in capsys.readouterr().err
    found = {line["id"]: line for line in map(json.loads, (tmp_path / "out").read_text().splitlines())}
    assert found["a"]["tokens"] == asked["tokens"] and found["b"]["tokens"] == saved["tokens"]
    assert found["a"]["prompt_tokens"] == asked["prompt_tokens"] > asked["cached_tokens"]


def test_copies_of_a_cache_count_as_memory(capsys, tmp_path):
    """Where a run just fits there is no room for what keeping its prompt, or going on from it, takes."""
    file, ids = str(tmp_path / "a.safetensors"), ["--prompt-ids", "5,6,7,8"]
    run(capsys, *ids, "--save-cache", file)

    def fits(*args: str) -> bool:
        sizing = Asked(parse([*ids, "--max-new-tokens", "9"])).sizing
        seen = 4 * ("--load-cache" in args)
        gib = (Needs.of(sizing, seen + 13).total(1) + 1) / 2**30
        code = generate.main(["--json", *ids, "--max-new-tokens", "9", "--max-memory", repr(gib), *args])
        return code == 0 or "out of memory" not in capsys.readouterr().err

    assert fits() and not fits("--save-cache", file) and not fits("--load-cache", file)


def test_arguments_that_do_not_go_together(capsys, saved, tmp_path):
    path = str(saved[0])
    for args in (
        ["--load-cache", path, "--squeeze"],
        ["--load-cache", path, "--plan", path],
        ["--load-cache", path, "--chat"],
        ["--save-cache", str(tmp_path / "x"), "--interactive"],
        ["--save-cache", str(tmp_path / "x"), "--input", "a", "--output", "b"],
        ["--load-cache", path, "--save-cache", path],
        ["--load-cache", path],  # of another model
    ):
        assert generate.main(args) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1, args
