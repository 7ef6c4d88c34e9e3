"""The exact grader: the final answer is the gold text."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from envs.types import Episode, Task
from graders.answers import final_answer, gold_text
from graders.settings import GraderSettings
from graders.types import Grade


class ExactConfig(GraderSettings):
    """1 for the gold text, 0 for any other."""

    type: Literal["exact"]
    answer_key: str = Field(
        default="answer", min_length=1, description="Key of the task's item that holds the gold answer."
    )
    ignore_case: bool = Field(default=True, description="Take capital and small letters as equal.")


class ExactGrader:
    """1 when answer and gold are the same text, white space aside; 0 otherwise."""

    def __init__(self, config: ExactConfig) -> None:
        self._config = config

    async def grade(self, task: Task, episode: Episode) -> Grade:
        answer, gold = final_answer(episode), gold_text(task, self._config.answer_key)
        if answer is None:
            score, why = 0.0, f"no answer: the episode ended with {episode.stop_reason}"
        elif self._plain(answer) == self._plain(gold):
            score, why = 1.0, f"the answer is the gold {gold!r}"
        else:
            score, why = 0.0, f"{answer!r} is not the gold {gold!r}"
        return Grade(reward=score, parts={"exact": score}, explanation=why)

    def check(self, task: Task) -> None:
        gold_text(task, self._config.answer_key)

    def _plain(self, text: str) -> str:
        joined = " ".join(text.split())
        return joined.casefold() if self._config.ignore_case else joined
