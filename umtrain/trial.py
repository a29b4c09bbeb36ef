"""A few real training steps of a configuration, in a process of their own, and what they took.

`python -m umtrain.trial STEPS SECONDS key=value …` trains at least that many steps, for at least
that long, and prints one JSON document as its last line: status "ok", with `step_s` (the median of
the steps after the first, or the only one) and `memory_use`. It ends with exit code 3 where memory
runs out. The images are noise; all else is as `umtrain fit` does it.
"""

import dataclasses
import json
import signal
import statistics
import subprocess
import sys
import time
from typing import Any

from umtrain.config import RunConfig
from umtrain.errors import OutOfMemoryError, UmtrainError

_OK, _FAILED = 0, 1
_ENDS_WITHOUT_MEMORY = (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGABRT)


def run_trial(overrides: list[str], n_steps: int, at_least_s: float = 0.0) -> dict[str, Any]:
    """Run a trial in a fresh process; return its document.

    It takes `n_steps` steps, and more until `at_least_s` seconds are over: the first second of a
    process is slower than the rest of a run.

    The status is "oom" where memory ran out, "failed" with `why` where anything else went wrong.
    The process ends with this one's interrupt. A process that the system kills, or in which a
    native library does not survive an allocation that fails, is out of memory.
    """
    command = [sys.executable, "-m", "umtrain.trial", str(n_steps), str(at_least_s)]
    command += overrides
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        printed, complaint = process.communicate()
    except BaseException:
        process.kill()
        process.wait()
        raise
    said = complaint.strip().splitlines() or [f"exit code {process.returncode}"]
    if process.returncode == _OK:
        document: dict[str, Any] = json.loads(printed.splitlines()[-1])
        return document
    if process.returncode == OutOfMemoryError.exit_code:
        return {"status": "oom", "why": said[-1]}
    if process.returncode in _ENDS_WITHOUT_MEMORY:
        name = signal.Signals(-process.returncode).name
        return {"status": "oom", "why": f"the process ended by {name}, for want of memory"}
    return {"status": "failed", "why": said[-1]}


def train(config: RunConfig, n_steps: int, at_least_s: float) -> dict[str, Any]:
    """Train on noise in this process. Raises UmtrainError as a run would. See `run_trial`."""
    import torch

    from umtrain import tasks
    from umtrain.device import has_bf16, resolve_device
    from umtrain.memory.allocator import recycle_large_buffers
    from umtrain.optimization import create_optimizer
    from umtrain.planning.tracing import mean_square
    from umtrain.precision import choose_precision
    from umtrain.runner import create_strategy
    from umtrain.training import autocast, input_dtype

    device = resolve_device(config.device)
    recycle_large_buffers(device.type)
    precision = choose_precision(config, device.type, has_bf16=has_bf16(device))
    torch.manual_seed(config.seed)
    task = tasks.without_images(config)
    model = task.create_model().to(device)
    image = task.sample_input(device, input_dtype(precision)).normal_()
    optimizer = create_optimizer(model, config.optim)
    strategy = create_strategy(config, device, None)
    times_s: list[float] = []
    try:
        with strategy.guard(), autocast(device, precision):
            model = strategy.prepare(model, image)
        while len(times_s) < n_steps or sum(times_s) < at_least_s:
            start_s = time.perf_counter()
            with strategy.step():
                with autocast(device, precision):
                    output = model(image)
                torch.autograd.backward(mean_square(output))
                del output
            with strategy.guard():
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times_s.append(time.perf_counter() - start_s)
    finally:
        strategy.close()
    return {
        "status": "ok",
        "memory": strategy.running_name,
        "precision": precision,
        "step_s": statistics.median(times_s[1:] or times_s),
        "steps_s": times_s,
        "memory_use": dataclasses.asdict(strategy.stats()),
    }


def main(words: list[str]) -> int:
    """Run a trial: the number of steps, the seconds, then the overrides."""
    from umtrain.config import load_config

    try:
        n_steps, at_least_s, *overrides = words
        document = train(load_config(overrides), int(n_steps), float(at_least_s))
    except UmtrainError as error:
        print(str(error).replace("\n", " "), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return _FAILED
    print(json.dumps(document))
    return _OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
