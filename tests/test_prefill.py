"""A prompt cut layer by layer before the plan is known, against one that waits whole: the same cache, less memory."""

from contextlib import ExitStack, contextmanager, nullcontext
from unittest.mock import patch

import pytest
import torch
from conftest import BY_LENGTH, begun, quick, random_ids, random_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_module
import prefill as prefill_module
from engine import Engine, Request
from formats import FORMATS, Stored
from kvcache import Memory
from needs import Needs
from policies.layers import LayerPolicy, make
from policies.layers.perturbation import Perturbation, sizes_of
from policies.layers.squeeze import Squeeze
from policies.tokens import TOKEN_POLICIES
from prefill import LayerPrompt, plan_for
from sizing import READ_TOKENS

BOUNDED = [name for name, policy in TOKEN_POLICIES.items() if policy.bounded]
LAYERS = 7
ORDERS = {
    "ascending": lambda layers: torch.linspace(0.1, 0.9, layers).tolist(),
    "descending": lambda layers: torch.linspace(0.9, 0.1, layers).tolist(),
    "random": lambda layers: torch.rand(layers, generator=torch.Generator().manual_seed(5)).tolist(),
}
SHAPES = {"equal caps": {}, "windows": {"sliding_window": 24, "windowed": (0, 3, 4)}}
POLICIES = [Squeeze(0.2), Squeeze(0.6), Squeeze(1.0), make("mix", share=0.5, p=0.2)]


@contextmanager
def signals(values: list[float]):
    """Prompts find these importances, layer by layer."""
    following = iter(values * 10)

    def importance(before, after, lengths=None):
        return before.new_full(before.shape[:1], next(following))

    with patch.object(prefill_module, "importance", importance):
        yield


def all_at_once():
    """No layer is cut before the plan is known."""
    return patch.object(Squeeze, "upper_bound", lambda self, so_far, *_: [10**9] * len(so_far))


@contextmanager
def cuts():
    """Counts what is taken from prompts, in tokens."""
    counted, cut = [], LayerPrompt.cut

    def counting(self, positions):
        counted.append(self.size - positions.shape[2])
        cut(self, positions)

    with patch.object(LayerPrompt, "cut", counting):
        yield counted


@pytest.fixture(scope="module", params=SHAPES)
def model(request):
    return random_model(n_layers=LAYERS, **SHAPES[request.param])


def cached(engine: Engine, requests: list[Request]) -> tuple:
    """The plan, and what every valid slot holds right after the prompt."""
    with torch.inference_mode():
        batch = begun(engine, requests)
        decoder, figures = batch.decoder, batch.figures
    held = []
    for layer in decoder.cache.layers:
        for row, seen in enumerate(decoder.seen.tolist()):
            held += [part[row, :, :seen].tolist() for part in layer.parts()]
    return figures.plan, figures.importance, decoder.tokens.tolist(), held


@pytest.mark.parametrize("order", quick("its own", "random", of=["its own", *ORDERS]))
@pytest.mark.parametrize("policy", BOUNDED)
def test_cut_as_it_goes_equals_all_at_once(model, policy, order):
    """Bit for bit, for one prompt and for a ragged batch."""
    values = ORDERS[order](LAYERS) if order in ORDERS else None
    tokens = 0
    for number, (layers, budget) in enumerate(zip(POLICIES, (12, 0.2, 0.4, 16), strict=True)):
        requests = [Request(random_ids(length, length), 4) for length in ([90], [90, 33, 4])[number % 2]]
        got = []
        for whole in (False, True):
            with signals(values) if values else nullcontext(), ExitStack() as stack:
                counted = stack.enter_context(cuts())
                if whole:
                    stack.enter_context(all_at_once())
                form = FORMATS[number in (1, 2)]
                got.append(cached(Engine(model, policy, layers, budget, cache_format=form), requests))
                assert not (whole and counted)
                tokens += sum(counted)
        assert got[0] == got[1]
        assert layers.p == 1 or order == "its own" or len(set(got[0][0])) > 1
    assert tokens > 0


@pytest.mark.parametrize("policy", ["h2o", "streaming", "snapkv"])
def test_tokens_are_those_of_all_at_once(model, policy):
    requests = [Request(random_ids(length, length), 20) for length in (90, 33, 4)]
    answers = []
    for whole in (False, True):
        with all_at_once() if whole else nullcontext():
            done = Engine(model, policy, Squeeze(0.2), 12).generate(requests, batch_size=2)
            answers.append(sorted((requests.index(completion.request), completion.tokens) for completion in done))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("layers", ["uniform", "pyramid"])
def test_a_plan_known_before_the_prompt_needs_no_cut(model, layers):
    with cuts() as counted, patch.object(LayerPolicy, "upper_bound", side_effect=AssertionError):
        list(Engine(model, "h2o", layers, 12).generate([Request(random_ids(60), 3)]))
    assert not counted


@pytest.mark.parametrize("policy", ["full", "streaming", "h2o", "snapkv", "keydiff"])
def test_rows_read_in_groups_are_those_read_at_once(policy, monkeypatch):
    """Also where every request has rotary frequencies of its own."""
    model = random_model(max_positions=128 if policy == "full" else 32, rope=BY_LENGTH[0])
    requests = [Request(random_ids(length, length), 9) for length in (61, 7, 90, 33, 1)]
    answers, sizes, forward = [], [], model_module.Block.forward

    def counted(block, x, *rest):
        if isinstance(rest[-1], prefill_module.Reading):
            sizes.append(len(x))
        return forward(block, x, *rest)

    monkeypatch.setattr(model_module.Block, "forward", counted)
    for most in (READ_TOKENS, 200):
        monkeypatch.setattr("sizing.READ_TOKENS", most)
        done = Engine(model, policy, "squeeze", None if policy == "full" else 20).generate(requests)
        answers.append({requests.index(completion.request): completion.tokens for completion in done})
    assert answers[0] == answers[1]
    assert sizes == [5] * 4 + [2, 2, 1] * 4


DEEP, LONG, SHARE, P = 32, 4096, 0.2, 0.3
LAYER_BYTES = 2 * 8 * 4 * LONG  # K and V of one layer's whole prompt: head_dim 8, fp32
BUDGET = SHARE * DEEP * LAYER_BYTES


def bound(p: float, length: int = LONG) -> float:
    """While prompts are read: one layer's whole one, p + (1 - p) H_L budgets, a copy of one layer, a granule a layer.

    Then what waits and the arena are there at the same time, one budget each, and a layer that is put into its order.
    """
    harmonic, copied = sum(1 / rank for rank in range(1, DEEP + 1)), SHARE * min(1 / SHARE, p + (1 - p) * DEEP)
    read = LAYER_BYTES * (1 + copied) + BUDGET * (p + (1 - p) * harmonic)
    return max(read, LAYER_BYTES * copied + 2 * BUDGET) * length / LONG + DEEP * 16 * 2 * 8 * 4


@pytest.fixture(scope="module")
def deep():
    shape = {"dim": 16, "n_heads": 1, "n_kv_heads": 1, "head_dim": 8, "ffn_dim": 16, "max_positions": 2 * LONG}
    return random_model(torch.float32, n_layers=DEEP, **shape)


class Ledger:
    """The bytes of all K and V that are alive: prompts, what is gathered or moved from them, and arenas."""

    def __init__(self):
        self.known: dict[StorageWeakRef, int] = {}
        self.peak = self.read = 0  # read: before there is an arena

    def enter(self, *tensors: torch.Tensor) -> None:
        for storage in (tensor.untyped_storage() for tensor in tensors):
            self.known[StorageWeakRef(storage)] = storage.nbytes()
        self.known = {storage: size for storage, size in self.known.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self.known.values()))  # it only rises when something is entered

    def __enter__(self):
        self.patches, init, each, arena = ExitStack(), LayerPrompt.__init__, Stored.each, Memory.arena

        def entering_init(prompt, k, v, *scores):
            init(prompt, k, v, *scores)
            self.enter(k, v)

        def entering_each(stored, *arguments):
            made = each(stored, *arguments)
            self.enter(*made.parts())
            return made

        def entering_arena(memory, name, *arguments):
            self.read = self.read or self.peak
            made = arena(memory, name, *arguments)
            if name in ("k", "v"):
                self.enter(made)
            return made

        self.patches.enter_context(patch.object(LayerPrompt, "__init__", entering_init))
        self.patches.enter_context(patch.object(Stored, "each", entering_each))
        self.patches.enter_context(patch.object(Memory, "arena", entering_arena))
        return self

    def __exit__(self, *_):
        self.patches.close()


class Sizes(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(part.numel() for part in tree_leaves(out) if torch.is_tensor(part))])
        return out


def peaks(model, policy: str, order: str, p: float = P, lengths: tuple = (LONG,), whole: bool = False) -> list[int]:
    """In bytes, of one request after another on one engine, each from its prompt to its second token.

    Nothing as large as an attention matrix is made.
    """
    engine, found = Engine(model, policy, Squeeze(p), SHARE), []
    with Ledger() as ledger, Sizes() as sizes, all_at_once() if whole else nullcontext():
        for length in lengths:
            ledger.peak = 0
            with signals(ORDERS[order](DEEP)):
                assert len(list(engine.stream(random_ids(length), max_new_tokens=2))) == 2
            found.append(ledger.peak)
    assert DEEP * int(SHARE * max(lengths)) * 8 <= sizes.largest < LONG * LONG
    return found


@pytest.fixture
def no_attention():
    """What attention gives does not matter here and takes most of the time."""
    with patch.object(model_module.Attention, "over_prompt", lambda self, q, k, v: q):
        yield


@pytest.fixture
def whole(deep, no_attention):
    return peaks(deep, "window", "random", whole=True)[0]


class Live(TorchDispatchMode):
    """The most bytes of all tensors together that are alive and were made while it was on."""

    def __init__(self):
        super().__init__()
        self.known: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made, given = (
            {StorageWeakRef(part.untyped_storage()): part for part in tree_leaves(tree) if torch.is_tensor(part)}
            for tree in (out, (args, kwargs))
        )
        fresh = [storage for storage in made if storage not in given or storage in self.known]  # no views of weights
        self.known |= {storage: made[storage].untyped_storage().nbytes() for storage in fresh}
        self.known = {storage: size for storage, size in self.known.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self.known.values()))
        return out


@pytest.mark.parametrize("order", quick("random", of=ORDERS))
def test_all_that_lives_is_one_layer_and_the_bound(deep, no_attention, order):
    """Whatever it is called: less what a prompt takes of which nothing is kept, that is one layer's work."""
    engine, request = Engine(deep, "window", Squeeze(P), SHARE), Request(random_ids(LONG), 2)
    with signals(ORDERS[order](DEEP)), Live() as reading:
        plan_for(engine.model, engine.sizing, [request], LONG + 2)
    peaks = []
    for context in (nullcontext(), all_at_once()):
        with signals(ORDERS[order](DEEP)), context, Live() as live:
            assert len(list(engine.stream(request.ids, max_new_tokens=2))) == 2
        peaks.append(live.peak - reading.peak)
        engine = Engine(deep, "window", Squeeze(P), SHARE)
    assert 0.9 * BUDGET < peaks[0] < bound(P)
    assert peaks[0] < 0.7 * peaks[1]


def under(*cases):
    """All shares and orders, of which only these are quick."""
    every = [(p, order) for p in (0.1, 0.3, 0.7, 1.0) for order in ORDERS]
    return [pytest.param(*case, marks=[] if case in cases else pytest.mark.slow) for case in every]


@pytest.mark.parametrize(
    ("p", "order"), under((0.1, "descending"), (0.3, "ascending"), (0.3, "random"), (0.7, "random"), (1.0, "ascending"))
)
def test_keys_and_values_stay_under_the_bound(deep, whole, p, order):
    """The arena counts, too."""
    with cuts() as counted:
        [cut] = peaks(deep, "window", order, p)
    assert BUDGET * 0.99 < cut < bound(p)
    assert sum(counted) > 0
    engine = Engine(deep, "window", Squeeze(p), SHARE)
    needs = Needs.of(engine.sizing, LONG + 2, LONG)
    assert cut < needs.row + needs.held
    assert whole > DEEP * LAYER_BYTES > 1.7 * cut


@pytest.mark.parametrize("order", quick("descending", of=ORDERS))
def test_what_waits_for_perturbation_is_one_budget(deep, no_attention, order):
    """And one layer's whole prompt, and a copy of it while it is cut, whichever layers matter. Then the arena comes."""
    steepness = iter(ORDERS[order](DEEP))

    def measure(self, layer, budget, cap, floor):
        steep = next(steepness)
        return torch.tensor([[steep * (1 - size / cap) ** 2 for size in sizes_of(budget, cap, floor)]])

    engine = Engine(deep, "window", "perturbation", SHARE)
    with patch.object(Perturbation, "measure", measure), Ledger() as ledger, cuts() as counted:
        stream = engine.stream(random_ids(LONG), max_new_tokens=2)
        assert len(list(stream)) == 2
    assert len(set(stream.completion.figures.plan)) > 5 and sum(counted) > 0
    assert BUDGET * 0.99 < ledger.peak < 2 * LAYER_BYTES + 2 * BUDGET
    assert ledger.read < 2 * LAYER_BYTES + BUDGET
    needs = Needs.of(engine.sizing, LONG + 2, LONG)
    assert ledger.peak < needs.row + needs.held


@pytest.mark.parametrize(("p", "order"), under((0.7, "descending")))
def test_later_requests_stay_under_the_bound(deep, no_attention, p, order):
    """A request finds the memory of the one before: as large, then larger than it needs, then too small."""
    same, again, half, more = peaks(deep, "window", order, p, (LONG, LONG, LONG // 2, LONG + LONG // 4))
    assert same < bound(p) and again < bound(p) + BUDGET
    assert half < bound(p, LONG // 2) + BUDGET
    assert more < bound(p, LONG + LONG // 4) + BUDGET


@pytest.mark.parametrize(
    "policy", [pytest.param(name, marks=[] if name == "snapkv" else pytest.mark.slow) for name in BOUNDED]
)
def test_no_attention_matrix(deep, policy):
    assert peaks(deep, policy, "random")[0] < bound(P)
