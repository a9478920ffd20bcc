"""Words of a command line that stand for a policy and its options, on both axes."""

from dataclasses import fields

import pytest

import evaluate
import generate
from evaluation.cells import FULL, grid
from policies import layers, options, tokens

AXES = [(layers, layers.LAYER_POLICIES), (tokens, tokens.TOKEN_POLICIES)]
SAMPLES = {bool: "true", int: "32", float: "1.0", str | tuple[float, ...]: "1/2/4", str: "last"}


@pytest.mark.parametrize("axis, name", [(axis, name) for axis, known in AXES for name in known])
def test_every_option_of_every_policy_has_its_type(axis, name):
    policy = type(axis.make(name))
    for field in fields(policy):
        made = axis.make(f"{name}:{field.name}={SAMPLES[field.type]}")
        value = getattr(made, field.name)
        assert value in (True, 32, 1.0, (1.0, 2.0, 4.0), "last") and made == policy(**{field.name: value})
        assert type(value) in (field.type, tuple)
        if field.type is not str:
            with pytest.raises(ValueError, match=f"{field.name} must be "):
                axis.make(f"{name}:{field.name}=x")
        for word, words in {
            f"{name}:{field.name}": "is no option=value",
            f"{name}:{field.name}=1,{field.name}=1": f"gives {field.name} twice",
            f"{name}:{field.name}=1,nothing=1": "has no option 'nothing'; it has: ",
        }.items():
            if field.type in (int, float) or "=" not in word:
                with pytest.raises(ValueError, match=words):
                    axis.make(word)
    with pytest.raises(ValueError, match="no option"):
        axis.make(f"{name}:")


def test_an_option_in_the_word_and_beside_it():
    assert layers.make("squeeze", p=0.2) == layers.make("squeeze:p=0.2") == layers.Squeeze(0.2)
    with pytest.raises(ValueError, match="'squeeze:p=0.2' gives p, and so does --p"):
        layers.make("squeeze:p=0.2", p=0.2)


def test_lists_of_words():
    text = "snapkv:recent=32,dropkv;perturbation:where=last, queries=64,uniform , squeeze:p=0.3"
    wanted = ["snapkv:recent=32", "dropkv", "perturbation:where=last,queries=64", "uniform", "squeeze:p=0.3"]
    assert options.words(text) == wanted
    assert options.words("h2o,p=3") == ["h2o", "p=3"]  # an option of nothing is a policy that does not exist


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--policy snapkv:recent=x", "recent must be a whole number, not 'x'"),
        ("--policy streaming:sinks=2 --sinks 3", "'streaming:sinks=2' gives sinks, and so does --sinks"),
        ("--layers squeeze:p=0.2 --p 0.3 --policy h2o", "'squeeze:p=0.2' gives p, and so does --p"),
        ("--squeeze --layers pyramid:beta=9", "--squeeze means"),
    ],
)
def test_generate_refuses(capsys, args, words):
    assert generate.main(args.split()) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--policies snapkv:recent=x", "recent must be a whole number, not 'x'"),
        ("--layers squeeze:p=2", "p must be in (0, 1]"),
        ("--layers squeeze:p=0.2,uniform;squeeze:q=1", "has no option 'q'"),
    ],
)
def test_evaluate_refuses(capsys, args, words):
    assert evaluate.main(args.split()) == 2
    assert words in capsys.readouterr().err


def test_words_of_a_grid():
    cells = grid(["h2o:corrected=true", "full"], ["squeeze:p=0.2", "mix:share=0.5", "pyramid:beta=5"], [0.5, 8])
    assert cells[0] == FULL and [cell.budget for cell in cells[1:]] == [0.5, 8] * 3
    plans = [layers.Squeeze(0.2), layers.Mix(share=0.5), layers.Pyramid(5)]
    assert [cell.layer_policy() for cell in cells[1::2]] == plans
    assert {cell.token_policy() for cell in cells[1:]} == {tokens.H2O(corrected=True)}
