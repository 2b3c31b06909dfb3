"""The README and docs/*.md against the sources: their code, files, links, flags and commands."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("harness/*.py"), *ROOT.glob("study/*.py")]
SCRIPTS = {"train", "teacher", "sample", "evaluate", "latents", "study.ablation", "study.dimension",
           "study.crossing", "study.guide_everything", "study.memory", "study.oversaturation",
           "study.precision", "study.ship", "study.speed"}


def test_quoted_code_stands_in_the_sources():
    sources = "\n".join(path.read_text() for path in SOURCES)
    quoted = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(quoted) >= 5
    for block in quoted:
        assert block in sources, block


def test_the_list_of_files_is_complete():
    listed = README.split("## Which files to read")[1].split("\n## ")[0]
    files = {path.name for path in ROOT.glob("*.py")} | {"harness/", "study/"}
    files -= {"my_features.py"}                    # a reader's own, which the README proposes
    assert set(re.findall(r"`(\w+(?:\.py|/))`", listed)) == files


def titles_of(page):
    return re.findall(r"^#+ (.+)$", page, re.M)


def test_links_and_pictures_are_there_and_pictures_are_small():
    for path, page in PAGES.items():
        titles = titles_of(page)
        assert len(set(titles)) == len(titles), f"{path.name}: a link could mean two of the titles"
        links = re.findall(r"(!?)\[[^]]*\]\((?!http)([^)# ]*)#?([^) ]*)[^)]*\)", page)
        for picture, target, title in links:
            file = path.parent / target if target else path
            assert file.exists(), target
            assert not picture or file.stat().st_size < 300_000, target
            anchors = [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-")
                       for t in titles_of(PAGES.get(file.resolve(), ""))]
            assert not title or title in anchors, title


def test_the_readme_is_short():
    assert len(README.split()) <= 3500


def test_every_flag_is_one_of_some_script(capsys):
    known = {"--standalone", "--nproc_per_node"}   # torchrun's
    for script in SCRIPTS:
        with pytest.raises(SystemExit):
            importlib.import_module(script).main(["--help"])
        known |= set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    for path, page in PAGES.items():
        named = set(re.findall(r"(?<![\w|-])--[a-z][\w-]*", page))
        assert named <= known, f"{path.name}: {named - known}"


def test_every_command_is_one_that_exists():
    known = {"-m pytest", "toy.py"} | {f"-m {s}" if "." in s else f"{s}.py" for s in SCRIPTS}
    for path, page in PAGES.items():
        called = re.findall(r"python ((?:-m )?[\w.]+)", page) + re.findall(r"(\w+\.py) --", page)
        assert set(called) - {"-m venv"} <= known, f"{path.name}: {set(called) - known}"


def test_ci_installs_and_tests_as_the_readme_does():
    workflow = (ROOT / ".github/workflows/tests.yml").read_text()
    commands = re.search(r"run the tests:\n\n```sh\n(.*?)```", README, re.S)[1].splitlines()
    assert len(commands) == 2
    for command in commands:
        assert f"- run: {command}\n" in workflow
