"""What the ``kvenv`` commands do; their typed arguments and docstrings make the command line."""

from kvenv.commands.calibrating import calibrate
from kvenv.commands.common import parse_heads, write_json
from kvenv.commands.evaluating import evaluate
from kvenv.commands.generating import generate
from kvenv.commands.playing import dataset
from kvenv.commands.recording import inspect, record
from kvenv.commands.reporting import report
from kvenv.commands.training import train

__all__ = [
    "calibrate",
    "dataset",
    "evaluate",
    "generate",
    "inspect",
    "parse_heads",
    "record",
    "report",
    "train",
    "write_json",
]
