#!/usr/bin/env python3
"""Longan beside the strongest plain PyTorch on one GPU: one run, interleaved, one table.

    python3 bench/vs_torch.py [--longan build-cuda/longan] [--smollm2 FILE.gguf] [--only dense,hybrid,q4,million,batch,prefill,smollm2]
                              [--rounds 2] [--steps 16] [--limit SECONDS] [--csv FILE] [--json FILE]

Llama-3-8B shape with random weights and a randomly filled cache on both sides (longan bench --shape llama3-8b --synthetic; the peer is
bench/torch_decode.py in this process). In every round each of Longan's commands stands next to the peer's case; the side that begins
changes from round to round. A figure is the median over the rounds of each side's median step.

floor    bytes that must be read (weights once, K and V as the heads read them) over this card's measured copy bandwidth; prefill:
         operations over the measured bf16 product rate
must     the project's mark, given for an H200 (copy 4.30 TB/s) as a multiple of the floor and kept as that multiple here
ratio    peer's time over Longan's; `own`: Longan's dense decode with the same weights over its hybrid decode
Every measurement goes to the CSV, and as JSON lines with what the two sides printed to --json. After --limit seconds no new command
starts, and the rows that are missing are named."""
import argparse
import csv
import json
import os
import pathlib
import statistics
import subprocess
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import torch
import torch_decode
from torch_decode import size

LAYERS, HEADS, KV, HD, HIDDEN, FF, VOCAB = 32, 32, 8, 128, 4096, 14336, 128256
PER_LAYER = HIDDEN * (HEADS + 2 * KV) * HD + HEADS * HD * HIDDEN + 3 * HIDDEN * FF
WEIGHT = {"bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}   # bytes an element
ROW = {"bf16": 2 * HD, "q8": HD + 2 * HD // 32}             # bytes of one K or V row
H200_COPY, H200_PRODUCT = 4.30e12, 772e12

# id, group, weights, cache, depth, batch, retrieval heads
COMMANDS = [
    ("d8", "dense", "bf16", "bf16", "8k", 1, 0), ("d32", "dense", "bf16", "bf16", "32k", 1, 0), ("d128", "dense", "bf16", "bf16", "128k", 1, 0),
    ("h128", "hybrid", "bf16", "bf16", "128k", 1, 32), ("h128n12", "hybrid", "bf16", "bf16", "128k", 1, 12),
    ("q128", "q4", "q4_0", "bf16", "128k", 1, 32), ("q128n12", "q4", "q4_0", "bf16", "128k", 1, 12),
    ("b8", "batch", "bf16", "bf16", "32k", 8, 32), ("b8n12", "batch", "bf16", "bf16", "32k", 8, 12),
    ("m1", "million", "q4_0", "q8", "1m", 1, 32), ("m1n12", "million", "q4_0", "q8", "1m", 1, 12),
]
# command, mode, text, floor and must on an H200 (ms), must against own dense, must against the peer
ROWS = [
    ("d128", "dense", "dense bf16, 128K", 7.49, 8.3, None, None),
    ("d32", "dense", "dense bf16, 32K", 4.49, 5.1, None, None),
    ("d8", "dense", "dense bf16, 8K", 3.74, 4.4, None, None),
    ("h128", "hybrid", "hybrid bf16, 32 heads, 128K", 4.10, 4.8, None, 2.0),
    ("h128n12", "hybrid", "hybrid bf16, 12 heads, 128K", None, None, None, None),
    ("q128", "dense", "dense 4-bit, 128K", None, None, None, None),
    ("q128", "hybrid", "hybrid 4-bit, 32 heads, 128K", 1.6, 2.3, 2.7, 4.1),
    ("q128n12", "hybrid", "hybrid 4-bit, 12 heads, 128K", None, None, None, None),
    ("m1", "dense", "dense 4-bit, q8 cache, 1M", None, None, None, None),
    ("m1", "hybrid", "hybrid 4-bit, q8, 32 heads, 1M", 3.0, 4.2, None, None),
    ("m1n12", "hybrid", "hybrid 4-bit, q8, 12 heads, 1M", None, None, None, None),
    ("b8", "dense", "dense bf16, batch 8 at 32K", None, None, None, None),
    ("b8", "hybrid", "hybrid bf16, 32 heads, batch 8", None, None, 1.7, 2.0),
    ("b8n12", "hybrid", "hybrid bf16, 12 heads, batch 8", None, None, None, None),
]
PEER = {"d8": (1, "8k"), "d32": (1, "32k"), "d128": (1, "128k"), "h128": (1, "128k"), "h128n12": (1, "128k"), "q128": (1, "128k"), "q128n12": (1, "128k"),
        "b8": (8, "32k"), "b8n12": (8, "32k")}
PREFILL = 32768


def bytes_of(weights, cache, depth, batch, retrieval, budget):
    """Least bytes of a step; retrieval 0: dense. As in shared/specs: sets of `budget` tokens for all other heads."""
    matrices = WEIGHT[weights] * (LAYERS * PER_LAYER + VOCAB * HIDDEN)
    n = LAYERS * KV
    tokens = n * depth if not retrieval else retrieval * depth + (n - retrieval) * min(budget, depth)
    return matrices + batch * tokens * 2 * ROW[cache]


class Watch(threading.Thread):
    """Greatest use of device memory beyond this process's own while it runs."""

    def __init__(self):
        super().__init__(daemon=True)
        free, self.total = torch.cuda.mem_get_info()
        self.before, self.most, self.on = self.total - free, 0, True

    def run(self):
        while self.on:
            free, total = torch.cuda.mem_get_info()
            self.most = max(self.most, total - free - self.before)
            time.sleep(0.05)

    def stop(self):
        self.on = False
        self.join()
        return self.most


class Run:
    def __init__(self, o):
        self.o, self.began, self.late = o, time.time(), []
        self.records, self.ms, self.extra = [], {}, {}
        self.json = open(o.json, "w", encoding="utf-8") if o.json else None
        self.peer, self.fastest = None, {}

    def say(self, text):
        print(f"[{time.time() - self.began:4.0f} s] {text}", file=sys.stderr, flush=True)

    def in_time(self, name):
        if time.time() - self.began < self.o.limit:
            return True
        self.late.append(name)
        return False

    def keep(self, who, name, mode, ms, record):
        self.ms.setdefault((who, name, mode), []).append(ms)
        self.records.append((len(self.ms[(who, name, mode)]), who, name, mode, ms, record))
        if self.json:
            self.json.write(json.dumps({"who": who, "row": name, "mode": mode, **record}) + "\n")
            self.json.flush()

    def longan(self, name, args):
        """Runs `longan bench`; its JSON lines by mode. A failure is printed and leaves the row empty."""
        command = [self.o.longan, "bench", "--device", "cuda", "--json"] + args
        self.say(" ".join(command))
        watch = Watch()
        watch.start()
        try:
            p = subprocess.run(command, capture_output=True, text=True, timeout=self.o.command_limit)
        except subprocess.TimeoutExpired:
            watch.stop()
            self.say(f"FAILED {name}: no end within {self.o.command_limit} s")
            return []
        peak = watch.stop()
        if p.returncode:
            self.say(f"FAILED {name}: exit {p.returncode}: {p.stderr.strip().splitlines()[-1] if p.stderr.strip() else ''}")
            return []
        lines = [json.loads(line) for line in p.stdout.splitlines() if line.startswith("{")]
        for r in lines:
            r["device_bytes_peak"] = peak
            self.extra.setdefault((name, r["mode"]), r)
            if r.get("decode_ms") is not None:
                self.keep("longan", name, r["mode"], r["decode_ms"], r)
        return lines

    def torch_decode(self, batch, depth, steps):
        name = f"{batch}x{depth}"
        self.say(f"peer {name}")
        results = self.peer.decode(batch, size(depth), steps, self.copy, self.fastest.get(name))
        best = [r for r in results if self.log_peer(name, r) and r.get("best")]
        if best:
            self.fastest[name] = best[0]["sdpa"]  # later rounds need only this one
            self.keep("torch", name, "dense", best[0]["ms"], best[0])

    def log_peer(self, name, r):
        self.say(f"  {name} {r['sdpa']}: " + (f"{r['ms']:.2f} ms" if "ms" in r else f"{r['s']:.3f} s" if "s" in r else r["error"]))
        return True

    def median(self, who, name, mode):
        v = self.ms.get((who, name, mode))
        return statistics.median(v) if v else None


def decode_args(c, o):
    _, _, weights, cache, depth, batch, retrieval = c
    args = ["--shape", "llama3-8b", "--weights", weights, "--kv", cache, "--depth", depth, "--synthetic", "--batch", str(batch),
            "--steps", str(o.steps)]
    return args + ["--retrieval", str(retrieval)] + (["--budget", str(o.budget)] if retrieval else [])


def decode_rows(run, groups):
    o = run.o
    commands = [c for c in COMMANDS if c[1] in groups and c[1] != "million"]
    for r in range(o.rounds):
        done = set()
        for c in commands:
            case = PEER.get(c[0])
            turns = [lambda: run.torch_decode(*case, 20)] if case and case not in done else []
            done.add(case)
            own = lambda: run.longan(c[0], decode_args(c, o))
            turns = [own] + turns if r % 2 else turns + [own]
            if run.in_time(c[0]):
                for turn in turns:
                    turn()


def prefill_rows(run):
    o = run.o
    for r in range(o.rounds):
        if not run.in_time("prefill"):
            return

        def own():
            for line in run.longan("prefill", ["--shape", "llama3-8b", "--weights", "bf16", "--kv", "bf16", "--prefill", str(PREFILL), "--depth", "512",
                                               "--reps", "1", "--steps", "1", "--retrieval", "0"]):
                if line["mode"] == "dense" and line.get("prefill_n_tok_s"):
                    run.keep("longan", "prefill32k", "prefill", 1e3 * PREFILL / line["prefill_n_tok_s"], line)

        def other():
            run.say("peer prefill 32K")
            for x in run.peer.prefill(PREFILL, reps=1):
                run.log_peer("prefill", x)
                if x.get("best"):
                    run.keep("torch", "prefill32k", "prefill", 1e3 * x["s"], x)

        for turn in ([own, other] if r % 2 else [other, own]):
            turn()


def million_rows(run):
    for c in COMMANDS:
        if c[1] == "million" and run.in_time(c[0]):
            run.longan(c[0], decode_args(c, run.o))  # once: no peer fits, and filling takes long


def smollm2_rows(run):
    if not run.o.smollm2:
        run.say("SmolLM2 skipped: --smollm2 or LONGAN_SMOLLM2 names no file")
        return
    peer = torch_decode.Peer("smollm2-135m")
    for r in range(run.o.rounds):
        if not run.in_time("smollm2"):
            break

        def other():
            best = [x for x in peer.decode(1, 4096, 50) if run.log_peer("SmolLM2 4K", x) and x.get("best")]
            if best:
                run.keep("torch", "smollm2", "dense", best[0]["ms"], best[0])

        def own():
            run.longan("smollm2", ["-m", run.o.smollm2, "--depth", "4k", "--synthetic", "--steps", "64"])

        for turn in ([own, other] if r % 2 else [other, own]):
            turn()
    peer.close()


def number(x, form):
    return format(x, form) if x is not None else "-"


def table(run, groups):
    o, product = run.o, run.product
    by_id = {c[0]: c for c in COMMANDS}
    head = f"{'what':<33}{'floor':>8}{'must':>8}{'Longan':>9}{'GB':>7}{'share':>7}{'peer':>8}{'ratio':>7}{'own':>6}  verdict"
    print(head)
    print("-" * len(head))
    missing = 0
    for name, mode, text, floor_h200, must_h200, must_own, must_peer in ROWS:
        _, group, weights, cache, depth, batch, retrieval = by_id[name]
        if group not in groups:
            continue
        n_bytes = bytes_of(weights, cache, size(depth), batch, retrieval if mode == "hybrid" else 0, o.budget)
        floor = n_bytes / run.copy * 1e3
        must = floor * must_h200 / floor_h200 if must_h200 else None
        ms, dense = run.median("longan", name, mode), run.median("longan", name, "dense")
        case = PEER.get(name)
        peer = run.median("torch", f"{case[0]}x{case[1]}", "dense") if case else None
        own = dense / ms if ms and dense and mode == "hybrid" else None
        ratio = peer / ms if ms and peer else None
        marks = []
        if ms is None:
            missing += 1
            marks.append("not measured")
        else:
            if must:
                marks.append("must reached" if ms <= must else f"{ms / must:.2f}x of must")
            if must_own and own:
                marks.append(f"own {own:.2f} of {must_own}")
            if must_peer and ratio:
                marks.append(f"peer {ratio:.2f} of {must_peer}")
            if group == "million":
                marks.append(f"{run.extra[(name, mode)]['device_bytes_peak'] / 1e9:.1f} GB of device memory")
        print(f"{text:<33}{floor:>8.2f}{number(must, '.2f'):>8}{number(ms, '.3f'):>9}{n_bytes / 1e9:>7.2f}"
              f"{number(100 * floor / ms if ms else None, '.0f'):>6}%{number(peer, '.2f'):>8}{number(ratio, '.2f'):>7}{number(own, '.2f'):>6}  {', '.join(marks)}")
    if "prefill" in groups:
        flop = 2.0 * PREFILL * LAYERS * PER_LAYER + 4.0 * HD * HEADS * LAYERS * PREFILL * (PREFILL + 1) / 2
        ms, peer = run.median("longan", "prefill32k", "prefill"), run.median("torch", "prefill32k", "prefill")
        share = flop / (ms / 1e3) / product if ms else None
        missing += ms is None
        print(f"{'prefill 32K bf16 (s)':<33}{flop / product:>8.2f}{flop / product / 0.55:>8.2f}{number(ms / 1e3 if ms else None, '.3f'):>9}{'-':>7}"
              f"{number(100 * share if ms else None, '.0f'):>6}%{number(peer / 1e3 if peer else None, '.2f'):>8}{number(peer / ms if ms and peer else None, '.2f'):>7}{'-':>6}"
              f"  {'not measured' if ms is None else 'must reached' if share >= 0.55 else f'{100 * share:.0f}% of the product rate, must 55%'}")
    if "smollm2" in groups and o.smollm2:
        ms, peer = run.median("longan", "smollm2", "dense"), run.median("torch", "smollm2", "dense")
        missing += ms is None
        print(f"{'SmolLM2-135M, 4K (token/s)':<33}{'-':>8}{1000:>8}{number(1e3 / ms if ms else None, '.0f'):>9}{'-':>7}{'-':>7}{number(1e3 / peer if peer else None, '.0f'):>8}"
              f"{number(peer / ms if ms and peer else None, '.2f'):>7}{'-':>6}  {'not measured' if ms is None else 'must reached' if ms <= 1.0 else 'below 1000 token/s'}")
    print(f"\n{torch.cuda.get_device_name()}; copy {run.copy / 1e12:.2f} TB/s, bf16 8192^3 product {product / 1e12:.0f} TFLOP/s; torch {torch.__version__};"
          f" {o.rounds} rounds, {time.time() - run.began:.0f} s; ms a step unless said, musts scaled from an H200")
    if run.late:
        print("no time left for:", ", ".join(dict.fromkeys(run.late)))
    return missing


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--longan", default="build-cuda/longan")
    p.add_argument("--smollm2", default=os.environ.get("LONGAN_SMOLLM2"))
    p.add_argument("--only", default="dense,hybrid,q4,batch,prefill,smollm2,million")
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--steps", type=int, default=16)
    p.add_argument("--budget", type=int, default=4096)
    p.add_argument("--limit", type=float, default=480, help="seconds after which no new command starts")
    p.add_argument("--command-limit", type=float, default=150, help="seconds for one command of Longan")
    p.add_argument("--csv", default="vs_torch.csv")
    p.add_argument("--json")
    o = p.parse_args()
    groups = o.only.split(",")
    known = {c[1] for c in COMMANDS} | {"prefill", "smollm2"}
    if set(groups) - known:
        p.error("--only: unknown: " + ", ".join(sorted(set(groups) - known)))
    if not torch.cuda.is_available():
        sys.exit("vs_torch: PyTorch sees no CUDA device")
    if not os.access(o.longan, os.X_OK):
        sys.exit(f"vs_torch: no program at {o.longan} (make cuda)")
    run = Run(o)
    run.copy, run.product = torch_decode.ceilings()
    run.say(f"copy {run.copy / 1e12:.2f} TB/s, product {run.product / 1e12:.0f} TFLOP/s")
    if set(groups) & {"dense", "hybrid", "q4", "batch", "prefill"}:
        run.peer = torch_decode.Peer("llama3-8b")
        decode_rows(run, groups)
        if "prefill" in groups:
            prefill_rows(run)
        run.peer.close()
    if "smollm2" in groups:
        smollm2_rows(run)
    if "million" in groups:
        million_rows(run)
    with open(o.csv, "w", newline="", encoding="utf-8") as f:
        w = csv.writer(f)
        w.writerow(["round", "side", "row", "mode", "ms", "ms_min", "bytes", "prefill_tok_s", "n_retrieval", "budget", "device_bytes_peak", "sdpa", "commit"])
        for r, who, name, mode, ms, x in run.records:
            w.writerow([r, who, name, mode, f"{ms:.4f}", x.get("decode_ms_min", x.get("ms_min")), x.get("bytes_per_token", x.get("bytes")),
                        x.get("prefill_n_tok_s", x.get("tok_s")), x.get("n_retrieval"), x.get("budget"), x.get("device_bytes_peak"), x.get("sdpa"), x.get("commit")])
    sys.exit(1 if table(run, groups) else 0)


if __name__ == "__main__":
    main()
