"""What only the cross-validation needs: folds, ranks, membership, likeness, a shared prompt."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from helpers.dialogues import normalise_question
from helpers.evaluation import WORD, Estimate, group_means, mean_interval, token_losses, wilson


def fold_assignment(questions: Sequence[str], folds: int, seed: int = 0) -> np.ndarray:
    """Deal rows into folds of like size, so that no question stands in two of them.

    Args:
        questions: (n,) str; equal after `normalise_question` means the same question.
        folds: how many, 2 or more.
        seed: which deal; the same seed gives the same folds on every machine.

    Returns:
        (n,) int, the fold of each row, 0 to folds - 1; none is empty.

    Raises:
        ValueError: if there are too few different questions for the folds, or one question
            takes half of the rows.

    Example:
        >>> folds = fold_assignment(["Why?", "How?", "why", "When?", "Where?"], folds=2)
        >>> bool(folds[0] == folds[2]), sorted(np.bincount(folds).tolist())
        (True, [2, 3])
    """
    from sklearn.model_selection import GroupKFold

    groups = np.unique([normalise_question(q) for q in questions], return_inverse=True)[1]
    copies = np.bincount(groups)
    if not 2 <= folds <= len(copies):
        have = f"{len(copies)} different questions in {len(groups)} rows make no {folds} folds"
        raise ValueError(f"{have}: set --folds from 2 to {len(copies)}, or add rows")
    if copies.max() > 1 and 2 * copies.max() >= len(groups):
        share = f"{copies.max()} of {len(groups)} rows ask {questions[copies[groups].argmax()]!r}"
        raise ValueError(f"{share}, so one fold would hold half of everything: drop its copies")
    fold_of = np.zeros(len(groups), dtype=int)
    shuffled = np.random.default_rng(seed).permutation(len(copies))[groups]
    deal = GroupKFold(folds).split(groups, groups=shuffled)  # by size, then by label
    for fold, (_, held_out) in enumerate(deal):
        fold_of[held_out] = fold
    return fold_of


class PromptOnce:
    """A causal model that reads the tokens with which all rows of a batch begin only once.

    For long prompts with many answers to score: give it to `answer_losses` in place of the model.
    The losses are the same.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, input_ids, attention_mask, logits_to_keep, use_cache=False) -> Any:
        """Logits where `logits_to_keep`, (n, length) bool, is True; padding on the right."""
        same = (input_ids == input_ids[:1]).all(0) & ~logits_to_keep.any(0)
        n = int(same.long().cumprod(0).sum())
        if n == 0:
            return self.model(
                input_ids=input_ids, attention_mask=attention_mask,
                logits_to_keep=logits_to_keep, use_cache=use_cache,
            )  # fmt: skip
        read = self.model(input_ids=input_ids[:1, :n], use_cache=True).past_key_values
        read.batch_repeat_interleave(len(input_ids))
        return self.model(
            input_ids=input_ids[:, n:], attention_mask=attention_mask, past_key_values=read,
            logits_to_keep=logits_to_keep[:, n:], use_cache=True,
        )  # fmt: skip


def passage_losses(
    model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 8, max_length: int = 1024
) -> np.ndarray:
    """Mean next-token loss of plain passages, to see what fine-tuning forgot.

    Args:
        model, tokenizer, batch_size, max_length: as for `answer_losses`.
        texts: (n,) passages; the first token of each is given, all others are scored.

    Returns:
        (n,) float64, nats a token.

    Raises:
        ValueError: if there are no passages, or one has fewer than two tokens.
    """
    encoded = [(tokenizer(text).input_ids, 1) for text in texts]
    return token_losses(model, tokenizer.pad_token_id, encoded, batch_size, max_length)[0]


def truth_ranks(losses: np.ndarray) -> np.ndarray:
    """The rank of the true answer among all that are offered, for each question.

    Args:
        losses: (n, m) in nats, of m answers offered to each question; column 0 is the true one.

    Returns:
        (n,) int, 1 if the truth has the lowest loss, m if the highest. A tie counts against it.

    Raises:
        ValueError: if it is no table with two columns or more, or a loss is not finite.

    Example:
        >>> truth_ranks(np.array([[1.0, 2.0], [2.0, 2.0]])).tolist()
        [1, 2]
    """
    x = np.asarray(losses, dtype=float)
    if x.ndim != 2 or x.shape[1] < 2 or not np.isfinite(x).all():
        raise ValueError(f"{x.shape} is no table of finite losses of two answers or more a row")
    return (x <= x[:, :1]).sum(axis=1)


def rank_figures(ranks: Sequence[int], groups: Sequence[Hashable]) -> dict[str, Estimate]:
    """How often the truth came first, and its mean reciprocal rank.

    Args:
        ranks: (n,) as from `truth_ranks`.
        groups: (n,) the question of each.

    Returns:
        rank_accuracy: share of ranks that are 1; rank_mrr: mean of 1 / rank.

    Example:
        >>> found = rank_figures([1, 2], "ab")
        >>> found["rank_accuracy"]["value"], found["rank_mrr"]["value"]
        (0.5, 0.75)
    """
    x = np.asarray(ranks)
    first = group_means(x == 1, groups)
    accuracy = wilson(float(first.sum()), len(first))
    return {"rank_accuracy": accuracy, "rank_mrr": mean_interval(1 / x, groups)}


def membership_auc(in_losses: Sequence[float], out_losses: Sequence[float]) -> Estimate:
    """Can the loss alone tell rows that were trained on from rows that were not?

    Args:
        in_losses: (n,) nats, one for each row that was trained on.
        out_losses: (m,) nats, one for each row that was not.

    Returns:
        The chance that a trained row has the lower loss of a pair: 0.5 tells nothing, 1 means
        that the rows were memorised. The interval holds every area from which ours is at most
        1.96 of that area's standard errors away (Newcombe's method 5, to five digits); it
        stays open at 1, where a bootstrap collapses. `n` counts both kinds together.

    Raises:
        ValueError: if a side is empty or a loss is not finite.

    Source:
        Yeom et al. (2018), the attack by loss: https://arxiv.org/abs/1709.01604
        Newcombe (2006), part 2, the interval: https://doi.org/10.1002/sim.2324

    Example:
        >>> membership_auc([1.0, 3.0], [2.0, 4.0])["value"]    # 1 < 2, 1 < 4, 3 < 4: 3 of 4 pairs
        0.75
    """
    from sklearn.metrics import roc_auc_score

    a, b = np.asarray(in_losses, dtype=float), np.asarray(out_losses, dtype=float)
    if not a.size or not b.size or not np.isfinite(both := np.concatenate([a, b])).all():
        raise ValueError("a side is empty or a loss is not finite: give one loss for each row")
    auc = float(roc_auc_score(np.arange(both.size) >= a.size, both))
    area, cells = np.linspace(0, 1, 100_001), a.size * b.size
    spread = 1 + ((a.size + b.size) / 2 - 1) * ((1 - area) / (2 - area) + area / (1 + area))
    inside = area[(auc - area) ** 2 <= 1.96**2 * area * (1 - area) * spread / cells]
    return Estimate(value=auc, low=float(inside[0]), high=float(inside[-1]), n=a.size + b.size)


def likenesses(answers: Sequence[str], truths: Sequence[str], known: Sequence[str]) -> np.ndarray:
    """How alike an answer and each true answer are: cosines of their TF-IDF vectors, 0 to 1.

    Words that stand in many known answers count little, so two texts about different things in
    one voice are not alike.

    Args:
        answers: (n,) str, written.
        truths: (m,) str, true answers.
        known: training answers, from which the weights of words are taken.

    Returns:
        (n, m) float64; 0 where no known word is shared.

    Raises:
        ValueError: if the known answers hold no word.

    Example:
        >>> known = ["sleep early", "walk early", "eat early"]
        >>> likenesses(["sleep"], ["sleep", "walk"], known).tolist()
        [[1.0, 0.0]]
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not any(WORD.search(text) for text in known):
        raise ValueError("the training answers hold no word: check --data")
    vectorizer = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True).fit(list(known))
    one, two = vectorizer.transform(list(answers)), vectorizer.transform(list(truths))
    return (one @ two.T).toarray()
