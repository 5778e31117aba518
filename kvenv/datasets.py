"""Offline datasets: episodes of a policy on a kvenv environment, written for Minari."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

from kvenv import __version__
from kvenv.display import progress_bar
from kvenv.errors import KvenvError
from kvenv.trace.reader import resolve
from kvenv.trace.schema import load_manifest

if TYPE_CHECKING:
    from gymnasium.envs.registration import EnvSpec
    from minari import MinariDataset
    from minari.data_collector import EpisodeBuffer

Policy = Callable[[Any, dict[str, Any]], Any]
"""(observation, info) -> action."""

FILL = {"f": np.nan, "i": -1, "u": 0, "b": False}
"""By kind of number: what stands in the rows of an episode that lack an info."""


def dataset_id(env: gym.Env, agent: str, version: int = 0) -> str:
    """The name that Minari knows a dataset by, e.g. ``kvenv/rank/knorm-v0``.

    The environment stands in it in lower case and without its version, as in Minari's own
    datasets; ``version`` is the dataset's.

    Raises:
        KvenvError: if the environment is not one of kvenv's, or the agent's name has other
            characters than letters, digits, ``-`` and ``_``.
    """
    spec = _spec(env)
    if not re.fullmatch(r"[-\w]+", agent):
        raise KvenvError(f"agent name {agent!r} does not fit an id: use letters, digits, - and _")
    return f"kvenv/{spec.name.lower()}/{agent}-v{version}"


def write_dataset(
    env: gym.Env,
    agent: str,
    policy: Policy,
    *,
    episodes: int,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    references: tuple[Policy | float, Policy | float] | None = None,
    root: str | Path | None = None,
    version: int = 0,
    overwrite: bool = False,
    author: str = "kvenv",
    description: str | None = None,
    progress: bool = False,
) -> MinariDataset:
    """Play a policy and keep what it saw, did and was paid as a Minari dataset.

    Everything comes back bit for bit. Episode i can be played again: ``env.reset(seed=seed + i,
    options=options)``, then its actions. As in Minari's own datasets, infos have one row more
    than actions, the first being the reset's; `FILL` stands where a row has no such info.

    Args:
        env: a kvenv environment from `gym.make`. Its arguments are stored as they are: give
            ``traces`` as an absolute path for a dataset that is used from another folder.
        agent: whose policy it is; part of the dataset's name.
        policy: (observation, info) -> an action of the environment's action space.
        episodes: how many to play.
        seed: the first episode's; episode i is reset with seed + i.
        options: of every reset.
        references: a bad and a good policy, or their mean returns, between which
            `minari.get_normalized_score` places a return. Policies play the same episodes.
        root: the folder of all datasets; None is Minari's (``MINARI_DATASETS_PATH``).
        version: the dataset's; part of its name.
        overwrite: replace a dataset of that name.
        author: who made it.
        description: what it is; None says it in one line.
        progress: show a progress bar.

    Returns:
        The dataset, opened from its folder ``root/dataset_id(env, agent, version)``.

    Raises:
        KvenvError: if Minari is not installed, the dataset exists, it cannot be written, or the
            environment, the options, an action or an info cannot be stored. What was there
            before then still is.
    """
    try:
        import minari
        from minari.dataset.minari_storage import MinariStorage
        from minari.storage import get_dataset_path
    except ImportError as error:
        raise KvenvError(f"datasets need Minari ({error}): pip install 'kvenv[minari]'") from error
    name = dataset_id(env, agent, version)
    if episodes < 1 or seed < 0:
        raise KvenvError(f"episodes={episodes}, seed={seed}: give at least 1 episode and seed 0")
    options = _storable(options)
    metadata: dict[str, Any] = {
        "dataset_id": name,
        "minari_version": minari.__version__,
        "algorithm_name": agent,
        "author": {author},
        "description": description or f"{episodes} episodes of {agent} on {_spec(env).id}",
        "requirements": [f"kvenv>={__version__}"],
        "kvenv": {"version": __version__, "seed": seed, "options": options, "traces": _origin(env)},
    }
    home = get_dataset_path() if root is None else Path(root)
    folder = home / name
    if folder.exists() and not overwrite:
        raise KvenvError(
            f"{str(folder)!r} exists: overwrite it (--overwrite), or choose another folder"
        )
    if folder.exists() and not (folder / "data" / "metadata.json").is_file():
        raise KvenvError(f"{str(folder)!r} exists and is not a dataset: move it away")

    played = [policy, *(r for r in references or () if callable(r))]
    with progress_bar("episodes", progress) as bars:
        bar = bars.add_task(agent, total=episodes * len(played), note="")

        def play(player: Policy) -> Iterator[EpisodeBuffer]:
            for i in range(episodes):
                yield _play(env, player, seed + i, options)
                bars.advance(bar)

        def score(reference: Policy | float) -> float:
            if callable(reference):
                reference = float(np.mean([sum(episode.rewards) for episode in play(reference)]))
            if not math.isfinite(reference):
                raise KvenvError(f"reference score {reference} is not finite: give a number")
            return float(reference)

        if references is not None:
            metadata["ref_min_score"], metadata["ref_max_score"] = map(score, references)
            metadata["num_episodes_average_score"] = episodes
        try:
            with _replacing(folder, home) as new:
                storage = MinariStorage.new(
                    new / "data",
                    observation_space=env.observation_space,
                    action_space=env.action_space,
                    env_spec=env.spec,
                )
                storage.update_metadata(metadata)
                storage.update_episodes(play(policy))  # one episode at a time in memory
        except OSError as error:
            raise KvenvError(
                f"dataset {str(folder)!r} could not be written ({error.strerror or error}): free "
                "some space or choose another folder"
            ) from error
    return minari.MinariDataset(folder / "data")


def _play(env: gym.Env, policy: Policy, seed: int, options: dict[str, Any]) -> EpisodeBuffer:
    """One episode, from its reset to its end."""
    from minari.data_collector import EpisodeBuffer

    observation, info = env.reset(seed=seed, options=dict(options))
    # Copies, since an environment may use its arrays again.
    observations, infos = [np.array(observation)], [_copied(info)]
    actions, rewards, terminations, truncations = [], [], [], []
    ended = False
    while not ended:
        action = _action(policy(observation, info), env.action_space)
        actions.append(np.array(action))
        observation, reward, terminated, truncated, info = env.step(action)
        observations.append(np.array(observation))
        infos.append(_copied(info))
        rewards.append(float(reward))
        terminations.append(terminated)
        truncations.append(truncated)
        ended = terminated or truncated
    return EpisodeBuffer(
        seed=seed,
        options=options or None,
        observations=observations,
        actions=actions,
        rewards=rewards,
        terminations=terminations,
        truncations=truncations,
        infos=_columns(infos),
    )


def _action(action: Any, space: gym.Space) -> Any:
    """The action in the space's dtype: what is stored is what the environment was given."""
    try:
        given = np.asarray(action).astype(space.dtype, casting="same_kind")[()]
    except (TypeError, ValueError):
        given = None
    if given is None or not space.contains(given):
        shown = np.array2string(np.ravel(action), threshold=4, edgeitems=1)
        raise KvenvError(f"the policy's action {shown} is not in {space}: scale or clip it")
    return given


def _copied(info: dict[str, Any]) -> dict[str, np.ndarray]:
    """An info as arrays of its own."""
    arrays = {name: np.array(value) for name, value in info.items()}
    for name, array in arrays.items():
        if array.dtype.kind not in FILL:
            raise KvenvError(f"info {name!r} is no array of numbers: it cannot be stored")
    return arrays


def _columns(infos: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Infos by name, one row each; every name that any of them has is in all rows."""
    first = {name: array for info in reversed(infos) for name, array in info.items()}
    fill = {name: np.full_like(array, FILL[array.dtype.kind]) for name, array in first.items()}
    return {name: np.stack([info.get(name, fill[name]) for info in infos]) for name in fill}


def _storable(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options without those that are None.

    Minari keeps each as an HDF5 attribute, which has one kind of number: of [0.25, 8] it would
    make [0.25, 8.0], another budget.
    """
    given = {name: value for name, value in (options or {}).items() if value is not None}
    for name, value in given.items():
        try:
            kept = json.dumps(np.asarray(value).tolist()) == json.dumps(value)
        except (TypeError, ValueError):
            kept = False
        if not kept:
            raise KvenvError(
                f"option {name}={value!r} cannot be stored: give a number or a list of one kind"
            )
    return given


def _spec(env: gym.Env) -> EnvSpec:
    if env.spec is None or env.spec.namespace != "kvenv":
        raise KvenvError(f"{env} is not a kvenv environment: make one with gym.make('kvenv/...')")
    return env.spec


def _origin(env: gym.Env) -> list[dict[str, Any]]:
    """What the environment's trace sets were recorded from."""
    spec = _spec(env)
    try:
        spec.to_json()
    except (TypeError, ValueError) as error:
        raise KvenvError(
            f"the environment's arguments are not JSON-safe ({error}): give traces as a str"
        ) from error
    traces = spec.kwargs.get("traces", "sample")
    sets = [traces] if isinstance(traces, str) else traces
    manifests = [load_manifest(resolve(folder)) for folder in sets]
    return [
        {"model": m.model.id, "fingerprint": m.model.fingerprint, **m.origin} for m in manifests
    ]


@contextmanager
def _replacing(folder: Path, home: Path) -> Iterator[Path]:
    """A new folder that is put in the place of ``folder`` once the block ends without an error."""
    from minari.namespace import NAMESPACE_METADATA_FILENAME

    home.mkdir(parents=True, exist_ok=True)
    # Minari overlooks hidden folders.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=home) as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()
        yield new
        folder.parent.mkdir(parents=True, exist_ok=True)
        for namespace in (folder.parent, folder.parent.parent):
            if not (file := namespace / NAMESPACE_METADATA_FILENAME).exists():
                file.write_text("{}")
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
