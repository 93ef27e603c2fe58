#!/bin/sh
# bench/memory_bench.c on a tiny shape: every figure is there, every mode generates what it is told to, and the forced gate reads what it should.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
bench=${LG_MEMORY_BENCH:-$root/${LG_BUILD:-build}/bench/memory_bench}
[ -x "$bench" ] || { echo "skip: no $bench (make benches)"; exit 77; }
command -v python3 >/dev/null 2>&1 || { echo "skip: no python3"; exit 77; }
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
"$bench" --shape tiny --threads 2 --chunk 128 --window 64 --doc 1000 --tokens 1500 --update 6 --answer 4 --piece 300 --read 2 --gate-batch 3 --questions 2 --reps 1 \
    --dir "$tmp" --json "$tmp/json" || exit 1
"$bench" --shape tiny --update 0 >/dev/null 2>&1
[ $? -eq 2 ] || { echo "an update of no tokens is not refused"; exit 1; }
python3 - "$tmp/json" <<'P' || exit 1
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
of = lambda what: [r for r in rows if r["what"] == what]
assert len(of("machine")) == len(of("slots")) == len(of("bank")) == len(of("questions")) == 1
assert [r["at_once"] for r in of("chunk")] == [1, 2, 4] and all(r["seconds"] > 0 and r["floor"] > 0 for r in of("chunk"))
assert [(r["memory"], r["chunks"]) for r in of("gate")] == [(3, 1), (3, 2), (3, 3), (6, 1), (6, 2), (6, 3)]
bank, = of("bank")
assert bank["chunks"] == 12 and bank["file_bytes"] > 12 * 32 * 4 * 2 * 2 * 64 * 2 * 0.9  # slots, layers, K and V, heads, elements, bytes
p = of("protocol")
agent = p[0]
assert agent["mode"] == "MemAgent" and agent["read"] == 4 and agent["tokens"] == 4 * 6 + 4
memory = p[1:]
assert len(memory) == 6
for i, r in enumerate(memory):
    read = 8 if i >= 4 else 2
    assert r["read"] == read and r["looked_at"] == 8 and r["tokens"] == read * 6 + 4, r
    assert abs(r["ratio"] - agent["seconds"] / r["seconds"]) < 1e-2 * r["ratio"]
    assert (r["build_s"] > 0) == (i % 2 == 0)
assert memory[0]["held_bytes"] < agent["held_bytes"]
P
