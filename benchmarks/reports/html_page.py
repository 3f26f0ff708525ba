"""Plain pieces of a self-contained HTML page: its frame, tables that sort, and inlined pictures.

Knows nothing of rows or benchmarks. All text is escaped here, but for what is made by these functions (`Markup`). No
network: style and script are in the page.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { color-scheme: light dark; --back: #fcfcfb; --text: #1c1c1a; --soft: #5c5c58; --line: #dcdcd8; --card: #f3f3f0;
  --link: #00558a; --good: #1d6b3a; --bad: #a5331c; --best: #e3f1e6; }
@media (prefers-color-scheme: dark) { :root { --back: #161715; --text: #e9e9e4; --soft: #a6a69e; --line: #3a3b38;
  --card: #20211f; --link: #8cc8f0; --good: #8fd6a6; --bad: #f0a08c; --best: #1d3324; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 84rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
p, ul { margin: .4rem 0 .8rem; max-width: 50rem; }
ul { padding-left: 1.2rem; }
a { color: var(--link); }
.soft { color: var(--soft); font-size: .9rem; }
nav ul { list-style: none; padding: 0; margin: .75rem 0; display: flex; flex-wrap: wrap; gap: .3rem 1.1rem;
  max-width: none; }
.scroll { overflow-x: auto; margin: .6rem 0 1rem; border: 1px solid var(--line); border-radius: 6px; max-width: 100%;
  width: fit-content; }
table { border-collapse: separate; border-spacing: 0; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
tbody tr:last-child > * { border-bottom: 0; }
th.n, td.n { text-align: right; }
td.w { white-space: normal; min-width: 26rem; max-width: 40rem; overflow-wrap: anywhere; }
thead th { background: var(--card); font-weight: 600; vertical-align: bottom; white-space: pre; }
tbody th { font-weight: 500; }
th:first-child { position: sticky; left: 0; z-index: 1; background: var(--back); border-right: 1px solid var(--line); }
thead th:first-child { background: var(--card); z-index: 2; }
tr.best > * { background: var(--best); }
th button { all: unset; cursor: pointer; white-space: pre; }
th button:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
th button::after { content: "\\2195"; color: var(--soft); opacity: .55; margin-left: .3em; font-weight: 400; }
th[aria-sort=ascending] button::after { content: "\\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: "\\2193"; opacity: 1; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); gap: 1rem;
  align-items: start; }
.cards.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
figure { margin: 0; padding: .6rem .6rem .3rem; background: #fff; color: #1c1c1a; border: 1px solid var(--line);
  border-radius: 6px; min-width: 0; }
figcaption { font-size: .875rem; font-weight: 600; margin: 0 .2rem .2rem; overflow-wrap: anywhere; }
figure svg { display: block; width: 100%; height: auto; max-width: 36rem; margin: 0 auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
summary { cursor: pointer; color: var(--link); }
details { margin: .5rem 0 1rem; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .15rem 1rem; margin: .6rem 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  main { padding: 1rem .9rem 3rem; }
  body { font-size: 15px; }
  th, td { padding: .35rem .5rem; }
  tbody th:first-child { white-space: normal; min-width: 8.5rem; max-width: 45vw; }
  figure { padding: .35rem .25rem .2rem; }
}
@media print { .scroll { overflow: visible; } figure { break-inside: avoid; } }
"""

SCRIPT = """
document.querySelectorAll("table.sorts").forEach(table => {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(h => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => row.cells[column].dataset.v ?? row.cells[column].textContent.trim();
    const compare = (a, b) => {
      const [p, q] = [key(a), key(b)];
      if (p === "" || q === "") return (p === "") - (q === "");
      const order = isNaN(p) || isNaN(q) ? p.localeCompare(q) : p - q;
      return up ? order : -order;
    };
    body.append(...[...body.rows].sort(compare));
  }));
});
"""


class Markup(str):
    """Text that is HTML already; what is added to it is escaped unless it is, too."""

    def __add__(self, other: str) -> "Markup":
        return Markup(str.__add__(self, html(other)))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A table's cell: what stands there, and the number that it sorts by where that is another; None sorts last."""

    text: str
    value: float | None = None
    style: str = ""


def html(text: str) -> Markup:
    """Escaped text; `Markup` as it is."""
    return text if isinstance(text, Markup) else Markup(escape(str(text)))


def anchor(text: str) -> str:
    """An id out of any text."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "part"


def element(name: str, *inside: str, **attributes: str | None) -> Markup:
    """One element; `class_` is its class; attributes that are None are left out."""
    given = "".join(f' {k.rstrip("_")}="{escape(v)}"' for k, v in attributes.items() if v is not None)
    return Markup(f"<{name}{given}>{''.join(map(html, inside))}</{name}>")


def bullets(items: Iterable[str]) -> Markup:
    """A list."""
    return element("ul", *(element("li", item) for item in items))


def facts(pairs: Iterable[tuple[str, str]]) -> Markup:
    """Names and what they are."""
    return element("dl", *(element("dt", n) + element("dd", v) for n, v in pairs if v != ""))


def table(
    columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[Cell]], *, best: Sequence[bool] = (), label: str = ""
) -> Markup:
    """A table that sorts by a click on any column's head.

    Args:
        columns: heading, and whether it holds numbers, which stand to the right.
        rows: a cell for every column; the first is the row's name.
        best: which rows are marked.
        label: what the table is, for who cannot see it.
    """
    heads = [
        element("th", element("button", name, type="button"), scope="col", class_="n" if numeric else None)
        for name, numeric in columns
    ]
    body = []
    for i, row in enumerate(rows):
        cells = []
        for (_, numeric), cell in zip(columns, row, strict=True):
            value = f"{cell.value!r}" if cell.value is not None else "" if numeric else None
            attributes: dict[str, str | None] = {"class_": " ".join(filter(None, ("n" if numeric else "", cell.style)))}
            attributes = {k: v or None for k, v in attributes.items()} | {"data-v": value}
            name = "td" if cells else "th"
            cells.append(element(name, cell.text, **attributes, **({} if cells else {"scope": "row"})))
        body.append(element("tr", *cells, class_="best" if i < len(best) and best[i] else None))
    inside = element("thead", element("tr", *heads)) + element("tbody", *body)
    found = element("table", inside, **{"class_": "sorts", "aria-label": label or None})
    return element("div", found, class_="scroll", tabindex="0", role="region", **{"aria-label": label or "table"})


def figure(svg: str, caption: str) -> Markup:
    """A picture on a white card."""
    return element("figure", element("figcaption", caption), Markup(svg))


def page(title: str, parts: Iterable[str]) -> str:
    """The whole page, self-contained."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(map(html, parts))
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
