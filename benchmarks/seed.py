"""The original's recipe under today's library names, with NF4 really on: what we measure against.

Batch 16 x 4, rows in random order and padded to the longest of their batch, LoRA of rank 32 on all
four linears with dropout 0.05, gradient checkpointing, `prepare_model_for_kbit_training`, bf16
autocast, a paged 32-bit AdamW, gradients cut at 0.3. The library's own attention; nothing compiled.
Frozen: it is not made faster.
"""

from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, prepare_model_for_kbit_training
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from helpers.falcon import LINEARS, load_falcon, load_tokenizer, use_fused_attention
from helpers.profiles import Profile
from helpers.training import adapters_to_fp32


def lora_settings(dropout: float = 0.05) -> LoraConfig:
    """The original's adapters, for its recipe and for ours."""
    return LoraConfig(
        r=32,
        lora_alpha=32,
        lora_dropout=dropout,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=list(LINEARS),
    )


def seed_arguments(profile: Profile, output: str, steps: int) -> dict[str, Any]:
    """The original's training arguments; a constant rate, as its cosine decays over 320 steps."""
    return {
        "output_dir": output,
        "max_steps": steps,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 4,
        "per_device_eval_batch_size": 16,
        "max_length": 1024,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.3,
        "optim": "paged_adamw_32bit" if profile.on_gpu else "adamw_torch",
        "bf16": profile.compute_dtype is torch.bfloat16,
        "fp16": False,
        "activation_checkpointing": True,
        "train_sampling_strategy": "random",
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": not profile.on_gpu,
    }


def load_seed_base(profile: Profile) -> PreTrainedModel:
    """The base in NF4 as the original meant it: no mend of ours, LayerNorms in 32 bits."""
    model = load_falcon(profile.model, profile)
    use_fused_attention(model, False)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)


def seed_trainer(
    model: PreTrainedModel, profile: Profile, rows: Dataset, output: str, steps: int,
    dropout: float = 0.05, **others: Any,
) -> SFTTrainer:  # fmt: skip
    """The original's trainer over `rows` of one column, text; `others` replace its arguments."""
    arguments = seed_arguments(profile, output, steps) | others
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**arguments),
        processing_class=load_tokenizer(profile.model),
        peft_config=lora_settings(dropout),
        train_dataset=rows,
    )
    adapters_to_fp32(trainer)
    return trainer
