"""kvenv/Stream-v0: score every token as it arrives; a cache of fixed size keeps the best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from gymnasium import spaces

from kvenv.envs import core
from kvenv.envs.batch import LARGEST, token_box
from kvenv.envs.single import TraceEnv
from kvenv.envs.slots import SlotBatch
from kvenv.envs.source import Traces
from kvenv.errors import KvenvError


class StreamBatch(SlotBatch):
    """The rules of kvenv/Stream-v0; see `StreamEnv` for the arguments."""

    env_id = "kvenv/Stream-v0"

    def __init__(self, num: int, **arguments: Any) -> None:
        super().__init__(num, **arguments)
        wide = 2 * self.head_dim
        self.observation_space = token_box(
            1, [(wide, -LARGEST), (2, 0)], [(wide, LARGEST), (1, 2), (1, 1)]
        )
        self.action_space = spaces.Box(-1.0, 1.0, (1,), dtype=np.float32)
        self._scores = np.zeros(self.positions.shape, dtype=np.float64)

    def observe(self, which: np.ndarray | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """See `Batch.observe`."""
        which = self.every if which is None else which
        now, budget = self.now[which], self.budget[which]
        if out is None:
            out = np.empty((len(which), 2 * self.head_dim + 2), np.float32)
        out[:, :-1] = self.arena["tokens"][self.row[which], now]
        out[:, -1] = np.minimum(now, budget) / budget
        return out

    def check_actions(self, actions: Any, live: np.ndarray) -> np.ndarray:
        """Scores (N,) float64."""
        given = np.asarray(actions)
        if given.shape != (self.num, 1) or given.dtype.kind not in "fiu":
            raise KvenvError(
                f"action has shape {given.shape[self.num == 1 :]} and dtype {given.dtype}: give "
                + ("an array of one number" if self.num == 1 else f"{self.num} rows of one number")
            )
        scores = given[:, 0].astype(np.float64)
        if (wrong := live & ~np.isfinite(scores)).any():
            i = int(wrong.argmax())
            raise KvenvError(
                f"action gives token {self.now[i]}{self.whose(i)} the score {scores[i]}: give a "
                "finite score"
            )
        return scores

    def advance(self, actions: np.ndarray) -> np.ndarray:
        """Let the newcomers in by their scores (N,)."""
        self._scores[:, -1] = actions
        full = self.now >= self.budget
        lowest = core.lowest_slot(self._scores, self.positions, ~self.allowed())
        slot = np.where(full, lowest, self.now)
        self._scores[self.every, slot] = actions
        return self.place(slot)


class StreamEnv(TraceEnv):
    """A head's cache while a text streams through it: score each token as it arrives.

    ## Description

    A cache has room for `budget` tokens, and a text is longer. Every token is scored once, when it
    arrives; when the cache is full, the token with the lowest score goes to make room. This is what
    `kvenv.cache.EvictionCache` does while decoding with a scorer whose scores are fixed on arrival,
    so a policy learned here is such a scorer. The text, prompt and future, was recorded with all
    its queries (`kvenv record ... --queries all`), so no model runs.

    An episode is one recorded text of S tokens, seen by one head: a (layer, KV head) pair.

    ## Action Space

    `Box(-1, 1, (1,), float32)`: the newcomer's score, higher = keep. Only the order of scores
    counts, and scores outside [-1, 1] are taken as they are. Of equal scores the later token goes.

    ## Observation Space

    `Box` of shape `(2d + 2,)`, float32, for heads of dimension d:

    | Column    | Observation                                               | Min    | Max   |
    |-----------|-----------------------------------------------------------|--------|-------|
    | 0 .. d-1  | the newcomer's key, as the cache holds it                 | -65504 | 65504 |
    | d .. 2d-1 | its value                                                 | -65504 | 65504 |
    | 2d        | log2(1 + position) / 16                                   | 0      | 2     |
    | 2d+1      | fill: tokens held / budget                                | 0      | 1     |

    Unlike kvenv/Rank-v0 there is no position / n, which a decoder cannot know. After the last token
    the newcomer's columns are zero.

    ## Rewards

    The decision comes first, then this step's queries (the newcomer's own) look into the cache:

    - `reward="attention"`: the share of their attention, averaged over the query heads that share
      the KV head, that goes to tokens which the cache holds. It is in [0, 1], and 1 while the cache
      has not been full. With `sink_free=True` attention to the first 4 tokens does not count.
    - `reward="output"`: minus the relative error ||o - o_full|| / ||o_full|| of the attention
      output, renormalised over the tokens held and averaged over those query heads.

    ## Cache

    The first `budget` tokens fill the slots. Then, at every step, of the tokens held and the
    newcomer the one with the lowest score goes, except the first `sinks` and the last `recent`
    tokens of the text, which never do. With `recent=0` the newcomer itself may go at once. An
    `EvictionCache` always keeps the newcomer: with the same `sinks` and `recent` (4 and 16 are its
    defaults) it holds the same tokens at every step.

    ## Starting State

    An empty cache and the first token of an episode; the episode and, where they are not fixed, a
    layer and a KV head are drawn uniformly. `reset(options={...})` picks instead, for this one
    episode:

    | Option      | Type    | Description                                     |
    |-------------|---------|-------------------------------------------------|
    | `"episode"` | **int** | index in the trace set                          |
    | `"layer"`   | **int** | a recorded layer, in the model's own numbers    |
    | `"head"`    | **int** | a KV head                                       |
    | `"budget"`  | **int** | as the argument of that name, and instead       |

    ## Episode End

    An episode terminates with the last token of the text, after S steps. It is never truncated.

    ## Information

    `reset()` and `step()` return a dict with

    - `"episode_index"`, `"layer"`, `"head"`: what is being read;
    - `"n"`: the prompt's tokens, of S;
    - `"budget"`: the cache's slots;
    - `"position"`: the newcomer's, S after the last step;
    - `"retention"`: the attention found, averaged over the steps at which the cache was full; 1
      before. It measures attention also with `reward="output"`.

    `step()` adds

    - `"evicted"`: the position of the token that went, -1 if none did.

    ## Arguments

    ```python
    import gymnasium as gym

    env = gym.make("kvenv:kvenv/Stream-v0", traces="sample", budget=64, sinks=4, recent=16)
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
    | `reward`      | **str**  | `"attention"` | `"attention"` or `"output"`                       |
    | `sinks`       | **int**  | `0`           | first tokens that are always kept                 |
    | `recent`      | **int**  | `0`           | last tokens that are always kept                  |
    | `sink_free`   | **bool** | `False`       | attention to the first 4 tokens does not count    |
    | `copy`        | **bool** | `True`        | `False`: all observations share one array, which  |
    |               |          |               | Gymnasium's check_env refuses                     |
    | `tokenizer`   | **str**  | `None`        | model whose tokenizer `"ansi"` uses               |
    | `render_mode` | **str**  | `None`        | `"rgb_array"` or `"ansi"`                         |

    - `tokenizer=None` takes the recorded model's, and shows token ids where that cannot be had.
    - `"rgb_array"` draws which tokens were held at every step so far beside the attention they
      found. `"ansi"` writes the text so far with evicted words dimmed.
    - Attention over a whole text is computed when it is first read and kept: S * S / 2 numbers of
      4 bytes for each episode and head in use.

    ## Vectorized environment

    `gym.make_vec("kvenv/Stream-v0", num_envs=64, ...)` makes `kvenv.envs.StreamVectorEnv`: 64
    texts, of as many heads and layers as are drawn. Its default autoreset mode is `"NextStep"`.

    ## Version History

    * v0: Initial version.
    """

    def __init__(
        self,
        traces: Traces = "sample",
        layer: int | None = None,
        head: int | None = None,
        episodes: Sequence[int] | None = None,
        budget: core.Budget = 64,
        reward: Literal["attention", "output"] = "attention",
        sinks: int = 0,
        recent: int = 0,
        sink_free: bool = False,
        copy: bool = True,
        tokenizer: str | None = None,
        render_mode: str | None = None,
    ) -> None:
        batch = StreamBatch(
            1,
            traces=traces,
            layer=layer,
            head=head,
            episodes=episodes,
            budget=budget,
            reward=reward,
            sinks=sinks,
            recent=recent,
            sink_free=sink_free,
            tokenizer=tokenizer,
        )
        super().__init__(batch, copy, render_mode)
        self.budget = budget
