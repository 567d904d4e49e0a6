"""Text from contexts, decoded together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from echo4o.data.tokenizer import Tokenizer
from echo4o.generate.context import Addition, Reader, Text
from echo4o.generate.presets import Settings
from echo4o.generate.state import State


def write(reader: Reader, tokenizer: Tokenizer, states: Sequence[State]) -> None:
    """Text from every state's full context, decoded together; a request that has ended takes no more part."""
    running = {number: [reader.markers.bos_token_id] for number in range(len(states))}
    contexts = {number: state.full for number, state in enumerate(states)}
    finished: dict[int, list[int]] = {}
    while running:
        for number in [n for n, ids in running.items() if len(ids) >= states[n].request.settings.max_think_tokens]:
            finished[number] = running.pop(number)
        if not running:
            break
        order = list(running)
        additions = [Addition(contexts[number], Text((running[number][-1],))) for number in order]
        after, hidden = reader.extend(additions)
        logits = reader.logits(torch.cat([rows[-1:] for rows in hidden]))
        for number, context, row in zip(order, after, logits, strict=True):
            state = states[number]
            token = _choose(row, state.request.settings, state.generator)
            contexts[number] = context
            if token == reader.markers.eos_token_id:
                finished[number] = running.pop(number)
            else:
                running[number].append(token)
    for number, state in enumerate(states):
        state.text = tokenizer.decode(finished[number][1:])


def _choose(logits: Tensor, settings: Settings, generator: Generator) -> int:
    """The next token: the likeliest, or drawn from the smallest set of likeliest tokens of probability top_p."""
    if not settings.do_sample:
        return int(logits.argmax())
    probabilities, tokens = (logits.cpu() / settings.temperature).softmax(-1).sort(descending=True)
    kept = probabilities.cumsum(0) - probabilities < settings.top_p
    drawn = torch.multinomial(probabilities * kept, 1, generator=generator)
    return int(tokens[drawn])
