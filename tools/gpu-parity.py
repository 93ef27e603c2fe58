#!/usr/bin/env python3
"""CPU and CUDA through the same program: logits, selected sets, greedy text. Exit 1 when a bound is exceeded.

    python3 tools/gpu-parity.py [--longan build-cuda/longan] [--smollm2 FILE.gguf] [--jobs 6] [--device cuda]

fixtures  logits of tests/fixtures/tiny-*: prefill and teacher-forced decode in f32 against the CPU and against transformers (1e-3), every
          cache dtype against the CPU with the same cache, --compute auto against f32
hybrid    every case of tests/fixtures/tiny-hybrid/cases: logits (1e-3) and, step for step, the selected sets of the CPU back end; a case
          whose scores come closer than 1e-4 to a tie by rounding alone (margin) may differ in sets and is counted apart
greedy    64 tokens of SmolLM2 with --compute f32: equal ids
"""
import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
FIX = ROOT / "tests" / "fixtures"
PROMPTS = ["The history of the lighthouse begins with", "Once upon a time there was a miller who had three sons, and", "def fibonacci(n):\n"]


class Bench:
    def __init__(self, o, folder):
        self.o, self.folder, self.n = o, pathlib.Path(folder), 0

    def path(self, name):
        self.n += 1
        return str(self.folder / f"{self.n}-{name}")

    def run(self, args):
        p = subprocess.run([self.o.longan] + args, capture_output=True, text=True, timeout=120)
        if p.returncode:
            raise RuntimeError(f"exit {p.returncode}: {' '.join(args)}: {p.stderr.strip()[-300:]}")
        return p.stdout

    def logits(self, device, model, ids, *more):
        out = self.path("logits.npy")
        self.run(["logits", "-m", str(model), "--ids", str(ids), "--device", device, "--threads", "2", "-o", out, *more])
        return np.load(out)


def worst(a, b):
    if a.shape != b.shape:
        return float("inf")
    d = np.abs(a.astype(np.float64) - b.astype(np.float64)).max()
    return float(d) if np.isfinite(d) else float("inf")


def check_fixture(b, folder):
    """(name, difference, bound) lines."""
    ref = json.loads((folder / "ref" / "ref.json").read_text())
    ids, dev, name = folder / "ref" / "prompt.txt", b.o.device, folder.name
    cpu = b.logits("cpu", folder, ids, "--compute", "f32")
    yield f"{name} f32", worst(b.logits(dev, folder, ids, "--compute", "f32"), cpu), 1e-3
    hf = np.load(folder / "ref" / "logits.npy")
    if hf.shape == cpu.shape:
        yield f"{name} f32, transformers", worst(b.logits(dev, folder, ids, "--compute", "f32"), hf), 1e-3
    yield f"{name} f32, decode from 100", worst(b.logits(dev, folder, ids, "--compute", "f32", "--decode-from", "100"), cpu), 1e-3
    for kv in ("f16", "bf16", "q8"):  # the same rounding of the cache on both sides: what differs is a value on the edge between two codes
        a = b.logits("cpu", folder, ids, "--compute", "f32", "--kv", kv)
        yield f"{name} f32, {kv} cache", worst(b.logits(dev, folder, ids, "--compute", "f32", "--kv", kv), a), ref["kv"][kv]
        yield f"{name} f32, {kv} cache, decode", worst(b.logits(dev, folder, ids, "--compute", "f32", "--kv", kv, "--decode-from", "100"), a), ref["kv"][kv]
    auto = ref["weights"]["bf16"] + ref["kv"]["bf16"]
    yield f"{name} auto", worst(b.logits(dev, folder, ids, "--compute", "auto"), cpu), auto
    yield f"{name} auto, decode from 100", worst(b.logits(dev, folder, ids, "--compute", "auto", "--decode-from", "100"), cpu), auto


def check_hybrid(b, case):
    model = FIX / "tiny-hybrid"
    ids = b.path("ids.txt")
    pathlib.Path(ids).write_text(" ".join(map(str, case["ids"])))
    args = ["--compute", "f32", "--roles", str(model / "roles" / (case["roles"] + ".json")), "--roles-any-model", "--decode-from",
            str(case["decode_from"]), "--rule", case["rule"], "--sinks", str(case["sinks"]), "--recents", str(case["recents"]),
            "--block", str(case["block"])]
    if case["budget"] is not None:
        args += ["--budget", str(case["budget"])]
    if case["rule"] != "topk":
        args += ["--rule-value", repr(case["rule_value"])]
    if case["rule_scale"]:
        args += ["--rule-scale", repr(case["rule_scale"])]
    if case["correct_every"]:
        args += ["--correct-every", str(case["correct_every"]), "--correct", case["correct"]]
    got = []
    for device in ("cpu", b.o.device):
        sets = b.path("sets.jsonl")
        got.append((b.logits(device, model, ids, *args, "--sets", sets), [json.loads(x) for x in open(sets, encoding="utf-8")]))
    close = case["margin"] is not None and case["margin"] < 1e-4
    yield f"hybrid {case['name']}", worst(got[0][0], got[1][0]), float("inf") if close else 1e-3
    n = sum(x != y for x, y in zip(got[0][1], got[1][1])) + abs(len(got[0][1]) - len(got[1][1]))
    yield f"hybrid {case['name']}, steps with other sets", n, float("inf") if close else 0


def check_greedy(b, prompt):
    ids = []
    for device in ("cpu", b.o.device):
        out = b.run(["generate", "-m", b.o.smollm2, "-p", prompt, "-n", "64", "--compute", "f32", "--device", device, "--threads", "4", "--json"])
        ids.append(json.loads(out)["ids"])
    same = next((i for i, (x, y) in enumerate(zip(*ids)) if x != y), min(map(len, ids)))
    yield f"SmolLM2 greedy {prompt[:20]!r}: ids after the first difference", max(map(len, ids)) - same, 0


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--longan", default=str(ROOT / "build-cuda" / "longan"))
    p.add_argument("--smollm2", default=os.environ.get("LONGAN_SMOLLM2"))
    p.add_argument("--jobs", type=int, default=6)
    p.add_argument("--device", default="cuda")
    o = p.parse_args()
    failed = done = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(o.jobs) as pool:
        b = Bench(o, folder)
        work = [(check_fixture, f) for f in sorted(FIX.glob("tiny-*")) if (f / "ref" / "ref.json").exists()]
        work += [(check_hybrid, c) for c in json.loads((FIX / "tiny-hybrid" / "cases" / "cases.json").read_text())]
        if o.smollm2:
            work += [(check_greedy, x) for x in PROMPTS]
        else:
            print("SmolLM2 skipped: no --smollm2 and no LONGAN_SMOLLM2")

        def call(job):
            lines = []
            try:
                for line in job[0](b, job[1]):
                    lines.append(line)
            except Exception as e:  # one broken case must not hide the others
                what = job[1]["name"] if isinstance(job[1], dict) else str(job[1])
                lines.append((f"{what}: {e}", float("nan"), 0))
            return lines

        for lines in pool.map(call, work):
            for name, value, bound in lines:
                ok = value <= bound
                done += 1
                failed += not ok
                print(f"{'ok' if ok else 'FAILED':<7}{name:<60} {value:.3g} (bound {bound:.3g})", flush=True)
    print(f"parity: {done} comparisons, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
