"""Between what an app has (text, bytes) and what a model takes and gives (tensors)."""
