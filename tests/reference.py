"""One step of ConjSGD (spectral direction, edge rule) as plainly as it can be written.

Dense Jacobians, float64, one sample after the other; nothing is shared with the package.
"""

import torch

COEFFICIENTS = [
    (8.09337, -23.62043, 17.44615),
    (3.63659, -2.72193, 0.53655),
    (2.6613, -1.97715, 0.45262),
]


def orthogonal(M):
    rows, columns = M.shape
    X = M.T if rows > columns else M
    X = X / (X @ X.T).norm().sqrt()
    for a, b, c in COEFFICIENTS:
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    X = X.T if rows > columns else X
    return max(1, rows / columns) ** 0.5 * X


class ReferenceSteps:
    def __init__(self, parameters, *, warmup, every, decay=0.1, s=1.5, rho_min=0.3, tau=1.0):
        self.parameters = parameters
        self.warmup, self.every, self.decay = warmup, every, decay
        self.s, self.rho_min, self.tau = s, rho_min, tau
        self.t, self.count, self.Lbar = 0, 0, None
        blocks = [
            {"m": torch.zeros_like(p), "v": 0.0, "S": 0.0, "C": 0.0, "w": 1.0} for p in parameters
        ]
        self.blocks = blocks
        self.N = self.S = self.q = self.V = 0.0

    def direction(self, block, g, g_batch):
        ahead = 0.9**2 * block["m"] + (1 - 0.9**2) * g
        if g.ndim > 1 and g.shape[0] > 1 and g.numel() > g.shape[0]:
            return orthogonal(ahead.reshape(g.shape[0], -1)).reshape(g.shape)
        v = 0.99 * block["v"] + 0.01 * (g_batch**2).mean()
        return ahead / (v / (1 - 0.99**self.t)).sqrt()

    def __call__(self, f, total, cross_entropy, clip=None):
        """f: (m, k) logits with their graph; total: () what is differentiated, by f alone."""
        self.t += 1
        (m, k), parameters, blocks = f.shape, self.parameters, self.blocks
        J = [  # a list over blocks of (m, k, *shape)
            torch.stack(rows).reshape(m, k, *p.shape)
            for p, rows in zip(
                parameters,
                zip(*(torch.autograd.grad(x, parameters, retain_graph=True) for x in f.flatten())),
            )
        ]
        (d,) = torch.autograd.grad(total, f)
        per_sample = [torch.einsum("ik,ik...->i...", d, j) for j in J]  # they sum to the gradient
        g = [x.sum(0) for x in per_sample]
        r = min(1.0, clip / (torch.cat([x.flatten() for x in g]).norm() + 1e-6)) if clip else 1.0
        even, odd = slice(0, None, 2), slice(1, None, 2)
        w1 = ((m + 1) // 2) / m
        g = [r * x for x in g]
        g1 = [r * x[even].sum(0) / w1 for x in per_sample]
        g2 = [r * x[odd].sum(0) / (1 - w1) for x in per_sample]

        self.Lbar = cross_entropy if self.Lbar is None else 0.9 * self.Lbar + 0.1 * cross_entropy
        if self.t <= self.warmup or self.t % self.every == 0:
            u = [self.direction(b, x2, x) for b, x2, x in zip(blocks, g2, g)]
            self.count += 1
            for b, x1, x, v in zip(blocks, g1, g, u):
                b["S"] = 0.9 * b["S"] + 0.1 * (x * v).sum()
                b["C"] = 0.9 * b["C"] + 0.1 * (x1 * v).sum()
                rho = min(max(b["C"] / max(b["S"], 1e-300), 0.02), 1.0)
                matrix = v.ndim > 1 and v.shape[0] > 1 and v.numel() > v.shape[0]
                b["w"] = rho**0.5 if matrix else rho
            u = [b["w"] * v for b, v in zip(blocks, u)]
            Ju = sum(torch.einsum("ik...,...->ik", j, v) for j, v in zip(J, u))[odd]
            yhat = f[odd].detach().softmax(1)
            HJu = yhat * Ju - yhat * (yhat * Ju).sum(1, keepdim=True)
            q = (Ju * HJu).sum(1).mean()
            V = (Ju - Ju.mean(1, keepdim=True)).square().sum(1).mean().sqrt()
            self.N = 0.9 * self.N + 0.1 * sum((x * v).sum() for x, v in zip(g1, u))
            self.S = 0.9 * self.S + 0.1 * sum((x * v).sum() for x, v in zip(g, u))
            self.q = 0.9 * self.q + 0.1 * q
            self.V = V if self.count == 1 else max(V, 0.9 * self.V + 0.1 * V)
            corrected = 1 - 0.9**self.count
            N, S, q = self.N / corrected, self.S / corrected, self.q / corrected
            self.edge = self.s * max(N, self.rho_min * S, 0.0) / q
            self.polyak = self.Lbar / S if S > 0 else float("inf")
        else:
            u = [b["w"] * self.direction(b, x, x) for b, x in zip(blocks, g)]
        trust = self.tau * (2 * self.Lbar / 0.5) ** 0.5 / self.V  # beta = 1/2
        a = float(min(self.edge, self.polyak, trust))
        with torch.no_grad():
            for p, b, v, x in zip(parameters, blocks, u, g):
                p.mul_(1 - min(self.decay * a, 0.002)).sub_(a * v)
                b["m"] = 0.9 * b["m"] + 0.1 * x
                b["v"] = 0.99 * b["v"] + 0.01 * (x**2).mean()
        return a
