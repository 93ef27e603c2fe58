#!/bin/sh
# Installs, builds, runs every test and closes with "N passed, N failed, N skipped".
# Order: build, CUDA build where nvcc is, unit tests, tests/*.sh, ASan + UBSan, valgrind on a tiny model.
# A test is a cmocka case, a script of tests/, or one of the steps below. Logs: build/log/. Each section closes with its
# wall-clock and CPU seconds.
set -u
cd "$(dirname "$0")/.." || exit 1
[ $# -eq 0 ] || { echo "usage: sh scripts/test.sh" >&2; exit 2; }
jobs=$(nproc 2>/dev/null || echo 1)
passed=0 failed=0 skipped=0 broken=
began=$(date +%s)
mkdir -p build/log
section=
# cpu: whole CPU seconds of all children so far, into $cpu. (A subshell has no children yet: the file is needed.)
cpu() { times >build/log/times; cpu=$(awk 'NR == 2 { gsub(/[ms]/, " "); print int(60 * ($1 + $3) + $2 + $4) }' build/log/times); }
close_section() {
    cpu
    [ -z "$section" ] || printf -- '-- %s: %d s, CPU %d s\n' "$section" $(($(date +%s) - section_began)) $((cpu - section_cpu))
}
head1() {
    close_section
    section=$*
    section_began=$(date +%s) section_cpu=$cpu
    printf '\n== %s\n' "$section"
}
pass() { passed=$((passed + 1)); echo "passed   $1"; }
skip() { skipped=$((skipped + 1)); echo "skipped  $1: $2"; }
fail() { failed=$((failed + 1)); broken="$broken $1"; echo "FAILED   $1"; }
finish() {
    close_section
    [ -z "$broken" ] || printf '\nfailed:%s\n' "$broken"
    printf '\n%d s, CPU %d s\n%d passed, %d failed, %d skipped\n' $(($(date +%s) - began)) "$cpu" "$passed" "$failed" "$skipped"
    [ "$failed" -eq 0 ]
    exit
}
step() { # NAME COMMAND...: passes with the command; its output is shown only when it fails
    name=$1; shift
    if "$@" >"build/log/$name.log" 2>&1 </dev/null; then pass "$name"; else
        fail "$name"; tail -n 40 "build/log/$name.log" | sed 's/^/  | /'; return 1
    fi
}
unit() { # BUILD [NAME ...]: the cmocka programs of a build folder
    rm -f "$1/tests/summary"
    LG_TEST_NESTED=1 sh scripts/run-tests.sh "$@" || true
    if [ -s "$1/tests/summary" ]; then
        read -r p f s <"$1/tests/summary"
        passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
        [ "$f" -eq 0 ] || broken="$broken $1/tests"
    else fail "$1/tests"; fi
}

head1 "set-up"
sh scripts/setup.sh build test demo || { fail setup; finish; }
export LONGAN_SMOLLM2="${LONGAN_CACHE:-.cache}/models/SmolLM2-135M-Instruct.Q4_1.gguf"

head1 "build"
step build make -s -j"$jobs" all tests tools benches || finish
if ! command -v nvcc >/dev/null && [ ! -x /usr/local/cuda/bin/nvcc ]; then skip cuda-build "nvcc not found"
elif ! ls src/ops/cuda/*.cu >/dev/null 2>&1; then skip cuda-build "this tree has no CUDA back end"
else step cuda-build make -s -j"$jobs" cuda; fi

head1 "unit tests"
unit build

head1 "scripts"
for t in tests/*.sh; do
    name=$(basename "$t" .sh)
    LG_BUILD=build timeout "${LG_TEST_TIMEOUT:-600}" sh "$t" >"build/log/$name.log" 2>&1 </dev/null
    rc=$?
    # A script with checks of its own closes with their counts; the others are one test.
    counts=$(sed -n 's/^\([0-9]*\) passed, \([0-9]*\) failed, \([0-9]*\) skipped$/\1 \2 \3/p' "build/log/$name.log" | tail -n 1)
    if [ -n "$counts" ] && [ "$rc" -le 1 ]; then
        read -r p f s <<COUNTS
$counts
COUNTS
        [ "$rc" -eq 0 ] || [ "$f" -gt 0 ] || f=1
        printf '%-28s %4d passed %3d failed %3d skipped\n' "$name" "$p" "$f" "$s"
        grep -i '^skip' "build/log/$name.log" | sed 's/^/  /'
        passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
        [ "$f" -eq 0 ] || { broken="$broken $name"; grep -A 4 '^FAIL' "build/log/$name.log" | sed 's/^/  | /'; }
        continue
    fi
    case $rc in
    0) pass "$name" ;;
    77) skip "$name" "$(sed -n 's/^skip: *//p' "build/log/$name.log" | tail -n 1)" ;;
    *) fail "$name"; tail -n 40 "build/log/$name.log" | sed 's/^/  | /' ;;
    esac
done

head1 "ASan, UBSan"
# test_memory_cases is figures of the real model over thousands of rows: many minutes here, and test_memory walks the same code.
under_san=$(for t in tests/test_*.c; do basename "$t" .c; done | grep -vx test_memory_cases)
# shellcheck disable=SC2086 # names
if step sanitizer-build make -s -j"$jobs" SAN=1 all tests; then
    unit build-san $under_san
    [ ! -e tests/test_memory_cases.c ] || skip build-san/test_memory_cases "figures of the real model; test_memory walks the same code"
fi

head1 "valgrind"
tiny=tests/fixtures/tiny-llama
# valgrind knows no AVX-512; leaks of the OpenMP runtime's own pool are only "possible".
memcheck() {
    LG_CPU_ISA=avx2 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 valgrind -q --error-exitcode=99 --leak-check=full \
        --errors-for-leak-kinds=definite --show-leak-kinds=definite "$@"
}
step valgrind-generate memcheck build/longan generate -m $tiny -p "In the beginning" -n 4 --threads 1 --json
step valgrind-tokenize memcheck sh -c 'exec build/longan tokenize -m tests/fixtures/tiny-llama <README.md'
finish
