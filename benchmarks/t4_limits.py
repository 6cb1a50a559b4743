"""A T4's limits on another GPU: does notebook 03's t4 profile fit and train there, and how fast?

    python benchmarks/t4_limits.py --model falcon-7b-random --data rows.jsonl

fp16 with adapters in 32 bits and a gradient scaler, the allocator capped at 14.5 GiB and told to
grow its segments, flash attention off and the memory-efficient kernel on. The original's recipe
(`benchmarks/seed.py`, in fp16, its adapters in 32 bits, which it needs to start at all) and ours
train in turns: original, ours at either length, and all four once more, each on a base loaded anew,
64 rows a step, ours as `fit_memory` chooses it for a T4 (a test sees to that). Then ours with other
settings, most telling first. In one step of each the GPU's own time is summed, since an H100 may
wait for the host where a T4 would not. Ours takes the first steps of the profile's 150. The rows
and their lengths are real, the speed is this GPU's: only the ratio, the peaks and the loss scale
say something of a T4.
The file is written anew after each part. `--join FILE...` puts runs of several machines together,
the newest first, joined files too: their paces are pooled, an older run's part under the name that
its settings have today. Writes results/<gpu>/t4_limits.json; --out names another.
On a CPU, `--cpu-rehearsal` goes through it in fp32, with neither cap nor compilation.
"""

import argparse
import gc
import json
import math
import os
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, set_seed
from trl import SFTTrainer

from benchmarks.seed import load_seed_base, seed_trainer
from benchmarks.training import Meter, peak_gib, summary, synchronize
from helpers.dialogues import load_dialogues, to_prompt_completion
from helpers.falcon import load_falcon, load_tokenizer, use_fused_attention
from helpers.profiles import GIB, T4, TINY, Profile
from helpers.training import row_order
from tools.mends import Mends, most_tokens, use_mends
from tools.results import this_command, write_result

KEPT = ("command", "date", "commit", "machine")
LABEL = "a T4's limits on an H100, not a T4"
CAP_GIB = 14.5
FAST, LEAN, PLAIN = Mends(lean=True, compiled=True), Mends(lean=True), Mends()
# name: mends, length, rows of a micro-batch, of how many layers one is computed again, steps
OURS: dict[str, tuple[Mends, int, int, int, int]] = {
    "ours, 512 tokens": (FAST, 512, 8, 8, 6),
    "ours, 256 tokens": (FAST, 256, 16, 8, 6),
    "one of four again, 512 tokens": (FAST, 512, 8, 4, 5),
    "one of four again, 256 tokens": (FAST, 256, 16, 4, 5),
    "8 rows, all kept": (FAST, 512, 8, 0, 5),
    "8 rows, every layer again": (FAST, 512, 8, 1, 4),
    "16 rows, every layer again": (FAST, 512, 16, 1, 4),
    "4 rows, all kept": (FAST, 512, 4, 0, 4),
    "lean LoRA, 8 rows, every layer again": (LEAN, 512, 8, 1, 4),
    "no mend, 8 rows, every layer again": (PLAIN, 512, 8, 1, 4),
}
SEED_ROWS = (16, 8, 4)  # what the original's recipe tries under the cap, its own batch first


class Scale(TrainerCallback):
    """The gradient scaler's factor after each step, and an end after some of the 150 steps."""

    def __init__(self, steps: int) -> None:
        self.steps, self.scales, self.trainer = steps, [], None

    def on_step_end(self, args, state, control, **kwargs):
        """Note the factor; stop once there are enough steps."""
        scaler = self.trainer.accelerator.scaler
        self.scales.append(scaler.get_scale() if scaler else 1.0)
        control.should_training_stop = state.global_step >= self.steps


class Busy(TrainerCallback):
    """Watches the last step with the profiler: how long the GPU itself works for it, in seconds.

    An H100 may wait for the host where a T4, many times slower, would not.
    """

    def __init__(self, step: int) -> None:
        self.step, self.seconds = step, 0.0
        gpu = torch.cuda.is_available()
        self.spent = "self_device_time_total" if gpu else "self_cpu_time_total"
        self.seen = profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU])

    def on_step_begin(self, args, state, control, **kwargs):
        """Begin to watch, if this is the last step."""
        if state.global_step == self.step - 1:
            self.seen.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        """Sum what the kernels took."""
        if state.global_step == self.step:
            synchronize()
            self.seen.__exit__(None, None, None)
            self.seconds = sum(getattr(e, self.spent) for e in self.seen.key_averages()) / 1e6


class Bench:
    """Rows, profile and folder of one run of this benchmark."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        base = TINY if arguments.cpu_rehearsal else T4
        self.profile: Profile = replace(base, model=arguments.model or base.model)
        self.chosen: dict[str, Any] = {}
        self.small, self.folder = arguments.cpu_rehearsal, tempfile.mkdtemp()
        pairs = to_prompt_completion(load_dialogues(arguments.data or base.dataset)[0])
        self.texts = [p + c for p, c in zip(pairs["prompt"], pairs["completion"], strict=True)]
        tokenizer = load_tokenizer(self.profile.model)
        self.lengths = [len(ids) + 1 for ids in tokenizer(self.texts).input_ids]
        self.rows = 8 if self.small else 64

    def shape(self, batch: int) -> dict[str, int]:
        """Rows of a micro-batch, and how many make a step."""
        batch = max(1, batch // 8) if self.small else batch
        return {"per_device_train_batch_size": batch,
                "gradient_accumulation_steps": self.rows // batch}  # fmt: skip

    def at(self, length: int) -> Profile:
        """The profile at this length, its largest micro-batch dividing the rows of a step."""
        return replace(self.profile, max_length=length, max_steps=30, batch_size=1,
                       accumulation=self.rows)  # fmt: skip

    def seed(self, length: int, batch: int) -> SFTTrainer:
        """The original's trainer in fp16 on a base of its own."""
        set_seed(0)
        return seed_trainer(
            load_seed_base(self.profile), self.profile, Dataset.from_dict({"text": self.texts}),
            self.folder, 150, max_length=length, fp16=not self.small, **self.shape(batch),
        )  # fmt: skip

    def ours(self, mends: Mends, length: int, batch: int, every: int) -> SFTTrainer:
        """Notebook 03's trainer on a base of its own."""
        self.chosen = {}
        set_seed(0)
        base = load_falcon(self.profile.model, self.profile)
        use_fused_attention(base)
        tokens = most_tokens(self.at(length), mends, self.lengths, batch)
        self.chosen = {"rows": batch, "again_of": every, "most_tokens": tokens}
        cut = [min(n, length) for n in self.lengths]
        order = row_order(cut, self.rows, 30, seed=0)
        trainer = seed_trainer(
            base, self.profile, Dataset.from_dict({"text": [self.texts[i] for i in order]}),
            self.folder, 150, max_length=length, fp16=not self.small, **self.shape(batch),
            activation_checkpointing=every > 0,
            activation_checkpointing_kwargs={"every_n_layers": every or 1},
            train_sampling_strategy="sequential",
            lr_scheduler_type="cosine", warmup_steps=0.03,
        )  # fmt: skip
        use_mends(trainer, replace(mends, compiled=mends.compiled and not self.small))
        return trainer


def free() -> None:
    """Give back what nobody holds any more; the peak begins anew."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(trainer: SFTTrainer, steps: int, fused: bool) -> dict[str, Any]:
    """Train some steps; the first only warms up, and in one more the GPU alone is watched."""
    use_fused_attention(trainer.model, fused)
    busy = Busy(steps + 1)
    trainer.add_callback(busy)
    meter, scale = Meter(trainer), Scale(steps + 1)
    scale.trainer = trainer
    trainer.add_callback(scale)
    began = time.perf_counter()
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    losses = [float(entry["loss"]) for entry in log]
    skipped = sum(b < a for a, b in zip([65536.0, *scale.scales], scale.scales, strict=False))
    reserved = torch.cuda.max_memory_reserved() / GIB if torch.cuda.is_available() else 0.0
    tokens = meter.steps[-1][1]
    return summary(meter.steps[1:-1]) | {
        "gpu": {"busy_s": busy.seconds, "useful_tokens": tokens,
                "useful_tokens_per_busy_s": tokens / busy.seconds},
        "steps": len(meter.steps) - 1, "warmup_s": meter.steps[0][0], "peak_gib": peak_gib(),
        "reserved_gib": reserved, "seconds": time.perf_counter() - began,
        "losses": losses, "losses_finite": all(math.isfinite(loss) for loss in losses),
        "grad_norms": [float(entry["grad_norm"]) for entry in log],
        "loss_scales": scale.scales, "steps_skipped": skipped,
    }  # fmt: skip


def attempt(build: Any, steps: int, fused: bool) -> dict[str, Any]:
    """One part; its fault becomes a line, and nothing of it stays on the GPU."""
    trainer = None
    try:
        free()
        trainer = build()
        return measure(trainer, steps, fused)
    except Exception as error:  # one part's fault must not cost the others
        text = (str(error).strip() or "no text").splitlines()[0][:300]
        return {"error": f"{type(error).__name__}: {text}"}


def the_seed(bench: Bench, length: int, steps: int, fits: list[int]) -> dict[str, Any]:
    """The original's recipe with as many rows as fit; `fits` loses those that do not."""
    tried = {}
    while fits:
        batch = fits[0]
        found = attempt(lambda b=batch: bench.seed(length, b), steps, fused=False)
        if "error" not in found:
            return found | {"rows": batch, "did_not_fit": tried}
        tried[str(batch)] = found["error"]
        fits.pop(0)
    return {"error": f"nothing fits: {tried}"}


def ratio(ours: list[dict], seed: list[dict]) -> dict[str, float]:
    """Ours over the original's, of both turns: medians, and the extremes of single steps."""
    pace = {
        name: [part["useful_tokens_per_s"] for part in parts]
        for name, parts in {"ours": ours, "seed": seed}.items()
    }
    middle = {name: sum(p["value"] for p in parts) / len(parts) for name, parts in pace.items()}
    return {
        "value": middle["ours"] / middle["seed"],
        "low": min(p["low"] for p in pace["ours"]) / max(p["high"] for p in pace["seed"]),
        "high": max(p["high"] for p in pace["ours"]) / min(p["low"] for p in pace["seed"]),
        "n": min(sum(p["n"] for p in parts) for parts in pace.values()),
    }


def busy_ratio(ours: list[dict], seed: list[dict]) -> dict[str, float]:
    """Ours over the original's useful tokens for a second in which the GPU works, by turns.

    Example:
        >>> fast, slow = ({"gpu": {"useful_tokens_per_busy_s": pace}} for pace in (8, 2))
        >>> busy_ratio([fast, fast], [slow])
        {'value': 4.0, 'low': 4.0, 'high': 4.0, 'n': 1}
    """
    ours, seed = ([p["gpu"]["useful_tokens_per_busy_s"] for p in parts] for parts in (ours, seed))
    return {
        "value": (sum(ours) / len(ours)) / (sum(seed) / len(seed)),
        "low": min(ours) / max(seed),
        "high": max(ours) / min(seed),
        "n": min(len(ours), len(seed)),
    }


def ratios(figures: dict[str, Any]) -> None:
    """The ratios that the parts allow by now, pooled over the runs that have both sides."""
    figures["ratio"] = {}
    for way in ("ours", "one of four again"):
        for length in (512, 256):
            runs: dict[str, dict[str, list]] = {}
            for name, part in figures["parts"].items():
                who, run = name.split(f", {length} tokens")[0], name.partition(", run ")[2]
                if who in (way, "seed") and "error" not in part:
                    runs.setdefault(run, {"seed": [], way: []})[who].append(part)
            both = [(run[way], run["seed"]) for run in runs.values() if run[way] and run["seed"]]
            if both:
                pooled = ratio(*(sum(parts, []) for parts in zip(*both, strict=True)))
                each = [ratio(*run)["value"] for run in both]
                key = str(length) if way == "ours" else f"{length}, {way}"
                figures["ratio"][key] = pooled | {"by_run": each}
                watched = [run for run in both if all("gpu" in p for p in sum(run, []))]
                if watched:
                    pooled = busy_ratio(*(sum(parts, []) for parts in zip(*watched, strict=True)))
                    figures["ratio"][f"{key}, of the GPU's own time"] = pooled


def joined(first: dict[str, Any], *others: dict[str, Any]) -> dict[str, Any]:
    """Runs of several machines as one: parts that went well, by today's names; ratios pooled.

    Only parts that name their length are taken along from older runs: their rows, and of how many
    layers one was computed again, say what today's name is.

    Example:
        >>> pace = {"useful_tokens_per_s": {"value": 6, "low": 5, "high": 7, "n": 2}}
        >>> ours = pace | {"rows": 8, "again_of": 8}
        >>> old = {"date": "May", "parts": {"seed, 512 tokens": pace, "as today, 512 tokens": ours}}
        >>> both = joined({"parts": {}}, old)
        >>> list(both["parts"]), both["other_runs"], both["ratio"]["512"]["by_run"]
        (['seed, 512 tokens, run 2', 'ours, 512 tokens, run 2'], [{'date': 'May'}], [1.0])
    """
    parts = {name: part for name, part in first["parts"].items() if "error" not in part}
    both = first | {"parts": parts, "other_runs": []}
    for n, run in enumerate(others, 2):
        both["other_runs"].append({key: run[key] for key in KEPT if key in run})
        for name, part in run["parts"].items():
            before, named, _ = name.partition(" tokens")
            if "error" in part or not named:
                continue
            asked = (int(before.split()[-1]), part.get("rows"), part.get("again_of"))
            today = [
                new for new, (mends, *how, _) in OURS.items() if (mends, *how) == (FAST, *asked)
            ]
            if today or name.startswith("seed"):
                again = ", again" * (bool(today) and name.endswith(", again"))
                parts[f"{(today or [name])[0]}{again}, run {n}"] = part
    ratios(both)
    return both


def apart(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that a joined file was made of, the newest first; any other file alone.

    Example:
        >>> [r["parts"] for r in apart({"parts": {"a": 1, "a, run 2": 2}, "other_runs": [{}]})]
        [{'a': 1}, {'a': 2}]
    """
    heads = [run, *run.get("other_runs", [])]
    parts: list[dict[str, Any]] = [{} for _ in heads]
    for name, part in run["parts"].items():
        plain, _, n = name.partition(", run ")
        parts[int(n or 1) - 1][plain] = part
    return [head | {"parts": own} for head, own in zip(heads, parts, strict=True)]


def main() -> None:
    """Measure everything there is time for, and write it down each time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="folder of a Falcon-7B")
    parser.add_argument("--data", help="rows, as notebook 01 reads them")
    parser.add_argument("--out", help="instead of results/<gpu>/t4_limits.json")
    parser.add_argument("--seconds", type=float, default=320, help="begin no part after these")
    parser.add_argument("--cpu-rehearsal", action="store_true")
    parser.add_argument("--join", nargs="+", type=Path, help="put these runs together, no more")
    arguments = parser.parse_args()
    if arguments.join:
        files = [json.loads(path.read_text()) for path in arguments.join]
        both = joined(*(run for file in files for run in apart(file)))
        Path(arguments.out).write_text(json.dumps(both, indent=2) + "\n")
        return
    began, bench = time.perf_counter(), Bench(arguments)
    figures: dict[str, Any] = {"label": LABEL, "cap_gib": CAP_GIB, "parts": {}, "ratio": {}}
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(CAP_GIB * GIB / total)
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(True)
    figures["attention"] = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "mem_efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
    }
    if bench.small:
        figures["rehearsal"] = True
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    fits, fits_short = list(SEED_ROWS), list(SEED_ROWS)
    todo = {name: lambda p=part: attempt(lambda: bench.ours(*p[:4]), p[4], True) | bench.chosen
            for name, part in OURS.items()}  # fmt: skip
    turns = {
        "seed, 512 tokens": lambda: the_seed(bench, 512, 3, fits),
        "ours, 512 tokens": todo.pop("ours, 512 tokens"),
        "seed, 256 tokens": lambda: the_seed(bench, 256, 3, fits_short),
        "ours, 256 tokens": todo.pop("ours, 256 tokens"),
    }
    turns |= {f"{name}, again": part for name, part in turns.items()}
    for name, part in (turns | todo).items():
        late = time.perf_counter() - began > arguments.seconds
        found = {"error": "not measured: out of time"} if late else part()
        figures["parts"][name] = found
        ratios(figures)
        shown = {k: v for k, v in found.items() if k not in ("losses", "grad_norms", "loss_scales")}
        print(f"{time.perf_counter() - began:5.0f} s  {name}: {json.dumps(shown)}", flush=True)
        write(figures, arguments.out)
    print(json.dumps(figures["ratio"], indent=2))
    shutil.rmtree(bench.folder, ignore_errors=True)


def write(figures: dict[str, Any], out: str | None) -> None:
    """Write what is known by now."""
    write_result("t4_limits", figures, f"the t4 profile under {LABEL}", this_command(), out=out)


if __name__ == "__main__":
    main()
