"""docs/recipe.md: its code runs as it stands, and says what page 03 says."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ("BitsAndBytesConfig", "LoraConfig", "SFTConfig", "SFTTrainer")
OWN = {"output_dir", "max_steps", "target_modules", "report_to", "train_dataset", "eval_dataset"}


def recipe() -> str:
    (code,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs/recipe.md").read_text(), re.M | re.S
    )
    return code


def keywords(source: str) -> dict[str, str]:
    """What stands behind each keyword of the configurations, as written."""
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    known = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id in CONFIGS]
    return {k.arg: ast.unparse(k.value) for c in known for k in c.keywords if k.arg}


def test_the_recipe_fits_on_one_screen() -> None:
    lines = recipe().splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 50 and max(map(len, lines)) <= 100


def test_its_values_are_those_of_the_pages() -> None:
    twins = ("02_nf4_quantization", "03_qlora_finetuning")
    pages = {twin: (ROOT / f"notebooks/py/{twin}.py").read_text() for twin in twins}
    there = {k: v for page in pages.values() for k, v in keywords(page).items()}
    assert re.search(r"rank, alpha = .*, 32, 32$", pages[twins[1]], re.MULTILINE)
    there |= {"r": "32", "lora_alpha": "32"}  # the page calls both by name
    here = {k: v for k, v in keywords(recipe()).items() if k not in OWN}
    assert len(here) > 25
    assert {k: there.get(k) for k in here} == here


def test_it_runs_and_answers(tmp_path: Path) -> None:
    code = recipe()
    assert code.count("MAX_STEPS = None") == 1
    (tmp_path / "recipe.py").write_text(code.replace("MAX_STEPS = None", "MAX_STEPS = 2"))
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "recipe.py"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    said = re.split(r"^{.*}$", done.stdout, flags=re.MULTILINE)[-1]  # after the log
    assert len(said.split()) > 5, f"no answer: {done.stdout[-500:]}"
    assert (tmp_path / "artifacts/recipe/adapter/adapter_model.safetensors").exists()
