"""Time the twin of 03 on one GPU, on several (DDP), and with the base in pieces (FSDP).

    python benchmarks/many_gpus.py MODEL=falcon-7b-random DATASET=rows.jsonl MAX_STEPS=20

It launches the page itself, not a copy of its code; NAME=value goes to its constants. All runs see
the same rows at the same step. Writes results/<gpu>-x<n>/training.json, where n is the largest
number of processes; without a GPU it is a rehearsal and writes artifacts/many_gpus.json.

    --processes 1,2    how many to compare; the first is what efficiency is measured against
    --no-fsdp          leave out the sharded run
    --load-on-card     sharded run: load the base on each card, not in host memory
    --limit 150        seconds that one run may take
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TWIN = ROOT / "notebooks/py/03_qlora_finetuning.py"
WARM_UP = 3  # steps not timed: compiling, allocating
sys.path.insert(0, str(ROOT))


def worker(out: Path, arguments: list[str], load_on_card: bool) -> None:
    """Run the page in this process; leave its figures in `out`, one file for each process."""
    import torch

    import tools.many_gpus as many
    from benchmarks.gloo_fsdp import shard_on_cpus

    if load_on_card:
        many.loading = lambda profile: profile
    if many.is_sharded() and not torch.cuda.is_available():
        shard_on_cpus()  # a rehearsal
    sys.argv, error = [str(TWIN), *arguments], ""
    page = {"__name__": "__main__", "__file__": str(TWIN)}
    try:
        exec(compile(TWIN.read_text(), str(TWIN), "exec"), page)
    except SystemExit as left:  # every process but the first leaves the page when all is saved
        error = str(left.code or "")
    except Exception as fault:
        error = f"{type(fault).__name__}: {fault}"[:300]
        print(error, file=sys.stderr)
    rank = int(os.environ.get("RANK", "0"))
    (out / f"{rank}.json").write_text(json.dumps(figures(page, error)))
    if error:
        os._exit(1)


def figures(page: dict, error: str) -> dict:
    """What one process measured, from the page's names; an error where there are none."""
    import torch

    if "progress" not in page or not page["progress"].times:
        return {"error": error or "the page did not train"}
    times, rows = page["progress"].times, page["rows_per_step"]
    tokens = [page["lengths"][i] for i in page["order"]]
    timed = slice(min(WARM_UP, len(times) - 1), None)
    found = {
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "rows_per_step": rows,
        "rows_per_process": f"{page['profile'].batch_size} x {page['profile'].accumulation}",
        "steps": len(times),
        "step_seconds": round(page["progress"].step_seconds, 3),
        "first_step_seconds": round(times[0], 2),
        "useful_tokens_per_s": round(
            sum(tokens[len(times[: timed.start]) * rows : len(times) * rows]) / sum(times[timed])
        ),
        "losses": [round(h["loss"], 4) for h in page["history"] if "loss" in h],
        "held_out": [round(h["eval_loss"], 4) for h in page["history"] if "eval_loss" in h],
        "sharded": page["trainer"].is_fsdp_enabled,
    }
    if torch.cuda.is_available():
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found | ({"error": error} if error else {})


def launch(n: int, fsdp: bool, options: argparse.Namespace, arguments: list[str]) -> dict:
    """One run of `n` processes; its figures, those of rank 0 with the highest peak of all."""
    start = [sys.executable]
    if n > 1:
        start += ["-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", str(n)]
        start += ["--main_process_port", str(29600 + n + 20 * fsdp)]
        start += ["--config_file", str(ROOT / "configs/fsdp.yaml")] if fsdp else ["--multi_gpu"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*start, __file__, "--worker", folder, *arguments, f"OUTPUT={folder}/checkpoints"]
        command += ["--load-on-card"] if options.load_on_card else []
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": "0"} if n == 1 else {})
        print(f"== {n} process(es){', FSDP' if fsdp else ''}", flush=True)
        process = subprocess.Popen(command, env=environment)
        try:
            process.wait(options.limit)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher then ends its workers, after 30 s by force
            process.wait()
        ranks = [json.loads(p.read_text()) for p in sorted(Path(folder).glob("[0-9]*.json"))]
    if not ranks:
        return {"error": f"no figures; the run ended with code {process.returncode}"}
    peaks = [rank["peak_gib"] for rank in ranks if "peak_gib" in rank]
    return ranks[0] | ({"peak_gib": max(peaks)} if peaks else {})


def compare(runs: dict[str, dict]) -> dict[str, dict]:
    """Add each run's efficiency: useful tokens a second, over those of as many single runs.

    Example:
        >>> one, two = ({"world_size": n, "useful_tokens_per_s": t} for n, t in ((1, 10), (2, 18)))
        >>> compare({"one": one, "two": two})["two"]["efficiency"]
        0.9
    """
    first = next(iter(runs.values()))
    for run in runs.values():
        if "useful_tokens_per_s" in run and "useful_tokens_per_s" in first:
            alone = first["useful_tokens_per_s"] / first["world_size"]
            run["efficiency"] = round(run["useful_tokens_per_s"] / run["world_size"] / alone, 3)
    return runs


def main() -> None:
    """Launch each run, compare, write one file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--no-fsdp", action="store_true")
    parser.add_argument("--load-on-card", action="store_true")
    parser.add_argument("--limit", type=float, default=150)
    parser.add_argument("--worker", type=Path)
    options, arguments = parser.parse_known_args()
    if options.worker:
        worker(options.worker, arguments, options.load_on_card)
        return
    fixed = ["RESUME=False", "WANDB=disabled", "EARLY_STOP=False"]
    numbers = [int(n) for n in options.processes.split(",")]
    plan = [(f"ddp_{n}", n, False) for n in numbers]
    plan += [(f"fsdp_{n}", n, True) for n in numbers[-1:] if n > 1 and not options.no_fsdp]
    runs = {}
    for name, n, fsdp in plan:
        runs[name] = launch(n, fsdp, options, arguments + fixed)
        print(json.dumps({name: runs[name]}), flush=True)
    print(keep(compare(runs), max(numbers), arguments))


def keep(runs: dict[str, dict], cards: int, arguments: list[str]) -> Path:
    """Write the runs, and the largest DDP run's three figures on top."""
    import torch

    from tools.results import write_result

    top = {k: runs[f"ddp_{cards}"].get(k) for k in ("world_size", "useful_tokens_per_s",
                                                    "efficiency")}  # fmt: skip
    if not torch.cuda.is_available():
        path = ROOT / "artifacts/many_gpus.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(top | {"runs": runs}, indent=2) + "\n")
        return path
    shown = [f"{name}={Path(value).name}" for name, value in (a.split("=", 1) for a in arguments)]
    command = " ".join(["python benchmarks/many_gpus.py", *shown])
    figure = "Falcon-7B of random weights, true shape: page 03 on one GPU and on several"
    return write_result("training", top | {"runs": runs}, figure, command, cards=cards)


if __name__ == "__main__":
    main()
