"""The page's style: light and dark by the system's setting, one column where it is narrow."""

from __future__ import annotations

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #16191d; --soft: #5b6470; --line: #dfe3e8;
  --accent: #2a6fdb; --good: #1a7f4b; --warn: #9a6700; --bad: #c62f2f; --badbg: #fdecec;
  --grid: #e6e9ed; --low: #f1f5fb; --high: #14508f;
  --c0: #2a6fdb; --c1: #d9622b; --c2: #1a8f5f; --c3: #8a4fd0; --c4: #c23b75; --c5: #8a6d10;
  --c6: #11889b; --c7: #6b7280; --c8: #5c7cfa; --c9: #b4530a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #111418; --card: #1a1e24; --ink: #e8ebef; --soft: #9aa4b1; --line: #2d343d;
    --accent: #6aa3ff; --good: #4cc38a; --warn: #e0ab3d; --bad: #ff7b72; --badbg: #35191b;
    --grid: #2a3038; --low: #1c232c; --high: #7db4ff;
    --c0: #6aa3ff; --c1: #ff9a5c; --c2: #4cc38a; --c3: #b793f5; --c4: #f482b0; --c5: #d8b13c;
    --c6: #4fc1d3; --c7: #a1a9b5; --c8: #93a8ff; --c9: #e39b52;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main, header { max-width: 1500px; margin: 0 auto; padding: 0 clamp(12px, 2.5vw, 32px); }
header { padding-top: 20px; }
h1 { font-size: 1.45rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 28px 0 10px; }
h3 { font-size: .92rem; margin: 0 0 4px; font-weight: 600; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
section { scroll-margin-top: 52px; }
.tools { margin-bottom: 10px; }
.alert { margin-top: 10px; }
.small { font-size: .83rem; }
.wrap { overflow-wrap: anywhere; }
.row { display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: center; }
.badge { border-radius: 99px; padding: 2px 11px; font-size: .82rem; font-weight: 600;
  border: 1px solid currentColor; white-space: nowrap; }
.running { color: var(--accent); } .finished { color: var(--good); }
.stopped, .warning { color: var(--warn); } .failed, .error { color: var(--bad); }
.info { color: var(--accent); }
.bar { height: 8px; border-radius: 99px; background: var(--line); margin: 14px 0;
  overflow: hidden; }
.bar div { height: 100%; background: var(--accent); border-radius: 99px; }
.tiles { display: grid; gap: 10px; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 14px; min-width: 0; }
.tile b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
.tile span { color: var(--soft); font-size: .8rem; overflow-wrap: anywhere; }
nav { position: sticky; top: 0; z-index: 5; background: var(--page); padding: 8px 0;
  margin-top: 14px;  border-bottom: 1px solid var(--line); overflow-x: auto; white-space: nowrap; }
nav button { border: 0; background: none; padding: 5px 9px; }
button, input, select { font: inherit; color: inherit; }
button, select, input[type=search] { background: var(--card); border: 1px solid var(--line);
  border-radius: 7px; padding: 4px 10px; }
button { cursor: pointer; }
button:hover, nav button:hover { color: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
button[aria-pressed=true] { border-color: var(--accent); color: var(--accent); }
.chips { display: flex; flex-wrap: wrap; gap: 6px; max-height: 132px; overflow-y: auto;
  margin-bottom: 10px; }
.chips button { padding: 1px 9px; border-radius: 99px; font-size: .82rem; }
.chips button[aria-pressed=false] { opacity: .5; text-decoration: line-through; }
.chips i { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 6px; }
.grid { display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); }
.chart { height: 280px; }
.tall { height: min(560px, 80vw); }
.scroll { overflow: auto; max-height: 480px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: .88rem; }
th, td { text-align: left; padding: 4px 10px 4px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: break-word; }
th { position: sticky; top: 0; background: var(--card); color: var(--soft); font-weight: 600; }
th button { border: 0; padding: 0; background: none; font-weight: 600; text-align: left; }
td.n, th.n { text-align: right; white-space: nowrap; }
tr.worst td { background: var(--badbg); }
td.best { font-weight: 700; color: var(--good); }
.value { display: block; max-height: 7.5em; overflow: auto; white-space: pre-wrap; }
pre { margin: 6px 0 0; overflow: auto; max-height: 440px; font: .82rem/1.45 ui-monospace, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.panel { border-left: 4px solid var(--bad); background: var(--badbg); margin: 14px 0; }
.pictures img { width: 100%; height: 240px; object-fit: contain; cursor: zoom-in;
  background: var(--low); border-radius: 6px; }
figure { margin: 0; } figcaption { font-size: .83rem; color: var(--soft); overflow-wrap: anywhere; }
dialog { border: 0; padding: 8px; background: var(--card); max-width: 97vw; max-height: 97vh; }
dialog img { display: block; max-width: 94vw; max-height: 92vh; }
dialog::backdrop { background: rgb(0 0 0 / .7); }
footer { color: var(--soft); font-size: .8rem; padding: 28px 0; }
@media print { nav, .tools { display: none; } .scroll { max-height: none; } }
"""
