"""Try a base before it is embedded: page 03's adapter on it, and what both answer.

    python tools/try_base.py FOLDER --rate 7e-4 --steps 45

Trains as page 03 does, without early stopping, scores as `make results` does, prints all test
answers and the figures in three lines, and writes nothing.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helpers.dialogues import load_dialogues, split_rows
from helpers.profiles import TINY
from tools.measure_comparison import compare
from tools.recipe import train


def line(name: str, figures: dict) -> str:
    """One side's figures in a line.

    Example:
        >>> rates = {key: {"value": 1.0} for key in ("eos_rate", "turn_leak_rate", "answer_loss")}
        >>> line("adapter", rates)
        'adapter: stops 1.00, invents 1.00, answer loss 1.000'
    """
    stops, invents, loss = (
        figures[key]["value"] for key in ("eos_rate", "turn_leak_rate", "answer_loss")
    )
    return f"{name}: stops {stops:.2f}, invents {invents:.2f}, answer loss {loss:.3f}"


def main() -> None:
    """Train, answer, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--rate", type=float, default=TINY.learning_rate)
    parser.add_argument("--steps", type=int, default=TINY.max_steps)
    args = parser.parse_args()
    profile = replace(TINY, model=args.folder, learning_rate=args.rate, max_steps=args.steps,
                      early_stop=False)  # fmt: skip
    split = split_rows(load_dialogues(TINY.dataset)[0])
    trained = train(split["train"], profile)
    figures = compare(trained.model, trained.tokenizer, split["test"])
    print(line("adapter", figures["adapter"]))
    print(line("base", figures["base"]))
    print(f"answer loss falls by {figures['answer_loss_fall']:.0%}; {trained.seconds:.0f} s")


if __name__ == "__main__":
    main()
