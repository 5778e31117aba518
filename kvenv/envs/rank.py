"""kvenv/Rank-v1: rank a prompt's tokens once, and be paid what the ranking keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from gymnasium import spaces

from kvenv import rules as u
from kvenv.envs import core
from kvenv.envs.arena import Arena
from kvenv.envs.batch import Batch, token_box
from kvenv.envs.render import RankView, draw_rank, write_rank
from kvenv.envs.single import TraceEnv
from kvenv.envs.source import Source, Traces, integer
from kvenv.errors import KvenvError
from kvenv.rules import Budget


class RankBatch(Batch):
    """The rules of kvenv/Rank-v1; see `RankEnv` for the arguments."""

    env_id = "kvenv/Rank-v1"
    options = ("episode", "layer", "head", "budgets")

    def __init__(
        self,
        num: int,
        traces: Traces = "sample",
        layer: int | None = None,
        head: int | None = None,
        episodes: Sequence[int] | None = None,
        reward: Literal["attention", "output"] = "attention",
        budgets: Sequence[Budget] | None = None,
        sinks: int = 0,
        recent: int = 0,
        sink_free: bool = False,
        max_tokens: int | None = None,
        flat: bool = True,
        tokenizer: str | None = None,
    ) -> None:
        source = Source(traces, layer, head, episodes)
        super().__init__(num, source, reward, sinks, recent, sink_free, tokenizer)
        self.max_tokens = _max_tokens(max_tokens, int(source.n.max()))
        self.budgets = u.FRACTIONS if budgets is None and reward == "output" else budgets
        # What no episode, or not the shortest one, could satisfy is told now.
        drawn = core.ranked_tokens(int(source.n[source.episodes].min()), sink_free)
        core.resolve_budgets(self.budgets, drawn)
        d = source.traces.model.head_dim
        columns = core.feature_count(d)
        rows = self.max_tokens
        self._shape = (rows * columns,) if flat else (rows, columns)
        self.observation_space = token_box(self._shape, rows, d)
        self.action_space = spaces.Box(-1.0, 1.0, (self.max_tokens,), dtype=np.float32)
        self._skipped = u.SINKS if sink_free else 0
        self._width = self.max_tokens - self._skipped
        self.arena = Arena(
            len(source.n) * len(source.heads),
            num,
            {
                "rows": ((self.max_tokens * columns,), np.float32),
                "utility": ((self.max_tokens,), np.float32),
                "oracle": ((), np.float64),
            },
            self._load,
        )
        # Of episodes that are not drawn, only those that options ask for must have these budgets.
        counted = source.n - self._skipped
        drawable = np.where(np.isin(np.arange(len(counted)), source.episodes), counted, drawn)
        self._default = core.budget_columns(self.budgets, drawable, self._width)
        self._reported = core.budget_columns(u.FRACTIONS, counted.clip(1), self._width)[0]
        self._columns = np.zeros((num, self._default[0].shape[1]), dtype=np.int64)
        self._count, self._all_budgets = np.ones(num, dtype=np.int64), np.ones(num, dtype=bool)
        self._oracle = np.zeros(num)
        self._scores = np.zeros((num, self.max_tokens))
        self._ranked = np.zeros(num, dtype=bool)
        self._retained, self._change = np.zeros(num), np.zeros(num)
        self._outcome: dict[str, np.ndarray] = {}
        self._outputs: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def _load(self, entry: int) -> dict[str, np.ndarray | float]:
        episode, head = self.entry(entry)
        n = int(self.source.n[episode])
        keys, values = (self.source.read(episode, f, head)[:n] for f in ("keys", "values"))
        framed = self.source.frame(keys[None], np.array([head]), np.array([n - 1]))[0]
        utility = self.source.read(episode, "utility/sum", head)
        oracle = np.nan  # of an episode that is not drawn, which may not have these budgets
        if episode in self.source.episodes:
            mass = self._counted(utility)
            oracle = float(u.oracle_reward(mass, core.resolve_budgets(self.budgets, len(mass))))
        return {
            "rows": core.features(framed, values, np.arange(n - 1, -1, -1)).ravel(),
            "utility": utility,
            "oracle": oracle,
        }

    def _check(self, episode: np.ndarray, options: Mapping[str, Any]) -> Any:
        budgets = options.get("budgets")
        if budgets is None and options.get("episode") is None:
            return self.budgets, self.arena["oracle"], [table[episode] for table in self._default]
        n = self.source.n[episode]
        core.ranked_tokens(int(n.min()), self.sink_free)
        asked = self.budgets if budgets is None else budgets
        return asked, None, core.budget_columns(asked, n - self._skipped, self._width)

    def _begin(self, which: np.ndarray, extra: Any) -> None:
        budgets, oracle, (columns, count) = extra
        short = columns.shape[1] - self._columns.shape[1]
        if short > 0:
            self._columns = np.pad(self._columns, ((0, 0), (0, short)), constant_values=self._width)
        self._columns[which, columns.shape[1] :] = self._width  # stands for no budget
        self._columns[which, : columns.shape[1]] = columns
        self._count[which] = count
        self._all_budgets[which] = budgets is None
        if oracle is not None:
            self._oracle[which] = oracle[self.row[which]]
        else:
            utility = self.arena["utility"][self.row[which]]
            beyond = np.arange(self.max_tokens) >= self.n[which, None]
            curve = self._curve(utility, np.where(beyond, -np.inf, utility), self.n[which])
            self._oracle[which] = core.mean_at(curve, columns, count)
        self._ranked[which] = False
        if self.reward == "output":
            for i in which.tolist():
                episode, head = int(self.episode[i]), int(self.head[i])
                fields = ("queries", "keys", "values")
                queries, keys, values = (self.source.read(episode, f, head) for f in fields)
                self._outputs[i] = (queries[:, self.n[i] - len(keys) :], keys, values)

    def observe(self, which: np.ndarray | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """See `Batch.observe`."""
        row = self.row if which is None else self.row[which]
        flat = None if out is None else out.reshape(len(row), -1)
        rows = self.arena["rows"].take(row, 0, flat, "clip")
        return rows.reshape(-1, *self._shape)

    def check_actions(self, actions: Any, live: np.ndarray) -> np.ndarray:
        """Scores (N, max_tokens), -inf from each prompt's end on."""
        given = np.asarray(actions)
        if given.shape != (self.num, self.max_tokens) or given.dtype.kind not in "fiu":
            raise KvenvError(
                f"action has shape {given.shape[self.num == 1 :]} and dtype {given.dtype}: "
                f"give {self.max_tokens} numbers, one for each token of the observation"
                + (f", in each of {self.num} environments" if self.num > 1 else "")
            )
        beyond = np.arange(self.max_tokens) >= self.n[:, None]
        fine = np.isfinite(given) | beyond | ~live[:, None]
        if not fine.all():
            i, token = (int(x) for x in np.argwhere(~fine)[0])
            raise KvenvError(
                f"action gives token {token}{self.whose(i)} the score {given[i, token]}: give "
                "finite scores"
            )
        return np.where(beyond, -np.inf, given)

    def advance(self, actions: np.ndarray) -> np.ndarray:
        """Rank the prompts by the scores; every episode ends with it."""
        place = np.arange(self.max_tokens)
        n = self.n[:, None]
        kept = (place < self.sinks) | ((place >= n - self.recent) & (place < n))
        scores = np.where(kept, np.inf, actions)
        curve = self._curve(self.arena["utility"][self.row], scores, self.n)
        reward = core.mean_at(curve, self._columns, self._count)
        # The same sum as kvenv.rules.random_reward's: whole numbers, divided once.
        tokens = ((self._columns + 1) * (self._columns < self._width)).sum(-1)
        random = tokens / (self._count * (self.n - self._skipped))
        self._outcome = {
            "retention": np.take_along_axis(curve, self._reported[self.episode], -1),
            "random": random,
            "oracle": self._oracle.copy(),
            "normalized_score": core.normalized_score(reward, self._oracle, random),
        }
        self._scores = scores
        self._ranked[:] = self.done[:] = True
        self._retained = reward
        if self.reward == "attention":
            return reward
        # A head at a time: a batched matrix product may sum in another order than a single one.
        errors = np.zeros((self.num, int(self._count.max())))
        for i, count in enumerate(self._count):
            budgets = (self._columns[i, :count] + 1).tolist()
            ranked = scores[i, : self.n[i]]
            errors[i, :count] = core.output_error(*self._outputs[i], ranked, budgets)
        self._outcome["output_error"] = errors
        self._change = errors.cumsum(-1)[:, -1] / self._count
        return -self._change

    def outcome(self) -> dict[str, np.ndarray]:
        """See `RankEnv`, Information."""
        return self._outcome

    def picture(self, i: int) -> np.ndarray:
        """See `kvenv.envs.render.draw_rank`."""
        return draw_rank(self._look(i))

    def text(self, i: int) -> str:
        """See `kvenv.envs.render.write_rank`."""
        tokens = self.source.tokens(int(self.episode[i]))[: self.n[i]]
        return write_rank(self._look(i), tokens, self.tokenizer)

    def _look(self, i: int) -> RankView:
        """The tokens that count, as the renderers want them."""
        title = self.title(i)
        scores = None
        if self._ranked[i]:
            scores = self._counted(self._scores[i, : self.n[i]])
            normalized_score = self._outcome["normalized_score"][i]
            title += (
                f" · retention {self._retained[i]:.2f} · normalized score {normalized_score:.2f}"
            )
            if self.reward == "output":
                title += f" · output error {self._change[i]:.2f}"
        return RankView(
            title=title,
            utility=self._counted(self.arena["utility"][self.row[i], : self.n[i]]),
            scores=scores,
            budgets=None
            if self._all_budgets[i]
            else (self._columns[i, : self._count[i]] + 1).tolist(),
            first=self._skipped,
        )

    def _curve(self, utility: np.ndarray, scores: np.ndarray, n: np.ndarray) -> np.ndarray:
        """Retention of the tokens that count, (m, width)."""
        return core.rank_curve(self._counted(utility), self._counted(scores), n - self._skipped)

    def _counted(self, array: np.ndarray) -> np.ndarray:
        return u.without_sinks(array, self._skipped)


class RankEnv(TraceEnv):
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

    `Box` of shape `(max_tokens * (2d + 2),)`, float32, for heads of dimension d: a row of 2d + 2
    numbers for each token, in the prompt's order. `flat=False` keeps the rows apart, in the shape
    `(max_tokens, 2d + 2)`. A prompt shorter than `max_tokens` is padded with rows of zeros.

    | Column    | Observation                                       | Min     | Max    |
    |-----------|---------------------------------------------------|---------|--------|
    | 0 .. d-1  | key in the frame of now                           | -131008 | 131008 |
    | d .. 2d-1 | value                                             | -131008 | 131008 |
    | 2d        | log2(1 + age) / 16                                | 0       | 2      |
    | 2d+1      | validity: 1 for a token, 0 for padding            | 0       | 1      |

    Now is the prompt's last token. The frame of now is the key as a query there meets it: the
    rotary embedding turned back by now's position (`kvenv.rotation.Rotation.frame`), so that a
    key looks the same at any length. A token's age is its distance to now.

    ## Rewards

    - `reward="attention"`: retention, averaged over budgets. Retention at budget b is the share of
      the head's utility (the attention that prompt tokens receive from the future) that the first
      b tokens of the ranking hold. It lies in [0, 1]; over all budgets a random ranking expects
      (n + 1) / 2n. See `kvenv.rules.reward`.
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

    - `"episode_index"`, `"layer"`, `"head"`: what is being ranked;
    - `"n"`: the prompt's tokens, and so the observation's valid rows.

    `step()` adds

    - `"retention"`: (4,) float64, retention at 1/16, 1/8, 1/4 and 1/2 of the prompt;
    - `"random"`, `"oracle"`: retention averaged over the budgets, of a random ranking (its
      expectation) and of sorting by the utility itself;
    - `"normalized_score"`: how much of the way from random to oracle the ranking went: 0 is chance,
      1 is perfect;
    - `"output_error"`: (number of budgets,) float64, only with `reward="output"`.

    The first four measure attention also with `reward="output"`. `"random"` and `"oracle"` know of
    no protected tokens, so `sinks` and `recent` can move normalized score either way.

    ## Arguments

    ```python
    import gymnasium as gym

    env = gym.make("kvenv:kvenv/Rank-v1", traces="sample", layer=10, head=1, budgets=[0.25])
    observation, info = env.reset(seed=0)
    ```

    | Argument      | Type     | Default       | Description                                       |
    |---------------|----------|---------------|---------------------------------------------------|
    | `traces`      | **str**  | `"sample"`    | folder of a trace set, or a packaged one's id; a  |
    |               |          |               | **list** of them joins their episodes             |
    | `layer`       | **int**  | `None`        | layer, in the model's own numbers; `None`: drawn  |
    | `head`        | **int**  | `None`        | KV head; `None`: drawn                            |
    | `episodes`    | **list** | `None`        | draw from these episodes only                     |
    | `reward`      | **str**  | `"attention"` | `"attention"` or `"output"`                       |
    | `budgets`     | **list** | `None`        | ints: tokens, floats in (0, 1]: of the prompt     |
    | `sinks`       | **int**  | `0`           | first tokens that are always kept                 |
    | `recent`      | **int**  | `0`           | last tokens that are always kept                  |
    | `sink_free`   | **bool** | `False`       | leave the first 4 tokens out of the utility       |
    | `max_tokens`  | **int**  | `None`        | rows; `None`: as many as the longest prompt has   |
    | `flat`        | **bool** | `True`        | `False`: the observation has a row for each token |
    | `copy`        | **bool** | `True`        | `False`: all observations share one array, which  |
    |               |          |               | Gymnasium's check_env refuses                     |
    | `tokenizer`   | **str**  | `None`        | model whose tokenizer `"ansi"` uses               |
    | `render_mode` | **str**  | `None`        | `"rgb_array"` or `"ansi"`                         |

    - `traces` may be a `Path`, but only a str keeps the EnvSpec JSON-safe.
    - `budgets=None` is every budget from 1 to n, and 1/16, 1/8, 1/4 and 1/2 for `"output"`.
    - `tokenizer=None` takes the recorded model's, and shows token ids where that cannot be had.
    - `"rgb_array"` draws which tokens each budget keeps beside the retention curve. `"ansi"` writes
      the text with evicted words dimmed, at the first of `budgets` or at a quarter of the prompt.

    ## Vectorized environment

    `gym.make_vec("kvenv/Rank-v1", num_envs=64, ...)` makes `kvenv.envs.RankVectorEnv`, which ranks
    64 prompts in one step and starts the next ones at once (autoreset mode `"SameStep"`).

    ## Version History

    * v1: Keys in the frame of now, ages instead of positions. `"closure"` is
      `"normalized_score"`.
    * v0: Initial version.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array", "ansi"], "render_fps": 1}  # noqa: RUF012

    def __init__(
        self,
        traces: Traces = "sample",
        layer: int | None = None,
        head: int | None = None,
        episodes: Sequence[int] | None = None,
        reward: Literal["attention", "output"] = "attention",
        budgets: Sequence[Budget] | None = None,
        sinks: int = 0,
        recent: int = 0,
        sink_free: bool = False,
        max_tokens: int | None = None,
        flat: bool = True,
        copy: bool = True,
        tokenizer: str | None = None,
        render_mode: str | None = None,
    ) -> None:
        batch = RankBatch(
            1,
            traces=traces,
            layer=layer,
            head=head,
            episodes=episodes,
            reward=reward,
            budgets=budgets,
            sinks=sinks,
            recent=recent,
            sink_free=sink_free,
            max_tokens=max_tokens,
            flat=flat,
            tokenizer=tokenizer,
        )
        super().__init__(batch, copy, render_mode)
        self.max_tokens = batch.max_tokens


def _max_tokens(asked: int | None, longest: int) -> int:
    """Rows of an observation; KvenvError where the longest prompt does not fit."""
    if asked is not None and integer("max_tokens", asked) < longest:
        raise KvenvError(
            f"max_tokens={asked} is less than the longest prompt: give {longest} or more"
        )
    return longest if asked is None else asked
