"""The numbers of README.md and docs/*.md against docs/results/*.json.

Those files are what evaluate.py and study/ablation.py wrote as OUT.json. The text names them twice:

    <!-- results/NAME.json -->                    before a table: its cells are those of the file's
    <!-- results/NAME.json: as asked: class -->   first table, or of that whose heading begins so
    [18](docs/results/NAME.json "SCFlow: 1")      a number: row and NFE of its cell, and the heading
    [1.30](results/NAME.json "cd: 16, spread")    of another table; spread is what brackets hold

A table's cell may leave out half the range and what stands in brackets. A row of --median, which
is a median over several runs of one file, is called teachers or students.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import evaluate

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
FLOOR = "data against data"
# tables of docs/results.md that no file can tell: (section, first cell of the second line)
BY_HAND = {("The losses one after the other (Table 4 and Figure 6)", "CD"),       # the paper's
           ("The weights and the number of elements", "2"), ("Precision", "MNIST, student"),
           ("Why x1 is free in reflow", "CD"),
           ("Why x1 is free in reflow", "`--rf-x1 fixed --l-rf 30`"),
           ("MNIST", "0.2"), ("8gaussians", "the preset"),
           ("MNIST by class", "`--lr 4e-4 --lr-final 0 --t-trunc 0.2 --l-gan 0.03 --l-rf 0.05`")}


def table_at(text):
    """The Markdown table with which a text begins, as lines of cells; [] if there is none."""
    lines = re.match(r"\s*((?:\|.*\n?)*)", text)[1].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in lines if not re.fullmatch(r"[|:-]+", line)]


def tables_of(content):
    """{heading: {(row, column): cell}} of a results file, as the command printed them."""
    rows = content["rows"]
    several = [row | {"network": "teachers" if row["network"].startswith("teacher") else "students"}
               for row in rows]
    about = SimpleNamespace(name=content["metric"], floor=content["floor"], floor_name=FLOOR,
                            at_most=0)
    texts = [evaluate.report(content["dataset"], about, some) for some in (rows, several)]
    texts += [content["costs"]] if "costs" in content else []
    tables = {}
    for text in texts:
        for heading, table in zip(*[iter(text.split("\n\n"))] * 2):
            (_, *columns), *lines = table_at(table)
            tables.setdefault(re.sub(r" \+- half the range of \d+ runs", "", heading), {}).update(
                {(name, k): cell for name, *cells in lines for k, cell in zip(columns, cells)})
    return tables


def cell_of(tables, row, column, heading=None):
    """A cell of the first table, or of that whose heading begins so; None if there is none."""
    spread, heading = heading == "spread", "" if heading in (None, "spread") else heading
    cells = next((cells for name, cells in tables.items() if name.startswith(heading)), {})
    cell = cells.get((FLOOR if row.startswith("data, ") else row, column))
    return re.search(r"\((.*)\)", cell)[1] if spread and cell else cell


def agrees(said, printed):
    """Is the number that a sentence says the one that was printed, rounded?"""
    decimals = len(said.partition(".")[2])
    return bool(printed) and abs(float(said.replace(",", "")) - float(
        printed.split()[0].replace(",", ""))) <= 0.5 * 10**-decimals + 1e-9


def mistakes(text, folder):
    """Sentences about what differs between a page and the files in `folder`, cell by cell."""
    found, files = [], {}

    def tables(name):
        if name not in files and (folder / name).exists():
            files[name] = tables_of(json.loads((folder / name).read_text()))
        return files.get(name)

    for mark in re.finditer(r"<!-- results/(\S+\.json)(?:: (.*?))? -->\n", text):
        (_, *columns), *lines = table_at(text[mark.end():])
        for row, *cells in lines if tables(mark[1]) else ():
            for column, said in zip(columns, cells):
                printed = cell_of(tables(mark[1]), row, column, mark[2]) or ""
                short = re.sub(r" \+- [\d.]+", "", printed)
                if said not in {printed, short, short.split(" ")[0]}:
                    found.append(f"{row!r} at {column}: the table says {said!r}, "
                                 f"{mark[1]} says {printed!r}")
    for said, name, row, nfe, heading in re.findall(
            r'\[([^]]*)\]\(\S*results/(\S+\.json) "(.*?): (\d+)(?:, (.*?))?"\)', text):
        printed = cell_of(tables(name), row, nfe, heading or None) if tables(name) else None
        if not agrees(said, printed):
            found.append(f"{row!r} at {nfe}: the text says {said}, {name} says {printed!r}")
    return found


def test_the_text_says_what_the_files_hold():
    for page in PAGES:
        assert not (found := mistakes(page.read_text(), ROOT / "docs/results")), (
            f"{page.name}:\n" + "\n".join(found))


def test_each_table_has_its_file_and_each_file_its_table():
    named = {name for page in PAGES
             for name in re.findall(r"<!-- results/(\S+\.json)", page.read_text())}
    kept = {path.name for path in ROOT.glob("docs/results/*.json")}
    assert kept == named, f"only kept: {kept - named}, only named: {named - kept}"

    unmarked, section = set(), ""
    text = (ROOT / "docs/results.md").read_text()
    for part in re.split(r"\n\n", text):
        section = part.lstrip("# ") if part.startswith("#") else section
        if part.startswith("|"):
            unmarked.add((section, table_at(part)[1][0]))
    assert unmarked == BY_HAND


def test_a_number_that_differs_is_named(tmp_path):
    measured = dict(precision=0.5, recall=0.5, consistency=0.1, per_second=9.0)
    rows = [dict(network=name, nfe=nfe, seed=0, distance=d, spread=1.3, **measured)
            for name, nfe, d in (("a, b", 1, 18.44), ("a, b", 1, 20.0), ("student", 2, 3.0))]
    (tmp_path / "x.json").write_text(json.dumps(dict(
        dataset="moons", metric="W2", rows=rows, floor=rows[2],
        costs="compute, all\n\n| run | s |\n|-----|---|\n| a   | 7 |")))
    page = ('<!-- results/x.json -->\n| NFE | 1 | 2 |\n|---|---|---|\n| a, b | {} | |\n'
            '| student | | 3.0 (1.30) |\n\n<!-- results/x.json: compute -->\n'
            '| run | s |\n|--|--|\n| a | 7 |\n\n'
            'It is [{}](docs/results/x.json "a, b: 1") or [1.3](results/x.json "a, b: 1, spread"), '
            '[0.50](results/x.json "student: 2, precision"), [3](results/x.json "students: 2").')
    for cell in ("19.2 +- 0.8 (1.30)", "19.2 (1.30)", "19.2"):
        assert mistakes(page.format(cell, "19"), tmp_path) == []
    assert mistakes(page.format("19.3", "18"), tmp_path) == [
        "'a, b' at 1: the table says '19.3', x.json says '19.2 +- 0.8 (1.30)'",
        "'a, b' at 1: the text says 18, x.json says '19.2 +- 0.8 (1.30)'"]
    assert "says None" in mistakes('[1](results/y.json "a: 1")', tmp_path)[0]
    assert "'b' at 1" in mistakes(page.replace("a, b |", "b |").format("19.2", "19"), tmp_path)[0]
