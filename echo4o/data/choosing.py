"""Which group the next row comes from: by weights or fixed shares, of the samples or of the tokens, at a step.

By samples (upstream's way) every draw is independent: a hash of (data_seed, consumer, number of the draw) falls into
the share of a group. By tokens, each group has an account: every row drawn is charged to its group and credited to all
groups by their shares, so that an account tells how many tokens the group lies behind its share. A group is drawn with
a probability proportional to how far it lies behind, looking one longest row ahead. A group that is ahead by more is
not drawn, so that after T tokens each of k groups is within 2 · k longest rows of its share of T.

Groups that count samples beside groups that count tokens have one account together: the tokens that the others leave.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from echo4o.data.errors import DataError
from echo4o.data.sources.base import SourceGroup

#: Account of all groups that count samples.
_SAMPLES = ""


def shares_at(groups: Sequence[SourceGroup], step: int) -> dict[str, float]:
    """Share of every group that is drawn at a step, above 0; they add up to 1. ``replay_share`` goes first, weights
    share the rest."""
    fixed = {group.name: group.replay_share for group in groups if group.replay_share}
    weights = {group.name: group.weight_at(step) for group in groups if group.replay_share is None}
    total, rest = sum(weights.values()), 1 - sum(fixed.values())
    shares = {name: weight / total * rest for name, weight in weights.items() if weight > 0} | fixed
    return {group.name: share for group in groups if (share := shares.get(group.name, 0.0)) > 0}


def check_shares(groups: Sequence[SourceGroup]) -> None:
    """Raises DataError unless groups can be drawn at every step by these weights and shares."""
    names = [group.name for group in groups]
    if len(set(names)) != len(names):
        raise DataError(f"group names must differ: {', '.join(names)}")
    weights = {group.name: group.lowest_weight for group in groups}
    if any(weight < 0 for weight in weights.values()):
        raise DataError(f"group weights must not be negative: {weights}")
    fixed = {group.name: group.replay_share for group in groups if group.replay_share is not None}
    listed = ", ".join(f"{name} {share:g}" for name, share in fixed.items())
    total = sum(fixed.values())
    weighted = [group for group in groups if group.replay_share is None]
    if total > 1 + 1e-9:
        raise DataError(f"the replay_share of all groups together is {total:g}, more than 1 ({listed}); lower them")
    if total > 1 - 1e-9 and any(group.can_be_drawn for group in weighted):
        raise DataError(
            f"replay_share takes everything ({listed}), so that nothing is left for groups with a weight; lower it"
        )
    if total > 1 - 1e-9:
        return
    for step in sorted({0, *(step for group in weighted for step in group.schedule_steps)}):
        if any(group.weight_at(step) > 0 for group in weighted):
            continue
        if fixed:
            raise DataError(
                f"replay_share takes {total:g} ({listed}), and no other group has a weight above 0 "
                f"{f'at step {step} ' if step else ''}for the rest; add 'weight: 1' to one of them"
            )
        if step or any(group.can_be_drawn for group in weighted):
            raise DataError(
                f"no group has a weight above 0 from step {step} on "
                f"({'; '.join(f'{group.name}: {group.describe_share()}' for group in weighted)}); "
                "raise one of them there"
            )
        raise DataError(
            f"no group has a weight above 0 (groups: {', '.join(names) or 'none'}); add 'weight: 1' to one of them"
        )


class GroupChoice:
    """Draws groups for one consumer.

    Args:
        groups: as `check_shares` allows them.
        consumer: whose draws these are.
        data_seed: of the run.
        longest_row: tokens that a row can have at most.
    """

    def __init__(self, groups: Sequence[SourceGroup], consumer: int, data_seed: int, longest_row: int) -> None:
        self._groups = list(groups)
        self._consumer = consumer
        self._data_seed = data_seed
        self._longest_row = longest_row
        self._account_of = {g.name: g.name if g.weight_by == "tokens" else _SAMPLES for g in groups if g.can_be_drawn}
        self.counts_tokens = any(account != _SAMPLES for account in self._account_of.values())
        self._balances = dict.fromkeys(self._account_of.values(), 0.0)
        self._scheduled = any(group.schedule_steps for group in groups)
        self._shares: dict[str, float] = {}
        self._by_account: dict[str, float] = {}
        self.num_draws = 0
        self._step: int | None = None
        self._set_shares(0)

    def phase_begins(self, step: int) -> bool:
        """Whether an entry of a schedule begins at `step`, or after the step of the pack before and up to there."""
        before = self._step
        entries = {entry for group in self._groups for entry in group.schedule_steps}
        return before is not None and any(before < entry <= step for entry in entries)

    def begin_pack(self, step: int) -> None:
        """Draw by the weights of `step` from now on."""
        if self._scheduled:
            self._step = step
            self._set_shares(step)

    def _set_shares(self, step: int) -> None:
        self._shares = shares_at(self._groups, step)
        self._by_account = {}
        for name, share in self._shares.items():
            account = self._account_of[name]
            self._by_account[account] = self._by_account.get(account, 0.0) + share

    def draw(self) -> str:
        """Name of the next group."""
        number, self.num_draws = self.num_draws, self.num_draws + 1
        place = self._uniform(f"{number}")
        if not self.counts_tokens:
            return _at(place, self._shares)
        self._share_out_closed_accounts()
        behind = {account: self._lies_behind(account) for account in self._by_account}
        behind = {account: num_tokens for account, num_tokens in behind.items() if num_tokens > 0}
        account = _at(place * sum(behind.values()), behind)
        if account != _SAMPLES:
            return account
        shares = {name: share for name, share in self._shares.items() if self._account_of[name] == _SAMPLES}
        return _at(self._uniform(f"{number}\0samples") * sum(shares.values()), shares)

    def _uniform(self, what: str) -> float:
        identity = f"{self._data_seed}\0{self._consumer}\0{what}".encode()
        return int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "big") / 2**64

    def _lies_behind(self, account: str) -> float:
        return self._balances[account] + self._by_account[account] * self._longest_row

    def _share_out_closed_accounts(self) -> None:
        """What groups of weight 0 have left goes to the others, or it would wait for them for ever."""
        for account, balance in self._balances.items():
            if balance and account not in self._by_account:
                self._balances[account] = 0.0
                self._credit(balance)

    def _credit(self, num_tokens: float) -> None:
        for account, share in self._by_account.items():
            self._balances[account] += num_tokens * share

    def counts(self, group: str) -> bool:
        """Whether a row that a mandatory group adds to a pack is charged: not where the group takes more than its
        share in this way alone. Such rows come in addition to the shares, which hold for the others."""
        account = self._account_of.get(group)
        return account in self._by_account and self._lies_behind(account) > 0

    def charge(self, group: str, num_tokens: int) -> None:
        """A row of a group was drawn; below 0: it is given back, and will be charged when it is drawn again."""
        if self.counts_tokens:
            self._balances[self._account_of[group]] -= num_tokens
            self._credit(num_tokens)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; without tokens to count and steps to follow it is the number of draws."""
        return {
            "draws": self.num_draws,
            **({"balances": dict(self._balances)} if self.counts_tokens else {}),
            **({"step": self._step} if self._scheduled else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Accounts begin at 0 where the state has others."""
        self.num_draws = state["draws"]
        if self._scheduled and (step := state.get("step")) is not None:
            self.begin_pack(step)
        balances = state.get("balances", {})
        self._balances = dict(balances) if set(balances) == set(self._balances) else dict.fromkeys(self._balances, 0.0)


def merged_balances(states: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """``balances`` of the sum of several states; nothing where none has any."""
    total: dict[str, float] = {}
    for state in states:
        for account, balance in state.get("balances", {}).items():
            total[account] = total.get(account, 0.0) + balance
    return {"balances": total} if total else {}


def _at(place: float, sizes: Mapping[str, float]) -> str:
    """The name at `place` of a line of pieces with these sizes."""
    names = list(sizes)
    for name, end in zip(names, accumulate(sizes.values()), strict=True):
        if place < end:
            return name
    return names[-1]
