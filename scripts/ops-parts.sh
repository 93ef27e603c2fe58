#!/bin/sh
# The case table of tests/ops_cases.c in several processes: sh scripts/ops-parts.sh N COMMAND ..., where COMMAND is `ops test ...` (or a tool that runs it). Prints cases that
# failed, what a tool reports (lines that begin with =========), and a line for all; exit 1 unless every process ended with 0. OPS_LIMIT: seconds that each may take.
# OPS_FOREIGN: kernels of a library (a regular expression); a process that ends with 77 (the tool's --error-exitcode) for reports of these alone is as good as one that ends with 0.
set -u
[ $# -gt 2 ] || { sed -n '2,3s/^# //p' "$0" >&2; exit 2; }
n=$1; shift
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
k=0 bad=0 report='^========= (Error|Warning|Invalid|Uninitialized|Internal|Program hit)'
while [ $k -lt "$n" ]; do
    k=$((k + 1))
    { timeout -k 5 "${OPS_LIMIT:-86400}" "$@" --part $k/"$n" >"$dir/$k.log" 2>&1; echo $? >"$dir/$k.rc"; } &
done
wait
for k in $(seq "$n"); do
    rc=$(cat "$dir/$k.rc" 2>/dev/null || echo none)
    if [ "$rc" = 77 ] && [ -n "${OPS_FOREIGN:-}" ]; then
        all=$(grep -a -c -E "$report" "$dir/$k.log") theirs=$(grep -a -E "$report" "$dir/$k.log" | grep -a -c -E "$OPS_FOREIGN")
        [ "$all" -eq "$theirs" ] && [ "$all" -gt 0 ] && rc=0
        foreign=$((${foreign:-0} + theirs))
    fi
    [ "$rc" = 0 ] || { bad=1; echo "part $k/$n: exit $rc"; }
    grep -a -A 8 -E '^not ok|^ops:' "$dir/$k.log" | head -n 40
    [ "$rc" = 0 ] || grep -a '^=========' "$dir/$k.log" | grep -a -v -E '^========= *$|COMPUTE-SANITIZER|SUMMARY: 0 ' | head -n 20
done
cat "$dir"/*.log | awk '/^ok.*# SKIP/ { s++; next } /^ok/ { p++ } /^not ok/ { f++ } END { printf "%d passed, %d failed, %d skipped\n", p, f, s }'
[ -z "${foreign:-}" ] || echo "reports of kernels that are not ours ($OPS_FOREIGN): $foreign"
exit $bad
