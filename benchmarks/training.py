"""Notebook 03's training against the original's recipe, interleaved in one process on one GPU.

    python benchmarks/training.py --model falcon-7b-random --data rows.jsonl

It trains the recipe of `benchmarks/seed.py` and ours in turns, then ours alone with each mend off.
Both learn all tokens of the same rows, 64 a step. Useful tokens are those of the batches seen,
padding not counted. A step lasts from the end of the one before to its own end. A variant that
fails leaves its error instead of figures. The file is written anew after each variant, so that a
run cut short keeps what it has. Writes results/<gpu>/training.json; --out names another file.
On a CPU, `--cpu-rehearsal` goes through it all in fp32, without packing and compilation.
"""

import argparse
import gc
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback, set_seed
from trl import SFTTrainer

from benchmarks.seed import load_seed_base, seed_trainer
from helpers.dialogues import load_dialogues, to_prompt_completion
from helpers.falcon import load_falcon, load_tokenizer, use_fused_attention
from helpers.profiles import A100, GIB, TINY, Profile
from helpers.speed import lean_product
from helpers.training import row_order
from tools.mends import Mends, undo_double_quantization, use_mends
from tools.results import this_command, write_result

PARAMETERS = 6.64e9  # Falcon-7B's linears in 4 bits
ALL = Mends(packed=True, lean=True, compiled=True)
VARIANTS: dict[str, dict[str, Any]] = {  # after `ours`, in the order in which they are measured
    "with fp8": {"mends": replace(ALL, float8=True)},
    "without packing": {"mends": replace(ALL, packed=False)},
    "without compilation": {"mends": replace(ALL, compiled=False)},
    "without lean LoRA and packing": {"mends": replace(ALL, lean=False, packed=False)},
    "without fused attention and packing": {"mends": replace(ALL, packed=False), "fused": False},
    "double quantization undone": {"mends": ALL, "nested": False},
    "one layer of eight again": {"mends": ALL, "again": 8},
    "8 x 8 rows": {"mends": ALL, "batch": 8},
    "16 x 4 rows, checkpointing": {"mends": ALL, "again": 1},
    "8 x 8 rows, checkpointing": {"mends": ALL, "batch": 8, "again": 1},
    "with fp8, 8 x 8 rows, checkpointing": {
        "mends": replace(ALL, float8=True), "batch": 8, "again": 1,
    },
}  # fmt: skip


LESS_MEMORY = (
    "one layer of eight again", "8 x 8 rows", "16 x 4 rows, checkpointing",
    "8 x 8 rows, checkpointing",
)  # fmt: skip


OTHERS = ("second_run", "third_run", "fourth_run", "fifth_run", "sixth_run")
KEPT = ("command", "date", "commit", "machine", "ablation", "rounding", "note")


def memory_points(figures: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Variants that take less memory: their share of the original's peak, and times its speed."""
    seed, measured = figures.get("seed", {}), {}
    for run in (*(figures.get(name, {}) for name in OTHERS[::-1]), figures):
        measured |= run.get("ablation", {})
    found = {name: measured[name] for name in LESS_MEMORY if "peak_gib" in measured.get(name, {})}
    return {
        name: {
            "share_of_seed_peak": variant["peak_gib"] / seed["peak_gib"],
            "ratio": variant["useful_tokens_per_s"]["value"] / seed["useful_tokens_per_s"]["value"],
        }
        for name, variant in found.items()
        if "useful_tokens_per_s" in seed
    }


def joined(first: dict[str, Any], *others: dict[str, Any], note: str = "") -> dict[str, Any]:
    """The newest run, and of older ones, or ones with --only, what it lacks.

    Each goes under a name of its own, with where it comes from; a file that was joined before
    brings its runs along. `note` is for those of another commit that have none.

    Example:
        >>> new, old = {"ablation": {"a": {"n": 2}}}, {"date": "May", "ablation": {"b": {"n": 1}}}
        >>> joined(new, old)["second_run"]
        {'date': 'May', 'ablation': {'b': {'n': 1}}}
    """
    whole = {name: v for name, v in first["ablation"].items() if "error" not in v}
    runs = [r for run in others for r in (run, *(run[name] for name in OTHERS if name in run))]
    if len(runs) > len(OTHERS):
        raise ValueError(f"{len(runs)} older runs, and names for {len(OTHERS)}: leave some out")
    both, seen = first | {"ablation": whole}, set(whole)
    if "error" in both.get("rounding", {}):
        both.pop("rounding")
    for name, run in zip(OTHERS, runs, strict=False):
        kept = {key: run[key] for key in KEPT if key in run}
        rows = run.get("ablation", {}).items()
        kept["ablation"] = {n: v for n, v in rows if n not in seen and "error" not in v}
        seen |= set(kept["ablation"])
        other = note and "note" not in kept and run.get("commit") != first.get("commit")
        both[name] = kept | ({"note": note} if other else {})
    if "ours" in both.get("without_dropout", {}):
        both["without_dropout"] |= {"apart": apart(both["without_dropout"])}
    return both | {"memory_points": memory_points(both)}


class Meter(TrainerCallback):
    """Seconds and useful tokens of each optimizer step."""

    def __init__(self, trainer: SFTTrainer) -> None:
        self.steps: list[tuple[float, int]] = []
        self.seen: list[torch.Tensor | int] = []
        self.since = 0.0
        inner = trainer.training_step

        def training_step(model, inputs, *args, **kwargs):
            mask = inputs.get("attention_mask")
            self.seen.append(inputs["input_ids"].numel() if mask is None else mask.sum())
            return inner(model, inputs, *args, **kwargs)

        trainer.training_step = training_step
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        synchronize()
        self.seen, self.since = [], time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Close a step."""
        synchronize()
        now = time.perf_counter()
        self.steps.append((now - self.since, int(sum(self.seen))))
        self.seen, self.since = [], now


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    """Forget what is no longer used: memory, compiled code, the peak."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """The peak since `free`; 0 without a GPU."""
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0


def estimate(values: list[float]) -> dict[str, float]:
    """Median and spread."""
    return {
        "value": statistics.median(values), "low": min(values), "high": max(values),
        "n": len(values),
    }  # fmt: skip


def summary(steps: list[tuple[float, int]]) -> dict[str, Any]:
    """What the steps of one variant come to."""
    return {
        "useful_tokens_per_s": estimate([tokens / seconds for seconds, tokens in steps]),
        "step_s": estimate([seconds for seconds, _ in steps]),
        "useful_tokens_per_step": estimate([tokens for _, tokens in steps]),
    }


def roofline() -> dict[str, float]:
    """bf16 TFLOP/s of a square product of 8,192, which no training step can pass."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found = []
    for _ in range(25):
        synchronize()
        began = time.perf_counter()
        for _ in range(5):
            a @ b
        synchronize()
        found.append(5 * 2 * 8192**3 / (time.perf_counter() - began) / 1e12)
    return estimate(found[5:])


class Bench:
    """Rows, profile and folder of one run of this benchmark."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        base = TINY if arguments.cpu_rehearsal else A100
        self.profile: Profile = replace(base, model=arguments.model or base.model)
        self.small, self.folder = arguments.cpu_rehearsal, tempfile.mkdtemp()
        pairs = to_prompt_completion(load_dialogues(arguments.data or base.dataset)[0])
        self.texts = [p + c for p, c in zip(pairs["prompt"], pairs["completion"], strict=True)]
        tokenizer = load_tokenizer(self.profile.model)
        self.lengths = [len(ids) + 1 for ids in tokenizer(self.texts).input_ids]
        self.rows = 8 if self.small else 64
        self.layers: int | None = None  # decoder layers kept; None keeps all

    def cut(self, base: PreTrainedModel) -> PreTrainedModel:
        """Keep the first layers alone, where only these are asked for."""
        if self.layers:
            base.transformer.h = base.transformer.h[: self.layers]
            base.config.num_hidden_layers = len(base.transformer.h)
        return base

    def data(self, batch: int, steps: int) -> Dataset:
        """Rows in our order; `batch` is 0 if they are padded."""
        order = row_order(self.lengths, self.rows, steps, seed=0, packed=batch)
        return Dataset.from_dict({"text": [self.texts[i] for i in order]})

    def shape(self, batch: int) -> dict[str, int]:
        """Rows of a micro-batch, and how many make a step of 64; eighths in a rehearsal."""
        batch = batch // 8 if self.small else batch
        return {"per_device_train_batch_size": batch,
                "gradient_accumulation_steps": self.rows // batch}  # fmt: skip

    def seed(self, steps: int, dropout: float = 0.05, **others: Any) -> SFTTrainer:
        """The original's trainer on a base of its own."""
        set_seed(0)
        base = self.cut(load_seed_base(self.profile))
        in_order = others.get("train_sampling_strategy") == "sequential"
        rows = self.data(0, steps) if in_order else Dataset.from_dict({"text": self.texts})
        others = self.shape(16) | others
        return seed_trainer(base, self.profile, rows, self.folder, steps, dropout, **others)

    def ours(
        self, steps: int, mends: Mends = ALL, fused: bool = True, batch: int = 16,
        again: int = 0, dropout: float = 0.05, nested: bool = True,
    ) -> SFTTrainer:  # fmt: skip
        """Notebook 03's trainer on a base of its own; one layer of `again` is computed again.

        Without `nested`, double quantization is undone before the first step.
        """
        set_seed(0)
        if self.small:
            mends = Mends(lean=mends.lean)
        base = self.cut(load_falcon(self.profile.model, self.profile))
        if not nested:
            undo_double_quantization(base)
        use_fused_attention(base, fused)
        shape = self.shape(batch)
        rows = self.data(shape["per_device_train_batch_size"] * mends.packed, steps)
        trainer = seed_trainer(
            base, self.profile, rows, self.folder, steps, dropout, **shape,
            activation_checkpointing=again > 0,
            activation_checkpointing_kwargs={"every_n_layers": max(again, 1)},
            train_sampling_strategy="sequential",
        )  # fmt: skip
        use_mends(trainer, mends)
        return trainer


def train(trainer: SFTTrainer, meter: Meter, fused: bool = True) -> list[tuple[float, int]]:
    """Train once more from where the adapters are; gives the steps of this time."""
    use_fused_mask(trainer, fused)
    before = len(meter.steps)
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    return meter.steps[before:]


def use_fused_mask(trainer: SFTTrainer, fused: bool) -> None:
    """The mask of fused attention is the process's own, so it changes hands with the turn."""
    use_fused_attention(trainer.model, fused)


def in_turns(bench: Bench, rounds: int, steps: int) -> dict[str, Any]:
    """Both recipes, phase by phase; the first step of each phase only warms up."""
    free()
    seed = bench.seed(steps)
    seed_meter = Meter(seed)
    train(seed, seed_meter, fused=False)
    figures = {"seed": {"peak_gib": peak_gib()}}
    ours = bench.ours(steps)
    our_meter = Meter(ours)
    began = time.perf_counter()
    train(ours, our_meter)
    figures["ours"] = {"warmup_s": time.perf_counter() - began}
    phases: dict[str, list[tuple[float, int]]] = {"seed": [], "ours": []}
    for _ in range(rounds):
        phases["seed"] += train(seed, seed_meter, fused=False)[1:]
        phases["ours"] += train(ours, our_meter)[1:]
    for name, timed in phases.items():
        figures[name] |= summary(timed)
    pace = {name: figures[name]["useful_tokens_per_s"] for name in phases}
    figures["ratio"] = {
        "value": pace["ours"]["value"] / pace["seed"]["value"],
        "low": pace["ours"]["low"] / pace["seed"]["high"],
        "high": pace["ours"]["high"] / pace["seed"]["low"],
        "n": min(pace[name]["n"] for name in phases),
    }
    return figures


def alone(bench: Bench, steps: int, **variant: Any) -> dict[str, Any]:
    """One variant of ours by itself, with its own peak."""
    free()
    trainer, fused = bench.ours(steps, **variant), variant.get("fused", True)
    meter = Meter(trainer)
    train(trainer, meter, fused)
    return summary(train(trainer, meter, fused)[1:]) | {"peak_gib": peak_gib()}


def losses(bench: Bench) -> dict[str, Any]:
    """Both recipes without dropout on the same rows: losses and gradient norms, step by step."""
    found: dict[str, Any] = {}
    for name, build in {
        "seed": lambda: bench.seed(3, 0.0, train_sampling_strategy="sequential"),
        "ours": lambda: bench.ours(3, dropout=0.0),
    }.items():
        free()
        trainer = build()
        train(trainer, Meter(trainer), fused=name == "ours")
        log = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        found[name] = {key: [entry[key] for entry in log] for key in ("loss", "grad_norm")}
        del trainer
    return found | {"apart": apart(found)}


def apart(found: dict[str, Any]) -> list[float]:
    """Our losses above the original's, step by step, as shares.

    Example:
        >>> apart({"seed": {"loss": [4.0, 2.0]}, "ours": {"loss": [4.0, 1.0]}})
        [0.0, -0.5]
    """
    pairs = zip(found["seed"]["loss"], found["ours"]["loss"], strict=True)
    return [ours / seed - 1 for seed, ours in pairs]


class FirstStep(TrainerCallback):
    """The signs of every B after the first step: it starts at 0, so they are the step's own."""

    signs = torch.empty(0)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Keep them once."""
        if state.global_step == 1:
            b = [p.detach().flatten() for n, p in model.named_parameters() if "lora_B" in n]
            self.signs = torch.cat(b).sign().to(torch.int8).cpu()


def survival(width: int = 4544) -> dict[str, float]:
    """How much of an adapter's part is in a bf16 sum after AdamW's first step, in three orders."""
    torch.manual_seed(0)
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16
    whole = torch.randn(width, width, device=device, dtype=dtype) * 0.02
    packed, state = quantize_4bit(whole, quant_type="nf4")
    weight = dequantize_4bit(packed, state).to(dtype)
    x = torch.randn(512, width, device=device, dtype=dtype)
    thin = torch.randn(512, 32, device=device, dtype=dtype) * 0.6
    b = 2e-4 * (torch.rand(width, 32, device=device) - 0.5).sign().to(dtype)
    exact, part = x.double() @ weight.double().t(), thin.double() @ b.double().t()
    product, small = lean_product(x, width, packed, state.absmax, None, None, None), thin @ b.t()
    orders = {
        "both in 32 bits, rounded once": (product + small).to(dtype),
        "addmm: the 4-bit product onto the adapter's": torch.addmm(small, x, weight.t()),
        "addmm: the adapter's onto a rounded product": torch.addmm(x @ weight.t(), thin, b.t()),
    }
    return {
        name: (((y.double() - exact) * part).sum() / part.square().sum()).item()
        for name, y in orders.items()
    }


def rounding(bench: Bench, layers: int = 4) -> dict[str, Any]:
    """Is it rounding that sets the recipes' losses apart? A few layers, against 32 bits.

    AdamW's first step moves each number of B by the rate, up or down: where a gradient is smaller
    than its rounding error, chance decides. So the share of the signs that differ from those in 32
    bits is counted too. The original's recipe in other micro-batches does the same sums in another
    order: what that changes is rounding and nothing else. Its `prepare_model_for_kbit_training`
    takes embedding, LayerNorms and head to 32 bits, so that what flows from layer to layer is kept
    in 32 bits as well; ours leaves all that in 16.
    """
    sixteen, bench.layers = bench.profile, layers
    exact = replace(sixteen, compute_dtype=torch.float32)
    in_order = {"train_sampling_strategy": "sequential"}
    recipes: dict[str, Callable[[], SFTTrainer]] = {
        "in 32 bits": lambda: bench.seed(3, 0.0, **in_order),
        "seed": lambda: bench.seed(3, 0.0, **in_order),
        "seed, 8 x 8 rows": lambda: bench.seed(3, 0.0, **in_order, **bench.shape(8)),
        "ours": lambda: bench.ours(3, dropout=0.0),
        "ours, not compiled": lambda: bench.ours(3, replace(ALL, compiled=False), dropout=0.0),
        "without upcasts": lambda: bench.ours(3, Mends(), fused=False, dropout=0.0),
        "without upcasts, fused": lambda: bench.ours(3, Mends(), dropout=0.0),
        "without upcasts, lean": lambda: bench.ours(3, Mends(lean=True), fused=False, dropout=0.0),
    }
    plain = ("in 32 bits", "seed", "seed, 8 x 8 rows", "without upcasts", "without upcasts, lean")
    found: dict[str, Any] = {"layers": layers, "survives": survival(64 if bench.small else 4544)}
    signs: dict[str, torch.Tensor] = {}
    for name, build in recipes.items():
        free()
        bench.profile = exact if name == "in 32 bits" else sixteen
        trainer, first = build(), FirstStep()
        trainer.add_callback(first)
        train(trainer, Meter(trainer), fused=name not in plain)
        log = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        found[name] = {key: [entry[key] for entry in log] for key in ("loss", "grad_norm")}
        signs[name] = first.signs
        unlike = (first.signs != signs["in 32 bits"]).float().mean().item()
        found[name]["signs_unlike_32_bits"] = unlike
        for step, word in enumerate(("first", "second")):
            off = found[name]["loss"][step] / found["in 32 bits"]["loss"][step] - 1
            found[name][f"{word}_loss_off"] = off
        del trainer
    found["signs of ours unlike seed's"] = (signs["ours"] != signs["seed"]).float().mean().item()
    bench.profile, bench.layers = sixteen, None
    return found


def main() -> None:
    """Measure everything there is time for, and write it down each time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="folder of a Falcon-7B")
    parser.add_argument("--data", help="rows, as notebook 01 reads them")
    parser.add_argument("--steps", type=int, default=6, help="timed steps, 5 or more")
    parser.add_argument("--out", help="instead of results/<gpu>/training.json")
    parser.add_argument("--seconds", type=float, default=470, help="begin no variant after these")
    parser.add_argument("--only", nargs="*", help="these variants of ours, and nothing else")
    parser.add_argument("--cpu-rehearsal", action="store_true")
    parser.add_argument("--join", nargs="+", type=Path, help="put these runs together, no more")
    parser.add_argument("--note", default="", help="with --join: on runs of other commits")
    arguments = parser.parse_args()
    if arguments.join:
        both = joined(*(json.loads(p.read_text()) for p in arguments.join), note=arguments.note)
        Path(arguments.out).write_text(json.dumps(both, indent=2) + "\n")
        return
    began, bench, figures = time.perf_counter(), Bench(arguments), {"ablation": {}}
    if bench.small:
        figures["rehearsal"] = True  # what needs a GPU was left out of every variant

    def keep(name: str, measure: Callable[[], dict], into: dict[str, Any]) -> None:
        if time.perf_counter() - began > arguments.seconds:
            into[name] = {"error": "not measured: out of time"}
        else:
            try:
                into[name] = measure()
            except Exception as error:  # one variant's fault must not cost the others
                text = str(error).strip() or "no text"
                into[name] = {"error": f"{type(error).__name__}: {text.splitlines()[0][:300]}"}
        print(f"{time.perf_counter() - began:5.0f} s  {name}: {json.dumps(into[name])}", flush=True)
        write(figures, arguments.out)

    timed = 2
    rounds = -(-arguments.steps // timed)
    if torch.cuda.is_available():
        keep("matmul_tflops", roofline, figures)
    if not arguments.only:
        both: dict[str, Any] = {}
        keep("in turns", lambda: in_turns(bench, rounds, timed + 1), both)
        figures |= both["in turns"]
        keep("ours, alone", lambda: alone(bench, timed + 1), figures["ablation"])
        if "ours" in figures and "peak_gib" in figures["ablation"]["ours, alone"]:
            figures["ours"]["peak_gib"] = figures["ablation"]["ours, alone"]["peak_gib"]
        if "ours" in figures and "matmul_tflops" in figures:
            useful = 4 * PARAMETERS * figures["ours"]["useful_tokens_per_s"]["value"] / 1e12
            figures["useful_tflops"] = useful
            figures["roofline_fraction"] = useful / figures["matmul_tflops"]["value"]
        keep("without_dropout", lambda: losses(bench), figures)
    for name, variant in VARIANTS.items():
        if not arguments.only or name in arguments.only:
            keep(name, lambda v=variant: alone(bench, timed + 1, **v), figures["ablation"])
    if not arguments.only or "rounding" in arguments.only:
        keep("rounding", lambda: rounding(bench), figures)
    figures["memory_points"] = memory_points(figures)
    write(figures, arguments.out)
    shutil.rmtree(bench.folder)


def write(figures: dict[str, Any], out: str | None) -> None:
    """Write what is known by now."""
    figure = "training: the original's recipe and ours"
    write_result("training", figures, figure, this_command(), out=out)


if __name__ == "__main__":
    main()
