#!/bin/sh
# Installs, builds, fetches SmolLM2-135M-Instruct (GGUF, Q4_1), reads a long text up to the model's window and answers
# one question about it twice: densely and with hybrid heads. A second run downloads and builds nothing.
set -eu
cd "$(dirname "$0")/.."
[ $# -eq 0 ] || { echo "usage: sh scripts/demo.sh" >&2; exit 2; }
sh scripts/setup.sh build demo
make -s -j"$(nproc 2>/dev/null || echo 1)" all
model=${LONGAN_CACHE:-.cache}/models/SmolLM2-135M-Instruct.Q4_1.gguf
roles=roles/smollm2-135m.json
work=build/demo
mkdir -p "$work"
[ -s "$roles" ] || { echo "demo: $roles is missing" >&2; exit 1; }

# Genesis and Exodus, cut to the window less room for the chat marks, the question and the answer.
printf 'Ge1:1-Ex40:38\n' | bible -f | sed 's/^[A-Za-z0-9]*:[0-9]* //' >"$work/whole.txt"
build/longan tokenize -m "$model" <"$work/whole.txt" | tr ' ' '\n' | head -n 7900 | build/longan tokenize -m "$model" --decode >"$work/text.txt"
question='Who built the ark, and why?'
printf '\nThe text: the first %s tokens of Genesis. The question: %s\n' "$(build/longan tokenize -m "$model" <"$work/text.txt" | wc -w)" "$question"

ask() { # NAME OPTIONS...
    name=$1; shift
    build/longan generate -m "$model" -f "$work/text.txt" -p "$question" --chat -n 64 --json "$@" >"$work/$name.json"
}
ask dense
ask hybrid --roles "$roles" --budget 1024
python3 - "$work" <<'PY'
import json, sys
rows = {n: json.load(open(f"{sys.argv[1]}/{n}.json")) for n in ("dense", "hybrid")}
print(f"\n{'':8}{'prefill tok/s':>15}{'decode tok/s':>14}{'KV bytes read':>15}")
for name, r in rows.items():
    steps = r.get("decode_steps") or max(len(r["ids"]) - 1, 1)
    share = 100 * r["kv_bytes_read"] / max(r["kv_bytes_dense"], 1)
    print(f"{name:8}{r['prompt_tokens'] / r['prefill_s']:15.0f}{steps / max(r['decode_s'], 1e-9):14.1f}{share:14.1f}%")
for name, r in rows.items():
    print(f"\n{name}: {r['text'].strip()}")
PY
