#!/bin/sh
# Every op of the CPU back end against the specification: the case table of tests/ops_cases.c, both compute modes. The same program runs it
# on a GPU: build-cuda/tests/ops test --device cuda
set -u
cd "$(dirname "$0")/.."
ops=build/tests/ops
[ -x $ops ] || { echo "ops.sh: $ops is missing"; exit 1; }
passed=0 failed=0 skipped=0 log=build/tests/ops.log
for compute in auto f32; do
    $ops test --compute $compute >$log 2>&1
    rc=$?
    grep '^not ok' $log
    # shellcheck disable=SC2046 # three numbers
    set -- $(sed -n 's/^\([0-9]*\) passed, \([0-9]*\) failed, \([0-9]*\) skipped$/\1 \2 \3/p' $log)
    [ $# -eq 3 ] || { tail -n 3 $log; echo "ops.sh: the program ended early (exit $rc)"; set -- 0 1 0; }
    passed=$((passed + $1)) failed=$((failed + $2)) skipped=$((skipped + $3))
done
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
