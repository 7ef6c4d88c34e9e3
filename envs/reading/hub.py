"""Hugging Face's hub where it answers, and what is here of it where it does not."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from envs.limits.threads import within

_LIMIT_S = 5.0


@contextlib.contextmanager
def hub_or_cache() -> Iterator[None]:
    """Within it Hugging Face's own libraries fetch from the hub, or are offline where nobody answers there.

    It is asked once: left alone, its clients try for half a minute, and for minutes where packets are lost. Not for
    several threads at once.
    """
    from huggingface_hub import constants

    places: list[Any] = [constants, *(filter(None, [sys.modules.get("datasets.config")]))]
    before = [place.HF_HUB_OFFLINE for place in places]
    if not any(before) and not within(_LIMIT_S, _answers):
        for place in places:
            place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, was in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = was


def _answers() -> bool:
    import httpx
    from huggingface_hub import constants, get_session

    try:
        return bool(get_session().head(constants.ENDPOINT, timeout=_LIMIT_S).status_code < 500)
    except (httpx.HTTPError, OSError):
        return False
