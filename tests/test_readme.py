"""The README against the sources: code it quotes, files and line counts it lists."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_quoted_code_stands_in_the_sources():
    sources = "\n".join(path.read_text() for path in ROOT.glob("*.py"))
    quoted = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(quoted) >= 5
    for block in quoted:
        assert block in sources, block


def test_line_counts_are_those_of_the_files():
    listed = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M))
    counted = {path.name: str(len(path.read_text().splitlines())) for path in ROOT.glob("*.py")}
    assert listed == counted


def test_pictures_are_there():
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).stat().st_size < 300_000, picture
