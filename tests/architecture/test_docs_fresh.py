"""The pages of options are what the declarations say."""

import pytest

from library.options_doc import PAGES

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@every_page
def test_the_page_is_fresh(page):
    assert page.target.read_text(encoding="utf-8") == page.text(), "run `python -m library.options_doc`"


@every_page
def test_it_holds_every_option_of_every_script(page):
    text = page.text()
    for options_class in page.option_sets().values():
        for option in options_class.options().values():
            if option.offered:
                assert f"| `{option.flag}` |" in text
