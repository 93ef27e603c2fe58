#!/bin/sh
# The program as scripts see it: help, exit codes, JSON, file layouts.
#
#   sh tests/cli.sh [MODEL]      LONGAN names the program, LG_BUILD its folder (build); MODEL: tests/fixtures/tiny-llama
#
# One line a check ("ok", "FAIL" or "skip"), then "N passed, N failed, N skipped". Exit 1 where a check failed.
# Figures of the model are compared with each other, never with constants, so that any model serves.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
longan=${LONGAN:-$root/${LG_BUILD:-build}/longan}
model=${1:-$root/tests/fixtures/tiny-llama}
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
passed=0 failed=0 skipped=0

ok() { passed=$((passed + 1)); echo "ok   $1"; }
bad() { failed=$((failed + 1)); echo "FAIL $1"; [ -s "$tmp/err" ] && sed 's/^/     stderr: /' "$tmp/err" | head -3; }
skip() { skipped=$((skipped + 1)); echo "skip $1"; }
check() { # NAME COMMAND...: the command must succeed
    name=$1
    shift
    if "$@"; then ok "$name"; else bad "$name"; fi
}

# run CODE NAME ARGS...: exit code, and what every failure owes: empty stdout, one line on stderr.
run() {
    code=$1 name=$2
    shift 2
    "$longan" "$@" >"$tmp/out" 2>"$tmp/err" </dev/null
    got=$?
    if [ $got -ne "$code" ]; then bad "$name (exit $got, not $code)"; return; fi
    if [ "$code" -ne 0 ]; then
        if [ -s "$tmp/out" ]; then bad "$name (stdout is not empty)"; return; fi
        if [ "$(wc -l <"$tmp/err")" -ne 1 ]; then bad "$name (not one line on stderr)"; return; fi
    fi
    ok "$name"
}
# usage WORD ARGS...: exit 2 and stderr holds WORD
usage() {
    word=$1
    shift
    "$longan" "$@" >"$tmp/out" 2>"$tmp/err" </dev/null
    got=$?
    if [ $got -eq 2 ] && grep -qe "$word" "$tmp/err" && [ ! -s "$tmp/out" ] && [ "$(wc -l <"$tmp/err")" -eq 1 ]; then
        ok "usage error: $*"
    else
        bad "usage error: $* (exit $got)"
    fi
}
have_python=false
command -v python3 >/dev/null 2>&1 && have_python=true
# json NAME FILE EXPRESSION: every line is one JSON object d for which the expression holds
json() {
    if ! $have_python; then skip "$1 (no python3)"; return; fi
    if python3 - "$2" "$3" 2>"$tmp/err" <<'P'
import json, sys
raw = open(sys.argv[1], 'rb').read().decode('utf-8')
lines = raw.splitlines()
assert raw.endswith('\n') and lines, 'no line'
def refuse(x): raise ValueError(x)
objects = [json.loads(l, parse_constant=refuse) for l in lines]
for d in objects:
    assert eval(sys.argv[2], {'d': d, 'all_lines': objects}), d
P
    then ok "$1"; else bad "$1"; fi
}
keys() { # "a b c" -> expression: all present
    for k in $1; do printf "'%s' in d and " "$k"; done
    printf 'True'
}

# ---- help, version, usage: no model needed ----
run 0 "--help" --help
check "the help names its commands" sh -c "for c in info convert tokenize logits generate chat perplexity bench 'heads calibrate' 'heads show' 'heads plot'; do grep -q \"^  \$c \" '$tmp/out' || exit 1; done"
run 0 "--version" --version
check "the version names a commit" grep -q 'commit' "$tmp/out"
for c in info convert tokenize logits generate chat perplexity bench "heads calibrate" "heads show" "heads plot"; do
    run 0 "$c --help" $c --help
    check "$c --help has usage, options, examples" sh -c "grep -q '^Usage: longan $c' '$tmp/out' && grep -q -- '--json' '$tmp/out' && grep -q '^Examples' '$tmp/out'"
    usage "nonsense" $c --nonsense
done
run 0 "help COMMAND" help generate
"$longan" >"$tmp/out" 2>"$tmp/err"
check "no command: exit 2" test $? -eq 2
usage "frobnicate" frobnicate
usage "calibrate, show, plot" heads
usage "heads frob" heads frob
usage "model" info
usage "model" generate -p x
usage "needs a value" generate -m
usage "output" convert -m x
usage "ids" logits -m x -o y
usage "output" logits -m x --ids y
usage "file" perplexity -m x
usage "type" convert -m x -o y --type q3_k
usage "temp" generate -m x -p y --temp nan
usage "temp" generate -m x -p y --temp -1
usage "temp" generate -m x -p y --temp 1x
usage "top-p" generate -m x -p y --top-p 1.5
usage "max-tokens" generate -m x -p y -n -1
usage "max-tokens" generate -m x -p y -n 12q
usage "max-tokens" generate -m x -p y -n 99999999999999999999
usage "threads" generate -m x -p y --threads 5000
usage "ctx" generate -m x -p y --ctx 0
usage "kv" generate -m x -p y --kv f8
usage "device" generate -m x -p y --device tpu
usage "decode-from" logits -m x --ids y -o z --decode-from -1
usage "depth" bench -m x --depth 512,,1k
usage "depth" bench -m x --depth ''
usage "reps" bench -m x --reps 0
usage "block" generate -m x -p y --roles r --block 8
usage "rule-value" generate -m x -p y --roles r --rule ratio
usage "rule-value" generate -m x -p y --roles r --rule topp --rule-value 1.5
usage "rule-value" generate -m x -p y --roles r --rule-value 0.5
usage "exclude" generate -m x -p y --ids z
usage "exclude" generate -m x -p y --batch z
usage "exclude" generate -m x --ids y --chat
usage "exclude" generate -m x --batch y --session z
usage "exclude" tokenize -m x --decode --chat
usage "exclude" heads calibrate -m x -f y -o z --retrieval 4 --kl-bound 0.1
usage "json.*no value" info -m x --json=1
usage "unexpected argument" info -m x y
usage "roles file" heads show
usage "output" heads plot x

# ---- missing and malformed files: exit 1 ----
run 1 "missing model" info -m "$tmp/none.gguf"
check "the missing file is named" grep -q 'none.gguf' "$tmp/err"
run 1 "missing roles file" heads show "$tmp/none.json"
printf 'GGUF' >"$tmp/short.gguf"
run 1 "truncated model" info -m "$tmp/short.gguf"
printf '{' >"$tmp/short.json"
run 1 "truncated roles file" heads show "$tmp/short.json"

run 0 "info --devices" info --devices
run 0 "info --devices --json" info --devices --json
json "devices are a list with the CPU" "$tmp/out" "any(x['name'] == 'cpu' for x in d['devices'])"

finish() {
    echo "$passed passed, $failed failed, $skipped skipped"
    [ "$failed" -eq 0 ]
    exit
}
if [ ! -e "$model" ]; then
    skip "everything with a model: $model is not there"
    finish
fi

# ---- info ----
run 0 "info" info -m "$model"
run 0 "info takes the common options" info -m "$model" --threads 1 --device cpu --compute f32
run 0 "info --json" info -m "$model" --json
cp "$tmp/out" "$tmp/info"
json "info: keys" "$tmp/info" "$(keys 'arch n_layer n_head n_head_kv head_dim n_ctx_train n_vocab n_params file_bytes fingerprint family')"
json "info: hashes are 32 hex digits" "$tmp/info" "all(len(d[k]) == 32 and int(d[k], 16) >= 0 for k in ('family', 'fingerprint'))"
json "info: sizes are positive integers" "$tmp/info" "all(type(d[k]) is int and d[k] > 0 for k in 'n_layer n_head n_head_kv head_dim n_ctx_train n_vocab n_params file_bytes'.split())"
field() { sed -n "s/.*\"$1\":\"\{0,1\}\([^,\"}]*\).*/\1/p" "$tmp/info"; }
n_vocab=$(field n_vocab) n_ctx=$(field n_ctx_train) n_layer=$(field n_layer) n_kv=$(field n_head_kv) family=$(field family)

# ---- tokenize ----
text='The river ran, 123 times; the "sea" waited. It was late.'
printf '%s' "$text" >"$tmp/text"
tok() { "$longan" tokenize -m "$model" "$@" 2>"$tmp/err"; }
tok <"$tmp/text" >"$tmp/ids"
check "tokenize: one line of ids" sh -c "[ \$(wc -l <'$tmp/ids') -eq 1 ] && grep -q '^[0-9][0-9 ]*\$' '$tmp/ids'"
tok --decode <"$tmp/ids" >"$tmp/back"
check "tokenize --decode gives the text back, byte for byte" cmp -s "$tmp/text" "$tmp/back"
tok -f "$tmp/text" >"$tmp/ids2"
check "tokenize -f equals stdin" cmp -s "$tmp/ids" "$tmp/ids2"
tok --json <"$tmp/text" >"$tmp/out"
json "tokenize --json: ids and n" "$tmp/out" "d['n'] == len(d['ids']) > 0"
tok --decode --json <"$tmp/ids" >"$tmp/out"
json "tokenize --decode --json: text" "$tmp/out" "d['text'].startswith('The river')"
printf 'a\377b' | tok --json >"$tmp/out"
json "tokenize: invalid UTF-8 is read" "$tmp/out" "d['n'] > 0"
printf '' | tok --json >"$tmp/out"
json "tokenize: nothing gives no ids" "$tmp/out" "d == {'ids': [], 'n': 0}"
echo "1 x 2" | "$longan" tokenize -m "$model" --decode >"$tmp/out" 2>"$tmp/err"
check "a bad word among ids: exit 1, index named" sh -c "[ $? -eq 1 ] && grep -q 'id 1 ' '$tmp/err'"
echo "1 2 $n_vocab" | "$longan" tokenize -m "$model" --decode >"$tmp/out" 2>"$tmp/err"
check "an id outside the vocabulary: exit 1, index named" sh -c "[ $? -eq 1 ] && grep -q 'id 2 .*$n_vocab' '$tmp/err'"

# ---- logits ----
n=24
i=0
: >"$tmp/prompt"
while [ $i -lt $n ]; do echo $(((i * 37 + 11) % n_vocab)); i=$((i + 1)); done >"$tmp/prompt"
run 0 "logits" logits -m "$model" --ids "$tmp/prompt" -o "$tmp/a.npy" --json
json "logits: keys" "$tmp/out" "$(keys 'decode_steps dense_steps kv_bytes_read kv_bytes_dense')"
run 0 "logits --last" logits -m "$model" --ids "$tmp/prompt" --last -o "$tmp/last.npy"
"$longan" logits -m "$model" --ids - -o "$tmp/stdin.npy" <"$tmp/prompt" 2>"$tmp/err"
check "logits --ids - equals the file" cmp -s "$tmp/a.npy" "$tmp/stdin.npy"
run 0 "logits --decode-from" logits -m "$model" --ids "$tmp/prompt" --decode-from 20 --sets "$tmp/sets" -o "$tmp/d.npy" --json
json "logits: dense decode reads everything" "$tmp/out" "d['decode_steps'] == 4 == d['dense_steps'] and d['kv_bytes_read'] == d['kv_bytes_dense'] > 0"
json "--sets: one line a decode step" "$tmp/sets" "len(all_lines) == 4 and d['dense'] is True and d['sets'] == [] and [x['position'] for x in all_lines] == [20, 21, 22, 23]"
check ".npy: magic and version 1.0" sh -c "[ \"\$(od -An -tx1 -N8 '$tmp/a.npy' | tr -d ' ')\" = 934e554d50590100 ]"
check ".npy: header" sh -c "head -c 128 '$tmp/a.npy' | tr -d '\\0' | grep -aq \"'descr': '<f4', 'fortran_order': False, 'shape': ($n, $n_vocab)\""
size() { wc -c <"$1" | tr -d ' '; }
check ".npy: data start at a multiple of 64" test $((($(size "$tmp/a.npy") - 4 * n * n_vocab) % 64)) -eq 0
check ".npy --last holds one row" test $(($(size "$tmp/a.npy") - $(size "$tmp/last.npy"))) -eq $((4 * (n - 1) * n_vocab))
if $have_python; then
    check "decode steps agree with prefill" python3 - "$tmp/a.npy" "$tmp/d.npy" "$tmp/last.npy" <<'P'
import array, sys
def load(p):
    raw = open(p, 'rb').read()
    a = array.array('f')
    a.frombytes(raw[10 + raw[8] + 256 * raw[9]:])
    return a
a, b, last = map(load, sys.argv[1:])
spread = max(a) - min(a)
assert len(a) == len(b) and spread > 0
assert max(abs(x - y) for x, y in zip(a, b)) < 0.05 * spread
assert max(abs(x - y) for x, y in zip(a[-len(last):], last)) < 0.05 * spread
P
else
    skip "decode steps agree with prefill (no python3)"
fi
run 2 "--decode-from behind the ids" logits -m "$model" --ids "$tmp/prompt" --decode-from 25 -o "$tmp/x.npy"
check "a refused run leaves no file" test ! -e "$tmp/x.npy"
run 1 "no ids" logits -m "$model" --ids /dev/null -o "$tmp/x.npy"
run 1 "ids file missing" logits -m "$model" --ids "$tmp/none" -o "$tmp/x.npy"
run 1 "output folder missing" logits -m "$model" --ids "$tmp/prompt" -o "$tmp/none/x.npy"
run 1 "more ids than the window" logits -m "$model" --ids "$tmp/prompt" --ctx 16 -o "$tmp/x.npy"
check "both numbers are named" sh -c "grep -q 24 '$tmp/err' && grep -q 16 '$tmp/err'"
check "a failed run leaves neither file nor temporary" sh -c "! ls '$tmp' | grep -q '^x.npy'"

# ---- generate ----
run 0 "generate" generate -m "$model" --ids "$tmp/prompt" -n 12
run 0 "generate --json" generate -m "$model" --ids "$tmp/prompt" -n 12 --stop-ids '' --json
cp "$tmp/out" "$tmp/g1"
json "generate: keys" "$tmp/g1" "$(keys 'text ids prompt_tokens prefill_s decode_s kv_bytes_read kv_bytes_dense device stop_reason')"
json "generate: counts" "$tmp/g1" "d['prompt_tokens'] == $n and len(d['ids']) == 12 and d['stop_reason'] == 'length'"
ids_of() { sed 's/.*"ids":\[\([^]]*\)\].*/\1/' "$1"; }
sample() { "$longan" generate -m "$model" --ids "$tmp/prompt" -n 16 --stop-ids '' --temp 1.5 --seed "$1" --json 2>"$tmp/err"; }
sample 7 >"$tmp/s1"
sample 7 >"$tmp/s2"
sample 8 >"$tmp/s3"
check "the same seed gives the same ids" test "$(ids_of "$tmp/s1")" = "$(ids_of "$tmp/s2")"
check "another seed gives others" test "$(ids_of "$tmp/s1")" != "$(ids_of "$tmp/s3")"
run 0 "generate --top-k 1 is greedy" generate -m "$model" --ids "$tmp/prompt" -n 12 --stop-ids '' --temp 2 --top-k 1 --seed 3 --json
check "... the same ids" test "$(ids_of "$tmp/out")" = "$(ids_of "$tmp/g1")"
first=$(ids_of "$tmp/g1" | cut -d, -f1)
run 0 "generate --stop-ids" generate -m "$model" --ids "$tmp/prompt" -n 12 --stop-ids "$first" --json
json "... ends at once, without that id" "$tmp/out" "d['ids'] == [] and d['text'] == '' and d['stop_reason'] == 'eos'"
run 2 "a stop id outside the vocabulary" generate -m "$model" --ids "$tmp/prompt" --stop-ids "$n_vocab"
run 0 "generate -n 0" generate -m "$model" --ids "$tmp/prompt" -n 0 --json
json "... generates nothing" "$tmp/out" "d['ids'] == [] and d['stop_reason'] == 'length'"
"$longan" generate -m "$model" -n 4 --json <"$tmp/text" >"$tmp/out" 2>"$tmp/err"
"$longan" generate -m "$model" -f "$tmp/text" -n 4 --json >"$tmp/out2" 2>>"$tmp/err"
"$longan" generate -m "$model" -p "$text" -n 4 --json >"$tmp/out3" 2>>"$tmp/err"
check "stdin, -f and -p give the same" sh -c "[ '$(ids_of "$tmp/out")' = '$(ids_of "$tmp/out2")' ] && [ '$(ids_of "$tmp/out")' = '$(ids_of "$tmp/out3")' ]"
run 1 "a prompt beyond the window" generate -m "$model" --ids "$tmp/prompt" --ctx 16
check "... with both numbers" sh -c "grep -q 24 '$tmp/err' && grep -q 16 '$tmp/err'"
run 0 "generation ends where the window does" generate -m "$model" --ids "$tmp/prompt" --ctx 28 --stop-ids '' --json
json "... with \"length\"" "$tmp/out" "d['stop_reason'] == 'length' and 4 <= len(d['ids']) <= 5"
run 0 "generate --session writes" generate -m "$model" --ids "$tmp/prompt" -n 12 --stop-ids '' --session "$tmp/snap" --json
run 0 "generate --session reads" generate -m "$model" --ids "$tmp/prompt" -n 12 --stop-ids '' --session "$tmp/snap" --json
check "... the same ids" test "$(ids_of "$tmp/out")" = "$(ids_of "$tmp/g1")"
printf 'torn' >"$tmp/torn"
run 1 "a torn snapshot" generate -m "$model" --ids "$tmp/prompt" -n 2 --session "$tmp/torn"
list=$(tr '\n' ',' <"$tmp/prompt" | sed 's/,$//')
{
    echo "{\"ids\":[$list],\"n\":12}"
    echo "{\"prompt\":\"The \\\"sea\\\" \\u00e9\",\"n\":3}"
    echo "{\"ids\":[$list]}"
} >"$tmp/batch"
run 0 "generate --batch" generate -m "$model" --batch "$tmp/batch" -n 5 --stop-ids '' --json
json "batch: one object a line, each with its n" "$tmp/out" "[len(x['ids']) for x in all_lines] == [12, 3, 5]"
check "batch: the first equals the single run" test "$(head -1 "$tmp/out" | sed 's/.*"ids":\[\([^]]*\)\].*/\1/')" = "$(ids_of "$tmp/g1")"
batch_bad() { printf '%s\n' "$2" >"$tmp/bb"; run 1 "batch: $1" generate -m "$model" --batch "$tmp/bb"; check "... the line is named" grep -q 'line 1' "$tmp/err"; }
batch_bad "no JSON" 'hello'
batch_bad "neither prompt nor ids" '{"n":3}'
batch_bad "both" '{"prompt":"a","ids":[1]}'
batch_bad "a key twice" '{"n":1,"n":2,"ids":[1]}'
batch_bad "unknown key" '{"prompts":"a"}'
batch_bad "unfinished string" '{"prompt":"a'
batch_bad "an id outside the vocabulary" "{\"ids\":[$n_vocab]}"
batch_bad "no ids" '{"ids":[]}'
batch_bad "something behind" '{"ids":[1]} x'
run 1 "batch: an empty file" generate -m "$model" --batch /dev/null

# ---- what is too long, out of range or damaged: exit 1, with the numbers, the index, the offset or the key ----
said() { check "... $1" grep -qe "$2" "$tmp/err"; } # NAME PATTERN: the one line of the last run
i=0
: >"$tmp/many"
while [ $i -lt 300 ]; do echo $((i % n_vocab)); i=$((i + 1)); done >"$tmp/many"
run 1 "logits of more ids than --ctx" logits -m "$model" --ids "$tmp/many" --ctx 128 -o "$tmp/x.npy"
said "names both numbers" '300 .*128'
run 1 "generate with more ids than --ctx" generate -m "$model" --ids "$tmp/many" --ctx 128 -n 1
said "names both numbers" '300 .*128'
for i in 1 2 3 4 5 6 7 8; do cat "$tmp/text"; done >"$tmp/longtext"
count=$(tok <"$tmp/longtext" | wc -w | tr -d ' ')
run 1 "generate -f longer than --ctx" generate -m "$model" -f "$tmp/longtext" --ctx 64 -n 1
said "names both numbers" " \\($count\\|$((count + 1))\\|[0-9]*\\) tokens .* 64"
printf '{"ids":[1,2]}\n{"ids":[%s]}\n' "$(tr '\n' ',' <"$tmp/many" | sed 's/,$//')" >"$tmp/bb"
run 1 "batch: a prompt longer than --ctx" generate -m "$model" --batch "$tmp/bb" --ctx 128 -n 1
said "names both numbers" '300 .*128'
echo "1 2 $n_vocab 3" >"$tmp/badids"
for c in "logits -o $tmp/x.npy" "generate -n 1"; do
    run 1 "$c: an id outside the vocabulary" $c -m "$model" --ids "$tmp/badids"
    said "names index and id" "id 2 .*$n_vocab"
done
echo "1 -2" >"$tmp/badids"
run 1 "a negative id" logits -m "$model" --ids "$tmp/badids" -o "$tmp/x.npy"
said "names the index" 'id 1 '
echo "1 99999999999999999999999999" >"$tmp/badids"
run 1 "an id of 26 digits" logits -m "$model" --ids "$tmp/badids" -o "$tmp/x.npy"
said "names the index" 'id 1 '
: >"$tmp/noids"
run 1 "logits of no ids" logits -m "$model" --ids "$tmp/noids" -o "$tmp/x.npy"
run 1 "generate from no ids" generate -m "$model" --ids "$tmp/noids"
run 2 "--decode-from beyond the ids" logits -m "$model" --ids "$tmp/prompt" --decode-from $((n + 1)) -o "$tmp/x.npy"
run 0 "--decode-from at the end: no step" logits -m "$model" --ids "$tmp/prompt" --decode-from $n -o "$tmp/x.npy" --json
json "... says so" "$tmp/out" "d['decode_steps'] == 0"
rm -f "$tmp/x.npy"
run 1 "logits into a folder that is not there" logits -m "$model" --ids "$tmp/prompt" -o "$tmp/none/x.npy"
run 1 "convert into a folder that is not there" convert -m "$model" -o "$tmp/none/x.gguf"
run 1 "a session file in a folder that is not there" generate -m "$model" --ids "$tmp/prompt" -n 1 --session "$tmp/none/s"
run 1 "a device that is not there" generate -m "$model" -p x --device cuda:99
said "names it" 'cuda:99'
run 2 "an unknown chat format" generate -m "$model" -p x --chat-format frob
run 1 "calibration on too little text" heads calibrate -m "$model" -f "$tmp/text" -o "$tmp/r.json"
said "names both numbers" 'tokens, at least [0-9]'
check "... and writes nothing" test ! -e "$tmp/r.json"
run 1 "a folder without config.json" info -m "$tmp"
run 1 "a model that is no regular file" info -m /dev/null
run 0 "convert for the damage" convert -m "$model" -o "$tmp/good.gguf" --type q8_0
if $have_python; then
    spoil() { python3 -c "import sys; b=bytearray(open('$tmp/good.gguf','rb').read()); $1; open('$tmp/bad.gguf','wb').write(b)"; } # STATEMENTS on b
    spoil 'b[8:16]=b"\xff"*8'
    run 1 "a GGUF with a huge tensor count" info -m "$tmp/bad.gguf"
    said "names file and offset" 'bad.gguf: .*offset 8'
    spoil 'del b[len(b)//2:]'
    run 1 "half a GGUF" generate -m "$tmp/bad.gguf" -p x -n 1
    said "names file, tensor and offset" 'bad.gguf: tensor .*offset [0-9]'
    spoil 'i=b.find(b"general.architecture"); b[i:i+3]=b"GEN"'
    run 1 "a GGUF without architecture" info -m "$tmp/bad.gguf"
    said "names the key" 'bad.gguf: key "general.architecture"'
    spoil 'b[4]=1'
    run 1 "GGUF version 1" info -m "$tmp/bad.gguf"
    said "names version and offset" 'version 1 at offset 4'
    if [ -d "$model" ] && [ -f "$model/model.safetensors" ]; then
        mkdir "$tmp/folder" && cp "$model"/*.json "$model"/model.safetensors "$tmp/folder/"
        chmod u+w "$tmp/folder"/*
        python3 -c "f=open('$tmp/folder/model.safetensors','r+b'); f.write(b'\xff'*8)"
        run 1 "safetensors with a huge header" info -m "$tmp/folder"
        said "names file and offset" 'model.safetensors: .*offset 0'
        cp "$model/model.safetensors" "$tmp/folder/"
        python3 -c "import json; p='$tmp/folder/config.json'; c=json.load(open(p)); c['num_hidden_layers']=1.5; json.dump(c, open(p,'w'))"
        run 1 "a config.json with half a layer" info -m "$tmp/folder"
        said "names file and key" 'config.json: key "num_hidden_layers"'
        cp "$model/config.json" "$tmp/folder/"
        python3 -c "p='$tmp/folder/tokenizer.json'; s=open(p).read(); open(p,'w').write(s[:len(s)//2])"
        run 1 "half a tokenizer.json" info -m "$tmp/folder"
        said "names file and place" 'tokenizer.json: line '
    fi
    "$longan" generate -m "$model" --ids "$tmp/prompt" -n 1 --session "$tmp/other" >/dev/null 2>&1
    run 1 "a snapshot of another file of the model" generate -m "$tmp/good.gguf" --ids "$tmp/prompt" -n 1 --session "$tmp/other"
    said "says what does not fit" 'fingerprint'
else
    skip "damaged models (no python3)"
fi

# ---- chat ----
chat_format=$(field chat_format)
if [ -n "$chat_format" ] && [ "$chat_format" != null ]; then
    printf 'Hello\n/reset\nHello\n/quit\nnever read\n' | "$longan" chat -m "$model" -n 4 --json >"$tmp/out" 2>"$tmp/err"
    check "chat: exit 0" test $? -eq 0
    json "chat: two turns; the reset forgets the first" "$tmp/out" "len(d['turns']) == 2 and d['turns'][0]['ids'] == d['turns'][1]['ids'] and d['turns'][0]['prompt_tokens'] == d['turns'][1]['prompt_tokens']"
    printf 'Hello\nAgain\n' | "$longan" chat -m "$model" -n 4 --json >"$tmp/out" 2>"$tmp/err"
    json "chat: the second turn sees the first" "$tmp/out" "d['turns'][1]['prompt_tokens'] > d['turns'][0]['prompt_tokens'] + len(d['turns'][0]['ids'])"
else
    run 1 "chat without a chat format is refused" chat -m "$model"
    skip "chat: the model has no chat format"
fi

# ---- perplexity ----
for i in 1 2 3 4 5 6 7 8 9 10 11 12; do cat "$tmp/text"; done >"$tmp/long"
total=$(tok <"$tmp/long" | wc -w | tr -d ' ')
run 0 "perplexity" perplexity -m "$model" -f "$tmp/long" --ctx 32 --json
json "perplexity: keys and relations" "$tmp/out" "abs(d['ppl'] / __import__('math').exp(d['nll']) - 1) < 1e-9 and d['tokens'] == 31 * ($total // 32)"
run 0 "perplexity, one incomplete window" perplexity -m "$model" -f "$tmp/text" --ctx 64 --json
json "... is kept" "$tmp/out" "d['tokens'] == $(wc -w <"$tmp/ids") - 1"
run 1 "perplexity of nothing" perplexity -m "$model" -f /dev/null --ctx 64
run 2 "perplexity --ctx 1" perplexity -m "$model" -f "$tmp/long" --ctx 1

# ---- hybrid heads: layer 0 all retrieval, the rest by same index; then all windows ----
roles_file() { # KIND of the later layers
    printf '{"format":"longan-roles","version":1,"model":{"family":"%s","n_layer":%s,"n_head_kv":%s},"share":"same-index","roles":[' "$family" "$n_layer" "$n_kv"
    l=0
    while [ $l -lt "$n_layer" ]; do
        [ $l -gt 0 ] && printf ','
        printf '['
        h=0
        while [ $h -lt "$n_kv" ]; do
            [ $h -gt 0 ] && printf ','
            if [ $l -eq 0 ]; then printf '"retrieval"'; else printf '"%s"' "$1"; fi
            h=$((h + 1))
        done
        printf ']'
        l=$((l + 1))
    done
    printf '],"budget":12,"sinks":2,"recents":4}\n'
}
roles_file sparse >"$tmp/roles.json"
roles_file window >"$tmp/window.json"
run 0 "heads show" heads show "$tmp/roles.json"
run 0 "heads show --json" heads show "$tmp/roles.json" --json
json "... is JSON" "$tmp/out" "isinstance(d, dict)"
run 0 "heads plot" heads plot "$tmp/roles.json" -o "$tmp/roles.svg"
check "... is SVG" grep -q '<svg' "$tmp/roles.svg"
run 0 "logits with roles" logits -m "$model" --ids "$tmp/prompt" --decode-from 8 --roles "$tmp/roles.json" --sets "$tmp/sets" -o "$tmp/h.npy" --json
json "... reads less than dense; short steps are dense" "$tmp/out" "d['kv_bytes_read'] < d['kv_bytes_dense'] and d['decode_steps'] == 16 and d['dense_steps'] == 4"
json "--sets: budget, order, sinks, recents, the current token" "$tmp/sets" "(d['dense'] and d['sets'] == []) if d['position'] < 12 else (not d['dense'] and len(d['sets']) == $n_kv and all(s['layer'] == 0 and len(s['tokens']) == 12 and s['tokens'] == sorted(set(s['tokens'])) and s['tokens'][:2] == [0, 1] and s['tokens'][-4:] == list(range(d['position'] - 3, d['position'] + 1)) for s in d['sets']))"
run 0 "a budget of the whole context is dense" logits -m "$model" --ids "$tmp/prompt" --decode-from 8 --roles "$tmp/roles.json" --budget 64 -o "$tmp/h2.npy" --json
json "... every step" "$tmp/out" "d['dense_steps'] == d['decode_steps'] == 16"
run 0 "window heads" generate -m "$model" --ids "$tmp/prompt" -n 8 --stop-ids '' --roles "$tmp/window.json" --json
json "... read less than dense" "$tmp/out" "0 < d['kv_bytes_read'] < d['kv_bytes_dense']"
"$longan" generate -m "$model" --ids "$tmp/prompt" -n 8 --stop-ids '' --roles "$tmp/window.json" >"$tmp/out" 2>"$tmp/err"
check "a sparse run says its share of KV bytes" grep -q 'KV bytes read [0-9.]*%' "$tmp/err"
"$longan" logits -m "$model" --ids "$tmp/prompt" --roles "$tmp/roles.json" -o "$tmp/x.npy" >"$tmp/out" 2>"$tmp/err"
check "roles without --decode-from: said" grep -q 'hence dense' "$tmp/err"
"$longan" generate -m "$model" --ids "$tmp/prompt" -n 4 --roles "$tmp/roles.json" --budget 3 --json >"$tmp/out" 2>"$tmp/err"
check "a budget below sinks + recents is raised, and said" grep -q 'raised to 6' "$tmp/err"
sed 's/"family":"[0-9a-f]*"/"family":"00000000000000000000000000000000"/' "$tmp/roles.json" >"$tmp/other.json"
run 1 "roles of another family" generate -m "$model" --ids "$tmp/prompt" -n 2 --roles "$tmp/other.json"
"$longan" generate -m "$model" --ids "$tmp/prompt" -n 2 --roles "$tmp/other.json" --roles-any-model --json >"$tmp/out" 2>"$tmp/err"
check "--roles-any-model allows them and says so" sh -c "[ $? -eq 0 ] && [ -s '$tmp/err' ]"
sed 's/,"budget":12//' "$tmp/roles.json" >"$tmp/nobudget.json"
run 2 "no budget anywhere" generate -m "$model" --ids "$tmp/prompt" -n 2 --roles "$tmp/nobudget.json"
sed 's/"n_layer":[0-9]*/"n_layer":1/' "$tmp/roles.json" >"$tmp/layers.json"
run 1 "roles of a wrong size" heads show "$tmp/layers.json"

# ---- bench ----
run 0 "bench" bench -m "$model" --depth 24,48 --reps 2 --steps 4 --roles "$tmp/roles.json" --csv "$tmp/b.csv" --svg "$tmp/b.svg"
check "bench: the table has a row for depth and mode" sh -c "grep -q '^ *24 *dense' '$tmp/out' && grep -q '^ *48 *hybrid' '$tmp/out'"
check "bench: CSV" sh -c "[ \$(wc -l <'$tmp/b.csv') -eq 5 ] && head -1 '$tmp/b.csv' | grep -q '^mode,depth,prefill_tok_s,decode_ms'"
check "bench: SVG with two lines" sh -c "[ \$(grep -c '<polyline' '$tmp/b.svg') -eq 2 ]"
run 0 "bench --json" bench -m "$model" --depth 48,24 --reps 2 --steps 4 --roles "$tmp/roles.json" --json
json "bench: keys" "$tmp/out" "$(keys 'mode depth prefill_tok_s decode_ms decode_ms_min bytes_per_token kv_share n_retrieval budget reps device commit')"
json "bench: figures" "$tmp/out" "len(all_lines) == 4 and d['prefill_tok_s'] > 0 and 0 < d['decode_ms_min'] <= d['decode_ms'] and (d['kv_share'] == 1 and d['budget'] is None if d['mode'] == 'dense' else d['kv_share'] < 1 and d['budget'] == 12 and d['n_retrieval'] == $n_kv)"
run 0 "bench --synthetic beyond the window" bench -m "$model" --synthetic --depth $((n_ctx + 64)) --reps 1 --steps 2 --json
json "... has no prefill rate" "$tmp/out" "d['prefill_tok_s'] is None and d['depth'] == $n_ctx + 64"
run 0 "bench --synthetic takes --ctx beyond the window" bench -m "$model" --synthetic --ctx $((n_ctx + 128)) --depth 32 --reps 1 --steps 2 --json
run 1 "bench --synthetic beyond --ctx" bench -m "$model" --synthetic --ctx 64 --depth 128 --reps 1 --steps 2
run 1 "bench beyond the window without --synthetic" bench -m "$model" --depth $((n_ctx + 64)) --reps 1

# ---- convert ----
run 0 "convert" convert -m "$model" -o "$tmp/f32.gguf" --type f32 --json
json "convert: size" "$tmp/out" "d['file_bytes'] > 0"
run 0 "the converted file opens" info -m "$tmp/f32.gguf" --json
json "... family and parameters stay" "$tmp/out" "d['family'] == '$family' and d['n_params'] == $(field n_params) and d['arch'] == '$(field arch)'"
"$longan" tokenize -m "$tmp/f32.gguf" <"$tmp/text" >"$tmp/ids2" 2>"$tmp/err"
check "... its ids are the same" cmp -s "$tmp/ids" "$tmp/ids2"
"$longan" generate -m "$model" --ids "$tmp/prompt" -n 8 --stop-ids '' --compute f32 --json >"$tmp/c1" 2>"$tmp/err"
"$longan" generate -m "$tmp/f32.gguf" --ids "$tmp/prompt" -n 8 --stop-ids '' --compute f32 --json >"$tmp/c2" 2>"$tmp/err"
check "... and greedy text in f32" test "$(ids_of "$tmp/c1")" = "$(ids_of "$tmp/c2")"
run 1 "convert a missing model" convert -m "$tmp/none" -o "$tmp/y.gguf"
check "... leaves nothing" test ! -e "$tmp/y.gguf"
finish
