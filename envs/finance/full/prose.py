"""What stands between the tables of a report: paragraphs that real reports have, without figures that are asked for."""

from __future__ import annotations

BUSINESS = (
    "{name} develops, makes and sells products and services of the {sector} industry. Our customers are "
    "businesses, public bodies and private households; no single customer accounted for more than a tenth of our "
    "revenue.",
    "We compete on price, quality, delivery and service. Several of our competitors are larger than we are and "
    "have greater means; others serve a single region, and know it better than we do.",
    "Our products are sold directly, through distributors and, to a growing extent, over the internet. Demand "
    "follows the economy of the countries in which we sell, and is somewhat stronger in the second half of the "
    "year.",
    "We hold patents, trademarks and licences that we consider valuable, but no part of our business depends on "
    "any one of them. Raw materials and purchased parts come from several suppliers, and have been available as "
    "needed.",
    "Compliance with laws on the protection of the environment has had no material effect on our capital "
    "expenditures, earnings or competitive position.",
)
RISKS = (
    "Our results may suffer from weaker demand. Customers delay or cancel orders when the economy slows, and our "
    "costs do not fall as fast as our sales do. In earlier recessions prices have fallen together with volumes.",
    "Prices of raw materials, energy and freight move considerably. We can't always pass higher costs on to "
    "customers, and contracts at fixed prices may turn out to be unprofitable.",
    "A material part of our revenue is earned in other currencies. A stronger dollar reduces what we report, and "
    "our hedges cover a part of that exposure only and for a limited time.",
    "We have grown by acquisitions and may do so again. An acquired business may not earn what we expect, its "
    "integration may take longer, and goodwill may have to be written down.",
    "Our debt limits what we can spend on other purposes. Credit agreements contain covenants; a breach of one of"
    " them would allow the lenders to demand repayment at once.",
    "Failures of our information systems, or attacks on them, may interrupt our business, expose data of "
    "customers and employees, and lead to claims and fines.",
    "Laws and taxes change. Higher rates, new duties or the loss of an incentive in one of the countries where we"
    " work may raise our effective rate of tax.",
    "We depend on people with skills that are in demand everywhere. If we can't hire and keep them, our products "
    "will be late and our customers will notice.",
    "Proceedings against us may end otherwise than we expect. We record a liability when a loss is probable and "
    "can be estimated; the amounts finally paid may be higher.",
    "A natural disaster, an epidemic or political unrest may close one of our sites or those of a supplier, and "
    "our insurance may not cover the damage in full.",
)
POLICIES = (
    "Basis of presentation. The consolidated statements include the accounts of {name} and its subsidiaries. "
    "Transactions and balances between them have been eliminated. Our fiscal year ends on December 31.",
    "Use of estimates. The statements rest on estimates and assumptions about matters that are uncertain when the"
    " statements are prepared. Actual results may differ from these estimates.",
    "Revenue is recognized when goods are delivered or services performed, the price is fixed and collection is "
    "reasonably assured. Amounts invoiced in advance are deferred.",
    "Inventories are stated at the lower of cost and market. Cost is determined by the first-in, first-out "
    "method. Slow stock is written down according to its age and expected use.",
    "Property, plant and equipment are stated at cost and depreciated on a straight line over their useful lives:"
    " buildings over up to 40 years, machinery over 3 to 15 years.",
    "Goodwill is not amortized but tested for impairment each year in the fourth quarter, and whenever events "
    "suggest that the carrying amount of a reporting unit exceeds its fair value.",
    "Income taxes are accounted for by the liability method. A valuation allowance is recorded where deferred tax"
    " assets are more likely than not to remain unused.",
    "Derivatives are recorded at fair value. Changes in the value of cash flow hedges are held in other "
    "comprehensive income until the hedged item affects earnings.",
)
UP = (
    "{line} rose in {year}. Volumes grew in most of our markets, prices were raised twice, and the businesses "
    "acquired in {before} were included for the full year for the first time.",
    "{line} was higher than in {before}, mainly because of new products and a better mix. Currency movements took"
    " away a part of the growth.",
)
DOWN = (
    "{line} fell in {year}. Demand was weak in the second half, several customers reduced their stocks, and a "
    "product line was discontinued.",
    "{line} was lower than in {before}, a consequence of lower prices and of a stronger dollar, which higher "
    "volumes did not make up for.",
)
SEGMENTS = (
    ("Consumer", "Commercial", "Government"),
    ("Industrial Products", "Aftermarket", "Systems"),
    ("Branded", "Private Label", "Food Service"),
    ("Wholesale", "Retail", "Licensing"),
    ("Equipment", "Services", "Supplies"),
)
REGIONS = ("the United States", "Europe", "Asia Pacific", "the rest of the world")
