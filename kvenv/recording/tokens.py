"""From text and messages to token ids, for workloads: with a chat template where there is one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from kvenv.errors import KvenvError

Message = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}."""

SPLITS = ("train", "validation", "test")


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise `KvenvError` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise KvenvError(f"{name} {value!r} is unknown: choose from {', '.join(allowed)}")


def split_of(name: str) -> str:
    """The split a document belongs to: 80/10/10 by a fixed hash of its name, never by order."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 10
    return SPLITS[max(0, bucket - 7)]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a piece of text, without any special tokens around it."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every plain text: its BOS token, or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if isinstance(bos, int) and bos in tokenizer("")["input_ids"] else []


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """The text of a conversation up to where the assistant's next reply begins.

    With the tokenizer's chat template; without one, ``Role: text`` paragraphs.

    Raises:
        KvenvError: if the chat template refuses the messages.
    """
    if tokenizer.chat_template is None:
        turns = [f"{m['role'].capitalize()}: {m['content']}\n\n" for m in messages]
        return "".join([*turns, "Assistant: "])
    return _apply(tokenizer, messages, True)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that ends an assistant's reply (EOS without a chat template), or nothing."""
    if tokenizer.chat_template is None:
        return [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
    reply = "reply"
    turn = [{"role": "user", "content": "x"}, {"role": "assistant", "content": reply}]
    text = _apply(tokenizer, turn, False)
    return encode(tokenizer, text[text.rindex(reply) + len(reply) :].strip())[:1]


def reply_tokens(tokenizer: PreTrainedTokenizerBase, reply: str, room: int) -> list[int]:
    """Token ids of an assistant's reply, cut to ``room``, its end-of-turn token kept if it fits."""
    return [*encode(tokenizer, reply), *end_of_turn(tokenizer)][:room]


def _apply(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], generation: bool
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, add_generation_prompt=generation
        )
    except TemplateError as error:
        roles = ", ".join(m["role"] for m in messages[:4])
        raise KvenvError(
            f"the tokenizer's chat template refuses messages by {roles}…: {error}; "
            "leave out the roles it does not know"
        ) from error
    return str(text)
