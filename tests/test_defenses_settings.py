import re
import subprocess
import sys

import pytest

from unbackdoor.defenses import DEFENSES, settings
from unbackdoor.errors import SettingsError


@pytest.mark.parametrize("name", ["defenses", "defenses.settings"])
def test_the_table_and_its_settings_need_no_torch(name):
    code = f"import sys, unbackdoor.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: settings.Tuning(epochs=0), "tuning.epochs must be at least 1, got 0"),
        (lambda: settings.FinePruningSettings(kept=2), "kept must be at least 0 and at most 1"),
        (lambda: settings.AnpSettings(threshold=-1), "threshold must be at least 0"),
        (lambda: settings.ContrastiveSettings(epochs=0), "epochs must be at least 1, got 0"),
        (lambda: settings.ContrastiveSettings(temperature=0.0), "temperature must be above 0"),
        (lambda: settings.BcuSettings(shares=(0.1,)), "shares are six: .*; got 1"),
        (lambda: settings.AdversarialSettings(epsilon=8), "epsilon must be .* at most 1, got 8"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(make, message):
    with pytest.raises(SettingsError, match=message):
        make()


FREE = {"seed", "stage"}  # choices of the user
SOURCE = re.compile(r"\b(19|20)\d\d\b|[Oo]urs|\bpaper\b|\.(py|sh|yaml)\b|likewise|:class:|docs/")


def test_every_attribute_says_where_its_default_comes_from():
    for kind in (settings.Tuning, *(entry.settings for entry in DEFENSES.values())):
        summary, _, attributes = kind.__doc__.partition("Attributes:")
        for name in kind.__dataclass_fields__:
            found = re.search(rf"^ {{8}}{name}: (.*\n(?: {{12}}.*\n)*)", attributes, re.MULTILINE)
            assert found, (kind.__name__, name)
            said = SOURCE.search(found[1]) or SOURCE.search(summary)
            assert said or name in FREE, (kind.__name__, name)
