"""The style sheet of all pages: light and dark, for screens and paper, nothing fetched."""

CSS = """
:root { color-scheme: light dark; --paper: #fbfaf8; --card: #fff; --ink: #1d2126; --soft: #69707a;
  --rule: #e4e2dd; --good: #1a7f4b; --bad: #c0342b; --skip: #8a6d1a; --a: #2f6fde; --m: #d9822b;
  --own: #8b93a1; --tint: rgba(192, 52, 43, .06); --unseen: #eceae5; --stripe: #d9822b;
  --near: #2f6fde; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --card: #1c2026; --ink: #e7e9ec;
  --soft: #99a1ad; --rule: #2d333b; --good: #4cc38a; --bad: #f0766d; --skip: #d9b44a; --a: #6ea8ff;
  --m: #f0a45d; --own: #6c7584; --tint: rgba(240, 118, 109, .09); --unseen: #262b32;
  --stripe: #f0a45d; --near: #4d86dd; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 36px 20px 60px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 18px; margin: 0 0 2px; }
p { margin: 0; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
.verdict { border-left: 6px solid var(--good); padding: 2px 0 4px 20px; margin-bottom: 28px; }
.verdict.failed { border-color: var(--bad); }
.verdict .word { font-weight: 650; color: var(--good); font-size: 15px; text-transform: uppercase;
  letter-spacing: .08em; }
.verdict.failed .word { color: var(--bad); }
.verdict .finding { margin-top: 10px; font-size: 17px; overflow-wrap: anywhere; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 20px 24px; margin-top: 18px; break-inside: avoid; }
section > p.soft { margin-bottom: 14px; max-width: 78ch; }
.check { display: grid; grid-template-columns: 26px 1fr auto; gap: 0 10px; padding: 11px 0;
  border-top: 1px solid var(--rule); }
.check:first-of-type { border-top: 0; }
.check > .mark { font-weight: 700; font-size: 17px; line-height: 22px; }
.passed .mark { color: var(--good); } .failed .mark { color: var(--bad); }
.skipped .mark { color: var(--skip); }
.check .name { font-weight: 600; } .check .time { color: var(--soft); font-size: 13px; }
ul { margin: 6px 0 0; padding: 0; list-style: none; }
li { padding: 5px 0 5px 12px; border-left: 3px solid var(--bad); margin-top: 5px; }
li.note { border-color: var(--rule); color: var(--soft); padding-block: 1px; }
code { font: 13px/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
li code { display: block; }
.hint { color: var(--soft); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  margin-bottom: 16px; }
th { text-align: left; font-weight: 500; color: var(--soft); font-size: 13px; }
th, td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--rule); }
th.n, td.n { text-align: right; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 20px; margin: 8px 0 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; color: var(--soft);
  margin: 4px 0 8px; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 5px;
  margin-right: 6px; }
.legend i.square { border-radius: 2px; } .legend i.bar { height: 2px; width: 18px;
  vertical-align: 4px; border-radius: 0; }
.scroll { overflow-x: auto; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; }
.scroll svg { min-width: 640px; }
.tick { fill: var(--soft); font-size: 12px; } .power { font-size: 9px; }
.middle { text-anchor: middle; } .end { text-anchor: end; } .start { text-anchor: start; }
.grid { stroke: var(--rule); } .limit { stroke: var(--bad); stroke-dasharray: 5 4; }
.limit-text { fill: var(--bad); } .over { fill: var(--tint); }
.callout { fill: var(--bad); font-weight: 600; font-size: 14px; paint-order: stroke;
  stroke: var(--card); stroke-width: 4px; }
@media (max-width: 560px) { section { padding: 16px; } .check .time { display: none; }
  dl { display: block; } dd { margin-bottom: 8px; } }
"""
