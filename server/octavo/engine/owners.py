"""Which front end each request belongs to, for an engine that has several. Knows ids and numbers;
nothing of sockets."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from octavo.types import EngineOutput, EngineOutputs, EngineRequest


class Owners:
    """Request ids are unique among all front ends."""

    def __init__(self) -> None:
        self._owners: dict[str, int] = {}  # request id -> front end's number

    def add(self, requests: Sequence[EngineRequest], *, owner: int) -> None:
        self._owners.update((request.request_id, owner) for request in requests)

    def of(self, owner: int) -> tuple[str, ...]:
        """Ids of a front end's requests that have not ended."""
        return tuple(i for i, number in self._owners.items() if number == owner)

    def shares(
        self, outputs: EngineOutputs, *, owners: Collection[int]
    ) -> dict[int, EngineOutputs]:
        """A step's news as each of ``owners`` is told them: its requests', and all statistics.
        Requests that ended are forgotten."""
        shares: dict[int, list[EngineOutput]] = {owner: [] for owner in owners}
        for output in outputs.outputs:
            owner = self._owners.get(output.request_id, -1)
            if owner in shares:
                shares[owner].append(output)
            if output.finish_reason is not None:
                self._owners.pop(output.request_id, None)
        return {
            owner: EngineOutputs(outputs=tuple(share), stats=outputs.stats)
            for owner, share in shares.items()
        }
