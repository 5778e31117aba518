"""kvenv/Evict-v0: at every token, choose which slot of a full cache goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces

from kvenv.envs import core
from kvenv.envs.batch import LARGEST, token_box
from kvenv.envs.single import TraceEnv
from kvenv.envs.slots import SlotBatch
from kvenv.envs.source import Traces
from kvenv.errors import KvenvError


class EvictBatch(SlotBatch):
    """The rules of kvenv/Evict-v0; see `EvictEnv` for the arguments."""

    env_id = "kvenv/Evict-v0"

    def __init__(self, num: int, *, flat: bool = True, **arguments: Any) -> None:
        super().__init__(num, **arguments)
        wide, slots = 2 * self.head_dim, self.slots + 1
        box = token_box(slots, [(wide, -LARGEST), (3, 0)], [(wide, LARGEST), (2, 2), (1, 1)])
        self._shape = box.shape if flat else (slots, wide + 3)
        low, high = box.low.reshape(self._shape), box.high.reshape(self._shape)
        self.observation_space = spaces.Box(low, high, dtype=np.float32)
        self.action_space = spaces.Discrete(slots)
        self._rows = np.zeros((num, slots, wide + 3), np.float32)
        self._log = (torch.log2(1 + torch.arange(self.longest + 2).double()) / 16).float().numpy()

    def _begin(self, which: np.ndarray, extra: np.ndarray) -> None:
        super()._begin(which, extra)
        budget = self.budget[which, None]
        filled = np.where(np.arange(self.slots) < budget, np.arange(self.slots), -1)
        self.positions[which, :-1] = filled
        self.now[which] = self.positions[which, -1] = budget[:, 0]
        # Position -1 reads the row of zeros after the last token.
        tokens = self.arena["tokens"][self.row[which, None], self.positions[which]]
        self._rows[which, :, :-2] = tokens
        if self.history is not None:
            for i in which.tolist():  # pictures only
                steps = np.arange(int(self.budget[i]))
                self.history[i, steps[:, None], steps] = np.where(
                    steps <= steps[:, None], steps, -1
                )

    def observe(self, which: np.ndarray | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """See `Batch.observe`."""
        chosen = slice(None) if which is None else which
        rows, positions = self._rows[chosen], self.positions[chosen]
        age = self.now[chosen, None] - positions
        rows[..., -2] = np.where(positions < 0, 0, self._log.take(age, mode="clip"))
        rows[..., -1] = self.allowed()[chosen] & (positions >= 0)
        if out is None:
            return rows.reshape(-1, *self._shape).copy()
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
        """Let these slots (N,) go."""
        self._rows[self.every, actions] = self._rows[:, -1]
        reward = self.place(actions)
        self._rows[:, -1, :-2] = self.arena["tokens"][self.row, self.now]
        return reward

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
    kvenv/Stream-v0 with the decision taken by the agent, not by scores that were fixed on arrival:
    an agent may change its mind about a token.

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

    `Box` of shape `((budget + 1) * (2d + 3),)`, float32, for heads of dimension d: a row of 2d + 3
    numbers for each slot, the newcomer's last. `flat=False` keeps the rows apart, in the shape
    `(budget + 1, 2d + 3)`. Rows of empty slots are zeros.

    | Column    | Observation                                               | Min    | Max   |
    |-----------|-----------------------------------------------------------|--------|-------|
    | 0 .. d-1  | the token's key, as the cache holds it                    | -65504 | 65504 |
    | d .. 2d-1 | its value                                                 | -65504 | 65504 |
    | 2d        | log2(1 + position) / 16                                   | 0      | 2     |
    | 2d+1      | log2(1 + age) / 16; age = newcomer's position - its own   | 0      | 2     |
    | 2d+2      | 1 if the slot may go, else 0                              | 0      | 1     |

    A freed slot is taken by the newcomer, so rows are in no order of position.

    ## Rewards

    As in kvenv/Stream-v0, once the decision is taken: the attention that the newcomer's queries
    find in the cache (`reward="attention"`), or minus the relative error of the attention output
    (`reward="output"`). With `sink_free=True` attention to the first 4 tokens does not count.

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

    - `"evicted"`: the position of the token that went.

    ## Arguments

    ```python
    import gymnasium as gym

    env = gym.make("kvenv:kvenv/Evict-v0", traces="sample", budget=64, sinks=4, recent=16)
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

    `gym.make_vec("kvenv/Evict-v0", num_envs=64, ...)` makes `kvenv.envs.EvictVectorEnv`: 64 texts,
    of as many heads and layers as are drawn. `action_masks()` is then (64, budget + 1). Its default
    autoreset mode is `"NextStep"`.

    ## Version History

    * v0: Initial version.
    """

    batch: EvictBatch

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
            reward=reward,
            sinks=sinks,
            recent=recent,
            sink_free=sink_free,
            tokenizer=tokenizer,
        )
        super().__init__(batch, copy, render_mode)

    def action_masks(self) -> np.ndarray:
        """Which slots may go, (budget + 1,) bool."""
        return self.batch.allowed()[0]
