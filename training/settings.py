"""From a recipe and flags to one frozen dataclass, with every mistake reported at once."""

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")
S = TypeVar("S")


class SettingsError(ValueError):
    """What is wrong with a user's settings or run directory, complete and in words for that user."""


class OwnSettingsError(SettingsError):
    """One that this process may be alone with, so that it has to say it itself: its memory ran out."""


@contextmanager
def for_the_owner(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds inside are the user's to mend: they become a SettingsError with their message."""
    try:
        yield
    except kinds as error:
        raise SettingsError(str(error)) from error


def setting(
    default: T,
    help: str,
    unit: str = "",
    *,
    at_least: float | None = None,
    choices: Sequence[str] = (),
    changes_run: bool = False,
) -> T:
    """A field of a settings dataclass: its default, what `--help` says, and what values are possible.

    `changes_run` marks what a run in progress must not have changed under it: data, model, batch, update
    rule.
    """
    metadata = {
        "help": help,
        "unit": unit,
        "at_least": at_least,
        "choices": tuple(choices),
        "changes_run": changes_run,
    }
    field: Any = dataclasses.field(default=default, metadata=metadata)
    return field


def parse_settings(
    cls: type[S], argv: Sequence[str] | None = None, *, default_config: Path | None = None
) -> S:
    """Defaults of the dataclass `cls` <- the YAML file of `--config` <- the other flags of `argv`.

    A flag is `--name value` or `--name=value`; `--name` alone sets a true/false setting; a tuple takes
    several values. Without `argv` these are the process's. `default_config` is read when there is no
    `--config`. A method `problems()` of `cls`, where it has one, returns complaints about values that do not
    fit together. `--help` prints every setting and exits.

    Raises:
        SettingsError: with all problems of file and flags, one per line.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(describe_settings(cls, default_config))
        sys.exit(0)
    problems: list[str] = []
    flags = _split_flags(argv, problems)
    config = flags.pop("config", None)
    recipe_path = Path(config[0]) if config else default_config
    given: dict[str, tuple[str, Any]] = {}  # name -> where it was given, value
    if recipe_path is not None:
        for name, value in _read_recipe(recipe_path, problems).items():
            given[str(name)] = (str(recipe_path), value)
    for name, words in flags.items():
        given[name] = (f"--{name}", words)

    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, (where, value) in given.items():
        if name not in fields:
            near = difflib.get_close_matches(name, [*fields, "config"], n=1)
            problems.append(
                f"{where}: no setting is called {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
            continue
        try:
            values[name] = _checked(value, hints[name], fields[name].metadata)
        except ValueError as error:
            problems.append(f"{where}: {name} {error}" if where[0] != "-" else f"{where} {error}")
    settings = cls(**values)
    if not problems and hasattr(settings, "problems"):
        problems += settings.problems()
    if problems:
        heading = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise SettingsError(f"{heading} with the settings (--help lists all of them):\n{lines}")
    return settings


def given_flags(argv: Sequence[str] | None = None) -> set[str]:
    """Names of the settings that `argv`, or else the process's command line, gives as flags."""
    return set(_split_flags(sys.argv[1:] if argv is None else argv, []))


def plain_settings(settings: Any) -> dict[str, Any]:
    """Settings as names and values that YAML and JSON know."""
    values = dataclasses.asdict(settings)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def settings_as_yaml(settings: Any) -> str:
    """A recipe that `--config` reads back to the same settings."""
    return yaml.safe_dump(plain_settings(settings), sort_keys=False, allow_unicode=True, width=100)


def changed_settings(settings: Any, recorded: dict[str, Any]) -> list[str]:
    """Those settings marked `changes_run` that differ from the `recorded` ones: "name: 3 then, 4 now"."""
    changed = []
    for field in dataclasses.fields(settings):
        now = getattr(settings, field.name)
        now = list(now) if isinstance(now, tuple) else now
        if field.metadata.get("changes_run") and recorded.get(field.name, field.default) != now:
            changed.append(f"{field.name}: {recorded.get(field.name, field.default)} then, {now} now")
    return changed


def describe_settings(cls: type, default_config: Path | None = None) -> str:
    """The text of `--help`: every setting with its default, unit, choices and meaning."""
    lines = [
        "Settings, each a flag and a key of a recipe; flags win over the recipe, the recipe over defaults.",
        "",
        "  --config  a recipe: a YAML file of settings"
        + (f"  (default: {default_config})" if default_config else ""),
    ]
    for field in dataclasses.fields(cls):
        about = field.metadata
        unit = f" {about['unit']}" if about["unit"] else ""
        default = "none" if field.default is None else f"{_shown(field.default)}{unit}"
        lines.append(f"  --{field.name}  (default: {default})")
        lines.append(f"        {about['help']}")
        if about["choices"]:
            lines.append(f"        one of: {', '.join(about['choices'])}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(repr(word) for word in value) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _split_flags(argv: Sequence[str], problems: list[str]) -> dict[str, list[str]]:
    """`["--a", "1", "--b=2"]` -> `{"a": ["1"], "b": ["2"]}`."""
    flags: dict[str, list[str]] = {}
    name = None
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            # Some people write dashes; nothing else could be meant.
            name = name.replace("-", "_")
            if name in flags:
                problems.append(f"--{name} is given twice")
            flags[name] = [value] if equals else []
        elif name is None:
            problems.append(f"{word!r} belongs to no flag; settings are given as --name value")
        else:
            flags[name].append(word)
    if flags.get("config") == []:
        problems.append("--config needs the path of a recipe")
    return flags


def _read_recipe(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"--config {path}: cannot be read ({error})")
        return {}
    except yaml.YAMLError as error:
        problems.append(f"--config {path}: is not valid YAML ({error})")
        return {}
    if recipe is None:
        return {}
    if not isinstance(recipe, dict):
        problems.append(f"--config {path}: must hold `name: value` lines, holds a {type(recipe).__name__}")
        return {}
    return recipe


def _checked(value: Any, hint: Any, about: typing.Mapping[str, Any]) -> Any:
    """`value`, a list of words (flag) or anything (YAML), as the type of its field.

    Raises:
        ValueError: saying what was expected and what was seen.
    """
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    base = next(option for option in options if option is not type(None))
    if typing.get_origin(base) is tuple:
        words = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(word, str) for word in words):
            raise ValueError(f"must be a list of texts, is {value!r}")
        checked: Any = tuple(words)
    else:
        if isinstance(value, list):
            if not value and base is bool:
                value = "true"
            elif len(value) != 1:
                raise ValueError(f"takes one value, got {' '.join(map(str, value)) or 'none'}")
            else:
                value = value[0]
        if value is False and "no" in about["choices"]:  # YAML reads a bare `no` as false
            value = "no"
        if value is None or value == "none":
            if type(None) not in options and "none" not in about["choices"]:
                raise ValueError("needs a value")
            checked = None if type(None) in options else "none"
        else:
            checked = _convert(value, base)
    if checked is not None and about["at_least"] is not None and not checked >= about["at_least"]:
        raise ValueError(f"must be at least {about['at_least']:,}, is {checked:,}")
    if about["choices"]:
        for word in checked if isinstance(checked, tuple) else (checked,):
            if word not in about["choices"]:
                raise ValueError(f"must be one of {', '.join(about['choices'])}; is {word!r}")
    return checked


def _convert(value: Any, base: type) -> Any:
    kind = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[base]
    wrong = ValueError(f"must be {kind}, is {value!r}")
    if base is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "yes", "1", "false", "no", "0"):
            return value.lower() in ("true", "yes", "1")
        raise wrong
    if base is str:
        if not isinstance(value, str):
            raise wrong
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong
    try:
        # PyYAML reads 6e-4 (no dot) as a text, and people write 1e6 for a whole number.
        number = float(value.replace("_", "") if isinstance(value, str) else value)
        if base is float and number == number and abs(number) != float("inf"):
            return number
        if base is int and number == int(number):
            if isinstance(value, str) and "e" not in value.lower():
                return int(value.replace("_", ""))  # not through the float, which has only 53 bits
            return int(number)
    except (ValueError, OverflowError):
        pass
    raise wrong
