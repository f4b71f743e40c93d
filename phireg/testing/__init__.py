"""Help for testing families: checkpoints made to order."""
