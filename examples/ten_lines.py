"""The whole of it: an ordinary loop without a learning rate, on digits from scikit-learn."""

import torch
from sklearn.datasets import load_digits

import conjopt

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
order = torch.randperm(len(labels))
x = torch.tensor(images, dtype=torch.float32)[order] / 16
y = torch.tensor(labels)[order]
train = torch.utils.data.TensorDataset(x[360:], y[360:])
loader = torch.utils.data.DataLoader(train, batch_size=64, shuffle=True)

model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
criterion = torch.nn.CrossEntropyLoss()
optimizer = conjopt.ConjSGD(model.parameters(), model=model, loss=criterion)

for _ in range(10):
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss = criterion(model(inputs), targets)
        loss.backward()
        optimizer.step()

print(optimizer.status())
with torch.no_grad():
    accuracy = (model(x[:360]).argmax(1) == y[:360]).float().mean()
print(f"test accuracy    {100 * accuracy:.1f} %")
