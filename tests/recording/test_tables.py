"""Reading rows with the datasets package, and their splits."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvenv.errors import KvenvError
from kvenv.recording import tables
from kvenv.recording.tokens import SPLITS

datasets = pytest.importorskip("datasets")

ROWS = [{"text": f"text {i}", "number": i} for i in range(6)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, rows: Sequence[Any] = ROWS) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(list(rows)).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        path.write_text(json.dumps(rows))
    return str(path)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet"])
def test_a_file_s_rows_are_its_train_split(tmp_path: Path, name: str) -> None:
    sets = tables.load(write(tmp_path / name))
    assert {split: rows.to_list() for split, rows in sets.items()} == {"train": ROWS}


def test_a_folder_s_files_are_named_by_their_splits(tmp_path: Path) -> None:
    write(tmp_path / "set" / "train-00000-of-00002.parquet", ROWS[:2])
    write(tmp_path / "set" / "train-00001-of-00002.parquet", ROWS[2:3])
    write(tmp_path / "set" / "validation-00000-of-00001.parquet", ROWS[3:])
    sets = tables.load(str(tmp_path / "set"))
    assert {split: rows.to_list() for split, rows in sets.items()} == {
        "train": ROWS[:3],
        "validation": ROWS[3:],
    }


def test_a_configuration_is_the_folder_of_its_name(tmp_path: Path) -> None:
    write(tmp_path / "set" / "one" / "test.jsonl", ROWS[:1])
    write(tmp_path / "set" / "two" / "test.jsonl", ROWS[1:])
    assert tables.load(str(tmp_path / "set"), "two")["test"].to_list() == ROWS[1:]
    assert tables.load(str(tmp_path / "set" / "one"), "two")["test"].to_list() == ROWS[:1]


def test_an_id_is_looked_up_on_the_hub_by_its_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> dict[str, Any]:
        asked.append((arguments, options))
        return {"test": ROWS}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert tables.load("owner/name", "easy") == {"test": ROWS}
    assert asked == [(("owner/name", "easy"), {})]  # and so without trust_remote_code


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '[{"text": ', r"a\.json' cannot be read \(\w+: .*local copy"),
        ("a.parquet", "no", r"a\.parquet' cannot be read"),
        ("a.txt", "x", r"a\.txt' is no data: give a \.json, \.jsonl, \.parquet file"),
        ("set/a.py", "x", "set' cannot be read"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    with pytest.raises(KvenvError, match=message) as error:
        tables.load(str(tmp_path / name.split("/")[0]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["missing", "missing.jsonl", "a/b/c", "a/b.parquet", "a/b.zip"])
def test_missing_files_are_not_looked_up_on_the_hub(source: str) -> None:
    with pytest.raises(KvenvError, match="no such file or folder; give"):
        tables.load(source)


def test_a_missing_package_or_hub_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KvenvError, match=r"'owner/name' cannot be read .*hub can be reached, or"):
        tables.load("owner/name")  # the tests' environment is offline
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(KvenvError, match="needs the datasets package: pip install datasets"):
        tables.load("owner/name")


def test_columns_and_their_types_are_checked() -> None:
    sets = {"test": datasets.Dataset.from_list(ROWS)}
    tables.check(sets, {"text": str, "number": int}, "source")
    with pytest.raises(KvenvError, match="has no a and no b, only text, number"):
        tables.check(sets, {"a": str, "text": str, "b": int}, "source")
    with pytest.raises(KvenvError, match=r"has number '0' of type int in row 0: .* type str"):
        tables.check(sets, {"number": str}, "source")


def texts(sets: dict[str, Any], split: str) -> list[str]:
    rows = tables.part(sets, "text", split, "source")
    return [rows[i]["text"] for i in range(len(rows))]


def make(**splits: Sequence[str]) -> dict[str, Any]:
    return {
        name: datasets.Dataset.from_list([{"text": text} for text in found])
        for name, found in splits.items()
    }


def test_three_splits_are_taken_as_they_are() -> None:
    sets = make(test=["c", "c"], train=["a", "b"], validation=["d"], other=["e"])
    assert {split: texts(sets, split) for split in SPLITS} == {
        "train": ["a", "b"],
        "validation": ["d"],
        "test": ["c", "c"],
    }


NUMBERS = [f"document {i}" for i in range(200)]


def test_of_two_splits_the_later_is_test_and_the_other_is_parted() -> None:
    sets = make(train=NUMBERS, validation=["a", "b"])
    assert texts(sets, "test") == ["a", "b"]
    train, validation = texts(sets, "train"), texts(sets, "validation")
    assert sorted(train + validation) == sorted(NUMBERS)
    assert 25 <= len(validation) <= 55


def test_one_split_is_parted_in_three() -> None:
    parts = {split: texts(make(test=NUMBERS), split) for split in SPLITS}
    assert sorted(chain.from_iterable(parts.values())) == sorted(NUMBERS)
    assert len(parts["train"]) > 140
    assert parts == {split: texts(make(anything=NUMBERS), split) for split in SPLITS}


@given(st.dictionaries(st.sampled_from(SPLITS), st.lists(st.sampled_from(NUMBERS)), min_size=1))
def test_splits_never_share_a_document_and_lose_none(splits: dict[str, list[str]]) -> None:
    sets = {name: datasets.Dataset.from_dict({"text": found}) for name, found in splits.items()}
    seen: dict[str, set[str]] = {}
    for split in SPLITS:
        try:
            seen[split] = set(texts(sets, split))
        except KvenvError as error:
            assert f"has no row for split {split}" in str(error)  # noqa: PT017
            seen[split] = set()
    every = list(chain.from_iterable(splits.values()))
    assert set().union(*seen.values()) == set(every)
    assert sum(map(len, seen.values())) == len(set(every))
    assert sorted(texts(sets, "all")) == sorted(every)


def test_splits_of_other_names_are_only_taken_together() -> None:
    sets = make(first=["a"], second=["b"])
    assert texts(sets, "all") == ["a", "b"]
    with pytest.raises(KvenvError, match=r"no row for split test, only first \(1 rows\), second"):
        texts(sets, "test")
