"""Large model support: every saved tensor is swapped out by an explicit copy, and in again.

Le et al., "TFLMS: large model support in TensorFlow by graph rewriting" (2018). Copies out start
as soon as a tensor is saved; copies in run ahead of backward by `prefetch_depth` times the
largest tensor.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import ClassVar

from torch import nn

from umtrain.memory.channels import create_channel
from umtrain.memory.hooked import HookedStrategy
from umtrain.memory.saved import Mover
from umtrain.memory.swap import Swapper
from umtrain.memory.working_set import WorkingSets


class LargeModelSupport(HookedStrategy):
    """Swaps all saved tensors, overlapped with compute."""

    name: ClassVar[str] = "lms"

    def _create_mover(self, model: nn.Module, measured: WorkingSets) -> Mover:
        channel = create_channel(self.options, measured, self.trace)
        self._cleanup.callback(channel.close)
        window_bytes = self.options.prefetch_depth * measured.largest_saved_bytes
        self._swapper = Swapper(channel, window_bytes, self._meter, self.trace)
        return self._swapper

    @contextmanager
    def _around_step(self) -> Generator[None]:
        self._swapper.start_step()
        with super()._around_step():
            yield
