"""Words of a command line that is no training config: `key=value` pairs and file names."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from umtrain.errors import ConfigError


@dataclass(frozen=True)
class Arguments:
    """The words of a command, told apart."""

    files: tuple[str, ...]
    values: dict[str, str]

    def choice(self, key: str, options: tuple[str, ...], default: str) -> str:
        """Return the value of `key`. Raises ConfigError if it is none of `options`."""
        value = self.values.get(key, default)
        if value not in options:
            raise ConfigError(f"{key}={value}: choose {' or '.join(options)}")
        return value

    def integer(self, key: str, default: int, least: int) -> int:
        """Return the whole number at `key`. Raises ConfigError if it is none or below `least`."""
        text = self.values.get(key, str(default))
        if not text.isdecimal() or int(text) < least:
            raise ConfigError(f"{key}={text}: expected a whole number of at least {least}")
        return int(text)


def parse_arguments(words: list[str], keys: tuple[str, ...], n_files: int = 0) -> Arguments:
    """Tell `key=value` words from up to `n_files` file names.

    Raises ConfigError for an unknown key, a repeated one, or a file too many.
    """
    files: list[str] = []
    values: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in keys:
            if key in values:
                raise ConfigError(f"{word}: {key} is given twice")
            values[key] = value
        elif len(files) < n_files and (not equals or Path(word).expanduser().exists()):
            files.append(word)
        else:
            near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]}=?" if near else ""
            possible = ", ".join(f"{name}=" for name in keys)
            raise ConfigError(f"{word!r} is not understood here.{hint} Possible: {possible}")
    return Arguments(tuple(files), values)
