"""Kill page 03's training on a GPU, let it go on, and compare with runs that nothing happened to.

    python benchmarks/resume_gpu.py MODEL=falcon-7b-random DATASET=rows.jsonl PROFILE=a100

Sections 1 to 6 of the page itself build every trainer. In bf16 (profile a100) and in fp16 with its
loss scale (profile t4) it trains `RUNS` times unbroken, once until SIGKILL in the midst of a step,
and goes on from the last checkpoint. On a GPU two unbroken runs may differ: their greatest
distance is the noise. The resumed run counts as equal if it is at most twice as far from any of
them; where they are equal to the last bit, it must be too. A control goes on without optimizer and
loss scale, as the plain Trainer does when those files are lost: it must be told apart.

Also asked of each precision: does an adapter loaded back give equal logits, bit for bit?
Writes results/<gpu>/resume.json; TO=FILE names another file. On a CPU it rehearses in fp32.
"""

import gc
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import TrainerCallback

from helpers.checkpoints import (
    CheckpointManifest,
    checkpoint_fault,
    last_valid_checkpoint,
    train_and_survive,
    write_manifest,
)
from helpers.profiles import GIB, detect_profile
from tools.faults import Trap, at, kill
from tools.mends import undo_mends
from tools.results import write_result

TWIN = ROOT / "notebooks/py/03_qlora_finetuning.py"
STEPS, SAVE_EVERY, KILLED_IN = 8, 2, 6
PRECISIONS = {"cpu": {"fp32": "cpu"}, "t4": {"fp16": "t4"}, "a100": {"bf16": "a100", "fp16": "t4"}}
SMALL = {"BATCH_SIZE": "4", "ACCUMULATION": "2", "MAX_LENGTH": "256", "RUNS": "3"}
WEIGHTS = "adapter_model.safetensors"


# --- one run, in a process that may be killed -----------------------------------------------


def page(arguments: list[str], out: Path) -> dict[str, Any]:
    """Sections 1 to 6 of the page, run with these constants; returns its globals."""
    head, training = TWIN.read_text().split("# ## 7. Train")
    assert training, "page 03 has another section 7"
    fixed = [f"MAX_STEPS={STEPS}", f"OUTPUT={out}", "EARLY_STOP=False", "WANDB=disabled"]
    sys.argv = [str(TWIN), *arguments, *fixed]
    space: dict[str, Any] = {"__name__": "page", "__file__": str(TWIN)}
    exec(compile(head, str(TWIN), "exec"), space)
    args = space["trainer"].args
    args.save_steps, args.eval_strategy, args.eval_on_start = SAVE_EVERY, "no", False
    args.load_best_model_at_end = False
    if space["trainer"].accelerator.scaler:  # one that grows while we look, and from low down
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=2)
        space["trainer"].accelerator.scaler = scaler
    return space


def train(arguments: list[str], out: Path, callbacks: list[TrainerCallback]) -> tuple[dict, dict]:
    """Build a trainer and train, from the last valid checkpoint in `out` if there is one."""
    space = page(arguments, out)
    trainer, mark = space["trainer"], space["mark"]
    for callback in [*callbacks, CheckpointManifest(mark)]:
        trainer.add_callback(callback)
    resume = last_valid_checkpoint(out, mark)
    began = time.perf_counter()
    train_and_survive(trainer, resume)
    scaler, optimizer = trainer.accelerator.scaler, trainer.optimizer.optimizer
    states = [t for state in optimizer.state.values() for t in state.values()]
    dtypes = {str(p.dtype)[6:] for p in trainer.model.parameters() if p.requires_grad}
    return space, {
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "resumed_from": int(resume.split("-")[-1]) if resume else 0,
        "loss_scale": scaler.get_scale() if scaler else None,
        "adapters_in": ", ".join(sorted(dtypes)),
        "paged_states": sum(getattr(t, "is_paged", False) for t in states),
        "seconds": round(time.perf_counter() - began, 1),
    }


def loads_back(space: dict[str, Any], out: Path) -> dict[str, bool | float]:
    """Does the saved adapter give the logits of the trained one? Ends the trainer's model.

    Both are asked in eval mode, without mends and the trainer's autocast, with adapters in 32
    bits (what a 16-bit file holds fits exactly), over the same 4-bit base. If the two answers
    differ, the other two say why: the same model twice shows whether a kernel sums in varying
    order, and the file read into the layers in place leaves out all that taking off and putting
    on may change.
    """
    trainer, folder = space["trainer"], out / "adapter"
    trainer.save_model(str(folder))
    trained = trainer.accelerator.unwrap_model(trainer.model).eval()
    vars(trained).pop("forward", None)
    undo_mends(trained)
    for weight in trained.parameters():
        weight.data = weight.data.float() if weight.requires_grad else weight.data
    ids = torch.tensor([space["row"]["input_ids"]], device=space["profile"].device)

    @torch.no_grad()
    def logits(model: torch.nn.Module) -> torch.Tensor:
        return model(input_ids=ids).logits

    before, again = logits(trained), logits(trained)
    with trained.disable_adapter():
        bare = logits(trained)
    for weight in trained.parameters():
        weight.data = weight.data.zero_() if weight.requires_grad else weight.data
    set_peft_model_state_dict(trained, load_peft_weights(str(folder)))
    in_place = logits(trained)
    after = logits(PeftModel.from_pretrained(trained.unload(), str(folder)).eval())
    return {
        "tokens": ids.shape[1],
        "same_model_twice_equal": torch.equal(before, again),
        "read_in_place_equal": torch.equal(before, in_place),
        "loaded_back_equal": torch.equal(before, after),
        "largest_difference": (before - after).abs().max().item(),
        "differs_from_bare_base": not torch.equal(before, bare),
    }


def child(role: str, folder: Path, arguments: list[str], runs: int) -> None:
    """What a process does: all unbroken runs; the run that is killed; or the two that go on."""
    names = {
        "unbroken": [f"unbroken-{n}" for n in range(runs)],
        "killed": ["killed"],
        "resumed": ["killed", "control"],
    }[role]
    trap = [Trap(at("in", KILLED_IN, kill))] if role == "killed" else []
    for name in names:
        if name == "control":
            lose_state(folder / "left-by-the-kill", folder / name)
        elif role == "resumed":
            shutil.copytree(folder / name, folder / "left-by-the-kill")
        space, outcome = train(arguments, folder / name, trap)
        if name == "unbroken-0":
            outcome["loads_back"] = loads_back(space, folder / name)
        (folder / name / "outcome.json").write_text(json.dumps(outcome))
        space.clear()
        gc.collect()
        torch.cuda.empty_cache()


def lose_state(source: Path, target: Path) -> None:
    """Copy a run's folder without optimizer and loss scale, sealed as if nothing were missing."""
    lost = shutil.ignore_patterns("optimizer.pt", "scaler.pt", "run.lock")
    shutil.copytree(source, target, ignore=lost)
    for path in target.glob("checkpoint-*"):
        if (path / "manifest.json").exists():
            old = json.loads((path / "manifest.json").read_text())
            write_manifest(path, old["step"], old["fingerprint"])


# --- the comparison -------------------------------------------------------------------------


def start(role: str, folder: Path, arguments: list[str]) -> None:
    """Run a child to its end, or to its death if that is its part."""
    command = [sys.executable, __file__, "--child", role, str(folder), *arguments]
    log = folder / f"{role}.log"
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=folder).returncode
    if code != (-9 if role == "killed" else 0):
        sys.exit(f"the {role} run ended with {code}:\n{log.read_text()[-3000:]}")


def loss_distance(one: dict, other: dict) -> float:
    """The greatest difference of two runs' losses in any step, in nats a token."""
    pairs = zip(one["losses"], other["losses"], strict=True)
    return max(abs(a - b) for a, b in pairs)


def adapter_distance(one: dict, other: dict) -> float:
    """How far two adapters' B matrices lie apart, relative to what was learned: B began at 0."""
    a, b = one["weights"], other["weights"]
    names = [name for name in a if "lora_B" in name]
    apart = sum((a[n].double() - b[n].double()).square().sum() for n in names)
    return float((apart / sum(a[n].double().square().sum() for n in names)).sqrt())


def compared(unbroken: list[dict], other: dict, distance) -> dict[str, float | bool]:
    """The distance of a run from the unbroken ones beside theirs from each other."""
    noise = max(distance(a, b) for a, b in itertools.combinations(unbroken, 2))
    apart = max(distance(a, other) for a in unbroken)
    return {"noise": noise, "distance": apart, "within": apart <= 2 * noise}


def read_run(folder: Path) -> dict[str, Any]:
    """A run's outcome with its last checkpoint's adapter."""
    last = folder / f"checkpoint-{STEPS}"
    assert not checkpoint_fault(last), checkpoint_fault(last)
    return json.loads((folder / "outcome.json").read_text()) | {
        "weights": load_file(last / WEIGHTS)
    }


def measure(profile: str, folder: Path, arguments: list[str], runs: int) -> dict[str, Any]:
    """All runs in one precision, and what they show."""
    folder.mkdir()
    arguments = [*arguments, f"PROFILE={profile}"]
    for role in ("unbroken", "killed", "resumed"):
        began = time.perf_counter()
        start(role, folder, [f"RUNS={runs}", *arguments])
        print(f"{folder.name}: {role}, {time.perf_counter() - began:.0f} s", flush=True)
    unbroken = [read_run(folder / f"unbroken-{n}") for n in range(runs)]
    resumed, control = read_run(folder / "killed"), read_run(folder / "control")
    losses = compared(unbroken, resumed, loss_distance)
    adapters = compared(unbroken, resumed, adapter_distance)
    lost = compared(unbroken, control, adapter_distance)
    shown = ("loss_scale", "adapters_in", "paged_states")
    figures = {
        "killed_in_step": KILLED_IN,
        "resumed_from_step": resumed["resumed_from"],
        "losses": {"unbroken": [r["losses"] for r in unbroken], "resumed": resumed["losses"]},
        "loss": losses,
        "adapter": adapters,
        "control_without_optimizer": lost,
        "unbroken": {name: unbroken[0][name] for name in shown},
        "resumed": {name: resumed[name] for name in shown},
        "loads_back": unbroken[0]["loads_back"],
        "training_seconds": unbroken[0]["seconds"],
    }
    checks = {
        "went on from the last checkpoint": resumed["resumed_from"] == KILLED_IN - SAVE_EVERY,
        "losses within noise": losses["within"],
        "adapter within noise": adapters["within"],
        "same loss scale": resumed["loss_scale"] == unbroken[0]["loss_scale"],
        "same adapter dtype": resumed["adapters_in"] == unbroken[0]["adapters_in"],
        "control told apart": not lost["within"],
        "loaded back, logits equal": unbroken[0]["loads_back"]["loaded_back_equal"],
    }
    return figures | {"checks": checks, "passed": all(checks.values())}


def main() -> None:
    """Measure every precision that the profile has, two at a time where they fit."""
    given = SMALL | dict(a.split("=", 1) for a in sys.argv[1:])
    given |= {n: str(Path(v).resolve()) for n, v in given.items() if Path(v).exists()}
    target, runs = given.pop("TO", None), int(given.pop("RUNS"))
    profile = detect_profile(given.pop("PROFILE", "auto"))
    shown = [f"{a.split('=', 1)[0]}={Path(a.split('=', 1)[1]).name}" for a in sys.argv[1:]]
    arguments = [f"{name}={value}" for name, value in given.items()]
    memory = torch.cuda.get_device_properties(0).total_memory if profile.on_gpu else 0
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as top, ThreadPoolExecutor(1 + (memory > 40 * GIB)) as pool:
        jobs = {
            name: pool.submit(measure, profile_name, Path(top) / name, arguments, runs)
            for name, profile_name in PRECISIONS[profile.name].items()
        }
        figures: dict[str, Any] = {name: job.result() for name, job in jobs.items()}
    figures["wall_seconds"] = round(time.perf_counter() - began)
    for name in PRECISIONS[profile.name]:
        print(name, json.dumps(figures[name]["checks"], indent=1))
    command = " ".join(["python benchmarks/resume_gpu.py", *shown])
    what = "Falcon-7B of random weights: training killed and resumed, against unbroken runs"
    print(write_result("resume", figures, what, command, out=target))
    if not all(figures[name]["passed"] for name in PRECISIONS[profile.name]):
        sys.exit("not all checks passed")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        role, folder, runs, *arguments = sys.argv[2:]
        child(role, Path(folder), arguments, int(runs.split("=")[1]))
    else:
        main()
