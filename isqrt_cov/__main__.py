"""``python -m isqrt_cov``: what was compiled, and what is usable here."""

import torch

from . import build_info


def main() -> None:
    info = build_info()
    simd = ", ".join(f"{level} ({'usable' if level in info['simd_usable'] else 'not on this CPU'})" for level in info["simd_compiled"])
    if not info["cuda_architectures"]:
        cuda = "not compiled"
    elif not info["cuda_usable"]:
        cuda = f"compiled for {info['cuda_architectures']}; not usable: this torch finds no CUDA device"
    else:
        devices = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        cuda = f"compiled for {info['cuda_architectures']}; usable on {devices}"
    print(f"isqrt_cov  {info['version']}")
    print(f"torch      {info['torch']} (any torch from {info['torch_target']} on will do), {torch.get_num_threads()} threads")
    print(f"compiler   {info['compiler']}")
    print(f"SIMD       {simd}")
    print(f"CUDA       {cuda}")


if __name__ == "__main__":
    main()
