#!/bin/sh
# A bank build killed (kill -9) at 50 random moments and started again: the file equals that of an undisturbed build.
set -eu
cd "$(dirname "$0")/.."
bin=${LG_BUILD:-build}/tests/test_bank
[ -x "$bin" ] || { echo "skip: $bin is not built"; exit 77; }
t=$(mktemp -d)
trap 'rm -rf "$t"' EXIT
tokens=19200 # 600 chunks, 200 groups, at least 1 ms each
"$bin" --build "$t/whole" $tokens 2>/dev/null
killed=0 done=0 passed=0 round=0
while [ $killed -lt 50 ]; do
    round=$((round + 1))
    [ $round -le 400 ] || { echo "bank_kill.sh: only $killed of 50 builds were caught running"; exit 1; }
    "$bin" --build "$t/bank" $tokens 2>/dev/null &
    pid=$!
    sleep "0.$(awk -v s="$round$$" 'BEGIN { srand(s); printf "%03d", 5 + int(rand() * 150) }')"
    kill -9 $pid 2>/dev/null || true
    if wait $pid 2>/dev/null; then
        cmp -s "$t/whole" "$t/bank" || { echo "bank_kill.sh: after $killed kills the file differs"; exit 1; }
        passed=$((passed + 1)) done=$((done + 1))
        rm -f "$t/bank"
    else
        killed=$((killed + 1))
    fi
done
"$bin" --build "$t/bank" $tokens 2>"$t/log" || { cat "$t/log"; exit 1; }
cmp "$t/whole" "$t/bank" || { echo "bank_kill.sh: the file differs"; exit 1; }
[ ! -e "$t/bank.part" ] || { echo "bank_kill.sh: bank.part was left"; exit 1; }
echo "$killed kills, $((done + 1)) files finished, all equal"
