/* The page of ask --trace-html: one file without outside parts. For each question: the answer, the chunks as one strip of cells
 * coloured by the gate's score, what was read step by step, and the place in the text where the answer stands. */
#include <ctype.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "ask.h"

static void escape(buf *b, const char *s, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        switch (s[i]) {
        case '<': buf_puts(b, "&lt;"); break;
        case '>': buf_puts(b, "&gt;"); break;
        case '&': buf_puts(b, "&amp;"); break;
        case '"': buf_puts(b, "&quot;"); break;
        default: buf_add(b, s + i, 1);
        }
    }
}

static void escape_ids(const asked *a, const int32_t *ids, int64_t n, buf *b)
{
    buf t = {0};
    ask_text(a, ids, n, &t);
    escape(b, t.data, t.n);
    buf_free(&t);
}

static void page_head(buf *b)
{
    buf_puts(b, "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>longan ask</title>\n<style>\n"
                "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}\n"
                "h1{font-size:1.3rem}h2{font-size:1.1rem;margin-top:2.5rem;border-top:1px solid #ccc;padding-top:1rem}\n"
                ".answer{font-size:1.2rem;background:#eef6ee;border-left:4px solid #3a7d44;padding:.5rem .8rem}\n"
                ".strip{display:flex;flex-wrap:wrap;gap:1px;margin:.6rem 0}.strip i{width:9px;height:18px;background:#ddd}\n"
                ".strip i.read{outline:2px solid #1f5fa8}.strip i.won{outline:3px solid #3a7d44}\n"
                "table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.25rem .6rem;border-bottom:1px solid #e4e4e4;vertical-align:top}\n"
                "td.n{text-align:right;font-variant-numeric:tabular-nums}tr.no td{color:#888}.bar{background:#1f5fa8;height:9px;display:inline-block}\n"
                "pre{white-space:pre-wrap;background:#f6f6f4;padding:.6rem .8rem;margin:.4rem 0;font:13px/1.45 ui-monospace,monospace}\n"
                "mark{background:#ffe08a}small{color:#666}details summary{cursor:pointer;color:#1f5fa8}\n</style></head><body>\n");
}

/* Score of each chunk in the steps (NAN: not looked at), and whether it was read. */
static void gather(const asked *a, const lg_answer *r, double *score, char *read)
{
    for (int64_t c = 0; c < a->info.n_chunk; c++)
        score[c] = NAN;
    for (int64_t i = 0; i < r->n_step; i++) {
        const lg_ask_step *s = &r->step[i];
        if (s->chunk < 0 || s->chunk >= a->info.n_chunk)
            continue;
        if (!isnan(s->gate_score))
            score[s->chunk] = s->gate_score;
        read[s->chunk] = (char)(read[s->chunk] | (s->accepted ? 1 : 0));
    }
}

static void strip(const asked *a, const lg_answer *r, buf *b)
{
    double *score = cli_alloc(NULL, (size_t)a->info.n_chunk, sizeof *score), top = 0;
    char *read = calloc((size_t)a->info.n_chunk, 1);
    if (!read)
        exit(failed("out of memory"));
    gather(a, r, score, read);
    for (int64_t c = 0; c < a->info.n_chunk; c++)
        top = score[c] > top ? score[c] : top;
    buf_puts(b, "<div class=\"strip\">");
    for (int64_t c = 0; c < a->info.n_chunk; c++) {
        double share = top > 0 && score[c] > 0 ? score[c] / top : 0;
        buf_printf(b, "<i class=\"%s\" style=\"background:rgba(31,95,168,%.2f)\" title=\"chunk %lld", c == r->chunk ? "won" : read[c] ? "read" : "",
                   0.08 + 0.92 * share, (long long)c);
        if (!isnan(score[c]))
            buf_printf(b, ", gate %.4g", score[c]);
        buf_puts(b, "\"></i>");
    }
    buf_puts(b, "</div><small>One cell per chunk, from the beginning of the document to its end; darker: a higher gate score; "
                "framed: read; green: the answer's chunk.</small>\n");
    free(score);
    free(read);
}

static void steps(const asked *a, const lg_answer *r, buf *b)
{
    buf_puts(b, "<table><tr><th>step</th><th>chunk</th><th>bytes</th><th>gate</th><th>mean ln p</th><th>time</th><th></th></tr>\n");
    for (int64_t i = 0; i < r->n_step; i++) {
        const lg_ask_step *s = &r->step[i];
        int64_t begin, end;
        ask_range(a, s->token_begin, s->token_end, &begin, &end);
        buf_printf(b, "<tr class=\"%s\"><td class=\"n\">%lld</td><td class=\"n\">", s->accepted ? "" : "no", (long long)i + 1);
        if (s->chunk >= 0)
            buf_printf(b, "%lld", (long long)s->chunk);
        else
            buf_puts(b, "answer");
        buf_puts(b, "</td><td class=\"n\">");
        if (begin >= 0)
            buf_printf(b, "%lld&ndash;%lld", (long long)begin, (long long)end);
        buf_puts(b, "</td><td class=\"n\">");
        if (!isnan(s->gate_score))
            buf_printf(b, "%.4g", s->gate_score);
        buf_puts(b, "</td><td class=\"n\">");
        if (!isnan(s->logprob))
            buf_printf(b, "%.3f", s->logprob);
        buf_printf(b, "</td><td class=\"n\">%.2f s</td><td>", s->seconds);
        if (!s->accepted)
            buf_puts(b, "rejected");
        if (s->memory.data) {
            buf_printf(b, "<details><summary>memory, %lld tokens</summary><pre>", (long long)s->memory.n);
            escape_ids(a, s->memory.data, s->memory.n, b);
            buf_puts(b, "</pre></details>");
        }
        if (s->prompt.data) {
            buf_printf(b, "<details><summary>prompt, %lld tokens at position %lld</summary><pre>", (long long)s->prompt.n, (long long)s->position0);
            escape_ids(a, s->prompt.data, s->prompt.n < 4096 ? s->prompt.n : 4096, b);
            buf_puts(b, s->prompt.n < 4096 ? "</pre></details>" : "\n[...]</pre></details>");
        }
        buf_puts(b, "</td></tr>\n");
    }
    buf_puts(b, "</table>\n");
}

static const char *find(const char *s, size_t n, const char *what, size_t k)
{
    for (size_t i = 0; k && i + k <= n; i++) {
        size_t j = 0;
        while (j < k && tolower((unsigned char)s[i + j]) == tolower((unsigned char)what[j]))
            j++;
        if (j == k)
            return s + i;
    }
    return NULL;
}

/* The neighbourhood of every place in this chunk where the answer stands, letter case aside; at most five. */
static bool excerpt(const asked *a, const lg_answer *r, int64_t chunk, buf *b)
{
    enum { AROUND = 240 };
    lg_bank_chunk x;
    buf t = {0};
    bool found = false;
    size_t k = (size_t)r->text.n;
    if (!k || lg_bank_get_chunk(a->bank, chunk, &x, NULL) != LG_OK)
        return false;
    ask_text(a, lg_bank_ids(a->bank) + x.token_begin, x.token_end - x.token_begin, &t);
    const char *at = t.data, *end = t.data + t.n;
    for (int hits = 0; hits < 5 && (at = find(at, (size_t)(end - at), r->text.data, k)) != NULL; hits++, at += k) {
        const char *from = at - t.data > AROUND ? at - AROUND : t.data, *to = end - (at + k) > AROUND ? at + k + AROUND : end;
        while (from > t.data && ((unsigned char)*from & 0xC0) == 0x80)
            from--;
        while (to < end && ((unsigned char)*to & 0xC0) == 0x80)
            to++;
        buf_printf(b, "<small>chunk %lld, about %lld bytes into it</small><pre>", (long long)chunk, (long long)(at - t.data));
        escape(b, from, (size_t)(at - from));
        buf_puts(b, "<mark>");
        escape(b, at, k);
        buf_puts(b, "</mark>");
        escape(b, at + k, (size_t)(to - at) - k);
        buf_puts(b, "</pre>\n");
        found = true;
    }
    buf_free(&t);
    return found;
}

static void places(const asked *a, const lg_answer *r, buf *b)
{
    bool any = false;
    buf_puts(b, "<h3>Where in the text the answer stands</h3>\n");
    if (r->chunk >= 0)
        any = excerpt(a, r, r->chunk, b);
    for (int64_t i = 0; i < r->n_step && r->chunk < 0 && a->o->mode == 0; i++) /* the loop: chunks that were read */
        if (r->step[i].chunk >= 0 && r->step[i].accepted)
            any |= excerpt(a, r, r->step[i].chunk, b);
    if (!any)
        buf_puts(b, "<p>The answer does not stand word for word in a chunk that was read.</p>\n");
}

void ask_page(const asked *a, buf *b)
{
    page_head(b);
    buf_printf(b, "<h1>longan ask</h1><p>%lld tokens in %lld chunks of %lld; %lld question%s.</p>\n", (long long)a->info.n_tokens,
               (long long)a->info.n_chunk, (long long)a->info.chunk, (long long)a->n, a->n == 1 ? "" : "s");
    for (int64_t q = 0; q < a->n; q++) {
        const lg_answer *r = &a->answer[q];
        buf_puts(b, "<h2>");
        escape_ids(a, a->question[q].data, a->question[q].n, b);
        buf_puts(b, "</h2>\n<p class=\"answer\">");
        escape(b, r->text.n ? r->text.data : "", (size_t)r->text.n);
        buf_printf(b, "</p>\n<p><small>build %.2f s, gate %.2f s, reading %.2f s, answer %.2f s</small></p>\n", a->build_s, r->gate_s, r->read_s,
                   r->answer_s);
        strip(a, r, b);
        steps(a, r, b);
        places(a, r, b);
    }
    buf_puts(b, "</body></html>\n");
}
