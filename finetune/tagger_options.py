"""Options of the tagger: its model, which tags are written, and where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from finetune.metadata_parts import check_metadata_output
from library.errors import Problem
from library.option_groups import OptionGroup, opt

DEFAULT_REPO = "SmilingWolf/wd-v1-4-convnext-tagger-v2"
CATEGORIES = ("general", "character", "meta", "model", "copyright", "artist")
"""Categories of tags that have a threshold of their own."""


@dataclass(frozen=True, kw_only=True)
class TaggerOptions(OptionGroup, title="tagger"):
    """The model that looks at the pictures."""

    repo_id: str = opt(
        DEFAULT_REPO,
        help="Tagger on the Hugging Face hub: owner/name (model.onnx with selected_tags.csv), or owner/name/folder "
        "(model_optimized.onnx with tag_mapping.json).",
    )
    model_dir: str = opt("wd14_tagger_model", path=True, help="Folder that taggers are downloaded into, once.")
    force_download: bool = opt(
        False,
        excludes={"local_model": "nothing is downloaded then"},
        help="Download the tagger again though it is there.",
    )
    local_model: str | None = opt(
        None,
        path=True,
        help="Folder with a tagger's files, or the .onnx file with its list of tags beside it: no network is needed.",
    )
    onnx: bool = opt(
        False, help="Accepted as ever: taggers run with onnxruntime only, their Keras versions are not supported."
    )


def _threshold(category: str) -> float | None:
    text = f"Least probability of {category} tags. Default: --thresh."
    return opt(None, at_least=0, at_most=1, help=text)


@dataclass(frozen=True, kw_only=True)
class TagOptions(OptionGroup, title="tags"):
    """Which tags are written, and how."""

    thresh: float = opt(0.35, at_least=0, at_most=1, help="Least probability of a tag.")
    general_threshold: float | None = _threshold("general")
    character_threshold: float | None = _threshold("character")
    meta_threshold: float | None = _threshold("meta")
    model_threshold: float | None = _threshold("model")
    copyright_threshold: float | None = _threshold("copyright")
    artist_threshold: float | None = _threshold("artist")
    caption_separator: str = opt(", ", help="What stands between tags.")
    remove_underscore: bool = opt(
        False, help="Write tags with spaces in place of underscores; those of up to three letters, such as ^_^, stay."
    )
    undesired_tags: str = opt("", help="Tags that are not written, separated by commas.")
    use_rating_tags: bool = opt(
        False,
        excludes={"use_rating_tags_as_last_tag": "a rating has one place"},
        help="Write the most probable rating as the first tag.",
    )
    use_rating_tags_as_last_tag: bool = opt(False, help="Write the most probable rating as the last tag.")
    use_quality_tags: bool = opt(
        False,
        excludes={"use_quality_tags_as_last_tag": "a quality has one place"},
        help="Write the most probable quality as the first tag, with taggers that know qualities.",
    )
    use_quality_tags_as_last_tag: bool = opt(False, help="Write the most probable quality as the last tag.")
    character_tags_first: bool = opt(False, help="Write the names of characters before other tags.")
    always_first_tags: str | None = opt(
        None, help="Tags that move to the front when they are found, one by one, so the last one named is the first."
    )
    tag_replacement: str | None = opt(
        None, help="Other names for tags: old,new;old,new. A backslash before a comma or semicolon takes it literally."
    )
    character_tag_expand: bool = opt(False, help="Write characters such as name_(series) as two tags: name, series.")

    def check(self) -> Iterator[Problem]:
        """A separator, and pairs of tags."""
        from finetune.tagger_labels import parse_replacements

        if not self.caption_separator:
            yield Problem("--caption_separator", "is empty", 'Give ", " or leave it out.')
        try:
            parse_replacements(self.tag_replacement or "")
        except ValueError as error:
            yield Problem("--tag_replacement", str(error), r"Write old,new;old,new, and \, or \; inside of tags.")

    def thresholds(self) -> dict[str, float]:
        """Return the thresholds of categories that have one of their own."""
        found = {category: getattr(self, f"{category}_threshold") for category in CATEGORIES}
        return {category: value for category, value in found.items() if value is not None}

    def listed(self, text: str | None) -> list[str]:
        """Return the tags in a list that the user typed; it is separated as captions are, or by commas."""
        mark = self.caption_separator.strip()
        parts = (text or "").split(mark if mark and mark in (text or "") else ",")
        return [tag for part in parts if (tag := part.strip())]


@dataclass(frozen=True, kw_only=True)
class TagOutputOptions(OptionGroup, title="output"):
    """Where the tags go."""

    output_path: str | None = opt(
        None,
        path=True,
        help="One file with the tags and sizes of all pictures in place of a text file for each: .json (metadata for "
        "fine-tuning), or .jsonl with one picture per line.",
    )
    append_tags: bool = opt(
        False,
        excludes={"skip_existing": "pictures that have tags would be left out"},
        help="Keep the tags that are there already and add new ones.",
    )
    frequency_tags: bool = opt(False, help="Print how often each tag occurs.")

    def check(self) -> Iterator[Problem]:
        """A file that can be written."""
        if self.output_path is not None:
            yield from check_metadata_output("--output_path", self.output_path)
