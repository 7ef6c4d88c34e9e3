"""What holds for every setting, whichever file it stands in."""

import importlib
import math
import pkgutil
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError

import envs
import graders
import trainer
from envs.settings import Settings
from trainer.config import RunConfig
from trainer.hosted.schema import HostedJob

RECORDS = ("envs.finance.real.", "trainer.runs.manifest", "trainer.runs.canary_record")
"""What is read of data sets and checkpoints: nobody sets it."""


def modules() -> Iterator[types.ModuleType]:
    for package in (envs, graders, trainer):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            yield importlib.import_module(found.name)


def models_of(module: types.ModuleType) -> Iterator[type[BaseModel]]:
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, BaseModel) and value.__module__ == module.__name__:
            yield value


def reached(annotation: Any) -> Iterator[type[Settings]]:
    """The settings that an annotation names, and those that theirs name."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
        for field in annotation.model_fields.values():
            yield from reached(field.annotation)
    for argument in get_args(annotation):
        yield from reached(argument)


SETTINGS = list(dict.fromkeys((*reached(RunConfig), *reached(HostedJob))))
FIELDS = [(section, name) for section in SETTINGS for name in section.model_fields]


def holding(annotation: Any, value: float) -> Iterator[Any]:
    """Values of the annotation's form in which `value` stands for each of its numbers in turn."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in (int, float):
        yield value
    elif origin is Annotated:
        yield from holding(arguments[0], value)
    elif origin in (Union, types.UnionType):
        for member in arguments:
            yield from holding(member, value)
    elif origin is tuple:
        for i, member in enumerate(arguments):
            for held in holding(member, value):
                yield [held if i == j else 0.5 for j in range(len(arguments))]
    elif origin in (list, Mapping, dict):
        for held in holding(arguments[-1], value):
            key = next(iter(get_args(arguments[0])), "key") if get_origin(arguments[0]) is Literal else "key"
            yield [held] if origin is list else {key: held}


NUMBERS = [
    (section, name, wrong)
    for section, name in FIELDS
    for number in (math.inf, -math.inf, math.nan)
    for wrong in holding(section.model_fields[name].annotation, number)
]


@pytest.mark.parametrize(
    ("section", "name", "wrong"),
    NUMBERS,
    ids=[f"{section.__name__}.{name}={wrong}" for section, name, wrong in NUMBERS],
)
def test_no_number_may_be_infinite_or_nan(section, name, wrong):
    field = section.model_fields[name]
    with pytest.raises(ValidationError) as e:
        section.model_validate({field.alias or name: wrong})
    kinds = {error["type"] for error in e.value.errors() if error["loc"][0] in (name, field.alias)}
    assert kinds & {"finite_number", "int_type"}, f"{kinds}: not refused for being no finite number"


TRUTHS = [(s, name, wrong) for s, name in FIELDS for wrong in holding(s.model_fields[name].annotation, True)]


@pytest.mark.parametrize(("section", "name", "wrong"), TRUTHS, ids=[f"{s.__name__}.{name}" for s, name, _ in TRUTHS])
def test_no_number_may_be_true_or_false(section, name, wrong):
    field = section.model_fields[name]
    with pytest.raises(ValidationError, match="expected a number, not true or false"):
        section.model_validate({field.alias or name: wrong})


def test_numbers_of_every_form_are_tried():
    tried = {(section.__name__, name) for section, name, _ in NUMBERS}
    assert len(tried) > 80
    assert tried > {
        ("OptimConfig", "learning_rate"),
        ("ScoreModelConfig", "range"),
        ("FinanceConfig", "question_mix"),
        ("PenaltyConfig", "floor"),
        ("RemoteToolConfig", "rate_limit"),
        ("McpServerConfig", "timeout_s"),
        ("Hyperparameters", "learning_rate_multiplier"),
    }


@pytest.mark.parametrize(("section", "name"), FIELDS, ids=[f"{section.__name__}.{name}" for section, name in FIELDS])
def test_every_setting_says_what_it_is(section, name):
    field = section.model_fields[name]
    if name == "type" and get_origin(field.annotation) is Literal:
        assert section.__doc__, "what tells the members of a union apart is explained by the class"
    else:
        assert field.description


def test_all_settings_share_one_base():
    found = [model for module in modules() for model in models_of(module)]
    assert len(found) >= len(SETTINGS)
    for model in found:
        where = f"{model.__module__}.{model.__name__}"
        if not where.startswith(RECORDS):
            assert issubclass(model, Settings), where
            assert model.model_config["frozen"] and model.model_config["allow_inf_nan"] is False, where


@pytest.mark.parametrize(
    "section",
    [
        {"loss": {"type": "custom", "target": "a.py:f", "kwargs": {"a": [1, {"b": float("nan")}]}}},
        {"world": {"type": "custom", "target": "a.py:f", "kwargs": {"a": float("inf")}}},
        {"grader": {"type": "custom", "target": "a.py:f", "kwargs": {"a": float("-inf")}}},
    ],
    ids=lambda section: next(iter(section)),
)
def test_what_the_users_own_code_is_called_with_holds_no_nan_either(section):
    with pytest.raises(ValidationError, match="finite number"):
        RunConfig.model_validate({"output_dir": "x", "grader": {"type": "numeric"}, **section})
