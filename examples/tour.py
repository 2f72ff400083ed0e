# make .venv/.built && .venv/bin/python examples/tour.py
"""A tour of the method in five stops, each a few numbers; with matplotlib installed also pictures in out/tour."""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

import consequentialism as cw

FOLDER = Path("out/tour")
DRAWS = importlib.util.find_spec("matplotlib") is not None


def two_samples() -> None:
    """What a step taken for one sample does to another, and the step that foresees it."""
    x = torch.tensor([[1.0, 0.0], [0.94, 0.34]])  # 20 degrees apart
    dy = torch.tensor([[1.0], [-1.0]])  # the first output is to fall, the second to rise
    print("1. Two samples 20 degrees apart ask for opposite changes, -1 and +1. A step of size 1 gives")
    emended, _ = cw.emended_weight_grad(x, dy, bias=False, damping=1e-4, scale="raw")
    for name, gradient in (("plain", dy.T @ x), ("emended", emended)):
        first, second = (-cw.predict_change(x, gradient)).flatten().tolist()
        print(f"   {name:8} {first:+.3f} and {second:+.3f}")


def coloured(samples: int, taps: int) -> tuple[Tensor, Tensor, Tensor]:
    """An unknown filter, and windows of a strongly correlated signal with what comes out of it."""
    unknown, signal = torch.randn(taps), torch.zeros(samples + taps)
    for t in range(1, len(signal)):
        signal[t] = 0.9 * signal[t - 1] + torch.randn(())
    windows = signal.unfold(0, taps, 1)[:samples]
    return unknown, windows, windows @ unknown


def identify() -> dict[str, list[float]]:
    """One layer with one output is an adaptive filter: LMS, NLMS (a batch of 1), APA (a sliding window of 4)."""
    unknown, windows, desired = coloured(800, 16)
    setups = {"LMS": (1, False, 0.005), "NLMS": (1, True, 1.0), "APA of order 4": (4, True, 1.0)}
    curves: dict[str, list[float]] = {}
    print("2. A single layer identifies a filter of 16 taps from a correlated signal; error of the taps after")
    for name, (order, emended, lr) in setups.items():
        layer = nn.Linear(16, 1, bias=False)
        nn.init.zeros_(layer.weight)
        layer = cw.convert(layer, damping=1e-3, scale="raw") if emended else layer
        optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
        curves[name] = []
        for t in range(order, len(windows)):
            optimizer.zero_grad()
            error = layer(windows[t - order : t]).flatten() - desired[t - order : t]
            (0.5 * error.square().sum()).backward()
            optimizer.step()
            curves[name].append(float((layer.weight.detach().flatten() - unknown).norm() / unknown.norm()))
        print(f"   {name:15} 100 samples {curves[name][99]:.1e}   700 samples {curves[name][699]:.1e}")
    return curves


def stack() -> None:
    """A deep network is a stack of such filters, each with the errors that backpropagation hands it."""
    x = torch.randn(256, 20) + 1.0
    labels = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 5))(x).argmax(1)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    report = cw.diagnose(model, (x[:64], labels[:64]), nn.functional.cross_entropy)
    print("3. In every layer of a network, what the other samples' steps do to a sample, in units of its own step:")
    for layer in report.layers:
        print(f"   layer {layer.name}: {layer.interference:.1f} plain, {layer.interference_emended:.1f} emended")
    if DRAWS:
        report.to_html(FOLDER / "report.html")
    found = cw.find_damping(model, list(zip(x.split(64), labels.split(64), strict=True)), nn.functional.cross_entropy)
    plain = min(one.loss for one in found.tries if one.damping is None)
    print(
        f"4. Twenty steps of it, best loss over the rates tried: plain SGD {plain:.3f}, emended {found.best.loss:.3f}"
    )


def coordinates() -> None:
    """Coordinates in which every step has the same consequence do not care how the inputs are written."""
    x, target = torch.randn(128, 8, dtype=torch.float64), torch.randn(128, 3, dtype=torch.float64)
    basis = torch.randn(8, 8, dtype=torch.float64)
    print("5. The same data in another basis; outputs of the two trained layers differ by")
    for name in ("SGD", "SGD in emended coordinates"):
        outputs = []
        for inputs in (x, x @ basis):
            layer = nn.Linear(8, 3, bias=False).double()
            nn.init.zeros_(layer.weight)
            optimizer: torch.optim.Optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
            if name != "SGD":
                optimizer = cw.optim.Emended(optimizer, layer, damping=1e-9, memory=0.0, refresh_every=1)
            for _ in range(20):
                optimizer.zero_grad()
                nn.functional.mse_loss(layer(inputs), target).backward()
                optimizer.step()
            outputs.append(layer(inputs).detach())
        print(f"   {name:27} {float((outputs[0] - outputs[1]).norm() / outputs[0].norm()):.1e}")


def draw(curves: dict[str, list[float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, errors in curves.items():
        axes.semilogy(errors, label=name)
    axes.set(xlabel="samples", ylabel="error of the taps", title="One layer as an adaptive filter")
    axes.legend(frameon=False)
    figure.savefig(FOLDER / "filters.png", dpi=110)


if __name__ == "__main__":
    torch.manual_seed(0)
    FOLDER.mkdir(parents=True, exist_ok=True)
    two_samples()
    curves = identify()
    stack()
    coordinates()
    if DRAWS:
        draw(curves)
        print(f"Pictures: {FOLDER / 'filters.png'}, {FOLDER / 'report.html'}")
