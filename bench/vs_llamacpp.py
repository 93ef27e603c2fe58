#!/usr/bin/env python3
"""Longan beside llama.cpp on the CPU: prefill, dense decode, hybrid decode; one run, interleaved.

    python bench/vs_llamacpp.py MODEL.gguf [--roles roles/FILE.json] [--reps 5] [--csv FILE] [--only prefill,decode,...]

Needs llama-cpp-python (0.3.x); build it with clang, or without AMX: gcc 12 miscompiles its AMX kernels, which then
crash. Both sides use the same number of threads and an f16 cache; llama.cpp runs with flash attention, 512-token
micro-batches, and times a call as ../shared/peers/llamacpp.py does. In each repetition the two sides take turns, and
the one that begins changes; a ratio is the median of the ratios of neighbours, its spread the least and the greatest.
Threads are bound to cores (OMP_PROC_BIND, for both) unless the environment says otherwise.

prefill  2048 random ids into an empty cache. Q4_1 is MODEL itself; Q4_0 and Q8_0 are made of it by `longan convert`,
         and both sides read the same files.
decode   24 steps (Longan's at 8K: see hybrid) behind d cached tokens: of llama.cpp the median step, of Longan the median of three means. llama.cpp's caches are prefilled once and rewound after each
         run. Longan's are filled with random K and V (bench --synthetic), since a dense step costs the same whatever
         the values are; --real prefills them instead, which takes minutes.
hybrid   at 8K with --roles, --budget 1024, sinks 16, recents 64, against llama.cpp's dense steps. Where the map keeps tokens, they are observed anew every 64th of the
         context (docs/SPARSE.md): as many steps are timed, so that each run has one such step; --keep 0 keeps none.
own      Longan's hybrid against its own dense decode at 32K, synthetic, beyond the trained window: timing only.
"""
import argparse
import csv
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import time

os.environ.setdefault("OMP_PROC_BIND", "true")      # read when libgomp is loaded, and by the children
CORES = os.sched_getaffinity(0)                     # libgomp binds this process to one core: the children must not inherit that

STEPS = 24
PART = 64                                           # tokens that are kept are observed anew every 64th of the context
DEPTHS = [512, 2048, 4096, 8192]
MUST = {("prefill", "q4_1"): 3.0, ("prefill", "best"): 1.7, ("decode", 512): 1.6, ("decode", 8192): 2.2,
        ("hybrid", 8192): 3.3, ("own", 32768): 2.7}


class Peer:
    """llama.cpp with one model; contexts are kept by depth."""

    def __init__(self, path, threads):
        import llama_cpp
        self.L, self.threads = llama_cpp, threads
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, user: None)
        llama_cpp.llama_log_set(self.quiet, None)
        llama_cpp.llama_backend_init()
        p = llama_cpp.llama_model_default_params()
        p.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), p)
        if not self.model:
            sys.exit(f"vs_llamacpp: llama.cpp cannot read {path}")
        n = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        rng = random.Random(1)
        self.ids = [rng.randrange(1000, n - 1000) for _ in range(max(DEPTHS) + STEPS)]
        self.kept = {}

    def context(self, n):
        p = self.L.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_ubatch = n + 64, 2048, 512
        p.n_threads = p.n_threads_batch = self.threads
        p.flash_attn_type = 1
        p.type_k = p.type_v = 1                         # f16
        return self.L.llama_init_from_model(self.model, p)

    def feed(self, c, ids):
        import ctypes
        for i in range(0, len(ids), 2048):
            part = ids[i:i + 2048]
            array = (ctypes.c_int32 * len(part))(*part) # the batch only points to it
            if self.L.llama_decode(c, self.L.llama_batch_get_one(array, len(part))):
                sys.exit("vs_llamacpp: llama.cpp failed to decode")
            self.L.llama_synchronize(c)

    def prefill(self, n):
        """Tokens a second into a fresh context (whose making is not timed)."""
        c = self.context(n)
        self.feed(c, self.ids[:1])                      # touches what is made lazily
        self.L.llama_memory_clear(self.L.llama_get_memory(c), True)
        t0 = time.perf_counter()
        self.feed(c, self.ids[:n])
        t = time.perf_counter() - t0
        self.L.llama_free(c)
        return n / t

    def decode(self, depth):
        """Median milliseconds of STEPS steps behind depth tokens."""
        if depth not in self.kept:
            self.kept[depth] = self.context(depth)
            self.feed(self.kept[depth], self.ids[:depth])
        c, ms = self.kept[depth], []
        for k in range(STEPS):
            t0 = time.perf_counter()
            self.feed(c, self.ids[depth + k:depth + k + 1])
            ms.append(1e3 * (time.perf_counter() - t0))
        self.L.llama_memory_seq_rm(self.L.llama_get_memory(c), 0, depth, -1)
        return statistics.median(ms)


class Own:
    def __init__(self, program, threads):
        self.program, self.threads = program, threads

    def run(self, *args):
        out = subprocess.run([self.program, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             preexec_fn=lambda: os.sched_setaffinity(0, CORES))
        if out.returncode:
            sys.exit(f"vs_llamacpp: {self.program} {' '.join(map(str, args))}: {out.stderr.strip().splitlines()[-1:]}")
        return [json.loads(line) for line in out.stdout.splitlines() if line.strip()]

    def bench(self, model, depth, *args, steps=STEPS, reps=3):
        """Objects by mode; the timed steps start behind depth tokens."""
        rows = self.run("bench", "-m", model, "--threads", self.threads, "--kv", "f16", "--depth", depth + steps,
                        "--steps", steps, "--reps", reps, "--json", *args)
        return {r["mode"]: r for r in rows}

    def convert(self, model, folder, kind):
        out = folder / f"{pathlib.Path(model).stem}.{kind}.gguf"
        if not out.exists() or out.stat().st_mtime < os.stat(model).st_mtime:
            self.run("convert", "-m", model, "-o", out, "--type", kind, "--json")
        return out


class Table:
    def __init__(self, path):
        self.rows, self.pairs, self.path, self.low = [], {}, path, []

    def add(self, what, key, rep, peer, own, better):
        """peer and own: two measurements that ran one after the other; better: 'high' or 'low'."""
        ratio = own / peer if better == "high" else peer / own
        self.pairs.setdefault((what, key), []).append((peer, own, ratio))
        self.rows.append([what, key, rep, f"{peer:.4f}", f"{own:.4f}", f"{ratio:.4f}"])

    def show(self, unit, what, key, left="llama.cpp", right="longan"):
        p = self.pairs[what, key]
        peer, own, ratio = ([x[i] for x in p] for i in range(3))
        must = MUST.get((what, key))
        med = statistics.median(ratio)
        if must and med < must:
            self.low.append((what, key))
        print(f"{what:8} {key!s:>6}  {left} {statistics.median(peer):8.2f} [{min(peer):.2f} .. {max(peer):.2f}]  "
              f"{right} {statistics.median(own):8.2f} [{min(own):.2f} .. {max(own):.2f}] {unit}  "
              f"ratio {med:.2f} [{min(ratio):.2f} .. {max(ratio):.2f}]" + (f"  must {must}" if must else ""), flush=True)

    def write(self, head):
        with open(self.path, "w", newline="") as f:
            out = csv.writer(f)
            out.writerow(["what", "case", "rep", "peer", "longan", "ratio", *head])
            for r in self.rows:
                out.writerow([*r, *head.values()])


def turns(rep, peer, own):
    """Both measurements, the beginner changing from one repetition to the next."""
    if rep % 2:
        b = own()
        return peer(), b
    a = peer()
    return a, own()


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("model")
    ap.add_argument("--roles")
    ap.add_argument("--budget", type=int, default=1024)
    ap.add_argument("--reps", type=int, default=5)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--only", default="prefill,decode,hybrid,own")
    ap.add_argument("--keep", help="share of its sets that a head keeps (default: the map's)")
    ap.add_argument("--depths", default=",".join(map(str, DEPTHS)), help="of the decode rows")
    ap.add_argument("--real", action="store_true", help="prefill Longan's caches for the decode rows, too")
    ap.add_argument("--csv", default="build/bench/vs_llamacpp.csv")
    ap.add_argument("--longan", default="build/longan")
    ap.add_argument("--check", action="store_true", help="exit 1 where a ratio is below what is asked")
    a = ap.parse_args()
    parts = set(a.only.split(","))
    if parts & {"hybrid", "own"} and not a.roles:
        sys.exit("vs_llamacpp: the hybrid rows need --roles (or leave them out with --only prefill,decode)")
    folder = pathlib.Path(a.csv).parent
    folder.mkdir(parents=True, exist_ok=True)
    own, table, head = Own(a.longan, a.threads), Table(a.csv), {}
    hybrid = ["--roles", a.roles, "--budget", a.budget, "--sinks", 16, "--recents", 64]
    if a.keep is not None:
        hybrid += ["--keep", a.keep]
    first = own.bench(a.model, 128, "--synthetic")["dense"]
    head.update(commit=first["commit"], device=first["device"], machine=first.get("machine"), threads=a.threads)
    print(" ".join(f"{k}={v}" for k, v in head.items()))

    if "prefill" in parts:
        files = {"q4_1": a.model, **{k: own.convert(a.model, folder, k) for k in ("q4_0", "q8_0")}}
        peers = {k: Peer(f, a.threads) for k, f in files.items()}
        speed = {}
        for rep in range(a.reps):
            for kind, f in files.items():
                x, y = turns(rep, lambda: peers[kind].prefill(2048), lambda: own.bench(f, 2048)["dense"]["prefill_tok_s"])
                table.add("prefill", kind, rep, x, y, "high")
                speed[kind, rep] = x, y
            best = max(files, key=lambda k: statistics.median(speed[k, r][0] for r in range(rep + 1)))
        for rep in range(a.reps):                       # our Q4_1 beside llama.cpp's fastest format
            table.add("prefill", "best", rep, speed[best, rep][0], speed["q4_1", rep][1], "high")
        for kind in files:
            table.show("token/s", "prefill", kind)
        table.show("token/s", "prefill", "best")
        print(f"         best of llama.cpp: {best}; longan there: Q4_1")
        del peers

    if parts & {"decode", "hybrid"}:
        peer = Peer(a.model, a.threads)
        extra = [] if a.real else ["--synthetic"]
        for d in map(int, a.depths.split(",")):
            if "decode" not in parts and d != 8192:
                continue
            if a.real and d + STEPS > first.get("n_ctx_train", 8192):
                d -= d // PART
            peer.decode(d)                              # prefill, and a first run that does not count
            for rep in range(a.reps):
                with_hybrid = d >= 8192 - 8192 // PART and "hybrid" in parts
                args, steps = (hybrid, d // PART) if with_hybrid else ([], STEPS)
                x, y = turns(rep, lambda: peer.decode(d), lambda: own.bench(a.model, d, *extra, *args, steps=steps))
                if "decode" in parts:
                    table.add("decode", d, rep, x, y["dense"]["decode_ms"], "low")
                if with_hybrid:
                    table.add("hybrid", d, rep, x, y["hybrid"]["decode_ms"], "low")
            if "decode" in parts:
                table.show("ms", "decode", d)
            if ("hybrid", d) in table.pairs:
                table.show("ms", "hybrid", d)
                print(f"         {y['hybrid']['n_retrieval']} retrieval heads, budget {y['hybrid']['budget']}, "
                      f"KV share {y['hybrid']['kv_share']:.3f}")

    if "own" in parts:
        for rep in range(a.reps):
            r = own.bench(a.model, 32768, "--synthetic", *hybrid, steps=32768 // PART, reps=1)
            table.add("own", 32768, rep, r["dense"]["decode_ms"], r["hybrid"]["decode_ms"], "low")
        table.show("ms", "own", 32768, "dense", "hybrid")
        for mode in ("dense", "hybrid"):
            print(f"         {mode}: {r[mode]['bytes_per_token'] / 1e6:.1f} MB a token, "
                  f"{r[mode]['bytes_per_token'] / r[mode]['decode_ms'] / 1e6:.1f} GB/s")
    table.write(head)
    print(f"written: {a.csv}")
    if table.low:
        print("below what is asked: " + ", ".join(f"{w} {k}" for w, k in table.low))
    return 1 if a.check and table.low else 0


if __name__ == "__main__":
    sys.exit(main())
