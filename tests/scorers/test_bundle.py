from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvenv import identity
from kvenv.scorers import NetworkScorer, storage

# Saving and loading


@pytest.mark.parametrize("heads", [((1, 0), (1, 1), (3, 0), (3, 1)), ((1, 1), (3, 0))])
@pytest.mark.parametrize(
    "architecture",
    [
        {},
        {"inputs": ("value",), "hidden": ()},
        {"inputs": ("value", "key"), "activation": "tanh"},
    ],
)
def test_a_round_trip_changes_no_bit(
    make, tokens, tmp_path: Path, heads: tuple, architecture: dict
):
    scorer = make(heads, **architecture)
    scorer.save_pretrained(tmp_path / "deep" / "bundle")
    back = NetworkScorer.from_pretrained(tmp_path / "deep" / "bundle")
    was, now = scorer.network.state_dict(), back.network.state_dict()
    assert was.keys() == now.keys()
    assert all(torch.equal(was[name], now[name]) for name in was)
    for name in ("architecture", "model", "training", "metrics", "heads"):
        assert getattr(back, name) == getattr(scorer, name)
    assert back.network.heads == scorer.network.heads
    assert repr(back) == repr(scorer) == f"NetworkScorer(kvp, tiny/llama, {len(heads)} heads)"
    for layer in (1, 3):
        ours, theirs = (one.score(layer, *tokens()) for one in (scorer, back))
        assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


def test_a_bundle_is_safetensors_and_json_alone(make, saved: Path):
    assert {path.name for path in saved.iterdir()} == {"config.json", "model.safetensors"}
    config = json.loads((saved / "config.json").read_text())
    assert (config["format"], config["version"]) == ("kvenv-scorer", 3)
    assert config["model"]["id"] == "tiny/llama"
    assert config["heads"] == [list(head) for head in make.heads]
    assert config["architecture"] == {
        "inputs": ["key", "value"],
        "hidden": [6, 5],
        "activation": "gelu",
    }
    assert config["training"] == {"agent": "kvp", "seed": 0}
    assert saved.stat().st_mode & 0o777 == 0o755
    assert (saved / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_saving_replaces_a_bundle_and_leaves_nothing_else(make, saved: Path):
    make(seed=1).save_pretrained(saved)
    assert NetworkScorer.from_pretrained(saved).training["seed"] == 1
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("part", ["training", "metrics"])
@pytest.mark.parametrize(
    "said",
    [{"loss": float("nan")}, {"loss": [torch.ones(2)]}, {("loss", 1): 2}],
    ids=["nan", "tensor", "key"],
)
@pytest.mark.parametrize("there", [False, True], ids=["new", "replacing"])
def test_what_is_not_json_is_named_and_nothing_written(
    make, error_of, tmp_path: Path, part: str, said: dict, there: bool
):
    folder = tmp_path / "kvp"
    if there:
        make().save_pretrained(folder)
    scorer = replace(make(seed=1), **{part: {"agent": "mine", **said}})
    message = error_of(lambda: scorer.save_pretrained(folder))
    assert message.startswith(f"{part} {next(iter(said))!r} of a scorer is not JSON-safe")
    assert [path.name for path in tmp_path.iterdir()] == (["kvp"] if there else [])
    if there:
        assert NetworkScorer.from_pretrained(folder).training["seed"] == 0


@pytest.mark.parametrize("config", [None, '{"model_type": "llama"}', "not JSON"])
def test_saving_replaces_nothing_but_a_bundle(make, error_of, tmp_path: Path, config: str | None):
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "model.safetensors").write_text("weeks of work")
    if config is not None:
        (folder / "config.json").write_text(config)
    message = error_of(lambda: make().save_pretrained(folder))
    assert "not a bundle" in message
    assert (folder / "model.safetensors").read_text() == "weeks of work"


@pytest.mark.parametrize("there", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("step", ["save_file", "write_text", "last rename"])
def test_a_failed_save_leaves_what_was_there(
    make, error_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool, step: str
):
    folder = tmp_path / "kvp"
    if there:
        make().save_pretrained(folder)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    rename = Path.rename
    with monkeypatch.context() as patch:
        if step == "save_file":
            patch.setattr(storage, "save_file", full)
        elif step == "write_text":
            patch.setattr(Path, "write_text", full)
        else:
            once = iter([full])  # only the new bundle's own rename fails
            patch.setattr(
                Path,
                "rename",
                lambda self, target: (
                    next(once, rename)(self, target)
                    if Path(target) == folder
                    else rename(self, target)
                ),
            )
        message = error_of(lambda: make(seed=1).save_pretrained(folder))
    assert str(folder) in message
    assert "No space left" in message
    assert [path.name for path in tmp_path.iterdir()] == (["kvp"] if there else [])
    if there:
        assert NetworkScorer.from_pretrained(folder).training["seed"] == 0


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root writes anywhere")
def test_a_read_only_folder_is_an_error(make, error_of, tmp_path: Path):
    tmp_path.chmod(0o555)
    assert "could not be written" in error_of(lambda: make().save_pretrained(tmp_path / "kvp"))


def test_a_file_in_the_way_is_an_error(make, error_of, tmp_path: Path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "kvp"):
        assert str(folder) in error_of(lambda folder=folder: make().save_pretrained(folder))
    assert (tmp_path / "file").read_text() == ""


# Models


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 16, "vocab_size": 16, "head_dim": 8}
    config = LlamaConfig(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, **sizes)
    return LlamaForCausalLM(config)


def test_its_own_model_is_welcome_in_every_form(make, llama: LlamaForCausalLM, saved: Path):
    info = replace(make.info, fingerprint=identity.fingerprint(llama))
    scorer = make(model=info)
    scorer.save_pretrained(saved)
    for model in (llama, llama.config, info, llama.to(torch.bfloat16)):
        scorer.check_model(model)
        NetworkScorer.from_pretrained(saved, model)


@pytest.mark.parametrize("form", ["other weights", "other shape", "other traces"])
def test_another_model_is_an_error_that_names_both(
    make, error_of, llama: LlamaForCausalLM, saved: Path, form: str
):
    if form == "other traces":
        other = replace(make.info, id="other/model", fingerprint="beef")
    else:
        other = llama  # its fingerprint is not f00d
        other.config._name_or_path = "other/model"
        if form == "other shape":
            other = LlamaConfig(**{**llama.config.to_dict(), "num_key_value_heads": 4})
            other._name_or_path = "other/model"
    for action in (
        lambda: make().check_model(other),
        lambda: NetworkScorer.from_pretrained(saved, other),
    ):
        message = error_of(action)
        assert "tiny/llama" in message
        assert "other/model" in message
