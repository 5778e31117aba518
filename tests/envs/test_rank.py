from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded

from kvenv import rules as u
from kvenv.envs import RankEnv, core
from kvenv.errors import KvenvError
from kvenv.rotation import Rotation

VARIANTS = [
    {},
    {"layer": 3, "head": 1, "budgets": [0.25, 8], "sinks": 4, "recent": 2},
    {"reward": "output"},
    {"sink_free": True, "max_tokens": 50},
]


def utility_of(env: RankEnv, info: dict) -> torch.Tensor:
    where = info["episode_index"], "utility/sum", info["layer"], info["head"]
    return torch.from_numpy(env.traces.read(*where))


def oracle_action(utility: torch.Tensor, rows: int) -> np.ndarray:
    """Places spread over [-1, 1]: scaled utilities themselves would tie in float32."""
    action = np.zeros(rows, np.float32)
    action[u.ranking(utility).numpy()] = np.linspace(1, -1, len(utility), dtype=np.float32)
    return action


def test_observation_is_the_heads_features(folder: str) -> None:
    env = RankEnv(folder, flat=False)
    options = {"episode": 1, "layer": 3, "head": 1}
    obs, info = env.reset(seed=0, options=options)
    np.testing.assert_array_equal(obs.ravel(), RankEnv(folder).reset(options=options)[0])
    assert info == {"episode_index": 1, "layer": 3, "head": 1, "n": 24}
    trace = env.traces.head(1, 3, 1)
    assert obs.shape == env.observation_space.shape == (40, 18)
    np.testing.assert_array_equal(obs[:24, :8], trace.keys[:24].astype(np.float32))
    np.testing.assert_array_equal(obs[:24, 8:16], trace.values[:24].astype(np.float32))
    ages = np.arange(23, -1, -1)
    np.testing.assert_array_equal(obs[:24, 16], np.float32(np.log2(1.0 + ages) / 16))
    assert (obs[:24, 17] == 1).all()
    assert not obs[24:].any()
    assert obs in env.observation_space


@pytest.mark.parametrize("arguments", VARIANTS)
def test_reward_is_the_learners_to_the_last_bit(folder: str, arguments: dict) -> None:
    env = RankEnv(folder, **arguments)
    rng = np.random.default_rng(0)
    for seed in range(6):
        _, info = env.reset(seed=seed)
        action = rng.uniform(-1, 1, env.max_tokens).astype(np.float32)
        _, reward, terminated, truncated, info = env.step(action)
        assert (terminated, truncated) == (True, False)
        assert isinstance(terminated, bool)
        assert isinstance(truncated, bool)
        assert type(reward) is float
        n, utility = info["n"], utility_of(env, info)
        scores = torch.from_numpy(action[:n])
        guarded = u.protect(scores, arguments.get("sinks", 0), arguments.get("recent", 0))
        if arguments.get("reward") == "output":
            trace = env.traces.head(info["episode_index"], info["layer"], info["head"])
            future = (trace.queries[:, -trace.T :], trace.keys, trace.values)
            budgets = [u.budget_tokens(f, n) for f in u.FRACTIONS]
            errors = core.output_error(*map(torch.from_numpy, future), guarded, budgets)
            np.testing.assert_array_equal(info["output_error"], errors.numpy())
            assert reward == -float(u.mean_over_budgets(errors))
            continue
        if arguments.get("sink_free"):
            utility, guarded = u.without_sinks(utility), u.without_sinks(guarded)
        budgets = core.resolve_budgets(arguments.get("budgets"), len(utility))
        assert reward == float(u.reward(utility, guarded, budgets))
        assert info["normalized_score"] == float(u.normalized_score(utility, guarded, budgets))
        assert info["oracle"] == float(u.oracle_reward(utility, budgets))
        assert info["random"] == u.random_reward(len(utility), budgets)
        curve = u.retention(utility, guarded).numpy()
        places = [u.budget_tokens(f, len(utility)) - 1 for f in u.FRACTIONS]
        np.testing.assert_array_equal(info["retention"], curve[places])


def test_oracle_closes_the_gap_and_its_reverse_opens_it(folder: str) -> None:
    env = RankEnv(folder)
    for seed in range(4):
        _, info = env.reset(seed=seed)
        action = oracle_action(utility_of(env, info), env.max_tokens)
        _, reward, _, _, info = env.step(action)
        assert info["normalized_score"] == pytest.approx(1, abs=1e-12)
        assert reward == pytest.approx(info["oracle"], abs=1e-12)
        env.reset(seed=seed)
        assert env.step(-action)[4]["normalized_score"] < -0.5


def test_padding_is_ignored_whatever_it_holds(folder: str) -> None:
    env = RankEnv(folder)
    action = np.random.default_rng(0).uniform(-1, 1, 40).astype(np.float32)
    other = action.copy()
    other[24:] = np.nan
    rewards = []
    for scores in (action, other, torch.from_numpy(action)):
        env.reset(options={"episode": 1, "layer": 1, "head": 0})
        rewards.append(env.step(scores)[1])
    assert rewards[0] == rewards[1] == rewards[2]


def test_seeds_decide_everything_and_all_heads_are_drawn(folder: str) -> None:
    one, two = RankEnv(folder), RankEnv(folder)
    seen = set()
    for seed in (7, *[None] * 60):
        (obs, info), (other, again) = one.reset(seed=seed), two.reset(seed=seed)
        assert info == again
        np.testing.assert_array_equal(obs, other)
        seen.add((info["episode_index"], info["layer"], info["head"]))
    assert len(seen) == 3 * 2 * 2


def test_fixed_head_stays_and_options_pick_for_one_episode(folder: str) -> None:
    env = RankEnv(folder, layer=3, budgets=[4])
    assert {env.reset(seed=s)[1]["layer"] for s in range(8)} == {3}
    _, info = env.reset(options={"layer": 1, "head": 1, "episode": 2, "budgets": [33]})
    assert info == {"layer": 1, "head": 1, "episode_index": 2, "n": 33}
    assert env.step(env.action_space.sample())[1] == 1.0
    assert env.reset()[1]["layer"] == 3
    assert env.step(env.action_space.sample())[1] < 1.0


def test_nothing_is_shared_unless_asked(folder: str) -> None:
    env = RankEnv(folder)
    obs, info = env.reset(seed=0)
    kept, before = obs.copy(), dict(info)
    obs[:] = 7
    info.clear()
    after, _, _, _, facts = env.step(np.zeros(40, np.float32))
    np.testing.assert_array_equal(after, kept)
    assert before.items() <= facts.items()
    assert not np.shares_memory(obs, after)
    again, _ = env.reset(seed=0)
    np.testing.assert_array_equal(again, kept)
    assert not np.shares_memory(again, after)

    env = RankEnv(folder, copy=False)
    obs, _ = env.reset(seed=0)
    assert np.shares_memory(env.step(np.zeros(40, np.float32))[0], obs)


def test_paths_are_accepted_and_close_may_be_repeated(folder: str) -> None:
    env = RankEnv(Path(folder))
    first, _ = env.reset(seed=1)
    env.close()
    env.close()
    np.testing.assert_array_equal(env.reset(seed=1)[0], first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reward": "loss"}, "unknown reward 'loss'"),
        ({"reward": "output", "sink_free": True}, "sink_free=True goes with reward='attention'"),
        ({"render_mode": "human"}, "unknown render_mode 'human'"),
        ({"sinks": -1}, "sinks=-1 is negative"),
        ({"recent": 0.5}, "recent=0.5 is not a whole number"),
        ({"max_tokens": 39}, "max_tokens=39 is less than the longest prompt: give 40"),
        ({"layer": 2}, r"layer 2 is not recorded: choose from \[1, 3\]"),
        ({"head": 2}, r"head 2 is not recorded: choose from \[0, 1\]"),
        ({"layer": True}, "layer=True is not a whole number"),
        ({"budgets": [25]}, "budget 25 is outside 1..24"),
        ({"budgets": [24], "sink_free": True}, "budget 24 is outside 1..20"),
        ({"traces": "no-such-set"}, "no-such-set"),
    ],
)
def test_arguments_that_cannot_be_are_named(folder: str, arguments: dict, message: str) -> None:
    with pytest.raises(KvenvError, match=message):
        RankEnv(**{"traces": folder, **arguments})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episod": 1}, "unknown reset option 'episod': choose from episode, layer, head, budgets"),
        ({"episode": 3}, "episode 3 is not in the trace set: choose 0 to 2"),
        ({"episode": -1}, "episode -1 is not"),
        ({"episode": 1.0}, "episode=1.0 is not a whole number"),
        ({"layer": 0}, r"layer 0 is not recorded: choose from \[1, 3\]"),
        ({"head": 5}, r"head 5 is not recorded: choose from \[0, 1\]"),
        ({"episode": 1, "budgets": [30]}, "budget 30 is outside 1..24"),
    ],
)
def test_options_that_cannot_be_are_named(folder: str, options: dict, message: str) -> None:
    with pytest.raises(KvenvError, match=message):
        RankEnv(folder).reset(options=options)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros(39), r"shape \(39,\)"),
        (np.zeros((40, 1)), r"shape \(40, 1\)"),
        (np.array(["a"] * 40), "dtype <U1"),
        (np.r_[0.0, np.nan, np.zeros(38)], "token 1 the score nan"),
        (np.r_[np.inf, np.zeros(39)], "token 0 the score inf"),
    ],
)
def test_actions_that_cannot_be_are_named(folder: str, action, message: str) -> None:
    env = RankEnv(folder)
    env.reset(seed=0)
    with pytest.raises(KvenvError, match=message):
        env.step(action)
    env.step(np.zeros(40))  # the episode is still there


def test_an_episode_is_one_step(folder: str) -> None:
    env = RankEnv(folder, render_mode="ansi")
    with pytest.raises(ResetNeeded, match="reset"):
        env.step(np.zeros(40))
    with pytest.raises(ResetNeeded, match="reset"):
        env.render()
    env.reset(seed=0)
    env.step(np.zeros(40))
    with pytest.raises(ResetNeeded, match="reset"):
        env.step(np.zeros(40))


def test_protected_tokens_rank_first_and_sinks_can_be_left_out(tiny_traces, tmp_path) -> None:
    mass = np.array([8, 0, 0, 0, 4, 2, 1, 1], np.float32)
    traces = str(
        tiny_traces(tmp_path / "t", [(8, 2)], utility=lambda k: np.tile(mass, (2, 2, 1))).path
    )
    ascending = np.linspace(-1, 1, 8)

    def reward(action: np.ndarray, **arguments) -> float:
        env = RankEnv(traces, **arguments)
        env.reset(seed=0)
        return env.step(action)[1]

    assert reward(ascending, budgets=[1]) == 1 / 16
    assert reward(ascending, budgets=[1], sinks=1) == 8 / 16
    assert reward(-ascending, budgets=[2], sinks=1, recent=1) == 9 / 16
    assert reward(ascending, budgets=[1], sink_free=True) == 1 / 8
    short = str(tiny_traces(tmp_path / "s", [(4, 2)]).path)
    with pytest.raises(KvenvError, match="prompt of 4 tokens has none left"):
        RankEnv(short, sink_free=True)


def test_episodes_of_several_sets_are_numbered_through_and_can_be_chosen(
    folder: str, tiny_traces, tmp_path
) -> None:
    other = tiny_traces(tmp_path / "other", [(12, 4)], seed=9)
    env = RankEnv([folder, str(other.path)], episodes=[3, 1], flat=False)
    assert {env.reset(seed=s)[1]["episode_index"] for s in range(12)} == {1, 3}
    obs, info = env.reset(options={"episode": 3, "layer": 1, "head": 0})
    assert info["n"] == 12
    np.testing.assert_array_equal(obs[:12, :8], other.read(0, "keys", 1, 0)[:12].astype(np.float32))
    foreign = tiny_traces(tmp_path / "foreign", fingerprint="g")
    for arguments, message in (
        ({"traces": [folder, str(foreign.path)]}, "different models"),
        ({"traces": []}, "names no trace set"),
        ({"episodes": []}, "episodes is empty"),
        ({"episodes": [3]}, "episode 3 is not in the trace set: choose 0 to 2"),
    ):
        with pytest.raises(KvenvError, match=message):
            RankEnv(**{"traces": folder, **arguments})


def test_only_episodes_that_are_drawn_or_asked_for_must_suit_the_budgets(folder: str) -> None:
    env = RankEnv(folder, budgets=[30], episodes=[0, 2])  # episode 1 has 24 prompt tokens
    env.reset(seed=0)
    assert 0 < env.step(np.zeros(40))[1] < 1
    with pytest.raises(KvenvError, match=r"budget 30 is outside 1..24"):
        env.reset(options={"episode": 1})
    env.reset(options={"episode": 1, "budgets": [24]})
    assert env.step(np.zeros(40))[1] == 1


def test_sets_that_share_nothing_and_arguments_of_the_wrong_kind_are_named(
    folder: str, tiny_traces, tmp_path
) -> None:
    other = tiny_traces(tmp_path / "other", layers=(0, 2))
    for arguments, message in (
        ({"traces": [folder, str(other.path)]}, r"share no \(layer, KV head\)"),
        ({"traces": 3}, "traces=3 names no trace set"),
        ({"episodes": 3}, "episodes=3 is no list"),
    ):
        with pytest.raises(KvenvError, match=message):
            RankEnv(**{"traces": folder, **arguments})


def test_keys_are_seen_in_the_frame_of_now(tiny_traces, tmp_path) -> None:
    rotation = Rotation((1.0, 0.25, 0.01), "pairs", 2)
    traces = tiny_traces(tmp_path / "turned", rotation=rotation)
    obs, info = RankEnv(traces.path, flat=False).reset(options={"episode": 1, "layer": 3})
    keys = traces.read(1, "keys", 3, info["head"])[:24]
    framed = rotation.frame(torch.from_numpy(keys)[None, None], torch.tensor([23]))[0, 0]
    np.testing.assert_array_equal(obs[:24, :8], framed.numpy())
    assert (obs[:23, :8] != keys[:23]).any()
