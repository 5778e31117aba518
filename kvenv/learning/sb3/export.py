"""From a trained stable-baselines3 model to the bundle that every cache and evaluation loads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from torch import nn

from kvenv.errors import KvenvError
from kvenv.learning.episodes import choose_heads
from kvenv.learning.sb3.tokens import Numbers
from kvenv.scorers.base import Head
from kvenv.scorers.bundle import NetworkScorer
from kvenv.scorers.network import Activation, Architecture, PerHeadMLP
from kvenv.trace import TraceSet

ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.GELU: "gelu",
    nn.ReLU: "relu",
    nn.Tanh: "tanh",
    nn.ELU: "elu",
    nn.SiLU: "silu",
}


class Standardise(BaseFeaturesExtractor):
    """Scales the observation of a plain MlpPolicy; what VecNormalize does, but exportable.

    ``policy_kwargs={"features_extractor_class": Standardise, "features_extractor_kwargs":
    {"mean": mean, "std": std}}``, with both from `kvenv.learning.sb3.standardise`.

    Args:
        observation_space: given by SB3, of shape (F,).
        mean, std: of its columns, (F,).
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, observation_space: gym.Space[Any], mean: Numbers, std: Numbers) -> None:
        super().__init__(observation_space, len(mean))
        for name, numbers in (("mean", mean), ("std", std)):
            values = torch.as_tensor(numbers, dtype=torch.float32).clone()
            if values.shape != observation_space.shape:
                raise KvenvError(
                    f"{name} has shape {tuple(values.shape)} and the observation "
                    f"{observation_space.shape}: give one number for each column"
                )
            self.register_buffer(name, values)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """Observations (B, F), scaled."""
        return (observations - self.mean) / self.std


def export(
    model: BaseAlgorithm,
    traces: TraceSet | None = None,
    heads: Sequence[Head] | None = None,
    budget: int | None = None,
) -> NetworkScorer:
    """What a model learned, as a scorer.

    A policy with a method ``scorer_network`` (those of `kvenv.learning.sb3`) gives its network. A
    plain MlpPolicy on kvenv/Stream-v0 is read layer by layer; where its action is squashed by
    tanh, the score is what goes into it, and where SB3 clips it to [-1, 1], the score is what it
    clips. Every head gets the same weights.

    Args:
        model: of PPO, A2C, SAC, MaskablePPO or one like them.
        traces: a trace set of the language model; None takes the environment's.
        heads: which heads; None takes those that the environment draws from.
        budget: that a plain MlpPolicy's fill column counts by, in tokens; None takes the
            environment's.

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
        network, architecture = _plain(model, info.head_dim, budget)
    else:
        network, architecture = own()
    if network.mean.shape[-1] != architecture.inputs(info.head_dim):
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


def _plain(
    model: BaseAlgorithm, head_dim: int, budget: int | None
) -> tuple[PerHeadMLP, Architecture]:
    """The network of a plain MlpPolicy on kvenv/Stream-v0."""
    seen, acted = model.observation_space.shape, model.action_space.shape
    if seen != (2 * head_dim + 2,) or acted != (1,):
        raise KvenvError(
            f"the policy sees an observation of shape {seen} and gives an action of shape {acted}, "
            "not one token and its score: train TokenPolicy or TokenSACPolicy on kvenv/Rank-v0, "
            "SlotPolicy on kvenv/Evict-v0, or MlpPolicy on kvenv/Stream-v0"
        )
    budget = _ask(model, "budget") if budget is None else budget
    if not isinstance(budget, int | np.integer):
        raise KvenvError(
            f"budget={budget!r} is not a number of tokens, and fill counts tokens: train with an "
            "int, or call export with budget=..."
        )
    # SB3's actor-critic algorithms of the one kind keep the actor apart, those of the other do not.
    policy: Any = model.policy
    actor = getattr(policy, "actor", None)
    if actor is not None:
        parts = [getattr(actor, "latent_pi", nn.Identity()), actor.mu]
        extractor = actor.features_extractor
    else:
        parts = [policy.mlp_extractor.policy_net, policy.action_net]
        extractor = policy.pi_features_extractor
    layers = [layer for part in parts for layer in _leaves(part)]
    if isinstance(layers[-1], nn.Tanh):  # TD3 and DDPG: tanh keeps the order
        layers.pop()
    linear = [layer for layer in layers[::2] if isinstance(layer, nn.Linear)]
    between: set[Activation] = {_activation(layer) for layer in layers[1::2]}
    if len(layers) != 2 * len(linear) - 1 or len(between) > 1:
        raise KvenvError(
            f"the policy is {', '.join(type(layer).__name__ for layer in layers)}, and a scorer is "
            "linear layers with one activation between them: train MlpPolicy without use_sde"
        )
    architecture = Architecture(
        features=("key", "value", "position", "fill"),
        hidden=tuple(layer.out_features for layer in linear[:-1]),
        activation=between.pop() if between else "gelu",
        budget=int(budget),
    )
    network = architecture.build([(0, 0)], head_dim)
    with torch.no_grad():
        for layer, weight, bias in zip(linear, network.weights, network.biases, strict=True):
            weight.copy_(layer.weight.T)
            bias.copy_(layer.bias)
    if isinstance(extractor, Standardise):
        network.mean.copy_(extractor.mean)
        network.std.copy_(extractor.std)
    elif not isinstance(extractor, FlattenExtractor):
        raise KvenvError(
            f"the features extractor {type(extractor).__name__} cannot be exported: use Standardise"
        )
    return network, architecture


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of nested Sequentials, in order."""
    if isinstance(module, nn.Sequential):
        for child in module:
            yield from _leaves(child)
    elif not isinstance(module, nn.Identity):
        yield module


def _activation(layer: nn.Module) -> Activation:
    usual = getattr(layer, "alpha", 1.0) == 1.0 and getattr(layer, "approximate", "none") == "none"
    if type(layer) not in ACTIVATIONS or not usual:
        names = ", ".join(kind.__name__ for kind in ACTIVATIONS)
        raise KvenvError(f"the activation {layer} cannot be exported: train with one of {names}")
    return ACTIVATIONS[type(layer)]
