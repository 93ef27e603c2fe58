#!/bin/sh
# bank and ask through the program: JSON fields, exit codes, empty stdout on failure, banks of documents, the trace page.
set -u
cd "$(dirname "$0")/.."
longan=${LONGAN:-${LG_BUILD:-build}/longan}
[ -x "$longan" ] || { echo "skip: $longan is not built"; exit 77; }
command -v python3 >/dev/null || { echo "skip: python3 is missing"; exit 77; }
t=$(mktemp -d)
trap 'rm -rf "$t"' EXIT
m=tests/fixtures/memory/model
plain=tests/fixtures/tiny-llama # no memory weights
export XDG_CACHE_HOME="$t/cache"
passed=0 failed=0
check() { # NAME CONDITION...
    name=$1
    shift
    if "$@"; then passed=$((passed + 1)); else
        failed=$((failed + 1))
        echo "memory_cli.sh: FAILED $name"
        [ ! -s "$t/err" ] || sed 's/^/  | /' "$t/err"
    fi
}
run() { # EXIT ARGS...: stdout in $t/out, stderr in $t/err
    want=$1
    shift
    "$longan" "$@" >"$t/out" 2>"$t/err" </dev/null
    rc=$?
    [ $rc -eq "$want" ] || { echo "  exit $rc, wanted $want: longan $*"; return 1; }
    [ "$want" -eq 0 ] || { [ ! -s "$t/out" ] && [ -s "$t/err" ]; }
}
json() { python3 -c "import json,sys; d=json.load(open('$t/out')); sys.exit(0 if ($1) else 1)"; }
says() { grep -q -- "$1" "$t/err"; }

i=0
while [ $i -lt 30 ]; do echo "Line $i of the document: nothing much is in it, but line $i."; i=$((i + 1)); done >"$t/doc.txt"
n=$(wc -c <"$t/doc.txt")
common="-m $m --threads 1 --compute f32"

# shellcheck disable=SC2086 # common is words
{
check build run 0 bank build $common -f "$t/doc.txt" -o "$t/a.bank" --chunk 256 --slots f32 --json
check build-json json "d['n_tokens'] == $n and d['file_bytes'] > 8192"
check no-part test ! -e "$t/a.bank.part"
check info run 0 bank info "$t/a.bank" --json
check info-json json "all(k in d for k in 'fingerprint family n_tokens chunk window ratio n_layer n_head_kv head_dim slots_dtype slot_rope file_bytes chunks'.split())"
check info-values json "d['chunk'] == 256 and d['window'] == 128 and d['ratio'] == 4 and d['slots_dtype'] == 'f32' and d['slot_rope'] == 'none'"
check info-chunks json "[c['index'] for c in d['chunks']] == list(range(len(d['chunks']))) and d['chunks'][-1]['byte_end'] == $n and d['chunks'][1]['byte_begin'] == 256"
check info-slots json "d['chunks'][0]['slots'] == 64 and d['chunks'][-1]['slots'] == -(-($n % 256 or 256) // 4)"
check info-text run 0 bank info "$t/a.bank"
check verify run 0 bank verify "$t/a.bank"
check export run 0 bank export "$t/a.bank" --chunk 1 -o "$t/x"
check export-shape grep -aq "'shape': (3, 64, 2, 16)" "$t/x/K.npy"
check export-v test -s "$t/x/V.npy"
check export-range run 1 bank export "$t/a.bank" --chunk 99 -o "$t/y"
check export-chunk run 2 bank export "$t/a.bank" -o "$t/y"
check ls run 0 bank ls "$t"
check ls-line grep -q '^a.bank ' "$t/out"
check ls-one test "$(wc -l <"$t/out")" -eq 1
check append run 0 bank append "$t/a.bank" $common -f "$t/doc.txt" --json
check append-n json "d['n_tokens'] == 2 * $n"
check append-verify run 0 bank verify "$t/a.bank"
cat "$t/doc.txt" "$t/doc.txt" >"$t/two.txt"
check joined run 0 bank build $common -f "$t/two.txt" -o "$t/b.bank" --chunk 256 --slots f32
for c in 0 2 $((2 * n / 256)); do
    run 0 bank export "$t/a.bank" --chunk $c -o "$t/xa" && run 0 bank export "$t/b.bank" --chunk $c -o "$t/xb"
    check "append-equals-$c" cmp "$t/xa/K.npy" "$t/xb/K.npy"
    check "append-equals-v-$c" cmp "$t/xa/V.npy" "$t/xb/V.npy"
done
"$longan" tokenize -m $m <"$t/doc.txt" >"$t/ids"
check ids run 0 bank build $common --ids "$t/ids" -o "$t/i.bank" --chunk 256
check ids-info run 0 bank info "$t/i.bank" --json
check ids-null json "d['chunks'][0]['byte_begin'] is None and d['slots_dtype'] == 'bf16'"

# what must be refused
head -c 9000 "$t/b.bank" >"$t/cut.bank"
check truncated run 1 bank info "$t/cut.bank"
check truncated-why says truncated
cp "$t/b.bank" "$t/bad.bank"
printf 'X' | dd of="$t/bad.bank" bs=1 seek=20000 conv=notrunc 2>/dev/null
check flipped run 1 bank verify "$t/bad.bank"
check flipped-why says checksum
check not-a-bank run 1 bank info "$t/doc.txt"
check missing run 1 bank info "$t/none"
check no-argument run 2 bank info
check no-model run 2 bank build -f "$t/doc.txt" -o "$t/z"
check no-output run 2 bank build $common -f "$t/doc.txt"
check both run 2 bank build $common -f "$t/doc.txt" --ids "$t/ids" -o "$t/z"
check ratio run 2 bank build $common -f "$t/doc.txt" -o "$t/z" --chunk 256 --ratio 3
check chunk run 2 bank build $common -f "$t/doc.txt" -o "$t/z" --chunk 200
check no-memory run 1 bank build -m $plain -f "$t/doc.txt" -o "$t/z"
check no-memory-file test ! -e "$t/z.part"
check other-model run 1 bank append "$t/b.bank" -m $plain -f "$t/doc.txt"
: >"$t/empty"
check empty run 1 bank build $common -f "$t/empty" -o "$t/z"

# ask
printf '\nA {prompt}\nB {memory}\nC:' >"$t/u"
printf 'F {prompt}\nM {memory}\nA:' >"$t/f"
short="--update-template $t/u --answer-template $t/f --memory-size 16 --max-new 16"
check ask run 0 ask $common "$t/b.bank" "who?" $short --json
check ask-json json "all(k in d for k in 'answer answer_ids steps times'.split()) and set(d['times']) == {'build_s', 'gate_s', 'read_s', 'answer_s'}"
check ask-steps json "[s['chunk'] for s in d['steps']] == list(range(len(d['steps']) - 1)) + [None] and d['steps'][-1]['position0'] == 0"
check ask-step json "d['steps'][0]['position0'] == 64 and d['steps'][0]['gate_score'] is None and d['steps'][0]['accepted'] and len(d['steps'][0]['memory_ids']) <= 16 and d['steps'][1]['byte_begin'] == 256"
cp "$t/out" "$t/first"
printf '119 104 111 63' >"$t/q"
check question-ids run 0 ask $common "$t/b.bank" --question-ids "$t/q" $short --json
check question-ids-same python3 -c "import json; a,b=(json.load(open('$t/'+f)) for f in ('first','out')); assert a['answer_ids']==b['answer_ids'] and [s['prompt_ids'] for s in a['steps']]==[s['prompt_ids'] for s in b['steps']]"
printf '{"question": "who?"}\n{"ids": [119, 104]}\n' >"$t/qs"
check questions run 0 ask $common "$t/b.bank" --questions "$t/qs" $short
check questions-lines test "$(wc -l <"$t/out")" -eq 2
check questions-same python3 -c "import json; a=json.load(open('$t/first')); b=json.loads(open('$t/out').readline()); assert a['answer_ids']==b['answer_ids']"
check draft run 0 ask $common "$t/b.bank" "who?" $short --json --draft
check draft-same python3 -c "import json; a,b=(json.load(open('$t/'+f)) for f in ('first','out')); assert a['answer_ids']==b['answer_ids']"
check document run 0 ask $common "$t/doc.txt" "$t/doc.txt" "who?" $short --chunk 256 --slots f32 --json
check document-same python3 -c "import json; a,b=(json.load(open('$t/'+f)) for f in ('first','out')); assert a['answer_ids']==b['answer_ids'] and b['times']['build_s'] > 0"
check again run 0 ask $common "$t/doc.txt" "$t/doc.txt" "who?" $short --chunk 256 --slots f32 --json
check again-kept json "d['times']['build_s'] == 0"
check cached run 0 bank ls "$t/cache/longan"
check cached-one test "$(wc -l <"$t/out")" -eq 1
check lookup run 0 ask $common "$t/b.bank" "line 7" --mode lookup --max-new 4 --json --trace-html "$t/page.html"
check lookup-json json "d['chunk'] in [s['chunk'] for s in d['steps'][:-1]] and len(d['steps']) == 4 and d['byte_end'] > d['byte_begin'] >= 0"
check page grep -q '</html>' "$t/page.html"
check page-alone sh -c "! grep -Eq 'src=|href=|https?://' '$t/page.html'"
check lexical run 0 ask $common "$t/b.bank" "line 7" $short --gate lexical --top 2 --json --trace
check lexical-steps json "sum(s['accepted'] for s in d['steps'][:-1]) == 2 and all(s['gate_score'] is not None for s in d['steps'][:-1]) and all((s['prompt_ids'] is None) == (not s['accepted']) for s in d['steps'])"
check trace says 'chunk 0'
check memagent run 0 ask -m $plain "$t/doc.txt" "who?" --mode memagent --memory-size 4 --max-new 4 --piece 300 --ctx 4096 --json
check full run 0 ask $common "$t/doc.txt" "who?" --mode full --max-new 4 --json
check full-steps json "len(d['steps']) == 1 and d['steps'][0]['chunk'] is None"
check no-weights run 1 ask -m $plain "$t/doc.txt" "who?"
check no-weights-why says 'memagent'
check no-question run 2 ask $common "$t/b.bank"
check two-questions run 2 ask $common "$t/b.bank" --questions "$t/qs" --question-ids "$t/q"
check hybrid-roles run 2 ask $common "$t/b.bank" "who?" --mode hybrid
check gate-file run 1 ask $common "$t/b.bank" "who?" --gate "$t/none"
check bad-template run 1 ask $common "$t/b.bank" "who?" --update-template "$t/q" --answer-template "$t/f"
check bad-id run 1 ask $common "$t/b.bank" --question-ids "$t/doc.txt" $short
}
echo "$passed passed, $failed failed, 0 skipped"
[ $failed -eq 0 ]
