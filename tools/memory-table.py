#!/usr/bin/env python3
"""What memory slots keep, by ratio and number of rivals, beside the same model with the text in its window and without text.

    tools/memory-table.py LONGAN MODEL ADAPTER TEXT DIR [--device D] [--questions 96] [--rivals 1,2,4,8,16] [--seed 7] [--csv FILE]

Chunks of exactly 1024 tokens of TEXT, each with K people of one kind of fact (K - 1 rivals, so the kind alone cannot answer), made by
make-facts.py's generator from another seed than the demo's. Every person is asked for. Exact match of the first line:
  slots r    one bank of all chunks of a K, 1024 / r slots each; lookup reads the chunk that BM25 ranks first ("chunk found": the right one)
  text       three examples of sentence, question and answer, then the chunk's text, then the question: no adapter
  none       the same examples and the question, no text"""
import argparse
import importlib.util
import json
import pathlib
import random
import subprocess

CHUNK = 1024
spec = importlib.util.spec_from_file_location("facts", pathlib.Path(__file__).with_name("make-facts.py"))
facts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(facts)


def run(args, **kw):
    return subprocess.run([str(a) for a in args], stdout=subprocess.PIPE, check=True, **kw).stdout


def tokenize(a, text):
    return run([a.longan, "tokenize", "-m", a.model], input=text.encode()).split()


def person(r, names, kind):
    name, value = next(names), facts.value(kind, r)
    templates, ask = facts.KINDS[kind]
    return {"sentence": r.choice(templates).format(n=name, v=value), "question": ask.format(n=name), "answer": value}


def chunk_of(a, r, names, kind, k, base):
    """Ids of one chunk and its people. The sentences stand in the first part of the text, so that the cut to 1024 ids loses none."""
    people = [person(r, names, kind) for _ in range(k)]
    plain = " ".join(base.split(" ")[:1200])
    room, out, at = 2400, "", 0
    for place, p in zip(sorted(r.sample(range(room // 40), k)), people):
        cut = plain.find(" ", place * 40)
        out += plain[at:cut + 1] + p["sentence"] + " "
        at = cut + 1
    ids = tokenize(a, out + plain[at:])[:CHUNK]
    assert len(ids) == CHUNK, len(ids)
    text = run([a.longan, "tokenize", "-m", a.model, "--decode"], input=b" ".join(ids)).decode("utf-8", "replace")
    assert all(p["sentence"] in text for p in people)
    return ids, text, people


def right(answers, people):
    return sum(x.strip().split("\n")[0].strip() == p["answer"] for x, p in zip(answers, people))


def lookup(a, chunks, people, ratio):
    """Answers, and for how many questions the gate chose the chunk of that person."""
    (a.dir / "chunks.ids").write_bytes(b" ".join(b" ".join(ids) for ids in chunks))
    questions = a.dir / "questions.jsonl"
    questions.write_text("".join(json.dumps({"question": p["question"]}) + "\n" for p in people))
    common = ["-m", a.model, "--adapter", a.adapter, "--device", a.device]
    bank = a.dir / ("r%d.bank" % ratio)
    bank.unlink(missing_ok=True)
    run([a.longan, "bank", "build", "--ids", a.dir / "chunks.ids", "-o", bank, "--chunk", CHUNK, "--window", CHUNK, "--ratio", ratio] + common, stderr=subprocess.DEVNULL)
    out = run([a.longan, "ask", bank, "--mode", "lookup", "--top", 1, "--parallel", 16, "--questions", questions] + common, stderr=subprocess.DEVNULL)
    answers = [json.loads(line) for line in out.splitlines()]
    return [x["answer"] for x in answers], sum(x["steps"][0]["chunk"] == p["chunk"] for x, p in zip(answers, people))


def generate(a, prompts):
    batch = a.dir / "prompts.jsonl"
    batch.write_text("".join(json.dumps({"prompt": p, "n": 16}) + "\n" for p in prompts))
    out = run([a.longan, "generate", "-m", a.model, "--device", a.device, "--batch", batch, "--parallel", 8, "--stop", "\n", "--json"], stderr=subprocess.DEVNULL)
    return [json.loads(line)["text"] for line in out.splitlines()]


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("longan", "model", "adapter"):
        ap.add_argument(name)
    ap.add_argument("text", type=pathlib.Path)
    ap.add_argument("dir", type=pathlib.Path)
    ap.add_argument("--device", default="cpu")
    ap.add_argument("--questions", type=int, default=96)
    ap.add_argument("--rivals", default="1,2,4,8,16", help="people a chunk")
    ap.add_argument("--seed", type=int, default=7)
    ap.add_argument("--csv", type=pathlib.Path)
    a = ap.parse_args()
    a.dir.mkdir(parents=True, exist_ok=True)
    r = random.Random(a.seed)
    names = facts.people(r)
    text = a.text.read_text(encoding="utf-8", errors="replace")
    kinds = list(facts.KINDS)
    rows = ["people,questions,slots_ratio4,slots_ratio8,chunk_found,text_few_shot,no_text"]
    print("| people a chunk | questions | chunk found | slots, ratio 4 | slots, ratio 8 | full text, few-shot | no text |\n|---|---|---|---|---|---|---|")
    for k in (int(x) for x in a.rivals.split(",")):
        chunks, prompts, bare, everyone, hits, found = [], [], [], [], {}, 0
        for i in range(-(-a.questions // k)):
            kind = kinds[i % len(kinds)]
            at = r.randrange(len(text) - 20000)
            ids, body, people = chunk_of(a, r, names, kind, k, text[text.find(" ", at) + 1:at + 20000])
            shots = [person(r, names, kind) for _ in range(3)]
            head = "".join("%s\nQuestion: %s\nAnswer: %s\n\n" % (s["sentence"], s["question"], s["answer"]) for s in shots)
            prompts += ["%s%s\nQuestion: %s\nAnswer:" % (head, body, p["question"]) for p in people]
            bare += ["%sQuestion: %s\nAnswer:" % (head, p["question"]) for p in people]
            everyone += [dict(p, chunk=i) for p in people]
            chunks.append(ids)
        for ratio in (4, 8):
            answers, found = lookup(a, chunks, everyone, ratio)
            hits[ratio] = right(answers, everyone)
        full, none = right(generate(a, prompts), everyone), right(generate(a, bare), everyone)
        n = len(everyone)
        print("| %d | %d | %d | " % (k, n, found) + " | ".join("%.1f%%" % (100 * x / n) for x in (hits[4], hits[8], full, none)) + " |", flush=True)
        rows.append("%d,%d,%d,%d,%d,%d,%d" % (k, n, hits[4], hits[8], found, full, none))
    if a.csv:
        a.csv.write_text("\n".join(rows) + "\n")


main()
