"""Train the embedded checkpoint: the recipe of checkpoints/tiny.

    python scripts/train_tiny.py                       train, or go on where runs/tiny stopped; then export
    python scripts/train_tiny.py --export-only         write checkpoints/tiny from the newest state

8 layers of a llama with 1.8M parameters learn to write Python and to recall facts from their context
(evaluation/tiny_data.py), on two CPU cores, in about an hour. Three things make recall appear that early:

- layers 0 and 1 start out with an induction circuit (`induction_circuit`): left to chance, its two halves wait for each
  other. Trials without it had no recall after 4M tokens; with it, lists of facts were recalled after 0.3M. This is no
  clean comparison: the wording of the facts, rope_theta and the learning rates were changed at the same time;
- the loss weighs what the context can answer far above what it cannot;
- short lists come first, then documents, then longer ones (STAGES).

Matrices are trained with Muon (Jordan et al., 2024), the rest with AdamW.
"""

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import save  # noqa: E402
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

import checkpoint  # noqa: E402
from commandline import Parser, guarded  # noqa: E402
from evaluation import tiny_data as data  # noqa: E402
from files import accessing, check_apart, check_folder, read_bytes, write_json, write_whole  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402

EOS = 0
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "torch_dtype": "float32",
}


@dataclass(frozen=True)
class Stage:
    """Until this share of all tokens: rows x tokens per step, and shares of the kinds of text."""

    until: float
    rows: int
    tokens: int
    mix: dict[str, float]


STAGES = [
    Stage(0.05, 32, 128, {"repeats": 0.1, "facts": 0.3, "document": 0.2, "code": 0.4}),
    Stage(0.35, 8, 512, {"facts": 0.1, "document": 0.5, "code": 0.4}),
    Stage(0.85, 4, 1024, {"facts": 0.05, "document": 0.6, "code": 0.35}),
    Stage(1.00, 2, 2048, {"facts": 0.05, "document": 0.6, "code": 0.35}),
]


def main(argv: list[str] | None = None) -> int:
    return guarded("train_tiny.py", lambda: run(parse(argv)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "tiny", help="state and log")
    parser.add_argument("--out", type=Path, default=ROOT / "checkpoints" / "tiny", help="the exported folder")
    parser.add_argument("--tokens", type=float, default=7.58e6, help="length of the run")
    parser.add_argument("--lr", type=float, default=0.01, help="of the matrices; the rest gets 0.3 of it")
    parser.add_argument("--export-only", action="store_true")
    args = parser.parse_args(argv)
    check_apart({"--out": args.out}, {"--run": args.run})
    return args


def run(args: argparse.Namespace) -> int:
    for flag, folder in (("--run", args.run), ("--out", args.out)):
        with accessing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        check_folder(folder, flag)
    torch.manual_seed(0)
    text = Text(load_tokenizer(args.run / "tokenizer.json"), random.Random(0))
    model = new_model()
    state = State(model, args.run / "state.pt")
    if not args.export_only:
        train(model, state, text, args)
    export(model, state, text, args)
    return 0


def load_tokenizer(path: Path) -> Tokenizer:
    """A byte-level BPE in which every key and value is one token; lines are tokenized apart, digits one by one."""
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "merged_with_previous"),
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
    )
    words = "# define " + " ".join(data.KEYS + data.VALUES) + "\n"
    source = [data.read(file) for file in data.source_files()[0]]
    tokenizer.train_from_iterator([*source, *[words] * 4000], trainer)
    write_whole(path, tokenizer.to_str(pretty=True))
    return tokenizer


def new_model() -> Transformer:
    model = Transformer(ModelConfig.from_hf(CONFIG))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            std = parameter.shape[1] ** -0.5
            nn.init.normal_(parameter, std=std * (0.2 if name.endswith(("wo.weight", "w2.weight")) else 1))
    induction_circuit(model)
    return model


@torch.no_grad()
def induction_circuit(model: Transformer, gain: float = 3.0) -> None:
    """Start layers 0 and 1 as two induction heads (arXiv 2209.11895), one per key-value head.

    Embeddings live in the lower half of the residual stream, but for dimension 0, which is the same for all tokens.
    A head of layer 0 looks one token back and copies that token into the upper half. With key a and query
    a * exp(-i * theta) on the fastest rotary pairs, both constant, the score over distance d is the sum of
    a^2 cos(theta (d - 1)): highest at d = 1. A head of layer 1 then matches the current token with what stood before
    each key, on rotary pairs slow enough not to turn away within the context, and copies the token it finds.
    """
    c = model.config
    size, groups = c.head_dim, c.n_heads // c.n_kv_heads
    theta = model.rotary(1)[0]
    fast = torch.where(torch.arange(size // 2) < 6, 2.0, 0.0)
    slow = (theta < 2e-3).repeat(2)[:, None]
    dims = torch.eye(c.dim)

    embed = model.embed.weight
    embed.normal_(std=0.05)
    embed[:, c.dim // 2 :] *= 0.2
    embed[:, 0] = 0.2
    for layer in (0, 1):
        model.layers[layer].feed_forward.w2.weight *= 0.25
    for kv_head in range(c.n_kv_heads):
        token = dims[1 + kv_head * (size - 1) :][:size]  # rows that read a part of the token itself
        before = dims[c.dim // 2 + kv_head * size :][:size]  # rows that read a part of the token before
        for layer in (0, 1):
            block, head = model.layers[layer], kv_head * groups
            rows = block.attention.wqkv.weight.view(-1, size, c.dim)
            q, k, v = rows[head], rows[c.n_heads + kv_head], rows[c.n_heads + c.n_kv_heads + kv_head]
            columns = block.attention.wo.weight.view(c.dim, -1, size)
            columns[:, head + 1] *= 0.2
            v.copy_(token)
            if layer == 0:
                q *= 0.1
                k *= 0.1
                q[:, 0] = torch.cat((fast * theta.cos(), -fast * theta.sin()))
                k[:, 0] = torch.cat((fast, torch.zeros_like(fast)))
                columns[:, head] = 0.2 * before.T
            else:
                q.copy_(gain * slow * token)
                k.copy_(gain * slow * before)
                columns[:, head] = 0.5 * token.T


class Text:
    """Rows of training text as ids and weights of the loss; every kind gives `tokens` targets."""

    KEY, VALUE = 2, slice(3, 5)  # places in a tokenized fact
    ANSWER = {"facts": 12.0, "document": 10.0}  # weight of a value that was stated before

    def __init__(self, tokenizer: Tokenizer, rng: random.Random):
        self.tokenizer, self.rng = tokenizer, rng
        train, held_out = data.source_files()
        self.files = [self._lines(file) for file in train]
        self.held_out = [token for file in held_out for line in self._lines(file) for token in line]
        self.sizes = [sum(map(len, lines)) for lines in self.files]
        self.word = {word: self._single(word) for word in data.KEYS + data.VALUES}
        self.template = tokenizer.encode(data.fact(data.KEYS[0], " ".join(data.VALUES[:2]))).ids

    def _lines(self, file: Path) -> list[list[int]]:
        lines = data.read(file).splitlines(keepends=True)
        return [encoding.ids for encoding in self.tokenizer.encode_batch(lines) if encoding.ids]

    def _single(self, word: str) -> int:
        (token,) = self.tokenizer.encode(f" {word}").ids
        return token

    def batch(self, stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
        """inputs, targets, weights [rows, tokens]."""
        kinds = self.rng.choices(list(stage.mix), list(stage.mix.values()), k=stage.rows)
        ids, weights = [], []
        for kind in kinds:
            row, weight = getattr(self, kind)(stage)
            ids.append(row[: stage.tokens + 1])
            weights.append(weight[1 : stage.tokens + 1])
        ids = torch.tensor(ids)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.tensor(weights)

    def fact(self, key: str, value: str, known: bool, weight: float, answer: float) -> tuple[list[int], list[float]]:
        """A tokenized fact and its weights; `known`: it was stated before, so that the value can be answered."""
        ids, weights = list(self.template), [weight] * len(self.template)
        ids[self.KEY], ids[self.VALUE] = self.word[key], [self.word[word] for word in value.split()]
        weights[self.VALUE] = [answer if known else weight] * 2
        return ids, weights

    def source(self, tokens: int) -> list[list[int]]:
        """Consecutive lines of source, at least `tokens` tokens."""
        lines, count = [], 0
        file = at = None
        while count < tokens:
            if file is None or at == len(file):
                lines += [[EOS]] if file else []
                first = file is None
                file = self.rng.choices(self.files, self.sizes)[0]
                at = self.rng.randrange(len(file)) if first else 0
            lines.append(file[at])
            count += len(file[at])
            at += 1
        return lines

    def code(self, stage: Stage) -> tuple[list[int], list[float]]:
        ids = [token for line in self.source(stage.tokens + 1) for token in line]
        return ids, [1.0] * len(ids)

    def repeats(self, stage: Stage) -> tuple[list[int], list[float]]:
        """Random words, then the same again; only the second time counts."""
        words, ids, weights = list(self.word.values()), [], []
        while len(ids) <= stage.tokens:
            count = self.rng.randrange(8, stage.tokens // 3)
            span = [
                self.rng.choice(words) if self.rng.random() < 0.7 else self.rng.randrange(1, CONFIG["vocab_size"])
                for _ in range(count)
            ]
            ids += span + span
            weights += [0.0] * (count + 1) + [2.0] * (count - 1)
        return ids, weights

    def facts(self, stage: Stage) -> tuple[list[int], list[float]]:
        """A list of facts, again and again in new orders."""
        facts = data.facts_for(self.rng, self.rng.randrange(3, min(40, stage.tokens // 10)))
        ids, weights, rounds = [], [], 0
        while len(ids) <= stage.tokens:
            for key, value in self.rng.sample(facts, len(facts)):
                more = self.fact(key, value, rounds > 0, 0.02, self.ANSWER["facts"])
                ids, weights = ids + more[0], weights + more[1]
            rounds += 1
        return ids, weights

    def document(self, stage: Stage) -> tuple[list[int], list[float]]:
        """Source with facts between its lines, each stated and later asked for once or twice."""
        rng = self.rng
        facts = data.facts_for(rng, rng.randrange(2, max(3, min(24, stage.tokens // 24))))
        asks = rng.choice([1, 1, 2])
        lines = self.source(stage.tokens + 1 - len(self.template) * len(facts) * (1 + asks))
        places = []
        for key, value in facts:
            stated = rng.random() * rng.choice([0.9, 0.4])
            places.append((stated, key, value))
            places += [(stated + (1 - stated) * rng.random(), key, value) for _ in range(asks)]
        places.sort(reverse=True)
        ids, weights, known = [], [], set()
        for at, line in enumerate([*lines, []], start=1):
            while places and places[-1][0] * (len(lines) + 1) < at:
                _, key, value = places.pop()
                more = self.fact(key, value, key in known, 0.3, self.ANSWER["document"])
                ids, weights = ids + more[0], weights + more[1]
                known.add(key)
            ids, weights = ids + line, weights + [1.0] * len(line)
        return ids, weights


@dataclass
class State:
    """What a run continues from."""

    model: Transformer
    path: Path
    step: int = 0
    tokens: int = 0
    spent: float = 0.0  # seconds of training
    muon: "Muon" = field(init=False)
    adam: torch.optim.AdamW = field(init=False)

    def __post_init__(self):
        parameters = dict(self.model.named_parameters())
        matrices = [name for name, p in parameters.items() if p.ndim == 2 and name != "embed.weight"]
        self.muon = Muon([parameters[name] for name in matrices])
        rest = [p for name, p in parameters.items() if name not in matrices]
        self.adam = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)
        if self.path.exists():
            saved = torch.load(self.path)
            self.model.load_state_dict(saved["model"], strict=False)  # the head of an older one goes without saying
            self.adam.load_state_dict(saved["adam"])
            self.muon.momentum = saved["muon"]
            self.step, self.tokens, self.spent = saved["step"], saved["tokens"], saved["spent"]

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "adam": self.adam.state_dict(), "muon": self.muon.momentum}
        state |= {"step": self.step, "tokens": self.tokens, "spent": self.spent}
        write_whole(self.path, lambda file: torch.save(state, file))


class Muon:
    """Momentum, orthogonalised (Jordan et al., 2024). torch.optim.Muon works in bf16, far slower on most CPUs."""

    def __init__(self, matrices: list[nn.Parameter]):
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in matrices:
            shapes.setdefault(matrix.shape, []).append(matrix)
        self.stacks = list(shapes.values())
        self.momentum = [torch.zeros(len(stack), *stack[0].shape) for stack in self.stacks]

    @torch.no_grad()
    def step(self, lr: float, momentum: float = 0.95, decay: float = 0.01) -> None:
        for stack, average in zip(self.stacks, self.momentum, strict=True):
            gradient = torch.stack([matrix.grad for matrix in stack])
            average.lerp_(gradient, 1 - momentum)
            rows, columns = stack[0].shape
            update = orthogonalize(gradient.lerp(average, momentum)) * max(1, rows / columns) ** 0.5
            for matrix, change in zip(stack, update, strict=True):
                matrix.mul_(1 - lr * decay).add_(change, alpha=-lr)
                matrix.grad = None


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: five Newton-Schulz steps on a stack [n, rows, columns]."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


def train(model: Transformer, state: State, text: Text, args: argparse.Namespace) -> None:
    @torch.compile
    def losses(inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="none")

    text.rng.seed(state.step)
    kinds = {1.0: "code", 2.0: "repeats"} | {weight: kind for kind, weight in text.ANSWER.items()}
    average: dict[str, float] = {}
    log = (args.run / "log.txt").open("a")
    bar = tqdm(total=int(args.tokens), initial=state.tokens, unit="token", unit_scale=True)
    while (done := state.tokens / args.tokens) < 1:
        started = time.perf_counter()
        stage = next(stage for stage in STAGES if done < stage.until)
        inputs, targets, weights = text.batch(stage)
        loss, weights = losses(inputs, targets), weights.flatten()
        ((loss * weights).sum() / weights.sum()).backward()
        lr = args.lr * min(1, (state.step + 1) / 50, (1 - done) / 0.4 + 0.02)
        rest = state.adam.param_groups[0]
        nn.utils.clip_grad_norm_(rest["params"], 1.0)
        rest["lr"] = 0.3 * lr
        state.muon.step(lr)
        state.adam.step()
        state.adam.zero_grad()
        state.step, state.tokens = state.step + 1, state.tokens + targets.numel()
        bar.update(targets.numel())
        state.spent += time.perf_counter() - started
        for weight, kind in kinds.items():
            if (chosen := loss.detach()[weights == weight]).numel():
                average[kind] = 0.95 * average.get(kind, chosen.mean().item()) + 0.05 * chosen.mean().item()
        bar.set_postfix({kind: f"{value:.2f}" for kind, value in average.items()})
        if state.step % 200 == 0 or state.tokens >= args.tokens:
            state.save()
            figures = {
                "step": state.step,
                "tokens": state.tokens,
                "recall": {n: recall(model, text, n, 48) for n in (256, 1024)},
            }
            print(json.dumps(figures | {"loss": average}), file=log, flush=True)


@torch.no_grad()
def recall(model: Transformer, text: Text, length: int, count: int, seed: int = 1234) -> float:
    """Share of `count` prompts of `length` tokens, on held-out source, that are continued with the value asked for."""
    rng, hits = random.Random(seed), 0
    for _ in range(count):
        ids, answer = data.recall_prompt(rng, lambda words: text.tokenizer.encode(words).ids, text.held_out, length)
        hits += model(torch.tensor([ids + answer[:-1]]))[0, -len(answer) :].argmax(-1).tolist() == answer
    return hits / count


@torch.no_grad()
def held_out_loss(model: Transformer, text: Text, tokens: int = 1024) -> float:
    """Mean cross-entropy, nats a token, over the held-out files in pieces of `tokens`."""
    pieces = len(text.held_out) // (tokens + 1)
    ids = torch.tensor(text.held_out[: pieces * (tokens + 1)]).view(pieces, -1)
    return sum(F.cross_entropy(model(row[None, :-1])[0], row[1:]).item() for row in ids) / pieces


def export(model: Transformer, state: State, text: Text, args: argparse.Namespace) -> None:
    """Write a Hugging Face folder with its model card, and the demo's prompt."""
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint.to_hf(model.state_dict(), model.config).items()}
    write_whole(args.out / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_whole(args.out / "tokenizer.json", read_bytes(args.run / "tokenizer.json"))
    special = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048}
    for name, content in (
        ("config.json", CONFIG),
        ("generation_config.json", {"eos_token_id": EOS}),
        ("tokenizer_config.json", special),
    ):
        write_json(args.out / name, content, indent=2)
    write_whole(args.out / "demo_prompt.txt", demo_prompt(text))
    rates = {length: recall(model, text, length, 200, seed=7) for length in (256, 512, 1024)}
    card = CARD.format(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        train_files=len(text.files),
        train_tokens=sum(text.sizes),
        keys=len(data.KEYS),
        values=len(data.VALUES),
        step=state.step,
        tokens=state.tokens,
        minutes=state.spent / 60,
        torch=torch.__version__,
        held_out=held_out_loss(model, text),
        recall="\n".join(f"| {length} | {rate:.1%} |" for length, rate in rates.items()),
    )
    write_whole(args.out / "README.md", card)
    print(card)


def demo_prompt(text: Text, tokens: int = 900) -> str:
    """A fact near the top, a long middle of unseen source, the question at the end."""
    source = text.tokenizer.decode(text.held_out[3000 : 3000 + tokens]).splitlines()
    fact = data.fact("amber", "lantern violin").strip()
    return "\n".join([*source[:5], fact, *source[5:-1], "", data.question("amber")])


CARD = """\
# The embedded checkpoint

A llama of 8 layers, {parameters:,} parameters in float32 (dim 128, 4 query and 2 key-value heads of 32, context
2,048), trained from scratch by `scripts/train_tiny.py`. It is an instrument, not a language model: it writes
recognisable Python and recalls facts from its context, so that a cache that drops the wrong tokens visibly hurts.

**Data.** The Python standard library's own source ({train_files} files, {train_tokens:,} tokens, tests left out, every
40th file held out; PSF-2.0), and generated facts hidden in it as comment lines: `# define amber lantern violin`, later
asked for in the same words. {keys} keys and {values} words for values, all single tokens, drawn at random for each
document. The first word of an answer comes out of the prompt's own attention; the second is read from the cache.

**Recipe.** Muon and AdamW, {step:,} steps, {tokens:,} tokens, {minutes:.0f} minutes, torch {torch}. Lists of facts
first, then documents of growing length; layers 0 and 1 start out with an induction circuit (see the script).

**Held-out source**: {held_out:.3f} nats a token.

**Recall with the full cache**, exact match, 200 unseen documents each: 8 facts at uniform depth, one asked for at the
end.

| prompt tokens | recall |
|---|---|
{recall}
"""


if __name__ == "__main__":
    sys.exit(main())
