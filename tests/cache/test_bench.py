"""The cache's benchmark, at sizes that say nothing about speed."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from kvenv import cli
from kvenv.cache.bench import Grid, Settings, benchmark, checks, decoding, kernels, small
from kvenv.cache.bench.contenders import WAYS, contender, random_model, random_scorer
from kvenv.cache.bench.goals import find_goals, flatness, sentence
from kvenv.cache.bench.inputs import full_positions
from kvenv.cache.bench.picture import draw
from kvenv.cache.bench.report import show
from kvenv.cache.bench.session import Session, TooLargeError, copy_bandwidth, poisoned, sets_for
from kvenv.errors import KvenvError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 64,
    "max_position_embeddings": 1024,
}
GRID = Grid(SHAPE, (64, 96), (1, 2), (32,), (96, 2, 32), (), (48,), steps=3, long=40)


def session(**given) -> Session:
    console = Console(file=io.StringIO(), width=150)
    return Session(**{"device": DEVICE, "console": console, "seconds": 600, "save": id} | given)


@pytest.fixture(scope="module")
def decoded() -> Session:
    one = session()
    benchmark.decode_all(one, GRID, [])
    return one


def test_every_cache_is_measured_at_every_length(decoded: Session) -> None:
    rows = decoded.results["decoding"]["rows"]
    assert not decoded.failures
    measured = [(row["way"], row["context"], row["batch"], row["budget"]) for row in rows]
    assert len(set(measured)) == len(measured)
    assert set(measured) == {
        (way, context, batch, 32 if way == "ours" else None)
        for way in ("dynamic", "unmasked", "ours")
        for context in (64, 96)
        for batch in (1, 2)
    }
    assert measured[0] == ("ours", 96, 2, 32)  # what has a goal comes first
    for row in rows:
        assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(row["batch"])


def test_bytes_are_those_of_the_tokens_held(decoded: Session) -> None:
    token = 2 * 2 * 2 * 64 * (2 if DEVICE.type == "cuda" else 4)  # layers, KV heads
    assert decoded.results["decoding"]["token_bytes"] == token
    for row in decoded.results["decoding"]["rows"]:
        if row["way"] == "ours":
            assert row["budget_bytes"] == row["batch"] * 32 * token
            assert 1 < row["cache_of_budget"] < 1.2
        if row["way"] == "dynamic":  # which has grown by the steps
            steps = decoding.WARMUP + GRID.steps
            assert row["cache_bytes"] == row["batch"] * (row["context"] + steps) * token


def test_many_tokens_later_the_cache_is_as_large(decoded: Session) -> None:
    memory = decoded.results["decoding"]["memory"]
    assert memory["after"]["seen"] - memory["before"]["seen"] == 40
    assert memory["after"]["cache_bytes"] == memory["before"]["cache_bytes"]
    assert memory["grew_by"] == 0


def test_prompts_are_read_with_both_caches(decoded: Session) -> None:
    rows = decoded.results["decoding"]["prefill"]
    assert [(row["way"], row["tokens"], row["budget"]) for row in rows] == [
        ("dynamic", 48, None),
        ("ours", 48, 32),
    ]
    full, ours = (row["cache_bytes"] for row in rows)
    assert ours < full


@pytest.mark.parametrize("way", [way for way in WAYS if way != "compiled" or DEVICE.type == "cuda"])
def test_a_filled_cache_decodes_where_the_text_ends(way: str) -> None:
    model = random_model(SHAPE, DEVICE)
    with torch.no_grad():
        cache, step = contender(way, model, random_scorer(model), 64, 2, 32)
        start = int(cache.get_seq_length())
        logits = step(torch.tensor([1, 2], device=DEVICE))
        assert logits.shape == (2, 64)
        assert logits.isfinite().all()
        for _ in range(3):
            step(torch.tensor([1, 2], device=DEVICE))
    # Capturing the unmasked step has run it before.
    assert start == 64 or way == "unmasked"
    assert int(cache.get_seq_length()) == start + 4


def test_full_caches_see_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    model, token = random_model(SHAPE, DEVICE), torch.tensor([3, 5], device=DEVICE)
    found = {}
    with torch.no_grad():
        for way in ("dynamic", "compiled", "unmasked"):
            cache, step = contender(way, model, random_scorer(model), 64, 2, None)
            for at, layer in enumerate(cache.layers):
                draw = torch.Generator(DEVICE).manual_seed(at)
                for states in (layer.keys, layer.values):
                    drawn = torch.randn(states[:, :, :64].shape, generator=draw, device=DEVICE)
                    states[:, :, :64] = drawn.to(states.dtype)
            found[way] = [step(token).clone() for _ in range(2)]
    for ours, right in zip(found["compiled"], found["dynamic"], strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-2, atol=1e-3)
    # Without a mask it sees all that it has room for.
    assert not torch.allclose(found["unmasked"][0], found["dynamic"][0], rtol=1e-2, atol=1e-3)


def test_few_cases_vary_every_axis() -> None:
    assert list(checks.one_at_a_time((1, 2), "ab")) == [(1, "a"), (2, "a"), (1, "b")]


def test_positions_are_spread_over_the_text() -> None:
    assert full_positions(1, 2, 4, 12).tolist() == [[0, 3, 6, 9, 0, 3, 6, 9]]


def test_what_cannot_fit_is_skipped_and_what_breaks_is_told() -> None:
    one = session()

    def large() -> dict:
        raise TooLargeError("needs 2 bytes, 1 free")

    assert one.measure("a", large) == {"skipped": "needs 2 bytes, 1 free"}
    assert not one.failures
    assert one.measure("b", lambda: 1 // 0) == {
        "failed": "ZeroDivisionError: integer division or modulo by zero"
    }
    assert one.failures[0].startswith("b (ZeroDivisionError")
    assert session(seconds=0).measure("c", dict)["skipped"].startswith("the time of 0 minutes")


def test_results_are_saved_after_every_part_even_a_broken_one() -> None:
    saved = []
    one = session(save=lambda results: saved.append(dict(results)))
    with one.part("first"):
        one.results["x"] = 1

    def second() -> None:
        with one.part("second"):
            one.results["y"] = 2
            raise KeyError

    with pytest.raises(KeyError):
        second()
    assert saved == [{"x": 1}, {"x": 1, "y": 2}]


def test_new_memory_is_poisoned() -> None:
    with poisoned():
        assert torch.empty(3).isnan().all()
        assert torch.zeros(2).new_empty(3).isnan().all()
        assert torch.empty_like(torch.zeros(3)).isnan().all()
        assert torch.empty(3, dtype=torch.int32).dtype == torch.int32
    assert "new_empty" not in vars(torch.Tensor)


def test_input_sets_exceed_the_cache_together() -> None:
    assert sets_for(10**9) == 2
    assert sets_for(2**24) * 2**24 >= 4 * 60 * 2**20
    assert sets_for(1) == 64


def test_kernels_agree_with_their_references() -> None:
    one = session()
    rows = checks.check_kernels(one, 7)
    assert [row["kernel"] for row in rows] == ["attend", "insert", "score", "admit", "columns"]
    assert all(row["met"] for row in rows), rows


def test_every_kernel_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"HEADS": 2, "GROUP": 2, "SIZE": 64, "DTYPE": torch.float16, "SPLITS": (1, 2)}
    sizes["VARIANTS"] = {"block": (32,), "warps": (4,), "stages": (2,)}
    for name, value in sizes.items():
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setattr(kernels, "sets_for", lambda size: 2)
    kernels.packed_layer.cache_clear()
    one = session()
    step = kernels.decode_step(one, 2, 40, 1e9)
    rows = {
        **{name: step[name] for name in ("attend", "insert")},
        "score": kernels.score_prompt(one, 70, 1e9),
        "admit": kernels.admit_prompt(one, 50, 40, 1e9),
        "columns": kernels.columns_prompt(one, 50, 1e9),
    }
    kernels.packed_layer.cache_clear()
    for row in rows.values():
        assert row["bytes_per_second"] == pytest.approx(row["bytes"] / row["seconds"])
        assert row["share_of_copy"] == pytest.approx(row["bytes_per_second"] / 1e9)
    # Keys and values of 2 rows, 2 heads and 40 slots of 64 numbers; queries, results; numbers.
    assert rows["attend"]["bytes"] == 2 * 2 * (2 * 2 * 40 * 64 + 2 * 4 * 64) + 4 * (4 + 3)
    share = step["insert"]["seconds"] / step["attend"]["seconds"]
    assert step["insert_share_of_attend"] == pytest.approx(share)
    swept = kernels.sweep(one, [(1, 64)], 1e9)[0]
    assert len(swept["variants"]) == 4
    assert swept["best"]["seconds"] == min(v["seconds"] for v in swept["variants"])


def test_a_copy_counts_reading_and_writing() -> None:
    found = copy_bandwidth(DEVICE, 2**20)
    assert found["bytes"] == 2**21
    assert found["bytes_per_second"] == pytest.approx(2**21 / found["seconds"])


@pytest.mark.parametrize("spoilt", [float("nan"), 1.0])
def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch, spoilt: float) -> None:
    right = checks.admit

    def wrong(*args):
        right(*args)
        args[8][0, 0] += spoilt  # a score

    monkeypatch.setattr(checks, "admit", wrong)
    monkeypatch.setattr(benchmark, "_device", lambda: DEVICE)
    for name in ("_attend", "_insert", "_score", "_columns"):
        monkeypatch.setattr(checks, name, lambda *_: [checks.Case("nothing", 0.0, 0.0)])
    saved = []
    settings = Settings(parts=("correctness",))
    out = io.StringIO()
    with pytest.raises(KvenvError, match="admit differ from the float64 references"):
        benchmark.run(settings, Console(file=out, width=150), saved.append)
    met = {row["kernel"]: row["met"] for row in saved[-1]["correctness"]["kernels"]}
    assert met.pop("admit") is False
    assert all(met.values())
    assert "NO" in out.getvalue()


def test_goals_are_met_or_missed_by_so_much() -> None:
    def row(way, context, seconds, budget=None):
        rates = {"step_seconds": seconds, "tokens_per_second": 16 / seconds}
        size = {"cache_of_budget": 1.015} if budget else {}
        return {"way": way, "context": context, "batch": 16, "budget": budget, **rates, **size}

    rows = [row("compiled", 32768, 0.04), row("ours", 32768, 0.01, 2048), row("dynamic", 64, 1.0)]
    rows += [row("ours", 4096, 0.0125, 2048), row("ours", 1024, 1.0, 2048)]
    step = {"attend": {"share_of_copy": 0.75}, "insert_share_of_attend": 0.03, "budget": 4096}
    memory = {"tokens": 9, "grew_by": 0}
    results = {
        "step": [{**step, "batch": 16}, {**step, "batch": 1}, {"batch": 64, "skipped": "x"}],
        "decoding": {"rows": rows, "memory": memory},
    }
    goals = find_goals(results)
    assert [(round(goal["figure"], 3), goal["met"]) for goal in goals] == [
        (0.75, False),
        (0.03, True),
        (4.0, True),
        (0.015, True),
        (0.25, False),
        (0, True),
    ]
    assert sentence(goals[0]).endswith("0.75, goal >= 0.8: missed by 0.05")
    assert sentence(goals[1]).endswith("0.03, goal <= 0.05: met")
    # A context within the budget is no part of what must be flat.
    assert [one["contexts"] for one in flatness([r for r in rows if r["budget"]])] == [
        [4096, 32768]
    ]


def test_tables_show_figures_and_reasons(decoded: Session) -> None:
    rates = {"seconds": 2e-6, "bytes": 4 * 10**6, "bytes_per_second": 2e12, "share_of_copy": 0.5}
    kernel = {**rates, "flops_per_second": 3e12}
    results = {
        **decoded.results,
        "copy": {"bytes_per_second": 4e12},
        "step": [
            {"batch": 1, "budget": 8, "attend": kernel, "insert": kernel}
            | {"insert_share_of_attend": 1.0},
            {"batch": 64, "budget": 8, "skipped": "needs 9 bytes, 1 free"},
        ],
        "prompt": [{"kernel": "score", "tokens": 9, **kernel, "torch_seconds": 8e-6}],
        "real": {
            "model": "m",
            "context": 7,
            "budget": 3,
            "rows": [
                {"way": "dynamic", "batch": 1, "tokens_per_second": 20.0},
                {"way": "ours", "batch": 1, "tokens_per_second": 50.0},
                {"way": "eager", "batch": 1, "failed": "KeyError: 3"},
            ],
        },
    }
    out = io.StringIO()
    show(results, find_goals(results), Console(file=out, width=200))
    text = out.getvalue()
    for shown in ("needs 9 bytes, 1 free", "0.25 of torch's", "2,000", "failed: KeyError: 3"):
        assert shown in text
    assert "2.50" in text
    rows = decoded.results["decoding"]["rows"]
    rate = next(r for r in rows if r["way"] == "ours")["tokens_per_second"]
    assert f"{rate:,.1f}" in text
    assert "cache bytes off the budget's, worst" in text


def test_the_picture_is_drawn_from_the_json(decoded: Session, tmp_path) -> None:
    image = pytest.importorskip("matplotlib.image")
    result = json.loads(json.dumps(decoded.results))
    draw(result, tmp_path / "cache.png")
    pixels = image.imread(tmp_path / "cache.png")
    assert min(pixels.shape[:2]) > 500
    assert pixels.std() > 0.05
    with pytest.raises(KvenvError, match="no decoding to draw"):
        draw({"decoding": {"rows": [{"skipped": "x"}]}}, tmp_path / "cache.png")


@pytest.mark.slow
def test_a_real_model_writes_with_every_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "TOKENS", (2, 6))
    monkeypatch.setattr(small, "REPEATS", 1)
    one = session()
    small.real_model(one, context=48, budget=32, batches=(2,))
    assert not one.failures
    rows = one.results["real"]["rows"]
    assert [row["way"] for row in rows] == list(small.WAYS)
    assert all(row["seconds"] > 0 for row in rows)


def test_without_a_model_there_is_a_reason() -> None:
    one = session()
    small.real_model(one, model="no-such-model")
    assert "no-such-model" in one.results["real"]["skipped"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"parts": ("kernels", "speed")}, "unknown part 'speed'"),
        ({"minutes": 0}, "minutes is 0"),
        ({"grid": Grid(contexts=())}, r"contexts \[\]"),
        ({"grid": Grid(budgets=(512, 0))}, r"budgets \[512, 0\]"),
    ],
)
def test_unusable_settings_are_refused(given, message: str) -> None:
    with pytest.raises(KvenvError, match=message):
        Settings(**given)


def test_the_command_needs_a_gpu_or_the_interpreter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert cli.main(["bench", "cache"]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_the_command_writes_what_it_checked(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = [{"kernel": "attend", "cases": 1, "met": True, "what": "x", "error": 0.0}]
    found[0]["tolerance"] = 1.0
    monkeypatch.setattr(checks, "check_kernels", lambda session, seed: found)
    path = tmp_path / "cache.json"
    assert cli.main(["bench", "cache", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert written["correctness"]["kernels"] == found
    assert written["bench"] == "cache"
    assert "decoding" not in written
    assert "torch" in written["versions"]
    assert cli.main(["bench", "cache", "--num-envs", "3"]) == 2
