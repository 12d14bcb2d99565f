"""Text normalisation before errors are counted, named in every result so that figures can be compared."""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from distil_whisper.errors import UserError, nearest
from distil_whisper.multilingual import MultilingualNormaliser, characters
from distil_whisper.tokens import SPACELESS_LANGUAGES

# Stored error rates are trusted by these names: changed rules get another one. "basic_keep_marks" was the default
# outside English before "multilingual".
NORMALISERS = ("english", "multilingual", "basic", "basic_keep_marks")
DEFAULT = "multilingual"  # outside English


@dataclass(frozen=True)
class Normaliser:
    """A text normaliser and its name. Words are separated by single spaces, none at the ends.

    Where the language is written without spaces (`spaceless`), every character, a letter with its marks, is a word of
    its own, as in openai/whisper, so that word errors are character errors.
    """

    name: str
    spaceless: bool
    function: Callable[[str], str]

    def __call__(self, text: str) -> str:
        return " ".join(self.function(text).split())

    def characters(self, normalised: str) -> list[str]:
        """What CER counts of a normalised text: its code points, single spaces among them, as jiwer does; where the
        language is written without spaces, what normalisation has parted by spaces."""
        return normalised.split() if self.spaceless else list(normalised)


def normaliser(name: str | None, language: str | None, tokenizer) -> Normaliser:
    """The normaliser of that name; without one, `english` for English and DEFAULT for other languages.

    language is a code, None for an English-only model. tokenizer gives the English spellings (none if it has none).
    Raises UserError for an unknown name.
    """
    name = name or ("english" if language in (None, "en") else DEFAULT)
    if name not in NORMALISERS:
        raise UserError(f"there is no text normaliser {name!r} {nearest(name, NORMALISERS)}")
    spaceless = is_spaceless(language)
    if name == "english":
        english = EnglishTextNormalizer(tokenizer.english_spelling_normalizer or {})
        return Normaliser(name, spaceless, partial(_by_character, english) if spaceless else english)
    if name == "multilingual":
        return Normaliser(name, spaceless, MultilingualNormaliser(language, split_letters=spaceless))
    basic = BasicTextNormalizer(split_letters=spaceless)
    if name == "basic_keep_marks":
        basic.clean = remove_symbols_but_marks
    return Normaliser(name, spaceless, basic)


class Normalisers:
    """The normaliser of each language, as `normaliser` chooses it, made once."""

    def __init__(self, name: str | None, tokenizer):
        self.name = name
        self.tokenizer = tokenizer
        self._made: dict[str | None, Normaliser] = {}
        self("en")  # an unknown name is refused now

    def __call__(self, language: str | None) -> Normaliser:
        if language not in self._made:
            self._made[language] = normaliser(self.name, language, self.tokenizer)
        return self._made[language]


def _by_character(rewrite: Callable[[str], str], text: str) -> str:
    return " ".join(characters(rewrite(text)))


def is_spaceless(language: str | None) -> bool:
    """Whether a language (a code) is written without spaces, so that characters are counted in place of words."""
    return language in SPACELESS_LANGUAGES


def remove_symbols_but_marks(text: str) -> str:
    """Whisper's basic cleaning, with combining marks kept: they are the vowel signs of Hindi, Tamil, Thai and others.

    A mark that no letter carries (what is left of an emoji) goes with the symbols.
    """
    cleaned: list[str] = []
    for character in unicodedata.normalize("NFKC", text):
        category = unicodedata.category(character)[0]
        carried = category == "M" and cleaned and not cleaned[-1].isspace()
        cleaned.append(character if carried or category not in "MSP" else " ")
    return "".join(cleaned)
