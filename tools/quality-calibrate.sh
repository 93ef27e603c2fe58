#!/bin/sh
# sh tools/quality-calibrate.sh LONGAN MODEL TEXT OUTDIR: donor and same-index maps at once, 8 threads each; OUTDIR/smollm2-135m-SHARE-nN.json.
set -u
longan=$1 model=$2 text=$3 out=$4
mkdir -p "$out"
pids=''
for share in donor same-index; do
    OMP_NUM_THREADS=8 "$longan" heads calibrate -m "$model" -f "$text" --compute f32 --threads 8 --share $share --retrieval 12 --also 8,12,18,24 \
        --search 4 --refine 2 --seed 1 -o "$out/smollm2-135m-$share.json" --curve "$out/smollm2-135m-$share-curve.csv" > "$out/$share.log" 2>&1 &
    pids="$pids $!"
done
for p in $pids; do wait "$p" || echo "one failed, see $out/*.log"; done
ls -l "$out"
