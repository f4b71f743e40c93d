"""How much a quantization changes: measured on the executor, shown as a table and as a page."""
