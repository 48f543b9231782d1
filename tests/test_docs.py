"""README and docs: every code block runs, every link resolves, the map of files is complete.

The language of a block decides what happens: `bash` blocks hold commands of the library, `python` blocks are executed
with one namespace per page, `json` and `yaml` are parsed, `text` is no code. The blocks of a page run in their order,
in an empty folder that holds the configs, the weights and two images. A comment before a block says how:

    <!-- test: slow -->            runs with `pytest -m slow`; in the fast tests its command lines are parsed only
    <!-- test: long -->            takes hours; parsed only. So are `gpu`, `nuscenes` and `installed`, which need these
    <!-- test: with --scenes 1 --> these arguments are added to every command of the block when it runs
    <!-- test: skip: reason -->    no command of the library; it is not looked at
    <!-- test: quote: FILE -->     its lines stand in that file, in this order
    <!-- test: slow; with ... -->  both

Parsing a command line means that the command and all its options exist.
"""

import argparse
import ast
import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image

from perception.cli import main
from perception.commands import COMMANDS
from perception.errors import run_script

PROJECT = Path(__file__).resolve().parent.parent
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
ALL_PAGES = [*PAGES, PROJECT / "CHANGELOG.md"]
LANGUAGES = ("bash", "python", "json", "yaml", "text")
PARSED_ONLY = ("long", "gpu", "nuscenes", "installed")


class Block(NamedTuple):
    """A fenced block of a page."""

    place: str  # page and line
    language: str
    code: str
    word: str  # how it is tested: slow, skip, quote, one of PARSED_ONLY, or empty
    about: str  # what follows the word: the file of a quote, the reason of a skip
    extra: list[str]  # arguments that are added to its commands


def blocks(page: Path) -> list[Block]:
    found, marks, fence = [], "", None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if fence is not None:
            if line.startswith("```"):
                words = [part.strip() for part in marks.split(";") if part.strip()]
                extra = [part.removeprefix("with ") for part in words if part.startswith("with ")]
                word, _, about = "".join(part for part in words if not part.startswith("with ")).partition(":")
                place, language, lines = fence
                code, extra = "\n".join(lines), shlex.split(" ".join(extra))
                found.append(Block(place, language, code, word, about.strip(), extra))
                fence, marks = None, ""
            else:
                fence[2].append(line)
        elif line.startswith("```"):
            fence = (f"{page.name}:{number}", line[3:].strip(), [])
        elif line.strip():
            marks = line.strip()[len("<!-- test:") : -len("-->")].strip() if line.startswith("<!-- test:") else ""
    return found


def commands(block: Block) -> list[list[str]]:
    """The arguments of every `perception` command of a bash block."""
    found = []
    for line in block.code.replace("\\\n", " ").splitlines():
        if not (words := shlex.split(line, comments=True)):
            continue
        if words[0] == "torchrun":
            words = words[words.index("-m") + 1 :]
        assert words[0] == "perception", f"{block.place}: {words[0]} is no command of the library; mark it with skip"
        found.append(words[1:])
    return found


class Parsed(Exception):
    """A command line was accepted."""


def call(arguments: list[str], place: str) -> None:
    """Runs `perception ARGUMENTS` in this process."""
    try:
        run_script(lambda: main(arguments))
    except SystemExit as end:
        assert not end.code, f"{place}: perception {shlex.join(arguments)} ended with {end.code}"


def parse(arguments: list[str], place: str, monkeypatch) -> None:
    """Only reads the command line."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(parser, *given, **named):
        original(parser, *given, **named)
        raise Parsed

    with monkeypatch.context() as context:
        context.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(Parsed):
            call(arguments, place)


def run_page(page: Path, folder: Path, monkeypatch, slow: bool) -> None:
    """All blocks of a page in their order."""
    for name in ("configs", "perception"):
        (folder / name).symlink_to(PROJECT / name)
    rng = np.random.default_rng(0)
    for name, size in (("front.jpg", (900, 1600, 3)), ("back.jpg", (540, 960, 3))):
        Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(folder / name)
    monkeypatch.chdir(folder)
    namespace: dict = {"__name__": page.stem}
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block.place}: {block.language!r} is none of {', '.join(LANGUAGES)}"
        assert block.word in ("", "slow", "skip", "quote", *PARSED_ONLY), f"{block.place}: no mark {block.word!r}"
        runs = block.word == "" or (slow and block.word == "slow")
        if block.word == "skip":
            assert block.about, f"{block.place}: skip needs a reason"
        elif block.word == "quote":
            quoted = iter([line.strip() for line in (PROJECT / block.about).read_text(encoding="utf-8").splitlines()])
            for line in filter(None, map(str.strip, block.code.splitlines())):
                assert line in quoted, f"{block.place}: {block.about} has no line {line!r} after those before it"
        elif block.language == "bash":
            for arguments in commands(block):
                if runs:
                    call([*arguments, *block.extra], block.place)
                else:
                    parse(arguments, block.place, monkeypatch)
        elif block.language == "python":
            program = compile(block.code, block.place, "exec")
            if runs:
                exec(program, namespace)
        elif block.language == "json":
            json.loads(block.code)
        elif block.language == "yaml":
            yaml.safe_load(block.code)


def slow_pages() -> list[Path]:
    return [page for page in PAGES if any(block.word == "slow" for block in blocks(page))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page, tmp_path, monkeypatch):
    run_page(page, tmp_path, monkeypatch, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", slow_pages(), ids=lambda page: page.name)
def test_slow_blocks_run_too(page, tmp_path, monkeypatch):
    run_page(page, tmp_path, monkeypatch, slow=True)


def examples() -> list[tuple[str, str]]:
    """Where the command lines of `--help` and of the configs' docstrings stand, and their text."""
    found = [(name, importlib.import_module(f"perception.cli.{name.replace('-', '_')}").EXAMPLE) for name in COMMANDS]
    for path in sorted((PROJECT / "configs").rglob("*.py")):
        found.append((path.name, ast.get_docstring(ast.parse(path.read_text())) or ""))
    return found


@pytest.mark.parametrize(("place", "text"), examples(), ids=[place for place, _ in examples()])
def test_examples_are_accepted(place, text, monkeypatch):
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    assert not [line for line in lines if line.startswith("-")], "a continued line without a backslash"
    for line in lines:
        if line.startswith(("perception ", "torchrun ")):
            for arguments in commands(Block(place, "bash", line, "", "", [])):
                parse(arguments, place, monkeypatch)


def test_a_command_that_does_not_exist_is_found(monkeypatch):
    for arguments in (["trian", "config.py"], ["train", "config.py", "--workdir", "out"], ["export"]):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            parse(arguments, "here", monkeypatch)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target} does not exist"
        assert not anchor or anchor in anchors(file), f"{page.name}: {file.name} has no heading #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    """Files of the library that a page names in the text, by a path or by a name alone."""
    files = [str(path.relative_to(PROJECT)) for folder in ("perception", "configs", "tests", "scripts", "docs")
             for path in (PROJECT / folder).rglob("*.py")]  # fmt: skip
    for name in re.findall(r"`([\w/]+\.py)`", page.read_text(encoding="utf-8")):
        assert any(f"/{file}".endswith(f"/{name}") for file in files), f"{page.name}: there is no {name}"


def mapped_modules() -> set[str]:
    """The modules in the map of files of docs/architecture.md."""
    text = next(b.code for b in blocks(PROJECT / "docs" / "architecture.md") if b.code.startswith("perception/"))
    folders, found = [], set()
    for line in text.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        if folder := re.match(r" *(\w+)/(?: |$)", line):
            folders = [*folders[:depth], folder[1]]
            continue
        names = re.match(r" *((?:\w+\.py ?)+)", line)
        assert names and len(folders) >= depth, f"docs/architecture.md: {line!r} is no line of the map"
        found |= {"/".join([*folders[:depth], name]) for name in names[1].split()}
    return found


def test_the_map_of_files_is_complete():
    there = {str(path.relative_to(PROJECT)) for path in (PROJECT / "perception").rglob("*.py")}
    assert mapped_modules() == {name for name in there if not name.endswith("__init__.py")}


def test_api_page_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_api", PROJECT / "docs" / "make_api.py")
    make_api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_api)
    assert (PROJECT / "docs" / "api.md").read_text(encoding="utf-8") == make_api.make(), "run python docs/make_api.py"


def test_the_readme_is_short_and_in_the_words_of_the_field():
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    for word in ("NMS", "backbone", "inference", "ground truth", "uncertainty", "BEV", "nuScenes", "MapTR", "BEVFormer",
                 "TensorRT", "INT8"):  # fmt: skip
        assert word in text, word
