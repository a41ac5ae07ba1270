"""The page around a report: one HTML file with its style inside, which asks the network for nothing and needs no
script.
"""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Sequence

# Two inks, one grid, one colour for each arm; each arm colour has at least 4.5:1 on its paper, and neighbours differ in
# hue and lightness, so that they stay apart for colour-blind readers and in grey.
STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --panel: #f6f7f9; --ink: #16191d; --muted: #5a6472; --grid: #e3e6ea; --line: #d3d8de;
  --alert: #a8320a; --alert-panel: #fdf1ec;
  --series-0: #5f6b7a; --series-1: #0b5fc0; --series-2: #b3500b; --series-3: #0d746c; --series-4: #96357d;
  --series-5: #6d5d00;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #121518; --panel: #1a1e23; --ink: #e8ebef; --muted: #9ba6b3; --grid: #272d34; --line: #363d46;
    --alert: #ff9c73; --alert-panel: #2b1c16;
    --series-0: #a9b4c2; --series-1: #5eabff; --series-2: #f2a154; --series-3: #52c9ba; --series-4: #e38fcd;
    --series-5: #d8c34a;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 -apple-system, BlinkMacSystemFont, "Segoe UI", Inter, Roboto, "Helvetica Neue", "Noto Sans",
    "Liberation Sans", Arial, sans-serif;
  font-variant-numeric: tabular-nums; text-rendering: optimizeLegibility;
}
main, header, footer { max-width: 984px; margin: 0 auto; padding: 0 32px; }
header { padding-top: 48px; }
h1 { font-size: 30px; line-height: 1.25; font-weight: 650; letter-spacing: -0.012em; margin: 14px 0 10px;
  text-wrap: balance; }
h2 { font-size: 21px; line-height: 1.3; font-weight: 650; letter-spacing: -0.006em; margin: 0 0 6px; }
p { margin: 0 0 12px; max-width: 74ch; }
a { color: inherit; text-decoration-color: var(--muted); text-underline-offset: 3px; }
a:hover { text-decoration-color: currentColor; }
section { padding: 40px 0 4px; margin-top: 32px; border-top: 1px solid var(--line); }
.eyebrow { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center; color: var(--muted); font-size: 14px; }
.status { border: 1px solid currentColor; border-radius: 999px; padding: 1px 11px; color: var(--ink);
  font-weight: 600; font-size: 13px; }
.note, .source, .caveats { color: var(--muted); }
.lead { font-size: 17px; margin-bottom: 6px; max-width: none; }
.source, .caveats { font-size: 14px; }
.caveats { margin: 20px 0 0; padding-left: 18px; max-width: 100ch; }
.caveats li { margin: 3px 0; }
.alert { border-left: 3px solid var(--alert); background: var(--alert-panel); color: var(--ink); padding: 10px 16px;
  margin: 16px 0; max-width: none; }
nav { margin: 24px 0 0; font-size: 14px; color: var(--muted); display: flex; flex-wrap: wrap; gap: 4px 20px; }
.tiles { display: flex; flex-wrap: wrap; gap: 1px; margin: 22px 0 0; padding: 0; background: var(--line);
  border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
.tiles div { flex: 1 1 200px; background: var(--paper); padding: 14px 18px; }
.tiles dt { color: var(--muted); font-size: 13px; line-height: 1.35; }
.tiles dd { margin: 4px 0 0; }
.tiles .value { font-size: 24px; line-height: 1.25; font-weight: 600; letter-spacing: -0.012em; }
.tiles.several .value { font-size: 15px; letter-spacing: 0; margin-top: 9px; }
.tiles.several .key { display: block; font-size: 13px; font-weight: 400; color: var(--muted); }
.tiles .detail { color: var(--muted); font-size: 13px; line-height: 1.4; overflow-wrap: anywhere; }
figure { margin: 20px 0 28px; }
figcaption { color: var(--muted); font-size: 14px; line-height: 1.5; max-width: 82ch; margin-top: 8px; }
figcaption strong, caption strong { color: var(--ink); font-weight: 600; }
.chart { font-size: 12.5px; line-height: 1.3; color: var(--muted); }
.head { display: flex; flex-wrap: wrap; gap: 2px 18px; margin-bottom: 10px; }
.head .key { color: var(--ink); font-weight: 600; }
.plot { position: relative; margin: 0 14px 46px 58px; }
.plot > svg { position: absolute; width: 100%; height: 100%; overflow: visible; }
.plot path, .plot rect { vector-effect: non-scaling-stroke; }
.plot span, .plot b { position: absolute; white-space: nowrap; font-weight: 400; }
.y span { right: calc(100% + 9px); transform: translateY(-50%); }
.x span { top: calc(100% + 6px); transform: translateX(-50%); }
.x b { top: calc(100% + 24px); right: -14px; }
.named .plot { margin-left: 90px; margin-bottom: 28px; }
.rows .plot { margin-left: 0; }
.plot .row { left: 0; color: var(--ink); }
.bars div { display: grid; grid-template-columns: 130px 1fr 84px; gap: 12px; align-items: center; padding: 4px 0;
  color: var(--ink); }
.bar { background: var(--grid); }
.bar i { display: block; height: 20px; }
.bar, .bar i, .swatch { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.scroll { overflow-x: auto; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--series-1); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; line-height: 1.4; margin: 20px 0 28px; }
caption { text-align: left; color: var(--muted); padding-bottom: 8px; line-height: 1.5; }
th, td { text-align: left; vertical-align: baseline; padding: 7px 20px 7px 0; border-bottom: 1px solid var(--grid); }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--muted); font-weight: 500; font-size: 13px; vertical-align: bottom;
  border-bottom-color: var(--line); }
tbody th { font-weight: 500; width: 1%; white-space: nowrap; }
td.number { white-space: nowrap; }
.number { text-align: right; }
.key { white-space: nowrap; }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 8px; }
code, pre { font-family: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "Liberation Mono", monospace;
  font-size: 0.92em; }
td code { overflow-wrap: anywhere; }
pre { background: var(--panel); border-radius: 8px; padding: 14px 18px; overflow-x: auto; font-size: 13px;
  line-height: 1.5; max-height: 480px; }
details { margin: 4px 0 14px; }
summary { cursor: pointer; font-size: 15px; padding: 4px 0; }
.failing { color: var(--alert); font-weight: 600; }
.method dt { font-weight: 600; margin-top: 14px; }
.method dd { margin: 2px 0 0; max-width: 78ch; color: var(--muted); }
footer { color: var(--muted); font-size: 13px; padding-top: 28px; padding-bottom: 64px; overflow-wrap: anywhere; }
@media screen and (max-width: 700px) {
  main, header, footer { padding-left: 18px; padding-right: 18px; }
  header { padding-top: 28px; }
  h1 { font-size: 24px; }
  .lead { font-size: 16px; }
  .tiles div { padding: 10px 14px; }
  .plot { margin-left: 46px; margin-right: 8px; }
  .x span:nth-of-type(even):not(:last-of-type) { display: none; }
  .bars div { grid-template-columns: 1fr auto; gap: 2px 12px; }
  .bars .bar { grid-row: 2; grid-column: 1 / 3; }
  tbody th { white-space: normal; overflow-wrap: anywhere; }
  .cards, .cards caption, .cards tbody, .cards tr, .cards th, .cards td { display: block; width: auto; }
  .cards thead { display: none; }
  .cards tr { padding: 8px 0; border-bottom: 1px solid var(--line); }
  .cards tr { display: grid; grid-template-columns: repeat(3, 1fr); gap: 2px 12px; }
  .cards th { grid-column: 1 / -1; }
  .cards th, .cards td { border: 0; padding: 1px 0; text-align: left; white-space: normal; }
  .cards td::before { content: attr(data-name); display: block; color: var(--muted); font-size: 12px; }
}
@media print {
  figure, tr, .tiles { break-inside: avoid; }
  h2, .source, caption { break-after: avoid; }
  .tiles div { flex-basis: 120px; padding: 10px 12px; }
  .tiles .value { font-size: 19px; }
  section { padding-top: 20px; margin-top: 16px; }
  nav { display: none; }
  pre { max-height: none; white-space: pre-wrap; }
  .scroll { overflow: visible; }
  table { font-size: 11px; }
  th, td { padding: 4px 10px 4px 0; }
  thead { display: table-header-group; }
  thead th { font-size: 10.5px; }
  td.number { white-space: normal; }
}
"""

ALONE = r"(?<![^\s(])"  # before a number that is no part of a name


def page(*, title: str, header: str, body: str, footer: str) -> str:
    """A whole HTML document; `title` is plain text, the rest is HTML. Its policy forbids requests and scripts."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header>\n{header}\n</header>\n<main>\n{body}\n</main>\n<footer>\n{footer}\n</footer>\n</body>\n</html>\n"
    )


def section(identifier: str, heading: str, *parts: str) -> str:
    """A section with a heading that the navigation can link to."""
    content = "\n".join(part for part in parts if part)
    title = f'<h2 id="{identifier}-heading">{html.escape(heading)}</h2>'
    return f'<section id="{identifier}" aria-labelledby="{identifier}-heading">\n{title}\n{content}\n</section>'


def table(caption: str, headings: Sequence[str], rows: Sequence[Sequence[str]], *, words: Collection[str] = ()) -> str:
    """A table; one that is too wide for a phone becomes a list of cards there, each cell with its heading. The first
    cell names its row. Caption and cells are HTML.

    Args:
        words: headings of the columns that hold words; the others hold numbers, which are right-aligned.
    """
    align = ["" if heading in words else ' class="number"' for heading in headings]
    names = [html.escape(heading) for heading in headings]
    head = "".join(f'<th scope="col"{side}>{name}</th>' for name, side in zip(names, align, strict=True))
    lines = []
    for first, *rest in rows:
        columns = zip(names[1:], align[1:], rest, strict=True)
        cells = "".join(f'<td data-name="{name}"{side}>{cell}</td>' for name, side, cell in columns)
        lines.append(f'<tr><th scope="row"{align[0]}>{first}</th>{cells}</tr>')
    kind = ' class="cards"' if len(headings) > 4 else ""
    content = "\n".join(lines)
    name = html.escape(html.unescape(re.sub(r"<[^>]*>", "", caption)).partition(".")[0], quote=True)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{name}"><table{kind}>\n'
        f"<caption>{caption}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{content}\n</tbody>\n</table></div>"
    )


def figure(chart: str, caption: str) -> str:
    """A chart with its caption (HTML)."""
    return f"<figure>\n{chart}\n<figcaption>{caption}</figcaption>\n</figure>"


def tiles(entries: Sequence[tuple[str, str, Sequence[tuple[str, str, str]]]]) -> str:
    """Questions, each a link to a section by its id, with rows of (whose, as HTML; answer; detail), plain text."""
    cells = []
    for question, section, rows in entries:
        lines = "".join(
            f'<dd class="value">{name}{typeset(answer)}</dd><dd class="detail">{typeset(detail)}</dd>'
            for name, answer, detail in rows
        )
        cells.append(f'<div><dt><a href="#{section}">{html.escape(question)}</a></dt>{lines}</div>')
    kind = " several" if any(len(rows) > 1 for *_, rows in entries) else ""
    return f'<dl class="tiles{kind}">{"".join(cells)}</dl>'


def details(summary: str, content: str) -> str:
    """Content (HTML) that opens on request; `summary` is plain text."""
    return f"<details><summary>{html.escape(summary)}</summary>\n{content}\n</details>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text; `kind` is a class of the style: lead, note, alert."""
    opening = f'<p class="{kind}">' if kind else "<p>"
    return f"{opening}{typeset(text)}</p>"


def code(text: str) -> str:
    """A name or path, as typed."""
    return f"<code>{html.escape(text)}</code>"


def listing(text: str) -> str:
    """A file, as it is."""
    return f'<pre tabindex="0"><code>{html.escape(text.rstrip())}</code></pre>'


def typeset(text: str) -> str:
    """Plain text as HTML: true signs for -, +- and x, and no line break between a number and its unit.

    A sign is one only where its number stands alone: names, of arms and modules, hold such letters too.
    """
    text = html.escape(text, quote=False).replace("+-", "\u00b1")
    text = re.sub(rf"{ALONE}-(?=[\d.,]+(?![\w-]))", "\u2212", text)
    text = re.sub(rf"{ALONE}-(?=$|\))", "\u2013", text)
    text = re.sub(rf"{ALONE}(\d[\d.,]*)x(?![\w-])", "\\1\u00d7", text)
    text = re.sub(r"(\d) (?=%)", "\\1\u202f", text)
    return re.sub(r"(\d) (?=(?:[KMGT]iB|[kMGTPEZ]?FLOP|[KMBT]|s|min|h|d)(?!\w))", "\\1\u00a0", text)
