"""One traced program to one AOTInductor package without weights."""

from __future__ import annotations

import copy
import re
import shutil
import warnings
import zipfile
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.export import ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from stg_trt.engines.cuda_toolkit import cuda_build
from stg_trt.errors import GateMissed

from .gelu_epilogue import fold_gelu

OPTIONS = {
    # The package is shared: no weight, not even a uniform or a very short one, may become part of its code.
    "aot_inductor.package_constants_in_so": False,
    "always_keep_tensor_constants": True,
    "joint_graph_constant_folding": False,
    # They take a third off the time of a package. torch keeps them in its usual cache, and needs openssl.
    "aot_inductor.precompile_headers": shutil.which("openssl") is not None,
    # The threads of the machine that runs it, not of the one that builds.
    "cpp.dynamic_threads": True,
}
# Calls in the code that a package was compiled from: one per fused attention.
_FUSED_ATTENTION = re.compile(
    r"aoti_torch_(?:cpu__scaled_dot_product_(flash)_attention_for_cpu"
    r"|cuda__scaled_dot_product_(cudnn|flash|efficient)_attention)\("
)
# Part of torch's message, a thousand characters and more.
_COMMAND = re.compile(r"Command: .*? Output: ")


def compile_package(
    program: ExportedProgram, path: Path, device: torch.device, attention: Sequence[SDPBackend]
) -> Path:
    """Writes the package for a device; raises GateMissed if inductor cannot compile the program.

    Attention becomes the first of the kernels that takes it; `attention_kernels` has them in order.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch._inductor.utils import fresh_cache
    from torch.export.passes import move_to_device_pass

    if device.type == "cuda":
        program = move_to_device_pass(copy.deepcopy(program), str(device))
        fold_gelu(program)
    # torch finds out about this CPU in ten seconds of trials, and keeps the answer in its usual cache.
    pick_vec_isa()
    failure: RuntimeError | None = None
    # The cache of all else lies beside the package and goes with it.
    toolkit = cuda_build() if device.type == "cuda" else nullcontext()
    with warnings.catch_warnings(), fresh_cache(dir=str(path.parent)), toolkit:
        warnings.simplefilter("ignore")
        try:
            with torch.no_grad(), sdpa_kernel(list(attention), set_priority=True):
                aoti_compile_and_package(program, package_path=str(path), inductor_configs=dict(OPTIONS))
        except RuntimeError as error:
            # Kept until the cache is gone, which would otherwise stay and be reported.
            failure = error
    if failure is not None:
        raise GateMissed(f"{path.stem}: inductor cannot compile it: {_reason(failure)}") from failure
    return path


def fused_attentions(package: Path) -> Counter[str]:
    """Calls of fused attention kernels in a package's own source, by the kernel: flash, cudnn, efficient."""
    with zipfile.ZipFile(package) as archive:
        sources = [
            archive.read(name).decode() for name in archive.namelist() if name.endswith(".wrapper.cpp")
        ]
    calls = [call for source in sources for call in _FUSED_ATTENTION.findall(source)]
    return Counter(on_cpu or on_cuda for on_cpu, on_cuda in calls)


def _reason(failure: RuntimeError) -> str:
    """The start of the message, without the command line in front of the compiler's own words."""
    return _COMMAND.sub("", " ".join(str(failure).split()))[:300]


def attention_kernels(device: torch.device) -> tuple[SDPBackend, ...]:
    """Best first; only cuDNN and the memory-efficient kernel take masks.

    The last is plain arithmetic, which does not count as fused.
    """
    flash_first = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        # torch's flash attention has no kernels of its own for Hopper and later; cuDNN's has.
        flash_first[:2] = reversed(flash_first[:2])
    return *flash_first, SDPBackend.MATH
