"""What a real loop adds: accumulation, clipping, dropout, a functional loss, a schedule, averaging.

Synthetic data, a few seconds.
"""

import torch
from torch import nn
from torch.nn import functional

import conjopt

torch.manual_seed(0)
x = torch.randn(512, 20)
y = x[:, :4].argmax(1)

model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 4))
criterion = nn.CrossEntropyLoss(label_smoothing=0.05)  # its entropy is the data floor by itself
optimizer = conjopt.ConjSGD(
    [
        {"params": model[0].parameters(), "lr": 0.5},  # half the step of the other layer
        {"params": model[3].parameters(), "weight_decay": 0.0},
    ],
    model=model,
    loss=criterion,
    average=0.1,
)
# lr has no unit: 1 is what the theory says. Every scheduler of torch acts on it.
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=20)

for epoch in range(20):
    for batch in torch.randperm(512).split(128):
        optimizer.zero_grad()
        for part in batch.split(64):  # two micro-batches accumulate
            outputs = model(x[part])
            if epoch % 2:
                # The criterion module is not called here, so the optimizer is told.
                optimizer.observe(outputs, y[part], scale=0.5)
                loss = functional.cross_entropy(outputs, y[part], label_smoothing=0.05)
            else:
                loss = criterion(outputs, y[part])
            (loss / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    schedule.step()

print(optimizer.status())
model.eval()
with torch.no_grad(), optimizer.averaged():
    accuracy = (model(x).argmax(1) == y).float().mean()
print(f"accuracy         {100 * accuracy:.1f} % with averaged weights")
