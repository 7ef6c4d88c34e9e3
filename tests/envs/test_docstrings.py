"""Docstrings as people write them, and TRL's own reading of them."""

from __future__ import annotations

import enum
import json
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field
from transformers.utils import get_json_schema

from envs.custom.trl_schema import trl_schema
from envs.schemas.docstrings import read_docstring
from envs.tools import call_tool, tool
from envs.types import ToolCall, ToolErrorKind

GOOGLE = """Book a table.

    The kitchen closes at ten.

    Args:
        day (str): The day,
            as `YYYY-MM-DD`: no other form.

        seats (int, optional): How many.
            Note: at most 8.

    Returns:
        str: day: the day booked

    Raises:
        ValueError: seats: too many
    """
GOOGLE_ODD_TYPES = """Book a table.

    The kitchen closes at ten.

    Arguments:
        day (`str`, *optional*, defaults to `"x: y"`):
            The day,
            as `YYYY-MM-DD`: no other form.
        seats (Optional[Union[int, Tuple[()]]])
            How many.
            Note: at most 8.
    """
GOOGLE_UNINDENTED = """Book a table.

    The kitchen closes at ten.

    Args:
        day: The day,
        as `YYYY-MM-DD`: no other form.
        seats: How many.
          Note, at most 8.
    """
NUMPY = """Book a table.

    The kitchen closes at ten.

    Parameters
    ----------
    day : str
        The day,
        as `YYYY-MM-DD`: no other form.
    seats : int, optional
        How many.
        Note: at most 8.

    Returns
    -------
    str
        day
    """
REST = """Book a table.

    The kitchen closes at ten.

    :param day: The day,
        as `YYYY-MM-DD`: no other form.
    :type day: str
    :param int seats: How many.
        Note: at most 8.
    :returns: day
    :raises ValueError: seats
    """
EPYDOC = """Book a table.

    The kitchen closes at ten.

    @param day: The day,
        as `YYYY-MM-DD`: no other form.
    @param seats: How many.
        Note: at most 8.
    @return: day
    """


@pytest.mark.parametrize("doc", [GOOGLE, GOOGLE_ODD_TYPES, GOOGLE_UNINDENTED, NUMPY, REST, EPYDOC])
def test_a_function_is_described_alike_in_every_style(doc):
    def book(day: str, seats: int = 2) -> str:
        return day

    book.__doc__ = doc
    about = tool(book).schema()["function"]
    texts = {name: prop["description"] for name, prop in about["parameters"]["properties"].items()}
    assert about["description"] == "Book a table.\n\nThe kitchen closes at ten."
    assert texts["day"] == "The day, as `YYYY-MM-DD`: no other form."
    assert texts["seats"].replace("Note,", "Note:") == "How many. Note: at most 8."


def test_numpys_parameters_may_share_a_text():
    docs = read_docstring("Add.\n\nParameters\n----------\nx, y : float\n    A number.\n", ["x", "y"])
    assert docs.texts == {"x": "A number.", "y": "A number."}


@pytest.mark.parametrize(
    "section",
    [
        *("Returns:\n    The time.", "Raises:\n    ValueError: never", "Yields:\n    times", "Example:\n    >>> now()"),
        *("Returns\n-------\nstr\n    The time.", ":returns: the time", ":rtype: str", "@return: the time"),
    ],
)
def test_what_follows_the_description_is_not_shown_for_a_tool_without_parameters(section):
    assert read_docstring(f"The time.\n\nIn UTC.\n\n{section}", []).description == "The time.\n\nIn UTC."


def test_a_text_may_stand_in_the_annotation():
    def book(
        day: Annotated[str, "The day."], seats: Annotated[int, Field(ge=1, description="How many.")], name: str
    ) -> str:
        """Book a table.

        Args:
            name: For whom.
        """
        return day

    properties = tool(book).schema()["function"]["parameters"]["properties"]
    assert [prop["description"] for prop in properties.values()] == ["The day.", "How many.", "For whom."]


async def test_choices_in_a_text_are_all_that_the_parameter_may_be():
    def switch(mode: str, level: int = 0) -> str:
        """Switch it.

        Args:
            mode: The state. (choices: ["on", "off "])
            level: How far (choices: [0, 1])
        """
        return f"{mode} {level}"

    made = tool(switch)
    properties = made.schema()["function"]["parameters"]["properties"]
    assert properties["mode"] == {"description": "The state.", "enum": ["on", "off"], "type": "string"}

    async def call(**arguments: Any) -> Any:
        text = json.dumps(arguments)
        return await call_tool({"switch": made}, ToolCall(call_id="c", name="switch", arguments=text), timeout_s=5)

    assert (await call(mode="on")).output == "on 0"
    refused = await call(mode="up", level=2)
    assert refused.error is ToolErrorKind.BAD_ARGUMENTS
    assert 'mode: Value error, Input should be one of ["on", "off"]' in refused.output and "level:" in refused.output


def test_a_type_that_has_no_schema_is_refused_with_the_tools_name():
    class Thing: ...

    def use(thing: Any) -> str:
        """Use it.

        Args:
            thing: what
        """
        return ""

    use.__annotations__["thing"] = Thing
    with pytest.raises(TypeError, match="tool 'use': a type that has no JSON schema"):
        tool(use)


TYPES = [
    *(int, float, str, bool, Any, dict, list[int], list[list[str]], dict[str, int], tuple[int, str]),
    *(int | None, int | str, str | int | None, list[int] | str, list[int] | None, Literal["a", "b"], Literal[1, "a"]),
    *(Literal[True, None], Annotated[int, "x"], dict[str, list[int | None]], tuple[int], tuple[int, ...]),
    *(set[int], list[Literal["a"]], None, type(None) | int, dict[str, Any], list[Any], Any | None),
]


class Unit(enum.Enum):
    METRE = "m"


class Place(BaseModel):
    city: str


@dataclass
class Trip:
    days: int


SHOWN_AS_OBJECTS = [
    *(list, tuple, complex, date, Unit, Place, Trip, list[Place], Unit | None, int | Place, dict[str, Trip]),
    *(tuple[int, Unit], list[list | None]),
]
TEXTS = st.sampled_from(
    [
        *("The x.", "The x.\n    on two lines", "The x.\nunindented", "Note: a: b", "", "  spaced  out ", "é “q” (x)"),
        *('One. (choices: ["a", "b "])', "(Choices: [1, 2])", "x\n\n    after a blank line", "see y: it", "a\tb"),
    ]
)
HEADS = st.sampled_from(
    [
        "Do it.",
        "Do it.\n\nTwo paragraphs,\nwith lines.",
        "Do it. Args: x",
        "Do it.\n  - a\n  - b",
        "Do: it.\n\nNote:\n    n",
    ]
)
TAILS = st.sampled_from(
    [
        *(
            "",
            "\n\nReturns:\n    int: the sum",
            "\n\nRaises:\n    ValueError: x",
            "\nReturns:\n    r\n\nRaises:\n    E: e",
        ),
        *(
            "\n\nReturns:\n    r",
            "\n\nExample:\n    x: 3",
            "\n\n",
            "\nReturns: r",
            "\n\nRaises:\n    E: e\nReturns:\n    r",
        ),
    ]
)


@settings(deadline=None)
@given(head=HEADS, texts=st.lists(TEXTS, max_size=3), tail=TAILS, blank=st.booleans(), data=st.data())
def test_trls_users_are_shown_the_schema_that_trl_builds(head, texts, tail, blank, data):
    names = ["x", "y", "long_name"][: len(texts)]
    entries = ("\n\n" if blank else "\n").join(f"    {n}: {t}" for n, t in zip(names, texts, strict=True))
    doc = head + (f"\n\nArgs:\n{entries}" if names else "") + tail
    hints = {name: data.draw(st.sampled_from([*TYPES, *SHOWN_AS_OBJECTS])) for name in names}
    returns = data.draw(st.sampled_from([None, int, str | None, list[str], "absent"]))
    scope: dict[str, Any] = {}
    exec(f"def act({', '.join(n + (' = None' if i else '') for i, n in enumerate(names))}): pass", scope)
    act = scope["act"]
    act.__doc__, act.__annotations__ = doc, hints | ({} if returns == "absent" else {"return": returns})
    try:
        theirs = get_json_schema(act)
    except Exception:
        # A function that TRL refuses may be taken here.
        return
    assert trl_schema(act) == theirs
    is_true = not any(hint in SHOWN_AS_OBJECTS for hint in hints.values())
    assert trl_schema(act, only_true=True) == (theirs if is_true else None)


def test_what_a_function_returns_leaves_its_parameters_to_trl():
    def act(x: int) -> Place:
        """Do it.

        Args:
            x: what
        """
        return Place(city="")

    act.__annotations__ = {"x": int, "return": Place}
    assert trl_schema(act, only_true=True) == get_json_schema(act)


def test_torch_is_not_loaded_for_a_docstring():
    code = (
        "import sys; import envs.custom.world, envs.schemas.docstrings, envs.custom.trl_schema as s\n"
        "def f(x: int) -> int:\n    'F.\\n\\nArgs:\\n    x: x'\n"
        "assert s.trl_schema(f); assert not {'torch', 'transformers', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
