"""Bytes of caption files to text: never the locale's encoding, always a message that names the likely one."""

from __future__ import annotations

from library.data.captions import clean_caption

MAX_BYTES = 16 << 20
_BOM = b"\xef\xbb\xbf"
_EAST_ASIAN = ("cp932", "gbk", "euc_kr", "big5")


class BadCaption(ValueError):
    """A caption file that cannot be read; `hint` says how to mend it."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


def decode_caption(data: bytes, encoding: str) -> str:
    """Return the text of a caption file without its byte order mark.

    Raises:
        BadCaption: It is not in `encoding`.
    """
    if data.startswith(_BOM):
        data, encoding = data[3:], "utf-8"
    try:
        return data.decode(encoding)
    except (UnicodeDecodeError, LookupError):
        pass
    guess = guess_encoding(data)
    name = "UTF-8" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
    raise BadCaption(
        f"caption is not {name} (looks like {guess})",
        f"Convert it to UTF-8 (iconv -f {guess} -t utf-8), or give --caption_encoding {guess}.",
    )


def guess_encoding(data: bytes) -> str:
    """Name the encoding that text which is not UTF-8 is most likely in."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or data.count(0) * 4 > len(data):
        return "utf-16"
    scores = {name: _east_asian_score(data, name) for name in _EAST_ASIAN}
    best = max(_EAST_ASIAN, key=lambda name: scores[name])
    return best if scores[best] > 0.5 else "latin-1"


def _east_asian_score(data: bytes, encoding: str) -> float:
    """Return how plausible the decoded text is, 0..1: kana tell Japanese, half-width kana tell a wrong guess."""
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        return 0.0
    foreign = [c for c in text if ord(c) > 0x7F]
    if not foreign:
        return 0.0
    kana = sum("\u3040" <= c <= "\u30ff" for c in foreign)
    hangul = sum("\uac00" <= c <= "\ud7a3" for c in foreign)
    han = sum("\u4e00" <= c <= "\u9fff" for c in foreign)
    punctuation = sum("\u3000" <= c <= "\u303f" or "\uff01" <= c <= "\uff5e" for c in foreign)
    expected = {"cp932": kana + 0.9 * han, "euc_kr": hangul + 0.5 * han}.get(encoding, 0.95 * han)
    return (expected + punctuation) / len(foreign)


def caption_of(text: str, multiline: bool) -> tuple[str, bool]:
    """Return the caption in a file's text, and whether control characters were removed from it.

    Args:
        text: Decoded content.
        multiline: Keep all lines that are not blank (wildcards choose among them) in place of the first line.
    """
    cleaned, removed = clean_caption(text)
    if not multiline:
        return cleaned.partition("\n")[0].strip(), removed
    lines = (line.strip() for line in cleaned.split("\n"))
    return "\n".join(line for line in lines if line), removed
