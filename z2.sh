#!/bin/bash
D=$1; export C_INCLUDE_PATH=$D/include CPLUS_INCLUDE_PATH=$D/include LIBRARY_PATH=$D/lib LD_LIBRARY_PATH=$D/lib
nvidia-smi -L
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
both() { echo "$1 pre=$LG_PRE l2=$LG_L2 beyond=$LG_BEYOND aq=$LG_AQ"; b --weights bf16 --kv bf16 --depth 8k,128k; b --weights q4_0 --kv bf16 --depth 8k,128k; }
export LG_PRE LG_L2 LG_BEYOND
LG_PRE=50 LG_L2=256 LG_BEYOND=128 timeout 100 build-cuda/tests/ops test --device cuda n1 > $OUT/ops.log 2>&1; echo ops $?; tail -1 $OUT/ops.log
for rep in 1 2; do
while read LG_PRE LG_L2 LG_BEYOND; do both r$rep; done <<'C'
100 0 0
100 128 0
50 0 0
50 128 0
50 256 0
25 256 0
50 256 256
50 512 512
C
done
unset LG_AQ; LG_PRE=50 LG_L2=256 LG_BEYOND=256; export LG_AQ=1; both aq; unset LG_AQ
cp build-cuda/longan l1
for v in "-DSTREAM_C=2" "-DSTREAM_ROOM=176" "-DSTREAM_ROOM=112"; do
  sed "s|^#include \"ops/cuda/stream.cuh\"|#define ${v#-D}\n#include \"ops/cuda/stream.cuh\"|; s|^#define STREAM_C=2|#define STREAM_C 2|; s|^#define STREAM_ROOM=|#define STREAM_ROOM |" src/ops/cuda/stream.cu > /tmp/s.cu; cp src/ops/cuda/stream.cu /tmp/keep.cu; cp /tmp/s.cu src/ops/cuda/stream.cu
  make -j16 CUDA=1 CI= all > $OUT/b2.log 2>&1; echo "$v build $?"; cp /tmp/keep.cu src/ops/cuda/stream.cu
  LG_PRE=100 LG_L2=0 LG_BEYOND=0; both "$v"; LG_PRE=50 LG_L2=256 LG_BEYOND=0; both "$v"
done
