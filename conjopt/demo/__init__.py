"""What ``conjopt demo`` runs: digits, two networks, three optimizers, and a summary of them."""
