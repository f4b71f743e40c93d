"""The built-in families, installed as ``phireg_plugins``.

Each package imports only ``phireg.api`` (and the FAMILY it derives from), and is registered through
the same entry-point group as third-party plugins. ``reference`` has what the reference models of
families share that transformers has no class for.
"""
