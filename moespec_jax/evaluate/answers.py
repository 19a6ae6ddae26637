"""Questions whose answers can be checked: by a number, or by running code."""

import functools
import json
import re
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moespec_jax.checkpoint.conversation import Conversation
from moespec_jax.cli.prompts import Prompt, read_turns
from moespec_jax.errors import RequestError
from moespec_jax.evaluate.trial import Trial, complete, passes, read_trial

# Commas separate thousands only in groups of three: `1,2,3` are three numbers. A minus after a word or a number is not
# a sign: `7-3` ends in 3. A digit within a name (`x2`) is not a number.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]])[-\u2212])?[$€£]?(?<!\w)(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?P<part>\.\d+)?"
    r"|(?P<small>(?<![\w.])\.\d+)"
)
_MARK = "####"


@dataclass(frozen=True)
class Question:
    """A question, and the check of its answer: by a number or by a trial.

    Fields:
        prompt: text of the question.
        number: the correct number, if it is checked by a number.
        trial: check of code, if it is checked by running code.
    """

    prompt: str
    number: Decimal | None = None
    trial: Trial | None = None

    def as_prompt(self) -> Prompt:
        """Prompt that asks the question."""
        return Prompt(self.prompt)

    def is_right(self, answer: str) -> bool:
        """Test whether an answer has the correct number, or code that passes."""
        if self.trial is not None:
            return passes(self.trial, complete(self.trial, answer))
        return answered_number(answer) == self.number


@dataclass(frozen=True)
class ConversationQuestion(Question):
    """A question whose prompt is the last message of a conversation."""

    conversation: Conversation | None = None

    def as_prompt(self) -> Prompt:
        """Prompt that asks the question."""
        return Prompt(self.prompt, self.conversation)


def answered_number(text: str) -> Decimal | None:
    """Find the first number after the first `####` (GSM8K's mark), or else the last number of a text; None without any.

    Commas between thousands, currency signs and percent signs are ignored.
    """
    _, _, marked = text.partition(_MARK)
    numbers = [_value(match) for match in _NUMBER.finditer(marked)]
    if numbers:
        return numbers[0]
    numbers = [_value(match) for match in _NUMBER.finditer(text)]
    return numbers[-1] if numbers else None


def read_questions(path: Path, run_code: bool, most: int | None = None) -> tuple[list[Question], dict[str, int]]:
    """Read questions from JSON lines with `turns`, of which the first is the question, or `messages`, and `reference`.

    A question is about code if its prompt contains a function. The code must pass `test` (with `entry_point`) or the
    examples of the prompt, which the reference must pass too.

    Args:
        path: the file.
        run_code: whether code may be run; otherwise questions about code are left out.
        most: number of lines to read; None reads all.

    Returns:
        The questions, and the number of lines that are left out, by reason.

    Raises:
        RequestError: the file cannot be read, has other lines, or has no question whose answer can be checked.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RequestError(f"expected a file of questions at {path}; {reason}") from None
    rows = [_read_row(line, f"line {number} of {path}") for number, line in enumerate(lines, 1) if line.strip()][:most]
    questions: list[Question] = []
    left_out: Counter[str] = Counter()
    for row in tqdm(rows, desc=path.name, unit="question", disable=not run_code, leave=False):
        found = _read_question(row, run_code)
        if isinstance(found, Question):
            questions.append(found)
        else:
            left_out[found] += 1
    if not questions:
        reasons = ", ".join(f"{count}: {reason}" for reason, count in left_out.items()) or "it is empty"
        raise RequestError(f"expected questions whose answers can be checked in {path}; {reasons}")
    return questions, dict(left_out)


def _read_row(line: str, place: str) -> dict[str, Any]:
    try:
        row: dict[str, Any] = json.loads(line)
        reference = row["reference"]
    except (ValueError, KeyError, TypeError, RecursionError):
        row, reference = {}, None
    if isinstance(reference, list):
        reference = reference[0] if reference else None
    if not isinstance(reference, str):
        raise RequestError(f"expected a JSON object with texts 'turns' and 'reference' in {place}")
    return row | {"asked": read_turns(row, place).first(), "reference": reference}


def _read_question(row: dict[str, Any], run_code: bool) -> Question | str:
    """Read a question, or return the reason why it is left out."""
    prompt, test = row["asked"].text, row.get("test")
    kind = Question
    if row["asked"].conversation is not None:
        kind = functools.partial(ConversationQuestion, conversation=row["asked"].conversation)
    if test is None and re.search(r"^(?:async )?def \w+", prompt, re.MULTILINE) is None:
        number = answered_number(row["reference"])
        return "no number in its reference" if number is None else kind(prompt, number=number)
    if not run_code:
        return "code, which is only run with --run-code"
    trial = read_trial(prompt, test, row.get("entry_point"))
    if trial is None:
        return "code without tests"
    if not passes(trial, complete(trial, row["reference"])):
        return "code whose own reference does not pass"
    return kind(prompt, trial=trial)


def _value(match: re.Match[str]) -> Decimal:
    if match["small"] is not None:
        return Decimal(match["small"])
    value = Decimal(match["digits"].replace(",", "") + (match["part"] or ""))
    return -value if match["sign"] else value
