"""Errors that a user can mend: what was wrong, what was given, the rule, and what to do.

Nothing here knows about Hydra or about any component; every package may import this module.
"""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting that cannot be used. The message names key, value, rule and remedy."""

    def __init__(self, *, key: str, value: object, rule: str, remedy: str) -> None:
        self.key, self.value, self.rule, self.remedy = key, value, rule, remedy
        super().__init__(f"{key}={value!r}: {rule}; {remedy}")


class MissingError(ConfigError):
    """Settings that are required and have no value yet."""


def check_fields(config: object, prefix: str, *rules: tuple[str, bool, str], remedy: str) -> None:
    """Refuse a section in which a rule does not hold.

    Args:
        config: the section.
        prefix: its key, such as `fit.watch`.
        rules: field, whether its rule holds, and the rule.
        remedy: what to do, whichever it is.

    Raises:
        ConfigError: names the first field whose rule does not hold.
    """
    for name, holds, rule in rules:
        if not holds:
            key, value = f"{prefix}.{name}", getattr(config, name)
            raise ConfigError(key=key, value=value, rule=rule, remedy=remedy)


def check_at_least(
    config: object, prefix: str, *, remedy: str = "raise it", **lowest: float
) -> None:
    """Refuse a section of which a field is below its lowest value; see `check_fields`."""
    rules = [(k, getattr(config, k) >= low, f"must be at least {low}") for k, low in lowest.items()]
    check_fields(config, prefix, *rules, remedy=remedy)


class UnsafeError(ConfigError):
    """An input that is refused because reading it could run code or reach other files (code 77)."""


class DamagedError(ConfigError):
    """A setting that names a file which is not what it must be (exit code 65)."""


class DataError(ValueError):
    """A sample that cannot be used. `reason` is a short code that the ledger counts by.

    Args:
        reason: code such as `truncated`, `hash_mismatch`, `empty_audio`; lower case, no spaces.
        detail: one sentence with what was expected and what was found.
        shard: path of the shard, where known.
        key: sample key, where known.
    """

    def __init__(self, reason: str, detail: str, *, shard: str = "", key: str = "") -> None:
        self.reason, self.detail, self.shard, self.key = reason, detail, shard, key
        place = f" ({shard}:{key})" if shard or key else ""
        super().__init__(f"{reason}: {detail}{place}")

    def at(self, *, shard: str, key: str) -> DataError:
        """Return the same error with the place filled in."""
        return DataError(self.reason, self.detail, shard=shard, key=key)
