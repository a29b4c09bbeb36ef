"""Training one model in several processes, on torch.distributed and torchrun."""
