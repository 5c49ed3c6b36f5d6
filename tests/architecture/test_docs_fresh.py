"""docs/options.md is what the declarations say."""

from library.options_doc import TARGET, document, option_sets


def test_options_page_is_fresh():
    message = "run `python -m library.options_doc`"
    assert TARGET.read_text(encoding="utf-8") == document(option_sets()), message


def test_page_holds_every_option_of_every_script():
    page = document(option_sets())
    for options_class in option_sets().values():
        for option in options_class.options().values():
            if option.offered:
                assert f"| `{option.flag}` |" in page
