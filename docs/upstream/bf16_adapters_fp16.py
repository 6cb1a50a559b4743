"""SFTTrainer turns the adapters of a 4-bit model into bfloat16 although fp16 was asked for.

Runs in seconds, without a GPU: it shows the dtype. With a GPU it also takes one step, which dies.
"""

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from trl import SFTConfig, SFTTrainer

gpu = torch.cuda.is_available()
config = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
)
four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16)
vocabulary = WordLevel({"<end>": 0, "word": 1}, unk_token="<end>")
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(vocabulary), eos_token="<end>", pad_token="<end>"
)

with tempfile.TemporaryDirectory() as folder:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float16, quantization_config=four_bits
    )
    trainer = SFTTrainer(
        model=model,
        # fp16=True itself is refused without a GPU; on a CPU the dtype is the whole of the fault
        args=SFTConfig(
            output_dir=folder, max_steps=1, fp16=gpu, bf16=False, use_cpu=not gpu, report_to="none"
        ),
        train_dataset=Dataset.from_dict({"input_ids": [[1, 2, 3, 4]] * 8}),
        peft_config=LoraConfig(r=4, task_type="CAUSAL_LM"),
        processing_class=tokenizer,
    )
    kinds = {str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}
    print(f"bf16={trainer.args.bf16}, trainable weights in {sorted(kinds)}")
    if gpu:
        trainer.train()
