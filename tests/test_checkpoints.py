"""Checkpoints that prove themselves: every promise of the module on folders of a few bytes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import trainer_utils
from trl import SFTConfig

from helpers import checkpoints
from helpers.checkpoints import (
    HERE,
    MANIFEST,
    CheckpointManifest,
    checkpoint_fault,
    find_adapter,
    fingerprint,
    last_valid_checkpoint,
    train_and_survive,
    write_manifest,
)
from helpers.falcon import LINEARS, load_falcon
from helpers.profiles import TINY
from tools import handover
from tools.handover import hand_over, start_wandb, write_model_card

MARK = {"seed": 0, "max_steps": 9}
FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")
LOCKER = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("locked", flush=True)
time.sleep(60)
"""


def unsealed(folder: Path, step: int) -> Path:
    """A checkpoint as the trainer leaves it."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in FILES:
        (path / name).write_bytes(f"{name} of step {step}".encode() * 20)
    return path


def sealed(folder: Path, step: int, mark: dict = MARK) -> Path:
    path = unsealed(folder, step)
    write_manifest(path, step, mark)
    return path


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("checkpoint*"))


class Run:
    """The callback, and what a trainer would hand it."""

    def __init__(self, out: Path, mirror: Path | None = None, limit: int | None = 2):
        self.said: list[str] = []
        self.keeper = CheckpointManifest(MARK, mirror=mirror, say=self.said.append)
        still = SimpleNamespace(wait_for_everyone=lambda: None)
        self.args = SimpleNamespace(
            output_dir=str(out), save_total_limit=limit, distributed_state=still
        )
        self.state = SimpleNamespace(
            global_step=0, is_world_process_zero=True, best_model_checkpoint=None
        )
        self.control = SimpleNamespace(should_save=False, should_training_stop=False)
        self.out, self.model = out, torch.nn.Linear(2, 2)
        out.mkdir(parents=True, exist_ok=True)

    def call(self, event: str) -> None:
        handler = getattr(self.keeper, event)
        handler(self.args, self.state, self.control, model=self.model)

    def begin(self, step: int = 0) -> "Run":
        self.state.global_step = step
        self.call("on_train_begin")
        return self

    def save(self, step: int) -> None:
        self.state.global_step = step
        unsealed(self.out, step)
        self.call("on_save")


# --- one checkpoint -------------------------------------------------------------------------


def test_a_manifest_seals_every_file(tmp_path: Path) -> None:
    path = sealed(tmp_path, 2)
    written = json.loads((path / MANIFEST).read_text())
    assert sorted(written["files"]) == sorted(FILES)
    assert (written["step"], written["fingerprint"]) == (2, MARK)
    assert checkpoint_fault(path) == ""
    write_manifest(path, 2, MARK)
    assert checkpoint_fault(path) == "", "written twice, it must not seal itself"


def test_a_manifest_appears_last_and_at_once(tmp_path: Path, monkeypatch) -> None:
    path = unsealed(tmp_path, 2)

    def die(source, target):
        assert json.loads(Path(source).read_text())["step"] == 2, "complete before it is named"
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        write_manifest(path, 2, MARK)
    assert "manifest.json cannot be read" in checkpoint_fault(path)


def test_a_manifest_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(checkpoints.os, "fsync", lambda fd: calls.append("fsync") or fsync(fd))
    monkeypatch.setattr(
        checkpoints.os, "replace", lambda a, b: calls.append("replace") or replace(a, b)
    )
    sealed(tmp_path, 2)
    assert calls == ["fsync", "replace"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "grown"])
def test_each_file_is_checked(tmp_path: Path, name: str, damage: str) -> None:
    file = sealed(tmp_path, 2) / name
    data = file.read_bytes()
    new = {"cut": data[:-1], "flipped": data[:-1] + b"\0", "grown": data + b"\0"}
    file.unlink() if damage == "missing" else file.write_bytes(new[damage])
    assert name in checkpoint_fault(file.parent)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3}', '{"files": {"a": [1, "b"]}}'])
def test_a_broken_manifest_is_a_fault_and_no_crash(tmp_path: Path, text: str) -> None:
    path = sealed(tmp_path, 2)
    (path / MANIFEST).write_text(text)
    assert checkpoint_fault(path)


# --- which checkpoint to go on from ---------------------------------------------------------


def test_the_newest_whole_one_is_taken_and_damaged_ones_are_named(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        sealed(tmp_path, step)
    assert last_valid_checkpoint(tmp_path, MARK) == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10/optimizer.pt").unlink()
    unsealed(tmp_path, 11)
    assert last_valid_checkpoint(tmp_path, MARK) == str(tmp_path / "checkpoint-9")
    assert names(tmp_path) == [
        "checkpoint-10.damaged", "checkpoint-11.damaged", "checkpoint-2", "checkpoint-9",
    ]  # fmt: skip
    reason = (tmp_path / "checkpoint-10.damaged/reason.txt").read_text()
    assert reason == "optimizer.pt cannot be read\n"
    unsealed(tmp_path, 11)
    last_valid_checkpoint(tmp_path, MARK)
    assert (tmp_path / "checkpoint-11.damaged1").is_dir(), "an earlier one is not overwritten"


def test_nothing_there_is_a_fresh_start(tmp_path: Path) -> None:
    assert last_valid_checkpoint(tmp_path / "none", MARK) is None
    assert last_valid_checkpoint(tmp_path, MARK) is None
    unsealed(tmp_path, 2)
    assert last_valid_checkpoint(tmp_path, MARK) is None


def test_a_changed_fingerprint_is_refused_in_words(tmp_path: Path) -> None:
    sealed(tmp_path, 2)
    changed = {"seed": 1, "max_steps": 9, "trl": "9.9"}
    with pytest.raises(ValueError) as refusal:
        last_valid_checkpoint(tmp_path, changed)
    text = str(refusal.value)
    assert "seed was 0 and is now 1; trl was None and is now 9.9" in text
    assert "max_steps" not in text and "\n" not in text
    assert "FORCE_RESUME = True" in text and "RESUME = False" in text
    found = last_valid_checkpoint(tmp_path, changed, force=True)
    assert found == str(tmp_path / "checkpoint-2")


def mark_of(rows=("a", "b"), base="you/falcon", lora=None, **settings) -> dict:
    args = SFTConfig(output_dir="x", **{"use_cpu": True, "bf16": False, "max_steps": 9} | settings)
    given = dict(r=4, lora_alpha=4, lora_dropout=0.1, target_modules=["dense", "fc"], bias="none")
    return fingerprint(args, LoraConfig(**given | (lora or {})), [{"text": r} for r in rows], base)


@pytest.mark.parametrize(
    "change",
    [
        dict(seed=1), dict(max_steps=8), dict(per_device_train_batch_size=3), dict(bf16=True),
        dict(gradient_accumulation_steps=2), dict(learning_rate=1.0), dict(max_length=7),
        dict(lr_scheduler_type="cosine"), dict(warmup_steps=5), dict(max_grad_norm=0.3),
        dict(optim="sgd"), dict(train_sampling_strategy="sequential"), dict(rows=("b", "a")),
        dict(rows=("a",)), dict(base="you/llama"), dict(lora=dict(r=8)),
        dict(lora=dict(bias="all")), dict(lora=dict(lora_alpha=8)),
        dict(lora=dict(lora_dropout=0.0)),
        dict(lora=dict(target_modules=["dense"])), dict(lora=dict(use_rslora=True)),
        dict(lora=dict(target_modules="all-linear")),
    ],
    ids=str,
)  # fmt: skip
def test_all_that_decides_a_run_changes_its_fingerprint(change: dict) -> None:
    before, after = mark_of(), mark_of(**change)
    assert len([word for word in before if before[word] != after[word]]) == 1


def test_a_fingerprint_is_flat_json_and_leaves_out_what_decides_nothing() -> None:
    mark = mark_of()
    assert json.loads(json.dumps(mark)) == mark
    assert all(isinstance(v, str | int | float | list | None) for v in mark.values())
    assert mark["LoRA target_modules"] == ["dense", "fc"], "a set has no order"
    same = dict(logging_steps=7, save_steps=7, save_total_limit=7, output_dir="y")
    assert fingerprint(
        SFTConfig(use_cpu=True, bf16=False, max_steps=9, **same),
        LoraConfig(r=4, lora_alpha=4, lora_dropout=0.1, target_modules=["fc", "dense"]),
        [{"text": "a"}, {"text": "b"}], "a/copy/of/falcon",
    ) == mark  # fmt: skip


def test_a_library_of_another_version_changes_the_fingerprint(monkeypatch) -> None:
    before = mark_of()
    monkeypatch.setattr(checkpoints, "version", lambda name: "9.9")
    after = mark_of()
    assert [word for word in before if before[word] != after[word]] == list(checkpoints.PACKAGES)


# --- while training -------------------------------------------------------------------------


def test_a_save_is_sealed_before_old_ones_go(tmp_path: Path, monkeypatch) -> None:
    run = Run(tmp_path, limit=1).begin()
    run.save(2)
    assert checkpoint_fault(tmp_path / "checkpoint-2") == ""

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints, "write_manifest", full)
    run.save(4)
    assert "checkpoint-2" in names(tmp_path), "the last whole one went before the next was sealed"
    assert len(run.said) == 1 and "No space left" in run.said[0] and "goes on" in run.said[0]


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (1, None, [8]), (1, 2, [2, 8]), (2, None, [6, 8]), (2, 4, [4, 8]), (3, 2, [2, 6, 8]),
        (2, 8, [6, 8]), (None, None, [2, 4, 6, 8]),
    ],
)  # fmt: skip
def test_neither_the_best_nor_the_last_is_deleted(
    tmp_path: Path, limit: int | None, best: int | None, left: list[int]
) -> None:
    run = Run(tmp_path / "out", tmp_path / "drive", limit).begin()
    if best:
        run.state.best_model_checkpoint = f"{tmp_path}/out/checkpoint-{best}"
    for step in (2, 4, 6, 8):
        run.save(step)
    for place in ("out", "drive"):
        assert names(tmp_path / place) == [f"checkpoint-{step}" for step in left]


def test_a_clock_set_back_deletes_nothing_new(tmp_path: Path) -> None:
    run = Run(tmp_path / "ours").begin()
    for folder in (tmp_path / "ours", tmp_path / "plain"):
        for step in (2, 4):
            path = sealed(folder, step)
            os.utime(path, (path.stat().st_mtime + 86_400,) * 2)
    unsealed(tmp_path / "plain", 6)
    trainer_utils.rotate_checkpoints(str(tmp_path / "plain"), 2, use_mtime=True)
    assert names(tmp_path / "plain") == ["checkpoint-2", "checkpoint-4"], "mended in transformers?"
    run.save(6)
    assert names(tmp_path / "ours") == ["checkpoint-4", "checkpoint-6"]


def test_the_trainers_own_deleting_is_off_while_training(tmp_path: Path) -> None:
    run = Run(tmp_path, limit=3).begin()
    assert run.args.save_total_limit is None and run.keeper.limit == 3
    run.begin()  # after an exception `on_train_end` was never called
    assert run.keeper.limit == 3
    run.call("on_train_end")
    assert run.args.save_total_limit == 3


def test_a_fresh_start_sets_aside_what_an_earlier_run_left(tmp_path: Path) -> None:
    out, drive = tmp_path / "out", tmp_path / "drive"
    for folder in (out, drive):
        for step in (2, 4, 6):
            sealed(folder, step)
    Run(out, drive).begin(step=4)
    assert names(out) == names(drive) == ["checkpoint-2", "checkpoint-4", "checkpoint-6.older"]
    Run(out, drive).begin()
    assert last_valid_checkpoint(out, MARK, mirror=drive) is None
    assert len(names(out)) == 3, "nothing was deleted"


def test_no_room_leaves_the_save_out_in_one_sentence(tmp_path: Path, monkeypatch) -> None:
    run = Run(tmp_path).begin()
    usage = SimpleNamespace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    run.call("on_step_end")
    assert run.said == [], "looked at when nothing was to be saved"
    run.control.should_save = True
    run.call("on_step_end")
    assert not run.control.should_save and not run.control.should_training_stop
    assert len(run.said) == 1 and "was not saved, training goes on" in run.said[0]
    assert "\n" not in run.said[0] and "GB free" in run.said[0]
    usage.free, run.control.should_save = 10**9, True
    run.call("on_step_end")
    assert run.control.should_save
    with pytest.raises(OSError, match="GB free"):
        usage.free = 10
        Run(tmp_path).begin()


def test_the_room_wanted_grows_with_the_adapters(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=800_000_000))
    layer = torch.nn.Linear(65_273_856, 1, bias=False, device="meta")  # Falcon-7B's adapters
    with pytest.raises(OSError, match="0.8 GB free and the checkpoints need 0.8 GB"):
        run = Run(tmp_path)
        run.model = layer
        run.begin()
    layer.weight.requires_grad = False
    run.begin()


def test_a_folder_that_cannot_be_written_to_is_refused_at_the_start(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OSError, match="cannot write to .*: choose another OUTPUT"):
        Run(tmp_path).begin()


def test_a_second_run_in_the_folder_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    sealed(tmp_path, 2)
    command = [sys.executable, "-c", LOCKER, str(tmp_path / checkpoints.LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "locked\n"
        with pytest.raises(RuntimeError, match="another run is in .*: end it, or change OUTPUT"):
            Run(tmp_path).begin()
        assert names(tmp_path) == ["checkpoint-2"], "it touched the first run's checkpoints"
        other.send_signal(signal.SIGKILL)
    run = Run(tmp_path).begin()
    Run(tmp_path).begin()  # the same notebook, after a crash
    run.call("on_train_end")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "locked\n", "the folder was not freed"
        other.kill()


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    sealed(tmp_path / "out", 2)
    run = Run(tmp_path / "out", tmp_path / "drive")
    run.state.is_world_process_zero = False
    run.begin()
    run.save(4)
    run.call("on_train_end")
    assert names(tmp_path / "out") == ["checkpoint-2", "checkpoint-4"]
    assert not (tmp_path / "out/checkpoint-4" / MANIFEST).exists()
    assert not (tmp_path / "out" / checkpoints.LOCK).exists() and not (tmp_path / "drive").exists()


def test_other_processes_do_not_mend(tmp_path: Path, monkeypatch) -> None:
    unsealed(tmp_path, 2)
    monkeypatch.setenv("RANK", "1")
    last_valid_checkpoint(tmp_path, MARK)
    assert names(tmp_path) == ["checkpoint-2"]


# --- the second folder ----------------------------------------------------------------------


def test_what_is_saved_is_copied_and_checked(tmp_path: Path, monkeypatch) -> None:
    out, drive = tmp_path / "out", tmp_path / "drive"
    run = Run(out, drive).begin()
    run.save(2)
    assert checkpoint_fault(drive / "checkpoint-2") == "" and run.said == []

    def flip(source, target, **kwargs):
        Path(target).write_bytes(Path(source).read_bytes()[::-1])

    monkeypatch.setattr(checkpoints.shutil, "copyfile", flip)
    run.save(4)
    assert names(drive) == ["checkpoint-2", "checkpoint.copying"]
    assert len(run.said) == 1 and "goes on" in run.said[0]
    monkeypatch.undo()
    run.save(6)
    assert names(drive) == ["checkpoint-4", "checkpoint-6"], "what was missed is copied later"


def test_a_drive_that_vanishes_is_not_made_anew(tmp_path: Path) -> None:
    drive = tmp_path / "drive/MyDrive/falcon"
    drive.parent.mkdir(parents=True)
    run = Run(tmp_path / "out", drive).begin()
    run.save(2)
    (tmp_path / "drive").rename(tmp_path / "away")
    run.save(4)
    assert not (tmp_path / "drive").exists()
    assert len(run.said) == 1 and "mount it again" in run.said[0]
    drive.mkdir(parents=True)  # a mount point may stay behind as an empty folder
    run.save(6)
    assert names(drive) == [] and len(run.said) == 2
    shutil.rmtree(tmp_path / "drive")
    (tmp_path / "away").rename(tmp_path / "drive")
    run.save(8)
    assert names(drive) == ["checkpoint-6", "checkpoint-8"] and len(run.said) == 2
    assert names(tmp_path / "out") == ["checkpoint-6", "checkpoint-8"]


def test_a_drive_that_was_never_there_is_not_made(tmp_path: Path) -> None:
    run = Run(tmp_path / "out", tmp_path / "drive/MyDrive/falcon").begin()
    run.save(2)
    assert not (tmp_path / "drive").exists() and len(run.said) == 1


def test_a_full_drive_is_said_and_nothing_half_is_left(tmp_path: Path, monkeypatch) -> None:
    run = Run(tmp_path / "out", tmp_path / "drive").begin()
    whole = shutil.disk_usage(tmp_path)
    free = {"drive": 10}
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: whole._replace(free=free.get(Path(path).name, 10**12))
    )
    run.save(2)
    assert names(tmp_path / "drive") == [] and "GB free" in run.said[0]


def test_a_fresh_runtime_goes_on_from_the_mirror(tmp_path: Path) -> None:
    drive, out = tmp_path / "drive", tmp_path / "new/out"
    for step in (2, 4):
        sealed(drive, step)
    unsealed(drive, 6)
    found = last_valid_checkpoint(out, MARK, mirror=drive)
    assert found == str(out / "checkpoint-4")
    assert names(out) == ["checkpoint-2", "checkpoint-4"], "the best one may be the older"
    assert checkpoint_fault(Path(found)) == ""
    (drive / HERE).touch()
    assert names(drive) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_a_damaged_checkpoint_is_healed_from_the_mirror(tmp_path: Path) -> None:
    for folder in ("out", "drive"):
        for step in (2, 4):
            sealed(tmp_path / folder, step)
    for step in (2, 4):
        (tmp_path / f"out/checkpoint-{step}/optimizer.pt").unlink()
    found = last_valid_checkpoint(tmp_path / "out", MARK, mirror=tmp_path / "drive")
    assert found == str(tmp_path / "out/checkpoint-4")
    assert (tmp_path / "out/checkpoint-4.damaged").exists()
    assert checkpoint_fault(tmp_path / "out/checkpoint-2") == "", "the older may be the best"


# --- the Stop button ------------------------------------------------------------------------


def test_stop_saves_and_ends_after_the_step_and_at_once_when_pressed_again(tmp_path: Path) -> None:
    run = Run(tmp_path)
    handler = signal.getsignal(signal.SIGINT)

    def train(resume_from_checkpoint):
        assert resume_from_checkpoint == "here"
        run.begin()
        for _ in range(presses):
            os.kill(os.getpid(), signal.SIGINT)
        run.call("on_step_end")

    callbacks = SimpleNamespace(callbacks=[object(), run.keeper])
    trainer = SimpleNamespace(
        train=train, callback_handler=callbacks, args=run.args, model=torch.nn.Linear(1, 1)
    )
    presses = 0
    assert train_and_survive(trainer, "here") and run.said == []
    assert not run.control.should_training_stop
    presses = 1
    assert not train_and_survive(trainer, "here")
    assert run.control.should_save and run.control.should_training_stop
    assert len(run.said) == 1 and "Stop again" in run.said[0]
    presses = 2
    assert not train_and_survive(trainer, "here")
    assert "Stopped at once" in run.said[-1]
    presses = 0
    assert train_and_survive(trainer, "here"), "an earlier press was remembered"
    assert signal.getsignal(signal.SIGINT) is handler


def test_other_errors_are_not_swallowed(tmp_path: Path) -> None:
    run = Run(tmp_path)
    handler = signal.getsignal(signal.SIGINT)

    def train(resume_from_checkpoint):
        raise RuntimeError("full")

    callbacks = SimpleNamespace(callbacks=[run.keeper])
    with pytest.raises(RuntimeError, match="full"):
        train_and_survive(SimpleNamespace(train=train, callback_handler=callbacks), None)
    assert signal.getsignal(signal.SIGINT) is handler


# --- from page to page ----------------------------------------------------------------------


def adapter(folder: Path, hidden_size: int = 8, base: str = "you/falcon") -> Path:
    folder.mkdir(parents=True)
    config = {"base_model_name_or_path": base, "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    layer = "base_model.model.transformer.h.0"
    weights = {f"{layer}.self_attention.query_key_value.lora_A.weight": torch.ones(2, hidden_size)}
    weights[f"{layer}.mlp.dense_4h_to_h.lora_A.weight"] = torch.ones(2, 4 * hidden_size)
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_is_looked_for_in_the_promised_order(tmp_path: Path, monkeypatch) -> None:
    hub = adapter(tmp_path / "cache/snapshot")
    fetched = []

    def snapshot_download(name, allow_patterns):
        fetched.append(name)
        return str(hub)

    monkeypatch.setattr(checkpoints, "snapshot_download", snapshot_download)
    places = [
        ("named", tmp_path / "named"), ("artifacts", tmp_path / "artifacts/adapter"),
        ("drive", tmp_path / "drive/adapter"), ("embedded", tmp_path / "embedded"),
    ]  # fmt: skip
    made = {name: adapter(path) for name, path in places}

    def find(named=None, hub_id="you/adapter"):
        where = (named, tmp_path / "artifacts", tmp_path / "drive", hub_id, tmp_path / "embedded")
        return find_adapter(*(w and str(w) for w in where), 8, "you/falcon")

    assert find(tmp_path / "named") == (str(made["named"]), "ADAPTER")
    assert find() == (str(made["artifacts"]), "artifacts")
    shutil.rmtree(tmp_path / "artifacts")
    assert find() == (str(made["drive"]), "Drive")
    shutil.rmtree(tmp_path / "drive")
    assert fetched == []
    assert find() == (str(hub), "the Hub") and fetched == ["you/adapter"]
    assert find(hub_id=None) == (str(made["embedded"]), "embedded")
    assert find("you/other") == (str(hub), "ADAPTER") and fetched[-1] == "you/other"


def test_an_adapter_that_is_nowhere_stops_and_the_bare_base_is_never_given(
    tmp_path: Path, monkeypatch
) -> None:
    def offline(name, allow_patterns):
        raise ConnectionError("no network")

    monkeypatch.setattr(checkpoints, "snapshot_download", offline)
    embedded = adapter(tmp_path / "embedded")
    found = find_adapter(None, None, None, "you/adapter", str(embedded), 8, "you/falcon")
    assert found == (str(embedded), "embedded")
    with pytest.raises(FileNotFoundError, match="no adapter in ADAPTER .*run notebook 03"):
        find_adapter("you/missing", None, None, None, str(embedded), 8, "you/falcon")
    with pytest.raises(FileNotFoundError, match="artifacts .*the Hub .you/adapter.*set ADAPTER"):
        find_adapter(None, str(tmp_path / "a"), None, "you/adapter", None, 8, "you/falcon")


def test_another_hidden_size_stops_and_another_name_only_warns(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", base="you/falcon-sharded")

    def find(size: int, base: str) -> str:
        return find_adapter(None, str(tmp_path), None, None, None, size, base)[1]

    with pytest.raises(ValueError, match="fits hidden size 8, not 4544: run 03, or set ADAPTER"):
        find(4544, "you/falcon-sharded")
    assert find(8, "a/copy/of/falcon-sharded") == "artifacts"
    warning = "artifacts; trained on falcon-sharded, not falcon: fine if they are copies"
    assert find(8, "me/falcon") == warning
    os.truncate(folder / "adapter_model.safetensors", 100)
    with pytest.raises(ValueError, match="is damaged: save or copy it again"):
        find(8, "you/falcon-sharded")


def test_a_bin_adapter_as_on_the_hub_is_read_too(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    weights = {"base_model.model.h.0.query_key_value.lora_A.weight": torch.ones(2, 8)}
    torch.save(weights, folder / "adapter_model.bin")
    assert find_adapter(str(folder), None, None, None, None, 8, "falcon")[1] == "ADAPTER"


def test_loading_back_gives_the_same_logits_to_the_last_bit(tmp_path: Path) -> None:
    base = load_falcon(TINY.model, TINY)
    lora = LoraConfig(r=4, target_modules=list(LINEARS), init_lora_weights=False)
    ids = torch.arange(11, 43)[None]
    with torch.no_grad():
        bare = base(ids).logits
        model = get_peft_model(base, lora).eval()
        wanted = model(ids).logits
    model.save_pretrained(str(tmp_path / "adapter"))
    size = base.config.hidden_size
    folder, where = find_adapter(None, str(tmp_path), None, None, None, size, TINY.model)
    assert where == "artifacts"
    loaded = PeftModel.from_pretrained(load_falcon(TINY.model, TINY), folder).eval()
    with torch.no_grad():
        found = loaded(ids).logits
    assert torch.equal(found, wanted) and not torch.equal(found, bare)


def test_a_model_card_states_what_it_must(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("peft's own")
    facts = {"data": "you/rows", "base": "you/falcon", "steps": 60, "held-out loss": 2.345}
    text = write_model_card(tmp_path, facts | {"rank": 32}).read_text()
    for fact in ("you/rows", "you/falcon", "60", "2.345", "| rank | 32 |"):
        assert fact in text
    for word in ("not a clinician", "helpline", "emergency", "licence", "safety layer"):
        assert word in text
    assert "peft's own" not in text and "{" not in text
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "you/falcon"
    local = write_model_card(tmp_path, facts | {"base": TINY.model}).read_text()
    assert TINY.model not in local and "| base | tiny_falcon |" in local
    assert "base_model" not in yaml.safe_load(local.split("---")[1])


@pytest.mark.parametrize("name", ["data", "base", "steps", "held-out loss"])
def test_a_model_card_without_one_of_them_is_refused(tmp_path: Path, name: str) -> None:
    facts = {"data": "d", "base": "b", "steps": 1, "held-out loss": 0.0} | {name: None}
    with pytest.raises(ValueError, match=f"lacks {name}: add them"):
        write_model_card(tmp_path, facts)


def handed(tmp_path: Path) -> Path:
    """An adapter's folder as page 03 leaves it, with a pickle that must not travel."""
    folder = adapter(tmp_path / "adapter")
    (folder / "README.md").write_text("our card")
    (folder / "training_args.bin").write_bytes(b"pickle")
    return folder


def test_an_adapter_is_handed_over_to_a_folder_with_its_card_alone(tmp_path: Path) -> None:
    folder, drive = handed(tmp_path), tmp_path / "drive/MyDrive/falcon"
    assert hand_over(folder) == ["copied nowhere else: DRIVE and HUB_REPO are None"]
    drive.parent.mkdir(parents=True)
    (drive / "adapter").mkdir(parents=True)
    (drive / "adapter/of_an_earlier_run").touch()
    assert hand_over(folder, drive) == [f"copied to {drive / 'adapter'}"]
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(p.name for p in (drive / "adapter").iterdir()) == names
    for name in names:
        assert (drive / "adapter" / name).read_bytes() == (folder / name).read_bytes()
    assert find_adapter(None, None, str(drive), None, None, 8, "you/falcon")[1] == "Drive"


def test_a_drive_that_is_not_there_or_full_is_said_and_not_made(
    tmp_path: Path, monkeypatch
) -> None:
    folder, drive = handed(tmp_path), tmp_path / "drive/MyDrive/falcon"
    [said] = hand_over(folder, drive)
    assert "is not there: mount it" in said and "run this cell again" in said
    assert not (tmp_path / "drive").exists(), "a folder of that name was made on the local disk"
    drive.parent.mkdir(parents=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    [said] = hand_over(folder, drive)
    assert "GB free" in said and not drive.exists()


def test_a_copy_that_is_not_the_original_does_not_get_its_name(tmp_path: Path, monkeypatch) -> None:
    folder, drive = handed(tmp_path), tmp_path / "drive"

    def flip(source, target):
        Path(target).write_bytes(Path(source).read_bytes()[::-1])

    monkeypatch.setattr(shutil, "copyfile", flip)
    [said] = hand_over(folder, drive)
    assert "is not the original" in said and not (drive / "adapter").exists()


class Hub:
    """Takes what is uploaded, as the Hub would."""

    taken: list[str] = []
    private = False

    def create_repo(self, repo_id, private, exist_ok):
        assert repo_id == "you/name" and exist_ok
        Hub.private = private

    def upload_folder(self, repo_id, folder_path, allow_patterns):
        paths = (p for word in allow_patterns for p in Path(folder_path).glob(word))
        Hub.taken = sorted(f"{p.name}: {p.stat().st_size}" for p in paths)


def test_the_hub_gets_the_adapter_with_our_card_and_a_dead_network_is_only_said(
    tmp_path: Path, monkeypatch
) -> None:
    folder = handed(tmp_path)
    monkeypatch.setattr(handover, "HfApi", Hub)
    [said] = hand_over(folder, hub_repo="you/name")
    assert said.startswith("uploaded to https://huggingface.co/you/name, private")
    sizes = {p.name: p.stat().st_size for p in folder.iterdir() if p.name != "training_args.bin"}
    assert Hub.private and Hub.taken == sorted(f"{name}: {n}" for name, n in sizes.items())
    monkeypatch.undo()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(handover, "HfApi", lambda: huggingface_hub.HfApi("http://127.0.0.1:9"))
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    copied, failed = hand_over(folder, tmp_path / "drive", "you/name")
    assert copied.startswith("copied to") and failed.startswith("not copied to you/name (")
    assert "\n" not in failed and failed.endswith("run this cell again")


def test_an_unknown_wandb_mode_is_refused_and_only_the_first_process_logs(monkeypatch) -> None:
    with pytest.raises(ValueError, match="'onlin' is unknown"):
        start_wandb("onlin", "p", {})
    monkeypatch.setenv("RANK", "1")
    assert start_wandb("offline", "p", {}) == "none"


def test_adapters_come_back_from_a_checkpoint_in_32_bits_so_page_03_holds_them_so(
    tmp_path: Path,
) -> None:
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"])
    )
    for weight in model.parameters():
        weight.data = weight.data.bfloat16()
    model.save_pretrained(str(tmp_path))
    model.load_adapter(str(tmp_path), "default", is_trainable=True)  # as the Trainer resumes
    kinds = {weight.dtype for weight in model.parameters() if weight.requires_grad}
    assert kinds == {torch.float32}, "mended in peft?"
    page = Path(__file__).resolve().parent.parent / "notebooks/py/03_qlora_finetuning.py"
    lines = page.read_text().splitlines()
    called = "n_trainable = adapters_to_fp32(trainer)"  # on a line of its own: on every profile
    assert called in lines, "on some profile a resumed run changes its dtype"
