"""TensorRT: whether it takes a graph, why not, and graphs that it takes."""
