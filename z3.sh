#!/bin/bash
D=$1; export C_INCLUDE_PATH=$D/include CPLUS_INCLUDE_PATH=$D/include LIBRARY_PATH=$D/lib LD_LIBRARY_PATH=$D/lib
$2/mb
make -j16 CUDA=1 CI= all build-cuda/tests/ops > $OUT/build.log 2>&1; echo build $?
grep -E "error|undefined" $OUT/build.log | head
cat > /tmp/b.py <<'P'
import sys,json
for l in sys.stdin:
    try: d=json.loads(l)
    except Exception: print(l.strip()[:200]); continue
    print(d.get('mode')[0],d.get('depth')>>10,'%.3f'%d['decode_ms'],'%.3f'%d['decode_ms_min'], end=' | ')
print()
P
b() { timeout 60 $L bench --shape llama3-8b --synthetic --budget 4096 --device cuda --json "$@" 2>&1 | python3 /tmp/b.py; }
L=build-cuda/longan
q4() { echo "$1 q4 pre=$LG_PRE"; b --weights q4_0 --kv bf16 --depth 8k,128k; }
bf() { echo "$1 bf pre=$LG_PRE"; b --weights bf16 --kv bf16 --depth 8k,128k; }
export LG_PRE=50; timeout 100 build-cuda/tests/ops test --device cuda n1 > $OUT/ops.log 2>&1; echo ops $?; tail -1 $OUT/ops.log
for LG_PRE in 25 50 75 100 50 100; do q4 c2; done; for LG_PRE in 50 75 100 ; do bf c2; done
cp src/ops/cuda/stream.cu /tmp/keep.cu
v() { cp /tmp/keep.cu src/ops/cuda/stream.cu; for d in $1; do sed -i "s|^#ifndef STREAM_ROOM|#define ${d%=*} ${d#*=}\n#ifndef STREAM_ROOM|" src/ops/cuda/stream.cu; done; make -j16 CUDA=1 CI= all > $OUT/b2.log 2>&1; echo "$1 build $?"; grep -c spilled $OUT/b2.log; }
v STREAM_C=4; for LG_PRE in 50 100; do q4 c4; done
v "STREAM_C=2 STREAM_ROOM=112"; for LG_PRE in 50 100; do q4 c2r112; done
v "STREAM_CR=4"; for LG_PRE in 75 100; do bf cr4; done
v "STREAM_CR=1"; for LG_PRE in 100; do bf cr1; done
build-cuda/tests/ops perf --device cuda 2>/dev/null | grep -E "q4_0.*n1 |qkv q4_0" 
