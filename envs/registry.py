"""The worlds, by the `type` that a config names: one line each; and their settings, told apart by it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Tag

from envs.base import World
from envs.settings import WorldSettings


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a world stands, as `module:name` below `envs`."""

    settings: str
    """Their class, a `WorldSettings`."""
    world: str
    """Called with the settings; what it needs of libraries is imported then, and not before."""


WORLDS = {
    "finance": Entry("finance.config:FinanceConfig", "finance.world:FinanceWorld"),
    "remote": Entry("remote.config:RemoteConfig", "remote.world:RemoteWorld"),
    "custom": Entry("custom.world:CustomEnvConfig", "custom.world:CustomWorld"),
}
_WITHOUT_TYPE = "remote"


def _settings_of(name: str) -> Any:
    return Annotated[resolve_name(f"envs.{WORLDS[name].settings}"), Tag(name)]


def _type_of(value: Any) -> str:
    given = value.get("type", _WITHOUT_TYPE) if isinstance(value, dict) else getattr(value, "type", _WITHOUT_TYPE)
    return str(given)


if TYPE_CHECKING:
    WorldConfig = WorldSettings
else:
    WorldConfig = Annotated[functools.reduce(operator.or_, map(_settings_of, WORLDS)), Discriminator(_type_of)]


def build_world(config: WorldSettings) -> World:
    """Raises `UserError` for a world that can't be had, such as an MCP server that does not answer."""
    make: Callable[[WorldSettings], World] = resolve_name(f"envs.{WORLDS[config.type].world}")
    return make(config)
