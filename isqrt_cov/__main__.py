"""``python -m isqrt_cov``: what was compiled, and what is usable here."""

import torch

from . import build_info


def main() -> None:
    info = build_info()
    usable = info["simd_usable"]
    simd = ", ".join(f"{s} ({'usable' if s in usable else 'not on this CPU'})" for s in info["simd_compiled"])
    if not info["cuda_architectures"]:
        cuda = "not compiled"
    elif not info["cuda_usable"]:
        cuda = f"compiled for {info['cuda_architectures']}; not usable: this torch finds no CUDA device"
    else:
        devices = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        cuda = f"compiled for {info['cuda_architectures']}; usable on {devices}"
    print(f"isqrt_cov  {info['version']}")
    print(f"torch      {info['torch']}, {torch.get_num_threads()} threads (built for {info['torch_target']} and later)")
    print(f"compiler   {info['compiler']}")
    print(f"SIMD       {simd}")
    print(f"CUDA       {cuda}")


if __name__ == "__main__":
    main()
