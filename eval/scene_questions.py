"""What is asked about a scene of digits: questions whose truth is known and plain to see.

"Which digit is left of the 7?" means the next one in reading order, which is the order of x
centres. Relations are only stated between digits whose centres stand `RELATION_GAP` apart. The
truth of a statement is drawn before the digits that it speaks of, and a false relation is a true
one turned round, so that the wording gives nothing away.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np

KINDS = ("presence", "position", "relation", "count", "colour", "read")
CELLS = (
    ("top left", "top center", "top right"),
    ("center left", "center", "center right"),
    ("bottom left", "bottom center", "bottom right"),
)
DRILL_PAIRS = 6
RELATION_GAP = 0.14  # of the canvas's shorter side

# Where a question tends to stand in a conversation: mentions give presence and the count away, so these come
# early; reading gives nearly everything away, so it comes last.
_TURN = {
    "presence": 0.0,
    "position": 0.5,
    "relation": 0.5,
    "colour": 0.5,
    "count": 0.0,
    "read": 1.5,
}
# How often a kind opens a conversation, against the others: there, reading has only the picture to go by.
_OPENS = {"read": 2}


@dataclass(frozen=True, kw_only=True)
class Digit:
    """One digit of a scene; `box` is (x0, y0, x1, y1) in pixels around its ink."""

    value: int
    colour: str
    box: tuple[int, int, int, int]
    scan: int

    @property
    def x(self) -> float:
        return (self.box[0] + self.box[2]) / 2

    @property
    def y(self) -> float:
        return (self.box[1] + self.box[3]) / 2

    def cell(self, canvas: tuple[int, int]) -> str:
        """Coarse position on a canvas of (height, width): one of `CELLS`."""
        return CELLS[int(3 * self.y / canvas[0])][int(3 * self.x / canvas[1])]


@dataclass(frozen=True, kw_only=True)
class Question:
    kind: str
    text: str
    answer: str


def ask(
    rng: np.random.Generator,
    digits: tuple[Digit, ...],
    canvas: tuple[int, int],
    first_truth: bool,
) -> tuple[Question, ...]:
    """All questions of a scene, kind by kind; the order within a kind is random.

    Args:
        digits: different values, from left to right.
        canvas: (height, width) in pixels.
        first_truth: truth of the first presence question and of the first relation. A data set
            that alternates it is exactly balanced in these. All other truths are independent
            draws, because in a balanced scene the answers before would tell the last one.
    """
    reading = "Read all digits from left to right.", "Read the digits from left to right."
    return (
        *_ask_presence(rng, digits, first_truth),
        *_ask_position(rng, digits, canvas),
        *_ask_relation(rng, digits, RELATION_GAP * min(canvas), first_truth),
        _vary(rng, "count", len(digits), "How many digits are there?", "Count the digits."),
        *_ask_colour(rng, digits),
        _vary(rng, "read", _row_of(digits), *reading),
    )


def drill(
    rng: np.random.Generator, digits: tuple[Digit, ...], canvas: tuple[int, int]
) -> list[tuple[str, str]]:
    """Many short look-ups in one conversation, to learn looking up from: ("7?", "red top left") or
    ("7?", "no") for every value, ("3 7?", "left above") for pairs (where the first is, seen from the
    second), shuffled, and the reading at the end.

    Natural questions hold few look-ups between many words; models of this size stood on a plateau
    before they learned the first one.
    """
    present = {digit.value: digit for digit in digits}
    turns = [
        (f"{v}?", f"{present[v].colour} {present[v].cell(canvas)}" if v in present else "no")
        for v in range(10)
    ]
    pairs = [pair for pair in product(digits, digits) if pair[0] is not pair[1]]
    gap = RELATION_GAP * min(canvas)
    for i in rng.permutation(len(pairs))[:DRILL_PAIRS]:
        one, other = pairs[i]
        across = "left" if one.x < other.x else "right"
        level = abs(one.y - other.y) < gap
        down = "level" if level else "above" if one.y < other.y else "below"
        turns.append((f"{one.value} {other.value}?", f"{across} {down}"))
    turns = [turns[i] for i in rng.permutation(len(turns))]
    return [*turns, ("Read the digits from left to right.", _row_of(digits))]


def order_turns(rng: np.random.Generator, questions: Iterable[Question]) -> list[Question]:
    """A conversation: one question of a random kind opens it, the others are shuffled by `_TURN`.

    Every kind opens some conversations, for that is how a user asks.
    """
    turns = sorted(questions, key=lambda question: _TURN[question.kind] + rng.random())
    kinds = sorted({question.kind for question in turns})
    odds = np.array([_OPENS.get(kind, 1) for kind in kinds])
    kind = rng.choice(kinds, p=odds / odds.sum())
    opening = next(i for i, question in enumerate(turns) if question.kind == kind)
    return [turns[opening], *turns[:opening], *turns[opening + 1 :]]


def guess_from_text(
    train: Iterable[Question], test: Iterable[Question], kinds: Sequence[str] = KINDS
) -> dict[str, float]:
    """Accuracy per kind on `test` of the commonest answer that `train` gives to each question.

    It is what language alone can reach, so it stands for chance.
    """
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for question in train:
        answers[question.text][question.answer] += 1
    hits: dict[str, list[bool]] = {kind: [] for kind in kinds}
    for question in test:
        guess = answers[question.text].most_common(1) if question.text in answers else []
        hits[question.kind].append(bool(guess) and guess[0][0] == question.answer)
    return {kind: float(np.mean(values)) for kind, values in hits.items() if values}


def _row_of(digits: Iterable[Digit]) -> str:
    """ "3 7 1", from left to right."""
    return " ".join(str(digit.value) for digit in digits)


def _vary(rng: np.random.Generator, kind: str, answer: object, *texts: str) -> Question:
    return Question(kind=kind, text=texts[rng.integers(len(texts))], answer=str(answer))


def _ask_presence(
    rng: np.random.Generator, digits: tuple[Digit, ...], first_truth: bool
) -> list[Question]:
    """As many as there are digits, at most four: more could run out of digits to say yes to."""
    present = [digit.value for digit in digits]
    absent = [value for value in range(10) if value not in present]
    pools = {True: rng.permutation(present).tolist(), False: rng.permutation(absent).tolist()}
    questions = []
    for truth in (first_truth, *(rng.random(min(len(digits), 4) - 1) < 0.5).tolist()):
        value = pools[truth].pop()
        name = f"an {value}" if value == 8 else f"a {value}"
        texts = f"Is there {name}?", f"Do you see {name}?"
        questions.append(_vary(rng, "presence", "yes" if truth else "no", *texts))
    return questions


def _ask_position(
    rng: np.random.Generator, digits: tuple[Digit, ...], canvas: tuple[int, int]
) -> list[Question]:
    """Where a digit is, what is in a cell that holds one digit, and which digit is next to one."""
    questions = []
    for i in rng.permutation(len(digits))[:2]:
        text = f"Where is the {digits[i].value}?"
        questions.append(_vary(rng, "position", digits[i].cell(canvas), text))
    crowds = Counter(digit.cell(canvas) for digit in digits)
    alone = [digit for digit in digits if crowds[digit.cell(canvas)] == 1]
    if alone:
        digit = alone[rng.integers(len(alone))]
        text = f"Which digit is at the {digit.cell(canvas)}?"
        questions.append(_vary(rng, "position", digit.value, text))
    if len(digits) > 1:
        i = rng.integers(len(digits) - 1)
        left, right = digits[i].value, digits[i + 1].value
        ways = (left, f"left of the {right}"), (right, f"right of the {left}")
        answer, place = ways[rng.integers(2)]
        texts = f"Which digit is {place}?", f"What is {place}?"
        questions.append(_vary(rng, "position", answer, *texts))
    return [questions[i] for i in rng.permutation(len(questions))]


def _ask_relation(
    rng: np.random.Generator, digits: tuple[Digit, ...], gap: float, first_truth: bool
) -> list[Question]:
    """Up to three statements, each about another pair of digits."""
    facts = []
    for pair in combinations(digits, 2):
        ways = []
        left, right = sorted(pair, key=lambda digit: digit.x)
        if right.x - left.x >= gap:
            ways += [(left, "left of", right), (right, "right of", left)]
        top, bottom = sorted(pair, key=lambda digit: digit.y)
        if bottom.y - top.y >= gap:
            ways += [(top, "above", bottom), (bottom, "below", top)]
        if ways:
            facts.append(ways[rng.integers(len(ways))])
    truths = (first_truth, *(rng.random(2) < 0.5).tolist())
    questions = []
    for truth, i in zip(truths, rng.permutation(len(facts)), strict=False):
        subject, relation, other = facts[i] if truth else facts[i][::-1]
        text = f"The {subject.value} is {relation} the {other.value}."
        questions.append(_vary(rng, "relation", "true" if truth else "false", text))
    return questions


def _ask_colour(rng: np.random.Generator, digits: tuple[Digit, ...]) -> list[Question]:
    questions = []
    for i in rng.permutation(len(digits))[:3]:
        value, colour = digits[i].value, digits[i].colour
        texts = f"What color is the {value}?", f"What colour is the {value}?"
        questions.append(_vary(rng, "colour", colour, *texts))
    return questions
