"""`simmim doctor`: what is installed, what each op runs on, and why not on something better."""

import os

import torch
from torch import Tensor

from simmim.environment import device_name, git_commit, package_versions
from simmim_kernels import masked_l1_loss, native, substitute_mask_tokens
from simmim_kernels.dispatch import ENVIRONMENT_VARIABLE, Backend, choose


def backend_lines(device: torch.device, dtype: torch.dtype) -> list[str]:
    """For every op, the backend it would use on `device` and why the ones before it cannot run."""
    from simmim_kernels.masked_l1_loss import BACKENDS as LOSS_BACKENDS
    from simmim_kernels.substitute_mask_tokens import BACKENDS as SUBSTITUTE_BACKENDS

    x = torch.zeros(1, 1, 8, dtype=dtype, device=device)
    mask = torch.zeros(1, 1, dtype=torch.bool, device=device)
    ops: list[tuple[str, tuple[Backend, ...], tuple[Tensor, ...]]] = [
        (substitute_mask_tokens.__name__, SUBSTITUTE_BACKENDS, (x, mask, x[0, 0])),
        (masked_l1_loss.__name__, LOSS_BACKENDS, (x, x, mask)),
    ]
    lines = ["  random_patch_mask        reference (the only one)"]
    for name, backends, inputs in ops:
        against = {b.name: b.reasons_against(*inputs) for b in backends}
        try:
            runs = choose(name, backends, inputs, None)
        except (RuntimeError, ValueError) as error:
            lines.append(f"  {name:<24} none: {error}")
            continue
        only = " (the only one)" if len(backends) == 1 else ""
        lines.append(f"  {name:<24} {runs}{only}")
        lines += [f"    not {n}: {'; '.join(reasons)}" for n, reasons in against.items() if reasons]
    return lines


def report() -> str:
    """The whole report."""
    lines = ["versions"]
    lines += [
        f"  {name:<24} {value or 'not installed'}" for name, value in package_versions().items()
    ]
    lines.append(f"  {'git commit':<24} {git_commit() or 'not a checkout'}")
    cpu = torch.device("cpu")
    lines += [
        "devices",
        f"  {'cpu':<24} {device_name(cpu)}, {len(os.sched_getaffinity(0))} cores, "
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            name = torch.cuda.get_device_name(index)
            memory = torch.cuda.get_device_properties(index).total_memory / 2**30
            lines.append(f"  {f'cuda:{index}':<24} {name}, {memory:.0f} GiB")
    else:
        built = torch.version.cuda is not None
        reason = "no driver or no card" if built else "this torch is built without CUDA"
        lines.append(f"  {'cuda':<24} none ({reason})")
    loaded = "" if native.extension is None else f"loaded: {native.extension.__file__}"
    lines += ["native CPU kernels", f"  {native.missing_reason or loaded}"]
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    for device in [cpu] + ([torch.device("cuda", 0)] if torch.cuda.is_available() else []):
        lines.append(
            f"backends on {device.type}, float32"
            + (f" ({ENVIRONMENT_VARIABLE}={forced})" if forced else "")
        )
        lines += backend_lines(device, torch.float32)
    lines.append("attention")
    lines.append("  window and global        torch scaled_dot_product_attention")
    return "\n".join(lines)
