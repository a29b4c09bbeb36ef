"""A forward pass of a program, strip by strip, and what its backward pass needs of it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from umtrain.exchange import NO_LINKS, Exchange, Links
from umtrain.streaming.bands import Bands
from umtrain.streaming.kernels import Kernels, arithmetic_dtype
from umtrain.streaming.norms import Moments, Statistics, coefficients, statistics_of
from umtrain.streaming.operations import GlobalPooling, Operation, Weights, channels_last
from umtrain.streaming.places import Places
from umtrain.streaming.plan import Plan
from umtrain.streaming.pointwise import Coefficients, Evaluator, Sums
from umtrain.streaming.program import Mask, Norm, Program, Segment, masks_of, terms_of
from umtrain.streaming.rows import Strip, clipped, strips
from umtrain.streaming.schedule import Action, Needs
from umtrain.streaming.storage import Cursor, HostMemory

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Compiled:
    """A program with all that is fixed before a step: needs, plan, kernels, strip size."""

    program: Program
    needs: Needs
    plan: Plan
    kernels: Kernels
    device: torch.device
    strip_bytes: int
    links: Links = NO_LINKS
    bands: Bands | None = None


@dataclass
class Pooled:
    """A global pooling's result and, for "max", the first strip that holds each maximum."""

    value: Tensor
    strip: Tensor = field(default_factory=lambda: torch.empty(0))


class Session:
    """One forward pass of a program, and the backward pass that belongs to it.

    Several may be alive at once; each has its own maps, in the arena that it is given.
    """

    def __init__(
        self,
        compiled: Compiled,
        arena: Tensor,
        host: HostMemory | None,
        inputs: Sequence[Tensor],
        progress: Progress,
    ) -> None:
        self.compiled = compiled
        self.program = compiled.program
        self.progress = progress
        bands = compiled.bands
        if bands is not None:
            pairs = zip(compiled.program.inputs, inputs, strict=True)
            inputs = [bands.band_of_input(index, given) for index, given in pairs]
        self.places = Places(compiled.program, compiled.plan, arena, host, inputs)
        self.statistics: dict[int, Statistics] = {}
        self.coefficients: dict[int, Coefficients] = {}
        self._moments: dict[int, Moments] = {}
        self.sums: dict[int, Sums] = {}
        self._pooled: dict[int, Pooled] = {}
        self._weights: dict[int, Weights] = {}
        self.evaluator = Evaluator(self.program, compiled.kernels, self.coefficients, self.sums)

    def forward(self) -> list[Tensor]:
        """Run the forward pass; return the program's outputs in order."""
        for index, action in enumerate(self.compiled.plan.schedule.actions):
            if action.kind == "forward":
                self.places.resume(index)
                self.run_forward(action)
                self.progress(index)
        return [
            self._map_output(index) if kind == "map" else self._pooled_output(index)
            for kind, index in self.program.outputs
        ]

    def _map_output(self, index: int) -> Tensor:
        output, bands = self.places.outputs[index], self.compiled.bands
        return output if bands is None else bands.whole_of(index, output)

    def _pooled_output(self, index: int) -> Tensor:
        shape, dtype = self.program.pooled[index]
        return self._pooled[index].value.to(dtype).view(shape)

    def run_forward(self, action: Action) -> None:
        """Run a segment forward, for the first time or again."""
        segment = self.program.segments[action.segment]
        is_first = action.kind == "forward"
        if is_first:
            self._draw_masks(segment)
            self._know_norms(segment)
        if isinstance(segment.operation, GlobalPooling):
            self._pool(segment)
            return
        assert segment.out is not None
        self.places.hold(segment.out, action.kind)
        norms = self._measured_norms(segment.out) if is_first else []
        moments = self._new_moments(segment.out) if norms else None
        self._make_map(segment, moments)
        if moments is not None:
            self._moments[segment.out] = moments
        if self.compiled.bands is not None:
            self.compiled.bands.fill(segment.out, self.places.content[segment.out])

    def _make_map(self, segment: Segment, moments: Moments | None) -> None:
        assert segment.out is not None
        cut = self.strips_of(segment)
        needed = [self._source_rows(segment, strip) for strip in cut]
        cursors = self.source_cursors(segment, needed)
        out = self.places.content[segment.out].cursor(cut, reads=False, writes=True)
        for i, strip in enumerate(cut):
            fetched = {index: cursor.get(i) for index, cursor in cursors.items()}
            room = out.get(i)
            result = self._forward_strip(segment, fetched, strip, needed[i], room)
            self._keep(result, room, strip, moments)
            out.commit(i)
        finish([*cursors.values(), out])

    def _forward_strip(
        self, segment: Segment, fetched: dict[int, Tensor], strip: Strip, rows: Strip, room: Tensor
    ) -> Tensor:
        operation = segment.operation
        if operation is None:
            return self.evaluator.evaluate(segment.source, fetched, strip.image, room)
        z = self.padded(segment, operation, fetched, strip, rows)
        return operation.forward(z, self.weights_of(segment), strip.first, strip.last)

    def _keep(self, result: Tensor, room: Tensor, strip: Strip, moments: Moments | None) -> None:
        """Put a strip where its map lies, and add up its moments, in one pass if possible."""
        if moments is None:
            if result is not room:
                room.copy_(result)
            return
        dense = result.contiguous(memory_format=torch.channels_last)
        copy = None if dense is room else room
        count = strip.n_rows * result.shape[3]
        for j, image in enumerate(range(strip.image, strip.image_end)):
            x = dense[j : j + 1]
            shift = self._shift(x, moments, image)
            target = None if copy is None else copy[j : j + 1]
            moments.add(image, count, shift, self.compiled.kernels.moments(x, shift, target))

    def _shift(self, x: Tensor, moments: Moments, image: int) -> Tensor:
        """Return a value near the mean, so that squares of what is left lose no digits."""
        wide = arithmetic_dtype(x.dtype)
        if moments.counts[image]:
            return moments.mean[image].to(wide)
        return x[0, :, 0].mean(1, dtype=wide)

    def _draw_masks(self, segment: Segment) -> None:
        for mask in self.program.masks:
            if mask.segment == segment.index:
                self.places.hold(mask.map, "forward")
                drawn = self._drawn(mask)
                cut = list(strips(len(drawn), drawn.shape[2], self.compiled.strip_bytes))
                cursor = self.places.content[mask.map].cursor(cut, reads=False, writes=True)
                for i, strip in enumerate(cut):
                    part = drawn[strip.image : strip.image_end, :, strip.first : strip.last]
                    cursor.get(i).copy_(part)
                    cursor.commit(i)
                cursor.finish()

    def _drawn(self, mask: Mask) -> Tensor:
        """Return a dropout mask; where maps are bands, cut from the one of the whole map."""
        bands = self.compiled.bands
        shape = self.program.maps[mask.map].shape
        whole = torch.empty(
            shape if bands is None else bands.whole_map(mask.map).shape,
            dtype=torch.bool,
            device=self.compiled.device,
            memory_format=torch.channels_last,
        ).bernoulli_(mask.keep)
        return whole if bands is None else bands.band_of(mask.map, whole)

    # Strips and what they read ----------------------------------------------------------------

    def rows_per_strip(self, segment: Segment) -> int:
        """Return how many output rows make a strip whose largest map is near `strip_bytes`."""
        _, channels, rows, columns = segment.source_shape
        read_bytes = channels * columns * segment.source_dtype.itemsize
        per_row = read_bytes
        if segment.out is not None:
            made = self.program.maps[segment.out]
            per_row = max(made.row_bytes, read_bytes * rows // max(1, made.shape[2]))
        weight = None if segment.module is None else segment.module.weight
        # A weight is laid out anew for each strip: it should be the smaller part.
        weight_bytes = weight.nbytes if isinstance(weight, Tensor) else 0
        return max(1, max(self.compiled.strip_bytes, weight_bytes) // max(1, per_row))

    def strips_of(self, segment: Segment) -> list[Strip]:
        """Return the strips of what a segment makes; of what it reads, where it pools globally."""
        if segment.out is None:
            return segment.source_strips(self.rows_per_strip(segment))
        return self.program.maps[segment.out].strips(self.rows_per_strip(segment))

    def _source_rows(self, segment: Segment, strip: Strip) -> Strip:
        if segment.operation is None:
            return strip
        start, end = segment.read_rows
        if strip.image_end - strip.image > 1:
            return strip.with_rows(start, end)  # several images are dense only as a whole
        first, last = segment.operation.input_rows(strip.first, strip.last)
        return strip.with_rows(*clipped(first, last, end, start))

    def source_cursors(self, segment: Segment, needed: Sequence[Strip]) -> dict[int, Cursor]:
        """Return cursors on the maps and masks that a segment reads."""
        indices = [*segment.sources, *masks_of(segment.source)]
        return {i: self.places.content[i].cursor(needed, reads=True, writes=False) for i in indices}

    def padded(
        self,
        segment: Segment,
        operation: Operation,
        fetched: dict[int, Tensor],
        strip: Strip,
        rows: Strip,
    ) -> Tensor:
        """Return the segment's source on the rows that the operation reads, padding included.

        `rows` are those fetched, which at the end of a strip may be more.
        """
        first, last = operation.input_rows(strip.first, strip.last)
        used = min(rows.last, max(last, rows.first))
        if used < rows.last:
            rows = rows.with_rows(rows.first, used)
            fetched = {i: content[:, :, : rows.n_rows] for i, content in fetched.items()}
        above = min(last - first, max(0, rows.first - first))
        below = max(0, last - rows.last)
        if isinstance(operation, GlobalPooling) or not (above or below):
            value = self.evaluator.evaluate(segment.source, fetched, strip.image)
            return value.to(segment.source_dtype)
        n_images, channels, _, columns = segment.source_shape
        n_images = strip.image_end - strip.image
        z = torch.empty(
            (n_images, channels, last - first, columns),
            dtype=segment.source_dtype,
            device=self.compiled.device,
            memory_format=torch.channels_last,
        )
        z[:, :, :above] = operation.padding_value
        z[:, :, above + rows.n_rows :] = operation.padding_value
        inside = z[:, :, above : above + rows.n_rows]
        dense = n_images == 1 and segment.source_dtype == segment.source.dtype
        if dense:
            self.evaluator.evaluate(segment.source, fetched, strip.image, inside)
        else:
            inside.copy_(self.evaluator.evaluate(segment.source, fetched, strip.image))
        return z

    def weights_of(self, segment: Segment) -> Weights:
        """Return weights in the dtype and layout that the segment computes in, made once."""
        if segment.module is None:
            return Weights()
        if segment.index not in self._weights:
            weight, bias = segment.module.weight, segment.module.bias
            assert isinstance(weight, Tensor)
            dtype = segment.source_dtype
            cast = channels_last(weight.detach().to(dtype))
            cast_bias = bias.detach().to(dtype) if isinstance(bias, Tensor) else None
            self._weights[segment.index] = Weights(cast, cast_bias)
        return self._weights[segment.index]

    # Normalisations ---------------------------------------------------------------------------

    def _measured_norms(self, index: int) -> list[Norm]:
        return [norm for norm in self.program.norms_of(index) if norm.domain != "fixed"]

    def _new_moments(self, index: int) -> Moments:
        n_images, channels, _, _ = self.program.maps[index].shape
        return Moments(n_images, channels, self.compiled.device)

    def _know_norms(self, segment: Segment) -> None:
        """Work out the normalisations that a segment is the first to apply."""
        for term in terms_of(segment.source):
            if term.norm is None or term.norm in self.coefficients:
                continue
            norm = self.program.norms[term.norm]
            statistics = statistics_of(norm, self._moments_of(norm), self.exchange_of(norm))
            a_map = self.program.maps[norm.map]
            wide = arithmetic_dtype(a_map.dtype)
            scale, shift = coefficients(norm, statistics)
            self.statistics[term.norm] = statistics
            self.coefficients[term.norm] = Coefficients(
                scale.to(wide), shift.to(wide), statistics.mean.to(wide)
            )
            zeros = torch.zeros(a_map.shape[:2], dtype=torch.float64, device=self.compiled.device)
            self.sums[term.norm] = Sums(zeros, zeros.clone())

    def exchange_of(self, norm: Norm) -> Exchange | None:
        """Return what joins a normalisation's statistics with those of other ranks, if they are."""
        links = self.compiled.links
        if links.bands is not None:
            return None if norm.domain == "fixed" else links.bands
        is_joint = norm.domain == "batch" and norm.module.training
        return links.statistics if is_joint else None

    def _moments_of(self, norm: Norm) -> Moments | None:
        if norm.domain == "fixed":
            return None
        if norm.map not in self._moments:  # an input of the program
            self._moments[norm.map] = self._measure(norm.map)
        return self._moments[norm.map]

    def _measure(self, index: int) -> Moments:
        moments = self._new_moments(index)
        a_map = self.program.maps[index]
        rows = max(1, self.compiled.strip_bytes // a_map.row_bytes)
        cut = a_map.strips(rows)
        cursor = self.places.content[index].cursor(cut, reads=True, writes=False)
        for i, strip in enumerate(cut):
            content = cursor.get(i)
            self._keep(content, content, strip, moments)
        return moments

    # Global pooling ---------------------------------------------------------------------------

    def _pool(self, segment: Segment) -> None:
        assert isinstance(segment.operation, GlobalPooling)
        assert segment.pooled is not None
        n_images, channels, _, _ = segment.source_shape
        cut = self.strips_of(segment)
        cursors = self.source_cursors(segment, cut)
        wide = arithmetic_dtype(segment.source_dtype)
        is_max = segment.operation.kind == "max"
        start = -torch.inf if is_max else 0.0
        device = self.compiled.device
        value = torch.full((n_images, channels), start, dtype=wide, device=device)
        chosen = torch.zeros(n_images, channels, dtype=torch.long, device=device)
        for i, strip in enumerate(cut):
            fetched = {index: cursor.get(i) for index, cursor in cursors.items()}
            z = self.evaluator.evaluate(segment.source, fetched, strip.image)
            part = segment.operation.forward(z, Weights(), strip.first, strip.last)
            images = slice(strip.image, strip.image_end)
            if is_max:
                larger = ~(part <= value[images])  # a NaN counts as larger
                chosen[images] = chosen[images].masked_fill(larger, i)
                value[images] = torch.where(larger, part, value[images])
            else:
                value[images] += part
        finish(cursors.values())
        if self.compiled.bands is not None:
            value, chosen = self.compiled.bands.pool(segment.operation.kind, value, chosen)
        if not is_max:
            value = value / segment.operation.n_pixels
        self._pooled[segment.pooled] = Pooled(value, chosen)

    def pooled_gradient(self, segment: Segment, given: Tensor, i: int, strip: Strip) -> Tensor:
        """Return the gradient of what a strip gave: (k, C)."""
        assert isinstance(segment.operation, GlobalPooling)
        assert segment.pooled is not None
        images = slice(strip.image, strip.image_end)
        gradient = given.flatten(1)[images]
        if segment.operation.kind == "avg":
            return gradient / segment.operation.n_pixels
        return gradient.masked_fill(self._pooled[segment.pooled].strip[images] != i, 0)


def finish(cursors: Iterable[Cursor]) -> None:
    """Wait for what is under way on any of the cursors."""
    for cursor in cursors:
        cursor.finish()
