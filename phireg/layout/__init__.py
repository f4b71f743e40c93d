"""The layout algebra: where every row and column of a target tensor comes from.

A weight transform of this field is an index map over blocks of rows (or columns). Written down as
data, its tensor-parallel shards and the check that nothing is lost or doubled are derived
(``spans``). ``axes`` builds index maps in the field's vocabulary, ``rules`` names the target
modules they belong to, ``ranks`` divides those over ranks. Standard library only.
"""
