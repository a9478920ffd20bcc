"""A prompt as a cache holds it: what a row's slots keep, by itself. Requests go on from it, and a file can hold it.

    stream = engine.stream(article, keep="prompt")
    ...                                                   # once it has its first token:
    stream.completion.cache.save("article.safetensors")
    cache = PromptCache.load("article.safetensors", engine)
    engine.plan = cache.about.plan
    answer = list(engine.stream(question, past=cache))

A file is safetensors: of each layer the parts of its filled slots, the logits behind the last token, and as metadata
one JSON object that says what wrote it. It is read without running anything that it holds.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from errors import UserError, cut, place, shown
from files import NATURAL, POSITIVE, accessing, checked, parse_json, write_whole
from formats import FORMATS, Stored, arenas
from kvcache import LayerCache, Recurrent
from parallel import joined, shard, told
from policies.options import form

VERSION = 1
KEY = "squeeze-fast"  # of the metadata
ABOUT = {  # the metadata
    "version": NATURAL,
    "fingerprint": str,
    "policy": str,
    "policies": [str],
    "layers": str,
    "format": str,
    "dtype": str,
    "plan": [NATURAL],
    "groups": (None, [(None, NATURAL)]),
    "importance": (None, [float]),
    "seen": POSITIVE,
    "length": POSITIVE,
}
SAMPLE = 64  # numbers of each tensor that its fingerprint looks at


@dataclass(frozen=True, kw_only=True)
class About:
    """What wrote a cache, and what it is.

    fingerprint: of the model. policy, layers: the words of both axes. policies: of each layer, the token policy in its
    own form there. plan: slots per layer. seen: tokens that went through the model. length: the tokens of prompt and
    answer by which positions are turned, in families where that depends on it.
    """

    fingerprint: str
    policy: str
    policies: list[str]
    layers: str
    format: str
    dtype: str
    plan: list[int]
    seen: int
    length: int
    groups: list[int | None] | None = None
    importance: list[float] | None = None
    version: int = VERSION


class Engine(Protocol):
    """What a cache is compared with: `engine.Engine`."""

    model: Any
    policy: Any

    def about(self) -> About: ...


@dataclass(frozen=True, eq=False)
class PromptCache:
    """One row's cache: of each layer what its filled slots hold, [1, K, n, ...], or the state of linear attention.

    logits [1, vocab] that follow the last token; None where that is the last token of an answer that is not fed yet.
    placed: of each layer the positions [1 or K, n] of the tokens in its slots, if somebody watches.
    """

    about: About
    layers: list[LayerCache | Recurrent]
    logits: Tensor | None = None
    placed: list[Tensor] | None = field(default=None, repr=False)

    @property
    def seen(self) -> int:
        return self.about.seen

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for layer in self.layers for part in layer.parts())

    def misfit(self, plan: Sequence[int], policies: Sequence[object]) -> str | None:
        """Why it cannot go on under this plan and these policies of the layers, in one line.

        A layer that has evicted nothing may have any size that holds what it has.
        """
        for layer, (slots, own) in enumerate(zip(plan, self.about.plan, strict=True)):
            if slots != own and self.seen > min(slots, own):
                return f"the prompt cache has {own} slots in layer {layer}, this plan {slots}; use its own plan"
        if self.about.policies != list(map(form, policies)):
            return "the prompt cache was made for another length relative to the model's sliding window; make it anew"
        return None

    def save(self, path: Path | str) -> None:
        """Write the file, replaced whole."""
        tensors = {} if self.logits is None else {"logits": self.logits}
        for number, layer in enumerate(self.layers):
            tensors |= {f"{number}.{name}": part for name, part in layer.named().items()}
        tensors = {name: _whole(name, tensor).cpu().contiguous() for name, tensor in tensors.items()}
        if shard().rank:
            return  # the first one writes
        write_whole(path, save(tensors, {KEY: json.dumps(asdict(self.about), allow_nan=False)}))

    @classmethod
    def load(cls, path: Path | str, engine: Engine) -> "PromptCache":
        """UserError for what is no such file, is damaged, or was made by another model, policy, format or version."""
        about, own = read_about(path), engine.about()
        check(path, about, policy=own.policy, format=own.format, dtype=own.dtype, fingerprint=own.fingerprint)
        return cls(about, *_tensors(path, about, engine))


def check(path: Path | str, about: About, **own: str) -> None:
    """UserError unless what the file says of itself is what this run has."""
    flags = {"policy": "with --policy", "format": "with --cache-format", "dtype": "with --dtype"}
    for name, ours in own.items():
        if (theirs := getattr(about, name)) != ours:
            how = "by another model, or one whose weights are held otherwise"
            if name in flags:
                how = f"{flags[name]} {cut(theirs)}, and this run has {ours}"
            raise UserError(f"the prompt cache {place(path)} was made {how}; make it anew or run alike")


def read_about(path: Path | str) -> About:
    """What a file says of itself. UserError if it is no prompt cache of this version."""
    where = f"{place(path)} is no prompt cache that --save-cache wrote"
    with accessing(path), open(path, "rb"):
        pass
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(KEY)
    except SafetensorError:
        raise UserError(f"{where}, or it is damaged") from None
    if text is None:
        raise UserError(where)
    found = parse_json(text.encode(), where)
    version = found.get("version") if isinstance(found, dict) else None
    if version != VERSION:
        raise UserError(f"{where}: its version is {shown(version)}, and this program reads {VERSION}; make it anew")
    about = About(**{name: value for name, value in checked(found, ABOUT, where).items() if name in ABOUT})
    layers = {len(own) for own in (about.plan, about.policies, about.groups, about.importance) if own is not None}
    if len(layers) > 1 or about.format not in FORMATS:
        raise UserError(f"{where}: what it says of its layers does not fit together")
    return about


def _whole(name: str, tensor: Tensor) -> Tensor:
    """With the key-value heads of all ranks."""
    return tensor if name == "logits" else joined(tensor, dim=1)


def _tensors(path: Path | str, about: About, engine: Engine) -> tuple[list[LayerCache | Recurrent], Tensor | None]:
    """The layers and the logits, each of the shape and kind that it must have."""
    model, c, where = engine.model, engine.model.config, f"{place(path)} is damaged: its"
    own, heads = shard(), c.n_kv_heads * shard().world // shard().sharers  # ours, and those of all ranks
    mine = slice(*own.kv_part(heads))
    wide = torch.promote_types(model.dtype, torch.float32)
    parts = arenas(about.format, model.dtype, c.head_dim)
    if engine.policy.scored:
        parts |= {"score": (wide, ()), "position": (torch.int64, ())}
    with accessing(path), safe_open(path, "pt") as file:
        names = set(file.keys())

        def tensor(name: str, dtype: torch.dtype, *shape: int) -> Tensor:
            found = file.get_tensor(name) if name in names else None
            if found is None or found.shape != shape or found.dtype != dtype:
                has = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
                raise UserError(f"{where} {name} is {has}, not {dtype} {list(shape)}; make it anew")
            return found.to(model.device)

        layers = []
        for number, slots in enumerate(about.plan):
            if number in c.linear:
                parts_of = c.recurrent(model.dtype).items()
                layers.append(
                    Recurrent(*(tensor(f"{number}.{name}", kind, 1, *shape) for name, (kind, shape) in parts_of))
                )
                continue
            n = min(slots, about.seen)
            own = {
                name: tensor(f"{number}.{name}", kind, 1, heads, n, *tail)[:, mine]
                for name, (kind, tail) in parts.items()
            }
            stored = Stored(*(own.get(name) for name in Stored._fields))
            layers.append(LayerCache(stored, own.get("score"), own.get("position")))
        logits = tensor("logits", model.dtype, 1, c.vocab_size) if "logits" in names else None
    return layers, logits


def fingerprint(model: nn.Module) -> str:
    """Of a model's tensors: names, shapes, kinds, and some numbers of each."""
    found = sha256(str(shard().world).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // SAMPLE)][: 2 * SAMPLE].cpu().contiguous()
        found.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        found.update(some.view(torch.uint8).numpy().tobytes() if len(some) else b"")
    return sha256("".join(told(found.hexdigest())).encode()).hexdigest()
