"""The backward pass of a session: gradients of weights and inputs, strip by strip.

The derivation is in README.md beside this file; names are the same.

# Note: [Rows that are done]
# A row of an operation's input gets its gradient from several output rows, so from two strips of
# them at a strip's edge. Strips run downwards: after one, all rows above the first that the next
# one reads are done and go on to the maps behind the expression. The rest is carried over.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from umtrain.streaming.forward import Session, finish
from umtrain.streaming.kernels import arithmetic_dtype
from umtrain.streaming.norms import NormGradient, gradient_of
from umtrain.streaming.operations import GlobalPooling, Gradients
from umtrain.streaming.pointwise import Finisher, Sink
from umtrain.streaming.program import Segment, Term, terms_of
from umtrain.streaming.rows import Strip, clipped
from umtrain.streaming.schedule import is_unscaled
from umtrain.streaming.storage import Cursor, Place, TensorPlace
from umtrain.streaming.wholeness import Learned, parameters_whole_after

OnGradient = Callable[[nn.Parameter, Tensor], bool]


@dataclass(frozen=True)
class _Piece:
    """One strip of a segment: its output rows, the input rows they read, those done after it."""

    out: Strip
    read: Strip
    done: Strip


class Backward:
    """Runs once; afterwards `parameters` (by identity) and `inputs` (by map) hold gradients.

    `on_gradient` is told of each parameter's as soon as it is whole; what it takes is not held.
    """

    def __init__(
        self,
        session: Session,
        given: Sequence[Tensor | None],
        on_gradient: OnGradient = lambda parameter, gradient: False,
    ) -> None:
        self._session, self._program = session, session.program
        self._on_gradient = on_gradient
        self._compiled = session.compiled
        self._needs = session.compiled.needs
        self._given = dict(zip(session.program.outputs, given, strict=True))
        self._gradients: dict[int, Place] = {}
        self._started: set[int] = set()
        self._of_norm: dict[int, NormGradient] = {}
        self._wants = (False, False, False)  # of the segment that runs
        self._unscaled: frozenset[Term] = frozenset()
        self.parameters: dict[int, Tensor] = {}
        self.inputs: dict[int, Tensor] = {}

    def run(self, progress: Callable[[int], None]) -> None:
        """Run the actions that follow forward."""
        actions = self._compiled.plan.schedule.actions
        whole_after = parameters_whole_after(self._program, actions)
        for index, action in enumerate(actions):
            if action.kind != "forward":
                self._session.places.resume(index)
            if action.kind == "again":
                self._session.run_forward(action)
            elif action.kind == "backward":
                self._run(self._program.segments[action.segment])
            for done in whole_after.get(index, ()):
                self._hand_over(done)
            if action.kind != "forward":
                progress(index)

    def _run(self, segment: Segment) -> None:
        session = self._session
        self._wants = self._wanted(segment)
        self._unscaled = frozenset(
            term for term in terms_of(segment.source) if is_unscaled(self._program, term)
        )
        pieces = self._pieces(segment)
        reads = session.source_cursors(segment, [piece.read for piece in pieces])
        dy = self._output_gradient(segment, pieces)
        targets = self._targets(segment, [piece.done for piece in pieces])
        carry: Tensor | None = None
        for i, piece in enumerate(pieces):
            fetched = {index: cursor.get(i) for index, cursor in reads.items()}
            dz, carry = self._strip(segment, piece, fetched, dy.get(i), carry)
            dy.release(i)
            if dz is not None and targets is not None and piece.done.n_rows:
                self._send(segment, piece, fetched, dz, targets, i)
        finish([*reads.values(), *dy.cursors, *(targets or {}).values()])
        self._started.update(targets or {})

    # Which rows -------------------------------------------------------------------------------

    def _pieces(self, segment: Segment) -> list[_Piece]:
        cut = self._session.strips_of(segment)
        return [self._piece(segment, strip, cut[-1].last) for strip in cut]

    def _piece(self, segment: Segment, strip: Strip, last_row: int) -> _Piece:
        """See Note: [Rows that are done]."""
        operation, (start, end) = segment.operation, segment.read_rows
        if operation is None:
            return _Piece(strip, strip, strip)
        first, last = operation.input_rows(strip.first, strip.last)
        following = end
        if strip.last < last_row:
            following = operation.input_rows(strip.last, strip.last + 1)[0]
        first, last = clipped(first, last, end, start)
        following = min(max(first, following), end)
        last = max(last, following)
        return _Piece(strip, strip.with_rows(first, last), strip.with_rows(first, following))

    # The gradient of the output ---------------------------------------------------------------

    def _output_gradient(self, segment: Segment, pieces: Sequence[_Piece]) -> "_OutputGradient":
        cut = [piece.out for piece in pieces]
        if segment.out is None:
            assert segment.pooled is not None
            given = self._given.get(("pooled", segment.pooled))
            if given is None:
                shape, _ = self._program.pooled[segment.pooled]
                given = torch.zeros(shape, device=self._compiled.device)
            if self._compiled.bands is not None:
                given = self._compiled.bands.gradient_of_whole(given)
            values = [
                self._session.pooled_gradient(segment, given, i, strip)
                for i, strip in enumerate(cut)
            ]
            return _OutputGradient([], values.__getitem__)
        return self._map_gradient(segment.out, cut)

    def _map_gradient(self, index: int, cut: Sequence[Strip]) -> "_OutputGradient":
        """Return what turns the stored gradient of a map into dy, as README.md derives it."""
        session, program = self._session, self._program
        dtype = program.maps[index].dtype
        given = self._given.get(("map", index))
        bands = self._compiled.bands
        if given is not None and bands is not None:
            given = bands.band_of(index, bands.gradient_of_whole(given))
        if index in self._gradients and bands is not None:
            bands.collect(index, self._gradients[index])
        summands: list[Place] = [] if given is None else [TensorPlace(given, dtype)]
        if index in self._gradients:
            summands.insert(0, self._gradients[index])
        cursors = [place.cursor(cut, reads=True, writes=False) for place in summands]
        content: Cursor | None = None
        own = program.gradient_norms[index]
        norms = [norm for norm in program.norms_of(index) if norm.index in session.coefficients]
        measured = [norm for norm in norms if norm.domain != "fixed"]
        if measured:
            content = session.places.content[index].cursor(cut, reads=True, writes=False)
        effects = [self._norm_gradient(norm.index) for norm in measured]
        if own is not None:
            scale = session.coefficients[own].scale
        else:
            wide = arithmetic_dtype(dtype)
            channels = program.maps[index].shape[1]
            scale = torch.ones(1, channels, dtype=wide, device=self._compiled.device)
        a = sum((effect.a for effect in effects), torch.zeros_like(scale, dtype=torch.float64))
        b = sum((effect.b for effect in effects), torch.zeros_like(scale, dtype=torch.float64))
        finisher = Finisher(self._compiled.kernels, scale, a, b)

        def dy(i: int) -> Tensor:
            if cursors:
                g = cursors[0].get(i)
                for cursor in cursors[1:]:
                    g = g + cursor.get(i)
            else:
                g = self._zeros(index, cut[i])
            if own is None and content is None:
                return g
            y = None if content is None else content.get(i)
            return finisher.finish(g, y, cut[i].image)

        return _OutputGradient([*cursors, *([content] if content else [])], dy)

    def _zeros(self, index: int, strip: Strip) -> Tensor:
        _, channels, _, columns = self._program.maps[index].shape
        return torch.zeros(
            (strip.image_end - strip.image, channels, strip.n_rows, columns),
            dtype=self._program.maps[index].dtype,
            device=self._compiled.device,
        ).contiguous(memory_format=torch.channels_last)

    # One strip --------------------------------------------------------------------------------

    def _strip(
        self,
        segment: Segment,
        piece: _Piece,
        fetched: dict[int, Tensor],
        dy: Tensor,
        carry: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradient of the rows that are done, and what is carried over."""
        operation = segment.operation
        if operation is None:
            return dy, None
        session = self._session
        z = session.padded(segment, operation, fetched, piece.out, piece.read)
        weights = session.weights_of(segment)
        wanted = self._wants
        found = operation.backward(dy, z, weights, piece.out.first, piece.out.last, wanted)
        self._enter_weights(segment, found, wanted)
        if found.source is None or not wanted[0]:
            return None, None
        return self._separate(segment, piece, found.source, carry)

    def _wanted(self, segment: Segment) -> tuple[bool, bool, bool]:
        module = segment.module
        source = any(self._needs.of_term(term) for term in terms_of(segment.source))
        weight = bias = False
        if module is not None:
            weight = isinstance(module.weight, Tensor) and module.weight.requires_grad
            bias = isinstance(module.bias, Tensor) and module.bias.requires_grad
        return source, weight, bias

    def _separate(
        self, segment: Segment, piece: _Piece, dz: Tensor, carry: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Cut padding off, add what was carried, and part what is done from what is not."""
        operation = segment.operation
        assert operation is not None
        start = operation.input_rows(piece.out.first, piece.out.last)[0]
        above = min(dz.shape[2], max(0, piece.read.first - start))
        dz = dz[:, :, above : above + piece.read.n_rows]
        if carry is not None:
            dz[:, :, : carry.shape[2]] += carry
        n_done = piece.done.n_rows
        if dz.shape[2] < n_done:  # rows that no window reads
            dz = nn.functional.pad(dz, (0, 0, 0, n_done - dz.shape[2]))
        rest = dz[:, :, n_done:]
        left = rest.clone(memory_format=torch.channels_last) if rest.shape[2] else None
        return dz[:, :, :n_done].contiguous(memory_format=torch.channels_last), left

    # To the maps behind -----------------------------------------------------------------------

    def _targets(self, segment: Segment, done: Sequence[Strip]) -> dict[int, Cursor] | None:
        """Return cursors on the gradients of the source maps; None if nothing is wanted."""
        if not self._wants[0]:
            return None
        targets = {}
        for index in segment.sources:
            if not self._needs.of_map[index]:
                continue
            if index not in self._gradients:
                self._gradients[index] = self._gradient_place(index)
            adds = index in self._started
            if self._compiled.bands is not None and not adds:
                a_map, rows = self._program.maps[index], (done[0].first, done[-1].last)
                self._compiled.bands.clear_unwritten(self._gradients[index], a_map, *rows)
            targets[index] = self._gradients[index].cursor(done, reads=adds, writes=True)
        return targets

    def _gradient_place(self, index: int) -> Place:
        if index in self._program.inputs:
            self.inputs[index] = self._program.maps[index].empty(self._compiled.device)
            return TensorPlace(self.inputs[index])
        return self._session.places.place(self._compiled.plan.schedule.gradient[index], index)

    def _send(
        self,
        segment: Segment,
        piece: _Piece,
        fetched: dict[int, Tensor],
        dz: Tensor,
        targets: dict[int, Cursor],
        i: int,
    ) -> None:
        written: set[int] = set()
        rooms = {index: cursor.get(i) for index, cursor in targets.items()}
        sink = Sink(
            target=rooms.get,
            adds=lambda index: index in self._started or index in written,
            unscaled=self._unscaled,
            wrote=written.add,
        )
        offset = piece.done.first - piece.read.first
        part = {
            index: _rows(content, offset, offset + piece.done.n_rows)
            for index, content in fetched.items()
        }
        gradient = dz.to(segment.source.dtype)
        self._session.evaluator.backward(segment.source, part, piece.out.image, gradient, sink)
        for index, cursor in targets.items():
            if index not in written and index not in self._started:
                rooms[index].zero_()
            cursor.commit(i)

    # What is learned --------------------------------------------------------------------------

    def _enter_weights(
        self, segment: Segment, found: Gradients, wanted: tuple[bool, bool, bool]
    ) -> None:
        if segment.module is None or isinstance(segment.operation, GlobalPooling):
            return
        if wanted[1] and found.weight is not None:
            self._enter(segment.module.weight, found.weight)
        if wanted[2] and found.bias is not None:
            self._enter(segment.module.bias, found.bias)

    def _enter(self, parameter: object, gradient: Tensor) -> None:
        assert isinstance(parameter, Tensor)
        known = self.parameters.get(id(parameter))
        if known is None:
            wide = arithmetic_dtype(parameter.dtype)
            self.parameters[id(parameter)] = gradient.to(wide, copy=True)
        else:
            known.add_(gradient)

    def _norm_gradient(self, index: int) -> NormGradient:
        if index not in self._of_norm:
            session = self._session
            sums = session.sums[index]
            norm = self._program.norms[index]
            self._of_norm[index] = gradient_of(
                norm, session.statistics[index], sums.total, sums.product, session.exchange_of(norm)
            )
        return self._of_norm[index]

    def _hand_over(self, done: Learned) -> None:
        """Enter what normalisations learned, and offer the gradient, which is whole now."""
        for index, name in done.norms:
            if index in self._session.sums and done.parameter.requires_grad:
                gradient = self._norm_gradient(index)
                self._enter(done.parameter, gradient.weight if name == "weight" else gradient.bias)
        found = self.parameters.get(id(done.parameter))
        if found is not None and self._on_gradient(done.parameter, found):
            del self.parameters[id(done.parameter)]


def _rows(content: Tensor, first: int, last: int) -> Tensor:
    """Return rows of a strip; of several images only all rows are ever asked for."""
    if first == 0 and last == content.shape[2]:
        return content
    return content[:, :, first:last]


@dataclass
class _OutputGradient:
    """The strips of dy, and the cursors that they come from."""

    cursors: list[Cursor]
    get: Callable[[int], Tensor]

    def release(self, i: int) -> None:
        """Strips that were read need no commit."""
