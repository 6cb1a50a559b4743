"""A decoding loop of our own: one token for every row as one CUDA graph, the host looking on.

The library's loop chooses tokens, builds the mask and checks for the end on the host, between two
runs of the compiled step. Here a step holds all but the check. New tokens come to the host eight at
a time, while the next eight are under way; what was written after an end is dropped. `generate`
calls the loop in place of its own, with its own processors, criteria and streamer:

    config = compile_decoding(model, sampling(tokenizer), own_loop=OwnLoop())

`benchmarks/decoding.py` tells what it is worth.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GENERATION_MODES_MAPPING

from helpers.falcon import MultiQueryAttention
from helpers.generation import compile_decoding, sampling

LOOK_EVERY = 8  # tokens between two looks at whether all rows have ended
KEPT = 6  # loops: each kind of batch, adapter on or off, has its own
WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
LEASTS = (MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor)
KNOWN = (RepetitionPenaltyLogitsProcessor, *LEASTS, *WARPERS)


class DecodeLoop:
    """Decodes with a static cache and, on a GPU, with the whole step captured as one graph.

    Args:
        model: a causal language model in eval mode, without a wrapper around it. Weights and
            switches stay as they are now: a graph knows nothing of a later change.
        processors: what shapes the logits, of the kinds in `KNOWN`.
        draws: False takes the likeliest token.
        rows: prompts decoded together.
        length: room for prompt and answer, in tokens.
        compiled: False leaves the forward as it is.

    Example:
        >>> from helpers.falcon import load_falcon
        >>> from helpers.profiles import TINY
        >>> loop = DecodeLoop(load_falcon(TINY.model, TINY), [], draws=False, rows=1, length=16)
        >>> prompt = torch.tensor([[20, 21, 22]])
        >>> with torch.no_grad():    # the first token alone, so that it can be shown at once
        ...     [len(block) for block in loop.blocks(prompt, torch.ones_like(prompt), 12)]
        [1, 8, 3]
    """

    def __init__(
        self, model: PreTrainedModel, processors: list[LogitsProcessor], draws: bool, rows: int,
        length: int, compiled: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.draws, self.graph = model, draws, None
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.forward: Callable = torch.compile(model.__call__, dynamic=False) if compiled else model
        self.warpers = [p for p in processors if isinstance(p, WARPERS)]
        fines = [p.penalty for p in processors if isinstance(p, KNOWN[0])]
        self.penalty = fines[0] if fines else 1.0
        self.held_open = any(isinstance(p, LEASTS) for p in processors)
        whole = {"device": model.device, "dtype": torch.long}
        self.token, self.position = (torch.zeros(rows, 1, **whole) for _ in range(2))
        self.slot, self.earliest = torch.zeros(1, **whole), torch.zeros(1, **whole)
        self.written = torch.zeros(length, rows, **whole)
        self.host = torch.zeros(length, rows, dtype=torch.long, pin_memory=self.token.is_cuda)
        yes_no = {"device": model.device, "dtype": torch.bool}
        self.open = torch.zeros(rows, 1, 1, length, **yes_no)
        self.seen = torch.zeros(rows, model.config.vocab_size, **yes_no)
        self.ends = torch.zeros(model.config.vocab_size, **yes_no)

    def choose(self, logits: Tensor) -> None:
        """Choose each row's next token from (rows, vocabulary) logits, without asking the host."""
        logits = logits.float()
        if self.penalty != 1:
            fined = torch.where(logits < 0, logits * self.penalty, logits / self.penalty)
            logits = torch.where(self.seen, fined, logits)
        if self.held_open:
            logits = logits.masked_fill(self.ends & (self.slot < self.earliest), -torch.inf)
        for warper in self.warpers:
            logits = warper(None, logits)
        if self.draws:  # as torch.multinomial draws one, but for its check on the host
            odds = logits.softmax(-1)
            logits = odds / torch.empty_like(odds).exponential_(1)
        token = logits.argmax(-1, keepdim=True)
        self.token.copy_(token)
        self.seen.scatter_(1, token, True)
        self.written.index_copy_(0, self.slot, token.t())

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
        self.open.zero_()
        self.seen.zero_()
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

    def prepare(self, ids: Tensor, mask: Tensor) -> None:
        """On a GPU: compile and warm up on a side stream, then record one step; only once.

        What these trials draw is taken back, so that a seed gives one answer, first or later.
        """
        if self.graph is not None or not ids.is_cuda:
            return
        with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
            self.start(ids, mask)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self.step()
            torch.cuda.current_stream().wait_stream(side)
            self.start(ids, mask)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.step()
        self.graph = graph

    def blocks(self, ids: Tensor, mask: Tensor, n_new: int) -> Iterator[Tensor]:
        """Write to each prompt, and hand over block after block while the next is under way.

        Args:
            ids, mask: (rows, length), padded on the left.
            n_new: tokens for each row; the reader may stop asking at any time.

        Yields:
            (1 or at most LOOK_EVERY, rows) int64 on the host.
        """
        self.start(ids, mask)
        begin, first, ready = ids.shape[1], 0, None
        while first < n_new:
            last = min(first + LOOK_EVERY, n_new) if first else 1
            for _ in range(first or 1, last):
                self.graph.replay() if self.graph else self.step()
            block, copied = self.host[begin + first : begin + last], None
            block.copy_(self.written[begin + first : begin + last], non_blocking=True)
            if block.is_pinned():
                copied = torch.cuda.Event()
                copied.record()
            if ready:
                yield _wait(*ready)
            first, ready = last, (block, copied)
        yield _wait(*ready)


def _wait(block: Tensor, copied: torch.cuda.Event | None) -> Tensor:
    """A block once its copy has arrived."""
    if copied is not None:
        copied.synchronize()
    return block.clone()


def fingerprint(model: nn.Module) -> int:
    """What a captured graph takes for granted: kinds of layers, switches, where weights lie.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> before = fingerprint(layer)
        >>> layer.weight = nn.Parameter(layer.weight * 2)
        >>> fingerprint(layer) == before
        False
    """
    switches = ("disable_adapters", "active_adapters", "merged_adapters")
    kinds = [(type(m), *(str(getattr(m, s, "")) for s in switches)) for m in model.modules()]
    places = [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
    return hash((*kinds, *places))


@dataclass(eq=False)
class OwnLoop:
    """What `compile_decoding` takes as `own_loop`: a loop for each kind of batch, made when asked.

    The library prepares everything and calls this in place of its own loop; tokens, ends, stop
    strings and pads come out as the library's. On a CPU drawn tokens do too, from one seed; behind
    an early end torch's generator has moved on by up to 16 tokens more. What cannot be done goes to
    the library's loop, with one warning.

    Args:
        room: tokens that prompt and answer have room for, at least; twice as many, and so on, where
            they need it. Each room is compiled anew.
    """

    room: int = 256
    loops: dict[tuple, DecodeLoop] = field(default_factory=dict)
    fault: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __deepcopy__(self, memo: dict) -> "OwnLoop":
        """`generate` copies its settings each time; a graph cannot be copied."""
        return self

    def to_dict(self) -> dict[str, int]:
        """What shows where settings are printed."""
        return {"room": self.room}

    @torch.inference_mode()
    def __call__(
        self, model: PreTrainedModel, input_ids: Tensor, logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList, generation_config: GenerationConfig,
        into: BaseStreamer | None = None, **others: Any,
    ) -> Tensor:  # fmt: skip
        """Take `generate`'s prepared arguments, and the streamer as `into`; give its tokens."""
        mask = others.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        with self.lock:  # a stopped answer may still be compiling when the next one begins
            fault = _fault(model, logits_processor, generation_config) or self.fault
            if not fault:
                need = stopping_criteria.max_length
                loop = self._loop(model, logits_processor, generation_config, len(mask), need)
                fault = self.fault = _tried(lambda: loop.prepare(input_ids, mask))
            if not fault:
                blocks = loop.blocks(input_ids, mask, need - input_ids.shape[1])
                tokens = (token for block in blocks for token in block)
                return _look(tokens, input_ids, stopping_criteria, generation_config, into)
        warnings.warn(f"{fault}: the library's loop answers, not our own", stacklevel=2)
        library = GENERATION_MODES_MAPPING[generation_config.get_generation_mode()]
        return getattr(type(model), library)(
            model, input_ids, logits_processor=logits_processor, streamer=into,
            stopping_criteria=stopping_criteria, generation_config=generation_config, **others,
        )  # fmt: skip

    def _loop(
        self, model: PreTrainedModel, processors: LogitsProcessorList, config: GenerationConfig,
        rows: int, need: int,
    ) -> DecodeLoop:  # fmt: skip
        """The loop for this batch, its ends and its room."""
        room = max(self.room, 1 << (need - 1).bit_length())
        settings = (str((type(p), vars(p))) for p in processors if not isinstance(p, LEASTS))
        least = [p for p in processors if isinstance(p, LEASTS)]
        key = (rows, room, config.do_sample, bool(least), fingerprint(model), *settings)
        if key not in self.loops:
            while len(self.loops) >= KEPT:
                self.loops.pop(next(iter(self.loops)))
            compiled = model.device.type == "cuda"
            self.loops[key] = DecodeLoop(
                model, list(processors), config.do_sample, rows, room, compiled
            )
        loop = self.loops[key]
        for rule in least:  # the library states `min_new_tokens` in both ways at once
            new = isinstance(rule, MinNewTokensLengthLogitsProcessor)
            fewest = rule.prompt_length_to_skip + rule.min_new_tokens if new else rule.min_length
            loop.earliest.fill_(fewest)
            loop.ends.zero_().index_fill_(0, rule.eos_token_id.to(loop.ends.device), True)
        return loop


def sampled(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, own_loop: bool | None
) -> GenerationConfig:
    """The article's sampling for a chat, with room for a talk; None: our own loop on a GPU."""
    own_loop = model.device.type == "cuda" if own_loop is None else own_loop
    config = sampling(tokenizer)
    return compile_decoding(model, config, OwnLoop(room=1024)) if own_loop else config


def _tried(work: Callable[[], None]) -> str:
    """Nothing, or what went wrong, in one line."""
    try:
        work()
    except Exception as error:  # whatever a compiler or a driver may say
        text = (str(error).strip() or "no text").splitlines()[0][:200]
        return f"no step could be captured ({type(error).__name__}: {text})"
    return ""


def _fault(model: nn.Module, processors: LogitsProcessorList, config: GenerationConfig) -> str:
    """Why this cannot be answered here, or nothing."""
    strange = [type(p).__name__ for p in processors if type(p) not in KNOWN]
    if strange or config.num_beams not in (None, 1) or config.return_dict_in_generate:
        return f"beams, scores or {', '.join(strange) or 'more than tokens'} are asked for"
    if not any(isinstance(m, MultiQueryAttention) for m in model.modules()):
        return "this model has no fused attention"
    return ""


def _look(
    tokens: Iterator[Tensor], input_ids: Tensor, criteria: StoppingCriteriaList,
    config: GenerationConfig, into: BaseStreamer | None,
) -> Tensor:  # fmt: skip
    """Token by token as the library does it: pad what has ended, show, ask the criteria."""
    ids, pad = input_ids.cpu(), config._pad_token_tensor
    ended = torch.zeros(len(ids), dtype=torch.bool)
    pads = any(hasattr(each, "eos_token_id") for each in criteria)
    for token in tokens:
        token = torch.where(ended, pad.cpu(), token) if pads else token
        ids = torch.cat([ids, token[:, None]], 1)
        if into is not None:
            into.put(token)
        ended |= criteria(ids, None)
        if ended.all():
            break
    if into is not None:
        into.end()
    return ids.to(input_ids.device)
