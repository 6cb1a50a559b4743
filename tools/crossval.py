"""Does fine-tuning help? Ten folds, six systems, every figure out of fold.

    python tools/crossval.py                                        # the embedded dialogues
    python tools/crossval.py --data rows.jsonl --name real          # rows of your own: figures only
    python tools/crossval.py --parts fold0 fold1 long               # a part of it
    python tools/crossval.py --profile a100 --data HUB/NAME         # Falcon-7B, on a GPU

Rows are dealt into folds by question. Of each training fold an inner part is split off, by which
the number of steps is chosen as on page 03; the adapter kept is the one trained on the rest, at
that step. Only then is the outer fold opened. What would cost too much ten times over is run on
fold 0 alone: the article's claims, the decoding settings, and the 116 passes, on a quarter of the
rows in a quarter of the article's batch.

Each part leaves a file in artifacts/crossval/NAME, so that a run that was killed goes on; a part is
made again if model, data or settings changed. With the last one --out is written, beside the
figures of other names there.
"""

import argparse
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import datasets
import numpy as np
import torch
from peft import PeftModel

from helpers.dialogues import load_dialogues
from helpers.evaluation import answer_losses, longest_shared_run, nearest_answers
from helpers.falcon import load_falcon, load_tokenizer, use_fused_attention
from helpers.generation import Generation, generate_texts, sampling
from helpers.profiles import TINY, Profile, detect_profile
from helpers.prompts import HUMAN, format_prompt
from tools.crossval_figures import merge
from tools.folds import PromptOnce, fold_assignment, likenesses, passage_losses
from tools.make_tiny_falcon import read_lines
from tools.recipe import Trained, Watch, train
from tools.results import machine_name, provenance

CLAIMS: dict[str, dict[str, Any]] = {
    "rank_16": {"lora": {"r": 16, "lora_alpha": 16}},
    "rank_64": {"lora": {"r": 64, "lora_alpha": 64}},
    "bias_lora_only": {"lora": {"bias": "lora_only"}},
    "constant_rate": {"args": {"lr_scheduler_type": "constant_with_warmup"}},
    "steps_500": {"steps": 500},
}
DECODING = {  # temperature, top-p, repetition penalty; the article's first, then one changed
    "article": (0.4, 0.6, 1.3),
    "greedy": (0.0, 1.0, 1.3),
    "temperature_1.0": (1.0, 0.6, 1.3),
    "top_p_1.0": (0.4, 1.0, 1.3),
    "penalty_1.0": (0.4, 0.6, 1.0),
    "nothing_shaped": (1.0, 1.0, 1.0),
}
CANDIDATES, EXAMPLES, FIRST_TOKENS, NEXT_TOKENS = 18, 3, 20, 32
LONG_STEPS, PASSES, LOOKS = 320, 116, (10, 20, 40, 80, 160, 320)
TOGETHER = 18  # rows scored together
SECONDS = {"fold": 270, "long": 420, "decoding": 80, "steps_500": 680}  # rehearsed; others 120
ROW_TOKENS = 100  # of the dialogues that they were rehearsed on


@dataclass(frozen=True)
class Setup:
    """Data, model and sizes of one cross-validation; `stamp` names them all in few letters."""

    data: str
    name: str
    profile: Profile
    n_folds: int = 10
    draws: int = 3  # answers drawn to each question
    limit: int = 256  # tokens of an answer
    n_passages: int = 200
    long_steps: int = LONG_STEPS
    seed: int = 0

    @cached_property
    def rows(self) -> datasets.Dataset:
        """All rows with question and answer."""
        return load_dialogues(self.data)[0]

    @cached_property
    def fold_of(self) -> np.ndarray:
        """(n_rows,) int, the fold in which each row is held out."""
        return fold_assignment(self.rows["question"], self.n_folds, self.seed)

    @cached_property
    def passages(self) -> list[str]:
        """Passages like those of the tiny Falcon's pre-training, none of which it has seen."""
        lines = read_lines(ROOT / "assets/unseen_passages.jsonl.xz")
        return [line["s"] for line in lines[: self.n_passages]]

    @cached_property
    def stamp(self) -> str:
        """Changes with the rows, the model's files and the settings."""
        profile = replace(self.profile, dataset="", adapter="", model="")
        digest = hashlib.sha256(repr(replace(self, data="", name="", profile=profile)).encode())
        digest.update(json.dumps(self.rows.to_dict()).encode())
        files = sorted(Path(self.profile.model).glob("*.safetensors")) or [self.profile.model]
        for path in files:
            digest.update(path.read_bytes() if isinstance(path, Path) else path.encode())
        return digest.hexdigest()[:16]

    @property
    def folder(self) -> Path:
        """Where the parts lie."""
        return ROOT / "artifacts/crossval" / self.name

    @property
    def parts(self) -> list[str]:
        """All parts, in the order in which they are made."""
        embedded = ("decoding", *CLAIMS) if self.name == "sample" else ()
        return [*(f"fold{k}" for k in range(self.n_folds)), "long", *embedded]

    def split(self, fold: int) -> tuple[list[int], list[int], list[int]]:
        """Row numbers (train, validation, outer) of a fold; no question stands in two."""
        outer, rest = np.flatnonzero(self.fold_of == fold), np.flatnonzero(self.fold_of != fold)
        questions = [self.rows["question"][i] for i in rest]
        inner = fold_assignment(questions, max(2, self.n_folds - 1), self.seed + 1 + fold)
        return rest[inner != 0].tolist(), rest[inner == 0].tolist(), outer.tolist()

    def take(self, numbers: Sequence[int]) -> list[dict]:
        """Rows as dictionaries, in the order of their numbers."""
        return [self.rows[int(i)] for i in numbers]

    def window(self, tokenizer: Any, history: Sequence[tuple] = ()) -> int:
        """Tokens of a row that are scored: as many as in training, and the examples before it."""
        prompts = format_prompt("Why?", list(history)), format_prompt("Why?")
        both, alone = (len(ids) for ids in tokenizer(list(prompts)).input_ids)
        return self.profile.max_length + both - alone

    def read(self, name: str) -> dict[str, Any] | None:
        """A part, or None if it is missing or was made from something else."""
        path = self.folder / f"{name}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        return found if found.get("stamp") == self.stamp else None


def offered(pool: list[dict], n: int) -> list[list[dict]]:
    """For each of the first n rows of a pool: itself, then those after it, 18 in all."""
    size = min(CANDIDATES, len(pool))
    return [[pool[(i + k) % len(pool)] for k in range(size)] for i in range(n)]


def losses(setup: Setup, model: Any, tokenizer: Any, numbers: Sequence[int]) -> list[float]:
    """Loss of each row's true answer."""
    window = setup.window(tokenizer)
    return answer_losses(model, tokenizer, setup.take(numbers), TOGETHER, window)[0].tolist()


def measure(
    setup: Setup, fold: int, model: Any, tokenizer: Any, history: Sequence[tuple] = ()
) -> dict[str, Any]:
    """Loss of every answer offered to every outer question, and answers written to each."""
    _, watched, outer = setup.split(fold)
    pool = setup.take(outer + watched)
    pairs = [
        {"question": others[0]["question"], "answer": other["answer"], "history": history}
        for others in offered(pool, len(outer))
        for other in others
    ]
    window = setup.window(tokenizer, history)
    scorer = PromptOnce(model) if history else model
    scored = answer_losses(scorer, tokenizer, pairs, TOGETHER, window)[0].reshape(len(outer), -1)
    prompts = [format_prompt(row["question"], list(history)) for row in pool[: len(outer)]]
    said = generate_texts(
        model, tokenizer, prompts * setup.draws, sampling(tokenizer, setup.limit), setup.seed,
        len(prompts) * setup.draws, HUMAN if history else None,
    )  # fmt: skip
    return {"rows": outer, "losses": scored.tolist()} | written(setup, said, fold)


def written(setup: Setup, said: Sequence[Generation], fold: int) -> dict[str, Any]:
    """Answers, all draws of all outer rows; likeness to the truth, and runs that were copied."""
    learned, _, outer = setup.split(fold)
    known = [row["answer"] for row in setup.take(learned)]
    truths = [row["answer"] for row in setup.take(outer)]
    texts = [answer.text.partition(HUMAN)[0] for answer in said]
    table = likenesses(texts, truths, known)
    alike = [float(table[k, k % len(outer)]) for k in range(len(texts))]
    copied = [longest_shared_run(text, known)[0] for text in texts[: len(outer)]]
    return {"answers": [asdict(a) for a in said], "likeness": alike, "copied": copied}


def continued(setup: Setup, numbers: Sequence[int], model: Any, tokenizer: Any) -> list[int]:
    """How many words of each answer go on truly after its first 20 tokens, written greedily."""
    prompts, rest = [], []
    for row in setup.take(numbers):
        ids = tokenizer(" " + row["answer"]).input_ids
        prompts.append(format_prompt(row["question"]) + tokenizer.decode(ids[:FIRST_TOKENS]))
        rest.append(tokenizer.decode(ids[FIRST_TOKENS : FIRST_TOKENS + NEXT_TOKENS]).split())
    greedy = sampling(tokenizer, NEXT_TOKENS, 0.0, 1.0, 1.0)
    said = generate_texts(model, tokenizer, prompts, greedy, batch_size=len(prompts))
    pairs = zip(said, rest, strict=True)
    return [len(os.path.commonprefix([a.text.split(), true])) for a, true in pairs]


def remembered(setup: Setup, fold: int, learned: Sequence[int], trained: Trained) -> dict[str, Any]:
    """What tells rows trained on from others, and what was forgotten of other text."""
    both, outer = (trained.model, trained.tokenizer), setup.split(fold)[2]
    some = np.random.default_rng(setup.seed).permutation(learned)[: len(outer)]
    return {
        "learned": list(learned),
        "in_losses": losses(setup, *both, learned),
        "continued_in": continued(setup, some, *both),
        "continued_out": continued(setup, outer, *both),
        "passages": passage_losses(*both, setup.passages, TOGETHER).tolist(),
    }


def opened(setup: Setup, fold: int, learned: Sequence[int], trained: Trained) -> dict[str, Any]:
    """Open the outer fold: everything that is measured of an adapter, and how it was trained."""
    how = {name: getattr(trained, name) for name in ("steps", "held_out", "trainable", "seconds")}
    found = measure(setup, fold, trained.model, trained.tokenizer)
    return how | found | remembered(setup, fold, learned, trained)


def load_base(profile: Profile) -> tuple[Any, Any]:
    """The base without an adapter, and its tokenizer."""
    model = load_falcon(profile.model, profile)
    use_fused_attention(model)
    return model.eval(), load_tokenizer(profile.model)


def base_systems(setup: Setup, fold: int) -> dict[str, Any]:
    """The base as it is (cut later at a stop string), and after three short training rows."""
    model, tokenizer = load_base(setup.profile)
    base = measure(setup, fold, model, tokenizer)
    if fold == 0:  # the same in every fold
        base["passages"] = passage_losses(model, tokenizer, setup.passages, TOGETHER).tolist()
    learned = setup.take(setup.split(fold)[0])
    short = sorted(learned, key=lambda row: len(row["answer"]))[: max(EXAMPLES, len(learned) // 4)]
    chosen = np.random.default_rng(setup.seed + fold).permutation(len(short))[:EXAMPLES]
    history = [(short[i]["question"], short[i]["answer"]) for i in chosen]
    return {"base": base, "base_examples": measure(setup, fold, model, tokenizer, history)}


def nearest(setup: Setup, fold: int) -> dict[str, Any]:
    """The answer to the nearest training question; it ranks others by likeness to it."""
    learned, watched, outer = setup.split(fold)
    rows, pool = setup.take(learned), setup.take(outer + watched)
    asked, known = ([row[key] for row in rows] for key in ("question", "answer"))
    near = nearest_answers(asked, known, [row["question"] for row in pool[: len(outer)]])
    scores = [
        -likenesses([f"{others[0]['question']} {answer}"], [o["answer"] for o in others], known)[0]
        for answer, others in zip(near, offered(pool, len(outer)), strict=True)
    ]
    said = [Generation(text, True, 0) for text in near]
    return {"rows": outer, "losses": np.array(scores).tolist()} | written(setup, said, fold)


def run_fold(setup: Setup, fold: int) -> dict[str, Any]:
    """All systems on one fold; the shuffled adapter takes as many steps as the adapter did."""
    learned, watched, _ = setup.split(fold)
    rows = setup.rows.select(learned)
    trained = train(rows, setup.profile, setup.rows.select(watched), setup.seed)
    if fold == 0:
        trained.model.save_pretrained(setup.folder / "adapter")
    adapter = opened(setup, fold, learned, trained)
    answers = np.roll(rows["answer"], len(rows) // 2).tolist()
    wrong = datasets.Dataset.from_dict({"question": list(rows["question"]), "answer": answers})
    stop = Watch(stop_at=max(1, trained.steps))
    trained = train(wrong, setup.profile, None, setup.seed, stop)
    both = trained.model, trained.tokenizer
    shuffled = measure(setup, fold, *both) | {"steps": trained.steps}
    shuffled["passages"] = passage_losses(*both, setup.passages, TOGETHER).tolist()
    simple = base_systems(setup, fold) | {"nearest": nearest(setup, fold)}
    return simple | {"shuffled": shuffled, "adapter": adapter}


def run_long(setup: Setup) -> dict[str, Any]:
    """The article's 320 steps and its 116 passes, on as many rows of fold 0 as make them both."""
    learned, _, outer = setup.split(0)
    size = setup.profile.batch_size * setup.profile.accumulation
    learned, curve = learned[: round(LONG_STEPS * size / PASSES)], []
    profile = replace(setup.profile, max_steps=setup.long_steps)
    tokenizer = load_tokenizer(setup.profile.model)

    def look(step: int, model: Any) -> None:
        both = {"in_losses": learned, "out_losses": outer}
        both = {key: losses(setup, model, tokenizer, rows) for key, rows in both.items()}
        curve.append({"step": step, "passes": step * size / len(learned)} | both)

    trained = train(
        setup.rows.select(learned), profile, None, setup.seed, Watch(looks=LOOKS, look=look)
    )
    return {"curve": curve} | opened(setup, 0, learned, trained)


def run_claim(setup: Setup, claim: str) -> dict[str, Any]:
    """One change of the recipe on fold 0; 500 steps keep their last, as the article did."""
    change, (learned, watched, _) = CLAIMS[claim], setup.split(0)
    profile, validation = setup.profile, setup.rows.select(watched)
    if "steps" in change:
        steps = max(1, change["steps"] * setup.long_steps // LONG_STEPS)
        profile, validation = replace(profile, max_steps=steps), None
    rows, changes = setup.rows.select(learned), (change.get("lora"), change.get("args"))
    trained = train(rows, profile, validation, setup.seed, None, *changes)
    return opened(setup, 0, learned, trained)


def run_decoding(setup: Setup) -> dict[str, Any]:
    """The adapter of fold 0 under other temperatures, top-p and penalties."""
    if not setup.read("fold0"):
        raise ValueError("decoding needs the adapter of fold 0: make the part fold0 first")
    base, tokenizer = load_base(setup.profile)
    model = PeftModel.from_pretrained(base, setup.folder / "adapter").eval()
    outer = setup.split(0)[2]
    prompts = [format_prompt(row["question"]) for row in setup.take(outer)] * setup.draws
    found: dict[str, Any] = {"settings": {}}
    for name, numbers in DECODING.items():
        config = sampling(tokenizer, setup.limit, *numbers)
        said = generate_texts(model, tokenizer, prompts, config, setup.seed, len(prompts))
        found["settings"][name] = {"rows": outer} | written(setup, said, 0)
    return found


def runner(setup: Setup, name: str) -> Callable[[], dict[str, Any]]:
    """The function that makes a part."""
    if name.startswith("fold"):
        return partial(run_fold, setup, int(name.removeprefix("fold")))
    if name in CLAIMS:
        return partial(run_claim, setup, name)
    return partial({"long": run_long, "decoding": run_decoding}[name], setup)


def expected(name: str) -> float:
    """Seconds that a part took in a rehearsal with the tiny Falcon, on one core."""
    return SECONDS.get("fold" if name.startswith("fold") else name, 120)


def forecast(setup: Setup, left: Sequence[str]) -> str:
    """How long the missing parts may take: rehearsed for the tiny Falcon, predicted for a GPU."""
    if not setup.profile.on_gpu:
        texts = [f"{row['question']} {row['answer']}" for row in setup.rows]
        tokens = load_tokenizer(setup.profile.model)(texts).input_ids
        size = np.mean([min(len(ids), setup.profile.max_length) for ids in tokens]) / ROW_TOKENS
        minutes = sum(map(expected, left)) * (1 + 3 * size) / 4 / 60  # a quarter does not grow
        return f"about {minutes:.0f} min on one core"
    card = json.loads((ROOT / "results/h200/falcon7b.json").read_text())
    steps = sum(setup.profile.max_steps * (2 if name.startswith("fold") else 1) for name in left)
    minutes = steps * card["training"]["step_seconds"] / 60
    return f"predicted {minutes:.0f} min of training on {card['machine']}, answers not counted"


def processor() -> str:
    """The GPU's or the CPU's own name, and how many threads it computes with."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.machine()])[0]}, {torch.get_num_threads()} thread"


def make_parts(setup: Setup, wanted: Sequence[str], say: Callable = print) -> None:
    """Make the parts that are missing, one after another, and say how long the rest takes."""
    left = [name for name in wanted if not setup.read(name)]
    say(f"{setup.name}: {len(left)} of {len(wanted)} parts to make, {forecast(setup, left)}")
    setup.folder.mkdir(parents=True, exist_ok=True)
    guessed = spent = 0.0
    for k, name in enumerate(left):
        began = time.perf_counter()
        made = runner(setup, name)()
        seconds = time.perf_counter() - began
        half = setup.folder / f"{name}.tmp"
        made |= {"stamp": setup.stamp, "part_seconds": seconds, "machine": processor()}
        half.write_text(json.dumps(made))
        half.replace(setup.folder / f"{name}.json")
        guessed, spent = guessed + expected(name), spent + seconds
        rest = sum(map(expected, left[k + 1 :])) * spent / guessed / 60
        say(f"{setup.name}: {name} took {seconds:.0f} s, about {rest:.0f} min left", flush=True)


def publish(setup: Setup, out: Path) -> bool:
    """Merge the parts into a file, beside other names' figures; False if a part is missing."""
    parts = {name: setup.read(name) for name in setup.parts}
    if missing := [name for name, part in parts.items() if part is None]:
        print(f"{out} is not written yet, {len(missing)} parts are missing: {' '.join(missing)}")
        return False
    figures = merge(setup.rows, parts, setup.n_folds, setup.limit)
    figures["minutes"] = sum(part["part_seconds"] for part in parts.values()) / 60
    source = "" if setup.data == TINY.dataset else f" --data ROWS --name {setup.name}"
    command = f"python tools/crossval.py{source}"
    head = provenance("fine-tuning against simpler systems, out of fold", command)
    figures["machines"] = sorted({part["machine"] for part in parts.values()})
    old = json.loads(out.read_text()) if out.exists() else {}
    kept = {name: found for name, found in old.items() if name not in head}
    kept[setup.name] = figures | {key: head[key] for key in ("command", "date", "commit")}
    head["machine"] = "; ".join(sorted({m for x in kept.values() for m in x.get("machines", ())}))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(head | kept, indent=1) + "\n")
    return True


def main(argv: Sequence[str] | None = None) -> None:
    """Make what is missing, then merge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="sample", help="sample, or rows with question and answer")
    parser.add_argument("--name", help="key of the figures, folder of the parts: sample or own")
    parser.add_argument("--out", type=Path, help="results/<machine>/crossval.json if not given")
    parser.add_argument("--profile", default="cpu", help="cpu (the tiny Falcon), t4, a100 or auto")
    parser.add_argument("--folds", type=int, default=10)
    parser.add_argument("--parts", nargs="+", help="only these, such as fold0 long rank_16")
    asked = parser.parse_args(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    datasets.disable_progress_bars()
    sample = asked.data == "sample"
    data, name = TINY.dataset if sample else asked.data, asked.name or ("own", "sample")[sample]
    try:
        setup = Setup(data, name, detect_profile(asked.profile), asked.folds)
        setup.split(0)
        if unknown := set(asked.parts or ()) - set(setup.parts):
            raise ValueError(f"there is no part {min(unknown)}: take from {' '.join(setup.parts)}")
        make_parts(setup, asked.parts or setup.parts)
        publish(setup, asked.out or ROOT / "results" / machine_name()[0] / "crossval.json")
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
