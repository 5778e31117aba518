"""kvenv/Evict-v1: at every token, choose which slot of a full cache goes."""

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


class EvictBatch(SlotBatch):
    """The rules of kvenv/Evict-v1; see `EvictEnv` for the arguments.

    The newcomer waits beside the slots, in a column of its own, until a slot is freed for it.
    """

    env_id = "kvenv/Evict-v1"

    def __init__(self, num: int, *, flat: bool = True, **arguments: Any) -> None:
        super().__init__(num, **arguments)
        rows, columns = self.slots + 1, core.feature_count(self.head_dim)
        self._shape = (rows * columns,) if flat else (rows, columns)
        self.observation_space = token_box(self._shape, rows, self.head_dim)
        self.action_space = spaces.Discrete(rows)

    def candidates(self) -> np.ndarray:
        """Positions in the slots, the newcomer's last, (N, W + 1); -1 for none."""
        newcomer = np.where(self.now < self.lengths, self.now, -1)
        return np.concatenate([self.positions, newcomer[:, None]], 1)

    def allowed(self) -> np.ndarray:
        """Which slots may go, (N, W + 1) bool; the last one is the newcomer's."""
        positions = self.candidates()
        guarded = rules.protected(positions, self.now[:, None], self.sinks, self.recent)
        return (positions >= 0) & ~guarded

    def observe(self, which: np.ndarray | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """See `Batch.observe`."""
        which = self.every if which is None else which
        rows = self.rows(which, self.candidates()[which], self.now[which])
        if out is None:
            return rows.reshape(-1, *self._shape)
        out[...] = rows.reshape(out.shape)
        return out

    def check_actions(self, actions: Any, live: np.ndarray) -> np.ndarray:
        """Slots (N,) int64."""
        given, slots = np.asarray(actions), self.slots
        if given.shape != (self.num,) or given.dtype.kind not in "iu":
            wanted = "one whole number" if self.num == 1 else f"{self.num} whole numbers"
            raise KvenvError(
                f"action has shape {given.shape[self.num == 1 :]} and dtype {given.dtype}: give "
                f"{wanted} from 0 to {slots}"
            )
        inside = (given >= 0) & (given <= slots)
        slot = np.where(inside, given, slots).astype(np.int64)
        allowed = self.allowed()
        fine = inside & allowed[self.every, slot] | ~live
        if not fine.all():
            i = int(fine.argmin())
            if not inside[i]:
                raise KvenvError(
                    f"action {given[i]}{self.whose(i)} is not a slot: choose from 0 to {slots}"
                )
            raise KvenvError(
                f"action {slot[i]}{self.whose(i)} names a slot that may not go (empty, a sink or "
                f"recent): choose where the action mask is 1, such as {allowed[i].argmax()}"
            )
        return slot

    def advance(self, actions: np.ndarray) -> np.ndarray:
        """Let the tokens in these slots (N,) go, and pay what the newcomers' queries find."""
        live = self.now < self.lengths
        went = np.where(live, self.candidates()[self.every, actions], -1)
        takes = live & (actions < self.slots)
        self.positions[takes, actions[takes]] = self.now[takes]
        reward = self.find(self.now, self.positions, live)
        self.now = np.minimum(self.now + 1, self.lengths)
        self.done = self.now >= self.lengths
        self.finish({"evicted": went})
        return reward

    def problem(self, i: int) -> tuple[float, np.ndarray, np.ndarray, int, np.ndarray]:
        """See `SlotBatch.problem`: a period for each token that arrives at a full cache."""
        budget, length = int(self.budget[i]), int(self.lengths[i])
        place, periods = np.arange(length), np.arange(budget, length)[:, None]
        there = np.where(place <= periods, place, -1)
        guarded = rules.protected(there, periods, self.sinks, self.recent)
        gains = self.square(i)[budget:]
        return 0.0, gains, (place - budget).clip(0), budget, guarded

    def info(self) -> dict[str, np.ndarray]:
        """See `EvictEnv`, Information."""
        return {**super().info(), "action_mask": self.allowed().astype(np.int8)}


class EvictEnv(TraceEnv):
    """A head's full cache while a text streams through it: choose which token goes.

    ## Description

    A cache has room for `budget` tokens and is full. At every step a token arrives, and of the
    `budget` + 1 tokens one has to go. The text, prompt and future, was recorded with all its
    queries (`kvenv record ... --queries all`), so no model runs.

    An episode is one recorded text of S tokens, seen by one head: a (layer, KV head) pair. This is
    kvenv/Stream-v1 with a decision at every token.

    ## Action Space

    `Discrete(budget + 1)`: the slot whose token goes. Slots 0 to budget - 1 are the cache's, and
    the newcomer takes the freed one; the last slot is the newcomer's own, so choosing it keeps the
    cache as it is.

    ### Action mask

    Some slots may not go: the first `sinks` and the last `recent` tokens of the text, and, when
    `reset` asked for a smaller budget than the environment's, the empty ones. `info["action_mask"]`
    is 1 where a slot may go, `env.unwrapped.action_masks()` the same as bools, under the name where
    sb3-contrib's MaskablePPO looks for it. A slot that may not go is an error. With `sinks=0` and
    `recent=0`, the defaults, every slot may.

    ```python
    action = env.action_space.sample(info["action_mask"])
    ```

    ## Observation Space

    `Box` of shape `((budget + 1) * (2d + 2),)`, float32, for heads of dimension d: a row of 2d + 2
    numbers for each slot, the newcomer's last. `flat=False` keeps the rows apart, in the shape
    `(budget + 1, 2d + 2)`. Rows of empty slots are zeros.

    | Column    | Observation                                               | Min     | Max    |
    |-----------|-----------------------------------------------------------|---------|--------|
    | 0 .. d-1  | the token's key in the frame of now, the newcomer's place | -131008 | 131008 |
    | d .. 2d-1 | its value                                                 | -131008 | 131008 |
    | 2d        | log2(1 + age) / 16; age = newcomer's position - its own   | 0       | 2      |
    | 2d+1      | validity: 1 for a token, 0 for an empty slot              | 0       | 1      |

    A freed slot is taken by the newcomer, so rows are in no order of position.

    ## Rewards

    Once the decision is taken, the newcomer's queries look into the cache: the share of their
    attention, averaged over the query heads that share the KV head, that goes to tokens held. With
    `sink_free=True` attention to the first 4 tokens does not count.

    ## Starting State

    The cache holds the first `budget` tokens of an episode and the next one has arrived. The
    episode and, where they are not fixed, a layer and a KV head are drawn uniformly.
    `reset(options={...})` picks instead, for this one episode:

    | Option      | Type    | Description                                                      |
    |-------------|---------|------------------------------------------------------------------|
    | `"episode"` | **int** | index in the trace set                                           |
    | `"layer"`   | **int** | a recorded layer, in the model's own numbers                     |
    | `"head"`    | **int** | a KV head                                                        |
    | `"budget"`  | **int** | as the argument of that name, at most as many, and instead       |

    ## Episode End

    An episode terminates with the last token of the text, after S - budget steps. It is never
    truncated.

    ## Information

    `reset()` and `step()` return a dict with

    - `"episode_index"`, `"layer"`, `"head"`: what is being read;
    - `"n"`: the prompt's tokens, of S;
    - `"budget"`: the cache's slots;
    - `"position"`: the newcomer's, S after the last step;
    - `"retention"`: the attention found, averaged over the steps so far; 1 before the first;
    - `"action_mask"`: (budget + 1,) int8.

    `step()` adds

    - `"evicted"`: the position of the token that went;
    - with `optimum=True` `"random"`, `"optimum"` and `"normalized_score"`: the retention of the
      whole text that chance expects, that the best schedule reaches, and where `"retention"` lies
      between them (at the end it cannot be above 1).

    ## Arguments

    ```python
    import gymnasium as gym

    env = gym.make("kvenv:kvenv/Evict-v1", traces="sample", budget=64, sinks=4, recent=16)
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
    | `sinks`       | **int**  | `0`           | first tokens that are always kept                 |
    | `recent`      | **int**  | `0`           | last tokens that are always kept                  |
    | `sink_free`   | **bool** | `False`       | attention to the first 4 tokens does not count    |
    | `optimum`     | **bool** | `False`       | tell what chance and the best schedule reach      |
    | `flat`        | **bool** | `True`        | `False`: the observation has a row for each slot  |
    | `copy`        | **bool** | `True`        | `False`: all observations share one array, which  |
    |               |          |               | Gymnasium's check_env refuses                     |
    | `tokenizer`   | **str**  | `None`        | model whose tokenizer `"ansi"` uses               |
    | `render_mode` | **str**  | `None`        | `"rgb_array"` or `"ansi"`                         |

    - `budget` as a fraction gives longer prompts more slots; the spaces are those of the most.
    - `tokenizer=None` takes the recorded model's, and shows token ids where that cannot be had.
    - `"rgb_array"` draws which tokens were held at every step so far beside the attention they
      found. `"ansi"` writes the text so far with evicted words dimmed.

    ## Vectorized environment

    `gym.make_vec("kvenv/Evict-v1", num_envs=64, ...)` makes `kvenv.envs.EvictVectorEnv`: 64 texts,
    of as many heads and layers as are drawn. `action_masks()` is then (64, budget + 1). Its default
    autoreset mode is `"NextStep"`.

    ## Version History

    * v1: Keys in the frame of now; the offline optimum. The reward `"output"` is gone.
    * v0: Initial version.
    """

    batch: EvictBatch

    def __init__(
        self,
        traces: Traces = "sample",
        layer: int | None = None,
        head: int | None = None,
        episodes: Sequence[int] | None = None,
        budget: Budget = 64,
        sinks: int = 0,
        recent: int = 0,
        sink_free: bool = False,
        optimum: bool = False,
        flat: bool = True,
        copy: bool = True,
        tokenizer: str | None = None,
        render_mode: str | None = None,
    ) -> None:
        batch = EvictBatch(
            1,
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

    def action_masks(self) -> np.ndarray:
        """Which slots may go, (budget + 1,) bool."""
        return self.batch.allowed()[0]
