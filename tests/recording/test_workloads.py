"""The workloads ruler and text, with a tiny tokenizer of the test's own."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kvenv import plugins
from kvenv.errors import KvenvError
from kvenv.recording import haystack, ruler, tokens
from kvenv.recording.workload import Sample, Workload
from kvenv.testing import check_workload

Ruler, Text = (plugins.load("workload", name) for name in ("ruler", "text"))

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [haystack.NOISE, *haystack.essay(40, np.random.default_rng(0))]
    bpe.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>")
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {"chat": make_tokenizer(CHATML), "plain": make_tokenizer(None)}
CHAT = TOKENIZERS["chat"]


def words(ids: list[int], tokenizer: PreTrainedTokenizerFast = CHAT) -> str:
    return str(tokenizer.decode(ids))


def take(
    workload: Workload,
    index: int = 0,
    n: int = 500,
    T: int = 200,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerFast = CHAT,
) -> Sample:
    return workload.sample(
        index,
        tokenizer=tokenizer,
        rng=np.random.default_rng([seed, index]),
        prompt_tokens=n,
        future_tokens=T,
        seed=seed,
    )


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("prompting", ["aware", "agnostic"])
@pytest.mark.parametrize("task", ruler.TASKS)
def test_ruler_fills_the_prompt_and_answers_it(task: str, prompting: str, kind: str) -> None:
    tokenizer, n = TOKENIZERS[kind], 900
    sample = take(Ruler(tasks=[task], prompting=prompting), 3, n, 400, tokenizer=tokenizer)
    prompt, future = words(sample.prompt, tokenizer), words(sample.future, tokenizer)
    m = sample.metadata
    # One more unit of haystack is never longer than the noise passage with a little to spare.
    assert n - 45 < len(sample.prompt) <= n
    assert (m["question"] in prompt) == (prompting == "aware")
    assert (m["question"] in future) == (prompting == "agnostic")
    reply = words(sample.future[m["question_tokens"] :], tokenizer)
    assert reply.startswith(m["answer_prefix"])
    assert reply.endswith("<|im_end|>")
    assert ruler.score(m["answers"], reply, task) == 1
    assert ruler.score(m["answers"], "", task) == 0
    assert all(answer in prompt for answer in m["answers"])
    assert sample.document == f"train/{task}/0/3"
    assert json.loads(json.dumps(dict(m))) == m


def test_ruler_agnostic_cuts_right_after_the_context() -> None:
    aware, agnostic = (
        take(Ruler(tasks=["niah_single"], prompting=p), 1, 300) for p in ("aware", "agnostic")
    )
    assert words(agnostic.prompt).endswith("Out and home again.")
    assert aware.metadata["answers"] == agnostic.metadata["answers"]
    whole = words(agnostic.prompt + agnostic.future)
    assert whole == words(tokens.encode(CHAT, whole))


def test_ruler_tasks_take_turns() -> None:
    workload = Ruler(tasks=["vt", "fwe"])
    assert [take(workload, i).metadata["task"] for i in range(3)] == ["vt", "fwe", "vt"]


def test_ruler_splits_seeds_and_indices_differ() -> None:
    answers = [
        take(Ruler(tasks=["niah_single"], split=split), index, 200, seed=seed).metadata["answers"][
            0
        ]
        for split in ("train", "validation", "test")
        for seed in range(3)
        for index in range(5)
    ]
    assert len(set(answers)) == len(answers)


@pytest.mark.parametrize("prompting", ["aware", "agnostic"])
def test_ruler_keeps_the_contract(prompting: str) -> None:
    check_workload(Ruler(prompting=prompting), CHAT, 1200, 300, episodes=7, seed=3)


def test_ruler_needle_haystack_holds_one_needle_a_line_with_distinct_keys() -> None:
    workload = Ruler(
        tasks=["niah_multikey"], haystack="needles", key_type="uuids", value_type="uuids"
    )
    sample = take(workload, n=3000)
    context = words(sample.prompt).split("\n\n")[1]
    needles = [
        re.fullmatch(r"The magic uuid for (\S+) is: (\S+)\.", s) for s in context.split("\n")
    ]
    keys = [needle.group(1) for needle in needles if needle]
    assert len(keys) == len(needles) == len(set(keys)) > 10
    asked = [needle for needle in needles if needle and needle[1] in sample.metadata["question"]]
    assert [needle[2] for needle in asked] == sample.metadata["answers"]


@given(st.integers(27, 3000), st.integers(0, 50))
def test_fwe_answers_are_strictly_the_most_frequent(size: int, seed: int) -> None:
    problem = ruler.problem("fwe", size, [seed], ruler.Options(), 1000)
    counts = Counter(problem.context.split())
    assert counts.pop("...") > size // 2
    answers = [counts.pop(answer) for answer in problem.answers]
    assert min(answers) > max(counts.values(), default=0)


@pytest.mark.parametrize(("tokens_planned", "often", "seldom"), [(900, 6, 1), (4096, 30, 3)])
def test_cwe_repeats_words_as_ruler_does(tokens_planned: int, often: int, seldom: int) -> None:
    problem = ruler.problem("cwe", 400, [1], ruler.Options(), tokens_planned)
    counts = Counter(re.findall(r"\d+\. (\S+)", problem.context))
    assert {counts.pop(answer) for answer in problem.answers} == {often}
    assert set(counts.values()) == {seldom}
    assert len(counts) == 400


def test_vt_chains_lead_from_the_value_to_every_answer() -> None:
    problem = ruler.problem("vt", 30, [2], ruler.Options(chains=2, hops=5), 1000)
    known: dict[str, str] = {}
    for name, source in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", problem.context, re.MULTILINE):
        known[str(name)] = known.get(
            str(source), str(source)
        )  # each hop comes after the one it points at
    (value,) = re.findall(r"value (\d+)", problem.question)
    assert len(known) == 12
    assert [name for name in known if known[name] == value] == list(problem.answers)


def test_score_is_the_share_found_or_any_for_qa() -> None:
    assert ruler.score(["Red", "blue", "7"], "it is RED, 7", "cwe") == 2 / 3
    assert ruler.score(["Red", "blue"], "red", "qa") == 1
    with pytest.raises(KvenvError, match="qb"):
        ruler.score(["a"], "a", "qb")


@pytest.mark.parametrize(
    ("arguments", "n", "T", "message"),
    [
        ({"tasks": ["niah"]}, 500, 99, "'niah'"),
        ({"tasks": []}, 500, 99, "no RULER tasks"),
        ({"needle_keys": 0}, 500, 99, "needle_keys is 0"),
        ({"split": "dev"}, 500, 99, "split 'dev'"),
        ({"haystack": "hay"}, 500, 99, "haystack 'hay'"),
        ({"tasks": ["cwe"]}, 60, 99, "prompt_tokens 60 is too small for cwe: give at least"),
        ({"prompting": "agnostic"}, 500, 5, "future_tokens 5 leaves no room"),
    ],
)
def test_ruler_errors(arguments: dict[str, Any], n: int, T: int, message: str) -> None:
    with pytest.raises(KvenvError, match=message):
        take(Ruler(**arguments), 0, n, T)


def test_splits_are_80_10_10() -> None:
    counts = Counter(tokens.split_of(f"docs/{i}.md") for i in range(5000))
    shares = [counts[split] / 5000 for split in tokens.SPLITS]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "sub").mkdir()
    for i in range(30):
        folder = tmp_path / ("sub" if i % 2 else "")
        (folder / f"f{i}.txt").write_text(" ".join(haystack.essay(20 if i < 24 else 1, rng)))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe" * 4000)
    (tmp_path / "nul.txt").write_bytes(b"a \0 b" * 4000)
    (tmp_path / "image.png").write_text("words " * 4000)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("words " * 4000)
    return tmp_path


def test_text_windows_come_from_every_long_file_once_a_round(corpus: Path) -> None:
    workload = Text([str(corpus)], split="all")
    samples = [take(workload, i, 60, 20) for i in range(48)]
    names = [s.document for s in samples]
    assert sorted(names[:24]) == sorted({*names})
    assert names[:24] == names[24:]
    assert "sub/f1.txt" in names
    assert not {"binary.txt", "nul.txt", "image.png"} & set(names)
    assert any(a.prompt != b.prompt for a, b in zip(samples[:24], samples[24:], strict=True))
    for s in samples:
        assert (len(s.prompt), len(s.future)) == (60, 20)
        ids = tokens.encode(CHAT, (corpus / s.document).read_text())
        first = s.metadata["first_token"]
        assert ids[first : first + 80] == s.prompt + s.future
    assert [take(workload, i, 60, 20, seed=1).document for i in range(24)] != names[:24]


def test_text_keeps_the_contract(corpus: Path) -> None:
    check_workload(Text)  # the standard library, in bytes
    check_workload(Text([str(corpus)], split="all"), CHAT, 60, 20, episodes=48)


def test_text_splits_share_no_file(corpus: Path) -> None:
    seen = [
        {take(Text([str(corpus)], split=split), i, 60, 20).document for i in range(30)}
        for split in ("train", "test")
    ]
    assert seen[0]
    assert seen[1]
    assert not seen[0] & seen[1]


def test_text_starts_with_bos_where_the_tokenizer_does(corpus: Path) -> None:
    tokenizer = make_tokenizer(None)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    sample = take(Text([str(corpus)], split="all"), 0, 60, 20, tokenizer=tokenizer)
    assert sample.prompt[0] == tokenizer.bos_token_id
    assert len(sample.prompt) == 60
    assert tokenizer.bos_token_id not in sample.prompt[1:] + sample.future


def test_text_defaults_to_the_standard_library() -> None:
    sample = take(Text(), 0, 60, 20)
    assert sample.document.endswith(".py")
    assert "test" not in Path(sample.document).parts


def test_text_errors(corpus: Path) -> None:
    with pytest.raises(KvenvError, match=r"has the 90000 tokens .* the longest has [1-9]\d\d"):
        take(Text([str(corpus)], split="all"), 0, 89000, 1000)
    with pytest.raises(KvenvError, match="nowhere"):
        Text([str(corpus / "nowhere")])
    with pytest.raises(KvenvError, match="no file of split train among 0"):
        Text([str(corpus)], suffixes=[".rs"])
