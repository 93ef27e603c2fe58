#!/bin/sh
# Everything that needs a GPU, in stages that each end inside a time limit.
#
#   sh scripts/gpu-run.sh pack                  where the libraries and nvcc are: builds with STATIC=1 and fills .gpu/1, .gpu/2 ...
#   sh scripts/gpu-run.sh STAGE ...             on the machine with the GPU, from the root of the repository
#
# pack    .gpu/1: programs (stripped, one tar.xz), texts and a part of SmolLM2; .gpu/2 and on: its other parts. Each with the tracked files
#         stays below 62 MiB. Carry one a call: $GPU_STORE (/var/tmp/longan-gpu) keeps them between calls and joins the parts when all are there.
# build   instead of pack, where the GPU machine has compilers: make cuda there, with headers and libraries of .gpu/dep (include/, lib/) if
#         that was carried. LONGAN_SMOLLM2 names the model then.
# check   op cases on the device (f32 and auto), decode_check, prefill_check, sample_check
# parity  tests/gpu.sh: every command, CPU against CUDA
# sanitize  compute-sanitizer memcheck, racecheck, initcheck: small cases of every op and dtype, the small cases of the checks, short generations
# all       the same tools on the whole op table, or on the cases that SAN_CASES lets through
# perf    ops perf, decode_check time, prefill_check time
# bench   bench/vs_torch.py (BENCH_ARGS: more options for it)
# quality tools/quality-run.sh on the processor's cores
#
# Logs go to $OUT (./gpu-out without it), one a stage; a summary comes last. TOTAL_LIMIT (580) seconds bound the whole call: a stage gets
# its own limit or what is left. Exit 1 when a stage failed or ran out of time.
set -u
cd "$(dirname "$0")/.." || exit 1
usage() { sed -n '2,/^set -u/{/^set/d;s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
[ $# -gt 0 ] || usage
model_name=SmolLM2-135M-Instruct.Q4_1.gguf

pack() {
    model=${LONGAN_SMOLLM2:-.cache/models/$model_name}
    rm -f build-cuda/longan build-cuda/tests/ops build-cuda/tests/cuda/*_check build/tools/quality
    make -j"$(nproc)" STATIC=1 cuda && make -j"$(nproc)" STATIC=1 build/tools/quality || exit 1
    rm -rf .gpu/[1-9]; mkdir -p .gpu/1/bin
    for f in build-cuda/longan build-cuda/tests/ops build-cuda/tests/cuda/*_check build/tools/quality; do
        if [ -x "$f" ]; then strip -o ".gpu/1/bin/$(basename "$f")" "$f"; else echo "pack: $f is missing" >&2; fi
    done
    git rev-parse --short=12 HEAD >.gpu/1/bin/commit
    XZ_OPT='-1 --lzma2=preset=1,dict=64MiB' tar -C .gpu/1 -cJf .gpu/1/bin.tar.xz bin && rm -r .gpu/1/bin # (the programs have most of their bytes in common)
    if [ -n "${GPU_TEXTS:-}" ]; then tar -C "$GPU_TEXTS" -cJf .gpu/1/texts.tar.xz .; fi # tools/quality-texts.py: held-out texts
    room=$((62 * 1024 * 1024 - $(git ls-files -z | xargs -0 cat | wc -c)))
    if [ -s "$model" ]; then
        sha256sum <"$model" | cut -d' ' -f1 >.gpu/1/model.sum
        i=1 at=0 size=$(wc -c <"$model")
        while [ "$at" -lt "$size" ]; do
            mkdir -p ".gpu/$i"
            n=$((room - $(cat ".gpu/$i"/* 2>/dev/null | wc -c)))
            if [ "$n" -le 0 ] || [ "$i" -gt 9 ]; then echo "pack: no room for the model beside the tracked files" >&2; exit 1; fi
            tail -c +"$((at + 1))" "$model" | head -c "$n" >".gpu/$i/model.$i"
            at=$((at + n)) i=$((i + 1))
        done
    else echo "pack: no model at $model: stages that need SmolLM2 will skip it" >&2; fi
    du -sm .gpu/[1-9]
}
if [ "$1" = pack ]; then [ $# -eq 1 ] || usage; pack; exit; fi

OUT=${OUT:-gpu-out}
STORE=${GPU_STORE:-/var/tmp/longan-gpu}
mkdir -p "$OUT" "$STORE"
for f in .gpu/[1-9]/*; do # what this call carried
    case $f in
    *'*') ;;
    *) cmp -s "$f" "$STORE/$(basename "$f")" || cp "$f" "$STORE/" ;;
    esac
done
[ ! -s "$STORE/bin.tar.xz" ] || tar -C "$STORE" -xJf "$STORE/bin.tar.xz"
if [ -d .gpu/dep ]; then
    dep=$PWD/.gpu/dep
    export C_INCLUDE_PATH="$dep/include" CPLUS_INCLUDE_PATH="$dep/include" LIBRARY_PATH="$dep/lib" LD_LIBRARY_PATH="$dep/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
fi
prog() { # NAME: built here, else carried
    for f in build-cuda/"$1" build-cuda/tests/"$1" build-cuda/tests/cuda/"$1" build/tools/"$1" "$STORE/bin/$1"; do [ -f "$f" ] && [ -x "$f" ] && break; done
    echo "$f"
}
if [ -s "$STORE/texts.tar.xz" ]; then mkdir -p "$STORE/texts"; tar -C "$STORE/texts" -xJf "$STORE/texts.tar.xz"; fi
if [ ! -s "$STORE/$model_name" ] && [ -s "$STORE/model.sum" ] && [ -s "$STORE/model.1" ]; then
    cat "$STORE"/model.[1-9] >"$STORE/$model_name.part"
    if [ "$(sha256sum <"$STORE/$model_name.part" | cut -d' ' -f1)" = "$(cat "$STORE/model.sum")" ]; then mv "$STORE/$model_name.part" "$STORE/$model_name"
    else echo "gpu-run: parts of the model are missing so far" >&2; rm -f "$STORE/$model_name.part"; fi
fi
if [ -z "${LONGAN_SMOLLM2:-}" ]; then
    for m in "$STORE/$model_name" ".cache/models/$model_name"; do [ -s "$m" ] && { LONGAN_SMOLLM2=$m; export LONGAN_SMOLLM2; break; }; done
fi

command -v compute-sanitizer >/dev/null || PATH=$PATH:/usr/local/cuda/bin
began=$(date +%s)
total=${TOTAL_LIMIT:-580}
failed='' summary=$OUT/summary.txt
: >"$summary"
note() { echo "$*" | tee -a "$summary"; }
now() { echo $(($(date +%s) - began)); }
left() { l=$((total - $(now))); [ "$l" -gt "$1" ] && l=$1; echo "$l"; }

# part LOG LIMIT NAME COMMAND...: output into LOG; one line about it
part() {
    log=$OUT/$1.log; limit=$(left "$2"); name=$3; shift 3
    if [ "$limit" -lt 5 ]; then note "not run   $name: no time left"; failed="$failed $name"; return 1; fi
    if [ ! -x "$1" ] && ! command -v "$1" >/dev/null; then note "not run   $name: no $1"; failed="$failed $name"; return 1; fi
    printf '\n=== %s: %s\n' "$name" "$*" >>"$log"
    t0=$(date +%s)
    timeout -k 5 "$limit" "$@" >"$STORE/part.out" 2>&1 </dev/null
    rc=$?
    head -c 3000000 "$STORE/part.out" >>"$log"
    printf '=== exit %d, %d s\n' "$rc" $(($(date +%s) - t0)) >>"$log"
    if [ "$rc" -eq 0 ]; then note "passed    $name ($(($(date +%s) - t0)) s)"; return 0; fi
    failed="$failed $name"
    if [ "$rc" -eq 124 ] || [ "$rc" -eq 137 ]; then note "TIME OUT  $name after $limit s"; else note "FAILED    $name: exit $rc ($(($(date +%s) - t0)) s)"; fi
    grep -a -E 'FAILED|^not ok|=========|error|Error' "$STORE/part.out" | head -n 12 | cut -c1-200 | sed 's/^/            /' | tee -a "$summary"
    return 1
}
show() { grep -a -E "$1" "$STORE/part.out" | cut -c1-170 | tail -n "$2" | sed 's/^/            /' | tee -a "$summary"; } # from the part before

build() {
    part build 400 "make cuda" make -j"$(nproc)" cuda
}
check() {
    part check 60 decode_check "$(prog decode_check)" check
    part check 120 prefill_check "$(prog prefill_check)" check; show 'runs, ' 1
    part check 60 sample_check "$(prog sample_check)"
    for mode in f32 auto; do part check 150 "ops $mode" sh scripts/ops-parts.sh "${JOBS:-8}" "$(prog ops)" test --device cuda --compute $mode; show 'passed, ' 1; done
}
parity() {
    export LONGAN JOBS=${JOBS:-8}
    LONGAN=$(prog longan)
    part parity 300 parity sh tests/gpu.sh; show '^FAIL|passed, ' 20
}
# Programs, the small cases of the checks, and small cases of every op, every dtype of weights and cache, every kind of kernel. SAN_TOOLS: fewer tools, when one call is too short.
sanitize() {
    products='33x256 n1|33x256 n5|33x256 n8|33x256 n40|17x37|200x256 n3 lora|gate_up q4_1 200x256 n20 lora|gate_up bf16 200x256 n20 lora'
    others='576x576 n3 kv|576x576 n33 kv|1024x576 n33 kv|kv_write|argmax 1001|sample 1001'
    attention='len 64,65|d64 kv3 g3 len 1500,700,2111 topk block 1|hybrid kv bf16 d64 kv3 g3|hybrid kv q8 d128 kv1 g8'
    for tool in ${SAN_TOOLS:-memcheck racecheck initcheck}; do
        san() { name=$1; limit=$2; shift 2; part sanitize "$limit" "$tool $name" compute-sanitizer --tool "$tool" --error-exitcode 77 --print-limit 20 "$@" && show 'SUMMARY:|passed, ' 2; }
        san generate 60 "$(prog longan)" generate -m tests/fixtures/tiny-llama -p "In the beginning" -n 8 --device cuda --json
        san "hybrid, sampled" 60 "$(prog longan)" generate -m tests/fixtures/tiny-hybrid -p "In the beginning was the word, and the word was read by few heads" -n 8 \
            --device cuda --roles tests/fixtures/tiny-hybrid/roles/cross.json --roles-any-model --budget 12 --sinks 2 --recents 4 --temp 0.9 --top-k 40 --top-p 0.9 \
            --repeat-penalty 1.1 --json
        san sample_check 60 "$(prog sample_check)" 1 12
        san prefill_check 80 "$(prog prefill_check)" small
        san decode_check 80 "$(prog decode_check)" check 1 12
        for cases in "$products" "$others" "$attention"; do
            san "ops ${cases%%|*} ..." 200 "$(prog ops)" test --device cuda "$cases"
        done
    done
}
# The whole op table, JOBS processes beside each other, SAN_LIMIT seconds each tool: on an H100 memcheck and initcheck take 45 s with 15, racecheck about 1,100 in all (products, layers and
# what is small 205, attention and hybrid 730, observe 170), so in parts by SAN_CASES. It reports kernels of cuBLAS (nvjet), whose barriers it does not follow; they cannot be left out, as the tool then fails in them.
all() {
    OMP_NUM_THREADS=1 OPS_LIMIT=${SAN_LIMIT:-150} OPS_FOREIGN='nvjet_'
    export OMP_NUM_THREADS OPS_LIMIT OPS_FOREIGN
    for tool in ${SAN_TOOLS:-memcheck racecheck initcheck}; do
        part all $((OPS_LIMIT + 20)) "$tool, ${SAN_CASES:-whole table}" sh scripts/ops-parts.sh "${JOBS:-8}" compute-sanitizer --tool "$tool" --error-exitcode 77 --print-limit 200 \
            "$(prog ops)" test --device cuda ${SAN_CASES:+"$SAN_CASES"}
        show 'passed, ' 1
    done
}
perf() {
    part perf 120 "prefill_check time" "$(prog prefill_check)" time; show '^time' 40
    part perf 120 "decode_check time" "$(prog decode_check)" time; show '.' 40
    part perf 200 "ops perf" "$(prog ops)" perf --device cuda; show '.' 60
}
bench() {
    limit=$(left 560)
    # shellcheck disable=SC2086 # options
    part bench 560 bench python3 bench/vs_torch.py --longan "$(prog longan)" --limit $((limit - 100)) --csv "$OUT/vs_torch.csv" --json "$OUT/vs_torch.jsonl" ${BENCH_ARGS:-}
    show '^(what|---|dense|hybrid|prefill|SmolLM2|NVIDIA|no time)' 40
}
quality() {
    # shellcheck disable=SC2086 # options
    part quality 560 quality sh tools/quality-run.sh "$(prog quality)" "${LONGAN_SMOLLM2:-none}" roles/smollm2-135m "$STORE/texts" "${QUALITY_JOBS:-$(nproc)}" "$STORE/quality" ${QUALITY_ARGS:-}
    tar -C "$STORE" -czf "$OUT/quality.tgz" quality 2>/dev/null
    show '.' 40
}

note "gpu-run $*: $(cat "$(prog commit)" 2>/dev/null || git rev-parse --short=12 HEAD 2>/dev/null), $(nvidia-smi --query-gpu=name,driver_version,memory.free --format=csv,noheader 2>&1 | head -n 1)"
note "model: ${LONGAN_SMOLLM2:-none}; program: $(prog longan)"
for stage in "$@"; do
    case $stage in
    build | check | parity | sanitize | all | perf | bench | quality) note "--- $stage ($(now) s)"; $stage ;;
    *) usage ;;
    esac
done
printf '\n======== summary (%d s)\n' "$(now)"
cat "$summary"
[ -z "$failed" ] || echo "failed or not run:$failed"
[ -z "$failed" ]
