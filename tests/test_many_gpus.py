"""Page 03 on many GPUs, rehearsed with two CPU processes and gloo: the page itself is launched."""

import doctest
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from benchmarks.many_gpus import compare
from helpers.checkpoints import checkpoint_fault
from helpers.falcon import load_falcon
from helpers.profiles import A100, T4, TINY
from tests.test_notebooks import copy_of_the_tree
from tools import many_gpus
from tools.chat_client import free_port

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
STEPS, SAVED = 4, 2
# Relative. Seen: nothing at all between two processes and one, 1e-5 in the weights with FSDP.
LOSS, WEIGHT = 1e-5, 1e-4

# The page as it is, but for: no dropout (its masks differ between processes), a save at every
# second step, and what is to happen to one process in the midst of one step.
RUN = """
import json, os, signal, sys
from dataclasses import replace
from pathlib import Path

twin, report, where, when, what = sys.argv[1:6]
sys.argv = [twin, *sys.argv[6:]]
root = str(Path(twin).parents[2])
sys.path.insert(0, root)
import torch
import helpers.profiles as profiles
from helpers.training import ProgressLines

rank = os.environ.get("RANK", "0")
torch.nn.Dropout.forward = lambda self, x: x
profiles.TINY = replace(profiles.TINY, eval_steps=2)
begin = ProgressLines.on_step_begin

def strike(self, args, state, control, **kwargs):
    if rank == where and state.global_step + 1 == int(when):
        os.kill(os.getpid(), getattr(signal, what))
    begin(self, args, state, control, **kwargs)

ProgressLines.on_step_begin = strike
if os.environ.get("ACCELERATE_USE_FSDP"):
    from benchmarks.gloo_fsdp import shard_on_cpus
    if what != "as is":
        shard_on_cpus()
written = []
def listen(event, details):
    path, mode = details[:2] if event == "open" else (None, None)
    if path and not isinstance(path, int) and str(mode or "r")[0] in "wxa":  # an int is a pipe
        written.append(str(path))
sys.addaudithook(listen)
page = {"__name__": "__main__", "__file__": twin}
try:
    exec(compile(Path(twin).read_text(), twin, "exec"), page)
finally:
    if "trainer" in page:
        trainer = page["trainer"]
        base = trainer.model.get_base_model().transformer.h[0].mlp.dense_h_to_4h.base_layer.weight
        Path(report, rank + ".json").write_text(json.dumps({
            "losses": [h["loss"] for h in trainer.state.log_history if "loss" in h],
            "held_out": [h["eval_loss"] for h in trainer.state.log_history if "eval_loss" in h],
            "step": trainer.state.global_step,
            "best": trainer.state.best_global_step,
            "here": [base.numel(), getattr(base, "to_local", lambda: base)().numel()],
            "written": [w for w in written if w.startswith(root) or not w.startswith("/")],
        }))
"""


class Run(SimpleNamespace):
    """A launched page: its folder, exit code, output, and what each process reported."""


def launch(folder: Path, n: int = 2, fsdp: bool = False, strike=("-", 0, "-"), **constants) -> Run:
    """Run the page in a copy of the tree, which is made if it is not there; 8 rows a step."""
    root, report = folder / "tree", folder / "report"
    if not root.exists():
        copy_of_the_tree(root)
        for name in ("benchmarks", "configs"):
            (root / name).symlink_to(ROOT / name)
    report.mkdir(exist_ok=True)
    script = folder / "run.py"
    script.write_text(RUN)
    port = ["--num_processes", str(n), "--main_process_port", str(free_port())]
    how = ["--config_file", str(root / "configs/fsdp.yaml")] if fsdp else ["--multi_gpu"]
    start = [*LAUNCH, *port, *how] if n > 1 else [sys.executable]
    fixed = {"PROFILE": "cpu", "BATCH_SIZE": 4, "ACCUMULATION": 2, "MAX_STEPS": STEPS}
    values = [f"{k}={v}" for k, v in (fixed | {"WANDB": "disabled"} | constants).items()]
    twin = root / "notebooks/py/03_qlora_finetuning.py"
    command = [*start, str(script), str(twin), str(report), *map(str, strike), *values]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=240)
    ranks = [json.loads(p.read_text()) for p in sorted(report.glob("*.json"))]
    return Run(root=root, code=done.returncode, out=done.stdout, err=done.stderr, ranks=ranks)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("many")


@pytest.fixture(scope="module")
def alone(base: Path) -> Run:
    (base / "one").mkdir()
    return launch(base / "one", n=1)


@pytest.fixture(scope="module")
def two(base: Path) -> Run:
    (base / "two").mkdir()
    return launch(base / "two", WANDB="offline")


def adapter(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.root / "artifacts/adapter/adapter_model.safetensors")


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of two adapters over the largest weight."""
    assert a.keys() == b.keys()
    largest = max(float(t.abs().max()) for t in a.values())
    return max(float((a[n] - b[n]).abs().max()) for n in a) / largest


def test_two_processes_give_the_losses_and_the_adapter_of_one(alone: Run, two: Run) -> None:
    assert (alone.code, two.code) == (0, 0), alone.err[-2000:] + two.err[-2000:]
    one, first = alone.ranks[0], two.ranks[0]
    assert len(one["losses"]) == STEPS
    assert first["losses"] == pytest.approx(one["losses"], rel=LOSS)
    assert distance(adapter(alone), adapter(two)) < WEIGHT
    # the last batch of the held-out rows is filled up from the first: hence not the same mean
    assert first["held_out"] == pytest.approx(one["held_out"], rel=0.03)


def test_every_process_knows_the_same(two: Run) -> None:
    first, second = two.ranks
    for key in ("losses", "held_out", "step", "best"):
        assert first[key] == second[key]


def test_the_first_process_alone_speaks_and_writes(two: Run) -> None:
    assert two.out.count("finished") == two.out.count("MB in artifacts/adapter") == 1
    assert len(list((two.root / "artifacts/wandb").rglob("*.wandb"))) == 1
    first, second = ({Path(w).name for w in rank["written"]} for rank in two.ranks)
    assert {"README.md", "adapter_config.json"} <= first
    assert second <= {"ended.txt"}, f"the second process wrote {second}"


def test_a_killed_process_ends_the_run_in_a_sentence_and_it_goes_on(base: Path, two: Run) -> None:
    (base / "killed").mkdir()
    killed = launch(base / "killed", strike=(1, SAVED + 1, "SIGKILL"))
    said = "A process of this run has ended, so all end: launch it again to go on from"
    assert killed.code != 0
    assert killed.out.count("A process of this run has ended") == 1
    checkpoints = killed.root / "artifacts/checkpoints"
    assert (checkpoints / "ended.txt").read_text() == f"{said} checkpoint-{SAVED}.\n"
    assert checkpoint_fault(checkpoints / f"checkpoint-{SAVED}") == ""
    again = launch(base / "killed")
    assert again.code == 0, again.err[-2000:]
    assert f"going on from checkpoint-{SAVED}" in again.out
    assert not (checkpoints / "ended.txt").exists()
    assert again.ranks[0]["losses"] == two.ranks[0]["losses"]
    assert distance(adapter(again), adapter(two)) == 0


def test_stop_pressed_in_one_process_stops_all_at_one_step(base: Path) -> None:
    (base / "stopped").mkdir()
    stopped = launch(base / "stopped", strike=(1, 3, "SIGINT"))
    assert stopped.code == 0, stopped.err[-2000:]
    assert [rank["step"] for rank in stopped.ranks] == [3, 3]
    assert checkpoint_fault(stopped.root / "artifacts/checkpoints/checkpoint-3") == ""
    assert "stopped; run this" in stopped.out and "in artifacts/adapter" not in stopped.out


@pytest.fixture(scope="module")
def cut(base: Path) -> Run:
    (base / "sharded").mkdir()
    return launch(base / "sharded", fsdp=True, strike=(0, SAVED + 1, "SIGKILL"))


@pytest.fixture(scope="module")
def sharded(base: Path, cut: Run) -> Run:
    """The run that was cut off, gone on with."""
    return launch(base / "sharded", fsdp=True)


def test_fsdp_holds_half_of_the_base_and_trains_the_same(sharded: Run, alone: Run) -> None:
    assert sharded.code == 0, sharded.err[-2000:]
    whole, here = sharded.ranks[0]["here"]
    assert here * 2 == whole, "the 4-bit base is not cut in two"
    assert sharded.ranks[0]["losses"] == pytest.approx(alone.ranks[0]["losses"], rel=LOSS)
    assert distance(adapter(alone), adapter(sharded)) < WEIGHT


def test_a_sharded_checkpoint_loads_back_in_one_process(sharded: Run, tmp_path: Path) -> None:
    from peft import PeftModel

    newest = sharded.root / f"artifacts/checkpoints/checkpoint-{STEPS}"
    assert checkpoint_fault(newest) == ""
    dcp_to_torch_save(newest / "pytorch_model_fsdp_0", tmp_path / "whole.pt")
    pieces = torch.load(tmp_path / "whole.pt", weights_only=False)["model"]
    file = load_file(newest / "adapter_model.safetensors")
    assert pieces.keys() == file.keys()
    assert all(torch.equal(pieces[name], file[name]) for name in file)
    model = PeftModel.from_pretrained(load_falcon(TINY.model, TINY), newest)
    held = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    assert all(torch.equal(held[name], file[name]) for name in file)


def test_fsdp_goes_on_from_its_own_checkpoint(cut: Run, sharded: Run) -> None:
    assert cut.code != 0 and cut.out.count("A process of this run has ended") == 1
    assert f"going on from checkpoint-{SAVED}" in sharded.out
    assert len(sharded.ranks[0]["losses"]) == STEPS


def test_fsdp_on_cpus_is_refused_and_not_left_out(base: Path) -> None:
    (base / "refused").mkdir()
    refused = launch(base / "refused", fsdp=True, strike=("-", 0, "as is"))
    assert refused.code != 0 and refused.ranks == []
    assert "FSDP needs GPUs, on CPUs Accelerate trains without it" in refused.err


def test_a_step_keeps_its_rows() -> None:
    for n in (1, 2, 4, 8, 16):
        mine = many_gpus.share_step(A100, n)
        assert mine.batch_size * mine.accumulation * n == 64
    with pytest.raises(ValueError, match="64 rows .* 6 processes: launch 2 or 4 or 8, or"):
        many_gpus.share_step(A100, 6)


def test_fsdp_asks_for_bf16_and_brings_its_own_optimizer() -> None:
    assert many_gpus.check_sharded(A100).optim == "adamw_torch"
    with pytest.raises(ValueError, match="tried in bf16 only"):
        many_gpus.check_sharded(T4)


def test_the_storage_changes_the_dtype_and_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    asked: list[int] = []  # of torch, where more threads would stay for every later test
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert many_gpus.quant_storage(A100) is torch.bfloat16
    assert many_gpus.loading(A100).device == "cpu" and asked == [os.cpu_count()]
    plain = load_falcon(TINY.model, TINY).transformer.h[0].mlp.dense_h_to_4h.weight
    other = load_falcon(TINY.model, TINY, storage=torch.float32).transformer.h[0].mlp.dense_h_to_4h
    assert other.weight.dtype is torch.float32
    assert torch.equal(other.weight.data.view(torch.uint8).flatten(), plain.data.flatten())


def test_the_configuration_says_what_the_page_relies_on() -> None:
    config = yaml.safe_load((ROOT / "configs/fsdp.yaml").read_text())
    fsdp = config["fsdp_config"]
    assert (config["distributed_type"], fsdp["fsdp_version"]) == ("FSDP", 2)
    assert fsdp["fsdp_state_dict_type"] == "SHARDED_STATE_DICT"
    assert fsdp["fsdp_transformer_layer_cls_to_wrap"] == "FalconDecoderLayer"
    assert fsdp["fsdp_activation_checkpointing"] is False, "the page has its own, both is refused"


def test_efficiency_is_against_as_many_single_runs() -> None:
    runs = {"a": {"world_size": 1, "useful_tokens_per_s": 100}, "b": {"error": "it died"}}
    runs["c"] = {"world_size": 4, "useful_tokens_per_s": 300}
    assert [run.get("efficiency") for run in compare(runs).values()] == [1.0, None, 0.75]


def test_a_profile_alone_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    profile = replace(TINY, batch_size=3)
    assert many_gpus.join_others(profile, "no/such/folder") is profile


def test_the_arithmetic_on_the_page_of_documentation() -> None:
    outcome = doctest.testfile(str(ROOT / "docs/many-gpus.md"), module_relative=False)
    assert outcome.attempted > 8 and outcome.failed == 0
