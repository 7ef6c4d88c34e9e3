"""An example world: a shop whose customer changes their mind.

    accelerate launch scripts/train.py --config configs/shop_customer.yaml

One file holds what an episode of several user turns needs; copy it and put your own in place of the shop.

- `Shop` is the world: it has the tasks, makes an environment for each rollout and scripts the expert of the warm start.
- `Customer` is the environment: the tools change its order, `respond` is what the customer says when the model has
  spoken, and `final_state` is what graders see at the end.
- `FinalOrder` is the grader: it looks at the order that was left behind, not at what the model says of it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from envs.base import ExpertTurn
from envs.errors import ToolError
from envs.tools import Tool, tool
from envs.types import Episode, Message, Task

ARTICLES = ("blue pens", "red pens", "notebooks", "tea mugs", "desk lamps", "rulers")
SYSTEM = "You keep a shop. Put what the customer wants into the order with the tools, then say that it is done."
MORE = ("Actually, make that {pieces}.", "Sorry, I need {pieces} of them.", "Wait, {pieces} would be better.")
OTHER = ("No, take {article} instead.", "On second thoughts, I want {article} instead.")


class Customer:
    """One customer and the order that the model keeps for them."""

    calls_in_order = True
    """A turn may set one article twice: the last word counts."""

    def __init__(self) -> None:
        self.order: dict[str, int] = {}
        self.still_to_say: list[str] = []
        self.tools: Mapping[str, Tool] = {t.name: t for t in (tool(self.set_article), tool(self.show_order))}

    async def open(self, task: Task, rollout_id: str) -> None:
        self.still_to_say = list(task.item["changes"])

    async def respond(self, message: Message) -> str | None:
        """The next change of mind, whatever the model said; None once the customer has what they want."""
        return self.still_to_say.pop(0) if self.still_to_say else None

    async def final_state(self) -> Mapping[str, Any]:
        return {"order": self.order, "left_unsaid": len(self.still_to_say)}

    async def close(self, episode: Episode | None) -> None: ...

    def set_article(self, article: str, pieces: int) -> str:
        """Set how many pieces of an article the order has; 0 takes it out.

        Args:
            article: its name, such as red pens
            pieces: how many
        """
        if article not in ARTICLES:
            raise ToolError(f"there is no article {article!r}; there are {', '.join(ARTICLES)}")
        if pieces < 0:
            raise ToolError("pieces can't be negative")
        self.order[article] = pieces
        if not pieces:
            del self.order[article]
        return self.show_order()

    def show_order(self) -> str:
        """Show the order."""
        return ", ".join(f"{pieces} {article}" for article, pieces in self.order.items()) or "the order is empty"


@dataclass(slots=True)
class Shop:
    """The world. Its tasks are a pure function of the seed."""

    num_train_tasks: int = 64
    num_eval_tasks: int = 16
    seed: int = 0

    def make_env(self) -> Customer:
        return Customer()

    def tasks(self, split: str) -> Sequence[Task]:
        number = self.num_train_tasks if split == "train" else self.num_eval_tasks
        return [self._task(f"{split}-{i}") for i in range(number)]

    def _task(self, task_id: str) -> Task:
        rng = random.Random(f"{self.seed}/{task_id}")
        article, pieces = rng.choice(ARTICLES), rng.randint(2, 9)
        wishes, changes = [(article, pieces)], []
        first = f"Hello, I want {pieces} {article}, please."
        # Most customers change their mind once or twice, some never do.
        for _ in range(rng.choice((0, 1, 1, 2))):
            if rng.random() < 0.5:
                pieces = rng.choice([n for n in range(2, 10) if n != pieces])
                changes.append(rng.choice(MORE).format(pieces=pieces))
            else:
                article = rng.choice([a for a in ARTICLES if a != article])
                changes.append(rng.choice(OTHER).format(article=article))
            wishes.append((article, pieces))
        return Task(
            task_id=task_id,
            messages=(Message(role="system", content=SYSTEM), Message(role="user", content=first)),
            item={"changes": changes, "wishes": wishes, "wanted": {article: pieces}},
        )

    def expert_episode(self, task: Task, seed: int) -> Sequence[ExpertTurn]:
        """Fulfil each wish in turn: what was there before goes out where another article is wanted."""
        turns: list[ExpertTurn] = []
        before = ""
        for article, pieces in task.item["wishes"]:
            calls = [("set_article", {"article": before, "pieces": 0})] if before not in ("", article) else []
            calls.append(("set_article", {"article": article, "pieces": pieces}))
            turns += [tuple(calls), f"Done: {pieces} {article}."]
            before = article
        return turns


class FinalOrder:
    """1 where the order is what the customer wanted in the end; 0 otherwise."""

    def grade(self, task: Task, episode: Episode) -> float:
        return float(episode.state["order"] == task.item["wanted"] and not episode.state["left_unsaid"])
