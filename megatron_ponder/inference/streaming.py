"""Ids that become text one by one, never a part of a character.

A token may be some bytes of a character, and what it reads as may depend on the token before (a
blank, for one). So a token is decoded together with those before it, and what cannot be told yet is
held back. Only the last few tokens are decoded again, however long the text.
"""

from collections.abc import Sequence

from megatron_ponder.data.tokenizers import Tokenizer

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for bytes that are no character (yet)."""


class TextStream:
    """The text behind a prompt, piece by piece.

    Args:
        tokenizer: decodes.
        prompt: ids before the first; not shown.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._context = 0
        """From here on ids are decoded again."""
        self._shown = len(self._ids)
        """Ids before this are in what was returned."""

    def add(self, token: int) -> str:
        """What one more id makes certain; empty in the middle of a character."""
        self._ids.append(token)
        text = self._tokenizer.detokenize(self._ids[self._context :])
        return "" if text.endswith(INCOMPLETE) else self._show(text)

    def finish(self) -> str:
        """What was held back, with a mark for bytes that never became a character."""
        return self._show(self._tokenizer.detokenize(self._ids[self._context :]))

    def _show(self, text: str) -> str:
        """The part of `text` that is new."""
        before = self._tokenizer.detokenize(self._ids[self._context : self._shown])
        self._context, self._shown = self._shown, len(self._ids)
        return text[len(before) :]
