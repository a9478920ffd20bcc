"""The command line: its JSON, its report, and one clear line for everything that can be wrong."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import demo
import get_model
import pytest

import chat
import checkpoint
import generate
import tokenizer as tokenizers
from conversation import Conversation
from engine import Engine
from tokenizer import TextStream

ROOT = Path(__file__).resolve().parent.parent
KEYS = """tokens text finish_reason prompt_tokens max_new_tokens policy layers budget budget_slots plan importance
groups kv_bytes state_bytes kv_bytes_full prefill_s compile_s decode_s decode_tokens_per_s device dtype torch""".split()
IDS = ",".join(str(1 + 7 * i % 2000) for i in range(700))


def run(capsys, *args: str) -> str:
    assert generate.main([str(arg) for arg in args]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def run_json(capsys, *args) -> dict:
    return json.loads(run(capsys, "--json", "--ignore-eos", *args))


def refused(capsys, *args) -> str:
    """The one line that a refused call prints."""
    code = generate.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("generate.py: error: ")
    return err


def process(*args: str, **options) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "generate.py"), *args]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # In a shell's background job Ctrl-C is ignored, and children inherit that.
    return subprocess.Popen(
        command, **pipes, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options
    )


def test_squeeze_json(capsys, tmp_path):
    plan = tmp_path / "plan.json"
    args = ("--prompt-ids", IDS, "--max-new-tokens", 24)
    result = run_json(capsys, "--squeeze", "--save-plan", plan, *args)
    assert list(result) == KEYS
    assert result["prompt_tokens"] == 700 and len(result["tokens"]) == 24 and result["finish_reason"] == "length"
    assert result["layers"] == "perturbation" and len(result["importance"]) == len(result["plan"]) == 8
    assert len(set(result["plan"])) >= 2 and result["groups"] is None
    grouped = run_json(capsys, "--policy", "h2o", "--layers", "squeeze", "--budget", "0.4", *args)
    assert len(set(grouped["plan"])) == 2 and set(grouped["groups"]) == {0, 1, 2}
    granule = max(1, min(16, result["budget_slots"] // 8))
    assert abs(sum(result["plan"]) - 8 * result["budget_slots"]) < granule
    slot = 2 * 2 * 32 * 4  # K and V, key-value heads, head_dim, float32
    assert result["kv_bytes"] == sum(result["plan"]) * slot
    assert result["kv_bytes_full"] == 724 * 8 * slot

    policy = result["policy"]
    for given in ("--squeeze", "--policy", policy), ("--policy", policy):
        again = run_json(capsys, *given, "--plan", plan, *args)
        assert again["tokens"] == result["tokens"] and again["plan"] == result["plan"]
        assert f"cache    {policy} x the plan in " in run(capsys, *given, "--plan", plan, *args)
    written = tmp_path / "result.json"
    written.write_text(json.dumps(result))
    assert run_json(capsys, "--policy", policy, "--plan", written, *args)["tokens"] == result["tokens"]


def test_a_cache_of_8_bits(capsys):
    """A quarter of the bytes, and 2 for each of K and V of a slot and head."""
    args = ("--prompt-ids", IDS, "--max-new-tokens", 16, "--policy", "h2o", "--budget", 0.3)
    dense, small = (run_json(capsys, *args, "--cache-format", form) for form in ("dense", "int8"))
    assert small["kv_bytes"] == dense["kv_bytes"] * (32 + 2) // (32 * 4) and small["plan"] == dense["plan"]
    assert small["kv_bytes_full"] == dense["kv_bytes_full"]
    assert "cache-format" in refused(capsys, "--cache-format", "int4")


def test_enough_slots_equal_full(capsys):
    args = ("--prompt-ids", IDS, "--max-new-tokens", 16)
    full = run_json(capsys, *args)
    assert full["policy"] == "full" and full["groups"] is None and full["budget"] is None
    assert full["plan"] == [716] * 8 and full["kv_bytes"] == full["kv_bytes_full"] and full["state_bytes"] == 0
    for policy in ("window", "streaming", "h2o"):
        result = run_json(capsys, "--policy", policy, "--layers", "pyramid", "--budget", "1", *args)
        assert result["tokens"] == full["tokens"] and result["budget"] == 1


def test_text_streams_and_the_report_follows(capsys):
    out = run(capsys, "--squeeze", "--prompt", "def main(", "--max-new-tokens", 30)
    text, report = out.split("\n\nlayer ")
    result = run_json(capsys, "--squeeze", "--prompt", "def main(", "--max-new-tokens", 30)
    assert text.rstrip("\n") == result["text"].rstrip("\n")
    assert "tokens/s" in report and "of the full cache" in report and "####" in report
    assert "compiled" not in report and result["compile_s"] == 0


def test_three_words_with_a_bare_squeeze(capsys):
    args = ("--squeeze", "--prompt", "import os and", "--max-new-tokens", 5)
    result = run_json(capsys, *args)
    assert len(result["tokens"]) == 5 and result["kv_bytes"] <= result["kv_bytes_full"]
    assert f"{result['budget_slots']} slots per layer (chosen to suit" in run(capsys, *args)


def test_stop_strings(capsys):
    args = ("--prompt", "import os\nimport sys\n", "--max-new-tokens", 60)
    text = run_json(capsys, *args)["text"]
    stop = text[7:10]
    result = run_json(capsys, *args, "--stop", "never seen", "--stop", stop)
    assert result["text"] == text[: text.index(stop)] and result["finish_reason"] == "stop"


def test_equal_seeds_give_equal_text(capsys):
    args = ("--prompt", "import", "--max-new-tokens", 20, "--temperature", 0.8, "--top-k", 50, "--top-p", 0.95)
    first, again, other = (run_json(capsys, *args, "--seed", seed)["tokens"] for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--checkpoint", "./nowhere"], "nowhere does not exist"),
        (["--policy", "lru"], "unknown policy 'lru'; known: full"),
        (["--layers", "cone"], "unknown layer policy 'cone'; known: uniform"),
        (["--squeeze", "--layers", "squeeze"], "--squeeze means --layers perturbation"),
        (["--squeeze", "--p", "0.3"], "give --layers squeeze --p instead"),
        (["--squeeze", "--policy", "full"], "nothing to squeeze"),
        (["--policy", "full", "--budget", "0.5"], "takes no budget, not 0.5"),
        (["--squeeze", "--budget", "0"], "not 0"),
        (["--squeeze", "--budget", "-4"], "not -4"),
        (["--squeeze", "--budget", "1.5"], "not 1.5"),
        (["--squeeze", "--budget", "nan"], "not nan"),
        (["--squeeze", "--budget", "much"], "'much'"),
        (["--policy", "streaming", "--budget", "4"], "needs at least 5"),
        (["--policy", "streaming", "--sinks", "0"], "sinks must be"),
        (["--policy", "window", "--sinks", "4"], "no option 'sinks'"),
        (["--policy", "h2o", "--layers", "squeeze", "--p", "0"], "p must be in (0, 1], not 0.0"),
        (["--policy", "h2o", "--layers", "squeeze", "--p", "1.2"], "not 1.2"),
        (["--p", "0.5"], "no option 'p'"),
        (["--prompt", ""], "prompt is empty"),
        (["--prompt-ids", ""], "prompt is empty"),
        (["--prompt-ids", "1,2048"], "2048 is outside the vocabulary (0 to 2047)"),
        (["--prompt-ids", "1,x"], "'1,x'"),
        (["--prompt", "a", "--prompt-ids", "1"], "not both"),
        (["--prompt-ids", IDS, "--max-new-tokens", "1349"], "exceed the model's 2048 positions"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt"),
        (["--max-new-tokens", "0"], "at least 1, not 0"),
        (["--max-new-tokens", "few"], "'few'"),
        (["--temperature", "-1"], "not -1.0"),
        (["--top-k", "0"], "not 0"),
        (["--top-p", "1.5"], "not 1.5"),
        (["--seed", "-1"], "not -1"),
        (["--stop", ""], "non-empty"),
        (["--stop", "a\udcff"], "--stop is not UTF-8: byte 0xff at 1"),
        (["--stop", "\ud800"], "--stop holds half of a surrogate pair"),
        (["--device", "abacus"], "'abacus' is not available"),
        (["--dtype", "int4"], "'int4' is not supported"),
        (["--plan", "nowhere.json"], "nowhere.json"),
        (["--save-plan", "nowhere/plan.json"], "folder does not exist"),
        (["--frobnicate"], "--frobnicate"),
        (["--chat"], "has no chat template; without --chat the prompt is continued as it stands"),
        (["--system", "Be brief."], "--system is a part of a chat"),
        (["--chat", "--prompt-ids", "1,2"], "--chat needs text"),
        (["--interactive", "--prompt-ids", "1,2"], "--interactive needs text"),
        (["--interactive", "--json"], "has no --json"),
        (["--interactive", "--prompt", "-"], "reads its turns from standard input"),
    ],
    ids=" ".join,
)
def test_bad_input(capsys, args, words):
    args = [arg if len(arg) < 99 else IDS for arg in args]
    assert words in refused(capsys, *args)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1, 2", "not JSON"),
        ("[64, -1, 1]", "integers, slots per layer"),
        ("[64, 64]", "2 layers, the model 8"),
        ("[9, 9, 9, 0, 9, 9, 9, 9]", "integers from 1 to"),
        ("{}", "plan"),
    ],
)
def test_bad_plans(capsys, tmp_path, content, words):
    plan = tmp_path / "plan.json"
    plan.write_text(content)
    assert words in refused(capsys, "--policy", "window", "--plan", plan)


def test_invalid_utf8(capsys, tmp_path):
    file = tmp_path / "latin1.txt"
    file.write_bytes("caf\xe9 au lait".encode("latin-1"))
    assert "latin1.txt is not UTF-8: byte 0xe9 at 3" in refused(capsys, "--prompt-file", file)
    with process("--prompt", "-", stdin=file.open()) as call:
        out, err = call.communicate()
    assert (call.returncode, out) == (
        2,
        "",
    ) and err == "generate.py: error: standard input is not UTF-8: byte 0xe9 at 3\n"


def test_prompt_from_standard_input(capsys):
    with process("--prompt", "-", "--max-new-tokens", "8", "--json", stdin=subprocess.PIPE) as call:
        out, err = call.communicate("import os\n")
    assert call.returncode == 0, err
    result = run_json(capsys, "--prompt", "import os\n", "--max-new-tokens", 8)
    assert json.loads(out)["tokens"] == result["tokens"]


def test_a_folder_without_tokenizer(capsys, tmp_path):
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        os.symlink(generate.EMBEDDED / name, tmp_path / name)
    result = run_json(capsys, "--checkpoint", tmp_path, "--prompt-ids", "5,6,7", "--max-new-tokens", 4)
    assert result["text"] == "" and len(result["tokens"]) == 4
    assert "no tokenizer" in refused(capsys, "--checkpoint", tmp_path, "--prompt", "a")
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"prompt_ids": [5, 6, 7]}, {"prompt": "a"}, {"prompt": "a", "rendered": True}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = ["--checkpoint", str(tmp_path), "--input", str(source), "--output", str(output), "--max-new-tokens", "4"]
    assert generate.main(job) == 2 and json.loads(output.read_text())["id"] == 1
    assert capsys.readouterr().err.count("the checkpoint has no tokenizer; give prompt_ids") == 2
    assert "--stop needs a tokenizer" in refused(capsys, "--checkpoint", tmp_path, "--prompt-ids", "5", "--stop", "x")


def test_a_closed_pipe_is_no_traceback():
    with process("--prompt", "import", "--max-new-tokens", "400", "--ignore-eos") as call:
        call.stdout.read(1)
        call.stdout.close()
        assert call.stderr.read() == ""
    assert call.wait() == 141


def test_interrupt_ends_with_what_was_generated():
    with process("--squeeze", "--prompt", "import", "--ignore-eos", "--max-new-tokens", "100000") as call:
        call.stdout.read(20)
        call.send_signal(signal.SIGINT)
        out, err = call.communicate(timeout=60)
    assert call.returncode == 0 and err.startswith("generate.py: 100001 tokens are more") and err.count("\n") == 1, err
    assert "interrupted" in out and "tokens/s" in out


def test_interrupted_json(capsys, monkeypatch):
    ends = TextStream.ends

    def interrupted(self, tokens):
        if len(tokens) == 6:
            raise KeyboardInterrupt
        return ends(self, tokens)

    monkeypatch.setattr(TextStream, "ends", interrupted)
    result = run_json(capsys, "--squeeze", "--prompt", "import os")
    assert result["finish_reason"] == "interrupted" and len(result["tokens"]) == 6
    assert len(result["plan"]) == len(result["importance"]) == 8 and result["decode_tokens_per_s"] > 0


def test_interrupt_before_the_first_token(capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "load", interrupted)
    assert generate.main(["--prompt", "import os"]) == 130
    assert capsys.readouterr() == ("", "generate.py: interrupted\n")


def linked(tmp_path: Path, template: str | None = None) -> Path:
    """The embedded checkpoint, with a chat template."""
    for file in generate.EMBEDDED.iterdir():
        os.symlink(file, tmp_path / file.name)
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    return tmp_path


TEMPLATE = """{% for message in messages %}{% if message.role == "system" and "never" in message.content %}
{{ raise_exception("no such system message") }}{% endif %}# {{ message.role }}: {{ message.content }}
{% endfor %}# assistant: """


def converse(capsys, monkeypatch, said: str, *args) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    code = generate.main(["--interactive", "--max-new-tokens", "12", "--ignore-eos", *map(str, args)])
    return code, *capsys.readouterr()


def test_chat(capsys, tmp_path):
    folder = linked(tmp_path, TEMPLATE)
    args = ("--checkpoint", folder, "--max-new-tokens", 8)
    chat = run_json(capsys, *args, "--chat", "--system", "Be brief.", "--prompt", "import os")
    plain = run_json(capsys, *args, "--prompt", "# system: Be brief.\n# user: import os\n# assistant: ")
    assert chat["tokens"] == plain["tokens"] and chat["prompt_tokens"] == plain["prompt_tokens"]
    refusal = refused(capsys, *args, "--chat", "--system", "never", "--prompt", "import os")
    assert "the chat template refuses these messages: no such system message" in refusal


def test_a_broken_chat_template(capsys, tmp_path):
    folder = linked(tmp_path, "{% for message in messages %}")
    assert "chat_template.jinja: line 1 of the chat template" in refused(capsys, "--checkpoint", folder, "--chat")


def test_template_options(capsys, tmp_path):
    """As JSON, as Python writes it, or as text; in a single chat and in a conversation."""
    folder = linked(tmp_path, "{{ a | tojson }}{{ b | tojson }}{{ c }}" + TEMPLATE)
    options = ("--template-option", "a=False", "--template-option", 'b={"x": [1]}', "--template-option", "c=high=1")
    wanted = tokenizers.load(folder).encode('false{"x": [1]}high=1# user: x\n# assistant: ', special=False)
    for talk in ("--chat", "--interactive"):
        asked = generate.Asked(generate.parse(["--checkpoint", str(folder), talk, *options]))
        assert asked.turns.ids("x") == wanted
    args = ("--checkpoint", folder, "--prompt", "x")
    wrong = refused(capsys, *args, "--chat", "--template-option", "d=1")
    assert "the chat template reads no 'd'; its options are: a, b, c" in wrong
    assert "must be NAME=VALUE" in refused(capsys, *args, "--chat", "--template-option", "a")
    assert "--template-option is for a chat" in refused(capsys, *args, *options)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_interactive(capsys, tmp_path, monkeypatch, template):
    """The answers of the engine's own conversation; memory stays; every turn reports."""
    folder = linked(tmp_path, template)
    said = ["import os", "def main():", "class Stream:"]
    budget = ("--policy", "streaming", "--layers", "squeeze", "--budget", 48)
    given = "\n\n".join(said) + "\n"
    code, out, err = converse(capsys, monkeypatch, given, "--checkpoint", folder, *budget)
    assert code == 0
    assert len(reports := err.splitlines()) == 3 and len({line.split("; ")[1].split(",")[0] for line in reports}) == 1
    assert [f"[turn {n}: " in line and "tokens/s]" in line for n, line in enumerate(reports, 1)] == [True] * 3

    model, _ = checkpoint.load(folder)
    tokenizer = tokenizers.load(folder)
    turns = chat.Turns(tokenizer, template and chat.load(folder, tokenizer))
    conversation = Conversation(Engine(model, "streaming", "squeeze", 48))
    expected = ""
    for text in said:
        answer = tokenizer.decode(list(conversation.stream(turns.ids(text), max_new_tokens=12)))
        turns.add(text, answer)
        expected += answer + "\n"
    assert out == expected

    # The first turn may come from a file.
    (tmp_path / "first.txt").write_text(said[0])
    rest = "\n".join(said[1:])
    args = ("--prompt-file", tmp_path / "first.txt", "--checkpoint", folder, *budget)
    assert converse(capsys, monkeypatch, rest, *args)[1] == expected


def test_a_turn_that_does_not_fit(capsys, monkeypatch):
    """One line for it; the others are answered as if it had not been said, and the exit code tells."""
    long = "import os " * 2000
    code, out, err = converse(capsys, monkeypatch, f"import os\n{long}\ndef main():\n")
    assert code == 2 and err.count("\n") == 3 and "exceed the model's 2048 positions" in err
    assert (0, out) == converse(capsys, monkeypatch, "import os\ndef main():\n")[:2]


def test_a_conversation_beyond_the_positions_is_told_once(capsys, monkeypatch):
    monkeypatch.setattr("config.ModelConfig.reach", 20)
    for policy, told in (("h2o", 1), ("streaming", 0)):
        code, _, err = converse(capsys, monkeypatch, "a\nb\nc\nd\n", "--policy", policy, "--budget", 30)
        assert code == 0 and err.count("tokens are more than the 20 positions that the model is made for") == told


def test_interrupting_an_answer_keeps_the_conversation():
    args = ["--interactive", "--policy", "streaming", "--budget", "64", "--ignore-eos", "--max-new-tokens", "1000000"]
    with process(*args, stdin=subprocess.PIPE) as call:
        for _ in range(2):
            call.stdin.write("import os\n")
            call.stdin.flush()
            call.stdout.read(20)
            call.send_signal(signal.SIGINT)
        out, err = call.communicate(timeout=60)
    assert call.returncode == 0 and err.count("[turn ") == 2, err


def test_what_compiles_is_not_loaded_for_who_does_not():
    """Dynamo takes longer to import than the embedded model to answer."""
    run = "import sys, generate; generate.main(['--max-new-tokens', '2']); assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", run], cwd=ROOT, check=True, capture_output=True)


def test_the_demos_ask_for_what_they_show(monkeypatch, capsys):
    """With and without a real model: the full cache, the squeezed one, and equal layers."""
    asked = []
    monkeypatch.setattr(generate, "main", lambda argv: asked.append(generate.parse(argv)) or 0)
    monkeypatch.setattr(get_model, "get", lambda name: "model.gguf")
    for name in ([], ["smollm2"], ["gemma3"]):
        assert demo.main(name) == 0
    assert [args.squeeze for args in asked] == [False, True, False] * 3
    assert capsys.readouterr().out.count("===") == 9
