"""What SFTTrainer gets wrong (trap 2), the order of rows, and plain progress."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

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


def test_progress_says_passes_estimate_and_best_step() -> None:
    said: list[str] = []
    lines = ProgressLines(rows=10, say=said.append)
    args = SimpleNamespace(train_batch_size=4, gradient_accumulation_steps=2, world_size=1)
    state = SimpleNamespace(is_world_process_zero=True, max_steps=5, global_step=0)
    lines.on_train_begin(args, state, None)
    for step in range(1, 4):
        state.global_step = step
        lines.on_step_begin(args, state, None)
        lines.on_step_end(args, state, None)
    lines.on_log(args, state, None, logs={"loss": 2.0})
    lines.on_evaluate(args, state, None, metrics={"eval_loss": 3.0})
    lines.on_evaluate(args, state, None, metrics={"eval_loss": 4.0})
    assert said[0] == "5 steps of 8 rows: 4.0 passes over 10 rows"
    assert said[1].startswith("first step 0.0 s") and "left" in said[1]
    assert said[2].startswith("step 3 of 5: loss 2.000, held-out 3.000 (best 3.000 at step 3)")
    assert "held-out 4.000 (best 3.000 at step 3)" in said[3]


def test_a_t4_profile_computes_in_fp16_with_64_rows_a_step() -> None:
    from helpers.profiles import A100, T4

    assert T4.compute_dtype is torch.float16 and T4.max_steps < 200 and T4.max_length == 512
    assert T4.batch_size * T4.accumulation == A100.batch_size * A100.accumulation == 64
    assert replace(T4, max_length=256).max_length == 256
