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
# | Needs | A100 (40 GiB) | T4 (15 GiB) | CPU, tiny model |
# | --- | --- | --- | --- |
# | GPU memory, GiB | none | none | none |
# | Minutes | not measured yet | not measured yet | under 1 |
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
# The count says how many rows we have, and whether any had to stay behind and why. On a
# laptop these are the project's own 172 dialogues, written for it in the format and spread of
# the article's set; on a GPU it is that set itself. Let us look at one.

# %%
example = rows[0]
print("question:", example["question"])
print("answer:  ", example["answer"])

# %% [markdown]
# We see one turn: a question, and an answer of a few sentences in a plain voice. Every row is
# like that, so whatever the model learns here, it will not be long conversations.
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
# The text splits back into what we put in. Now the trap: should the prompt end in `<ASSISTANT>:`
# or in `<ASSISTANT>: `, with a space? We predict that only one of them is a prefix of the
# training text *in tokens*, and those are all that the model sees.

# %%
from helpers.falcon import load_tokenizer

tokenizer = load_tokenizer(profile.model, REVISION)
whole = tokenizer(text).input_ids
for ending in ("", " "):
    ids = tokenizer(prompt + ending).input_ids
    print(f"prompt + {ending!r:3}: a token prefix of the text? {whole[: len(ids)] == ids}")
assert whole[: len(tokenizer(prompt).input_ids)] == tokenizer(prompt).input_ids

# %% [markdown]
# The bare tag is a prefix, the tag and a space are not: in the text the space belongs to the
# first word of the answer. A prompt with that space asks the model to go on from a place it was
# never in. The article's chat went further and put an instruction and an example before the
# question, which no training row has; we keep to the format of the rows.
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
# One length for each row. A summary, and what three cuts would shorten:

# %%
summary = length_report(lengths)
print(", ".join(f"{name} {value:,.0f}" for name, value in summary.items()))

# %% [markdown]
# The last three numbers count the rows that a cut at 256, 512 or 1,024 tokens would shorten.
# A picture says it faster.

# %%
from tools.figures import COLOURS, new_figure, show

figure, axis = new_figure(size=(8, 3))
axis.hist(lengths, bins=range(0, max(1100, summary["max"]), 20), color=COLOURS[5])
for cut in (256, 512, 1024):
    axis.axvline(cut, color=COLOURS[6], linestyle="--")
    axis.text(cut + 8, axis.get_ylim()[1] * 0.9, f"{cut}: {summary[f'over_{cut}']} rows over")
axis.set(xlabel="tokens a row, end-of-text included", ylabel="rows")
show(figure, alt="Histogram of row lengths in tokens with dashed lines at the cuts 256, 512 and "
     "1,024. Nearly all rows lie left of 512; under half lie right of 256.")

# %% [markdown]
# We see a hill well to the left of 512. A cut at 1,024, the article's, touches nothing and costs
# nothing either, since a batch is only as long as its longest row. A cut at 512, the T4's, is
# nearly free.
#
# > **Why?** The article's chat let the model write at most 256 tokens and padded with the
# > end-of-text token. With pad and end the same, padding hides the end in the loss, the model
# > never learns to stop, and answers run into that limit. Our pad token is another one.
#
# ## 4. What padding costs
# Rows of a batch are padded to the longest. How much of the work goes into padding if 16 rows
# are drawn at random, as the article's trainer would with a plain shuffle, and how much if each
# step's rows are first sorted by length? We predict about a third, and a fraction of that.

# %%
from helpers.training import padding_share, row_order

order = row_order(lengths, rows_per_step=64, steps=20, seed=SEED)
shuffled = row_order([0] * len(lengths), rows_per_step=64, steps=20, seed=SEED)
print(f"{len(order):,} rows laid out, the first step begins with {order[:4]}")

# %% [markdown]
# Twenty steps of 64 rows, longest first. How much of each batch would be padding?

# %%
waste = {}
for batch in (4, 8, 16):
    waste[batch] = [padding_share(lengths, o, batch) for o in (shuffled, order)]
    print(f"batch {batch:2}: {waste[batch][0]:.0%} at random, {waste[batch][1]:.0%} in order")
assert all(ordered < random for random, ordered in waste.values())

# %% [markdown]
# In order, padding falls to a small part of what a random draw wastes, for every batch size.
# Nothing is traded for it: a step still takes the same 64 rows and sums over all their tokens,
# so the gradient is the same; only the grouping inside the step changes. And because the order
# is laid out once, from the seed, a run that dies at step 200 resumes with row 12,801.
#
# ## 5. Where the loss falls
# We want the model to learn answers, not questions. Given `prompt` and `completion`, SFTTrainer
# sets the label of every prompt token to −100, which the loss skips. Here are the labels of a
# short row, token by token.

# %%
short = min(range(len(lengths)), key=lengths.__getitem__)
ids = tokenizer(texts[short]).input_ids
n_prompt = len(tokenizer(pairs["prompt"][short]).input_ids)
labels = [-100] * n_prompt + ids[n_prompt:]
print(f"{n_prompt} tokens without loss, {len(ids) - n_prompt} with; the last label is",
      repr(tokenizer.decode([labels[-1]])))
assert labels[-1] == tokenizer.eos_token_id != tokenizer.pad_token_id

# %% [markdown]
# The last label is the end-of-text token: stopping is part of what is learned. The same row as
# a picture, one box a token.

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
# Grey tokens are read, yellow ones are learned. A dot is a space, an arrow a line break.
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
assert not asked["train"] & asked["test"] and not asked["train"] & asked["validation"]
assert sum(len(part) for part in parts.values()) == len(rows)

# %% [markdown]
# Three parts that share no question and together are all rows. The article held nothing back;
# its loss of 0.03 at the end is the loss on rows it had read over a hundred times. How many
# times, exactly? Predict before you read on: 320 steps of 16 × 4 rows.

# %%
seen, n_train = 320 * 16 * 4, len(parts["train"])
print(f"{seen:,} rows read, {seen / 172:.0f} passes over 172 rows")
own = profile.max_steps * profile.batch_size * profile.accumulation
print(f"this profile: {own:,} rows, {own / n_train:.1f} passes over {n_train}")

# %% [markdown]
# By this count every row is read 119 times; the article's own log says 116, as its last
# micro-batch of each pass was short. That many passes teach a model to recite. Notebook 03 shows
# when the loss on held-out rows stops falling: long before.
#
# ## 7. What these rows are about
# This is a data set on mental health. Before we build a chat on it, we count the rows that
# touch on suicide, in the question or in the answer.

# %%
touching = [i for i, t in enumerate(texts) if "suicid" in t.lower()]
asking = [i for i in touching if "suicid" in rows[i]["question"].lower()]
print(f"{len(touching)} of {len(rows)} rows mention suicide, {len(asking)} of them in the question")

# %% [markdown]
# The rows are few, and a model that learns from few rows will sometimes answer such a question
# badly. People will ask. That is why the chat of notebook 05 puts a layer of plain rules before
# and after the model, and answers a cry for help with a fixed text and telephone numbers.
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
# What was saved is what we read back.
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
