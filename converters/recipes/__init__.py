"""Which steps make a bundle of which kind of model."""
