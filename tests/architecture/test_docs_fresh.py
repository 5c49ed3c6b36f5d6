"""docs/options.md and docs/tool_options.md are what the declarations say."""

from library.options_doc import (
    PICTURES_TARGET,
    TARGET,
    TOOLS_TARGET,
    document,
    option_sets,
    picture_document,
    picture_option_sets,
    tool_document,
    tool_option_sets,
)

HINT = "run `python -m library.options_doc`"


def test_options_page_is_fresh():
    assert TARGET.read_text(encoding="utf-8") == document(option_sets()), HINT


def test_pictures_page_is_fresh():
    assert PICTURES_TARGET.read_text(encoding="utf-8") == picture_document(picture_option_sets()), HINT


def test_tools_page_is_fresh():
    assert TOOLS_TARGET.read_text(encoding="utf-8") == tool_document(tool_option_sets()), HINT


def test_pages_hold_every_option_of_every_script():
    pages = {
        document(option_sets()): option_sets(),
        picture_document(picture_option_sets()): picture_option_sets(),
        tool_document(tool_option_sets()): tool_option_sets(),
    }
    for page, sets in pages.items():
        for options_class in sets.values():
            for option in options_class.options().values():
                if option.offered:
                    assert f"| `{option.flag}` |" in page
