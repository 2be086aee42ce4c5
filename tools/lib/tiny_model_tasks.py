"""Training and evaluation sequences: book text with retrieval tasks hidden in it.

A sequence is `length + 1` bytes and one loss weight per predicted byte. Everything is drawn from a numpy
generator that the caller seeds, so the same seed gives the same bytes.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

TASKS = ("single", "keys", "two_values", "assignment")
TASK_SHARES = (0.1, 0.46, 0.2, 0.24)  # in training
EXTREME_SHARE = 0.35  # of the training tasks have one statement at the very beginning or just before the questions

TEXT_WEIGHT = 1.0
ANSWER_WEIGHT = 5.0
FIRST_BYTE_WEIGHT = 12.0  # the first byte of a name or number, which decides what statement is looked up
FRAME_WEIGHT = 0.2  # statements and questions: mostly fixed wording around unpredictable names
UNPREDICTABLE_WEIGHT = 0.0  # the digits of a statement


@dataclass
class Segment:
    """A line to insert into the filler text; `weights` has one entry per byte."""

    data: bytes
    weights: np.ndarray
    answer: slice | None = None  # within data, for questions


@dataclass
class Instance:
    """One task: its statements in order, and the question that has to follow them."""

    task: str
    statements: list
    question: Segment
    asked: int = 0  # which statement the question is about; for tasks that need all of them, the first


class Templates:
    def __init__(self, path):
        spec = json.loads(Path(path).read_text(encoding="utf-8"))
        self.names, self.nouns, self.syllables = spec["names"], spec["nouns"], spec["syllables"]
        self.digits = (spec["value_digits"]["min"], spec["value_digits"]["max"])
        self.made = spec["made_name"]
        self.tasks = spec["tasks"]

    def value(self, rng):
        count = rng.integers(self.digits[0], self.digits[1] + 1)
        return str(rng.integers(10 ** (count - 1), 10**count))

    def name(self, rng, taken):
        while True:
            if rng.random() < self.made["share"]:
                parts = rng.integers(self.made["parts_min"], self.made["parts_max"] + 1)
                name = "".join(pick(rng, self.syllables) for _ in range(parts)).capitalize()
            else:
                name = pick(rng, self.names)
            if name not in taken:
                taken.add(name)
                return name

    def instance(self, rng, task, taken):
        """`taken` holds the names already used in this sequence, and grows."""
        noun, name = pick(rng, self.nouns), self.name(rng, taken)
        spec = self.tasks[task]
        forms = self.tasks[spec["forms_of"]]["forms"] if "forms_of" in spec else spec["forms"]
        form = pick(rng, forms)
        question = pick(rng, form["questions"])
        words, asked = {"noun": noun, "name": name}, 0
        if task in ("single", "keys"):
            words["value"] = self.value(rng)
            statements = [statement(pick(rng, form["statements"]), words)]
            others = 0 if task == "single" else int(rng.integers(spec["names_min"], spec["names_max"] + 1)) - 1
            for _ in range(others):
                other = {"noun": noun, "name": self.name(rng, taken), "value": self.value(rng)}
                statements.append(statement(pick(rng, form["statements"]), other))
            first = statements[0]
            rng.shuffle(statements)
            asked = next(i for i, part in enumerate(statements) if part is first)
        elif task == "two_values":
            words["value1"], words["value2"] = self.value(rng), self.value(rng)
            statements = [statement(pick(rng, form[part]), words) for part in ("first", "second")]
        else:
            words["other"], words["value"] = self.name(rng, taken), self.value(rng)
            statements = [statement(pick(rng, form[part]), words) for part in ("first", "second")]
        ask = question["ask"].format(**words).encode()
        answer = question["answer"].format(**words).encode()
        weights = np.full(len(ask) + len(answer) + 1, FRAME_WEIGHT, np.float32)
        weights[len(ask) : len(ask) + len(answer)] = ANSWER_WEIGHT
        for value in {words[key] for key in ("value", "value1", "value2", "other") if key in words}:
            weights[len(ask) + answer.index(value.encode())] = FIRST_BYTE_WEIGHT
        segment = Segment(ask + answer + b"\n", weights, slice(len(ask), len(ask) + len(answer)))
        return Instance(task, statements, segment, asked)


def pick(rng, items):
    return items[int(rng.integers(len(items)))]


def is_digit(codes):
    return (codes >= 48) & (codes <= 57)


def statement(template, words):
    data = (template.format(**words) + "\n").encode()
    weights = np.full(len(data), FRAME_WEIGHT, np.float32)
    codes = np.frombuffer(data, np.uint8)
    weights[is_digit(codes)] = UNPREDICTABLE_WEIGHT
    return Segment(data, weights)


class Books:
    """The training text, as one array per file."""

    def __init__(self, paths):
        self.arrays = [np.frombuffer(Path(path).read_bytes(), np.uint8) for path in paths]
        self.sizes = np.array([len(array) for array in self.arrays], np.float64)
        self.total = int(self.sizes.sum())

    def crop(self, rng, length):
        array = self.arrays[rng.choice(len(self.arrays), p=self.sizes / self.sizes.sum())]
        start = int(rng.integers(0, len(array) - length + 1))
        return array[start : start + length]


def text_sequence(books, rng, length):
    return books.crop(rng, length + 1), np.full(length, TEXT_WEIGHT, np.float32)


def copy_sequence(templates, rng, length):
    """Made-up words, then the same words again and again: the simplest thing that rewards copying."""
    count = int(rng.integers(4, 4 + length // 32))
    words = []
    for _ in range(count):
        taken = set()
        words.append(templates.name(rng, taken) + (" " + templates.value(rng) if rng.random() < 0.5 else ""))
    block = (", ".join(words) + ".\n").encode()
    data = np.frombuffer((block * (length // len(block) + 2))[: length + 1], np.uint8)
    weights = np.full(length, TEXT_WEIGHT, np.float32)
    weights[: len(block)] = 0.1
    return data, weights


NUMBER_FORMS = (
    "The {noun} of {name} is {value}.\n", "Remember that the {noun} of {name} is {value}.\n", "{name} has the {noun} {value}.\n",
    "{name} = {value}.\n", "{name} was given {value}.\n", "{name} is {value}, ",
)  # fmt: skip
SECOND_FORM = "The {noun} of {name} is also {value}.\n"
NAME_FORMS = ("Let {name} = {value}.\n", "{name} = {value}.\n", "{name} was given what {value} was given.\n")


def recall_pairs(templates, rng, length):
    """Lines and where in each the value lies; values are numbers, numbers of two kinds, or names."""
    kind, noun, taken = rng.random(), pick(rng, templates.nouns), set()
    count = int(rng.integers(2, 3 + min(length, 1024) // 64))
    forms = (NUMBER_FORMS[0], SECOND_FORM) if kind < 0.25 else (pick(rng, NUMBER_FORMS if kind < 0.65 else NAME_FORMS),)
    pairs = []
    for _ in range(count):
        name = templates.name(rng, taken)
        for form in forms:
            value = templates.value(rng) if kind < 0.65 else templates.name(rng, taken)
            begin = form.index("{value}") - len("{noun}{name}") * ("{noun}" in form) - len("{name}") * ("{noun}" not in form)
            begin += len(name) + len(noun) * ("{noun}" in form)
            pairs.append((form.format(noun=noun, name=name, value=value).encode(), begin, begin + len(value) + 1))
    return pairs


def recall_sequence(templates, rng, length):
    """Name-value pairs, stated again and again in changing order: the densest practice in telling keys apart."""
    pairs = recall_pairs(templates, rng, length)
    pieces, weights, size, repeated = [], [], 0, False
    while size < length + 1:
        for index in rng.permutation(len(pairs)):
            data, begin, stop = pairs[index]
            weight = np.full(len(data), FRAME_WEIGHT, np.float32)
            weight[begin:stop] = ANSWER_WEIGHT if repeated else UNPREDICTABLE_WEIGHT
            weight[begin] = FIRST_BYTE_WEIGHT if repeated else UNPREDICTABLE_WEIGHT
            pieces.append(data)
            weights.append(weight)
            size += len(data)
        repeated = True
    return np.frombuffer(b"".join(pieces)[: length + 1], np.uint8), np.concatenate(weights)[1 : length + 1]


def assemble(filler, events):
    """Inserts events `(position in [0,1], Segment)` into the filler at line ends, in order of position.

    Returns bytes, weights (of each byte as a target) and where each event's data begins.
    """
    order = sorted(range(len(events)), key=lambda index: events[index][0])
    newlines = np.flatnonzero(filler == 10) + 1
    pieces, weights, starts = [], [], [0] * len(events)
    done, size = 0, 0

    def put(data, weight):
        nonlocal size
        pieces.append(data)
        weights.append(weight)
        size += len(data)

    for index in order:
        where, segment = events[index]
        cut = int(where * len(filler))
        at = np.searchsorted(newlines, cut)
        if at < len(newlines) and newlines[at] <= cut + 160:
            cut = int(newlines[at])
        cut = max(cut, done)
        put(filler[done:cut], np.full(cut - done, TEXT_WEIGHT, np.float32))
        done = cut
        if size and pieces and not ends_line(pieces):
            put(np.array([10], np.uint8), np.array([0.0], np.float32))
        starts[index] = size
        put(np.frombuffer(segment.data, np.uint8), segment.weights)
    put(filler[done:], np.full(len(filler) - done, TEXT_WEIGHT, np.float32))
    return np.concatenate(pieces), np.concatenate(weights), starts


def ends_line(pieces):
    for piece in reversed(pieces):
        if len(piece):
            return piece[-1] == 10
    return True


def task_sequence(templates, books, rng, length, share):
    """Several tasks at random depths; about `share` of the bytes belong to tasks."""
    taken, instances, used = set(), [], 0
    while True:
        instance = templates.instance(rng, str(rng.choice(TASKS, p=TASK_SHARES)), taken)
        size = sum(len(part.data) for part in instance.statements) + len(instance.question.data)
        if size > 0.95 * length:
            continue
        if instances and used + size > share * length:
            break
        instances.append(instance)
        used += size
    late = rng.random() < 0.5  # all questions at the end: the longest distances
    early = rng.random() < 0.35  # all statements at the beginning
    events = []
    for instance in instances:
        places = np.sort(rng.random(len(instance.statements)))
        if late:
            places *= 0.97
        if early:
            places *= 0.1
        if rng.random() < EXTREME_SHARE:
            begins = rng.random() < 0.5
            place = 0.01 * rng.random() if begins else 0.965 + 0.01 * rng.random()
            if instance.task == "keys":
                places = rng.permutation(places)
                places[instance.asked] = place
            else:
                places[0 if begins else -1] = place
        low = 0.975 if late else places.max() + 1e-6
        events += list(zip(places, instance.statements))
        events.append((low + (1 - low) * rng.random(), instance.question))
    filler = books.crop(rng, max(64, length - 7 - used))
    data, weights, _ = assemble(filler, events)
    if len(data) < length + 1:
        more = books.crop(rng, length + 1 - len(data))
        data = np.concatenate([more, data])
        weights = np.concatenate([np.full(len(more), TEXT_WEIGHT, np.float32), weights])
    extra = len(data) - (length + 1)
    if extra:  # line breaks were added, or a single task was larger than the sequence: drop the beginning
        data, weights = data[extra:], weights[extra:]
    return data, weights[1:]


def training_batch(templates, books, rng, batch, length, mix):
    """`mix` is the share of (task, recall, copy) sequences; the rest is plain text."""
    data = np.empty((batch, length + 1), np.uint8)
    weights = np.empty((batch, length), np.float32)
    for row in range(batch):
        kind = rng.random()
        if kind < mix[0]:
            share = rng.uniform(0.5, 0.95) if length <= 512 else rng.choice([0.08, 0.3, 0.6, 0.9])
            data[row], weights[row] = task_sequence(templates, books, rng, length, share)
        elif kind < mix[0] + mix[1]:
            data[row], weights[row] = recall_sequence(templates, rng, length)
        elif kind < sum(mix):
            data[row], weights[row] = copy_sequence(templates, rng, length)
        else:
            data[row], weights[row] = text_sequence(books, rng, length)
    return data, weights


def evaluation_case(templates, books, rng, length, task, depth):
    """One task in book text, asked for at the very end; `depth` in [0, 1] places the (first asked) statement.

    Returns `length` bytes, which end with the answer, and the answer's slice.
    """
    instance = templates.instance(rng, task, set())
    used = sum(len(part.data) for part in instance.statements) + len(instance.question.data)
    places = np.sort(rng.random(len(instance.statements))) * 0.98
    if task == "keys":
        places = rng.permutation(places)
    places[instance.asked] = depth * 0.98
    events = list(zip(places, instance.statements)) if task == "keys" else list(zip(np.sort(places), instance.statements))
    events.append((1.0, instance.question))
    filler = books.crop(rng, length - 7 - used)  # leaves room for added line breaks
    data, _, starts = assemble(filler, events)
    answer = instance.question.answer
    stop = starts[-1] + answer.stop
    data = data[max(0, stop - length) : stop]
    return data, slice(len(data) - (answer.stop - answer.start), len(data))
