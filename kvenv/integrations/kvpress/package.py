"""kvpress itself, or the error that says how to get it."""

from importlib import import_module

from kvenv.errors import KvenvError


class MissingKvpressError(KvenvError, ImportError):
    """kvpress is not installed, or not with a transformers that it can use."""


try:
    kvpress = import_module("kvpress")
except ImportError as error:
    raise MissingKvpressError(
        f"kvenv.integrations.kvpress needs kvpress ({error}): pip install 'kvenv[kvpress]'"
    ) from error
