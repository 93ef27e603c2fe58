#!/usr/bin/env python3
"""Perplexity of llama.cpp and of Longan on one text, with one windowing.

    python tools/ppl-peer.py MODEL.gguf [--text FILE] [--ctx N] [--bytes N] [-- more options for longan]

Both read the same ids: windows of N that do not overlap, each from an empty cache, nothing put in front, ids
1..N-1 of each scored; a last incomplete window is dropped. Without --text the text of scripts/demo.sh: the verses
that bible(1) of the Debian package bible-kjv prints. Needs llama-cpp-python and numpy. Each figure is printed as soon
as it is known. Exit 1 where the two perplexities differ by more than 0.5%, or where they do not score the same number
of ids.
"""
import argparse
import ctypes as C
import json
import math
import subprocess
import sys
import tempfile
import time

import llama_cpp as L
import numpy as np

BOUND = 0.005


def bible(verses):
    """The text of scripts/demo.sh."""
    try:
        out = subprocess.run(["bible", "-f", verses], stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout
    except FileNotFoundError:
        out = ""
    return out or sys.exit("ppl-peer: no text: install bible-kjv, or give --text FILE")


def peer(path, text, ctx, threads):
    L.llama_log_set(quiet, None)
    L.llama_backend_init()
    mp = L.llama_model_default_params()
    mp.n_gpu_layers = 0
    model = L.llama_model_load_from_file(path.encode(), mp)
    if not model:
        sys.exit(f"ppl-peer: llama.cpp cannot read {path}")
    vocab = L.llama_model_get_vocab(model)
    n_vocab = L.llama_vocab_n_tokens(vocab)
    raw = text.encode()
    buf = (C.c_int32 * (len(raw) + 8))()
    n = L.llama_tokenize(vocab, raw, len(raw), buf, len(buf), False, False)
    ids = list(buf[:n])
    cp = L.llama_context_default_params()
    cp.n_ctx = cp.n_batch = ctx
    cp.n_ubatch = min(ctx, 512)
    cp.n_threads = cp.n_threads_batch = threads
    cp.flash_attn_type = 1
    cp.type_k = cp.type_v = 1                           # f16, as Longan's default on the CPU
    context = L.llama_init_from_model(model, cp)
    batch = L.llama_batch_init(ctx, 0, 1)
    nll, scored = 0.0, 0
    for start in range(0, len(ids) - ctx + 1, ctx) if len(ids) >= ctx else [0]:
        window = ids[start:start + ctx]
        L.llama_memory_clear(L.llama_get_memory(context), True)
        batch.n_tokens = len(window)
        for i, t in enumerate(window):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = t, i, 1, 0, 1
        if L.llama_decode(context, batch):
            sys.exit("ppl-peer: llama.cpp failed to decode")
        rows = np.ctypeslib.as_array(L.llama_get_logits(context), (len(window), n_vocab))
        for i in range(len(window) - 1):                # row by row: no float64 copy of the whole window
            row = rows[i].astype(np.float64)
            top = row.max()
            nll += top + math.log(np.exp(row - top).sum()) - row[window[i + 1]]
        scored += len(window) - 1
        print(f"\rllama.cpp: {start + len(window)} of {len(ids)} ids", end="", file=sys.stderr)
    print(file=sys.stderr)
    return math.exp(nll / scored), scored, len(ids)


quiet = L.llama_log_callback(lambda level, text, user: None)


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("model")
    ap.add_argument("--text", help="a UTF-8 file [the demo's: the verses of bible-kjv]")
    ap.add_argument("--verses", default="est1:1-job3:26", help="as bible(1) names them [est1:1-job3:26]")
    ap.add_argument("--ctx", type=int, default=2048, help="ids of a window [2048]")
    ap.add_argument("--bytes", type=int, default=100000, help="read no more of the text [100000; 0: all]")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--longan", default="build/longan")
    ap.add_argument("options", nargs="*", help="after --: passed to longan perplexity")
    a = ap.parse_args()
    if a.text:
        with open(a.text, encoding="utf-8", errors="replace") as f:
            text = f.read()
    else:
        text = bible(a.verses)
    if a.bytes:
        text = text.encode()[:a.bytes].decode(errors="ignore")
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        t0 = time.time()
        out = subprocess.run([a.longan, "perplexity", "-m", a.model, "-f", f.name, "--ctx", str(a.ctx), "--threads",
                              str(a.threads), "--json", *a.options], stdout=subprocess.PIPE, text=True)
        own_s = time.time() - t0
    if out.returncode:
        sys.exit(f"ppl-peer: longan perplexity: exit {out.returncode}")
    own = json.loads(out.stdout)
    print(f"longan     ppl {own['ppl']:.4f}  {own['tokens']} ids scored  {own_s:.1f} s", flush=True)
    t0 = time.time()
    ppl, scored, n_ids = peer(a.model, text, a.ctx, a.threads)
    print(f"llama.cpp  ppl {ppl:.4f}  {scored} of {n_ids} ids scored  {time.time() - t0:.1f} s")
    diff = own["ppl"] / ppl - 1
    print(f"difference {100 * diff:+.3f}%  (bound {100 * BOUND}%)", flush=True)
    if own["tokens"] != scored:
        print("the two do not score the same ids", file=sys.stderr)
        return 1
    return 0 if abs(diff) <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
