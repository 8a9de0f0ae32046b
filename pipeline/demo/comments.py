"""Labelled comments on products and services, written by seeded rules.

What a comment says hangs on the order of its words, so that a bag of words does not suffice: negation turns an
adjective round ("not bad at all"), the clause after "but" names the topic, "the old app was better than the new one"
is no praise. Where people would differ, labels are drawn by chance, so that a teacher fitted to them is rightly unsure.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.base import storage

# Lines that a reader has to set aside, at these places in the file: the demo shows what becomes of them.
BAD_LINES = {
    100: '{"id": "demo-broken", "body": "The parcel arr',
    200: '{"id": "demo-null", "body": null, "sentiment": "neutral", "topic": "other", "urgency": "low"}',
    300: '{"id": "demo-control", "body": "The app is great<end_of_turn>", "sentiment": "positive", "topic": "app", '
    '"urgency": "low"}',
}

TOPICS = ("price", "quality", "delivery", "support", "app", "other")

SUBJECTS = {
    "price": ("price", "monthly fee", "discount", "bill", "subscription cost", "price of the refill"),
    "quality": ("build quality", "fabric", "battery", "screen", "stitching", "finish of the case"),
    "delivery": ("delivery", "shipping", "courier", "express shipping", "delivery time", "driver"),
    "support": ("support team", "customer service", "help desk", "support chat", "repair service", "hotline"),
    "app": ("app", "website", "login page", "latest update", "checkout page", "dark mode in the app"),
    "other": ("manual", "gift card", "shop in town", "newsletter", "loyalty scheme", "catalogue"),
}

# Subjects people would file under either topic, with the chance of the first.
DIVIDED_SUBJECTS = (
    ("packaging", "delivery", "quality", 0.7),
    ("tracking page", "app", "delivery", 0.65),
    ("refund", "price", "support", 0.7),
    ("warranty", "support", "quality", 0.6),
    ("in-app purchase", "price", "app", 0.6),
)

# Adjectives that fit any subject, and those that fit one topic: praise first, then blame.
ADJECTIVES = (
    ("great", "good", "excellent", "lovely", "fantastic", "solid", "brilliant", "decent", "impressive", "reliable"),
    ("bad", "awful", "terrible", "poor", "disappointing", "useless", "frustrating", "lousy", "horrible", "annoying"),
)
TOPIC_ADJECTIVES = {
    "price": (("fair", "reasonable"), ("steep", "outrageous")),
    "quality": (("sturdy", "flawless"), ("flimsy", "shoddy")),
    "delivery": (("fast", "punctual"), ("slow", "late")),
    "support": (("helpful", "friendly"), ("rude", "unhelpful")),
    "app": (("smooth", "intuitive"), ("buggy", "confusing")),
    "other": (("handy", "clear"), ("outdated", "dull")),
}
COMPARATIVES = (("better", "nicer", "much better", "way better"), ("worse", "more annoying", "much worse", "way worse"))

# Predicates around an adjective that keep its sense, that turn it round, and that turn it round who knows how far.
PREDICATES = (
    "is {0}",
    "was {0}",
    "is really {0}",
    "was so {0}",
    "is nothing but {0}",
    "is not only {0} but {1} too",
    "is not just {0}, it is {1}",
)
NEGATIONS = (
    "is not {0} at all",
    "was not {0} at all",
    "is anything but {0}",
    "is far from {0}",
    "was never {0}",
)
FAINT_NEGATIONS = ("is not that {0}", "was not exactly {0}")

# A comparison, and whether its sense is the opposite of the comparative's.
COMPARISONS = (
    ("The new {s} is {c} than the old one", False),
    ("The old {s} was {c} than the new one", True),
    ("The {s} is {c} than it was last year", False),
    ("Last year the {s} was {c} than it is now", True),
    ("The {s} here is {c} than at the other place", False),
    ("The {s} at the other place is {c} than here", True),
    ("The {s} couldn't be {c}", False),
    ("The {s} isn't any {c}", True),
)

# A change of mind: {0} was so, {1} is so now. The later judgement counts wherever it stands.
CHANGES = (
    "At first the {s} seemed {0}, now it is {1}",
    "The {s} used to be {0} and now it's {1}",
    "The {s} is {1} now, it was {0} before",
    "I expected the {s} to be {0}, it turned out {1}",
    "The {s} turned out {1}, I had expected it to be {0}",
    "I was told the {s} is {1}, I thought it was {0}, they were right",
)

# One of two things is meant: {b}, not {a}. Praise first, then blame.
CHOICES = (
    ("It is the {b} that I like, not the {a}", "Not the {a} but the {b} is what won me over"),
    ("The problem is not the {a} but the {b}", "The problem is the {b}, not the {a}", "I blame the {b}, not the {a}"),
)
PRIORITIES = (
    "The {a} can wait, the {b} can't",
    "The {b} can't wait, the {a} can",
    "I need the {b} sorted today, not the {a}",
    "Don't bother with the {a} now, do the {b} today",
)

QUESTIONS = (
    "Is the {s} {adj}?",
    "Does anyone know if the {s} is {adj}?",
    "Is the {s} really as {adj} as they say?",
    "Who do I ask about the {s}?",
    "Can I change the {s} later?",
)
STATEMENTS = (
    "I asked about the {s} on {day}",
    "My {kin} told me about the {s}",
    "The {s} changed on {day}",
    "This is my first comment on the {s}",
    "I got an email about the {s}",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
KIN = ("sister", "brother", "neighbour", "boss", "friend", "mother", "uncle")

# What is asked for, with how soon. The same words serve both ends.
ERRANDS = ("call me", "get back to me", "send me a new one", "look into it", "write to me", "sort it out")
REQUESTS = {
    "high": (
        "Please {e} today",
        "Please {e} right now",
        "This can't wait",
        "This is really urgent",
        "I need you to {e} today, not next week",
    ),
    "medium": ("Please {e} this week", "Please {e} soon"),
    "low": (
        "No need to {e} today",
        "This can wait",
        "This is not urgent",
        "I need you to {e} next week, not today",
        "No rush",
    ),
}

OPENERS = ("Honestly, ", "Ok so ", "Well, ", "Update: ", "To be fair, ", "Hi, ", "Hello! ", "Third order. ", "Hmm. ")
CLOSERS = ("!", "!!", "...", " 🙂", " 👍", " 😕", " thanks", " Thank you!", " tbh", " imo", " 🙄")


@dataclass(frozen=True)
class Labels:
    """What a comment says: one value for each field of the task."""

    sentiment: str
    topic: str
    urgency: str


@dataclass(frozen=True)
class Draft:
    """A sentence without its full stop, and what it says. Most sentences leave the urgency open."""

    text: str
    sentiment: str
    topic: str
    urgency: str | None = None


def write_comments(path: str, count: int, seed: int) -> None:
    """Writes `count` labelled comments, and `BAD_LINES` among them, as JSON lines; gzipped where the name ends so."""
    lines = []
    for number, (body, labels) in enumerate(make_comments(count, seed)):
        if number in BAD_LINES:
            lines.append(BAD_LINES[number])
        lines.append(json.dumps({"id": f"demo-{number:06}", "body": body, **vars(labels)}, ensure_ascii=False))
    content = ("\n".join(lines) + "\n").encode()
    storage.write_bytes(path, gzip.compress(content, mtime=0) if path.endswith(".gz") else content)


def make_comments(count: int, seed: int) -> list[tuple[str, Labels]]:
    """Comments with their labels: the same for the same seed, and a prefix of any longer run's."""
    rng = random.Random(seed)
    return [_comment(rng) for _ in range(count)]


def _comment(rng: random.Random) -> tuple[str, Labels]:
    forms, weights = zip(*FORMS, strict=True)
    draft: Draft = rng.choices(forms, weights)[0](rng)
    text, urgency = _urge(rng, draft)
    return _roughen(rng, text), Labels(draft.sentiment, draft.topic, urgency)


def _urge(rng: random.Random, draft: Draft) -> tuple[str, str]:
    """Ends the sentence, at times with a request that says how urgent it is; else that follows from the sentiment."""
    text = draft.text if draft.text.endswith("?") else draft.text + "."
    if draft.urgency is not None:
        return text, draft.urgency
    if rng.random() < 0.3:
        urgency = rng.choices(("high", "medium", "low"), (4, 3, 4))[0]
        request = rng.choice(REQUESTS[urgency]).format(e=rng.choice(ERRANDS))
        return f"{text} {request}.", urgency
    return text, _maybe(rng, 0.9, *(("medium", "low") if draft.sentiment == "negative" else ("low", "medium")))


def _plain(rng: random.Random) -> Draft:
    subject, topic = _subject(rng)
    if rng.random() < 0.1:
        praise = rng.random() < 0.5
        text = f"The {subject} " + rng.choice(FAINT_NEGATIONS).format(_adjective(rng, topic, praise))
        return Draft(text, _maybe(rng, 0.75, _sentiment(not praise), "mixed" if praise else "neutral"), topic)
    praise = rng.random() < 0.5
    return Draft(f"The {subject} {_predicate(rng, topic, praise)}", _sentiment(praise), topic)


def _contrast(rng: random.Random) -> Draft:
    """The clause after "but" names the topic; the two together are mixed."""
    (a, _), (b, topic), praise, first, second = _two_clauses(rng)
    link = rng.choice((", but", " but", ", however", ", yet"))
    return Draft(f"The {a} {first}{link} the {b} {second}", _maybe(rng, 0.85, "mixed", _sentiment(praise)), topic)


def _concession(rng: random.Random) -> Draft:
    """The main clause counts, whether it stands first or last."""
    (a, _), (b, topic), praise, aside, main = _two_clauses(rng)
    link = rng.choice(("even though", "although"))
    aside, main = f"{link} the {a} {aside}", f"the {b} {main}"
    text = f"{aside}, {main}" if rng.random() < 0.5 else f"{main}, {aside}"
    return Draft(text[0].upper() + text[1:], _maybe(rng, 0.85, _sentiment(praise), "mixed"), topic)


def _two_clauses(rng: random.Random) -> tuple[tuple[str, str], tuple[str, str], bool, str, str]:
    """Two subjects with topics, whether the second is praised, and a predicate for each, opposite in sense."""
    (a, topic_a), (b, topic_b) = _two_subjects(rng)
    praise = rng.random() < 0.5
    return (a, topic_a), (b, topic_b), praise, _predicate(rng, topic_a, not praise), _predicate(rng, topic_b, praise)


def _comparison(rng: random.Random) -> Draft:
    subject, topic = _subject(rng)
    praise, (text, opposite) = rng.random() < 0.5, rng.choice(COMPARISONS)
    return Draft(text.format(s=subject, c=rng.choice(COMPARATIVES[not praise])), _sentiment(praise != opposite), topic)


def _change(rng: random.Random) -> Draft:
    subject, topic = _subject(rng)
    praise = rng.random() < 0.5
    before, now = _adjective(rng, topic, not praise), _adjective(rng, topic, praise)
    return Draft(rng.choice(CHANGES).format(before, now, s=subject), _sentiment(praise), topic)


def _choice(rng: random.Random) -> Draft:
    (a, _), (b, topic) = _two_subjects(rng)
    praise = rng.random() < 0.3
    return Draft(rng.choice(CHOICES[not praise]).format(a=a, b=b), _sentiment(praise), topic)


def _priority(rng: random.Random) -> Draft:
    (a, _), (b, topic) = _two_subjects(rng)
    return Draft(rng.choice(PRIORITIES).format(a=a, b=b), _maybe(rng, 0.8, "neutral", "negative"), topic, "high")


def _question(rng: random.Random) -> Draft:
    subject, topic = _subject(rng)
    adjective = _adjective(rng, topic, rng.random() < 0.5)
    return Draft(rng.choice(QUESTIONS).format(s=subject, adj=adjective), "neutral", topic)


def _statement(rng: random.Random) -> Draft:
    subject, topic = _subject(rng)
    return Draft(rng.choice(STATEMENTS).format(s=subject, day=rng.choice(DAYS), kin=rng.choice(KIN)), "neutral", topic)


# How sentences are made, and how often.
FORMS: tuple[tuple[Callable[[random.Random], Draft], int], ...] = (
    (_plain, 40),
    (_contrast, 10),
    (_concession, 6),
    (_comparison, 11),
    (_change, 9),
    (_choice, 4),
    (_priority, 3),
    (_question, 8),
    (_statement, 8),
)


def _subject(rng: random.Random) -> tuple[str, str]:
    """Something to comment on, and its topic."""
    if rng.random() < 0.06:
        subject, likelier, other, chance = rng.choice(DIVIDED_SUBJECTS)
        return subject, _maybe(rng, chance, likelier, other)
    topic = rng.choice(TOPICS)
    return rng.choice(SUBJECTS[topic]), topic


def _two_subjects(rng: random.Random) -> tuple[tuple[str, str], tuple[str, str]]:
    """Two things to comment on, of different topics."""
    first, second = _subject(rng), _subject(rng)
    while first[1] == second[1] or first[0] == second[0]:
        second = _subject(rng)
    return first, second


def _predicate(rng: random.Random, topic: str, praise: bool) -> str:
    """A predicate that praises or blames, by an adjective of the same sense or one of the opposite turned round."""
    opposite = rng.random() < 0.25
    text = rng.choice(NEGATIONS if opposite else PREDICATES)
    first = second = _adjective(rng, topic, praise != opposite)
    while first == second:
        second = _adjective(rng, topic, praise != opposite)
    return text.format(first, second)


def _adjective(rng: random.Random, topic: str, praise: bool) -> str:
    pools = ADJECTIVES if rng.random() < 0.75 else TOPIC_ADJECTIVES[topic]
    return rng.choice(pools[not praise])


def _sentiment(praise: bool) -> str:
    return "positive" if praise else "negative"


def _maybe(rng: random.Random, chance: float, likelier: str, other: str) -> str:
    return likelier if rng.random() < chance else other


def _roughen(rng: random.Random, text: str) -> str:
    """Makes a comment look typed: an opening word, an emoji, a slip of the finger, careless capitals."""
    if rng.random() < 0.25:
        opener = rng.choice(OPENERS)
        text = opener + (text if opener.rstrip()[-1] in ".!" else text[0].lower() + text[1:])
    if rng.random() < 0.25:
        text = text.rstrip(".") + rng.choice(CLOSERS)
    if rng.random() < 0.08:
        text = _slip(rng, text)
    style = rng.random()
    return text.lower() if style < 0.25 else text.upper() if style > 0.97 else text


def _slip(rng: random.Random, text: str) -> str:
    """Swaps two neighbouring letters inside a word."""
    places = [i for i in range(1, len(text) - 2) if text[i - 1 : i + 3].isalpha()]
    if not places:
        return text
    i = rng.choice(places)
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :]
