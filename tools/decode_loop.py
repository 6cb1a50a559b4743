"""A decoding loop of our own: one token for every row as one CUDA graph, the host only counting.

The library's loop chooses tokens, builds the mask and checks for the end on the host, between two
runs of the compiled step. Here all that is part of the graph, and the end is looked for every few
tokens. `benchmarks/decoding.py` tells what it is worth.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    StaticCache,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

LOOK_EVERY = 8  # tokens between two looks at whether all rows have ended


def warpers(config: GenerationConfig) -> list[LogitsProcessor]:
    """What shapes a draw, in the library's order; 50 likeliest tokens are its silent default.

    Example:
        >>> [type(w).__name__ for w in warpers(GenerationConfig(temperature=0.4, top_k=0))]
        ['TemperatureLogitsWarper']
    """
    found: list[LogitsProcessor] = []
    if config.temperature not in (None, 1.0):
        found.append(TemperatureLogitsWarper(config.temperature))
    if likeliest := 50 if config.top_k is None else config.top_k:
        found.append(TopKLogitsWarper(likeliest))
    if config.top_p is not None and config.top_p < 1:
        found.append(TopPLogitsWarper(config.top_p))
    return found


class DecodeLoop:
    """Decodes with a static cache and, on a GPU, with the whole step captured as one graph.

    Args:
        model: a causal language model in eval mode, without a wrapper around it. Whether its
            adapter is on when the first answer is written holds for all later ones.
        config: as `helpers.generation.sampling` gives it.
        rows: prompts decoded together.
        length: room for prompt and answer, in tokens.
        compiled: False leaves the forward as it is.

    Example:
        >>> from helpers.falcon import load_falcon
        >>> from helpers.profiles import TINY
        >>> config = GenerationConfig(max_new_tokens=3, eos_token_id=11, pad_token_id=9)
        >>> loop = DecodeLoop(load_falcon(TINY.model, TINY), config, rows=1, length=8)
        >>> prompt = torch.tensor([[20, 21, 22]])
        >>> loop.answer(prompt, torch.ones_like(prompt)).shape
        torch.Size([1, 3])
    """

    def __init__(
        self, model: PreTrainedModel, config: GenerationConfig, rows: int, length: int,
        compiled: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.config, self.graph = model, config, None
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.forward: Callable = torch.compile(model.__call__, dynamic=False) if compiled else model
        self.warpers = warpers(config) if config.do_sample else []
        whole = {"device": model.device, "dtype": torch.long}
        self.token, self.position = (torch.zeros(rows, 1, **whole) for _ in range(2))
        self.slot, self.written = torch.zeros(1, **whole), torch.zeros(rows, length, **whole)
        self.open = torch.zeros(rows, 1, 1, length, device=model.device, dtype=torch.bool)
        self.ended = torch.zeros(rows, 1, device=model.device, dtype=torch.bool)
        vocabulary = model.config.vocab_size
        self.seen = torch.zeros(rows, vocabulary, device=model.device, dtype=torch.bool)

    def choose(self, logits: Tensor) -> None:
        """Choose each row's next token from (rows, vocabulary) logits, without asking the host."""
        logits, penalty = logits.float(), self.config.repetition_penalty or 1.0
        if penalty != 1:
            fined = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(self.seen, fined, logits)
        for warper in self.warpers:
            logits = warper(None, logits)
        if self.warpers:  # as torch.multinomial draws one, but for its check on the host
            odds = logits.softmax(-1)
            logits = odds / torch.empty_like(odds).exponential_(1)
        token = logits.argmax(-1, keepdim=True)
        if self.config.eos_token_id is not None:
            token = token.masked_fill(self.ended, self.config.pad_token_id)
            self.ended |= token == self.config.eos_token_id
        self.token.copy_(token)
        self.seen.scatter_(1, token, True)
        self.written.index_copy_(1, self.slot, token)

    def step(self) -> None:
        """Read the last token, choose the next."""
        self.open.index_fill_(3, self.slot, True)
        out = self.forward(
            input_ids=self.token, attention_mask=self.open, position_ids=self.position,
            past_key_values=self.cache, use_cache=True, return_dict=True,
        )  # fmt: skip
        self.slot += 1
        self.position += 1
        self.choose(out.logits[:, -1])

    def start(self, ids: Tensor, mask: Tensor) -> None:
        """Read the prompts, (rows, length) and padded on the left, and choose the first token."""
        self.cache.reset()
        for state in (self.open, self.ended, self.seen):
            state.zero_()
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        out = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions,
            past_key_values=self.cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        self.open[:, 0, 0, : ids.shape[1]] = mask.bool()
        self.position.copy_(positions[:, -1:] + 1)
        self.slot.fill_(ids.shape[1])
        self.seen.scatter_(1, ids, True)
        self.choose(out.logits[:, -1])

    def capture(self, ids: Tensor, mask: Tensor) -> None:
        """Compile and warm up on a side stream, then record one step as a graph."""
        self.start(ids, mask)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        self.start(ids, mask)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()

    @torch.inference_mode()
    def answer(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Write up to `max_new_tokens` tokens to each prompt.

        Args:
            ids, mask: (rows, length), padded on the left.

        Returns:
            (rows, at most max_new_tokens) int64, padded after the end.

        Raises:
            ValueError: if prompt and answer do not fit.
        """
        begin, n_new = ids.shape[1], self.config.max_new_tokens
        if begin + n_new > self.written.shape[1] or len(ids) != len(self.token):
            raise ValueError(
                f"{len(ids)} prompts of {begin} tokens and {n_new} new ones do not fit a loop made "
                f"for {len(self.token)} rows of {self.written.shape[1]}: make another"
            )
        if ids.is_cuda and self.graph is None:
            self.capture(ids, mask)
        self.start(ids, mask)
        for n in range(1, n_new):
            if n % LOOK_EVERY == 0 and bool(self.ended.all()):
                break
            self.graph.replay() if self.graph else self.step()
        return self.written[:, begin : int(self.slot) + 1].clone()
