"""Text as it comes, token by token: every piece whole, all pieces together the text."""

from __future__ import annotations

from phireg.generation.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"


class Pieces:
    """Turns the tokens of one text into pieces that can be shown at once.

    A character of several bytes may take several tokens; it is held back until it is whole. What
    a token looks like may depend on the one before it (a leading space), so that each is decoded
    together with those of the piece before; special tokens are no text.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []  # the tokens of the last piece
        self._new: list[int] = []

    def push(self, token: int) -> str:
        """Take the next token.

        Returns:
            What can be shown now; often empty.
        """
        self._new.append(token)
        piece = self._piece()
        if not piece or piece.endswith(_UNFINISHED):
            return ""
        self._shown, self._new = self._new, []
        return piece

    def finish(self) -> str:
        """What is left when no more tokens come, broken characters included."""
        piece = self._piece()
        self._shown, self._new = [], []
        return piece

    def _piece(self) -> str:
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._new)[len(before) :]
