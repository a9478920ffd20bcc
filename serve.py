"""Serve a checkpoint to many clients, with OpenAI's API and a KV cache as small as you like.

    python serve.py --squeeze                                    the embedded model on http://127.0.0.1:8000
    python serve.py --checkpoint Qwen/Qwen3-0.6B --squeeze --budget 1024 --compile --batch-size 16
    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" -d '{"prompt": "def main"}'

One batch of --batch-size rows serves all. A request that finds no free row waits in a queue of --queue; when that is
full, it gets a 429. All rows share one plan, which is made from a text (--plan-text) or given (--plan). After a first
SIGTERM or Ctrl-C all that was accepted is answered; a second one ends the server at once. /openapi.json says what it
serves, beside it /metrics, /health and a page at /. Needs `pip install -r requirements-serve.txt`.
"""

from commandline import Parser, compiling, guarded, number, positive  # first: Ctrl-C is one line from here on

# isort: split
import argparse
import math
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import chat
import machine
import parallel
import tokenizer as tokenizers
from arguments import (
    ON_OFF,
    SQUEEZE_LAYERS,
    SQUEEZE_POLICY,
    Setup,
    add_cache,
    add_checkpoint,
    add_running,
    add_template_option,
    rows,
    template_options,
)
from engine import Engine
from errors import UserError, place, shown
from files import PROMPT_BYTES, accessing, check_folder, read_text
from needs import Needs
from policies import layers as layer_policies
from policies import tokens as token_policies
from sizing import Sizing

if TYPE_CHECKING:  # they need packages that may be missing
    from serving.app import Server
    from serving.worker import Worker

PLAN_TEXT = Path(__file__).resolve().parent / "serving" / "plan.txt"
PACKAGES = ("starlette", "uvicorn", "pydantic", "prometheus_client")
LENGTH, ROWS = 4096, {"cpu": 8}  # by default: tokens of a request at the most, and rows; 64 on other devices


def main(argv: list[str] | None = None) -> int:
    return guarded("serve.py", lambda: run(parse(argv)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("the server").add_argument
    add_checkpoint(add)
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    add("--port", type=port, default=8000, help="port to listen on; 0 takes a free one (default: 8000)")
    add("--model-name", metavar="NAME", help="the model's name in the API (default: the checkpoint's)")
    add("--api-key", metavar="KEY", help="what clients must send as Authorization: Bearer KEY to /v1")
    add("--cors", action="append", default=[], metavar="ORIGIN", help="let pages of this origin ask; may be repeated")
    add("--page", action=ON_OFF, default=True, help="serve a page at /, and the three caches that it compares")
    add(
        "--batch-size", type=rows, metavar="N|auto", help="rows at a time (default auto: what fits, at most 8 on a CPU)"
    )
    add(
        "--max-length",
        type=positive,
        metavar="N",
        help="tokens of prompt and answer (default: the model's, up to 4096)",
    )
    add("--queue", type=positive, default=64, metavar="N", help="requests that may wait for a row (default: 64)")
    add("--timeout", type=number, default=600, metavar="SECONDS", help="the most for one request (default: 600)")
    add("--max-body", type=number, default=8, metavar="MIB", help="the largest body of a request (default: 8)")
    add("--keep", type=natural, default=4, metavar="N", help="conversations that go on from their caches (default: 4)")
    add("--cache-dir", metavar="DIR", help="where save_cache writes prompt caches, and load_cache finds them")
    plan_text = "make the plan from this text, or from the first request (default: a text about a river)"
    add_template_option(add)
    add("--plan-text", metavar="FILE|first", help=plan_text)
    add("--quiet", action="store_true", help="no line for each request")
    add_cache(parser)
    add_running(parser)
    parser.set_defaults(interactive=False)
    return parser.parse_args(argv)


def natural(text: str) -> int:
    return 0 if text == "0" else positive(text)


def port(text: str) -> int:
    if not (text.isdecimal() and len(text) < 6 and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"{shown(text)} is no port from 0 to 65535")
    return int(text)


class Serving(Setup):
    """What the arguments of serve.py ask for."""

    def __init__(self, args: argparse.Namespace):
        for name in ("timeout", "max_body"):
            if not 0 < getattr(args, name) < math.inf:
                raise UserError(
                    f"--{name.replace('_', '-')} must be a positive number, not {shown(getattr(args, name))}"
                )
        if args.plan and args.plan_text:
            raise UserError("give one of --plan and --plan-text")
        super().__init__(args)
        if args.cache_dir is not None:
            if parallel.started() > 1:
                raise UserError("--cache-dir is for a server on one rank; leave it out, or start without torchrun")
            with accessing(args.cache_dir):
                if not Path(args.cache_dir).is_dir():
                    raise UserError(f"--cache-dir {place(args.cache_dir)} is no folder; make it first")
            check_folder(Path(args.cache_dir), "--cache-dir")
        options = template_options(args.template_option)
        self.template = None if self.tokenizer is tokenizers.NONE else chat.load(self.folder, self.tokenizer, options)
        if options and self.template is None:
            raise UserError(f"--template-option is for a chat template, and {place(args.checkpoint)} has none")
        self.max_length = args.max_length or min(self.sizing.config.reach, LENGTH)
        self.lanes = self._lanes() if args.page else {}
        self.needs = self._needs()
        most = ROWS.get(self.device.type, 64)
        self.rows = args.batch_size or self.needs.rows(most, int(machine.SHARE * self.limit))
        self.needs.check(self.rows, self.limit)
        self.plan_ids = self._plan_ids()

    def paths(self) -> tuple[dict, dict]:
        outputs, inputs = super().paths()
        text = None if self.args.plan_text == "first" else self.args.plan_text
        return outputs, {"--plan-text": text, **inputs}

    @property
    def model_name(self) -> str:
        args, given = self.args, Path(self.args.checkpoint)
        return args.model_name or (given.resolve().name.removesuffix(".gguf") if given.exists() else args.checkpoint)

    def _lanes(self) -> dict[str, Sizing]:
        """The caches that the page compares: the server's own policy and budget, if they are bounded."""
        own = self.sizing
        policy, budget = own.policy, own.budget
        if not policy.bounded:
            policy, budget = token_policies.make(SQUEEZE_POLICY), None
        uniform = layer_policies.make("uniform")
        layers = layer_policies.make(SQUEEZE_LAYERS) if own.layer_policy.name == "uniform" else own.layer_policy
        chosen = {
            "full": (token_policies.make("full"), uniform, None),
            "uniform": (policy, uniform, budget),
            "squeezed": (policy, layers, budget),
        }
        about = {"dtype": own.dtype, "format": own.format, "weights": own.weights}
        return {name: Sizing(own.config, *each, **about) for name, each in chosen.items()}

    def _needs(self) -> Needs:
        """Of the rows, of the conversations that are kept, and of the lanes; one prompt is read at a time."""
        own = Needs.of(self.sizing, self.max_length, apart=True)
        lanes = [Needs.of(lane, self.max_length) for lane in self.lanes.values()]
        beside = self.args.keep * own.row + sum(lane.row + lane.step + lane.held for lane in lanes)
        return own._replace(beside=beside, prefill=max(needs.prefill for needs in (own, *lanes)))

    def _plan_ids(self) -> Sequence[int] | None:
        given = self.args.plan_text
        if given == "first" or (given is None and self.tokenizer is tokenizers.NONE):
            return None
        ids = self.tokenizer.encode(read_text(given or PLAN_TEXT, PROMPT_BYTES))
        if not ids:
            raise UserError(f"--plan-text {place(given)} is empty; give some text")
        return ids

    def lane_engines(self, engine: Engine) -> dict[str, Engine]:
        """Of the lanes, over the model of the server's own engine."""
        form = {"compile": self.compiles, "cache_format": self.sizing.format}
        return {
            name: Engine(engine.model, lane.policy, lane.layer_policy, lane.budget, **form)
            for name, lane in self.lanes.items()
        }


def run(args: argparse.Namespace) -> int:
    for name in PACKAGES:
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            line = f"serve.py needs {error.name}, which is not installed: pip install -r requirements-serve.txt"
            raise UserError(line) from error
    machine.use_threads(args.threads)
    with parallel.ranks(args.device):
        asked = Serving(args)
        server, worker = make_server(asked)
        with asked.needs.explained(asked.rows, asked.limit), compiling(asked.compiles):
            listen(asked, server, worker) if server else follow(worker)
    return 0


def listen(asked: Serving, server: "Server", worker: "Worker") -> None:
    from serving.listening import Listener, listening

    args = asked.args
    with listening(args.host, args.port) as socket:
        worker.start()
        if worker.plan:
            asked.save_plan(worker.plan)
        host = f"[{args.host}]" if ":" in args.host else args.host
        plan = f"plan from {worker.source}: {worker.plan}" if worker.plan else "plan from the first request"
        own = f"{asked.rows} row{'s'[: asked.rows > 1]} of {asked.max_length} tokens, {plan}"
        if beyond := asked.sizing.beyond(asked.max_length):
            print(f"serve.py: {beyond}", file=sys.stderr)
        print(f"{asked.model_name} on http://{host}:{socket.getsockname()[1]}, {own}", flush=True)
        Listener(server, socket).serve_until_told()
        worker.stop()


def follow(worker: "Worker") -> None:
    """Of several ranks all but the first one: do as that one says. It alone is told to end."""
    for told in (signal.SIGTERM, signal.SIGINT):
        signal.signal(told, signal.SIG_IGN)
    worker.start()
    worker.wait()


def make_server(asked: Serving) -> tuple["Server | None", "Worker"]:
    """All but the socket; nothing runs yet. Of several ranks only the first one has a server."""
    from serving.app import Server, Settings
    from serving.forms import Words
    from serving.metrics import Metrics
    from serving.ranks import Follower, Leader
    from serving.worker import Worker

    args, metrics = asked.args, Metrics()
    words = Words(asked.tokenizer, asked.template, asked.eos_ids, asked.ends(talk=True))
    keeps = bool(args.keep or args.page)
    how = (asked.engine, asked.rows, asked.max_length, metrics, args.queue, asked.plan_ids, keeps, asked.lane_engines)
    own = parallel.shard()
    if own.rank:
        return None, Follower(asked.tokenizer, *how)
    worker = Leader(*how) if own.world > 1 else Worker(*how)
    limits = {"timeout": args.timeout, "max_body": int(args.max_body * 2**20)}
    access = {"api_key": args.api_key, "cors": args.cors, "page": args.page, "quiet": args.quiet}
    settings = Settings(asked.model_name, **limits, **access, keep=args.keep, cache_dir=args.cache_dir)
    return Server(settings, worker, words, metrics), worker


if __name__ == "__main__":
    sys.exit(main())
