"""Where the maps of a step lie, as planned: in the arena, in host memory, or both in turn."""

from collections.abc import Sequence

from torch import Tensor

from umtrain.streaming.plan import Plan
from umtrain.streaming.program import Program
from umtrain.streaming.schedule import Kind
from umtrain.streaming.storage import (
    PIECES,
    CopiedPlace,
    FilledPlace,
    HostBlock,
    HostMemory,
    HostPlace,
    Place,
    TensorPlace,
    in_arena,
)


class Places:
    """The places of one step: `content` by map, and the tensors of maps that are `outputs`.

    # Note: [Room that is still being copied from]
    # A map on its way to host memory stays in the arena until it is there. Whoever is next in the
    # same room waits for it; the plan says who that is, so nobody else does.
    """

    def __init__(
        self,
        program: Program,
        plan: Plan,
        arena: Tensor,
        host: HostMemory | None,
        inputs: Sequence[Tensor],
    ) -> None:
        self._program, self._plan, self._arena, self._host = program, plan, arena, host
        self._blocks: dict[int, HostBlock] = {}
        self._leaving: dict[int, CopiedPlace] = {}
        self.content: dict[int, Place] = {}
        self.outputs: dict[int, Tensor] = {}
        for index, tensor in zip(program.inputs, inputs, strict=True):
            self.content[index] = TensorPlace(tensor, program.maps[index].dtype)

    def hold(self, index: int, kind: Kind) -> None:
        """Give map `index` a place, for what is run forward or again."""
        schedule = self._plan.schedule
        if index not in schedule.forward:
            self.content[index] = self._output_place(index)
            return
        buffers = schedule.forward if kind == "forward" else schedule.backward
        self.content[index] = self.place(buffers[index], index)

    def _output_place(self, index: int) -> TensorPlace:
        self.outputs[index] = self._program.maps[index].empty(self._arena.device)
        return TensorPlace(self.outputs[index])

    def place(self, buffer: int, index: int) -> Place:
        """Return where a buffer lies that holds something of map `index`'s shape."""
        a_map, plan = self._program.maps[index], self._plan
        offset = plan.offsets[buffer]
        if offset is None:
            return HostPlace(self._block(buffer), a_map.shape, a_map.dtype, self._arena.device)
        room = self._room(offset, a_map.n_bytes)
        if plan.stays[buffer] == "kept":
            return in_arena(room, a_map.shape, a_map.dtype)
        place = CopiedPlace(room, self._block(buffer), a_map.shape, a_map.dtype)
        self._leaving[buffer] = place
        return place

    def _room(self, offset: int, n_bytes: int) -> Tensor:
        """Return a part of the arena; what is still being copied from there is waited for."""
        room = self._arena[offset : offset + n_bytes]
        start, stop = room.data_ptr(), room.data_ptr() + n_bytes
        for buffer, place in list(self._leaving.items()):
            first = place.room.data_ptr()
            if first < stop and start < first + place.room.nbytes:
                self._settle(buffer)
        return room

    def _settle(self, buffer: int) -> None:
        place = self._leaving.pop(buffer, None)
        if place is not None:
            place.settle()

    def _block(self, buffer: int) -> HostBlock:
        if buffer not in self._blocks:
            assert self._host is not None
            n_bytes = self._plan.schedule.buffers[buffer].n_bytes
            self._blocks[buffer] = self._host.take(n_bytes)
        return self._blocks[buffer]

    def resume(self, action: int) -> None:
        """Let swapped maps that are to be on the device from an action on come back."""
        plan = self._plan
        coming: list[FilledPlace] = []
        for index, buffer in plan.schedule.backward.items():
            resumption = plan.resumed.get(buffer)
            if resumption is not None and resumption.action == action:
                a_map = self._program.maps[index]
                room = self._room(resumption.offset, a_map.n_bytes)
                self._settle(buffer)
                coming.append(FilledPlace(room, self._block(buffer), a_map.shape, a_map.dtype))
                self.content[index] = coming[-1]
        for piece in range(PIECES):
            for place in coming:
                place.start_piece(piece)
