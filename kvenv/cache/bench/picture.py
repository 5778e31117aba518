"""Tokens a second and memory over context, as a picture.

``python -m kvenv.cache.bench.picture docs/results/cache.json docs/cache.png``
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvenv.errors import KvenvError

STYLES = {
    "dynamic": ("DynamicCache", "tab:gray", "o"),
    "compiled": ("StaticCache, compiled", "tab:red", "D"),
    "unmasked": ("StaticCache without masks, CUDA graph", "tab:orange", "s"),
}
"""Label, colour and marker of full caches."""

BLUES = ("#9ecae1", "#4292c6", "#08519c")


def draw(result: Mapping[str, Any], path: str | Path) -> None:
    """Draw `kvenv bench cache`'s decoding: a row of two panels for each batch that is compared.

    Args:
        result: what its JSON holds.
        path: the picture's file; its ending says the format.

    Raises:
        KvenvError: if there is nothing to draw, or no matplotlib to draw it with.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise KvenvError(
            "a picture takes matplotlib: install kvenv[plots], or draw it elsewhere from the JSON "
            "with python -m kvenv.cache.bench.picture"
        ) from error
    every = result.get("decoding", {}).get("rows", ())
    rows = [row for row in every if "tokens_per_second" in row]
    if not rows:
        raise KvenvError("these results have no decoding to draw: measure the part decoding")
    compared = {row["batch"] for row in rows if row["way"] in STYLES}
    batches = sorted(compared or {row["batch"] for row in rows})
    figure = Figure(figsize=(9, 0.8 + 3.2 * len(batches)), layout="constrained")
    axes: Any = figure.subplots(len(batches), 2, sharex=True, squeeze=False)
    for batch, (speed, memory) in zip(batches, axes, strict=True):
        here = [row for row in rows if row["batch"] == batch]
        for label, colour, marker, line in _lines(here):
            contexts = [row["context"] for row in line]
            for axis, name, unit in ((speed, "tokens_per_second", 1), (memory, "cache_bytes", 1e9)):
                numbers = [row[name] / unit for row in line]
                axis.plot(contexts, numbers, color=colour, marker=marker, label=label, ms=5)
        speed.set_ylabel("tokens a second")
        memory.set_ylabel("cache, GB")
        ticks = sorted({row["context"] for row in here})
        for axis in (speed, memory):
            axis.set_title(f"batch {batch}")
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:,.10g}")
            axis.set_xticks(ticks, [f"{t // 1024}k" if t >= 1024 else str(t) for t in ticks])
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("context, tokens")
    entries = {}
    for axis, _ in axes:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend([*entries.values()], [*entries], loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)


def _lines(
    rows: Sequence[Mapping[str, Any]],
) -> list[tuple[str, str, str, list[Mapping[str, Any]]]]:
    """Label, colour, marker and rows by context of what one batch's panels show."""
    lines = []
    for way, style in STYLES.items():
        lines.append((*style, _by_context(row for row in rows if row["way"] == way)))
    budgets = sorted({row["budget"] for row in rows if row["way"] == "ours"})
    for index, budget in enumerate(budgets):
        own = _by_context(row for row in rows if (row["way"], row["budget"]) == ("ours", budget))
        lines.append((f"kvenv, budget {budget}", BLUES[index % len(BLUES)], "^", own))
    return [line for line in lines if line[-1]]


def _by_context(rows: Any) -> list[Mapping[str, Any]]:
    return sorted(rows, key=lambda row: row["context"])


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), sys.argv[2])
