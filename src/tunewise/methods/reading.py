"""From YAML to a `Recipe` and back: shorthands, methods by name, errors that name the field and the nearest word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from tunewise.errors import InputError, did_you_mean
from tunewise.methods import BY_NAME
from tunewise.recipe import (
    AbstainSpec,
    BatchSpec,
    CheckpointSpec,
    DataSpec,
    EvaluationSpec,
    Method,
    ModelSpec,
    QualitySpec,
    Recipe,
    ReplaySpec,
    TrainingSpec,
)

_SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelSpec,
    "data": DataSpec,
    "data.replay": ReplaySpec,
    "data.abstain": AbstainSpec,
    "batch": BatchSpec,
    "training": TrainingSpec,
    "evaluation": EvaluationSpec,
    "checkpoints": CheckpointSpec,
    "quality": QualitySpec,
}
_SHORTHANDS = {"model": "name", "data": "source"}
"""`model: NAME` is `model: {name: NAME}`, `data: FILE` is `data: {source: FILE}`."""


def load_recipe(path: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a YAML (or JSON) file and apply `settings`, each "dotted.key=value".

    Raises:
        InputError: the file is not readable, or a key or value in it is wrong.
    """
    return recipe_from_mapping(with_settings(read_yaml(Path(path)), settings), str(path))


def recipe_to_yaml(recipe: Recipe) -> str:
    """Write a recipe as YAML that `load_recipe` reads back to an equal one."""
    mapping = recipe.to_mapping()
    text = yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True)
    if yaml.safe_load(text) != mapping:  # PyYAML 6 writes U+0085 and its like bare, and reads them as line ends
        text = yaml.safe_dump(mapping, sort_keys=False)
    return text


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file; a key that stands twice is an error, not the last one's victory.

    Raises:
        InputError: not readable, not YAML, not a mapping.
    """
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except FileNotFoundError:
        raise InputError(f"There is no recipe file '{file}'.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The recipe file '{file}' cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"The recipe file '{file}' is not valid YAML: {_yaml_problem(error)}") from None
    if not isinstance(content, dict):
        raise InputError(f"The recipe file '{file}' holds no mapping; it needs at least 'model' and 'data'.")
    return content


def with_settings(mapping: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Return `mapping` with each "dotted.key=value" put in; values are read as YAML.

    Raises:
        InputError: a setting has no '=', or its key goes through something that is no mapping.
    """
    result = {key: (dict(value) if isinstance(value, dict) else value) for key, value in mapping.items()}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise InputError(f"--set {setting}: write it as key=value, for example training.learning_rate=1e-4.")
        try:
            value = yaml.load(text, Loader=_StrictLoader)
        except yaml.YAMLError as error:
            raise InputError(f"--set {setting}: the value is not valid YAML: {_yaml_problem(error)}") from None
        _put(result, key.split("."), value, setting)
    return result


def recipe_from_mapping(mapping: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Make a Recipe from plain data; `source` names it in errors.

    Raises:
        InputError: a field is unknown, missing or wrong; the message names it.
    """
    content = dict(mapping)
    for section, field in _SHORTHANDS.items():
        if section not in content or content[section] is None:
            raise InputError(f"{source}: '{section}' is missing; a recipe needs at least a model and data.")
        if isinstance(content[section], str):
            content[section] = {field: content[section]}
    if content.get("methods") is not None:
        content["methods"] = _methods(content["methods"], source)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        problems = [_explain(dict(item)) for item in error.errors()]
        raise InputError(f"{source} is not valid:\n  " + "\n  ".join(problems)) from None


def _methods(listed: Any, source: str) -> tuple[Method, ...]:
    if isinstance(listed, list) and all(isinstance(item, Method) for item in listed):
        return tuple(listed)
    if isinstance(listed, list):
        listed = _merge_list(listed, source)
    if not isinstance(listed, dict):
        raise InputError(f"{source}: 'methods' must map a method's name to its options, e.g. 'lora: {{rank: 16}}'.")
    return tuple(method_from_mapping(str(name), options, source) for name, options in listed.items())


def _merge_list(items: list[Any], source: str) -> dict[str, Any]:
    """Read the list form: `- lora` or `- lora: {rank: 16}`."""
    merged: dict[str, Any] = {}
    for item in items:
        entries = {item: None} if isinstance(item, str) else item
        if not isinstance(entries, dict):
            raise InputError(f"{source}: methods: '{item}' is neither a name nor a name with options.")
        for name, options in entries.items():
            if name in merged:
                raise InputError(f"{source}: methods: '{name}' stands there twice.")
            merged[name] = options
    return merged


def method_from_mapping(name: str, options: Any, source: str = "recipe") -> Method:
    """Make the method `name` with `options` (a mapping, or None for the defaults).

    Raises:
        InputError: no such method, or wrong options.
    """
    if name not in BY_NAME:
        raise InputError(f"{source}: there is no method '{name}'.{did_you_mean(name, BY_NAME)}")
    if not isinstance(options, dict | None):
        raise InputError(f"{source}: methods.{name}: options must be a mapping, not '{options}'.")
    kind = BY_NAME[name]
    try:
        return kind.model_validate(options or {})
    except ValidationError as error:
        problems = [_explain(dict(item), f"methods.{name}", kind) for item in error.errors()]
        raise InputError(f"{source} is not valid:\n  " + "\n  ".join(problems)) from None


def _explain(item: dict[str, Any], prefix: str = "", kind: type[BaseModel] | None = None) -> str:
    place = [str(part) for part in item["loc"]]
    where = ".".join([prefix, *place] if prefix else place) or "recipe"
    if item["type"] == "extra_forbidden":
        owner = kind or (_SECTIONS.get(".".join(place[:-1]), Recipe))
        return f"{where}: there is no such field.{did_you_mean(place[-1], owner.model_fields)}"
    given = "" if item["type"] == "missing" or isinstance(item["input"], dict) else f" (given: {item['input']!r})"
    return f"{where}: {item['msg'].removeprefix('Value error, ')}{given}"


def _put(target: dict[str, Any], path: list[str], value: Any, setting: str) -> None:
    for depth, part in enumerate(path[:-1]):
        inner = target.get(part)
        if isinstance(inner, str) and depth == 0 and part in _SHORTHANDS:
            inner = {_SHORTHANDS[part]: inner}
        if isinstance(inner, list) and depth == 0 and part == "methods":
            inner = _merge_list(inner, f"--set {setting}")
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise InputError(f"--set {setting}: '{part}' is no section that has fields.")
        target[part] = dict(inner)
        target = target[part]
    target[path[-1]] = value


class _StrictLoader(yaml.SafeLoader):
    """A safe loader for which a repeated key is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' stands twice", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}"
    return str(error).splitlines()[0]
