"""The trainer and what it is made of; the only user of torch.distributed."""
