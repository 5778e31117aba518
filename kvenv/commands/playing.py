"""``kvenv dataset``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from kvenv.commands.common import listed
from kvenv.display import console
from kvenv.scorers import load_scorer
from kvenv.trace import packaged


def dataset(
    environment: Literal["rank", "stream", "evict"],
    traces: str,
    agent: str,
    episodes: int = 100,
    budget: int | float | None = None,
    sinks: int = 0,
    recent: int = 0,
    sink_free: bool = False,
    layer: int | None = None,
    head: int | None = None,
    seed: int = 0,
    out: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Play an agent in an environment and keep its episodes as a Minari dataset.

    The returns of the random and the oracle agents on the same episodes are kept beside them, as
    what a normalised score of 0 and 1 means.

    Args:
        environment: rank, stream or evict.
        traces: trace sets, separated by commas; stream and evict need all queries.
        agent: a heuristic's or a shipped trained agent's name, or a bundle's folder.
        episodes: how many to play.
        budget: tokens each head may keep (256), or a share of the prompt (0.25). Without, rank
            averages over every budget, and stream and evict keep 64.
        sinks: first tokens that are always kept.
        recent: last tokens that are always kept.
        sink_free: attention to the first 4 tokens does not count.
        layer: play this one only.
        head: play this KV head only.
        seed: of the first episode; each has its own.
        out: the folder of all datasets; without, Minari's own (MINARI_DATASETS_PATH).
        overwrite: replace a dataset of that name.
    """
    import gymnasium as gym

    from kvenv.datasets import dataset_id, write_dataset
    from kvenv.evaluation.play import ScorerPolicy

    # Absolute, so that the dataset finds its traces from any folder; an id stays one.
    sets = [t if t in packaged() else str(Path(t).absolute()) for t in listed(traces, "traces")]
    made: dict[str, Any] = {"layer": layer, "head": head, "sinks": sinks, "recent": recent}
    if budget is not None:
        made |= {"budgets": [budget]} if environment == "rank" else {"budget": budget}
    env = gym.make(
        f"kvenv/{environment.capitalize()}-v1",
        traces=sets if len(sets) > 1 else sets[0],
        sink_free=sink_free,
        **made,
    )
    player, worst, best = (
        ScorerPolicy(load_scorer(name), env) for name in (agent, "random", "oracle")
    )
    written = write_dataset(
        env,
        Path(agent).name,
        player,
        episodes=episodes,
        seed=seed,
        references=(worst, best),
        root=None if out is None else out.absolute(),
        overwrite=overwrite,
        progress=True,
    )
    facts = written.storage.metadata
    returns = [sum(episode.rewards) for episode in written.iterate_episodes()]
    console.print(
        f"wrote {dataset_id(env, Path(agent).name)}: {written.total_episodes} episodes, "
        f"{written.total_steps} steps; mean return {sum(returns) / len(returns):.3f} "
        f"(random {facts['ref_min_score']:.3f}, oracle {facts['ref_max_score']:.3f})",
        markup=False,
        soft_wrap=True,
    )
