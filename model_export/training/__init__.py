"""The training loop: targets, losses, augmentation, callbacks, several processes."""
