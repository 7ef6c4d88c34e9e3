"""The settings of an MCP server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from envs.clients.http import resolve_headers
from envs.reading.variables import expand, fill, uses
from envs.settings import JsonObject, Settings

TRACE_ID, ROLLOUT_DIR = "TRACE_ID", "ROLLOUT_DIR"


class McpCallConfig(Settings):
    """A call that we make ourselves."""

    tool: str = Field(min_length=1, description="By the server's own name; it need not be offered to the model.")
    arguments: JsonObject = Field(
        default={}, description="{{item.KEY}} is the row's, ${TRACE_ID} the rollout's id, ${ROLLOUT_DIR} its folder."
    )


class McpServerConfig(Settings):
    """One MCP server: started by `command`, or reached at `url`.

    `${NAME}` in command, args, env, cwd, url and headers is read from the environment; `${TRACE_ID}` is the rollout's
    id, `${ROLLOUT_DIR}` a folder of its own, made when the rollout opens and removed when it closes.
    """

    name: str = Field(min_length=1, description="In messages and metrics.")
    command: str | None = Field(default=None, min_length=1, description="Started as a process that speaks over stdio.")
    args: list[str] = Field(default=[], description="Of the command.")
    env: dict[str, str] = Field(
        default={}, description="Added to HOME, LOGNAME, PATH, SHELL, TERM and USER; the server inherits nothing else."
    )
    cwd: str | None = Field(default=None, min_length=1, description="The folder it is started in; null: the run's own.")
    url: str | None = Field(default=None, pattern=r"^(https?://|\$\{)", description="A streamable HTTP server.")
    headers: dict[str, str] = Field(default={}, description="Sent with every request to the URL.")
    tools: list[str] | None = Field(default=None, min_length=1, description="Offered by name; null: all.")
    prefix: str = Field(default="", pattern=r"^[\w.-]*$", description="Before its tools' names, in rows and prompts.")
    bind: JsonObject = Field(
        default={},
        description="Arguments that the model neither sees nor gives, by name, for the tools that have them; written "
        "as those of open_call.",
    )
    open_call: McpCallConfig | None = Field(default=None, description="Called as a rollout opens.")
    state_call: McpCallConfig | None = Field(
        default=None, description="Called as an episode ends; graders read the answer as sample.state.NAME."
    )
    per_rollout: bool = Field(
        default=True, description="A session, and with stdio a process, for each rollout; false: one for all."
    )
    timeout_s: float = Field(default=600.0, gt=0, description="Of one call.")
    start_timeout_s: float = Field(default=60.0, gt=0, description="From the start of the server to its first answer.")

    @model_validator(mode="after")
    def _is_reached_in_one_way(self) -> McpServerConfig:
        if (self.command is None) == (self.url is None):
            raise ValueError("expected either command (stdio) or url (streamable HTTP)")
        if self.command is None and (self.args or self.env or self.cwd):
            raise ValueError("args, env and cwd go with command, not with url")
        if self.url is None and self.headers:
            raise ValueError("headers go with url, not with command")
        if not self.per_rollout and (uses(self._started_with(), TRACE_ID) or self.has_folder):
            raise ValueError("${TRACE_ID} and ${ROLLOUT_DIR} are a rollout's; this server is one for all (per_rollout)")
        return self

    @property
    def has_folder(self) -> bool:
        """Whether each rollout needs a folder of its own."""
        calls = [call.arguments for call in (self.open_call, self.state_call) if call is not None]
        return uses([self._started_with(), self.bind, calls], ROLLOUT_DIR)

    def resolved(self, own: dict[str, str]) -> McpServerConfig:
        """With every ${NAME} in what the server is started or reached with replaced, `own` first.

        Raises `UserError` for a variable that is not set.
        """
        where = f"MCP server {self.name!r}"

        def text(value: str | None, key: str) -> str | None:
            return None if value is None else expand(value, f"{where}: {key}", own)

        return self.model_copy(
            update={
                "command": text(self.command, "command"),
                "args": [expand(arg, f"{where}: args", own) for arg in self.args],
                "env": {name: expand(value, f"{where}: env.{name}", own) for name, value in self.env.items()},
                "cwd": text(self.cwd, "cwd"),
                "url": text(self.url, "url"),
                "headers": resolve_headers(self.headers, f"{where}: headers", own),
            }
        )

    def check_row(self, item: Mapping[str, Any]) -> None:
        """Raise `UserError` for what the calls that we make need and the row or the environment does not have."""
        calls = {"open_call": self.open_call, "state_call": self.state_call}
        given = {f"{key}.arguments": call.arguments for key, call in calls.items() if call is not None}
        for key, arguments in {**given, "bind": self.bind}.items():
            fill(arguments, f"MCP server {self.name!r}: {key}", item=item, own={TRACE_ID: "", ROLLOUT_DIR: ""})

    def _started_with(self) -> list[Any]:
        return [self.command, self.args, self.env, self.cwd, self.url, self.headers]
