#!/usr/bin/env python3
"""The quality study's table (Markdown, to stdout) and its curve (SVG).

    python3 tools/quality-table.py OUT/quality.csv [--svg FILE] [--sinks 16]

One row per context, budget and count; one column pair per map. --sinks 128 shows the rows with 128 sinks and 256 recents."""
import argparse
import csv
import math
import pathlib

MAPS = [("donor", "#1d6fb8"), ("same-index", "#d9480f"), ("random", "#868e96")]
WIDTH, HEIGHT, EDGE = 330, 220, 56


def read(path):
    rows = list(csv.DictReader(open(path, encoding="utf-8")))
    for r in rows:
        for k in r:
            if k not in ("text", "map"):
                r[k] = float(r[k]) if k in ("kl", "top1", "accuracy", "kv_share") else int(r[k])
    return rows


def pick(rows, **want):
    return [r for r in rows if all(r[k] == v for k, v in want.items())]


def cell(rows, passkey):
    if not rows:
        return "-"
    r = rows[0]
    note = "" if r["cases"] == r["cases_due"] else f" ({r['cases']}/{r['cases_due']})"
    second = f"{100 * r['accuracy']:.1f}" if passkey else f"{100 * r['top1']:.1f}"
    return f"{r['kl']:.4f} / {second}{note}"


def table(rows, text, sinks):
    passkey = text == "passkey"
    rows = pick(rows, text=text)
    if not rows:
        return
    kind = "KL on answer tokens / token accuracy %" if passkey else "KL / top-1 agreement %"
    maps = [m for m, _ in MAPS if pick(rows, map=m, sinks=sinks)]  # no random maps with other sinks
    counts = " or ".join(str(n) for n in sorted({r["positions"] for r in rows if r["map"] not in ("dense", "random")}))
    print(f"\n{'Multi-passkey' if passkey else 'Plain text'}: mean {kind} over {counts} positions, sinks {sinks}"
          f"{'; random: mean of three maps' if 'random' in maps else ''}.\n")
    print(f"| context | budget | N | KV read | {' | '.join(maps)} | window |")
    print("|---" * (len(maps) + 5) + "|")
    for ctx in sorted({r["context"] for r in rows}):
        for r in pick(rows, context=ctx, map="dense") if passkey else []:
            print(f"| {ctx} | | dense | 100% | {100 * r['accuracy']:.1f} |" + " |" * len(maps))
        here = pick(rows, context=ctx)
        for budget in sorted({r["budget"] for r in here if r["budget"]}):
            cells = pick(here, budget=budget, sinks=sinks)
            window = cell(pick(here, budget=budget, map="window"), passkey)
            for n in sorted({r["n_retrieval"] for r in cells if r["map"] == "donor"}):
                by = {m: pick(cells, n_retrieval=n, map=m) for m in maps}
                row = " | ".join(cell(by[m], passkey) for m in maps)
                print(f"| {ctx} | {budget} | {n} | {100 * by['donor'][0]['kv_share']:.1f}% | {row} | {window} |")


def y_of(kl):
    """1e-3 to 1 on a logarithmic axis."""
    return EDGE - min(0.0, max(-3.0, math.log10(max(kl, 1e-9)))) / 3 * HEIGHT


def panel(rows, ctx, budget, left, top):
    rows = pick(rows, context=ctx, budget=budget, sinks=16)
    counts = sorted({r["n_retrieval"] for r in rows if r["map"] != "window"})
    out = [f'<g transform="translate({left},{top})">',
           f'<text x="{EDGE}" y="{EDGE - 12}" font-weight="bold">context {ctx}, budget {budget}</text>']
    x_of = lambda n: EDGE + WIDTH * n / counts[-1]
    for d in range(4):
        y = y_of(10 ** -d)
        out.append(f'<line x1="{EDGE}" x2="{EDGE + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dee2e6"/>'
                   f'<text x="{EDGE - 6}" y="{y + 4:.1f}" text-anchor="end">{10 ** -d:g}</text>')
    for n in counts:
        out.append(f'<text x="{x_of(n):.1f}" y="{EDGE + HEIGHT + 16}" text-anchor="middle">{n}</text>')
    out.append(f'<text x="{EDGE + WIDTH // 2}" y="{EDGE + HEIGHT + 32}" text-anchor="middle">retrieval heads</text>')
    for r in pick(rows, map="window"):
        y = y_of(r["kl"])
        out.append(f'<line x1="{EDGE}" x2="{EDGE + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#2f9e44" stroke-dasharray="5 4"/>'
                   f'<text x="{EDGE + 4}" y="{y - 4:.1f}" fill="#2f9e44">window alone</text>')
    for name, colour in MAPS:
        line = sorted(pick(rows, map=name), key=lambda r: r["n_retrieval"])
        if not line:
            continue
        points = " ".join(f'{x_of(r["n_retrieval"]):.1f},{y_of(r["kl"]):.1f}' for r in line)
        out.append(f'<polyline fill="none" stroke-width="2" stroke="{colour}" points="{points}"/>'
                   f'<text x="{EDGE + WIDTH + 6}" y="{y_of(line[-1]["kl"]) + 4:.1f}" fill="{colour}">{name}</text>')
    return out + ["</g>"]


def curve(rows, path):
    rows = pick(rows, text="plain")
    contexts = sorted({r["context"] for r in rows})
    budgets = sorted({r["budget"] for r in rows if r["budget"]})
    w, h = WIDTH + 2 * EDGE + 30, HEIGHT + 2 * EDGE
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{w * len(budgets)}" height="{h * len(contexts) + 20}" '
           'font-family="sans-serif" font-size="11" fill="#343a40">', '<rect width="100%" height="100%" fill="#ffffff"/>',
           f'<text x="{EDGE}" y="20" font-size="14">Mean KL(dense || hybrid) on plain text, nats</text>']
    for i, ctx in enumerate(contexts):
        for j, budget in enumerate(budgets):
            out += panel(rows, ctx, budget, w * j, 20 + h * i)
    pathlib.Path(path).write_text("\n".join(out + ["</svg>"]) + "\n", encoding="utf-8")


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("csv")
    ap.add_argument("--svg")
    ap.add_argument("--sinks", type=int, default=16)
    a = ap.parse_args()
    rows = read(a.csv)
    for text in ("plain", "passkey"):
        table(rows, text, a.sinks)
    if a.svg:
        curve(rows, a.svg)


main()
