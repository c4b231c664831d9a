"""What a command can choose by name: datasets, models, objectives, methods, presets."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any, TypeVar

from compressm.errors import ConfigError, bad_argument

T = TypeVar("T")


class Registry(dict[str, T]):
    """Things by their name, in the order in which they were registered.

    ``registry[name]`` answers an unknown name with the known ones.

    Args:
        what: the word that stands before a wrong name.
        items: to register.
    """

    def __init__(self, what: str, *items: T) -> None:
        super().__init__()
        self.what = what
        for item in items:
            self.register(item)

    def register(self, item: Any) -> Any:
        """Add an item under its ``name``, and return it: a class may be decorated with this.

        Raises:
            ArgumentError: the name is no lower-case identifier, or taken.
        """
        name = getattr(item, "name", None)
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise bad_argument(f"{self.what}: name", got=repr(name), expected="lower-case letters, digits and underscores")
        if name in self:
            raise bad_argument(f"{self.what}: name", got=repr(name), expected=f"none of {', '.join(self)}")
        self[name] = item
        return item

    def __missing__(self, name: str) -> T:
        raise ConfigError(f"{self.what}: got {name!r}{did_you_mean(name, self)}, expected one of {', '.join(self)}")


def did_you_mean(word: object, words: Iterable[str]) -> str:
    """`` (did you mean 'tau'?)``, or nothing where no word is near."""
    found = difflib.get_close_matches(str(word), list(words), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""
