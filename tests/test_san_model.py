"""The network against the authors' outputs, and the conditions it has to work under."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("safetensors", reason="san_model needs the extra [san]")
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from san import SMALL, assert_same, image, small
from san_model import SAN
from san_model.checkpoint import replacing
from san_model.model import RGB_MEAN, RegionNonLocal, second_order

DATA = Path(os.environ.get("ISQRT_COV_DATA", Path(__file__).parents[2] / "shared" / "data"))
VARIANTS = ["base", "ssc", "foca", "soca"]


def gradients(model, x):
    model.zero_grad()
    model(x).abs().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# ---- The authors' network --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["san_x2_g2b2f16r4", "san_x3_g2b1f32r8"])
def test_output_and_gradients_are_the_authors(name, device, tmp_path):
    path = DATA / "official_san" / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"{path} is not there; ISQRT_COV_DATA names the folder")
    tensors = load_file(path)
    torch.save({key[3:]: tensor for key, tensor in tensors.items() if key.startswith("sd.")}, tmp_path / "official.pt")
    model = SAN.from_checkpoint(tmp_path / "official.pt").to(device)
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    del config["n_colors"]
    assert config.items() <= model.config.items()

    x = tensors["x"].to(device).requires_grad_()
    with torch.backends.cudnn.flags(allow_tf32=False):
        y = model(x)
        y.abs().mean().backward()
    torch.testing.assert_close(y.cpu(), tensors["y"], atol=1e-3, rtol=0)
    # The authors' float32 centring matrix and printed Eq. 6 cost three digits; float64 is as far from them as float32.
    grads = {f"grad.{key}": parameter.grad for key, parameter in model.named_parameters()} | {"grad_x": x.grad}
    expected = {key: tensor for key, tensor in tensors.items() if key.startswith("grad")}
    assert len(expected) > 5
    for key, tensor in expected.items():
        error = (grads[key].cpu() - tensor).abs().max() / tensor.abs().max()
        assert error < 1e-3, f"{key}: {error:.1e}"


@pytest.mark.parametrize(
    "scale, values, tensors", [(2, 15712800, 965), (3, 15897440, 965), (4, 15860512, 967), (8, 16008224, 969)]
)
def test_size_is_the_authors(scale, values, tensors):
    with torch.device("meta"):
        model = SAN(scale)
    state = model.state_dict()
    assert (sum(tensor.numel() for tensor in state.values()), len(state)) == (values, tensors)
    unused = 38044  # conv_last, non_local.soca and every RG.i.gamma
    mean_shifts = 24
    assert sum(parameter.numel() for parameter in model.parameters()) == values - unused - mean_shifts


def test_keys_come_in_the_authors_order():
    groups = []
    for i in range(2):
        groups += [f"RG.{i}.gamma"]
        modules = ["rcab.0.conv_first.0", "rcab.0.conv_first.2", "soca.conv_du.0", "soca.conv_du.2", "conv_last"]
        groups += [f"RG.{i}.{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    modules = ["conv_last", "add_mean", "non_local.soca.conv_du.0", "non_local.soca.conv_du.2"]
    modules += [f"non_local.non_local.{layer}" for layer in ("g.0", "W", "theta", "phi.0")]
    modules += ["head.0", "tail.0.0", "tail.0.2", "tail.1"]
    rest = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    assert list(small(scale=4).state_dict()) == ["gamma", "sub_mean.weight", "sub_mean.bias", *groups, *rest]


def literal_non_local(module, x):
    """The authors' quadrants one by one, with the whole matrix of scores."""
    block, out = module.non_local, torch.zeros_like(x)
    height, width = x.shape[2] // 2, x.shape[3] // 2
    for rows in (slice(None, height), slice(height, None)):
        for columns in (slice(None, width), slice(width, None)):
            part = x[:, :, rows, columns]
            g = F.max_pool2d(block.g(part), 2).flatten(2)
            scores = (block.theta(part).flatten(2).mT @ F.max_pool2d(block.phi(part), 2).flatten(2)).softmax(-1)
            out[:, :, rows, columns] = block.W((scores @ g.mT).mT.unflatten(2, part.shape[2:])) + part
    return out


def non_local(channels):
    torch.manual_seed(0)
    module = RegionNonLocal(channels).double()
    torch.nn.init.normal_(module.non_local.W.weight)
    return module


@pytest.mark.parametrize("size", [(4, 4), (4, 5), (7, 4), (9, 14)])
@pytest.mark.parametrize("channels", [8, 24, 64])
def test_non_local_is_the_authors_at_every_size_they_take(size, channels):
    module = non_local(channels)
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    torch.testing.assert_close(module(x), literal_non_local(module, x))


def test_non_local_never_holds_the_scores():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                self.numel = max(self.numel, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return out

    x = torch.randn(1, 16, 64, 64, dtype=torch.float64)
    with Largest() as largest:
        non_local(16)(x).sum().backward()
    assert largest.numel <= x.numel() < (32 * 32) * (16 * 16)


@pytest.mark.parametrize("height, width", [(3, 1000), (1000, 3), (1000, 1001), (999, 1002), (1001, 1000), (1007, 2)])
def test_covariance_is_of_the_centre(height, width):
    x = torch.rand(1, 1, height, width)
    (seen,) = second_order(x, lambda x: [x])
    assert seen.shape == (1, 1, min(height, 1000), min(width, 1000))
    top, left = (height - seen.shape[2]) // 2, (width - seen.shape[3]) // 2
    assert seen.data_ptr() == x[:, :, top:, left:].data_ptr()  # a view


# ---- Variants --------------------------------------------------------------------------------------------------------


def test_share_source_skips_start_at_nothing():
    outputs = []
    for variant in ("base", "ssc"):
        torch.manual_seed(0)
        outputs.append(SAN(**SMALL, variant=variant)(image(8, 8)))
    assert torch.equal(*outputs)


def test_variants_differ():
    outputs = [small(variant=variant)(image(8, 8)) for variant in VARIANTS]
    for i, output in enumerate(outputs):
        assert all(not torch.allclose(output, other) for other in outputs[:i])


def test_enough_iterations_reach_the_exact_root():
    x = image(24, 24, dtype=torch.float64)
    eig = small(normalization="eig").double()(x)
    errors = [(small(iterations=n).double()(x) - eig).abs().max().item() for n in (5, 20)]
    assert errors[1] < 1e-3 * errors[0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("normalization", ["newton_schulz", "eig"])
def test_every_parameter_is_trained(variant, normalization, device):
    model = small(variant=variant, normalization=normalization).to(device)
    for name, grad in gradients(model, image(9, 11, batch=2).to(device)).items():
        assert grad.isfinite().all() and grad.any(), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("normalization", ["newton_schulz", "eig"])
@pytest.mark.parametrize("value", [0.0, 255.0])
def test_constant_image(variant, normalization, value):
    model = small(variant=variant, normalization=normalization)
    x = torch.full((1, 3, 8, 8), value, requires_grad=True)
    y = model(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# ---- Initial values --------------------------------------------------------------------------------------------------


def test_deferred_initialisation():
    with torch.device("meta"):
        model = SAN(**SMALL, variant="ssc")
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(torch.nan)
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    torch.manual_seed(0)
    assert_same(model, SAN(**SMALL, variant="ssc"))
    assert not any(tensor.any() for name, tensor in model.state_dict().items() if "gamma" in name or ".W." in name)
    x, mean = image(4, 4), 255 * torch.tensor(RGB_MEAN)[:, None, None]
    torch.testing.assert_close(model.sub_mean(x), x - mean)
    torch.testing.assert_close(model.add_mean(x), x + mean)


def test_seed_gives_what_plain_convolutions_draw():
    torch.manual_seed(0)
    model = SAN(**SMALL, variant="ssc")
    torch.manual_seed(0)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            plain = torch.nn.Conv2d(module.in_channels, module.out_channels, module.kernel_size)
            assert torch.equal(module.weight, plain.weight) or name.endswith(("mean", ".W")), name


# ---- Sizes, dtypes, layouts, compilation -----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1), (2, 3), (3, 2), (7, 4)])
def test_any_size(scale, size):
    y = small(scale=scale)(image(*size, batch=2))
    assert y.shape == (2, 3, scale * size[0], scale * size[1])
    assert y.isfinite().all()


def test_shapes_without_numbers():
    with torch.device("meta"):
        assert SAN(2, 1, 1, 8, 4)(torch.zeros(2, 3, 9, 7)).shape == (2, 3, 18, 14)


def test_empty_batch():
    assert small()(image(8, 6, batch=0)).shape == (0, 3, 16, 12)


def test_float64():
    x = image(10, 9, dtype=torch.float64)
    y = small().double()(x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(small()(x.float()).double(), y, atol=1e-2, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("normalization", ["newton_schulz", "eig"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(variant, normalization, dtype, device):
    model = small(variant=variant, normalization=normalization).to(device)
    x = image(12, 12).to(device)
    with torch.autocast(device, dtype):
        y = model(x)
    assert y.dtype == torch.float32  # the mean is added last, outside
    expected = model(x)
    # Each of some twelve convolutions in a row rounds its input, weights and output by at most half an eps.
    assert (y - expected).abs().mean() < 3 * torch.finfo(dtype).eps * expected.std()
    y.abs().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_throughout(dtype):
    y = small().to(dtype)(image(8, 8, dtype=dtype))
    assert y.dtype == dtype and y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_alone_in_half_precision(dtype):
    """What a sharded network with mixed precision computes in: its buffers stay as they are."""
    model, x = small(), image(12, 12)
    expected = model(x)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    y = model(x)
    assert y.dtype == torch.float32  # of the mean, which is added last
    assert (y - expected).abs().mean() < 3 * torch.finfo(dtype).eps * expected.std()  # as under autocast
    y.abs().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_mean_is_subtracted_before_rounding():
    model, x, seen = small().bfloat16(), image(8, 8), []
    model.head.register_forward_pre_hook(lambda _, args: seen.extend(args))
    model(x)
    torch.testing.assert_close(seen, [(x + model.sub_mean.bias.float()[:, None, None]).bfloat16()])


def test_channels_last(device):
    x = image(9, 12, batch=2, dtype=torch.float64).to(device)
    expected = gradients(small().double().to(device), x)
    model = small().double().to(device, memory_format=torch.channels_last)
    for name, grad in gradients(model, x.contiguous(memory_format=torch.channels_last)).items():
        torch.testing.assert_close(grad, expected[name])


def test_compiles_to_one_graph():
    model, x = small(n_resgroups=1), image(10, 9)
    expected = gradients(model, x)
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).abs().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_compiles_once_for_all_sizes():
    counter = CompileCounterWithBackend("eager")
    model = torch.compile(SAN(2, 1, 1, 8, 8, variant="base"), backend=counter, dynamic=True)
    with torch.no_grad():
        for size in ((10, 12), (16, 18), (25, 31)):
            model(image(*size, batch=2))
    assert counter.frame_count == 1


DDP = """
import sys
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from san_model import SAN

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
model = DistributedDataParallel(SAN.from_checkpoint(f"{folder}/model.safetensors").double())
x = load_file(f"{folder}/x.safetensors")["x"]
for _ in range(2):  # a parameter without a gradient would stop the second step
    model.zero_grad()
    model(x[rank : rank + 1]).abs().mean().backward()
expected = load_file(f"{folder}/grads.safetensors")
for name, parameter in model.module.named_parameters():
    torch.testing.assert_close(parameter.grad, expected[name])
dist.destroy_process_group()
"""


def test_two_processes_train_as_one(tmp_path):
    model, x = small(), image(8, 8, batch=2, dtype=torch.float64)
    model.save(tmp_path / "model.safetensors")
    save_file({"x": x}, tmp_path / "x.safetensors")
    save_file(gradients(model.double(), x), tmp_path / "grads.safetensors")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DDP, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)


# ---- Wrong arguments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argument, value",
    [
        ("scale", 5),
        ("variant", "third"),
        ("normalization", "svd"),
        ("n_resgroups", 0),
        ("n_resblocks", -1),
        ("iterations", 0),
        ("iterations", 2.5),
        ("iterations", 1001),
        ("iterations", True),
        ("rgb_range", 0),
        ("rgb_range", "255"),
        ("n_feats", 12),
        ("reduction", 5),
    ],
)
def test_wrong_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=rf"^{argument}: .*{value}"):
        SAN(**(SMALL | {argument: value}))


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(3, 8, 8),
        torch.zeros(1, 1, 8, 8),
        torch.zeros(1, 3, 0, 8),
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
    ],
)
def test_wrong_images_are_named(x):
    with pytest.raises(ValueError, match=r"^x: expected floating-point images \(B, 3, H, W\), got torch"):
        small()(x)


# ---- Files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("n_resgroups", 10**9, "2 by the tensors, but 1000000000 by the configuration"),
        ("n_resblocks", True, "1 by the tensors, but True by the configuration"),
        ("n_feats", "16", "16 by the tensors, but '16' by the configuration"),
        ("scale", 3, "2 by the tensors, but 3 by the configuration"),
        ("reduction", [4], r"4 by the tensors, but \[4\] by the configuration"),
        ("rgb_range", "255", "expected a positive number, got '255'"),
        ("iterations", 5000, "expected 1000 or less, got 5000"),
        ("normalization", None, "expected one of .*, got None"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(name, value, message, suffix, tmp_path):
    model, path = small(), tmp_path / f"model.{suffix}"
    model.config[name] = value
    model.save(path)
    with pytest.raises(ValueError, match=rf"^{path}: {name}: {message}$"):
        SAN.from_checkpoint(path)


def test_odd_entries_of_a_checkpoint_are_named(tmp_path):
    state = dict(small().state_dict())
    torch.save(state | {5: torch.ones(1)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt: the keys do not fit .*: unexpected 5$"):
        SAN.from_checkpoint(tmp_path / "model.pt")
    torch.save(state | {"RG.0.soca.conv_du.0.weight": torch.tensor(1.0)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt: the keys do not fit .*: of another shape RG"):
        SAN.from_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("umask", [0o022, 0o077])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_files_are_as_open_to_others_as_the_umask_says(suffix, umask, tmp_path):
    before = os.umask(umask)
    try:
        small().save(tmp_path / f"model.{suffix}")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o666 & ~umask]


def test_each_writer_has_a_file_of_its_own(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as first, replacing(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # whose block ended last
    with pytest.raises(KeyboardInterrupt), replacing(path) as third:
        third.write_text("half a fi")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "first"
