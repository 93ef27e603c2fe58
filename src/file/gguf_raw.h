/* Between the GGUF reader and writer: a metadata value as it lies in the file. */
#ifndef LG_GGUF_RAW_H
#define LG_GGUF_RAW_H
#include "file/file.h"
enum { LG_GGUF_STR = 8, LG_GGUF_ARR = 9 };
typedef struct lg_gguf_raw { int32_t type, elem; int64_t n, bytes; const uint8_t *data; } lg_gguf_raw; /* a string: its bytes without length */
bool lg_file_gguf_raw(const lg_gguf *g, const char *key, lg_gguf_raw *out);
#endif
