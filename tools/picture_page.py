"""Put the pictures of a folder on one page, with what each was made from, to compare them in a browser.

python tools/picture_page.py outputs
python tools/picture_page.py trained/sample --output trained/samples.html

PNG files of gen_img.py, of sample pictures and of the A1111 web UI tell their prompts. Pictures of the same prompt
and seed stand in one row, so that a training can be watched from left to right.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli  # noqa: E402
from library.data.bad_files import printable  # noqa: E402
from library.errors import Problem  # noqa: E402
from library.option_groups import OptionGroup, OptionSet, opt  # noqa: E402
from networks.tool_parts import check_output, show  # noqa: E402

logger = logging.getLogger(__name__)

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem; }
section { border-top: 1px solid #8886; padding: .8rem 0; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; max-width: 320px; } figure img { max-width: 100%; display: block; border-radius: 4px; }
figcaption, .settings { font-size: 12px; opacity: .75; overflow-wrap: anywhere; }
h2 { font-size: 1rem; font-weight: 600; margin: 0 0 .3rem; overflow-wrap: anywhere; }
"""

_SHOWN = ("negative-prompt", "sampler", "steps", "scale")
"""Settings that stand under a prompt."""


@dataclass(frozen=True, kw_only=True)
class PageOptions(OptionGroup, title="page"):
    """Which pictures, and where the page goes."""

    folder: str = opt("", positional=True, path=True, help="Folder with pictures.")
    output: str | None = opt(None, path=True, help="File to write. Default: index.html in the folder.")
    recursive: bool = opt(False, help="Take the pictures of sub-folders, too.")

    def check(self) -> Iterator[Problem]:
        """Refuse a page that cannot be written, or would replace a picture."""
        if self.output and Path(self.output).suffix.lower() not in (".html", ".htm"):
            yield Problem(f"--output {self.output}", "must end in .html")
        yield from check_output("--output", self.output, ())


@dataclass(frozen=True, kw_only=True)
class Options(OptionSet):
    """Everything that picture_page.py accepts."""

    page: PageOptions


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture on the page: its link and its text chunks."""

    link: str
    texts: Mapping[str, str]

    @property
    def row(self) -> tuple[str, str]:
        """Pictures that agree in it stand in one row."""
        return self.texts.get("prompt") or self.texts.get("parameters", ""), self.texts.get("seed", "")


def page(title: str, pictures: Sequence[Shown]) -> str:
    """Return the page; rows are in the order of their first picture."""
    rows: dict[tuple[str, str], list[Shown]] = {}
    for picture in pictures:
        rows.setdefault(picture.row, []).append(picture)
    head = f"<meta charset='utf-8'><title>{escape(title)}</title><style>{_STYLE}</style><h1>{escape(title)}</h1>"
    body = "\n".join(part for (prompt, seed), row in rows.items() for part in _row(prompt, seed, row))
    return f"<!doctype html><html lang='en'>{head}\n{body}\n</html>\n"


def _row(prompt: str, seed: str, row: Sequence[Shown]) -> Iterator[str]:
    texts = row[0].texts
    settings = [f"{name} {texts[name]}" for name in _SHOWN if texts.get(name)]
    yield f"<section><h2>{escape(prompt or 'no prompt is known')}</h2>"
    yield f"<p class=settings>{escape(', '.join([*([f'seed {seed}'] if seed else []), *settings]))}</p><div class=row>"
    for picture in row:
        name = escape(printable(picture.link))
        link = quote(os.fsencode(picture.link))  # bytes, since a name need not be text in any encoding
        yield f"<figure><a href='{link}'><img loading=lazy src='{link}' alt='{name}'></a>"
        yield f"<figcaption>{name}</figcaption></figure>"
    yield "</div></section>"


def _texts(path: Path) -> dict[str, str]:
    """Return what a picture tells of itself; nothing when it cannot be opened."""
    from library.data.images import BadImage, carried_texts

    try:
        return carried_texts(path)
    except BadImage as error:
        logger.warning("%s", error)
        return {}


def run(options: Options) -> None:
    """Write the page."""
    from library.data.jobs import find_pictures
    from library.files import write_text

    folder = Path(options.page.folder)
    pictures = find_pictures(folder, recursive=options.page.recursive)
    target = Path(options.page.output) if options.page.output else folder / "index.html"
    links = [Path(os.path.relpath(path, target.absolute().parent)).as_posix() for path in pictures]
    shown = [Shown(link, _texts(path)) for link, path in zip(links, pictures, strict=True)]
    write_text(target, page(printable(folder.resolve().name), shown))
    show([f"{len(pictures)} pictures on {target}"])


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, run, argv=argv)


if __name__ == "__main__":
    main()
