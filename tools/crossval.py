"""Does fine-tuning help? Ten folds, six systems, every figure out of fold.

    python tools/crossval.py                                     # the embedded dialogues
    python tools/crossval.py --dataset rows.jsonl --name real    # rows of your own, figures only
    python tools/crossval.py --processes 8 --threads 2           # on a machine with 16 cores
    python tools/crossval.py --folds 0 1 --systems base adapter  # a part of it
    python tools/crossval.py --quick --name quick                # a rehearsal of a few minutes

Rows are dealt into folds by question. Inside each training fold a part is split off to choose the
number of steps by, as page 03 does with its validation rows; the outer fold is opened after that.
Each (fold, system) leaves one file in artifacts/crossval/NAME and is not run again while model,
data and settings stay the same; when the last one is there, results/<machine>/crossval.json is
written. What costs too much ten times over is run on fold 0 alone: the 116 passes, the article's
claims, the table of decoding settings.

The intervals hold the spread over questions (and draws of one), not over other training sets.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel

from helpers.dialogues import load_dialogues
from helpers.evaluation import answer_losses, longest_shared_run, nearest_answers
from helpers.falcon import load_falcon, load_tokenizer, use_fused_attention
from helpers.generation import Generation, generate_texts, sampling
from helpers.profiles import TINY, Profile, detect_profile
from helpers.prompts import HUMAN, format_prompt
from tools.crossval_figures import merge
from tools.folds import fold_assignment, likenesses, passage_losses, shared_prefix
from tools.make_tiny_falcon import read_lines
from tools.recipe import StopAt, Trained, Watch, train, with_steps
from tools.results import commit_name, machine_name, write_result

SYSTEMS = ("base", "base_examples", "nearest", "adapter", "shuffled")  # base_stop: cut from base
PASSES, LONG_STEPS, LONG_LOOKS = 116, 320, (10, 20, 40, 80, 160, 320)
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
    "temperature_0.7": (0.7, 0.6, 1.3),
    "temperature_1.0": (1.0, 0.6, 1.3),
    "top_p_0.9": (0.4, 0.9, 1.3),
    "top_p_1.0": (0.4, 1.0, 1.3),
    "penalty_1.0": (0.4, 0.6, 1.0),
    "penalty_1.1": (0.4, 0.6, 1.1),
    "nothing_shaped": (1.0, 1.0, 1.0),
}
CANDIDATES, EXAMPLES, FIRST_TOKENS, NEXT_TOKENS = 18, 3, 20, 32
LIMIT, WINDOW = 256, 512  # tokens: of an answer; that the tiny Falcon has seen at once


@dataclass(frozen=True)
class Setup:
    """Data, model and sizes of one cross-validation; `stamp` names them all in few letters."""

    dataset: str
    name: str
    profile: Profile
    n_folds: int
    draws: int
    seed: int
    n_passages: int
    long_steps: int

    @cached_property
    def rows(self) -> Dataset:
        """All rows with question and answer."""
        return load_dialogues(self.dataset)[0]

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
        parts = {k: str(v) for k, v in asdict(self).items() if k not in ("dataset", "name")}
        parts["profile"] = str(replace(self.profile, device="", dataset="", adapter="", model=""))
        digest = hashlib.sha256(json.dumps(parts).encode())
        model = Path(self.profile.model)
        files = sorted(model.glob("*.safetensors")) + [model / "tokenizer.json"]
        for path in [*filter(Path.exists, files), Path(self.dataset)]:
            digest.update(path.read_bytes() if path.exists() else str(path).encode())
        return digest.hexdigest()[:16]

    @property
    def folder(self) -> Path:
        """Where the parts lie."""
        return ROOT / "artifacts/crossval" / self.name

    def split(self, fold: int) -> tuple[list[int], list[int], list[int]]:
        """Row numbers (train, validation, outer) of a fold; no question stands in two."""
        outer, rest = np.flatnonzero(self.fold_of == fold), np.flatnonzero(self.fold_of != fold)
        questions = [self.rows["question"][i] for i in rest]
        inner = fold_assignment(questions, max(2, self.n_folds - 1), self.seed + 1 + fold)
        return rest[inner != 0].tolist(), rest[inner == 0].tolist(), outer.tolist()

    def part(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a part's file holds; made and written first if it is missing or of another run."""
        path = self.folder / f"{name}.json"
        if path.exists() and (kept := json.loads(path.read_text()))["stamp"] == self.stamp:
            return kept
        began = time.perf_counter()
        made = make() | {"stamp": self.stamp, "job_seconds": time.perf_counter() - began}
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(f".{os.getpid()}.tmp")
        half.write_text(json.dumps(made))
        half.replace(path)
        print(f"{self.name}: {name} done in {made['job_seconds']:.0f} s", flush=True)
        return made


def take(rows: Dataset, numbers: Sequence[int]) -> list[dict]:
    """Rows as dictionaries, in the order of their numbers."""
    return [rows[i] for i in numbers]


def offered(pool: list[dict], n: int) -> list[list[dict]]:
    """For each of the first n rows of a pool: itself, then those after it, 18 in all."""
    size = min(CANDIDATES, len(pool))
    return [[pool[(i + k) % len(pool)] for k in range(size)] for i in range(n)]


def measure(
    setup: Setup, fold: int, model: Any, tokenizer: Any, history: Sequence[tuple] = ()
) -> dict[str, Any]:
    """Loss of every answer offered to every outer question, and answers written to each."""
    learned, watched, outer = setup.split(fold)
    pool = take(setup.rows, outer + watched)
    questions = [row["question"] for row in pool[: len(outer)]]
    pairs = [
        {"question": question, "answer": other["answer"], "history": history}
        for question, others in zip(questions, offered(pool, len(outer)), strict=True)
        for other in others
    ]
    window = WINDOW * (1 + bool(history))
    losses = answer_losses(model, tokenizer, pairs, 16, window)[0].reshape(len(outer), -1)
    prompts = [format_prompt(question, list(history)) for question in questions]
    config = sampling(tokenizer, LIMIT)
    said = generate_texts(
        model, tokenizer, prompts * setup.draws, config, setup.seed, 3 * CANDIDATES,
        stop=HUMAN if history else None,
    )  # fmt: skip
    known = [setup.rows["answer"][i] for i in learned]
    return {"rows": outer, "losses": losses.tolist()} | written(setup, said, outer, known)


def written(
    setup: Setup, said: Sequence[Generation], outer: list[int], known: list[str]
) -> dict[str, Any]:
    """Answers, all draws of all rows, and the longest run that each of the first draw copied."""
    first = [answer.text.partition(HUMAN)[0] for answer in said[: len(outer)]]
    truths = [setup.rows["answer"][i] for i in outer]
    alike = [
        float(likenesses([a.text.partition(HUMAN)[0]], [truths[k % len(outer)]], known)[0, 0])
        for k, a in enumerate(said)
    ]
    copied = [longest_shared_run(text, known)[0] for text in first]
    return {"answers": [asdict(a) for a in said], "likeness": alike, "copied": copied}


def continued(setup: Setup, numbers: Sequence[int], model: Any, tokenizer: Any) -> list[int]:
    """Words of each answer that go on truly after its first 20 tokens, written greedily."""
    prompts, rest = [], []
    for row in take(setup.rows, numbers):
        ids = tokenizer(" " + row["answer"]).input_ids
        opening = tokenizer.decode(ids[:FIRST_TOKENS])
        prompts.append(f"{format_prompt(row['question'])}{opening}")
        rest.append(tokenizer.decode(ids[FIRST_TOKENS : FIRST_TOKENS + NEXT_TOKENS]))
    greedy = sampling(tokenizer, NEXT_TOKENS, 0.0, 1.0, 1.0)
    said = generate_texts(model, tokenizer, prompts, greedy, batch_size=2 * CANDIDATES)
    return [shared_prefix(a.text, true) for a, true in zip(said, rest, strict=True)]


def remembered(
    setup: Setup, learned: list[int], outer: list[int], model: Any, tokenizer: Any
) -> dict[str, Any]:
    """What tells rows trained on from others, and what was forgotten of other text."""
    inside = answer_losses(model, tokenizer, take(setup.rows, learned), 16, WINDOW)[0]
    some = np.random.default_rng(setup.seed).permutation(learned)[: len(outer)].tolist()
    return {
        "learned": learned,
        "in_losses": inside.tolist(),
        "continued_in": continued(setup, some, model, tokenizer),
        "continued_out": continued(setup, outer, model, tokenizer),
        "passages": passage_losses(model, tokenizer, setup.passages, 16, WINDOW)[0].tolist(),
    }


def load_base(profile: Profile) -> tuple[Any, Any]:
    """The base without an adapter, and its tokenizer."""
    model = load_falcon(profile.model, profile)
    use_fused_attention(model)
    return model.eval(), load_tokenizer(profile.model)


def run_base(setup: Setup, fold: int) -> dict[str, Any]:
    """The base as it is."""
    model, tokenizer = load_base(setup.profile)
    found = measure(setup, fold, model, tokenizer)
    if fold == 0:  # the same in every fold
        losses = passage_losses(model, tokenizer, setup.passages, 16, WINDOW)[0]
        found["passages"] = losses.tolist()
    return found | {"continued_out": continued(setup, found["rows"], model, tokenizer)}


def run_base_examples(setup: Setup, fold: int) -> dict[str, Any]:
    """The base with three training rows before the question, of the shorter quarter."""
    model, tokenizer = load_base(setup.profile)
    learned = take(setup.rows, setup.split(fold)[0])
    short = sorted(learned, key=lambda row: len(row["answer"]))[: max(EXAMPLES, len(learned) // 4)]
    chosen = np.random.default_rng(setup.seed + fold).permutation(len(short))[:EXAMPLES]
    history = [(short[i]["question"], short[i]["answer"]) for i in chosen]
    return measure(setup, fold, model, tokenizer, history)


def run_nearest(setup: Setup, fold: int) -> dict[str, Any]:
    """The answer to the nearest training question; it ranks others by likeness to it."""
    learned, watched, outer = setup.split(fold)
    rows, pool = take(setup.rows, learned), take(setup.rows, outer + watched)
    known = [row["answer"] for row in rows]
    questions = [row["question"] for row in pool[: len(outer)]]
    near = nearest_answers([row["question"] for row in rows], known, questions)
    scores = [
        -likenesses([f"{q} {a}"], [row["answer"] for row in others], known)[0]
        for q, a, others in zip(questions, near, offered(pool, len(outer)), strict=True)
    ]
    said = [Generation(text, True, 0) for text in near]
    found = {"rows": outer, "losses": np.array(scores).tolist()}
    return found | written(setup, said, outer, known)


def kept(trained: Trained) -> dict[str, Any]:
    """How a run went, for its file."""
    names = ("steps", "held_out", "trainable", "seconds")
    return {name: getattr(trained, name) for name in names}


def run_adapter(setup: Setup, fold: int) -> dict[str, Any]:
    """Page 03 on this fold: the best step on the inner part is kept, then the fold is opened."""
    learned, watched, outer = setup.split(fold)
    trained = train(
        setup.rows.select(learned), setup.profile, setup.rows.select(watched), setup.seed
    )
    if fold == 0:
        trained.model.save_pretrained(setup.folder / "adapter_0")
    found = measure(setup, fold, trained.model, trained.tokenizer)
    memory = remembered(setup, learned, outer, trained.model, trained.tokenizer)
    return kept(trained) | found | memory


def run_shuffled(setup: Setup, fold: int) -> dict[str, Any]:
    """The same run, as many steps, on answers that belong to other questions."""
    steps = setup.part(f"fold{fold}.adapter", lambda: run_adapter(setup, fold))["steps"]
    learned, _, outer = setup.split(fold)
    rows = setup.rows.select(learned)
    answers = [rows["answer"][(i + len(rows) // 2) % len(rows)] for i in range(len(rows))]
    rows = Dataset.from_dict({"question": rows["question"], "answer": answers})
    trained = train(rows, setup.profile, None, setup.seed, callbacks=[StopAt(max(1, steps))])
    found = measure(setup, fold, trained.model, trained.tokenizer)
    memory = remembered(setup, learned, outer, trained.model, trained.tokenizer)
    return kept(trained) | found | memory


def run_long(setup: Setup) -> dict[str, Any]:
    """The article's 320 steps and 116 passes on the whole training fold 0, looked at on the way."""
    learned, watched, outer = setup.split(0)
    learned = sorted(learned + watched)
    per_step = round(PASSES * len(learned) / LONG_STEPS)
    profile, curve = with_steps(setup.profile, setup.long_steps, per_step), []
    tokenizer = load_tokenizer(setup.profile.model)

    def look(step: int, model: Any) -> None:
        both = [
            answer_losses(model, tokenizer, take(setup.rows, part), 16, WINDOW)[0].tolist()
            for part in (learned, outer)
        ]
        curve.append({"step": step, "in_losses": both[0], "out_losses": both[1]})
        means = [float(np.mean(losses)) for losses in both]
        print(f"{setup.name}: long, step {step}: in {means[0]:.3f}, out {means[1]:.3f}", flush=True)

    watch = Watch(LONG_LOOKS, look)
    rows_per_step = profile.batch_size * profile.accumulation
    trained = train(setup.rows.select(learned), profile, None, setup.seed, callbacks=[watch])
    found = measure(setup, 0, trained.model, trained.tokenizer)
    memory = remembered(setup, learned, outer, trained.model, trained.tokenizer)
    passes = setup.long_steps * rows_per_step / len(learned)
    more = {"curve": curve, "rows_per_step": rows_per_step, "passes": passes}
    return kept(trained) | found | memory | more


def run_claim(setup: Setup, claim: str) -> dict[str, Any]:
    """One change of the recipe on fold 0; 500 steps keep their last, as the article did."""
    change, (learned, watched, outer) = CLAIMS[claim], setup.split(0)
    profile, validation = setup.profile, setup.rows.select(watched)
    if "steps" in change:
        longer = change["steps"] * setup.long_steps // LONG_STEPS
        profile, validation = with_steps(profile, max(1, longer)), None
    trained = train(
        setup.rows.select(learned), profile, validation, setup.seed,
        change.get("lora"), change.get("args"),
    )  # fmt: skip
    found = measure(setup, 0, trained.model, trained.tokenizer)
    memory = remembered(setup, learned, outer, trained.model, trained.tokenizer)
    return kept(trained) | found | memory


def run_decoding(setup: Setup) -> dict[str, Any]:
    """The adapter of fold 0 under other temperatures, top-p and penalties."""
    setup.part("fold0.adapter", lambda: run_adapter(setup, 0))
    base, tokenizer = load_base(setup.profile)
    model = PeftModel.from_pretrained(base, setup.folder / "adapter_0").eval()
    learned, _, outer = setup.split(0)
    known = [setup.rows["answer"][i] for i in learned]
    prompts = [format_prompt(row["question"]) for row in take(setup.rows, outer)]
    found = {}
    for name, numbers in DECODING.items():
        config = sampling(tokenizer, LIMIT, *numbers)
        said = generate_texts(
            model, tokenizer, prompts * setup.draws, config, setup.seed, 3 * CANDIDATES
        )
        found[name] = written(setup, said, outer, known) | {"rows": outer}
    return {"settings": found}


def jobs(setup: Setup, folds: Iterable[int], systems: Iterable[str]) -> list[tuple[str, ...]]:
    """Names of the parts to make, those that take longest first; each tuple is one process's."""
    wanted = list(systems)
    alone = [(name,) for name in ("long", *CLAIMS) if name in wanted]
    in_folds = [
        tuple(f"fold{fold}.{system}" for system in SYSTEMS if system in wanted)
        + (("decoding",) if fold == 0 and "decoding" in wanted else ())
        for fold in folds
    ]
    return alone[:1] + [job for job in in_folds if job] + alone[1:]


def run_part(setup: Setup, name: str) -> dict[str, Any]:
    """Make one part, or read it."""
    fold, dot, system = name.partition(".")
    if dot:
        runner = globals()[f"run_{system}"]
        return setup.part(name, lambda: runner(setup, int(fold.removeprefix("fold"))))
    if name in CLAIMS:
        return setup.part(name, lambda: run_claim(setup, name))
    return setup.part(name, lambda: {"long": run_long, "decoding": run_decoding}[name](setup))


def run_job(setup: Setup, job: tuple[str, ...], threads: int) -> int:
    """Make the parts of one job, in this process; returns how many."""
    torch.set_num_threads(threads)
    for name in job:
        run_part(setup, name)
    return len(job)


def run_all(setup: Setup, wanted: list[tuple[str, ...]], processes: int, threads: int) -> None:
    """Make all parts that are missing, several jobs at a time, and say how far it is."""
    total, done, began = sum(map(len, wanted)), 0, time.perf_counter()

    def say(n: int) -> None:
        nonlocal done
        done += n
        minutes = (time.perf_counter() - began) / 60
        left = minutes / done * (total - done)
        print(f"{setup.name}: {done} of {total} parts, {minutes:.1f} min, about {left:.0f} left")

    if processes == 1:
        for job in wanted:
            say(run_job(setup, job, threads))
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        for future in as_completed([pool.submit(run_job, setup, job, threads) for job in wanted]):
            say(future.result())


def read_parts(setup: Setup) -> tuple[dict[str, dict], list[str]]:
    """All parts that belong to this setup, and the names of those that are missing."""
    everything = jobs(setup, range(setup.n_folds), (*SYSTEMS, "long", *CLAIMS, "decoding"))
    found, missing = {}, []
    for name in (name for job in everything for name in job):
        path = setup.folder / f"{name}.json"
        part = json.loads(path.read_text()) if path.exists() else {}
        if part.get("stamp") == setup.stamp:
            found[name] = part
        else:
            missing.append(name)
    return found, missing


def publish(setup: Setup, command: str) -> Path | None:
    """Merge the parts into results/<machine>/crossval.json, or say what is missing."""
    parts, missing = read_parts(setup)
    if missing:
        print(f"{setup.name}: {len(missing)} parts are missing, so nothing is merged: {missing}")
        return None
    figures = merge(setup.rows, parts, setup.n_folds, LIMIT)
    what = "fine-tuning against simpler systems, out of fold (see tools/crossval.py)"
    path = ROOT / "results" / machine_name()[0] / "crossval.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    others = {key: found for key, found in old.items() if "systems" in found}
    figures["measured"] = {"date": date.today().isoformat(), "commit": commit_name()}
    figures["measured"]["machine"] = machine_name()[1]
    return write_result("crossval", others | {setup.name: figures}, what, command)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", default=TINY.dataset, help="rows with question and answer")
    add("--name", default="sample", help="key of the figures, and folder of the parts")
    add("--profile", default="cpu", help="cpu: the tiny Falcon, on a GPU if there is one")
    add("--n-folds", type=int, default=10)
    add("--folds", type=int, nargs="*", help="only these")
    every = (*SYSTEMS, "long", *CLAIMS, "decoding")
    add("--systems", nargs="*", default=every, choices=every, help="only these")
    add("--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    add("--processes", type=int, default=1)
    add("--seed", type=int, default=0)
    add("--draws", type=int, default=3, help="answers drawn to each question")
    add("--quick", action="store_true", help="few steps, few passages: a rehearsal")
    return parser.parse_args(argv)


def setup_from(options: argparse.Namespace) -> Setup:
    """What the command line asks for."""
    profile = detect_profile(options.profile)
    if options.profile == "cpu" and torch.cuda.is_available():
        profile = replace(profile, device="cuda:0")
    if options.quick:
        profile = replace(profile, max_steps=4, eval_steps=2)
    sizes = (8, 6) if options.quick else (200, LONG_STEPS)
    return Setup(
        options.dataset, options.name, profile, options.n_folds, options.draws, options.seed, *sizes
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then merge."""
    options = parse(argv)
    try:
        setup = setup_from(options)
        setup.split(0)
        folds = range(setup.n_folds) if options.folds is None else options.folds
        if bad := [fold for fold in folds if not 0 <= fold < setup.n_folds]:
            raise ValueError(f"fold {bad[0]} is none of 0 to {setup.n_folds - 1}: check --folds")
        run_all(setup, jobs(setup, folds, options.systems), options.processes, options.threads)
    except (ValueError, OSError) as error:
        sys.exit(f"{error}")
    own = "" if options.dataset == TINY.dataset else " --dataset ROWS"
    if path := publish(setup, f"python tools/crossval.py{own} --name {setup.name}"):
        print(path)


if __name__ == "__main__":
    main()
