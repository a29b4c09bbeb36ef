"""When in backward each parameter's gradient is whole: nothing that follows adds to it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from umtrain.streaming.program import Program, terms_of
from umtrain.streaming.schedule import Action


@dataclass
class Learned:
    """A parameter, with the normalisations whose "weight" or "bias" it is."""

    parameter: nn.Parameter
    norms: list[tuple[int, str]] = field(default_factory=list)
    last: int = -1


def parameters_whole_after(program: Program, actions: Sequence[Action]) -> dict[int, list[Learned]]:
    """Return, by action, the parameters whose gradients are whole once it has run.

    A convolution's is whole when it has run backward; a normalisation's when all segments that
    apply it have. Parameters that no action of `actions` runs backward for are left out.
    """
    backward = {a.segment: i for i, a in enumerate(actions) if a.kind == "backward"}
    found: dict[int, Learned] = {}

    def note(parameter: object, segment: int) -> Learned | None:
        if not isinstance(parameter, nn.Parameter) or segment not in backward:
            return None
        learned = found.setdefault(id(parameter), Learned(parameter))
        learned.last = max(learned.last, backward[segment])
        return learned

    for segment in program.segments:
        for parameter in () if segment.module is None else segment.module.parameters(recurse=False):
            note(parameter, segment.index)
        for index in {term.norm for term in terms_of(segment.source) if term.norm is not None}:
            for name in ("weight", "bias"):
                learned = note(getattr(program.norms[index].module, name, None), segment.index)
                if learned is not None and (index, name) not in learned.norms:
                    learned.norms.append((index, name))
    whole: dict[int, list[Learned]] = {}
    for learned in found.values():
        whole.setdefault(learned.last, []).append(learned)
    return whole
