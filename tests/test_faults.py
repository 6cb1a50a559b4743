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

STOPPABLE = """
import time
from types import SimpleNamespace
from helpers.checkpoints import CheckpointManifest, train_and_survive
keeper = CheckpointManifest({})
def train(resume_from_checkpoint):
    print("training", flush=True)
    for _ in range(200):
        time.sleep(0.1)
        if keeper.presses: return
handler = SimpleNamespace(callbacks=[keeper])
finished = train_and_survive(SimpleNamespace(train=train, callback_handler=handler))
print("finished", finished)
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
    losses = written["losses"]
    assert losses["unbroken"] == losses["killed_and_resumed"] and len(losses["unbroken"]) > 10


def test_stop_in_a_notebook_leaves_the_kernel_usable() -> None:
    manager, client = start_new_kernel(cwd=str(ROOT), env=ENV)
    try:
        said: list[str] = []

        def hear(message: dict) -> None:
            said.append(message["content"].get("text", ""))
            if "training" in said[-1]:
                manager.interrupt_kernel()

        reply = client.execute_interactive(STOPPABLE, output_hook=hear, timeout=90)
        assert reply["content"]["status"] == "ok", said
        assert "Stopping after this step" in "".join(said) and "finished False" in "".join(said)
        after = client.execute_interactive("assert not finished", output_hook=hear, timeout=30)
        assert after["content"]["status"] == "ok"
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
