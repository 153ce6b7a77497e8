"""Caption cleaning against the reference's results, and the edges of its rules."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from opensora_sp.base.errors import UserError
from opensora_sp.request.captions import clean_caption


def test_all_conformance_captions_are_exact(suite_dir: Path) -> None:
    cases = json.loads((suite_dir / "prompts.json").read_text("utf-8"))["caption_cleaning"]
    assert len(cases) > 400
    wrong = {
        case["raw"]: (got, case["clean"])
        for case in cases
        if (got := clean_caption(case["raw"])) != case["clean"]
    }
    assert not wrong


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        # Addresses: only the beginning of a scheme goes, a host goes with its path.
        ("go ftp.site.org/a-b/c now", "go now"),
        ("x https:////y", "x y"),
        ("not.a.company here", "here"),
        ("a.com/b@x", "b"),  # the @ makes the match end earlier
        ("ab.com@x", "ab. com"),  # and here there is nothing earlier to end at
        # HTML pieces are joined with nothing between; comments are not text.
        ("one<br>two<!-- three --> <b>f</b>our", "onetwo four"),
        # What is escaped twice is removed, not decoded; curly quotes count as quotes at once.
        ("&amp;quot;x &amp;quot y", "x y"),
        ("’’a", '"a'),
        # Numbers: the article time only at the very end, hashes of four digits stay.
        ("12345 and 123456", "12345 and"),
        ("#1234 a #123b c", "1234 a 123b c"),
        ("x1.2.3.4567 y", "x 7 y"),
        ("at 12:30 @x", "at 1"),
        # File names go up to the last type in the word.
        ("see a.png.b.mp4v now", "see v now"),
        # Four joiners make words of a name, three do not.
        ("a-b_c-d", "a-b_c-d"),
        ("a-b_c-d-e", "a b c d e"),
        ("a\u2014\u2013-b\u301c c", "a-b- c"),
        # Codes stand alone; an underscore or another script continues the word.
        ("ab12 ab123 abcd123", "ab12 abcd123"),
        ("a1b_ a1b", "a1b"),
        ("éa1b x", "éa1b x"),
        ("j2d1a2a x", "x"),
        # Offers; white space is counted.
        ("worldwide  shipping", ""),
        ("free  download", "free"),
        ("clicks on it, click on it, click  on it", "clicks on it, ,"),
        ("jpgs of apng", "s of apng"),
        ("page 3x page 3", "page 3x"),
        ("10.x2.5 3х4 5×6 7 x 8", "7 x 8"),
        # Spacing of punctuation.
        ("a : b: c", "a: b: c"),
        ("f/2.8,c x,c", "f 2.8,c x, c"),
        ("a . b .. c", "a b c"),
        # The ends of the text; one sign a pass.
        ('"a\' b"', "a' b"),
        ("---a", "a"),
        (":::a___", ":a_"),
        (".hidden", ""),
        (". hidden", ". hidden"),
    ],
)
def test_edges_of_the_rules(raw: str, clean: str) -> None:
    assert clean_caption(raw) == clean


def test_what_cannot_be_cleaned_is_one_clear_line() -> None:
    for raw, said in (("a <![n] b", "remove the '<!\\['"), ("caf\udce9", "UTF-8")):
        with pytest.raises(UserError, match=said) as caught:
            clean_caption(raw)
        assert "\n" not in str(caught.value)


def test_no_warning_for_captions_that_look_like_files_or_addresses() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clean_caption("/tmp/readme")
        clean_caption("http://")


def test_text_modules_import_neither_torch_nor_parsers() -> None:
    code = (
        "import sys, opensora_sp.request.captions, opensora_sp.request.prompts\n"
        "import opensora_sp.request.mask_strategy\n"
        "print(sorted({'torch', 'bs4', 'ftfy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
