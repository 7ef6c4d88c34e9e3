"""The hosted service's `text_similarity`: how alike two texts are, from 0 to 1.

The service names the metrics and no more than the library of one; these are the choices made here:

    fuzzy_match  rapidfuzz `fuzz.ratio`: 2 · (characters of the longest common subsequence) / (characters of both)
    bleu         sacrebleu's sentence BLEU: tokens of `13a`, case kept, exponential smoothing, orders that fit the text
    gleu         nltk's sentence GLEU over 1- to 4-grams, case kept
    meteor       nltk's METEOR (alpha 0.9, beta 3, gamma 0.5): words match as they are, by stem, or (looked up
                 by their stems) as synonyms; without WordNet's data (`nltk.download("wordnet")`) no word has synonyms
    rouge_1 … 5  rouge-score's F-measure over n-grams, no stemming, letters and digits of English only
    rouge_l      the same over the longest common subsequence
    cosine       of the embeddings (`envs.embedding`; the service asks a model of its own, so values differ), 0 where
                 it is negative and where either text is blank

gleu and meteor split words as nltk's `word_tokenize` splits a single sentence. Not covered: meteor of texts of tens of
thousands of words, which takes minutes; the other gradings by meteor wait for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field

from envs.errors import UserError
from envs.types import Episode, Task
from envs.user_code import call_user
from graders.hosted.templates import MissingVariable, Template
from graders.hosted.view import hosted_sample, item_of
from graders.settings import Continuous, Name
from graders.types import Grade

Metric = Callable[[str, str], float]
"""From input and reference to their similarity."""


class TextSimilarityConfig(Continuous):
    """How alike two texts are, from 0 to 1."""

    type: Literal["text_similarity"]
    name: Name = "text_similarity"
    input: str = Field(description="Template of the text that is checked.")
    reference: str = Field(description="Template of the text that it is compared with.")
    evaluation_metric: Literal[
        "fuzzy_match",
        "bleu",
        "gleu",
        "meteor",
        "cosine",
        "rouge_1",
        "rouge_2",
        "rouge_3",
        "rouge_4",
        "rouge_5",
        "rouge_l",
    ] = Field(description="The measure of likeness, in the hosted service's words.")

    def check_texts(self) -> None:
        # The metric's library may be missing here.
        for key, text in (("input", self.input), ("reference", self.reference)):
            Template(text, where=f"grader {self.name!r}: {key}")


class TextSimilarityGrader:
    """Compares two texts by one metric, in a worker thread: long texts take their time.

    Raises `UserError` where the metric's library or model is not installed. A variable that the sample lacks scores 0.
    """

    def __init__(self, config: TextSimilarityConfig) -> None:
        self._config = config
        self._input = Template(config.input, where=f"grader {config.name!r}: input")
        self._reference = Template(config.reference, where=f"grader {config.name!r}: reference")
        try:
            self._metric = _METRICS[config.evaluation_metric]()
        except ImportError as e:
            raise UserError(
                f"grader {config.name!r}: evaluation_metric {config.evaluation_metric} needs a package that is not "
                f"installed: {e.name}"
            ) from None

    async def grade(self, task: Task, episode: Episode) -> Grade:
        item, sample = item_of(task), hosted_sample(episode)
        try:
            text, reference = self._input.render(item, sample), self._reference.render(item, sample)
        except MissingVariable as e:
            return Grade(reward=0.0, parts={self._config.name: 0.0}, explanation=str(e), errors=(e.kind,))
        # Rounding lifts some metrics of equal texts over 1 by an ulp or two.
        score = min(1.0, max(0.0, await call_user(self._metric, text, reference)))
        why = f"{self._config.evaluation_metric} of input and reference: {score:.4g}"
        return Grade(reward=score, parts={self._config.name: score}, explanation=why)

    def check(self, task: Task) -> None:
        self._input.check(task)
        self._reference.check(task)


def _fuzzy_match() -> Metric:
    from rapidfuzz import fuzz

    return lambda text, reference: fuzz.ratio(text, reference) / 100


def _bleu() -> Metric:
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(effective_order=True)
    return lambda text, reference: metric.sentence_score(text, [reference]).score / 100


def _gleu() -> Metric:
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.translate.gleu_score import sentence_gleu

    words = NLTKWordTokenizer().tokenize
    return lambda text, reference: float(sentence_gleu([words(reference)], words(text)))


class _NoSynonyms:
    """Stands in for WordNet where its data is not installed."""

    def synsets(self, word: str) -> list[Any]:
        return []


# nltk's reader of WordNet seeks in shared files.
_WORDNET_LOCK = threading.Lock()


def _meteor() -> Metric:
    from nltk.corpus import wordnet
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.translate.meteor_score import single_meteor_score

    words = NLTKWordTokenizer().tokenize
    try:
        wordnet.ensure_loaded()
        synonyms: Any = wordnet
    except LookupError:
        synonyms = _NoSynonyms()

    def metric(text: str, reference: str) -> float:
        with _WORDNET_LOCK:
            return float(single_meteor_score(words(reference), words(text), wordnet=synonyms))

    return metric


def _rouge(kind: str) -> Callable[[], Metric]:
    def make() -> Metric:
        from rouge_score import rouge_scorer

        scorer = rouge_scorer.RougeScorer([kind])
        return lambda text, reference: float(scorer.score(reference, text)[kind].fmeasure)

    return make


def _rouge_l() -> Metric:
    from rapidfuzz.distance import LCSseq
    from rouge_score.tokenizers import DefaultTokenizer

    words = DefaultTokenizer(use_stemmer=False).tokenize

    def metric(text: str, reference: str) -> float:
        # Without rouge-score's table of all pairs, which takes gigabytes for texts of tens of thousands of words.
        mine, theirs = words(text), words(reference)
        common = LCSseq.similarity(mine, theirs)
        return 2.0 * common / (len(mine) + len(theirs)) if common else 0.0

    return metric


def _cosine() -> Metric:
    from envs.embedding import default_embedder

    embedder = default_embedder()

    def metric(text: str, reference: str) -> float:
        if not (text.strip() and reference.strip()):
            return 0.0
        one, other = embedder.embed([text, reference])
        return float(one @ other)

    return metric


_METRICS: dict[str, Callable[[], Metric]] = {
    "fuzzy_match": _fuzzy_match,
    "bleu": _bleu,
    "gleu": _gleu,
    "meteor": _meteor,
    "cosine": _cosine,
    **{f"rouge_{n}": _rouge(f"rouge{n}") for n in range(1, 6)},
    "rouge_l": _rouge_l,
}
