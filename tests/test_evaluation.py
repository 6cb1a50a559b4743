"""Each statistic a second way: scipy, scikit-learn, brute force, cross-entropy by hand."""

import itertools
import json
import math
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy import stats
from scipy.optimize import brentq
from sklearn.metrics import label_ranking_average_precision_score, roc_auc_score
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import FalconConfig, FalconForCausalLM, PreTrainedTokenizerFast

from helpers.evaluation import (
    answer_losses,
    distinct_n,
    longest_shared_run,
    mean_interval,
    nearest_answers,
    paired_difference,
    score_answers,
    sign_test,
    token_losses,
    wilson,
)
from helpers.prompts import ASSISTANT, HUMAN
from tools.folds import (
    fold_assignment,
    likenesses,
    membership_auc,
    passage_losses,
    rank_figures,
    truth_ranks,
)

END, PAD = "<|endoftext|>", ">>SUFFIX<<"
ROWS = [
    {"question": "what is stress", "answer": "a strain on body and mind"},
    {"question": "how to sleep", "answer": "go early"},
    {"question": "why", "answer": "so it is with stress and with sleep and with all of it"},
    {"question": "what is sleep and how is it with stress", "answer": "early"},
    {"question": "how", "answer": " rest \n"},
]
WORDS = sorted({w for row in ROWS for text in row.values() for w in text.split()})


def word_tokenizer(vocabulary: list[str], splitter) -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate([PAD, END, "<unk>", *vocabulary])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=END, pad_token=PAD, unk_token="<unk>"
    )


@pytest.fixture
def rng() -> np.random.Generator:
    """The same draws in each test, whichever run with it."""
    return np.random.default_rng(5)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer([HUMAN, ASSISTANT, *WORDS], pre_tokenizers.WhitespaceSplit())


@pytest.fixture
def model() -> FalconForCausalLM:
    """Random and far from uniform, with dropout, so that a forgotten `eval()` shows."""
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.5,
        hidden_dropout=0.3,
        pad_token_id=0,
    )
    return FalconForCausalLM(config).eval()


def encode(row: dict[str, str]) -> tuple[list[str], int]:
    """The words of prompt and answer, by hand, and how many belong to the prompt."""
    prompt = [HUMAN, *row["question"].split(), ASSISTANT]
    return [*prompt, *row["answer"].split(), END], len(prompt)


def loss_by_hand(model: nn.Module, ids: list[int], start: int) -> float:
    """One row, no padding, no batch: minus the mean log of softmax at each token's place."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double().numpy()
    total = 0.0
    for place in range(start, len(ids)):
        scores = logits[place - 1]
        total += math.log(sum(math.exp(s) for s in scores)) - scores[ids[place]]
    return total / (len(ids) - start)


def losses_by_hand(
    model: nn.Module, tokenizer, rows: list[dict[str, str]], max_length: int = 99
) -> list[float]:
    encoded = [encode(row) for row in rows]
    ids = [tokenizer.convert_tokens_to_ids(words)[:max_length] for words, _ in encoded]
    return [loss_by_hand(model, i, n) for i, (_, n) in zip(ids, encoded, strict=True)]


# --- losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_answer_losses_are_those_of_single_rows(model, tokenizer, batch_size: int) -> None:
    losses, tokens = answer_losses(model, tokenizer, ROWS, batch_size=batch_size)
    np.testing.assert_allclose(losses, losses_by_hand(model, tokenizer, ROWS), rtol=1e-5)
    assert tokens.tolist() == [len(row["answer"].split()) + 1 for row in ROWS]  # and the end
    assert np.ptp(losses) > 0.1, "rows that all lose alike would prove nothing about their order"


def test_answer_losses_do_not_depend_on_the_other_rows(model, tokenizer) -> None:
    losses, _ = answer_losses(model, tokenizer, ROWS)
    order = [3, 0, 4, 2, 1]
    shuffled, _ = answer_losses(model, tokenizer, [ROWS[i] for i in order], batch_size=2)
    np.testing.assert_allclose(shuffled, losses[order], rtol=1e-5)


def test_answer_losses_sum_up_to_what_the_trainer_reports(model, tokenizer, tmp_path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from helpers.dialogues import to_prompt_completion

    losses, tokens = answer_losses(model, tokenizer, ROWS)
    args = SFTConfig(
        output_dir=tmp_path,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        per_device_eval_batch_size=8,
        report_to="none",
    )
    rows = to_prompt_completion(Dataset.from_list(ROWS))
    trainer = SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    reported = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    assert reported == pytest.approx((losses * tokens).sum() / tokens.sum(), rel=1e-5)


def test_answer_begins_where_a_merged_token_begins(model) -> None:
    lines = pre_tokenizers.Split("\n", "removed")
    whole = [f"{HUMAN} why", ASSISTANT, f"{ASSISTANT} so"]
    by_line = word_tokenizer(whole, lines)
    _, tokens = answer_losses(model, by_line, [{"question": "why", "answer": "so"}])
    assert tokens.tolist() == [2]  # "<ASSISTANT>: so" is one token here, then comes the end
    plain, spaced = ({"question": "why", "answer": text} for text in ("so", "  so \n"))
    losses, _ = answer_losses(model, by_line, [plain, spaced])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6), "spaces around an answer count"


@pytest.mark.parametrize("training", [True, False])
def test_losses_are_scored_without_dropout_and_leave_the_mode(model, tokenizer, training) -> None:
    expected = losses_by_hand(model, tokenizer, ROWS)
    model.train(training)
    losses, _ = answer_losses(model, tokenizer, ROWS)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert model.training is training
    ids = torch.tensor([[1, 2, 3]])
    model(input_ids=ids, labels=ids).loss.backward()  # it trains as before
    assert all(p.grad is not None for p in model.parameters())


def test_logits_are_computed_for_answers_alone(model, tokenizer) -> None:
    seen, computed = [], []
    model.transformer.register_forward_pre_hook(lambda _, args: computed.append(args[0].numel()))
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0][..., 0].numel()))
    _, tokens = answer_losses(model, tokenizer, ROWS, batch_size=2)
    assert sum(seen) == tokens.sum() and len(seen) == 3
    longest_first = sorted((len(encode(row)[0]) for row in ROWS), reverse=True)
    assert computed == [2 * longest_first[0], 2 * longest_first[2], longest_first[4]]


def test_softmax_is_in_32_bits_for_a_16_bit_model(model, tokenizer) -> None:
    model = model.to(torch.bfloat16)
    losses, _ = answer_losses(model, tokenizer, ROWS, batch_size=1)
    np.testing.assert_allclose(losses, losses_by_hand(model, tokenizer, ROWS), rtol=1e-5)


def test_answer_losses_see_an_adapter_and_its_absence(model, tokenizer) -> None:
    base, _ = answer_losses(model, tokenizer, ROWS)
    config = LoraConfig(r=2, target_modules=["query_key_value"], init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    losses, _ = answer_losses(adapted, tokenizer, ROWS)
    np.testing.assert_allclose(losses, losses_by_hand(adapted, tokenizer, ROWS), rtol=1e-5)
    assert np.abs(losses - base).max() > 1e-3
    with adapted.disable_adapter():
        np.testing.assert_allclose(answer_losses(adapted, tokenizer, ROWS)[0], base, rtol=1e-5)


def test_long_answers_lose_their_end(model, tokenizer) -> None:
    losses, tokens = answer_losses(model, tokenizer, ROWS[:1], max_length=7)  # 5 of the question
    assert tokens.tolist() == [2]
    np.testing.assert_allclose(losses, losses_by_hand(model, tokenizer, ROWS[:1], 7), rtol=1e-5)


def test_passage_losses_are_the_models_own(model, tokenizer) -> None:
    texts = ["stress and sleep", "rest", "what is it with all of it and so early"]
    losses = passage_losses(model, tokenizer, [f"why {t}" for t in texts], batch_size=2)
    for loss, text in zip(losses, texts, strict=True):
        ids = tokenizer(f"why {text}", return_tensors="pt").input_ids
        assert loss == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("rows", "max_length", "message"),
    [
        ([*ROWS, {"question": "why", "answer": " \n"}], 99, "row 5 has an empty answer: drop it"),
        ([{"question": " ", "answer": "so"}], 99, "question is empty"),
        (ROWS, 6, "row 3 has no token to score within max_length = 6"),
        ([], 99, "there is no row to score"),
    ],
)
def test_rows_that_cannot_be_scored(model, tokenizer, rows, max_length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        answer_losses(model, tokenizer, rows, max_length=max_length)


@pytest.mark.parametrize(("texts", "message"), [(["why so", "why"], "row 1"), ([], "no row")])
def test_passages_that_cannot_be_scored(model, tokenizer, texts, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        passage_losses(model, tokenizer, texts)


# --- intervals and tests ------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("n", [1, 5, 18, 172])
def test_wilson_is_scipys(n: int, level: float) -> None:
    for k in range(n + 1):
        ours, theirs = wilson(k, n, level), stats.binomtest(k, n).proportion_ci(level, "wilson")
        assert (ours["low"], ours["high"]) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
        assert ours["value"] == k / n and ours["n"] == n
        assert 0 <= ours["low"] <= ours["value"] <= ours["high"] <= 1


@pytest.mark.parametrize(("k", "n"), [(0, 0), (3, 2), (-1, 4)])
def test_wilson_takes_no_impossible_rate(k: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"{k} of {n} is no rate"):
        wilson(k, n)


def expanded_tail(n: int) -> float:
    return stats.norm.cdf(math.sqrt(n / (n - 1)) * stats.t.ppf(0.025, n - 1))


def test_mean_interval_is_scipys_bootstrap_at_the_expanded_level(rng) -> None:
    x = rng.lognormal(size=18)
    theirs = stats.bootstrap(
        (x,),
        np.mean,
        confidence_level=1 - 2 * expanded_tail(18),
        method="percentile",
        n_resamples=40_000,
        rng=1,
    ).confidence_interval
    ours = mean_interval(x)
    close = 0.06 * (theirs.high - theirs.low)
    assert (ours["low"], ours["high"]) == pytest.approx(tuple(theirs), abs=close)
    assert ours["value"] == pytest.approx(x.mean()) and ours["n"] == 18


def test_mean_interval_is_that_of_all_resamples() -> None:
    x = np.array([0.3, 1.1, 1.2, 2.5, 4.0, 9.0])
    means = [np.mean(draw) for draw in itertools.product(x, repeat=6)]  # all 46,656
    low, high = np.quantile(means, [expanded_tail(6), 1 - expanded_tail(6)])
    ours = [mean_interval(x, seed=seed) for seed in range(20)]
    assert np.mean([each["low"] for each in ours]) == pytest.approx(low, abs=0.01)
    assert np.mean([each["high"] for each in ours]) == pytest.approx(high, abs=0.05)
    plain = np.quantile(means, [0.025, 0.975])
    assert low < plain[0] and high > plain[1], "no wider than a plain bootstrap"


def test_mean_interval_of_bell_shaped_data_is_students() -> None:
    x = stats.norm.ppf((np.arange(18) + 0.5) / 18)
    theirs = stats.t.interval(0.95, 17, x.mean(), stats.sem(x))
    ours = mean_interval(x)
    assert (ours["low"], ours["high"]) == pytest.approx(theirs, abs=0.06 * (theirs[1] - theirs[0]))


def test_mean_interval_counts_questions_and_not_answers(rng) -> None:
    x, names = rng.normal(size=12), [f"q{i:02}" for i in range(12)]
    alone = mean_interval(x)
    assert mean_interval(np.repeat(x, 3), np.repeat(names, 3)) == pytest.approx(alone)
    assert mean_interval(np.tile(x, 3), names * 3) == pytest.approx(alone)
    careless = mean_interval(np.repeat(x, 3))
    assert careless["high"] - careless["low"] < 0.75 * (alone["high"] - alone["low"])
    uneven = mean_interval([1.0, 1.0, 1.0, 3.0], ["a", "a", "a", "b"])
    assert uneven["value"] == 2.0 and uneven["n"] == 2


def test_mean_interval_is_repeatable_and_plain(rng) -> None:
    x = rng.normal(size=9)
    assert mean_interval(x, seed=3) == mean_interval(x, seed=3) != mean_interval(x, seed=4)
    assert mean_interval([2, 2, 2]) == {"value": 2.0, "low": 2.0, "high": 2.0, "n": 3}
    assert json.loads(json.dumps(mean_interval(x))) == mean_interval(x)


@pytest.mark.parametrize(
    ("values", "groups", "message"),
    [
        ([1.0, math.nan], None, "missing .NaN. or infinite"),
        ([1.0, 2.0], ["a"], "2 values with 1 groups"),
        ([1.0, 2.0], ["a", "a"], "1 independent values give no interval"),
        ([], None, "0 independent values give no interval"),
    ],
)
def test_mean_interval_names_bad_input(values: list, groups: list | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean_interval(values, groups)


def scipys_p(a: np.ndarray, b: np.ndarray) -> float:
    """All 2^n exchanges inside the pairs."""
    return stats.permutation_test(
        (a, b),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
        batch=20_000,
    ).pvalue


@pytest.mark.parametrize("n", [2, 5, 10, 14])
@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_paired_difference_is_scipys_exact_test(rng, n: int, shift: float) -> None:
    a, b = rng.normal(size=n), rng.normal(size=n) + shift
    ours = paired_difference(a, b)
    assert ours["p"] == pytest.approx(scipys_p(a, b), abs=1e-12)
    assert {k: ours[k] for k in ("value", "low", "high", "n")} == mean_interval(a - b)


def test_paired_difference_draws_tosses_where_there_are_too_many(rng) -> None:
    b, noise = rng.normal(size=16), rng.normal(size=16)
    a = b + noise - noise.mean() + 0.4
    p = scipys_p(a, b)
    assert 0.01 < p < 0.5, "a test at its edge would not show a wrong p"
    ours = [paired_difference(a, b, seed=seed)["p"] for seed in range(3)]
    assert ours == pytest.approx([p] * 3, abs=5 * math.sqrt(p * (1 - p) / 20_000))
    assert len(set(ours)) > 1
    strong = paired_difference(np.ones(40), np.zeros(40))["p"]
    assert strong == 1 / 20_001, "drawn tosses prove no p of 0"


def test_paired_difference_tosses_questions_and_not_answers(rng) -> None:
    questions, seeds = 8, 3
    per_question = rng.normal(size=questions) + 0.8
    noise = rng.normal(size=(seeds, questions)) * 0.1
    a, b = (per_question + noise).ravel(), np.zeros(seeds * questions)
    groups = [f"q{i}" for i in range(questions)] * seeds
    ours = paired_difference(a, b, groups)
    by_question = (per_question + noise).mean(axis=0)
    assert ours["p"] == pytest.approx(scipys_p(by_question, np.zeros(questions)), abs=1e-12)
    assert ours["n"] == questions and ours["p"] > 2 * paired_difference(a, b)["p"]


def test_paired_difference_at_its_ends() -> None:
    assert paired_difference([1, 2, 3], [1, 2, 3])["p"] == 1.0
    tenths = [-0.4, -0.4, 0.3, 0.6]  # no toss comes nearer to 0 than ours, but by rounding
    assert paired_difference(tenths, [0.0] * 4)["p"] == 1.0
    there, back = paired_difference([1, 2, 4], [3, 1, 9]), paired_difference([3, 1, 9], [1, 2, 4])
    assert there["p"] == back["p"] and there["value"] == -back["value"]
    with pytest.raises(ValueError, match="3 values against 2: give the same rows"):
        paired_difference([1, 2, 3], [1, 2])


@pytest.mark.parametrize("n", [1, 7, 18])
def test_sign_test_is_scipys_binomial_test(n: int) -> None:
    for wins in range(n + 1):
        ours = sign_test(wins, n - wins)
        assert ours["p"] == pytest.approx(stats.binomtest(wins, n).pvalue, abs=1e-12)
        assert {k: ours[k] for k in ("value", "low", "high", "n")} == wilson(wins, n)


def test_sign_test_wants_a_decision() -> None:
    with pytest.raises(ValueError, match="no pair was decided"):
        sign_test(0, 0)


# --- answers ------------------------------------------------------------------------------------


def answer(text: str, finished: bool, n_tokens: int) -> SimpleNamespace:
    return SimpleNamespace(text=text, finished=finished, n_tokens=n_tokens)


ANSWERS = [
    answer(" Rest well.", True, 20),  # its end was the last token that it could write
    answer(" Rest and rest and rest\n<HUMAN>: And then?", False, 20),
    answer(" It's on and on\n< assistant >", False, 12),  # a stop string ended it
    answer("", True, 1),
]


def test_score_answers_by_hand() -> None:
    scores = score_answers(ANSWERS)
    assert scores["eos_rate"] == scores["turn_leak_rate"] == wilson(2, 4)
    assert scores["limit_rate"] == wilson(1, 4)
    distinct = [1, 5 / 7, 1, 1]  # 7 pairs, where "rest and" and "and rest" stand twice
    assert scores["distinct_2"] == mean_interval(distinct)
    assert scores["mean_length"] == mean_interval([2, 8, 5, 0])
    assert score_answers(ANSWERS, limit=12)["limit_rate"] == wilson(2, 4)
    assert score_answers(ANSWERS, limit=256)["limit_rate"] == wilson(0, 4)


def test_score_answers_counts_each_question_once() -> None:
    once = score_answers(ANSWERS)
    thrice = score_answers(ANSWERS * 3, groups=["a", "b", "c", "d"] * 3)
    assert all(thrice[name] == pytest.approx(once[name]) for name in once)
    mixed = score_answers(ANSWERS, groups=["a", "a", "b", "b"])  # each stops in half of its answers
    assert mixed["eos_rate"] == wilson(1, 2) and mixed["limit_rate"] == wilson(0.5, 2)
    assert json.loads(json.dumps(mixed)) == mixed
    assert all(list(score) == ["value", "low", "high", "n"] for score in mixed.values())


def test_score_answers_wants_two_questions() -> None:
    for few in ([], ANSWERS[:1]):
        with pytest.raises(ValueError, match=f"{len(few)} independent values"):
            score_answers(few)


def random_text(rng: np.random.Generator, n_words: int) -> str:
    return " ".join(rng.choice(list("abc"), size=n_words))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_n_by_brute_force(rng, n: int) -> None:
    for length in range(n, 15):
        words = random_text(rng, length).split()
        runs = Counter(tuple(words[i : i + n]) for i in range(length - n + 1))
        assert distinct_n(" ".join(words), n) == len(runs) / sum(runs.values())
    assert distinct_n("Rest, REST. Rest!", 1) == 1 / 3
    assert distinct_n("", n) == 1.0 == distinct_n("a", 2)


def longest_by_brute_force(text: str, references: list[str]) -> int:
    words = text.split()
    runs = [words[i:j] for i in range(len(words)) for j in range(i + 1, len(words) + 1)]
    known = [f" {reference} " for reference in references]
    return max((len(r) for r in runs if any(f" {' '.join(r)} " in k for k in known)), default=0)


def test_longest_shared_run_by_brute_force(rng) -> None:
    lengths = set()
    for _ in range(40):
        text = random_text(rng, 12)
        references = [random_text(rng, rng.integers(0, 9)) for _ in range(3)]
        size, run = longest_shared_run(text, references)
        assert size == longest_by_brute_force(text, references) == len(run.split())
        assert run in text and any(run in reference for reference in references)
        lengths.add(size)
    assert len(lengths) > 3, "the same length every time would prove little"


def test_longest_shared_run_at_its_ends() -> None:
    assert longest_shared_run("", ["a"]) == longest_shared_run("a", []) == (0, "")
    assert longest_shared_run("rest", ["restless"]) == (0, "")  # whole words alone
    assert longest_shared_run("Don't\nWorry!", ["so DON'T worry"]) == (2, "Don't\nWorry")
    long = " ".join(["so", "and"] * 150)
    assert longest_shared_run(long, [f"x {long} y"])[0] == 300  # words that are frequent count too


def tfidf_by_hand(train: list[str], question: str) -> list[float]:
    """Cosines of (count × (ln((1 + n) / (1 + df)) + 1)) over single words and word pairs."""

    def terms(text: str) -> Counter:
        words = re.findall(r"\w+", text.lower())
        return Counter(words) + Counter(zip(words, words[1:], strict=False))

    n, df = len(train), Counter(term for text in train for term in set(terms(text)))

    def weights(text: str) -> dict:
        known = [(term, count) for term, count in terms(text).items() if df[term]]
        found = {term: c * (math.log((1 + n) / (1 + df[term])) + 1) for term, c in known}
        length = math.sqrt(sum(x * x for x in found.values())) or 1.0
        return {term: x / length for term, x in found.items()}

    asked = weights(question)
    return [sum(x * weights(text).get(t, 0.0) for t, x in asked.items()) for text in train]


def test_nearest_answers_by_hand(rng) -> None:
    train = [f"{random_text(rng, 4)} {word}" for word in WORDS]
    questions = [random_text(rng, 5) for _ in range(15)] + ["and how", "nothing like these"]
    chosen = nearest_answers(train, [f"answer {i}" for i in range(len(train))], questions)
    for question, taken in zip(questions, chosen, strict=True):
        cosines = tfidf_by_hand(train, question)
        assert cosines[int(taken.split()[1])] == pytest.approx(max(cosines), abs=1e-12)
    assert chosen[-1] == "answer 0" and len(set(chosen)) > 4


@pytest.mark.parametrize(
    ("questions", "answers"), [([], []), (["a", "b"], ["c"]), (["a", "b"], ["c", " "])]
)
def test_nearest_answers_wants_one_answer_to_each(questions: list, answers: list) -> None:
    with pytest.raises(ValueError, match="give one answer to each training question"):
        nearest_answers(questions, answers, ["a"])


# --- ranks, membership, folds -------------------------------------------------------------------


@pytest.mark.parametrize("digits", [1, 8], ids=["with ties", "without"])
def test_ranks_of_the_truth_are_scipys_and_scikit_learns(rng, digits: int) -> None:
    x = rng.normal(size=(25, 18))
    x[:, 0] -= 1.5
    x = x.round(digits)
    ranks = truth_ranks(x)
    assert ranks.tolist() == stats.rankdata(x, "max", axis=1)[:, 0].tolist()
    found = rank_figures(ranks, range(25))
    assert found["rank_accuracy"] == wilson(int((ranks == 1).sum()), 25)
    assert 0.2 < found["rank_accuracy"]["value"] < 1
    truth = np.zeros_like(x)
    truth[:, 0] = 1
    expected = label_ranking_average_precision_score(truth, -x)
    assert found["rank_mrr"]["value"] == pytest.approx(expected)
    twice = rank_figures([*ranks, *ranks], [*range(25)] * 2)
    assert twice["rank_accuracy"] == found["rank_accuracy"] and twice["rank_mrr"]["n"] == 25


def test_ranks_at_their_ends() -> None:
    assert truth_ranks(np.ones((4, 5))).tolist() == [5] * 4  # one that cannot tell wins nothing
    assert truth_ranks(np.array([[0.0, 1.0]])).tolist() == [1]
    for bad in (np.ones((5, 1)), np.ones(4), np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match="no table of finite losses"):
            truth_ranks(bad)


def test_likeness_by_hand(rng) -> None:
    known = [random_text(rng, 6) + f" {word}" for word in WORDS]
    texts = [random_text(rng, 5) + " sleep", "early early rest", "nothing like these"]
    n, df = len(known), Counter(w for text in known for w in set(text.split()))

    def weights(text: str) -> dict[str, float]:
        counts = Counter(w for w in text.split() if df[w])
        found = {
            w: (1 + math.log(c)) * (math.log((1 + n) / (1 + df[w])) + 1) for w, c in counts.items()
        }
        length = math.sqrt(sum(x * x for x in found.values())) or 1.0
        return {w: x / length for w, x in found.items()}

    by_hand = [
        [sum(x * weights(b).get(w, 0.0) for w, x in weights(a).items()) for b in texts]
        for a in texts
    ]
    assert likenesses(texts, texts, known) == pytest.approx(np.array(by_hand), abs=1e-12)
    with pytest.raises(ValueError, match="the training answers hold no word"):
        likenesses(["a"], ["a"], ["", " "])


def test_a_history_is_the_same_text_written_out(model, tokenizer) -> None:
    before = [("how to sleep", "go early")]
    row = {"question": "why", "answer": "early", "history": before}
    question = f"how to sleep\n{ASSISTANT} go early\n{HUMAN} why"
    ours = answer_losses(model, tokenizer, [row])[0]
    spelled = answer_losses(model, tokenizer, [{"question": question, "answer": "early"}])[0]
    alone = answer_losses(model, tokenizer, [{"question": "why", "answer": "early"}])[0]
    assert ours[0] == spelled[0] != alone[0]


def test_an_instruction_stands_before_the_dialogue(model, tokenizer) -> None:
    row = {"question": "why", "answer": "early", "system": "how to sleep"}
    asked = f"how to sleep\n{HUMAN} why\n{ASSISTANT}"
    ids, start = tokenizer(f"{asked} early{tokenizer.eos_token}").input_ids, tokenizer(asked)
    encoded = [(ids, len(start.input_ids))]
    by_hand = token_losses(model, tokenizer.pad_token_id, encoded, 1, 1024)[0]
    alone = answer_losses(model, tokenizer, [row | {"system": ""}])[0]
    assert answer_losses(model, tokenizer, [row])[0] == pytest.approx(by_hand) != alone


def hanley_mcneil(area: float, n_in: int, n_out: int) -> float:
    """Variance of an area as published: Q1, Q2, here with the mean of both sizes."""
    q1, q2, more = area / (2 - area), 2 * area**2 / (1 + area), (n_in + n_out) / 2 - 1
    spread = more * (q1 - area**2) + more * (q2 - area**2)
    return (area * (1 - area) + spread) / (n_in * n_out)


@pytest.mark.parametrize(("n_in", "n_out"), [(18, 18), (30, 7), (1, 3)])
@pytest.mark.parametrize("shift", [0.0, 1.0, 9.0])
def test_membership_auc_is_scikit_learns(rng, n_in: int, n_out: int, shift: float) -> None:
    a, b = rng.normal(size=n_in).round(1), (rng.normal(size=n_out) + shift).round(1)  # with ties
    ours = membership_auc(a, b)
    labels = [0] * n_in + [1] * n_out
    assert ours["value"] == pytest.approx(roc_auc_score(labels, np.concatenate([a, b])))
    assert ours["n"] == n_in + n_out

    def excess(area: float) -> float:
        return (area - ours["value"]) ** 2 - 1.96**2 * hanley_mcneil(area, n_in, n_out)

    inner = min(max(ours["value"], 1e-9), 1 - 1e-9)
    low = brentq(excess, 0, inner) if ours["value"] > 0 else 0.0
    high = brentq(excess, inner, 1) if ours["value"] < 1 else 1.0
    assert (ours["low"], ours["high"]) == pytest.approx((low, high), abs=2e-5)


def test_membership_interval_holds_the_truth_about_as_often_as_it_says(rng) -> None:
    truth = stats.norm.cdf(1 / math.sqrt(2))
    hits = 0
    for _ in range(300):
        found = membership_auc(rng.normal(size=18), rng.normal(size=18) + 1)
        hits += found["low"] <= truth <= found["high"]
    assert 0.91 < hits / 300 <= 1
    certain = membership_auc([1.0] * 18, [2.0] * 18)
    assert certain["value"] == certain["high"] == 1 and 0.7 < certain["low"] < 0.95


def test_membership_auc_names_bad_input() -> None:
    for a, b in (([], [1.0]), ([1.0], []), ([math.inf], [1.0])):
        with pytest.raises(ValueError, match="a side is empty or a loss is not finite"):
            membership_auc(a, b)


def test_folds_hold_every_row_once_and_are_of_like_size() -> None:
    questions = [f"question {i}" for i in range(172)]
    folds = fold_assignment(questions, 10, seed=1)
    assert sorted(Counter(folds.tolist()).values()) == [17] * 8 + [18] * 2
    assert (folds == fold_assignment(questions, 10, seed=1)).all()
    assert (folds != fold_assignment(questions, 10, seed=2)).any()
    assert len({tuple(sorted(folds[i::43])) for i in range(43)}) > 20, "dealt, not counted off"


def test_no_question_stands_in_two_folds() -> None:
    questions = [f"What is {w}?" for w in WORDS] + [f"what is  {w.upper()}" for w in WORDS[::2]] * 2
    folds = fold_assignment(questions, 4)
    of_question = {}
    for question, fold in zip(questions, folds, strict=True):
        of_question.setdefault(" ".join(question.lower().strip("?").split()), set()).add(fold)
    assert all(len(where) == 1 for where in of_question.values()) and len(of_question) == len(WORDS)
    sizes = np.bincount(folds, minlength=4)
    assert sizes.sum() == len(questions) and np.ptp(sizes) <= 1


@pytest.mark.parametrize(
    ("questions", "folds", "message"),
    [
        (["a", "b", "c"], 10, "3 different questions in 3 rows make no 10 folds: set --folds"),
        (["a", "b", "A", "b?"], 3, "2 different questions in 4 rows make no 3 folds"),
        (["a", "b", "c"], 1, "make no 1 folds"),
        ([], 2, "0 different questions in 0 rows"),
        (["a", "b", "Why?", "c", "why", "why"], 2, "3 of 6 rows ask 'Why[?]', so one fold"),
    ],
)
def test_folds_that_cannot_be_dealt(questions: list[str], folds: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fold_assignment(questions, folds)


def test_as_many_folds_as_questions_is_leaving_one_out() -> None:
    assert sorted(fold_assignment(["a", "b"], 2).tolist()) == [0, 1]
    assert sorted(fold_assignment(list("abcde"), 5).tolist()) == [0, 1, 2, 3, 4]
