#!/bin/sh
# Every op of the CPU back end against the specification: the case table of tests/ops_cases.c, both compute modes beside each other. The same
# program runs it on a GPU: build-cuda/tests/ops test --device cuda
set -u
cd "$(dirname "$0")/.."
ops=build/tests/ops
[ -x $ops ] || { echo "ops.sh: $ops is missing"; exit 1; }
passed=0 failed=0 skipped=0
for compute in auto f32; do
    { $ops test --compute $compute >build/tests/ops-$compute.log 2>&1; echo $? >build/tests/ops-$compute.rc; } &
done
wait
for compute in auto f32; do
    log=build/tests/ops-$compute.log
    grep '^not ok' $log
    # shellcheck disable=SC2046 # three numbers
    set -- $(sed -n 's/^\([0-9]*\) passed, \([0-9]*\) failed, \([0-9]*\) skipped$/\1 \2 \3/p' $log)
    [ $# -eq 3 ] || { tail -n 3 $log; echo "ops.sh: the program ended early (exit $(cat build/tests/ops-$compute.rc))"; set -- 0 1 0; }
    [ "$(cat build/tests/ops-$compute.rc)" -le 1 ] || set -- "$1" $(($2 + 1)) "$3"
    passed=$((passed + $1)) failed=$((failed + $2)) skipped=$((skipped + $3))
done
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
