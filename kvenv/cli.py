"""The ``kvenv`` command: parsers made from the typed functions in `kvenv.commands`."""

from __future__ import annotations

import errno
import inspect
import re
import sys
import types
import typing
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

import kvenv
from kvenv import commands, plugins
from kvenv.errors import KvenvError

COMMANDS: dict[str, Callable[..., None]] = {
    "record": commands.record,
    "inspect": commands.inspect,
    "train": commands.train,
    "evaluate": commands.evaluate,
    "generate": commands.generate,
    "bench": commands.bench,
}
PLUGINS: dict[str, plugins.Kind] = {"record": "workload", "train": "agent"}
"""Commands whose first argument is a plug-in, whose own options join the command's."""

BARE = {"generate": "greedy"}
"""What an option that takes a choice means when no choice follows it."""


class _Parser(ArgumentParser):
    """Options are spelt with dashes, as users type them; jsonargparse spells them as in Python."""

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        return _dashes(super().format_help(*args, **kwargs))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        first = _dashes(" ".join(message.split()))
        raise KvenvError(f"{first} (see `{self.prog} --help`)")


def _dashes(text: str) -> str:
    return re.sub(r"--[a-z][a-z_]+", lambda match: match.group().replace("_", "-"), text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for unusable input, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    warnings.showwarning = _warn
    try:
        return _run(arguments)
    except KvenvError as error:
        return _fail(" ".join(str(error).split()))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return _fail(
                f"no space left on the device for {error.filename!r}: free some and run again"
            )
        raise
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it can", file=sys.stderr)
        return 130


def _fail(message: str) -> int:
    print(f"kvenv: error: {message}", file=sys.stderr)
    return 2


def _warn(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        print(f"kvenv: warning: {message}", file=sys.stderr)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(f"kvenv {kvenv.__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        raise KvenvError(f"unknown command {name!r}: choose one of {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    if name not in PLUGINS:
        command(**_parse(f"kvenv {name}", command, None, rest))
        return 0
    kind = PLUGINS[name]
    if not rest or rest[0] in ("-h", "--help"):
        print(_plugin_help(name, kind))
        return 0
    if rest[0].startswith("-"):
        raise KvenvError(f"the {kind} comes first: kvenv {name} {kind.upper()} [options]")
    plugin = plugins.load(kind, rest[0])
    values = _parse(f"kvenv {name} {rest[0]}", command, plugin, rest[1:])
    own = {key: values.pop(key) for key in _hints(plugin) if key in values}
    command(rest[0], plugin(**own), **values)
    return 0


def _parse(
    prog: str, command: Callable[..., None], plugin: type | None, rest: list[str]
) -> dict[str, Any]:
    """Parse a command's options, and its plug-in's, from the command line and --config."""
    parser = _Parser(prog=prog, description=_summary(command))
    parser.add_argument(
        "--config", action="config", help="a YAML file that gives any of these options"
    )
    hints = _hints(command)
    skip: set[str | int] = {"name", "plugin"}
    positional = {key for key in ("folder", "prompt", "what") if key in hints}
    parser.add_function_arguments(command, skip=skip | positional, as_group=False)
    documented = _documented(command)
    for key in positional:
        parameter = inspect.signature(command).parameters[key]
        optional = (
            {}
            if parameter.default is parameter.empty
            else {"nargs": "?", "default": parameter.default}
        )
        parser.add_argument(key, type=hints[key], help=documented.get(key, ""), **optional)
    if plugin is not None:
        parser.add_class_arguments(plugin, as_group=True)
        hints = {**_hints(plugin), **hints}
    values = parser.parse_args(_spell(rest, hints)).as_dict()
    values.pop("config", None)
    values.pop("__path__", None)
    return values


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    target = function.__init__ if inspect.isclass(function) else function
    hints = typing.get_type_hints(target)
    return {key: hint for key, hint in hints.items() if key not in ("return", "self")}


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
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    wants_list = any(typing.get_origin(option) is list for option in options)
    return f"[{text}]" if wants_list and not text.startswith("[") and text != "null" else text


def _summary(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").split("\n\n")[0]


def _documented(function: Callable[..., Any]) -> dict[str, str]:
    from docstring_parser import parse

    return {p.arg_name: p.description or "" for p in parse(inspect.getdoc(function) or "").params}


def _overview() -> str:
    lines = [
        f"  {name:<10} {_summary(command).splitlines()[0]}" for name, command in COMMANDS.items()
    ]
    return "\n".join(
        [
            "usage: kvenv COMMAND ...",
            "",
            "Learn what a language model may forget: record, train, decode in a bounded cache.",
            "",
            "commands:",
            *lines,
            "",
            "`kvenv COMMAND --help` lists a command's options; every option can also be given in a",
            "YAML file through --config. `kvenv --version` prints the version.",
        ]
    )


def _plugin_help(name: str, kind: plugins.Kind) -> str:
    lines = []
    for key, _path in plugins.available(kind).items():
        plugin = plugins.load(kind, key)
        if name != "train" or getattr(plugin, "trains", False):
            lines.append(f"  {key:<10} {_summary(plugin).splitlines()[0]}")
    return "\n".join(
        [
            f"usage: kvenv {name} {kind.upper()} [options]",
            "",
            _summary(COMMANDS[name]),
            "",
            f"{kind}s:",
            *lines,
            "  ./FILE.py  your own",
            "",
            f"`kvenv {name} {kind.upper()} --help` lists the options.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
