"""From a trained stable-baselines3 model to the bundle that every cache and evaluation loads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm

from kvenv.errors import KvenvError
from kvenv.scorers.base import Head
from kvenv.scorers.bundle import NetworkScorer
from kvenv.trace import TraceSet
from kvenv.trace.batches import choose_heads


def export(
    model: BaseAlgorithm, traces: TraceSet | None = None, heads: Sequence[Head] | None = None
) -> NetworkScorer:
    """What a model learned, as a scorer: every head gets the policy's scoring network.

    Args:
        model: with a policy that has a method ``scorer_network``, as `TokenPolicy` (PPO, A2C) and
            `SlotPolicy` (MaskablePPO) do.
        traces: a trace set of the language model; None takes the environment's.
        heads: which heads; None takes those that the environment draws from.

    Raises:
        KvenvError: on a policy that has no scorer in it, naming what to train instead.
    """
    recorded: TraceSet = _ask(model, "traces") if traces is None else traces
    info = recorded.model
    chosen = choose_heads([recorded], _ask(model, "heads") if heads is None else heads)
    normalised = model.get_vec_normalize_env()
    if normalised is not None and normalised.norm_obs:
        raise KvenvError(
            "VecNormalize scales the observations by statistics that change: train without it and "
            "give the policy mean and std (kvenv.learning.sb3.standardise)"
        )
    own = getattr(model.policy, "scorer_network", None)
    if own is None:
        raise KvenvError(
            f"{type(model.policy).__name__} has no network that scores a token: train TokenPolicy "
            "on kvenv/Rank-v1 or kvenv/Stream-v1, or SlotPolicy on kvenv/Evict-v1"
        )
    network, architecture = own()
    if network.mean.shape[-1] != architecture.width(info.head_dim):
        raise KvenvError(
            f"the policy was not made for {info.id}, whose heads have "
            f"{info.head_dim} dimensions: give traces of the model it was trained on"
        )
    copies = architecture.build(chosen, info.head_dim)
    copies.load_state_dict(
        {
            name: tensor.detach().cpu().expand(len(chosen), *tensor.shape[1:])
            for name, tensor in network.state_dict().items()
        }
    )
    training = {
        "agent": type(model).__name__.lower(),
        "seed": model.seed,
        "steps": model.num_timesteps,
        "traces": [recorded.manifest.origin],
    }
    return NetworkScorer(copies, architecture, info, training)


def _ask(model: BaseAlgorithm, name: str) -> Any:
    """An attribute of the model's environment."""
    env = model.get_env()
    try:
        if env is None:
            raise AttributeError(name)
        return env.get_attr(name)[0]
    except AttributeError:
        raise KvenvError(
            f"the model has no environment that knows its {name}: call export with {name}=..."
        ) from None
