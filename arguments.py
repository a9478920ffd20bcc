"""The arguments of generate.py, and what serve.py shares: checked as far as possible before weights are loaded."""

import argparse
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import chat
import checkpoint
import machine
import parallel
import tokenizer as tokenizers
from checkpoint import EMBEDDED
from commandline import Parser, compiling, number, positive, thread_count
from engine import Engine
from errors import UserError, cut, place, shown
from files import NATURAL, check_apart, check_output, decoded, is_a, parse_json, read_json, write_json
from formats import FORMATS
from needs import Needs
from policies import layers as layer_policies
from policies import tokens as token_policies
from promptcache import About, read_about
from sampling import Sampling
from sizing import Sizing, check_budget
from tokenizer import TextStream
from weights import WEIGHT_FORMATS

ON_OFF = argparse.BooleanOptionalAction
SQUEEZE_LAYERS, SQUEEZE_POLICY = "perturbation", "dropkv"  # what a bare --squeeze is (RESULTS.md, choices)
TALK_POLICY = "streaming"  # in a conversation, where no first turn says what will be asked, and the latest counts
SOURCES, TALKS = ("prompt", "prompt_file", "prompt_ids"), ("chat", "interactive")
APART = (  # an argument, those that do not go with it, and why
    ("prompt_ids", TALKS, "--prompt-ids are taken as they are; {} needs text"),
    ("input", (*SOURCES, "interactive"), "--input brings the prompts; it does not go with {}"),
    ("rendered", (*TALKS, "prompt_ids"), "--rendered is for a prompt that needs no template; it does not go with {}"),
    ("interactive", ("json",), "--interactive prints text as it comes; it has no {}"),
    ("save_cache", ("input", "interactive"), "--save-cache keeps one prompt; it does not go with {}"),
    (
        "load_cache",
        ("policy", "layers", "squeeze", "budget", "p", "sinks", "plan", *TALKS, "system"),
        "--load-cache goes on under its own policy and plan, without a template; it does not go with {}",
    ),
)


def parse(argv: list[str] | None, manual: str = "") -> argparse.Namespace:
    return make_parser(manual).parse_args(argv)


def make_parser(manual: str) -> Parser:
    parser = Parser(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("the prompt").add_argument
    add_checkpoint(add)
    add("--prompt", metavar="TEXT|-", help="the prompt; - reads standard input")
    add("--prompt-file", metavar="F", help="a UTF-8 file with the prompt")
    add("--prompt-ids", metavar="1,2,3", help="token ids, taken as they are")
    add("--chat", action=ON_OFF, help="use the checkpoint's chat template (--interactive: if any)")
    rendered = (
        "the prompt is a chat already rendered: names of special tokens in it are those tokens, and none is added"
    )
    rendered += " (one that lacks the tokenizer's BOS runs without it)"
    add("--rendered", action="store_true", default=None, help=rendered)
    add("--system", metavar="TEXT", help="the system message of a chat")
    add_template_option(add)
    add("--interactive", action="store_true", help="go on, a turn a line, over one cache that keeps its size")
    add("--input", metavar="F", help="a file of prompts, a JSON object a line")
    add("--output", metavar="F", help="where the results go, a line each when it is done")
    add("--resume", action="store_true", help="go on with what is in --output, if anything is")
    add("--strict", action="store_true", help="end at the first bad line of --input (default: report it and go on)")
    add("--batch-size", type=rows, metavar="N|auto", help="rows at a time (default auto: what fits into memory)")
    add("--max-length", type=positive, metavar="N", help="tokens of prompt and answer (default: the longest line)")
    add = add_cache(parser)
    add("--save-cache", metavar="F", help="write what the cache holds of the prompt, to go on from it later")
    add("--load-cache", metavar="F", help="go on from what --save-cache wrote, under its policy and plan")
    add = parser.add_argument_group("the new tokens").add_argument
    add("--max-new-tokens", type=int, default=128, metavar="N")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    add("--top-k", type=int)
    add("--top-p", type=float, default=1.0)
    add("--seed", type=int, help="equal seeds give equal text (default: a new one each time)")
    add("--stop", action="append", default=[], metavar="TEXT", help="stop before this text; may be repeated")
    add("--ignore-eos", action="store_true", help="do not stop at end-of-sequence")
    add("--json", action="store_true", help="print one JSON object instead of text")
    add_running(parser)
    return parser


def add_checkpoint(add: Callable) -> None:
    add("--checkpoint", default=str(EMBEDDED), help="Hugging Face folder, .gguf file or hub id (default: embedded)")


def add_template_option(add: Callable) -> None:
    text = "what the chat template reads, such as enable_thinking=false or reasoning_effort=high; may be repeated"
    add("--template-option", action="append", metavar="NAME=VALUE", help=f"{text} (VALUE: JSON, or else text)")


def template_options(given: list[str] | None) -> dict[str, Any]:
    options = {}
    for text in given or ():
        name, equals, value = text_of(text, "--template-option").partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--template-option must be NAME=VALUE, such as enable_thinking=false, not {shown(text)}")
        value = {"True": "true", "False": "false", "None": "null"}.get(value, value)  # as in Python and Jinja
        try:
            options[name] = parse_json(value, "", object)
        except UserError:
            options[name] = value
    return options


def add_cache(parser: argparse.ArgumentParser) -> Callable:
    """The arguments that say what a cache is like. Returns what adds more of them."""
    add = parser.add_argument_group("the cache").add_argument
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
    return add


def add_running(parser: argparse.ArgumentParser) -> None:
    """The arguments that say where and how a model runs."""
    add = parser.add_argument_group("where and how it runs").add_argument
    add("--max-memory", type=float, metavar="GIB", help="refuse what may need more (default: what is free)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="auto", help="auto (the config's), bf16, fp16, fp32 or float64")
    add("--weights", choices=WEIGHT_FORMATS, default="auto", help="matrices as stored (default), or of 8 or 4 bits")
    add("--threads", type=thread_count, metavar="N", help="of the CPU (default: what the process may use)")
    add("--compile", action=ON_OFF, help="compile decode (default: on for CUDA)")


def rows(text: str) -> int | None:
    """None for auto."""
    try:
        return None if text == "auto" else positive(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor auto") from None


def check_together(args: argparse.Namespace) -> None:
    """UserError for arguments that do not go together."""

    def given(*names: str) -> list[str]:
        return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) not in (None, False)]

    if len(sources := given(*SOURCES)) > 1:
        raise UserError(f"give one of {' and '.join(sources)}, not both")
    for name, others, line in APART:
        if given(name) and (wrong := given(*others)):
            raise UserError(line.format(wrong[0]))
    if (args.input is None) != (args.output is None):
        raise UserError("--input and --output go together")
    if args.input is None and (only := given("resume", "strict", "batch_size", "max_length")):
        raise UserError(f"{only[0]} is for a file of prompts; give --input and --output")
    if args.interactive and args.prompt == "-":
        raise UserError("--interactive reads its turns from standard input; the first one can be a --prompt-file")


def choose_policies(args: argparse.Namespace) -> tuple[token_policies.TokenPolicy, layer_policies.LayerPolicy]:
    if args.squeeze:  # written down for a job, whose results depend on what was chosen
        suits = TALK_POLICY if args.interactive or args.sinks is not None else SQUEEZE_POLICY  # only that one has sinks
        args.policy, args.layers = args.policy or suits, args.layers or SQUEEZE_LAYERS
        means = f"--squeeze means --layers {SQUEEZE_LAYERS}"
        if args.layers.partition(":")[0] != SQUEEZE_LAYERS:
            raise UserError(f"{means}; give one of it and --layers {cut(args.layers)}")
        if args.p is not None:
            raise UserError(f"{means}, which has no p; give --layers squeeze --p instead")
        if args.policy == "full":
            raise UserError("--squeeze has nothing to squeeze with --policy full; use another, such as streaming")
    sinks = {} if args.sinks is None else {"sinks": args.sinks}
    p = {} if args.p is None else {"p": args.p}
    return token_policies.make(args.policy or "full", **sinks), layer_policies.make(args.layers or "uniform", **p)


def go_on(args: argparse.Namespace, about: About) -> None:
    """The settings of a prompt cache instead of what is not given."""
    args.policy, args.layers, args.cache_format = about.policy, about.layers, about.format
    args.dtype = about.dtype if args.dtype == "auto" else args.dtype


def read_plan(path: str) -> list[int]:
    plan = read_json(path, (dict, list))
    plan = plan.get("plan") if isinstance(plan, dict) else plan
    if plan == [] or not is_a(plan, [NATURAL]):
        a_plan = "a plan is a list of integers, slots per layer, or an object that has one"
        raise UserError(f"{place(path)}: {a_plan}; not {shown(plan)}")
    return plan


def check_paths(outputs: Mapping[str, Path | str | None], inputs: Mapping[str, Path | str | None]) -> None:
    """UserError unless every output can be written and is no other path of the run. Keys: the flags that name them."""
    outputs, inputs = ({flag: path for flag, path in paths.items() if path is not None} for paths in (outputs, inputs))
    for flag, path in outputs.items():
        check_output(path, flag)
    check_apart(outputs, inputs)


def said(args: argparse.Namespace) -> bool:
    """Whether the arguments bring a prompt."""
    return any(getattr(args, name) is not None for name in SOURCES)


def text_of(given: str, name: str) -> str:
    """An argument or a line as the text that its bytes are. UserError if they are none."""
    try:
        return decoded(given.encode("utf-8", "surrogateescape"), name)
    except UnicodeEncodeError:
        raise UserError(f"{name} holds half of a surrogate pair, which is no character") from None


class Setup:
    """The model and its cache, as the arguments that all command lines share ask for them. No weights are loaded yet.

    talk: each answer is a turn of a chat. about: the prompt cache that it goes on from, if it does.
    """

    def __init__(self, args: argparse.Namespace, talk: bool = False, about: About | None = None):
        self.args, self.about = args, about
        policies = choose_policies(args)
        plan = None if args.plan is None else read_plan(args.plan)
        if about and policies[0].bounded:
            plan = about.plan
        if args.budget is not None:
            check_budget(args.budget)
        if args.max_memory is not None and not 0 < args.max_memory * 2**30 < math.inf:
            raise UserError(f"--max-memory must be a positive number of GiB, not {args.max_memory}")
        self.folder = checkpoint.resolve(args.checkpoint)
        check_paths(*self.paths())
        self.tokenizer = tokenizers.load(self.folder) or tokenizers.NONE
        self.eos_ids = self.ends(talk)
        self.device = checkpoint.find_device(parallel.device(args.device))
        self.limit = machine.free(self.device) if args.max_memory is None else int(args.max_memory * 2**30)
        if self.device.type == "cpu" and args.max_memory is None:
            self.limit //= parallel.beside()
        self.limit = min(parallel.told(self.limit))
        config, size = checkpoint.outline(self.folder, args.dtype, args.weights)
        self.sizing = Sizing(config, *policies, args.budget, format=args.cache_format, weights=size)
        try:
            self.sizing.given = plan
        except UserError as error:
            raise UserError(f"{place(args.plan)}: {error}" if args.plan else str(error)) from None

    def paths(self) -> tuple[dict[str, Path | str | None], dict[str, Path | str | None]]:
        """What is written and what is read, by the flags that name it."""
        return {"--save-plan": self.args.save_plan}, {"--plan": self.args.plan, "--checkpoint": self.folder}

    def ends(self, talk: bool) -> frozenset[int]:
        """The ids that end an answer."""
        return tokenizers.eos_ids(self.folder, None if self.tokenizer is tokenizers.NONE else self.tokenizer, talk)

    @property
    def compiles(self) -> bool:
        return self.device.type == "cuda" if self.args.compile is None else self.args.compile

    def engine(self) -> Engine:
        model, _ = checkpoint.load(self.folder, self.device, self.args.dtype, self.args.weights)
        s = self.sizing
        return Engine(model, s.policy, s.layer_policy, s.budget, s.given, self.compiles, s.format)

    def save_plan(self, plan: list[int]) -> None:
        if self.args.save_plan is not None and parallel.shard().rank == 0:
            names = {"policy": self.sizing.policy.name, "layers": self.sizing.layer_policy.name}
            write_json(self.args.save_plan, {"plan": plan, **names})


class Asked(Setup):
    """What the arguments of generate.py ask for."""

    def __init__(self, args: argparse.Namespace):
        check_together(args)
        for stop in args.stop:
            text_of(stop, "--stop")
        self.sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
        about = None if args.load_cache is None else read_about(args.load_cache)
        if about:
            go_on(args, about)
        super().__init__(args, bool(args.chat or args.interactive), about)
        given = args.prompt_ids is not None or about and not said(args)
        if self.tokenizer is tokenizers.NONE and not given and args.input is None:
            raise UserError(f"{place(args.checkpoint)} has no tokenizer; give the prompt as --prompt-ids")
        self.turns = chat.Turns(self.tokenizer, self._template(), args.system)
        self.text()  # or the stop strings make none
        if args.ignore_eos:
            self.eos_ids = frozenset()

    def paths(self) -> tuple[dict[str, Path | str | None], dict[str, Path | str | None]]:
        args, (outputs, inputs) = self.args, super().paths()
        state = None if args.output is None else f"{args.output}.job.json"
        outputs = {"--output": args.output, **outputs, "the state of --output": state, "--save-cache": args.save_cache}
        inputs = {"--input": args.input, "--prompt-file": args.prompt_file, **inputs, "--load-cache": args.load_cache}
        return outputs, inputs

    def _template(self) -> chat.ChatTemplate | None:
        args = self.args
        wanted = args.chat or args.interactive and args.chat is None
        options = template_options(args.template_option)
        template = chat.load(self.folder, self.tokenizer, options) if wanted else None
        if args.chat and template is None:
            without = "without --chat the prompt is continued as it stands"
            raise UserError(f"{place(args.checkpoint)} has no chat template; {without}")
        if args.system is not None and template is None:
            raise UserError("--system is a part of a chat; give --chat and a checkpoint that has a chat template")
        if options and template is None:
            raise UserError("--template-option is for a chat; give --chat and a checkpoint that has a chat template")
        return template

    def text(self) -> TextStream:
        """The text of an answer, nothing yet."""
        return TextStream(self.tokenizer, self.args.stop, continues=True)

    def ids(self, prompt: str, rendered: bool | None = None, behind: bool = False) -> list[int]:
        """Of a prompt; its line in a job may say whether it is rendered. behind: it goes on from a prompt cache."""
        rendered = bool(self.args.rendered) if rendered is None else rendered
        if behind:
            return self.tokenizer.encode(prompt, special=False, parse_special=rendered)
        return self.turns.ids(prompt, rendered)

    def with_caches(self, needs: Needs) -> Needs:
        """And of a prompt cache: as it was read and as a row goes on from it; as it is kept and as a file's bytes."""
        copies = 2 * (self.args.load_cache is not None) + 2 * (self.args.save_cache is not None)
        return needs._replace(beside=needs.beside + copies * needs.row)

    @contextmanager
    def engine_for(self, length: int) -> Iterator[Engine]:
        """The engine, to be used within, for one sequence of `length` tokens. UserError for want of memory."""
        needs = self.with_caches(Needs.of(self.sizing, length))
        if self.args.max_memory is not None or needs.row > self.limit:  # only the cache is allocated at once
            needs.check(1, self.limit)
        with needs.explained(1, self.limit), compiling(self.compiles):
            yield self.engine()
