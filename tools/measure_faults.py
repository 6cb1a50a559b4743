"""Break training runs in every way that a long run can meet, and write down what is left.

Each fault is put to the plain Trainer, which resumes from its newest checkpoint, and to ours.
Writes results/<machine>/faults.json; `--ours` leaves the plain Trainer out, `--to` names a file.
"""

import argparse
import ctypes
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import trainer as trainer_module

from helpers import checkpoints
from tools.faults import ADAPTER, SAVE_EVERY, STEPS, Lab, Outcome, Trap, at, both, kill
from tools.results import this_command, write_result

DAY = 86_400
TORCH = version("torch")
Fault = Callable[[Lab, bool], "Result"]


@dataclass
class Result:
    """What a fault did: the last run, how many steps had to be done again, and words for it."""

    final: Outcome
    lost: int
    words: str
    kept: bool = True  # what else has to hold: the refusal's words, a folder not made anew


def in_words(lab: Lab, run: Outcome) -> str:
    """How a run went on, for the table."""
    if run.ended == "raised":
        error = run.error.replace(f"{lab.folder}/", "").split(". \n")[0]
        return f"stops ({' '.join(error.split())[:110]})"
    where = f"goes on from step {run.resumed}" if run.resumed else "trains from the first step on"
    return f"{where}, {'equal' if lab.equal(run) else 'ends with other weights, without a word'}"


def went_on(lab: Lab, final: Outcome, done: int, before: str = "", kept: bool = True) -> Result:
    """A result from the run that came last, `done` steps being finished when the fault came."""
    return Result(final, done - final.resumed, before + in_words(lab, final), kept)


# --- what happens to a checkpoint once it is saved ------------------------------------------


def cut(path: Path) -> None:
    """Cut a file to half its length."""
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """Change bytes in the midst of a file; its length stays."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(byte ^ 0x15 for byte in data[middle : middle + 64])
    path.write_bytes(data)


def damaged(name: str, damage: Callable[[Path], None]) -> Fault:
    """The newest checkpoint of a killed run is damaged; ours names it and takes the one before."""

    def fault(lab: Lab, ours: bool) -> Result:
        out = lab.killed_run(ours)
        damage(out / "checkpoint-4" / name)
        final = lab.run(out, ours)
        reason = out / "checkpoint-4.damaged/reason.txt"
        kept = not ours or (reason.exists() and name in reason.read_text())
        before = f"sets it aside ({reason.read_text().strip()}), " if ours and kept else ""
        return went_on(lab, final, STEPS - 1, before, kept)

    return fault


# --- what changes between two runs ----------------------------------------------------------


def changed(expected: str, patch=None, **settings) -> Fault:
    """A killed run is started again with other settings; ours refuses until they are set back."""

    def fault(lab: Lab, ours: bool) -> Result:
        out = lab.killed_run(ours)
        first = lab.run(out, ours, patch=patch() if patch else None, **settings)
        if not ours:
            return went_on(lab, first, STEPS - 1)
        kept = expected in first.error and "FORCE_RESUME" in first.error
        final = lab.run(out, ours)
        return went_on(lab, final, STEPS - 1, f"refuses ({expected}); set back, it ", kept)

    return fault


def other_version():
    """Every library says that it is of another version."""
    return mock.patch.object(checkpoints, "version", lambda name: "9.9.9")


# --- what happens while a run is under way --------------------------------------------------


def kill_in_step(lab: Lab, ours: bool) -> Result:
    """Killed in the midst of a step, drawn at random."""
    step = random.Random(os.getpid()).randint(2, STEPS)
    out = lab.new_folder("kill")
    lab.run(out, ours, spring=at("in", step, kill))
    return went_on(lab, lab.run(out, ours), step - 1, f"killed in step {step}, ")


def half_a_save(out: Path) -> None:
    """From now on the optimizer's file is written by half, and then comes the kill."""
    whole = torch.save

    def save(state, path, *args, **kwargs):
        whole(state, path, *args, **kwargs)
        if str(path).endswith("optimizer.pt"):
            cut(Path(path))
            kill()

    torch.save = save


def kill_in_save(lab: Lab, ours: bool) -> Result:
    """Killed while the optimizer's state is being written."""
    out = lab.new_folder("kill-in-save")
    lab.run(out, ours, spring=at("after", 4, half_a_save))
    return went_on(lab, lab.run(out, ours), 4)


def kill_before_cleanup(lab: Lab, ours: bool) -> Result:
    """Killed when all files of a checkpoint are written, before old ones are deleted."""

    def arm(out: Path) -> None:
        checkpoints.write_manifest = trainer_module.rotate_checkpoints = lambda *a, **k: kill()

    out = lab.new_folder("kill-before-cleanup")
    lab.run(out, ours, spring=at("after", 4, arm))
    return went_on(lab, lab.run(out, ours), 4)


def fill_disk(out: Path) -> None:
    """The next optimizer's state goes to /dev/full, where every write finds no space left."""
    folder = out / "checkpoint-4"
    folder.mkdir()
    (folder / "optimizer.pt").symlink_to("/dev/full")


def disk_full(lab: Lab, ours: bool) -> Result:
    """The disk fills up during a save; afterwards there is room again."""
    out = lab.new_folder("disk-full")
    first = lab.run(out, ours, spring=at("after", 4, fill_disk))
    before = f"breaks off ({first.error.split(':')[0]}); run again, it "
    return went_on(lab, lab.run(out, ours), 4, before, first.ended == "raised")


def no_room(lab: Lab, ours: bool) -> Result:
    """Before a save there is less room than it takes; ours leaves that save out."""
    if not ours:
        return disk_full(lab, ours)

    def fill(out: Path) -> None:
        usage = shutil.disk_usage(out)
        shutil.disk_usage = lambda path: usage._replace(free=1_000_000)

    def empty(out: Path) -> None:
        shutil.disk_usage = whole

    whole, out = shutil.disk_usage, lab.new_folder("no-room")
    final = lab.run(out, ours, spring=both(at("after", 4, fill), at("after", 5, empty)))
    kept = any("Step 4 was not saved" in sentence for sentence in final.said)
    kept = kept and not (out / "checkpoint-4").exists()
    return went_on(lab, final, 0, "says so, leaves the save out, ", kept)


def drive_gone(lab: Lab, ours: bool) -> Result:
    """Drive is unmounted between two saves."""
    drive = lab.new_folder("drive")
    folder = drive / "MyDrive/falcon"
    folder.parent.mkdir(parents=True)
    unmount = at("after", 3, lambda out: drive.rename(drive.with_name(f"{drive.name}-unmounted")))
    out = lab.new_folder("local") if ours else folder
    final = lab.run(out, ours, mirror=folder if ours else None, spring=unmount)
    if not ours:
        return went_on(lab, final, 0, "makes a local folder of that name, " * drive.exists())
    mounted = drive.with_name(f"{drive.name}-unmounted") / "MyDrive/falcon"
    copied = not checkpoints.checkpoint_fault(mounted / "checkpoint-2")
    kept = copied and not drive.exists() and any("mount it again" in s for s in final.said)
    return went_on(lab, final, 0, "says so, goes on locally, ", kept)


def fresh_runtime(lab: Lab, ours: bool) -> Result:
    """The machine is gone with its disk; what is left is what was copied."""
    drive, out = lab.new_folder("drive"), lab.new_folder("local")
    mirror = {"mirror": drive} if ours else {}
    lab.run(out, ours, spring=at("in", STEPS, kill), **mirror)
    shutil.rmtree(out)
    return went_on(lab, lab.run(out, ours, **mirror), STEPS - 1)


def kill_in_copy(lab: Lab, ours: bool) -> Result:
    """Killed while a checkpoint is being copied to Drive, and the local disk is gone."""
    if not ours:
        return kill_in_save(lab, ours)

    def arm(out: Path) -> None:
        shutil.copyfile = checkpoints.shutil.copyfile = lambda *a, **k: kill()

    drive, out = lab.new_folder("drive"), lab.new_folder("local")
    lab.run(out, ours, mirror=drive, spring=at("after", 4, arm))
    shutil.rmtree(out)
    return went_on(lab, lab.run(out, ours, mirror=drive), 4)


def two_runs(lab: Lab, ours: bool) -> Result:
    """While one run is in its third step, another is started in its folder; then the first dies."""
    out = lab.new_folder("two-runs")
    pause = at("in", 3, lambda out: os.kill(os.getpid(), signal.SIGSTOP))
    first, report = lab.start(out, ours, spring=both(pause, at("in", STEPS, kill)))
    os.waitpid(first, os.WUNTRACED)
    second = lab.run(out, ours, fresh=True, seed=1)
    os.kill(first, signal.SIGCONT)
    lab.wait(first, report)
    final = lab.run(out, ours)
    kept = not ours or "another run is in" in second.error
    before = "refuses the second run; the first " if ours else "mixes both; the first "
    return Result(final, max(0, STEPS - 1 - final.resumed), before + in_words(lab, final), kept)


@contextmanager
def no_privileges() -> Iterator[None]:
    """This process may no longer write where permissions forbid it, even if it is root's."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)())
    yield


def read_only(lab: Lab, ours: bool) -> Result:
    """The folder cannot be written to."""
    out = lab.new_folder("read-only")
    out.mkdir(mode=0o555)
    first = lab.run(out, ours, patch=no_privileges())
    out.chmod(0o755)
    final = lab.run(out, ours)
    kept = not ours or "cannot write to" in first.error
    when = "before the first step" if ours else f"at the first save, after {SAVE_EVERY} steps"
    lost = 0 if ours else SAVE_EVERY
    return Result(final, lost, f"stops {when} ({' '.join(first.error.split()[:4])} …)", kept)


def clock_set_back(lab: Lab, ours: bool) -> Result:
    """The clock is set back by a day, so that new checkpoints look older than old ones."""

    def set_back(out: Path) -> None:
        for path in out.glob("checkpoint-*"):
            os.utime(path, (path.stat().st_mtime + DAY,) * 2)

    out = lab.new_folder("clock")
    spring = both(at("after", 3, set_back), at("in", STEPS, kill))
    lab.run(out, ours, spring=spring, save_every=1)
    final = lab.run(out, ours, save_every=1)
    return went_on(lab, final, STEPS - 1, kept=not ours or final.resumed == STEPS - 1)


def stop_button(lab: Lab, ours: bool) -> Result:
    """The kernel is interrupted in the third step, and the cell is run again."""
    out = lab.new_folder("stop")
    stop = at("in", 3, lambda out: os.kill(os.getpid(), signal.SIGINT))
    first = lab.run(out, ours, spring=stop)
    final = first if ours else lab.run(out, ours)
    before = "saves step 3, " if ours else f"stops at once ({first.error.strip(': ')}), "
    return went_on(lab, final, 3 if ours else 2, before, not ours or final.resumed == 3)


FAULTS: dict[str, Fault] = {
    "kill in a step": kill_in_step,
    "kill in a save": kill_in_save,
    "kill after a save, before the clean-up": kill_before_cleanup,
    "kill in a copy to Drive": kill_in_copy,
    "truncated adapter": damaged(ADAPTER, cut),
    "same-size corrupt adapter": damaged(ADAPTER, flip),
    "same-size corrupt optimizer": damaged("optimizer.pt", flip),
    "missing optimizer": damaged("optimizer.pt", Path.unlink),
    "missing scheduler": damaged("scheduler.pt", Path.unlink),
    "missing RNG state": damaged("rng_state.pth", Path.unlink),
    "missing trainer_state.json": damaged("trainer_state.json", Path.unlink),
    "cut trainer_state.json": damaged("trainer_state.json", cut),
    "disk full during a save": disk_full,
    "too little room before a save": no_room,
    "Drive gone between saves": drive_gone,
    "runtime and its disk gone": fresh_runtime,
    "changed seed": changed("seed was 0 and is now 1", seed=1),
    "changed batch": changed("per_device_train_batch_size was 4 and is now 2", batch=2),
    "changed rank": changed("LoRA r was 8 and is now 4", rank=4),
    "changed max_steps": changed("max_steps was 6 and is now 8", steps=8),
    "changed library version": changed(f"torch was {TORCH} and is now 9.9.9", patch=other_version),
    "two runs in one folder": two_runs,
    "a read-only folder": read_only,
    "clock set back": clock_set_back,
    "Stop button": stop_button,
}


def measure(lab: Lab, name: str, plain: bool) -> dict[str, str | int | bool]:
    """One row of the table.

    Args:
        lab: where the runs happen.
        name: of the fault.
        plain: put it to the plain Trainer too.

    Returns:
        fault; plain_trainer and ours in words; lost_steps, ours, done again after the fault;
        equal: ours ends with the unbroken run's losses and adapter; passed: that, no more lost
        than since the last whole checkpoint, and the right sentence said.
    """
    ours = FAULTS[name](lab, True)
    equal = lab.equal(ours.final)
    return {
        "fault": name,
        "plain_trainer": FAULTS[name](lab, False).words if plain else "not run",
        "ours": ours.words,
        "lost_steps": ours.lost,
        "equal": equal,
        "passed": equal and ours.kept and 0 <= ours.lost < 2 * SAVE_EVERY,
    }


class Witness(Trap):
    """Writes each loss to a file at once, so that what a killed run had reached is left."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add one loss to `losses.txt` beside the checkpoints."""
        if "loss" in (logs or {}):
            with (Path(args.output_dir) / "losses.txt").open("a") as file:
                file.write(f"{logs['loss']}\n")


def curves(folder: Path, steps: int = 24, killed_in: int = 15) -> dict[str, list[float] | int]:
    """The losses of an unbroken run, and of one that was killed and went on, for a plot."""
    lab = Lab(folder, steps)
    out = lab.new_folder("curve")
    lab.run(out, True, spring=Witness(at("in", killed_in, kill)), save_every=steps // 3)
    killed = [float(line) for line in (out / "losses.txt").read_text().splitlines()]
    final = lab.run(out, True, save_every=steps // 3)
    return {
        "unbroken": lab.reference.losses,
        "killed": killed,
        "resumed": final.losses[final.resumed :],
        "killed_in_step": killed_in,
        "resumed_from_step": final.resumed,
        "equal": lab.equal(final),
    }


def main() -> None:
    """Measure every fault and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ours", action="store_true", help="leave the plain Trainer out")
    parser.add_argument("--to", type=Path, help="a file, instead of results/")
    parser.add_argument("--only", help="one fault by its name")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder) / "faults")
        names = [name for name in FAULTS if options.only in (None, name)]
        rows = []
        for name in names:
            rows.append(measure(lab, name, plain=not options.ours))
            print(json.dumps(rows[-1]), flush=True)
        if options.to:
            options.to.write_text(json.dumps(rows, indent=2) + "\n")
            return
        figures = {"faults": rows, "losses": curves(Path(folder) / "curves")}
        what = "faults in a training run: the plain Trainer, and with checked checkpoints"
        write_result("faults", figures, what, this_command())


if __name__ == "__main__":
    main()
