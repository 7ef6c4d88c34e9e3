"""A small model that writes tool calls, so that runs on a real engine have something to count, in seconds.

It has learned a few episodes of experts by heart: what it writes has the right form, and is seldom right.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from envs.types import Message
from tests.support import ROOT
from tests.support.families import VOCABULARY
from trainer.config import load_config
from trainer.learning.samples import sample_of
from trainer.learning.warmstart import expert_ledger
from trainer.prepare import build_world
from trainer.templates.chat import Chat

NUM_STEPS = 240
THOUGHT = '<think> I think it is right.</think>{{"score": {}}}\n'
"""Learned under a tokenizer whose token 3 is `<think>`, and whose token 2 `</think>`."""
Row = tuple[list[int], list[bool]]
"""Token ids, and which of them are learned."""


def teach(folder: Path, tokenizer: Path) -> Path:
    """A checkpoint in float32 under the tokenizer of `tokenizer`; some 20 s of one core."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(_config())
        _learn(model, [*_rows(Chat(tokenizer)), *_thoughts(tokenizer)])
    model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "generation")):
            shutil.copy(file, folder)
    return folder


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
    )


def _rows(chat: Chat) -> list[Row]:
    return [*_episodes(chat, "quickstart", 20), *_episodes(chat, "shop_customer", 10), *_answers(chat)]


def _episodes(chat: Chat, config: str, num_tasks: int) -> list[Row]:
    world = build_world(load_config(ROOT / "configs" / f"{config}.yaml").world)
    rows = []
    for i, task in enumerate(world.tasks("train")[:num_tasks]):
        ledger = asyncio.run(expert_ledger(task, world.expert_episode(task, i), world=world, chat=chat))
        sample = sample_of(ledger, advantage=0.0, rollout_id="r", task_id="t")
        rows.append((list(sample.token_ids), list(sample.trainable)))
    return rows


def _answers(chat: Chat) -> list[Row]:
    """JSON without a tool: of an assistant and of a judge."""
    rows = []
    for i in range(10):
        asked = [Message(role="user", content=f"Is {i} + {i} = {2 * i + i % 2}? Explain, and give a score.")]
        verdict = {"explanation": f"I think it is {i}.", "score": 10 * i, "kind": "wrong" if i % 2 else "right"}
        rows.append(_answered(chat, asked, verdict))
        found = [0.5, "right", 1, "wrong", 0][i % 5]
        judged = {"steps": [{"description": "Look.", "conclusion": f"It is {i}."}], "result": found}
        asked = [Message(role="user", content=f"Gold answer: {i}. Answer: It is {i}.")]
        rows.append(_answered(chat, asked, judged))
    return rows


def _answered(chat: Chat, asked: list[Message], answer: dict[str, Any]) -> Row:
    prompt = chat.open(asked, [])
    own = chat.encode_assistant(asked, Message(role="assistant", content=json.dumps(answer)), [])
    return prompt + own, [False] * len(prompt) + [True] * len(own)


def _thoughts(tokenizer: Path) -> list[Row]:
    text = "".join(THOUGHT.format(i) for i in (3, 5, 2, 7, 4, 6))
    text = text.replace("<think>", "<repo_name>").replace("</think>", "<|im_end|>")
    token_ids = AutoTokenizer.from_pretrained(tokenizer).encode(text)
    return [(token_ids, [True] * len(token_ids))] * 4


def _learn(model: LlamaForCausalLM, rows: list[Row]) -> None:
    rng, most = random.Random(0), 3e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=most, weight_decay=0.0)
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = most * min(1, (step + 1) / 10, (NUM_STEPS - step) / (0.3 * NUM_STEPS))
        token_ids, trained = rng.choice(rows)
        ids_T, trained_T = torch.tensor(token_ids), torch.tensor(trained)
        hidden_TH = model.model(input_ids=ids_T[None]).last_hidden_state[0, :-1][trained_T[1:]]
        torch.nn.functional.cross_entropy(model.lm_head(hidden_TH), ids_T[1:][trained_T[1:]]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
