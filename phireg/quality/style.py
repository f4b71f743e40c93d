"""Style of the quantization report's own pictures: the warmer, the worse."""

_LIGHT = ("#eceae5", "#fbe9c4", "#f8d48f", "#f2ad60", "#e38140", "#c94f33", "#8f1f2c")
_DARK = ("#2a3038", "#453d29", "#67501f", "#946620", "#c47a2e", "#e8754a", "#ff9a8c")
_DARK_TEXT_FROM = 4


def _variables(colours: tuple[str, ...]) -> str:
    return " ".join(f"--h{n}: {colour};" for n, colour in enumerate(colours))


_CLASSES = "\n".join(
    f".heat{n} {{ fill: var(--h{n}); }} "
    f".on{n} {{ fill: var(--{'strong' if n >= _DARK_TEXT_FROM else 'ink'}); }}"
    for n in range(len(_LIGHT))
)

CSS = f"""
:root {{ {_variables(_LIGHT)} --strong: #fff; }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(_DARK)} --strong: #14171b; }} }}
{_CLASSES}
h3 {{ font-size: 15px; margin: 20px 0 0; }} h3 + p {{ font-size: 13px; }}
.states {{ fill: none; stroke: var(--a); stroke-width: 1.6; }} .state {{ fill: var(--a); }}
.numbers {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr));
  gap: 10px 22px; margin-top: 6px; }}
.numbers b {{ display: block; font-size: 22px; font-weight: 600; line-height: 1.25;
  font-variant-numeric: tabular-nums; }}
.numbers span {{ color: var(--soft); font-size: 13px; }}
"""
