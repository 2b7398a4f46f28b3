"""How the pages look: one sheet, light and dark, from a phone to a wide screen, and on paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf8; --card: #ffffff; --ink: #1d1f24; --soft: #62666f; --rule: #e4e1db; --grid: #ebe8e2;
  --warn: #9a5b00; --warn-paper: #fdf3e0; --good: #1a7f4b;
  --c0: #2457c5; --c1: #c2410c; --c2: #0f766e; --c3: #a21caf; --c4: #4d7c0f; --c5: #be123c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14161a; --card: #1b1e24; --ink: #e8e6e1; --soft: #9aa0aa; --rule: #2c3038; --grid: #262a31;
    --warn: #f0b45a; --warn-paper: #2e2618; --good: #5cc98d;
    --c0: #7aa2ff; --c1: #ff9466; --c2: #4fd1c5; --c3: #e58bf5; --c4: #a3d65c; --c5: #ff8098;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: clamp(1.6rem, 1.2rem + 2vw, 2.3rem); line-height: 1.15; margin: 0; letter-spacing: -.02em;
  overflow-wrap: anywhere; text-wrap: balance; }
h2 { font-size: 1.15rem; margin: 3rem 0 .9rem; letter-spacing: -.01em; }
p { margin: .4rem 0; max-width: 44rem; }
a { color: var(--c0); }
.lead { color: var(--soft); margin-top: .5rem; }
.status { display: inline-block; vertical-align: .3em; margin-left: .5rem; padding: .1rem .6rem;
  font-size: .8rem;
  border: 1px solid currentColor; border-radius: 1rem; color: var(--soft); letter-spacing: 0;
  white-space: nowrap; }
.status.finished { color: var(--good); }
.status.stopped, .status.interrupted { color: var(--warn); } .status.running { color:
  var(--c0); }
.warning { background: var(--warn-paper); color: var(--warn); padding: .7rem .9rem; border-radius: .5rem;
  margin: 1rem 0; max-width: none; }
.tiles { display: flex; flex-wrap: wrap; gap: 1px; margin: 1.8rem 0 0; padding: 0;
  background: var(--rule); border: 1px solid var(--rule); border-radius: .7rem; overflow: hidden; }
.tiles > div { flex: 1 1 9.5rem; background: var(--card); padding: .8rem .95rem; }
.tiles dt { font-size: .78rem; color: var(--soft); }
.tiles dd { margin: .1rem 0 0; font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums;
  letter-spacing: -.01em; }
.tiles small { display: block; font-weight: 400; font-size: .78rem; color: var(--soft); letter-spacing: 0; }
figure { margin: 0 0 1.1rem; padding: 1rem 1.1rem .8rem; background: var(--card); border: 1px solid
  var(--rule);
  border-radius: .7rem; min-width: 0; }
figcaption { display: flex; flex-wrap: wrap; gap: .1rem .6rem; align-items: baseline; margin-bottom:
  .7rem; }
.unit { color: var(--soft); font-size: .85rem; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; list-style: none; margin: 0 0 0 auto;
  padding: 0;
  font-size: .82rem; color: var(--soft); }
.legend li::before { content: ""; display: inline-block; width: 1rem; height: .16rem; border-radius: 1rem;
  background: var(--c); vertical-align: .25em; margin-right: .4rem; }
.legend li.dots::before { width: .5rem; height: .5rem; vertical-align: .05em; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); }
.c3 { --c: var(--c3); } .c4 { --c: var(--c4); } .c5 { --c: var(--c5); }
.plot { position: relative; height: 15rem; margin: 0 .3rem 1.5rem 3.1rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 0
  1.1rem; }
.pair .plot { height: 10.5rem; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible;
  clip-path: inset(0 -8px -8px -8px); }
.plot path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; stroke-linecap: round; }
.plot .grid { stroke: var(--grid); stroke-width: 1; }
.plot path.reference { stroke: var(--soft); stroke-width: 1.2; stroke-dasharray: 5 5; }
.plot .line { stroke: var(--c); stroke-width: 1.8; }
.plot .faint { opacity: .55; stroke-width: 1.4; }
.plot .range { fill: var(--c); stroke: none; opacity: .14; }
.plot .dot { stroke: var(--c); stroke-width: 6.5; }
.plot span { position: absolute; font-size: .75rem; line-height: 1; color: var(--soft); white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.plot span.y { right: calc(100% + .5rem); transform: translateY(-50%); }
.plot span.x { top: calc(100% + .5rem); transform: translateX(-50%); }
.plot span.reference { right: 0; transform: translateY(-140%); background: var(--card); padding: 0 .2rem;
  max-width: 100%; overflow: hidden; text-overflow: ellipsis; }
.axis { text-align: right; margin: -.2rem .3rem 0; font-size: .75rem; color: var(--soft); max-width: none; }
.note { font-size: .85rem; color: var(--soft); max-width: none; margin: .5rem 0 .2rem; }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: .7rem; background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .5rem .9rem; border-top: 1px solid var(--rule); vertical-align: top;
  overflow-wrap: anywhere; }
tr:first-child > * { border-top: 0; }
thead + tbody tr:first-child > * { border-top: 1px solid var(--rule); }
th { font-weight: 500; color: var(--soft); } thead th { font-size: .8rem; }
td.number, th.number { text-align: right; white-space: nowrap; }
.key th:first-child, .key td:first-child { width: 13rem; color: var(--soft); }
.times { display: flex; height: .8rem; border-radius: 1rem; overflow: hidden; gap: 2px; margin: .4rem 0
  .8rem; }
.times i { background: var(--c); min-width: 2px; }
blockquote { margin: .5rem 0 1rem; padding: .15rem 0 .15rem 1rem; border-left: 3px solid var(--rule);
  white-space: pre-wrap; overflow-wrap: anywhere; font: 1rem/1.6 ui-serif, Georgia, "Times New Roman",
  serif;
  max-width: 44rem; }
blockquote b { font-weight: 600; color: var(--c0); }
.step { font-size: .8rem; color: var(--soft); margin: 1.1rem 0 0; }
details { border-top: 1px solid var(--rule); padding: .7rem 0; }
summary { cursor: pointer; font-weight: 500; }
details .scroll { margin-top: .7rem; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: .7rem; padding: .9rem 1rem;
  margin: .6rem 0;
  overflow-x: auto; font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre-wrap;
  overflow-wrap: anywhere; }
footer { margin-top: 3.5rem; padding-top: 1rem; border-top: 1px solid var(--rule); font-size: .82rem;
  color: var(--soft); }
@media (max-width: 30rem) {
  main { padding: 1.5rem 1rem 3rem; }
  figure { padding: .9rem .8rem .7rem; }
  .plot { height: 12.5rem; margin-left: 2.8rem; }
  .legend { margin-left: 0; width: 100%; }
  .tiles > div { flex-basis: 40%; }
  .key th:first-child, .key td:first-child { width: 9rem; }
  th, td { padding: .45rem .7rem; }
}
@media print { figure, tr, blockquote { break-inside: avoid; } details > * { display: block; } }
"""
