"""On a simulated CUDA device: nothing mixes devices, no step waits, and the tokens are those of the CPU."""

from unittest.mock import patch

import pytest
import torch
from conftest import linear_model, quick, random_ids, random_model
from simulated import Device, OnDevice, moved, simulated
from test_graphs import FORMS

from conversation import Conversation
from decoder import Decoder
from engine import Engine, Request
from formats import FORMATS
from policies.tokens import TOKEN_POLICIES
from sampling import GREEDY, Sampling

BOUNDED = [name for name, policy in TOKEN_POLICIES.items() if policy.bounded]

PLAN = [20, 33]
SAMPLED = Sampling(temperature=0.9, top_k=20, top_p=0.9, seed=3)
MIXED = [(20, 4, SAMPLED), (3, 2, GREEDY), (41, 3, GREEDY), (11, 5, SAMPLED)]


def answers(engine: Engine) -> list[list[int]]:
    """Of a batch whose rows are refilled, of streams, and of a conversation."""
    requests = [Request(random_ids(length, length), new, sampling) for length, new, sampling in MIXED]
    done = {id(completion.request): completion.tokens for completion in engine.generate(requests, batch_size=2)}
    tokens = [done[id(request)] for request in requests]
    tokens += [list(engine.stream(random_ids(33), sampling, 5)) for sampling in (GREEDY, SAMPLED)]
    conversation = Conversation(engine, SAMPLED)
    return tokens + [list(conversation.stream(random_ids(count, count), 3)) for count in (9, 17)]


def steps_do_not_wait(device: Device):
    """While this is open, a step, and asking for its tokens, may not wait."""
    step, ask = Decoder.step, Decoder.ask

    def strict(run):
        def strictly(decoder):
            device.forbidden = True
            try:
                return run(decoder)
            finally:
                device.forbidden = False

        return strictly

    return patch.multiple(Decoder, step=strict(step), ask=strict(ask))


def same_as_on_the_cpu(make) -> None:
    want = answers(make(lambda model: model))
    with simulated() as device, steps_do_not_wait(device):
        engine = make(moved)
        assert engine.device.type == "cuda" and engine.lag == 2
        assert answers(engine) == want
    assert device.waits


@pytest.mark.parametrize("policy", quick("streaming", "h2o", of=TOKEN_POLICIES))
def test_every_policy(policy):
    form, plan = dict(n_layers=2, max_positions=128), None if policy == "full" else PLAN
    same_as_on_the_cpu(lambda place: Engine(place(random_model(**form)), policy, plan=plan))


WAITING = [(policy, layers, form) for policy in BOUNDED for layers in ("squeeze", "perturbation") for form in FORMATS]


@pytest.mark.parametrize(
    "case", quick(("h2o", "squeeze", "dense"), ("snapkv", "perturbation", "int8"), of=WAITING), ids=str
)
def test_prompts_that_wait_for_the_plan(case):
    policy, layers, form = case
    same_as_on_the_cpu(lambda place: Engine(place(random_model(n_layers=3)), policy, layers, 16, cache_format=form))


@pytest.mark.parametrize("form", quick(FORMS[0], of=FORMS), ids=lambda form: next(iter(form)))
def test_every_form(form):
    same_as_on_the_cpu(lambda place: Engine(place(random_model(n_layers=2, **form)), "h2o", plan=PLAN))


def test_linear_attention():
    """Its states are filled, changed and gone on with on the device."""
    plan = [0, 20, 0, 33]
    same_as_on_the_cpu(lambda place: Engine(place(linear_model()), "h2o", plan=plan, cache_format="int8"))


@pytest.mark.parametrize("policy", quick("streaming", "snapkv", of=TOKEN_POLICIES))
def test_reading_a_prompt_waits_once_whatever_the_layers(policy):
    """For the importance, to be reported. While the plan is not known each layer's is looked at by itself."""

    def waits(count: int, *how) -> int:
        with simulated() as device:
            engine = Engine(moved(random_model(n_layers=count)), policy, *how)
            next(iter(engine.stream(random_ids(33), max_new_tokens=2)))
        return device.waits["tolist"] + device.waits["item"] + device.waits["__int__"]

    assert waits(2) == waits(5) == 1
    if policy != "full":
        for layers in ("squeeze", "perturbation"):
            assert waits(5, layers, 16) == waits(2, layers, 16) + 3


def test_the_device_notices():
    with simulated() as device, torch.inference_mode():
        ours, theirs = OnDevice(torch.arange(3.0)), torch.arange(3.0)
        assert torch.equal((ours * 2 + torch.tensor(1.0)).inner, theirs * 2 + 1)
        assert torch.zeros(2, device="cuda").is_cuda and not torch.zeros(2).is_cuda
        for mixing in (
            lambda: ours + theirs,
            lambda: torch.cat((theirs, ours)),
            lambda: theirs[ours.long()],
            lambda: ours.__setitem__(slice(None), theirs),
        ):
            with pytest.raises(AssertionError, match="cpu"):
                mixing()
        assert not device.waits
        for count, waiting in enumerate(
            (
                lambda: int(ours[0]),
                lambda: ours.sum().item(),
                lambda: ours.tolist(),
                lambda: bool((ours == 1).any()),
                lambda: ours.nonzero(),
                lambda: ours[ours > 1],
                lambda: ours[torch.tensor([1, 2])],
                lambda: ours.cpu(),
                lambda: theirs.to("cuda"),
                lambda: ours.copy_(theirs),
                lambda: torch.empty_like(ours, device="cpu", pin_memory=True).copy_(ours),
                lambda: torch.tensor([1, 2], device="cuda"),
            ),
            1,
        ):
            waiting()
            assert sum(device.waits.values()) == count
            device.forbidden = True
            with pytest.raises(AssertionError, match="waits"):
                waiting()
            device.forbidden = False
        torch.empty_like(ours, device="cpu", pin_memory=True).copy_(ours, non_blocking=True)
        ours[1:].mul_(3)
        assert torch.equal(ours.inner, torch.tensor([0.0, 3.0, 6.0])) and sum(device.waits.values()) == count
