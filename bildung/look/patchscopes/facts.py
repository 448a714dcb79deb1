"""Facts that a model may know of a name: the capital and the currency of a country, the symbol of an element.

Each relation says where its facts come from, and the prompt that asks for them with {} in the name's place. Whether a
text says an object is decided as in Ghandeharioun et al. 2024, by its occurrence, with one care: an object of one or
two letters (the symbols) must stand alone, in its own case, where the published code would find "H" in any "Hungary".
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bildung.core.errors import SettingsError, nearest
from bildung.data.sources import rows

# What one pays with, by ISO 4217 code; the data has the codes, a model says the word.
UNITS = {
    "dollar": "AUD BBD BMD BND BSD BZD CAD FJD GYD JMD KYD LRD NAD NZD SBD SGD SRD TTD TWD USD XCD HKD ZWL ZWD",
    "euro": "EUR",
    "franc": "BIF CDF CHE CHF DJF GNF KMF RWF XAF XOF XPF",
    "pound": "EGP FKP GBP GIP LBP SDG SHP SSP SYP",
    "peso": "ARS CLF CLP COP CUC CUP DOP MXN PHP UYI UYU",
    "dinar": "BHD DZD IQD JOD KWD LYD RSD TND",
    "krone": "DKK NOK",
    "krona": "ISK SEK",
    "rupee": "INR LKR MUR NPR PKR SCR",
    "shilling": "KES SOS TZS UGX",
    "riyal": "QAR SAR YER",
    "rial": "IRR OMR",
    "dirham": "AED MAD",
    "ruble": "BYN BYR RUB",
    "yen": "JPY",
    "yuan": "CNY",
    "won": "KPW KRW",
    "baht": "THB",
    "real": "BRL",
    "rand": "ZAR",
    "lira": "TRY",
    "shekel": "ILS",
    "zloty": "PLN",
    "koruna": "CZK",
    "forint": "HUF",
    "leu": "MDL RON",
    "lev": "BGN",
    "lek": "ALL",
    "hryvnia": "UAH",
    "tenge": "KZT",
    "som": "KGS UZS",
    "manat": "AZN TMT TMM",
    "rupiah": "IDR",
    "ringgit": "MYR",
    "dong": "VND",
    "kip": "LAK",
    "kyat": "MMK",
    "riel": "KHR",
    "taka": "BDT",
    "afghani": "AFN",
    "naira": "NGN",
    "birr": "ETB",
    "kwacha": "MWK ZMK ZMW",
    "kwanza": "AOA",
    "pula": "BWP",
    "bolivar": "VEF VES",
    "boliviano": "BOB",
    "sol": "PEN",
    "quetzal": "GTQ",
    "lempira": "HNL",
    "colon": "CRC",
    "balboa": "PAB",
    "gourde": "HTG",
    "tugrik": "MNT",
    "lari": "GEL",
    "dram": "AMD",
}
UNIT_OF = {code: unit for unit, codes in UNITS.items() for code in codes.split()}


@dataclass(frozen=True)
class Fact:
    """One pair of names: (France, Paris)."""

    subject: str
    object: str


@dataclass(frozen=True)
class Relation:
    """What is asked. column: of the objects in `data`."""

    data: str
    column: str
    prompt: str  # with {} for the subject


RELATIONS = {
    "capital": Relation("mini:countries", "capital", "The capital of {} is"),
    "currency": Relation("mini:countries", "currency", "The official currency of {}"),
    "symbol": Relation("mini:elements", "symbol", "The chemical symbol of {}"),
}


def relation_of(name: str) -> Relation:
    """Raises SettingsError for a name that is not in RELATIONS."""
    if name not in RELATIONS:
        hint = nearest(name, RELATIONS)
        raise SettingsError(f"there is no relation {name!r}; there are {', '.join(RELATIONS)}. {hint}".strip())
    return RELATIONS[name]


def facts(relation: Relation) -> tuple[list[Fact], int]:
    """(all facts of a relation, how many rows have none). A currency is its unit's word: the dollar of AUD."""
    found, without = [], 0
    for row in rows(relation.data):
        thing = row.get(relation.column)
        if relation.column == "currency":
            thing = UNIT_OF.get(str(thing))
        if isinstance(thing, str) and thing and row.get("name"):
            found.append(Fact(str(row["name"]), thing))
        else:
            without += 1
    return found, without


def says(text: str, thing: str) -> bool:
    """Whether a text says the object: at the beginning of a word in any case; of one or two letters, alone."""
    if len(thing) <= 2:
        return re.search(rf"(?<!\w){re.escape(thing)}(?!\w)", text) is not None
    return re.search(rf"(?<!\w){re.escape(thing)}", text, re.IGNORECASE) is not None
