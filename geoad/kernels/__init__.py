"""Plain tensors in and out: torch.func and vmap run here, types are attached at the border."""
