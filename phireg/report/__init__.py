"""Self-contained HTML pages: style sheet, SVG vocabulary, and a file that appears whole."""
