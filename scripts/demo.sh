#!/bin/sh
# Reads a long text once densely and once with hybrid heads, answers one question about it, compares.
#   sh scripts/demo.sh [QUESTION]
# Installs and builds what is missing; a second run downloads and rebuilds nothing. Exit 1 also where the peak
# resident memory passes file + KV cache + 200 MB.
set -eu
cd "$(dirname "$0")/.."
verses=${LONGAN_DEMO_VERSES:-est1:1-job3:26} # as bible(1) names them
question=${1:-What was done to Haman in the end?}
[ $# -le 1 ] || { echo "usage: sh scripts/demo.sh [QUESTION]" >&2; exit 2; }
cache=${LONGAN_CACHE:-.cache}
model=$cache/models/SmolLM2-135M-Instruct.Q4_1.gguf
roles=roles/smollm2-135m.json

sh scripts/setup.sh build demo
make -s -j"$(nproc)" all >&2
[ -s "$roles" ] || { echo "demo: $roles is missing; make it with build/longan heads calibrate" >&2; exit 1; }

mkdir -p "$cache/demo"
# The text: the King James Bible as the package bible-kjv prints it, cut at a line to leave room for question and answer.
bible -f "$verses" </dev/null >"$cache/demo/all.txt"
python3 - "$model" "$roles" "$cache/demo" "$question" <<'PY'
import json, os, resource, subprocess, sys
model, roles, folder, question = sys.argv[1:5]
LONGAN, ANSWER, ROOM = "build/longan", 48, 160  # tokens of the answer; of the answer, the question and the chat markup

def run(args, **kw):
    p = subprocess.run([LONGAN] + args, stdout=subprocess.PIPE, **kw)
    if p.returncode:
        sys.exit("demo: longan %s failed (exit %d)" % (args[0], p.returncode))
    return p.stdout

info = json.loads(run(["info", "-m", model, "--json"]))
with open(os.path.join(folder, "all.txt"), "rb") as f:
    text = f.read()
ids = run(["tokenize", "-m", model], input=text).split()
n_question = len(run(["tokenize", "-m", model], input=question.encode()).split())
keep = info["n_ctx_train"] - ROOM - n_question
head = run(["tokenize", "-m", model, "--decode"], input=b" ".join(ids[:keep]))
cut = len(head) if len(ids) <= keep else head.rfind(b"\n") + 1
source = os.path.join(folder, "text.txt")
with open(source, "wb") as f:
    f.write(head[:cut])
print("text: %d of %d bytes, window %d tokens\nquestion: %s\n" % (cut, len(text), info["n_ctx_train"], question), flush=True)

def answer(extra):
    """The result of one run and its peak resident memory: a process of its own, so that the peak is its own."""
    args = [LONGAN, "generate", "-m", model, "-f", source, "-p", question, "--chat", "-n", str(ANSWER), "--json"] + extra
    p = subprocess.Popen(args, stdout=subprocess.PIPE)
    out = p.stdout.read()
    _, status, usage = os.wait4(p.pid, 0)
    if status:
        sys.exit("demo: longan generate failed (status %d)" % status)
    return json.loads(out), usage.ru_maxrss * 1024

rows = [("dense", *answer([])), ("hybrid", *answer(["--roles", roles]))]
print("%-8s %8s %15s %14s %20s" % ("", "prompt", "prefill tok/s", "decode tok/s", "KV bytes read/token"))
for name, r, _ in rows:
    steps = r.get("decode_steps") or len(r["ids"])
    share = r["kv_bytes_read"] / r["kv_bytes_dense"] if r["kv_bytes_dense"] else 1.0
    rate = steps / r["decode_s"] if r["decode_s"] else 0.0
    print("%-8s %8d %15.1f %14.1f %19.1f%%" % (name, r["prompt_tokens"], r["prompt_tokens"] / r["prefill_s"], rate, 100 * share))
for name, r, _ in rows:
    print("\n%s: %s" % (name, " ".join(r["text"].split())))
cache_bytes = info["n_layer"] * info["n_head_kv"] * info["head_dim"] * 2 * 2 * info["n_ctx_train"]  # f16, the CPU's default
bound = info["file_bytes"] + cache_bytes + 200 * 10**6
peak = max(p for _, _, p in rows)
print("\npeak resident memory %.0f MB; file %.0f + KV cache %.0f + 200 = %.0f MB" %
      (peak / 1e6, info["file_bytes"] / 1e6, cache_bytes / 1e6, bound / 1e6))
if peak > bound:
    sys.exit("demo: peak resident memory is above that")
PY
