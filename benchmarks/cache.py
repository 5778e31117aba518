"""Tokens a second of decoding in a bounded cache, over transformers' own caches, and memory.

python benchmarks/cache.py [--model smollm2-135m] [--context 4096] [--budget 512] [--json FILE]

The prompt is random tokens; the seconds of every way include reading it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import compare, parser, write
from transformers import DynamicCache

from kvenv import models
from kvenv.cache import EvictionCache, generate
from kvenv.commands.common import pick_device
from kvenv.scorers import load_scorer


def main() -> None:
    """Time DynamicCache and EvictionCache on one model."""
    options = parser(__doc__ or "", repeats=3)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--agent", default="keydiff")
    options.add_argument("--device", default="auto")
    options.add_argument("--dtype", default="float32")
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--context", type=int, default=2048)
    options.add_argument("--budget", type=int, default=256)
    options.add_argument("--allocation", default="uniform")
    options.add_argument("--new-tokens", type=int, default=64)
    args = options.parse_args()
    device = str(pick_device(args.device))
    model, _ = models.load(args.model, device=device, dtype=args.dtype)
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (args.batch, args.context), generator=draw).to(device)
    scorer, length = load_scorer(args.agent), {"do_sample": False}
    length |= {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens}
    held: dict[str, int] = {}

    def full() -> None:
        cache = DynamicCache(config=model.config)
        mask = torch.ones_like(ids)
        model.generate(ids, attention_mask=mask, past_key_values=cache, **length)
        held["DynamicCache"] = sum(
            states.nbytes for layer in cache.layers for states in (layer.keys, layer.values)
        )

    def bounded(name: str, run: Callable[..., object]) -> Callable[[], None]:
        def way() -> None:
            cache = EvictionCache(model, scorer, budget=args.budget, allocation=args.allocation)
            run(cache)
            held[name] = cache.nbytes

        return way

    def plain(cache: EvictionCache) -> None:
        mask = torch.ones_like(ids)
        model.generate(ids, attention_mask=mask, past_key_values=cache, **length)

    def captured(cache: EvictionCache) -> None:
        generate(model, ids, cache, **length)

    ways = {"DynamicCache": full}
    for name, run in {"model.generate": plain, "kvenv.cache.generate": captured}.items():
        ways[name] = bounded(name, run)
    work = args.batch * args.new_tokens
    rows = compare(ways, work, "tokens", args.repeats, device)
    for name, row in rows.items():
        row["cache_bytes"] = held[name]
        print(f"{name:32} {held[name]:,} bytes of keys and values")
    write(args.json, args, rows)


if __name__ == "__main__":
    main()
