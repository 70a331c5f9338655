"""One form of error for every setting: its name, the rule, what it was."""

from neobert.readers import InputError


def error(name: str, rule: str, value: object) -> InputError:
    return InputError(f"{name}: expected {rule}, got {value}")


def at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise error(name, f"at least {least}", value)


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise error(name, " or ".join(map(repr, known)), repr(value))
