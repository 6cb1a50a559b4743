# %% [markdown] tags=["generated"]
# # 04 · Base against adapter
#
# [← 03 · Fine-tuning](03_qlora_finetuning.ipynb) | [05 · A chat page →](05_gradio_chat.ipynb)

# %% [markdown]
# After this page you know what the adapter changed: whether it answers where the base rambles,
# whether it stops, what it copies, and how sure we may be with 18 held-out rows. You will have seen
# the article's own question answered by both, under the sampling that the article meant and under
# the one that it really used.
#
# | Needs | A100 (40 GiB) | T4 (15 GiB) | CPU, tiny model |
# | --- | --- | --- | --- |
# | GPU memory, GiB | not measured yet | not measured yet | none |
# | Minutes | not measured yet | not measured yet | about 1 |
#
# The setup cell finds the helpers and prints what we run on.

# %% tags=["setup"]
import subprocess, sys
from pathlib import Path

url = "https://github.com/OWNER/falcon-qlora-notebooks"
here = Path(globals().get("__file__", "notebook")).resolve()
root = next((p for p in here.parents if (p / "requirements.txt").exists()), Path("falcon-qlora"))
if not root.exists():  # the notebook alone was opened, as in Colab: fetch the rest
    subprocess.check_call(["git", "clone", "--depth=1", url, root])
sys.path.insert(0, str(root := root.resolve()))
from tools.colab_setup import override, prepare

print(prepare(root))  # in Colab it installs the pins; everywhere it says what we run on

# %% [markdown]
# Everything we may want to change stands in the next cell and nowhere else.

# %% tags=["parameters"]
PROFILE = "auto"  # "a100", "t4" or "cpu"; auto looks at the GPU
MODEL, REVISION = None, None  # a Hub id or a folder; a commit or branch on the Hub
DATASET = None  # only used if notebook 01 left nothing in artifacts/dataset
ADAPTER = None  # None: artifacts/adapter, then DRIVE, the Hub, the embedded one
DRIVE = None
QUESTION = "How can I prevent anxiety and depression?"  # the article's
TEMPERATURE, TOP_P, PENALTY, MAX_NEW_TOKENS = 0.4, 0.6, 1.3, 256  # the article's
COMPILE = True  # on a GPU: one decoding step as one CUDA graph
SEED = 0
override(globals())

# %% [markdown]
# ## 1. One model, one switch
# The article loads the base twice, once bare and once under the adapter. Once is enough: the
# adapter is a sum beside each layer, and a switch leaves the sum out. The profile names the model.

# %%
from helpers.falcon import load_config, load_falcon, load_tokenizer, use_fused_attention
from helpers.profiles import detect_profile

profile = detect_profile(PROFILE, model=MODEL)
config = load_config(profile.model, REVISION)

# %% [markdown]
# An adapter only fits the model that it was trained for, so the search is told the model's width
# and name.

# %%
from helpers.checkpoints import find_adapter

hub, embedded = (profile.adapter, None) if profile.on_gpu else (None, profile.adapter)
places = (ADAPTER, "artifacts", DRIVE, hub, embedded)
adapter, found = find_adapter(*places, config.hidden_size, profile.model)
print(f"adapter from {found}")

# %% [markdown]
# We see which adapter was taken: "artifacts" is the one that notebook 03 left, any other word is
# one kept elsewhere. Now the base is loaded, and the adapter laid beside it.

# %%
from peft import PeftModel

base = load_falcon(profile.model, profile, revision=REVISION)
n_parameters = base.num_parameters()  # before the adapter is put around it
use_fused_attention(base)
model = PeftModel.from_pretrained(base, adapter).eval()
tokenizer = load_tokenizer(profile.model, REVISION)

# %% [markdown]
# We check the switch before we trust it. The article's question, in the form that the adapter was
# trained on, goes through the model twice.

# %%
import torch
from helpers.prompts import format_prompt

ids = tokenizer(format_prompt(QUESTION), return_tensors="pt").input_ids.to(model.device)
with torch.no_grad():
    on = model(input_ids=ids).logits[0, -1].float()
    with model.disable_adapter():
        off = model(input_ids=ids).logits[0, -1].float()

# %% [markdown]
# We predict that the two sets of scores for the next token, the logits, differ.

# %%
likeliest = [tokenizer.decode([logits.argmax()]) for logits in (on, off)]
print("next token with the adapter {!r}, without {!r}".format(*likeliest))
assert not torch.equal(on, off)

# %% [markdown]
# We see the likeliest next token of each side; the logits behind them differ, so the switch does
# something. Both sides of every comparison below are one set of weights in memory.
#
# ## 2. The article's question
# We ask what the article asked, with its numbers: temperature 0.4, top-p 0.6, repetition penalty
# 1.3, at most 256 tokens.

# %%
from helpers.generation import generate_texts, sampling

meant = sampling(tokenizer, MAX_NEW_TOKENS, TEMPERATURE, TOP_P, PENALTY)


# %% [markdown]
# One function asks either side. It returns raw answers, neither screened nor cleaned: they are
# there to be measured.

# %%
def answer(prompts, with_adapter, config=meant, seed=SEED, **more):
    """Raw answers of the adapter or, with the switch off, of the base."""
    if with_adapter:
        return generate_texts(model, tokenizer, prompts, config, seed, **more)
    with model.disable_adapter():
        return generate_texts(model, tokenizer, prompts, config, seed, **more)


# %% [markdown]
# We predict that the base, which has only read pages, goes on past its answer, and that the
# adapter stops.

# %%
prompt = format_prompt(QUESTION)
sides = {name: answer([prompt], name == "adapter")[0] for name in ("base", "adapter")}
for name, said in sides.items():
    print(f"--- {name}: {said.n_tokens} tokens, stopped by itself: {said.finished}")
    print(f"{said.text.strip()}\n")

# %% [markdown]
# We see one answer each, unedited, and above it whether it stopped by itself. The tiny base
# answers and then invents the next person's question: its pages were made to run on, so that it
# shows in seconds what Falcon-7B did in the article. What it says proves nothing about Falcon-7B.
# The tiny adapter says its piece and ends.
#
# > **Note.** No answer on this page is advice. If you need help, please reach a person: your
# > local emergency number, or [findahelpline.com](https://findahelpline.com).
#
# ## 3. Greedy by accident
# The article set temperature and top-p but not `do_sample=True`, and put the attention mask
# where it is not read. Without that word nothing is drawn, so there is nothing for temperature
# and top-p to shape. We decode without it.

# %%
from transformers import GenerationConfig

ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
common = {"max_new_tokens": 40, "repetition_penalty": PENALTY, **ends}
greedy = answer([prompt], True, GenerationConfig(**common))[0].text

# %% [markdown]
# If that is greedy decoding, the seed cannot matter. We predict one answer from three seeds
# without the word, and more than one with it.

# %%
seeds = [answer([prompt], True, meant, seed=s)[0].text[:60] for s in range(3)]
again = [answer([prompt], True, GenerationConfig(**common), seed=s)[0].text for s in range(3)]
print(f"without do_sample: {len(set(again))} different answer in 3; with it: {len(set(seeds))}")
assert set(again) == {greedy}

# %% [markdown]
# We see 1 without the word: three seeds, one answer, the greedy one. The second number counts the
# different openings that drawing gave. Temperature and top-p are about *how* a draw is made, so
# we take one real distribution, that of the adapter's next token, and apply both to it.

# %%
top = on.topk(12)
words = [tokenizer.decode([i]).strip() or "␣" for i in top.indices.tolist()]
plain, cooled = on.softmax(0)[top.indices], (on / TEMPERATURE).softmax(0)[top.indices]
kept = cooled * (cooled.cumsum(0) - cooled < TOP_P)
steps = {"as it is": plain, f"temperature {TEMPERATURE}": cooled}
steps[f"and top-p {TOP_P}"] = kept / kept.sum()

# %% [markdown]
# Drawn side by side, the three steps show what each number does to the twelve likeliest tokens.

# %%
from tools.figures import COLOURS, new_figure, show

figure, axis = new_figure(size=(8, 3.2))
for k, (label, p) in enumerate(steps.items()):
    at = [i + (k - 1) * 0.27 for i in range(12)]
    axis.bar(at, p.tolist(), 0.27, label=label, color=COLOURS[[2, 1, 5][k]])
axis.set_xticks(range(12), words, rotation=30, ha="right")
axis.set(xlabel="next token", ylabel="probability")
axis.legend()
show(figure, alt="Bars for the twelve likeliest next tokens: the model's own probabilities, those "
     "at temperature 0.4, which are steeper, and those left by top-p 0.6, only the likeliest.")

# %% [markdown]
# We see the bars on the left grow: a temperature below 1 makes the likely likelier. Top-p then
# drops the tail: little is left to draw from, perhaps a single token.
#
# ## 4. The test rows
# One answer proves nothing. Notebook 01 set 18 rows aside for this section: notebook 03 trains on
# other rows and watches yet others.

# %%
from pathlib import Path

from datasets import load_from_disk
from helpers.dialogues import load_dialogues, split_rows

if Path("artifacts/dataset").exists() and DATASET is None:
    parts = load_from_disk("artifacts/dataset")
else:
    parts = split_rows(load_dialogues(DATASET or profile.dataset)[0], seed=SEED)

# %% [markdown]
# Each question is now answered twice, by the base and by the adapter.

# %%
test = parts["test"]
prompts = [format_prompt(q) for q in test["question"]]
answers = {name: answer(prompts, name == "adapter") for name in ("base", "adapter")}
first = answers["adapter"][0].text.strip()
print(f"{len(test)} questions answered twice; the adapter's first: {first[:70]} …")

# %% [markdown]
# We see how one of the adapter's answers begins; the rest is saved at the end of this page. The
# true answers are scored too: how likely does each side find them?

# %%
from helpers.evaluation import answer_losses

losses = {"adapter": answer_losses(model, tokenizer, test)}
with model.disable_adapter():
    losses["base"] = answer_losses(model, tokenizer, test)

# %% [markdown]
# The written answers need no judge either: does one stop by itself, does it invent a turn, does
# it repeat itself? With so few rows every rate needs its interval.

# %%
import pandas as pd
from helpers.evaluation import paired_difference, score_answers, wilson

scores = {name: score_answers(said, limit=MAX_NEW_TOKENS) for name, said in answers.items()}
shown = {name: {k: f"{e['value']:.2f} [{e['low']:.2f}, {e['high']:.2f}]" for k, e in s.items()}
         for name, s in scores.items()}
print(pd.DataFrame(shown).to_string(), f"\nn = {len(test)} questions in every row")

# %% [markdown]
# We see two columns of habits. `eos_rate` is the share that stopped by itself, `turn_leak_rate`
# the share that invented a turn, `limit_rate` the share that ran into the token limit. The tiny
# adapter stops where the tiny base goes on. How sure is a rate of 18 rows? Wilson's interval
# holds for small n.

# %%
print(f"18 of 18 would be {wilson(18, 18)['value']:.2f} [{wilson(18, 18)['low']:.2f}, 1.00]")

# %% [markdown]
# We see that even 18 of 18 only proves a rate above four fifths. Now the loss on the true
# answers, first over all tokens of the test rows.

# %%
for name, (per_row, tokens) in losses.items():
    print(f"{name:8} {(per_row * tokens).sum() / tokens.sum():.3f} nats per answer token")

# %% [markdown]
# We see the adapter's loss below the base's. The same rows stand on both sides, so we compare
# them in pairs, which takes out how hard each row is. We predict an interval below zero.

# %%
difference = paired_difference(losses["adapter"][0], losses["base"][0])
interval = f"[{difference['low']:.3f}, {difference['high']:.3f}]"
print(f"adapter minus base, per row: {difference['value']:.3f} {interval}, "
      f"p = {difference['p']:.1g}, n = {difference['n']}")
assert difference["high"] < 0, "the adapter does not lower the held-out answer loss"

# %% [markdown]
# We see that the whole interval lies below zero: for unseen questions, the true answers became
# more likely under the adapter. That is a statement about a loss, not about good advice. Is it
# one lucky row? We draw them all.

# %%
figure, axis = new_figure(size=(8, 3.2))
rank = losses["base"][0].argsort()
low, high = losses["adapter"][0][rank], losses["base"][0][rank]
axis.plot(high, "o", color=COLOURS[6], label="base")
axis.plot(low, "o", color=COLOURS[5], label="adapter")
axis.vlines(range(len(rank)), low, high, color="#BBBBBB")
axis.set(xlabel="test question, sorted by the base's loss", ylabel="nats per answer token")
axis.set_ylim(0, None)
axis.legend()
show(figure, alt="For each test question two dots, the loss of its true answer under the base and "
     "under the adapter, joined by a line. The adapter's dot lies below the base's for nearly all.")

# %% [markdown]
# We see lines that go down from base to adapter: the gain is not the work of one lucky row.
#
# ## 5. Simpler things that might do as well
# Before we praise the adapter: would the base with a stop string do? It costs nothing to train.

# %%
stopped = answer(prompts, False, stop="<HUMAN>:")
ended = sum("<HUMAN>:" in s.text or s.finished for s in stopped)
print(f"base with a stop string: {ended} of {len(test)} end before the limit")

# %% [markdown]
# We see how many answers of the base end once a stop string is set: it cures rambling without any
# training, and does not change what is said before it. The second rival writes nothing: it gives
# the answer to the nearest training question.

# %%
from helpers.evaluation import longest_shared_run, nearest_answers

known = parts["train"]["answer"]
near = nearest_answers(parts["train"]["question"], known, test["question"])
print(f"nearest training answer, for {test['question'][0]!r}:\n  {near[0][:160]} …")

# %% [markdown]
# We see a fluent text, since it is a training answer as it stands; whether it meets the question
# is luck. Does the adapter do more than recite such answers? We look for its longest runs of
# words that stand in one of them.

# %%
copied = [longest_shared_run(a.text, known)[0] for a in answers["adapter"]]
median = sorted(copied)[len(copied) // 2]
print("the adapter's longest run of words copied from a training answer: "
      f"median {median}, longest {max(copied)}")

# %% [markdown]
# We see the median over the test rows and the longest run of all: a run of many words is a
# training sentence, not an answer of its own. Folds, seeds and all baselines together need longer
# than a page; `make results` runs them.
#
# ## 6. How fast
# The article's README promises an answer in "less than 3 minutes". We count tokens per second,
# over exactly 64 of them; on a GPU also with the decoding step compiled.

# %%
from helpers.generation import compile_decoding

steady = sampling(tokenizer, 64, 0, 1.0, 1.0)
steady.min_new_tokens = 64
ways = {"as it is": steady}
if COMPILE and profile.on_gpu:
    ways["compiled"] = compile_decoding(base, steady)

# %% [markdown]
# Each way runs once to warm up, since the first run may compile, and once against the clock.

# %%
import time

for name, way in ways.items():
    answer([prompt], True, way)
    began = time.perf_counter()
    answer([prompt], True, way)
    print(f"{name}: {64 / (time.perf_counter() - began):.0f} tokens/s with the adapter on")

# %% [markdown]
# We see tokens per second, one line for each way. On a GPU the second line shows what compiling
# is worth; a laptop has only the first, and needs no more for a model this small. For Falcon-7B no
# speed of decoding has been measured for this project yet.
#
# ## 7. Save
# The comparison is kept, so that it can be read without running anything. We put the article's
# question first, the test rows after it, and the model's name into each row.

# %%
kept = [{"question": QUESTION, **{name: said.text.strip() for name, said in sides.items()}}]
kept += [{"question": q, "base": b.text.strip(), "adapter": a.text.strip()}
         for q, b, a in zip(test["question"], answers["base"], answers["adapter"])]
about = {"model": Path(profile.model).name, "n_parameters": n_parameters}
kept = [{**row, **about} for row in kept]

# %% [markdown]
# JSON is for programs, CSV for a spreadsheet.

# %%
import json

Path("artifacts").mkdir(exist_ok=True)
Path("artifacts/comparison.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False))
pd.DataFrame(kept).to_csv("artifacts/comparison.csv", index=False)
print(f"{len(kept)} pairs of answers in artifacts/comparison.json and .csv")

# %% [markdown]
# We see one pair more than there are test rows: the article's question came first.
#
# ## 8. What you have now
# Both models' answers to the article's question and to all test rows, with rates, losses and
# intervals; and two cheap rivals that an honest report must name.
#
# ## 9. Exercises
# 1. Set `TEMPERATURE = 1.0` and `TOP_P = 1.0`. Expect more varied and worse answers from both.
# 2. Set `PENALTY = 1.0`. Expect the base to repeat itself more, and `distinct_2` to fall.
# 3. Ask your own `QUESTION`, far from mental health. Expect the adapter to keep its manner, and
#    the facts to be wrong: 172 rows teach a manner.
#
# ## 10. Sources and next
# Wilson (1927), Probable inference, the law of succession, and statistical inference. Li et al.
# (2016), [A diversity-promoting objective](https://arxiv.org/abs/1510.03055), for distinct-n.
# Next: [05](05_gradio_chat.ipynb) puts the adapter behind a page, and a safety layer around it.
