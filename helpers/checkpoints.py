"""A long run that survives: checkpoints that prove themselves, and the adapter's way onwards."""

import fcntl
import gc
import hashlib
import json
import os
import shutil
import signal
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from huggingface_hub import snapshot_download
from peft import LoraConfig, load_peft_weights
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from helpers.memory import give_back, out_of_memory, page_again
from helpers.profiles import check_disk
from helpers.speed import compile_alike

MANIFEST, LOCK, HERE, PEFT = "manifest.json", "run.lock", "mirror.here", "adapter_config.json"
WAYS_ON = "set that back, or FORCE_RESUME = True to go on, or RESUME = False to start afresh"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "trl", "accelerate")
LORA = ("r", "lora_alpha", "lora_dropout", "bias", "target_modules", "use_rslora", "use_dora")
SETTINGS = (
    "seed", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "max_steps",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "optim", "bf16", "fp16",
    "train_sampling_strategy", "max_length")  # fmt: skip


def fingerprint(
    args: TrainingArguments, lora: LoraConfig, train_rows: list[dict], base: str = ""
) -> dict[str, str | int | float | bool | list[str] | None]:
    """Write down everything that decides how a run ends, so that two runs can be told apart.

    Make it before the trainer is built: peft fills in the LoRA settings it is given. How often
    a run logs, evaluates or saves is not in it, since that does not change its weights.

    Args:
        args: an `SFTConfig`.
        lora: the adapters' settings.
        train_rows: rows in the order in which they are fed, as dicts of text; hashed.
        base: Hub id or folder of the base model; only the last part counts, so that copies do.

    Returns:
        A flat dict of JSON values under the names that SFTConfig and LoraConfig give them.

    Example:
        >>> from trl import SFTConfig
        >>> args = SFTConfig(output_dir="x", max_steps=9, use_cpu=True, bf16=False)
        >>> mark = fingerprint(args, LoraConfig(r=4, target_modules=["dense"]), [{"text": "hi"}])
        >>> mark["max_steps"], mark["LoRA r"], mark["lr_scheduler_type"]
        (9, 4, 'linear')
    """
    rows = json.dumps(list(train_rows), sort_keys=True, ensure_ascii=False).encode()
    mark = {name: getattr(args, name, None) for name in SETTINGS}
    mark |= {f"LoRA {name}": getattr(lora, name) for name in LORA}
    mark |= {"rows (hash)": hashlib.sha256(rows).hexdigest()[:12], "base model": Path(base).name}
    mark |= {name: version(name) for name in PACKAGES}
    return json.loads(json.dumps(mark, default=sorted))  # target modules may be a set


def _checkpoints(*folders: Path | None) -> list[Path]:
    """The folders `checkpoint-<step>`, by step and never by date, the oldest first."""
    found = (p for f in folders if f for p in f.glob("checkpoint-*") if p.name[11:].isdigit())
    return sorted(found, key=lambda path: int(path.name[11:]))


def _seal(path: Path) -> list[int | str]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def write_manifest(folder: Path, step: int, mark: dict) -> None:
    """Write what a finished checkpoint holds: the last file to appear in it, and all at once.

    Args:
        folder: of the checkpoint, every other file in place.
        step: optimizer steps done.
        mark: the run's fingerprint.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_manifest(Path(folder), 3, {})
        ...     checkpoint_fault(Path(folder))
        ''
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    files = {str(p.relative_to(folder)): _seal(p) for p in folder.rglob("*") if p.is_file()}
    unfinished = folder / f"{MANIFEST}.tmp"
    unfinished.write_text(json.dumps({"step": step, "fingerprint": mark, "files": files}, indent=1))
    with unfinished.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, folder / MANIFEST)


def checkpoint_fault(folder: Path) -> str:
    """Say what is wrong with a checkpoint, by its manifest; nothing if it is whole.

    Args:
        folder: of the checkpoint.

    Returns:
        "" or a few words, such as "optimizer.pt cannot be read".

    Example:
        >>> checkpoint_fault(Path("checkpoint-7"))
        'manifest.json cannot be read'
    """
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        changed = [name for name, seal in files.items() if _seal(folder / name) != seal]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{Path(getattr(error, 'filename', None) or MANIFEST).name} cannot be read"
    return f"{', '.join(changed)} changed after the save" if changed else ""


def _set_aside(path: Path, word: str, reason: str) -> None:
    """Rename a checkpoint to `<name>.<word>`, with the reason inside; nothing is deleted."""
    with suppress(OSError):  # a folder that cannot be written to stops the run when it begins
        n = len(list(path.parent.glob(f"{path.name}.{word}*")))
        target = path.rename(path.with_name(f"{path.name}.{word}{n or ''}"))
        (target / "reason.txt").write_text(reason + "\n")


def _copy_missing(source: Path | None, target: Path) -> None:
    """Copy what only `source` has whole; a copy is read back before it gets its name."""
    staged = target / "checkpoint.copying"
    for path in _checkpoints(source):
        if (target / path.name).exists() or checkpoint_fault(path):
            continue
        check_disk(str(target), sum(p.stat().st_size for p in path.iterdir()))
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(path, staged, copy_function=shutil.copyfile)
        if fault := checkpoint_fault(staged):
            raise OSError(f"the copy is not the original: {fault}")
        staged.rename(target / path.name)


def _newest_whole(folder: Path, mirror: Path | None) -> Path | None:
    """Set aside what is damaged, bring back what only the mirror has whole; the newest left."""
    for path in _checkpoints(folder):
        if fault := checkpoint_fault(path):
            _set_aside(path, "damaged", fault)
    _copy_missing(mirror, folder)
    return next((p for p in reversed(_checkpoints(folder)) if not checkpoint_fault(p)), None)


def last_valid_checkpoint(folder: str | Path, mark: dict, force: bool = False,
                          mirror: str | Path | None = None) -> str | None:  # fmt: skip
    """Find the newest checkpoint that is whole and belongs to this run.

    Every checkpoint is checked against its manifest. A damaged or half-written one is renamed to
    `<name>.damaged`, with the reason inside, and the mirror's copy takes its place if it is
    whole; so does a checkpoint that is only in the mirror, as in a fresh runtime.

    Args:
        folder: `output_dir` of the run; it need not exist.
        mark: fingerprint of the run about to start.
        force: go on although the fingerprint changed.
        mirror: the second folder of `CheckpointManifest`.

    Returns:
        The folder for `trainer.train(resume_from_checkpoint=...)`; None for a fresh start.

    Raises:
        ValueError: if settings, rows or versions changed, with each difference in words.

    Example:
        >>> last_valid_checkpoint("no/such/folder", mark={}) is None
        True
    """
    first = os.environ.get("RANK", "0") == "0"  # it alone mends, the others are told
    newest = _newest_whole(Path(folder), Path(mirror) if mirror else None) if first else None
    if not (newest := broadcast_object_list([newest])[0]):
        return None
    old = json.loads((newest / MANIFEST).read_text())["fingerprint"]
    changed = [word for word in {**old, **mark} if old.get(word) != mark.get(word)]
    if changed and not force:
        words = "; ".join(f"{w} was {old.get(w)} and is now {mark.get(w)}" for w in changed)
        raise ValueError(f"{newest.name} is from another run ({words}): {WAYS_ON}")
    return str(newest)


def _rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints over the limit, but neither the newest nor the best."""
    found = _checkpoints(folder)
    spare = [p for p in found[:-1] if not best or p.name != Path(best).name]
    for path in spare[: max(0, len(found) - limit)] if limit else ():
        shutil.rmtree(path, ignore_errors=True)


def _problem(folder: Path, model: PreTrainedModel) -> str:
    """Why a save would fail: 12 bytes a number (itself, Adam's two), and 20 MB for the rest."""
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    try:
        check_disk(str(folder), 12 * n + 20_000_000)
    except OSError as error:
        return str(error)
    return "" if os.access(folder, os.W_OK) else f"cannot write to {folder}: choose another OUTPUT"


class CheckpointManifest(TrainerCallback):
    """Makes a trainer's checkpoints provable, copies them to a second folder, and rotates them.

    The trainer deletes old checkpoints by date, and before a new one is known to be whole: with
    the clock set back it deletes the one just saved. So it is told to keep all, and this callback
    deletes by step, after the manifest is written. Files are written by the first process only.

    Args:
        mark: the run's fingerprint.
        mirror: a second folder, such as one on Drive. Its parent must be there when training
            begins; if it vanishes, training goes on and it is not made anew.
        say: what takes the few sentences.

    Example:
        >>> keeper = CheckpointManifest(mark={"seed": 0})
        >>> keeper.press_stop()
        Stopping after this step, with a checkpoint; press Stop again to stop at once.
    """

    def __init__(self, mark: dict, mirror: str | Path | None = None, say=print):
        self.mark, self.mirror, self.say = mark, Path(mirror) if mirror else None, say
        self.limit, self.lock, self.presses = None, None, 0

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Take the folder, or refuse a full, read-only or used one; set later steps aside."""
        page_again(optimizer)  # what came back from a checkpoint
        self.limit, args.save_total_limit = args.save_total_limit or self.limit, None
        if not state.is_world_process_zero:
            self.say = str  # says nothing
            return
        if problem := _problem(folder := Path(args.output_dir), model):
            raise OSError(problem)
        self.lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR)
        try:  # the lock falls with this process, however it ends
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RuntimeError(f"another run is in {folder}: end it, or change OUTPUT") from None
        if self.mirror:
            with suppress(OSError):  # said when the first copy fails
                self.mirror.mkdir(exist_ok=True)
                (self.mirror / HERE).touch()
        for path in _checkpoints(folder, self.mirror):
            if int(path.name[11:]) > state.global_step:
                _set_aside(path, "older", f"a run began anew at step {state.global_step}")

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Save and end if Stop was pressed; leave out a save for which there is no room."""
        self.presses = max(gather_object([self.presses]))  # one process may hear of it alone
        if self.presses:
            control.should_save = control.should_training_stop = True
        problem = _problem(Path(args.output_dir), model) if control.should_save else ""
        if control.should_save and (problem := broadcast_object_list([problem])[0]):
            control.should_save = False
            self.say(f"Step {state.global_step} was not saved, training goes on: {problem}")

    def on_save(self, args, state, control, **kwargs):
        """Seal the checkpoint, copy it, and only then delete old ones."""
        args.distributed_state.wait_for_everyone()  # each has written its random state
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for place in filter(None, (path.parent, self.mirror)) if self.lock else ():
            try:
                if place == path.parent:
                    write_manifest(path, state.global_step, self.mark)
                elif not (place / HERE).exists():
                    raise OSError("it is not there: mount it again")
                _copy_missing(path.parent, place)
                _rotate(place, self.limit, state.best_model_checkpoint)
            except OSError as error:
                self.say(f"No {path.name} in {place}, training goes on: {error}")

    def on_train_end(self, args, state, control, **kwargs):
        """Free the folder and give the trainer its setting back."""
        args.save_total_limit = self.limit
        self.lock = self.lock and os.close(self.lock)

    def press_stop(self, *_):
        """What the Stop button calls while `train_and_survive` runs."""
        self.presses += 1
        if self.presses > 1:
            raise KeyboardInterrupt("stopped at once")
        self.say("Stopping after this step, with a checkpoint; press Stop again to stop at once.")


def train_and_survive(trainer: Trainer, resume: str | None = None,
                      plan: dict[str, float] | None = None) -> bool:  # fmt: skip
    """Train; the Stop button ends the run after the step in hand, with a checkpoint.

    Pressed a second time it ends at once, and the last checkpoint stays. Either way the notebook
    stays usable, and running the cell again goes on from the last valid checkpoint. If the GPU's
    memory runs out, a sentence says which constant to make smaller, and what the step held is
    given back; so is, before training starts, what an earlier trainer held. One of several
    processes then ends with the error, and the others with it.

    Args:
        trainer: with a `CheckpointManifest` among its callbacks.
        resume: what `last_valid_checkpoint` gave.
        plan: what `plan_memory` gave, for that sentence.

    Returns:
        True if training came to its own end, early stopping included; False if it was stopped, or
        out of memory.

    Example:
        >>> from types import SimpleNamespace as Some
        >>> handler = Some(callbacks=[CheckpointManifest(mark={})])
        >>> trainer = Some(callback_handler=handler, train=lambda resume_from_checkpoint: None)
        >>> train_and_survive(trainer)    # nobody pressed Stop
        True
    """
    keeper = next(c for c in trainer.callback_handler.callbacks if hasattr(c, "press_stop"))
    keeper.presses, before, fits = 0, signal.signal(signal.SIGINT, keeper.press_stop), True
    gc.collect()
    compile_alike(trainer, resume)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except torch.OutOfMemoryError as error:
        fits = False
        keeper.say(out_of_memory(plan, trainer.args))
        keeper.on_train_end(trainer.args, trainer.state, trainer.control)
        give_back(trainer, error)
    except KeyboardInterrupt:
        keeper.say("Stopped at once. Run this cell again to go on from the last checkpoint.")
    finally:
        signal.signal(signal.SIGINT, before)
    return fits and not keeper.presses


def find_adapter(
    adapter: str | None, artifacts: str | None, drive: str | None, hub_id: str | None,
    embedded: str | None, hidden_size: int, base_name: str,
) -> tuple[str, str]:  # fmt: skip
    """Find the adapter to serve: the one named, else in artifacts, Drive, the Hub, or embedded.

    A place is a folder that holds an adapter, or has one in its subfolder `adapter`, or a Hub
    id, whose adapter is fetched into the Hub's own cache. A bare base is never the answer.

    Args:
        adapter: the constant ADAPTER; if set, nowhere else is looked.
        artifacts, drive, hub_id, embedded: the other places, in this order; None leaves one out.
        hidden_size: of the base model.
        base_name: Hub id or folder of the base model.

    Returns:
        (folder, where): for `PeftModel.from_pretrained`, and words for the reader, with a
        warning behind them if the adapter was trained on a base of another name.

    Raises:
        FileNotFoundError: if no place has one.
        ValueError: if the one found is damaged or made for another hidden size.

    Example:
        >>> find_adapter(None, "no/such/folder", None, None, None, 4544, "falcon-7b")
        Traceback (most recent call last):
        FileNotFoundError: no adapter in artifacts (no/such/folder): run notebook 03, or set ADAPTER
    """
    places = {"artifacts": artifacts, "Drive": drive, "the Hub": hub_id, "embedded": embedded}
    places = {"ADAPTER": adapter} if adapter else {w: p for w, p in places.items() if p}
    for where, place in places.items():
        found = [p for p in (Path(place, "adapter"), Path(place)) if (p / PEFT).exists()]
        if where in ("ADAPTER", "the Hub") and not found:
            with suppress(OSError, ValueError):  # no network, no such id: it is not found there
                found = [Path(snapshot_download(place, allow_patterns=["adapter_*"]))]
        if found:
            return str(found[0]), where + _check_adapter(found[0], hidden_size, base_name)
    tried = ", ".join(f"{where} ({place})" for where, place in places.items())
    raise FileNotFoundError(f"no adapter in {tried}: run notebook 03, or set ADAPTER")


def _check_adapter(folder: Path, wanted: int, base_name: str) -> str:
    """The warning about another base, if any; ValueError for what cannot be used at all."""
    try:
        base = json.loads((folder / PEFT).read_text())["base_model_name_or_path"]
        weights = load_peft_weights(str(folder), device="cpu")
        sizes = sorted({w.shape[1] for name, w in weights.items() if "lora_A" in name})
        size = wanted if wanted in sizes else sizes[0]
    except Exception as error:  # each file format has its own
        raise ValueError(f"the adapter in {folder} is damaged: save or copy it again") from error
    if size != wanted:
        raise ValueError(f"{folder} fits hidden size {size}, not {wanted}: run 03, or set ADAPTER")
    old, new = Path(base or "an unnamed base").name, Path(base_name).name
    return "" if old == new else f"; trained on {old}, not {new}: fine if they are copies"
