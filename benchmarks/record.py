"""What recording takes over a plain forward pass of the same tokens.

python benchmarks/record.py [--model smollm2-135m] [--prompt-tokens 768] [--json FILE]
"""

from __future__ import annotations

from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from harness import compare, parser, write

from kvenv import models, plugins
from kvenv.commands.common import pick_device
from kvenv.recording.recorder import record
from kvenv.trace import TraceSet


def main() -> None:
    """Time both on one model."""
    options = parser(__doc__ or "", repeats=3)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--device", default="auto")
    options.add_argument("--episodes", type=int, default=4)
    options.add_argument("--prompt-tokens", type=int, default=768)
    options.add_argument("--future-tokens", type=int, default=128)
    args = options.parse_args()
    device = str(pick_device(args.device))
    model, tokenizer = models.load(args.model, device=device)
    sizes = {"prompt_tokens": args.prompt_tokens, "future_tokens": args.future_tokens}
    workload, number = plugins.load("workload", "text")(), count()

    with TemporaryDirectory() as folder:

        def ours() -> TraceSet:
            out = Path(folder, str(next(number)))
            return record(model, tokenizer, workload, out, episodes=args.episodes, **sizes)

        traces, tokens = ours(), []
        for index in range(len(traces)):
            tokens.append(torch.from_numpy(traces.tokens(index)).long()[None].to(device))

        @torch.inference_mode()
        def forward() -> None:
            for ids in tokens:
                model(ids, logits_to_keep=1)

        work = sum(ids.shape[1] for ids in tokens)
        ways = {"forward pass": forward, "kvenv record": ours}
        rows = compare(ways, work, "tokens", args.repeats, device)
    write(args.json, args, rows)


if __name__ == "__main__":
    main()
