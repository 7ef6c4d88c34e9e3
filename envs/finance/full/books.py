"""A company's books: the figures of each year, from which its reports are written.

Amounts are whole steps of the company's unit: a tenth of a million, or one thousand. Totals are derived from the leaves
by one function, so that every statement adds up, the restated ones included.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

Lines = dict[str, int]
"""Label of the line → steps of the unit; rates in tenths of a per cent, amounts per share in cents."""

# Each leaf's share of the year's revenue: drawn once for a company, then moved a little every year.
_SHARES: Mapping[str, tuple[float, float]] = {
    "Cost of revenue": (0.45, 0.66),
    "Research and development": (0.01, 0.08),
    "Selling, general and administrative": (0.08, 0.17),
    "Depreciation and amortization": (0.02, 0.05),
    "Interest expense": (0.004, 0.02),
    "Other income, net": (0.001, 0.01),
    "Cash and cash equivalents": (0.06, 0.2),
    "Short-term investments": (0.02, 0.12),
    "Accounts receivable, net": (0.08, 0.2),
    "Inventories": (0.05, 0.18),
    "Prepaid expenses and other current assets": (0.01, 0.05),
    "Property, plant and equipment, net": (0.2, 0.6),
    "Goodwill": (0.05, 0.4),
    "Intangible assets, net": (0.03, 0.15),
    "Other assets": (0.02, 0.08),
    "Accounts payable": (0.05, 0.14),
    "Accrued liabilities": (0.04, 0.1),
    "Current portion of long-term debt": (0.01, 0.05),
    "Long-term debt": (0.1, 0.35),
    "Deferred income taxes": (0.01, 0.06),
    "Other liabilities": (0.01, 0.05),
    "Common stock and additional paid-in capital": (0.1, 0.3),
    "Stock-based compensation": (0.004, 0.02),
    "Capital expenditures": (0.03, 0.08),
    "Acquisitions, net of cash acquired": (0.002, 0.05),
    "Dividends paid": (0.005, 0.03),
    "Repurchases of common stock": (0.005, 0.04),
    "Proceeds from issuance of debt": (0.01, 0.08),
    "Repayments of debt": (0.01, 0.06),
    "Rent expense": (0.005, 0.03),
    "Backlog": (0.2, 1.1),
    "Purchase commitments": (0.03, 0.2),
    "Advertising expense": (0.004, 0.03),
    "Unrecognized tax benefits": (0.003, 0.02),
}
RESTATABLE = ("Cost of revenue", "Accounts receivable, net", "Inventories", "Goodwill", "Accrued liabilities")
_LOG10_REVENUE = {"million": (3.7, 5.2), "thousand": (4.8, 6.4)}
_STATUTORY = 350


def keep_books(rng: random.Random, unit: str, years: range) -> dict[int, Lines]:
    """The leaves of each year."""
    revenue = 10 ** rng.uniform(*_LOG10_REVENUE[unit])
    shares = {label: rng.uniform(*bounds) for label, bounds in _SHARES.items()}
    stock = revenue * rng.uniform(0.05, 0.3)
    employees = rng.randint(400, 30_000)
    books: dict[int, Lines] = {}
    for year in years:
        lines = {"Revenue": int(revenue)}
        for label, share in shares.items():
            lines[label] = int(revenue * share * rng.uniform(0.9, 1.1)) + 3
        lines["Effective tax rate"] = rng.randint(180, 380)
        lines["State taxes, net"] = rng.randint(5, 35)
        lines["Foreign rate differential"] = lines["Effective tax rate"] - _STATUTORY - lines["State taxes, net"]
        lines["Diluted shares"] = int(stock)
        lines["Basic shares"] = int(stock * rng.uniform(0.96, 0.995))
        lines["Dividends per share"] = max(2, round(100 * lines["Dividends paid"] / lines["Basic shares"]))
        lines["Employees"] = employees
        books[year] = lines
        revenue *= rng.uniform(0.88, 1.24)
        stock *= rng.uniform(0.96, 1.05)
        employees = int(employees * rng.uniform(0.92, 1.12)) + 1
    return books


def restate(lines: Lines, label: str, rng: random.Random) -> Lines:
    """The leaves with another amount for one of them."""
    moved = int(lines[label] * rng.choice((rng.uniform(0.88, 0.97), rng.uniform(1.03, 1.12))))
    return {**lines, label: moved if moved != lines[label] else moved + 7}


def complete(leaves: Lines, cash_before: int) -> Lines:
    """The leaves with all that follows from them."""
    x = dict(leaves)
    x["Gross profit"] = x["Revenue"] - x["Cost of revenue"]
    costs = ("Research and development", "Selling, general and administrative", "Depreciation and amortization")
    x["Total operating expenses"] = sum(x[label] for label in costs)
    x["Operating income"] = x["Gross profit"] - x["Total operating expenses"]
    x["Income before income taxes"] = x["Operating income"] - x["Interest expense"] + x["Other income, net"]
    x["Income tax expense"] = round(x["Income before income taxes"] * x["Effective tax rate"] / 1000)
    x["Net income"] = x["Income before income taxes"] - x["Income tax expense"]
    x["Basic earnings per share"] = round(100 * x["Net income"] / x["Basic shares"])
    x["Diluted earnings per share"] = round(100 * x["Net income"] / x["Diluted shares"])
    current = ("Cash and cash equivalents", "Short-term investments", "Accounts receivable, net", "Inventories")
    x["Total current assets"] = sum(x[k] for k in (*current, "Prepaid expenses and other current assets"))
    fixed = ("Property, plant and equipment, net", "Goodwill", "Intangible assets, net", "Other assets")
    x["Total assets"] = x["Total current assets"] + sum(x[k] for k in fixed)
    owed = ("Accounts payable", "Accrued liabilities", "Current portion of long-term debt")
    x["Total current liabilities"] = sum(x[k] for k in owed)
    later = ("Long-term debt", "Deferred income taxes", "Other liabilities")
    x["Total liabilities"] = x["Total current liabilities"] + sum(x[k] for k in later)
    x["Total shareholders' equity"] = x["Total assets"] - x["Total liabilities"]
    x["Retained earnings"] = x["Total shareholders' equity"] - x["Common stock and additional paid-in capital"]
    x["Total debt"] = x["Long-term debt"] + x["Current portion of long-term debt"]
    for label in _OUTFLOWS:
        x[label] = -x[label]
    inflow = x["Net income"] + x["Depreciation and amortization"] + x["Stock-based compensation"]
    x["Net cash from investing activities"] = x["Capital expenditures"] + x["Acquisitions, net of cash acquired"]
    x["Net cash from financing activities"] = sum(x[k] for k in _FINANCING)
    x["Net change in cash"] = x["Cash and cash equivalents"] - cash_before
    x["Net cash from operating activities"] = (
        x["Net change in cash"] - x["Net cash from investing activities"] - x["Net cash from financing activities"]
    )
    x["Changes in working capital and other"] = x["Net cash from operating activities"] - inflow
    return x


_FINANCING = (
    "Proceeds from issuance of debt",
    "Repayments of debt",
    "Dividends paid",
    "Repurchases of common stock",
)
_OUTFLOWS = ("Capital expenditures", "Acquisitions, net of cash acquired", *_FINANCING[1:])
