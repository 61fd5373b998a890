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
        (lambda: settings.BcuSettings(shares=(0.1,)), "shares are six: .*; got 1"),
        (lambda: settings.AdversarialSettings(epsilon=8), "epsilon must be .* at most 1, got 8"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(make, message):
    with pytest.raises(SettingsError, match=message):
        make()


def test_every_attribute_says_where_its_default_comes_from():
    for entry in DEFENSES.values():
        text = entry.settings.__doc__
        for name in entry.settings.__dataclass_fields__:
            assert f"        {name}: " in text, (entry.settings.__name__, name)
