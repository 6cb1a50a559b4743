"""Where a QLoRA step's memory goes: `plan_memory` against the allocator, point by point.

    python benchmarks/memory.py --model falcon-7b-random

In one process it trains two steps of two micro-batches through `SFTTrainer` at each point of a
grid of batch, length, rank, checkpointing, dtype and mends, on synthetic rows of exactly the given
length. fp16 points have a T4's settings: adapters and gradients in 32 bits, a gradient scaler,
padded rows, no flash attention. Points marked `calibration` are not scored: there the allocator's
own record says which tensors live at the peak, and that is what the plan's counts were read from.
The file is written anew after each point. Writes results/<gpu>/memory.json; --out names another.

    python benchmarks/memory.py --score results/h100/memory.json

predicts every point of a recorded file again, with today's plan, and needs no GPU.
On a CPU, `--cpu-rehearsal` goes through it all in fp32 with the tiny Falcon and measures nothing.
"""

import argparse
import gc
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import FalconConfig, set_seed
from trl import SFTConfig, SFTTrainer

from helpers.falcon import LINEARS, load_falcon, load_tokenizer, use_fused_attention
from helpers.memory import plan_memory
from helpers.profiles import A100, GIB, T4, TINY, Profile
from helpers.training import adapters_to_fp32
from tools.mends import Mends, undo_mends, use_mends
from tools.results import provenance, this_command, write_result

PEFT, LEAN, FAST = Mends(), Mends(lean=True), Mends(lean=True, compiled=True)
PACKED, BEST = Mends(packed=True, lean=True), Mends(packed=True, lean=True, compiled=True)
OLD_COMPILED = Mends(compiled=True)
# dtype, mends, rank, checkpointing (4: of four layers one): (batch, length) scored, and not scored
GRID: list[tuple[str, Mends, int, bool | int, list[tuple[int, int]], list[tuple[int, int]]]] = [
    ("bf16", BEST, 32, False, [(16, 256), (4, 1024), (8, 384), (4, 256)], [(8, 256)]),
    ("bf16", BEST, 32, True, [(16, 256), (8, 512), (16, 1024)], [(8, 256)]),
    ("bf16", BEST, 8, False, [(8, 512)], []),
    ("bf16", BEST, 8, True, [(16, 512)], []),
    ("bf16", FAST, 32, False, [(16, 256), (4, 512)], [(8, 256)]),
    ("bf16", FAST, 32, True, [(16, 256), (8, 512)], [(8, 256)]),
    ("bf16", PEFT, 32, True, [(16, 256), (4, 1024)], [(8, 256)]),
    ("bf16", PEFT, 32, False, [(4, 256), (2, 1024)], [(2, 512)]),
    ("bf16", PACKED, 32, False, [(8, 256), (4, 1024)], [(2, 512)]),
    ("bf16", PACKED, 64, True, [(16, 384)], [(8, 256)]),
    ("bf16", OLD_COMPILED, 32, False, [(4, 512)], [(8, 256)]),
    ("fp16", PEFT, 32, True, [(4, 512), (4, 256), (8, 512)], [(2, 512)]),
    ("fp16", PEFT, 8, True, [(4, 512)], []),
    ("fp16", PEFT, 32, False, [(2, 256), (1, 1024)], [(1, 512)]),
    ("fp16", LEAN, 32, True, [(4, 512)], [(8, 256)]),
    ("fp16", FAST, 32, True, [(4, 512), (8, 512)], [(8, 256)]),
    ("fp16", FAST, 32, False, [(4, 512), (4, 256), (8, 256)], [(2, 512)]),
    ("fp16", FAST, 32, 4, [(8, 512), (16, 256), (4, 512)], []),
    ("fp16", FAST, 32, 2, [(8, 512), (16, 256)], []),
    ("fp16", FAST, 32, 8, [(8, 512), (16, 256)], []),
]


def used_gib() -> float:
    """What the whole card has in use, by the driver's word; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return total - free


def allocated() -> int:
    """Bytes that the allocator has given out now; 0 without a GPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def take_peak() -> int:
    """The peak since this was last asked; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def free() -> None:
    """Forget what is no longer used, and the peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    take_peak()


def rows(batch: int, length: int, vocabulary: int, micro_batches: int = 4) -> Dataset:
    """Rows of random tokens, all of one length, none of them a special token."""
    generator = torch.Generator().manual_seed(batch * length)
    shape = (micro_batches * batch, length)
    ids = torch.randint(20, vocabulary, shape, generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist()})


def label(frames: list[dict]) -> str:
    """The two innermost lines of a stack that say which part of the work asked for memory."""
    ours = ("/falcon/", "helpers/", "/peft/", "/bitsandbytes/", "/trl/", "torchinductor", "/optim")
    shown = []
    for frame in frames:
        place = f"{Path(frame['filename']).name}:{frame['line']} {frame['name']}"
        if any(part in frame["filename"] for part in ours) and place not in shown:
            shown.append(place)
    inner = [f"{Path(f['filename']).name}:{f['line']}" for f in frames[:1]]
    return " < ".join(shown[:2] or inner)


def live_at_peak(trace: list[dict], kept: int = 60) -> dict[str, Any]:
    """Replay the allocator's record: what was alive when most was, and how it came to that.

    Args:
        trace: of one device, as `torch.cuda.memory._snapshot()["device_traces"]` has it.
        kept: groups shown, the largest first.

    Returns:
        bytes at the peak above the start, entries in all and at the peak, and groups of
        [bytes each, how many, who asked].
    """
    steps = [e for e in trace if e["action"] in ("alloc", "free_completed")]

    def replay(end: int) -> tuple[int, int, dict]:
        live: dict[int, dict] = {}
        total = most = at = 0
        for number, entry in enumerate(steps[:end]):
            if entry["action"] == "alloc":
                live[entry["addr"]] = entry
                total += entry["size"]
            elif entry["addr"] in live:
                total -= live.pop(entry["addr"])["size"]
            else:  # made before the record began
                total -= entry["size"]
            if total > most:
                most, at = total, number + 1
        return most, at, live

    most, at, _ = replay(len(steps))
    live = replay(at)[2]
    groups = Counter((entry["size"], label(entry["frames"])) for entry in live.values())
    largest = sorted(groups.items(), key=lambda item: -item[0][0] * item[1])[:kept]
    return {"bytes": most, "entries": len(steps), "at": at,
            "groups": [[size, n, name] for (size, name), n in largest]}  # fmt: skip


class Watch:
    """Bytes around each micro-batch of a trainer; `record` keeps the allocator's own record."""

    def __init__(self, trainer: SFTTrainer, shared: bool = False) -> None:
        self.trainer, self.record, self.shared = trainer, False, shared
        self.step, self.loss = trainer.training_step, trainer.compute_loss
        self.begin()
        trainer.training_step, trainer.compute_loss = self.training_step, self.compute_loss

    def begin(self, record: bool = False) -> None:
        """Forget the last point's micro-batches."""
        self.record, self.micro, self.losses, self.live = record, [], [], None
        self.between = 0

    def training_step(self, model: Any, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        """One micro-batch: bytes before it, after its forward, and the peaks of both halves."""
        watched = self.record and len(self.micro) == 3 and torch.cuda.is_available()
        self.between = max(self.between, take_peak())
        self.now = {"shape": list(inputs["input_ids"].shape), "before": allocated()}
        if watched:
            torch.cuda.memory._record_memory_history(
                context="alloc", stacks="python", max_entries=400_000
            )
        loss = self.step(model, inputs, *args, **kwargs)
        if watched:
            try:
                self.live = live_at_peak(torch.cuda.memory._snapshot()["device_traces"][0])
            except (KeyError, IndexError, RuntimeError) as error:  # the record is no public API
                self.live = {"error": repr(error)}
            torch.cuda.memory._record_memory_history(enabled=None)
        self.now |= {"backward_peak": take_peak(), "after": allocated()}
        self.micro.append(self.now)
        self.losses.append(float(loss))
        return loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The forward half."""
        loss = self.loss(*args, **kwargs)
        self.now |= {"saved": allocated(), "forward_peak": take_peak()}
        return loss

    def figures(self) -> dict[str, Any]:
        """What the point came to, in bytes."""
        self.between = max(self.between, take_peak())
        peaks = [m[half] for m in self.micro for half in ("forward_peak", "backward_peak")]
        found = {"peak": max([self.between, *peaks]), "between_peak": self.between,
                 "micro_batches": self.micro, "losses": self.losses}  # fmt: skip
        if torch.cuda.is_available():
            reserved = torch.cuda.memory_reserved()
            scaler = self.trainer.accelerator.scaler
            found |= {
                "reserved": reserved,
                "outside_allocator": None if self.shared else used_gib() - reserved,
                "loss_scale": scaler.get_scale() if scaler else None,
            }
        return found | ({"live_at_peak": self.live} if self.live else {})


def point_profile(dtype: str, mends: Mends, rehearsal: bool = False) -> Profile:
    """The profile that a point stands for."""
    return TINY if rehearsal else {"bf16": A100, "fp16": T4}[dtype]


def predict(point: dict[str, Any], config: FalconConfig) -> dict[str, float]:
    """The plan of one recorded point, by part, in bytes."""
    mends = Mends(**point["mends"])
    return plan_memory(
        point_profile(point["dtype"], mends), config, batch_size=point["batch"],
        length=point["length"], rank=point["rank"], checkpointing=bool(point["checkpointing"]),
        lean=mends.lean, compiled=mends.compiled, packed=mends.packed,
        every=int(point["checkpointing"]) or 1,
    )  # fmt: skip


def score(figures: dict[str, Any]) -> dict[str, Any]:
    """Predict every point again and say how far off the worst scored one is."""
    config, worst = FalconConfig(**figures["config"]), 0.0
    for point in figures["points"]:
        if "error" in point:
            continue
        point["parts"] = predict(point, config)
        point["predicted"] = sum(point["parts"].values())
        if point["peak"]:
            point["off"] = point["predicted"] / point["peak"] - 1
            worst = max(worst, abs(point["off"]) * (not point["calibration"]))
    whole = [p for p in figures["points"] if "error" not in p]
    figures["scored"] = sum(not p["calibration"] for p in whole)
    figures["calibration"] = sum(p["calibration"] for p in whole)
    figures["worst_error"] = worst
    return figures


def group(point: dict[str, Any]) -> tuple:
    """What the points of one group of the grid have in common."""
    return tuple(str(point.get(key)) for key in ("dtype", "mends", "rank", "checkpointing"))


def joined(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Today's points in the place of an earlier run's of the same groups, whose rest stays."""
    new = {group(point) for point in later["points"]}
    kept = [point for point in earlier["points"] if group(point) not in new]
    run = {key: earlier.get(key) for key in ("command", "date", "commit", "machine")}
    old, now = (
        {point_name(p): p["peak"] / GIB for p in run["points"] if p.get("peak")}
        for run in (earlier, later)
    )
    both = [name for name in old if name in now]
    replaced = {name: {"before_gib": old[name], "after_gib": now[name]} for name in both}
    before = {"earlier_run": earlier["earlier_run"]} if "earlier_run" in earlier else {}
    run |= {"points": len(kept), "replaced": replaced} | before
    return later | {"points": kept + later["points"], "earlier_run": run}


def together(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """A run that was cut, and a second of the same commit with the groups that it lacked.

    The first may be joined to an older one already: of that, groups in the second give way.
    """
    if first["commit"] != second["commit"]:
        raise ValueError("the two runs are of different commits: --join them instead")
    whole = [point for point in second["points"] if "error" not in point]
    new = {group(point) for point in whole}
    older = first.get("earlier_run", {"points": 0})
    old, now = first["points"][: older["points"]], first["points"][older["points"] :]
    old, now = ([p for p in ps if "error" not in p and group(p) not in new] for ps in (old, now))
    run = {key: second[key] for key in ("command", "date", "commit", "machine")}
    both = first | {"points": old + now + whole, "continued": run | {"points": len(whole)}}
    return both | ({"earlier_run": older | {"points": len(old)}} if older["points"] else {})


def point_name(point: dict[str, Any]) -> str:
    """A point in words, as a key."""
    mends = "+".join(key for key, on in point["mends"].items() if on) or "peft"
    every = int(point["checkpointing"])
    again = ("kept", "again", f"again of {every}")[min(every, 2)]
    return f"{point['dtype']} {mends} r{point['rank']} {again} {point['batch']} x {point['length']}"


class Bench:
    """The base of one dtype, and the trainers that are built on it one after the other."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.small, self.shared = arguments.cpu_rehearsal, arguments.shared
        self.model = arguments.model or TINY.model
        self.folder, self.dtype, self.base = tempfile.mkdtemp(), "", None
        self.figures: dict[str, Any] = {"points": [], "loads": {}}
        self.began = time.perf_counter()

    def load(self, dtype: str) -> None:
        """Load the base in this dtype, unless it is there."""
        if dtype == self.dtype:
            return
        self.base = None
        free()
        began = time.perf_counter()
        profile = replace(point_profile(dtype, PEFT, self.small), model=self.model)
        self.base, self.dtype = load_falcon(self.model, profile), dtype
        self.tokenizer = load_tokenizer(self.model)
        gc.collect()
        config = self.base.config
        self.figures["config"] = {
            key: getattr(config, key)
            for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size",
                        "ffn_hidden_size")
        }  # fmt: skip
        self.figures["loads"][dtype] = {
            "allocated": allocated(), "peak": take_peak(), "outside_allocator": self.outside(),
            "seconds": time.perf_counter() - began,
        }  # fmt: skip

    def outside(self) -> float:
        """Bytes of the card outside the allocator: the context, other processes, paged state."""
        return used_gib() - torch.cuda.memory_reserved() if torch.cuda.is_available() else 0.0

    def trainer(self, dtype: str, mends: Mends, rank: int, again: bool | int) -> SFTTrainer:
        """Notebook 03's trainer over rows that are swapped at each point."""
        use_fused_attention(self.base)
        args = SFTConfig(
            output_dir=self.folder, max_steps=2, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, max_length=2048, learning_rate=2e-4, warmup_steps=0.03,
            lr_scheduler_type="cosine", max_grad_norm=0.3, logging_steps=1, disable_tqdm=True,
            optim="adamw_torch" if self.small else "paged_adamw_32bit",
            bf16=dtype == "bf16" and not self.small, fp16=dtype == "fp16" and not self.small,
            activation_checkpointing=bool(again),
            activation_checkpointing_kwargs={"every_n_layers": int(again) or 1},
            train_sampling_strategy="sequential",
            eval_strategy="no", save_strategy="no", report_to="none", use_cpu=self.small,
        )  # fmt: skip
        lora = LoraConfig(
            r=rank, lora_alpha=32, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM",
            target_modules=list(LINEARS),
        )  # fmt: skip
        trainer = SFTTrainer(
            model=self.base, args=args, processing_class=self.tokenizer, peft_config=lora,
            train_dataset=rows(2, 64, self.base.config.vocab_size),
        )  # fmt: skip
        adapters_to_fp32(trainer)
        use_mends(trainer, mends)
        return trainer

    def group(self, dtype: str, mends: Mends, rank: int, again: bool | int, sizes: list) -> None:
        """All points of one trainer."""
        self.load(dtype)
        set_seed(0)
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.backends.cuda.enable_flash_sdp(dtype == "bf16")
        free()
        bare = allocated()
        if self.small:
            mends = Mends(lean=mends.lean)
        trainer = self.trainer(dtype, mends, rank, again)
        gc.collect()
        adapters, watch = allocated() - bare, Watch(trainer, self.shared)
        for batch, length, calibration in sizes:
            point = {"batch": batch, "length": length, "rank": rank, "checkpointing": again,
                     "dtype": dtype, "mends": vars(mends), "calibration": calibration}  # fmt: skip
            began = time.perf_counter()
            try:
                trainer.optimizer = trainer.lr_scheduler = None
                free()
                watch.begin(record=calibration)
                trainer.args.per_device_train_batch_size = trainer._train_batch_size = batch
                trainer.train_dataset = rows(batch, length, self.base.config.vocab_size)
                before = {"bare": bare, "adapters": adapters, "start": allocated()}
                trainer.train()
                point |= before | watch.figures()
            except Exception as error:  # one point's fault must not cost the others
                text = str(error).strip() or "no text"
                point["error"] = f"{type(error).__name__}: {text.splitlines()[0][:300]}"
                trainer.model.zero_grad()
            point["seconds"] = time.perf_counter() - began
            self.figures["points"].append(point)
        undo_mends(trainer.model)
        self.base = trainer.accelerator.unwrap_model(trainer.model).unload()
        vars(self.base).pop("forward", None)  # the trainer's loss in chunks
        self.base.gradient_checkpointing_disable()


def main() -> None:
    """Go through the grid, and write down each group of points."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="folder of a Falcon-7B")
    parser.add_argument("--out", help="instead of results/<gpu>/memory.json")
    parser.add_argument("--seconds", type=float, default=400, help="begin no group after these")
    parser.add_argument("--only", type=int, nargs="*", help="these groups of the grid, from 0")
    parser.add_argument("--join", type=Path, help="with --only: keep this file's other groups")
    parser.add_argument("--score", type=Path, help="predict a recorded file's points again")
    parser.add_argument("--together", type=Path, nargs=2, help="a cut run's file and its rest's")
    parser.add_argument("--shared", action="store_true", help="others use the card meanwhile")
    parser.add_argument("--cpu-rehearsal", action="store_true")
    arguments = parser.parse_args()
    if arguments.score:
        figures = score(json.loads(arguments.score.read_text()))
        told = provenance("", this_command())
        figures["predictions"] = {
            "computed": "afterwards, from the recorded settings; measurements as they were",
            **{key: told[key] for key in ("command", "date", "commit")},
        }
        (arguments.out and Path(arguments.out) or arguments.score).write_text(
            json.dumps(figures, indent=2) + "\n"
        )
        show(figures)
        return
    if arguments.together:
        both = together(*(json.loads(path.read_text()) for path in arguments.together))
        Path(arguments.out).write_text(json.dumps(score(both), indent=2) + "\n")
        return
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # else it goes on uncompiled
    bench = Bench(arguments)
    if bench.small:
        bench.figures["rehearsal"] = True
    bench.figures["context"] = start_context()
    for number, (dtype, mends, rank, again, scored, others) in enumerate(GRID):
        if arguments.only and number not in arguments.only:
            continue
        sizes = [(*size, True) for size in others] + [(*size, False) for size in scored]
        if bench.small:
            sizes = [(2 + n, 64, size[2]) for n, size in enumerate(sizes[:2])]
        name = f"{number}: {dtype} {mends} rank {rank} checkpointing {again}"
        if time.perf_counter() - bench.began > arguments.seconds:
            bench.figures["points"].append({"error": f"out of time before {name}"})
            continue
        try:
            bench.group(dtype, mends, rank, again, sizes)
        except Exception as error:
            text = str(error).strip() or "no text"
            bench.figures["points"].append(
                {"error": f"{name}: {type(error).__name__}: {text.splitlines()[0][:300]}"}
            )
            bench.base, bench.dtype = None, ""
        print(f"{time.perf_counter() - bench.began:5.0f} s  {name}", flush=True)
        write(score(bench.figures), arguments.out)
    if arguments.join:
        bench.figures = joined(json.loads(arguments.join.read_text()), bench.figures)
        write(score(bench.figures), arguments.out)
    show(bench.figures)
    shutil.rmtree(bench.folder, ignore_errors=True)


def start_context() -> dict[str, float]:
    """What the card has in use before and after this process has run one kernel, in bytes."""
    if not torch.cuda.is_available():
        return {}
    before = used_gib()  # asking makes the context
    torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")
    torch.cuda.synchronize()
    after = used_gib() - torch.cuda.memory_reserved()
    return {"created": before, "after_a_product": after,
            "total": torch.cuda.get_device_properties(0).total_memory}  # fmt: skip


def show(figures: dict[str, Any]) -> None:
    """One line a point."""
    for p in figures["points"]:
        if "error" in p:
            print(p)
            continue
        print(
            f"{point_name(p):50} {'(cal)' if p['calibration'] else '     '} "
            f"peak {p['peak'] / 2**30:6.2f}  predicted {p['predicted'] / 2**30:6.2f} GiB  "
            f"{p.get('off', 0):+.1%}  {p['seconds']:.1f} s"
        )
    print(f"worst error {figures['worst_error']:.1%} over {figures['scored']} scored points")


def write(figures: dict[str, Any], out: str | None) -> None:
    """Write what is known by now."""
    figure = "memory: plan_memory against the allocator's peak"
    write_result("memory", figures, figure, this_command(), out=out)


if __name__ == "__main__":
    main()
