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

FIRST = ["Ald", "Ber", "Cor", "Dar", "El", "Fen", "Gar", "Hol", "Is", "Jor", "Kel", "Lor", "Mar", "Nor", "Or", "Per", "Quin", "Ros", "Sel", "Tam", "Ul", "Ver", "Wen", "Yor"]
FIRST_END = ["a", "an", "ena", "eth", "ia", "in", "is", "o", "on", "wyn", "mund", "rick"]
LAST = ["Ash", "Bram", "Cald", "Dun", "Ever", "Fal", "Gold", "Hart", "Ing", "Kest", "Lang", "Mor", "Nath", "Oak", "Pem", "Rav", "Stan", "Thorn", "Und", "Wat"]
LAST_MID = ["a", "e", "en", "er", "i", "in", "o", "ow", "u"]
LAST_END = ["beck", "by", "dale", "feld", "gate", "ley", "mere", "more", "sby", "stone", "ton", "worth"]
TOWN = ["Ard", "Bel", "Crom", "Dov", "Elm", "Frost", "Glen", "Hazel", "Iver", "Kings", "Lamb", "Mill", "New", "Old", "Pine", "Red", "Swan", "Till", "Wind", "Yew"]
TOWN_END = ["bourne", "bridge", "combe", "cross", "field", "ford", "haven", "hill", "minster", "pool", "stead", "wick"]
# Closed lists: the shipped weights know common words here; an uncommon one they replace by one they were trained on (docs/MEMORY.md).
TRADES = ["baker", "barber", "butcher", "carpenter", "cook", "doctor", "farmer", "gardener", "lawyer", "miner", "nurse", "painter", "pilot", "sailor", "tailor", "teacher"]
PETS = ["cat", "cow", "dog", "duck", "fox", "goat", "goose", "hamster", "horse", "monkey", "mouse", "owl", "parrot", "pig", "rabbit", "snake", "tiger", "turtle", "wolf"]
FIRM_END = ["Foods", "Group", "Labs", "Motors", "Steel", "Trading"]


def cap(parts):
    return "".join(parts).capitalize()


def value(kind, r):
    if kind == "town":
        return r.choice(TOWN) + r.choice(TOWN_END)
    if kind == "trade":
        return r.choice(TRADES)
    if kind == "year":
        return str(r.randint(1800, 1999))
    if kind == "pet":
        return r.choice(PETS)
    if kind == "firm":
        return cap([r.choice(LAST), r.choice(LAST_MID), r.choice(["n", "l", "x", "s"])]) + " " + r.choice(FIRM_END)
    return str(r.randint(100000, 999999))


KINDS = {
    "town": (["{n} was born in {v}.", "{n} was born in the village of {v}."], "Where was {n} born?"),
    "trade": (["{n} works as a {v}."], "What does {n} do for a living?"),
    "year": (["{n} graduated in {v}.", "In {v}, {n} graduated."], "In which year did {n} graduate?"),
    "pet": (["{n} owns a {v}.", "{n} keeps a {v} at home."], "What pet does {n} have?"),
    "firm": (["{n} is employed by {v}.", "{n} has a job at {v}."], "Which company employs {n}?"),
    "code": (["{n}'s locker code is {v}.", "{n} uses the locker code {v}."], "What is the locker code of {n}?"),
}


def people(r):
    seen = set()
    while True:
        name = r.choice(FIRST) + r.choice(FIRST_END) + " " + r.choice(LAST) + r.choice(LAST_MID) + r.choice(LAST_END)
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
