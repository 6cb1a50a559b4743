"""Run the twins of 01, 03 and 04 on a data set of your own, in a copy of this folder.

    python tools/measure_real_rows.py rows.jsonl TOKENIZER_FOLDER

Made for the article's 172 rows, of which this project holds no text: only figures are kept, in
results/cpu/real_rows.json. TOKENIZER_FOLDER holds Falcon's own tokenizer, for page 01's counts.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.results import write_result

DRIVER = """
import json, runpy, sys
twin, wanted, *arguments = sys.argv[1:]
sys.argv = [twin, *arguments]
page = runpy.run_path(twin, run_name="__main__")
print(json.dumps({name: eval(name, page) for name in wanted.split(";")}))
"""


def run(root: Path, slug: str, wanted: dict[str, str], arguments: list[str]) -> dict:
    """Run a twin in a copy of the project; returns the wanted expressions of its globals."""
    twin = str(root / f"notebooks/py/{slug}.py")
    command = [sys.executable, "-c", DRIVER, twin, ";".join(wanted.values()), *arguments]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{slug} stopped: {done.stderr.splitlines()[-1]}")
    values = json.loads(done.stdout.splitlines()[-1])
    figures = {name: values[expression] for name, expression in wanted.items()}
    return figures | {"seconds": round(time.perf_counter() - began, 1)}


def main() -> None:
    """Copy, run, write."""
    data, tokenizer = (str(Path(a).resolve()) for a in sys.argv[1:3])
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in filter(None, files):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
        common = ["PROFILE=cpu", f"DATASET={data}"]
        figures = {
            "falcon_tokenizer": run(
                root,
                "01_data_loading",
                {
                    "lengths": "summary",
                    "padding": "waste",
                    "suicide_rows": "len(touching)",
                    "suicide_questions": "len(asking)",
                },
                [*common, f"MODEL={tokenizer}"],
            ),
            "tiny_tokenizer": run(root, "01_data_loading", {"lengths": "summary"}, common),
            "training": run(
                root,
                "03_qlora_finetuning",
                {
                    "held_out_before": "first_loss",
                    "held_out_best": "best_loss",
                    "best_step": "best_step",
                    "step_seconds": "progress.step_seconds",
                },
                [*common, "WANDB=disabled"],
            ),
            "comparison": run(
                root, "04_base_vs_peft", {"scores": "scores", "difference": "difference"}, common
            ),
        }
    figure = "the article's 172 rows through 01, 03 and 04 with the tiny Falcon (figures only)"
    print(
        write_result(
            "real_rows", figures, figure, "python tools/measure_real_rows.py ROWS TOKENIZER"
        )
    )


if __name__ == "__main__":
    main()
