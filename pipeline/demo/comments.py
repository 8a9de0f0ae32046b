"""Labelled comments on products and services, written by seeded rules.

What a comment says hangs on the order of its words, so that a bag of words does not suffice: negation turns an
adjective round ("not bad at all"), the clause after "but" names the topic, "the old app was worse than the new one"
is praise. Where people would differ, labels are drawn by chance, so that a teacher fitted to them is rightly unsure.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from typing import NamedTuple

from pipeline.base import storage

# Lines that a reader has to set aside, at these places in the file: the demo shows what becomes of them.
BAD_LINES = {
    100: '{"id": "demo-broken", "body": "The parcel arr',
    200: '{"id": "demo-null", "body": null, "sentiment": "neutral", "topic": "other", "urgency": "low"}',
    300: '{"id": "demo-control", "body": "Great app<end_of_turn>", "sentiment": "positive", "topic": "app", "urgency": "low"}',
}

SUBJECTS = {
    "price": ("price", "monthly fee", "discount", "bill", "subscription cost", "price of the refill"),
    "quality": ("build quality", "fabric", "battery", "screen", "stitching", "finish of the case"),
    "delivery": ("delivery", "shipping", "courier", "express shipping", "delivery time", "driver"),
    "support": ("support team", "customer service", "help desk", "support chat", "repair service", "hotline"),
    "app": ("app", "website", "login page", "latest update", "checkout page", "dark mode in the app"),
    "other": ("manual", "gift card", "shop in town", "newsletter", "loyalty scheme", "catalogue"),
}
DIVIDED = (("packaging", "delivery", "quality"), ("tracking page", "app", "delivery"), ("refund", "price", "support"))
WORDS = {
    "good": ("great", "good", "excellent", "lovely", "fantastic", "solid", "brilliant", "decent", "impressive", "reliable"),
    "bad": ("bad", "awful", "terrible", "poor", "disappointing", "useless", "frustrating", "lousy", "horrible", "annoying"),
    "better": ("better", "nicer", "much better", "way better"),
    "worse": ("worse", "more annoying", "much worse", "way worse"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "errand": ("call me", "get back to me", "send me a new one", "look into it", "write to me", "sort it out"),
    "is": ("is", "was", "is really", "was so", "is nothing but"),
    "but": (", but", " but", ", however", ", yet"),
    "though": ("even though", "although"),
}
OPPOSITE = {"good": "bad", "bad": "good", "better": "worse", "worse": "better", "positive": "negative", "negative": "positive"}

REQUESTS = {  # the same words serve both ends
    "high": ("Please {errand} today", "This can't wait", "This is urgent", "I need you to {errand} today, not next week"),
    "medium": ("Please {errand} this week", "Please {errand} soon"),
    "low": ("No need to {errand} today", "This can wait", "This is not urgent", "I need you to {errand} next week, not today"),
}
OPENERS = ("Honestly, ", "Ok so ", "Well, ", "Update: ", "To be fair, ", "Hi, ", "Hmm, ")
CLOSERS = ("!", "!!", "...", " 🙂", " 👍", " 😕", " thanks", " tbh", " imo", " 🙄")


class Form(NamedTuple):
    """Sentences of one kind, {b} naming the topic; half the time with the opposite of every word and sentiment."""

    weight: int  # how often it is used
    sentences: tuple[str, ...]
    sentiment: str
    other: str = ""  # sentiment of some people
    chance: float = 1.0  # share of people who take them for the first
    urgency: str | None = None  # where the sentence itself says it


FORMS = (
    Form(32, ("The {b} {is} {good}", "The {b} is not only {good} but {good} too"), "positive"),
    Form(12, ("The {b} is not {bad} at all", "The {b} is anything but {bad}", "The {b} was never {bad}"), "positive"),
    Form(4, ("The {b} is not that {good}", "The {b} was not exactly {good}"), "negative", "mixed", 0.75),
    Form(10, ("The {a} {is} {bad}{but} the {b} {is} {good}",), "mixed", "positive", 0.85),
    Form(4, ("{though} the {a} {is} {bad}, the {b} {is} {good}",), "positive", "mixed", 0.85),
    Form(3, ("the {b} {is} {good}, {though} the {a} {is} {bad}",), "positive", "mixed", 0.85),
    Form(6, ("The new {b} is {better} than the old one", "The {b} is {better} than it was last year"), "positive"),
    Form(6, ("The old {b} was {worse} than the new one", "Last year the {b} was {worse} than it is now"), "positive"),
    Form(5, ("At first the {b} seemed {bad}, now it is {good}", "The {b} is {good} now, it was {bad} before"), "positive"),
    Form(4, ("The {b} used to be {bad}, now it's {good}", "The {b} turned out {good}, I had expected {bad}"), "positive"),
    Form(3, ("The {a} can wait, the {b} can't", "The {b} can't wait, the {a} can"), "neutral", "negative", 0.8, "high"),
    Form(8, ("Is the {b} {good}?", "Is the {b} really as {good} as they say?", "Who do I ask about the {b}?"), "neutral"),
    Form(8, ("I asked about the {b} on {day}", "Somebody told me about the {b}", "The {b} changed on {day}"), "neutral"),
)


def write_comments(path: str, count: int, seed: int) -> None:
    """Writes `count` labelled comments, and `BAD_LINES` among them, as JSON lines; gzipped where the name ends so."""
    lines = []
    for number, (body, labels) in enumerate(make_comments(count, seed)):
        if number in BAD_LINES:
            lines.append(BAD_LINES[number])
        lines.append(json.dumps({"id": f"demo-{number:06}", "body": body, **labels}, ensure_ascii=False))
    content = ("\n".join(lines) + "\n").encode()
    storage.write_bytes(path, gzip.compress(content, mtime=0) if path.endswith(".gz") else content)


def make_comments(count: int, seed: int) -> list[tuple[str, dict[str, str]]]:
    """Comments with their labels: the same for the same seed, and a prefix of any longer run's."""
    rng = random.Random(seed)
    return [_comment(rng) for _ in range(count)]


def _comment(rng: random.Random) -> tuple[str, dict[str, str]]:
    form = rng.choices(FORMS, [form.weight for form in FORMS])[0]
    topic, other = rng.sample(list(SUBJECTS), 2)
    subjects = {"a": rng.choice(SUBJECTS[other]), "b": rng.choice(SUBJECTS[topic])}
    if rng.random() < 0.05:  # people would file it under either topic
        subjects["b"], *either = rng.choice(DIVIDED)
        topic = rng.choices(either, (2, 1))[0]
    turned = rng.random() < 0.5
    text = _filled(rng, rng.choice(form.sentences), turned, subjects)
    sentiment = form.sentiment if rng.random() < form.chance else form.other
    sentiment = OPPOSITE.get(sentiment, sentiment) if turned else sentiment
    text, urgency = _urged(rng, text if text.endswith("?") else f"{text}.", sentiment, form.urgency)
    return _roughened(rng, text[0].upper() + text[1:]), {"sentiment": sentiment, "topic": topic, "urgency": urgency}


def _filled(rng: random.Random, sentence: str, turned: bool, subjects: dict[str, str]) -> str:
    def word(found: re.Match[str]) -> str:
        name = OPPOSITE.get(found[1], found[1]) if turned else found[1]
        return subjects.get(name) or rng.choice(WORDS[name])

    return re.sub(r"\{(\w+)\}", word, sentence)


def _urged(rng: random.Random, text: str, sentiment: str, urgency: str | None) -> tuple[str, str]:
    """At times with a request that says how urgent it is; else that follows from the sentiment."""
    if urgency is None and rng.random() < 0.3:
        urgency = rng.choices(("high", "medium", "low"), (4, 3, 4))[0]
        text = f"{text} {_filled(rng, rng.choice(REQUESTS[urgency]), False, {})}."
    usual = rng.random() < 0.9
    return text, urgency or ("medium" if usual == (sentiment == "negative") else "low")


def _roughened(rng: random.Random, text: str) -> str:
    """As if typed: an opening word, an emoji, no capitals."""
    if rng.random() < 0.25:
        text = rng.choice(OPENERS) + text[0].lower() + text[1:]
    if rng.random() < 0.25:
        text = text.rstrip(".") + rng.choice(CLOSERS)
    return text.lower() if rng.random() < 0.25 else text
