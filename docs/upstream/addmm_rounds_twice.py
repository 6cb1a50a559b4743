"""In bf16, does `torch.addmm` add before it rounds the product, or after?"""

import torch

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
x, w = (torch.randn(1024, 1024, device=device) * scale for scale in (1, 0.04))
thin, b = (torch.randn(1024, 32, device=device) * scale for scale in (0.6, 2e-4))
x, w, thin, b = (t.bfloat16() for t in (x, w, thin, b))
product, small = x.double() @ w.double().T, thin.double() @ b.double().T


def share(y: torch.Tensor) -> float:
    """How much of `small` is in `y`: 1 if nothing of it is lost."""
    return (((y.double() - product) * small).sum() / small.square().sum()).item()


added = small.bfloat16()
print(f"{device}: by addmm {share(torch.addmm(added, x, w.T)):.1f}")
print(f"{device}: onto a rounded product {share(x @ w.T + added):.1f}")
