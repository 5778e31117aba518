"""What a bundle's files may hold, and what is said of those that are damaged."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kvenv.scorers import NetworkScorer

HALVES = (torch.float16, torch.bfloat16)


def change_config(folder: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder: Path, change: Callable[[dict], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["weights.1", "biases.0", "std"])
def test_a_weight_that_is_no_number_is_named(error_of, saved: Path, tensor: str, number: float):
    change_weights(saved, lambda state: state[tensor][2, 0].fill_(number))
    message = error_of(lambda: NetworkScorer.from_pretrained(saved))
    assert "layer 3 head 0" in message
    assert tensor in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("biases.1"), ["biases.1", "missing"]),
        (lambda state: state.update(extra=torch.zeros(1)), ["extra", "too many"]),
        (lambda state: state.update(mean=torch.zeros(4, 1, 15)), ["mean", "15", "16"]),
        (lambda state: state.update({"weights.0": torch.zeros(3, 16, 6)}), ["(3, 16, 6)"]),
    ],
)
def test_weights_that_do_not_fit_are_an_error(
    error_of, saved: Path, change: Callable, words: list[str]
):
    change_weights(saved, change)
    message = error_of(lambda: NetworkScorer.from_pretrained(saved))
    assert all(word in message for word in ["model.safetensors", "does not fit", *words])


def test_sizes_are_compared_before_memory_is_taken(error_of, saved: Path):
    change_config(saved, lambda config: config["architecture"].update(hidden=[10**9, 10**6]))
    message = error_of(lambda: NetworkScorer.from_pretrained(saved))
    assert all(word in message for word in ["does not fit", "not (4, ", "1000000000"])


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_of_weights_is_an_error(error_of, saved: Path, keep: int):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    message = error_of(lambda: NetworkScorer.from_pretrained(saved))
    assert str(path) in message
    assert "damaged" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["cannot be read as JSON"]),
        ("\xff", ["cannot be read as JSON"]),
        ("[]", ["not a kvenv-scorer file"]),
        ('{"model_type": "llama"}', ["not a kvenv-scorer file", "kvenv train"]),
        ('{"format": "kvenv-scorer", "version": 2}', ["version 2", "reads 3", "train"]),
        ('{"format": "kvenv-scorer"}', ["version None"]),
    ],
)
def test_another_configuration_is_an_error(error_of, saved: Path, text: str, words: list[str]):
    (saved / "config.json").write_text(text, encoding="latin-1")
    message = error_of(lambda: NetworkScorer.from_pretrained(saved))
    assert all(word in message for word in ["config.json", *words])


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.pop("architecture"),
        lambda config: config.pop("heads"),
        lambda config: config.update(heads=[[1]]),
        lambda config: config.update(heads=7),
        lambda config: config["model"].pop("fingerprint"),
        lambda config: config["model"].update(head_dim="8"),
        lambda config: config["architecture"].update(inputs=["age"]),
        lambda config: config["architecture"].update(hidden=["wide"]),
        lambda config: config["architecture"].update(activation="sine"),
        lambda config: config["architecture"].pop("activation"),
        lambda config: config["architecture"].update(hidden=[6, 0]),
        lambda config: config["model"].pop("rotations"),
        lambda config: config.update(heads=[[1, 0], [1, 0]]),
        lambda config: config.update(heads=[[1, 2]]),
    ],
)
def test_a_damaged_configuration_is_an_error(error_of, saved: Path, change: Callable):
    change_config(saved, change)
    message = error_of(lambda: NetworkScorer.from_pretrained(saved))
    assert str(saved / "config.json") in message
    assert "damaged" in message


def test_a_folder_that_is_no_bundle_is_an_error(error_of, tmp_path: Path, saved: Path):
    (saved / "model.safetensors").unlink()
    for folder in (tmp_path, saved):
        message = error_of(lambda folder=folder: NetworkScorer.from_pretrained(folder))
        assert str(folder) in message
        assert "not a bundle" in message


@pytest.mark.parametrize("source", ["nobody/nothing", "./missing", "a/b/c"])
def test_a_bundle_that_is_nowhere_is_an_error(
    error_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
):
    monkeypatch.chdir(tmp_path)
    message = error_of(lambda: NetworkScorer.from_pretrained(source))
    assert repr(source) in message
    assert "no such folder" in message


def test_an_architecture_of_the_future_is_not_read_as_a_simpler_one(saved: Path, error_of):
    change_config(saved, lambda config: config["architecture"].update(gate="softmax"))
    message = error_of(lambda: NetworkScorer.from_pretrained(saved))
    assert all(word in message for word in ["config.json", "gate", "update kvenv"])


# Half precision


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_halves_the_weights_and_loads_as_float32(make, tmp_path: Path, dtype):
    scorer = make(hidden=(64, 64))
    sizes = {}
    for stored in (torch.float32, dtype):
        scorer.save_pretrained(tmp_path / "kvp", dtype=stored)
        file = tmp_path / "kvp" / "model.safetensors"
        sizes[stored] = file.stat().st_size
        kinds = {name: tensor.dtype for name, tensor in load_file(file).items()}
        assert {kinds.pop("mean"), kinds.pop("std")} == {torch.float32}
        assert set(kinds.values()) == {stored}
    assert sizes[dtype] < 0.55 * sizes[torch.float32]
    back = NetworkScorer.from_pretrained(tmp_path / "kvp").network.state_dict()
    for name, tensor in scorer.network.state_dict().items():
        exact = name in ("mean", "std")
        assert back[name].dtype == torch.float32
        assert torch.equal(back[name], tensor if exact else tensor.to(dtype).float())


@given(
    number=st.floats(width=32, allow_nan=False, allow_infinity=False), dtype=st.sampled_from(HALVES)
)
@settings(max_examples=60)
def test_a_weight_is_stored_or_refused_by_name(make, error_of, tmp_path_factory, number, dtype):
    scorer, folder = make(), tmp_path_factory.mktemp("half") / "kvp"
    scorer.network.weights[1].data[2, 0, 0] = number
    rounded = torch.tensor(number).to(dtype)
    if rounded.isfinite():
        scorer.save_pretrained(folder, dtype=dtype)
        back = NetworkScorer.from_pretrained(folder)
        assert back.network.weights[1][2, 0, 0] == rounded.float()
    else:
        message = error_of(lambda: scorer.save_pretrained(folder, dtype=dtype))
        assert "weights.1" in message
        assert "layer 3 head 0" in message
        assert f"too large for {str(dtype)[6:]}" in message
        assert not folder.exists()


def test_a_weight_that_is_no_number_replaces_no_sound_bundle(make, saved: Path, error_of):
    broken = make(seed=1)
    broken.network.biases[0].data[1] = torch.nan
    message = error_of(lambda: broken.save_pretrained(saved))
    assert "biases.0 holds NaN or infinite numbers (layer 1 head 1)" in message
    assert NetworkScorer.from_pretrained(saved).training["seed"] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, "float16"])
def test_a_dtype_that_stores_no_weights_is_an_error(make, tmp_path: Path, error_of, dtype):
    message = error_of(lambda: make().save_pretrained(tmp_path / "kvp", dtype=dtype))
    assert f"dtype {dtype} stores no weights: choose torch.float32, torch.float16" in message


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_a_stored_dtype_that_is_no_weights_is_named(saved: Path, error_of, dtype):
    change_weights(saved, lambda state: state.update(std=state["std"].to(dtype)))
    message = error_of(lambda: NetworkScorer.from_pretrained(saved))
    assert f"holds std as {str(dtype)[6:]}" in message


# The card


CARD = "---\nlicense: apache-2.0\n---\n# Ein Schlüssel\n"


def with_card(scorer: NetworkScorer) -> NetworkScorer:
    scorer.card = CARD
    return scorer


def test_a_card_goes_where_its_bundle_goes(make, tmp_path: Path):
    with_card(make()).save_pretrained(tmp_path / "first")
    assert (tmp_path / "first" / "README.md").read_text(encoding="utf-8") == CARD
    NetworkScorer.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert NetworkScorer.from_pretrained(tmp_path / "second").card == CARD
    # Of other weights the old card would tell lies.
    make(seed=1).save_pretrained(tmp_path / "second")
    assert NetworkScorer.from_pretrained(tmp_path / "second").card is None
    assert not (tmp_path / "second" / "README.md").exists()


def test_a_card_that_is_no_text_is_an_error(saved: Path, error_of):
    (saved / "README.md").write_bytes(b"\xff\xfe")
    message = error_of(lambda: NetworkScorer.from_pretrained(saved))
    assert str(saved / "README.md") in message
    assert "cannot be read" in message


def test_the_hub_gets_and_gives_the_card(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub = tmp_path / "hub"

    class Api:
        def create_repo(self, repo_id, exist_ok):
            assert (repo_id, exist_ok) == ("someone/kvp", True)

        def upload_folder(self, repo_id, folder_path, private):
            assert private
            shutil.copytree(folder_path, hub)
            return f"commit of {repo_id}"

    def download(repo_id, allow_patterns):
        assert repo_id == "someone/kvp"
        for path in hub.iterdir():
            if not any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                path.unlink()
        return str(hub)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    commit = with_card(make()).push_to_hub("someone/kvp", dtype=torch.float16, private=True)
    assert commit == "commit of someone/kvp"
    assert load_file(hub / "model.safetensors")["weights.0"].dtype == torch.float16
    assert NetworkScorer.from_pretrained("someone/kvp").card == CARD
