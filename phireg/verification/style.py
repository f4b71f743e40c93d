"""Style of the verification report's own charts."""

CSS = """
.dot.attention { fill: var(--a); } .dot.mlp { fill: var(--m); } .dot.end-part { fill: var(--ink); }
.dot.wrong { stroke: var(--bad); stroke-width: 3; }
.own-run { fill: none; stroke: var(--own); stroke-width: 2; } .own-dot { fill: var(--own); }
.errors { fill: none; stroke: var(--a); stroke-width: 1.4; }
.threshold { stroke: var(--soft); stroke-dasharray: 2 3; }
.threshold-text { fill: var(--ink); paint-order: stroke; stroke: var(--card); stroke-width: 4px; }
.cell.near { fill: var(--near); } .cell.stripe { fill: var(--stripe); }
.cell.unseen { fill: var(--unseen); }
"""
