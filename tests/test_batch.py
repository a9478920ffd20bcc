"""Files in, files out: what a line may say, what survives a kill, and what memory allows."""

import fcntl
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import begun, random_ids, random_model

import files
import generate
import machine
from batch import Job
from engine import Batch, Engine, Request
from files import Lines
from needs import MOST_ROWS, Needs
from prefill import plan_for
from sampling import Sampling
from tokenizer import NONE, TextStream

ROOT = Path(__file__).resolve().parent.parent
SQUEEZE = ("--policy", "h2o", "--layers", "squeeze", "--budget", "0.4", "--ignore-eos", "--batch-size", 3)


def write(path: Path, lines: list) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def prompts(count: int, new: int = 12) -> list[dict]:
    return [
        {"id": f"n{n}", "prompt_ids": random_ids(5 + 7 * n % 40, n, 2000), "max_new_tokens": new + n % 5}
        for n in range(count)
    ]


def call(capsys, source: Path, output: Path, *args) -> tuple[int, str, str]:
    code = generate.main(["--input", str(source), "--output", str(output), *map(str, args)])
    return code, *capsys.readouterr()


def results(output: Path) -> dict:
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line for line in lines}


def test_a_file_of_prompts(capsys, tmp_path):
    source = write(
        tmp_path / "in",
        [
            {"id": "text", "prompt": "import os", "max_new_tokens": 9},
            {"prompt_ids": [5, 6, 7]},
            "",
            {"id": 7, "prompt": "def main():", "temperature": 0.9, "seed": 3},
            {"id": "7", "prompt": "def main():", "temperature": 0.9},
        ],
    )
    args = ("--max-new-tokens", 6, "--ignore-eos")
    code, out, err = call(capsys, source, tmp_path / "out", *args, "--batch-size", 2, "--json")
    assert (code, err) == (0, "")
    done = results(tmp_path / "out")
    assert set(done) == {"text", 2, 7, "7"}
    for name, prompt, new in (("text", "import os", 9), (7, "def main():", 6)):
        single = ["--prompt", prompt, "--max-new-tokens", str(new), "--ignore-eos", "--json"]
        generate.main(single + ["--temperature", "0.9", "--seed", "3"] * (name == 7))
        want = json.loads(capsys.readouterr().out)
        assert {**done[name], "id": 0} == {
            "id": 0,
            **{key: want[key] for key in ("text", "tokens", "finish_reason", "prompt_tokens")},
        }
    assert done[7]["tokens"] != done["7"]["tokens"]
    figures = json.loads(out)
    assert figures["done"] == 4 and figures["new_tokens"] == 27 and figures["batch_size"] == 2
    assert figures["kv_bytes"] == figures["kv_bytes_full"] == 2 * figures["max_length"] * 8 * 2 * 2 * 32 * 4


def test_stop_strings_and_the_report(capsys, tmp_path):
    source = write(tmp_path / "in", [{"prompt": "import os\nimport sys\n"}])
    call(capsys, source, tmp_path / "whole", "--max-new-tokens", 40)
    whole = results(tmp_path / "whole")[1]["text"]
    stop = whole[7:10]
    code, out, _ = call(capsys, source, tmp_path / "out", "--max-new-tokens", 40, "--stop", stop)
    result = results(tmp_path / "out")[1]
    assert code == 0 and result["text"] == whole[: whole.index(stop)] and result["finish_reason"] == "stop"
    assert "requests 1 done" in out and "new tokens/s over all" in out and "####" in out


BAD = [
    ("{", "not JSON"),
    ("[" * 100_000, "64 deep in each other"),
    ("[1]", "not a JSON object but [1]"),
    ({"id": "a"}, "give one of prompt and prompt_ids"),
    ({"prompt": "a", "prompt_ids": [1]}, "give one of prompt and prompt_ids"),
    ({"prompt": 5}, "prompt must be a string, not 5"),
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt_ids": [1, "2"]}, "prompt_ids must be a list of integers"),
    ({"prompt_ids": [1, 2048]}, "token id 2048 is outside the vocabulary"),
    ({"prompt": "a", "max_new_tokens": 0}, "at least 1, not 0"),
    ({"prompt": "a", "max_new_tokens": 2.5}, "an integer, not 2.5"),
    ({"prompt": "a", "max_new_tokens": 99}, "new tokens exceed max-length 90"),
    ({"prompt": "a", "temperature": -1}, "temperature must be a finite number"),
    ({"prompt": "a", "seed": True}, "seed must be an integer, not true"),
    ({"prompt": "a", "id": 1.5}, "id must be a string or an integer, not 1.5"),
    ({"prompt": "a", "max_tokens": 5}, "unknown field 'max_tokens'; known: id, prompt"),
]


def test_bad_lines_do_not_stop_the_others(capsys, tmp_path):
    source = write(tmp_path / "in", [*(line for line, _ in BAD), {"id": "good", "prompt": "import os"}])
    args = ("--max-new-tokens", 4, "--max-length", 90, "--ignore-eos")
    code, out, err = call(capsys, source, tmp_path / "out", *args)
    assert code == 2 and set(results(tmp_path / "out")) == {"good"} and f"{len(BAD)} bad lines" in out
    for number, (text, (_, words)) in enumerate(zip(err.splitlines(), BAD, strict=True), 1):
        assert text.startswith(f"generate.py: error: {source} line {number}: ") and words in text
    code, out, err = call(capsys, source, tmp_path / "strict", *args, "--strict")
    assert code == 2 and out == "" and err.count("\n") == 1 and "line 1: not JSON" in err
    assert not (tmp_path / "strict").exists()


def test_what_cannot_begin(capsys, tmp_path):
    def refused(*args) -> str:
        code, out, err = call(capsys, *args)
        assert code == 2 and out == "" and err.count("\n") == 1, err
        return err

    source, output = write(tmp_path / "in", prompts(2)), tmp_path / "out"
    twice = write(tmp_path / "twice", [{"id": 2, "prompt": "a"}, {"prompt": "b"}])
    assert "lines 1 and 2 have the same id, 2" in refused(twice, output)
    assert "holds no request" in refused(write(tmp_path / "empty", []), output)
    assert "nowhere is no file" in refused(tmp_path / "nowhere", output)
    assert "make it first" in refused(source, tmp_path / "no" / "out")
    for wrong in (0, -1, "x", 10**30, ""):
        assert f"'{wrong}' is no positive integer below 10**18, nor auto" in refused(
            source, output, "--batch-size", wrong
        )
        assert f"'{wrong}' is no positive integer" in refused(source, output, "--max-length", wrong)
    assert "does not go with --prompt" in refused(source, output, "--prompt", "a")
    assert "needs at least 5" in refused(source, output, "--policy", "streaming", "--budget", 3)
    assert not output.exists()
    assert generate.main(["--prompt", "a", "--resume"]) == 2 and "--resume is for a file" in capsys.readouterr().err
    output.write_text('{"id": 1}\n')
    assert "out exists; --resume goes on" in refused(source, output)
    assert "exists without out.job.json" in refused(source, output, "--resume")


def test_resume(capsys, tmp_path):
    """Whatever of the output is there, the rest is what it would have been; done is done."""
    source, whole, output = write(tmp_path / "in", prompts(8)), tmp_path / "whole", tmp_path / "out"
    args = (*SQUEEZE, "--temperature", 0.8, "--seed", 5)
    assert call(capsys, source, whole, *args)[0] == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    plan = (tmp_path / "whole.job.json").read_bytes()
    (tmp_path / "out.job.json").write_bytes(plan)
    for kept in (b"", lines[3][:1], lines[5] + lines[2] + lines[0][:-1], b"".join(lines)):
        output.write_bytes(kept)
        code, out, err = call(capsys, source, output, *args, "--resume")
        assert (code, err) == (0, ""), err
        assert results(output) == results(whole) and (tmp_path / "out.job.json").read_bytes() == plan
    assert f"requests 0 done, {len(lines)} before" in out
    assert call(capsys, source, output, *args, "--resume", "--save-plan", tmp_path / "plan")[0] == 0
    assert json.loads((tmp_path / "plan").read_text())["plan"] == json.loads(plan)["plan"]  # though nothing was left

    def other(*now) -> str:
        code, out, err = call(capsys, source, output, *args, "--resume", *now)
        assert code == 2 and out == ""
        return err

    assert "--budget was 0.4 and is 0.3" in other("--budget", "0.3")
    assert "--seed was 5 and is 6" in other("--seed", "6")
    with output.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "written by another run" in other()
    output.write_text("what?\n")
    assert "line 1 is no result" in other()
    source.write_text(source.read_text() + "\n")
    assert "the input's sha256" in other()


CHANGES = {
    "shortened": (lambda lines: lines[:7], 8),
    "emptied": (lambda lines: [], 1),
    "changed": (lambda lines: [*lines[:6], lines[6].replace(b"[", b"[7,"), *lines[7:]], 7),
    "grown": (lambda lines: [*lines, lines[0].replace(b"n0", b"new")], 13),
    "torn": (lambda lines: [*lines[:-1], lines[-1][:-9]], 12),
    "reordered": (lambda lines: lines[::-1], 1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("moment", ["begin", "decide", "run"])
def test_an_input_that_changes_meanwhile_is_noticed(capsys, tmp_path, monkeypatch, change, moment):
    """Between the readings, or in the second one, which must have a file larger than what is read ahead."""
    padded = [line | {"id": f"{line['id']}{'-' * 30_000 * (moment == 'run')}"} for line in prompts(12, new=4)]
    source, output = write(tmp_path / "in", padded), tmp_path / "out"
    args = ("--policy", "h2o", "--budget", 8, "--ignore-eos", "--batch-size", 2)
    if moment == "begin":
        assert call(capsys, source, tmp_path / "whole", *args)[0] == 0
    good, (made, number) = source.read_bytes(), CHANGES[change]

    def changing(real):
        def changed(*given, **options):
            if source.read_bytes() == good:
                with source.open("r+b") as file:  # in place, as an editor may
                    file.write(b"".join(made(good.splitlines(keepends=True))))
                    file.truncate()
            return real(*given, **options)

        return changed

    with monkeypatch.context() as patch:
        if moment == "run":
            patch.setattr(files, "append", changing(files.append))
        else:
            patch.setattr(Job, moment, changing(getattr(Job, moment)))
        code, out, err = call(capsys, source, output, *args)
    if moment == "run" and number == 1:  # what has been read is not read again
        number = int(err.split(" is another one")[0].split()[-1])
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert f"in line {number} is another one than when the job began; put it back" in err
    if (tmp_path / "out.job.json").exists():
        code, _, err = call(capsys, source, output, *args, "--resume")
        assert code == 2 and ("the input's sha256" in err or "no request that can run" in err)
        source.write_bytes(good)
        assert call(capsys, source, output, *args, "--resume")[0] == 0
        if moment == "begin":
            assert results(output) == results(tmp_path / "whole")


def test_results_that_are_none_are_named(capsys, tmp_path):
    source, output = write(tmp_path / "in", prompts(3)), tmp_path / "out"
    assert call(capsys, source, output, *SQUEEZE)[0] == 0
    lines = output.read_bytes().splitlines(keepends=True)
    good = json.loads(lines[0])
    odd = [{name: value} for name in good for value in (None, True, [None], {})] + [{"id": "n9"}, {"tokens": [-1]}]
    texts = [json.dumps(good | change) for change in odd] + ["", "[]", "{", "[" * 9999, '{"id": NaN}']
    texts += [json.dumps({name: value for name, value in good.items() if name != left}) for left in good]
    for text in [*texts, lines[1].decode().strip()]:
        output.write_bytes(lines[1] + text.encode() + b"\n" + lines[2][:-5])
        before = output.read_bytes()
        code, out, err = call(capsys, source, output, *SQUEEZE, "--resume")
        assert (code, out) == (2, "") and err.count("\n") == 1 and len(err) < 400
        assert "out line 2 is no result (name another --output): " in err, err
        assert output.read_bytes() == before


def test_lines_that_ask_for_too_much_are_bad_lines(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("batch.Lines", lambda path, most=1000: Lines(path, most))
    big = [{"prompt_ids": [5], "max_new_tokens": new} for new in (10**12, 10**30, 10**399)]
    big += [{"prompt_ids": [5] * 1000}, {"prompt_ids": [10**30]}, {"prompt": "a", "id": 10**30}]
    big += [{"prompt": "a", "temperature": 10**399}, {"prompt": "\ud800"}, {"prompt": "a", "seed": 10**30}]
    source = write(tmp_path / "in", [*big, {"id": "good", "prompt": "import os"}])
    for policy in (("--policy", "full"), ("--policy", "streaming")):
        output = tmp_path / policy[1]
        code, out, err = call(capsys, source, output, *policy, "--max-new-tokens", 4, "--ignore-eos")
        assert code == 2 and set(results(output)) == {"good"} and err.count("\n") == len(big)
        assert max(map(len, err.splitlines())) < 500
        assert [f" line {n}: " in line for n, line in enumerate(err.splitlines(), 1)] == [True] * len(big)


def test_a_drawn_seed_is_kept(capsys, tmp_path):
    source, output = write(tmp_path / "in", prompts(4)), tmp_path / "out"
    args = ("--temperature", 1.0, "--ignore-eos", "--batch-size", 2)
    call(capsys, source, output, *args)
    before = results(output)
    output.write_text("")
    assert call(capsys, source, output, *args, "--resume")[0] == 0
    assert results(output) == before


def killed(tmp_path: Path, source: Path, args: tuple, kills: int, wait: tuple[float, float]) -> Path:
    """A job that is killed again and again, each time a while after a result came, or may have."""
    output, rng = tmp_path / "killed", random.Random(3)
    command = [sys.executable, "generate.py", "--input", source, "--output", output, "--resume", *args]
    command = [str(part) for part in command]
    for _ in range(kills):
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
            before, begun = output.stat().st_size if output.exists() else 0, time.monotonic()
            while run.poll() is None and time.monotonic() < begun + 60:
                if output.exists() and output.stat().st_size > before:
                    break
                time.sleep(0.01)
            time.sleep(rng.uniform(*wait))
            run.send_signal(signal.SIGKILL)
    assert subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0
    return output


def test_kill(capsys, tmp_path):
    source = write(tmp_path / "in", prompts(9, new=20))
    assert call(capsys, source, tmp_path / "whole", *SQUEEZE)[0] == 0
    assert results(killed(tmp_path, source, SQUEEZE, 1, (0, 0.1))) == results(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["full", "streaming"])
def test_thirty_kills_over_200_lines(capsys, tmp_path, policy):
    args = ("--policy", policy, "--ignore-eos", "--batch-size", 8)
    source = ROOT / "results" / "prompts_200.jsonl"
    assert call(capsys, source, tmp_path / "whole", *args)[0] == 0
    whole = results(tmp_path / "whole")
    assert len(whole) == 200 and results(killed(tmp_path, source, args, 30, (0, 0.8))) == whole


@pytest.mark.parametrize("policy", ["full", "streaming", "h2o"])
def test_rows_apart_do_not_know_each_other(policy):
    """float32, bit by bit: any row, any neighbours, any number of them."""
    model, ids = random_model(torch.float32), random_ids(30)
    engine = Engine(model, policy, plan=[90] * 4 if policy == "full" else [14, 20, 17, 12])
    logits = []
    for row, count in ((0, 1), (0, 4), (2, 3), (3, 4)):
        requests = [Request(random_ids(9 + 6 * n, seed=n), 40) for n in range(count)]
        requests[row] = Request(ids, 40)
        with torch.inference_mode():
            decoder = begun(engine, requests, 90, rows=4, apart=True).decoder
            assert decoder.tokens.shape == (4,)
            steps = []
            for token in random_ids(30, seed=8):
                decoder.tokens[row] = token
                steps.append(decoder.logits()[row].clone())
        logits.append(torch.stack(steps))
    assert all(torch.equal(logits[0], other) for other in logits[1:])


def test_rows_apart_need_a_plan(model):
    requests = [Request(random_ids(9), 4)]
    with pytest.raises(ValueError, match="need a plan; squeeze makes it from prompts"):
        next(Engine(model, "window", "squeeze", 8).generate(iter(requests), 2, 20, apart=True))
    engine = Engine(model, "window", "squeeze", 8)
    plan, importance = plan_for(engine.model, engine.sizing, requests, 20)
    figures = next(engine.generate(requests, max_length=20)).figures
    assert plan.slots == figures.plan and importance == figures.importance


def test_short_requests_of_a_batch_use_its_budget(model):
    """A share as budget is of max_length, not of the request."""
    requests = [Request(random_ids(3), 2), Request(random_ids(50), 10)]
    done = list(Engine(model, "streaming", budget=0.2).generate(requests))
    assert [completion.finish_reason for completion in done] == ["length", "length"]


def test_rows_that_fit():
    needs = Needs(weights=100, row=10, row_full=40, step=1, prefill=30)
    assert [needs.total(rows) for rows in (1, 3, 40)] == [141, 163, 570]
    assert [needs._replace(held=20, at_once=2).total(rows) for rows in (1, 3)] == [161, 253]
    assert needs.rows(1000, 162) == 2 and needs.rows(1000, 163) == 3 and needs.rows(2, 163) == 2
    assert needs.rows(1000, 10**9) == MOST_ROWS and needs.rows(9, 1) == 1
    assert machine.free(torch.device("cpu")) > 2**20


def test_max_memory(capsys, tmp_path, monkeypatch):
    source = write(tmp_path / "in", prompts(4, new=200))
    code, out, err = call(capsys, source, tmp_path / "out", "--batch-size", 4, "--max-memory", 0.01)
    assert code == 2 and out == "" and err.count("\n") == 1 and "limit 10.24 MiB; use a smaller --batch-size" in err
    assert "out of memory: weights" in err and "cache of 4 rows" in err and not (tmp_path / "out").exists()
    assert generate.main(["--prompt", "import", "--max-memory", "0.001"]) == 2
    assert "out of memory: weights" in capsys.readouterr().err
    for huge in ("1e300", "1e308", "inf", "nan"):
        assert generate.main(["--prompt", "import", "--max-memory", huge]) == 2
        assert "--max-memory must be a positive number of GiB" in capsys.readouterr().err
    code, out, _ = call(capsys, source, tmp_path / "auto", "--max-memory", 1, "--json", "--max-new-tokens", 3)
    assert code == 0 and json.loads(out)["batch_size"] == 4

    def broken(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 MiB")

    monkeypatch.setattr(Batch, "step", broken)
    code, out, err = call(capsys, source, tmp_path / "oom", "--batch-size", 2)
    assert code == 2 and out == "" and err.count("\n") == 1 and "cache of 2 rows" in err and "--resume goes on" in err


def test_seeds_come_from_the_job_and_the_id(tmp_path):
    source = write(tmp_path / "in", [{"id": n, "prompt_ids": [1]} for n in ("a", "b", 1, "1")])
    sizing = Engine(random_model()).sizing

    def seeds(seed: int) -> list[int]:
        default = Request((), 4, Sampling(1.0, seed=seed))
        job = Job(source, tmp_path / "out", sizing, {}, default, lambda *_: [1], lambda: TextStream(NONE))
        return [line.sampling.seed for line in job.requests(job.survey())]

    assert seeds(1) == seeds(1) and len({*seeds(1), *seeds(2)}) == 8
