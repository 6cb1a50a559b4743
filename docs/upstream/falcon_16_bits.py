"""load_in_4bit=True leaves every linear of Falcon in 16 bits. Runs in seconds, without a GPU."""

import tempfile

import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FalconConfig, LlamaConfig

four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
shape = dict(vocab_size=256, hidden_size=128, num_hidden_layers=2, num_attention_heads=4)

for config in (FalconConfig(**shape), LlamaConfig(**shape, intermediate_size=256)):
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=four_bits
        )
    layers = sum(isinstance(module, Linear4bit) for module in model.modules())
    bits = {p.dtype for name, p in model.named_parameters() if "norm" not in name}
    print(
        f"{config.model_type}: is_loaded_in_4bit={model.is_loaded_in_4bit}, "
        f"{layers} Linear4bit layers, weights in {sorted(map(str, bits))}"
    )
