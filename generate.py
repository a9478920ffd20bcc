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

from commandline import THREADS, compiling, complain, guarded  # first: Ctrl-C is one line from here on

# isort: split
import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from hashlib import file_digest
from pathlib import Path
from typing import Any

import torch

import machine
import parallel
from arguments import Asked, parse, said, text_of
from batch import Job, Summary
from checkpoint import EMBEDDED
from conversation import Conversation
from errors import UserError, in_bytes, place, shown
from files import PROMPT_BYTES, accessing, decoded, exclusive, read_stream, read_text
from needs import Needs
from promptcache import PromptCache
from request import Completion, Figures, Request, Stream
from tokenizer import TextStream

DEMO_PROMPT = EMBEDDED / "demo_prompt.txt"
FIGURES = """budget_slots plan importance groups kv_bytes state_bytes kv_bytes_full prefill_s compile_s decode_s
decode_tokens_per_s""".split()


def main(argv: list[str] | None = None) -> int:
    return guarded("generate.py", lambda: run(parse(argv, __doc__)))


def run(args: argparse.Namespace) -> int:
    machine.use_threads(args.threads)
    with parallel.ranks(args.device):
        asked = Asked(args)
        if args.input is not None:
            return run_job(asked)
        return interact(asked) if args.interactive else answer_prompt(asked)


def result_json(asked: Asked, own: dict[str, Any], figures: Figures | None) -> dict[str, Any]:
    """What a run gave: keys of its own, what was asked for, and what it cost if anything ran."""
    sizing = asked.sizing
    return {
        **own,
        "policy": sizing.policy.name,
        "layers": sizing.layer_policy.name,
        "budget": asked.args.budget,
        **{name: getattr(figures, name) for name in FIGURES if figures},
        **(of_ranks(figures) if figures else {}),
        "device": str(asked.device),
        "dtype": str(sizing.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


def of_ranks(figures: Figures) -> dict[str, int]:
    """What several ranks have together. Key-value heads that some of them share are stored by each."""
    own = parallel.shard()
    if own.world == 1:
        return {}
    stored = {name: getattr(figures, name) * own.world for name in ("kv_bytes", "state_bytes")}
    return stored | {"kv_bytes_full": figures.kv_bytes_full * own.world // own.sharers, "ranks": own.world}


def report(asked: Asked, result: dict[str, Any], of: str) -> list[str]:
    """For a reader: a table of the layers with a bar for their slots, then the cache and its bytes."""
    plan, signals, groups = result["plan"], result["importance"], result["groups"]
    lines = ["layer  signal  group  slots"]
    for layer, slots in enumerate(plan):
        signal = f"{signals[layer]:.3f}" if signals else "-"
        group = groups[layer] if groups and groups[layer] is not None else "-"
        bar = "#" * max(slots > 0, round(40 * slots / max(plan)))
        lines.append(f"{layer:5}  {signal:>6}  {group:>5}  {slots:5}  {bar}")
    given, sizing, kv, full = (
        asked.args.plan or asked.args.load_cache,
        asked.sizing,
        result["kv_bytes"],
        result["kv_bytes_full"],
    )
    layers = f"the plan in {place(given)}" if given else result["layers"]
    chosen = " (chosen to suit; --budget sets it)" if sizing.budget is given is None and sizing.policy.bounded else ""
    return [
        *lines,
        "",
        f"cache    {result['policy']} x {layers}, {result['budget_slots']} slots per layer{chosen}{of}",
        f"KV       {in_bytes(kv)} of {in_bytes(full)} ({kv / full:.0%} of the full cache), {sizing.format}, "
        f"{'' if sizing.config.linear else 'policy '}state {in_bytes(result['state_bytes'])}",
        *on_threads(asked.args),
    ]


def on_threads(args: argparse.Namespace) -> list[str]:
    """A line if a limited or busy machine decided on the threads, and not the user."""
    why = () if args.threads else THREADS
    return [f"threads  {torch.get_num_threads()}: {'; '.join(why)} (--threads sets it)"] if why else []


def warn(line: str | None) -> None:
    if line:
        print(f"generate.py: {line}", file=sys.stderr)


# ---- one prompt


def answer_prompt(asked: Asked) -> int:
    args, text, ids = asked.args, asked.text(), prompt_ids(asked)
    about, keep = asked.about, None if args.save_cache is None else "prompt"
    seen = about.seen if about else 0
    asked.sizing.check(ids, args.max_new_tokens, seen, ready=about is not None)
    warn(asked.sizing.beyond(seen + len(ids) + args.max_new_tokens))
    with asked.engine_for(seen + len(ids) + args.max_new_tokens) as engine:
        past = PromptCache.load(args.load_cache, engine) if about else None
        how = (asked.sampling, args.max_new_tokens, asked.eos_ids, text.ends, past, keep)
        completion = follow(engine.stream(ids, *how), text, echo=not args.json)
    figures, tokens, reason = completion.figures, completion.tokens, completion.finish_reason
    parallel.same(tokens, "tokens")
    asked.save_plan(figures.plan)
    if keep:
        completion.cache.save(args.save_cache)
    own = {"tokens": tokens, "text": text.text, "finish_reason": reason, "prompt_tokens": seen + len(ids)}
    own |= {"cached_tokens": seen} if about else {}
    result = result_json(asked, own | {"max_new_tokens": args.max_new_tokens}, figures)
    if args.json:
        print(json.dumps(result, allow_nan=False))
        return 0
    before = f"{seen} cached + " * bool(seen)
    print("", *report(asked, result, f" for {before}{len(ids)} + {args.max_new_tokens} tokens"), sep="\n")
    compiled = f", compiled in {figures.compile_s:.1f} s" if figures.compile_s else ""
    print(f"prefill  {figures.prefill_tokens / figures.prefill_s:,.0f} tokens/s ({figures.prefill_s:.3f} s)")
    print(f"decode   {figures.decode_tokens_per_s:,.1f} tokens/s ({len(tokens)} new, {reason}){compiled}")
    return 0


def prompt_ids(asked: Asked) -> list[int]:
    behind = asked.about is not None
    if behind and not said(asked.args):
        return []
    if (given := asked.args.prompt_ids) is None:
        return asked.ids(prompt_text(asked.args), behind=behind)
    try:
        return [int(part) for part in given.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"--prompt-ids must be integers with commas between, not {shown(given)}") from None


def prompt_text(args: argparse.Namespace) -> str:
    if args.prompt == "-":
        name = "standard input"
        with accessing(name):
            text = decoded(read_stream(sys.stdin.buffer, name, PROMPT_BYTES), name)
    elif args.prompt is not None:
        name, text = "--prompt", text_of(args.prompt, "--prompt")
    else:
        path = args.prompt_file or DEMO_PROMPT
        name, text = place(path), read_text(path, PROMPT_BYTES)
    if not text:
        raise UserError(f"the prompt is empty ({name}); give some text")
    return text


def follow(stream: Stream, text: TextStream, echo: bool) -> Completion:
    """Consume the stream, printing as it comes. Ctrl-C ends it with what was generated so far.

    UserError for logits that are not finite, with the text before them printed.
    """
    completion, printed = stream.completion, 0
    try:
        for _ in stream:
            if echo:
                print(text.text[printed:], end="", flush=True)
                printed = len(text.text)
    except KeyboardInterrupt:
        if completion.figures is None:
            raise
        completion.finish_reason = completion.finish_reason or "interrupted"
    text.flush()
    if echo and (text.text or not completion.error):
        print(text.text[printed:], flush=True)
    if completion.error:
        raise UserError(completion.error)
    return completion


# ---- a conversation


def interact(asked: Asked) -> int:
    """A turn a line until the input ends. Text goes to standard output, and what it cost to standard error."""
    code, beyond = 0, None
    for line in on_threads(asked.args):
        print(line, file=sys.stderr)
    with asked.engine_for(asked.sizing.config.reach) as engine:
        conversation = Conversation(engine, asked.sampling)
        for turn, said in enumerate(parallel.heard(lines(asked.args)), 1):
            try:
                figures = answer(asked, conversation, text_of(said, "standard input"))
            except UserError as error:  # the conversation is as it was: another turn may fit
                complain("generate.py", error)
                code = 2
            else:
                print(
                    f"[turn {turn}: {conversation.seen:,} tokens so far; KV {in_bytes(figures.kv_bytes)}, "
                    f"{in_bytes(figures.kv_bytes_full)} in full; {figures.decode_tokens_per_s:,.1f} tokens/s]",
                    file=sys.stderr,
                )
                if not beyond:
                    warn(beyond := asked.sizing.beyond(conversation.seen))
    return code


def answer(asked: Asked, conversation: Conversation, said: str) -> Figures:
    args, turns, text, first = asked.args, asked.turns, asked.text(), not asked.turns.begun
    ids = turns.ids(said)
    with interruptible() as interrupted:
        stream = conversation.stream(
            ids, args.max_new_tokens, asked.eos_ids, lambda tokens: text.ends(tokens) or parallel.agreed(interrupted())
        )
        completion = stream.completion
        try:
            follow(stream, text, echo=True)
        finally:
            if completion.tokens:  # they are in the cache, whatever became of showing them
                text.flush()
                if text.stopped and completion.tokens[-1] in asked.tokenizer.special_ids.values():
                    completion.finish_reason = "eos"  # the next turn begins with what closes this one
                turns.add(said, text.text)
    if first:
        asked.save_plan(completion.figures.plan)
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
            raise UserError(f"a line of standard input holds more than {in_bytes(PROMPT_BYTES)}; shorten it")
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


# ---- a job


def run_job(asked: Asked) -> int:
    args, limit = asked.args, asked.limit
    job = job_of(asked, Path(args.input), Path(args.output), args.resume)
    survey = job.survey(bad_line("generate.py", args))
    length = job.state.get("max_length") or args.max_length or survey.longest
    needs = asked.with_caches(Needs.of(asked.sizing, length, survey.longest_prompt, apart=True))
    rows = rows_of(asked, needs, job.state.get("batch_size"), len(survey.ids))
    warn(asked.sizing.beyond(length))
    way = f"--resume goes on with what {place(args.output)} holds"
    with exclusive(job.output) if parallel.shard().rank == 0 else nullcontext() as file:
        done = parallel.agreed(job.begin(survey, file) if file else None)
        summary, figures = Summary(len(done)), None
        try:
            if len(done) < len(survey.ids):
                with needs.explained(rows, limit), compiling(asked.compiles):
                    engine = asked.engine()
                    job.decide(engine, survey, rows, length)
                    summary, figures = job.run(engine, survey, file, done)
        except KeyboardInterrupt:
            print(f"generate.py: interrupted; {way}", file=sys.stderr)
            return 130
        except UserError as error:
            raise UserError(f"{error}; {way}") from error
    asked.save_plan(job.state["plan"])
    own = {"output": args.output, **vars(summary), "bad_lines": survey.bad, "batch_size": rows, "max_length": length}
    result = result_json(asked, own, figures) | {"kv_bytes_full": needs.row_full * rows}
    print(json.dumps(result, allow_nan=False) if args.json else "\n".join(job_report(asked, result)))
    return 2 if survey.bad or summary.failed else 0


def bad_line(program: str, args: argparse.Namespace) -> Callable[[int, UserError], None]:
    """What becomes of a bad line: it is reported, or ends the job."""

    def bad(number: int, error: UserError) -> None:
        line = f"{place(args.input)} line {number}: {error}"
        if args.strict:
            raise UserError(line)
        complain(program, line)

    return bad


def job_of(asked: Asked, source: Path, output: Path, resume: bool) -> Job:
    args = asked.args
    default = Request((), args.max_new_tokens, asked.sampling, asked.eos_ids)
    how = {"resume": resume, "max_length": args.max_length, "limit": asked.limit, "load_cache": args.load_cache}
    return Job(source, output, asked.sizing, job_settings(asked), default, asked.ids, asked.text, **how)


def rows_of(asked: Asked, needs: Needs, before: int | None, most: int) -> int:
    """The rows of a job's batch: as asked for, as before, or as many as fit. UserError if they do not."""
    share = 1 if asked.args.max_memory is not None else machine.SHARE
    rows = asked.args.batch_size or before or needs.rows(most, int(share * asked.limit))
    needs.check(rows, asked.limit)
    return rows


def job_settings(asked: Asked) -> dict[str, Any]:
    """The settings on which the results of a job depend. Its batch size does not count: who runs out of memory may
    go on with a smaller one.
    """
    names = """policy layers squeeze budget p sinks max_length max_new_tokens temperature top_k top_p seed stop
    ignore_eos chat rendered system device compile""".split()
    settings = {f"--{name.replace('_', '-')}": getattr(asked.args, name) for name in names}
    if asked.sizing.format != "dense":  # which job files of earlier versions do not name
        settings["--cache-format"] = asked.sizing.format
    if asked.args.template_option:
        settings["--template-option"] = asked.args.template_option
    if asked.about:
        with accessing(asked.args.load_cache), open(asked.args.load_cache, "rb") as file:
            settings["--load-cache"] = file_digest(file, "sha256").hexdigest()
    if asked.args.weights != "auto":
        settings["--weights"] = asked.args.weights
    dtype = str(asked.sizing.dtype).removeprefix("torch.")
    return {"--checkpoint": str(asked.folder.resolve()), **settings, "--plan": asked.sizing.given, "--dtype": dtype}


def job_report(asked: Asked, result: dict[str, Any]) -> list[str]:
    bad = f", {len(result['bad_lines'])} bad lines" if result["bad_lines"] else ""
    before = f", {result['done_before']} before" if result["done_before"] else ""
    failed = f", {result['failed']} of them with an error" if result["failed"] else ""
    requests = f"requests {result['done']} done{failed}{before}{bad}: {result['output']}"
    if not result["done"]:
        return [requests]
    return [
        *report(asked, result, f", {result['batch_size']} rows of {result['max_length']} tokens"),
        requests,
        f"speed    {result['tokens_per_s']:,.1f} new tokens/s over all ({result['prompt_tokens']:,} read, "
        f"{result['new_tokens']:,} new, {result['seconds']:.1f} s)",
    ]


if __name__ == "__main__":
    sys.exit(main())
