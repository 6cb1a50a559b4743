"""The recipe of page 03 as one function, for tools that train many times.

The page shows the recipe step by step; tests/test_crossval.py compares each value here with the
page's own.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from helpers.dialogues import to_prompt_completion
from helpers.falcon import LINEARS, load_falcon, load_tokenizer, use_fused_attention
from helpers.profiles import Profile
from helpers.training import adapters_to_fp32, row_order

Look = Callable[[int, Any], None]


class Watch(TrainerCallback):
    """Calls `look(step, model)` before training and after chosen steps; may end a run early.

    A run that is ended keeps the learning rates of the longer schedule up to there.
    """

    def __init__(self, stop_at: int | None = None, looks: tuple[int, ...] = (), look: Look = print):
        self.stop_at, self.looks, self.look = stop_at, looks, look

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Look at step 0."""
        if self.looks:
            self.look(0, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Look, and stop if this was the step."""
        if state.global_step in self.looks:
            self.look(state.global_step, model)
        control.should_training_stop |= state.global_step == self.stop_at


@dataclass
class Trained:
    """A model with its adapter in eval mode, and how it came about."""

    model: Any
    tokenizer: Any
    steps: int  # the step kept
    held_out: list[tuple[int, float]]  # (step, loss) on the validation rows
    trainable: int
    seconds: float


def settings(profile: Profile, watched: bool, seed: int, folder: str) -> dict[str, Any]:
    """Page 03's keywords of `SFTConfig`; without validation rows nothing is evaluated or saved."""
    when = "steps" if watched else "no"
    return dict(
        output_dir=folder, max_steps=profile.max_steps,
        per_device_train_batch_size=profile.batch_size,
        gradient_accumulation_steps=profile.accumulation,
        per_device_eval_batch_size=profile.batch_size, max_length=profile.max_length,
        learning_rate=profile.learning_rate, lr_scheduler_type="cosine", warmup_steps=0.03,
        max_grad_norm=0.3, optim=profile.optim, bf16=profile.compute_dtype is torch.bfloat16,
        fp16=profile.compute_dtype is torch.float16,
        activation_checkpointing=profile.gradient_checkpointing,
        activation_checkpointing_kwargs={"every_n_layers": profile.checkpoint_every},
        train_sampling_strategy="sequential", eval_strategy=when, eval_steps=profile.eval_steps,
        eval_on_start=watched, save_strategy=when, save_steps=profile.eval_steps,
        save_total_limit=2, load_best_model_at_end=watched, metric_for_best_model="eval_loss",
        greater_is_better=False, logging_steps=1, disable_tqdm=True, report_to="none",
        use_cpu=not profile.on_gpu, seed=seed,
    )  # fmt: skip


def lora_config(**changed: Any) -> LoraConfig:
    """Page 03's adapter for a Falcon, with some keywords changed."""
    ours = dict(
        r=32, lora_alpha=32, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM",
        target_modules=list(LINEARS),
    )  # fmt: skip
    return LoraConfig(**ours | changed)


def train(
    rows: Dataset, profile: Profile, validation: Dataset | None = None, seed: int = 0,
    watch: Watch | None = None, lora: Mapping[str, Any] | None = None,
    args: Mapping[str, Any] | None = None,
) -> Trained:  # fmt: skip
    """Train an adapter as page 03 does.

    Args:
        rows: with `question` and `answer`, to train on.
        profile: machine, batch, steps, rate.
        validation: rows to choose the step by, and to end early by where the profile says so;
            None keeps the last step.
        seed: of the order of rows, the adapter's start, the dropout.
        watch: looks on the way, or a step to stop at.
        lora, args: keywords of `LoraConfig` and `SFTConfig` that differ from the page's.

    Returns:
        `Trained`, its model on the profile's device.
    """
    model, tokenizer = load_falcon(profile.model, profile), load_tokenizer(profile.model)
    use_fused_attention(model)
    pairs, watched = to_prompt_completion(rows), validation is not None
    texts = [row["prompt"] + row["completion"] + tokenizer.eos_token for row in pairs]
    lengths = [len(ids) for ids in tokenizer(texts).input_ids]
    order = row_order(lengths, profile.batch_size * profile.accumulation, profile.max_steps, seed)
    early = [EarlyStoppingCallback(3)] * (watched and profile.early_stop)
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model, args=SFTConfig(**settings(profile, watched, seed, folder) | (args or {})),
            processing_class=tokenizer, peft_config=lora_config(**lora or {}),
            train_dataset=Dataset.from_dict(pairs.select(order).to_dict()),
            eval_dataset=to_prompt_completion(validation) if watched else None,
            callbacks=early + [watch] * (watch is not None),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        if profile.compute_dtype is not torch.bfloat16:
            adapters_to_fp32(trainer)
        seconds = trainer.train().metrics["train_runtime"]
    held_out = [(x["step"], x["eval_loss"]) for x in trainer.state.log_history if "eval_loss" in x]
    kept = min(held_out, key=lambda x: x[1])[0] if watched else trainer.state.global_step
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    return Trained(trained, tokenizer, kept, held_out, trainable, seconds)
