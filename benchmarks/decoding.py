"""How fast Falcon-7B answers: `generate` as the original called it, and what mends add to it.

    python benchmarks/decoding.py --model falcon-7b-random

Batch 1, greedy, exactly `--tokens` new tokens, all ways in turns in one process: the original's;
the library's loop with the step compiled; that with double quantization undone, or with decoder
layers of two joined products; and a loop of our own around those. Then a first token after a prompt
of 300, where the time goes, 18 prompts in one batch against one by one, and drawn answers. Adapters
of random weights, rank 32 on all four linears. Each way that changes the weights has a model of its
own; its peak counts from before that model was loaded. What fails leaves its error. Writes
results/<gpu>/decoding.json after each part; --out names another file.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import GenerationConfig

from helpers.falcon import LINEARS, load_falcon, load_tokenizer, use_fused_attention
from helpers.generation import compile_decoding, sampling
from helpers.joined import join_layers
from helpers.profiles import A100, GIB, TINY
from tools.decode_loop import DecodeLoop
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
        self.tokens, self.models, self.loops = asked.tokens, {}, {}
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
        kind, adapter, writer = WAYS[way]
        model, config = self.models[kind], self.settings(tokens, drawn)
        use_fused_attention(model, writer != "seed")
        if writer == "library":
            config = compile_decoding(model.get_base_model(), config)
        inputs = self.prompt(rows, length)
        with nullcontext() if adapter else model.disable_adapter():
            if writer == "loop":
                return self.loop(way, drawn).answer(*inputs.values())
            return model.generate(**inputs, generation_config=config)[:, length:]

    def loop(self, way: str, drawn: bool) -> DecodeLoop:
        """Our loop, made once; it looks for an end that no token is."""
        if (way, drawn) not in self.loops:
            config = self.settings(0, drawn)
            config.eos_token_id = -1
            model = self.models[WAYS[way][0]].get_base_model()
            self.loops[way, drawn] = DecodeLoop(
                model,
                config,
                rows=1,
                length=PROMPT + self.tokens,
                compiled=model.device.type != "cpu",
            )
        return self.loops[way, drawn]


def warm_up(bench: Bench, kind: str) -> dict[str, Any]:
    """Load one model, let each of its ways answer once, and say what that took."""
    gc.collect()
    began = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    found: dict[str, Any] = {"load_s": clock(lambda: bench.models.update({kind: bench.load(kind)}))}
    found["warmup_s"] = {}
    for way in [name for name, (of, _, _) in WAYS.items() if of == kind]:
        found["warmup_s"][way] = attempt(lambda w=way: clock(lambda: bench.answer(w)))
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


def agreement(bench: Bench) -> dict[str, Any]:
    """How many tokens three ways to answer one prompt write alike before they first differ."""
    texts = []
    for way in ("adapter", "joined adapter", "joined adapter, own loop"):
        torch.manual_seed(5)
        texts.append(bench.answer(way)[0])
    same = [(text == texts[0][: len(text)]).long().cumprod(0).sum().item() for text in texts[1:]]
    return {"joined as apart": same[0], "joined, own loop as apart": same[1], "of": bench.tokens}


def drawn(bench: Bench, library: str, ours: str, rounds: int) -> dict[str, Any]:
    """The article's temperature, top-p and penalty: the library's loop, and ours over it."""
    for way in (library, ours):
        bench.answer(way, drawn=True)
    return in_turns(bench, [library, ours], rounds, drawn=True)


def main() -> None:
    """Measure part by part and write each time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of a Falcon-7B")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=480, help="begin no part after these")
    parser.add_argument("--out", type=Path, help="instead of results/<gpu>/decoding.json")
    asked = parser.parse_args()
    began, bench, figures = time.perf_counter(), Bench(asked), {}

    def keep(name: str, part: Callable[[], Any]) -> None:
        late = time.perf_counter() - began > asked.seconds
        found = {"error": "not measured: out of time"} if late else attempt(part)
        figures[name] = found
        print(f"{time.perf_counter() - began:5.0f} s  {name}: {json.dumps(found)}", flush=True)
        write(figures, asked.out)

    joined, loop = "joined adapter", "joined adapter, own loop"
    keep("joined", lambda: warm_up(bench, "joined"))
    keep("plain", lambda: warm_up(bench, "plain"))
    keep("undone", lambda: warm_up(bench, "undone"))
    warm = {way: s for kind in ("joined", "plain", "undone")
            for way, s in figures[kind].get("warmup_s", {}).items()}  # fmt: skip
    ways = ["seed"] + [way for way in WAYS if way != "seed" and isinstance(warm.get(way), float)]
    keep("in turns", lambda: in_turns(bench, ways, asked.rounds))
    figures["warmup_s"] = warm
    figures |= figures.pop("in turns")
    figures["ratio"] = figures.get("ratios", {}).get(joined)
    figures["peak_gib"] = figures["joined"].get("peak_gib")
    keep("first_token_ms", lambda: first_token(bench, joined))
    keep("where the time goes", lambda: where_time_goes(bench, joined))
    keep("where the time goes, own loop", lambda: where_time_goes(bench, loop))
    keep("where the time goes, four products", lambda: where_time_goes(bench, "adapter"))
    keep("tokens alike", lambda: agreement(bench))
    keep("18_prompts", lambda: together(bench, joined, asked.tokens // 4))
    keep("drawn", lambda: drawn(bench, joined, loop, asked.rounds))


def write(figures: dict[str, Any], out: Path | None) -> None:
    """Write what is known by now."""
    head, command = "decoding: the original's generate and what mends add", this_command()
    if out is None:
        write_result("decoding", figures, head, command)
        return
    out.write_text(json.dumps(provenance(head, command) | figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
