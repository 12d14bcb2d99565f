"""Validation while training: the loss on held-out data and, with generation, its word error rate."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from distil_whisper.checkpoints import student_weights
from distil_whisper.decoding import Decoder
from distil_whisper.examples import Batch, Collator, Example, ExampleMaker, LabelColumns
from distil_whisper.losses import LossWeights
from distil_whisper.metrics import score
from distil_whisper.mixing import Share, batched, workers
from distil_whisper.normalisation import Normaliser
from distil_whisper.progress import bar
from distil_whisper.reading import Source
from distil_whisper.tokens import plain_text
from distil_whisper.trackers import TABLE_ROWS


@dataclass(frozen=True)
class ValidationSet:
    """One held-out dataset: its transcripts, normalised, are what the student is measured against."""

    name: str
    source: Source
    columns: LabelColumns
    normaliser: Normaliser

    @cached_property
    def identity(self) -> str:
        """What its figures depend on beside the student: the data, and how references are read."""
        contents = [self.source.contents(unit.index) for unit in self.source.units]
        return repr((self.name, contents, self.columns, self.normaliser.name))


@dataclass(frozen=True)
class Reference:
    """What is known of a row: its transcript, and the language and task that the student is told."""

    row_id: str
    text: str
    language: str | None
    task: str | None


@dataclass
class Validation:
    """What a validation found: figures by name, of how many rows they are, and per dataset some rows of id, reference
    and prediction."""

    values: dict[str, float] = field(default_factory=dict)
    rows: int = 0
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class ValidationBatches(IterableDataset):
    """The batches of a held-out dataset for one process, in order: every process has as many as every other."""

    def __init__(self, held_out: ValidationSet, maker: ExampleMaker, collator: Collator, share: Share):
        self.held_out = held_out
        self.maker = maker
        self.collator = collator
        self.share = share

    def __iter__(self) -> Iterator[tuple[Batch, list[Reference]]]:
        info = get_worker_info()
        count, mine = (info.num_workers, info.id) if info else (1, 0)
        size = self.share.batch_size * self.share.processes
        for number, rows in enumerate(batched(self._rows(), size)):
            if number % count == mine:
                yield self._batch(*self.share.of(list(rows)))

    def _rows(self) -> Iterator[tuple[str, dict]]:
        source = self.held_out.source
        for unit in range(len(source.units)):
            for number, row in enumerate(source.rows(unit)):
                yield source.row_id(unit, number), row

    def _batch(self, rows: list[tuple[str, dict]], counts: bool) -> tuple[Batch, list[Reference]]:
        """A batch, and the reference of each of its examples."""
        columns, labeller = self.held_out.columns, self.maker.labeller
        examples = [self.maker(row, columns, row_id, 0) if counts else Example(row_id) for row_id, row in rows]
        references = [
            Reference(row_id, row[columns.text] or "", labeller.language(row, columns), labeller.task(row, columns))
            for (row_id, row), example in zip(rows, examples, strict=True)
            if example.sequence is not None
        ]
        return self.collator(examples), references


class Validator:
    """Measures a student on held-out datasets. Rows that cannot be used (unreadable, longer than the window) are
    counted and left out; no set is filtered by the length of its labels.

    sharded: the decoder's model is a whole copy of a student whose weights are spread over the processes.
    """

    def __init__(
        self,
        sets: list[ValidationSet],
        accelerator: Accelerator,
        maker: ExampleMaker,
        collator: Collator,
        batch_size: int,
        num_workers: int,
        decoder: Decoder | None,
        sharded: bool = False,
    ):
        self.sets = sets
        self.accelerator = accelerator
        self.maker = maker
        self.collator = collator
        self.share = Share(accelerator.process_index, accelerator.num_processes, batch_size)
        self.num_workers = num_workers
        self.decoder = decoder
        self.sharded = sharded

    @torch.no_grad()
    def __call__(self, model: torch.nn.Module, weights: LossWeights) -> Validation:
        """Figures of every set as `eval/<name>/...`, and their means `eval/wer` and `eval/loss`. A set of which no row
        can be used has none, and there are no means then."""
        model.eval()
        if self.sharded and self.decoder is not None:
            self.decoder.model.load_state_dict(student_weights(model, everywhere=True))
        result = Validation()
        for held_out in self.sets:
            self._measure(held_out, model, weights, result)
        for figure in ("wer", "loss"):
            found = [
                result.values[f"eval/{s.name}/{figure}"]
                for s in self.sets
                if f"eval/{s.name}/{figure}" in result.values
            ]
            if len(found) == len(self.sets):
                result.values[f"eval/{figure}"] = sum(found) / len(found)
        model.train()
        return result

    def measure(self, weights: LossWeights, teacher: str | None) -> dict[str, Any]:
        """What the figure that tells the best student measures: its name, the sets, and a digest of their data and of
        the settings. Figures of the same measure can be compared, if they are of as many rows."""
        figure, settings = "eval/loss", (weights, teacher)
        if self.decoder is not None:
            figure, settings = "eval/wer", (self.decoder.num_beams, self.decoder.max_label_length)
        told = repr((settings, [held_out.identity for held_out in self.sets]))
        digest = hashlib.blake2b(told.encode(), digest_size=8).hexdigest()
        return {"figure": figure, "sets": [held_out.name for held_out in self.sets], "settings": digest}

    def unmeasured(self, values: dict[str, float]) -> list[str]:
        """The sets that have no figures, by name."""
        return [held_out.name for held_out in self.sets if f"eval/{held_out.name}/loss" not in values]

    def _measure(self, held_out, model, weights, result: Validation) -> None:
        loader = DataLoader(
            ValidationBatches(held_out, self.maker, self.collator, self.share),
            batch_size=None,
            **workers(self.num_workers),
        )
        sums = torch.zeros(4, dtype=torch.float64)
        problems, spoken = [], []
        for batch, references in bar(loader, desc=f"evaluating {held_out.name}", unit="batch", leave=False):
            with self.accelerator.autocast():
                losses = model(**batch.inputs(self.accelerator.device))
            found = [losses[name].detach().double().cpu() for name in ("ce", "kl", "tokens")]
            sums += torch.stack([*found, torch.tensor(float(len(references)))])
            problems += batch.problems
            if self.decoder is not None:
                spoken += self._transcribe(batch.waveforms, references, problems)
        self._record(held_out, sums, gather_object(problems), gather_object(spoken), weights, result)

    def _transcribe(
        self, waveforms: torch.Tensor, references: list[Reference], problems: list[tuple[str, str]]
    ) -> list[tuple[str, str, str, str]]:
        """(row id, reference, prediction, language of both) of each row of a batch, but for those that go to the
        problems; a call of the decoder has one language and task."""
        kinds = [(reference.language, reference.task) for reference in references]
        spoken = []
        for kind in dict.fromkeys(kinds):
            chosen = [index for index, other in enumerate(kinds) if other == kind]
            with self.accelerator.autocast():
                decoded = self.decoder(waveforms[chosen], *kind)
            for index, row in zip(chosen, decoded, strict=True):
                if row.problem is not None:
                    problems.append((references[index].row_id, row.problem))
                    continue
                text = plain_text(self.decoder.grammar.decode(row.ids))
                language = "en" if kind[1] == "translate" else kind[0]
                spoken.append((references[index].row_id, references[index].text, text, language))
        return spoken

    def _record(self, held_out, sums, problems, spoken, weights, result: Validation) -> None:
        name = held_out.name
        ce, kl, tokens, rows = self.accelerator.reduce(sums.to(self.accelerator.device), "sum").tolist()
        result.rows += int(rows)
        if rows:
            loss = (weights.ce * ce + weights.kl * weights.temperature**2 * kl) / tokens
            found = {"loss": loss, "ce": ce / tokens, "kl": kl / tokens}
            result.values |= {f"eval/{name}/{figure}": value for figure, value in found.items()}
        if problems:
            row_id, reason = problems[0]
            result.notes.append(f"{name}: {len(problems)} rows left out of the evaluation, such as {row_id}: {reason}")
        if spoken:
            spoken.sort()
            scores = score([row[2] for row in spoken], [row[1] for row in spoken], held_out.normaliser)
            result.values |= {
                f"eval/{name}/{figure}": scores[figure] for figure in ("wer", "cer", "wer_ortho", "cer_ortho")
            }
            result.tables[name] = [list(row[:3]) for row in spoken[:TABLE_ROWS]]
            if len(languages := {row[3] for row in spoken}) > 1:
                result.notes.append(
                    f"{name}: its rows are in several languages ({', '.join(sorted(languages))}), and all were "
                    "normalised by the rules of one; give each language as a dataset of its own"
                )
