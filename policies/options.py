"""A policy as one word of a command line: NAME, or NAME:option=value,option=value.

    snapkv:recent=32        perturbation:where=last,weights=sqrt        perturbation:weights=1/2/4

Options are the fields of the policy's dataclass, whose types their values get; the numbers of a tuple stand between
slashes. Both axes read their words here.
"""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin

from errors import UserError, shown


def make(kind: str, known: Mapping[str, type], word: str, given: Mapping[str, Any]) -> Any:
    """The policy that `word` names out of `known`, with its own options and those `given` apart from it.

    kind: what errors call it. UserError for a name, an option or a value that does not exist, and for an option twice.
    """
    name, colon, text = word.partition(":") if isinstance(word, str) else (word, "", "")
    if not isinstance(name, str) or name not in known:
        raise UserError(f"unknown {kind} {shown(name)}; known: {', '.join(known)}")
    types = {field.name: field.type for field in fields(known[name])}
    options: dict[str, Any] = {}
    for part in text.split(",") if colon else []:
        option, equals, value = (side.strip() for side in part.partition("="))
        if not equals:
            raise UserError(f"{kind} {shown(word)}: {shown(part)} is no option=value")
        _check_name(kind, name, option, types)
        if option in options:
            raise UserError(f"{kind} {shown(word)} gives {option} twice; give it once")
        options[option] = _value(value, types[option], f"{kind} {shown(word)}: {option}")
    for option, value in given.items():
        _check_name(kind, name, option, types)
        if option in options:
            raise UserError(f"{kind} {shown(word)} gives {option}, and so does --{option}; give one of them")
        options[option] = value
    return known[name](**options)


def word(policy: Any) -> str:
    """What `make` makes this policy of: its name, and its options as far as they are not the default."""
    options = []
    for field in fields(policy):
        value = getattr(policy, field.name)
        if value != field.default:
            text = "/".join(map(str, value)) if isinstance(value, tuple) else str(value)
            options.append(f"{field.name}={text.lower() if isinstance(value, bool) else text}")
    return policy.name + ":" * bool(options) + ",".join(options)


def form(policy: Any) -> str:
    """What tells a policy from all that work otherwise: also one in a layer's own form, which no word makes."""
    return repr(policy) if is_dataclass(policy) else type(policy).__name__


def words(text: str) -> list[str]:
    """The words of a list, with ; or , between them.

    A part with = and no : before it is one more option of the word in front: names hold no =.
    """
    found: list[str] = []
    for group in text.split(";"):
        for number, part in enumerate(group.split(",")):
            part = part.strip()
            if number and ":" in found[-1] and "=" in part and ":" not in part.partition("=")[0]:
                found[-1] += f",{part}"
            else:
                found.append(part)
    return found


def _check_name(kind: str, name: str, option: str, types: Mapping[str, Any]) -> None:
    if option not in types:
        has = ", ".join(types) or "none"
        raise UserError(f"{kind} {shown(name)} has no option {shown(option)}; it has: {has}")


def _value(text: str, kind: Any, where: str) -> Any:
    """`text` as the type of a field: bool, int, float, str, a tuple of floats, or a union of these (numbers first)."""
    kinds = [kind] if isinstance(kind, type) and not get_args(kind) or get_origin(kind) is tuple else get_args(kind)
    for each in sorted(kinds, key=lambda each: each is str):
        try:
            if each is str:
                return text
            if each is bool:
                return {"true": True, "false": False}[text]
            if each is int:
                return int(text)
            numbers = tuple(float(part) for part in text.split("/"))
        except (ValueError, KeyError):
            continue
        if all(map(math.isfinite, numbers)):
            if get_origin(each) is tuple:
                return numbers
            if len(numbers) == 1:
                return numbers[0]
    wanted = {int: "a whole number", bool: "true or false"}.get(kind, "a number")
    raise UserError(f"{where} must be {wanted}, not {shown(text)}")
