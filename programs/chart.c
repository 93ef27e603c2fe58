/* Line charts as SVG: logarithmic x axis (base 2), linear y axis from zero, a legend. No script, no fonts. */
#include <math.h>
#include <string.h>

#include "cli.h"

enum { WIDTH = 760, HEIGHT = 440, LEFT = 76, RIGHT = 24, TOP = 52, BOTTOM = 62 };

typedef struct frame { double x0, x1, y1; } frame; /* log2 of the x range, top of the y axis */

static double place_x(const frame *f, double log2_x)
{
    double span = f->x1 > f->x0 ? f->x1 - f->x0 : 1;
    return LEFT + (log2_x - f->x0) / span * (WIDTH - LEFT - RIGHT);
}

static double place_y(const frame *f, double y)
{
    return HEIGHT - BOTTOM - y / f->y1 * (HEIGHT - TOP - BOTTOM);
}

static void escaped(buf *b, const char *s)
{
    for (; *s; s++) {
        if (*s == '&')
            buf_puts(b, "&amp;");
        else if (*s == '<')
            buf_puts(b, "&lt;");
        else if (*s == '>')
            buf_puts(b, "&gt;");
        else
            buf_add(b, s, 1);
    }
}

static void label(buf *b, double x, double y, const char *more, const char *text)
{
    buf_printf(b, "<text x=\"%.1f\" y=\"%.1f\" %s>", x, y, more);
    escaped(b, text);
    buf_puts(b, "</text>\n");
}

static void line(buf *b, double xa, double ya, double xb, double yb, const char *colour)
{
    buf_printf(b, "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"%s\"/>\n", xa, ya, xb, yb,
               colour);
}

/* 1, 2 or 5 times a power of ten, so that about five steps reach max. */
static double nice_step(double max)
{
    double raw = max / 5, unit = pow(10, floor(log10(raw)));
    double m = raw / unit;
    return unit * (m <= 1 ? 1 : m <= 2 ? 2 : m <= 5 ? 5 : 10);
}

static void depth_text(int64_t x, char *out, size_t size)
{
    if (x >= 1024 && x % 1024 == 0)
        snprintf(out, size, "%lldk", (long long)(x / 1024));
    else
        snprintf(out, size, "%lld", (long long)x);
}

static void axes(buf *b, const frame *f, const int64_t *x, int64_t n_x, double step)
{
    for (int64_t i = 0; i <= (int64_t)(f->y1 / step + 0.5); i++) {
        char text[32];
        double y = (double)i * step, at = place_y(f, y);
        line(b, LEFT, at, WIDTH - RIGHT, at, i ? "#e2e2e2" : "#333333");
        snprintf(text, sizeof text, "%g", y);
        label(b, LEFT - 8, at + 4, "text-anchor=\"end\"", text);
    }
    line(b, LEFT, TOP, LEFT, HEIGHT - BOTTOM, "#333333");
    for (int64_t i = 0; i < n_x; i++) {
        char text[32];
        double at = place_x(f, log2((double)x[i]));
        depth_text(x[i], text, sizeof text);
        line(b, at, HEIGHT - BOTTOM, at, HEIGHT - BOTTOM + 5, "#333333");
        label(b, at, HEIGHT - BOTTOM + 20, "text-anchor=\"middle\"", text);
    }
}

static void curve(buf *b, const frame *f, const int64_t *x, int64_t n_x, const chart_series *s)
{
    bool open = false;
    for (int64_t i = 0; i < n_x; i++) {
        if (s->y[i] < 0) {
            if (open)
                buf_puts(b, "\"/>\n");
            open = false;
            continue;
        }
        if (!open)
            buf_printf(b, "<polyline fill=\"none\" stroke=\"%s\" stroke-width=\"2.5\" points=\"", s->colour);
        buf_printf(b, "%s%.1f,%.1f", open ? " " : "", place_x(f, log2((double)x[i])), place_y(f, s->y[i]));
        open = true;
    }
    if (open)
        buf_puts(b, "\"/>\n");
    for (int64_t i = 0; i < n_x; i++)
        if (s->y[i] >= 0)
            buf_printf(b, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4\" fill=\"%s\"><title>%s, %lld: %.4g</title></circle>\n",
                       place_x(f, log2((double)x[i])), place_y(f, s->y[i]), s->colour, s->name,
                       (long long)x[i], s->y[i]);
}

void chart_lines(buf *b, const char *title, const char *x_title, const char *y_title,
                 const int64_t *x, int64_t n_x, const chart_series *series, int64_t n_series)
{
    frame f = {log2((double)x[0]), log2((double)x[n_x - 1]), 0};
    for (int64_t k = 0; k < n_series; k++)
        for (int64_t i = 0; i < n_x; i++)
            f.y1 = fmax(f.y1, series[k].y[i]);
    if (!(f.y1 > 0))
        f.y1 = 1;
    double step = nice_step(f.y1);
    f.y1 = ceil(f.y1 / step) * step;
    buf_printf(b, "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" viewBox=\"0 0 %d %d\" "
               "font-family=\"sans-serif\" font-size=\"13\" fill=\"#222222\">\n"
               "<rect width=\"%d\" height=\"%d\" fill=\"#ffffff\"/>\n", WIDTH, HEIGHT, WIDTH, HEIGHT, WIDTH, HEIGHT);
    label(b, LEFT, 22, "font-size=\"15\" font-weight=\"bold\"", title);
    axes(b, &f, x, n_x, step);
    label(b, (LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 16, "text-anchor=\"middle\"", x_title);
    buf_printf(b, "<g transform=\"translate(20 %d) rotate(-90)\">", (TOP + HEIGHT - BOTTOM) / 2);
    label(b, 0, 0, "text-anchor=\"middle\"", y_title);
    buf_puts(b, "</g>\n");
    for (int64_t k = 0; k < n_series; k++) {
        double at = LEFT + 14 + 150 * (double)k;
        curve(b, &f, x, n_x, &series[k]);
        buf_printf(b, "<rect x=\"%.1f\" y=\"34\" width=\"18\" height=\"4\" fill=\"%s\"/>\n", at, series[k].colour);
        label(b, at + 25, 41, "", series[k].name);
    }
    buf_puts(b, "</svg>\n");
}
