"""On CPUs with AVX512-BF16, a Linear4bit that was evaluated once has no backward any more."""

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit

torch.manual_seed(0)
layer = Linear4bit(128, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")
layer.weight = Params4bit(torch.randn(128, 128), quant_type="nf4", module=layer)
layer = layer.to("cpu")  # quantizes
true = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
x = torch.randn(8, 128, requires_grad=True)


def compare(when: str) -> None:
    """Print how the layer's gradient agrees with that of its dequantized weight."""
    (expected,) = torch.autograd.grad((x @ true.T).square().sum(), x)
    (found,) = torch.autograd.grad(layer(x).square().sum(), x, allow_unused=True)
    if found is None:
        print(f"{when}: no gradient at all")
        return
    cosine = torch.cosine_similarity(expected.flatten(), found.flatten(), dim=0).item()
    print(f"{when}: cosine with the true gradient {cosine:.2f}")


compare("before an evaluation")
with torch.no_grad():
    layer.eval()(x.detach())
layer.train()
repacked = getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
compare(f"after it (repacked: {repacked})")
