"""The settings of the remote world: tools behind HTTP by the hosted protocol, and MCP servers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from envs.remote.mcp_config import McpServerConfig
from envs.users import UserConfig

_URL = r"^https?://"


class RemoteToolConfig(BaseModel):
    """One tool of the user's server. Its description and JSON schema come from each row's `tools`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(min_length=1, description="The name by which the rows and the model call it.")
    server_url: str = Field(pattern=_URL, description="Calls are posted here; several tools may share it.")
    headers: dict[str, str] = Field(
        default={}, description="Sent with every call; ${NAME} in a value is read from the environment."
    )
    timeout_s: float = Field(default=600.0, gt=0, description="Of one attempt at a call; a call has up to four.")
    rate_limit: float | None = Field(default=None, gt=0, description="Calls a second, retries included.")
    max_concurrency: int = Field(default=64, ge=1, description="Calls in flight.")


class RemoteConfig(BaseModel):
    """Tools that live in other processes, or none at all: the empty world, whose rows are single answers.

    Tasks come from the `data` section.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    type: Literal["remote"] = "remote"
    tools: list[RemoteToolConfig] = Field(default=[], description="Tools by the hosted protocol, over HTTP.")
    mcp: list[McpServerConfig] = Field(default=[], description="MCP servers, whose tools are offered beside them.")
    open_url: str | None = Field(
        default=None, pattern=_URL, description="Told of each rollout before its first turn: type rollout.open."
    )
    close_url: str | None = Field(
        default=None, pattern=_URL, description="Told when a rollout is over, on every path: type rollout.close."
    )
    hook_headers: dict[str, str] = Field(default={}, description="Sent to open_url and close_url, as a tool's are.")
    hook_timeout_s: float = Field(default=60.0, gt=0, description="Of one attempt at either hook.")
    user: UserConfig | None = Field(default=None, description="A simulated user who answers turns without calls.")

    @model_validator(mode="after")
    def _has_distinct_tools(self) -> RemoteConfig:
        names = [tool.name for tool in self.tools]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"tools: two tools are named {name!r}")
        return self
