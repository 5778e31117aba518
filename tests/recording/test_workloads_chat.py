"""The chat workload and the conversations it reads, with a byte-level tokenizer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvenv import plugins
from kvenv.errors import KvenvError
from kvenv.recording import conversations
from kvenv.recording.workload import Sample, Workload
from kvenv.testing import check_workload

Chat = plugins.load("workload", "chat")

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('system comes first') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")
    tokenizer.chat_template = template
    return tokenizer


TOKENIZER = make_tokenizer(TEMPLATE)
SYSTEM = {"role": "system", "content": "Sys."}
TURNS = [
    {"role": role, "content": f"{role[0]}{i}"} for i in range(3) for role in ("user", "assistant")
]


def take(
    workload: Workload,
    index: int = 0,
    n: int = 500,
    T: int = 50,
    tokenizer: PreTrainedTokenizerFast = TOKENIZER,
) -> Sample:
    return workload.sample(
        index,
        tokenizer=tokenizer,
        rng=np.random.default_rng([0, index]),
        prompt_tokens=n,
        future_tokens=T,
        seed=0,
    )


def write(path: Path, rows: Any) -> str:
    path.write_text(json.dumps(rows))
    return str(path)


def chat(path: Path, *rows: Any) -> Workload:
    return Chat(write(path / "chat.json", list(rows)), split="all")


def test_prompt_is_the_conversation_and_future_the_reply(tmp_path: Path) -> None:
    sample = take(chat(tmp_path, {"id": "c7", "messages": [SYSTEM, *TURNS]}))
    assert TOKENIZER.decode(sample.prompt) == (
        "[system]Sys.<end>[user]u0<end>[assistant]a0<end>[user]u1<end>[assistant]a1<end>"
        "[user]u2<end>[assistant]"
    )
    assert TOKENIZER.decode(sample.future) == "a2<end>"
    assert sample.document == "c7"
    assert sample.metadata == {"turn": 6, "first_turn": 1, "turns": [0, 33, 36, 56, 59, 79]}


def pieces(sample: Sample, tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> list[str]:
    ids = [*sample.prompt, *sample.future]
    ends = [*sample.metadata["turns"][1:], len(ids)]
    return [tokenizer.decode(ids[a:b]) for a, b in zip(sample.metadata["turns"], ends, strict=True)]


def test_turns_part_the_replies_from_what_they_answer(tmp_path: Path) -> None:
    sample = take(chat(tmp_path, [SYSTEM, *TURNS]))
    assert pieces(sample) == [
        "[system]Sys.<end>[user]u0<end>[assistant]",
        "a0<end>",
        "[user]u1<end>[assistant]",
        "a1<end>",
        "[user]u2<end>[assistant]",
        "a2<end>",
    ]
    later = take(chat(tmp_path, [SYSTEM, *TURNS]), n=len(sample.prompt) - 1)
    assert pieces(later) == [
        "[system]Sys.<end>[user]u1<end>[assistant]",
        "a1<end>",
        "[user]u2<end>[assistant]",
        "a2<end>",
    ]


def test_a_template_that_trims_keeps_its_turns(tmp_path: Path) -> None:
    trimming = make_tokenizer(TEMPLATE.replace("m.content }}", "m.content | trim }}"))
    talk = [TURNS[0], {"role": "assistant", "content": " a0\n"}, *TURNS[2:4]]
    sample = take(chat(tmp_path, talk), tokenizer=trimming)
    assert pieces(sample, trimming)[1:3] == ["a0<end>", "[user]u1<end>[assistant]"]


def test_without_a_template_replies_end_with_their_text(tmp_path: Path) -> None:
    plain = make_tokenizer(None)
    sample = take(chat(tmp_path, TURNS[:4]), tokenizer=plain)
    assert pieces(sample, plain) == [
        "User: u0\n\nAssistant: ",
        "a0",
        "\n\nUser: u1\n\nAssistant: ",
        "a1<end>",
    ]


def test_a_boundary_inside_a_token_is_drawn_before_it(tmp_path: Path) -> None:
    """Tokens over both ends of a reply: no prompt before it is a prefix of a later one."""
    merged = make_tokenizer(None)
    merged.add_tokens([": a", "0\n"])
    sample = take(chat(tmp_path, TURNS[:4]), tokenizer=merged)
    whole = "User: u0\n\nAssistant: a0\n\nUser: u1\n\nAssistant: "
    assert merged.decode(sample.prompt) == whole
    assert len(sample.prompt) < len(whole)
    assert "".join(pieces(sample, merged)) == f"{whole}a1<end>"


def test_boundaries_that_are_none_are_left_out(tmp_path: Path) -> None:
    """A template that drops what old replies said leaves no end to find."""
    forgetful = make_tokenizer(
        TEMPLATE.replace("m.content }}", "m.content if loop.last or m.role == 'user' else '.' }}")
    )
    sample = take(chat(tmp_path, TURNS[:4]), tokenizer=forgetful)
    assert pieces(sample, forgetful) == [
        "[user]u0<end>[assistant]",
        ".<end>[user]u1<end>[assistant]",
        "a1<end>",
    ]


def test_long_conversations_lose_their_oldest_turns_but_not_the_system_message(
    tmp_path: Path,
) -> None:
    workload = chat(tmp_path, [SYSTEM, *TURNS])
    whole = len(take(workload).prompt)
    shorter = TOKENIZER.decode(take(workload, n=whole - 1).prompt)
    assert shorter == ("[system]Sys.<end>[user]u1<end>[assistant]a1<end>[user]u2<end>[assistant]")
    assert len(take(workload, n=whole).prompt) == whole


def test_replies_are_cut_and_end_only_if_the_end_fits(tmp_path: Path) -> None:
    workload = chat(tmp_path, TURNS)
    assert [TOKENIZER.decode(take(workload, T=T).future) for T in (1, 2, 3)] == [
        "a",
        "a2",
        "a2<end>",
    ]


def test_each_reply_serves_once_last_ones_first(tmp_path: Path) -> None:
    workload = chat(tmp_path, TURNS, TURNS[:4], [SYSTEM], TURNS[1:3])
    taken = [take(workload, i) for i in range(5)]
    assert [s.metadata["turn"] for s in taken if s.document == "0"] == [5, 3, 1]
    assert {s.document for s in taken[:2]} == {"0", "1"}
    with pytest.raises(KvenvError, match="has 5 replies"):
        take(workload, 5)


def test_the_contract_is_kept(tmp_path: Path) -> None:
    talks = [[SYSTEM, *TURNS, {"role": "user", "content": f"{i}?"}, TURNS[1]] for i in range(2)]
    workload = chat(tmp_path, *talks)
    check_workload(workload, TOKENIZER, 500, 50, 2)
    check_workload(workload, TOKENIZER, 60, 9, 2)
    with pytest.raises(KvenvError, match="has 8 replies"):
        check_workload(workload, TOKENIZER, 500, 50, 9)


def test_turns_that_do_not_fit_are_skipped(tmp_path: Path) -> None:
    long = [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]
    workload = chat(tmp_path, long, [*TURNS[:2], *long])
    assert take(workload, n=100).metadata["turn"] == 1
    with pytest.raises(KvenvError, match="has 1 replies"):
        take(workload, 1, n=100)


def test_without_a_chat_template_roles_are_written_out(tmp_path: Path) -> None:
    plain = make_tokenizer(None)
    sample = take(chat(tmp_path, TURNS[:2]), tokenizer=plain)
    assert plain.decode(sample.prompt) == "User: u0\n\nAssistant: "
    assert plain.decode(sample.future) == "a0<end>"


def test_splits_share_no_conversation(tmp_path: Path) -> None:
    source = write(tmp_path / "many.json", [TURNS[:2]] * 60)
    names = [
        {take(Chat(source, split=split), i).document for i in range(count)}
        for split, count in (("train", 30), ("test", 2))
    ]
    assert [len(n) for n in names] == [30, 2]
    assert not names[0] & names[1]


def test_templates_that_refuse_messages_say_so(tmp_path: Path) -> None:
    workload = chat(tmp_path, [TURNS[0], SYSTEM, TURNS[2], TURNS[3]])
    with pytest.raises(KvenvError, match="system comes first"):
        take(workload)


def test_every_local_shape_reads_the_same(tmp_path: Path) -> None:
    sharegpt = [
        {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
        for m in TURNS
    ]
    lines = tmp_path / "lines.jsonl"
    rows: list[Any] = [TURNS, {"messages": TURNS}, {"conversations": sharegpt}]
    lines.write_text("\n\n".join(map(json.dumps, rows)))
    read = conversations.load(str(lines))
    assert read == conversations.load(write(tmp_path / "rows.json", rows))
    assert [c.name for c in read] == ["0", "1", "2"]
    assert [list(c.messages) for c in read] == [TURNS] * 3


def test_neighbours_of_one_role_are_joined(tmp_path: Path) -> None:
    source = write(tmp_path / "c.json", [[TURNS[0], TURNS[2], TURNS[1]]])
    assert [m["content"] for m in conversations.load(source)[0].messages] == ["u0\n\nu1", "a0"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '[{"messages": [}]', r"a\.json line 1 is not JSON.*\.jsonl"),
        ("a.jsonl", '[]\n\n{"a"', r"a\.jsonl line 3 is not JSON"),
        ("a.jsonl", '[{"role": "user", "content": "x"}]\n3', r"a\.jsonl line 2 is no conversation"),
        ("a.json", "{}", "holds a JSON dict"),
        ("a.json", '[{"text": "x"}]', r"conversation 0 is no conversation.*messages"),
        ("a.json", '[[{"role": "tool", "content": "x"}]]', r"message 0 \(role 'tool'\)"),
        ("a.json", '[[{"role": "user"}]]', "message 0 .* must have text"),
        ("a.json", "\udcff", "is not UTF-8"),
        ("a.json", "[]", "no conversation of split train among 0"),
    ],
)
def test_bad_files_name_the_place(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(KvenvError, match=message) as error:
        Chat(str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["missing.json", "missing", "a/b/c", "folder/missing.jsonl"])
def test_missing_files_are_not_looked_up_on_the_hub(source: str) -> None:
    with pytest.raises(KvenvError, match="no such file"):
        Chat(source)


OASST = [
    {"message_id": "r", "parent_id": None, "role": "prompter", "text": "Q", "rank": None},
    {"message_id": "x", "parent_id": "r", "role": "assistant", "text": "worse", "rank": 1},
    {"message_id": "y", "parent_id": "r", "role": "assistant", "text": "best", "rank": 0},
    {"message_id": "z", "parent_id": "r", "role": "assistant", "text": "unranked", "rank": None},
    {"message_id": "yy", "parent_id": "y", "role": "prompter", "text": "More", "rank": None},
    {"message_id": "xx", "parent_id": "x", "role": "prompter", "text": "Other", "rank": 0},
    {"message_id": "s", "parent_id": None, "role": "prompter", "text": "Lone", "rank": None},
]


def test_message_trees_become_their_first_ranked_conversations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, str]] = []

    def load_dataset(source: str, split: str) -> list[dict[str, Any]]:
        asked.append((source, split))
        return OASST[::-1]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    lone, tree = conversations.load("OpenAssistant/oasst2", "validation")
    assert asked == [("OpenAssistant/oasst2", "validation")]
    assert (tree.name, lone.name) == ("r", "s")
    assert [(m["role"], m["content"]) for m in tree.messages] == [
        ("user", "Q"),
        ("assistant", "best"),
        ("user", "More"),
    ]


def test_a_missing_package_or_hub_names_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(KvenvError, match=r"pip install datasets, or give a local \.json"):
        Chat("owner/name")

    def offline(source: str, split: str) -> None:
        raise ConnectionError("no\nroute")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    with pytest.raises(KvenvError, match=r"ConnectionError: no route.*hub.*, or give a local"):
        Chat("owner/name")


def test_a_real_dataset_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps({"id": "k", "messages": TURNS}))
    (read,) = conversations.load(str(folder))
    assert read == conversations.Conversation("k", tuple(TURNS))
