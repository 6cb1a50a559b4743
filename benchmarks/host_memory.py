"""What loading Falcon-7B takes of the host's memory, for both formats of its eight shards.

    python benchmarks/host_memory.py                     on a GPU, about two minutes
    python benchmarks/host_memory.py --layers 2          a rehearsal, which writes nothing

A random Falcon-7B of the true shape is made, loaded by `load_falcon` in NF4 in a process of its
own, and deleted. This process reads the other's `RssAnon` meanwhile: memory that is its own, which
a system short of memory cannot take back, as it can the pages of a mapped file (`RssFile`). The
T4 profile's dtype is used, on the GPU where there is one. On a GPU, `.bin` shards are then read
whole instead of mapped, as older loaders did: that the figure rises shows that it can.
Writes results/<machine>/host_memory.json after each format.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import FalconConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.make_falcon7b import STEMS, make
from tools.results import this_command, write_result

EVERY = 0.02 if torch.cuda.is_available() else 0.1  # seconds between two looks
POINTS = 60  # of the curve that is kept, each the largest of the looks it stands for
CHILD = """
import json, sys, time
from dataclasses import replace
import torch
from transformers import modeling_utils
from transformers.utils import logging

sys.path.insert(0, sys.argv[1])
from helpers.falcon import assert_quantized, load_falcon
from helpers.profiles import T4

folder, mapped, device = sys.argv[2], sys.argv[3] == "mapped", sys.argv[4]
bars = []

class Timed(logging.tqdm_lib.tqdm):
    def close(self):
        if not self.disable:
            bars.append([self.desc, self.n, round(self.format_dict["elapsed"], 3)])
        super().close()

logging.tqdm_lib.tqdm = Timed
if not mapped:
    modeling_utils.is_zipfile = lambda path: False
if device != "cpu":
    torch.zeros(1, device=device)
began = time.monotonic()
model = load_falcon(folder, replace(T4, device=device))
ended = time.monotonic()
time.sleep(0.2)
gpu = torch.cuda.max_memory_allocated() if device != "cpu" else None
found = {"began": began, "ended": ended, "bars": bars, "linear4bit": assert_quantized(model)}
print("FOUND" + json.dumps(found | {"gpu": gpu}))
"""


def rss(pid: int) -> tuple[float, float] | None:
    """(RssAnon, RssFile) of a process in GB (10⁹ bytes); None once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    kilobytes = dict(line.split(":", 1) for line in lines if line.startswith("Rss"))
    if "RssAnon" not in kilobytes:
        return None
    return tuple(int(kilobytes[n].split()[0]) * 1024 / 1e9 for n in ("RssAnon", "RssFile"))


def thin(looks: list[tuple[float, float]]) -> dict[str, list[float]]:
    """At most `POINTS` of the looks, evenly spread, each the largest of its neighbours."""
    size = -(-len(looks) // POINTS) or 1
    parts = [looks[i : i + size] for i in range(0, len(looks), size)]
    return {
        "seconds": [round(part[0][0], 2) for part in parts],
        "anon_gb": [round(max(gb for _, gb in part), 3) for part in parts],
    }


def watch(folder: Path, mapped: bool = True) -> dict[str, Any]:
    """Load the checkpoint in a new process; its memory over time and seconds a shard."""
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    how = "mapped" if mapped else "whole"
    command = [sys.executable, "-c", CHILD, str(ROOT), str(folder), how, device]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    looks = []
    while child.poll() is None:
        if now := rss(child.pid):
            looks.append((time.monotonic(), *now))
        time.sleep(EVERY)
    printed = child.stdout.read()
    if child.returncode or "FOUND" not in printed:
        return {"error": f"the process ended with {child.returncode}"}
    found = json.loads(printed.split("FOUND")[1])
    during = [look for look in looks if found["began"] <= look[0] <= found["ended"]]
    before = [anon for at, anon, _ in looks if at < found["began"]]
    size = sum(file.stat().st_size for file in folder.iterdir())
    return {
        "checkpoint_gb": round(size / 1e9, 2),
        "anon_before_gb": round(before[-1], 3) if before else None,
        "anon_peak_gb": round(max(anon for _, anon, _ in during), 3),
        "anon_after_gb": round(during[-1][1], 3),
        "file_peak_gb": round(max(file for _, _, file in during), 3),
        "seconds": round(found["ended"] - found["began"], 2),
        "looks": len(during),
        "shards": [{"bar": bar, "weights": n, "seconds": s} for bar, n, s in found["bars"]],
        "linear4bit": found["linear4bit"],
        "gpu_peak_gb": found["gpu"] and round(found["gpu"] / 1e9, 3),
        "curve": thin([(at - found["began"], anon) for at, anon, _ in during]),
    }


def main() -> None:
    """Measure both formats, and on a GPU `.bin` shards that are not mapped."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32, help="32 is the true shape")
    parser.add_argument("--folder", help="where 14 GB can lie for a while")
    parser.add_argument("--shard", default="2GB")
    args = parser.parse_args()
    figures: dict[str, Any] = {"layers": args.layers, "dtype": "float16", "look_every_s": EVERY}
    for kind in STEMS:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            try:
                began = time.perf_counter()
                make(Path(folder), FalconConfig(num_hidden_layers=args.layers), kind, args.shard)
                print(f"{kind}: made in {time.perf_counter() - began:.0f} s", flush=True)
                figures[kind] = watch(Path(folder))
                if kind == "bin" and torch.cuda.is_available():
                    figures["bin_whole"] = watch(Path(folder), mapped=False)
            except Exception as error:  # the other format is still worth its time
                figures[kind] = {"error": f"{type(error).__name__}: {error}"}
        for what in (kind, "bin_whole"):
            keys = ("anon_peak_gb", "seconds", "error")
            print(what, {k: v for k, v in figures.get(what, {}).items() if k in keys}, flush=True)
        about = "Host memory while a Falcon-7B of random weights is loaded in NF4"
        if args.layers == 32:
            print(write_result("host_memory", figures, about, this_command()), flush=True)


if __name__ == "__main__":
    main()
