"""Which tensors learn, and why not: takes any `nn.Module`, knows no trainer."""
