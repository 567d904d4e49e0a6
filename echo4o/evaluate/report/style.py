"""The page's style sheet: light and dark, wide and narrow, on paper."""

STYLE = """
:root {
  color-scheme: light dark; --page: #f6f6f4; --card: #fff; --ink: #1c1c1e; --soft: #5f6066; --rule: #dedfe3;
  --fill: #eef0f3; --link: #0b57d0; --bad: #b3261e; --bad-fill: #fbe9e7; --warn-fill: #fff4d6; --warn: #7a5200;
  --good: #17692f; --good-fill: #e2f4e6; --published: #9a9ca5; --r0: #2f6fde; --r1: #d9610f; --r2: #0d8f82;
  --r3: #7d49d8; --r4: #c02a6d; --r5: #6d7610;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131417; --card: #1d1f23; --ink: #ececf0; --soft: #a5a7b0; --rule: #35373e; --fill: #2a2c32;
    --link: #8ab4f8; --bad: #ff9d94; --bad-fill: #442220; --warn-fill: #3b311b; --warn: #f2cd7c; --good: #8fdba4;
    --good-fill: #1d3a27; --published: #7b7e88; --r0: #6ea2ff; --r1: #ff9a55; --r2: #3ccfbf; --r3: #b594ff;
    --r4: #ff7fb3; --r5: #c3cf4f;
  }
}
.run-0 { --c: var(--r0) }
.run-1 { --c: var(--r1) }
.run-2 { --c: var(--r2) }
.run-3 { --c: var(--r3) }
.run-4 { --c: var(--r4) }
.run-5 { --c: var(--r5) }
.published, .published-0 { --c: var(--published) }
.published-1 { --c: var(--ink) }
* { box-sizing: border-box }
html { scroll-padding-top: 3.6rem; -webkit-text-size-adjust: 100% }
body {
  margin: 0; background: var(--page); color: var(--ink); overflow-wrap: break-word;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif;
}
a { color: var(--link) }
a:focus-visible, button:focus-visible, summary:focus-visible, select:focus-visible, input:focus-visible,
[tabindex]:focus-visible {
  outline: 2px solid var(--link); outline-offset: 2px; border-radius: 4px;
}
.skip { position: absolute; left: -99rem }
.skip:focus { left: 1rem; top: .5rem; z-index: 3; background: var(--card); padding: .4rem }
main, .top { max-width: 1240px; margin: 0 auto; padding: 0 1.25rem }
.top { padding-top: 1.75rem }
h1 { font-size: 1.65rem; line-height: 1.25; margin: 0 0 .35rem }
h2 { font-size: 1.35rem; margin: 0 0 .6rem }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .6rem }
p { margin: .4rem 0 }
section { margin: 2.4rem 0 }
.soft, small { color: var(--soft) }
small { font-size: .86em }
nav {
  position: sticky; top: 0; z-index: 2; background: var(--page); border-bottom: 1px solid var(--rule);
  margin-top: 1rem;
}
nav ul {
  max-width: 1240px; margin: 0 auto; padding: .55rem 1.25rem; display: flex; gap: 1.3rem; list-style: none;
  overflow-x: auto;
}
nav a { white-space: nowrap; text-decoration: none; font-weight: 500 }
nav a:hover { text-decoration: underline }
.panel {
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 1rem 1.15rem;
  margin: .9rem 0;
}
.note { border-radius: 8px; padding: .6rem .9rem; margin: .7rem 0; background: var(--warn-fill); color: var(--warn) }
.note.bad { background: var(--bad-fill); color: var(--bad) }
.note ul { margin: .2rem 0; padding-left: 1.2rem }
.scroll { overflow-x: auto; margin: 0 -.3rem; padding: 0 .3rem }
table { border-collapse: collapse; width: 100% }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem }
th, td { text-align: left; padding: .45rem .7rem .45rem 0; border-bottom: 1px solid var(--rule); vertical-align: top }
tr:last-child > th, tr:last-child > td { border-bottom: 0 }
tbody th { font-weight: 500 }
thead th {
  font-weight: 600; color: var(--soft); font-size: .86em; vertical-align: bottom; border-bottom-color: var(--soft);
}
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.n small { display: block }
td.n + td:not(.n), th.n + th:not(.n) { padding-left: .9rem }
td.wide { min-width: 11rem; width: 38% }
tr.total > * { font-weight: 600 }
tr.total small { font-weight: 400 }
tr.group > * { border-bottom-color: transparent; padding-bottom: .1rem }
.runname { display: inline-flex; align-items: baseline; gap: .45rem }
.swatch, .runname::before {
  content: ""; flex: none; display: inline-block; width: .7em; height: .7em; border-radius: 2px;
  background: var(--c);
}
.chip {
  display: inline-block; border-radius: 99px; padding: 0 .55em; font-size: .84em; line-height: 1.6;
  background: var(--fill); white-space: nowrap;
}
.chip.bad { background: var(--bad-fill); color: var(--bad) }
.chip.good { background: var(--good-fill); color: var(--good) }
svg.bars, svg.axis { display: block; overflow: visible }
.bars .bar { fill: var(--c); opacity: .55 }
.bars .grid { stroke: var(--rule) }
.bars .whisker { stroke: var(--ink); stroke-width: 1.4 }
.bars .mark { fill: var(--card); stroke: var(--ink); stroke-width: 1.3 }
svg.axis text { font-size: 11px; fill: var(--soft) }
.bars + .bars { margin-top: 2px }
svg.radar { display: block; width: 100%; max-width: 520px; margin: 0 auto }
.radar text { font-size: 13px; fill: var(--ink) }
.radar .rim { fill: var(--soft); font-size: 11px }
.radar .ring { fill: none; stroke: var(--rule) }
.radar .area { fill: var(--c); fill-opacity: .1; stroke: var(--c); stroke-width: 2 }
.radar .dot { fill: var(--c) }
.radar .area.published-0 { fill: none; stroke-dasharray: 5 4 }
.radar .area.published-1 { fill: none; stroke-dasharray: 2 3 }
.key {
  list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; padding: 0; margin: .4rem 0;
  font-size: .92em;
}
.key li { display: flex; align-items: center; gap: .4rem }
.panel > :first-child, .panel > :first-child > h3:first-child { margin-top: 0 }
.radars { grid-column: 1 / -1; display: grid; gap: 1rem 2rem; align-items: center }
.radars > * { min-width: 0 }
@media (min-width: 800px) { .radars { grid-template-columns: 1fr 1fr } }
.beside {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 0 1.1rem;
  align-items: start;
}
.rank td, .rank th { padding: .22rem .6rem .22rem 0; border: 0 }
.rank td.wide { width: 42%; min-width: 6rem }
.rank .own > * { font-weight: 600 }
details > summary { cursor: pointer }
details.facts > summary { font-weight: 500 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .6rem 0 }
dt { color: var(--soft) }
dd { margin: 0; min-width: 0 }
code {
  font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere;
}
.filters { display: flex; flex-wrap: wrap; gap: .6rem .8rem; align-items: end; margin: .6rem 0 }
.filters label { display: grid; font-size: .84em; color: var(--soft); gap: .15rem }
.filters select, .filters input, button {
  font: inherit; font-size: .95rem; color: var(--ink); background: var(--card); border: 1px solid var(--rule);
  border-radius: 7px; padding: 0 .55rem; height: 2.4rem; max-width: 100%;
}
.filters select { max-width: 14rem }
.filters input { min-width: 13rem }
button { cursor: pointer; padding: 0 .9rem }
button:hover { background: var(--fill) }
.filters output { margin-left: auto; color: var(--soft); padding: .4rem 0 }
.more { text-align: center; margin: 1rem 0 }
html:not(.js) .filters, html:not(.js) .more, [hidden] { display: none !important }
.gallery { scroll-margin-top: 2.4rem }
.items { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17.6rem), 1fr)) }
.items.several { grid-template-columns: 1fr }
.item {
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: .85rem 1rem; min-width: 0;
  content-visibility: auto; contain-intrinsic-size: auto 30rem;
}
.item:target { outline: 2px solid var(--link) }
.item header {
  display: flex; flex-wrap: wrap; gap: .2rem .6rem; align-items: baseline; color: var(--soft); font-size: .88em;
}
.item header a { color: inherit; text-decoration: none }
.item header .change { margin-left: auto }
.prompt { font-weight: 500; margin: .3rem 0 .7rem; white-space: pre-line }
.pictures { display: flex; flex-wrap: wrap; gap: .6rem; align-items: flex-start }
figure { margin: 0; min-width: 0; max-width: 100% }
figcaption { font-size: .8em; color: var(--soft) }
.pic { display: block; max-width: 100% }
.pic img { display: block; max-width: 100%; height: auto; border-radius: 5px; background: var(--fill) }
img.pixels { image-rendering: pixelated }
.nopic {
  display: grid; place-content: center; text-align: center; gap: .2rem; width: 256px; max-width: 100%;
  min-height: 128px; padding: .6rem; border: 1px dashed var(--bad); border-radius: 5px; color: var(--bad);
}
.refs { margin-bottom: .7rem; gap: .45rem }
.refs figure { flex: 0 1 30%; max-width: 128px }
.several .refs figure { flex-basis: 128px }
@media (min-width: 900px) {
  .several .made { display: grid; grid-template-columns: minmax(0, 256px) minmax(9rem, 1fr); gap: 1rem }
  .several .verdict { margin-top: 0 }
}
.refs .nopic { width: 128px; min-height: 96px }
.nopic small { overflow-wrap: anywhere }
.sides { display: grid; gap: 1.1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)) }
.side { min-width: 0 }
.side > h4 { margin: 0 0 .4rem; font-size: .95em; border-bottom: 2px solid var(--c); padding-bottom: .15rem }
.verdict { margin-top: .55rem }
.score { font-weight: 650; font-variant-numeric: tabular-nums }
.verdict p { margin: .25rem 0 }
.reason b { font-weight: 600 }
.reason, .row { font-size: .93em }
.row { margin-top: .5rem }
.row > summary { color: var(--soft) }
.up { color: var(--good) }
.down { color: var(--bad) }
footer {
  color: var(--soft); border-top: 1px solid var(--rule); padding: 1rem 0 3rem; margin-top: 3rem; font-size: .92em;
}
@media (max-width: 620px) {
  body { font-size: 15px }
  main, .top { padding: 0 .85rem }
  nav ul { padding: .55rem .85rem }
  .panel { padding: .8rem .85rem }
  .top { padding-top: 1rem }
  .filters label { flex: 1 1 9rem }
  .filters input, .filters select { width: 100%; min-width: 0 }
  .stack thead { position: absolute; left: -99rem }
  .sides { grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem }
  .zero { display: none }
  .stack tr {
    display: grid; grid-template-columns: 1fr 1fr 1fr; gap: 0 .9rem; padding: .45rem 0;
    border-bottom: 1px solid var(--rule);
  }
  .stack tr > * { border: 0; padding: .1rem 0 }
  .stack tr > th, .stack td.wide { grid-column: 1 / -1; width: auto }
  .stack td.n { text-align: left }
  .stack td.n + td:not(.n) { padding-left: 0 }
  .stack td[data-name]::before {
    content: attr(data-name); display: block; font-size: .78rem; font-weight: 400; color: var(--soft);
  }
  dl { grid-template-columns: 1fr }
  dd { margin-bottom: .4rem }
}
@media print {
  nav, .filters, .more { display: none }
  .item { break-inside: avoid; content-visibility: visible }
}
"""
