"""Generate text from a checkpoint, with a KV cache as small as you like.

    python generate.py --squeeze                                          the embedded model on its demo prompt
    python generate.py --checkpoint meta-llama/Llama-3.2-1B --prompt "Once upon a time" --squeeze --compile
    python generate.py --policy h2o --layers squeeze --p 0.4 --budget 0.2 --prompt-file long.txt
    python generate.py --policy streaming --budget 256 --sinks 4 --json --prompt - < long.txt
    python generate.py --checkpoint Qwen/Qwen3-0.6B --interactive --squeeze --budget 1024
    python generate.py --input prompts.jsonl --output results.jsonl --batch-size 8 --squeeze --resume

Two choices make a cache: --policy says which tokens a layer keeps in its slots (full, window, streaming, h2o,
h2o-mean, tova, snapkv, dropkv, knorm, keydiff), and --layers how many slots each layer gets (uniform, perturbation,
squeeze, mix, pyramid). A policy's own options stand behind its name: snapkv:recent=32, squeeze:p=0.4.
--squeeze is --layers perturbation with a policy and a budget that suit it. The text streams to standard output, then a
short report; --json prints one object instead. --chat wraps the prompt in the checkpoint's own template; --interactive
reads a turn a line and goes on over one cache. --input and --output take many prompts from a file, --batch-size at a
time; see batch.py for the lines.
"""

import argparse
import json
import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

import chat
import checkpoint
import commandline
import machine
import tokenizer as tokenizers
from batch import Job, Summary
from checkpoint import EMBEDDED
from commandline import Parser, guarded, number, positive
from conversation import Conversation
from engine import Engine
from errors import UserError, cut, place, shown
from files import (
    POSITIVE,
    PROMPT_BYTES,
    accessing,
    amount,
    check_apart,
    check_output,
    decoded,
    is_a,
    read_bytes,
    read_json,
    read_stream,
    write_json,
)
from formats import FORMATS
from machine import size
from needs import Needs
from policies import layers as layer_policies
from policies import tokens as token_policies
from request import Completion, Figures, Request, Stream
from sampling import Sampling
from sizing import check_budget

DEMO_PROMPT = EMBEDDED / "demo_prompt.txt"
SQUEEZE_LAYERS, SQUEEZE_POLICY = "perturbation", "dropkv"  # what a bare --squeeze is (RESULTS.md, choices)
TALK_POLICY = "streaming"  # in a conversation, where no first turn says what will be asked, and the latest counts


def main(argv: list[str] | None = None) -> int:
    return guarded("generate.py", lambda: run(parse(argv)))


complain = partial(commandline.complain, "generate.py")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", default=str(EMBEDDED), help="Hugging Face folder, .gguf file or hub id (default: embedded)")
    add("--prompt", metavar="TEXT|-", help="the prompt; - reads standard input")
    add("--prompt-file", metavar="F", help="a UTF-8 file with the prompt")
    add("--prompt-ids", metavar="1,2,3", help="token ids, taken as they are")
    add(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="use the checkpoint's chat template (--interactive: if any)",
    )
    add(
        "--rendered",
        action="store_true",
        default=None,
        help="the prompt is a chat already rendered: names of special tokens in it are those tokens, and none is added "
        "(one that lacks the tokenizer's BOS runs without it)",
    )
    add("--system", metavar="TEXT", help="the system message of a chat")
    add("--interactive", action="store_true", help="go on, a turn a line, over one cache that keeps its size")
    add("--input", metavar="F", help="a file of prompts, a JSON object a line")
    add("--output", metavar="F", help="where the results go, a line each when it is done")
    add("--resume", action="store_true", help="go on with what is in --output, if anything is")
    add("--strict", action="store_true", help="end at the first bad line of --input (default: report it and go on)")
    add("--batch-size", type=rows, metavar="N|auto", help="rows at a time (default auto: what fits into memory)")
    add("--max-length", type=positive, metavar="N", help="tokens of prompt and answer (default: the longest line)")
    add("--max-memory", type=float, metavar="GIB", help="refuse what may need more (default: what is free)")
    add("--max-new-tokens", type=int, default=128, metavar="N")
    word = {"metavar": "NAME[:opt=value,...]"}
    add("--policy", **word, help=f"tokens a layer keeps: {', '.join(token_policies.TOKEN_POLICIES)} (default: full)")
    add("--layers", **word, help=f"slots per layer: {', '.join(layer_policies.LAYER_POLICIES)} (default: uniform)")
    add("--squeeze", action="store_true", help="--layers perturbation, with good defaults for what is not given")
    add("--budget", type=number, help="slots per layer, or the share of prompt + new tokens in (0, 1]")
    add("--p", type=float, help="squeeze, mix: share of the budget that unimportant layers keep, in (0, 1]")
    add("--sinks", type=int, help="streaming: how many first tokens stay for good (default: 4)")
    add("--cache-format", choices=FORMATS, default="dense", help="numbers in slots: the model's (default) or of 8 bits")
    add("--plan", metavar="FILE", help="slots per layer from a file (a JSON list, or what --save-plan or --json wrote)")
    add("--save-plan", metavar="FILE", help="write the plan that was used")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    add("--top-k", type=int)
    add("--top-p", type=float, default=1.0)
    add("--seed", type=int, help="equal seeds give equal text (default: a new one each time)")
    add("--stop", action="append", default=[], metavar="TEXT", help="stop before this text; may be repeated")
    add("--ignore-eos", action="store_true", help="do not stop at end-of-sequence")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="auto", help="auto (the config's), bf16, fp16, fp32 or float64")
    add("--compile", action=argparse.BooleanOptionalAction, help="compile decode (default: on for CUDA)")
    add("--json", action="store_true", help="print one JSON object instead of text")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    # Whatever can be wrong without the weights is found before they are loaded.
    policy, layers = choose_policies(args)
    for stop in args.stop:
        argument_text(stop, "--stop")
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    plan = None if args.plan is None else read_plan(Path(args.plan))
    if args.budget is not None:
        check_budget(args.budget)
    if args.max_memory is not None and not 0 < args.max_memory * 2**30 < math.inf:
        raise UserError(f"--max-memory must be a positive number of GiB, not {args.max_memory}")
    folder = checkpoint.resolve(args.checkpoint)
    check_paths(args, folder)
    tokenizer = tokenizers.load(folder)
    turns = Turns(tokenizer, chosen_template(args, folder, tokenizer), args.system, bool(args.rendered))
    if args.prompt_ids is not None:
        ids = parse_ids(args.prompt_ids)
    elif not args.interactive and args.input is None:
        ids = turns.ids(prompt_text(args))
    text = TextSoFar(tokenizer, args.stop)
    eos_ids = (
        frozenset()
        if args.ignore_eos
        else tokenizers.eos_ids(folder, tokenizer, chat=bool(args.chat or args.interactive))
    )
    device = checkpoint.find_device(args.device)
    limit = machine.free(device) if args.max_memory is None else int(args.max_memory * 2**30)

    def load(plan: list[int] | None = plan) -> Engine:
        model, _ = checkpoint.load(folder, device, args.dtype)
        compiled = args.compile if args.compile is not None else device.type == "cuda"
        return Engine(model, policy, layers, args.budget, plan, compiled, args.cache_format)

    skeleton = checkpoint.skeleton(folder, args.dtype)
    dry = Engine(skeleton, policy, layers, args.budget, plan, cache_format=args.cache_format)
    if args.input is not None:
        default = Request((), args.max_new_tokens, sampling, eos_ids)
        job = Job(
            Path(args.input),
            Path(args.output),
            asked(args, folder, plan, dry),
            default,
            turns.ids if tokenizer else no_tokenizer,
            lambda: TextSoFar(tokenizer, args.stop),
            args.resume,
        )
        return run_job(args, job, dry, limit, load)
    length = dry.model.config.max_positions if args.interactive else len(ids) + args.max_new_tokens
    if not args.interactive:
        dry.sizing.check(ids, args.max_new_tokens)
    needs = Needs.of(dry.sizing, length)
    if args.max_memory is not None or needs.row > limit:  # the rest is an upper bound, the cache is allocated at once
        needs.check(1, limit)
    with needs.explained(1, limit), commandline.compiling():
        engine = load()
        if args.interactive:
            return interact(args, Conversation(engine, sampling), turns, eos_ids)
        stream = engine.stream(ids, sampling, args.max_new_tokens, eos_ids, text.push)
        completion = follow(stream, text, echo=not args.json)
    save_plan(args, engine, completion.figures.plan)
    if args.json:
        print(json.dumps(report_json(args, engine, completion, text.text), allow_nan=False))
    else:
        print(report(engine, completion))
    return 0


def check_paths(args: argparse.Namespace, folder: Path) -> None:
    """UserError unless every output can be written and is no other path of the run."""
    outputs = {"--output": args.output, "--save-plan": args.save_plan}
    if args.output is not None:
        outputs["the state of --output"] = f"{args.output}.job.json"
    inputs = {"--input": args.input, "--prompt-file": args.prompt_file, "--plan": args.plan, "--checkpoint": folder}
    outputs, inputs = ({flag: path for flag, path in paths.items() if path is not None} for paths in (outputs, inputs))
    for flag, path in outputs.items():
        check_output(path, flag)
    check_apart(outputs, inputs)


def asked(args: argparse.Namespace, folder: Path, plan: list[int] | None, dry: Engine) -> dict[str, Any]:
    """The settings on which the results of a job depend. Its batch size does not count: who runs out of memory may
    go on with a smaller one.
    """
    names = """policy layers squeeze budget p sinks max_length max_new_tokens temperature top_k top_p seed stop
    ignore_eos chat rendered system device compile cache_format""".split()
    settings = {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}
    if args.cache_format == FORMATS[0]:  # as in job files that know no other
        del settings["--cache-format"]
    dtype = str(dry.model.dtype).removeprefix("torch.")
    return {"--checkpoint": str(folder.resolve()), **settings, "--plan": plan, "--dtype": dtype}


def no_tokenizer(*_: Any) -> NoReturn:
    raise UserError("the checkpoint has no tokenizer; give prompt_ids")


def run_job(
    args: argparse.Namespace, job: Job, dry: Engine, limit: int, load: Callable[[list[int] | None], Engine]
) -> int:
    def bad(number: int, error: UserError) -> None:
        if args.strict:
            raise UserError(f"{place(args.input)} line {number}: {error}")
        complain(f"{place(args.input)} line {number}: {error}")

    def check(line: Request) -> None:  # one that asks for far too much must not make the cache of all too large
        prompt, length = len(line.ids), len(line.ids) + line.max_new_tokens
        if length > dry.model.config.max_positions:
            Needs.of(dry.sizing, length, prompt, apart=True).check(1, limit)

    survey = job.survey(dry, args.max_length, bad, check)
    length = job.state.get("max_length") or args.max_length or survey.longest
    needs = Needs.of(dry.sizing, length, survey.longest_prompt, apart=True)
    share = 1 if args.max_memory is not None else machine.SHARE
    rows = args.batch_size or job.state.get("batch_size") or needs.rows(survey.count, int(share * limit))
    needs.check(rows, limit)
    file, done = job.begin(survey)
    summary, engine, way = Summary(before=len(done)), dry, f"--resume goes on with what {place(args.output)} holds"
    try:
        with file, needs.explained(rows, limit), commandline.compiling():
            if len(done) < survey.count:
                engine = load(job.state["plan"] if job.state else dry.plan)
                job.decide(engine, survey, rows, length)
                engine.plan = job.state["plan"]
                for summary in job.run(engine, survey, file, done):  # noqa: B007
                    pass
    except KeyboardInterrupt:
        print(f"generate.py: interrupted; {way}", file=sys.stderr)
        return 130
    except UserError as error:
        raise UserError(f"{error}; {way}") from error
    save_plan(args, engine, job.state["plan"])
    result = job_json(args, engine, survey.bad, rows, length, needs.row_full * rows, summary)
    print(json.dumps(result, allow_nan=False) if args.json else job_report(result, summary))
    return 2 if survey.bad or summary.failed else 0


def job_json(
    args: argparse.Namespace,
    engine: Engine,
    bad: dict[int, str],
    rows: int,
    length: int,
    kv_bytes_full: int,
    summary: Summary,
) -> dict[str, Any]:
    figures = {}
    if summary.figures:
        names = """budget_slots plan importance groups kv_bytes state_bytes prefill_s compile_s decode_s
        decode_tokens_per_s""".split()
        figures = {name: getattr(summary.figures, name) for name in names}
    return {
        "output": args.output,
        "done": summary.done,
        "failed": summary.failed,
        "done_before": summary.before,
        "bad_lines": bad,
        "prompt_tokens": summary.prompt_tokens,
        "new_tokens": summary.tokens,
        "seconds": summary.seconds,
        "tokens_per_s": summary.tokens_per_s,
        "batch_size": rows,
        "max_length": length,
        "policy": engine.policy.name,
        "layers": engine.layer_policy.name,
        "budget": args.budget,
        "kv_bytes_full": kv_bytes_full,
        **figures,
        "device": args.device,
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


def job_report(result: dict[str, Any], summary: Summary) -> str:
    bad = f", {len(result['bad_lines'])} bad lines" if result["bad_lines"] else ""
    before = f", {summary.before} before" if summary.before else ""
    failed = f", {summary.failed} of them with an error" if summary.failed else ""
    lines = [f"requests {summary.done} done{failed}{before}{bad}: {result['output']}"]
    if summary.figures:
        kv, full = result["kv_bytes"], result["kv_bytes_full"]
        lines = [
            *layer_table(summary.figures),
            "",
            *lines,
            f"cache    {result['policy']} x {result['layers']}, {result['budget_slots']} slots per layer, "
            f"{result['batch_size']} rows of {result['max_length']} tokens",
            f"KV       {size(kv)} of {size(full)} ({kv / full:.0%} of the full cache), "
            f"policy state {size(result['state_bytes'])}",
            f"speed    {summary.tokens_per_s:,.1f} new tokens/s over all ({summary.prompt_tokens:,} read, "
            f"{summary.tokens:,} new, {summary.seconds:.1f} s)",
        ]
    return "\n".join(lines)


def save_plan(args: argparse.Namespace, engine: Engine, plan: list[int]) -> None:
    if args.save_plan is not None:
        saved = {"plan": plan, "policy": engine.policy.name, "layers": engine.layer_policy.name}
        write_json(args.save_plan, saved)


def choose_policies(args: argparse.Namespace) -> tuple[token_policies.TokenPolicy, layer_policies.LayerPolicy]:
    suits = TALK_POLICY if args.interactive or args.sinks is not None else SQUEEZE_POLICY  # only that one has sinks
    policy = args.policy or (suits if args.squeeze else "full")
    layers = args.layers or (SQUEEZE_LAYERS if args.squeeze else "uniform")
    if args.squeeze and layers.partition(":")[0] != SQUEEZE_LAYERS:
        raise UserError(f"--squeeze means --layers {SQUEEZE_LAYERS}; give one of it and --layers {cut(layers)}")
    if args.squeeze and args.p is not None:
        raise UserError(f"--squeeze means --layers {SQUEEZE_LAYERS}, which has no p; give --layers squeeze --p instead")
    if args.squeeze and policy == "full":
        raise UserError("--squeeze has nothing to squeeze with --policy full; use another, such as streaming")
    if args.squeeze:  # for a job, whose results depend on what was chosen
        args.policy, args.layers = policy, layers
    options = {name: {} if value is None else {name: value} for name, value in (("p", args.p), ("sinks", args.sinks))}
    return token_policies.make(policy, **options["sinks"]), layer_policies.make(layers, **options["p"])


def rows(text: str) -> int | None:
    """None for auto."""
    try:
        return None if text == "auto" else positive(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor auto") from None


def read_plan(path: Path) -> list[int]:
    plan = read_json(path, (dict, list))
    plan = plan.get("plan") if isinstance(plan, dict) else plan
    if plan == [] or not is_a(plan, [POSITIVE]):
        raise UserError(
            f"{place(path)}: a plan is a list of positive integers, slots per layer, or an object that has one; not "
            f"{shown(plan)}"
        )
    return plan


def chosen_template(
    args: argparse.Namespace, folder: Path, tokenizer: tokenizers.Tokenizer | None
) -> chat.ChatTemplate | None:
    """The chat template if the arguments want it. UserError if they do not fit together, or to the checkpoint."""
    sources = [f"--{s}" for s in ("prompt", "prompt-file", "prompt-ids") if vars(args)[s.replace("-", "_")] is not None]
    if len(sources) > 1:
        raise UserError(f"give one of {' and '.join(sources)}, not both")
    if args.prompt_ids is not None and (args.chat or args.interactive):
        raise UserError(f"--prompt-ids are taken as they are; {'--chat' if args.chat else '--interactive'} needs text")
    if args.input is not None and (sources or args.interactive):
        other = sources[0] if sources else "--interactive"
        raise UserError(f"--input brings the prompts; it does not go with {other}")
    if args.rendered and (other := [name for name in ("chat", "interactive", "prompt_ids") if getattr(args, name)]):
        raise UserError(f"--rendered is for a prompt that needs no template; it does not go with {flag(other[0])}")
    if (args.input is None) != (args.output is None):
        raise UserError("--input and --output go together")
    only = [name for name in ("resume", "strict", "batch_size", "max_length") if getattr(args, name)]
    if args.input is None and only:
        raise UserError(f"{flag(only[0])} is for a file of prompts; give --input and --output")
    if args.interactive and args.json:
        raise UserError("--interactive prints text as it comes; it has no --json")
    if args.interactive and args.prompt == "-":
        raise UserError("--interactive reads its turns from standard input; the first one can be a --prompt-file")
    if tokenizer is None and args.prompt_ids is None and args.input is None:
        raise UserError(f"{place(args.checkpoint)} has no tokenizer; give the prompt as --prompt-ids")
    template = chat.load(folder, tokenizer) if args.chat or args.interactive and args.chat is None else None
    if args.chat and template is None:
        raise UserError(
            f"{place(args.checkpoint)} has no chat template; without --chat the prompt is continued as it stands"
        )
    if args.system is not None and template is None:
        raise UserError("--system is a part of a chat; give --chat and a checkpoint that has a chat template")
    return template


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class Turns:
    """A conversation so far, and the ids of its next turn: through the chat template, or as it stands.

    rendered: what `ids` gets is what a chat template gave, unless it is told.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer | None,
        template: chat.ChatTemplate | None,
        system: str | None = None,
        rendered: bool = False,
    ):
        self.tokenizer, self.template, self.rendered = tokenizer, template, rendered
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.begun = False

    def ids(self, text: str, rendered: bool | None = None) -> list[int]:
        """What the user says next. Nothing is kept of it before `add`."""
        if self.rendered if rendered is None else rendered:
            if self.template is not None:
                raise UserError("what is rendered already does not go with --chat")
            return self.tokenizer.encode(text, special=False, parse_special=True)
        if self.template is None:
            return self.tokenizer.encode("\n" + text, special=False) if self.begun else self.tokenizer.encode(text)
        messages = [*self.messages, {"role": "user", "content": text}]
        return self.template.next_turn(messages) if self.begun else self.template.prompt(messages)

    def add(self, text: str, answer: str) -> None:
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        self.begun = True


def parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"--prompt-ids must be integers with commas between, not {shown(text)}") from None


def argument_text(text: str, name: str) -> str:
    """An argument as the text that its bytes are. UserError if they are none."""
    try:
        return decoded(text.encode("utf-8", "surrogateescape"), name)
    except UnicodeEncodeError:
        raise UserError(f"{name} holds half of a surrogate pair, which is no character") from None


def prompt_text(args: argparse.Namespace) -> str:
    if args.prompt not in (None, "-"):
        name, text = "--prompt", argument_text(args.prompt, "--prompt")
    elif args.prompt == "-":
        name = "standard input"
        with accessing(name):
            text = decoded(read_stream(sys.stdin.buffer, name, PROMPT_BYTES), name)
    else:
        path = args.prompt_file or DEMO_PROMPT
        name, text = place(path), decoded(read_bytes(path, PROMPT_BYTES), place(path))
    if not text:
        raise UserError(f"the prompt is empty ({name}); give some text")
    return text


class TextSoFar:
    """The new text as far as it is printable; asks to stop at the first stop string."""

    def __init__(self, tokenizer: tokenizers.Tokenizer | None, stops: list[str]):
        if tokenizer is None and stops:
            raise UserError("--stop needs a tokenizer, and the checkpoint has none")
        self.text, self.printed = "", 0
        self.stream = tokenizers.TextStream(tokenizer, stops, continues=True) if tokenizer else None

    def push(self, tokens: list[int]) -> bool:
        if self.stream:
            self.text += self.stream.push(tokens[-1])
        return self.stopped

    @property
    def stopped(self) -> bool:
        return bool(self.stream and self.stream.stopped)

    def end(self) -> None:
        if self.stream:
            self.text += self.stream.flush()

    def print(self, last: bool = False) -> None:
        sys.stdout.write(self.text[self.printed :] + "\n" * last)
        sys.stdout.flush()
        self.printed = len(self.text)


def interact(args: argparse.Namespace, conversation: Conversation, turns: Turns, eos_ids: frozenset[int]) -> int:
    """A turn a line until the input ends. Text goes to standard output, and what it cost to standard error."""
    code = 0
    for turn, said in enumerate(lines(args), 1):
        try:
            decoded(said.encode("utf-8", "surrogateescape"), "standard input")
            figures = answer(args, conversation, turns, said, eos_ids)
        except UserError as error:  # the conversation is as it was: another turn may fit
            complain(error)
            code = 2
        else:
            print(
                f"[turn {turn}: {conversation.seen:,} tokens so far; KV {size(figures.kv_bytes)}, "
                f"{size(figures.kv_bytes_full)} in full; {figures.decode_tokens_per_s:,.1f} tokens/s]",
                file=sys.stderr,
            )
    return code


def answer(
    args: argparse.Namespace, conversation: Conversation, turns: Turns, said: str, eos_ids: frozenset[int]
) -> Figures:
    text, first = TextSoFar(turns.tokenizer, args.stop), not turns.begun
    ids = turns.ids(said)
    with interruptible() as interrupted:
        stream = conversation.stream(
            ids, args.max_new_tokens, eos_ids, stop=lambda tokens: text.push(tokens) or interrupted()
        )
        completion = stream.completion
        try:
            follow(stream, text, echo=True)
        finally:
            if completion.tokens:  # they are in the cache, whatever became of showing them
                text.end()
                if text.stopped and completion.tokens[-1] in turns.tokenizer.special_ids.values():
                    completion.finish_reason = "eos"  # the next turn begins with what closes this one
                turns.add(said, text.text)
    if first:
        save_plan(args, conversation.engine, completion.figures.plan)
    return completion.figures


def lines(args: argparse.Namespace) -> Iterator[str]:
    """What the user says: first what the arguments say, then the lines of standard input; empty ones are skipped."""
    if args.prompt is not None or args.prompt_file is not None:
        yield prompt_text(args)
    if hasattr(sys.stdin, "reconfigure"):  # else one bad byte would take the lines around it along
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    typed = sys.stdin.isatty()
    while True:
        try:
            line = input("> ") if typed else sys.stdin.readline(PROMPT_BYTES + 1)
        except (EOFError, KeyboardInterrupt):
            return
        if not (line or typed):  # the end
            return
        if len(line) > PROMPT_BYTES:
            raise UserError(f"a line of standard input holds more than {amount(PROMPT_BYTES)}; shorten it")
        if line := line.removesuffix("\n"):
            yield line


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether Ctrl-C was pressed: an answer ends between two tokens. Twice ends it all."""
    pressed = []

    def press(*_) -> None:
        pressed.append(True)
        if len(pressed) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
    if len(pressed) > 1:  # within a step, which left the cache as nobody knows
        raise KeyboardInterrupt


def follow(stream: Stream, text: TextSoFar, echo: bool) -> Completion:
    """Consume the stream, printing as it comes. Ctrl-C ends it with what was generated so far.

    UserError for logits that are not finite, with the text before them printed.
    """
    steps = iter(stream)
    try:
        for _ in steps:
            if echo:
                text.print()
    except KeyboardInterrupt:
        if stream.completion.figures is None:
            raise
        stream.completion.finish_reason = stream.completion.finish_reason or "interrupted"
    text.end()
    if echo and (text.text or not stream.completion.error):
        text.print(last=True)
    if stream.completion.error:
        raise UserError(stream.completion.error)
    return stream.completion


def report_json(args: argparse.Namespace, engine: Engine, completion: Completion, text: str) -> dict[str, Any]:
    request, figures = completion.request, completion.figures
    return {
        "tokens": completion.tokens,
        "text": text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(request.ids),
        "max_new_tokens": request.max_new_tokens,
        "policy": engine.policy.name,
        "layers": engine.layer_policy.name,
        "budget": args.budget,
        "budget_slots": figures.budget_slots,
        "plan": figures.plan,
        "importance": figures.importance,
        "groups": figures.groups,
        "kv_bytes": figures.kv_bytes,
        "state_bytes": figures.state_bytes,
        "kv_bytes_full": figures.kv_bytes_full,
        "prefill_s": figures.prefill_s,
        "compile_s": figures.compile_s,
        "decode_s": figures.decode_s,
        "decode_tokens_per_s": figures.decode_tokens_per_s,
        "device": str(engine.device),
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


def report(engine: Engine, completion: Completion) -> str:
    """A table of the layers with a bar for their slots, then bytes and speed."""
    figures = completion.figures
    return "\n".join(["", *layer_table(figures), "", *summary(engine, completion)])


def layer_table(figures: Figures, width: int = 40) -> list[str]:
    lines = ["layer  signal  group  slots"]
    for layer, slots in enumerate(figures.plan):
        group = "-" if figures.groups is None else figures.groups[layer]
        bar = "#" * max(1, round(width * slots / max(figures.plan)))
        signal = "-" if figures.importance is None else f"{figures.importance[layer]:.3f}"
        lines.append(f"{layer:5}  {signal:>6}  {group:>5}  {slots:5}  {bar}")
    return lines


def summary(engine: Engine, completion: Completion) -> list[str]:
    figures, request = completion.figures, completion.request
    chosen = (
        " (chosen to suit; --budget sets it)"
        if engine.sizing.budget is engine.plan is None and engine.policy.bounded
        else ""
    )
    decode = f"{figures.decode_tokens_per_s:,.1f} tokens/s ({len(completion.tokens)} new, {completion.finish_reason})"
    return [
        f"cache    {engine.policy.name} x {engine.layer_policy.name}, {figures.budget_slots} slots per layer{chosen} "
        f"for {len(request.ids)} + {request.max_new_tokens} tokens",
        f"KV       {size(figures.kv_bytes)} of {size(figures.kv_bytes_full)} "
        f"({figures.kv_bytes / figures.kv_bytes_full:.0%} of the full cache), {engine.sizing.format}, "
        f"policy state {size(figures.state_bytes)}",
        f"prefill  {figures.prefill_tokens / figures.prefill_s:,.0f} tokens/s ({figures.prefill_s:.3f} s)",
        f"decode   {decode}" + (f", compiled in {figures.compile_s:.1f} s" if figures.compile_s else ""),
    ]


if __name__ == "__main__":
    sys.exit(main())
