"""How far a merged model drifts from the one that was trained: adapter beside a 4-bit base.

    python tools/measure_leaving.py

Each way to leave is compared, on the validation dialogues, with the 4-bit base and the adapter
beside it. Models are loaded one after another, never two at once. Writes
results/<machine>/leaving.json.
"""

import gc
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from bitsandbytes.functional import quantize_4bit
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.checkpoints import find_adapter
from helpers.dialogues import load_dialogues, split_rows
from helpers.evaluation import answer_losses, mean_interval
from helpers.falcon import keep_cpu_layout, load_config, load_falcon, load_tokenizer
from helpers.profiles import Profile, detect_profile
from helpers.prompts import format_prompt
from tools.merge import merge, read_adapter, read_shard, round_to_nf4, shards
from tools.results import this_command, write_result
from tools.script_args import override

PROFILE = "auto"
BASE = None  # None: the profile's own
REVISION = None
ADAPTER = None


def log_probabilities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, str]]
) -> list[Tensor]:
    """Each row's next-token distributions: (tokens, vocabulary) float32 on the CPU, in nats."""
    found = []
    for row in rows:
        text = f"{format_prompt(row['question'])} {row['answer']}"
        ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
        with torch.no_grad():
            found.append(model(input_ids=ids).logits[0].float().log_softmax(-1).cpu())
    return found


def drift(reference: Sequence[Tensor], other: Sequence[Tensor]) -> dict[str, Any]:
    """Compare the next-token distributions of two models, row by row.

    Args:
        reference: (tokens, vocabulary) log-probabilities of each row.
        other: the same of the other model.

    Returns:
        "kl": mean divergence KL(reference ‖ other) in nats a token; "same_choice": share of tokens
        at which both find the same one likeliest. Both are estimates over rows. "largest": the
        largest difference of any log-probability, one number.

    Example:
        >>> p = torch.tensor([[0.5, 0.5]]).log()
        >>> same = drift([p, p], [p, p])
        >>> same["kl"]["value"], same["same_choice"]["value"], same["largest"]
        (0.0, 1.0, 0.0)
    """
    pairs = list(zip(reference, other, strict=True))
    kl = [(p.exp() * (p - q)).sum(-1).mean().item() for p, q in pairs]
    same = [(p.argmax(-1) == q.argmax(-1)).float().mean().item() for p, q in pairs]
    largest = max((p - q).abs().max().item() for p, q in pairs)
    return {"kl": mean_interval(kl), "same_choice": mean_interval(same), "largest": largest}


def ways_to_leave(
    profile: Profile, adapter: str, folder: Path, revision: str | None = None
) -> dict[str, Callable[[], PreTrainedModel]]:
    """The ways that are compared; each loads its own model when it is called.

    Args:
        profile: of this machine, with the base.
        adapter: folder of the adapter.
        folder: an empty folder, for merged models.
        revision: of the base on the Hub.

    Returns:
        The reference first: "beside"; then "off" (the base alone), "as_trained" (merged into the
        weights rounded to NF4, kept in 16 bits), "as_published" (merged into the weights as they
        were published), "quantized_again" (the same, loaded in 4 bits) and "in_4_bits" (merged
        into the 4-bit weights where they are).
    """

    def beside(switch: str = "") -> PreTrainedModel:
        base = load_falcon(profile.model, profile, revision=revision)
        model = PeftModel.from_pretrained(base, adapter).eval()
        if switch == "merged":
            model = model.merge_and_unload()
            if not profile.on_gpu:
                keep_cpu_layout(model)
        if switch == "off":
            model = model.unload()
        return model.eval()

    def merged(rounded: bool, quantize: bool = False) -> PreTrainedModel:
        merge(profile.model, adapter, folder / "merged", revision, rounded)
        return load_falcon(str(folder / "merged"), profile, quantize=quantize)

    return {
        "beside": beside,
        "off": lambda: beside("off"),
        "as_trained": lambda: merged(True),
        "as_published": lambda: merged(False),
        "quantized_again": lambda: merged(False, quantize=True),
        "in_4_bits": lambda: beside("merged"),
    }


def kept(before: Tensor, after: Tensor, update: Tensor) -> float:
    """How much of an update is in the difference of two weights: its length along the update.

    Returns:
        1 if all of it is there, 0 if none is.

    Example:
        >>> x = torch.tensor([1.0, 0.0])
        >>> kept(x, x + torch.tensor([0.5, 0.7]), update=x)    # 0.5 of 1 along the update
        0.5
    """
    return ((after - before) * update).sum().item() / update.square().sum().item()


def nf4_codes(weight: Tensor) -> Tensor:
    """The level, 0 to 15, that each value of a weight is rounded to.

    Example:
        >>> nf4_codes(torch.tensor([[-1.0, 0.0, 1.0, 0.0] * 16])).unique().tolist()
        [0, 7, 15]
    """
    packed = quantize_4bit(weight.contiguous(), quant_type="nf4")[0].flatten()
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten()


def swallowed(base: Path, adapter: str) -> dict[str, float]:
    """Count what rounding to NF4 leaves of an adapter's update B·A, as a mean over weights.

    A weight that was rounded once lies exactly on a level; an update smaller than half the way to
    the next level is rounded away again, everywhere. An unrounded weight lies anywhere between two
    levels, so the same update carries some weights over the middle, and on average it stays.

    Args:
        base: folder of the base's checkpoint.
        adapter: folder of the adapter.

    Returns:
        "in_4_bits" and "quantized_again": the share of the update that is kept; "codes_changed":
        the share of weights that land on another level when merged in 4 bits.
    """
    pairs, scale = read_adapter(adapter)
    found: dict[str, list[float]] = {"in_4_bits": [], "quantized_again": [], "codes_changed": []}
    for path in shards(base):
        for name, weight in read_shard(path):
            if name not in pairs:
                continue
            a, b = (matrix.float() for matrix in pairs[name])
            weight, update = weight.float(), scale * (b @ a)
            once = round_to_nf4(weight)
            twice = round_to_nf4(once + update)
            found["in_4_bits"].append(kept(once, twice, update))
            again = round_to_nf4(weight + update)
            found["quantized_again"].append(kept(once, again, update))
            moved = nf4_codes(once + update) != nf4_codes(once)
            found["codes_changed"].append(moved.float().mean().item())
    return {name: float(np.mean(values)) for name, values in found.items()}


def measure(
    profile: Profile, adapter: str, rows: Sequence[dict[str, str]], revision: str | None = None
) -> dict[str, Any]:
    """Load each way in turn and compare it with the first.

    Args:
        profile: of this machine, with the base.
        adapter: folder of the adapter.
        rows: dialogues with `question` and `answer`.
        revision: of the base on the Hub.

    Returns:
        {way: {"kl", "same_choice", "largest", "answer_loss"}}; the reference has its loss alone.
    """
    tokenizer = load_tokenizer(profile.model, revision)
    figures: dict[str, Any] = {}
    reference: list[Tensor] = []
    with tempfile.TemporaryDirectory() as folder:
        for way, load in ways_to_leave(profile, adapter, Path(folder), revision).items():
            model = load()
            found = log_probabilities(model, tokenizer, rows)
            losses = answer_losses(model, tokenizer, rows)[0]
            figures[way] = drift(reference, found) if reference else {}
            figures[way]["answer_loss"] = mean_interval(np.asarray(losses))
            reference = reference or found
            del model
            gc.collect()
            torch.cuda.empty_cache()
    return figures


def main() -> None:
    """Measure, print one line for each way, write."""
    override(globals(), sys.argv[1:])
    profile = detect_profile(PROFILE, model=BASE)
    hub, embedded = (profile.adapter, None) if profile.on_gpu else (None, profile.adapter)
    config = load_config(profile.model, REVISION)
    places = (ADAPTER, "artifacts", None, hub, embedded)
    adapter, where = find_adapter(*places, config.hidden_size, profile.model)
    rows = split_rows(load_dialogues(profile.dataset)[0])["validation"]
    figures = measure(profile, adapter, list(rows), REVISION)
    for way, found in figures.items():
        kl = f", KL {found['kl']['value']:.5f} nats a token" if "kl" in found else ""
        print(f"{way}: answer loss {found['answer_loss']['value']:.4f}{kl}")
    if Path(profile.model).is_dir():
        figures["update_kept"] = swallowed(Path(profile.model), adapter)
        print("of the update is kept: ", figures["update_kept"])
    about = {"model": Path(profile.model).name, "adapter_from": where, "rows": len(rows)}
    head = "drift of merged models from the 4-bit base with the adapter beside it"
    print(write_result("leaving", figures | about, head, this_command()))


if __name__ == "__main__":
    main()
