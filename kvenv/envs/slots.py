"""What kvenv/Stream-v1 and kvenv/Evict-v1 share: texts that stream through caches of fixed size."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from kvenv import rules
from kvenv.envs import core
from kvenv.envs.arena import Arena, Shape
from kvenv.envs.batch import Batch
from kvenv.envs.optimum import best_schedule, chance
from kvenv.envs.render_stream import StreamView, draw_stream, write_stream
from kvenv.envs.source import Source, Traces, per_environment
from kvenv.errors import KvenvError
from kvenv.rules import Budget


class SlotBatch(Batch):
    """N caches of ``budget`` slots each, and the texts that stream through them.

    Slots hold positions, -1 where nothing is. An episode begins with the first ``budget`` tokens
    held.

    Args:
        num: N.
        budget: slots, in tokens or as a share of the prompt.
        optimum: tell what the best schedule and chance reach.
        traces, layer, head, episodes, sinks, recent, sink_free, tokenizer: see `StreamEnv`.

    Attributes:
        asked: the budget as it was given.
        slots: the most slots that an episode can ask for, W.
        now: the position of the next token, (N,); S once the text is over.
        budget: slots of each environment, (N,).
        positions: (N, W).
        history: what every step held, (N, S, W), if the batch remembers.
    """

    options: ClassVar[tuple[str, ...]] = ("episode", "layer", "head", "budget")

    def __init__(
        self,
        num: int,
        traces: Traces = "sample",
        layer: int | None = None,
        head: int | None = None,
        episodes: Sequence[int] | None = None,
        budget: Budget = 64,
        sinks: int = 0,
        recent: int = 0,
        sink_free: bool = False,
        optimum: bool = False,
        tokenizer: str | None = None,
    ) -> None:
        source = Source(traces, layer, head, episodes)
        super().__init__(num, source, "attention", sinks, recent, sink_free, tokenizer)
        source.need_all_queries()
        if np.ndim(budget):
            raise KvenvError(f"budget={budget!r} is not one number: give tokens or a share")
        self.asked, self.optimum = budget, optimum
        self.slots = int(self._budgets(budget, source.episodes).max())
        # Of the episodes that are not drawn, the checked ones are those that options ask for.
        self._default = self._tokens(budget, np.arange(len(source.n)))
        self.longest = int(source.lengths.max())
        d, rows = source.traces.model.head_dim, self.longest + 1
        # One row more than there are tokens: what comes after the last one is all zeros.
        fields: dict[str, tuple[Shape, type[np.generic]]] = {
            "tokens": ((rows, 2 * d), np.float32),
            "attention": ((int(core.row_start(rows)),), np.float32),
        }
        self.arena = Arena(len(source.n) * len(source.heads), num, fields, self._load)
        self.head_dim, self._dropped = d, rules.SINKS if sink_free else 0
        self.lengths = np.zeros(num, dtype=np.int64)
        self.now, self.budget = np.zeros(num, dtype=np.int64), np.ones(num, dtype=np.int64)
        self.positions = np.full((num, self.slots), -1, dtype=np.int64)
        self._found, self._queries = np.zeros(num), np.zeros(num, dtype=np.int64)
        self._outcome: dict[str, np.ndarray] = {}
        self.history: np.ndarray | None = None
        self._masses = np.zeros((num, self.longest))
        self._known: dict[tuple[int, ...], tuple[float, float]] = {}

    @abstractmethod
    def problem(self, i: int) -> tuple[float, np.ndarray, np.ndarray, int, np.ndarray]:
        """The episode of environment ``i`` as `kvenv.envs.optimum.best_schedule` takes it.

        Returns:
            What is found in any case, then gains, first, capacity and guarded.
        """

    def square(self, i: int) -> np.ndarray:
        """The attention (S, S) float64 that each token of environment ``i`` pays to each before."""
        length = int(self.lengths[i])
        padded = np.zeros((length, length + 1))
        packed = self.arena["attention"][self.row[i]]
        padded[np.tril(np.ones((length, length + 1), dtype=bool), 1)] = packed[
            : int(core.row_start(length)) - 1
        ]
        return padded[:, 1:]

    def rows(self, which: np.ndarray, positions: np.ndarray, now: np.ndarray) -> np.ndarray:
        """What agents see of tokens at these positions, (m, W, 2d + 2); see `core.features`.

        Args:
            which: environments, (m,).
            positions: (m, W), -1 where there is no token.
            now: the newest token's position, (m,).
        """
        d = self.head_dim
        # Position -1 reads the row of zeros after the last token.
        states = self.arena["tokens"][self.row[which, None], positions]
        framed = self.source.frame(states[..., :d], self.head[which], now)
        ages = np.where(positions < 0, -1, now[:, None] - positions)
        return core.features(framed, states[..., d:], ages)

    def find(self, t: np.ndarray, held: np.ndarray, live: np.ndarray) -> np.ndarray:
        """The attention that token t's queries find among tokens held; noted where it counts.

        Args:
            t: positions, (N,).
            held: (N, W) positions, -1 for none.
            live: which environments have such a token, (N,) bool.

        Returns:
            (N,) float64; 0 where nothing counts.
        """
        packed = self.arena["attention"]
        start = (self.row * packed.shape[1] + core.row_start(t))[:, None]
        mass = packed.reshape(-1).take(start + held, mode="clip").astype(np.float64).sum(-1)
        counts = live & (t >= self._dropped)  # before, there is nothing to find
        mass = np.where(counts, np.minimum(mass, 1.0), 0.0)
        self._found += mass
        self._queries += counts
        if self.history is not None:
            rows = self.every[live]
            self.history[rows, t[live], : held.shape[1]] = held[live]
            self._masses[rows, t[live]] = np.where(counts, mass, 1.0)[live]
        return mass

    def _load(self, entry: int) -> dict[str, np.ndarray | float]:
        episode, head = self.entry(entry)
        keys, values, queries = (
            self.source.read(episode, field, head) for field in ("keys", "values", "queries")
        )
        rows = core.attention(queries, keys, self._dropped)
        return {
            "tokens": np.concatenate([keys, values], -1).astype(np.float32),
            "attention": core.triangle(rows.mean(0)),
        }

    def _tokens(self, budget: Any, episodes: np.ndarray) -> np.ndarray:
        """Slots for each of these episodes, from tokens or shares: one for all, or each."""
        n = self.source.n[episodes].tolist()
        if np.ndim(budget) and np.asarray(budget).dtype.kind == "i":
            asked: Sequence[Any] = per_environment("budget", budget, len(episodes)).tolist()
        elif np.ndim(budget):
            asked = list(budget)
        else:
            asked = [budget] * len(n)
        if len(asked) != len(n):
            raise KvenvError(f"budget={budget!r} is not {len(n)} numbers: give one for each")
        return np.array(
            [rules.budget_tokens(one, m) for one, m in zip(asked, n, strict=True)], dtype=np.int64
        )

    def _budgets(self, budget: Any, episodes: np.ndarray) -> np.ndarray:
        """As `_tokens`; what cannot be is refused."""
        slots = self._tokens(budget, episodes)
        floor = self.sinks + self.recent + 1
        for tokens, episode in zip(slots.tolist(), episodes.tolist(), strict=True):
            if tokens < floor:
                raise KvenvError(
                    f"budget {tokens} cannot hold sinks {self.sinks} + recent {self.recent} and "
                    f"one token more: give at least {floor}"
                )
            if tokens >= self.source.lengths[episode]:
                raise KvenvError(
                    f"budget {tokens} holds all {self.source.lengths[episode]} tokens of episode "
                    f"{episode}, so nothing would ever go: give a smaller one, or a share of "
                    "the prompt such as 0.25"
                )
        return slots

    def _check(self, episode: np.ndarray, options: Mapping[str, Any]) -> np.ndarray:
        asked = options.get("budget")
        if asked is None and options.get("episode") is None:
            return self._default[episode]
        slots = self._budgets(self.asked if asked is None else asked, episode)
        if (most := int(slots.max())) > self.slots:
            raise KvenvError(
                f"budget {most} is more than the {self.slots} slots that this environment was made "
                f"with: make it with budget={most}"
            )
        return slots

    def _begin(self, which: np.ndarray, extra: np.ndarray) -> None:
        self.budget[which], self.lengths[which] = extra, self.source.lengths[self.episode[which]]
        self.now[which] = extra
        slots = np.arange(self.slots)
        self.positions[which] = np.where(slots < extra[:, None], slots, -1)
        self._found[which], self._queries[which] = 0.0, 0
        self._masses[which] = 1.0
        if self.remembers and self.history is None:
            self.history = np.empty((self.num, self.longest, self.slots), dtype=np.int32)
        if self.history is not None:
            self.history[which] = -1
            for i in which.tolist():  # pictures only
                steps = np.arange(int(self.budget[i]))
                self.history[i, steps[:, None], steps] = np.where(
                    steps <= steps[:, None], steps, -1
                )

    def finish(self, outcome: dict[str, np.ndarray]) -> None:
        """Note a step's outcome and, if so asked, how far the episode is from the best."""
        if self.optimum:
            both = np.array([self.references(i) for i in range(self.num)])
            random, best = both[:, 0], both[:, 1]
            gap, retained = best - random, self._found / np.maximum(self._queries, 1)
            flat = gap <= 1e-9
            score = np.where(flat, 1.0, (retained - random) / np.where(flat, 1.0, gap))
            outcome |= {"random": random, "optimum": best, "normalized_score": score}
        self._outcome = outcome

    def references(self, i: int) -> tuple[float, float]:
        """The retention that chance expects and that the best schedule reaches."""
        key = (int(self.row[i]), int(self.episode[i]), int(self.head[i]), int(self.budget[i]))
        if key not in self._known:
            fixed, gains, first, capacity, guarded = self.problem(i)
            length = int(self.lengths[i])
            count = max(length - max(int(self.budget[i]), self._dropped), 1)
            self._known[key] = (
                (fixed + chance(gains, first, capacity, guarded)) / count,
                (fixed + best_schedule(gains, first, capacity, guarded)) / count,
            )
        return self._known[key]

    def info(self) -> dict[str, np.ndarray]:
        """See `StreamEnv`, Information."""
        queries = np.maximum(self._queries, 1)
        return {
            **super().info(),
            "budget": self.budget.copy(),
            "position": self.now.copy(),
            "retention": np.where(self._queries > 0, self._found / queries, 1.0),
        }

    def outcome(self) -> dict[str, np.ndarray]:
        """See `StreamEnv`, Information."""
        return self._outcome

    def picture(self, i: int) -> np.ndarray:
        """See `kvenv.envs.render_stream.draw_stream`."""
        return draw_stream(self._look(i))

    def text(self, i: int) -> str:
        """See `kvenv.envs.render_stream.write_stream`."""
        tokens = self.source.tokens(int(self.episode[i]))
        return write_stream(self._look(i), tokens, self.tokenizer)

    def _look(self, i: int) -> StreamView:
        """All steps so far, as the renderers want them."""
        if self.history is None:
            raise KvenvError("nothing was remembered to render: make the environment with a mode")
        steps, length = int(self.now[i]), int(self.lengths[i])
        held = np.zeros((steps, length + 1), dtype=bool)
        held[np.arange(steps)[:, None], self.history[i, :steps]] = True  # -1: the column too many
        return StreamView(
            title=self.title(i),
            held=held[:, :length],
            mass=self._masses[i, :steps],
            n=int(self.n[i]),
            budget=int(self.budget[i]),
        )
