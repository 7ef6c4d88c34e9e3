"""text_similarity: every metric against published values, or against what its formula gives by hand."""

from __future__ import annotations

import math
import os
import resource
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.errors import UserError
from envs.types import Episode, Message, StopReason, Task, Turn
from graders.rules.similarity import _METRICS, TextSimilarityConfig, TextSimilarityGrader
from graders.types import GraderErrorKind
from tests.support import ROOT

METRICS = ["fuzzy_match", "bleu", "gleu", "meteor", "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l"]
"""cosine apart, which needs torch: see `test_embedding`."""

FOX = ("The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog")
GUIDE_REFERENCE = "It is a guide to action that ensures that the military will forever heed Party commands"
GUIDE = "It is a guide to action which ensures that the military always obeys the commands of the party"
INSURE = "It is to insure the troops forever hearing the activity guidebook that party direct"
CAT = ("the cat sat on the mat", "the cat sat on a mat")


def task(**item: Any) -> Task:
    return Task(task_id="row-1", messages=(Message(role="user", content="?"),), item=item)


def episode(answer: str) -> Episode:
    turns = (Turn(message=Message(role="assistant", content=answer)),)
    return Episode(rollout_id="r", task_id="row-1", messages=(), turns=turns, stop_reason=StopReason.ANSWERED)


def make(metric: str, text: str = "{{ sample.output_text }}") -> TextSimilarityGrader:
    config = {"type": "text_similarity", "name": "like", "evaluation_metric": metric, "input": text}
    return TextSimilarityGrader(TextSimilarityConfig.model_validate(config | {"reference": "{{ item.gold }}"}))


@pytest.mark.parametrize(
    ("metric", "answer", "gold", "expected"),
    [
        # rapidfuzz's documentation: fuzz.ratio of these is 96.55171966552734; the others by 2 · LCS / (sum of lengths).
        ("fuzzy_match", "this is a test", "this is a test!", 0.9655172),
        ("fuzzy_match", "kitten", "sitting", 2 * 4 / 13),
        ("fuzzy_match", "Paris", "paris", 2 * 4 / 10),
        ("fuzzy_match", "abc", "xyz", 0),
        # By hand: precisions 5/6, 3/5, 2/4, 1/3, equal lengths.
        ("bleu", *CAT, (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25),
        # By hand: both precisions that two words have are 1; brevity penalty exp(1 - 3/2).
        ("bleu", "the cat", "the cat sat", math.exp(-0.5)),
        # By hand: no 2-gram matches of one, so exponential smoothing takes half a match: precisions 1/2 and 1/2 · 1/1.
        ("bleu", "the dog", "the cat", (1 / 2 * 1 / 2) ** 0.5),
        # By hand: `13a` takes the full stop for a token of its own, 6 of 7 precise; 5/6, 4/5, 3/4.
        ("bleu", "the cat sat on the mat.", "the cat sat on the mat!", (6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25),
        # nltk's documentation of sentence_gleu.
        ("gleu", GUIDE, GUIDE_REFERENCE, 0.43939),
        ("gleu", INSURE, GUIDE_REFERENCE, 0.12069),
        ("gleu", "the the the the the the the", "the cat is on the mat", 2 / 22),
        # By hand: 5 of 6 words, 3 of 5, 2 of 4, 1 of 3 n-grams; 11 of 18.
        ("gleu", *CAT, 11 / 18),
        # nltk's documentation of single_meteor_score; no synonym takes part in it.
        ("meteor", GUIDE, GUIDE_REFERENCE, 0.6944),
        ("meteor", "non matching hypothesis", "this is a cat", 0),
        # By hand: all words match, in one chunk: 1 - 0.5 · (chunks / matches)³.
        ("meteor", "this is a cat", "This is a cat", 1 - 0.5 * (1 / 4) ** 3),
        ("meteor", "the cats", "the cat", 1 - 0.5 * (1 / 2) ** 3),
        # By hand: recall 2/3, precision 1: 10PR / (R + 9P) = (20/3) / (29/3), one chunk of two.
        ("meteor", "red cat", "one red cat", 20 / 29 * (1 - 0.5 * (1 / 2) ** 3)),
        # rouge-score's README: rouge1 precision 0.75, recall 0.666; rougeL precision 0.625, recall 0.555.
        ("rouge_1", *FOX, 2 * 0.75 * (2 / 3) / (0.75 + 2 / 3)),
        ("rouge_l", *FOX, 2 * 0.625 * (5 / 9) / (0.625 + 5 / 9)),
        # By hand: 2 of 7 and 8 2-grams, 1 of 6 and 7 3-grams, no 4-gram.
        ("rouge_2", *FOX, 2 * 2 / 15),
        ("rouge_3", *FOX, 2 * 1 / 13),
        ("rouge_4", *FOX, 0),
        # By hand: 1 of 3 4-grams each; of 5-grams 1 of 2 and 1 of 3.
        ("rouge_4", *CAT, 2 * 1 / 6),
        ("rouge_5", "one two three four five six", "one two three four five seven eight", 2 * 1 / 5),
        ("rouge_1", "Commands!", "command", 0),
    ],
)
async def test_a_metric_has_its_published_or_hand_made_value(metric, answer, gold, expected):
    grade = await make(metric).grade(task(gold=gold), episode(answer))
    assert grade.reward == pytest.approx(expected, abs=5e-5)
    assert grade.parts == {"like": grade.reward}
    assert grade.explanation.startswith(f"{metric} of input and reference: ")


@pytest.mark.parametrize("metric", METRICS)
async def test_equal_texts_are_alike_and_blank_ones_are_not(metric):
    grader = make(metric)
    same = (await grader.grade(task(gold="one two three four five six"), episode("one two three four five six"))).reward
    # METEOR's penalty on fragments never falls to nothing.
    assert same == (pytest.approx(1 - 0.5 / 6**3) if metric == "meteor" else 1.0)
    assert (await grader.grade(task(gold="one two three"), episode(""))).reward == 0.0
    assert (await grader.grade(task(gold=""), episode("one two three"))).reward == 0.0


@pytest.mark.parametrize("metric", METRICS)
async def test_odd_texts_stay_within_0_and_1(metric):
    grader = make(metric)
    odd = ["", " ", "。", "a" * 3000, "\x00", "émile Ünïcode", "🙂 🙂", "1e999", "x\n\ny", "-- . !?"]
    for answer in odd:
        for gold in odd:
            assert 0.0 <= (await grader.grade(task(gold=gold), episode(answer))).reward <= 1.0


async def test_a_missing_variable_scores_0():
    grade = await make("rouge_1", "{{ sample.output_json.text }}").grade(task(gold="x"), episode("no JSON"))
    assert (grade.reward, grade.parts, grade.errors) == (0.0, {"like": 0.0}, (GraderErrorKind.SAMPLE_PARSE,))
    grade = await make("rouge_1", "{{ sample.output_tools[0] }}").grade(task(gold="x"), episode("no call"))
    assert (grade.reward, grade.errors) == (0.0, (GraderErrorKind.INVALID_VARIABLE,))


def test_a_task_without_the_reference_is_named():
    make("bleu").check(task(gold="x"))
    with pytest.raises(UserError, match=r"^grader 'like': reference: task row-1 has no \{\{ item\.gold \}\}"):
        make("bleu").check(task())


def run(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | environment,
    )
    return result.stdout.strip()


METEOR = """
from graders.rules.similarity import _meteor
print(_meteor()("fast car", "fast auto"))
"""


def test_meteor_knows_synonyms_where_wordnet_is_installed(tmp_path):
    # A WordNet of one synset, in its own file format: the row of the data file begins with its place in bytes.
    corpus = tmp_path / "corpora" / "wordnet"
    corpus.mkdir(parents=True)
    for part in ("noun", "verb", "adj", "adv"):
        for name in (f"index.{part}", f"data.{part}", f"{part}.exc"):
            (corpus / name).write_text("")
    (corpus / "lexnames").write_text("".join(f"{n:02}\tname{n}\t1\n" for n in range(4)))
    (corpus / "index.sense").write_text("")
    (corpus / "index.noun").write_text("auto n 1 0 1 0 00000000  \ncar n 1 0 1 0 00000000  \n")
    (corpus / "data.noun").write_text("00000000 03 n 02 car 0 auto 0 000 | a motor vehicle  \n")
    (tmp_path / "nothing").mkdir()
    without, with_synonyms = run(METEOR, NLTK_DATA=str(tmp_path / "nothing")), run(METEOR, NLTK_DATA=str(tmp_path))
    # By hand: one word of two, one chunk of one; both words, in one chunk.
    assert float(without) == pytest.approx(0.5 * (1 - 0.5))
    assert float(with_synonyms) == pytest.approx(1 - 0.5 * (1 / 2) ** 3)


def test_a_metric_whose_library_is_missing_is_refused_by_name():
    code = """
import sys
sys.modules["rapidfuzz"] = None
from graders.rules.similarity import TextSimilarityConfig, TextSimilarityGrader
try:
    TextSimilarityGrader(TextSimilarityConfig(
        type="text_similarity", input="x", reference="y", evaluation_metric="fuzzy_match"))
except ValueError as e:
    print(e)
"""
    told = "evaluation_metric fuzzy_match needs a package that is not installed: rapidfuzz"
    assert run(code) == f"grader 'text_similarity': {told}"


def test_libraries_are_loaded_by_the_metric_that_needs_them():
    code = """
import sys
import graders.rules.similarity
print([name for name in ("rapidfuzz", "sacrebleu", "nltk", "rouge_score", "torch") if name in sys.modules])
"""
    assert run(code) == "[]"


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcd"), max_size=12), st.lists(st.sampled_from("abcd"), max_size=12))
def test_rouge_l_is_rouge_scores_own_figure(words, others):
    from rouge_score import rouge_scorer

    text, reference = " ".join(words), " ".join(others)
    expected = rouge_scorer.RougeScorer(["rougeL"]).score(reference, text)["rougeL"].fmeasure
    assert _METRICS["rouge_l"]()(text, reference) == pytest.approx(expected)


def test_rouge_l_of_texts_of_tens_of_thousands_of_words_takes_little_memory():
    text = " ".join(f"w{i % 977}" for i in range(30_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert 0 < _METRICS["rouge_l"]()(text, " ".join(reversed(text.split()))) < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, "kilobytes"
