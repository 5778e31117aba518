"""An agent of your own that learns: ridge regression of each token's log utility, head by head.

python examples/linear_agent.py          # checks it, trains it, compares it, decodes with it

It is a plug-in too: `kvenv train examples/linear_agent.py --traces DIR --out linear --ridge 0.3`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from kvenv import models
from kvenv.cache import EvictionCache
from kvenv.cli import main
from kvenv.scorers import NetworkScorer, load_scorer
from kvenv.scorers.network import Architecture, PerHeadMLP
from kvenv.testing import check_agent
from kvenv.trace.batches import choose_heads, read_heads


@dataclass
class Linear:
    """Predict log utility from key and value: one ridge regression per head.

    Args:
        ridge: penalty on the weights, per token.
    """

    ridge: float = 0.1
    trains = True

    def fit(self, traces, heads=None, run=None):
        """Solve (X'X / N + ridge I) w = X'y / N for every head at once."""
        began, heads = time.monotonic(), choose_heads(traces, heads)
        episodes = [read_heads(t, i, heads) for t in traces for i in range(len(t))]
        x = torch.cat([torch.cat([e.framed(), e.values], -1) for e in episodes], 1)  # (H, N, 2d)
        y = torch.cat([e.utility for e in episodes], 1).clamp(min=1e-6).log().unsqueeze(-1)
        network = PerHeadMLP(heads, x.shape[-1], hidden=())
        network.mean, network.std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        x, bias = (x - network.mean) / network.std, y.mean(1, keepdim=True)
        gram = x.mT @ x / x.shape[1] + self.ridge * torch.eye(x.shape[-1])
        network.weights[0].data = torch.linalg.solve(gram, x.mT @ (y - bias) / x.shape[1])
        network.biases[0].data = bias
        training = {"agent": "linear", "seconds": time.monotonic() - began}
        return NetworkScorer(network, Architecture(hidden=()), traces[0].model, training)


if __name__ == "__main__":
    check_agent(Linear)
    # On the traces it learned from: record others for honest figures.
    main(["train", __file__, "--traces", "sample", "--out", "linear", "--overwrite"])
    main(["evaluate", "--traces", "sample", "--agents", "linear,knorm,random"])

    model, tokenizer = models.load("smollm2-135m")
    prompt = "The pass key is 71432. " + "The grass is green. " * 60 + "The pass key is"
    inputs = tokenizer(prompt, return_tensors="pt")
    # The sample holds two of the thirty layers; knorm ranks the heads of the others.
    fallback = load_scorer("knorm")
    cache = EvictionCache(model, load_scorer("linear"), budget=128, fallback=fallback)
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=8)
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]), cache, sep="\n")
