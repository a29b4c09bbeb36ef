"""What a run computes in: precision=auto resolved, and bf16 refused where its results are wrong."""

from umtrain import tasks
from umtrain.config import RunConfig
from umtrain.errors import ConfigError


def choose_precision(config: RunConfig, device_kind: str, *, has_bf16: bool) -> str:
    """Return fp32 or bf16 for `config` on a device of `device_kind` (cpu, cuda).

    auto takes bf16 where the device computes in it natively (`has_bf16`) and rightly. Raises
    ConfigError where bf16 is asked for and the processor's results would be wrong.
    """
    fault = bf16_fault(config, device_kind)
    if config.precision == "auto":
        return "bf16" if has_bf16 and fault is None else "fp32"
    if config.precision == "bf16" and fault is not None:
        raise ConfigError(f"precision=bf16: {fault}; use precision=fp32, or device=cuda")
    return config.precision


def bf16_fault(config: RunConfig, device_kind: str) -> str | None:
    """Return why the results of the network of `config` in bf16 are wrong; None if they are not."""
    if device_kind != "cpu":
        return None
    return tasks.without_images(config).bf16_fault_of_processors
