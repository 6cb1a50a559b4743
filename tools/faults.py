"""A place to break training runs in: the tiny Falcon, six steps, and ways to end them.

A run is a forked child of this process, so that it can be killed and the model is loaded once.
Six steps of eight rows on the tiny Falcon, saved at every second: small enough for a test.
"""

import gc
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from helpers.checkpoints import (
    CheckpointManifest,
    fingerprint,
    last_valid_checkpoint,
    train_and_survive,
)
from helpers.dialogues import load_dialogues, to_prompt_completion
from helpers.falcon import LINEARS, load_falcon, load_tokenizer, use_fused_attention
from helpers.profiles import TINY
from helpers.training import adapters_to_fp32, row_order

STEPS, SAVE_EVERY, BATCH, ACCUMULATION, LENGTH = 6, 2, 4, 2, 64
ADAPTER = "adapter_model.safetensors"


class Trap(TrainerCallback):
    """Calls `spring(when, step, folder)` inside steps and before saves: the fault."""

    def __init__(self, spring: Callable[[str, int, Path], None]):
        self.spring = spring

    def on_substep_end(self, args, state, control, **kwargs):
        """After a step's first micro-batch: in the midst of step `global_step + 1`."""
        self.spring("in", state.global_step + 1, Path(args.output_dir))

    def on_step_end(self, args, state, control, **kwargs):
        """When the step is done, just before it is saved."""
        self.spring("after", state.global_step, Path(args.output_dir))


@dataclass
class Outcome:
    """What a run left: how it ended, what it said, its losses and the adapter's hash."""

    ended: str = "killed"
    error: str = ""
    resumed: int = 0
    steps: int = 0
    losses: list[float] = field(default_factory=list)
    adapter: str = ""
    said: list[str] = field(default_factory=list)


def kill(out: Path | None = None) -> None:
    """End this process as a runtime ends that is taken away: at once, with nothing tidied up."""
    os.kill(os.getpid(), signal.SIGKILL)


def at(when: str, step: int, act: Callable[[Path], None]) -> Callable[[str, int, Path], None]:
    """A spring for a `Trap`: acts once, in the midst of a step ("in") or at its end ("after")."""

    def spring(now: str, done: int, out: Path) -> None:
        if (now, done) == (when, step):
            act(out)

    return spring


def both(*springs: Callable[[str, int, Path], None]) -> Callable[[str, int, Path], None]:
    """Two springs in one run."""
    return lambda now, done, out: [spring(now, done, out) for spring in springs] and None


class Lab:
    """One model, one set of rows, one folder; and the run that nothing happened to.

    Args:
        folder: an empty one; every run gets a subfolder.
        steps: optimizer steps of a run.
    """

    def __init__(self, folder: Path, steps: int = STEPS):
        torch.set_num_threads(1)
        self.folder, self.steps, self.count = folder, steps, 0
        folder.mkdir(parents=True, exist_ok=True)
        self.model = load_falcon(TINY.model, TINY)
        use_fused_attention(self.model)
        self.tokenizer = load_tokenizer(TINY.model)
        self.pairs = to_prompt_completion(load_dialogues(TINY.dataset)[0])
        pairs = zip(self.pairs["prompt"], self.pairs["completion"], strict=True)
        self.lengths = [len(ids) for ids in self.tokenizer([p + c for p, c in pairs]).input_ids]
        self.killed: dict[bool, Path] = {}
        gc.freeze()  # no child has to look through what it shares with us
        self.reference = self.run(self.new_folder("unbroken"), ours=True)

    def new_folder(self, name: str) -> Path:
        """A folder that is not there yet."""
        self.count += 1
        return self.folder / f"{self.count:02}-{name}"

    def rows(self, settings: dict[str, Any]) -> Dataset:
        """All rows of all steps, in the order laid out from the seed."""
        per_step = settings["batch"] * ACCUMULATION
        order = row_order(self.lengths, per_step, settings["steps"], settings["seed"])
        return Dataset.from_dict(self.pairs.select(order).to_dict())

    def trainer(self, out: Path, settings: dict[str, Any], callbacks: list) -> tuple:
        """The trainer of notebook 03 in small, and the run's fingerprint."""
        args = SFTConfig(
            output_dir=str(out), max_steps=settings["steps"], learning_rate=1e-3,
            per_device_train_batch_size=settings["batch"], gradient_accumulation_steps=ACCUMULATION,
            lr_scheduler_type="cosine", warmup_steps=0.03, max_grad_norm=0.3,
            max_length=LENGTH, train_sampling_strategy="sequential", logging_steps=1,
            save_strategy="steps", save_steps=settings["save_every"], save_total_limit=2,
            bf16=False, use_cpu=True, report_to="none", disable_tqdm=True, seed=settings["seed"],
            activation_checkpointing=False,
        )  # fmt: skip
        lora = LoraConfig(r=settings["rank"], lora_alpha=8, lora_dropout=0.05, bias="none",
                          task_type="CAUSAL_LM", target_modules=list(LINEARS))  # fmt: skip
        rows = self.rows(settings)
        mark = fingerprint(args, lora, rows, base=TINY.model)
        set_seed(settings["seed"])
        trainer = SFTTrainer(self.model, args=args, train_dataset=rows, peft_config=lora,
                             processing_class=self.tokenizer, callbacks=callbacks)  # fmt: skip
        adapters_to_fp32(trainer)
        return trainer, mark

    def work(self, out: Path, outcome: Outcome, ours: bool, mirror, spring, fresh, **changed):
        """What a child does: build, find the checkpoint, train, save."""
        settings = {"steps": self.steps, "save_every": SAVE_EVERY, "batch": BATCH, "seed": 0}
        settings |= {"rank": 8} | changed
        trap = spring if isinstance(spring, Trap) else Trap(spring) if spring else None
        trainer, mark = self.trainer(out, settings, [trap] if trap else [])
        if ours:
            keeper = CheckpointManifest(mark, mirror=mirror, say=outcome.said.append)
            trainer.add_callback(keeper)
            resume = None if fresh else last_valid_checkpoint(out, mark, mirror=mirror)
        else:
            resume = None if fresh or not out.exists() else get_last_checkpoint(out)
        outcome.resumed = int(resume.split("-")[-1]) if resume else 0
        if not ours:
            trainer.train(resume_from_checkpoint=resume)
        elif not train_and_survive(trainer, resume):  # stopped: the cell is run again
            resume = last_valid_checkpoint(out, mark, mirror=mirror)
            outcome.resumed = int(resume.split("-")[-1])
            train_and_survive(trainer, resume)
        outcome.steps = trainer.state.global_step
        outcome.losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        trainer.save_model(str(out / "final"))
        outcome.adapter = hashlib.sha256((out / "final" / ADAPTER).read_bytes()).hexdigest()

    def start(self, out: Path, ours: bool, mirror=None, spring=None, fresh=False, patch=None,
              **changed) -> tuple[int, Path]:  # fmt: skip
        """Fork a run; returns its process id and where its outcome will stand."""
        self.count += 1
        report = self.folder / f"{self.count:02}-outcome.json"
        sys.stdout.flush()
        if pid := os.fork():
            return pid, report
        outcome = Outcome("finished")
        log = os.open(report.with_suffix(".log"), os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with patch or nullcontext():
                self.work(out, outcome, ours, mirror, spring, fresh, **changed)
        except BaseException as error:
            outcome.ended, outcome.error = "raised", f"{type(error).__name__}: {error}"
        report.write_text(json.dumps(vars(outcome)))
        os._exit(0)

    def wait(self, pid: int, report: Path) -> Outcome:
        """The outcome of a child that has ended, however it did."""
        os.waitpid(pid, 0)
        return Outcome(**json.loads(report.read_text())) if report.exists() else Outcome()

    def run(self, out: Path, ours: bool, **how) -> Outcome:
        """One run, from its start or its last checkpoint to its end."""
        return self.wait(*self.start(out, ours, **how))

    def killed_run(self, ours: bool) -> Path:
        """A copy of the folder of a run that was killed within its last step, five being done."""
        if ours not in self.killed:
            self.killed[ours] = self.new_folder("killed")
            self.run(self.killed[ours], ours, spring=at("in", self.steps, kill))
        out = self.new_folder("broken")
        return Path(shutil.copytree(self.killed[ours], out))

    def equal(self, outcome: Outcome) -> bool:
        """True if losses and adapter are those of the unbroken run, to the last bit."""
        wanted = self.reference
        return (outcome.losses, outcome.adapter) == (wanted.losses, wanted.adapter)
