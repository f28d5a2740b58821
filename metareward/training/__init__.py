"""The training step: packing, losses, FSDP2, checkpoints. Used by the seed stage (SFT) and by every iteration (DPO)."""
