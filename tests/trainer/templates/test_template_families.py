"""Every chat template that trl and vLLM ship: its episodes read and go on as serving does, or it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from envs.errors import UserError
from envs.types import StopReason
from tests.support.template_families import EPISODES, FAMILIES, family_chat, play, prompts_differ, template_files
from trainer.templates.chat import Chat

ONE_CALL_A_TURN = {"llama3_1", "llama3_2"}
THROUGH = [name for name, family in FAMILIES.items() if not family.refused]


@pytest.fixture(scope="module", params=THROUGH)
def chat(request: pytest.FixtureRequest, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Chat]:
    name = request.param
    return name, family_chat(smollm2, tmp_path_factory.mktemp("family") / name, name)


def test_every_template_that_the_installed_packages_ship_has_a_family() -> None:
    assert template_files().keys() == FAMILIES.keys()


@pytest.mark.parametrize("episode", EPISODES)
def test_an_episode_goes_on_from_what_serving_renders(chat: tuple[str, Chat], episode: str) -> None:
    name, the_chat = chat
    rollout = play(the_chat, FAMILIES[name], episode)
    assert rollout.episode.stop_reason is StopReason.ANSWERED
    assert rollout.episode.answer is not None
    assert rollout.episode.answer.endswith("It is 42.")
    turns = rollout.episode.turns
    one_too_many = episode == "two calls" and name in ONE_CALL_A_TURN
    assert [t.malformed for t in turns] == [episode == "malformed" or one_too_many] + [False] * (len(turns) - 1)
    num_calls = {"malformed": 0, "two calls": 0 if one_too_many else 2}.get(episode, 1)
    assert len(turns[0].results) == num_calls
    assert all(r.error is None for t in turns for r in t.results)
    assert len(turns) == (4 if episode == "second user turn" else 2)
    assert prompts_differ(the_chat, rollout) == ""
    assert "Find reports." in the_chat.decode(rollout.ledgers[0].prompt_ids)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in THROUGH])
def test_what_is_refused_is_refused_by_its_reason(name: str, smollm2: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        family_chat(smollm2, tmp_path / name, name)
    assert FAMILIES[name].refused in str(refusal.value)


def test_a_template_that_drops_calls_gives_way_to_the_fallback_where_the_parser_is_hermes(
    smollm2: Path, tmp_path: Path
) -> None:
    chat = family_chat(smollm2, tmp_path / "lfm2", "lfm2", tool_parser="hermes")
    assert chat.uses_fallback
