"""Encodes conversations for supervised fine-tuning into token ids and a loss mask.

A line is {"messages": [{"role": ..., "content": ...}, ...]} or {"prompt": ..., "response": ...}.
The loss covers the responses, each with the end id after it, and nothing else. Each part is
tokenized separately, so the mask changes only between tokens, at the place where a prompt ends in
generation. Not covered: packing (instruction_dataset.py), tool calls and images.
"""

from collections.abc import Sequence
from typing import Any

import numpy

from megatron_ponder.data.documents import DocumentError, RawDocument
from megatron_ponder.data.encoding import Encoded, Encoder, Stream, token_dtype, tokenize_batch
from megatron_ponder.data.tokenizers import Tokenizer

IDS_STREAM, MASK_STREAM = "instruction_document", "instruction_loss_mask"
HEADERS = {
    "system": "",
    "user": "### Instruction:\n",
    "assistant": "### Response:\n",
}
"""Text before a message, by role. Every message but a response is followed by a blank line."""
Part = tuple[str, bool]
"""A text, and whether the loss covers it."""


class ConversationEncoder(Encoder):
    """Encodes conversations into ids and a loss mask."""

    keys = ("messages", "prompt", "response", "role", "content")

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self._dtype = token_dtype(tokenizer.vocab_size)
        self.streams = [Stream(IDS_STREAM, self._dtype), Stream(MASK_STREAM, numpy.uint8)]

    def encode(self, documents: Sequence[RawDocument]) -> list[Encoded]:
        """See Encoder."""
        parsed = [_try_parts(document) for document in documents]
        parts = [part for each in parsed if isinstance(each, list) for part in each]
        ids = iter(tokenize_batch(self.tokenizer, [text for text, _ in parts]))
        results: list[Encoded] = []
        for document, each in zip(documents, parsed, strict=True):
            if isinstance(each, DocumentError):
                results.append(each)
            else:
                results.append(self._joined(document, each, [next(ids) for _ in each]))
        return results

    def _joined(
        self, document: RawDocument, parts: list[Part], ids: list[list[int] | str]
    ) -> Encoded:
        """Concatenate the parts of one conversation into its ids and its mask."""
        tokens = list(self.tokenizer.begin)
        mask = [0] * len(tokens)
        for (text, is_learned), mine in zip(parts, ids, strict=True):
            if isinstance(mine, str):
                return document.error("not_tokenized", mine)
            self.count_losses([text], [mine])
            mine = [*mine, self.tokenizer.eod] if is_learned else mine
            tokens += mine
            mask += [int(is_learned)] * len(mine)
        return [numpy.array(tokens, self._dtype), numpy.array(mask, numpy.uint8)]


def conversation_parts(document: RawDocument) -> list[Part]:
    """The texts of a conversation in order, and whether the loss covers each.

    Raises:
        DocumentError: the document is not a conversation, or has no response.
    """
    record = document.record()
    if "messages" not in record:
        turns = [("user", "prompt", record), ("assistant", "response", record)]
    else:
        messages = record["messages"]
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise document.error("bad_conversation", "key 'messages' is not a list of objects")
        turns = [(_role(document, message), "content", message) for message in messages]
    parts: list[Part] = []
    for role, key, source in turns:
        text = document.text_of(source, key)
        if role != "assistant":
            parts.append((f"{HEADERS[role]}{text}\n\n", False))
            continue
        if not text:
            raise document.error("empty", "an empty response")
        parts += [(HEADERS[role], False), (text, True)]
    if not any(is_learned for _, is_learned in parts):
        raise document.error(
            "no_response", "no message has the role assistant, so there is nothing to train on"
        )
    return parts


def _role(document: RawDocument, message: dict[str, Any]) -> str:
    role = message.get("role")
    if not isinstance(role, str) or role not in HEADERS:
        raise document.error(
            "bad_conversation", f"role {role!r} is not one of {', '.join(HEADERS)}"
        )
    return role


def _try_parts(document: RawDocument) -> list[Part] | DocumentError:
    try:
        return conversation_parts(document)
    except DocumentError as error:
        return error
