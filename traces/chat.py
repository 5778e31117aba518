"""Multi-turn conversations: the prompt is the conversation so far, the future is the reply."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from kvenv.errors import KvenvError
from kvenv.recording import conversations, tokens
from kvenv.recording.conversations import Conversation
from kvenv.recording.workload import Sample


@dataclass
class Chat:
    """Multi-turn conversations from a local JSON or JSONL file or a Hugging Face dataset.

    The prompt is a conversation up to a user turn, its oldest turns left out where it is too long
    (the system message stays); the future is the assistant's reply. Conversations come in an order
    shuffled by the set's seed: first each one's last reply, then each one's last but one, and so
    on. Turns that do not fit in the prompt even alone are skipped.

    Args:
        source: a .json or .jsonl file of conversations ({"messages": [{"role", "content"}, ...]},
            a bare list of messages, or ShareGPT's {"conversations": [{"from", "value"}, ...]}), or
            the id of a Hugging Face dataset of these or of OpenAssistant's message trees (e.g.
            OpenAssistant/oasst2; needs the datasets package).
        split: a conversation belongs to train, validation or test (80/10/10) by a hash of its id
            (or index); splits never share one. all takes every conversation.
        hub_split: which of a Hugging Face dataset's own splits is read.
    """

    source: str
    split: Literal["train", "validation", "test", "all"] = "train"
    hub_split: str = "train"

    def __post_init__(self) -> None:
        tokens.check_choice("split", self.split, (*tokens.SPLITS, "all"))
        found = conversations.load(self.source, self.hub_split)
        self._conversations = [c for c in found if self.split in ("all", tokens.split_of(c.name))]
        if not self._conversations:
            raise KvenvError(
                f"no conversation of split {self.split} among {len(found)} in {self.source}: give "
                "more conversations, or split all"
            )
        self._found: dict[tuple[PreTrainedTokenizerBase, int, int], _Found] = {}

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
        """Episode ``index``: see `kvenv.recording.workload.Workload.sample`.

        The metadata hold turn (which message the future is), first_turn (the first message in the
        prompt after the system message) and turns (token offsets: 0, where each reply begins and
        where it has ended, and last n, where the future begins).
        """
        key = (tokenizer, seed, prompt_tokens)
        if key not in self._found:
            self._found[key] = [], self._fitting(*key)
        found, rest = self._found[key]
        found.extend(islice(rest, max(0, index + 1 - len(found))))
        if index >= len(found):
            raise KvenvError(
                f"episode {index} does not exist: {self.source} has {len(found)} replies (split "
                f"{self.split}) whose last user turn fits in {prompt_tokens} tokens; give more "
                "conversations, larger prompt_tokens, or split all"
            )
        conversation, turn, first = found[index]
        prompt = _prompt(tokenizer, conversation, first, turn)
        turns = _turns(tokenizer, conversation, first, turn, prompt)
        return Sample(
            prompt=prompt,
            future=tokens.reply_tokens(
                tokenizer, conversation.messages[turn]["content"], future_tokens
            ),
            document=conversation.name,
            metadata={"turn": turn, "first_turn": first, "turns": turns},
        )

    def _fitting(
        self, tokenizer: PreTrainedTokenizerBase, seed: int, room: int
    ) -> Iterator[tuple[Conversation, int, int]]:
        """(conversation, reply, first message of the prompt), for replies whose prompt fits."""
        order = np.random.default_rng(seed).permutation(len(self._conversations))
        left = {int(i): _replies(self._conversations[i]) for i in order}
        while any(left.values()):
            for i, replies in left.items():
                while replies:
                    conversation, turn = self._conversations[i], replies.pop()
                    first = _first_that_fits(tokenizer, conversation, turn, room)
                    if first is not None:
                        yield conversation, turn, first
                        break


_Found = tuple[list[tuple[Conversation, int, int]], Iterator[tuple[Conversation, int, int]]]


def _replies(conversation: Conversation) -> list[int]:
    """The assistant's non-empty messages that answer a user."""
    m = conversation.messages
    return [
        i
        for i in range(1, len(m))
        if m[i]["role"] == "assistant" and m[i]["content"].strip() and m[i - 1]["role"] == "user"
    ]


def _first_that_fits(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, turn: int, room: int
) -> int | None:
    """The earliest user turn from which the prompt before ``turn`` fits in ``room``, if any."""
    users = [i for i in range(turn) if conversation.messages[i]["role"] == "user"]
    where = bisect_left(
        users, True, key=lambda first: len(_prompt(tokenizer, conversation, first, turn)) <= room
    )
    return users[where] if where < len(users) else None


def _prompt(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, first: int, turn: int
) -> list[int]:
    """Ids of messages ``first`` up to ``turn`` after the system message, ready for the reply."""
    system = conversation.messages[:1] if conversation.messages[0]["role"] == "system" else ()
    text = tokens.render(tokenizer, [*system, *conversation.messages[first:turn]])
    start = [] if tokenizer.chat_template else tokens.opening(tokenizer)
    return start + tokens.encode(tokenizer, text)


def _turns(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    first: int,
    turn: int,
    prompt: list[int],
) -> list[int]:
    """Offsets in the prompt: 0, the beginning and the end of every reply in it, its length.

    A boundary inside a token is drawn before it. One that is not there, as where a chat template
    rewrites a message, is left out.
    """
    found = {0, len(prompt)}
    end = tokens.end_of_turn(tokenizer)
    for reply in (i for i in _replies(conversation) if first < i < turn):
        content = conversation.messages[reply]["content"]
        start = _reach(prompt, 0, _prompt(tokenizer, conversation, first, reply))
        if start is None:
            continue
        found.add(start)
        for text in (content, content.strip(), f" {content}"):  # templates trim, tokens take spaces
            stop = _reach(prompt, start, tokens.encode(tokenizer, text))
            if stop is not None:
                found.add(stop + len(end) if prompt[stop : stop + len(end)] == end else stop)
                break
    return sorted(found)


def _reach(prompt: list[int], start: int, ids: list[int]) -> int | None:
    """Where ``ids`` end in the prompt if they stand at ``start``, their last one aside."""
    pairs = zip(ids, prompt[start:], strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return start + same if same >= max(1, len(ids) - 1) else None
