"""How report.html looks: its frame, its style, and the script that draws the figures in the reader's colours."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{name}: batch report</title>
<style>{style}</style>
</head>
<body>
<main>
<header><h1>{name}</h1>{head}</header>
{message}
<div class="cards">{cards}</div>
<div class="charts">{charts}</div>
<div class="tables">{tables}</div>
<footer>Made by Shoal from the job's own state; <code>report.json</code> beside it has every number.</footer>
</main>
<script>{plotly}</script>
<script>const FIGURES = {figures};{script}</script>
</body>
</html>
"""

STYLE = """
:root {
  --page: #f5f6f8; --card: #ffffff; --text: #16202c; --text-soft: #5d6b7a; --grid: #e4e8ed; --bad: #c8372d;
  --good: #14804a; --open: #8a6100; --good-soft: #dff3e7; --bad-soft: #fae3e1; --open-soft: #fbf0d4;
  --c1: #1f6feb; --c1-soft: rgba(31, 111, 235, .14); --c2: #e0862a; --c3: #0f9d8a; --c3-soft: rgba(15, 157, 138, .14);
  --c4: #8250df;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0e1319; --card: #171e27; --text: #e8edf3; --text-soft: #97a5b4; --grid: #2a3440; --bad: #ff7b72;
    --good: #56d38b; --open: #e3b341; --good-soft: #12351f; --bad-soft: #421c1a; --open-soft: #3a2c07;
    --c1: #58a6ff; --c1-soft: rgba(88, 166, 255, .18); --c2: #f0a35e; --c3: #3fd0bb;
    --c3-soft: rgba(63, 208, 187, .16); --c4: #bc8cff;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); line-height: 1.45;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 40px; }
header { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 14px; margin-bottom: 20px; }
h1 { font-size: 1.65rem; letter-spacing: -.02em; margin: 0; overflow-wrap: anywhere; }
header p { flex-basis: 100%; margin: 0; color: var(--text-soft); overflow-wrap: anywhere; }
.status { padding: 2px 12px; border-radius: 99px; font-size: .85rem; font-weight: 600; }
.good { color: var(--good); background: var(--good-soft); }
.bad.status, .message { color: var(--bad); background: var(--bad-soft); }
.open { color: var(--open); background: var(--open-soft); }
.message { border-radius: 12px; padding: 12px 16px; margin: 0 0 16px; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; margin-bottom: 12px; }
.card, .chart, details { background: var(--card); border: 1px solid var(--grid); border-radius: 14px; }
.card { padding: 14px 16px; }
.card h3 { margin: 0; font-size: .8rem; font-weight: 600; color: var(--text-soft); }
.card b { display: block; font-size: 1.7rem; font-weight: 650; letter-spacing: -.02em; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.card.bad b { color: var(--bad); }
.card small { color: var(--text-soft); font-size: .8rem; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 12px; }
.chart { padding: 16px 16px 6px; min-width: 0; }
.chart.wide, .chart:last-child:nth-child(even) { grid-column: 1 / -1; }
.chart h2 { margin: 0; font-size: 1rem; }
.chart p { margin: 2px 0 6px; color: var(--text-soft); font-size: .85rem; }
.tables { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 12px; margin-top: 12px;
  align-items: start; }
details { padding: 12px 16px; }
summary { cursor: pointer; font-weight: 600; }
.scroll { overflow-x: auto; margin-top: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; }
th { text-align: left; font-weight: 400; color: var(--text-soft); padding: 5px 14px 5px 0; vertical-align: top; }
td { padding: 5px 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
tr + tr > * { border-top: 1px solid var(--grid); }
footer { color: var(--text-soft); font-size: .8rem; margin-top: 20px; }
@media (max-width: 720px) {
  main { padding: 18px 12px 28px; }
  .charts, .tables { grid-template-columns: minmax(0, 1fr); }
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 8px; }
  .card { padding: 10px 12px; }
  .card b { font-size: 1.35rem; }
}
"""

SCRIPT = """
function paint(value, style) {
  if (typeof value === "string") {
    if (value === "inherit") return getComputedStyle(document.body).fontFamily;
    const found = value.match(/^var\\((--[\\w-]+)\\)$/);
    return found ? style.getPropertyValue(found[1]).trim() : value;
  }
  if (Array.isArray(value)) return value.map(one => paint(one, style));
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, paint(one, style)]));
  }
  return value;
}
function draw() {
  const style = getComputedStyle(document.documentElement);
  FIGURES.forEach((figure, number) => {
    const {data, layout} = paint(figure, style);
    Plotly.react("plot-" + number, data, layout, {responsive: true, displayModeBar: false});
  });
}
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
"""
