"""The words that company names are made of: common ones, so that a small model's tokenizer keeps them whole."""

from __future__ import annotations

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
