"""Remove backdoors from pre-trained vision backbones with unlabeled images.

The public names below are imported when they are first used, so that importing the package, and
with it ``unbackdoor --help``, takes no time.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from unbackdoor.backbones import Backbone, load_backbone
    from unbackdoor.cbd import Purified, purify
    from unbackdoor.data import load_images
    from unbackdoor.errors import UnbackdoorError
    from unbackdoor.settings import PRESETS, PurifySettings, SearchSettings, ViewSettings

__all__ = [
    "PRESETS",
    "Backbone",
    "Purified",
    "PurifySettings",
    "SearchSettings",
    "UnbackdoorError",
    "ViewSettings",
    "load_backbone",
    "load_images",
    "purify",
]

_HOME = {
    "Backbone": "backbones",
    "load_backbone": "backbones",
    "load_images": "data",
    "UnbackdoorError": "errors",
    "Purified": "cbd",
    "purify": "cbd",
    "PRESETS": "settings",
    "PurifySettings": "settings",
    "SearchSettings": "settings",
    "ViewSettings": "settings",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"unbackdoor.{_HOME[name]}"), name)
    raise AttributeError(f"module 'unbackdoor' has no attribute {name!r}")
