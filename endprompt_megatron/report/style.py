"""The look of the report: system fonts, one accent colour, light and dark, paper and phone."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fff; --ink: #1d2127; --muted: #667080; --grid: #e3e6eb; --wash: #f5f6f8;
  --baseline: #8a94a3; --extended: #1765b0; --control: #b8651b; --untrained: #8f6bb3;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171c; --ink: #e4e7ec; --muted: #949eac; --grid: #2b313a; --wash: #1b2027;
    --baseline: #8f99a8; --extended: #6cb0f5; --control: #e39a52; --untrained: #b795db;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 3rem 1.5rem 4rem; }
header { margin-bottom: 2.5rem; }
.kind { color: var(--muted); font-size: .85rem; margin: 0; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.02em; margin: .15rem 0 .8rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; letter-spacing: -.01em; margin: 3rem 0 .5rem; padding-top: .9rem;
  border-top: 1px solid var(--grid); }
h3 { font-size: .95rem; margin: 0 0 .4rem; }
p { margin: .4rem 0 .9rem; max-width: 44rem; }
.lead { font-size: 1.1rem; }
.note, figcaption, caption { color: var(--muted); font-size: .88rem; }
.missing { color: var(--muted); border-left: 3px solid var(--grid); padding-left: .8rem; }
code, pre { font: .85em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--wash); padding: 1rem; overflow-x: auto; border-radius: 4px; margin: .6rem 0; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 1.1rem 1.5rem;
  margin: 1.6rem 0 0; }
dl.facts dt { color: var(--muted); font-size: .82rem; }
dl.facts dd { margin: 0; font-size: 1.3rem; letter-spacing: -.01em; font-variant-numeric: tabular-nums; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 1.8rem 2rem; margin: 1.2rem 0; }
.figures.small { grid-template-columns: repeat(auto-fit, minmax(min(100%, 12.5rem), 1fr)); gap: 1.2rem; }
figure { margin: 0; break-inside: avoid; min-width: 0; }
.figures figure { max-width: 36rem; }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem; margin: .8rem 0; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { padding: .32rem .9rem .32rem 0; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th { font-weight: 600; color: var(--muted); }
thead th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
tbody th { color: var(--ink); font-weight: 400; }
td.extended { color: var(--extended); font-weight: 600; }
.heat td { text-align: center; padding: .5rem .9rem; border: 2px solid var(--paper); min-width: 4.4rem;
  background: color-mix(in srgb, var(--extended) calc(var(--level) * 62%), var(--wash));
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.heat td small { display: block; color: inherit; opacity: .75; font-size: .74rem; }
.heat th { border: 0; padding: .3rem .9rem .3rem 0; }
.heat thead th { text-align: center; padding: .3rem .6rem; }
ul { padding-left: 1.2rem; max-width: 44rem; }
li { margin: .35rem 0; }
summary { cursor: pointer; color: var(--muted); }
footer { margin-top: 3rem; color: var(--muted); font-size: .85rem; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  main { padding: 1.6rem 1rem 3rem; } h1 { font-size: 1.5rem; }
  .heat td { min-width: 3.6rem; padding: .45rem .4rem; }
}
@media print {
  :root { --paper: #fff; --ink: #000; --muted: #555; --grid: #ddd; --wash: #f5f5f5;
    --baseline: #777; --extended: #1765b0; --control: #b8651b; --untrained: #8f6bb3; }
  main { max-width: none; padding: 0; } body { font-size: 11pt; }
  h2 { break-after: avoid; } details > summary { display: none; }
  .figures { grid-template-columns: 1fr 1fr; } .figures.small { grid-template-columns: 1fr 1fr 1fr; }
}
"""
