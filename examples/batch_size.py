"""Batches that grow with the noise of their gradients: each batch rule on scikit-learn's digits."""

import time

import torch
from sklearn.datasets import load_digits

import conjopt
from conjopt.optim import Correlation, WorkOptimal

images, labels = load_digits(return_X_y=True)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
x = torch.tensor(images, dtype=torch.float32)[order] / 16
y = torch.tensor(labels)[order]
train_set = torch.utils.data.TensorDataset(x[360:], y[360:])

for rule in (None, Correlation(0.5), WorkOptimal()):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    criterion = torch.nn.CrossEntropyLoss()
    optimizer = conjopt.ConjSGD(
        model.parameters(), model=model, loss=criterion, batch_rule=rule, measure_every=10
    )
    sampler = conjopt.AdaptiveBatchSampler(
        train_set, optimizer, batch_size=32, max_batch_size=512, micro_batch_size=128, every=10
    )
    loader = torch.utils.data.DataLoader(train_set, batch_sampler=sampler)

    start = time.perf_counter()
    for _ in range(10):
        for (inputs, targets), part in sampler.parts(loader):
            # A large batch comes in parts of at most 128; their shares make its mean loss.
            (criterion(model(inputs), targets) * part.share).backward()
            if part.last:
                optimizer.step()
                optimizer.zero_grad()
    seconds = time.perf_counter() - start

    print(f"batch rule       {rule.name if rule else 'none'}")
    for change in sampler.history:
        where = f"epoch {change.epoch}, batch {change.batch}"
        print(f"  {where:<20} {change.old:>4} -> {change.new:<4} {change.reason}")
    status = optimizer.status()
    print(f"step size        {status.step_size:.3g} after {status.step} steps in {seconds:.1f} s")
    with torch.no_grad():
        accuracy = (model(x[:360]).argmax(1) == y[:360]).float().mean()
    print(f"test accuracy    {100 * accuracy:.1f} %\n")
