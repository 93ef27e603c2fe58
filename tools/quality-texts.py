#!/usr/bin/env python3
"""Texts for calibration and for the quality study, out of Debian packages; none is kept in the repository.

    tools/quality-texts.py OUTDIR

Writes OUTDIR/calibrate.txt (King James Bible, Genesis to 2 Chronicles, and the first half of the Jargon File),
OUTDIR/calibrate-mixed.txt (the same with foldoc, the Anarchist FAQ and Perl's manual, in turn by blocks, so that the last
quarter, which calibration holds out, has all of them), OUTDIR/calibrate-fiction.txt (with Moby Dick and Tom Sawyer, too) and OUTDIR/held-out/*.txt: Jane Austen's novels, WordNet's glosses,
one Gospel, manual pages. Calibration sees none of the latter. Needs bible-kjv, dict-jargon, wordnet-base; the other packages
are fetched and unpacked, not installed, and left out with a word where that fails."""
import glob
import gzip
import html
import pathlib
import re
import struct
import subprocess
import sys
import tempfile
import zlib


def bible(span):
    """The running text of a span of verses, a paragraph a chapter."""
    out = subprocess.run(["bible", "-f"], input=span + "\n", capture_output=True, text=True, check=True).stdout
    chapters = {}
    verses = [m for m in (re.match(r"(\w+?)(\d+):\d+ (.*)", line) for line in out.splitlines()) if m]
    for m in verses[1:]:  # the program greets with Genesis 1:1
        chapters.setdefault((m[1], m[2]), []).append(m[3].strip())
    return "\n\n".join(" ".join(v) for v in chapters.values()) + "\n"


def jargon():
    text = gzip.open("/usr/share/dictd/jargon.dict.dz", "rt", encoding="utf-8", errors="replace").read()
    return re.sub(r"[{}]", "", text)


def wordnet(part):
    """One line a synset: its words, a colon, its gloss."""
    lines = []
    for line in open(f"/usr/share/wordnet/data.{part}", encoding="utf-8", errors="replace"):
        if line.startswith("  ") or " | " not in line:
            continue
        head, gloss = line.split(" | ", 1)
        field = head.split()
        words = [field[4 + 2 * i].replace("_", " ") for i in range(int(field[3], 16))]
        lines.append(", ".join(words) + ": " + gloss.strip())
    return "\n".join(lines) + "\n"


def unpacked(package, tmp):
    """A package's files, fetched into tmp and not installed."""
    subprocess.run(["apt-get", "download", "-q", package], cwd=tmp, check=True, capture_output=True)
    subprocess.run(["dpkg", "-x", *glob.glob(f"{tmp}/{package}_*.deb"), f"{tmp}/{package}"], check=True)
    return pathlib.Path(tmp, package)


def mixed(sources):
    """Blocks of 60,000 characters in turn, ten of each; shorter ones where a source has less."""
    size, count = 60_000, 10
    step = [len(s) // count for s in sources]
    return "\n\n".join(s[i * at : i * at + min(size, at)] for i in range(count) for s, at in zip(sources, step))


def lazy_load(path, flags):
    """The strings of every object in R's lazy-load file: per object a big-endian size and a zlib stream of XDR. flags: those of the
    strings wanted, 0x40009 ASCII, 0x8009 UTF-8."""
    data, objects = path.read_bytes(), []
    while len(data) > 4:
        z = zlib.decompressobj()
        raw = z.decompress(data[4:])
        data = z.unused_data
        lines, at = [], 0
        while (at := raw.find(struct.pack(">I", flags), at)) >= 0:
            (n,) = struct.unpack_from(">i", raw, at + 4)
            if 0 <= n <= len(raw) - at - 8:
                lines.append(raw[at + 8:at + 8 + n].decode("utf-8", "replace"))
            at += 8 + max(n, 0)
        objects.append(lines)
    return objects


def plain_book(text):
    """Without what Project Gutenberg says before and behind it."""
    text = text.replace("\r", "")
    first, last = (re.search(rf"\*\*\* ?{word} OF TH(?:E|IS) PROJECT GUTENBERG.*", text) for word in ("START", "END"))
    return text[first.end() if first else 0 : last.start() if last else len(text)].strip() + "\n"


def more():
    """foldoc, the Anarchist FAQ and Perl's manual as plain text."""
    with tempfile.TemporaryDirectory() as tmp:
        foldoc = re.sub(r"[{}]", "", gzip.open(unpacked("dict-foldoc", tmp) / "usr/share/dictd/foldoc.dict.dz", "rt", encoding="utf-8", errors="replace").read())
        pages = []
        for path in sorted((unpacked("anarchism", tmp) / "usr/share/doc/anarchism").rglob("*.html")):
            page = re.sub(r"(?is)<(script|style|head).*?</\1>", "", path.read_text(encoding="utf-8", errors="replace"))
            pages.append(re.sub(r"\n{3,}", "\n\n", html.unescape(re.sub(r"<[^>]+>", "", page))))
        pods = []
        for path in sorted((unpacked("perl-doc", tmp) / "usr/share/perl").rglob("perl*.pod")):
            pod = re.sub(r"(?m)^=\w+ ?", "", path.read_text(encoding="utf-8", errors="replace"))
            pods.append(re.sub(r"[A-Z]<+ ?(.*?) ?>+", r"\1", pod))
    return [foldoc, "\n".join(pages), "\n".join(pods)]


def fiction():
    """Moby Dick and Tom Sawyer."""
    with tempfile.TemporaryDirectory() as tmp:
        objects = lazy_load(unpacked("r-cran-tokenizers", tmp) / "usr/lib/R/site-library/tokenizers/data/Rdata.rdb", 0x8009)
        whale = plain_book(max((line for lines in objects for line in lines), key=len))
        go = unpacked("golang-github-klauspost-compress-dev", tmp) / "usr/share/gocode/src/github.com/klauspost/compress"
        tom = plain_book((go / "testdata/Mark.Twain-Tom.Sawyer.txt").read_text(encoding="utf-8", errors="replace"))
    return [whale, tom]


def austen():
    """Jane Austen's novels, the shortest first."""
    with tempfile.TemporaryDirectory() as tmp:
        objects = lazy_load(unpacked("r-cran-janeaustenr", tmp) / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb", 0x40009)
    return sorted(("\n".join(lines) + "\n" for lines in objects if len(lines) > 1000), key=len)


def manuals():
    """Some long manual pages without most of their troff."""
    pages = []
    for name in ("bash.1.gz", "gcc.1.gz", "find.1.gz", "awk.1.gz", "tar.1.gz", "rsync.1.gz", "git-rebase.1.gz", "ld.1.gz"):
        path = pathlib.Path("/usr/share/man/man1", name)
        if path.exists():
            text = gzip.open(path, "rt", encoding="utf-8", errors="replace").read()
            text = re.sub(r'^[.\'](?:\\"|ie|el|if|de|ds|nr|rm).*$', "", text, flags=re.M)
            pages.append(re.sub(r"\\f.|\\&|\\|^\.[A-Za-z]+ ?", "", text, flags=re.M))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(pages))


def main():
    out = pathlib.Path(sys.argv[1])
    held = out / "held-out"
    held.mkdir(parents=True, exist_ok=True)
    words = jargon()
    verses, words = bible("gen1:1-2chr36:23"), words[: len(words) // 2]
    (out / "calibrate.txt").write_text(verses + words)
    try:
        facts = [verses, words] + more()
        (out / "calibrate-mixed.txt").write_text(mixed(facts))
        (out / "calibrate-fiction.txt").write_text(mixed(facts + fiction()))
    except (subprocess.CalledProcessError, OSError) as e:
        print(f"no calibrate-mixed.txt or no calibrate-fiction.txt: {e}", file=sys.stderr)
    (held / "luke.txt").write_text(bible("luke1:1-luke24:53"))
    (held / "glosses-noun.txt").write_text(wordnet("noun")[2_000_000:3_000_000])
    (held / "glosses-verb.txt").write_text(wordnet("verb")[:1_000_000])
    text = manuals()
    if len(text) > 60_000:
        (held / "manuals.txt").write_text(text)
    else:
        print("no manual pages here: held-out/manuals.txt left out", file=sys.stderr)
    try:
        for i, novel in enumerate(austen()):
            (held / f"novel{i}.txt").write_text(novel)
    except (subprocess.CalledProcessError, OSError) as e:
        print(f"no novels: {e}", file=sys.stderr)


main()
