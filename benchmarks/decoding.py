"""How fast Falcon-7B answers: `generate` as the original called it, and with the step compiled.

    python benchmarks/decoding.py --model falcon-7b-random

Batch 1, greedy, exactly `--tokens` new tokens, all ways in turns in one process; then a first token
after a prompt of 300, and 18 prompts in one batch against one by one. Adapters of random weights,
rank 32 on all four linears. Writes results/<gpu>/decoding.json after each part; --out names another
file.
"""

import argparse
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
from peft import LoraConfig, get_peft_model

from helpers.falcon import LINEARS, load_falcon, load_tokenizer, use_fused_attention
from helpers.generation import compile_decoding, sampling
from helpers.profiles import A100, GIB, TINY
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


class Bench:
    """A model with an adapter, and the ways to answer with it."""

    def __init__(self, asked: argparse.Namespace) -> None:
        profile = A100 if torch.cuda.is_available() else TINY
        self.profile = replace(profile, model=asked.model or profile.model)
        self.tokenizer = load_tokenizer(self.profile.model)
        base = load_falcon(self.profile.model, self.profile)
        torch.manual_seed(0)
        lora = LoraConfig(r=32, lora_alpha=32, target_modules=list(LINEARS), task_type="CAUSAL_LM",
                          init_lora_weights=False)  # fmt: skip
        self.model = get_peft_model(base, lora).eval()
        self.tokens = asked.tokens

    def prompt(self, rows: int, length: int) -> torch.Tensor:
        """Random ids: speed does not depend on what they say."""
        ids = torch.randint(20, 4000, (rows, length))
        return ids.to(self.model.device)

    @torch.inference_mode()
    def answer(self, way: str, rows: int = 1, length: int = 40, tokens: int = 0) -> None:
        """Write exactly `tokens` tokens in one way: seed or ours, with or without the adapter."""
        config = sampling(self.tokenizer, tokens or self.tokens, 0, 1.0, 1.0)
        config.min_new_tokens = config.max_new_tokens
        ours = not way.startswith("seed")
        use_fused_attention(self.model, ours)
        config = compile_decoding(self.model.get_base_model(), config) if ours else config
        ids = self.prompt(rows, length)
        with self.model.disable_adapter() if way.endswith("base") else nullcontext():
            self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
            )


def in_turns(bench: Bench, rounds: int) -> dict[str, Any]:
    """Tokens a second of all ways; the first answer of each only warms up."""
    ways = ("seed", "seed base", "base", "adapter")
    found: dict[str, Any] = {
        "warmup_s": {way: clock(lambda w=way: bench.answer(w)) for way in ways}
    }
    print(found, flush=True)
    paces: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            paces[way].append(bench.tokens / clock(lambda w=way: bench.answer(w)))
    found |= {way: estimate(pace) for way, pace in paces.items()}
    found["ratio"] = {
        "value": found["adapter"]["value"] / found["seed"]["value"],
        "low": found["adapter"]["low"] / found["seed"]["high"],
        "high": found["adapter"]["high"] / found["seed"]["low"],
        "n": rounds,
    }
    return found


def first_token(bench: Bench) -> dict[str, float]:
    """Milliseconds to one token after a prompt of 300, adapter on."""
    bench.answer("adapter", length=300, tokens=1)
    times = [clock(lambda: bench.answer("adapter", length=300, tokens=1)) for _ in range(7)]
    return estimate([1000 * seconds for seconds in times])


def together(bench: Bench, tokens: int) -> dict[str, float]:
    """18 prompts in one compiled batch against the original's way, one by one."""
    bench.answer("adapter", rows=18, tokens=tokens)
    batch = [clock(lambda: bench.answer("adapter", rows=18, tokens=tokens)) for _ in range(3)]
    alone = [clock(lambda: bench.answer("seed", tokens=tokens)) for _ in range(3)]
    return {"batch_s": estimate(batch), "one_s": estimate(alone),
            "ratio": 18 * statistics.median(alone) / statistics.median(batch)}  # fmt: skip


def main() -> None:
    """Measure part by part and write each time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of a Falcon-7B")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="instead of results/<gpu>/decoding.json")
    asked = parser.parse_args()
    bench, figures = Bench(asked), {}
    for name, part in {
        "": lambda: in_turns(bench, asked.rounds),
        "first_token_ms": lambda: first_token(bench),
        "18_prompts": lambda: together(bench, asked.tokens // 4),
    }.items():
        found = part()
        figures |= {name: found} if name else found
        if torch.cuda.is_available():
            figures["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        print(json.dumps(found), flush=True)
        head = "decoding: the original's generate and the compiled step"
        if asked.out:
            text = json.dumps(provenance(head, this_command()) | figures, indent=2)
            asked.out.write_text(text + "\n")
        else:
            write_result("decoding", figures, head, this_command())


if __name__ == "__main__":
    main()
