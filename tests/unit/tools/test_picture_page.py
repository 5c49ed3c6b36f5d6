"""The page of pictures: rows by prompt and seed, links that work, and nothing of a file that becomes markup."""

from __future__ import annotations

from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.support import run_tool
from tools import picture_page


class Parsed(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "section":
            self.rows.append([])
        if tag == "img":
            self.rows[-1].append(unquote(dict(attrs)["src"]))


@pytest.fixture
def folder(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, prompt, seed in (
        ("a", "a duck", "1"),
        ("b", "a bear", "1"),
        ("c # 1", "a duck", "1"),
        ("d", "a duck", "2"),
    ):
        info = PngInfo()
        info.add_text("prompt", prompt)
        info.add_text("seed", seed)
        Image.new("RGB", (8, 8)).save(pictures / f"{name}.png", pnginfo=info)
    return pictures


def test_pictures_of_a_prompt_and_seed_stand_in_one_row(folder, capsys):
    assert run_tool(picture_page.main, folder) == 0
    parsed = Parsed((folder / "index.html").read_text(encoding="utf-8"))
    assert parsed.rows == [["a.png", "c # 1.png"], ["b.png"], ["d.png"]]
    assert "4 pictures" in capsys.readouterr().out


def test_links_lead_from_the_page_to_the_pictures(folder, tmp_path):
    target = tmp_path / "elsewhere" / "page.html"
    assert run_tool(picture_page.main, folder, f"--output={target}") == 0
    rows = Parsed(target.read_text(encoding="utf-8")).rows
    assert all((target.parent / link).is_file() for row in rows for link in row)


def test_prompts_stay_text_and_bad_pictures_are_shown_without(folder):
    info = PngInfo()
    info.add_text("prompt", "<script>alert(1)</script>' onload='x")
    Image.new("RGB", (8, 8)).save(folder / "'><script>.png", pnginfo=info)
    (folder / "broken.png").write_bytes(b"nothing")
    assert run_tool(picture_page.main, folder) == 0
    parsed = Parsed((folder / "index.html").read_text(encoding="utf-8"))
    assert "script" not in parsed.tags
    assert ["broken.png"] in parsed.rows


def test_a_folder_without_pictures_is_refused(tmp_path, capsys):
    assert run_tool(picture_page.main, tmp_path) == 2
    assert "no pictures" in capsys.readouterr().err
