"""The example plug-ins keep their contracts, and `kvenv.testing` refuses whatever breaks one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvenv import plugins
from kvenv.errors import KvenvError
from kvenv.learning.agent import Heuristic
from kvenv.recording.workload import Sample
from kvenv.scorers import NetworkScorer
from kvenv.testing import check_agent, check_scorer, check_workload
from kvenv.trace import TraceSet

EXAMPLES = Path(__file__).parents[1] / "examples"
Linear = plugins.load("agent", str(EXAMPLES / "linear_agent.py"))


def refused(check: Callable[[Any], None], plugin: Any, message: str) -> None:
    with pytest.raises(KvenvError, match=message) as error:
        check(plugin)
    assert "\n" not in str(error.value)
    assert re.search(": |; ", str(error.value))  # what is wrong, then the cure


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*_agent.py")), ids=lambda path: path.stem)
def test_example_agents_keep_their_contract(path: Path) -> None:
    check_agent(plugins.load("agent", str(path)))


def test_agents_are_checked_on_the_traces_given(tiny_traces, tmp_path: Path) -> None:
    sets = [tiny_traces(tmp_path / str(seed), seed=seed) for seed in range(2)]
    seen: list[TraceSet] = []

    class Watched(Linear):
        def fit(self, traces, heads=None, run=None):
            seen.extend(traces)
            return super().fit(traces, heads, run)

    check_agent(Watched(ridge=1.0), sets)
    assert seen == 3 * sets


def test_the_example_workload_keeps_its_contract() -> None:
    check_workload(plugins.load("workload", str(EXAMPLES / "my_workload.py")))


# --- scorers ---------------------------------------------------------------------------------


class Good:
    needs: frozenset[str] = frozenset()
    heads: frozenset[tuple[int, int]] | None = None

    def score(self, layer, keys, values, positions, now, **needs):
        return keys.float().sum(-1) + positions / 100


def scorer(formula: Callable[..., Any] | None = None, **attributes: Any) -> Any:
    """One whose score is a formula of keys, values and positions."""
    if formula is not None:
        attributes["score"] = lambda self, layer, keys, values, positions, now, **needs: formula(
            keys, values, positions
        )
    return type("Mine", (Good,), attributes)()


def seen_from_now(self, layer, keys, values, positions, now, **needs):
    return keys.float().sum(-1) - (now[:, None, None] - positions).float()


def counting(calls: list[int]) -> Callable[..., torch.Tensor]:
    def formula(k, v, p):
        calls.append(1)
        return k.float().sum(-1) + len(calls)

    return formula


ALL = torch.nn.Parameter(torch.ones(64))
SCORERS = {
    "no scorer": (SimpleNamespace(needs=frozenset(), score=1), "it has no heads: define"),
    "needs a set": (scorer(needs={"queries"}), r"needs is \{'queries'\}: give a frozenset"),
    "needs unknown": (scorer(needs=frozenset({"future"})), "needs is .*'future'"),
    "heads a list": (scorer(heads=[(0, 0)]), r"heads is \[\(0, 0\)\]"),
    "heads of what": (scorer(heads=frozenset({3})), r"heads is frozenset\(\{3\}\)"),
    "raises": (scorer(lambda k, v, p: k @ p), "3 rows of 11 tokens raised RuntimeError"),
    "no tensor": (scorer(lambda k, v, p: k.sum(-1).numpy()), "gave a ndarray"),
    "shape": (scorer(lambda k, v, p: k.sum((1, 3))), r"gave shape \(3, 11\).*here \(3, 2, 11\)"),
    "dtype": (scorer(lambda k, v, p: k.sum(-1).double()), "gave torch.float64"),
    "gradient": (scorer(lambda k, v, p: k.float() @ ALL), "requires a gradient: put @torch"),
    "nan": (scorer(lambda k, v, p: k.sum(-1).log()), "gave NaN in layer 0, KV head 0"),
    "head outside": (scorer(heads=frozenset({(0, 0)})), "layer 0, KV head 1, which is not in"),
    "layer outside": (
        scorer(heads=frozenset({(1, 0), (1, 1)})),
        "a layer outside its heads gave numbers for layer 0",
    ),
    "one token": (
        scorer(
            lambda k, v, p: (
                (p - p.amin(2, keepdim=True)) / (p.amax(2, keepdim=True) - p.amin(2, keepdim=True))
            ),
        ),
        "one token gave NaN",
    ),
    "views": (
        scorer(lambda k, v, p: k.view(len(k), -1, k.shape[-1]).sum(-1).view(p.shape)),
        "views of longer arrays raised RuntimeError.*use reshape",
    ),
    "zeros": (
        scorer(lambda k, v, p: (k / k.norm(dim=-1, keepdim=True)).sum(-1)),
        "of zeros gave NaN.*guard",
    ),
    "large": (scorer(lambda k, v, p: (k.exp() / k.exp()).sum(-1)), "near 10000 gave NaN"),
    "half": (scorer(lambda k, v, p: k @ ALL.data), r"torch.float16.* raised RuntimeError.*keys\.f"),
    "rounded": (
        scorer(
            lambda k, v, p: (
                k.bfloat16().sum(-1).float()
                if k.dtype != torch.float32
                else Good().score(0, k, v, p * 0, p)
            )
        ),
        "other numbers for torch.float16",
    ),
    "batch": (
        scorer(lambda k, v, p: (k.float() - k.float().mean(0)).sum(-1)),
        "row 0 of a batch other scores",
    ),
    "state": (scorer(counting([])), "asked again"),
    "noise": (scorer(lambda k, v, p: torch.rand(p.shape)), "global generator of torch"),
    "seeding": (
        scorer(lambda k, v, p: (np.random.seed(0), k.float().sum(-1))[1]),  # noqa: NPY002
        "global generator of numpy",
    ),
    "in place": (scorer(lambda k, v, p: k.mul_(2).float().sum(-1)), "changed its keys"),
}


@pytest.mark.parametrize("case", SCORERS)
def test_scorers_that_break_the_contract_are_refused(case: str) -> None:
    refused(check_scorer, *SCORERS[case])


def test_scorers_that_keep_it_are_not() -> None:
    check_scorer(Good())
    check_scorer(scorer(lambda k, v, p: (k.float() - k.float().mean(2, keepdim=True)).sum(-1)))
    check_scorer(scorer(score=seen_from_now))


def test_scorers_are_asked_for_the_heads_and_sizes_given() -> None:
    shapes: set[tuple[int, ...]] = set()

    class Watched(Good):
        needs = frozenset({"queries"})

        def score(self, layer, keys, values, positions, now, **needs):
            shapes.add((layer, keys.shape[1], keys.shape[3], *needs["queries"].shape[1::2]))
            return super().score(layer, keys, values, positions, now)

    check_scorer(Watched(), [(3, 2), (5, 0)], head_dim=6)
    check_scorer(Watched(), head_dim=6, kv_heads=1, query_heads=7)
    assert shapes == {(3, 3, 6, 6, 6), (5, 3, 6, 6, 6), (0, 1, 6, 7, 6)}
    refused(
        partial(check_scorer, heads=[(0, 0), (0, 1)]),
        scorer(heads=frozenset({(0, 0)})),
        r"heads lacks \[\(0, 1\)\]",
    )


# --- agents ----------------------------------------------------------------------------------


def learner(change: Callable[..., Any], before: bool = False) -> type:
    """A linear agent that changes the scorer it made, or does something with its traces before."""

    class Mine(Linear):
        def fit(self, traces, heads=None, run=None):
            if before:
                change(traces)
                return super().fit(traces, heads, run)
            return change(super().fit(traces, heads, run))

    return Mine


def heuristic(**attributes: Any) -> type:
    return type("Mine", (Heuristic, Good), {"score": Good.score, **attributes})


@dataclass
class Shadows(Linear):
    heads: int = 2


@dataclass
class Required(Heuristic, Good):
    strength: float
    score = Good.score


class Untyped(Heuristic):
    def __init__(self, ridge: float = 0.1, sharpness=2):
        pass


class Unreadable(Heuristic):
    def __init__(self, ridge: Ridge = None):  # noqa: F821
        pass


class Passes(Linear):
    def __init__(self, **others):
        super().__init__(**others)


class PassesShadow(Shadows):
    def __init__(self, **others):
        super().__init__(**others)


class Unlogged(NetworkScorer):
    def score(self, *args: Any, **needs: torch.Tensor) -> torch.Tensor:
        return super().score(*args, **needs).exp()


def noisy(found: NetworkScorer) -> NetworkScorer:
    found.network.biases[0].data += np.random.default_rng().normal()
    return found


def keep(results: list[Any], found: NetworkScorer) -> NetworkScorer:
    results.append(found)
    found.network.biases[0].data += len(results)
    return found


def write(traces: list[TraceSet]) -> None:
    with (traces[0].path / traces[0].manifest.shards[0].file).open("ab") as file:
        file.write(b"!")


AGENT_CASES = {
    "no fit": (Good, "Good is no agent: give it fit"),
    "no trains": (type("Mine", (), {"fit": Linear.fit}), "trains is None: say"),
    "untyped option": (Untyped, "options sharpness have no type"),
    "unreadable option": (Unreadable, "Unreadable's options cannot be read .*'Ridge' is.*: import"),
    "option of another class": (Passes, r"options ridge come through \*\*kwargs: name them"),
    "shadowing option of another class": (PassesShadow, r"'--heads' already exists.*: give each"),
    "shadowing option": (Shadows, "options heads are options of the command too: rename"),
    "required option": (Required(1.0), r"without a default \(strength\), but `kvenv evaluate`"),
    "fit's arguments": (
        heuristic(fit=lambda self, traces: self),
        "fit for all heads of 0 trace sets raised TypeError",
    ),
    "no traces": (
        heuristic(fit=lambda self, traces, heads, run: traces[0] and self),
        "fit for all heads of 0 trace sets raised IndexError",
    ),
    "nothing": (
        heuristic(fit=lambda self, traces, heads, run: None),
        "fit gave a NoneType: return a scorer",
    ),
    "not saved": (learner(lambda found: Good()), "gave a Good, which cannot be saved"),
    "other heads": (
        type("Mine", (Linear,), {"fit": lambda self, t, h=None, r=None: Linear.fit(self, t)}),
        r"asked for heads \[\(3, 1\), \(1, 1\)\] and gave \[\(1, 0\), ",
    ),
    "heuristic's heads": (
        heuristic(heads=frozenset({(1, 0), (1, 1)})),
        r"Mine.heads lacks \[\(3, 0\), \(3, 1\)\]",
    ),
    "other model": (
        learner(lambda found: replace(found, model=replace(found.model, fingerprint="x"))),
        r"model small \(x\): .* here small \(small\)",
    ),
    "broken scorer": (
        learner(lambda found: (found.network.biases[0].data.fill_(torch.nan), found)[1]),
        "NetworkScorer.score for 3 rows of 11 tokens gave NaN in layer 1, KV head 0",
    ),
    "training": (
        learner(lambda found: replace(found, training={"data": np.ones(2)})),
        "training 'data' of a scorer is not JSON-safe .*ndarray",
    ),
    "metrics": (
        learner(lambda found: replace(found, metrics={"loss": torch.nan})),
        "metrics 'loss' of a scorer is not JSON-safe .*float",
    ),
    "not in its weights": (
        learner(
            lambda found: Unlogged(found.network, found.architecture, found.model, found.training)
        ),
        "other scores once saved and loaded",
    ),
    "noise": (learner(noisy), "gave other scores the second time"),
    "state": (learner(partial(keep, [])), "gave other scores the second time"),
    "seeding": (learner(lambda t: torch.manual_seed(0), before=True), "global generator of torch"),
    "metadata": (
        learner(lambda t: t[0].info(1).metadata.clear(), before=True),
        "changed the traces",
    ),
    "files": (learner(write, before=True), "changed the traces it was given: change copies"),
}


@pytest.mark.parametrize("case", AGENT_CASES)
def test_agents_that_break_the_contract_are_refused(case: str) -> None:
    refused(check_agent, *AGENT_CASES[case])


def test_a_learner_may_tell_what_it_likes() -> None:
    check_agent(learner(lambda found: replace(found, training={}, metrics={"loss": "low"})))


def test_heuristics_of_ones_own_pass() -> None:
    check_agent(heuristic())
    check_agent(heuristic()())
    check_agent(heuristic(needs=frozenset({"utility", "queries"})))


# --- workloads -------------------------------------------------------------------------------


class Digits:
    """Random tokens; a subclass changes what its sample holds."""

    def sample(self, index, *, tokenizer, rng, prompt_tokens, future_tokens, seed):
        prompt, future = (rng.integers(0, 10, n).tolist() for n in (prompt_tokens, future_tokens))
        return self.changed(Sample(prompt, future, f"digits {index}"), index)

    def changed(self, sample: Sample, index: int) -> Any:
        return sample


def workload(change: Callable[[Sample, int], Any]) -> type:
    return type("Mine", (Digits,), {"changed": lambda self, sample, index: change(sample, index)})


def giving(**changes: Any) -> type:
    return workload(lambda sample, index: replace(sample, **changes))


@dataclass
class Episodes(Digits):
    episodes: int = 2


class Options(Digits):
    def __init__(self, source=3):
        pass


@dataclass
class Source(Digits):
    source: str


class Hidden(Digits):
    def __init__(self) -> None:
        self.words = {"a", "b"}


class Reads(Digits):
    """Goes on where it was."""

    def __init__(self) -> None:
        self._read = 0

    def changed(self, sample: Sample, index: int) -> Sample:
        self._read += 1
        return replace(sample, document=f"line {self._read}")


class Memorises(Reads):
    """Goes on where it was, but remembers what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self._given: dict[int, Sample] = {}

    def changed(self, sample: Sample, index: int) -> Sample:
        if index not in self._given:
            self._given[index] = super().changed(sample, index)
        return self._given[index]


class Slots:
    __slots__ = ("_cache", "words")
    sample = Digits.sample
    changed = Digits.changed

    def __init__(self, words: int = 3) -> None:
        self.words: Any = words


class SlotsHidden(Slots):
    def __init__(self) -> None:
        self.words = {"a", "b"}


def missing(sample: Sample, index: int) -> Sample:
    return [sample][index]


WORKLOADS = {
    "no sample": (Good, "Good is no workload"),
    "untyped option": (Options, "options source have no type"),
    "shadowing option": (Episodes, "options episodes are options of the command too"),
    "attributes": (Hidden, r"Hidden\.words is not JSON-safe"),
    "attributes in slots": (SlotsHidden, r"SlotsHidden\.words is not JSON-safe"),
    "raises": (workload(missing), r"sample\(1\) raised IndexError"),
    "no sample returned": (workload(lambda s, i: (s.prompt, s.future)), "gave a tuple: return"),
    "array": (giving(prompt=np.arange(9)), r"prompt is a ndarray"),
    "numpy's numbers": (giving(future=list(np.arange(9))), r"future holds .*a int64: give ints"),
    "empty": (giving(future=[]), r"future has 0 tokens: give 1 to future_tokens, here 256"),
    "too long": (giving(prompt=[1] * 2049), "prompt has 2049 tokens: give 1 to .* here 2048"),
    "one length": (
        workload(lambda s, i: replace(s, prompt=[i] * 2048)),
        "prompt has 2048 tokens: give 1 to .* here 1024",
    ),
    "vocabulary": (giving(prompt=[3, 256]), r"prompt holds token 256: .* 0\.\.255"),
    "document": (giving(document=""), "document is '': name"),
    "metadata": (giving(metadata=["answer"]), "metadata is .*: give a dict"),
    "metadata's values": (giving(metadata={"at": np.ones(2)}), "metadata is not JSON-safe"),
    "asked again": (Reads, "another sample when asked again"),
    "asked before": (Memorises, "another sample when asked of a fresh instance"),
    "same": (giving(prompt=[1], future=[2]), "first 4 episodes the same tokens"),
    "seeding": (
        workload(lambda s, i: (np.random.seed(0), s)[1]),  # noqa: NPY002
        "global generator of numpy",
    ),
}


@pytest.mark.parametrize("case", WORKLOADS)
def test_workloads_that_break_the_contract_are_refused(case: str) -> None:
    refused(check_workload, *WORKLOADS[case])


def test_a_workload_may_have_slots() -> None:
    check_workload(Slots)


def test_a_workload_needs_its_options() -> None:
    refused(check_workload, Source, r"without a default \(source\): check an instance, Source\(sou")


def test_a_workload_may_refuse_shorter_prompts_but_not_those_asked_for() -> None:
    class Long(Digits):
        def sample(self, index, *, prompt_tokens, **rest):
            if prompt_tokens < 2000:
                raise KvenvError(f"prompt_tokens {prompt_tokens} is too small: give 2000")
            return super().sample(index, prompt_tokens=prompt_tokens, **rest)

    check_workload(Long)
    refused(partial(check_workload, prompt_tokens=1999), Long, "prompt_tokens 1999 is too small")
    refused(partial(check_workload, episodes=1), Digits, "episodes is 1")
