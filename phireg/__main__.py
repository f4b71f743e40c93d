"""``python -m phireg`` is ``phireg``."""

from phireg.cli import main

main()
