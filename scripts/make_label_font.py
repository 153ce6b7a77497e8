"""Make the font of the labels: the characters that it needs, out of Noto Sans CJK.

    pip install fonttools
    python scripts/make_label_font.py NotoSansCJK-Regular.ttc

The source is Debian's package fonts-noto-cjk. The Chinese characters are those of
scripts/label_font_characters.txt: the 1600 that are most frequent by the word counts of the package
jieba, and those of the page, of README.zh-CN.md and of provinces and kinds of companies. The font
stays under the SIL Open Font License 1.1, which is beside it. Its name is another one.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTCollection, TTFont

ROOT = Path(__file__).resolve().parents[1]
CHARACTERS = ROOT / "scripts" / "label_font_characters.txt"
FOLDER = ROOT / "opensora_sp" / "assets" / "label_font"
FACE = "Noto Sans CJK SC"
NAME = "opensora_sp label"
# ASCII, Latin-1 and Latin Extended-A, and punctuation of both scripts.
OTHERS = "".join(map(chr, (*range(0x20, 0x7F), *range(0xA0, 0x180)))) + (
    "‐–—‘’“”…‰™、。〈〉《》「」『』【】！（），：；？·"
)
COPYRIGHT, FAMILY, STYLE, UNIQUE, FULL, VERSION, POSTSCRIPT = range(7)


def main() -> None:
    """Write label_font.otf, and print its size."""
    font = _face(Path(sys.argv[1]))
    options = subset.Options(hinting=False, layout_features=[], notdef_outline=True)
    options.name_IDs = [COPYRIGHT, FAMILY, STYLE, UNIQUE, FULL, VERSION, POSTSCRIPT]
    options.drop_tables += ["BASE", "DSIG", "GPOS", "GSUB", "VORG", "vhea", "vmtx"]
    chinese = "".join(CHARACTERS.read_text(encoding="utf-8").split())
    tool = subset.Subsetter(options)
    tool.populate(text=OTHERS + chinese)
    tool.subset(font)
    names = font["name"]
    print(names.getDebugName(COPYRIGHT))
    for number, text in (
        (FAMILY, NAME),
        (UNIQUE, f"{NAME}, a subset of {FACE}"),
        (FULL, NAME),
        (POSTSCRIPT, NAME.replace("_", "-").replace(" ", "-")),
    ):
        names.setName(text, number, 3, 1, 0x409)
    font["head"].modified = font["head"].created  # the same file whenever it is made
    FOLDER.mkdir(exist_ok=True)
    font.save(FOLDER / "label_font.otf", reorderTables=True)
    print(f"{(FOLDER / 'label_font.otf').stat().st_size} bytes, {len(font.getGlyphOrder())} glyphs")


def _face(path: Path) -> TTFont:
    """The face of the collection."""
    for font in TTCollection(path).fonts:
        if font["name"].getDebugName(4) == FACE:
            font.recalcTimestamp = False
            return font
    raise SystemExit(f"{path} holds no {FACE}")


if __name__ == "__main__":
    main()
