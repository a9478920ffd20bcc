"""Odd inputs of all kinds: in the quick tests some, in the slow ones all of them."""

import json

import pytest

from fuzz import run, selftest


def test_every_fault_is_seen(tmp_path):
    """By a program that commits them one after the other."""
    wanted = [("selftest", number) for number in range(len(selftest.NAMES))]
    records = list(run.attempts(wanted, tmp_path, seconds=2, growth=256 << 20))
    assert {record["about"]: record["outcome"] for record in records} == {name: name for name in selftest.NAMES}
    assert {*selftest.NAMES} == {*run.GOOD, *run.FAULTS}
    assert "a fault of ours" in records[selftest.NAMES.index("traceback")]["detail"]
    assert not selftest.OUTSIDE.exists()
    assert "selftest.py" in records[selftest.NAMES.index("hang")]["detail"]  # where it hangs


def test_a_few_of_each_kind(tmp_path):
    """Of the families only four: most of the time goes into making their checkpoints."""
    wanted = run.chosen([kind for kind in run.COUNTS if kind != "configs"], 0.012)
    wanted += [("configs", 11 * number) for number in range(60)]
    records = list(run.attempts(wanted, tmp_path))
    assert not [record for record in records if record["outcome"] not in run.GOOD]
    for kind in run.COUNTS:  # inputs are odd, but not so odd that nothing runs
        outcomes = [record["outcome"] for record in records if record["input"].startswith(kind)]
        assert "one line" in outcomes and {"same result", "other result"} & {*outcomes}


@pytest.mark.slow
def test_all(tmp_path):
    assert sum(run.COUNTS.values()) >= 8000
    out = tmp_path / "fuzz.json"
    assert run.main(["--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["inputs"] == sum(run.COUNTS.values()) and not result["faults"]
