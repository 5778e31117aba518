"""Use 3: run `model.generate` in a bounded cache."""

from __future__ import annotations

import argparse

from kvenv import models
from kvenv.cache import EvictionCache
from kvenv.scorers import load_scorer


def main() -> None:
    """Answer a question about a long text with a small cache."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--agent", default="keydiff", help="a heuristic or a bundle's folder")
    parser.add_argument("--budget", type=int, default=128, help="tokens each head may keep")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    args = parser.parse_args()

    model, tokenizer = models.load(args.model)
    text = "The sky is blue and the grass is green. " * 40 + "\nWhat colour is the grass?"
    chat = [{"role": "user", "content": text}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )

    cache = EvictionCache(model, load_scorer(args.agent), budget=args.budget)
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=args.max_new_tokens)

    prompt = inputs["input_ids"].shape[1]
    print(tokenizer.decode(output[0, prompt:], skip_special_tokens=True))
    print(f"\n{prompt} prompt tokens; {cache}")


if __name__ == "__main__":
    main()
