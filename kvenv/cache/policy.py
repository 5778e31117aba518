"""What a cache was asked for: budget, protection, allocation, and who scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from kvenv.cache.backends import CHOICES, Choice
from kvenv.cache.padding import LeftPadding
from kvenv.cache.scoring import CacheScorer
from kvenv.errors import KvenvError
from kvenv.rules import Budget, budget_tokens, competition_floor, refresh_interval
from kvenv.scorers.calibration import Calibration

Allocation = Literal["uniform", "layerwise", "adaptive"]
"""The same for every head; heads of a layer compete for one total; all heads compete."""


@dataclass
class Policy:
    """The options of one `kvenv.cache.EvictionCache`, checked; see there for what they mean.

    Attributes:
        tokens: the budget in tokens; 0 until a share of a prompt is known.
        interval: R, the tokens between two selections; 0 likewise.
        shared: whether several layers attend to one layer's keys.
        interface: whether the model's attention passes through transformers' interface.
        ordered: why attention depends on the order of the slots, if it does.
    """

    budget: Budget
    sinks: int
    recent: int
    refresh: int | None
    allocation: Allocation
    threshold: float | None
    calibration: Calibration | None
    scorer: CacheScorer
    padding: LeftPadding
    backend: Choice
    block: int | None
    shared: bool = False
    interface: bool = True
    ordered: str | None = None
    tokens: int = 0
    interval: int = 0

    def __post_init__(self) -> None:
        if self.backend not in CHOICES:
            raise KvenvError(f"backend {self.backend!r}: choose one of {', '.join(CHOICES)}")
        if self.allocation not in get_args(Allocation):
            known = ", ".join(get_args(Allocation))
            raise KvenvError(f"allocation {self.allocation!r}: choose one of {known}")
        _tokens("sinks", self.sinks, least=0, usual=4)
        _tokens("recent", self.recent, least=1, usual=16)  # a token attends to itself
        if self.block is not None:
            _tokens("block", self.block, least=1, usual=512)
        if self.threshold is not None and not 0 <= self.threshold < math.inf:
            raise KvenvError(
                f"threshold {self.threshold!r} is no attention mass: give 0 or more, such as 0.001"
            )
        if self.competes and self.calibration is None:
            raise KvenvError(
                f"{self.scorer!r} has no calibration, which allocation={self.allocation!r} and "
                "threshold= compare heads by: make one with `kvenv calibrate` and give it as "
                "calibration=, or use allocation='uniform'"
            )
        if isinstance(self.budget, int):
            self.resolve(self.budget)
        else:
            budget_tokens(self.budget, 1 << 30)

    @property
    def competes(self) -> bool:
        """Whether how many tokens a head keeps depends on what they are worth."""
        return self.allocation != "uniform" or self.threshold is not None

    @property
    def least(self) -> int:
        """Tokens that always stay."""
        return self.sinks + self.recent

    def resolve(self, prompt: int) -> None:
        """Fix the budget in tokens, of which a share is one of the first prompt's."""
        if self.tokens:
            return
        if isinstance(self.budget, int):
            tokens = budget_tokens(self.budget, 1 << 30, self.least)
            if tokens == self.least:
                raise KvenvError(
                    f"budget {tokens} holds sinks {self.sinks} and recent {self.recent} and no "
                    "other token: raise it, or lower sinks or recent"
                )
        else:
            tokens = max(budget_tokens(self.budget, prompt, self.least), self.least + 1)
        self.interval = refresh_interval(tokens, self.refresh, self.least)
        self.tokens = tokens

    @property
    def kept(self) -> int:
        """Tokens of a head that a selection keeps, on average where heads compete."""
        return self.tokens - self.interval

    @property
    def floor(self) -> int:
        """Tokens that every head keeps where heads compete."""
        return competition_floor(self.kept, self.least)

    def restart(self) -> None:
        """Forget what was resolved from a prompt."""
        if not isinstance(self.budget, int):
            self.tokens = self.interval = 0


def _tokens(what: str, given: int, *, least: int, usual: int) -> None:
    if isinstance(given, bool) or not isinstance(given, int) or given < least:
        raise KvenvError(
            f"{what} {given!r} is not a whole number of at least {least}: give tokens, such as "
            f"{usual}"
        )
