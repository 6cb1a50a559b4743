"""What notebook 03 needs on cards that could not be had, predicted from what an H100 measured.

    python tools/predict_needs.py

Memory is `plan_memory`'s, for the micro-batch that it chooses at the profile's length, plus the
CUDA context; the A100's packed micro-batch is the largest that the benchmark of training met. A
step takes the H100's seconds times the ratio of the cards' 16-bit products by their data sheets,
which leaves out that older cards are slower in other ways too. Writes results/predicted/needs.json,
with the CPU's measured figures beside.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from transformers import FalconConfig

from helpers.memory import plan_memory
from helpers.profiles import A100, GIB, T4
from tools.mends import Mends, fit_memory
from tools.results import provenance, this_command

# Dense 16-bit products a second, 10¹², by NVIDIA's data sheets: H100 SXM5, A100, T4.
SHEET = {"h100": 989, "a100": 312, "t4": 65}
TOTAL = {"a100": 39.4 * GIB, "t4": 14.56 * GIB}


def read(name: str) -> dict[str, Any]:
    """A file under results/."""
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def minutes(seconds: float) -> int:
    """Whole minutes: a prediction has no more digits.

    Example:
        >>> minutes(95.0)
        2
    """
    return round(seconds / 60)


def needs() -> dict[str, Any]:
    """GPU memory in GiB and minutes of training, by profile; who says so, by figure.

    Example:
        >>> [needs()[name]["memory_by"] for name in ("a100", "t4", "cpu")]
        ['predicted', 'predicted', 'measured']
    """
    training, page = read("h100/training"), read("cpu/series")["notebooks"]["03_qlora_finetuning"]
    context = read("h100/memory")["context"]["after_a_product"]
    found = {}
    for profile, mends in ((A100, Mends(True, True, True)), (T4, Mends(False, True, True))):
        lengths = [profile.max_length // (4 if mends.packed else 1)] * 64
        fitted = fit_memory(
            profile, mends, FalconConfig(), lengths, memory=int(TOTAL[profile.name])
        )
        rows, tokens = fitted.batch_size, fitted.batch_size * profile.max_length
        if mends.packed:
            tokens = training["ours"]["useful_tokens_per_step"]["high"] * rows // 64
        plan = plan_memory(fitted, FalconConfig(), 1, tokens, lean=True, compiled=True)
        step = training["ours"]["step_s"]["value"] * SHEET["h100"] / SHEET[profile.name]
        found[profile.name] = {
            "gpu_gib": (sum(plan.values()) + context) / GIB,
            "memory_by": "predicted",
            "rows": f"{rows} x {fitted.accumulation}",
            "tokens": tokens,
            "minutes": minutes(step * profile.max_steps),
            "minutes_by": "predicted",
        }
    found["cpu"] = {
        "gpu_gib": "none", "memory_by": "measured", "rows": "8 x 1",
        "minutes": page["seconds"] / 60, "minutes_by": "measured",
        "host_gib": page["peak_rss_gib"],
    }  # fmt: skip
    return found


def main() -> None:
    """Write the file."""
    head = provenance("what notebook 03 needs, predicted", this_command())
    head["machine"] = "predicted from an H100's figures"
    path = ROOT / "results/predicted/needs.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(head | needs(), indent=2) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
