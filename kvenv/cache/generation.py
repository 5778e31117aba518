"""`generate`: transformers' generation with the steps of an eviction cache as one CUDA graph."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from kvenv.cache.layer import EvictionLayer
from kvenv.errors import KvenvError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.generation.streamers import BaseStreamer

    from kvenv.cache.eviction import EvictionCache

WAYS = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)

EAGER_STEPS = 2
"""Steps that run before one is captured: kernels are compiled and libraries warmed up by then."""


def generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    cache: EvictionCache,
    *,
    attention_mask: torch.Tensor | None = None,
    check_every: int = 8,
    graph: bool = True,
    streamer: BaseStreamer | None = None,
    **options: Any,
) -> torch.Tensor:
    """Continue a text, as ``model.generate(..., past_key_values=cache)`` does, but faster.

    Logits processors, sampling, stopping criteria and streamers are transformers' own; of its ways
    to decode there are greedy search and sampling, one sequence a row. Once the prompt is read,
    the model's forward step is captured in a CUDA graph and replayed, where all layers evict, on
    one NVIDIA GPU, and the scorer asks for no queries; elsewhere it runs as it is. Selections run
    between two replays. The host waits for the device only once in ``check_every`` tokens.

    Args:
        model: a causal language model.
        input_ids: (B, S), padded on the left; with a cache that has read some of it, the whole
            text or, with a mask of the whole, the new tokens alone.
        cache: an `EvictionCache` for this model.
        attention_mask: (B, S) or None for all ones.
        check_every: tokens after which the host looks whether all rows have ended. The cache may
            have read up to as many, less one, pads more than the text returned: give 1 to go on
            with the cache afterwards.
        graph: False never captures.
        streamer: gets every token; the host then waits for each, and looks after each.
        **options: as for ``model.generate``: max_new_tokens, do_sample, ...

    Returns:
        (B, S + new tokens), rows that ended early filled up with pads.

    Raises:
        KvenvError: on beams, several sequences a row or other ways to decode, on options that go
            to the model itself or ask for more than tokens, or a check_every below 1.
    """
    if check_every < 1:
        raise KvenvError(f"check_every is {check_every}: give 1 or more tokens")
    if given := [name for name in options if name != "use_cache" and name in _takes(model)]:
        raise KvenvError(
            f"kvenv.cache.generate gives the model nothing but tokens and their mask, and got "
            f"{', '.join(given)}: use model.generate with the cache"
        )
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if streamer is not None:
        check_every = 1  # it is to hear nothing after the end
    steps = _Steps(cache, attention_mask, check_every, graph, streamer)
    return model.generate(  # pyright: ignore[reportCallIssue]
        input_ids,
        attention_mask=attention_mask,
        past_key_values=cache,
        custom_generate=steps,
        streamer=streamer,
        **options,
    )


class _Steps:
    """The decoding loop that transformers calls once everything is prepared."""

    def __init__(
        self,
        cache: EvictionCache,
        mask: torch.Tensor,
        check_every: int,
        graph: bool,
        streamer: BaseStreamer | None,
    ) -> None:
        self._mask = mask
        self._cache, self._check_every, self._graph = cache, check_every, graph
        self._streamer = streamer

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        if generation_config.num_beams != 1 or generation_config.num_return_sequences != 1:
            raise KvenvError(
                "kvenv.cache.generate decodes one sequence a row: use model.generate for beams "
                "and several sequences"
            )
        if (mode := generation_config.get_generation_mode()) not in WAYS:
            raise KvenvError(
                f"kvenv.cache.generate searches greedily or samples and is asked for {mode.value}: "
                "use model.generate"
            )
        if generation_config.return_dict_in_generate:
            raise KvenvError(
                "kvenv.cache.generate returns tokens alone, without scores or states: use "
                "model.generate for return_dict_in_generate"
            )
        mask = self._mask.to(input_ids.device)  # transformers drops one that masks nothing
        rows, length = input_ids.shape
        limit = int(generation_config.max_length or 0)
        pad = _pad(generation_config)
        # As in transformers: where no token ends a text, a row that ended otherwise goes on.
        ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        text = input_ids.new_full((rows, max(limit, length)), pad)
        text[:, :length] = input_ids
        wanted = torch.zeros(text.shape[1], dtype=torch.bool, device=text.device)
        wanted[:length] = True
        unfinished = torch.ones(rows, dtype=torch.bool, device=input_ids.device)
        chunk = generation_config.prefill_chunk_size
        logits = _read(model, self._cache, input_ids, mask, chunk)
        step = _Step(model, self._cache, mask, self._graph)
        done = length
        while done < limit:
            scores = logits_processor(text[:, :done], logits.float())
            token = _choose(scores, generation_config.do_sample)
            token = torch.where(unfinished, token, pad) if ends else token
            text[:, done], wanted[done] = token, unfinished.any()
            done += 1
            if self._streamer is not None:
                self._streamer.put(token.cpu())
            unfinished = unfinished & ~stopping_criteria(text[:, :done], scores)  # pyright: ignore[reportArgumentType]
            checked = (done - length) % self._check_every == 0
            if done == limit or (checked and not bool(unfinished.any())):
                break
            logits = step(token)
        if self._streamer is not None:
            self._streamer.end()
        return text[:, : int(wanted.sum())]  # the loop may have gone on for a few pads


class _Step:
    """One token in, logits out: run as it is at first, then captured, then replayed."""

    def __init__(
        self, model: PreTrainedModel, cache: EvictionCache, mask: torch.Tensor, graph: bool
    ) -> None:
        self._model, self._cache = model, cache
        rows = mask.shape[0]
        self._token = torch.zeros(rows, 1, dtype=torch.long, device=mask.device)
        self._position = mask.sum(-1, keepdim=True)  # of the next token
        alike = all(isinstance(layer, EvictionLayer) for layer in cache.layers)
        policy = cache.policy
        ready = all(pool.appends for pool in cache.pools)
        static = alike and ready and policy.interface and not policy.scorer.needs
        self._mask = None if static else mask
        where = {layer.device for layer in cache.layers if isinstance(layer, EvictionLayer)}
        parts = set((getattr(model, "hf_device_map", None) or {}).values())
        alone = where == {mask.device} and len(parts) < 2  # a graph is of one device
        self._capture = graph and static and alone and mask.device.type == "cuda"
        self._version = -1  # of the buffers that the graph knows
        self._ran = 0
        self._replay: torch.cuda.CUDAGraph | None = None
        self._logits = torch.empty(0)

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        self._token.copy_(token.unsqueeze(-1))
        if self._capture and self._ran >= EAGER_STEPS:
            for pool in self._cache.pools:
                pool.settle()
                pool.advance()
            version = sum(pool.version for pool in self._cache.pools)
            if self._replay is None or version != self._version:
                self._replay, self._version = None, version
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):  # records, and runs nothing
                    self._logits = self._run()
                self._replay = graph
            self._replay.replay()
            return self._logits
        self._ran += 1
        if not self._capture:
            return self._run()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            logits = self._run()
        torch.cuda.current_stream().wait_stream(stream)
        return logits

    def _run(self) -> torch.Tensor:
        if self._mask is not None:
            self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], -1)
        output = self._model(
            input_ids=self._token,
            attention_mask=self._mask,
            position_ids=self._position,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._position += 1
        return output.logits[:, -1]


def _read(
    model: PreTrainedModel,
    cache: EvictionCache,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    chunk: int | None,
) -> torch.Tensor:
    """Run the model over what the cache has not read; logits (B, vocabulary) of the last token."""
    seen = int(cache.get_seq_length())
    new = input_ids if input_ids.shape[1] < mask.shape[1] else input_ids[:, seen:]
    if mask.shape[1] - seen != new.shape[1] or not new.shape[1]:
        raise KvenvError(
            f"the cache has read {seen} tokens, the mask covers {mask.shape[1]} and "
            f"{input_ids.shape[1]} are given: give the whole text, or the new tokens with the "
            "mask of the whole"
        )
    policy = cache.policy
    policy.resolve(int(mask.sum(-1).max()))
    if policy.block and (policy.allocation == "adaptive" or policy.shared):
        chunk = min(chunk or policy.block, policy.block)  # all layers together, block by block
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = torch.empty(0)
    last = {"logits_to_keep": 1} if "logits_to_keep" in _takes(model) else {}
    for part in new.split(chunk or new.shape[1], 1):
        upto = seen + part.shape[1]
        logits = model(
            input_ids=part,
            attention_mask=mask[:, :upto],
            position_ids=positions[:, seen:upto],
            past_key_values=cache,
            use_cache=True,
            **last,
        ).logits[:, -1]
        seen = upto
    return logits


def _takes(model: PreTrainedModel) -> set[str]:
    """What the model's forward pass takes by name."""
    return set(inspect.signature(model.forward).parameters)


def _choose(scores: torch.Tensor, sample: bool | None) -> torch.Tensor:
    if sample:
        return torch.multinomial(scores.softmax(-1), 1).squeeze(-1)
    return scores.argmax(-1)


def _pad(config: GenerationConfig) -> int:
    pad = config.pad_token_id
    ends = config.eos_token_id
    if pad is None and ends is not None:
        pad = ends[0] if isinstance(ends, list) else ends
    return int(pad or 0)
