"""An SGD wrapper for PyTorch that sets its own step size by conjugate learning theory."""
