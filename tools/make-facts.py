#!/usr/bin/env python3
"""Plants generated facts about invented people in a long text, for scripts/demo-memory.sh.

    python3 tools/make-facts.py TEXT DIR --facts N [--seed S]

Writes DIR/text.txt (the text with N sentences put in at blanks, spread evenly with jitter), DIR/questions.jsonl
({"question": ...} a line) and DIR/facts.json ([{question, answer, sentence, byte}], byte: where the sentence
begins in text.txt). Everything depends on the seed alone. Names and values are made here from syllables and
lists of this file; every name is used once."""
import argparse
import json
import pathlib
import random

# Names and open values are made of plain syllables (onset and vowel) with an ending: what the shipped weights were trained to carry. Other
# invented words (English compounds such as Millhaven) come back with a letter wrong far more often (docs/MEMORY.md).
ONSETS = "b c d f g h j k l m n p r s t v w z bl br cr dr fl fr gl gr kr pl pr sh sl st th tr".split()
VOWELS = "a a a e e e i i o o o u u ai ea ia io ou".split()
GIVEN_END = ["", "", "la", "len", "lis", "na", "ne", "ra", "rin", "ron", "s", "vin"]
GIVEN = ["Agnes", "Alice", "Arthur", "Clara", "Edward", "Frances", "George", "Helen", "Henry", "Martin", "Peter", "Rachel"]  # one in eight
FAMILY_END = ["der", "dez", "feld", "ford", "ley", "lin", "man", "rini", "ski", "son", "ton", "well"]
TOWN_END = ["", "burg", "by", "field", "grad", "ham", "mouth", "stad", "ville"]
# Closed lists: the shipped weights know common words here; an uncommon one they replace by one they were trained on.
TRADES = ["baker", "barber", "butcher", "carpenter", "cook", "doctor", "engineer", "farmer", "judge", "lawyer", "miner", "nurse", "painter", "pilot", "sailor", "singer", "tailor", "teacher", "writer"]
PETS = ["cat", "cow", "dog", "duck", "fox", "goat", "goose", "hamster", "horse", "monkey", "mouse", "parrot", "pig", "rabbit", "snake", "tiger", "wolf"]
FIRM_END = ["Group", "Labs", "Media", "Motors", "Press", "Steel", "Trading"]


def syllables(r, n):
    return "".join(r.choice(ONSETS) + r.choice(VOWELS) for _ in range(n))


def value(kind, r):
    if kind == "town":
        return (syllables(r, 2) + r.choice(TOWN_END)).capitalize()
    if kind == "trade":
        return r.choice(TRADES)
    if kind == "year":
        return str(r.randint(1850, 2020))
    if kind == "pet":
        return r.choice(PETS)
    if kind == "firm":
        return (syllables(r, 2) + r.choice("dklmnrstx")).capitalize() + " " + r.choice(FIRM_END)
    return str(r.randint(100000, 999999))


KINDS = {
    "town": (["{n} was born in {v}.", "{n} was born in the town of {v}.", "The birthplace of {n} is {v}."], "Where was {n} born?"),
    "trade": (["{n} works as a {v}.", "For a living, {n} is a {v}."], "What does {n} do for a living?"),
    "year": (["{n} graduated in {v}.", "In {v}, {n} graduated."], "In which year did {n} graduate?"),
    "pet": (["{n} owns a {v}.", "{n} keeps a {v} at home."], "What pet does {n} have?"),
    "firm": (["{n} is employed by {v}.", "{n} has a job at {v}."], "Which company employs {n}?"),
    "code": (["{n}'s locker code is {v}.", "The locker code of {n} is {v}."], "What is the locker code of {n}?"),
}


def people(r):
    seen = set()
    while True:
        given = r.choice(GIVEN) if r.random() < 0.125 else (syllables(r, 2) + r.choice(GIVEN_END)).capitalize()
        name = given + " " + (syllables(r, 2) + r.choice(FAMILY_END)).capitalize()
        if name not in seen:
            seen.add(name)
            yield name


def plant(text, n, seed):
    r = random.Random(seed)
    names = people(r)
    step = len(text) / n
    out, facts, at, size = [], [], 0, 0
    for i in range(n):
        kind = r.choice(list(KINDS))
        templates, ask = KINDS[kind]
        name, v = next(names), value(kind, r)
        if name in text:
            continue
        sentence = r.choice(templates).format(n=name, v=v)
        place = text.find(" ", int((i + r.uniform(0.1, 0.9)) * step))
        if place < at:
            continue
        piece = text[at:place + 1]
        out += [piece, sentence, " "]
        size += len(piece.encode())
        facts.append({"question": ask.format(n=name), "answer": v, "sentence": sentence, "byte": size})
        size += len(sentence.encode()) + 1
        at = place + 1
    out.append(text[at:])
    return "".join(out), facts


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("text", type=pathlib.Path)
    ap.add_argument("dir", type=pathlib.Path)
    ap.add_argument("--facts", type=int, required=True)
    ap.add_argument("--seed", type=int, default=1)
    a = ap.parse_args()
    a.dir.mkdir(parents=True, exist_ok=True)
    text, facts = plant(a.text.read_text(encoding="utf-8", errors="replace"), a.facts, a.seed)
    data = text.encode()
    for f in facts:
        assert data[f["byte"]:].startswith(f["sentence"].encode())
    (a.dir / "text.txt").write_bytes(data)
    (a.dir / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    (a.dir / "questions.jsonl").write_text("".join(json.dumps({"question": f["question"]}) + "\n" for f in facts))
    print(f"{len(facts)} facts in {len(data)} bytes")


if __name__ == "__main__":
    main()
