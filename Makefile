# Longan. `make` builds build/longan and build/liblongan.a; `make test` builds and runs the unit tests.
#   install, uninstall   PREFIX (default /usr/local), DESTDIR
#   tools, benches       tools/*.c and bench/*.c -> build/tools/*, build/bench/*
#   cuda                 everything again with src/ops/cuda/*.cu, into build-cuda (needs nvcc); CUDA_ARCH=80 for others than Hopper
#   soak                 the mutation tests with SEEDS seeds under ASan and UBSan (default 200000)
#   fuzz                 libFuzzer targets tests/fuzz/*.c -> build-fuzz/fuzz/* (needs clang)
# STATIC=1 links the libraries into the programs, but for glibc (after a build without it: rm the programs first).
# SAN=1 builds everything into build-san with ASan and UBSan; CUDA=1 is what `make cuda` sets.
# DNNL=1 lets bench/gemm_bench measure oneDNN (libdnnl-dev) beside OpenBLAS.
CC ?= gcc
NVCC ?= $(firstword $(wildcard /usr/local/cuda/bin/nvcc) nvcc)
CUDA_ARCH ?= 90a
B := $(if $(FUZZ),build-fuzz,$(if $(SAN),build-san,$(if $(CUDA),build-cuda,build)))
O := $(if $(CUDA),build,$(B))# objects of .c files: the CUDA build takes those of the plain one, but for find.o
PREFIX ?= /usr/local
VERSION := 0.1.0
# (no -Werror under sanitizers: their checks widen types and make gcc 12 see conversions that are not in the source)
WARN := -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wstrict-prototypes $(if $(CI),$(if $(SAN)$(FUZZ),,-Werror))
# (a name of its own: a comma inside $(if) would end its argument)
SAN_CFLAGS := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
CFLAGS ?= $(if $(FUZZ),$(SAN_CFLAGS) -fsanitize=fuzzer-no-link,$(if $(SAN),$(SAN_CFLAGS),-O2 -g))
COMMIT := $(shell git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
ALL_CFLAGS := -std=c11 -D_GNU_SOURCE -Iinclude -Isrc $(WARN) -fopenmp $(CFLAGS) -MMD -MP
comma := ,
# (under the sanitizers -O3 would multiply the checks: minutes and gigabytes for one file; the fuzzers are for the readers)
KERNEL_CFLAGS := $(if $(FUZZ),-O1 -fno-sanitize=all,$(if $(SAN),-O1 -fno-sanitize=alignment$(comma)null$(comma)object-size$(comma)pointer-overflow,-O3)) -fassociative-math -fno-signed-zeros -fno-trapping-math -ffp-contract=fast
LIBS := -ljansson -lpcre2-8 -lutf8proc -lxxhash -lopenblas -lm
ifdef STATIC # for machines that have none of the libraries: only glibc stays dynamic
LIBS := -static-libgcc -Wl,-Bstatic -ljansson -lpcre2-8 -lutf8proc -lxxhash -lopenblas -lgomp -Wl,-Bdynamic -lm -lpthread -ldl
endif
LIB_SRC := $(wildcard src/*/*.c src/ops/ref/*.c src/ops/cpu/*.c)
LIB_OBJ := $(LIB_SRC:%.c=$(B)/%.o)
ifdef CUDA # the CUDA runtime is linked statically; everything else of CUDA is opened at run time
CUDA_SRC := $(wildcard src/ops/cuda/*.cu)
LIB_OBJ += $(CUDA_SRC:%.cu=$(B)/%.cu.o)
CUDA_HOME := $(patsubst %/bin/nvcc,%,$(shell command -v $(NVCC)))
LIBS += -L$(CUDA_HOME)/lib64 -lcudart_static -ldl -lrt -lpthread
endif
PROG_OBJ := $(patsubst %.c,$(B)/%.o,$(wildcard programs/*.c))
TESTS := $(patsubst tests/%.c,$(B)/tests/%,$(wildcard tests/test_*.c))
TESTS += $(B)/tests/ops
TOOLS := $(patsubst %.c,$(B)/%,$(wildcard tools/*.c))
BENCHES := $(patsubst %.c,$(B)/%,$(wildcard bench/*.c))
FUZZERS := $(patsubst tests/fuzz/%.c,$(B)/fuzz/%,$(wildcard tests/fuzz/fuzz_*.c))

all: $(B)/longan $(B)/liblongan.a
$(B)/liblongan.a: $(LIB_OBJ)
	@rm -f $@; ar rcs $@ $^
$(B)/longan: $(PROG_OBJ) $(B)/liblongan.a
	$(CC) $(ALL_CFLAGS) $(PROG_OBJ) $(B)/liblongan.a $(LIBS) -o $@
# CPU kernels: one file per instruction set, flags by file name suffix.
$(O)/src/ops/cpu/%.o: EXTRA = $(KERNEL_CFLAGS)
$(O)/src/ops/cpu/%_avx2.o: EXTRA = $(KERNEL_CFLAGS) -mavx2 -mfma -mf16c
$(O)/src/ops/cpu/%_avx512.o: EXTRA = $(KERNEL_CFLAGS) -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma -mf16c -mavx2
$(O)/src/ops/cpu/%_bf16.o: EXTRA = $(KERNEL_CFLAGS) -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mfma -mf16c -mavx2
$(O)/src/ops/cpu/%_amx.o: EXTRA = $(KERNEL_CFLAGS) -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512bf16 -mfma -mf16c -mavx2 -mamx-tile -mamx-int8 -mamx-bf16
$(O)/programs/%.o: EXTRA = -DLG_COMMIT='"$(COMMIT)"'
$(PROG_OBJ:$(B)/%=$(O)/%): $(O)/commit
$(O)/commit: FORCE
	@mkdir -p $(@D); echo $(COMMIT) | cmp -s - $@ || echo $(COMMIT) > $@
$(O)/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) $(EXTRA) -c $< -o $@
ifdef CUDA
$(B)/src/ops/find.o: src/ops/find.c
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) -DLG_CUDA -c $< -o $@
$(B)/%.o: $(O)/%.o
	@mkdir -p $(@D); cp -p $< $@
.SECONDARY: $(patsubst $(B)/%,$(O)/%,$(filter-out %.cu.o,$(LIB_OBJ)) $(PROG_OBJ))
endif
$(B)/tests/%: tests/%.c $(B)/liblongan.a
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) $< $(B)/liblongan.a $(LIBS) -lcmocka -o $@
$(B)/tests/ops: tests/ops_cases.c $(B)/liblongan.a
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) $< $(B)/liblongan.a $(LIBS) -o $@
$(B)/tools/% $(B)/bench/%: EXTRA = -DLG_COMMIT='"$(COMMIT)"'
$(B)/tools/%: tools/%.c $(B)/liblongan.a
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) $(EXTRA) $< $(B)/liblongan.a $(LIBS) -o $@
ifdef DNNL
$(B)/bench/gemm_bench: EXTRA += -DLG_DNNL
$(B)/bench/gemm_bench: LIBS += -ldnnl
endif
$(B)/bench/%: bench/%.c $(B)/liblongan.a
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) $(EXTRA) $< $(B)/liblongan.a $(LIBS) -o $@
$(B)/fuzz/%: tests/fuzz/%.c $(B)/liblongan.a
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) -fsanitize=fuzzer $< $(B)/liblongan.a $(LIBS) -o $@
# Checks of single kernels on the GPU: stand-alone programs.
$(B)/tests/cuda/%: tests/cuda/%.cu $(B)/liblongan.a
	@mkdir -p $(@D)
	$(NVCC) -O2 -std=c++20 -gencode arch=compute_$(CUDA_ARCH),code=sm_$(CUDA_ARCH) -DLG_CUDA_ARCH_$(CUDA_ARCH) -Iinclude -Isrc -Xcompiler -Wall,-Wextra,-fno-threadsafe-statics $< $(B)/liblongan.a \
	    -Xcompiler -fopenmp --cudart static -lpthread -ldl -o $@
$(B)/%.cu.o: %.cu
	@mkdir -p $(@D)
	$(NVCC) -O3 -lineinfo -std=c++20 -gencode arch=compute_$(CUDA_ARCH),code=sm_$(CUDA_ARCH) -DLG_CUDA_ARCH_$(CUDA_ARCH) -Iinclude -Isrc -Xcompiler -Wall,-Wextra,-fno-threadsafe-statics \
	    -Xptxas -warn-spills -MD -MP -MF $(@:.o=.d) -c $< -o $@

tests: $(TESTS)
tools: $(TOOLS)
benches: $(BENCHES)
test: all tests
	@sh scripts/run-tests.sh $(B)

SEEDS ?= 200000
SOAK := $(patsubst tests/%.c,%,$(wildcard tests/test_mut*.c))
soak:
	$(if $(SOAK),,$(error no tests/test_mut*.c))
	$(MAKE) SAN=1 $(SOAK:%=build-san/tests/%)
	@LONGAN_SEEDS=$(SEEDS) LG_TEST_TIMEOUT=86400 sh scripts/run-tests.sh build-san $(SOAK)

cuda:
	$(if $(wildcard src/ops/cuda/*.cu),,$(error no src/ops/cuda/*.cu: this tree has no CUDA back end))
	$(if $(shell command -v $(NVCC)),,$(error nvcc not found: put it on PATH or set NVCC))
	$(MAKE) CUDA=1 all build-cuda/tests/ops $(patsubst tests/cuda/%.cu,build-cuda/tests/cuda/%,$(wildcard tests/cuda/*_check.cu))

fuzz:
	$(if $(wildcard tests/fuzz/fuzz_*.c),,$(error no tests/fuzz/fuzz_*.c))
	$(if $(shell command -v clang),,$(error clang not found: libFuzzer is clang's))
	$(MAKE) FUZZ=1 CC=clang CI= fuzzers
fuzzers: $(FUZZERS)

# A static library: whoever links it links its libraries too.
$(B)/longan.pc: Makefile
	@mkdir -p $(@D)
	@printf '%s\n' 'prefix=$(PREFIX)' 'libdir=$${prefix}/lib' 'includedir=$${prefix}/include' '' 'Name: longan' \
	    'Description: long-context LLM engine' 'Version: $(VERSION)' 'Cflags: -I$${includedir}' \
	    'Libs: -L$${libdir} -llongan -fopenmp $(LIBS)' > $@
DEST = $(DESTDIR)$(PREFIX)
install: all
	@rm -f $(B)/longan.pc; $(MAKE) --no-print-directory $(B)/longan.pc
	install -d $(DEST)/bin $(DEST)/lib/pkgconfig $(DEST)/include/longan $(DEST)/share/longan/roles $(DEST)/share/man/man1
	install -m 755 $(B)/longan $(DEST)/bin/longan
	install -m 644 $(B)/liblongan.a $(DEST)/lib/liblongan.a
	install -m 644 include/longan/*.h $(DEST)/include/longan/
	install -m 644 $(B)/longan.pc $(DEST)/lib/pkgconfig/longan.pc
	$(if $(wildcard roles/*.json),install -m 644 roles/*.json $(DEST)/share/longan/roles/)
	$(if $(wildcard docs/*.1),install -m 644 docs/*.1 $(DEST)/share/man/man1/)
uninstall:
	rm -f $(DEST)/bin/longan $(DEST)/lib/liblongan.a $(DEST)/lib/pkgconfig/longan.pc $(DEST)/share/man/man1/longan.1
	rm -rf $(DEST)/include/longan $(DEST)/share/longan

clean:
	rm -rf build build-san build-cuda build-fuzz
FORCE:
.PHONY: all tests tools benches test soak cuda fuzz fuzzers install uninstall clean FORCE
-include $(LIB_OBJ:.o=.d) $(PROG_OBJ:.o=.d) $(if $(CUDA),$(patsubst $(B)/%.o,$(O)/%.d,$(LIB_OBJ) $(PROG_OBJ))) $(TESTS:=.d) $(TOOLS:=.d) $(BENCHES:=.d) $(FUZZERS:=.d)
