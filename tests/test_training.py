"""What SFTTrainer gets wrong (trap 2), the order of rows, and plain progress."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from helpers import training
from helpers.falcon import LINEARS, load_falcon, load_tokenizer
from helpers.profiles import TINY
from helpers.training import ProgressLines, adapters_to_fp32, padding_share, row_order

ROWS = Dataset.from_list(
    [{"prompt": "<HUMAN>: Why?\n<ASSISTANT>:", "completion": " So it is."}] * 2
)


def make_trainer(folder: str) -> SFTTrainer:
    args = SFTConfig(
        output_dir=folder,
        max_steps=1,
        per_device_train_batch_size=2,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    lora = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=list(LINEARS))
    return SFTTrainer(
        model=load_falcon(TINY.model, TINY),
        args=args,
        train_dataset=ROWS,
        peft_config=lora,
        processing_class=load_tokenizer(TINY.model),
    )


def kinds(trainer: SFTTrainer) -> set[torch.dtype]:
    return {p.dtype for p in trainer.model.parameters() if p.requires_grad}


def test_trap_2_without_the_mend_the_adapters_are_bfloat16(tmp_path) -> None:
    trainer = make_trainer(str(tmp_path))
    assert kinds(trainer) == {torch.bfloat16}, (
        "trl has mended this: the mend adapters_to_fp32 may go"
    )


def test_trap_2_mended_before_the_optimizer_is_built(tmp_path) -> None:
    trainer = make_trainer(str(tmp_path))
    assert adapters_to_fp32(trainer) == sum(
        p.numel() for p in trainer.model.parameters() if p.requires_grad
    )
    assert kinds(trainer) == {torch.float32}
    trainer.train()
    held = {p.dtype for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {torch.float32}
    with pytest.raises(
        RuntimeError, match="optimizer is already built: call adapters_to_fp32 before"
    ):
        adapters_to_fp32(trainer)


def test_row_order_is_a_fixed_layout_of_whole_passes() -> None:
    lengths = list(range(100, 230))
    order = row_order(lengths, rows_per_step=64, steps=10, seed=5)
    assert order == row_order(lengths, rows_per_step=64, steps=10, seed=5)
    assert order != row_order(lengths, rows_per_step=64, steps=10, seed=6)
    assert len(order) == 640
    counts = [order.count(i) for i in range(130)]
    assert set(counts) <= {4, 5}, "640 rows are four passes of 130 and a part of a fifth"
    for step in range(10):
        rows = [lengths[i] for i in order[64 * step : 64 * step + 64]]
        assert rows == sorted(rows, reverse=True)


def test_row_order_holds_the_same_rows_a_step_whatever_their_lengths() -> None:
    plain = row_order([0] * 30, rows_per_step=8, steps=9, seed=1)
    by_length = row_order(list(range(30)), rows_per_step=8, steps=9, seed=1)
    for step in range(9):
        cut = slice(8 * step, 8 * step + 8)
        assert sorted(plain[cut]) == sorted(by_length[cut])


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_and_no_rows_are_refused_in_a_sentence(steps: int) -> None:
    with pytest.raises(
        ValueError, match=f"MAX_STEPS = {steps} trains nothing: set it to 1 or more"
    ):
        row_order([5, 6], 2, steps)
    with pytest.raises(ValueError, match="no rows to train on: check DATASET"):
        row_order([], 2, 1)


def test_padding_share_counts_what_is_computed_for_nothing() -> None:
    assert padding_share([5, 5, 5], [0, 1, 2], 2) == 0
    assert padding_share([10, 20, 30], [2, 1, 0], 2) == pytest.approx(1 - 60 / 70)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still unless it is turned."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock.now)
    return clock


def run_steps(
    lines: ProgressLines, state: SimpleNamespace, clock: SimpleNamespace, steps: list[list[float]]
) -> None:
    """Each step is a list of its micro-batches' seconds."""
    for parts in steps:
        lines.on_step_begin(ARGS, state, None)
        for number, seconds in enumerate(parts, 1):
            clock.now += seconds
            if number < len(parts):
                lines.on_substep_end(ARGS, state, None)
        state.global_step += 1
        lines.on_step_end(ARGS, state, None)
        lines.on_log(ARGS, state, None, logs={"loss": 2.0})


ARGS = SimpleNamespace(train_batch_size=4, gradient_accumulation_steps=2, world_size=1)


def some_state(**more) -> SimpleNamespace:
    return SimpleNamespace(is_world_process_zero=True, max_steps=100, global_step=0, **more)


def test_progress_says_passes_time_left_and_when_the_held_out_loss_last_improved(clock) -> None:
    said: list[str] = []
    lines, state = ProgressLines(rows=10, say=said.append), some_state(eval_steps=50)
    lines.on_train_begin(ARGS, state, None)
    clock.now += 5  # the evaluation before the first step
    lines.on_evaluate(ARGS, state, None, metrics={"eval_loss": 3.5})
    run_steps(lines, state, clock, [[20.0], [1.0], [1.0]])
    for seconds, loss in [(7, 3.0), (0, 4.0)]:
        clock.now += seconds
        lines.on_evaluate(ARGS, state, None, metrics={"eval_loss": loss})
    assert said == [
        "100 steps of 8 rows: 80.0 passes over 10 rows",
        "step 0 of 100: held-out 3.500 (last improved at step 0, to 3.500)",
        "first step 20.0 s; at most 33 min 5 s left",  # 99 * 20 + 5
        "first step 20.0 s, then 1.0 s; about 1 min 42 s left",  # 97 * 1 + 5
        "step 3 of 100: loss 2.000, held-out 3.000 (last improved at step 3, to 3.000)"
        "; about 1 min 44 s left",  # 97 * 1 + 7
        "step 3 of 100: loss 2.000, held-out 4.000 (last improved at step 3, to 3.000)"
        "; about 1 min 44 s left",
    ]


def test_the_first_estimate_leaves_out_what_is_done_once(clock) -> None:
    said: list[str] = []
    lines, state = ProgressLines(say=said.append), some_state()
    lines.on_train_begin(ARGS, state, None)
    run_steps(lines, state, clock, [[60.0, 2.0, 1.0, 1.0]])
    assert said == ["first step 64.0 s; about 6 min 36 s left"]  # 99 steps of 4 * 1 s


def test_a_line_comes_once_a_minute_and_a_resumed_run_knows_its_best_step(clock) -> None:
    said: list[str] = []
    lines = ProgressLines(say=said.append)
    state = some_state(best_metric=1.5, best_global_step=40)
    lines.on_train_begin(ARGS, state, None)
    run_steps(lines, state, clock, [[25.0]] * 6)
    lines.on_evaluate(ARGS, state, None, metrics={"eval_loss": 1.6})
    assert [line.split(":")[0] for line in said[2:]] == ["step 6 of 100", "step 6 of 100"]
    assert said[2] == "step 6 of 100: loss 2.000; about 39 min 10 s left"  # 94 * 25
    assert "held-out 1.600 (last improved at step 40, to 1.500)" in said[3]


def test_a_t4_profile_computes_in_fp16_with_64_rows_a_step() -> None:
    from helpers.profiles import A100, T4

    assert T4.compute_dtype is torch.float16 and T4.max_steps < 200 and T4.max_length == 512
    assert T4.batch_size * T4.accumulation == A100.batch_size * A100.accumulation == 64
    assert replace(T4, max_length=256).max_length == 256
