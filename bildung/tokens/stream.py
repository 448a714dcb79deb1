"""Text as it is generated, token by token, without torn characters.

One character may span several tokens (an emoji is four bytes in a byte-level vocabulary), and a token's text may depend
on its neighbour (SentencePiece drops the first space). So a few earlier tokens are decoded again with each new one, and
text that ends in an unfinished character is held back.
"""

from __future__ import annotations

from bildung.tokens.tokenizer import Tokenizer


class StreamDecoder:
    """`push` returns the text that a token completes; `flush` what was held back at the end.

    The pieces joined are `tokenizer.decode(all ids)`, but for one case: SentencePiece's decoder turns a whole run of
    byte tokens into U+FFFD when any of it is not UTF-8, and the sound part of the run has been shown by then.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False):
        self.tokenizer = tokenizer
        self.skip_special = skip_special
        self.context: list[int] = []  # tokens already shown: what the next ones are decoded after
        self.held: list[int] = []  # tokens not shown yet

    def _texts(self) -> tuple[str, str]:
        """Text of the context alone, and with the held tokens."""
        before = self.tokenizer.decode(self.context, skip_special=self.skip_special)
        return before, self.tokenizer.decode(self.context + self.held, skip_special=self.skip_special)

    def push(self, token: int) -> str:
        """The text that became complete with this token, often of one token, sometimes empty."""
        self.held.append(token)
        before, after = self._texts()
        if after.endswith("\ufffd"):  # an unfinished character, or a real U+FFFD: shown once it is certain
            return ""
        # Context that decodes to nothing (a skipped special token) would not keep the next token's leading space.
        context = (
            self.held
            if self.tokenizer.decode(self.held, skip_special=self.skip_special)
            else [
                *self.context,
                *self.held,
            ]
        )
        self.context, self.held = context, []
        return after[len(before) :]

    def flush(self) -> str:
        """The rest, with U+FFFD for a character that never came to its end."""
        before, after = self._texts()
        self.context, self.held = [], []
        return after[len(before) :]
