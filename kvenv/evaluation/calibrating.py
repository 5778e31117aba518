"""What attention a scorer's numbers stand for, measured on recorded prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from kvenv.evaluation.retention import score_prompt, shared_heads
from kvenv.scorers.base import Head, Scorer
from kvenv.scorers.calibration import Calibration, fit_calibration
from kvenv.trace import TraceSet


def calibrate(
    scorer: Scorer,
    sets: Sequence[TraceSet],
    heads: Sequence[Head] | None = None,
    tick: Callable[[], None] | None = None,
    device: str | torch.device = "cpu",
) -> Calibration:
    """Fit a table from score to expected attention for every head.

    Args:
        scorer: the scorer, learned or not.
        sets: recorded sets, all of one model, of documents that the scorer was not trained on.
        heads: restrict to these; None is all that are recorded and that the scorer covers.
        tick: called after every episode.
        device: where scores are computed.

    Raises:
        KvenvError: on sets of different models, a scorer of another model, or no heads.
    """
    chosen = shared_heads(sets, {"scorer": scorer}, heads)

    def episodes() -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        for traces in sets:
            for index in range(len(traces)):
                utility, scores = score_prompt(traces, index, {"it": scorer}, chosen, device)
                yield scores["it"], utility, traces.info(index).T
                if tick is not None:
                    tick()

    return fit_calibration(chosen, episodes())
