"""Parsers made from typed functions and classes, and what users type made fit for them."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from kvenv.errors import KvenvError

BARE = {"generate": "greedy"}
"""What an option that takes a choice means when no choice follows it."""

POSITIONAL = ("folder", "prompt", "scorer", "environment", "files")
"""Arguments given by place, not as options."""

COMMAS = "separated by commas"


class _Formatter(DefaultHelpFormatter):
    """Says what a value may be in words, without what jsonargparse adds for its own needs."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if "--print_config" in action.option_strings:
            return "print the options given as such a YAML file, and exit"
        text = (action.help or "").rstrip(".").replace("%", "%%")
        if action.dest in ("help", "config"):
            return text
        hint = getattr(action, "_typehint", None)
        kind, notes = _kind(hint), []
        if kind.endswith(COMMAS):
            notes.append(COMMAS)
        elif kind.startswith("one of") and len(_options(hint)) > 1:  # else the usage says it
            notes.append(kind)
        if action.required and action.option_strings:
            notes.append("required")
        elif isinstance(action.default, list) and action.default:
            notes.append(f"default: {','.join(map(str, action.default))}")
        elif action.default not in (None, [], argparse.SUPPRESS):
            notes.append(f"default: {str(action.default).lower()}")
        return f"{text} ({'; '.join(notes)})" if notes else text

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # Without its twin --option+ and the flags of --print-config.
        return re.sub(
            r", --\w+\+.*|\s*\x08?\[=flags\]", "", super()._format_action_invocation(action)
        )


class _Parser(ArgumentParser):
    """Options are spelt with dashes, as users type them; jsonargparse spells them as in Python."""

    def __init__(self, hints: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(formatter_class=_Formatter, **kwargs)
        self._hints = hints

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        return _dashes(super().format_help(*args, **kwargs))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(message.split())
        wrong = re.match(r'Parser key "(\w+)": .*(?:Got|Given) value: (.*)', text)
        absent = re.match(r"the following arguments are required: (.*)", text)
        if wrong and wrong[1] in self._hints:
            name = wrong[1] if wrong[1] in POSITIONAL else f"--{wrong[1]}"
            text = f"{name} {wrong[2]!r}: give {_kind(self._hints[wrong[1]])}"
        elif absent:
            names = [n if n in POSITIONAL else f"--{n}" for n in absent[1].split(", ")]
            text = f"{' and '.join(names)} must be given"
        raise KvenvError(f"{_dashes(text)} (see `{self.prog} --help`)")


def _kind(hint: Any) -> str:
    """What a value of a type looks like, in words."""
    options = [option for option in _options(hint) if option is not types.NoneType]
    if len(options) == 1:
        arguments = typing.get_args(options[0])
        if typing.get_origin(options[0]) is typing.Literal:
            return f"one of {', '.join(map(str, arguments))}"
        if typing.get_origin(options[0]) is list and arguments:
            return f"{_kind(arguments[0])}, or several {COMMAS}"
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        if options[0] in names:
            return names[options[0]]
    if {*options} == {int, float}:
        return "a number"
    return f"a value of type {hint}"


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union; anything else is its own only member."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _dashes(text: str) -> str:
    return re.sub(r"--[a-z][a-z_]+", lambda match: match.group().replace("_", "-"), text)


def parse(
    prog: str, command: Callable[..., None], plugin: type | None, rest: list[str]
) -> dict[str, Any]:
    """Parse a command's options, and its plug-in's, from the command line and --config.

    Raises:
        KvenvError: if something typed cannot be used, or no options can be made of the plug-in.
    """
    hints = hints_of(command)
    own = hints_of(plugin) if plugin is not None else {}
    skip: set[str | int] = {"name", "plugin"}
    if taken := sorted(own.keys() & ({*hints, "config", "help"} - skip)):
        raise KvenvError(
            f"{prog}: the plug-in's options {', '.join(taken)} are options of the command too: "
            "rename them"
        )
    hints = {**{key: hint for key, hint in hints.items() if key not in skip}, **own}
    parser = _Parser(hints, prog=prog, description=summary_of(command))
    parser.add_argument(
        "--config", action="config", help="a YAML file that gives any of these options"
    )
    positional = [key for key in POSITIONAL if key in inspect.signature(command).parameters]
    skip = skip | set(positional)
    parser.add_function_arguments(command, skip=skip, as_group=False)
    documented = _documented(command)
    for key in positional:
        parameter = inspect.signature(command).parameters[key]
        optional: dict[str, Any] = {}
        if parameter.default is not parameter.empty:
            optional = {"nargs": "?", "default": argparse.SUPPRESS}  # --config may still give it
        parser.add_argument(key, type=hints[key], help=documented.get(key, ""), **optional)
    if plugin is not None:
        # Types that the file postpones are lost on jsonargparse where a base class has none.
        getattr(plugin.__init__, "__annotations__", {}).update(own)
        try:
            added = parser.add_class_arguments(plugin, as_group=True)
        except ValueError as error:
            raise KvenvError(
                f"{prog}: no options can be made of {plugin.__name__}.__init__ ({error}): give "
                "each argument a name of its own and a plain type"
            ) from error
        if passed := [key for key in added if key not in own]:
            raise KvenvError(
                f"{prog}: the plug-in's options {', '.join(passed)} come through **kwargs: name "
                f"them in {plugin.__name__}.__init__, with their types"
            )
    values = parser.parse_args(_spell(rest, hints)).as_dict()
    values.pop("config", None)
    values.pop("__path__", None)
    return values


def hints_of(function: Any) -> dict[str, Any]:
    """The types of a function's or a class's arguments, those of inherited fields included.

    An argument whose name begins with an underscore is no option, and left out.

    Raises:
        KvenvError: if one has no type, or one that cannot be read.
    """
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    arguments = inspect.signature(function).parameters
    names = [n for n, a in arguments.items() if a.kind not in several and not n.startswith("_")]
    typed = function
    if inspect.isclass(function):
        owner = next(base for base in function.__mro__ if "__init__" in vars(base))
        # Of a dataclass's types, some may be names in the modules of the classes it derives from.
        fields = vars(owner).get("__dataclass_fields__")
        typed = owner if fields and fields.keys() >= {*names} else owner.__init__
    try:
        hints = typing.get_type_hints(typed)
    except Exception as error:  # a type in quotes is any code
        raise KvenvError(
            f"the types of {function.__name__}'s options cannot be read ({error}): import what "
            "they name when the file is loaded, not under TYPE_CHECKING"
        ) from error
    if untyped := [name for name in names if name not in hints]:
        raise KvenvError(
            f"{function.__name__}'s options {', '.join(untyped)} have no type: write one for each, "
            "e.g. steps: int = 100"
        )
    return {name: hints[name] for name in names}


def attributes_of(plugin: Any) -> dict[str, Any]:
    """What an instance keeps under names without a leading underscore, in __dict__ or in slots."""
    slots = (
        name
        for base in type(plugin).__mro__
        for name, value in vars(base).items()
        if inspect.ismemberdescriptor(value) and hasattr(plugin, name)
    )
    names = dict.fromkeys([*getattr(plugin, "__dict__", {}), *slots])
    return {name: getattr(plugin, name) for name in names if not name.startswith("_")}


def _spell(rest: list[str], hints: dict[str, Any]) -> list[str]:
    """From what users type to what jsonargparse reads: dashes, bare flags, comma lists."""
    spelt: list[str] = []
    waiting: str | None = None
    for position, token in enumerate(rest):
        following = rest[position + 1] if position + 1 < len(rest) else "--"
        if waiting is not None:
            spelt[-1] += f"={_value(token, hints.get(waiting))}"
            waiting = None
        elif token.startswith("--") and len(token) > 2:
            key, equals, value = token[2:].partition("=")
            key = key.replace("-", "_")
            if key not in hints:
                spelt.append(f"--{key}{equals}{value}")
            elif equals:
                spelt.append(f"--{key}={_value(value, hints[key])}")
            elif hints[key] is bool and following not in ("true", "false"):
                spelt.append(f"--{key}=true")
            elif key in BARE and following.startswith("--"):
                spelt.append(f"--{key}={BARE[key]}")
            elif following == "--":
                spelt.append(f"--{key}")  # the parser says that a value is missing
            else:
                spelt.append(f"--{key}")
                waiting = key
        else:
            spelt.append(token)
    return spelt


def _value(text: str, hint: Any) -> str:
    lists = [option for option in _options(hint) if typing.get_origin(option) is list]
    if not lists or text.startswith("[") or text == "null":
        return text
    if typing.get_args(lists[0]) == (str,):  # quoted: no path is mistaken for another YAML value
        return json.dumps([part.strip() for part in text.split(",")])
    return f"[{text}]"


def summary_of(function: Callable[..., Any]) -> str:
    """The first paragraph of a docstring."""
    return (inspect.getdoc(function) or "").split("\n\n")[0]


def _documented(function: Callable[..., Any]) -> dict[str, str]:
    from docstring_parser import parse as parse_docstring

    described = parse_docstring(inspect.getdoc(function) or "").params
    return {p.arg_name: p.description or "" for p in described}
