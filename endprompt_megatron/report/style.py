"""The look of the report: system fonts, few colours, light and dark, paper and phone.

Every colour of a line or a mark has a contrast of 3 or more on its background, every text of 4.5 or more, in both
modes (a test computes it); no colour alone tells anything apart.
"""

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1d2127",
    "muted": "#5d6674",
    "grid": "#e1e4e9",
    "wash": "#f4f5f7",
    "baseline": "#6f7886",
    "extended": "#1765b0",
    "control": "#a8590f",
    "untrained": "#7d58a6",
    "run2": "#b0302f",
    "run3": "#1f7a4d",
    "run4": "#8a6a00",
    "run5": "#b03a86",
    "run6": "#0f7684",
    "better": "#1f7a4d",
    "worse": "#b0302f",
    "heat": "#4f93d2",  # of a cell at 100%, under ink
}
DARK = {
    "paper": "#14171c",
    "ink": "#e6e9ee",
    "muted": "#9aa4b2",
    "grid": "#2c323b",
    "wash": "#1b2027",
    "baseline": "#98a2b1",
    "extended": "#6cb0f5",
    "control": "#e39a52",
    "untrained": "#bb9ae0",
    "run2": "#f08a85",
    "run3": "#6cc796",
    "run4": "#d8b548",
    "run5": "#ec8bc6",
    "run6": "#5cc3d1",
    "better": "#6cc796",
    "worse": "#f08a85",
    "heat": "#2a67a5",
}


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in colours.items())


CSS = (
    f":root {{ color-scheme: light dark; {_variables(LIGHT)} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}\n"
    + """
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 3rem 1.5rem 4rem; }
.kind { color: var(--muted); font-size: .85rem; margin: 0; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.02em; margin: .15rem 0 .8rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; letter-spacing: -.01em; margin: 0 0 .6rem; }
h3 { font-size: .95rem; margin: 1.6rem 0 .4rem; }
figure h3 { margin-top: 0; }
section { margin-top: 2.6rem; padding-top: 1.1rem; border-top: 1px solid var(--grid); }
p { margin: .4rem 0 .9rem; max-width: 44rem; overflow-wrap: break-word; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin-top: 1.6rem; font-size: .88rem; }
a { color: var(--extended); text-decoration: none; }
a:hover, a:focus { text-decoration: underline; }
.lead { font-size: 1.1rem; overflow-wrap: anywhere; }
.note, figcaption, .caption { color: var(--muted); font-size: .88rem; }
.note strong { color: var(--ink); }
figcaption { margin-top: .3rem; }
.missing { color: var(--muted); border-left: 3px solid var(--grid); padding-left: .8rem; }
code, pre { font: .85em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
pre { background: var(--wash); padding: 1rem; overflow-x: auto; border-radius: 4px; margin: .6rem 0;
  overflow-wrap: normal; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 1.1rem 1.5rem;
  margin: 1.6rem 0 0; }
dl.facts dt { color: var(--muted); font-size: .82rem; }
dl.facts dd { margin: 0; font-size: 1.3rem; letter-spacing: -.01em; font-variant-numeric: tabular-nums; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 1.8rem 2rem; margin: 1.2rem 0; align-items: start; }
.figures.small { grid-template-columns: repeat(auto-fit, minmax(min(100%, 12.5rem), 1fr)); gap: 1.2rem; }
.figures.maps { display: flex; flex-wrap: wrap; gap: 1.4rem 2.4rem; }
.figures.maps figure { max-width: 100%; }
figure { margin: 0; break-inside: avoid; min-width: 0; }
.figures figure { max-width: 36rem; }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; font-size: .93rem;
  margin: .6rem 0 .8rem; }
.caption { margin: .9rem 0 0; }
th, td { padding: .34rem 1rem .34rem 0; text-align: right; border-bottom: 1px solid var(--grid);
  white-space: nowrap; vertical-align: top; }
th { font-weight: 600; color: var(--muted); }
thead th { white-space: normal; vertical-align: bottom; min-width: 5.4rem; max-width: 12rem;
  overflow-wrap: break-word; }
th:first-child, td:first-child { text-align: left; }
tbody th { color: var(--ink); font-weight: 400; white-space: normal; min-width: 9rem; max-width: 22rem; }
td small, th small { display: block; color: var(--muted); font-size: .78rem; font-weight: 400; white-space: nowrap; }
.one td.extended { font-weight: 600; }
td.paper, th.paper, .paper { color: var(--muted); }
.recipes td { white-space: normal; max-width: 16rem; overflow-wrap: anywhere; }
.recipes th code { overflow-wrap: normal; }
.mark { font-size: .78em; } .better { color: var(--better); } .worse { color: var(--worse); }
.heat td, .scale span { text-align: center; border: 1px solid var(--paper);
  background: color-mix(in srgb, var(--heat) calc(var(--level, 0) * 100%), var(--wash));
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.heat td { padding: .5rem .3rem; min-width: 4.2rem; vertical-align: middle; }
.heat td small { color: inherit; font-size: .74rem; }
.heat th { border: 0; padding: .3rem .9rem .3rem 0; vertical-align: middle; }
.heat tbody th { min-width: 0; }
.heat thead th { text-align: center; padding: .3rem .3rem; min-width: 0; }
.heat thead th:first-child { text-align: left; }
.scale { font-size: .8rem; color: var(--muted); display: flex; align-items: center; flex-wrap: wrap; }
.scale span { color: var(--ink); padding: .1rem .7rem; } .scale span:first-of-type { margin-left: .6rem; }
ul { padding-left: 1.2rem; max-width: 44rem; }
li { margin: .35rem 0; overflow-wrap: break-word; }
details { margin: .5rem 0; } details details { margin-left: 1rem; }
summary { cursor: pointer; color: var(--muted); font-size: .93rem; max-width: 44rem; }
footer { margin-top: 3rem; color: var(--muted); font-size: .85rem; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  main { padding: 1.6rem 1rem 3rem; } h1 { font-size: 1.5rem; }
  tbody th { min-width: 7.5rem; max-width: 9.5rem; } th small { white-space: normal; }
  thead th:first-child, tbody th { position: sticky; left: 0; background: var(--paper); }
  .heat td { min-width: 3.1rem; padding: .45rem .2rem; }
  .figures.maps figure { width: 100%; } .wide svg { min-width: 33rem; }
}
"""
    + f"@media print {{ :root {{ color-scheme: light; {_variables(LIGHT)} }} }}\n"
    + """
@media print {
  main { max-width: none; padding: 0; } body { font-size: 10.5pt; }
  nav { display: none; }
  section { border-top-color: #bbb; } h2, h3, summary, p:has(+ .figures) { break-after: avoid; }
  .scroll { overflow: visible; }
  table { font-size: .8rem; } th, td { padding-right: .6rem; white-space: normal; }
  thead th { min-width: 0; overflow-wrap: break-word; } tr { break-inside: avoid; }
  tbody th { min-width: 6rem; } td small { font-size: .68rem; }
  .heat td { min-width: 2.6rem; }
  .figures { grid-template-columns: 1fr 1fr; gap: 1rem; } .figures.small { grid-template-columns: 1fr 1fr 1fr 1fr; }
  details:not(.apart)::details-content { content-visibility: visible; display: block; height: auto; }
  pre { white-space: pre-wrap; }
}
"""
)
