"""PartialConv2d with the rest of PyTorch: what works with nn.Conv2d works with it."""

import copy
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from glance_ext import _library
from glance_ext.nn import PartialConv2d


class Net(nn.Module):
    """Two layers that hand on their mask."""

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.first = PartialConv2d(3, 8, 3, stride=2, padding=1, return_mask=True, device=device)
        self.second = PartialConv2d(8, 4, 3, padding=1, device=device)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        hidden, mask = self.first(image, mask)
        return self.second(hidden.relu(), mask)


def example(batch: int = 2, height: int = 12, width: int = 14) -> tuple[Tensor, Tensor]:
    mask = torch.rand(batch, 1, height, width) > 0.4
    mask[..., :6, :6] = False
    return torch.where(mask, torch.randn(batch, 3, height, width), torch.nan), mask


def gradients(net: nn.Module) -> list[Tensor]:
    grads = [parameter.grad for parameter in net.parameters()]
    assert all(grad is not None for grad in grads)
    return [grad.clone() for grad in grads if grad is not None]


def assert_all_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_grad_scaler_scales_unscales_and_skips_an_overflow(device: str) -> None:
    """float16 autocast, with a loss so small that its gradients vanish without scaling."""
    kind = torch.device(device).type
    net, (image, mask) = Net().to(device), example()
    image, mask = image.to(device), mask.to(device)
    scaler = torch.amp.GradScaler(kind, init_scale=2.0**10)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)

    def loss(size: float) -> Tensor:
        with torch.autocast(kind, torch.float16):
            output = net(image, mask)
        assert output.dtype == torch.float16
        return (output * size).float().mean()

    exact = copy.deepcopy(net)
    (exact(image, mask) * 2e-5).mean().backward()
    scaler.scale(loss(2e-5)).backward()
    scaler.unscale_(optimizer)
    for got, expected in zip(gradients(net), gradients(exact), strict=True):
        torch.testing.assert_close(got, expected, rtol=0.05, atol=float(expected.abs().max()) / 20)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10

    before = copy.deepcopy(net.state_dict())
    optimizer.zero_grad()
    scaler.scale(loss(1e6)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])


def test_compiles_once_for_every_size_and_trains() -> None:
    torch._dynamo.reset()
    net = Net()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, height, width in [(2, 12, 14), (3, 17, 20), (5, 32, 9)]:
        image, mask = example(batch, height, width)
        results = []
        stance = "default" if batch == 2 else "fail_on_recompile"
        for module in (net, compiled):
            net.zero_grad()
            with torch.compiler.set_stance(stance):
                output = module(image, mask)
                output.square().sum().backward()
            results.append([output.detach(), *gradients(net)])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.slow
def test_compiles_with_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where CI is set, Inductor refuses an op that has both a kernel and an entry in torch's table
    # of decompositions; it looks once a process, and not where its cache has the graph.
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr("torch.compiler.config.force_disable_caches", True)
    if _library.is_loaded():
        assert not torch._decomp.get_decompositions([torch.ops.glance_ext.partial_conv2d.default])
    torch._dynamo.reset()
    net, (image, mask) = Net(), example()
    expected = net(image, mask)
    expected.square().sum().backward()
    grads = gradients(net)
    net.zero_grad()
    output = torch.compile(net, fullgraph=True, dynamic=True)(image, mask)
    output.square().sum().backward()
    torch.testing.assert_close(output, expected)
    for got, grad in zip(gradients(net), grads, strict=True):
        torch.testing.assert_close(got, grad)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graph_replays_on_new_images_and_masks() -> None:
    net = Net().cuda()
    image, mask = (t.cuda() for t in example())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            net.zero_grad()
            net(image, mask).square().sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    net.zero_grad(set_to_none=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = net(image, mask)
        output.square().sum().backward()
    for _ in range(2):
        other_image, other_mask = (t.cuda() for t in example())
        image.copy_(other_image)
        mask.copy_(other_mask)
        for parameter in net.parameters():
            assert parameter.grad is not None
            parameter.grad.zero_()
        graph.replay()
        replayed = [output.clone(), *gradients(net)]
        eager = copy.deepcopy(net)
        eager.zero_grad()
        expected = eager(other_image, other_mask)
        expected.square().sum().backward()
        for got, grad in zip(replayed, [expected.detach(), *gradients(eager)], strict=True):
            torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-4)


def _train_shard(rank: int, port: int, folder: str) -> None:
    """One of two processes: half of the batch, gradients averaged with the other half's."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    net, image, mask = torch.load(Path(folder, "start.pt"), weights_only=False)
    parallel = nn.parallel.DistributedDataParallel(net)
    half = slice(2 * rank, 2 * rank + 2)
    parallel(image[half], mask[half]).square().mean().backward()
    torch.save(gradients(net), Path(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_average_their_gradients(tmp_path: Path) -> None:
    net, (image, mask) = Net(), example(batch=4)
    torch.save((net, image, mask), tmp_path / "start.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_train_shard, (port, str(tmp_path)), nprocs=2)
    net(image, mask).square().mean().backward()
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert_all_equal(ours, theirs)
    for got, expected in zip(ours, gradients(net), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_weight_trains_and_folds_back(norm: type) -> None:
    image, mask = example()
    layer = PartialConv2d(3, 4, 3, padding=1)
    norm(layer)
    layer(image, mask).square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()
    layer.eval()
    expected = layer(image, mask)
    parametrize.remove_parametrizations(layer, "weight")
    assert list(layer.state_dict()) == ["bias", "weight"]
    torch.testing.assert_close(layer(image, mask), expected)


def test_own_parametrization_is_what_the_layer_computes_with() -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    image, mask = example()
    layer = PartialConv2d(3, 4, 3, padding=1, bias=False)
    expected = layer(image, mask)
    parametrize.register_parametrization(layer, "weight", Double())
    torch.testing.assert_close(layer(image, mask), 2 * expected)


def test_shapes_are_known_on_the_meta_device_before_there_is_memory() -> None:
    net = Net("meta")
    image, mask = (t.to("meta") for t in example(2, 13, 15))
    output = net(image, mask)
    assert output.device.type == "meta"
    output.sum().backward()
    assert all(grad.device.type == "meta" for grad in gradients(net))
    real = net.to_empty(device="cpu")
    real.load_state_dict(Net().state_dict())
    assert real(*example(2, 13, 15)).shape == output.shape


def test_deterministic_mode_is_kept(device: str) -> None:
    net, (image, mask) = Net().to(device), example(16)
    image, mask = image.to(device).requires_grad_(), mask.to(device)
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            net.zero_grad()
            image.grad = None
            output = net(image, mask)
            output.square().sum().backward()
            assert image.grad is not None
            results.append([output.detach(), image.grad.clone(), *gradients(net)])
    finally:
        torch.use_deterministic_algorithms(False)
    for other in results[1:]:
        assert_all_equal(other, results[0])
    assert all(tensor.isfinite().all() for tensor in results[0])


def test_exports_and_loads_with_any_size(tmp_path: Path) -> None:
    net = Net()
    any_size = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    program = torch.export.export(net, example(), dynamic_shapes=(any_size, any_size))
    torch.export.save(program, tmp_path / "net.pt2")
    module = torch.export.load(tmp_path / "net.pt2").module()
    image, mask = example(3, 19, 22)
    assert torch.equal(module(image, mask), net(image, mask))
