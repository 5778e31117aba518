"""A workload of your own is one file: `kvenv record examples/my_workload.py --out DIR ...`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from kvenv.recording.workload import Sample


@dataclass
class PhoneBook:
    """Look one number up in a list of names.

    Args:
        names: how many names the vocabulary of the book has.
    """

    names: int = 1000

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
        """The book is the prompt; one of its lines, asked for again, is the future."""
        lines: list[str] = []
        prompt: list[int] = []
        while True:
            line = f"name{rng.integers(self.names):04d} {rng.integers(10**6):06d}\n"
            ids = tokenizer("".join([*lines, line]), add_special_tokens=False).input_ids
            if len(ids) > prompt_tokens:
                break
            lines.append(line)
            prompt = ids
        asked = lines[rng.integers(len(lines))]
        future = tokenizer(asked, add_special_tokens=False).input_ids[:future_tokens]
        return Sample(prompt, future, f"book-{seed}-{index}", {"answers": [asked.split()[1]]})
