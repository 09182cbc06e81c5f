"""Which tensors learn, by which loss term, and why not: any `nn.Module`, no trainer."""
