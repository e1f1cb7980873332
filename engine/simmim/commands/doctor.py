"""`simmim doctor`: what is installed, what each op runs on, and why not on something better."""

import argparse
import os

import simplejpeg
import torch

from simmim.data.dali import backend
from simmim.environment import device_name, git_commit, package_versions
from simmim_kernels import native
from simmim_kernels.batch_norm_relu import BACKENDS as BATCH_NORM_BACKENDS
from simmim_kernels.crop_resize import BACKENDS as CROP_BACKENDS
from simmim_kernels.dispatch import BACKENDS, ENVIRONMENT_VARIABLE, choose
from simmim_kernels.embed_patches import BACKENDS as EMBED_BACKENDS
from simmim_kernels.gradient_norm import BACKENDS as NORM_BACKENDS
from simmim_kernels.window_attention import BACKENDS as ATTENTION_BACKENDS
from simmim_kernels.window_attention import COSINE_BACKENDS, xformers_kernel

# An op's backends reject an input for its device and dtype alone.
OPS = {
    "random_patch_mask": BACKENDS,
    "embed_patches": EMBED_BACKENDS,
    "substitute_mask_tokens": BACKENDS,
    "residual_attention": ATTENTION_BACKENDS,
    "residual_mlp": BACKENDS,
    "post_norm_attention": COSINE_BACKENDS,
    "post_norm_mlp": BACKENDS,
    "merge_patches": BACKENDS,
    "batch_norm_relu": BATCH_NORM_BACKENDS,
    "masked_l1_loss": BACKENDS,
    "linear_masked_l1_loss": BACKENDS,
    "gradient_norm": NORM_BACKENDS,
}


def backend_lines(device: torch.device, dtype: torch.dtype) -> list[str]:
    """For every op, the backend it would use on `device` and why the ones before it cannot run."""
    x = torch.zeros(1, dtype=dtype, device=device)
    lines: list[str] = []
    for op, backends in OPS.items():
        try:
            lines.append(f"  {op:<24} {choose(op, backends, (x,), None)}")
        except (RuntimeError, ValueError) as error:
            lines.append(f"  {op:<24} none: {error}")
    # the backends of every op are among those of attention
    against = {b.name: b.reasons_against(x) for b in ATTENTION_BACKENDS}
    lines += [f"    not {n}: {'; '.join(reasons)}" for n, reasons in against.items() if reasons]
    return lines


def data_lines() -> list[str]:
    """What decodes images here by itself, and why not DALI."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, reason = backend.choose_backend("auto", device)
    return [
        f"  {'data.backend=auto':<24} {name} ({reason})",
        f"  {'dali':<24} {backend.missing_reason() or 'installed'}",
        f"  {'JPEG':<24} simplejpeg {simplejpeg.__version__} (libjpeg-turbo)",
        f"  {'crop and resize':<24} {choose('crop_resize', CROP_BACKENDS, (), None)}",
    ]


def parser() -> argparse.ArgumentParser:
    """The arguments of `simmim doctor`."""
    return argparse.ArgumentParser(
        prog="simmim doctor",
        description="Versions, devices, and the backend each op would use and why not another.",
    )


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser().parse_args(arguments)
    print(report())
    return 0


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
    extension = native.extension
    loaded = "" if extension is None else f"{extension.target()}, loaded: {extension.__file__}"
    lines += ["native CPU kernels", f"  {native.missing_reason or loaded}"]
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    for device in [cpu] + ([torch.device("cuda", 0)] if torch.cuda.is_available() else []):
        lines.append(
            f"backends on {device.type}, float32"
            + (f" ({ENVIRONMENT_VARIABLE}={forced})" if forced else "")
        )
        lines += backend_lines(device, torch.float32)
    lines.append("attention")
    lines.append("  reference                torch scaled_dot_product_attention")
    without = xformers_kernel.missing_reason()
    lines.append(f"  xformers                 {without or 'memory_efficient_attention, on CUDA'}")
    lines += ["data", *data_lines()]
    return "\n".join(lines)
