# Longan. `make` builds build/longan and build/liblongan.a; `make test` builds and runs the unit tests.
# SAN=1 builds everything into build-san with ASan and UBSan.
CC ?= gcc
B := $(if $(SAN),build-san,build)
PREFIX ?= /usr/local
WARN := -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wstrict-prototypes $(if $(CI),-Werror)
# (a name of its own: a comma inside $(if) would end its argument)
SAN_CFLAGS := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
CFLAGS ?= $(if $(SAN),$(SAN_CFLAGS),-O2 -g)
COMMIT := $(shell git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
ALL_CFLAGS := -std=c11 -D_GNU_SOURCE -Iinclude -Isrc $(WARN) -fopenmp $(CFLAGS) -MMD -MP
KERNEL_CFLAGS := -O3 -fassociative-math -fno-signed-zeros -fno-trapping-math -ffp-contract=fast
LIBS := -ljansson -lpcre2-8 -lutf8proc -lxxhash -lopenblas -lm
LIB_SRC := $(wildcard src/*/*.c src/ops/ref/*.c src/ops/cpu/*.c)
LIB_OBJ := $(LIB_SRC:%.c=$(B)/%.o)
PROG_OBJ := $(patsubst %.c,$(B)/%.o,$(wildcard programs/*.c))
TESTS := $(patsubst tests/%.c,$(B)/tests/%,$(wildcard tests/test_*.c))

all: $(B)/longan $(B)/liblongan.a
$(B)/liblongan.a: $(LIB_OBJ)
	@rm -f $@; ar rcs $@ $^
$(B)/longan: $(PROG_OBJ) $(B)/liblongan.a
	$(CC) $(ALL_CFLAGS) $(PROG_OBJ) $(B)/liblongan.a $(LIBS) -o $@
# CPU kernels: one file per instruction set, flags by file name suffix.
$(B)/src/ops/cpu/%.o: EXTRA = $(KERNEL_CFLAGS)
$(B)/src/ops/cpu/%_avx2.o: EXTRA = $(KERNEL_CFLAGS) -mavx2 -mfma -mf16c
$(B)/src/ops/cpu/%_avx512.o: EXTRA = $(KERNEL_CFLAGS) -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma -mf16c -mavx2
$(B)/src/ops/cpu/%_amx.o: EXTRA = $(KERNEL_CFLAGS) -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512bf16 -mfma -mf16c -mavx2 -mamx-tile -mamx-int8 -mamx-bf16
$(B)/programs/%.o: EXTRA = -DLG_COMMIT='"$(COMMIT)"'
$(B)/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) $(EXTRA) -c $< -o $@
$(B)/tests/%: tests/%.c $(B)/liblongan.a
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) $< $(B)/liblongan.a $(LIBS) -lcmocka -o $@
tests: $(TESTS)
test: all tests
	@sh scripts/run-tests.sh $(B)
clean:
	rm -rf build build-san
.PHONY: all tests test clean
-include $(LIB_OBJ:.o=.d) $(PROG_OBJ:.o=.d)
