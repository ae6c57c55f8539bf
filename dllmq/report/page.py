"""The static parts of report.html: style, the column-sort script, and what each switch means.

Nothing here is interpolated from a record.
"""

from __future__ import annotations

import base64
import hashlib

CSS = """
:root { color-scheme: light dark; --ink:#1b1f24; --soft:#5b6470; --line:#d9dde3; --paper:#fefefe;
  --back:#f5f6f8;
  --accent:#0b5cad; --good:#0a6b3d; --good-back:#e4f4ea; --bad:#a3321f; --bad-back:#fbe9e5;
  --on-back:#e3edf8;
  --s0:#0072b2; --s1:#d55e00; --s2:#009e73; --s3:#b9608d; --s4:#b87f00; --s5:#3a93c4; --s6:#7a5195;
  --s7:#77770a; }
@media screen and (prefers-color-scheme: dark) { :root { --ink:#e5e8ec; --soft:#9aa4b1; --line:#343b45;
  --paper:#191d23; --back:#111418;
  --accent:#7db7f0; --good:#7fd6a4; --good-back:#17352a; --bad:#f2a394; --bad-back:#3d221d;
  --on-back:#1d3247;
  --s0:#4aa8e0; --s1:#f0813a; --s2:#2fc79b; --s3:#dc93ba; --s4:#edb233; --s5:#85cdf2; --s6:#b48fd0;
  --s7:#c4c44a; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.55 system-ui, -apple-system,
  "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; overflow-wrap: break-word; }
main { max-width: 1200px; margin: 0 auto; padding: 2rem clamp(.9rem, 3vw, 2.25rem) 4rem; }
header { margin-bottom: 1.75rem; }
.eyebrow { margin: 0; color: var(--soft); font-size: .8rem; letter-spacing: .06em; text-transform:
  uppercase; }
h1 { margin: .15rem 0 .5rem; font-size: clamp(1.5rem, 4.5vw, 2.1rem); line-height: 1.2; letter-spacing:
  -.015em; }
h2 { margin: 2.6rem 0 .35rem; font-size: 1.2rem; letter-spacing: -.005em; }
h3 { margin: 1.5rem 0 .5rem; font-size: 1rem; } h4 { margin: 0 0 .4rem; font-size: .95rem; }
h5 { margin: .55rem 0 0; font-size: .8rem; color: var(--soft); font-weight: 600; }
nav { display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; margin-top: .9rem; font-size: .92rem; }
a { color: var(--accent); }
h2 + p, .lead { margin: 0 0 .8rem; color: var(--soft); max-width: 72ch; }
.summary { margin: 0; font-size: 1.08rem; max-width: 78ch; }
.scroll { overflow-x: auto; background: var(--paper); border: 1px solid var(--line); border-radius: 10px; }
.scroll:focus-visible, summary:focus-visible, th:focus-visible { outline: 2px solid
  var(--accent); outline-offset: 2px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .875rem; font-variant-numeric:
  tabular-nums; }
th, td { padding: .5rem .62rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line);
  font-weight: 400; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--soft); font-size: .78rem; font-weight: 600; line-height: 1.3; vertical-align:
  bottom; }
th[scope=row] { position: sticky; left: 0; z-index: 1; background: var(--paper); font-weight: 600; }
thead th:first-child { position: sticky; left: 0; z-index: 2; background: var(--paper); }
.num { text-align: right; }
tbody .long { white-space: normal; overflow-wrap: anywhere; min-width: 11rem; max-width: 24rem; }
tr.reference > * { background: color-mix(in srgb, var(--back) 70%, var(--paper)); }
tbody tr:hover > * { background: var(--back); }
.muted, td.off { color: var(--soft); }
.better span, .worse span, td.on span { padding: .1rem .42rem; margin-right: -.42rem; border-radius: 5px; }
td.on span { margin: 0 0 0 -.42rem; }
.better span { color: var(--good); background: var(--good-back); }
.worse span { color: var(--bad); background: var(--bad-back); }
td.on span { color: var(--accent); background: var(--on-back); font-weight: 600; }
td.failed { color: var(--bad); white-space: normal; min-width: 16rem; }
.notes { margin: .6rem 0 0; padding: 0 0 0 1.1rem; color: var(--soft); font-size: .84rem; max-width: 90ch; }
.sortable th { cursor: pointer; } .sortable th:hover { color: var(--ink); }
th[aria-sort=ascending]::after { content: " \\2191"; } th[aria-sort=descending]::after { content: " \\2193";
  }
.figures + h3 { margin-top: 2rem; }
.figures { display: grid; gap: 1rem; align-items: start; margin-top: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
.figures.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
small { color: var(--soft); font-size: .86em; font-weight: 400; }
figure { margin: 0; padding: .8rem .8rem .7rem; background: var(--paper); border: 1px solid var(--line);
  border-radius: 10px;
  break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; max-width: 36rem; margin: 0 auto; }
figure svg text { font-family: inherit !important; }
figcaption { margin-top: .5rem; color: var(--soft); font-size: .84rem; }
dl { margin: 0; display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .4rem 1.2rem;
  font-size: .93rem; }
dt { font-weight: 600; } dd { margin: 0; max-width: 76ch; min-width: 0; }
details { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; margin-top: .55rem;
  }
.fold { margin: .55rem 0 0; padding: 0 .9rem; font-size: .92rem; font-weight: 600; }
summary .muted, .fold .muted { font-weight: 400; margin-left: .5rem; }
article { padding: .8rem 0; border-top: 1px solid var(--line); } article:first-child { border-top: 0; }
h4 .better, h4 .worse { margin-left: .4rem; font-size: .82rem; }
.pair { display: grid; gap: 0 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.pair > div { min-width: 0; }
summary { padding: .55rem .9rem; cursor: pointer; font-weight: 600; font-size: .92rem; }
details > div { padding: .2rem .9rem .9rem; }
pre { margin: .35rem 0 0; padding: .7rem .85rem; background: var(--back); border-radius: 7px; overflow-x:
  auto;
  font: .8rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font: .86em ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
footer { margin-top: 3rem; padding-top: .9rem; border-top: 1px solid var(--line); color: var(--soft);
  font-size: .82rem; }
@media (max-width: 40rem) { main { padding-top: 1.2rem; } th, td { padding: .45rem .55rem; } table {
  font-size: .82rem; }
  h2 { margin-top: 2.1rem; } dl { grid-template-columns: 1fr; gap: .1rem; } dd { margin-bottom: .6rem; }
  figure { padding: .5rem; } }
@page { size: A4 landscape; margin: 12mm; }
@media print { nav { display: none; } article { break-inside: avoid; }
  :root { color-scheme: light; --back:#fff; --paper:#fff; --ink:#000; --soft:#444; } body {
  font-size: 10pt; }
  main { max-width: none; padding: 0; } .scroll { overflow: visible; border: 0; } table { font-size:
  6.5pt; } thead th { font-size: 6pt; }
  th, td { padding: .15rem .2rem; white-space: normal; }
  h2 { break-after: avoid; } tr { break-inside: avoid; } pre {
  white-space: pre-wrap; }
  .figures { grid-template-columns: 1fr 1fr; } th[scope=row], thead th:first-child { position: static; } }
"""

# Sorts a table by the clicked column: numbers by data-v, the largest first, text from A on; what is missing
# comes last. Full precision stays on top and failed runs at the end. The page is complete without it.
SCRIPT = """
document.querySelectorAll("table").forEach(table => {
  table.classList.add("sortable");
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const rank = row => row.classList.contains("reference") ? 0 : row.classList.contains("failed") ? 2 : 1;
  const isNumber = x => typeof x === "number", missing = x => x === "" || x === "–";
  const order = (a, b) => isNumber(a) && isNumber(b) ? a - b : isNumber(a) ? 1 : isNumber(b) ? -1
    : a.localeCompare(b, undefined, {numeric: true});
  heads.forEach(head => {
    head.tabIndex = 0;
    head.addEventListener("keydown", event => { if (event.key === "Enter") head.click(); });
  });
  heads.forEach((head, i) => head.addEventListener("click", () => {
    const before = head.getAttribute("aria-sort");
    const up = before ? before === "descending" : !head.classList.contains("num");
    heads.forEach(h => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => {
      const cell = row.cells[i];
      return !cell ? "" : cell.dataset.v === undefined ? cell.textContent : +cell.dataset.v;
    };
    [...body.rows]
      .sort((a, b) => rank(a) - rank(b) || missing(key(a)) - missing(key(b))
        || (up ? 1 : -1) * order(key(a), key(b)))
      .forEach(row => body.append(row));
  }));
});
"""

SCRIPT_HASH = "sha256-" + base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()

# axis -> what it means, in the words of the method; shown when a sweep's runs have that axis
MEANING = {
    "method": "How weights are rounded. rtn: to the nearest level. gptq: with error compensation from "
    "second-order statistics. awq: after scaling up the channels that large activations read. fp: not "
    "at all.",
    "bits": "w<N>a<M>: N bits for the weights of the block linears, M for their inputs "
    "(a16: inputs untouched).",
    "tmas": "Temporal-mask adaptive sampling. On: calibration states are drawn from the full-precision "
    "denoising trajectory, in four blocks of the mask ratio with shares 0.3, 0.2, 0.2, 0.3. Off: calibration "
    "on fully visible text, with as many sequences and tokens.",
    "cgq": "Certainty-guided quantization. On: a token's squared error counts with "
    "(indicator + sqrt(confidence))² in the weight error, so that masked tokens about to be committed count "
    "most. Off: all tokens count alike.",
    "iaaq": "Interaction-aware activation quantization. On: the static scale of V minimises the error after "
    "the attention product P·V. Off: the scale spans V's range (min-max).",
    "states": "Which states calibrate while tmas is off: clean text, randomly masked text, or trajectory "
    "states taken uniformly.",
    "seed": "Seed of everything random in the run.",
    "group_size": "Weights per scale along a row; -1 is one scale per output channel.",
    "act_group_size": "Input channels per activation scale; -1 is one scale per token.",
    "attn_bits": "Bits of the attention product's operands; auto takes the activation width, none leaves "
    "them alone.",
    "model": "The checkpoint.",
    "cache": "Approximate decoding. Inside a block of the answer, keys and values left of it (prefix), or "
    "left and right of it (dual), are reused instead of computed again.",
    "threshold": "Approximate decoding. A denoising step commits every token with at least this confidence, "
    "and the most confident one in any case, instead of a fixed number of tokens.",
}
