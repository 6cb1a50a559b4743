"""Base against adapter on the test dialogues, over three sampling seeds.

    python tools/measure_comparison.py

Notebook 04's own functions on the embedded tiny Falcon and the newest adapter; writes
results/cpu/comparison.json.
"""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datasets import Dataset
from peft import PeftModel

from helpers.checkpoints import find_adapter
from helpers.dialogues import load_dialogues, split_rows
from helpers.evaluation import answer_losses, mean_interval, paired_difference, score_answers
from helpers.falcon import load_falcon, load_tokenizer, use_fused_attention
from helpers.generation import generate_texts, sampling
from helpers.profiles import TINY
from helpers.prompts import format_prompt
from tools.results import this_command, write_result

SEEDS = (0, 1, 2)


def compare(model: Any, tokenizer: Any, test: Dataset) -> dict[str, Any]:
    """Both sides on the test dialogues; prints what each answers with the first seed.

    Args:
        model: with its adapter, in eval mode.
        tokenizer: the model's own.
        test: with `question` and `answer`.

    Returns:
        "adapter" and "base" with page 04's figures and `answer_loss` (nats a token), each a mean
        with its interval; "difference" of the two losses; "answer_loss_fall", a share; "seeds".
    """
    prompts = [format_prompt(question) for question in test["question"]]
    config, figures, losses = sampling(tokenizer), {}, {}

    def measure(name: str) -> None:
        runs = [generate_texts(model, tokenizer, prompts, config, seed) for seed in SEEDS]
        said = [answer for run in runs for answer in run]
        figures[name] = score_answers(said, groups=list(test["question"]) * len(SEEDS), limit=256)
        losses[name] = answer_losses(model, tokenizer, test)[0]
        figures[name]["answer_loss"] = mean_interval(losses[name])
        for question, answer in zip(test["question"], said, strict=False):
            print(f"{name}: {question}\n    {answer.text.strip()[:400]}")

    measure("adapter")
    with model.disable_adapter():
        measure("base")
    figures["difference"] = paired_difference(losses["adapter"], losses["base"])
    fall = 1 - figures["adapter"]["answer_loss"]["value"] / figures["base"]["answer_loss"]["value"]
    return figures | {"answer_loss_fall": fall, "seeds": len(SEEDS)}


def main() -> None:
    """Answer, score, write."""
    test = split_rows(load_dialogues(TINY.dataset)[0])["test"]
    base = load_falcon(TINY.model, TINY)
    use_fused_attention(base)
    places = (None, ROOT / "artifacts", None, None, TINY.adapter)
    adapter, where = find_adapter(*places, base.config.hidden_size, TINY.model)
    model, tokenizer = PeftModel.from_pretrained(base, adapter).eval(), load_tokenizer(TINY.model)
    figures = compare(model, tokenizer, test) | {"adapter_from": where}
    figure = "base against adapter, 18 test dialogues, three sampling seeds, tiny Falcon"
    print(write_result("comparison", figures, figure, this_command()))


if __name__ == "__main__":
    main()
