"""One network on digits under four potentials; with --plot, a picture of links and losses."""

import argparse

import torch
from sklearn.datasets import load_digits

import conjopt
from conjopt.losses import EntmaxLoss, FenchelYoungLoss, SoftmaxLoss, SparsemaxLoss
from conjopt.potentials import Entmax, Logistic, Poisson, Potential, Softmax, Sparsemax, Squared


def train(loss: FenchelYoungLoss) -> dict[str, float]:
    """Train with a class loss; return what its predictions look like on held-out digits."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels))
    x = torch.tensor(images, dtype=torch.float32)[order] / 16
    y = torch.tensor(labels)[order]
    train_set = torch.utils.data.TensorDataset(x[360:], y[360:])
    loader = torch.utils.data.DataLoader(train_set, batch_size=64, shuffle=True)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    optimizer = conjopt.ConjSGD(model.parameters(), model=model, loss=loss)
    for _ in range(10):
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss(model(inputs), targets).backward()
            optimizer.step()
    with torch.no_grad():
        p = loss.potential.link(model(x[:360]))
    return {
        "accuracy": 100 * float((p.argmax(1) == y[:360]).float().mean()),
        "classes": float((p > 0).sum(1).float().mean()),
        "certain": 100 * float((p.amax(1) == 1).float().mean()),
        "step size": float(optimizer.param_groups[0]["step_size"]),
    }


def draw(path: str) -> None:
    """Draw links, losses and the bounds of Thm 2.2."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    simplex: dict[str, Potential] = {
        "softmax": Softmax(),
        "entmax 1.5": Entmax(1.5),
        "sparsemax": Sparsemax(),
    }
    real = {"squared": Squared(), "logistic": Logistic(), "Poisson": Poisson()}
    margin = torch.linspace(-4, 4, 401, dtype=torch.float64)
    f = torch.stack([margin, torch.zeros_like(margin)], -1)
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    for name, potential in simplex.items():
        axes[0, 0].plot(margin, potential.link(f)[:, 0], label=name)
        axes[0, 1].plot(margin, potential.class_loss(torch.zeros(401, dtype=torch.long), f))
        norm = torch.linspace(0, 1.05, 400, dtype=torch.float64)
        target = torch.eye(10, dtype=torch.float64)[0].expand(400, 10)
        lower, upper = potential.loss_bounds(norm, target)
        (line,) = axes[1, 1].plot(norm, lower, label=name)
        axes[1, 1].fill_between(norm, lower, upper.clamp(max=4), alpha=0.3, color=line.get_color())
    for name, potential in real.items():
        y = torch.ones(401, 1, dtype=torch.float64)
        axes[1, 0].plot(margin, potential.loss(y, margin.unsqueeze(-1)), label=name)
    for axis, title, x_label in (
        (axes[0, 0], "link: probability of class 0 of 2", "$f_0 - f_1$"),
        (axes[0, 1], "loss, target class 0 of 2", "$f_0 - f_1$"),
        (axes[1, 0], "loss, target $y = 1$, one output", "$f$"),
        (axes[1, 1], "loss against residual (Thm 2.2), one of 10 classes", "$\\|e\\|$"),
    ):
        axis.set_title(title)
        axis.set_xlabel(x_label)
        axis.set_ylim(-0.05, 1.05 if axis is axes[0, 0] else 4)
        axis.grid(alpha=0.3)
    for axis in (axes[0, 0], axes[1, 0], axes[1, 1]):
        axis.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train with each potential, print a table, and draw if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", metavar="FILE", help="where to draw the picture")
    arguments = parser.parse_args()
    losses = [SoftmaxLoss(), EntmaxLoss(1.2), EntmaxLoss(1.5), SparsemaxLoss()]
    print("potential          accuracy   classes with p > 0   p = 1     last step size")
    for loss in losses:
        row = train(loss)
        print(
            f"{loss.potential!r:18} accuracy {row['accuracy']:.1f} %   {row['classes']:5.2f}"
            f"   {row['certain']:5.1f} %   step size {row['step size']:.4f}"
        )
    if arguments.plot:
        draw(arguments.plot)


if __name__ == "__main__":
    main()
