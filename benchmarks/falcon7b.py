"""Run the twins of 02 and 03 on a Falcon-7B-shaped model and keep their figures.

    python benchmarks/falcon7b.py MODEL=falcon-7b-random DATASET=rows.jsonl MAX_STEPS=20

It runs the pages themselves, not a copy of their code: NAME=value arguments go to the
constants of both where they exist. Writes results/<gpu>/falcon7b.json.
"""

import ast
import gc
import resource
import runpy
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helpers.falcon import assert_quantized
from helpers.nf4 import stored_bytes
from tools.results import write_result


def constants(twin: Path) -> set[str]:
    """The names that a twin's parameters cell sets."""
    tree = ast.parse(twin.read_text())
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id.isupper()}


def run(slug: str, arguments: list[str]) -> tuple[dict, float]:
    """Run a twin as a script; returns its globals and the seconds it took."""
    twin = ROOT / f"notebooks/py/{slug}.py"
    known = constants(twin)
    sys.argv = [str(twin), *(a for a in arguments if a.split("=")[0] in known)]
    print("==", " ".join(sys.argv), flush=True)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    return runpy.run_path(str(twin), run_name="__main__"), time.perf_counter() - began


def main() -> None:
    """Run both, write one result file."""
    arguments = sys.argv[1:]
    shown = [f"{name}={Path(value).name}" for name, value in (a.split("=", 1) for a in arguments)]
    command = " ".join(["python benchmarks/falcon7b.py", *shown])
    two, seconds_two = run("02_nf4_quantization", arguments)
    stored = stored_bytes(two["model"])
    figures = {
        "quantization": {
            "linear4bit": assert_quantized(two["model"]),
            "predicted_bytes": two["predicted"]["this model"],
            "stored_bytes": stored,
            "ratio": stored / two["predicted"]["this model"],
            "page_seconds": round(seconds_two, 1),
            "peak_host_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        }
    }
    if torch.cuda.is_available():
        figures["quantization"]["peak_gpu_gib"] = round(
            torch.cuda.max_memory_allocated() / 2**30, 2
        )
    two.clear()
    gc.collect()
    torch.cuda.empty_cache()
    three, seconds_three = run("03_qlora_finetuning", arguments)
    progress, times = three["progress"], three["progress"].times
    figures["training"] = {
        "steps": len(times),
        "step_seconds": round(progress.step_seconds, 3),
        "first_step_seconds": round(times[0], 2),
        "rows_per_step": three["rows_per_step"],
        "useful_tokens_per_s": round(sum(three["lengths"][i] for i in three["order"]) / sum(times)),
        "trainable": three["n_trainable"],
        "linear4bit": assert_quantized(three["base"]),
        "first_loss": three["first_loss"],
        "best_loss": three["best_loss"],
        "page_seconds": round(seconds_three, 1),
        "planned_gib": {k: round(v / 2**30, 3) for k, v in three["plan"].items()},
    }
    if torch.cuda.is_available():
        figures["training"]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    print(
        write_result(
            "falcon7b", figures, "Falcon-7B of random weights, true shape: pages 02 and 03", command
        )
    )


if __name__ == "__main__":
    main()
