#!/bin/bash
D=$1; export C_INCLUDE_PATH=$D/include CPLUS_INCLUDE_PATH=$D/include LIBRARY_PATH=$D/lib LD_LIBRARY_PATH=$D/lib
make -j16 CUDA=1 CI= all build-cuda/tests/ops > $OUT/build.log 2>&1; echo build $?
grep -E "error|undefined" $OUT/build.log | head
ls /usr/local/cuda/lib64/libcupti* /usr/local/cuda/extras/CUPTI/lib64/libcupti.so* 2>/dev/null | head -3
mkdir -p /root/tr; cp $2/* /root/tr/; xz -dc /root/tr/cupti.xz > /root/tr/libcupti.so.13; export LD_LIBRARY_PATH=$LD_LIBRARY_PATH:/root/tr
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
for i in 1 2; do b --weights bf16 --kv bf16 --depth 8k,32k,128k;  b --weights q4_0 --kv bf16 --depth 8k,128k; done
tr() { o=$1; shift; TRACE_OUT=$OUT/$o CUDA_INJECTION64_PATH=/root/tr/libtr.so b "$@"; wc -l $OUT/$o; }
tr d8bf.txt --weights bf16 --kv bf16 --depth 8k --retrieval 0
tr d8q4.txt --weights q4_0 --kv bf16 --depth 8k --retrieval 0
tr h128q4.txt --weights q4_0 --kv bf16 --depth 128k
tr h128bf.txt --weights bf16 --kv bf16 --depth 128k
tr h8q4.txt --weights q4_0 --kv bf16 --depth 8k
tr h1mq4.txt --weights q4_0 --kv q8 --depth 1m
