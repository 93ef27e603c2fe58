#!/bin/sh
# sh tools/quality-calibrate.sh LONGAN MODEL TEXT OUTDIR [OPTIONS]: donor and same-index maps, one after the other, as roles/ has them:
# OUTDIR/smollm2-135m-SHARE-nN.json and -SHARE-curve.csv. OPTIONS go to calibrate (--device cuda: 178 and 83 s on an H100).
set -eu
[ $# -ge 4 ] || { sed -n '2,3s/^# *//p' "$0" >&2; exit 2; }
longan=$1 model=$2 text=$3 out=$4
shift 4
mkdir -p "$out"
for share in donor same-index; do
    spread=off
    [ $share = same-index ] || spread=on
    "$longan" heads calibrate -m "$model" -f "$text" --compute f32 --share $share --spread $spread --retrieval 12 --also 8,12,18,24 --passages 16 --positions 1024 \
        --search 4 --refine 2 --seed 1 -o "$out/smollm2-135m-$share.json" --curve "$out/smollm2-135m-$share-curve.csv" "$@"
done
