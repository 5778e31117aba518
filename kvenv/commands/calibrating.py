"""``kvenv calibrate``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kvenv.commands.common import pick_device, trace_sets
from kvenv.display import console, progress_bar
from kvenv.errors import KvenvError
from kvenv.scorers import NetworkScorer, load_scorer
from kvenv.scorers.storage import is_bundle


def calibrate(scorer: str, traces: str, out: Path | None = None, device: str = "auto") -> None:
    """Measure what attention an agent's scores stand for, so that heads can compete by it.

    Adaptive budgets and thresholds need it. A trained agent's bundle gets it renewed in place; a
    heuristic's goes to a file, for `kvenv generate --calibration`.

    Args:
        scorer: a bundle's folder, or the name of a heuristic or of a shipped trained agent.
        traces: trace sets of held-out documents, separated by commas.
        out: the calibration's file; a bundle then stays as it is.
        device: cpu, cuda, ...; auto takes a GPU if there is one.
    """
    from kvenv.evaluation import calibrating

    loaded, folder = load_scorer(scorer), Path(scorer)
    renew = out is None and isinstance(loaded, NetworkScorer) and is_bundle(folder)
    if out is None and not renew:
        raise KvenvError(f"{scorer!r} is no bundle's folder, which could keep it: give --out FILE")
    sets = trace_sets(traces)
    with progress_bar("episodes") as progress:
        bar = progress.add_task("calibrating", total=sum(map(len, sets)), note="")
        found = calibrating.calibrate(
            loaded, sets, tick=lambda: progress.advance(bar), device=pick_device(device)
        )
    if out is not None:
        found.save(out)
    elif isinstance(loaded, NetworkScorer):
        replace(loaded, calibration=found).save_pretrained(folder)
    console.print(
        f"calibrated {len(found.heads)} heads on {sum(map(len, sets))} episodes; wrote "
        f"{out or folder}",
        markup=False,
        soft_wrap=True,
    )
