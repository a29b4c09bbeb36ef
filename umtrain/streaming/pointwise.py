"""Expressions, strip by strip: their values from maps, and their gradients back to maps."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from umtrain.streaming.kernels import Affine, Kernels
from umtrain.streaming.program import Blend, Concat, Expression, Masked, Program, Term

Strips = Mapping[int, Tensor]


@dataclass
class Coefficients:
    """A normalisation's scale, shift and mean in arithmetic precision, (N or 1, C) each.

    `rows` are (scale, shift, mean) of each image, or of all of them, (C,) each.
    """

    scale: Tensor
    shift: Tensor
    mean: Tensor

    def __post_init__(self) -> None:
        parts = (self.scale.unbind(), self.shift.unbind(), self.mean.unbind())
        self.rows = list(zip(*parts, strict=True))


@dataclass
class Sums:
    """Σg and Σg·(y-mean) of a normalisation, float64 (N, C), over all of its readers."""

    total: Tensor
    product: Tensor


@dataclass
class Sink:
    """Where the gradients of a segment's source maps go.

    `target(map)` is the strip of a map's gradient, or None if it is not wanted; `adds(map)` says
    whether something is there already, and is false once for each strip otherwise; `unscaled`
    holds the terms whose gradient is stored as it is (see `Program.gradient_norms`).
    """

    target: Callable[[int], Tensor | None]
    adds: Callable[[int], bool]
    unscaled: frozenset[Term]
    wrote: Callable[[int], None] = field(default=lambda index: None)


class Evaluator:
    """Evaluates the expressions of a program; `coefficients` and `sums` are by normalisation."""

    def __init__(
        self,
        program: Program,
        kernels: Kernels,
        coefficients: Mapping[int, Coefficients],
        sums: Mapping[int, Sums],
    ) -> None:
        self._program, self._kernels = program, kernels
        self._coefficients, self._sums = coefficients, sums

    def evaluate(
        self, expression: Expression, strips: Strips, image: int, out: Tensor | None = None
    ) -> Tensor:
        """Return the value on these strips, which start at `image`; in `out` if it is given.

        A plain map is returned as it is if there is no `out`.
        """
        if isinstance(expression, Blend):
            return self._blend(expression, strips, image, out)
        parts = expression.parts if not isinstance(expression, Masked) else (expression.part,)
        values = [self.evaluate(part, strips, image) for part in parts]
        if isinstance(expression, Concat):
            value = torch.cat(values, 1)
        elif isinstance(expression, Masked):
            value = values[0] * strips[expression.mask] * expression.scale
        else:
            value = expression.function(*values)
        value = value.to(expression.dtype)
        return value if out is None else out.copy_(value)

    def _blend(self, blend: Blend, strips: Strips, image: int, out: Tensor | None) -> Tensor:
        term = blend.terms[0]
        if len(blend.terms) == 1 and term.norm is None and not blend.relu:
            value = strips[term.map].to(blend.dtype)
            return value if out is None else out.copy_(value)
        if out is None or out.dtype != blend.dtype:
            result = torch.empty_like(
                strips[term.map], dtype=blend.dtype, memory_format=torch.channels_last
            )
        else:
            result = out
        for part, terms, _ in self._by_image(blend, strips, image):
            self._kernels.blend(terms, blend.relu, result[part])
        return result if out is None or out is result else out.copy_(result)

    def _by_image(
        self, blend: Blend, strips: Strips, image: int
    ) -> Iterator[tuple[slice, list[Affine], list[Tensor | None]]]:
        """Yield runs of images that share coefficients: their place, terms and means."""
        n_images = len(strips[blend.terms[0].map])
        used = [self._coefficients[t.norm] for t in blend.terms if t.norm is not None]
        shared = all(len(coefficients.scale) == 1 for coefficients in used)
        for start in (0,) if shared else range(n_images):
            part = slice(0, n_images) if shared else slice(start, start + 1)
            terms: list[Affine] = []
            means: list[Tensor | None] = []
            for term in blend.terms:
                y = strips[term.map] if shared else strips[term.map][part]
                y = y.to(blend.dtype).contiguous(memory_format=torch.channels_last)
                if term.norm is None:
                    terms.append(Affine(y))
                    means.append(None)
                    continue
                known = self._coefficients[term.norm]
                scale, shift, mean = known.rows[0 if len(known.rows) == 1 else image + start]
                terms.append(Affine(y, scale, shift))
                means.append(mean)
            yield part, terms, means

    def backward(
        self, expression: Expression, strips: Strips, image: int, dz: Tensor, sink: Sink
    ) -> None:
        """Send the gradient `dz` of the value on these strips to the maps behind it."""
        if isinstance(expression, Blend):
            self._blend_backward(expression, strips, image, dz, sink)
        elif isinstance(expression, Concat):
            start = 0
            for part in expression.parts:
                n_channels = self._channels(part)
                share = dz[:, start : start + n_channels].to(part.dtype)
                dense = share.contiguous(memory_format=torch.channels_last)
                self.backward(part, strips, image, dense, sink)
                start += n_channels
        elif isinstance(expression, Masked):
            passed = dz * strips[expression.mask] * expression.scale
            self.backward(expression.part, strips, image, passed.to(dz.dtype), sink)
        else:
            parts = [
                self.evaluate(part, strips, image).detach().requires_grad_()
                for part in expression.parts
            ]
            with torch.enable_grad():
                value = expression.function(*parts)
            gradients = torch.autograd.grad(value, parts, dz.to(value.dtype), allow_unused=True)
            for part, gradient in zip(expression.parts, gradients, strict=True):
                if gradient is not None:
                    dense = gradient.contiguous(memory_format=torch.channels_last)
                    self.backward(part, strips, image, dense, sink)

    def _channels(self, expression: Expression) -> int:
        if isinstance(expression, Blend):
            return self._program.maps[expression.terms[0].map].shape[1]
        if isinstance(expression, Masked):
            return self._channels(expression.part)
        if isinstance(expression, Concat):
            return sum(self._channels(part) for part in expression.parts)
        return self._channels(expression.parts[0])

    def _blend_backward(
        self, blend: Blend, strips: Strips, image: int, dz: Tensor, sink: Sink
    ) -> None:
        """One pass for the common case, a single unscaled term; the others copy from its result."""
        targets = {term: sink.target(term.map) for term in blend.terms}
        first = next((t for t in blend.terms if self._takes_g(t, targets[t], dz, sink)), None)
        adds = first is not None and sink.adds(first.map)
        alone = len(blend.terms) == 1
        target = targets[first] if first is not None else None
        g = target if target is not None and (alone or not adds) else torch.empty_like(dz)
        for part, terms, means in self._by_image(blend, strips, image):
            sums = self._kernels.blend_backward(
                terms, blend.relu, dz[part], g[part], adds and alone, means
            )
            self._add_sums(blend, sums, image + part.start)
        for term in blend.terms:
            self._deliver(term, targets[term], g, image, sink, done=term == first and g is target)

    def _takes_g(self, term: Term, target: Tensor | None, dz: Tensor, sink: Sink) -> bool:
        if target is None or term not in sink.unscaled:
            return False
        return target.dtype == dz.dtype

    def _deliver(
        self, term: Term, target: Tensor | None, g: Tensor, image: int, sink: Sink, done: bool
    ) -> None:
        if target is None:
            return
        if not done:
            value = g if term in sink.unscaled else self._scaled(term, g, image)
            if sink.adds(term.map):
                target.add_(value)
            elif target.data_ptr() != value.data_ptr():
                target.copy_(value)
        sink.wrote(term.map)

    def _scaled(self, term: Term, g: Tensor, image: int) -> Tensor:
        if term.norm is None:
            return g
        scale = self._coefficients[term.norm].scale
        rows = scale if len(scale) == 1 else scale[image : image + len(g)]
        return g * rows[:, :, None, None]

    def _add_sums(self, blend: Blend, sums: tuple[Tensor, list[Tensor]], image: int) -> None:
        for term, product in zip(blend.terms, sums[1], strict=True):
            if term.norm is not None:
                # Sums over several images are entered for the first: they share statistics.
                self._sums[term.norm].total[image] += sums[0]
                self._sums[term.norm].product[image] += product


class Finisher:
    """Turns the stored gradient of a map into dy = scale·g + a + b·y; coefficients (N or 1, C)."""

    def __init__(self, kernels: Kernels, scale: Tensor, a: Tensor, b: Tensor) -> None:
        self._kernels = kernels
        self._scale, self._a, self._b = scale.unbind(), a.to(scale).unbind(), b.to(scale).unbind()

    def finish(self, g: Tensor, y: Tensor | None, image: int) -> Tensor:
        """Return dy on a strip that starts at `image`; without `y`, scale·g."""
        out = torch.empty_like(g, memory_format=torch.channels_last)
        if len(self._scale) == len(self._a) == 1:
            self._kernels.finish(g, self._scale[0], y, self._a[0], self._b[0], out)
            return out
        for i in range(len(g)):
            scale, a, b = (
                x[0 if len(x) == 1 else image + i] for x in (self._scale, self._a, self._b)
            )
            content = None if y is None else y[i : i + 1]
            self._kernels.finish(g[i : i + 1], scale, content, a, b, out[i : i + 1])
        return out
