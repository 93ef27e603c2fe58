#!/bin/sh
# make install into a temporary prefix, the example built with pkg-config alone, run on a tiny model; uninstall leaves nothing.
set -eu
cd "$(dirname "$0")/.."
command -v pkg-config >/dev/null || { echo "skip: pkg-config not found"; exit 77; }
t=$(mktemp -d)
trap 'rm -rf "$t"' EXIT
fail() { echo "install.sh: $*"; exit 1; }
make -s install PREFIX="$t/usr" >/dev/null
export PKG_CONFIG_PATH="$t/usr/lib/pkgconfig"
# shellcheck disable=SC2046 # pkg-config prints words
${CC:-cc} -std=c11 -Wall -Wextra -Werror examples/minimal.c $(pkg-config --cflags --libs longan) -o "$t/minimal"
# The example prints what the installed program generates.
model=tests/fixtures/tiny-llama
"$t/usr/bin/longan" generate -m $model -p "In the beginning" -n 16 --threads 1 --json >"$t/json"
"$t/minimal" $model "In the beginning" >"$t/text"
python3 - "$t/json" "$t/text" <<'PY' || fail "example and program disagree"
import json, sys
want = json.load(open(sys.argv[1]))
got = open(sys.argv[2], encoding="utf-8").read()
assert len(want["ids"]) == 16 or want["stop_reason"] == "eos", want
assert got == want["text"] + "\n", (got, want["text"])
PY
rc=0; "$t/minimal" /nonexistent x >/dev/null 2>"$t/err" || rc=$?
[ "$rc" -eq 1 ] && [ "$(wc -l <"$t/err")" -eq 1 ] || fail "a missing model: exit $rc, $(cat "$t/err")"
# Staged installation: nothing outside DESTDIR, and the .pc file names the final prefix.
make -s install DESTDIR="$t/stage" PREFIX=/opt/longan >/dev/null
grep -qx 'prefix=/opt/longan' "$t/stage/opt/longan/lib/pkgconfig/longan.pc" || fail "longan.pc names another prefix"
make -s uninstall DESTDIR="$t/stage" PREFIX=/opt/longan >/dev/null
left=$(find "$t/stage" -type f)
[ -z "$left" ] || fail "uninstall left $left"
