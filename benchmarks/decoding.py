"""How fast Falcon-7B answers: `generate` as the original called it, and what mends add to it.

    python benchmarks/decoding.py --model falcon-7b-random

Batch 1, greedy, exactly `--tokens` new tokens, all ways in turns in one process: the original's;
the library's loop with the step compiled; that with double quantization undone, or with decoder
layers of two joined products; and a loop of our own around those. Then a first token after a prompt
of 300, where the time goes, 18 prompts in one batch against one by one, and drawn answers; and what
the pages would get from our own loop, through `generate_texts` and in the chat. Adapters of random
weights, rank 32 on all four linears. Each way that changes the weights has a model of its own; its
peak counts from before that model was loaded. What fails leaves its error. Writes
results/<gpu>/decoding.json after each part; --out names another file.

    python benchmarks/decoding.py --model falcon-7b-random --only-missing results/h100/decoding.json

measures what that file lacks, joins it to the rest, and says so under `later_run`; models are
loaded and ways compiled only as far as the parts need them.
"""

import argparse
import gc
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import GenerationConfig, TextIteratorStreamer

from helpers import generation
from helpers.falcon import LINEARS, load_falcon, load_tokenizer, use_fused_attention
from helpers.generation import Chat, compile_decoding, generate_texts, sampling
from helpers.joined import join_layers
from helpers.profiles import A100, GIB, TINY
from tools.decode_loop import OwnLoop
from tools.mends import undo_double_quantization
from tools.results import provenance, this_command, write_result


def clock(work: Callable[[], Any]) -> float:
    """Seconds that a piece of work takes, the GPU's part included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def estimate(values: list[float]) -> dict[str, float]:
    """Median and spread."""
    return {"value": statistics.median(values), "low": min(values), "high": max(values),
            "n": len(values)}  # fmt: skip


# A way's model, whether its adapter is on, and what writes its tokens.
WAYS = {
    "joined adapter": ("joined", True, "library"),
    "joined base": ("joined", False, "library"),
    "joined adapter, own loop": ("joined", True, "loop"),
    "seed": ("plain", True, "seed"),
    "adapter": ("plain", True, "library"),
    "seed base": ("plain", False, "seed"),
    "base": ("plain", False, "library"),
    "adapter, scales in 32 bits": ("undone", True, "library"),
}
JOINED, LOOP = "joined adapter", "joined adapter, own loop"
PROMPT = 40
FAMILIES = {  # of kernels, by what their names hold; the first that fits
    "4-bit products": ("4bit", "dequant", "Dequant"),
    "attention": ("fmha", "flash", "attention"),
    "16-bit products": ("gemm", "gemv", "nvjet", "cutlass", "splitK", "cublas", "aten::mm"),
    "compiled pieces": ("triton",),
    "copies": ("Memcpy", "Memset", "memcpy", "memset"),
}


class Bench:
    """Models with adapters, and the ways to answer with them."""

    def __init__(self, asked: argparse.Namespace) -> None:
        profile = A100 if torch.cuda.is_available() else TINY
        self.profile = replace(profile, model=asked.model or profile.model)
        self.tokenizer = load_tokenizer(self.profile.model)
        self.tokens, self.models, self.warm = asked.tokens, {}, {}
        self.own = OwnLoop(room=512)  # one room for all: each is compiled anew
        torch._dynamo.config.recompile_limit = 64  # three models share one function's code

    def load(self, kind: str) -> PeftModel:
        """One more model of the same weights and adapters."""
        base = load_falcon(self.profile.model, self.profile)
        torch.manual_seed(0)
        lora = LoraConfig(r=32, lora_alpha=32, target_modules=list(LINEARS), task_type="CAUSAL_LM",
                          init_lora_weights=False)  # fmt: skip
        model = get_peft_model(base, lora).eval()
        use_fused_attention(model)
        if kind == "joined":
            assert join_layers(model) == base.config.num_hidden_layers
        if kind == "undone":
            assert undo_double_quantization(model) == 4 * base.config.num_hidden_layers
        return model

    def prompt(self, rows: int, length: int) -> dict[str, torch.Tensor]:
        """Random ids: speed does not depend on what they say."""
        ids = torch.randint(20, 4000, (rows, length)).to(self.profile.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def words(self, length: int) -> str:
        """A text of so many tokens."""
        return self.tokenizer.decode(self.tokenizer(" day" * length).input_ids[:length])

    def settings(self, tokens: int, drawn: bool) -> GenerationConfig:
        """Exactly so many tokens: greedy without a penalty, or drawn with the article's numbers."""
        shape = () if drawn else (0, 1.0, 1.0)
        config = sampling(self.tokenizer, tokens or self.tokens, *shape)
        config.min_new_tokens = config.max_new_tokens
        return config

    @torch.inference_mode()
    def answer(
        self, way: str, rows: int = 1, length: int = PROMPT, tokens: int = 0, drawn: bool = False
    ) -> torch.Tensor:
        """Write exactly `tokens` tokens in one way; gives them, (rows, tokens)."""
        kind, adapter, _ = WAYS[way]
        model, config = self.models[kind], self.way(way, self.settings(tokens, drawn))
        inputs = self.prompt(rows, length)
        with nullcontext() if adapter else model.disable_adapter():
            return model.generate(
                **inputs, generation_config=config, **generation._own(config)
            )[:, length:]  # fmt: skip

    def way(self, way: str, config: GenerationConfig) -> GenerationConfig:
        """The settings that make `generate` answer in this way."""
        kind, _, writer = WAYS[way]
        use_fused_attention(self.models[kind], writer != "seed")
        base = self.models[kind].get_base_model()
        loop = self.own if writer == "loop" else None
        return config if writer == "seed" else compile_decoding(base, config, loop)

    def ready(self, way: str) -> None:
        """Load the way's model and let it answer once, unless both are done."""
        kind = WAYS[way][0]
        if kind not in self.models:
            self.models[kind] = self.load(kind)
        if way not in self.warm:
            self.warm[way] = clock(lambda: self.answer(way))


def warm_up(bench: Bench, kind: str) -> dict[str, Any]:
    """Load one model, let each of its ways answer once, and say what that took."""
    gc.collect()
    began = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    found: dict[str, Any] = {"load_s": clock(lambda: bench.models.update({kind: bench.load(kind)}))}
    found["warmup_s"] = {}
    for way in [name for name, (of, _, _) in WAYS.items() if of == kind]:
        error = attempt(lambda w=way: bench.ready(w))
        found["warmup_s"][way] = bench.warm.get(way, error)
    if torch.cuda.is_available():
        found["peak_gib"] = (torch.cuda.max_memory_allocated() - began) / GIB
    return found


def attempt(part: Callable[[], Any]) -> Any:
    """What a part finds, or its error in one line."""
    try:
        return part()
    except Exception as error:  # one part's fault must not cost the others
        text = str(error).strip() or "no text"
        return {"error": f"{type(error).__name__}: {text.splitlines()[0][:300]}"}


def in_turns(bench: Bench, ways: list[str], rounds: int, drawn: bool = False) -> dict[str, Any]:
    """Tokens a second of several ways in turns, and each over the first as `ratios`."""
    paces: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            seconds = clock(lambda w=way: bench.answer(w, drawn=drawn))
            paces[way].append(bench.tokens / seconds)
    found: dict[str, Any] = {way: estimate(pace) for way, pace in paces.items()}
    first = found[ways[0]]
    found["ratios"] = {
        way: {
            "value": found[way]["value"] / first["value"],
            "low": found[way]["low"] / first["high"],
            "high": found[way]["high"] / first["low"],
            "n": rounds,
        }
        for way in ways[1:]
    }
    return found


def first_token(bench: Bench, way: str) -> dict[str, float]:
    """Milliseconds to one token after a prompt of 300, adapter on."""
    bench.answer(way, length=300, tokens=1)
    times = [clock(lambda: bench.answer(way, length=300, tokens=1)) for _ in range(7)]
    return estimate([1000 * seconds for seconds in times])


def unlike_prompts(bench: Bench, way: str) -> dict[str, Any]:
    """Milliseconds to one token after prompts of lengths that were never seen, and seen again.

    Once as `generate_texts` pads them, to multiples of 64, and once as they are: cuDNN plans
    attention anew for each length.
    """
    model, config = bench.models[WAYS[way][0]], bench.way(way, bench.settings(1, False))
    found: dict[str, Any] = {}
    for name, multiple, first in (("padded", generation.PAD_TO, 301), ("as they are", None, 331)):
        with patch.object(generation, "PAD_TO", multiple):
            generate_texts(model, bench.tokenizer, [bench.words(first - 1)], config)
            for seen in ("never seen", "seen again"):
                prompts = [bench.words(n) for n in range(first, first + 7)]
                times = [
                    clock(lambda p=p: generate_texts(model, bench.tokenizer, [p], config))
                    for p in prompts
                ]
                found[f"{seen}, {name}"] = estimate([1000 * seconds for seconds in times])
    return found


def where_time_goes(bench: Bench, way: str) -> dict[str, Any]:
    """The kernels of one answer, prompt included, and how long the GPU waits for the host."""
    seconds = clock(lambda: bench.answer(way))
    gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as seen:
        clock(lambda: bench.answer(way))
    spent = "self_device_time_total" if gpu else "self_cpu_time_total"
    events = sorted(seen.key_averages(), key=lambda e: -getattr(e, spent))
    busy = sum(getattr(event, spent) for event in events) / 1e6
    kernels = [
        {"name": event.key[:90], "share_of_busy": getattr(event, spent) / 1e6 / busy,
         "calls_a_token": event.count / bench.tokens}
        for event in events[:10]
    ]  # fmt: skip
    shares = dict.fromkeys([*FAMILIES, "others"], 0.0)
    for event in events:
        fits = (f for f, marks in FAMILIES.items() if any(mark in event.key for mark in marks))
        shares[next(fits, "others")] += getattr(event, spent) / 1e6 / busy
    return {
        "ms_a_token": 1000 * seconds / bench.tokens,
        "busy_ms_a_token": 1000 * busy / bench.tokens,
        "idle_share": 1 - busy / seconds,
        "kernels_a_token": sum(event.count for event in events) / bench.tokens,
        "shares_of_busy": shares,
        "kernels": kernels,
    }


def together(bench: Bench, way: str, tokens: int) -> dict[str, Any]:
    """18 prompts in one compiled batch against the original's way, one by one."""
    warmup = clock(lambda: bench.answer(way, rows=18, tokens=tokens))
    batch = [clock(lambda: bench.answer(way, rows=18, tokens=tokens)) for _ in range(3)]
    alone = [clock(lambda: bench.answer("seed", tokens=tokens)) for _ in range(3)]
    return {"batch_s": estimate(batch), "one_s": estimate(alone), "warmup_s": warmup,
            "ratio": 18 * statistics.median(alone) / statistics.median(batch)}  # fmt: skip


def alike(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many tokens two answers begin with together."""
    n = min(len(one), len(other))
    return int((one[:n] == other[:n]).long().cumprod(0).sum())


def agreement(bench: Bench) -> dict[str, Any]:
    """How many tokens three ways to answer one prompt write alike before they first differ."""
    answers = []
    for way in ("adapter", JOINED, LOOP):
        torch.manual_seed(5)
        answers.append(bench.answer(way)[0])
    apart, joined, ours = answers
    return {
        "joined as apart": alike(apart, joined),
        "joined, own loop as apart": alike(apart, ours),
        "own loop as the library's": alike(joined, ours),
        "of": bench.tokens,
    }


def wired(bench: Bench, ways: list[str], rows: int, rounds: int) -> dict[str, Any]:
    """`generate_texts`, as page 04 calls it, on prompts of unlike lengths: texts and pace.

    Texts should be equal where two ways compute the same bits; the first that differ are counted.
    """
    prompts = [bench.words(PROMPT - n) for n in range(rows)]
    tokens = bench.tokens if rows == 1 else bench.tokens // 4  # as the part `18_prompts`
    texts, paces = {}, {way: [] for way in ways}
    for turn in range(rounds + 1):  # the first warms up
        for way in ways if turn else [way for way in ways if way != "seed"]:
            model, config = (
                bench.models[WAYS[way][0]],
                bench.way(way, bench.settings(tokens, False)),
            )
            said: list = []
            seconds = clock(
                lambda m=model, c=config, s=said: s.extend(
                    generate_texts(m, bench.tokenizer, prompts, c)
                )
            )
            texts[way] = [answer.text for answer in said]
            if turn:
                paces[way].append(rows * tokens / seconds)
    ours, library = texts[LOOP], texts[JOINED]
    same = [next((k for k, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), len(one))
            for one, two in zip(ours, library, strict=True)]  # fmt: skip
    found: dict[str, Any] = {way: estimate(pace) for way, pace in paces.items()}
    found |= {
        "texts": rows,
        "texts_equal": sum(a == b for a, b in zip(ours, library, strict=True)),
        "characters_alike": same,
        "of_characters": [len(text) for text in library],
        "ratio_to_library": found[LOOP]["value"] / found[JOINED]["value"],
    }
    if "seed" in ways:
        found["ratio_to_seed"] = found[LOOP]["value"] / found["seed"]["value"]
    return found


class Clocked(TextIteratorStreamer):
    """The chat's streamer, which also notes when tokens come; the prompt is the first of them."""

    def put(self, value: torch.Tensor) -> None:
        """Note the time, go on."""
        self.came = [*getattr(self, "came", []), time.perf_counter()]
        super().put(value)


def chat(bench: Bench) -> dict[str, Any]:
    """The chat's stream in our own loop: first token, Stop, and whether it says what a batch says.

    The prompt has 300 tokens; times count from the call, the wait for the thread included. Stop is
    pressed after 20 tokens; until the answer has ended, nobody else is answered.
    """
    model, tokenizer = bench.models["joined"], bench.tokenizer
    config = bench.way(LOOP, bench.settings(0, True))
    talk, prompt = Chat(model, tokenizer, config), bench.words(300)

    def stream(seed: int, after: int) -> tuple[list[float], float, str]:
        """Milliseconds to each token, seconds from Stop to the end, and the text."""
        torch.manual_seed(seed)
        stop, outcome, began = threading.Event(), {}, time.perf_counter()
        streamer, written = generation._generate_in_thread(talk, prompt, stop, outcome)
        while after and not written.done() and len(getattr(streamer, "came", [])) <= after:
            time.sleep(0.001)
        pressed = time.perf_counter()
        if after:
            stop.set()
        wait([written])
        ended = time.perf_counter() - pressed
        if "error" in outcome:
            raise outcome["error"]
        return [1000 * (t - began) for t in streamer.came[1:]], ended, "".join(streamer)

    with patch.object(generation, "TextIteratorStreamer", Clocked):
        warmup = clock(lambda: stream(0, 0))
        first = [stream(seed, 0) for seed in range(1, 8)]
        stopped = [stream(seed, 20) for seed in range(5)]
    batch = generate_texts(model, tokenizer, [prompt], config, seed=1, stop=generation.HUMAN)
    return {
        "warmup_s": warmup,
        "prompt_tokens": len(tokenizer(prompt).input_ids),
        "first_token_ms": estimate([times[0] for times, _, _ in first]),
        "tokens_per_s_behind_it": estimate(
            [1000 * (len(t) - 1) / (t[-1] - t[0]) for t, _, _ in first if len(t) > 1]
        ),
        "stop_seconds": estimate([ended for _, ended, _ in stopped]),
        "tokens_when_stopped": [len(times) for times, _, _ in stopped],
        "streamed_as_batch": first[0][2] == batch[0].text,
    }


def drawn(bench: Bench, library: str, ours: str, rounds: int) -> dict[str, Any]:
    """The article's temperature, top-p and penalty: the library's loop, and ours over it."""
    for way in (library, ours):
        bench.answer(way, drawn=True)
    return in_turns(bench, [library, ours], rounds, drawn=True)


def parts(bench: Bench, asked: argparse.Namespace) -> dict[str, tuple[list[str], Callable]]:
    """Each part behind the paces: the ways that it needs, and its work; what settles most first."""
    few = min(3, asked.rounds)
    return {
        "wired": (
            [JOINED, LOOP, "seed"],
            lambda: wired(bench, ["seed", JOINED, LOOP], 1, asked.rounds),
        ),
        "chat": ([LOOP], lambda: chat(bench)),
        "first_token_ms": ([JOINED], lambda: first_token(bench, JOINED)),
        "first_token_ms, own loop": ([LOOP], lambda: first_token(bench, LOOP)),
        "first token, unlike prompts": ([LOOP], lambda: unlike_prompts(bench, LOOP)),
        "drawn": ([JOINED, LOOP], lambda: drawn(bench, JOINED, LOOP, asked.rounds)),
        "where the time goes": ([JOINED], lambda: where_time_goes(bench, JOINED)),
        "where the time goes, own loop": ([LOOP], lambda: where_time_goes(bench, LOOP)),
        "18_prompts": ([JOINED, "seed"], lambda: together(bench, JOINED, asked.tokens // 4)),
        "tokens alike": (["adapter", JOINED, LOOP], lambda: agreement(bench)),
        "where the time goes, four products": (
            ["adapter"],
            lambda: where_time_goes(bench, "adapter"),
        ),
        "wired, 18 prompts": ([JOINED, LOOP], lambda: wired(bench, [JOINED, LOOP], 18, few)),
    }


def main() -> None:
    """Measure part by part and write each time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of a Falcon-7B")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=480, help="begin no part after these")
    parser.add_argument("--only-missing", type=Path, metavar="FILE", help="fill the gaps of a file")
    parser.add_argument("--out", type=Path, help="instead of results/<gpu>/decoding.json or FILE")
    asked = parser.parse_args()
    began, bench, figures = time.perf_counter(), Bench(asked), {}
    old = json.loads(asked.only_missing.read_text()) if asked.only_missing else None

    def run(ways: tuple[str, ...], part: Callable[[], Any]) -> Any:
        for way in ways:
            bench.ready(way)
        return part()

    def keep(name: str, part: Callable[[], Any], ways: tuple[str, ...] = ()) -> None:
        late = time.perf_counter() - began > asked.seconds
        found = {"error": "not measured: out of time"} if late else attempt(lambda: run(ways, part))
        figures[name] = found
        print(f"{time.perf_counter() - began:5.0f} s  {name}: {json.dumps(found)}", flush=True)
        write(figures, asked.out, old, asked.only_missing, bench.warm)

    if old is None:
        all_ways(bench, asked, keep, figures)
    for name, (ways, part) in parts(bench, asked).items():
        if old is None or not measured(old, name):
            keep(name, part, tuple(ways))


def measured(figures: dict[str, Any], name: str) -> bool:
    """Whether a part has been measured without an error.

    Example:
        >>> measured({"drawn": {"error": "x"}}, "drawn"), measured({"drawn": {"n": 1}}, "drawn")
        (False, True)
    """
    return name in figures and "error" not in figures[name]


def all_ways(
    bench: Bench, asked: argparse.Namespace, keep: Callable, figures: dict[str, Any]
) -> None:
    """Load all models, warm up all ways, and time them in turns."""
    kinds = ("joined", "plain", "undone")
    for kind in kinds:
        keep(kind, lambda k=kind: warm_up(bench, k))
    warm = {way: s for kind in kinds for way, s in figures[kind].get("warmup_s", {}).items()}
    ways = ["seed"] + [way for way in WAYS if way != "seed" and isinstance(warm.get(way), float)]
    keep("in turns", lambda: in_turns(bench, ways, asked.rounds))
    figures["warmup_s"] = warm
    figures |= figures.pop("in turns")
    figures["ratio"] = figures.get("ratios", {}).get(JOINED)
    figures["peak_gib"] = figures["joined"].get("peak_gib")


def write(
    figures: dict[str, Any], out: Path | None, old: dict[str, Any] | None, filled: Path | None,
    warm: dict[str, float],
) -> None:  # fmt: skip
    """Write what is known by now, joined to an older file if its gaps are being filled."""
    head, command = "decoding: the original's generate and what mends add", this_command()
    if old is not None:
        head = {k: v for k, v in provenance(head, command).items() if k != "figure"}
        text = join(old, figures, head | {"warmup_s": warm})
        (out or filled).write_text(json.dumps(text, indent=2) + "\n")
        return
    write_result("decoding", figures, head, command, out=out)


def join(old: dict[str, Any], found: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """An older file with its gaps filled: what was measured before stays as it was.

    What still failed is left out, and its error stands under `later_run`.

    Example:
        >>> join({"not_measured": ["b", "c"]}, {"b": {"n": 2}, "c": {"error": "x"}}, {})
        {'b': {'n': 2}, 'later_run': {'parts': ['b'], 'errors': {'c': 'x'}}, 'not_measured': ['c']}
    """
    good = {name: part for name, part in found.items() if measured(found, name)}
    errors = {name: part["error"] for name, part in found.items() if name not in good}
    lacking = [name for name in old.get("not_measured", []) if name not in good]
    kept = {name: part for name, part in old.items() if name not in ("not_measured", "later_run")}
    before = {"before": old["later_run"]} if "later_run" in old else {}
    later = later | {"parts": list(good), "errors": errors} | before
    return kept | good | {"later_run": later} | ({"not_measured": lacking} if lacking else {})


if __name__ == "__main__":
    main()
