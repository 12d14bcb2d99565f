"""Whisper's basic text normaliser with the rules of spelling that it lacks, one a language or script.

What is written in two ways and read as one compares equal; what is read in two ways does not. As in Whisper's own,
symbols and punctuation part words, words between brackets go, and characters of one look are one (NFKC). Combining
marks stay, since they are the vowel signs of Hindi, Tamil, Thai and many others. Case goes by `lower` and not by
`casefold`, so that "Maße" is not "Masse".
"""

import unicodedata

import regex

EMOJI = regex.compile(r"\p{Extended_Pictographic}")  # as symbols, before NFKC makes letters of some, such as ™ and ℹ
JOINED_LETTERS = {  # letters that some spell with a joiner: Malayalam chillus, Bengali khanda ta, Marathi eyelash ra
    "ണ്\u200d": "ൺ",
    "ന്\u200d": "ൻ",
    "ര്\u200d": "ർ",
    "ല്\u200d": "ൽ",
    "ള്\u200d": "ൾ",
    "ত্\u200d": "ৎ",
    "र्\u200d": "ऱ्",
}
# Joiners, direction marks, soft hyphens, byte-order marks, variation selectors, the frames of keycaps, and the
# Armenian marks of tone, which stand within words: all go, and join what is beside them. So a Persian word is one
# with a non-joiner between its parts or with nothing, but two with a space.
UNREAD = regex.compile(r"[\p{Cf}\p{Default_Ignorable_Code_Point}\p{Me}\u055B\u055C\u055E]")
BRACKETED = regex.compile(r"[<\[][^>\]]*[>\]]|\([^)]+?\)")
# The vowels and signs of recitation that Arabic and Hebrew are seldom written with, and the stroke that widens Arabic
# words. Madda and hamza (U+0653 to U+0655) are parts of letters, and so are the points of Yiddish.
ARABIC_MARKS = regex.compile(
    r"[\u0610-\u061A\u0640\u064B-\u0652\u0656-\u065F\u0670\u06D6-\u06ED\u0897-\u089F\u08CA-\u08FF]"
)
HEBREW_MARKS = regex.compile(r"[\u0591-\u05BD\u05BF\u05C1\u05C2\u05C4\u05C5\u05C7]")
SARA_AM = regex.compile(r"\u0E4D([\u0E48-\u0E4B]?)\u0E32|\u0ECD([\u0EC8-\u0ECB]?)\u0EB2")  # which NFKC takes apart
SPELLINGS = {  # of one letter, for which keyboards or encodings have several
    "ar": {"ٱ": "ا"},  # the wasla is a sign of reading
    "fa": {"ي": "ی", "ى": "ی", "ك": "ک", "ۀ": "ه", "هٔ": "ه"},  # the hamza over heh is a vowel
    "lo": {"ເເ": "ແ"},
    "ml": {"ൻ്റ": "ന്റ", "ൻറ": "ന്റ"},
    "ro": {"ş": "ș", "ţ": "ț"},
    "th": {"เเ": "แ"},
    "ur": {"ي": "ی", "ى": "ی", "ك": "ک", "ه": "ہ", "ۀ": "ۂ", "ۂ": "ۂ"},
    "yi": {"װ": "וו", "ױ": "וי", "ײ": "יי"},
}
DOTLESS = {"az", "tr"}  # languages in which I is the capital of ı, and İ that of i
APOSTROPHE = regex.compile("['’‘‛ʼʻʹʾʿ′`׳]")
# It parts words, as in Whisper's own ("l'été"), but between two letters: in the first of these languages it is a
# letter itself, and in the others (geresh and gershayim) it marks an abbreviation or a foreign sound, and goes.
LETTER_APOSTROPHE = {"be", "br", "ha", "haw", "sn", "so", "sw", "uk", "uz"}
GERESH = {"he", "yi"}
BETWEEN_LETTERS = regex.compile(r"(?<=[\p{L}\p{M}])'(?=\p{L})")
GERESH_BETWEEN_LETTERS = regex.compile(r"""(?<=[\p{L}\p{M}])['"״“”″]+(?=\p{L})""")
SYMBOLS = regex.compile(r"[\p{S}\p{P}]|(?<![\p{L}\p{M}\p{N}])\p{M}+")  # and marks that no letter carries
CHARACTER = regex.compile(r"\X\p{M}*")  # Unicode parts some Burmese vowel signs from their letter


class MultilingualNormaliser:
    """Text of one language (a code) as it is compared; as characters with spaces between them if split_letters."""

    def __init__(self, language: str | None, split_letters: bool = False):
        self.language = language
        self.split_letters = split_letters

    def __call__(self, text: str) -> str:
        text = _replace(EMOJI.sub(" ", text), JOINED_LETTERS)
        text = BRACKETED.sub("", UNREAD.sub("", text))
        text = unicodedata.normalize("NFKC", text.replace("´", "'"))  # of which NFKC makes a space
        text = self._letters(self._lower(APOSTROPHE.sub("'", text)))
        text = SYMBOLS.sub(" ", self._apostrophes(text))
        return " ".join(characters(text)) if self.split_letters else text

    def _lower(self, text: str) -> str:
        """Lower case by the language; the Greek final sigma is a sigma."""
        if self.language in DOTLESS:
            text = text.replace("I", "ı").replace("İ", "i").replace("i\u0307", "i")  # the last is what lower() writes
        return text.lower().replace("ς", "σ")

    def _letters(self, text: str) -> str:
        """One spelling for each letter, without the marks that are signs of reading alone."""
        text = ARABIC_MARKS.sub("", SARA_AM.sub(_sara_am, text))
        text = text if self.language == "yi" else HEBREW_MARKS.sub("", text)
        return _replace(text, SPELLINGS.get(self.language, {}))

    def _apostrophes(self, text: str) -> str:
        """Apostrophes within words: kept as the letter ʼ, or left out; all others are punctuation."""
        if self.language in LETTER_APOSTROPHE:
            return BETWEEN_LETTERS.sub("ʼ", text)
        return GERESH_BETWEEN_LETTERS.sub("", text) if self.language in GERESH else text


def characters(text: str) -> list[str]:
    """The characters of a text as readers count them, letters with their marks, without the white space."""
    return CHARACTER.findall("".join(text.split()))


def _sara_am(match: regex.Match) -> str:
    """The Thai or Lao letter that was taken apart; a tone mark between its halves comes first."""
    thai, lao = match.groups()
    return f"{lao}\u0eb3" if thai is None else f"{thai}\u0e33"


def _replace(text: str, spellings: dict[str, str]) -> str:
    for spelling, letter in spellings.items():
        text = text.replace(spelling, letter)
    return text
