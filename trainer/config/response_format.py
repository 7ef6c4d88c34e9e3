"""`rollout.response_format`: the form that answers must have, as Chat Completions and hosted jobs write it.

    {"type": "json_schema", "json_schema": {"name": "verdict", "schema": {...}, "strict": true}}
    {"type": "json_object"}         any JSON object
    {"type": "text"}                no form

Loads neither torch nor vllm.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import Field

from envs.settings import JsonObject, Settings


class _Part(Settings, serialize_by_alias=True):
    """Written as it is read: `schema` is a name that pydantic keeps to itself."""


class JsonSchema(_Part):
    """A schema and what it is called. Only the schema has an effect, here as in `vllm serve`."""

    name: str = Field(min_length=1, max_length=64, description="of the schema")
    description: str | None = Field(None, description="what the answer is for; not shown to the model")
    json_schema: JsonObject = Field(alias="schema", description="the JSON schema that every answer fits")
    strict: bool | None = Field(None, description="taken as true whatever it is: no answer can break the schema")


class JsonSchemaFormat(_Part):
    """Answers that fit a JSON schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema = Field(description="the schema and its name")


class JsonObjectFormat(_Part):
    """Answers that are JSON objects."""

    type: Literal["json_object"]


class TextFormat(_Part):
    """Answers in any form."""

    type: Literal["text"]


ResponseFormat = Annotated[JsonSchemaFormat | JsonObjectFormat | TextFormat, Field(discriminator="type")]


def schema_text(response_format: ResponseFormat | None) -> str | None:
    """The JSON schema of every answer; None where answers are free."""
    match response_format:
        case JsonSchemaFormat():
            return json.dumps(response_format.json_schema.json_schema)
        case JsonObjectFormat():
            return json.dumps({"type": "object"})
        case _:
            return None
