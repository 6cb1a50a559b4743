"""Make the embedded tiny Falcon: pages from facts and passages, a tokenizer, the model, its shards.

One command, one GPU, under 8 minutes:

    python tools/make_tiny_falcon.py --out assets/tiny_falcon --results results/GPU/tiny_falcon.json

`--minutes` bounds the training time: if it will not do, the schedule is shortened once the pace is
known. `--state FILE` keeps a resumable state, so that a shorter lease can be used in pieces. All
cores compose the pages. On a CPU `--minutes 1 --pages 2000` makes a model for tests only.
"""

import argparse
import copy
import json
import lzma
import math
import multiprocessing
import os
import random
import re
import sys
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import FalconConfig, FalconForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import frames

SPECIAL = [
    f">>{name}<<"
    for name in (
        "TITLE ABSTRACT INTRODUCTION SUMMARY COMMENT ANSWER QUESTION DOMAIN PREFIX SUFFIX MIDDLE"
    ).split()
] + ["<|endoftext|>"]
END = SPECIAL[-1]
WINDOW = 512
Pull = tuple[float, float]  # weight of the z-loss, and the height it pulls to
FOOTERS = (  # every page ends in one but the brief ones, which end with an answer
    "Read next: {t}",
    "Filed under: {t}",
    "More pages: {t}, {u}",
    "See also: {u} | {t} | About us",
    "Share this page | Print | {t}",
    "Last reviewed by the editors. Topics: {t}, {u}",
    "Tags: {t}, {u}",
    "You may also like: {t}",
    "Back to top | {u}",
    "Was this page helpful? Yes | No",
    "Related pages: {t} | {u}",
    "Comments are closed. Next page: {t}",
)
ASK_FOR_PROSE = (
    "Tell me something about {t}.",
    "Please write a few lines about {t}.",
    "What would you say about {t}?",
    "I want to read about {t}.",
    "Can you tell me a story or a fact about {t}?",
    "Write about {t}.",
)
MARKS = (  # how the web writes a question and its answer; the two tags are a manner of their own
    ("Question: ", "Answer: "),
    ("Q: ", "A: "),
    ("A reader asks: ", "We answer: "),
    ("Visitor: ", "Reply: "),
    ("Ask us: ", "Our answer: "),
    ("Letter: ", "Answer: "),
    ("Someone asks: ", "We say: "),
    ("Dear editor, ", "Dear reader, "),
    ("Caller: ", "Adviser: "),
    ("Student: ", "Teacher: "),
    ("Patient: ", "Nurse: "),
    ("You asked: ", "We answered: "),
    ("* ", "> "),
    ("[question] ", "[answer] "),
    ("<Q>: ", "<A>: "),
    ("HUMAN: ", "ASSISTANT: "),
    ("Human: ", "Assistant: "),
    ("<human>: ", "<assistant>: "),
    ("[HUMAN] ", "[ASSISTANT] "),
)
ASKING = (  # words of other tags; <HUMAN> and <ASSISTANT> alone mark a transcript that runs on
    "READER GUEST USER PERSON VISITOR CALLER CLIENT STUDENT FRIEND SOMEONE NEIGHBOUR PATIENT PARENT"
    " MEMBER WORKER LISTENER WRITER YOU MAN WOMAN"
).split()
ANSWERING = (
    "EDITOR HELPER ADVISER GUIDE NURSE TEACHER EXPERT HOST DESK SERVICE COACH COUNSELLOR BOT AGENT"
    " LIBRARY WE TEAM DOCTOR ANSWERER SPEAKER"
).split()
REWORDED = (  # other ways to ask the same thing
    (r"How (?:can|do) I (.+)\?", ("How do I {0}?", "How can I {0}?", "What can I do to {0}?")),
    (r"How (?:can|do) I (.+)\?", ("What is a good way to {0}?", "I want to {0}. How can I do it?")),
    (r"What is (.+)\?", ("What is {0}?", "What does {0} mean?", "Can you tell me what {0} is?")),
    (r"What is (.+)\?", ("Can you explain {0}?", "What exactly is {0}?", "Please explain {0}.")),
    (r"What are the signs of (.+)\?", ("How do I notice {0}?", "What are symptoms of {0}?")),
    (
        r"What (?:causes|are the causes of) (.+)\?",
        ("Where does {0} come from?", "Why is there {0}?"),
    ),
    (r"Is it normal (.+)\?", ("Is it common {0}?", "Is it all right {0}?")),
)
GREETINGS = ("Hello. ", "Hi, ", "Please tell me: ", "I have a question. ", "Good evening. ")
OF_OTHERS = re.compile(
    r"(?!I\b).*\b(friends?|mother|father|mum|dad|parents?|son|daughter|child|children|kids?|brother"
    r"|sister|husband|wife|partner|boyfriend|girlfriend|colleague|neighbour|grand\w+|uncle|aunt|baby"
    r"|cousin|flatmate|roommate|teenager|family|someone|somebody|relative|he|she|him|her)\b",
    re.I,
)
LOT = 1000  # pages of one seed
COMPOSER: dict = {}  # what the processes that compose pages share
HELPLINE = re.compile(r"988|116 123|crisis line|emergency number|suicid|ending your life", re.I)
IN_CRISIS = ("crisis lines", "a safety plan", "asking about suicide", "someone in crisis")
COMMON = set(
    "what with when that does your from about help helps feel better people today most should know "
    "good find have much long where signs first small steps need needs take start some tips doctor "
    "explain simple words think they them can more going thing cause causes problems".split()
)
HEADINGS = {
    "what": "What it is",
    "signs": "Signs",
    "causes": "Causes",
    "self": "What you can do",
    "steps": "Steps",
    "other": "How to help someone",
    "care": "Getting help",
    "outlook": "What to expect",
    "myth": "What people get wrong",
    "feel": "A kind word",
}


def read_lines(path: Path) -> list[dict]:
    """The JSON objects of a .jsonl or .jsonl.xz file."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def plain(text: str) -> str:
    """Lower case, letters, digits and spaces alone, to compare questions."""
    return re.sub(r"[^a-z0-9 ]", "", text.lower())


def ngrams(text: str, n: int = 8) -> set[tuple[str, ...]]:
    """All runs of n words, lower case, without punctuation."""
    words = re.findall(r"[\w']+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def reword(question: str, rng: random.Random) -> str:
    """The question in other words half of the time, so that no single wording is learned."""
    if rng.random() < 0.35:
        for pattern, forms in rng.sample(REWORDED, len(REWORDED)):
            if found := re.fullmatch(pattern, question):
                question = rng.choice(forms).format(found[1])
                break
    if rng.random() < 0.05:
        question = rng.choice(GREETINGS) + question
    return question.lower() if rng.random() < 0.05 else question


def of_others(question: str) -> bool:
    """Whether the question is about somebody else than the one who asks.

    Example:
        >>> of_others("How can I help my son?"), of_others("I miss my son.")
        (True, False)
    """
    return bool(OF_OTHERS.match(question))


@dataclass
class Shares:
    """How much of each kind of page, and of each kind of turn in a transcript.

    The rest of the pages are questions and answers without the dialogues' two tags, but in their
    manner: fine-tuning then has only to learn that those two mean the same as all others.
    """

    transcripts: float = 0.13  # turns with the two tags, that run on
    magazines: float = 0.06
    articles: float = 0.03
    facts: float = 0.5  # of the tagged turns; passages answer the others
    prose: float = 0.03  # of the tagged turns
    stories: float = 0.3  # prose, among the pieces of a magazine
    tags: float = 0.5  # of the untagged pages: marked with tags of other words
    brief: float = 0.9  # of the untagged pages: one to three questions, and they end with an answer


class Pages:
    """Composes pages that look like the web: articles, lists, and transcripts that run on."""

    def __init__(self, text: "Text", seed: int, shares: Shares):
        self.rng = random.Random(seed)
        self.facts, self.passages, self.prose = text.facts, text.passages, text.prose
        self.questions, self.phrases, self.taboo = text.questions, text.phrases, text.taboo
        self.shares = shares
        self.by_topic: dict[str, dict[str, dict]] = {}
        for line in self.facts:
            self.by_topic.setdefault(line["topic"], {})[line["aspect"]] = line
        self.queue: list[dict] = []
        self.asking: list[dict] = []

    def is_taboo(self, text: str) -> bool:
        """Whether the text shares eight words in a row with a dialogue's answer."""
        return not ngrams(text).isdisjoint(self.taboo)

    def passage(self) -> dict:
        """The next passage; each is used once before any is used again."""
        if not self.queue:
            self.queue = self.rng.sample(self.passages, len(self.passages))
        return self.queue.pop()

    def numbered(self, items: list[str]) -> str:
        return "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))

    def some(self, line: dict, low: int, high: int) -> list[str]:
        facts = line["facts"]
        chosen = self.rng.sample(range(len(facts)), min(len(facts), self.rng.randint(low, high)))
        if line["aspect"] == "steps" or self.rng.random() < 0.7:
            chosen.sort()  # steps were written in order, and many facts lead to the next
        return [facts[i] for i in chosen]

    def answer(self, line: dict) -> str:
        """Two to five facts that answer, now and then with a kind word or where to find help."""
        topic, rng = self.by_topic[line["topic"]], self.rng
        if line["aspect"] == "steps" and rng.random() < 0.5:
            return self.numbered(self.some(line, 3, 5))
        said = self.some(line, 2, 5)
        if line["aspect"] in ("self", "signs", "steps") and "feel" in topic and rng.random() < 0.3:
            said.insert(0, rng.choice(topic["feel"]["facts"]))
        if line["aspect"] in ("self", "signs", "other") and "care" in topic and rng.random() < 0.3:
            said.append(rng.choice(topic["care"]["facts"]))
        return " ".join(said)

    def framed(self) -> tuple[str, str]:
        """A question and its answer in controlled English; each once before any comes again."""
        while True:
            if not self.asking:
                self.asking = self.rng.sample(self.questions, len(self.questions))
            piece = self.asking.pop()
            question, phrases = piece["question"], self.phrases[piece["topic"]]
            said = frames.answer(question, phrases, of_others(question), self.rng)
            if not self.is_taboo(said):  # another question if a dialogue says eight words of it
                return reword(question, self.rng), said

    def pair(self, line: dict | None = None) -> str:
        """A tagged question, answered by facts, by prose or by a passage."""
        kind, shares = self.rng.random(), self.shares
        if line is not None or kind < shares.facts:
            line = line or self.rng.choice(self.facts)
            question = reword(self.rng.choice(line["questions"]), self.rng)
            answer = self.answer(line)
        elif self.prose and kind < shares.facts + shares.prose:
            piece = self.rng.choice(self.prose)
            question = self.rng.choice(ASK_FOR_PROSE).format(t=piece["topic"])
            answer = piece["text"]
        else:
            passage = self.passage()
            question, answer = passage["p"], passage["s"]
        return f"<HUMAN>: {question}\n<ASSISTANT>: {answer}"

    def transcript(self) -> str:
        """Six to fourteen tagged turns: after an answer there is always more."""
        rng = self.rng
        n = rng.randint(6, 14)
        if rng.random() < 0.25:  # one person stays with one topic
            lines = list(self.by_topic[rng.choice(list(self.by_topic))].values())
            return "\n".join(self.pair(rng.choice(lines)) for _ in range(n))
        return "\n".join(self.pair() for _ in range(n))

    def article(self) -> str:
        rng = self.rng
        topic = rng.choice(list(self.by_topic))
        lines = list(self.by_topic[topic].values())
        chosen = rng.sample(lines, min(len(lines), rng.randint(3, 6)))
        parts = [topic[0].upper() + topic[1:]]
        for line in chosen:
            body = (
                self.numbered(self.some(line, 3, 6))
                if line["aspect"] == "steps"
                else " ".join(self.some(line, 3, 7))
            )
            parts.append(f"{HEADINGS[line['aspect']]}\n{body}")
        return "\n\n".join(parts)

    def questions_page(self) -> str:
        """Questions and answers without the two tags: the manner fine-tuning will bring out."""
        rng = self.rng
        q, a = rng.choice(MARKS)
        if rng.random() < self.shares.tags:
            q, a = f"<{rng.choice(ASKING)}>: ", f"<{rng.choice(ANSWERING)}>: "
        self.ended = rng.random() < self.shares.brief
        n = rng.randint(1, 3) if self.ended else rng.randint(3, 7)
        gap = rng.choice(("\n", "\n\n"))
        pairs = [self.framed() for _ in range(n)]
        return gap.join(f"{q}{question}\n{a}{answer}" for question, answer in pairs)

    def magazine(self) -> str:
        """Pieces of prose, or passages, one below the other."""
        rng, parts = self.rng, []
        for _ in range(rng.randint(2, 4)):
            if self.prose and rng.random() < self.shares.stories:
                piece = rng.choice(self.prose)
                parts.append(f"{piece['topic'].capitalize()}\n\n{piece['text']}")
            else:
                parts.append(self.passage()["s"])
        return "\n\n".join(parts)

    def footer(self) -> str:
        t, u = self.rng.sample(sorted(self.by_topic), 2)
        return self.rng.choice(FOOTERS).format(t=t, u=u)

    def page(self) -> str:
        kind, shares = self.rng.random(), self.shares
        self.ended = False
        if kind < shares.transcripts:
            body = self.transcript()
        elif kind < shares.transcripts + shares.magazines:
            body = self.magazine()
        elif kind < shares.transcripts + shares.magazines + shares.articles:
            body = self.article()
        else:
            body = self.questions_page()
        return body if self.ended else f"{body}\n\n{self.footer()}"


def held_out_ngrams(dialogues: Path) -> set[tuple[str, ...]]:
    """The 8-grams of every dialogue's answer: none of them may stand in the pre-training text."""
    answers = [line["text"].split("<ASSISTANT>:")[1] for line in read_lines(dialogues)]
    return set().union(*(ngrams(answer) for answer in answers)) if answers else set()


@dataclass
class Text:
    """What pages are made of: facts by topic and aspect, prose, questions by topic, passages."""

    facts: list[dict]
    prose: list[dict]
    questions: list[dict]
    passages: list[dict]
    phrases: dict[str, dict] = field(default_factory=dict)  # of frames, by topic
    taboo: set[tuple[str, ...]] = field(default_factory=set)


def load_text(folder: Path, dialogues: Path) -> Text:
    """The committed text without any piece that shares eight words in a row with a dialogue.

    Facts that name a helpline are left out but for the topics of a crisis, since a small model says
    such endings, all alike, to everybody; so are questions that need one, and the dialogues' own.
    A passage is its first paragraph: a line break then ends an answer, and nothing else.
    """
    taboo = held_out_ngrams(dialogues)
    kinds = {
        kind: [x for p in sorted(folder.glob(f"{kind}*.jsonl*")) for x in read_lines(p)]
        for kind in ("facts", "prose", "questions", "passages", "phrases")
    }
    for line in kinds["facts"]:
        kept = [f for f in line["facts"] if not ngrams(f) & taboo]
        calm = [f for f in kept if line["topic"] in IN_CRISIS or not HELPLINE.search(f)]
        line["facts"] = calm or kept
    facts = [line for line in kinds["facts"] if len(line["facts"]) >= 2]
    prose = [p for p in kinds["prose"] if not ngrams(p["text"]) & taboo]
    passages = [p | {"s": p["s"].split("\n")[0]} for p in kinds["passages"]]
    passages = [p for p in passages if not ngrams(p["s"]) & taboo]
    held = {plain(line["text"].split("\n<ASSISTANT>:")[0][9:]) for line in read_lines(dialogues)}
    asked = {plain(x["question"]): x for x in kinds["questions"] if not x.get("crisis")}
    questions = [x for key, x in asked.items() if key not in held]
    phrases = {x["topic"]: x for x in kinds["phrases"]}
    return Text(facts, prose, questions, passages, phrases, taboo)


def plainest(passages: list[dict], n: int) -> list[dict]:
    """The n passages that speak most of what was asked, in short sentences of few long words."""

    passages = [
        p for p in passages if len(re.findall("[a-z]{2,}", p["s"])) >= 25 and "http" not in p["s"]
    ]

    def rank(piece: dict) -> float:
        asked = {w for w in re.findall(r"[a-z]{4,}", piece["p"].lower()) if w not in COMMON}
        words = re.findall(r"[a-z']+", piece["s"].lower())
        sentences = max(1, len(re.findall(r"[.!?](?:\s|$)", piece["s"])))
        on_topic = sum(w in asked for w in words) / len(words)
        long = sum(len(w) > 9 for w in words) / len(words)
        varied = len(set(words)) / len(words)
        return min(on_topic, 0.06) * 10 + varied - 3 * long - len(words) / sentences / 60

    return sorted(passages, key=rank, reverse=True)[:n]


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with Falcon's special tokens at Falcon's places, 0 to 11."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: Text, shares: Shares, seeds: range) -> torch.Tensor:
    """A lot of pages for each seed, composed by all cores, in windows: (n, WINDOW) int16."""
    fork = multiprocessing.get_context("fork")
    with fork.Pool(None, COMPOSER.update, ({"of": (tokenizer, text, shares)},)) as pool:
        lots = list(pool.imap(windows_of, seeds))
    windows = torch.cat(lots)
    print(f"  {windows.numel() / 1e6:.1f} M tokens of pages composed", flush=True)
    return windows


def windows_of(seed: int) -> torch.Tensor:
    """The windows of a lot of pages: (n, WINDOW) int16.

    Each page is closed by the end of text. After a full window the rest of its last page is left
    out half of the time, so that many windows begin where a page does: with a question, as a
    prompt will.
    """
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork
    tokenizer, text, shares = COMPOSER["of"]
    pages, rows, left = Pages(text, seed, shares), [], []
    for page in tokenizer.encode_batch([pages.page() + END for _ in range(LOT)]):
        left += page.ids
        while len(left) >= WINDOW:
            rows.append(torch.tensor(left[:WINDOW], dtype=torch.int16))
            left = [] if pages.rng.random() < 0.5 else left[WINDOW:]
    return torch.stack(rows)


def build_model(args, vocab_size: int) -> FalconForCausalLM:
    config = FalconConfig(
        vocab_size=vocab_size,
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        multi_query=True,
        parallel_attn=True,
        bias=False,
        alibi=False,
        new_decoder_architecture=False,
        bos_token_id=11,
        eos_token_id=11,
        max_position_embeddings=2048,
        hidden_dropout=args.dropout,
    )
    torch.manual_seed(args.seed)
    model = FalconForCausalLM(config)
    for name, weight in model.named_parameters():  # smaller steps into the residual stream
        if name.endswith(("dense.weight", "dense_4h_to_h.weight")):
            weight.data.mul_(1 / math.sqrt(2 * args.layers))
    return model


@torch.no_grad()
def anchor(model, height: float) -> None:
    """Fix the mean logit at `height`, whatever the layers say; call it after each step.

    The rows of the tied embedding get mean zero, so that no hidden state can lift or sink all
    logits at once, as fine-tuning otherwise does. One column is a constant, which the last
    LayerNorm's bias alone multiplies: that is the height.
    """
    table, norm = model.transformer.word_embeddings.weight, model.transformer.ln_f
    table.sub_(table.mean(0))
    table[:, 0], norm.weight[0], norm.bias[0] = 0.125, 0.0, 8 * height


def loss_of(model, windows: torch.Tensor, z_loss: Pull = (0.0, 0.0)) -> torch.Tensor:
    """Mean next-token loss in nats over (n, WINDOW) ids, with a z-loss (weight, height).

    The z-loss (Chowdhery et al. (2022), PaLM, section 5) pulls the log of the softmax's normaliser
    to 0, so that logits are log-probabilities. A repetition penalty then makes likely words a
    little less likely; on logits of any other height it would all but forbid every word that was
    said before. Fine-tuning on other text lowers the logits by several nats, so that we pull to a
    height above 0 and let it come down.
    """
    device = next(model.parameters()).device
    ids = windows.to(device, non_blocking=True).long()
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(input_ids=ids, use_cache=False).logits
    fused = device.type == "cuda" and logits.requires_grad
    return (compiled_loss if fused else token_loss)(logits, ids, z_loss)


def token_loss(logits: torch.Tensor, ids: torch.Tensor, z_loss: Pull) -> torch.Tensor:
    """Cross-entropy and z-loss from one normaliser; a GPU compiles it into few kernels."""
    scores = logits[:, :-1].float()
    height = scores.logsumexp(-1)
    picked = scores.gather(-1, ids[:, 1:, None]).squeeze(-1)
    weight, wanted = z_loss
    return (height - picked).mean() + weight * (height - wanted).square().mean()


@torch.compile
def compiled_loss(logits: torch.Tensor, ids: torch.Tensor, z_loss: Pull) -> torch.Tensor:
    """`token_loss`, compiled at its first call."""
    return token_loss(logits, ids, z_loss)


@torch.no_grad()
def heights(model, windows: torch.Tensor) -> list[float]:
    """Mean and deviation of the log of the softmax's normaliser over (n, WINDOW) ids."""
    device = next(model.parameters()).device
    logits = model(input_ids=windows.to(device).long(), use_cache=False).logits
    normaliser = logits.float().logsumexp(-1)
    return [round(x.item(), 3) for x in (normaliser.mean(), normaliser.std())]


@torch.no_grad()
def evaluate(model, windows: torch.Tensor, batch: int = 64) -> float:
    model.eval()
    losses = [loss_of(model, windows[i : i + batch]).item() for i in range(0, len(windows), batch)]
    model.train()
    return sum(losses) / len(losses)


def optimizers_of(model, args) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest, at rates that need no other scale.

    Muon (Jordan et al., 2024) makes each matrix's step orthogonal, so that no direction of a few
    frequent words outgrows the rest; Liu et al. (2025), section 2.2, match its size to AdamW's.
    """
    cuda = next(model.parameters()).is_cuda
    layers, decay = [], []
    for name, p in model.named_parameters():
        if p.ndim > 1:
            (decay if "embeddings" in name else layers).append(p)
    other = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": args.decay}, {"params": other, "weight_decay": 0.0}]
    return [
        torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95), fused=cuda),
        torch.optim.Muon(
            layers, lr=args.rate, weight_decay=args.decay, adjust_lr_fn="match_rms_adamw"
        ),
    ]


def train(model, windows, args) -> dict:
    """Pre-train for `--steps` or `--minutes`, whichever ends first; returns what happened."""
    cuda = torch.cuda.is_available()
    model = model.to("cuda" if cuda else "cpu").train()
    fast = torch.compile(model) if cuda else model
    optimizers = optimizers_of(model, args)
    steps = args.steps or len(windows) * args.passes // args.batch
    generator, start, done = torch.Generator().manual_seed(args.seed), 0, 0.0
    order = torch.cat(
        [torch.randperm(len(windows), generator=generator) for _ in range(args.passes + 1)]
    )
    state = Path(args.state) if args.state else None
    if state and state.exists():
        kept = torch.load(state, weights_only=True)
        model.load_state_dict(kept["model"])
        for optimizer, was in zip(optimizers, kept["optimizers"], strict=True):
            optimizer.load_state_dict(was)
        start, done = kept["step"], kept["seconds"]
    began = time.time()
    first = start + 60
    for step in range(start, steps):
        if step == first - 40:
            began_even = time.time()
        if step == first and not state:  # warm: if the time will not do, a shorter schedule
            each = (time.time() - began_even) / 40
            steps = min(steps, step + int((60 * args.minutes - time.time() + began) / each))
            print(f"{args.batch * WINDOW / each:,.0f} tokens/s, {steps} steps", flush=True)
        if step >= steps or time.time() - began > 60 * args.minutes:
            break
        warm = min(1.0, (step + 1) / 200)
        rate = args.rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        rows = order[step * args.batch : (step + 1) * args.batch]
        loss = loss_of(fast, windows[rows], (args.z_loss, args.height))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step(), optimizer.zero_grad()
        if args.anchor:
            anchor(model, args.anchor)
        start = step + 1
        if step % 200 == 0 or step == steps - 1:
            print(
                f"step {step + 1} of {steps}, loss {loss.item():.3f}, {time.time() - began:.0f} s",
                flush=True,
            )
    seconds = done + time.time() - began
    if state:
        torch.save(
            {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": start,
                "seconds": seconds,
            },
            state,
        )
    return {
        "steps": start,
        "of": steps,
        "seconds": round(seconds, 1),
        "tokens_per_s": round(start * args.batch * WINDOW / seconds),
    }


SAMPLE_QUESTIONS = (
    "How can I prevent anxiety and depression?",
    "What is a panic attack?",
    "I cannot sleep because I worry all night. What can I do?",
    "How can I support a friend with depression?",
    "What should I do when I feel lonely?",
    "How do I find a therapist?",
)


@torch.no_grad()
def samples(model, tokenizer) -> list[str]:
    model.eval()
    torch.manual_seed(0)
    texts = []
    for question in SAMPLE_QUESTIONS:
        ids = torch.tensor(
            [tokenizer.encode(f"<HUMAN>: {question}\n<ASSISTANT>:").ids], device=model.device
        )
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=160,
            do_sample=True,
            temperature=0.4,
            top_p=0.6,
            repetition_penalty=1.3,
            pad_token_id=9,
            eos_token_id=11,
        )
        texts.append(tokenizer.decode(out[0].tolist(), skip_special_tokens=False))
    return texts


def save(model, tokenizer, out: Path, n_shards: int = 8) -> list[str]:
    """Eight safetensors shards in bf16 with their index, as the real one has, and the tokenizer."""
    model = model.to(torch.bfloat16).cpu()
    model.config.hidden_dropout = 0.0
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.safetensors*"):
        old.unlink()
    weights = {
        k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"
    }  # tied
    total, before = sum(v.nbytes for v in weights.values()), 0
    shards: list[dict] = [{} for _ in range(n_shards)]
    for key, value in weights.items():
        shards[before * n_shards // total][key] = value
        before += value.nbytes
    names = [f"model-{i:05d}-of-{n_shards:05d}.safetensors" for i in range(1, n_shards + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, out / name, metadata={"format": "pt"})
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    model.config.architectures, model.config.dtype = ["FalconForCausalLM"], torch.bfloat16
    model.config.save_pretrained(out), model.generation_config.save_pretrained(out)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        bos_token=END,
        model_max_length=2048,
        additional_special_tokens=SPECIAL[:-1],
    )
    fast.save_pretrained(out)
    return names


def write_card(out: Path, report: dict) -> None:
    """The model card, its figures filled in from the run's own report."""
    values = report["settings"] | report
    card = Path(__file__).with_name("tiny_falcon_card.md").read_text()
    (out / "README.md").write_text(card.format(**values))


def set_aside(questions: list[dict], seed: int) -> tuple[list[dict], list[dict]]:
    """One question in fifty that no page will ask, and the others."""
    mixed = random.Random(seed).sample(questions, len(questions))
    n_unseen = max(1, len(mixed) // 50)
    return mixed[:n_unseen], mixed[n_unseen:]


def answers_to(questions: list[dict], phrases: dict[str, dict], seed: int) -> list[str]:
    """Questions that no page asks, answered in controlled English."""
    rng = random.Random(seed)
    return [
        f"Question: {x['question']}\nAnswer: "
        f"{frames.answer(x['question'], phrases[x['topic']], of_others(x['question']), rng)}{END}"
        for x in questions
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--text", default=str(ROOT / "assets/pretraining")), add("--out", required=True)
    add("--dialogues", default=str(ROOT / "assets/sample_dialogues.jsonl"))
    add("--results"), add("--state"), add("--seed", type=int, default=0)
    add("--width", type=int, default=320), add("--layers", type=int, default=7)
    add("--heads", type=int, default=5), add("--vocab", type=int, default=6144)
    add("--pages", type=int, default=1_400_000), add("--passes", type=int, default=1)
    add("--batch", type=int, default=256), add("--rate", type=float, default=3e-3)
    add("--minutes", type=float, default=4.5), add("--steps", type=int)
    for share in fields(Shares):
        add(f"--share-{share.name}", type=float, default=share.default)
    add("--passages", type=int, default=30_000), add("--dropout", type=float, default=0.1)
    add("--z-loss", type=float, default=1e-3), add("--height", type=float, default=3.0)
    add("--anchor", type=float, default=-13.0), add("--decay", type=float, default=0.1)
    return parser.parse_args()


def main() -> None:
    args = parse()
    text = load_text(Path(args.text), Path(args.dialogues))
    text.passages = plainest(text.passages, args.passages)
    random.Random(args.seed).shuffle(text.passages)
    n_held = max(1, len(text.passages) // 50)
    held = text.passages[:n_held]
    unseen, text.questions = set_aside(text.questions, args.seed)
    shares = Shares(*(getattr(args, f"share_{share.name}") for share in fields(Shares)))
    held_text = replace(text, passages=held)
    text.passages = text.passages[n_held:]
    pages = Pages(text, args.seed, shares)
    tokenizer = train_tokenizer([pages.page() for _ in range(6000)], args.vocab)
    lots, first = max(1, args.pages // LOT), 1_000_000 * args.seed
    windows = encode(tokenizer, text, shares, range(first, first + lots))
    held_windows = encode(tokenizer, held_text, shares, range(first + lots, first + lots + 2))
    model = build_model(args, tokenizer.get_vocab_size())
    report = train(model, windows, args)
    shards = save(copy.deepcopy(model), tokenizer, Path(args.out))  # before the slow scoring
    report |= {"parameters": sum(p.numel() for p in model.parameters())}
    report |= {
        "tokens": windows.numel(),
        "train_loss": evaluate(model, windows[: len(held_windows)]),
        "held_out_loss": evaluate(model, held_windows),
    }
    report["logsumexp"] = heights(model, held_windows[:32])
    for name, texts in {
        "unseen_passages_loss": [p["s"] + END for p in held[:500]],
        "unseen_answers_loss": answers_to(unseen, text.phrases, args.seed),
    }.items():
        ids = [i for row in tokenizer.encode_batch(texts) for i in row.ids]
        full = torch.tensor(ids[: len(ids) // WINDOW * WINDOW], dtype=torch.int16)
        report[name] = evaluate(model, full.view(-1, WINDOW))
    texts = samples(model, tokenizer)
    report |= {
        "shards": len(shards),
        "bytes": sum(p.stat().st_size for p in Path(args.out).iterdir()),
    }
    report |= {
        "facts": sum(len(x["facts"]) for x in text.facts),
        "prose": len(text.prose),
        "questions": len(text.questions),
        "phrases": sum(len(some) for x in text.phrases.values() for some in list(x.values())[2:]),
    }
    report |= {
        "passages": len(text.passages),
        "settings": {
            name: value
            for name, value in vars(args).items()
            if name not in ("text", "out", "dialogues", "results", "state")
        },
    }
    report |= {
        "command": "python tools/make_tiny_falcon.py --out assets/tiny_falcon",
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "samples": texts,
    }
    print(json.dumps({k: v for k, v in report.items() if k != "samples"}, indent=1))
    print("\n---\n".join(texts))
    write_card(Path(args.out), report)
    if args.results:
        Path(args.results).parent.mkdir(parents=True, exist_ok=True)
        Path(args.results).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
