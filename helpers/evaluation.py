"""Statistics that fit small n: losses, scores, intervals, paired tests, without a judge.

Every estimate has one shape, `Estimate`. Its `n` counts what is independent: questions where
`groups` are given, values otherwise. Several answers to one question (sampling seeds, folds) are
averaged first, so that each question counts once; no interval rests on a normal approximation
of a mean.
"""

import math
import re
from collections.abc import Hashable, Iterable, Sequence
from difflib import SequenceMatcher
from statistics import NormalDist
from typing import TypedDict

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.prompts import ROLE_TAG, format_prompt

WORD = re.compile(r"\w+(?:['’]\w+)*")
Encoded = tuple[list[int], int]  # token ids, and the first of them that is scored
RESAMPLES, FLIPS, EXACT_UP_TO = 10_000, 20_000, 14


class Estimate(TypedDict):
    """A figure with its 95 % interval and the number of independent values behind it."""

    value: float
    low: float
    high: float
    n: int


class Comparison(Estimate):
    """An estimate with the two-sided p-value of "no difference"."""

    p: float


def wilson(successes: float, n: int, level: float = 0.95) -> Estimate:
    """Wilson's score interval for a rate: honest at 0 of n and at n of n.

    Args:
        successes: 0 to n. A sum of shares is allowed, one share for each question; a mean of
            shares varies no more than one of yes and no, so the interval is then cautious.
        n: independent trials.
        level: share of such intervals that hold the truth.

    Returns:
        The rate as a share of 1, with its interval inside [0, 1].

    Raises:
        ValueError: if n is not positive, or successes lie outside 0 to n.

    Source:
        Wilson (1927), Probable inference: https://doi.org/10.1080/01621459.1927.10502953

    Example:
        >>> round(wilson(18, 18)["low"], 2)    # 18 / (18 + 1.96 ** 2) = 18 / 21.84
        0.82
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is no rate: give 0 to n successes and n of 1 or more")
    z = NormalDist().inv_cdf((1 + level) / 2)
    rate, weight = successes / n, n / (n + z * z)
    centre = weight * rate + (1 - weight) / 2
    half = weight * z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Estimate(value=rate, low=min(low, rate), high=max(high, rate), n=n)


def group_means(values: Sequence[float], groups: Sequence[Hashable] | None) -> np.ndarray:
    """One mean for each group; each value is a group of its own where none are given.

    Args:
        values: (n,) numbers; True counts as 1.
        groups: (n,) for instance the question that each answers; None if each stands alone.

    Returns:
        (n_groups,) float64, ordered by group.

    Raises:
        ValueError: if a value is not finite, lengths differ, or there are under two groups.

    Example:
        >>> group_means([1, 3, 5], ["a", "a", "b"]).tolist()
        [2.0, 5.0]
    """
    x, groups = np.asarray(values, dtype=float), range(len(values)) if groups is None else groups
    if not np.isfinite(x).all():
        raise ValueError("a value is missing (NaN) or infinite: leave that row out on both sides")
    if len(groups) != len(x):
        raise ValueError(f"{len(x)} values with {len(groups)} groups: give one group to each value")
    which = np.unique(list(groups), return_inverse=True)[1]
    if len(set(which)) < 2:
        raise ValueError(f"{len(set(which))} independent values give no interval: give 2 or more")
    return np.bincount(which, x) / np.bincount(which)


def mean_interval(
    values: Sequence[float], groups: Sequence[Hashable] | None = None, seed: int = 0
) -> Estimate:
    """The mean of losses or lengths with a percentile bootstrap interval, clustered by group.

    The percentiles are the expanded ones: with n values a plain bootstrap is too narrow by
    about sqrt((n - 1) / n) and ignores that the spread is itself a guess. That moves the
    percentiles outwards; the interval's shape still comes from the data.

    Args:
        values: (n,) losses in nats, lengths in words, differences …
        groups: (n,) the question each value belongs to; None if every value stands alone.
        seed: of the resamples.

    Returns:
        The mean of the groups' means, in the unit of `values`; `n` counts groups.

    Raises:
        ValueError: if a value is not finite, lengths differ, or there are under two groups.

    Source:
        Hesterberg (2014), What teachers should know about the bootstrap, section on expanded
        percentile intervals: https://arxiv.org/abs/1411.5279

    Example:
        >>> mean_interval([1.0, 1.0, 3.0], groups=["a", "a", "b"])    # two values: all we know
        {'value': 2.0, 'low': 1.0, 'high': 3.0, 'n': 2}
    """
    from scipy.stats import norm, t

    x = group_means(values, groups)
    n, generator = len(x), np.random.default_rng(seed)
    means = [x[generator.integers(n, size=(100, n))].mean(axis=1) for _ in range(RESAMPLES // 100)]
    tail = norm.cdf(math.sqrt(n / (n - 1)) * t.ppf(0.025, n - 1))
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Estimate(value=float(x.mean()), low=float(low), high=float(high), n=n)


def paired_difference(
    a: Sequence[float], b: Sequence[float], groups: Sequence[Hashable] | None = None, seed: int = 0
) -> Comparison:
    """The mean of a - b over pairs, its interval, and the sign-flip permutation test.

    If nothing sets a and b apart, the sign of each question's difference is a coin toss. p is
    the share of all tosses whose mean is as far from zero as ours: of all 2^n up to 14
    questions, of 20,000 drawn ones (and ours) above.

    Args:
        a: (n,) for instance losses in nats with the adapter.
        b: (n,) the same rows without it.
        groups: (n,) the question each pair belongs to; a question's sign is tossed as one.
        seed: of the tosses and resamples.

    Returns:
        `mean_interval` of a - b, and the two-sided p. The interval and p are two methods: they
        may disagree by a hair at 0.05.

    Raises:
        ValueError: as `mean_interval`, or if a and b differ in length.

    Source:
        Fisher (1935), The Design of Experiments, section 21.

    Example:
        >>> paired_difference([1, 2, 3], [2, 4, 6])["p"]    # 2 of 8: all minus, all plus
        0.25
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values against {len(b)}: give the same rows on both sides")
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    x, generator = group_means(difference, groups), np.random.default_rng(seed)
    if len(x) <= EXACT_UP_TO:
        tails = np.arange(2 ** len(x))[:, None] >> np.arange(len(x)) & 1
    else:  # the first toss is ours, none turned
        tails = generator.integers(2, size=(FLIPS + 1, len(x)), dtype=np.int8)
        tails[0] = 0
    sums = np.abs((1 - 2.0 * tails) @ x)
    p = float((sums >= abs(x.sum()) - 1e-12 * np.abs(x).sum()).mean())  # a hair for rounding
    return Comparison(**mean_interval(difference, groups, seed), p=p)


def sign_test(wins: int, losses: int) -> Comparison:
    """Share of wins over wins and losses, with the exact two-sided sign test; ties are left out.

    Args:
        wins: pairs in which the first was preferred.
        losses: pairs in which the second was.

    Returns:
        The share of wins with Wilson's interval, and p against a fair coin.

    Raises:
        ValueError: if nothing was decided.

    Example:
        >>> sign_test(3, 0)["p"]    # 2 of 8
        0.25
    """
    n = wins + losses
    if n < 1:
        raise ValueError("no pair was decided, ties say nothing: judge at least one pair")
    tail = sum(math.comb(n, k) for k in range(max(wins, losses), n + 1)) / 2**n
    return Comparison(**wilson(wins, n), p=min(1.0, 2 * tail))


def _batch_losses(model: PreTrainedModel, pad_id: int, batch: Sequence[Encoded]) -> list[float]:
    """Mean loss of each (ids, start) from token `start` on; one forward, padded on the right."""
    inputs = pad_sequence([torch.tensor(ids) for ids, _ in batch], True, pad_id).to(model.device)
    spans = torch.tensor([[start, len(ids)] for ids, start in batch], device=model.device)
    starts, ends = spans.T.unsqueeze(2)
    position = torch.arange(inputs.shape[1], device=model.device)
    keep = (starts <= position + 1) & (position + 1 < ends)  # a token is predicted one before it
    mask = (position < ends).long()
    with torch.no_grad():
        out = model(input_ids=inputs, attention_mask=mask, use_cache=False, logits_to_keep=keep)
    sizes = keep.sum(1).tolist()
    pairs = zip(out.logits.split(sizes), inputs.roll(-1, 1)[keep].split(sizes), strict=True)
    return [torch.nn.functional.cross_entropy(x.float(), y).item() for x, y in pairs]


def token_losses(
    model: PreTrainedModel, pad_id: int | None, rows: list[Encoded], size: int, max_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Losses in nats and numbers of tokens scored, both in the order of `rows`.

    Args:
        model: scored in eval mode, and left in the mode it came in.
        pad_id: fills short rows up on the right; it is never scored.
        rows: (n,) pairs of token ids and the position of the first one to score, 1 or more.
        size: rows scored together.
        max_length: tokens; longer rows lose their end.

    Returns:
        losses: (n,) float64, mean nats a token; tokens: (n,) int, tokens scored.

    Raises:
        ValueError: if there are no rows, or one has no token to score.

    Example:
        >>> token_losses(None, None, [], size=1, max_length=8)
        Traceback (most recent call last):
        ...
        ValueError: there is no row to score within max_length = 8: check both
    """
    rows = [(ids[:max_length], start) for ids, start in rows]
    losses, tokens = np.zeros(len(rows)), np.array([len(ids) - start for ids, start in rows])
    if not rows or tokens.min() < 1:
        fault = f"row {tokens.argmin()} has no token" if rows else "there is no row"
        raise ValueError(f"{fault} to score within max_length = {max_length}: check both")
    longest_first = np.argsort([-len(ids) for ids, _ in rows], kind="stable")
    was_training = model.training
    model.eval()
    for part in np.split(longest_first, range(size, len(rows), size)):
        losses[part] = _batch_losses(model, pad_id or 0, [rows[i] for i in part])
    model.train(was_training)
    return losses, tokens


def answer_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[dict],
    batch_size: int = 8,
    max_length: int = 1024,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean next-token loss of each row's answer, its end-of-text token included.

    Question and answer are tokenized as one text, and the answer begins where that differs from
    the question alone: SFTTrainer's rule, so the loss is the one that was trained. Logits are
    computed at the answer's positions alone; Falcon-7B has 65,024 of them a token.

    Args:
        model: causal language model, with or without an adapter; scored in eval mode, and left
            in the mode it came in.
        tokenizer: of that model.
        rows: with `question` and `answer`, as from `load_dialogues`; a row's `history` of earlier
            (question, answer) pairs and its `system` instruction, if it has them, are put before
            its question.
        batch_size: rows of like length scored together, padded on the right.
        max_length: tokens; longer rows lose their end, as in training.

    Returns:
        losses: (n_rows,) float64, nats a token, in the order of `rows`.
        tokens: (n_rows,) int, answer tokens scored; the loss of the whole set as a trainer
            reports it is `(losses * tokens).sum() / tokens.sum()`.

    Raises:
        ValueError: if a question or an answer is empty, there are no rows, or `max_length`
            leaves nothing of an answer.
    """
    encoded = []
    for number, row in enumerate(rows):
        if not row["answer"].strip():
            raise ValueError(f"row {number} has an empty answer: drop it, or give it one")
        prompt = format_prompt(row["question"], row.get("history", ()), row.get("system", ""))
        alone = tokenizer(prompt).input_ids
        ids = tokenizer(f"{prompt} {row['answer'].strip()}{tokenizer.eos_token}").input_ids
        differ = (i for i, (one, two) in enumerate(zip(alone, ids, strict=False)) if one != two)
        encoded.append((ids, max(1, next(differ, len(alone)))))
    return token_losses(model, tokenizer.pad_token_id, encoded, batch_size, max_length)


def distinct_n(text: str, n: int = 2) -> float:
    """Share of a text's runs of n words that are different: 1 means that nothing repeats.

    Args:
        text: any; case and punctuation do not count.
        n: words in a run.

    Returns:
        0 to 1; 1 for a text of under n words, which repeats nothing.

    Source:
        Li et al. (2016), A diversity-promoting objective: https://arxiv.org/abs/1510.03055

    Example:
        >>> distinct_n("rest and rest and rest", 2)    # "rest and", "and rest", each twice
        0.5
    """
    words = WORD.findall(text.lower())
    runs = list(zip(*(words[i:] for i in range(n)), strict=False))
    return len(set(runs)) / len(runs) if runs else 1.0


def score_answers(
    generations: Sequence,
    groups: Sequence[Hashable] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Score raw answers without a judge: do they end, do they invent turns, do they repeat?

    Args:
        generations: (n,) raw answers, before any clean-up, as from `generate_texts`: anything
            with `.text` (str), `.finished` (bool: it wrote the end) and `.n_tokens` (int).
        groups: (n,) the question each answers, if there are several answers to one.
        limit: `max_new_tokens` they were written with; None takes the longest answer's length.
            Give it where a stop string may have ended every answer before the limit.
        seed: of the bootstrap.

    Returns:
        eos_rate: share that wrote the end-of-text token.
        turn_leak_rate: share that invented a `<HUMAN>` or `<ASSISTANT>` turn.
        limit_rate: share that ran into the limit; one that leaked may have done so as well.
        distinct_2: mean share of word pairs that differ, 0 to 1.
        mean_length: words, invented turns included.

    Raises:
        ValueError: if there are answers to fewer than two questions.
    """
    limit = limit or max((g.n_tokens for g in generations), default=0)

    def rate(flags: list[bool]) -> Estimate:
        shares = group_means(flags, groups)
        return wilson(float(shares.sum()), len(shares))

    lengths = [len(WORD.findall(g.text)) for g in generations]
    return {
        "eos_rate": rate([g.finished for g in generations]),
        "turn_leak_rate": rate([bool(ROLE_TAG.search(g.text)) for g in generations]),
        "limit_rate": rate([not g.finished and g.n_tokens >= limit for g in generations]),
        "distinct_2": mean_interval([distinct_n(g.text, 2) for g in generations], groups, seed),
        "mean_length": mean_interval(lengths, groups, seed),
    }


def longest_shared_run(text: str, references: Iterable[str]) -> tuple[int, str]:
    """The longest run of words that stands word for word in one of the references.

    Args:
        text: an answer; case and punctuation do not count.
        references: for instance all training answers.

    Returns:
        Its length in words, and the run as `text` writes it; (0, "") if no word is shared.

    Example:
        >>> longest_shared_run("So breathe in, slowly.", ["Sit down.", "Breathe in slowly now."])
        (3, 'breathe in, slowly')
    """
    spans = list(WORD.finditer(text))
    words = [span[0].lower() for span in spans]
    known = (WORD.findall(reference.lower()) for reference in references)
    runs = [SequenceMatcher(None, other, words, False).find_longest_match() for other in known]
    best = max(runs, key=lambda run: run.size, default=None)
    if best is None or best.size == 0:
        return 0, ""
    return best.size, text[spans[best.b].start() : spans[best.b + best.size - 1].end()]


def nearest_answers(
    train_questions: Sequence[str], train_answers: Sequence[str], questions: Sequence[str]
) -> list[str]:
    """The baseline that writes nothing: the answer to the most similar training question.

    Similar means the cosine of TF-IDF vectors of single words and word pairs.

    Args:
        train_questions: (n,) str.
        train_answers: (n,) str, none empty.
        questions: (m,) str, to be answered.

    Returns:
        (m,) str, each one of `train_answers`; the first one where no word is shared.

    Raises:
        ValueError: if there is no training row, the two differ in length, or an answer is empty.

    Example:
        >>> nearest_answers(["what is stress", "how to sleep"], ["A strain.", "Early."], ["sleep?"])
        ['Early.']
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    n_full = sum(bool(answer.strip()) for answer in train_answers)
    if not n_full or {n_full} != {len(train_questions), len(train_answers)}:
        have = f"{len(train_questions)} questions with {n_full} answers that are not empty"
        raise ValueError(f"{have}: give one answer to each training question")
    vectorizer = TfidfVectorizer(token_pattern=r"\w+", ngram_range=(1, 2))
    known = vectorizer.fit_transform(list(train_questions))
    nearest = (vectorizer.transform(list(questions)) @ known.T).toarray().argmax(axis=1)
    return [train_answers[i] for i in nearest]
