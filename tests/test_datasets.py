from __future__ import annotations

import json
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from kvenv.cli import main
from kvenv.datasets import dataset_id, write_dataset
from kvenv.errors import KvenvError

minari = pytest.importorskip("minari")

RANK, STREAM, EVICT = "kvenv/Rank-v1", "kvenv/Stream-v1", "kvenv/Evict-v1"
ENVIRONMENTS = [
    (RANK, {}),
    (RANK, {"flat": False, "budgets": [0.25, 8], "sinks": 2}),
    (RANK, {"reward": "output"}),
    (STREAM, {"budget": 8, "copy": False}),
    (EVICT, {"budget": 8, "layer": 3}),
    (EVICT, {"budget": 0.25, "flat": False, "recent": 2}),
]


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory, tiny_traces: Callable) -> str:
    folder = tmp_path_factory.mktemp("traces")
    tiny_traces(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Minari's own folder, here; and no network."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a dataset needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


@pytest.fixture
def env(traces: str) -> gym.Env:
    return gym.make(RANK, traces=traces)


class Random:
    """Draws actions that are allowed, and remembers what it saw and did."""

    def __init__(self, env: gym.Env) -> None:
        self.space = env.action_space
        self.space.seed(5)
        self.seen: list[np.ndarray] = []
        self.done: list[Any] = []

    def __call__(self, observation: np.ndarray, info: dict[str, Any]) -> Any:
        self.seen.append(observation.copy())
        self.done.append(self.space.sample(mask=info.get("action_mask")))
        return self.done[-1]


def ranked(observation: np.ndarray, info: dict[str, Any]) -> np.ndarray:
    """Scores for `env`'s 40 rows, in float64, by position."""
    return np.linspace(-1, 1, 40)


def equal(left: np.ndarray, right: Any) -> bool:
    """Whether both hold the same bits (NaN included), in the same shape and dtype."""
    right = np.asarray(right)
    same = left.dtype == right.dtype and left.shape == right.shape
    return same and left.tobytes() == right.tobytes()


@pytest.mark.filterwarnings("ignore:.*share an object")  # what copy=False is for
@pytest.mark.parametrize(("env_id", "arguments"), ENVIRONMENTS)
def test_everything_comes_back_bit_for_bit_and_can_be_played_again(
    traces: str, env_id: str, arguments: dict[str, Any]
) -> None:
    env = gym.make(env_id, traces=traces, **arguments)
    policy = Random(env)
    write_dataset(env, "random", policy, episodes=3, seed=7)

    dataset = minari.load_dataset(dataset_id(env, "random"))
    assert dataset.observation_space == env.observation_space
    assert dataset.action_space == env.action_space
    again = dataset.recover_environment()
    assert again.spec == env.spec
    assert again.observation_space == env.observation_space
    assert again.action_space == env.action_space

    stored = list(dataset.iterate_episodes())
    assert equal(np.concatenate([e.observations[:-1] for e in stored]), policy.seen)
    assert equal(np.concatenate([e.actions for e in stored]), policy.done)
    details = list(dataset.storage.get_episode_metadata(dataset.episode_indices))
    assert [d["seed"] for d in details] == [7, 8, 9]
    for episode, detail in zip(stored, details, strict=True):
        observation, info = again.reset(seed=detail["seed"], options=detail.get("options"))
        observations, infos = [observation.copy()], [info]
        rewards, ends = [], []
        for action in episode.actions:
            observation, reward, *end, info = again.step(action)
            observations.append(observation.copy())
            infos.append(info)
            rewards.append(reward)
            ends.append(end)
        assert equal(episode.observations, observations)
        assert equal(episode.rewards, rewards)
        assert equal(np.stack([episode.terminations, episode.truncations], 1), ends)
        assert ends[-1][0] is True
        assert episode.infos.keys() == infos[-1].keys()
        for name, column in episode.infos.items():
            assert equal(column[1:], [info[name] for info in infos[1:]])
            if name in infos[0]:
                assert equal(column[:1], [infos[0][name]])
            elif column.dtype.kind == "f":
                assert np.isnan(column[0]).all()
            else:
                assert (column[0] == -1).all()

    dataset.set_seed(0)
    for sampled in dataset.sample_episodes(2):
        assert equal(sampled.observations, stored[sampled.id].observations)
        assert equal(sampled.rewards, stored[sampled.id].rewards)


def test_references_place_a_return_between_them(env: gym.Env) -> None:
    dataset = write_dataset(env, "ranked", ranked, episodes=4, references=(ranked, 0.99))
    returns = np.array([episode.rewards.sum() for episode in dataset])
    assert len(set(returns)) > 1
    assert dataset.storage.metadata["ref_min_score"] == pytest.approx(returns.mean(), abs=1e-15)
    assert dataset.storage.metadata["num_episodes_average_score"] == 4
    between = minari.get_normalized_score(dataset, np.array([returns.mean(), 0.99]))
    np.testing.assert_allclose(between, [0, 1], atol=1e-12)


def test_minari_lists_the_dataset_and_its_origin(
    traces: str, tmp_path: Path, datasets: Path, tiny_traces: Callable
) -> None:
    tiny_traces(tmp_path / "more", [(40, 4)], seed=3)
    env = gym.make(RANK, traces=[traces, str(tmp_path / "more")], layer=1)
    options = {"episode": 2, "head": None, "budgets": [4, 8]}
    dataset = write_dataset(env, "my_agent-2", ranked, episodes=2, options=options, author="me")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(minari.list_local_datasets()) == ["kvenv/rank/my_agent-2-v0"]
        minari.load_dataset("kvenv/rank/my_agent-2-v0").recover_environment().close()
    assert minari.namespace.list_local_namespaces() == ["kvenv", "kvenv/rank"]
    assert [*dataset[1].infos["episode_index"], *dataset[1].infos["layer"]] == [2, 2, 1, 1]
    (_, second) = dataset.storage.get_episode_metadata([0, 1])
    assert second["options"]["budgets"].tolist() == [4, 8]

    file = datasets / "kvenv" / "rank" / "my_agent-2-v0" / "data" / "metadata.json"
    facts = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert facts["author"] == ["me"]
    assert facts["algorithm_name"] == "my_agent-2"
    assert facts["kvenv"]["options"] == {"episode": 2, "budgets": [4, 8]}
    assert [origin["seed"] for origin in facts["kvenv"]["traces"]] == [0, 3]
    assert {origin["workload"] for origin in facts["kvenv"]["traces"]} == {"random"}


def test_a_dataset_is_replaced_only_when_asked_and_only_by_a_whole_one(
    env: gym.Env, tmp_path: Path
) -> None:
    root = tmp_path / "elsewhere"
    first = write_dataset(env, "ranked", ranked, episodes=1, root=root)
    assert first.spec.data_path == str(root / "kvenv" / "rank" / "ranked-v0" / "data")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert len(before) == 4

    def fails_late(observation: np.ndarray, info: dict[str, Any]) -> np.ndarray:
        calls.append(info)
        return ranked(observation, info) if len(calls) < 3 else np.array(["no"])

    calls: list[dict[str, Any]] = []
    with pytest.raises(KvenvError, match=r"rank.ranked-v0' exists: overwrite it"):
        write_dataset(env, "ranked", fails_late, episodes=3, root=root)
    assert calls == []
    with pytest.raises(KvenvError, match=r"action \['no'\] is not in Box"):
        write_dataset(env, "ranked", fails_late, episodes=3, root=root, overwrite=True)
    assert len(calls) == 3
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before

    assert len(write_dataset(env, "ranked", ranked, episodes=2, root=root, overwrite=True)) == 2
    assert len(write_dataset(env, "ranked", ranked, episodes=3, root=root, version=1)) == 3
    assert sorted(path.name for path in root.iterdir()) == ["kvenv"]


def test_a_folder_that_is_no_dataset_stays(env: gym.Env, datasets: Path) -> None:
    mine = datasets / "kvenv" / "rank" / "ranked-v0" / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(KvenvError, match="is not a dataset: move it away"):
        write_dataset(env, "ranked", ranked, episodes=1, overwrite=True)
    assert mine.read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_named(env: gym.Env, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KvenvError, match=r"file.*could not be written .*choose another folder"):
        write_dataset(env, "ranked", ranked, episodes=1, root=tmp_path / "file")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"agent": "my agent"}, "agent name 'my agent' does not fit an id"),
        ({"episodes": 0}, "episodes=0, seed=0: give at least 1 episode"),
        ({"seed": -1}, "episodes=1, seed=-1: give at least 1 episode"),
        ({"options": {"budgets": [0.25, 8]}}, r"budgets=\[0.25, 8\] cannot be stored"),
        ({"options": {"episode": Path()}}, "option episode=.* cannot be stored"),
        ({"references": (0.5, np.nan)}, "reference score nan is not finite"),
        (
            {"policy": lambda *_: np.full(40, 1.5)},
            r"action \[1.5 ... 1.5\] is not in Box.*: scale or clip",
        ),
    ],
)
def test_what_cannot_be_stored_is_refused(
    env: gym.Env, datasets: Path, arguments: dict[str, Any], message: str
) -> None:
    given: dict[str, Any] = {"agent": "a", "policy": ranked, "episodes": 1, **arguments}
    with pytest.raises(KvenvError, match=message):
        write_dataset(env, given.pop("agent"), given.pop("policy"), **given)
    assert not list(datasets.rglob("*"))


def test_environments_that_could_not_be_recovered_are_refused(traces: str) -> None:
    with pytest.raises(KvenvError, match=r"not JSON-safe .*give traces as a str"):
        write_dataset(gym.make(RANK, traces=Path(traces)), "a", ranked, episodes=1)
    with pytest.raises(KvenvError, match=r"CartPole.* is not a kvenv environment"):
        dataset_id(gym.make("CartPole-v1"), "a")


def test_an_info_that_is_not_of_numbers_is_named(env: gym.Env) -> None:
    class Noted(gym.Wrapper):
        def step(self, action: Any) -> Any:
            *rest, info = self.env.step(action)
            return *rest, {**info, "note": "text"}

    with pytest.raises(KvenvError, match="info 'note' is no array of numbers"):
        write_dataset(Noted(env), "a", ranked, episodes=1)


def test_without_minari_the_extra_is_named(env: gym.Env, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(KvenvError, match=r"pip install 'kvenv\[minari\]'"):
        write_dataset(env, "a", ranked, episodes=1)


@pytest.mark.parametrize("environment", ["rank", "stream", "evict"])
def test_the_command_writes_a_heuristics_episodes(
    traces: str, tmp_path: Path, monkeypatch, capsys, environment: str
) -> None:
    monkeypatch.chdir(Path(traces).parent)
    command = ["dataset", environment, "--traces", Path(traces).name, "--agent", "knorm"]
    command += ["--episodes", "3", "--budget", "0.25", "--seed", "5", "--out", str(tmp_path)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert f"wrote kvenv/{environment}/knorm-v0: 3 episodes" in said
    monkeypatch.chdir(tmp_path)  # the traces are found from any folder
    written = minari.MinariDataset(tmp_path / f"kvenv/{environment}/knorm-v0/data")
    facts = written.storage.metadata
    assert facts["ref_min_score"] < facts["ref_max_score"]
    env = written.recover_environment()
    for episode in written.iterate_episodes():
        env.reset(seed=5 + int(episode.id))
        rewards = [env.step(action)[1] for action in episode.actions]
        assert rewards == episode.rewards.tolist()
    monkeypatch.chdir(Path(traces).parent)
    assert main(command) == 2
    assert "exists: overwrite it (--overwrite)" in capsys.readouterr().err
    if environment == "stream":
        assert main([*command[:5], "h2o", *command[6:]]) == 2
        assert "use kvenv/Rank-v1" in capsys.readouterr().err
