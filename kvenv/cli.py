"""The ``kvenv`` command: finds the function in `kvenv.commands` and reports what went wrong."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import kvenv
from kvenv import commands, plugins
from kvenv.errors import KvenvError
from kvenv.parsing import hints_of, parse, summary_of

COMMANDS: dict[str, Callable[..., None]] = {
    "record": commands.record,
    "inspect": commands.inspect,
    "train": commands.train,
    "calibrate": commands.calibrate,
    "evaluate": commands.evaluate,
    "generate": commands.generate,
    "dataset": commands.dataset,
    "report": commands.report,
}
PLUGINS: dict[str, plugins.Kind] = {"record": "workload", "train": "agent"}
"""Commands whose first argument is a plug-in, whose own options join the command's."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for unusable input, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            return _run(arguments)
    except KvenvError as error:
        return _fail(" ".join(str(error).split()))
    except BrokenPipeError:  # the reader of a pipe, e.g. head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        return _fail(f"{str(error.filename)!r}: {error.strerror}; mend that and run again")
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
        command(**parse(f"kvenv {name}", command, None, rest))
        return 0
    kind = PLUGINS[name]
    if not rest or rest[0] in ("-h", "--help"):
        print(_plugin_help(name, kind))
        return 0
    if rest[0].startswith("-"):
        raise KvenvError(f"the {kind} comes first: kvenv {name} {kind.upper()} [options]")
    plugin = plugins.load(kind, rest[0])
    values = parse(f"kvenv {name} {rest[0]}", command, plugin, rest[1:])
    own = {key: values.pop(key) for key in hints_of(plugin)}
    command(rest[0], plugin(**own), **values)
    return 0


def _overview() -> str:
    lines = [
        f"  {name:<10} {summary_of(command).splitlines()[0]}" for name, command in COMMANDS.items()
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
    found = {key: plugins.load(kind, key) for key in plugins.available(kind)}
    shown = {key: one for key, one in found.items() if kind == "workload" or one.trains}
    width = max(map(len, (*shown, "./FILE.py")))
    lines = [f"  {key:<{width}} {summary_of(one).splitlines()[0]}" for key, one in shown.items()]
    return "\n".join(
        [
            f"usage: kvenv {name} {kind.upper()} [options]",
            "",
            summary_of(COMMANDS[name]),
            "",
            f"{kind}s:",
            *lines,
            f"  {'./FILE.py':<{width}} your own",
            "",
            f"`kvenv {name} {kind.upper()} --help` lists the options.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
