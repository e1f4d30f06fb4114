"""Makes model bundles: export, optimise, quantize, verify, measure. Command: `nearfar convert`."""
