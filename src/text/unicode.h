/* Private: character classes of the pre-tokenizers beyond the Unicode version of PCRE2. */
#ifndef LG_TEXT_UNICODE_H
#define LG_TEXT_UNICODE_H
typedef struct lg_text_class {
    const char *name, *base; /* as in \p{name}; the property of PCRE2 it extends */
    const char *more;        /* inside of a bracketed class */
} lg_text_class;
extern const lg_text_class lg_text_classes[]; /* name NULL: the end */
#endif
