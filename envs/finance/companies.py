"""Companies of the generated corpora: their names, who are sisters, and which are held out."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from envs.finance.config import FinanceConfig, Kind

# Common words, so that a small model's tokenizer keeps them whole.
STEMS = (
    *(
        "Maple",
        "River",
        "Harbor",
        "Falcon",
        "Summit",
        "Cedar",
        "Silver",
        "Golden",
        "Atlas",
        "Beacon",
        "Canyon",
        "Delta",
    ),
    *("Eagle", "Forest", "Granite", "Horizon", "Island", "Jupiter", "Keystone", "Liberty", "Meadow", "Nova", "Ocean"),
    *(
        "Pacific",
        "Quartz",
        "Ridge",
        "Sierra",
        "Titan",
        "Union",
        "Valley",
        "Willow",
        "Zenith",
        "Amber",
        "Birch",
        "Coral",
    ),
    *("Dawn", "Ember", "Frost", "Garden", "Hazel", "Iron", "Jade", "Knight", "Lotus", "Mercury", "North", "Orchid"),
    *("Phoenix", "Royal", "Stone", "Tiger", "Velvet", "Winter", "Cobalt", "Crystal", "Diamond", "Arrow", "Anchor"),
    *("Bridge", "Castle", "Crown", "Drake", "Lunar", "Solar"),
)
SECTORS = (
    *("Foods", "Steel", "Energy", "Media", "Motors", "Bank", "Health", "Paper", "Software", "Textiles", "Airlines"),
    *("Chemicals", "Mining", "Insurance", "Hotels", "Shipping"),
)
SISTER_SUFFIXES = ("Group", "Asia", "Europe", "Services", "Partners")
"""Appended to a company's name to name its sister: `Maple Foods` and `Maple Foods Asia`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Company:
    """One company. Sisters share a `family` and are always in the same split."""

    name: str
    folder: str
    """Its folder in the corpus; the name in lower case with hyphens."""
    family: str
    unit: str
    """`million` or `thousand`: what its reports count in."""


def make_companies(config: FinanceConfig) -> tuple[Company, ...]:
    """The companies of this config, sisters behind each other."""
    return tuple(_companies(config))


def choose_eval_families(config: FinanceConfig, companies: Sequence[Company]) -> frozenset[str]:
    """The families that only eval tasks ask about: at least one, and never all."""
    families = list(dict.fromkeys(company.family for company in companies))
    random.Random(f"{config.seed}/split").shuffle(families)
    num_eval = min(max(1, round(config.eval_share * len(families))), len(families) - 1)
    return frozenset(families[:num_eval])


def share_out(mix: dict[Kind, float], total: int) -> dict[Kind, int]:
    """Whole numbers in proportion to the weights that sum to the total (largest remainder)."""
    exact = {kind: total * weight / sum(mix.values()) for kind, weight in mix.items()}
    shares = {kind: int(share) for kind, share in exact.items()}
    by_remainder = sorted(exact, key=lambda kind: shares[kind] - exact[kind])
    for kind in by_remainder[: total - sum(shares.values())]:
        shares[kind] += 1
    return shares


def _companies(config: FinanceConfig) -> Iterator[Company]:
    rng = random.Random(f"{config.seed}/companies")
    families = [f"{stem} {sector}" for stem in STEMS for sector in SECTORS]
    rng.shuffle(families)
    room = config.num_companies
    for family in families:
        names = [family]
        if rng.random() < config.sister_share:
            names.append(f"{family} {rng.choice(SISTER_SUFFIXES)}")
        for name in names[:room]:
            unit = "thousand" if rng.random() < config.thousands_share else "million"
            yield Company(name=name, folder=name.lower().replace(" ", "-"), family=family, unit=unit)
        room -= len(names)
        if room <= 0:
            return
