"""What SFTTrainer gets wrong or leaves out: the order of rows, fp32 adapters, plain progress."""

import time
from collections.abc import Sequence

import numpy as np
from transformers import Trainer, TrainerCallback


def row_order(
    lengths: Sequence[int], rows_per_step: int, steps: int, seed: int = 0, packed: int = 0
) -> list[int]:
    """Lay out once, from the seed, which row is seen when; by length inside a step.

    Every pass shuffles all rows anew, passes are laid end to end, and each step takes the next
    `rows_per_step`. Inside a step rows are sorted, longest first, so that a micro-batch holds
    rows of like length and little padding; the step's gradient does not depend on that order.
    Packed rows have no padding: there `deal_evenly` gives each micro-batch as many tokens as the
    next, so that none needs much more memory. Feed the rows with
    `train_sampling_strategy="sequential"`: a run that resumes at step n then sees just what an
    unbroken one would.

    Args:
        lengths: (n_rows,) int, tokens per row.
        rows_per_step: batch size × accumulation × processes.
        steps: optimizer steps.
        seed: of the shuffles.
        packed: rows of a micro-batch if they are packed; 0 if they are padded.

    Returns:
        `rows_per_step * steps` row numbers.

    Raises:
        ValueError: if there are no rows, or `steps` is not positive.

    Example:
        >>> row_order([5, 9, 7], rows_per_step=3, steps=2)    # two passes, each longest first
        [1, 2, 0, 1, 2, 0]
    """
    if steps < 1:
        raise ValueError(f"MAX_STEPS = {steps} trains nothing: set it to 1 or more")
    if not len(lengths):
        raise ValueError("no rows to train on: check DATASET")
    x, wanted = np.asarray(lengths), rows_per_step * steps
    generator = np.random.default_rng(seed)
    passes = [generator.permutation(len(x)) for _ in range(-(-wanted // len(x)))]
    table = np.concatenate(passes)[:wanted].reshape(steps, rows_per_step)
    longest_first = np.argsort(-x[table], axis=1, kind="stable")
    table = np.take_along_axis(table, longest_first, axis=1)
    if packed:
        table = np.stack([step[deal_evenly(x[step], packed)] for step in table])
    return table.ravel().tolist()


def deal_evenly(lengths: Sequence[int], batch_size: int) -> list[int]:
    """Deal rows into micro-batches of as many rows and nearly as many tokens each.

    Rows come longest first, and each goes to the lightest micro-batch that has room.

    Args:
        lengths: (n_rows,) int, longest first; `batch_size` divides n_rows.
        batch_size: rows of a micro-batch.

    Returns:
        Positions in `lengths`, micro-batch after micro-batch.

    Source:
        Graham (1969), Bounds on multiprocessing timing anomalies, for the rule without the room.

    Example:
        >>> deal_evenly([9, 6, 5, 2], batch_size=2)    # 9 + 2 and 6 + 5 tokens
        [0, 3, 1, 2]
    """
    batches: list[list[int]] = [[] for _ in range(len(lengths) // batch_size)]
    for row in range(len(lengths)):
        room = [batch for batch in batches if len(batch) < batch_size]
        min(room, key=lambda batch: sum(lengths[i] for i in batch)).append(row)
    return [row for batch in batches for row in batch]


def padding_share(lengths: Sequence[int], order: Sequence[int], batch_size: int) -> float:
    """Share of a batch's tokens that is padding, when rows come in `order`.

    Args:
        lengths: (n_rows,) int, tokens per row.
        order: row numbers in the order in which they are fed.
        batch_size: rows padded to one length together.

    Returns:
        Padding tokens over all tokens computed, 0 to 1.

    Example:
        >>> padding_share([10, 20], order=[0, 1], batch_size=2)    # 40 computed, 10 of them padding
        0.25
    """
    x = np.asarray(lengths)[np.asarray(order)]
    batches = [x[i : i + batch_size] for i in range(0, len(x), batch_size)]
    computed = sum(int(b.max()) * len(b) for b in batches)
    return 1 - int(x.sum()) / computed


def adapters_to_fp32(trainer: Trainer) -> int:
    """Hold the trainable weights in float32, as fp16 training needs; call it before `train()`.

    SFTTrainer casts the LoRA weights of a 4-bit model to bfloat16, whatever precision was asked
    for. On a T4 the gradient scaler then stops: it has no bfloat16 kernel. On a CPU bfloat16
    adapters are slow.

    Args:
        trainer: built, its optimizer not yet made.

    Returns:
        How many weights are trainable, counted one by one.

    Raises:
        RuntimeError: if the optimizer was already built, since it would keep the old weights.

    Example:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> layer = torch.nn.Linear(2, 3, dtype=torch.bfloat16)
        >>> adapters_to_fp32(SimpleNamespace(model=layer, optimizer=None)), layer.weight.dtype
        (9, torch.float32)
    """
    if trainer.optimizer is not None:
        raise RuntimeError("the optimizer is already built: call adapters_to_fp32 before train()")
    trainable = [p for p in trainer.model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.data = parameter.data.float()
    return sum(p.numel() for p in trainable)


def minutes(seconds: float) -> str:
    """Seconds as people say them.

    Example:
        >>> minutes(8040), minutes(75), minutes(12)
        ('2 h 14 min', '1 min 15 s', '12 s')
    """
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


class ProgressLines(TrainerCallback):
    """Plain lines: passes over the rows, time left, and at each evaluation the losses.

    The time left is said after the first step, again after the third, at each evaluation, and
    once a minute where evaluations are rarer. The first step holds one-off work (compiling,
    allocating): it is told by its later micro-batches where it has three or more, and is a bound
    where it has not; from the second on, steps count whole. Only the first process prints.

    Args:
        rows: in the training part; 0 says nothing about passes.
        say: what takes each line.

    Example:
        >>> from types import SimpleNamespace as Some
        >>> args = Some(train_batch_size=4, gradient_accumulation_steps=2, world_size=1)
        >>> state = Some(is_world_process_zero=True, max_steps=5)
        >>> ProgressLines(rows=10).on_train_begin(args, state, control=None)    # 5 · 8 / 10
        5 steps of 8 rows: 4.0 passes over 10 rows
    """

    def __init__(self, rows: int = 0, say=print):
        self.rows, self.say = rows, say
        self.times, self.parts = [], []  # seconds of each step; when each micro-batch ended
        self.train_loss, self.best, self.best_step = float("nan"), float("inf"), 0
        self.began = self.ended = self.said = self.evaluation = 0.0

    def _line(self, state, text: str) -> None:
        self.said = time.perf_counter()
        if state.is_world_process_zero:
            self.say(text)

    def on_train_begin(self, args, state, control, **kwargs):
        """Say how many passes over the data the steps make; a resumed run knows its best step."""
        self.times, self.parts, self.ended = [], [], time.perf_counter()
        if getattr(state, "best_metric", None) is not None:
            self.best, self.best_step = state.best_metric, state.best_global_step
        if self.rows:
            per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            passes = state.max_steps * per_step / self.rows
            steps = f"{state.max_steps} steps of {per_step} rows"
            self._line(state, f"{steps}: {passes:.1f} passes over {self.rows} rows")

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock of this step."""
        self.began = time.perf_counter()

    def on_substep_end(self, args, state, control, **kwargs):
        """Note when each micro-batch of the first step ended."""
        if not self.times:
            self.parts.append(time.perf_counter())

    def on_step_end(self, args, state, control, **kwargs):
        """Stop the clock; after the first and the third step say how long the rest will take."""
        self.on_substep_end(args, state, control)
        self.ended = time.perf_counter()
        self.times.append(self.ended - self.began)
        then = f", then {self.step_seconds:.1f} s" if len(self.times) == 3 else ""
        if len(self.times) in (1, 3):
            self._line(state, f"first step {self.times[0]:.1f} s{then}; {self._left(state)}")

    @property
    def step_seconds(self) -> float:
        """Median seconds a step, the first one left out, or what its micro-batches promise.

        Example:
            >>> lines = ProgressLines()
            >>> lines.times = [9.0, 1.0, 3.0]
            >>> lines.step_seconds    # midway between 1 and 3
            2.0
            >>> lines.times, lines.parts = [9.0], [8.0, 8.5, 9.0]    # compiled for 7.5 s
            >>> lines.step_seconds    # three micro-batches of 0.5 s
            1.5
        """
        if len(self.times) == 1 and len(self.parts) > 2:
            return float(np.median(np.diff(self.parts))) * len(self.parts)
        return float(np.median(self.times[1:] or self.times))

    def _left(self, state) -> str:
        steps, every = state.max_steps - state.global_step, getattr(state, "eval_steps", None)
        seconds = self.step_seconds * steps + self.evaluation * (steps // every if every else 0)
        bound = len(self.times) == 1 and len(self.parts) < 3
        return f"{'at most' if bound else 'about'} {minutes(seconds)} left"

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Remember the last training loss; say it if nothing was said for a minute."""
        self.train_loss = float((logs or {}).get("loss", self.train_loss))
        if self.times and time.perf_counter() - self.said > 60:
            step = f"step {state.global_step} of {state.max_steps}"
            self._line(state, f"{step}: loss {self.train_loss:.3f}; {self._left(state)}")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """One line: step, losses, when the held-out loss last improved, time left."""
        held_out = (metrics or {}).get("eval_loss")
        if held_out is None:
            return
        self.evaluation = time.perf_counter() - self.ended
        if held_out < self.best:
            self.best, self.best_step = held_out, state.global_step
        loss = f"loss {self.train_loss:.3f}, " if self.times else ""
        left = f"; {self._left(state)}" if self.times else ""
        self._line(
            state,
            f"step {state.global_step} of {state.max_steps}: {loss}held-out {held_out:.3f} "
            f"(last improved at step {self.best_step}, to {self.best:.3f}){left}",
        )
