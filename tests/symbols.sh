#!/bin/sh
# Every global symbol of the library begins with lg_, and it neither prints nor exits.
set -eu
cd "$(dirname "$0")/.."
lib=build/liblongan.a
[ -s $lib ] || { echo "symbols.sh: $lib is missing"; exit 1; }
bad=$(nm -g --defined-only $lib 2>/dev/null | awk 'NF == 3 && $3 !~ /^lg_/ { print $3 }')
[ -z "$bad" ] || { echo "symbols.sh: global without lg_: $bad"; exit 1; }
bad=$(nm -A -u $lib 2>/dev/null | awk '$NF ~ /^(printf|puts|putchar|vprintf|__printf_chk|__vprintf_chk|perror|exit|_exit|quick_exit|stdout|stderr)$/ { print $1, $NF }')
[ -z "$bad" ] || { echo "symbols.sh: the library prints or exits: $bad"; exit 1; }
