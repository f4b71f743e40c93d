"""The built-in families, installed as ``phireg_plugins``.

Each package is self-contained, imports only ``phireg.api`` (or the FAMILY it derives from), and is
registered through the entry-point group any other distribution uses.
"""
