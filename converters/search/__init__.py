"""`nearfar convert --auto`: try the ways to compress a model, and keep those worth having."""
