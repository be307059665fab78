"""docs/configuration.md describes the settings as tasks/contract/settings.py does."""

import re

from deploy.configuration import PAGE, SECTIONS, page
from tasks.contract.settings import PREFIX, Settings


def test_the_page_is_what_the_settings_make() -> None:
    assert PAGE.read_text() == page(), "`make docs` writes it anew"


def test_every_setting_is_there_once_and_explained() -> None:
    named = re.findall(rf"^\| `{PREFIX}(\w+)` \|.*\| \S[^|]+ \|$", PAGE.read_text(), re.MULTILINE)
    assert named == [name.upper() for name in Settings.model_fields]


def test_every_section_begins_with_a_setting() -> None:
    assert SECTIONS.keys() <= Settings.model_fields.keys()
