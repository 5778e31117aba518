from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from kvenv import identity
from kvenv.errors import KvenvError
from kvenv.scorers import NetworkScorer, Scorer, bundle
from kvenv.scorers.network import Architecture
from kvenv.trace import ModelInfo

INFO = ModelInfo("tiny/llama", "f00d", "llama", "t0k", 4, 2, 4, 8, (1, 3))
ALL = ((1, 0), (1, 1), (3, 0), (3, 1))


def make(
    heads: tuple = ALL, seed: int = 0, model: ModelInfo = INFO, **architecture: object
) -> NetworkScorer:
    shape = Architecture(**{"hidden": (6, 5), **architecture})
    noise = torch.Generator().manual_seed(seed)
    network = shape.build(heads, model.head_dim, noise)
    network.mean.normal_(generator=noise)
    network.std.uniform_(0.5, 2, generator=noise)
    return NetworkScorer(network, shape, model, {"agent": "kvp", "seed": seed}, {"closure": 0.5})


def tokens(batch: int = 2, heads: int = 2, n: int = 9, d: int = 8) -> tuple[torch.Tensor, ...]:
    noise = torch.Generator().manual_seed(7)
    keys, values = (torch.randn(batch, heads, n, d, generator=noise) for _ in range(2))
    return keys, values, torch.arange(n).expand(batch, heads, n)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make().save_pretrained(tmp_path / "kvp")
    return tmp_path / "kvp"


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(KvenvError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


# Scoring


def test_scores_are_those_of_each_heads_network():
    scorer, given = make(), tokens()
    assert isinstance(scorer, Scorer)
    for layer, rows in ((1, (0, 1)), (3, (2, 3))):
        scores = scorer.score(layer, *given)
        assert scores.shape == (2, 2, 9)
        assert scores.dtype == torch.float32
        assert scores.is_contiguous()
        for head, row in enumerate(rows):
            for one in range(2):
                # The other rows get zeros: what they give is not looked at.
                x = torch.zeros(4, 9, 16)
                x[row] = torch.cat([given[0][one, head], given[1][one, head]], -1)
                torch.testing.assert_close(scores[one, head], scorer.network(x)[row])


def test_heads_it_was_not_trained_for_are_nan():
    wide = replace(INFO, kv_heads=4)
    whole, part = make(((1, 0), (1, 1), (1, 3)), model=wide), make(((1, 0), (1, 3)), model=wide)
    part.network.load_state_dict({k: x[[0, 2]] for k, x in whole.network.state_dict().items()})
    assert part.heads == {(1, 0), (1, 3)}
    given = tokens(heads=4)
    scores = part.score(1, *given)
    assert scores.isnan().all(-1).tolist() == [[False, True, True, False]] * 2
    torch.testing.assert_close(scores[:, [0, 3]], whole.score(1, *given)[:, [0, 3]])


def test_a_layer_it_was_not_trained_for_is_nan():
    scores = make().score(2, *tokens())
    assert scores.shape == (2, 2, 9)
    assert scores.dtype == torch.float32
    assert scores.isnan().all()


def test_position_features_reach_the_network():
    scorer, (keys, values, positions) = make(features=("key", "position")), tokens()
    near, far = (scorer.score(1, keys, values, positions + shift) for shift in (0, 500))
    assert not torch.equal(near, far)
    assert torch.equal(near, scorer.score(1, keys, values + 1, positions))


# Saving and loading


@pytest.mark.parametrize("heads", [ALL, ((1, 1), (3, 0))])
@pytest.mark.parametrize(
    "architecture",
    [
        {},
        {"features": ("value", "position"), "hidden": ()},
        {"features": ("key", "fill"), "budget": 4, "activation": "tanh"},
    ],
)
def test_a_round_trip_changes_no_bit(tmp_path: Path, heads: tuple, architecture: dict):
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


def test_a_bundle_is_safetensors_and_json_alone(saved: Path):
    assert {path.name for path in saved.iterdir()} == {"config.json", "model.safetensors"}
    config = json.loads((saved / "config.json").read_text())
    assert (config["format"], config["version"]) == ("kvenv-scorer", 1)
    assert config["model"]["id"] == "tiny/llama"
    assert config["heads"] == [list(head) for head in ALL]
    assert config["architecture"] == {
        "features": ["key", "value"],
        "hidden": [6, 5],
        "activation": "gelu",
        "budget": None,
    }
    assert config["training"] == {"agent": "kvp", "seed": 0}
    assert saved.stat().st_mode & 0o777 == 0o755


def test_a_bundle_from_before_there_were_activations_and_budgets_loads(saved: Path):
    before = NetworkScorer.from_pretrained(saved)
    change_config(saved, lambda config: config["architecture"].pop("activation"))
    change_config(saved, lambda config: config["architecture"].pop("budget"))
    assert NetworkScorer.from_pretrained(saved).architecture == before.architecture


def test_how_full_the_cache_is_reaches_the_network():
    scorer, given = make(features=("fill",), budget=4, activation="relu"), tokens()
    scores = scorer.score(1, *given)
    assert (scores[..., 4:] == scores[..., 4:5]).all()  # the cache is full from token 4 on
    assert len(scores[0, 0].unique()) == 5
    twin = make(features=("fill",), budget=4, activation="tanh")
    assert not torch.equal(scores, twin.score(1, *given))


def test_saving_replaces_a_bundle_and_leaves_nothing_else(saved: Path):
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
    tmp_path: Path, part: str, said: dict, there: bool
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
def test_saving_replaces_nothing_but_a_bundle(tmp_path: Path, config: str | None):
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool, step: str
):
    folder = tmp_path / "kvp"
    if there:
        make().save_pretrained(folder)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    rename = Path.rename
    with monkeypatch.context() as patch:
        if step == "save_file":
            patch.setattr(bundle, "save_file", full)
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
def test_a_read_only_folder_is_an_error(tmp_path: Path):
    tmp_path.chmod(0o555)
    assert "could not be written" in error_of(lambda: make().save_pretrained(tmp_path / "kvp"))


def test_a_file_in_the_way_is_an_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "kvp"):
        assert str(folder) in error_of(lambda folder=folder: make().save_pretrained(folder))
    assert (tmp_path / "file").read_text() == ""


# Damage


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
def test_a_weight_that_is_no_number_is_named(saved: Path, tensor: str, number: float):
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
def test_weights_that_do_not_fit_are_an_error(saved: Path, change: Callable, words: list[str]):
    change_weights(saved, change)
    message = error_of(lambda: NetworkScorer.from_pretrained(saved))
    assert all(word in message for word in ["model.safetensors", "does not fit", *words])


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_of_weights_is_an_error(saved: Path, keep: int):
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
        ('{"format": "kvenv-scorer", "version": 2}', ["version 2", "update kvenv"]),
        ('{"format": "kvenv-scorer"}', ["version None"]),
    ],
)
def test_another_configuration_is_an_error(saved: Path, text: str, words: list[str]):
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
        lambda config: config["model"].update(colour="red"),
        lambda config: config["model"].update(head_dim="8"),
        lambda config: config["architecture"].update(features=["age"]),
        lambda config: config["architecture"].update(hidden=["wide"]),
        lambda config: config["architecture"].update(activation="sine"),
        lambda config: config["architecture"].update(budget=8),
        lambda config: config["architecture"].update(features=["fill"], budget="wide"),
    ],
)
def test_a_damaged_configuration_is_an_error(saved: Path, change: Callable):
    change_config(saved, change)
    message = error_of(lambda: NetworkScorer.from_pretrained(saved))
    assert str(saved / "config.json") in message
    assert "damaged" in message


def test_a_folder_that_is_no_bundle_is_an_error(tmp_path: Path, saved: Path):
    (saved / "model.safetensors").unlink()
    for folder in (tmp_path, saved):
        message = error_of(lambda folder=folder: NetworkScorer.from_pretrained(folder))
        assert str(folder) in message
        assert "not a bundle" in message


@pytest.mark.parametrize("source", ["nobody/nothing", "./missing", "a/b/c"])
def test_a_bundle_that_is_nowhere_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
):
    monkeypatch.chdir(tmp_path)
    message = error_of(lambda: NetworkScorer.from_pretrained(source))
    assert repr(source) in message
    assert "no such folder" in message


# Models


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 16, "vocab_size": 16, "head_dim": 8}
    config = LlamaConfig(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, **sizes)
    return LlamaForCausalLM(config)


def test_its_own_model_is_welcome_in_every_form(llama: LlamaForCausalLM, saved: Path):
    info = replace(INFO, fingerprint=identity.fingerprint(llama))
    scorer = make(model=info)
    scorer.save_pretrained(saved)
    for model in (llama, llama.config, info, llama.to(torch.bfloat16)):
        scorer.check_model(model)
        NetworkScorer.from_pretrained(saved, model)


@pytest.mark.parametrize("form", ["other weights", "other shape", "other traces"])
def test_another_model_is_an_error_that_names_both(llama: LlamaForCausalLM, saved: Path, form: str):
    if form == "other traces":
        other = replace(INFO, id="other/model", fingerprint="beef")
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
