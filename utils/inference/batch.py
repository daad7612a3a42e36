"""Answering the rows of a file: broken rows are reported beside the answers, an interrupted run goes on."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.checkpoints.files import atomic_file, json_bytes
from utils.data.encode import DataReport, note_ignored
from utils.data.lines import RowFault, naming, read_lines, writable
from utils.data.rows import to_row
from utils.errors import UserError, notice
from utils.inference.journal import Answers, Journal
from utils.inference.loading import Prepared
from utils.inference.sampling import SamplingOptions
from utils.parallel.process_group import ProcessGroup
from utils.paths import is_stream

if TYPE_CHECKING:
    from utils.inference.generator import Completion, Generator, Speed

SHOWN_FAULTS = 5


@dataclass
class Question:
    """One row of the input.

    Attributes:
        src, tgt: as they stand in the row, or read from its messages; None where there is none.
        place: file and line.
        ids: the prompt, unless the row is broken.
        was_cut: whether the prompt was longer than src_length.
        error: what is wrong with the row.
        note: what the user should know about the prompt.
    """

    src: Any
    tgt: Any
    place: str
    ids: list[int] | None = None
    was_cut: bool = False
    error: str | None = None
    note: str | None = None


def read_questions(file: Path, prepared: Prepared, src_length: int) -> list[Question]:
    """Every row of a file with its prompt, or with what is wrong with it.

    Raises:
        UserError: the file cannot be read, or has no row that can be answered.
    """
    questions, report = [], DataReport()
    for line in read_lines(file):
        raw = line.value if isinstance(line.value, dict) else {}
        question = Question(writable(raw.get("src")), writable(raw.get("tgt")), f"{file} line {line.number}")
        try:
            with naming(question.place):
                row = to_row(line, file, require_answer=False)
                if "src" not in raw:
                    asked = [message["content"] for message in row.question if message["role"] == "user"]
                    question.src = asked[0] if len(asked) == 1 else asked
                    question.tgt = row.answer
                question.ids, question.was_cut = prepared.encode(row.question, src_length, row.tools)
                note_ignored(replace(row, messages=row.question), prepared.tokenizer, prepared.template, report)
                if not question.ids:
                    raise RowFault("the prompt is empty")
        except UserError as fault:
            question.error = str(fault)
        questions.append(question)
    if not any(question.ids for question in questions):
        faults = [str(question.error) for question in questions[:SHOWN_FAULTS]]
        if len(questions) > SHOWN_FAULTS:
            faults.append(f"{file}: none of its {len(questions)} rows can be answered")
        raise UserError(faults or f'{file}: empty; expected one JSON object per line, such as {{"src": "..."}}')
    for remark in report.remarks():
        notice(remark)
    return questions


def run_key(prepared: Prepared, questions: Sequence[Question], options: SamplingOptions) -> str:
    """Identity of a run: whatever decides its answers. The batch size and guesses do not."""
    lora = prepared.lora.folder if prepared.lora else None
    adapters = [folder for folder in (lora, prepared.prefix) if folder is not None]
    files = [*prepared.checkpoint.files, *(path for folder in adapters for path in sorted(folder.iterdir()))]
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    facts = [
        states,
        prepared.dtype,
        prepared.tokenizer.fingerprint(),
        prepared.template.fingerprint(),
        repr(replace(options, prompt_lookup_num_tokens=0)),
        [(question.ids, question.src, question.tgt) for question in questions],
    ]
    return hashlib.sha256(json_bytes(facts)).hexdigest()


def answer_file(
    data_file: Path,
    output_file: Path,
    prepared: Prepared,
    load: Callable[[], Generator],
    options: SamplingOptions,
    *,
    src_length: int,
    batch_size: int,
    resume: bool,
) -> Speed | None:
    """Answers every row of `data_file` and writes them to `output_file` in the same order, at once.

    Output rows are {"src", "tgt", "output"}; for a row that could not be answered output is null and
    "error" says why; "note" says that a prompt or an answer was cut. While the run lasts, answers are
    kept in `output_file` + ".partial"; an interrupted run of the same inputs and arguments continues
    from there.

    Args:
        load: gives the generator; called only if there is anything left to answer.

    Returns:
        Figures of speed; None if nothing was left to answer.

    Raises:
        UserError: no row could be answered, or another run is writing `output_file`.
    """
    questions = read_questions(data_file, prepared, src_length)
    for question in questions:
        if question.was_cut:
            question.note = f"the prompt was cut to src_length {src_length} tokens"
    cut = [question.place for question in questions if question.was_cut]
    if cut:
        notice(
            f"{len(cut)} of {len(questions)} prompts were cut to src_length {src_length} tokens (the head stays), "
            f"first {cut[0]}; their rows have a note in {output_file}"
        )
    drawn = {"seed": secrets.randbits(32) if options.seed is None else options.seed}
    journal = _journal(output_file, run_key(prepared, questions, options), drawn, resume, prepared.processes)
    finished = False
    try:
        if journal.other_run:
            notice(f"{journal.path} is of a run with other inputs or arguments; starting anew")
        if journal.answers:
            notice(f"continuing after {len(journal.answers)} of {len(questions)} rows ({journal.path})")
        speed = _answer_missing(questions, journal, load, options, batch_size)
        if prepared.processes.first:
            _write(output_file, questions, journal.answers)
        finished = True
    finally:
        journal.close(remove=finished)
    _report(questions, journal.answers, output_file)
    return speed


def _journal(output_file: Path, key: str, facts: dict[str, Any], resume: bool, processes: ProcessGroup) -> Answers:
    """The journal of a run. Of several processes the first has it; the others have the same answers in memory.

    So have all of them where the output goes into a device or a pipe, beside which nothing can be kept.
    """
    kept: list[Journal] = []

    def opened() -> tuple[list[tuple[int, dict[str, Any]]], dict[str, Any]]:
        if is_stream(output_file):
            return [], facts
        kept.append(Journal(output_file, key, facts, resume=resume))
        return list(kept[0].answers.items()), kept[0].facts

    answers, known = processes.from_first(opened, "waiting for the answers of an earlier run")
    return kept[0] if kept else Answers(output_file, dict(answers), known)


def _write(output_file: Path, questions: Sequence[Question], answers: dict[int, dict[str, Any]]) -> None:
    with atomic_file(output_file) as file:
        for number, question in enumerate(questions):
            answer = answers.get(number, {"output": None, "error": question.error})
            row = {"src": question.src, "tgt": question.tgt, **answer}
            remarks = [remark for remark in (question.note, answer.get("note")) if remark]
            if remarks:
                row["note"] = "; ".join(remarks)
            file.write(json_bytes(row) + b"\n")


def _answer_missing(
    questions: Sequence[Question],
    journal: Answers,
    load: Callable[[], Generator],
    options: SamplingOptions,
    batch_size: int,
) -> Speed | None:
    """Generates and records every answer that the journal does not have yet."""
    from tqdm import tqdm

    missing = [n for n, question in enumerate(questions) if question.ids and n not in journal.answers]
    if not missing:
        return None
    generator = load()
    notes = []
    seeded = replace(options, seed=journal.facts["seed"])
    total = len(missing) + len(journal.answers)
    with tqdm(total=total, initial=len(journal.answers), desc="answers", unit="row", disable=None) as bar:

        def record(index: int, completion: Completion) -> None:
            answer: dict[str, Any] = {"output": completion.text}
            if completion.error is not None:
                answer = {"output": None, "error": f"{questions[missing[index]].place}: {completion.error}"}
            if completion.note is not None:
                answer["note"] = completion.note
                notes.append(f"{questions[missing[index]].place}: {completion.note}")
            journal.record(missing[index], answer)
            bar.update()

        prompts = [questions[number].ids or [] for number in missing]
        generator.generate(prompts, seeded, batch_size, on_row=record, numbers=missing)
    if notes:
        more = f" (and {len(notes) - 1} more rows)" if len(notes) > 1 else ""
        notice(f"{notes[0]}{more}")
    return generator.speed


def _report(questions: Sequence[Question], answers: dict[int, dict[str, Any]], output_file: Path) -> None:
    errors = [
        error
        for number, question in enumerate(questions)
        if (error := answers.get(number, {"error": question.error}).get("error"))
    ]
    for error in errors[:SHOWN_FAULTS]:
        notice(error)
    if len(errors) == len(questions):
        raise UserError(f"none of {len(questions)} rows could be answered; their errors stand in {output_file}")
    if errors:
        notice(f"{len(errors)} of {len(questions)} rows have no answer; their error stands in {output_file}")
