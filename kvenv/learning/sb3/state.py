"""All that a stable-baselines3 model has learned and gathered, as named tensors; no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm

REPLAY = "replay_buffer"


def state_tensors(model: BaseAlgorithm) -> dict[str, torch.Tensor]:
    """Weights, optimiser states, SAC's entropy coefficient and the replay buffer, as copies."""
    tensors: dict[str, torch.Tensor] = {}
    for part, state in model.get_parameters().items():
        if "param_groups" in state:  # an optimiser
            for index, moments in state["state"].items():
                for name, value in moments.items():
                    tensors[f"{part}/{index}/{name}"] = torch.as_tensor(value)
        else:
            tensors |= {f"{part}/{name}": tensor for name, tensor in state.items()}
    tensors |= {name: getattr(model, name).data for name in _variables(model)}
    buffer: Any = getattr(model, REPLAY, None)
    if buffer is not None:
        tensors[f"{REPLAY}/at"] = torch.tensor([buffer.pos, buffer.full])
        filled = buffer.size()
        for name, array in _arrays(buffer).items():
            tensors[f"{REPLAY}/{name}"] = torch.from_numpy(array[:filled])
    # Policies name some tensors twice, and safetensors stores none that share memory.
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def load_state(model: BaseAlgorithm, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put a model of the same making where `state_tensors` found another."""
    state: dict[str, Any] = model.get_parameters()
    for part, now in state.items():
        given = {
            name.removeprefix(f"{part}/"): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{part}/")
        }
        if "param_groups" in now:
            moments: dict[int, dict[str, torch.Tensor]] = {}
            for name, tensor in given.items():
                index, moment = name.split("/")
                moments.setdefault(int(index), {})[moment] = tensor
            state[part] = {**now, "state": moments}
        else:
            state[part] = given
    model.set_parameters(state)
    for name in _variables(model):
        getattr(model, name).data.copy_(tensors[name])
    buffer: Any = getattr(model, REPLAY, None)
    if buffer is not None:
        pos, full = tensors[f"{REPLAY}/at"].tolist()
        buffer.pos, buffer.full = pos, bool(full)
        for name, array in _arrays(buffer).items():
            saved = tensors[f"{REPLAY}/{name}"].numpy()
            array[: len(saved)] = saved


def _variables(model: BaseAlgorithm) -> list[str]:
    """Tensors that belong to no module and no optimiser: SAC's entropy coefficient."""
    return model._get_torch_save_params()[1]


def _arrays(buffer: Any) -> dict[str, np.ndarray]:
    return {name: value for name, value in vars(buffer).items() if isinstance(value, np.ndarray)}
