"""A trace set in a few figures."""

from __future__ import annotations

from typing import Any

from kvenv.trace.reader import TraceSet


def summary(traces: TraceSet) -> dict[str, Any]:
    """What `kvenv inspect` prints about a set; reads every episode's attributes."""
    infos = [traces.info(i) for i in range(len(traces))]
    manifest, model = traces.manifest, traces.model
    return {
        "path": str(traces.path),
        "model": model.id,
        "architecture": model.architecture,
        "layers": list(model.layers),
        "heads": len(traces.heads),
        "head_dim": model.head_dim,
        "workload": manifest.workload,
        "arguments": dict(manifest.arguments),
        "seed": manifest.seed,
        "queries": manifest.queries,
        "episodes": len(infos),
        "planned": manifest.episodes,
        "complete": manifest.complete,
        "documents": len({info.document for info in infos}),
        "prompt_tokens": sum(info.n for info in infos),
        "future_tokens": sum(info.T for info in infos),
        "bytes": sum(shard.bytes for shard in manifest.shards),
    }
