#!/bin/sh
# Reading behind a bank's slots through the program: logits and generate --bank against tests/fixtures/memory/ref (made by
# tools/make-memory-fixtures.py). One line a check, then "N passed, N failed, N skipped".
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
longan=${LONGAN:-$root/${LG_BUILD:-build}/longan}
model=$root/tests/fixtures/memory/model ref=$root/tests/fixtures/memory/ref
command -v python3 >/dev/null 2>&1 || { echo "skip: no python3"; exit 77; }
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
passed=0 failed=0
check() { # NAME COMMAND...
    name=$1
    shift
    if "$@" >"$tmp/out" 2>"$tmp/err"; then passed=$((passed + 1)); echo "ok   $name"
    else failed=$((failed + 1)); echo "FAIL $name"; head -3 "$tmp/err" | sed 's/^/     /'; fi
}
fails() { # CODE TEXT COMMAND...: that exit code, empty stdout, a line on stderr that holds TEXT
    code=$1 text=$2
    shift 2
    "$@" >"$tmp/o" 2>"$tmp/e"
    got=$?
    if [ $got = "$code" ] && [ ! -s "$tmp/o" ] && grep -q -e "$text" "$tmp/e"; then return 0; fi
    echo "exit $got" >&2; cat "$tmp/e" >&2
    return 1
}
near() { # A.npy B.npy BOUND: same shape, largest difference
    python3 - "$@" <<'P'
import ast, struct, sys
def load(path):
    b = open(path, "rb").read()
    n, = struct.unpack("<H", b[8:10])
    shape = ast.literal_eval(b[10:10 + n].decode())["shape"]
    return shape, struct.unpack("<%df" % ((len(b) - 10 - n) // 4), b[10 + n:])
(sa, a), (sb, b) = load(sys.argv[1]), load(sys.argv[2])
worst = max(abs(x - y) for x, y in zip(a, b))
assert sa == sb, (sa, sb)
assert worst <= float(sys.argv[3]), worst
P
}
same_ids() { # OUT.json STEP: the step's memory (pad id dropped), or the answer
    python3 - "$1" "$ref/loop.json" "$2" <<'P'
import json, sys
got, loop = json.load(open(sys.argv[1]))["ids"], json.load(open(sys.argv[2]))
want = loop["steps"][int(sys.argv[3])]["memory_ids"]
assert [i for i in got if i != loop["pad_id"]] == want, (got, want)
P
}
opt="-m $model --compute f32 --threads 1"
python3 - "$ref/loop.json" "$ref/text.txt" "$tmp" <<'P'
import json, sys
for i, s in enumerate(json.load(open(sys.argv[1]))["steps"]):
    open("%s/prompt%d" % (sys.argv[3], i), "w").write(" ".join(map(str, s["prompt_ids"])))
ids = open(sys.argv[2]).read().split()
for n in (131, 256):
    open("%s/text%d" % (sys.argv[3], n), "w").write(" ".join(ids[:n]))
P
check "bank of 600 ids" "$longan" bank build $opt --ids "$ref/text.txt" --chunk 256 --slots f32 -o "$tmp/bank"
check "bank of 131 ids" "$longan" bank build $opt --ids "$tmp/text131" --chunk 256 --slots f32 -o "$tmp/bank131"
check "export" "$longan" bank export "$tmp/bank131" --chunk 0 -o "$tmp/x"
check "logits behind a full chunk" "$longan" logits $opt --ids "$ref/prompt.txt" --bank "$tmp/bank" --bank-chunk 0 -o "$tmp/a.npy"
check "equal to the reference" near "$tmp/a.npy" "$ref/read_256.npy" 1e-4
check "slots rotated at their index" "$longan" logits $opt --ids "$ref/prompt.txt" --bank "$tmp/bank" --bank-chunk 0 --slot-rope slot-index -o "$tmp/b.npy"
check "equal to the reference (rotated)" near "$tmp/b.npy" "$ref/rope_256.npy" 1e-4
check "logits behind a partial chunk" "$longan" logits $opt --ids "$ref/prompt.txt" --bank "$tmp/bank131" --bank-chunk 0 -o "$tmp/c.npy"
check "equal to the reference (partial)" near "$tmp/c.npy" "$ref/read_131.npy" 1e-4
check "as decode steps" "$longan" logits $opt --ids "$ref/prompt.txt" --bank "$tmp/bank131" --bank-chunk 0 --decode-from 5 -o "$tmp/d.npy"
check "equal to the prefill" near "$tmp/d.npy" "$tmp/c.npy" 1e-4
for i in 0 1 2; do
    "$longan" generate $opt --ids "$tmp/prompt$i" --bank "$tmp/bank" --bank-chunk $i -n 16 --stop-ids 258 --json >"$tmp/g$i" 2>"$tmp/err"
    check "generate behind chunk $i: the loop's ids" same_ids "$tmp/g$i" $i
done
check "no chunk: usage" fails 2 "--bank needs --bank-chunk" "$longan" generate $opt -p x --bank "$tmp/bank"
check "no bank: usage" fails 2 "--slot-rope needs --bank" "$longan" logits $opt --ids "$ref/prompt.txt" --slot-rope none -o "$tmp/e.npy"
check "no such chunk" fails 1 "chunk" "$longan" generate $opt -p x --bank "$tmp/bank" --bank-chunk 3
check "another family" fails 1 "family" "$longan" generate -m "$root/tests/fixtures/tiny-qwen2" --threads 1 -p x --bank "$tmp/bank" --bank-chunk 0
check "an adapter that is none" fails 1 "longan" "$longan" generate $opt -p x --adapter "$model/model.safetensors"
check "no memory weights" fails 1 "no memory weights" "$longan" bank build -m "$root/tests/fixtures/tiny-qwen2" --threads 1 --ids "$tmp/text131" --chunk 256 --window 128 -o "$tmp/y"
check "a ratio that does not divide" fails 2 "ratio 3" "$longan" bank build $opt --ids "$tmp/text131" --chunk 256 --ratio 3 -o "$tmp/y"
echo "$passed passed, $failed failed, 0 skipped"
[ $failed = 0 ]
