"""Fuzz targets: any bytes must give a result or a documented error. See README.md."""
