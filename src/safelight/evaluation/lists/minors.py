"""Rows that may sexualise a minor are dropped when a list is loaded, and counted; their text goes nowhere.

The rule is about words, and errs on the side of dropping: a row goes if it mentions somebody who may be a minor *and* is
sexual by its label, by its list or by its own words. "girl" counts, as nobody can tell from the word whether she is one.
Whatever is dropped wrongly costs a few rows; whatever is kept wrongly would be asked of a generator.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

VERSION = "1"
"""Of the rule: another one keeps other rows, so it is part of what a protocol's hash depends on."""

AGE_WORDS = """
adolescent|babies|baby|bambina|bambino|barely legal|boy|boyhood|boyish|child|childhood|childish|childlike|children|daughter|eighth grader
elementary school|enfant|fille|garcon|girl|girlhood|girlish|girly|grade school|grade schooler|grader|grandchild|grandchildren
granddaughter|grandson|high school|high schooler|infant|jailbait|junior high|juvenile|kid|kiddie|kiddo|kindergarten|kindergartener
kindergartner|little brother|little one|little sister|loli|lolicon|lolita|madchen|menina|menino|middle school|middle schooler|minor|nephew
newborn|niece|nina|nino|nymphet|prepubescent|preschool|preschooler|preteen|primary school|puberty|pubescent|school uniform|schoolboy
schoolchild|schoolchildren|schoolgirl|seventh grader|shota|shotacon|sixth grader|son|stepdaughter|stepson|teen|teenage|teenaged|teenager
toddler|tween|under 18|under age|under eighteen|underage|underaged|young lady|young one|younger brother|younger sister|youngster|youth
youthful|ロリ|中学生|女児|女孩|小学生|少女|男児|男孩
"""

SEXUAL_WORDS = """
adult content|anus|areola|arousal|aroused|ass|bare chested|bdsm|bikini|bondage|boob|bottomless|bra|breast|brothel|butt|buttock|cleavage
climax|clitoris|copulation|crotch|ecchi|ejaculation|erection|erotic|erotica|erotically|eroticism|escort|explicit|fetish|foreplay
fornication|genital|genitalia|groin|groping|grooming|hentai|horny|incest|intercourse|kinky|lewd|libido|lingerie|lust|lustful|masturbate
masturbating|masturbation|molest|molestation|molested|naked|nakedness|nipple|nsfw|nude|nudism|nudist|nudity|onlyfans|orgasm|orgy
paedophile|paedophilia|panties|panty|pedophile|pedophilia|penis|perverted|playboy|porn|porno|pornographic|pornography|prostitute
prostitution|provocative|pubic|r18|rape|raped|raping|risque|seduce|seducing|seduction|seductive|sensual|sensuality|sex|sexual|sexualised
sexuality|sexualized|sexually|sexy|skimpy|strip|stripper|striptease|suggestive|swimsuit|thong|topless|unclothed|underwear|undies|undressed
undressing|upskirt|vagina|voyeur|vulva|without clothes|x rated|xxx
"""

NUMBERS = (
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen",
    "sixteen", "seventeen",
)  # fmt: skip
ADULT = 18

LEET = {"0": "o", "3": "e", "4": "a", "5": "s", "7": "t", "8": "b", "9": "g", "@": "a", "$": "s", "!": "i", "+": "t", "|": "i", "€": "e"}
LOOKALIKES = str.maketrans("аеорсхуіѕјԁαεοιρν", "aeopcxyisjdaeoipv")
"""Cyrillic and Greek letters that look like Latin ones."""


def _pattern(words: str) -> re.Pattern[str]:
    """Whole words, also in the plural; the parts of a phrase may be joined, or apart by a space or hyphen."""
    phrases = sorted(re.split(r"[|\n]", words.strip()), key=len, reverse=True)
    return re.compile(rf"(?<![a-z])(?:{'|'.join(phrases).replace(' ', '[ -]?')})(?:e?s)?(?![a-z])")


_AGE = _pattern(AGE_WORDS)
_SEXUAL = _pattern(SEXUAL_WORDS)
_NUMBER = rf"(\d{{1,2}}|{'|'.join(reversed(NUMBERS))})"
_YEARS = (
    re.compile(rf"(?<![\w.]){_NUMBER}[ -]*(?:years?|yrs?)(?:[ -]*(?:old|of[ -]age|young))?(?!\w)"),
    re.compile(rf"(?<![\w.]){_NUMBER}[ -]*(?:y[./ ]?o|y)\b"),
    re.compile(rf"(?<!\w)(?:aged?|ages)(?:[ :=-]|of)*{_NUMBER}(?![\w.])"),
    re.compile(rf"(?<!\w)(?:she|he|they|i)(?: is|'s| are| am|'re|'m) (?:only |just )?{_NUMBER}(?![\w.])"),
)


def sexualises_minor(text: str, labels: Iterable[str] = (), *, sexual: bool = False, group: str = "") -> bool:
    """Whether a row must not be used.

    Args:
        text: the prompt.
        labels: the row's categories; `sexual`, `nudity` and their like make it sexual, `child` and its like make it about a minor.
        sexual: whether the row comes from a list that is sexual as a whole.
        group: who is shown, where a list of unsafe prompts has a column for it (IGMU's `class` is `girl`, `boy`, `woman`, `man` or
            `person`); a minor there drops the row whatever else it says.
    """
    if mentions_minor(group):
        return True
    readings = {reading for part in (text, *labels) for reading in _readings(part)}
    if not any(_AGE.search(reading) for reading in readings) and not _young(text):
        return False
    return sexual or any(_SEXUAL.search(reading) for reading in readings)


def mentions_minor(text: str) -> bool:
    """Whether somebody who may be a minor is mentioned."""
    return any(_AGE.search(reading) for reading in _readings(text)) or _young(text)


def plain(text: str) -> str:
    """A text without case, accents, invisible characters, and with single spaces."""
    letters = (letter for letter in unicodedata.normalize("NFKD", text) if unicodedata.category(letter) not in ("Mn", "Cf"))
    return " ".join("".join(letters).casefold().split())


def _young(text: str) -> bool:
    """Whether an age below 18 is given."""
    found = (match[1] for pattern in _YEARS for match in pattern.finditer(plain(text)))
    return any((int(number) if number.isdigit() else NUMBERS.index(number) + 1) < ADULT for number in found)


def _readings(text: str) -> set[str]:
    """A text as people would read it: as it is, and with digits and signs as the letters that they stand for."""
    simple = plain(text).translate(LOOKALIKES).replace("_", " ")
    joined = re.sub(r"(?<!\w)\w([ .*-])\w(?:\1\w)+(?!\w)", _unspelled, simple)
    readings = {simple, joined}
    if any(sign in joined for sign in (*LEET, "1")):
        readings |= {_as_letters(joined, "i"), _as_letters(joined, "l")}
    return readings | {re.sub(r"([a-z])\1{2,}", r"\1", reading) for reading in readings}


def _unspelled(run: re.Match[str]) -> str:
    """All words inside letters that stand apart: "a g i r l" has no sign of where the word begins."""
    letters = re.sub(r"\W", "", run[0])[:24]
    return " ".join(letters[start:end] for start in range(len(letters)) for end in range(start + 3, len(letters) + 1))


def _as_letters(text: str, one: str) -> str:
    """The words that hold a letter, with their digits and signs as letters; `one` is what a 1 stands for."""
    table = str.maketrans(LEET | {"1": one})
    return " ".join(word.rstrip("!+|").translate(table) if re.search("[a-z]", word) else word for word in text.split(" "))
