"""A bundle's model card, in the Hugging Face Hub's format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvenv import files
from kvenv.display import RESULT_COLUMNS
from kvenv.errors import KvenvError
from kvenv.scorers.bundle import NetworkScorer
from kvenv.scorers.storage import CARD

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

Results = Mapping[str, Any]
"""What ``kvenv evaluate --json`` wrote."""

HUB_IDS = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "gemma-3-270m": "google/gemma-3-270m",
}
"""Where the hub has the models that kvenv knows by a name of its own."""

KINDS = {"full": "all tokens", "sink_free": "sink-free"}
"""Which tokens count -> how tables call that."""

COLUMNS = {metric: name for metric, name in RESULT_COLUMNS.items() if metric != "reward"}


def card(
    scorer: NetworkScorer,
    results: Results | Sequence[Results] | None,
    name: str,
    command: str,
    *,
    agent: str | None = None,
    base_model: str | None = None,
    limits: Sequence[str] = (),
) -> str:
    """The model card of a trained agent: metadata for the hub, and text for people.

    Args:
        scorer: the trained agent.
        results: one or several evaluations of it, as ``kvenv evaluate --json`` writes them.
        name: what the agent is called, as in ``kvenv generate --agent NAME``.
        command: what trains it again, from nothing.
        agent: what the evaluations call it; None takes ``name``.
        base_model: the language model's hub id; None takes that of the scorer's model.
        limits: what else a user should know, a sentence each.

    Returns:
        Markdown that begins with a YAML block; `huggingface_hub.ModelCard` reads it.

    Raises:
        KvenvError: if the results are no evaluation of this agent on its model, or lack figures.
    """
    from huggingface_hub import ModelCard, ModelCardData

    given = [results] if isinstance(results, Mapping) else list(results or ())
    agent = agent or name
    for one in given:
        _check(one, agent, scorer)
    model = base_model or HUB_IDS.get(scorer.model.id, Path(scorer.model.id).name)
    learner = str(scorer.training.get("agent", "kvenv"))
    evaluations = [_Evaluation(one, agent) for one in given]
    data = ModelCardData(
        license="apache-2.0",
        base_model=model,
        library_name="kvenv",
        tags=["kvenv", "kv-cache", "kv-cache-eviction", "long-context", learner],
        model_name=name,
        eval_results=[figure for one in evaluations for figure in one.figures()] or None,
    )
    text = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("card.md.jinja")),
        name=name,
        model=model,
        loaded_as=scorer.model.id if scorer.model.id in HUB_IDS else model,
        scorer=scorer,
        shape=scorer.architecture,
        features=_listed(part.replace("_", " ") for part in scorer.architecture.inputs),
        calibration=_calibration(scorer),
        parameters=sum(weight.numel() for weight in scorer.network.parameters()),
        layers=_ranges({layer for layer, _ in scorer.network.heads}),
        partial=len(scorer.network.heads) < len(scorer.model.heads),
        origins=[origin(one) for one in scorer.training.get("traces", ())],
        options=", ".join(f"{k} {plain(v)}" for k, v in scorer.training.get("options", {}).items()),
        lengths=_lengths(scorer.training.get("traces", ())),
        command=command.strip(),
        evaluations=evaluations,
        limits=list(limits),
    )
    return str(text).rstrip() + "\n"


def _calibration(scorer: NetworkScorer) -> str | None:
    """What a card says of the scorer's calibration, if it has one."""
    if (own := scorer.calibration) is None:
        return None
    low, high = float(own.masses.min()), float(own.masses.max())
    return (
        f"{len(own.heads)} heads, fitted on held-out documents: scores stand for an attention mass "
        f"of {low:.2g} to {high:.2g}"
    )


def write_card(
    folder: str | Path,
    results: Results | Sequence[Results] | None,
    command: str,
    *,
    name: str | None = None,
    **options: Any,
) -> Path:
    """Write a bundle's card into its folder, as README.md.

    Args:
        folder: the bundle's.
        results: evaluations of it; see `card`.
        command: what trains it again.
        name: what it is called; None takes the folder's name.
        **options: of `card`.

    Returns:
        The file.

    Raises:
        KvenvError: if the folder holds no bundle or cannot be written, or as for `card`.
    """
    folder = Path(folder)
    scorer = NetworkScorer.from_pretrained(folder)
    text = card(scorer, results, name or folder.resolve().name, command, **options)
    files.write(folder / CARD, text)
    return folder / CARD


class _Evaluation:
    """One evaluation as a card tells it."""

    def __init__(self, results: Results, agent: str) -> None:
        self.results, self.agent = results, agent
        self.traces = [origin(one) for one in results["traces"]]
        self.comparison: Results = results.get("comparison", {}).get(agent, {})

    def figures(self) -> list[EvalResult]:
        """Normalized score and retention for the hub's index, with their intervals as arguments."""
        from huggingface_hub import EvalResult

        workload = "+".join(dict.fromkeys(map(_workload, self.results["traces"])))
        found = []
        for kind, told in KINDS.items():
            for metric in COLUMNS:
                one = self.results["agents"][self.agent][kind][metric]
                found.append(
                    EvalResult(
                        task_type="text-generation",
                        task_name="KV cache eviction",
                        dataset_type=workload,
                        dataset_name="; ".join(self.traces),
                        dataset_config="; ".join(self.traces),
                        metric_type=metric if kind == "full" else f"sink_free_{metric}",
                        metric_name=f"{metric}, {told}",
                        metric_value=round(one["mean"], 6),
                        metric_args={
                            "low": round(one["low"], 6),
                            "high": round(one["high"], 6),
                            "documents": self.results["documents"],
                        },
                    )
                )
        return found

    def table(self, kind: str) -> str:
        """Every agent's figures, the best first."""
        agents: Results = self.results["agents"]
        order = sorted(agents, key=lambda one: -agents[one][kind]["normalized_score"]["mean"])
        rows = []
        for one in order:
            cells = [_interval(agents[one][kind][metric]) for metric in COLUMNS]
            rows.append([f"**{one}**" if one == self.agent else one, *cells])
        return _table([KINDS[kind], *COLUMNS.values()], rows)

    def differences(self) -> str:
        """How far the agent is above the best heuristic, metric by metric."""
        rows = []
        for metric, title in RESULT_COLUMNS.items():
            cells = []
            for kind in KINDS:
                one = self.comparison[kind][metric]
                low, high = (f"{one[end]:+.3f}" for end in ("low", "high"))
                cells.append(f"{one['difference']:+.3f} ({low} to {high}) over {one['baseline']}")
            rows.append([title, *cells])
        return _table(["difference", *KINDS.values()], rows)

    def heads(self, kind: str) -> str:
        """On how many heads it is above the best heuristic of that head, and where not."""
        heads, better = (self.comparison[kind][part] for part in ("heads", "improvement"))
        text = (
            f"{KINDS[kind]}, {heads['wins']} of {heads['of']} heads; on a random document and "
            f"head, with probability {_interval(better)}."
        )
        behind = "; ".join(
            f"layer {layer} head {head} ({best}, by {abs(margin):.4f})"
            for layer, head, best, margin in heads["behind"]
        )
        return f"{text} Behind: {behind}." if behind else text


def origin(traces: Results) -> str:
    """A trace set's origin in a line; of paths the last part."""
    told = {**traces["arguments"], "seed": str(traces["seed"])}
    parts = ", ".join(f"{name} {plain(value)}" for name, value in told.items() if value)
    return f"{_workload(traces)} ({parts})"


def plain(value: Any) -> str:
    """A value as text, with nothing in it of the folders of the machine that it comes from."""
    if isinstance(value, list | tuple):
        return " ".join(map(plain, value))
    return Path(value).name or value if isinstance(value, str) else str(value)


def _workload(traces: Results) -> str:
    return Path(traces["workload"]).stem


def _lengths(traces: Iterable[Results]) -> str:
    found = {one["arguments"].get("prompt_tokens") for one in traces} - {None}
    return _listed(sorted(map(str, found), key=lambda text: (len(text), text)))


def _check(results: Results, agent: str, scorer: NetworkScorer) -> None:
    if results.get("format") != "kvenv-evaluation":
        raise KvenvError("results are no evaluation: give what `kvenv evaluate --json` wrote")
    if results["model"] != scorer.model.id:
        raise KvenvError(
            f"results are of {results['model']} and the agent is for {scorer.model.id}: give "
            "those of its own model"
        )
    if agent not in results["agents"]:
        raise KvenvError(
            f"results have no agent {agent!r}: name one of {', '.join(results['agents'])}"
        )
    for name, figures in results["agents"].items():
        for kind in KINDS:
            if missing := [metric for metric in COLUMNS if metric not in figures.get(kind, ())]:
                raise KvenvError(
                    f"results lack {', '.join(missing)} ({kind}) of {name}: evaluate again"
                )


def _interval(one: Results) -> str:
    return f"{one['mean']:.3f} ({one['low']:.3f} to {one['high']:.3f})"


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _listed(words: Iterable[str]) -> str:
    words = list(words)
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers with runs told by their ends: 0-3, 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
