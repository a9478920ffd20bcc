"""Conversations that a server keeps, so that a next turn costs its own tokens only."""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from threading import Lock
from typing import Any

from chat import Message
from promptcache import PromptCache


@dataclass(frozen=True)
class Turn:
    """A conversation up to an answer. unfed: its last token, unless that ended it. ids: those in the cache."""

    key: bytes
    cache: PromptCache
    unfed: list[int]
    ids: list[int | None]


class Conversations:
    """The latest `most` of them, by their messages."""

    def __init__(self, most: int):
        self.most = most
        self._turns: OrderedDict[bytes, Turn] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._turns)

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(turn.cache.nbytes for turn in self._turns.values())

    def find(self, messages: Sequence[Message], options: Mapping[str, Any]) -> Turn | None:
        """The conversation with just these messages, and options of the chat template."""
        key = key_of(messages, options)
        with self._lock:
            if key in self._turns:
                self._turns.move_to_end(key)
            return self._turns.get(key)

    def keep(self, turn: Turn, instead_of: Turn | None) -> None:
        """A conversation has gone on: its latest turn stands for it. The one that rested longest may have to go."""
        with self._lock:
            if instead_of:
                self._turns.pop(instead_of.key, None)
            self._turns[turn.key] = turn
            while len(self._turns) > self.most:
                self._turns.popitem(last=False)


def key_of(messages: Sequence[Message], options: Mapping[str, Any]) -> bytes:
    return sha256(json.dumps([messages, options], sort_keys=True).encode()).digest()
