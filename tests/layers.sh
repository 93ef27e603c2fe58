#!/bin/sh
# tools/check-layers finds what it is there to find, and the tree is clean.
set -eu
cd "$(dirname "$0")/.."
t=$(mktemp -d)
trap 'rm -rf "$t"' EXIT
fail() { echo "layers.sh: $*"; exit 1; }
fresh() {
    rm -rf "$t/r"; mkdir -p "$t/r/docs" "$t/r/include/longan" "$t/r/src/base" "$t/r/src/file" "$t/r/src/ops" "$t/r/programs"
    cp docs/LAYERS.md "$t/r/docs/"
    echo '#include <stdint.h>' >"$t/r/include/longan/longan.h"
    echo '#include "longan/longan.h"' >"$t/r/src/base/base.h"
    echo '#include "base/base.h"' >"$t/r/src/file/file.h"
    printf '#include <jansson.h>\n#include "file/file.h"\n' >"$t/r/src/file/json.c"
}
refused() { # FILE LINE TEXT WHERE: this line in this file is a breach, reported at WHERE
    fresh
    printf '/* one */\n%s\n' "$2" >"$t/r/$1"
    rc=0; tools/check-layers "$t/r" >"$t/out" 2>&1 || rc=$?
    [ "$rc" -eq 1 ] || fail "'$2' in $1: exit $rc, wanted 1: $(cat "$t/out")"
    grep -q "^$1:2: .*$3" "$t/out" || fail "'$2' in $1 was reported as: $(cat "$t/out")"
}
fresh
tools/check-layers "$t/r" >"$t/out" || fail "a clean tree was refused: $(cat "$t/out")"
refused src/base/up.c '#include "file/file.h"' 'base may not include'
refused src/ops/side.c '#include "file/file.h"' 'ops may not include'
refused programs/deep.c '#include "../src/base/base.h"' 'programs may not include'
refused src/file/other.c '#include <jansson.h>' 'only in src/file/json.c'
refused src/base/new.c '#include <curl/curl.h>' 'no row'
refused src/base/gone.c '  #  include "base/gone.h"' 'no such file'
rc=0; rm "$t/r/docs/LAYERS.md"; echo >"$t/r/docs/LAYERS.md"; tools/check-layers "$t/r" >/dev/null 2>&1 || rc=$?
[ "$rc" -eq 2 ] || fail "a law without tables gave exit $rc, wanted 2"
tools/check-layers
