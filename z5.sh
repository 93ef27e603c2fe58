#!/bin/bash
D=$1; export C_INCLUDE_PATH=$D/include CPLUS_INCLUDE_PATH=$D/include LIBRARY_PATH=$D/lib LD_LIBRARY_PATH=$D/lib
i=0
while read n r q br bq; do
  nvcc -O3 -std=c++20 -gencode arch=compute_90a,code=sm_90a -DLG_CUDA_ARCH_90a -Iinclude -Isrc -Xcompiler -fno-threadsafe-statics -DROOM_R=$r -DROOM_Q=$q -DBEF_R=$br -DBEF_Q=$bq -c src/ops/cuda/stream.cu -o v$n.o > v$n.log 2>&1 &
done <<'C'
A 96 80 75 50
B 64 64 75 50
C 64 48 100 100
D 48 48 100 100
E 144 112 33 25
F 96 96 50 33
G 200 160 25 25
C
make -j12 CUDA=1 CI= all build-cuda/tests/ops > $OUT/build.log 2>&1; echo build $?; wait
grep -E "error|undefined" $OUT/build.log | head
cp build-cuda/longan lbase
for n in A B C D E F G; do g++ -fopenmp build-cuda/programs/*.o v$n.o build-cuda/liblongan.a -ljansson -lpcre2-8 -lutf8proc -lxxhash -lopenblas -lm -L/usr/local/cuda/lib64 -lcudart_static -ldl -lrt -lpthread -o l$n 2>&1 | tail -2; done
cat > /tmp/b.py <<'P'
import sys,json
for l in sys.stdin:
    try: d=json.loads(l)
    except Exception: print(l.strip()[:200]); continue
    print(d.get('mode')[0],d.get('depth')>>10,'%.3f'%d['decode_ms'],'%.3f'%d['decode_ms_min'], end=' | ')
print()
P
b() { timeout 60 $L bench --shape llama3-8b --synthetic --budget 4096 --device cuda --json "$@" 2>&1 | python3 /tmp/b.py; }
both() { echo "$1"; b --weights bf16 --kv bf16 --depth 8k,128k; b --weights q4_0 --kv bf16 --depth 8k,128k; }
for n in base A B C D E F G base; do L=./l$n; both $n; done
for h in 8 16 33; do export LG_AH=$h; for n in base B; do L=./l$n; both "$n ahead $h"; done; done; unset LG_AH
export LG_R0=1; for n in base B; do L=./l$n; both "$n r0"; done
export LG_AH=33;  for n in base B; do L=./l$n; both "$n r0 ahead 33"; done
