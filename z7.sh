#!/bin/bash
D=$1; export C_INCLUDE_PATH=$D/include CPLUS_INCLUDE_PATH=$D/include LIBRARY_PATH=$D/lib LD_LIBRARY_PATH=$D/lib
nvidia-smi -L
(sh tests/cuda/decode_check.sh gpu > $OUT/dc.log 2>&1; echo dc $?) & make -j14 CUDA=1 CI= all build-cuda/tests/ops > $OUT/build.log 2>&1; echo build $?; wait; grep -E "error|undefined" $OUT/build.log $OUT/dc.log | head
timeout 60 build/check-gpu/decode_check check 1 200 > $OUT/dcheck.log 2>&1; echo dcheck $?; tail -1 $OUT/dcheck.log; grep -i fail $OUT/dcheck.log | head -5
timeout 100 build-cuda/tests/ops test --device cuda hybrid > $OUT/ops.log 2>&1; echo ops $?; tail -1 $OUT/ops.log; grep "^not ok" $OUT/ops.log | head
timeout 40 build-cuda/tests/ops test --device cuda attend > $OUT/opsa.log 2>&1; echo ops $?; tail -1 $OUT/opsa.log; grep "^not ok" $OUT/opsa.log | head
cat > /tmp/b.py <<'P'
import sys,json
for l in sys.stdin:
    try: d=json.loads(l)
    except Exception: print(l.strip()[:200]); continue
    print(d.get('mode')[0],d.get('depth')>>10,'%.3f'%d['decode_ms'],'%.3f'%d['decode_ms_min'], end=' | ')
print()
P
L=build-cuda/longan
b() { timeout 60 $L bench --shape llama3-8b --synthetic --budget 4096 --device cuda --json "$@" 2>&1 | python3 /tmp/b.py; }
all() { b --weights bf16 --kv bf16 --depth 8k,32k,128k;  b --weights q4_0 --kv bf16 --depth 8k,128k; b --weights q4_0 --kv q8 --depth 1m; }
all; export LG_X=1; LONGAN_CUDA_CLUSTERS=0 all; all
timeout 60 build/check-gpu/decode_check quick 2>&1 | tail -30
