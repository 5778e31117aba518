"""What kvenv/Stream-v0 and kvenv/Evict-v0 share: a cache of fixed slots, filled token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from kvenv import utility as u
from kvenv.envs import core
from kvenv.envs.arena import Arena, Shape
from kvenv.envs.batch import Batch
from kvenv.envs.render_stream import StreamView, draw_stream, write_stream
from kvenv.envs.source import Source, Traces, per_environment
from kvenv.errors import KvenvError


class SlotBatch(Batch):
    """N caches of ``budget`` slots each, and the texts that stream through them.

    Slots hold positions, -1 where nothing is; the last column is the newcomer's, which waits there
    for the decision. A decision names the slot that goes, the newcomer takes its place, and then
    its queries find in the slots what they find.

    Args:
        num: N.
        budget: slots, in tokens or as a fraction of the prompt.
        traces, layer, head, episodes, reward, sinks, recent, sink_free, tokenizer: see `StreamEnv`.

    Attributes:
        asked: the budget as it was given.
        slots: the most slots that an episode can ask for, W.
        now: the newcomer's position, (N,); S once the text is over.
        budget: slots of each environment, (N,).
        positions: (N, W + 1).
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
        budget: core.Budget = 64,
        reward: str = "attention",
        sinks: int = 0,
        recent: int = 0,
        sink_free: bool = False,
        tokenizer: str | None = None,
    ) -> None:
        source = Source(traces, layer, head, episodes)
        super().__init__(num, source, reward, sinks, recent, sink_free, tokenizer)
        source.need_all_queries()
        if np.ndim(budget):
            raise KvenvError(f"budget={budget!r} is not one number: give tokens or a fraction")
        self.asked = budget
        self.slots = int(self._budgets(budget, source.episodes).max())
        # Of the episodes that are not drawn, the checked ones are those that options ask for.
        self._default = self._tokens(budget, np.arange(len(source.n)))
        self.longest = int(source.lengths.max())
        model = source.traces.model
        d, group, rows = model.head_dim, model.group, self.longest + 1
        packed = int(core.row_start(rows))
        # One row more than there are tokens: what comes after the last one is all zeros.
        fields: dict[str, tuple[Shape, type[np.generic]]] = {
            "tokens": ((rows, 2 * d + 1), np.float32),
            "attention": ((packed,), np.float32),
        }
        if reward == "output":
            fields["weights"] = ((group, packed), np.float32)
            fields["outputs"] = ((rows, group, d), np.float32)
        self.arena = Arena(len(source.n) * len(source.heads), num, fields, self._load)
        self.head_dim, self._dropped = d, u.SINKS if sink_free else 0
        self.lengths = np.zeros(num, dtype=np.int64)
        self.now, self.budget = np.zeros(num, dtype=np.int64), np.ones(num, dtype=np.int64)
        self.positions = np.full((num, self.slots + 1), -1, dtype=np.int64)
        self._found, self._full_steps = np.zeros(num), np.zeros(num, dtype=np.int64)
        self._outcome: dict[str, np.ndarray] = {}
        self.history: np.ndarray | None = None
        self._masses = np.zeros((num, self.longest))

    def future_attention(self, i: int) -> np.ndarray:
        """What environment ``i``'s text pays to each token from each step on.

        Returns:
            (S + 1, S) float64: entry (t, j) is the attention that token j gets from the queries of
            tokens t, t + 1, ..., its own included.
        """
        length = int(self.lengths[i])
        square = np.zeros((length + 1, length + 1))
        packed = self.arena["attention"][self.row[i]]
        square[:-1][np.tril(np.ones((length, length + 1), dtype=bool), 1)] = packed[
            : int(core.row_start(length)) - 1
        ]
        return square[::-1].cumsum(0)[::-1, 1:]

    def _load(self, entry: int) -> dict[str, np.ndarray | float]:
        episode, head = self.entry(entry)
        keys, values, queries = (
            self.source.read(episode, field, head) for field in ("keys", "values", "queries")
        )
        length = len(keys)
        rows = core.attention(queries, keys, self._dropped)
        features = core.features(keys, values, np.arange(length), length, length)
        arrays: dict[str, np.ndarray | float] = {
            "tokens": features[:, [*range(2 * self.head_dim), 2 * self.head_dim + 1]],
            "attention": core.triangle(rows.mean(0)),
        }
        if self.reward == "output":
            arrays["weights"] = core.triangle(rows)
            arrays["outputs"] = (rows @ values.astype(np.float32)).swapaxes(0, 1)
        return arrays

    def _tokens(self, budget: Any, episodes: np.ndarray) -> np.ndarray:
        """Slots for each of these episodes, from tokens or fractions: one for all, or each."""
        if np.asarray(budget).dtype.kind != "f":
            if np.asarray(budget).dtype.kind not in "iu":
                raise KvenvError(
                    f"budget {budget!r} is no number: give tokens, or a fraction of the prompt "
                    "such as 0.25"
                )
            return per_environment("budget", budget, len(episodes))
        shares = np.broadcast_to(budget, episodes.shape).tolist()
        n = self.source.n[episodes].tolist()
        return np.array([u.budget_tokens(*one) for one in zip(shares, n, strict=True)])

    def _budgets(self, budget: Any, episodes: np.ndarray) -> np.ndarray:
        """As `_tokens`; what cannot be is refused."""
        slots = self._tokens(budget, episodes)
        floor = max(1, self.sinks + self.recent)
        for tokens, episode in zip(slots.tolist(), episodes.tolist(), strict=True):
            if tokens < floor:
                guarded = self.sinks + self.recent
                cannot = f"sinks {self.sinks} + recent {self.recent}" if guarded else "any token"
                raise KvenvError(f"budget {tokens} cannot hold {cannot}: give at least {floor}")
            if tokens >= self.source.lengths[episode]:
                raise KvenvError(
                    f"budget {tokens} holds all {self.source.lengths[episode]} tokens of episode "
                    f"{episode}, so nothing would ever go: give a smaller one, or a fraction of "
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
        self.now[which] = 0
        self.positions[which] = -1
        self.positions[which, -1] = 0
        self._found[which], self._full_steps[which] = 0.0, 0
        self._masses[which] = 1.0
        if self.remembers and self.history is None:
            self.history = np.empty((self.num, self.longest, self.slots), dtype=np.int32)
        if self.history is not None:
            self.history[which] = -1

    def place(self, slot: np.ndarray) -> np.ndarray:
        """Let what is in these slots (N,) go, put the newcomers there, and pay what they find."""
        now, every = self.now, self.every
        full = now >= self.budget
        went = np.where(full, self.positions[every, slot], -1)
        self.positions[every, slot] = now
        held = self.positions[:, :-1]
        start = (self.row * self.arena["attention"].shape[1] + core.row_start(now))[:, None]
        mass = self.arena["attention"].reshape(-1).take(start + held).astype(np.float64).sum(-1)
        counts = full & (now >= self._dropped)  # before, there is nothing to find
        mass = np.where(counts, np.minimum(mass, 1.0), 1.0)
        self._found += np.where(counts, mass, 0.0)
        self._full_steps += counts
        reward = mass if self.reward == "attention" else self._output_reward(held, full)
        if self.history is not None:
            live = every[now < self.lengths]
            self.history[live, now[live]] = held[live]
            self._masses[live, now[live]] = mass[live]
        self.now = now + 1
        np.minimum(self.now, self.lengths, out=self.now)
        self.done = self.now >= self.lengths
        self.positions[:, -1] = np.where(self.done, -1, self.now)
        self._outcome = {"evicted": went}
        return reward

    def _output_reward(self, held: np.ndarray, full: np.ndarray) -> np.ndarray:
        weights = self.arena["weights"]
        start = (self.row[:, None] * weights.shape[1] + np.arange(weights.shape[1])) * (
            weights.shape[2]
        ) + core.row_start(self.now)[:, None]
        paid = weights.reshape(-1).take(start[..., None] + held[:, None])
        d = self.head_dim
        # Position -1 reads the row of zeros after the last token.
        values = self.arena["tokens"][self.row[:, None], held, d : 2 * d]
        whole = self.arena["outputs"][self.row, self.now]
        return np.where(full, -core.output_change(paid, values, whole), 0.0)

    def allowed(self) -> np.ndarray:
        """Which slots may go, (N, W + 1) bool; the last one is the newcomer's."""
        return ~core.protected(self.positions, self.now, self.sinks, self.recent)

    def info(self) -> dict[str, np.ndarray]:
        """See `StreamEnv`, Information."""
        steps = np.maximum(self._full_steps, 1)
        return {
            **super().info(),
            "budget": self.budget.copy(),
            "position": self.now.copy(),
            "retention": np.where(self._full_steps > 0, self._found / steps, 1.0),
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
