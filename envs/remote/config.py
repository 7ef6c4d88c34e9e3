"""The settings of the remote world: tools behind HTTP by the hosted protocol, and MCP servers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from envs.reading.documents import from_file
from envs.remote.mcp_config import McpServerConfig
from envs.settings import Settings, WorldSettings
from envs.users import UserConfig

_URL = r"^(https?://|\$\{)"
_IGNORED = ("type", "transport", "description", "autoApprove", "alwaysAllow")
"""What other programs keep in their lists of MCP servers, which changes nothing here."""
_SPOKEN = ("stdio", "local", "remote", "http", "streamable-http", "streamable_http", "streamableHttp")
"""How other programs name the transports that we have."""


def _tools(value: Any) -> Any:
    read = from_file("tools")(value)
    return read["tools"] if isinstance(read, dict) and "tools" in read else read


def _servers(value: Any) -> Any:
    read = from_file("mcp")(value)
    if not isinstance(read, dict):
        return read
    servers = next((read[key] for key in ("mcpServers", "servers", "mcp_servers") if key in read), read)
    if not isinstance(servers, dict) or not all(isinstance(about, dict) for about in servers.values()):
        raise ValueError('expected a list of servers, or {"mcpServers": {NAME: {command or url, ...}}}')
    for name, about in servers.items():
        kind = about.get("type") or about.get("transport") or "http"
        if kind not in _SPOKEN:
            raise ValueError(f"{name}: {kind!r} is not spoken here; expected a server over stdio or streamable HTTP")
    return [
        {
            "name": name,
            **{key: value for key, value in about.items() if key not in ("disabled", *_IGNORED) and value is not None},
        }
        for name, about in servers.items()
        if not about.get("disabled")
    ]


class RemoteToolConfig(Settings):
    """One tool of the user's server. Its description and JSON schema come from each row's `tools`."""

    name: str = Field(min_length=1, description="The name by which the rows and the model call it.")
    server_url: str = Field(pattern=_URL, description="Calls are posted here; several tools may share it.")
    headers: dict[str, str] = Field(
        default={}, description="Sent with every call; ${NAME} here and in the URLs is read from the environment."
    )
    timeout_s: float = Field(default=600.0, gt=0, description="Of one attempt at a call; a call has up to four.")
    rate_limit: float | None = Field(default=None, gt=0, description="Calls a second, retries included.")
    max_concurrency: int = Field(default=64, ge=1, description="Calls in flight.")


class RemoteConfig(WorldSettings):
    """Tools that live in other processes, or none at all: the empty world, whose rows are single answers.

    Tasks come from the `data` section.
    """

    type: Literal["remote"] = "remote"
    tools: Annotated[list[RemoteToolConfig], BeforeValidator(_tools)] = Field(
        default=[], description="Tools by the hosted protocol, over HTTP; or a file with the hosted service's JSON."
    )
    mcp: Annotated[list[McpServerConfig], BeforeValidator(_servers)] = Field(
        default=[], description='MCP servers, offered beside them; or a file, `{"mcpServers": {NAME: {...}}}`.'
    )
    open_url: str | None = Field(
        default=None, pattern=_URL, description="Told of each rollout before its first turn: type rollout.open."
    )
    close_url: str | None = Field(
        default=None, pattern=_URL, description="Told when a rollout is over, on every path: type rollout.close."
    )
    hook_headers: dict[str, str] = Field(default={}, description="Sent to open_url and close_url, as a tool's are.")
    hook_timeout_s: float = Field(default=60.0, gt=0, description="Of one attempt at either hook.")
    user: UserConfig | None = Field(default=None, description="A simulated user who answers turns without calls.")

    def servers(self) -> dict[str, str]:
        """Those of tools and hooks; an MCP server is asked for its tools as the world is built."""
        hooks = {"open_url": self.open_url, "close_url": self.close_url}
        tools = {f"tools.{i}.server_url": tool.server_url for i, tool in enumerate(self.tools)}
        return tools | {key: url for key, url in hooks.items() if url is not None}

    @model_validator(mode="after")
    def _has_distinct_tools(self) -> RemoteConfig:
        names = [tool.name for tool in self.tools]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"tools: two tools are named {name!r}")
        servers = [server.name for server in self.mcp]
        for name in servers:
            if servers.count(name) > 1:
                raise ValueError(f"mcp: two servers are named {name!r}")
        return self
