"""Tables that are written once and shown three ways: in the terminal, as Markdown, and on the report's page.

A table is a list of columns and a list of records. What a table of the bench says is in `bench_tables`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich import table as rich_table
from rich.markup import escape

from toruslab.benchmarks.reports.words import milliseconds, percent


@dataclass(frozen=True, kw_only=True)
class Value:
    """The content of one place in a table.

    Args:
        text: what is shown.
        sort: the number that the page sorts by. Values without one sort last.
        mark: how the page shows it: "good", "bad", or "wide" for long text that wraps.
        link: id of the part of the page that the text leads to.
        dots: marks on a strip, as shares of its width; instead of the text.
    """

    text: str = ""
    sort: float | None = None
    mark: str = ""
    link: str = ""
    dots: Sequence[float] = ()


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Args:
        heading: may have several lines.
        value: record -> what is shown. A plain string sorts as text.
        numeric: numbers are aligned to the right.
        only: "text" leaves the column out of the page, "page" leaves it out of terminal and Markdown.
    """

    heading: str
    value: Callable[[Any], Value | str]
    numeric: bool = True
    only: Literal["", "text", "page"] = ""


@dataclass(frozen=True, kw_only=True)
class DataTable:
    """Columns over records; `marked` records are highlighted, `failing` ones stand out as bad in the terminal."""

    title: str
    columns: Sequence[Column]
    records: Sequence[Any]
    marked: Callable[[Any], bool] = lambda record: False
    failing: Callable[[Any], bool] = lambda record: False

    def shown(self, where: Literal["text", "page"]) -> list[Column]:
        """The columns that are shown in text or on the page."""
        return [c for c in self.columns if c.only in ("", where)]

    def values(self, record: Any, where: Literal["text", "page"]) -> list[Value]:
        """One record's values, in the order of `shown`."""
        found = [c.value(record) for c in self.shown(where)]
        return [Value(text=v) if isinstance(v, str) else v for v in found]

    def rich(self, spelled: Callable[[str], str] = str, style: str = "bold green") -> rich_table.Table:
        """The table for the terminal.

        Args:
            spelled: changes the text of every value, for narrow columns.
            style: of marked records.
        """
        table = rich_table.Table(title=escape(self.title) or None, title_justify="left", title_style="bold")
        for column in self.shown("text"):
            justify = "right" if column.numeric else "left"
            table.add_column(escape(column.heading), justify=justify, no_wrap=column.numeric)
        for record in self.records:
            shown = [escape(spelled(v.text)) for v in self.values(record, "text")]
            table.add_row(*shown, style=style if self.marked(record) else "red" if self.failing(record) else None)
        return table

    def markdown(self) -> list[str]:
        """The lines of the table as Markdown."""
        headings = [c.heading.replace("\n(", " (").replace("\n", ", ") for c in self.shown("text")]
        rows = [[v.text.replace("|", "\\|") for v in self.values(record, "text")] for record in self.records]
        return markdown_table(headings, rows)


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table.

    Example:
        >>> markdown_table(["a", "b"], [["1", "2"]])
        ['| a | b |', '|---|---|', '| 1 | 2 |']
    """
    return [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def number(value: float | None, form: str = "{:,.0f}", scale: float = 1.0) -> Value:
    """A number divided by `scale`, as `form` writes it; blank where it is None."""
    return Value(text="" if value is None else form.format(value / scale), sort=value)


def ms(seconds: float | None) -> Value:
    """A time in milliseconds."""
    return Value(text=milliseconds(seconds), sort=seconds)


def share(value: float | None, *, signed: bool = False) -> Value:
    """A share in percent."""
    return Value(text=percent(value, signed=signed), sort=value)


def between(interval: tuple[float, float] | None) -> Value:
    """Two times in milliseconds; sorts by the first."""
    return Value(text=" to ".join(map(milliseconds, interval)), sort=interval[0]) if interval else Value()
