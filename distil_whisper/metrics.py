"""Error rates of a corpus, by an evaluate metric over jiwer.

Nothing here needs a network. Rates are in percent. A reference without words (a pause, or a text that normalisation
empties) adds no words to divide by, but every word of its hypothesis is an insertion; such rows are counted. If no
row has a word, every insertion is 100.
"""

from collections.abc import Callable, Sequence

import datasets
import evaluate
import jiwer

from distil_whisper.alignment import percent
from distil_whisper.multilingual import characters
from distil_whisper.normalisation import Normaliser

RATES = ("wer", "cer", "wer_ortho", "cer_ortho")  # what `score` gives in percent


class ErrorRates(evaluate.Metric):
    """Word and character error rates of a corpus: total errors over total words (characters), not a mean of rates."""

    def __init__(self):
        super().__init__(keep_in_memory=True)

    def _info(self):
        texts = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description=type(self).__doc__, citation="", features=texts)

    def _compute(self, predictions: list[str], references: list[str]) -> dict:
        if not references:
            return {"wer": None, "cer": None, "errors": 0, "reference_words": 0, "empty_references": 0}
        words = jiwer.process_words(references, predictions)
        errors, reference_words = _totals(words)
        return {
            "wer": percent(errors, reference_words),
            "cer": percent(*_totals(jiwer.process_characters(references, predictions))),
            "errors": errors,
            "substitutions": words.substitutions,
            "deletions": words.deletions,
            "insertions": words.insertions,
            "reference_words": reference_words,
            "empty_references": sum(not text for text in words.references),
        }


def score(predictions: Sequence[str], references: Sequence[str], normaliser: Normaliser) -> dict:
    """WER and CER of a corpus, normalised (`wer`, `cer`, the counts) and as written (`wer_ortho`, `cer_ortho`).

    `wer_ortho` and `cer_ortho` compare the texts with white space made single. In languages written without spaces
    both `cer` count letters with their marks, and no spaces; elsewhere code points, and spaces. `headline` names the
    rate to quote: `cer` for languages written without spaces. Rates are None for no rows.
    """
    written = _rates(lambda text: " ".join(text.split()), predictions, references)
    normalised = _rates(normaliser, predictions, references)
    if normaliser.spaceless:  # there a normalised text has its characters for words
        normalised["cer"] = normalised["wer"]
        written["cer"] = _rates(lambda text: " ".join(characters(text)), predictions, references)["wer"]
    return {
        "rows": len(references),
        **normalised,
        "wer_ortho": written["wer"],
        "cer_ortho": written["cer"],
        "normalizer": normaliser.name,
        "headline": "cer" if normaliser.spaceless else "wer",
    }


def _rates(rewrite: Callable[[str], str], predictions: Sequence[str], references: Sequence[str]) -> dict:
    """The error rates of rewritten texts."""
    return ErrorRates().compute(predictions=list(map(rewrite, predictions)), references=list(map(rewrite, references)))


def _totals(output: jiwer.WordOutput | jiwer.CharacterOutput) -> tuple[int, int]:
    """Errors, and units of the references."""
    errors = output.substitutions + output.deletions + output.insertions
    return errors, output.hits + output.substitutions + output.deletions
