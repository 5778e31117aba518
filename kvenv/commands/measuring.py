"""``kvenv curves``."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from kvenv.commands.common import pick_device, trace_sets
from kvenv.display import console, progress_bar


def curves(folder: Path, traces: str, device: str = "auto") -> None:
    """Measure an agent's retention curves and keep them in its bundle.

    A cache divides its budget among heads by them. `kvenv train` measures them by itself, for
    agents that rank prompts; this adds them to a bundle that has none, or renews them.

    Args:
        folder: the bundle's folder.
        traces: trace sets of what the model will read, and the agent was not trained on,
            separated by commas.
        device: cpu, cuda, ...; auto takes a GPU if there is one.
    """
    from kvenv.scorers import storage
    from kvenv.scorers.bundle import NetworkScorer
    from kvenv.scorers.curves import measure_curves

    # Not by name: what is measured is written there.
    scorer = NetworkScorer.from_pretrained(storage.local_bundle(folder))
    sets = trace_sets(traces)
    trained = {json.dumps(one, sort_keys=True) for one in scorer.training.get("traces", ())}
    for one in sets:
        if json.dumps(one.manifest.origin, sort_keys=True) in trained:
            warnings.warn(
                f"the agent was trained on {one.path}: curves are truer on other documents",
                stacklevel=2,
            )
    with progress_bar("episodes") as progress:
        bar = progress.add_task("measuring", total=sum(map(len, sets)), note="")
        found = measure_curves(
            scorer, sets, tick=lambda: progress.advance(bar), device=pick_device(device)
        )
    storage.write_curves(folder, found)
    console.print(
        f"measured {len(found.heads)} of {len(scorer.network.heads)} heads on "
        f"{sum(map(len, sets))} episodes; wrote {folder / storage.CURVES}",
        markup=False,
        soft_wrap=True,
    )
