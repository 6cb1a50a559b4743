"""Notebook 03 on many GPUs: what one process has to know of the others. Accelerate does the work.

Each process of `accelerate launch` runs the whole page. Here are the few things that the page
cannot leave to the libraries: sharing a step's rows, and what is said when a process is lost.
"""

import math
import os
import signal
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import Trainer

from helpers.profiles import Profile

ENDED = "ended.txt"
LOST = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "distbackend")


def share_step(profile: Profile, n_processes: int) -> Profile:
    """Divide the rows of one optimizer step among processes, so that a step keeps its size.

    Accumulation gives way first, since it costs nothing; only then the rows of a micro-batch.

    Args:
        profile: `batch_size * accumulation` rows a step, as for one process.
        n_processes: how many share them.

    Returns:
        The profile of one process: `batch_size * accumulation * n_processes` is what it was.

    Raises:
        ValueError: if the rows do not divide evenly.

    Example:
        >>> from helpers.profiles import A100    # 16 rows, 4 times: 64 a step
        >>> [(p.batch_size, p.accumulation) for p in (share_step(A100, n) for n in (1, 2, 8))]
        [(16, 4), (16, 2), (8, 1)]
    """
    rows = profile.batch_size * profile.accumulation
    if rows % n_processes:
        fits = [n for n in range(1, rows + 1) if rows % n == 0 and n < 2 * n_processes]
        raise ValueError(
            f"{rows} rows a step do not divide among {n_processes} processes: launch "
            f"{' or '.join(map(str, fits[-3:]))}, or set BATCH_SIZE and ACCUMULATION"
        )
    batch = math.gcd(profile.batch_size, rows // n_processes)
    return replace(profile, batch_size=batch, accumulation=rows // n_processes // batch)


def is_sharded() -> bool:
    """True if the launcher asked for FSDP: the base is cut in pieces over the processes."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")


def quant_storage(profile: Profile) -> torch.dtype:
    """The dtype that packed 4-bit weights are stored under; their bits stay the same.

    FSDP shards only floating point, and one dtype in each shard: so there it is the compute
    dtype. Everywhere else it is bitsandbytes' own uint8.

    Example:
        >>> from helpers.profiles import TINY
        >>> quant_storage(TINY)
        torch.uint8
    """
    return profile.compute_dtype if is_sharded() else torch.uint8


def loading(profile: Profile) -> Profile:
    """Where the base is loaded: under FSDP in host memory, so that no card has to hold it whole.

    The launcher leaves each process one CPU thread; to quantize there, they share all cores.

    Example:
        >>> from helpers.profiles import TINY
        >>> loading(TINY) is TINY
        True
    """
    if not is_sharded():
        return profile
    n_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // n_processes))
    return replace(profile, device="cpu")


def check_sharded(profile: Profile) -> Profile:
    """What FSDP asks of a profile, or why it cannot be had.

    Args:
        profile: the run's.

    Returns:
        The profile with PyTorch's own AdamW: bitsandbytes' paged one knows no sharded tensors.

    Raises:
        ValueError: without GPUs, where Accelerate would train without FSDP and not say so; and in
            fp16, whose gradient scaler was never tried on sharded gradients.
    """
    if not profile.on_gpu:
        raise ValueError(
            "FSDP needs GPUs, on CPUs Accelerate trains without it: leave out configs/fsdp.yaml"
        )
    if profile.compute_dtype is torch.float16:
        raise ValueError(
            "FSDP was tried in bf16 only, and this GPU has none: leave out configs/fsdp.yaml"
        )
    return replace(profile, optim="adamw_torch")


def join_others(profile: Profile, output: str | Path) -> Profile:
    """Meet the other processes of `accelerate launch`, and take a share of every step.

    Alone, as in a notebook, it gives the profile back and does nothing.

    Args:
        profile: the run's, as for one process.
        output: folder of the checkpoints, the same for all; a sentence is left there if a
            process is lost.

    Returns:
        The profile of this process.

    Raises:
        ValueError: if a step's rows do not divide evenly, or FSDP cannot be had.

    Example:
        >>> from helpers.profiles import TINY
        >>> join_others(TINY, "artifacts/checkpoints") is TINY
        True
    """
    n_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if n_processes == 1:
        return profile
    mine = share_step(check_sharded(profile) if is_sharded() else profile, n_processes)
    state = PartialState(cpu=not profile.on_gpu)
    if state.is_main_process:
        Path(output, ENDED).unlink(missing_ok=True)
    watch_others(Path(output))
    print(f"{n_processes} processes, {state.backend}; each takes",
          f"{mine.batch_size} x {mine.accumulation} rows of a step")  # fmt: skip
    return mine


def farewell(output: Path) -> str:
    """The sentence for a run that has lost a process: what happened, what is left, what to do.

    Example:
        >>> farewell(Path("no/such/folder"))
        'A process of this run has ended, so all end: launch it again to start afresh.'
    """
    saved = [p.parent.name for p in output.glob("checkpoint-*/manifest.json")]
    steps = sorted(int(n[11:]) for n in saved if n[11:].isdigit())
    then = f"to go on from checkpoint-{steps[-1]}" if steps else "to start afresh"
    return f"A process of this run has ended, so all end: launch it again {then}."


def say_farewell(output: Path, code: int) -> None:
    """Say it once for all processes, leave it in `ended.txt`, and end this one at once."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with (output / ENDED).open("x") as file:  # the first to make the file is the one to speak
            file.write(farewell(output) + "\n")
        print("\n" + farewell(output), file=sys.__stdout__, flush=True)
    except OSError:
        pass  # another process has said it, or the disk is gone with the process
    os._exit(code)


def watch_others(output: Path) -> None:
    """End in one sentence when another process is lost, also while waiting inside a kernel.

    The launcher then sends SIGTERM. Python's own handlers wait until the main thread is back from
    NCCL, which may be never; a byte written by the signal itself wakes a thread instead. Where the
    lost connection is noticed before that, the error becomes the same sentence.

    Args:
        output: where the sentence is left.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        while signal.SIGTERM not in ours.recv(64):
            pass
        say_farewell(output, 128 + signal.SIGTERM)

    def hook(kind: type, error: BaseException, trace) -> None:
        if any(word in f"{kind.__name__} {error}".lower() for word in LOST):
            say_farewell(output, 1)
        sys.__excepthook__(kind, error, trace)
        os._exit(1)  # the others wait in a collective: end before anything waits for them

    watch_others.kept = theirs  # the socket lives as long as the process
    threading.Thread(target=listen, daemon=True).start()
    sys.excepthook = hook


def save_whole_adapters(trainer: Trainer) -> None:
    """Under FSDP, let every save write the adapter as one process would; else change nothing.

    With a sharded state the trainer writes no adapter, and makes the checkpoint's folder only
    after it has looked for it: some processes then know a best checkpoint and some do not, and
    the run hangs when it loads it. Here the adapter alone is gathered, and the folder is there.

    Args:
        trainer: built, not yet trained.
    """
    if not trainer.is_fsdp_enabled:
        return

    def save_model(folder: str | None = None, _internal_call: bool = False) -> None:
        named = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
        whole = {n: p.full_tensor().cpu() for n, p in named.items()}  # all processes take part
        if trainer.is_world_process_zero():
            trainer.model.save_pretrained(folder or trainer.args.output_dir, state_dict=whole)
        trainer.accelerator.wait_for_everyone()

    trainer.save_model = save_model


def leave_if_stopped(finished: bool) -> None:
    """End a script whose training was stopped; in a notebook the cell can be run again.

    Args:
        finished: what `train_and_survive` gave back.

    Raises:
        SystemExit: with code 0, if the training was stopped in a script.

    Example:
        >>> leave_if_stopped(True)
    """
    if not finished and "ipykernel" not in sys.modules:
        sys.exit(0)


def leave_if_follower(trainer: Trainer) -> None:
    """Wait until the adapter is on the disk; then every process but the first is done.

    What follows on the page writes files, checks and shares: one process does that.

    Raises:
        SystemExit: with code 0, in every process but the first.
    """
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():
        sys.exit(0)


def leave_if_sharded(trainer: Trainer, folder: str) -> None:
    """Under FSDP the page ends once the adapter is saved: what follows wants the base whole.

    Raises:
        SystemExit: with code 0, under FSDP.
    """
    if trainer.is_fsdp_enabled:
        print(f"The base is sharded, so the page ends here: notebook 04 loads {folder} back "
              "in one process; copy it to DRIVE or HUB_REPO yourself.")  # fmt: skip
        sys.exit(0)
