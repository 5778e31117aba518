"""kvenv/Stream-v1: every few tokens, rank what a cache holds; the best stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from kvenv import rules
from kvenv.envs import core
from kvenv.envs.batch import token_box
from kvenv.envs.single import TraceEnv
from kvenv.envs.slots import SlotBatch
from kvenv.envs.source import Traces
from kvenv.errors import KvenvError
from kvenv.rules import Budget


class StreamBatch(SlotBatch):
    """The rules of kvenv/Stream-v1; see `StreamEnv` for the arguments.

    Tokens lie in their slots in order of position.
    """

    env_id = "kvenv/Stream-v1"

    def __init__(
        self, num: int, *, interval: int | None = None, flat: bool = True, **arguments: Any
    ) -> None:
        super().__init__(num, **arguments)
        self._asked_interval = interval
        self.interval = np.ones(num, dtype=np.int64)
        for budget in np.unique(self._budgets(self.asked, self.source.episodes)).tolist():
            self._interval(budget)
        columns = core.feature_count(self.head_dim)
        self._shape = (self.slots * columns,) if flat else (self.slots, columns)
        self.observation_space = token_box(self._shape, self.slots, self.head_dim)
        self.action_space = spaces.Box(-1.0, 1.0, (self.slots,), dtype=np.float32)

    def _interval(self, budget: int) -> int:
        return rules.refresh_interval(budget, self._asked_interval, self.sinks + self.recent)

    def _begin(self, which: np.ndarray, extra: np.ndarray) -> None:
        super()._begin(which, extra)
        self.interval[which] = [self._interval(budget) for budget in extra.tolist()]

    def observe(self, which: np.ndarray | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """See `Batch.observe`."""
        which = self.every if which is None else which
        rows = self.rows(which, self.positions[which], self.now[which] - 1)
        if out is None:
            return rows.reshape(-1, *self._shape)
        out[...] = rows.reshape(out.shape)
        return out

    def check_actions(self, actions: Any, live: np.ndarray) -> np.ndarray:
        """Scores (N, W), of no meaning where there is no token."""
        given = np.asarray(actions)
        if given.shape != (self.num, self.slots) or given.dtype.kind not in "fiu":
            raise KvenvError(
                f"action has shape {given.shape[self.num == 1 :]} and dtype {given.dtype}: give "
                f"{self.slots} numbers, one for each slot"
                + (f", in each of {self.num} environments" if self.num > 1 else "")
            )
        fine = np.isfinite(given) | (self.positions < 0) | ~live[:, None]
        if not fine.all():
            i, slot = (int(x) for x in np.argwhere(~fine)[0])
            raise KvenvError(
                f"action gives slot {slot}{self.whose(i)} the score {given[i, slot]}: give finite "
                "scores"
            )
        return np.where(self.positions < 0, -np.inf, given)

    def advance(self, actions: np.ndarray) -> np.ndarray:
        """Keep the best of what is held, append the next tokens, and pay what they find."""
        live = self.now < self.lengths
        newest = (self.now - 1)[:, None]
        guarded = rules.protected(self.positions, newest, self.sinks, self.recent)
        order = core.ranking(np.where(guarded, np.inf, actions))
        place = np.empty_like(order)
        np.put_along_axis(place, order, np.arange(self.slots)[None].repeat(self.num, 0), -1)
        stays = (place < (self.budget - self.interval)[:, None]) & (self.positions >= 0)
        stays |= ~live[:, None]
        kept = np.where(stays, self.positions, -1)
        # Those that stay move together, in their order.
        kept = np.take_along_axis(kept, np.argsort(kept < 0, axis=-1, kind="stable"), -1)
        held = (kept >= 0).sum(-1)
        self.positions = kept
        paid, asked = np.zeros(self.num), np.zeros(self.num, dtype=np.int64)
        for step in range(int(self.interval.max())):
            here = live & (step < self.interval) & (self.now < self.lengths)
            rows = self.every[here]
            self.positions[rows, held[here]] = self.now[here]
            paid += self.find(self.now, self.positions, here)
            asked += here & (self.now >= self._dropped)
            held = held + here
            self.now = self.now + here
        self.done = self.now >= self.lengths
        self.finish({"evicted": np.where(live, (~stays & (place >= 0)).sum(-1), 0)})
        return paid / np.maximum(asked, 1)

    def problem(self, i: int) -> tuple[float, np.ndarray, np.ndarray, int, np.ndarray]:
        """See `SlotBatch.problem`: a period for each selection.

        Tokens that arrive within a period are there for the rest of it in any case.
        """
        budget, length, every = int(self.budget[i]), int(self.lengths[i]), int(self.interval[i])
        square, place = self.square(i), np.arange(length)
        starts = np.arange(budget, length, every)
        gains, fixed = np.zeros((len(starts), length)), 0.0
        for k, start in enumerate(starts.tolist()):
            paid = square[start : start + every]
            gains[k, :start] = paid[:, :start].sum(0)
            fixed += float(paid[:, start:].sum())
        there = np.where(place < starts[:, None], place, -1)
        guarded = rules.protected(there, starts[:, None] - 1, self.sinks, self.recent)
        first = np.searchsorted(starts, place, side="right")
        return fixed, gains, first, budget - every, guarded

    def info(self) -> dict[str, np.ndarray]:
        """See `StreamEnv`, Information."""
        return {**super().info(), "interval": self.interval.copy()}


class StreamEnv(TraceEnv):
    """A head's cache while a text streams through it: rank what is held, every few tokens.

    ## Description

    A cache has room for `budget` tokens, and a text is longer. Tokens are appended until the cache
    is full; then what is held is ranked as it looks from now, and the best `budget - interval`
    tokens stay. This is what `kvenv.cache.EvictionCache` does while decoding, token for token, so
    a policy learned here is a scorer for it. The text, prompt and future, was recorded with all its
    queries (`kvenv record ... --queries all`), so no model runs.

    An episode is one recorded text of S tokens, seen by one head: a (layer, KV head) pair.

    ## Action Space

    `Box(-1, 1, (budget,), float32)`: a score for each slot, higher = keep. Only their order counts,
    ties keep the earlier token, and scores outside [-1, 1] are taken as they are.

    ## Observation Space

    `Box` of shape `(budget * (2d + 2),)`, float32, for heads of dimension d: a row of 2d + 2
    numbers for each slot, in order of position. `flat=False` keeps the rows apart, in the shape
    `(budget, 2d + 2)`. Rows of empty slots are zeros.

    | Column    | Observation                                               | Min     | Max    |
    |-----------|-----------------------------------------------------------|---------|--------|
    | 0 .. d-1  | the token's key in the frame of now, the newest one held  | -131008 | 131008 |
    | d .. 2d-1 | its value                                                 | -131008 | 131008 |
    | 2d        | log2(1 + age) / 16; age = now - its position              | 0       | 2      |
    | 2d+1      | validity: 1 for a token, 0 for an empty slot              | 0       | 1      |

    ## Rewards

    The selection comes first. Then the next `interval` tokens arrive one by one, and each one's
    queries look into the cache, itself included: the share of their attention, averaged over the
    query heads that share the KV head, that goes to tokens held. The reward is its mean over these
    tokens, in [0, 1]. With `sink_free=True` attention to the first 4 tokens does not count.

    ## Starting State

    The cache holds the first `budget` tokens of an episode; the episode and, where they are not
    fixed, a layer and a KV head are drawn uniformly. `reset(options={...})` picks instead, for this
    one episode:

    | Option      | Type    | Description                                     |
    |-------------|---------|-------------------------------------------------|
    | `"episode"` | **int** | index in the trace set                          |
    | `"layer"`   | **int** | a recorded layer, in the model's own numbers    |
    | `"head"`    | **int** | a KV head                                       |
    | `"budget"`  | **int** | as the argument of that name, at most as many   |

    ## Episode End

    An episode terminates with the last token of the text. It is never truncated.

    ## Information

    `reset()` and `step()` return a dict with

    - `"episode_index"`, `"layer"`, `"head"`: what is being read;
    - `"n"`: the prompt's tokens, of S;
    - `"budget"`, `"interval"`: the cache's slots, and the tokens between two selections;
    - `"position"`: the next token's, S after the last step;
    - `"retention"`: the attention found, averaged over the tokens that came since the start; 1
      before the first.

    `step()` adds

    - `"evicted"`: how many tokens went;
    - with `optimum=True` `"random"`, `"optimum"` and `"normalized_score"`: the retention of the
      whole text that chance expects, that the best schedule reaches, and where `"retention"` lies
      between them (at the end it cannot be above 1). Tokens that went never return,
      so the best schedule is a flow over time, solved exactly (`kvenv.envs.optimum`).

    ## Arguments

    ```python
    import gymnasium as gym

    env = gym.make("kvenv:kvenv/Stream-v1", traces="sample", budget=64, sinks=4, recent=16)
    observation, info = env.reset(seed=0)
    ```

    | Argument      | Type     | Default       | Description                                       |
    |---------------|----------|---------------|---------------------------------------------------|
    | `traces`      | **str**  | `"sample"`    | folder of a trace set recorded with all queries,  |
    |               |          |               | or a packaged one's id; a **list** of them joins  |
    |               |          |               | their episodes                                    |
    | `layer`       | **int**  | `None`        | layer, in the model's own numbers; `None`: drawn  |
    | `head`        | **int**  | `None`        | KV head; `None`: drawn                            |
    | `episodes`    | **list** | `None`        | draw from these episodes only                     |
    | `budget`      | **int**  | `64`          | slots; a float in (0, 1] is a share of the prompt |
    | `interval`    | **int**  | `None`        | tokens between selections; `None`: budget / 16,   |
    |               |          |               | within 8 and 128                                  |
    | `sinks`       | **int**  | `0`           | first tokens that are always kept                 |
    | `recent`      | **int**  | `0`           | last tokens that are always kept                  |
    | `sink_free`   | **bool** | `False`       | attention to the first 4 tokens does not count    |
    | `optimum`     | **bool** | `False`       | tell what chance and the best schedule reach      |
    | `flat`        | **bool** | `True`        | `False`: the observation has a row for each slot  |
    | `copy`        | **bool** | `True`        | `False`: all observations share one array, which  |
    |               |          |               | Gymnasium's check_env refuses                     |
    | `tokenizer`   | **str**  | `None`        | model whose tokenizer `"ansi"` uses               |
    | `render_mode` | **str**  | `None`        | `"rgb_array"` or `"ansi"`                         |

    - `budget` as a share gives longer prompts more slots; the spaces are those of the most.
    - `tokenizer=None` takes the recorded model's, and shows token ids where that cannot be had.
    - `"rgb_array"` draws which tokens were held at every step so far beside the attention they
      found. `"ansi"` writes the text so far with evicted words dimmed.
    - Attention over a whole text is computed when it is first read and kept: S * S / 2 numbers of
      4 bytes for each episode and head in use.

    ## Vectorized environment

    `gym.make_vec("kvenv/Stream-v1", num_envs=64, ...)` makes `kvenv.envs.StreamVectorEnv`: 64
    texts, of as many heads and layers as are drawn. Its default autoreset mode is `"NextStep"`.

    ## Version History

    * v1: A ranking of all that is held, every `interval` tokens, in place of a score for each token
      on arrival; keys in the frame of now; the offline optimum.
    * v0: Initial version.
    """

    def __init__(
        self,
        traces: Traces = "sample",
        layer: int | None = None,
        head: int | None = None,
        episodes: Sequence[int] | None = None,
        budget: Budget = 64,
        interval: int | None = None,
        sinks: int = 0,
        recent: int = 0,
        sink_free: bool = False,
        optimum: bool = False,
        flat: bool = True,
        copy: bool = True,
        tokenizer: str | None = None,
        render_mode: str | None = None,
    ) -> None:
        batch = StreamBatch(
            1,
            interval=interval,
            flat=flat,
            traces=traces,
            layer=layer,
            head=head,
            episodes=episodes,
            budget=budget,
            sinks=sinks,
            recent=recent,
            sink_free=sink_free,
            optimum=optimum,
            tokenizer=tokenizer,
        )
        super().__init__(batch, copy, render_mode)
        self.budget = budget
