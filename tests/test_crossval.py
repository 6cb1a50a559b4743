"""The cross-validation: no row leaks, every merged figure a second way, the form, bad input."""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from scipy import stats
from sklearn.metrics import roc_auc_score
from trl import SFTConfig

from helpers.checkpoints import find_adapter
from helpers.dialogues import load_dialogues, normalise_question
from helpers.evaluation import answer_losses, mean_interval, paired_difference, wilson
from helpers.falcon import LINEARS
from helpers.generation import generate_texts, sampling
from helpers.profiles import A100, TINY
from helpers.prompts import HUMAN, format_prompt
from tools import crossval, crossval_figures, judge, recipe
from tools.crossval_figures import BETTER, memory, memory_sentence, merge, shown, verdict
from tools.folds import PromptOnce
from tools.make_tiny_falcon import held_out_ngrams, ngrams, read_lines

ROOT = Path(__file__).resolve().parent.parent
TWIN = ROOT / "notebooks/py/03_qlora_finetuning.py"


def setup(tmp_path: Path, n: int = 60, folds: int = 5) -> crossval.Setup:
    lines = [{"question": f"question {i}?", "answer": f"answer number {i} is so"} for i in range(n)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return crossval.Setup(str(path), "toy", TINY, folds)


# --- rows -----------------------------------------------------------------------------------------


def test_no_row_is_in_two_parts_and_each_is_held_out_once(tmp_path: Path) -> None:
    found = setup(tmp_path)
    outer = []
    for fold in range(found.n_folds):
        train, validation, held_out = found.split(fold)
        assert sorted(train + validation + held_out) == list(range(60))
        assert len(validation) == len(held_out) == 12 and validation != held_out
        outer += held_out
    assert sorted(outer) == list(range(60))


def test_a_question_asked_twice_stays_on_one_side(tmp_path: Path) -> None:
    found = setup(tmp_path)
    questions = [f"question {i // 2}" for i in range(60)]
    rows = Dataset.from_dict({"question": questions, "answer": ["so"] * 60})
    found.__dict__["rows"] = rows
    for fold in range(found.n_folds):
        parts = [{questions[i] for i in part} for part in found.split(fold)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 30


def test_eighteen_answers_are_offered_the_true_one_first() -> None:
    pool = [{"answer": str(i)} for i in range(34)]
    tables = crossval.offered(pool, 17)
    assert len(tables) == 17
    for i, others in enumerate(tables):
        assert len(others) == len({row["answer"] for row in others}) == 18
        assert others[0] is pool[i]


def test_the_unseen_passages_are_unseen() -> None:
    texts = [line["s"] for line in read_lines(ROOT / "assets/unseen_passages.jsonl.xz")]
    assert len(texts) == len(set(texts)) == 200
    unseen = set().union(*map(ngrams, texts))
    assert not unseen & held_out_ngrams(ROOT / "assets/sample_dialogues.jsonl")
    for path in sorted((ROOT / "assets/pretraining").glob("*.jsonl*")):
        for line in read_lines(path):
            said = [line.get(key, "") for key in ("s", "question", "text")] + line.get("facts", [])
            for text in said:
                assert not ngrams(text) & unseen, f"{path.name} holds {text[:60]!r}"


# --- the recipe -----------------------------------------------------------------------------------


def page_keywords(call: str) -> dict[str, str]:
    """Keywords of a call on page 03, as they are written there."""
    for node in ast.walk(ast.parse(TWIN.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == call:
            return {k.arg: ast.unparse(k.value) for k in node.keywords}
    raise AssertionError(f"page 03 calls no {call}")


def test_the_recipe_is_page_03s() -> None:
    names = {"profile": TINY, "SEED": 3, "OUTPUT": "out", "torch": torch, "rank": 32, "alpha": 32}
    names |= {"model": None, "lora_targets": lambda model: list(LINEARS)}
    ours = {"SFTConfig": recipe.settings(TINY, True, 3, "out")}
    ours["LoraConfig"] = recipe.lora_config().to_dict()
    not_ours = {"report_to", "run_name", "ddp_find_unused_parameters"}
    not_ours |= {"restore_callback_states_from_checkpoint"}
    assert re.search(r"rank, alpha = .*, 32, 32$", TWIN.read_text(), re.MULTILINE)
    for call, found in ours.items():
        written = page_keywords(call)
        assert len(written) > 5
        for key in written.keys() - not_ours:
            expected, value = eval(written[key], dict(names)), found[key]
            assert sorted(value) == sorted(expected) if key == "target_modules" else (
                value == expected), f"{call}({key}=)"  # fmt: skip
    assert set(ours["SFTConfig"]) <= page_keywords("SFTConfig").keys(), "a value of our own"
    assert SFTConfig(**recipe.settings(TINY, False, 0, "out")).save_strategy == "no"


# --- a whole run, small ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[crossval.Setup, dict]]:
    """Two folds of twelve rows on the embedded model, two steps: every part there is."""
    folder = tmp_path_factory.mktemp("crossval")
    rows, _ = load_dialogues(TINY.dataset)
    path = folder / "rows.jsonl"
    rows.select(range(12)).to_json(path)
    patch = pytest.MonkeyPatch()
    patch.setattr(crossval, "LOOKS", (1, 2))
    patch.setattr(crossval.Setup, "folder", property(lambda self: folder / self.name))
    profile = replace(TINY, max_steps=3, eval_steps=1, batch_size=4)
    made = crossval.Setup(str(path), "sample", profile, 2, 2, 12, 3, 2)
    lines: list[str] = []
    crossval.make_parts(made, made.parts, lambda line, **_: lines.append(line))
    assert lines[0].startswith("sample: 9 of 9 parts to make, about ")
    assert len(lines) == 10 and lines[-1].endswith("about 0 min left")
    yield made, {name: made.read(name) for name in made.parts}
    patch.undo()


def merged(run: tuple[crossval.Setup, dict]) -> dict:
    made, parts = run
    return json.loads(json.dumps(merge(made.rows, parts, made.n_folds, made.limit)))


def test_a_run_leaves_every_figure_with_its_n(run) -> None:
    made, _ = run
    figures = merged(run)
    assert list(figures["systems"]) == list(crossval_figures.NAMES)
    for system, found in figures["systems"].items():
        for name, estimate in found.items():
            assert set(estimate) == {"value", "low", "high", "n"}, (system, name)
            assert estimate["low"] <= estimate["value"] <= estimate["high"]
            assert estimate["n"] == (3 if name == "passages_loss" else 12)
    assert set(figures["claims"]) == {"as_it_is", *crossval.CLAIMS}
    assert set(figures["decoding"]) == set(crossval.DECODING)
    assert [look["step"] for look in figures["memory"]["long"]["curve"]] == [0, 1, 2]
    as_text = json.dumps(figures)
    assert not any(answer in as_text for answer in made.rows["answer"]), "figures only, no text"
    for say in ("systems_tables", "verdict", "claims_table", "decoding_table", "memory_table"):
        assert getattr(crossval_figures, say)(figures).count("\n") > 2
        assert getattr(crossval_figures, say)(None).startswith("not measured yet")


def test_merged_losses_and_ranks_are_those_of_the_parts(run) -> None:
    made, parts = run
    figures = merged(run)
    folds = [parts[f"fold{k}"] for k in range(2)]
    tables = [np.array(fold["adapter"]["losses"]) for fold in folds]
    truths = np.concatenate([table[:, 0] for table in tables])
    adapter = figures["systems"]["adapter"]
    assert adapter["answer_loss"]["value"] == pytest.approx(truths.mean())
    ranks = np.concatenate([stats.rankdata(t, "max", axis=1)[:, 0] for t in tables])
    assert adapter["rank_mrr"]["value"] == pytest.approx((1 / ranks).mean())
    assert adapter["rank_accuracy"] == wilson(int((ranks == 1).sum()), 12)
    other = [row[0] for fold in folds for row in fold["base"]["losses"]]
    rows = [row for fold in folds for row in fold["base"]["rows"]]
    keyed = [normalise_question(made.rows["question"][row]) for row in rows]
    expected = paired_difference(truths, other, keyed)
    assert figures["differences"]["base"]["answer_loss"] == pytest.approx(expected)
    by_draw = [
        (fold["shuffled"]["rows"][k % 6], value)
        for fold in folds
        for k, value in enumerate(fold["shuffled"]["likeness"])
    ]
    table = pd.DataFrame(by_draw).groupby(0)[1].mean()
    found = figures["systems"]["shuffled"]["likeness"]
    assert found["value"] == pytest.approx(table.mean()) and found["n"] == len(table) == 12


def test_a_part_is_made_again_only_if_something_changed(run, monkeypatch) -> None:
    made, parts = run
    monkeypatch.setattr(crossval, "runner", lambda *_: pytest.fail("made twice"))
    crossval.make_parts(made, made.parts, lambda *_, **__: None)
    for other in (replace(made, seed=1), replace(made, data=TINY.dataset), replace(made, draws=1)):
        assert other.stamp != made.stamp and other.read("fold0") is None
    (made.folder / "fold1.json").rename(made.folder / "away")
    with pytest.raises(pytest.fail.Exception, match="made twice"):
        crossval.make_parts(made, made.parts, lambda *_, **__: None)
    (made.folder / "away").rename(made.folder / "fold1.json")


def test_figures_are_written_when_all_parts_are_there_beside_those_of_others(
    run, tmp_path, capsys
) -> None:
    made, _ = run
    out = tmp_path / "crossval.json"
    out.write_text(json.dumps({"real": {"rows": 172}}))
    (made.folder / "long.json").rename(made.folder / "away")
    assert not crossval.publish(made, out) and "1 parts are missing: long" in capsys.readouterr()[0]
    assert "sample" not in json.loads(out.read_text())
    (made.folder / "away").rename(made.folder / "long.json")
    assert crossval.publish(made, out)
    found = json.loads(out.read_text())
    assert found["real"] == {"rows": 172} and found["sample"]["rows"] == 12
    assert {"command", "date", "commit", "machine"} <= found.keys()


def test_the_step_kept_was_chosen_on_the_inner_part(run) -> None:
    made, parts = run
    for k in range(2):
        part = parts[f"fold{k}"]["adapter"]
        assert part["steps"] == min(part["held_out"], key=lambda look: look[1])[0]
        assert parts[f"fold{k}"]["shuffled"]["steps"] == max(1, part["steps"])
        assert part["rows"] == made.split(k)[2] and part["learned"] == made.split(k)[0]
    assert parts["long"]["steps"] == 2 and parts["long"]["learned"] == made.split(0)[0][:11]


def test_bias_lora_only_trains_as_many_numbers_as_none(run) -> None:
    _, parts = run
    n = {name: parts[name]["trainable"] for name in ("rank_16", "rank_64", "bias_lora_only")}
    first = parts["fold0"]["adapter"]
    assert n["bias_lora_only"] == first["trainable"] == 2 * n["rank_16"]
    assert n["rank_64"] == 4 * n["rank_16"]
    assert parts["bias_lora_only"]["losses"] == first["losses"] != parts["constant_rate"]["losses"]


def test_a_prompt_read_once_gives_the_same_losses() -> None:
    model, tokenizer = crossval.load_base(TINY)
    rows = load_dialogues(TINY.dataset)[0].select(range(5))
    history = [(rows[0]["question"], rows[0]["answer"])]
    pairs = [{"question": "Why?", "answer": r["answer"], "history": history} for r in rows]
    forwards = []
    seen = model.register_forward_pre_hook(
        lambda _, args, kwargs: forwards.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    whole = answer_losses(model, tokenizer, pairs)[0]
    once = answer_losses(PromptOnce(model), tokenizer, pairs)[0]
    seen.remove()
    assert once == pytest.approx(whole, abs=1e-4)
    assert sum(forwards[1:]) < 0.7 * forwards[0], "the prompt was read five times"
    mixed = [{"question": q, "answer": "so"} for q in ("Why?", "how")]
    assert answer_losses(PromptOnce(model), tokenizer, mixed)[0] == pytest.approx(
        answer_losses(model, tokenizer, mixed)[0], abs=1e-4
    )


def test_a_cut_answer_is_what_a_stop_string_leaves() -> None:
    model, tokenizer = crossval.load_base(TINY)
    prompts = [format_prompt(q) for q in ("What is stress?", "How can I sleep better?")]
    config = sampling(tokenizer, 120)
    whole = generate_texts(model, tokenizer, prompts, config, seed=3)
    stopped = generate_texts(model, tokenizer, prompts, config, seed=3, stop=HUMAN)
    assert any(HUMAN in answer.text for answer in whole), "nothing to stop: a longer limit"
    for one, two in zip(whole, stopped, strict=True):
        assert one.text.partition(HUMAN)[0] == two.text.partition(HUMAN)[0]


def test_shown_answers_end_at_the_stop_string_only_where_there_is_one() -> None:
    raw = {"text": f"Rest.{HUMAN} And?", "finished": False, "n_tokens": 12}
    assert shown(raw, stop=False).text == raw["text"]
    assert (shown(raw, stop=True).text, shown(raw, stop=True).n_tokens) == ("Rest.", 0)
    whole = {"text": "Rest.", "finished": True, "n_tokens": 3}
    assert shown(whole, stop=True).finished


# --- memory and words -----------------------------------------------------------------------------


def test_memory_takes_each_row_once_from_an_adapter_that_was_trained_on_it() -> None:
    rng = np.random.default_rng(0)
    fold_of = np.arange(30) % 3
    parts = []
    for fold in range(3):
        learned = [i for i in range(30) if fold_of[i] != fold and i % 7 != fold]
        outer = [i for i in range(30) if fold_of[i] == fold]
        parts.append({
            "rows": outer, "learned": learned, "steps": 1, "copied": [fold] * 10,
            "losses": [[1000 * fold + i, 0.0] for i in outer],
            "in_losses": [1000 * fold + i + 0.5 for i in learned],
            "continued_in": rng.integers(0, 20, 10).tolist(), "continued_out": [0] * 10,
            "passages": [1.0 + fold, 2.0],
        })  # fmt: skip
    found = memory(parts, [1.0, 3.0])
    inside = []
    for i in range(30):
        later = [(fold_of[i] + k) % 3 for k in (1, 2)]
        inside += [1000 * f + i + 0.5 for f in later if i in parts[f]["learned"]][:1]
    outside = [1000 * fold_of[i] + i for i in range(30)]
    assert found["in_loss"]["value"] == pytest.approx(np.mean(inside))
    area = roc_auc_score([0] * len(inside) + [1] * 30, inside + outside)
    assert found["membership_auc"]["value"] == pytest.approx(area)
    assert found["membership_auc"]["n"] == len(inside) + 30
    assert found["continued_out"] == mean_interval([0] * 30)
    assert found["forgotten"]["value"] == pytest.approx(((2.0 - 1.0) + (2.0 - 3.0)) / 2)
    alone = memory(parts[:1], [1.0, 3.0])
    assert alone["in_loss"]["value"] == pytest.approx(np.mean(parts[0]["in_losses"]))
    gap = found["out_loss"]["value"] - found["in_loss"]["value"]
    assert f"{gap:.2f} nats" in memory_sentence({"memory": {"adapter": found, "long": alone}})


def test_the_verdict_says_whatever_came_out() -> None:
    def difference(value: float, p: float) -> dict:
        return {"value": value, "low": value - 1, "high": value + 1, "n": 18, "p": p}

    found = dict.fromkeys(BETTER, difference(0.5, 0.4))
    found["answer_loss"], found["likeness"] = difference(-2.0, 0.01), difference(-2.0, 0.01)
    said = verdict({"differences": {"nearest": found}})
    assert "nearest answer: better at the loss of true answers; worse at likeness" in said
    assert "no difference shown in ranking" in said
    found["answer_loss"] = difference(2.0, 0.01)
    assert "better" not in verdict({"differences": {"nearest": found}})
    found["answer_loss"] = difference(-2.0, 0.06)  # p and interval must agree
    assert "better" not in verdict({"differences": {"nearest": found}})
    nothing = {"base_stop": found, "nearest": found}
    assert verdict({"differences": nothing}).endswith("nearest answer, at: nothing.")
    found["likeness"] = difference(2.0, 0.01)
    assert verdict({"differences": nothing}).endswith("at: likeness to the true answer.")


def test_two_data_sets_agree_contradict_or_speak_alone() -> None:
    clear = {"low": -1.2, "high": -0.8, "n": 18, "p": 0.01}
    lower, higher = clear | {"value": -1.0}, {"value": 1.0, "low": 0.8, "high": 1.2, "p": 0.01}
    one = {"nearest": dict.fromkeys(BETTER, lower)}
    other = {"nearest": {"answer_loss": lower, "likeness": higher, "reciprocal_rank": lower}}
    both = crossval_figures.agreement({"differences": one}, {"differences": other})
    better, worse, against, alone = both.splitlines()
    assert better.endswith("on both sets at: the loss of true answers (nearest answer).")
    assert worse.endswith("at: ranking the true answer (nearest answer).")
    assert against.endswith("at: likeness to the true answer (nearest answer).")
    assert "inventing no turn" in alone and "ending before the limit" in alone
    said = sum(both.count(words) for _, words in BETTER.values())
    assert said == len(BETTER), "each comparison stands in one line"
    assert crossval_figures.agreement(None, {"differences": other}).startswith("not measured yet")


# --- the judge ------------------------------------------------------------------------------------


def said(text: str) -> SimpleNamespace:
    return SimpleNamespace(text=text, finished=True, n_tokens=3)


def judge_pairs() -> list[dict]:
    questions = [f"Question {i}?" for i in range(18)]
    sides = [[said(f"{side} {i}.") for i in range(18)] for side in ("First", "Second")]
    return judge.blind_pairs(questions, *sides, seed=4)


def test_the_form_is_blind_and_shuffled() -> None:
    pairs = judge_pairs()
    assert 4 < sum(pair["first"] == "A" for pair in pairs) < 14
    assert [pair["question"] for pair in pairs] != sorted(pair["question"] for pair in pairs)
    for pair in pairs:
        assert pair[pair["first"]].startswith("First")
        text = judge.pair_text(pair, 1, 18)
        assert pair["A"] in text and pair["B"] in text
    leaky = judge.blind_pairs(["Why?"], [said(f"So.\n{HUMAN} And?")], [said("Hm.")])[0]
    assert "And" not in leaky["A"] + leaky["B"], "an invented turn would give its writer away"


def test_eighteen_presses_end_in_a_sign_test() -> None:
    pairs, made, text = judge_pairs(), [], ""
    for number, pair in enumerate(pairs):
        letter = pair["first"] if number < 15 else "neither" if number < 17 else "x"
        made, text = judge.step(pairs, made, letter, ("adapter", "base"))
    assert len(made) == 17 and "18 of 18" in text, "another word is no choice"
    worse = "B" if pairs[17]["first"] == "A" else "A"
    made, text = judge.step(pairs, made, worse, ("adapter", "base"))
    p = stats.binomtest(15, 16).pvalue
    assert text.startswith("adapter 15, base 1, neither 2: you preferred the adapter")
    assert f"p = {p:.2g}" in text
    assert judge.step(pairs, made, "A", ("adapter", "base")) == (made, text), "it is over"
    assert "nothing to test" in judge.sentence(pairs, ["neither"] * 18, ("adapter", "base"))


def test_a_page_that_is_only_read_starts_no_server(monkeypatch) -> None:
    monkeypatch.setattr(judge, "judge_page", lambda *_: pytest.fail("a server was asked for"))
    text = judge.open_form(judge_pairs(), ("adapter", "base"), serve=False)
    assert "1 of 18" in text and text.endswith("is the adapter's.")
    typed = [said('It\'s "well" & <good>.') for _ in "ab"]
    pairs = judge.blind_pairs(["Why?", "How?"], typed, typed)
    text = judge.open_form(pairs, ("adapter", "base"), serve=False)
    assert 'A. It\'s "well" & <good>.' in text, "what is printed is no HTML"


def test_the_forms_buttons_do_what_step_does() -> None:
    pairs = judge_pairs()
    page = judge.judge_page(pairs, ("adapter", "base"))
    events = list(page.fns.values())
    assert len(events) == 3
    for event, letter in zip(events, judge.CHOICES, strict=True):
        assert event.fn([]) == judge.step(pairs, [], letter, ("adapter", "base"))


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        (["a", "b", "c"], "3 different questions in 3 rows make no 10 folds: set --folds"),
        (["same"] * 20 + [f"q{i}" for i in range(20)], "20 of 40 rows ask 'same', so one fold"),
    ],
)
def test_rows_that_make_no_folds_end_in_one_sentence(tmp_path, questions, message) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"question": q, "answer": "so"}) for q in questions))
    with pytest.raises(SystemExit, match=message):
        crossval.main(["--data", str(path), "--name", "bad"])


def test_empty_answers_and_folds_that_are_not_there_end_in_one_sentence(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"q{i}", "answer": " "}) for i in range(9)))
    with pytest.raises(SystemExit, match="no row is left of 9 .dropped: .'without an answer': 9"):
        crossval.main(["--data", str(path)])
    with pytest.raises(SystemExit, match="there is no part fold10: take from fold0 fold1"):
        crossval.main(["--parts", "fold10"])
    with pytest.raises(SystemExit, match="no file .*: check DATASET"):
        crossval.main(["--data", str(tmp_path / "none.jsonl")])
    with pytest.raises(ValueError, match="an answer to 'Why[?]' is empty: leave that question out"):
        judge.blind_pairs(["Why?"], [said(" ")], [said("So.")])
    with pytest.raises(ValueError, match="0 questions with 0 and 0 answers make no pairs"):
        judge.blind_pairs([], [], [])


def test_an_adapter_of_another_base_is_named(run) -> None:
    made, _ = run
    with pytest.raises(ValueError, match="fits hidden size 320, not 64: run 03, or set ADAPTER"):
        find_adapter(str(made.folder / "adapter"), None, None, None, None, 64, "some/other-base")


def test_a_gpus_minutes_are_predicted_from_the_measured_step(tmp_path) -> None:
    made = replace(setup(tmp_path), profile=replace(A100, max_steps=100))
    card = json.loads((ROOT / "results/h200/falcon7b.json").read_text())
    minutes = 300 * card["training"]["step_seconds"] / 60
    assert f"predicted {minutes:.0f} min of training on" in crossval.forecast(
        made, ["fold0", "long"]
    )
    assert "on one core" in crossval.forecast(setup(tmp_path), ["fold0"])


def test_decoding_wants_the_adapter_of_fold_0(tmp_path) -> None:
    with pytest.raises(ValueError, match="decoding needs the adapter of fold 0: make"):
        crossval.run_decoding(replace(setup(tmp_path), name="never made"))
