"""What each memory strategy makes of a step, as its module in `umtrain.memory` does it.

A strategy's planner is given a subject, a profile and the user's options, and returns the usage.
`stream` has plans of its own: `umtrain.planning.streamed`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from umtrain.errors import ConfigError
from umtrain.memory.hooked import SMALLEST_MOVED_BYTES
from umtrain.memory.options import Options
from umtrain.memory.paging_managed import MANAGED_BLOCK_BYTES
from umtrain.planning.paging import Grouped, Pager
from umtrain.planning.profile import Profile, load_profile
from umtrain.planning.residence import hole_bytes, live_bytes, process_bytes
from umtrain.planning.seconds import operation_seconds
from umtrain.planning.step import Allocation, StepTrace
from umtrain.planning.subject import Subject
from umtrain.planning.swapping import Launching, Link, swapped
from umtrain.planning.usage import Stay, Usage, kept, resident_bytes, stay_of, step_allocations
from umtrain.streaming.storage import ALIGNMENT_BYTES

# What a transfer costs the host of a GPU, in launches of a kernel: a hook, two events and a copy.
# It counts where launching is slower than the GPU. From H200s: 220 transfers take ResNet-50 at 512
# pixels from 26 to 47 ms, and from 20 to 39; a host of such a machine was seen to need twice that,
# and the H100 of the README, whose processor was slower, took more too.
_LAUNCHES_PER_TRANSFER = 2.5
# What holes of the heap take beside what is alive where no page pool serves, as a share of it: the
# worst of 96 steps, in bf16 (ResUNet35 at 2048 pixels; ResNets at 256 have next to none), and the
# worst under a strategy that keeps them small (`umtrain.memory.allocator.HeapHoles`).
_HOLES, _SMALL_HOLES = 0.9, 0.4
# A saved tensor is read once and written twice on its way into the mapped file.
_PASSES_INTO_FILE = 3


@dataclass(frozen=True)
class Setting:
    """What a step is planned for."""

    subject: Subject
    profile: Profile
    options: Options

    @property
    def limit_bytes(self) -> int:
        """Return the device memory that may be used; in RAM the batch needs some of it too."""
        budget_bytes = self.options.device_budget_bytes
        if budget_bytes is not None:
            return budget_bytes
        batch_bytes = self.subject.trace().input_bytes if self.profile.kind == "cpu" else 0
        return max(0, self.profile.device_bytes - batch_bytes)

    @property
    def host_limit_bytes(self) -> int:
        """Return the host memory that may be used."""
        budget_bytes = self.options.host_budget_bytes
        return self.profile.host_bytes if budget_bytes is None else budget_bytes

    @property
    def is_budgeted(self) -> bool:
        """Return whether there is a budget beside what the device has."""
        return self.options.device_budget_bytes is not None

    def hole_share(self, share: float) -> float:
        """Return `share` if freed buffers leave holes: neither a pool nor the kernel takes them."""
        return share if self.profile.leaves_holes and not self.is_budgeted else 0.0


def plan_vanilla(setting: Setting) -> Usage:
    """Everything stays where it is."""
    return replace(kept(setting.subject.trace()), hole_share=setting.hole_share(_HOLES))


def plan_checkpoint(setting: Setting) -> Usage:
    """Groups run twice: a step of its own, traced under the strategy's own wrapping."""
    usage = kept(setting.subject.recomputed(setting.options))
    return replace(usage, hole_share=setting.hole_share(_SMALL_HOLES))


def plan_placement(setting: Setting) -> Usage:
    """Layers named in `cpu_layers` compute, and keep their maps, in host memory.

    How fast the host's processor computes is not known: it is taken to be the generic one.
    """
    if setting.profile.kind == "cpu":
        raise ConfigError("memory=placement divides a network between a GPU and the processor")
    trace, names = setting.subject.trace(), setting.options.cpu_layers
    away = [_is_in(a.layer, names) for a in trace.allocations]
    remote = [a for a, is_away in zip(trace.allocations, away, strict=True) if is_away]
    stays = [stay_of(a) for a in step_allocations(trace) if not _is_in(a.layer, names)]
    crossing = [a for a in remote if any(not _is_in(_layer_at(trace, i), names) for i in a.touched)]
    crossing_bytes = sum(a.n_bytes for a in crossing)
    link_s = crossing_bytes / setting.profile.in_bytes_per_s
    here = setting.subject.seconds(trace, setting.profile)
    there = setting.subject.seconds(trace, load_profile("generic_cpu"))
    slower_s = [slow - fast for slow, fast in zip(there, here, strict=True)]
    extra_s = sum(s for i, s in enumerate(slower_s) if _is_in(_layer_at(trace, i), names))
    on_host = Usage(trace, [stay_of(a) for a in remote if a.kind in ("saved", "temporary")])
    return Usage(
        trace,
        stays,
        host_peak_bytes=max(live_bytes(on_host, setting.profile), default=0),
        out_bytes=crossing_bytes,
        in_bytes=crossing_bytes,
        stall_s=2 * link_s,
        extra_s=extra_s,
    )


def plan_lms(setting: Setting) -> Usage:
    """Every saved tensor goes out, and comes back a window ahead of use."""
    largest_bytes = setting.subject.measured().largest_saved_bytes
    window_bytes = setting.options.prefetch_depth * largest_bytes
    smallest_bytes = SMALLEST_MOVED_BYTES[setting.profile.kind]
    return _swapped(setting, lambda a: a.saves[0].at, window_bytes, smallest_bytes)


def plan_vdnn(setting: Setting) -> Usage:
    """Inputs of layers go out, each before its layer ends."""
    is_conv_only = setting.options.policy == "conv"
    operations = setting.subject.trace().operations

    def moved_at(allocation: Allocation) -> int | None:
        kinds = [s for s in allocation.saves if s.layer_kind]
        chosen = [s.at for s in kinds if "Conv" in s.layer_kind or not is_conv_only]
        return chosen[0] if chosen else None

    def ends_layer(position: int) -> bool:
        layer = operations[position].layer
        return position + 1 == len(operations) or operations[position + 1].layer != layer

    window_bytes = setting.subject.measured().largest_saved_bytes
    smallest_bytes = SMALLEST_MOVED_BYTES[setting.profile.kind]
    return _swapped(setting, moved_at, window_bytes, smallest_bytes, ends_layer)


def plan_um(setting: Setting) -> Usage:
    """Pages come on demand."""
    return _paged(setting, None)


def plan_um_group(setting: Setting) -> Usage:
    """A group's pages come in together."""
    return _paged(setting, Grouped(_groups_of_operations(setting)))


def plan_um_group_prefetch(setting: Setting) -> Usage:
    """Groups leave as forward does, and come back ahead of use."""
    groups = Grouped(_groups_of_operations(setting), setting.options.prefetch_depth)
    return _paged(setting, groups)


def _swapped(
    setting: Setting,
    moved_at: Callable[[Allocation], int | None],
    window_bytes: int,
    smallest_bytes: int,
    ends_with_layer: Callable[[int], bool] = lambda position: False,
) -> Usage:
    trace, profile = setting.subject.trace(), setting.profile

    def goes(allocation: Allocation) -> int | None:
        is_moved = allocation.kind == "saved" and allocation.n_bytes >= smallest_bytes
        return moved_at(allocation) if is_moved and allocation.saves else None

    lead_bytes = ALIGNMENT_BYTES if profile.kind == "cpu" else 0
    link = Link(profile.out_bytes_per_s, profile.in_bytes_per_s, lead_bytes)
    seconds = setting.subject.seconds(trace, profile)
    if profile.kind == "cuda":
        launching = Launching(profile.launch_s, _LAUNCHES_PER_TRANSFER * profile.launch_s)
        kernels = [operation_seconds(each, profile) for each in trace.operations]
        usage = swapped(trace, kernels, link, goes, window_bytes, ends_with_layer, launching)
        # Waits for launches that copies do not hide; `seconds` have those of a step without any.
        return replace(usage, extra_s=usage.extra_s - (sum(seconds) - sum(kernels)))
    usage = swapped(trace, seconds, link, goes, window_bytes, ends_with_layer)
    n_transfers = 2 * sum(goes(a) is not None for a in step_allocations(trace))
    moved_bytes = usage.out_bytes + usage.in_bytes
    extra_s = n_transfers * profile.transfer_s + moved_bytes * profile.link_busy_s_per_byte
    return replace(usage, extra_s=extra_s, hole_share=setting.hole_share(_SMALL_HOLES))


def _paged(setting: Setting, groups: Grouped | None) -> Usage:
    """Play the pager through; see Note: [Nothing is copied where all of it fits]."""
    trace, profile = setting.subject.trace(), setting.profile
    is_cpu = profile.kind == "cpu"
    smallest_bytes = SMALLEST_MOVED_BYTES["cpu"] if is_cpu else MANAGED_BLOCK_BYTES
    allocations = step_allocations(trace)
    blocks = [a for a in allocations if _is_paged(a, smallest_bytes)]
    others = [stay_of(a) for a in allocations if not _is_paged(a, smallest_bytes)]
    # A GPU's pages are the tensors themselves; a file has copies, and originals beside them.
    hole_share = setting.hole_share(_HOLES)
    stays = [*others, *(_original(a) for a in blocks)] if is_cpu else others
    heap = Usage(trace, stays, hole_share=hole_share)
    if is_cpu and _is_plenty(setting):
        return replace(kept(trace), least_stays=heap.stays, hole_share=hole_share)
    rooms = _rooms(setting, heap)
    seconds = setting.subject.seconds(trace, profile)
    moved = Pager(trace, blocks, rooms, profile, groups).run(seconds)
    copied_bytes = sum(a.n_bytes for a in blocks) if is_cpu else 0
    return Usage(
        trace,
        heap.stays,
        pages=_within(moved.pages, rooms),
        host_peak_bytes=moved.host_peak_bytes
        if is_cpu
        else min(moved.out_bytes, moved.host_peak_bytes),
        out_bytes=moved.out_bytes,
        in_bytes=moved.in_bytes,
        stall_s=moved.stall_s,
        extra_s=_PASSES_INTO_FILE * copied_bytes / profile.memory_bytes_per_s,
        hole_share=hole_share,
    )


def _is_plenty(setting: Setting) -> bool:
    model_bytes = setting.subject.trace().parameter_bytes
    needed_bytes = 2 * setting.subject.measured().step_bytes
    return needed_bytes <= setting.limit_bytes - model_bytes


def _is_paged(allocation: Allocation, smallest_bytes: int) -> bool:
    is_large = allocation.n_bytes >= smallest_bytes
    return allocation.kind == "saved" and is_large and bool(allocation.saves)


def _original(allocation: Allocation) -> Stay:
    """Return the stay of a saved tensor that was copied: it ends with forward's use."""
    until = allocation.saved_until or allocation.first
    return Stay(allocation.n_bytes, allocation.first, max(allocation.first, until))


def _rooms(setting: Setting, heap: Usage) -> list[int]:
    """Return what pages may take during each operation."""
    taken = resident_bytes(heap.trace, setting.profile.kind)
    taken += process_bytes(heap.trace, setting.profile.kind)
    live = live_bytes(heap, setting.profile)
    left_bytes = setting.limit_bytes - taken - hole_bytes(heap, live)
    return [max(0, left_bytes - level) for level in live]


def _within(pages: list[Stay], rooms: list[int]) -> list[Stay]:
    """Return a stay for what is resident: pages as far as there is room for them."""
    changes = [0] * (len(rooms) + 1)
    for stay in pages:
        changes[stay.first] += stay.n_bytes
        changes[stay.last + 1] -= stay.n_bytes
    total, stays = 0, []
    for position, (change, room) in enumerate(zip(changes, rooms, strict=False)):
        total += change
        stays.append(Stay(min(total, room), position, position))
    return stays


def _groups_of_operations(setting: Setting) -> list[int]:
    """Return the group that each operation belongs to; what no layer called, to the one before."""
    groups = setting.subject.groups(setting.options)
    of_layer = {use.name: number for number, group in enumerate(groups) for use in group.layers}
    found, current = [], -1
    for operation in setting.subject.trace().operations:
        current = of_layer.get(operation.layer, current)
        found.append(current)
    return found


def _layer_at(trace: StepTrace, position: int) -> str:
    return trace.operations[position].layer


def _is_in(layer: str, names: tuple[str, ...]) -> bool:
    return any(layer == name or layer.startswith(f"{name}.") for name in names)


PLANNERS: dict[str, Callable[[Setting], Usage]] = {
    "vanilla": plan_vanilla,
    "checkpoint": plan_checkpoint,
    "vdnn": plan_vdnn,
    "lms": plan_lms,
    "um": plan_um,
    "um_group": plan_um_group,
    "um_group_prefetch": plan_um_group_prefetch,
    "placement": plan_placement,
}
STREAM = "stream"
STRATEGIES = (*PLANNERS, STREAM)
