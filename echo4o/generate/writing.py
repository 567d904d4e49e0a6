"""Text from contexts, decoded together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from echo4o.data.tokenizer import Tokenizer
from echo4o.generate.context import Addition, Context, KVPool, Reader, Text
from echo4o.generate.presets import Settings
from echo4o.generate.state import State

FIRST_BLOCK = 64


@dataclass
class _Text:
    """A text being written, begin marker first. Its rows lie in blocks, each twice as long as the one before: the keys
    of texts that are written together would else lie one token by one, and attention would go through as many ranges.
    """

    state: State
    context: Context
    ids: list[int]
    at: int = 0  # the next row, of those up to `end`
    end: int = 0
    block: int = FIRST_BLOCK

    @property
    def is_full(self) -> bool:
        return len(self.ids) >= self.state.request.settings.max_think_tokens

    def next_row(self, pool: KVPool) -> int:
        if self.at == self.end:
            rows = min(self.block, self.state.request.settings.max_think_tokens - len(self.ids) + 1)
            self.at, self.block = pool.allocate(rows), 2 * self.block
            self.end = self.at + rows
        self.at += 1
        return self.at - 1


def write(reader: Reader, tokenizer: Tokenizer, states: Sequence[State]) -> None:
    """Text from every state's full context, decoded together; a request that has ended takes no more part. The pool
    keeps nothing of the texts."""
    pool = reader.pool
    length = pool.length
    texts = [_Text(state, state.full, [reader.markers.bos_token_id]) for state in states]
    running = texts
    while running := [text for text in running if not text.is_full]:
        additions = [Addition(text.context, Text((text.ids[-1],)), text.next_row(pool)) for text in running]
        contexts, hidden = reader.extend(additions)
        logits = reader.logits(torch.cat(hidden))
        going_on = []
        for text, context, row in zip(running, contexts, logits, strict=True):
            token = _choose(row, text.state.request.settings, text.state.generator)
            text.context = context
            if token != reader.markers.eos_token_id:
                text.ids.append(token)
                going_on.append(text)
        running = going_on
    pool.length = length
    for text in texts:
        text.state.text = tokenizer.decode(text.ids[1:])


def _choose(logits: Tensor, settings: Settings, generator: Generator) -> int:
    """The next token: the likeliest, or drawn from the smallest set of likeliest tokens of probability top_p."""
    if not settings.do_sample:
        return int(logits.argmax())
    probabilities, tokens = (logits.cpu() / settings.temperature).softmax(-1).sort(descending=True)
    kept = probabilities.cumsum(0) - probabilities < settings.top_p
    drawn = torch.multinomial(probabilities * kept, 1, generator=generator)
    return int(tokens[drawn])
