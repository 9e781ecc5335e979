"""What came out of each check: a line as it ends, a JSON line in a file, and the table at the end."""
import contextlib
import json
import math
import time
import traceback
from dataclasses import dataclass, field


class Problem(Exception):
    """What a check looked for is not so."""


class Skip(Exception):
    """A check that has no meaning here, and why."""


class OutOfTime(Exception):
    """The budget is spent: the rest of the section is left out."""


@dataclass
class Row:
    section: str
    check: str
    status: str = "ok"
    figures: dict = field(default_factory=dict)
    note: str = ""
    seconds: float = 0.0

    def add(self, **figures):
        self.figures.update(figures)

    def line(self):
        parts = [f"{name} {shown(value)}" for name, value in self.figures.items()]
        return "  ".join(parts + [self.note] if self.note else parts)


def shown(value):
    """A number with as many digits as mean something."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        if value == 0 or 1e-3 <= abs(value) < 1e4:
            return f"{value:.4g}"
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.1e}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def short(text, length):
    text = " ".join(text.split("\n"))
    return text if len(text) <= length else f"{text[:length - 3]}..."


class Report:
    """The rows so far. `path` gets one JSON object a row, at once: a run that is cut short has told what it found."""

    def __init__(self, path):
        self.path, self.rows = path, []

    def add(self, row):
        self.rows.append(row)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(plain(vars(row)), default=str) + "\n")
        print(f"{row.status:4}  {row.section:9} {row.check}: {short(row.line(), 500)}  [{row.seconds:.1f} s]", flush=True)

    @contextlib.contextmanager
    def check(self, section, name):
        """Whatever happens within becomes a row; only the end of the time goes on, to end the section."""
        row, began = Row(section, name), time.monotonic()
        try:
            yield row
        except Problem as problem:
            row.status, row.note = "FAIL", str(problem)
        except Skip as reason:
            row.status, row.note = "skip", str(reason)
        except OutOfTime as reason:
            row.status, row.note = "skip", str(reason) or "the time is over"
            raise
        except KeyboardInterrupt:
            row.status, row.note = "skip", "interrupted"
            raise
        except Exception as error:  # a fault of a check must not cost the checks after it
            where = traceback.extract_tb(error.__traceback__)[-1]
            row.status, row.note = "FAIL", f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
        finally:
            row.seconds += time.monotonic() - began  # to what was spent on it before
            self.add(row)

    def count(self, status):
        return sum(row.status == status for row in self.rows)

    def summary(self):
        return f"{self.count('ok')} ok, {self.count('FAIL')} failed, {self.count('skip')} skipped"

    def table(self):
        """Markdown, its columns aligned; long notes are cut."""
        cells = [("section", "check", "result", "seconds", "figures")]
        for row in self.rows:
            figures = short(row.line(), 240).replace("|", "/")
            cells.append((row.section, row.check, row.status, f"{row.seconds:.1f}", figures))
        widths = [max(len(line[i]) for line in cells) for i in range(4)]
        cells.insert(1, tuple("-" * width for width in widths) + ("---",))
        row = lambda line: "| " + " | ".join([cell.ljust(width) for cell, width in zip(line, widths)] + [line[4]]) + " |"
        return "\n".join(map(row, cells)) + "\n"


def plain(value):
    """JSON has no infinities and no NaN."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
