"""Try a base before it is embedded: page 03's adapter on it, and what both answer.

    python tools/try_base.py FOLDER --rate 7e-4 --steps 30 --batch 16

Trains as page 03 does, without early stopping, scores as `make results` does, prints all test
answers and the figures in three lines, and writes nothing. With `--questions N` it answers N
questions that no page asks, and reads the answers by the frames they should be made of: a recipe
chosen by that owes nothing to the test answers.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helpers.dialogues import load_dialogues, split_rows
from helpers.generation import generate_texts, sampling
from helpers.profiles import TINY
from helpers.prompts import format_prompt
from tools.frames import grade, patterns
from tools.make_tiny_falcon import load_text, set_aside
from tools.measure_comparison import compare
from tools.recipe import Trained, train


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


def graded(trained: Trained, n: int) -> str:
    """A line on the answers to n questions that no page asks."""
    text = load_text(ROOT / "assets/pretraining", Path(TINY.dataset))
    asked = set_aside(text.questions, seed=0)[0][:n]
    prompts = [format_prompt(piece["question"]) for piece in asked]
    said = generate_texts(trained.model, trained.tokenizer, prompts, sampling(trained.tokenizer))
    known = patterns(text.phrases.values())
    own = {piece["topic"]: patterns([text.phrases[piece["topic"]]]) for piece in asked}
    grades = [
        grade(answer.text, own[piece["topic"]], known)
        for answer, piece in zip(said, asked, strict=True)
    ]
    share = {
        "stop": sum(answer.finished for answer in said),
        "are good": sum(g.good and a.finished for g, a in zip(grades, said, strict=True)),
        "repeat a phrase": sum(g.repeats for g in grades),
    }
    return f"of {len(asked)}: " + ", ".join(
        f"{k / len(asked):.0%} {what}" for what, k in share.items()
    )


def main() -> None:
    """Train, answer, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--rate", type=float, default=TINY.learning_rate)
    parser.add_argument("--steps", type=int, default=TINY.max_steps)
    parser.add_argument("--batch", type=int, default=TINY.batch_size)
    parser.add_argument("--questions", type=int, default=0)
    args = parser.parse_args()
    profile = replace(TINY, model=args.folder, learning_rate=args.rate, max_steps=args.steps,
                      batch_size=args.batch, early_stop=False)  # fmt: skip
    split = split_rows(load_dialogues(TINY.dataset)[0])
    trained = train(split["train"], profile)
    if args.questions:
        print(graded(trained, args.questions))
        return
    figures = compare(trained.model, trained.tokenizer, split["test"])
    print(line("adapter", figures["adapter"]))
    print(line("base", figures["base"]))
    print(f"answer loss falls by {figures['answer_loss_fall']:.0%}; {trained.seconds:.0f} s")


if __name__ == "__main__":
    main()
