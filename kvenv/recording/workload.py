"""What a workload is: something that gives the i-th (prompt, future) pair of token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sample:
    """One episode to be recorded.

    Attributes:
        prompt: token ids of the prompt; these are what may be evicted.
        future: token ids that follow (replaced by the model's own with ``--generate``); T >= 1.
        document: what the text came from. Splits and bootstrap intervals go by document.
        metadata: JSON-safe facts about the episode, e.g. the answer that a task expects.
    """

    prompt: list[int]
    future: list[int]
    document: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Workload(Protocol):
    """A source of episodes: one file in traces/ defines one such class.

    The class's typed ``__init__`` arguments become options of ``kvenv record NAME``.
    """

    def sample(
        self,
        index: int,
        *,
        tokenizer: PreTrainedTokenizerBase,
        rng: np.random.Generator,
        prompt_tokens: int,
        future_tokens: int,
        seed: int,
    ) -> Sample:
        """Episode ``index`` of the set.

        The same (index, seed, arguments) must always give the same sample, whatever was asked
        for before: a recorder that was killed goes on from the episode it had reached.

        Args:
            index: 0, 1, 2, ...
            tokenizer: the recorded model's tokenizer.
            rng: a generator of this episode's own, seeded from (seed, index).
            prompt_tokens: how long the prompt should be, in tokens (at most).
            future_tokens: how long the future should be, in tokens (at most).
            seed: the set's seed, for choices shared by all episodes (e.g. the order of files).

        Raises:
            KvenvError: if there is no such episode, saying what would give more.
        """
        ...
