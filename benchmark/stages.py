"""The stages: each takes a model and sizes, and yields rows."""

import math
import random
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from statistics import median

from tqdm import tqdm

from benchmark import roofline
from benchmark.peers import PEERS
from benchmark.race import OUT_OF_MEMORY, Contestant, Row, Run, Sizes, race
from benchmark.subjects import Subject
from bound import compiled_graphs
from conversation import Conversation
from engine import Batch, Engine
from errors import UserError
from needs import Needs
from request import Completion, Figures, Request
from sampling import GREEDY

SWITCHES = 20  # random plans of the stage `switch`


def decode(subject: Subject, sizes: Sizes) -> Iterator[Row]:
    """Step time against peers, the full cache and the roofline."""
    own = partial(ours, subject, cache_format=sizes.cache_format)
    engines = [own("full, eager", compile=False), own("full, compiled")]
    for policy in ("h2o", "streaming"):
        engines.append(own(f"{policy} x squeeze, compiled", policy, "squeeze", sizes.budget))
    yield from beside_peers(subject, engines, sizes, "full, compiled", "tokens_per_s")


def prefill(subject: Subject, sizes: Sizes) -> Iterator[Row]:
    """Time to the first token. Equal layers are known before the prompt: what more another plan takes is its price."""
    own = partial(ours, subject, compile=False, cache_format=sizes.cache_format)
    engines = [own("full")]
    for pair in ("h2o squeeze", "streaming uniform", "streaming squeeze", "snapkv uniform", "snapkv perturbation"):
        policy, layers = pair.split()
        engines.append(own(f"{policy} x {layers}", policy, layers, sizes.budget))
    yield from beside_peers(subject, engines, sizes._replace(new=1), "full", "prompt_tokens_per_s")


def beside_peers(subject: Subject, engines: list[Contestant], sizes: Sizes, base: str, key: str) -> Iterator[Row]:
    peers = [PEERS[name](subject) for name in sizes.peers]
    for batch in sizes.batches:
        bases = [*(peer.name for peer in peers), base]
        yield from race(subject, peers + engines, alike(subject, batch, sizes), sizes, bases, key)


def throughput(subject: Subject, sizes: Sizes) -> Iterator[Row]:
    """Tokens per second over the batch, on CUDA first at the largest one that fits."""
    bounded = {layers: ("streaming", layers, sizes.budget) for layers in ("uniform", "squeeze")}
    own = partial(ours, subject, cache_format=sizes.cache_format)
    engines = {name: own(name, *cache) for name, cache in [("full", ()), *bounded.items()]}
    for name, engine in engines.items():
        batch = most_rows(subject, bounded.get(name, ()), sizes)
        while batch:
            [row] = race(subject, [engine], alike(subject, batch, sizes), sizes)
            yield row
            batch = batch * 9 // 10 if row.get("failed") == OUT_OF_MEMORY else 0
    for batch in sizes.batches:
        yield from race(subject, [*engines.values()], alike(subject, batch, sizes), sizes, ["full"])


def batching(subject: Subject, sizes: Sizes) -> Iterator[Row]:
    """Many requests of all lengths; `batches` says how many.

    Our rows that end take the next request, a peer takes batch after batch, each until its longest request has ended.
    There are as many rows as should fit; on a CPU a quarter of the requests.
    """
    most = sizes.prompt + sizes.new
    for count in sizes.batches:
        rng, contestants = random.Random(0), []
        news = [rng.randint(sizes.new // 2 + 1, sizes.new) for _ in range(count)]
        lengths = [rng.randint(sizes.prompt // 4 + 1, sizes.prompt) for _ in range(count)]
        requests = [Request(subject.prompts(1, length)[0], new) for length, new in zip(lengths, news, strict=True)]
        for name, cache in (("squeeze", ("streaming", "squeeze", sizes.budget)), ("full", ())):
            rows = min(count, most_rows(subject, cache, sizes)) or -(-count // 4)
            own = partial(ours, subject, cache_format=sizes.cache_format)
            contestants.append(own(f"{name}, {rows} rows", *cache, batch_size=rows, max_length=most))
        if "generate" in sizes.peers:
            peer = PEERS["generate"](subject)
            contestants.append(Contestant(f"{peer.name}, batches of {rows}", partial(in_batches, peer, rows)))
        bases = [other.name for other in contestants[1:]]
        yield from race(subject, contestants, requests, sizes, bases, "tokens_per_s_with_prefill")


def in_batches(peer: Contestant, rows: int, requests: list[Request]) -> Run:
    runs = [peer.generate(requests[start : start + rows]) for start in range(0, len(requests), rows)]
    return Run([tokens for run in runs for tokens in run.tokens])


def chat(subject: Subject, sizes: Sizes) -> Iterator[Row]:
    """A turn of `prompt` and `new` tokens after so many turns as `batches` says, and near the beginning."""
    form = dict(compile=True, cache_format=sizes.cache_format)
    engine = Engine(subject.model, "streaming", budget=sizes.budget, **form)

    def answer(conversation: Conversation, requests: list[Request]) -> Run:
        seen, [request] = conversation.seen, requests
        stream = conversation.stream(request.ids, request.max_new_tokens)
        list(stream)
        return run_of([stream.completion], seen)

    contestants, requests = [], alike(subject, 1, sizes)
    for count in dict.fromkeys((1, *sizes.batches)):
        conversation = Conversation(engine)
        for _ in tqdm(range(count - 1), f"chat {sizes.shape}", leave=False):  # the warm-up is one more
            answer(conversation, requests)
        contestants.append(Contestant(f"turns before: {count}", partial(answer, conversation), clean=False))
    yield from race(subject, contestants, requests, sizes, ["turns before: 1"])


def switch(subject: Subject, sizes: Sizes) -> Iterator[Row]:
    """What a request pays for a plan never seen before: its time less that of the same request again."""
    rng, layers, [ids] = random.Random(0), subject.model.config.n_layers, subject.prompts(1, sizes.prompt)
    slots = max(32, int(sizes.budget if sizes.budget > 1 else sizes.budget * (sizes.prompt + sizes.new)))
    form = dict(compile=True, cache_format=sizes.cache_format)
    engine = Engine(subject.model, "streaming", plan=[slots] * layers, **form)

    def timed(plan: list[int]) -> float:
        engine.plan = plan
        started = time.perf_counter()
        generated(engine, [Request(ids, sizes.new)])
        return time.perf_counter() - started

    warm_up_s = timed([slots] * layers) + timed(random_plan(rng, layers, slots))
    graphs, plans = compiled_graphs(), [random_plan(rng, layers, slots) for _ in range(SWITCHES)]
    costs = [1e3 * (timed(plan) - timed(plan)) for plan in tqdm(plans, f"switch {sizes.shape}", leave=False)]
    figures = dict(ms_median=median(costs), ms_min=min(costs), ms_max=max(costs), warm_up_s=warm_up_s)
    yield dict(what=f"{SWITCHES} random plans", recompilations=compiled_graphs() - graphs) | figures


def random_plan(rng: random.Random, layers: int, slots: int) -> list[int]:
    """`slots` per layer in the mean, at least 8 in each and mostly different."""
    spare = layers * (slots - 8)
    cuts = sorted(rng.randrange(spare + 1) for _ in range(layers - 1))
    return [8 + end - start for start, end in zip([0, *cuts], [*cuts, spare], strict=True)]


STAGES: dict[str, Callable[[Subject, Sizes], Iterator[Row]]] = {
    stage.__name__: stage for stage in (decode, prefill, throughput, batching, chat, switch)
}


# ---- requests and our engine


def alike(subject: Subject, batch: int, sizes: Sizes) -> list[Request]:
    return [Request(ids, sizes.new) for ids in subject.prompts(batch, sizes.prompt)]


def most_rows(subject: Subject, cache: tuple, sizes: Sizes) -> int:
    """The largest batch that should fit into `sizes.memory`."""
    engine = Engine(subject.model, *cache, compile=True, cache_format=sizes.cache_format)
    needs = Needs.of(engine.sizing, sizes.prompt + sizes.new, sizes.prompt)
    return bisect_right(range(1, 10**6), sizes.memory, key=needs.total)


def ours(
    subject: Subject,
    name: str,
    *cache: str | float,
    compile: bool = True,
    cache_format: str = "dense",
    **limits: int,
) -> Contestant:
    """cache: token policy, layer policy, budget. Each turn has an engine of its own: no cache and no graph stays."""

    def generate(requests: list[Request]) -> Run:
        return generated(Engine(subject.model, *cache, compile=compile, cache_format=cache_format), requests, **limits)

    return Contestant(name, generate)


def generated(engine: Engine, requests: list[Request], **limits: int) -> Run:
    done = {id(completion.request): completion for completion in engine.generate(requests, **limits)}
    run = run_of([done[id(request)] for request in requests])
    return run._replace(prefill_s=math.nan, step_s=math.nan) if limits else run  # those of rows that refill differ


def going_on(engine: Engine, steps: int, until: ExitStack) -> Callable[[list[Request]], Run]:
    """Each turn makes so many tokens more of requests that are alike in length; the first one reads their prompts.

    The first step of a later turn is in no figure.
    """
    batch: Batch | None = None
    own: list[Completion] = []

    def generate(requests: list[Request]) -> Run:
        nonlocal batch
        if batch is None:
            batch = until.enter_context(engine.batch(len(requests), requests[0].length, [GREEDY]))
            own.extend(map(batch.add, requests))
        made, since = len(own[0].tokens), replace(batch.figures)
        while batch.busy and len(own[0].tokens) < made + steps:
            batch.step()
            batch.collect()
            if made and len(own[0].tokens) == made + 1:  # not timed: caches and threads get warm again
                since = replace(batch.figures)
        run = run_of(own, made, steps, since)
        run = run._replace(tokens=[completion.tokens[made:] for completion in own])
        return run._replace(prefill_s=math.nan) if made else run

    return generate


def run_of(completions: list[Completion], seen: int = 0, new: int | None = None, since: Figures | None = None) -> Run:
    """What a batch took, when `seen` tokens came before these `new` ones, and its figures were `since`.

    UserError for a request that has failed.
    """
    for completion in completions:
        if completion.error:
            raise UserError(completion.error)
    figures, request, since = completions[0].figures, completions[0].request, since or Figures()
    decode_tokens, new = figures.decode_tokens - since.decode_tokens, new or request.max_new_tokens
    return Run(
        [completion.tokens for completion in completions],
        figures.prefill_s - since.prefill_s,
        (figures.decode_s - since.decode_s) * len(completions) / decode_tokens if decode_tokens else math.nan,
        figures.compile_s - since.compile_s,
        roofline.valid_slots(figures.plan, seen + len(request.ids), new),
        figures.kv_bytes,
        slot_bytes=figures.kv_bytes / len(completions) / sum(figures.plan),
    )
