"""Answers: raw ones to measure, and screened ones to show."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import lru_cache, partial
from queue import Empty

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TextIteratorStreamer,
)

from helpers.prompts import HUMAN, SENTENCE, format_prompt, neutralise, post_process_chat
from helpers.safety import BLOCKED_REPLY, crisis_reply, screen_input, screen_output

MAX_CHARACTERS = 2000
PAD_TO = 64  # on a GPU: cuDNN plans attention anew for each length of a prompt
TOO_LONG = (
    f"Please keep a message under {MAX_CHARACTERS:,} characters, so that I can read all of it."
)
BUSY = "I am answering someone else right now. Please send your message again in a moment."
FAILED = "Something went wrong while I was writing. Please send your message again."


@dataclass(frozen=True)
class Generation:
    """One answer as the model wrote it: text without special tokens, its end, its length."""

    text: str
    finished: bool
    n_tokens: int


def sampling(
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int = 256,
    temperature: float = 0.4,
    top_p: float = 0.6,
    repetition_penalty: float = 1.3,
) -> GenerationConfig:
    """The article's sampling, with the one word that it lacked: `do_sample=True`.

    Without it temperature and top-p are ignored and decoding is greedy, as the article's was.

    Args:
        tokenizer: gives the end-of-text and pad ids.
        max_new_tokens: where an answer that does not stop by itself is cut.
        temperature: divides the logits; 0 decodes greedily.
        top_p: sample from the smallest set of tokens that holds this much probability.
        repetition_penalty: divides (or multiplies) the logits of tokens seen before.

    Returns:
        A `GenerationConfig`; batch and stream use the same one.

    Example:
        >>> from types import SimpleNamespace
        >>> sampling(SimpleNamespace(eos_token_id=11, pad_token_id=9)).do_sample
        True
    """
    draws = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p}
        if temperature
        else {"do_sample": False}
    )
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        repetition_penalty=repetition_penalty,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        **draws,
    )


def _encode(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], device: torch.device,
    config: GenerationConfig,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Pad on the left, where it belongs before decoding; typed special tokens stay text."""
    batch = tokenizer(
        prompts, return_tensors="pt", padding=True, padding_side="left", split_special_tokens=True,
        pad_to_multiple_of=PAD_TO if config.cache_implementation == "static" else None,
    )  # fmt: skip
    return {k: batch[k].to(device) for k in ("input_ids", "attention_mask")}


def _own(config: GenerationConfig, streamer: TextIteratorStreamer | None = None) -> dict:
    """`generate`'s argument for the loop that `compile_decoding` was given, if any.

    `generate` keeps its streamer from a loop that is not its own, so the loop is handed it here.
    """
    loop = getattr(config, "own_loop", None)
    return {"custom_generate": partial(loop, into=streamer)} if loop else {}


@torch.inference_mode()
def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    config: GenerationConfig,
    seed: int = 0,
    batch_size: int = 18,
    stop: str | None = None,
) -> list[Generation]:
    """Write an answer to each prompt, raw: no screen, no clean-up. For measuring alone.

    Args:
        model: in eval mode, with or without an adapter.
        tokenizer: of that model.
        prompts: (n,) str, as `format_prompt` writes them.
        config: as `sampling` gives it.
        seed: of the random draws, set before each batch.
        batch_size: prompts decoded together, padded on the left.
        stop: a text that ends an answer, such as `<HUMAN>:`; it stays in the text.

    Returns:
        (n,) `Generation`; `finished` is True if the model wrote the end-of-text token itself.
    """
    done: list[Generation] = []
    criteria = StoppingCriteriaList([_stop_at(tokenizer, stop)] if stop else [])
    for start in range(0, len(prompts), batch_size):
        inputs = _encode(tokenizer, list(prompts[start : start + batch_size]), model.device, config)
        torch.manual_seed(seed)
        out = model.generate(
            **inputs, generation_config=config, stopping_criteria=criteria, **_own(config)
        )
        for row in out[:, inputs["input_ids"].shape[1] :].tolist():
            finished = tokenizer.eos_token_id in row
            row = row[: row.index(tokenizer.eos_token_id)] if finished else row
            row = [i for i in row if i != tokenizer.pad_token_id]
            text = tokenizer.decode(row, skip_special_tokens=True)
            done.append(Generation(text, finished, len(row) + finished))
    return done


_stop_at = lru_cache(maxsize=4)(StopStringCriteria)  # each looks the whole vocabulary through


class _StopOn(StoppingCriteria):
    """Ends generation as soon as an event is set: a Stop button, a closed tab."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


@dataclass
class Chat:
    """A model that people may talk to: one answer at a time, screened on both sides.

    `patience` is how many seconds a person waits in line before they are told "busy". `line`
    holds who is being answered, and behind them who waits, first come, first served. One thread
    writes all answers: PyTorch keeps what cuDNN plans for a length for one thread alone.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: GenerationConfig
    patience: float = 60.0
    line: list[object] = field(default_factory=list)
    writer: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, 1))


def _generate_in_thread(
    chat: Chat, prompt: str, stop: threading.Event, outcome: dict
) -> tuple[TextIteratorStreamer, Future]:
    """Start generation in the chat's thread; returns the streamer, and what is done at its end."""
    streamer = TextIteratorStreamer(
        chat.tokenizer, skip_prompt=True, timeout=0.2, skip_special_tokens=True
    )
    criteria = StoppingCriteriaList([_StopOn(stop), _stop_at(chat.tokenizer, HUMAN)])

    def work() -> None:
        try:
            with torch.inference_mode():
                out = chat.model.generate(
                    **_encode(chat.tokenizer, [prompt], chat.model.device, chat.config),
                    generation_config=chat.config,
                    streamer=streamer,
                    stopping_criteria=criteria,
                    **_own(chat.config, streamer),
                )
            outcome["finished"] = out[0, -1].item() == chat.tokenizer.eos_token_id
        except Exception as error:  # whatever it is, the reader must not wait for ever
            outcome["error"] = error
            streamer.end()

    return streamer, chat.writer.submit(work)


def _pieces(streamer: TextIteratorStreamer) -> Iterator[str]:
    """New text as it comes; an empty piece every 0.2 s while nothing does."""
    while True:
        try:
            piece = streamer.text_queue.get(timeout=0.2)
        except Empty:
            yield ""
            continue
        if piece is streamer.stop_signal:
            return
        yield piece


def _whole(text: str) -> str:
    """The sentences of a growing text that are complete: more text follows them."""
    ends = [m.end() for m in SENTENCE.finditer(text) if m.end() < len(text)]
    return text[: ends[-1]] if ends else ""


def _stream_screened(chat: Chat, prompt: str) -> Iterator[str]:
    stop, outcome, text, shown = threading.Event(), {}, "", ""
    streamer, written = _generate_in_thread(chat, prompt, stop, outcome)
    try:
        for piece in _pieces(streamer):
            text += piece
            ready = post_process_chat(_whole(text), finished=True) if _whole(text) else ""
            if ready != shown and screen_output(ready).flag:
                yield BLOCKED_REPLY
                return
            shown = ready or shown
            yield shown
        if "error" in outcome:
            yield FAILED
            return
        wait([written])
        answer = post_process_chat(text, outcome.get("finished", False))
        yield BLOCKED_REPLY if screen_output(answer).flag else answer
    finally:  # also when the reader goes away: the GPU must be free for the next person
        stop.set()
        wait([written], timeout=5)


def stream_reply(
    chat: Chat, message: str, history: Sequence[tuple[str, str]] = (), turns: int = 2
) -> Iterator[str]:
    """Answer one message sentence by sentence; each yield is the whole answer so far.

    Nothing is generated for a message, or after one, that sounds like a person in danger: the
    fixed reply with helplines comes instead, until the history is cleared. Length, screen and
    line stand here, so that a direct call over HTTP meets them too. A sentence is shown
    only after it is screened; an unsafe one replaces the whole answer.

    Args:
        chat: model, tokenizer, sampling.
        message: what the person typed, at most 2,000 characters.
        history: all earlier turns as (message, answer), oldest first.
        turns: how many of them the model is shown.

    Yields:
        str: the answer so far; the last one is final.
    """
    if len(message) > MAX_CHARACTERS or not message.strip():
        yield TOO_LONG if message.strip() else ""
        return
    history = [(q[:MAX_CHARACTERS], a[:MAX_CHARACTERS]) for q, a in history]
    screen = screen_input(message, [q for q, _ in history])
    if screen.flag:
        yield crisis_reply(screen.kinds)
        return
    ticket, until = object(), time.monotonic() + chat.patience
    chat.line.append(ticket)
    try:
        while chat.line[0] is not ticket:
            if time.monotonic() > until:
                yield BUSY
                return
            yield ""  # a person who waits can be stopped, or go away, too
            time.sleep(0.05)
        kept = [(neutralise(q), neutralise(a)) for q, a in history[-turns:]] if turns else []
        yield from _stream_screened(chat, format_prompt(neutralise(message), kept))
    finally:
        chat.line.remove(ticket)


def reply(chat: Chat, message: str, history: Sequence[tuple[str, str]] = (), turns: int = 2) -> str:
    """The final answer of `stream_reply`, for scripts and tests.

    Args:
        chat, message, history, turns: as for `stream_reply`.

    Returns:
        The screened answer.
    """
    return list(stream_reply(chat, message, history, turns))[-1]


def compile_decoding(
    model: PreTrainedModel, config: GenerationConfig, own_loop: Callable | None = None
) -> GenerationConfig:
    """Let `generate` keep a static cache and compile one decoding step into a CUDA graph.

    The library does so by itself for unquantized models; for bitsandbytes its quantizer says
    that it cannot, although it can. On a CPU nothing is changed.

    Args:
        model: on a GPU, fused attention on.
        config: the sampling to copy.
        own_loop: writes the tokens in place of the library's loop wherever this configuration is
            used here, on a CPU too: `tools.decode_loop.OwnLoop()`. `generate` alone ignores it.

    Returns:
        A copy of `config` for `generate`; the first answers after it are slow while it compiles.

    Example:
        >>> compile_decoding(torch.nn.Linear(1, 1), GenerationConfig()).cache_implementation is None
        True
    """
    fast = GenerationConfig.from_dict(config.to_dict())
    fast.own_loop = own_loop
    if next(model.parameters()).device.type != "cuda":
        return fast
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        kind = type(quantizer)
        quantizer.__class__ = type(kind.__name__, (kind,), {"is_compileable": True})
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    fast.cache_implementation = "static"
    return fast
