"""kvenv/Rank-v0: rank a prompt's tokens once, and be paid what the ranking keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded

from kvenv import utility as u
from kvenv.envs import core
from kvenv.envs.render import RankView, draw_rank, write_rank
from kvenv.envs.source import Source, check_options, integer
from kvenv.errors import KvenvError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGEST = float(np.finfo(np.float16).max)
"""Keys and values are recorded as float16, so no entry is larger."""

OPTIONS = ("episode", "layer", "head", "budgets")
"""What ``reset(options=...)`` can pick."""


@dataclass
class _Episode:
    """One prompt seen by one head; `scores` and `result` are there once it is ranked."""

    where: dict[str, int]
    observation: np.ndarray
    utility: np.ndarray
    budgets: list[int] | None
    outputs: tuple[np.ndarray, np.ndarray, np.ndarray] | None
    """Future queries (G, T, d), keys (S, d) and values (S, d), if they decide the reward."""
    scores: np.ndarray | None = None
    result: str = ""


class RankEnv(gym.Env[np.ndarray, np.ndarray]):
    """A head's view of a prompt: rank its tokens once, and the cache keeps the best of them.

    ## Description

    A language model has read a prompt, and one of its attention heads must forget most of it. Give
    each prompt token a score: the head's cache will keep the highest ones, whatever its size turns
    out to be. What the rest of the text then attends to was recorded, so the ranking is judged at
    once, without running the model. This is the problem of KVP (Moschella, Manduchi and Sener,
    ["Learning to Evict from Key-Value Cache"](https://arxiv.org/abs/2602.10238), ICML 2026).

    An episode is one recorded prompt of n tokens, seen by one head: a (layer, KV head) pair.

    ## Action Space

    `Box(-1, 1, (max_tokens,), float32)`: one score for each row of the observation, higher = keep.
    Only their order counts. Ties keep the earlier token, scores outside [-1, 1] are taken as they
    are, and the entries of padding rows are ignored.

    ## Observation Space

    `Box` of shape `(max_tokens, 2d + 3)`, float32, for heads of dimension d. Each row is a token,
    in the prompt's order. A prompt shorter than `max_tokens` is padded with rows of zeros.

    | Column    | Observation                                       | Min    | Max   |
    |-----------|---------------------------------------------------|--------|-------|
    | 0 .. d-1  | key, as the cache holds it: after rotary position | -65504 | 65504 |
    | d .. 2d-1 | value                                             | -65504 | 65504 |
    | 2d        | position / n                                      | 0      | 1     |
    | 2d+1      | log2(1 + position) / 16                           | 0      | 2     |
    | 2d+2      | validity: 1 for a token, 0 for padding            | 0      | 1     |

    Keys and values are float16 in the traces, which bounds them by 65504.

    ## Rewards

    - `reward="attention"`: retention, averaged over budgets. Retention at budget b is the share of
      the head's utility (the attention that prompt tokens receive from the future) that the first
      b tokens of the ranking hold. It lies in [0, 1]; over all budgets a random ranking expects
      (n + 1) / 2n. See `kvenv.utility.reward`.
    - `reward="output"`: minus the relative error ||o - o_full|| / ||o_full|| of the attention
      output after eviction and renormalisation, averaged over the future queries, the query heads
      that share the KV head, and budgets. It is 0 at best. See `kvenv.envs.core.output_error`.

    The first `sinks` and the last `recent` tokens count as ranked first, as in a cache that always
    keeps them. With `sink_free=True` the first 4 tokens are left out of the utility: they hold most
    of the attention whatever happens, and hide what the rest is worth. Budgets then count the n - 4
    tokens that remain.

    ## Starting State

    An episode of the trace set and, where they are not fixed, a layer and a KV head, drawn
    uniformly. `reset(options={...})` picks instead, for this one episode:

    | Option      | Type     | Description                                   |
    |-------------|----------|-----------------------------------------------|
    | `"episode"` | **int**  | index in the trace set                        |
    | `"layer"`   | **int**  | a recorded layer, in the model's own numbers  |
    | `"head"`    | **int**  | a KV head                                     |
    | `"budgets"` | **list** | as the argument of that name, and instead     |

    ## Episode End

    Every episode terminates with its first step. It is never truncated.

    ## Information

    `reset()` and `step()` return a dict with

    - `"episode"`, `"layer"`, `"head"`: what is being ranked;
    - `"n"`: the prompt's tokens, and so the observation's valid rows.

    `step()` adds

    - `"retention"`: (4,) float64, retention at 1/16, 1/8, 1/4 and 1/2 of the prompt;
    - `"random"`, `"oracle"`: retention averaged over the budgets, of a random ranking (its
      expectation) and of sorting by the utility itself;
    - `"closure"`: how much of the way from random to oracle the ranking went: 0 is chance, 1 is
      perfect;
    - `"output_error"`: (number of budgets,) float64, only with `reward="output"`.

    The first four measure attention also with `reward="output"`. `"random"` and `"oracle"` know of
    no protected tokens, so `sinks` and `recent` can move closure either way.

    ## Arguments

    ```python
    import gymnasium as gym

    env = gym.make("kvenv:kvenv/Rank-v0", traces="sample", layer=10, head=1, budgets=[0.25])
    observation, info = env.reset(seed=0)
    ```

    | Argument      | Type     | Default       | Description                                       |
    |---------------|----------|---------------|---------------------------------------------------|
    | `traces`      | **str**  | `"sample"`    | folder of a trace set, or a packaged one's id     |
    | `layer`       | **int**  | `None`        | layer, in the model's own numbers; `None`: drawn  |
    | `head`        | **int**  | `None`        | KV head; `None`: drawn                            |
    | `reward`      | **str**  | `"attention"` | `"attention"` or `"output"`                       |
    | `budgets`     | **list** | `None`        | ints: tokens, floats in (0, 1]: of the prompt     |
    | `sinks`       | **int**  | `0`           | first tokens that are always kept                 |
    | `recent`      | **int**  | `0`           | last tokens that are always kept                  |
    | `sink_free`   | **bool** | `False`       | leave the first 4 tokens out of the utility       |
    | `max_tokens`  | **int**  | `None`        | rows; `None`: as many as the longest prompt has   |
    | `copy`        | **bool** | `True`        | `False`: `step()` returns `reset()`'s own array   |
    | `tokenizer`   | **str**  | `None`        | model whose tokenizer `"ansi"` uses               |
    | `render_mode` | **str**  | `None`        | `"rgb_array"` or `"ansi"`                         |

    - `traces` may be a `Path`, but only a str keeps the EnvSpec JSON-safe.
    - `budgets=None` is every budget from 1 to n, and 1/16, 1/8, 1/4 and 1/2 for `"output"`.
    - `tokenizer=None` takes the recorded model's, and shows token ids where that cannot be had.
    - `"rgb_array"` draws which tokens each budget keeps beside the retention curve. `"ansi"` writes
      the text with evicted words dimmed, at the first of `budgets` or at a quarter of the prompt.

    ## Version History

    * v0: Initial version.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array", "ansi"], "render_fps": 1}  # noqa: RUF012

    def __init__(
        self,
        traces: str | Path = "sample",
        layer: int | None = None,
        head: int | None = None,
        reward: Literal["attention", "output"] = "attention",
        budgets: Sequence[core.Budget] | None = None,
        sinks: int = 0,
        recent: int = 0,
        sink_free: bool = False,
        max_tokens: int | None = None,
        copy: bool = True,
        tokenizer: str | None = None,
        render_mode: str | None = None,
    ) -> None:
        if reward not in ("attention", "output"):
            raise KvenvError(f"unknown reward {reward!r}: choose 'attention' or 'output'")
        if reward == "output" and sink_free:
            raise KvenvError("sink_free=True goes with reward='attention': the output has no sinks")
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise KvenvError(f"unknown render_mode {render_mode!r}: choose 'rgb_array' or 'ansi'")
        for name, count in (("sinks", sinks), ("recent", recent)):
            if integer(name, count) < 0:
                raise KvenvError(f"{name}={count} is negative: give 0 or more tokens")
        self._source = Source(traces, layer, head)
        self.traces = self._source.traces
        longest = max(self._source.lengths)
        if max_tokens is not None and integer("max_tokens", max_tokens) < longest:
            raise KvenvError(
                f"max_tokens={max_tokens} is less than the longest prompt: give {longest} or more"
            )
        self.max_tokens = longest if max_tokens is None else max_tokens
        self.render_mode = render_mode
        self._reward, self._budgets = reward, budgets
        self._sinks, self._recent, self._sink_free = sinks, recent, sink_free
        self._copy, self._tokenizer_name = copy, tokenizer
        self._episode: _Episode | None = None
        # Budgets that the shortest prompt cannot have are told now, not in mid-training.
        self._resolve(budgets, min(self._source.lengths))

        columns = core.feature_count(self.traces.model.head_dim)
        high = np.full((self.max_tokens, columns), LARGEST, dtype=np.float32)
        high[:, -3:] = (1.0, 2.0, 1.0)
        low = np.where(high == np.float32(LARGEST), -high, 0).astype(np.float32)
        self.observation_space = spaces.Box(low, high, dtype=np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (self.max_tokens,), dtype=np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; see the class for what ``options`` picks.

        Raises:
            KvenvError: if an option is unknown or out of range, naming the valid ones.
        """
        super().reset(seed=seed)
        chosen = check_options(options, OPTIONS)
        where = self._source.draw(self.np_random, chosen)
        episode, layer, head, n = where.values()
        budgets = chosen.get("budgets")
        keys = self.traces.read(episode, "keys", layer, head)
        values = self.traces.read(episode, "values", layer, head)
        outputs = None
        if self._reward == "output":
            queries = self.traces.read(episode, "queries", layer, head)
            outputs = (queries[:, n - len(keys) :], keys, values)
        self._episode = _Episode(
            where=where,
            observation=core.features(keys[:n], values[:n], np.arange(n), n, self.max_tokens),
            utility=self.traces.read(episode, "utility/sum", layer, head),
            budgets=self._resolve(self._budgets if budgets is None else budgets, n),
            outputs=outputs,
        )
        observation = self._episode.observation
        return observation.copy() if self._copy else observation, dict(where)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Rank the prompt by the scores in ``action``, (max_tokens,).

        Raises:
            KvenvError: if the scores have another shape or are not finite.
            ResetNeeded: if there is no episode, or it has ended.
        """
        episode = self._episode
        if episode is None or episode.scores is not None:
            raise ResetNeeded("kvenv/Rank-v0 has no episode to step: call reset() first")
        scores = _scores(action, episode.where["n"], self.max_tokens)
        outcome = core.rank_outcome(
            episode.utility, scores, episode.budgets, self._sinks, self._recent, self._sink_free
        )
        reward, closure = float(outcome.reward), float(outcome.closure)
        info: dict[str, Any] = {
            **episode.where,
            "retention": outcome.retention,
            "random": outcome.random,
            "oracle": float(outcome.oracle),
            "closure": closure,
        }
        episode.scores = u.protect(scores, self._sinks, self._recent)
        episode.result = f" · retention {reward:.2f} · closure {closure:.2f}"
        if episode.outputs is not None and episode.budgets is not None:
            errors = core.output_error(*episode.outputs, episode.scores, episode.budgets)
            info["output_error"] = errors
            reward = -float(u.mean_over_budgets(errors))
            episode.result += f" · output error {-reward:.2f}"
        return episode.observation, reward, True, False, info

    def render(self) -> Any:
        """The episode, before or after its ranking, as ``render_mode`` asks.

        Returns:
            (540, 960, 3) uint8 for "rgb_array", a string for "ansi", None without a mode.
        """
        if self.render_mode is None:
            gym.logger.warn("render() needs a render_mode: make the environment with 'rgb_array'")
            return None
        if self._episode is None:
            raise ResetNeeded("kvenv/Rank-v0 has nothing to render: call reset() first")
        where, view = self._episode.where, self._look(self._episode)
        if self.render_mode == "rgb_array":
            return draw_rank(view)
        tokens = self.traces.tokens(where["episode"])[: where["n"]]
        return write_rank(view, tokens, self._tokenizer)

    def close(self) -> None:
        """Close the trace files."""
        self.traces.close()

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer asked for, else the recorded model's, else None."""
        # Loading transformers takes seconds, and only text needs it.
        from kvenv.recording.models import load_tokenizer

        if self._tokenizer_name is not None:
            return load_tokenizer(self._tokenizer_name)
        try:
            return load_tokenizer(self.traces.model.id)
        except KvenvError:
            return None

    def _look(self, episode: _Episode) -> RankView:
        """The tokens that count, as the renderers want them."""
        utility, scores, where = episode.utility, episode.scores, episode.where
        if self._sink_free:
            utility = u.without_sinks(utility)
            scores = None if scores is None else u.without_sinks(scores)
        return RankView(
            title=f"kvenv/Rank-v0 · layer {where['layer']} head {where['head']}"
            f" · episode {where['episode']}{episode.result}",
            utility=utility,
            scores=scores,
            budgets=episode.budgets,
            first=u.SINKS if self._sink_free else 0,
        )

    def _resolve(self, budgets: Sequence[core.Budget] | None, n: int) -> list[int] | None:
        """Budgets in tokens of a prompt of n tokens; None where every one counts."""
        if budgets is None and self._reward == "output":
            budgets = u.FRACTIONS
        return core.resolve_budgets(budgets, core.ranked_tokens(n, self._sink_free))


def _scores(action: np.ndarray, n: int, max_tokens: int) -> np.ndarray:
    """The scores of the prompt's n tokens, (n,) float64, from an action (max_tokens,)."""
    scores = np.asarray(action)
    if scores.shape != (max_tokens,) or scores.dtype.kind not in "fiu":
        raise KvenvError(
            f"action has shape {scores.shape} and dtype {scores.dtype}: "
            f"give {max_tokens} numbers, one for each row of the observation"
        )
    scores = scores[:n].astype(np.float64)
    if (wrong := np.flatnonzero(~np.isfinite(scores))).size:
        raise KvenvError(
            f"action gives token {wrong[0]} the score {scores[wrong[0]]}: give finite scores"
        )
    return scores
