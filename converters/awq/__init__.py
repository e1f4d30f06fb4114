"""4 bits by AWQ: scales are found by ``nvidia-modelopt``, in an environment of its own."""
