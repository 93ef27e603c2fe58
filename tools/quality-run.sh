#!/bin/sh
# The whole quality study on one machine: sh tools/quality-run.sh BINARY MODEL ROLES_STEM TEXTS JOBS OUT [options of quality]
#   BINARY      build/tools/quality (make STATIC=1 build/tools/quality: it then needs nothing but glibc)
#   ROLES_STEM  ROLES_STEM-donor-nN.json and ROLES_STEM-same-index-nN.json are read
#   TEXTS       a folder of *.txt that calibration never saw (tools/quality-texts.py: held-out/)
#   JOBS        processes at once, one thread each
#   OUT         cases-*.csv, quality.csv and the logs; a second run goes on where the first stopped
# Then: python3 tools/quality-table.py OUT/quality.csv --svg docs/quality.svg
set -eu
[ $# -ge 6 ] || { sed -n '2,8s/^# *//p' "$0" >&2; exit 2; }
binary=$1 model=$2 stem=$3 texts=$4 jobs=$5 out=$6
shift 6
mkdir -p "$out"
OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
export OMP_NUM_THREADS OPENBLAS_NUM_THREADS
study() { "$binary" -m "$model" --roles "$stem" --dir "$out" --threads 1 "$@"; }
start=$(date +%s) pids='' failed=0 i=0
while [ "$i" -lt "$jobs" ]; do
    study --part "$i/$jobs" "$@" "$texts"/*.txt > "$out/log-$i.txt" 2>&1 &
    pids="$pids $!" i=$((i + 1))
done
for p in $pids; do
    wait "$p" || failed=$((failed + 1))
done
echo "quality: $jobs parts in $(($(date +%s) - start)) s, $failed failed; $(cat "$out"/cases-*.csv | wc -l) cases"
[ "$failed" -eq 0 ] || tail -n 2 "$out"/log-*.txt >&2
study --report "$@" "$texts"/*.txt
