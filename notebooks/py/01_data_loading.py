# %% [markdown] tags=["generated"]
# # 01 · Dialogues
#
# [02 · Four bits per weight →](02_nf4_quantization.ipynb)

# %% [markdown]
# After this page you know what 172 question-and-answer rows look like to a language model:
# how long they are in tokens, what padding costs, on which tokens the loss will fall, and how
# many times the article's recipe reads each of them. You will have three parts on disk, one to
# train on, one to watch and one that nobody opens before notebook 04.
#
# *The article* is A. Brahma's of 2023 (section 11). It was among the first to show QLoRA on
# Falcon-7B in the open. We keep its recipe and its values, and say where we found otherwise.
#
# | Needs | A100 (40 GiB) | T4 (15 GiB) | CPU, tiny model |
# | --- | --- | --- | --- |
# | GPU memory, GiB | none | none | none |
# | Minutes | not measured yet | not measured yet | under 1 |
#
# The setup cell finds the helpers and prints what we run on. In Colab it first installs the pins,
# and may restart the runtime once: then press *Run all* again.

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
# We see versions, whether there is a GPU, and the number format that this machine computes in.
# Everything we may want to change stands in the next cell and nowhere else.

# %% tags=["parameters"]
PROFILE = "auto"  # "a100", "t4" or "cpu"; auto looks at the GPU
MODEL = None  # None: the profile's own; only its tokenizer is used here
REVISION = None  # a commit or branch of the model on the Hub
DATASET = None  # None: the profile's own; else a Hub id, .csv, .jsonl or .parquet
DATASET_REVISION = None  # a commit or branch of the data set on the Hub
SEED = 0  # which rows go to which part, and their order in training
override(globals())

# %% [markdown]
# ## 1. Rows
# The article's data set has one column, `text`, with question and answer in it. Other sets
# spread them over two columns or a list of messages. `load_dialogues` takes all of these, and
# counts what it has to leave out.

# %%
from helpers.dialogues import load_dialogues
from helpers.profiles import detect_profile

profile = detect_profile(PROFILE, model=MODEL)
rows, dropped = load_dialogues(source := DATASET or profile.dataset, DATASET_REVISION)
print(f"{len(rows)} rows from {source.split('/')[-1]}, left out: {dropped or 'none'}")

# %% [markdown]
# We see how many rows there are, 172 in either set, and whether any had to be left out and why.
# On a laptop these are the project's own dialogues, written for it in the format and spread of the
# article's; on a GPU they are the article's. Let us look at one.

# %%
example = rows[0]
print("question:", example["question"])
print("answer:  ", example["answer"])

# %% [markdown]
# We see one question and one answer of a few sentences, in a plain voice. Every row is like
# that, so whatever the model learns here, it will not be long conversations.
#
# ## 2. The format, and a space that matters
# For training, a row becomes one text with two tags. The prompt is that text up to and
# including the second tag; the answer, with the space before it, is the completion.

# %%
from helpers.prompts import format_prompt, split_dialogue

prompt = format_prompt(example["question"])
text = f"{prompt} {example['answer']}"
print(text[: len(prompt) + 40], "…")
assert split_dialogue(text) == (example["question"], example["answer"])

# %% [markdown]
# We see both tags, and the answer behind the second. The assert says that the text splits back
# into what we put in. Now a trap: should the prompt end in `<ASSISTANT>:` or in `<ASSISTANT>: `,
# with a space? A model sees tokens and no letters, so we compare tokens. We predict that only one
# of the two is how the training text begins.

# %%
from helpers.falcon import load_tokenizer

tokenizer = load_tokenizer(profile.model, REVISION)
whole = tokenizer(text).input_ids
for ending in ("", " "):
    ids = tokenizer(prompt + ending).input_ids
    fits, there = whole[: len(ids)] == ids, tokenizer.convert_ids_to_tokens(whole[: len(ids)])
    print(f"prompt + {ending!r:3}: the text begins so? {fits!s:5}  prompt ends",
          f"{tokenizer.convert_ids_to_tokens(ids)[-2:]}, text goes {there[-2:]}")
assert whole[: len(tokenizer(prompt).input_ids)] == tokenizer(prompt).input_ids

# %% [markdown]
# We see True for the bare tag and False with a space. `Ġ` stands for a space: in the text it
# belongs to the first word of the answer, in the prompt it is left over as a token of its own.
# That asks the model to go on from a place where it never was. The article's chat went further and
# put an instruction and an example before the question. No training row has those, so what was
# trained and what was asked differ; we keep to the format of the rows.
#
# ## 3. Lengths
# Texts are cut at `max_length` tokens, so the first question to any data set is how long its
# rows are. Each row ends with the end-of-text token, which must survive the cut: it is what
# teaches the model to stop.

# %%
from helpers.dialogues import length_report, to_prompt_completion

pairs = to_prompt_completion(rows)
texts = [p + c + tokenizer.eos_token for p, c in zip(pairs["prompt"], pairs["completion"])]
lengths = [len(ids) for ids in tokenizer(texts).input_ids]
print(f"{len(lengths)} rows, the first of {lengths[0]} tokens")

# %% [markdown]
# We see one length for each row. The article cut at 1,024 tokens, the T4's profile cuts at 512. We
# predict that even the shorter cut touches at most one row in fifty.

# %%
summary = length_report(lengths)
print(", ".join(f"{name} {value:,.0f}" for name, value in summary.items()))
assert DATASET or summary["over_512"] <= summary["rows"] / 50

# %% [markdown]
# The numbers behind `over` count the rows that a cut at 256, 512 or 1,024 tokens would shorten; the
# last two are as good as none. A picture says it faster. Below the histogram lies a bar for the
# article's own rows, which Falcon's tokenizer cuts into pieces of its own.

# %%
import json

from tools.figures import COLOURS, new_figure, show

known = json.loads((root / "results/cpu/real_rows.json").read_text())["falcon_tokenizer"]["lengths"]
figure, axis = new_figure(size=(8, 3.2))
axis.hist(lengths, range(0, max(1100, summary["max"]), 20), color=COLOURS[5], label="rows here")
top, low, high = axis.get_ylim()[1], known["min"], known["max"]
axis.barh(-0.09 * top, high - low, 0.08 * top, low, color=COLOURS[1], label="the article's rows")
axis.plot(known["median"], -0.09 * top, "k|", markersize=12, label="their median")
for cut in (256, 512, 1024):
    axis.axvline(cut, color=COLOURS[6], linestyle="--")
    axis.text(cut - 8, top / 2, f"cut at {cut:,}:\n{summary[f'over_{cut}']} rows over", ha="right")
axis.set(xlabel="tokens a row, end-of-text included", ylabel="rows", xlim=(0, 1100))
axis.legend(loc="upper center", bbox_to_anchor=(0.7, 1))
show(figure, alt="Histogram of row lengths in tokens, below it a bar from the article's shortest "
     "row to its longest. Dashed lines at 256, 512 and 1,024: nothing lies far right of 512.")

# %% [markdown]
# The histogram ends to the left of 512, or hardly beyond it. A cut at 1,024, the article's, touches
# nothing and costs nothing either, since a batch is only as long as its longest row. A cut at 512,
# the T4's, is nearly free. The article's rows, of which we may show figures and no text:
#
# <!-- table
# column: Falcon's tokenizer = results/cpu/real_rows.json
# row: Rows = falcon_tokenizer.lengths.rows
# row: Tokens, end-of-text included = falcon_tokenizer.lengths.tokens
# row: Shortest row = falcon_tokenizer.lengths.min
# row: Median row = falcon_tokenizer.lengths.median
# row: Longest row = falcon_tokenizer.lengths.max
# row: Rows over 256 tokens = falcon_tokenizer.lengths.over_256
# row: Rows over 512 tokens = falcon_tokenizer.lengths.over_512
# row: Padding in random batches of 16, share (section 4) = falcon_tokenizer.padding.16.0
# row: Padding in order, batches of 16, share (section 4) = falcon_tokenizer.padding.16.1
# row: Rows that mention suicide (section 7) = falcon_tokenizer.suicide_rows
# row: Questions that mention it = falcon_tokenizer.suicide_questions
# -->
# | | Falcon's tokenizer |
# | --- | ---: |
# | Rows | 172 |
# | Tokens, end-of-text included | 37,908 |
# | Shortest row | 48 |
# | Median row | 207 |
# | Longest row | 524 |
# | Rows over 256 tokens | 71 |
# | Rows over 512 tokens | 1 |
# | Padding in random batches of 16, share (section 4) | 0.459 |
# | Padding in order, batches of 16, share (section 4) | 0.2 |
# | Rows that mention suicide (section 7) | 14 |
# | Questions that mention it | 8 |
#
# Measured on Falcon's tokenizer: 2 cores of x86_64, no GPU, 2026-11-24, [real_rows.json](../results/cpu/real_rows.json).
# <!-- end -->
#
# Each row must also keep its end in the *loss*. The article's notebook padded with the end-of-text
# token, and collators of its day find padding by its id and take it out of the loss. We predict
# that every row's end goes with it, and that it stays if the pad token is another one.

# %%
from transformers import DataCollatorForLanguageModeling

ends = {}
for pad in (tokenizer.eos_token, tokenizer.pad_token):
    other = load_tokenizer(profile.model, REVISION)
    other.pad_token = pad
    batch = DataCollatorForLanguageModeling(other, mlm=False)([other(t) for t in texts[:3]])
    ends[pad] = (batch["labels"] == other.eos_token_id).sum(dim=1).tolist()
    print(f"pad token {pad!r:15} ends in the loss of three rows: {ends[pad]}")
assert list(ends.values()) == [[0, 0, 0], [1, 1, 1]]

# %% [markdown]
# We see no end in the loss in the first line, and one in each row in the second. A model whose loss
# never holds an end is not taught to stop; the article's chat then cuts it off after 256 new
# tokens. Our pad token, the one of the second line, is a token of Falcon's that no text of ours
# uses.
#
# ## 4. What padding costs
# Rows of a batch are padded to the longest. How much of the work is padding if the rows are drawn
# at random? A batch of $b$ rows is as long as its longest, and how long that is on average follows
# from the lengths alone. So we can predict before anything is drawn.

# %%
def expected_padding(lengths, batch):
    """Padding's share of random batches: one minus mean length over expected longest."""
    n, ordered = len(lengths), sorted(lengths)
    longest = sum(x * ((k + 1) ** batch - k**batch) for k, x in enumerate(ordered)) / n**batch
    return 1 - sum(lengths) / n / longest

predicted = {batch: expected_padding(lengths, batch) for batch in (4, 8, 16)}
print("predicted at random:", *(f"{share:.0%} (batch {b})" for b, share in predicted.items()))

# %% [markdown]
# We see padding's predicted share grow with the batch. Now the rows are laid out, twice: twenty
# steps of 64 rows in a random order, and the same steps with their rows sorted, longest first.

# %%
from helpers.training import padding_share, row_order

order = row_order(lengths, rows_per_step=64, steps=20, seed=SEED)
shuffled = row_order([0] * len(lengths), rows_per_step=64, steps=20, seed=SEED)
print(f"{len(order):,} rows laid out; the first step begins with rows {order[:4]}, "
      f"of {[lengths[i] for i in order[:4]]} tokens")

# %% [markdown]
# We see rows by number, and that none is longer than the one before it. How much padding do both
# orders have? We predict the shares above for the first, and less for the second.

# %%
for batch, expected in predicted.items():
    at_random, in_order = (padding_share(lengths, o, batch) for o in (shuffled, order))
    print(f"batch {batch:2}: {at_random:.0%} at random, {in_order:.0%} in order")
    assert in_order < at_random and (DATASET or abs(at_random - expected) < 0.04)

# %% [markdown]
# We see the prediction met at random, and far less padding in order, for every batch size.
# Nothing is traded for it. A step still takes the same 64 rows and sums over all their tokens, so
# the gradient is the same; only the grouping inside the step changes. And because the order is laid
# out once, from the seed, a run that dies goes on with the very next row.
#
# ## 5. Where the loss falls
# We want the model to learn answers, not questions. Given `prompt` and `completion`, SFTTrainer
# sets the label of every prompt token to −100, which the loss skips. We make the labels of the
# shortest row ourselves; page 03 looks at the library's own.

# %%
short = min(range(len(lengths)), key=lengths.__getitem__)
ids = tokenizer(texts[short]).input_ids
n_prompt = len(tokenizer(pairs["prompt"][short]).input_ids)
labels = [-100] * n_prompt + ids[n_prompt:]
print(f"{n_prompt} tokens without loss, {len(ids) - n_prompt} with; the last label is",
      repr(tokenizer.decode([labels[-1]])))
assert labels[-1] == tokenizer.eos_token_id != tokenizer.pad_token_id

# %% [markdown]
# We see fewer tokens without loss than with: the question is the shorter part. The last label is
# the end-of-text token, so stopping is part of what is learned. The same row as a picture, one box
# a token.

# %%
pieces = tokenizer.convert_ids_to_tokens(ids)
figure, axis = new_figure(size=(8, 0.42 * (len(ids) // 9 + 2)))
for i, (piece, label) in enumerate(zip(pieces, labels)):
    colour = "#DDDDDD" if label == -100 else COLOURS[4]
    box = dict(boxstyle="round", facecolor=colour, linewidth=0.4)
    shown = piece.replace("Ġ", "·").replace("Ċ", "↵").replace("$", r"\$")
    axis.text(i % 9, -(i // 9), shown, ha="center", va="center", fontsize=8, bbox=box)
axis.set(xlim=(-0.6, 8.6), ylim=(-(len(ids) // 9) - 0.8, 0.8))
axis.axis("off")
show(figure, alt="One training row as boxes, one a token: grey boxes for the question and the two "
     "tags, which carry no loss, then yellow boxes for every token of the answer and the end.")

# %% [markdown]
# Grey boxes are read, yellow ones are learned. A dot is a space, an arrow a line break.
#
# ## 6. Three parts, and no question in two of them
# A row that is trained on cannot test anything. We set 18 rows aside to watch the loss during
# training, and 18 more that notebook 04 alone opens. Rows with the same question, whatever its
# capitals and commas, stay together: an answer must not be known from its twin.

# %%
from helpers.dialogues import normalise_question, split_rows

parts = split_rows(rows, seed=SEED)
asked = {name: {normalise_question(q) for q in part["question"]} for name, part in parts.items()}
print({name: len(part) for name, part in parts.items()})
assert sum(map(len, asked.values())) == len(set().union(*asked.values())), "a question in two parts"
assert sum(map(len, parts.values())) == len(rows)

# %% [markdown]
# We see the rows of train, validation and test; the asserts say that no two parts share a question
# and that together they are all rows. The article held nothing back, so the last loss that it
# reports is one on rows that it had read many times. How many? It trained 320 steps of 4 batches of
# 16 rows. Predict before you read on.

# %%
steps, batch, accumulation, n_rows = 320, 16, 4, 172
read = steps * accumulation * batch
print(f"{read:,} rows if every batch is full: {read / n_rows:.0f} passes over {n_rows}")
a_pass = -(-n_rows // batch)
print(f"{a_pass} batches a pass, the last one short: {steps * accumulation / a_pass:.0f} passes")

# %% [markdown]
# We see 119 passes by the first count and 116 by the second, which is what the article's own log
# says. That many teach a model to recite, and with no row held out nobody could see it. And ours?

# %%
own = profile.max_steps * profile.batch_size * profile.accumulation
print(f"this profile reads {own:,} rows: {own / len(parts['train']):.1f} passes")

# %% [markdown]
# We see the passes of this profile: few on a laptop, many on an A100, which takes the article's 320
# steps. So notebook 03 watches the loss on the held-out rows and keeps the step where it was
# lowest.
#
# ## 7. What these rows are about
# This is a data set on mental health. Before we build a chat on it, we count the rows that
# touch on suicide, in the question or in the answer.

# %%
touching = [i for i, t in enumerate(texts) if "suicid" in t.lower()]
asking = [i for i in touching if "suicid" in rows[i]["question"].lower()]
print(f"{len(touching)} of {len(rows)} rows mention suicide, {len(asking)} of them in the question")

# %% [markdown]
# We see that few rows mention suicide, and fewer questions do; the table of section 3 has the
# article's counts. A model that learns from so few will sometimes answer such a question badly, and
# people will ask. That is why the chat of notebook 05 puts a screen before and after the model, and
# answers a cry for help with a fixed text and telephone numbers.
#
# > **Note.** If you are in danger or thinking of ending your life, please reach a person now:
# > your local emergency number, or a line near you from
# > [findahelpline.com](https://findahelpline.com).
#
# ## 8. Save
# The next notebooks read the three parts from `artifacts/`. If the folder is missing, in a
# fresh runtime, they make it again from the same source with the same seed.

# %%
from datasets import DatasetDict, load_from_disk

DatasetDict(parts).save_to_disk("artifacts/dataset")
again = load_from_disk("artifacts/dataset")
assert all(list(again[name]) == list(part) for name, part in parts.items())
print("saved and read back:", {name: part.num_rows for name, part in again.items()})

# %% [markdown]
# We see the same train, validation and test rows as before: what was saved is what we read back.
#
# ## 9. What you have now
# Three parts on disk, a prompt format whose tokens fit, and the numbers that the next pages
# need: how long rows are, what a cut costs, how many passes a step count means.
#
# ## 10. Exercises
# 1. Set `DATASET` to a CSV of your own with the columns `question` and `answer`. Expect the same
#    page; leave an answer empty and expect it counted under "left out".
# 2. Set `SEED = 1`. Expect other rows in the test part, and nearly the same padding.
# 3. Sort all rows by length for the whole run, instead of inside each step. Expect less padding
#    still, and a model that sees its short rows last: why is that worse?
#
# ## 11. Sources and next
# The data set: [heliosbrahma/mental_health_chatbot_dataset](https://huggingface.co/datasets/heliosbrahma/mental_health_chatbot_dataset);
# its card says MIT, its rows were drawn from health sites, and no text of it is in this project.
# The article: A. Brahma (2023), [Fine-tuning of Falcon-7B using QLoRA](https://medium.com/@iamarunbrahma/fine-tuning-of-falcon-7b-large-language-model-using-qlora-on-mental-health-dataset-aa290eb6ec85).
# Next: [02](02_nf4_quantization.ipynb) stores Falcon's weights in four bits each.
