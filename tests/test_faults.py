"""The slow ones: training runs killed, damaged, starved and stopped, on the tiny Falcon."""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from jupyter_client.manager import start_new_kernel

from tools.measure_faults import FAULTS

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
NAMED = (
    "kill in a step", "kill in a save", "truncated adapter", "same-size corrupt adapter",
    "missing optimizer", "missing scheduler", "missing RNG state", "missing trainer_state.json",
    "cut trainer_state.json", "disk full during a save", "Drive gone between saves",
    "changed seed", "changed batch", "changed rank", "changed max_steps",
    "changed library version", "two runs in one folder", "a read-only folder", "clock set back",
)  # fmt: skip
COLUMNS = {"fault", "plain_trainer", "ours", "lost_steps", "equal", "passed"}

LOG_A_RUN = """
import sys, time, wandb
from tools.handover import start_wandb
began = time.time()
report_to = start_wandb(sys.argv[1], "toy", {"rows": 3}, sys.argv[2])
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

class Rows(Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return {"x": torch.ones(2)}

class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__(); self.layer = torch.nn.Linear(2, 1)
    def forward(self, x): return {"loss": self.layer(x).mean()}

args = TrainingArguments(output_dir=sys.argv[2], max_steps=2, use_cpu=True, logging_steps=1,
                         save_strategy="no", disable_tqdm=True, report_to=report_to)
done = Trainer(Toy(), args, train_dataset=Rows()).train().global_step
mode = wandb.run.settings.mode if wandb.run else None
wandb.finish()
print("RESULT", report_to, mode, done, time.time() - began < 60)
"""

BUILD = """
import sys, tempfile
from pathlib import Path
from helpers.checkpoints import CheckpointManifest, last_valid_checkpoint, train_and_survive
from tools.faults import Lab, Trap
lab = Lab(Path(tempfile.mkdtemp()))
out, settings = lab.new_folder("notebook"), dict(steps=6, save_every=4, batch=4, seed=0, rank=8)
tell = Trap(lambda when, step, out: when == "in" and print("in step", step, flush=True))
trainer, mark = lab.trainer(out, settings, [tell])
trainer.add_callback(CheckpointManifest(mark))
"""
TRAIN = """
resume = last_valid_checkpoint(out, mark)
print("from", resume and Path(resume).name)
finished = train_and_survive(trainer, resume)
print("finished", finished, "at step", trainer.state.global_step)
"""
LOOK = """
losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
print("same losses", losses == lab.reference.losses)
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, dict]:
    """Every fault put to our runs, in a process of its own: it forks and kills."""
    path = tmp_path_factory.mktemp("faults") / "faults.json"
    command = [sys.executable, str(ROOT / "tools/measure_faults.py"), "--ours", "--to", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {row["fault"]: row for row in json.loads(path.read_text())}


def test_every_fault_that_was_promised_is_injected() -> None:
    assert set(NAMED) <= set(FAULTS) and len(FAULTS) >= 18


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_survives(rows: dict[str, dict], name: str) -> None:
    row = rows[name]
    assert set(row) == COLUMNS
    assert row["equal"], f"other losses or another adapter: {row}"
    assert row["passed"], row


def test_the_committed_table_is_whole() -> None:
    written = json.loads((ROOT / "results/cpu/faults.json").read_text())
    table = {row["fault"]: row for row in written["faults"]}
    assert set(table) == set(FAULTS)
    assert all(set(row) == COLUMNS and row["passed"] and row["equal"] for row in table.values())
    assert not any(row["plain_trainer"] == "not run" for row in table.values())


def test_the_committed_curves_are_what_page_03_says_of_them() -> None:
    losses = json.loads((ROOT / "results/cpu/faults.json").read_text())["losses"]
    whole, last = losses["unbroken"], losses["resumed_from_step"]
    assert losses["equal"] and losses["resumed"] == whole[last:]
    assert losses["killed"] == whole[: losses["killed_in_step"] - 1]
    assert last < len(losses["killed"]) < len(whole), "some steps are done twice, some are left"


def test_stop_in_a_notebook_saves_and_leaves_the_kernel_usable() -> None:
    manager, client = start_new_kernel(cwd=str(ROOT), env=ENV)

    def cell(source: str, stop_in: str = "") -> str:
        said: list[str] = []

        def hear(message: dict) -> None:
            said.append(message["content"].get("text", ""))
            if stop_in and stop_in in said[-1]:
                manager.interrupt_kernel()  # what the Stop button does

        reply = client.execute_interactive(source, output_hook=hear, timeout=240)
        assert reply["content"]["status"] == "ok", said
        return "".join(said)

    try:
        cell(BUILD)
        first = cell(TRAIN, stop_in="in step 3")
        assert "from None" in first and "Stopping after this step" in first
        assert "finished False at step 3" in first, "it went on, or stopped before the step's end"
        second = cell(TRAIN)
        assert "from checkpoint-3" in second and "finished True at step 6" in second
        assert "same losses True" in cell(LOOK)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers as a server does that does not know the key."""

    def do_POST(self) -> None:
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def refusing():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(
    ("mode", "key", "expected"),
    [
        ("disabled", None, "none None"), ("offline", None, "wandb offline"),
        ("online", None, "wandb offline"), ("online", "short", "wandb offline"),
        ("online", "a" * 40, "wandb offline"), ("online", "refused" * 6, "wandb offline"),
    ],
    ids=["disabled", "offline", "no key", "malformed key", "dead network", "refused key"],
)  # fmt: skip
def test_wandb_never_stops_training(
    tmp_path: Path, refusing: str, mode: str, key: str | None, expected: str
) -> None:
    env = {k: v for k, v in ENV.items() if not k.startswith("WANDB")}
    env["WANDB_BASE_URL"] = refusing if key == "refused" * 6 else "http://127.0.0.1:9"
    env |= {"WANDB_API_KEY": key} if key else {}
    command = [sys.executable, "-c", LOG_A_RUN, mode, str(tmp_path)]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"RESULT {expected} 2 True" in done.stdout, done.stdout[-500:]
    kept = list(tmp_path.glob("wandb/offline-run-*"))
    assert len(kept) == (mode != "disabled"), "what `wandb sync` uploads"
