"""Style of the summarization report: its colours by backend, its articles side by side."""

CSS = """
:root { --b0: var(--a); --b1: var(--m); --b2: #7a5cc4; --b3: #2a9d8f; }
@media (prefers-color-scheme: dark) { :root { --b2: #b49cf0; --b3: #5ccabb; } }
.bar0 { fill: var(--b0); } .bar1 { fill: var(--b1); } .bar2 { fill: var(--b2); }
.bar3 { fill: var(--b3); } .value { fill: var(--ink); font-size: 12px; }
.middle-line { stroke: var(--ink); stroke-width: 2; }
ul.checks { margin: 10px 0 0; } ul.checks li { border-color: var(--good); }
ul.checks li.failed { border-color: var(--bad); color: var(--bad); }
.note { margin-top: 10px; color: var(--skip); }
.article { border-top: 1px solid var(--rule); padding: 14px 0 16px; break-inside: avoid; }
.article:first-of-type { border-top: 0; }
.article h3 { font-size: 15px; margin: 0 0 8px; display: flex; gap: 14px; flex-wrap: wrap; }
.article h3 span { font-weight: 400; color: var(--soft); font-variant-numeric: tabular-nums; }
.side { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr));
  gap: 12px 22px; }
.side h4 { font-size: 12px; font-weight: 600; margin: 0 0 3px; color: var(--soft); }
.side h4 i, td i { display: inline-block; width: 10px; height: 10px; border-radius: 2px;
  margin-right: 6px; }
.side p { white-space: pre-wrap; overflow-wrap: anywhere; }
mark { background: none; color: inherit; text-decoration: underline wavy var(--bad) 1px;
  text-underline-offset: 3px; }
td:first-child { white-space: nowrap; }
details { margin-top: 10px; } summary { color: var(--soft); cursor: pointer; font-size: 13px; }
details p { white-space: pre-wrap; overflow-wrap: anywhere; margin-top: 6px; color: var(--soft);
  font-size: 14px; }
"""
