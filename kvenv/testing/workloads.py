"""What every workload must do: see `kvenv.recording.workload.Workload`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kvenv import commands
from kvenv.errors import KvenvError
from kvenv.parsing import attributes_of
from kvenv.recording.workload import Sample, Workload
from kvenv.testing.calling import calling, check_options, fresh
from kvenv.trace.schema import to_json


def check_workload(
    workload: Workload | type[Workload],
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompt_tokens: int = 2048,
    future_tokens: int = 256,
    episodes: int = 4,
    seed: int = 0,
) -> None:
    """Check that a workload does what `kvenv.recording.workload.Workload` says.

    - Every option (argument of ``__init__``) has a type and is none of ``kvenv record``'s own;
      attributes without a leading underscore are JSON-safe, since the manifest tells them.
    - `sample` gives a `Sample`: prompt and future are lists of ints inside the vocabulary, of 1 to
      `prompt_tokens` and 1 to `future_tokens` tokens (of half as many too, unless it refuses those
      with a `KvenvError`); the document has a name, the metadata are a JSON-safe mapping.
    - An episode is the same when asked again, and from a fresh workload that was asked for others
      before; two episodes differ.
    - It draws from the generator it is given, and changes no global one.

    Args:
        workload: the class, or an instance with the options to check.
        tokenizer: None: one whose 256 tokens are bytes, without special tokens or chat template.
        prompt_tokens: how long prompts may be.
        future_tokens: how long futures may be.
        episodes: how many samples are looked at, at least 2.
        seed: the set's seed.

    Raises:
        KvenvError: naming the first point that is broken, the value and the cure; what `sample`
            itself says where there is no such episode.
    """
    plugin = workload if isinstance(workload, type) else type(workload)
    if episodes < 2:
        raise KvenvError(f"episodes is {episodes}: check at least 2, which must differ")
    if not callable(getattr(plugin, "sample", None)):
        raise KvenvError(f"{plugin.__name__} is no workload: give it sample(index, *, ...)")
    check_options(plugin, commands.record)
    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
    with calling(f"{plugin.__name__}()", "make it an instance that can be copied"):
        one, other, third = (fresh(workload) for _ in range(3))
    for key, value in attributes_of(one).items():
        to_json(value, f"{plugin.__name__}.{key}")

    asked = _Asked(tokenizer, prompt_tokens, future_tokens, seed)
    samples = [asked.take(one, index) for index in range(episodes)]
    for index in reversed(range(episodes)):
        for source, how in ((one, "asked again"), (other, "asked of a fresh instance")):
            if asked.take(source, index) != samples[index]:
                raise KvenvError(
                    f"{plugin.__name__}.sample({index}) gave another sample when {how}: let it "
                    "depend on index, seed and rng alone, whatever was asked for before"
                )
    if len({(*sample.prompt, *sample.future) for sample in samples}) < episodes:
        raise KvenvError(
            f"{plugin.__name__}.sample gave some of its first {episodes} episodes the same tokens: "
            "choose by index or rng, and raise KvenvError where there are no more"
        )
    half = replace(asked, prompt_tokens=prompt_tokens // 2, future_tokens=future_tokens // 2)
    with suppress(_RefusalError):
        half.take(third, 0)


class _RefusalError(KvenvError):
    """What a workload itself said for its users."""


@dataclass(frozen=True)
class _Asked:
    """What a recorder asks of a workload, and the checks of what it gets."""

    tokenizer: PreTrainedTokenizerBase
    prompt_tokens: int
    future_tokens: int
    seed: int

    def take(self, workload: Workload, index: int) -> Sample:
        """Episode ``index``, checked."""
        call = f"{type(workload).__name__}.sample({index})"
        with calling(call, "see kvenv.recording.workload.Workload.sample"):
            try:
                sample = workload.sample(
                    index,
                    tokenizer=self.tokenizer,
                    rng=np.random.default_rng([self.seed, index]),
                    prompt_tokens=self.prompt_tokens,
                    future_tokens=self.future_tokens,
                    seed=self.seed,
                )
            except KvenvError as error:
                raise _RefusalError(str(error)) from error
        if not isinstance(sample, Sample):
            raise KvenvError(
                f"{call} gave a {type(sample).__name__}: return a kvenv.recording.workload.Sample"
            )
        for part in ("prompt", "future"):
            self._check_tokens(call, part, getattr(sample, part))
        name = sample.document
        if not isinstance(name, str) or not name or "\0" in name:
            raise KvenvError(
                f"{call}.document is {name!r}: name what the text came from, as text without NUL"
            )
        if not isinstance(sample.metadata, Mapping):
            raise KvenvError(f"{call}.metadata is {sample.metadata!r}: give a dict")
        to_json(sample.metadata, f"{call}.metadata")
        return sample

    def _check_tokens(self, call: str, part: str, tokens: Any) -> None:
        most: int = getattr(self, f"{part}_tokens")
        if not isinstance(tokens, list):
            raise KvenvError(f"{call}.{part} is a {type(tokens).__name__}: give a list of ints")
        if not 1 <= len(tokens) <= most:
            raise KvenvError(
                f"{call}.{part} has {len(tokens)} tokens: give 1 to {part}_tokens, here {most}"
            )
        for token in tokens:
            if type(token) is not int:
                raise KvenvError(
                    f"{call}.{part} holds {token!r}, a {type(token).__name__}: give ints, e.g. by "
                    "array.tolist()"
                )
            if not 0 <= token < len(self.tokenizer):
                raise KvenvError(
                    f"{call}.{part} holds token {token}: give ids of the tokenizer's vocabulary, "
                    f"0..{len(self.tokenizer) - 1}"
                )


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer whose 256 tokens are bytes, without special tokens or chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe)
