"""On a CUDA device: no waiting in an ordinary step, graph capture, precision, the same path."""

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

from conjopt import ConjSGD
from conjopt.optim.directions import COEFFICIENTS, orthogonalize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WAYS = {
    "spectral": {},
    "sgd": {"direction": "sgd"},
    "constant": {"direction": "sgd", "step_rule": "constant", "lr": 0.1},
}


class Loop:
    """A loop with static inputs, made on the CPU so that all devices start alike."""

    def __init__(self, way, device, dtype=torch.float32, **options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
        self.model, self.criterion = model.to(device), nn.CrossEntropyLoss()
        options = {"warmup": 3, "measure_every": 1000, **WAYS[way], **options}
        self.optimizer = ConjSGD(
            self.model.parameters(), model=self.model, loss=self.criterion, **options
        )
        self.x = torch.zeros(10, 4, device=device, dtype=dtype)
        self.y = torch.zeros(10, dtype=torch.long, device=device)

    def load(self, x, y):
        self.x.copy_(x)
        self.y.copy_(y)

    def iteration(self):
        self.optimizer.zero_grad()
        self.criterion(self.model(self.x), self.y).backward()
        self.optimizer.step()

    def parameters(self):
        return [p.detach().cpu().clone() for p in self.model.parameters()]


def batches(number):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(number, 10, 4, generator=generator)
    return list(zip(x, x[:, :, :3].argmax(-1)))


@pytest.mark.parametrize("way", WAYS)
def test_an_ordinary_step_waits_for_nothing(way):
    loop = Loop(way, "cuda")
    for x, y in batches(4):
        loop.load(x, y)
        loop.iteration()
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            loop.iteration()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert loop.optimizer.status().step == 7


@pytest.mark.parametrize("way", WAYS)
def test_a_captured_step_is_the_step(way):
    """With measuring steps in between that Python takes."""
    python, graphed = (Loop(way, "cuda", measure_every=6) for _ in range(2))
    graph, replays = None, 0
    for number, (x, y) in enumerate(batches(30)):
        python.load(x, y)
        graphed.load(x, y)
        python.iteration()
        if graphed.optimizer.measures_next or number < 4:
            # torch wants warm-up iterations on a side stream.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                graphed.iteration()
            torch.cuda.current_stream().wait_stream(side)
            continue
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            graphed.optimizer.zero_grad()
            with torch.cuda.graph(graph):  # which takes no step
                graphed.criterion(graphed.model(graphed.x), graphed.y).backward()
                graphed.optimizer.step()
        else:
            graphed.optimizer.replayed()
        graph.replay()
        replays += 1
    assert replays > 15
    for p, q in zip(python.parameters(), graphed.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert python.optimizer.status().step == graphed.optimizer.status().step == 30


@pytest.mark.parametrize("way", WAYS)
def test_the_path_is_that_of_a_cpu(way):
    """In double precision; the spectral direction is made in bfloat16 on a GPU."""
    here, there = Loop(way, "cpu", torch.float64), Loop(way, "cuda", torch.float64)
    for x, y in batches(12):
        for loop in (here, there):
            loop.load(x.double(), y)
            loop.iteration()
    loose = {"rtol": 5e-2, "atol": 5e-2} if way == "spectral" else {"rtol": 1e-8, "atol": 1e-10}
    for p, q in zip(here.parameters(), there.parameters()):
        torch.testing.assert_close(p, q, **loose)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 40), (2, 5, 300)])
def test_orthogonalising_in_bfloat16(shape):
    matrices = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalize(matrices.cuda()).double().cpu()
    x = matrices.double()
    x = x / (x @ x.mT).square().sum((-2, -1), keepdim=True).sqrt().sqrt()
    for a, b, c in COEFFICIENTS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    error = torch.linalg.matrix_norm(found - x) / torch.linalg.matrix_norm(x)
    assert error.max() < 0.05
    values = torch.linalg.svdvals(found)
    assert values.max() < 1.4


@pytest.mark.parametrize("way", WAYS)
def test_autocast_to_float16_under_a_scaler(way):
    loop, scaler = Loop(way, "cuda", measure_every=4), GradScaler("cuda", init_scale=2.0**10)
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1)).cuda()
    y = x[:, :3].argmax(1)
    losses = []
    for _ in range(60):
        loop.optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = loop.criterion(loop.model(x), y)
        scaler.scale(loss).backward()
        scaler.step(loop.optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert loop.optimizer.status().skipped_steps == 0
