"""What surrounds the training loop: folder, log, pictures, saving, stopping."""
