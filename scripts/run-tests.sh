#!/bin/sh
# Runs every cmocka program of a build folder and counts its cases: sh scripts/run-tests.sh build [NAME ...]
# As many programs run at once as there are processors (LG_TEST_JOBS); each reports when it ends.
# A program that ends early, times out or leaves cases of its plan unreported counts these as failed.
# A skipped case is named with the reason that the test printed before it ("skip: why").
# Writes "passed failed skipped" to BUILD/tests/summary; exit 1 when anything failed.
set -u
cd "$(dirname "$0")/.." || exit 1

one() { # BUILD NAME: runs it, leaves its counts in NAME.counts, reports in one write
    build=$1 name=$2 log=$1/tests/$2.log
    began=$(date +%s)
    timeout "${LG_TEST_TIMEOUT:-600}" "$build/tests/$name" >"$log" 2>&1 </dev/null
    rc=$?
    times >"$build/tests/$name.times" # (of this process's children: the program)
    cpu=$(awk 'NR == 2 { gsub(/[ms]/, " "); print int(60 * ($1 + $3) + $2 + $4) }' "$build/tests/$name.times")
    # The cases of one run, from TAP: plan "1..N", "ok I - name", "not ok I - name".
    counts=$(awk -v rc=$rc -v name="$name" -v out="$build/tests/$name.notes" '
        BEGIN { printf "" > out }
        /^1\.\.[0-9]+/ { plan += substr($0, 4) + 0 }
        /^(# *)?skip: / { why = $0; sub(/^(# *)?skip: /, "", why) }
        /^(not )?ok [0-9]+/ {
            what = $0; sub(/^(not )?ok [0-9]+ *(- )?/, "", what)
            if (what ~ /# *SKIP/) { # cmocka 1.1.5 says "not ok I # SKIP name", later ones "ok I # SKIP name"
                s++; sub(/ *# *SKIP */, "", what)
                printf "  skipped %s.%s: %s\n", name, what, why == "" ? "no reason given" : why > out
            } else if ($1 == "ok") p++
            else { f++; printf "  FAILED %s.%s\n", name, what > out }
            why = ""
        }
        END {
            lost = plan - p - f - s
            if (plan == 0) { lost = 1; printf "  FAILED %s: no test was run (exit %d)\n", name, rc > out }
            else if (lost > 0) printf "  FAILED %s: ended with %d of %d cases unreported (exit %d)\n", name, lost, plan, rc > out
            else if (rc != 0 && f == 0) { lost = 1; printf "  FAILED %s: exit %d after its cases\n", name, rc > out }
            if (lost < 0) lost = 0
            print p + 0, f + lost, s + 0
        }' "$log")
    echo "$counts" >"$build/tests/$name.counts"
    # shellcheck disable=SC2086 # three numbers
    set -- $counts
    report=$(printf '%-28s %4d passed %3d failed %3d skipped  %4d s, CPU %4d s\n' "$name" "$1" "$2" "$3" $(($(date +%s) - began)) "$cpu"
        cat "$build/tests/$name.notes"
        [ "$2" -eq 0 ] || { echo "  --- last lines of $log"; tail -n 40 "$log" | sed 's/^/  | /'; })
    printf '%s\n' "$report"
}
if [ "${1:-}" = --one ]; then
    one "$2" "$3"
    exit 0
fi

build=${1:?usage: run-tests.sh BUILD [NAME ...]}
shift
if [ $# -eq 0 ]; then
    for f in tests/test_*.c; do [ -e "$f" ] && set -- "$@" "$(basename "$f" .c)"; done
fi
[ $# -gt 0 ] || { echo "run-tests: no tests/test_*.c" >&2; exit 1; }
mkdir -p "$build/tests"
export CMOCKA_MESSAGE_OUTPUT=TAP
export ASAN_OPTIONS="${ASAN_OPTIONS:-detect_stack_use_after_return=1:strict_string_checks=1}"
export UBSAN_OPTIONS="${UBSAN_OPTIONS:-print_stacktrace=1:halt_on_error=1}"
for name in "$@"; do rm -f "$build/tests/$name.counts"; done
printf '%s\n' "$@" | xargs -P "${LG_TEST_JOBS:-$(nproc 2>/dev/null || echo 1)}" -I NAME sh scripts/run-tests.sh --one "$build" NAME
passed=0 failed=0 skipped=0
for name in "$@"; do
    p=0 f=1 s=0
    if [ -s "$build/tests/$name.counts" ]; then read -r p f s <"$build/tests/$name.counts"; else echo "  FAILED $name: was not run to its end"; fi
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
done
echo "$passed $failed $skipped" >"$build/tests/summary"
[ -n "${LG_TEST_NESTED:-}" ] || echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
