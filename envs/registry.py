"""The worlds, by the `type` that a config names: one line each; and their settings, told apart by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from envs.base import World
from envs.settings import WorldSettings, by_type


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

if TYPE_CHECKING:
    WorldConfig = WorldSettings
else:
    WorldConfig = by_type(
        {name: resolve_name(f"envs.{entry.settings}") for name, entry in WORLDS.items()}, without_type="remote"
    )


def build_world(config: WorldSettings) -> World:
    """Raises `UserError` for a world that can't be had, such as an MCP server that does not answer."""
    make: Callable[[WorldSettings], World] = resolve_name(f"envs.{WORLDS[config.type].world}")
    return make(config)
