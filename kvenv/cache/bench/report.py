"""The benchmark's tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from kvenv.cache.bench.contenders import WAYS
from kvenv.cache.bench.goals import sentence

Row = Mapping[str, Any]

FULL = ("dynamic", "compiled", "unmasked")
"""The caches that ours is compared with."""


def show(results: Mapping[str, Any], goals: Sequence[Row], console: Console) -> None:
    """Print what was measured."""
    for table in (_checks, _step, _prompt, _decoding, _prefill, _real):
        if made := table(results):
            console.print(made)
    if goals:
        console.print("goals", highlight=False)
    for goal in goals:
        console.print(f"  {sentence(goal)}", highlight=False, markup=False)


def _table(title: str, columns: Iterable[str], rows: Iterable[Sequence[str]]) -> Table | None:
    listed = list(rows)
    if not listed:
        return None
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 0, 0, 1))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in listed:
        table.add_row(*row)
    return table


def _why(row: Row) -> str:
    return f"failed: {row['failed']}" if "failed" in row else str(row.get("skipped", ""))


def _checks(results: Mapping[str, Any]) -> Table | None:
    rows = [
        (
            row["kernel"],
            *(
                (str(row["cases"]), f"{row['error']:.2g}", f"{row['tolerance']:g}", row["what"])
                if "error" in row
                else ("", "", "", _why(row))
            ),
            "yes" if row.get("met") else "NO",
        )
        for row in results.get("correctness", {}).get("kernels", ())
    ]
    columns = ("kernel", "cases", "error", "allowed", "worst case", "right")
    return _table("against float64, on random inputs", columns, rows)


def _rates(row: Row) -> tuple[str, ...]:
    return (
        f"{1e6 * row['seconds']:,.1f}",
        f"{row['bytes'] / 1e6:,.1f}",
        f"{row['bytes_per_second'] / 1e9:,.0f}",
        f"{100 * row['share_of_copy']:.0f}",
    )


def _step(results: Mapping[str, Any]) -> Table | None:
    rows = [
        (
            f"{row['batch']}",
            f"{row['budget']}",
            *(
                (
                    *_rates(row["attend"]),
                    f"{1e6 * row['insert']['seconds']:,.1f}",
                    f"{100 * row['insert_share_of_attend']:.1f}",
                    f"{1e6 * row.get('write_seconds', float('nan')):,.1f}",
                )
                if "attend" in row
                else (_why(row), "", "", "", "", "", "")
            ),
        )
        for row in results.get("step", ())
    ]
    copy = results.get("copy", {}).get("bytes_per_second", 0) / 1e9
    title = f"a layer's decode step (8 KV heads of 128, bfloat16); a copy moves {copy:,.0f} GB/s"
    columns = (
        "batch",
        "budget",
        "attend us",
        "MB",
        "GB/s",
        "% copy",
        "insert us",
        "% attend",
        "write us",
    )
    return _table(title, columns, rows)


def _prompt(results: Mapping[str, Any]) -> Table | None:
    rows = []
    for row in results.get("prompt", ()):
        start = row["kernel"], f"{row['tokens']}"
        if "seconds" not in row:
            rows.append((*start, _why(row), "", "", "", "", ""))
            continue
        other = row.get("torch_seconds") or row["flash_seconds"]
        against = "torch" if "torch_seconds" in row else "flash"
        rates = f"{row['flops_per_second'] / 1e12:,.0f}"
        ratio = f"{row['seconds'] / other:.2f} of {against}'s"
        rows.append((*start, *_rates(row), rates, ratio))
    columns = ("kernel", "tokens", "us", "MB", "GB/s", "% copy", "TFLOP/s", "time")
    return _table("kernels that read a prompt, one row", columns, rows)


def _decoding(results: Mapping[str, Any]) -> Table | None:
    decoding = results.get("decoding", {})
    found = {
        (row["context"], row["batch"], row["way"], row["budget"]): row
        for row in decoding.get("rows", ())
    }
    rows = []
    for context, batch in sorted({key[:2] for key in found}):
        others = {way: found.get((context, batch, way, None)) for way in FULL}
        for way, row in others.items():
            if row is not None:
                rows.append((f"{context}", f"{batch}", way, *_decoded(row), *[""] * len(FULL)))
        budgets = sorted(k[3] for k in found if k[:3] == (context, batch, "ours") and k[3])
        for budget in budgets:
            row = found[context, batch, "ours", budget]
            ratios = [_ratio(row, other) for other in others.values()]
            rows.append((f"{context}", f"{batch}", f"ours {budget}", *_decoded(row), *ratios))
    columns = ("context", "batch", "cache", "tokens/s", "step ms", "cache GB", "peak GB")
    table = _table(
        "decoding with an 8B-shaped model; peak beside the weights; last columns: times the "
        "tokens/s of each full cache",
        (*columns, *(f"/{way}" for way in FULL)),
        rows,
    )
    if table is not None:
        table.caption = "\n".join(f"{way}: {what}" for way, what in WAYS.items())
        table.caption_justify = "left"
    return table


def _decoded(row: Row) -> tuple[str, str, str, str]:
    if "step_seconds" not in row:
        return _why(row), "", "", ""
    return (
        f"{row['tokens_per_second']:,.1f}",
        f"{1000 * row['step_seconds']:.2f}",
        f"{row['cache_bytes'] / 1e9:.3f}",
        f"{row['peak_beside_weights'] / 1e9:.3f}" if "peak_beside_weights" in row else "",
    )


def _ratio(row: Row, other: Row | None) -> str:
    if other is None or "tokens_per_second" not in row or "tokens_per_second" not in other:
        return ""
    return f"{row['tokens_per_second'] / other['tokens_per_second']:.2f}"


def _prefill(results: Mapping[str, Any]) -> Table | None:
    rows = [
        (
            f"{row['tokens']}",
            row["way"] if row["budget"] is None else f"ours {row['budget']}",
            *(
                (
                    f"{row['seconds']:.3f}",
                    f"{row['peak_beside_weights'] / 1e9:.3f}",
                    f"{row['cache_bytes'] / 1e9:.3f}",
                )
                if "seconds" in row
                else (_why(row), "", "")
            ),
        )
        for row in results.get("decoding", {}).get("prefill", ())
    ]
    columns = ("tokens", "cache", "seconds", "peak GB", "cache GB after it")
    return _table("reading a prompt with the 8B-shaped model, one row", columns, rows)


def _real(results: Mapping[str, Any]) -> Table | None:
    real = results.get("real", {})
    base = {
        row["batch"]: row.get("tokens_per_second")
        for row in real.get("rows", ())
        if row["way"] == "dynamic"
    }
    rows = []
    for row in real.get("rows", ()):
        rate, other = row.get("tokens_per_second"), base.get(row["batch"])
        rows.append(
            (
                row["way"],
                f"{row['batch']}",
                f"{rate:,.1f}" if rate else _why(row),
                f"{rate / other:.2f}" if rate and other else "",
            )
        )
    title = f"{real.get('model')} after {real.get('context')} tokens, budget {real.get('budget')}"
    return _table(title, ("cache", "batch", "tokens/s", "x dynamic"), rows)
