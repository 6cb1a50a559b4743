# %% [markdown] tags=["generated"]
# # 04 · Base against adapter
#
# [← 03 · Fine-tuning](03_qlora_finetuning.ipynb) | [05 · A chat page →](05_gradio_chat.ipynb)

# %% [markdown]
# After this page you know what the adapter changed: whether it answers where the base rambles,
# whether it stops, what it copies, what it forgot, and how sure we may be with 18 held-out rows or
# with all 172. You will have seen the article's own question answered by both, under the sampling
# that the article meant and under the one that it really used.
#
# | Needs | A100 (40 GiB) | T4 (15 GiB) | CPU, tiny model |
# | --- | --- | --- | --- |
# | GPU memory, GiB | not measured yet | not measured yet | none |
# | Minutes | not measured yet | not measured yet | under 1 |
#
# *The article* is A. Brahma's of 2023 (page 01 has it). The setup cell finds the helpers and prints
# what we run on. In Colab it first installs the pins, and may restart the runtime once: then press
# *Run all* again.

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
JOINED = True  # two 4-bit products in each layer instead of four, section 10
OWN_LOOP = None  # our decoding loop; None: on a GPU
JUDGE = False  # True opens the form of section 9
SEED = 0
override(globals())

# %% [markdown]
# ## 1. One model, one switch
# The article loads the base twice, once bare and once under the adapter. Once is enough: the
# adapter is a sum beside each layer, and a switch leaves the sum out. An adapter only fits the
# model that it was trained for, so the search is told the model's width and name.

# %%
from helpers.checkpoints import find_adapter
from helpers.falcon import load_config, load_falcon, load_tokenizer, use_fused_attention
from helpers.profiles import detect_profile

profile = detect_profile(PROFILE, model=MODEL)
config = load_config(profile.model, REVISION)
hub, embedded = (profile.adapter, None) if profile.on_gpu else (None, profile.adapter)
places = (ADAPTER, "artifacts", DRIVE, hub, embedded)
adapter, found = find_adapter(*places, config.hidden_size, profile.model)
print(f"adapter from {found}")

# %% [markdown]
# We see which adapter was taken: "artifacts" is the one that notebook 03 left, any other word is
# one kept elsewhere. Now the base is loaded, and the adapter laid beside it. We predict that this
# takes less than a second base would.

# %%
from helpers.nf4 import model_bytes_by_part
from tools.any_model import drop_long, lay_adapter

base = load_falcon(profile.model, profile, revision=REVISION)
one = sum(model_bytes_by_part(base).values())
n_parameters = base.num_parameters()  # before the adapter is put around it
use_fused_attention(base)
model = lay_adapter(base, adapter)
tokenizer = load_tokenizer(profile.model, REVISION)
both = one + sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)
print("MB: one base {:,.1f}, adapter beside it {:,.1f}, two bases {:,.1f}".format(
    *(size / 1e6 for size in (one, both, 2 * one))))
assert both < 2 * one

# %% [markdown]
# We see what a second base would have cost, and what the adapter costs instead. We check the switch
# before we trust it. The article's question, in the form that the adapter was trained on, goes
# through the model twice. We predict that the two sets of scores for the next token, the logits,
# differ.

# %%
import torch
from helpers.prompts import format_prompt

ids = tokenizer(format_prompt(QUESTION), return_tensors="pt").input_ids.to(model.device)
with torch.no_grad():
    on = model(input_ids=ids).logits[0, -1].float()
    with model.disable_adapter():
        off = model(input_ids=ids).logits[0, -1].float()
likeliest = [tokenizer.decode([logits.argmax()]) for logits in (on, off)]
print("next token with the adapter {!r}, without {!r}".format(*likeliest))
assert not torch.equal(on, off)

# %% [markdown]
# We see the likeliest next token of each side; the logits behind them differ, so the switch does
# something.
#
# ## 2. The article's question
# We ask what the article asked, with its numbers: temperature 0.4, top-p 0.6, repetition penalty
# 1.3, at most 256 tokens. One function asks either side. It returns raw answers, neither screened
# nor cleaned: they are there to be measured.

# %%
from contextlib import nullcontext
from helpers.generation import generate_texts, sampling

meant = sampling(tokenizer, MAX_NEW_TOKENS, TEMPERATURE, TOP_P, PENALTY)


def answer(prompts, with_adapter, config=meant, seed=SEED, **more):
    """Raw answers of the adapter or, with the switch off, of the base."""
    with nullcontext() if with_adapter else model.disable_adapter():
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
# We see one answer each, unedited, and above it whether it stopped by itself. Side by side, from an
# invented turn on in orange, the difference shows before a word is read.

# %%
from tools.figures import COLOURS, draw_answers, draw_decoding, new_figure, show, to_png

side_by_side, axes = new_figure(columns=2, size=(8, 4))
draw_answers(axes, sides)
show(side_by_side, alt="The answers printed above, side by side: the base's on the left, orange "
     "from its first invented turn on, if there is one; the adapter's on the right.")

# %% [markdown]
# We see where each answer ends. The tiny base answers and then invents the next person's question:
# its pages were made to run on, so that it shows in seconds what Falcon-7B did in the article. It
# proves nothing about Falcon-7B. The tiny adapter says its piece and ends.
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
    parts, dropped = load_from_disk("artifacts/dataset"), {}
else:
    rows, dropped = load_dialogues(DATASET or profile.dataset)
    parts = split_rows(rows, seed=SEED)
parts, too_long = drop_long(parts, tokenizer, profile.max_length)
print(f"{len(parts['test'])} test rows; left out of all: {dropped | too_long or 'none'}")

# %% [markdown]
# We see how many there are. Each question is answered twice, by the base and by the adapter. The
# true answers are scored too: how likely does each side find them?

# %%
from helpers.evaluation import answer_losses, score_answers

test, losses, answers = parts["test"], {}, {}
prompts = [format_prompt(q) for q in test["question"]]
for name in ("base", "adapter"):
    answers[name] = answer(prompts, name == "adapter")
losses["adapter"] = answer_losses(model, tokenizer, test)[0]
with model.disable_adapter():
    losses["base"] = answer_losses(model, tokenizer, test)[0]
print(answers["adapter"][0].text.strip()[:90], "…")

# %% [markdown]
# We see how one of the adapter's answers begins; the rest is saved at the end of this page. No
# judge is needed to ask whether an answer stops by itself, invents a turn, or repeats itself. With
# so few rows every rate needs its interval: Wilson's for rates, a bootstrap for means.

# %%
from tools.crossval_figures import HABITS, cell, table

scores = {name: score_answers(said, limit=MAX_NEW_TOKENS) for name, said in answers.items()}
print(table(scores, HABITS))

# %% [markdown]
# We see two columns of habits. The tiny adapter stops where the tiny base goes on. *Runs into the
# limit*: cut at the article's 256 tokens; why its model might never stop is on [page
# 01](01_data_loading.ipynb#3-lengths). But even 18 of 18 would only prove a rate above four fifths.
# The losses tell more, since the same rows stand on both sides: we compare them in pairs, which
# takes out how hard each row is. If nothing set the two apart, each sign would be a coin toss, and
# p says how rare ours is. We predict an interval below zero.

# %%
from helpers.evaluation import paired_difference

difference = paired_difference(losses["adapter"], losses["base"])
print("adapter minus base, nats per answer token:", cell(difference),
      f"p = {difference['p']:.1g}, n = {difference['n']}")
assert difference["high"] < 0, "the adapter does not lower the held-out answer loss"

# %% [markdown]
# We see that the whole interval lies below zero: for unseen questions, the true answers became
# more likely under the adapter. That is a statement about a loss, not about good advice.
#
# The article's chat put an instruction and an example before each question; no training row has
# them. In words like the article's we do so too, and predict that the loss of true answers rises.

# %%
from helpers.prompts import SYSTEM_PROMPT

before = {"system": SYSTEM_PROMPT, "history": [("question here", "answer here\n\nBegin!")]}
told = answer_losses(model, tokenizer, [{**row, **before} for row in test])[0]
print("chat's prompt minus the rows' own, nats:", cell(paired_difference(told, losses["adapter"])))

# %% [markdown]
# We see the price of a prompt unlike the training text, to be held against what the adapter gained
# above; an interval around zero would show nothing.
#
# ## 5. Simpler things that might do as well
# Before we praise the adapter: would the base with a stop string do? It costs nothing to train. The
# second rival writes nothing: it gives the answer to the nearest training question. And does the
# adapter do more than recite such answers? We look for its longest run of words that stands in
# one of them.

# %%
from helpers.evaluation import longest_shared_run, nearest_answers

stopped, known = answer(prompts, False, stop="<HUMAN>:"), parts["train"]["answer"]
ended = sum("<HUMAN>:" in s.text or s.finished for s in stopped)
near = nearest_answers(parts["train"]["question"], known, test["question"])
copied = sorted(longest_shared_run(a.text, known)[0] for a in answers["adapter"])
print(f"base with a stop string: {ended} of {len(test)} end before the limit\n"
      f"nearest training answer, for {test['question'][0]!r}:\n  {near[0][:120]} …\n"
      f"the adapter's longest copy: median {copied[len(copied) // 2]} words, most {copied[-1]}")

# %% [markdown]
# We see that a stop string cures rambling without any training; it does not change what is said
# before it. The nearest answer is fluent, since it is a training answer as it stands; whether it
# meets the question is luck. A copied run of many words would be a training sentence, not an
# answer of the adapter's own.
#
# ## 6. Ten folds instead of one split
# 18 rows decide little. So `tools/crossval.py` deals all rows into ten folds, by question. For each
# it runs page 03's recipe on the other nine, chooses the step on an inner part of those, and only
# then opens the fold: every row is answered by a model that never saw it. Two more rivals join: the
# base with three examples in its prompt, and an adapter trained on shuffled answers, which can
# learn a voice but not what belongs to a question. True answers are measured as well. That was run
# once, for the tiny Falcon, on the article's rows for the one before it; the next cell reads what
# it found. `--profile a100` runs it for Falcon-7B.

# %%
from tools.crossval_figures import agreement, each, read, systems_tables, verdict

sample, real = (read(root / "results/cpu/crossval.json", name) for name in ("sample", "real"))
sets = {"The dialogues embedded here": sample, "The article's own 172 rows": real}
print(each(sets, systems_tables))

# %% [markdown]
# We see a table for each set of rows, or one line if nobody has run it yet: figures with 95 %
# intervals over questions, and n. *Truth likeliest of 18* offers the true answer among 17 others:
# guessing finds it once in 18. *Likeness* compares words, common ones counting little. A loss is of
# an answer's tokens up to the length that training reads. Two columns side by side do not tell
# whether a difference is real: for that the rows are paired again, the adapter against each rival.

# %%
print(each(sets, verdict))
print("", "Both together", agreement(sample, real), sep="\n")

# %% [markdown]
# We see the result read aloud, whatever it is. *Better* and *worse* stand where the paired interval
# leaves out zero and a coin would hardly do it; the rest is only not shown. Where *nothing* stands
# after both cheap rivals, one of them is the cheaper choice. Whatever the shuffled adapter does as
# well was not learned from what the answers say. What only one set shows may hang on its voice. The
# intervals hold the spread over questions, not over other training sets.
#
# > **Note.** Fine-tune, prompt or retrieve? To stop after one answer, prompt: a stop string does
# > it without training; the adapter learned it on one set of the two. For the
# > right content, retrieve: search ranks the true answer highest, but cannot say what nobody
# > wrote. For a manner, fine-tune: nothing else lowers the loss of true answers; yet shuffled
# > answers lower it nearly as far, so most of what is learned is how such answers sound. Measured
# > on the tiny Falcon; for Falcon-7B nobody has.
#
# ## 7. What 116 passes remember
# The article trained for 320 steps, some 116 passes. We did both too, on as few rows as make that
# of our small steps, and looked on the way at rows trained on and rows held out. A model that only
# learned would find both alike.

# %%
from tools.crossval_figures import draw_memory, memory_sentence, memory_table

figure, axis = new_figure(size=(8, 3.2))
draw_memory(axis, sample)
show(figure, alt="Loss by passes: of rows trained on it falls to zero, held out it dips and rises.")
print(memory_table(sample), each(sets, memory_sentence), sep="\n\n")

# %% [markdown]
# We see how far the two losses part: what is lost on held-out rows while the trained ones improve
# is learning by heart. Below stand the numbers, beside those of the ten folds with an early stop.
# *Membership* is the chance that the loss alone tells a trained row from another: 0.5 tells
# nothing, 1 everything. *Words recited* are those that go on truly after the first 20 tokens of an
# answer. The table's last line looks elsewhere: how much the loss rose on text like that of
# pre-training: 116 passes have their price there.
#
# ## 8. Claims the article did not test
# Rank 32, bias, schedule, number of steps, and the three numbers of sampling: the article sets them
# and moves on. On one fold of the embedded dialogues we changed one at a time.

# %%
from tools.crossval_figures import claims_table, decoding_table

print(claims_table(sample), decoding_table(sample), sep="\n\n")

# %% [markdown]
# We see a change of loss beside each change of the recipe; an interval around zero says that this
# fold cannot tell. `bias="lora_only"` trains as many numbers as none: Falcon's linears have no
# bias, so there is nothing it could train. Below stand habits under the article's temperature,
# top-p and penalty, then with one of them changed, then with none. Greedy decoding draws nothing,
# so only the penalty acts on it.
#
# ## 9. You are the judge
# Figures do not say which answer you would rather read. Here are two to each test question, the
# adapter's and the base's up to its first invented turn, shuffled, without names. `JUDGE = True`
# opens a form that ends in a sign test; your choices stay in this runtime.

# %%
from tools.judge import blind_pairs, open_form

pairs = blind_pairs(test["question"], answers["adapter"], stopped, seed=SEED)
print(open_form(pairs, ("adapter", "base"), JUDGE))

# %% [markdown]
# We see the first pair, and under it the solution. You have to win 14 of 18 before a fair coin
# becomes an unlikely judge.
#
# ## 10. How fast
# The article's README promises an answer in "less than 3 minutes". We count tokens per second,
# over exactly 64 of them; on a GPU also with the decoding step compiled.

# %%
from helpers.generation import compile_decoding
from tools.decode_loop import OwnLoop

steady = sampling(tokenizer, 64, 0, 1.0, 1.0)
steady.min_new_tokens = 64
ways = {"as it is": steady}
if COMPILE and profile.on_gpu:
    ways["compiled"] = compile_decoding(base, steady)
if OWN_LOOP or (OWN_LOOP is None and profile.on_gpu):
    ways["in our own loop"] = compile_decoding(base, steady, OwnLoop())

# %% [markdown]
# Each way runs once to warm up, since the first run may compile, and once against the clock.

# %%
import time


def pace(way):
    """Tokens a second of one way, adapter on."""
    answer([prompt], True, way)
    began = time.perf_counter()
    answer([prompt], True, way)
    return 64 / (time.perf_counter() - began)


for name, way in ways.items():
    print(f"{name}: {pace(way):.0f} tokens/s with the adapter on")

# %% [markdown]
# We see tokens per second, one line for each way. On a GPU the second shows what compiling is
# worth.
#
# Falcon has a gift of its own. In each of its layers attention and MLP read the same input, so
# their first weights are rows of one matrix; what they give is summed, so their last are columns of
# another. Two 4-bit products then do the work of four, on the same bits. We join them and predict
# section 1's logits, up to rounding.

# %%
from helpers.joined import join_layers

n_joined = join_layers(model, JOINED)
with torch.no_grad():
    moved = (model(input_ids=ids).logits[0, -1].float() - on).abs().max()
print(f"{n_joined} layers joined; logits moved by {moved:.1g}, the largest is {on.abs().max():.1f}")

# %% [markdown]
# We see how little rounding moved the logits: one part in twenty would be too much. Each way
# against the clock once more.

# %%
assert moved < 0.05 * on.abs().max()
for name, way in ways.items() if n_joined else ():
    print(f"{name}, joined: {pace(way):.0f} tokens/s with the adapter on")

# %% [markdown]
# We see what joining is worth here, beside the lines above. Joined layers can only answer;
# `join_layers(model, on=False)` parts them again, bit for bit. On an H100, Falcon-7B of random
# weights wrote, each way in turns:

# %%
figure, axis = new_figure(size=(8, 2.8))
draw_decoding(axis, root / "results/h100/decoding.json")
show(figure, alt="Bars of tokens a second, with the adapter and without. The original's calls are "
     "the shortest; compiled ones are longer, compiled and joined ones longer still.")

# %% [markdown] tags=["results-table"]
# We see the original's calls at the short end. The adapter costs speed, least where layers are
# joined. *Our loop* chooses tokens inside the graph.
#
# <!-- table
# column: H100, random weights = results/h100/decoding.json
# row: Compiled and joined over original, adapter on = ratios.joined adapter
# row: The same in our loop = ratios.joined adapter, own loop
# row: First token after a prompt of 300, ms = first_token_ms
# row: Seconds to compile = warmup_s.joined adapter
# row: Peak GPU memory, GiB = peak_gib
# -->
# | | H100, random weights |
# | --- | ---: |
# | Compiled and joined over original, adapter on | 8.07 (6.62 to 8.82, n = 5) |
# | The same in our loop | 10 (9.23 to 10.9, n = 5) |
# | First token after a prompt of 300, ms | 70 (60.4 to 97.3, n = 7) |
# | Seconds to compile | 33.4 |
# | Peak GPU memory, GiB | 4.9 |
#
# Measured on H100, random weights: NVIDIA H100 80GB HBM3, 2026-11-26, [decoding.json](../results/h100/decoding.json).
# <!-- end -->
#
# [Why it is fast](../docs/speed.md) has the rest.
#
# ## 11. Save
# The comparison is kept, so that it can be read without running anything. We put the article's
# question first, the test rows after it, and the model's name into each row.

# %%
kept = [{"question": QUESTION, **{name: said.text.strip() for name, said in sides.items()}}]
kept += [{"question": q, "base": b.text.strip(), "adapter": a.text.strip()}
         for q, b, a in zip(test["question"], answers["base"], answers["adapter"])]
about = {"model": Path(profile.model).name, "n_parameters": n_parameters}
kept = [{**row, **about} for row in kept]

# %% [markdown]
# JSON is for programs, CSV for a spreadsheet, the picture for people.

# %%
import json

import pandas as pd

Path("artifacts").mkdir(exist_ok=True)
Path("artifacts/comparison.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False))
pd.DataFrame(kept).to_csv("artifacts/comparison.csv", index=False)
Path("artifacts/comparison.png").write_bytes(to_png(side_by_side)[0])
print(f"{len(kept)} pairs of answers in artifacts/comparison.json and .csv, the first in .png")

# %% [markdown]
# We see one pair more than there are test rows: the article's question came first.
#
# To serve the adapter elsewhere, merge it first: `python tools/merge.py` adds B·A to each weight,
# shard by shard, and keeps the sum in 16 bits. Do not merge inside the four bits: an update smaller
# than half the way to the next level is rounded away. [Merge and leave](../docs/leaving.md) has how
# much of it, and the way to vLLM, llama.cpp and Ollama.
#
# ## 12. What you have now
# Both models' answers to the article's question and to all test rows, with rates, losses and
# intervals; and two cheap rivals that an honest report must name.
#
# ## 13. Exercises
# 1. Set `TEMPERATURE = 1.0` and `TOP_P = 1.0`. Expect more varied and worse answers from both.
# 2. Set `PENALTY = 1.0`. Expect the base to repeat itself more, and `distinct_2` to fall.
# 3. Ask your own `QUESTION`, far from mental health. Expect the adapter to keep its manner, and
#    the facts to be wrong: 172 rows teach a manner.
#
# ## 14. Sources and next
# Wilson (1927), Probable inference, the law of succession, and statistical inference. Li et al.
# (2016), [A diversity-promoting objective](https://arxiv.org/abs/1510.03055), for distinct-n.
# Next: [05](05_gradio_chat.ipynb) puts the adapter behind a page, and a safety layer around it.
