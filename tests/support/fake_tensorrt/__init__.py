"""Stand-ins for TensorRT and CUDA. The folder itself goes on the path of the building child."""
